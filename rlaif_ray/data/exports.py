"""Preference records on their way out, and back: TRL rows, `datasets`, the hub, and people who check AI labels.

People check in a spreadsheet or in Argilla; their answers become labels of people.
"""

from __future__ import annotations

import bisect
import csv
import importlib
import io
import itertools
import json
import os
import random
import re
import tempfile
import weakref
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif_ray.data.preferences import PreferenceRecord, comparison_text, read_preferences, records_of_rows
from rlaif_ray.data.prompts import nearest_hint, one_line
from rlaif_ray.data.record_files import arrow_schema, record_batches, write_records
from rlaif_ray.documents import parse_json
from rlaif_ray.errors import InputError
from rlaif_ray.writing import replacing

if TYPE_CHECKING:
    import datasets

# ---- Other forms -----------------------------------------------------------------------------------------------------


def trl_row(record: PreferenceRecord) -> dict[str, Any] | None:
    """prompt, chosen and rejected as messages; None for a tie and where there is no label: nothing is preferred."""
    if record.prefers not in ("a", "b"):
        return None
    better, worse = record.response_a, record.response_b
    if record.prefers == "b":
        better, worse = worse, better
    return {
        "prompt": [{"role": turn.role, "content": turn.content} for turn in record.prompt],
        "chosen": [{"role": "assistant", "content": better}],
        "rejected": [{"role": "assistant", "content": worse}],
    }


def write_trl(path: Path, out: Path) -> tuple[int, int]:
    """Writes TRL's rows of the records in `path` to a .jsonl file. Returns how many, and how many were left out."""
    found: Counter[bool] = Counter()
    with replacing(out) as file:
        for record in read_preferences(str(path)):
            row = trl_row(record)
            found[row is not None] += 1
            if row is not None:
                file.write((json.dumps(row, ensure_ascii=False) + "\n").encode())
    return found[True], found[False]


def to_dataset(records: Iterable[PreferenceRecord]) -> datasets.Dataset:
    """The records as a `datasets.Dataset`, in a temporary file that it maps into memory and that goes with it."""
    import datasets
    import pyarrow as pa

    handle, name = tempfile.mkstemp(prefix="rlaif-records-", suffix=".arrow")
    try:
        with os.fdopen(handle, "wb") as file, pa.ipc.new_stream(file, arrow_schema()) as writer:
            for batch in record_batches(records):
                writer.write_batch(batch)
        dataset = datasets.Dataset.from_file(name)
    except BaseException:
        os.unlink(name)
        raise
    weakref.finalize(dataset, Path(name).unlink, missing_ok=True)
    return dataset


def from_dataset(dataset: Iterable[Mapping[str, Any]]) -> Iterator[PreferenceRecord]:
    """Records of a data set, in any form that `read_preferences` reads.

    Raises:
        InputError: a row is wrong.
    """
    return records_of_rows(dataset, "dataset")


def check_hub(repo: str) -> None:
    """Raises InputError when it is clear beforehand that nothing can be pushed to `repo`."""
    from huggingface_hub import constants, get_token

    if not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", repo):
        raise InputError(f"push_to_hub must be owner/name (got {repo!r}). Write it so, such as push_to_hub=me/labels.")
    if constants.HF_HUB_OFFLINE:
        raise InputError(
            f"push_to_hub={repo} needs the hub (got HF_HUB_OFFLINE=1, which forbids it). Unset HF_HUB_OFFLINE, or "
            "leave push_to_hub out."
        )
    if get_token() is None:
        raise InputError(
            f"push_to_hub={repo} needs a token (got none). Set HF_TOKEN to one that may write, or run `hf auth login`."
        )


def push_to_hub(path: Path, repo: str) -> None:
    """Pushes the records of a file to a data set on the hub; one that is new is made private.

    Raises:
        InputError: there is no token or no network, or the hub refuses it.
    """
    check_hub(repo)
    try:
        to_dataset(read_preferences(str(path))).push_to_hub(repo, private=True)
    except InputError:
        raise
    except Exception as error:  # the hub's and the network's errors have no common root
        raise InputError(
            f"push_to_hub={repo} failed (got: {one_line(error)}). The records stay in {path}. Check the name, the "
            "token's rights and the network, then start the same command again."
        ) from error


# ---- Review in a spreadsheet -----------------------------------------------------------------------------------------

