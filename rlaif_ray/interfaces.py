"""The seams between rooms. Real engines and the scripted fakes stand behind the same protocols."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from rlaif_ray.types import Score

if TYPE_CHECKING:
    from rlaif_ray.storage import Place, StoredFile, StoredFolder
    from rlaif_ray.types import (
        Answer,
        Comparison,
        Completion,
        Experience,
        Explanation,
        Label,
        Prompt,
        Question,
        Sample,
        SyncReport,
        TokenAnswer,
        TokenQuery,
    )


# Waits until files are written; what they are, by path. Raises what kept them from being written.
WrittenFiles = Callable[[], "Mapping[str, StoredFile]"]


@dataclass(frozen=True, slots=True)
class GenerationSettings:
    """How to sample. The full distribution is sampled (no top-p, no top-k): PPO needs its log-probabilities."""

    samples_per_prompt: int
    max_new_tokens: int
    temperature: float
    seed: int  # every sample's own seed derives from this, the prompt's id and the sample index
    ignore_eos: bool = False  # force exactly max_new_tokens (benchmarks)
    prompt_logprobs: bool = False  # also read the log-probabilities of the prompt's own tokens


class Generator(Protocol):
    """A language model that samples text and reads next-token log-probabilities."""

    def generate(self, prompts: Sequence[Prompt], settings: GenerationSettings) -> list[Completion]:
        """Completions in the order of `prompts`, the samples of one prompt side by side."""
        ...

    def token_logprobs(self, queries: Sequence[TokenQuery]) -> list[TokenAnswer]:
        """One answer per query, in order. A query that fails gives an answer with a reason, not an exception."""
        ...


class Asker(Protocol):
    """A judge model behind questions: a local engine, or an endpoint. Several threads may ask at once."""

    name: str  # the judge's model, as records name it
    identity: str  # what its answers depend on beside the question (model, precision, ...), for remembering them
    special: tuple[str, ...]  # texts that act as control tokens on it: neutralised before they are asked

    def fits(self, question: Question) -> bool:
        """Whether the judge can read the question (and answer it)."""
        ...

    def answer(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        """(index, answer) as each comes, every index once. A question that fails gives an answer with a reason."""
        ...

    def explain(self, questions: Sequence[Question], settings: GenerationSettings) -> Iterator[tuple[int, Explanation]]:
        """(index, `settings.samples_per_prompt` texts) as each comes; greedy at temperature 0."""
        ...


class Labeler(Protocol):
    """Says of two responses which is better. Several threads may ask at once."""

    def label(self, comparisons: Sequence[Comparison]) -> list[Label]:
        """One label per comparison, in order; failures are Labels without `p_a`."""
        ...


class Scorer(Protocol):
    """Gives a completion its score: an AI judge, a reward model, or a mixture of them."""

    def score(self, completions: Sequence[Completion]) -> list[Score]:
        """One score per completion, in order; failures are Scores without a value."""
        ...


def score_answered(scorer: Scorer, completions: Sequence[Completion]) -> list[Score]:
    """One score per completion, in order. What has no answer is a failure, and the scorer does not see it; nor what
    was sampled with log-probabilities that are no numbers. A score that is no number is a failure."""
    failures = [c.failure or (None if all(map(math.isfinite, c.logprobs)) else "no_logprobs") for c in completions]
    answered = [c for c, failure in zip(completions, failures, strict=True) if failure is None]
    scores = iter(scorer.score(answered) if answered else ())
    return [_finite(next(scores)) if failure is None else Score(None, failure) for failure in failures]


def _finite(score: Score) -> Score:
    if score.value is None or math.isfinite(score.value):
        return score
    return replace(score, value=None, failure="no_value")


class Learner(Protocol):
    """Trains the policy (and critic), and knows the frozen reference."""

    def annotate(self, samples: Sequence[Sample]) -> Experience:
        """Turns scored samples into tensors with policy and reference log-probabilities and values."""
        ...

    def update(self, experience: Experience) -> dict[str, float]:
        """Runs the epochs and minibatches of one iteration; returns metrics by name."""
        ...

    def save_checkpoint(self, place: Place) -> WrittenFiles:
        """Copies its state to host memory, and writes it to files below `place` while it goes on."""
        ...

    def load_checkpoint(self, folder: StoredFolder) -> None:
        """Goes on from what was saved."""
        ...

    def save_policy(self, folder: str) -> list[str]:
        """Writes the policy as a Hugging Face folder (safetensors and tokenizer); returns what the user should know
        of it."""
        ...


class WeightSync(Protocol):
    """Carries the learner's weights to the rollout engines."""

    def push(self, version: int) -> SyncReport:
        """After this every engine samples with exactly the learner's weights, known as `version`."""
        ...
