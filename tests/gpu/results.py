"""Writes what first_quarter_hour.sh found on a GPU into the READMEs: versions, date, steps and figures.

    python3 -m tests.gpu.results SUMMARY.jsonl [...]

Several summaries are one run's tries, oldest first: a step's last one that began counts.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.gpu.steps import all_steps

ROOT = Path(__file__).parents[2]
BEGIN, END = "<!-- gpu results: begin -->", "<!-- gpu results: end -->"
PLACES = (Path(__file__).parent / "README.md", ROOT / "README.md")
BEGAN = ("passed", "failed", "timed out", "running")


@dataclass(frozen=True)
class Results:
    """Of one or several tries."""

    runs: list[dict[str, Any]]
    steps: dict[str, dict[str, Any]]

    @property
    def versions(self) -> dict[str, str]:
        return {name: version for run in self.runs for name, version in run["versions"].items()}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("summaries", type=Path, nargs="+")
    args = parser.parse_args()
    try:
        results = read_summaries(args.summaries)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    own, main_page = PLACES
    fill(own, markdown(results))
    fill(main_page, sentence(results))
    print(f"written into {own} and {main_page}")
    return 0


def read_summaries(paths: list[Path]) -> Results:
    """
    Raises:
        ValueError: one of them ran on no GPU, so that it says nothing about GPUs.
    """
    runs, steps = [], {}
    for path in paths:
        head, *lines = [json.loads(line) for line in path.read_text().splitlines()]
        run = head["run"]
        runs.append(run)
        for line in lines:
            if line["state"] in BEGAN or line["step"] not in steps:
                steps[line["step"]] = line
        if run["rehearsal"]:
            raise ValueError(f"{path} is a rehearsal on a CPU: no GPU ran it, and nothing is written.")
    found = Results(runs, steps)
    if found.versions.get("gpu", "none") == "none":
        raise ValueError(
            f"{', '.join(map(str, paths))} name no GPU (step versions did not find one): nothing is written."
        )
    return found


def markdown(results: Results) -> str:
    """For tests/gpu/README.md."""
    commits = ", ".join(dict.fromkeys(run["commit"] for run in results.runs))
    dates = ", ".join(dict.fromkeys(run["began"] for run in results.runs))
    rows = [
        f"| `{s['step']}` | {s['shows']} | {s['state']} | {s.get('seconds', 0):.0f} s |"
        if "seconds" in s
        else f"| `{s['step']}` | {s['shows']} | {s['state']} | |"
        for s in results.steps.values()
    ]
    rows += [
        f"| `{s.name}` | {s.shows} | not run | |" for s in all_steps(rehearsal=False) if s.name not in results.steps
    ]
    figures = [r["figure"] for s in results.steps.values() for r in s.get("records", ()) if "figure" in r]
    return "\n".join(
        [
            f"Began {dates}; commit {commits}; " + "; ".join(f"{k} {v}" for k, v in results.versions.items()) + ".",
            "",
            "| step | shows | came out | took |",
            "| --- | --- | --- | --- |",
            *rows,
            "",
            "Figures, as the steps gave them:",
            "",
            *(f"    {json.dumps(figure)}" for figure in figures),
        ]
    )


def sentence(results: Results) -> str:
    """For the README of the project. Steps that nobody chose count as not passed."""
    names = {s.name for s in all_steps(rehearsal=False)} | set(results.steps)
    passed = sum(s["state"] == "passed" for s in results.steps.values())
    last, found = results.runs[-1], results.versions
    vllm, torch = found.get("vllm", "unknown"), found.get("torch", "unknown")
    bounds = supported("vllm")
    note = "" if within(vllm, bounds) else f" (outside the supported {bounds})"
    return (
        f"Last run on {found['gpu']}, {last['began']}, commit {last['commit']}, with vLLM {vllm}{note} and torch "
        f"{torch}: {passed} of {len(names)} steps passed; versions, steps and figures are in "
        f"[`tests/gpu`](tests/gpu/README.md)."
    )


def supported(package: str) -> str:
    """The bounds that pyproject.toml gives users of GPUs, such as >=0.28,<0.34."""
    asked = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]["gpu"]
    (found,) = [text.removeprefix(package) for text in asked if re.match(rf"{package}\b", text)]
    return str(found)


def within(version: str, bounds: str) -> bool:
    """Whether a release is at least the first and below the second of two bounds."""
    numbers = [
        tuple(map(int, re.findall(r"\d+", text.partition("+")[0])[:2])) for text in (version, *bounds.split(","))
    ]
    return numbers[1] <= numbers[0] < numbers[2]


def fill(path: Path, text: str) -> None:
    """Replaces what stands between the marks."""
    before, _, rest = path.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}")


if __name__ == "__main__":
    sys.exit(main())
