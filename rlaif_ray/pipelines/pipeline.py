"""`rlaif pipeline`: stages in one job; each one's results are addressed by what they follow from.

A stage's folder is named by the hash of its config and of everything that it reads, the hashes of the stages it builds
on among them. So a re-run does what changed and nothing else, a killed run goes on in the stage that it was in, and
results of other settings stay where they are.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlaif_ray.config.jobs import EvaluateJob
from rlaif_ray.config.layers import STAGE
from rlaif_ray.config.load import Loaded
from rlaif_ray.config.pipeline import Pipeline, Stage, put
from rlaif_ray.config.roles import Setting
from rlaif_ray.data.identity import Content, changes, file_content, model_content
from rlaif_ray.documents import at
from rlaif_ray.errors import InputError, RlaifError, RunError
from rlaif_ray.output import say, shown
from rlaif_ray.pipelines import constitution, evaluate
from rlaif_ray.pipelines.chat_date import pipeline_date
from rlaif_ray.pipelines.checkpoint import remove_checkpoints
from rlaif_ray.pipelines.checkpoint_owner import belongs_to_another
from rlaif_ray.pipelines.dpo import train_dpo
from rlaif_ray.pipelines.inputs import content_of, result_settings
from rlaif_ray.pipelines.pairs import make_pairs
from rlaif_ray.pipelines.preferences import make_labels
from rlaif_ray.pipelines.reward import train_reward_model
from rlaif_ray.pipelines.rl import train_rl
from rlaif_ray.pipelines.run_folder import make_folder, write_resolved
from rlaif_ray.pipelines.sampling import sample_responses
from rlaif_ray.pipelines.supervised import fine_tune
from rlaif_ray.runtime.cluster import open_ray
from rlaif_ray.runtime.placement import job_needs, placement_table
from rlaif_ray.storage import Place
from rlaif_ray.tracking.display import clock, share
from rlaif_ray.tracking.files import read_json, write_json
from rlaif_ray.tracking.progress import print_columns

DONE = "stage.json"  # in a stage's folder, written last


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
    holds: Mapping[str, Content]  # what it reads that no other stage makes, by dotted key, when it was placed

    @property
    def artefact(self) -> Path:
        return self.folder / WORK[self.stage.job].artefact

    @property
    def noted(self) -> dict[str, Any]:
        """What is noted of the stage since it was finished; empty as long as it wasn't, or where the note is none."""
        found = read_json(self.folder / DONE)
        seconds, result = at(found, "seconds", expected=float), at(found, "result", expected=str)
        whole = seconds is not None and math.isfinite(seconds) and result is not None
        return found if whole and found.get("hash") == self.hash else {}

    @property
    def done(self) -> dict[str, Any] | None:
        """What is noted of the finished stage; None as long as it isn't."""
        return (self.noted or None) if self.artefact.exists() else None

    def content(self) -> Content:
        """Of what it made."""
        path = str(self.artefact)
        return model_content(path) if self.artefact.is_dir() else file_content(path)


def run_pipeline(pipeline: Pipeline, *, start: str | None = None, only: str | None = None) -> dict[str, Any]:
    """Runs what isn't done; with `start` that stage and all that build on it once more; with `only` no other stage.

    Raises:
        InputError: a stage's input is wrong, or a stage that is needed isn't done and isn't to be.
        RunError: a stage failed; what was done before it is kept.
    """
    placed = place(pipeline)
    choose(pipeline, placed, start, only)
    make_folder(pipeline.run_dir)
    todo = choose(pipeline, placed, start, only)  # another process may have ended since
    write_resolved(pipeline)
    stale = moved(pipeline, placed)
    for name, why in _moved_inputs(placed).items():
        say(f"the stage {name} is done again, with all that builds on it: {why}")
    for name in todo:
        if start is not None or name in stale:
            _put_aside(placed[name])
    ran: dict[str, float] = {}
    ended: dict[str, str] = {}  # how a stage ended that is not done, and why
    try:
        if todo:
            jobs = [job for name in todo for job in jobs_of(placed[name])]
            with open_ray(pipeline.config.cluster, jobs):
                for number, name in enumerate(todo, start=1):
                    say(f"\nstage {number} of {len(todo)}: {name} ({placed[name].stage.job})")
                    ended = {"name": name, "state": "failed"}
                    ran[name] = run_stage(pipeline, placed, name)
                    ended = {}
    except BaseException as error:
        stopped = isinstance(error, KeyboardInterrupt)
        ended |= {"state": "interrupted"} if stopped and ended else {"error": shown(str(error))}
        _tell(pipeline, placed, ran, ended, "interrupted" if stopped else "failed")
        raise
    return _tell(pipeline, placed, ran, {}, "done" if all(one.done for one in placed.values()) else "unfinished")


