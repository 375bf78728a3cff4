"""`rlaif pipeline`: one YAML that names stages, each a job with its own sections, and what passes between them."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from pydantic import Field

from rlaif_ray.config.base import Config
from rlaif_ray.config.jobs import JOBS
from rlaif_ray.config.layers import (
    STAGE,
    Key,
    Layer,
    Origin,
    Origins,
    default_values,
    merge,
    merge_layer,
    read_file,
    read_overrides,
)
from rlaif_ray.config.load import Loaded, complain
from rlaif_ray.config.problems import Source, as_typed, validate
from rlaif_ray.config.sections import ClusterConfig
from rlaif_ray.documents import at
from rlaif_ray.paths import expand_home

OF_THE_PIPELINE = ("run_dir", "output")  # where a stage's results are is not for it to say

# What passes between stages: what a job makes, and which settings take it.
MAKES = {
    "pairs": "pairs",
    "label": "labels",
    "revise": "demonstrations",
    "sample": "demonstrations",
    "sft": "policy",
    "dpo": "policy",
    "train": "policy",
    "reward-model": "reward model",
    "evaluate": "evaluation",
}
_DATA = {"label": "pairs", "reward-model": "labels", "dpo": "labels", "sft": "demonstrations"}


class PipelineJob(Config):
    """`rlaif pipeline`: stages that build on each other, in one job."""

    shared: dict[str, Any] = Field(default_factory=dict)
    """Sections for every stage whose job has them; a stage's own values stand over them."""
    stages: dict[str, dict[str, Any]]
    """By name: `job`, `config` (YAML files to begin with), and the job's own sections. A value stage:NAME is what the
    stage of that name made."""
    cluster: ClusterConfig = ClusterConfig()
    """Where all stages run; a stage may have a section of its own."""
    accept_failures: bool = False
    """Take a stage as done though some of its questions failed in a way that may pass, such as a time-out, as long as
    its smallest fraction is reached. false: the pipeline ends there, and asks them again when it is started again."""
    run_dir: str | None = None
    """The pipeline's folder, a folder for each stage in it; default runs/<config>, so that it is found again."""


@dataclass(frozen=True, slots=True)
class Stage:
    """One job of a pipeline."""

    name: str
    job: str  # its name in JOBS
    config: Any  # JOBS[job]; values stage:NAME are still in it
    needs: tuple[str, ...]  # names of the stages that it builds on

    @property
    def makes(self) -> str:
        """What it gives to other stages."""
        return MAKES[self.job]


@dataclass(frozen=True, slots=True)
class Pipeline(Loaded):
    """A pipeline's config, a PipelineJob, with what it came from."""

    stages: tuple[Stage, ...]  # each after those it builds on, else as they are written

    def stage(self, name: str, option: str) -> Stage:
        """The stage of that name; `option` is what asks for it.

        Raises ValueError, in the user's words, where there is none.
        """
        for stage in self.stages:
            if stage.name == name:
                return stage
        raise ValueError(f"{option} must name a stage (got {name!r}): {_choose(name, [s.name for s in self.stages])}")

    def after(self, name: str) -> set[str]:
        """Names of the stages that build on this one, near or far, and its own."""
        found = {name}
        for stage in self.stages:
            if found.intersection(stage.needs):
                found.add(stage.name)
        return found


def load_pipeline(files: Sequence[Path], overrides: Sequence[str] = ()) -> Pipeline:
    """Loads and checks a pipeline and all its stages. All problems are told at once, in one InputError."""
    layers = [*(read_file(Path(file)) for file in files), read_overrides(overrides)]
    values: dict[str, Any] = default_values(PipelineJob)
    origins: dict[Key, Origin] = {}
    problems: list[str] = []
    for layer in layers:
        values = merge(PipelineJob, values, layer.values)
        origins |= layer.origins
        problems += layer.problems
    source = Source(" and ".join(map(str, files)) or "the settings")
    inner = {key for key, origin in origins.items() if key[:1] in (("shared",), ("stages",)) and origin.unread}
    own = {key: origin for key, origin in origins.items() if key not in inner}  # of the others the stages know more
    config, wrong = validate(PipelineJob, values, own, cross_checks=not problems, source=source)
    problems += wrong
    if config is None:
        complain(problems)
    if config.stages and not any("job" in own for own in config.stages.values()):
        problems.append(
            f"no stage of {source.name} has a job (got {', '.join(config.stages)}): its settings may be meant to stand "
            f"over another file's. Name that file before it, or give each stage a job, such as sft."
        )
        complain(problems)
    whole = not problems  # whether all sources could be read
    stages = [
        stage
        for name in config.stages
        if (stage := _stage(name, config, layers, problems, source=source.name, whole=whole)) is not None
    ]
    problems += _unused(config, origins)
    if len(stages) == len(config.stages):
        problems += [problem for stage in stages for problem in _reference_problems(stage, stages)]
    if not config.stages:
        problems.append("stages must have at least one stage (got none): there is nothing to do. Add one.")
    if problems:
        complain(problems)
    stem = Path(files[0]).stem if files else "pipeline"
    run_dir = expand_home(config.run_dir or f"runs/{stem}")
    return Pipeline(
        job="pipeline",
        config=config.model_copy(update={"run_dir": str(run_dir)}),
        run_dir=run_dir,
        run_dir_given=True,  # the default one is the same every time
        files=tuple(Path(file) for file in files),
        overrides=tuple(overrides),
        stages=tuple(_in_order(stages)),
    )


