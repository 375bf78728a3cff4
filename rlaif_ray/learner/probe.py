"""Whether a layout of samples changes a model's numbers: a short fixed text, laid out and sample by sample.

    with attention_of(model, "eager"):
        alone = alone_outputs(run, text, "cpu")
    gap = compare(laid_out_outputs(run, text, packed=True, device="cpu"), alone)

`run` takes a ModelInput and gives what is compared: (M,) log-probabilities for a language model (`logprobs_of`), values
or rewards for others. Everything here is a collective under ZeRO-3: all ranks call it with the same arguments.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from rlaif_ray.attention import PACKED, WITHOUT_SPLIT, AttentionPlan, split_refusal
from rlaif_ray.errors import InputError
from rlaif_ray.learner.packing import ModelInput, build_input, observed_packing
from rlaif_ray.learner.sequence_parallel import PADDED, SequenceGroup

if TYPE_CHECKING:
    from torch import Tensor

log = logging.getLogger(__name__)

Run = Callable[[ModelInput], "Tensor"]
Precision = Literal["fp32", "bf16"]
OWN_ATTENTION = "its class does not support other attention than its own"
# What a forward pass ends in that a model can't take.
BROKEN = (RuntimeError, TypeError, ValueError, AttributeError, KeyError, IndexError, AssertionError)


@dataclass(frozen=True, slots=True)
class Text:
    """Samples in tokens."""

    prompts: tuple[tuple[int, ...], ...]
    completions: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, slots=True)
class Gap:
    """How far two computations of the same numbers are apart; nats for log-probabilities."""

    mean: float
    worst: float

    def within(self, precision: Precision) -> bool:
        """Whether rounding explains it.

        In bf16 a single number may be far off; for the means of two kernels 0.07 nats were measured, on text as
        improbable as probe_text.
        """
        return self.worst <= 1e-3 if precision == "fp32" else self.mean <= 0.15


def probe_text(vocabulary: int) -> Text:
    """Three samples of two prompts, the same for the same vocabulary: one prompt is shared, lengths differ.

    Ids are spread over the vocabulary, none among the first three, which often are special.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(count: int) -> tuple[int, ...]:
        return tuple(torch.randint(min(3, vocabulary - 1), vocabulary, (count,), generator=generator).tolist())

    shared, own = draw(11), draw(6)
    return Text((shared, shared, own), (draw(7), draw(3), draw(9)))


def logprobs_of(policy: Callable[[ModelInput, float], Any], temperature: float = 1.0) -> Run:
    """The log-probabilities of completion tokens; `policy` is a CausalPolicy or a DeepSpeed engine around one."""
    return lambda batch: batch.whole(policy(batch, temperature)[0])


@torch.no_grad()
def laid_out_outputs(run: Run, text: Text, *, packed: bool, device: torch.device | str) -> Tensor:
    """(M,) fp32 numbers on CPU of all samples in one micro-batch, as the learner lays them out."""
    return run(build_input(text.prompts, text.completions, packed=packed, device=device)).float().cpu()


@torch.no_grad()
def alone_outputs(run: Run, text: Text, device: torch.device | str) -> Tensor:
    """(M,) fp32 numbers on CPU, each sample by itself: nothing packed, nothing padded."""
    rows = [
        run(build_input([prompt], [completion], packed=False, device=device)).float().cpu()
        for prompt, completion in zip(text.prompts, text.completions, strict=True)
    ]
    return torch.cat(rows)


def compare(found: Tensor, expected: Tensor) -> Gap:
    """How far apart two (M,) tensors are; infinitely where one is not a number."""
    off = (found - expected).abs()
    off = torch.where(off.isnan(), torch.inf, off)
    return Gap(float(off.mean()), float(off.max()))


@contextmanager
def attention_of(model: Any, implementation: str) -> Iterator[None]:
    """The transformers model computes its attention so inside. For models that transformers can switch."""
    before = model.config._attn_implementation
    model.set_attn_implementation(implementation)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


@contextmanager
def evaluating(module: torch.nn.Module) -> Iterator[None]:
    """Without dropout (an adapter's) and without checkpointing; each part of the module gets its mode back."""
    modes = [(part, part.training) for part in module.modules()]
    module.eval()
    try:
        yield
    finally:
        for part, mode in modes:
            part.training = mode


