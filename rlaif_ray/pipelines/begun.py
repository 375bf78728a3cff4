"""What a run that goes on was begun with, where the config leaves it to the day or the machine that it begins on."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, TypeVar

from pydantic import BaseModel

from rlaif_ray.config.roles import Setting, settings, with_values
from rlaif_ray.documents import at, parse_json
from rlaif_ray.errors import CheckpointError, DocumentError
from rlaif_ray.output import say
from rlaif_ray.precision import chosen_precision
from rlaif_ray.storage import Place, StoredFolder, open_folder
from rlaif_ray.tracking.files import read_json, write_json

if TYPE_CHECKING:
    from pathlib import Path

    from rlaif_ray.config.load import Loaded

KEPT = "settings.json"  # where jobs without checkpoints keep their settings
STATE = "state.json"  # with the settings and the loop's state, in a checkpoint
PRECISION = "precision"  # in kept settings: what each precision came to, by dotted key
HEADER_BYTES = 100 << 20  # as much as safetensors takes
J = TypeVar("J", bound=BaseModel)


def kept_before(loaded: Loaded, state: Path) -> Iterator[tuple[Any, StoredFolder | None]]:
    """Settings of what this run may go on from, the newest first, with the checkpoint that has them.

    Args:
        state: where a job without checkpoints keeps what it goes on from.
    """
    checkpoint = getattr(loaded.config, "checkpoint", None)
    if checkpoint is None:
        with suppress(CheckpointError, DocumentError):
            yield parse_json((Place.of(state) / KEPT).read(), lenient=True), None
    elif checkpoint.resume != "never":
        place = Place.of(checkpoint.path or loaded.run_dir / "checkpoints")
        steps: list[int] = []
        with suppress(CheckpointError):  # whoever resumes from it says what is wrong
            steps = [int(name.removeprefix("step-")) for name in place.names() if re.fullmatch(r"step-\d+", name)]
        for step in sorted(steps, reverse=True):
            with suppress(CheckpointError, DocumentError):
                folder = open_folder(place / f"step-{step}", verify=False)[0]
                document = parse_json(folder.read(STATE), lenient=True)
                yield (document.get("settings") if isinstance(document, dict) else None), folder


# ---- Precision -------------------------------------------------------------------------------------------------------


def left_to_machine(job: BaseModel) -> Iterator[Setting]:
    """The settings of a job that say `auto`, and mean what suits the machine."""
    return (one for one in settings(job) if one.left_to_machine and one.value == "auto")


def in_kept_precision(job: J, kept: Any, folder: StoredFolder | None = None) -> J:
    """The job with every precision `auto` replaced by what it came to where `kept` was made, as far as that is known.

    Args:
        kept: settings, as they were kept; of any shape.
        folder: the checkpoint with them. Before precisions were kept, the learner's state shows which it was.
    """
    told: Mapping[str, Any] | None = at(kept, PRECISION, expected=dict)
    autos = list(left_to_machine(job))
    if told is None and folder is not None and at(kept, "config", "policy", "precision") == "auto":
        told = dict.fromkeys((".".join(one.key) for one in autos), _precision_of(folder))  # all autos were one
    found = {one.key: (told or {}).get(".".join(one.key)) for one in autos}
    return with_values(job, {key: value for key, value in found.items() if value in ("fp32", "bf16")})


def in_begun_precision(loaded: Loaded, state: Path) -> Any:
    """The job with every precision `auto` as in the run that it goes on from, and says so.

    Args:
        state: where a job without checkpoints keeps what it goes on from.
    """
    for kept, folder in kept_before(loaded, state):
        if isinstance(kept, dict):
            return _told(loaded.config, in_kept_precision(loaded.config, kept, folder))
    return loaded.config


def in_precision_of(job: J, state: Path) -> J:
    """The same, of a part of a job that keeps what it goes on from in the folder `state`."""
    return _told(job, in_kept_precision(job, read_json(state / KEPT)))


def keep_precision(state: Path, precisions: Mapping[str, str]) -> None:
    """Keeps in the folder `state` what each precision came to, for whoever goes on there."""
    kept = read_json(state / KEPT)
    if kept.get(PRECISION) != precisions:
        write_json(state / KEPT, {**kept, PRECISION: dict(precisions)})


def _told(job: J, found: J) -> J:
    """Says what replaced `auto`, where the CPUs of this machine alone might have chosen otherwise."""
    now = {one.key: one.value for one in settings(found) if one.left_to_machine}
    for value in sorted({now[one.key] for one in left_to_machine(job)} - {"auto", chosen_precision("auto", "cpu")}):
        names = [".".join(one.key) for one in left_to_machine(job) if now[one.key] == value]
        say(f"precision=auto stays {value}, which it was when this run began ({', '.join(names)})")
    return found


def _precision_of(folder: StoredFolder) -> str | None:
    """Of the learner whose state is in a checkpoint; None: it doesn't show."""
    names = [name.rpartition("/")[2] for name in folder.files]
    if any(name.startswith("zero_pp_rank_") for name in names) or any(name.startswith("bf16_") for name in names):
        return "bf16" if any(name.startswith("bf16_zero_pp_rank_") for name in names) else "fp32"
    whole = [name for name in folder.files if name.endswith("mp_rank_00_model_states.safetensors")]
    for name in whole[:1]:
        with suppress(CheckpointError, OSError, DocumentError, struct.error), (folder.place / name).opened() as file:
            (size,) = struct.unpack("<Q", file.read(8))
            header = parse_json(file.read(min(size, HEADER_BYTES)), dict, most_bytes=HEADER_BYTES, lenient=True)
            types = {at(entry, "dtype", expected=str) for entry in header.values()}
            return "bf16" if "BF16" in types else "fp32"
    return None
