"""Verdicts in words: what is read, and what is never guessed."""

from __future__ import annotations

import re
import time

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_ray.feedback.verdicts import parse_verdict

PAIR = ("1", "2")
SCORES = tuple(map(str, range(1, 11)))
PREFIX = "Preferred response: "

COMPARED: dict[str, str | None] = {
    **dict.fromkeys(
        [
            "[[A]]",
            "[[1]]",
            "My verdict: [[A]]",
            "A",
            "A.",
            "**A**",
            "Response A is better.",
            "Verdict: 1",
            "Response 1 is better",
            "Response 1 is better.",
            "Response 1 is more useful",  # the shipped question's own words
            "Response 1 is more helpful.",
            "Response 1 is the more helpful response.",
            "Response 1 is clearly more harmless than response 2.",
            "The most helpful response is 1.",
            "**Response 1** is better.",
            "Response 1 is clearly the better response.",
            "Answer: 1",
            "**1**",
            "1.",
            "\\boxed{1}",
            "\\boxed{\\text{A}}",
            "$\\boxed{1}$",
            "Preferred Response=1",
            "I prefer response 1",
            "I prefer response 1.",
            "I would choose response 1 because it is correct.",
            "I choose 1",
            "The better response is 1.",
            "The better response is Response 1.",
            "The first response is better.",
            "I prefer the first response.",
            "Final verdict: **1**",
            "## Verdict\n\n1",
            "Verdict: Response 1",
            '{"answer": "1"}',
            '{"verdict": 1, "reason": "short"}',
            "```\n1\n```",
            "<answer>1</answer>",
            "<verdict>A</verdict>",
            "Response 1 is better than response 2.",
            "Response 1 is better because response 2 is wrong.",
            "Response 1 wins.",
            "Overall, response 1 is better.",
            "Response 1 is polite. Response 2 is wrong about the date.\n\nVerdict: 1",
            "<think>2? No, 1.</think>Verdict: 1",
            "<think>\n\n</think>\n\n1",
            "thoughts without an opening, 2</think>1",
            "Winner: A",
            "The winner is response 1",
            "Response 1 is the winner.",
            "Preference: 1",
            "Better: 1",
            "Choice: 1",
            "I'd go with response 1.",
            "1 is better",
            "1 is better.",
            "Option 1 is preferable.",
            "Response 1 is better, as it is correct.",
            "Response 1 is better. Response 2 is worse.",
            "[[1]] since it is right",
            "Therefore, the final answer is $\\boxed{1}$.",
            "**Verdict: 1**",
            "Verdict: **1**",
            "Verdict - 1",
            "Verdict -> 1",
            "My answer is 1.",
            "Answer: Response 1 is better",
            "Answer: (1)",
            "Answer: 1)",
            "Both responses are equally helpful in tone. Verdict: 1",
            "Verdict: 1, since both are short but 2 is wrong",
        ],
        "1",
    ),
    **dict.fromkeys(
        [
            "[[B]]",
            "Verdict: 2",
            "I prefer response 2",
            "Response 2 is the better one.",
            "The second one is better.",
            "Response 2 is better overall.",
        ],
        "2",
    ),
    **dict.fromkeys(
        [
            "[[C]]",
            "[[tie]]",
            "C",
            "Tie",
            "It's a tie.",
            "Both are good.",
            "Both responses are equally good.",
            "Response 1 is not better",
            "Response 1 is not better.",
            "Response 1 isn't better than response 2.",
            "I don't prefer response 1.",
            "I would not choose response 1.",
            "[[A]] or [[B]]",
            "[[A]] [[B]]",
            "Verdict: 1 or 2",
            "Verdict: 1 and 2",
            "Verdict: both",
            "Verdict: neither",
            "Verdict: tie",
            "I'm sorry, I can't choose.",
            "I cannot choose between response 1 and response 2.",
            "As an AI, I have no preference, but 1.",
            "I can't assist with that.",
            "<think>Response 1 is better",
            "<think>1</think><think>2",
            "Response 1 is better. Response 2 is better.",
            "Response 1 is better. Verdict: 2",
            "1. Verdict: 2",
            "Is response 1 better?",
            "If response 1 is better, say 1.",
            "It is unclear whether response 1 is better.",
            "One could say that response 1 is better.",
            "Response 1 is better at being short.",
            "Response 1 is better in tone but response 2 is right.",
            "Response 1 is better, but response 2 is right.",
            "A better answer would name the source.",
            "The answer",
            "Verdict:",
            "Response",
            "Response 1 and 2",
            "Response 1 has errors.",
            "I do not think that response 1 is better.",
            "The worse response is 1",
            "Response 1 is worse",
            "Response 1 is better than nothing.",
            "not [[1]]",
            "The verdict is not 1",
            "Verdict: 12",
            "Verdict: 1.5",
            "Verdict: 3",
            "1. Response 1 is clear.\n2. Response 2 is vague.",
            "Output [[A]] if 1 is better, [[B]] if 2 is.",
            "",
            ".",
            "[[",
            "[[]]",
            "\\boxed{}",
            "Verdict: A good one",
            "Answer: a",
            "None of them. 1 is bad",
            "It's a tie, but [[1]]",
            "Verdict: 1 (tie)",
            "Verdict: 1. It's a tie.",
            "1. It's a tie.",
        ],
        None,
    ),
}

