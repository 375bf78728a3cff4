"""Methods added to vLLM's workers, reached by `collective_rpc`. Importing it registers our transfer backend."""

from __future__ import annotations

from typing import Any

from rlaif_ray.rollout.weight_transfer import additive_checksum, register

register()


class WorkerExtension:
    """Mixed into vLLM's worker class."""

    weight_transfer_engine: Any
    model_runner: Any

    def received_checksum(self) -> int:
        """Checksum of what the last weight update brought: of the bytes received where the transport is ours, else
        of the parameters now in the model (vLLM's GPU kernels keep them as loaded).

        On CPU kernels pack weights, so that no sum of what is in the model can be compared; there `Reload` counts
        which parameters were loaded, and fails when one was not. Neither shows what the engine computes: for that
        its log-probabilities must be compared with the learner's.
        """
        received = getattr(self.weight_transfer_engine, "received_checksum", None)
        if received is not None:
            return int(received)
        return additive_checksum([p for p in self.model_runner.model.parameters() if p.numel()])
