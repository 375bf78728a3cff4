"""Layers of a config: what each YAML file and override says, where it says it, and how layers merge."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from rlaif_ray.documents import STR, YAML_BYTES, kind_of, parse_yaml, read_bytes, scalar_tag
from rlaif_ray.errors import DocumentError
from rlaif_ray.output import first_unsafe

Key = tuple[str, ...]  # ("learner", "lr") is the dotted name learner.lr


@dataclass(frozen=True, slots=True)
class Layer:
    """What one source says. With problems, `values` is what could be read all the same."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Key, str] = field(default_factory=dict)  # "train.yaml, line 3", "the override steps=3"
    problems: list[str] = field(default_factory=list)


# --- YAML -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Read:
    """What a YAML text says: plain values, and where each key came from."""

    values: Any = None  # None when there is none, or it can't be read
    origins: dict[Key, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


def _read(text: bytes | str, key: Key, whole: str, place: Callable[[int], str]) -> _Read:
    """Reads a text whose value will stand at `key`; `place` names a line of it, from 1, and `whole` all of it."""
    try:
        document = parse_yaml(text)
    except DocumentError as error:
        remedy = "Mend the indentation, quotes or brackets" if "valid YAML" in str(error) else "Correct or remove it"
        return _Read(problems=[f"{place(error.line) if error.line else whole} {error}. {remedy} there."])
    origins = {(*key, *below): place(line) for below, line in document.lines.items()}
    problems = [
        f"{place(line)} sets {'.'.join((*key, *below))} again (first on line {first}): only one of the two could "
        f"count. Remove one."
        for below, line, first in document.repeated
        if not first_unsafe(below[-1])
    ]
    for below, line in document.lines.items():
        if below and (unsafe := first_unsafe(below[-1])):
            problems.append(
                f"{place(line)} has a key with the character {unsafe} in it: it would not be shown as it is read. "
                f"Write the key without it."
            )
    return _Read(_with_safe_keys(document.value), origins, problems)


def _with_safe_keys(value: Any) -> Any:
    """Without the keys that are refused for their characters: what is said of the others may quote them."""
    if isinstance(value, dict):
        return {key: _with_safe_keys(inner) for key, inner in value.items() if not first_unsafe(str(key))}
    return [_with_safe_keys(inner) for inner in value] if isinstance(value, list) else value


def read_file(file: Path) -> Layer:
    """Reads one YAML file; an empty one says nothing."""
    if unsafe := first_unsafe(str(file)):
        problem = f"config file {str(file)!r} has the character {unsafe} in its name: it would not be shown as it is."
        return Layer(problems=[f"{problem} Rename it."])
    try:
        text = read_bytes(file, YAML_BYTES)
    except FileNotFoundError:
        return Layer(problems=[_missing(file)])
    except (OSError, DocumentError) as error:
        reason = getattr(error, "strerror", None) or f"it {error}"
        return Layer(problems=[f"config file {file} can't be read ({reason}): a YAML text file is needed. Name one."])
    read = _read(text, (), f"config file {file}", lambda line: f"{file}, line {line}")
    if read.values is not None and not isinstance(read.values, dict):
        read.problems.append(
            f"config file {file} must hold a mapping of keys to values (got {kind_of(read.values)}): every setting has "
            f"a name. Write lines such as `steps: 100`."
        )
        read.values = None
    return Layer(read.values or {}, read.origins, read.problems)


def _missing(file: Path) -> str:
    siblings = [str(other) for other in file.parent.glob("*.y*ml")] if file.parent.is_dir() else []
    near = difflib.get_close_matches(str(file), siblings, n=1)
    if near:
        remedy = f"Did you mean {near[0]}?"
    elif file.suffix in (".yaml", ".yml"):
        remedy = "Check the path."
    else:
        remedy = "Check the path; if a setting was meant, write it key=value, such as steps=10."
    return f"config file {file} does not exist (working folder {Path.cwd()}). {remedy}"


DOTTED = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_][\w-]*)*")  # a stage of a pipeline may have - in its name


