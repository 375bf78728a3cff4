"""Nested states as safetensors files: exactly what went in comes out, or there is an error; never a pickle."""

from __future__ import annotations

import ast
import json
import math
import struct
from collections import OrderedDict
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from torch import Tensor

from rlaif_ray.errors import CheckpointError
from rlaif_ray.learner.state_files import DTYPES, copy_to_host, read_state, write_state
from rlaif_ray.storage import Place, StoredFolder

PACKAGE = Path(__file__).parents[3] / "rlaif_ray"


@dataclass
class Address:
    start: int
    tensor: Tensor


class Stage(IntEnum):
    ONE = 1


OBJECTS: dict[str, type] = {"Address": Address, "Stage": Stage}


def round_trip(folder: Path, state: Any) -> Any:
    file = write_state(Place(str(folder)) / "state.safetensors", copy_to_host(state, OBJECTS))
    return read_state(StoredFolder(Place(str(folder)), {"state.safetensors": file}), "state.safetensors", OBJECTS)


def assert_same(one: Any, other: Any) -> None:
    """The same to the bit and to the type."""
    assert type(one) is type(other)
    if isinstance(one, Tensor):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert torch.equal(one.reshape(-1).contiguous().view(torch.uint8), other.reshape(-1).view(torch.uint8))
    elif isinstance(one, dict):
        assert [(type(k), k) for k in one] == [(type(k), k) for k in other]  # order too
        for key in one:
            assert_same(one[key], other[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(other)
        for a, b in zip(one, other, strict=True):
            assert_same(a, b)
    elif isinstance(one, Address):
        assert_same(vars(one), vars(other))
    elif isinstance(one, float):
        assert struct.pack("d", one) == struct.pack("d", other) or (math.isnan(one) and math.isnan(other))
    else:
        assert one == other


class TestRoundTrip:
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_every_dtype(self, tmp_path: Path, dtype: torch.dtype) -> None:
        values = torch.randint(0, 2, (3, 5)).to(dtype)
        state = {"matrix": values, "scalar": values[0, 0], "none": values[:0], "strided": values.T[1:, ::2]}
        assert_same(round_trip(tmp_path, state), state)

    def test_what_optimizers_and_schedules_hold(self, tmp_path: Path) -> None:
        state = {
            "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(4)}, "0": None},
            "param_groups": [{"betas": (0.9, 0.999), "params": [0, 1], "fused": True, "lr": 1e-6, "big": 2**70}],
            "shapes": OrderedDict(a=torch.Size([2, 3]), b=torch.Size([])),
            "special": [math.nan, math.inf, -math.inf, -0.0, 5e-324, "nan", b"".decode()],
            "kind": torch.bfloat16,
            "place": Address(2, torch.arange(3)),
            "stage": Stage.ONE,
            ("a", 1): ((), [], {}),
            "float": {"float": "nan"},  # what looks like the file's own marks stays what it is
        }
        found = round_trip(tmp_path, state)
        assert_same(found, state)
        assert isinstance(found["stage"], Stage)

    def test_names_that_share_a_tensor_still_do(self, tmp_path: Path) -> None:
        tied = torch.randn(1000)
        state = {"embed": tied, "head": tied, "view": tied[:10], "flat": tied.view(10, 100)}
        found = round_trip(tmp_path, state)
        assert_same(found, state)
        assert found["embed"] is found["head"]
        assert (tmp_path / "state.safetensors").stat().st_size < 2 * 4000 + 1000

    def test_a_copy_is_not_changed_by_what_follows(self, tmp_path: Path) -> None:
        weight = torch.ones(3, requires_grad=True)
        copied = copy_to_host([weight], {})
        with torch.no_grad():
            weight.zero_()
        file = write_state(Place(str(tmp_path)) / "x", copied)
        (found,) = read_state(StoredFolder(Place(str(tmp_path)), {"x": file}), "x", {})
        assert found.tolist() == [1, 1, 1]

    def test_any_safetensors_reader_reads_it(self, tmp_path: Path) -> None:
        round_trip(tmp_path, {"a": {"b": torch.arange(3), "c": torch.ones(2, dtype=torch.uint8)}})
        with safe_open(tmp_path / "state.safetensors", framework="np") as file:
            assert sorted(file.keys()) == ["a/b", "a/c"] and file.get_tensor("a/b").tolist() == [0, 1, 2]
            json.loads(file.metadata()["state"])

    @settings(max_examples=50, deadline=None)
    @given(
        state=st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(st.characters(codec="utf-8")),
            lambda inner: (
                st.lists(inner, max_size=3)
                | st.tuples(inner, inner)
                | st.dictionaries(st.text(st.characters(codec="utf-8"), max_size=3) | st.integers(), inner, max_size=3)
            ),
            max_leaves=12,
        )
    )
    def test_any_plain_state(self, tmp_path_factory: pytest.TempPathFactory, state: Any) -> None:
        assert_same(round_trip(tmp_path_factory.mktemp("state"), state), state)


class TestRefusals:
    @pytest.mark.parametrize(
        "value", [object(), {1, 2}, b"bytes", print, torch.nn.Linear(1, 1), torch.ones(2).to_sparse(), 1j]
    )
    def test_an_unknown_type_is_told_with_its_place(self, value: Any) -> None:
        with pytest.raises(CheckpointError, match=r"optimizer/0/x can't be stored: it is a"):
            copy_to_host({"optimizer": [{"x": value}]}, OBJECTS)

    def test_subclasses_are_no_plain_values(self) -> None:
        """They would come back as something else."""
        with pytest.raises(CheckpointError, match=r"Stage"):
            copy_to_host([Stage.ONE], {})

    def test_an_object_that_is_not_known_is_not_made(self, tmp_path: Path) -> None:
        file = write_state(Place(str(tmp_path)) / "x", copy_to_host([Address(1, torch.ones(1))], OBJECTS))
        with pytest.raises(CheckpointError, match=r"x can't be read \(KeyError"):
            read_state(StoredFolder(Place(str(tmp_path)), {"x": file}), "x", {})

    def test_a_damaged_file_is_told(self, tmp_path: Path) -> None:
        file = write_state(Place(str(tmp_path)) / "x", copy_to_host([torch.ones(9)], {}))
        data = bytearray((tmp_path / "x").read_bytes())
        data[-1] ^= 1
        (tmp_path / "x").write_bytes(data)
        with pytest.raises(CheckpointError, match=r"x is damaged"):
            read_state(StoredFolder(Place(str(tmp_path)), {"x": file}), "x", {})

    def test_a_name_that_is_not_there(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match=r"has no rank-1.safetensors: .* another layout"):
            read_state(StoredFolder(Place(str(tmp_path)), {}), "rank-1.safetensors", {})


PICKLES = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_nothing_in_the_package_pickles(path: Path) -> None:
    assert pickling(path.read_text()) == []


def pickling(source: str) -> list[str]:
    """Imports of modules that pickle, and calls of torch's and numpy's functions that do.

    torch.load(..., weights_only=True) makes tensors alone: how transformers reads a user's .bin files too.
    """
    found, nodes = [], list(ast.walk(ast.parse(source)))
    tensors_alone = [
        node.func
        for node in nodes
        if isinstance(node, ast.Call)
        and any(k.arg == "weights_only" and getattr(k.value, "value", None) is True for k in node.keywords)
    ]
    for node in nodes:
        if node in tensors_alone:
            continue
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.partition(".")[0] in PICKLES]
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] in PICKLES:
            found.append(str(node.module))
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if (node.value.id, node.attr) in {("torch", "load"), ("torch", "save")}:
                found.append(f"{node.value.id}.{node.attr}")
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append("allow_pickle")
    return found


@pytest.mark.parametrize(
    "source", ["import pickle", "from pickle import load", "torch.load(f)", "torch.save(x, f)", "f(allow_pickle=True)"]
)
def test_what_pickles_is_found(source: str) -> None:
    assert len(pickling(source)) == 1
    assert pickling("torch.load(f, weights_only=True)") == []
