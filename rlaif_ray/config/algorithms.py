"""Settings of the RL algorithms, chosen by `algorithm.type`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from rlaif_ray.config.base import Config


class KlConfig(Config):
    """Penalty for leaving the reference."""

    coef: Annotated[float, Field(ge=0)] = 0.05
    estimator: Literal["k1", "k2", "k3"] = "k1"
    target: Annotated[float, Field(gt=0)] | None = None
    """KL per sample in nats that the adaptive controller steers to; null: the coefficient stays fixed."""
    horizon: Annotated[int, Field(ge=1)] = 10_000
    """Samples over which the adaptive controller moves (Ziegler et al.)."""


class ImportanceConfig(Config):
    """Truncated importance weights between sampler and learner: each token's loss is multiplied by
    min(max(p_learner / p_sampler, low), high)."""

    when: Literal["auto", "always"] = "auto"
    """auto: in bf16, where engines and learner round differently, and not in fp32, where they agree to 1e-3."""
    low: Annotated[float, Field(ge=0)] = 0.0
    high: Annotated[float, Field(gt=0)] = 2.0

    def _problems(self) -> Iterator[str]:
        if self.low > self.high:
            yield (
                f"algorithm.importance.low must not exceed algorithm.importance.high "
                f"(got {self.low:g} > {self.high:g}): no weight lies between them. Swap them."
            )


class AlgorithmBase(Config):
    kl: KlConfig = KlConfig()
    missing_eos_penalty: Annotated[float, Field(ge=0)] | None = 1.0
    """Subtracted from the score of a completion cut at the token limit; null: none."""
    epochs: Annotated[int, Field(ge=1)] = 1
    minibatches: Annotated[int, Field(ge=1)] = 1
    """Optimizer steps per epoch."""
    old_logprobs: Literal["auto", "learner", "sampler"] = "auto"
    """Whose log-probabilities PPO's ratio starts from; auto: the sampler's in fp32 (they agree to 1e-3), else the
    learner's, at the price of one more forward pass."""
    importance: ImportanceConfig | None = ImportanceConfig()
    """null: no weights."""

    def importance_in(self, precision: Literal["fp32", "bf16"]) -> ImportanceConfig | None:
        """The bounds of the importance weights in that precision; None: there are no weights."""
        weights = self.importance
        if weights is None or self.old_logprobs == "sampler":  # from the sampler's own, all of them would be 1
            return None
        return weights if weights.when == "always" or precision == "bf16" else None


class PpoConfig(AlgorithmBase):
    """Proximal policy optimisation with a critic and GAE."""

    type: Literal["ppo"] = "ppo"
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    lam: Annotated[float, Field(ge=0, le=1)] = 0.95
    clip: Annotated[float, Field(gt=0)] = 0.2
    value_clip: Annotated[float, Field(gt=0)] | None = 0.2
    whiten_advantages: bool = True


class ReinforceConfig(AlgorithmBase):
    """REINFORCE with a learned value baseline (Lee et al., appendix A.3)."""

    type: Literal["reinforce"]
    gamma: Annotated[float, Field(gt=0, le=1)] = 1.0
    value_clip: Annotated[float, Field(gt=0)] | None = None
    whiten_advantages: bool = False


class RlooConfig(AlgorithmBase):
    """REINFORCE leave-one-out: the other samples of the prompt are the baseline. No critic."""

    type: Literal["rloo"]
    clip: Annotated[float, Field(gt=0)] = 0.2
    whiten_advantages: bool = False


class GrpoConfig(AlgorithmBase):
    """Group-relative advantages; the KL stands in the loss. No critic."""

    type: Literal["grpo"]
    clip: Annotated[float, Field(gt=0)] = 0.2
    scale_by_std: bool = True
    kl: KlConfig = KlConfig(estimator="k3")


AlgorithmConfig = Annotated[PpoConfig | ReinforceConfig | RlooConfig | GrpoConfig, Field(discriminator="type")]