def _tell(
    pipeline: Pipeline, placed: Mapping[str, Placed], ran: Mapping[str, float], ended: Mapping[str, str], state: str
) -> dict[str, Any]:
    """Writes summary.json and shows what became of each stage."""
    told = [_told(one, ran, ended if one.stage.name == ended.get("name") else {}) for one in placed.values()]
    summary = {"job": "pipeline", "state": state, "stages": told}
    write_json(pipeline.run_dir / "summary.json", summary)
    rows = [_row(one) for one in told]
    title = f"{pipeline.run_dir.name}: what each stage made is in {pipeline.run_dir / 'latest'}/STAGE"
    print_columns(title, ("stage", "state", "time", "result", "made"), rows)
    return summary


def plan_pipeline(pipeline: Pipeline) -> str:
    """What `--dry-run` shows: the stages in order, which of them are done, and what each asks of the cluster."""
    parts = []
    placed = place(pipeline)
    stale, reasons = moved(pipeline, placed), _moved_inputs(placed)
    for name, one in placed.items():
        state = "done" if one.done else "started" if one.folder.exists() else "to do"
        if name in stale:
            state = f"to do again: {reasons.get(name, 'what it builds on is done again')}"
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
    stale = moved(pipeline, placed)
    missing = {name for name, one in placed.items() if start is not None or one.done is None or name in stale}
    todo = [name for name in placed if name in wanted and name in missing]
    for name, one in placed.items():
        if name not in todo and one.done is not None:
            _must_be_as_made(one)
    for name in todo:
        for needed in placed[name].stage.needs:
            if needed not in todo and placed[needed].done is None:
                raise InputError(
                    f"the stage {name} builds on {needed}, which isn't done with these settings (looked for "
                    f"{placed[needed].folder}). Run the pipeline without {'--from' if start else '--only'} first."
                )
    return todo


def moved(pipeline: Pipeline, placed: Mapping[str, Placed]) -> set[str]:
    """Stages that are done and read something on the hub that is at another commit now, and all that build on them."""
    return set[str]().union(*(pipeline.after(name) for name in _moved_inputs(placed)))


def _moved_inputs(placed: Mapping[str, Placed]) -> dict[str, str]:
    """Why, of each finished stage that read something on the hub that is at another commit now."""
    found = {}
    for name, one in placed.items():
        before = at(one.noted, "commits", expected=dict) or {}
        moves = [
            f"{key}: {content.name} was at commit {before[key]} and is at {content.commit}"
            for key, content in one.holds.items()
            if before.get(key) and content.commit and before[key] != content.commit
        ]
        if moves:
            found[name] = "; ".join(moves)
    return found


def _must_be_as_made(one: Placed) -> None:
    """Raises InputError when what a finished stage made was changed since: nothing would follow from its settings."""
    made = Content.of_json(one.noted.get("content"))
    if made is not None and not (now := one.content()).same_as(made):
        name = one.stage.name
        raise InputError(
            f"what the stage {name} made was changed since: {now.told(made)}. What builds on it would not follow from "
            f"the stage's settings. Restore it, or make it anew with --from {name}."
        )


