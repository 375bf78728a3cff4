"""A language model with its output head apart gives what its own forward pass gives, for all kinds of heads."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

from rlaif_ray.algorithm.logprobs import LogitRule, token_logprobs_and_entropy
from rlaif_ray.attention import PACKED
from rlaif_ray.learner.head import logit_rule, settle_head
from rlaif_ray.learner.modules import CausalPolicy
from rlaif_ray.learner.packing import build_input
from tests.learner_ranks import random_samples
from tests.unit.learner.test_windows import windowed_config
from tests.zoo import zoo_model

pytestmark = pytest.mark.usefixtures("one_thread")

PROMPTS, COMPLETIONS = random_samples([9, 3, 12], [[8, 2, 6], [30], [1, 5]], seed=7)
CHUNK = 7  # of 52 tokens
KINDS: dict[str, LogitRule] = {
    "llama": LogitRule(),
    "gpt2": LogitRule(),  # tied, and its body is no `model`
    "phi": LogitRule(),  # its head has a bias
    "gemma2": LogitRule(softcap=2.0),
    "gemma3n_text": LogitRule(softcap=2.0),
    "cohere": LogitRule(scale=0.3),
    "granite": LogitRule(scale=1 / 3.0),
}
FIELDS = {
    "gemma2": {"final_logit_softcapping": 2.0},
    "gemma3n_text": {"final_logit_softcapping": 2.0},
    "cohere": {"logit_scale": 0.3},
    "granite": {"logits_scaling": 3.0},
}


def model_of(kind: str, attention: str) -> Any:
    config = windowed_config(kind)
    for name, value in FIELDS.get(kind, {}).items():
        setattr(config, name, value)
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation=attention)
    with torch.no_grad():
        for parameter in model.parameters():  # logits of a few nats, which a cap bends
            parameter.add_(torch.randn_like(parameter), alpha=0.15 if parameter.ndim > 1 else 0.05)
    return model.eval()


def settled(model: Any, chunk: int | None = CHUNK, *, packed: bool = False) -> CausalPolicy:
    policy = CausalPolicy(model, chunk)
    where: dict[str, Any] = {"packed": packed, "device": torch.device("cpu"), "precision": "fp32"}
    settle_head(policy, policy, name="x", **where)
    return policy


@pytest.mark.parametrize(
    ("kind", "attention"),
    [(kind, how) for kind in KINDS for how in (PACKED, "eager") if (kind, how) != ("gemma2", PACKED)],  # never packed
)
def test_values_and_gradients_are_those_of_the_models_own_logits(kind: str, attention: str) -> None:
    packed = attention == PACKED
    model, plain = model_of(kind, attention), model_of(kind, attention)
    policy = settled(model, packed=packed)
    assert policy.head is not None and logit_rule(model.config) == KINDS[kind]
    batch = build_input(PROMPTS, COMPLETIONS, packed=packed, device="cpu")
    logprobs, entropy = policy(batch, 0.7)
    assert not entropy.requires_grad
    logits = CausalPolicy(plain)(batch)
    expected, wanted = token_logprobs_and_entropy(logits, batch.targets, 0.7)
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=2e-5)
    torch.testing.assert_close(entropy, wanted, rtol=0, atol=2e-5)
    weights = torch.linspace(-1.0, 2.0, len(batch.targets)) ** 3
    (logprobs * weights).sum().backward()
    (expected * weights).sum().backward()
    theirs = dict(plain.named_parameters())
    floor = 0.05 * max(float(p.grad.abs().max()) for p in theirs.values() if p.grad is not None)
    for name, parameter in model.named_parameters():
        other = theirs[name].grad
        if other is None:
            assert parameter.grad is None, name
            continue
        off = (parameter.grad - other).abs().max() / other.abs().max().clamp(min=floor)
        assert off < 2e-5, f"{name}: off by {off:.1e} of the largest gradient"


def test_a_head_as_one_chunk_gives_the_same_numbers() -> None:
    model = model_of("llama", PACKED)
    batch = build_input(PROMPTS, COMPLETIONS, packed=True, device="cpu")
    with torch.no_grad():
        found = [settled(model, chunk, packed=True)(batch, 0.7) for chunk in (CHUNK, 4096, None)]
    for logprobs, entropy in found[:2]:
        torch.testing.assert_close(logprobs, found[2][0], rtol=0, atol=1e-5)
        torch.testing.assert_close(entropy, found[2][1], rtol=0, atol=1e-5)


def test_a_model_that_does_more_to_its_logits_computes_them_itself() -> None:
    model = zoo_model("recurrent_gemma")  # its soft cap has a name of its own
    assert logit_rule(model.config) == LogitRule() and CausalPolicy(model, CHUNK).head is not None
    policy = settled(model)
    assert policy.head is None
    batch = build_input(PROMPTS, COMPLETIONS, packed=False, device="cpu")
    with torch.no_grad():
        expected = token_logprobs_and_entropy(policy(batch), batch.targets, 0.7)
        torch.testing.assert_close(policy(batch, 0.7), expected)


def test_a_body_that_does_not_give_its_states_keeps_its_head(monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of("llama", "eager")
    body = type(model.model)

    class Bare(body):  # type: ignore[misc, valid-type]
        def forward(self, *args: Any, **kwargs: Any) -> Any:
            return super().forward(*args, **kwargs).to_tuple()

    model.model.__class__ = Bare
    assert settled(model).head is None


def test_the_head_is_called_once_however_many_chunks() -> None:
    """ZeRO-3 gathers it at each call, on all ranks together, and ranks have unlike numbers of chunks."""
    model = model_of("llama", PACKED)
    policy, calls = settled(model, packed=True), []
    model.lm_head.register_forward_pre_hook(lambda *_: calls.append(1))
    for prompts, completions in ((PROMPTS, COMPLETIONS), (PROMPTS[:1], COMPLETIONS[:1])):
        policy(build_input(prompts, completions, packed=True, device="cpu"), 1.0)[0].sum().backward()
    assert len(calls) == 2
    assert "forward" not in vars(model.lm_head)  # as it was


def test_a_model_that_keeps_its_head_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    where: dict[str, Any] = {"name": "org/x", "packed": False, "device": torch.device("cpu"), "precision": "fp32"}
    policy = CausalPolicy(model_of("llama", "eager"), CHUNK)
    assert settle_head(policy, policy, **where) == []
    policy = CausalPolicy(zoo_model("recurrent_gemma"), CHUNK)
    [note] = settle_head(policy, policy, **where)
    assert note.startswith("org/x computes its logits itself") and "learner.tokens_per_micro_batch" in note

    def broken(*_: Any, **__: Any) -> Any:
        raise AssertionError("no such state")  # as the probe of packing takes it

    policy = CausalPolicy(model_of("llama", "eager"), CHUNK)
    monkeypatch.setattr(policy.head.body, "forward", broken)
    whole = CausalPolicy(model_of("llama", "eager"))
    [note] = settle_head(policy, lambda batch, t: (policy if policy.head is not None else whole)(batch, t), **where)
    assert policy.head is None and "AssertionError: no such state" in note
