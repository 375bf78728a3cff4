"""`rlaif evaluate` on files of answers and a judge without a model: everything but the engines."""

from __future__ import annotations

import json
import math
import random
from pathlib import Path
from typing import Any

import pytest

from rlaif_ray.config.jobs import EvaluateJob
from rlaif_ray.config.load import load_job
from rlaif_ray.data.preferences import PreferenceRecord
from rlaif_ray.errors import InputError
from rlaif_ray.pipelines.alignment import labelled_by_people, measured_alignment, measured_reward_model
from rlaif_ray.pipelines.evaluate import compared, evaluate
from rlaif_ray.pipelines.harmless import LABELLED, PROMPTS, SAFE, Graded, Response, measured_harmless, responses_of
from rlaif_ray.types import Message, Score
from tests.jobs import embedded

CONFIGS = Path(__file__).parents[3] / "configs"
DATA = Path(__file__).parents[4] / "shared" / "data"


def run(folder: Path, *settings: str) -> dict[str, Any]:
    loaded = load_job("evaluate", [CONFIGS / "demo" / "alignment.yaml"], ["judge.type=longer", *settings])
    summary = evaluate(loaded)
    assert json.loads((loaded.run_dir / "summary.json").read_text()) == summary
    return summary


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arm(folder: Path, name: str, answers: list[str], prompts: list[str] | None = None) -> str:
    rows = [{"prompt": (prompts or QUESTIONS)[i % 3], "response": text} for i, text in enumerate(answers)]
    return f"arms.{name}.path={write(folder / f'{name}.jsonl', rows)}"


QUESTIONS = ["one?", "two?", "three?"]


# ---- Alignment -------------------------------------------------------------------------------------------------------


@pytest.mark.realdata
@pytest.mark.skipif(not DATA.exists(), reason="../shared/data is absent")
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("instruct_llmbar", 0.272),
        ("helpful_pandalm", 0.656),
        ("helpful_qa_feedback", 0.507),
        ("harmless_hh_pairs", 0.431),
    ],
)
def test_the_longer_baseline_is_the_one_stated_with_the_data(tmp_path: Path, name: str, expected: float) -> None:
    summary = run(tmp_path, f"data.path={DATA / name}.jsonl", f"run_dir={tmp_path / 'run'}")
    found = summary["alignment"]
    assert round(found["accuracy"], 3) == expected == round(found["longer"]["accuracy"], 3)
    assert found["ci95_low"] < found["accuracy"] < found["ci95_high"] and found["failed"] == 0
    assert found["position_bias"]["rate"] == 0.0
    if name == "helpful_pandalm":
        assert found["n"] == 381 + 426 and found["ties"] == 64  # ties are left out and counted
        assert 0.85 < found["people"] < 0.97  # one of three annotators with most of them
    else:
        assert found["people"] is None


def records(judge: Any, count: int = 400) -> list[PreferenceRecord]:
    """Pairs that people labelled, and `judge(label, draw)`'s probability."""
    draw = random.Random(0)
    made = []
    for k in range(count):
        label = float(draw.random() < 0.5)
        p = judge(label, draw)
        common = {"id": f"people/{k}", "prompt": (Message("user", f"q {k}"),), "response_a": "a", "response_b": "b"}
        said = {"p_a": p, "p_a_forward": p, "p_a_reversed": p, "human": label}
        made.append(PreferenceRecord.model_validate(common | said | {"judge": JUDGE}))
    return made


JUDGE = {"type": "vllm", "model": "m", "template": "t", "template_hash": "h"}
JOB = embedded(EvaluateJob, {"data": {"path": "x"}})


def test_a_perfect_judge_is_always_right_and_a_coin_half_the_time() -> None:
    perfect = measured_alignment(JOB, records(lambda label, draw: 0.1 + 0.8 * label))
    assert perfect and (perfect["accuracy"], perfect["ci95_low"], perfect["kappa"]) == (1.0, 1.0, 1.0)
    assert perfect["brier"] == pytest.approx(0.01) and perfect["ece"] == pytest.approx(0.1)
    coin = measured_alignment(JOB, records(lambda label, draw: draw.choice([0.3, 0.7])))
    assert coin and coin["ci95_low"] < 0.5 < coin["ci95_high"] and abs(coin["kappa"]) < 0.15
    no_data = embedded(EvaluateJob, {"arms": {"a": {"path": "a"}, "b": {"path": "b"}}})
    assert measured_alignment(no_data, []) is None


