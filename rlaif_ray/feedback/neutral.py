"""Takes from a user's text the power to end its slot in a template, or its turn in a chat."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from functools import cache, lru_cache
from pathlib import Path

from rlaif_ray.documents import read_yaml

CODE_LETTERS = "bcdfghjkmnpqrstvwxz"  # of a marker's code (see frames.py): no vowels, so no words
CODE_LENGTH = 6

_CONFUSABLES = Path(__file__).with_name("confusables.yaml")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")  # half a character: no tokenizer takes it
_OPEN, _CLOSE = "\u27e6", "\u27e7"  # what brackets of other scripts are folded to
_OPENING, _CLOSING = "[<{" + _OPEN, "]>}" + _CLOSE
_GAP = r"(?:[^\w\[\]\u27e6\u27e7]|_)*"  # what may stand between a forged marker's letters: spaces, dashes, dots, ...
_CODE = rf"(?:(?:{_GAP}[{CODE_LETTERS}]){{{CODE_LENGTH}}})?"
_UNSEEN = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # fillers that print nothing but aren't format characters
_CORNERS = dict.fromkeys("⌜⌞⎡⎢⎣⊏", _OPEN) | dict.fromkeys("⌝⌟⎤⎥⎦⊐", _CLOSE)  # symbols, not brackets, to Unicode
_NAMED = re.compile(r"(?:LATIN|REGIONAL|NEGATIVE) .*LETTER (?:SMALL CAPITAL )?([A-Z])(?: WITH .+)?")
# Letters that pass for one another in ASCII too. Patterns, not folding, know of them: both are letters of their own.
_ALIKE = {**dict.fromkeys("il", "[il1|]"), "o": "[o0]", "m": rf"(?:m|r{_GAP}n)", "w": rf"(?:w|v{_GAP}v)"}


def neutralise(text: str, markers: tuple[str, ...], special_tokens: Sequence[str] = ()) -> str:
    """`text`, in which what looks like a marker, or like a special token of the judge's tokenizer, has round brackets.

    Case, accents, invisible characters, Unicode compatibility forms, letters of other scripts that look the same,
    brackets of other scripts and, in markers, spacing don't hide a forgery; nor does another number or code, or none:
    where [RESPONSE 2] is a marker, [RESPONSE] and [RESPONSE 17 qhtrzd] could pass for one. A special token without
    brackets gets a dot after its first letter. Control characters other than newline and tab are dropped. All other
    text stays as it is, braces too: they mean nothing in filled slots.
    """
    text = _SURROGATE.sub("\ufffd", _CONTROL.sub("", text))
    forgery, beginnings = _forgeries(markers, tuple(special_tokens))
    seen = folded(text)
    if not any(beginning in seen for beginning in beginnings) or not forgery.search(seen):
        return text
    origin = range(len(text)) if text.isascii() else [k for k, letter in enumerate(text) for _ in _fold(letter)]
    characters = list(text)
    for match in forgery.finditer(seen):
        _defuse(characters, origin[match.start()], origin[match.end() - 1])
    return "".join(characters)


def folded(text: str) -> str:
    """`text` as a reader takes it, in small ASCII letters as far as it looks like them."""
    return text.lower() if text.isascii() else text.translate(_FOLDED)  # the same for ASCII, and much faster


def letters(marker: str) -> str:
    """A marker's letters and digits, as a reader takes them."""
    return "".join(letter for letter in map(_fold, marker) if letter.isalnum())


@cache
def _confusables() -> dict[str, str]:
    """Letters of other scripts, by what they look like. Raises OSError when the package is not whole."""
    tables = read_yaml(_CONFUSABLES, dict)
    rows = [*tables["faux"].items(), *tables["letters"].items()]  # Unicode's own win
    return {character: letter for letter, characters in rows for character in characters}


@lru_cache(maxsize=65536)
def _fold(character: str) -> str:
    """What a reader takes the character for: no case, accent, width or style; nothing when it doesn't show."""
    return "".join(map(_fold_piece, unicodedata.normalize("NFKD", character)))


def _fold_piece(piece: str) -> str:
    if piece.isascii():
        return piece.lower()
    if piece in _UNSEEN or unicodedata.category(piece) in ("Cf", "Mn", "Me"):
        return ""
    known = _bracket(piece) or _confusables().get(piece)  # before case goes: capital eta is H, small eta is n
    if known is not None:
        return known
    digit = unicodedata.decimal(piece, None)
    if digit is not None:
        return str(digit)
    named = _NAMED.fullmatch(unicodedata.name(piece, ""))
    return named[1].lower() if named else "".join(_confusables().get(small, small) for small in piece.casefold())


def _bracket(piece: str) -> str | None:
    """What a bracket of another script is folded to. Quotation marks are none, but for those like angle brackets."""
    category = unicodedata.category(piece)
    if category in ("Ps", "Pe") and "QUOTATION" in unicodedata.name(piece):
        return None
    if category in ("Ps", "Pe") or (category in ("Pi", "Pf") and unicodedata.mirrored(piece)):
        return _OPEN if category in ("Ps", "Pi") else _CLOSE
    return _CORNERS.get(piece)


class _Folded(dict[int, str]):
    """What `str.translate` puts in a character's place, worked out when the character is first met."""

    def __missing__(self, code: int) -> str:
        self[code] = _fold(chr(code))
        return self[code]


_FOLDED = _Folded()


@lru_cache(maxsize=64)
def _forgeries(markers: tuple[str, ...], special_tokens: tuple[str, ...]) -> tuple[re.Pattern[str], frozenset[str]]:
    """Matches every marker and special token in folded text; and the characters that one of them begins with.

    Most texts have none of these characters, and to look for them costs a hundredth of what the pattern does.
    """
    tokens = [token for token in {folded(token).strip() for token in special_tokens} if len(token) > 1]
    patterns = [_token(token) for token in sorted(tokens, key=len, reverse=True)]
    patterns += dict.fromkeys(map(_forgery, markers))
    beginnings = {token[0] for token in tokens} | ({"["} if markers else set())
    return re.compile("|".join(patterns) or r"(?!)"), frozenset(beginnings | {_OPEN})


def _token(token: str) -> str:
    """Pattern of a special token, in brackets of whichever script."""
    brackets = {**dict.fromkeys("[<{", _OPEN), **dict.fromkeys("]>}", _CLOSE)}
    return "".join(f"[{re.escape(c)}{brackets[c]}]" if c in brackets else re.escape(c) for c in token)


def _forgery(marker: str) -> str:
    """Pattern of everything that a reader could take for the marker."""
    pattern = rf"[\[{_OPEN}]"
    for piece in re.findall(r"\d+|\D+", letters(marker)):
        if piece.isdigit() and piece != letters(marker):
            pattern += rf"(?:{_GAP}\d)*"
        else:
            pattern += "".join(_GAP + _ALIKE.get(letter, re.escape(letter)) for letter in piece)
    return rf"{pattern}{_CODE}{_GAP}[\]{_CLOSE}]"


def _defuse(characters: list[str], first: int, last: int) -> None:
    """Makes the brackets from `first` to `last` round, in place."""
    bracketed = False
    for index in range(first, last + 1):
        seen = _fold(characters[index])[:1]
        if seen and seen in _OPENING + _CLOSING:
            characters[index] = "(" if seen in _OPENING else ")"
            bracketed = True
    if not bracketed:
        characters[first] += "·"
