"""Standard output and error that end nothing: what can't be written is not said, and the work goes on."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO


def survive_lost_output() -> None:
    """From here on a terminal that is gone, a reader that has left (`| head -1`), a full disk or a closed descriptor
    silences standard output or error, and raises nothing."""
    sys.stdout = _surviving(sys.stdout)
    sys.stderr = _surviving(sys.stderr)


def _surviving(stream: TextIO | None) -> Any:
    # Python has none where the descriptor is closed.
    return SurvivingStream(_nowhere() if stream is None else stream)


def _nowhere() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")


class SurvivingStream:
    """A text stream whose writes can't fail. All else is the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            return self._stream.write(text)
        except UnicodeEncodeError:  # a terminal that knows ASCII alone
            encoding = self._stream.encoding
            return self._stream.write(text.encode(encoding, "replace").decode(encoding))
        except (OSError, ValueError):
            self._fall_silent()
            return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        try:
            self._stream.flush()
        except (OSError, ValueError):
            self._fall_silent()

    def _fall_silent(self) -> None:
        """The descriptor leads nowhere from now on, for libraries that write to it by themselves too; so does what the
        stream still holds."""
        nothing = os.open(os.devnull, os.O_WRONLY)
        try:
            os.dup2(nothing, self._stream.fileno())
        except (OSError, ValueError):  # the stream was closed, or has no descriptor
            self._stream = _nowhere()
        finally:
            os.close(nothing)
        with suppress(OSError, ValueError):
            self._stream.flush()