def settle_attention(
    plan: AttentionPlan,
    model: Any,
    run: Run,
    *,
    name: str,
    device: torch.device,
    precision: Precision,
    sharded: bool = False,
) -> tuple[str, str]:
    """Finds out what the plan leaves open, sets the loaded model's attention, and returns it with a line to tell.

    `model` is transformers' model inside what `run` runs; the line is empty where samples are packed, or the user
    chose another attention. `sharded`: under ZeRO-3.

    Raises:
        InputError: packing was asked for and is wrong; or the model broke off under ZeRO-3.
    """
    packing, reason = plan.packing, plan.reason
    if packing == "unknown":
        reason = _probe(plan, model, run, device, precision, name=name, sharded=sharded)
        packing = "wrong" if reason else "right"
        if packing == "right":
            model.set_attn_implementation(PACKED)
    if packing == "right":
        return PACKED, ""
    if plan.required:
        raise InputError(
            f"policy.attention=packed is wrong for {name}: {reason}. Use policy.attention=auto, which pads this "
            f"model's samples."
        )
    told = f"samples of {name} are padded, not packed, and attention is {plan.kernel}: {reason}"
    return plan.kernel, told if reason else ""


def _takes_attention(model: Any) -> bool:
    """Whether a loaded model of transformers computes with the attention function that it is told to."""
    return bool(model.is_backend_compatible() and model._can_set_attn_implementation())


def _probe(
    plan: AttentionPlan, model: Any, run: Run, device: torch.device, precision: Precision, *, name: str, sharded: bool
) -> str:
    """Why the loaded model can't be packed; "" where it gives packed what it gives sample by sample."""
    if not _takes_attention(model):
        return OWN_ATTENTION
    text = probe_text(model.config.get_text_config().vocab_size)
    with evaluating(model):
        alone = alone_outputs(run, text, device)  # by the kernel of the plan, which is right
        try:
            with attention_of(model, PACKED), observed_packing() as observed:
                packed = laid_out_outputs(run, text, packed=True, device=device)
        except BROKEN as error:
            if sharded:  # weights gathered for the pass that broke off are still whole
                raise InputError(
                    f"model {name} can't be packed under ZeRO-3 ({type(error).__name__} in a forward pass: {error}). "
                    f"Use policy.attention={plan.kernel}, with learner.sequence_parallel=1 where ranks share sequences."
                ) from error
            return f"a packed forward pass ends in {type(error).__name__}: {error}"
    problem = observed.problem()
    gap = compare(packed, alone)
    log.info("%s packed against each sample alone: mean %.1e, worst %.1e", name, gap.mean, gap.worst)
    if problem:
        return problem
    if not gap.within(precision):
        return f"packed, its numbers are off by up to {gap.worst:.2g}"
    return ""


def settle_split(
    sequence: SequenceGroup,
    attention: str,
    plan: AttentionPlan,
    model: Any,
    run: Run,
    *,
    name: str,
    device: torch.device,
    precision: Precision,
) -> str:
    """Sets the attention with which a group of ranks computes parts of rows, tries it, and returns it.

    `attention` is what `settle_attention` returned, and what a rank by itself keeps. `run` splits what it is given. A
    collective.

    Raises:
        InputError: the group's numbers would not be the model's.
    """
    if sequence.size == 1:
        return attention
    problem = split_refusal(attention, model.config, sequence.size)
    if problem is None and attention != PACKED:
        if _takes_attention(model):
            model.set_attn_implementation(PADDED)
            attention = PADDED
        else:
            problem = f"{OWN_ATTENTION}. {WITHOUT_SPLIT}"
    problem = problem or _split_problem(attention, plan, model, run, device, precision)
    if problem:
        raise InputError(f"learner.sequence_parallel={sequence.size} is wrong for {name}: {problem}")
    return attention


def _split_problem(
    attention: str, plan: AttentionPlan, model: Any, run: Run, device: torch.device, precision: Precision
) -> str:
    """What is wrong where ranks compute parts of rows; "" where they give what one gives sample by sample."""
    text = probe_text(model.config.get_text_config().vocab_size)
    with evaluating(model):
        with attention_of(model, plan.kernel):
            alone = alone_outputs(run, text, device)
        try:
            together = laid_out_outputs(run, text, packed=attention == PACKED, device=device)
        except (InputError, *BROKEN) as error:
            return f"a forward pass of its parts ends in {type(error).__name__}: {error}. {WITHOUT_SPLIT}"
    gap = compare(together, alone)
    log.info("rows split over ranks against each sample alone: mean %.1e, worst %.1e", gap.mean, gap.worst)
    return "" if gap.within(precision) else f"split, its numbers are off by up to {gap.worst:.2g}. {WITHOUT_SPLIT}"