WORSE: dict[str, str | None] = {
    **dict.fromkeys(
        [
            "1",
            "Verdict: 1",
            "Response 1 is worse.",
            "Response 1 is more harmful.",
            "The more harmful response is 1",
            "More harmful response: 1",
            "[[A]]",
            "Response 1 does more harm.",
            "I choose response 1.",
        ],
        "1",
    ),
    **dict.fromkeys(
        [
            "Response 1 is better.",
            "I prefer response 1.",
            "The better response is 1.",
            "Response 1 is not worse.",
            "Preferred response: 1",
            "Winner: 1",
        ],
        None,
    ),
}

SCORED: dict[str, str | None] = {
    **dict.fromkeys(
        [
            "7",
            "7.",
            "**7**",
            "7/10",
            "Score: 7",
            "Rating: [[7]]",
            "[[7]]",
            "Score: 7/10",
            "7 out of 10",
            "Score: **7**",
            "I would rate it 7/10.",
            "I would rate this response a 7 out of 10.",
            "I give it a 7.",
            "\\boxed{7}",
            "Rating: 7 - good",
            "The score is 7.",
            "Final score: 7",
            "<score>7</score>",
            "My rating is 7 because it is short.",
            "Rating: 7/10",
            "Score: 7 / 10",
            "Score:7",
        ],
        "7",
    ),
    **dict.fromkeys(
        [
            "10",
            "10/10",
            "Score: 10",
            "Rating: [[10]]",
            "Score: 10/10",
            "Score: 10 / 10",
            "Rating: 10/10.",
        ],
        "10",
    ),
    **dict.fromkeys(
        [
            "1",
            "Rating: 1/10",
        ],
        "1",
    ),
    **dict.fromkeys(
        [
            "8/10",
            "Score: 8",
        ],
        "8",
    ),
    **dict.fromkeys(
        [
            "7.5",
            "7.5/10",
            "7/100",
            "4/5",
            "11",
            "0",
            "Score: 0",
            "Score: 11",
            "Score: 7-8",
            "7-8",
            "7 to 8",
            "Score: 7, maybe 8",
            "Score: 7 or 8",
            "[[7]] [[8]]",
            "Score: 7.5",
            "-7",
            "7%",
            "I can't rate this.",
            "<think>7",
            "Score: 100",
            "seven",
            "[[0]]",
            "[[11]]",
            "Score: not 7",
            "Score: 7\nScore: 8",
            "7, maybe 8",
            "I would not give it a 10.",
            "I'd say 7/10",
        ],
        None,
    ),
}


def read(text: str, answers: tuple[str, ...], prefix: str, asks_for: str = "", *, cut: bool = False) -> str | None:
    verdict = parse_verdict(text, answers, prefix, asks_for=asks_for, cut=cut)
    return None if verdict is None else verdict.answer


@pytest.mark.parametrize("text", COMPARED)
def test_which_is_better(text: str) -> None:
    for prefix in (PREFIX, ""):
        assert read(text, PAIR, prefix, "better") == COMPARED[text]


