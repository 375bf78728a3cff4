"""`rlaif evaluate` on real engines: alignment, win rates and harmless rate in one run, killed half way."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from rlaif_ray.data.prompts import PACKAGED
from tests.ray.test_preference_jobs import CLUSTER, done, lines, model
from tests.runs import ROOT, Program, start

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("evaluate")
    pairs = [
        {"prompt": f"What is {k}?", "response_a": f"It is {k}.", "response_b": "No idea.", "label": (k % 3) / 2}
        for k in range(90)
    ]
    (folder / "people.jsonl").write_text("".join(json.dumps(row) + "\n" for row in pairs))
    known = [{"prompt": f"Say {k}.", "response": f"{k}!", "label": k % 2} for k in range(20)]
    (folder / "known.jsonl").write_text("".join(json.dumps(row) + "\n" for row in known))
    prompts = [json.loads(line) for line in (PACKAGED / "heldout.jsonl").read_text().splitlines()[:30]]
    rows = [{"prompt": row["prompt"], "response": f"About {k}."} for k, row in enumerate(prompts)]
    (folder / "file.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    torch.manual_seed(0)
    classifier = AutoModelForSequenceClassification.from_pretrained(model(), num_labels=1, dtype=torch.float32)
    classifier.save_pretrained(folder / "reward_model")
    AutoTokenizer.from_pretrained(model()).save_pretrained(folder / "reward_model")
    return folder


def evaluate(folder: Path, name: str) -> Program:
    words = [
        *(ROOT / ".venv/bin/rlaif", "evaluate", ROOT / "configs/demo/alignment.yaml"),
        f"data.path={folder / 'people.jsonl'}",
        f"judge={{type: vllm, model: {model()}, precision: fp32, kv_cache_gb: 0.2, min_answer_mass: 0}}",
        f"arms={{one: {{model: {model()}, precision: fp32}}, other: {{model: {model(1)}, precision: fp32}}, "
        f"file: {{path: {folder / 'file.jsonl'}}}}}",
        "prompts={path: 'package:heldout', limit: 70, shuffle: false}",
        "harmless={prompts: {path: 'package:train', limit: 40, shuffle: false}, "
        f"safe: {{path: 'package:heldout', limit: 20, shuffle: false}}, labelled: {folder / 'known.jsonl'}}}",
        f"reward_models.rm={{model: {folder / 'reward_model'}, precision: fp32}}",
        "sampling.max_new_tokens=6",
        "rollout.kv_cache_gb=0.1",
        f"run_dir={folder / name}",
        CLUSTER,
    ]
    number = len(list(folder.glob(f"{name}.*.out")))
    return start(words, folder / f"{name}.{number}.out")


def summary(folder: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / name / "summary.json").read_text())
    return found


@pytest.fixture(scope="module")
def straight(folder: Path) -> dict[str, Any]:
    program = done(evaluate(folder, "straight"))
    assert "win rates" in program.stdout and "harmless" in program.stdout
    return summary(folder, "straight")


def test_everything_is_measured(straight: dict[str, Any]) -> None:
    aligned = straight["alignment"]
    assert (aligned["n"], aligned["ties"], aligned["failed"]) == (60, 30, 0)
    assert aligned["longer"]["accuracy"] == pytest.approx(0.5, abs=0.35) and aligned["position_bias"]["n"] == 90
    rewarded = straight["reward_models"]["rm"]
    assert (rewarded["n"], rewarded["ties"], rewarded["failed"]) == (60, 30, 0) and 0 <= rewarded["accuracy"] <= 1
    by_pair = {(one["a"], one["b"]): one["win_rate"] for one in straight["win_rates"]}
    assert by_pair["one", "other"]["n"] == 70 and 0 <= by_pair["one", "other"]["rate"] <= 1
    assert by_pair["one", "file"]["n"] == by_pair["other", "file"]["n"] == 30  # what both answered
    harmless = straight["harmless"]
    assert set(harmless["arms"]) >= {"one", "other"}
    for name in ("one", "other"):
        arm = harmless["arms"][name]
        assert (arm["rate"]["n"], arm["over_refusal"]["n"]) == (40, 20) and arm["corrected"] is not None
    assert straight["answers"] == {"one": 110, "other": 110, "file": 30}  # the safe ones stand among the 70
    assert harmless["judge"]["n_positive"] == harmless["judge"]["n_negative"] == 10


def test_a_killed_evaluation_goes_on_to_the_same_end(folder: Path, straight: dict[str, Any]) -> None:
    for half_way in (
        lambda run: lines(run / "arms" / "other" / "sampled.jsonl") > 0,
        lambda run: lines(run / "judging" / "labels.jsonl") > 0,
        lambda run: lines(run / "harmless" / "scored.jsonl") > 0,
    ):
        program = evaluate(folder, "killed")
        program.wait_for(lambda seen=half_way: seen(folder / "killed"))  # type: ignore[misc]
        program.kill()
        assert not (folder / "killed" / "summary.json").exists()
    done(evaluate(folder, "killed"))
    assert summary(folder, "killed") == straight
