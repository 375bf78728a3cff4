"""What tests share: no model hub, and one engine for all that need a real one."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
# Threads that wait for each other sleep: with more processes than cores, spinning ones take steps from 0.05 s to 2 s.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
from hypothesis import HealthCheck, settings

from tests.tiny import cached_tiny_model

if TYPE_CHECKING:
    from rlaif_ray.rollout.vllm_engine import VllmEngine

pytest.register_assert_rewrite("tests.contracts")
# How fast an example is on a shared machine is no test's business.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")

ENGINE_CONTEXT = 4096  # room for the shipped judge templates in the tiny tokenizer's short tokens


@pytest.fixture(scope="session")
def tiny_engine() -> Iterator[VllmEngine]:
    """vLLM in this process, on `cached_tiny_model(tied=True, context=ENGINE_CONTEXT)`. Mark its users `engine`."""
    pytest.importorskip("vllm")
    from rlaif_ray.rollout.vllm_engine import EngineSpec, VllmEngine

    yield VllmEngine(
        EngineSpec(
            model=str(cached_tiny_model(tied=True, context=ENGINE_CONTEXT)),
            revision=None,
            trust_remote_code=False,
            dtype="float32",
            device="cpu",
            max_context=ENGINE_CONTEXT,
            tensor_parallel=1,
            gpu_memory_utilization=0.5,
            kv_cache_gb=0.1,
            seed=0,
            threads=2,
            transfer_backend=None,
        )
    )
