"""revise -> sft on real engines. Killed half way: tests/ray/test_pipeline.py."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.ray.test_preference_jobs import CLUSTER, done, model
from tests.runs import ROOT, Program, start

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]


def rlaif(folder: Path, name: str, command: str, *settings: object) -> Program:
    words = [ROOT / ".venv/bin/rlaif", *command.split(), *map(str, settings), CLUSTER]
    return start(words, folder / f"{name}.out")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("constitution")


def revise(folder: Path, name: str, *settings: object) -> Program:
    return rlaif(
        folder,
        name,
        f"revise {ROOT}/configs/demo/revise.yaml",
        f"policy.model={model()}",
        "policy.precision=fp32",  # digits are compared: also on CPUs that are faster in bf16
        "data.limit=150",
        "revision.max_new_tokens=6",
        "rollout.kv_cache_gb=0.2",
        "helpful={share: 0.25, data: {path: 'package:heldout', shuffle: false}}",
        f"output={folder / name}.jsonl",
        f"run_dir={folder / name}",
        *settings,
    )


@pytest.fixture(scope="module")
def revisions(folder: Path) -> Path:
    done(revise(folder, "revised"))
    return folder / "revised.jsonl"


def test_records_are_the_last_revisions_and_a_share_of_helpful_answers(folder: Path, revisions: Path) -> None:
    rows = [json.loads(line) for line in revisions.read_text().splitlines()]
    summary = json.loads((folder / "revised" / "summary.json").read_text())
    helpful = [row for row in rows if row["source"] == "helpful"]
    assert len(rows) == summary["records"] and len(helpful) / len(rows) == pytest.approx(0.25, abs=0.01)
    steps = {}
    for line in (folder / "revised.jsonl.state" / "steps.jsonl").read_text().splitlines():
        row = json.loads(line)
        steps[row["id"]] = row
    assert len(steps) == 150
    for row in rows:
        if row["source"] != "helpful":
            of = steps[row["id"].rpartition("/")[0]]
            assert row["messages"][-1] == {"role": "assistant", "content": of["steps"][-1]["revision"]}
            assert row["messages"][:-1] == of["prompt"] and row["principle"] == of["steps"][-1]["principle"]


def sft(folder: Path, name: str, data: Path) -> Program:
    return rlaif(
        folder,
        name,
        f"sft {ROOT}/configs/demo/sft.yaml",
        f"policy.model={model()}",
        "policy.precision=fp32",  # digits are compared: also on CPUs that are faster in bf16
        f"data.path={data}",
        "sft.batch_size=32",
        "sft.held_out_fraction=0.2",
        "learner.lr=1e-3",
        "checkpoint.every=2",
        "tracking.wandb=disabled",
        f"run_dir={folder / name}",
    )


def test_fine_tuning_learns_and_other_revisions_are_no_resume(folder: Path, revisions: Path) -> None:
    data = folder / "turns.jsonl"
    data.write_text(revisions.read_text())
    done(sft(folder, "sft", data))
    assert json.loads((folder / "sft" / "summary.json").read_text())["sft"]["held_out"]["turns"] > 10
    losses = [json.loads(line)["sft/loss"] for line in (folder / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]
    data.write_text("".join(revisions.read_text().splitlines(keepends=True)[:-1]))
    program = sft(folder, "sft", data)
    program.wait()
    assert program.exit_code == 2 and f"data.path: {data} has changed" in program.stderr
