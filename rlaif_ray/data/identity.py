"""What an input is, by what it holds: a file, a folder of data, a model, something on the hub.

A path is no identity: a model that is trained anew in place, or a file that was replaced, has the same name and other
content. What a job reads is looked at when it begins, before it reads; again when it ends; and when it goes on later.

Files are hashed whole with XXH3 (several GB/s). The digest of a large one is noted in the cache folder together with
size, time of change and inode, and is taken from there as long as these are the same.
"""

from __future__ import annotations

import importlib.metadata
import re
import time
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest, xxh3_128

from rlaif_ray.data.prompts import PACKAGED, files_of_split, hub_reference
from rlaif_ray.documents import at
from rlaif_ray.errors import InputError, RunError
from rlaif_ray.models import cache_folder
from rlaif_ray.paths import expand_home
from rlaif_ray.tracking.files import read_json, write_json
from rlaif_ray.tracking.progress import SILENT_S, ItemProgress

LARGE = 64 << 20  # bytes; from here on a digest is noted
READ_BYTES = 8 << 20  # at a time
FILES_KEPT = 500  # of a folder, to say which of them has changed
READERS = 4  # files that are read side by side
LOOK_S = 0.2  # between two looks at how far they are
# A file may change again within the granularity of its time of change: a digest is only noted of files older than this.
SETTLED_S = 2.0

# What stands in a model's folder and is not loaded: a change of it changes no answer.
_BESIDE = re.compile(r"\..*|.*\.(md|log|out|err)|LICENSE.*|NOTICE.*|events\.out\..*")
_BESIDE_OF_TRAINERS = {"trainer_state.json", "training_args.bin", "optimizer.pt", "scheduler.pt"}
_TEMPLATES = "additional_chat_templates"  # the only folder below a model's that is loaded


