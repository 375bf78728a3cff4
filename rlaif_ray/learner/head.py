"""The output head of a language model, taken apart from its body, so that not all logits stand side by side.

    policy.head = settle_head(policy, engine, ...)      once, at the start; None: the model computes its logits itself
    scores = policy.head.scores(hidden, targets, ...)   (2, M) log-probabilities and entropies

What a model does to its head's products is known from its config (a scale, a soft cap). Whether that is all is found
out by comparing with the model's own forward pass, so a model that does anything else computes its logits itself.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch

from rlaif_ray.algorithm.logprobs import LogitRule, head_logprobs_and_entropy
from rlaif_ray.errors import InputError
from rlaif_ray.learner.packing import Arguments, build_input
from rlaif_ray.learner.probe import BROKEN, Precision, compare, probe_text

if TYPE_CHECKING:
    from torch import Tensor

    from rlaif_ray.learner.packing import ModelInput

log = logging.getLogger(__name__)

# What a config calls the factor of the head's products (Cohere, Falcon H1), what divides them (Granite), and the bound
# of a soft cap (Gemma, xLSTM).
SCALES, DIVISORS = ("logit_scale", "lm_head_multiplier"), ("logits_scaling",)
SOFTCAPS = ("final_logit_softcapping", "output_logit_soft_cap")
AMPLIFIED = (
    64.0  # times its size the hidden state is compared at: logits that a soft cap bends, in untrained models too
)


class OutputHead:
    """Log-probabilities from hidden states, no more than `chunk` rows of logits at a time."""

    def __init__(self, body: torch.nn.Module, head: torch.nn.Linear, rule: LogitRule, chunk: int) -> None:
        self.body, self._head, self._rule, self._chunk = body, head, rule, chunk
        self._arguments = Arguments(body)

    def scores(self, batch: ModelInput, temperature: float) -> Tensor:
        """(2, M) log-probabilities and entropies of the completion tokens."""
        hidden = self.body(**self._arguments.of(batch)).last_hidden_state[batch.rows, batch.columns]

        def scored(states: Tensor) -> Tensor:
            return head_logprobs_and_entropy(
                states,
                self._head.weight,
                self._head.bias,
                batch.targets,
                temperature,
                rule=self._rule,
                chunk=self._chunk,
            )

        # By a call of the head itself, one however many chunks there are: DeepSpeed gathers its weight then.
        with _forward_of(self._head, scored):
            scores: Tensor = self._head(hidden)
        return scores


@contextmanager
def _forward_of(module: torch.nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    own = vars(module).get("forward")
    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


def head_of(model: Any, chunk: int) -> OutputHead | None:
    """The head of a transformers model whose logits are a linear layer's, up to a scale and a soft cap; else None."""
    head, body = model.get_output_embeddings(), model.get_decoder()
    if type(head) is not torch.nn.Linear or body is None or body is model:
        return None
    return OutputHead(body, head, logit_rule(model.config), chunk)


def logit_rule(config: Any) -> LogitRule:
    """What the model does to its head's products, as far as its config says."""
    text = config.get_text_config()

    def number(*names: str) -> float | None:
        found = (getattr(text, name, None) for name in names)
        return next((float(value) for value in found if isinstance(value, int | float) and value), None)

    scale, divisor = number(*SCALES), number(*DIVISORS)
    return LogitRule((scale or 1.0) / (divisor or 1.0), number(*SOFTCAPS))


def settle_head(
    policy: Any,
    run: Callable[..., Any],
    *,
    name: str,
    packed: bool,
    device: torch.device,
    precision: Precision,
    sharded: bool = False,
) -> list[str]:
    """Leaves `policy.head` (a CausalPolicy's) only where it gives what the model's own forward pass gives; says so
    where it does not.

    `run` is the policy, or the DeepSpeed engine around it; `sharded`: under ZeRO-3, where it is a collective.

    Raises:
        InputError: the model broke off under ZeRO-3.
    """
    if policy.head is None:
        return []
    text = probe_text(policy.model.config.get_text_config().vocab_size)
    batch = build_input(text.prompts, text.completions, packed=packed, device=device)
    head = policy.head
    try:
        with torch.no_grad(), _amplified(head.body):
            apart = run(batch, 1.0)[0]
            policy.head = None
            whole = run(batch, 1.0)[0]
    except (InputError, *BROKEN) as error:
        policy.head = None
        if sharded:  # weights gathered for the pass that broke off are still whole
            raise InputError(
                f"the output head of {name} can't be taken apart from its body under ZeRO-3 ({type(error).__name__} in "
                f"a forward pass: {error}). Use learner.logits_chunk=null."
            ) from error
        return [_whole(name, f"a forward pass with it apart ends in {type(error).__name__}: {error}")]
    gap = compare(apart.float().cpu(), whole.float().cpu())
    log.info("%s with its output head apart against its own logits: mean %.1e, worst %.1e", name, gap.mean, gap.worst)
    if not gap.within(precision):
        return [_whole(name, f"apart from its body, its numbers are off by up to {gap.worst:.2g}")]
    policy.head = head
    return []


def _whole(name: str, why: str) -> str:
    return (
        f"{name} computes its logits itself, those of all tokens of a micro-batch at once: learner.logits_chunk does "
        f"not bound their memory, learner.tokens_per_micro_batch does. Of its output head, {why}"
    )


@contextmanager
def _amplified(body: torch.nn.Module) -> Iterator[None]:
    """Within it the body's hidden states are AMPLIFIED times as large."""

    def amplify(module: torch.nn.Module, arguments: Any, output: Any) -> None:
        output.last_hidden_state.mul_(AMPLIFIED)

    hook = body.register_forward_hook(amplify)
    try:
        yield
    finally:
        hook.remove()
