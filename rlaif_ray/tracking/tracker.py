"""The one object a job's loop reports to."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from rlaif_ray.errors import RunError
from rlaif_ray.tracking.display import open_display
from rlaif_ray.tracking.files import (
    append_rows,
    keep_rows,
    plain,
    prepare_folder,
    read_json,
    read_rows_streaming,
    write_json,
)
from rlaif_ray.tracking.memory import PeakMemory
from rlaif_ray.tracking.wandb_run import TrackingSettings, WandbRun, flat, keep_run_id

PHASES = ("rollout", "feedback", "annotate", "update", "weight_sync", "evaluation", "checkpoint")


def open_tracker(
    run_dir: Path,
    *,
    config: Mapping[str, Any],
    tracking: TrackingSettings,
    total_steps: int,
    resume_step: int = 0,
    wandb_run_id: str | None = None,
    name: str,
) -> Tracker:
    """A tracker for `with`. Resumed after `resume_step`, it drops later rows that a killed process left.

    Args:
        config: the resolved config, shown in wandb without secrets.
        resume_step: the step of the checkpoint to go on from; 0 starts the files anew.
        wandb_run_id: the resumed run's, for a run folder that doesn't know it: another machine's.
        name: of the run.

    Raises:
        InputError: `run_dir` can't be written.
    """
    assert 0 <= resume_step <= total_steps, f"resume_step {resume_step} outside 0..{total_steps}"
    if wandb_run_id is not None and resume_step:
        keep_run_id(run_dir, wandb_run_id)
    return Tracker(run_dir, config, tracking, total_steps, resume_step, name)


class StepMetrics:
    """Collects the numbers and phase times of one step."""

    def __init__(self, show_phase: Callable[[str | None], None]) -> None:
        self.values: dict[str, Any] = {}
        self.seconds: dict[str, float] = defaultdict(float)  # per phase, without the phases inside it
        self._show_phase = show_phase
        self._open: list[str] = []
        self._mark = time.perf_counter()

    def add(self, metrics: Mapping[str, Any]) -> None:
        """Adds numbers to the step's row; a later value of the same name wins."""
        self.values.update({name: value.item() if hasattr(value, "item") else value for name, value in metrics.items()})

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Times its body as `time/<name>_s`, several of one name together. `name` is one of PHASES."""
        assert name in PHASES, f"phase {name!r} is none of {PHASES}"
        self._charge()
        self._open.append(name)
        self._show_phase(name)
        try:
            yield
        finally:
            self._charge()
            self._open.pop()
            self._show_phase(self._open[-1] if self._open else None)

    def _charge(self) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._mark
        self._mark = now


class Tracker:
    """Writes metrics.jsonl, samples.jsonl, evaluations.jsonl and summary.json, mirrors them to wandb, shows progress.

    Made by open_tracker.
    """

    def __init__(
        self,
        run_dir: Path,
        config: Mapping[str, Any],
        tracking: TrackingSettings,
        total_steps: int,
        resume_step: int,
        name: str,
    ) -> None:
        self.run_dir = run_dir
        self.name = name
        self._config, self._tracking = config, tracking
        self._total_steps, self._resume_step = total_steps, resume_step
        self._began = time.perf_counter()
        self._setup_s: float | None = None  # known once the first step begins
        self._metrics_path = run_dir / "metrics.jsonl"
        self._samples_path = run_dir / "samples.jsonl"
        self._evaluations_path = run_dir / "evaluations.jsonl"
        self._state_path = run_dir / "tracking_state.json"  # totals over the processes of a resumed run
        self._logs = (self._metrics_path, self._samples_path, self._evaluations_path)
        prepare_folder(run_dir, self._logs, resume_step, read_whole=(self._metrics_path, self._evaluations_path))
        earlier = read_json(self._state_path) if resume_step else {}
        self._earlier_wall_s = float(earlier.get("wall_s", 0.0))
        self._earlier_peak_gb = float(earlier.get("peak_rss_gb", 0.0))
        self._last_step = resume_step
        self._current: tuple[int, StepMetrics] | None = None
        self._held_samples: list[dict[str, Any]] = []  # of the current step, written when it succeeds
        self._outside_s: dict[str, float] = defaultdict(float)  # phases outside of steps, of this process
        self._memory = PeakMemory()
        self._display = open_display(name, total_steps, resume_step)

    def __enter__(self) -> Tracker:
        self._display.start()
        try:
            self._memory.start()
            self._wandb = WandbRun(
                self.run_dir,
                config=self._config,
                tracking=self._tracking,
                name=self.name,
                resumed=self._resume_step > 0,
                warn=self.note,
            )
        except BaseException:
            self._memory.stop()
            self._display.stop()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self._memory.stop()
            with suppress(RunError):  # a full disk must not hide the error that ends the run
                self._save_state()
            self._wandb.finish(failed=kind is not None)
        finally:
            self._display.stop()

    def watch_processes(self, pids: Callable[[], list[int]]) -> None:
        """Counts these processes, and what they start, in the run's memory; asked anew about every second."""
        self._memory.watch(pids)

    @property
    def wandb_run_id(self) -> str | None:
        """By which wandb knows the run; None where it is off."""
        return self._wandb.run_id

    @property
    def last_step(self) -> int:
        """The last step whose row is written."""
        return self._last_step

    def rewind(self, step: int) -> None:
        """Drops the rows after `step`: the run has gone back to it, and repeats what came after."""
        prepare_folder(self.run_dir, self._logs, step)
        self._last_step = step

    def note(self, text: str) -> None:
        """Shows a line with the time since the start."""
        self._display.note(text)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Shows and times what happens outside of steps, such as set-up; inside one it is the step's own phase."""
        if self._current is not None:
            with self._current[1].phase(name):
                yield
            return
        began = time.perf_counter()
        self._display.phase(name)
        self.note(f"{name} ...")
        try:
            yield
        except BaseException:
            self._display.phase(None)
            raise
        took_s = time.perf_counter() - began
        self._outside_s[name] += took_s
        self._display.phase(None)
        self.note(f"{name} done in {took_s:.1f} s")

    @contextmanager
    def step(self, step: int) -> Iterator[StepMetrics]:
        """One step of the loop. Its row is written when the body ends; a body that raises leaves nothing."""
        assert self._current is None, f"step {step} inside step {self._current and self._current[0]}"
        assert step > self._last_step, f"step {step} after step {self._last_step}"
        began = time.perf_counter()
        if self._setup_s is None:
            self._setup_s = began - self._began
        self._display.begin(step)
        metrics = StepMetrics(self._display.phase)
        self._current = (step, metrics)
        try:
            yield metrics
            samples = self._held_samples
        finally:
            self._current, self._held_samples = None, []
        step_s = time.perf_counter() - began
        self._write_step(step, metrics, step_s, samples)

    def _write_step(self, step: int, metrics: StepMetrics, step_s: float, samples: list[dict[str, Any]]) -> None:
        times = {f"time/{name}_s": seconds for name, seconds in metrics.seconds.items()}
        times["time/other_s"] = max(0.0, step_s - sum(metrics.seconds.values()))
        values = {**metrics.values, **times, "time/step_s": step_s}
        if samples:
            append_rows(self._samples_path, samples)
        append_rows(self._metrics_path, [{"step": step, **values}])  # last: a step counts once this row is there
        self._last_step = step
        self._save_state()
        self._wandb.log(values, step)
        self._wandb.table(samples[: self._tracking.samples_per_step], step)
        self._display.step(step, values)

    def samples(self, step: int, rows: list[dict[str, Any]]) -> None:
        """Appends completions of `step` to samples.jsonl; the first few also go to wandb's table.

        Within the step they are written when it succeeds.
        """
        rows = [{"step": step, **row} for row in rows]
        if self._current is not None and self._current[0] == step:
            self._held_samples += rows
            return
        append_rows(self._samples_path, rows)
        self._wandb.table(rows[: self._tracking.samples_per_step], step)

    def evaluation(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Appends a row to evaluations.jsonl, in place of one of the same step; wandb shows it as `evaluation/...`."""
        keep_rows(self._evaluations_path, step - 1)  # a run that went on from this step measures it again
        append_rows(self._evaluations_path, [{"step": step, **metrics}])
        numbers = {name: value for name, value in flat(plain(metrics), "evaluation/").items() if type(value) is not str}
        self._wandb.log(numbers, step)

    def summary(self, extra: Mapping[str, Any]) -> dict[str, Any]:
        """Writes summary.json and returns it: what print_summary shows, and `extra`.

        `wall_s` and `peak_rss_gb` are of this process and those it was resumed from, `setup_s` and `outside_steps_s`
        of this one, `phase_share` of all steps in metrics.jsonl.
        """
        rows = [_summed_up(row) for row in read_rows_streaming(self._metrics_path)]
        wall_s = self._wall_s()
        self._memory.sample()
        summary = {
            "name": self.name,
            "steps": self._last_step,
            "total_steps": self._total_steps,
            "wall_s": wall_s,
            "setup_s": wall_s - self._earlier_wall_s if self._setup_s is None else self._setup_s,
            "peak_rss_gb": self._peak_gb(),
            "phase_share": phase_share(rows),
            "outside_steps_s": dict(self._outside_s),
            "reward": _first_and_last(rows, "reward/mean"),
            "wandb_failures": self._wandb.failures,
            **extra,
        }
        summary = {key: value for key, value in plain(summary).items() if value is not None}
        write_json(self.run_dir / "summary.json", summary)
        self._save_state()
        self._wandb.summary(summary)
        return summary

    def _wall_s(self) -> float:
        return self._earlier_wall_s + time.perf_counter() - self._began

    def _peak_gb(self) -> float:
        return max(self._earlier_peak_gb, self._memory.peak_gb)

    def _save_state(self) -> None:
        # After every step, so that a killed process still counts.
        write_json(self._state_path, {"wall_s": self._wall_s(), "peak_rss_gb": self._peak_gb()})


_SUMMED_UP = ("reward/mean", "time/step_s", *(f"time/{name}_s" for name in (*PHASES, "other")))


def _summed_up(row: Mapping[str, Any]) -> dict[str, float]:
    """Of a row what the summary needs: numbers, whatever somebody has made of the file."""
    return {key: row[key] for key in _SUMMED_UP if isinstance(row.get(key), int | float)}


def phase_share(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Share of all step time spent in each phase and outside of them (`other`); they add up to 1."""
    total_s = sum(row.get("time/step_s", 0.0) for row in rows)
    if not total_s:
        return {}
    seconds = {name: sum(row.get(f"time/{name}_s", 0.0) for row in rows) for name in (*PHASES, "other")}
    return {name: spent_s / total_s for name, spent_s in seconds.items() if spent_s}


def _first_and_last(rows: Sequence[Mapping[str, float]], metric: str) -> dict[str, Any] | None:
    values = [row[metric] for row in rows if metric in row]
    if not values:
        return None
    window = max(1, len(values) // 10)  # one step's mean is noisy
    return {"first": sum(values[:window]) / window, "last": sum(values[-window:]) / window, "window": window}
