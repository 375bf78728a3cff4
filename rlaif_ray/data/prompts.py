"""Prompts: read from files or the hub as a stream, and rendered to the policy's tokens.

`load_prompts` names file and row (for .jsonl the line) of whatever is wrong.
"""

from __future__ import annotations

import difflib
import glob
import itertools
import re
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from rlaif_ray.chat.renderer import ChatRenderer
from rlaif_ray.data.columns import TokenLists
from rlaif_ray.data.messages import Row, described, read_messages, shorten
from rlaif_ray.data.prompt_table import Conversations, Places, PromptTable, repeated
from rlaif_ray.data.rows import RowOrError, WrongRows, count_rows, json_rows, parquet_rows
from rlaif_ray.errors import InputError
from rlaif_ray.paths import expand_home
from rlaif_ray.tracking.progress import SILENT_S, ItemProgress

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlaif_ray.chat.template import ChatTemplate
    from rlaif_ray.types import Message

PACKAGED = Path(__file__).parent / "prompts"  # package:train and package:heldout

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@[\w./-]+)?")  # see hub_reference
_ENDINGS = (".jsonl", ".json", ".parquet", ".csv")
_TOKENISED_AT_A_TIME = 1024  # prompts
_LOOKED_AT = 1000  # rows of a file, for the column of the prompts

# Which split a file of a folder belongs to, by the words of its name; a file with none of them is for training.
_SPLIT_WORDS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "val", "dev"},
    "test": {"test", "testing", "eval", "evaluation"},
    "heldout": {"heldout"},
}


@dataclass(frozen=True, slots=True)
class LoadedPrompts:
    """The prompts of one data set, in its order."""

    prompts: PromptTable  # never empty
    skipped: int  # left out for being longer than max_prompt_tokens


def read_conversations(
    path: str, *, split: str = "train", column: str = "prompt", limit: int | None = None, system: str | None = None
) -> list[tuple[Message, ...]]:
    """The prompts of `path` as `load_prompts` reads them, before a model's tokens come into it.

    Raises InputError for wrong rows.
    """
    found: list[tuple[Message, ...]] = []
    _read_all(path, split, column, limit, lambda row: found.append(read_messages(row, column, system)))
    return found


def load_prompts(
    path: str,
    *,
    split: str = "train",
    column: str = "prompt",
    limit: int | None = None,
    system: str | None = None,
    tokenizer: PreTrainedTokenizerBase | ChatTemplate,
    max_prompt_tokens: int,
    too_long: Literal["error", "skip"] = "error",
) -> LoadedPrompts:
    """Every prompt of `path`, at most its first `limit` rows, as text and as tokens of `tokenizer`, or of the one that
    a ChatTemplate brings. Progress is shown where it takes longer than a second.

    `path` is `package:train`, `package:heldout`, a file (.jsonl, .json, .parquet, .csv), a folder of such files, or a
    hub id. `column` holds a string, or a list of {role, content} messages that ends with the user's. `system` is put
    before every prompt that has no system message; some chat templates put one of their own where there is none
    (SmolLM2's does), and `system=""` keeps them from it. Local files are read anew each time, past every cache.

    A prompt's id is its row's `id`, else "<file stem>-<row number>". Raises InputError for wrong rows, several at once.
    """
    found, places, ids = Conversations(system), Places(), array("q")

    def keep(row: Row) -> None:
        name = id_of_row(row)
        found.append(name, read_messages(row, column, system))
        places.append(row.place)
        ids.append(hash(name))

    _read_all(path, split, column, limit, keep)
    if not len(found):
        raise InputError(f"the prompts {path!r} have no rows (got an empty data set). Give a data set with prompts.")
    _must_be_unique(found.ids, ids, places)
    renderer = ChatRenderer(tokenizer)
    tokens, kept, skipped = TokenLists(), array("I"), array("I")
    for row, own in enumerate(_tokenised(found, places, renderer, None if too_long == "skip" else max_prompt_tokens)):
        short = len(own) <= max_prompt_tokens
        tokens.append(own if short else ())
        if short:
            kept.append(row)
        else:
            skipped.append(len(own))
    if not kept:
        raise InputError(
            f"no prompt of {path!r} is left: all {len(skipped)} are longer than {max_prompt_tokens} tokens and were "
            f"skipped (too_long=skip; the shortest has {min(skipped)}). Raise max_prompt_tokens or the context."
        )
    rows: Sequence[int] = kept if skipped else range(len(found))
    table = PromptTable(found, tokens, rows, opened=renderer.opened, tags=renderer.chat.tags)
    return LoadedPrompts(table, len(skipped))


