"""The KV cache of engines that share a GPU: by hand, and by what vLLM itself checks before it starts."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlaif_ray.config.load import load_job
from rlaif_ray.errors import InputError
from rlaif_ray.model_shapes import known_shapes
from rlaif_ray.pipelines.plan import ShapeFinder
from rlaif_ray.rollout.vllm_engine import EngineSpec, engine_arguments
from rlaif_ray.runtime.engine_cache import planned, with_planned_cache
from rlaif_ray.runtime.fit import plan_job
from rlaif_ray.runtime.memory_plan import CUDA_BYTES, GIB, Actors, Machine
from tests.tiny import cached_tiny_model

CONFIGS = Path(__file__).parents[3] / "configs/cluster"
LLAMA_8B = known_shapes()["meta-llama/Llama-3.1-8B"]
SPEC = EngineSpec(
    "meta-llama/Llama-3.1-8B", None, False, "bfloat16", "cuda", 2048, 1, 0.5, None, 0, 1, "ipc", shares_gpu=True
)


def test_what_a_share_leaves_by_hand() -> None:
    """Half of 80 GiB, without 8.03 billion weights of 2 bytes, 16384 tokens' worth of a layer, and 1024 rows of logits
    and of their log-probabilities."""
    layer = 16384 * 2 * (4 * 4096 + 2 * 14336 + 4096 + 2 * 1024)
    left = 40 * GIB - 2 * 8_030_261_248 - layer - 2 * 4 * 1024 * 128_256 - CUDA_BYTES
    spec = planned(SPEC, LLAMA_8B, 80 * GIB)
    assert spec == replace(SPEC, kv_cache_bytes=left)
    arguments = engine_arguments(spec)
    assert (arguments["gpu_memory_utilization"], arguments["kv_cache_memory_bytes"]) == (0.5, left)


def test_an_engine_with_a_gpu_of_its_own_is_left_to_vllm() -> None:
    assert "kv_cache_memory_bytes" not in engine_arguments(replace(SPEC, shares_gpu=False))


@pytest.mark.parametrize(
    ("fields", "utilization", "cache"),
    [
        ({"kv_cache_gb": 4.0}, None, 4 * GIB),
        ({"engine_kwargs": {"kv_cache_memory_bytes": 3 * GIB}}, None, 3 * GIB),
        ({"kv_cache_gb": 4.0, "engine_kwargs": {"kv_cache_memory_bytes": 3 * GIB}}, None, 3 * GIB),
        ({"gpu_memory_utilization": 0.6}, 0.6, None),
        ({"engine_kwargs": {"gpu_memory_utilization": 0.6}}, 0.6, None),
    ],
)
def test_what_the_config_says_stays(fields: dict[str, Any], utilization: float | None, cache: int | None) -> None:
    spec = replace(SPEC, **{"gpu_memory_utilization": 0.9, **fields})
    arguments = engine_arguments(planned(spec, LLAMA_8B, 80 * GIB))
    held = 2 * 8_030_261_248 + 16384 * 2 * 51_200 + 2 * 4 * 1024 * 128_256 + CUDA_BYTES
    if utilization is None:  # with its size given, it wants no more than it takes to be free
        assert cache is not None
        utilization = (held + cache) / (80 * GIB)
    assert arguments["gpu_memory_utilization"] == pytest.approx(utilization)
    expected = int(80 * GIB * utilization) - held if cache is None else cache
    assert arguments["kv_cache_memory_bytes"] == expected


def test_a_share_that_holds_no_sequence_is_wrong_input() -> None:
    with pytest.raises(InputError, match=r"needs 18\..* GB of the GPU that it shares \(got gpu_memory_utilization=0.2"):
        planned(replace(SPEC, gpu_memory_utilization=0.2), LLAMA_8B, 80 * GIB)


def test_a_model_that_cannot_be_planned_is_left_to_vllm(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))
    spec = replace(SPEC, model=str(tmp_path))
    assert with_planned_cache(spec, lambda: 80 * GIB) == spec


@pytest.mark.parametrize("shares_gpu", [True, False])
def test_an_actor_plans_with_the_memory_that_its_device_has(monkeypatch: pytest.MonkeyPatch, shares_gpu: bool) -> None:
    """vLLM's CPU platform says how much memory there is, as its CUDA platform does."""
    platforms = pytest.importorskip("vllm.platforms")
    from rlaif_ray.rollout import vllm_engine
    from rlaif_ray.runtime.actors import EngineActor

    started: list[EngineSpec] = []
    monkeypatch.setattr(vllm_engine, "VllmEngine", started.append)
    folder = str(cached_tiny_model(tied=False))
    spec = replace(SPEC, model=folder, max_context=64, shares_gpu=shares_gpu)
    EngineActor().start(spec)
    total = platforms.current_platform.get_device_total_memory()
    assert started == [with_planned_cache(spec, lambda: total) if shares_gpu else spec]
    assert (started[0].kv_cache_bytes is not None) is shares_gpu


