"""Takes from a user's text the power to end its slot in a template, or its turn in a chat."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import lru_cache

_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")  # half a character: no tokenizer takes it
_OPENING, _CLOSING = "[<{", "]>}"
_GAP = r"(?:[^\w\[\]]|_)*"  # what may stand between a forged marker's letters: spaces, dashes, dots, ...
_UNSEEN = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # fillers that print nothing but aren't format characters


def neutralise(text: str, markers: tuple[str, ...], special_tokens: Sequence[str] = ()) -> str:
    """`text`, in which what looks like a marker, or like a special token of the judge's tokenizer, has round brackets.

    Case, invisible characters, Unicode compatibility forms and, in markers, spacing don't hide a forgery; nor does
    another number, or none: where [RESPONSE 2] is a marker, [RESPONSE] and [RESPONSE 17] could pass for one. A special
    token without brackets gets a dot after its first letter. Control characters other than newline and tab are
    dropped. All other text stays as it is, braces too: they mean nothing in filled slots.
    """
    text = _SURROGATE.sub("\ufffd", _CONTROL.sub("", text))
    forgery = _forgeries(markers, tuple(special_tokens))
    folded = "".join(map(_fold, text))
    if not forgery.search(folded):
        return text
    origin = [index for index, character in enumerate(text) for _ in _fold(character)]
    characters = list(text)
    for match in forgery.finditer(folded):
        _defuse(characters, origin[match.start()], origin[match.end() - 1])
    return "".join(characters)


def letters(marker: str) -> str:
    """A marker's letters and digits, as a reader takes them."""
    return "".join(letter for letter in map(_fold, marker) if letter.isalnum())


@lru_cache(maxsize=65536)
def _fold(character: str) -> str:
    """What a reader takes the character for: no case, no width, no style; nothing when it doesn't show."""
    return "".join(
        piece
        for piece in unicodedata.normalize("NFKC", character).casefold()
        if unicodedata.category(piece) not in ("Cf", "Mn", "Me") and piece not in _UNSEEN
    )


@lru_cache(maxsize=64)
def _forgeries(markers: tuple[str, ...], special_tokens: tuple[str, ...]) -> re.Pattern[str]:
    """Matches every marker and special token in folded text."""
    tokens = {"".join(map(_fold, token)).strip() for token in special_tokens}
    patterns = [re.escape(token) for token in sorted(tokens, key=len, reverse=True) if len(token) > 1]
    patterns += dict.fromkeys(map(_forgery, markers))
    return re.compile("|".join(patterns) or r"(?!)")


def _forgery(marker: str) -> str:
    """Pattern of everything that a reader could take for the marker."""
    pattern = r"\["
    for piece in re.findall(r"\d+|\D+", letters(marker)):
        if piece.isdigit() and piece != letters(marker):
            pattern += rf"(?:{_GAP}\d)*"
        else:
            pattern += "".join(_GAP + re.escape(letter) for letter in piece)
    return rf"{pattern}{_GAP}\]"


def _defuse(characters: list[str], first: int, last: int) -> None:
    """Makes the brackets from `first` to `last` round, in place."""
    bracketed = False
    for index in range(first, last + 1):
        folded = _fold(characters[index])[:1]
        if folded and folded in _OPENING + _CLOSING:
            characters[index] = "(" if folded in _OPENING else ")"
            bracketed = True
    if not bracketed:
        characters[first] += "·"
