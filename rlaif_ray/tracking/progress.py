"""Progress of work that is counted in items: a bar on a terminal, a line now and then elsewhere. On stdout."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import TypeVar

from rlaif_ray.output import say, shown
from rlaif_ray.tracking.display import clock, number

LINE_EVERY_S = 10.0
SILENT_S = 1.0  # for work that is over at once with little data: `after_s`
_COUNTED = 256  # items between two looks at the clock

Item = TypeVar("Item")


class ItemProgress:
    """Counts items with rate and time left. Use it in a `with`."""

    def __init__(self, title: str, total: int | None, unit: str, *, after_s: float | None = None) -> None:
        """
        Args:
            total: None where it is not known, as for a file that is read as a stream.
            unit: plural.
            after_s: nothing is shown of work that takes less; after it at once.
        """
        self._title, self._total, self._unit = title, total, unit
        self._done = self._first = self._last_told = 0
        self._began = self._told = time.perf_counter()
        self._live = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
        self._waits = after_s is not None
        if after_s is not None:
            self._told += after_s - LINE_EVERY_S  # the first line comes then

    def __enter__(self) -> ItemProgress:
        if not self._waits:
            self._show()
        return self

    def _show(self) -> None:
        if self._live:
            from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

            from rlaif_ray.tracking.console import PlainTextConsole

            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", style="bold", markup=False),
                BarColumn(),
                TextColumn("{task.fields[state]}", markup=False),
                console=PlainTextConsole(),
            )
            self._task = self._bar.add_task(shown(self._title), total=self._total, state="")
            self._bar.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._waits:
            return
        if self._live:
            self._bar.stop()
        elif self._done > max(self._first, self._last_told):
            self._line()

    def note(self, text: str) -> None:
        """Shows a line with the time since the start."""
        line = f"[{clock(time.perf_counter() - self._began)}] {text}"
        if self._live:
            self._bar.console.print(shown(line))
        else:
            say(line)

    def resume(self, done: int) -> None:
        """So many were there before this process; they don't count for the rate. The clock of the rate starts."""
        self._done = self._first = done
        self._began = time.perf_counter()

    def advance(self, count: int) -> None:
        self._done += count
        due = time.perf_counter() - self._told >= LINE_EVERY_S
        if self._waits and due:
            self._waits = False
            self._show()
        if self._waits:
            return
        if self._live:
            self._bar.update(self._task, completed=self._done, state=self._state())
        elif due:
            self._line()

    def over(self, items: Iterable[Item]) -> Iterator[Item]:
        """The items, each of which is counted when the next is asked for."""
        count = 0
        for item in items:
            yield item
            count += 1
            if count == _COUNTED:
                self.advance(count)
                count = 0
        self.advance(count)

    @property
    def per_s(self) -> float:
        """Items per second of this process."""
        return (self._done - self._first) / max(time.perf_counter() - self._began, 1e-9)

    def _line(self) -> None:
        self._told, self._last_told = time.perf_counter(), self._done
        say(f"{self._title}: {self._state()}")

    def _state(self) -> str:
        of = f"/{self._total:,}" if self._total is not None else ""
        parts = [f"{self._done:,}{of} {self._unit}", f"{number(self.per_s)}/s"]
        if self._total is not None and self.per_s > 0:
            parts.append(f"{clock((self._total - self._done) / self.per_s)} left")
        return "  ".join(parts)


def print_columns(title: str, names: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Prints a table with a column per name."""
    from rich.table import Table

    from rlaif_ray.tracking.console import PlainTextConsole, cell

    table = Table(title=cell(title), title_justify="left")
    for name in names:
        table.add_column(cell(name), overflow="fold")
    for row in rows:
        table.add_row(*map(cell, row))
    PlainTextConsole().print(table)


def print_table(title: str, rows: Sequence[tuple[str, str]], folder: Path | None = None) -> None:
    """Prints what a job came to: a label and a text per line, empty texts left out."""
    from rich.panel import Panel
    from rich.table import Table

    from rlaif_ray.tracking.console import PlainTextConsole, cell

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in rows:
        if text:
            table.add_row(cell(label), cell(text))
    if folder is not None:
        table.add_row("files", cell(folder))
    PlainTextConsole().print(Panel(table, title=cell(title), expand=False))
