"""pairs -> label -> reward-model -> train on real engines, straight; a killed labelling; wrong input on the way.

All of them killed half way: tests/ray/test_pipeline.py.
"""

from __future__ import annotations

import hashlib
import json
import math
from pathlib import Path
from typing import Any

import pytest

from rlaif_ray.data.preferences import PreferenceRecord, read_preferences
from rlaif_ray.data.prompts import PACKAGED
from rlaif_ray.feedback.remembered import Memory
from tests.runs import ROOT, Program, start
from tests.tiny import cached_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]

PROMPTS = 150
CLUSTER = "cluster.address=local"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("preferences")


def model(seed: int = 0) -> str:
    return str(cached_tiny_model(tied=True, context=4096, seed=seed))


def rlaif(folder: Path, name: str, command: str, *settings: object) -> Program:
    words = [ROOT / ".venv/bin/rlaif", *command.split(), *map(str, settings), CLUSTER]
    return start(words, folder / f"{name}.out")


def done(program: Program) -> Program:
    program.wait()
    assert program.exit_code == 0, program.stdout[-2000:] + program.stderr[-2000:]
    assert program.left_over == []
    return program


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


def records(path: Path) -> list[PreferenceRecord]:
    return list(read_preferences(str(path)))


# ---- Straight --------------------------------------------------------------------------------------------------------


def pairs(folder: Path, name: str) -> Program:
    return rlaif(
        folder,
        name,
        f"pairs {ROOT}/configs/demo/pairs.yaml",
        f"policy={{model: {model()}, precision: fp32}}",  # digits are compared: also on CPUs that are faster in bf16
        f"other_policies.other={{model: {model(1)}, precision: fp32}}",
        f"data.limit={PROMPTS}",
        "sampling.max_new_tokens=6",
        "sampling.pairs_per_prompt=2",
        "rollout.kv_cache_gb=0.1",
        f"run_dir={folder / name}",
        f"output={folder / name}.jsonl",
    )


@pytest.fixture(scope="module")
def pairs_file(folder: Path) -> Path:
    done(pairs(folder, "pairs"))
    return folder / "pairs.jsonl"


def test_pairs_are_distinct_and_say_who_wrote_them(pairs_file: Path, folder: Path) -> None:
    found = records(pairs_file)
    summary = json.loads((folder / "pairs" / "summary.json").read_text())
    assert summary["responses"] == 4 * PROMPTS and summary["pairs"] == len(found) > 1.9 * PROMPTS
    assert all(r.response_a != r.response_b and r.p_a is None for r in found)
    sources = [source for r in found for source in (r.source_a, r.source_b)]
    assert set(sources) == {"policy", "other"} and 0.4 < sources.count("policy") / len(sources) < 0.6
    # Which policy wrote it must not show in the place.
    mixed = [r for r in found if r.source_a != r.source_b]
    assert 0.35 < sum(r.source_a == "policy" for r in mixed) / len(mixed) < 0.65


def label(folder: Path, name: str, data: Path, *settings: object) -> Program:
    return rlaif(
        folder,
        name,
        f"label {ROOT}/configs/demo/label.yaml",
        f"data.path={data}",
        f"judge.model={model()}",
        "judge.precision=fp32",
        "judge.kv_cache_gb=0.3",
        "judge.min_answer_mass=0",  # random weights: every token is as likely as an answer
        f"run_dir={folder / name}",
        f"output={folder / name}.jsonl",
        *settings,
    )


@pytest.fixture(scope="module")
def labels_file(folder: Path, pairs_file: Path) -> Path:
    done(label(folder, "labels", pairs_file))
    return folder / "labels.jsonl"


def test_labels_keep_what_the_judge_said(labels_file: Path, pairs_file: Path, folder: Path) -> None:
    found = records(labels_file)
    assert [r.id for r in found] == [r.id for r in records(pairs_file)]
    for record in found:
        assert record.p_a is not None and record.p_a_forward is not None and record.p_a_reversed is not None
        assert record.p_a == pytest.approx((record.p_a_forward + record.p_a_reversed) / 2)
        assert record.judge is not None and record.judge["template"] == "helpful" and record.tokens_in > 0
    summary = json.loads((folder / "labels" / "summary.json").read_text())
    assert summary["labels"] == len(found) and summary["failures"] == {}
    same_place = sum(
        ((r.p_a_forward or 0) > 0.5) != ((r.p_a_reversed or 0) > 0.5) for r in found if r.p_a_forward != 0.5
    )
    assert summary["position_bias"] == pytest.approx(same_place / len(found), abs=0.01)
    assert summary["human_cost"] == pytest.approx(0.67 * len(found))


