"""Checks merged values against a job's class, and says what is wrong in the user's words."""

from __future__ import annotations

import copy
import difflib
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails, PydanticUndefined

from rlaif_ray.config.layers import (
    Key,
    Origins,
    default_values,
    fields_of,
    is_choice_of_words,
    item_class,
    takes,
    variants,
)
from rlaif_ray.config.roles import MAY_BE_EMPTY
from rlaif_ray.documents import kind_of
from rlaif_ray.secrecy import masked, secrets_in

_NULLS = ("null", "Null", "NULL")
_ROUNDS = 20  # each leaves out what the rounds before found wrong; far more than nested classes can need


@dataclass(frozen=True, slots=True)
class _Place:
    """Where in a job's class an error is."""

    key: Key  # of the field
    owner: type[BaseModel] | None  # the class that has, or lacks, the field
    field: FieldInfo | None
    item: str = ""  # "[0]" when the error is in a list


@dataclass(frozen=True, slots=True)
class _Problem:
    text: str
    drop: Key | None = None  # what to leave out to see the problems behind this one
    unsure: tuple[str, ...] = ()  # keys whose values are unknown as long as this isn't mended
    fill: tuple[Key, Any] | None = None  # what to put in for the same end


@dataclass(frozen=True, slots=True)
class Source:
    """Where a config is written, for what is missing in it."""

    name: str = "the settings"  # "train.yaml", "stages.sft of pipeline.yaml"
    prefix: str = ""  # of its keys on the command line: "stages.sft."


def validate(
    model: type[BaseModel],
    values: dict[str, Any],
    origins: Origins,
    *,
    cross_checks: bool = True,
    source: Source | None = None,
) -> tuple[Any, list[str]]:
    """The config, or None, and every problem.

    Pydantic runs a class's cross-checks only once its fields are right. To tell all at once, the values found wrong
    are left out, examples stand in for those that are missing, and the rest is checked again; a cross-check that names
    one of them is then held back, since it would judge a default in its stead. `cross_checks` is False where a source
    couldn't be read: what it may have set is then not said to be missing either.
    """
    values = copy.deepcopy(values)
    as_typed(model, values, origins)
    texts: dict[str, None] = {}
    unsure: set[str] = set()
    gone: set[Key] = set()  # left out; that they are missing then is no news
    for secret in list(_secrets(values, origins)):  # left out first: what is said of the rest may quote it
        texts[secret.text] = None
        unsure.update(secret.unsure)
        _drop(values, secret.drop or ())
    for key in _unread(model, values, origins):
        texts[str(origins[key].unread)] = None
        unsure.add(key[-1])
        gone.add(key)
        _drop(values, key)
    for _ in range(_ROUNDS):
        try:
            problems = [*_switches_for_numbers(model, values, origins), *_empty_texts(model, values, origins)]
            config = model.model_validate(values)
        except ValidationError as error:
            problems += _problems(model, error, values, origins, source or Source(), unsure if cross_checks else None)
        else:
            if not problems:
                return (None if texts else config), list(texts)
        problems = [replace(p, text="") if p.fill and _begins(p.fill[0], gone) else p for p in problems]
        texts.update(dict.fromkeys(problem.text for problem in problems if problem.text))
        unsure.update(name for problem in problems for name in problem.unsure)
        gone.update(problem.drop for problem in problems if problem.drop)
        changed = [_drop(values, problem.drop) for problem in problems if problem.drop]
        changed += [_fill(values, *problem.fill) for problem in problems if problem.fill]
        if not any(changed):
            break
    return None, list(texts)


def _secrets(values: dict[str, Any], origins: Origins) -> Iterator[_Problem]:
    """What would be written into resolved.yaml and logs, and must not."""
    for key, why in secrets_in(values):
        origin = _origin(key, origins).partition("=")[0]  # an override is told with its value
        yield _Problem(
            f"{masked('.'.join(key))} must not hold a secret ({origin}; {why}): settings are written into logs and "
            f"records. Put it into an environment variable, as judge.api_key_env, HF_TOKEN or WANDB_API_KEY.",
            key,
            (key[-1],),
        )


