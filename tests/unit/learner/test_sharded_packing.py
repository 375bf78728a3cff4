"""What every job on several GPUs uses together: ZeRO-3, gradient checkpointing, packed rows with shared prompts, a
sliding window and logits in chunks, on two ranks with unlike work. Values and gradients are those of transformers.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlaif_ray.data.batching import plan_ranks
from rlaif_ray.learner.engine import RankSpec
from rlaif_ray.learner.finetune import SftExample
from tests.learner_ranks import RankProcesses, full_weights, plain_logprobs, random_samples
from tests.unit.learner.test_sft import EPS, STEP, sft_job

pytestmark = pytest.mark.slow

# Prompts longer than the window, shared by up to three responses; one rank's rows make more chunks than the other's.
EXAMPLES = [
    SftExample(prompt, response)
    for prompt, response in zip(*random_samples([9, 3, 12], [[8, 2, 6], [30], [1, 5]], seed=7), strict=True)
]
SETTINGS: dict[str, Any] = {
    "ranks": 2,
    "zero_stage": 3,
    "gradient_checkpointing": True,
    "logits_chunk": 3,
    # DeepSpeed keeps weights as small as these whole unless told otherwise.
    "deepspeed_overrides": {"zero_optimization": {"stage3_param_persistence_threshold": 0}},
}


def one_step(spec: RankSpec, job: Any, examples: Sequence[SftExample]) -> dict[str, Any]:
    """One step of SGD; the losses before it, the weights after it, and what took part."""
    from rlaif_ray.learner.finetune import SftRank

    rank = SftRank(job, spec, "fp32", total_steps=1)
    lengths = [len(example) for example in examples]
    plan = plan_ranks(range(len(examples)), lengths, ranks=spec.world_size, budget=job.learner.tokens_per_micro_batch)
    losses = rank.losses(examples, plan[spec.rank])
    layers: list[int] = []
    rank._model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: layers.append(1))
    rank.train(examples, plan[spec.rank])
    return {
        "losses": losses,
        "weights": full_weights(rank),
        "packed": rank._packed,
        "apart": rank._learner.head is not None,  # type: ignore[attr-defined]
        "passes": len(layers) / len(plan[spec.rank]),
        "elements": [p.data.numel() for p in rank._model.parameters()],
        "tokens": [sum(len(examples[i].response) for i in micro) for micro in plan[spec.rank]],
    }


def by_hand(folder: Path) -> tuple[list[Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """(losses, gradients, weights before) by transformers' eager attention, one sample at a time."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32)
    logprobs = plain_logprobs(model, [e.prompt for e in EXAMPLES], [e.response for e in EXAMPLES])
    losses = [-part.sum() for part in logprobs]
    (torch.stack(losses).sum() / sum(len(e.response) for e in EXAMPLES)).backward()
    found = dict(model.named_parameters())
    return losses, {n: p.grad for n, p in found.items()}, {n: p.detach() for n, p in found.items()}


def test_together_they_are_transformers_alone(mistral: Path, two_ranks: RankProcesses) -> None:
    results = two_ranks.run(one_step, sft_job(policy={"model": str(mistral)}, learner=SETTINGS), EXAMPLES)
    losses, gradients, before = by_hand(mistral)
    for result in results:
        assert result["packed"] and result["apart"] and not any(result["elements"])
        assert result["passes"] == 2  # the second is the recomputation
    assert results[0]["tokens"] != results[1]["tokens"]
    found = results[0]["losses"] | results[1]["losses"]
    for i, loss in enumerate(losses):
        assert found[i] == pytest.approx(float(loss.detach()), rel=1e-5)
    floor = 0.05 * max(float(g.abs().max()) for g in gradients.values())
    for name, gradient in gradients.items():
        expected = before[name] - STEP * EPS * gradient / (gradient.abs() + EPS)  # AdamW that is all but SGD
        off = (results[0]["weights"][name] - expected).abs().max() / STEP / gradient.abs().max().clamp(min=floor)
        assert off < 1e-4, f"{name}: off by {off:.1e} of the largest gradient"
