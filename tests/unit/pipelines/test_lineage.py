"""Whose feedback a model learned from."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlaif_ray.pipelines import lineage
from tests.damage import damaged


def training_judges(model: str) -> set[str]:
    """Judges of a model about which all is known."""
    notes: list[str] = []
    found = lineage.training_judges(model, notes)
    assert not notes
    return found


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
    judges, unclear = lineage.taught_by({"arm": one})
    assert judges == {"arm": []}
    assert "the resolved.yaml beside it holds text instead of a mapping" in unclear["arm"][0]


ODD = {
    "cut": "a: [",
    "a list": "- 1",
    "another tool's": "feedback: text\npolicy: 5\ndata: []",
    "models that are none": "policy: {model: [1]}\ndata: {path: {}}\ndpo: 1\nreward: 1",
    "judges that are none": "feedback: {type: judge, judge: {model: 3}}",
    "a mixture of nothing": "feedback: {type: mixture, scorers: [1]}",
    "a scorer that is text": "feedback: {type: mixture, scorers: {a: {scorer: b}, c: 1}}",
    "deep": "a: " + "[" * 20_000,
    "deep by indentation": "- " * 20_000,
    "a tag": "!!python/object/apply:os.getcwd []",
    "aliases": "a: &a0 [x, x, x]\n" + "".join(f"b{k}: &a{k} [{f'*a{k - 1}, ' * 9}]\n" for k in range(1, 12)),
    "a path that is none": 'policy: {model: "a\\0b"}',
    "a long path": f"policy: {{model: {'x' * 5000}}}",
    "nobody's home": "policy: {model: ~nobody-at-all/x/y}",
    "binary": "\x00\x01",
    "many digits": "a: " + "9" * 5000,
    "twice": "policy: {model: a}\npolicy: {model: b}",
}


@pytest.mark.parametrize("text", ODD.values(), ids=ODD)
def test_whatever_lies_beside_an_arm(tmp_path: Path, text: str) -> None:
    (tmp_path / "run" / "policy").mkdir(parents=True)
    (tmp_path / "run" / "resolved.yaml").write_text(text)
    judges, unclear = lineage.taught_by({"arm": str(tmp_path / "run" / "policy")})
    assert judges == {"arm": []} and all(isinstance(note, str) for note in unclear.get("arm", []))


@settings(max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_damaged_resolved_yaml(tmp_path: Path, labels: str, data: st.DataObject) -> None:
    good = {"policy": {"model": "x"}, "data": {"path": labels}, "dpo": {}}
    good |= {"feedback": {"type": "mixture", "scorers": {"b": {"scorer": {"type": "judge", "judge": {"model": "j"}}}}}}
    (tmp_path / "run").mkdir(exist_ok=True)
    (tmp_path / "run" / "resolved.yaml").write_bytes(data.draw(damaged(yaml.safe_dump(good).encode())))
    judges, unclear = lineage.taught_by({"arm": str(tmp_path / "run" / "policy")})
    assert all(isinstance(judge, str) for judge in judges["arm"]) and set(unclear) <= {"arm"}
