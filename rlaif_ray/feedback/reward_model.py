"""Scorers that ask no judge: a reward model, a penalty on length, and a weighted mixture of any."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from rlaif_ray.attention import longest_exact, padded_kernel, switch_length
from rlaif_ray.chat.renderer import ChatRenderer
from rlaif_ray.chat.template import ChatTemplate
from rlaif_ray.chat.thoughts import OPEN_THOUGHT, answer_of
from rlaif_ray.errors import InputError
from rlaif_ray.models import context_length, load_config, load_sequence_classifier, load_tokenizer
from rlaif_ray.types import Score

if TYPE_CHECKING:
    from rlaif_ray.config.sections import RewardModelFeedback
    from rlaif_ray.interfaces import Scorer
    from rlaif_ray.types import Completion

Tokens = tuple[int, ...]


def check_reward_model(cfg: RewardModelFeedback, key: str = "feedback") -> None:
    """Raises InputError when there is no reward model under that name: before actors start. `key` is its section."""
    config = load_config(cfg.model, revision=cfg.revision, trust_remote_code=cfg.trust_remote_code)
    kinds = config.architectures or []
    if not any("SequenceClassification" in kind for kind in kinds) or config.num_labels != 1:
        raise InputError(
            f"{key}.model={cfg.model} must be a sequence classifier with one label (got {', '.join(kinds) or '?'} "
            f"with {config.num_labels}). Train one with rlaif reward-model, or use feedback.type=judge."
        )
    has = context_length(config)
    if cfg.max_context is not None and has is not None and cfg.max_context > has:
        raise InputError(
            f"{key}.max_context must not exceed the {has} tokens that {cfg.model} can read "
            f"(got {cfg.max_context}). Lower it."
        )


def reward_renderer(cfg: RewardModelFeedback, date: str | None, key: str = "feedback") -> ChatRenderer:
    """How the reward model reads conversations: with the arguments of its template that it was trained with.

    Raises:
        InputError: its template does not take the config's.
    """
    code: dict[str, Any] = {"revision": cfg.revision, "trust_remote_code": cfg.trust_remote_code}
    arguments = cfg.chat_template_kwargs
    if arguments is None:
        arguments = getattr(load_config(cfg.model, **code), "reward_chat_template_kwargs", None)
    return ChatRenderer(ChatTemplate(load_tokenizer(cfg.model, **code), arguments, date, key=key))


class RewardModelScorer:
    """Scores completions with a sequence classifier, read at the last token; reference rewards have mean 0.

    The prompt is rendered anew with the reward model's own chat template: policy and reward model need not share a
    tokenizer.
    """

    def __init__(
        self,
        cfg: RewardModelFeedback,
        *,
        device: Literal["cpu", "cuda"],
        precision: Literal["fp32", "bf16"],
        date: str | None = None,
    ) -> None:
        """Loads the model. `date` is the run's to chat templates."""
        import torch

        code: dict[str, Any] = {"revision": cfg.revision, "trust_remote_code": cfg.trust_remote_code}
        self._cfg, self._device = cfg, device
        self._renderer = reward_renderer(cfg, date)
        dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[precision]
        kernel = padded_kernel(load_config(cfg.model, **code))
        model, _ = load_sequence_classifier(cfg.model, dtype=dtype, attention=kernel, **code)
        self._model: Any = model.to(device).eval()  # type: ignore[arg-type]
        config: Any = model.config
        # A classifier from elsewhere says nothing of either: its rewards count as they are, after the usual EOS.
        self._mean = float((getattr(config, "reward_center", None) or {}).get("mean", 0.0))
        self._cut = (cfg.thoughts or getattr(config, "reward_thoughts", "cut")) == "cut"
        eos = self._renderer.tokenizer.eos_token_id
        self._ends = (eos,) if eos is not None and getattr(config, "reward_ends_with_eos", True) else ()
        self._switch = switch_length(config) or 2**31
        self._room = min(cfg.max_context or context_length(config) or 2**31, longest_exact(config) or 2**31)

    def score(self, completions: Sequence[Completion]) -> list[Score]:
        """One score per completion, in order; too long ones, thoughts without an end and what is no number are
        failures."""
        sequences = [self._sequence(completion) for completion in completions]
        short = [i for i, sequence in enumerate(sequences) if sequence and len(sequence) <= self._room]
        rewards = self._rewards([sequences[i] for i in short])
        found = dict(zip(short, rewards, strict=True))
        return [self._score(found.get(i), len(sequence)) for i, sequence in enumerate(sequences)]

    def _sequence(self, completion: Completion) -> Tokens:
        """Empty for a response that is still a thought."""
        text = answer_of(completion.text, completion.prompt.tags) if self._cut else completion.text
        if text is None:
            return ()
        prompt = self._renderer.tokens(completion.prompt.messages, f"prompt {completion.prompt.id}")
        # One that was cut has no end; the reward model has seen whole responses only, and reads the last token.
        return (*prompt, *self._renderer.response(text), *(self._ends if completion.finished else ()))

    def _score(self, reward: float | None, tokens_in: int) -> Score:
        evidence = {"model": self._cfg.model}
        if reward is None:
            return Score(None, "too_long" if tokens_in else OPEN_THOUGHT, evidence)
        if not math.isfinite(reward - self._mean):
            return Score(None, "no_value", evidence, tokens_in)
        return Score(reward - self._mean, None, {"reward": round(reward, 6), **evidence}, tokens_in)

    def _rewards(self, sequences: Sequence[Tokens]) -> list[float]:
        """Raw rewards in order, computed in batches of similar length."""
        rewards: dict[int, float] = {}
        for batch in self._batches([len(sequence) for sequence in sequences]):
            values = self._forward([sequences[i] for i in batch])
            rewards.update(zip(batch, values, strict=True))
        return [rewards[i] for i in range(len(sequences))]

    def _batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Longest first; a batch, padded to its first, stays within tokens_per_batch, and on one side of the length at
        which the model's RoPE factors change."""
        batches: list[list[int]] = []
        for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
            longest = lengths[batches[-1][0]] if batches else 0
            fits = longest * (len(batches[-1]) + 1) <= self._cfg.tokens_per_batch if batches else False
            if fits and (lengths[i] > self._switch) == (longest > self._switch):
                batches[-1].append(i)
            else:
                batches.append([i])
        return batches

    def _forward(self, sequences: Sequence[Tokens]) -> list[float]:
        import torch

        width = max(map(len, sequences))
        tokens = torch.tensor([[*s, *[0] * (width - len(s))] for s in sequences], device=self._device)
        lengths = torch.tensor([len(s) for s in sequences], device=self._device)
        mask = (torch.arange(width, device=self._device)[None] < lengths[:, None]).long()
        with torch.inference_mode():
            hidden = self._model.base_model(input_ids=tokens, attention_mask=mask, use_cache=False).last_hidden_state
            last = hidden[torch.arange(len(sequences), device=self._device), lengths - 1]
            rewards = self._model.score(last)[:, 0].float()
        return [float(reward) for reward in rewards.cpu()]


