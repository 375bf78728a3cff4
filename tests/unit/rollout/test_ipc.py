"""CUDA IPC without a GPU: what is exported is freed with the push, whoever opened it, and vLLM finds each tensor in it.

torch counts, for every export, who has yet to open it, in memory that both processes share; a block whose count isn't
back to zero when its owner drops it is never freed. The double of that count is here; the arguments that travel, how
they are rebuilt and vLLM's engine are the real ones.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing import reductions

from rlaif_ray.rollout import ipc, weight_transfer
from rlaif_ray.rollout.board import Source
from rlaif_ray.rollout.buckets import largest
from rlaif_ray.rollout.receiving import update_messages
from rlaif_ray.rollout.sending import Staging, send_all
from rlaif_ray.rollout.weight_transfer import IpcSlot
from rlaif_ray.runtime.actors import LearnerActor
from tests.unit.rollout.test_sending import BUCKETS, STATE, Weights

UUID, WAIT_S = "GPU-a", 20.0


class Exports:
    """torch's count of each export, and the memory that its handle stands for."""

    def __init__(self) -> None:
        self.made = 0
        self.blocks: dict[bytes, Any] = {}  # by handle
        self.counts: dict[int, int] = {}  # yet to be opened, by offset of the counter

    def export(self, block: Tensor) -> tuple[Any, tuple[Any, ...]]:
        """`reduce_tensor` of a CUDA tensor."""
        self.made += 1
        handle, number = f"handle {self.made}".encode(), self.made
        self.blocks[handle] = block.untyped_storage()
        self.counts[number] = 1
        size = block.numel()
        event = (b"event", True)
        place = (Storage, block.dtype, 0, handle, size, 0, False, b"counters", number, *event)
        return reductions.rebuild_cuda_tensor, (torch.Tensor, block.size(), block.stride(), 0, *place)

    def never_freed(self) -> int:
        return sum(count > 0 for count in self.counts.values())


class Storage:
    """Of torch's storage class: what `rebuild_cuda_tensor` calls."""

    exports: Exports

    @classmethod
    def _new_shared_cuda(cls, device: int, handle: bytes, *rest: Any) -> Any:
        cls.exports.counts[rest[3]] -= 1  # opened; torch takes it back when the storage goes
        return cls.exports.blocks[handle]

    @classmethod
    def _new_with_weak_ptr(cls, pointer: Any) -> Any:
        return None

    @classmethod
    def _release_ipc_counter(cls, handle: bytes, number: int, device: int) -> None:
        cls.exports.counts[number] -= 1


@pytest.fixture
def exports(monkeypatch: pytest.MonkeyPatch) -> Iterator[Exports]:
    exports = Storage.exports = Exports()
    monkeypatch.setattr(reductions, "reduce_tensor", exports.export)
    monkeypatch.setattr(ipc, "storage_class", lambda: Storage)
    monkeypatch.setattr(reductions, "shared_cache", {})
    monkeypatch.setattr(reductions, "StorageWeakRef", lambda storage: None)
    monkeypatch.setattr(torch.cuda, "_lazy_init", lambda: None)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: SimpleNamespace(uuid=UUID))
    monkeypatch.setattr(weight_transfer, "own_device", lambda: torch.device("cpu"))
    monkeypatch.setattr(weight_transfer, "synchronize", lambda: None)
    yield exports


def rebuilt(message: dict[str, Any]) -> dict[str, Tensor]:
    """As vLLM's worker does it."""
    found = {}
    for name, handles in zip(message["names"], message["ipc_handles"], strict=True):
        arguments = list(ipc.arguments_of(handles[UUID]))
        arguments[6] = 0
        found[name] = reductions.rebuild_cuda_tensor(*arguments).clone()  # type: ignore[no-untyped-call]
    return found


