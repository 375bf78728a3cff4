"""Where checkpoints are kept: a folder of a file system, or an address of an object store (any that fsspec knows).

A folder of files is stored whole or not at all: its manifest names every file with size and checksum, and is written
last. On a file system the folder also gets its name last; an object store has no rename, there the manifest alone
says that it is there. Nothing is ever unpickled.
"""

from __future__ import annotations

import itertools
import json
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

from xxhash import xxh3_128

from rlaif_ray.documents import JSON_BYTES, parse_json
from rlaif_ray.errors import CheckpointError, DocumentError, InputError, RunError
from rlaif_ray.folders import publish_folder
from rlaif_ray.paths import expand_home
from rlaif_ray.secrecy import masked, without_login
from rlaif_ray.writing import open_anew

MANIFEST = "manifest.json"
FORMAT = 3
TOKEN = re.compile(r"[0-9a-f]{8}")  # by which one attempt to write a folder is told from another
READ_BYTES = 8 << 20  # at a time
READERS = 4  # files that are verified side by side


@dataclass(frozen=True, slots=True)
class StoredFile:
    """What a file must be, to be the one that was written."""

    size: int  # bytes
    xxh128: str  # XXH3 of 128 bits in hex, as `xxhsum -H2` says: against damage, ten times as fast as SHA-256


@dataclass(frozen=True, slots=True)
class StoredFolder:
    """A folder of files that is whole."""

    place: Place
    files: Mapping[str, StoredFile]  # by path below it

    def file(self, name: str) -> tuple[Place, StoredFile]:
        """Where a file is, and what it must be.

        Raises:
            CheckpointError: there is none of this name.
        """
        if name not in self.files:
            raise CheckpointError(f"{self.place} has no {name}: it was written by a run of another layout.")
        return self.place / name, self.files[name]

    def read(self, name: str) -> bytes:
        """A small file's content, verified.

        Raises:
            CheckpointError: it is another than was written, or can't be read.
        """
        place, expected = self.file(name)
        data = place.read()
        if StoredFile(len(data), xxh3_128(data).hexdigest()) != expected:
            raise CheckpointError(f"{place} is damaged: it is not what was written.")
        return data


