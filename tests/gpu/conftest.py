"""Every test here needs a GPU and is skipped, with the reason, where there is none."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.record import hand_over

os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
os.environ.setdefault("WANDB_MODE", "disabled")

HERE = Path(__file__).parent
took: dict[str, float] = {}  # seconds of each test so far
CUDA_ONLY = {"test_sleep_wake.py"}  # not even for a rehearsal on a CPU


@pytest.fixture(scope="session")
def pairs(request: pytest.FixtureRequest) -> Iterator[dict[str, Any]]:
    """The pairs of actors.py that the tests of this session ask for."""
    from tests.gpu.actors import running_pairs

    calls = [getattr(item, "callspec", None) for item in request.session.items]
    with running_pairs(sorted({call.params["pair"] for call in calls if call and "pair" in call.params})) as found:
        yield found


@pytest.fixture
def pair(request: pytest.FixtureRequest, pairs: dict[str, Any]) -> Any:
    """A learner and an engine, by the name in actors.PAIR_SPECS. Tests share them: each pushes before it asks."""
    found = pairs[request.param]
    if isinstance(found, Exception):
        raise found
    return found


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


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Each test for the account of first_quarter_hour.sh, as soon as it is over: one that hangs leaves the others'."""
    took[report.nodeid] = took.get(report.nodeid, 0.0) + report.duration
    if report.when == "call" or report.outcome != "passed":
        came = report.outcome if report.when == "call" else {"failed": "error"}.get(report.outcome, report.outcome)
        name = report.nodeid.removeprefix("tests/gpu/")
        hand_over({"test": name, "came": came, "seconds": round(took[report.nodeid], 1)})


def why_not() -> str | None:
    """Why GPU tests can't run here; None where they can."""
    import torch

    if torch.version.cuda is None:
        return f"needs a GPU: this torch ({torch.__version__}) is built without CUDA"
    if not torch.cuda.is_available():
        return "needs a GPU: torch finds no CUDA device"
    return None
