"""Preference records: the one schema, and reading it from whatever form preferences come in, as a stream.

Three forms are read: our records; rows of prompt/response_a/response_b with a person's `label`; and TRL's
prompt/chosen/rejected. The first row decides which one a file is in, and every row must keep to it. Rows are good
until the bad one: the reader raises when it gets there, and what came before has been given out.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from typing_extensions import TypedDict

from rlaif_ray.chat.text import conversation_text
from rlaif_ray.data.json_rows import mended
from rlaif_ray.data.messages import Row, described, read_messages, response_of
from rlaif_ray.data.prompts import HUB_ID, hub_reference, id_of_row, nearest_hint, one_line
from rlaif_ray.data.rows import good_rows, json_rows, parquet_rows
from rlaif_ray.data.trl_rows import read_trl
from rlaif_ray.errors import InputError, RunError
from rlaif_ray.paths import expand_home
from rlaif_ray.types import Message

ENDINGS = (".jsonl", ".parquet")

Text = Annotated[str, Field(strict=True)]
Response = Annotated[str, Field(strict=True, pattern=r"\S")]
Probability = Annotated[float, Field(strict=True, ge=0, le=1)]  # strict: neither true nor "0.5" is a number
Count = Annotated[int, Field(strict=True, ge=0, lt=2**63)]  # what parquet holds


class Judge(TypedDict):
    """Who gave an AI label, and by which words it was asked."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    model: Text
    type: Text  # of the config's judges: "local", "openai", ...
    template: Text
    template_hash: Text


class PreferenceRecord(BaseModel):
    """Two responses to a prompt, and how likely the first is the better one.

    `p_a` is an AI label where there is a `judge`, and people's where there is none. A record that could not be
    labelled says why in `failed` and has no `p_a`: failure to judge is not a judgement.
    """

    model_config = ConfigDict(
        frozen=True, extra="forbid", use_attribute_docstrings=True, protected_namespaces=(), allow_inf_nan=False
    )

    id: Annotated[str, Field(strict=True, min_length=1)]
    prompt: Annotated[tuple[Message, ...], Field(min_length=1)]
    """The conversation; ends with the user's turn."""
    response_a: Response
    response_b: Response
    source_a: Text | None = None
    """The policy that wrote response_a, by name."""
    source_b: Text | None = None
    p_a: Probability | None = None
    """Probability that a is better; null: not labelled."""
    p_a_forward: Probability | None = None
    """The same by the judge with a shown first."""
    p_a_reversed: Probability | None = None
    """With b shown first, mapped back to a."""
    rationales: tuple[Text, ...] = ()
    principle: Text | None = None
    """The principle of a constitution that the judge was asked by, by id."""
    judge: Judge | None = None
    hard: Annotated[bool, Field(strict=True)] = False
    """Read off the judge's text: it gave no probabilities."""
    answer_mass: Probability | None = None
    """Probability that the judge gave to both answers together, in the order where it is less; the rest was on other
    words. Null: read off text, no judge, or a record of an older version."""
    tokens_in: Count = 0
    tokens_out: Count = 0
    cost: Annotated[float, Field(strict=True, ge=0)] = 0.0
    cut: Count = 0
    """Characters left out of the middle of the prompt."""
    failed: Text | None = None
    human: Probability | None = None
    """People's label, kept beside the AI's."""

    @model_validator(mode="before")
    @classmethod
    def _text_that_can_be_written(cls, values: Any) -> Any:
        return mended(values)

    @model_validator(mode="after")
    def _labelled_or_failed(self) -> PreferenceRecord:
        if self.failed is not None and self.p_a is not None:
            raise ValueError(
                f"failed must be null where there is a p_a (got {described(self.failed)} and {self.p_a:g}): what could "
                "not be judged has no label. Remove one of them."
            )
        return self

    @property
    def prefers(self) -> Literal["a", "b", "tie"] | None:
        """The response that the label says is better."""
        if self.p_a is None:
            return None
        return "tie" if self.p_a == 0.5 else "a" if self.p_a > 0.5 else "b"

    @property
    def confidence(self) -> float | None:
        """Probability of the preferred response, in [0.5, 1]."""
        return None if self.p_a is None else max(self.p_a, 1.0 - self.p_a)


def comparison_text(record: PreferenceRecord) -> str:
    """The prompt as a judge reads it."""
    return conversation_text(record.prompt)


def failure_reason(record: PreferenceRecord) -> str:
    """Why a record has no label, without the details."""
    return (record.failed or "unlabelled").split(":")[0]


def human_label(record: PreferenceRecord) -> float | None:
    """What people say of the pair, if they were asked: their own label, or the one kept beside a judge's."""
    return record.p_a if record.judge is None and record.p_a is not None else record.human


def read_preferences(path: str, *, split: str = "train", limit: int | None = None) -> Iterator[PreferenceRecord]:
    """The records of a .jsonl or .parquet file or a hub id, at most its first `limit`, one by one.

    Memory does not grow with the data, but for 8 bytes of hash (70 as Python keeps them) of every id that is given.
    A row without an id is "<file stem>-<row number>".

    Raises:
        InputError: at once for a path that can't be read; for a wrong row when the iterator comes to it, naming file
            and line (row of a parquet file). Also for no rows at all.
        RunError: the connection to the hub broke midway.
    """
    return _records(rows_of(path, split, _VALUES), path, limit)


