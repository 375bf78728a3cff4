"""Learners and engines as actors on one GPU, without a judge: what a weight sync needs, and nothing else.

An engine takes most of a minute to start, so all tests share two (conftest.py), which start at the same time.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any

import torch

from tests.gpu.device import CONTEXT, DEVICE, EXACT, GRAPHS, PRECISION, REHEARSAL, SHARE, free_port, gpu_model
from tests.jobs import embedded

if TYPE_CHECKING:
    from rlaif_ray.config.jobs import TrainJob
    from rlaif_ray.rollout.vllm_engine import EngineSpec
    from rlaif_ray.runtime.groups import EngineGroup, LearnerGroup
    from rlaif_ray.runtime.weight_sync import Sync
    from rlaif_ray.types import Experience, Prompt, SyncReport

GPUS_PER_ACTOR = 0.24
BACKEND: Any = "shm" if REHEARSAL else "ipc"
START_S = 1500.0 if REHEARSAL else 180.0
TIMEOUT_S = 1500.0 if REHEARSAL else 60.0  # a call that hangs is an error while its step still has time
HIDDEN = 1024  # 75 MB of weights in bf16: ten pushes that leak show


def make_job(model: str, **learner: Any) -> TrainJob:
    """Policy-gradient training of a policy alone, at a learning rate that moves every weight in one step: by about as
    much of a matrix's norm at any width, since Adam moves all its entries alike."""
    from rlaif_ray.config.jobs import TrainJob

    return embedded(
        TrainJob,
        {
            "policy": {"model": model, "precision": PRECISION},
            "algorithm": {"type": "rloo", "kl": {"coef": 0.0}, "old_logprobs": "learner"},
            "learner": {"lr": 2.56 / HIDDEN, **learner},
            "weight_sync": {"backend": BACKEND, "bucket_mb": 1},  # several buckets even for a tiny model
            "cluster": {"gpus_per_actor": GPUS_PER_ACTOR, "call_timeout_s": TIMEOUT_S},
        },
    )


def engine_spec(model: str, **engine_kwargs: Any) -> EngineSpec:
    from rlaif_ray.rollout.vllm_engine import EngineSpec

    return EngineSpec(
        model=model,
        revision=None,
        trust_remote_code=False,
        dtype="float32" if EXACT else "bfloat16",
        device=DEVICE,
        max_context=CONTEXT,
        tensor_parallel=1,
        gpu_memory_utilization=SHARE["gpu_memory_utilization"],
        kv_cache_gb=SHARE["kv_cache_gb"],
        seed=0,
        threads=2,
        transfer_backend=BACKEND,
        engine_kwargs={**SHARE["engine_kwargs"], **engine_kwargs},
    )


@contextmanager
def local_ray() -> Iterator[None]:
    """Ray on this machine, ended afterwards."""
    import logging
    import os

    import ray

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    gpus = 0 if REHEARSAL else 1
    ray.init(
        address="local",
        num_cpus=4,
        num_gpus=gpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
    )
    try:
        yield
    finally:
        ray.shutdown()


def _spawn(actor_class: type, environment: dict[str, str]) -> Any:
    import os

    import ray

    from rlaif_ray.runtime.supervision import HEALTH

    carried = {k: os.environ[k] for k in ("HF_HUB_OFFLINE",) if k in os.environ}
    options: dict[str, Any] = {"num_cpus": 1, "runtime_env": {"env_vars": environment | carried}}
    options["concurrency_groups"] = {HEALTH: 1}
    if not REHEARSAL:
        options["num_gpus"] = GPUS_PER_ACTOR
    return ray.remote(**options)(actor_class).remote()


@contextmanager
def launched_engine(spec: EngineSpec) -> Iterator[EngineGroup]:
    """One engine actor, which starts; ended afterwards."""
    import ray

    from rlaif_ray.rollout.vllm_engine import engine_environment
    from rlaif_ray.runtime.actors import EngineActor
    from rlaif_ray.runtime.groups import EngineGroup
    from rlaif_ray.runtime.replicas import Replicas
    from rlaif_ray.runtime.supervision import Limits, Watch

    runner = {} if REHEARSAL else {"VLLM_USE_V2_MODEL_RUNNER": "1"}
    actor, watch = _spawn(EngineActor, engine_environment(spec) | runner), Watch()
    try:
        launched = (actor, actor.start.remote(spec))
        limits = Limits(START_S, TIMEOUT_S, TIMEOUT_S)
        yield EngineGroup(Replicas("rollout engine", 1, lambda k: launched, watch=watch, limits=limits))
    finally:
        watch.stop()
        ray.kill(actor)


