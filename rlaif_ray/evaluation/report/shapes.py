"""What of a run's files the report builds on, and of which kind it must be.

The files may be another program's, another version's or damaged. A part of another kind is ignored and told, once for
each place, so that whatever reads the rest finds what it expects or nothing.
"""

from __future__ import annotations

import math
from typing import Any, Literal

NUMBER: Literal["a number"] = "a number"
TEXT: Literal["text"] = "text"
ANY = "anything"

Json = dict[str, Any]
# A kind; {key: kind}, with "*" for every other key; or [kind] of a list's items. What isn't named may be anything.
Shape = str | dict[str, Any] | list[Any]

_BIN: Json = dict.fromkeys(("n", "mean_p", "mean_label"), NUMBER)
_RATE: Json = dict.fromkeys(("rate", "accuracy", "mean", "loss", "ci95_low", "ci95_high", "n", "brier", "ece"), NUMBER)
_RATE |= {"reason": TEXT, "curve": [_BIN], "prefers_first": NUMBER}
_ALIGNED: Json = {**_RATE, "longer": _RATE, "subsets": {"*": _RATE}, "position_bias": _RATE}
_ON_PAIRS: Json = {"held_out": _RATE, "human": _RATE}
_HARMLESS: Json = {"rate": _RATE, "over_refusal": _RATE, "corrected": _RATE}
_COUNTS = (
    *("steps", "total_steps", "wall_s", "peak_rss_gb", "pairs", "labels", "records", "cost", "human_cost"),
    *("labels_per_s", "tokens_in", "tokens_out", "position_bias", "first_position_wins"),
)

SUMMARY: Json = {
    **dict.fromkeys(_COUNTS, NUMBER),
    **dict.fromkeys(("job", "judge", "output"), TEXT),
    "alignment": _ALIGNED,
    "human": _RATE,
    "reward_models": {"*": _ALIGNED},
    "training_judges": {"*": [TEXT]},
    "held_out": {"before": _RATE, "after": _RATE, "gain": _RATE},
    "harmless": {"before": _HARMLESS, "after": _HARMLESS, "arms": {"*": _HARMLESS}},
    "win_rates": [
        {
            **dict.fromkeys(("a", "b"), TEXT),
            **dict.fromkeys(("win_rate", "length_controlled", "position_bias"), _RATE),
            "mean_length": {"a": NUMBER, "b": NUMBER},
        }
    ],
    **dict.fromkeys(("sft", "dpo", "reward_model"), _ON_PAIRS),
    "stages": [{"name": TEXT, "hash": TEXT, "job": TEXT, "state": TEXT, "seconds": NUMBER, "result": TEXT}],
}
# Of a pipeline's stages each is one config more.
CONFIG: Json = {
    "steps": NUMBER,
    "output": TEXT,
    "policy": {"model": TEXT},
    "algorithm": {"type": TEXT},
    "label": {"template": TEXT, "constitution": TEXT},
    "revision": {"constitution": TEXT},
    "arms": {"*": ANY},
    "feedback": {"judge": {"*": ANY}},
    "judge": {"*": ANY},
}
EVALUATION: Json = {
    "step": NUMBER,
    "evaluator": TEXT,
    "held_out": {"before": _RATE, "after": _RATE, "gain": _RATE},
    "harmless": {"rate": _RATE, "over_refusal": _RATE},
}


def known_parts(value: Json, shape: Shape, place: str, problems: list[str]) -> Json:
    """`value` without the parts that are of another kind than `shape` says; those are told in `problems`."""
    found: Json | None = _known(value, shape, place, problems)
    return found or {}


def _known(value: Any, shape: Shape, place: str, problems: list[str]) -> Any:
    if value is None or shape == ANY:
        return value
    kind = "an object" if isinstance(shape, dict) else "a list" if isinstance(shape, list) else shape
    if not _is(value, shape):
        problem = f"{place} is not {kind}; ignored"
        if problem not in problems:
            problems.append(problem)
        return None
    if isinstance(shape, list):
        items = (_known(one, shape[0], f"{place}, item {k}", problems) for k, one in enumerate(value, start=1))
        return [one for one in items if one is not None]
    if isinstance(shape, dict):
        found = {}
        for key, inner in value.items():
            own = _known(inner, shape[key] if key in shape else shape.get("*", ANY), f"{place}: {key}", problems)
            if own is not None or inner is None:
                found[key] = own
        return found
    return value


def _is(value: Any, shape: Shape) -> bool:
    if isinstance(shape, dict | list):
        return isinstance(value, type(shape))
    if shape == TEXT:
        return isinstance(value, str)
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
