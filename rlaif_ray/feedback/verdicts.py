"""Reads the answer that a judge gives in words: "[[A]]", "Verdict: 2", "Response 1 is better", "8/10". Pure.

The usual forms are read wherever they stand, and all that a text says must agree. What is a tie, a refusal, a
contradiction, negated, in doubt, cut off or in a thought without an end is no answer: it is never guessed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

# ---- Words -----------------------------------------------------------------------------------------------------------

_THOUGHT = r"(?:think|thinking|thoughts?|reasoning|reflection|scratchpad)"
_OPENED = re.compile(rf"<{_THOUGHT}>|\[THINK\]", re.IGNORECASE)
_CLOSED = re.compile(rf".*(?:</{_THOUGHT}>|\[/THINK\])", re.IGNORECASE | re.DOTALL)

_NOUN = r"(?:answer|response|choice|option|summary|reply|number|assistant|candidate|text|completion|output)"
_NEUTRAL = r"(?:verdict|answer|choice|decision|judge?ment|conclusion|selection|pick|vote|rating|score|grade|result)"
_POSITIVE = {
    "better": r"(?:better|best|preferred|preferable|superior|stronger|winning|favou?red|"
    r"(?:more|most) (?:useful|helpful|harmless|honest|truthful|faithful|accurate|appropriate|ethical))",
    "worse": r"(?:worse|worst|(?:more|most) harmful|inferior|weaker)",
}
_LABEL = {
    "better": rf"(?:{_NEUTRAL}|preference|winner|{_POSITIVE['better']}(?:\s+(?:{_NOUN}|one))?)",
    "worse": rf"(?:{_NEUTRAL}|{_POSITIVE['worse']}(?:\s+(?:{_NOUN}|one))?)",
}
_ADVERB = (
    r"(?:(?:clearly|definitely|slightly|much|overall|still|the|far|significantly|marginally|thus|therefore|somewhat|"
    r"generally|just|a|bit|little|lot|simply|by|considerably|indeed|in|my|opinion|view)\s+)*"
)
# Quantifiers that give nothing back (*+, ++) keep a long text from taking long.
_OPENER = r"[\s\"'`“”‘’*_#$(\[{<]*+"
_CLOSER = r"[\"'`“”‘’*_$)\]}>]*"
_IS = r"(?:is|was|would\s+be|goes\s+to|=|:|->|→|--?|–|—)"
_REASON = r"\s*(?:because|since|as|for|due|over|here|overall)\b|\s+[-–—(]|[—–]"
_DONE = rf"{_CLOSER}(?=\s*$|\s*\n|[.!;,:](?:\s|{_CLOSER}(?:\s|$))|{_REASON}|</)"

_DOUBT = re.compile(
    r"\b(?:not|never|nor|neither|if|whether|unless|might|may|could|perhaps|maybe|possibly|unclear|doubt|"
    r"cannot|arguably|hardly|without)\b|n['’]t\b",
    re.IGNORECASE,
)
_NEGATED = re.compile(r"(?:\b(?:not|never|nor|neither|cannot)|n['’]t)\s+(?:\w+\s+){0,3}\W*$", re.IGNORECASE)
_TIE = re.compile(
    r"\b(?:it(?:['’]s| is) a (?:tie|draw)|(?:verdict|answer|winner|result)\W+(?:is\W+)?(?:a\W+)?"
    r"(?:tie|draw|both|neither)|"
    r"equally (?:good|bad|well|helpful|useful|harmful|harmless|strong)|(?:are|is) (?:both )?(?:equal|tied)|"
    r"neither (?:\w+ )?(?:is|one)\b|no (?:preference|difference|winner)|both (?:are )?(?:better|best))\b",
    re.IGNORECASE,
)
_BOTH = re.compile(r"\b(?:both|tie|tied|draw|equal|equally|neither|either)\b", re.IGNORECASE)
_REFUSAL = re.compile(
    r"\bas an ai\b|\bI(?:['’]m| am)?\s+(?:sorry\b|(?:not able|unable) to\b|(?:must\s+)?(?:decline|refuse)\b|"
    r"(?:can(?:no|['’])t|can not|won['’]t|will not|would rather not|could(?: not|n['’]t))\s+"
    r"(?:\w+ly\s+)?(?:help|assist|answer|choose|decide|determine|compare|judge|say|tell|provide|comply|evaluate|rate|"
    r"score|do|fulfil|make|pick|select|give))",
    re.IGNORECASE,
)

LONGEST_TEXT, LONGEST_ANSWER = 1_000_000, 50_000  # characters: with its thoughts, and behind them; more is no answer
LONGEST_SENTENCE = 500  # characters that are looked at around an answer

# Of an answer at the very beginning.
_LEAD = rf"(?:the|my|final|{_NOUN}|is)\b"
_NAMING = re.compile(rf"{_NOUN}[^\w:=]*$", re.IGNORECASE)  # "Response 1", not "Response: 1"
_JOINED = r"(?:(?:or|and|vs|versus|to|maybe|perhaps|possibly|even)\b[\W_]*)*"
_VERB = r"(?:is|isn|was|does|doesn|has|seems|would|of)\b"


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a text answers."""

    answer: str
    stated: tuple[tuple[int, int], ...]  # where it is stated outright, begin and end in the text; () for "1 is better"


