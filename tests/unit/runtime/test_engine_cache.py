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
from rlaif_ray.models import load_config
from rlaif_ray.pipelines.plan import ShapeFinder
from rlaif_ray.rollout.vllm_engine import EngineSpec, engine_arguments
from rlaif_ray.runtime.engine_cache import engine_shape, planned, with_planned_cache
from rlaif_ray.runtime.engine_size import CUDA_BYTES, GIB, GRAPH_BYTES
from rlaif_ray.runtime.fit import plan_job
from rlaif_ray.runtime.memory_plan import Actors, Machine
from rlaif_ray.weight_types import Stored, stored_weights
from tests.tiny import cached_tiny_model

CONFIGS = Path(__file__).parents[3] / "configs/cluster"
GRAPHS = 32 * GRAPH_BYTES
LLAMA_8B = known_shapes()["meta-llama/Llama-3.1-8B"]
SPEC = EngineSpec(
    "meta-llama/Llama-3.1-8B", None, False, "bfloat16", "cuda", 2048, 1, 0.5, None, 0, 1, "ipc", shares_gpu=True
)


def test_what_a_share_leaves_by_hand() -> None:
    """Half of 80 GiB, without 8.03 billion weights of 2 bytes, 16384 tokens' worth of a layer, 1024 rows of logits and
    of their log-probabilities, and the CUDA graphs of 32 layers, for which vLLM leaves no room."""
    layer = 16384 * 2 * (4 * 4096 + 2 * 14336 + 4096 + 2 * 1024)
    left = 40 * GIB - 2 * 8_030_261_248 - layer - 2 * 4 * 1024 * 128_256 - CUDA_BYTES - GRAPHS
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
    held = 2 * 8_030_261_248 + 16384 * 2 * 51_200 + 2 * 4 * 1024 * 128_256 + CUDA_BYTES + GRAPHS
    if utilization is None:  # with its size given, it wants no more than it takes to be free
        assert cache is not None
        utilization = (held + cache) / (80 * GIB)
    assert arguments["gpu_memory_utilization"] == pytest.approx(utilization)
    expected = int(80 * GIB * utilization) - held if cache is None else cache
    assert arguments["kv_cache_memory_bytes"] == expected


def test_a_share_that_holds_no_sequence_by_an_estimate_is_left_to_vllm() -> None:
    """The workspace is an estimate: vLLM may find room where the plan has none, and says so itself if not."""
    spec, notes = replace(SPEC, gpu_memory_utilization=0.2), []
    assert planned(spec, LLAMA_8B, 80 * GIB, notes.append) == spec
    (note,) = notes
    assert "needs about 19.7 GiB of the GPU that it shares (got gpu_memory_utilization=0.2, 16.0 GiB)" in note
    assert "set its kv_cache_gb" in note


def test_weights_that_are_larger_than_the_share_are_wrong_input() -> None:
    with pytest.raises(
        InputError, match=r"weights of .* take 15\.0 GiB of the GPU that it shares \(got gpu_mem.*=0.1,"
    ):
        planned(replace(SPEC, gpu_memory_utilization=0.1), LLAMA_8B, 80 * GIB)


def saved(folder: Path, config: dict[str, Any], tensors: dict[str, tuple[str, tuple[int, ...]]]) -> str:
    """A model's folder with these tensors, of no content, over two files and an index."""
    import torch
    from safetensors.torch import save_file

    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    index = {name: f"model-{k % 2 + 1}.safetensors" for k, name in enumerate(names)}
    for file in set(index.values()):
        own = {name: tensors[name] for name in names if index[name] == file}
        save_file(
            {n: torch.zeros(shape, dtype=getattr(torch, kind)) for n, (kind, shape) in own.items()}, folder / file
        )
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return str(folder)


SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2}
SIZES |= {"intermediate_size": 96, "vocab_size": 100, "max_position_embeddings": 4096}
FAMILIES: list[tuple[dict[str, Any], int]] = [  # and the width of what a token computes in a layer
    ({"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}, 192),
    ({"model_type": "qwen3_moe", "moe_intermediate_size": 32, "num_experts_per_tok": 8}, 256),
    ({"model_type": "phi3", "pad_token_id": 0}, 96),
    ({"model_type": "gemma2", "head_dim": 16}, 96),
    ({"model_type": "granite"}, 96),
    ({"model_type": "gpt_oss", "head_dim": 16, "num_experts_per_tok": 4}, 384),
]


@pytest.mark.parametrize(("config", "width"), FAMILIES, ids=lambda x: x["model_type"] if isinstance(x, dict) else "")
def test_any_family_gets_what_its_files_leave(tmp_path: Path, config: dict[str, Any], width: int) -> None:
    """Left to vLLM's own measure, a replacement beside a learner that trains would count that one's memory."""
    tensors = {"a.weight": ("float32", (300, 100)), "b.weight": ("bfloat16", (70, 1000))}
    spec = replace(SPEC, model=saved(tmp_path, {**SIZES, **config}, tensors), max_context=512)
    found = with_planned_cache(spec, lambda: 80 * GIB)
    layer = 16384 * 2 * (4 * 64 + 2 * width + 64 + 2 * 32)
    left = 40 * GIB - 2 * 100_000 - layer - 2 * 4 * 1024 * 100 - CUDA_BYTES - 2 * GRAPH_BYTES
    assert found == replace(spec, kv_cache_bytes=left)


def test_quantised_weights_count_as_they_are_stored(tmp_path: Path) -> None:
    """AWQ's: packed integers of 32 bits as they are, scales and embedding in the engine's type; a tied head, once."""
    tensors = {
        "model.layers.0.mlp.up_proj.qweight": ("int32", (64, 96)),
        "model.layers.0.mlp.up_proj.qzeros": ("int32", (1, 12)),
        "model.layers.0.mlp.up_proj.scales": ("float16", (1, 96)),
        "model.embed_tokens.weight": ("float16", (100, 64)),
        "lm_head.weight": ("float16", (100, 64)),
    }
    how = {"quant_method": "awq", "bits": 4, "group_size": 64}
    config = {**SIZES, "model_type": "qwen2", "tie_word_embeddings": True, "quantization_config": how}
    folder = Path(saved(tmp_path, config, tensors))
    shape = engine_shape(load_config(folder), "x", folder)
    assert shape.stored == Stored(96 + 6400, 4 * (64 * 96 + 12))
    assert shape.loaded(2) == 2 * (96 + 6400) + 4 * (64 * 96 + 12)
    (folder / "model-2.safetensors").unlink()  # half of it isn't here yet: bits of the config have to do
    part = engine_shape(load_config(folder), "x", folder)
    assert part.stored is None and part.bits == 4 + 20 / 64


def test_the_hub_says_how_large_a_model_is_that_is_not_here(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub
    from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata, TensorInfo

    one = {"w": TensorInfo("I32", [10, 10], (0, 400)), "s": TensorInfo("F16", [50], (400, 500))}
    two = {"e": TensorInfo("BF16", [7, 10], (0, 140)), "f": TensorInfo("F8_E4M3", [9], (140, 149))}
    files = {"1": SafetensorsFileMetadata({}, one), "2": SafetensorsFileMetadata({}, two)}
    asked: list[tuple[str, str | None]] = []

    def metadata(name: str, *, revision: str | None) -> SafetensorsRepoMetadata:
        asked.append((name, revision))
        return SafetensorsRepoMetadata({}, True, {}, files)

    monkeypatch.setattr(huggingface_hub, "get_safetensors_metadata", metadata)
    assert stored_weights("org/not-here", revision="v1", online=True) == Stored(120, 409)
    assert asked == [("org/not-here", "v1")]
    assert stored_weights("org/not-here") is None and len(asked) == 1  # `rlaif plan` asks nobody


def test_a_model_of_unknown_size_asks_for_its_kv_cache(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2"}))  # no weights
    spec = replace(SPEC, model=str(tmp_path))
    with pytest.raises(
        InputError, match=r"shares its GPU, and how large its KV cache can be is not known .*kv_cache_gb"
    ):
        with_planned_cache(spec, lambda: 80 * GIB)
    said = replace(spec, kv_cache_gb=2.0)
    assert with_planned_cache(said, lambda: 80 * GIB) == said


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


LINE = next(line for line in (CONFIGS / "1gpu.yaml").read_text().splitlines() if line.startswith("#   policy.model"))
SMALL = tuple(LINE.removeprefix("#").split())
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
    beside = sum(one.memory.parts[part] for part in ("weights", "workspace", "CUDA graphs"))
    assert beside + arguments["kv_cache_memory_bytes"] == one.memory.reserved
