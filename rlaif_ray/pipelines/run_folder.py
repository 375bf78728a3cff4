"""A run's own folder, and how a run is asked to stop."""

from __future__ import annotations

import hashlib
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, Any

from rlaif_ray.config.resolved import git_revision, resolved_yaml, versions
from rlaif_ray.errors import InputError
from rlaif_ray.tracking.files import plain, read_json, write_json

if TYPE_CHECKING:
    from rlaif_ray.config.load import Loaded


def make_folder(run_dir: Path) -> None:
    """The run's own folder, tried before anything starts; what is in it stays.

    Raises:
        InputError: it can't be written.
    """
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=run_dir):
            pass
    except OSError as error:
        raise InputError(
            f"run_dir must be a folder this process can write (got {run_dir}): {error.strerror or error}. "
            f"Choose another with run_dir=PATH."
        ) from error


def state_folder(run_dir: Path, output: Path, given: str | None) -> Path:
    """Where a data-making job keeps what it goes on from: beside an `output` that the user named, so that the same
    command finds it again; else in the run's own folder."""
    return run_dir if given is None else output.with_name(f"{output.name}.state")


def fingerprint(path: str) -> str:
    """SHA-256 of a local file; of anything else its name is all that is known."""
    file = Path(path).expanduser()
    if not file.is_file():
        return path
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def must_be_same_run(folder: Path, job: str, identity: dict[str, Any]) -> None:
    """Notes in the folder what its results follow from; a run that goes on in it must have the same.

    Raises:
        InputError: the folder's results were made from something else.
    """
    run_dir, path = folder, folder / "identity.json"
    wanted = {"job": job, **plain(identity)}
    stored = read_json(path)
    changed = [key for key in {**stored, **wanted} if stored and stored.get(key) != wanted.get(key)]
    if changed:
        told = "; ".join(f"{key} was {stored.get(key)!r} and is {wanted.get(key)!r}" for key in changed)
        raise InputError(
            f"{run_dir} holds results of another run ({told}): they would be mixed. Use its settings, name another "
            f"run_dir or output, or remove that folder and its results to start over."
        )
    write_json(path, wanted)


def write_resolved(loaded: Loaded) -> None:
    """resolved.yaml: every value, versions and git revision."""
    text = resolved_yaml(loaded, versions(), git_revision(Path(__file__).parent))
    (loaded.run_dir / "resolved.yaml").write_text(text)


@contextmanager
def stop_when_asked() -> Iterator[Callable[[], bool]]:
    """Within it the first Ctrl-C asks to stop at a good moment, such as after a step; the second stops at once."""
    asked = False

    def handle(number: int, frame: Any) -> None:
        nonlocal asked
        if asked:
            raise KeyboardInterrupt
        asked = True

    before = signal.signal(signal.SIGINT, handle)
    try:
        yield lambda: asked
    finally:
        signal.signal(signal.SIGINT, before)
