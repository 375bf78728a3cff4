"""`rlaif pipeline`: stages in one job; each one's results are addressed by what they follow from.

A stage's folder is named by the hash of its config and of everything that it reads, the hashes of the stages it builds
on among them. So a re-run does what changed and nothing else, a killed run goes on in the stage that it was in, and
results of other settings stay where they are.
"""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import rlaif_ray
from rlaif_ray.config.jobs import EvaluateJob, LabelJob, ReviseJob, SampleJob, TrainJob
from rlaif_ray.config.load import Loaded
from rlaif_ray.config.pipeline import STAGE, Pipeline, Stage, put
from rlaif_ray.config.sections import JudgeFeedback
from rlaif_ray.errors import InputError, RlaifError, RunError
from rlaif_ray.feedback.principles import load_constitution
from rlaif_ray.feedback.revision import load_examples
from rlaif_ray.feedback.templates import load_exemplars, load_template
from rlaif_ray.pipelines import constitution, evaluate, feedback
from rlaif_ray.pipelines.dpo import train_dpo
from rlaif_ray.pipelines.pairs import make_pairs
from rlaif_ray.pipelines.preferences import make_labels
from rlaif_ray.pipelines.reward import train_reward_model
from rlaif_ray.pipelines.rl import train_rl
from rlaif_ray.pipelines.run_folder import fingerprint, make_folder, write_resolved
from rlaif_ray.pipelines.sampling import sample_responses
from rlaif_ray.pipelines.supervised import fine_tune
from rlaif_ray.runtime.cluster import open_ray
from rlaif_ray.runtime.placement import job_needs, placement_table
from rlaif_ray.storage import Place
from rlaif_ray.tracking.display import clock, share
from rlaif_ray.tracking.files import read_json, write_json
from rlaif_ray.tracking.progress import print_columns

DONE = "stage.json"  # in a stage's folder, written last

# Settings of how a result is computed, not of what it is: a change of theirs is no reason to do a stage again.
HOW = {"cluster", "tracking", "checkpoint", "weight_sync", "run_dir", "output", "push_to_hub", "human_price"}
HOW |= {"replicas", "tensor_parallel", "gpu_memory_utilization", "kv_cache_gb", "concurrency"}
HOW |= {"ranks", "zero_stage", "tokens_per_micro_batch", "gradient_checkpointing"}
NAMES_OF_TEXTS = {
    "template",
    "refusal_template",
    "exemplars",
    "constitution",
    "examples",
}  # what they say counts, not where it is


@dataclass(frozen=True, slots=True)
class Work:
    """How a job runs as a stage."""

    run: Callable[[Loaded], dict[str, Any]]  # returns its summary
    artefact: str  # what other stages read, in its folder


WORK = {
    "revise": Work(constitution.revise, "revisions.jsonl"),
    "sample": Work(sample_responses, "responses.jsonl"),
    "sft": Work(fine_tune, "policy"),
    "pairs": Work(make_pairs, "pairs.jsonl"),
    "label": Work(make_labels, "labels.jsonl"),
    "reward-model": Work(train_reward_model, "reward_model"),
    "dpo": Work(train_dpo, "policy"),
    "train": Work(train_rl, "policy"),
    "evaluate": Work(evaluate.evaluate, "summary.json"),
}


@dataclass(frozen=True, slots=True)
class Placed:
    """A stage with the place of its results."""

    stage: Stage
    hash: str
    folder: Path

    @property
    def artefact(self) -> Path:
        return self.folder / WORK[self.stage.job].artefact

    @property
    def done(self) -> dict[str, Any] | None:
        """What is noted of the finished stage; None as long as it isn't."""
        noted = read_json(self.folder / DONE)
        return noted if noted.get("hash") == self.hash and self.artefact.exists() else None


def run_pipeline(pipeline: Pipeline, *, start: str | None = None, only: str | None = None) -> dict[str, Any]:
    """Runs what isn't done; with `start` that stage and all that build on it once more; with `only` no other stage.

    Raises:
        InputError: a stage's input is wrong, or a stage that is needed isn't done and isn't to be.
        RunError: a stage failed; what was done before it is kept.
    """
    placed = place(pipeline)
    todo = choose(pipeline, placed, start, only)
    make_folder(pipeline.run_dir)
    write_resolved(pipeline)
    if start is not None:
        for name in todo:
            _put_aside(placed[name])
    ran: dict[str, float] = {}
    if todo:
        jobs = [job for name in todo for job in jobs_of(placed[name])]
        with open_ray(pipeline.config.cluster, jobs):
            for number, name in enumerate(todo, start=1):
                print(f"\nstage {number} of {len(todo)}: {name} ({placed[name].stage.job})", flush=True)
                ran[name] = run_stage(pipeline, placed, name)
    told = [_told(one, ran) for one in placed.values()]
    summary = {"job": "pipeline", "stages": told}
    write_json(pipeline.run_dir / "summary.json", summary)
    rows = [_row(one) for one in told]
    title = f"{pipeline.run_dir.name}: what each stage made is in {pipeline.run_dir / 'latest'}/STAGE"
    print_columns(title, ("stage", "state", "time", "result", "made"), rows)
    return summary


