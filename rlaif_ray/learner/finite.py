"""Losses, gradients and weights that are no numbers: no optimizer step is taken from them, and none is saved."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from rlaif_ray.errors import InputError, NotFiniteError


@dataclass(frozen=True, slots=True)
class Stepped:
    """What became of an optimizer step; the same on all ranks."""

    norm: float  # of the gradient before clipping; inf or NaN where the step was not applied
    applied: bool


class Tally:
    """Optimizer steps of one engine on one rank, and those that were skipped."""

    def __init__(self) -> None:
        self._in_row = 0  # skipped up to now, one after the other

    def sums(self, steps: Iterable[Stepped]) -> dict[str, float]:
        """ "grad_norm" of the applied steps (mean; NaN without any), "skipped", and "in_row": the longest run of
        skipped steps, those before included."""
        norms, skipped, longest = [], 0, 0
        for step in steps:
            if step.applied:
                norms.append(step.norm)
                self._in_row = 0
                continue
            skipped += 1
            self._in_row += 1
            longest = max(longest, self._in_row)
        mean = math.fsum(norms) / len(norms) if norms else math.nan
        return {"grad_norm": mean, "skipped": float(skipped), "in_row": float(longest)}


def spread(loss: Tensor) -> Tensor:
    """A loss whose gradient is finite only if the loss itself is.

    One that is not may have a finite gradient, of some terms on some ranks. Multiplied by NaN none is: so the norm over
    all ranks tells, without a collective of its own.
    """
    return loss * torch.where(loss.detach().isfinite(), 1.0, math.nan)


def require_finite_weights(modules: Mapping[str, torch.nn.Module], when: str) -> None:
    """Looks at all weights that are trained. A collective.

    Reads each once, without a copy: a fraction of what the optimizer step before it reads and writes.

    Raises:
        NotFiniteError: one of them, of whatever rank, is no number; on all ranks.
    """
    for name, module in modules.items():
        if not finite_weights(parameter for parameter in module.parameters() if parameter.requires_grad):
            raise NotFiniteError(f"the {name}'s weights are not finite (NaN or infinite) {when}")


def finite_weights(parameters: Iterable[Any]) -> bool:
    """Whether all values of parameters are numbers, on all ranks. A collective."""
    shards = [_own_part(parameter) for parameter in parameters]
    largest = [
        torch.linalg.vector_norm(shard, math.inf).float()
        for shard in shards
        if shard.numel() and shard.is_floating_point()
    ]
    distributed = torch.distributed.is_initialized() and torch.distributed.get_world_size() > 1
    device = "cuda" if distributed and torch.distributed.get_backend() == "nccl" else None
    device = device or (largest[0].device if largest else "cpu")
    bad = torch.zeros((), device=device)
    if largest:
        bad = (~torch.stack([one.to(device) for one in largest]).isfinite()).any().float()
    if distributed:
        torch.distributed.all_reduce(bad, op=torch.distributed.ReduceOp.MAX)
    return not bool(bad)


def _own_part(parameter: Any) -> Tensor:
    """The numbers of a parameter that this rank holds: all of them, or its part under ZeRO-3.

    Parts have one size, so where that does not divide the parameter the last ones end in memory that nobody has
    written, and whose bits may well be those of NaN.
    """
    shard = getattr(parameter, "ds_tensor", None)
    if shard is None:
        whole: Tensor = parameter.detach()
        return whole
    if shard.numel() < shard.ds_numel:  # it is on NVMe
        return torch.zeros(0)
    before = torch.distributed.get_rank(parameter.ds_process_group) * shard.ds_numel
    part: Tensor = shard.detach().view(-1)[: max(0, min(shard.ds_numel, parameter.ds_numel - before))]
    return part


def require_finite_model(model: torch.nn.Module, name: str) -> None:
    """Of a model that was just loaded. A collective.

    Raises:
        InputError: one of its weights is no number; on all ranks.
    """
    if not finite_weights(model.parameters()):
        raise InputError(
            f"policy.model={name} has weights that are not finite (NaN or infinite): nothing could be learned. It was "
            f"saved by a run that failed, or is damaged. Use another, or an earlier one."
        )


def require_finite_state(state: Mapping[str, Tensor]) -> None:
    """Before whole weights are written.

    Raises:
        NotFiniteError: names the first of those that hold a value that is no number.
    """
    bad = [
        name
        for name, tensor in state.items()
        if tensor.numel() and tensor.is_floating_point() and not torch.linalg.vector_norm(tensor, math.inf).isfinite()
    ]
    if bad:
        raise NotFiniteError(
            f"{len(bad)} of {len(state)} weights to save are not finite (NaN or infinite), the first {bad[0]}"
        )
