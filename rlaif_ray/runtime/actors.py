"""The processes: thin shells around an engine or a learner rank. Plain classes, made remote where they are spawned."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

from rlaif_ray.config.jobs import DpoJob, RewardModelJob, SftJob, TrainJob
from rlaif_ray.errors import EngineError
from rlaif_ray.models import resolve_model
from rlaif_ray.output import show_logs_safely
from rlaif_ray.runtime.engine_cache import with_planned_cache
from rlaif_ray.runtime.supervision import Beat, beat_of
from rlaif_ray.runtime.turns import await_turn

if TYPE_CHECKING:
    from rlaif_ray.config.sections import RewardModelFeedback
    from rlaif_ray.data.batching import RankPlan
    from rlaif_ray.interfaces import GenerationSettings
    from rlaif_ray.learner.agreement import Readings
    from rlaif_ray.learner.engine import RankSpec
    from rlaif_ray.learner.finetune import SftExample
    from rlaif_ray.learner.probe import Text
    from rlaif_ray.learner.supervised import PairExample
    from rlaif_ray.rollout.board import Source
    from rlaif_ray.rollout.buckets import Bucket
    from rlaif_ray.rollout.sending import Sent
    from rlaif_ray.rollout.vllm_engine import EngineSpec
    from rlaif_ray.storage import Place, StoredFile, StoredFolder
    from rlaif_ray.types import Completion, Experience, Prompt, Score, TokenAnswer, TokenQuery


class Actor:
    """What every process can tell about itself."""

    def __init__(self) -> None:
        show_logs_safely()  # errors of hubs and stores have signed addresses, and Ray shows its logs on the dashboard

    def beat(self) -> Beat:
        """A sign of life, from a thread of its own."""
        return beat_of(self._busy_since(), self._dead_part())

    def _busy_since(self) -> float | None:
        """When the work under way last moved (monotonic); None when idle, or when there is no telling."""
        return None

    def _dead_part(self) -> str | None:
        """What it can't work without and is gone, in words."""
        return None

    def process(self) -> tuple[int, str]:
        """(pid, node id)."""
        beat = self.beat()
        return beat.pid, beat.node

    def gpus(self) -> list[tuple[str, str]]:
        """(node id, GPU of the node) of all GPUs it was given, whole or in part."""
        import ray

        return [(self.beat().node, str(gpu)) for gpu in ray.get_gpu_ids()]


class EngineActor(Actor):
    """A vLLM engine, for rollouts or for a judge."""

    _engine: Any = None

    def _busy_since(self) -> float | None:
        return None if self._engine is None else self._engine.busy_since

    def _dead_part(self) -> str | None:
        return None if self._engine is None else self._engine.dead_part()

    def start(self, spec: EngineSpec, ahead: Sequence[Any] = ()) -> list[str]:
        """Loads the model, once those `ahead` on its GPU have; resolved here, since another node has its own cache.
        Returns what the user should be told of how it was loaded."""
        from rlaif_ray.rollout.vllm_engine import VllmEngine, gpu_bytes

        await_turn(ahead)
        notes: list[str] = []
        spec = replace(spec, model=str(resolve_model(spec.model, revision=spec.revision)))
        self._engine = VllmEngine(with_planned_cache(spec, gpu_bytes, notes.append) if spec.shares_gpu else spec)
        return notes

    def generate(self, prompts: Sequence[Prompt], settings: GenerationSettings) -> list[Completion]:
        completions: list[Completion] = self._engine.generate(prompts, settings)
        return completions

    def token_logprobs(self, queries: Sequence[TokenQuery]) -> list[TokenAnswer]:
        answers: list[TokenAnswer] = self._engine.token_logprobs(queries)
        return answers

    def init_transfer(self, init_info: dict[str, Any], gate: tuple[str, int] | None = None) -> str | None:
        """Joins the transfer; by NCCL all meet at the gate first. Why it turned back there, unchanged; else None."""
        from rlaif_ray.rollout.nccl import GivenUpError

        try:
            self._engine.init_transfer(init_info, gate)
        except GivenUpError as error:
            return str(error)
        return None

    def leave_transfer(self) -> None:
        self._engine.leave_transfer()

    def start_update(self) -> None:
        self._engine.start_update()

    def update_all(self, buckets: Sequence[Bucket], sources: tuple[Source, ...]) -> None:
        """Loads a whole push, bucket by bucket, as the learner makes them ready (rollout/receiving.py)."""
        self._engine.update_all(buckets, sources)

    def finish_update(self, version: int) -> list[int]:
        checksums: list[int] = self._engine.finish_update(version)
        return checksums


