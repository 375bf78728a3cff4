"""What DeepSpeed's bf16 training leaves to us: which gradients count, what the fp32 weights are, and a head of them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def sums_in_fp32(optimizer: Any) -> bool:
    """Whether this is DeepSpeed's optimizer for stage 1 in bf16."""
    from deepspeed.runtime.bf16_optimizer import BF16_Optimizer

    return isinstance(optimizer, BF16_Optimizer)


def count_all_gradients(optimizer: Any) -> None:
    """Has that optimizer take every gradient into norm and clipping, before its step.

    DeepSpeed leaves out what had no gradient on this rank, such as an expert that no token met; others may have had
    one, which is in the sum by now.
    """
    if sums_in_fp32(optimizer):
        for flags in optimizer.fp32_groups_has_gradients:
            flags[:] = [True] * len(flags)


def keep_master(engine: Any) -> None:
    """Tells the module's parts that compute with fp32 weights what those are now. A collective in bf16."""
    if engine.bfloat16_enabled():
        for part in engine.module.modules():
            if isinstance(part, MasterLinear):
                part.keep_master()


def has_master(parameter: Tensor) -> bool:
    """Whether the optimizer steps fp32 weights of this bf16 parameter, of which it is the rounded copy."""
    known = hasattr(parameter, "_hp_mapping") or hasattr(parameter, "_z3_optimizer")
    return known and parameter.requires_grad and parameter.dtype == torch.bfloat16


def master_of(parameter: Tensor) -> Tensor:
    """The parameter's fp32 weights, whole, on its device. A collective, under every ZeRO stage and offload."""
    from deepspeed.utils import safe_get_full_fp32_param

    found: Tensor = safe_get_full_fp32_param(parameter).detach()
    return found


class MasterLinear(torch.nn.Linear):
    """A linear layer that computes in fp32, in bf16 with the fp32 weights that the optimizer steps.

    DeepSpeed casts every parameter to bf16, and ZeRO-3 shards one type: here the bf16 parameters carry the gradient,
    and the numbers come from their masters. A value of 100 would else be off by 0.25 for its bias alone.
    """

    _masters: tuple[Tensor, ...] | None = None  # fp32 weight and bias; None: the parameters are fp32 themselves

    def keep_master(self) -> None:
        """Looks what the fp32 weights are, after the optimizer's step. A collective."""
        self._masters = (master_of(self.weight), master_of(self.bias))

    def forward(self, input: Tensor) -> Tensor:
        """(..., out) fp32."""
        weight, bias = self.weight.float(), self.bias.float()
        if self._masters is not None:
            weight, bias = (
                parameter + (master - parameter.detach())
                for parameter, master in zip((weight, bias), self._masters, strict=True)
            )
        return torch.nn.functional.linear(input.float(), weight, bias)
