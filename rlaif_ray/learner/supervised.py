"""Learner ranks that train on given examples: reward models now, and whatever else has a loss per example.

As in RL, what a rank computes is decided outside, and every loss is divided by the number of examples (or tokens) of
the whole minibatch: neither micro-batching, order, ranks nor ZeRO stage change a gradient.

Letters: E examples of a micro-batch, S sequences (two for each pair).
"""

from __future__ import annotations

import random
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, Literal, TypeVar

import torch
from torch import Tensor

from rlaif_ray.algorithm.losses import preference_loss
from rlaif_ray.attention import PACKED, plan_attention
from rlaif_ray.errors import InputError
from rlaif_ray.learner import engine as deepspeed_door
from rlaif_ray.learner.agreement import Readings, read, rewards_of_saved, saved_threads
from rlaif_ray.learner.checkpoints import RankCheckpoint
from rlaif_ray.learner.engine import RankSpec, full_weights, save_model_folder, try_saving
from rlaif_ray.learner.finite import Tally, require_finite_model
from rlaif_ray.learner.lora import add_adapters, merged_entries, merged_state, try_merge
from rlaif_ray.learner.model_state import ModelState
from rlaif_ray.learner.modes import training_mode
from rlaif_ray.learner.nodes import group_notes
from rlaif_ray.learner.packing import Arguments, ModelInput, build_input, register_packed_attention
from rlaif_ray.learner.probe import settle_attention, settle_split
from rlaif_ray.learner.sequence_parallel import sequence_group
from rlaif_ray.models import load_config, load_sequence_classifier, load_tokenizer, load_types
from rlaif_ray.reward_head import model_card

if TYPE_CHECKING:
    from rlaif_ray.config.jobs import RewardModelJob, SupervisedJob
    from rlaif_ray.data.batching import RankPlan
    from rlaif_ray.learner.probe import Text

Sums = dict[str, float]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Example = TypeVar("Example")


