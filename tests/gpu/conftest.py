"""Every test here needs a GPU and is skipped, with the reason, where there is none."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("WANDB_MODE", "disabled")

HERE = Path(__file__).parent
CUDA_ONLY = {"test_sleep_wake.py"}  # not even for a rehearsal on a CPU


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    own = [item for item in items if HERE in item.path.parents]
    if not own:
        return
    from tests.gpu.device import REHEARSAL

    reason = why_not()
    if reason is not None and not REHEARSAL and os.environ.get("RLAIF_GPU_REQUIRED") == "1":
        raise pytest.UsageError(reason)  # under first_quarter_hour.sh, where skipped would read as passed
    for item in own:
        item.add_marker(pytest.mark.gpu)
        on_cpu = REHEARSAL and item.path.name not in CUDA_ONLY
        if reason is not None and not on_cpu:
            item.add_marker(pytest.mark.skip(reason=reason))


def why_not() -> str | None:
    """Why GPU tests can't run here; None where they can."""
    import torch

    if torch.version.cuda is None:
        return f"needs a GPU: this torch ({torch.__version__}) is built without CUDA"
    if not torch.cuda.is_available():
        return "needs a GPU: torch finds no CUDA device"
    return None
