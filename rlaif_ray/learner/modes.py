"""When a model is in training mode: only while it learns, and only those of its parts that have to be."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import nn


@contextmanager
def training_mode(*modules: nn.Module) -> Iterator[None]:
    """Within it the dropout of adapters and gradient checkpointing are on, and nothing else.

    A model is in evaluation mode otherwise, so nothing that is measured (rewards, held-out losses, reference
    log-probabilities) has noise in it. Noise that a model would add of its own (dropout, jitter of the routing, experts
    that PhiMoE samples) stays off in training too: what is trained is then what the engine computes.
    """
    switched = [part for module in modules for part in _training_parts(module)]
    for part in switched:
        part.training = True  # of this part alone: train() would reach the parts inside it
    try:
        yield
    finally:
        for part in switched:
            part.training = False


def _training_parts(module: nn.Module) -> Iterator[nn.Module]:
    for part in module.modules():
        if getattr(part, "gradient_checkpointing", False) is True:  # transformers checkpoints in training mode only
            yield part
        dropouts = getattr(part, "lora_dropout", None)  # of peft's layers
        if dropouts is not None:
            yield from dropouts.modules()
