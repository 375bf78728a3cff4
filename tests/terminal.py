"""A program on a terminal of its own."""

from __future__ import annotations

import os
import pty
import select
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]


def on_a_terminal(*command: str, **variables: str) -> bytes:
    """What a program writes to a terminal."""
    variables = {"COLUMNS": "110", "TERM": "xterm-256color"} | variables
    pid, terminal = pty.fork()
    if pid == 0:
        os.chdir(ROOT)
        os.execve(command[0], command, {**os.environ, **variables})
    seen = b""
    while select.select([terminal], [], [], 60)[0]:
        try:
            seen += os.read(terminal, 65536)
        except OSError:  # closed by the program's end
            break
    os.close(terminal)
    assert os.waitpid(pid, 0)[1] == 0, seen
    return seen
