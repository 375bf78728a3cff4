"""Accuracy, Brier score, calibration error and agreement by hand, and what they must not depend on."""

from __future__ import annotations

import random

import pytest

from rlaif_ray.evaluation.calibration import Accuracy, brier, cohen_kappa, expected_calibration_error, pairwise_accuracy

NAN = float("nan")


def test_accuracy_by_hand() -> None:
    # right, wrong, right (a majority of .6 counts), half (p = .5); the label .5 is no side's: (1 + 0 + 1 + .5) / 4
    assert pairwise_accuracy([0.9, 0.3, 0.4, 0.5, 0.8], [1.0, 1.0, 0.4, 0.0, 0.5]) == Accuracy(0.625, 4, 1)


def test_accuracy_of_ties_only_is_unknown() -> None:
    assert pairwise_accuracy([0.9, 0.1], [0.5, 0.5]) == Accuracy(None, 0, 2)
    assert pairwise_accuracy([], []) == Accuracy(None, 0, 0)


def test_brier_by_hand() -> None:
    # (.1^2 + .7^2 + .25^2) / 3 = (.01 + .49 + .0625) / 3 = .1875
    assert brier([0.9, 0.3, 0.5], [1.0, 1.0, 0.25]) == pytest.approx(0.1875)
    assert brier([0.2, 1.0], [0.2, 1.0]) == 0.0
    assert brier([], []) is None


def test_calibration_error_by_hand() -> None:
    # four bins: [.25, .5) has .3 and .4, mean .35, labels 1 and 0, mean .5: off by .15, half of the values
    #            [.75, 1]  has .8 and 1., mean .9,  labels 1 and 1, mean 1: off by .10, half of the values
    found = expected_calibration_error([0.3, 0.4, 0.8, 1.0], [1.0, 0.0, 1.0, 1.0], bins=4)
    assert found.value == pytest.approx(0.5 * 0.15 + 0.5 * 0.10)
    assert [(b.low, b.high, b.n) for b in found.curve] == [(0, 0.25, 0), (0.25, 0.5, 2), (0.5, 0.75, 0), (0.75, 1, 2)]
    assert [b.mean_p for b in found.curve] == pytest.approx([None, 0.35, None, 0.9])
    assert [b.mean_label for b in found.curve] == pytest.approx([None, 0.5, None, 1.0])
    assert found.rows()[1] == {"low": 0.25, "high": 0.5, "n": 2, "mean_p": pytest.approx(0.35), "mean_label": 0.5}


def test_errors_in_opposite_directions_do_not_cancel_between_bins() -> None:
    # .25 where 0 of 2 are, .75 where 2 of 2 are: the means over everything agree, each bin is off by .25
    assert expected_calibration_error([0.25, 0.25, 0.75, 0.75], [0.0, 0.0, 1.0, 1.0]).value == pytest.approx(0.25)


@pytest.mark.parametrize("bins", [3, 7, 10, 20, 100])
def test_a_bin_holds_its_lower_bound_and_the_last_one_both(bins: int) -> None:
    bounds = [k / bins for k in range(bins + 1)]
    curve = expected_calibration_error(bounds, [0.0] * len(bounds), bins=bins).curve
    assert [b.n for b in curve] == [1] * (bins - 1) + [2]
    assert all(b.mean_p is not None and b.low <= b.mean_p <= b.high for b in curve)


def test_probabilities_that_are_the_labels_shares_are_calibrated() -> None:
    # of those called .2 one in five, of those called .7 seven in ten
    p = [0.2] * 5 + [0.7] * 10
    assert expected_calibration_error(p, [1, 0, 0, 0, 0, *[1] * 7, *[0] * 3]).value == pytest.approx(0.0, abs=1e-12)
    assert expected_calibration_error([], []).value is None


def test_kappa_by_hand() -> None:
    # both a 20, only the first a 5, only the second a 10, both b 15 (of 50):
    # observed .7; chance .5 * .6 + .5 * .4 = .5; (.7 - .5) / .5 = .4
    p = [0.9] * 20 + [0.8] * 5 + [0.2] * 10 + [0.1] * 15
    label = [1.0] * 20 + [0.0] * 5 + [1.0] * 10 + [0.0] * 15
    assert cohen_kappa(p, label) == pytest.approx(0.4)
    assert cohen_kappa([*p, 0.5, 0.9], [*label, 1.0, 0.5]) == pytest.approx(0.4)  # undecided ones are left out


def test_kappa_at_its_ends() -> None:
    assert cohen_kappa([0.9, 0.1], [1.0, 0.0]) == pytest.approx(1.0)
    assert cohen_kappa([0.9, 0.1], [0.0, 1.0]) == pytest.approx(-1.0)
    assert cohen_kappa([0.9, 0.9, 0.1, 0.1], [1.0, 0.0, 1.0, 0.0]) == pytest.approx(0.0)
    assert cohen_kappa([0.9, 0.8], [1.0, 1.0]) is None  # nobody ever says b: agreement by chance is certain
    assert cohen_kappa([0.5, 0.9], [1.0, 0.5]) is None and cohen_kappa([], []) is None


def test_neither_order_nor_naming_matters() -> None:
    draw = random.Random(0)
    p = [round(draw.random(), 3) for _ in range(200)]
    label = [draw.choice([0.0, 0.25, 0.5, 0.75, 1.0]) for _ in range(200)]
    order = draw.sample(range(200), 200)
    shuffled = [p[i] for i in order], [label[i] for i in order]
    mirrored = [1 - x for x in p], [1 - x for x in label]
    for other in (shuffled, mirrored):
        assert pairwise_accuracy(*other) == pairwise_accuracy(p, label)
        assert brier(*other) == pytest.approx(brier(p, label))
        assert cohen_kappa(*other) == pytest.approx(cohen_kappa(p, label))
        assert expected_calibration_error(*other).value == pytest.approx(expected_calibration_error(p, label).value)


@pytest.mark.parametrize("measure", [pairwise_accuracy, brier, expected_calibration_error, cohen_kappa])
def test_what_is_no_probability_is_an_error(measure: object) -> None:
    assert callable(measure)
    with pytest.raises(ValueError, match="one length"):
        measure([0.5], [0.5, 1.0])
    for wrong in (NAN, -0.01, 1.01, float("inf")):
        with pytest.raises(ValueError, match=r"p must be in \[0, 1\]"):
            measure([wrong], [0.5])
        with pytest.raises(ValueError, match=r"label must be in \[0, 1\]"):
            measure([0.5], [wrong])
