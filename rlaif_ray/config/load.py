"""From files and overrides to a job's config: defaults < files left to right < key=value."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from rlaif_ray.config.jobs import JOBS
from rlaif_ray.config.layers import (
    Key,
    Origin,
    default_values,
    merge_layer,
    read_file,
    read_overrides,
)
from rlaif_ray.config.problems import Source, validate
from rlaif_ray.errors import InputError
from rlaif_ray.paths import expand_home


@dataclass(frozen=True, slots=True)
class Loaded:
    """A job's config, with what it came from."""

    job: str  # its name in JOBS
    config: Any  # JOBS[job]; `run_dir` is always set
    run_dir: Path  # this run's own folder; not created yet
    run_dir_given: bool  # set by a file or an override, not made up here
    files: tuple[Path, ...]
    overrides: tuple[str, ...]


def load_job(job: str, files: Sequence[Path], overrides: Sequence[str] = ()) -> Loaded:
    """Loads and checks a job's config. All problems are told at once, in one InputError."""
    model = JOBS[job]
    values: dict[str, Any] = default_values(model)
    origins: dict[Key, Origin] = {}
    problems: list[str] = []
    source = Source(" and ".join(map(str, files)) or "the settings")
    for layer in [*(read_file(Path(file)) for file in files), read_overrides(overrides)]:
        values = merge_layer(model, values, origins, layer)
        problems += layer.problems
    if isinstance(values.get("stages"), dict) and "stages" not in model.model_fields:
        place = origins.get(("stages",))
        raise InputError(
            f"{source.name} is a pipeline (got stages, {place.place if place else 'in its settings'}), and no config "
            f"of rlaif {job}. Start it by rlaif pipeline {' '.join(map(str, files))}."
        )
    # A source that couldn't be read might have set what a cross-check would complain of.
    config, wrong = validate(model, values, origins, cross_checks=not problems, source=source)
    problems += wrong
    if problems or config is None:
        complain(problems)

    given = getattr(config, "run_dir", None)
    if not given and (place := getattr(getattr(config, "checkpoint", None), "path", None)):
        raise InputError(
            f"checkpoint.path={place} needs a run_dir (got none): the checkpoints there are the run's of that folder, "
            f"and a default one has another name each time, so the same command would not go on from them. Set "
            f"run_dir=PATH."
        )
    stem = Path(files[0]).stem if files else job
    run_dir = expand_home(given or f"runs/{stem}-{time.strftime('%Y%m%d-%H%M%S')}")
    return Loaded(
        job=job,
        config=config.model_copy(update={"run_dir": str(run_dir)}),
        run_dir=run_dir,
        run_dir_given=bool(given),
        files=tuple(Path(file) for file in files),
        overrides=tuple(overrides),
    )


def complain(problems: Sequence[str]) -> NoReturn:
    """Raises one InputError with every problem."""
    if len(problems) == 1:
        raise InputError(problems[0])
    raise InputError(
        "\n".join([f"the config has {len(problems)} problems:", *(f"  - {problem}" for problem in problems)])
    )