def _drop(values: dict[str, Any], key: Key) -> bool:
    for part in key[:-1]:
        inner = values.get(part)
        if not isinstance(inner, dict):
            return False
        values = inner
    return values.pop(key[-1], PydanticUndefined) is not PydanticUndefined


def _begins(key: Key, others: set[Key]) -> bool:
    """Whether the key, or a section that it is in, is among them."""
    return any(key[:end] in others for end in range(1, len(key) + 1))


def _fill(values: dict[str, Any], key: Key, value: Any) -> bool:
    for part in key[:-1]:
        inner = values.setdefault(part, {})
        if not isinstance(inner, dict):
            return False
        values = inner
    if key[-1] in values:
        return False
    values[key[-1]] = value
    return True


def _problems(
    model: type[BaseModel],
    error: ValidationError,
    values: dict[str, Any],
    origins: Origins,
    source: Source,
    unsure: set[str] | None,
) -> Iterator[_Problem]:
    """One per error; `unsure` holds back the cross-checks that name one of its keys, None all of them."""
    details = [(detail, _place(model, detail)) for detail in error.errors(include_url=False)]
    # Of a mapping with an unknown type nothing else can be said.
    typeless = [place.key[:-1] for detail, place in details if detail["type"] == "literal_error" and _is_type(place)]
    for detail, place in details:
        if detail["type"] == "value_error":
            yield from _cross_checks(detail, place.key, unsure)
        elif any(place.key[: len(key)] == key and not _is_type(place) for key in typeless):
            continue
        elif detail["type"] == "extra_forbidden":
            yield _unknown_key(model, place, values, origins)
        elif detail["type"] == "missing" and not place.item:
            missing = _missing(place, source)
            yield replace(missing, text="") if unsure is None else missing  # what couldn't be read may have set it
        else:
            yield _wrong_value(detail, place, values, origins)


def _is_type(place: _Place) -> bool:
    return len(place.key) > 1 and place.key[-1] == "type"


def _place(model: type[BaseModel], detail: ErrorDetails) -> _Place:
    """Finds the field of a pydantic error; leaves out the tags of unions, which are in no dotted name."""
    parts, key = list(detail["loc"]), []
    owner: type[BaseModel] | None = None
    field: FieldInfo | None = None
    inner: type[BaseModel] | None = model
    while parts and inner is not None:
        name = str(parts.pop(0))
        key.append(name)
        owner, field = inner, inner.model_fields.get(name)
        item = item_class(inner, name)
        if item is not None and parts:
            key.append(str(parts.pop(0)))
            inner = item
            continue
        classes = variants(inner, name)
        if len(classes) > 1:
            inner = classes.get(str(parts.pop(0))) if parts else None
        else:
            inner = next(iter(classes.values()), None)
    if detail["type"].startswith("union_tag"):
        key.append("type")
    return _Place(tuple(key), owner, field, "".join(f"[{part}]" for part in parts if isinstance(part, int)))


def _cross_checks(detail: ErrorDetails, key: Key, unsure: set[str] | None) -> Iterator[_Problem]:
    """A validator's own words, line by line; it leaves out the keys it names, so that what is behind it shows."""
    for line in str(detail["ctx"]["error"]).splitlines():
        named = re.findall(re.escape(".".join(key)) + r"\.(\w+)", line) if key else []
        held_back = unsure is None or any(re.search(rf"\b{re.escape(name)}\b", line) for name in unsure)
        for index, name in enumerate(named or [None]):
            text = "" if held_back or index else line
            yield _Problem(text, (*key, name), (name,)) if name else _Problem(text, key or None, key[-1:])


# --- phrasing -------------------------------------------------------------------------------------------------------


