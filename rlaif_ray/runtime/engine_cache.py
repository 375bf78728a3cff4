"""The KV cache of an engine that shares its GPU, from the memory plan.

Left to itself vLLM measures what the GPU has free before and after it has loaded, and takes the difference for its own:
a learner that trains beside it, when a lost engine is replaced, would be counted in. Told how much KV cache it is to
have it doesn't measure, and only wants to find `gpu_memory_utilization` of the GPU free when it starts
(vllm/v1/worker/gpu_worker.py and utils.py, 0.32).

Weights are counted from the files, so any model of which these and the sizes in its config are at hand is planned.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif_ray.errors import InputError
from rlaif_ray.model_shapes import ModelShape, other_shape, shape_of_config
from rlaif_ray.models import load_config, resolve_model
from rlaif_ray.runtime.engine_size import GIB
from rlaif_ray.runtime.memory_plan import Machine, engine_memory, said_cache
from rlaif_ray.weight_types import stored_weights

if TYPE_CHECKING:
    from rlaif_ray.rollout.vllm_engine import EngineSpec


def with_planned_cache(
    spec: EngineSpec, gpu_bytes: Callable[[], int], note: Callable[[str], None] = lambda text: None
) -> EngineSpec:
    """The spec with the bytes of its KV cache; `note` is told where vLLM's own measure has to do.

    Raises:
        InputError: its size can't be told and the config doesn't say how large the KV cache is, or the weights alone
            are larger than its share of the GPU.
    """
    source = resolve_model(spec.model, revision=spec.revision)
    try:
        config = load_config(spec.model, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
        shape = engine_shape(config, spec.model, source, revision=spec.revision, online=True)
    except InputError as error:
        if said_cache(spec, "cuda") is not None:
            return spec
        raise InputError(
            f"an engine of {spec.model} shares its GPU, and how large its KV cache can be is not known "
            f"({str(error).rstrip('.')}). Say it with that engine's kv_cache_gb, or give it a GPU of its own "
            f"(cluster.gpus_per_actor=1)."
        ) from error
    return planned(spec, shape, gpu_bytes(), note)


def engine_shape(
    config: Any,
    name: str,
    source: Path | str,
    *,
    revision: str | None = None,
    online: bool = False,
    any_family: bool = True,
) -> ModelShape:
    """The shape of the model `name` in an engine, with its weights as they are in `source`, where they can be counted.

    Args:
        config: transformers' of the model.
        online: may ask the hub for the headers of files that aren't here.
        any_family: families whose parameters aren't counted too, if their files are at hand.

    Raises:
        InputError: it can't be told how large the model is.
    """
    values = config.to_dict()
    tied = bool(getattr(config, "tie_word_embeddings", False))
    dtype = str(getattr(config, "dtype", None)).removeprefix("torch.")
    stored = stored_weights(source, revision=revision, tied=tied, dtype=dtype, online=online)
    try:
        return replace(shape_of_config(values, name), stored=stored)
    except InputError:
        if stored is None or not any_family:
            raise
        return other_shape(config, name, stored)


def planned(
    spec: EngineSpec, shape: ModelShape, gpu_bytes: int, note: Callable[[str], None] = lambda text: None
) -> EngineSpec:
    """With the KV cache that its share of a GPU of so many bytes leaves; what the config says of it stays.

    Where that is the KV cache itself, the engine wants no more free memory at its start than it will take. Where too
    little is left by the plan, whose workspace is an estimate, vLLM measures for itself.

    Raises:
        InputError: the weights alone are larger than the share.
    """
    weight_bytes = 4 if spec.dtype == "float32" else 2
    machine = Machine(gpu_bytes, 1, judge_context=0, prompt_tokens=0)
    memory = engine_memory(spec, shape, spec.max_context, machine, weight_bytes, "cuda")
    if said_cache(spec, "cuda") is not None:
        needed = min(spec.gpu_memory_utilization, memory.reserved / gpu_bytes)
        return replace(spec, gpu_memory_utilization=needed)
    share = spec.engine_kwargs.get("gpu_memory_utilization", spec.gpu_memory_utilization)
    of = f"gpu_memory_utilization={share:g}, {memory.limit / GIB:.1f} GiB"
    if memory.parts["weights"] >= memory.limit:
        raise InputError(
            f"the weights of {spec.model} take {memory.parts['weights'] / GIB:.1f} GiB of the GPU that it shares (got "
            f"{of}): there is no room for them. Raise gpu_memory_utilization of that engine, or use a smaller or a "
            f"quantised model; `rlaif plan` says what fits."
        )
    left = memory.limit - sum(size for part, size in memory.parts.items() if part != "KV cache")
    least = 1 if shape.family == "other" else memory.total - memory.limit + left  # of one sequence, by families known
    if left < least:
        note(
            f"{spec.model} needs about {memory.total / GIB:.1f} GiB of the GPU that it shares (got {of}): vLLM "
            f"measures how much KV cache that leaves, and counts what others take there meanwhile as its own. Raise "
            f"gpu_memory_utilization of that engine, or set its kv_cache_gb."
        )
        return spec
    return replace(spec, kv_cache_bytes=left)
