"""How many tokens of context engines get."""

from __future__ import annotations

from typing import Any

from rlaif_ray.errors import InputError
from rlaif_ray.models import context_length, load_config

JUDGE_CONTEXT = 4096  # tokens; more only on request: the key-value cache must hold one such prompt


def readable_context(model: Any, wanted: int | None, key: str) -> int:
    """Tokens of context to use of a model: all, or what the config asks for under `key`.

    `model` is a config section with model, revision and trust_remote_code.

    Raises:
        InputError: the model can't read as many as asked for.
    """
    config = load_config(model.model, revision=model.revision, trust_remote_code=model.trust_remote_code)
    has = context_length(config)
    if wanted is not None and has is not None and wanted > has:
        raise InputError(
            f"{key} must not exceed the {has} tokens that {model.model} can read (got {wanted}). Lower it."
        )
    return wanted or has or 2048


def judge_context(judge: Any, key: str) -> int:
    """Tokens of context of a judge's engines: what the config asks for, else up to JUDGE_CONTEXT."""
    wanted = judge.max_context or min(JUDGE_CONTEXT, readable_context(judge, None, key))
    return readable_context(judge, wanted, key)


def engine_context(needed: int, room: int) -> int:
    """`needed` tokens rounded up to whole blocks of 32, at most the `room` that the model has."""
    return min(room, -(-needed // 32) * 32)
