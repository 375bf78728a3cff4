"""revise -> sft on real engines, straight and killed half way."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import pytest

from tests.ray.test_preference_jobs import CLUSTER, done, lines, model
from tests.runs import ROOT, Program, start

pytestmark = [pytest.mark.ray, pytest.mark.slow]


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


def test_a_killed_revision_goes_on_to_the_same_end(folder: Path, revisions: Path) -> None:
    program = revise(folder, "killed")
    program.wait_for(lambda: lines(folder / "killed.jsonl.state" / "steps.jsonl") > 0)
    program.kill()
    done(revise(folder, "killed"))
    assert (folder / "killed.jsonl").read_bytes() == revisions.read_bytes()


def sft(folder: Path, name: str, data: Path) -> Program:
    return rlaif(
        folder,
        name,
        f"sft {ROOT}/configs/demo/sft.yaml",
        f"policy.model={model()}",
        f"data.path={data}",
        "sft.batch_size=32",
        "sft.held_out_fraction=0.2",
        "learner.lr=1e-3",
        "checkpoint.every=2",
        "tracking.wandb=disabled",
        f"run_dir={folder / name}",
    )


def test_killed_fine_tuning_ends_in_the_same_weights(folder: Path, revisions: Path) -> None:
    done(sft(folder, "sft", revisions))
    program = sft(folder, "sft-killed", revisions)
    program.wait_for(lambda: (folder / "sft-killed" / "checkpoints" / "step-2").exists())
    program.kill()
    done(sft(folder, "sft-killed", revisions))
    hashes = [
        hashlib.sha256((folder / name / "policy" / "model.safetensors").read_bytes()).hexdigest()
        for name in ("sft", "sft-killed")
    ]
    assert hashes[0] == hashes[1]
    summaries = [json.loads((folder / name / "summary.json").read_text())["sft"] for name in ("sft", "sft-killed")]
    assert summaries[0] == summaries[1] and summaries[0]["held_out"]["turns"] > 10
    losses = [json.loads(line)["sft/loss"] for line in (folder / "sft" / "metrics.jsonl").read_text().splitlines()]
    assert losses[-1] < losses[0]


def test_other_revisions_are_no_resume(folder: Path, revisions: Path) -> None:
    changed = folder / "sft-changed.jsonl"
    changed.write_text(revisions.read_text())
    done(sft(folder, "sft-changed", changed))
    changed.write_text("".join(revisions.read_text().splitlines(keepends=True)[:-1]))
    program = sft(folder, "sft-changed", changed)
    program.wait()
    assert program.exit_code == 2 and "has changed since the checkpoint" in program.stderr
