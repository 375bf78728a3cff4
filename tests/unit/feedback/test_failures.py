"""Which failures could succeed on another try."""

from __future__ import annotations

import pytest

from rlaif_ray.feedback.failures import counts, may_pass


@pytest.mark.parametrize(
    ("reason", "passes"),
    [
        # no answer came
        ("endpoint_error: timeout", True),
        ("endpoint_error: ConnectionRefusedError", True),
        ("endpoint_error: 500", True),
        ("endpoint_error: 503", True),
        ("endpoint_error: 529", True),
        ("endpoint_error: 429", True),
        ("endpoint_error: 408", True),
        ("endpoint_error", True),
        ("bad_reply: no choices", True),
        ("engine_error: it died", True),
        ("helpful_engine_error", True),  # of a part of a mixture
        # the question itself is the cause
        ("endpoint_error: 400: content policy: 503", False),
        ("endpoint_error: 422: refused", False),
        ("too_long", False),
        ("unparsed", False),
        ("no_probability", False),
        ("no_rationale", False),
        ("quarantined", False),
        ("empty_critique", False),
        ("engine_error_too_long", False),  # a part of a mixture that a user named so
        (None, False),
    ],
)
def test_which_may_pass(reason: str | None, passes: bool) -> None:
    assert may_pass(reason) is passes


def test_counts_by_kind() -> None:
    reasons = [None, "too_long", "endpoint_error: 503", "endpoint_error: 400: no", None]
    assert counts(reasons) == ({"too_long": 1, "endpoint_error": 2}, 1)
