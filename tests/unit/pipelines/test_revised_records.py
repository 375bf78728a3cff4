"""Records of `rlaif revise`: what counts as answered, and what is said of the rest."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest

from rlaif_ray.config.jobs import ReviseJob
from rlaif_ray.errors import FeedbackError
from rlaif_ray.pipelines.constitution import _enough, _lines, write_records

PROMPT = [{"role": "user", "content": "a"}]
STEP = {"principle": "kind", "critique": "b", "revision": "c"}


def row(number: int, failure: str | None, steps: int) -> dict[str, Any]:
    response = "" if failure else "d"
    return {"id": f"p{number}", "response": response, "steps": [STEP] * steps, "failure": failure, "prompt": PROMPT}


def written(
    folder: Path, helpful: list[str | None], harmful: list[str | None], **settings: Any
) -> tuple[Any, ReviseJob]:
    job = ReviseJob.model_validate({"policy": {"model": "x"}, "data": {"path": "p.jsonl"}, **settings})
    for name, failures, steps in (("steps", harmful, 1), ("helpful", helpful, 0)):
        rows = [row(k, failure, 0 if failure else steps) for k, failure in enumerate(failures)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in rows))
    return write_records(job, folder / "steps.jsonl", folder / "helpful.jsonl", folder / "out.jsonl"), job


def test_helpful_prompts_that_failed_are_counted_and_bounded(tmp_path: Path) -> None:
    summary, job = written(tmp_path, ["engine_error: x"] * 3 + ["too_long"], [None] * 4)
    assert summary["retryable"] == 3 and summary["helpful_failures"] == {"engine_error": 3, "too_long": 1}
    assert ("no helpful answer", "3 engine_error, 1 too_long") in list(_lines(summary))
    with pytest.raises(FeedbackError) as error:
        _enough(summary, job)
    for part in (
        "min_done_fraction=0.9 of the helpful prompts must be answered (got 0 of 4; failed: 3 engine_error, ",
        "3 could succeed on another try",
        "1 would fail in the same way",
    ):
        assert part in str(error.value)
    _enough(summary, job.model_copy(update={"min_done_fraction": 0.0}))


def test_they_are_no_failures_of_the_prompts_that_are_revised(tmp_path: Path) -> None:
    settings = {"min_done_fraction": 0.5, "revision": {"min_revised_fraction": 1.0}}
    summary, job = written(tmp_path, ["engine_error: x"] + [None] * 3, [None] * 3 + ["too_long"], **settings)
    with pytest.raises(
        FeedbackError, match=r"got 3 of 4; failed: 1 too_long\).* 1 would fail in the same way"
    ) as error:
        _enough(summary, job)
    assert "could succeed" not in str(error.value)


def test_enough_is_enough(tmp_path: Path) -> None:
    summary, job = written(tmp_path, [None] * 9 + ["engine_error: x"], [None] * 10)
    _enough(summary, job)
    assert summary["records"] == 19 and summary["retryable"] == 1  # a pipeline's stage is not done


def test_records_are_written_in_the_drawn_order_of_a_list(tmp_path: Path) -> None:
    summary, job = written(tmp_path, [None] * 3, [None] * 40, seed=3)
    ids = [json.loads(line)["id"] for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    expected = [*(f"p{k}/1" for k in range(40)), "p0", "p1", "p2"]
    random.Random(job.seed).shuffle(expected)
    assert ids == expected and summary["records"] == 43 and summary["helpful"] == 3