@dataclass(frozen=True, slots=True)
class Place:
    """A file or folder, by an absolute path or an fsspec address such as s3://bucket/prefix."""

    address: str

    @classmethod
    def of(cls, address: str | Path) -> Place:
        """The place that a user named.

        Raises:
            InputError: there is no way to reach such an address.
        """
        text = str(address).removeprefix("file://")
        if "://" not in text:
            return cls(str(expand_home(text).absolute()))
        place = cls(text.rstrip("/"))
        try:
            place._remote()
        except (ImportError, ValueError) as error:
            raise InputError(
                f"checkpoint.path={place} can't be reached ({told(error)}): a checkpoint could not be written there. "
                f'Install what it names (pip install "rlaif-ray[s3]" for s3://), or name a folder.'
            ) from error
        return place

    def __str__(self) -> str:
        return without_login(self.address)

    def __truediv__(self, name: str) -> Place:
        return Place(f"{self.address}/{name}")

    @property
    def folder(self) -> Path | None:
        """As a path, where it is one."""
        return None if "://" in self.address else Path(self.address)

    def _remote(self) -> tuple[Any, str]:
        import fsspec  # type: ignore[import-untyped, unused-ignore]

        found: tuple[Any, str] = fsspec.core.url_to_fs(self.address, use_listings_cache=False)
        return found

    @contextmanager
    def writing(self) -> Iterator[HashedWriter]:
        """The new file at this place: once the body has ended well it is durable.

        Raises:
            CheckpointError: it can't be written.
        """
        with _failing(f"{self} could not be written"):
            if self.folder is None:
                filesystem, path = self._remote()
                with filesystem.open(path, "wb") as file:
                    yield HashedWriter(file)
                return
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            with open_anew(self.folder) as file:
                yield HashedWriter(file)
                file.flush()
                os.fsync(file.fileno())

    def write(self, data: bytes) -> StoredFile:
        """A small file, durable; on an object store it is there whole or not at all."""
        with self.writing() as file:
            file.write(data)
        return file.stored

    def read(self) -> bytes:
        """A small file's content."""
        with _failing(f"{self} can't be read"), self.opened() as file:
            data = file.read(JSON_BYTES + 1)
            if len(data) > JSON_BYTES:
                raise CheckpointError(f"{self} can't be read: it is longer than {JSON_BYTES:,} bytes.")
            return data

    @contextmanager
    def opened(self) -> Iterator[BinaryIO]:
        """The file at this place, to read; errors are as the file system raises them."""
        if self.folder is not None:
            with self.folder.open("rb") as file:
                yield file
            return
        filesystem, path = self._remote()
        with filesystem.open(path, "rb", block_size=READ_BYTES, cache_type="readahead") as file:
            yield file

    def names(self) -> list[str]:
        """What is directly below; none where there is nothing."""
        with _failing(f"{self} can't be listed"):
            if self.folder is not None:
                return sorted(os.listdir(self.folder)) if self.folder.is_dir() else []
            filesystem, path = self._remote()
            try:
                found = filesystem.ls(path, detail=False)
            except FileNotFoundError:
                return []
            return sorted({each.rstrip("/").rpartition("/")[2] for each in found if each.rstrip("/") != path})

    def size(self) -> int:
        """Bytes of the file at this place.

        Raises:
            CheckpointError: there is none.
        """
        with _failing(f"{self} can't be read"):
            if self.folder is not None:
                return self.folder.stat().st_size
            filesystem, path = self._remote()
            return int(filesystem.size(path))

    def remove(self) -> None:
        """The file or folder and all below it: at once, or its manifest first."""
        with _failing(f"{self} can't be removed"):
            if self.folder is None:
                filesystem, path = self._remote()
                for each in (f"{path}/{MANIFEST}", path):
                    if filesystem.exists(each):
                        filesystem.rm(each, recursive=True)
            elif self.folder.is_dir() and not self.folder.is_symlink():  # of a link the link alone
                aside = self.folder.with_name(f".partial-{self.folder.name}-removed")  # gone at once, or not at all
                shutil.rmtree(aside, ignore_errors=True)
                shutil.rmtree(self.folder.rename(aside))
            else:
                self.folder.unlink(missing_ok=True)


class HashedWriter:
    """Writes to a file and knows what it has written."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._size, self._hash = file, 0, xxh3_128()

    def write(self, data: bytes | memoryview) -> None:
        self._file.write(data)
        self._hash.update(data)
        self._size += len(data)

    @property
    def stored(self) -> StoredFile:
        return StoredFile(self._size, self._hash.hexdigest())


# ---- Whole folders ---------------------------------------------------------------------------------------------------


def draft(final: Place, token: str) -> Place:
    """Where the files of a folder are written before it is there; `token`, a TOKEN, is no other attempt's."""
    root, _, name = final.address.rpartition("/")
    return Place(f"{root}/.partial-{name}-{token}" if final.folder is not None else f"{final.address}/{token}")


def publish(written: StoredFolder, final: Place, **facts: Any) -> None:
    """Makes the folder `final` of a draft: from now on it is there, and stays after a power cut too.

    Args:
        facts: what else the manifest is to say, for `open_folder` to give back.

    Raises:
        CheckpointError: a file isn't as it was written, or the manifest could not be written.
    """
    for name, file in written.files.items():
        if (found := (written.place / name).size()) != file.size:
            raise CheckpointError(
                f"{written.place / name} has {found} bytes here, and {file.size} where it was written: all nodes must "
                f"share checkpoint.path. Use a shared file system, or an object store (s3://...)."
            )
    below = "" if final.folder is not None else written.place.address.removeprefix(f"{final.address}/")
    content = {
        "format": FORMAT,
        "below": below,
        "files": {name: asdict(file) for name, file in sorted(written.files.items())},
        **facts,
    }
    data = json.dumps({**content, "xxh128": _digest(content)}, indent=1).encode()
    if final.folder is None:
        (final / MANIFEST).write(data)
        for name in set(final.names()) - {below}:  # another attempt's
            if TOKEN.fullmatch(name):
                (final / name).remove()
        return
    (written.place / MANIFEST).write(data)
    partial = written.place.folder
    assert partial is not None
    with _failing(f"{final} could not be written"):
        _make_way(final, final.folder)
        publish_folder(partial, final.folder)


