"""On a GPU the packed row goes through one variable-length kernel: values and gradients as padded samples give them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from rlaif_ray.algorithm.logprobs import token_logprobs_and_entropy
from rlaif_ray.attention import PACKED
from rlaif_ray.learner.modules import CausalPolicy, Critic
from rlaif_ray.learner.packing import build_input, packed_attention, register_packed_attention
from rlaif_ray.models import load_backbone, load_causal_lm
from tests.gpu.device import DEVICE, DTYPE, gpu_model
from tests.learner_ranks import random_samples

pytestmark = pytest.mark.gpu

# Prompt lengths, and the completion lengths of each prompt's samples.
BATCHES = {
    "one_sample": random_samples([5], [[7]]),
    "one_token_each": random_samples([1], [[1]]),
    "shared_prompt": random_samples([90], [[48, 1, 33, 48]], seed=1),
    "mixed": random_samples([2, 400, 1, 11], [[1, 300], [3], [1], [8, 2, 1]], seed=2),
    "many": random_samples([60] * 16, [[48, 40]] * 16, seed=3),
}


def off(got: Tensor, want: Tensor) -> float:
    """Distance of two tensors, relative to the wanted one's length."""
    return float((got.double() - want.double()).norm() / want.double().norm().clamp(min=1e-9))


def by_hand(query: Tensor, key: Tensor, value: Tensor, batch: Any, window: int | None) -> Tensor:
    """(1, N, heads, head_dim) attention in fp32, one segment at a time, scores written out."""
    groups = query.shape[1] // key.shape[1]
    q, k, v = (t.float() for t in (query, key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)))
    pieces = []
    for s in batch.attention["packed_layout"].segments:
        seen = [*range(s.prefix_start, s.prefix_end), *range(s.start, s.end)]
        scores = q[0, :, s.start : s.end] @ k[0][:, seen].transpose(1, 2) * query.shape[-1] ** -0.5
        prefix = s.prefix_end - s.prefix_start
        back = torch.arange(prefix, len(seen), device=q.device)[:, None] - torch.arange(len(seen), device=q.device)
        hidden = (back < 0) if window is None else (back < 0) | (back >= window)
        pieces.append(scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v[0][:, seen])
    return torch.cat(pieces, 1).transpose(0, 1)[None]


@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 16])
@pytest.mark.parametrize("batch", BATCHES)
def test_kernel_equals_attention_by_hand(batch: str, window: int | None, kv_heads: int) -> None:
    laid_out = build_input(*BATCHES[batch], packed=True, device=DEVICE)
    generator = torch.Generator(device=DEVICE).manual_seed(0)

    def draw(heads: int) -> Tensor:
        shape = 1, heads, laid_out.tokens.numel(), 64
        return torch.randn(shape, generator=generator, device=DEVICE).to(DTYPE).requires_grad_()

    inputs = draw(4), draw(kv_heads), draw(kv_heads)
    weights = torch.randn(1, laid_out.tokens.numel(), 4, 64, generator=generator, device=DEVICE)
    got, _ = packed_attention(
        torch.nn.Module(), *inputs, None, packed_layout=laid_out.attention["packed_layout"], sliding_window=window
    )
    want = by_hand(*inputs, laid_out, window)
    assert got.shape == want.shape and got.dtype == DTYPE
    assert off(got, want) < 0.01
    got_gradients = torch.autograd.grad((got.float() * weights).sum(), inputs)
    want_gradients = torch.autograd.grad((want * weights).sum(), inputs)
    for name, a, b in zip("qkv", got_gradients, want_gradients, strict=True):
        if float(b.norm()) > 1e-3:  # one token alone has no choice where to look: its gradient is rounding
            assert off(a, b) < 0.02, name


def load(attention: str, *, body: bool = False, dtype: torch.dtype = DTYPE) -> Any:
    register_packed_attention()
    return (load_backbone if body else load_causal_lm)(gpu_model(), dtype=dtype, attention=attention).to(DEVICE)


def gradients(model: torch.nn.Module) -> Tensor:
    return torch.cat([p.grad.float().flatten() for p in model.parameters() if p.grad is not None])


def weights_by_token(completions: Sequence[Sequence[int]]) -> Tensor:
    """(M,) fixed weights of unlike size and sign: a token mixed up with another one changes the loss."""
    return torch.linspace(-1.0, 2.0, sum(len(c) for c in completions), device=DEVICE) ** 3


@pytest.mark.parametrize("batch", BATCHES)
def test_policy_equals_padded(batch: str) -> None:
    """Packed is as near to an fp32 model as padded sdpa in the same type is, within a factor."""
    prompts, completions = BATCHES[batch]
    weights = weights_by_token(completions)

    def through(attention: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        model = load(attention, dtype=dtype)
        laid_out = build_input(prompts, completions, packed=model.config._attn_implementation == PACKED, device=DEVICE)
        logprobs, _ = token_logprobs_and_entropy(CausalPolicy(model)(laid_out), laid_out.targets, 0.7)
        (logprobs * weights).sum().backward()
        return logprobs.detach(), gradients(model)

    exact, padded, packed = through("sdpa", torch.float32), through("sdpa", DTYPE), through(PACKED, DTYPE)
    for k, floor in ((0, 0.01), (1, 0.02)):
        assert off(packed[k], exact[k]) < 2 * off(padded[k], exact[k]) + floor


def test_critic_equals_padded() -> None:
    prompts, completions = BATCHES["mixed"]
    found = []
    for attention in ("sdpa", PACKED):
        critic = Critic(load(attention, body=True)).to(DEVICE)
        with torch.no_grad():
            critic.head.weight.copy_(torch.linspace(-0.1, 0.1, critic.head.in_features))
        values = critic(build_input(prompts, completions, packed=attention == PACKED, device=DEVICE))
        (values * weights_by_token(completions)).sum().backward()
        found.append((values.detach(), gradients(critic)))
    assert off(found[1][0], found[0][0]) < 0.03
    assert off(found[1][1], found[0][1]) < 0.05


def test_a_sample_does_not_feel_its_neighbours() -> None:
    """Other samples in the row change nothing: exactly so without them, up to the kernel's order of sums."""
    prompts, completions = BATCHES["many"]
    model = CausalPolicy(load(PACKED))
    with torch.no_grad():
        together = model(build_input(prompts, completions, packed=True, device=DEVICE))
        alone = model(build_input(prompts[:2], completions[:2], packed=True, device=DEVICE))
    assert off(together[: len(alone)], alone) < 0.01
