"""Whose checkpoints are at `checkpoint.path`: one run's, and written by one process of it at a time.

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
from rlaif_ray.errors import CheckpointError, CheckpointTakenError, DocumentError, InputError
from rlaif_ray.pipelines.run_folder import hold_folder
from rlaif_ray.storage import Place, told
from rlaif_ray.writing import replace_bytes, replace_text

OWNER = "owner.json"
RUN_ID = "run_id.txt"  # in the run's folder: so that it is known again where the folder has moved
OWNER_BYTES = 1 << 16


@dataclass(frozen=True, slots=True)
class Owner:
    """What owner.json says."""

    run: str  # id, 32 hex digits
    run_dir: str  # absolute
    process: str  # who writes, such as "process 7 on node-3"
    session: str  # no other process's
    since: str  # when it began to


class Ownership:
    """A run's right to a place. A lock keeps a second process out where the file system has locks; elsewhere whoever
    claims the place later ends the claim before."""

    def __init__(self, place: Place, run_dir: Path, *, take_over: bool) -> None:
        """Looks only, so that a start that is refused for something else leaves whoever is at work there alone.

        Args:
            take_over: whatever run's it is.

        Raises:
            InputError: it is in use by another process.
        """
        self._place, self._run_dir, self._take_over = place, run_dir, take_over
        self._session: str | None = None
        if place.folder is not None:
            place.folder.mkdir(parents=True, exist_ok=True)
            hold_folder(place.folder, "checkpoint.path")

    def check(self, has_checkpoints: bool) -> None:
        """A run is known by the id in its folder, and by the folder's path where there is no id: a new machine has the
        config alone.

        Raises:
            InputError: the place is another run's, or has checkpoints of an unknown one.
            CheckpointError: it can't be read.
        """
        if self._take_over:
            return
        found = _read(self._place)
        if found is None and has_checkpoints:
            raise InputError(
                f"checkpoint.path={self._place} has checkpoints of an unknown run (got no {OWNER} beside them): this "
                f"run would go on from them, and remove them. Set checkpoint.resume=take_over if they are this run's, "
                f"or use another checkpoint.path."
            )
        if found is not None and not _is_of(found, self._run_dir):
            raise InputError(
                f"checkpoint.path={self._place} has the checkpoints of another run, that of {found.run_dir} (got "
                f"run_dir={self._run_dir.absolute()}): this one would go on from them, and remove them. Use another "
                f"checkpoint.path; or run_dir={found.run_dir} to go on with that run; or checkpoint.resume=take_over "
                f"to go on from its checkpoints in this folder."
            )

    def claim(self) -> str | None:
        """Makes the place this run's, and this process the one that writes there; returns what to say of who was it.

        Raises:
            CheckpointError: it can't be written.
        """
        found, known_as = self._found(), _run_id(self._run_dir)
        run = known_as or (found.run if found else None)
        if run is None or (found is not None and self._take_over):  # the run that had the place keeps its id
            run = uuid.uuid4().hex
        process = f"process {os.getpid()} on {socket.gethostname()}"
        self._session = uuid.uuid4().hex
        since = time.strftime("%Y-%m-%d %H:%M:%S")
        owner = Owner(run, str(self._run_dir.absolute()), process, self._session, since)
        data = json.dumps(asdict(owner), indent=1).encode()
        try:
            if run != known_as and self._run_dir.is_dir():
                replace_text(self._run_dir / RUN_ID, run + "\n")
            if self._place.folder is not None:
                replace_bytes(self._place.folder / OWNER, data)  # one that is half written would refuse every start
            else:
                (self._place / OWNER).write(data)
        except OSError as error:
            raise CheckpointError(f"{self._place / OWNER} can't be written ({told(error)}).") from error
        if found is None or (known_as == found.run and not self._take_over):
            return None
        before = f"was last written by {found.process}, which began {found.since}"
        return f"checkpoint.path={self._place} {before}; it is this process's now"

    def verify(self) -> None:
        """Raises CheckpointTakenError: another process has claimed the place since, where no lock could keep it out."""
        if self._session is None:
            return
        found = _read(self._place)
        if found is None or found.session != self._session:
            who = f"somebody removed its {OWNER}" if found is None else f"{found.process} took it at {found.since}"
            raise CheckpointTakenError(
                f"{self._place} is no longer this run's: {who}. Two processes would remove each other's checkpoints, "
                f"so this one writes none there. Let the other one go on, or end it before you start this one again."
            )

    def _found(self) -> Owner | None:
        try:
            return _read(self._place)
        except CheckpointError:
            if self._take_over:
                return None
            raise


def belongs_to_another(place: Place, run_dir: Path) -> bool:
    """Whether the checkpoints there are known to be another folder's run's."""
    found = _read(place)
    return found is not None and not _is_of(found, run_dir)


def _is_of(owner: Owner, run_dir: Path) -> bool:
    known_as, here = _run_id(run_dir), str(run_dir.absolute())
    if known_as is None:
        return owner.run_dir == here
    # A folder with the id of one that is still there is a copy of it: another run.
    return owner.run == known_as and (owner.run_dir == here or _run_id(Path(owner.run_dir)) != known_as)


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
    except FileNotFoundError:  # gone meanwhile
        return None
    except (OSError, DocumentError, TypeError) as error:
        raise CheckpointError(
            f"{where} can't be read ({told(error)}): it says which run these checkpoints belong to. Set "
            f"checkpoint.resume=take_over if they are this run's, or use another checkpoint.path."
        ) from error
    return owner
