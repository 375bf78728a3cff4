"""Log-probabilities of sampled tokens, from logits or from hidden states, and reductions over masked tokens.

Letters: N tokens, V vocabulary, h hidden.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
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


# ---- From hidden states: the logits of all tokens never stand side by side ------------------------------------------


@dataclass(frozen=True, slots=True)
class LogitRule:
    """What a model does to the products of its output head, in this order, element by element."""

    scale: float = 1.0  # they are multiplied by it (Cohere; Granite divides)
    softcap: float | None = None  # c * tanh(x / c) (Gemma 2, arXiv 2408.00118, section 2)

    def apply_(self, products: Tensor) -> Tensor:
        """The logits, in the place of the products and in their type, as transformers' models compute them."""
        if self.scale != 1.0:
            products.mul_(self.scale)
        if self.softcap is not None:
            products.div_(self.softcap).tanh_().mul_(self.softcap)
        return products

    def apply(self, products: Tensor) -> Tensor:
        """The logits, as `apply_`; autograd sees every operation."""
        logits = products if self.scale == 1.0 else products * self.scale
        return logits if self.softcap is None else torch.tanh(logits / self.softcap) * self.softcap


def head_logprobs_and_entropy(
    hidden_Nh: Tensor,
    weight_Vh: Tensor,
    bias_V: Tensor | None,
    targets_N: Tensor,
    temperature: float,
    *,
    rule: LogitRule,
    chunk: int,
) -> Tensor:
    """What `token_logprobs_and_entropy` gives of the logits rule(hidden weight^T + bias), `chunk` rows at a time.

    Up to `chunk` rows the logits stand side by side, and backward finds them there. With more, no more than `chunk` of
    them exist at any time: each chunk's are computed, read and dropped, and computed again in backward, which costs one
    more product with the head. The weight's gradient adds up over chunks in fp32, and is rounded once.

    Args:
        hidden_Nh: (N, h) the states that predict the targets.
        weight_Vh: (V, h) the output head, of the states' type.
        bias_V: (V,), where the head has one.
        targets_N: (N,) int64 in [0, V).
        temperature: the sampler's.
        rule: what the model does to the head's products.
        chunk: rows of logits that are held at a time, at least 1.

    Returns:
        (2, N): the log-probabilities, in nats, and the entropies, through which no gradient flows.

    Raises:
        ValueError: the temperature is not positive.
    """
    if not temperature > 0:
        raise ValueError(f"temperature must be positive to score tokens (got {temperature})")
    assert hidden_Nh.dim() == 2 and targets_N.shape == hidden_Nh.shape[:1], (hidden_Nh.shape, targets_N.shape)
    if len(hidden_Nh) <= chunk:
        products = torch.nn.functional.linear(hidden_Nh, weight_Vh, bias_V)
        return torch.stack(token_logprobs_and_entropy(rule.apply(products), targets_N, temperature))
    scores: Tensor = _ChunkedHead.apply(hidden_Nh, weight_Vh, bias_V, targets_N, temperature, rule, chunk)
    return scores


