"""vLLM's sleep mode frees the engine's GPU memory for the learner; after waking (and a sync) it is the same engine.

Level 1 keeps the weights in host memory. Level 2 drops them: only a sync brings them back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest

from tests.gpu.actors import (
    PROMPTS,
    Pair,
    engine_spec,
    inside,
    local_ray,
    running_engine,
    running_pair,
)
from tests.gpu.device import gpu_model

pytestmark = pytest.mark.gpu

CANDIDATES = (5, 77, 200, 310)


@pytest.fixture(scope="module", params=["told", "of itself"])
def pair(request: pytest.FixtureRequest) -> Iterator[Pair]:
    """An engine that sleeps when it is told, and one that does between calls (`rollout.sleep`)."""
    spec = engine_spec(gpu_model(), enable_sleep_mode=True)
    if request.param == "of itself":
        spec = replace(spec, sleep=True)
    with local_ray(), running_engine(spec) as engines, running_pair(engines) as connected:
        connected.sync.push(0)
        yield connected


def fall_asleep(pair: Pair, level: int) -> int:
    """Bytes of GPU memory that this frees; of one that is asleep already, those it took when it woke."""
    import torch

    if inside(pair.engines, lambda engine: engine._spec.sleep):
        asleep = torch.cuda.mem_get_info()[0]
        inside(pair.engines, lambda engine: engine._wake("weights", "kv_cache"))
        taken = int(asleep - torch.cuda.mem_get_info()[0])
        inside(pair.engines, lambda engine: engine._sleep())
        return taken
    before = torch.cuda.mem_get_info()[0]
    inside(pair.engines, lambda engine: engine._llm.sleep(level) and None)
    return int(torch.cuda.mem_get_info()[0] - before)


def wake(pair: Pair) -> None:
    inside(pair.engines, lambda engine: None if engine._spec.sleep else engine._llm.wake_up() and None)


def test_level_1_wakes_as_it_was(pair: Pair) -> None:
    said = pair.greedy()
    assert fall_asleep(pair, 1) > 2**29, "sleeping must free the key-value cache of 1 GiB"
    wake(pair)
    assert pair.greedy() == said


def judged(pair: Pair) -> list[tuple[float, ...]]:
    """What a judge reads: log-probabilities of a few next tokens after each prompt."""
    from rlaif_ray.types import TokenQuery

    answers = pair.engines.token_logprobs([TokenQuery(p.tokens, CANDIDATES) for p in PROMPTS])
    assert all(answer.failure is None for answer in answers)
    return [answer.logprobs for answer in answers]


def test_a_judge_reads_after_waking_what_transformers_says(pair: Pair) -> None:
    """Of the weights on disk, which the first push has sent unchanged; before an update moves them."""
    import torch
    from transformers import AutoModelForCausalLM

    from tests.gpu.device import DEVICE

    before = judged(pair)
    fall_asleep(pair, 1)
    wake(pair)
    for again, found in zip(judged(pair), before, strict=True):
        assert again == pytest.approx(found, abs=0.02)
    model = AutoModelForCausalLM.from_pretrained(gpu_model(), dtype=torch.float32).to(DEVICE).eval()
    gaps = []
    for prompt, found in zip(PROMPTS, before, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt.tokens], device=DEVICE)).logits[0, -1]
        exact = logits.float().log_softmax(-1)[list(CANDIDATES)].tolist()
        gaps += [abs(a - b) for a, b in zip(found, exact, strict=True)]
    assert sum(gaps) / len(gaps) < 0.06


@pytest.mark.parametrize("level", [1, 2])
def test_wakes_and_takes_the_same_weights_again(pair: Pair, level: int) -> None:
    pair.sync.push(1)
    said = pair.greedy()
    assert fall_asleep(pair, level) > 2**29
    wake(pair)
    pair.sync.push(2)
    assert pair.greedy() == said


@pytest.mark.parametrize("level", [1, 2])
def test_wakes_and_takes_new_weights(pair: Pair, level: int) -> None:
    """The learner trains while the engine sleeps, as in a colocated step."""
    pair.sync.push(3)
    said = pair.greedy()
    experience = pair.experience(seed=level)
    fall_asleep(pair, level)
    pair.learner.update(experience)
    wake(pair)
    pair.sync.push(4)
    assert pair.greedy() != said
    assert pair.gap(seed=level) < 0.06
