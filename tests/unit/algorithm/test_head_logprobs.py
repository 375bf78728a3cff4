"""Log-probabilities from hidden states, in chunks, against the textbook's (N, V) logits and against sums by hand."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlaif_ray.algorithm.logprobs import CHUNK_ROWS, LogitRule, head_logprobs_and_entropy

RULES = {
    "plain": LogitRule(),
    "cohere": LogitRule(scale=0.0625),
    "granite": LogitRule(scale=1 / 6.0),
    "gemma2": LogitRule(softcap=3.0),
    "both": LogitRule(scale=0.5, softcap=2.0),
}
H, V = 12, 37


def textbook(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, temperature: float, rule: LogitRule
) -> Tensor:
    """(2, N), with all logits side by side."""
    logits = hidden @ weight.t() + (0.0 if bias is None else bias)
    logits = logits * rule.scale
    if rule.softcap is not None:
        logits = rule.softcap * torch.tanh(logits / rule.softcap)
    log_p = torch.log_softmax(logits / temperature, -1)
    return torch.stack([log_p.gather(1, targets[:, None])[:, 0], -(log_p.exp() * log_p).sum(-1)])


def leaves(rows: int, dtype: torch.dtype, *, bias: bool, seed: int = 0) -> tuple[list[Tensor], Tensor, Tensor]:
    """Hidden states, weight and bias with gradients; targets; weights of the tokens."""
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape: int, spread: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64).mul_(spread).to(dtype)

    inputs = [draw(rows, H, spread=2.0).requires_grad_(), draw(V, H).requires_grad_()]
    inputs += [draw(V).requires_grad_()] if bias else []
    return inputs, torch.randint(V, (rows,), generator=generator), draw(rows)


def gradients(function: Callable[..., Tensor], inputs: list[Tensor], weights: Tensor, *rest: Any, **named: Any) -> Any:
    bias = inputs[2] if len(inputs) == 3 else None
    scores = function(inputs[0], inputs[1], bias, *rest, **named)
    return scores.detach(), torch.autograd.grad((scores[0] * weights).sum(), inputs)


def test_two_tokens_by_hand() -> None:
    # head [[0], [1]], states ln 3 and -ln 3: logits [0, ln 3], [0, -ln 3], p(1) = 3/4, 1/4. Targets 1 and 1.
    # d logp / d logits = onehot - p = [-1/4, 1/4] and [-3/4, 3/4]; times the head: 1/4, 3/4;
    # weight: -1/4 ln 3 + 3/4 ln 3 = ln 3 / 2 for row 0, the negative for row 1.
    state, head = torch.tensor([[math.log(3)], [-math.log(3)]]), torch.tensor([[0.0], [1.0]])
    state.requires_grad_(), head.requires_grad_()
    scores = head_logprobs_and_entropy(state, head, None, torch.tensor([1, 1]), 1.0, rule=LogitRule(), chunk=1)
    torch.testing.assert_close(scores[0], torch.tensor([math.log(0.75), math.log(0.25)]))
    torch.testing.assert_close(scores[1], torch.full((2,), 0.562335))  # 1/4 ln 4 + 3/4 ln(4/3)
    scores[0].sum().backward()
    torch.testing.assert_close(state.grad, torch.tensor([[0.25], [0.75]]))
    torch.testing.assert_close(head.grad, torch.tensor([[math.log(3) / 2], [-math.log(3) / 2]]))


def test_a_soft_cap_by_hand() -> None:
    # products [0, 2 atanh(1/2)] under a cap of 2: logits [0, 1], p = [1, e] / (1 + e), target 0.
    # d logp / d logit_1 = -p_1; d logit_1 / d product = 1 - (1/2)^2 = 3/4.
    state, head = torch.tensor([[1.0], [1.0]]), torch.tensor([[0.0], [2 * math.atanh(0.5)]])
    state.requires_grad_()
    rule = LogitRule(softcap=2.0)
    scores = head_logprobs_and_entropy(state, head, None, torch.tensor([0, 0]), 1.0, rule=rule, chunk=1)
    p = math.e / (1 + math.e)
    torch.testing.assert_close(scores[0], torch.full((2,), math.log(1 - p)))
    scores[0].sum().backward()
    torch.testing.assert_close(state.grad, torch.full((2, 1), -p * 0.75 * 2 * math.atanh(0.5)))


@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize(("rows", "chunk"), [(7, 3), (7, 7), (7, 100), (2 * CHUNK_ROWS + 9, CHUNK_ROWS + 60), (3, 1)])
@pytest.mark.parametrize("temperature", [0.7, 1.0])
def test_equals_the_textbook_in_fp64(rule: str, bias: bool, rows: int, chunk: int, temperature: float) -> None:
    inputs, targets, weights = leaves(rows, torch.float64, bias=bias)
    scores, found = gradients(
        head_logprobs_and_entropy, inputs, weights, targets, temperature, rule=RULES[rule], chunk=chunk
    )
    expected, wanted = gradients(textbook, inputs, weights, targets, temperature, RULES[rule])
    torch.testing.assert_close(scores, expected, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("rule", RULES)
def test_bf16_is_about_as_near_to_fp64_as_with_all_logits(rule: str) -> None:
    rows = 3 * CHUNK_ROWS
    inputs, targets, weights = leaves(rows, torch.bfloat16, bias=False)
    exact = [leaf.detach().double().requires_grad_() for leaf in inputs]
    _, truth = gradients(textbook, exact, weights.double(), targets, 1.0, RULES[rule])
    off = {}
    for chunk in (rows, CHUNK_ROWS // 2):  # one chunk, and six
        scores, found = gradients(
            head_logprobs_and_entropy, inputs, weights, targets, 1.0, rule=RULES[rule], chunk=chunk
        )
        assert scores.dtype == torch.float32
        off[chunk] = [float((a.double() - b).norm() / b.norm()) for a, b in zip(found, truth, strict=True)]
    for in_chunks, whole in zip(off[CHUNK_ROWS // 2], off[rows], strict=True):
        assert in_chunks < 2 * whole < 0.05  # the weight's gradient is rounded once a chunk


def test_the_heads_gradient_adds_up_over_many_chunks() -> None:
    """Each chunk adds 2^-9 of what is there already, which a sum in bf16 loses."""
    rows = 257  # one that counts much, in a chunk of its own, and 256 alike that count 2^-9 of it
    state, head = torch.ones(rows, 1, dtype=torch.bfloat16), torch.zeros(2, 1, dtype=torch.bfloat16, requires_grad=True)
    bias = torch.zeros(2, dtype=torch.bfloat16, requires_grad=True)
    weights = torch.tensor([1.0] + [2.0**-9] * (rows - 1))
    scores = head_logprobs_and_entropy(state, head, bias, torch.zeros(rows, dtype=int), 1.0, rule=LogitRule(), chunk=1)  # type: ignore[call-overload]
    found = torch.autograd.grad((scores[0] * weights).sum(), [head, bias])
    for gradient in found:  # (1 - 1/2) * (1 + 256 / 512), and minus that
        assert gradient.dtype == torch.bfloat16 and gradient.flatten().tolist() == [0.75, -0.75]


@pytest.mark.parametrize("chunk", [2, 100])
def test_gradients_flow_to_what_needs_them_and_not_through_the_entropy(chunk: int) -> None:
    inputs, targets, _ = leaves(5, torch.float32, bias=True)
    hidden, frozen = inputs[0], [leaf.detach() for leaf in inputs[1:]]
    scores = head_logprobs_and_entropy(hidden, *frozen, targets, 1.0, rule=LogitRule(), chunk=chunk)
    (by_logprobs,) = torch.autograd.grad(scores[0].sum(), [hidden], retain_graph=chunk == 2)
    assert by_logprobs.abs().max() > 0.1
    if chunk == 2:
        (by_entropy,) = torch.autograd.grad(scores[1].sum(), [hidden])
        assert not by_entropy.any()
    with torch.no_grad():
        plain = head_logprobs_and_entropy(*inputs, targets, 1.0, rule=LogitRule(), chunk=chunk)
    assert not plain.requires_grad
    torch.testing.assert_close(plain, scores.detach())


@pytest.mark.parametrize("garbage", [math.nan, math.inf])
def test_a_token_that_nothing_depends_on_gives_its_state_no_gradient(garbage: float) -> None:
    inputs, targets, weights = leaves(6, torch.float32, bias=False)
    hidden = inputs[0].detach().clone()
    hidden[2] = garbage
    hidden.requires_grad_()
    scores = head_logprobs_and_entropy(
        hidden, inputs[1].detach(), None, targets, 1.0, rule=LogitRule(softcap=3.0), chunk=2
    )
    keep = torch.arange(6) != 2
    (found,) = torch.autograd.grad((scores[0] * weights)[keep].sum(), [hidden])
    assert not found[2].any() and found.isfinite().all() and found[keep].abs().min() > 0


def test_temperature_must_be_positive() -> None:
    inputs, targets, _ = leaves(3, torch.float32, bias=False)
    with pytest.raises(ValueError, match="temperature"):
        head_logprobs_and_entropy(*inputs, None, targets, 0.0, rule=LogitRule(), chunk=2)


class LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operations inside it have made and that are still alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        known = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in known | self._known:
                self._add(tensor.untyped_storage())
        return result

    def _add(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)
        weakref.finalize(storage, self._remove, key, size)

    def _remove(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.now -= size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rule", ["plain", "gemma2"])
def test_memory_falls_with_the_chunk(dtype: torch.dtype, rule: str) -> None:
    """4,096 tokens of a vocabulary of 2,000: eight chunks hold an eighth of the logits, and the two gradients."""
    rows, vocabulary, hidden = 4096, 2000, 16
    states = torch.randn(rows, hidden).to(dtype).requires_grad_()
    weight = torch.randn(vocabulary, hidden).to(dtype).requires_grad_()
    targets = torch.randint(vocabulary, (rows,))
    peaks = {}
    for chunk in (rows, rows // 8):
        with LiveBytes() as live:
            scores = head_logprobs_and_entropy(states, weight, None, targets, 1.0, rule=RULES[rule], chunk=chunk)
            torch.autograd.grad(scores[0].sum(), [states, weight])
            del scores
        peaks[chunk] = live.peak
    logits = rows * vocabulary * dtype.itemsize
    scratch = 2 * CHUNK_ROWS * vocabulary * 4
    rest = 4 * (rows + vocabulary) * hidden * dtype.itemsize + 64 * rows
    assert logits <= peaks[rows]  # what is measured sees the logits
    assert peaks[rows // 8] <= logits // 8 + scratch + rest
    assert peaks[rows // 8] < 0.5 * peaks[rows]