def _unknown_key(model: type[BaseModel], place: _Place, values: dict[str, Any], origins: Origins) -> _Problem:
    key, dotted = place.key, ".".join(place.key)
    parent, leaf = key[:-1], key[-1]
    names = _dotted_names(model, values)
    siblings = [name for name in names if name[:-1] == parent]
    near = difflib.get_close_matches(leaf, [name[-1] for name in siblings], n=1)
    meant = [(*parent, near[0])] if near else [name for name in names if name[-1] == leaf != "type"]
    if not meant and leaf != "type":
        by_text = {".".join(name): name for name in names}
        meant = [by_text[text] for text in difflib.get_close_matches(dotted, by_text, n=1)]
    elsewhere = _types_with(model, parent, leaf)
    if elsewhere:
        room = ".".join(parent)
        remedy = f"It belongs to {' and '.join(f'{room}.type={kind}' for kind in elsewhere)}. Remove it or change type."
    elif meant:
        remedy = f"Did you mean {' or '.join('.'.join(name) for name in meant[:3])}?"
    else:
        remedy = f"{'.'.join(parent) or 'The job'} knows {', '.join(name[-1] for name in siblings)}."
    text = f"{dotted} is not a known key ({_origin(key, origins)}): nothing would read it. {remedy}"
    return _Problem(text, key, (leaf, *(name[-1] for name in meant[:1])))


def _types_with(model: type[BaseModel], parent: Key, leaf: str) -> list[str]:
    """The types of the union at `parent` that have the key."""
    owner: type[BaseModel] | None = model
    for part in parent[:-1]:
        owner = next(iter(variants(owner, part).values()), None)
    classes = variants(owner, parent[-1]) if parent else {}
    return [kind for kind, variant in classes.items() if kind is not None and leaf in variant.model_fields]


def _dotted_names(model: type[BaseModel], values: Any, parent: Key = ()) -> list[Key]:
    """Every key that the job knows, given the types chosen in `values`."""
    names = []
    for name in model.model_fields:
        names.append((*parent, name))
        inner = values.get(name) if isinstance(values, dict) else None
        classes = variants(model, name)
        kind = inner.get("type") if isinstance(inner, dict) else None
        chosen = classes.get(kind) if kind is None or isinstance(kind, str) else None
        chosen = chosen or next(iter(classes.values()), None)
        if chosen is not None:
            names += _dotted_names(chosen, inner, (*parent, name))
    return names


def _missing(place: _Place, source: Source) -> _Problem:
    key, dotted = place.key, ".".join(place.key)
    classes = variants(place.owner, key[-1])
    for kind, chosen in classes.items():  # a section: what is missing in it is asked for next
        return _Problem("", fill=(key, default_values(chosen, kind)))
    example = (place.field.examples or [None])[0] if place.field else None
    what = _why(place.field).strip().rstrip(".")
    told = f" ({what})." if what else "."
    text = f"{dotted} must be set (got nothing from {source.name}): it has no default, since no run can guess it. "
    if example is None:
        text += f"Add it there, or {source.prefix}{dotted}=VALUE to the command{told}"
        return _Problem(text, unsure=(dotted,))
    nested = f"{key[-1]}: {_shown(example).strip(chr(34))}"
    for part in reversed((*filter(None, source.prefix.split(".")), *key[:-1])):
        nested = f"{part}: {{{nested}}}"
    text += f"Add `{nested}` there, or {source.prefix}{dotted}={example} to the command{told}"
    return _Problem(text, fill=(key, example), unsure=(dotted,))


