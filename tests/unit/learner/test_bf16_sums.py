"""What bf16 training keeps in fp32, on real DeepSpeed: the sum of gradients, the weights, the critic's values.

Gradients are given: a module whose gradient is its input. What became of their sum is read off the fp32 weights after a
step of AdamW without memory (betas 0) and with a huge eps, which moves a weight by lr * g / (|g| + eps).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from rlaif_ray.config.sections import LearnerConfig
from rlaif_ray.learner.engine import RankSpec
from rlaif_ray.learner.mixed_precision import MasterLinear
from tests.learner_ranks import RankProcesses

pytestmark = pytest.mark.slow

SIZE, MICRO_BATCHES = 3000, 64
EPS = 1e4
STAGES = [0, 1, 2, 3]


class Given(torch.nn.Module):
    """Its output's gradient is its input. In two parts, so that ranks share neither evenly; for a short input the first
    alone is used."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Parameter(torch.zeros(SIZE - 1000))
        self.second = torch.nn.Parameter(torch.zeros(1000))

    def forward(self, x: Tensor) -> Tensor:
        return self.first @ x if len(x) == len(self.first) else torch.cat([self.first, self.second]) @ x


def gradients(rank: int) -> list[Tensor]:
    """(SIZE,) bf16: a large one, and many that are 2^9 times smaller, all of them positive."""
    generator = torch.Generator().manual_seed(rank)
    sizes = [1.0] + [2.0**-9] * (MICRO_BATCHES - 1)
    return [(size * (1 + torch.rand(SIZE, generator=generator))).bfloat16() for size in sizes]


def learner(stage: int, ranks: int, **settings: Any) -> LearnerConfig:
    # Without the threshold DeepSpeed keeps so small a model whole.
    overrides = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    return LearnerConfig(zero_stage=stage, ranks=ranks, deepspeed_overrides=overrides, grad_clip=1e9, **settings)  # type: ignore[arg-type]


def step(spec: RankSpec, cfg: LearnerConfig) -> tuple[Tensor, float, str]:
    """One step: the fp32 weights after it, the norm that it reports, and DeepSpeed's optimizer."""
    from deepspeed.utils import safe_get_full_fp32_param

    from rlaif_ray.learner import engine as door

    door.join_ranks(spec, 60.0)
    engine = door.trainable_engine(Given(), cfg, lr=EPS, total_steps=1, precision="bf16")
    given = gradients(spec.rank)
    for x in given:
        door.backward(engine, engine(x), last=x is given[-1])
    stepped = door.optimizer_step(engine)
    assert stepped.applied
    weights = torch.cat([safe_get_full_fp32_param(p).clone() for p in engine.module.parameters()])
    return weights, stepped.norm, type(engine.optimizer).__name__


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize(
    ("stage", "device"), [*((stage, "none") for stage in STAGES), (1, "cpu"), (2, "cpu"), (3, "cpu")]
)
def test_small_gradients_add_up(request: pytest.FixtureRequest, count: int, stage: int, device: str) -> None:
    ranks: RankProcesses = request.getfixturevalue({1: "one_rank", 2: "two_ranks"}[count])
    cfg = learner(stage, count, eps=EPS, betas=(0.0, 0.0), offload={"optimizer": device})
    total = torch.stack([torch.stack(gradients(rank)).double().sum(0) for rank in range(count)]).mean(0)
    in_bf16 = torch.stack([gradients(rank)[0] for rank in range(count)]).double().mean(0)  # all that is left in bf16
    assert float((total / in_bf16).min()) > 1.05
    expected = -EPS * total / (total + EPS)
    for weights, norm, kind in ranks.run(step, cfg):
        torch.testing.assert_close(weights.double(), expected, rtol=2e-6, atol=0)
        assert norm == pytest.approx(float(total.norm()), rel=1e-5)
        assert "FP16" not in kind


