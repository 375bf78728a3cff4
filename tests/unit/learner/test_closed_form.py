"""A toy whose optimum is known: one prompt, one token, a reward per token, a KL penalty of weight beta.

The policy that maximises E[r] - beta KL(policy || reference) is softmax(log p_ref + r / beta). GRPO's k3 term has the
gradient of the other divergence, KL(reference || policy); its fixed point solves p (r - E[r]) = beta (p - p_ref),
which is p = beta p_ref / (beta + E[r] - r). Real pieces all the way: RlRank on DeepSpeed, the pipeline's rewards and
advantages; only the sampling of the one token is torch's own, from the log-probabilities that RlRank reports.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from rlaif_ray.config.jobs import TrainJob
from rlaif_ray.learner.engine import RankSpec
from rlaif_ray.pipelines.experience import add_advantages
from tests.jobs import embedded
from tests.learner_ranks import RankProcesses, make_experience

pytestmark = pytest.mark.slow

VOCABULARY, PROMPT = 16, (3, 1, 4)
BETA = {"ppo": 0.5, "reinforce": 0.5, "rloo": 0.5, "grpo": 1.0}  # grpo's fixed point needs beta > max r - E[r]
SAMPLES, STEPS = 256, 150
REWARDS = torch.cos(torch.arange(VOCABULARY) * 1.7)  # in [-1, 1], no two alike


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("toy")
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        max_position_embeddings=16,
        tie_word_embeddings=False,
        initializer_range=0.1,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def train_toy(spec: RankSpec, job: TrainJob) -> tuple[Tensor, Tensor]:
    """(V,) log-probabilities of the only token, before and after training."""
    from rlaif_ray.learner.ppo import RlRank

    rank = RlRank(job, spec, "fp32")
    tokens = [(v,) for v in range(VOCABULARY)]
    generator = torch.Generator().manual_seed(job.seed)

    def look() -> dict[str, Tensor]:
        """(V,) for each possible token: "policy", "ref" and perhaps "values"."""
        found = rank.annotate([PROMPT] * VOCABULARY, tokens, (tuple(range(VOCABULARY)),), with_policy=True)
        return {name: torch.cat([found[v][name] for v in range(VOCABULARY)]) for name in found[0]}

    everything = tuple(range(SAMPLES))
    first = look()["policy"]
    for _ in range(job.steps):
        now = look()
        drawn = torch.multinomial(now["policy"].exp(), SAMPLES, replacement=True, generator=generator)
        experience = make_experience(
            [PROMPT] * SAMPLES,
            [(v,) for v in drawn.tolist()],
            finished=torch.zeros(SAMPLES, dtype=torch.bool),
            scores=REWARDS[drawn],
            sampler_logprobs=now["policy"][drawn][:, None],
            logprobs=now["policy"][drawn][:, None],
            ref_logprobs=now["ref"][drawn][:, None],
            values=now["values"][drawn][:, None] if "values" in now else None,
        )
        experience = add_advantages(experience, job.algorithm, job.algorithm.kl.coef)
        rank.update(experience, [(SAMPLES, (everything,))] * job.algorithm.epochs)
    return first, look()["policy"]


def fixed_point(algorithm: str, reference: Tensor) -> Tensor:
    """(V,) probabilities where training should end."""
    beta = BETA[algorithm]
    if algorithm != "grpo":
        return torch.softmax(reference + REWARDS / beta, 0)
    weights = beta * reference.double().exp()
    low, high = float(REWARDS.max()) - beta, float(REWARDS.max())  # of E[r]; the sum falls from infinity to below 1
    for _ in range(100):
        middle = (low + high) / 2
        total = float((weights / (beta + middle - REWARDS)).sum())
        low, high = (middle, high) if total > 1 else (low, middle)
    return (weights / (beta + low - REWARDS)).float()


def total_variation(p: Tensor, q: Tensor) -> float:
    return float((p - q).abs().sum() / 2)


def test_the_fixed_points_solve_their_equations() -> None:
    reference = torch.full((VOCABULARY,), 1 / VOCABULARY).log()
    optimum = fixed_point("ppo", reference)
    torch.testing.assert_close(optimum[0] / optimum[1], torch.exp((REWARDS[0] - REWARDS[1]) / 0.5))
    p = fixed_point("grpo", reference)
    assert float(p.sum()) == pytest.approx(1.0, abs=1e-6)
    torch.testing.assert_close(p * (REWARDS - (p * REWARDS).sum()), (p - 1 / VOCABULARY), rtol=0, atol=1e-6)


@pytest.mark.parametrize(
    "algorithm",
    [
        pytest.param({"type": "ppo", "epochs": 2}, id="ppo"),
        pytest.param({"type": "ppo", "whiten_advantages": False, "value_clip": None}, id="ppo-not-whitened"),
        pytest.param({"type": "reinforce"}, id="reinforce"),
        pytest.param({"type": "rloo"}, id="rloo"),
        pytest.param({"type": "grpo", "scale_by_std": False}, id="grpo"),
    ],
)
def test_training_meets_the_closed_form(algorithm: dict[str, Any], toy: Path, one_rank: RankProcesses) -> None:
    kind = algorithm["type"]
    estimator = "k3" if kind == "grpo" else "k1"
    job = embedded(
        TrainJob,
        {
            "policy": {"model": str(toy)},
            "algorithm": {"kl": {"coef": BETA[kind], "estimator": estimator}, "missing_eos_penalty": None} | algorithm,
            "learner": {"lr": 5e-3, "critic_lr": 2e-2, "schedule": "linear"},
            "steps": STEPS,
        },
    )
    first, last = one_rank.run(train_toy, job)[0]
    target = fixed_point(kind, first)
    assert total_variation(first.exp(), target) > 0.2, "it starts too near to fail"
    assert total_variation(last.exp(), target) < 0.01
