"""What a run folder says about its run: finished, still going or crashed, and of a job that is not known too.

Everything but the folder itself may be missing or cut short; what can't be read is said on the page.
"""

from __future__ import annotations

import math
import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlaif_ray.documents import (
    YAML_BYTES,
    at,
    bounded_lines,
    is_below,
    kind_of,
    open_file,
    parse_json,
    parse_yaml,
    read_bytes,
    read_json,
)
from rlaif_ray.errors import DocumentError, InputError
from rlaif_ray.evaluation.report.shapes import CONFIG, EVALUATION, SUMMARY, known_parts
from rlaif_ray.output import shown
from rlaif_ray.paths import expand_home
from rlaif_ray.secrecy import without_secrets
from rlaif_ray.tracking.files import plain

RECORDS = ("metrics.jsonl", "samples.jsonl", "evaluations.jsonl", "labels.jsonl", "pairs.jsonl", "sampled.jsonl")
LEFT_BY_A_RUN = ("resolved.yaml", "summary.json", *RECORDS, "steps.jsonl", "error.log", "tracking_state.json")
GOING_S = 600.0  # a run that wrote nothing for this long, and has no summary, has likely ended
LOG_BYTES = 1 << 16  # of the end of error.log
BLOCK = 32  # rows kept or left out together, so that most of a prompt's samples stay side by side

Json = dict[str, Any]


@dataclass(slots=True)
class Series:
    """One metric over steps; what was no finite number is left out."""

    steps: list[int] = field(default_factory=list)
    values: list[float] = field(default_factory=list)


@dataclass(frozen=True, slots=True)
class Run:
    """One run folder, read."""

    name: str
    folder: Path
    job: str  # "unknown" where nothing says
    state: str  # finished, running, failed, unfinished
    state_note: str
    origin: dict[str, str]  # from, git, versions: the comments of resolved.yaml
    config: Json
    config_text: str
    summary: Json
    metrics: dict[str, Series]
    evaluations: list[Json]
    problems: list[str]  # what could not be read, appended to by later readers

    @property
    def steps(self) -> int:
        """The last step with a row."""
        return max((series.steps[-1] for series in self.metrics.values()), default=0)

    @property
    def total_steps(self) -> int | None:
        """The step it was to end at; None for jobs without steps."""
        found = self.summary.get("total_steps", self.config.get("steps"))
        return found if isinstance(found, int) else None

    def given(self, *keys: str) -> Any:
        """A value of the config by its path; None where a part of it is missing."""
        return at(self.config, *keys)


@dataclass(frozen=True, slots=True)
class Pipeline:
    """A pipeline's folder: the stages' runs, and what its summary tells of them."""

    name: str
    stages: list[Json]
    problems: list[str]  # what could not be read


def find_runs(folders: Sequence[Path]) -> tuple[list[Run], list[Pipeline]]:
    """The runs in these folders, a pipeline's stages in their order; names are told apart where they are the same.

    Raises:
        InputError: a path is no run folder.
    """
    found: list[tuple[str, Path]] = []
    pipelines = []
    for folder in folders:
        given = expand_home(folder).resolve()
        _must_be_run(folder, given)
        if (given / "stages").is_dir():
            problems: list[str] = []
            stages = _summary(given, problems).get("stages") or []
            pipelines.append(Pipeline(given.name, stages, problems))
            found += _stage_folders(given, stages)
        else:
            found.append((given.name, given))
    found = list(dict.fromkeys(found))
    if not found:
        raise InputError(
            f"{folders[0]} is a pipeline without a stage that has begun: there is nothing to report. Start it with "
            f"`rlaif pipeline`, or name another run."
        )
    names = [name for name, _ in found]
    return [
        read_run(path, name if names.count(name) == 1 else f"{path.parent.name}/{path.name}") for name, path in found
    ], pipelines


def _must_be_run(asked: Path, folder: Path) -> None:
    if folder.is_dir() and ((folder / "stages").is_dir() or any((folder / name).exists() for name in LEFT_BY_A_RUN)):
        return
    got = "a folder without any of a run's files" if folder.is_dir() else "a file" if folder.exists() else "nothing"
    raise InputError(
        f"{asked} must be a run's folder (got {got}): the report is made of the resolved.yaml, metrics.jsonl and other "
        f"files that a run leaves there. Name the run_dir that the run printed, such as runs/demo."
    )


def _stage_folders(folder: Path, stages: Sequence[Json]) -> list[tuple[str, Path]]:
    """Those of the summary, then what was begun since; of a pipeline without a summary all that `latest` holds."""
    inside = {path.name: path for path in (folder / "stages").glob("*") if path.is_dir() and is_below(path, folder)}
    told = [(str(s.get("name")), f"{s.get('name')}-{s.get('hash')}") for s in stages]
    known = [(name, inside[own]) for name, own in told if own in inside]  # a summary may say anything
    summed_up = (folder / "summary.json").stat().st_mtime if known else 0.0
    linked = {path.resolve() for path in (folder / "latest").glob("*")}
    found = {path for path in inside.values() if path.resolve() in linked} or set(inside.values())
    if known:  # of these a stage that is going may not be in `latest` yet
        found = {path for path in inside.values() if path.stat().st_mtime > summed_up}
    since = sorted((path.stat().st_mtime, path) for path in found if (path / "resolved.yaml").is_file())
    begun = [(path.name.rpartition("-")[0] or path.name, path) for _, path in since]
    return known + [one for one in begun if one not in known]


