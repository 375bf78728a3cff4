"""What `precision: auto` comes to: by the CPU's own flags, and by those of every node."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlaif_ray import precision
from rlaif_ray.config.algorithms import PpoConfig
from rlaif_ray.runtime import cluster

# From machines as they are: two lines of /proc/cpuinfo, shortened.
SAPPHIRE_RAPIDS = "processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16 amx_bf16 avx512_fp16 amx_tile amx_int8\n"
COOPER_LAKE = "processor\t: 0\nflags\t\t: fpu avx2 avx512f avx512_bf16\n"
HASWELL = "processor\t: 0\nflags\t\t: fpu avx2 fma\nbugs\t\t: amx_bf16\n"
GRAVITON = "processor\t: 0\nFeatures\t: fp asimd bf16\n"
real_look = precision.fast_in_bf16  # conftest.py puts another in its place


@pytest.fixture
def forget() -> Iterator[None]:
    real_look.cache_clear()
    yield
    real_look.cache_clear()


@pytest.mark.parametrize(
    ("cpu", "fast"),
    [(SAPPHIRE_RAPIDS, True), (COOPER_LAKE, False), (HASWELL, False), (GRAVITON, False), (None, False)],
)
@pytest.mark.usefixtures("forget")
def test_amx_makes_bf16_fast(cpu: str | None, fast: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if cpu is not None:
        (tmp_path / "cpuinfo").write_text(cpu)
    monkeypatch.setattr(precision, "_CPU", tmp_path / "cpuinfo")
    assert real_look() is fast


def test_auto_takes_what_is_faster() -> None:
    assert precision.chosen_precision("auto", "cuda", fast=False) == "bf16"
    assert precision.chosen_precision("auto", "cpu", fast=True) == "bf16"
    assert precision.chosen_precision("auto", "cpu", fast=False) == "fp32"
    for device in ("cpu", "cuda"):
        for fast in (True, False):
            assert precision.chosen_precision("fp32", device, fast=fast) == "fp32"  # type: ignore[arg-type]
            assert precision.chosen_precision("bf16", device, fast=fast) == "bf16"  # type: ignore[arg-type]


ID = {name: letter * 56 for name, letter in (("driver", "d"), ("a", "a"), ("b", "b"))}  # hexadecimal, as Ray demands


class Nodes:
    """Ray's calls about nodes; each node answers for itself, one may be lost (None) or silent."""

    class exceptions:
        class RayError(Exception):
            pass

    def __init__(self, fast: dict[str, Any]) -> None:
        self._fast = fast
        self.asked: list[str] = []

    def get_runtime_context(self) -> Any:
        return self

    def get_node_id(self) -> str:
        return ID["driver"]

    def remote(self, **resources: float) -> Any:
        assert resources == {"num_cpus": 0}  # it must not wait for a place
        nodes = self

        class Task:
            def __init__(self, function: Any, node: str = "") -> None:
                self._function, self._node = function, node

            def options(self, *, scheduling_strategy: Any) -> Task:
                assert not scheduling_strategy.soft
                return Task(self._function, scheduling_strategy.node_id)

            def remote(self) -> str:
                nodes.asked.append(self._node)
                return self._node

        return Task

    def wait(self, refs: list[str], num_returns: int, timeout: float) -> tuple[list[str], list[str]]:
        assert num_returns == len(refs)
        return [ref for ref in refs if self._of(ref) != "silent"], [ref for ref in refs if self._of(ref) == "silent"]

    def get(self, ref: str) -> Any:
        if self._of(ref) is None:
            raise self.exceptions.RayError
        return self._of(ref)

    def _of(self, ref: str) -> Any:
        return next(self._fast[name] for name in self._fast if ID[name] == ref)


def made(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch, device: Any = "cpu", places: Sequence[str] = ()
) -> tuple[Any, list[str]]:
    """A Cluster with bundles on these nodes, and what it says."""
    monkeypatch.setattr(cluster, "ray", nodes)
    monkeypatch.setattr(cluster, "nodes_of", lambda group: {k: ID[name] for k, name in enumerate(places)})
    monkeypatch.setattr(precision, "fast_in_bf16", lambda: nodes._fast["driver"])
    found, said = object.__new__(cluster.Cluster), []
    found.device, found._fast_in_bf16, found._note, found._group = device, None, said.append, object()
    found._limits = cluster.Limits(900.0, 1.0, 1.0)
    return found, said


@pytest.mark.parametrize(
    ("fast", "places", "chosen", "asked", "says"),
    [
        ({"driver": True}, ["driver"] * 2, "bf16", [], "have AMX.*precision=fp32"),
        ({"driver": False, "a": True}, ["driver", "a"], "fp32", [], None),
        ({"driver": False}, ["driver"], "fp32", [], None),
        ({"driver": True, "a": True, "b": True}, ["driver", "a", "b"], "bf16", ["a", "b"], "have AMX"),
        ({"driver": True, "a": True, "b": False}, ["driver", "a", "b"], "fp32", ["a", "b"], "of 3 nodes not all"),
        ({"driver": True, "a": None}, ["driver", "a"], "fp32", ["a"], "1 of 2 nodes did not say within 60 s"),
        ({"driver": True, "a": "silent"}, ["driver", "a"], "fp32", ["a"], "1 of 2 nodes did not say within 60 s"),
        # Nodes without an actor of the job are nobody's business, the driver's own among them.
        ({"driver": True, "a": True, "b": False}, ["a"], "bf16", ["a"], "have AMX"),
        ({"driver": False, "a": True}, ["a", "a"], "bf16", ["a"], "have AMX"),
        ({"driver": True, "a": False}, ["a"], "fp32", ["a"], None),
    ],
)
def test_all_nodes_of_the_job_must_have_it(
    fast: dict[str, Any], places: list[str], chosen: str, asked: list[str], says: str | None, monkeypatch: Any
) -> None:
    nodes = Nodes(fast)
    found, said = made(nodes, monkeypatch, places=places)
    assert found.precision("fp32") == "fp32" and found.precision("bf16") == "bf16" and not said
    assert [found.precision("auto"), found.precision("auto")] == [chosen, chosen]
    assert nodes.asked == [ID[name] for name in asked]  # once
    assert len(said) == (says is not None)
    assert says is None or re.search(says, said[0])


def test_on_gpus_nobody_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    nodes = Nodes({"driver": True, "a": True})
    found, said = made(nodes, monkeypatch, device="cuda")
    assert found.precision("auto") == "bf16" and not said and not nodes.asked


def test_importance_weights_are_for_bf16() -> None:
    assert PpoConfig().importance_in("fp32") is None
    weights = PpoConfig().importance_in("bf16")
    assert weights is not None and (weights.low, weights.high) == (0.0, 2.0)
    always = PpoConfig.model_validate({"importance": {"when": "always", "high": 3}})
    assert always.importance_in("fp32") == always.importance_in("bf16") == always.importance
    assert PpoConfig(importance=None).importance_in("bf16") is None
    assert PpoConfig(old_logprobs="sampler").importance_in("bf16") is None  # all would be 1
