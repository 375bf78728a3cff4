"""Where the tests of this folder run, and the models they run on.

With RLAIF_GPU_REHEARSAL=1 those that don't need CUDA itself run on a CPU, in fp32; with =bf16 in bf16, within the
bounds that hold on a GPU. It shows mistakes in the tests before a GPU is there, and proves nothing about GPUs.
"""

from __future__ import annotations

import os
import socket
import tempfile
from pathlib import Path
from typing import Any

import torch

REHEARSAL = os.environ.get("RLAIF_GPU_REHEARSAL") in ("1", "bf16") and not torch.cuda.is_available()
EXACT = REHEARSAL and os.environ["RLAIF_GPU_REHEARSAL"] == "1"  # in fp32
DEVICE = "cpu" if REHEARSAL else "cuda"
CLUSTER_DEVICE = "cpu" if REHEARSAL else "gpu"
PRECISION: Any = "fp32" if EXACT else "bf16"
DTYPE = torch.float32 if EXACT else torch.bfloat16

# A fixed key-value cache, so that no engine mistakes what its neighbours take for its own; no FlashInfer in the kit.
KIT: dict[str, Any] = {} if REHEARSAL else {"attention_backend": "FLASH_ATTN"}
ENGINE_KWARGS: dict[str, Any] = {} if REHEARSAL else {**KIT, "enforce_eager": True, "kv_cache_memory_bytes": 2**30}
# A few graphs are enough to see.
GRAPHS: dict[str, Any] = (
    {} if REHEARSAL else {"enforce_eager": False, "compilation_config": {"cudagraph_capture_sizes": [1, 2, 4, 8]}}
)
SHARE: dict[str, Any] = {"gpu_memory_utilization": 0.15, "kv_cache_gb": 0.2, "engine_kwargs": ENGINE_KWARGS}
CONTEXT = 2048


def gpu_model(
    folder: Path | None = None, *, tied: bool = True, dtype: torch.dtype | None = None, hidden: int = 256
) -> str:
    """A small random Llama in the tests' type with heads of 64, which every flash kernel takes; made once a machine.

    Its greedy tokens follow from the weights: an engine with stale ones shows. With `hidden` it is as large as wanted.
    """
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    from rlaif_ray.models import build_folder_once
    from tests.tiny import make_tokenizer

    dtype = dtype or DTYPE

    def build(target: Path) -> None:
        tokenizer = make_tokenizer(None)
        tokenizer.model_max_length = CONTEXT
        ids = {
            "pad_token_id": tokenizer.pad_token_id,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
        }
        config = LlamaConfig(
            vocab_size=320,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=4,
            num_attention_heads=hidden // 64,
            num_key_value_heads=hidden // 128,
            head_dim=64,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=tied,
            initializer_range=1.6 * hidden**-0.5,
            **ids,
        )
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            model = LlamaForCausalLM(config).to(dtype)
        model.generation_config = GenerationConfig(**ids)
        model.save_pretrained(target)
        tokenizer.save_pretrained(target)

    root = Path(tempfile.gettempdir()) / f"rlaif-ray-gpu-{os.getuid()}"
    name = f"{'tied' if tied else 'untied'}-{hidden}-{str(dtype).removeprefix('torch.')}"
    return str(build_folder_once(folder or root / name, build))


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("", 0))
        return int(listener.getsockname()[1])