def _wrong_value(detail: ErrorDetails, place: _Place, values: dict[str, Any], origins: Origins) -> _Problem:
    of_type = _is_type(place) and detail["type"] in ("literal_error", "union_tag_invalid", "union_tag_not_found")
    drop = place.key[:-1] if of_type else place.key
    if detail["type"].startswith("union_tag"):
        classes = variants(place.owner, place.key[-2])
        got = detail["input"].get("type") if isinstance(detail["input"], dict) else None
        return _problem(place, _choice(list(classes)), got, origins, drop, _nearest(got, classes))
    if detail["type"] in ("missing", "too_long", "too_short"):
        place = _Place(place.key, place.owner, place.field)
        whole: Any = values
        for part in place.key:
            whole = whole[part]
        return _problem(place, _length(place.field), whole, origins, drop)
    if detail["type"] == "literal_error":
        annotation = place.field.annotation if place.field else None
        choices = [choice for member in (annotation, *get_args(annotation)) for choice in _literals(member)]
        return _problem(place, _choice(choices), detail["input"], origins, drop, _nearest(detail["input"], choices))
    remedy = ""
    if detail["type"] == "string_type" and not isinstance(detail["input"], dict | list | None):
        written = _written(place, origins)
        quoted = json.dumps(_shown(detail["input"]) if written is None else written, ensure_ascii=False)
        remedy = f"Put it in quotes: {'' if place.item else place.key[-1] + ': '}{quoted}."
    elif detail["type"].startswith("model_") and place.owner:
        classes = variants(place.owner, place.key[-1])
        name = place.key[-1]
        known = isinstance(detail["input"], str) and detail["input"] in classes
        rest = "." if place.field and place.field.is_required() else f", or remove {name}."
        remedy = f"Write {name}: {{type: {detail['input']}}}." if known else f"Put its keys under it{rest}"
    return _problem(place, _expected(detail), detail["input"], origins, drop, remedy)


def _problem(place: _Place, expected: str, got: Any, origins: Origins, drop: Key, remedy: str = "") -> _Problem:
    dotted = ".".join(place.key) + place.item
    where = _origin(place.key, origins)
    shown, written = _shown(got), _written(place, origins)
    if written == "":
        shown = "nothing" if got is None else shown
    elif written is not None and got is not None and not isinstance(got, str) and written != shown:
        shown = f"{written}, which is read as {shown}"
    shown = f"{shown}, {where}"
    why = _why(place.field) if drop == place.key else ""
    text = f"{dotted} must be {expected} (got {shown}){':' + why if why else '.'} {remedy or _remedy(place, expected)}"
    return _Problem(text, drop, drop[-1:])


def _expected(detail: ErrorDetails) -> str:
    """What pydantic wants, in words."""
    kind, context = detail["type"], detail.get("ctx", {})
    bounds = {
        "greater_than_equal": ("at least", "ge"),
        "greater_than": ("greater than", "gt"),
        "less_than_equal": ("at most", "le"),
        "less_than": ("less than", "lt"),
    }
    if kind in bounds:
        words, name = bounds[kind]
        return f"a number {words} {context[name]:g}"
    for prefix, words in {
        "int": "a whole number",
        "float": "a number",
        "finite": "a finite number",
        "bool": "true or false",
        "string": "text",
        "model": "a mapping of keys",
        "dict": "a mapping of keys",
        "list": "a list",
        "tuple": "a list",
    }.items():
        if kind.startswith(prefix + "_"):
            return words
    return f"valid: {detail['msg']}"


def _remedy(place: _Place, expected: str) -> str:
    default = place.field.get_default(call_default_factory=True) if place.field else PydanticUndefined
    if default is PydanticUndefined or isinstance(default, BaseModel) or place.key[-1] == "type":
        return f"Set it to {expected}."
    return f"Set it to {expected}, or leave it out for the default, {_shown(default)}."


def _why(field: FieldInfo | None) -> str:
    """What the field means, from its docstring: it mostly tells why the value can't be right."""
    words = " ".join((field.description or "").split()) if field else ""
    return f" {words[0].lower() + words[1:]}" if words else ""


def _origin(key: Key, origins: Origins) -> str:
    for end in range(len(key), 0, -1):
        if key[:end] in origins:
            return f"set by {origins[key[:end]].place}"
    return "the default"


