"""Reads a chat completion as a judge's answer: off the log-probabilities of its tokens, or off its words. Pure."""

from __future__ import annotations

import json
import math
import re
import string
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

# What may stand around an answer without being one. Some servers show a token's space as its vocabulary writes it.
_AROUND = string.whitespace + "\u2581\u0120\u010a" + "\"'`“”‘’«»()[]{}*"
_NOUN = r"(?:answer|response|choice|option|summary|reply|number)"
_LEAD = rf"(?:the|my|final|{_NOUN}|is)\b"
_NAMING = re.compile(rf"{_NOUN}[^\w:=]*$", re.IGNORECASE)  # "Response 1", not "Response: 1"
_JOINED = r"(?:(?:or|and|vs|versus|to)\b[\W_]*)?"
_CLOSING = r"[*_`'\"”’)\]}]*"
_VERB = r"(?:is|isn|was|does|doesn|has|seems|would)\b"


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
        body = json.loads(content)
    except (ValueError, RecursionError):
        raise BadReplyError("no JSON") from None
    choices = body.get("choices") if isinstance(body, dict) else None
    if not isinstance(choices, list) or not choices:
        problem = body.get("error") if isinstance(body, dict) else None
        raise BadReplyError(f"no choices ({problem})" if problem else "no choices")
    if not all(isinstance(choice, dict) and isinstance(choice.get("message"), dict) for choice in choices):
        raise BadReplyError("a choice without a message")
    said = [choice["message"].get("content") for choice in choices]
    usage = body["usage"] if isinstance(body.get("usage"), dict) else {}
    counts = [n for key in ("prompt_tokens", "completion_tokens") if type(n := usage.get(key)) is int and n >= 0]
    counted = len(counts) == 2
    return Reply(
        texts=tuple(text if isinstance(text, str) else "" for text in said),
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


def read_probabilities(positions: Sequence[dict[str, Any]], answers: Sequence[str]) -> Reading:
    """Probability that each answer is the next token but for white space, quotes and brackets.

    It is read where the reply gets to the point: at the first token that is more than those, or where an answer is
    likelier than they are, whatever was sampled. Tokens such as "1" and " 1" are one answer. Answers of several
    tokens are not found.

    Raises:
        BadReplyError: the log-probabilities are none.
    """
    assert len(set(answers)) == len(answers) > 0
    found, candidates, sampled = [0.0] * len(answers), list[tuple[str, float]](), ""
    for position in positions:
        candidates, sampled = _candidates(position), str(position.get("token", ""))
        found = [math.fsum(p for token, p in candidates if _bare(token) == answer) for answer in answers]
        nothing = math.fsum(p for token, p in candidates if not _bare(token))
        if _bare(sampled) or math.fsum(found) >= nothing:
            break
    listed = sorted((p for _, p in candidates), reverse=True) or [0.0]
    # The sampled token may be in the list for that alone: others as likely as it need not be.
    least = min((p for token, p in candidates if token != sampled), default=listed[0])
    return Reading(
        tuple(found),
        unlisted=0.0 if all(found) else max(0.0, min(least, 1.0 - math.fsum(listed))),
        sharpened=listed[0] >= 1.0 - 1e-9 and not any(listed[1:]),
    )


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
    return token.strip(_AROUND) if token else "\ufffd"


def parse_answer(text: str, answers: Sequence[str], prefix: str = "") -> str | None:
    """The answer that a text gives; None when it does not clearly give one.

    It must begin with it, behind punctuation, the words of `prefix` (how the question would have its answer begin)
    or words such as "The answer is". "10", "1.5" and "1 or 2" are not the answer "1"; nor is "1 is worse" or
    "Response 1 fails", which talk about what they name.
    """
    text = text.rpartition("</think>")[2]
    match = _spoken(tuple(answers), prefix).match(text)
    if match is None:
        return None
    said, rest = match["answer"], text[match.end() :]
    if re.match(r"[^\w\s]\d", rest):  # part of a larger number
        return None
    other = re.match(rf"[\W_]*{_JOINED}({_one_of(answers)})(?![^\W_])", rest, re.IGNORECASE)
    if other is not None and other[1] != said:
        return None
    talk = r"\w" if _NAMING.search(match["lead"]) else _VERB
    return None if re.match(rf"{_CLOSING}[^\S\n]+{talk}", rest, re.IGNORECASE) else said


def _one_of(answers: Sequence[str]) -> str:
    return "|".join(re.escape(answer) for answer in sorted(answers, key=len, reverse=True))


@lru_cache(maxsize=64)
def _spoken(answers: tuple[str, ...], prefix: str) -> re.Pattern[str]:
    """Matches up to the answer."""
    own = r"[\W_]+".join(map(re.escape, re.findall(r"[^\W_]+", prefix)))
    own = rf"(?:(?i:{own})\b[\W_]*)?" if own else ""
    return re.compile(rf"[\W_]*{own}(?P<lead>(?:(?i:{_LEAD})[\W_]*)*)(?P<answer>{_one_of(answers)})(?![^\W_])")
