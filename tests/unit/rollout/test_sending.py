"""Both halves of a push, without an engine: what the learner's ranks send bucket by bucket is what engines are told."""

from __future__ import annotations

import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlaif_ray.errors import EngineError, RunError
from rlaif_ray.rollout import nccl
from rlaif_ray.rollout.board import Board, Reading, Source
from rlaif_ray.rollout.buckets import Bucket, largest, lay_out, make_buckets
from rlaif_ray.rollout.nccl import Gate, GivenUpError, HeldPort, NcclSender, is_disabled, pass_gate
from rlaif_ray.rollout.receiving import update_messages
from rlaif_ray.rollout.sending import Sent, Staging, send_all
from rlaif_ray.rollout.weight_transfer import ShmSlot

WAIT_S = 20.0

STATE = {
    "embed": torch.arange(12.0).view(3, 4),
    "layers.0.w": torch.arange(7, dtype=torch.bfloat16),
    "layers.1.w": torch.full((5,), 2.5),
    "layers.2.w": torch.tensor(3.0),
    "head": torch.arange(6, dtype=torch.int64).view(2, 3),
}
METADATA = [(name, str(t.dtype).removeprefix("torch."), tuple(t.shape)) for name, t in STATE.items()]
BUCKETS = make_buckets([[name] for name in STATE], METADATA, 0)  # each tensor by itself


class Weights:
    """A model whose buckets come one by one; tells the order of what happens."""

    def __init__(self, told: list[str] | None = None) -> None:
        self.told = [] if told is None else told

    @contextmanager
    def gathered(self, names: Sequence[str]) -> Iterator[list[Tensor]]:
        with torch.no_grad():
            self.told.append(f"gather {names[0]}")
            yield [STATE[name].clone() for name in names]
            self.told.append(f"free {names[0]}")


def read_all(sources: tuple[Source, ...], buckets: Sequence[Bucket] = BUCKETS) -> dict[str, Tensor]:
    """What an engine loads by shared memory, copied out before it says that it has it."""
    found = {}
    with closing(update_messages(buckets, sources)) as messages:
        for message in messages:
            segment = torch.from_file(message["path"], shared=True, size=largest(buckets), dtype=torch.uint8)
            for name, dtype_name, shape, offset in zip(
                message["names"], message["dtype_names"], message["shapes"], message["offsets"], strict=True
            ):
                dtype = getattr(torch, dtype_name)
                count = dtype.itemsize * torch.Size(shape).numel()
                found[name] = segment[offset : offset + count].view(dtype).view(shape).clone()
    return found


def same(found: dict[str, Tensor]) -> bool:
    return found.keys() == STATE.keys() and all(
        torch.equal(found[name], tensor) and found[name].dtype == tensor.dtype for name, tensor in STATE.items()
    )


def test_layout_by_hand() -> None:
    assert lay_out([4000, 14, 64, 0, 1]) == ((0, 4032, 4096, 4160, 4160), 4224)
    assert [bucket.size for bucket in BUCKETS] == [64, 64, 64, 64, 64] and largest([]) == 0
    together = make_buckets([list(STATE)], METADATA, 2**20)
    assert together[0].offsets == (0, 64, 128, 192, 256) and together[0].size == 320


@pytest.mark.parametrize("readers", [1, 3])
def test_engines_read_what_the_learner_staged(readers: int) -> None:
    sender = Staging([ShmSlot(), ShmSlot()])
    for _ in range(2):  # the slots serve every push
        sources = sender.offer(largest(BUCKETS), readers)
        with ThreadPoolExecutor(readers) as pool:
            reading = [pool.submit(read_all, (source,)) for source in sources]
            send_all(Weights(), BUCKETS, sender, counted=True)
        assert all(same(one.result()) for one in reading)
    sender.close()


