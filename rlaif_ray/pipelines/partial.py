"""Results that are not whole: how many failed and why, whether that is few enough, and asking again.

A failure that could succeed on another try (`feedback/failures.py`) is never final: the same command asks again, and a
pipeline's stage that has some is not done. What was answered is never asked twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from rlaif_ray.errors import FeedbackError, InputError, RunError
from rlaif_ray.feedback.failures import may_pass
from rlaif_ray.pipelines.streaming import CHUNK, chunks
from rlaif_ray.tracking.files import read_rows_streaming, replace_rows, rows_done

GIVE_UP = 3 * CHUNK  # failures one after the other, all of which could pass: nobody is there who answers
_READ = 16 * CHUNK  # items looked through at a time for those to ask again

Item = TypeVar("Item")


def again(
    items: Iterable[Item],
    failed: Callable[[Item], bool],
    ask: Callable[[list[Item]], list[Item]],
    stopping: Callable[[], bool] = lambda: False,
) -> Iterator[Item]:
    """All items in order, those that `failed` asked again, some at a time; after a stop the rest as they are."""
    for part in chunks(items, _READ):
        wanted = [k for k, item in enumerate(part) if failed(item)]
        for own in chunks(wanted, CHUNK):
            if stopping():
                break
            for k, item in zip(own, ask([part[k] for k in own]), strict=True):
                part[k] = item
        yield from part


def rows_again(
    path: Path,
    failed: Callable[[Mapping[str, Any]], bool],
    ask: Callable[[list[int]], list[Mapping[str, Any]]],
    stopping: Callable[[], bool] = lambda: False,
) -> None:
    """Asks again about rows of a file that `failed`, given their numbers, and puts the new ones in their places."""
    if not any(map(failed, read_rows_streaming(path))):
        return
    numbered = enumerate(read_rows_streaming(path))

    def asked(those: list[tuple[int, dict[str, Any]]]) -> list[tuple[int, dict[str, Any]]]:
        numbers = [number for number, _ in those]
        return [(number, dict(row)) for number, row in zip(numbers, ask(numbers), strict=True)]

    replace_rows(path, (row for _, row in again(numbered, lambda one: failed(one[1]), asked, stopping)))


def rows_kept(path: Path, wanted: Sequence[Any], of: Callable[[Mapping[str, Any]], Any], kind: Any) -> int:
    """How many rows of a file need not be made again (`rows_done`): each must be about the input of its place.

    A setting that may change on the way can change which inputs there are: with a larger max_context prompts are no
    longer too long.

    Args:
        wanted: what tells an input from others, of each.
        of: the same of a row.
        kind: what a row must hold (`rows.py`).

    Raises:
        InputError: a row is about another input, or was damaged.
    """
    done = rows_done(path, len(wanted), CHUNK)
    for number, (row, expected) in enumerate(zip(read_rows_streaming(path, kind), wanted, strict=False), start=1):
        if (found := of(row)) != expected:
            raise InputError(
                f"{path}, row {number}, is about {found!r}, where the inputs now have {expected!r}: others are left "
                f"out than before, as after a change of max_context. Use the old settings, or another run_dir or "
                f"output."
            )
    return done


def must_agree(path: Path, wanted: int) -> None:
    """Raises RunError when a file has another number of rows than there are inputs."""
    rows = sum(1 for _ in read_rows_streaming(path))
    if rows != wanted:
        raise RunError(
            f"{path} has {rows} rows for {wanted} inputs: one of both was changed by hand, or replaced. Restore it, or "
            f"name another output or run_dir."
        )


class Silence:
    """Notices when nobody answers any more."""

    def __init__(self) -> None:
        self._failed = 0
        self._last = ""

    def listen(self, reasons: Iterable[str | None]) -> None:
        """Takes why each failed, None for answers, in order."""
        for reason in reasons:
            self._failed = self._failed + 1 if may_pass(reason) else 0
            self._last = reason or ""

    def __bool__(self) -> bool:
        """Whether GIVE_UP in a row failed, and all of them could have passed."""
        return self._failed >= GIVE_UP

    def check(self, kept: Path) -> None:
        """Raises FeedbackError when nobody answers any more; `kept` is where what was answered is."""
        if self:
            raise FeedbackError(
                f"the judge answered none of the last {self._failed} questions (the last: {self._last}): asking "
                f"stopped. What was answered is kept in {kept}. When the judge is there again, start the same command "
                f"again: it asks what failed and what is left."
            )


def reasons_told(failures: Mapping[str, int]) -> str:
    """ "12 endpoint_error, 3 too_long": the most frequent first."""
    return ", ".join(f"{count} {reason}" for reason, count in sorted(failures.items(), key=lambda one: -one[1]))


def not_final(retryable: int) -> str:
    """What a closing table says of failures that could pass; "" where there are none."""
    return f"{retryable} of the failures could succeed on another try: the same command asks again" * bool(retryable)


def require(
    setting: str,
    least: float,
    what: str,
    *,
    done: int,
    wanted: int,
    failures: Mapping[str, int],
    retryable: int,
    kept: str | Path,
    remedy: str,
) -> None:
    """Checks that enough is done.

    Args:
        setting: the key of `least`.
        what: what is counted, and what must become of it: "pairs must be labelled".
        failures: how many by reason.
        retryable: how many of them could succeed on another try.
        kept: where what was answered is.
        remedy: of failures that come back on every try, one sentence.

    Raises:
        FeedbackError: a smaller share than `least` is done.
    """
    if done >= least * wanted:
        return
    for_ever = sum(failures.values()) - retryable
    advice = [
        f"{retryable} could succeed on another try: start the same command again to ask these once more."
        * bool(retryable),
        f"{for_ever} would fail in the same way. {remedy}" * bool(for_ever),
    ]
    raise FeedbackError(
        f"{setting}={least:g} of the {what} (got {done} of {wanted}; failed: {reasons_told(failures) or 'none'}). What "
        f"was answered is kept in {kept}. {' '.join(filter(None, advice))}"
    )
