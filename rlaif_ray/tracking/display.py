"""What a person sees: a live bar on a terminal, a plain line per step elsewhere, a table at the end. All on stdout."""

from __future__ import annotations

import math
import os
import sys
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from rlaif_ray.output import on_one_line, say, shown

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

SHOWN = {
    "reward/mean": "reward",
    "kl/mean": "kl",
    "completion/length_mean": "length",
}  # metrics of the progress line and their names there
_WINDOW = 10  # steps over which the time left is estimated


class Display(Protocol):
    """Shows the progress of a run."""

    def start(self) -> None: ...
    def stop(self) -> None: ...
    def note(self, text: str) -> None: ...
    def phase(self, name: str | None) -> None: ...
    def begin(self, step: int) -> None: ...
    def step(self, step: int, row: Mapping[str, Any]) -> None: ...


def open_display(name: str, total_steps: int, resume_step: int) -> Display:
    live = sys.stdout.isatty() and os.environ.get("TERM", "dumb") != "dumb"
    return (LiveDisplay if live else PlainDisplay)(name, total_steps, resume_step)


class _Pace:
    """Seconds per step and time left, from the last steps with all that lies between them."""

    def __init__(self, total_steps: int) -> None:
        self.total_steps = total_steps
        self._marks: deque[float] = deque(maxlen=_WINDOW + 1)

    def begin(self) -> None:
        if not self._marks:
            self._marks.append(time.perf_counter())

    def end(self) -> None:
        self._marks.append(time.perf_counter())

    @property
    def step_s(self) -> float:
        return (self._marks[-1] - self._marks[0]) / (len(self._marks) - 1) if len(self._marks) > 1 else math.nan

    def eta(self, step: int) -> str:
        return clock(self.step_s * (self.total_steps - step)) if len(self._marks) > 1 else "-:--"


class PlainDisplay:
    """Lines for logs: one per note, one per step."""

    def __init__(self, name: str, total_steps: int, resume_step: int) -> None:
        self._name = name
        self._pace = _Pace(total_steps)
        self._began = time.perf_counter()
        self._first = resume_step

    def start(self) -> None:
        after = f", resumed after step {self._first}" if self._first else ""
        say(f"{self._name}: {self._pace.total_steps} steps{after}")

    def stop(self) -> None: ...

    def note(self, text: str) -> None:
        say(f"[{clock(time.perf_counter() - self._began)}] {text}")

    def phase(self, name: str | None) -> None: ...

    def begin(self, step: int) -> None:
        self._pace.begin()

    def step(self, step: int, row: Mapping[str, Any]) -> None:
        self._pace.end()
        parts = (f"step {step}/{self._pace.total_steps}", key_metrics(row), f"eta {self._pace.eta(step)}")
        say("  ".join(part for part in parts if part))


class LiveDisplay:
    """Two lines that stay at the bottom of a terminal: a bar, then the newest metrics. Notes scroll above them."""

    def __init__(self, name: str, total_steps: int, resume_step: int) -> None:
        from rich.live import Live
        from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn

        from rlaif_ray.tracking.console import PlainTextConsole

        self._console = PlainTextConsole()
        self._pace = _Pace(total_steps)
        self._began = self._phase_began = time.perf_counter()
        self._phase: str | None = "set-up"
        self._metrics = ""
        self._step = resume_step
        self._progress = Progress(
            SpinnerColumn(),
            TextColumn("{task.description}", style="bold", markup=False),
            BarColumn(),
            TextColumn("{task.fields[state]}", markup=False),
            console=self._console,
            auto_refresh=False,
        )
        self._task = self._progress.add_task(shown(name), total=total_steps, completed=resume_step, state="")
        self._live = Live(console=self._console, get_renderable=self._render, refresh_per_second=4)

    def start(self) -> None:
        self._live.start()

    def stop(self) -> None:
        self._phase = None
        self._live.stop()

    def note(self, text: str) -> None:
        self._console.print(shown(f"[{clock(time.perf_counter() - self._began)}] {text}"))

    def phase(self, name: str | None) -> None:
        self._phase, self._phase_began = name, time.perf_counter()

    def begin(self, step: int) -> None:
        self._pace.begin()

    def step(self, step: int, row: Mapping[str, Any]) -> None:
        self._pace.end()
        self._step, self._metrics = step, on_one_line(key_metrics(row))
        self._progress.update(self._task, completed=step)

    def _render(self) -> RenderableType:
        from rich.console import Group
        from rich.text import Text

        now = time.perf_counter()
        state = [f"step {self._step}/{self._pace.total_steps}", f"{clock(now - self._began)} elapsed"]
        if not math.isnan(self._pace.step_s):
            state += [f"{self._pace.step_s:.1f} s/step", f"{self._pace.eta(self._step)} left"]
        self._progress.update(self._task, state="  ".join(state))
        line = Text(f"  {self._metrics}" if self._metrics else "", no_wrap=True, overflow="ellipsis")
        if self._phase is not None:
            line.append(f"  {self._phase} {clock(now - self._phase_began)}", style="cyan")
        return Group(self._progress.get_renderable(), line)


