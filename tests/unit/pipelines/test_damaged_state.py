"""What a run goes on from may be damaged, or another program's: it is refused, left out or read; never a crash."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlaif_ray.config.jobs import SampleJob
from rlaif_ray.data.identity import Content
from rlaif_ray.errors import CheckpointError, InputError
from rlaif_ray.pipelines.chat_date import OF_A_PIPELINE, pipeline_date
from rlaif_ray.pipelines.partial import rows_kept
from rlaif_ray.pipelines.pipeline import DONE, Placed
from rlaif_ray.pipelines.rows import AnsweredRow, RevisedRow, SampledRow, ScoredRow
from rlaif_ray.pipelines.settings import changed_settings, history, kept_settings, noted
from rlaif_ray.storage import MANIFEST, Place, StoredFolder, draft, open_folder, publish
from rlaif_ray.tracking.files import read_json, read_rows, read_rows_streaming
from rlaif_ray.tracking.tracker import _summed_up, phase_share
from tests.damage import odd_json

QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
DEEP = "[" * 20_000 + "]" * 20_000
TURNS = [{"role": "user", "content": "Why?"}]
ROWS: dict[str, tuple[Any, dict[str, Any]]] = {
    "sample": (
        SampledRow,
        {"prompt_id": "a", "prompt": TURNS, "responses": ["x", "y"], "tokens": [1, 2], "scores": [0.5, None]}
        | {"failures": [None, "unparsed"], "unanswered": []},
    ),
    "pairs": (AnsweredRow, {"prompt_id": "a", "texts": ["x"], "tokens": 1, "failures": []}),
    "revise": (
        RevisedRow,
        {"id": "a", "prompt": TURNS, "response": "x", "failure": None}
        | {"steps": [{"principle": "p", "critique": "c", "revision": "r"}]},
    ),
    "harmless": (
        ScoredRow,
        {"part": "prompts", "arm": "a", "response": "x", "score": 1.0, "failure": None, "tokens_in": 3}
        | {"evidence": {"error": "e"}, "prompt": TURNS},
    ),
}


@pytest.mark.parametrize("job", ROWS)
def test_rows(job: str, tmp_path: Path) -> None:
    kind, good = ROWS[job]
    optional = {"unanswered", "failures"} | ({"prompt"} if job == "harmless" else set())  # nobody reads it there
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps(good) + "\n")
    assert rows_kept(path, [0], lambda row: 0, kind) == 1

    @settings(max_examples=30, deadline=None, derandomize=True)
    @given(row=odd_json(good))
    def check(row: bytes) -> None:
        path.write_bytes(json.dumps(good).encode() + b"\n" + row.replace(b"\n", b" ") + b"\n")
        try:
            assert rows_kept(path, [0, 0], lambda row: 0, kind) == 2
        except InputError as error:
            assert "rows.jsonl must hold one JSON object per line" in str(error) and "in line 2, which" in str(error)
            return
        for found in read_rows_streaming(path):
            assert found.keys() >= good.keys() - optional

    check()


@pytest.mark.parametrize("text", [DEEP, "[1]", "1" * 5000, '{"step": 1' + "0" * 400 + "}", "\x00"])
def test_a_line_beyond_the_bounds(text: str, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(f'{{"step": 1}}\n{text}\n{{"step": 2}}\n')
    for read in (read_rows, lambda path: list(read_rows_streaming(path))):
        with pytest.raises(InputError, match="in line 2, which"):
            read(path)
    path.write_text(text)
    assert read_json(path) == {}


def test_metrics_of_any_kind() -> None:
    rows = [{"step": 1, "time/step_s": "x", "time/rollout_s": []}, {"time/step_s": 2, "time/rollout_s": 1}, {}]
    assert phase_share([_summed_up(row) for row in rows]) == {"rollout": 0.5}


# ---- Settings and stages ---------------------------------------------------------------------------------------------

JOB = SampleJob.model_validate({"policy": {"model": "owner/name"}, "data": {"path": "package:train"}})


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=QUIET)
@given(data=st.data())
def test_settings(tmp_path: Path, data: st.DataObject) -> None:
    contents = {"data.path": Content("package:train", "1-2"), "policy.model": Content("owner/name", "3")}
    kept = tmp_path / "settings.json"
    kept.write_bytes(data.draw(odd_json(kept_settings(JOB, contents))))
    try:
        found = changed_settings(read_json(kept), JOB, contents, holds="it holds another's", anew="another")
    except ValueError as error:  # InputError, or what its callers make one
        assert str(error)
        return
    assert all(isinstance(line, str) for line in history(noted(found, None)))


@settings(max_examples=40, deadline=None, derandomize=True)
@given(
    changes=st.lists(st.none() | st.integers() | st.dictionaries(st.sampled_from(["key", "then", "step"]), st.text()))
)
def test_a_history(changes: list[Any]) -> None:
    assert all(isinstance(line, str) for line in history(changes))


@settings(max_examples=40, deadline=None, derandomize=True, suppress_health_check=QUIET)
@given(data=st.data())
def test_the_note_of_a_stage(tmp_path: Path, data: st.DataObject) -> None:
    good = {"hash": "abc", "seconds": 3.5, "result": "12 pairs", "commits": {"a": "b"}}
    good["content"] = Content("x", "1").as_json()
    (tmp_path / DONE).write_bytes(data.draw(odd_json(good)))
    note = Placed(None, "abc", tmp_path, {}).noted  # type: ignore[arg-type]
    if note:
        assert math.isfinite(note["seconds"]) and isinstance(note["result"], str)
        made = Content.of_json(note.get("content"))
        assert made is None or isinstance(Content("x", "2").told(made), str)


@pytest.mark.parametrize("text", ["{", DEEP, "[]", '{"chat_date": 5}', '{"chat_date": "tomorrow"}'])
def test_the_date_of_a_pipeline(text: str, tmp_path: Path) -> None:
    assert pipeline_date(tmp_path, "2026-01-31") == pipeline_date(tmp_path, "2026-02-01") == "2026-01-31"
    (tmp_path / OF_A_PIPELINE).write_text(text)
    with pytest.raises(InputError, match=r"pipeline\.json must say at which day"):
        pipeline_date(tmp_path)


# ---- Checkpoints -----------------------------------------------------------------------------------------------------


def test_manifests(tmp_path: Path) -> None:
    final = Place(str(tmp_path / "step-1"))
    place = draft(final, "t")
    written = {"state.json": (place / "state.json").write(b"{}")}
    publish(StoredFolder(place, written), final, step=1)
    manifest = tmp_path / "step-1" / MANIFEST
    good = json.loads(manifest.read_text())

    @settings(max_examples=60, deadline=None, derandomize=True)
    @given(data=odd_json(good))
    def check(data: bytes) -> None:
        manifest.write_bytes(data)
        try:
            _, facts = open_folder(final)
        except CheckpointError as error:
            assert MANIFEST in str(error)
            return
        assert facts["step"] == 1

    check()
    for text in (DEEP, '{"a": 1' + "0" * 5000 + "}", "[]", '{"format": 2, "format": 2}'):
        manifest.write_text(text)
        with pytest.raises(CheckpointError, match="can't be read: it "):
            open_folder(final)
