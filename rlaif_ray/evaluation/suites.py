"""What is measured on prompts that are never trained on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rlaif_ray.evaluation.calibration import beats
from rlaif_ray.evaluation.metrics import cluster_means, mean_interval, paired_gain
from rlaif_ray.interfaces import score_answered
from rlaif_ray.types import Sample

if TYPE_CHECKING:
    from rlaif_ray.interfaces import GenerationSettings, Generator, Scorer
    from rlaif_ray.types import Prompt

HeldOutScores = list[float | None]  # per prompt: mean score of its samples, None where none could be scored


def held_out_samples(
    generator: Generator, scorer: Scorer, prompts: Sequence[Prompt], settings: GenerationSettings
) -> tuple[list[Sample], HeldOutScores]:
    """Answers the prompts and has them scored, the same way as in training; per prompt the mean score."""
    completions = generator.generate(prompts, settings)
    samples = [Sample(c, s) for c, s in zip(completions, score_answered(scorer, completions), strict=True)]
    per_prompt = cluster_means([s.score.value for s in samples], [s.completion.prompt.id for s in samples])
    return samples, list(per_prompt.values())


def held_out_summary(before: HeldOutScores, after: HeldOutScores) -> dict[str, dict[str, float | int | None]]:
    """Means before and after, the gain paired by prompt, and the share of prompts that score higher than before (a tie
    counts half), each with its 95% interval."""
    return {
        "before": mean_interval(before).as_dict(),
        "after": mean_interval(after).as_dict(),
        "gain": paired_gain(before, after).as_dict(),
        "win_rate": mean_interval(_wins(before, after)).as_dict(),
    }


def _wins(before: HeldOutScores, after: HeldOutScores) -> list[float | None]:
    return [None if old is None or new is None else beats(new, old) for old, new in zip(before, after, strict=True)]
