"""The date that chat templates take for today: one for all of a run, also when it is resumed on another day."""

from __future__ import annotations

import datetime
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlaif_ray.errors import CheckpointError, InputError
from rlaif_ray.storage import Place

if TYPE_CHECKING:
    from rlaif_ray.config.load import Loaded

CHAT_DATE = "chat_date.json"


def with_chat_date(loaded: Loaded, today: str | None = None) -> Loaded:
    """The job with `chat_date` set: the config's, else that of the run that it goes on from, else today's.

    So a run that is resumed on another day reads the same prompts.

    Raises:
        InputError: the config's is not that of the run that it goes on from.
    """
    given, begun = loaded.config.chat_date, _begun(loaded)
    if given is not None and begun is not None and given != begun:
        raise InputError(
            f"chat_date must stay that of the run (got {given}; what is in {_place_of(loaded)} was begun with "
            f"{begun}): templates that write the date would give other prompts. Leave it out, or use another run_dir "
            f"or output."
        )
    date = given or begun or today or datetime.date.today().isoformat()
    return replace(loaded, config=loaded.config.model_copy(update={"chat_date": date}))


def keep_chat_date(loaded: Loaded) -> None:
    """Notes the date where a run that goes on from this one looks for it."""
    text = json.dumps({"chat_date": loaded.config.chat_date})
    (_place_of(loaded) / CHAT_DATE).write(text.encode())


def _begun(loaded: Loaded) -> str | None:
    """The date of the run that this one goes on from; None where it begins."""
    place, checkpoint = _place_of(loaded), getattr(loaded.config, "checkpoint", None)
    try:
        names = place.names()
        if CHAT_DATE not in names:
            return None
        if checkpoint is not None and (
            checkpoint.resume == "never" or not any(name.startswith("step-") for name in names)
        ):
            return None
        found = json.loads((place / CHAT_DATE).read())["chat_date"]
    except (CheckpointError, ValueError, LookupError, TypeError):  # whoever opens that place says what is wrong with it
        return None
    return found if isinstance(found, str) else None


def _place_of(loaded: Loaded) -> Place:
    """Where the job keeps what it goes on from."""
    checkpoint = getattr(loaded.config, "checkpoint", None)
    if checkpoint is not None:
        return Place.of(checkpoint.path or loaded.run_dir / "checkpoints")
    return Place.of(state_of(loaded))


def state_of(loaded: Loaded) -> Path:
    """Where a data-making job keeps what it goes on from: beside an output that the user named, else in its folder."""
    named = getattr(loaded.config, "output", None)
    if not named:
        return loaded.run_dir
    output = Path(named).expanduser()
    return output.with_name(f"{output.name}.state")
