"""Preference records on their way out: files, TRL's form, the hub, and a person who checks them."""

from __future__ import annotations

import csv
import json
import os
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from rlaif_ray.data.preferences import PreferenceRecord, comparison_text, read_preferences
from rlaif_ray.errors import InputError, RunError

REVIEW_COLUMNS = ("id", "prompt", "response_a", "response_b", "human", "note", "judge_p_a")
_ANSWERS = {"a": 1.0, "b": 0.0, "tie": 0.5}
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


# ---- Files -----------------------------------------------------------------------------------------------------------


class RecordWriter:
    """Appends records to a .jsonl file; a wanted .parquet is made of it at the end.

    Every write is whole lines, so a killed process can cut only the last one; that is dropped on opening.
    """

    def __init__(self, path: Path) -> None:
        """Raises InputError when the path is of no known format or can't be written."""
        if path.suffix not in (".jsonl", ".parquet"):
            raise InputError(f"output must end in .jsonl or .parquet (got {path}). Rename it.")
        self._path = path
        self._lines = path if path.suffix == ".jsonl" else path.with_suffix(".parquet.jsonl")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = self._lines.open("a+b")
        except OSError as error:
            raise InputError(f"output {path} can't be written ({error.strerror}). Name another file.") from error
        self.count = self._drop_torn_line()

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()

    def _drop_torn_line(self) -> int:
        self._file.seek(0)
        count = end = 0
        for line in self._file:
            if not line.endswith(b"\n"):
                break
            count, end = count + 1, end + len(line)
        self._file.truncate(end)
        return count

    def keep(self, count: int) -> None:
        """Drops all but the first `count` records."""
        self._file.seek(0)
        for _ in range(count):
            self._file.readline()
        self._file.truncate(self._file.tell())
        self.count = min(self.count, count)

    def write(self, records: Iterable[PreferenceRecord]) -> None:
        """Appends them in one write, handed to the system.

        Raises:
            RunError: the disk does not take them.
        """
        lines = [record.model_dump_json() + "\n" for record in records]
        try:
            self._file.write("".join(lines).encode())
            self._file.flush()
        except OSError as error:
            raise RunError(
                f"{self._lines} can't be written ({error}): what is in it is kept. Free space, then start the same "
                f"command again."
            ) from error
        self.count += len(lines)

    def finish(self) -> None:
        """Makes the wanted file of the lines; they stay for a run that goes on."""
        self._file.flush()
        if self._path != self._lines:
            to_parquet(self._lines, self._path)


def to_parquet(lines: Path, path: Path) -> None:
    """Writes the records of a .jsonl file as parquet: whole, or not at all."""
    import pyarrow
    from pyarrow.parquet import ParquetWriter

    partial = path.with_name(f".{path.name}.partial")
    schema = _schema()
    with ParquetWriter(partial, schema) as writer:
        for batch in _batches(read_preferences(str(lines)), 1000):
            rows = [record.model_dump() for record in batch]
            writer.write_table(pyarrow.Table.from_pylist(rows, schema=schema))
    os.replace(partial, path)


def _schema() -> Any:
    import pyarrow as pa

    turn = pa.struct([("role", pa.string()), ("content", pa.string())])
    judge = pa.struct([(name, pa.string()) for name in ("type", "model", "template", "template_hash")])
    kinds = {
        "prompt": pa.list_(turn),
        "judge": judge,
        "rationales": pa.list_(pa.string()),
        "hard": pa.bool_(),
        **dict.fromkeys(("tokens_in", "tokens_out", "cut"), pa.int64()),
        **dict.fromkeys(("p_a", "p_a_forward", "p_a_reversed", "cost", "human"), pa.float64()),
    }
    return pa.schema([(name, kinds.get(name, pa.string())) for name in PreferenceRecord.model_fields])


def _batches(records: Iterable[PreferenceRecord], size: int) -> Iterator[list[PreferenceRecord]]:
    batch: list[PreferenceRecord] = []
    for record in records:
        batch.append(record)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch


# ---- Other forms -----------------------------------------------------------------------------------------------------


def to_trl(record: PreferenceRecord) -> dict[str, Any] | None:
    """TRL's conversational preference row; None for ties and what has no label: TRL knows better and worse only."""
    if record.p_a is None or record.p_a == 0.5:
        return None
    better, worse = record.response_a, record.response_b
    if record.p_a < 0.5:
        better, worse = worse, better
    return {
        "prompt": [{"role": m.role, "content": m.content} for m in record.prompt],
        "chosen": [{"role": "assistant", "content": better}],
        "rejected": [{"role": "assistant", "content": worse}],
    }


def write_trl(path: Path, out: Path) -> tuple[int, int]:
    """Writes TRL's rows as .jsonl; (rows written, records left out)."""
    written = left_out = 0
    with out.open("w", encoding="utf-8") as file:
        for record in read_preferences(str(path)):
            row = to_trl(record)
            left_out += row is None
            if row is not None:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")
                written += 1
    return written, left_out


