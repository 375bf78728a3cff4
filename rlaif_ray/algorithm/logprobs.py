"""Log-probabilities of sampled tokens, and reductions over masked tokens."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

# Enough rows to keep every core busy, few enough that the scratch is small beside the logits.
CHUNK_ROWS = 128


def token_logprobs_and_entropy(logits_NV: Tensor, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Log-probability of each target under softmax(logits / temperature), and that distribution's entropy.

    The caller hands the logits over: when gradients are needed, their storage is overwritten with
    probabilities here and with the gradient in backward, so that no second (N, V) buffer exists (a 150k
    vocabulary makes this the largest tensor of a training step). That is safe for the output of a Linear
    layer, whose backward does not read its output. If something else had saved them (a tanh soft-cap does),
    autograd's version counter raises in backward, and likewise if backward runs a second time: it may run
    only once. Without gradients the logits are left as they are.

    Arithmetic is fp32 for fp32, bf16 and fp16 logits (fp64 for fp64); in the half types the stored
    probabilities, and so the gradient, are rounded to that type. Rows whose incoming gradient is zero get a
    zero gradient even if their logits are NaN. Logits of -inf (a padded vocabulary) are probability zero.

    Args:
        logits_NV: (N, V) floating point; N may be 0.
        targets_N: (N,) int64 in [0, V).
        temperature: the sampler's; policy and reference are both divided by it (METHOD 6.3).

    Returns:
        logprobs_N: (N,) nats, differentiable with respect to the logits.
        entropy_N: (N,) nats, detached: a metric.

    Raises:
        ValueError: the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive to score tokens (got {temperature})")
    assert logits_NV.dim() == 2 and targets_N.shape == logits_NV.shape[:1], (logits_NV.shape, targets_N.shape)
    if torch.is_grad_enabled() and logits_NV.requires_grad:
        logprobs_N, entropy_N = _TokenLogprobs.apply(logits_NV, targets_N, temperature)
        return logprobs_N, entropy_N
    return _score_rows(logits_NV.detach(), targets_N, temperature, keep_probs=False)


def _score_rows(logits_NV: Tensor, targets_N: Tensor, temperature: float, keep_probs: bool) -> tuple[Tensor, Tensor]:
    """(N,) log-probs and (N,) entropies; with keep_probs, logits_NV is left holding the probabilities."""
    rows, vocabulary = logits_NV.shape
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    work_in_place = keep_probs and logits_NV.dtype == dtype
    logprobs_N = torch.empty(rows, dtype=dtype, device=logits_NV.device)
    entropy_N = torch.empty_like(logprobs_N)
    # One scratch for all chunks: on a CPU the page faults of fresh buffers cost more than the arithmetic.
    log_scratch = torch.empty(min(rows, CHUNK_ROWS), vocabulary, dtype=dtype, device=logits_NV.device)
    copy_scratch = None if work_in_place else torch.empty_like(log_scratch)

    for start in range(0, rows, CHUNK_ROWS):
        stop = min(start + CHUNK_ROWS, rows)
        source = logits_NV[start:stop]
        work = source if copy_scratch is None else copy_scratch[: stop - start].copy_(source)
        if temperature != 1.0:
            work.mul_(1.0 / temperature)
        log_p = torch.log_softmax(work, dim=-1, out=log_scratch[: stop - start])
        logprobs_N[start:stop] = log_p.gather(1, targets_N[start:stop, None]).squeeze(1)
        torch.exp(log_p, out=work)
        if keep_probs and not work_in_place:
            source.copy_(work)
        log_p.clamp_(min=-1e30)  # 0 * log 0 is 0 in an entropy, and 0 * -inf would be NaN
        entropy_N[start:stop] = log_p.mul_(work).sum(dim=-1).neg_()
    return logprobs_N, entropy_N


class _TokenLogprobs(torch.autograd.Function):
    """d logp(target) / d logits = (onehot(target) - softmax(logits / temperature)) / temperature."""

    @staticmethod
    def forward(ctx: Any, logits_NV: Tensor, targets_N: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
        logprobs_N, entropy_N = _score_rows(logits_NV, targets_N, temperature, keep_probs=True)
        ctx.save_for_backward(logits_NV, targets_N, logprobs_N)
        ctx.temperature = temperature
        ctx.mark_non_differentiable(entropy_N)
        return logprobs_N, entropy_N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_N: Tensor, _entropy_grad: Tensor) -> tuple[Tensor, None, None]:
        probs_NV, targets_N, logprobs_N = ctx.saved_tensors
        grad_NV = probs_NV.detach()  # the same storage: probabilities become their own gradient
        scaled_N = grad_N / ctx.temperature
        unused = (grad_N == 0).nonzero().squeeze(1)
        grad_NV.index_fill_(0, unused, 0.0)  # 0 * NaN is NaN: rows that nothing depends on are emptied first
        # 1 - p from log p: for confident tokens a stored p (bf16 above all) has lost the difference.
        at_target_N = (-torch.expm1(logprobs_N) * scaled_N).index_fill_(0, unused, 0.0)
        for start in range(0, len(grad_NV), CHUNK_ROWS):  # by chunks: bf16 *= fp32 makes an fp32 copy on CPUs
            rows = slice(start, start + CHUNK_ROWS)
            grad_NV[rows].mul_(-scaled_N[rows, None])
        grad_NV.scatter_(1, targets_N[:, None], at_target_N[:, None].to(grad_NV.dtype))
        return grad_NV, None, None


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Scalar sum of x where mask is True; both of one shape, any. 0 for an empty mask."""
    return torch.where(mask.bool(), x, 0.0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Scalar mean of x where mask is True; both of one shape, any. 0 for an empty mask."""
    return masked_sum(x, mask) / mask.bool().sum().clamp(min=1)
