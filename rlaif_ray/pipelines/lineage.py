"""Whose feedback a model learned from, by what its run and those before it left on disk."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from rlaif_ray.config.layers import ConfigLoader
from rlaif_ray.data.preferences import read_preferences
from rlaif_ray.errors import InputError
from rlaif_ray.paths import expand_home


def training_judges(model: str) -> set[str]:
    """Judge models behind a model's training, as far as runs of ours tell: directly, by a reward model, by labels, or
    by what it started from. Empty for a model from elsewhere.
    """
    found: set[str] = set()
    left, seen = [model], set()
    while left:
        name = left.pop()
        resolved = expand_home(name).resolve().parent / "resolved.yaml"
        if resolved in seen or not resolved.is_file():
            continue
        seen.add(resolved)
        config = yaml.load(resolved.read_text(), ConfigLoader)
        if not isinstance(config, dict):
            continue
        for scorer in _scorers(config.get("feedback") or {}):
            if scorer.get("type") == "judge":
                found.add(scorer["judge"]["model"])
            elif scorer.get("type") == "reward_model":
                left.append(scorer["model"])
        left.append((config.get("policy") or {}).get("model", ""))
        data = (config.get("data") or {}).get("path") or ""
        left.append(data)  # records of ours lie in their run's folder too, as models do
        if "dpo" in config or "reward" in config:
            found |= _labelled_by(data)
    return found


def _scorers(feedback: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    if feedback.get("type") == "mixture":
        for part in feedback["scorers"].values():
            yield part["scorer"]
    elif feedback:
        yield feedback


def _labelled_by(path: str) -> set[str]:
    """The judge of a file of records, by its first one."""
    try:
        first = next(iter(read_preferences(path, limit=1)))
    except (InputError, StopIteration):
        return set()
    return {first.judge["model"]} if first.judge is not None and first.judge["model"] else set()
