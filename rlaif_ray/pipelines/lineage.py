"""Whose feedback a model learned from, by what its run and those before it left on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from rlaif_ray.data.preferences import read_preferences
from rlaif_ray.documents import at, read_yaml
from rlaif_ray.errors import DocumentError, InputError, RunError


def taught_by(arms: Mapping[str, str]) -> tuple[dict[str, list[str]], dict[str, list[str]]]:
    """Of each arm, by its model or answers, the judges it learned from, and what keeps that from being known."""
    judges, unclear = {}, {}
    for arm, model in arms.items():
        notes: list[str] = []
        judges[arm] = sorted(training_judges(model, notes))
        if notes:
            unclear[arm] = notes
    return judges, unclear


def training_judges(model: str, notes: list[str]) -> set[str]:
    """Judge models behind a model's training, as far as runs of ours tell: directly, by a reward model, by labels, or
    by what it started from. Empty for a model from elsewhere.

    Anything may lie beside a model: what can't be read is told in `notes`, and does not end the search.
    """
    found: set[str] = set()
    left, seen = [model], set()
    while left:
        name = left.pop()
        try:
            resolved = Path(name).expanduser().resolve().parent / "resolved.yaml"
            if resolved in seen or not resolved.is_file():
                continue
            seen.add(resolved)
            config = read_yaml(resolved, dict)
        except (OSError, DocumentError, ValueError, RuntimeError) as error:  # paths that are none raise each of them
            told = error if isinstance(error, DocumentError) else f"can't be read ({error})"
            notes.append(f"{name} may have learned from the judge: the resolved.yaml beside it {told}")
            continue
        for scorer in _scorers(config.get("feedback")):
            judge, reward_model = (at(scorer, *path, expected=str) for path in (("judge", "model"), ("model",)))
            if at(scorer, "type") == "judge":
                found |= {judge} if judge else set()
                notes += [f"{name} may have learned from the judge: {resolved} names no model of its own"] * (not judge)
            elif at(scorer, "type") == "reward_model":
                left += [reward_model or ""]
        data = at(config, "data", "path", expected=str) or ""
        left += [at(config, "policy", "model", expected=str) or "", data]  # records of ours lie in a run's folder too
        if "dpo" in config or "reward" in config:
            found |= _labelled_by(data)
    return found


def _scorers(feedback: Any) -> Iterator[Any]:
    if at(feedback, "type") == "mixture":
        for part in (at(feedback, "scorers", expected=dict) or {}).values():
            yield at(part, "scorer")
    elif feedback:
        yield feedback


def _labelled_by(path: str) -> set[str]:
    """The judge of a file of records, by its first one."""
    try:
        first = next(iter(read_preferences(path, limit=1)))
    except (InputError, RunError, StopIteration, OSError, ValueError, RuntimeError):
        return set()  # labels that are no more; a path that is none
    return {first.judge["model"]} if first.judge is not None and first.judge["model"] else set()
