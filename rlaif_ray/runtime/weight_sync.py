"""The learner's weights into every rollout engine, bucket by bucket, verified by checksum."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal

from rlaif_ray.errors import InputError, StaleWeightsError
from rlaif_ray.rollout.weight_transfer import layer_groups
from rlaif_ray.runtime.waiting import gather
from rlaif_ray.types import SyncReport

if TYPE_CHECKING:
    from rlaif_ray.config.sections import ClusterConfig, WeightSyncConfig
    from rlaif_ray.runtime.groups import EngineGroup, LearnerGroup

Backend = Literal["shm", "ipc", "nccl"]
Metadata = list[tuple[str, str, tuple[int, ...]]]  # (name, dtype, shape)
CLOSE_TIMEOUT_S = 10.0
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}


def choose_backend(cfg: WeightSyncConfig, cluster: ClusterConfig, device: Literal["cpu", "cuda"]) -> Backend:
    """The transport: what the config says, or for "auto" what fits the hardware.

    Raises:
        InputError: the named backend can't work on this device.
    """
    if cfg.backend == "auto":
        if device == "cpu":
            return "shm"
        return "ipc" if cluster.gpus_per_actor < 1 else "nccl"
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


class Sync:
    """The WeightSync between a learner and its rollout engines."""

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
        self._ranks, self._engines = learner.actors, rollouts.actors
        self._backend, self._timeout_s = backend, timeout_s
        self._metadata: Metadata = self._wait([self._ranks[0].weight_metadata.remote()], "learner")[0]
        names = [name for name, _, _ in self._metadata]
        self._buckets = make_buckets(layer_groups(names), self._metadata, cfg.bucket_mb * 2**20)
        self._bytes = sum(tensor_bytes(dtype, shape) for _, dtype, shape in self._metadata)
        self._connect(engine_workers)

    def _wait(self, refs: list[Any], who: str) -> list[Any]:
        return gather(refs, who=f"{who} (weight sync)", timeout_s=self._timeout_s)

    def _connect(self, engine_workers: int) -> None:
        if self._backend == "shm":
            nodes = {
                node for _, node in self._wait([a.process.remote() for a in (self._ranks[0], *self._engines)], "all")
            }
            if len(nodes) > 1:
                raise InputError(
                    f"weight_sync.backend=shm needs learner rank 0 and all rollout engines on one node (got "
                    f"{len(nodes)} nodes): shared memory does not cross them. Run on one node, or on GPUs with nccl."
                )
            options: dict[str, Any] = {}
        elif self._backend == "nccl":
            address, port = self._wait([self._ranks[0].rendezvous.remote()], "learner")[0]
            world = 1 + engine_workers * len(self._engines)
            options = {"address": address, "port": port, "world_size": world}
        else:
            options = {}
        opening = [rank.open_senders.remote(self._backend, options) for rank in self._ranks]
        infos: list[dict[str, Any]] = [{} for _ in self._engines]
        if self._backend == "nccl":
            infos = [
                {
                    "master_address": options["address"],
                    "master_port": options["port"],
                    "rank_offset": 1 + k * engine_workers,
                    "world_size": options["world_size"],
                }
                for k in range(len(self._engines))
            ]
        # Both ends meet in the rendezvous: neither is waited for before the other was asked.
        joining = [e.init_transfer.remote(info) for e, info in zip(self._engines, infos, strict=True)]
        self._wait(opening + joining, "learner and engines")

    def push(self, version: int) -> SyncReport:
        """After this every engine samples with exactly the learner's weights, known as `version`.

        Raises:
            StaleWeightsError: an engine's checksum differs from the learner's.
        """
        started = time.perf_counter()
        self._wait([e.start_update.remote() for e in self._engines], "rollout engines")
        send = self._broadcast if self._backend == "nccl" else self._stage_ahead
        checksum = send() % 2**63
        for k, found in enumerate(self._wait([e.finish_update.remote(version) for e in self._engines], "engines")):
            # Workers of a tensor-parallel engine on GPUs each hold a part, and replicate some: not comparable.
            if (self._backend == "shm" or len(found) == 1) and any(c != checksum for c in found):
                raise StaleWeightsError(
                    f"rollout engine {k} has other weights than the learner after the sync to version {version} "
                    f"(checksums {found}, learner {checksum}): it must not sample. Report this with the model's name."
                )
        return SyncReport(version, self._bytes, time.perf_counter() - started, f"{checksum:016x}")

    def _stage_ahead(self) -> int:
        """Two staging slots: while the engines load one bucket, the learner fills the other."""
        checksum = 0
        staged = [rank.stage.remote(self._buckets[0], 0) for rank in self._ranks]
        for k in range(len(self._buckets)):
            info, part = self._wait(staged, "learner")[0]
            checksum += part
            loading = [e.update.remote(info) for e in self._engines]
            if k + 1 < len(self._buckets):
                staged = [rank.stage.remote(self._buckets[k + 1], (k + 1) % 2) for rank in self._ranks]
            self._wait(loading, "rollout engines")
            self._ranks[0].release.remote(k % 2)
        return checksum

    def _broadcast(self) -> int:
        """Sender and receivers run at the same time, in the order of the names."""
        described = {name: (dtype, shape) for name, dtype, shape in self._metadata}
        checksum = 0
        for names in self._buckets:
            info = {
                "names": names,
                "dtype_names": [described[n][0] for n in names],
                "shapes": [list(described[n][1]) for n in names],
            }
            receiving = [e.update.remote(info) for e in self._engines]
            sent = self._wait([rank.broadcast.remote(names) for rank in self._ranks] + receiving, "learner and engines")
            checksum += sent[0]
        return checksum

    def close(self) -> None:
        """Frees the staging memory.

        Raises:
            RunError: the learner is dead, and its memory with it, or too busy to close.
        """
        closing = [rank.close_senders.remote() for rank in self._ranks]
        gather(closing, who="learner (close weight sync)", timeout_s=min(self._timeout_s, CLOSE_TIMEOUT_S))
