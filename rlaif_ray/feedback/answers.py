"""Reads a judge's answers off its next-token probabilities: ten numbers for a score, two for a preference.

"10" starts with "1". Where it takes two tokens, the probability of the token "1" is that of both answers together:

    P("10") = P("1") P("0" | "1")        P("1" and no more) = P("1") (1 - P("0" | "1"))

Which tokens an answer takes depends on the tokenizer, so the answers are kept as a trie of tokens. An answer may be
reached in several ways, as "1" and as " 1": its probability is that of all of them.
The score is the expectation of Lee et al. (2309.00267, appendix D): s = sum_i i P(i), mapped to [-1, 1].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from rlaif_ray.errors import InputError
from rlaif_ray.types import Answer, TokenQuery

LOW_MASS = "low_answer_mass"  # the failure of a judge whose probability is on other words than the answers
MIN_ANSWER_MASS = 0.05

ANSWERS = tuple(range(1, 11))
SCORES = tuple(map(str, ANSWERS))

Tokens = tuple[int, ...]


class Verdict(NamedTuple):
    """What the ten probabilities amount to."""

    value: float  # the expectation on a scale from -1 to 1
    expected: float  # the expectation, from 1 to 10
    outside: float  # probability of everything that is none of the ten answers


class AnswerTrie:
    """The possible answers as token paths that continue a judge's prompt."""

    def __init__(self, encode: Callable[[str], list[int]], tail: str, answers: Sequence[str] = SCORES) -> None:
        """`tail` is the constant text that ends every prompt of this judge; `encode` adds no special tokens.

        Raises InputError when the tokenizer does not tell the answers apart.
        """
        bare = tuple(encode(tail))
        forms = [[tuple(encode(f"{start}{answer}")) for answer in answers] for start in _starts(tail)]
        kept = min(_common(bare, tokens) for tokens in forms[0])
        # Another form whose blank joins the end of the prompt, as a line break does ":" or another line break,
        # is left out: every answer would be multiplied by the probability of what the prompt has already.
        others = [form for form in forms[1:] if all(tokens[:kept] == bare[:kept] for tokens in form)]
        # Where an answer goes on from a space, other forms are rare: only if they cost nothing.
        rare = others if tail.endswith(" ") else []
        self.dropped: Tokens = bare[kept:]  # tokens of the tail that merge with a number, such as the space in " 7"
        self.paths: tuple[Tokens, ...] = tuple(tokens[kept:] for tokens in forms[0])  # one per answer, its usual one
        if len(set(self.paths)) < len(answers) or not all(self.paths):
            same = [[a for a, other in zip(answers, self.paths, strict=True) if other == path] for path in self.paths]
            groups = "; ".join(dict.fromkeys(" and ".join(group) for group in same if len(group) > 1))
            raise InputError(
                f"the judge's tokenizer does not tell the answers {answers[0]} to {answers[-1]} apart (the same "
                f"tokens: {groups or 'none'}), so it can't judge. Use another judge model."
            )
        owners = {path: k for k, path in enumerate(self.paths)}  # number of the answer that a path is
        for form in others:
            paths = [tokens[kept:] for tokens in form]
            if not rare or _costs_nothing(owners, paths):
                _add(owners, paths)
        self.longest = max(map(len, owners))
        self._owners = owners
        children: dict[Tokens, set[int]] = {}
        for path in owners:
            for depth, token in enumerate(path):
                children.setdefault(path[:depth], set()).add(token)
        # Sorted by path, every continuation follows what it continues.
        self.nodes: tuple[tuple[Tokens, Tokens], ...] = tuple(
            (node, tuple(sorted(children[node]))) for node in sorted(children)
        )

    def queries(self, prompt_tokens: Sequence[int]) -> list[TokenQuery]:
        """What to ask an engine about a prompt that ends with the tail: one query per node that has children."""
        prompt = tuple(prompt_tokens)
        end = len(prompt) - len(self.dropped)
        assert prompt[end:] == self.dropped, "the prompt does not end with the tail"
        return [TokenQuery(prompt[:end] + node, candidates) for node, candidates in self.nodes]

    def length(self, prompt_tokens: Sequence[int]) -> int:
        """Tokens of the prompt with its longest answer."""
        return len(prompt_tokens) - len(self.dropped) + self.longest

    def probabilities(self, logprobs: Sequence[Sequence[float]]) -> list[float]:
        """Probability of each answer as a whole, from the log-probabilities that answer `queries`."""
        step = {
            (*node, token): _exp(logprob)
            for (node, candidates), answer in zip(self.nodes, logprobs, strict=True)
            for token, logprob in zip(candidates, answer, strict=True)
        }
        continued = {node: sum(step[(*node, token)] for token in candidates) for node, candidates in self.nodes}
        found: list[list[float]] = [[] for _ in self.paths]
        for path, answer in self._owners.items():
            whole = math.prod(step[path[:depth]] for depth in range(1, len(path) + 1))
            found[answer].append(whole * _at_least_0(1.0 - continued.get(path, 0.0)))
        return [math.fsum(ways) for ways in found]


def expected_score(probabilities: Sequence[float]) -> Verdict | None:
    """Verdict of the ten probabilities, renormalised; None when they are no distribution's."""
    total = math.fsum(probabilities)
    if not (math.isfinite(total) and total > 0.0):
        return None
    expected = math.fsum(a * p for a, p in zip(ANSWERS, probabilities, strict=True)) / total
    return Verdict(value=2.0 * (expected - 1.0) / 9.0 - 1.0, expected=expected, outside=_at_least_0(1.0 - total))


def mass_failure(answer: Answer, least: float) -> str | None:
    """Why `answer` is no judgement: all allowed answers together have less than `least` of the probability.

    A model that would rather say something else (a refusal, the start of a thought) has no opinion in the ratio of two
    answers that it all but rules out. Answers read off words have all of it.
    """
    if answer.failure is not None or answer.mass >= least:
        return None
    return f"{LOW_MASS}: the allowed answers have {answer.mass:.2g} of the probability (at least {least:g} is needed)"


def _starts(tail: str) -> list[str]:
    """What an answer may go on from: the tail as it is, and with another blank, or none, before the answer."""
    bare = tail.rstrip(" ")
    return [*dict.fromkeys([tail, bare, f"{tail} ", f"{bare}\n"])]


def _add(owners: dict[Tokens, int], paths: Sequence[Tokens]) -> None:
    """Other paths to the answers, as far as they lead to no other answer already."""
    for answer, path in enumerate(paths):
        if path:
            owners.setdefault(path, answer)


def _costs_nothing(owners: Mapping[Tokens, int], paths: Sequence[Tokens]) -> bool:
    """Whether these paths need no query of their own: they end where others do, and nothing goes on from them."""
    nodes = {path[:depth] for path in owners for depth in range(len(path))}
    return all(path and path[:-1] in nodes and path not in nodes for path in paths)


def _common(left: Tokens, right: Tokens) -> int:
    """Length of the common prefix."""
    for index, (a, b) in enumerate(zip(left, right, strict=False)):
        if a != b:
            return index
    return min(len(left), len(right))


def _exp(logprob: float) -> float:
    return math.exp(logprob) if logprob < 1.0 else math.nan  # no log-probability is 1, whatever the rounding


def _at_least_0(value: float) -> float:
    """Rounding can give -1e-17; not-a-number stays what it is."""
    return 0.0 if value < 0.0 else value
