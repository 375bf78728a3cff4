"""Supervised fine-tuning of a language model: cross-entropy on the assistant's tokens, and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from torch import Tensor

from rlaif_ray.chat.renderer import ChatRenderer
from rlaif_ray.chat.template import ChatTemplate
from rlaif_ray.learner.agreement import logprobs_of_saved
from rlaif_ray.learner.head import settle_head
from rlaif_ray.learner.modules import CausalPolicy
from rlaif_ray.learner.packing import ModelInput, build_input
from rlaif_ray.learner.supervised import Sums, SupervisedRank
from rlaif_ray.models import load_causal_lm

if TYPE_CHECKING:
    from rlaif_ray.config.jobs import SftJob
    from rlaif_ray.data.batching import RankPlan
    from rlaif_ray.learner.probe import Text


@dataclass(frozen=True, slots=True)
class SftExample:
    """One turn of the assistant in tokens, and all that stands before it."""

    prompt: tuple[int, ...]  # never empty
    response: tuple[int, ...]  # with what ends a turn; never empty

    def __len__(self) -> int:
        return len(self.prompt) + len(self.response)

    @property
    def lengths(self) -> tuple[int]:
        """Tokens of each sequence that the model reads."""
        return (len(self),)


Example = TypeVar("Example")


class CausalRank(SupervisedRank[Example]):
    """One rank that trains a language model."""

    def _load(self, name: str, **how: Any) -> Any:
        return load_causal_lm(name, **how)

    def _module(self, model: Any) -> torch.nn.Module:
        return CausalPolicy(model, self._job.learner.logits_chunk)

    def _settle(self) -> list[str]:
        sharded = self._job.learner.zero_stage == 3
        how: dict[str, Any] = {"device": self.device, "precision": self._precision, "sharded": sharded}
        return settle_head(self._learner, self._engine, name=self._job.policy.model, packed=self._packed, **how)

    def _probed(self, batch: ModelInput) -> Tensor:
        return self._scored(batch)[0]

    def _scored(self, batch: ModelInput) -> tuple[Tensor, Tensor]:
        """(M,) log-probabilities and (M,) entropies of the tokens that are trained on."""
        own = self._sequence.split(batch, self._model)
        logprobs, entropy = self._engine(own, 1.0)
        return own.whole(logprobs), own.whole(entropy)

    def _readings_of(self, saved: Any, text: Text) -> list[float]:
        return logprobs_of_saved(saved, text)

    def save_model(self, folder: str, center: object = None) -> list[str]:
        """A Hugging Face folder for AutoModelForCausalLM; under ZeRO-3 all ranks help gather.

        Whoever samples from it stops at what it was trained to end a turn with.
        """
        return self._save_folder(folder)

    def _prepare(self, config: Any, generation: Any, tokenizer: Any) -> None:
        chat = ChatTemplate(tokenizer, self._job.policy.chat_template_kwargs)
        stop_at(generation, ChatRenderer(chat).turn_end())


def stop_at(settings: Any, tokens: Sequence[int]) -> None:
    """Adds the tokens to those at which settings for generation stop; some models of code of their own have none."""
    if settings is None:
        return
    known = settings.eos_token_id
    stops = list(known) if isinstance(known, list | tuple) else [] if known is None else [known]
    new = [token for token in tokens if token not in stops]
    if new:
        settings.eos_token_id = [*stops, *new] if stops or len(new) > 1 else new[0]


class SftRank(CausalRank[SftExample]):
    """One rank that fine-tunes a language model."""

    _job: SftJob

    def _size(self, examples: Sequence[SftExample]) -> int:
        """Tokens that are trained on: every one weighs the same, whatever the length of its turn."""
        return sum(len(example.response) for example in examples)

    def _losses(self, examples: Sequence[SftExample]) -> tuple[Tensor, Sums]:
        batch = build_input(
            [e.prompt for e in examples], [e.response for e in examples], packed=self._packed, device=self.device
        )
        logprobs, entropy = self._scored(batch)
        parts = logprobs.split([len(e.response) for e in examples])
        tokens = float(self._size(examples))
        return -torch.stack([part.sum() for part in parts]), {"tokens": tokens, "entropy": float(entropy.sum())}

    @torch.no_grad()
    def losses(self, examples: Sequence[SftExample], plan: RankPlan) -> dict[int, float]:
        """Sum of -log p over the tokens of each turn in this rank's plan, by index."""
        found = {}
        for micro in plan:
            values, _ = self._losses([examples[i] for i in micro or (0,)])
            found.update({i: float(values[k]) for k, i in enumerate(micro)})
        return found