# The judge's label stands last, behind the cell to fill in: who has seen it before is no independent check.
_SHEET = ("id", "prompt", "response_a", "response_b", "human", "note", "judge_prefers")
_VERDICTS = {"a": 1.0, "b": 0.0, "tie": 0.5}  # what people answer, as p_a
# What a spreadsheet would run, not show: at a cell's start, and where another cell begins if its language separates
# them by ; or tabs. Behind a line break the "- " of a list is none, unless something is called or linked in that line.
_FORMULA = "[ \t]*[=+@\\-＝＋－＠']"
_IN_LINE = r"[ \t]*(?:[=@＝＠']|[+＋－-](?! [^|!(\n]*$))"
_BEGINS = re.compile(rf"\A(?={_FORMULA}|[\t\r\n])|(?<=[;\t])(?={_FORMULA})|(?<=[\r\n])(?={_IN_LINE})", re.MULTILINE)
_BEGUN = re.compile(rf"\A'(?={_FORMULA}|[\t\r\n])|(?<=[;\t\r\n])'(?={_FORMULA})")
_CONFIDENCE_EDGES = (2 / 3, 5 / 6)  # unsure, leaning, sure: thirds of [0.5, 1]


@dataclass(frozen=True, slots=True)
class Review:
    """What people said of AI labels."""

    rows: int  # in the sheet
    checked: int  # with an answer
    decided: int  # of those: an answer that is no tie, to a row that has an AI label
    agreed: int  # of those: the judge prefers the same response
    agreement: float | None  # share over all labels: the sheet has more unsure ones than the data, so it is weighted


def sample_for_review(path: Path, n: int, seed: int, out: Path) -> int:
    """Writes `n` AI labels, drawn evenly from unsure, leaning and sure ones, as a sheet for people to check.

    They fill in the column `human` with a, b or tie. Returns how many there are: fewer where the file has fewer.

    Raises:
        InputError: there are no AI labels, or `out` holds something else, such as answers.
    """
    must_be_free(out)
    draw = random.Random(f"{seed}/review")
    strata: list[list[PreferenceRecord]] = [[] for _ in range(len(_CONFIDENCE_EDGES) + 1)]
    seen = [0] * len(strata)
    for record in read_preferences(str(path)):
        if record.judge is None or record.confidence is None:
            continue
        which = _stratum(record)
        seen[which] += 1
        if len(strata[which]) < n:  # a reservoir: every label of a stratum is as likely to be in it
            strata[which].append(record)
        elif (place := draw.randrange(seen[which])) < n:
            strata[which][place] = record
    if not any(seen):
        raise InputError(f"{path} has no AI labels to review (got no record with a judge and a p_a). Label it first.")
    for records in strata:
        draw.shuffle(records)
    chosen = list(itertools.islice(filter(None, itertools.chain(*itertools.zip_longest(*strata))), n))
    draw.shuffle(chosen)
    try:
        with replacing(out) as file:
            # With a BOM: Excel takes it for UTF-8 only then.
            text = io.TextIOWrapper(file, encoding="utf-8-sig", newline="", write_through=True)
            sheet = csv.writer(text, quoting=csv.QUOTE_ALL)  # a ; or tab in a cell separates none then
            sheet.writerow(_SHEET)
            for record in chosen:
                label = f"{record.prefers} ({record.confidence:.2f})"
                cells = (record.id, comparison_text(record), record.response_a, record.response_b, "", "", label)
                sheet.writerow(map(_quoted, cells))
            text.detach()
    except OSError as error:
        raise InputError(f"the sheet {out} can't be written ({error.strerror or error}). Name another file.") from error
    return len(chosen)


def merge_review(path: Path, review: Path, out: Path) -> Review:
    """Writes the records of `path` to `out`, with the answers of a checked sheet as people's labels.

    A checked record gets p_a and human by the answer and no judge; what the judge said stays in p_a_forward,
    p_a_reversed and the rationales.

    Raises:
        InputError: a row of the sheet is wrong, or belongs to no record.
    """
    sheet = _read_sheet(review)
    unknown = dict(sheet)
    labels: Counter[int] = Counter()  # AI labels per stratum
    decided: Counter[int] = Counter()
    agreed: Counter[int] = Counter()

    def merged() -> Iterator[PreferenceRecord]:
        for record in read_preferences(str(path)):
            answer, _ = unknown.pop(record.id, (None, ""))
            if record.judge is not None and record.p_a is not None:
                which = _stratum(record)
                labels[which] += 1
                if answer in (0.0, 1.0):
                    decided[which] += 1
                    agreed[which] += record.prefers == ("a" if answer else "b")
            yield record if answer is None else _answered(record, answer)
        for name, (_, place) in unknown.items():
            raise InputError(
                f"{place}: no record of {path} has this id (got {name!r}). Merge the sheet with the file it was drawn "
                "from, or mend the id: spreadsheets rewrite some, such as 007 to 7."
            )

    write_records(merged(), out)
    total = sum(labels[which] for which in decided)
    share = sum(labels[which] * agreed[which] / decided[which] for which in decided) / total if total else None
    checked = sum(answer is not None for answer, _ in sheet.values())
    return Review(len(sheet), checked, decided.total(), agreed.total(), share)