class SupervisedRank(ABC, Generic[Example]):
    """One rank that trains one model on examples. A subclass says which model, and what the loss of an example is."""

    def __init__(
        self,
        job: SupervisedJob,
        spec: RankSpec,
        precision: Literal["fp32", "bf16"],
        *,
        total_steps: int,
        start_timeout_s: float = 900.0,
    ) -> None:
        """Joins its peers and loads the model; all ranks do so together.

        `total_steps` is for the learning-rate schedule.
        """
        self.device = deepspeed_door.join_ranks(spec, start_timeout_s)
        self._spec, self._precision = spec, precision
        self._sequence = sequence_group(job.learner.sequence_parallel, start_timeout_s)
        self._job: Any = job
        torch.manual_seed(job.seed)
        random.seed(job.seed)
        register_packed_attention()
        policy = job.policy
        self._code: dict[str, Any] = {"revision": policy.revision, "trust_remote_code": policy.trust_remote_code}
        plan = plan_attention(policy.attention, load_config(policy.model, **self._code), policy.model)
        with deepspeed_door.sharded_loading(job.learner, precision):
            how: dict[str, Any] = {"dtype": DTYPES[precision], "attention": plan.implementation, **self._code}
            self._model = self._load(policy.model, **how)
        if job.learner.zero_stage != 3:
            self._model = self._model.to(self.device)
        if job.learner.gradient_checkpointing:
            self._model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if job.training.lora is not None:
            add_adapters(self._model, job.training.lora, job.seed, policy.model)
        self._learner = self._module(self._model).eval()  # but for `train`
        self._engine = deepspeed_door.trainable_engine(
            self._learner, job.learner, lr=job.learner.lr, total_steps=total_steps, precision=precision
        )
        self._steps = Tally()
        require_finite_model(self._model, policy.model)
        attention, note = settle_attention(
            plan,
            self._model,
            self._probed,
            name=policy.model,
            device=self.device,
            precision=precision,
            sharded=job.learner.zero_stage == 3,
        )
        shared: dict[str, Any] = {"name": policy.model, "device": self.device, "precision": precision}
        attention = settle_split(self._sequence, attention, plan, self._model, self._probed, **shared)
        self._packed = attention == PACKED
        self.notes = [*([note] if note else []), *group_notes(job.learner), *self._settle()]  # to be told once
        if job.training.lora is not None:
            tokens = torch.Generator().manual_seed(job.seed)
            text = torch.randint(self._model.config.get_text_config().vocab_size, (16,), generator=tokens).tolist()
            batch = build_input([text[:8]], [text[8:]], packed=self._packed, device=self.device)
            try_merge(self._model, lambda: self._engine(batch), policy.model, seed=job.seed)
        ModelState(self._model, merged_entries(self._model))  # raises where not all of it could be saved
        try_saving(self._model, self._tokenizer, policy.model, self._prepare)
        given = load_types(policy.model, **self._code)
        self._types = given.saved_as(policy.save_precision)
        self.notes += given.note(policy.model, self._types, precision)
        self.checkpoint = RankCheckpoint({"model": self._engine}, spec.rank)

    @abstractmethod
    def _probed(self, batch: ModelInput) -> Tensor:
        """Numbers of a micro-batch that tell whether its layout is right."""

    @abstractmethod
    def _load(self, name: str, **how: Any) -> Any:
        """The model, by transformers; `how` are the arguments of the loaders in models.py."""

    @abstractmethod
    def _module(self, model: Any) -> torch.nn.Module:
        """What DeepSpeed runs: the model with its own forward pass."""

    def _settle(self) -> list[str]:
        """Finds out, once the layout of samples is known, what else of the computation depends on the model; returns
        what the user should know of it."""
        return []

    @abstractmethod
    def _losses(self, examples: Sequence[Example]) -> tuple[Tensor, Sums]:
        """(E,) losses, which carry the gradient, and sums of what else is to be logged."""

    @abstractmethod
    def _readings_of(self, saved: Any, text: Text) -> list[float]:
        """What a model as transformers loads it says of the text."""

    def readings(self, text: Text) -> Readings:
        """The text's numbers by the model as it is now; under ZeRO-3 all ranks ask."""
        return read(self._probed, self._engine, self._model, text, packed=self._packed, device=self.device)

    def readings_of_saved(self, folder: str, text: Text) -> list[float] | None:
        """What the model that was saved there says of the text, on CPU; rank 0 alone loads it."""
        if self._spec.rank != 0:
            return None
        code = self._code | {"revision": None}
        with saved_threads(self._spec):
            saved = self._load(folder, dtype=DTYPES[self._precision], attention="eager", **code)
            return self._readings_of(saved, text)

    def _size(self, examples: Sequence[Example]) -> int:
        """What the sum of a minibatch's losses is divided by."""
        return len(examples)

    def train(self, examples: Sequence[Example], plan: RankPlan) -> Sums:
        """One optimizer step over all `examples`, of which `plan` says what this rank computes.

        Returns sums over this rank's examples, "examples" among them, and statistics that are the same on all ranks.
        """
        sums: Sums = {"examples": 0.0, "loss": 0.0}
        # The dropout of adapters is drawn anew for each step and rank, and in the same way after a resume.
        torch.manual_seed(hash((self._job.seed, self._engine.global_steps, self._spec.rank)) % 2**63)
        with training_mode(self._learner):
            for k, micro in enumerate(plan):
                # A place-holder takes part in the collectives, no more.
                losses, logged = self._losses([examples[i] for i in micro or (0,)])
                # DeepSpeed averages over ranks, those of a group too; our denominator is global already.
                scale = self._spec.world_size / self._size(examples) if micro else 0.0
                deepspeed_door.backward(self._engine, losses.sum() * scale, last=k == len(plan) - 1)
                share = 1.0 if micro and self._sequence.leads else 0.0
                logged |= {"examples": float(len(losses)), "loss": float(losses.detach().double().sum())}
                for name, value in logged.items():
                    sums[name] = sums.get(name, 0.0) + share * value
        sums["lr"] = float(self._engine.get_lr()[0])  # read before the step, which moves the schedule on
        return sums | self._steps.sums([deepspeed_door.optimizer_step(self._engine)])

    @abstractmethod
    def _prepare(self, config: Any, generation: Any, tokenizer: Any) -> None:
        """Makes a model's config, its settings for generation (None where it has none), and its tokenizer such as they
        are to be saved."""

    def _save_folder(self, folder: str) -> list[str]:
        """Rank 0 writes a Hugging Face folder; all ranks help gather. Returns what the user should know of it."""
        state = merged_state(self._model, keep=self._spec.rank == 0, masters=self._types.wider_than_bf16)
        if self._spec.rank != 0:
            return []
        return save_model_folder(self._model, self._tokenizer, state, Path(folder), self._types, self._prepare)

    def _tokenizer(self) -> Any:
        return load_tokenizer(self._job.policy.model, **self._code)


