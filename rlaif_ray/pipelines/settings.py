"""The settings that a run was started with, kept where it goes on from, and compared when it does."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from rlaif_ray.config.roles import Change, Names, changes, settings, shown
from rlaif_ray.errors import InputError
from rlaif_ray.feedback import principles, revision, templates
from rlaif_ray.feedback.files import find, read

if TYPE_CHECKING:
    from pathlib import Path


def kept_settings(job: BaseModel) -> dict[str, Any]:
    """All settings of a job, and hashes of the texts that they name; goes into JSON."""
    return {"config": job.model_dump(mode="json"), "contents": contents(job)}


def contents(job: BaseModel) -> dict[str, str]:
    """Hashes of what the settings of a job name, by dotted key: of templates, exemplars and constitutions.

    Raises:
        InputError: one of them is wrong.
    """
    found = {}
    for setting in settings(job):
        if setting.names is not None and setting.names.kind == "text" and setting.value is not None:
            key = ".".join(setting.key)
            found[key] = _text_hash(setting.names, setting.value, key)
    return found


def _text_hash(names: Names, value: str, key: str) -> str:
    """Of what it says; comments and the file's place don't count."""
    match names.text:
        case "score template":
            return templates.load_template(value).hash
        case "preference template":
            return templates.load_template(value, kind="preference").hash
        case "constitution":
            return principles.load_constitution(value, key).hash
        case "exemplars":
            return _file_hash(find(value, templates.EXEMPLARS, key), key)
        case _:
            assert names.text == "revision examples", names
            return _file_hash(find(value, revision.SHIPPED, key), key)


def _file_hash(path: Path, key: str) -> str:
    return hashlib.sha256(json.dumps(read(path, key).values, sort_keys=True).encode()).hexdigest()[:12]


def changed_settings(kept: Mapping[str, Any], job: BaseModel, *, holds: str, anew: str) -> list[Change]:
    """What has changed since `kept_settings`, and may.

    Args:
        kept: as `kept_settings` gave it.
        holds: what there is to go on from, for the message: "runs/x/checkpoints has a checkpoint of another run".
        anew: how to start anew.

    Raises:
        InputError: something has changed that must not; tells all of it.
        ValueError: `kept` is no such thing.
    """
    try:
        then = type(job).model_validate(kept["config"])
        found = changes(then, job, kept["contents"], contents(job))
    except (KeyError, TypeError, ValidationError) as error:
        raise ValueError(f"its settings can't be read: {str(error).splitlines()[0]}") from error
    fixed = [change for change in found if not change.role.resume]
    if fixed:
        raise InputError(
            f"{holds}: {'; '.join(map(str, fixed))}. Results of both would be mixed. To go on, use the old "
            f"{'values' if len(fixed) > 1 else 'value'}; to start anew, use {anew}."
        )
    return found


def noted(found: Sequence[Change], step: int | None) -> list[dict[str, Any]]:
    """Changes as they are kept; `step` is the last with the old values, None in jobs without steps."""
    return [{"step": step, "key": one.key, "then": one.then, "now": one.now} for one in found]


def history(changes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Changes that were kept, a line each."""
    return [
        f"{one['key']} from {shown(one['then'])} to {shown(one['now'])}"
        + ("" if one["step"] is None else f" after step {one['step']}")
        for one in changes
    ]
