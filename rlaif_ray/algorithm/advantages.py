"""From scores and values to advantages and returns.

Masks are prefixes (1..1 0..0) with at least one token a row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def terminal_scores(scores_B: Tensor, finished_B: Tensor, missing_eos_penalty: float | None) -> Tensor:
    """(B,) scores, less the penalty where the completion has no EOS (TRL's form of N+'s EOS trick).

    Args:
        scores_B: (B,) the scorer's values.
        finished_B: (B,) bool, the completion ends with EOS.
        missing_eos_penalty: a positive amount to subtract; None for no penalty.
    """
    if missing_eos_penalty is None:
        return scores_B
    return torch.where(finished_B.bool(), scores_B, scores_B - missing_eos_penalty)


def token_rewards(scores_B: Tensor, kl_BT: Tensor, mask_BT: Tensor, kl_coef: float) -> Tensor:
    """(B, T) rewards: -kl_coef * kl per token, plus the score at the last one (Ziegler et al. 2019, eq. 2).

    Args:
        scores_B: (B,) terminal scores.
        kl_BT: (B, T) per-token KL estimate, k1 as a rule.
        mask_BT: (B, T) prefix masks.
    """
    mask_BT = mask_BT.bool()
    penalty_BT = -kl_coef * torch.where(mask_BT, kl_BT, 0.0)
    last_B = mask_BT.sum(dim=1) - 1
    is_last_BT = torch.arange(mask_BT.shape[1], device=mask_BT.device) == last_B[:, None]
    return penalty_BT + torch.where(is_last_BT, scores_B[:, None], 0.0)


def gae(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float, lam: float) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, eq. 16); the value after the last token is 0.

        delta_t = r_t + gamma * V_{t+1} - V_t;   A_t = sum_k (gamma * lam)^k delta_{t+k};   R_t = A_t + V_t

    Args:
        rewards_BT, values_BT: (B, T), one per token.
        mask_BT: (B, T) prefix masks.

    Returns:
        advantages_BT, returns_BT: (B, T), zero outside the mask. The returns are the value targets, so whiten
        the advantages only after this.
    """
    rewards_BT, values_BT = _zero_outside(rewards_BT, mask_BT), _zero_outside(values_BT, mask_BT)
    next_values_BT = torch.cat([values_BT[:, 1:], torch.zeros_like(values_BT[:, :1])], dim=1)
    deltas_BT = rewards_BT + gamma * next_values_BT - values_BT
    advantages_BT = _discounted_suffix_sums(deltas_BT, gamma * lam)
    return advantages_BT, advantages_BT + values_BT


def reinforce_returns(rewards_BT: Tensor, mask_BT: Tensor, gamma: float) -> Tensor:
    """(B, T) discounted reward-to-go G_t = sum_k gamma^k r_{t+k}, zero outside the mask (Williams 1992)."""
    return _discounted_suffix_sums(_zero_outside(rewards_BT, mask_BT), gamma)


def reinforce_advantages(rewards_BT: Tensor, values_BT: Tensor, mask_BT: Tensor, gamma: float) -> tuple[Tensor, Tensor]:
    """REINFORCE with a learned baseline, A_t = G_t - V_t (the RL of Lee et al. 2023, "RLAIF").

    Returns:
        advantages_BT, returns_BT: (B, T), zero outside the mask; the returns G are the value targets.
    """
    returns_BT = reinforce_returns(rewards_BT, mask_BT, gamma)
    return returns_BT - _zero_outside(values_BT, mask_BT), returns_BT


def rloo_advantages(rewards_B: Tensor, groups_B: Tensor) -> Tensor:
    """(B,) reward less the mean of its prompt's other samples (Ahmadian et al. 2024, "Back to Basics").

    A group of one gets 0: it has nothing to be compared with. It happens when a sibling could not be scored.

    Args:
        rewards_B: (B,) one scalar a completion.
        groups_B: (B,) integers; equal numbers share a prompt, in any order.
    """
    centred_B, _, sizes_B = _centre_in_groups(rewards_B, groups_B)
    # r - (S - r) / (n - 1) = (r - S / n) * n / (n - 1); centred_B is 0 in a group of one.
    return (centred_B * sizes_B / (sizes_B - 1).clamp(min=1)).to(rewards_B.dtype)


