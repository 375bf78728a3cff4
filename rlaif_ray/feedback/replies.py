"""Reads a chat completion as a judge's answer, off the log-probabilities of its tokens. Pure."""

from __future__ import annotations

import itertools
import math
import string
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import Any

from rlaif_ray.documents import at, parse_json
from rlaif_ray.errors import DocumentError
from rlaif_ray.feedback.verdicts import parse_verdict

# What may stand around an answer without being one. Some servers show a token's space as its vocabulary writes it.
_AROUND = string.whitespace + "\u2581\u0120\u010a" + "\"'`“”‘’«»()[]{}*"
REPLY_BYTES = 32 << 20  # of one reply, several texts with all their thoughts; nobody is paid for reading more
MOST_TOKENS = 10**9  # of a request; a count above it is none
_NO_TEXT = "\ufffd"
_BLANKS = str.maketrans("\u2581\u0120\u010a", "  \n")


class BadReplyError(Exception):
    """A reply that is no chat completion; the message says how."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What a chat completion says."""

    texts: tuple[str, ...]  # one per choice, at least one; "" for a choice without any
    positions: tuple[dict[str, Any], ...] | None  # tokens of the first choice with alternatives; None: no such thing
    cut: bool  # the first choice ended at the token limit
    tokens_in: int
    tokens_out: int
    counted: bool  # whether the endpoint said how many tokens


def read_reply(content: bytes) -> Reply:
    """Raises BadReplyError when `content` is no chat completion with a choice."""
    try:
        body = parse_json(content, most_bytes=REPLY_BYTES, lenient=True)
    except DocumentError as error:
        raise BadReplyError("no JSON" if error.syntax else f"what it says {error}") from None
    choices = at(body, "choices")
    if not isinstance(choices, list) or not choices:
        problem = at(body, "error")
        raise BadReplyError(f"no choices ({problem})" if problem else "no choices")
    if not all(isinstance(at(choice, "message"), dict) for choice in choices):
        raise BadReplyError("a choice without a message")
    told = (at(body, "usage", key, expected=int) for key in ("prompt_tokens", "completion_tokens"))
    counts = [n for n in told if n is not None and 0 <= n <= MOST_TOKENS]
    counted = len(counts) == 2
    return Reply(
        texts=tuple(at(choice, "message", "content", expected=str) or "" for choice in choices),
        positions=_positions(choices[0]),
        cut=choices[0].get("finish_reason") == "length",
        tokens_in=counts[0] if counted else 0,
        tokens_out=counts[1] if counted else 0,
        counted=counted,
    )


def _positions(choice: dict[str, Any]) -> tuple[dict[str, Any], ...] | None:
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    if not isinstance(content, list) or not all(isinstance(position, dict) for position in content):
        return None
    return tuple(content) if any(position.get("top_logprobs") for position in content) else None


@dataclass(frozen=True, slots=True)
class Reading:
    """What log-probabilities say of a question's answers."""

    probabilities: tuple[float, ...]  # one per answer, not renormalised; 0 for one that is not listed
    unlisted: float  # probability that an answer has at most which is not listed; 0 where all are
    sharpened: bool  # a distribution without a second candidate: no model's own


def whole_tokens(positions: Sequence[dict[str, Any]], answers: Sequence[str]) -> set[str]:
    """Answers that are listed as single tokens: the model's tokenizer has them, so none of them is ever split.

    Raises:
        BadReplyError: as `read_probabilities`.
    """
    listed = {_bare(token) for position in positions for token, _ in _candidates(position)}
    return listed & set(answers)


def read_probabilities(
    positions: Sequence[dict[str, Any]],
    answers: Sequence[str],
    prefix: str = "",
    *,
    asks_for: str = "",
    cut: bool = False,
    whole: Collection[str] = (),
) -> Reading:
    """Probability that each answer is the next token but for white space, quotes and brackets.

    It is read where the reply gets to the point. That is at the first token that is more than those, or where an
    answer is likelier than they are, whatever was sampled; or, if that token is a word, where the answer stands in a
    verdict that the words lead to ("The better response is 2"), whichever has more probability on the answers. In
    "Response 1 is better" no place has the verdict's probability: the 1 could as well go on to "is worse".
    Tokens such as "1" and " 1" are one answer. An answer of several tokens is found where another one begins it, as
    "1" does "10": what follows the token that was sampled divides its probability among the two.

    Args:
        prefix, asks_for, cut: as `parse_verdict` has them.
        whole: answers known to be single tokens of this model, by `whole_tokens` of this reply or another one.

    Raises:
        BadReplyError: the log-probabilities are none.
    """
    assert len(set(answers)) == len(answers) > 0
    reading = _Place((0.0,) * len(answers), [], "")
    for index, position in enumerate(positions):
        reading = _place(positions, index, tuple(answers), whole)
        nothing = math.fsum(p for token, p in reading.candidates if not _bare(token))
        if _bare(str(position.get("token", ""))) or reading.mass >= nothing:
            break
    opening = sorted((p for _, p in reading.candidates), reverse=True) or [0.0]
    if _bare(reading.sampled) not in ("", _NO_TEXT, *answers):
        stated = _stated_place(positions, tuple(answers), prefix, asks_for, cut, whole)
        if stated is not None and stated.mass > reading.mass:
            reading = stated
    listed = sorted((p for _, p in reading.candidates), reverse=True) or [0.0]
    # The sampled token may be in the list for that alone: others as likely as it need not be.
    least = min((p for token, p in reading.candidates if token != reading.sampled), default=listed[0])
    return Reading(
        reading.found,
        unlisted=reading.unsure + (0.0 if all(reading.found) else max(0.0, min(least, 1.0 - math.fsum(listed)))),
        sharpened=opening[0] >= 1.0 - 1e-9 and not any(opening[1:]),
    )


