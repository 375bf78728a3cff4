"""Whether a job fits on given GPUs, where its actors go, and the nearest settings with which it fits. Pure."""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations, product
from typing import Any

from pydantic import ValidationError

from rlaif_ray.config.jobs import EvaluateJob, RewardModelJob
from rlaif_ray.config.sections import EngineConfig, RewardModelFeedback
from rlaif_ray.runtime.engine_size import GIB
from rlaif_ray.runtime.host_memory import Parts, node_memory
from rlaif_ray.runtime.memory_plan import FREE_FOR_ALLOCATOR, Actors, Device, Machine, Shapes, phases, sections
from rlaif_ray.runtime.placement import Slot, actor_slots, bundles_of, slots_of, totals
from rlaif_ray.runtime.places import layout_problems
from rlaif_ray.runtime.push_memory import push_bytes, while_pushing

LOGITS_CHUNK = 4096  # tokens, where a config sets no bound
MOST_RANKS = 256  # of a proposal
MOST_PROPOSALS = 4
TAKES_GPUS = ("ranks", "tensor_parallel", "gpus_per_actor")  # settings that do
Change = tuple[str, Any]  # a setting's dotted name and its value


@dataclass(frozen=True, slots=True)
class Problem:
    """Something that doesn't fit."""

    roles: tuple[str, ...]
    text: str


@dataclass(frozen=True, slots=True)
class Phase:
    """Actors that run at the same time."""

    name: str  # "" where a job has one phase
    actors: tuple[Actors, ...]
    nodes: tuple[dict[str, int], ...]  # actors by role, node by node
    host: tuple[Parts, ...]  # bytes of each node's own memory, by what they are for
    gpus: float  # that Ray reserves, in all
    shared: tuple[tuple[str, ...], ...]  # roles that share a GPU, each set of roles once
    problems: tuple[Problem, ...]


@dataclass(frozen=True, slots=True)
class Plan:
    """A job on a machine."""

    phases: tuple[Phase, ...]

    @property
    def problems(self) -> list[Problem]:
        return [problem for phase in self.phases for problem in phase.problems]

    @property
    def fits(self) -> bool:
        return not self.problems


def plan_job(job: Any, machine: Machine, shapes: Shapes, device: Device) -> Plan:
    """Places and sizes every actor of a job (any of config/jobs.py)."""
    found = []
    for name, actors in phases(job, machine, shapes, device):
        slots = _slots(job, actors, device)
        nodes, tenants = place(slots, machine.gpus_per_node)
        shared = tuple(dict.fromkeys(tuple(sorted(one)) for one in tenants if len(one) > 1))
        host = node_memory(job, actors, nodes, device)
        problems = list(_host_problems(nodes, host, machine))
        if device == "cuda":
            problems += [Problem(*one) for one in layout_problems(job, slots, device)]
            problems += _problems(actors, shared, machine, push_bytes(job, actors, device))
        gpus = totals(slots)["GPU"]
        found.append(Phase(name, tuple(actors), tuple(nodes), host, gpus, shared, tuple(problems)))
    return Plan(tuple(found))


def _slots(job: Any, actors: Sequence[Actors], device: Device) -> list[Slot]:
    """As runtime/placement.py has them; an evaluation's arms and judge are jobs of their own there."""
    if not isinstance(job, EvaluateJob) or any(one.kind == "scorer" for one in actors):
        return actor_slots(job, device)
    return slots_of([one.need for one in actors], job.cluster, device)


def place(slots: Sequence[Slot], gpus_per_node: int) -> tuple[list[dict[str, int]], list[list[str]]]:
    """(actors by role on each node, roles on each GPU in use), as Ray packs bundles: on few nodes, the largest first.

    A bundle that no node can hold is on one that is large enough.
    """
    bundles = sorted(bundles_of(slots), key=lambda bundle: -bundle.gpus)
    nodes: list[Counter[str]] = []
    free: list[int] = []
    tenants: list[list[str]] = []
    for bundle in bundles:
        node = next((k for k, left in enumerate(free) if left >= bundle.gpus), len(nodes))
        if node == len(nodes):
            nodes.append(Counter())
            free.append(max(gpus_per_node, bundle.gpus))
        free[node] -= bundle.gpus
        roles = [slot.role for slot in bundle.slots]
        nodes[node].update(roles)
        tenants += [list(roles) for _ in range(bundle.gpus)]
    return [dict(node) for node in nodes], tenants


