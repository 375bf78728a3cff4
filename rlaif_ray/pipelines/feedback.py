"""Feedback of a training run: read and checked first, started on the cluster, and one Scorer to the loop."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rlaif_ray.config.sections import JudgeFeedback, LengthFeedback, MixtureFeedback, RewardModelFeedback
from rlaif_ray.feedback.judge import Judge, check_context
from rlaif_ray.feedback.local import LocalAsker
from rlaif_ray.feedback.reward_model import LengthPenalty, MixtureScorer, check_reward_model, reward_renderer
from rlaif_ray.feedback.templates import Template, load_template
from rlaif_ray.pipelines.contexts import judge_context, load_chat

if TYPE_CHECKING:
    from rlaif_ray.chat.template import ChatTemplate
    from rlaif_ray.config.sections import FeedbackConfig
    from rlaif_ray.interfaces import Scorer
    from rlaif_ray.runtime.cluster import Cluster
    from rlaif_ray.types import Prompt


@dataclass(frozen=True, slots=True)
class JudgeInputs:
    """What a judge scores with."""

    cfg: JudgeFeedback
    template: Template
    chat: ChatTemplate
    context: int
    context_key: str  # the setting of its context


@dataclass(frozen=True, slots=True)
class FeedbackInputs:
    """What feedback needs, read and checked before any process starts."""

    cfg: FeedbackConfig
    judges: dict[str, JudgeInputs]  # by role, as in runtime/placement.py
    seed: int = 0  # of the codes in the frames that judges read


def parts(cfg: FeedbackConfig) -> Iterator[tuple[str, JudgeFeedback | RewardModelFeedback | LengthFeedback]]:
    """(role, scorer) of everything that gives a score."""
    match cfg:
        case JudgeFeedback():
            yield "judge", cfg
        case RewardModelFeedback():
            yield "reward_model", cfg
        case MixtureFeedback():
            yield from ((name, part.scorer) for name, part in cfg.scorers.items())


def read_feedback(cfg: FeedbackConfig, seed: int = 0, date: str | None = None) -> FeedbackInputs:
    """Templates, tokenizers and contexts; `seed` is of the codes in the frames that judges read, `date` is the run's
    to chat templates.

    Raises:
        InputError: any of them is wrong, or they don't fit together.
    """
    judges = {}
    for role, scorer in parts(cfg):
        key = f"feedback.scorers.{role}.scorer" if isinstance(cfg, MixtureFeedback) else "feedback"
        if isinstance(scorer, JudgeFeedback):
            judge = scorer.judge
            template = load_template(scorer.template)
            chat = load_chat(judge, date, f"{key}.judge", thinks=False)
            context_key = f"{key}.judge.max_context"
            context = judge_context(judge, context_key)
            check_context(chat, template, context, judge.model, context_key)
            judges[role] = JudgeInputs(scorer, template, chat, context, context_key)
        elif isinstance(scorer, RewardModelFeedback):
            check_reward_model(scorer, key)
    return FeedbackInputs(cfg, judges, seed)


def check_reward_templates(cfg: FeedbackConfig, prompts: Sequence[Prompt], date: str | None = None) -> None:
    """Raises InputError when a reward model would not read all of a prompt; its actors would find out late."""
    for role, scorer in parts(cfg):
        key = f"feedback.scorers.{role}.scorer" if isinstance(cfg, MixtureFeedback) else "feedback"
        if isinstance(scorer, RewardModelFeedback):
            chat = reward_renderer(scorer, date, key).chat
            for prompt in prompts:
                chat.must_reach(prompt.messages, f"prompt {prompt.id}")


def start_feedback(inputs: FeedbackInputs, cluster: Cluster) -> Scorer:
    """Starts what gives feedback; the cluster's `wait` waits for it."""
    scorers: dict[str, Scorer] = {}
    for role, scorer in parts(inputs.cfg):
        match scorer:
            case JudgeFeedback():
                own = inputs.judges[role]
                engines = cluster.start_judges(scorer.judge, context=own.context, role=role)
                asker = LocalAsker(engines, own.chat, own.context, scorer.judge.model)
                scorers[role] = Judge(
                    asker,
                    own.template,
                    min_answer_mass=scorer.judge.min_answer_mass,
                    seed=inputs.seed,
                    thoughts=scorer.thoughts,
                )
            case RewardModelFeedback():
                scorers[role] = cluster.start_reward_models(scorer, role=role)
            case LengthFeedback():
                scorers[role] = LengthPenalty(scorer.target_tokens)
    if isinstance(inputs.cfg, MixtureFeedback):
        weights = inputs.cfg.scorers
        return MixtureScorer({name: (weights[name].weight, scorer) for name, scorer in scorers.items()})
    return next(iter(scorers.values()))


def judge_of(scorer: Scorer) -> Judge:
    """The judge that `scorer` is, or the first one in a mixture; there must be one."""
    scorers = scorer.parts if isinstance(scorer, MixtureScorer) else [scorer]
    return next(one for one in scorers if isinstance(one, Judge))


def feedback_lines(cfg: FeedbackConfig) -> list[str]:
    """What `--dry-run` says of the judges' templates."""
    lines = []
    for role, scorer in parts(cfg):
        if isinstance(scorer, JudgeFeedback):
            template = load_template(scorer.template)
            lines.append(f"{role} template: {template.name} ({template.hash})")
    return lines
