"""What each setting of a config is for: whether results depend on it, and whether it may change in a resume.

The declaration stands with the field, as an annotation: `replicas: Annotated[int, Field(ge=1), HANDLING] = 1`. A field
without one is RESULT, the strictest. A section's declaration holds for everything in it that has none of its own.
Settings are found by walking the classes, never by their names: users choose names too.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

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

    kind: Literal["data", "model", "text"]  # a data set, a model, a template or constitution and the like


DATA, MODEL, TEXT = Names("data"), Names("model"), Names("text")


@dataclass(frozen=True, slots=True)
class Setting:
    """One value of a config."""

    key: tuple[str, ...]  # ("learner", "lr") is learner.lr
    value: Any  # plain: numbers, text, lists, mappings, None
    role: Role
    names: Names | None


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
        yield from _settings(getattr(config, name), (*key, name), role_of(field) or role, names_of(field))


def _settings(value: Any, key: tuple[str, ...], role: Role, names: Names | None) -> Iterator[Setting]:
    if isinstance(value, BaseModel):
        yield from settings(value, key, role)
    elif isinstance(value, Mapping) and value and all(isinstance(inner, BaseModel) for inner in value.values()):
        for name, inner in value.items():
            yield from settings(inner, (*key, str(name)), role)
    else:
        yield Setting(key, plain(value), role, names)


def plain(value: Any) -> Any:
    """As JSON and YAML give it back."""
    if isinstance(value, BaseModel):
        return plain(value.model_dump(mode="json"))
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [plain(inner) for inner in value]
    return value