def take(sources: tuple[Source, ...], *, buckets: int | None = None) -> dict[str, Tensor]:
    """An engine that reads so many buckets and then dies; None: all."""
    found: dict[str, Tensor] = {}
    with closing(update_messages(BUCKETS, sources)) as messages:
        for number, message in enumerate(messages):
            if number == buckets:
                break
            found |= rebuilt(message)
    return found


def push(sender: Staging, engines: int, *, lost: int = 0) -> list[dict[str, Tensor]]:
    """What each engine that lives took; `lost` others end after one bucket."""
    sources = sender.offer(largest(BUCKETS), engines)
    with ThreadPoolExecutor(max(1, engines)) as pool:
        ends = [1 if source.reader < lost else None for source in sources]
        reading = [pool.submit(take, (source,), buckets=end) for source, end in zip(sources, ends, strict=True)]
        send_all(Weights(), BUCKETS, sender, counted=True)
        return [one.result(WAIT_S) for one in reading[lost:]]


def test_tensors_are_places_in_one_export_a_slot(exports: Exports) -> None:
    sender = Staging([IpcSlot(), IpcSlot()])
    (found,) = push(sender, 1)
    assert found.keys() == STATE.keys()
    for name, tensor in STATE.items():
        assert torch.equal(found[name], tensor) and found[name].stride() == tensor.stride()
        assert found[name].dtype == tensor.dtype
    assert exports.made == 2


@pytest.mark.parametrize("lost", [0, 1, 2])
def test_ten_pushes_leave_nothing_that_is_never_freed(exports: Exports, lost: int) -> None:
    """With both engines, with one that is lost on the way each time, with both lost."""
    slots = [IpcSlot(), IpcSlot()]
    sender = Staging(slots)
    for number in range(1, 11):
        push(sender, 2, lost=lost)
        assert exports.made == 2 * number  # two slots a push, however many buckets and engines
        assert exports.never_freed() == 0 and all(slot._block is None for slot in slots)


@pytest.mark.parametrize("shares_gpu", [True, False])
@pytest.mark.parametrize("fails", [False, True])
def test_a_shared_gpu_has_its_memory_back_when_a_push_is_over(
    exports: Exports, monkeypatch: pytest.MonkeyPatch, shares_gpu: bool, fails: bool
) -> None:
    """Also one that failed: engines wake with their KV cache next, and torch would keep slots and gathered weights."""
    slots = [IpcSlot(), IpcSlot()]
    held: list[list[bool]] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: held.append([slot._block is not None for slot in slots]))

    class Failing(Weights):
        def gathered(self, names: Sequence[str]) -> Any:
            if fails and names[0] == "layers.1.w":
                raise MemoryError("out of memory")
            return super().gathered(names)

    actor: Any = object.__new__(LearnerActor)
    actor._learner, actor._rank, actor._sender = SimpleNamespace(weights=Failing()), 0, Staging(slots)
    actor._shares_gpu = shares_gpu
    (source,) = actor._sender.offer(largest(BUCKETS), 1)
    actor.leave_out(source)
    if fails:
        with pytest.raises(MemoryError):
            actor.send_all(BUCKETS)
    else:
        assert actor.send_all(BUCKETS).checksum != 0
    assert held == ([[False, False]] if shares_gpu else [])


def test_a_rank_without_an_engine_on_its_gpu_exports_nothing(exports: Exports) -> None:
    sender, weights = Staging([IpcSlot(), IpcSlot()]), Weights()
    for _ in range(10):
        assert sender.offer(largest(BUCKETS), 0) == []
        send_all(weights, BUCKETS, sender, counted=False)
    assert exports.made == 0 and weights.told.count("gather embed") == 10  # it still gathers with its peers


def test_an_engine_that_never_opens_anything_leaves_nothing(exports: Exports) -> None:
    sender = Staging([IpcSlot(), IpcSlot()])
    (source,) = sender.offer(largest(BUCKETS), 1)
    sender.leave_out(source)  # it was lost before it began
    send_all(Weights(), BUCKETS, sender, counted=False)
    assert exports.made == 2 and exports.never_freed() == 0


