"""Methods added to vLLM's workers, reached by `collective_rpc`. Importing it registers our transfer backends."""

from __future__ import annotations

from typing import Any

from rlaif_ray.rollout.nccl import is_disabled
from rlaif_ray.rollout.weight_transfer import register

register()


class WorkerExtension:
    """Mixed into vLLM's worker class."""

    weight_transfer_engine: Any  # one of ours

    def not_loaded(self) -> list[str]:
        """Parameters that the update under way has not reached; to be asked before it is finished."""
        names: list[str] = self.weight_transfer_engine.not_loaded()
        return names

    def received_checksum(self) -> int:
        """Checksum of all that the last weight update brought (checksum.py), which every worker receives whole.

        It does not show what the engine computes: for that its log-probabilities must be compared with the learner's.
        """
        return int(self.weight_transfer_engine.received_checksum)

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