def read_run(folder: Path, name: str) -> Run:
    """Everything but its samples, which `Samples` reads."""
    problems: list[str] = []
    text, config = _config(folder, problems)
    summary = _summary(folder, problems)
    origin = dict(re.findall(r"^# (from|git|versions): (.*)$", shown(text), re.MULTILINE))
    job = re.match(r"# rlaif ([\w-]+):", text)
    metrics = _metrics(rows(folder, "metrics.jsonl", problems))
    found = rows(folder, "evaluations.jsonl", problems)
    evaluations = [known_parts(plain(row), EVALUATION, "evaluations.jsonl", problems) for row in found]
    state, note = _state(folder, summary, metrics)
    return Run(
        name=name,
        folder=folder,
        job=str(summary.get("job") or (job[1] if job else "unknown")),
        state=state,
        state_note=note,
        origin=origin,
        config=without_secrets(config),
        config_text=shown(text),
        summary=summary,
        metrics=metrics,
        evaluations=evaluations,
        problems=problems,
    )


def rows(folder: Path, name: str | Path, problems: list[str], limit: int | None = None) -> Iterator[Json]:
    """Rows of a JSON-lines file in a run's folder, or of one elsewhere that is named whole; none if it is
    missing. Of more than `limit` rows every k-th block is given.

    A last line that a kill or a writer at work cut short is left out in silence, any other that is not a JSON object is
    counted in `problems`.
    """
    path, below = folder / name, None if Path(name).is_absolute() else folder
    try:
        if limit is not None:
            with open_file(path, below=below) as file:
                count = sum(part.count(b"\n") for part in iter(lambda: file.read(1 << 20), b""))
        stride = 1 if limit is None else max(1, math.ceil(count / limit))
        unreadable = 0
        with open_file(path, below=below) as file:
            for number, line in enumerate(bounded_lines(file)):
                if number // BLOCK % stride or not line.endswith(b"\n"):
                    continue
                try:
                    yield parse_json(line, dict, lenient=True)
                except DocumentError:
                    unreadable += bool(line.strip())
    except FileNotFoundError:
        return
    except (OSError, DocumentError) as error:
        problems.append(f"{path.name} {_reason(error)}")
        return
    if unreadable:
        problems.append(f"{path.name} has {unreadable} line(s) that are not JSON objects; ignored")
    if stride > 1:
        problems.append(f"{path.name} has {count:,} rows: one of {stride} is shown")


def _metrics(found: Iterator[Json]) -> dict[str, Series]:
    metrics: dict[str, Series] = {}
    for row in found:
        step = row.pop("step", None)
        if not isinstance(step, int):
            continue
        for name, value in row.items():
            if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
                series = metrics.setdefault(name, Series())
                series.steps.append(step)
                series.values.append(value)
    return metrics


def _state(folder: Path, summary: Json, metrics: dict[str, Series]) -> tuple[str, str]:
    last = max((series.steps[-1] for series in metrics.values()), default=0)
    if summary and last <= (summary.get("steps") or last):
        return "finished", ""
    files = [path for path in (folder / name for name in LEFT_BY_A_RUN) if path.exists()]
    files += [path for path in folder.glob("*/*.jsonl") if path.is_file()]
    written = max((path.stat().st_mtime for path in files), default=folder.stat().st_mtime)
    log = folder / "error.log"
    if log.exists() and log.stat().st_mtime >= written - 5:
        return "failed", shown(_last_line(log))
    ago = max(0.0, time.time() - written)
    if ago < GOING_S:
        return "running", f"no summary yet, last written {ago:.0f} s before this page was made"
    when = time.strftime("%Y-%m-%d %H:%M", time.localtime(written))
    return "unfinished", f"no summary: it crashed or was stopped; last written {when}"


def _config(folder: Path, problems: list[str]) -> tuple[str, Json]:
    """Text and values of a run's resolved.yaml; empty where they can't be read."""
    text = ""
    try:
        data = read_bytes(folder / "resolved.yaml", YAML_BYTES, below=folder)
        text = data.decode(errors="replace")
        value = parse_yaml(data).value
    except FileNotFoundError:
        return text, {}
    except (OSError, DocumentError) as error:
        line = getattr(error, "line", None)
        problems.append(f"resolved.yaml{f', line {line},' if line else ''} {_reason(error)}")
        return text, {}
    if not isinstance(value, dict):
        problems.append(f"resolved.yaml holds {kind_of(value)} instead of a mapping")
        return text, {}
    return text, known_parts(plain(value), CONFIG, "resolved.yaml", problems)


def _summary(folder: Path, problems: list[str]) -> Json:
    """A run's summary.json; empty where it can't be read."""
    try:
        found = read_json(folder / "summary.json", dict, lenient=True, below=folder)
        return known_parts(plain(found), SUMMARY, "summary.json", problems)
    except FileNotFoundError:
        return {}
    except (OSError, DocumentError) as error:
        problems.append(f"summary.json {_reason(error)}")
        return {}


def _reason(error: Exception) -> str:
    if isinstance(error, DocumentError):
        return str(error)
    return f"can't be read: {getattr(error, 'strerror', None) or error}"


def _last_line(path: Path) -> str:
    """The last line of a log that says something."""
    try:
        with open_file(path, below=path.parent) as file:
            file.seek(max(0, path.stat().st_size - LOG_BYTES))
            lines = file.read(LOG_BYTES).decode(errors="replace").splitlines()
    except (OSError, DocumentError):
        return ""
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")
