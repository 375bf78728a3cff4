"""What follows labelling: labels to a person who checks them, the checked ones back, other formats."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from rlaif_ray.data.exports import (
    merge_review,
    must_be_free,
    pull_from_argilla,
    push_to_argilla,
    sample_for_review,
    write_trl,
)
from rlaif_ray.errors import InputError
from rlaif_ray.output import say

FORMATS = ("records", "trl")


@dataclass(frozen=True, slots=True)
class Review:
    """The options of `rlaif label` about its output."""

    format: str = "records"
    sample: int | None = None
    out: Path = Path("review.csv")
    reviewed: Path | None = None
    to_argilla: str | None = None
    from_argilla: str | None = None

    def check(self) -> None:
        """Raises InputError for what can't be done, before any work starts."""
        if self.format not in FORMATS:
            raise InputError(f"--format must be one of {', '.join(FORMATS)} (got {self.format!r}). Correct it.")
        if self.reviewed is not None and not self.reviewed.is_file():
            raise InputError(f"--reviewed must be a file (got {self.reviewed}, which is none). Correct the path.")
        if self.sample is not None:
            must_be_free(self.out)

    def after(self, labels: Path, seed: int) -> None:
        """Does what the options ask for with the finished labels, and says where it is."""
        if self.reviewed is not None:
            merged = labels.with_name(f"{labels.stem}.reviewed{labels.suffix}")
            found = merge_review(labels, self.reviewed, merged)
            share = "" if found.agreement is None else f" ({found.agreement:.0%} of all labels, estimated)"
            say(
                f"{found.checked} of {found.rows} rows are checked; the judge agrees with {found.agreed} of the "
                f"{found.decided} decided ones{share}: {merged}"
            )
        if self.from_argilla is not None:
            merged = labels.with_name(f"{labels.stem}.argilla{labels.suffix}")
            say(f"{pull_from_argilla(self.from_argilla, merged)} records from Argilla: {merged}")
        if self.sample is not None:
            count = sample_for_review(labels, self.sample, seed, self.out)
            say(f"{count} labels to check, in the column `human` with a, b or tie: {self.out}")
        if self.to_argilla is not None:
            say(f"{push_to_argilla(labels, self.to_argilla)} records are in Argilla as {self.to_argilla}")
        if self.format == "trl":
            path = labels.with_name(f"{labels.stem}.trl.jsonl")
            count, left_out = write_trl(labels, path)
            say(f"{count} rows for TRL, {left_out} ties and failures left out: {path}")
