"""The samples that the page lets one browse: responses grouped by prompt, and the verdicts on pairs of them.

Five kinds of files come to one form: completions of training, judged pairs, sampled responses, revisions, and
responses judged one at a time.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlaif_ray.documents import at, is_below
from rlaif_ray.evaluation.report.runs import Json, Run, rows
from rlaif_ray.paths import expand_home
from rlaif_ray.tracking.files import plain

MAX_ROWS = 50_000  # of all runs together: what a browser still opens in a moment


class Samples:
    """Groups of responses, in the order they were found. One group is what the page shows side by side."""

    def __init__(self, runs: list[Run], labels: Sequence[Path] = ()) -> None:
        """Reads the runs' files.

        Args:
            labels: files of records that may be read though they are outside of the runs' folders.
        """
        self._may_read = {expand_home(path).resolve() for path in labels}
        self._groups: dict[Hashable, int] = {}
        self._shown: list[Json] = []  # of each group: its prompt, step and what it is
        self._prompts: dict[str, int] = {}
        self._responses: dict[Hashable, int] = {}
        self._rows: list[Json] = []
        self._verdicts: list[Json] = []
        self.orders: dict[int, list[tuple[float, float]]] = {}  # by run: p(a) of both orders, of judged pairs
        limit = max(1000, MAX_ROWS // max(1, len(runs)))
        for number, run in enumerate(runs):
            self._read(number, run, limit)

    def as_json(self) -> Json:
        """What the page's script reads."""
        return {
            "prompts": list(self._prompts),
            "groups": plain(self._shown),
            "rows": self._rows,
            "verdicts": self._verdicts,
        }

    def __len__(self) -> int:
        return len(self._rows)

    def _read(self, number: int, run: Run, limit: int) -> None:
        folder = run.folder
        sources: list[tuple[Path, Callable[[int, Json, Path], None]]] = [
            (Path("samples.jsonl"), self._completion),
            *((path.relative_to(folder), self._sampled) for path in sorted(folder.glob("arms/*/sampled.jsonl"))),
            (Path("sampled.jsonl"), self._sampled),
            (Path("steps.jsonl"), self._revised),
            *((path.relative_to(folder), self._scored) for path in sorted(folder.glob("*/scored.jsonl"))),
        ]
        pairs = self._pairs_of(run)
        for path, take in [*sources, *([(pairs, self._pair)] if pairs is not None else [])]:
            odd = 0
            for row in rows(folder, path, run.problems, limit):
                try:
                    take(number, row, folder / path)
                except (AttributeError, KeyError, TypeError, ValueError, OverflowError):  # of a program that isn't ours
                    odd += 1
            if odd:
                run.problems.append(f"{path.name} has {odd} row(s) of an unknown form; ignored")

    def _pairs_of(self, run: Run) -> Path | None:
        """The judged pairs of a run, else those to be judged: below its folder, or whole.

        A label job's output may lie elsewhere. What the run's own files name is no reason to read it: whoever sends a
        run's folder could have the page show any file of the one who makes it.
        """
        output = str(run.summary.get("output") or run.config.get("output") or "")
        if run.job in ("label", "pairs") and output.endswith(".jsonl"):
            with suppress(OSError, ValueError):  # of a path that is none
                # Relative to where the run was started, which is above the folder of most runs.
                places = [base / output for base in (Path(), *run.folder.parents)]
                if own := [path for path in places if is_below(path, run.folder)]:
                    return own[0].resolve().relative_to(run.folder)
                for path in places:
                    if path.resolve() in self._may_read:
                        return path.resolve()
            run.problems.append(f"its records are outside of its folder: --labels {output} shows them")
        elif run.job == "label" and output:
            run.problems.append(f"the labels are in {Path(output).name}: only .jsonl can be browsed here")
        names = ("labels.jsonl", "judging/labels.jsonl", "pairs.jsonl")
        return next((Path(name) for name in names if (run.folder / name).is_file()), None)

    # ---- The kinds of rows -------------------------------------------------------------------------------------------

    def _completion(self, run: int, row: Json, path: Path) -> None:
        # Runs of one seed meet here: the same prompt at the same step is one group.
        group = self._group(("training", row.get("step"), str(row.get("prompt"))), row.get("prompt"), "training", row)
        label = f"sample {row['sample']}" if "sample" in row else ""
        self._row(
            group,
            run,
            label,
            row.get("completion"),
            score=row.get("score"),
            failure=row.get("failure"),
            tokens=row.get("tokens"),
            cut=True if row.get("finished") is False else None,
            version=row.get("weight_version"),
            evidence=row.get("evidence"),
        )

    def _sampled(self, run: int, row: Json, path: Path) -> None:
        label = path.parent.name if path.parent.parent.name == "arms" else "sample"
        group = self._group(("prompt", run, _text(row.get("prompt"))), row.get("prompt"), "responses", row)
        texts = row.get("responses") or []
        for k, text in enumerate(texts):
            score, failure, tokens = (_nth(row.get(key), k) for key in ("scores", "failures", "tokens"))
            name = label if len(texts) == 1 else f"{label} {k}"
            place = self._row(group, run, name, text, score=score, failure=failure, tokens=tokens)
            self._responses.setdefault((group, label, str(text)), place)

    def _revised(self, run: int, row: Json, path: Path) -> None:
        group = self._group(("prompt", run, _text(row.get("prompt"))), row.get("prompt"), "revisions", row)
        self._row(group, run, "first response", row.get("response"), failure=row.get("failure"))
        for k, step in enumerate(row.get("steps") or [], start=1):
            evidence = {key: step.get(key) for key in ("principle", "critique") if step.get(key)}
            self._row(group, run, f"revision {k}", step.get("revision"), evidence=evidence)

    def _scored(self, run: int, row: Json, path: Path) -> None:
        part = str(row.get("part", ""))
        group = self._group(
            ("scored", run, part, _text(row.get("prompt"))), row.get("prompt"), f"harmless: {part}", row
        )
        told: Json = {key: row.get(key) for key in ("score", "failure", "evidence")}
        self._row(group, run, str(row.get("arm") or "labelled"), row.get("response"), **told)

    def _pair(self, run: int, row: Json, path: Path) -> None:
        prompt = row.get("prompt")
        people = str(row.get("id", "")).startswith("people/")
        group = self._group(("prompt", run, _text(prompt)), prompt, "labelled by people" if people else "pairs", row)
        a, b = (self._response(group, run, row, side) for side in "ab")
        forward, reverse = row.get("p_a_forward"), row.get("p_a_reversed")
        both = at(row, "p_a_forward", expected=float), at(row, "p_a_reversed", expected=float)
        if both[0] is not None and both[1] is not None and math.isfinite(both[0] + both[1]):
            self.orders.setdefault(run, []).append((both[0], both[1]))
        human = row.get("human")
        verdict = {
            "g": group,
            "a": a,
            "b": b,
            "p": row.get("p_a"),
            "fwd": forward,
            "rev": reverse,
            "failed": row.get("failed"),
            "principle": row.get("principle"),
            "human": human.get("p_a") if isinstance(human, dict) else human,
            "why": row.get("rationales") or None,
            "judge": row.get("judge"),
        }
        self._verdicts.append({key: value for key, value in plain(verdict).items() if value is not None})

    # ---- Their parts -------------------------------------------------------------------------------------------------

    def _group(self, key: Hashable, prompt: Any, kind: str, row: Json) -> int:
        if key not in self._groups:
            self._groups[key] = len(self._shown)
            place = self._prompts.setdefault(_text(prompt), len(self._prompts))
            told = {"p": place, "kind": kind, "step": row.get("step"), "id": row.get("prompt_id", row.get("id"))}
            self._shown.append({name: value for name, value in told.items() if value is not None})
        return self._groups[key]

    def _row(self, group: int, run: int, label: str, text: Any, **more: Any) -> int:
        told = plain({"g": group, "r": run, "label": label, "text": str(text or ""), **more})
        self._rows.append({key: value for key, value in told.items() if value is not None and value != {}})
        return len(self._rows) - 1

    def _response(self, group: int, run: int, pair: Json, side: str) -> int:
        """The place of one side's response: an arm's text stands once, however many it was compared with."""
        source, text = str(pair.get(f"source_{side}") or f"response {side}"), str(pair[f"response_{side}"])
        key = (group, source, text)
        if key not in self._responses:
            self._responses[key] = self._row(group, run, source, text)
        return self._responses[key]


def _text(prompt: Any) -> str:
    """A prompt as one reads it: a lone user's turn bare, else every turn after its role."""
    if not isinstance(prompt, list):
        return str(prompt if prompt is not None else "")
    turns = [(str(t.get("role", "?")), str(t.get("content", ""))) for t in prompt if isinstance(t, dict)]
    if len(turns) == 1 and turns[0][0] == "user":
        return turns[0][1]
    return "\n\n".join(f"{role}: {content}" for role, content in turns)


def _nth(values: Any, k: int) -> Any:
    return values[k] if isinstance(values, list) and k < len(values) else None
