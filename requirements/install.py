"""Installs the lock and this package into a virtual environment, and shows how far it is.

    python3.11 requirements/install.py .venv

Needs nothing but Python. pip's own output goes to `.venv/install.log`; it is shown only when the installation fails.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import IO

ROOT = Path(__file__).resolve().parents[1]
LOCK = ROOT / "requirements" / "cpu.lock"
# Where torch's CPU builds live when the machine's own package sources have none.
TORCH_INDEX = os.environ.get("TORCH_INDEX", "https://download.pytorch.org/whl/cpu")
PLAIN_EVERY_S = 20.0  # between two lines where output is not a terminal


def main() -> int:
    if len(sys.argv) != 2:
        print(__doc__)
        return 2
    venv = Path(sys.argv[1]).absolute()
    count = len([line for line in LOCK.read_text().splitlines() if "==" in line])
    progress = Progress()
    version = ".".join(map(str, sys.version_info[:2]))
    progress.note(f"set-up 1/3: a virtual environment of Python {version} in {venv}")
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    progress.note(f"set-up 2/3: {count} packages of requirements/cpu.lock, about 6 GB of disk, 3 to 5 minutes")
    with (venv / "install.log").open("w") as log:
        lock = ["--no-deps", "--no-compile", "-r", str(LOCK)]
        failed = install(venv, lock, count, log, progress)
        if failed:
            failed = install(venv, [*lock, "--extra-index-url", TORCH_INDEX], count, log, progress)
        if not failed:
            progress.note("set-up 3/3: rlaif_ray itself")
            failed = install(venv, ["--no-deps", "--no-build-isolation", "-e", str(ROOT)], 1, log, progress)
        if not failed:
            compile_all(venv, progress)
    if failed:
        for line in (venv / "install.log").read_text().splitlines()[-15:]:
            print(line, file=sys.stderr)
        print(
            f"set-up failed: pip could not install everything; all of its output: {venv}/install.log", file=sys.stderr
        )
        return 1
    progress.note(f"set-up done in {progress.elapsed()}")
    return 0


def install(venv: Path, arguments: list[str], count: int, log: IO[str], progress: Progress) -> bool:
    """Runs pip; whether it failed. Its first phase names each package as it fetches it, its second says nothing, so
    what has arrived in the environment is counted."""
    command = [str(venv / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check", *arguments]
    pip = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, errors="replace")
    assert pip.stdout is not None
    fetched = 0
    installed = threading.Event()
    with Counting(progress, venv, installed, count):
        for line in pip.stdout:
            log.write(line)
            if found := re.match(r"\s*Collecting (\S+)", line):
                fetched += 1
                progress.show(f"fetching {min(fetched, count)} of {count}: {found[1]}")
            elif line.startswith("Installing collected packages"):
                installed.set()  # the watcher counts from here on
    return pip.wait() != 0


def compile_all(venv: Path, progress: Progress) -> None:
    """Bytecode of all packages, on all cores, so that the first run doesn't wait for it. Files that are not meant for
    this Python don't compile, as with pip."""
    progress.show("compiling")
    command = [str(venv / "bin" / "python"), "-m", "compileall", "-q", "-j", "0", str(venv / "lib")]
    subprocess.run(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False)


class Progress:
    """A line that is written over on a terminal; elsewhere one now and then."""

    def __init__(self) -> None:
        self._terminal = sys.stdout.isatty()
        self._begun = self._shown = time.monotonic()
        self._width = 0

    def elapsed(self) -> str:
        minutes, seconds = divmod(int(time.monotonic() - self._begun), 60)
        return f"{minutes}:{seconds:02}"

    def note(self, text: str) -> None:
        """A line that stays."""
        self._clear()
        print(text, flush=True)

    def show(self, text: str) -> None:
        """What goes on now."""
        now = time.monotonic()
        if self._terminal:
            self._clear()
            text = f"  {self.elapsed()}  {text}"[: os.get_terminal_size().columns - 1]
            print(text, end="", flush=True)
            self._width = len(text)
        elif now - self._shown >= PLAIN_EVERY_S:
            self._shown = now
            print(f"  {self.elapsed()}  {text}", flush=True)

    def _clear(self) -> None:
        if self._width:
            print("\r" + " " * self._width + "\r", end="")
            self._width = 0


class Counting(threading.Thread):
    """Counts the packages that have arrived, once pip says that it installs them."""

    def __init__(self, progress: Progress, venv: Path, begun: threading.Event, count: int) -> None:
        super().__init__(daemon=True)
        self._progress, self._venv, self._begun, self._count = progress, venv, begun, count
        self._ended = threading.Event()

    def run(self) -> None:
        while not self._ended.wait(1.0):
            if self._begun.is_set():
                arrived = len(list(self._venv.glob("lib/python*/site-packages/*.dist-info")))
                self._progress.show(f"installing {min(arrived, self._count)} of {self._count}")

    def __enter__(self) -> Counting:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self.join()


if __name__ == "__main__":
    raise SystemExit(main())
