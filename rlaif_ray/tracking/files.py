"""JSON lines and JSON in the run folder: whole rows or none, whole files or the old ones."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter, ValidationError

from rlaif_ray import documents
from rlaif_ray.documents import bounded_lines, parse_json
from rlaif_ray.errors import DocumentError, InputError, RunError


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: NaN and infinities become None, tensors and numpy scalars plain numbers."""
    if hasattr(value, "item"):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, str | bool | int):
        return value
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, Iterable):
        return [plain(inner) for inner in value]
    return str(value)


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Appends one line per row in one write, flushed: a killed process can cut only the last line."""
    data = b"".join(_line(row) for row in rows)
    try:
        with path.open("ab") as file:
            file.write(data)
    except OSError as error:
        raise RunError(_cannot_write(path, error)) from error


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a JSON-lines file, none if it is missing; a last line cut short by a kill is left out.

    Raises:
        InputError: a line other than the last is no JSON object.
    """
    if not path.exists():
        return []
    lines = path.read_bytes().split(b"\n")
    while lines and not lines[-1]:
        lines.pop()
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            rows.append(parse_json(line, dict, lenient=True))
        except DocumentError as error:
            if number == len(lines):
                break
            raise InputError(
                f"{path} must hold one JSON object per line (got {line[:60]!r} in line {number}, which {error}): a "
                f"resumed run goes on from these rows. Repair or delete the line, or start anew with "
                f"checkpoint.resume=never."
            ) from error
    return rows


def read_rows_streaming(path: Path, kind: Any = None) -> Iterator[dict[str, Any]]:
    """Rows of a JSON-lines file as they come, none if it is missing; a last line cut short by a kill is left out.

    Args:
        kind: a TypedDict that every row must fit.

    Raises:
        InputError: a line other than the last is no JSON object, or not of the kind.
    """
    if not path.exists():
        return
    fits = TypeAdapter(kind).validate_python if kind is not None else lambda row: row
    with path.open("rb") as file:
        for number, line in enumerate(bounded_lines(file), start=1):
            if not line.endswith(b"\n"):
                return
            try:
                row = parse_json(line, dict, lenient=True)
                fits(row)
            except (DocumentError, ValidationError) as error:
                told = error if isinstance(error, DocumentError) else f"is not what was written: {_wrong(error)}"
                raise InputError(
                    f"{path} must hold one JSON object per line (got {line[:60]!r} in line {number}, which {told}): a "
                    f"run that is started again goes on from these rows. Remove the file to make them anew."
                ) from error
            yield row


def _wrong(error: ValidationError) -> str:
    """The first thing that is wrong with a row."""
    first = error.errors(include_url=False, include_input=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    return f"{key}: {first['msg']}" if key else str(first["msg"])


def cut_rows(path: Path, count: int) -> None:
    """Drops all but the first `count` lines, in place."""
    if not path.exists():
        return
    with path.open("r+b") as file:
        for _ in range(count):
            file.readline()
        file.truncate(file.tell())


def rows_done(path: Path, total: int, chunk: int) -> int:
    """How many of `total` rows need not be made again: all if they are there, else those of whole chunks, to which the
    file is cut: the calls that follow are those of a run without an interruption."""
    rows = sum(1 for _ in read_rows_streaming(path))
    if rows >= total:
        return total
    cut_rows(path, rows // chunk * chunk)
    return rows // chunk * chunk


def replace_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes other rows in place of those of `path`, one by one; all of them, or, where `rows` raises, none.

    `rows` may read `path` meanwhile.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with beside.open("wb") as file:
            for row in rows:
                file.write(_line(row))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise RunError(_cannot_write(path, error)) from error
    finally:
        beside.unlink(missing_ok=True)


def keep_rows(path: Path, last_step: int) -> None:
    """Drops rows after `last_step`: the steps a resumed run repeats."""
    rows = [row for row in read_rows(path) if row.get("step", 0) <= last_step]
    lines = (json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    _replace(path, "".join(lines))


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Writes `path` whole, or leaves what was there."""
    try:
        _replace(path, json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n")
    except OSError as error:
        raise RunError(_cannot_write(path, error)) from error


def read_json(path: Path) -> dict[str, Any]:
    """The object in `path`, empty if the file is missing or no JSON. What stands in it may be of any type: see
    `documents.at`."""
    try:
        return documents.read_json(path, dict, lenient=True)
    except (OSError, DocumentError):
        return {}


def prepare_folder(folder: Path, logs: Iterable[Path], resume_step: int) -> None:
    """Makes the run folder and its logs: emptied for a new run, cut back to `resume_step` for a resumed one.

    Raises:
        InputError: the folder can't be written.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for path in logs:
            if resume_step:
                keep_rows(path, resume_step)
            else:
                _replace(path, "")
        if not resume_step:
            (folder / "summary.json").unlink(missing_ok=True)  # of a run whose rows are gone
    except OSError as error:
        raise InputError(
            f"run_dir must be a folder this process can write (got {folder}): {error.strerror or error}. "
            f"The run leaves its metrics, samples and checkpoints there. Choose another with run_dir=PATH."
        ) from error


def _replace(path: Path, text: str) -> None:
    beside = path.with_name(f".{path.name}.{os.getpid()}.new")
    try:
        with beside.open("wb") as file:
            file.write(_encode(text))
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    finally:
        beside.unlink(missing_ok=True)


def _line(row: Mapping[str, Any]) -> bytes:
    return _encode(json.dumps(plain(row), ensure_ascii=False, allow_nan=False) + "\n")


def _encode(text: str) -> bytes:
    # A lone surrogate, which models do emit, becomes \udxxx: the JSON escape of itself.
    return text.encode("utf-8", "backslashreplace")


def _cannot_write(path: Path, error: OSError) -> str:
    return (
        f"{path} can't be written ({error.strerror or error}): the run would go on without a record. "
        f"Free space on that disk or restore the folder, then resume."
    )
