"""The trainer's half of a weight transfer, without an engine."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from rlaif_ray.rollout.weight_transfer import ShmSender, additive_checksum, layer_groups

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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_checksum_by_hand(dtype: torch.dtype) -> None:
    one = {torch.float32: 0x3F800000, torch.bfloat16: 0x3F80}[dtype]
    assert additive_checksum([torch.ones(3, dtype=dtype)]) == 3 * one  # an odd count is summed by element


def test_checksum_is_additive_and_sees_one_bit() -> None:
    torch.manual_seed(0)
    q, k = torch.randn(4, 8), torch.randn(2, 8)
    assert additive_checksum([q, k]) == additive_checksum([torch.cat([q, k])])
    changed = q.clone()
    changed.view(torch.int32)[1, 3] ^= 1
    assert additive_checksum([changed]) != additive_checksum([q])


def test_segment_is_reused_and_holds_one_bucket(tmp_path: Path) -> None:
    sender = ShmSender(tmp_path / "segment")
    large, small = torch.arange(1000.0), torch.arange(7, dtype=torch.bfloat16)
    first = sender.stage(["a", "b"], [large.view(10, 100), small])
    assert first["shapes"] == [[10, 100], [7]]
    assert first["dtype_names"] == ["float32", "bfloat16"]
    size = (tmp_path / "segment").stat().st_size
    assert size == 4032 + 64  # 4000 and 14 bytes, each rounded up to 64
    raw = torch.from_file(str(tmp_path / "segment"), shared=True, size=size, dtype=torch.uint8)
    for tensor, offset in zip((large, small), first["offsets"], strict=True):
        count = tensor.numel() * tensor.element_size()
        assert torch.equal(raw[offset : offset + count].view(tensor.dtype), tensor)
    sender.stage(["c"], [small])
    assert (tmp_path / "segment").stat().st_size == size
    sender.close()
    assert not (tmp_path / "segment").exists()
