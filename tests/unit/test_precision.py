"""What `precision: auto` comes to: by the CPU's own flags, and by those of every node."""

from __future__ import annotations

from collections.abc import Iterator
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
    """Ray's calls about nodes; each node answers for itself, one may be lost."""

    class exceptions:
        class RayError(Exception):
            pass

    def __init__(self, fast: dict[str, bool | None]) -> None:
        self._fast = fast
        self.asked: list[str] = []

    def nodes(self) -> list[dict[str, Any]]:
        return [{"NodeID": ID[name], "Alive": True} for name in self._fast] + [{"NodeID": "0" * 56, "Alive": False}]

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

    def get(self, refs: list[str], timeout: float) -> list[bool]:
        found = [self._fast[name] for node in refs for name in ID if ID[name] == node]
        if None in found:
            raise self.exceptions.RayError
        return found  # type: ignore[return-value]


def made(nodes: Nodes, monkeypatch: pytest.MonkeyPatch, device: Any = "cpu") -> tuple[Any, list[str]]:
    """A Cluster on these nodes, and what it says."""
    monkeypatch.setattr(cluster, "ray", nodes)
    monkeypatch.setattr(cluster, "fast_in_bf16", lambda: nodes._fast["driver"])
    found, said = object.__new__(cluster.Cluster), []
    found.device, found._fast_in_bf16, found._note = device, None, said.append
    found._limits = cluster.Limits(1.0, 1.0, 1.0)
    return found, said


@pytest.mark.parametrize(
    ("fast", "chosen", "asked"),
    [
        ({"driver": True}, "bf16", []),
        ({"driver": False, "a": True}, "fp32", []),
        ({"driver": True, "a": True, "b": True}, "bf16", ["a", "b"]),
        ({"driver": True, "a": True, "b": False}, "fp32", ["a", "b"]),
        ({"driver": True, "a": None}, "fp32", ["a"]),
    ],
)
def test_all_nodes_must_have_it(
    fast: dict[str, bool | None], chosen: str, asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    nodes = Nodes(fast)
    found, said = made(nodes, monkeypatch)
    assert found.precision("fp32") == "fp32" and found.precision("bf16") == "bf16" and not said
    assert [found.precision("auto"), found.precision("auto")] == [chosen, chosen]
    assert nodes.asked == [ID[name] for name in asked]  # once
    assert len(said) == (chosen == "bf16")
    assert all("AMX" in text and "precision=fp32" in text for text in said)


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
