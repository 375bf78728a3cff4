"""Methods added to vLLM's workers, reached by `collective_rpc`. Importing it registers our transfer backends."""

from __future__ import annotations

from typing import Any

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
