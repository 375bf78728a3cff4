"""A stream of work: order, bounds, errors after what was good before them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from rlaif_ray.pipelines.streaming import chunks, in_order


def test_chunks_come_whole_and_the_last_one_short() -> None:
    assert list(chunks(range(7), 3)) == [[0, 1, 2], [3, 4, 5], [6]]
    assert list(chunks([], 3)) == []


def bad_after(count: int) -> Iterator[int]:
    yield from range(count)
    raise ValueError("line 8")


def test_an_error_comes_after_what_was_good() -> None:
    seen = []
    with pytest.raises(ValueError, match="line 8"):
        for chunk in chunks(bad_after(7), 3):
            seen += chunk
    assert seen == list(range(7))


@pytest.mark.parametrize("at_once", [1, 2, 8])
def test_results_come_in_order_whoever_is_first(at_once: int) -> None:
    def work(item: int) -> int:
        time.sleep(0.002 * (item % 5))
        return item * item

    assert list(in_order(work, range(40), at_once=at_once)) == [(i, i * i) for i in range(40)]


def test_no_more_is_taken_than_is_under_way() -> None:
    taken = 0

    def source() -> Iterator[int]:
        nonlocal taken
        for i in range(100):
            taken += 1
            yield i

    for given, _ in enumerate(in_order(lambda item: item, source(), at_once=4), start=1):
        assert taken <= given + 4


def test_so_many_at_once() -> None:
    running, most, lock = 0, 0, threading.Lock()

    def work(item: int) -> None:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        time.sleep(0.01)
        with lock:
            running -= 1

    list(in_order(work, range(30), at_once=3))
    assert most == 3


def test_a_broken_source_still_gives_what_is_under_way() -> None:
    seen = []
    with pytest.raises(ValueError, match="line 8"):
        for item, _ in in_order(lambda i: i, bad_after(5), at_once=3):
            seen.append(item)
    assert seen == list(range(5))


def test_work_that_fails_gives_what_came_before_it() -> None:
    def work(item: int) -> int:
        if item == 3:
            raise RuntimeError("dead")
        return item

    seen = []
    with pytest.raises(RuntimeError, match="dead"):
        for item, _ in in_order(work, range(10), at_once=2):
            seen.append(item)
    assert seen == [0, 1, 2]


def test_a_stop_ends_with_what_is_under_way() -> None:
    seen: list[int] = []
    for item, _ in in_order(lambda i: i, range(100), at_once=3, stopping=lambda: len(seen) >= 5):
        seen.append(item)
    assert 5 <= len(seen) <= 8 and seen == list(range(len(seen)))
