"""What tests share: no model hub, and one engine for all that need a real one."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
# Threads that wait for each other sleep: with more processes than cores, spinning ones take steps from 0.05 s to 2 s.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
# Ray gives its workers niceness 15: beside another test on the same cores they would stand still.
os.environ.setdefault("RAY_worker_niceness", "0")

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, settings

from tests import durations
from tests.pace import pace, scaled
from tests.tiny import cached_tiny_model

if TYPE_CHECKING:
    from rlaif_ray.rollout.vllm_engine import VllmEngine

pytest.register_assert_rewrite("tests.contracts")
# How fast an example is on a shared machine is no test's business.
settings.register_profile("shared", deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.load_profile("shared")

DEFAULT_TIMEOUT_S = 1200.0  # of one test; see tests/pace.py
ENGINE_CONTEXT = 4096  # room for the shipped judge templates in the tiny tokenizer's short tokens


@pytest.fixture(autouse=True)
def no_amx(monkeypatch: pytest.MonkeyPatch) -> None:
    """`precision: auto` is fp32 in this process on every CPU, so that digits don't depend on it. Programs that tests
    start look for themselves: those whose digits are compared set precision=fp32."""
    monkeypatch.setattr("rlaif_ray.precision.fast_in_bf16", lambda: False)


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


# ---- What runs, in which order, and how long it takes ----------------------------------------------------------------


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--record-durations", action="store_true", help="write what each file took to tests/durations.json"
    )


def pytest_configure(config: pytest.Config) -> None:
    pace()  # measured before anything else runs, and inherited by xdist's workers


def pytest_report_header(config: pytest.Config) -> list[str]:
    return durations.header(config.getoption("markexpr"), workers=config.getoption("numprocesses", None) or 1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Starts the longest files first, so that no long one is left at the end; sets every deadline to this machine."""
    recorded = durations.read()
    # Stable: files without a record stay in their order.
    items.sort(key=lambda item: -recorded.seconds_of(item.nodeid.partition("::")[0]))
    for item in items:
        given = item.get_closest_marker("timeout")
        seconds = float(given.args[0]) if given is not None else DEFAULT_TIMEOUT_S
        item.add_marker(pytest.mark.timeout(scaled(seconds)), append=False)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """A file is one worker's, and so are the files that share an engine."""
    from xdist.scheduler import LoadFileScheduling

    class ByFileAndEngine(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            return durations.group(nodeid.partition("::")[0])

    return ByFileAndEngine(config, log)


_took: dict[tuple[str, str], float] = {}  # by file and tier


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    tier = durations.REST if durations.MARKER in report.keywords else durations.TEST
    key = (report.nodeid.partition("::")[0], tier)
    _took[key] = _took.get(key, 0.0) + report.duration


def pytest_sessionfinish(session: pytest.Session) -> None:
    if session.config.getoption("--record-durations") and not hasattr(session.config, "workerinput"):
        durations.write(_took)
