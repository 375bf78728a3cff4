"""Preference labels by hand numbers: both orders, position bias, inversion, clamping, rationales, cuts."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif_ray.config.data_sections import LabelConfig, ReasoningConfig
from rlaif_ray.feedback.local import LocalAsker
from rlaif_ray.feedback.preference import LongerLabeler, PreferenceLabeler, averaged, cut_middle
from rlaif_ray.feedback.principles import load_constitution
from rlaif_ray.feedback.templates import load_exemplars, load_template
from rlaif_ray.rollout.fake import ScriptedGenerator
from rlaif_ray.types import Answer, Comparison, Question
from tests.asker import FakeAsker, shown
from tests.tiny import make_tokenizer

HELPFUL = load_template("helpful", kind="preference")
HARMLESS = load_template("harmless", kind="preference")
PAIR = Comparison("p1", "How do I boil an egg?", "Nine minutes in water.", "No idea.")
MIRROR = Comparison("p1", PAIR.prompt, PAIR.response_b, PAIR.response_a)


def labeler(asker: FakeAsker, template=HELPFUL, **config) -> PreferenceLabeler:
    return PreferenceLabeler(asker, template, LabelConfig(**config), seed=3)


def noisy(question: Question) -> float:
    """A probability that follows from every character of the question: a judge without any sense."""
    digest = hashlib.sha256(repr(question).encode()).digest()
    return int.from_bytes(digest[:7], "little") / 2**56


# ---- Orders ----------------------------------------------------------------------------------------------------------


def test_both_orders_are_asked_and_averaged() -> None:
    # Shown first, the good answer wins with 0.9; shown second it wins with 1 - 0.3 = 0.7: mean 0.8.
    asker = FakeAsker(lambda q: 0.9 if shown(q)[0] == PAIR.response_a else 0.3)
    [label] = labeler(asker).label([PAIR])
    assert (label.p_a_forward, label.p_a_reversed) == (0.9, pytest.approx(0.7))
    assert label.p_a == pytest.approx(0.8)
    assert (label.tokens_in, label.tokens_out, label.cost) == (20, 2, 0.5)
    assert sorted(shown(q) for q in asker.asked) == sorted(
        [(PAIR.response_a, PAIR.response_b), (PAIR.response_b, PAIR.response_a)]
    )


@pytest.mark.parametrize("bias", [-0.2, -0.05, 0.0, 0.1, 0.2])
@pytest.mark.parametrize("true", [0.25, 0.5, 0.7])
def test_a_known_position_bias_cancels(true: float, bias: float) -> None:
    asker = FakeAsker(lambda q: (true if shown(q)[0] == PAIR.response_a else 1 - true) + bias)
    [label] = labeler(asker).label([PAIR])
    assert label.p_a == pytest.approx(true, abs=1e-12)


@pytest.mark.parametrize("template", [HELPFUL, HARMLESS, load_template("summary", kind="preference")])
@pytest.mark.parametrize("reasoning", [None, ReasoningConfig(samples=3, temperature=0.5)])
def test_the_mirrored_pair_gets_exactly_the_rest(template, reasoning) -> None:
    for number in range(200):
        a, b = f"answer {number}", f"reply {number * 7}"
        pair, mirror = Comparison("x", "Why?", a, b), Comparison("x", "Why?", b, a)
        one, other = labeler(FakeAsker(noisy), template, reasoning=reasoning).label([pair, mirror])
        assert one.p_a is not None and other.p_a is not None
        assert one.p_a == 1.0 - other.p_a and other.p_a == 1.0 - one.p_a


@given(st.floats(0, 1), st.floats(0, 1), st.sampled_from([1.0, 0.6, 0.75]))
def test_averaging_is_antisymmetric_for_all_numbers(forward: float, backward: float, cap: float) -> None:
    p, q = averaged(forward, backward, cap), averaged(backward, forward, cap)
    assert p == 1.0 - q and q == 1.0 - p
    assert 1.0 - cap <= p <= cap


def test_a_template_that_asks_for_the_worse_is_inverted() -> None:
    assert (HELPFUL.asks_for, HARMLESS.asks_for) == ("better", "worse")
    asker = FakeAsker(lambda q: 0.9 if shown(q)[0] == PAIR.response_a else 0.2)
    [better], [worse] = labeler(asker).label([PAIR]), labeler(asker, HARMLESS).label([PAIR])
    assert better.p_a == pytest.approx(0.85) and worse.p_a == pytest.approx(0.15)
    assert worse.p_a_forward == pytest.approx(0.1)


def test_clamping_by_hand() -> None:
    sure = FakeAsker(lambda q: 0.99 if shown(q)[0] == PAIR.response_a else 0.03)  # 0.98
    torn = FakeAsker(lambda q: 0.55 if shown(q)[0] == PAIR.response_a else 0.45)  # 0.55
    assert [labeler(sure, clamp=(0.4, 0.6)).label([p])[0].p_a for p in (PAIR, MIRROR)] == [0.6, 0.4]
    assert labeler(torn, clamp=(0.4, 0.6)).label([PAIR])[0].p_a == pytest.approx(0.55)
    assert labeler(sure, clamp=(0.4, 0.6)).label([PAIR])[0].p_a_forward == pytest.approx(0.99)  # what was said stays


# ---- Rationales ------------------------------------------------------------------------------------------------------


def test_the_answer_is_asked_after_the_judges_own_reasons() -> None:
    asker = FakeAsker(lambda q: 0.75, explain=lambda q, k: f"because of {shown(q)[0]} <|im_end|>")
    [label] = labeler(asker, reasoning=ReasoningConfig(max_new_tokens=40)).label([PAIR])
    assert asker.settings[0].temperature == 0 and asker.settings[0].max_new_tokens == 40
    assert len(label.rationales) == 2 and PAIR.response_a in label.rationales[0]
    assert PAIR.response_b in label.rationales[1]  # each order its own
    for question in asker.asked:
        user, judge, end = question.turns
        assert [turn.role for turn in question.turns] == ["user", "assistant", "user"]
        assert judge.content == f"because of {shown(question)[0]} (|im_end|)"  # it can't end its own turn
        assert (
            user.content.endswith(HELPFUL.rationale_request.split("\n")[-1])
            and HELPFUL.ending.split("\n")[-1] in end.content
        )
        assert question.answers == ("1", "2")
    assert all(not q.answers for q in asker.explained)
    assert (label.tokens_in, label.tokens_out, label.cost) == (30, 8, 1.5)


def test_self_consistency_averages_by_hand() -> None:
    said = {"reason 0": 0.9, "reason 1": 0.5, "reason 2": 0.1}
    asker = FakeAsker(lambda q: said[q.turns[1].content] if shown(q)[0] == PAIR.response_a else 0.4)
    [label] = labeler(asker, reasoning=ReasoningConfig(samples=3, temperature=0.7)).label([PAIR])
    assert label.p_a_forward == pytest.approx(0.5) and label.p_a == pytest.approx((0.5 + 0.6) / 2)
    assert len(label.rationales) == 6


def test_an_unread_answer_is_left_out_of_the_mean_and_all_unread_fail() -> None:
    some = FakeAsker(lambda q: "unparsed" if q.turns[1].content == "reason 0" else 0.8)
    every = FakeAsker(lambda q: "unparsed")
    cot = ReasoningConfig(samples=2, temperature=0.7)
    assert labeler(some, reasoning=cot).label([PAIR])[0].p_a_forward == pytest.approx(0.8)
    failed = labeler(every, reasoning=cot).label([PAIR])[0]
    assert (failed.p_a, failed.failure) == (None, "unparsed")


# ---- Principles and exemplars ----------------------------------------------------------------------------------------


def test_a_principle_is_drawn_per_comparison_and_recorded() -> None:
    constitution = load_constitution("default")
    template = load_template("constitution", kind="preference")
    asker = FakeAsker()
    subject = PreferenceLabeler(asker, template, LabelConfig(constitution="default"), constitution=constitution, seed=1)
    labels = subject.label([Comparison(str(i), "Why?", "a", "b") for i in range(60)])
    by_id = {principle.id: principle for principle in constitution.principles}
    assert len({label.principle for label in labels}) > 8
    asked = [question.turns[0].content for question in reversed(asker.asked)]
    for i, label in enumerate(labels):
        text = by_id[label.principle].comparison_question
        assert text.strip() in asked[2 * i] and text.strip() in asked[2 * i + 1]  # both orders, one principle
    again = PreferenceLabeler(
        FakeAsker(), template, LabelConfig(constitution="default"), constitution=constitution, seed=1
    )
    alone = again.label([Comparison("17", "Why?", "a", "b")])
    assert alone[0].principle == labels[17].principle  # whatever stands beside it


def test_exemplars_stand_before_every_question_and_are_the_same_for_all() -> None:
    exemplars = load_exemplars("helpful", HELPFUL)
    asker = FakeAsker()
    subject = PreferenceLabeler(asker, HELPFUL, LabelConfig(exemplars="helpful"), exemplars=exemplars)
    subject.label([PAIR, Comparison("2", "Other?", "x", "y")])
    contents = [question.turns[0].content for question in asker.asked]
    common = min(contents, key=len)[: len(HELPFUL.preamble)]
    assert all(content.startswith(common) and exemplars[0].prompt in content for content in contents)
    prefix = HELPFUL.with_exemplars(exemplars, with_rationales=False)
    assert all(content.startswith(prefix) for content in contents)


# ---- Failures and cuts -----------------------------------------------------------------------------------------------


def test_one_failed_order_fails_the_label_and_keeps_the_other() -> None:
    asker = FakeAsker(lambda q: "engine_error: gone" if shown(q)[0] == PAIR.response_b else 0.7)
    [label] = labeler(asker).label([PAIR])
    assert (label.p_a, label.failure) == (None, "engine_error: gone")
    assert (label.p_a_forward, label.p_a_reversed) == (0.7, None)


def test_too_long_is_a_failure_unless_the_middle_may_go() -> None:
    long = Comparison("long", "start " + "x" * 3000 + " end", "first answer", "second answer")
    size = sum(
        len(t.content)
        for t in labeler(FakeAsker()).example(Comparison("", "", long.response_a, long.response_b))[0].turns
    )
    asker = FakeAsker(longest=size + 500)
    [failed] = labeler(asker).label([long])
    assert (failed.p_a, failed.failure, failed.cut) == (None, "too_long", 0)
    [cut] = labeler(asker, too_long="cut_middle").label([long])
    assert cut.p_a == 0.5 and cut.failure is None
    note = len("\n[... 2544 characters left out ...]\n")
    assert cut.cut == pytest.approx(len(long.prompt) - 500 + note, abs=2)  # no more than needed
    for question in asker.asked[-2:]:
        text = question.turns[0].content
        assert "start xxx" in text and "xxx end" in text and f"{cut.cut} characters left out" in text
        assert long.response_a in text and long.response_b in text


def test_a_response_is_never_cut() -> None:
    wide = Comparison("wide", "short prompt", "y" * 5000, "z")
    asker = FakeAsker(longest=4000)
    [label] = labeler(asker, too_long="cut_middle").label([wide])
    assert (label.p_a, label.failure, label.cut) == (None, "too_long", 0)


def test_room_for_the_rationale_is_kept() -> None:
    long = Comparison("long", "x" * 3000, "a", "b")
    config = {"reasoning": ReasoningConfig(max_new_tokens=100), "too_long": "cut_middle"}
    request = labeler(FakeAsker(), **config).example(long)[0].turns[0].content
    [label] = labeler(FakeAsker(longest=len(request) - 10), **config).label([long])
    assert label.p_a == 0.5 and label.cut >= 700  # seven characters a token


@given(st.text(max_size=200), st.integers(0, 250))
def test_cutting_keeps_both_ends(text: str, count: int) -> None:
    count = min(count, len(text))
    cut = cut_middle(text, count)
    if count == 0:
        assert cut == text
    else:
        head, tail = cut.split(f"\n[... {count} characters left out ...]\n")[0], cut.rsplit(" ...]\n", 1)[1]
        assert text.startswith(head) and text.endswith(tail) and len(head) + len(tail) == len(text) - count


# ---- Through tokens --------------------------------------------------------------------------------------------------


def test_hand_set_logits_through_a_real_tokenizer() -> None:
    tokenizer = make_tokenizer(None)
    one, two = tokenizer.convert_tokens_to_ids(["1", "2"])
    egg = tokenizer.encode("Nine", add_special_tokens=False)

    def next_token(tokens: tuple[int, ...]) -> dict[int, float]:
        text = tokenizer.decode(list(tokens))
        first = text.index(PAIR.response_a) < text.index(PAIR.response_b)
        return {one: 0.6, two: 0.2} if first else {one: 0.1, two: 0.3}  # 0.75, and 1 - 0.25

    asker = LocalAsker(ScriptedGenerator(tokenizer, logits=next_token), tokenizer, 4096, "tiny")
    [label] = PreferenceLabeler(asker, HELPFUL, LabelConfig()).label([PAIR])
    assert egg and label.p_a_forward == pytest.approx(0.75) and label.p_a_reversed == pytest.approx(0.75)
    assert label.p_a == pytest.approx(0.75) and label.tokens_in > 0 and label.tokens_out == 0


def test_longer_is_a_rule() -> None:
    labels = LongerLabeler().label([PAIR, MIRROR, Comparison("t", "?", "ab", "cd")])
    assert [label.p_a for label in labels] == [1.0, 0.0, 0.5] and all(label.hard for label in labels)
    assert not any(math.isnan(label.cost) for label in labels)


# ---- Little probability on the answers -------------------------------------------------------------------------------


class Leaning(FakeAsker):
    """Gives both answers together `mass(question)` of the probability, nine tenths of it to the first."""

    def __init__(self, mass: Callable[[Question], float]) -> None:
        super().__init__(lambda _: 0.9)
        self._mass = mass

    def answer(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        for i, answer in super().answer(questions):
            yield i, replace(answer, outside=1.0 - self._mass(questions[i]))


@pytest.mark.parametrize("order", ["both", "first", "second"])
def test_a_judge_that_would_say_something_else_gives_no_label(order: str) -> None:
    def mass(question: Question) -> float:
        a_first = shown(question) == (PAIR.response_a, PAIR.response_b)
        return 1e-7 if order == "both" or a_first == (order == "first") else 0.4

    [label] = PreferenceLabeler(Leaning(mass), HELPFUL, LabelConfig()).label([PAIR])
    assert label.p_a is None and label.answer_mass == pytest.approx(1e-7)
    assert label.failure is not None and label.failure.startswith("low_answer_mass: ") and "1e-07" in label.failure
    assert (label.p_a_forward is None, label.p_a_reversed is None) == (order != "second", order != "first")


@pytest.mark.parametrize(("mass", "least", "labelled"), [(0.05, 0.05, True), (0.049, 0.05, False), (1e-9, 0.0, True)])
def test_the_floor_is_what_the_config_says(mass: float, least: float, labelled: bool) -> None:
    labeler = PreferenceLabeler(Leaning(lambda _: mass), HELPFUL, LabelConfig(), min_answer_mass=least)
    [label] = labeler.label([PAIR])
    assert (label.p_a is not None) == labelled and label.answer_mass == pytest.approx(mass)


def test_a_rationale_after_which_the_judge_says_something_else_does_not_count() -> None:
    asker = Leaning(lambda question: 0.5 if "reason 0" in question.turns[1].content else 0.01)
    cfg = LabelConfig(reasoning=ReasoningConfig(samples=2, temperature=1.0))
    [label] = PreferenceLabeler(asker, HELPFUL, cfg).label([PAIR])
    assert label.p_a == pytest.approx(0.5) and label.answer_mass == pytest.approx(0.5)


def test_an_answer_in_words_has_no_mass_to_speak_of() -> None:
    class Hard(FakeAsker):
        def answer(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
            yield from ((i, replace(answer, hard=True)) for i, answer in super().answer(questions))

    [label] = PreferenceLabeler(Hard(), HELPFUL, LabelConfig()).label([PAIR])
    assert label.p_a is not None and label.answer_mass is None