# ---- As vLLM sees it -------------------------------------------------------------------------------------------------

NOMINAL = 0.989  # of the memory in a GPU's name CUDA gives out so much (79.1 of 80 GB on an H100)


def shared_actors(name: str, settings: tuple[str, ...], gpu_gb: int) -> tuple[dict[str, Actors], int]:
    job = load_job("train", [CONFIGS / f"{name}.yaml"], list(settings)).config
    total = int(gpu_gb * GIB * NOMINAL)
    plan = plan_job(job, Machine(total, 8, judge_context=4096, prompt_tokens=2048), ShapeFinder({}), "cuda")
    (phase,) = plan.phases
    assert plan.fits and phase.shared == (("judge", "learner", "rollout"),)
    return {one.need.role: one for one in phase.actors}, total


def spec_of(one: Actors, name: str, settings: tuple[str, ...]) -> EngineSpec:
    job = load_job("train", [CONFIGS / f"{name}.yaml"], list(settings)).config
    cfg = job.rollout if one.need.role == "rollout" else job.feedback.judge
    return replace(
        SPEC,
        model=one.need.model,
        max_context=one.memory.holds["context"],
        gpu_memory_utilization=cfg.gpu_memory_utilization,
        kv_cache_gb=cfg.kv_cache_gb,
        sleep=cfg.sleep,
        engine_kwargs=cfg.engine_kwargs,
    )


def situations(actors: dict[str, Actors], role: str) -> Iterator[int]:
    """Bytes that the others of the GPU hold when this engine starts: in any order at first, and when it replaces a
    lost one. One that sleeps is replaced in its own turn; any other while the learner may be at work."""
    others = [one for name, one in actors.items() if name != role]
    for order in permutations(others):
        for count in range(len(order) + 1):
            yield sum(one.memory.resting for one in order[:count])
    learner = actors["learner"].memory
    engines = [one.memory for one in others if one.kind == "engine"]
    yield learner.resting + sum(m.resting for m in engines)
    own = actors[role].memory
    if own.resting == own.reserved:  # it doesn't sleep
        yield learner.reserved + sum(m.resting for m in engines)


SMALL = ("policy.model=Qwen/Qwen2.5-0.5B-Instruct", "feedback.judge.model=Qwen/Qwen2.5-1.5B-Instruct")
LAYOUTS = [("1gpu", (), 80), ("1gpu", SMALL, 24), ("8gpu-colocated", (), 80)]


@pytest.mark.parametrize(("name", "settings", "gpu_gb"), LAYOUTS)
@pytest.mark.parametrize("role", ["rollout", "judge"])
def test_vllm_starts_where_the_plan_fits(role: str, name: str, settings: tuple[str, ...], gpu_gb: int) -> None:
    """vLLM's own check of free memory (v1/worker/utils.py), then its own answer to how large the KV cache is, while a
    neighbour takes and gives back memory."""
    gpu_worker = pytest.importorskip("vllm.v1.worker.gpu_worker")
    from vllm.config import CacheConfig
    from vllm.v1.worker.utils import request_memory

    actors, total = shared_actors(name, settings, gpu_gb)
    one = actors[role]
    arguments = engine_arguments(planned(spec_of(one, name, settings), one.shape, total))
    cache = CacheConfig(
        gpu_memory_utilization=arguments["gpu_memory_utilization"],
        kv_cache_memory_bytes=arguments["kv_cache_memory_bytes"],
    )
    for held in situations(actors, role):
        snapshot = SimpleNamespace(total_memory=total, free_memory=total - held, device_="cuda:0")
        assert request_memory(snapshot, cache) <= total - held

        def learner_trains(snapshot: Any = snapshot, **_: Any) -> None:
            snapshot.free_memory += GIB  # vLLM's own measure would stop here: "Error in memory profiling"

        worker = SimpleNamespace(
            cache_config=cache,
            vllm_config=None,
            model_config=SimpleNamespace(multimodal_config=None),
            parallel_config=SimpleNamespace(),
            model_runner=SimpleNamespace(profile_run=learner_trains),
            randomize_dummy_inputs=False,
            init_snapshot=snapshot,
        )
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(gpu_worker, "set_current_vllm_config", lambda config: nullcontext())
            answer = gpu_worker.Worker.determine_available_memory(worker)
        assert answer == arguments["kv_cache_memory_bytes"] >= one.memory.holds["context"]
    held_by_it = one.memory.parts["weights"] + one.memory.parts["workspace"] + arguments["kv_cache_memory_bytes"]
    assert held_by_it == one.memory.reserved
