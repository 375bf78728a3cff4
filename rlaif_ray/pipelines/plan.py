"""`rlaif plan`: where a job's actors go, what they hold on their GPUs, and what would make it fit. Starts nothing, and
needs neither GPU nor network."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]

from rlaif_ray.config.jobs import JOBS, SupervisedJob, TrainJob
from rlaif_ray.config.layers import STAGE, read_file, read_overrides
from rlaif_ray.config.load import load_job
from rlaif_ray.config.pipeline import Pipeline, load_pipeline
from rlaif_ray.config.sections import ClusterConfig, JudgeConfig, PolicyConfig
from rlaif_ray.errors import InputError
from rlaif_ray.model_shapes import ModelShape, known_shape, shape_of_size
from rlaif_ray.models import load_config, resolve_model
from rlaif_ray.output import say, say_as_is
from rlaif_ray.paths import expand_home
from rlaif_ray.pipelines.contexts import JUDGE_CONTEXT
from rlaif_ray.runtime.engine_cache import engine_shape
from rlaif_ray.runtime.engine_size import GIB
from rlaif_ray.runtime.fit import Change, Phase, Plan, plan_job, proposals, written
from rlaif_ray.runtime.host_memory import CheckpointCost, Parts, checkpoint_cost
from rlaif_ray.runtime.memory_plan import Actors, Device, Machine, precision_bytes
from rlaif_ray.runtime.session import named_cluster
from rlaif_ray.runtime.sync_plan import Route, routes
from rlaif_ray.runtime.weight_sync import choose_backend
from rlaif_ray.tracking.progress import print_columns

PROMPT_TOKENS = 2048  # of the longest prompt, where neither rollout.max_context nor data.max_prompt_tokens is set
CUDA_GIVES = 0.989  # of the memory in a GPU's name: 79.1 of 80 GiB on A100 and H100; the rest is the driver's
DISK = 2.0  # GB/s of the storage of checkpoints, in all: a shared file system over one fast network link
PIPELINE = "pipeline"
NAMED = {"alignment": "evaluate", "best-of-n": "sample"}  # what else a job's file may be called


@dataclass(frozen=True, slots=True)
class Sync:
    """One push of the weights."""

    backend: str
    bytes: int
    routes: tuple[Route, ...]  # the links that it can go by


@dataclass(frozen=True, slots=True)
class Speeds:
    """In GB/s (10^9)."""

    sync: float | None  # of a weight sync; None: what sync_plan.py assumes
    disk: float  # of the storage of checkpoints


@dataclass(frozen=True, slots=True)
class Planned:
    """A job, or a stage of a pipeline, with its plan."""

    name: str  # the stage's, else the job's
    job: str
    device: Device
    plan: Plan
    proposals: tuple[tuple[Change, ...], ...]
    sync: Sync | None
    checkpoint: CheckpointCost | None
    host_bytes: int | None  # of a node's memory, where it is known


def make_plan(
    files: Sequence[Path],
    overrides: Sequence[str],
    *,
    job: str | None = None,
    gpu_memory: float = 80.0,
    gpus_per_node: int = 8,
    host_memory: float | None = None,
    bandwidth: float | None = None,
    disk_bandwidth: float = DISK,
    model_params: Sequence[str] = (),
    as_json: bool = False,
) -> bool:
    """Prints the plan of a config, of whatever job; returns whether it fits.

    Raises:
        InputError: the config is wrong, or it can't be told which job it is of or how large a model is.
    """
    host_bytes = None if host_memory is None else int(host_memory * GIB)
    machine = Machine(int(gpu_memory * GIB * CUDA_GIVES), gpus_per_node, JUDGE_CONTEXT, PROMPT_TOKENS, host_bytes)
    speeds = Speeds(bandwidth, disk_bandwidth)
    job = job or job_of(files, overrides)
    if job not in (*JOBS, PIPELINE):
        raise InputError(f"--job must be a job (got {job!r}): choose among {', '.join([*JOBS, PIPELINE])}.")
    shapes = ShapeFinder(sizes_of(model_params))
    if job == PIPELINE:
        pipeline = load_pipeline(files, overrides)
        shapes.follow(pipeline)
        jobs = [(stage.name, stage.job, stage.config) for stage in pipeline.stages]
    else:
        jobs = [(job, job, load_job(job, files, overrides).config)]
    prefix = "stages.{}." if job == PIPELINE else ""
    planned = [_planned(name, kind, cfg, machine, shapes, speeds, prefix) for name, kind, cfg in jobs]
    fits = all(one.plan.fits for one in planned)
    if as_json:
        told = {
            "fits": fits,
            "gpu_bytes": machine.gpu_bytes,
            "gpus_per_node": gpus_per_node,
            "nodes": max((len(phase.nodes) for one in planned for phase in one.plan.phases), default=0),
            "jobs": [_as_values(one) for one in planned],
            "assumed": [_assumptions(machine, planned)],
        }
        say_as_is(json.dumps(told, indent=1))
    else:
        for one in planned:
            _show(one, machine)
        say(f"{'It fits.' if fits else 'It does not fit.'} {_assumptions(machine, planned)}")
    return fits


def _planned(
    name: str, kind: str, job: Any, machine: Machine, shapes: ShapeFinder, speeds: Speeds, prefix: str
) -> Planned:
    device: Device = "cpu" if job.cluster.device == "cpu" else "cuda"
    if machine.host_bytes is None and is_for_here(job.cluster):
        machine = replace(machine, host_bytes=psutil.virtual_memory().total)

    def replan(changed: Any) -> Plan:
        return plan_job(changed, machine, shapes, device)

    plan = replan(job)
    found = () if plan.fits else proposals(job, plan, replan, machine)
    named = tuple(tuple((prefix.format(name) + key, value) for key, value in changes) for changes in found)
    sync = None
    if isinstance(job, TrainJob):
        backend = choose_backend(job.weight_sync, job.cluster, device)
        size = shapes(job.policy).parameters * precision_bytes(job.policy.precision, device)
        nodes, sharded = plan.phases[0].nodes, job.learner.zero_stage == 3  # it has no other phase
        ways = routes(size, backend, nodes, ranks=job.learner.ranks, sharded=sharded, bandwidth=speeds.sync)
        sync = Sync(backend, size, tuple(ways))
    actors = [one for phase in plan.phases for one in phase.actors]
    checkpoint = checkpoint_cost(job, actors, device, speeds.disk)
    return Planned(name, kind, device, plan, named, sync, checkpoint, machine.host_bytes)


def is_for_here(cluster: ClusterConfig) -> bool:
    """Whether the job would run on the CPUs of this machine, whose memory is known. Its GPUs are never looked for."""
    return cluster.device == "cpu" and named_cluster(cluster.address, os.environ) is None


# ---- Which job, which model ------------------------------------------------------------------------------------------


def job_of(files: Sequence[Path], overrides: Sequence[str]) -> str:
    """The job that a config is of: the only one that it is a valid config of, else the one its file is named after.

    Raises:
        InputError: none or several.
    """
    layers = [*(read_file(Path(file)) for file in files), read_overrides(overrides)]
    keys = {key for layer in layers for key in layer.values}
    if "stages" in keys:
        return PIPELINE
    able = [name for name, model in JOBS.items() if keys <= set(model.model_fields)]
    if len(able) > 1:
        able = [name for name in able if _loads(name, files, overrides)] or able
    stem = Path(files[0]).stem.replace("_", "-")
    named = [name for name in able if stem.startswith(name)] + [job for word, job in NAMED.items() if stem == word]
    for choice in (able, named):
        if len(choice) == 1:
            return choice[0]
    raise InputError(
        f"it can't be told which job {', '.join(map(str, files))} is of (could be {', '.join(able) or 'none'}): "
        f"say it with --job, one of {', '.join([*JOBS, PIPELINE])}."
    )


def _loads(job: str, files: Sequence[Path], overrides: Sequence[str]) -> bool:
    try:
        load_job(job, files, overrides)
    except InputError:
        return False
    return True


def sizes_of(model_params: Sequence[str]) -> dict[str, int]:
    """Parameters by model, from NAME=COUNT.

    Raises:
        InputError: not of that form.
    """
    found = {}
    for text in model_params:
        name, _, count = text.rpartition("=")
        try:
            found[name] = int(float(count))
        except ValueError:
            found[name] = 0
        if not name or found[name] < 1:
            raise InputError(f"--model-params must be NAME=COUNT, such as owner/name=7e9 (got {text!r}). Correct it.")
    return found


class ShapeFinder:
    """The shape of a config section's model: as given, from a folder or the hub's cache here, else a well-known one."""

    def __init__(self, sizes: Mapping[str, int]) -> None:
        self._sizes = sizes
        self._known: dict[tuple[str, str | None], ModelShape] = {}
        self._made: dict[str, Any] = {}  # by stage: the section whose model it trains

    def follow(self, pipeline: Pipeline) -> None:
        """From here on stage:NAME stands for a model of the shape that the stage starts from."""
        trained = {s.name: s.config.policy for s in pipeline.stages if isinstance(s.config, TrainJob | SupervisedJob)}
        self._made |= {f"{STAGE}{name}": policy for name, policy in trained.items()}

    def __call__(self, section: Any) -> ModelShape:
        while section.model in self._made:
            section = self._made[section.model]
        key = (section.model, section.revision)
        if key not in self._known:
            self._known[key] = self._find(section)
        return self._known[key]

    def _find(self, section: PolicyConfig) -> ModelShape:
        name = section.model
        if name in self._sizes:
            return shape_of_size(self._sizes[name])
        folder = name if expand_home(name).is_dir() else _in_hub_cache(name, section.revision)
        if folder is not None:
            config = load_config(folder, trust_remote_code=section.trust_remote_code)
            return engine_shape(config, name, expand_home(folder), any_family=isinstance(section, JudgeConfig))
        shape = known_shape(name)
        if shape is not None:
            return shape
        remedy = f"say how large it is: --model-params {name}=7e9"
        try:
            resolve_model(name, revision=section.revision)  # what can't be a name is an error of its own
        except InputError as error:
            raise InputError(f"{error} If it will be there later, {remedy}.") from error
        raise InputError(
            f"model {name} isn't known here (looked for a folder, in the Hugging Face cache, and among well-known "
            f"models): its memory can't be planned. Load its config once (huggingface-cli download {name} "
            f"config.json), or {remedy}."
        )


def _in_hub_cache(name: str, revision: str | None) -> str | None:
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(name, "config.json", revision=revision)
    except HFValidationError:  # package:... and paths
        return None
    return str(Path(found).parent) if isinstance(found, str) else None


# ---- Telling ---------------------------------------------------------------------------------------------------------


def _as_values(one: Planned) -> dict[str, Any]:
    return {
        "name": one.name,
        "job": one.job,
        "device": one.device,
        "fits": one.plan.fits,
        "host_bytes": one.host_bytes,
        "phases": [
            {
                "name": phase.name,
                "gpus": phase.gpus,
                "nodes": list(phase.nodes),
                "host": list(phase.host),
                "shared": [list(roles) for roles in phase.shared],
                "actors": [_actor_values(actors) for actors in phase.actors],
                "problems": [problem.text for problem in phase.problems],
            }
            for phase in one.plan.phases
        ],
        "proposals": [dict(changes) for changes in one.proposals],
        "sync": one.sync
        and {
            "backend": one.sync.backend,
            "bytes": one.sync.bytes,
            "routes": [asdict(route) for route in one.sync.routes],
        },
        "checkpoint": one.checkpoint
        and {
            "bytes": one.checkpoint.bytes,
            "gb_per_s": one.checkpoint.bandwidth,
            "seconds": one.checkpoint.seconds,
            "grace_s": one.checkpoint.grace_s,
            "needed_grace_s": one.checkpoint.needed_grace_s,
            "cluster_grace_s": one.checkpoint.cluster_grace_s,
        },
    }


def _actor_values(actors: Actors) -> dict[str, Any]:
    memory = actors.memory
    return {
        "role": actors.need.role,
        "kind": actors.kind,
        "actors": actors.need.actors,
        "gpus_each": actors.need.workers,
        "model": actors.need.model,
        "parameters": actors.shape.parameters,
        "bytes_per_gpu": memory.parts,
        "total": memory.total,
        "reserved": memory.reserved,
        "limit": memory.limit,
        "holds": memory.holds,
        "otherwise": memory.otherwise,
    }


def _show(one: Planned, machine: Machine) -> None:
    for phase in one.plan.phases:
        title = ": ".join(filter(None, [one.name if one.name == one.job else f"{one.name} ({one.job})", phase.name]))
        if not phase.actors:
            say(f"{title}: nothing on GPUs\n")
            continue
        print_columns(title, ("per GPU", *(actors.need.role for actors in phase.actors)), _rows(phase, one.device))
        for line in _lines(phase, machine, one):
            say(line)
    if one.sync is not None:
        sync = one.sync
        took = "; ".join(f"{route.seconds:.2f} s by {route.by} at {route.gb_per_s:g} GB/s" for route in sync.routes)
        say(f"  weight sync    {_rated(sync.bytes)} a step, {took}")
    if one.checkpoint is not None:
        say(f"  checkpoint     {_checkpoint_line(one.checkpoint)}")
    for changes in one.proposals:
        say(f"  would fit      {' '.join(f'{key}={written(value)}' for key, value in changes)}")
    if not one.plan.fits and not one.proposals:
        say("  would fit      no one or two settings make it fit: use a smaller model, or GPUs with more memory")
    say()


def _checkpoint_line(cost: CheckpointCost) -> str:
    took = f"{_rated(cost.bytes)}, {cost.seconds:.0f} s at {cost.bandwidth:g} GB/s"
    if cost.enough:
        return f"{took}, within checkpoint.grace_s={cost.grace_s:g} after a SIGTERM"
    return (
        f"{took}; after a SIGTERM checkpoint.grace_s={cost.grace_s:g} may be too short: use {cost.needed_grace_s}, "
        f"{cost.hook_grace_s} for launch/end_jobs.py (the pods' preStop), and {cost.cluster_grace_s} for "
        f"launch/submit.py --stop-wait, RAY_JOB_STOP_WAIT_TIME_S, Slurm's --signal, terminationGracePeriodSeconds and "
        f"docker's --stop-timeout"
    )


def _rows(phase: Phase, device: Device) -> list[tuple[str, ...]]:
    each = [actors.memory for actors in phase.actors]
    parts = dict.fromkeys(part for memory in each for part, count in memory.parts.items() if count)
    rows = [("actors x GPUs", *(f"{a.need.actors} x {a.need.workers}" for a in phase.actors))]
    rows.append(("model", *(a.need.model for a in phase.actors)))
    rows.append(("parameters", *(f"{a.shape.parameters / 1e9:.2f} billion" for a in phase.actors)))
    rows += [
        (part, *(_gib(m.parts[part]) if part in m.parts else "" for m in each))
        for part in sorted(parts, key="CUDA".__eq__)
    ]
    rows.append(("needed", *(_gib(memory.total) for memory in each)))
    if device == "cuda":
        rows.append(("allowed", *(_gib(memory.limit) for memory in each)))
    return rows


def _lines(phase: Phase, machine: Machine, one: Planned) -> list[str]:
    lines = []
    for actors in phase.actors:
        role, memory = actors.need.role, actors.memory
        if memory.holds:
            held = memory.holds
            cache = f"{held['sequences']} sequences of {held['context']}"
            lines.append(f"  {role:<14} {held['kv_tokens']} tokens of KV cache: {cache}")
        for part, count in memory.otherwise.items():
            lines.append(f"  {role:<14} {part} with the other gradient_checkpointing: {_gib(count)}")
    if one.device == "cuda":
        nodes = [", ".join(f"{count} {role}" for role, count in node.items()) for node in phase.nodes]
        alike = {text: nodes.count(text) for text in nodes}
        told = "; ".join(f"{count} x ({text})" for text, count in alike.items())
        gpus = f"{phase.gpus:g} GPU{'s' if phase.gpus != 1 else ''}"
        lines.append(f"  bundles        {gpus} on nodes of {machine.gpus_per_node}: {told}")
        lines += [f"  on one GPU     {' + '.join(roles)}" for roles in phase.shared]
    lines += list(dict.fromkeys(f"  host memory    {_host_line(parts, one.host_bytes)}" for parts in phase.host))
    return lines + [f"  DOES NOT FIT   {problem.text}" for problem in phase.problems]


def _host_line(parts: Parts, host_bytes: int | None) -> str:
    told = ", ".join(f"{part} {_gib(size)}" for part, size in parts.items())
    of = "" if host_bytes is None else f" of {_gib(host_bytes)}"
    return f"{_gib(sum(parts.values()))}{of} a node: {told}"


def _gib(count: int) -> str:
    return f"{count / GIB:.2f} GiB"


def _rated(count: int) -> str:
    """Beside a rate, which counts in 10^9 as well."""
    return f"{count / 1e9:.2f} GB"


def _assumptions(machine: Machine, planned: Sequence[Planned]) -> str:
    unknown = any(one.host_bytes is None for one in planned)
    return (
        f"GPUs of {machine.gpu_bytes / GIB:.4g} GiB, which is {CUDA_GIVES:.1%} of --gpu-memory as CUDA gives it, "
        f"{machine.gpus_per_node} a node. Weights, gradients and "
        f"optimizer states are exact; activations, workspace, processes and CUDA's own are estimates. Prompts of up to "
        f"{machine.prompt_tokens} tokens where the config doesn't say, packed samples in the learner. The object "
        f"store is a local Ray's; a cluster's own comes on top."
        f"{' Host memory is checked with --host-memory alone.' if unknown else ''}"
    )
