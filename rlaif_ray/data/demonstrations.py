"""Conversations to learn from: rows of `messages` (or ShareGPT's `conversations`), or of a prompt and a response (or
completion). Read as a stream."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from rlaif_ray.data.messages import Row, decoded, described, read_message, read_messages, response_of
from rlaif_ray.data.preferences import rows_of
from rlaif_ray.data.prompts import nearest_hint
from rlaif_ray.errors import InputError
from rlaif_ray.types import Message

_FORMS: tuple[tuple[str, ...], ...] = (
    ("messages",),
    ("prompt", "response"),
    ("prompt", "completion"),  # TRL's
    ("conversations",),  # ShareGPT's
)
_VALUES = {"label", *(name for form in _FORMS for name in form)}  # columns whose values are read


@dataclass(frozen=True, slots=True)
class Demonstration:
    """One conversation; the assistant's turns are what is learned."""

    place: str  # "file.jsonl, line 3", for messages
    messages: tuple[Message, ...]  # with at least one turn of the assistant, after one of the user


def read_demonstrations(path: str, *, split: str = "train", limit: int | None = None) -> Iterator[Demonstration]:
    """The conversations of a .jsonl or .parquet file or a hub data set, in order.

    `messages` are what `rlaif revise` writes and TRL reads; other columns are left alone.

    Raises:
        InputError: at the first wrong row, naming file and line; those before it have been given out by then.
    """
    count = 0
    for row in rows_of(path, split, _VALUES)():
        if limit is not None and count >= limit:
            return
        count += 1
        yield _demonstration(row)
    if not count:
        raise InputError(f"the conversations {path} have no rows (got an empty data set). Give a file with some.")


def read_labelled_responses(path: str) -> Iterator[tuple[Demonstration, float]]:
    """Conversations that end with a response, each with the 0 or 1 that people gave it as `label`.

    Raises:
        InputError: at the first wrong row, naming file and line.
    """
    for row in rows_of(path, "train", _VALUES)():
        found, label = _demonstration(row), row.cells.get("label")
        if isinstance(label, bool) or label not in (0, 1):
            raise InputError(f"{row.place}: label must be 0 or 1 (got {described(label)}). Correct it.")
        if found.messages[-1].role != "assistant":
            raise InputError(f"{row.place}: a labelled row must end with the response. Remove the turns after it.")
        yield found, float(label)


def _demonstration(row: Row) -> Demonstration:
    form = next((form for form in _FORMS if all(name in row.cells for name in form)), None)
    if form is None:
        hint = nearest_hint("messages", row.cells)
        raise InputError(
            f"{row.place}: a row must have messages, or prompt and response (its columns: "
            f"{', '.join(row.cells) or 'none'}).{hint} Rename a column."
        )
    if len(form) == 1:
        (column,) = form
        value = decoded(row.cells[column], row.place, column)
        if not isinstance(value, list):
            raise InputError(
                f"{row.place}: {column} must be a list of {{role, content}} (got {described(value)}). Correct it."
            )
        messages = tuple(read_message(entry, index, row.place, column) for index, entry in enumerate(value))
    else:
        messages = (*_prompt(row), *_answer(row, form[-1]))
    for before, turn in zip((None, *messages), messages, strict=False):
        if turn.role == "assistant" and (before is None or before.role != "user"):
            raise InputError(f"{row.place}: a turn of the assistant must follow one of the user. Correct the turns.")
        if turn.role == "assistant" and not turn.content.strip():
            raise InputError(
                f"{row.place}: a turn of the assistant is empty: there is nothing to learn. Remove the row."
            )
    if not any(turn.role == "assistant" for turn in messages):
        raise InputError(f"{row.place}: there is no turn of the assistant to learn from. Add one or remove the row.")
    return Demonstration(row.place, messages)


def _prompt(row: Row) -> tuple[Message, ...]:
    value = decoded(row.cells["prompt"], row.place, "prompt")
    if isinstance(value, list):
        return tuple(read_message(entry, index, row.place, "prompt") for index, entry in enumerate(value))
    if not isinstance(value, str):
        raise InputError(f"{row.place}: prompt must be text (got {described(value)}). Correct it.")
    return read_messages(row, "prompt", None) if value.strip() else (Message("user", value),)


def _answer(row: Row, column: str) -> tuple[Message, ...]:
    value = response_of(row, column)
    if isinstance(value, list):  # TRL's conversational form
        return tuple(read_message(entry, index, row.place, column) for index, entry in enumerate(value))
    if not isinstance(value, str):
        raise InputError(f"{row.place}: {column} must be text (got {described(value)}). Correct it.")
    return (Message("assistant", value),)
