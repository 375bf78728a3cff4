"""Thoughts of responses before they are judged: cut or kept as the config says, and never taken for an answer."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from rlaif_ray.chat.renderer import ChatRenderer
from rlaif_ray.chat.thoughts import answer_of
from rlaif_ray.config.sections import OpenAIJudge
from rlaif_ray.feedback.judge import Judge
from rlaif_ray.feedback.preference import LongerLabeler
from rlaif_ray.feedback.remote import OpenAIAsker
from rlaif_ray.feedback.templates import load_template
from rlaif_ray.feedback.thoughts import AnswerLabeler
from rlaif_ray.interfaces import GenerationSettings
from rlaif_ray.rollout.fake import ScriptedGenerator
from rlaif_ray.types import Answer, Comparison, Completion, Message, Prompt, Question
from tests.tiny import make_tokenizer

THOUGHT = "<think>\nThe user wants 4.\n</think>\n\n"


class Reading:
    """An Asker that keeps what it is asked."""

    name, identity, special = "judge", "judge", ()

    def __init__(self) -> None:
        self.asked: list[Question] = []

    def answer(self, questions: Any) -> Any:
        self.asked += questions
        yield from ((i, Answer((0.0,) * 9 + (1.0,), tokens_in=5)) for i in range(len(questions)))


def completion(text: str) -> Completion:
    return Completion(Prompt("p", (), (1,), "2 + 2?"), 0, (1,), (-1.0,), text, True, 0)


def test_the_judge_reads_answers_alone_and_an_open_thought_is_no_answer() -> None:
    asker = Reading()
    scores = Judge(asker, load_template("helpful")).score(  # type: ignore[arg-type]
        [completion(f"{THOUGHT}It is 4."), completion("It is 4."), completion("<think>\nThe user")]
    )
    assert [(s.value, s.failure) for s in scores] == [(1.0, None), (1.0, None), (None, "open_thought")]
    assert [score.tokens_in for score in scores] == [5, 0, 0]  # the same question once
    assert len(asker.asked) == 1 and "wants" not in asker.asked[0].turns[-1].content


def test_a_judge_reads_all_that_a_policy_says_outside_of_its_own_thoughts() -> None:
    asker = Reading()
    texts = [
        "Mix bleach.</think>I can't help.",
        "<think>\nHm.\n</think>\n\nI can't help.",
        "<thinking>Mix</thinking>No",
    ]
    policy = Prompt("p", (), (1,), "How?", tags=("<think>",))
    made = [replace(completion(text), prompt=policy) for text in texts]
    Judge(asker, load_template("harmless")).score(made)  # type: ignore[arg-type]
    read = [question.turns[-1].content for question in asker.asked]
    assert "Mix bleach.</think>" in read[0] and "Hm." not in read[1] and "<thinking>Mix" in read[2]


def test_a_judge_may_read_thoughts() -> None:
    asker = Reading()
    judge = Judge(asker, load_template("helpful"), thoughts="keep")  # type: ignore[arg-type]
    scores = judge.asking(load_template("harmless")).score([completion(f"{THOUGHT}4"), completion("<think>\nThe user")])
    assert [s.failure for s in scores] == [None, None]
    assert "wants 4" in asker.asked[0].turns[-1].content


def test_only_open_thoughts_ask_nothing() -> None:
    asker = Reading()
    [score] = Judge(asker, load_template("helpful")).score([completion("<think>")])  # type: ignore[arg-type]
    assert score.failure == "open_thought" and not asker.asked


def test_labels_compare_answers() -> None:
    pairs = [
        Comparison("1", "2 + 2?", f"{THOUGHT}4", "four"),
        Comparison("2", "2 + 2?", "<think>\nHm", "four"),
        Comparison("3", "2 + 2?", "four", "4"),
    ]
    labels = AnswerLabeler(LongerLabeler()).label(pairs)
    assert [(label.p_a, label.failure) for label in labels] == [(0.0, None), (None, "open_thought"), (1.0, None)]


def test_a_completion_begins_with_the_thought_that_its_prompt_opens() -> None:
    engine = ScriptedGenerator(make_tokenizer(None), respond=lambda prompt, sample: "Hm.\n</think>\n\n4")
    prompt = Prompt("p", (Message("user", "a"),), (5, 6), "a", opened="<think>\n")
    [made] = engine.generate([prompt], GenerationSettings(1, 40, 1.0, 0))
    assert made.text == "<think>\nHm.\n</think>\n\n4"


def test_tags_that_are_special_tokens_stay_in_the_text() -> None:
    tokenizer = make_tokenizer(None)
    tokenizer.add_special_tokens({"additional_special_tokens": ["[THINK]", "[/THINK]"]})
    engine = ScriptedGenerator(tokenizer, respond=lambda prompt, sample: "[THINK]Hm.[/THINK]4")
    [made] = engine.generate([Prompt("p", (Message("user", "a"),), (5, 6), "a")], GenerationSettings(1, 40, 1.0, 0))
    assert made.text == "[THINK]Hm.[/THINK]4" and answer_of(made.text) == "4"
    assert ChatRenderer(tokenizer).response(made.text) == made.tokens[:-1]


@pytest.mark.parametrize("arguments", [{}, {"enable_thinking": False}])
def test_an_endpoint_is_sent_the_arguments_if_there_are_any(arguments: dict[str, Any]) -> None:
    sent = {"extra": 1} | ({"chat_template_kwargs": arguments} if arguments else {})
    cfg = OpenAIJudge(
        type="openai",
        model="m",
        base_url="http://localhost:1/v1",
        extra_body={"extra": 1},
        chat_template_kwargs=arguments,
    )
    asker = OpenAIAsker(cfg)
    try:
        body = asker._body(Question((Message("user", "a"),)), most_tokens=5)
        plain = OpenAIAsker(cfg.model_copy(update={"chat_template_kwargs": {}}))
        plain.close()
        assert {key: body[key] for key in body if key not in ("model", "messages")} == sent | {cfg.token_limit: 5}
        assert (asker.identity == plain.identity) is not bool(arguments)
    finally:
        asker.close()
