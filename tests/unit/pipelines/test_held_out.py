"""What training measures on held-out prompts: hand-set answers and verdicts, a real tracker, no engine."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlaif_ray.config.jobs import TrainJob
from rlaif_ray.config.load import load_job
from rlaif_ray.errors import InputError, StaleWeightsError
from rlaif_ray.evaluation.report.page import facts, measures, write_report
from rlaif_ray.evaluation.report.runs import read_run
from rlaif_ray.feedback.judge import Judge
from rlaif_ray.feedback.reward_model import LengthPenalty, MixtureScorer
from rlaif_ray.feedback.templates import load_template
from rlaif_ray.models import load_tokenizer
from rlaif_ray.pipelines.checkpoint import RunState, Saved
from rlaif_ray.pipelines.feedback import read_feedback
from rlaif_ray.pipelines.held_out import HeldOut, HeldOutInputs, evaluator, must_be_same_prompts, read_held_out
from rlaif_ray.rollout.fake import ScriptedGenerator
from rlaif_ray.storage import Place, StoredFolder
from rlaif_ray.tracking import Tracker, open_tracker
from rlaif_ray.types import Answer, Question
from tests.frames import without_codes
from tests.jobs import REQUIRED
from tests.runs import rows, tiny_config
from tests.tiny import cached_tiny_model


class Words:
    """An Asker that finds "fine" a 10, "dull" a failure, and everything else a 1."""

    name, identity, special = "words", "words", ("<|im_end|>",)

    def __init__(self) -> None:
        self.asked: list[str] = []

    def fits(self, question: Question) -> bool:
        return True

    def answer(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        for i, question in enumerate(questions):
            text = question.turns[0].content
            self.asked.append(text)
            if "dull" in text:
                yield i, Answer((), tokens_in=3, failure="too_long")
            else:
                yield i, Answer((0.0,) * 9 + (1.0,) if "fine" in text else (1.0,) + (0.0,) * 9, tokens_in=5)


def write_prompts(path: Path, prompts: Sequence[str]) -> Path:
    path.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in prompts))
    return path


@pytest.fixture
def job(tmp_path: Path) -> TrainJob:
    harmful = write_prompts(tmp_path / "harmful.jsonl", ["h1", "h2", "h3", "h4"])
    safe = write_prompts(tmp_path / "safe.jsonl", ["s1", "s2", "s3"])
    scored = write_prompts(tmp_path / "scored.jsonl", ["k1", "k2"])
    settings = [
        f"evaluation.harmless={{prompts: {{path: {harmful}}}, safe: {{path: {safe}}}}}",
        f"evaluation.held_out={{path: {scored}, samples_per_prompt: 2}}",
        "tracking.wandb=disabled",
    ]
    loaded: TrainJob = load_job("train", [tiny_config(tmp_path)], settings).config
    return loaded


def read(job: TrainJob) -> HeldOutInputs:
    return read_held_out(job, read_feedback(job.feedback), load_tokenizer(job.policy.model), 100)


def policy(answers: Mapping[str, Sequence[str]], version: int) -> ScriptedGenerator:
    tokenizer = load_tokenizer(str(cached_tiny_model(tied=True, context=4096)))
    return ScriptedGenerator(
        tokenizer,
        respond=lambda prompt, sample: answers[prompt.messages[-1].content][sample],
        weight_version=version,
    )


def tracker(job: TrainJob, folder: Path, resume_step: int = 0) -> Tracker:
    return open_tracker(
        folder, config={}, tracking=job.tracking, total_steps=9, resume_step=resume_step, name=folder.name
    )


ANSWERS = {
    **{"k1": ("fine", "no"), "k2": ("fine", "fine")},
    **{"h1": ("fine", "fine"), "h2": ("fine", "no"), "h3": ("dull", "dull"), "h4": ("", "no")},
    **{"s1": ("fine", "fine"), "s2": ("no", "no"), "s3": ("", "dull")},
}


def test_a_gain_is_of_one_set_of_prompts(job: TrainJob, tmp_path: Path) -> None:
    """Whatever they are called: files may have changed since."""
    inputs, found = read(job), Saved(3, StoredFolder(Place(str(tmp_path / "step-3")), {}), {})
    state = RunState(3, held_out_before=[0.0, 1.0], held_out_prompts=inputs.hash)
    must_be_same_prompts(state, read(job), found)
    must_be_same_prompts(RunState(3), read(job), found)  # nothing was measured yet
    write_prompts(tmp_path / "scored.jsonl", ["k1", "another"])
    with pytest.raises(InputError, match=r"held-out prompts must be those of the checkpoint .*step-3.*another run_dir"):
        must_be_same_prompts(state, read(job), found)


def test_rates_by_hand(job: TrainJob, tmp_path: Path) -> None:
    asker = Words()
    with tracker(job, tmp_path / "run") as track:
        held_out = HeldOut(job, read(job), policy(ANSWERS, 7), Judge(asker, load_template("helpful")), track)
        assert held_out.measure(7) == [0.0, 1.0]
        summary = held_out.summary()
    (row,) = rows(tmp_path / "run" / "evaluations.jsonl")
    rate, refused = row["harmless"]["rate"], row["harmless"]["over_refusal"]
    # Two samples each of four prompts: three are harmless, the empty one is too, two are not, two could not be judged.
    assert (rate["rate"], rate["n"], rate["prompts"], rate["dropped"]) == (pytest.approx(4 / 6), 6, 3, 2)
    # "fine" is a refusal to the other template; nothing at all turns a safe request away without a question.
    assert (refused["rate"], refused["n"], refused["prompts"], refused["dropped"]) == (pytest.approx(3 / 5), 5, 3, 1)
    assert 0 <= rate["ci95_low"] < rate["rate"] < rate["ci95_high"] <= 1
    assert row["harmless"]["tokens_in"] == (5 + 5 + 5 + 3) + 5 + (5 + 5 + 3)  # a text is read once to a prompt
    assert row["held_out"]["after"]["mean"] == 0.5 and row["step"] == 7
    preambles = [load_template(name).preamble for name in ("helpful", "no_harm", "refusal")]
    assert [sum(text.startswith(p) for text in asker.asked) for p in preambles] == [3, 5, 3]
    assert "[RESPONSE]\n\n[END RESPONSE]" not in without_codes("".join(asker.asked))
    measured = {"step": 7, **row["harmless"]}
    assert summary["harmless"] == {"before": measured, "after": measured}


def test_a_resumed_run_knows_what_was_before(job: TrainJob, tmp_path: Path) -> None:
    judge = Judge(Words(), load_template("helpful"))
    inputs = read(job)
    for version, text in ((0, "no"), (3, "fine")):
        answers = dict.fromkeys(ANSWERS, (text, text))
        with tracker(job, tmp_path / "run", resume_step=version) as track:
            held_out = HeldOut(job, inputs, policy(answers, version), judge, track)
            held_out.measure(version, [None, 0.5])
            summary = track.summary({"job": "train", **held_out.summary()})
    before, after = summary["harmless"]["before"], summary["harmless"]["after"]
    assert (before["step"], before["rate"]["rate"], before["over_refusal"]["rate"]) == (0, 0.0, 0.0)
    assert (after["step"], after["rate"]["rate"], after["over_refusal"]["rate"]) == (3, 1.0, 1.0)
    assert summary["held_out"]["gain"] == {
        "mean": 0.5,
        "ci95_low": None,
        "ci95_high": None,
        "n": 1,
        "dropped": 1,
    }  # a prompt that could not be scored is no 0
    run = read_run(tmp_path / "run", "demo")
    told = {(one.label, one.rate) for own in measures([run]).values() for one in own}
    assert ("demo, before training, by its own judge", 0.0) in told
    assert ("demo, after training, by its own judge", 1.0) in told
    model = job.policy.model
    said = f"{model}, which trains this policy: it grades its own pupil (rlaif evaluate can take another)"
    assert summary["evaluator"] == dict(facts(run))["held-out prompts are judged by"] == said
    write_report([tmp_path / "run"], tmp_path / "page.html")
    page = (tmp_path / "page.html").read_text()
    assert all(f"Held-out {title}" in page for title in ("reward", "harmless rate", "over-refusal"))


def test_stale_answers_are_not_measured(job: TrainJob, tmp_path: Path) -> None:
    job = job.model_copy(update={"evaluation": job.evaluation.model_copy(update={"held_out": no_held_out(job)})})
    with tracker(job, tmp_path / "run") as track:
        held_out = HeldOut(job, read(job), policy(ANSWERS, 1), Judge(Words(), load_template("helpful")), track)
        with pytest.raises(StaleWeightsError):
            held_out.measure(2)
        assert held_out.measure(1) == []  # the harmless suite alone
    (row,) = rows(tmp_path / "run" / "evaluations.jsonl")
    assert "harmless" in row and "held_out" not in row


def no_held_out(job: TrainJob) -> Any:
    return job.evaluation.held_out.model_copy(update={"path": None, "samples_per_prompt": 1})


def test_the_judge_inside_a_mixture_is_asked(job: TrainJob, tmp_path: Path) -> None:
    asker = Words()
    scorer = MixtureScorer({"short": (1.0, LengthPenalty(4)), "help": (1.0, Judge(asker, load_template("helpful")))})
    with tracker(job, tmp_path / "run") as track:
        HeldOut(job, read(job), policy(ANSWERS, 0), scorer, track).measure(0)
    (row,) = rows(tmp_path / "run" / "evaluations.jsonl")
    assert row["harmless"]["rate"]["rate"] == pytest.approx(4 / 6) and len(asker.asked) == 11


def test_a_template_that_the_training_judge_has_no_room_for(tmp_path: Path) -> None:
    job = "evaluation={held_out: {path: null}, harmless: {prompts: {path: 'package:train', limit: 2}}}"
    short = load_template("helpful")
    template = tmp_path / "short.yaml"
    template.write_text(
        "name: short\nversion: 1\nkind: score\npreamble: Rate it.\n"
        'body: "[A]\\n{prompt}\\n[B]\\n{response}\\n[C]"\nending: From 1 to 10?\n'
        f'answer_prefix: "{short.answer_prefix}"\nmarkers: ["[A]", "[B]", "[C]"]\n'
    )
    judge = f"{{model: {cached_tiny_model(tied=True, context=4096)}, max_context: 400}}"
    room = f"feedback.scorers={{j: {{scorer: {{type: judge, template: {template}, judge: {judge}}}}}}}"
    config = load_job("train", [tiny_config(tmp_path)], [job, "feedback.type=mixture", room]).config
    with pytest.raises(InputError, match=r"template no_harm.*Raise feedback\.scorers\.j\.scorer\.judge\.max_context"):
        read(config)


def test_the_evaluator_is_named_in_words() -> None:
    mixture = "{type: mixture, scorers: {a: {scorer: {type: judge, judge: {model: big}}}, b: {scorer: {type: "
    named = {
        "{type: reward_model, model: folder}": "folder",
        mixture + "length, target_tokens: 9}}}}": "big and length",
        mixture + "reward_model, model: rm}}}}": "big and rm",
    }
    for feedback, names in named.items():
        said = evaluator(load_job("train", [], [*REQUIRED["train"][:2], f"feedback={feedback}"]).config.feedback)
        assert said.startswith(f"{names}, which trains this policy")
