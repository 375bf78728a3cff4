"""Weights go from a learner to an engine on the same GPU by CUDA IPC, and the engine then samples with them."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.gpu.actors import PAIR_SPECS, Pair, inside
from tests.gpu.device import EXACT, REHEARSAL

pytestmark = [pytest.mark.gpu, pytest.mark.parametrize("pair", PAIR_SPECS, indirect=True)]

# Mean distance of log-probabilities, engine to learner: fused kernels round elsewhere.
AGREE = 1e-3 if EXACT else 0.06
STALE = 0.3  # what an update moves at least


def test_sync_brings_new_weights(pair: Pair, tmp_path: Path) -> None:
    """In one story, since every part needs the one before. Tied heads with ZeRO 3, untied ones without."""
    report = pair.push()
    assert report.bytes > 0 and int(report.checksum, 16) > 0
    assert pair.greedy() == pair.on_disk, "the same weights, sent, say something else than loaded from disk"
    assert pair.gap() < AGREE

    for seed in (1, 2):
        pair.learner.update(pair.experience(seed=seed))
        stale = pair.gap(seed=seed)
        assert stale > STALE, f"the update moved too little to see a stale engine ({stale:.4f})"
        before, report = report, pair.push()
        assert report.version == before.version + 1 and report.checksum != before.checksum
        assert pair.gap(seed=seed) < AGREE
        assert pair.greedy() != pair.on_disk

    again = pair.push()
    assert again.checksum == report.checksum
    said = pair.greedy()
    pair.learner.save_policy(str(tmp_path / "policy"))
    assert greedy_of_a_fresh_model(tmp_path / "policy", said) >= (1.0 if EXACT else 0.9)


def greedy_of_a_fresh_model(folder: Path, said: list[tuple[int, ...]]) -> float:
    """Share of tokens that transformers, with the saved policy, would have said as well, given those before.

    In bf16 two kernels may break a near tie differently, so not all of them need to.
    """
    import torch
    from transformers import AutoModelForCausalLM

    from tests.gpu.actors import PROMPTS
    from tests.gpu.device import DEVICE

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").to(DEVICE).eval()
    same, total = 0, 0
    for prompt, tokens in zip(PROMPTS, said, strict=True):
        with torch.inference_mode():
            logits = model(torch.tensor([[*prompt.tokens, *tokens]], device=DEVICE)).logits[0]
        best = logits[len(prompt.tokens) - 1 : -1].argmax(-1).tolist()
        same += sum(a == b for a, b in zip(best, tokens, strict=True))
        total += len(tokens)
    return same / total


def test_completions_carry_the_version(pair: Pair) -> None:
    from rlaif_ray.interfaces import GenerationSettings
    from tests.gpu.actors import PROMPTS

    version = pair.push().version
    completions = pair.engines.generate(PROMPTS, GenerationSettings(1, 4, 1.0, seed=0, ignore_eos=True))
    assert {c.weight_version for c in completions} == {version}


def test_graphs_and_the_v2_model_runner_are_in_use(pair: Pair) -> None:
    if REHEARSAL:
        pytest.skip("a CPU has neither")

    def used(engine: object) -> tuple[str, bool]:
        config = engine._llm.llm_engine.vllm_config  # type: ignore[attr-defined]
        return config.compilation_config.cudagraph_mode.name, config.use_v2_model_runner

    mode, v2 = inside(pair.engines, used)
    assert mode != "NONE" and v2
