"""Work on a long stream of records: some chunks at once, results in order, memory bounded by what is under way."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

CHUNK = 64  # items of one call to engines or a judge; results are on disk after each

Item = TypeVar("Item")
Result = TypeVar("Result")


def chunks(items: Iterable[Item], size: int) -> Iterator[list[Item]]:
    """Lists of `size`. An error of `items` comes after what was good before it."""
    chunk: list[Item] = []
    try:
        for item in items:
            chunk.append(item)
            if len(chunk) == size:
                yield chunk
                chunk = []
    except Exception:
        if chunk:
            yield chunk
        raise
    if chunk:
        yield chunk


def in_order(
    work: Callable[[Item], Result], items: Iterable[Item], *, at_once: int, stopping: Callable[[], bool] = lambda: False
) -> Iterator[tuple[Item, Result]]:
    """(item, work(item)) in the order of `items`, `at_once` of them under way in threads.

    No more items are taken than that, so a stream of any length needs the same memory. Where `items` raises, or
    `stopping` says so, what is under way is still given out; where `work` raises, what comes before it is.
    """
    waiting: deque[tuple[Item, Future[Result]]] = deque()
    source = iter(items)
    error: Exception | None = None
    with ThreadPoolExecutor(at_once, thread_name_prefix="work") as pool:
        try:
            while True:
                while error is None and len(waiting) < at_once and not stopping():
                    try:
                        item = next(source)
                    except StopIteration:
                        break
                    except Exception as raised:
                        error = raised
                        break
                    waiting.append((item, pool.submit(work, item)))
                if not waiting:
                    break
                item, future = waiting.popleft()
                yield item, future.result()
        finally:
            for _, future in waiting:
                future.cancel()
    if error is not None:
        raise error