def step_of_some(spec: RankSpec, cfg: LearnerConfig) -> tuple[Tensor, float]:
    """One step to which rank 0 gives gradients of the first parameter alone; the weights after it and the norm."""
    from deepspeed.utils import safe_get_full_fp32_param

    from rlaif_ray.learner import engine as door

    door.join_ranks(spec, 60.0)
    engine = door.trainable_engine(Given(), cfg, lr=EPS, total_steps=1, precision="bf16")
    x = torch.full((SIZE - 1000,), 3.0) if spec.rank == 0 else torch.full((SIZE,), 4.0)
    door.backward(engine, engine(x.bfloat16()), last=True)
    stepped = door.optimizer_step(engine)
    return torch.cat([safe_get_full_fp32_param(p).clone() for p in engine.module.parameters()]), stepped.norm


def test_a_parameter_that_one_rank_alone_used_counts_on_all(two_ranks: RankProcesses) -> None:
    cfg = learner(1, 2, eps=EPS, betas=(0.0, 0.0)).model_copy(update={"grad_clip": 1.0})
    total = torch.cat([torch.full((SIZE - 1000,), 3.5), torch.full((1000,), 2.0)])  # means of 3 and 4, of 0 and 4
    norm = float(total.norm())
    clipped = total / norm
    for weights, found in two_ranks.run(step_of_some, cfg):
        assert found == pytest.approx(norm, rel=1e-5)
        torch.testing.assert_close(weights, -EPS * clipped / (clipped + EPS), rtol=1e-4, atol=0)


# ---- The critic's head -----------------------------------------------------------------------------------------------


class Head(torch.nn.Module):
    """The critic's head alone: values of hidden states."""

    def __init__(self) -> None:
        super().__init__()
        self.head = MasterLinear(64, 1)
        torch.nn.init.zeros_(self.head.weight)
        torch.nn.init.zeros_(self.head.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        values: Tensor = self.head(hidden)[:, 0]
        return values


def hidden_states() -> Tensor:
    """(4, 64), the first without any: the value there is the bias."""
    hidden = (torch.randn(4, 64, generator=torch.Generator().manual_seed(0)) / 8).bfloat16()
    hidden[0] = 0
    return hidden


def values_of(spec: RankSpec, cfg: LearnerConfig, steps: int) -> tuple[list[Tensor], list[Tensor], torch.dtype]:
    """The values by steps and at the end, and the fp32 weight and bias then; each rank trains on half of the states."""
    from deepspeed.utils import safe_get_full_fp32_param

    from rlaif_ray.learner import engine as door

    door.join_ranks(spec, 60.0)
    torch.manual_seed(0)
    engine = door.trainable_engine(Head(), cfg, lr=cfg.lr, total_steps=steps, precision="bf16")
    hidden = hidden_states()
    target = torch.tensor([100.3, -99.7, 98.9, 101.6])
    seen = []
    for _ in range(steps):
        values = engine(hidden)
        seen.append(values.detach().clone())
        own = slice(spec.rank, None, spec.world_size)
        door.backward(engine, (values - target)[own].square().mean(), last=True)
        door.optimizer_step(engine)
    seen.append(engine(hidden).detach().clone())
    head = engine.module.head
    masters = [safe_get_full_fp32_param(p).clone() for p in (head.weight, head.bias)]
    return seen, masters, head.weight.dtype


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("stage", [0, 2, 3])
def test_values_are_not_rounded_to_bf16(request: pytest.FixtureRequest, count: int, stage: int) -> None:
    """bf16 has steps of 0.5 at 100. The values are those of the fp32 weights, and reach targets between the steps."""
    ranks: RankProcesses = request.getfixturevalue({1: "one_rank", 2: "two_ranks"}[count])
    # Gradient descent with steps of 0.75: the Hessian's eigenvalues lie between 0.1 and 2.5.
    cfg = learner(stage, count, lr=0.75e6, eps=1e6, betas=(0.0, 0.0))
    seen, (weight, bias), kind = ranks.run(values_of, cfg, 150)[0]
    assert kind == torch.bfloat16
    torch.testing.assert_close(seen[-1], hidden_states().float() @ weight[0] + bias, rtol=1e-6, atol=1e-5)
    assert float((seen[-1] - torch.tensor([100.3, -99.7, 98.9, 101.6])).abs().max()) < 0.02