def _problems(
    actors: Sequence[Actors], shared: Sequence[tuple[str, ...]], machine: Machine, push: int = 0
) -> Iterator[Problem]:
    by_role = {one.need.role: one for one in actors}
    for role, one in by_role.items():
        memory = one.memory
        if one.need.workers > machine.gpus_per_node:
            yield Problem(
                (role,),
                f"{role} needs {one.need.workers} GPUs on one node, of which each has {machine.gpus_per_node}",
            )
        if one.shape.heads % one.need.workers:
            yield Problem((role,), f"{role}: {one.shape.heads} attention heads can't be split over {one.need.workers}")
        if one.shape.heads % one.together or (one.shape.kv_heads % one.together and one.together % one.shape.kv_heads):
            heads = f"{one.shape.heads} attention and {one.shape.kv_heads} key-value heads"
            yield Problem((role,), f"{role}: {heads} can't be split by learner.sequence_parallel={one.together}")
        if memory.total > memory.limit:
            of = "its share of a GPU" if one.kind == "engine" else "a GPU without what the allocator loses"
            yield Problem(
                (role,), f"{role} needs {_gib(memory.total)} on each GPU, more than {of}, {_gib(memory.limit)}"
            )
    for roles in shared:
        tenants = [by_role[role] for role in roles]
        learning = sum(t.memory.reserved if t.kind == "learner" else t.memory.resting for t in tenants)
        others = sum(t.memory.resting if t.kind == "learner" else t.memory.reserved for t in tenants)
        pushing = sum(while_pushing(t, push) for t in tenants) if {"learner", "rollout"} <= set(roles) else 0
        room = int(machine.gpu_bytes * (1 - FREE_FOR_ALLOCATOR))
        most = max(learning, others, pushing)
        if most > room:
            when = " during a weight sync" if most == pushing else ""
            yield Problem(
                tuple(dict.fromkeys(roles)),
                f"{' + '.join(roles)} take {_gib(most)} of the GPU that they share{when}, which has "
                f"{_gib(room)} without what the allocator loses",
            )


def _host_problems(nodes: Sequence[dict[str, int]], host: Sequence[Parts], machine: Machine) -> Iterator[Problem]:
    if machine.host_bytes is None:
        return
    told = set()
    for node, parts in zip(nodes, host, strict=True):
        total, largest = sum(parts.values()), max(parts, key=lambda part: parts[part])
        if total > machine.host_bytes and str(node) not in told:
            told.add(str(node))  # once for nodes that are alike
            yield Problem(
                tuple(node),
                f"a node with {', '.join(f'{count} {role}' for role, count in node.items())} needs {_gib(total)} of "
                f"host memory, most of it for {largest} ({_gib(parts[largest])}), and has {_gib(machine.host_bytes)}",
            )


def _gib(count: int) -> str:
    return f"{count / GIB:.1f} GiB"


# ---- The nearest settings that fit -----------------------------------------------------------------------------------


def proposals(job: Any, plan: Plan, replan: Callable[[Any], Plan], machine: Machine) -> list[tuple[Change, ...]]:
    """Settings with which all of it fits, each tried: single ones, else pairs, else the nearest for each role that
    doesn't fit, together. [] where none was found."""
    options = list(_options(job, plan, machine))

    def solves(changes: Sequence[Change], roles: set[str] | None = None) -> bool:
        changed = with_changes(job, changes)
        if changed is None:
            return False
        left = replan(changed).problems
        return not any(roles is None or roles & set(problem.roles) for problem in left)

    for count in (1, 2):
        if found := _search(options, count, solves):
            return found[:MOST_PROPOSALS]
    together: list[Change] = []
    for role in dict.fromkeys(role for problem in plan.problems for role in problem.roles):
        own = [(key, values) for key, values in options if _concerns(key, role, plan)]
        for count in (1, 2, 3):
            if found := _search(own, count, lambda changes, role=role: solves(changes, {role})):  # type: ignore[misc]
                together += [change for change in found[0] if change not in together]
                break
    return [tuple(together)] if together and solves(together) else []


