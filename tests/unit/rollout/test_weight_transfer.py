"""The trainer's half of a weight transfer, without an engine."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlaif_ray.learner.model_state import layer_groups
from rlaif_ray.rollout.buckets import lay_out
from rlaif_ray.rollout.weight_transfer import ENGINES, ShmSlot, register

NAMES = [
    "model.embed_tokens.weight",
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.0.mlp.experts.7.w1",
    "model.layers.1.self_attn.q_proj.weight",
    "model.layers.10.self_attn.q_proj.weight",
    "model.norm.weight",
    "lm_head.weight",
]


def test_groups_are_layers_in_order() -> None:
    assert layer_groups(NAMES) == [NAMES[:1], NAMES[1:3], NAMES[3:4], NAMES[4:5], NAMES[5:]]
    assert layer_groups([]) == []


@pytest.mark.engine
def test_groups_are_vllms() -> None:
    base = pytest.importorskip("vllm.distributed.weight_transfer.base")
    assert layer_groups(NAMES) == base.layerwise_groups(NAMES)


@pytest.mark.engine
def test_vllm_finds_an_engine_of_ours_for_every_transport() -> None:
    """Each says what it received; where vLLM has one for the transport, ours is one of those."""
    factory = pytest.importorskip("vllm.distributed.weight_transfer.factory").WeightTransferEngineFactory
    from vllm.distributed.weight_transfer import ipc_engine, nccl_engine

    register()
    register()  # once is enough
    found = {transport: factory._registry[name]() for transport, (name, *_) in ENGINES.items()}
    assert all(hasattr(engine, "received_checksum") for engine in found.values())
    assert issubclass(found["ipc"], ipc_engine.IPCWeightTransferEngine)
    assert issubclass(found["nccl"], nccl_engine.NCCLWeightTransferEngine)


def test_segment_is_reused_and_holds_one_bucket() -> None:
    slot = ShmSlot()
    large, small = torch.arange(1000.0), torch.arange(7, dtype=torch.bfloat16)
    offsets, size = lay_out([4000, 14])
    path = Path(slot.reserve(size))
    slot.stage([large.view(10, 100), small])
    assert path.stat().st_size == size == 4032 + 64  # each rounded up to 64
    raw = torch.from_file(str(path), shared=True, size=size, dtype=torch.uint8)
    for tensor, offset in zip((large, small), offsets, strict=True):
        count = tensor.numel() * tensor.element_size()
        assert torch.equal(raw[offset : offset + count].view(tensor.dtype), tensor)
    assert slot.reserve(64) == str(path)
    slot.stage([small])
    assert path.stat().st_size == size
    slot.close()
    assert not path.exists()


def test_a_larger_bucket_gets_a_segment_of_its_own_and_old_mappings_stay() -> None:
    slot = ShmSlot()
    first = slot.reserve(64)
    slot.stage([torch.ones(16)])
    before = Path(first).stat()
    mapped = torch.from_file(first, shared=True, size=before.st_size, dtype=torch.uint8)
    assert Path(slot.reserve(256)).stat().st_ino != before.st_ino
    slot.stage([torch.full((64,), 2.0)])
    assert torch.equal(mapped.view(torch.float32), torch.ones(16))


@pytest.mark.engine
def test_an_engine_maps_each_slot_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The learner's two slots come by turns. One that was replaced by a larger one is let go."""
    pytest.importorskip("vllm.distributed.weight_transfer.base")
    from rlaif_ray.rollout.shm_engine import ShmWeightTransferEngine

    engine = object.__new__(ShmWeightTransferEngine)
    engine._mapped = {}
    slots = [ShmSlot(), ShmSlot()]
    paths = [slot.reserve(64) for slot in slots]
    made = []
    from_file = torch.from_file
    monkeypatch.setattr(torch, "from_file", lambda path, **how: made.append(path) or from_file(path, **how))
    addresses = {path: engine._segment(path).data_ptr() for path in paths}
    for _ in range(3):
        assert [engine._segment(path).data_ptr() for path in paths] == list(addresses.values())
    assert made == paths
    larger = slots[0].reserve(256)
    made.clear()
    assert engine._segment(larger).numel() == 256 and made == [larger]
    assert engine._mapped.keys() == {larger, paths[1]}


def test_a_killed_sender_leaves_no_memory(tmp_path: Path) -> None:
    """A segment that outlives its run is memory that nobody gets back before the machine restarts."""
    script = (
        "import torch, time\n"
        "from rlaif_ray.rollout.weight_transfer import ShmSlot\n"
        "s = ShmSlot()\n"
        "path = s.reserve(4032)\n"
        "s.stage([torch.ones(1000)])\n"
        "print(path, flush=True)\n"
        "time.sleep(60)\n"
    )
    named = set(Path("/dev/shm").iterdir())
    with subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        path = Path(process.stdout.readline().strip())
        assert path.exists() and set(Path("/dev/shm").iterdir()) == named
        process.kill()
        process.wait()
    assert not path.exists()