def references(values: Any, key: Key = ()) -> Iterator[tuple[Key, str]]:
    """(key, stage's name) of every value stage:NAME."""
    if isinstance(values, Mapping):
        for name, value in values.items():
            yield from references(value, (*key, str(name)))
    elif isinstance(values, list | tuple):
        for index, value in enumerate(values):
            yield from references(value, (*key, str(index)))
    elif isinstance(values, str) and values.startswith(STAGE):
        yield key, values.removeprefix(STAGE)


def put(values: Any, replacement: Mapping[str, str]) -> Any:
    """`values` with every stage:NAME replaced."""
    if isinstance(values, Mapping):
        return {key: put(value, replacement) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [put(value, replacement) for value in values]
    if isinstance(values, str) and values.startswith(STAGE):
        return replacement[values.removeprefix(STAGE)]
    return values


# ---- Reading stages --------------------------------------------------------------------------------------------------


def _stage(
    name: str, pipeline: PipelineJob, layers: Sequence[Layer], problems: list[str], *, source: str, whole: bool
) -> Stage | None:
    """A stage's config: defaults < its files < what all stages share < its own values; None with problems.

    Args:
        source: the pipeline's files, for messages.
        whole: whether all of them could be read.
    """
    own = pipeline.stages[name]
    job = own.get("job")
    if not (name.replace("-", "").replace("_", "").isalnum() and name.isascii() and len(name) <= 100):
        problems.append(
            f"the stage {name!r} must be named by letters, digits, - and _ alone: it is a folder's name. Rename it."
        )
        return None
    if not isinstance(job, str) or job not in JOBS:
        got = "nothing" if job is None else repr(job)
        problems.append(f"stages.{name}.job must be a job (got {got}): {_choose(str(job), list(JOBS))}")
        return None
    model = JOBS[job]
    files = own.get("config", [])
    files = [files] if isinstance(files, str) else files
    if not isinstance(files, list) or not all(isinstance(file, str) for file in files):
        problems.append(f"stages.{name}.config must be YAML files (got {files!r}). Name one, or a list of them.")
        return None
    values, found = default_values(model), list[str]()
    origins: dict[Key, Origin] = {}
    sources = [read_file(Path(file)) for file in files]
    sources.append(Layer({"cluster": pipeline.cluster.model_dump(exclude_unset=True)}))
    sources += (shared := [_part(layer, ("shared",), set(model.model_fields)) for layer in layers])
    sources += (stage := [_part(layer, ("stages", name), None) for layer in layers])
    for layer in sources:
        given = {key: value for key, value in layer.values.items() if key not in ("job", "config")}
        values = merge_layer(model, values, origins, replace(layer, values=given))
        found += layer.problems
    as_typed(model, values, origins)
    for typed, parts in ((pipeline.shared, shared), (pipeline.stages[name], stage)):
        _write_typed(typed, values, {key: one for part in parts for key, one in part.origins.items()}, origins)
    for key in OF_THE_PIPELINE:
        if values.get(key) is not None and key in {first for first, *_ in origins}:
            found.append(f"{key} is not for a stage to say: the pipeline gives each a folder of its own. Remove it.")
            values[key] = None
    place = Source(f"stages.{name} or shared of {source}" + "".join(f", or {f}" for f in files), f"stages.{name}.")
    config, wrong = validate(model, values, origins, source=place, cross_checks=whole and not found)
    found += wrong
    problems += [f"stage {name}: {problem}" for problem in found]
    if config is None or found:
        return None
    needs = tuple(dict.fromkeys(other for _, other in references(config.model_dump(mode="json"))))
    return Stage(name, job, config, needs)


def _write_typed(target: dict[str, Any], values: Any, own: Origins, origins: Origins) -> None:
    """Writes into what the pipeline keeps of its files what the command line's values are to the stage: texts where
    its settings are texts. `own` are the origins of the target, `origins` those that counted."""
    for key, origin in own.items():
        if not origin.typed or origins.get(key) is not origin:
            continue
        inside: Any = target
        for part in key[:-1]:
            inside = inside.get(part) if isinstance(inside, dict) else None
        value = at(values, *key)
        if isinstance(inside, dict) and key[-1] in inside and not isinstance(value, dict | list):
            inside[key[-1]] = value


def _part(layer: Layer, prefix: Key, names: set[str] | None) -> Layer:
    """What a layer says under a key; only of these names, if given."""
    values: Any = layer.values
    for part in prefix:
        values = values.get(part) if isinstance(values, dict) else None
    values = values if isinstance(values, dict) else {}
    n = len(prefix)
    origins = {key[n:]: place for key, place in layer.origins.items() if key[:n] == prefix and len(key) > n}
    if names is not None:
        values = {name: value for name, value in values.items() if name in names}
        origins = {key: place for key, place in origins.items() if key[0] in names}
    return Layer(values, origins)


def _unused(pipeline: PipelineJob, origins: Origins) -> Iterator[str]:
    """Sections that are shared and that no stage has."""
    jobs = [JOBS[own["job"]] for own in pipeline.stages.values() if str(own.get("job")) in JOBS]
    if not jobs:  # told already, and nothing is known of their sections
        return
    known = {name for job in jobs for name in job.model_fields}
    for name in pipeline.shared:
        if name not in known:
            place = origins.get(("shared", name))
            told = f" ({place.place})" if place else ""
            yield f"shared.{name} is a section of no stage's job{told}: {_choose(name, sorted(known))}"


# ---- What passes between them ----------------------------------------------------------------------------------------


def _reference_problems(stage: Stage, stages: Sequence[Stage]) -> Iterator[str]:
    by_name = {other.name: other for other in stages}
    for key, name in references(stage.config.model_dump(mode="json")):
        where = f"stages.{stage.name}.{'.'.join(key)}"
        wanted = _takes(stage, key)
        if name not in by_name:
            yield f"{where}={STAGE}{name} names no stage: {_choose(name, [other.name for other in stages])}"
        elif wanted is None:
            yield f"{where} can't be what a stage made (got {STAGE}{name}). Give a value of its own."
        elif by_name[name].makes != wanted:
            fitting = [other.name for other in stages if other.makes == wanted]
            yield (
                f"{where} takes {wanted} (got {STAGE}{name}, which makes {by_name[name].makes}). "
                + (f"Use {STAGE}{' or '.join(fitting)}." if fitting else "Add a stage that makes them.")
            )
        elif stage.name in _before(name, by_name):
            yield f"{where}={STAGE}{name} builds on {stage.name} itself: neither could be first. Break the circle."


def _takes(stage: Stage, key: Key) -> str | None:
    """What a setting takes from another stage, None for nothing."""
    if key == ("data", "path"):
        return _DATA.get(stage.job)
    if stage.job == "evaluate" and key[0] == "arms" and key[-1] == "path":
        return "demonstrations"
    if key[-1] != "model":
        return None
    section = stage.config
    for part in key[:-1]:
        section = section[part] if isinstance(section, dict) else getattr(section, part)
    return "reward model" if getattr(section, "type", None) == "reward_model" else "policy"


def _before(name: str, by_name: Mapping[str, Stage]) -> set[str]:
    """Names of the stages that this one builds on, near or far, and its own."""
    found: set[str] = set()
    left = [name]
    while left:
        one = left.pop()
        if one not in found and one in by_name:
            found.add(one)
            left += by_name[one].needs
    return found


def _in_order(stages: Sequence[Stage]) -> Iterator[Stage]:
    """Each after those that it builds on, else as they are written."""
    done: set[str] = set()
    left = list(stages)
    while left:
        stage = next(stage for stage in left if done.issuperset(stage.needs))
        left.remove(stage)
        done.add(stage.name)
        yield stage


def _choose(got: str, names: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(got, names, n=1)
    if not names:
        return "there is none."
    return f"did you mean {nearest[0]!r}?" if nearest else f"choose among {', '.join(names)}."
