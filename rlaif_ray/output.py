"""What people see of a run: text without secrets and without what a terminal would obey, and standard output and error
that end nothing: what can't be written is not said, and the work goes on."""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from rlaif_ray.secrecy import masked

# Control characters but for line feed and tab, direction marks and overrides, what has no width or letter, surrogates.
# Joiners stay: emoji and several scripts are written with them.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)
# What libraries draw with: colours, and the moves of progress bars.
_COLOUR = re.compile("(\x1b\\[[0-9;]{0,40}m)")
_OF_PALETTE = re.compile("[34]8;(5;[0-9]+|2;[0-9]+;[0-9]+;[0-9]+)")
_BAR = re.compile("\r|\n*(\x1b\\[A)*")


def shown(text: str) -> str:
    """`text` as people may see it: without secrets, and with characters that a terminal would obey, or that change how
    the others read, as their code (`\\x1b`, `\\u202e`). Lines and tabs stay."""
    return _escaped(masked(text.replace("\r\n", "\n")))


def on_one_line(text: str) -> str:
    """`text` as `shown`, with line breaks as their code too."""
    return shown(text).replace("\n", "\\n")


def first_unsafe(text: str) -> str:
    """The code of the first character that a name on one line must not have; "" where all are letters and signs."""
    found = _UNSAFE.search(text) or re.search(r"[\n\t]", text)
    return f"#x{ord(found[0]):04x}" if found else ""


def _escaped(text: str) -> str:
    return _UNSAFE.sub(lambda found: ascii(found[0])[1:-1], text)


def _is_colour(text: str) -> bool:
    """Whether this is a code for a colour or weight; 8 hides the text behind it."""
    return _COLOUR.fullmatch(text) is not None and "8" not in _OF_PALETTE.sub("", text[2:-1]).split(";")


def say(text: str = "", *, error: bool = False) -> None:
    """Shows a line, or several, on standard output or error. All that the package prints goes through here, or through
    a console of its own (tracking/console.py)."""
    print(shown(text), file=sys.stderr if error else sys.stdout, flush=True)


def survive_lost_output() -> None:
    """From here on a terminal that is gone, a reader that has left (`| head -1`), a full disk or a closed descriptor
    silences standard output or error, and raises nothing. What libraries write is shown without secrets and without
    what a terminal would obey, but for colours and progress bars."""
    _replace_streams(SurvivingStream)


def show_logs_safely() -> None:
    """The same for a process whose output goes to files that others read, as that of Ray's actors does. A write that
    fails is dropped there, and the next one is tried again: a full disk may have room later."""
    _replace_streams(DroppingStream)


def _replace_streams(surviving: Callable[[TextIO], SurvivingStream]) -> None:
    for name in ("stdout", "stderr"):
        before = getattr(sys, name)
        if isinstance(before, ShownStream):
            continue
        # Python has none where the descriptor is closed.
        after = ShownStream(surviving(_nowhere() if before is None else before))
        setattr(sys, name, after)
        for handler in _log_handlers():
            if before is not None and handler.stream is before:
                handler.setStream(after)


def _log_handlers() -> list[logging.StreamHandler[Any]]:
    """Those of libraries that were imported before: they keep the stream that they began with."""
    loggers = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = {handler for logger in loggers for handler in getattr(logger, "handlers", ())}
    return [handler for handler in handlers if isinstance(handler, logging.StreamHandler)]


def drawn(stream: Any) -> Any:
    """The stream below one that shows all codes: for consoles, which draw with them."""
    return stream.below if isinstance(stream, ShownStream) else stream


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


class DroppingStream(SurvivingStream):
    """One that goes on after a write that failed."""

    def _fall_silent(self) -> None:
        pass


class ShownStream:
    """A text stream that gives on what it gets as people may see it. All else is the stream's own."""

    def __init__(self, below: SurvivingStream) -> None:
        self.below = below

    def __getattr__(self, name: str) -> Any:
        return getattr(self.below, name)

    def write(self, text: str) -> int:
        start = _BAR.match(text)
        bar = start[0] if start and (start[0] == text or start[0] == "\r") else ""
        pieces = _COLOUR.split(masked(text[len(bar) :].replace("\r\n", "\n")))
        self.below.write(bar + "".join(piece if _is_colour(piece) else _escaped(piece) for piece in pieces))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)
