"""Packed samples give what padded ones give, and what transformers gives sample by sample: values and gradients."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlaif_ray.algorithm.logprobs import token_logprobs_and_entropy
from rlaif_ray.attention import PACKED
from rlaif_ray.learner.modules import CausalPolicy, Critic
from rlaif_ray.learner.packing import build_input, register_packed_attention
from rlaif_ray.models import load_backbone, load_causal_lm
from tests.learner_ranks import plain_hidden, plain_logprobs, random_samples
from tests.tiny import cached_tiny_model

Samples = tuple[list[tuple[int, ...]], list[tuple[int, ...]]]

# Prompt lengths, and the completion lengths of each prompt's samples.
BATCHES: dict[str, Samples] = {
    "one_sample": random_samples([5], [[7]]),
    "one_token_each": random_samples([1], [[1]]),
    "shared_prompt": random_samples([9], [[4, 1, 6, 6]], seed=1),
    "mixed": random_samples([2, 40, 1, 11], [[1, 30], [3], [1], [8, 2, 1]], seed=2),
    "longest_prompt_shortest_answer": random_samples([70, 3], [[1], [55]], seed=3),
}
# One prompt twice but not side by side: its samples must still go back to their own places.
_prompts, _completions = random_samples([6, 4], [[3, 5], [2, 4]], seed=4)
BATCHES["interleaved"] = [_prompts[i] for i in (0, 2, 1, 3)], [_completions[i] for i in (0, 2, 1, 3)]


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For models this small a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(params=["tied", "untied", "sliding_window"])
def model_folder(request: pytest.FixtureRequest) -> str:
    if request.param == "sliding_window":
        return str(request.getfixturevalue("mistral"))
    return str(cached_tiny_model(tied=request.param == "tied"))


def load(folder: str, attention: str, *, body: bool = False) -> Any:
    register_packed_attention()
    loader = load_backbone if body else load_causal_lm
    return loader(folder, dtype=torch.float32, attention=attention)


def weights_by_token(completions: Sequence[Sequence[int]]) -> Tensor:
    """(M,) fixed weights of unlike size and sign: a token mixed up with another one changes the loss."""
    return torch.linspace(-1.0, 2.0, sum(len(c) for c in completions)) ** 3


def assert_same_gradients(got: torch.nn.Module, want: torch.nn.Module) -> None:
    """Equal to 1e-5 of each tensor's largest gradient (or, where that is about 0, of a twentieth of the model's)."""
    theirs = dict(want.named_parameters())
    floor = 0.05 * max(float(p.grad.abs().max()) for p in want.parameters() if p.grad is not None)
    for name, parameter in got.named_parameters():
        expected = theirs[name].grad
        assert parameter.grad is not None and expected is not None, name
        off = (parameter.grad - expected).abs().max() / expected.abs().max().clamp(min=floor)
        assert off < 1e-5, f"{name}: off by {off:.1e} of the largest gradient"


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("attention", [PACKED, "sdpa"])
def test_policy_equals_transformers_sample_by_sample(model_folder: str, batch: str, attention: str) -> None:
    prompts, completions = BATCHES[batch]
    model, plain = load(model_folder, attention), load(model_folder, "eager")
    laid_out = build_input(prompts, completions, packed=attention == PACKED, device="cpu")
    assert laid_out.targets.tolist() == [t for c in completions for t in c]

    logprobs, _ = token_logprobs_and_entropy(CausalPolicy(model)(laid_out), laid_out.targets, 0.7)
    expected = torch.cat(plain_logprobs(plain, prompts, completions, 0.7))
    torch.testing.assert_close(logprobs, expected, rtol=0, atol=1e-5)

    weights = weights_by_token(completions)
    (logprobs * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_same_gradients(model, plain)


@pytest.mark.parametrize("batch", BATCHES)
@pytest.mark.parametrize("attention", [PACKED, "sdpa"])
def test_critic_equals_transformers_sample_by_sample(model_folder: str, batch: str, attention: str) -> None:
    prompts, completions = BATCHES[batch]
    critic, plain = Critic(load(model_folder, attention, body=True)), load(model_folder, "eager", body=True)
    assert not critic.head.weight.any() and not critic.head.bias.any()  # starts as the value 0 everywhere
    with torch.no_grad():
        critic.head.weight.copy_(torch.linspace(-0.1, 0.1, critic.head.in_features))
        critic.head.bias.fill_(0.5)
    values = critic(build_input(prompts, completions, packed=attention == PACKED, device="cpu"))
    expected = torch.cat(plain_hidden(plain, prompts, completions)) @ critic.head.weight.detach()[0] + 0.5
    torch.testing.assert_close(values, expected, rtol=0, atol=1e-5)

    weights = weights_by_token(completions)
    (values * weights).sum().backward()
    (expected * weights).sum().backward()
    assert_same_gradients(critic.body, plain)


def test_shared_prompts_stand_in_the_row_once() -> None:
    # prompt 3 tokens, completions 2 and 4: the last token of each is predicted, never read -> 3 + 1 + 3 inputs
    laid_out = build_input([(5, 6, 7), (5, 6, 7)], [(8, 9), (10, 11, 12, 13)], packed=True, device="cpu")
    assert laid_out.tokens.tolist() == [[5, 6, 7, 8, 10, 11, 12]]
    assert laid_out.positions.tolist() == [[0, 1, 2, 3, 3, 4, 5]]
    assert laid_out.columns.tolist() == [2, 3, 2, 4, 5, 6]
    assert laid_out.targets.tolist() == [8, 9, 10, 11, 12, 13]
    layout = laid_out.attention["packed_layout"]
    assert layout.cumulative_queries.tolist() == [0, 3, 4, 7]
    assert layout.cumulative_keys.tolist() == [0, 3, 7, 13]
    assert layout.keys.tolist() == [0, 1, 2, 0, 1, 2, 3, 0, 1, 2, 4, 5, 6]
    assert (layout.longest_query, layout.longest_key) == (3, 6)


def test_sliding_window_is_felt(mistral: Path) -> None:
    """Ten tokens back is out of sight of two layers with a window of four: at most 2 * 3 tokens reach back."""
    model = CausalPolicy(load(str(mistral), PACKED))
    prompt, completion = list(range(20, 32)), [5, 6]

    def logits(first: int) -> Tensor:
        return model(build_input([[first, *prompt[1:]]], [completion], packed=True, device="cpu")).detach()

    torch.testing.assert_close(logits(20), logits(99), rtol=0, atol=0)
    near = list(prompt)
    near[-3] = 99
    changed = model(build_input([near], [completion], packed=True, device="cpu")).detach()
    assert (changed - logits(20)).abs().max() > 1e-3


@pytest.mark.parametrize("attention", [PACKED, "sdpa"])
def test_loss_equals_transformers_own_with_labels(model_folder: str, attention: str) -> None:
    prompts, completions = BATCHES["mixed"]
    model, plain = load(model_folder, attention), load(model_folder, "sdpa")
    laid_out = build_input(prompts, completions, packed=attention == PACKED, device="cpu")
    logprobs, _ = token_logprobs_and_entropy(CausalPolicy(model)(laid_out), laid_out.targets, 1.0)

    width = max(len(p) + len(c) for p, c in zip(prompts, completions, strict=True))
    ids, seen, labels = [], [], []
    for p, c in zip(prompts, completions, strict=True):
        rest = width - len(p) - len(c)
        ids.append([*p, *c] + [0] * rest)
        seen.append([1] * (width - rest) + [0] * rest)
        labels.append([-100] * len(p) + list(c) + [-100] * rest)
    loss = plain(
        input_ids=torch.tensor(ids), attention_mask=torch.tensor(seen), labels=torch.tensor(labels), use_cache=False
    ).loss
    torch.testing.assert_close(-logprobs.mean(), loss, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("attention", [PACKED, "sdpa"])
def test_gradient_checkpointing_changes_no_gradient(attention: str) -> None:
    prompts, completions = BATCHES["mixed"]
    folder = str(cached_tiny_model(tied=True))
    runs: list[tuple[Any, int]] = []
    for checkpointing in (False, True):
        model = load(folder, attention).train()
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        calls: list[int] = []
        model.model.layers[0].mlp.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        laid_out = build_input(prompts, completions, packed=attention == PACKED, device="cpu")
        logprobs, _ = token_logprobs_and_entropy(CausalPolicy(model)(laid_out), laid_out.targets, 1.0)
        (logprobs * weights_by_token(completions)).sum().backward()
        runs.append((model, len(calls)))
    assert [calls for _, calls in runs] == [1, 2]  # the second forward pass is the recomputation
    assert_same_gradients(runs[1][0], runs[0][0])
