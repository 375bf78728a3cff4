"""Whatever stands in a run's folder, the report is made, and says what of it could not be read."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlaif_ray.evaluation.report.page import make_page
from rlaif_ray.evaluation.report.runs import Run, find_runs
from rlaif_ray.evaluation.report.samples import Samples
from tests.damage import damaged, odd, odd_json
from tests.unit.evaluation.run_folders import evaluation_run, training_run

QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]


def page_of(folder: Path) -> tuple[str, Run]:
    runs, pipelines = find_runs([folder])
    return make_page(runs, pipelines, Samples(runs)), runs[0]


DEEP = "[" * 20_000 + "]" * 20_000
DAMAGED = {
    "summary.json": {
        "deep": (DEEP, "summary.json is nested more than 100 deep"),
        "many digits": (f'{{"steps": {"9" * 5000}}}', "summary.json has a number of more than 300 digits"),
        "a list": ("[1]", "summary.json holds a list instead of a mapping"),
        "UTF-16": ('{"job": "train"}'.encode("utf-16"), "summary.json is UTF-16"),
        "bytes": (b"\xff\x00", "summary.json has a byte that is not UTF-8"),
        "other kinds": ('{"steps": "many", "wall_s": true}', "summary.json: steps is not a number; ignored"),
        "a judge that is a list": ('{"judge": [1], "alignment": 3}', "summary.json: judge is not text; ignored"),
        "win rates that are no list": (
            '{"job": "evaluate", "win_rates": {"a": 1}}',
            "summary.json: win_rates is not a list",
        ),
        "a meeting of nobody": (
            '{"job": "evaluate", "win_rates": [{"a": 1, "b": [], "win_rate": {"rate": 0.5}}]}',
            "summary.json: win_rates, item 1: a is not text",
        ),
        "a rate of text": (
            '{"held_out": {"gain": {"mean": "x"}}}',
            "summary.json: held_out: gain: mean is not a number",
        ),
        "a curve of numbers": (
            '{"alignment": {"accuracy": 1, "curve": [1]}}',
            "alignment: curve, item 1 is not an object",
        ),
    },
    "resolved.yaml": {
        "deep": ("a: " + DEEP, "resolved.yaml, line 1, is nested more than 100 deep"),
        "aliases": (
            "a: &a0 [x]\n" + "".join(f"b{k}: &a{k} [{f'*a{k - 1}, ' * 9}]\n" for k in range(1, 9)),
            "more than 50,000 values",
        ),
        "no YAML": ("a: [", "resolved.yaml, line 1, is not valid YAML"),
        "another tool's": ("policy: text\narms: 5\nlabel: [a]\nfeedback: 1", "resolved.yaml: policy is not an object"),
        "a list": ("- 1", "resolved.yaml holds a list instead of a mapping"),
        "a tag": ("a: !!binary aGk=", "the tag !!binary is not supported"),
    },
    "metrics.jsonl": {
        "deep": (DEEP + "\n", "metrics.jsonl has 1 line(s) that are not JSON objects; ignored"),
        "odd values": ('{"step": 1, "reward/mean": []}\n{"step": [], "kl/mean": 1}\n', ""),
        "large numbers": (f'{{"step": {"9" * 299}, "reward/mean": {"9" * 299}}}\n', ""),
        "no numbers": ('{"step": 1, "time/step_s": NaN, "reward/mean": 1e999}\n', ""),
    },
    "samples.jsonl": {
        "deep": ('{"prompt": ' + DEEP + "}\n", "samples.jsonl has 1 line(s)"),
        "odd rows": ('{"step": {}, "prompt": [], "completion": {}}\n', "samples.jsonl has 1 row(s) of an unknown form"),
    },
    "evaluations.jsonl": {
        "odd rows": ('{"step": "x", "held_out": 1}\n', "evaluations.jsonl: held_out is not an object"),
        "deep": (DEEP + "\n", "evaluations.jsonl has 1 line(s)"),
    },
    "error.log": {"bytes": (b"\xff\n" * 100_000, "")},
}


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [(name, *case) for name, cases in DAMAGED.items() for case in cases.values()],
    ids=[f"{name}: {case}" for name, cases in DAMAGED.items() for case in cases],
)
def test_a_damaged_file(tmp_path: Path, name: str, content: str | bytes, told: str) -> None:
    run = training_run(tmp_path / "demo", steps=2)
    (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    page, found = page_of(run)
    assert told in " ".join(found.problems) and bool(told) == bool(found.problems)
    assert all(part in page for part in ("What ran", "demo"))
    if name not in ("samples.jsonl", "metrics.jsonl"):
        assert len(found.metrics["reward/mean"].steps) == 2  # the rest is shown all the same


@pytest.mark.parametrize("name", ["summary.json", "resolved.yaml", "metrics.jsonl", "samples.jsonl", "error.log"])
@pytest.mark.parametrize("what", ["folder", "pipe"])
def test_what_is_no_file(tmp_path: Path, name: str, what: str) -> None:
    run = training_run(tmp_path / "demo", steps=2)
    (run / name).unlink(missing_ok=True)
    (run / name).mkdir() if what == "folder" else os.mkfifo(run / name)
    page, found = page_of(run)
    assert "What ran" in page and (name == "error.log" or name in " ".join(found.problems))


def test_a_pipeline_says_what_of_its_summary_is_wrong(tmp_path: Path) -> None:
    training_run(tmp_path / "pipeline" / "stages" / "rlaif-abc")
    for text, told in (("{", "summary.json is not JSON"), ('{"stages": {}}', "summary.json: stages is not a list")):
        (tmp_path / "pipeline" / "summary.json").write_text(text)
        page, _ = page_of(tmp_path / "pipeline")
        assert told in page and "No summary yet" not in page


@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=QUIET)
@given(data=st.data())
def test_odd_summaries(tmp_path: Path, data: st.DataObject) -> None:
    for name, make in (("training", training_run), ("evaluation", evaluation_run)):
        run = tmp_path / name if (tmp_path / name).exists() else make(tmp_path / name)
        good = json.loads((run / "good" if (run / "good").exists() else run / "summary.json").read_text())
        (run / "good").write_text(json.dumps(good))
        (run / "summary.json").write_bytes(data.draw(odd_json(good)))
        assert "What ran" in page_of(run)[0]


@settings(max_examples=5, deadline=None, derandomize=True, suppress_health_check=QUIET)
@given(data=st.data())
def test_damaged_files(tmp_path: Path, data: st.DataObject) -> None:
    shutil.rmtree(tmp_path / "run", ignore_errors=True)
    run = data.draw(st.sampled_from([training_run, evaluation_run]))(tmp_path / "run")
    path = data.draw(st.sampled_from(sorted(path for path in run.rglob("*") if path.is_file())))
    content = path.read_bytes()
    if path.suffix == ".jsonl" and data.draw(st.booleans()):
        rows: list[Any] = [json.loads(line) for line in content.splitlines()]
        content = b"".join(json.dumps(row).encode() + b"\n" for row in data.draw(odd(rows)))
    else:
        content = data.draw(damaged(content))
    path.write_bytes(content)
    assert "What ran" in page_of(run)[0]
