"""Checkpoints of a run: whole or not there, verified before a run resumes from them, written while training goes on."""

from __future__ import annotations

import json
import re
import threading
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol

from rlaif_ray.config.jobs import SupervisedJob, TrainJob
from rlaif_ray.config.resolved import versions
from rlaif_ray.documents import parse_json
from rlaif_ray.errors import CheckpointError, CheckpointTakenError, DocumentError, InputError
from rlaif_ray.pipelines.begun import PRECISION, STATE
from rlaif_ray.pipelines.checkpoint_owner import Ownership
from rlaif_ray.pipelines.inputs import contents
from rlaif_ray.pipelines.settings import changed_settings, history, kept_settings, noted
from rlaif_ray.storage import MANIFEST, TOKEN, Place, StoredFolder, draft, is_stored_folder, open_folder, publish, told

if TYPE_CHECKING:
    from rlaif_ray.data.identity import Content
    from rlaif_ray.interfaces import WrittenFiles

PROBE = ".partial-probe"
# Names of what is being written or removed: storage.draft and Place.remove make them.
UNFINISHED = re.compile(rf"(\.partial-)+(probe|step-\d+-({TOKEN.pattern}|removed))(-removed)*")
END_S = 60.0  # how long a run that fails waits for a checkpoint that is being written


class Checkpointed(Protocol):
    """What has its own part in a checkpoint."""

    def save_checkpoint(self, place: Place) -> WrittenFiles: ...


@dataclass(slots=True)
class RunState:
    """What the loop carries from step to step, beside the learner's own state."""

    step: int = 0
    kl_coef: float = 0.0
    prompts: dict[str, Any] = field(default_factory=dict)  # PromptSource.state()
    held_out_before: list[float | None] | None = None
    held_out_prompts: str | None = None  # hash of the prompts that held_out_before is of
    wandb_run_id: str | None = None
    changes: list[dict[str, Any]] = field(default_factory=list)  # settings changed on the way, as settings.noted has it


@dataclass(frozen=True, slots=True)
class Saved:
    """A checkpoint that is whole, every file of it verified."""

    step: int
    folder: StoredFolder
    document: dict[str, Any]  # of state.json

    def __str__(self) -> str:
        return str(self.folder.place)


def due(step: int, every: int, last: int | None = None) -> bool:
    """Whether something that happens every so many steps (0: never), and at the last, happens now."""
    return every > 0 and (step % every == 0 or step == last)


# ---- Going on --------------------------------------------------------------------------------------------------------


def read_state(
    saved: Saved, job: TrainJob | SupervisedJob, steps: int, now: Mapping[str, Content] | None = None
) -> RunState:
    """The loop's state in a checkpoint of a run of so many steps; settings that have changed since are noted in it.

    `now` is what the job's inputs held when this process began; looked at here where it isn't given.

    Raises:
        InputError: the config differs from the checkpoint's in something that can't change on the way.
        CheckpointError: the state is no such state.
    """
    where = str(saved).rpartition("/step-")[0]
    try:
        state = RunState(**saved.document["state"])
        if state.step != saved.step:
            raise ValueError(f"its step is {state.step}")
        found = changed_settings(
            saved.document["settings"],
            job,
            now,
            holds=f"{where} has a checkpoint of another run",
            anew="another run_dir, or checkpoint.resume=never",
            folder=saved.folder,
        )
    except InputError:
        raise
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"checkpoint {saved} can't be resumed ({told(error)}): another version of rlaif_ray wrote it. Use "
            f"that version, or checkpoint.resume=never or another run_dir to start over."
        ) from error
    if state.step > steps:
        raise InputError(
            f"steps must be at least the {state.step} of the checkpoint in {where} (got {steps}). "
            f"Raise it, or use another run_dir, or checkpoint.resume=never to start over."
        )
    state.changes = [*state.changes, *noted(found, state.step)]
    return state


def new_changes(saved: Saved | None, state: RunState) -> list[str]:
    """Of what read_state noted, a line each, what the checkpoint had not."""
    return [] if saved is None else history(state.changes[len(saved.document["state"].get("changes", [])) :])


def other_versions(saved: Saved) -> list[str]:
    """Packages whose major version has changed since, such as "torch 2.13.0, now 3.0.0"."""
    now = versions()
    return [
        f"{name} {then}, now {now[name]}"
        for name, then in saved.document.get("versions", {}).items()
        if name in now and then.split(".")[0] != now[name].split(".")[0]
    ]