class _ChunkedHead(torch.autograd.Function):
    """One function for all chunks, not a checkpoint around each: whoever gathers a sharded weight (ZeRO-3) for a call
    of the head does so once a pass, on every rank, however many chunks a rank's tokens make.

    Liger Kernel's fused linear cross-entropy (0.8.5) is not used: it gives no entropy of each token, which runs log.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden_Nh: Tensor,
        weight_Vh: Tensor,
        bias_V: Tensor | None,
        targets_N: Tensor,
        temperature: float,
        rule: LogitRule,
        chunk: int,
    ) -> Tensor:
        pieces = []
        for rows in _even_chunks(len(hidden_Nh), chunk):
            logits = rule.apply_(torch.nn.functional.linear(hidden_Nh[rows], weight_Vh, bias_V))
            pieces.append(torch.stack(_score_rows(logits, targets_N[rows], temperature, keep_probs=False)))
            del logits  # before the next chunk's are made
        scores_2N = torch.cat(pieces, 1)
        # The head itself, no view of it: what a ZeRO-3 parameter holds in backward is gathered again by then.
        ctx.save_for_backward(hidden_Nh, weight_Vh, bias_V, targets_N, scores_2N[0].clone())
        ctx.temperature, ctx.rule, ctx.chunk = temperature, rule, chunk
        return scores_2N

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_2N: Tensor) -> tuple[Tensor | None, ...]:
        hidden_Nh, weight_Vh, bias_V, targets_N, logprobs_N = ctx.saved_tensors
        for_hidden, for_weight, for_bias = ctx.needs_input_grad[:3]
        hidden_grad = torch.empty_like(hidden_Nh) if for_hidden else None
        summed = torch.promote_types(weight_Vh.dtype, torch.float32)  # a sum in bf16 loses what is 2^-9 of it
        weight_grad = torch.zeros_like(weight_Vh, dtype=summed) if for_weight else None
        bias_grad = torch.zeros_like(bias_V, dtype=summed) if for_bias else None
        for rows in _even_chunks(len(hidden_Nh), ctx.chunk):
            logits = ctx.rule.apply_(torch.nn.functional.linear(hidden_Nh[rows], weight_Vh, bias_V))
            grad = _logits_to_gradient(
                logits, targets_N[rows], logprobs_N[rows], grad_2N[0, rows], ctx.temperature, ctx.rule
            )
            if hidden_grad is not None:
                torch.mm(grad, weight_Vh, out=hidden_grad[rows])
            if weight_grad is not None:
                weight_grad.add_(grad.t() @ hidden_Nh[rows])
            if bias_grad is not None:
                bias_grad += grad.sum(0, dtype=summed)
            del logits, grad
        weight_grad = None if weight_grad is None else weight_grad.to(weight_Vh.dtype)
        bias_grad = None if bias_grad is None or bias_V is None else bias_grad.to(bias_V.dtype)
        return hidden_grad, weight_grad, bias_grad, None, None, None, None


def _even_chunks(rows: int, chunk: int) -> list[slice]:
    """As few chunks as possible, of about the same size, at most `chunk` rows each."""
    count = -(-rows // chunk)
    bounds = [rows * k // count for k in range(count + 1)]
    return [slice(a, b) for a, b in pairwise(bounds)]


def _logits_to_gradient(
    logits_NV: Tensor, targets_N: Tensor, logprobs_N: Tensor, grad_N: Tensor, temperature: float, rule: LogitRule
) -> Tensor:
    """(N, V) gradient by the head's products, in the place of the logits; grad_N: (N,) by the log-probabilities.

    (onehot(target) - softmax(logits / temperature)) / temperature, times the derivative of the rule: its scale, and
    1 - (logit / c)^2 for a soft cap. fp32 as in `_score_rows`, rounded once.
    """
    dtype = torch.promote_types(logits_NV.dtype, torch.float32)
    coefficient_N = grad_N.to(dtype) * (rule.scale / temperature)
    unused_N = grad_N == 0
    shape = min(len(logits_NV), CHUNK_ROWS), logits_NV.shape[1]
    scratch, result = (torch.empty(shape, dtype=dtype, device=logits_NV.device) for _ in range(2))
    for start in range(0, len(logits_NV), CHUNK_ROWS):
        rows = slice(start, start + CHUNK_ROWS)
        logits = logits_NV[rows]
        work, gradient = scratch[: len(logits)], result[: len(logits)]
        torch.softmax(work.copy_(logits).div_(temperature), dim=-1, out=gradient)
        gradient.mul_(-coefficient_N[rows, None])
        # 1 - p from log p: for confident tokens p itself has lost the difference.
        at_target = -torch.expm1(logprobs_N[rows]) * coefficient_N[rows]
        gradient.scatter_(1, targets_N[rows, None], at_target[:, None])
        if rule.softcap is not None:
            gradient.mul_(work.copy_(logits).div_(rule.softcap).square_().neg_().add_(1.0))
        gradient.masked_fill_(unused_N[rows, None], 0.0)  # 0 * NaN is NaN: rows that nothing depends on are emptied
        logits.copy_(gradient)
    return logits_NV


# ---- Masked tokens ---------------------------------------------------------------------------------------------------


def masked_sum(x: Tensor, mask: Tensor) -> Tensor:
    """Scalar sum of x where mask is True; both of one shape, any. 0 for an empty mask."""
    return torch.where(mask.bool(), x, 0.0).sum()


def masked_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Scalar mean of x where mask is True; both of one shape, any. 0 for an empty mask."""
    return masked_sum(x, mask) / mask.bool().sum().clamp(min=1)