def _read_all(path: str, split: str, column: str, limit: int | None, keep: Callable[[Row], None]) -> None:
    """Gives every row to `keep`; raises what is wrong with rows together."""
    wrong, total = WrongRows(), count_rows(path, limit)
    with ItemProgress("reading prompts", total, "prompts", after_s=SILENT_S) as progress, wrong.noted():
        for row in progress.over(_read(path, split, column, limit)):
            with wrong.noted():
                if isinstance(row, InputError):
                    raise row
                keep(row)
            if wrong.full:
                break
    wrong.check()


def _must_be_unique(ids: Sequence[str], hashes: array[int], places: Places) -> None:
    wrong = WrongRows()
    for before, again in repeated(hashes):
        if ids[before] == ids[again] and not wrong.full:
            with wrong.noted():
                raise InputError(
                    f"{places[again]}: id must be unique (got {ids[again]!r}, which {places[before]} has too). "
                    "Give every row an id of its own, or remove the id column to have them numbered."
                )
    wrong.check()


def _tokenised(
    found: Conversations, places: Places, renderer: ChatRenderer, longest: int | None
) -> Iterator[tuple[int, ...]]:
    """The tokens of each, none longer than `longest`.

    Raises:
        InputError: conversations can't be rendered, or are too long: those of the rows that were under way.
    """
    with ItemProgress("tokenising prompts", len(found), "prompts", after_s=SILENT_S) as progress:
        for start in range(0, len(found), _TOKENISED_AT_A_TIME):
            rows = range(start, min(start + _TOKENISED_AT_A_TIME, len(found)))
            talks, own = [found.messages(row) for row in rows], [places[row] for row in rows]
            yield from _together(talks, own, renderer, longest)
            progress.advance(len(rows))


def _together(
    talks: Sequence[Sequence[Message]], places: Sequence[str], renderer: ChatRenderer, longest: int | None
) -> list[tuple[int, ...]]:
    try:
        tokens = renderer.tokens_of(talks, places)
    except InputError:  # of the first; with it, of the others
        wrong = WrongRows()
        for messages, place in zip(talks, places, strict=True):
            with wrong.noted():
                renderer.tokens(messages, place)
        wrong.check()
        raise
    wrong = WrongRows()
    for place, one in zip(places, tokens, strict=True):
        with wrong.noted():
            _must_fit(one, longest, place)
    wrong.check()
    return tokens


def _must_fit(tokens: Sequence[int], longest: int | None, place: str) -> None:
    if longest is not None and len(tokens) > longest:
        raise InputError(
            f"{place}: the prompt has {len(tokens)} tokens with its chat template, and {longest} "
            f"are allowed (max_prompt_tokens, or what the context leaves after the answer). Shorten it, raise "
            f"max_prompt_tokens or the context, or set too_long=skip to leave such prompts out."
        )


# ---- Rows ------------------------------------------------------------------------------------------------------------