def open_checkpoints(job: TrainJob | SupervisedJob, run_dir: Path) -> Checkpoints:
    """The run's checkpoints, below checkpoint.path or in the run's own folder.

    Raises:
        InputError: checkpoint.path can't be reached or written, or is another run's.
    """
    given = job.checkpoint.path
    place = Place.of(given or run_dir / "checkpoints")
    ownership = None
    if given is not None:
        probe = place / PROBE
        try:
            probe.write(b"")
            probe.remove()
            ownership = Ownership(place, run_dir, take_over=job.checkpoint.resume == "take_over")
            ownership.check(bool(_steps(place)))
        except (CheckpointError, OSError) as error:
            raise InputError(
                f"checkpoint.path must be a place that can be written (got {place}): {error} "
                f"Correct the address or its permissions, or choose another with checkpoint.path=ADDRESS."
            ) from error
    return Checkpoints(job, place, ownership)


def remove_checkpoints(place: Place) -> None:
    """Removes the checkpoints there, whole, damaged or half written; what is none of ours stays.

    Raises:
        CheckpointError: one can't be removed.
    """
    for name in place.names():
        if _is_ours(place, name):
            (place / name).remove()


def _steps(place: Place) -> list[int]:
    """Of all that are there, damaged ones too."""
    found = [step for name in place.names() if (step := _step_of(name)) is not None]
    if place.folder is None:  # there, without a manifest it is an upload that was cut off
        found = [step for step in found if MANIFEST in (place / f"step-{step}").names()]
    return sorted(found)


def _is_ours(place: Place, name: str) -> bool:
    """Whether `name` at this place is a checkpoint, or one that was being written or removed."""
    if UNFINISHED.fullmatch(name):
        return True
    if _step_of(name) is None:
        return False
    step = place / name
    if is_stored_folder(step):
        return True
    # On an object store an upload that was cut off has the step's name, and no manifest yet.
    return step.folder is None and all(TOKEN.fullmatch(each) for each in step.names())


