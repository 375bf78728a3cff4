"""What every config class has, and the checks that several of them make."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Self

from pydantic import BaseModel, ConfigDict, model_validator


class Config(BaseModel):
    """Base of every config class: unknown keys are errors, values can't change after loading."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    @model_validator(mode="after")
    def _cross_checks(self) -> Self:
        problems = list(self._problems())
        if problems:
            raise ValueError("\n".join(problems))
        return self

    def _problems(self) -> Iterator[str]:
        """What does not fit together, a line each."""
        return iter(())


NAME_BYTES = 100  # of a name that files are named by


def not_file_names(key: str, names: Iterable[str]) -> Iterator[str]:
    """Of names that results are kept under: what keeps them from being a file's name, or has them be one elsewhere."""
    for name in names:
        if not re.fullmatch(r"\w[^/\\\x00-\x1f]*", name) or len(name.encode("utf-8", "replace")) > NAME_BYTES:
            yield (
                f"{key} must have names that can be a file's (got {name[:40]!r}): what belongs to them is kept in "
                f"files of that name. Use at most {NAME_BYTES} letters, digits, - and _."
            )


LEAST_TEMPERATURE = 0.01  # of sampling


def greedy_or_warm(key: str, temperature: float) -> Iterator[str]:
    """Of a temperature that may be 0: what is wrong where it is neither that nor one that vLLM samples at."""
    if 0 < temperature < LEAST_TEMPERATURE:
        yield (
            f"{key} must be 0 or at least {LEAST_TEMPERATURE:g} (got {temperature:g}): vLLM raises what lies between "
            f"to {LEAST_TEMPERATURE:g} without a word. Use 0 for greedy responses."
        )


def warm(key: str, temperature: float, needs: str) -> Iterator[str]:
    """Of a temperature that must be above 0: what is wrong where vLLM doesn't sample at it; `needs` says why."""
    if temperature < LEAST_TEMPERATURE:
        raised = f"vLLM raises what lies below to {LEAST_TEMPERATURE:g} without a word"
        yield (
            f"{key} must be at least {LEAST_TEMPERATURE:g} (got {temperature:g}): "
            f"{raised if temperature else f'at 0 vLLM takes the likeliest token, and {needs}'}. Raise it, or leave it "
            f"out for the default, 1."
        )
