"""What ends a run in which something is NaN or infinite, and what is said of it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rlaif_ray.errors import NotFiniteError

if TYPE_CHECKING:
    from rlaif_ray.config.sections import LearnerConfig
    from rlaif_ray.types import Experience

OF_GUARD = "the guard's text"  # in messages about what is found after weights were sent or saved
SKIPPED, IN_ROW = "/skipped_updates", "/skipped_in_row"  # how the metrics end that count updates left out


def check_updates(
    learned: Mapping[str, float], cfg: LearnerConfig, experience: Experience | None = None
) -> Mapping[str, float]:
    """The metrics of a step's updates, if the run goes on with them; `experience` is what they were computed from.

    Raises:
        NotFiniteError: some were left out, and learner.nonfinite says to stop, or there were too many in a row.
    """
    left_out = {name.removesuffix(SKIPPED): int(n) for name, n in learned.items() if name.endswith(SKIPPED) and n}
    in_row = max((int(n) for name, n in learned.items() if name.endswith(IN_ROW)), default=0)
    if not left_out or (cfg.nonfinite == "skip" and in_row < cfg.nonfinite_limit):
        return learned
    found = [f"{name} is {value}" for name, value in learned.items() if not math.isfinite(value)]
    parts = [] if experience is None else no_numbers(experience)
    if parts:
        found.append(f"so are the {', '.join(parts)} that it was computed from")
    counted = " and ".join(f"{n} of {name}" for name, n in left_out.items())
    limit = f", {in_row} in a row (learner.nonfinite_limit={cfg.nonfinite_limit})" if cfg.nonfinite == "skip" else ""
    raise NotFiniteError(
        f"the loss or the gradient of an update is NaN or infinite ({'; '.join(found)}). It was not applied "
        f"(updates left out: {counted}{limit})"
    )


def no_numbers(experience: Experience) -> list[str]:
    """Names of the parts of a batch that have values which are NaN or infinite."""
    mask = experience.mask
    parts = {
        "scores": experience.scores,
        "sampler's log-probabilities": experience.sampler_logprobs,
        "policy's log-probabilities": experience.logprobs,
        "reference's log-probabilities": experience.ref_logprobs,
        "critic's values": experience.values,
        "advantages": experience.advantages,
        "returns": experience.returns,
    }
    return [
        name
        for name, part in parts.items()
        if part is not None and not bool((part[mask] if part.shape == mask.shape else part).isfinite().all())
    ]


def require_numbers(values: Iterable[float], what: str) -> None:
    """Raises NotFiniteError where some are NaN or infinite; `what` they are, such as "held-out losses"."""
    values = list(values)
    bad = [value for value in values if not math.isfinite(value)]
    if bad:
        raise NotFiniteError(f"{len(bad)} of {len(values)} {what} are NaN or infinite (the first is {bad[0]})")


def how_to_go_on(error: Exception, job: Any, last_step: int, checkpoint: str | None) -> NotFiniteError:
    """`error`, which may be Ray's with ours in it, with where the run stopped, likely causes and remedies."""
    what = str(getattr(error, "cause", None) or error)
    learner, precision = job.learner, job.policy.precision
    causes: Sequence[str] = [
        f"learner.lr={learner.lr:g} is too high",
        *([] if precision == "fp32" else ["bf16 overflows where policy.precision=fp32 does not"]),
        "the data has extreme rewards or texts",
    ]
    anew = "start anew with it in another run_dir, or with checkpoint.resume=never"
    skip = ", and with learner.nonfinite=skip it leaves such updates out" if learner.nonfinite == "stop" else ""
    kept = "" if OF_GUARD in what else " Nothing of it was saved or sent to engines."
    there = (
        f"The last checkpoint, of finite weights, is {checkpoint}: the same command goes on from there{skip}. Another "
        f"learning rate is another run: {anew}."
        if checkpoint is not None
        else f"There is no checkpoint (checkpoint.every={job.checkpoint.every}). Change the setting, and {anew}."
    )
    return NotFiniteError(
        f"training stopped after step {last_step}: {what}.{kept} Likely causes: {'; '.join(causes)}. {there}"
    )