def _read(path: str, split: str, column: str, limit: int | None) -> Iterator[RowOrError]:
    """The rows of whatever `path` names; one of the first has a cell for `column`."""
    if path.startswith("package:"):
        packaged = {f"package:{file.stem}": file for file in sorted(PACKAGED.glob("*.jsonl"))}
        if path not in packaged:
            raise InputError(
                f"{path!r} is not among the packaged prompts.{nearest_hint(path, packaged)} "
                f"Use {' or '.join(packaged)}."
            )
        return _read_file(packaged[path], split, column, limit)
    local = expand_home(path)
    if path and local.exists():
        return (_read_folder if local.is_dir() else _read_file)(local, split, column, limit)
    if not HUB_ID.fullmatch(path) or local.suffix in _ENDINGS:
        near = [file.name for file in local.parent.iterdir()] if local.parent.is_dir() else []
        raise InputError(
            f"the prompts {path!r} do not exist (looked at {local.absolute()}).{nearest_hint(local.name, near)} "
            "Correct the path."
        )
    return _read_hub(path, split, column, limit)


def _read_folder(folder: Path, split: str, column: str, limit: int | None) -> Iterator[RowOrError]:
    files = _files_of(folder)
    if not files:
        raise InputError(
            f"the folder {folder} has no prompts (got no {', '.join(_ENDINGS)} file in it). Put one there."
        )
    chosen = files_of_split(folder, split)
    if not chosen:
        names = ", ".join(str(file.relative_to(folder)) for file in files[:5])
        raise InputError(
            f"the folder {folder} has no split {split!r} (got {names}): a file belongs to the split that its name "
            "says, and to train when it says none. Set split to what is there, or name one file."
        )
    stems = {file: str(file.relative_to(folder).with_suffix("")) for file in chosen}
    rows = (row for file, stem in stems.items() for row in _read_file(file, "train", column, limit, stem=stem))
    return itertools.islice(rows, limit)


def files_of_split(folder: Path, split: str) -> list[Path]:
    """The files of a folder that hold a split, in the order in which they are read."""
    return [file for file in _files_of(folder) if _is_of_split(file.relative_to(folder), split)]


def _files_of(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob("[!.]*")) if file.suffix in _ENDINGS and file.is_file()]


def _is_of_split(name: Path, split: str) -> bool:
    words = set(re.split(r"[^a-z]+", str(name.with_suffix("")).lower()))
    if words & (_SPLIT_WORDS.get(split) or {split.lower()}):
        return True
    return split == "train" and not words & set().union(*_SPLIT_WORDS.values())


def _read_file(
    file: Path, split: str, column: str, limit: int | None, *, stem: str | None = None
) -> Iterator[RowOrError]:
    if file.suffix not in _ENDINGS:
        raise InputError(
            f"the prompts {file} are in a format that is not read (got {file.suffix or 'no file ending'}). "
            f"Give one of: {', '.join(_ENDINGS)}."
        )
    if split != "train":
        raise InputError(
            f"the prompts {file} have no split {split!r}: a single file is all train. "
            "Leave split out, or name the file that holds those prompts."
        )
    stem = stem or file.stem
    rows: Iterator[RowOrError]
    if file.suffix == ".csv":
        records = enumerate(_csv_records(file, column), 1)
        rows = (Row(f"{file}, row {number}", f"{stem}-{number}", record) for number, record in records)
    elif file.suffix == ".parquet":
        rows = parquet_rows(file, "prompts", stem, columns={column, "id"})
    else:
        rows = json_rows(file, "prompts", stem)
    return _checked(itertools.islice(rows, limit), column, str(file))


def _checked(rows: Iterator[RowOrError], column: str, where: str) -> Iterator[RowOrError]:
    """The rows of a file, each with a cell for its id where the first has one, and those that are wrong: also rows with
    an id where the first has none.

    Raises:
        InputError: none of the first rows has the column, so no row will have it.
    """
    first: list[RowOrError] = []
    for row in rows:
        first.append(row)
        if len(first) == _LOOKED_AT or (isinstance(row, Row) and column in row.cells):
            break
    good = [row for row in first if isinstance(row, Row)]
    if good and column not in good[-1].cells:
        yield from (row for row in first if isinstance(row, InputError))
        _no_column(column, list(dict.fromkeys(key for row in good for key in row.cells)), where)
    with_ids = bool(good) and "id" in good[0].cells
    for row in itertools.chain(first, rows):
        if isinstance(row, InputError):
            yield row
        elif "id" in row.cells and not with_ids:
            yield InputError(
                f"{row.place}: this row has an id and the first has none (got {described(row.cells['id'])}). "
                "Give every row an id, or none."
            )
        else:
            if with_ids:
                row.cells.setdefault("id", None)
            yield row


