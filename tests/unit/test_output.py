"""Output that can't be written: nobody is told, and nothing ends."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from rlaif_ray.output import SurvivingStream

ROOT = Path(__file__).parents[2]
# Prints until long after its output is lost, then does its work.
PROGRAM = """
import os, sys, time
from rlaif_ray.output import survive_lost_output
survive_lost_output()
for _ in range(200):
    print("x" * 1000, flush=True)
    print("y" * 1000, file=sys.stderr, flush=True)
os.write(1, b"from a library\\n")
open(sys.argv[1], "w").write("done")
"""


def gone() -> int:
    """A pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("lost", [gone, full], ids=["reader left", "disk full"])
def test_a_program_goes_on_and_ends_well(lost: Callable[[], int], tmp_path: Path) -> None:
    out, err = lost(), lost()
    command = [sys.executable, "-c", PROGRAM, tmp_path / "work"]
    done = subprocess.run(command, cwd=ROOT, stdout=out, stderr=err, timeout=60, check=False)
    assert done.returncode == 0 and (tmp_path / "work").read_text() == "done"


def test_closed_descriptors(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM.replace('os.write(1, b"from a library\\n")', ""), str(tmp_path / "work")]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0 and (tmp_path / "work").read_text() == "done"


@pytest.mark.parametrize("lost", [gone, full], ids=["reader left", "disk full"])
def test_a_command_whose_reader_has_left(lost: Callable[[], int]) -> None:
    command = [sys.executable, "-m", "rlaif_ray.cli", "train", "--help"]
    done = subprocess.run(command, cwd=ROOT, stdout=lost(), stderr=subprocess.PIPE, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


def test_what_a_terminal_has_no_letters_for(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w", encoding="ascii") as file:
        stream = SurvivingStream(file)
        assert stream.write("café │ 1\n") == 9 and stream.writable() and stream.encoding == "ascii"
        stream.writelines(["a\n", "b\n"])
    assert (tmp_path / "out").read_text() == "caf? ? 1\na\nb\n"
    stream.write("closed")  # raises nothing
    stream.flush()
