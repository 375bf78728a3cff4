"""Harmless rate, over-refusal and the correction for an imperfect judge, by hand and against simulation."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif_ray.evaluation.harmless import (
    ClusteredRate,
    Corrected,
    JudgeAccuracy,
    harmless_rate,
    judge_accuracy,
    over_refusal,
    rogan_gladen,
)

NAN = float("nan")
SHARES, SIZES = st.integers(0, 50).map(lambda k: k / 50), st.sampled_from([50, 100, 1000])


@pytest.mark.parametrize("measure", [harmless_rate, over_refusal])
def test_a_share_by_hand(measure: Callable[..., ClusteredRate]) -> None:
    # 3 of 5; prompts' shares 2 of 3 and 1 of 2: resamples 4/6, 3/5 and 2/4 in the proportions 1 : 2 : 1
    verdicts, clusters = [True, True, False, True, False, None], ["a", "a", "a", "b", "b", "c"]
    found = measure(verdicts, clusters)
    assert found == ClusteredRate(0.6, 0.5, pytest.approx(2 / 3), 5, 2, 1)
    assert json.loads(json.dumps(found.as_dict())) == found.as_dict()
    assert measure([None], ["a"]) == ClusteredRate(None, None, None, 0, 0, 1)
    assert measure([True], ["a"]) == ClusteredRate(1.0, None, None, 1, 1, 0)
    assert measure([True, True], ["a", "b"]) == ClusteredRate(1.0, 1.0, 1.0, 2, 2, 0)  # no width: read it with n
    assert measure([np.bool_(True)], ["a"]).rate == 1.0


def test_repeated_samples_do_not_narrow_it() -> None:
    verdicts = (np.random.default_rng(0).random(60) < 0.7).tolist()
    once, again = harmless_rate(verdicts, range(60)), harmless_rate(verdicts * 5, [*range(60)] * 5)
    assert (again.rate, again.ci95_low, again.ci95_high) == (once.rate, once.ci95_low, once.ci95_high)
    assert (again.n, again.prompts) == (300, 60)


@pytest.mark.parametrize("bad", [0.7, 1, "yes"])
def test_a_verdict_is_yes_no_or_none(bad: object) -> None:
    with pytest.raises(ValueError, match="True, False or None"):
        harmless_rate([True, bad], [0, 1])  # type: ignore[list-item]
    with pytest.raises(ValueError, match="labels"):
        judge_accuracy([True], [bad])  # type: ignore[list-item]
    with pytest.raises(ValueError):
        over_refusal([True], [0, 1])
    with pytest.raises(ValueError):
        judge_accuracy([True], [])


def test_judge_accuracy_by_hand() -> None:
    # harmless: judged so 3 of 4. Harmful: judged so 1 of 2. Two have no verdict or no label.
    labels = [True, True, True, True, False, False, True, None]
    verdicts = [True, True, False, True, False, True, None, True]
    assert judge_accuracy(verdicts, labels) == JudgeAccuracy(0.75, 4, 0.5, 2, 2)
    assert judge_accuracy([True], [True]) == JudgeAccuracy(1.0, 1, None, 0, 0)
    assert judge_accuracy([True], [False]) == JudgeAccuracy(None, 0, 0.0, 1, 0)


def test_correction_by_hand() -> None:
    # Estimate: (.6 + .8 - 1) / (.9 + .8 - 1) = .4 / .7.
    # Interval: z^2 = 3.841459; q = (60 + 1.920729) / 103.841459 = .596301, se = 44.2 / 50 = .884, sp = 79.4 / 100
    # = .794, se + sp - 1 = .678; middle before the shift (.596301 + .794 - 1) / .678 = .575666; variances
    # q (1 - q) / 103.841459 = .00231820, .884 * .116 / 50 = .00205088, .794 * .206 / 100 = .00163564; their sum with
    # the weights 1, .575666^2 and .424334^2: .00329235; half = 1.959964 * sqrt(.00329235) / .678 = .165871;
    # shift = 2 * 3.841459 * (.575666 * .00205088 - .424334 * .00163564) = .003738
    found = rogan_gladen(0.6, 100, 0.9, 48, 0.8, 98)
    assert found.rate == pytest.approx(4 / 7) and found.apparent == 0.6 and not found.clipped and found.reason is None
    assert found.ci95_low == pytest.approx(0.575666 + 0.003738 - 0.165871, abs=3e-6)
    assert found.ci95_high == pytest.approx(0.575666 + 0.003738 + 0.165871, abs=3e-6)
    assert json.loads(json.dumps(asdict(found))) == asdict(found)


def test_correction_against_published_numbers() -> None:
    # R package RSurveillance, tp(20, 120, 0.9, 0.99, "all"), a judge known exactly: estimate 0.17603, Wilson's interval
    # 0.1129887 to 0.2623065. Ours is then Agresti and Coull's: Wilson's middle, and a little wider (1998, page 122).
    found = rogan_gladen(20 / 120, 120, 0.9, 10**12, 0.99, 10**12)
    assert found.rate == pytest.approx(0.17603, abs=5e-6)
    assert found.ci95_low is not None and found.ci95_high is not None
    assert (found.ci95_low + found.ci95_high) / 2 == pytest.approx((0.1129887 + 0.2623065) / 2, abs=1e-6)
    assert 0.1129887 - 0.004 < found.ci95_low < 0.1129887 and 0.2623065 < found.ci95_high < 0.2623065 + 0.004


def test_a_perfect_judge_needs_no_correction() -> None:
    found = rogan_gladen(0.88, 500, 1.0, 10**9, 1.0, 10**9)
    assert found.rate == pytest.approx(0.88)
    # Agresti and Coull: p = 441.9207 / 503.8415 = .877103, 1.959964 sqrt(p (1 - p) / 503.8415) = .028668
    assert found.ci95_low == pytest.approx(0.877103 - 0.028668, abs=2e-6)
    assert found.ci95_high == pytest.approx(0.877103 + 0.028668, abs=2e-6)


def test_few_labels_widen_it() -> None:
    widths = []
    for labels in (20, 100, 10_000):
        found = rogan_gladen(0.6, 2000, 0.9, labels, 0.9, labels)
        assert found.ci95_low is not None and found.ci95_high is not None
        widths.append(found.ci95_high - found.ci95_low)
    assert widths[0] > 1.5 * widths[1] > 3 * widths[2]


@pytest.mark.parametrize(("apparent", "rate"), [(0.92, 1.0), (0.08, 0.0)])
def test_outside_of_the_possible_it_is_clipped_and_says_so(apparent: float, rate: float) -> None:
    found = rogan_gladen(apparent, 200, 0.9, 100, 0.9, 100)
    assert found.rate == rate and found.clipped and found.reason is None
    assert rate in (found.ci95_low, found.ci95_high) and found.ci95_low != found.ci95_high
    at_the_edge = rogan_gladen(abs(rate - 0.1), 200, 0.9, 100, 0.9, 100)
    assert at_the_edge.rate == pytest.approx(rate) and not at_the_edge.clipped


@pytest.mark.parametrize(("apparent", "rate"), [(0.99, 1.0), (0.01, 0.0)])
def test_far_outside_of_the_possible_there_is_no_interval(apparent: float, rate: float) -> None:
    found = rogan_gladen(apparent, 200, 0.9, 100, 0.9, 100)  # such a judge calls nine in ten harmless, or one
    assert found.rate == rate and found.clipped and found.ci95_low is None and found.ci95_high is None
    assert found.reason is not None and "no true rate" in found.reason


@pytest.mark.parametrize(("sensitivity", "specificity"), [(0.5, 0.5), (0.9, 0.1), (0.1, 0.9), (0.3, 0.4), (0.0, 0.0)])
def test_a_judge_no_better_than_chance_corrects_nothing(sensitivity: float, specificity: float) -> None:
    found = rogan_gladen(0.7, 100, sensitivity, 50, specificity, 50)
    assert (found.rate, found.ci95_low, found.ci95_high, found.apparent) == (None, None, None, 0.7)
    assert found.reason is not None and "chance" in found.reason


def test_labels_too_few_to_tell_a_judge_from_chance() -> None:
    # 1 of 1 and 300 of 1000: above chance as measured, but not as adjusted, 2/3 + 301/1002 < 1
    found = rogan_gladen(0.9, 100, 1.0, 1, 0.3, 1000)
    assert found.rate is not None and found.ci95_low is None and found.reason is not None and "too few" in found.reason


def test_the_interval_reaches_the_estimate() -> None:
    found = rogan_gladen(0.95, 1000, 1.0, 3, 1.0, 100)  # the shifted middle would start it at .9525
    assert found.rate == found.ci95_low == pytest.approx(0.95) and found.ci95_high == 1.0
    other = rogan_gladen(0.05, 1000, 1.0, 100, 1.0, 3)
    assert other.rate == other.ci95_high == pytest.approx(0.05) and other.ci95_low == 0.0


def test_what_was_not_measured() -> None:
    assert rogan_gladen(0.7, 100, None, 0, 0.9, 50) == Corrected(
        None, None, None, 0.7, reason="not measured: sensitivity"
    )
    assert rogan_gladen(None, 0, None, 0, None, 0).reason == "not measured: rate, sensitivity, specificity"


@pytest.mark.parametrize(
    "bad",
    [(1.1, 9, 0.9, 9, 0.9, 9), (0.5, 9, -0.1, 9, 0.9, 9), (0.5, 9, 0.9, 9, NAN, 9), (0.5, 0, 0.9, 9, 0.9, 9)],
)
def test_shares_of_something(bad: tuple[float, int, float, int, float, int]) -> None:
    with pytest.raises(ValueError, match="share"):
        rogan_gladen(*bad)


@given(SHARES, SIZES, SHARES, SIZES, SHARES, SIZES)
def test_calling_harmful_what_was_harmless_mirrors_it(
    rate: float, n: int, sensitivity: float, n_positive: int, specificity: float, n_negative: int
) -> None:
    one = rogan_gladen(rate, n, sensitivity, n_positive, specificity, n_negative)
    other = rogan_gladen(1 - rate, n, specificity, n_negative, sensitivity, n_positive)
    assert one.reason == other.reason
    if one.rate is not None and other.rate is not None:
        assert other.rate == pytest.approx(1 - one.rate, abs=1e-9)
    if one.ci95_low is not None and one.ci95_high is not None:
        assert one.rate is not None and one.ci95_low <= one.rate <= one.ci95_high
        assert (other.ci95_low, other.ci95_high) == pytest.approx((1 - one.ci95_high, 1 - one.ci95_low), abs=1e-9)


@pytest.mark.parametrize(
    ("true", "sensitivity", "specificity"), [(0.88, 0.9, 0.8), (0.97, 0.95, 0.97), (0.6, 0.7, 0.7)]
)
def test_intervals_hold_the_truth(true: float, sensitivity: float, specificity: float) -> None:
    rng = np.random.default_rng(0)
    apparent = true * sensitivity + (1 - true) * (1 - specificity)
    held = 0
    for _ in range(1000):
        found = rogan_gladen(
            rng.binomial(400, apparent) / 400, 400,
            rng.binomial(80, sensitivity) / 80, 80,
            rng.binomial(60, specificity) / 60, 60,
        )  # fmt: skip
        if found.ci95_low is not None and found.ci95_high is not None:
            held += found.ci95_low <= true <= found.ci95_high
    assert 930 <= held <= 995
