"""The nouns that travel between rooms: frozen, typed, shapes on every field.

Letters: B samples of a batch, T completion tokens (right-padded to the longest), V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a conversation."""

    role: str  # "system", "user" or "assistant"
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the policy answers."""

    id: str  # unique within its data set
    messages: tuple[Message, ...]
    tokens: tuple[int, ...]  # the rendered chat, generation prompt included, in the policy's tokens
    text: str = ""  # the conversation as plain text, as a judge reads it
    opened: str = ""  # the thought that `tokens` leave open, such as "<think>\n": answers' texts begin with it
    tags: tuple[str, ...] | None = None  # how thoughts begin that its policy knows; None: answers come from elsewhere


@dataclass(frozen=True, slots=True)
class Completion:
    """One sampled answer, with everything PPO needs to know about how it came to be."""

    prompt: Prompt
    sample: int  # index among the samples of this prompt
    tokens: tuple[int, ...]  # sampled tokens, the end-of-sequence token included; empty only for a failure
    logprobs: tuple[float, ...]  # log-probability of each token at the sampling temperature, by the engine
    text: str  # decoded without special tokens, after what the prompt has opened
    finished: bool  # ended by the model (end-of-sequence), not cut at the token limit
    weight_version: int  # of the weights that sampled it
    failure: str | None = None  # "quarantined": the prompt ends engines, and there is no answer
    prompt_logprobs: tuple[float, ...] = ()  # on request: of the prompt's tokens but the first, at temperature 1


@dataclass(frozen=True, slots=True)
class TokenQuery:
    """Asks an engine for the log-probabilities of a few candidate next tokens."""

    prompt: tuple[int, ...]
    candidates: tuple[int, ...]  # at most 128 distinct token ids


@dataclass(frozen=True, slots=True)
class TokenAnswer:
    """The engine's answer to a TokenQuery; `failure` is a reason and then `logprobs` is empty."""

    logprobs: tuple[float, ...]  # one per candidate, in their order, over the full vocabulary at temperature 1
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Score:
    """A judgement of one completion. A failed one has no value: failure to judge is not a judgement."""

    value: float | None  # in the scorer's range, [-1, 1] for a judge; None when failed
    failure: str | None = None  # reason: "too_long", "engine_error", "no_probability", "open_thought"
    evidence: dict[str, Any] = field(default_factory=dict)  # what the judge said: shown, never trained on
    tokens_in: int = 0  # tokens the judge read


@dataclass(frozen=True, slots=True)
class Comparison:
    """Two responses to one prompt; a judge is to say which is better."""

    id: str
    prompt: str  # the conversation as plain text
    response_a: str
    response_b: str


@dataclass(frozen=True, slots=True)
class Question:
    """What a judge is asked. User texts in it are neutralised: nothing in it acts as a control token."""

    turns: tuple[Message, ...]  # ends with the user's; the judge writes next
    answer_prefix: str = ""  # how the judge's own turn begins, where a judge lets us begin it (local ones do)
    answers: tuple[str, ...] = ()  # the answers whose probabilities are read; none when free text is asked for
    asks_for: str = ""  # "better" or "worse" where an answer names a response: "1 is better" answers only the former


@dataclass(frozen=True, slots=True)
class Answer:
    """How likely a judge is to give each answer; `failure` is a reason and then there are no probabilities."""

    probabilities: tuple[float, ...]  # one per answer of the question, adding up to 1; () when failed
    outside: float = 0.0  # probability of everything else, before the answers were renormalised
    hard: bool = False  # read off the judge's text, 1 for what it said: it gave no probabilities
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0  # by the prices in the config
    failure: str | None = None  # "too_long", "engine_error: ...", "no_probability", "unparsed", ...

    @property
    def mass(self) -> float:
        """Probability of all answers together, before they were renormalised."""
        return 1.0 - self.outside


@dataclass(frozen=True, slots=True)
class Explanation:
    """Free texts of a judge, one per sample asked for; `failure` is a reason and then there are none."""

    texts: tuple[str, ...]
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Label:
    """An AI preference label. A failed one has no `p_a`: failure to judge is not a judgement."""

    p_a: float | None  # probability that response a is better, orders averaged
    p_a_forward: float | None = None  # with a shown first
    p_a_reversed: float | None = None  # with b shown first, mapped back to a
    rationales: tuple[str, ...] = ()  # those with a shown first, then those with b shown first
    principle: str | None = None  # id of the constitution's principle it was asked by
    hard: bool = False
    answer_mass: float | None = None  # probability of all answers together, of the order that has less; None: no model
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    cut: int = 0  # characters left out of the middle of the prompt
    failure: str | None = None


@dataclass(frozen=True, slots=True)
class Sample:
    """A completion that was scored."""

    completion: Completion
    score: Score


@dataclass(frozen=True, slots=True)
class Experience:
    """A scored batch as the learner trains on it. Rows are samples; columns are completion tokens.

    `advantages` and `returns` are None until `pipelines` adds them (algorithm.advantages).
    """

    prompt_tokens: tuple[tuple[int, ...], ...]  # B prompts, ragged
    tokens: Tensor  # (B, T) int64 completion tokens, 0 outside the mask
    mask: Tensor  # (B, T) bool, True on completion tokens (a prefix of each row)
    finished: Tensor  # (B,) bool, ended by end-of-sequence
    scores: Tensor  # (B,) judge or reward-model score
    groups: Tensor  # (B,) int64, equal for samples of one prompt
    sampler_logprobs: Tensor  # (B, T) log-probability by the engine that sampled
    logprobs: Tensor  # (B, T) log-probability under the policy before this update
    ref_logprobs: Tensor | None  # (B, T) log-probability under the frozen reference
    values: Tensor | None  # (B, T) critic's value before each token; None without a critic
    kl_coef: float = 0.0  # of this iteration; enters the loss where the KL does (grpo)
    advantages: Tensor | None = None  # (B, T)
    returns: Tensor | None = None  # (B, T) regression target of the critic

    def __len__(self) -> int:
        return int(self.mask.shape[0])


@dataclass(frozen=True, slots=True)
class SyncReport:
    """What one weight push did."""

    version: int
    bytes: int  # sent per engine
    seconds: float
    checksum: str  # of the weights sent; equal on both ends
