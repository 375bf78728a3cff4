"""Whose feedback a model learned from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlaif_ray.pipelines.lineage import training_judges

JUDGE = {"type": "vllm", "model": "the-labeller", "template": "helpful", "template_hash": "h"}


def run(folder: Path, name: str, config: dict[str, Any], made: str = "policy") -> str:
    (folder / name / made).mkdir(parents=True)
    (folder / name / "resolved.yaml").write_text(yaml.safe_dump(config))
    return str(folder / name / made)


@pytest.fixture
def labels(tmp_path: Path) -> str:
    path = tmp_path / "labels.jsonl"
    record = {"id": "1", "prompt": [{"role": "user", "content": "q"}], "response_a": "a", "response_b": "b", "p_a": 0.7}
    path.write_text(json.dumps(record | {"judge": JUDGE}) + "\n")
    return str(path)


def test_a_model_from_elsewhere_has_none(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    assert training_judges("meta-llama/Llama-3.1-8B-Instruct") == training_judges(str(tmp_path / "model")) == set()


def test_direct_by_labels_and_by_what_it_started_from(tmp_path: Path, labels: str) -> None:
    direct = run(tmp_path, "direct", {"feedback": {"type": "judge", "judge": {"model": "the-judge"}}})
    assert training_judges(direct) == {"the-judge"}
    dpo = run(tmp_path, "dpo", {"policy": {"model": direct}, "data": {"path": labels}, "dpo": {"beta": 0.1}})
    assert training_judges(dpo) == {"the-judge", "the-labeller"}


def test_by_a_reward_model_in_a_mixture(tmp_path: Path, labels: str) -> None:
    rm = run(tmp_path, "rm", {"data": {"path": labels}, "reward": {}}, "reward_model")
    scorers = {
        "a": {"weight": 1, "scorer": {"type": "reward_model", "model": rm}},
        "b": {"weight": 1, "scorer": {"type": "judge", "judge": {"model": "another"}}},
        "c": {"weight": 1, "scorer": {"type": "length"}},
    }
    policy = run(tmp_path, "rl", {"policy": {"model": "x"}, "feedback": {"type": "mixture", "scorers": scorers}})
    assert training_judges(policy) == {"the-labeller", "another"}


def test_a_circle_and_a_broken_file_end(tmp_path: Path) -> None:
    one = run(tmp_path, "one", {"policy": {"model": str(tmp_path / "two" / "policy")}})
    run(tmp_path, "two", {"policy": {"model": one}, "feedback": {"type": "judge", "judge": {"model": "j"}}})
    assert training_judges(one) == {"j"}
    (tmp_path / "two" / "resolved.yaml").write_text("just a text")
    assert training_judges(one) == set()