class LengthPenalty:
    """0 up to `target_tokens` tokens, then linearly down to -1 at twice as many, and -1 beyond."""

    def __init__(self, target_tokens: int) -> None:
        self._target = target_tokens

    def score(self, completions: Sequence[Completion]) -> list[Score]:
        return [self._score(len(completion.tokens)) for completion in completions]

    def _score(self, tokens: int) -> Score:
        return Score(max(-1.0, min(0.0, (self._target - tokens) / self._target)), None, {"tokens": tokens})


class MixtureScorer:
    """The weighted sum of several scores. A completion is scored when all of them could score it."""

    def __init__(self, scorers: Mapping[str, tuple[float, Scorer]]) -> None:
        """(weight, scorer) by name."""
        self._scorers = dict(scorers)

    @property
    def parts(self) -> list[Scorer]:
        """The scorers, in their order."""
        return [scorer for _, scorer in self._scorers.values()]

    def score(self, completions: Sequence[Completion]) -> list[Score]:
        parts = {name: scorer.score(completions) for name, (_, scorer) in self._scorers.items()}
        return [self._sum({name: scores[i] for name, scores in parts.items()}) for i in range(len(completions))]

    def _sum(self, parts: Mapping[str, Score]) -> Score:
        evidence = {"parts": {name: {"value": s.value, "evidence": s.evidence} for name, s in parts.items()}}
        tokens_in = sum(score.tokens_in for score in parts.values())
        for name, score in parts.items():
            if score.value is None:
                return Score(None, f"{name}_{score.failure}", evidence, tokens_in)
        value = math.fsum(self._scorers[name][0] * (score.value or 0.0) for name, score in parts.items())
        return Score(value, None, evidence, tokens_in)