def check_readable(path: str, *, split: str = "train") -> None:
    """Raises InputError when the data can't be read or its first row is wrong."""
    next(read_preferences(path, split=split, limit=1))


def records_of_rows(rows: Iterable[Mapping[str, Any]], name: str) -> Iterator[PreferenceRecord]:
    """Records of rows that are already in Python, in any of the forms. `rows` can be iterated more than once."""
    return _records(
        lambda: (Row(f"{name}, row {n}", f"{name}-{n}", dict(cells)) for n, cells in enumerate(rows, 1)), name, None
    )


# ---- Where rows come from --------------------------------------------------------------------------------------------

_Rows = Callable[[], Iterator[Row]]  # starts at the first row each time


def rows_of(path: str, split: str, columns: Collection[str]) -> _Rows:
    """The rows of a .jsonl or .parquet file or a hub id, up to the first that is wrong. Cells are there of all columns;
    of a parquet file those that `columns` does not name are None."""
    local = expand_home(path)
    if path and local.exists():
        if local.is_dir() or local.suffix not in ENDINGS:
            kind = "a folder" if local.is_dir() else local.suffix or "no file ending"
            raise InputError(
                f"the preferences {local} are in a format that is not read (got {kind}). Give a {' or '.join(ENDINGS)} "
                "file, or a hub id."
            )
        if split != "train":
            raise InputError(
                f"the preferences {local} have no split {split!r}: a file is all train. "
                "Leave split out, or name the file that holds those rows."
            )
        if local.suffix == ".parquet":
            return lambda: good_rows(parquet_rows(local, columns=columns))
        return lambda: good_rows(json_rows(local))
    if not HUB_ID.fullmatch(path) or local.suffix in ENDINGS:
        near = [file.name for file in local.parent.iterdir()] if local.parent.is_dir() else []
        raise InputError(
            f"the preferences {path!r} do not exist (looked at {local.absolute()}).{nearest_hint(local.name, near)} "
            "Correct the path."
        )
    return lambda: _hub_rows(path, split)


def _hub_rows(path: str, split: str) -> Iterator[Row]:
    import datasets

    name, revision = hub_reference(path)
    try:  # offline a stream has no source, while what was downloaded before is on disk and mapped into memory
        streaming = not datasets.config.HF_HUB_OFFLINE
        data = datasets.load_dataset(name, split=split, revision=revision, streaming=streaming)
    except Exception as error:  # the hub's, the network's and the data set's own errors have no common root
        raise InputError(
            f"the preferences {name!r} are neither a file here nor a Hugging Face data set whose split {split!r} can "
            f"be loaded (got: {one_line(error)}). Check the spelling; a data set that is not in the local cache needs "
            "the network, and a private one HF_TOKEN. Or give a local file."
        ) from error
    number = 0
    try:
        for number, cells in enumerate(data, 1):
            yield Row(f"{name} ({split}), row {number}", f"{name.rpartition('/')[2]}-{number}", dict(cells))
    except Exception as error:
        raise RunError(
            f"the preferences {name!r} broke off after row {number} ({one_line(error)}). Start the command again, or "
            "download the data and give the file."
        ) from error


# ---- The form they are in --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Form:
    """One way to put a preference in columns."""

    name: str
    required: tuple[str, ...]
    spelling: Mapping[str, str]  # of our fields, where it has other names


_OURS = _Form("a preference record", ("prompt", "response_a", "response_b"), {})
_PAIR = _Form("a labelled pair", ("prompt", "response_a", "response_b"), {"p_a": "label"})
_TRL = _Form("a TRL row", ("chosen", "rejected"), {"response_a": "chosen", "response_b": "rejected"})

_VALUES = {*PreferenceRecord.model_fields, "label", "chosen", "rejected"}  # columns whose values are read
_OUR_MARKS = {"p_a", "p_a_forward", "p_a_reversed", "source_a", "source_b", "human"}  # no other form has these
_IF_FIRST = ("id", "prompt", "label")  # every row has these when the first row has


def _form(row: Row) -> _Form:
    columns = row.cells.keys()
    pair, chosen = columns & {"response_a", "response_b"}, columns & {"chosen", "rejected"}
    ours = columns & _OUR_MARKS
    if (pair and chosen) or (pair and ours and "label" in columns):
        other = "chosen" if chosen else "label"
        raise InputError(
            f"{row.place}: the columns are of two forms at once (got {', '.join(sorted(pair | chosen | ours))}"
            f"{'' if chosen else ', label'}). Keep those of one form: remove {other}, or the rest."
        )
    if chosen:
        return _TRL
    if pair:
        return _OURS if ours else _PAIR
    likely = nearest_hint("response_a", columns) or nearest_hint("chosen", columns)
    raise InputError(
        f"{row.place}: there are no responses to compare (its columns: {', '.join(map(str, columns)) or 'none'})."
        f"{likely} Give prompt, response_a and response_b, or prompt, chosen and rejected."
    )


