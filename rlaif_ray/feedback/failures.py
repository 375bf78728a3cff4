"""Why something could not be judged or answered, and whether asking again could help.

A reason is "kind" or "kind: detail", such as "too_long" or "endpoint_error: 503".
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

# The request met no answer, or none that can be read: of the rest (too_long, unparsed, no_probability, quarantined,
# ...) the text itself is the cause, and the same question fails in the same way.
_MAY_PASS = ("engine_error", "bad_reply", "endpoint_error")  # of a part of a mixture with its name and _ before it
# A request, rather than its content, was turned away: 408 and 409 and 425 by chance of timing, 429 by a rate limit.
_STATUSES_THAT_MAY_PASS = (408, 409, 425, 429)


def kind_of(reason: str) -> str:
    """The reason without its detail."""
    return reason.partition(":")[0]


def may_pass(reason: str | None) -> bool:
    """Whether what failed for this reason could succeed on another try: time-outs, broken connections, 5xx, rate
    limits, a lost engine. False for None: nothing failed."""
    if reason is None or not f"_{kind_of(reason)}".endswith(tuple(f"_{kind}" for kind in _MAY_PASS)):
        return False
    status = reason.split(":")[1].strip() if ":" in reason else ""
    refused = status.isdigit() and 400 <= int(status) < 500
    return not refused or int(status) in _STATUSES_THAT_MAY_PASS


def counts(reasons: Iterable[str | None]) -> tuple[Counter[str], int]:
    """How many failed by kind of reason, and how many of them could succeed on another try. None: nothing failed."""
    failed = [reason for reason in reasons if reason is not None]
    return Counter(map(kind_of, failed)), sum(map(may_pass, failed))
