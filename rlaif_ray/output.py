"""Text for people, without secrets and without characters that a terminal would obey; and standard output and error
that never end a run: where they can't be written, the run goes on in silence."""

from __future__ import annotations

import logging
import os
import re
import select
import sys
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TextIO

from rlaif_ray.secrecy import MASK, masked

# Control characters except line feed and tab, direction marks and overrides, characters without a width or a letter,
# surrogates. Joiners are left: emoji and several scripts need them.
_CODES = (
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u180e\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ud800-\udfff\ufeff\ufff9-\ufffb"
    "\U000e0000-\U000e007f]"
)
_UNSAFE = re.compile(_CODES)
# Scripts without blanks between words, where U+200B says where a line may break: Thai to Myanmar, Khmer, Tai Le to Tai
# Tham, Kana, Chinese characters, and the extensions of Myanmar and Tai.
_NO_BLANKS = "\u0e00-\u109f\u1780-\u17ff\u1950-\u19ff\u1a20-\u1aaf\u3040-\u30ff\u4e00-\u9fff\ua9e0-\ua9ff\uaa60-\uaadf"
_LETTERS = re.compile(
    f"((?<=[{_NO_BLANKS}])\u200b(?=[\\w{_NO_BLANKS}])|(?<=\\w)\u200b(?=[{_NO_BLANKS}])"
    # Flags of England, Scotland and other regions: a flag, the region's letters, an end mark.
    f"|\U0001f3f4[\U000e0030-\U000e0039\U000e0061-\U000e007a]{{3,6}}\U000e007f)|{_CODES}"
)
# What libraries draw with: colours, returns to the line's begin, and the moves of progress bars.
_COLOUR = re.compile("\x1b\\[[0-9;]{0,40}m")
_OF_PALETTE = re.compile("[34]8;(5;[0-9]+|2;[0-9]+;[0-9]+;[0-9]+)")
_ERASE = "\x1b\\[[02]?K"
_DRAWN = re.compile(f"(?:{_ERASE})?\r(?:{_ERASE})?|{_COLOUR.pattern}")
_MOVES = re.compile("\n*(\x1b\\[A)*")
_HELD = 1 << 16  # characters of a line without an end that are kept back at most
_FULL_S = 10.0  # for which a descriptor that is full may take nothing


def shown(text: str) -> str:
    """`text` as people may see it: without secrets, and with codes (`\\x1b`, `\\u202e`) for characters that a terminal
    would obey or that change how others read. Line breaks and tabs are left."""
    return escaped(masked(text.replace("\r\n", "\n")))


def shown_with_places(text: str) -> tuple[str, Callable[[int], int]]:
    """`text` as `shown`, and where each place of `text` is in it: colours are kept by this."""
    begins, begins_after, sizes = [0], [0], [0]  # of the parts that are the same in both
    parts, place, length = [], 0, 0
    pieces = masked(text).split(MASK)
    for number, piece in enumerate(pieces, 1):
        # What is between the pieces is masked.
        place = text.find(piece, place) if number < len(pieces) else len(text) - len(piece)
        end = 0
        for found in (*_LETTERS.finditer(piece), None):
            start = found.start() if found else len(piece)
            begins.append(place + end)
            begins_after.append(length)
            sizes.append(start - end)
            parts.append(piece[end:start])
            length += start - end
            if found:
                parts.append(found[1] or _code(found[0]))
                length += len(parts[-1])
                end = found.end()
        place += len(piece)
        if number < len(pieces):
            parts.append(MASK)
            length += len(MASK)

    def place_after(place: int) -> int:
        part = bisect_right(begins, place) - 1
        if place - begins[part] <= sizes[part]:
            return begins_after[part] + place - begins[part]
        return begins_after[part + 1] if part + 1 < len(begins) else length

    return "".join(parts), place_after


def on_one_line(text: str) -> str:
    """`text` as `shown`, with line breaks as their code too."""
    return shown(text).replace("\n", "\\n")


def first_unsafe(text: str) -> str:
    """The code of the first character that a name must not have; "" where all are letters and signs."""
    found = _UNSAFE.search(text) or re.search(r"[\n\t]", text)
    return f"#x{ord(found[0]):04x}" if found else ""


def escaped(text: str) -> str:
    """`text` with codes for characters that a terminal would obey. It must have no secrets in it."""
    return _LETTERS.sub(lambda found: found[1] or _code(found[0]), text)


def _code(character: str) -> str:
    return ascii(character)[1:-1]


def _is_colour(text: str) -> bool:
    """Whether this is a code for a colour or weight; 8 hides the text behind it."""
    return _COLOUR.fullmatch(text) is not None and "8" not in _OF_PALETTE.sub("", text[2:-1]).split(";")


def say(text: str = "", *, error: bool = False) -> None:
    """Shows a line, or several, on standard output or error. All that the package prints goes through here, `say_as_is`
    or a console of its own (tracking/console.py)."""
    print(shown(text), file=sys.stderr if error else sys.stdout, flush=True)


