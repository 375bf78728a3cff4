"""This room's YAML files, shipped or a user's own: found by name or path, and read with the line of every value."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlaif_ray.config.layers import Key, Origins, read_file
from rlaif_ray.errors import InputError
from rlaif_ray.paths import expand_home

TEXT, WHOLE, NUMBER, LIST, TEXTS = "a text", "a whole number", "a number", "a list", "a list of texts"
_CLASSES: dict[str, tuple[type, ...]] = {
    TEXT: (str,),
    WHOLE: (int,),
    NUMBER: (int, float),
    LIST: (list,),
    TEXTS: (list,),
}


@dataclass(frozen=True, slots=True)
class Source:
    """A YAML file as it was read."""

    path: Path
    values: dict[str, Any]
    origins: Origins  # "mine.yaml, line 3", by key; items of lists have their index in it
    problems: tuple[str, ...]  # that reading met; `values` is what could be read all the same

    def line(self, *key: str) -> str:
        """ "line 3", of a key or, where the file doesn't have it, of what would have to hold it."""
        while key and key not in self.origins:
            key = key[:-1]
        origin = self.origins.get(key)
        return (origin.place if origin else "line 1").removeprefix(f"{self.path}, ")


def find(name_or_path: str, shipped: Path, setting: str) -> Path:
    """A file of the folder `shipped` by name, or a user's own (its name ends in .yaml or .yml, or has a folder).

    Raises:
        InputError: no shipped file has that name; speaks of `setting`.
    """
    if Path(name_or_path).suffix in (".yaml", ".yml") or "/" in name_or_path:
        return expand_home(name_or_path)
    names = sorted(path.stem for path in shipped.glob("*.yaml"))
    if name_or_path in names:
        return shipped / f"{name_or_path}.yaml"
    raise InputError(
        f"{setting} must be one of {', '.join(names)} or a path to a YAML file (got {name_or_path!r}: nothing shipped "
        f"has that name){nearest(name_or_path, names, cutoff=0.5) or '.'}"
    )


def read(path: Path, setting: str) -> Source:
    """Reads a file.

    Raises:
        InputError: nothing of it can be read.
    """
    layer = read_file(path)
    if layer.problems and not layer.values:
        raise InputError(f"{setting}: " + "\n".join(layer.problems))
    return Source(path, layer.values, layer.origins, tuple(layer.problems))


def refuse(source: Source, what: str, problems: Iterable[str], example: Path) -> None:
    """Raises InputError with every problem, if there is one."""
    found = [*source.problems, *problems]
    if found:
        lines = "".join(f"\n  - {problem}" for problem in found)
        raise InputError(f"{what} {source.path} can't be used:{lines}\nCompare it with {example}.")


def nearest(name: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """ "; did you mean X?", or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=cutoff)
    return f"; did you mean {near[0]}?" if near else ""


def right_type(value: Any, expected: str) -> bool:
    if expected == TEXTS and isinstance(value, list):
        return all(isinstance(item, str) for item in value)
    return isinstance(value, _CLASSES[expected]) and not isinstance(value, bool)


def key_problems(
    source: Source, values: Mapping[str, Any], known: Mapping[str, str], optional: Collection[str] = (), at: Key = ()
) -> Iterator[str]:
    """Missing and unknown keys of the mapping that stands `at` a key of the file, and values of the wrong type.

    `known` says which type each key's value has: TEXT, WHOLE, ...
    """
    for key in known:
        if key not in values and key not in optional:
            yield f"{source.line(*at)}: key {key!r} is missing"
    for key in values:
        if key not in known:
            hint = nearest(key, known) or f" (known: {', '.join(known)})"
            yield f"{source.line(*at, key)}: key {key!r} is unknown{hint}"
    for key, expected in known.items():
        if key in values and not right_type(values[key], expected):
            yield f"{source.line(*at, key)}: {_wrong_type(source, (*at, key), values[key], expected)}"


def _wrong_type(source: Source, key: Key, value: Any, expected: str) -> str:
    def written(key: Key, value: Any) -> str:  # YAML makes 4.867e+55 of 4867e52
        origin = source.origins.get(key)
        if origin is not None and origin.written and expected in (TEXT, TEXTS) and not isinstance(value, str):
            return origin.written
        return shown(value)

    if expected == TEXTS and isinstance(value, list):
        strays = ", ".join(written((*key, str(i)), v) for i, v in enumerate(value) if not isinstance(v, str))
        return f"{key[-1]} must be {expected} (got {strays} in it)"
    got = written(key, value)
    remedy = f': put it in quotes, "{got}"' if expected == TEXT and isinstance(value, bool | int | float) else ""
    return f"{key[-1]} must be {expected} (got {got}){remedy}"


def shown(value: Any) -> str:
    """A value in an error message, not too long."""
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