def _check_columns(row: Row, form: _Form, first: Row) -> None:
    """That a row has the columns of the file's form."""
    columns = row.cells.keys()
    here = _form(row)
    if here is not form and not (form is _OURS and here is _PAIR and "label" not in columns):
        raise InputError(
            f"{row.place}: this is {here.name}, and the rows before are each {form.name} (got {', '.join(columns)}). "
            "Keep the two forms in files of their own."
        )
    wanted = (*form.required, *(column for column in _IF_FIRST if column in first.cells))
    missing = next((column for column in wanted if column not in columns), None)
    if missing is not None:
        raise InputError(
            f"{row.place}: there is no column {missing!r} (its columns: {', '.join(columns)})."
            f"{nearest_hint(missing, columns - {*wanted, *PreferenceRecord.model_fields})} Add it."
        )
    if "id" in columns and "id" not in first.cells:
        raise InputError(
            f"{row.place}: this row has an id and the first has none (got {described(row.cells['id'])}). "
            "Give every row an id, or none."
        )
    if form is _PAIR and "label" not in columns:
        near = nearest_hint("label", columns - PreferenceRecord.model_fields.keys() - {"source"})
        if near:  # a misspelt label would make all rows unlabelled ones
            raise InputError(
                f"{row.place}: there is no column 'label' (its columns: {', '.join(columns)}).{near} "
                "Name it label, or remove it where the pairs are to stay unlabelled."
            )


def _records(rows: _Rows, name: str, limit: int | None) -> Iterator[PreferenceRecord]:
    first: Row | None = None
    form = _OURS
    columns: tuple[str, ...] = ()  # of the row before
    seen: set[int] = set()  # hashes of ids
    for row in itertools.islice(rows(), limit):
        if first is None:
            first, form = row, _form(row)
        if tuple(row.cells) != columns:
            _check_columns(row, form, first)
            columns = tuple(row.cells)
        row_id = id_of_row(row)
        if "id" in first.cells:
            if hash(row_id) in seen:
                _must_be_new(row_id, row, rows)
            seen.add(hash(row_id))
        yield _record(row, row_id, form)
    if first is None:
        raise InputError(f"the preferences {name!r} have no rows (got an empty data set). Give one with rows.")


def _must_be_new(row_id: str, row: Row, rows: _Rows) -> None:
    """Reads up to `row` again: of the rows before, only hashes were kept, and those can be equal by chance."""
    before = itertools.takewhile(lambda other: other.place != row.place, rows())
    twin = next((other for other in before if id_of_row(other) == row_id), None)
    if twin is not None:
        raise InputError(
            f"{row.place}: id must be unique (got {row_id!r}, which {twin.place} has too). "
            "Give every row an id of its own, or remove the id column to have them numbered."
        )


# ---- One row ---------------------------------------------------------------------------------------------------------

_MUST_BE = {
    **dict.fromkeys(("response_a", "response_b"), "text that is not empty"),
    **dict.fromkeys(("p_a", "p_a_forward", "p_a_reversed", "answer_mass", "human"), "a number from 0 to 1, or null"),
    **dict.fromkeys(("source_a", "source_b", "principle", "failed"), "text, or null"),
    **dict.fromkeys(("tokens_in", "tokens_out", "cut"), "a whole number, 0 or more"),
    "cost": "a number, 0 or more",
    "hard": "true or false",
    "rationales": "a list of texts",
    "judge": "null, or an object of the texts model, type, template and template_hash",
}


def _record(row: Row, row_id: str, form: _Form) -> PreferenceRecord:
    cells = row.cells
    if form is _TRL:
        prompt, chosen, rejected = read_trl(row)
        values = {"response_a": chosen, "response_b": rejected, "p_a": 1.0}
    else:
        prompt = read_messages(row, "prompt", None)
        if form is _OURS:
            values = cells
        else:
            responses = {key: response_of(row, key) for key in ("response_a", "response_b")}
            values = {**responses, "p_a": cells.get("label")}
    try:
        return PreferenceRecord(**{**values, "id": row_id, "prompt": prompt})
    except ValidationError as error:
        raise InputError(_problem(row.place, error, form)) from error


def _problem(place: str, error: ValidationError, form: _Form) -> str:
    """The first thing that is wrong, in the user's own column names."""
    first = error.errors(include_url=False)[0]
    if not first["loc"]:  # of the record as a whole
        return f"{place}: {first['msg'].removeprefix('Value error, ')}"
    field = str(first["loc"][0])
    if first["type"] == "extra_forbidden" and len(first["loc"]) == 1:
        near = nearest_hint(field, PreferenceRecord.model_fields)
        return f"{place}: {field!r} is not a column of {form.name}.{near} Correct or remove it."
    column = form.spelling.get(field, field)
    inner = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"][1:])
    got = "nothing" if first["type"] == "missing" else described(first["input"])
    return (
        f"{place}: {column} must be {_MUST_BE[field]} (got {got}{inner and f' at {column}{inner}'}). Correct the row."
    )