def _csv_records(file: Path, column: str) -> Iterator[dict[str, Any]]:
    """The records of a file, through `datasets` and past its cache: a changed file is read as it is.

    Reads the file itself, where `datasets.load_dataset` would ask the hub first and then copy it to a cache.
    """
    from datasets.io.csv import CsvDatasetReader
    from datasets.utils import logging

    try:
        if not file.stat().st_size:
            return
        with ExitStack() as stack:
            stack.callback(logging.set_verbosity, logging.get_verbosity())
            logging.set_verbosity(logging.CRITICAL)  # what it logs is raised anyway
            cache_dir = stack.enter_context(tempfile.TemporaryDirectory())
            name = glob.escape(str(file.absolute()))
            # It holds text: without these, "NA" would be no prompt and "007" the id 7.
            how: dict[str, Any] = {"keep_default_na": False, "converters": {column: str, "id": str}}
            yield from map(dict, CsvDatasetReader(name, cache_dir=cache_dir, streaming=True, **how).read())
    except Exception as error:  # what pandas and datasets raise about a file has no common root
        raise InputError(
            f"the prompts {file} cannot be read as .csv (got: {one_line(error)}). "
            "Mend the file, or give it the ending of what it is."
        ) from error


def hub_reference(path: str) -> tuple[str, str | None]:
    """Name and revision of a data set on the hub: owner/name, or owner/name@revision with a branch, tag or commit."""
    name, _, revision = path.partition("@")
    return name, revision or None


def _read_hub(path: str, split: str, column: str, limit: int | None) -> Iterator[RowOrError]:
    import datasets

    name, revision = hub_reference(path)
    try:
        data = datasets.load_dataset(name, split=split, revision=revision)
    except Exception as error:  # the hub's, the network's and the data set's own errors have no common root
        raise InputError(
            f"the prompts {name!r} are neither a file or folder here nor a Hugging Face data set whose split {split!r} "
            f"can be loaded (got: {one_line(error)}). Check the spelling; a data set that is not in the local cache "
            "needs the network, and a private one HF_TOKEN. Or give a local file."
        ) from error
    if len(data) and column not in data.column_names:
        _no_column(column, data.column_names, name)
    kept = data.select_columns([key for key in (column, "id") if key in data.column_names])
    return _hub_rows(itertools.islice(kept, limit), name, split)


def _hub_rows(records: Iterable[dict[str, Any]], name: str, split: str) -> Iterator[Row]:
    number = 0
    try:
        for number, record in enumerate(records, 1):
            yield Row(f"{name} ({split}), row {number}", f"{name.rpartition('/')[2]}-{number}", record)
    except Exception as error:  # what datasets and pyarrow raise about a value has no common root
        raise InputError(
            f"the prompts {name!r} can't be read after row {number} (got: {one_line(error)}). Download the data set, "
            "mend or remove the row, and give the file."
        ) from error


def _no_column(column: str, columns: list[str], where: str) -> NoReturn:
    raise InputError(
        f"the prompts {where} have no column {column!r} (its columns: {', '.join(columns) or 'none'})."
        f"{nearest_hint(column, columns)} Set column to the one that holds the prompts."
    )


# ---- One row ---------------------------------------------------------------------------------------------------------


def id_of_row(row: Row) -> str:
    if "id" not in row.cells:
        return row.number
    value = row.cells["id"]
    # datasets reads JSON text that looks like a date as one
    if isinstance(value, bool) or not isinstance(value, (str, int, datetime)) or value == "":
        raise InputError(
            f"{row.place}: id must be text (got {described(value)}). "
            "Give every row an id, or remove the id column to have them numbered."
        )
    return str(value)


def nearest_hint(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def one_line(error: BaseException) -> str:
    return shorten(" ".join(str(error).split()) or type(error).__name__, 200).rstrip(".")
