"""What each setting of a config is for: whether results depend on it, and whether it may change in a resume.

The declaration stands with the field, as an annotation: `replicas: Annotated[int, Field(ge=1), HANDLING] = 1`. A field
without one is RESULT, the strictest. A section's declaration holds for everything in it that has none of its own.
Settings are found by walking the classes, never by their names: users choose names too.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

from pydantic import BaseModel
from pydantic.fields import FieldInfo


@dataclass(frozen=True, slots=True)
class Role:
    """What a setting is for."""

    name: str
    result: bool  # results depend on it: other values, other results
    resume: bool  # a run that goes on from a checkpoint may have another value


RESULT = Role("result", result=True, resume=False)
"""Results depend on it, and a resume can't change it: one run would be two."""
ADJUSTABLE = Role("adjustable", result=True, resume=True)
"""Results depend on it, and it may be changed on the way, such as the number of steps; the change is noted."""
LAYOUT = Role("layout", result=False, resume=False)
"""How state is divided among processes: no result depends on it, and a checkpoint fits no other."""
HANDLING = Role("handling", result=False, resume=True)
"""How a run is carried out: no result depends on it."""


@dataclass(frozen=True, slots=True)
class Names:
    """The setting names something: what that holds is the value, not its name."""

    kind: Literal["data", "model", "text"]
    text: Literal["", "score template", "preference template", "exemplars", "constitution", "revision examples"] = ""


@dataclass(frozen=True, slots=True)
class LeftToMachine:
    """The value "auto" is left to the machine that a job runs on: what it comes to is kept with the settings."""


LEFT_TO_MACHINE = LeftToMachine()


@dataclass(frozen=True, slots=True)
class MayBeEmpty:
    """An empty text says something: it is not the same as none."""


MAY_BE_EMPTY = MayBeEmpty()
DATA, MODEL = Names("data"), Names("model")
SCORE_TEMPLATE, PREFERENCE_TEMPLATE = Names("text", "score template"), Names("text", "preference template")
EXEMPLARS, CONSTITUTION = Names("text", "exemplars"), Names("text", "constitution")
REVISION_EXAMPLES = Names("text", "revision examples")


@dataclass(frozen=True, slots=True)
class Setting:
    """One value of a config."""

    key: tuple[str, ...]  # ("learner", "lr") is learner.lr
    value: Any  # plain: numbers, text, lists, mappings, None
    role: Role
    names: Names | None
    left_to_machine: bool = False  # where the value is "auto"


def role_of(field: FieldInfo) -> Role | None:
    """A field's own declaration."""
    return next((mark for mark in field.metadata if isinstance(mark, Role)), None)


def names_of(field: FieldInfo) -> Names | None:
    """What a field's value names."""
    return next((mark for mark in field.metadata if isinstance(mark, Names)), None)


def settings(config: BaseModel, key: tuple[str, ...] = (), role: Role = RESULT) -> Iterator[Setting]:
    """Every value of a config, sections and mappings of sections taken apart; `role` holds where nothing is declared.

    A section that may be there or not, and is not, is one setting with the value None.
    """
    for name, field in type(config).model_fields.items():
        yield from _settings(getattr(config, name), (*key, name), role_of(field) or role, field)


def _settings(value: Any, key: tuple[str, ...], role: Role, field: FieldInfo) -> Iterator[Setting]:
    if isinstance(value, BaseModel):
        yield from settings(value, key, role)
    elif isinstance(value, Mapping) and value and all(isinstance(inner, BaseModel) for inner in value.values()):
        for name, inner in value.items():
            yield from settings(inner, (*key, str(name)), role)
    else:
        yield Setting(key, plain(value), role, names_of(field), LEFT_TO_MACHINE in field.metadata)


C = TypeVar("C", bound=BaseModel)


def with_values(config: C, values: Mapping[tuple[str, ...], Any]) -> C:
    """The config with these settings in the place of its own, by key; each must be there."""
    return config if not values else cast(C, _with_values(config, values))


