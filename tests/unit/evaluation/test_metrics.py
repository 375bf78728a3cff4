"""Means, intervals and paired gains, by hand and against simulation."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlaif_ray.evaluation.metrics import Interval, cluster_means, mean_interval, paired_gain

VALUES = st.lists(st.one_of(st.none(), st.floats(-1, 1)), max_size=20)


def assert_interval(interval: Interval, mean: float, low: float, high: float, n: int, dropped: int = 0) -> None:
    assert interval.as_dict() == {
        "mean": pytest.approx(mean, abs=1e-6),
        "ci95_low": pytest.approx(low, abs=1e-5),
        "ci95_high": pytest.approx(high, abs=1e-5),
        "n": n,
        "dropped": dropped,
    }


def test_mean_by_hand() -> None:
    # mean 3, s^2 = (4 + 1 + 0 + 1 + 4) / 4 = 2.5, s / sqrt(5) = sqrt(0.5) = .707107; t(0.975, 4) = 2.776445 (table)
    assert_interval(mean_interval([1, 2, 3, 4, 5]), 3, 3 - 1.963243, 3 + 1.963243, n=5)


def test_mean_of_two_by_hand() -> None:
    # mean 0.5, s^2 = 0.5, s / sqrt(2) = 0.5; t(0.975, 1) = 12.706205 (table): two values say little
    assert_interval(mean_interval([0, 1]), 0.5, 0.5 - 6.353102, 0.5 + 6.353102, n=2)


def test_failures_are_left_out_and_counted() -> None:
    assert mean_interval([None, 1, 2, 3, None, 4, 5, None]) == Interval(
        **{**mean_interval([1, 2, 3, 4, 5]).as_dict(), "dropped": 3}  # type: ignore[arg-type]
    )


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ([], Interval(None, None, None, 0, 0)),
        ([None, None], Interval(None, None, None, 0, 2)),
        ([0.25], Interval(0.25, None, None, 1, 0)),
        ([0.25, None], Interval(0.25, None, None, 1, 1)),
        ([0.25, 0.25, 0.25], Interval(0.25, 0.25, 0.25, 3, 0)),
    ],
)
def test_too_few_values_and_no_spread(values: list[float | None], expected: Interval) -> None:
    assert mean_interval(values) == expected


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_broken_number_is_no_failure_to_measure(bad: float) -> None:
    with pytest.raises(ValueError, match="finite"):
        mean_interval([0.5, bad])


def test_paired_gain_by_hand() -> None:
    # gains 0.2, 0.4, 0.3: mean 0.3, s^2 = (0.01 + 0.01) / 2, s / sqrt(3) = 0.1 / 1.732051 = .0577350;
    # t(0.975, 2) = 4.302653 (table). The values themselves spread from -0.9 to 1: unpaired, nothing would show.
    gain = paired_gain([-0.9, 0.5, 0.7], [-0.7, 0.9, 1.0])
    assert_interval(gain, 0.3, 0.3 - 0.248414, 0.3 + 0.248414, n=3)


def test_pairs_with_a_failure_are_dropped_whole() -> None:
    gain = paired_gain([-0.9, None, 0.5, 0.1, 0.7, None], [-0.7, 0.3, 0.9, None, 1.0, None])
    assert_interval(gain, 0.3, 0.3 - 0.248414, 0.3 + 0.248414, n=3, dropped=3)


def test_pairs_must_match() -> None:
    with pytest.raises(ValueError):
        paired_gain([1, 2], [1, 2, 3])


@given(VALUES)
def test_no_change_is_no_gain(values: list[float | None]) -> None:
    gain = paired_gain(values, values)
    assert gain.n + gain.dropped == len(values)
    assert gain.mean in (0, None) and gain.ci95_low in (0, None) and gain.ci95_high in (0, None)


@given(st.lists(st.tuples(st.floats(-1, 1), st.floats(-1, 1)), min_size=2, max_size=20))
def test_the_gain_is_the_difference_of_the_means(pairs: list[tuple[float, float]]) -> None:
    before, after = [b for b, _ in pairs], [a for _, a in pairs]
    gain, old, new = paired_gain(before, after), mean_interval(before), mean_interval(after)
    assert gain.mean is not None and old.mean is not None and new.mean is not None
    assert gain.mean == pytest.approx(new.mean - old.mean, abs=1e-12)
    assert gain.ci95_low is not None and gain.ci95_high is not None
    assert gain.ci95_low <= gain.mean <= gain.ci95_high


def test_95_of_100_intervals_hold_the_true_mean() -> None:
    draws = np.random.default_rng(0).normal(0.3, 1.0, size=(2000, 6))
    intervals = [mean_interval(row.tolist()) for row in draws]
    held = sum(i.ci95_low <= 0.3 <= i.ci95_high for i in intervals)  # type: ignore[operator]
    assert (
        abs(held - 1900) < 4 * 9.75
    )  # sqrt(2000 * 0.95 * 0.05) = 9.75; the normal distribution's 1.96 would hold 1785


def test_cluster_means() -> None:
    means = cluster_means([1.0, 0.0, None, 0.5, None, None], ["b", "a", "b", "b", "a", "c"])
    assert means == {"b": 0.75, "a": 0.0, "c": None}
    assert list(means) == ["b", "a", "c"]
    assert mean_interval(means.values()).n == 2 and mean_interval(means.values()).dropped == 1
    with pytest.raises(ValueError):
        cluster_means([1.0], ["a", "b"])


def test_samples_of_one_prompt_do_not_count_as_many() -> None:
    values, groups = [0.0] * 50 + [1.0] * 50, [0] * 50 + [1] * 50
    assert mean_interval(values).n == 100
    assert_interval(mean_interval(cluster_means(values, groups).values()), 0.5, 0.5 - 6.353102, 0.5 + 6.353102, n=2)


def test_as_dict_goes_into_json() -> None:
    interval = mean_interval(np.array([0.5, 1.0]).tolist())
    assert json.loads(json.dumps(interval.as_dict())) == interval.as_dict()
    assert list(interval.as_dict()) == ["mean", "ci95_low", "ci95_high", "n", "dropped"]