@dataclass(frozen=True, slots=True)
class Content:
    """What an input held when it was looked at."""

    name: str  # as the config has it
    digest: str  # of the content; the same wherever it lies
    ref: str | None = None  # of what is on the hub: the branch, tag or commit that is asked for
    commit: str | None = None  # at which that stands, where the local cache knows it
    changed_at: float | None = None  # seconds since the epoch; the newest of its files
    files: Mapping[str, str] = field(default_factory=dict)  # digests by path in a folder

    @property
    def known_by(self) -> str:
        """The digest, and of what is on the hub the branch or tag that is asked for."""
        return f"{self.digest} {self.ref or ''}".strip()

    def same_as(self, other: Content) -> bool:
        """Whether both are the same content: on the hub of the same commit, or, as long as one of them does not know
        its commit, of the same branch or tag."""
        if self.digest != other.digest:
            return False
        if self.commit is None or other.commit is None:
            return self.ref == other.ref
        return self.commit == other.commit

    def told(self, before: Content) -> str:
        """What has changed since `before`, in words."""
        if self.name != before.name:
            return f"was {before.name} and is {self.name}, which holds something else"
        if self.commit != before.commit and self.digest == before.digest:
            return f"{self.name} was at commit {before.commit} and is at {self.commit}"
        known = self.files and before.files  # of very many they are not kept
        differing = {name for name, _ in self.files.items() ^ before.files.items()}
        names = differing if known else set[str]()
        some = ", ".join(sorted(names)[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
        when = f"written {clock_time(self.changed_at)}" if self.changed_at is not None else ""
        return f"{self.name} has changed" + (f" ({', '.join(filter(None, [some, when]))})" if some or when else "")

    def as_json(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "digest": self.digest,
            "ref": self.ref,
            "commit": self.commit,
            "changed_at": self.changed_at,
            "files": dict(self.files) if len(self.files) <= FILES_KEPT else {},
        }

    @classmethod
    def of_json(cls, value: Any) -> Content | None:
        """None for what is no such object."""
        try:
            found = cls(**value)
            texts = [found.name, found.digest, found.ref or "", found.commit or "", *found.files, *found.files.values()]
            clock_time(found.changed_at or 0.0)
        except (TypeError, AttributeError, ValueError, OverflowError, OSError):
            return None
        return found if all(isinstance(text, str) for text in texts) else None


def clock_time(seconds: float) -> str:
    """Local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(seconds))


def data_content(path: str, split: str = "train") -> Content:
    """Of what a `data.path` names: packaged prompts, a file, the files of a folder that are of the split, or a data set
    on the hub. What isn't there counts as the hub's: whoever reads it tells what is wrong.

    Raises:
        InputError: a file of it can't be read, or is being written.
    """
    packaged = PACKAGED / f"{path.removeprefix('package:')}.jsonl"
    local = packaged if path.startswith("package:") else expand_home(path)
    if path and local.is_file():
        return _of_files(path, {"": local})
    if path and local.is_dir():
        return _of_files(path, {str(file.relative_to(local)): file for file in files_of_split(local, split)})
    name, revision = hub_reference(path)
    return Content(path, f"data set {name} {split}", ref=revision, commit=_commit("datasets", name, revision))


def model_content(name: str, revision: str | None = None) -> Content:
    """Of a model: config, tokenizer, templates, code and weights of its folder; of a packaged one the version; of one
    on the hub the commit, where the local cache knows it.

    Raises:
        InputError: a file of it can't be read, or is being written.
    """
    if name.startswith("package:"):
        distribution = name.removeprefix("package:")
        with suppress(importlib.metadata.PackageNotFoundError):
            return Content(name, f"{name} {importlib.metadata.version(distribution)}")
        return Content(name, name)
    folder = expand_home(name)
    if folder.is_dir():
        return _of_files(name, {str(file.relative_to(folder)): file for file in _model_files(folder)})
    return Content(name, f"model {name}", ref=revision or "main", commit=_commit("models", name, revision))


def file_content(name: str) -> Content:
    """Of a local file; of anything else its name is all that is known."""
    path = expand_home(name)
    return _of_files(name, {"": path}) if path.is_file() else Content(name, name)


def _model_files(folder: Path) -> list[Path]:
    found = [*folder.iterdir(), *folder.glob(f"{_TEMPLATES}/*")]
    return sorted(
        file
        for file in found
        if file.is_file() and not _BESIDE.fullmatch(file.name) and file.name not in _BESIDE_OF_TRAINERS
    )


def _of_files(name: str, files: Mapping[str, Path]) -> Content:
    """`files` by their path in a folder, "" for a single file. Progress is shown after a second."""
    looked = _digests(name, list(files.values()))
    digests = {place: digest for place, (digest, _) in zip(files, looked, strict=True)}
    newest = max((at for _, at in looked), default=None)
    if list(digests) == [""]:
        return Content(name, digests[""], changed_at=newest)
    whole = xxh3_128("\n".join(f"{place}\0{digest}" for place, digest in sorted(digests.items())).encode())
    return Content(name, whole.hexdigest(), changed_at=newest, files=digests)


def _digests(name: str, files: list[Path]) -> list[tuple[str, float]]:
    sizes = [file.stat().st_size if file.is_file() else 0 for file in files]
    read = [0] * len(files)  # bytes of each

    def digest(number: int) -> tuple[str, float]:
        def count(size: int) -> None:
            read[number] += size

        found = file_digest(files[number], count)
        read[number] = sizes[number]  # also where the digest was noted
        return found

    with (
        ThreadPoolExecutor(READERS) as pool,
        ItemProgress(f"looking at {name}", sum(sizes) >> 20, "MiB", after_s=SILENT_S) as progress,
    ):
        futures = [pool.submit(digest, number) for number in range(len(files))]
        shown, under_way = 0, True
        while under_way:
            under_way = bool(wait(futures, LOOK_S).not_done)
            now = sum(read) >> 20
            progress.advance(now - shown)
            shown = now
    return [future.result() for future in futures]


def file_digest(path: Path, read: Callable[[int], None] = lambda _: None) -> tuple[str, float]:
    """Size and XXH3 of a file's bytes, as one text; and when it was changed.

    Args:
        read: is given the number of bytes each time that some were read.

    Raises:
        InputError: it can't be read, or changes while it is.
    """
    try:
        for _ in range(3):
            before = _stamp(path)
            digest = _noted(path, before) or _hashed(path, read)
            if _stamp(path) == before:
                size, changed_ns = before[0], before[1]
                if size >= LARGE and time.time() - changed_ns / 1e9 > SETTLED_S:
                    _note(path, before, digest)
                return f"{size}-{digest}", changed_ns / 1e9
    except OSError as error:
        raise InputError(f"{path} can't be read ({error.strerror or error}). Give a readable file.") from error
    raise InputError(f"{path} changes while it is read: something is writing it. Wait until it is whole.")


def _stamp(path: Path) -> list[int]:
    """What differs after a change of a file: its size, and time of change and inode."""
    found = path.stat()
    return [found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev]


def _hashed(path: Path, read: Callable[[int], None]) -> str:
    digest = xxh3_128()
    with path.open("rb") as file:
        while data := file.read(READ_BYTES):
            digest.update(data)
            read(len(data))
    return digest.hexdigest()


def _note_of(path: Path) -> Path:
    return cache_folder() / "digests" / f"{xxh3_64_hexdigest(str(path.resolve()).encode())}.json"


def _noted(path: Path, stamp: list[int]) -> str | None:
    if stamp[0] < LARGE:
        return None
    note = read_json(_note_of(path))
    known = note.get("stamp") == stamp and note.get("path") == str(path.resolve())
    return at(note, "xxh128", expected=str) if known else None


def _note(path: Path, stamp: list[int], digest: str) -> None:
    note = _note_of(path)
    with suppress(OSError, RunError):  # without a note it is read once more
        note.parent.mkdir(parents=True, exist_ok=True)
        write_json(note, {"path": str(path.resolve()), "stamp": stamp, "xxh128": digest})


def _commit(kind: str, name: str, revision: str | None) -> str | None:
    """What the hub's local cache says that a branch or tag stands at; None where it does not know."""
    from huggingface_hub.constants import HF_HUB_CACHE

    if revision is not None and re.fullmatch(r"[0-9a-f]{40}", revision):
        return revision
    ref = Path(HF_HUB_CACHE) / f"{kind}--{name.replace('/', '--')}" / "refs" / (revision or "main")
    try:
        return ref.read_text().strip() or None
    except (OSError, ValueError):
        return None


def changes(before: Mapping[str, Content], after: Mapping[str, Content]) -> Iterable[str]:
    """What differs, a line for each key."""
    for key, content in after.items():
        if key in before and not content.same_as(before[key]):
            yield f"{key}: {content.told(before[key])}"
