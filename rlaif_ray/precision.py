"""Which number type is computed in, where the config leaves that to the machine."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

_CPU = Path("/proc/cpuinfo")


@cache
def fast_in_bf16() -> bool:
    """Whether this machine's CPU has AMX, by which bf16 matmuls are five to seven times faster than fp32 (measured).

    CPUs without it emulate bf16, many times slower than fp32. Of those that have avx512_bf16 alone nothing was
    measured, so they don't count.
    """
    try:
        lines = _CPU.read_text().splitlines()
    except OSError:  # no Linux
        return False
    return any("amx_bf16" in line.split() for line in lines if line.startswith("flags"))


def chosen_precision(
    precision: Literal["auto", "fp32", "bf16"], device: Literal["cpu", "cuda"], *, fast: bool | None = None
) -> Literal["fp32", "bf16"]:
    """auto: bf16 on GPUs, and on CPUs that are faster in it, else fp32. `fast` says whether they are; default: as this
    machine's."""
    if precision != "auto":
        return precision
    if device == "cpu" and fast is None:
        fast = fast_in_bf16()
    return "bf16" if device == "cuda" or fast else "fp32"