def grpo_advantages(rewards_B: Tensor, groups_B: Tensor, *, scale: bool = True, eps: float = 1e-6) -> Tensor:
    """(B,) group-relative advantages (r - mean) / (std + eps) (DeepSeekMath, 2024, section 4.1.2).

    The paper does not say which std. This is the unbiased one (n - 1), torch.std's default. scale=False
    leaves out the division, which over-weights prompts with little spread (Liu et al. 2025, "Dr. GRPO"). A
    group of one gets 0.

    Args:
        rewards_B: (B,) one scalar a completion.
        groups_B: (B,) integers; equal numbers share a prompt, in any order.
    """
    centred_B, inverse_B, sizes_B = _centre_in_groups(rewards_B, groups_B)
    if not scale:
        return centred_B.to(rewards_B.dtype)
    squares = torch.zeros_like(centred_B).index_add(0, inverse_B, centred_B.square())[inverse_B]
    std_B = (squares / (sizes_B - 1).clamp(min=1)).sqrt()
    return (centred_B / (std_B + eps)).to(rewards_B.dtype)


def spread_over_tokens(advantages_B: Tensor, mask_BT: Tensor) -> Tensor:
    """(B, T): each completion's advantage at each of its tokens, zero outside the mask."""
    return torch.where(mask_BT.bool(), advantages_B[:, None], 0.0)


def whiten(x_BT: Tensor, mask_BT: Tensor, shift_mean: bool = True, eps: float = 1e-8) -> Tensor:
    """(B, T) (x - mean) / sqrt(var + eps) over the masked tokens, zero outside (Ziegler et al. 2019, code).

    The variance is the biased one (divided by n), so that the result's own is 1. shift_mean=False adds the
    mean back, for rewards. A single token gives 0, or itself when the mean is kept. Statistics are
    taken in fp64: constant advantages would otherwise whiten their own rounding errors.
    """
    mask_BT = mask_BT.bool()
    clean_BT = _zero_outside(x_BT, mask_BT).double()
    count = mask_BT.sum()
    mean = clean_BT.sum() / count.clamp(min=1)
    centred_BT = _zero_outside(clean_BT - mean, mask_BT)
    variance = centred_BT.square().sum() / count.clamp(min=1)
    whitened_BT = centred_BT * torch.rsqrt(variance + eps) + (0.0 if shift_mean else mean)
    return _zero_outside(whitened_BT, mask_BT).to(x_BT.dtype)


def _zero_outside(x_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """(B, T) x where the mask is True, else 0; before any arithmetic, so NaN cannot reach a gradient."""
    return torch.where(mask_BT.bool(), x_BT, 0.0)


def _discounted_suffix_sums(x_BT: Tensor, discount: float) -> Tensor:
    """(B, T) s_t = x_t + discount * s_{t+1}. Zeros after a row's end stay zeros."""
    running_B = x_BT.new_zeros(x_BT.shape[0])
    columns: list[Tensor] = []
    for t in range(x_BT.shape[1] - 1, -1, -1):
        running_B = x_BT[:, t] + discount * running_B
        columns.append(running_B)
    return torch.stack(columns[::-1], dim=1) if columns else x_BT


def _centre_in_groups(rewards_B: Tensor, groups_B: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B,) fp64 reward less its group's mean, (B,) dense group index, (B,) fp64 group size.

    fp64: in fp32 the mean of equal rewards may miss them by one rounding, and GRPO divides by their std.
    """
    unique, inverse_B = torch.unique(groups_B, return_inverse=True)
    rewards_B = rewards_B.double()
    zeros = rewards_B.new_zeros(len(unique))
    sizes_B = zeros.index_add(0, inverse_B, torch.ones_like(rewards_B))[inverse_B]
    sums_B = zeros.index_add(0, inverse_B, rewards_B)[inverse_B]
    return rewards_B - sums_B / sizes_B, inverse_B, sizes_B