def say_as_is(text: str, *, error: bool = False) -> None:
    """Shows what a shell or a program reads again: a mask in it would change what it means. It must have no secrets in
    it, as a config that was loaded."""
    stream = sys.stderr if error else sys.stdout
    stream.flush()
    print(escaped(text), file=drawn(stream), flush=True)


def survive_lost_output() -> None:
    """From here on a terminal that is gone, a reader that has left (`| head -1`), a full disk or a closed descriptor
    silences standard output or error, and raises nothing. The output of libraries is shown without secrets and without
    characters that a terminal would obey, except colours and progress bars."""
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
    """The stream itself, below the one that masks and escapes: for text that already is."""
    return stream.below if isinstance(stream, ShownStream) else stream


def _nowhere() -> TextIO:
    return Path(os.devnull).open("w", encoding="utf-8")


class SurvivingStream:
    """A text stream whose writes never raise. All other methods are the stream's own."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.flush()  # what is written from now on passes by the stream's own buffer of letters

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        try:
            try:
                self._write(text, self._stream.errors or "strict")
            except UnicodeEncodeError:  # a terminal that knows ASCII only
                self._write(text, "replace")
        except (OSError, ValueError):
            self._fall_silent()
        return len(text)

    def _write(self, text: str, errors: str) -> None:
        """Writes bytes: of a text that meets a full descriptor nobody would know how much was written."""
        binary = getattr(self._stream, "buffer", None)
        if binary is None:
            self._stream.write(text)
            return
        left = memoryview(text.encode(self._stream.encoding, errors))
        full_since = time.monotonic()
        while left:
            try:
                written = binary.write(left)
            except BlockingIOError as full:
                written = full.characters_written
                self._wait(full, time.monotonic() if written else full_since)
            if written:
                left, full_since = left[written:], time.monotonic()
        at_once = getattr(self._stream, "write_through", False)
        if at_once or (getattr(self._stream, "line_buffering", False) and ("\n" in text or "\r" in text)):
            self.flush()

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        full_since = time.monotonic()
        try:
            while True:
                try:
                    self._stream.flush()
                    return
                except BlockingIOError as full:
                    self._wait(full, full_since)
        except (OSError, ValueError):
            self._fall_silent()

    def _wait(self, full: BlockingIOError, since: float) -> None:
        """Waits until a descriptor that does not block takes more; raises where it has taken nothing for long."""
        left_s = since + _FULL_S - time.monotonic()
        if left_s <= 0:
            raise OSError("the descriptor is full") from full
        ready = select.poll()
        ready.register(self._stream.fileno(), select.POLLOUT)
        ready.poll(left_s * 1000)

    def _fall_silent(self) -> None:
        """Points the descriptor at nothing, for libraries that write to it by themselves too. Empties the buffer."""
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
    """A text stream that passes on what people may see of its text. All other methods are the stream's own.

    Lines are passed on as wholes, since `print("token:", token)` writes each word by itself: an unfinished line is kept
    back until its end or a flush, of each thread for itself, as a console does.
    """

    def __init__(self, below: SurvivingStream) -> None:
        self.below = below
        self._unfinished: dict[int, str] = {}  # by thread

    def __getattr__(self, name: str) -> Any:
        return getattr(self.below, name)

    def write(self, text: str) -> int:
        thread = threading.get_ident()
        whole = self._unfinished.pop(thread, "") + text
        if text and _MOVES.fullmatch(text):
            self._pass_on(whole.removesuffix(text))
            self.below.write(text)
            return len(text)
        end = len(whole) if "\r" in text or len(whole) > _HELD else whole.rfind("\n") + 1
        if whole[end:]:
            self._unfinished[thread] = whole[end:]
        self._pass_on(whole[:end])
        return len(text)

    def flush(self) -> None:
        for thread in list(self._unfinished):
            self._pass_on(self._unfinished.pop(thread, ""))
        self.below.flush()

    def _pass_on(self, text: str) -> None:
        if not text:
            return
        text = text.replace("\r\n", "\n")
        drawn = [found for found in _DRAWN.finditer(text) if not found[0].endswith("m") or _is_colour(found[0])]
        plain: list[str] = []
        offsets: list[int] = []
        place = 0
        for found in drawn:  # a colour may stand in the middle of a secret
            plain.append(text[place : found.start()])
            offsets.append(len(plain[-1]) + (offsets[-1] if offsets else 0))
            place = found.end()
        told, place_after = shown_with_places("".join([*plain, text[place:]]))
        parts, place = [], 0
        for found, offset in zip(drawn, offsets, strict=True):
            end = max(place, place_after(offset))
            parts += [told[place:end], found[0]]
            place = end
        self.below.write("".join([*parts, told[place:]]))

    def writelines(self, lines: Iterable[str]) -> None:
        for line in lines:
            self.write(line)