def test_what_failed_is_counted_and_not_scored() -> None:
    made = records(lambda label, draw: 0.1 + 0.8 * label, count=10)
    failed = made[0].model_copy(update={"p_a": None, "p_a_forward": None, "p_a_reversed": None, "failed": "too_long"})
    found = measured_alignment(JOB, [failed, *made[1:]])
    assert found and (found["n"], found["failed"], found["accuracy"]) == (9, 1, 1.0)


def test_data_without_labels_is_no_data(tmp_path: Path) -> None:
    path = write(tmp_path / "pairs.jsonl", [{"prompt": "q", "response_a": "a", "response_b": "bb"}])
    with pytest.raises(InputError, match="no pair with a label that people gave"):
        run(tmp_path, f"data.path={path}", f"run_dir={tmp_path / 'run'}")


def test_subsets_are_measured_apart(tmp_path: Path) -> None:
    rows = [
        {"prompt": f"q{k}", "response_a": "aa", "response_b": "b", "label": float(k < 4), "source": f"{part}/{k}"}
        for k, part in enumerate(["one"] * 3 + ["two/deep"] * 5)
    ]
    path = write(tmp_path / "pairs.jsonl", rows)
    found = run(tmp_path, f"data.path={path}", "subset=source", f"run_dir={tmp_path / 'run'}")["alignment"]
    assert found["accuracy"] == 0.5  # the longer is a, which is right for the first 4 of 8
    assert {name: (part["accuracy"], part["n"]) for name, part in found["subsets"].items()} == {
        "one": (1.0, 3),
        "two/deep": (0.2, 5),
    }
    with pytest.raises(InputError, match="subset=sauce must be a column"):
        run(tmp_path, f"data.path={path}", "subset=sauce", f"run_dir={tmp_path / 'other'}")


def test_a_reward_model_is_measured_as_a_judge_is(tmp_path: Path) -> None:
    class Longer:
        def score(self, completions: Any) -> list[Score]:
            return [Score(None if c.text == "fails" else float(len(c.text))) for c in completions]

    rows = [
        {"prompt": "q1", "response_a": "aaa", "response_b": "b", "label": 1},
        {"prompt": "q2", "response_a": "a", "response_b": "bb", "label": 1},
        {"prompt": "q3", "response_a": "a", "response_b": "fails", "label": 0},
    ]
    path = write(tmp_path / "pairs.jsonl", rows)
    job = embedded(EvaluateJob, {"data": {"path": str(path)}})
    found = measured_reward_model(job, Longer(), labelled_by_people(job)[0])
    assert (found["accuracy"], found["n"], found["failed"]) == (0.5, 2, 1)
    p = [1 / (1 + math.exp(-2)), 1 / (1 + math.exp(1))]  # sigmoid(r_a - r_b)
    assert found["brier"] == pytest.approx(((p[0] - 1) ** 2 + (p[1] - 1) ** 2) / 2)


# ---- Win rates -------------------------------------------------------------------------------------------------------


def test_arms_by_hand(tmp_path: Path) -> None:
    """The longer answer wins: a 2 of 3 against b, all against c, which says nothing twice."""
    summary = run(
        tmp_path,
        f"run_dir={tmp_path / 'run'}",
        arm(tmp_path, "a", ["long answer", "longer answer", "x"]),
        arm(tmp_path, "b", ["short", "short", "the longest answer"]),
        arm(tmp_path, "d", ["long answer", "longer answer", "x"]),
    )
    by_pair = {(one["a"], one["b"]): one for one in summary["win_rates"]}
    assert list(by_pair) == [("a", "b"), ("a", "d"), ("b", "d")]
    assert by_pair["a", "b"]["win_rate"]["rate"] == pytest.approx(2 / 3)
    assert by_pair["b", "d"]["win_rate"]["rate"] == pytest.approx(1 / 3)
    assert by_pair["a", "b"]["mean_length"] == {"a": pytest.approx(25 / 3), "b": pytest.approx(28 / 3)}
    same = by_pair["a", "d"]["win_rate"]  # an arm against its own answers
    assert (same["rate"], same["ci95_low"], same["ci95_high"], same["ties"]) == (0.5, 0.5, 0.5, 3)
    assert by_pair["a", "b"]["longer_wins"] == by_pair["a", "b"]["win_rate"]["rate"]  # this judge is that baseline


