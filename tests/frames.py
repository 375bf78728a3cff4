"""Judges' prompts without the codes in their markers, which are another in every question."""

from __future__ import annotations

import re

from rlaif_ray.feedback.frames import NOTE
from rlaif_ray.feedback.neutral import CODE_LENGTH, CODE_LETTERS

CODE = re.compile(rf" ([{CODE_LETTERS}]{{{CODE_LENGTH}}})\]")


def without_codes(text: str) -> str:
    """`text` with markers as its template has them."""
    return CODE.sub("]", text)


def codes(text: str) -> list[str]:
    """Those of the markers, in order."""
    return CODE.findall(text)


__all__ = ["NOTE", "codes", "without_codes"]