def _make_way(final: Place, folder: Path) -> None:
    """What has the name of a folder that is published, and is none itself, is somebody's: it is moved aside."""
    if not os.path.lexists(folder):
        return
    if not is_stored_folder(final):
        aside = (folder.with_name(f"{folder.name}.moved-aside-{k}") for k in itertools.count(1))
        folder.rename(next(path for path in aside if not os.path.lexists(path)))
    elif folder.is_symlink():
        folder.unlink()


def is_stored_folder(place: Place) -> bool:
    """Whether `publish` made what is there, damaged or not; nothing else may be removed."""
    try:
        with (place / MANIFEST).opened() as file:
            content = parse_json(file.read(JSON_BYTES + 1), dict)
    except Exception:  # of any file system: then nobody knows
        return False
    return {"format", "files", "xxh128"} <= content.keys()


def open_folder(place: Place, *, verify: bool = True) -> tuple[StoredFolder, dict[str, Any]]:
    """The folder at this place and what its manifest says; every file is read and verified.

    Raises:
        CheckpointError: it is damaged, not whole, or of another format.
    """
    manifest = place / MANIFEST
    try:
        with manifest.opened() as file:
            content = parse_json(file.read(JSON_BYTES + 1), dict)
        if content["format"] != FORMAT:
            raise CheckpointError(
                f"{manifest} is of format {content['format']}, and this rlaif_ray reads {FORMAT}: go on with "
                f"the version that wrote it."
            )
        digest = content.pop("xxh128")
        if digest != _digest(content):
            raise CheckpointError(f"{manifest} is damaged: it is not what was written.")
        files = {name: StoredFile(**file) for name, file in content["files"].items()}
        below = content["below"]
        if not all(_stays_below(name) for name in files) or not (below == "" or _stays_below(below)):
            raise CheckpointError(f"{manifest} names files outside of its folder.")
    except FileNotFoundError as error:
        raise CheckpointError(
            f"{place} has no {MANIFEST}: it is not whole, or an older version of rlaif_ray wrote it."
        ) from error
    except DocumentError as error:
        raise CheckpointError(f"{manifest} can't be read: it {error}.") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{manifest} can't be read ({told(error)}).") from error
    folder = StoredFolder(place / below if below else place, files)
    if verify:
        with ThreadPoolExecutor(READERS) as pool:
            list(pool.map(lambda name: verified(*folder.file(name)), files))
    return folder, content


def verified(place: Place, expected: StoredFile) -> None:
    """Reads a file to its end.

    Raises:
        CheckpointError: it is another than was written, or can't be read.
    """
    digest = xxh3_128()
    with _failing(f"{place} can't be read"):
        if (size := place.size()) != expected.size:
            raise CheckpointError(f"{place} is damaged: it has {size} bytes, {expected.size} were written.")
        with place.opened() as file:
            while data := file.read(READ_BYTES):
                digest.update(data)
    if digest.hexdigest() != expected.xxh128:
        raise CheckpointError(f"{place} is damaged: its content is not what was written.")


def _digest(content: Mapping[str, Any]) -> str:
    return xxh3_128(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _stays_below(name: str) -> bool:
    path = PurePosixPath(name)
    return bool(path.parts) and not path.is_absolute() and ".." not in path.parts and "\0" not in name


# ---- Errors ----------------------------------------------------------------------------------------------------------


@contextmanager
def _failing(what: str) -> Iterator[None]:
    """Whatever a file system raises becomes a CheckpointError that says `what`."""
    try:
        yield
    except RunError:
        raise
    except Exception as error:  # botocore's errors, for one, share no root with OSError
        raise CheckpointError(f"{what} ({told(error)}).") from error


def told(error: BaseException) -> str:
    """An error in one line, without logins and without the values of secret variables."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = f"{type(error).__name__}: {lines[0][:300]}" if lines else type(error).__name__
    return masked(text)
