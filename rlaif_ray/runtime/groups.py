"""Several actors behind one protocol: the driver talks to a Generator and to a Learner, not to processes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Generic, Literal, Protocol, TypeVar

import ray
import torch
from torch.nn.utils.rnn import pad_sequence

from rlaif_ray.algorithm.losses import explained_variance
from rlaif_ray.attention import switch_length
from rlaif_ray.data.batching import RankPlan, balanced_shares, minibatches, plan_ranks, plans_of_ranks
from rlaif_ray.learner.dpo import DpoExample
from rlaif_ray.models import load_config
from rlaif_ray.runtime.waiting import gather
from rlaif_ray.types import Completion, Experience, Score, TokenAnswer

if TYPE_CHECKING:
    from rlaif_ray.config.jobs import TrainJob
    from rlaif_ray.interfaces import GenerationSettings, WrittenFiles
    from rlaif_ray.learner.agreement import Readings
    from rlaif_ray.learner.finetune import SftExample
    from rlaif_ray.learner.probe import Text
    from rlaif_ray.learner.supervised import PairExample
    from rlaif_ray.runtime.replicas import Replicas, Split
    from rlaif_ray.runtime.supervision import Watched
    from rlaif_ray.storage import Place, StoredFile, StoredFolder
    from rlaif_ray.types import Prompt, Sample, TokenQuery

WRITING = "writing"  # Ray's concurrency group of `write_checkpoint`
_ASKED_AT_A_TIME = 8192  # examples, which go to the ranks together
QUARANTINED = "quarantined"  # the reason why a request that ends engines has no answer


class Computed(Protocol):
    """What a supervised learner learns from."""

    def __len__(self) -> int:
        """Tokens to compute."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence in it."""


Example = TypeVar("Example", bound=Computed)


class EngineGroup:
    """A Generator over replicas; work is split by tokens, answers come back in the order asked."""

    def __init__(self, replicas: Replicas) -> None:
        self.replicas = replicas
        self.weight_version = -1  # the last that was pushed

    @property
    def actors(self) -> list[Any]:
        """Engines that are ready."""
        return self.replicas.actors

    def generate(self, prompts: Sequence[Prompt], settings: GenerationSettings) -> list[Completion]:
        per_prompt = settings.samples_per_prompt
        loads = [len(p.tokens) + settings.max_new_tokens for p in prompts]

        def ask(engine: Any, items: list[int]) -> Any:
            return engine.generate.remote([prompts[i] for i in items], settings)

        def read(reply: list[Completion]) -> list[list[Completion]]:
            return [reply[k : k + per_prompt] for k in range(0, len(reply), per_prompt)]

        answers = self.replicas.run([p.tokens for p in prompts], ask, by_load(loads), read)
        return [
            completion
            for prompt, own in zip(prompts, answers, strict=True)
            for completion in (self._given_up(prompt, per_prompt) if own is None else own)
        ]

    def generate_on_each(self, prompts: Sequence[Prompt], settings: GenerationSettings) -> dict[str, list[Completion]]:
        """Completions of all prompts by every replica that serves, by its name; without those that are lost over it."""
        return self.replicas.ask_each(lambda engine: engine.generate.remote(prompts, settings))

    def lose(self, name: str, reason: str) -> None:
        """The replica of this name is not to be trusted: it ends, and another takes its place."""
        for replica in self.replicas.serving():
            if replica.watched.name == name:
                replica.watched.lose(reason)

    def incarnations(self) -> dict[str, int]:
        """Which one in its place each replica that serves is, by its name: one that replaces another counts on."""
        return {replica.watched.name: replica.incarnation for replica in self.replicas.serving()}

    def _given_up(self, prompt: Prompt, count: int) -> list[Completion]:
        return [Completion(prompt, k, (), (), "", False, self.weight_version, QUARANTINED) for k in range(count)]

    def token_logprobs(self, queries: Sequence[TokenQuery]) -> list[TokenAnswer]:
        def ask(engine: Any, items: list[int]) -> Any:
            return engine.token_logprobs.remote([queries[i] for i in items])

        answers = self.replicas.run([q.prompt for q in queries], ask, in_runs)
        return [TokenAnswer((), QUARANTINED) if answer is None else answer for answer in answers]

    def metrics(self) -> dict[str, float]:
        """How the replicas are."""
        name, replicas = self.replicas.role.split()[0], self.replicas
        return {f"{name}/serving": len(replicas.serving()), f"{name}/lost": replicas.lost} | {
            f"{name}/quarantined": float(replicas.quarantined)
        }


