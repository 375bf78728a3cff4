"""Win rates by hand, by enumeration, against scipy's optimiser, and how often the intervals hold the truth."""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from scipy.optimize import minimize
from scipy.stats import norm

from rlaif_ray.evaluation.harmless import ClusteredRate
from rlaif_ray.evaluation.win_rate import (
    Alignment,
    PositionBias,
    WinRate,
    alignment,
    length_controlled,
    outcome,
    position_bias,
    win_rate,
)

NAN = float("nan")


def bounds(found: ClusteredRate) -> tuple[float, float]:
    assert found.ci95_low is not None and found.ci95_high is not None
    return found.ci95_low, found.ci95_high


def holds(found: ClusteredRate, true: float) -> bool:
    low, high = bounds(found)
    return low <= true <= high


def width(found: ClusteredRate) -> float:
    low, high = bounds(found)
    return high - low


# --- one pair -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("forward", "reverse", "verdict", "mean"),
    [
        (0.9, 0.7, 1.0, 0.8),
        (0.51, 0.6, 1.0, 0.555),
        (0.1, 0.4, 0.0, 0.25),
        (0.9, 0.2, 0.5, 0.55),  # the first shown wins twice: a tie
        (0.3, 0.9, 0.5, 0.6),
        (0.5, 0.9, 0.5, 0.7),  # undecided in one order
        (0.5, 0.1, 0.5, 0.3),
        (0.5, 0.5, 0.5, 0.5),
        (1.0, 1.0, 1.0, 1.0),
    ],
)
def test_outcome(forward: float, reverse: float, verdict: float, mean: float) -> None:
    assert outcome(forward, reverse, use_probabilities=False) == verdict
    assert outcome(forward, reverse, use_probabilities=True) == pytest.approx(mean)
    assert outcome(1 - forward, 1 - reverse, use_probabilities=False) == 1 - verdict  # B against A


@pytest.mark.parametrize("use_probabilities", [True, False])
def test_a_failure_in_one_order_is_no_outcome(use_probabilities: bool) -> None:
    assert outcome(None, 0.9, use_probabilities=use_probabilities) is None
    assert outcome(0.9, None, use_probabilities=use_probabilities) is None
    for bad in (1.1, -0.1, NAN):
        with pytest.raises(ValueError, match="p_forward"):
            outcome(0.9, bad, use_probabilities=use_probabilities)


# --- the plain win rate ---------------------------------------------------------------------------------------------


def test_win_rate_by_hand() -> None:
    # 1, 1, 1/2, 0 and 0.8 of five judged: 3.3 / 5; prompt "d" has nothing but a failure
    found = win_rate([1.0, 1.0, None, 0.5, 0.0, 0.8, None], ["a", "a", "a", "b", "b", "c", "d"])
    assert found.rate == pytest.approx(0.66)
    assert (found.n, found.prompts, found.dropped) == (5, 3, 2)
    assert (found.wins, found.ties, found.losses) == (3, 1, 1)
    assert json.loads(json.dumps(found.as_dict())) == found.as_dict()


def test_the_interval_is_that_of_all_resamples() -> None:
    # Six prompts of unequal size: all 6^6 resamples, each as likely as another. Numbers of outcomes are drawn along.
    prompts = [[1.0], [0.0, 0.0, 1.0], [0.5, 0.5, 0.0, 0.0, 0.0], [1.0, 1.0], [0.0, 0.9], [0.3, 0.6, 0.7, 0.7]]
    every = np.array(list(itertools.product(range(6), repeat=6)))
    sums, counts = np.array([sum(one) for one in prompts]), np.array([len(one) for one in prompts])
    expected = np.percentile(sums[every].sum(axis=1) / counts[every].sum(axis=1), [2.5, 97.5])
    outcomes = [value for one in prompts for value in one]
    clusters = [i for i, one in enumerate(prompts) for _ in one]
    found = win_rate(outcomes, clusters, resamples=50_000)
    assert found.rate == pytest.approx(8.2 / 17)
    assert bounds(found) == pytest.approx(expected, abs=0.005)
    means = np.percentile((sums / counts)[every].mean(axis=1), [2.5, 97.5])
    assert np.abs(means - expected).min() > 0.02  # a mean of the prompts' means is another thing
    assert win_rate(outcomes, clusters, seed=7) == win_rate(outcomes, clusters, seed=7)