def _search(
    options: Sequence[tuple[str, Sequence[Any]]], count: int, solves: Callable[[Sequence[Change]], bool]
) -> list[tuple[Change, ...]]:
    """For every choice of so many settings the nearest values that solve it; the nearest choice first.

    A step is one value further; one that takes more GPUs counts double.
    """
    found: list[tuple[int, tuple[Change, ...]]] = []
    for chosen in combinations(options, count):
        weights = [2 if key.endswith(TAKES_GPUS) else 1 for key, _ in chosen]

        def far(at: tuple[int, ...], weights: Sequence[int] = weights) -> int:
            return sum(weight * (k + 1) for weight, k in zip(weights, at, strict=True))

        for at in sorted(product(*(range(len(values)) for _, values in chosen)), key=far):
            changes = tuple((key, values[k]) for (key, values), k in zip(chosen, at, strict=True))
            if solves(changes):
                found.append((far(at), changes))
                break
    return [changes for _, changes in sorted(found, key=lambda one: one[0])]


def _concerns(key: str, role: str, plan: Plan) -> bool:
    keys = {one.key for phase in plan.phases for one in phase.actors if one.need.role == role}
    return any(key.startswith(f"{section}.") for section in keys)


def _options(job: Any, plan: Plan, machine: Machine) -> Iterator[tuple[str, list[Any]]]:
    """(setting, values from near to far) that could make it fit; what costs nothing but time first."""
    yield from _learner_options(job)
    engines: dict[str, EngineConfig] = {"rollout": job.rollout} if hasattr(job, "rollout") else {}
    scorers: dict[str, RewardModelFeedback] = {}
    for section, key in sections(job).values():
        if isinstance(section, RewardModelFeedback):
            scorers[key] = section
        else:
            engines[key] = section
    contexts = {one.key: one.memory.holds["context"] for p in plan.phases for one in p.actors if one.kind == "engine"}
    for key, engine in engines.items():
        if job.cluster.shares_gpus("cuda") and not engine.sleep:
            yield f"{key}.sleep", [True]
        yield f"{key}.tensor_parallel", _doubled(engine.tensor_parallel, machine.gpus_per_node)
        now = engine.gpu_memory_utilization
        steps = [k / 20 for k in range(2, 20)]
        yield f"{key}.gpu_memory_utilization", sorted((s for s in steps if s != now), key=lambda s: abs(s - now))
        yield f"{key}.max_context", _halved(contexts.get(key, 0), 1024)
    for key, scorer in scorers.items():
        yield f"{key}.tokens_per_batch", _halved(scorer.tokens_per_batch, 512)
    if job.cluster.shares_gpus("cuda"):
        yield "cluster.gpus_per_actor", [1.0]


def _learner_options(job: Any) -> Iterator[tuple[str, list[Any]]]:
    learner = getattr(job, "learner", None)
    if learner is None:
        return
    if not learner.gradient_checkpointing:
        yield "learner.gradient_checkpointing", [True]
    yield "learner.zero_stage", list(range(learner.zero_stage + 1, 4))
    yield "learner.ranks", _doubled(learner.ranks, MOST_RANKS)
    yield "learner.sequence_parallel", _doubled(learner.sequence_parallel, learner.ranks)
    yield "learner.tokens_per_micro_batch", _halved(learner.tokens_per_micro_batch, 512)
    if not isinstance(job, RewardModelJob):  # the logits of all tokens, where nothing bounds them
        yield "learner.logits_chunk", _halved(learner.logits_chunk or 2 * LOGITS_CHUNK, 256)
    for name in ("optimizer", "parameters"):
        if getattr(learner.offload, name) == "none":
            yield f"learner.offload.{name}", ["cpu"]


def _doubled(value: int, most: int) -> list[int]:
    return [value * 2**k for k in range(1, 12) if value * 2**k <= most]


def _halved(value: int, least: int) -> list[int]:
    return [value // 2**k for k in range(1, 12) if value // 2**k >= least]


def with_changes(job: Any, changes: Sequence[Change]) -> Any | None:
    """The job with other settings; None where they contradict the rest of the config."""
    values = copy.deepcopy(job.model_dump())
    for key, value in changes:
        section = values
        *path, last = key.split(".")
        for part in path:
            section = section[part]
        section[last] = value
    try:
        return type(job).model_validate(values)
    except ValidationError:
        return None


def written(value: Any) -> str:
    """As the command line takes it."""
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)
