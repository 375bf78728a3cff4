"""Preference records: two responses to a prompt, and who says which is better. Read as a stream of any length.

Three forms of rows are read, told by the first row and then required of all:

    ours       what `rlaif pairs` and `rlaif label` write
    labelled   prompt, response_a, response_b and, from people, label (probability that a is better) and source
    TRL        prompt, chosen, rejected; each text, or a list of messages; chosen and rejected may hold the prompt
"""

from __future__ import annotations

import difflib
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlaif_ray.data.chat import conversation_text
from rlaif_ray.errors import InputError
from rlaif_ray.types import Message

Probability = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False, strict=True)]
Text = Annotated[str, Field(min_length=1, strict=True)]


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Turn(_Part):
    """One message of the prompt."""

    role: Literal["system", "user", "assistant"]
    content: Annotated[str, Field(strict=True)]


class JudgeName(_Part):
    """Which judge gave a label, and how it was asked."""

    type: str
    model: str = ""
    template: str = ""
    template_hash: str = ""


class PreferenceRecord(_Part):
    """A pair of responses with, once there is one, its label. The one schema of such files."""

    id: Text
    prompt: Annotated[tuple[Turn, ...], Field(min_length=1)]
    response_a: Text
    response_b: Text
    source_a: str | None = None  # which policy made it
    source_b: str | None = None
    p_a: Probability | None = None  # that a is better; None: not labelled, or the judge failed
    p_a_forward: Probability | None = None  # by the judge, with a shown first
    p_a_reversed: Probability | None = None  # by the judge, with b shown first
    rationales: tuple[str, ...] = ()
    principle: str | None = None
    judge: JudgeName | None = None  # None where there is a label: people gave it
    hard: bool = False  # read off the judge's text: it gave no probabilities
    tokens_in: Annotated[int, Field(ge=0)] = 0
    tokens_out: Annotated[int, Field(ge=0)] = 0
    cost: Annotated[float, Field(ge=0)] = 0.0
    cut: Annotated[int, Field(ge=0)] = 0  # characters left out of the middle of the prompt
    failed: str | None = None  # why the judge gave no label
    human: Probability | None = None  # what people say of the pair, beside the judge's label

    @property
    def messages(self) -> tuple[Message, ...]:
        return tuple(Message(turn.role, turn.content) for turn in self.prompt)


def comparison_text(record: PreferenceRecord) -> str:
    """The prompt as a judge reads it."""
    return conversation_text(record.messages)


def human_label(record: PreferenceRecord) -> float | None:
    """What people say of the pair, if they were asked."""
    return record.p_a if record.judge is None and record.p_a is not None else record.human


# ---- Reading ---------------------------------------------------------------------------------------------------------

FORMATS = (".jsonl", ".parquet")
_FORMS = {
    "ours": ({"id", "prompt", "response_a", "response_b"}, set(PreferenceRecord.model_fields)),
    "labelled": ({"prompt", "response_a", "response_b"}, {"id", "label", "source"}),
    "TRL": ({"chosen", "rejected"}, {"id", "prompt"}),
}
_BATCH_ROWS = 256  # of a parquet file


def read_preferences(path: str, *, split: str = "train", limit: int | None = None) -> Iterator[PreferenceRecord]:
    """The records of a .jsonl or .parquet file or a hub data set, in order, a few in memory at a time.

    A row without an id is called "<file stem>-<row number>".

    Raises:
        InputError: at the first wrong row, naming file and line; those before it have been given out by then.
    """
    form: str | None = None
    seen: set[int] = set()  # 8 bytes of a hash each, whatever the ids' lengths
    count = 0
    for number, place, row in _rows(path, split):
        if limit is not None and count >= limit:
            return
        form = form or _form_of(row, place)
        record = _record(row, form, place, number, path)
        key = int.from_bytes(hashlib.blake2b(record.id.encode(), digest_size=8).digest(), "little")
        if key in seen:
            raise InputError(
                f"{place}: id must be unique (got {record.id!r} again). Give every row an id of its own, or remove the "
                f"id column to have them numbered."
            )
        seen.add(key)
        count += 1
        yield record
    if not count:
        raise InputError(f"the preferences {path} have no rows (got an empty data set). Give a file with pairs.")