def parse_verdict(
    text: str, answers: Sequence[str], prefix: str = "", *, asks_for: str = "", cut: bool = False
) -> Verdict | None:
    """The answer that a text gives; None when it does not clearly give one.

    Args:
        prefix: how the question would have its answer begin; the text may say it.
        asks_for: "better" or "worse": what "1 is better" answers, and "1 is worse".
        cut: the text ended at a limit, so its last word may not be the last.
    """
    if len(text) > LONGEST_TEXT:
        return None
    thought = _CLOSED.match(text)
    if thought is not None:
        text = " " * thought.end() + text[thought.end() :]  # places stay what they are
    if len(text) - (thought.end() if thought is not None else 0) > LONGEST_ANSWER:
        return None
    if _OPENED.search(text) or _REFUSAL.search(text):
        return None
    alone = text.strip()
    if cut and alone in answers and not any(a != alone and a.startswith(alone) for a in answers):
        return Verdict(alone, ())  # all that there was room for
    words = _words(tuple(answers), prefix, asks_for or "better")
    found = [*_opening(text, words, cut), *_stated(text, words), *_claimed(text, words)]
    found = [one for one in found if not (cut and not text[one.end :].strip("\"'`*_)]}> \n"))]
    ties = [match.start() for match in _TIE.finditer(text)]
    if ties and not any(one.stated and one.begin > ties[-1] for one in found):
        return None  # a tie is taken back by nothing but a verdict
    said = {one.answer for one in found}
    if len(said) != 1 or None in said or said & set(_opposed(text, words)):
        return None
    (answer,) = said
    assert answer is not None
    return Verdict(answer, tuple(sorted((one.begin, one.end) for one in found if one.stated)))


def parse_answer(text: str, answers: Sequence[str], prefix: str = "") -> str | None:
    """`parse_verdict` without the place."""
    verdict = parse_verdict(text, answers, prefix)
    return None if verdict is None else verdict.answer


# ---- Forms -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Found:
    """An answer at its place; None when a form that holds an answer holds something else."""

    answer: str | None
    begin: int
    end: int
    stated: bool = True


@dataclass(frozen=True, slots=True)
class _Words:
    """The patterns of a kind of question."""

    opening: re.Pattern[str]
    closed: re.Pattern[str]  # in brackets or tags that only a verdict stands in
    stated: tuple[re.Pattern[str], ...]
    claimed: tuple[re.Pattern[str], ...]
    opposed: tuple[re.Pattern[str], ...]
    joined: re.Pattern[str]  # another answer right behind one
    other_line: re.Pattern[str]  # a line that begins with an answer: an enumeration
    names: dict[str, str]  # what an answer can be called, in small letters


def _one_of(texts: Sequence[str]) -> str:
    return "|".join(re.escape(text) for text in sorted(texts, key=len, reverse=True))


