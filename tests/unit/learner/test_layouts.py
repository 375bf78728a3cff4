"""Every kind of architecture, laid out as the learner lays it out, gives what each of its samples gives alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rlaif_ray.attention import PACKED, AttentionPlan, padded_kernel, plan_attention
from rlaif_ray.errors import InputError
from rlaif_ray.learner.modules import CausalPolicy, Critic
from rlaif_ray.learner.packing import build_input, packed_attention
from rlaif_ray.learner.probe import (
    Gap,
    alone_outputs,
    compare,
    laid_out_outputs,
    logprobs_of,
    probe_text,
    settle_attention,
)
from tests.learner_ranks import plain_hidden, plain_logprobs, random_samples
from tests.zoo import ARCHITECTURES, VOCABULARY, zoo_config, zoo_model

# Longer than the probe's, in another order: what the probe lets pass must be right for others.
PROMPTS, COMPLETIONS = random_samples([9, 20, 2], [[4, 1, 14], [12], [3]], seed=1)
PACKS = {"llama", "qwen2_window", "deepseek_v3", "gpt2", "arcee"}
EAGER = {"gemma2", "gpt_oss", "falcon_alibi", "bloom", "mpt", "gptj", "mamba", "rwkv", "xlstm"}
CPU = torch.device("cpu")


pytestmark = pytest.mark.usefixtures("one_thread")


def settle(name: str, plan: AttentionPlan, **fields: Any) -> tuple[Any, str, str]:
    """(model, attention, note) as a learner has them."""
    model = zoo_model(name, plan.implementation, **fields)
    run = logprobs_of(CausalPolicy(model))
    return model, *settle_attention(plan, model, run, name=name, device=CPU, precision="fp32")


@pytest.mark.parametrize("name", ARCHITECTURES)
@torch.no_grad()
def test_chosen_layout_equals_each_sample_alone(name: str) -> None:
    model, attention, note = settle(name, plan_attention("auto", zoo_config(name), name))
    assert attention == (PACKED if name in PACKS else "eager" if name in EAGER else "sdpa")
    assert (note == "") == (name in PACKS)
    batch = build_input(PROMPTS, COMPLETIONS, packed=attention == PACKED, device=CPU)
    found = logprobs_of(CausalPolicy(model))(batch)
    expected = torch.cat(plain_logprobs(zoo_model(name), PROMPTS, COMPLETIONS))
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", ["arcee", "gpt_oss", "rwkv", "xlstm", "mamba", "qwen3_next", "bloom", "falcon_h1"])
@torch.no_grad()
def test_a_critic_has_the_layout_of_its_policy(name: str) -> None:
    _, attention, _ = settle(name, plan_attention("auto", zoo_config(name), name))
    body = zoo_model(name, attention, "AutoModel")
    critic = Critic(body)
    critic.head.weight.copy_(torch.linspace(-0.1, 0.1, critic.head.in_features))
    values = critic(build_input(PROMPTS, COMPLETIONS, packed=attention == PACKED, device=CPU))
    plain = zoo_model(name, "eager", "AutoModel")
    expected = torch.cat(plain_hidden(plain, PROMPTS, COMPLETIONS)) @ critic.head.weight[0]
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("gemma2", "softcap"),
        ("gpt_oss", "s_aux"),
        ("doge", "attention_mask"),
        ("llama4_text", "limit attention to 5 tokens"),
        ("nemotron", "bounds of samples"),
        ("deepseek_v32", "ends in TypeError"),
        ("recurrent_gemma", "off by"),
        ("lfm2", "off by"),
        ("granitemoehybrid", "off by"),
        ("gptj", "other attention than its own"),
        ("stablelm", "other attention than its own"),
    ],
)
def test_the_probe_alone_finds_what_must_not_be_packed(name: str, reason: str) -> None:
    """As for an architecture that nobody has tried."""
    _, attention, note = settle(name, AttentionPlan(padded_kernel(zoo_config(name)), "unknown"))
    assert attention != PACKED
    assert reason in note and name in note


def test_a_chunk_longer_than_the_probe_is_found() -> None:
    plan = AttentionPlan("sdpa", "unknown")
    _, attention, note = settle("llama4_text", plan, attention_chunk_size=128)
    assert attention == "sdpa" and "128 tokens" in note


@pytest.mark.parametrize("name", ["llama", "qwen2_window", "deepseek_v3", "gpt2"])
def test_the_probe_lets_pass_what_is_right(name: str) -> None:
    _, attention, note = settle(name, AttentionPlan("eager", "unknown"))
    assert (attention, note) == (PACKED, "")


def test_a_probe_leaves_the_model_as_it_was() -> None:
    model = zoo_model("gpt_oss").train()
    plan = AttentionPlan("eager", "unknown")
    settle_attention(plan, model, logprobs_of(CausalPolicy(model)), name="x", device=CPU, precision="fp32")
    assert model.config._attn_implementation == "eager"
    assert all(module.training for module in model.modules())
    assert not any(p.grad is not None for p in model.parameters())


def test_packing_asked_for_is_refused_where_the_probe_finds_it_wrong() -> None:
    plan = AttentionPlan("eager", "unknown", required=True)
    with pytest.raises(InputError, match=r"policy\.attention=packed is wrong for gpt_oss: .*s_aux"):
        settle("gpt_oss", plan)


def test_a_pass_that_breaks_off_under_zero3_is_a_refusal() -> None:
    model = zoo_model("deepseek_v32")
    run = logprobs_of(CausalPolicy(model))
    plan = AttentionPlan("eager", "unknown")
    with pytest.raises(InputError, match=r"TypeError.*policy\.attention=eager"):
        settle_attention(plan, model, run, name="x", device=CPU, precision="fp32", sharded=True)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"softcap": 30.0}, "softcap"),
        ({"s_aux": torch.zeros(2)}, "s_aux"),
        ({"position_bias": torch.zeros(1)}, "position_bias"),
        ({"indices": torch.zeros(1)}, "indices"),
        ({"never_heard_of": 1}, "never_heard_of"),
        ({"dropout": 0.1}, "dropout"),
        ({"is_causal": False}, "is_causal"),
        ({"attention_mask": torch.zeros(1)}, "attention_mask"),
        ({"packed_layout": None}, "bounds of samples"),
    ],
)
def test_packed_attention_swallows_no_argument(arguments: dict[str, Any], named: str) -> None:
    layout = build_input([(5, 6)], [(7, 8)], packed=True, device=CPU).attention["packed_layout"]
    qkv = torch.randn(1, 2, 3, 8)
    module = zoo_model("llama").model.layers[0].self_attn
    usual: dict[str, Any] = {"packed_layout": layout, "attention_mask": None}
    with pytest.raises(InputError, match=f"(?s)llama.*LlamaAttention.*{named}"):
        packed_attention(module, qkv, qkv, qkv, **usual | arguments)
    harmless = {"dropout": 0.0, "is_causal": True, "softcap": None, "position_ids": torch.arange(3), "use_cache": False}
    packed_attention(module, qkv, qkv, qkv, **usual | harmless)


def test_samples_whose_tokens_an_index_would_pick_by_batch_are_refused() -> None:
    model = zoo_model("deepseek_v32", index_topk=16)
    policy = CausalPolicy(model)
    policy(build_input([(5,) * 10], [(6,) * 6], packed=False, device=CPU))
    with pytest.raises(InputError, match=r"at most 16 tokens.*got 17"):
        policy(build_input([(5,) * 10], [(6,) * 7], packed=False, device=CPU))


def test_gaps() -> None:
    gap = compare(torch.tensor([0.0, 1.0, 2.0, 3.0]), torch.tensor([0.0, 1.0, 2.0, 3.4]))
    assert gap.mean == pytest.approx(0.1) and gap.worst == pytest.approx(0.4)
    assert compare(torch.tensor([0.0, torch.nan]), torch.zeros(2)).worst == torch.inf
    assert Gap(1e-4, 1e-3).within("fp32") and not Gap(1e-4, 2e-3).within("fp32")
    assert Gap(0.15, 0.9).within("bf16") and not Gap(0.2, 0.2).within("bf16")


def test_the_probe_text_fits_the_smallest_vocabularies() -> None:
    for vocabulary in (2, 4, VOCABULARY):
        text = probe_text(vocabulary)
        assert all(0 <= t < vocabulary for row in (*text.prompts, *text.completions) for t in row)
    assert probe_text(VOCABULARY) == probe_text(VOCABULARY)


def test_alone_and_laid_out_agree_on_order() -> None:
    run, text = logprobs_of(CausalPolicy(zoo_model("llama", PACKED))), probe_text(VOCABULARY)
    padded = logprobs_of(CausalPolicy(zoo_model("llama")))
    alone = alone_outputs(padded, text, CPU)
    assert len(alone) == sum(map(len, text.completions))
    assert compare(laid_out_outputs(run, text, packed=True, device=CPU), alone).within("fp32")
    assert compare(laid_out_outputs(padded, text, packed=False, device=CPU), alone).within("fp32")