@contextmanager
def launched_learner(job: TrainJob) -> Iterator[tuple[LearnerGroup, Any]]:
    """One learner rank and the ref of its start; ended afterwards."""
    import ray

    from rlaif_ray.learner.engine import RankSpec, learner_environment
    from rlaif_ray.runtime.actors import LearnerActor
    from rlaif_ray.runtime.groups import LearnerGroup
    from rlaif_ray.runtime.supervision import Watched

    spec = RankSpec(0, 1, 0, "127.0.0.1", free_port(), DEVICE, threads=2)
    keep = ("OMP_NUM_THREADS", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES")
    actor = _spawn(LearnerActor, {k: v for k, v in learner_environment(spec).items() if k in keep})
    try:
        starting = actor.start.remote(job, spec, PRECISION)
        yield LearnerGroup([Watched("learner rank 0", actor, TIMEOUT_S)], job, PRECISION), starting
    finally:
        ray.kill(actor)


@contextmanager
def connected(learner: LearnerGroup, engines: EngineGroup, job: TrainJob) -> Iterator[Sync]:
    from rlaif_ray.runtime.weight_sync import Sync

    sync = Sync(learner, engines, job.weight_sync, BACKEND, engine_workers=1, timeout_s=TIMEOUT_S)
    try:
        yield sync
    finally:
        sync.close()


@dataclass(frozen=True)
class Pair:
    """A learner and an engine that are connected."""

    job: TrainJob
    learner: LearnerGroup
    engines: EngineGroup
    sync: Sync
    on_disk: list[tuple[int, ...]]  # greedy tokens of the engine as it started, before any push
    versions: Iterator[int] = field(default_factory=count)

    def push(self) -> SyncReport:
        """Of the next version; raises when the checksums of both ends differ."""
        return self.sync.push(next(self.versions))

    def greedy(self) -> list[tuple[int, ...]]:
        return greedy_tokens(self.engines)

    def experience(self, seed: int = 0) -> Experience:
        """Samples of the engine as the learner sees them, with random advantages."""
        from rlaif_ray.interfaces import GenerationSettings
        from rlaif_ray.types import Sample, Score

        completions = self.engines.generate(PROMPTS, GenerationSettings(2, 24, 1.0, seed=seed, ignore_eos=True))
        found = self.learner.annotate([Sample(c, Score(0.0)) for c in completions])
        noise = torch.randn(found.mask.shape, generator=torch.Generator().manual_seed(seed))
        return replace(found, advantages=noise, returns=noise)

    def gap(self, seed: int = 0) -> float:
        """Mean distance between the engine's log-probabilities of its samples and the learner's."""
        found = self.experience(seed)
        return float((found.logprobs - found.sampler_logprobs)[found.mask].abs().mean())


@dataclass(frozen=True)
class PairSpec:
    """A pair to be started."""

    tied: bool
    zero_stage: int
    engine_kwargs: Mapping[str, Any]


# As engines run by default on a GPU: with CUDA graphs. One of them can sleep, so that the other one tells of the rest
# where that fails.
PAIR_SPECS = {
    "tied": PairSpec(tied=True, zero_stage=3, engine_kwargs=GRAPHS),
    "untied": PairSpec(
        tied=False, zero_stage=0, engine_kwargs=GRAPHS | ({} if REHEARSAL else {"enable_sleep_mode": True})
    ),
}


@contextmanager
def running_pairs(names: Collection[str]) -> Iterator[dict[str, Pair | Exception]]:
    """Those of `PAIR_SPECS`, which start at the same time; an error in the place of one that didn't."""
    import ray

    with local_ray(), ExitStack() as stack:
        begun = {}
        for name in names:
            spec = PAIR_SPECS[name]
            model = gpu_model(tied=spec.tied, hidden=HIDDEN)
            engines = stack.enter_context(launched_engine(engine_spec(model, **spec.engine_kwargs)))
            job = make_job(model, zero_stage=spec.zero_stage)
            begun[name] = job, engines, stack.enter_context(launched_learner(job))
        found: dict[str, Pair | Exception] = {}
        for name, (job, engines, (learner, starting)) in begun.items():
            try:
                engines.replicas.wait_started()
                ray.get(starting, timeout=START_S)
                said = greedy_tokens(engines)
                sync = stack.enter_context(connected(learner, engines, job))
                found[name] = Pair(job, learner, engines, sync, said)
            except Exception as error:
                found[name] = error
        yield found


def inside(engines: EngineGroup, function: Any) -> Any:
    """`function` of the engine, run in its process. Nothing runs there meanwhile."""
    import ray

    (actor,) = engines.actors
    return ray.get(actor.__ray_call__.remote(lambda self: function(self._engine)), timeout=TIMEOUT_S)


def _prompts() -> list[Prompt]:
    from rlaif_ray.types import Message, Prompt

    draw = torch.Generator().manual_seed(7)
    lengths = [3, 17, 40, 90]
    rows = [tuple(torch.randint(3, 320, (n,), generator=draw).tolist()) for n in lengths]
    return [Prompt(f"p{k}", (Message("user", ""),), row) for k, row in enumerate(rows)]


PROMPTS = _prompts()


def greedy_tokens(engines: EngineGroup) -> list[tuple[int, ...]]:
    from rlaif_ray.interfaces import GenerationSettings

    return [c.tokens for c in engines.generate(PROMPTS, GenerationSettings(1, 32, 0.0, seed=0, ignore_eos=True))]
