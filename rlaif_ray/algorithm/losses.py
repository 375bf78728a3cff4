"""Losses per token, and of preferences per pair.

The caller sums them over masked tokens and divides by the global token count (normalise_sum), or over pairs and
divides by their global number, so that the loss, and with it the gradient, does not depend on how the batch was
sharded.

They take no mask. A position whose inputs are not finite gets a NaN loss, which shows if it was a real token,
and a zero gradient, so a padded one leaves no trace once normalise_sum has dropped it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rlaif_ray.algorithm.kl import MAX_LOG_RATIO
from rlaif_ray.algorithm.logprobs import masked_mean, masked_sum


def ppo_policy_loss(
    logprobs: Tensor, old_logprobs: Tensor, advantages: Tensor, clip: float, *, dual_clip: float | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """PPO's clipped surrogate, max(-A r, -A clip(r, 1 - clip, 1 + clip)) (Schulman et al. 2017, eq. 7).

    The log-ratio is clamped to +-20 so that one stray token cannot overflow the ratio; beyond it the gradient
    is 0. dual_clip (> 1) also bounds the loss by -dual_clip * A where A < 0, where the plain surrogate has no
    bound as r grows (Ye et al. 2020).

    Args:
        logprobs: under the policy being trained; differentiable.
        old_logprobs: under the policy that the update started from.
        advantages: of the sampled tokens; constants. All three have one shape, any.

    Returns:
        loss: that shape.
        ratio: that shape, detached; 1 on the first pass.
        clipped: that shape, bool, a bound was active and the token gives no gradient.
    """
    finite = logprobs.isfinite() & old_logprobs.isfinite() & advantages.isfinite()
    log_ratio = _zero_unless(finite, logprobs - old_logprobs)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    free_loss = -advantages * ratio
    clipped_loss = -advantages * ratio.clamp(1.0 - clip, 1.0 + clip)
    clipped = clipped_loss > free_loss
    loss = torch.maximum(free_loss, clipped_loss)
    if dual_clip is not None:
        bound = -dual_clip * advantages
        beyond = (advantages < 0) & (loss > bound)
        loss, clipped = torch.where(beyond, bound, loss), clipped | beyond
    return _nan_unless(finite, loss), _nan_unless(finite, ratio).detach(), clipped


def reinforce_policy_loss(logprobs: Tensor, advantages: Tensor) -> Tensor:
    """-A log pi, whose gradient is the policy gradient (Williams 1992). One shape, any."""
    finite = logprobs.isfinite() & advantages.isfinite()
    return _nan_unless(finite, -advantages * _zero_unless(finite, logprobs))


def value_loss(values: Tensor, old_values: Tensor, returns: Tensor, clip: float | None) -> tuple[Tensor, Tensor]:
    """0.5 * max((V - R)^2, (clip(V, V_old - clip, V_old + clip) - R)^2) (PPO's released code; METHOD 6.11).

    Args:
        values: predictions being trained; differentiable.
        old_values: predictions that the update started from.
        returns: targets; constants. All three have one shape, any.
        clip: how far a value may move in one update; None for the plain squared error.

    Returns:
        loss: that shape.
        clipped: that shape, bool, the clipped error was the larger one and the token gives no gradient.
    """
    finite = values.isfinite() & old_values.isfinite() & returns.isfinite()
    values = _zero_unless(finite, values)
    error = (values - returns).square()
    if clip is None:
        return _nan_unless(finite, 0.5 * error), torch.zeros_like(finite)
    near_old = values.clamp(old_values - clip, old_values + clip)
    clipped_error = (near_old - returns).square()
    clipped = clipped_error > error
    return _nan_unless(finite, 0.5 * torch.where(clipped, clipped_error, error)), clipped


def truncated_importance_weight(
    train_logprobs: Tensor, sampler_logprobs: Tensor, low: float, high: float
) -> tuple[Tensor, Tensor]:
    """Detached clip(pi_train / pi_sampler, low, high): truncated importance sampling (METHOD 6.13).

    The tokens came from the sampler's arithmetic, which differs a little from the trainer's. Apply the weight
    to the advantages: every policy loss here is linear in a non-negative factor of them, and the advantages,
    unlike the loss, carry no gradient that a NaN in padding could spoil.

    Args:
        train_logprobs: the trainer's recomputed log-probs of the sampling policy.
        sampler_logprobs: what the sampler reported. One shape, any.

    Returns:
        weight: that shape.
        clipped: that shape, bool, the weight is a bound rather than the quotient.
    """
    gap = (train_logprobs.detach() - sampler_logprobs.detach()).clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)
    quotient = gap.exp()
    return quotient.clamp(low, high), (quotient < low) | (quotient > high)


def preference_loss(reward_a: Tensor, reward_b: Tensor, p_a: Tensor, margin: float = 0.0) -> Tensor:
    """(N,) cross-entropy between soft labels and the preference sigmoid(r_a - r_b) (Lee et al. 2309.00267, 2.2).

        -p log sigmoid(d) - (1 - p) log sigmoid(-d),  d = r_a - r_b

    `p_a` is (N,), the probability that a is better. Where it is certain (0 or 1) the better reward must lead by
    `margin` (Touvron et al. 2307.09288, equation 2).
    """
    finite = reward_a.isfinite() & reward_b.isfinite() & p_a.isfinite()
    difference = _zero_unless(finite, reward_a - reward_b)
    if margin:
        certain = (p_a == 1.0).to(difference.dtype) - (p_a == 0.0).to(difference.dtype)
        difference = difference - margin * certain
    log_sigmoid = torch.nn.functional.logsigmoid
    return _nan_unless(finite, -p_a * log_sigmoid(difference) - (1.0 - p_a) * log_sigmoid(-difference))


def ipo_loss(log_ratio: Tensor, p_a: Tensor, beta: float) -> Tensor:
    """(N,) squared distance of the log-ratio to the margin 1 / (2 beta) (Azar et al. 2310.12036, equation 17), weighed
    by the label.

        p (h - 1 / (2 beta))^2 + (1 - p) (h + 1 / (2 beta))^2

    `log_ratio` is (N,) h = log pi(a) / ref(a) - log pi(b) / ref(b); `p_a` is (N,), the probability that a is better.
    """
    finite = log_ratio.isfinite() & p_a.isfinite()
    h, margin = _zero_unless(finite, log_ratio), 1.0 / (2.0 * beta)
    return _nan_unless(finite, p_a * (h - margin).square() + (1.0 - p_a) * (h + margin).square())


def normalise_sum(per_token: Tensor, mask: Tensor, denominator: float) -> Tensor:
    """Scalar: sum of per_token over the mask, divided by the global token count. One shape, any."""
    return masked_sum(per_token, mask) / denominator


def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """Scalar, detached: 1 - var(returns - values) / var(returns) over the mask; 0 for constant returns.

    1 is a perfect critic, 0 no better than a constant, negative worse.
    """
    returns = torch.where(mask.bool(), returns.detach(), 0.0).double()
    residuals = returns - torch.where(mask.bool(), values.detach(), 0.0)
    total, unexplained = _masked_variance(returns, mask), _masked_variance(residuals, mask)
    # Below the resolution of fp32 returns, their variance is rounding and the quotient is noise.
    varies = total > 1e-14 * masked_mean(returns.square(), mask)
    return torch.where(varies, 1.0 - unexplained / torch.where(varies, total, 1.0), 0.0).to(values.dtype)


def _masked_variance(x: Tensor, mask: Tensor) -> Tensor:
    """Scalar biased variance over the mask."""
    return masked_mean((x - masked_mean(x, mask)).square(), mask)


def _zero_unless(finite: Tensor, x: Tensor) -> Tensor:
    """x where finite, else 0, before the arithmetic: a NaN gradient that comes back stops at this select."""
    return torch.where(finite, x, 0.0)


def _nan_unless(finite: Tensor, x: Tensor) -> Tensor:
    """x where finite, else NaN: an unusable real token must show, and a constant passes no gradient."""
    return torch.where(finite, x, float("nan"))
