"""Thoughts of reasoning models: what they write between an opening and a closing tag before they answer.

Models differ in the tag, and in who writes it: some begin with it themselves (Qwen3), for others the chat template's
generation prompt ends with it (DeepSeek-R1, QwQ).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

OPEN_THOUGHT = "open_thought"  # why a response can't be judged whose thought does not end

_NAME = r"(?i:(?:\w+:)?(?:think|thinking|thought|thoughts|reasoning))"
_OPENING = re.compile(
    rf"<{_NAME}>|\[(?:THINK|THINKING)\]|◁think▷|<\|(?:START_THINKING|begin_of_thought|begin_of_thinking)\|>"
)
_CLOSING = re.compile(
    rf"</{_NAME}>|\[/(?:THINK|THINKING)\]|◁/think▷|<\|(?:END_THINKING|end_of_thought|end_of_thinking)\|>"
)
_TO_CLOSING = (("<|START_", "<|END_"), ("<|begin_of_", "<|end_of_"), ("<", "</"), ("[", "[/"), ("◁", "◁/"))


def closing_of(opening: str) -> str:
    """The tag that ends what `opening` begins: </think> for <think>."""
    begins, ends = next(pair for pair in _TO_CLOSING if opening.startswith(pair[0]))
    return ends + opening.removeprefix(begins)


def opening_tag(text: str) -> str:
    """The opening tag that `text` begins with, after white space; "" without one."""
    found = _OPENING.match(text.lstrip())
    return found[0] if found else ""


def open_thought(text: str) -> str:
    """The end of `text` from where a thought begins that it does not end, such as "<think>\\n"; "" without one."""
    found = list(_OPENING.finditer(text))
    if not found or closing_of(found[-1][0]) in text[found[-1].end() :]:
        return ""
    return text[found[-1].start() :]


def closed(thought: str) -> str:
    """What ends an open thought in which nothing was thought, with as much white space as after its opening tag.

    "<think>\\n" gives "\\n</think>\\n\\n": the empty thought of Qwen3's and DeepSeek-R1's templates.
    """
    tag = opening_tag(thought)
    rest = thought.lstrip().removeprefix(tag)
    space = rest[: len(rest) - len(rest.lstrip())]
    return f"{space}{closing_of(tag)}{space * 2}"


def thought_tokens(tokenizer: Any) -> dict[int, str]:
    """Tags of thoughts that are special tokens of this tokenizer, which decoding leaves out with all others."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    special = {index: str(token) for index, token in added if token.special}
    return {index: tag for index, tag in special.items() if _OPENING.fullmatch(tag) or _CLOSING.fullmatch(tag)}


def written_text(tokenizer: Any, tokens: Sequence[int], tags: Mapping[int, str]) -> str:
    """What a model wrote, without special tokens but for `tags`, its thought_tokens."""
    pieces: list[str] = []
    start = 0
    for place in (place for place, token in enumerate(tokens) if token in tags):
        pieces += [tokenizer.decode(list(tokens[start:place]), skip_special_tokens=True), tags[tokens[place]]]
        start = place + 1
    return "".join([*pieces, tokenizer.decode(list(tokens[start:]), skip_special_tokens=True)])


def answer_of(text: str) -> str | None:
    """A response without the thought that it begins with; None where the thought does not end: there is no answer.

    A thought begins with its tag, or, in texts of other programs that leave the tag of the generation prompt out, is
    all that stands before a closing tag that nothing opened.
    """
    tag = opening_tag(text)
    if tag:
        _, end, answer = text.partition(closing_of(tag))
        return answer.strip() if end else None
    found = _CLOSING.search(text)
    if found and not _OPENING.search(text, 0, found.start()):
        return text[found.end() :].strip()
    return text
