"""The date that chat templates take for today: one for all of a run, also when it is resumed on another day."""

from __future__ import annotations

import datetime
import json
import re
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from rlaif_ray.errors import CheckpointError, InputError
from rlaif_ray.pipelines.checkpoint import STATE
from rlaif_ray.storage import Place

if TYPE_CHECKING:
    from rlaif_ray.config.load import Loaded

CHAT_DATE = "chat_date"


def with_chat_date(loaded: Loaded, today: str | None = None) -> Loaded:
    """The job with `chat_date` set: the config's, else that of the run that it goes on from, else today's.

    So a run that is resumed on another day reads the same prompts.

    Raises:
        InputError: the config's is not that of the run that it goes on from.
    """
    given, begun = loaded.config.chat_date, _begun(loaded)
    if given is not None and begun is not None and given != begun:
        raise InputError(
            f"chat_date must stay that of the run (got {given}; what is in {loaded.run_dir} was begun with {begun}): "
            f"templates that write the date would give other prompts. Leave it out, or use another run_dir or output."
        )
    date = given or begun or today or datetime.date.today().isoformat()
    return replace(loaded, config=loaded.config.model_copy(update={"chat_date": date}))


def keep_chat_date(loaded: Loaded) -> None:
    """Notes the date of a job without checkpoints where a run that goes on from it looks; checkpoints have theirs."""
    text = json.dumps({CHAT_DATE: loaded.config.chat_date})
    (Place.of(state_of(loaded)) / f"{CHAT_DATE}.json").write(text.encode())


def _begun(loaded: Loaded) -> str | None:
    """The date of the run that this one goes on from; None where it begins."""
    for document in _documents(loaded):
        try:
            found = json.loads(document.read())[CHAT_DATE]
        except (CheckpointError, ValueError, LookupError, TypeError):  # whoever resumes from it says what is wrong
            continue
        return found if isinstance(found, str) else None
    return None


def _documents(loaded: Loaded) -> Iterator[Place]:
    """Where the date may be noted, the newest first."""
    checkpoint = getattr(loaded.config, "checkpoint", None)
    if checkpoint is None:
        yield Place.of(state_of(loaded)) / f"{CHAT_DATE}.json"
    elif checkpoint.resume != "never":
        place = Place.of(checkpoint.path or loaded.run_dir / "checkpoints")
        with suppress(CheckpointError):  # as above
            steps = [int(name.removeprefix("step-")) for name in place.names() if re.fullmatch(r"step-\d+", name)]
            for step in sorted(steps, reverse=True):
                yield place / f"step-{step}" / STATE


def state_of(loaded: Loaded) -> Path:
    """Where a data-making job keeps what it goes on from: beside an output that the user named, else in its folder."""
    named = getattr(loaded.config, "output", None)
    if not named:
        return loaded.run_dir
    output = Path(named).expanduser()
    return output.with_name(f"{output.name}.state")