@pytest.mark.parametrize(
    ("outcomes", "clusters", "expected"),
    [
        ([], [], WinRate(None, None, None, 0, 0, 0, 0, 0, 0)),
        ([None, None], ["a", "b"], WinRate(None, None, None, 0, 0, 2, 0, 0, 0)),
        ([1.0, 0.5, None], ["a", "a", "b"], WinRate(0.75, None, None, 2, 1, 1, 1, 1, 0)),
    ],
)
def test_too_few_prompts(outcomes: list[float | None], clusters: list[str], expected: WinRate) -> None:
    assert win_rate(outcomes, clusters) == expected


def test_a_against_a_is_one_half() -> None:
    found = win_rate([0.5] * 30, [i // 3 for i in range(30)])
    assert found == WinRate(0.5, 0.5, 0.5, 30, 10, 0, 0, 30, 0)


def draw(seed: int, prompts: int, samples: int, spread: float = 1.0) -> tuple[list[float], list[int]]:
    """Outcomes of one half on average; a prompt's share of wins is Beta(spread, spread)."""
    rng = np.random.default_rng(seed)
    share = rng.beta(spread, spread, size=prompts).repeat(samples)
    return (rng.random(prompts * samples) < share).astype(float).tolist(), np.arange(prompts).repeat(samples).tolist()


def test_exchanging_a_and_b_mirrors_it() -> None:
    outcomes, clusters = draw(0, prompts=40, samples=3)
    outcomes = [0.5 if i % 5 == 0 else 0.7 * o for i, o in enumerate(outcomes)]
    one, other = win_rate(outcomes, clusters), win_rate([1 - o for o in outcomes], clusters)
    assert one.rate is not None and other.rate == pytest.approx(1 - one.rate, abs=1e-12)
    assert bounds(other) == pytest.approx((1 - bounds(one)[1], 1 - bounds(one)[0]), abs=1e-12)
    assert (other.wins, other.ties, other.losses) == (one.losses, one.ties, one.wins)


def test_the_order_of_rows_does_not_matter() -> None:
    clusters = [f"prompt-{i // 3}" for i in range(120)]
    outcomes = (np.random.default_rng(1).integers(0, 1025, size=120) / 1024).tolist()  # sums without rounding
    order = np.random.default_rng(2).permutation(len(outcomes))
    assert win_rate([outcomes[i] for i in order], [clusters[i] for i in order]) == win_rate(outcomes, clusters)


def test_repeating_rows_within_a_prompt_teaches_nothing() -> None:
    outcomes, clusters = draw(3, prompts=50, samples=2)
    once = win_rate(outcomes, clusters)
    within = win_rate(outcomes * 4, clusters * 4)
    assert bounds(within) == pytest.approx(bounds(once), abs=1e-12) and within.n == 4 * once.n
    as_if_new = win_rate(outcomes * 4, [copy * 1000 + c for copy in range(4) for c in clusters])
    assert width(as_if_new) == pytest.approx(width(once) / 2, rel=0.15)  # four times the prompts


def test_intervals_hold_the_truth_with_correlated_samples() -> None:
    drawn = [draw(seed, prompts=80, samples=4, spread=0.5) for seed in range(300)]
    held = sum(holds(win_rate(o, c, resamples=1000, seed=i), 0.5) for i, (o, c) in enumerate(drawn))
    assert 0.93 * 300 <= held <= 0.985 * 300
    # Samples taken for prompts: an interval far too narrow. The check above would not let it pass.
    naive = sum(holds(win_rate(o, range(len(o)), resamples=1000, seed=i), 0.5) for i, (o, _) in enumerate(drawn))
    assert naive < 0.85 * 300


def test_many_outcomes_in_little_time() -> None:
    outcomes = np.random.default_rng(0).random(100_000).tolist()
    start = time.process_time()
    found = win_rate(outcomes, [f"prompt-{i // 2}" for i in range(100_000)])
    assert time.process_time() - start < 5
    # standard error sqrt(1 / 12 / 100000) = .000913
    assert found.prompts == 50_000 and width(found) == pytest.approx(2 * 1.96 * 0.000913, rel=0.1)


@pytest.mark.parametrize("bad", [1.5, -0.5, NAN, float("inf")])
def test_outcomes_are_shares(bad: float) -> None:
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        win_rate([0.5, bad], [0, 1])
    with pytest.raises(ValueError, match=r"\[0, 1\]"):
        length_controlled([0.5, bad], [1, 0], [1, 1], [0, 1])


def test_arguments_must_fit() -> None:
    with pytest.raises(ValueError):
        win_rate([0.5, 0.5], [0])
    with pytest.raises(ValueError, match="resamples"):
        win_rate([0.5, 0.5], [0, 1], resamples=0)
    with pytest.raises(ValueError, match="one length"):
        length_controlled([0.5, 0.5], [1, 2], [1], [0, 1])
    with pytest.raises(ValueError, match="lengths"):
        length_controlled([0.5, 0.5], [1, -2], [1, 1], [0, 1])
    with pytest.raises(ValueError):
        position_bias([0.5], [])
    with pytest.raises(ValueError):
        position_bias([0.5], [2.0])
    with pytest.raises(ValueError):
        alignment([0.5], [1.0, 0.0], ["a"])
    with pytest.raises(ValueError):
        alignment([0.5], [2.0], ["a"])


# --- at equal length ------------------------------------------------------------------------------------------------


def pairs_with_length_effect(
    seed: int, rate: float, slope: float, prompts: int = 250, samples: int = 3
) -> tuple[list[float], list[int], list[int], list[int]]:
    """P(A wins) = logistic(logit(rate) + slope (ratio - 1)); a prompt's samples share half their luck.

    Luck is the normal score of a uniform draw, so sharing it leaves each pair's probability as it is.
    """
    rng = np.random.default_rng(seed)
    n = prompts * samples
    b = rng.integers(80, 300, size=n)
    a = np.maximum(1, np.rint(b * np.exp(rng.normal(0.3, 0.5, size=n)))).astype(int)
    luck = np.sqrt(0.5) * rng.normal(size=prompts).repeat(samples) + np.sqrt(0.5) * rng.normal(size=n)
    p = 1 / (1 + np.exp(-(np.log(rate / (1 - rate)) + slope * (a / b - 1))))
    won = (norm.cdf(luck) < p).astype(float)
    return won.tolist(), a.tolist(), b.tolist(), np.arange(prompts).repeat(samples).tolist()


def by_scipy(y: Sequence[float], x: Sequence[float]) -> Any:
    def loss(theta: Any) -> float:
        logit = theta[0] + theta[1] * np.asarray(x)
        return float((np.logaddexp(0, logit) - np.asarray(y) * logit).sum())

    return minimize(loss, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-13, "maxiter": 5000}).x


@pytest.mark.parametrize("scale", ["ratio", "log_ratio"])
@pytest.mark.parametrize("fractional", [False, True])
def test_the_fit_is_that_of_an_optimiser(scale: Any, fractional: bool) -> None:
    y, a, b, clusters = pairs_with_length_effect(5, rate=0.6, slope=0.8, prompts=60)
    if fractional:
        y = (0.25 + 0.5 * np.array(y) + 0.2 * np.random.default_rng(0).random(len(y))).tolist()
    ratio = np.array(a) / np.array(b)
    intercept, slope = by_scipy(y, (ratio - 1 if scale == "ratio" else np.log(ratio)).tolist())
    found = length_controlled(y, a, b, clusters, scale=scale)
    assert found.rate == pytest.approx(1 / (1 + np.exp(-intercept)), abs=1e-6)
    assert found.slope == pytest.approx(slope, abs=1e-5) and found.slope > 0.1
    assert found.plain == pytest.approx(np.mean(y)) and found.reason is None


def test_two_ratios_by_hand() -> None:
    # Two ratios, two parameters: the fit goes through both shares. At 1: 3 of 4. At 3: 9 of 10.
    # rate = 3/4; slope = (logit .9 - logit .75) / 2 = (log 9 - log 3) / 2 = .549306
    found = length_controlled(
        [1, 1, 1, 0, *[1] * 9, 0], [100] * 4 + [300] * 10, [100] * 14, clusters=list(range(14)), scale="ratio"
    )
    assert found.rate == pytest.approx(0.75) and found.slope == pytest.approx(0.549306, abs=1e-6)
    # The intercept is the first four's logit alone, its sandwich variance sum (y - p)^2 / (n p (1 - p))^2
    # = (3 * .0625 + .5625) / (4 * .1875)^2 = 4/3, with 14 / 13 more; t(0.975, 13) = 2.160369 (table):
    # log 3 -+ 2.160369 * sqrt(1.435897) = 1.098612 -+ 2.588731, through the logistic
    assert bounds(found) == pytest.approx((0.183894, 0.975575), abs=1e-5)


def test_lengths_all_equal_leave_the_plain_rate() -> None:
    y, _, b, clusters = pairs_with_length_effect(6, rate=0.6, slope=0.8)
    found, plain = length_controlled(y, b, b, clusters), win_rate(y, clusters)
    assert plain.rate is not None
    assert found.rate == pytest.approx(plain.rate, abs=1e-9) and found.plain == pytest.approx(plain.rate)
    assert found.slope is None and found.reason is None
    assert bounds(found) == pytest.approx(bounds(plain), abs=0.006)  # a formula and a bootstrap


def test_a_against_a_is_one_half_at_every_length() -> None:
    rng = np.random.default_rng(0)
    lengths = rng.integers(10, 500, size=(2, 60)).tolist()
    found = length_controlled([0.5] * 60, *lengths, [i // 2 for i in range(60)])
    assert (found.rate, found.ci95_low, found.ci95_high, found.slope) == (0.5, 0.5, 0.5, 0.0)


def test_length_alone_is_found_out() -> None:
    y, a, b, clusters = pairs_with_length_effect(7, rate=0.5, slope=1.0)
    found = length_controlled(y, a, b, clusters)
    assert not holds(win_rate(y, clusters), 0.5) and holds(found, 0.5)
    assert found.plain is not None and found.plain > 0.6


def test_length_controlled_intervals_hold_the_truth() -> None:
    found = [length_controlled(*pairs_with_length_effect(seed, rate=0.6, slope=0.8)) for seed in range(300)]
    assert 0.93 * 300 <= sum(holds(one, 0.6) for one in found) <= 0.985 * 300
    assert np.mean([one.plain for one in found]) > 0.66  # type: ignore[arg-type]  # what it would be taken for


def test_clusters_widen_the_length_controlled_interval() -> None:
    y, a, b, clusters = pairs_with_length_effect(8, rate=0.6, slope=0.8)
    once = length_controlled(y, a, b, clusters)
    again = length_controlled(y * 4, a * 4, b * 4, clusters * 4)
    assert bounds(again) == pytest.approx(bounds(once), abs=1e-6)
    assert width(length_controlled(y, a, b, range(len(y)))) < 0.9 * width(once)


def test_exchanging_a_and_b_mirrors_the_log_ratio() -> None:
    y, a, b, clusters = pairs_with_length_effect(9, rate=0.6, slope=0.8)
    mirrored = [1 - one for one in y]
    one = length_controlled(y, a, b, clusters, scale="log_ratio")
    other = length_controlled(mirrored, b, a, clusters, scale="log_ratio")
    assert one.rate is not None and other.rate == pytest.approx(1 - one.rate, abs=1e-9)
    assert bounds(other) == pytest.approx((1 - bounds(one)[1], 1 - bounds(one)[0]), abs=1e-9)
    assert other.slope == pytest.approx(one.slope)  # of A's advantage by A's length, either way
    plain, exchanged = length_controlled(y, a, b, clusters), length_controlled(mirrored, b, a, clusters)
    assert plain.rate is not None and exchanged.rate is not None
    assert abs(1 - plain.rate - exchanged.rate) > 1e-3  # the paper's ratio is not symmetric: documented


def test_failures_and_empty_responses_are_counted_apart() -> None:
    y, a, b, clusters = pairs_with_length_effect(10, rate=0.6, slope=0.8, prompts=40)
    found = length_controlled(y, a, b, clusters)
    more = length_controlled([None, 1.0, *y, 0.0, None], [5, 0, *a, 7, 0], [5, 9, *b, 0, 9], [*"wx", *clusters, *"yz"])
    assert (more.n, more.prompts, more.dropped, more.empty) == (120, 40, 2, 2)
    # Prompts are numbered anew, so sums are rounded in another order.
    assert more.rate == pytest.approx(found.rate) and bounds(more) == pytest.approx(bounds(found))


def test_separation_is_reported_not_extrapolated() -> None:
    # A wins exactly where it is longer: any slope is too small
    found = length_controlled([1, 1, 0, 0], [200, 150, 50, 70], [100] * 4, [0, 1, 2, 3])
    assert found.rate is None and found.ci95_low is None and found.slope is None and found.plain == 0.5
    assert found.reason is not None and "separates" in found.reason
    shorter = length_controlled([0, 0, 1, 1], [200, 150, 50, 70], [100] * 4, [0, 1, 2, 3])
    assert shorter.rate is None
    # touching at one ratio only: still no finite maximum; a fractional outcome on either side makes one
    assert length_controlled([1, 1, 0, 0], [200, 100, 100, 70], [100] * 4, [0, 1, 2, 3]).rate is None
    assert length_controlled([0.9, 1, 0, 0.1], [200, 150, 50, 70], [100] * 4, [0, 1, 2, 3]).rate is not None


def test_nearly_separated_pairs_and_outliers_do_not_blow_up() -> None:
    ratios = [*range(50, 150), 100_000, 1]
    y = [float(r > 100) for r in ratios]
    y[10], y[90], y[-2] = 1.0, 0.0, 0.0
    found = length_controlled(y, ratios, [100] * len(ratios), list(range(len(ratios))))
    assert found.reason is None and found.rate is not None and found.slope is not None
    ratio = np.array(ratios) / 100 - 1
    p = 1 / (1 + np.exp(-(np.log(found.rate / (1 - found.rate)) + found.slope * ratio)))
    assert np.abs([np.sum(y - p), np.sum((y - p) * ratio)]).max() < 1e-4  # the likelihood is level there


def test_newton_does_not_overshoot() -> None:
    # Full steps run away here: one outlier among many losses.
    lengths = [1013, 1137, 1020, 1023, 958, 1093, 1048, 1024, 885, 1106, 1002, 1036, 1128, 712, 987, 1030, 1091, 1078]
    lengths += [1124, 939, 1062, 1025, 669, 1184, 11426]
    y = [0.95 if length == 712 else 3e-6 for length in lengths]
    found = length_controlled(y, lengths, [1000] * 25, range(25))
    intercept, slope = by_scipy(y, [length / 1000 - 1 for length in lengths])
    assert found.rate == pytest.approx(1 / (1 + np.exp(-intercept)), rel=1e-4)
    assert found.slope == pytest.approx(slope, rel=1e-4)


def test_what_cannot_be_told_has_a_reason() -> None:
    alike = length_controlled([1.0, 1.0, 1.0], [10, 20, 30], [10, 10, 20], [0, 1, 2])
    assert (alike.rate, alike.ci95_low, alike.plain) == (1.0, None, 1.0) and "every outcome is 1" in str(alike.reason)
    constant = length_controlled([1.0, 0.0, 1.0], [20, 40, 60], [10, 20, 30], [0, 1, 2])
    assert (
        constant.rate is None and constant.plain == pytest.approx(2 / 3) and "same length ratio" in str(constant.reason)
    )
    nothing = length_controlled([None, 1.0], [10, 0], [10, 10], [0, 1])
    assert (nothing.rate, nothing.plain, nothing.n, nothing.prompts) == (None, None, 0, 0)
    assert (nothing.dropped, nothing.empty) == (1, 1)
    one_prompt = length_controlled([1, 0, 1, 0], [10, 20, 30, 10], [10, 10, 10, 20], [0] * 4)
    assert one_prompt.rate is not None and one_prompt.ci95_low is None and one_prompt.prompts == 1


# --- position and people --------------------------------------------------------------------------------------------


def test_position_bias_by_hand() -> None:
    # first, first, first, second, A twice, B twice, undecided once, undecided twice, failed twice: 4 of 8 biased
    forward = [0.9, 0.6, 1.0, 0.2, 0.9, 0.1, 0.5, 0.5, None, 0.9]
    reverse = [0.1, 0.4, 0.0, 0.7, 0.8, 0.3, 0.1, 0.5, 0.9, None]
    assert position_bias(forward, reverse) == PositionBias(0.5, 0.75, 8, 4, 2)
    # the same judge with the orders told the other way round prefers the second
    assert position_bias(reverse, forward) == PositionBias(0.5, 0.25, 8, 4, 2)


def test_position_bias_of_nothing_and_of_a_fair_judge() -> None:
    assert position_bias([], []) == PositionBias(None, None, 0, 0, 0)
    assert position_bias([None], [0.5]) == PositionBias(None, None, 0, 0, 1)
    assert position_bias([0.9, 0.2], [0.7, 0.1]) == PositionBias(0.0, None, 2, 0, 0)


def test_alignment_by_hand() -> None:
    # as in test_calibration, right, wrong, right and half: 2.5 of 4, a label tied, a failure; "c" decides nothing
    p, label = [0.9, 0.3, 0.4, 0.5, 0.8, None], [1.0, 1.0, 0.4, 0.0, 0.5, 1.0]
    found = alignment(p, label, ["a", "a", "b", "b", "c", "a"])
    # prompts' shares 1 of 2 and 1.5 of 2: resamples 1/2, 5/8 and 3/4 in the proportions 1 : 2 : 1
    assert found == Alignment(0.625, 0.5, 0.75, 4, 2, 1, 1)
    assert alignment([0.9], [0.5], ["a"]) == Alignment(None, None, None, 0, 0, 0, 1)


def test_alignment_is_clustered() -> None:
    right, clusters = draw(11, prompts=60, samples=3)
    once = alignment(right, [1.0] * 180, clusters)
    assert once.rate == pytest.approx(np.mean(right))
    assert bounds(once) == pytest.approx(bounds(win_rate(right, clusters)))  # the same bootstrap
    assert width(alignment(right, [1.0] * 180, range(180))) < 0.85 * width(once)
