"""The settings that a run was started with, kept where it goes on from, and compared when it does."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pydantic import BaseModel, ValidationError

from rlaif_ray.config.roles import Change, changes, shown, with_values
from rlaif_ray.data.identity import Content
from rlaif_ray.errors import InputError
from rlaif_ray.pipelines.begun import in_kept_precision
from rlaif_ray.pipelines.inputs import contents

if TYPE_CHECKING:
    from rlaif_ray.config.algorithms import AlgorithmBase
    from rlaif_ray.storage import StoredFolder


def kept_settings(job: BaseModel, holds: Mapping[str, Content] | None = None) -> dict[str, Any]:
    """All settings of a job, and what it reads holds; goes into JSON.

    Args:
        holds: contents, where they have been looked at already.
    """
    now = contents(job) if holds is None else holds
    return {
        "job": type(job).__name__,
        "config": job.model_dump(mode="json"),
        "contents": {key: content.as_json() for key, content in now.items()},
    }


def changed_settings(
    kept: Mapping[str, Any],
    job: BaseModel,
    now: Mapping[str, Content] | None = None,
    *,
    holds: str,
    anew: str,
    folder: StoredFolder | None = None,
) -> list[Change]:
    """What has changed since `kept_settings`, and may. Precisions are compared by what they came to.

    Args:
        kept: as `kept_settings` gave it.
        now: what the job reads holds, where it has been looked at already.
        holds: what there is to go on from, for the message: "runs/x/checkpoints has a checkpoint of another run".
        anew: how to start anew.
        folder: the checkpoint that `kept` is of.

    Raises:
        InputError: something has changed that must not; tells all of it.
        ValueError: `kept` is no such thing.
    """
    try:
        if kept["job"] != type(job).__name__:
            raise KeyError(f"they are of {kept['job']}")
        then = in_kept_precision(type(job).model_validate(kept["config"]), kept, folder)
        job = in_kept_precision(job, kept, folder)
        before = {key: one for key, value in kept["contents"].items() if (one := Content.of_json(value)) is not None}
        now = contents(job) if now is None else now
        # Of the same content, whatever is known of it besides, both get the same.
        same = {key: now[key].known_by for key in before.keys() & now.keys() if now[key].same_as(before[key])}
        digests = (
            {key: f"{one.known_by} {one.commit or ''}".strip() for key, one in all_.items()} | same
            for all_ in (before, now)
        )
        found = [one for one in changes(*_in_force(then, job), *digests) if not _is_same_commit(one, same)]
    except (KeyError, TypeError, AttributeError, ValidationError) as error:
        raise ValueError(f"its settings can't be read: {str(error).splitlines()[0]}") from error
    fixed = [change for change in found if not change.role.resume]
    if fixed:
        told = "; ".join(_told(change, before, now) for change in fixed)
        raise InputError(
            f"{holds}: {told}. Results of both would be mixed. To go on, use the old "
            f"{'values' if len(fixed) > 1 else 'value'}; to start anew, use {anew}."
        )
    return found


def _in_force(*jobs: Any) -> list[Any]:
    """The jobs with the importance weights that are in force in their precision, where that is known and the same: in
    fp32 there are none, whatever the config sets for bf16."""
    precisions = {job.policy.precision if hasattr(job, "algorithm") else "auto" for job in jobs}
    if len(precisions) > 1 or "auto" in precisions:
        return list(jobs)
    found = []
    for job in jobs:
        algorithm: AlgorithmBase = job.algorithm
        weights = algorithm.importance_in(job.policy.precision)
        in_force = None if weights is None else weights.model_copy(update={"when": "always"})
        found.append(with_values(job, {("algorithm", "importance"): in_force}))
    return found


def _is_same_commit(change: Change, same: Collection[str]) -> bool:
    """Whether a revision has another name, and what it names is the same."""
    section, _, name = change.key.rpartition(".")
    return name == "revision" and f"{section}.model".removeprefix(".") in same


def _told(change: Change, before: Mapping[str, Content], now: Mapping[str, Content]) -> str:
    was, is_ = before.get(change.key), now.get(change.key)
    if was is not None and is_ is not None and was.name == is_.name:
        told = f"{change.key}: {is_.told(was)}"
        if was.commit is None or was.digest != is_.digest:
            return told
        section, _, name = change.key.rpartition(".")
        pinned = f"{section}.revision={was.commit}" if name == "model" else f"{change.key}={was.name}@{was.commit}"
        return f"{told} (the old value is {pinned.removeprefix('.')})"
    return str(change)


def noted(found: Sequence[Change], step: int | None) -> list[dict[str, Any]]:
    """Changes as they are kept; `step` is the last with the old values, None in jobs without steps."""
    return [{"step": step, "key": one.key, "then": one.then, "now": one.now} for one in found]


def history(changes: Sequence[Mapping[str, Any]]) -> list[str]:
    """Changes that were kept, a line each."""
    return [
        f"{one.get('key')} from {shown(one.get('then'))} to {shown(one.get('now'))}"
        + ("" if one.get("step") is None else f" after step {one['step']}")
        for one in changes
        if isinstance(one, dict)
    ]