class ScorerGroup:
    """A Scorer over replicas; work is split by tokens, scores come back in the order asked."""

    def __init__(self, replicas: Replicas) -> None:
        self.replicas = replicas

    def score(self, completions: Sequence[Completion]) -> list[Score]:
        def ask(scorer: Any, items: list[int]) -> Any:
            return scorer.score.remote([completions[i] for i in items])

        keys = [(c.prompt.tokens, c.tokens) for c in completions]
        answers = self.replicas.run(keys, ask, by_load([len(p) + len(c) for p, c in keys]))
        return [Score(None, QUARANTINED) if answer is None else answer for answer in answers]


def by_load(loads: Sequence[int]) -> Split:
    """Shares of about the same load."""
    return lambda items, parts: [
        [items[k] for k in share] for share in balanced_shares([loads[i] for i in items], parts)
    ]


def in_runs(items: Sequence[int], parts: int) -> list[list[int]]:
    """Whole runs: queries that follow one another share their prefix, and one replica's cache has it."""
    size = -(-len(items) // parts)
    return [list(items[k * size : (k + 1) * size]) for k in range(parts)]


class Ranks:
    """The processes of a learner, and what is asked of all of them at once."""

    def __init__(self, ranks: list[Watched], timeout_s: float) -> None:
        self.watched = ranks
        self.actors = [rank.actor for rank in ranks]
        self._timeout_s = timeout_s

    def all(self, verb: str, *arguments: Any) -> list[Any]:
        """What each rank says."""
        return self.gather(verb, [getattr(actor, verb).remote(*arguments) for actor in self.actors])

    def gather(self, verb: str, refs: Sequence[Any]) -> list[Any]:
        """The ranks' answers to calls of `verb`."""
        return gather(refs, who=f"learner ranks ({verb})", timeout_s=self._timeout_s, ranks=self.watched)

    def save_checkpoint(self, place: Place, beside: dict[str, Any]) -> WrittenFiles:
        """Returns once all ranks have copied their state to host memory; they write it while they train on."""
        self.all("copy_checkpoint", beside)
        refs = [actor.write_checkpoint.options(concurrency_group=WRITING).remote(place) for actor in self.actors]

        def written() -> dict[str, StoredFile]:
            return {name: file for files in self.gather("write_checkpoint", refs) for name, file in files.items()}

        return written

    def load_checkpoint(self, folder: StoredFolder) -> dict[str, Any]:
        """What was saved beside it."""
        beside: dict[str, Any] = self.all("load_checkpoint", folder)[0]
        return beside

    def readings(self, text: Text) -> Readings:
        """What the model as it is now says of the text."""
        found: Readings = self.all("readings", text)[0]
        return found

    def readings_of_saved(self, folder: str, text: Text) -> list[float]:
        """What the model that was saved there says of the text."""
        found: list[float] = self.all("readings_of_saved", folder, text)[0]
        return found


class LearnerGroup:
    """The Learner over ranks: plans who computes what, and puts results together again."""

    def __init__(self, ranks: list[Watched], job: TrainJob, precision: Literal["fp32", "bf16"]) -> None:
        self._ranks = Ranks(ranks, job.cluster.call_timeout_s)
        self.ranks, self.actors = ranks, self._ranks.actors
        self._job = job
        choice = job.algorithm.old_logprobs
        self._own_logprobs = choice == "learner" or (
            choice == "auto" and (precision != "fp32" or job.algorithm.importance_in(precision) is not None)
        )
        self._updates = 0  # iterations so far: seeds the shuffling of minibatches

    def annotate(self, samples: Sequence[Sample]) -> Experience:
        prompts = [s.completion.prompt.tokens for s in samples]
        completions = [s.completion.tokens for s in samples]
        plans = self._plan(range(len(samples)), prompts, completions)
        shared = ray.put(prompts), ray.put(completions)
        refs = [
            actor.annotate.remote(*shared, plan, self._own_logprobs)
            for actor, plan in zip(self.actors, plans, strict=True)
        ]
        found: dict[int, dict[str, torch.Tensor]] = {}
        for part in self._ranks.gather("annotate", refs):
            found |= part
        return _experience(samples, found)

    def _plan(self, indices: Sequence[int], prompts: Sequence[Any], completions: Sequence[Any]) -> list[RankPlan]:
        lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
        learner = self._job.learner
        plans = plan_ranks(indices, lengths, ranks=learner.groups, budget=learner.tokens_per_micro_batch)
        return plans_of_ranks(plans, learner.sequence_parallel)

    def update(self, experience: Experience) -> dict[str, float]:
        algorithm = self._job.algorithm
        lengths = experience.mask.sum(1)
        completions = [range(int(n)) for n in lengths]
        schedules: list[list[tuple[int, Any]]] = [[] for _ in self.actors]
        for epoch in range(algorithm.epochs):
            seed = (self._job.seed * 1_000_003 + self._updates) * 1_009 + epoch
            for part in minibatches(len(experience), parts=algorithm.minibatches, seed=seed):
                tokens = int(lengths[part].sum())
                plans = self._plan(part, experience.prompt_tokens, completions)
                for schedule, plan in zip(schedules, plans, strict=True):
                    schedule.append((tokens, plan))
        shared = ray.put(experience)
        refs = [actor.update.remote(shared, schedule) for actor, schedule in zip(self.actors, schedules, strict=True)]
        parts = self._ranks.gather("update", refs)
        self._updates += 1
        return _update_metrics(parts, steps=len(schedules[0]), experience=experience)

    def save_checkpoint(self, place: Place) -> WrittenFiles:
        return self._ranks.save_checkpoint(place, {"updates": self._updates})

    def load_checkpoint(self, folder: StoredFolder) -> None:
        self._updates = int(self._ranks.load_checkpoint(folder)["updates"])

    def save_policy(self, folder: str) -> list[str]:
        return [note for notes in self._ranks.all("save_policy", folder) for note in notes]

    def readings(self, text: Text) -> Readings:
        return self._ranks.readings(text)

    def readings_of_saved(self, folder: str, text: Text) -> list[float]:
        return self._ranks.readings_of_saved(folder, text)


class SupervisedGroup(Generic[Example]):
    """A model in supervised training over ranks."""

    named: str  # how its metrics begin

    def __init__(self, ranks: list[Watched], job: Any) -> None:
        self._ranks = Ranks(ranks, job.cluster.call_timeout_s)
        self.actors = self._ranks.actors
        self._job = job
        policy = job.policy
        code = {"revision": policy.revision, "trust_remote_code": policy.trust_remote_code}
        self._switch = switch_length(load_config(policy.model, **code))

    def train(self, examples: Sequence[Example]) -> dict[str, float]:
        """One optimizer step; returns metrics by name."""
        parts = self._planned("train", examples)
        sums = {name: float(sum(part[name] for part in parts)) for name in parts[0]}
        # Of all ranks the same, so no sums.
        same = {name: float(parts[0][name]) for name in ("grad_norm", "lr", "skipped", "in_row")}
        skipped = {f"{self.named}/skipped_updates": same["skipped"], f"{self.named}/skipped_in_row": same["in_row"]}
        return self._metrics(sums | same) | skipped

    def _metrics(self, sums: dict[str, float]) -> dict[str, float]:
        raise NotImplementedError

    def _planned(self, verb: str, examples: Sequence[Computed]) -> list[Any]:
        """What each rank says of its share."""
        learner, switch = self._job.learner, self._switch
        lengths = [len(example) for example in examples]
        plans = plan_ranks(
            range(len(examples)),
            lengths,
            ranks=learner.groups,
            budget=learner.tokens_per_micro_batch,
            apart=None if switch is None else [max(example.lengths) > switch for example in examples],
        )
        plans = plans_of_ranks(plans, learner.sequence_parallel)
        shared = ray.put(list(examples))
        refs = [getattr(actor, verb).remote(shared, plan) for actor, plan in zip(self.actors, plans, strict=True)]
        return self._ranks.gather(verb, refs)

    def _of_each(self, verb: str, examples: Sequence[Computed]) -> list[Any]:
        """What the ranks say of each example, in order."""
        found: list[Any] = []
        for start in range(0, len(examples), _ASKED_AT_A_TIME):
            part = examples[start : start + _ASKED_AT_A_TIME]
            own: dict[int, Any] = {}
            for said in self._planned(verb, part):
                own |= said
            found += [own[i] for i in range(len(part))]
        return found

    def save_checkpoint(self, place: Place) -> WrittenFiles:
        return self._ranks.save_checkpoint(place, {})

    def load_checkpoint(self, folder: StoredFolder) -> None:
        self._ranks.load_checkpoint(folder)

    def save_model(self, folder: str, center: dict[str, float] | None = None) -> list[str]:
        """Returns what the user should know of it."""
        return [note for notes in self._ranks.all("save_model", folder, center) for note in notes]

    def readings(self, text: Text) -> Readings:
        return self._ranks.readings(text)

    def readings_of_saved(self, folder: str, text: Text) -> list[float]:
        return self._ranks.readings_of_saved(folder, text)


class RewardGroup(SupervisedGroup["PairExample"]):
    """A reward model in training."""

    named = "reward_model"

    def rewards(self, examples: Sequence[PairExample]) -> list[tuple[float, float]]:
        """Rewards of a and b of each example."""
        return self._of_each("rewards", examples)

    def _metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return {
            "reward_model/loss": sums["loss"] / sums["examples"],
            "reward_model/accuracy": sums["correct"] / max(1.0, sums["decided"]),
            "reward_model/margin": sums["margin"] / sums["examples"],
            "reward_model/grad_norm": sums["grad_norm"],
            "reward_model/lr": sums["lr"],
        }


class DpoGroup(SupervisedGroup[DpoExample]):
    """A policy in training on preference labels."""

    named = "dpo"

    def logprobs(self, pairs: Sequence[PairExample]) -> list[tuple[float, float]]:
        """Log-probabilities of a and b of each pair, under the policy as it is now."""
        return self._of_each("logprobs", pairs)

    def _metrics(self, sums: dict[str, float]) -> dict[str, float]:
        decided = max(1.0, sums["decided"])
        return {
            "dpo/loss": sums["loss"] / sums["examples"],
            "dpo/accuracy": sums["correct"] / decided,
            "dpo/margin": sums["margin"] / sums["examples"],
            "dpo/reward_better": sums["better"] / decided,
            "dpo/reward_worse": sums["worse"] / decided,
            "dpo/grad_norm": sums["grad_norm"],
            "dpo/lr": sums["lr"],
        }


class SftGroup(SupervisedGroup["SftExample"]):
    """A language model in fine-tuning."""

    named = "sft"

    def losses(self, examples: Sequence[SftExample]) -> list[float]:
        """Sum of -log p over the trained tokens of each example."""
        return self._of_each("losses", examples)

    def _metrics(self, sums: dict[str, float]) -> dict[str, float]:
        return {
            "sft/loss": sums["loss"] / sums["tokens"],
            "sft/entropy": sums["entropy"] / sums["tokens"],
            "sft/tokens": sums["tokens"],
            "sft/grad_norm": sums["grad_norm"],
            "sft/lr": sums["lr"],
        }


def _experience(samples: Sequence[Sample], found: dict[int, dict[str, torch.Tensor]]) -> Experience:
    """Ragged results as (B, T) tensors."""

    def padded(rows: list[torch.Tensor]) -> torch.Tensor:
        return pad_sequence(rows, batch_first=True)

    def column(name: str) -> torch.Tensor | None:
        return padded([found[i][name] for i in range(len(samples))]) if name in found[0] else None

    completions = [s.completion for s in samples]
    lengths = torch.tensor([len(c.tokens) for c in completions])
    sampler = padded([torch.tensor(c.logprobs) for c in completions])
    own = column("policy")
    groups: dict[str, int] = {}
    return Experience(
        prompt_tokens=tuple(c.prompt.tokens for c in completions),
        tokens=padded([torch.tensor(c.tokens) for c in completions]),
        mask=torch.arange(int(lengths.max()))[None, :] < lengths[:, None],
        finished=torch.tensor([c.finished for c in completions]),
        scores=torch.tensor([float(s.score.value) for s in samples if s.score.value is not None]),
        groups=torch.tensor([groups.setdefault(c.prompt.id, len(groups)) for c in completions]),
        sampler_logprobs=sampler,
        logprobs=sampler if own is None else own,
        ref_logprobs=column("ref"),
        values=column("values"),
    )


def _update_metrics(parts: list[dict[str, float]], *, steps: int, experience: Experience) -> dict[str, float]:
    """Sums of all ranks as the means that are logged."""

    def total(name: str) -> float:
        return sum(part.get(name, 0.0) for part in parts)

    tokens, first = total("tokens"), max(1.0, total("first_tokens"))
    metrics = {
        "policy/loss": total("policy_loss") / tokens,
        "policy/entropy": total("entropy") / tokens,
        "policy/clip_fraction": total("clipped") / tokens,
        "policy/grad_norm": parts[0]["grad_norm"],
        "policy/skipped_updates": parts[0]["skipped"],
        "policy/skipped_in_row": parts[0]["in_row"],
        "policy/first_ratio_error": max(part["first_ratio_error"] for part in parts),
        "policy/lr": parts[0]["lr"],
        "rollout/logprob_gap": total("gap") / first,
    }
    if "importance_clipped" in parts[0]:
        metrics["policy/importance_clipped"] = total("importance_clipped") / tokens
    if experience.values is not None and experience.returns is not None:
        metrics |= {
            "value/loss": total("value_loss") / tokens,
            "value/clip_fraction": total("value_clipped") / tokens,
            "value/grad_norm": parts[0]["value_grad_norm"],
            "value/skipped_updates": parts[0]["value_skipped"],
            "value/skipped_in_row": parts[0]["value_in_row"],
            "value/explained_variance": float(
                explained_variance(experience.values, experience.returns, experience.mask)
            ),
        }
    return metrics
