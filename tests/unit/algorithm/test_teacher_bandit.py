"""Why a preference stage may seem to help where it only makes up for a weak teacher: the bandit of Sharma et al.

A hundred actions, the higher the better (2402.12366, section 5, and its notebook synthetic-rlaif). A weak student acts
around 40, a strong teacher around 80, and a perfect critic prefers the higher of two actions. Preferences between the
student's own samples say nothing about actions that it never takes, so the learned reward stays flat there; training on
the teacher's samples gets there at once. Shown with the loss that this package trains reward models by.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from rlaif_ray.algorithm.losses import preference_loss

ACTIONS = 100
STUDENT, TEACHER, WIDTH = 40.0, 80.0, 150**0.5
PAIRS = 250_000
BETA = 0.1  # of the KL penalty: the best policy is student * exp(reward / BETA)
STEPS, RATE = 300, 0.25  # a length of descent of 75, as 7,500 steps of 0.01 are

RANKS = torch.arange(ACTIONS, dtype=torch.float64)


def around(rank: float) -> Tensor:
    return torch.softmax(-((RANKS - rank) ** 2) / (2 * WIDTH**2), dim=0)


def sampled(policy: Tensor, count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(policy, count, replacement=True, generator=generator)


def learned_reward(policy: Tensor, seed: int) -> Tensor:
    """(100,) rewards fitted to the critic's preferences between pairs of the policy's samples."""
    first, second = sampled(policy, PAIRS, seed), sampled(policy, PAIRS, seed + 1)
    cells = torch.bincount(first * ACTIONS + second, minlength=ACTIONS**2)
    seen = cells.nonzero().squeeze(1)  # each pair of actions once, by how often it came
    share = cells[seen].double() / PAIRS
    a, b = seen // ACTIONS, seen % ACTIONS
    critic = (a > b).double() + 0.5 * (a == b).double()
    reward = torch.zeros(ACTIONS, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([reward], lr=RATE)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (share * preference_loss(reward[a], reward[b], critic)).sum().backward()
        optimizer.step()
    return reward.detach()


def finetuned(policy: Tensor, seed: int) -> Tensor:
    """(100,) the policy of maximum likelihood on the policy's samples, from a uniform start."""
    share = torch.bincount(sampled(policy, PAIRS, seed), minlength=ACTIONS).double() / PAIRS
    logits = torch.zeros(ACTIONS, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([logits], lr=10.0)
    for _ in range(STEPS):
        optimizer.zero_grad()
        (-(share * torch.log_softmax(logits, dim=0)).sum()).backward()
        optimizer.step()
    return torch.softmax(logits.detach(), dim=0)


def best_policy(reward: Tensor) -> Tensor:
    return torch.softmax(around(STUDENT).log() + reward / BETA, dim=0)


def mean(policy: Tensor) -> float:
    return float(policy @ RANKS)


@pytest.fixture(scope="module", params=[0, 100])
def seed(request: pytest.FixtureRequest) -> int:
    return int(request.param)


@pytest.fixture(scope="module")
def from_student(seed: int) -> Tensor:
    return learned_reward(around(STUDENT), seed)


def test_the_actors_are_where_the_paper_puts_them() -> None:
    student, teacher = around(STUDENT), around(TEACHER)
    assert mean(student) == pytest.approx(40, abs=0.1) and 77 < mean(teacher) < 80  # cut off at the last action
    assert torch.minimum(student, teacher).sum() < 0.11


def test_preferences_improve_the_student_but_do_not_reach_the_teacher(from_student: Tensor) -> None:
    policy = best_policy(from_student)
    assert STUDENT + 8 < mean(policy) < 60  # better than it was, and nowhere near
    assert policy[70:].sum() < 1e-3 < 0.7 < around(TEACHER)[70:].sum()


def test_the_learned_reward_is_flat_outside_the_students_samples(from_student: Tensor, seed: int) -> None:
    spread = from_student.max() - from_student.min()
    assert from_student[35:50].diff().min() > 0 and from_student[50] - from_student[30] > 0.5 * spread
    assert from_student[85:].max() - from_student[85:].min() < 0.02 * spread
    assert from_student[60] > 10 * from_student[85:].abs().max()  # what the critic likes best counts for nothing
    taken = torch.bincount(torch.cat([sampled(around(STUDENT), PAIRS, s) for s in (seed, seed + 1)]), minlength=ACTIONS)
    assert (taken == 0).any() and not from_student[taken == 0].any()  # exactly


def test_training_on_the_teachers_samples_gets_there(seed: int, from_student: Tensor) -> None:
    policy = finetuned(around(TEACHER), seed)
    assert mean(policy) == pytest.approx(mean(around(TEACHER)), abs=1.5)
    assert mean(policy) > mean(best_policy(from_student)) + 20


def test_preferences_on_samples_of_both_get_there_too(seed: int, from_student: Tensor) -> None:
    policy = best_policy(learned_reward((around(STUDENT) + around(TEACHER)) / 2, seed))
    assert mean(policy) > mean(best_policy(from_student)) + 15
    assert policy[70:].sum() > 0.5
