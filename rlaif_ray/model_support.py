"""Which models an engine can't compute, and what works instead: known before anything starts.

Found by tests/benchmarks/zoo_push.py, which compares vLLM with transformers on tiny models of each architecture. The
comparison at the start of a run is the last word; this table only says sooner what is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True)
class Unsupported:
    """Why a model type doesn't run, and what does."""

    devices: tuple[Device, ...]  # where it doesn't
    reason: str  # completes "vLLM 0.32 ..."
    instead: str  # a whole sentence


UNSUPPORTED: dict[str, Unsupported] = {}  # by the config's model_type


def engine_refusal(config: Any, device: Device) -> str | None:
    """Why vLLM must not be started with this model on this device, and the remedy; None where nothing is known.

    `config` is the model's config as transformers gives it. Pure: nothing is imported or loaded.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for model_type in dict.fromkeys((config.model_type, text.model_type)):
        known = UNSUPPORTED.get(model_type)
        if known is not None and device in known.devices:
            return f"model type {model_type} can't be sampled on cluster.device={device}: vLLM {known.reason}. {known.instead}"
    return None
