"""Places the actors of a job, starts them, and ends them."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

import ray
from ray.util.placement_group import remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

from rlaif_ray import precision as number_types
from rlaif_ray.config.jobs import TrainJob
from rlaif_ray.config.roles import settings
from rlaif_ray.config.sections import EngineConfig
from rlaif_ray.errors import InputError, LearnerLostError
from rlaif_ray.learner.engine import RankSpec, learner_environment
from rlaif_ray.output import say
from rlaif_ray.rollout.vllm_engine import EngineSpec, engine_environment
from rlaif_ray.runtime.actors import EngineActor, LearnerActor, RewardModelActor
from rlaif_ray.runtime.groups import WRITING, DpoGroup, EngineGroup, LearnerGroup, RewardGroup, ScorerGroup, SftGroup
from rlaif_ray.runtime.loopback import loopback_environment
from rlaif_ray.runtime.memory_plan import sections
from rlaif_ray.runtime.placement import (
    NOTE_S,
    Slot,
    actor_slots,
    by_node,
    displaced,
    job_needs,
    nodes_of,
    reserve,
    wait_for_place,
)
from rlaif_ray.runtime.places import require_places
from rlaif_ray.runtime.replicas import Replicas
from rlaif_ray.runtime.session import open_session
from rlaif_ray.runtime.supervision import HEALTH, START_TRIES, Limits, Watch, Watched
from rlaif_ray.runtime.turns import Turns
from rlaif_ray.runtime.waiting import Starting, gather
from rlaif_ray.runtime.weight_sync import Sync, choose_backend

if TYPE_CHECKING:
    from rlaif_ray.config.sections import (
        ClusterConfig,
        JudgeConfig,
        PolicyConfig,
        Precision,
        RewardModelFeedback,
    )

FLAGS_S = 60.0  # for a node to say what its CPUs can do: it may have to start a process
DTYPE_NAMES = {"fp32": "float32", "bf16": "bfloat16"}


@contextmanager
def open_cluster(job: Any, *, leave: Callable[[], bool] = lambda: False) -> Iterator[Cluster]:
    """Ray with a place for every actor of the job (any of config/jobs.py). A Ray that was started here ends here;
    actors end in any case. While places are waited for, `leave` says whether to give up (Preempted)."""
    with open_session(job.cluster, [job]):
        group = None
        cluster = None
        try:
            device: Literal["cpu", "cuda"] = _device(job)
            if isinstance(job, TrainJob):
                choose_backend(job.weight_sync, job.cluster, device)  # wrong input shows before anything starts
            check_sleep(job, device)
            slots = actor_slots(job, device)
            require_places(job, slots, device, note=say)
            group = reserve(slots, job.cluster.start_timeout_s, note=say, leave=leave) if slots else None
            cluster = Cluster(job, device, slots, group)
            yield cluster
        finally:
            if cluster is not None:
                cluster.stop()
            if group is not None:
                with suppress(Exception):  # Ray itself may be what failed
                    remove_placement_group(group)


@contextmanager
def open_ray(cfg: ClusterConfig, jobs: Sequence[Any]) -> Iterator[None]:
    """Ray for jobs that run one after the other in this process: within it each `open_cluster` uses this one.

    A Ray that was started here ends here. Where no job has an actor, no Ray is started.
    """
    if not any(job_needs(job) for job in jobs):
        yield
        return
    with open_session(cfg, jobs):
        yield


def _device(job: Any) -> Literal["cpu", "cuda"]:
    wanted, gpus = job.cluster.device, ray.cluster_resources().get("GPU", 0)
    if wanted == "gpu" and not gpus:
        raise InputError(
            "cluster.device=gpu needs GPUs (the cluster has registered none): the job would wait for ever. "
            "Add GPU nodes, or use cluster.device=cpu."
        )
    return "cuda" if wanted == "gpu" or (wanted == "auto" and gpus) else "cpu"


def check_sleep(job: Any, device: Literal["cpu", "cuda"]) -> None:
    """Engines may sleep where they share GPUs.

    Raises:
        InputError: one is to sleep that does not.
    """
    engines = {key: cfg for cfg, key in sections(job).values()} | {"rollout": getattr(job, "rollout", None)}
    for key, cfg in engines.items():
        if isinstance(cfg, EngineConfig) and cfg.sleep and not job.cluster.shares_gpus(device):
            raise InputError(
                f"{key}.sleep=true needs GPUs that actors share (got cluster.gpus_per_actor="
                f"{job.cluster.gpus_per_actor:g} on {'CPUs' if device == 'cpu' else 'GPUs'}): it frees memory for "
                f"others of the same GPU. Leave it out, or set cluster.gpus_per_actor below 1 on GPUs."
            )


def _nodes_fast_in_bf16(nodes: Collection[str], timeout_s: float) -> tuple[bool, str]:
    """Whether the CPUs of all these nodes are, and what the user should know of that: all actors of a role compute in
    one precision, wherever they are placed."""
    own = ray.get_runtime_context().get_node_id()
    found: list[bool | None] = [number_types.fast_in_bf16()] if own in nodes else []  # None: it did not say
    if False not in found:
        asked = [_ask(node) for node in sorted(set(nodes) - {own})]
        ready = ray.wait(asked, num_returns=len(asked), timeout=timeout_s)[0] if asked else []
        found += [_said(ref) if ref in ready else None for ref in asked]
    if found and all(found):
        return True, (
            "precision=auto is bf16 here: these CPUs have AMX, which makes it several times faster. Use "
            "precision=fp32 for the digits of other CPUs."
        )
    if True in found and False in found:
        return False, f"precision=auto is fp32 here: of {len(nodes)} nodes not all have CPUs with AMX."
    if True in found:
        return False, (
            f"precision=auto is fp32 here: {found.count(None)} of {len(nodes)} nodes did not say within {timeout_s:g} "
            f"s whether they have AMX. Set precision=bf16 if they do."
        )
    return False, ""


def _ask(node: str) -> Any:
    """The ref of whether that node's CPU is fast in bf16."""
    place = NodeAffinitySchedulingStrategy(node, soft=False)
    return ray.remote(num_cpus=0)(number_types.fast_in_bf16).options(scheduling_strategy=place).remote()


