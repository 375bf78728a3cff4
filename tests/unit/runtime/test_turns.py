"""How long a start is waited for, by a clock that the test moves."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from rlaif_ray.runtime import turns
from rlaif_ray.runtime.turns import Patience


@pytest.mark.parametrize(
    ("seen", "over_at"),
    [
        ([(0, 0)], 11),  # nobody ahead: its own ten seconds
        ([(0, 1), (8, 1), (9, 0)], 19),  # from when it was last seen waiting, at 8
        ([(0, 1), (8, 1), (16, 1), (19, 1)], 21),  # one that hangs ahead has ten as well, and no more
        ([(0, 1), (5, 2), (25, 2)], 31),
    ],
)
def test_patience(monkeypatch: pytest.MonkeyPatch, seen: list[tuple[float, int]], over_at: int) -> None:
    now = 0.0
    monkeypatch.setattr(turns, "time", SimpleNamespace(monotonic=lambda: now))
    patience = Patience(10.0)
    ahead = 0
    for now, ahead in seen:  # noqa: B007
        assert not patience.is_over(ahead)
    for second in range(int(now) + 1, over_at):
        now = float(second)
        assert not patience.is_over(ahead), second
    now = float(over_at)
    assert patience.is_over(ahead)
