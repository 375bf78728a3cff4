"""Thoughts of reasoning models: what they write between an opening and a closing tag before they answer.

Models differ in the tag, and in who writes it: some begin with it themselves (Qwen3), for others the chat template's
generation prompt ends with it (DeepSeek-R1, QwQ). GPT-OSS writes its thoughts into channels of their own, and
the answer into another one: `<|channel|>final<|message|>`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

OPEN_THOUGHT = "open_thought"  # why a response can't be judged whose thought does not end

_NAME = r"(?i:(?:\w+:)?(?:think|thinking|thought|thoughts|reasoning))"
_OPENING = re.compile(
    rf"<{_NAME}>|\[(?:THINK|THINKING)\]|◁think▷|<\|(?:START_THINKING|begin_of_thought|begin_of_thinking)\|>"
)
_CLOSING = re.compile(
    rf"</{_NAME}>|\[/(?:THINK|THINKING)\]|◁/think▷|<\|(?:END_THINKING|end_of_thought|end_of_thinking)\|>"
)
_ALONE = re.compile(rf"(?m)^[ \t]*(?:{_CLOSING.pattern})[ \t]*\r?\n")  # a closing tag with a line of its own
_TO_CLOSING = (("<|START_", "<|END_"), ("<|begin_of_", "<|end_of_"), ("<", "</"), ("[", "[/"), ("◁", "◁/"))

CHANNEL = "<|channel|>"
_CHANNEL_TOKENS = (CHANNEL, "<|message|>", "<|start|>", "<|end|>", "<|constrain|>")
_FINAL = re.compile(r"<\|channel\|>\s*final\b[^<]*(?:<\|constrain\|>[^<]*)?<\|message\|>")
_CHANNEL_TOKEN = re.compile(f"({'|'.join(map(re.escape, _CHANNEL_TOKENS))})")


def closing_of(opening: str) -> str:
    """The tag that ends what `opening` begins: </think> for <think>."""
    begins, ends = next(pair for pair in _TO_CLOSING if opening.startswith(pair[0]))
    return ends + opening.removeprefix(begins)


def _opening_of(closing: str) -> str:
    """The tag that begins what `closing` ends."""
    begins, ends = next(pair for pair in _TO_CLOSING if closing.startswith(pair[1]))
    return begins + closing.removeprefix(ends)


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


def known_tags(tokenizer: Any, source: str) -> tuple[str, ...]:
    """How thoughts begin that a model writes, in the exact form that its chat template `source`, or its tokenizer's
    list of added tokens, has: ("<think>",). CHANNEL is one of them where the model has channels."""
    added = {str(token) for token in getattr(tokenizer, "added_tokens_decoder", {}).values()}
    opened = {match[0] for match in _OPENING.finditer(source)} | {tag for tag in added if _OPENING.fullmatch(tag)}
    ended = {match[0] for match in _CLOSING.finditer(source)} | {tag for tag in added if _CLOSING.fullmatch(tag)}
    channels = [CHANNEL] if CHANNEL in added and "<|message|>" in added else []
    return tuple(sorted({*opened, *map(_opening_of, ended), *channels}))


def thought_tokens(tokenizer: Any) -> dict[int, str]:
    """Tags of thoughts that are special tokens of this tokenizer, which decoding leaves out with all others; of one
    with channels, the tokens that tell these apart."""
    added = getattr(tokenizer, "added_tokens_decoder", {}).items()
    special = {index: str(token) for index, token in added if token.special}
    names = {*special.values()}
    channels = _CHANNEL_TOKENS if CHANNEL in names and "<|message|>" in names else ()
    return {
        index: tag
        for index, tag in special.items()
        if _OPENING.fullmatch(tag) or _CLOSING.fullmatch(tag) or tag in channels
    }


def written_text(tokenizer: Any, tokens: Sequence[int], tags: Mapping[int, str]) -> str:
    """What a model wrote, without special tokens but for `tags`, its thought_tokens."""
    pieces: list[str] = []
    start = 0
    for place in (place for place, token in enumerate(tokens) if token in tags):
        pieces += [tokenizer.decode(list(tokens[start:place]), skip_special_tokens=True), tags[tokens[place]]]
        start = place + 1
    return "".join([*pieces, tokenizer.decode(list(tokens[start:]), skip_special_tokens=True)])


def in_channels(text: str) -> bool:
    """Whether a response begins with the name of a channel."""
    return text.lstrip().startswith(CHANNEL)


def marks_and_texts(text: str) -> list[str]:
    """A response in channels: text, mark, text, ..., text, with the marks up to where its answer begins. What looks
    like one in the answer is part of it."""
    final = _FINAL.search(text)
    end = final.end() if final else len(text)
    *pieces, last = _CHANNEL_TOKEN.split(text[:end])
    return [*pieces, last + text[end:]]


def answer_of(text: str, known: Collection[str] | None = None) -> str | None:
    """A response without the thought that it begins with; None where the thought does not end: there is no answer.

    A thought begins with its tag, the first of the text. In channels it is all that stands before the first `final`.

    Args:
        known: how thoughts begin that the response's own model knows (`known_tags`). It has written the whole text, so
            that a closing tag which nothing opened is part of its answer, as is a tag that its template does not know:
            else a policy could hide from its judge what it says before one. None: nobody knows who wrote the text. Any
            tag may open a thought, and programs that leave out the tag of the generation prompt have written all that
            stands before a closing tag, if nothing opened it and it has a line of its own.
    """
    if in_channels(text) and (known is None or CHANNEL in known):
        final = _FINAL.search(text)  # the first: what a model says in it and after it is all read
        return text[final.end() :].removesuffix("<|end|>").strip() if final else None
    tag = opening_tag(text)
    if tag and (known is None or tag in known):
        _, end, answer = text.partition(closing_of(tag))
        return answer.strip() if end else None
    found = _ALONE.search(text) if known is None else None
    if found and not _OPENING.search(text, 0, found.start()):
        return text[found.end() :].strip()
    return text