def _written(place: _Place, origins: Origins) -> str | None:
    """The text that the value, or item of a list, was read from; None for what is in quotes, and no scalar."""
    origin = origins.get((*place.key, place.item[1:-1]) if place.item else place.key)
    return None if origin is None or not (origin.written or origin.typed) else origin.written


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= 60 else f"{kind_of(value)} {text[:50]}..."


def _choice(choices: list[Any]) -> str:
    words = [str(choice) for choice in choices if choice is not None]
    return words[0] if len(words) == 1 else f"one of {', '.join(words)}"


def _nearest(got: Any, choices: Any) -> str:
    near = difflib.get_close_matches(str(got), [str(choice) for choice in choices], n=1, cutoff=0.5)
    return f"Did you mean {near[0]}?" if near else ""


def _literals(annotation: Any) -> tuple[Any, ...]:
    arguments = get_args(annotation)
    return arguments if all(isinstance(argument, str | int) for argument in arguments) else ()


def _length(field: FieldInfo | None) -> str:
    count = len(get_args(field.annotation)) if field else 0
    return f"a list of {count} values"


# --- what is typed, and what pydantic lets pass ---------------------------------------------------------------------


def as_typed(model: type[BaseModel], values: dict[str, Any], origins: Origins) -> None:
    """Gives fields of text what was typed on the command line: `policy.revision=4867e52` is no number.

    `null` is null where that may be. So is an empty value, but for fields that say something by an empty text.
    """
    for key, owner, inside in fields_of(model, values):
        origin, field = origins.get(key), owner.model_fields[key[-1]]
        if origin is None or not origin.typed or origin.written is None or isinstance(inside[key[-1]], dict | list):
            continue
        if not _is_text(field.annotation):
            continue
        kinds = field.annotation
        empty = not origin.written and takes(kinds, type(None)) and MAY_BE_EMPTY not in field.metadata
        inside[key[-1]] = None if empty or origin.written in _NULLS else origin.written


def _is_text(annotation: Any) -> bool:
    """Whether a field takes texts or words, and nothing that could be read off one."""
    texts = takes(annotation, str) or is_choice_of_words(annotation)
    return texts and not any(takes(annotation, kind) for kind in (int, bool))


def _unread(model: type[BaseModel], values: dict[str, Any], origins: Origins) -> list[Key]:
    """Of what is no YAML on the command line, the keys of what is no text either."""
    texts = {key for key, owner, _ in fields_of(model, values) if _is_text(owner.model_fields[key[-1]].annotation)}
    return [key for key, origin in origins.items() if origin.unread is not None and key not in texts]


def _empty_texts(model: type[BaseModel], values: dict[str, Any], origins: Origins) -> Iterator[_Problem]:
    """An empty path, name or address is none."""
    for key, owner, inside in fields_of(model, values):
        field = owner.model_fields[key[-1]]
        if inside[key[-1]] == "" and takes(field.annotation, str) and MAY_BE_EMPTY not in field.metadata:
            remedy = "Leave it out, or set it to null." if takes(field.annotation, type(None)) else ""
            yield _problem(_Place(key, owner, field), "text that is not empty", "", origins, key, remedy)


def _switches_for_numbers(model: type[BaseModel], values: dict[str, Any], origins: Origins) -> Iterator[_Problem]:
    """`steps: true` is 1 to pydantic, as to Python; to a user it is a slip."""
    for key, owner, inside in fields_of(model, values):
        field = owner.model_fields[key[-1]]
        if isinstance(inside[key[-1]], bool) and not _takes_switch(field.annotation) and _numeric(field.annotation):
            yield _problem(_Place(key, owner, field), "a number", inside[key[-1]], origins, key)


def _takes_switch(annotation: Any) -> bool:
    return annotation in (bool, Any) or any(_takes_switch(member) for member in get_args(annotation))


def _numeric(annotation: Any) -> bool:
    return annotation in (int, float) or any(
        isinstance(member, int) or _numeric(member) for member in get_args(annotation)
    )
