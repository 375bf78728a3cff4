"""The learner's weights into every rollout engine, bucket by bucket, verified by checksum."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal

import ray

from rlaif_ray.errors import EngineError, InputError, LearnerLostError, RunError, StaleWeightsError
from rlaif_ray.rollout.buckets import largest, make_buckets, tensor_bytes
from rlaif_ray.runtime.supervision import HEALTH, POLL_S
from rlaif_ray.runtime.waiting import gather, so_far
from rlaif_ray.types import SyncReport

if TYPE_CHECKING:
    from rlaif_ray.config.sections import ClusterConfig, WeightSyncConfig
    from rlaif_ray.rollout.board import Source
    from rlaif_ray.rollout.sending import Sent
    from rlaif_ray.runtime.groups import EngineGroup, LearnerGroup
    from rlaif_ray.runtime.replicas import Replica

Backend = Literal["shm", "ipc", "nccl"]
Gpu = tuple[str, str]  # (node, GPU of the node)
WHO = "learner (weight sync)"
CLOSE_TIMEOUT_S = 10.0
ANSWER_S = 10.0  # for a sign of life before a collective
GIVE_UP_S = 10.0  # for members of a broken NCCL group to come out of it
MEETINGS = 3  # of NCCL groups that failed one after the other, before the run ends
BROADCASTS = 5  # that failed at the learner's end one after the other, before the run ends


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
    """Whether an engine's checksums, one a worker, don't say that the bytes came that the learner sent: every worker
    receives every tensor whole, before it takes its part. An engine without any checksum is not verified."""
    return not found or any(c != checksum for c in found)


def _failure_of(said: Any) -> str | None:
    """Why a rank has left, from its answer to `meet` or `send_all`."""
    failure: str | None = said if said is None or isinstance(said, str) else said.failure
    return failure


class Sync:
    """The WeightSync between a learner and its rollout engines. Engines that are lost on the way are left out.

    The driver makes a few calls to every actor and push: the buckets' loop runs in the actors (rollout/sending.py,
    rollout/receiving.py), which keep in step by themselves. Meanwhile the driver watches who is lost, and tells those
    who would wait for them.
    """

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
        metadata, groups = self._of_ranks([self._ranks[0].weight_metadata.remote()])[0]
        self._buckets = make_buckets(groups, metadata, cfg.bucket_mb * 2**20)
        self._shared_buckets = ray.put(self._buckets)
        self._bytes = sum(tensor_bytes(dtype, shape) for _, dtype, shape in metadata)
        self._connected: list[Replica] = []  # by NCCL the members of the group, in their order
        self._gpus: dict[int, set[Gpu]] = {}  # of each rank, where that matters
        self._gpus_of: dict[Replica, set[Gpu]] = {}
        self._failed_meetings: list[str] = []
        self._failed_broadcasts: list[str] = []
        self._version: int | None = None
        self._connect(rollouts.replicas.usable())
        rollouts.replicas.admit = self._admit

    def _of_ranks(self, refs: list[Any]) -> list[Any]:
        return gather(refs, who=WHO, timeout_s=self._timeout_s, ranks=self._learner.ranks)

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

    # Connecting

    def _connect(self, engines: list[Replica]) -> list[Replica]:
        """Those of the engines that are connected after it."""
        if self._backend == "nccl":
            self._meet(engines)
            return list(self._connected)
        new = [engine for engine in engines if engine not in self._connected]
        if self._backend == "shm" and new:
            self._must_share_a_node(new)
        if self._backend == "ipc" and new:
            self._see_gpus(new)
        joined = [engine for engine, _ in self._of_engines(new, lambda e: e.init_transfer.remote({}))]
        self._connected = [*(e for e in self._connected if e.usable), *joined]
        return [engine for engine in engines if engine in self._connected]

    def _must_share_a_node(self, engines: list[Replica]) -> None:
        own = self._of_ranks([self._ranks[0].process.remote()])[0][1]
        nodes = {own} | {node for _, (_, node) in self._of_engines(engines, lambda e: e.process.remote())}
        if len(nodes) > 1:
            raise InputError(
                f"weight_sync.backend=shm needs learner rank 0 and all rollout engines on one node (got "
                f"{len(nodes)} nodes): shared memory does not cross them. Run on one node, or on GPUs with nccl."
            )

    def _see_gpus(self, engines: list[Replica]) -> None:
        own = self._of_ranks([rank.gpus.remote() for rank in self._ranks])
        theirs = self._of_engines(engines, lambda e: e.gpus.remote())
        must_share_gpus(own, [(engine.watched.name, gpus) for engine, gpus in theirs])
        self._gpus = {rank: set(gpus) for rank, gpus in enumerate(own)}
        self._gpus_of |= {engine: set(gpus) for engine, gpus in theirs}

    def _meet(self, engines: list[Replica]) -> None:
        """NCCL's groups are of fixed size: all meet anew whenever one is gone or has come.

        One that is lost before the gate is left out: the group is given up, and the others make another. One that is
        lost behind it takes the others along, which wait for it in NCCL: they are ended after `GIVE_UP_S`, and their
        replacements meet at the next push. `MEETINGS` such groups in a row end the run.

        Raises:
            RunError: no group came about several times, or NCCL can't be used here.
        """
        engines = [engine for engine in engines if engine.usable]
        if not engines and self._connected:
            self._of_ranks([self._break_off()])
        while engines and engines != self._connected:
            self._connected = []
            reason = self._try_to_meet(engines)
            if reason is None:
                self._connected, self._failed_meetings = engines, []
                return
            engines = [engine for engine in engines if engine.usable]
            self._failed_meetings.append(reason)
            if len(self._failed_meetings) >= MEETINGS:
                raise RunError(
                    f"learner and rollout engines could not form an NCCL group {MEETINGS} times in a row: "
                    f"{'; '.join(self._failed_meetings)}. Look at the engines' logs in Ray's session folder; "
                    f"NCCL_DEBUG=INFO makes NCCL say more."
                )
        self._connected = engines

    def _try_to_meet(self, engines: list[Replica]) -> str | None:
        """Why no group came about; None when it did."""
        sender = self._ranks[0]
        told = self._of_ranks([sender.open_group.remote()])[0]
        world_size = 1 + self._workers * len(engines)
        # Both ends meet in the rendezvous: neither is waited for before the other was asked.
        opening = sender.meet.remote(len(engines), world_size)
        joining = {
            engine.actor.init_transfer.remote(self._place(k, told, world_size), told["gate"]): engine
            for k, engine in enumerate(engines)
        }
        [why], joined = self._together([opening], joining, lambda engine: self._break_off(), all_or_none=True)
        lost = [f"{engine.watched.name} {engine.watched.lost}" for engine in engines if not engine.usable]
        back = [f"{engine.watched.name}: {said}" for engine, said in joined.items() if said is not None]
        if why is None and not lost and not back:
            return None
        self._of_ranks([self._break_off()])  # also where the group came about and lost a member since
        return "; ".join([*lost, *back, *([] if why is None else [why])])

    def _place(self, k: int, told: dict[str, Any], world_size: int) -> dict[str, Any]:
        """What the k-th engine must know to join, in vLLM's words."""
        return {
            "master_address": told["address"],
            "master_port": told["port"],
            "rank_offset": 1 + k * self._workers,
            "world_size": world_size,
        }

    def _answering(self, engines: list[Replica]) -> list[Replica]:
        """Those that answer now: one silent member would hold up a whole NCCL group."""
        asked = [(e, e.actor.beat.options(concurrency_group=HEALTH).remote()) for e in engines]
        ready, _ = ray.wait([ref for _, ref in asked], num_returns=len(asked), timeout=ANSWER_S) if asked else ([], [])
        for engine, ref in asked:
            if ref not in ready:
                engine.watched.lose(f"did not answer within {ANSWER_S:g} s before a weight sync", blameless=True)
        return [engine for engine in engines if engine.usable]

    # Pushing

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
        engines = self._connect(engines)
        begun = [engine for engine, _ in self._of_engines(engines, lambda e: e.start_update.remote())]
        try:
            # Whoever was lost in that would be waited for in a broadcast.
            engines = self._connect(begun) if self._backend == "nccl" else begun
            checksum, engines = (self._broadcast if self._backend == "nccl" else self._stage)(engines)
        except LearnerLostError:
            for engine in begun:  # half of the new weights are in it
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

    def _stage(self, engines: list[Replica]) -> tuple[int, list[Replica]]:
        """By memory that both ends can reach: (checksum, engines that took all of it)."""
        # A rank whose memory nobody reads stages nothing, and takes part in the gathering alone.
        readers = [[engine for engine in engines if self._reads(engine, rank)] for rank in range(len(self._ranks))]
        size = largest(self._buckets)
        asked = [
            rank.offer.remote(self._backend, size, len(own)) for rank, own in zip(self._ranks, readers, strict=True)
        ]
        offers = self._of_ranks(asked)
        sources: dict[Replica, tuple[Source, ...]] = dict.fromkeys(engines, ())
        for own, offered in zip(readers, offers, strict=True):
            for engine, source in zip(own, offered, strict=True):
                sources[engine] = (*sources[engine], source)

        def leave_out(engine: Replica) -> None:
            for rank, own, offered in zip(self._ranks, readers, offers, strict=True):
                if engine in own:
                    rank.leave_out.options(concurrency_group=HEALTH).remote(offered[own.index(engine)])

        sent, took_all = self._run(engines, sources, leave_out, all_or_none=False)
        return sent.checksum, took_all

    def _reads(self, engine: Replica, rank: int) -> bool:
        if self._backend == "shm":
            return rank == 0
        return bool(self._gpus[rank] & self._gpus_of[engine])

    def _broadcast(self, engines: list[Replica]) -> tuple[int, list[Replica]]:
        """By the NCCL group: (checksum, engines that took all of it).

        An engine that is lost or fails inside of it breaks the collective for everybody, and so does an error of NCCL's
        at the learner's rank, which is often the first to notice a loss. That rank aborts its communicator, gathers to
        the end with its peers, and loses nothing: going back to a checkpoint, as for a lost rank, would cost the job
        hours. The other engines can't come out: their workers stand in NCCL kernels, in processes of vLLM's that take
        no call meanwhile, with half of an update in their models. Those that do not end by themselves are replaced, and
        take the weights before they serve, as any newcomer.

        Raises:
            RunError: it failed at the learner's end several times in a row.
        """
        nothing: dict[Replica, tuple[Source, ...]] = dict.fromkeys(engines, ())
        sent, took_all = self._run(engines, nothing, lambda engine: self._break_off(), all_or_none=True)
        if sent.failure is not None or any(not engine.usable for engine in engines):
            self._connected = []
        self._failed_broadcasts = [] if sent.failure is None else [*self._failed_broadcasts, sent.failure]
        if len(self._failed_broadcasts) >= BROADCASTS:
            raise RunError(
                f"the learner's NCCL broadcast of the weights failed {BROADCASTS} times in a row: "
                f"{'; '.join(dict.fromkeys(self._failed_broadcasts))}. Look at the engines' logs in Ray's session "
                f"folder; NCCL_DEBUG=INFO makes NCCL say more."
            )
        return sent.checksum, took_all

    def _break_off(self) -> Any:
        """The ref of it."""
        return self._ranks[0].break_off.options(concurrency_group=HEALTH).remote()

    def _run(
        self,
        engines: list[Replica],
        sources: dict[Replica, tuple[Source, ...]],
        give_up: Callable[[Replica], None],
        *,
        all_or_none: bool,
    ) -> tuple[Sent, list[Replica]]:
        """Sender and receivers at the same time: (what rank 0 says, engines that took all)."""
        receiving = {
            engine.actor.update_all.remote(self._shared_buckets, sources[engine]): engine for engine in engines
        }
        sending = [rank.send_all.remote(self._shared_buckets) for rank in self._ranks]
        sent, received = self._together(sending, receiving, give_up, all_or_none=all_or_none, may_hang=True)
        return sent[0], [engine for engine in engines if engine in received]

    def _together(
        self,
        of_ranks: list[Any],
        of_engines: dict[Any, Replica],
        give_up: Callable[[Replica], None],
        *,
        all_or_none: bool,
        may_hang: bool = False,
    ) -> tuple[list[Any], dict[Replica, Any]]:
        """Waits for ranks and engines that wait for one another: (what the ranks say, what those engines say that were
        not lost over it).

        Args:
            of_ranks: refs.
            of_engines: engines by ref; an answer but None says why an engine left.
            give_up: called with each engine that is lost or has left, so that nobody waits for it.
            all_or_none: one that is lost or has left, a rank too, takes the others along: they have `GIVE_UP_S` to end
                by themselves.
            may_hang: whether the ranks may hang in a collective of their own. Then they are to blame when nobody has
                answered in time: an engine that hangs is found out long before (cluster.silent_after_s).

        Raises:
            LearnerLostError: a rank is lost, or all that may hang have not answered in time.
        """
        answers: dict[Replica, Any] = {}
        gone: list[str] = []
        end = deadline = time.monotonic() + self._timeout_s
        waiting = dict(of_engines)
        reason = f"did not take part in a weight sync within {self._timeout_s:g} s"
        while waiting:
            ray.wait([*waiting, *of_ranks], num_returns=len(waiting) + len(of_ranks), timeout=POLL_S)
            over = time.monotonic() > deadline
            said = so_far(of_ranks, who=WHO, ranks=self._learner.ranks)
            if over and may_hang and not gone and not said:
                raise LearnerLostError(
                    f"{WHO}: no rank answered within {self._timeout_s:g} s. Look at their logs in Ray's session "
                    f"folder; raise cluster.call_timeout_s if the work is that long."
                )
            for ref, engine in list(waiting.items()):
                if over:
                    engine.watched.lose(reason, blameless=True)
                if engine.watched.lost is None and not ray.wait([ref], timeout=0)[0]:
                    continue
                del waiting[ref]
                with suppress(EngineError):  # it is lost, and replaced by one that takes part in the next push
                    answers[engine] = self._rollouts.replicas.answer(engine, ref, POLL_S)
                if answers.get(engine, "lost") is not None:
                    give_up(engine)
                    gone.append(f"{engine.watched.name} was lost")
            gone += [f"the learner's end failed ({why})" for why in map(_failure_of, said) if why is not None]
            if all_or_none and gone and deadline > time.monotonic() + GIVE_UP_S:
                deadline = time.monotonic() + GIVE_UP_S
                reason = f"was in an NCCL group that broke when {gone[0]}"
        left_s = max(GIVE_UP_S, end - time.monotonic())
        return gather(of_ranks, who=WHO, timeout_s=left_s, ranks=self._learner.ranks), answers

    def close(self) -> None:
        """Frees the staging memory, and by NCCL the communicators of both ends.

        Raises:
            RunError: the learner is dead, and its memory with it, or too busy to close.
        """
        timeout_s = min(self._timeout_s, CLOSE_TIMEOUT_S)
        closing = [rank.close_senders.remote() for rank in self._ranks]
        if self._backend == "nccl":
            leaving = [engine.actor.leave_transfer.remote() for engine in self._connected if engine.usable]
            ray.wait([*leaving, closing[0]], num_returns=len(leaving) + 1, timeout=timeout_s)
        gather(closing, who="learner (close weight sync)", timeout_s=timeout_s)
