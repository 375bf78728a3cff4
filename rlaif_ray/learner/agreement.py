"""A fixed text computed more than once under the same weights: as training computes it, by the model alone, and by
what was saved. What should agree is compared in pipelines/guard.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rlaif_ray.algorithm.logprobs import token_logprobs_and_entropy
from rlaif_ray.learner.packing import ModelInput, build_input

Text = tuple[tuple[int, ...], tuple[int, ...]]  # a prompt and what follows it, in tokens; neither is empty


@dataclass(frozen=True, slots=True)
class Readings:
    """The same numbers, computed twice: log-probabilities of all following tokens, or a reward per text."""

    together: list[float]  # all texts in one micro-batch, as in training
    alone: list[float]  # one text after the other, by transformers' reference attention
    packed: bool  # whether the micro-batch was packed; else padded


def read_logprobs(policy: Any, model: Any, texts: Sequence[Text], *, packed: bool, device: torch.device) -> Readings:
    """Log-probabilities at temperature 1. `policy` is a CausalPolicy (or an engine of one) around `model`.

    A collective under ZeRO-3: all ranks call it with the same texts.
    """

    def logprobs(batch: ModelInput) -> Tensor:
        return token_logprobs_and_entropy(policy(batch), batch.targets, 1.0)[0]

    return _read(logprobs, policy, model, texts, build_input, packed=packed, device=device)


def read_rewards(
    module: Any,
    model: Any,
    texts: Sequence[Text],
    lay_out: Callable[..., ModelInput],
    *,
    packed: bool,
    device: torch.device,
) -> Readings:
    """Rewards of whole texts. `module` gives them for what `lay_out` makes of prompts and responses; as above."""
    return _read(module, module, model, texts, lay_out, packed=packed, device=device)


def _read(
    compute: Callable[[ModelInput], Tensor],
    module: Any,
    model: Any,
    texts: Sequence[Text],
    lay_out: Callable[..., ModelInput],
    *,
    packed: bool,
    device: torch.device,
) -> Readings:
    prompts, responses = [prompt for prompt, _ in texts], [response for _, response in texts]
    with torch.no_grad(), _without_dropout(module):
        together = compute(lay_out(prompts, responses, packed=packed, device=device))
        with reference_attention(model):
            alone = [
                # Nothing but the tokens: the model counts its positions and masks the future by itself.
                compute(replace(lay_out([p], [r], packed=False, device=device), positions=None, attention_mask=None))
                for p, r in texts
            ]
    return Readings(together.float().tolist(), torch.cat(alone).float().tolist(), packed)


@contextmanager
def _without_dropout(module: Any) -> Iterator[None]:
    """Adapters may have some."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)


@contextmanager
def reference_attention(model: Any) -> Iterator[None]:
    """Within it the model computes attention with transformers' "eager" code, which has every term of every model;
    some models can't change theirs, and keep it."""
    chosen = model.config._attn_implementation
    if chosen == "eager" or not model._can_set_attn_implementation():
        yield
        return
    model.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.set_attn_implementation(chosen)


@torch.no_grad()
def logprobs_of_saved(model: Any, texts: Sequence[Text]) -> list[float]:
    """Log-probabilities of the tokens that follow the prompts, by a language model as transformers loads it."""
    found: list[float] = []
    for prompt, response in texts:
        logits = model(input_ids=torch.tensor([[*prompt, *response]]), use_cache=False).logits[0, len(prompt) - 1 : -1]
        found += token_logprobs_and_entropy(logits, torch.tensor(response), 1.0)[0].tolist()
    return found


@torch.no_grad()
def rewards_of_saved(model: Any, texts: Sequence[Text]) -> list[float]:
    """Rewards of whole texts, by a sequence classifier as transformers loads it."""
    return [
        float(model(input_ids=torch.tensor([[*prompt, *response]]), use_cache=False).logits[0, 0])
        for prompt, response in texts
    ]