# ---- Reward models ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class PairExample:
    """Two responses to a prompt in tokens, and the probability that a is better."""

    prompt: tuple[int, ...]  # never empty
    response_a: tuple[int, ...]  # with what ends a response
    response_b: tuple[int, ...]
    p_a: float

    def __len__(self) -> int:
        """Tokens to compute: the prompt stands once in the packed row."""
        return len(self.prompt) + len(self.response_a) + len(self.response_b)

    @property
    def lengths(self) -> tuple[int, int]:
        """Tokens of each sequence that the model reads."""
        return len(self.prompt) + len(self.response_a), len(self.prompt) + len(self.response_b)


def reward_input(
    prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], *, packed: bool, device: torch.device | str
) -> ModelInput:
    """Lays out S sequences whose `rows`, `columns`, (S,), are where each one's last token is. No targets."""
    lengths = torch.tensor([len(response) for response in responses], device=device)
    if packed:
        # The packed row leaves out a completion's last token, which predicts nothing: 0 stands in for it. What would
        # predict it is the response's last token.
        batch = build_input(prompts, [(*response, 0) for response in responses], packed=True, device=device)
        ends = (lengths + 1).cumsum(0) - 1
        rows, columns = batch.rows[ends], batch.columns[ends]
    else:
        batch = build_input(prompts, responses, packed=False, device=device)
        rows = torch.arange(len(responses), device=device)
        columns = lengths + torch.tensor([len(prompt) for prompt in prompts], device=device) - 1
    return replace(batch, rows=rows, columns=columns, targets=batch.targets[:0])


class RewardModule(torch.nn.Module):
    """A sequence classifier with one label, read at the last token of each sequence."""

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier = classifier
        self._arguments = Arguments(classifier.base_model)

    def forward(self, batch: ModelInput) -> Tensor:
        """(S,) fp32 rewards, of the tokens at `batch.rows`, `batch.columns`."""
        hidden = self.classifier.base_model(**self._arguments.of(batch)).last_hidden_state
        rewards: Tensor = self.classifier.score(hidden[batch.rows, batch.columns])
        return rewards[:, 0].float()


