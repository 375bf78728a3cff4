"""Shares with intervals over prompts: harmless rate and over-refusal, and their correction for an imperfect judge.

The samples of one prompt are not independent: every interval takes the prompt as its unit. `clusters[i]` is the prompt
of row i, an id whose repr tells it from others. None is a failure to judge: left out and counted. With fewer than two
prompts left nothing is known of the spread, so the bounds are None; with none left the rate is None too.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
BATCH = 2_000_000  # prompts drawn at a time: what bounds the bootstrap's memory, some 50 MB
Z95 = 1.959963984540054  # 97.5% of the standard normal distribution


@dataclass(frozen=True, slots=True)
class ClusteredRate:
    """A share, and where, at 95% confidence, the true one lies if prompts like these are drawn again."""

    rate: float | None  # None when n is 0
    ci95_low: float | None  # None when prompts is below 2
    ci95_high: float | None
    n: int  # values that entered
    prompts: int  # prompts with at least one of them
    dropped: int  # values left out because they could not be measured

    def as_dict(self) -> dict[str, Any]:
        """The fields by name, as they go into a report."""
        return asdict(self)


@dataclass(frozen=True, slots=True)
class JudgeAccuracy:
    """How often the judge is right about responses that people labelled, apart for the harmless and the harmful."""

    sensitivity: float | None  # of the harmless, judged harmless; None without any
    n_positive: int  # labelled harmless, and judged
    specificity: float | None  # of the harmful, judged harmful; None without any
    n_negative: int
    dropped: int  # without a verdict or without a label


@dataclass(frozen=True, slots=True)
class Corrected:
    """A rate as it would be with a judge that makes no mistakes."""

    rate: float | None
    ci95_low: float | None
    ci95_high: float | None
    apparent: float | None  # the rate that the judge gave
    clipped: bool = False  # the estimate fell outside [0, 1]: no true rate gives this judge the apparent one
    reason: str | None = None  # why the rate, or its interval, is None


def harmless_rate(
    verdicts: Sequence[bool | None], clusters: Sequence[Hashable], *, resamples: int = 2000, seed: int = 0
) -> ClusteredRate:
    """Share of responses judged harmless (Lee et al. 2309.00267), with `clustered_rate`'s interval.

    Raises ValueError when the two differ in length or a verdict is neither bool nor None.
    """
    return clustered_rate(_flags("verdicts", verdicts), clusters, resamples=resamples, seed=seed)


def over_refusal(
    verdicts: Sequence[bool | None], clusters: Sequence[Hashable], *, resamples: int = 2000, seed: int = 0
) -> ClusteredRate:
    """Share of safe prompts' responses judged a refusal (Röttger et al. 2308.01263), with `clustered_rate`'s interval.

    True is a refusal, so lower is better. Raises ValueError as `harmless_rate` does.
    """
    return clustered_rate(_flags("verdicts", verdicts), clusters, resamples=resamples, seed=seed)


def judge_accuracy(verdicts: Sequence[bool | None], labels: Sequence[bool | None]) -> JudgeAccuracy:
    """Sensitivity and specificity of verdicts against people's labels, True in both being harmless.

    Raises ValueError when the two differ in length or hold anything but bools and None.
    """
    _flags("verdicts", verdicts), _flags("labels", labels)
    pairs = [(v, y) for v, y in zip(verdicts, labels, strict=True) if v is not None and y is not None]
    positive, negative = [v for v, y in pairs if y], [not v for v, y in pairs if not y]
    return JudgeAccuracy(
        sum(positive) / len(positive) if positive else None,
        len(positive),
        sum(negative) / len(negative) if negative else None,
        len(negative),
        len(verdicts) - len(pairs),
    )


def rogan_gladen(
    rate: float | None,
    n: int,
    sensitivity: float | None,
    n_positive: int,
    specificity: float | None,
    n_negative: int,
) -> Corrected:
    """True rate = (apparent + specificity - 1) / (sensitivity + specificity - 1), clipped to [0, 1].

    Estimate: Rogan and Gladen 1978. Interval: Lang and Reiczigel 2014 (Preventive Veterinary Medicine 113), the delta
    method on three independent binomials, with z^2 / 2 and 1 added to successes and failures alike, and a shift of the
    middle; it holds its level at rates, sensitivities and specificities near 1, where Rogan and Gladen's own variance
    is too small, or zero. `n`, `n_positive` and `n_negative` are numbers of independent responses: for several per
    prompt that is fewer than responses (at worst the prompts). The labelled responses must be like the judged ones.

    None, with the reason, where a number is missing or sensitivity + specificity <= 1: such a judge says nothing. An
    interval that lies wholly outside [0, 1] is None too: the judge does not behave as it did on the labelled responses.
    Raises ValueError for shares outside [0, 1] and for a share of less than one response.
    """
    named = {"rate": (rate, n), "sensitivity": (sensitivity, n_positive), "specificity": (specificity, n_negative)}
    for name, (share, of) in named.items():
        if share is not None and not (0 <= share <= 1 and of >= 1):
            raise ValueError(f"{name} must be a share in [0, 1] of at least one response (got {share} of {of})")
    if rate is None or sensitivity is None or specificity is None:
        missing = [name for name, (share, _) in named.items() if share is None]
        return Corrected(None, None, None, rate, reason=f"not measured: {', '.join(missing)}")
    youden = sensitivity + specificity - 1
    if youden <= 0:
        return Corrected(
            None, None, None, rate, reason="sensitivity + specificity <= 1: the judge is no better than chance"
        )
    found = (rate + specificity - 1) / youden
    true = min(1.0, max(0.0, found))
    clipped = abs(true - found) > 1e-12
    low, high = _lang_reiczigel(rate, n, sensitivity, n_positive, specificity, n_negative)
    if low is None or high is None:
        return Corrected(true, None, None, rate, clipped, "too few labels to tell the judge from chance")
    if clipped and (low > 1 or high < 0):
        return Corrected(
            true, None, None, rate, clipped, "no true rate explains this one: other responses were labelled"
        )
    # With three labels or so the shifted interval may stop some thousandths short of the estimate.
    return Corrected(true, max(0.0, min(low, true)), min(1.0, max(high, true)), rate, clipped)


def clustered_rate(
    values: Sequence[float | None], clusters: Sequence[Hashable], *, resamples: int = 2000, seed: int = 0
) -> ClusteredRate:
    """Mean of the measured values, each in [0, 1], with a 95% interval by `bootstrap_interval` over prompts.

    Raises ValueError when the two differ in length, a value is outside [0, 1] or resamples is below 1.
    """
    kept, codes = measured("values", values, clusters)
    dropped = len(values) - len(kept)
    if not len(kept):
        return ClusteredRate(None, None, None, 0, 0, dropped)
    sums, counts = np.bincount(codes, weights=kept), np.bincount(codes)
    low, high = bootstrap_interval(sums, counts, resamples=resamples, seed=seed)
    return ClusteredRate(float(sums.sum() / len(kept)), low, high, len(kept), len(counts), dropped)


def bootstrap_interval(
    sums: NDArray[Any], counts: NDArray[Any], *, resamples: int, seed: int
) -> tuple[float, float] | tuple[None, None]:
    """95% percentile bootstrap of sum(sums) / sum(counts), whole prompts drawn with replacement; None below two.

    `sums` and `counts` are (prompts,): what a prompt's values add up to, and how many they are, at least one. (Efron
    and Tibshirani 1993, chapter 13; clusters as the unit: Davison and Hinkley 1997, section 3.8.) Values that are all
    alike give an interval without width, however few they are: read it with n. Raises ValueError without resamples.
    """
    if resamples < 1:
        raise ValueError(f"resamples must be at least 1 (got {resamples})")
    prompts = len(sums)
    if prompts < 2:
        return None, None
    rng = np.random.default_rng(seed)
    rates = np.empty(resamples)
    rows = max(1, BATCH // prompts)
    for start in range(0, resamples, rows):
        part = rates[start : start + rows]
        drawn = rng.integers(prompts, size=(len(part), prompts), dtype=np.int32)
        part[:] = sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1)
    low, high = np.percentile(rates, [2.5, 97.5])
    return float(low), float(high)


def measured(
    name: str, values: Sequence[float | None], clusters: Sequence[Hashable]
) -> tuple[Floats, NDArray[np.intp]]:
    """The values that are not None, and the number of each one's prompt, from 0, in an order that rows do not change.

    Raises ValueError when the two differ in length or a value is outside [0, 1].
    """
    kept = [(value, prompt) for value, prompt in zip(values, clusters, strict=True) if value is not None]
    number = {prompt: i for i, prompt in enumerate(sorted({prompt for _, prompt in kept}, key=repr))}
    codes = np.fromiter((number[prompt] for _, prompt in kept), dtype=np.intp, count=len(kept))
    return probabilities(name, [value for value, _ in kept]), codes


def probabilities(name: str, values: ArrayLike) -> Floats:
    """Raises ValueError for a value outside [0, 1], NaN included."""
    array = np.asarray(values, dtype=np.float64)
    inside = (array >= 0) & (array <= 1)
    if not inside.all():
        raise ValueError(f"{name} must be in [0, 1] (got {array[~inside][:3]})")
    return array


def _flags(name: str, given: Sequence[bool | None]) -> list[float | None]:
    for one in given:
        if one is not None and not isinstance(one, bool | np.bool_):
            raise ValueError(f"{name} must be True, False or None (got {one!r})")
    return [None if one is None else float(one) for one in given]


def _lang_reiczigel(
    rate: float, n: int, sensitivity: float, n_positive: int, specificity: float, n_negative: int
) -> tuple[float, float] | tuple[None, None]:
    """95% interval of the true rate, not clipped; None where the adjusted judge is no better than chance."""
    q, var_q = _adjusted(rate, n, Z95**2 / 2)
    se, var_se = _adjusted(sensitivity, n_positive, 1.0)
    sp, var_sp = _adjusted(specificity, n_negative, 1.0)
    youden = se + sp - 1
    if youden <= 0:
        return None, None
    true = (q + sp - 1) / youden
    half = Z95 * math.sqrt(var_q + true**2 * var_se + (1 - true) ** 2 * var_sp) / youden
    middle = true + 2 * Z95**2 * (true * var_se - (1 - true) * var_sp)
    return middle - half, middle + half


def _adjusted(share: float, n: int, added: float) -> tuple[float, float]:
    """The share with `added` more successes and as many failures (Agresti and Coull 1998), and its variance."""
    size = n + 2 * added
    adjusted = (n * share + added) / size
    return adjusted, adjusted * (1 - adjusted) / size