def must_be_free(out: Path) -> None:
    """Raises InputError when writing a sheet to `out` would cost something."""
    if not out.exists():
        return
    try:
        answers = [answer for answer, _ in _read_sheet(out).values() if answer is not None]
    except InputError as error:
        raise InputError(
            f"{out} exists and is not a sheet written by this command: it would be overwritten. Name another file."
        ) from error
    if answers:
        raise InputError(
            f"{out} has answers in it (got {len(answers)}), which would be overwritten. Merge them first, or name "
            "another file."
        )


def _stratum(record: PreferenceRecord) -> int:
    assert record.confidence is not None
    return bisect.bisect_right(_CONFIDENCE_EDGES, record.confidence)


def _answered(record: PreferenceRecord, answer: float) -> PreferenceRecord:
    """The record with people's label. What the judge said of each order, and why, stays."""
    return record.model_copy(update={"p_a": answer, "human": answer, "judge": None, "failed": None})


def _quoted(cell: str) -> str:
    """The cell with an apostrophe where a spreadsheet would take what follows for a formula; `_unquoted` takes them
    off."""
    return _BEGINS.sub("'", cell)


def _unquoted(cell: str) -> str:
    return _BEGUN.sub("", cell)


def _read_sheet(path: Path) -> dict[str, tuple[float | None, str]]:
    """Answer and place of every row, by its id."""
    longest = csv.field_size_limit(2**31 - 1)  # 128 kB by default, for all of the process
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            header = file.readline()
            file.seek(0)
            delimiter = max(",;\t", key=header.count)  # spreadsheets write the one that their language has
            return dict(_sheet_rows(csv.reader(file, delimiter=delimiter, strict=True), path))
    except UnicodeDecodeError as error:
        raise InputError(
            f"the checked sheet {path} is not UTF-8 (got byte {error.object[error.start]:#x} in it). Save it as "
            "CSV UTF-8."
        ) from error
    except (OSError, csv.Error) as error:
        raise InputError(f"the checked sheet {path} can't be read as CSV (got: {error}). Save it as CSV.") from error
    finally:
        csv.field_size_limit(longest)


def _sheet_rows(rows: Any, path: Path) -> Iterator[tuple[str, tuple[float | None, str]]]:
    header = [name.strip().lower() for name in next(rows, [])]
    for column in ("id", "human"):
        if column not in header:
            raise InputError(
                f"{path}, line 1: there is no column {column!r} (its columns: {', '.join(header) or 'none'})."
                f"{nearest_hint(column, header)} Keep the first row as it was written."
            )
    places: dict[str, str] = {}
    start = rows.line_num + 1
    for number, row in enumerate(rows, 2):
        place, start = f"{path}, line {start} (row {number})", rows.line_num + 1
        cells = dict(zip(header, row, strict=False))
        name, said = _unquoted(cells.get("id", "")), cells.get("human", "").strip().lower()
        if not any(row):
            continue
        if name in places:
            raise InputError(
                f"{place}: id must be unique (got {name!r}, as in {places[name]}). Remove one of the rows."
            )
        if said and said not in _VERDICTS:
            raise InputError(
                f"{place}: human must be a, b or tie, or empty (got {cells['human']!r}). Correct the cell."
            )
        places[name] = place
        yield name, (_VERDICTS.get(said), place)


# ---- Review in Argilla -----------------------------------------------------------------------------------------------

_QUESTION = "preference"
_TEXTS = {"response_a", "response_b"}


