"""Rewards, advantages and returns by hand, against naive definitions, and what they must not depend on."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlaif_ray.algorithm.advantages import (
    gae,
    grpo_advantages,
    reinforce_advantages,
    reinforce_returns,
    rloo_advantages,
    spread_over_tokens,
    terminal_scores,
    token_rewards,
    whiten,
)

NAN, INF = float("nan"), float("inf")


def prefix_mask(lengths: list[int], width: int) -> Tensor:
    return torch.arange(width) < torch.tensor(lengths)[:, None]


def random_batch(width: int = 7) -> tuple[Tensor, Tensor, Tensor]:
    """Rewards, values and mask; garbage outside the mask."""
    torch.manual_seed(3)
    mask = prefix_mask([7, 1, 4, 6], width)
    rewards, values = (torch.randn(4, width, dtype=torch.float64) for _ in range(2))
    return torch.where(mask, rewards, NAN), torch.where(mask, values, INF), mask


def test_terminal_scores_by_hand() -> None:
    # finished keeps 0.5; unfinished 0.5 - 1.5 = -1
    scores, finished = torch.tensor([0.5, 0.5]), torch.tensor([True, False])
    assert terminal_scores(scores, finished, 1.5).tolist() == [0.5, -1.0]
    assert terminal_scores(scores, finished, None).tolist() == [0.5, 0.5]


def test_token_rewards_by_hand() -> None:
    # -0.1 * kl: row 0: -.1, -.2, -(-.3) + 5 at its third and last token; row 1: -.4 + 7 at its only token
    kl = torch.tensor([[1.0, 2.0, -3.0], [4.0, NAN, INF]])
    rewards = token_rewards(torch.tensor([5.0, 7.0]), kl, prefix_mask([3, 1], 3), 0.1)
    torch.testing.assert_close(rewards, torch.tensor([[-0.1, -0.2, 5.3], [6.6, 0.0, 0.0]]))


def test_token_rewards_sum_to_score_less_penalty() -> None:
    _, _, mask = random_batch()
    scores, kl = torch.randn(4), torch.where(mask, torch.randn(4, 7), NAN)
    expected = scores - 0.05 * torch.where(mask, kl, 0.0).sum(1)
    torch.testing.assert_close(token_rewards(scores, kl, mask, 0.05).sum(1), expected)


def test_gae_by_hand() -> None:
    # gamma = .9, lam = .5, rewards 1 2 3, values .5 1 2, value after the end 0:
    #   delta = 1 + .9*1 - .5 = 1.4;  2 + .9*2 - 1 = 2.8;  3 - 2 = 1
    #   A_2 = 1;  A_1 = 2.8 + .45 * 1 = 3.25;  A_0 = 1.4 + .45 * 3.25 = 2.8625;  R = A + V
    # second row, one token: A = 4 - 1 = 3, R = 4
    rewards, values = (
        torch.tensor([[1.0, 2.0, 3.0], [4.0, NAN, NAN]]),
        torch.tensor([[0.5, 1.0, 2.0], [1.0, NAN, 9.0]]),
    )
    advantages, returns = gae(rewards, values, prefix_mask([3, 1], 3), 0.9, 0.5)
    torch.testing.assert_close(advantages, torch.tensor([[2.8625, 3.25, 1.0], [3.0, 0.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[3.3625, 4.25, 3.0], [4.0, 0.0, 0.0]]))


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.5), (0.97, 0.0), (1.0, 1.0)])
def test_gae_equals_the_naive_double_sum(gamma: float, lam: float) -> None:
    rewards, values, mask = random_batch()
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for row in range(4):
        length = int(mask[row].sum())
        r, v = rewards[row, :length].tolist(), [*values[row, :length].tolist(), 0.0]
        for t in range(length):
            naive = sum((gamma * lam) ** (k - t) * (r[k] + gamma * v[k + 1] - v[k]) for k in range(t, length))
            assert advantages[row, t].item() == pytest.approx(naive, rel=1e-9, abs=1e-12)
            assert returns[row, t].item() == pytest.approx(naive + v[t], rel=1e-9, abs=1e-12)
    assert not advantages[~mask].any() and not returns[~mask].any()


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_gae_with_lambda_one_is_reinforce_with_a_baseline(gamma: float) -> None:
    rewards, values, mask = random_batch()
    advantages, returns = gae(rewards, values, mask, gamma, 1.0)
    baseline_advantages, rewards_to_go = reinforce_advantages(rewards, values, mask, gamma)
    torch.testing.assert_close(advantages, baseline_advantages)
    torch.testing.assert_close(returns, rewards_to_go)
    torch.testing.assert_close(advantages[mask], (returns - values)[mask])


def test_reinforce_returns_by_hand() -> None:
    # gamma = .5, rewards 1 2 4: G_2 = 4;  G_1 = 2 + .5 * 4 = 4;  G_0 = 1 + .5 * 4 = 3
    rewards = torch.tensor([[1.0, 2.0, 4.0, NAN]])
    mask = prefix_mask([3], 4)
    torch.testing.assert_close(reinforce_returns(rewards, mask, 0.5), torch.tensor([[3.0, 4.0, 4.0, 0.0]]))
    # with values 1 1 1: 3 - 1, 4 - 1, 4 - 1
    advantages, returns = reinforce_advantages(rewards, torch.tensor([[1.0, 1.0, 1.0, INF]]), mask, 0.5)
    torch.testing.assert_close(advantages, torch.tensor([[2.0, 3.0, 3.0, 0.0]]))
    torch.testing.assert_close(returns, torch.tensor([[3.0, 4.0, 4.0, 0.0]]))


def test_rloo_by_hand_with_interleaved_groups() -> None:
    # group 7: rewards 1 2 6 -> 1 - (2+6)/2 = -3;  2 - (1+6)/2 = -1.5;  6 - (1+2)/2 = 4.5
    # group 3: rewards 0 1   -> 0 - 1 = -1;  1 - 0 = 1.   group 5: alone -> 0
    rewards = torch.tensor([1.0, 0.0, 2.0, 9.0, 6.0, 1.0])
    groups = torch.tensor([7, 3, 7, 5, 7, 3])
    torch.testing.assert_close(rloo_advantages(rewards, groups), torch.tensor([-3.0, -1.0, -1.5, 0.0, 4.5, 1.0]))


def test_grpo_by_hand_with_interleaved_groups() -> None:
    # group 7: 1 2 6: mean 3, centred -2 -1 3, unbiased var (4+1+9)/2 = 7, std 2.645751
    #          -> -0.755929, -0.377964, 1.133893.   group 3: 0 1: centred -.5 .5, var .5, std .707107 ->
    # -+.707107
    rewards = torch.tensor([1.0, 0.0, 2.0, 9.0, 6.0, 1.0])
    groups = torch.tensor([7, 3, 7, 5, 7, 3])
    expected = torch.tensor([-0.755929, -0.707106, -0.377964, 0.0, 1.133893, 0.707106])
    torch.testing.assert_close(grpo_advantages(rewards, groups), expected, rtol=0, atol=2e-6)
    torch.testing.assert_close(
        grpo_advantages(rewards, groups, scale=False), torch.tensor([-2.0, -0.5, -1.0, 0.0, 3.0, 0.5])
    )
    # eps = 1 and group 3: .5 / (.707107 + 1) = 0.292893
    assert grpo_advantages(rewards, groups, eps=1.0)[5].item() == pytest.approx(0.292893, abs=1e-6)


def test_equal_rewards_give_no_advantage_however_they_round() -> None:
    # In fp32 the sum of three 0.1 divided by 3 can miss 0.1 by 7e-9, which a division by std + 1e-6 would
    # blow up.
    rewards, groups = torch.full((7,), 0.1), torch.zeros(7, dtype=torch.long)
    assert grpo_advantages(rewards, groups).abs().max().item() < 1e-8
    assert rloo_advantages(rewards, groups).abs().max().item() < 1e-8


@pytest.mark.parametrize("estimate", [rloo_advantages, grpo_advantages])
def test_group_advantages_follow_the_rows_and_ignore_a_prompts_offset(estimate) -> None:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    rewards, groups, order = torch.randn(12), torch.arange(12) % 4, torch.randperm(12)
    advantages = estimate(rewards, groups)
    torch.testing.assert_close(estimate(rewards[order], groups[order]), advantages[order])
    torch.testing.assert_close(estimate(rewards + 10.0 * groups, groups), advantages, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(estimate(rewards[groups == 2], groups[groups == 2]), advantages[groups == 2])


def test_spread_over_tokens() -> None:
    spread = spread_over_tokens(torch.tensor([2.0, -1.0]), prefix_mask([1, 3], 3))
    assert spread.tolist() == [[2.0, 0.0, 0.0], [-1.0, -1.0, -1.0]]


def test_whiten_by_hand() -> None:
    # masked in: 1 2 3 6: mean 3, biased var (4+1+0+9)/4 = 3.5, std 1.870829
    # -> -1.069045, -0.534522, 0, 1.603567; without shifting the mean, 3 more
    x, mask = torch.tensor([[1.0, 2.0, NAN], [3.0, 6.0, INF]]), prefix_mask([2, 2], 3)
    shifted = torch.tensor([[-1.069045, -0.534522, 0.0], [0.0, 1.603567, 0.0]])
    torch.testing.assert_close(whiten(x, mask), shifted, rtol=0, atol=2e-6)
    torch.testing.assert_close(
        whiten(x, mask, shift_mean=False), torch.where(mask, shifted + 3.0, 0.0), rtol=0, atol=2e-6
    )


def test_whitened_mean_and_variance() -> None:
    rewards, _, mask = random_batch()
    inside = whiten(50.0 + 7.0 * rewards, mask)[mask]
    assert inside.mean().item() == pytest.approx(0.0, abs=1e-9)
    assert inside.var(unbiased=False).item() == pytest.approx(1.0, abs=1e-6)
    kept = whiten(50.0 + 7.0 * rewards, mask, shift_mean=False)[mask]
    assert kept.mean().item() == pytest.approx((50.0 + 7.0 * rewards)[mask].mean().item(), rel=1e-9)
    assert kept.var(unbiased=False).item() == pytest.approx(1.0, abs=1e-6)


def test_whiten_with_too_few_or_constant_tokens() -> None:
    x, one, none = torch.tensor([[5.0, NAN]]), prefix_mask([1], 2), prefix_mask([0], 2)
    assert whiten(x, one).tolist() == [[0.0, 0.0]]
    assert whiten(x, one, shift_mean=False).tolist() == [[5.0, 0.0]]
    assert whiten(x, none).tolist() == [[0.0, 0.0]]
    constant = torch.full((1, 7), 1000.1)  # fp32's mean of these is off by 6e-5, a whitened 0.52
    assert whiten(constant, torch.ones(1, 7, dtype=torch.bool)).abs().max().item() < 1e-6


def all_token_outputs(rewards: Tensor, values: Tensor, mask: Tensor) -> list[Tensor]:
    """Every (B, T) function of this file on one batch."""
    ends = torch.arange(len(rewards), dtype=rewards.dtype)
    return [
        *gae(rewards, values, mask, 0.99, 0.9),
        *reinforce_advantages(rewards, values, mask, 0.99),
        token_rewards(ends, rewards, mask, 0.1),
        whiten(values, mask),
        whiten(values, mask, shift_mean=False),
    ]


@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 1e30])
def test_more_padding_changes_neither_values_nor_gradients(garbage: float) -> None:
    rewards, values, mask = random_batch()
    leaves = [torch.where(mask, x, 0.0).requires_grad_() for x in (rewards, values)]
    wide_mask = torch.cat([mask, torch.zeros(4, 3, dtype=torch.bool)], 1)
    padding = torch.full((4, 3), garbage, dtype=torch.float64)
    wide = [torch.cat([torch.where(mask, x, garbage), padding], 1).requires_grad_() for x in (rewards, values)]
    weights = torch.randn(4, 7, dtype=torch.float64)
    wide_weights = torch.cat([weights, torch.ones(4, 3, dtype=torch.float64)], 1)

    narrow_outputs, wide_outputs = (
        all_token_outputs(leaves[0], leaves[1], mask),
        all_token_outputs(wide[0], wide[1], wide_mask),
    )
    for narrow, padded in zip(narrow_outputs, wide_outputs, strict=True):
        torch.testing.assert_close(padded[:, :7], narrow)
        assert not padded[:, 7:].any() and not padded[~wide_mask].any()
    sum((x * weights).sum() for x in narrow_outputs).backward()  # type: ignore[union-attr]
    sum((x * wide_weights).sum() for x in wide_outputs).backward()  # type: ignore[union-attr]
    for leaf, padded_leaf in zip(leaves, wide, strict=True):
        assert leaf.grad is not None and padded_leaf.grad is not None and leaf.grad.any()
        torch.testing.assert_close(padded_leaf.grad[:, :7], leaf.grad)
        assert not padded_leaf.grad[~wide_mask].any()


def test_row_order_does_not_matter() -> None:
    rewards, values, mask = random_batch()
    order = torch.tensor([2, 0, 3, 1])
    outputs = [*gae(rewards, values, mask, 0.99, 0.9), whiten(rewards, mask)]
    moved = [*gae(rewards[order], values[order], mask[order], 0.99, 0.9), whiten(rewards[order], mask[order])]
    for output, moved_output in zip(outputs, moved, strict=True):
        torch.testing.assert_close(moved_output, output[order])


def test_a_perfect_critic_leaves_no_advantage() -> None:
    # reward 3 at the end and values 3 everywhere: every delta is 0 when gamma = 1
    rewards, values = torch.tensor([[0.0, 0.0, 3.0]]), torch.full((1, 3), 3.0)
    advantages, returns = gae(rewards, values, prefix_mask([3], 3), 1.0, 0.95)
    assert advantages.tolist() == [[0.0, 0.0, 0.0]] and returns.tolist() == [[3.0, 3.0, 3.0]]


def test_an_unmasked_nan_shows() -> None:
    rewards, values, mask = torch.tensor([[0.0, NAN]]), torch.zeros(1, 2), prefix_mask([2], 2)
    assert all(math.isnan(x) for x in gae(rewards, values, mask, 1.0, 0.95)[0][0].tolist())
