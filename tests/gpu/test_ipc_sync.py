"""Weights go from a learner to an engine on the same GPU by CUDA IPC, and the engine then samples with them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from rlaif_ray.runtime.groups import EngineGroup
from tests.gpu.actors import Pair, engine_spec, greedy_tokens, inside, local_ray, running_engine, running_pair
from tests.gpu.device import GRAPHS, REHEARSAL, gpu_model

pytestmark = pytest.mark.gpu

# Mean distance of log-probabilities, engine to learner: fused kernels round elsewhere.
AGREE = 1e-3 if REHEARSAL else 0.06


@pytest.fixture(scope="module", params=[True, False], ids=["tied", "untied"])
def model(request: pytest.FixtureRequest) -> str:
    return gpu_model(tied=request.param)


@pytest.fixture(scope="module")
def engines(model: str) -> Iterator[EngineGroup]:
    """As engines run by default on a GPU: CUDA graphs, and vLLM's V2 model runner."""
    with pytest.MonkeyPatch.context() as patch:
        if not REHEARSAL:
            patch.setenv("VLLM_USE_V2_MODEL_RUNNER", "1")
        with local_ray(), running_engine(engine_spec(model, **GRAPHS)) as group:
            yield group


@pytest.fixture(scope="module")
def on_disk(engines: EngineGroup) -> list[tuple[int, ...]]:
    """Greedy tokens of the engine as it started; asked before any sync."""
    return greedy_tokens(engines)


@pytest.fixture(scope="module", params=[0, 3], ids=["zero0", "zero3"])
def pair(
    request: pytest.FixtureRequest, engines: EngineGroup, model: str, on_disk: list[tuple[int, ...]]
) -> Iterator[Pair]:
    with running_pair(engines, model=model, zero_stage=request.param) as connected:
        yield connected


def test_sync_brings_new_weights(pair: Pair, on_disk: list[tuple[int, ...]], tmp_path: Path) -> None:
    """In one story, since every part needs the one before."""
    report = pair.sync.push(0)  # raises when the checksums of both ends differ
    assert report.version == 0 and report.bytes > 0 and int(report.checksum, 16) > 0
    assert pair.greedy() == on_disk, "the same weights, sent, say something else than loaded from disk"
    assert pair.gap() < AGREE

    for version in (1, 2):
        pair.learner.update(pair.experience(seed=version))
        stale = pair.gap(seed=version)
        assert stale > 5 * AGREE, f"the update moved too little to see a stale engine ({stale:.4f})"
        checksum, report = report.checksum, pair.sync.push(version)
        assert report.version == version and report.checksum != checksum
        assert pair.gap(seed=version) < AGREE
        assert pair.greedy() != on_disk

    again = pair.sync.push(3)
    assert again.checksum == report.checksum
    said = pair.greedy()
    pair.learner.save_policy(str(tmp_path / "policy"))
    assert greedy_of_a_fresh_model(tmp_path / "policy", said) >= (1.0 if REHEARSAL else 0.9)


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

    pair.sync.push(41)
    completions = pair.engines.generate(PROMPTS, GenerationSettings(1, 4, 1.0, seed=0, ignore_eos=True))
    assert {c.weight_version for c in completions} == {41}


def test_graphs_and_the_v2_model_runner_are_in_use(engines: EngineGroup) -> None:
    if REHEARSAL:
        pytest.skip("a CPU has neither")

    def used(engine: object) -> tuple[str, bool]:
        config = engine._llm.llm_engine.vllm_config  # type: ignore[attr-defined]
        return config.compilation_config.cudagraph_mode.name, config.use_v2_model_runner

    mode, v2 = inside(engines, used)
    assert mode != "NONE" and v2