def test_a_rank_that_nobody_reads_gathers_and_stages_nothing() -> None:
    slots = [ShmSlot(), ShmSlot()]
    sender, weights = Staging(slots), Weights()
    assert sender.offer(largest(BUCKETS), 0) == []
    with_sender = send_all(weights, BUCKETS, sender, counted=True)
    assert weights.told == [f"{what} {name}" for name in STATE for what in ("gather", "free")]
    assert all(slot._segment is None for slot in slots)
    assert send_all(Weights(), BUCKETS, None, counted=True) == with_sender
    assert send_all(Weights(), BUCKETS, None, counted=False) == Sent(0)


def test_a_slot_waits_for_its_slowest_reader_unless_it_is_lost() -> None:
    sender = Staging([ShmSlot(), ShmSlot()])
    quick, slow = sender.offer(largest(BUCKETS), 2)
    pool = ThreadPoolExecutor(2)
    sending = pool.submit(send_all, Weights(), BUCKETS, sender, counted=True)
    reading = pool.submit(read_all, (quick,))
    stuck = Reading((slow,))
    stuck.wait_staged(2)  # both slots are full, and it has taken neither
    time.sleep(0.05)
    assert stuck_at(slow) == 2 and not sending.done() and not reading.done()
    sender.leave_out(slow)
    assert same(reading.result(WAIT_S))
    sending.result(WAIT_S)
    stuck.close()
    sender.close()


def stuck_at(source: Source) -> int:
    """Buckets staged so far."""
    with open(source.board, "rb") as file:
        return int.from_bytes(file.read()[len(source.token) :][:8], "little", signed=True)


def test_a_reader_that_fails_holds_nobody_up() -> None:
    sender = Staging([ShmSlot(), ShmSlot()])
    quick, failing = sender.offer(largest(BUCKETS), 2)

    def fail() -> None:
        with closing(update_messages(BUCKETS, (failing,))) as messages:
            next(messages)
            raise ValueError("a bucket that can't be loaded")

    with ThreadPoolExecutor(3) as pool:
        sending = pool.submit(send_all, Weights(), BUCKETS, sender, counted=True)
        failed, reading = pool.submit(fail), pool.submit(read_all, (quick,))
        assert same(reading.result(WAIT_S))
        sending.result(WAIT_S)
        with pytest.raises(ValueError, match="can't be loaded"):
            failed.result(WAIT_S)
    sender.close()


def test_readers_of_a_learner_that_fails_are_told() -> None:
    class Failing(Weights):
        def gathered(self, names: Sequence[str]) -> Any:
            if names[0] == "layers.1.w":
                raise MemoryError("out of memory")
            return super().gathered(names)

    sender = Staging([ShmSlot(), ShmSlot()])
    sources = sender.offer(largest(BUCKETS), 1)
    with ThreadPoolExecutor(2) as pool:
        reading = pool.submit(read_all, tuple(sources))
        sending = pool.submit(send_all, Failing(), BUCKETS, sender, counted=True)
        with pytest.raises(EngineError, match="the learner failed in the middle"):
            reading.result(WAIT_S)
        with pytest.raises(MemoryError):
            sending.result(WAIT_S)
    with pytest.raises(EngineError, match="staging memory is gone"):
        Reading(tuple(sources))
    sender.close()


def test_a_path_that_leads_to_another_file_by_now_is_not_written_to(tmp_path: Path) -> None:
    """A closed board's descriptor is given to the next file that its process opens, such as a checkpoint."""
    board = Board(1)
    source = Source(board.path, board.token, 0, ())
    number = int(board.path.rpartition("/")[2])
    board.close()
    content = bytes(range(256))
    (tmp_path / "checkpoint").write_bytes(content)
    with open(tmp_path / "checkpoint", "r+b") as file:
        if file.fileno() != number:
            os.dup2(file.fileno(), number)
        before = len(os.listdir("/proc/self/fd"))
        with pytest.raises(EngineError, match=r"staging memory is gone .* is another file by now"):
            Reading((source,))
        if file.fileno() != number:
            os.close(number)
            before -= 1
        assert len(os.listdir("/proc/self/fd")) == before
    assert (tmp_path / "checkpoint").read_bytes() == content


