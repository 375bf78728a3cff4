"""The KV cache of an engine that shares its GPU, from the memory plan.

Left to itself vLLM measures what the GPU has free before and after it has loaded, and takes the difference for its own:
a learner that trains beside it, when a lost engine is replaced, would be counted in. Told how much KV cache it is to
have it doesn't measure, and only wants to find `gpu_memory_utilization` of the GPU free when it starts
(vllm/v1/worker/gpu_worker.py and utils.py, 0.32).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from rlaif_ray.errors import InputError
from rlaif_ray.model_shapes import ModelShape, shape_of_config
from rlaif_ray.models import load_config
from rlaif_ray.runtime.memory_plan import GIB, Machine, engine_memory, said_cache

if TYPE_CHECKING:
    from rlaif_ray.rollout.vllm_engine import EngineSpec


def with_planned_cache(spec: EngineSpec, gpu_bytes: Callable[[], int]) -> EngineSpec:
    """The spec with the bytes of its KV cache; as it is, with vLLM's own measure, where the model can't be planned.

    Raises:
        InputError: what is left of its share holds no sequence.
    """
    try:
        config = load_config(spec.model, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
        shape = shape_of_config(config.to_dict(), spec.model)
    except InputError:
        return spec
    return planned(spec, shape, gpu_bytes())


def planned(spec: EngineSpec, shape: ModelShape, gpu_bytes: int) -> EngineSpec:
    """With the KV cache that its share of a GPU of so many bytes leaves; what the config says of it stays.

    Where that is the KV cache itself, the engine wants no more free memory at its start than it will take.

    Raises:
        InputError: what is left holds no sequence.
    """
    weight_bytes = 4 if spec.dtype == "float32" else 2
    machine = Machine(gpu_bytes, 1, judge_context=0, prompt_tokens=0)
    memory = engine_memory(spec, shape, spec.max_context, machine, weight_bytes, "cuda")
    if said_cache(spec, "cuda") is not None:
        needed = min(spec.gpu_memory_utilization, memory.reserved / gpu_bytes)
        return replace(spec, gpu_memory_utilization=needed)
    if memory.total > memory.limit:
        share = spec.engine_kwargs.get("gpu_memory_utilization", spec.gpu_memory_utilization)
        raise InputError(
            f"an engine of {spec.model} needs {memory.total / GIB:.1f} GB of the GPU that it shares (got "
            f"gpu_memory_utilization={share:g}, {memory.limit / GIB:.1f} GB): weights, workspace and the KV cache of "
            f"one sequence of {spec.max_context} tokens. Raise gpu_memory_utilization of that engine, or lower its "
            f"max_context; `rlaif plan` says what fits."
        )
    return replace(spec, kv_cache_bytes=memory.limit - memory.parts["weights"] - memory.parts["workspace"])
