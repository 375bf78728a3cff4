"""KL estimators and the adaptive coefficient, by hand and by enumeration."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from rlaif_ray.algorithm.kl import KLKind, adaptive_kl_coef, kl_estimate
from rlaif_ray.algorithm.logprobs import masked_mean

NAN, INF = float("nan"), float("inf")
KINDS: tuple[KLKind, ...] = ("k1", "k2", "k3")


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # logp = ln .5, ref = ln .25 -> d = ln 2;   logp = ln .25, ref = ln .5 -> d = -ln 2;   equal -> d = 0
        ("k1", [0.693147, -0.693147, 0.0]),  # d
        ("k2", [0.240227, 0.240227, 0.0]),  # (ln 2)^2 / 2
        ("k3", [0.193147, 0.306853, 0.0]),  # 1/2 - 1 + ln 2  and  2 - 1 - ln 2
    ],
)
def test_hand_computed(kind: KLKind, expected: list[float]) -> None:
    logprobs = torch.tensor([0.5, 0.25, 0.3]).log()
    ref = torch.tensor([0.25, 0.5, 0.3]).log()
    torch.testing.assert_close(kl_estimate(logprobs, ref, kind), torch.tensor(expected), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # d = ln 2: d k1 = 1;  d k2 = d = ln 2;  d k3 = 1 - exp(-d) = 1 - 1/2
        ("k1", 1.0),
        ("k2", 0.693147),
        ("k3", 0.5),
    ],
)
def test_hand_computed_gradient(kind: KLKind, expected: float) -> None:
    logprobs = torch.tensor([math.log(0.5)], requires_grad=True)
    kl_estimate(logprobs, torch.tensor([math.log(0.25)]), kind).sum().backward()
    assert logprobs.grad is not None and logprobs.grad.item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_gradcheck(kind: KLKind) -> None:
    torch.manual_seed(0)
    inputs = [torch.randn(4, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    assert torch.autograd.gradcheck(lambda a, b: kl_estimate(a, b, kind), inputs)


@pytest.mark.parametrize(("kind", "unbiased"), [("k1", True), ("k3", True), ("k2", False)])
def test_expectation_over_a_whole_categorical(kind: KLKind, unbiased: bool) -> None:
    p = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    q = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    # KL = .5 ln 2.5 + .3 ln 1 + .2 ln 0.4 = .458145 - .183258 = 0.274887
    expectation = (p * kl_estimate(p.log(), q.log(), kind)).sum().item()
    assert (expectation == pytest.approx(0.274887, abs=1e-6)) is unbiased


def test_k3_is_never_meaningfully_negative_near_zero() -> None:
    # k3 = d^2/2 - d^3/6 + ...: at d = 1e-3 it is 4.998e-7, where exp(-d) - 1 + d in fp32 has no digits left.
    d = torch.tensor([1e-3, -1e-3])
    expected = torch.tensor([4.998e-7, 5.002e-7])
    torch.testing.assert_close(kl_estimate(d, torch.zeros(2), "k3"), expected, rtol=1e-3, atol=0.0)


def test_extremes_are_clamped_with_no_gradient_beyond() -> None:
    # d = 100, -100, inf -> 20, -20, 20; k3(-20) = e^20 - 1 - 20 = 485165174.4
    logprobs = torch.tensor([100.0, -100.0, 0.0], requires_grad=True)
    ref = torch.tensor([0.0, 0.0, -INF])
    assert kl_estimate(logprobs, ref, "k1").tolist() == [20.0, -20.0, 20.0]
    k3 = kl_estimate(logprobs, ref, "k3")
    assert k3[1].item() == pytest.approx(485165174.4, rel=1e-6)
    k3.sum().backward()
    assert logprobs.grad is not None and logprobs.grad.tolist() == [0.0, 0.0, 0.0]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("garbage", [NAN, INF, -INF])
def test_masked_garbage_changes_neither_values_nor_gradients(kind: KLKind, garbage: float) -> None:
    logprobs = torch.tensor([[-1.0, -2.0, garbage]], requires_grad=True)
    ref = torch.tensor([[-1.5, -1.0, garbage]], requires_grad=True)
    short, short_ref = (x.detach()[:, :2].clone().requires_grad_() for x in (logprobs, ref))
    padded = masked_mean(kl_estimate(logprobs, ref, kind), torch.tensor([[True, True, False]]))
    plain = kl_estimate(short, short_ref, kind).mean()
    padded.backward()
    plain.backward()
    torch.testing.assert_close(padded, plain)
    for long, brief in ((logprobs, short), (ref, short_ref)):
        assert long.grad is not None and brief.grad is not None
        torch.testing.assert_close(long.grad[:, :2], brief.grad)
        assert long.grad[0, 2] == 0.0


def test_a_nan_on_a_real_token_shows() -> None:
    assert kl_estimate(torch.tensor([NAN]), torch.tensor([-1.0]), "k3").isnan().all()


def test_unknown_kind() -> None:
    bad: Any = "k4"
    with pytest.raises(ValueError, match="k4"):
        kl_estimate(torch.zeros(1), torch.zeros(1), bad)


@pytest.mark.parametrize(
    ("kl", "expected"),
    [
        (6.0, 0.2),  # on target: e = 0
        (6.6, 0.20064),  # e = 0.1: 0.2 * (1 + 0.1 * 320 / 10000) = 0.2 * 1.0032
        (5.4, 0.19936),  # e = -0.1: 0.2 * 0.9968
        (60.0, 0.20128),  # e = 9 -> 0.2: 0.2 * (1 + 0.2 * 0.032) = 0.2 * 1.0064
        (-3.0, 0.19872),  # e = -1.5 -> -0.2: 0.2 * 0.9936
    ],
)
def test_adaptive_coefficient_by_hand(kl: float, expected: float) -> None:
    assert adaptive_kl_coef(0.2, kl, target=6.0, samples=320, horizon=10_000) == pytest.approx(expected, rel=1e-9)
