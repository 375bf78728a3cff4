"""The NCCL group of the learner's rank 0 and all workers of its engines: how it meets, sends, and is given up.

vLLM's rendezvous waits five minutes for a member that died before it came, and NCCL's own for ever. So all pass a gate
first: the learner keeps it closed until everybody has come, and whoever stands before it can go back. Behind it a
member that waits for a dead one can only be ended: nothing interrupts NCCL's rendezvous, nor a kernel that waits for
its peers in another process's worker. On the learner's own side a thread waits in NCCL, and the rank goes on without
it.

So an engine that dies behind the gate takes the other engines of the group along: the driver ends them after
`weight_sync.GIVE_UP_S` and starts others. A broadcast that fails, at any member, ends the group in the same way; the
learner loses nothing by it.
"""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar

from rlaif_ray.errors import EngineError, RunError

if TYPE_CHECKING:
    from torch import Tensor

LOOK_S = 0.02  # between looks at who has come, and at whether to give up
ABORT_S = 10.0  # for NCCL to leave a kernel after its communicator was aborted
ENTER_S = 5.0  # for a call into NCCL to return, before its communicator is aborted under it
MOST_STUCK = 16  # threads of this process that stand in rendezvous that were given up
GATE_S = 3600.0  # longest wait before the gate; the driver gives up long before
CONNECT_S = 30.0  # for the gate to answer: it stands before anybody is sent there, but its node may be busy
DISABLED = (
    "weight_sync.backend=nccl: vLLM found no NCCL library that it can use, and its communicator is disabled. Install "
    "the one that comes with torch for CUDA (nvidia-nccl), or name it by VLLM_NCCL_SO_PATH, and leave "
    "VLLM_DISABLE_PYNCCL unset."
)
_ARRIVED, _OPEN = "arrived", "open"
_BROKEN_OFF = "the learner gave it up"


class HeldPort:
    """A free port of an address, kept until somebody listens on it.

    It is bound and doesn't listen. The kernel gives it to nobody who asks for any free port, while a listener that sets
    SO_REUSEADDR, as vLLM's does, can take it.
    """

    def __init__(self, address: str) -> None:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        self._socket = socket.socket(family, socket.SOCK_STREAM)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self._socket.bind((address, 0))
        self.port = int(self._socket.getsockname()[1])

    def release(self) -> None:
        self._socket.close()


class GivenUpError(EngineError):
    """The group was given up before this member had joined it; nothing of it has changed."""


class Gate:
    """The learner's side of the gate."""

    def __init__(self, address: str) -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined, unused-ignore]

        self._store: Any = TCPStore(address, 0, is_master=True, wait_for_workers=False)
        self.port = int(self._store.port)
        self.given_up = threading.Event()

    def open_for(self, count: int) -> bool:
        """Opens once so many have come; False when it was given up before."""
        while self._store.add(_ARRIVED, 0) < count:
            if self.given_up.wait(LOOK_S):
                return False
        self._store.set(_OPEN, b"1")
        return True

    def close(self) -> None:
        """Whoever still stands before it is sent back."""
        self._store = None


def pass_gate(address: str, port: int) -> None:
    """An engine's side: returns once all have come.

    Raises:
        GivenUpError: the learner has given the group up, or is gone.
    """
    from torch.distributed import TCPStore  # type: ignore[attr-defined, unused-ignore]

    timeout = timedelta(seconds=CONNECT_S)
    try:
        store = TCPStore(address, port, is_master=False, wait_for_workers=False, timeout=timeout)
    except RuntimeError as error:  # DistNetworkError
        raise GivenUpError(f"it could not reach the learner at {address}:{port} ({error})") from error
    try:
        store.add(_ARRIVED, 1)
        store.wait([_OPEN], timedelta(seconds=GATE_S))
    except RuntimeError as error:  # DistStoreError, DistNetworkError
        raise GivenUpError(f"the learner gave the group up ({type(error).__name__})") from error


def communicator(address: str, port: int, world_size: int) -> Any:
    """vLLM's communicator, at rank 0 of the group; waits for all its members."""
    from vllm.distributed.weight_transfer.nccl_common import trainer_init

    return trainer_init({"master_address": address, "master_port": port, "world_size": world_size})


def is_disabled(group: Any) -> bool:
    """Whether vLLM's communicator has switched itself off, which it does without a word: it would send nothing."""
    return group is None or bool(getattr(group, "disabled", False)) or not getattr(group, "available", True)


