"""The learner's weights into every rollout engine, bucket by bucket, verified by checksum."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import ray

from rlaif_ray.errors import EngineError, InputError, LearnerLostError, StaleWeightsError
from rlaif_ray.rollout.checksum import MODULUS
from rlaif_ray.rollout.weight_transfer import with_handles_of_all
from rlaif_ray.runtime.supervision import HEALTH
from rlaif_ray.runtime.waiting import gather
from rlaif_ray.types import SyncReport

if TYPE_CHECKING:
    from rlaif_ray.config.sections import ClusterConfig, WeightSyncConfig
    from rlaif_ray.runtime.groups import EngineGroup, LearnerGroup
    from rlaif_ray.runtime.replicas import Replica

Backend = Literal["shm", "ipc", "nccl"]
Metadata = list[tuple[str, str, tuple[int, ...]]]  # (name, dtype, shape)
Gpu = tuple[str, str]  # (node, GPU of the node)
CLOSE_TIMEOUT_S = 10.0
ANSWER_S = 10.0  # for a sign of life before a collective
BYTES = {"float64": 8, "int64": 8, "float32": 4, "int32": 4, "bfloat16": 2, "float16": 2, "int16": 2}
BYTES |= {"int8": 1, "uint8": 1, "bool": 1}


def choose_backend(cfg: WeightSyncConfig, cluster: ClusterConfig, device: Literal["cpu", "cuda"]) -> Backend:
    """The transport: what the config says, or for "auto" what fits the hardware.

    Raises:
        InputError: the named backend can't work on this device.
    """
    if cfg.backend == "auto":
        if device == "cpu":
            return "shm"
        return "ipc" if cluster.shares_gpus(device) else "nccl"
    if (cfg.backend == "shm") != (device == "cpu"):
        raise InputError(
            f"weight_sync.backend={cfg.backend} does not work on cluster.device={device}: shm is for CPUs, ipc and "
            f"nccl need GPUs. Use weight_sync.backend=auto."
        )
    return cfg.backend


def make_buckets(groups: list[list[str]], metadata: Metadata, limit_bytes: int) -> list[list[str]]:
    """Consecutive layer groups together up to the limit; a group is never split, its parts are loaded together."""
    sizes = {name: tensor_bytes(dtype, shape) for name, dtype, shape in metadata}
    buckets: list[list[str]] = []
    used = 0
    for group in groups:
        size = sum(sizes[name] for name in group)
        if not buckets or used + size > limit_bytes:
            buckets.append([])
            used = 0
        buckets[-1] += group
        used += size
    return buckets


def tensor_bytes(dtype: str, shape: tuple[int, ...]) -> int:
    count = BYTES[dtype]
    for n in shape:
        count *= n
    return count


def must_share_gpus(ranks: list[list[Gpu]], engines: list[tuple[str, list[Gpu]]]) -> None:
    """By IPC an engine gets its weights from the learner rank of its own GPU.

    Raises:
        InputError: one of the engines (name, GPUs) has none.
    """
    own = {gpu for gpus in ranks for gpu in gpus}
    for name, gpus in engines:
        if not set(gpus) <= own:
            raise InputError(
                f"weight_sync.backend=ipc needs a learner rank on every GPU of a rollout engine (got none on GPU "
                f"{', '.join(gpu for _, gpu in gpus)} of {name}; the ranks have "
                f"{', '.join(sorted(gpu for _, gpu in own))}): memory is shared within one GPU. Use as many "
                f"learner.ranks as rollout.replicas, or cluster.gpus_per_actor=1 with nccl."
            )


def differs(found: list[int], checksum: int) -> bool:
    """Whether an engine's checksums, one a worker, say that other bytes came than the learner sent: every worker
    receives every tensor whole, before it takes its part."""
    return any(c != checksum for c in found)


class Sync:
    """The WeightSync between a learner and its rollout engines. Engines that are lost on the way are left out."""

    def __init__(
        self,
        learner: LearnerGroup,
        rollouts: EngineGroup,
        cfg: WeightSyncConfig,
        backend: Backend,
        *,
        engine_workers: int,
        timeout_s: float,
    ) -> None:
        self._learner, self._rollouts = learner, rollouts
        self._ranks = learner.actors
        self._backend, self._workers, self._timeout_s = backend, engine_workers, timeout_s
        found = self._of_ranks([self._ranks[0].weight_metadata.remote()])[0]
        self._metadata: Metadata = found[0]
        self._buckets = make_buckets(found[1], self._metadata, cfg.bucket_mb * 2**20)
        self._bytes = sum(tensor_bytes(dtype, shape) for _, dtype, shape in self._metadata)
        self._connected: list[Replica] = []
        self._open = False
        self._version: int | None = None
        self._connect(rollouts.replicas.usable())
        rollouts.replicas.admit = self._admit

    def _of_ranks(self, refs: list[Any]) -> list[Any]:
        who = "learner (weight sync)"
        return gather(refs, who=who, timeout_s=self._timeout_s, ranks=self._learner.ranks)

    def _of_engines(self, engines: list[Replica], ask: Callable[[Any], Any]) -> list[tuple[Replica, Any]]:
        """What those engines say that are not lost meanwhile."""
        return self._answers([(engine, ask(engine.actor)) for engine in engines])

    def _answers(self, asked: list[tuple[Replica, Any]]) -> list[tuple[Replica, Any]]:
        found = []
        for engine, ref in asked:
            try:
                found.append((engine, self._rollouts.replicas.answer(engine, ref, self._timeout_s)))
            except EngineError:  # it is lost, and replaced by one that takes part in the next push
                continue
        return found

    def _connect(self, engines: list[Replica]) -> None:
        """Opens the learner's end, and that of engines that have none yet. NCCL's groups are of fixed size: there all
        meet anew whenever one is gone or has come."""
        anew = self._backend == "nccl" and engines != self._connected
        new = engines if anew else [engine for engine in engines if engine not in self._connected]
        options: dict[str, Any] = {}
        if self._backend == "shm" and new:
            self._must_share_a_node(new)
        if self._backend == "ipc" and new:
            own = self._of_ranks([rank.gpus.remote() for rank in self._ranks])
            theirs = self._of_engines(new, lambda e: e.gpus.remote())
            must_share_gpus(own, [(engine.watched.name, gpus) for engine, gpus in theirs])
        if anew:
            address, port = self._of_ranks([self._ranks[0].rendezvous.remote()])[0]
            options = {"address": address, "port": port, "world_size": 1 + self._workers * len(engines)}
        opening = []
        if anew or not self._open:
            opening = [rank.open_senders.remote(self._backend, options) for rank in self._ranks]
            self._open = True
        # Both ends meet in the rendezvous: neither is waited for before the other was asked.
        joining = [(engine, engine.actor.init_transfer.remote(self._place(k, options))) for k, engine in enumerate(new)]
        self._of_ranks(opening)
        self._answers(joining)
        self._connected = engines if anew else [*(e for e in self._connected if e.usable), *new]

    def _place(self, k: int, options: dict[str, Any]) -> dict[str, Any]:
        """What the k-th engine must know to join."""
        if self._backend != "nccl":
            return {}
        return {
            "master_address": options["address"],
            "master_port": options["port"],
            "rank_offset": 1 + k * self._workers,
            "world_size": options["world_size"],
        }

    def _must_share_a_node(self, engines: list[Replica]) -> None:
        own = self._of_ranks([self._ranks[0].process.remote()])[0][1]
        nodes = {own} | {node for _, (_, node) in self._of_engines(engines, lambda e: e.process.remote())}
        if len(nodes) > 1:
            raise InputError(
                f"weight_sync.backend=shm needs learner rank 0 and all rollout engines on one node (got "
                f"{len(nodes)} nodes): shared memory does not cross them. Run on one node, or on GPUs with nccl."
            )

    def _answering(self, engines: list[Replica]) -> list[Replica]:
        """Those that answer now: one silent member would hold up a whole NCCL group."""
        asked = [(e, e.actor.beat.options(concurrency_group=HEALTH).remote()) for e in engines]
        ready, _ = ray.wait([ref for _, ref in asked], num_returns=len(asked), timeout=ANSWER_S) if asked else ([], [])
        for engine, ref in asked:
            if ref not in ready:
                engine.watched.lose(f"did not answer within {ANSWER_S:g} s before a weight sync", blameless=True)
        return [engine for engine in engines if engine.usable]

    def push(self, version: int) -> SyncReport:
        """After this every engine that serves samples with exactly the learner's weights, known as `version`.

        An engine that is lost on the way is left out; one that comes back takes them before it serves.

        Raises:
            StaleWeightsError: an engine's checksum differs from the learner's.
            LearnerLostError: the learner died on the way.
        """
        self._version = version
        self._rollouts.weight_version = version
        return self._push(self._rollouts.replicas.usable())

    def _admit(self, newcomers: list[Replica], others_busy: bool) -> None:
        """Gives newcomers the weights that were pushed last. The learner is idle whenever this is called."""
        if self._version is None:
            return
        if self._backend == "nccl":
            if others_busy:
                return  # the whole group takes part
            newcomers = self._rollouts.replicas.usable()
        self._push(newcomers)

    def _push(self, engines: list[Replica]) -> SyncReport:
        assert self._version is not None
        started = time.perf_counter()
        for engine in engines:
            engine.serving = False
        if self._backend == "nccl":
            engines = self._answering(engines)
        self._connect(engines)
        engines = [engine for engine, _ in self._of_engines(engines, lambda e: e.start_update.remote())]
        try:
            checksum = (self._broadcast if self._backend == "nccl" else self._stage_ahead)(engines) % MODULUS
        except LearnerLostError:
            for engine in engines:  # half of the new weights are in it
                engine.watched.lose("was left with half of an update", blameless=True)
            raise
        version = self._version
        for engine, found in self._of_engines(engines, lambda e: e.finish_update.remote(version)):
            if differs(found, checksum):
                raise StaleWeightsError(
                    f"{engine.watched.name} has other weights than the learner after the sync to version {version} "
                    f"(checksums {found}, learner {checksum}): it must not sample. Report this with the model's name."
                )
            engine.serving = True
        return SyncReport(version, self._bytes, time.perf_counter() - started, f"{checksum:016x}")

    def _stage_ahead(self, engines: list[Replica]) -> int:
        """Two staging slots: while the engines load one bucket, the learner fills the other."""
        checksum = 0
        staged = [rank.stage.remote(self._buckets[0], 0) for rank in self._ranks]
        for k in range(len(self._buckets)):
            found = self._of_ranks(staged)
            info = with_handles_of_all([None if said is None else said[0] for said in found])
            checksum += found[0][1]
            loading = [(engine, engine.actor.update.remote(info)) for engine in engines if engine.usable]
            if k + 1 < len(self._buckets):
                staged = [rank.stage.remote(self._buckets[k + 1], (k + 1) % 2) for rank in self._ranks]
            self._answers(loading)
            for rank in self._ranks:
                rank.release.remote(k % 2)
        return checksum

    def _broadcast(self, engines: list[Replica]) -> int:
        """Sender and receivers run at the same time, in the order of the names.

        Raises:
            LearnerLostError: an engine was lost inside the collective, which then ends for nobody.
        """
        described = {name: (dtype, shape) for name, dtype, shape in self._metadata}
        checksum = 0
        for names in self._buckets:
            info = {
                "names": names,
                "dtype_names": [described[n][0] for n in names],
                "shapes": [list(described[n][1]) for n in names],
            }
            receiving = [engine.actor.update.remote(info) for engine in engines]
            sending = [rank.broadcast.remote(names) for rank in self._ranks]
            watched = [*self._learner.ranks, *(engine.watched for engine in engines)]
            sent = gather([*sending, *receiving], who="weight sync", timeout_s=self._timeout_s, ranks=watched)
            checksum += sent[0]
        return checksum

    def close(self) -> None:
        """Frees the staging memory.

        Raises:
            RunError: the learner is dead, and its memory with it, or too busy to close.
        """
        closing = [rank.close_senders.remote() for rank in self._ranks]
        gather(closing, who="learner (close weight sync)", timeout_s=min(self._timeout_s, CLOSE_TIMEOUT_S))