def to_dataset(path: Path) -> Any:
    """The records of a file as a `datasets.Dataset`."""
    import datasets

    def rows() -> Iterator[dict[str, Any]]:
        for record in read_preferences(str(path)):
            yield record.model_dump()

    return datasets.Dataset.from_generator(rows, features=datasets.Features.from_arrow_schema(_schema()))


def from_dataset(data: Iterable[dict[str, Any]]) -> Iterator[PreferenceRecord]:
    """Records of a data set's rows, in the form of `to_dataset`."""
    for row in data:
        yield PreferenceRecord.model_validate({key: value for key, value in row.items() if value is not None})


def push_to_hub(path: Path, repository: str) -> None:
    """Pushes the records to a data set on the hub.

    Raises:
        InputError: the hub is not reached or does not let us.
    """
    try:
        to_dataset(path).push_to_hub(repository)
    except Exception as error:  # the hub's and the network's errors have no common root
        raise InputError(
            f"push_to_hub={repository} did not work ({type(error).__name__}: {str(error).splitlines()[0][:200]}); the "
            f"records are in {path}. Check HF_TOKEN, HF_HUB_OFFLINE and the name."
        ) from error


# ---- Review by a person ----------------------------------------------------------------------------------------------


def sample_for_review(path: Path, count: int, seed: int, out: Path) -> int:
    """Writes `count` labelled records as a CSV for a person to fill in; returns how many there are.

    Half of them are drawn from all, half with a weight for unsure ones, where a person's word tells most.
    """
    draw = random.Random(seed)
    keyed = []  # (key, record): the smallest keys stay; one pass over any number of records
    for record in read_preferences(str(path)):
        if record.p_a is None:
            continue
        unsure = 1.0 - abs(2.0 * record.p_a - 1.0)
        weight = 0.5 + unsure
        keyed.append((draw.random() ** (1.0 / weight), record))
        if len(keyed) > 4 * count:
            keyed = sorted(keyed, key=lambda item: -item[0])[:count]
    chosen = [record for _, record in sorted(keyed, key=lambda item: -item[0])[:count]]
    draw.shuffle(chosen)
    out.parent.mkdir(parents=True, exist_ok=True)
    with out.open("w", encoding="utf-8", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(REVIEW_COLUMNS)
        for record in chosen:
            # The judge's own word comes last: whoever reads from left to right decides first.
            cells = (
                record.id,
                comparison_text(record),
                record.response_a,
                record.response_b,
                "",
                "",
                f"{record.p_a:.3f}",
            )
            writer.writerow([_safe(cell) for cell in cells])
    return len(chosen)


@dataclass(frozen=True, slots=True)
class Merged:
    """What a checked file said."""

    rows: int
    checked: int
    agreed: int  # with the judge; ties on either side are no agreement unless both are


def merge_review(path: Path, review: Path, out: Path) -> Merged:
    """Writes the records with the person's answers as labels of people; the judge's evidence stays beside them.

    Raises:
        InputError: a wrong cell, naming file and line.
    """
    answers, rows = _read_review(review)
    agreed = checked = 0
    out.unlink(missing_ok=True)
    with RecordWriter(out) as writer:
        for batch in _batches(read_preferences(str(path)), 1000):
            merged = []
            for record in batch:
                said = answers.pop(record.id, None)
                if said is not None:
                    value, _ = said
                    checked += 1
                    agreed += record.p_a is not None and _side(record.p_a) == _side(value)
                    record = record.model_copy(update={"p_a": value, "judge": None, "human": value, "failed": None})
                merged.append(record)
            writer.write(merged)
        writer.finish()
    if answers:
        name, (_, line) = next(iter(answers.items()))
        out.unlink()
        raise InputError(
            f"{review}, line {line}: id {name!r} is in none of the records of {path}. Give the review of that file."
        )
    return Merged(rows=rows, checked=checked, agreed=agreed)


def _read_review(review: Path) -> tuple[dict[str, tuple[float, int]], int]:
    answers: dict[str, tuple[float, int]] = {}
    rows = 0
    with review.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file)
        missing = {"id", "human"} - set(reader.fieldnames or ())
        if missing:
            raise InputError(f"{review}, line 1: column {', '.join(sorted(missing))} is missing. Keep the header.")
        for row in reader:
            rows += 1
            said = (row["human"] or "").strip().lower()
            if said and said not in _ANSWERS:
                raise InputError(
                    f"{review}, line {reader.line_num}: human must be a, b or tie, or empty (got {said!r}). Correct it."
                )
            if said:
                answers[_unsafe(row["id"])] = (_ANSWERS[said], reader.line_num)
    return answers, rows


def _side(p: float) -> int:
    return (p > 0.5) - (p < 0.5)


def _safe(cell: str) -> str:
    """A spreadsheet would run a cell that begins like a formula."""
    return f"'{cell}" if cell.startswith(_FORMULA) else cell


def _unsafe(cell: str) -> str:
    return cell[1:] if cell.startswith("'") and cell[1:].startswith(_FORMULA) else cell