@dataclass(frozen=True, slots=True)
class _Place:
    """What a position says."""

    found: tuple[float, ...]  # probability of each answer there
    candidates: list[tuple[str, float]]
    sampled: str
    unsure: float = 0.0  # probability of tokens that are an answer or begin another one: nobody knows which

    @property
    def mass(self) -> float:
        return math.fsum([*self.found, self.unsure])


def _place(positions: Sequence[dict[str, Any]], index: int, names: Sequence[str], whole: Collection[str]) -> _Place:
    """A position, whose answers go by `names`.

    Where "10" takes two tokens, a token "1" is the answer "1" or the beginning of "10" (see answers.py):

        P("10") = P("1") P("0" | "1")        P("1") (1 - P(another digit | "1"))

    What follows is known of the token that was sampled. Of the others it is not: they are neither answer.
    """
    candidates = _candidates(positions[index])
    sampled = str(positions[index].get("token", ""))
    following = _candidates(positions[index + 1]) if index + 1 < len(positions) else []
    found: dict[str, list[float]] = {name: [] for name in names}
    unsure = []
    for token, p in candidates:
        name = _bare(token)
        if name not in found:
            continue
        longer = [other for other in names if other != name and other.startswith(name) and other not in whole]
        if not longer or not token.endswith(name):  # "1)" has ended
            found[name].append(p)
        elif token != sampled or not following:
            unsure.append(p)
        else:
            goes_on = 0.0
            for more, p_more in following:
                if _bare(token + more) in longer:
                    found[_bare(token + more)].append(p * p_more)
                if _bare(token + more) in longer or more[:1].isdigit():
                    goes_on += p_more
            found[name].append(p * max(0.0, 1.0 - goes_on))
            # What is not listed there may be the longer answer's rest.
            rest = min(min(p_more for _, p_more in following), max(0.0, 1.0 - math.fsum(q for _, q in following)))
            unsure += [p * rest] * (not any(_bare(token + more) in longer for more, _ in following))
    return _Place(tuple(math.fsum(found[name]) for name in names), candidates, sampled, math.fsum(unsure))


def _stated_place(
    positions: Sequence[dict[str, Any]],
    answers: tuple[str, ...],
    prefix: str,
    asks_for: str,
    cut: bool,
    whole: Collection[str],
) -> _Place | None:
    """The position at which the reply's words first state their verdict; None when they state none."""
    tokens = [str(position.get("token", "")) for position in positions]
    text = "".join(tokens).translate(_BLANKS)
    verdict = parse_verdict(text, answers, prefix, asks_for=asks_for, cut=cut)
    if verdict is None or not verdict.stated:
        return None
    begin, end = verdict.stated[0]
    names = ("A", "B") if text[begin:end] in ("A", "B") else answers
    ends = itertools.accumulate(map(len, tokens))
    return _place(positions, next(k for k, stop in enumerate(ends) if stop > begin), names, whole)


def _candidates(position: dict[str, Any]) -> list[tuple[str, float]]:
    """Text and probability of the likeliest tokens at a position."""
    candidates = []
    listed = position.get("top_logprobs") or ()
    if not isinstance(listed, list | tuple) or not all(isinstance(candidate, dict) for candidate in listed):
        raise BadReplyError("log-probabilities that are no list of tokens")
    for candidate in listed:
        token, logprob = candidate.get("token"), candidate.get("logprob")
        # A bool is an int to Python, and false would be certainty.
        if not isinstance(token, str) or type(logprob) not in (int, float) or math.isnan(logprob):
            raise BadReplyError("a log-probability that is no number")
        candidates.append((token, math.exp(max(-1e4, min(logprob, 1.0)))))
    if math.fsum(p for _, p in candidates) > 1.01:
        raise BadReplyError("log-probabilities of more than 1 in all")
    return candidates


def _bare(token: str) -> str:
    """What a token says; "" when that is nothing."""
    # No text at all is half a character or the reply's end, not white space.
    return token.strip(_AROUND) if token else _NO_TEXT
