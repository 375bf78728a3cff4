"""Judge templates: a constant part, and the two slots that a user's text may fill but never leave."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any

from rlaif_ray.config.layers import read_file
from rlaif_ray.errors import InputError

SHIPPED = Path(__file__).with_name("templates")
KIND = "score"
SLOTS = ("prompt", "response")

_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_SLOT = re.compile(r"\{(prompt|response)\}")
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")  # half a character: no tokenizer takes it
_OPENING, _CLOSING = "[<{", "]>}"
_GAP = r"(?:[^\w\[\]]|_)*"  # what may stand between a forged marker's letters: spaces, dashes, dots, ...
_UNSEEN = frozenset("\u115f\u1160\u2800\u3164\uffa0")  # fillers that print nothing but aren't format characters


@dataclass(frozen=True, slots=True)
class Template:
    """How a judge is asked. The judge reads preamble, body and ending, then continues `answer_prefix`."""

    name: str
    version: int
    kind: str  # "score": a whole number from 1 to 10
    preamble: str  # constant and first, so that an engine's prefix cache serves it to a whole batch
    body: str  # with {prompt} and {response}
    ending: str  # constant: the question
    answer_prefix: str  # constant: how the judge's answer begins
    markers: tuple[str, ...]  # in the body, around the users' texts, which can't forge them

    @property
    def hash(self) -> str:
        """Of everything that shapes the judge's prompt, so not of name and version."""
        shape = {key: value for key, value in asdict(self).items() if key not in ("name", "version")}
        return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:12]

    def neutralise(self, text: str, special_tokens: Sequence[str] = ()) -> str:
        """`text` without the power to end its slot: what looks like a marker, or like a special token of the judge's
        tokenizer, gets round brackets.

        Case, invisible characters, Unicode compatibility forms and, in markers, spacing don't hide a forgery. A
        special token without brackets gets a dot after its first letter. Control characters other than newline and
        tab are dropped. All other text stays as it is, braces too: they mean nothing in filled slots.
        """
        text = _SURROGATE.sub("\ufffd", _CONTROL.sub("", text))
        forgery = _forgeries(self.markers, tuple(special_tokens))
        folded = "".join(map(_fold, text))
        if not forgery.search(folded):
            return text
        origin = [index for index, character in enumerate(text) for _ in _fold(character)]
        characters = list(text)
        for match in forgery.finditer(folded):
            _defuse(characters, origin[match.start()], origin[match.end() - 1])
        return "".join(characters)

    def render(self, prompt_text: str, response_text: str, special_tokens: Sequence[str] = ()) -> str:
        """The body with both texts, neutralised, in their slots."""
        texts = {
            "prompt": self.neutralise(prompt_text, special_tokens),
            "response": self.neutralise(response_text, special_tokens),
        }
        return _SLOT.sub(lambda match: texts[match[1]], self.body)  # one pass: a "{response}" in a prompt stays text


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
    for marker in markers:
        letters = [re.escape(letter) for letter in _letters(marker)]
        patterns.append(_GAP.join([r"\[", *letters, r"\]"]))
    return re.compile("|".join(patterns) or r"(?!)")


def _letters(marker: str) -> str:
    return "".join(letter for letter in map(_fold, marker) if letter.isalnum())


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


# ---- Loading ---------------------------------------------------------------------------------------------------------


def load_template(name_or_path: str) -> Template:
    """A shipped template by name, or a user's own YAML file (its name ends in .yaml or .yml, or has a folder).

    Raises InputError with everything that is wrong with it.
    """
    path = _find(name_or_path)
    layer = read_file(path)
    if layer.problems:
        raise InputError("feedback.template: " + "\n".join(layer.problems))
    values = layer.values
    problems = [*_key_problems(values)] or [*_content_problems(values)]
    if problems:
        lines = "".join(f"\n  - {problem}" for problem in problems)
        raise InputError(f"template {path} can't be used:{lines}\nCompare it with {SHIPPED / 'helpful.yaml'}.")
    markers = tuple(values["markers"])
    texts = {key: values[key].strip() for key in ("preamble", "body", "ending")}  # joined by blank lines
    return Template(**{**values, **texts, "markers": markers})