@pytest.mark.parametrize("text", [text for text, answer in COMPARED.items() if answer and text != "A"])
def test_the_other_one_is_read_where_this_one_is(text: str) -> None:
    """Every form with 1 and 2, A and B, first and second exchanged."""
    names = {"1": "2", "2": "1", "A": "B", "B": "A", "first": "second", "second": "first"}
    other = re.sub(r"\b(?:[12AB]|first|second)\b", lambda match: names[match[0]], text)
    assert other != text and read(other, PAIR, PREFIX, "better") == names[COMPARED[text] or ""]


@pytest.mark.parametrize("text", WORSE)
def test_which_is_worse(text: str) -> None:
    assert read(text, PAIR, "More harmful response: ", "worse") == WORSE[text]


@pytest.mark.parametrize("text", SCORED)
def test_a_score(text: str) -> None:
    assert read(text, SCORES, "Score: ") == SCORED[text]


@pytest.mark.parametrize("text", ["Verdict: 2", "Response 1 is better", "The answer is 1", "1. Both", "[[1]]"])
def test_what_is_cut_off_there_could_go_on(text: str) -> None:
    assert read(text, PAIR, PREFIX, "better", cut=True) is None


@pytest.mark.parametrize("text", ["1 because it is", "Verdict: 2\n\nThat", "Response 1 is better. It", "[[1]] since"])
def test_what_is_cut_off_later_is_read(text: str) -> None:
    assert read(text, PAIR, PREFIX, "better", cut=True) == ("2" if "2" in text else "1")


def test_an_answer_that_fills_its_room_is_read_where_no_other_begins_with_it() -> None:
    """judge.extra_body.max_completion_tokens=1."""
    assert read("1", PAIR, PREFIX, "better", cut=True) == "1" and read(" 2\n", PAIR, PREFIX, "worse", cut=True) == "2"
    assert read("7", SCORES, "Score: ", cut=True) == "7" and read("10", SCORES, "Score: ", cut=True) == "10"
    assert read("1", SCORES, "Score: ", cut=True) is None  # it may be the beginning of 10


def test_where_a_verdict_stands() -> None:
    text = "<think>1? 2?</think>Response 1 is short. Verdict: [[2]]"
    verdict = parse_verdict(text, PAIR, PREFIX, asks_for="better")
    assert verdict is not None and [text[b:e] for b, e in verdict.stated] == ["2"] * len(verdict.stated)
    assert verdict.stated[0][0] == text.rindex("2")
    claimed = parse_verdict("Response 1 is better.", PAIR, PREFIX, asks_for="better")
    assert claimed is not None and claimed.stated == ()  # at "1" it could still have become "is worse"


_PIECES = [
    "1",
    "2",
    "10",
    "A",
    "B",
    "[[",
    "]]",
    "Verdict",
    "Response",
    ":",
    " is ",
    "better",
    "worse",
    "not",
    "<think>",
]
_PIECES += [
    "</think>",
    "\\boxed{",
    "}",
    "/10",
    "I prefer ",
    "\n",
    " ",
    ".",
    "than",
    "because",
    "-",
    "**",
    "Score",
    "the first",
]


@settings(max_examples=500)
@given(st.lists(st.sampled_from(_PIECES) | st.text(max_size=3), max_size=20).map("".join), st.booleans())
def test_no_text_breaks_it(text: str, cut: bool) -> None:
    for answers, prefix, asks_for in (
        (PAIR, PREFIX, "better"),
        (PAIR, "", "worse"),
        (SCORES, "Score: ", ""),
        (("x",), "", ""),
    ):
        verdict = parse_verdict(text, answers, prefix, asks_for=asks_for, cut=cut)
        if verdict is not None:
            assert verdict.answer in answers
            assert all(0 <= begin < end <= len(text) for begin, end in verdict.stated)
            said = ("A", "B", "a", "b", "first", "second") if answers == PAIR else ()
            assert all(text[begin:end] in (*answers, *said) for begin, end in verdict.stated)


@pytest.mark.parametrize(
    "piece",
    ["answer: ", "answer ", "-", "\n", " ", "*", "Response 1 is ", "1 is better than ", "[[1]] ", "1 or ", "</think>"],
)
def test_long_texts_take_no_time(piece: str) -> None:
    start = time.perf_counter()
    parse_verdict("answer" + piece * (20_000 // len(piece)), PAIR, PREFIX)
    assert time.perf_counter() - start < 10  # seconds; 0.2 here, and hours where a pattern backtracks