def plan_pipeline(pipeline: Pipeline) -> str:
    """What `--dry-run` shows: the stages in order, which of them are done, and what each asks of the cluster."""
    parts = []
    for one in place(pipeline).values():
        state = "done" if one.done else "started" if one.folder.exists() else "to do"
        after = f", after {', '.join(one.stage.needs)}" if one.stage.needs else ""
        title = f"{one.stage.name}: {one.stage.job}{after} [{state}]\n{one.folder}"
        tables = [placement_table(job) for job in jobs_of(one) if job_needs(job)]
        parts.append("\n".join([title, *tables]))
    return "\n\n".join(parts)


def jobs_of(one: Placed) -> list[Any]:
    """The jobs that a stage runs, one after the other: itself, or what it is made of."""
    config = one.stage.config
    return evaluate.jobs_of(config, one.folder) if isinstance(config, EvaluateJob) else [config]


def choose(pipeline: Pipeline, placed: Mapping[str, Placed], start: str | None, only: str | None) -> list[str]:
    """Names of the stages to run, in order.

    Raises:
        InputError: the options don't fit the stages.
    """
    try:
        if start is not None and only is not None:
            raise ValueError("--from and --only exclude each other (got both): one does more, the other less. Use one.")
        wanted = {stage.name for stage in pipeline.stages}
        if start is not None:
            wanted = pipeline.after(pipeline.stage(start, "--from").name)
        if only is not None:
            wanted = {pipeline.stage(only, "--only").name}
    except ValueError as error:
        raise InputError(str(error)) from error
    todo = [name for name, one in placed.items() if name in wanted and (start is not None or one.done is None)]
    for name in todo:
        for needed in placed[name].stage.needs:
            if needed not in todo and placed[needed].done is None:
                raise InputError(
                    f"the stage {name} builds on {needed}, which isn't done with these settings (looked for "
                    f"{placed[needed].folder}). Run the pipeline without {'--from' if start else '--only'} first."
                )
    return todo


def run_stage(pipeline: Pipeline, placed: Mapping[str, Placed], name: str) -> float:
    """Runs one stage to its end, from wherever it was; returns the seconds it took."""
    one = placed[name]
    stage = one.stage
    paths = {needed: str(placed[needed].artefact) for needed in stage.needs}
    values = put(stage.config.model_dump(), paths) | {"run_dir": str(one.folder)}
    if (path := _checkpoint_path(one)) is not None:
        values["checkpoint"]["path"] = path
    loaded = Loaded(
        job=stage.job,
        config=type(stage.config).model_validate(values),
        run_dir=one.folder,
        run_dir_given=True,
        files=pipeline.files,
        overrides=pipeline.overrides,
    )
    began = time.perf_counter()
    try:
        summary = WORK[stage.job].run(loaded)
    except Exception as error:
        cause = getattr(error, "cause", None) or error  # Ray wraps what an actor raised
        if isinstance(cause, RlaifError):
            raise type(cause)(f"stage {name}: {cause}") from error
        raise RunError(f"stage {name}: {type(cause).__name__}: {cause}") from error
    seconds = time.perf_counter() - began
    noted = {"name": name, "job": stage.job, "hash": one.hash, "seconds": seconds, "result": headline(summary)}
    write_json(one.folder / DONE, noted | {"artefact": str(one.artefact)})
    _link(pipeline.run_dir / "latest" / name, one.folder)
    return seconds


# ---- Addresses -------------------------------------------------------------------------------------------------------


def place(pipeline: Pipeline) -> dict[str, Placed]:
    """Every stage with its hash and folder, in order.

    Raises:
        InputError: a template, constitution or exemplar file is wrong: said before the first stage, not hours later.
    """
    placed: dict[str, Placed] = {}
    for stage in pipeline.stages:
        upstream = {needed: f"{STAGE}{placed[needed].hash}" for needed in stage.needs}
        try:
            own = stage_hash(stage, upstream)
        except InputError as error:
            raise InputError(f"stage {stage.name}: {error}") from error
        placed[stage.name] = Placed(stage, own, pipeline.run_dir / "stages" / f"{stage.name}-{own}")
    return placed


def stage_hash(stage: Stage, upstream: Mapping[str, str]) -> str:
    """Of everything that the stage's results follow from, beside chance and versions of software."""
    values = _contents(put(_without(stage.config.model_dump(mode="json"), HOW | NAMES_OF_TEXTS), upstream))
    whole = {"job": stage.job, "config": values, "texts": [repr(one) for one in _texts(stage.config)]}
    return hashlib.blake2b(json.dumps(whole, sort_keys=True).encode(), digest_size=6).hexdigest()


def _without(values: Any, names: set[str]) -> Any:
    if isinstance(values, dict):
        return {key: _without(value, names) for key, value in values.items() if key not in names}
    return values


def _contents(values: Any, key: str = "") -> Any:
    """`values` with what data and models hold in place of their names."""
    if isinstance(values, dict):
        return {name: _contents(value, name) for name, value in values.items()}
    named = isinstance(values, str) and (key in ("path", "model", "labelled") or key.endswith("_path"))
    return _content(values) if named else values


