"""Checkpoints of an RL run: a folder that appears whole or not at all, and where to go on."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rlaif_ray.config.jobs import SupervisedJob, TrainJob
from rlaif_ray.errors import CheckpointError, InputError
from rlaif_ray.folders import publish_folder

if TYPE_CHECKING:
    from rlaif_ray.config.sections import CheckpointConfig

STATE = "state.json"


class Checkpointed(Protocol):
    """What writes its own part of a checkpoint."""

    def save_checkpoint(self, folder: str) -> None: ...


@dataclass(slots=True)
class RunState:
    """What the loop carries from step to step, beside the learner's own state."""

    step: int = 0
    kl_coef: float = 0.0
    prompts: dict[str, Any] = field(default_factory=dict)  # PromptSource.state()
    held_out_before: list[float | None] | None = None


def due(step: int, every: int, last: int | None = None) -> bool:
    """Whether something that happens every so many steps (0: never), and at the last, happens now."""
    return every > 0 and (step % every == 0 or step == last)


def must_match(job: TrainJob | SupervisedJob) -> dict[str, Any]:
    """Settings that a checkpoint can't be resumed under if they differ."""
    if isinstance(job, SupervisedJob):
        return {
            "policy.model": job.policy.model,
            "data.path": job.data.path,
            "data.limit": job.data.limit,
            "training": job.training.model_dump(mode="json", exclude={"evaluate_every", "human_path"}),
            "learner.ranks": job.learner.ranks,
            "learner.zero_stage": job.learner.zero_stage,
            "seed": job.seed,
        }
    return {
        "policy.model": job.policy.model,
        "algorithm.type": job.algorithm.type,
        "learner.ranks": job.learner.ranks,
        "learner.zero_stage": job.learner.zero_stage,
        "data.path": job.data.path,
        "data.split": job.data.split,
        "data.column": job.data.column,
        "data.limit": job.data.limit,
        "data.system": job.data.system,
        "data.shuffle": job.data.shuffle,
        "sampling.prompts_per_step": job.sampling.prompts_per_step,
        "seed": job.seed,
    }


def newest(run_dir: Path, cfg: CheckpointConfig | None = None) -> Path | None:
    """The newest complete checkpoint of the run, if `cfg` lets it be resumed."""
    found = [folder for folder in _complete(run_dir) if (folder / STATE).is_file()]
    return found[-1] if found and (cfg is None or cfg.resume == "auto") else None


def start_over(run_dir: Path) -> None:
    """Removes an earlier run's checkpoints: this run's are told from them by nothing but their steps."""
    shutil.rmtree(run_dir / "checkpoints", ignore_errors=True)


def _complete(run_dir: Path) -> list[Path]:
    folders = [p for p in (run_dir / "checkpoints").glob("step-*") if p.name.removeprefix("step-").isdigit()]
    return sorted(folders, key=lambda p: int(p.name.removeprefix("step-")))


def read_state(folder: Path, job: TrainJob | SupervisedJob, steps: int) -> RunState:
    """The loop's state in a checkpoint of a run of so many steps.

    Raises:
        InputError: the config differs from the checkpoint's in something that can't change on the way.
        CheckpointError: the state can't be read.
    """
    try:
        stored = json.loads((folder / STATE).read_text())
        state = RunState(**stored["state"])
        wanted = stored["must_match"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"checkpoint {folder} can't be read ({type(error).__name__}: {error}). "
            f"Remove it to resume from an earlier one."
        ) from error
    changed = [
        f"{k} (checkpoint {wanted.get(k)!r}, got {v!r})" for k, v in must_match(job).items() if wanted.get(k) != v
    ]
    if changed:
        raise InputError(
            f"run_dir {folder.parent.parent} has a checkpoint of another run: {'; '.join(changed)}. "
            f"Use its settings, another run_dir, or checkpoint.resume=never to start over."
        )
    if state.step > steps:
        raise InputError(
            f"steps must be at least the {state.step} that run_dir {folder.parent.parent} has taken (got {steps}). "
            f"Raise it, or use another run_dir, or checkpoint.resume=never to start over."
        )
    return state


def save(run_dir: Path, job: TrainJob | SupervisedJob, learner: Checkpointed, state: RunState) -> Path:
    """Writes `checkpoints/step-N`: into a folder of another name, flushed, then renamed; then old ones go.

    Raises:
        CheckpointError: it could not be written; earlier checkpoints are untouched.
    """
    final = run_dir.absolute() / "checkpoints" / f"step-{state.step}"
    partial = final.with_name(f".partial-{final.name}")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        learner.save_checkpoint(str(partial))
        (partial / STATE).write_text(json.dumps({"state": asdict(state), "must_match": must_match(job)}))
        publish_folder(partial, final)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {final} could not be written ({error}): the one before is intact. "
            f"Free space or correct permissions, then start the same command again."
        ) from error
    for old in _complete(run_dir)[: -job.checkpoint.keep]:
        shutil.rmtree(old, ignore_errors=True)
    return final
