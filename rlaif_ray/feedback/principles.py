"""Constitutions: the written principles by which a judge criticises, revises and compares (Bai et al. 2212.08073).

A principle's `comparison_question` is a whole question on its own, and asks which response is BETTER by that principle.
It stands where {principle} does in a preference template that asks for the better response; other templates take none.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rlaif_ray.errors import InputError
from rlaif_ray.feedback.files import LIST, NUMBER, TEXT, WHOLE, Source, find, key_problems, nearest, read, refuse, shown

SHIPPED = Path(__file__).with_name("constitutions")

PrincipleText = Literal["critique_request", "revision_request", "comparison_question"]
TEXTS: tuple[PrincipleText, ...] = ("critique_request", "revision_request", "comparison_question")

_KEYS = {"id": TEXT, "version": WHOLE, "principles": LIST}
_PRINCIPLE_KEYS: dict[str, str] = {"id": TEXT, "weight": NUMBER}
_PRINCIPLE_KEYS |= dict.fromkeys(TEXTS, TEXT)
_PLACEHOLDER = re.compile(r"\{\w*\}")


@dataclass(frozen=True, slots=True)
class Principle:
    """One principle; it has at least one of the three texts."""

    id: str
    critique_request: str | None = None  # asks what of a response goes against the principle
    revision_request: str | None = None  # asks for the response rewritten by it
    comparison_question: str | None = None  # a whole question: which of two responses is better by it
    weight: float = 1.0  # how often it is drawn, beside the others' weights


@dataclass(frozen=True, slots=True)
class Constitution:
    """Principles, of which one is drawn for every comparison or revision."""

    id: str
    version: int
    principles: tuple[Principle, ...]

    @property
    def hash(self) -> str:
        """Of everything that shapes prompts and draws, so not of id and version, nor of the principles' order."""
        shape = sorted((asdict(principle) for principle in self.principles), key=lambda principle: str(principle["id"]))
        return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:12]


def draw_principle(
    constitution: Constitution,
    key: str,
    seed: int,
    *,
    needs: PrincipleText | tuple[PrincipleText, ...],
    only: tuple[str, ...] | None = None,
) -> Principle:
    """The principle of `seed` and `key` (a comparison's id, say), drawn by weight.

    Each principle has an exponential waiting time of its own, of rate `weight`, from the hash of seed, key and its id;
    the shortest wins, with probability weight / sum of weights. So a draw depends neither on the draws before it nor
    on the order of the principles, and one that `only` leaves out changes only the draws that it would have won.

    Raises:
        InputError: as `eligible` does.
    """
    return min(eligible(constitution, needs, only), key=lambda principle: _waiting_time(principle, key, seed))


def _waiting_time(principle: Principle, key: str, seed: int) -> float:
    digest = hashlib.sha256(json.dumps([seed, key, principle.id]).encode()).digest()
    uniform = ((int.from_bytes(digest[:8], "big") >> 11) + 0.5) / 2**53  # in (0, 1), both ends left out
    return -math.log(uniform) / principle.weight


def eligible(
    constitution: Constitution,
    needs: PrincipleText | tuple[PrincipleText, ...],
    only: tuple[str, ...] | None = None,
) -> tuple[Principle, ...]:
    """The principles that have the texts needed, or those of `only`, which all must have them.

    Raises:
        InputError: there is none; or `only` names one that the constitution doesn't have, or that lacks a text.
    """
    texts = (needs,) if isinstance(needs, str) else needs
    known = {principle.id: principle for principle in constitution.principles}
    lacking = {
        principle.id: [text for text in texts if getattr(principle, text) is None]
        for principle in constitution.principles
    }
    problems = []
    for name in only or ():
        if name not in known:
            hint = nearest(name, known, cutoff=0.5) or f" (it has {', '.join(known)})"
            problems.append(f"constitution {constitution.id} has no principle {name!r}{hint}")
        elif lacking[name]:
            problems.append(
                f"principle {name!r} of constitution {constitution.id} has no {' and no '.join(lacking[name])}"
            )
    wanted = constitution.principles if only is None else tuple(known[name] for name in known if name in only)
    chosen = tuple(principle for principle in wanted if not lacking[principle.id])
    if not problems and not chosen:
        what = f"has a {' and a '.join(texts)}" if only is None else "is named"
        problems.append(f"no principle of constitution {constitution.id} {what}, so none can be drawn")
    if problems:
        raise InputError("\n".join(f"{problem}. Name others, or add to the constitution." for problem in problems))
    return chosen


# ---- Loading ---------------------------------------------------------------------------------------------------------


def load_constitution(name_or_path: str, setting: str = "label.constitution") -> Constitution:
    """A shipped constitution by name, or a user's own YAML file (its name ends in .yaml, or has a folder).

    `setting` is what error messages call it.

    Raises:
        InputError: tells everything that is wrong with it, by line.
    """
    path = find(name_or_path, SHIPPED, setting)
    source = read(path, setting)
    refuse(source, "constitution", _problems(source), SHIPPED / "short.yaml")
    values = source.values
    return Constitution(values["id"].strip(), values["version"], tuple(map(_principle, values["principles"])))


def _principle(entry: dict[str, Any]) -> Principle:
    texts = {key: entry[key].strip() for key in ("id", *TEXTS) if key in entry}
    return Principle(**texts, weight=float(entry.get("weight", 1.0)))


def _problems(source: Source) -> Iterator[str]:
    values = source.values
    yield from key_problems(source, values, _KEYS)
    if isinstance(values.get("id"), str) and not values["id"].strip():
        yield f"{source.line('id')}: id must not be empty"
    entries = values.get("principles")
    if entries == []:
        yield f"{source.line('principles')}: principles must have at least one"
    seen: dict[str, str] = {}  # id -> its line
    for index, entry in enumerate(entries if isinstance(entries, list) else ()):
        at = ("principles", str(index))
        if not isinstance(entry, dict):
            yield f"{source.line(*at)}: a principle must have an id and texts (got {shown(entry)})"
            continue
        yield from _principle_problems(source, at, entry)
        name = entry.get("id")
        if isinstance(name, str) and name.strip():
            line = source.line(*at, "id")
            if name.strip() in seen:
                yield f"{line}: id {name.strip()!r} stands on {seen[name.strip()]} already: draws go by it"
            seen.setdefault(name.strip(), line)


def _principle_problems(source: Source, at: tuple[str, ...], entry: dict[str, Any]) -> Iterator[str]:
    yield from key_problems(source, entry, _PRINCIPLE_KEYS, optional=(*TEXTS, "weight"), at=at)
    for key in ("id", *TEXTS):
        value = entry.get(key)
        if isinstance(value, str) and not value.strip():
            yield f"{source.line(*at, key)}: {key} must not be empty"
        for slot in _PLACEHOLDER.findall(value) if isinstance(value, str) and key != "id" else ():
            yield f"{source.line(*at, key)}: {key} has the placeholder {slot}, and nothing fills it: write plain text"
    if not any(key in entry for key in TEXTS):
        yield f"{source.line(*at)}: a principle must have one of {', '.join(TEXTS)}"
    weight = entry.get("weight", 1.0)
    if isinstance(weight, int | float) and not isinstance(weight, bool) and not (math.isfinite(weight) and weight > 0):
        yield f"{source.line(*at, 'weight')}: weight must be above 0 and finite (got {weight})"
