"""The guard's text shows what goes wrong only between tokens that are far from each other."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from rlaif_ray.attention import PACKED
from rlaif_ray.learner.agreement import logprobs_of_saved, read
from rlaif_ray.learner.modules import CausalPolicy
from rlaif_ray.learner.packing import packed_attention, register_packed_attention
from rlaif_ray.learner.probe import Text, logprobs_of
from rlaif_ray.pipelines.agreement import bound_for, compare
from rlaif_ray.pipelines.guard import guard_text
from tests.tiny import make_tokenizer
from tests.zoo import WIDTH

BOUND = bound_for("fp32", None)
TEXT = guard_text(make_tokenizer(None), 508)
SHORT = Text(TEXT.prompts[:-1], TEXT.completions[:-1])


pytestmark = pytest.mark.usefixtures("one_thread")


def model_of(attention: str) -> Any:
    """A model with a window of 128 tokens, so random that what a token sees matters."""
    torch.manual_seed(0)
    config = transformers.MistralConfig(**WIDTH | {"max_position_embeddings": 512}, sliding_window=128)
    model = transformers.AutoModelForCausalLM.from_config(
        config, dtype=torch.float32, attn_implementation=attention
    ).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.15 if parameter.ndim > 1 else 0.05)
    return model


def without_window(*args: Any, sliding_window: int | None = None, **kwargs: Any) -> Any:
    return packed_attention(*args, **kwargs)


@pytest.mark.parametrize(("text", "shows"), [(TEXT, True), (SHORT, False)])
def test_a_window_that_is_lost(text: Text, shows: bool) -> None:
    model = model_of(PACKED)
    policy = CausalPolicy(model)

    def agrees() -> bool:
        found = read(logprobs_of(policy), policy, model, text, packed=True, device=torch.device("cpu"))
        return compare({"together": found.together, "alone": found.alone}, BOUND).agrees

    register_packed_attention()
    assert agrees()
    transformers.AttentionInterface.register(PACKED, without_window)
    assert agrees() != shows


def test_frequencies_that_are_rounded() -> None:
    """As bf16 has them: the engine's, say."""
    right, rounded = model_of("eager"), model_of("eager")
    rotary = rounded.model.rotary_emb
    rotary.inv_freq = rotary.inv_freq.bfloat16().float()
    readings = {"engine": logprobs_of_saved(rounded, TEXT), "alone": logprobs_of_saved(right, TEXT)}
    assert not compare(readings, BOUND).agrees
    assert compare(dict.fromkeys(readings, readings["alone"]), BOUND).agrees