def test_several_answers_to_a_prompt_are_one_cluster(tmp_path: Path) -> None:
    summary = run(
        tmp_path,
        f"run_dir={tmp_path / 'run'}",
        arm(tmp_path, "a", ["aa", "a", "aa", "aaaa", "a", "aa"]),
        arm(tmp_path, "b", ["b", "bb", "b", "b", "bb", "b"]),
    )
    [found] = summary["win_rates"]
    assert (found["win_rate"]["n"], found["win_rate"]["prompts"]) == (6, 3)
    assert found["win_rate"]["rate"] == pytest.approx(4 / 6)


def test_a_reference_meets_each_other_arm() -> None:
    arms = {name: {"path": name} for name in ("base", "dpo", "rlaif")}
    assert compared(embedded(EvaluateJob, {"arms": arms, "win_rate": {"reference": "dpo"}})) == [
        ("base", "dpo"),
        ("rlaif", "dpo"),
    ]


def test_arms_without_a_common_prompt_are_told(tmp_path: Path) -> None:
    other = ["four?", "five?", "six?"]
    settings = [arm(tmp_path, "a", ["x", "y", "z"]), arm(tmp_path, "b", ["x", "y", "z"], other)]
    with pytest.raises(InputError, match="no prompt in common"):
        run(tmp_path, f"run_dir={tmp_path / 'run'}", *settings)


def test_a_run_of_other_arms_is_not_gone_on_with(tmp_path: Path) -> None:
    settings = [arm(tmp_path, "a", ["x", "y", "z"]), arm(tmp_path, "b", ["xx", "y", "z"])]
    first = run(tmp_path, f"run_dir={tmp_path / 'run'}", *settings)
    assert run(tmp_path, f"run_dir={tmp_path / 'run'}", *settings)["win_rates"] == first["win_rates"]
    arm(tmp_path, "b", ["x", "yy", "z"])
    with pytest.raises(InputError, match="results of another run"):
        run(tmp_path, f"run_dir={tmp_path / 'run'}", *settings)


def test_an_origin_that_is_not_known_is_told_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """An arm's folder may hold any resolved.yaml, and no evaluation is lost to it once it is paid for."""

    def open_ray(*_: object) -> None:
        raise RuntimeError("what costs begins here")

    settings = [arm(tmp_path, "a", ["x", "y", "z"]), arm(tmp_path, "b", ["xx", "y", "z"])]
    (tmp_path / "resolved.yaml").write_text("feedback: " + "[" * 20_000)
    told = "resolved.yaml beside it is nested more than 100 deep"
    found = run(tmp_path, f"run_dir={tmp_path / 'run'}", *settings)
    assert told in found["unclear_origins"]["a"][0] and found["training_judges"] == {"a": [], "b": []}
    capsys.readouterr()
    monkeypatch.setattr("rlaif_ray.pipelines.evaluate.open_ray", open_ray)
    with pytest.raises(RuntimeError, match="what costs"):
        run(tmp_path, f"run_dir={tmp_path / 'run'}", *settings)
    assert "arm a: " in (said := capsys.readouterr().out) and told in said


# ---- Harmless rate ---------------------------------------------------------------------------------------------------


def harmless_job(**more: Any) -> EvaluateJob:
    harmless = {"prompts": {"path": "risky.jsonl"}, "safe": {"path": "safe.jsonl"}, **more}
    return embedded(EvaluateJob, {"arms": {"m": {"model": "x"}}, "harmless": harmless})


