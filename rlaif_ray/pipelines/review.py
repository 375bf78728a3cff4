"""What follows labelling: a sample for a person to check, the checked answers back, other formats."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif_ray.data.exports import merge_review, sample_for_review, write_trl
from rlaif_ray.errors import InputError

if TYPE_CHECKING:
    from rlaif_ray.config.load import Loaded

FORMATS = ("records", "trl")


def check_options(format: str, reviewed: Path | None) -> None:
    """Raises InputError for options that can't be followed, before any work starts."""
    if format not in FORMATS:
        raise InputError(f"--format must be one of {', '.join(FORMATS)} (got {format!r}). Correct it.")
    if reviewed is not None and not reviewed.is_file():
        raise InputError(f"--reviewed must be a file (got {reviewed}, which does not exist). Correct the path.")


def after_labels(
    summary: dict[str, Any], *, sample: int | None, out: Path, reviewed: Path | None, format: str, loaded: Loaded
) -> None:
    """Writes what the options ask for, and says where."""
    labels = Path(summary["output"])
    if reviewed is not None:
        merged = labels.with_name(f"{labels.stem}.reviewed{labels.suffix}")
        found = merge_review(labels, reviewed, merged)
        print(f"{found.checked} of {found.rows} rows were checked; the judge agrees with {found.agreed}: {merged}")
    if sample is not None:
        count = sample_for_review(labels, sample, loaded.config.seed, out)
        print(f"{count} labels to check, in the column `human` with a, b or tie: {out}")
    if format == "trl":
        path = labels.with_name(f"{labels.stem}.trl.jsonl")
        count, left_out = write_trl(labels, path)
        print(f"{count} rows for TRL, {left_out} ties and failures left out: {path}")