def _find(name_or_path: str) -> Path:
    if Path(name_or_path).suffix in (".yaml", ".yml") or "/" in name_or_path:
        return Path(name_or_path).expanduser()
    names = sorted(path.stem for path in SHIPPED.glob("*.yaml"))
    if name_or_path in names:
        return SHIPPED / f"{name_or_path}.yaml"
    near = difflib.get_close_matches(name_or_path, names, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]}?" if near else "."
    raise InputError(
        f"feedback.template must be one of {', '.join(names)} or a path to a YAML file "
        f"(got {name_or_path!r}: no template has that name){hint}"
    )


def _key_problems(values: dict[Any, Any]) -> Iterator[str]:
    """Missing and unknown keys, and values of the wrong type."""
    types = {field.name: str for field in fields(Template)} | {"version": int, "markers": list}
    for key in types.keys() - values.keys():
        yield f"key {key!r} is missing"
    for key in values.keys() - types.keys():
        near = difflib.get_close_matches(str(key), types, n=1)
        yield f"key {key!r} is unknown" + (f"; did you mean {near[0]}?" if near else f" (known: {', '.join(types)})")
    for key, expected in types.items():
        if key in values and (not isinstance(values[key], expected) or isinstance(values[key], bool)):
            wanted = {str: "a text", int: "a whole number", list: "a list of texts"}[expected]
            yield f"{key} must be {wanted} (got {values[key]!r})"
    markers = values.get("markers")
    for marker in markers if isinstance(markers, list) else ():
        if not isinstance(marker, str):
            yield f"markers must be a list of texts (got {marker!r} in it)"


def _content_problems(values: dict[str, Any]) -> Iterator[str]:
    """What keys and types of a template can't show."""
    if values["kind"] != KIND:
        yield f"kind must be {KIND!r}, a whole number from 1 to 10 (got {values['kind']!r})"
    yield from (f"{key} must not be empty" for key in ("name", "preamble", "ending") if not values[key].strip())
    for key in ("preamble", "ending", "answer_prefix"):
        yield from (f"{key} has the placeholder {slot[0]}: only body can" for slot in _SLOT.finditer(values[key]))
    body, markers = values["body"], values["markers"]
    found = _PLACEHOLDER.findall(body)
    yield from (
        f"body must have the placeholder {{{slot}}} once (got {found.count(slot)})"
        for slot in SLOTS
        if found.count(slot) != 1
    )
    for unknown in dict.fromkeys(found):
        if unknown not in SLOTS:
            yield f"body has the unknown placeholder {{{unknown}}}: there are only {{prompt}} and {{response}}"
    for marker in markers:
        if not (marker.startswith("[") and marker.endswith("]") and _letters(marker)):
            yield f"marker {marker!r} must be words in square brackets, such as [END RESPONSE]"
        elif body.count(marker) != 1:
            yield f"marker {marker!r} must be in body once (got {body.count(marker)})"
    if all(found.count(slot) == 1 for slot in SLOTS):
        yield from _slot_problems(body, markers)


def _slot_problems(body: str, markers: list[str]) -> Iterator[str]:
    """Slots that a text could leave: without a marker on either side, or beside other text on their line."""
    parts = [part for part in [*markers, *(f"{{{slot}}}" for slot in SLOTS)] if part in body]
    parts.sort(key=body.index)
    for slot in (f"{{{slot}}}" for slot in SLOTS):
        at = parts.index(slot)
        around = (parts[at - 1] if at else None, parts[at + 1] if at + 1 < len(parts) else None)
        alone = re.search(rf"^[ \t]*{re.escape(slot)}[ \t]*$", body, re.MULTILINE)
        if not alone or not all(part in markers for part in around):
            yield f"{slot} must stand on a line of its own in body, with one of the markers before it and one after it"