def answered(part: str, arm: str, count: int, label: float | None = None) -> list[Response]:
    return [Response(part, arm, k // 2, (Message("user", f"{k // 2}?"),), f"answer {k}", label) for k in range(count)]


def test_rates_by_hand() -> None:
    """Two answers a prompt: 6 of 8 harmless, 1 of 4 safe requests refused; a judge that is right 8 and 6 of 10."""
    responses = [*answered(PROMPTS, "m", 8), *answered(SAFE, "m", 4)]
    responses += [*answered(LABELLED, "", 10, 1.0), *answered(LABELLED, "", 10, 0.0)]
    scores = [0.9] * 6 + [-0.2, 0.0]  # exactly the threshold is not above it
    scores += [0.1, -1.0, -1.0, -1.0]
    scores += [1.0] * 8 + [-1.0] * 2 + [-1.0] * 6 + [1.0] * 4
    found = measured_harmless(harmless_job(), responses, Graded(scores, 0, 0.0))
    own = found["arms"]["m"]
    assert (own["rate"]["rate"], own["rate"]["n"], own["rate"]["prompts"]) == (0.75, 8, 4)
    assert own["over_refusal"]["rate"] == 0.25
    assert (found["judge"]["sensitivity"], found["judge"]["specificity"]) == (0.8, 0.6)
    assert own["corrected"]["rate"] == pytest.approx((0.75 + 0.6 - 1) / (0.8 + 0.6 - 1))  # Rogan and Gladen


def test_failures_are_dropped_and_another_threshold_counts() -> None:
    responses = answered(PROMPTS, "m", 4)
    found = measured_harmless(harmless_job(threshold=0.5), responses, Graded([0.6, 0.4, None, 0.9], 0, 0.0))
    own = found["arms"]["m"]
    assert own["rate"]["rate"] == pytest.approx(2 / 3) and own["rate"]["dropped"] == 1
    assert own["over_refusal"] is None and own["corrected"] is None and found["judge"] is None


def test_labelled_rows_must_have_labels(tmp_path: Path) -> None:
    path = write(
        tmp_path / "known.jsonl",
        [{"prompt": "q", "response": "r", "label": 1}, {"prompt": "q", "response": "r", "label": 0.5}],
    )
    with pytest.raises(InputError, match=r"known.jsonl, line 2: label must be 0 or 1 \(got float 0.5"):
        responses_of(harmless_job(labelled=str(path)), {})


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        (["arms.a.path=x"], "arms must be at least two"),
        (["arms.a.path=x", "arms.b.path=y", "harmless.prompts.path=p", "judge.type=longer"], "harmless needs a judge"),
        (
            ["harmless.prompts.path=p", "data.path=d"],
            r"harmless needs a judge with a model, and an arm \(got judge.type=vllm and arms none\)",
        ),
        (["arms.a={path: x, model: y}", "arms.b.path=y"], r"an arm must have model or path \(got both\)"),
        (["arms.a={}", "arms.b.path=y"], r"an arm must have model or path \(got neither\)"),
        (["arms.a.path=x", "arms.b.path=y", "win_rate.reference=c"], "win_rate.reference must be one of the arms"),
        ([], "an evaluation needs data or arms"),
        (["arms.a.path=x", "arms.b.path=y", "subset=source"], "reward_models and subset need data"),
    ],
)
def test_what_cannot_be_measured_is_told(settings: list[str], told: str) -> None:
    with pytest.raises(InputError, match=told):
        load_job("evaluate", [CONFIGS / "demo" / "alignment.yaml"], settings)


def test_answers_that_are_other_ones_by_now(tmp_path: Path) -> None:
    """The path is the same: what was measured of the old file is not this one's."""
    arms = (arm(tmp_path, "a", ["one", "two", "three"]), arm(tmp_path, "b", ["1", "2", "3"]))
    settings = (*arms, "data=null", f"run_dir={tmp_path / 'run'}")
    run(tmp_path, *settings)
    assert run(tmp_path, *settings)["win_rates"][0]["win_rate"]["rate"] == 1.0
    arm(tmp_path, "a", ["x", "y", "z"])
    with pytest.raises(InputError, match=r"holds results of another run: arms.a.path: .*a.jsonl has changed \(written"):
        run(tmp_path, *settings)