def run_stage(pipeline: Pipeline, placed: Mapping[str, Placed], name: str) -> float:
    """Runs one stage to its end, from wherever it was; returns the seconds it took."""
    one = placed[name]
    stage = one.stage
    paths = {needed: str(placed[needed].artefact) for needed in stage.needs}
    values = put(stage.config.model_dump(), paths) | {"run_dir": str(one.folder)}
    values["chat_date"] = values["chat_date"] or pipeline_date(pipeline.run_dir)
    if (path := _checkpoint_path(one)) is not None:
        values["checkpoint"]["path"] = path
    if changed := list(changes(one.holds, contents_of(stage))):  # its folder is that of what was there before
        raise RunError(
            f"stage {name}: an input was replaced since the pipeline began. {'; '.join(changed)}. Start the same "
            f"command again: it does this stage with the new one."
        )
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
    left = summary.get("retryable", 0)
    if left and not pipeline.config.accept_failures:
        raise RunError(
            f"stage {name}: it is not done, for {left} of its questions failed in a way that may pass. What was "
            f"answered is kept in {one.folder}: start the same command again to ask these once more. Where they fail "
            f"every time, accept_failures=true takes the stage as done without them."
        )
    noted = {"name": name, "job": stage.job, "hash": one.hash, "seconds": seconds, "result": headline(summary)}
    noted |= {
        "retryable": left,
        "content": one.content().as_json(),
        "commits": {key: holds.commit for key, holds in contents_of(stage).items()},
    }
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
            holds = contents_of(stage)
            own = stage_hash(stage, upstream, holds)
        except InputError as error:
            raise InputError(f"stage {stage.name}: {error}") from error
        placed[stage.name] = Placed(stage, own, pipeline.run_dir / "stages" / f"{stage.name}-{own}", holds)
    return placed


def stage_hash(stage: Stage, upstream: Mapping[str, str], holds: Mapping[str, Content]) -> str:
    """Of everything that the stage's results follow from, beside chance and versions of software: the settings that
    declare it (`config/roles.py`), and the content of what they name."""
    named = {one.key for one in _named(stage)}
    values = [[one.key, put(one.value, upstream)] for one in result_settings(stage.config) if one.key not in named]
    # A commit on the hub is not in it: it may become known only while the stage runs.
    digests = {key: content.known_by for key, content in holds.items()}
    whole = {"job": stage.job, "settings": values, "contents": digests}
    return hashlib.blake2b(json.dumps(whole, sort_keys=True).encode(), digest_size=6).hexdigest()


def contents_of(stage: Stage) -> dict[str, Content]:
    """What a stage reads that no other stage makes, by dotted key, now."""
    return {".".join(one.key): content_of(stage.config, one) for one in _named(stage)}


def _named(stage: Stage) -> list[Setting]:
    """Settings whose value is the name of something that no other stage makes."""
    return [
        one
        for one in result_settings(stage.config)
        if one.names is not None and one.value is not None and not one.value.startswith(STAGE)
    ]


def _checkpoint_path(one: Placed) -> str | None:
    """Below the address that stages may share, a folder of this one's own; None where checkpoints are in its folder."""
    cfg = getattr(one.stage.config, "checkpoint", None)
    return None if cfg is None or cfg.path is None else f"{cfg.path.rstrip('/')}/{one.folder.name}"


def _put_aside(one: Placed) -> None:
    """Makes room for the same stage once more; nothing is removed but checkpoints elsewhere: it would go on there."""
    folder = one.folder
    if (path := _checkpoint_path(one)) is not None and not belongs_to_another(Place.of(path), folder):
        remove_checkpoints(Place.of(path))
    if folder.exists():
        number = next(k for k in range(1, 10**6) if not folder.with_name(f"{folder.name}.{k}").exists())
        folder.rename(folder.with_name(f"{folder.name}.{number}"))


def _link(link: Path, folder: Path) -> None:
    """The newest results of a stage under a name without a hash."""
    link.parent.mkdir(parents=True, exist_ok=True)
    link.unlink(missing_ok=True)
    link.symlink_to(Path("..") / "stages" / folder.name)


# ---- Telling ---------------------------------------------------------------------------------------------------------


def _told(one: Placed, ran: Mapping[str, float], ended: Mapping[str, str]) -> dict[str, Any]:
    noted = one.done
    state = "ran" if one.stage.name in ran else ended.get("state") or ("done before" if noted else "to do")
    return {
        "name": one.stage.name,
        "job": one.stage.job,
        "hash": one.hash,
        "state": state,
        "error": ended.get("error"),
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
