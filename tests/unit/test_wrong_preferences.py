"""What a user can get wrong with pairs, labels and reward models: exit code 2, one message, nothing started or lost."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.tiny import cached_tiny_model
from tests.unit.test_wrong_inputs import Wrong, assert_told_well


def row(**changes: Any) -> str:
    """A good labelled pair with changes; None removes the column."""
    values = {"id": "1", "prompt": "Why?", "response_a": "Because.", "response_b": "No.", "label": 1.0} | changes
    return json.dumps({key: value for key, value in values.items() if value is not None}) + "\n"


def pairs(*rows: str) -> dict[str, str]:
    return {"pairs.jsonl": "".join(rows)}


DATA = "data.path=pairs.jsonl"
CONSTITUTION = "id: own\nversion: 1\nprinciples:\n  - id: kind\n    comparison_question: Which response is kinder?\n"


def label(name: str, config: str, says: tuple[str, ...], files: dict[str, str] | None = None, **more: Any) -> Wrong:
    return Wrong(name, config, (DATA, *more.pop("settings", ())), says, files or pairs(row()), job="label", **more)


def reward(name: str, config: str, says: tuple[str, ...], files: dict[str, str] | None = None, **more: Any) -> Wrong:
    return Wrong(
        name, config, (DATA, *more.pop("settings", ())), says, files or pairs(row()), job="reward-model", **more
    )


CASES = [
    # what a config shows
    Wrong(
        "one response of one policy",
        "sampling: {responses_per_prompt: 1}",
        (),
        ("at least 2", "other_policies"),
        job="pairs",
    ),
    Wrong(
        "a temperature that vLLM raises",
        "sampling: {temperature: 0.009}",
        (),
        ("sampling.temperature must be 0 or at least 0.01 (got 0.009)", "greedy"),
        job="sample",
    ),
    Wrong(
        "greedy responses to compare",
        "sampling: {temperature: 0}",
        (),
        ("sampling.temperature must be at least 0.01 (got 0)", "greedy responses are all the same"),
        job="pairs",
    ),
    label(
        "no end of an answer",
        "judge: {type: openai, model: m, price_in: 1, max_cost: 1, extra_body: {max_completion_tokens: -1}}",
        ("judge.extra_body.max_completion_tokens must be null or a whole number of at least 1 (got -1)",),
    ),
    label(
        "a limit in quotes",
        "judge: {type: openai, model: m, extra_body: {max_tokens: '256'}}",
        ("judge.extra_body.max_tokens must be null or a whole number of at least 1 (got '256')",),
    ),
    label("unknown judge type", "judge: {type: gpt}", ("judge.type must be one of vllm, openai, longer",)),
    label("key of another judge", "judge: {type: longer, model: x}", ("judge.model", "judge.type=vllm")),
    label(
        "cap without prices", "judge: {type: openai, model: m, max_cost: 1}", ("judge.max_cost needs judge.price_in",)
    ),
    label("lopsided clamp", "label: {clamp: [0.2, 0.6]}", ("label.clamp", "add up to 1", "Set low to 1 - high")),
    label(
        "principles without a constitution",
        "label: {principles: [kind]}",
        ("label.principles needs label.constitution",),
    ),
    label(
        "greedy samples", "label: {reasoning: {samples: 4}}", ("label.reasoning.samples > 1", "temperature such as 0.5")
    ),
    label("unknown way with long ones", "label: {too_long: cut}", ("label.too_long must be one of fail, cut_middle",)),
    reward("whole part held out", "reward: {held_out_fraction: 1}", ("reward.held_out_fraction", "less than 1")),
    Wrong("hard labels by another name", "dpo: {labels: firm}", (DATA,), ("dpo.labels must be one of",), job="dpo"),
    Wrong("beta of nothing", "dpo: {beta: 0}", (DATA,), ("dpo.beta", "greater than 0"), job="dpo"),
    Wrong("adapters of no rank", "sft: {lora: {rank: 0}}", (DATA,), ("sft.lora.rank",), job="sft"),
    Wrong(
        "adapters on layers of no model",
        "dpo: {lora: {target: [q_proj]}}",
        (DATA,),
        ("dpo.lora.target", "targets"),
        job="dpo",
    ),
    Wrong(
        "unlabelled pairs", "", (DATA,), ("has no pair to train on", "rlaif label"), pairs(row(label=None)), job="dpo"
    ),
    Wrong(
        "greedy samples to choose from",
        "sampling: {samples_per_prompt: 4, temperature: 0}",
        (),
        ("samples_per_prompt > 1", "are all the same"),
        job="sample",
    ),
    Wrong("reward model without a model", "feedback: {type: reward_model}", (), ("feedback.model must be set",)),
    Wrong(
        "unknown key in a mixture",
        "feedback: {type: mixture, scorers: {a: {weigth: 1, scorer: {type: judge, judge: {model: m}}}}}",
        (),
        ("feedback.scorers.a.weigth",),
    ),
    Wrong("empty mixture", "feedback: {type: mixture, scorers: {}}", (), ("feedback.scorers must name at least one",)),
    # what the files show
    label("missing file", "", ("./no.jsonl", "Correct the path"), settings=("data.path=./no.jsonl",)),
    label("empty file", "", ("pairs.jsonl", "empty"), pairs("")),
    label("pair without a response", "", ("pairs.jsonl, line 1", "response_b"), pairs(row(response_b=None))),
    label("empty response", "", ("pairs.jsonl, line 1", "response_a"), pairs(row(response_a=" "))),
    label("label outside [0, 1]", "", ("pairs.jsonl, line 1", "label", "1.5"), pairs(row(label=1.5))),
    label("label that is a switch", "", ("pairs.jsonl, line 1", "label"), pairs(row(label=True))),
    label("not JSON", "", ("pairs.jsonl, line 1", "JSON"), pairs('{"prompt": \n')),
    label("unknown template", "label: {template: helpfull}", ("label.template", "helpful")),
    label(
        "template of another kind",
        "label: {template: judge.yaml}",
        ("judge.yaml", "kind is 'score'"),
        pairs(row()) | {"judge.yaml": "kind: score\n"},
        lines=3,
    ),
    label("unknown exemplars", "label: {exemplars: helpfull}", ("exemplars", "helpful")),
    label(
        "exemplars for the opposite",
        "label: {exemplars: harmless}",
        ("which response is worse", "the opposite"),
        lines=3,
    ),
    label(
        "unknown constitution", "label: {template: constitution, constitution: defualt}", ("constitution", "default")
    ),
    label(
        "unknown principle",
        "label: {template: constitution, constitution: own.yaml, principles: [kin]}",
        ("kin", "kind"),
        pairs(row()) | {"own.yaml": CONSTITUTION},
    ),
    label(
        "constitution with a wrong weight",
        "label: {template: constitution, constitution: own.yaml}",
        ("own.yaml", "line 6", "weight"),
        pairs(row()) | {"own.yaml": CONSTITUTION + "    weight: -1\n"},
        lines=3,
    ),
    label(
        "principles where the worse is asked for",
        "label: {template: harmless, constitution: default}",
        ("label.template=harmless can't take a principle", "label.template=constitution"),
    ),
    label("judge that is not there", "judge: {model: ./no}", ("model './no'", "does not exist")),
    label("context too small", "judge: {max_context: 100}", ("the context of judge", "Raise judge.max_context")),
    label(
        "output that is the input",
        "output: pairs.jsonl",
        ("output must be another file than data.path", "Name another"),
    ),
    label("output of no known kind", "output: labels.csv", ("labels.csv", ".jsonl or .parquet")),
    label(
        "key that is not set",
        "judge: {type: openai, model: m, api_key_env: RLAIF_TEST_NO_KEY}",
        ("RLAIF_TEST_NO_KEY",),
    ),
    reward("nothing labelled", "", ("no pair to train on", "rlaif label"), pairs(row(label=None))),
    reward("policy that is not there", "policy: {model: ./no}", ("model './no'", "does not exist")),
    reward("human labels missing", "reward: {human_path: ./h.jsonl}", ("./h.jsonl", "Correct the path")),
    Wrong(
        "feedback that is no reward model", "feedback: {type: reward_model, model: TINY}", (), ("sequence classifier",)
    ),
]


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_wrong(case: Wrong, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RLAIF_DEBUG", raising=False)
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("Ray was started"))
    tiny = str(cached_tiny_model(tied=True, context=4096))
    config = (case.config or "").replace("TINY", tiny)
    settings = ["run_dir=run", "cluster.address=local"]
    if "policy:" not in config and case.job != "label":
        settings.append(f"policy.model={tiny}")
    if case.job in ("pairs", "sample"):
        settings.append("data.path=package:train")
    if case.job == "label" and "model" not in config and "longer" not in config and "type" not in config:
        settings.append(f"judge.model={tiny}")
    # Files of the case other than the config are data: they are not named on the command line.
    for name, text in case.files.items():
        (tmp_path / name).write_text(text)
    assert_told_well(replace(case, config=config, files={}, settings=(*settings, *case.settings)), tmp_path)
    assert not list(tmp_path.rglob("labels*.jsonl")) and not list(tmp_path.rglob("*.safetensors"))


def test_case_names_are_unique() -> None:
    assert len({case.name for case in CASES}) == len(CASES)
