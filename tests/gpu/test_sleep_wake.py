"""vLLM's sleep mode frees the engine's GPU memory for the learner; after waking (and a sync) it is the same engine.

Level 1 keeps the weights in host memory. Level 2 drops them: only a sync brings them back.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from tests.gpu.actors import PROMPTS, Pair, inside

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("pair", ["untied"], indirect=True)]

CANDIDATES = (5, 77, 200, 310)
AGREE = 0.06  # mean distance of log-probabilities, engine to learner or transformers


@pytest.fixture(params=["told", "of itself"], autouse=True)
def sleeps(request: pytest.FixtureRequest, pair: Pair) -> Iterator[None]:
    """The engine sleeps when it is told, or between calls (`rollout.sleep`)."""

    def by_itself(engine: object, whether: bool) -> None:
        engine._wake("weights", "kv_cache")  # type: ignore[attr-defined]
        engine._spec = replace(engine._spec, sleep=whether)  # type: ignore[attr-defined]
        engine._sleep()  # type: ignore[attr-defined]

    inside(pair.engines, lambda engine: by_itself(engine, request.param == "of itself"))
    pair.push()
    yield
    inside(pair.engines, lambda engine: by_itself(engine, False))


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


def test_a_judge_reads_after_waking_what_transformers_says(pair: Pair, tmp_path: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    from tests.gpu.device import DEVICE

    before = judged(pair)
    fall_asleep(pair, 1)
    wake(pair)
    for again, found in zip(judged(pair), before, strict=True):
        assert again == pytest.approx(found, abs=0.02)
    pair.learner.save_policy(str(tmp_path / "policy"))
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "policy", dtype=torch.float32).to(DEVICE).eval()
    gaps = []
    for prompt, found in zip(PROMPTS, before, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([prompt.tokens], device=DEVICE)).logits[0, -1]
        exact = logits.float().log_softmax(-1)[list(CANDIDATES)].tolist()
        gaps += [abs(a - b) for a, b in zip(found, exact, strict=True)]
    assert sum(gaps) / len(gaps) < AGREE


@pytest.mark.parametrize("level", [1, 2])
def test_wakes_and_takes_the_same_weights_again(pair: Pair, level: int) -> None:
    said = pair.greedy()
    assert fall_asleep(pair, level) > 2**29
    wake(pair)
    pair.push()
    assert pair.greedy() == said


@pytest.mark.parametrize("level", [1, 2])
def test_wakes_and_takes_new_weights(pair: Pair, level: int) -> None:
    """The learner trains while the engine sleeps, as in a colocated step."""
    said = pair.greedy()
    experience = pair.experience(seed=level)
    fall_asleep(pair, level)
    pair.learner.update(experience)
    wake(pair)
    pair.push()
    assert pair.greedy() != said
    assert pair.gap(seed=level) < AGREE