def test_labels_are_the_probabilities_of_transformers(labels_file: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from rlaif_ray.config.data_sections import LabelConfig
    from rlaif_ray.feedback.local import LocalAsker
    from rlaif_ray.feedback.preference import PreferenceLabeler
    from rlaif_ray.feedback.templates import load_template
    from rlaif_ray.pipelines.preferences import to_comparison

    tokenizer = AutoTokenizer.from_pretrained(model())
    network = AutoModelForCausalLM.from_pretrained(model(), dtype=torch.float32)
    asker = LocalAsker(None, tokenizer, 4096, "tiny")
    labeler = PreferenceLabeler(asker, load_template("helpful", kind="preference"), LabelConfig())
    one, two = tokenizer.convert_tokens_to_ids(["1", "2"])
    for record in records(labels_file)[:5]:
        text = asker.text(labeler.example(to_comparison(record))[0])
        with torch.no_grad():
            logits = network(**tokenizer(text, return_tensors="pt", add_special_tokens=False)).logits[0, -1]
        assert record.p_a_forward == pytest.approx(float(logits[[one, two]].softmax(0)[0]), abs=1e-4)


def reward_model(folder: Path, name: str, data: Path, *settings: object) -> Program:
    return rlaif(
        folder,
        name,
        f"reward-model {ROOT}/configs/demo/reward_model.yaml",
        f"policy.model={model()}",
        "policy.precision=fp32",
        f"data.path={data}",
        "reward.batch_size=32",
        "learner.lr=1e-3",
        f"run_dir={folder / name}",
        *settings,
    )


@pytest.fixture(scope="module")
def straight_model(folder: Path, labels_file: Path) -> Path:
    done(reward_model(folder, "rm", labels_file, "checkpoint.every=2", "tracking.wandb=disabled"))
    return folder / "rm"


def test_the_reward_model_loads_and_has_its_figures(straight_model: Path, labels_file: Path) -> None:
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    network = AutoModelForSequenceClassification.from_pretrained(straight_model / "reward_model")
    tokenizer = AutoTokenizer.from_pretrained(straight_model / "reward_model")
    assert network.config.num_labels == 1 and tokenizer.pad_token_id != tokenizer.eos_token_id
    summary = json.loads((straight_model / "summary.json").read_text())
    held_out = summary["reward_model"]["held_out"]
    assert held_out["n"] + summary["pairs"] == len(records(labels_file)) and 0 <= held_out["brier"] <= 1
    assert sum(one["n"] for one in held_out["curve"]) == held_out["n"]
    # Centred: preferred responses of the training part have mean 0 over transformers' own forward passes.
    from rlaif_ray.chat.renderer import ChatRenderer
    from rlaif_ray.pipelines.pair_examples import is_held_out

    render, rewards = ChatRenderer(tokenizer), []
    for record in records(labels_file):
        if is_held_out(record, 0.2, 0):
            continue
        better = record.response_a if (record.p_a or 0) >= 0.5 else record.response_b
        text = tokenizer(better, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        tokens = [*render.tokens(record.prompt, "here"), *text, tokenizer.eos_token_id]
        with torch.no_grad():
            rewards.append(float(network(torch.tensor([tokens])).logits[0, 0]))
    mean = math.fsum(rewards) / len(rewards)
    assert mean == pytest.approx(network.config.reward_center["mean"], abs=1e-4)


def test_a_policy_trains_against_it(folder: Path, straight_model: Path) -> None:
    program = rlaif(
        folder,
        "trained",
        f"train {ROOT}/configs/demo/train_rm.yaml",
        f"policy.model={model()}",
        "policy.precision=fp32",
        f"feedback.model={straight_model / 'reward_model'}",
        "feedback.precision=fp32",
        "steps=2",
        "sampling.max_new_tokens=6",
        "rollout.kv_cache_gb=0.1",
        "evaluation.held_out.limit=4",
        f"run_dir={folder / 'trained'}",
    )
    done(program)
    samples = [json.loads(line) for line in (folder / "trained" / "samples.jsonl").read_text().splitlines()]
    mean = json.loads((straight_model / "reward_model" / "config.json").read_text())["reward_center"]["mean"]
    assert all(s["score"] == pytest.approx(s["evidence"]["reward"] - mean, abs=1e-5) for s in samples)
    assert (folder / "trained" / "policy" / "model.safetensors").exists()


# ---- Killed ----------------------------------------------------------------------------------------------------------


def test_a_killed_labelling_does_only_what_is_missing(folder: Path, pairs_file: Path, labels_file: Path) -> None:
    output = folder / "labels-killed.jsonl"
    program = label(folder, "labels-killed", pairs_file)
    program.wait_for(lambda: lines(output) > 0)
    program.kill()
    before = lines(output)
    with output.open("ab") as file:  # as a kill in the middle of a line leaves it
        file.write(b'{"id": "train-00')
    memory = Memory(folder / "labels-killed.jsonl.state" / "answers.sqlite")
    answered = len(memory)
    memory.close()
    total = len(records(pairs_file))
    assert 0 < before < total and answered >= 2 * before
    done(label(folder, "labels-killed", pairs_file))
    assert output.read_bytes() == labels_file.read_bytes()
    summary = json.loads((folder / "labels-killed" / "summary.json").read_text())
    straight = json.loads((folder / "labels" / "summary.json").read_text())
    assert summary["questions_asked"] + answered == straight["questions_asked"]  # nothing twice, nothing left out
    # Once more: there is nothing left to ask.
    done(label(folder, "labels-killed", pairs_file))
    assert json.loads((folder / "labels-killed" / "summary.json").read_text())["questions_asked"] == 0
    assert output.read_bytes() == labels_file.read_bytes()


def test_another_judge_may_not_go_on_in_the_same_file(folder: Path, pairs_file: Path, labels_file: Path) -> None:
    before = labels_file.read_bytes()
    program = label(folder, "labels", pairs_file, f"judge.model={model(1)}")
    program.wait()
    assert program.exit_code == 2 and "holds results of another run" in program.stderr
    assert "Traceback" not in program.stderr and labels_file.read_bytes() == before


# ---- Ways of asking --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def few_pairs(folder: Path, pairs_file: Path) -> Path:
    path = folder / "few.jsonl"
    path.write_text("".join(pairs_file.read_text().splitlines(keepends=True)[:6]))
    return path


def test_everything_at_once_on_a_real_engine(folder: Path, few_pairs: Path) -> None:
    program = label(
        folder,
        "reasoned",
        few_pairs,
        "label.template=constitution",
        "label.exemplars=constitution",
        "label.constitution=default",
        "label.reasoning={max_new_tokens: 8, samples: 2, temperature: 0.7}",
        "label.clamp=[0.4, 0.6]",
        "--sample",
        "4",
        "--out",
        folder / "review.csv",
        "--format",
        "trl",
    )
    done(program)
    found = records(folder / "reasoned.jsonl")
    assert all(r.p_a is not None and 0.4 <= r.p_a <= 0.6 and len(r.rationales) == 4 for r in found)
    assert len({r.principle for r in found}) > 1 and all(r.tokens_out >= 4 for r in found)
    assert len((folder / "review.csv").read_text().splitlines()) >= 5
    rows = [json.loads(line) for line in (folder / "reasoned.trl.jsonl").read_text().splitlines()]
    assert all(set(row) == {"prompt", "chosen", "rejected"} for row in rows)


def test_a_bad_line_ends_the_run_after_what_was_good(folder: Path, few_pairs: Path) -> None:
    path = folder / "bad.jsonl"
    good = few_pairs.read_text().splitlines(keepends=True)
    path.write_text("".join(good[:4]) + '{"prompt": "p", "response_a": "a"}\n' + good[4])
    program = label(folder, "bad-labels", path)
    program.wait()
    assert program.exit_code == 2 and f"{path}, line 5" in program.stderr and "Traceback" not in program.stderr
    assert [r.id for r in records(folder / "bad-labels.jsonl")] == [r.id for r in records(few_pairs)][:4]


def test_the_rlhf_arm_differs_in_one_file(folder: Path, labels_file: Path) -> None:
    """The same command on labels of people."""
    human = folder / "human.jsonl"
    rows: list[dict[str, Any]] = []
    for number, record in enumerate(records(labels_file)[:64]):
        prompt = record.prompt[-1].content
        rows.append(
            {"prompt": prompt, "response_a": record.response_a, "response_b": record.response_b, "label": number % 2}
        )
    human.write_text("".join(json.dumps(row) + "\n" for row in rows))
    done(reward_model(folder, "rm-human", human, "tracking.wandb=disabled", f"reward.human_path={human}"))
    summary = json.loads((folder / "rm-human" / "summary.json").read_text())
    assert summary["reward_model"]["human"]["n"] == 64 and summary["pairs"] < 64
    assert PACKAGED.exists()