def test_the_handles_arguments_are_torchs() -> None:
    """By these names a tensor's place is put into its block's handle."""
    import inspect

    names = list(inspect.signature(reductions.rebuild_cuda_tensor).parameters)
    assert names[:4] == ["tensor_cls", "tensor_size", "tensor_stride", "tensor_offset"]
    assert names[6] == "storage_device"  # where vLLM puts its own
    assert {"storage_cls", "dtype", "requires_grad", "ref_counter_handle", "ref_counter_offset"} <= set(names)
    assert callable(torch.storage.TypedStorage._release_ipc_counter)
    assert type(torch.empty(1)._typed_storage()) is torch.storage.TypedStorage  # by which torch exports


def test_a_handle_tells_all_that_torch_needs(exports: Exports) -> None:
    """A block's own arguments come back, and a tensor's differ by its place alone."""
    block = torch.zeros(64, dtype=torch.uint8)
    _, handle = ipc.export(block)
    (_, arguments) = exports.export(block)
    back = ipc.arguments_of(ipc.handle_of(handle, "uint8", (64,), 0))
    places = [k for k, value in enumerate(arguments) if back[k] != value]
    assert [arguments[k] for k in places] == [b"handle 2", 2]  # of the second export
    part = ipc.arguments_of(ipc.handle_of(handle, "bfloat16", (2, 3), 16))
    assert part[:6] == (torch.Tensor, torch.Size([2, 3]), (3, 1), 8, Storage, torch.bfloat16)
    assert part[6:] == back[6:]


def through_msgpack(message: dict[str, Any]) -> dict[str, Any]:
    """As vLLM brings it to an engine core in a process of its own, tensor-parallel or not."""
    from vllm.v1.serial_utils import MsgpackDecoder, MsgpackEncoder

    call: tuple[Any, ...] = (0, 1, "collective_rpc", ["update_weights", None, [], {"update_info": message}])
    arrived = MsgpackDecoder().decode(MsgpackEncoder().encode(call))
    update_info: dict[str, Any] = arrived[3][3]["update_info"]
    return update_info


@pytest.mark.engine
def test_vllms_engine_takes_them(exports: Exports, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its real receiver, with a model that keeps what it is given. Ranks of two GPUs: it takes that of its own."""
    pytest.importorskip("vllm.distributed.weight_transfer.ipc_engine")
    pytest.importorskip("vllm.model_executor.model_loader.mtp_validation")  # it imports that on the way
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: None)
    found: dict[str, Tensor] = {}
    from rlaif_ray.rollout.gpu_engines import IpcEngine, Received

    class Model(torch.nn.Module):
        def load_weights(self, weights: Any) -> None:
            found.update((name, tensor.clone()) for name, tensor in weights)

    engine: Any = object.__new__(IpcEngine)
    engine.packed, engine.device, engine._received = False, torch.device("cuda", 0), Received()
    engine.model = Model()
    senders = [Staging([IpcSlot(), IpcSlot()]) for _ in range(2)]
    sources = []
    for number, sender in enumerate(senders):
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda d, n=number: SimpleNamespace(uuid=f"GPU-{n}"))
        sources += sender.offer(largest(BUCKETS), 1)

    def receive() -> None:
        for message in update_messages(BUCKETS, tuple(sources)):
            assert message["ipc_handles"][0].keys() == {"GPU-0", "GPU-1"}
            engine.update_weights(through_msgpack(message))

    with ThreadPoolExecutor(3) as pool:
        sending = [pool.submit(send_all, Weights(), BUCKETS, sender, counted=False) for sender in senders]
        pool.submit(receive).result(WAIT_S)
        for one in sending:
            one.result(WAIT_S)
    assert all(torch.equal(found[name], tensor) for name, tensor in STATE.items()) and found.keys() == STATE.keys()
    assert exports.never_freed() == 0