def test_a_second_board_that_is_gone_leaves_no_descriptor_of_the_first() -> None:
    boards = [Board(1), Board(1)]
    sources = tuple(Source(board.path, board.token, 0, ()) for board in boards)
    boards[1].close()
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(EngineError, match="staging memory is gone"):
        Reading(sources)
    assert len(os.listdir("/proc/self/fd")) == before
    boards[0].wait_taken(2**62)  # it doesn't wait for who could not begin
    boards[0].close()


def test_a_loss_of_the_push_before_leaves_nobody_out() -> None:
    """The driver's word of it may come late."""
    sender = Staging([ShmSlot(), ShmSlot()])
    (old,) = sender.offer(largest(BUCKETS), 1)
    (source,) = sender.offer(largest(BUCKETS), 1)
    sender.leave_out(old)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send_all, Weights(), BUCKETS, sender, counted=True)
        waiting = Reading((source,))
        waiting.wait_staged(2)
        time.sleep(0.05)
        assert not sending.done()  # it waits for its reader
        assert same(read_all((source,)))
        sending.result(WAIT_S)
        os.close(waiting._descriptors[0])
    sender.close()


def test_an_engine_of_several_gpus_waits_for_all_its_ranks() -> None:
    boards = [Board(1), Board(2)]
    sources = (
        Source(boards[0].path, boards[0].token, 0, ("a", "b")),
        Source(boards[1].path, boards[1].token, 1, ("c", "d")),
    )
    with ThreadPoolExecutor(1) as pool, closing(update_messages(BUCKETS, sources)) as messages:
        asked = pool.submit(next, messages)
        boards[0].staged(1)
        time.sleep(0.05)
        assert not asked.done()
        boards[1].staged(1)
        assert asked.result(WAIT_S)["path"] == "a"
    boards[0].wait_taken(2**62)  # it has left
    boards[1].leave_out(0)
    boards[1].wait_taken(2**62)
    for board in boards:
        board.close()


# --- NCCL -------------------------------------------------------------------------------------------------------------


class Group:
    """Of vLLM's communicator: a broadcast that others may hold up until the group is aborted."""

    available, disabled = True, False

    def __init__(self, told: list[str] | None = None, *, stuck_after: int | None = None) -> None:
        self.told = [] if told is None else told
        self.sent: list[Tensor] = []
        self.stuck_after = stuck_after
        self.stands, self.aborted = threading.Event(), threading.Event()

    def broadcast(self, tensor: Tensor, src: int, stream: Any) -> None:
        assert src == 0 and stream is None
        if len(self.sent) == self.stuck_after:
            self.stands.set()
            self.aborted.wait(WAIT_S)
            raise RuntimeError("NCCL error: the communicator was aborted")
        time.sleep(0.02)
        self.sent.append(tensor.clone())
        self.told.append(f"sent {list(STATE)[len(self.sent) - 1]}")

    def destroy(self) -> None:
        self.aborted.set()


def opened(group: Any) -> NcclSender:
    """A sender whose one engine has come."""
    gate = Gate("127.0.0.1")
    sender = NcclSender(gate, lambda world_size: group)
    engine = threading.Thread(target=pass_gate, args=("127.0.0.1", gate.port))
    engine.start()
    assert sender.open(1, 2) is None
    engine.join(WAIT_S)
    return sender


def test_the_next_bucket_is_gathered_while_one_is_sent() -> None:
    told: list[str] = []
    group = Group(told)
    sender = opened(group)
    send_all(Weights(told), BUCKETS, sender, counted=True)
    assert [torch.equal(a, b) for a, b in zip(group.sent, STATE.values(), strict=True)] == [True] * len(STATE)
    names = list(STATE)
    for k, name in enumerate(names[:-1]):
        assert told.index(f"gather {names[k + 1]}") < told.index(f"sent {name}") < told.index(f"free {name}")
        if k:  # never more than two are whole
            assert told.index(f"free {names[k - 1]}") < told.index(f"gather {names[k + 1]}")
    assert told[-1] == "free head" and torch.is_grad_enabled()
    sender.close()
    assert group.aborted.is_set()  # its communicator is destroyed, not forgotten


