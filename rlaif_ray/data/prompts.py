"""Prompts: read from files or the hub, rendered to the policy's tokens, and dealt out step by step.

`load_prompts` names file and row (for .jsonl the line) of whatever is wrong; `PromptSource` walks the prompts in
seeded epochs and can be put back to where a checkpoint left it.
"""

from __future__ import annotations

import difflib
import glob
import hashlib
import itertools
import json
import os
import random
import re
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlaif_ray.chat.renderer import ChatRenderer
from rlaif_ray.chat.text import conversation_text
from rlaif_ray.data.json_rows import json_document, json_lines
from rlaif_ray.data.messages import Row, described, read_messages, shorten
from rlaif_ray.errors import InputError
from rlaif_ray.types import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlaif_ray.chat.template import ChatTemplate

PACKAGED = Path(__file__).parent / "prompts"  # package:train and package:heldout

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?(@[\w./-]+)?")  # see hub_reference
_ENDINGS = (".jsonl", ".json", ".parquet", ".csv")
_ROWS_AT_A_TIME = 1000  # of a parquet file; `datasets` takes a row group by default, and fails where that is empty
_JSON = {".jsonl": json_lines, ".json": json_document}
_EXAMPLE = '{"prompt": "..."}'

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

    prompts: list[Prompt]  # never empty
    skipped: int  # left out for being longer than max_prompt_tokens


