"""Scorers without a judge: a reward model's scores are transformers' own, whatever else is in the batch."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from rlaif_ray.config.sections import RewardModelFeedback
from rlaif_ray.errors import InputError
from rlaif_ray.feedback.reward_model import LengthPenalty, MixtureScorer, RewardModelScorer, check_reward_model
from rlaif_ray.types import Completion, Message, Prompt, Score
from tests.chat_families import tokenizer_of
from tests.tiny import IM_END, PAD, cached_tiny_model, make_tokenizer
from tests.zoo import zoo_model

ROOM = 200  # tokens of context of the reward model
TEXTS = ["yes", "It is the better answer, because you help.", "10", "no " * 20, "A", ""]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Any:
    """For models this small a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random reward model as `rlaif reward-model` leaves it, made by transformers alone."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    target = tmp_path_factory.mktemp("reward") / "model"
    base = cached_tiny_model(tied=True)
    torch.manual_seed(0)
    model = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32)
    with torch.no_grad():
        model.score.weight.normal_()
    model.config.max_position_embeddings = ROOM
    model.config.reward_center = {"mean": 0.75, "std": 2.0}
    model.config.reward_ends_with_eos = True
    model.save_pretrained(target)
    AutoTokenizer.from_pretrained(base).save_pretrained(target)
    return target


def changed(folder: Path, target: Path, **config: Any) -> Path:
    """A copy with other entries in config.json; None takes one out."""
    shutil.copytree(folder, target)
    file = target / "config.json"
    entries = json.loads(file.read_text()) | config
    file.write_text(json.dumps({name: value for name, value in entries.items() if value is not None}))
    return target


def scorer(folder: Path, **cfg: Any) -> RewardModelScorer:
    feedback = RewardModelFeedback.model_validate({"type": "reward_model", "model": str(folder)} | cfg)
    return RewardModelScorer(feedback, device="cpu", precision="fp32")


def completion(text: str, question: str = "Which is better?", *, finished: bool = True, tokens: int = 3) -> Completion:
    # The tokens are the policy's: the reward model must not read them, it has a tokenizer of its own.
    prompt = Prompt(question, (Message("user", question),), (1, 2), question)
    return Completion(prompt, 0, (9,) * tokens, (-1.0,) * tokens, text, finished, 0)