@lru_cache(maxsize=64)
def _words(answers: tuple[str, ...], prefix: str, asks_for: str) -> _Words:
    pair = answers in (("1", "2"), ("2", "1"))
    names = {answer.lower(): answer for answer in answers}
    if pair:
        names |= {"a": "1", "b": "2", "first": "1", "second": "2"}
    out_of = "" if pair else rf"(?:\s*(?:/|out\s+of)\s*{re.escape(answers[-1])}(?!\w))?"
    # A letter must be a capital one: "a" is an article.
    more = r"[.,:-]\d|/\s*\d" if pair else rf"[.,:-]\d|/(?!\s*{re.escape(answers[-1])}(?!\w))"
    plain = rf"(?<![\w.,/-])(?P<answer>{_one_of(answers)}{'|(?-i:[AB])' if pair else ''})(?![\w%]|{more}|['’]s\b)"
    ordinal = rf"(?:the\s+)?(?P<ordinal>first|second)(?:\s+(?:{_NOUN}|one))?\b"
    called = rf"(?:(?:the\s+)?(?:{_NOUN}\s+)?{_OPENER}(?:\\?(?:boxed|text)\{{\s*)?(?:{_NOUN}\s+)?{plain}{out_of})"
    called = rf"(?:{called}|{ordinal})" if pair else called
    own = r"[\W_]+".join(map(re.escape, re.findall(r"[^\W_]+", prefix)))
    label = rf"(?:{own}|{_LABEL[asks_for]})" if own else _LABEL[asks_for]
    stated = [
        rf"\b{label}{_CLOSER}(?:\s*{_IS}{_CLOSER})++\s*+{called}{_DONE}",
        rf"\b{label}{_CLOSER}[^\S\n]*\n\s*+{called}{_DONE}",
    ]
    verbs = "choose|chose|pick|select|vote\\s+for|go\\s+with" + ("|prefer|favou?r|recommend" * (asks_for == "better"))
    would = r"(?:['’]d|['’]ll|\s+(?:would|will|do|must|have\s+to|strongly|clearly|slightly))*"
    chosen = rf"(?:\b(?:I|we)\b{would}\s*+|^[^\S\n]*)(?:{verbs})"
    claimed, opposed = [], []
    if pair:
        stated.append(rf"{chosen}\s+{called}{_DONE}")
        named = rf"(?:{plain}|{ordinal})"
        against = _POSITIVE["worse" if asks_for == "better" else "better"]
        good = (
            rf"(?:{_POSITIVE[asks_for]}(?:\s+(?:{_NOUN}|one))?|{'winner' if asks_for == 'better' else 'more harmful'})"
        )
        than = (
            rf"(?:\s+than\s+(?:the\s+)?(?:{_NOUN}\s+)?(?:[12]|(?-i:[AB])|other(?:\s+(?:{_NOUN}|one))?|first|second))?"
        )
        being = r"(?:\s+(?:is|was|seems|appears|would\s+be)(?:\s+to\s+be)?|['’]s)"
        claimed.append(rf"{named}{_CLOSER}{being}\s+{_ADVERB}{_CLOSER}{good}{than}{_DONE}")
        claimed.append(
            rf"{named}{_CLOSER}\s+{'wins' if asks_for == 'better' else '(?:does|causes) more harm'}{than}{_DONE}"
        )
        opposed.append(rf"{named}{_CLOSER}{being}\s+{_ADVERB}{against}\b")
        opposed.append(
            rf"{named}{_CLOSER}\s+(?:(?:is|was|does|would|seems|should|can)(?:n['’]t|\s+not|\s+never|\s+hardly)|cannot|loses)\b"
        )
    else:
        stated.append(rf"\b(?:rate|score|grade|give)\b(?:\s+\w+){{0,4}}?\s+{called}{_DONE}")
    spoken = rf"(?:(?i:{own})\b[\W_]*)?" if own else ""
    return _Words(
        opening=re.compile(
            rf"[\W_]*{spoken}(?P<lead>(?:(?i:{_LEAD})[\W_]*)*)(?P<answer>{_one_of(answers)}{'|[AB]' if pair else ''})"
            rf"(?![^\W_]){out_of}"
        ),
        closed=re.compile(
            rf"\[\[\s*(?:{_NOUN}\s+)?(?P<in1>\w{{1,8}})\s*\]\]|\\boxed\s*\{{\s*(?:\\text\s*\{{)?\s*(?:{_NOUN}\s+)?(?P<in2>\w{{1,8}})\s*\}}+|"
            rf"<(?P<tag>{_NEUTRAL}|preferred|preference|winner)>\s*(?:{_NOUN}\s+)?(?P<in3>\w{{1,8}})\s*</(?P=tag)>",
            re.IGNORECASE,
        ),
        stated=tuple(re.compile(pattern, re.IGNORECASE | re.MULTILINE) for pattern in stated),
        claimed=tuple(re.compile(pattern, re.IGNORECASE) for pattern in claimed),
        opposed=tuple(re.compile(pattern, re.IGNORECASE) for pattern in opposed),
        joined=re.compile(
            rf"[\W_]*{_JOINED}({_one_of(answers)}{'|(?-i:[AB])' if pair else ''})(?![^\W_])", re.IGNORECASE
        ),
        other_line=re.compile(rf"^[ \t*#]*({_one_of(answers)})(?=[.):*\s]|$)", re.MULTILINE),
        names=names,
    )


