"""vLLM's own IPC and NCCL engines, as ours extend them, on CPU tensors: the calls that need a GPU are stood in for, in
the order and with the arguments in which vLLM makes them. What a worker received shows in its checksum, whatever part
of it the worker keeps.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("vllm")

from torch.multiprocessing.reductions import rebuild_cuda_tensor
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer import ipc_engine
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory
from vllm.model_executor.model_loader.reload import record_metadata_for_reloading
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from rlaif_ray.errors import EngineError, StaleWeightsError
from rlaif_ray.rollout.checksum import MODULUS, checksum
from rlaif_ray.rollout.ipc import arguments_of
from rlaif_ray.rollout.vllm_engine import EngineSpec, VllmEngine
from rlaif_ray.rollout.weight_transfer import ENGINES, register
from rlaif_ray.rollout.worker_extension import WorkerExtension
from rlaif_ray.runtime.weight_sync import differs
from tests.unit.rollout import test_reload
from tests.unit.rollout.test_reload import CONFIG, Leaf, new

GPUS = 2
CALLS: list[str] = []  # what vLLM asked of the device


class Model(nn.Module):
    """One worker's part of a model: half the rows of an embedding, which is padded, and of a projection; a norm."""

    def __init__(self, rank: int, workers: int) -> None:
        super().__init__()
        self.embed = Leaf(processed=True, weight=8 // workers)  # of 6 rows, padded to 8
        self.proj = Leaf(processed=True, weight=4 // workers)
        self.norm = Leaf(weight=4)

        def load_rows(param: Tensor, loaded_weight: Tensor) -> None:
            own = loaded_weight[rank * len(param) : (rank + 1) * len(param)]
            param.data[: len(own)].copy_(own)

        for leaf in (self.embed, self.proj):
            leaf.weight.weight_loader = load_rows  # type: ignore[assignment, unused-ignore]
        record_metadata_for_reloading(self)

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        parameters: dict[str, Any] = dict(self.named_parameters())
        loaded = set()
        for name, tensor in weights:
            getattr(parameters[name], "weight_loader", default_weight_loader)(parameters[name], tensor)
            loaded.add(name)
        return loaded


WEIGHTS = [
    ("embed.weight", torch.tensor([1.5, -2.0, 3.0, 4.0, -5.0, 6.0])),
    ("proj.weight", torch.tensor([0.0, 0.5, -0.5, 7.0])),
    ("norm.weight", torch.tensor([9.0, 8.0, 7.0, -6.0])),
]
SENT = checksum([name for name, _ in WEIGHTS], [tensor for _, tensor in WEIGHTS])


class Gpu:
    """Memory that processes share: what a learner rank exported, by handle."""

    def __init__(self) -> None:
        self.exported: dict[bytes, Tensor] = {}

    def export(self, tensor: Tensor) -> dict[str, Any]:
        """The handle of a tensor on a GPU, as rollout/ipc.py tells it."""
        handle = f"{len(self.exported)}".encode()
        self.exported[handle] = tensor
        return {
            "tensor_size": list(tensor.size()),
            "tensor_stride": list(tensor.stride()),
            "tensor_offset": tensor.storage_offset(),
            "dtype": str(tensor.dtype).removeprefix("torch."),
            "storage_device": 99,  # the sender's index of the GPU
            "storage_handle": handle,
            "storage_size_bytes": tensor.untyped_storage().nbytes(),
            "storage_offset_bytes": 0,
            "requires_grad": False,
            "ref_counter_handle": b"counter",
            "ref_counter_offset": 0,
            "event_handle": b"event",
            "event_sync_required": False,
        }

    def rebuild(self, *args: Any) -> Tensor:
        CALLS.append(f"open {args[7].decode()} on {args[6]}")
        return torch.as_strided(self.exported[args[7]], args[1], args[2], args[3])


def describe(names: list[str], tensors: list[Tensor]) -> dict[str, Any]:
    """The part of an update message that both transports share."""
    dtypes = [str(tensor.dtype).removeprefix("torch.") for tensor in tensors]
    return {"names": names, "dtype_names": dtypes, "shapes": [list(tensor.shape) for tensor in tensors]}


def merged(messages: list[dict[str, Any]]) -> dict[str, Any]:
    """One message with the handles of every rank: a worker takes those of its own GPU."""
    each = zip(*(message["ipc_handles"] for message in messages), strict=True)  # by tensor
    return {**messages[0], "ipc_handles": [{k: v for one in ranks for k, v in one.items()} for ranks in each]}


class Group:
    """A communicator of one worker: what rank 0 broadcasts comes out, in order."""

    def __init__(self) -> None:
        self.queue: list[Tensor] = []

    def broadcast(self, tensor: Tensor, src: int, stream: Any) -> None:
        CALLS.append(f"broadcast {tuple(tensor.shape)} from {src} on {stream}")
        tensor.copy_(self.queue.pop(0))

    def destroy(self) -> None: ...


class Worker(WorkerExtension):
    def __init__(self, engine: Any) -> None:
        self.weight_transfer_engine = engine


class Llm:
    """Of vLLM's `LLM`: every message goes to every worker."""

    def __init__(self, engines: list[Any]) -> None:
        self.engines, self.workers = engines, [Worker(engine) for engine in engines]

    def init_weight_transfer_engine(self, request: dict[str, Any]) -> None:
        for engine in self.engines:
            engine.init_transfer_engine(engine.parse_init_info(request["init_info"]))

    def start_weight_update(self) -> None:
        for engine in self.engines:
            engine.start_weight_update()

    def update_weights(self, request: dict[str, Any]) -> None:
        for engine in self.engines:
            engine.update_weights(request["update_info"])

    def finish_weight_update(self) -> None:
        for engine in self.engines:
            engine.finish_weight_update()

    def reset_prefix_cache(self) -> None: ...

    def collective_rpc(self, name: str, args: tuple[Any, ...] = ()) -> list[Any]:
        return [getattr(worker, name)(*args) for worker in self.workers]


class Pushed:
    """An engine of `workers` GPUs, and both ends of its transport."""

    def __init__(
        self, transport: str, workers: int, monkeypatch: pytest.MonkeyPatch, kind: Callable[[], Any] | None = None
    ) -> None:
        register()
        CALLS.clear()
        self.transport, self.workers, self.gpus = transport, workers, [Gpu() for _ in range(workers)]
        self.models: list[Any] = [Model(rank, workers) if kind is None else kind() for rank in range(workers)]
        config = WeightTransferConfig(backend=ENGINES[transport][0])
        vllm_config: Any = SimpleNamespace(parallel_config=None, model_config=CONFIG)
        self.engines = [
            WeightTransferEngineFactory.create_engine(config, vllm_config, torch.device("cuda", k), model)
            for k, model in enumerate(self.models)
        ]
        spec = EngineSpec("m", None, False, "float32", "cuda", 64, workers, 0.4, 1.0, 0, 1, transport)
        made: Any = VllmEngine.__new__(VllmEngine)
        made._llm, made._spec, made._broken, made._asleep, made.busy_since = Llm(self.engines), spec, None, set(), None
        self.engine: VllmEngine = made
        self._stand_in(monkeypatch)
        if transport == "ipc":
            self.engine.init_transfer({})
        else:
            for engine in self.engines:  # as its init would, by meeting the learner
                engine.device, engine.model_update_group = torch.device("cpu"), Group()

    def _stand_in(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """For CUDA: each worker sees its own GPU, by its index."""
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: SimpleNamespace(uuid=f"GPU-{index}"))
        monkeypatch.setattr(torch.cuda, "current_stream", lambda: "current stream")
        monkeypatch.setattr(torch.accelerator, "synchronize", lambda: CALLS.append("synchronize"))
        rebuild = lambda *args: self.gpus[args[6]].rebuild(*args)  # noqa: E731
        monkeypatch.setattr(ipc_engine, "rebuild_cuda_tensor", rebuild)

    def send(self, weights: list[tuple[str, Tensor]], *, spoil: Callable[[Tensor], None] | None = None) -> None:
        """One bucket, as a learner sends it; `spoil` damages its last tensor on the way to the last worker."""
        names, tensors = [name for name, _ in weights], [tensor for _, tensor in weights]
        if self.transport == "nccl":
            for rank, engine in enumerate(self.engines):
                copies = [tensor.clone() for tensor in tensors]
                if spoil is not None and rank == self.workers - 1:
                    spoil(copies[-1])
                engine.model_update_group.queue += copies
            self.engine.update(describe(names, tensors))
            return
        messages = []
        for rank, gpu in enumerate(self.gpus):
            staged = [tensor.clone() for tensor in tensors]
            if spoil is not None and rank == self.workers - 1:
                spoil(staged[-1])
            handles = [{f"GPU-{rank}": gpu.export(tensor)} for tensor in staged]
            messages.append({**describe(names, staged), "ipc_handles": handles})
        self.engine.update(merged(messages))
        for gpu in self.gpus:  # the learner fills its slots with the next bucket
            for tensor in gpu.exported.values():
                tensor.fill_(-3.0)


@pytest.fixture(params=["ipc", "nccl"])
def transport(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def whole(pushed: Pushed, name: str, rows: int) -> list[float]:
    parts = [dict(model.named_parameters())[name] for model in pushed.models]
    return torch.cat(parts).tolist()[:rows] if name != "norm.weight" else parts[-1].tolist()


@pytest.mark.parametrize("workers", [1, GPUS])
@pytest.mark.parametrize("buckets", [1, 3])
def test_every_worker_says_what_the_learner_sent(
    transport: str, workers: int, buckets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = Pushed(transport, workers, monkeypatch)
    for _ in range(2):  # an update begins at nothing
        pushed.engine.start_update()
        for k in range(buckets):
            pushed.send(WEIGHTS[k::buckets])
        found = pushed.engine.finish_update(1)
        assert found == [SENT] * workers and not differs(found, SENT)
    # What a worker holds is its part, and the padded embedding is whole though it waited while memory was used again.
    for name, tensor in WEIGHTS:
        assert whole(pushed, name, len(tensor)) == tensor.tolist(), name
    assert all("load_weights" not in vars(model) for model in pushed.models)  # as it was


def test_the_calls_are_vllms(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = Pushed(transport, 1, monkeypatch)
    pushed.engine.start_update()
    pushed.send(WEIGHTS[:2])
    opened = {
        "ipc": ["open 0 on 0", "open 1 on 0", "synchronize"],
        "nccl": ["broadcast (6,) from 0 on current stream", "broadcast (4,) from 0 on current stream", "synchronize"],
    }
    assert opened[transport] == CALLS
    # The double's handle gives exactly the arguments that torch's own function takes, in its order.
    arguments = arguments_of(Gpu().export(torch.zeros(1)))
    bound = inspect.signature(rebuild_cuda_tensor).bind(*arguments).arguments
    assert bound["storage_device"] == 99 and bound["storage_handle"] == b"0" and bound["dtype"] == torch.float32


def flip_one_bit(tensor: Tensor) -> None:
    tensor.view(torch.uint8)[-1] ^= 0x80  # a sign


@pytest.mark.parametrize("workers", [1, GPUS])
def test_a_corrupted_byte_shows_for_the_worker_that_has_it(
    transport: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = Pushed(transport, workers, monkeypatch)
    pushed.engine.start_update()
    pushed.send(WEIGHTS[:1])
    pushed.send(WEIGHTS[1:], spoil=flip_one_bit)
    found = pushed.engine.finish_update(1)
    assert found[:-1] == [SENT] * (workers - 1) and found[-1] != SENT
    assert differs(found, SENT)


@pytest.mark.parametrize("twice", range(3))
def test_a_bucket_that_comes_twice_shows(transport: str, twice: int, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = Pushed(transport, 1, monkeypatch)
    pushed.engine.start_update()
    for k, pair in enumerate(WEIGHTS):
        for _ in range(2 if k == twice else 1):
            pushed.send([pair])
    found = pushed.engine.finish_update(1)
    name, tensor = WEIGHTS[twice]
    assert found == [(SENT + checksum([name], [tensor])) % MODULUS]
    assert differs(found, SENT)


@pytest.mark.parametrize("missing", range(3))
def test_a_missing_tensor_shows(transport: str, missing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the sum, and by vLLM's account of what was loaded."""
    pushed = Pushed(transport, GPUS, monkeypatch)
    pushed.engine.start_update()
    name, tensor = WEIGHTS[missing]
    for pair in WEIGHTS:
        if pair[0] != name:
            pushed.send([pair])
    sums = pushed.engine._llm.collective_rpc("received_checksum")
    assert differs(sums, SENT) and sums == [(SENT - checksum([name], [tensor])) % MODULUS] * GPUS
    with pytest.raises(StaleWeightsError, match=rf"m did not take 1 of .*first {name}"):
        pushed.engine.finish_update(1)


def test_tensors_in_another_order_than_named_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two of one shape: NCCL would not notice."""
    pushed = Pushed("nccl", 1, monkeypatch)
    pushed.engine.start_update()
    pushed.send(WEIGHTS[:1])
    exchanged = [("proj.weight", WEIGHTS[2][1]), ("norm.weight", WEIGHTS[1][1])]
    pushed.send(exchanged)
    assert differs(pushed.engine.finish_update(1), SENT)


def test_an_engine_that_tells_no_checksum_is_not_verified() -> None:
    assert differs([], 0) and differs([], SENT) and not differs([SENT], SENT)


def test_an_update_of_nothing_is_none(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = Pushed(transport, 1, monkeypatch)
    pushed.engine.start_update()
    assert pushed.engine.finish_update(1) == [0]
    assert set(pushed.models[0].norm.weight.tolist()) == {1.0}


def test_a_message_that_fails_leaves_the_model_as_it_was(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed = Pushed(transport, 1, monkeypatch)
    pushed.engine.start_update()
    with pytest.raises(EngineError, match=r"failed to load weights: KeyError: 'unknown\.weight'"):
        pushed.send([("unknown.weight", torch.ones(2))])
    assert "load_weights" not in vars(pushed.models[0])


class Tied(test_reload.Model):
    """Everything goes through weight loaders; a head that shares its weight with the projection is not sent."""

    def _make(self) -> None:
        super()._make()
        del self.attn
        self.head = Leaf(processed=True, weight=6)
        self.head.weight = self.proj.weight
        record_metadata_for_reloading(self)


@pytest.mark.parametrize("workers", [1, GPUS])
def test_a_worker_tells_what_an_update_has_not_reached(
    transport: str, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = Pushed(transport, workers, monkeypatch, Tied)
    weights = new(pushed.models[0])
    pushed.engine.start_update()
    pushed.send(weights)
    assert len(pushed.engine.finish_update(1)) == workers  # the head is not missing
    pushed.engine.start_update()
    pushed.send([pair for pair in weights if pair[0] != "norm.weight"])
    with pytest.raises(StaleWeightsError, match=r"m did not take 1 of .*first norm\.weight"):
        pushed.engine.finish_update(2)
    assert pushed.engine._llm.collective_rpc("not_loaded") == [[]] * workers  # outside of an update nothing is


def test_what_a_models_own_loader_copies_is_lost_and_noticed(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """GPT-OSS's sinks: on GPUs too they go to the meta device, and vLLM puts the old ones back."""
    pushed = Pushed(transport, 1, monkeypatch, test_reload.Model)
    weights = new(pushed.models[0])
    pushed.engine.start_update()
    pushed.send(weights)
    with pytest.raises(StaleWeightsError, match=r"first attn\.sinks"):
        pushed.engine.finish_update(1)
    assert set(pushed.models[0].attn.sinks.tolist()) == {1.0}


class Decays(test_reload.Model):
    """As vLLM's linear attention: A is -exp(A_log), and in fp32 where the others are not (mamba_mixer2.py)."""

    def _make(self) -> None:
        super()._make()
        del self.attn
        self.mixer = Leaf(A=4)

        def load(param: Tensor, loaded_weight: Tensor) -> None:
            param.data.copy_(-torch.exp(loaded_weight.float()))

        self.mixer.A.weight_loader = load  # type: ignore[assignment, unused-ignore]
        for leaf in (self.proj, self.norm):
            leaf.to(torch.bfloat16)
        record_metadata_for_reloading(self)


def test_weights_that_vllm_keeps_in_another_form_are_compared_too(
    transport: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pushed = Pushed(transport, 1, monkeypatch, Decays)
    weights = [(name, tensor.to(torch.bfloat16)) for name, tensor in new(pushed.models[0], value=0.5)]
    sent = checksum([name for name, _ in weights], [tensor for _, tensor in weights])
    pushed.engine.start_update()
    pushed.send(weights)
    assert pushed.engine.finish_update(1) == [sent]
    assert pushed.models[0].mixer.A.tolist() == pytest.approx([-1.6487212707] * 4)  # -exp(0.5)