def by_transformers(folder: Path, completions: Sequence[Completion], *, eos: bool = True) -> list[float]:
    """Raw rewards, one sequence at a time: nothing is padded, so the classifier reads its last token."""
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    model = AutoModelForSequenceClassification.from_pretrained(folder, attn_implementation="eager")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rewards = []
    for c in completions:
        turns = [{"role": m.role, "content": m.content} for m in c.prompt.messages]
        text = tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False) + c.text
        tokens = tokenizer(text + (IM_END if eos and c.finished else ""), add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            rewards.append(float(model(torch.tensor([tokens])).logits[0, 0]))
    return rewards


# ---- The reward model ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [1, 150, 100_000])
def test_scores_are_transformers_rewards_less_the_mean(folder: Path, budget: int) -> None:
    subject = scorer(folder, tokens_per_batch=budget)
    completions = [completion(text) for text in TEXTS] + [completion("yes", "And now for another prompt?")]
    batches: list[list[int]] = []
    forward = subject._forward
    subject._forward = lambda s: (batches.append([len(one) for one in s]), forward(s))[1]  # type: ignore[method-assign]
    scores = subject.score(completions)
    expected = by_transformers(folder, completions)
    assert max(expected) - min(expected) > 0.5, "they hardly differ: nothing is compared"
    assert [s.value for s in scores] == pytest.approx([r - 0.75 for r in expected], abs=1e-5)
    assert [s.evidence["reward"] for s in scores] == pytest.approx(expected, abs=1e-5)
    assert all(s.failure is None and s.evidence["model"] == str(folder) for s in scores)
    assert sum(map(len, batches)) == len(completions)
    flat = [length for batch in batches for length in batch]
    assert flat == sorted((s.tokens_in for s in scores), reverse=True), "not the longest first"
    assert all(len(batch) == 1 or batch[0] * len(batch) <= budget for batch in batches)
    assert {1: len(batches) == 7, 150: 1 < len(batches) < 7, 100_000: len(batches) == 1}[budget]


def test_neither_order_nor_company_changes_a_score(folder: Path) -> None:
    subject = scorer(folder)
    completions = [completion(text) for text in TEXTS]
    together = [s.value for s in subject.score(completions)]
    assert [s.value for s in subject.score(completions[::-1])] == pytest.approx(together[::-1], abs=1e-5)
    alone = [subject.score([c])[0].value for c in completions]
    assert alone == pytest.approx(together, abs=1e-5)
    assert subject.score([]) == []


def test_a_cut_completion_has_no_end(folder: Path) -> None:
    done, cut = completion("yes"), completion("yes", finished=False)
    scores = scorer(folder).score([done, cut])
    assert [s.value for s in scores] == pytest.approx(
        [r - 0.75 for r in by_transformers(folder, [done, cut])], abs=1e-5
    )
    assert scores[0].tokens_in == scores[1].tokens_in + 1
    assert abs(scores[0].value - scores[1].value) > 1e-3  # type: ignore[operator]


def test_a_model_without_eos_convention_reads_the_text_alone(folder: Path, tmp_path: Path) -> None:
    other = changed(folder, tmp_path / "m", reward_ends_with_eos=False)
    [score] = scorer(other).score([completion("yes")])
    assert score.value == pytest.approx(by_transformers(folder, [completion("yes")], eos=False)[0] - 0.75, abs=1e-5)


def test_a_classifier_from_elsewhere_counts_as_it_is(folder: Path, tmp_path: Path) -> None:
    other = changed(folder, tmp_path / "m", reward_ends_with_eos=None, reward_center=None)
    [score] = scorer(other).score([completion("yes")])
    assert score.value == pytest.approx(by_transformers(folder, [completion("yes")])[0], abs=1e-5)


def test_control_strings_in_texts_are_text(folder: Path) -> None:
    """A response that writes the end token's name does not end there, and padding's name pads nothing."""
    pairs = [
        (completion("yes"), completion(f"yes{IM_END}")),
        (completion("yes"), completion(f"yes{PAD}")),
        (completion("yes", "?"), completion("yes", f"{IM_END}?")),
    ]
    scores = scorer(folder).score([c for pair in pairs for c in pair])
    for plain, hostile in zip(scores[0::2], scores[1::2], strict=True):
        assert plain.value is not None and hostile.value is not None
        assert hostile.tokens_in > plain.tokens_in + 3  # spelled out
        assert abs(hostile.value - plain.value) > 1e-3


def test_too_long_is_a_failure_of_that_one_alone(folder: Path) -> None:
    subject = scorer(folder)
    fits = subject.score([completion("x")])[0].tokens_in
    at, beyond = completion("x" * (1 + ROOM - fits)), completion("x" * (2 + ROOM - fits))
    short, edge, over = subject.score([completion("x"), at, beyond])
    assert edge.tokens_in == ROOM and edge.value is not None and short.value is not None
    assert (over.value, over.failure, over.tokens_in) == (None, "too_long", 0)
    limited = scorer(folder, max_context=fits).score([completion("x"), completion("xx")])
    assert [s.failure for s in limited] == [None, "too_long"]


def test_what_is_no_number_is_a_failure(folder: Path) -> None:
    subject = scorer(folder)
    with torch.no_grad():
        subject._model.score.weight[0, 0] = float("nan")
    [score] = subject.score([completion("yes")])
    assert (score.value, score.failure) == (None, "no_value")
    assert "reward" not in score.evidence and score.tokens_in > 0


def test_evidence_can_be_written_down(folder: Path) -> None:
    scores = scorer(folder).score([completion("yes"), completion("x" * 1000)])
    assert all(json.loads(json.dumps(s.evidence)) == s.evidence for s in scores)


def test_a_reward_model_is_known_from_what_is_none(folder: Path, tmp_path: Path) -> None:
    def check(model: Path, **cfg: Any) -> None:
        check_reward_model(RewardModelFeedback(type="reward_model", model=str(model), **cfg))

    check(folder, max_context=ROOM)
    with pytest.raises(InputError, match=r"must be a sequence classifier with one label \(got LlamaForCausalLM"):
        check(cached_tiny_model(tied=True))
    three = changed(folder, tmp_path / "m", id2label={"0": "a", "1": "b", "2": "c"}, label2id={"a": 0, "b": 1, "c": 2})
    with pytest.raises(InputError, match=r"one label \(got LlamaForSequenceClassification with 3\)"):
        check(three)
    with pytest.raises(InputError, match=rf"must not exceed the {ROOM} tokens .* \(got {ROOM + 1}\)"):
        check(folder, max_context=ROOM + 1)
    with pytest.raises(InputError, match="does not exist"):
        check(tmp_path / "nowhere")


# ---- Length and mixtures ---------------------------------------------------------------------------------------------


def test_length_penalty_by_hand() -> None:
    # target 8: 0 up to 8, then down by 1/8 a token to -1 at 16, and on
    lengths = {1: 0.0, 8: 0.0, 9: -0.125, 12: -0.5, 16: -1.0, 17: -1.0, 400: -1.0}
    scores = LengthPenalty(8).score([completion("x", tokens=n) for n in lengths])
    assert [s.value for s in scores] == list(lengths.values())
    assert all(s.failure is None for s in scores) and scores[3].evidence == {"tokens": 12}
    assert math.copysign(1.0, scores[0].value or 0.0) == 1.0  # no "-0.0" in what people read


class Fixed:
    """Gives these scores."""

    def __init__(self, *scores: Score) -> None:
        self.scores = list(scores)

    def score(self, completions: Sequence[Completion]) -> list[Score]:
        assert len(completions) == len(self.scores)
        return self.scores


def test_mixture_by_hand() -> None:
    # 2 * .5 - .25 * 4 = 0;  2 * -1 - .25 * 2 = -2.5
    first = Fixed(Score(0.5, None, {"why": "good"}, 7), Score(-1.0, None, {"why": "bad"}, 8))
    second = Fixed(Score(4.0, None, {}, 1), Score(2.0, None, {}, 1))
    good, bad = MixtureScorer({"judge": (2.0, first), "length": (-0.25, second)}).score([completion("a")] * 2)
    assert (good.value, bad.value) == (0.0, -2.5)
    assert (good.tokens_in, bad.tokens_in) == (8, 9)
    assert bad.evidence == {
        "parts": {"judge": {"value": -1.0, "evidence": {"why": "bad"}}, "length": {"value": 2.0, "evidence": {}}}
    }


def test_a_mixture_scores_only_what_all_parts_scored() -> None:
    # A failure is no zero: .5 of the judge alone would be a score that nobody gave.
    judge = Fixed(Score(0.5), Score(0.5), Score(None, "no_probability"), Score(None, "too_long"))
    reward = Fixed(Score(1.0), Score(None, "too_long"), Score(1.0), Score(None, "no_value"))
    scores = MixtureScorer({"judge": (1.0, judge), "rm": (1.0, reward)}).score([completion("a")] * 4)
    assert [s.value for s in scores] == [1.5, None, None, None]
    assert [s.failure for s in scores] == [None, "rm_too_long", "judge_no_probability", "judge_too_long"]
    assert scores[1].evidence["parts"]["judge"]["value"] == 0.5  # what was measured is still shown


def test_a_part_of_weight_zero_is_only_watched() -> None:
    scores = MixtureScorer({"rm": (1.0, Fixed(Score(0.5))), "length": (0.0, Fixed(Score(-1.0)))}).score(
        [completion("a")]
    )
    assert scores[0].value == 0.5 and scores[0].evidence["parts"]["length"]["value"] == -1.0


@pytest.mark.parametrize("name", ["gemma2", "gpt_oss", "bloom", "arcee"])
def test_scores_have_every_term_of_the_models_attention(name: str, tmp_path: Path) -> None:
    """Soft caps and sinks, which sdpa leaves out; classes without sdpa; one that nobody tried."""
    zoo_model(name, "eager", "AutoModelForSequenceClassification", num_labels=1).save_pretrained(tmp_path)
    make_tokenizer(tmp_path)
    completions = [completion(text) for text in TEXTS]
    rewards = [score.value for score in scorer(tmp_path).score(completions)]
    assert rewards == pytest.approx(by_transformers(tmp_path, completions), abs=1e-4)


# --- templates and thoughts -------------------------------------------------------------------------------------------


def templated(folder: Path, target: Path, family: str, **config: Any) -> Path:
    made = changed(folder, target, **config)
    tokenizer_of(family).save_pretrained(made)
    return made


def test_a_response_is_scored_outside_of_the_thought_that_the_template_opens(folder: Path, tmp_path: Path) -> None:
    made = scorer(templated(folder, tmp_path / "r1", "deepseek-r1"))
    sequence = made._renderer.tokenizer.decode(made._sequence(completion("4")))
    assert sequence == f"<|User|>Which is better?<|Assistant|><think>\n\n</think>\n\n4{IM_END}"


def test_it_reads_as_it_was_trained_to(folder: Path, tmp_path: Path) -> None:
    plain = templated(folder, tmp_path / "plain", "qwen3")
    kwargs = {"enable_thinking": False}
    taught = templated(folder, tmp_path / "taught", "qwen3", reward_chat_template_kwargs=kwargs, reward_thoughts="keep")
    thinking = completion("<think>\nHm.\n</think>\n\n4")
    scorers = {"plain": scorer(plain), "taught": scorer(taught), "told": scorer(taught, thoughts="cut")}
    asked = [completion("4"), thinking, completion("<think>\nHm.")]
    rewards = {name: made.score(asked) for name, made in scorers.items()}
    assert [s.failure for s in rewards["plain"]] == [None, None, "open_thought"]
    assert [s.failure for s in rewards["taught"]] == [None, None, None]
    assert rewards["plain"][0].value == pytest.approx(rewards["plain"][1].value)  # the thought is cut
    assert rewards["taught"][0].value != pytest.approx(rewards["taught"][1].value)
    assert rewards["told"][0].value == pytest.approx(rewards["told"][1].value)
    assert scorer(taught)._renderer.chat.identity == '{"enable_thinking": false}'
