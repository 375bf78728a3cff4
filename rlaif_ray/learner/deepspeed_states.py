"""The states of DeepSpeed engines, taken and put back without its files.

DeepSpeed's own way to files is torch.save and torch.load, which pickle. Here it hands its states to a checkpoint
engine of ours and takes them from there, and never sees a file but empty ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory, gettempdir
from typing import Any

from deepspeed.runtime.checkpoint_engine.checkpoint_engine import CheckpointEngine
from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum
from deepspeed.utils.tensor_fragment import fragment_address

from rlaif_ray.errors import CheckpointError
from rlaif_ray.learner.mixed_precision import keep_master
from rlaif_ray.learner.state_files import SUFFIX, HostState, copy_to_host, read_state
from rlaif_ray.storage import StoredFolder, told

TAG = "state"  # DeepSpeed's name of what it saves, part of every path it makes up
# Classes of DeepSpeed's own that its states hold instances of: plain data, all of them.
OBJECTS = {kind.__name__: kind for kind in (DynamicLossScaler, LossScaler, ZeroStageEnum, fragment_address)}


class StatesInMemory(CheckpointEngine):  # type: ignore[misc]
    """DeepSpeed's idea of files: what it saves is copied to host memory, what it loads is given by `give`."""

    def __init__(self, give: Callable[[str], Any]) -> None:
        super().__init__()
        self.name = "rlaif_ray"
        self.taken: dict[str, HostState] = {}  # by file name without ending
        self._give = give

    def create(self, info: Any) -> None:
        pass

    def save(self, state_dict: Any, path: str) -> None:
        self.taken[Path(path).stem] = copy_to_host(state_dict, OBJECTS)

    def load(self, path: str, map_location: Any = None) -> Any:
        return self._give(Path(path).stem)

    def commit(self, info: Any) -> bool:
        return True


def copy_engine(engine: Any) -> dict[str, HostState]:
    """All that DeepSpeed would save of an engine on this rank, by file name without ending. A collective.

    Raises:
        CheckpointError: something in it can't be stored.
    """
    if engine.zero_nvme_offload_optimizer():
        raise CheckpointError(
            "an optimizer on NVMe can't be checkpointed: DeepSpeed keeps it in files of its own. Offload it to the "
            "CPU in learner.deepspeed_overrides, or set checkpoint.every=0."
        )
    try:
        with _without_files(engine) as (states, folder):
            engine.save_checkpoint(folder, tag=TAG, save_latest=False)
    except OSError as error:
        raise CheckpointError(f"DeepSpeed can't use a folder in {gettempdir()} ({told(error)}).") from error
    return states.taken


def restore_engine(engine: Any, stored: StoredFolder, name: str) -> None:
    """Puts an engine back to what is stored below `name`. A collective.

    Raises:
        CheckpointError: a file is damaged, or another run's.
    """
    read: dict[str, Any] = {}  # DeepSpeed asks for one file twice

    def give(file: str) -> Any:
        if file not in read:
            read[file] = read_state(stored, f"{name}/{file}{SUFFIX}", OBJECTS)
        return read[file]

    with _without_files(engine, give) as (_, folder):
        for file in stored.files:
            if file.startswith(f"{name}/"):  # DeepSpeed looks whether its files are there
                place_holder = Path(folder, TAG, Path(file).stem).with_suffix(".pt")
                place_holder.parent.mkdir(exist_ok=True)
                place_holder.touch()
        try:
            with redirect_stdout(StringIO()):  # DeepSpeed prints what it is at
                path, _ = engine.load_checkpoint(folder, tag=TAG)
        except (AssertionError, AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            if isinstance(error, CheckpointError) and _other_precision(engine, stored, name) is None:
                raise
            raise CheckpointError(
                _other_precision(engine, stored, name)
                or f"{stored.place} does not fit the learner ({name}: {told(error)}): it was written with another "
                f"model, precision or learner.deepspeed_overrides. Use those again, or another run_dir."
            ) from error
    if path is None:
        other = _other_precision(engine, stored, name)
        raise CheckpointError(other or f"{stored.place} has nothing of {name} for this rank: it is of another layout.")
    keep_master(engine)


def _other_precision(engine: Any, stored: StoredFolder, name: str) -> str | None:
    """What to say of a checkpoint that does not fit, where it is of another precision: DeepSpeed names the files of a
    run in bf16 differently."""
    files = [file.rpartition("/")[2] for file in stored.files if file.startswith(f"{name}/")]
    was = "bf16" if any(file.startswith("bf16_zero_") for file in files) else "fp32"
    now = "bf16" if engine.bfloat16_enabled() else "fp32"
    if not files or was == now:
        return None
    return (
        f"{stored.place} was written by a run in {was} and this one is in {now}: their states don't fit each other. "
        f"Set policy.precision={was} to go on, or use another run_dir."
    )


def _nothing(file: str) -> Any:
    raise AssertionError(f"{file} is not expected to be loaded")


@contextmanager
def _without_files(engine: Any, give: Callable[[str], Any] = _nothing) -> Iterator[tuple[StatesInMemory, str]]:
    """Our checkpoint engine in the place of DeepSpeed's, and a folder for whatever it leaves beside it (scripts)."""
    before, engine.checkpoint_engine = engine.checkpoint_engine, StatesInMemory(give)
    try:
        with TemporaryDirectory(prefix="rlaif-checkpoint-") as folder:
            yield engine.checkpoint_engine, folder
    finally:
        engine.checkpoint_engine = before
