"""What a vLLM engine holds on each of its GPUs beside its KV cache, and what a sequence takes of that: pure arithmetic.

Weights are as large as the checkpoint's files make them, where those are known; workspace and CUDA graphs are
estimates, on the high side.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlaif_ray.model_shapes import QUANTIZED, ModelShape

GIB = 2**30
CUDA_BYTES = GIB  # context and libraries of a process on a GPU, and its share of NCCL's buffers
# vLLM's own for offline engines: requests side by side and prompt tokens a step, from 70 GiB a GPU on, and below.
LARGE_GPU, SEQUENCES, BATCHED_TOKENS = 70 * GIB, (1024, 256), (16384, 8192)
GRAPH_BYTES = 30 << 20  # of a layer: vLLM captures about a hundred CUDA graphs of it, and says "1~3 GiB" of all


def engine_weights(shape: ModelShape, kwargs: Mapping[str, Any], parallel: int, size: int) -> int:
    """Bytes of the weights on each GPU, computed in a type of `size` bytes, quantised by the checkpoint or by
    engine_kwargs.quantization."""
    return -(-shape.loaded(size, QUANTIZED.get(str(kwargs.get("quantization")))) // parallel)


def batched_tokens(kwargs: Mapping[str, Any], gpu_bytes: int) -> int:
    """Tokens of a step at most."""
    return int(kwargs.get("max_num_batched_tokens", BATCHED_TOKENS[0 if gpu_bytes >= LARGE_GPU else 1]))


def workspace(shape: ModelShape, kwargs: Mapping[str, Any], parallel: int, size: int, gpu_bytes: int) -> int:
    """What a step computes in, its logits in fp32 with their log-probabilities, and what CUDA takes."""
    batched = batched_tokens(kwargs, gpu_bytes)
    sequences = int(kwargs.get("max_num_seqs", SEQUENCES[0 if gpu_bytes >= LARGE_GPU else 1]))
    hidden = 4 * shape.hidden + (2 * shape.intermediate + shape.queries + 2 * shape.keys) // parallel
    return batched * hidden * size + 2 * 4 * min(sequences, batched) * shape.vocabulary + CUDA_BYTES


def cuda_graphs(shape: ModelShape, kwargs: Mapping[str, Any]) -> int:
    """Of the graphs that vLLM captures once it has loaded. Where its KV cache has a fixed size, it doesn't leave room
    for them (gpu_worker.determine_available_memory, 0.32)."""
    compilation = kwargs.get("compilation_config")
    mode = compilation.get("cudagraph_mode") if isinstance(compilation, Mapping) else None
    none = kwargs.get("enforce_eager") or (mode is not None and str(mode).upper() in ("NONE", "0"))
    return 0 if none else shape.layers * GRAPH_BYTES


def sequence_bytes(
    shape: ModelShape, kwargs: Mapping[str, Any], parallel: int, size: int, gpu_bytes: int, tokens: int
) -> int:
    """KV cache of one sequence of so many tokens on each GPU, as vLLM admits it.

    Fewer heads than GPUs are repeated. Layers with a sliding window keep the window and one step's tokens
    (SlidingWindowSpec.max_admission_blocks_per_request).
    """
    kv_size = 1 if str(kwargs.get("kv_cache_dtype", "")).startswith("fp8") else size
    layer = 2 * max(1, -(-shape.kv_heads // parallel)) * shape.head_dim * kv_size
    seen = min(tokens, shape.window - 1 + batched_tokens(kwargs, gpu_bytes))
    return layer * ((shape.layers - shape.windowed) * tokens + shape.windowed * seen)
