"""Whose checkpoints are at `checkpoint.path`: of one run, and written by one process of it at a time.

Checkpoints in the run's own folder need no owner: the folder is the run's. A place that a config names may be named by
two: the second would go on from the first one's last step, or remove it.
"""

from __future__ import annotations

import json
import os
import re
import socket
import time
import uuid
from dataclasses import asdict, dataclass
from pathlib import Path

from rlaif_ray.documents import parse_json
from rlaif_ray.errors import CheckpointError, DocumentError, InputError
from rlaif_ray.pipelines.run_folder import hold_folder
from rlaif_ray.storage import Place, told
from rlaif_ray.writing import replace_text

OWNER = "owner.json"
RUN_ID = "run_id.txt"  # in the run's folder: so that it is known again where the folder has moved
OWNER_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Owner:
    """What owner.json says."""

    run: str  # id, 32 hex digits
    run_dir: str  # as the config has it: relative to a working directory that may be another one next time
    process: str  # who writes, such as "process 7 on node-3"
    session: str  # no other process's
    since: str  # when it began to


class Claim:
    """A place that this process writes checkpoints to. Whoever claims it later ends this claim."""

    def __init__(self, place: Place, owner: Owner) -> None:
        self._place, self._owner = place, owner

    def check(self) -> None:
        """Raises CheckpointError: another process has claimed the place since, where no lock could keep it out."""
        found = _read(self._place)
        if found is None or found.session != self._owner.session:
            who = (
                "somebody removed its owner.json" if found is None else f"{found.process} took it over at {found.since}"
            )
            raise CheckpointError(
                f"{self._place} is no longer this run's: {who}. Two processes would remove each other's checkpoints, "
                f"so this one writes none there. End one of them, then resume the other."
            )


def claim_checkpoints(place: Place, run_dir: Path, *, take_over: bool) -> Claim:
    """Makes the place this run's, and this process the one that writes there.

    A run is known by the id in its folder, and by the folder's path where there is no id: a new machine has the config
    alone.

    Args:
        take_over: of whatever run it is.

    Raises:
        InputError: it is another run's, or in use by another process.
        CheckpointError: it can't be read or written.
    """
    if place.folder is not None:
        place.folder.mkdir(parents=True, exist_ok=True)
        hold_folder(place.folder, "checkpoint.path")
    found, known_as = _read(place), _run_id(run_dir)
    here = str(run_dir)
    if found is not None and not take_over and (found.run != known_as if known_as else found.run_dir != here):
        raise InputError(
            f"checkpoint.path={place} has the checkpoints of another run, that of {found.run_dir} (got "
            f"run_dir={here}): this one would go on from them, and remove them. Use another checkpoint.path; or "
            f"run_dir={found.run_dir} to go on with that run; or checkpoint.resume=take_over to go on from its "
            f"checkpoints in this folder."
        )
    run = found.run if found is not None else known_as or uuid.uuid4().hex
    process = f"process {os.getpid()} on {socket.gethostname()}"
    owner = Owner(run, here, process, uuid.uuid4().hex, time.strftime("%Y-%m-%d %H:%M:%S"))
    if run != known_as and run_dir.is_dir():
        replace_text(run_dir / RUN_ID, run + "\n")
    (place / OWNER).write(json.dumps(asdict(owner), indent=1).encode())
    return Claim(place, owner)


def is_owned_by(place: Place, run_dir: Path) -> bool:
    """Whether the checkpoints there are that folder's run's."""
    found = _read(place)
    return found is not None and (found.run == _run_id(run_dir) or found.run_dir == str(run_dir))


def _run_id(run_dir: Path) -> str | None:
    try:
        with (run_dir / RUN_ID).open("rb") as file:
            text = file.read(100).decode("ascii", "replace").strip()
    except OSError:
        return None
    return text if re.fullmatch(r"[0-9a-f]{32}", text) else None


def _read(place: Place) -> Owner | None:
    """None where there is none."""
    if OWNER not in place.names():
        return None
    where = place / OWNER
    try:
        with where.opened() as file:
            owner = Owner(**parse_json(file.read(OWNER_BYTES + 1), dict, most_bytes=OWNER_BYTES))
        if not all(isinstance(value, str) for value in asdict(owner).values()):
            raise TypeError("a value is no text")
    except (OSError, DocumentError, TypeError) as error:
        raise CheckpointError(
            f"{where} can't be read ({told(error)}): it says which run the checkpoints there are of. Remove "
            f"it if they are this run's, or use another checkpoint.path."
        ) from error
    return owner
