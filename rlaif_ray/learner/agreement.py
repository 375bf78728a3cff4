"""A fixed text computed more than once under the same weights: as training computes it, by the model alone, and by
what was saved. What should agree is compared in pipelines/guard.py.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate
from typing import TYPE_CHECKING, Any

import torch

from rlaif_ray.algorithm.logprobs import token_logprobs_and_entropy
from rlaif_ray.learner.nodes import usable_cores
from rlaif_ray.learner.probe import alone_outputs, attention_of, evaluating, laid_out_outputs

if TYPE_CHECKING:
    from rlaif_ray.learner.engine import RankSpec
    from rlaif_ray.learner.nodes import usable_cores
from rlaif_ray.learner.probe import Run, Text


@dataclass(frozen=True, slots=True)
class Readings:
    """The same numbers, one per completion token, computed twice."""

    together: list[float]  # all samples in one micro-batch, as in training
    alone: list[float]  # one sample after the other, by transformers' reference attention
    packed: bool  # whether the micro-batch was packed; else padded


def read(run: Run, module: Any, model: Any, text: Text, *, packed: bool, device: torch.device) -> Readings:
    """What `run` computes of the text. `module` is what it runs (a DeepSpeed engine), `model` transformers' inside it.

    A collective under ZeRO-3: all ranks call it with the same text. Dropout is off meanwhile.
    """
    with evaluating(module):
        together = laid_out_outputs(run, text, packed=packed, device=device)
        with reference_attention(model):
            alone = alone_outputs(run, text, device)
    return Readings(together.tolist(), alone.tolist(), packed)


@contextmanager
def reference_attention(model: Any) -> Iterator[None]:
    """Within it the model computes attention with transformers' "eager" code, which has every term of every model;
    some models can't change theirs, and keep it."""
    if model.config._attn_implementation == "eager" or not model._can_set_attn_implementation():
        yield
        return
    with attention_of(model, "eager"):
        yield


@contextmanager
def saved_threads(spec: RankSpec) -> Iterator[None]:
    """Within it torch computes on as many cores of the CPU as this rank may use.

    Ray leaves a process that has a GPU one thread, on which a large model that was saved would take hours to read.
    """
    before = torch.get_num_threads()
    if spec.device == "cuda":
        cores = usable_cores()
        torch.set_num_threads(max(before, min(cores, max(spec.threads, cores // spec.world_size))))
    try:
        yield
    finally:
        torch.set_num_threads(before)


@torch.no_grad()
def logprobs_of_saved(model: Any, text: Text) -> list[float]:
    """Log-probabilities of the completion tokens by a language model as transformers loads it, given tokens alone."""
    found: list[float] = []
    for prompt, completion in zip(text.prompts, text.completions, strict=True):
        logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0]
        targets = torch.tensor(completion)
        found += token_logprobs_and_entropy(logits[len(prompt) - 1 : -1], targets, 1.0)[0].tolist()
    return found


@torch.no_grad()
def rewards_of_saved(model: Any, text: Text) -> list[float]:
    """The reward before each sample's last token, by a sequence classifier as transformers loads it."""
    return [
        float(model(input_ids=torch.tensor([[*prompt, *completion[:-1]]]), use_cache=False).logits[0, 0])
        for prompt, completion in zip(text.prompts, text.completions, strict=True)
    ]


def before_last_tokens(numbers: list[float], text: Text) -> list[float]:
    """Of numbers per completion token those of each sample's last one: what `rewards_of_saved` gives."""
    return [numbers[end - 1] for end in accumulate(map(len, text.completions))]