class NcclSender:
    """Broadcasts from the learner's rank 0 to all engine workers, for engines on GPUs of their own.

    One bucket is on its way while the learner gathers the next: on a stream and a thread of its own. The gather among
    ranks and the broadcast to engines can't wait for each other in a circle: engines take part in broadcasts alone.
    """

    keeps = True  # the tensors, until `wait` returns
    stuck: ClassVar[list[threading.Thread]] = []  # in rendezvous that were given up, of all senders of this process

    def __init__(self, gate: Gate, connect: Callable[[int], Any], held: HeldPort | None = None) -> None:
        """`connect` makes the communicator of a group of so many, which meets at the port that is `held`."""
        self._gate, self._connect, self._held = gate, connect, held
        self._device = _device()
        self._group: Any = None
        self._broken_off = gate.given_up
        self.failure: str | None = None  # why a broadcast failed, in NCCL's words
        # Held for one call into the communicator: it isn't freed while another thread enters it.
        self._in_group = threading.Lock()
        self._sending: threading.Thread | None = None
        self._failure: BaseException | None = None
        self._stream: Any = None

    def open(self, engines: int, world_size: int) -> str | None:
        """Meets so many engines, whose workers and this rank are `world_size`; why it didn't come about, else None.

        Raises:
            RunError: NCCL can't be used, or too many rendezvous of this process never ended.
        """
        try:
            _must_not_be_many(self.stuck)
            if not self._gate.open_for(engines):
                return _BROKEN_OFF
            meeting = threading.Thread(target=self._meet, args=(world_size,), daemon=True)
            meeting.start()
            while meeting.is_alive():
                meeting.join(LOOK_S)
                if self._broken_off.is_set():
                    self.stuck.append(meeting)  # nothing ends the thread while a member is missing
                    return _BROKEN_OFF
            if self._failure is not None:  # such as a port that another program took meanwhile
                return f"the learner's end failed ({type(self._failure).__name__}: {self._failure})"
            if is_disabled(self._group):
                raise RunError(DISABLED)
            return None
        finally:
            self._gate.close()
            self._release()

    def _release(self) -> None:
        if self._held is not None:
            self._held.release()

    def _meet(self, world_size: int) -> None:
        try:
            with _on(self._device):
                group = self._connect(world_size)
        except BaseException as error:
            self._failure = error
            return
        with self._in_group:
            if not self._broken_off.is_set():
                self._group = group
                return
        with suppress(Exception):  # such as NCCL's own error for a group that is broken
            group.destroy()

    def start(self, number: int, tensors: Sequence[Tensor]) -> None:
        """Begins to send a bucket; the one before must have been waited for. Nothing is sent once it was broken off."""
        if self._broken_off.is_set():
            return
        self._sending = threading.Thread(target=self._send, args=(tensors, self._gathered()), daemon=True)
        self._sending.start()

    def _gathered(self) -> Any:
        """An event after all that this thread's stream was told so far; None without a GPU."""
        import torch

        if not torch.cuda.is_available():
            return None
        self._stream = self._stream or torch.cuda.Stream()
        event = torch.cuda.Event()
        event.record()
        return event

    def _send(self, tensors: Sequence[Tensor], gathered: Any) -> None:
        try:
            with _on(self._device), self._after(gathered):
                whole = [tensor.detach().contiguous() for tensor in tensors]
                for tensor in whole:
                    with self._in_group:
                        if self._broken_off.is_set():
                            return
                        self._group.broadcast(tensor, src=0, stream=self._stream)
                if self._stream is not None:
                    self._stream.synchronize()
        except BaseException as error:  # of a group that was aborted, or NCCL's own
            self._failure = error

    def _after(self, gathered: Any) -> Any:
        """This thread on the broadcast's stream, which goes on after `gathered`."""
        if gathered is None:
            return nullcontext()
        import torch

        self._stream.wait_event(gathered)
        return torch.cuda.stream(self._stream)

    def wait(self) -> None:
        """Until the bucket that was begun last is sent, or it was broken off.

        A broadcast that fails breaks it off: NCCL tells rank 0 of a member that is gone before anybody else knows, and
        this rank's peers stand in the next gather. The reason is then in `failure`.
        """
        thread, self._sending = self._sending, None
        while thread is not None and thread.is_alive():
            thread.join(LOOK_S)
            if self._broken_off.is_set():
                thread.join(ABORT_S)
                break  # a thread that NCCL doesn't leave stays behind: the rank goes on
        failure, self._failure = self._failure, None
        if failure is not None and not self._broken_off.is_set():
            self.failure = f"{type(failure).__name__}: {failure}"
            self.break_off()

    def finish(self) -> None:
        self.wait()

    def fail(self) -> None:
        """The rank can't go on: what is under way is left."""
        self.break_off()

    def break_off(self) -> None:
        """From any thread: a member is lost. The others in the group would wait for it in NCCL for ever, this rank
        too: aborting its communicator lets it out. The group is of no more use.

        A call that is entering the communicator returns first. One that has not within `ENTER_S` waits in NCCL for the
        lost member, and only the abort lets it out.
        """
        self._broken_off.set()
        entered = self._in_group.acquire(timeout=ENTER_S)
        try:
            self._destroy()
        finally:
            if entered:
                self._in_group.release()

    def close(self) -> None:
        self.break_off()
        self._release()

    def _destroy(self) -> None:
        group, self._group = self._group, None
        if group is not None:
            with suppress(Exception):  # such as NCCL's own error for a group that is broken: it is gone all the same
                group.destroy()


def _must_not_be_many(stuck: list[threading.Thread]) -> None:
    stuck[:] = [thread for thread in stuck if thread.is_alive()]
    if len(stuck) >= MOST_STUCK:
        raise RunError(
            f"{len(stuck)} NCCL groups of the learner were given up in their rendezvous, and NCCL has not ended any of "
            f"them: each keeps a thread and its memory. Look at the engines' logs in Ray's session folder, then resume."
        )


def _device() -> int | None:
    """This thread's GPU: other threads begin with the first."""
    import torch

    return torch.cuda.current_device() if torch.cuda.is_available() else None


def _on(device: int | None) -> Any:
    import torch

    return nullcontext() if device is None else torch.cuda.device(device)