def test_breaking_off_lets_the_learner_out_and_its_peers_to_the_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "ENTER_S", 0.2)
    group = Group(stuck_after=2)
    sender, weights = opened(group), Weights()
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send_all, weights, BUCKETS, sender, counted=True)
        assert group.stands.wait(WAIT_S) and not sending.done()
        sender.break_off()
        sent = sending.result(WAIT_S)
    assert sent == send_all(Weights(), BUCKETS, None, counted=True) and sent.failure is None
    assert len(group.sent) == 2 and sorted(weights.told) == sorted(
        f"{what} {name}" for name in STATE for what in ("gather", "free")
    )


class Gone(Group):
    """Of NCCL after a member died: the next broadcast raises at rank 0, before anybody has told it."""

    def __init__(self, after: int) -> None:
        super().__init__()
        self.after = after

    def broadcast(self, tensor: Tensor, src: int, stream: Any) -> None:
        if len(self.sent) == self.after:
            raise RuntimeError("NCCL error: remote process exited or there was a network error")
        super().broadcast(tensor, src, stream)


@pytest.mark.parametrize("after", [0, 2, len(BUCKETS) - 1])
def test_an_error_of_nccls_own_lets_the_learner_gather_to_the_end(after: int) -> None:
    """Its peers stand in the next gather, and the weights are still theirs."""
    group, weights = Gone(after), Weights()
    sender = opened(group)
    sent = send_all(weights, BUCKETS, sender, counted=True)
    said = "RuntimeError: NCCL error: remote process exited or there was a network error"
    assert sent == Sent(send_all(Weights(), BUCKETS, None, counted=True).checksum, said)
    assert weights.told.count("gather head") == weights.told.count("free head") == 1
    assert len(weights.told) == 2 * len(STATE)
    assert group.aborted.is_set() and len(group.sent) == after
    sender.break_off()  # the driver's word, afterwards
    assert torch.is_grad_enabled()


class Freed(Group):
    """A communicator that says whether it was destroyed while a call was entering it, or entered afterwards: vLLM's
    frees what NCCL then reads."""

    def __init__(self) -> None:
        super().__init__()
        self.entered, self.crashed = threading.Event(), False
        self.inside = False

    def broadcast(self, tensor: Tensor, src: int, stream: Any) -> None:
        self.crashed |= self.aborted.is_set()
        self.inside = True
        self.entered.set()
        time.sleep(0.1)
        self.crashed |= self.aborted.is_set()
        self.inside = False

    def destroy(self) -> None:
        self.crashed |= self.inside
        super().destroy()


def test_a_communicator_is_not_freed_under_a_call_that_enters_it() -> None:
    group = Freed()
    sender = opened(group)
    together = make_buckets([list(STATE)], METADATA, 2**20)  # all tensors in a row
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send_all, Weights(), together, sender, counted=True)
        assert group.entered.wait(WAIT_S)
        sender.break_off()
        assert group.aborted.is_set()
        sending.result(WAIT_S)
    assert not group.crashed


def test_a_call_that_nccl_does_not_leave_is_aborted_under_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "ENTER_S", 0.2)
    group = Group(stuck_after=0)
    sender = opened(group)
    with ThreadPoolExecutor(1) as pool:
        sending = pool.submit(send_all, Weights(), BUCKETS, sender, counted=True)
        assert group.stands.wait(WAIT_S)
        began = time.monotonic()
        sender.break_off()
        assert 0.2 <= time.monotonic() - began < 5
        assert sending.result(WAIT_S).failure is None


@pytest.mark.engine
def test_a_port_is_kept_until_vllm_listens_on_it() -> None:
    utils = pytest.importorskip("vllm.distributed.utils")
    held = HeldPort("127.0.0.1")
    with socket.socket() as another, pytest.raises(OSError, match="in use"):
        another.bind(("127.0.0.1", held.port))
    group = utils.StatelessProcessGroup.create("127.0.0.1", held.port, rank=0, world_size=1)
    held.release()
    assert group.store.port == held.port


