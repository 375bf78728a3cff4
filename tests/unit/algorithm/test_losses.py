"""Losses by hand (values and gradients), and what they must not depend on."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from rlaif_ray.algorithm.losses import (
    explained_variance,
    normalise_sum,
    ppo_policy_loss,
    preference_loss,
    reinforce_policy_loss,
    truncated_importance_weight,
    value_loss,
)

NAN, INF = float("nan"), float("inf")

Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
# Each takes a trained input, an old one and a target, so that one set of invariances covers all.
LOSSES: dict[str, Loss] = {
    "ppo": lambda x, old, target: ppo_policy_loss(x, old, target, 0.2)[0],
    "ppo_dual_clip": lambda x, old, target: ppo_policy_loss(x, old, target, 0.2, dual_clip=3.0)[0],
    "reinforce": lambda x, old, target: reinforce_policy_loss(x, target),
    "value": lambda x, old, target: value_loss(x, old, target, None)[0],
    "value_clipped": lambda x, old, target: value_loss(x, old, target, 0.2)[0],
    "preference": lambda x, old, target: preference_loss(x, old, target),
}


def test_ppo_by_hand() -> None:
    # clip .2, old log-prob 0, so ratio = exp(logprob); loss = max(-A r, -A clip(r, .8, 1.2)); gradient = -A r
    # if free   r 1.1, A  2: max(-2.2, -2.2) = -2.2   free     gradient -2.2
    #   r 1.5, A  2: max(-3.0, -2.4) = -2.4   clipped  gradient 0
    #   r 0.5, A  2: max(-1.0, -1.6) = -1.0   free     gradient -1.0
    #   r 1.5, A -2: max( 3.0,  2.4) =  3.0   free     gradient 3.0
    #   r 0.5, A -2: max( 1.0,  1.6) =  1.6   clipped  gradient 0
    logprobs = torch.tensor([1.1, 1.5, 0.5, 1.5, 0.5]).log().requires_grad_()
    advantages = torch.tensor([2.0, 2.0, 2.0, -2.0, -2.0])
    loss, ratio, clipped = ppo_policy_loss(logprobs, torch.zeros(5), advantages, 0.2)
    torch.testing.assert_close(loss, torch.tensor([-2.2, -2.4, -1.0, 3.0, 1.6]))
    torch.testing.assert_close(ratio, torch.tensor([1.1, 1.5, 0.5, 1.5, 0.5]))
    assert not ratio.requires_grad
    assert clipped.dtype == torch.bool and clipped.tolist() == [False, True, False, False, True]
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([-2.2, 0.0, -1.0, 3.0, 0.0]))


def test_ppo_dual_clip_by_hand() -> None:
    # dual_clip 3: only where A < 0 and r > 3 is the loss bounded, at -3 A = 6
    #   r 5, A -2: max(10, 2.4) = 10 -> 6, clipped, gradient 0;   r 2.5, A -2: 5, free, gradient 5
    #   r 5, A  2: max(-10, -2.4) = -2.4, clipped as before
    logprobs = torch.tensor([5.0, 2.5, 5.0]).log().requires_grad_()
    loss, _, clipped = ppo_policy_loss(logprobs, torch.zeros(3), torch.tensor([-2.0, -2.0, 2.0]), 0.2, dual_clip=3.0)
    torch.testing.assert_close(loss, torch.tensor([6.0, 5.0, -2.4]))
    assert clipped.tolist() == [True, False, True]
    loss.sum().backward()
    torch.testing.assert_close(logprobs.grad, torch.tensor([0.0, 5.0, 0.0]))


def test_ppo_first_pass_is_the_policy_gradient() -> None:
    logprobs = torch.tensor([-1.0, -0.2, -7.0], requires_grad=True)
    advantages = torch.tensor([1.5, -2.0, 0.0])
    loss, ratio, clipped = ppo_policy_loss(logprobs, logprobs.detach().clone(), advantages, 0.2)
    assert ratio.tolist() == [1.0, 1.0, 1.0] and not clipped.any()
    loss.sum().backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == [-1.5, 2.0, 0.0]


def test_ppo_extreme_ratio_stays_finite() -> None:
    # log-ratio 200 -> 20: ratio e^20 = 485165195.4; A = -1 -> loss the same, gradient 0 beyond the clamp
    logprobs = torch.tensor([200.0], requires_grad=True)
    loss, ratio, _ = ppo_policy_loss(logprobs, torch.zeros(1), torch.tensor([-1.0]), 0.2)
    assert ratio.item() == pytest.approx(485165195.4, rel=1e-6) == loss.item()
    loss.sum().backward()
    assert logprobs.grad is not None and logprobs.grad.item() == 0.0


def test_reinforce_by_hand() -> None:
    # -A logp: -(2)(-1.5) = 3; -(-1)(-0.5) = -0.5; gradient -A
    logprobs = torch.tensor([-1.5, -0.5], requires_grad=True)
    loss = reinforce_policy_loss(logprobs, torch.tensor([2.0, -1.0]))
    torch.testing.assert_close(loss, torch.tensor([3.0, -0.5]))
    loss.sum().backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == [-2.0, 1.0]


def test_value_loss_by_hand() -> None:
    # old 0, clip .5; loss = .5 max((V - R)^2, (clip(V, -.5, .5) - R)^2)
    #   V .25, R 1:  .5625 and .5625          -> .28125  free     gradient V - R = -.75
    #   V 1,   R 1:  0     and (.5 - 1)^2=.25 -> .125    clipped  gradient 0
    #   V 1,   R -1: 4     and 2.25           -> 2       free     gradient 2
    #   V -1,  R -1: 0     and .25            -> .125    clipped  gradient 0
    values = torch.tensor([0.25, 1.0, 1.0, -1.0], requires_grad=True)
    returns = torch.tensor([1.0, 1.0, -1.0, -1.0])
    loss, clipped = value_loss(values, torch.zeros(4), returns, 0.5)
    torch.testing.assert_close(loss, torch.tensor([0.28125, 0.125, 2.0, 0.125]))
    assert clipped.dtype == torch.bool and clipped.tolist() == [False, True, False, True]
    loss.sum().backward()
    assert values.grad is not None and values.grad.tolist() == [-0.75, 0.0, 2.0, 0.0]


def test_value_loss_without_clip_by_hand() -> None:
    # .5 (1 - 3)^2 = 2, gradient -2
    values = torch.tensor([1.0], requires_grad=True)
    loss, clipped = value_loss(values, torch.tensor([100.0]), torch.tensor([3.0]), None)
    assert loss.item() == 2.0 and not clipped.any()
    loss.sum().backward()
    assert values.grad is not None and values.grad.item() == -2.0


def test_a_value_within_the_clip_is_never_called_clipped() -> None:
    torch.manual_seed(0)
    old_values, returns = torch.randn(1000), torch.randn(1000)
    values = old_values + 0.19 * (2 * torch.rand(1000) - 1)
    loss, clipped = value_loss(values, old_values, returns, 0.2)
    assert not clipped.any()
    torch.testing.assert_close(loss, 0.5 * (values - returns).square())


@pytest.mark.parametrize("name", LOSSES)
def test_gradcheck(name: str) -> None:
    torch.manual_seed(0)
    x, old, target = (torch.randn(12, dtype=torch.float64) for _ in range(3))
    assert torch.autograd.gradcheck(lambda live: LOSSES[name](live, old, target), (x.requires_grad_(),))


def test_importance_weights_by_hand() -> None:
    # ratios 2, .25, 8, 1 into [.5, 5] -> 2, .5, 5, 1;  an impossible token (exp(inf)) -> 5
    train = torch.tensor([0.4, 0.1, 0.8, 0.3, 0.5]).log().requires_grad_()
    sampler = torch.tensor([0.2, 0.4, 0.1, 0.3, 0.0]).log()
    weights, clipped = truncated_importance_weight(train, sampler, 0.5, 5.0)
    torch.testing.assert_close(weights, torch.tensor([2.0, 0.5, 5.0, 1.0, 5.0]))
    assert clipped.tolist() == [False, True, True, False, True]
    assert not weights.requires_grad


@pytest.mark.parametrize("dual_clip", [None, 3.0])
def test_weighting_the_advantages_is_weighting_the_loss(dual_clip: float | None) -> None:
    torch.manual_seed(0)
    logprobs, old, advantages = (torch.randn(200, dtype=torch.float64) for _ in range(3))
    weights, _ = truncated_importance_weight(old, old + torch.randn(200).double(), 0.5, 5.0)
    weighted_advantages = ppo_policy_loss(logprobs, old, weights * advantages, 0.2, dual_clip=dual_clip)[0]
    weighted_loss = weights * ppo_policy_loss(logprobs, old, advantages, 0.2, dual_clip=dual_clip)[0]
    torch.testing.assert_close(weighted_advantages, weighted_loss)


def test_normalise_sum_by_hand() -> None:
    # (1 + 3) / 8 = 0.5; gradient 1/8 inside, 0 outside
    x = torch.tensor([1.0, NAN, 3.0], requires_grad=True)
    total = normalise_sum(x, torch.tensor([True, False, True]), 8.0)
    assert total.item() == 0.5
    total.backward()
    assert x.grad is not None and x.grad.tolist() == [0.125, 0.0, 0.125]


def test_explained_variance_by_hand() -> None:
    mask = torch.tensor([True, True, True, True, False])
    returns = torch.tensor([1.0, 2.0, 3.0, 6.0, NAN])  # mean 3, var (4+1+0+9)/4 = 3.5
    # values 1 2 3 4: residuals 0 0 0 2, mean .5, var (3 * .25 + 2.25)/4 = .75 -> 1 - .75/3.5 = 0.785714
    some = explained_variance(torch.tensor([1.0, 2.0, 3.0, 4.0, INF]), returns, mask)
    assert some.item() == pytest.approx(0.785714, abs=1e-6) and some.shape == ()
    assert explained_variance(returns, returns, mask).item() == 1.0
    assert explained_variance(torch.full((5,), 9.0), returns, mask).item() == pytest.approx(0.0, abs=1e-12)
    # values -returns: residuals 2 returns, var 4 * 3.5 -> 1 - 4 = -3
    assert explained_variance(-returns, returns, mask).item() == pytest.approx(-3.0, rel=1e-6)


def test_explained_variance_of_constant_returns_is_zero() -> None:
    # 0.1 seven times: its fp64 mean misses it by a rounding, so the variance is tiny and not exactly zero.
    returns, mask = torch.full((7,), 0.1, dtype=torch.float64), torch.ones(7, dtype=torch.bool)
    assert explained_variance(torch.randn(7, dtype=torch.float64), returns, mask).item() == 0.0
    assert explained_variance(torch.ones(7), torch.ones(7), torch.zeros(7, dtype=torch.bool)).item() == 0.0


def random_inputs(rows: int = 6, width: int = 5) -> tuple[list[Tensor], Tensor]:
    torch.manual_seed(1)
    lengths = torch.tensor([5, 1, 3, 2, 4, 5])[:rows]
    return [torch.randn(rows, width, dtype=torch.float64) for _ in range(3)], torch.arange(width) < lengths[:, None]


def loss_and_gradient(name: str, inputs: list[Tensor], mask: Tensor, denominator: float) -> tuple[Tensor, Tensor]:
    live = inputs[0].clone().requires_grad_()
    total = normalise_sum(LOSSES[name](live, inputs[1], inputs[2]), mask, denominator)
    total.backward()
    assert live.grad is not None and live.grad.any()
    return total.detach(), live.grad


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
@pytest.mark.parametrize("which", [(0,), (1,), (2,), (0, 1, 2)])
def test_padding_changes_neither_values_nor_gradients(name: str, garbage: float, which: tuple[int, ...]) -> None:
    inputs, mask = random_inputs()
    clean_loss, clean_gradient = loss_and_gradient(name, inputs, mask, 20.0)
    wide_mask = torch.cat([mask, torch.zeros(6, 2, dtype=torch.bool)], 1)
    wide = [torch.cat([x, torch.zeros(6, 2, dtype=torch.float64)], 1) for x in inputs]
    for index in which:
        wide[index] = torch.where(wide_mask, wide[index], garbage)
    wide_loss, wide_gradient = loss_and_gradient(name, wide, wide_mask, 20.0)
    torch.testing.assert_close(wide_loss, clean_loss)
    torch.testing.assert_close(wide_gradient[:, :5], clean_gradient)
    assert not wide_gradient[~wide_mask].any()


@pytest.mark.parametrize("name", LOSSES)
def test_shards_with_the_global_denominator_add_up_to_the_whole(name: str) -> None:
    inputs, mask = random_inputs()
    tokens = float(mask.sum())
    whole_loss, whole_gradient = loss_and_gradient(name, inputs, mask, tokens)
    shards = [
        loss_and_gradient(name, [x[rows] for x in inputs], mask[rows], tokens)
        for rows in (slice(0, 2), slice(2, 6))  # 6 tokens and 14: a mean of the shards' means would differ
    ]
    torch.testing.assert_close(shards[0][0] + shards[1][0], whole_loss)
    torch.testing.assert_close(torch.cat([shards[0][1], shards[1][1]]), whole_gradient)


@pytest.mark.parametrize("name", LOSSES)
def test_row_order_does_not_matter(name: str) -> None:
    inputs, mask = random_inputs()
    order = torch.tensor([3, 0, 5, 1, 4, 2])
    loss, gradient = loss_and_gradient(name, inputs, mask, 20.0)
    moved_loss, moved_gradient = loss_and_gradient(name, [x[order] for x in inputs], mask[order], 20.0)
    torch.testing.assert_close(moved_loss, loss)
    torch.testing.assert_close(moved_gradient, gradient[order])


@pytest.mark.parametrize("name", LOSSES)
def test_a_nan_on_a_real_token_shows(name: str) -> None:
    loss = LOSSES[name](torch.tensor([NAN, -1.0]), torch.tensor([-1.0, -1.0]), torch.tensor([1.0, 1.0]))
    assert math.isnan(loss[0].item()) and math.isfinite(loss[1].item())


def test_preference_loss_by_hand() -> None:
    # -p log s(d) - (1 - p) log s(-d), where log s(0) = -.693147, log s(2) = -.126928, log s(-2) = -2.126928
    #   d 0 (any p): .693147;  d 2: p 1 .126928, p 0 2.126928, p .75 .75 * .126928 + .25 * 2.126928 = .626928
    # gradient of r_a: s(d) - p, where s(0) = .5 and s(2) = .880797; of r_b its opposite
    reward_a = torch.tensor([1.5, 1.5, 3.0, 3.0, 3.0], requires_grad=True)
    reward_b = torch.tensor([1.5, 1.5, 1.0, 1.0, 1.0], requires_grad=True)
    loss = preference_loss(reward_a, reward_b, torch.tensor([0.5, 1.0, 1.0, 0.0, 0.75]))
    expected = torch.tensor([0.693147, 0.693147, 0.126928, 2.126928, 0.626928])
    torch.testing.assert_close(loss, expected, atol=1e-6, rtol=0)
    loss.sum().backward()
    gradient = torch.tensor([0.0, -0.5, -0.119203, 0.880797, 0.130797])
    torch.testing.assert_close(reward_a.grad, gradient, atol=1e-6, rtol=0)
    torch.testing.assert_close(reward_b.grad, -gradient, atol=1e-6, rtol=0)


def test_preference_loss_with_margin_by_hand() -> None:
    # the better one must lead by 1:  d 2, p 1 -> -log s(1) = .313262;  d 2, p 0 -> -log s(-3) = 3.048587;
    # p .75 is not certain, and stays .626928
    loss = preference_loss(torch.full((3,), 2.0), torch.zeros(3), torch.tensor([1.0, 0.0, 0.75]), margin=1.0)
    torch.testing.assert_close(loss, torch.tensor([0.313262, 3.048587, 0.626928]), atol=1e-6, rtol=0)


@pytest.mark.parametrize("margin", [0.0, 0.7])
def test_preference_loss_of_the_mirrored_pair_is_the_same(margin: float) -> None:
    torch.manual_seed(0)
    a, b = torch.randn(50, dtype=torch.float64), torch.randn(50, dtype=torch.float64)
    p = torch.cat([torch.rand(40), torch.zeros(5), torch.ones(5)]).double()
    torch.testing.assert_close(preference_loss(b, a, 1 - p, margin), preference_loss(a, b, p, margin))
    torch.testing.assert_close(preference_loss(a + 9, b + 9, p, margin), preference_loss(a, b, p, margin))


def test_preference_loss_is_least_where_the_preference_is_the_label() -> None:
    p = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)
    at = torch.logit(p).requires_grad_()
    loss = preference_loss(at, torch.zeros(3), p)
    torch.testing.assert_close(loss, -p * p.log() - (1 - p) * (1 - p).log())  # the entropy of the label
    loss.sum().backward()
    torch.testing.assert_close(at.grad, torch.zeros(3, dtype=torch.float64), atol=1e-12, rtol=0)


def test_preference_loss_of_far_rewards_stays_finite() -> None:
    reward_a = torch.tensor([1e4, 1e4, -1e4], requires_grad=True)
    loss = preference_loss(reward_a, torch.zeros(3), torch.tensor([1.0, 0.0, 1.0]))
    assert loss.tolist() == [0.0, 1e4, 1e4]
    loss.sum().backward()
    assert reward_a.grad is not None and reward_a.grad.tolist() == [0.0, 1.0, -1.0]
