"""The date that chat templates take for today: one for all of a run, also when it is resumed on another day."""

from __future__ import annotations

import datetime
import re
from dataclasses import replace
from typing import TYPE_CHECKING

from rlaif_ray.documents import at
from rlaif_ray.errors import InputError
from rlaif_ray.pipelines.begun import kept_before
from rlaif_ray.pipelines.run_folder import state_of
from rlaif_ray.tracking.files import read_json, write_json

if TYPE_CHECKING:
    from pathlib import Path

    from rlaif_ray.config.load import Loaded

_DATE = re.compile(r"\d{4}-\d\d-\d\d")
OF_A_PIPELINE = "pipeline.json"  # in its folder


def with_chat_date(loaded: Loaded, today: str | None = None) -> Loaded:
    """The job with `chat_date` set: the config's, else that of the run that it goes on from, else today's.

    So a run that is resumed on another day reads the same prompts. From here on the date is a setting like others: kept
    with them, and another one is refused where results of both would be mixed.
    """
    date = loaded.config.chat_date or _begun(loaded) or today or datetime.date.today().isoformat()
    return replace(loaded, config=loaded.config.model_copy(update={"chat_date": date}))


def pipeline_date(folder: Path, today: str | None = None) -> str:
    """The date of all stages of the pipeline in `folder` that set none: that of its first day, kept there."""
    path = folder / OF_A_PIPELINE
    if path.exists():
        kept = at(read_json(path), "chat_date", expected=str)
        if kept is None or not _DATE.fullmatch(kept):
            raise InputError(
                f"{path} must say at which day the pipeline began (got no chat_date in it, or no JSON): its stages "
                f"would not all read the same prompts. Restore it, or write the day into it, such as "
                f'{{"chat_date": "2026-01-31"}}.'
            )
        return kept
    date = today or datetime.date.today().isoformat()
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / OF_A_PIPELINE, {"chat_date": date})
    return date


def _begun(loaded: Loaded) -> str | None:
    """The date of the run that this one goes on from; None where it begins."""
    for kept, _ in kept_before(loaded, state_of(loaded)):
        settings = at(kept, "config", expected=dict) or {}
        if "chat_date" in settings:  # else whoever goes on from it says what is wrong
            found = at(settings, "chat_date", expected=str) or ""
            return found if _DATE.fullmatch(found) else None
    return None
