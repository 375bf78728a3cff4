"""Random damage to what a user or an endpoint gives, for tests by hypothesis: bytes, and values of JSON."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from typing import Any

from hypothesis import strategies as st

places = st.floats(0, 1, exclude_max=True)  # in a file, as a share of its length
HOSTILE = ("[" * 3000, '{"a":' * 3000, "9" * 400, "1e999", "NaN", '"\\ud800"', "\ufeff", "\0", "\u2028", "'", '"', "]}")


@st.composite
def damaged(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes with one to three random mistakes."""
    for _ in range(draw(st.integers(1, 3))):
        at = int(draw(places) * len(data))
        kind = draw(st.sampled_from(["flip", "cut", "drop", "insert", "repeat", "zero", "hostile"]))
        length = draw(st.integers(1, 40))
        if kind == "flip" and data:
            data = data[:at] + bytes([data[at] ^ (1 << draw(st.integers(0, 7)))]) + data[at + 1 :]
        elif kind == "cut":
            data = data[:at]
        elif kind == "drop":
            data = data[:at] + data[at + length :]
        elif kind == "insert":
            data = data[:at] + draw(st.binary(min_size=1, max_size=8)) + data[at:]
        elif kind == "hostile":
            data = data[:at] + draw(st.sampled_from(HOSTILE)).encode("utf-8", "surrogatepass") + data[at:]
        elif kind == "repeat":
            data = data[:at] + data[at : at + length] + data[at:]
        else:
            data = data[:at] + bytes(len(data[at : at + length])) + data[at + length :]
    return data


def deep(levels: int) -> Any:
    """Lists in each other."""
    value: Any = []
    for _ in range(levels):
        value = [value]
    return value


# What may stand where something else is expected.
anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.text(max_size=4)
    | st.sampled_from(["1e400", 10**299, -(10**299), 10**400, 2**63, -1, "", "\ud800", "a\0b", deep(90), deep(150)]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)


def nodes(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The paths of all values in a value."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in items:
        yield from nodes(inner, (*path, key))


@st.composite
def odd(draw: st.DrawFn, value: Any) -> Any:
    """A copy of a value of JSON with something else in one to three places, or a place missing."""
    value = copy.deepcopy(value)
    for _ in range(draw(st.integers(1, 3))):
        path = draw(st.sampled_from(list(nodes(value))))
        if not path:
            continue
        parent = value
        for key in path[:-1]:
            parent = parent[key]
        if draw(st.integers(0, 3)):
            parent[path[-1]] = draw(anything)
        else:
            del parent[path[-1]]
    return value


@st.composite
def odd_json(draw: st.DrawFn, value: Any) -> bytes:
    """JSON of `value` with something else in some place, or with damaged bytes."""
    data = json.dumps(draw(odd(value))).encode()
    return draw(damaged(data)) if draw(st.integers(0, 3)) == 0 else data