class Checkpoints:
    """The checkpoints of one run. At most one is being written at a time, by a thread; leaving `with` waits for it.

    An error in writing comes out at the next call of `check`, `save` or `wait`.
    """

    def __init__(self, job: TrainJob | SupervisedJob, place: Place, ownership: Ownership | None = None) -> None:
        self._job, self._cfg, self.place, self._ownership = job, job.checkpoint, place, ownership
        self.holds = contents(job)  # now: a file may change while the run goes on with what it has read
        self._settings = kept_settings(job, self.holds)
        self._last: int | None = None  # the step that was saved last
        self._damaged: set[int] = set()  # those that were passed over
        self._writing: _Writing | None = None
        self._held: list[str] = []  # notes that nobody listened to
        self._note: Callable[[str], None] = self._held.append

    def computed_in(self, precisions: Mapping[str, str]) -> None:
        """What each `precision` of the job comes to here, by dotted key: it stands in every checkpoint from now on."""
        self._settings[PRECISION] = dict(precisions)

    def tell(self, note: Callable[[str], None]) -> None:
        """`note` is told of what was found wrong so far, and from now on."""
        for text in self._held:
            note(text)
        self._held, self._note = [], note

    def __enter__(self) -> Checkpoints:
        if self._ownership is not None and (before := self._ownership.claim()) is not None:
            self._note(before)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self.wait()
        elif isinstance(error, Exception):  # whoever interrupts doesn't wait
            self.settle()

    def to_resume(self) -> Saved | None:
        """The newest that is whole, if the config lets it be resumed.

        Raises:
            CheckpointError: there are some, and all are damaged.
        """
        saved = None if self._cfg.resume == "never" else self.newest()
        if saved is not None:
            for change in other_versions(saved):
                self._note(f"the checkpoint was written with {change}")
        return saved

    def newest(self) -> Saved | None:
        """The newest that is whole; None where there is none at all. What is damaged is passed over, with a note.

        Raises:
            CheckpointError: there are some, and all are damaged.
        """
        damaged = []
        for step in reversed(_steps(self.place)):
            try:
                saved = _open(self.place, step)
            except CheckpointError as error:
                damaged.append(str(error))
                self._damaged.add(step)
                self._note(f"checkpoint step-{step} is passed over: {error}")
                continue
            self._last = step
            return saved
        self._last = None
        if damaged:
            raise CheckpointError(
                f"of the {len(damaged)} checkpoints in {self.place} none can be resumed: {' '.join(damaged)} "
                f"Restore one, or use checkpoint.resume=never or another run_dir to start over."
            )
        return None

    def start_over(self) -> None:
        """Removes what this run wrote there before it starts anew; what has no manifest of ours stays.

        Raises:
            CheckpointError: it can't be removed, or another process has claimed the place.
        """
        self._verify_ownership()
        remove_checkpoints(self.place)

    def save(self, learner: Checkpointed, state: RunState) -> None:
        """Writes `step-N`, unless it is there; then old ones go. Returns once the learner has copied its state, or,
        without checkpoint.background, once all is done.

        Raises:
            CheckpointError: this one or the one before could not be written; those before are intact.
        """
        self.wait()
        step = state.step  # the loop goes on to change the state
        if self._last == step:
            return
        final = self.place / f"step-{step}"
        place = draft(final, uuid.uuid4().hex[:8])
        document = {"state": asdict(state), "settings": self._settings, "versions": versions()}
        data = json.dumps(document, indent=1).encode()
        with _told_well(final):
            written = learner.save_checkpoint(place)

        def finish() -> None:
            files = {**written(), STATE: (place / STATE).write(data)}
            self._verify_ownership()  # the upload may have taken minutes
            publish(StoredFolder(place, files), final, step=step)
            self._damaged.discard(step)
            self._verify_ownership()
            self._prune(step)

        self._last = step
        self._writing = _Writing(finish, place, final)
        if not self._cfg.background:
            self.wait()

    def check(self) -> None:
        """Never waits.

        Raises:
            CheckpointError: the one that was being written could not be.
            LearnerLostError: a learner rank was lost over it.
        """
        if self._writing is not None and self._writing.ended(0):
            self.wait()

    def wait(self) -> None:
        """Until none is being written.

        Raises:
            CheckpointError: it could not be written, or not in time.
            LearnerLostError: a learner rank was lost over it.
        """
        writing, limit_s = self._writing, self._job.cluster.call_timeout_s
        if writing is None:
            return
        if not writing.ended(limit_s):
            raise CheckpointError(
                f"checkpoint {writing.final} was not written within cluster.call_timeout_s={limit_s:g} s. Look at "
                f"that storage; raise the limit if it takes so long."
            )
        self._writing = None
        if writing.error is not None:
            self._last = None
            with _told_well(writing.final):
                raise writing.error

    def settle(self) -> None:
        """Until none is being written, for a while; what went wrong is no more than a note."""
        writing, self._writing = self._writing, None
        if writing is None or (writing.ended(END_S) and writing.error is None):
            return
        self._last = None
        self._note(f"checkpoint {writing.final} was not written: {writing.error or 'it takes too long'}")

    @property
    def last(self) -> str | None:
        """The newest that is whole, written or found by this process; None without any."""
        return None if self._last is None else str(self.place / f"step-{self._last}")

    def _prune(self, now: int) -> None:
        """Removes all but the last few, and what was left unfinished."""
        try:
            steps = [step for step in _steps(self.place) if step not in self._damaged]
            # Later ones than this are damaged: they stay until the run comes by again.
            kept = {step for step in steps if step > now} | {*[s for s in steps if s <= now][-self._cfg.keep :]}
            kept |= {step for step in self._damaged if step > now}
            names = self.place.names()
        except CheckpointError as error:
            self._note(f"old checkpoints stay: {error}")
            return
        for name in names:
            try:
                if _step_of(name) not in kept and _is_ours(self.place, name):
                    (self.place / name).remove()
            except CheckpointError as error:
                self._note(f"an old checkpoint stays: {error}")

    def _verify_ownership(self) -> None:
        if self._ownership is not None:
            self._ownership.verify()


class _Writing:
    """A checkpoint that is being written, by a thread."""

    def __init__(self, finish: Callable[[], None], place: Place, final: Place) -> None:
        self.final = final
        self.error: BaseException | None = None
        self._finish, self._place = finish, place
        self._thread = threading.Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    def ended(self, within_s: float) -> bool:
        self._thread.join(within_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            self._finish()
        except BaseException as error:
            self.error = error
            with suppress(CheckpointError):
                self._place.remove()  # it may be what fills the disk


@contextmanager
def _told_well(final: Place) -> Iterator[None]:
    """Says of what kept a checkpoint from being written that the one before is intact, and how to go on."""
    try:
        yield
    except CheckpointTakenError:
        raise
    except (CheckpointError, OSError) as error:
        raise CheckpointError(
            f"checkpoint {final} could not be written: {error if isinstance(error, CheckpointError) else told(error)} "
            f"The one before is intact. Free space or correct permissions, then start the same command again."
        ) from error


def _open(root: Place, step: int) -> Saved:
    folder, facts = open_folder(root / f"step-{step}")
    if facts.get("step") != step:
        raise CheckpointError(f"{root / f'step-{step}'} is of step {facts.get('step')}: it was renamed, or copied.")
    try:
        document = parse_json(folder.read(STATE), dict, lenient=True)
    except DocumentError as error:
        raise CheckpointError(f"{folder.place / STATE} can't be read: it {error}.") from error
    return Saved(step, folder, document)


def _step_of(name: str) -> int | None:
    found = re.fullmatch(r"step-(0|[1-9][0-9]*)", name)
    return int(found[1]) if found else None