def read_conversations(
    path: str, *, split: str = "train", column: str = "prompt", limit: int | None = None, system: str | None = None
) -> list[tuple[Message, ...]]:
    """The prompts of `path` as `load_prompts` reads them, before a model's tokens come into it.

    Raises InputError for the first wrong row.
    """
    return [read_messages(row, column, system) for row in _read(path, split, column, limit)]


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
    a ChatTemplate brings.

    `path` is `package:train`, `package:heldout`, a file (.jsonl, .json, .parquet, .csv), a folder of such files, or a
    hub id. `column` holds a string, or a list of {role, content} messages that ends with the user's. `system` is put
    before every prompt that has no system message; some chat templates put one of their own where there is none
    (SmolLM2's does), and `system=""` keeps them from it. Local files are read anew each time, past every cache.

    A prompt's id is its row's `id`, else "<file stem>-<row number>". Raises InputError for the first wrong row.
    """
    rows = _read(path, split, column, limit)
    if not rows:
        raise InputError(f"the prompts {path!r} have no rows (got an empty data set). Give a data set with prompts.")
    renderer = ChatRenderer(tokenizer)
    prompts: list[Prompt] = []
    place_of: dict[str, str] = {}
    skipped: list[int] = []  # their lengths
    for row in rows:
        name = id_of_row(row)
        if name in place_of:
            raise InputError(
                f"{row.place}: id must be unique (got {name!r}, which {place_of[name]} has too). "
                "Give every row an id of its own, or remove the id column to have them numbered."
            )
        place_of[name] = row.place
        messages = read_messages(row, column, system)
        tokens = renderer.tokens(messages, row.place)
        if len(tokens) <= max_prompt_tokens:
            text = conversation_text(messages)
            tags = renderer.chat.tags
            prompts.append(Prompt(name, messages, tokens, text, opened=renderer.opened, tags=tags))
        elif too_long == "skip":
            skipped.append(len(tokens))
        else:
            raise InputError(
                f"{row.place}: the prompt has {len(tokens)} tokens with its chat template, and {max_prompt_tokens} "
                f"are allowed (max_prompt_tokens, or what the context leaves after the answer). Shorten it, raise "
                f"max_prompt_tokens or the context, or set too_long=skip to leave such prompts out."
            )
    if not prompts:
        raise InputError(
            f"no prompt of {path!r} is left: all {len(skipped)} are longer than {max_prompt_tokens} tokens and were "
            f"skipped (too_long=skip; the shortest has {min(skipped)}). Raise max_prompt_tokens or the context."
        )
    return LoadedPrompts(prompts, len(skipped))


# ---- Rows ------------------------------------------------------------------------------------------------------------


def _read(path: str, split: str, column: str, limit: int | None) -> list[Row]:
    """The rows of whatever `path` names, each with a cell for `column`."""
    if path.startswith("package:"):
        packaged = {f"package:{file.stem}": file for file in sorted(PACKAGED.glob("*.jsonl"))}
        if path not in packaged:
            raise InputError(
                f"{path!r} is not among the packaged prompts.{nearest_hint(path, packaged)} "
                f"Use {' or '.join(packaged)}."
            )
        return _read_file(packaged[path], split, column, limit)
    local = Path(os.path.expanduser(path))
    if path and local.exists():
        return (_read_folder if local.is_dir() else _read_file)(local, split, column, limit)
    if not HUB_ID.fullmatch(path) or local.suffix in _ENDINGS:
        near = [file.name for file in local.parent.iterdir()] if local.parent.is_dir() else []
        raise InputError(
            f"the prompts {path!r} do not exist (looked at {local.absolute()}).{nearest_hint(local.name, near)} "
            "Correct the path."
        )
    return _read_hub(path, split, column, limit)


def _read_folder(folder: Path, split: str, column: str, limit: int | None) -> list[Row]:
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
    rows: list[Row] = []
    for file in chosen:
        rows += _read_file(file, "train", column, limit, stem=str(file.relative_to(folder).with_suffix("")))
    return rows[:limit]


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


def _read_file(file: Path, split: str, column: str, limit: int | None, *, stem: str | None = None) -> list[Row]:
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
    found = _records(file, column, limit)
    records = [record for _, record in found]
    columns = list(dict.fromkeys(key for record in records for key in record))
    _need_column(column, columns, str(file), records)
    if "id" in columns:
        for record in records:
            record.setdefault("id", None)  # every row has one, or none has
    names = (f"{stem or file.stem}-{number}" for number in itertools.count(1))
    return [Row(place, name, record) for (place, record), name in zip(found, names, strict=False)]


def _records(file: Path, column: str, limit: int | None) -> list[tuple[str, dict[str, Any]]]:
    """The first `limit` records of a file, each with its place."""
    try:
        if not file.stat().st_size:
            return []
        if file.suffix in _JSON:
            return list(itertools.islice(_JSON[file.suffix](file, _EXAMPLE), limit))
        return [
            (f"{file}, row {number}", dict(record))
            for number, record in enumerate(itertools.islice(_table(file, column), limit), 1)
        ]
    except InputError:
        raise
    except Exception as error:  # what pyarrow, pandas and datasets raise about a file has no common root
        raise InputError(
            f"the prompts {file} cannot be read as {file.suffix} (got: {one_line(error)}). "
            "Mend the file, or give it the ending of what it is."
        ) from error


def _table(file: Path, column: str) -> Iterator[dict[str, Any]]:
    """The rows of a .csv or .parquet file, through `datasets` and past its cache: a changed file is read as it is.

    Reads the file itself, where `datasets.load_dataset` would ask the hub first and then copy it to a cache.
    """
    from datasets.io.csv import CsvDatasetReader
    from datasets.io.parquet import ParquetDatasetReader
    from datasets.utils import logging

    with ExitStack() as stack:
        stack.callback(logging.set_verbosity, logging.get_verbosity())
        logging.set_verbosity(logging.CRITICAL)  # what it logs is raised anyway
        locks = stack.enter_context(tempfile.TemporaryDirectory())
        common: dict[str, Any] = {"cache_dir": locks, "streaming": True}
        name = glob.escape(str(file.absolute()))
        if file.suffix == ".csv":  # it holds text: without these, "NA" would be no prompt and "007" the id 7
            reader = CsvDatasetReader(name, keep_default_na=False, converters={column: str, "id": str}, **common)
        else:
            reader = ParquetDatasetReader(name, batch_size=_ROWS_AT_A_TIME, **common)
        yield from reader.read()


def hub_reference(path: str) -> tuple[str, str | None]:
    """Name and revision of a data set on the hub: owner/name, or owner/name@revision with a branch, tag or commit."""
    name, _, revision = path.partition("@")
    return name, revision or None


def _read_hub(path: str, split: str, column: str, limit: int | None) -> list[Row]:
    import datasets

    name, revision = hub_reference(path)
    try:
        data = datasets.load_dataset(name, split=split, revision=revision)
    except Exception as error:  # the hub's, the network's and the data set's own errors have no common root
        raise InputError(
            f"the prompts {name!r} are no file or folder here, and no Hugging Face data set whose split {split!r} can "
            f"be loaded (got: {one_line(error)}). Check the spelling; a data set that is not in the local cache needs "
            "the network, and a private one HF_TOKEN. Or give a local file."
        ) from error
    _need_column(column, data.column_names, name, data)
    kept = data.select_columns([key for key in (column, "id") if key in data.column_names])
    records = enumerate(itertools.islice(kept, limit), 1)
    return [Row(f"{name} ({split}), row {n}", f"{name.rpartition('/')[2]}-{n}", record) for n, record in records]


def _need_column(column: str, columns: list[str], where: str, records: Any) -> None:
    if len(records) and column not in columns:
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


# ---- Steps -----------------------------------------------------------------------------------------------------------


class PromptSource:
    """Deals prompts out, `prompts_per_step` at a time, every prompt once an epoch, without end.

    A step may take the last prompts of one epoch and the first of the next, and never holds a prompt twice unless
    there are fewer prompts than a step takes. The order follows from the seed alone.
    """

    def __init__(self, prompts: Sequence[Prompt], *, prompts_per_step: int, seed: int, shuffle: bool) -> None:
        assert prompts and prompts_per_step >= 1
        self.prompts = tuple(prompts)
        self.prompts_per_step, self.seed, self.shuffle = prompts_per_step, seed, shuffle
        self.step = 0  # steps dealt out
        self.epoch, self.position = 0, 0  # the epoch under way, and how many of its prompts were dealt out
        self.order = self._epoch_order(0, begun=[])
        self.identity = self._identity()

    def next(self) -> list[Prompt]:
        """The prompts of the next step."""
        chosen: list[int] = []
        while len(chosen) < self.prompts_per_step:
            if self.position == len(self.prompts):
                self.epoch, self.position = self.epoch + 1, 0
                self.order = self._epoch_order(self.epoch, begun=chosen)
            part = self.order[self.position : self.position + self.prompts_per_step - len(chosen)]
            chosen += part
            self.position += len(part)
        self.step += 1
        return [self.prompts[index] for index in chosen]

    def state(self) -> dict[str, Any]:
        """Where the source stands, for `restore`; goes into JSON."""
        return {"step": self.step, "epoch": self.epoch, "position": self.position, **self.identity}

    def restore(self, state: dict[str, Any]) -> None:
        """Go on from where `state` was taken, also in another process. InputError where it does not fit."""
        for key, here in self.identity.items():
            if state.get(key) != here:
                raise InputError(
                    f"the checkpoint's place in the prompts does not fit this run: {key} was {state.get(key)!r} and is "
                    f"{here!r}, so the order of the prompts is another. Restore that setting or those prompts, or "
                    "start a new run (checkpoint.resume=never, or another run_dir)."
                )
        self.step, self.epoch, self.position, self.order = 0, 0, 0, self._epoch_order(0, begun=[])
        for _ in range(state["step"]):  # an epoch's order depends on how the one before it ended, so walk there
            self.next()
        assert (self.epoch, self.position) == (state["epoch"], state["position"])

    def _epoch_order(self, epoch: int, begun: Sequence[int]) -> list[int]:
        """The order of one epoch. `begun` is what the step at its start already holds: that comes later."""
        order = list(range(len(self.prompts)))
        if self.shuffle:
            random.Random(f"{self.seed}/{epoch}").shuffle(order)
        if not begun or len(order) < self.prompts_per_step:
            return order
        taken, missing = set(begun), self.prompts_per_step - len(begun)
        head = dict.fromkeys(itertools.islice((index for index in order if index not in taken), missing))
        return [*head, *(index for index in order if index not in head)]

    def _identity(self) -> dict[str, Any]:
        """What the order of the prompts follows from."""
        digest = hashlib.sha256()
        for prompt in self.prompts:
            digest.update(json.dumps([prompt.id, prompt.tokens]).encode())
        return {
            "prompts": f"{len(self.prompts)}-{digest.hexdigest()[:16]}",
            "prompts_per_step": self.prompts_per_step,
            "seed": self.seed,
            "shuffle": self.shuffle,
        }


def nearest_hint(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=1)
    return f" Did you mean {near[0]}?" if near else ""


def one_line(error: BaseException) -> str:
    return shorten(" ".join(str(error).split()) or type(error).__name__, 200).rstrip(".")
