"""The DeepSpeed config of a learner: a pure function of our own config."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any, Literal

from rlaif_ray.config.sections import LearnerConfig

# Elements that are reduced or gathered at a time. DeepSpeed's own 5e8 costs up to 2 GB for each buffer; from about
# 1e8 on larger buckets gain no bandwidth.
_BUCKET_ELEMENTS = 50_000_000


def deepspeed_config(
    learner: LearnerConfig, *, precision: Literal["fp32", "bf16"], micro_batch_size: int = 1
) -> dict[str, Any]:
    """DeepSpeed's config for this learner; `learner.deepspeed_overrides` are merged in last and win.

    There is no optimizer and no scheduler in it: the learner hands both to `deepspeed.initialize`. It forms the
    micro-batches too (by tokens, not by samples) and marks the last one of each optimizer step by itself, which is
    why the accumulation steps are 1 here.

    In bf16 gradients are summed in fp32, over micro-batches and over ranks: a sum in bf16 loses each term below 2^-9 of
    it. Stage 0 then runs as stage 1: DeepSpeed's own stage 0 has no fp32 sum, and its optimizer
    (FP16_UnfusedOptimizer) reads every gradient three times more. On one rank that takes 2 bytes a parameter more, for
    the sum, and from two ranks on less, since moments and master weights are divided.
    """
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": micro_batch_size,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": learner.grad_clip,
        "zero_optimization": _zero(learner, used_stage(learner.zero_stage, precision)),
        "zero_allow_untested_optimizer": True,  # ours comes from torch, DeepSpeed tests its own
        "zero_force_ds_cpu_optimizer": False,  # so it may also be offloaded
        "steps_per_print": 2**31 - 1,
        "wall_clock_breakdown": False,
    }
    if precision == "bf16":
        config |= {
            "bf16": {
                "enabled": True,
                "check_grad_overflow": True,  # a NaN is no step, in bf16 too
                "immediate_grad_update": True,  # stage 1: a bf16 gradient goes as soon as the fp32 sum has it
            },
            "data_types": {"grad_accum_dtype": "fp32"},
            "communication_data_type": "fp32",
        }
    return _merged(config, learner.deepspeed_overrides)


def used_stage(stage: int, precision: Literal["fp32", "bf16"]) -> int:
    """The ZeRO stage that DeepSpeed is asked for."""
    return max(stage, 1) if precision == "bf16" else stage


def _zero(learner: LearnerConfig, stage: int) -> dict[str, Any]:
    zero: dict[str, Any] = {"stage": stage}
    if stage >= 1:
        zero |= {"reduce_bucket_size": _BUCKET_ELEMENTS, "allgather_bucket_size": _BUCKET_ELEMENTS}
    if stage == 3:
        zero |= {
            "stage3_prefetch_bucket_size": _BUCKET_ELEMENTS,
            # We gather layer by layer when we save and sync; a gathered copy of the whole model may not fit.
            "stage3_gather_16bit_weights_on_model_save": False,
        }
    offload = learner.offload
    for name, device in (("offload_optimizer", offload.optimizer), ("offload_param", offload.parameters)):
        if device != "none":
            zero[name] = {"device": device, "pin_memory": offload.pin_memory}
    if learner.hpz_partition_size > 1:
        zero["zero_hpz_partition_size"] = learner.hpz_partition_size
    return zero


def _merged(below: Mapping[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`: mappings merge, anything else replaces. Shares nothing with either."""
    merged = copy.deepcopy(dict(below))
    for name, value in above.items():
        old = merged.get(name)
        if isinstance(value, Mapping) and isinstance(old, Mapping):
            merged[name] = _merged(old, value)
        else:
            merged[name] = copy.deepcopy(value)
    return merged