def _opening(text: str, words: _Words, cut: bool) -> Iterator[_Found]:
    """An answer that the text begins with, behind punctuation, the prefix's words or "The answer is".

    "1.5" and "1 or 2" are not the answer "1"; nor is "1 is worse" or "Response 1 fails", which talk about what they
    name; nor the first point of a list.
    """
    match = words.opening.match(text)
    if match is None:
        return
    said, rest = words.names[match["answer"].lower()], text[match.end() :]
    if match["answer"].isalpha() and not re.match(rf"{_CLOSER}(?:\s*$|\s*\n|[.:,)]\s)", f"{rest}\n"):
        return  # a word, such as the article in "A better answer"
    if re.match(r"[^\w\s]\d|\s*[-–/]\s*\d|%", rest) or text[: match.start("answer")].endswith(("-", "−")):
        # Part of a larger number, of a range, or negative.
        return
    other = words.joined.match(rest)
    if other is not None and words.names[other[1].lower()] != said:
        return
    talk = r"\w" if _NAMING.search(match["lead"]) else _VERB
    if re.match(rf"{_CLOSER}[^\S\n]+{talk}", rest, re.IGNORECASE):
        return
    lines = {words.names[line] for line in words.other_line.findall(rest)}
    listed = re.match(r"[.)]\s+\S", rest) is not None
    if (lines - {said} and listed) or (cut and listed):
        return
    yield _Found(said, match.start("answer"), match.end("answer"))


def _stated(text: str, words: _Words) -> Iterator[_Found]:
    """Verdicts in brackets of their own, and behind a label."""
    for match in words.closed.finditer(text):
        group = next(name for name in ("in1", "in2", "in3") if match[name] is not None)
        before, _ = _sentence(text, match.start(), match.end())
        if not _NEGATED.search(before) and not _BOTH.search(before):
            begin, end = match.span(group)
            yield _Found(words.names.get(match[group].lower()), begin, end)
    for pattern in words.stated:
        yield from _matches(pattern, text, words, stated=True)


def _claimed(text: str, words: _Words) -> Iterator[_Found]:
    for pattern in words.claimed:
        yield from _matches(pattern, text, words, stated=False)


def _opposed(text: str, words: _Words) -> Iterator[str]:
    """Answers of which the text says that they are not what was asked for."""
    for pattern in words.opposed:
        for match in pattern.finditer(text):
            yield words.names[(match["answer"] or match["ordinal"]).lower()]


def _matches(pattern: re.Pattern[str], text: str, words: _Words, *, stated: bool) -> Iterator[_Found]:
    for match in pattern.finditer(text):
        groups = match.groupdict()
        group = "answer" if groups["answer"] is not None else "ordinal"
        said = words.names[match[group].lower()]
        before, after = _sentence(text, match.start(), match.end())
        other = words.joined.match(text[match.end() :]) if stated else None
        tie = _BOTH.search(before) or (re.match(rf"\W*{_BOTH.pattern}", after, re.I) if stated else _BOTH.search(after))
        unsure = tie or _DOUBT.search(before) or after.endswith("?")
        contrast = re.match(r"\W*(?:but|however|although|though|yet|while|unless|if)\b", after, re.IGNORECASE)
        if other is not None and words.names[other[1].lower()] != said:
            yield _Found(None, *match.span(group))
        elif not unsure and not (contrast and not stated):
            yield _Found(said, match.start(group), match.end() if not stated else match.end(group), stated)


def _sentence(text: str, begin: int, end: int) -> tuple[str, str]:
    """What stands before and behind a place in its own sentence."""
    before = re.split(r"[.!?;]\s|\n", text[max(0, begin - LONGEST_SENTENCE) : begin])[-1]
    after = re.match(r"[^\n.!?;]*(?:[.!?;](?=\s|$))?", text[end : end + LONGEST_SENTENCE])
    return before, after[0] if after else ""