def _said(ref: Any) -> bool | None:
    try:
        return bool(ray.get(ref))
    except ray.exceptions.RayError:  # the node is gone
        return None


class Cluster:
    """Starts the job's actors in their places."""

    def __init__(self, job: Any, device: Any, slots: list[Slot], group: Any) -> None:
        self.device: Literal["cpu", "cuda"] = device
        self._job, self._slots, self._group = job, slots, group
        self._node = ray.get_runtime_context().get_node_id()
        self._watch = Watch()
        self._limits = Limits(job.cluster.start_timeout_s, job.cluster.call_timeout_s, job.cluster.silent_after_s)
        self._replicas: list[Replicas] = []
        self._ranks: list[Watched] = []
        self._starting: Starting | None = None  # the ranks
        self._turns = Turns(slots)
        self._sync: Sync | None = None
        self._note: Callable[[str], None] = say  # before there is a display
        self._leave: Callable[[], bool] = lambda: False
        self._looked = time.monotonic()  # at the places
        self._fast_in_bf16: bool | None = None  # the nodes' CPUs; None: nobody asked yet
        if group is not None:
            self._watch.every_beat(self._tell_displaced)

    def precision(self, choice: Precision) -> Literal["fp32", "bf16"]:
        """What a section's `precision` comes to on these nodes."""
        if choice == "auto" and self.device == "cpu" and self._fast_in_bf16 is None:
            nodes = set(nodes_of(self._group).values()) if self._group is not None else set()
            self._fast_in_bf16, told = _nodes_fast_in_bf16(nodes, min(FLAGS_S, self._limits.start_s))
            if told:
                self._note(told)
        return number_types.chosen_precision(choice, self.device, fast=self._fast_in_bf16)

    def precisions(self) -> dict[str, Literal["fp32", "bf16"]]:
        """What every `precision` of the job comes to on these nodes, by dotted key."""
        found = [one for one in settings(self._job) if one.left_to_machine]
        return {".".join(one.key): self.precision(one.value) for one in found}

    def start_rollouts(
        self, policy: PolicyConfig, cfg: EngineConfig, *, context: int, receives_weights: bool = True
    ) -> EngineGroup:
        """Engines that sample from the policy, prompts and answers within `context` tokens. `wait` waits for them."""
        backend = None
        if receives_weights:
            backend = choose_backend(self._job.weight_sync, self._job.cluster, self.device)
        return self._start_engines("rollout", self._engine_spec(policy, cfg, context=context, transfer=backend))

    def start_judges(self, cfg: JudgeConfig, *, context: int, role: str = "judge") -> EngineGroup:
        """Engines of a judge's model. `wait` waits for them."""
        return self._start_engines(role, self._engine_spec(cfg, cfg, context=context, transfer=None))

    def start_reward_models(self, cfg: RewardModelFeedback, *, role: str = "reward_model") -> ScorerGroup:
        """Actors that score with a reward model. `wait` waits for them."""
        slots = self._of(role)
        precision = self.precision(cfg.precision)
        environment = {"TOKENIZERS_PARALLELISM": "false"}
        if self.device == "cpu":
            environment |= {"OMP_NUM_THREADS": str(self._threads(len(slots))), "CUDA_VISIBLE_DEVICES": ""}
        threads, shares_gpu = self._threads(len(slots)), self._job.cluster.shares_gpus(self.device)

        def launch(k: int) -> tuple[Any, ...]:
            actor = self._spawn(RewardModelActor, slots[k], environment)
            given = (cfg, self.device, precision, threads, shares_gpu, self._job.chat_date)
            ref, ahead = self._turns.start(slots[k], lambda ahead: actor.start.remote(*given, ahead))
            return actor, ref, *ahead

        return ScorerGroup(self._replicate(role, len(slots), launch))

    def _engine_spec(self, model: Any, cfg: EngineConfig, *, context: int, transfer: str | None) -> EngineSpec:
        return EngineSpec(
            model=model.model,
            revision=model.revision,
            trust_remote_code=model.trust_remote_code,
            dtype=DTYPE_NAMES[self.precision(model.precision)],
            device=self.device,
            max_context=context,
            tensor_parallel=cfg.tensor_parallel,
            gpu_memory_utilization=cfg.gpu_memory_utilization,
            kv_cache_gb=cfg.kv_cache_gb,
            seed=self._job.seed,
            threads=self._threads(1),
            transfer_backend=transfer,
            sleep=cfg.sleep,
            shares_gpu=cfg.tensor_parallel == 1 and self._job.cluster.shares_gpus(self.device),
            engine_kwargs=cfg.engine_kwargs,
        )

    def _start_engines(self, role: str, spec: EngineSpec) -> EngineGroup:
        slots = self._of(role)

        def launch(k: int) -> tuple[Any, ...]:
            actor = self._spawn(EngineActor, slots[k], engine_environment(spec))
            ref, ahead = self._turns.start(slots[k], lambda ahead: actor.start.remote(spec, ahead))
            return actor, ref, *ahead

        takes_weights = spec.transfer_backend is not None
        return EngineGroup(
            self._replicate(f"{role} engine", len(slots), launch, takes_weights=takes_weights, takes_turns=spec.sleep)
        )

    def _replicate(
        self,
        role: str,
        count: int,
        launch: Callable[[int], tuple[Any, ...]],
        *,
        takes_weights: bool = False,
        takes_turns: bool = False,
    ) -> Replicas:
        replicas = Replicas(
            role,
            count,
            launch,
            watch=self._watch,
            limits=self._limits,
            takes_weights=takes_weights,
            takes_turns=takes_turns,
            note=lambda text: self._note(text),
        )
        self._replicas.append(replicas)
        return replicas

    def start_learner(self) -> LearnerGroup:
        """Ranks of the RL learner. `wait` waits for them."""
        return LearnerGroup(*self._start_ranks())

    def start_reward_learner(self, total_steps: int) -> RewardGroup:
        """Ranks that train a reward model. `wait` waits for them."""
        return RewardGroup(*self._start_ranks(total_steps)[:2])

    def start_sft_learner(self, total_steps: int) -> SftGroup:
        """Ranks that fine-tune a language model. `wait` waits for them."""
        return SftGroup(*self._start_ranks(total_steps)[:2])

    def start_dpo_learner(self, total_steps: int) -> DpoGroup:
        """Ranks that train a policy on preference labels. `wait` waits for them."""
        return DpoGroup(*self._start_ranks(total_steps)[:2])

    def _start_ranks(self, total_steps: int | None = None) -> tuple[list[Watched], Any, Literal["fp32", "bf16"]]:
        """Learner ranks, the job and their precision; rank 0 first, since it says where the others find it."""
        job = self._job
        precision = self.precision(job.policy.precision)
        slots, address, port = self._begin_ranks(self._of("learner"))
        specs = [
            RankSpec(rank, len(slots), 0, address, port, self.device, self._threads(len(slots)))
            for rank in range(len(slots))
        ]
        begun = [
            self._turns.start(slot, partial(rank.actor.start.remote, job, spec, precision, total_steps))
            for rank, spec, slot in zip(self._ranks, specs, slots, strict=True)
        ]
        refs, ahead = zip(*begun, strict=True)
        self._starting = Starting(refs, ahead, self._ranks, self._limits.start_s)
        return self._ranks, job, precision

    def _begin_ranks(self, slots: list[Slot]) -> tuple[list[Slot], str, int]:
        """The processes of the ranks, up and watched: their slots by rank, and where rank 0 is to be met.

        Ray may hear of a lost node seconds after we do, and until then still gives places there: what begins in one
        dies of it, and begins again.

        Raises:
            LearnerLostError: one died each time.
        """
        base = RankSpec(0, len(slots), 0, "", 0, self.device, self._threads(len(slots)))
        environment = {
            k: v
            for k, v in learner_environment(base).items()
            if k in ("OMP_NUM_THREADS", "DS_ACCELERATOR", "CUDA_VISIBLE_DEVICES")
        }
        tries = 0
        while True:
            wait_for_place(self._group, self._slots, self._limits.start_s, leave=self._leave)
            if self.device == "cuda" and (size := self._job.learner.neighbours) > 1:
                slots = by_node(slots, nodes_of(self._group), size)
            actors = [self._spawn(LearnerActor, slot, environment) for slot in slots]
            self._ranks = [Watched(f"learner rank {k}", actor, self._limits.silent_s) for k, actor in enumerate(actors)]
            for rank in self._ranks:
                self._watch.add(rank)
            asked = [actor.rendezvous.remote() for actor in actors]
            try:
                address, port = gather(
                    asked, who="learner ranks (rendezvous)", timeout_s=self._limits.start_s, ranks=self._ranks
                )[0]
                return slots, address, port
            except LearnerLostError as error:
                self.stop_learner()
                tries += 1
                if tries == START_TRIES:
                    raise
                self._note(f"{error}: beginning again")

    def tell(self, note: Callable[[str], None], leave: Callable[[], bool]) -> None:
        """`note` is told of losses and waits from now on; `leave` says whether to give up waiting (Preempted)."""
        self._note, self._leave = note, leave
        for replicas in self._replicas:
            replicas.leave = leave

    def _tell_displaced(self) -> None:
        """Says every few seconds what is missing, while a lost node's actors have no place."""
        if time.monotonic() - self._looked > NOTE_S:
            self._looked = time.monotonic()
            told = displaced(self._group, self._slots)
            if told is not None:
                self._note(told)

    def wait(self) -> None:
        """Until every actor started so far is ready. They load side by side, or in turn where they share a GPU: while
        engines are waited for, ranks are looked at as well."""
        for replicas in self._replicas:
            replicas.wait_started(self._look_at_ranks)
        told = self._starting.wait() if self._starting is not None else []
        self._starting = None
        for note in told[0] if told else []:  # each rank says the same
            self._note(note)
        for rank in self._ranks:
            rank.started()

    def _look_at_ranks(self) -> None:
        if self._starting is not None:
            self._starting.look()

    def stop_engines(self, engines: EngineGroup) -> None:
        """Ends these; their places are free for others of the same role."""
        engines.replicas.stop()
        self._replicas.remove(engines.replicas)

    def stop_learner(self) -> None:
        """Ends what is left of the learner; its places are free for another."""
        if self._sync is not None:
            with suppress(Exception):  # a dead or busy learner: it ends below, and its segments with it
                self._sync.close()
            self._sync = None
        self._watch.discard(self._ranks)
        for rank in self._ranks:
            rank.lose("ended")
        self._ranks, self._starting = [], None

    def connect(self, learner: LearnerGroup, rollouts: EngineGroup) -> Sync:
        """The way for weights from the learner to the rollout engines."""
        job = self._job
        self._sync = Sync(
            learner,
            rollouts,
            job.weight_sync,
            choose_backend(job.weight_sync, job.cluster, self.device),
            engine_workers=job.rollout.tensor_parallel,
            timeout_s=job.cluster.call_timeout_s,
        )
        return self._sync

    def pids(self) -> list[int]:
        """Processes of the actors on this node. Asks nothing of Ray: other threads call it, also after the end."""
        return [beat.pid for beat in self._watch.beats() if beat.node == self._node]

    def _of(self, role: str) -> list[Slot]:
        return [s for s in self._slots if s.role == role]

    def _threads(self, sharing: int) -> int:
        """Compute threads of one of `sharing` processes that work at the same time."""
        return self._job.cluster.threads_per_actor or max(1, (os.cpu_count() or 1) // sharing)

    def _spawn(self, actor_class: type, slot: Slot, environment: dict[str, str]) -> Any:
        strategy = PlacementGroupSchedulingStrategy(self._group, slot.bundle)
        options: dict[str, Any] = {"num_cpus": slot.cpus, "scheduling_strategy": strategy}
        if slot.gpus:
            options["num_gpus"] = slot.gpus
        carried = {k: os.environ[k] for k in ("HF_HUB_OFFLINE", "HF_HOME", "RLAIF_CACHE") if k in os.environ}
        environment = loopback_environment() | environment | carried
        options |= {"concurrency_groups": {HEALTH: 1, WRITING: 1}, "runtime_env": {"env_vars": environment}}
        actor: Any = ray.remote(**options)(actor_class).remote()
        return actor

    def stop(self) -> None:
        """Ends every actor; frees what the sync staged."""
        self._watch.stop()
        self.stop_learner()
        for replicas in self._replicas:
            replicas.stop()
        self._replicas = []
