"""What DeepSpeed wraps: policy and critic, of a model of transformers and our laid-out micro-batches."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from rlaif_ray.algorithm.logprobs import token_logprobs_and_entropy
from rlaif_ray.learner.engine import full_weights
from rlaif_ray.learner.head import head_of
from rlaif_ray.learner.mixed_precision import MasterLinear
from rlaif_ray.learner.packing import Arguments, ModelInput


class CausalPolicy(torch.nn.Module):
    """A causal language model that computes logits only where a completion token is predicted."""

    def __init__(self, model: Any, logits_chunk: int | None = None) -> None:
        """`logits_chunk`: so many rows of logits are held at a time (learner/head.py); None: all."""
        super().__init__()
        self.model = model
        self._arguments = Arguments(model)
        self.head = None if logits_chunk is None else head_of(model, logits_chunk)

    def forward(self, batch: ModelInput, temperature: float | None = None) -> Any:
        """With a temperature (M,) log-probabilities of the completion tokens and (M,) entropies, which carry no
        gradient; without one (M, V) logits."""
        if temperature is None:
            return self._logits(batch)
        if self.head is None:
            return token_logprobs_and_entropy(self._logits(batch), batch.targets, temperature)
        logprobs, entropy = self.head.scores(batch, temperature)
        return logprobs, entropy.detach()

    def _logits(self, batch: ModelInput) -> Tensor:
        if not self._arguments.choose_logits:
            every: Tensor = self.model(**self._arguments.of(batch)).logits
            return every[batch.rows, batch.columns]
        packed = batch.attention_mask is None
        if packed:
            keep = batch.columns
        elif len(batch.columns) == 0:  # of a short row split over ranks, one may have no completion token
            keep = torch.zeros(1, dtype=torch.int64)
        else:
            keep = torch.arange(int(batch.columns.min()), int(batch.columns.max()) + 1)
        logits = self.model(**self._arguments.of(batch), logits_to_keep=keep.to(batch.tokens.device)).logits
        picked: Tensor = logits[0] if packed else logits[batch.rows, batch.columns - keep[0].to(batch.columns.device)]
        return picked


class Critic(torch.nn.Module):
    """The policy's body with one output per token: the value of the state before it."""

    def __init__(self, body: Any) -> None:
        super().__init__()
        self.body = body
        self._arguments = Arguments(body)
        config = body.config.get_text_config()
        self.head = MasterLinear(config.hidden_size, 1, dtype=body.dtype)
        # Zero, not random: the first advantages are then the returns themselves rather than a random baseline.
        with full_weights([self.head.weight, self.head.bias]):
            torch.nn.init.zeros_(self.head.weight)
            torch.nn.init.zeros_(self.head.bias)

    def forward(self, batch: ModelInput) -> Tensor:
        """(M,) fp32 values."""
        hidden = self.body(**self._arguments.of(batch)).last_hidden_state
        values: Tensor = self.head(hidden[batch.rows, batch.columns])
        return values[:, 0]
