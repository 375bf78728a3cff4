"""The part of `rlaif evaluate` about pairs that people labelled: the judge and reward models against them."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from rlaif_ray.data.preferences import (
    PreferenceRecord,
    comparison_text,
    failure_reason,
    human_label,
    read_preferences,
    rows_of,
)
from rlaif_ray.errors import InputError
from rlaif_ray.evaluation.calibration import (
    beats,
    brier,
    cohen_kappa,
    expected_calibration_error,
    pairwise_accuracy,
    preference,
)
from rlaif_ray.evaluation.win_rate import alignment, position_bias
from rlaif_ray.types import Completion, Prompt

if TYPE_CHECKING:
    from rlaif_ray.config.jobs import EvaluateJob
    from rlaif_ray.interfaces import Scorer

PEOPLE = "people"  # first part of the id of a pair that people labelled


def labelled_by_people(job: EvaluateJob) -> tuple[list[PreferenceRecord], dict[str, str]]:
    """The pairs of `data` that people labelled, and the subset of each by id, where a column names it.

    Raises:
        InputError: people labelled none, or there is no such column.
    """
    data = job.data
    if data is None:
        return [], {}
    records, subsets = [], {}
    rows = rows_of(data.path, data.split, {job.subset})() if job.subset is not None else itertools.repeat(None)
    for record, row in zip(read_preferences(data.path, split=data.split, limit=data.limit), rows, strict=False):
        if human_label(record) is None:
            continue
        records.append(record.model_copy(update={"id": f"{PEOPLE}/{record.id}"}))
        if job.subset is not None and row is not None:
            if job.subset not in row.cells:
                raise InputError(
                    f"{row.place}: subset={job.subset} must be a column of {data.path} (its columns: "
                    f"{', '.join(row.cells)}). Correct the name, or leave subset out."
                )
            # "llmbar/Natural/17" is a row of "llmbar/Natural".
            subsets[records[-1].id] = re.sub(r"/\d+$", "", str(row.cells[job.subset]))
    if not records:
        raise InputError(
            f"{data.path} has no pair with a label that people gave: there is nothing to agree with. Give rows of "
            f"prompt, response_a, response_b and label."
        )
    return records, subsets


def measured_alignment(
    job: EvaluateJob, records: Sequence[PreferenceRecord], subsets: Mapping[str, str] = MappingProxyType({})
) -> dict[str, Any] | None:
    """The judge's labels against people's; None without data.

    A label's majority counts, those of one half are no side's; a judge's exact one half is half right.
    """
    if job.data is None:
        return None
    p = [record.p_a for record in records]
    found = _against_people(job, p, records)
    found["failures"] = dict(Counter(failure_reason(r) for r in records if r.p_a is None))
    found["position_bias"] = asdict(position_bias([r.p_a_forward for r in records], [r.p_a_reversed for r in records]))
    found["people"] = _agreement_of_people([_label(record) for record in records])
    parts: dict[str, list[PreferenceRecord]] = {}
    for record in records if subsets else ():
        parts.setdefault(subsets[record.id], []).append(record)
    if len(parts) > 1:
        found["subsets"] = {
            part: _against_people(job, [r.p_a for r in own], own) for part, own in sorted(parts.items())
        }
    return found


def measured_reward_model(job: EvaluateJob, scorer: Scorer, records: Sequence[PreferenceRecord]) -> dict[str, Any]:
    """A reward model's preferences sigmoid(r_a - r_b) against people's labels."""
    completions = [
        Completion(Prompt(r.id, r.prompt, (), comparison_text(r)), 0, (0,), (0.0,), text, True, 0)
        for r in records
        for text in (r.response_a, r.response_b)
    ]
    rewards = [score.value for score in scorer.score(completions)]
    p = [
        None if a is None or b is None else preference(a, b) for a, b in zip(rewards[0::2], rewards[1::2], strict=True)
    ]
    return _against_people(job, p, records)


def _against_people(job: EvaluateJob, p: Sequence[float | None], records: Sequence[PreferenceRecord]) -> dict[str, Any]:
    """Probabilities that a is better against people's labels; None where they could not be had."""
    known = [(value, record) for value, record in zip(p, records, strict=True) if value is not None]
    values, said = [value for value, _ in known], [_label(record) for _, record in known]
    found = alignment(
        values, said, [comparison_text(r) for _, r in known], resamples=job.win_rate.resamples, seed=job.seed
    )
    longer = [beats(len(r.response_a), len(r.response_b)) for r in records]
    calibration = expected_calibration_error(values, said)
    return {
        "accuracy": found.rate,
        "ci95_low": found.ci95_low,
        "ci95_high": found.ci95_high,
        "n": found.n,
        "ties": found.ties,
        "failed": len(records) - len(known),
        "kappa": cohen_kappa(values, said),
        "brier": brier(values, said),
        "ece": calibration.value,
        "curve": calibration.rows(),
        "longer": {"accuracy": pairwise_accuracy(longer, [_label(record) for record in records]).value},
    }


def _label(record: PreferenceRecord) -> float:
    return human_label(record) or 0.0


def _agreement_of_people(labels: Sequence[float]) -> float | None:
    """How often one annotator says what most say, where labels are shares of annotators; else None."""
    decided = [label for label in labels if label != 0.5]
    if all(label in (0.0, 1.0) for label in decided):
        return None
    return sum(max(label, 1.0 - label) for label in decided) / len(decided)