class RewardRank(SupervisedRank[PairExample]):
    """One rank that trains a reward model on pairs."""

    _job: RewardModelJob
    _center: dict[str, float] | None = None  # known once it is trained

    def _load(self, name: str, **how: Any) -> Any:
        model, new_head = load_sequence_classifier(name, **how)
        if new_head:
            init_head(model, self._job.seed)
        return model

    def _module(self, model: Any) -> torch.nn.Module:
        return RewardModule(model)

    def _probed(self, batch: ModelInput) -> Tensor:
        own = self._sequence.split(batch, self._model)
        return own.whole(self._engine(own))  # one for each token that a completion token follows

    def _losses(self, examples: Sequence[PairExample]) -> tuple[Tensor, Sums]:
        reward_a, reward_b = self._rewards(examples)
        labels = torch.tensor([example.p_a for example in examples], device=self.device)
        difference = (reward_a - reward_b).detach()
        decided = labels != 0.5
        sums = {
            "correct": float(((difference > 0) == (labels > 0.5))[decided].sum()),
            "decided": float(decided.sum()),
            "margin": float((difference * (2 * labels - 1)).double().sum()),
        }
        return preference_loss(reward_a, reward_b, labels, self._job.reward.margin), sums

    def _rewards(self, examples: Sequence[PairExample]) -> tuple[Tensor, Tensor]:
        """(E,) rewards of a and (E,) of b."""
        prompts = [example.prompt for example in examples for _ in (0, 1)]
        responses = [response for e in examples for response in (e.response_a, e.response_b)]
        rewards = self._probed(reward_input(prompts, responses, packed=self._packed, device=self.device))
        return rewards[0::2], rewards[1::2]

    def _readings_of(self, saved: Any, text: Text) -> list[float]:
        return rewards_of_saved(saved, text)

    @torch.no_grad()
    def rewards(self, examples: Sequence[PairExample], plan: RankPlan) -> dict[int, tuple[float, float]]:
        """Rewards of a and b, by index, of the examples in this rank's plan."""
        found = {}
        for micro in plan:
            reward_a, reward_b = self._rewards([examples[i] for i in micro or (0,)])
            for k, i in enumerate(micro):
                found[i] = (float(reward_a[k]), float(reward_b[k]))
        return found

    def save_model(self, folder: str, center: dict[str, float] | None) -> list[str]:
        """A Hugging Face folder for `load_sequence_classifier`; under ZeRO-3 all ranks help gather.

        transformers' AutoModelForSequenceClassification loads it as well where it knows the model's type.

        `center` has the mean and standard deviation of reference rewards; scorers of ours subtract the mean, and
        transformers takes no notice. TRL needs no more than the one label. How conversations were read stays with it.
        """
        self._center = center
        notes = self._save_folder(folder)
        if self._spec.rank == 0:
            card = model_card(self._model.config, self._job.policy.model)
            Path(folder, "README.md").write_text(card, encoding="utf-8")
        return notes

    def _prepare(self, config: Any, generation: Any, tokenizer: Any) -> None:
        describe_reward_model(config, tokenizer)
        config.reward_center = self._center
        config.reward_chat_template_kwargs = self._job.policy.chat_template_kwargs
        config.reward_thoughts = self._job.reward.thoughts


def init_head(model: Any, seed: int) -> None:
    """A new reward head: normal with standard deviation 1 / sqrt(d + 1) (Huang et al. 2403.17031, detail 12)."""
    weight = model.score.weight
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), full_weights([weight]):
        values = torch.randn(weight.shape, generator=generator) / (weight.shape[1] + 1) ** 0.5
        weight.copy_(values.to(weight.dtype))


def describe_reward_model(config: Any, tokenizer: Any) -> None:
    """Sets padding in config and tokenizer, and how responses end in config.

    transformers' classifiers read the last token that is not padding, so padding must not be what ends a response.

    Raises:
        InputError: the model has no embedding for what would pad.
    """
    pad = separate_pad_token(tokenizer)
    if pad is not None:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    rows = getattr(config.get_text_config(), "vocab_size", None)
    if isinstance(rows, int) and tokenizer.pad_token_id >= rows:
        raise InputError(
            f"a reward model pads with a token that it has an embedding for (got {tokenizer.pad_token!r} with id "
            f"{tokenizer.pad_token_id} for {rows} rows): its config.json names the token, and other programs look it "
            f"up. Enlarge the model, by model.resize_token_embeddings({tokenizer.pad_token_id + 1}), or set pad_token "
            f"in its tokenizer_config.json to one that it has."
        )
    config.get_text_config().pad_token_id = tokenizer.pad_token_id
    config.reward_ends_with_eos = bool(ends_with(tokenizer))


def ends_with(tokenizer: Any) -> tuple[int, ...]:
    """What ends a response: the tokenizer's EOS, or nothing where padding could not be told from it."""
    if tokenizer.eos_token_id is None or separate_pad_token(tokenizer) is None:
        return ()
    return (tokenizer.eos_token_id,)


def separate_pad_token(tokenizer: Any) -> int | None:
    """A special token that can pad sequences which end with EOS: pad, unk, another special one, or bos; else None."""
    others = [token for token in tokenizer.all_special_ids if token != tokenizer.bos_token_id]
    for token in (tokenizer.pad_token_id, tokenizer.unk_token_id, *others, tokenizer.bos_token_id):
        if token is not None and token != tokenizer.eos_token_id:
            return int(token)
    return None
