"""`rlaif report`: what runs left behind, as one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlaif_ray.evaluation.report.page import write_report


def make_report(folders: Sequence[Path], out: Path | None, labels: Sequence[Path] = ()) -> str:
    """Writes the page, by default report.html in the first folder; returns what to say about it.

    Args:
        labels: files of records outside of the folders that it may show.

    Raises:
        InputError: a folder holds no run, or the page can't be written.
    """
    path = out if out is not None else folders[0] / "report.html"
    shown = write_report(folders, path, labels)
    size_mb = path.stat().st_size / 1e6
    runs = f"{shown['runs']} run" + ("s" if shown["runs"] != 1 else "")
    return f"{path}: {runs}, {shown['samples']:,} responses, {size_mb:.1f} MB. Open it in a browser."