def _with_values(section: Any, values: Mapping[tuple[str, ...], Any]) -> Any:
    if () in values:
        return values[()]
    inner: dict[str, dict[tuple[str, ...], Any]] = {}
    for key, value in values.items():
        inner.setdefault(key[0], {})[key[1:]] = value
    if isinstance(section, Mapping):
        return {**section, **{name: _with_values(section[name], below) for name, below in inner.items()}}
    update = {name: _with_values(getattr(section, name), below) for name, below in inner.items()}
    return section.model_copy(update=update)


def plain(value: Any) -> Any:
    """As JSON and YAML give it back."""
    if isinstance(value, BaseModel):
        return plain(value.model_dump(mode="json"))
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(inner) for inner in value]
    return value


# ---- What has changed ------------------------------------------------------------------------------------------------

UNSET = "not set"  # the value of a setting that the other config doesn't have


@dataclass(frozen=True, slots=True)
class Change:
    """A setting that two configs of one run do not agree on."""

    key: str  # dotted
    then: Any
    now: Any
    role: Role

    def __str__(self) -> str:
        return f"{self.key} was {shown(self.then)} and is {shown(self.now)}"


def changes(
    then: BaseModel, now: BaseModel, contents_then: Mapping[str, str], contents_now: Mapping[str, str]
) -> list[Change]:
    """What differs, in the order of the classes.

    Where the contents of what a setting names are known (hashes, by dotted key), they are compared, not the names. Of
    a section of another type only the type is told; a section that one config lacks is told as a whole.
    """
    before, after = ({setting.key: setting for setting in settings(config)} for config in (then, now))
    found: dict[tuple[str, ...], Change] = {}
    for key in dict.fromkeys([*after, *before]):
        old, new = before.get(key), after.get(key)
        if old is not None and new is not None:
            values = _compared(old, new, contents_then, contents_now)
            if values is not None:
                found[key] = Change(".".join(key), *values, new.role)
            continue
        one = new or old
        assert one is not None
        whole = _lacking(key, before if old is None else after)
        if whole in found and found[whole].role.resume and not one.role.resume:
            found[whole] = Change(".".join(whole), found[whole].then, found[whole].now, one.role)
        if whole not in found:
            found[whole] = Change(".".join(whole), _at(then, whole), _at(now, whole), one.role)
    sections = [key[:-1] for key in found if key[-1] == "type" and key in before and key in after]
    return [
        change
        for key, change in found.items()
        if not any(key[:n] in found for n in range(len(key)))
        and not any(key[: len(section)] == section and key != (*section, "type") for section in sections)
    ]


def _compared(
    old: Setting, new: Setting, contents_then: Mapping[str, str], contents_now: Mapping[str, str]
) -> tuple[Any, Any] | None:
    """The two values, where they differ."""
    name = ".".join(new.key)
    if old.value is None or new.value is None or name not in contents_then or name not in contents_now:
        return None if old.value == new.value else (old.value, new.value)
    was, now = contents_then[name], contents_now[name]
    if was == now:
        return None
    if old.value == new.value:
        return f"{old.value} (content {was})", f"{new.value} (content {now})"
    return old.value, new.value


def _lacking(key: tuple[str, ...], other: Iterable[tuple[str, ...]]) -> tuple[str, ...]:
    """The shortest beginning of a key under which the other config has nothing."""
    for n in range(1, len(key)):
        if not any(there[:n] == key[:n] and len(there) > n for there in other):
            return key[:n]
    return key


def _at(config: Any, key: tuple[str, ...]) -> Any:
    for part in key:
        if isinstance(config, Mapping):
            config = config.get(part, UNSET)
        else:
            config = getattr(config, part, UNSET)
    return plain(config)


def shown(value: Any) -> str:
    """A value in a message, not too long."""
    text = UNSET if value == UNSET else repr(value)
    return text if len(text) <= 120 else f"{text[:117]}..."
