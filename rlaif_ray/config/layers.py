"""Layers of a config: what each YAML file and override says, where it says it, and how layers merge."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from pydantic import BaseModel

from rlaif_ray.config.roles import MODEL, names_of
from rlaif_ray.documents import STR, YAML_BYTES, at, kind_of, parse_yaml, read_bytes, scalar_tag
from rlaif_ray.errors import DocumentError
from rlaif_ray.output import first_unsafe
from rlaif_ray.paths import expand_home

Key = tuple[str, ...]  # ("learner", "lr") is the dotted name learner.lr


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a value is set, and how it is written there."""

    place: str  # "train.yaml, line 3", "the override steps=3"
    written: str | None = None  # the text that a number, switch or null was read from; None for what is in quotes
    typed: bool = False  # on the command line, as a whole value
    unread: str | None = None  # what is wrong with it as YAML: all that it can be is a text, as it was typed


Origins = Mapping[Key, Origin]
STAGE = "stage:"  # a value that begins so is what another stage of a pipeline made


@dataclass(frozen=True, slots=True)
class Layer:
    """What one source says. With problems, `values` is what could be read all the same."""

    values: dict[str, Any] = field(default_factory=dict)
    origins: dict[Key, Origin] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)


# --- YAML -----------------------------------------------------------------------------------------------------------


@dataclass(slots=True)
class _Read:
    """What a YAML text says: plain values, and where each key came from."""

    values: Any = None  # None when there is none, or it can't be read
    origins: dict[Key, Origin] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    malformed: bool = False  # it is no YAML


def _read(text: bytes | str, key: Key, whole: str, place: Callable[[int], str]) -> _Read:
    """Reads a text whose value will stand at `key`; `place` names a line of it, from 1, and `whole` all of it."""
    try:
        document = parse_yaml(text)
    except DocumentError as error:
        remedy = "Mend the indentation, quotes or brackets" if "valid YAML" in str(error) else "Correct or remove it"
        if error.line is None:
            return _Read(problems=[f"{whole} can't be read (it {error}): a YAML text file is needed. Correct it."])
        told = f"{place(error.line)} {error}. {remedy} there."
        return _Read(problems=[told], malformed="valid YAML" in str(error))
    origins = {
        (*key, *below): Origin(place(line), document.written.get(below)) for below, line in document.lines.items()
    }
    problems = [
        f"{place(line)} sets {'.'.join((*key, *below))} again (first on line {first}): only one of the two could "
        f"count. Remove one."
        for below, line, first in document.repeated
    ]
    unsafe = {
        below: (line, character)
        for below, line in document.lines.items()
        if below and (character := first_unsafe(below[-1]))
    }
    problems += [
        f"{place(line)} has a key with the character {character} in it: it would not be shown as it is read. Write the "
        f"key without it."
        for line, character in unsafe.values()
    ]
    return _Read(_without_keys(document.value, unsafe) if unsafe else document.value, origins, problems)


def _without_keys(value: Any, left_out: Container[Key], key: Key = ()) -> Any:
    if isinstance(value, list):
        return [_without_keys(each, left_out, (*key, str(i))) for i, each in enumerate(value)]
    if not isinstance(value, dict):
        return value
    return {
        name: _without_keys(each, left_out, (*key, name))
        for name, each in value.items()
        if (*key, name) not in left_out
    }


def read_file(file: Path) -> Layer:
    """Reads one YAML file; an empty one says nothing."""
    if unsafe := first_unsafe(str(file)):
        problem = f"config file {str(file)!r} has the character {unsafe} in its name: it would not be shown as it is."
        return Layer(problems=[f"{problem} Rename it."])
    try:
        text = read_bytes(expand_home(file), YAML_BYTES)
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
    """Reads `a.b=value` settings; a later one wins over an earlier one.

    What a number, switch or null is to a field of text is for `validate` to say: this knows no fields.
    """
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
        read = _Read(text) if _is_plain(text) else _read(text, key, whole, lambda _, whole=whole: whole)  # type: ignore[misc]
        unread = read.problems[0] if read.malformed and not _has_controls(text) else None
        if unread is not None:
            read = _Read(text)
        layer.problems.extend(read.problems)
        if read.problems:
            continue
        value = read.values
        for part in reversed(key):
            value = {part: value}
        merged = merge(None, layer.values, value)
        layer.values.update(merged)
        own = read.origins.pop(key, None)  # None: nothing but white space, or text
        layer.origins.update(read.origins)
        layer.origins.update({key[:end]: Origin(whole) for end in range(1, len(key))})
        quoted = own is not None and own.written is None
        layer.origins[key] = Origin(whole, None if quoted else text, typed=not quoted, unread=unread)
    return layer


