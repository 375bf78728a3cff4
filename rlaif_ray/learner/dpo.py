"""Direct preference optimisation (Rafailov et al. 2305.18290): a policy from preference labels, without sampling."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from rlaif_ray.algorithm.losses import ipo_loss, preference_loss
from rlaif_ray.learner.finetune import CausalRank
from rlaif_ray.learner.packing import build_input
from rlaif_ray.learner.supervised import PairExample, Sums

if TYPE_CHECKING:
    from rlaif_ray.config.jobs import DpoJob
    from rlaif_ray.data.batching import RankPlan


@dataclass(frozen=True, slots=True)
class DpoExample:
    """A labelled pair, and what the policy said of it before the first step: the reference."""

    pair: PairExample
    reference_a: float  # log-probability of all of response a
    reference_b: float

    def __len__(self) -> int:
        return len(self.pair)

    @property
    def lengths(self) -> tuple[int, int]:
        return self.pair.lengths


class DpoRank(CausalRank[DpoExample]):
    """One rank that trains a policy on preference labels.

    The reference is the policy before its first step, so its log-probabilities are taken once, by this model, before
    training: no second model is in memory.
    """

    _job: DpoJob

    def _losses(self, examples: Sequence[DpoExample]) -> tuple[Tensor, Sums]:
        cfg = self._job.dpo
        logprob_a, logprob_b = self._logprobs([example.pair for example in examples])
        # Implicit rewards, equation 5 without the partition function, which is the same for both responses.
        reward_a = cfg.beta * (logprob_a - self._tensor([example.reference_a for example in examples]))
        reward_b = cfg.beta * (logprob_b - self._tensor([example.reference_b for example in examples]))
        labels = self._tensor([example.pair.p_a for example in examples])
        if cfg.loss == "ipo":
            losses = ipo_loss((reward_a - reward_b) / cfg.beta, labels, cfg.beta)
        else:
            losses = preference_loss(reward_a, reward_b, labels)  # equation 7
        a, b = reward_a.detach().double(), reward_b.detach().double()
        decided, prefers_a = labels != 0.5, labels > 0.5
        sums = {
            "correct": float(((a > b) == prefers_a)[decided].sum()),
            "decided": float(decided.sum()),
            "margin": float(((a - b) * (2 * labels - 1)).sum()),
            "better": float(torch.where(prefers_a, a, b)[decided].sum()),
            "worse": float(torch.where(prefers_a, b, a)[decided].sum()),
        }
        return losses, sums

    def _logprobs(self, pairs: Sequence[PairExample]) -> tuple[Tensor, Tensor]:
        """(E,) log-probabilities of responses a and (E,) of b, each over all its tokens."""
        prompts = [pair.prompt for pair in pairs for _ in (0, 1)]
        responses = [response for pair in pairs for response in (pair.response_a, pair.response_b)]
        batch = build_input(prompts, responses, packed=self._packed, device=self.device)
        logprobs, _ = self._scored(batch)
        totals = torch.stack([part.sum() for part in logprobs.split([len(response) for response in responses])])
        return totals[0::2], totals[1::2]

    def _tensor(self, values: Sequence[float]) -> Tensor:
        return torch.tensor(values, device=self.device, dtype=torch.float32)

    @torch.no_grad()
    def logprobs(self, pairs: Sequence[PairExample], plan: RankPlan) -> dict[int, tuple[float, float]]:
        """Log-probabilities of a and b, by index, of the pairs in this rank's plan."""
        found = {}
        for micro in plan:
            logprob_a, logprob_b = self._logprobs([pairs[i] for i in micro or (0,)])
            for k, i in enumerate(micro):
                found[i] = (float(logprob_a[k]), float(logprob_b[k]))
        return found
