"""Learner ranks that train on given examples: reward models now, and whatever else has a loss per example.

As in RL, what a rank computes is decided outside, and every loss is divided by the number of examples of the whole
minibatch: neither micro-batching, order, ranks nor ZeRO stage change a gradient.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from rlaif_ray.algorithm.losses import preference_loss
from rlaif_ray.learner import engine as deepspeed_door
from rlaif_ray.learner.engine import RankSpec, WeightGroups, full_weights, save_model_folder
from rlaif_ray.learner.packing import build_input, choose_attention, register_packed_attention
from rlaif_ray.models import load_config, load_sequence_classifier, load_tokenizer

if TYPE_CHECKING:
    from rlaif_ray.config.jobs import RewardModelJob
    from rlaif_ray.data.batching import RankPlan

Sums = dict[str, float]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True, slots=True)
class PairExample:
    """Two responses to a prompt in tokens, and the probability that a is better."""

    prompt: tuple[int, ...]
    response_a: tuple[int, ...]  # with what ends a response, never empty
    response_b: tuple[int, ...]
    p_a: float

    def __len__(self) -> int:
        """Tokens to compute: the prompt stands once in the packed row."""
        return len(self.prompt) + len(self.response_a) + len(self.response_b)


class RewardModule(torch.nn.Module):
    """A sequence classifier with one label, read at the last token of each sequence."""

    def __init__(self, classifier: Any) -> None:
        super().__init__()
        self.classifier = classifier

    def forward(
        self, prompts: Sequence[Sequence[int]], responses: Sequence[Sequence[int]], packed: bool, device: torch.device
    ) -> Tensor:
        """(S,) fp32 rewards of S sequences."""
        # A layout predicts every completion token from the one before it. A token more, which is never computed or
        # never looked at, makes the last of its places that of the response's last token.
        batch = build_input(prompts, [(*response, 0) for response in responses], packed=packed, device=device)
        last = torch.tensor([len(response) + 1 for response in responses], device=device).cumsum(0) - 1
        hidden = self.classifier.base_model(
            input_ids=batch.tokens,
            position_ids=batch.positions,
            attention_mask=batch.attention_mask,
            use_cache=False,
            **batch.attention,
        ).last_hidden_state
        rewards: Tensor = self.classifier.score(hidden[batch.rows[last], batch.columns[last]])
        return rewards[:, 0].float()


class RewardRank:
    """One rank that trains a reward model."""

    def __init__(
        self,
        job: RewardModelJob,
        spec: RankSpec,
        precision: Literal["fp32", "bf16"],
        *,
        total_steps: int,
        start_timeout_s: float = 900.0,
    ) -> None:
        """Joins its peers and loads the model; all ranks do so together."""
        self.device = deepspeed_door.join_ranks(spec, start_timeout_s)
        self._spec, self._job = spec, job
        torch.manual_seed(job.seed)
        random.seed(job.seed)
        register_packed_attention()
        policy = job.policy
        code: dict[str, Any] = {"revision": policy.revision, "trust_remote_code": policy.trust_remote_code}
        attention = choose_attention(policy.attention, load_config(policy.model, **code))
        self._model: Any
        with deepspeed_door.sharded_loading(job.learner, precision):
            self._model, new_head = load_sequence_classifier(
                policy.model, dtype=DTYPES[precision], attention=attention, **code
            )
        if new_head:
            init_head(self._model, job.seed)
        if job.learner.zero_stage != 3:
            self._model = self._model.to(self.device)
        self._packed = deepspeed_door.uses_packing(self._model)
        if job.learner.gradient_checkpointing:
            self._model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        module = RewardModule(self._model)
        module.train()
        self._engine = deepspeed_door.trainable_engine(
            module, job.learner, lr=job.learner.lr, total_steps=total_steps, precision=precision
        )
        self.weights = WeightGroups(self._model)

    def train(self, examples: Sequence[PairExample], plan: RankPlan) -> Sums:
        """One optimizer step over all `examples`, of which `plan` says what this rank computes.

        Returns sums over this rank's examples, "examples" among them, and statistics that are the same on all ranks.
        """
        sums: Sums = {"examples": 0.0, "loss": 0.0, "correct": 0.0, "decided": 0.0, "margin": 0.0}
        for k, micro in enumerate(plan):
            chosen = [examples[i] for i in micro or (0,)]  # a place-holder takes part in the collectives, no more
            reward_a, reward_b = self._rewards(chosen)
            labels = torch.tensor([example.p_a for example in chosen], device=self.device)
            losses = preference_loss(reward_a, reward_b, labels, self._job.reward.margin)
            # DeepSpeed averages over ranks; our denominator is global already.
            scale = self._spec.world_size / len(examples) if micro else 0.0
            deepspeed_door.backward(self._engine, losses.sum() * scale, last=k == len(plan) - 1)
            if micro:
                difference = (reward_a - reward_b).detach()
                decided = labels != 0.5
                sums["examples"] += len(chosen)
                sums["loss"] += float(losses.detach().double().sum())
                sums["margin"] += float((difference * (2 * labels - 1)).double().sum())
                sums["decided"] += float(decided.sum())
                sums["correct"] += float(((difference > 0) == (labels > 0.5))[decided].sum())
        sums["lr"] = float(self._engine.get_lr()[0])  # read before the step, which moves the schedule on
        sums["grad_norm"] = deepspeed_door.optimizer_step(self._engine)
        return sums

    def _rewards(self, examples: Sequence[PairExample]) -> tuple[Tensor, Tensor]:
        """(E,) rewards of a and (E,) of b."""
        prompts = [example.prompt for example in examples for _ in (0, 1)]
        responses = [response for e in examples for response in (e.response_a, e.response_b)]
        rewards = self._engine(prompts, responses, self._packed, self.device)
        # The packed row lays out samples of equal prompts together, and gives them back in the order asked.
        return rewards[0::2], rewards[1::2]

    @torch.no_grad()
    def rewards(self, examples: Sequence[PairExample], plan: RankPlan) -> dict[int, tuple[float, float]]:
        """Rewards of a and b, by index, of the examples in this rank's plan."""
        found = {}
        for micro in plan:
            reward_a, reward_b = self._rewards([examples[i] for i in micro or (0,)])
            for k, i in enumerate(micro):
                found[i] = (float(reward_a[k]), float(reward_b[k]))
        return found

    def save_checkpoint(self, folder: str) -> None:
        """Model, optimizer and schedule; all ranks write their shards under `folder`."""
        self._engine.save_checkpoint(str(Path(folder) / "model"), tag="state", save_latest=False)

    def load_checkpoint(self, folder: str) -> None:
        self._engine.load_checkpoint(str(Path(folder) / "model"), tag="state")

    def save_model(self, folder: str, center: dict[str, float] | None) -> None:
        """A Hugging Face folder for AutoModelForSequenceClassification; under ZeRO-3 all ranks help gather.

        `center` has the mean and standard deviation of reference rewards; scorers of ours subtract the mean.
        """
        state = self.weights.full_state(keep=self._spec.rank == 0)
        if self._spec.rank != 0:
            return
        policy = self._job.policy
        tokenizer = load_tokenizer(policy.model, revision=policy.revision, trust_remote_code=policy.trust_remote_code)
        pad = separate_pad_token(tokenizer)
        if pad is not None:
            # transformers reads the last token that is no padding: padding must not be what ends a response.
            tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
            self._model.config.pad_token_id = pad
        self._model.config.reward_center = center
        self._model.config.reward_ends_with_eos = pad is not None
        save_model_folder(self._model, tokenizer, state, Path(folder))


def init_head(model: Any, seed: int) -> None:
    """A new reward head: normal with standard deviation 1 / sqrt(d + 1) (Huang et al. 2403.17031, detail 12)."""
    weight = model.score.weight
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad(), full_weights([weight]):
        if weight.numel():
            width = weight.shape[1]
            values = torch.randn(weight.shape, generator=generator) / (width + 1) ** 0.5
            weight.copy_(values.to(weight.dtype))


def ends_with(tokenizer: Any) -> tuple[int, ...]:
    """What ends a response: the tokenizer's EOS, or nothing where padding could not be told from it."""
    return (tokenizer.eos_token_id,) if separate_pad_token(tokenizer) is not None else ()


def separate_pad_token(tokenizer: Any) -> int | None:
    """A special token that can pad sequences which end with EOS: pad, unk, another special one, or bos; else None.

    transformers' classifiers read the last token that is not padding, so one that pads with EOS reads a place too
    early.
    """
    others = [token for token in tokenizer.all_special_ids if token != tokenizer.bos_token_id]
    for token in (tokenizer.pad_token_id, tokenizer.unk_token_id, *others, tokenizer.bos_token_id):
        if token is not None and token != tokenizer.eos_token_id:
            return int(token)
    return None
