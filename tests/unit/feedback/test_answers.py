"""The ten answers as token paths, and hand-computed expected scores."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif_ray.errors import InputError
from rlaif_ray.feedback.answers import ANSWERS, AnswerTrie, expected_score
from tests.tiny import make_tokenizer

TAIL = "Score: "


def with_merges(*merges: tuple[str, str], across: bool = False) -> Any:
    """The tiny tokenizer with these merges too, before its own; their tokens come after its own.

    `across`: merges join what most tokenizers first take apart, such as a colon and the line break behind it.
    """
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerFast

    tiny = make_tokenizer(None)
    state = json.loads(tiny.backend_tokenizer.to_str())
    state["model"]["merges"] = [*map(list, merges), *state["model"]["merges"]]
    state["pre_tokenizer"]["use_regex"] = not across
    for left, right in merges:
        state["model"]["vocab"].setdefault(left + right, len(state["model"]["vocab"]))
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(state)),
        pad_token=tiny.pad_token,
        bos_token=tiny.bos_token,
        eos_token=tiny.eos_token,
        chat_template=tiny.chat_template,
        clean_up_tokenization_spaces=False,
    )


SPACED_DIGITS = [("Ġ", str(digit)) for digit in range(1, 10)]


def trie_for(tokenizer: Any, tail: str = TAIL) -> AnswerTrie:
    return AnswerTrie(lambda text: tokenizer.encode(text, add_special_tokens=False), tail)


def logs(rows: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[math.log(p) if p else -math.inf for p in row] for row in rows]


# ---- Paths and queries -----------------------------------------------------------------------------------------------


def test_ten_in_two_tokens() -> None:
    tokenizer = make_tokenizer(None)
    one, zero = tokenizer.convert_tokens_to_ids(["1", "0"])
    digits = tuple(sorted(tokenizer.convert_tokens_to_ids([str(d) for d in range(1, 10)])))
    trie = trie_for(tokenizer)
    assert (trie.dropped, trie.longest) == ((), 2)
    assert trie.paths[0] == (one,) and trie.paths[9] == (one, zero)
    prompt = (50, 51, *tokenizer.encode(TAIL))
    root, after_one = trie.queries(prompt)
    assert (root.prompt, root.candidates) == (prompt, digits)
    assert (after_one.prompt, after_one.candidates) == ((*prompt, one), (zero,))
    assert trie.length(prompt) == len(prompt) + 2


def test_ten_in_one_token() -> None:
    tokenizer = make_tokenizer(None, ten_is_one_token=True)
    trie = trie_for(tokenizer)
    assert trie.longest == 1 and trie.paths[9] == (tokenizer.convert_tokens_to_ids("10"),)
    prompt = tuple(tokenizer.encode(TAIL))
    [root] = trie.queries(prompt)
    assert len(root.candidates) == 10 and trie.length(prompt) == len(prompt) + 1


@pytest.mark.parametrize("ten_is_one_token", [False, True])
def test_a_number_that_takes_the_space_before_it(ten_is_one_token: bool) -> None:
    tokenizer = with_merges(*SPACED_DIGITS, *([("Ġ1", "0")] if ten_is_one_token else []))
    space, one, ten = tokenizer.convert_tokens_to_ids(["Ġ", "Ġ1", "Ġ10"])
    trie = trie_for(tokenizer)
    assert trie.dropped == (space,)
    assert trie.paths[0] == (one,)
    assert trie.paths[9] == ((ten,) if ten_is_one_token else (one, tokenizer.convert_tokens_to_ids("0")))
    prompt = (50, *tokenizer.encode(TAIL))
    queries = trie.queries(prompt)
    assert queries[0].prompt == prompt[:-1]
    assert [q.prompt for q in queries[1:]] == ([] if ten_is_one_token else [(*prompt[:-1], one)])
    assert trie.length(prompt) == len(prompt) + (0 if ten_is_one_token else 1)


def test_only_some_numbers_take_the_space() -> None:
    """The space is then a node of its own, and the answers below it are reached in two steps."""
    tokenizer = with_merges(("Ġ", "7"))
    space, seven, one = tokenizer.convert_tokens_to_ids(["Ġ", "Ġ7", "1"])
    trie = trie_for(tokenizer)
    assert trie.dropped == (space,)
    assert trie.paths[6] == (seven,) and trie.paths[0] == (space, one)
    root, after_space, after_one = trie.queries(tuple(tokenizer.encode(TAIL)))
    assert set(root.candidates) == {space, seven}
    assert len(after_space.candidates) == 8 and len(after_one.candidates) == 1
    eights = [1 / 8] * 8
    row = [{space: 0.5, seven: 0.25}[token] for token in root.candidates]
    p = trie.probabilities(logs([row, eights, [0.5]]))
    assert p[6] == pytest.approx(0.25)
    assert p[1] == pytest.approx(0.5 / 8) and p[0] == p[9] == pytest.approx(0.5 / 16)


def test_every_continuation_directly_follows_what_it_continues() -> None:
    trie = trie_for(with_merges(("Ġ", "7")))
    for before, (node, _) in zip(trie.nodes, trie.nodes[1:], strict=False):
        assert node[: len(before[0])] == before[0]


def test_a_tail_without_a_space() -> None:
    trie = trie_for(make_tokenizer(None), "Score:")
    assert trie.dropped == () and trie.longest == 3  # a space, "1" and "0"


def test_a_prompt_that_lacks_the_tail_is_our_mistake() -> None:
    trie = trie_for(with_merges(*SPACED_DIGITS))
    with pytest.raises(AssertionError, match="tail"):
        trie.queries((50, 51))


@pytest.mark.parametrize(
    ("encode", "same"),
    [
        (lambda text: [0] * (len(text) > len(TAIL)), "1 and 2 and 3"),  # all numbers unknown
        (lambda text: [ord(c) for c in text.replace("9", "8")], "8 and 9"),
        (lambda text: [], ""),
    ],
)
def test_a_tokenizer_that_cannot_tell_the_answers_apart(encode: Any, same: str) -> None:
    with pytest.raises(InputError, match="does not tell the answers 1 to 10 apart") as caught:
        AnswerTrie(encode, TAIL)
    assert same in str(caught.value) and "another judge model" in str(caught.value)


# ---- Probabilities and the score -------------------------------------------------------------------------------------


def test_the_mass_of_one_goes_on_to_ten() -> None:
    trie = trie_for(make_tokenizer(None))
    # P(1..9) as first tokens, then P("0" | "1") = 1/4
    p = trie.probabilities(logs([[0.4, 0, 0, 0, 0.3, 0, 0.1, 0, 0], [0.25]]))
    assert p == pytest.approx([0.3, 0, 0, 0, 0.3, 0, 0.1, 0, 0, 0.1])
    verdict = expected_score(p)
    assert verdict is not None
    # (1*0.3 + 5*0.3 + 7*0.1 + 10*0.1) / 0.8 = 3.5 / 0.8 = 4.375; 2 * 3.375 / 9 - 1 = -0.25
    assert verdict.expected == pytest.approx(4.375)
    assert verdict.value == pytest.approx(-0.25)
    assert verdict.outside == pytest.approx(0.2)


@pytest.mark.parametrize(("answer", "value"), [(1, -1.0), (10, 1.0), (5.5, 0.0), (4, -1 / 3)])
def test_the_scale_is_linear(answer: float, value: float) -> None:
    low = math.floor(answer)
    p = [0.0] * 11
    p[low - 1] += 0.5
    p[math.ceil(answer) - 1] += 0.5
    verdict = expected_score(p[:10])
    assert verdict is not None and verdict.value == pytest.approx(value)
    assert verdict.outside == 0.0


def test_little_mass_is_renormalised() -> None:
    verdict = expected_score([1e-9 * (answer in (2, 8)) for answer in ANSWERS])
    assert verdict is not None
    assert verdict.expected == pytest.approx(5.0) and verdict.outside == pytest.approx(1.0)


@pytest.mark.parametrize("logprob", [math.nan, math.inf, 1e4])
def test_what_is_no_probability_gives_no_score(logprob: float) -> None:
    trie = trie_for(make_tokenizer(None))
    assert expected_score(trie.probabilities([[logprob, *[-2.0] * 8], [-1.0]])) is None
    assert expected_score(trie.probabilities([[-2.0] * 9, [logprob]])) is None


def test_no_mass_at_all_gives_no_score() -> None:
    trie = trie_for(make_tokenizer(None))
    assert expected_score(trie.probabilities([[-math.inf] * 9, [-1.0]])) is None
    assert expected_score(trie.probabilities([[-2000.0] * 9, [-1.0]])) is None


weights = st.lists(st.floats(0, 1), min_size=12, max_size=12).filter(lambda w: sum(w[:10]) > 1e-3)


@given(weights, st.booleans())
def test_probabilities_are_a_distribution(weights: list[float], ten_is_one_token: bool) -> None:
    trie = trie_for(make_tokenizer(None, ten_is_one_token=ten_is_one_token))
    rows = [[w / sum(weights) for w in weights[:10]]] if ten_is_one_token else [[w / sum(weights) for w in weights[:9]]]
    rows += [] if ten_is_one_token else [[weights[11]]]
    p = trie.probabilities(logs(rows))
    assert min(p) >= 0.0 and sum(p) == pytest.approx(sum(rows[0]))
    verdict = expected_score(p)
    if sum(p) > 0:
        assert verdict is not None
        assert -1 - 1e-9 <= verdict.value <= 1 + 1e-9 and 0 <= verdict.outside <= 1


# ---- Answers behind a blank ------------------------------------------------------------------------------------------


def pair_trie(tokenizer: Any, tail: str) -> AnswerTrie:
    return AnswerTrie(lambda text: tokenizer.encode(text, add_special_tokens=False), tail, ("1", "2"))


@pytest.mark.parametrize("tail", ["Better:", "assistant\n"])
def test_an_answer_counts_with_and_without_a_blank_before_it(tail: str) -> None:
    """A tokenizer that has "1" and " 1": what the judge says with either is one answer."""
    tokenizer = with_merges(*SPACED_DIGITS)
    one, two, spaced_one, spaced_two = tokenizer.convert_tokens_to_ids(["1", "2", "Ġ1", "Ġ2"])
    trie = pair_trie(tokenizer, tail)
    p = {one: 0.1, two: 0.05, spaced_one: 0.5, spaced_two: 0.15}
    rows = [[p.get(token, 0.0) for token in query.candidates] for query in trie.queries(tokenizer.encode(tail))]
    assert trie.probabilities(logs(rows)) == pytest.approx([0.6, 0.2])


def test_a_line_break_before_the_answer_counts() -> None:
    tokenizer = make_tokenizer(None)
    one, two, space, line = tokenizer.convert_tokens_to_ids(["1", "2", "Ġ", "Ċ"])
    trie = pair_trie(tokenizer, "Better:")
    p = {(): {one: 0.1, space: 0.4, line: 0.2}, (space,): {one: 0.5, two: 0.5}, (line,): {two: 0.75}}
    rows = [[p[node].get(token, 0.0) for token in candidates] for node, candidates in trie.nodes]
    assert trie.probabilities(logs(rows)) == pytest.approx([0.1 + 0.2, 0.2 + 0.15])


@pytest.mark.parametrize(("tail", "merge"), [("assistant\n", ("Ċ", "Ċ")), ("Better:", (":", "Ċ"))])
def test_a_blank_that_joins_the_end_of_the_prompt_is_no_way_to_an_answer(tail: str, merge: tuple[str, str]) -> None:
    """The prompt keeps its tokens, so that answers have the probability that the model gives them behind it."""
    tokenizer = with_merges(*SPACED_DIGITS, merge, across=True)
    assert len(tokenizer.encode("".join(merge).replace("Ċ", "\n"))) == 1
    one, two, spaced_one, spaced_two = tokenizer.convert_tokens_to_ids(["1", "2", "Ġ1", "Ġ2"])
    trie = pair_trie(tokenizer, tail)
    prompt = tuple(tokenizer.encode(tail))
    [query] = trie.queries(prompt)
    assert query.prompt == prompt and set(query.candidates) == {one, two, spaced_one, spaced_two}
    p = {one: 0.1, two: 0.05, spaced_one: 0.5, spaced_two: 0.15}
    assert trie.probabilities(logs([[p[token] for token in query.candidates]])) == pytest.approx([0.6, 0.2])


def test_where_the_answer_goes_on_from_a_space_no_more_is_asked() -> None:
    """As with the shipped templates: one query for a pair, two for a score."""
    for tokenizer in (make_tokenizer(None), with_merges(*SPACED_DIGITS)):
        assert len(pair_trie(tokenizer, "Preferred response: ").nodes) == 1
        assert len(trie_for(tokenizer).nodes) == 2
    merged = pair_trie(with_merges(*SPACED_DIGITS), "Preferred response: ")
    assert len(merged.nodes[0][1]) == 4  # "1" as well as " 1", in the same query
