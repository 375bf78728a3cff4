"""From completions and scores to advantages: the steps of an iteration that need no other process."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlaif_ray.algorithm import advantages as adv
from rlaif_ray.algorithm.kl import adaptive_kl_coef, kl_estimate
from rlaif_ray.algorithm.logprobs import masked_sum
from rlaif_ray.config.algorithms import GrpoConfig, PpoConfig, ReinforceConfig, RlooConfig
from rlaif_ray.errors import FeedbackError, StaleWeightsError
from rlaif_ray.feedback.answers import LOW_MASS
from rlaif_ray.types import Sample

if TYPE_CHECKING:
    from torch import Tensor

    from rlaif_ray.config.algorithms import AlgorithmConfig, KlConfig
    from rlaif_ray.types import Completion, Experience, Score


def check_fresh(completions: Sequence[Completion], version: int) -> None:
    """Every completion was sampled from the current weights.

    Raises:
        StaleWeightsError: one was not: PPO would take a step from a policy that no longer is.
    """
    other = Counter(c.weight_version for c in completions if c.weight_version != version)
    if other:
        raise StaleWeightsError(
            f"completions must come from weight version {version} (got {dict(other)}): an engine missed a weight sync. "
            f"Resume from the last checkpoint."
        )


def keep_scored(completions: Sequence[Completion], scores: Sequence[Score], min_scored_fraction: float) -> list[Sample]:
    """Completions that could be judged. A failed judgement is no judgement: it is left out, never scored 0.

    Raises:
        FeedbackError: a smaller share than `min_scored_fraction` was scored; says why the others were not.
    """
    samples = [Sample(c, s) for c, s in zip(completions, scores, strict=True) if s.value is not None]
    if len(samples) < min_scored_fraction * len(completions) or not samples:
        raise FeedbackError(
            f"feedback.min_scored_fraction={min_scored_fraction:g} of completions must be scored (got "
            f"{len(samples)} of {len(completions)}; failures: {failures_by_reason(scores)}): a policy must not train "
            f"only on what its judge could read. too_long: raise feedback.judge.max_context or lower max_new_tokens; "
            f"open_thought: raise max_new_tokens; engine_error: see the judge's log; "
            f"{LOW_MASS}: the judge would rather say something else than a number, "
            f"so use another judge or template; no_value, no_logprobs: scorer or engine give NaN, look at model and "
            f"precision; or lower feedback.min_scored_fraction."
        )
    return samples


def failures_by_reason(scores: Sequence[Score]) -> dict[str, int]:
    """How many judgements failed, by the reason's first word."""
    return dict(Counter(s.failure.split(":")[0] for s in scores if s.failure is not None))


def low_mass_fraction(scores: Sequence[Score]) -> float:
    """Share of all whose judge had too little probability on the answers."""
    # A mixture's failure has the scorer's name before the reason.
    return sum(s.failure is not None and s.failure.endswith(LOW_MASS) for s in scores) / max(1, len(scores))


def add_advantages(experience: Experience, algorithm: AlgorithmConfig, kl_coef: float) -> Experience:
    """Rewards with the KL penalty, then the algorithm's advantages (and returns, where there is a critic).

    `kl_coef` is this iteration's coefficient; the adaptive controller moves it.
    """
    mask, values = experience.mask, experience.values
    scores = adv.terminal_scores(experience.scores, experience.finished, algorithm.missing_eos_penalty)
    in_reward = 0.0 if isinstance(algorithm, GrpoConfig) else kl_coef
    rewards = adv.token_rewards(scores, token_kl(experience, algorithm.kl), mask, in_reward)
    returns = None
    match algorithm:
        case PpoConfig():
            assert values is not None
            advantages, returns = adv.gae(rewards, values, mask, algorithm.gamma, algorithm.lam)
        case ReinforceConfig():
            assert values is not None
            advantages, returns = adv.reinforce_advantages(rewards, values, mask, algorithm.gamma)
        case RlooConfig():
            advantages = adv.spread_over_tokens(adv.rloo_advantages(rewards.sum(1), experience.groups), mask)
        case GrpoConfig():
            group = adv.grpo_advantages(scores, experience.groups, scale=algorithm.scale_by_std)
            advantages = adv.spread_over_tokens(group, mask)
    if getattr(algorithm, "whiten_advantages", False):  # after the returns: the critic learns real values
        advantages = adv.whiten(advantages, mask)
    return replace(experience, advantages=advantages, returns=returns, kl_coef=kl_coef)


