"""Preference records for tests: one by hand, and any that the schema allows."""

from __future__ import annotations

import re
from typing import Any

import pyarrow as pa
from hypothesis import strategies as st

from rlaif_ray.data.preferences import PreferenceRecord
from rlaif_ray.types import Message

NOT_UTF_8 = pa.array([b"Why is that?", b"a\xff"], pa.binary()).view(pa.string())  # the second

JUDGE = {"model": "some/judge", "type": "local", "template": "helpful", "template_hash": "abc"}


def record(name: str = "r", p_a: float | None = 0.75, **values: Any) -> PreferenceRecord:
    """With an AI label, unless `judge=None`."""
    return PreferenceRecord(
        **{
            "id": name,
            "prompt": (Message("user", f"question {name}"),),
            "response_a": f"first {name}",
            "response_b": f"second {name}",
            "p_a": p_a,
            "judge": JUDGE,
            **values,
        }
    )


texts = st.text(max_size=20) | st.sampled_from(["=1+1", "'x", "\x00", "a\r\nb\rc\n", "\u2028", "null", "😀" * 3, "١"])
filled = texts.filter(lambda text: re.search(r"\S", text))
numbers = st.floats(0, 1) | st.sampled_from([0.0, 1.0, 0.5, 5e-324, 1 - 2**-53, 0.1 + 0.2])
counts = st.integers(0, 2**53)


@st.composite
def records(draw: st.DrawFn) -> PreferenceRecord:
    before = draw(st.lists(st.builds(Message, st.sampled_from(["user", "assistant"]), texts), max_size=3))
    system = draw(st.lists(st.builds(Message, st.just("system"), texts), max_size=1))
    failed = draw(st.none() | texts)
    return PreferenceRecord(
        id=draw(texts.filter(bool)),
        prompt=(*system, *before, Message("user", draw(filled))),
        response_a=draw(filled),
        response_b=draw(filled),
        source_a=draw(st.none() | texts),
        source_b=draw(st.none() | texts),
        p_a=draw(st.none() | numbers) if failed is None else None,
        p_a_forward=draw(st.none() | numbers),
        p_a_reversed=draw(st.none() | numbers),
        rationales=tuple(draw(st.lists(texts, max_size=3))),
        principle=draw(st.none() | texts),
        judge=draw(st.none() | st.fixed_dictionaries(dict.fromkeys(JUDGE, texts))),
        hard=draw(st.booleans()),
        tokens_in=draw(counts),
        tokens_out=draw(counts),
        cost=draw(st.floats(0, 1e9)),
        cut=draw(counts),
        failed=failed,
        human=draw(st.none() | numbers),
    )
