"""Win rates of A against B, plain and length-controlled, position bias and alignment, with intervals over prompts.

The intervals take the prompt as their unit, as `harmless.clustered_rate` does: `clusters[i]` is the prompt of row i.
None is a failure to judge: left out and counted.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from rlaif_ray.evaluation.calibration import pairwise_accuracy
from rlaif_ray.evaluation.harmless import ClusteredRate, bootstrap_interval, clustered_rate, measured, probabilities

Floats = NDArray[np.float64]
NEWTON_STEPS = 100


@dataclass(frozen=True, slots=True)
class WinRate(ClusteredRate):
    """How often A beats B, a tie counting half."""

    wins: int  # outcomes above 1/2
    ties: int  # of exactly 1/2
    losses: int


@dataclass(frozen=True, slots=True)
class LengthControlled(ClusteredRate):
    """How often A would beat B if both wrote at the same length."""

    slope: float | None  # change of the log odds per unit of the scale; None where not estimated
    plain: float | None  # mean outcome of the same n pairs, lengths left aside
    empty: int  # judged pairs left out because a response has length 0, and the pair no ratio
    reason: str | None  # why the rate or its interval is None, where n is not the reason


@dataclass(frozen=True, slots=True)
class PositionBias:
    """How often the judge follows the position instead of the response."""

    rate: float | None  # None when n is 0
    prefers_first: float | None  # of the biased pairs; None without one
    n: int  # pairs judged in both orders
    biased: int
    dropped: int


@dataclass(frozen=True, slots=True)
class Alignment(ClusteredRate):
    """Accuracy of probabilities against human labels (AI labeler alignment, Lee et al. 2309.00267)."""

    ties: int  # labels of one half, no side's


def outcome(p_forward: float | None, p_reversed: float | None, *, use_probabilities: bool) -> float | None:
    """How far A beats B, in [0, 1]; None if either order could not be judged.

    Both arguments are probabilities that A is better, A shown first in the forward order and second in the reversed.
    With `use_probabilities` their mean; else a verdict: 1 or 0 where both orders say so, and 1/2, a tie, where they
    disagree or one of them is undecided. Raises ValueError outside [0, 1].
    """
    if p_forward is None or p_reversed is None:
        return None
    probabilities("p_forward and p_reversed", [p_forward, p_reversed])
    if use_probabilities:
        return (p_forward + p_reversed) / 2
    if p_forward > 0.5 and p_reversed > 0.5:
        return 1.0
    return 0.0 if p_forward < 0.5 and p_reversed < 0.5 else 0.5


def win_rate(
    outcomes: Sequence[float | None], clusters: Sequence[Hashable], *, resamples: int = 2000, seed: int = 0
) -> WinRate:
    """Mean outcome, with the interval of `clustered_rate`. Raises ValueError for what that refuses."""
    base = clustered_rate(outcomes, clusters, resamples=resamples, seed=seed)
    kept = np.array([value for value in outcomes if value is not None], dtype=np.float64)
    wins, losses = int((kept > 0.5).sum()), int((kept < 0.5).sum())
    return WinRate(**base.as_dict(), wins=wins, ties=len(kept) - wins - losses, losses=losses)


def length_controlled(
    outcomes: Sequence[float | None],
    lengths_a: Sequence[int],
    lengths_b: Sequence[int],
    clusters: Sequence[Hashable],
    *,
    scale: Literal["ratio", "log_ratio"] = "ratio",
) -> LengthControlled:
    """The win rate that a logistic regression on the length ratio predicts where the ratio is 1.

    logit P(A preferred) = intercept + slope * x, x = len_A / len_B - 1, lengths in characters (Lee et al. 2309.00267,
    appendix J, up to the shift, by which the intercept is the answer). An outcome may be fractional: Bernoulli
    quasi-likelihood (Papke and Wooldridge 1996). "log_ratio" has x = log(len_A / len_B) instead: only there does
    exchanging A and B give 1 - rate, and being twice as long weigh as much as being half as long.

    Interval: cluster-robust sandwich variance with factor G / (G - 1) over G prompts (Liang and Zeger 1986), Student's
    t with G - 1 degrees of freedom on the logit (Cameron and Miller 2015, section VI), mapped through the logistic.

    Nothing is regularised: where the likelihood has no finite maximum, because ratios separate the pairs that A won
    from those it lost, or where all ratios are the same but not 1, the rate is None, with the reason. With all ratios 1
    it is the plain rate. Raises ValueError for unequal lengths, outcomes outside [0, 1] and lengths below 0.
    """
    if not len(outcomes) == len(lengths_a) == len(lengths_b) == len(clusters):
        raise ValueError("outcomes, lengths_a, lengths_b and clusters must be of one length")
    lengths = np.array([lengths_a, lengths_b], dtype=np.float64)
    if not ((lengths >= 0) & np.isfinite(lengths)).all():
        raise ValueError("lengths must be numbers of characters, at least 0")
    probabilities("outcomes", [o for o in outcomes if o is not None])
    with_ratio = [o if a and b else None for o, a, b in zip(outcomes, *lengths, strict=True)]
    y, codes = measured("outcomes", with_ratio, clusters)
    kept = lengths[:, [o is not None for o in with_ratio]]
    ratio = kept[0] / kept[1]
    x = ratio - 1 if scale == "ratio" else np.log(ratio)

    dropped = sum(o is None for o in outcomes)
    prompts = len(np.unique(codes))
    plain = float(y.mean()) if len(y) else None
    rate = low = high = slope = None
    reason = _not_estimable(y, x) if len(y) else None
    if plain in (0.0, 1.0):
        rate = plain  # at every length; but its logit is infinite
    elif len(y) and reason is None:
        design = np.column_stack([np.ones_like(x), x] if x.any() else [np.ones_like(x)])
        fitted = _logistic_regression(y, design)
        if fitted is None:
            reason = "the logistic regression did not converge"
        else:
            rate, slope = float(_logistic(fitted[0])), (float(fitted[1]) if len(fitted) > 1 else None)
            if prompts > 1:
                low, high = _intercept_interval(y, design, fitted, codes)
    empty = len(outcomes) - dropped - len(y)
    return LengthControlled(rate, low, high, len(y), prompts, dropped, slope, plain, empty, reason)


def position_bias(p_forward: Sequence[float | None], p_reversed: Sequence[float | None]) -> PositionBias:
    """Share of pairs where the same position wins in both orders (Lee et al. 2309.00267, appendix B).

    Both are probabilities that A is better; A is shown first in the forward order, second in the reversed. So the first
    position wins twice where forward is above 1/2 and reversed below. An undecided order is no position's. Raises
    ValueError for unequal lengths and values outside [0, 1].
    """
    pairs = list(zip(p_forward, p_reversed, strict=True))
    judged = [(f, r) for f, r in pairs if f is not None and r is not None]
    forward, reverse = probabilities("p_forward and p_reversed", judged).reshape(-1, 2).T
    first, second = int(((forward > 0.5) & (reverse < 0.5)).sum()), int(((forward < 0.5) & (reverse > 0.5)).sum())
    biased, n = first + second, len(judged)
    return PositionBias(biased / n if n else None, first / biased if biased else None, n, biased, len(pairs) - n)


def alignment(
    p: Sequence[float | None],
    label: Sequence[float],
    clusters: Sequence[Hashable],
    *,
    resamples: int = 2000,
    seed: int = 0,
) -> Alignment:
    """`pairwise_accuracy` of the measured p, with an interval by `bootstrap_interval` over prompts with decided labels.

    Raises ValueError for unequal lengths, values outside [0, 1] and resamples below 1.
    """
    by_prompt: dict[Hashable, tuple[list[float], list[float]]] = {}
    for predicted, said, prompt in zip(p, label, clusters, strict=True):
        if predicted is not None:
            of_prompt = by_prompt.setdefault(prompt, ([], []))
            of_prompt[0].append(predicted)
            of_prompt[1].append(said)
    parts = [pairwise_accuracy(*by_prompt[prompt]) for prompt in sorted(by_prompt, key=repr)]
    decided = [(part.value * part.n, part.n) for part in parts if part.value is not None]
    ties, dropped = sum(part.ties for part in parts), sum(one is None for one in p)
    if not decided:
        return Alignment(None, None, None, 0, 0, dropped, ties)
    right, n = np.array([r for r, _ in decided]), np.array([k for _, k in decided])
    low, high = bootstrap_interval(right, n, resamples=resamples, seed=seed)
    return Alignment(float(right.sum() / n.sum()), low, high, int(n.sum()), len(n), dropped, ties)


def _not_estimable(y: Floats, x: Floats) -> str | None:
    """Why the regression of y on x says nothing at x = 0, or has no finite maximum; None where all is well."""
    lost, won = x[y < 1], x[y > 0]  # a fractional outcome is some of both
    if not len(lost) or not len(won):
        return f"every outcome is {y[0]:.0f}: its logit, and so the interval, is not finite"
    if x.min() == x.max():
        return None if x[0] == 0 else "every pair has the same length ratio, not 1: what length does cannot be told"
    # With one regressor the maximum is finite just when the two overlap (Albert and Anderson 1984).
    if lost.max() <= won.min() or won.max() <= lost.min():
        return "the length ratio separates the pairs that A won from those it lost: the slope is not finite"
    return None


def _logistic_regression(y: Floats, design: Floats) -> Floats | None:
    """(columns,) maximum of sum y log p + (1 - y) log(1 - p), p = logistic(design @ theta); None without convergence.

    Newton's method, halving steps that lead downhill, which happens with outlying ratios.
    """

    def log_likelihood(theta: Floats) -> float:
        logit = design @ theta
        return float((y * logit - np.logaddexp(0.0, logit)).sum())

    theta = np.zeros(design.shape[1])
    for _ in range(NEWTON_STEPS):
        p = _logistic(design @ theta)
        gradient = design.T @ (y - p)
        try:
            step = np.linalg.solve(_information(p, design), gradient)
        except np.linalg.LinAlgError:
            return None
        if gradient @ step < 1e-8:  # Newton's decrement, twice what is left to gain; the last step squares it
            return np.asarray(theta + step)
        while log_likelihood(theta + step) < log_likelihood(theta):
            step /= 2
        theta = theta + step
    return None


def _intercept_interval(y: Floats, design: Floats, theta: Floats, codes: NDArray[np.intp]) -> tuple[float, float]:
    """95% interval of logistic(theta[0]); `codes` (rows,) number the at least two prompts from 0."""
    from scipy.stats import t  # type: ignore[import-untyped]

    p = _logistic(design @ theta)
    bread = np.linalg.inv(_information(p, design))
    scores = np.stack([np.bincount(codes, weights=(y - p) * column) for column in design.T])  # (columns, prompts)
    prompts = scores.shape[1]
    variance = prompts / (prompts - 1) * (bread @ scores @ scores.T @ bread)[0, 0]
    half = t.ppf(0.975, prompts - 1) * np.sqrt(variance)
    return float(_logistic(theta[0] - half)), float(_logistic(theta[0] + half))


def _information(p: Floats, design: Floats) -> Floats:
    """(columns, columns) minus the second derivative of the log-likelihood."""
    return np.asarray((design * (p * (1 - p))[:, None]).T @ design)


def _logistic(logit: Floats) -> Floats:
    return np.asarray(0.5 + 0.5 * np.tanh(logit / 2))  # does not overflow