def key_metrics(row: Mapping[str, Any]) -> str:
    """The few numbers of a step worth a look; the first three where a job has none of the usual ones."""
    names = {key: label for key, label in SHOWN.items() if key in row}
    if not names:
        others = [key for key in row if key != "step" and not key.startswith("time/")]
        names = {key: key for key in others[:3]}
    parts = [f"{label} {number(row[key])}" for key, label in names.items()]
    if "time/step_s" in row:
        parts.append(f"{fixed(row['time/step_s'], 1)} s/step")
    return "  ".join(parts)


def number(value: Any) -> str:
    """Three significant digits, and no exponent for large numbers."""
    if not isinstance(value, int | float):
        return "nan" if value is None else str(value)
    return f"{value:.0f}" if math.isfinite(value) and abs(value) >= 100 else f"{value:.3g}"


def share(value: float | None) -> str:
    """Three decimals, "-" for what was not measured."""
    return fixed(value, 3)


def fixed(value: float | None, decimals: int) -> str:
    """So many decimals, "-" for what was not measured or is no number."""
    return "-" if value is None else f"{value:.{decimals}f}"


def digits(value: float | None, count: int) -> str:
    """So many significant digits, "-" for what is not known or is no number."""
    return "-" if value is None else f"{value:.{count}g}"


def percent(value: float | None, decimals: int = 0) -> str:
    """41%, "-" for what was not measured or is no number."""
    return "-" if value is None else f"{value:.{decimals}%}"


def interval(found: Mapping[str, Any]) -> str:
    """[0.412, 0.588], "" where it is not known."""
    low, high = found["ci95_low"], found["ci95_high"]
    return "" if low is None or high is None else f"[{low:.3f}, {high:.3f}]"


def clock(seconds: float | None) -> str:
    """3:24, or 1:02:03; "-" for what is no number."""
    if seconds is None or not math.isfinite(seconds):
        return "-"
    minutes, rest = divmod(max(0, round(seconds)), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"


def print_summary(summary: Mapping[str, Any], run_dir: Path, console: Console | None = None) -> None:
    """Prints a run's end: time, memory, where the time went, reward, held-out gain, where the files are.

    `summary` is Tracker.summary's. Its `held_out`, if there is one, has `before`, `after` and the paired `gain`, each
    with `mean`, `ci95_low`, `ci95_high` and `n`; its `harmless` has `before` and `after`.
    """
    from rich.panel import Panel
    from rich.table import Table

    from rlaif_ray.tracking.console import PlainTextConsole, cell

    console = console or PlainTextConsole()
    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in _summary_lines(summary, run_dir):
        table.add_row(label, cell(text))
    console.print(Panel(table, title=cell(summary.get("name", run_dir.name)), expand=False))


def _summary_lines(summary: Mapping[str, Any], run_dir: Path) -> list[tuple[str, str]]:
    lines = [
        ("steps", f"{summary['steps']} of {summary['total_steps']}"),
        ("time", f"{clock(summary['wall_s'])}, of which set-up {clock(summary['setup_s'])}"),
        ("peak memory", f"{fixed(summary['peak_rss_gb'], 1)} GB"),
    ]
    shares = [(name, part) for name, part in summary["phase_share"].items() if part is not None and part >= 0.005]
    if shares:
        shares.sort(key=lambda item: -item[1])
        lines.append(("step time", ", ".join(f"{name} {percent(part)}" for name, part in shares)))
    if reward := summary.get("reward"):
        mean = f" (mean of {reward['window']} steps each)" if (reward["window"] or 0) > 1 else ""
        lines.append(("reward", f"{number(reward['first'])} -> {number(reward['last'])}{mean}"))
    held_out = summary.get("held_out")
    if isinstance(held_out, Mapping):
        lines += _held_out_lines(held_out)
    for key, title in (("rate", "harmless"), ("over_refusal", "safe, refused")):
        rates = [found[key] for found in summary.get("harmless", {}).values() if found.get(key) is not None]
        lines.append((title, " -> ".join(f"{share(rate['rate'])} {interval(rate)}" for rate in rates)))
    lines.append(("evaluated by", summary.get("evaluator", "")))
    present = ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl", "summary.json", "report.html", "policy")
    lines.append(("files", str(run_dir)))
    lines.append(("", ", ".join(name for name in present if (run_dir / name).exists())))
    return [(label, text) for label, text in lines if text]


def _held_out_lines(held_out: Mapping[str, Any]) -> list[tuple[str, str]]:
    """The score before and after, the gain with its interval, and what the interval says, in words."""
    before, after, gain = (held_out[name] for name in ("before", "after", "gain"))
    lines = [("held-out score", f"{number(before['mean'])} -> {number(after['mean'])} ({gain['n']} prompts)")]
    low, high = gain["ci95_low"], gain["ci95_high"]
    if gain["mean"] is None or low is None or high is None:
        return lines
    lines.append(("held-out gain", f"{gain['mean']:+.3g}, 95% interval [{low:+.3g}, {high:+.3g}]"))
    if low > 0:
        words = "The interval is above zero: the judge scores the policy higher on prompts it never trained on."
    elif high < 0:
        words = "The interval is below zero: the judge scores the policy lower on prompts it never trained on."
    else:
        words = "The interval includes zero: this run does not show a gain. More steps or more held-out prompts may."
    return [*lines, ("", words)]
