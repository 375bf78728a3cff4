"""Columns that keep a million rows small: texts as UTF-8 and tokens as 4 bytes each, in a few large buffers.

A Python list of ints takes 8 to 36 bytes a token, and an object of its own for every row.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable, Sequence
from dataclasses import fields
from typing import Any, Protocol, TypeVar, cast, overload

TOKEN = "I"  # of `array`: 4 bytes
END = "Q"  # 8 bytes: a buffer may be larger than 4 GB

Item = TypeVar("Item")


class Texts(Sequence[str]):
    """Texts that can be appended to. Halves of surrogate pairs are kept as they are."""

    def __init__(self) -> None:
        self._bytes = bytearray()
        self._ends = array(END)

    def append(self, text: str) -> None:
        self._bytes += text.encode("utf-8", "surrogatepass")
        self._ends.append(len(self._bytes))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start, end = _bounds(self._ends, index)
        return self._bytes[start:end].decode("utf-8", "surrogatepass")


class TokenLists(Sequence[tuple[int, ...]]):
    """Rows of tokens that can be appended to."""

    def __init__(self) -> None:
        self._tokens = array(TOKEN)
        self._ends = array(END)

    def append(self, tokens: Iterable[int]) -> None:
        self._tokens.extend(tokens)
        self._ends.append(len(self._tokens))

    def __len__(self) -> int:
        return len(self._ends)

    @overload
    def __getitem__(self, index: int) -> tuple[int, ...]: ...
    @overload
    def __getitem__(self, index: slice) -> list[tuple[int, ...]]: ...
    def __getitem__(self, index: int | slice) -> tuple[int, ...] | list[tuple[int, ...]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        return tuple(self.array(index))

    def length(self, index: int) -> int:
        start, end = _bounds(self._ends, index)
        return end - start

    def array(self, index: int) -> array[int]:
        """A row's tokens, 4 bytes each."""
        start, end = _bounds(self._ends, index)
        return self._tokens[start:end]


class Picked(Sequence[Item]):
    """Some rows of a column, by their numbers."""

    def __init__(self, column: Sequence[Item], rows: Sequence[int]) -> None:
        self._column, self._rows = column, rows

    def __len__(self) -> int:
        return len(self._rows)

    @overload
    def __getitem__(self, index: int) -> Item: ...
    @overload
    def __getitem__(self, index: slice) -> Picked[Item]: ...
    def __getitem__(self, index: int | slice) -> Item | Picked[Item]:
        if isinstance(index, slice):
            return Picked(self._column, self._rows[index])
        return self._column[self._rows[index]]


def _bounds(ends: array[int], index: int) -> tuple[int, int]:
    if index < 0:
        index += len(ends)
    if not 0 <= index < len(ends):
        raise IndexError(index)
    return ends[index - 1] if index else 0, ends[index]


class Measured(Protocol):
    """An example to train on."""

    @property
    def lengths(self) -> tuple[int, ...]:
        """Tokens of each sequence that the model reads."""


Example = TypeVar("Example", bound=Measured)


class ExampleTable(Sequence[Example]):
    """Examples to train on that can be appended to. One is made anew whenever it is asked for."""

    def __init__(self, kind: type[Example], numbers: Sequence[str] = ()) -> None:
        """`kind` is a dataclass; its fields are rows of tokens, but for those that `numbers` names: floats."""
        self._kind = kind
        names = [one.name for one in fields(cast(Any, kind))]
        self._columns: dict[str, Any] = {name: array("d") if name in numbers else TokenLists() for name in names}
        self._count = 0
        self.longest = 0  # tokens of the longest sequence of all examples

    def append(self, example: Example) -> None:
        for name, column in self._columns.items():
            column.append(getattr(example, name))
        self._count += 1
        self.longest = max(self.longest, *example.lengths)

    def __len__(self) -> int:
        return self._count

    @overload
    def __getitem__(self, index: int) -> Example: ...
    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...
    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._count))]
        return self._kind(*(column[index] for column in self._columns.values()))