def _is_plain(text: str) -> bool:
    """Whether an override's value is the text as it was typed, and no YAML: neither a number, switch or null, nor in
    quotes, nor a list in [] or a mapping in {}.

    A file's rules would cut `exp #3` at its comment, take `&a hello` for an anchor, `a: b` for a mapping and two lines
    for one.
    """
    if text.lstrip()[:1] in ("[", "{", "'", '"') or _has_controls(text):
        return False  # YAML; what is none can be a text all the same, where the setting is one
    tag = scalar_tag(text)
    if tag == "":
        return bool(text.strip())  # nothing but a comment
    return tag in (None, STR) or text.lstrip()[:1] in "&!*"


def _has_controls(text: str) -> bool:
    return any(ord(character) < 32 and character not in "\t\n\r" for character in text)


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


def fields_of(
    model: type[BaseModel], values: Mapping[str, Any], key: Key = ()
) -> Iterator[tuple[Key, type[BaseModel], dict[str, Any]]]:
    """(key, class, values) of every value that has a field in the class, at any depth; sections' own values come with
    the section. `values` is the mapping that the value is in, to be changed."""
    for name, value in list(values.items()):
        if name not in model.model_fields:
            continue
        yield (*key, name), model, values  # type: ignore[misc]
        item = item_class(model, name)
        if not isinstance(value, dict):
            continue
        if item is not None:
            for own, inner in value.items():
                if isinstance(inner, dict):
                    yield from fields_of(item, inner, (*key, name, own))
            continue
        chosen = _pick(variants(model, name), value.get("type"))
        if chosen is not None:
            yield from fields_of(chosen, value, (*key, name))


def takes(annotation: Any, kind: type[Any]) -> bool:
    """Whether a field of that annotation takes any value of the kind."""
    return kind in _members(annotation)


def is_choice_of_words(annotation: Any) -> bool:
    """Whether a field takes one of several words."""
    choices = [get_args(member) for member in _members(annotation) if get_origin(member) is Literal]
    return bool(choices) and all(isinstance(one, str) for words in choices for one in words)


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
    what it can, as the first of its types: so it is the missing key that is asked for, not its section."""
    given: dict[str, Any] = {} if kind is None else {"type": kind}
    values = model.model_construct(**given).model_dump()
    for name, info in model.model_fields.items():
        section = variants(model, name) if info.is_required() else {}
        for first, chosen in list(section.items())[:1]:
            values[name] = default_values(chosen, first)
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


def merge_layer(
    model: type[BaseModel], values: dict[str, Any], origins: dict[Key, Origin], layer: Layer
) -> dict[str, Any]:
    """What a layer says over `values`; its origins go into `origins`.

    Where it names another model, and no revision, the revision below was the other one's and is dropped; what a stage
    made never has any.
    """
    merged = merge(model, values, layer.values)
    for key, owner, inside in fields_of(model, merged):
        if names_of(owner.model_fields[key[-1]]) is not MODEL or "revision" not in owner.model_fields:
            continue
        new, old = at(layer.values, *key), at(values, *key)
        other = isinstance(new, str) and (new.startswith(STAGE) or old not in (None, new))
        if other and "revision" not in at(layer.values, *key[:-1]):
            inside["revision"] = None
            origins.pop((*key[:-1], "revision"), None)
    origins |= layer.origins
    return merged


def _fresh(classes: dict[str | None, type[BaseModel]], kind: Any) -> dict[str, Any]:
    chosen = _pick(classes, kind)
    return default_values(chosen, kind if kind in classes else None) if chosen else {}


def _pick(classes: dict[str | None, type[BaseModel]], kind: Any) -> type[BaseModel] | None:
    if kind is None and len(classes) == 1:
        return next(iter(classes.values()))
    return classes.get(kind) if kind is None or isinstance(kind, str) else None