class RewardModelActor(Actor):
    """A reward model that scores completions."""

    def start(
        self,
        cfg: RewardModelFeedback,
        device: Literal["cpu", "cuda"],
        precision: Literal["fp32", "bf16"],
        threads: int,
        shares_gpu: bool,
        date: str | None,
        ahead: Sequence[Any] = (),
    ) -> None:
        """Loads the model, once those `ahead` on its GPU have."""
        import torch

        from rlaif_ray.feedback.reward_model import RewardModelScorer

        await_turn(ahead)
        torch.set_num_threads(threads)
        self._shares_gpu = shares_gpu
        self._scorer = RewardModelScorer(cfg, device=device, precision=precision, date=date)

    def score(self, completions: Sequence[Completion]) -> list[Score]:
        try:
            scores: list[Score] = self._scorer.score(completions)
        except Exception as error:  # such as memory that ran out: another process, or fewer at once, may do
            raise EngineError(f"the reward model failed: {type(error).__name__}: {error}") from error
        free_cached(self._shares_gpu)
        return scores


def free_cached(shares_gpu: bool) -> None:
    """What torch keeps of a GPU for its next call is given back for an engine that wakes there."""
    if shares_gpu:
        import torch

        torch.cuda.empty_cache()


class LearnerActor(Actor):
    """One rank of the learner, and the sending end of the weight sync."""

    _sender: Any = None  # rollout/sending.py
    _shares_gpu = False

    def rendezvous(self) -> tuple[str, int]:
        """Address and a free port on this node, for the peers of rank 0, whose answer counts."""
        import ray

        address: str = ray.util.get_node_ip_address()
        with socket.create_server((address, 0), family=socket.AF_INET6 if ":" in address else socket.AF_INET) as free:
            return address, int(free.getsockname()[1])

    def start(
        self,
        job: Any,
        spec: RankSpec,
        precision: Literal["fp32", "bf16"],
        total_steps: int | None = None,
        ahead: Sequence[Any] = (),
    ) -> list[str]:
        """Loads what the job (one of config/jobs.py) trains, once those `ahead` on its GPU have; `total_steps` where
        they follow from the data. Returns what the user should be told of how it was loaded.
        """
        await_turn(ahead)
        timeout_s = job.cluster.start_timeout_s
        self._learner: Any
        if isinstance(job, TrainJob):
            from rlaif_ray.learner.ppo import RlRank

            self._learner = RlRank(job, spec, precision, start_timeout_s=timeout_s)
        else:
            from rlaif_ray.learner.dpo import DpoRank
            from rlaif_ray.learner.finetune import SftRank
            from rlaif_ray.learner.supervised import RewardRank

            assert total_steps is not None
            ranks: dict[type, Any] = {SftJob: SftRank, RewardModelJob: RewardRank, DpoJob: DpoRank}
            self._learner = ranks[type(job)](job, spec, precision, total_steps=total_steps, start_timeout_s=timeout_s)
        self._rank = spec.rank
        self._shares_gpu = job.cluster.shares_gpus(spec.device)
        self._sender = None
        free_cached(self._shares_gpu)
        notes: list[str] = self._learner.notes
        return notes

    def annotate(self, prompts: Any, completions: Any, plan: RankPlan, with_policy: bool) -> Any:
        found = self._learner.annotate(prompts, completions, plan, with_policy=with_policy)
        free_cached(self._shares_gpu)
        return found

    def update(self, experience: Experience, schedule: Sequence[tuple[int, RankPlan]]) -> dict[str, float]:
        sums: dict[str, float] = self._learner.update(experience, schedule)
        free_cached(self._shares_gpu)
        return sums

    def copy_checkpoint(self, beside: dict[str, Any]) -> None:
        self._learner.checkpoint.copy(beside)

    def write_checkpoint(self, place: Place) -> dict[str, StoredFile]:
        """In a thread of its own, beside training; its return value is this rank's files."""
        files: dict[str, StoredFile] = self._learner.checkpoint.write(place)
        return files

    def load_checkpoint(self, folder: StoredFolder) -> dict[str, Any]:
        beside: dict[str, Any] = self._learner.checkpoint.load(folder)
        free_cached(self._shares_gpu)
        return beside

    def save_policy(self, folder: str) -> list[str]:
        notes: list[str] = self._learner.save_policy(folder)
        free_cached(self._shares_gpu)
        return notes

    def readings(self, text: Text) -> Readings:
        found: Readings = self._learner.readings(text)
        free_cached(self._shares_gpu)
        return found

    def readings_of_saved(self, folder: str, text: Text) -> list[float] | None:
        found: list[float] | None = self._learner.readings_of_saved(folder, text)
        return found

    def train(self, examples: Sequence[Any], plan: RankPlan) -> dict[str, float]:
        sums: dict[str, float] = self._learner.train(examples, plan)
        return sums

    def rewards(self, examples: Sequence[PairExample], plan: RankPlan) -> dict[int, tuple[float, float]]:
        rewards: dict[int, tuple[float, float]] = self._learner.rewards(examples, plan)
        return rewards

    def logprobs(self, pairs: Sequence[PairExample], plan: RankPlan) -> dict[int, tuple[float, float]]:
        logprobs: dict[int, tuple[float, float]] = self._learner.logprobs(pairs, plan)
        return logprobs

    def losses(self, examples: Sequence[SftExample], plan: RankPlan) -> dict[int, float]:
        losses: dict[int, float] = self._learner.losses(examples, plan)
        return losses

    def save_model(self, folder: str, center: dict[str, float] | None) -> list[str]:
        notes: list[str] = self._learner.save_model(folder, center)
        return notes

    def weight_metadata(self) -> tuple[list[tuple[str, str, tuple[int, ...]]], list[list[str]]]:
        """(name, dtype, shape) of all that a push sends, and the names that go together."""
        weights = self._learner.weights
        return weights.metadata(), weights.groups()

    # The sending end of the weight sync. What is asked of it while it sends goes by the concurrency group HEALTH.

    def open_group(self) -> dict[str, Any]:
        """Makes the place where an NCCL group will meet: `gate`, where all come first, and `address` and `port`."""
        from rlaif_ray.rollout import nccl

        self.close_senders()
        address = self.rendezvous()[0]
        gate, held = nccl.Gate(address), nccl.HeldPort(address)
        self._sender = nccl.NcclSender(gate, lambda size: nccl.communicator(address, held.port, size), held)
        return {"gate": (address, gate.port), "address": address, "port": held.port}

    def meet(self, engines: int, world_size: int) -> str | None:
        """Joins that group, with so many engines and their workers; else why it didn't."""
        why: str | None = self._sender.open(engines, world_size)
        return why

    def offer(self, backend: Literal["shm", "ipc"], size: int, readers: int) -> list[Source]:
        """Prepares a push of buckets of up to `size` bytes that so many engines read from this rank's memory: what to
        tell each. There are two slots: one is filled while the other is read."""
        from rlaif_ray.rollout.buckets import SLOTS
        from rlaif_ray.rollout.sending import Staging
        from rlaif_ray.rollout.weight_transfer import IpcSlot, ShmSlot

        if self._sender is None:
            slot: type[Any] = ShmSlot if backend == "shm" else IpcSlot
            self._sender = Staging([slot() for _ in range(SLOTS)])
        sources: list[Source] = self._sender.offer(size, readers)
        return sources

    def send_all(self, buckets: Sequence[Bucket]) -> Sent:
        """Gathers all weights (all ranks) and sends them (those that have anybody to send to); rank 0 sums them up."""
        from rlaif_ray.rollout.sending import send_all

        try:
            return send_all(self._learner.weights, buckets, self._sender, counted=self._rank == 0)
        finally:
            free_cached(self._shares_gpu)  # slots and gathered weights, before the engines wake for the next rollout

    def leave_out(self, source: Source) -> None:
        """The reader who was told of `source` is lost: the rank waits for it no more."""
        if self._sender is not None:
            self._sender.leave_out(source)

    def break_off(self) -> None:
        """A member of the NCCL group is lost: nobody waits in it any more, and it must be made anew."""
        if self._sender is not None:
            self._sender.break_off()

    def close_senders(self) -> None:
        sender, self._sender = self._sender, None
        if sender is not None:
            sender.close()