def token_kl(experience: Experience, cfg: KlConfig) -> Tensor:
    """(B, T) estimate of the KL to the reference at each token; zeros without a reference."""
    if experience.ref_logprobs is None:
        return experience.logprobs * 0.0
    return kl_estimate(experience.logprobs, experience.ref_logprobs, cfg.estimator)


def mean_kl(experience: Experience, cfg: KlConfig) -> float:
    """KL per sample in nats, by the configured estimator."""
    return float(masked_sum(token_kl(experience, cfg), experience.mask)) / len(experience)


def next_kl_coef(coef: float, kl: float, cfg: KlConfig, samples: int) -> float:
    """The coefficient of the next iteration: moved towards cfg.target, or the same without one."""
    if cfg.target is None or not math.isfinite(kl):  # of a batch that nothing was learned from
        return coef
    return adaptive_kl_coef(coef, kl, target=cfg.target, samples=samples, horizon=cfg.horizon)


def batch_metrics(completions: Sequence[Completion], scores: Sequence[Score]) -> dict[str, float]:
    """What the step's completions and scores look like; times are added by the loop."""
    values = [s.value for s in scores if s.value is not None]
    answered = [c for c in completions if c.failure is None]
    lengths = [len(c.tokens) for c in answered]
    mean = sum(values) / len(values) if values else float("nan")
    spread = (sum((v - mean) ** 2 for v in values) / len(values)) ** 0.5 if values else float("nan")
    outside = [mass for score in scores for mass in _outside_masses(score.evidence)]
    return {
        "reward/mean": mean,
        "reward/std": spread,
        "completion/length_mean": sum(lengths) / max(1, len(lengths)),
        "completion/eos_fraction": sum(c.finished for c in answered) / max(1, len(answered)),
        "completion/tokens": float(sum(lengths)),
        "feedback/scored_fraction": len(values) / len(scores),
        "feedback/failed": float(len(scores) - len(values)),
        **({"feedback/outside_mass": sum(outside) / len(outside)} if outside else {}),
        **({"feedback/low_answer_mass_fraction": low_mass_fraction(scores)} if outside else {}),
        **{f"feedback/failed_{reason}": float(n) for reason, n in failures_by_reason(scores).items()},
        **_part_means(scores),
    }


def _outside_masses(evidence: Mapping[str, Any]) -> list[float]:
    """Of a judge's score, or of each judge in a mixture's."""
    nested = [part["evidence"] for part in evidence.get("parts", {}).values()]
    return [found["outside_mass"] for found in (evidence, *nested) if "outside_mass" in found]


def _part_means(scores: Sequence[Score]) -> dict[str, float]:
    """Of a mixture: the mean of each scorer, over what it could score."""
    values: dict[str, list[float]] = {}
    for score in scores:
        for name, part in score.evidence.get("parts", {}).items():
            if part["value"] is not None:
                values.setdefault(name, []).append(part["value"])
    return {f"feedback/{name}_mean": sum(found) / len(found) for name, found in values.items()}


def rates(completions: Sequence[Completion], seconds: Mapping[str, float]) -> dict[str, float]:
    """Throughput of the step's phases, whose times are in `seconds`."""
    tokens = sum(len(c.tokens) for c in completions)
    return {
        "rollout/tokens_per_s": tokens / max(seconds["rollout"], 1e-9),
        "feedback/per_s": len(completions) / max(seconds["feedback"], 1e-9),
    }


def sample_rows(completions: Sequence[Completion], scores: Sequence[Score]) -> list[dict[str, Any]]:
    """Rows of samples.jsonl."""
    return [
        {
            "prompt_id": c.prompt.id,
            "sample": c.sample,
            "prompt": c.prompt.text,
            "completion": c.text,
            "score": s.value,
            "failure": s.failure,
            "finished": c.finished,
            "tokens": len(c.tokens),
            "weight_version": c.weight_version,
            "evidence": s.evidence,
        }
        for c, s in zip(completions, scores, strict=True)
    ]