def test_rendezvous_that_never_end_are_not_piled_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "MOST_STUCK", 2)
    ended, group = threading.Event(), Group()
    monkeypatch.setattr(NcclSender, "stuck", [threading.Thread(target=ended.wait, args=(WAIT_S,)) for _ in range(2)])
    for thread in NcclSender.stuck:
        thread.start()
    with pytest.raises(RunError, match="2 NCCL groups of the learner were given up"):
        NcclSender(Gate("127.0.0.1"), lambda world_size: group).open(1, 2)
    ended.set()
    for thread in NcclSender.stuck:
        thread.join(WAIT_S)
    opened(group).close()


def test_giving_a_group_up_sends_back_whoever_waits_at_its_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "CONNECT_S", 0.5)
    gate = Gate("127.0.0.1")
    sender = NcclSender(gate, lambda world_size: pytest.fail("not all have come"))
    with ThreadPoolExecutor(3) as pool:
        opening = pool.submit(sender.open, 3, 4)
        waiting = [pool.submit(pass_gate, "127.0.0.1", gate.port) for _ in range(2)]  # and one that never comes
        time.sleep(0.2)
        assert not any(one.done() for one in (opening, *waiting))
        began = time.monotonic()
        sender.break_off()
        assert opening.result(WAIT_S) == "the learner gave it up"
        for one in waiting:
            with pytest.raises(GivenUpError, match="gave the group up"):
                one.result(WAIT_S)
    assert time.monotonic() - began < 5
    with pytest.raises(GivenUpError, match="could not reach the learner at 127"):
        pass_gate("127.0.0.1", gate.port)


def test_the_learner_leaves_a_rendezvous_that_a_member_never_joins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(NcclSender, "stuck", [])
    ended = threading.Event()
    group = Group()

    def connect(world_size: int) -> Group:
        assert world_size == 2
        ended.wait(WAIT_S)  # as NCCL's does: nothing interrupts it
        return group

    gate = Gate("127.0.0.1")
    sender = NcclSender(gate, connect)
    with ThreadPoolExecutor(2) as pool:
        opening = pool.submit(sender.open, 1, 2)
        pool.submit(pass_gate, "127.0.0.1", gate.port).result(WAIT_S)
        time.sleep(0.1)
        assert not opening.done()
        sender.break_off()
        assert opening.result(WAIT_S) == "the learner gave it up"
    assert [thread.is_alive() for thread in NcclSender.stuck] == [True]
    ended.set()
    assert group.aborted.wait(WAIT_S)  # one that came about after all is destroyed


def test_a_rendezvous_that_fails_on_the_learners_side_says_why() -> None:
    def connect(world_size: int) -> Any:
        raise OSError("address already in use")

    gate = Gate("127.0.0.1")
    sender = NcclSender(gate, connect)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(pass_gate, "127.0.0.1", gate.port)
        assert sender.open(1, 2) == "the learner's end failed (OSError: address already in use)"


@pytest.mark.engine
def test_a_communicator_that_switched_itself_off_is_known() -> None:
    """vLLM's own class, where there is no NCCL: alone, and with a group of two whose store is real."""
    pynccl = pytest.importorskip("vllm.distributed.device_communicators.pynccl")
    from torch.distributed import TCPStore
    from vllm.distributed.utils import StatelessProcessGroup

    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    for world_size in (1, 2):
        group = StatelessProcessGroup(rank=0, world_size=world_size, store=store)
        assert is_disabled(pynccl.PyNcclCommunicator(group, device=0))
    assert is_disabled(None) and not is_disabled(Group())
    assert callable(pynccl.PyNcclCommunicator.destroy)


def test_a_disabled_communicator_is_an_error() -> None:
    class Disabled(Group):
        available, disabled = False, True

    with pytest.raises(Exception, match=r"weight_sync\.backend=nccl: vLLM found no NCCL library"):
        opened(Disabled())
