"""KL divergence to the reference policy: per-token estimates, and the controller of its coefficient."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

KLKind = Literal["k1", "k2", "k3"]

# exp(20) is 5e8: far outside any policy worth a step, and far inside what fp32 can hold (exp(89) is not).
MAX_LOG_RATIO = 20.0


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: KLKind) -> Tensor:
    """Per-token estimate of KL(policy || reference) from tokens that the policy sampled.

    With d = logprobs - ref_logprobs (Schulman, "Approximating KL Divergence", 2020):
        k1 = d               unbiased, signed; the one that belongs in a reward
        k2 = d^2 / 2         biased, non-negative
        k3 = exp(-d) - 1 + d unbiased, non-negative, lower variance; GRPO's loss term (DeepSeekMath, eq. 4)

    d is clamped to +-20, because one token that the reference finds impossible would make exp(-d) overflow
    and the batch mean meaningless; an infinite d counts as 20. Outside the clamp the gradient is zero, and
    where d is NaN the estimate is NaN but no gradient comes back, so masked positions stay clean.

    Args:
        logprobs, ref_logprobs: one shape, any; differentiable in both.

    Returns:
        The estimates, in that shape, in nats.
    """
    d = (logprobs - ref_logprobs).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    if kind == "k1":
        return d
    if kind == "k2":
        return 0.5 * d.square()
    if kind == "k3":
        return torch.expm1(-d) + d  # expm1: exp(-d) - 1 loses all its digits near d = 0, where training lives
    raise ValueError(f"unknown KL estimator {kind!r}: choose k1, k2 or k3")


def adaptive_kl_coef(coef: float, kl: float, *, target: float, samples: int, horizon: int) -> float:
    """The next KL coefficient, steering the measured KL to a target (Ziegler et al. 2019, section 2.2).

        e = clip(kl / target - 1, -0.2, 0.2);   coef * (1 + e * samples / horizon)

    Args:
        coef: the coefficient now in use.
        kl: measured mean over samples of the KL summed over tokens, nats per sample.
        target: wanted value of kl.
        samples: completions since the last update.
        horizon: completions over which a saturated error would change the coefficient by 20%.
    """
    error = min(max(kl / target - 1.0, -0.2), 0.2)
    return coef * (1.0 + error * samples / horizon)
