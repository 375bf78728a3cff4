"""The real engine keeps the Generator contract; transformers says what is right."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from rlaif_ray.models import load_tokenizer
from tests.conftest import ENGINE_CONTEXT
from tests.contracts.generator import GeneratorContract, Subject
from tests.tiny import cached_tiny_model

if TYPE_CHECKING:
    from rlaif_ray.rollout.vllm_engine import VllmEngine

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def subject(tiny_engine: VllmEngine) -> Subject:
    from transformers import AutoModelForCausalLM

    folder = cached_tiny_model(tied=True, context=ENGINE_CONTEXT)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()

    def next_logits(tokens: tuple[int, ...]) -> torch.Tensor:
        with torch.inference_mode():
            return model(torch.tensor([tokens])).logits[0, -1]

    return Subject(tiny_engine, load_tokenizer(folder), tiny_engine.weight_version, ENGINE_CONTEXT, next_logits)


class TestContract(GeneratorContract):
    pass
