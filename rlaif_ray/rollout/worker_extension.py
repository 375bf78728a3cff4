"""Methods added to vLLM's workers, reached by `collective_rpc`. Importing it registers our transfer backend."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from rlaif_ray.rollout.nccl import is_disabled
from rlaif_ray.rollout.weight_transfer import additive_checksum, register

register()


class WorkerExtension:
    """Mixed into vLLM's worker class."""

    weight_transfer_engine: Any
    model_runner: Any

    def not_loaded(self) -> list[str]:
        """Parameters that the update under way has not reached; to be asked before it is finished.

        By vLLM's own transports (GPUs); ours fails by itself when it is finished (reload.py).
        """
        if hasattr(self.weight_transfer_engine, "received_checksum"):
            return []
        from rlaif_ray.rollout.loaded import not_loaded

        return not_loaded(self.model_runner.model)

    def received_checksum(self, sent: Collection[str] | None = None) -> int | None:
        """Checksum of what the last weight update brought: of the bytes received where the transport is ours, else
        of the parameters now in the model (vLLM's GPU kernels keep most of them as loaded).

        None where parameters are of other types than those sent (a router's gate, or linear attention's decays, that
        vLLM computes in fp32; quantised ones): their bits can't be compared. On CPU kernels pack weights, so that no
        sum of what is in the model could be. No checksum shows what the engine computes: for that its
        log-probabilities must be compared with the learner's.
        """
        received = getattr(self.weight_transfer_engine, "received_checksum", None)
        if received is not None:
            return int(received)
        held = [p for p in self.model_runner.model.parameters() if p.numel()]
        if sent is not None and {str(p.dtype).removeprefix("torch.") for p in held} != set(sent):
            return None
        return additive_checksum(held)

    def transfer_is_disabled(self) -> bool:
        """Whether vLLM joined an NCCL group with a communicator that sends and receives nothing."""
        return is_disabled(getattr(self.weight_transfer_engine, "model_update_group", None))

    def leave_transfer(self) -> None:
        """Destroys the communicator of the NCCL group that it has joined, if any. vLLM only drops it when another one
        takes its place, and NCCL keeps its memory and threads for one that is dropped."""
        group = getattr(self.weight_transfer_engine, "model_update_group", None)
        if group is not None:
            self.weight_transfer_engine.model_update_group = None
            group.destroy()
