"""Comparisons of what was answered, without the thoughts that responses begin with."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from rlaif_ray.chat.thoughts import OPEN_THOUGHT, answer_of
from rlaif_ray.types import Comparison, Label

if TYPE_CHECKING:
    from rlaif_ray.interfaces import Labeler


class AnswerLabeler:
    """A Labeler that lets another compare the answers alone. A response that is still a thought fails its pair."""

    def __init__(self, labeler: Labeler) -> None:
        self._labeler = labeler

    def label(self, comparisons: Sequence[Comparison]) -> list[Label]:
        answered = [answers_alone(comparison) for comparison in comparisons]
        compared = [comparison for comparison in answered if comparison is not None]
        labels = iter(self._labeler.label(compared) if compared else ())
        return [Label(None, failure=OPEN_THOUGHT) if one is None else next(labels) for one in answered]


def answers_alone(comparison: Comparison) -> Comparison | None:
    """None where a thought does not end."""
    a, b = answer_of(comparison.response_a), answer_of(comparison.response_b)
    return None if a is None or b is None else replace(comparison, response_a=a, response_b=b)
