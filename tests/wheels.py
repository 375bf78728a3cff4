"""Python sources of released packages, read out of their wheels on the package index, for tests of contracts.

A CUDA wheel has hundreds of megabytes, its Python files a few: the list of a wheel's files and the files asked for are
fetched by HTTP range, and kept in the cache folder (`RLAIF_CACHE`). Which file of the index has a version, uv says:
it reads the same settings here as in an installation.
"""

from __future__ import annotations

import io
import json
import os
import subprocess
import tempfile
import tomllib
import urllib.error
import urllib.request
import zipfile
from functools import cache, cached_property
from pathlib import Path
from urllib.parse import urlsplit

from uv import find_uv_bin

from rlaif_ray.models import cache_folder
from tests.pace import scaled

TARGET = ["--python-version=3.11", "--python-platform=x86_64-manylinux_2_31"]
READ_AHEAD = 2**17  # bytes
KNOWN = "idna"  # a small package that every index has


class NoIndexError(Exception):
    """No package index answers here, or it serves no parts of files."""


def uv(*arguments: str, text: str = "", folder: Path | None = None) -> str:
    """What `uv pip` prints.

    Raises:
        NoIndexError: no index answers.
        AssertionError: any other failure, with uv's words.
    """
    done = _run(*arguments, text=text, folder=folder)
    answered(done)
    return done.stdout


def answered(done: subprocess.CompletedProcess[str]) -> None:
    """Raises what `uv` raises, of a program that ran it."""
    if done.returncode and not index_answers():
        raise NoIndexError(" ".join(done.stderr.split())[-300:])
    assert done.returncode == 0, done.stderr


@cache
def index_answers() -> bool:
    """Whether the index has what every index has. uv says "not found" of a package that isn't there and where nothing
    answers: what it says of another package doesn't tell."""
    return _run("compile", "--no-deps", "--no-cache", "-", text=KNOWN).returncode == 0


def _run(*arguments: str, text: str = "", folder: Path | None = None) -> subprocess.CompletedProcess[str]:
    command = [find_uv_bin(), "--quiet", "pip", *arguments]
    with tempfile.TemporaryDirectory() as empty:
        return subprocess.run(
            command, input=text, cwd=folder or empty, capture_output=True, text=True, timeout=scaled(240)
        )


class Wheel:
    """The files of one wheel."""

    def __init__(self, package: str, version: str, url: str, size: int) -> None:
        self.version, self._url, self._size = version, url, size
        self._folder = cache_folder() / "sources" / f"{package}-{version}"

    @cached_property
    def names(self) -> frozenset[str]:
        """Paths of its Python files."""
        kept = self._folder / "names.json"
        if not kept.exists():
            names = [name for name in self._archive.namelist() if name.endswith(".py")]
            _keep(kept, json.dumps(names))
        return frozenset(json.loads(kept.read_text()))

    def read(self, name: str) -> str | None:
        """A Python file's text; None where the wheel has no such file."""
        if name not in self.names:
            return None
        kept = self._folder / name
        if not kept.exists():
            _keep(kept, self._archive.read(name).decode())
        return kept.read_text()

    @cached_property
    def _archive(self) -> zipfile.ZipFile:
        return zipfile.ZipFile(io.BufferedReader(_Ranges(self._url, self._size), READ_AHEAD))


@cache
def wheel(requirement: str) -> Wheel:
    """The newest wheel for Linux on x86_64 that a requirement such as `vllm<0.34` allows.

    Raises:
        NoIndexError: no index answers.
    """
    lock = uv("compile", "--no-deps", "--no-header", "--format=pylock.toml", *TARGET, "-", text=requirement)
    (package,) = tomllib.loads(lock)["packages"]
    found = max(package["wheels"], key=lambda each: str(each["url"]))
    return Wheel(package["name"], package["version"], found["url"], found["size"])


class _Ranges(io.RawIOBase):
    """A file behind an address, of which only the parts that are read are fetched."""

    def __init__(self, url: str, size: int) -> None:
        assert urlsplit(url).scheme == "https"
        self._url, self._size, self._at = url, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._at = offset + {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: memoryview) -> int:  # type: ignore[override]
        end = min(self._at + len(buffer), self._size)
        if end <= self._at:
            return 0
        request = urllib.request.Request(self._url, headers={"Range": f"bytes={self._at}-{end - 1}"})
        try:
            with urllib.request.urlopen(request, timeout=scaled(60)) as answer:
                if answer.status != 206:
                    raise NoIndexError(f"the index serves whole files alone (status {answer.status})")
                part = answer.read()
        except (urllib.error.URLError, TimeoutError) as error:
            raise NoIndexError(str(error)) from error
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)


def _keep(path: Path, text: str) -> None:
    """Written at once: test processes run side by side, and one may be killed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_name(f"{path.name}.{os.getpid()}")
    written.write_text(text)
    written.replace(path)
