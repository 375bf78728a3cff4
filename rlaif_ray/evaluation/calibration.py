"""How well probabilities of preference fit labels: accuracy, Brier score, calibration error, agreement.

A label may be fractional (the share of annotators who prefer a). `p` and `label` are both of "a is better".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class Accuracy:
    """Share of decided labels that the probabilities get right."""

    value: float | None  # None without a decided label
    n: int  # decided labels; those of one half are no side's
    ties: int  # labels left out


@dataclass(frozen=True, slots=True)
class Bin:
    """Probabilities in [low, high) (the last one closed)."""

    low: float
    high: float
    n: int
    mean_p: float | None  # None when empty
    mean_label: float | None


@dataclass(frozen=True, slots=True)
class Calibration:
    """Expected calibration error and the curve behind it."""

    value: float | None
    curve: tuple[Bin, ...]

    def rows(self) -> list[dict[str, Any]]:
        """The curve as it goes into a report."""
        return [asdict(one) for one in self.curve]


def preference(reward_a: float, reward_b: float) -> float:
    """The Bradley-Terry probability that a is better, sigmoid(r_a - r_b)."""
    return 1.0 / (1.0 + math.exp(-max(-60.0, min(60.0, reward_a - reward_b))))


def beats(a: float, b: float) -> float:
    """1 where a is larger, 0 where b is, and one half between equals."""
    return 0.5 + 0.5 * ((a > b) - (a < b))


def pairwise_accuracy(p: Sequence[float], label: Sequence[float]) -> Accuracy:
    """A label's majority counts; its ties are left out. A probability of exactly one half is half right."""
    predicted, said = _arrays(p, label)
    decided = said != 0.5
    if not decided.any():
        return Accuracy(None, 0, len(said))
    right = np.where(predicted == 0.5, 0.5, (predicted > 0.5) == (said > 0.5))
    return Accuracy(float(right[decided].mean()), int(decided.sum()), int((~decided).sum()))


def brier(p: Sequence[float], label: Sequence[float]) -> float | None:
    """Mean squared difference; None without values."""
    predicted, said = _arrays(p, label)
    return float(np.square(predicted - said).mean()) if len(said) else None


def expected_calibration_error(p: Sequence[float], label: Sequence[float], bins: int = 10) -> Calibration:
    """sum over bins of n_bin / n |mean p - mean label|, in bins of equal width (Guo et al. 1706.04599, equation 3)."""
    predicted, said = _arrays(p, label)
    places = np.searchsorted(np.arange(1, bins) / bins, predicted, side="right")
    curve, error = [], 0.0
    for k in range(bins):
        inside = places == k
        n = int(inside.sum())
        mean_p = float(predicted[inside].mean()) if n else None
        mean_label = float(said[inside].mean()) if n else None
        if mean_p is not None and mean_label is not None:
            error += n / len(said) * abs(mean_p - mean_label)
        curve.append(Bin(k / bins, (k + 1) / bins, n, mean_p, mean_label))
    return Calibration(error if len(said) else None, tuple(curve))


def cohen_kappa(p: Sequence[float], label: Sequence[float]) -> float | None:
    """Agreement beyond chance on decided pairs, (p_o - p_e) / (1 - p_e); None where chance alone would agree."""
    predicted, said = _arrays(p, label)
    decided = (said != 0.5) & (predicted != 0.5)
    if not decided.any():
        return None
    a, b = predicted[decided] > 0.5, said[decided] > 0.5
    observed = float((a == b).mean())
    chance = float(a.mean() * b.mean() + (1 - a.mean()) * (1 - b.mean()))
    return None if chance == 1.0 else (observed - chance) / (1.0 - chance)


def _arrays(p: Sequence[float], label: Sequence[float]) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Raises ValueError when the two differ in length or hold no probabilities."""
    predicted, said = np.asarray(p, dtype=np.float64), np.asarray(label, dtype=np.float64)
    if predicted.shape != said.shape:
        raise ValueError(f"p and label must be of one length (got {len(predicted)} and {len(said)})")
    for name, values in (("p", predicted), ("label", said)):
        if not ((values >= 0) & (values <= 1)).all():
            raise ValueError(f"{name} must be in [0, 1] (got {values[~((values >= 0) & (values <= 1))][:3]})")
    return predicted, said