def to_argilla(records: Iterable[PreferenceRecord]) -> Iterator[dict[str, Any]]:
    """Each record as `argilla.Record.from_dict` of Argilla 2 takes it, the AI label as a suggestion.

    What Argilla has no place for goes along as JSON in the metadatum `record`. The prompt is shown as text: the
    server's own field for conversations takes no message above 20,000 characters.
    """
    for record in records:
        row: dict[str, Any] = {
            "id": record.id,
            "fields": {"prompt": comparison_text(record), **record.model_dump(include=_TEXTS)},
            "metadata": {"record": record.model_dump_json(exclude={"id", *_TEXTS})},
            "suggestions": {},
            "responses": {},
        }
        if record.prefers is not None:
            judge = (record.judge["model"] or record.judge["type"] or "judge") if record.judge else "people"
            agent = re.sub(r"[^a-zA-Z0-9_:./ -]", "_", judge)[:200]  # the server takes no others
            score = record.confidence
            row["suggestions"] = {_QUESTION: {"value": record.prefers, "score": score, "agent": agent}}
            row["metadata"]["confidence"] = score
        yield row


def from_argilla(rows: Iterable[Mapping[str, Any]]) -> Iterator[PreferenceRecord]:
    """Records of rows as `argilla.Record.to_dict` gives them. An answer becomes people's label; several, their mean.

    Raises:
        InputError: a row did not come from `to_argilla`, or an answer is none of a, b, tie.
    """
    for row in rows:
        try:
            texts = {name: row["fields"][name] for name in _TEXTS}
            record = PreferenceRecord(id=row["id"], **texts, **parse_json(row["metadata"]["record"], dict))
            said = [response["value"] for response in row["responses"].get(_QUESTION, ())]
            answers = [_VERDICTS[value] for value in said]
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(
                f"the Argilla record {row.get('id')!r} was not pushed from here (got: {one_line(error)}). "
                "Pull from the data set that the records were pushed to."
            ) from error
        yield _answered(record, sum(answers) / len(answers)) if answers else record


def push_to_argilla(path: Path, name: str, *, workspace: str | None = None, client: Any = None) -> int:
    """Puts the records of a file before annotators, in the data set `name`. Returns how many.

    `client` is an `argilla.Argilla`; by default one by ARGILLA_API_URL and ARGILLA_API_KEY. Records that are there
    already are updated.

    Raises:
        InputError: argilla is not installed, or its server can't be used.
    """
    rg = _argilla()
    try:
        client = client or rg.Argilla()
        dataset = (
            client.datasets(name, workspace=workspace)
            or rg.Dataset(name=name, workspace=workspace, settings=_argilla_settings(rg), client=client).create()
        )
    except Exception as error:
        raise InputError(_no_argilla(name, error)) from error
    count, rows = 0, to_argilla(read_preferences(str(path)))
    while chunk := [rg.Record.from_dict(row) for row in itertools.islice(rows, 250)]:
        dataset.records.log(chunk)
        count += len(chunk)
    return count


def pull_from_argilla(name: str, out: Path, *, workspace: str | None = None, client: Any = None) -> int:
    """Writes the records of the data set `name` with the answers that annotators have submitted. Returns how many.

    Raises:
        InputError: argilla is not installed, its server can't be used, or the data set is not one of ours.
    """
    rg = _argilla()
    try:
        dataset = (client or rg.Argilla()).datasets(name, workspace=workspace)
    except Exception as error:
        raise InputError(_no_argilla(name, error)) from error
    if dataset is None:
        raise InputError(f"Argilla has no data set {name!r} (workspace {workspace or 'default'}). Correct the name.")

    def rows() -> Iterator[dict[str, Any]]:
        for record in dataset.records(with_responses=True):
            done = [r for r in record.responses if r.question_name == _QUESTION and r.status == "submitted"]
            yield {**record.to_dict(), "responses": {_QUESTION: [{"value": response.value} for response in done]}}

    return write_records(from_argilla(rows()), out)


def _argilla() -> Any:
    try:
        return importlib.import_module("argilla")
    except ImportError as error:
        raise InputError(
            f"Argilla needs the package argilla (got: {error}). Install it with `pip install argilla`, or review in a "
            "spreadsheet (--sample)."
        ) from error


def _argilla_settings(rg: Any) -> Any:
    return rg.Settings(
        guidelines="Read the conversation and both responses. Which response is better? Say tie when neither is.",
        fields=[rg.TextField(name=name) for name in ("prompt", "response_a", "response_b")],
        questions=[rg.LabelQuestion(name=_QUESTION, title="Which is better?", labels=list(_VERDICTS))],
        metadata=[rg.FloatMetadataProperty(name="confidence", min=0.5, max=1.0)],
        allow_extra_metadata=True,
    )


def _no_argilla(name: str, error: Exception) -> str:
    return (
        f"Argilla can't be used for {name!r} (got: {one_line(error)}). Set ARGILLA_API_URL and ARGILLA_API_KEY to a "
        "running server, and check the workspace."
    )