def read_overrides(overrides: Sequence[str]) -> Layer:
    """Reads `a.b=value` settings; a later one wins over an earlier one."""
    layer = Layer()
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals or not DOTTED.fullmatch(name):
            layer.problems.append(
                f"the override {override!r} must be key=value with a dotted key: it names no setting. "
                f"Write for example learner.lr=1e-6."
            )
            continue
        key: Key = tuple(name.split("."))
        whole = f"the override {override}"
        read = _Read(text, {key: whole}) if _is_plain(text) else _read(text, key, whole, lambda _, whole=whole: whole)  # type: ignore[misc]
        layer.problems.extend(read.problems)
        if read.problems:
            continue
        value = read.values
        for part in reversed(key):
            value = {part: value}
        merged = merge(None, layer.values, value)
        layer.values.update(merged)
        layer.origins.update(read.origins)
        layer.origins.update({key[:end]: whole for end in range(1, len(key) + 1)})
    return layer


def _is_plain(text: str) -> bool:
    """Whether an override's value is the text as it was typed, and no YAML: neither a number, switch or null, nor in
    quotes, nor a list in [] or a mapping in {}.

    A file's rules would cut `exp #3` at its comment, take `&a hello` for an anchor, `a: b` for a mapping and two lines
    for one.
    """
    if text.lstrip()[:1] in ("[", "{", "'", '"') or any(
        ord(character) < 32 and character not in "\t\n\r" for character in text
    ):
        return False  # YAML, whatever is wrong with it
    tag = scalar_tag(text)
    if tag == "":
        return bool(text.strip())  # nothing but a comment
    return tag in (None, STR) or text.lstrip()[:1] in "&!*"


# --- merging --------------------------------------------------------------------------------------------------------


def variants(model: type[BaseModel] | None, name: str) -> dict[str | None, type[BaseModel]]:
    """The classes that a field's mapping may be, by their `type` (None for a class without one); {} for other fields.

    A union of which one member has a `type` is tagged: pydantic then puts the tag into error locations.
    """
    info = model.model_fields.get(name) if model else None
    found: dict[str | None, type[BaseModel]] = {}
    for member in _members(info.annotation) if info else ():
        if isinstance(member, type) and issubclass(member, BaseModel):
            kind = member.model_fields.get("type")
            tags: Sequence[str | None] = get_args(kind.annotation) if kind else (None,)
            found.update(dict.fromkeys(tags, member))
    return found


def item_class(model: type[BaseModel], name: str) -> type[BaseModel] | None:
    """The class of the values of a field that maps names to sections; None for other fields."""
    info = model.model_fields.get(name)
    annotation = info.annotation if info else None
    if get_origin(annotation) is not dict:
        return None
    member = get_args(annotation)[1]
    return member if isinstance(member, type) and issubclass(member, BaseModel) else None


def _members(annotation: Any) -> list[Any]:
    """The members of a (nested, annotated) union; the annotation itself when it is none."""
    arguments = [] if get_origin(annotation) in (Literal, list, tuple, dict) else get_args(annotation)
    if not arguments:
        return [annotation]
    if hasattr(annotation, "__metadata__"):
        arguments = arguments[:1]
    return [member for argument in arguments for member in _members(argument)]


def default_values(model: type[BaseModel], kind: str | None = None) -> dict[str, Any]:
    """What `model` holds when nothing is set; fields without a default are left out, a section that is needed holds
    what it can: so it is the missing key that is asked for, not its section."""
    given: dict[str, Any] = {} if kind is None else {"type": kind}
    values = model.model_construct(**given).model_dump()
    for name, info in model.model_fields.items():
        section = variants(model, name) if info.is_required() else {}
        if set(section) == {None}:
            values[name] = default_values(section[None])
    return values


def merge(model: type[BaseModel] | None, below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
    """`above` over `below`: mappings merge, anything else replaces.

    Where `above` changes a mapping's `type`, nothing of `below`'s mapping stays: the keys belonged to the other type.
    Its place is taken by the new type's defaults.
    """
    merged = dict(below)
    for name, value in above.items():
        if not isinstance(value, dict):
            merged[name] = value
            continue
        classes = variants(model, name)
        old, kind = below.get(name), value.get("type")
        if not isinstance(old, dict) or (kind is not None and old.get("type", kind) != kind):
            old = _fresh(classes, kind)
        kind = kind or old.get("type")
        merged[name] = merge(_pick(classes, kind), old, value)
    return merged


def _fresh(classes: dict[str | None, type[BaseModel]], kind: Any) -> dict[str, Any]:
    chosen = _pick(classes, kind)
    return default_values(chosen, kind if kind in classes else None) if chosen else {}


def _pick(classes: dict[str | None, type[BaseModel]], kind: Any) -> type[BaseModel] | None:
    if kind is None and len(classes) == 1:
        return next(iter(classes.values()))
    return classes.get(kind) if kind is None or isinstance(kind, str) else None