def _content(name: str) -> str:
    """What stands for the content of a file, folder, or of something of ours or on the hub."""
    path = Path(name).expanduser()
    if name.startswith("package:"):
        return rlaif_ray.__version__
    if path.is_dir():  # a model: too much to read each time
        files = sorted(file for file in path.rglob("*") if file.is_file())
        return json.dumps([(str(f.relative_to(path)), f.stat().st_size, f.stat().st_mtime_ns) for f in files])
    return fingerprint(name)


def _texts(job: Any) -> Iterator[Any]:
    """What templates, exemplars and constitutions say: comments in their files and their place don't matter."""
    if isinstance(job, LabelJob | EvaluateJob):
        template = load_template(job.label.template, kind="preference")
        yield template
        yield load_exemplars(job.label.exemplars, template) if job.label.exemplars else None
        yield load_constitution(job.label.constitution).hash if job.label.constitution else None
    suite = job.evaluation.harmless if isinstance(job, TrainJob) else getattr(job, "harmless", None)
    if suite is not None:
        yield load_template(suite.template)
        yield load_template(suite.refusal_template)
    if isinstance(job, ReviseJob):
        yield load_constitution(job.revision.constitution, "revision.constitution").hash
        yield load_examples(job.revision.examples) if job.revision.examples else None
    if isinstance(job, TrainJob | SampleJob) and job.feedback is not None:
        for _, scorer in feedback.parts(job.feedback):
            if isinstance(scorer, JudgeFeedback):
                yield load_template(scorer.template)


def _checkpoint_path(one: Placed) -> str | None:
    """Below the address that stages may share, a folder of this one's own; None where checkpoints are in its folder."""
    cfg = getattr(one.stage.config, "checkpoint", None)
    return None if cfg is None or cfg.path is None else f"{cfg.path.rstrip('/')}/{one.folder.name}"


def _put_aside(one: Placed) -> None:
    """Makes room for the same stage once more; nothing is removed but checkpoints elsewhere: it would go on there."""
    folder = one.folder
    if (path := _checkpoint_path(one)) is not None:
        Place.of(path).remove()
    if folder.exists():
        number = next(k for k in range(1, 10**6) if not folder.with_name(f"{folder.name}.{k}").exists())
        folder.rename(folder.with_name(f"{folder.name}.{number}"))


def _link(link: Path, folder: Path) -> None:
    """The newest results of a stage under a name without a hash."""
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(Path("..") / "stages" / folder.name)


# ---- Telling ---------------------------------------------------------------------------------------------------------


def _told(one: Placed, ran: Mapping[str, float]) -> dict[str, Any]:
    noted = one.done
    return {
        "name": one.stage.name,
        "job": one.stage.job,
        "hash": one.hash,
        "state": "ran" if one.stage.name in ran else "done before" if noted else "to do",
        "seconds": noted["seconds"] if noted else None,
        "result": noted["result"] if noted else "",
        "artefact": str(one.artefact) if noted else None,
    }


def _row(told: dict[str, Any]) -> tuple[str, ...]:
    time_s = clock(told["seconds"]) if told["seconds"] is not None else "-"
    name = told["name"] if told["name"] == told["job"] else f"{told['name']} ({told['job']})"
    return name, told["state"], time_s, told["result"], Path(told["artefact"]).name if told["artefact"] else ""


def headline(summary: Mapping[str, Any]) -> str:
    """The figure of a job's summary that a reader asks for first."""
    match summary["job"]:
        case "pairs":
            return f"{summary['pairs']} pairs"
        case "label":
            return f"{summary['labels']} labels"
        case "revise":
            return f"{summary['records']} records"
        case "sample":
            score = summary["score"]
            return f"{summary['records']} records" + (f", score {share(score['best'])}" if score else "")
        case "sft":
            found = summary["sft"]["held_out"]
            return f"held-out loss {share(found['loss'])}" if found else f"{summary['turns']} turns"
        case "reward-model" | "dpo":
            found = summary["reward_model" if summary["job"] == "reward-model" else "dpo"]["held_out"]
            known = found is not None and found["accuracy"] is not None
            return f"held-out accuracy {share(found['accuracy'])}" if known else f"{summary['pairs']} pairs"
        case "evaluate":
            rates = [f"{one['a']}:{one['b']} {share(one['win_rate']['rate'])}" for one in summary["win_rates"]]
            if summary["alignment"]:
                rates = rates or [f"alignment {share(summary['alignment']['accuracy'])}"]
            arms = summary["harmless"]["arms"] if summary["harmless"] else {}
            return ", ".join(rates or [f"{arm} harmless {share(one['rate']['rate'])}" for arm, one in arms.items()])
        case _:
            gain = (summary.get("held_out") or {}).get("gain")
            if not gain or gain["mean"] is None:
                return f"{summary['steps']} steps"
            low, high = gain["ci95_low"], gain["ci95_high"]
            return f"gain {gain['mean']:+.4f}" + (f" [{low:+.4f}, {high:+.4f}]" if None not in (low, high) else "")
