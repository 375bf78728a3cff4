"""Whether several programs computed the same numbers, and if not, which of them differs. Pure."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

# Of any token of a dense model on CPUs, in nats: about a hundred times what rounding does, a hundredth of what a wrong
# mask does. Of a mixture of experts on average: where two experts are nearly level, rounding chooses, and single tokens
# are off by 1e-2.
FP32_GAP = 1e-3
# On average, on GPUs: attention kernels multiply in TF32, which has 3 bits more than bf16, so an eighth of its bound.
FP32_GPU_GAP = 0.02
# On average, in nats: in bf16 single tokens are far off by rounding alone. Measured on the guard's text, packed against
# alone: 0.05 for SmolLM2-135M (worst token 0.21), 0.01-0.02 for tiny models. Between engine and trainer Ma et al.
# 2510.11370 find a KL of 6.4e-4 for a dense model and 1.5e-3 for one of experts, whose routing tips over: of a normal
# error with variance 2 KL that is 0.03 and 0.04.
BF16_GAP = 0.15
WORST = 10  # times the bound in fp32: what one token of a whole step's may be off by


@dataclass(frozen=True, slots=True)
class Bound:
    """How far numbers may be apart that should be the same."""

    gap: float
    of: Literal["worst", "mean"]

    def measure(self, a: Sequence[float], b: Sequence[float]) -> float:
        """How far these two are apart; not-a-number where one of them has it."""
        gaps = [abs(x - y) for x, y in zip(a, b, strict=True)]
        if not all(map(math.isfinite, gaps)):
            return math.nan
        return max(gaps) if self.of == "worst" else math.fsum(gaps) / len(gaps)

    def holds(self, gap: float) -> bool:
        return gap <= self.gap  # False for not-a-number

    def __str__(self) -> str:
        return f"{self.gap:.2g} " + ("for each token" if self.of == "worst" else "on average")


def bound_for(
    precision: Literal["fp32", "bf16"],
    max_gap: float | None,
    *,
    device: Literal["cpu", "cuda"] = "cpu",
    experts: bool = False,
) -> Bound:
    """The bound of a precision, or what the config sets in its place; `experts`: the model is a mixture of them."""
    if precision == "bf16":
        return Bound(max_gap or BF16_GAP, "mean")
    if device == "cuda":
        return Bound(max_gap or FP32_GPU_GAP, "mean")
    return Bound(max_gap or FP32_GAP, "mean" if experts else "worst")


@dataclass(frozen=True, slots=True)
class Comparison:
    """Readings of the same tokens by two or more programs, pair by pair."""

    gaps: dict[tuple[str, str], float]
    bound: Bound

    @property
    def agrees(self) -> bool:
        return all(map(self.bound.holds, self.gaps.values()))

    @property
    def names(self) -> list[str]:
        return list(dict.fromkeys(name for pair in self.gaps for name in pair))

    @property
    def odd(self) -> str | None:
        """The one that differs from all others, which agree among themselves; of two, which can't tell, the first: the
        second is what it is measured by. None where there is no such one."""
        if len(self.names) == 2:
            return None if self.agrees else self.names[0]
        for name in self.names:
            own = [gap for pair, gap in self.gaps.items() if name in pair]
            others = [gap for pair, gap in self.gaps.items() if name not in pair]
            if all(map(self.bound.holds, others)) and not any(map(self.bound.holds, own)):
                return name
        return None

    @property
    def worst(self) -> float:
        """The largest gap; not-a-number if any is."""
        return max(self.gaps.values(), key=lambda gap: math.inf if math.isnan(gap) else gap)


def compare(readings: Mapping[str, Sequence[float]], bound: Bound) -> Comparison:
    """Every pair of readings, by name, in the order given."""
    return Comparison({(a, b): bound.measure(readings[a], readings[b]) for a, b in combinations(readings, 2)}, bound)
