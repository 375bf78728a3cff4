"""Token log-probs against arithmetic by hand and against torch's own softmax and autograd."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from rlaif_ray.algorithm.logprobs import (
    CHUNK_ROWS,
    masked_mean,
    masked_sum,
    token_logprobs_and_entropy,
)

NAN, INF = float("nan"), float("inf")


def reference(logits: Tensor, targets: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """The textbook way, with as many (N, V) buffers as it likes."""
    log_p = torch.log_softmax(logits.float() / temperature, dim=-1)
    return log_p.gather(1, targets[:, None]).squeeze(1), -(log_p.exp() * log_p).sum(-1)


def test_hand_computed_values_and_gradient() -> None:
    # softmax([0, ln 3]) = [1/4, 3/4]: logp = ln 0.25, ln 0.75
    # entropy = 1/4 ln 4 + 3/4 ln(4/3) = 0.346574 + 0.215762 = 0.562335
    # d logp_target / d logits = onehot - p: [1 - .25, -.75] and [-.25, 1 - .75]
    logits = torch.tensor([[0.0, math.log(3)], [0.0, math.log(3)]], requires_grad=True)
    logprobs, entropy = token_logprobs_and_entropy(logits, torch.tensor([0, 1]), 1.0)
    torch.testing.assert_close(logprobs, torch.tensor([math.log(0.25), math.log(0.75)]))
    torch.testing.assert_close(entropy, torch.tensor([0.562335, 0.562335]))
    logprobs.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[0.75, -0.75], [-0.25, 0.25]]))


def test_hand_computed_temperature() -> None:
    # logits [0, ln 3] / 0.5 = [0, ln 9] -> p = [0.1, 0.9]; gradient for target 0, times 1/T = 2:
    # 2 * [1 - 0.1, -0.9] = [1.8, -1.8]
    logits = torch.tensor([[0.0, math.log(3)]], requires_grad=True)
    logprobs, _ = token_logprobs_and_entropy(logits, torch.tensor([0]), 0.5)
    assert logprobs.item() == pytest.approx(math.log(0.1), rel=1e-6)
    logprobs.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[1.8, -1.8]]))


@pytest.mark.parametrize("temperature", [0.3, 0.7, 1.0, 2.5])
@pytest.mark.parametrize("rows", [1, CHUNK_ROWS, 2 * CHUNK_ROWS + 7])
def test_equals_log_softmax_and_autograd(temperature: float, rows: int) -> None:
    torch.manual_seed(rows)
    logits, targets, weights = torch.randn(rows, 97) * 4, torch.randint(97, (rows,)), torch.randn(rows)
    ours, theirs = (logits.clone().requires_grad_() for _ in range(2))
    logprobs, entropy = token_logprobs_and_entropy(ours, targets, temperature)
    expected_logprobs, expected_entropy = reference(theirs, targets, temperature)
    torch.testing.assert_close(logprobs, expected_logprobs)
    torch.testing.assert_close(entropy, expected_entropy.detach())
    (logprobs * weights).sum().backward()
    (expected_logprobs * weights).sum().backward()
    torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_half_types_are_computed_in_fp32_and_only_gradients_are_rounded(dtype: torch.dtype, temperature: float) -> None:
    torch.manual_seed(0)
    rows = CHUNK_ROWS + 5
    logits, targets, weights = (
        (torch.randn(rows, 50) * 4).to(dtype),
        torch.randint(50, (rows,)),
        torch.randn(rows),
    )
    ours, theirs = logits.clone().requires_grad_(), logits.float().requires_grad_()
    logprobs, entropy = token_logprobs_and_entropy(ours, targets, temperature)
    expected_logprobs, expected_entropy = reference(theirs, targets, temperature)
    assert logprobs.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logprobs, expected_logprobs)  # fp32 tolerance: values are not rounded
    torch.testing.assert_close(entropy, expected_entropy.detach())
    (logprobs * weights).sum().backward()
    (expected_logprobs * weights).sum().backward()
    assert ours.grad is not None and theirs.grad is not None and ours.grad.dtype == dtype
    # Rounded twice (the stored probability and the product): two units of bf16's 2^-8; fp16 is finer.
    torch.testing.assert_close(ours.grad.float(), theirs.grad, rtol=2 * 2**-8, atol=1e-6)


def test_confident_bf16_target_keeps_its_gradient() -> None:
    # p = 1 / (1 + e^-8) = 0.999665, which bf16 stores as 1; the gradient 1 - p = 3.3535e-4 must survive.
    logits = torch.tensor([[8.0, 0.0]], dtype=torch.bfloat16, requires_grad=True)
    token_logprobs_and_entropy(logits, torch.tensor([0]), 1.0)[0].sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 0].item() == pytest.approx(3.3535e-4, rel=2**-8)


def test_gradient_equals_finite_differences_in_fp64() -> None:
    # torch's gradcheck runs backward more than once on a graph, which this function forbids: hence by hand.
    torch.manual_seed(0)
    targets, weights = torch.tensor([3, 0, 4]), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)

    def weighted_sum(x: Tensor) -> Tensor:
        return (token_logprobs_and_entropy(x, targets, 0.7)[0] * weights).sum()

    logits = torch.randn(3, 5, dtype=torch.float64)
    differences = torch.empty_like(logits)
    for index in range(logits.numel()):
        nudge = torch.zeros(15, dtype=torch.float64).index_fill_(0, torch.tensor([index]), 1e-5).view(3, 5)
        rise = weighted_sum(logits + nudge) - weighted_sum(logits - nudge)
        differences.view(-1)[index] = rise / 2e-5
    (gradient,) = torch.autograd.grad(weighted_sum(leaf := logits.clone().requires_grad_()), [leaf])
    torch.testing.assert_close(gradient, differences, rtol=1e-6, atol=1e-8)


def test_gradients_through_a_linear_layer_and_two_users_of_the_hidden_state() -> None:
    torch.manual_seed(0)
    head, targets = torch.nn.Linear(6, 11), torch.randint(11, (9,))
    hidden = torch.randn(9, 6, requires_grad=True)
    gradients = []
    for score in (token_logprobs_and_entropy, reference):
        logprobs, _ = score(head(hidden), targets, 0.7)
        loss = logprobs.sum() + hidden.square().sum()
        gradients.append(torch.autograd.grad(loss, [head.weight, head.bias, hidden]))
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_no_second_buffer_the_logits_become_probabilities_then_the_gradient() -> None:
    torch.manual_seed(0)
    leaf, targets = torch.randn(5, 7, requires_grad=True), torch.arange(5)
    logits = leaf * 1.0
    probabilities = torch.softmax(logits.detach() / 0.7, -1)
    logprobs, _ = token_logprobs_and_entropy(logits, targets, 0.7)
    torch.testing.assert_close(logits.detach(), probabilities)
    seen: list[int] = []
    logits.register_hook(lambda grad: seen.append(grad.data_ptr()))
    logprobs.sum().backward()
    assert seen == [logits.data_ptr()]


def test_backward_runs_once() -> None:
    logprobs, _ = token_logprobs_and_entropy(torch.randn(2, 3, requires_grad=True) * 1.0, torch.tensor([0, 1]), 1.0)
    logprobs.sum().backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="inplace"):
        logprobs.sum().backward()


def test_another_reader_of_the_logits_raises_instead_of_getting_wrong_gradients() -> None:
    soft_capped = torch.tanh(torch.randn(2, 3, requires_grad=True))  # tanh's backward reads its own output
    logprobs, _ = token_logprobs_and_entropy(soft_capped, torch.tensor([0, 1]), 1.0)
    with pytest.raises(RuntimeError, match="inplace"):
        logprobs.sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_gradients_the_logits_are_left_alone(dtype: torch.dtype) -> None:
    logits = torch.randn(4, 6).to(dtype).requires_grad_()
    before, targets = logits.detach().clone(), torch.arange(4)
    with torch.no_grad():
        logprobs, _ = token_logprobs_and_entropy(logits, targets, 0.7)
    assert torch.equal(logits.detach(), before) and not logprobs.requires_grad
    token_logprobs_and_entropy(logits.detach(), targets, 0.7)
    assert torch.equal(logits.detach(), before)
    torch.testing.assert_close(logprobs, reference(before, targets, 0.7)[0])


def test_entropy_is_detached() -> None:
    logprobs, entropy = token_logprobs_and_entropy(torch.randn(2, 3, requires_grad=True), torch.tensor([0, 1]), 1.0)
    assert logprobs.requires_grad and not entropy.requires_grad


def test_no_tokens() -> None:
    logits = torch.randn(0, 7, requires_grad=True)
    logprobs, entropy = token_logprobs_and_entropy(logits, torch.empty(0, dtype=torch.long), 1.0)
    assert logprobs.shape == entropy.shape == (0,)
    logprobs.sum().backward()
    assert logits.grad is not None and logits.grad.shape == (0, 7)


@pytest.mark.parametrize("temperature", [0.0, -1.0, NAN])
def test_temperature_must_be_positive(temperature: float) -> None:
    with pytest.raises(ValueError, match="temperature"):
        token_logprobs_and_entropy(torch.randn(1, 3), torch.tensor([0]), temperature)


def test_impossible_words_count_for_nothing() -> None:
    # -inf leaves softmax([0, ln 3]) = [1/4, 3/4] and its entropy 0.562335 as they were, and gets no gradient.
    logits = torch.tensor([[0.0, -INF, math.log(3)]], requires_grad=True)
    logprobs, entropy = token_logprobs_and_entropy(logits, torch.tensor([2]), 1.0)
    assert logprobs.item() == pytest.approx(math.log(0.75), rel=1e-6)
    assert entropy.item() == pytest.approx(0.562335, rel=1e-5)
    logprobs.sum().backward()
    torch.testing.assert_close(logits.grad, torch.tensor([[-0.25, 0.0, 0.25]]))


def test_large_logits_do_not_overflow() -> None:
    logits = torch.tensor([[1e4, 1e4 - 1.0]], requires_grad=True)
    logprobs, entropy = token_logprobs_and_entropy(logits, torch.tensor([1]), 1.0)
    # p = [e, 1] / (e + 1) = [.731059, .268941]; logp = -1.313262
    # entropy = .731059 * .313262 + .268941 * 1.313262 = 0.582203
    assert logprobs.item() == pytest.approx(-1.313262, abs=1e-5)
    assert entropy.item() == pytest.approx(0.582203, abs=1e-5)


@pytest.mark.parametrize("garbage", [NAN, INF])
def test_a_masked_row_of_garbage_changes_nothing(garbage: float) -> None:
    torch.manual_seed(0)
    clean, targets, mask = torch.randn(3, 5), torch.tensor([1, 2, 3]), torch.tensor([True, False, True])
    dirty = clean.clone()
    dirty[1] = garbage
    results: list[tuple[Tensor, Tensor]] = []
    for logits in (clean, dirty):
        leaf = logits.clone().requires_grad_()
        loss = masked_mean(token_logprobs_and_entropy(leaf * 1.0, targets, 0.7)[0], mask)
        loss.backward()
        assert leaf.grad is not None
        results.append((loss.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1]) and results[1][1].isfinite().all()


def test_row_order_does_not_matter() -> None:
    torch.manual_seed(0)
    logits, targets, order = torch.randn(300, 20), torch.randint(20, (300,)), torch.randperm(300)
    logprobs, entropy = token_logprobs_and_entropy(logits, targets, 0.7)
    moved_logprobs, moved_entropy = token_logprobs_and_entropy(logits[order], targets[order], 0.7)
    torch.testing.assert_close(moved_logprobs, logprobs[order])
    torch.testing.assert_close(moved_entropy, entropy[order])


def test_masked_reductions_by_hand_and_their_gradients() -> None:
    # masked in: 1, 2, 6 -> sum 9, mean 3; d mean / dx = 1/3 inside, 0 outside
    x = torch.tensor([[1.0, 2.0, NAN], [6.0, INF, -INF]], requires_grad=True)
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]])
    assert masked_sum(x, mask).item() == 9.0
    assert masked_mean(x, mask).item() == 3.0
    masked_mean(x, mask.bool()).backward()
    torch.testing.assert_close(x.grad, torch.tensor([[1 / 3, 1 / 3, 0.0], [1 / 3, 0.0, 0.0]]))


def test_empty_mask_gives_zero_and_an_unmasked_nan_shows() -> None:
    x = torch.tensor([NAN, 1.0])
    nothing = torch.tensor([False, False])
    assert masked_sum(x, nothing).item() == 0.0 and masked_mean(x, nothing).item() == 0.0
    assert masked_mean(x, torch.tensor([True, True])).isnan()
