"""Which of several readings differs, by hand-set numbers."""

from __future__ import annotations

import math

import pytest

from rlaif_ray.pipelines.agreement import BF16_GAP, FP32_GAP, FP32_GPU_GAP, Bound, bound_for, compare

A = [-1.0, -2.0, -3.0, -4.0]
FP32 = bound_for("fp32", None)


def shifted(by: float, token: int = 2) -> list[float]:
    return [value + (by if i == token else 0.0) for i, value in enumerate(A)]


@pytest.mark.parametrize("odd", ["engine", "packed", "alone"])
@pytest.mark.parametrize("gap", [0.0011, -2.3, math.nan, -math.inf])
def test_the_odd_one_is_named(odd: str, gap: float) -> None:
    readings = dict.fromkeys(("engine", "packed", "alone"), shifted(1e-5)) | {odd: shifted(gap)}
    comparison = compare(readings, FP32)
    assert not comparison.agrees
    assert comparison.odd == odd
    assert (
        math.isnan(comparison.worst) if not math.isfinite(gap) else comparison.worst == pytest.approx(abs(gap - 1e-5))
    )


def test_what_agrees_has_no_odd_one() -> None:
    comparison = compare({"engine": shifted(9e-4), "packed": A, "alone": A}, FP32)
    assert comparison.agrees and comparison.odd is None
    assert comparison.gaps == {
        ("engine", "packed"): pytest.approx(9e-4),
        ("engine", "alone"): pytest.approx(9e-4),
        ("packed", "alone"): 0.0,
    }


def test_where_all_differ_nobody_is_blamed() -> None:
    comparison = compare({"engine": shifted(1.0), "packed": shifted(-1.0), "alone": A}, FP32)
    assert not comparison.agrees and comparison.odd is None and comparison.worst == pytest.approx(2.0)
    # Two of them are in doubt: the third is near to both.
    comparison = compare({"engine": shifted(8e-4), "packed": shifted(-8e-4), "alone": A}, FP32)
    assert not comparison.agrees and comparison.odd is None


def test_of_two_the_first_is_measured_by_the_second() -> None:
    assert compare({"packed": shifted(1.0), "alone": A}, FP32).odd == "packed"
    assert compare({"packed": A, "alone": A}, FP32).odd is None


def test_bounds_are_of_the_precision() -> None:
    assert bound_for("fp32", None) == Bound(FP32_GAP, "worst")
    assert bound_for("bf16", None) == Bound(BF16_GAP, "mean")
    assert bound_for("bf16", 0.5) == Bound(0.5, "mean")
    # In bf16 one token may be far off by rounding; in fp32 none may.
    one_token = {"engine": shifted(0.3), "alone": A}
    assert compare(one_token, bound_for("bf16", None)).agrees
    assert not compare(one_token, FP32).agrees
    assert not compare({"engine": shifted(math.nan), "alone": A}, bound_for("bf16", None)).agrees


def test_in_fp32_one_token_may_be_off_where_routing_or_tf32_says_so() -> None:
    """A near tie between two experts moves a token by 1e-2; a dense model on CPUs has nothing that could."""
    experts = bound_for("fp32", None, experts=True)
    assert experts == Bound(FP32_GAP, "mean") and bound_for("fp32", 0.5, experts=True) == Bound(0.5, "mean")
    text = [-float(i % 5) for i in range(60)]
    tie = {"engine": [x + (0.02 if i == 7 else 1e-5) for i, x in enumerate(text)], "alone": text}
    assert compare(tie, experts).agrees
    assert not compare(tie, FP32).agrees
    # What is wrong everywhere, by however little, is not let pass, nor is one token that is wrong by nats.
    for by in (dict.fromkeys(range(60), 0.002), {7: 2.3}):
        wrong = {"engine": [x + by.get(i, 0.0) for i, x in enumerate(text)], "alone": text}
        assert not compare(wrong, experts).agrees
    for mixture in (False, True):
        assert bound_for("fp32", None, device="cuda", experts=mixture) == Bound(FP32_GPU_GAP, "mean")
        assert bound_for("bf16", None, device="cuda", experts=mixture) == Bound(BF16_GAP, "mean")
    # TF32 keeps 10 bits of a fraction and bf16 7: an eighth of its rounding.
    assert pytest.approx(BF16_GAP / 2 ** (10 - 7), rel=0.1) == FP32_GPU_GAP