def check_readable(path: str, *, split: str = "train") -> None:
    """Raises InputError when not even the first record can be read: before engines start."""
    next(read_preferences(path, split=split, limit=1))


def _rows(path: str, split: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """(row number from 1, place for messages, row)."""
    file = Path(path).expanduser()
    if path and file.is_file():
        if split != "train":
            raise InputError(f"the preferences {file} have no split {split!r}: a file is all train. Leave it out.")
        if file.suffix == ".jsonl":
            return _json_lines(file)
        if file.suffix == ".parquet":
            return _parquet(file)
        raise InputError(
            f"the preferences {file} are in a format that is not read (got {file.suffix or 'no file ending'}). "
            f"Give one of: {', '.join(FORMATS)}."
        )
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path) or file.suffix in FORMATS or file.exists():
        near = [str(file.parent / other.name) for other in file.parent.iterdir()] if file.parent.is_dir() else []
        close = difflib.get_close_matches(str(file), near, n=1)
        raise InputError(
            f"the preferences {path!r} are no file (looked at {file.absolute()})."
            f"{f' Did you mean {close[0]}?' if close else ''} Correct the path."
        )
    return _hub(path, split)


def _json_lines(file: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    number = 0
    with file.open("rb") as lines:
        for line_number, line in enumerate(lines, start=1):
            place = f"{file}, line {line_number}"
            if line_number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            number += 1
            try:
                row = json.loads(line)
            except ValueError as error:
                cut = "" if line.endswith(b"\n") else ", and the line has no end: the file was cut off"
                raise InputError(
                    f"{place}: not a JSON object ({str(error).partition(': line')[0]}{cut}; got {_short(line)}). "
                    f"Mend or remove the line."
                ) from error
            if not isinstance(row, dict):
                raise InputError(f"{place}: not a JSON object (got {_short(line)}). Mend or remove the line.")
            yield number, place, row


def _parquet(file: Path) -> Iterator[tuple[int, str, dict[str, Any]]]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    number = 0
    try:
        with ParquetFile(file) as table:
            for batch in table.iter_batches(batch_size=_BATCH_ROWS):
                for row in batch.to_pylist():
                    number += 1
                    yield number, f"{file}, row {number}", dict(row)
    except (pyarrow.ArrowException, OSError) as error:
        raise InputError(
            f"the preferences {file} can't be read as parquet after row {number} (got: {_short(str(error))}). "
            f"Mend the file."
        ) from error


def _hub(name: str, split: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    import datasets

    try:
        data = iter(datasets.load_dataset(name, split=split, streaming=True))
        first = next(data, None)
    except Exception as error:  # the hub's, the network's and the data set's own errors have no common root
        raise InputError(
            f"the preferences {name!r} are no file here, and no Hugging Face data set whose split {split!r} can be "
            f"loaded (got: {_short(str(error), 200)}). Check the spelling; a data set that is not in the local cache "
            "needs the network, and a private one HF_TOKEN. Or give a local file."
        ) from error
    for number, row in enumerate([first, *()] if first is not None else [], start=1):
        yield number, f"{name} ({split}), row {number}", dict(row)
    for number, row in enumerate(data, start=2):
        yield number, f"{name} ({split}), row {number}", dict(row)


# ---- One row ---------------------------------------------------------------------------------------------------------


def _form_of(row: dict[str, Any], place: str) -> str:
    columns = set(row)
    for form, (needed, more) in _FORMS.items():
        if needed <= columns <= needed | more:
            return form
    if {"chosen", "rejected"} & columns:
        form = "TRL"
    else:
        form = "ours" if {"p_a", "judge", "response_a"} & columns and "label" not in columns else "labelled"
    needed, more = _FORMS[form]
    missing, unknown = sorted(needed - columns), sorted(columns - needed - more)
    close = {name: difflib.get_close_matches(name, unknown or columns, n=1) for name in missing}
    told = [f"{name} is missing" + (f" (is it {near[0]}?)" if near else "") for name, near in close.items()]
    told += [f"{name} is not known" for name in unknown if not any(name in near for near in close.values())]
    raise InputError(
        f"{place}: the columns are those of no kind of preferences (got {', '.join(sorted(columns)) or 'none'}: "
        f"{'; '.join(told)}). Give prompt, response_a, response_b and label; or prompt, chosen, rejected."
    )


def _record(row: dict[str, Any], form: str, place: str, number: int, path: str) -> PreferenceRecord:
    needed, more = _FORMS[form]
    if not (needed <= set(row) <= needed | more):
        wrong = sorted((needed - set(row)) | (set(row) - needed - more))
        raise InputError(
            f"{place}: another kind of row than the first, which is of the {form} kind (the difference: "
            f"{', '.join(wrong)}). Keep one kind in a file."
        )
    values = {key: value for key, value in row.items() if value is not None}
    values.setdefault("id", f"{Path(path).stem}-{number}")
    if form == "TRL":
        values = _from_trl(values, place)
    elif form == "labelled":
        label = values.pop("label", None)
        values.pop("source", None)
        if isinstance(label, bool) or (label is not None and not isinstance(label, int | float)):
            raise InputError(f"{place}: label must be a number from 0 to 1 (got {_short(label)}). Correct it.")
        values["p_a"] = label if label is None else float(label)
    if isinstance(values.get("prompt"), str):
        values["prompt"] = [{"role": "user", "content": values["prompt"]}]
    try:
        record = PreferenceRecord.model_validate(values)
    except ValidationError as error:
        raise InputError(f"{place}: {_problem(error, form)}") from error
    if record.prompt[-1].role != "user" or not any(turn.content.strip() for turn in record.prompt):
        raise InputError(f"{place}: prompt must end with a message from the user that says something. Correct it.")
    for name in ("response_a", "response_b"):
        if not getattr(record, name).strip():
            raise InputError(f"{place}: {name} is empty: a pair has two responses. Fill it in or remove the row.")
    return record


def _problem(error: ValidationError, form: str) -> str:
    first = error.errors(include_url=False)[0]
    name = ".".join(str(part) for part in first["loc"])
    if form == "labelled" and name == "p_a":
        name = "label"
    if first["type"] == "missing":
        return f"{name} is missing: a pair has a prompt and two responses. Fill it in or remove the row."
    if first["type"] == "string_too_short":
        return f"{name} is empty: a pair has two responses. Fill it in or remove the row."
    if name in ("label", "p_a", "human"):
        return f"{name} must be a number from 0 to 1 (got {_short(first['input'])}). Correct it."
    return f"{name} is wrong: {first['msg']} (got {_short(first['input'])}). Correct it."


def _from_trl(values: dict[str, Any], place: str) -> dict[str, Any]:
    """chosen is response a, with certainty; a prompt inside chosen and rejected is taken out of them."""
    chosen, rejected = values.pop("chosen"), values.pop("rejected")
    prompt = values.get("prompt")
    if isinstance(chosen, list) and isinstance(rejected, list):
        if prompt is None:
            shared = 0
            while shared < min(len(chosen), len(rejected)) and chosen[shared] == rejected[shared]:
                shared += 1
            prompt, chosen, rejected = chosen[:shared], chosen[shared:], rejected[shared:]
        chosen, rejected = (
            _one_answer(side, name, place) for side, name in ((chosen, "chosen"), (rejected, "rejected"))
        )
    elif prompt is None:
        raise InputError(
            f"{place}: prompt is missing: text in chosen and rejected does not say where the prompt ends. Add the "
            f"prompt column, or give lists of messages."
        )
    return {**values, "prompt": prompt, "response_a": chosen, "response_b": rejected, "p_a": 1.0}


def _one_answer(messages: list[Any], name: str, place: str) -> str:
    if len(messages) != 1 or not isinstance(messages[0], dict) or messages[0].get("role") != "assistant":
        raise InputError(
            f"{place}: {name} must be one message of the assistant after the prompt (got {len(messages)} messages). "
            f"Correct it."
        )
    return str(messages[0].get("content", ""))


def _short(value: Any, limit: int = 60) -> str:
    text = value.decode("utf-8", "replace").strip() if isinstance(value, bytes) else value
    shown = text if isinstance(text, str) and isinstance(value, bytes) else repr(text)
    return shown if len(shown) <= limit else shown[:limit].rstrip() + "..."
