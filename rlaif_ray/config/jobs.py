"""One frozen pydantic class per job: what its YAML file may say. The sections are in `config/sections.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, ClassVar

from pydantic import Field

from rlaif_ray.config.algorithms import AlgorithmConfig, PpoConfig
from rlaif_ray.config.base import Config, not_file_names
from rlaif_ray.config.chat import ChatDate
from rlaif_ray.config.data_sections import (
    ArmConfig,
    DpoConfig,
    EvaluationConfig,
    HarmlessConfig,
    HelpfulConfig,
    LabelConfig,
    PairSamplingConfig,
    PairsToLabelConfig,
    PreferenceDataConfig,
    ResponseSamplingConfig,
    RevisionConfig,
    RewardConfig,
    SupervisedConfig,
    WinRateConfig,
)
from rlaif_ray.config.roles import ADJUSTABLE, HANDLING
from rlaif_ray.config.sections import (
    CheckpointConfig,
    ClusterConfig,
    DataConfig,
    EngineConfig,
    FeedbackConfig,
    GuardConfig,
    LearnerConfig,
    OrderedDataConfig,
    PolicyConfig,
    PreferenceJudge,
    RewardModelFeedback,
    SamplingConfig,
    TrackingConfig,
    WeightSyncConfig,
)


class TrainJob(Config):
    """`rlaif train`: RL from AI feedback."""

    policy: PolicyConfig
    data: DataConfig
    sampling: SamplingConfig = SamplingConfig()
    rollout: EngineConfig = EngineConfig()
    feedback: FeedbackConfig
    algorithm: AlgorithmConfig = PpoConfig()
    learner: LearnerConfig = LearnerConfig()
    weight_sync: Annotated[WeightSyncConfig, HANDLING] = WeightSyncConfig()
    guard: Annotated[GuardConfig, HANDLING] = GuardConfig()
    cluster: Annotated[ClusterConfig, HANDLING] = ClusterConfig()
    checkpoint: Annotated[CheckpointConfig, HANDLING] = CheckpointConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    tracking: Annotated[TrackingConfig, HANDLING] = TrackingConfig()
    steps: Annotated[int, Field(ge=1), ADJUSTABLE] = 100
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    chat_date: ChatDate = None
    run_dir: Annotated[str | None, HANDLING] = None
    """This run's own folder; default runs/<config>-<time>."""

    @property
    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole run."""
        return self.steps * self.algorithm.epochs * self.algorithm.minibatches

    def _problems(self) -> Iterator[str]:
        algorithm, sampling, learner = self.algorithm, self.sampling, self.learner
        if algorithm.type in ("grpo", "rloo") and sampling.samples_per_prompt < 2:
            yield (
                f"algorithm.type={algorithm.type} needs sampling.samples_per_prompt >= 2 "
                f"(got {sampling.samples_per_prompt}): with one sample every advantage is zero. "
                f"Raise it, or use algorithm.type=ppo."
            )
        if sampling.batch_size % algorithm.minibatches:
            yield (
                f"algorithm.minibatches must divide the {sampling.batch_size} samples of a step "
                f"(sampling.prompts_per_step x sampling.samples_per_prompt; got {algorithm.minibatches}): minibatches "
                f"of unequal size would weigh samples unequally. Use a divisor of {sampling.batch_size}."
            )
        elif sampling.batch_size // algorithm.minibatches < learner.groups:
            groups = "learner.ranks" if learner.sequence_parallel == 1 else "learner.ranks / learner.sequence_parallel"
            yield (
                f"{groups} must not exceed the {sampling.batch_size // algorithm.minibatches} samples of a "
                f"minibatch (sampling.prompts_per_step x sampling.samples_per_prompt / algorithm.minibatches; "
                f"got {learner.groups}): a rank would have nothing to train on. "
                f"Use fewer ranks or minibatches, or more prompts per step."
            )
        if learner.warmup_steps >= self.optimizer_steps:
            yield (
                f"learner.warmup_steps must be below the run's {self.optimizer_steps} optimizer steps "
                f"(steps x algorithm.epochs x algorithm.minibatches; got {learner.warmup_steps}): the learning rate "
                f"would never be reached. Lower it or raise steps."
            )
        if self.rollout.max_context is not None and sampling.max_new_tokens >= self.rollout.max_context:
            yield (
                f"sampling.max_new_tokens must be below rollout.max_context={self.rollout.max_context} "
                f"(got {sampling.max_new_tokens}): no room is left for a prompt. Lower it or raise max_context."
            )
        feedback = self.feedback
        given = [p.scorer.type for p in feedback.scorers.values()] if feedback.type == "mixture" else [feedback.type]
        if self.evaluation.harmless is not None and "judge" not in given:
            yield (
                f"evaluation.harmless needs feedback.type=judge, or a judge in feedback.scorers "
                f"(got {', '.join(given)}): nothing else can be asked whether a response is harmless. Leave it out and "
                f"use rlaif evaluate after training, or add a judge of weight 0 to a mixture."
            )
        importance = algorithm.importance
        if importance is not None and importance.when == "always" and algorithm.old_logprobs == "sampler":
            yield (
                "algorithm.importance.when=always needs algorithm.old_logprobs learner or auto (got sampler): the "
                "weights compare the learner's log-probabilities with the sampler's. Set old_logprobs=learner."
            )


class PairsJob(Config):
    """`rlaif pairs`: responses to compare, from one or more policies."""

    policy: PolicyConfig
    other_policies: dict[str, PolicyConfig] = Field(default_factory=dict)
    """More policies by name; a response's source is `policy` or one of these names."""
    data: OrderedDataConfig
    sampling: PairSamplingConfig = PairSamplingConfig()
    rollout: EngineConfig = EngineConfig()
    cluster: Annotated[ClusterConfig, HANDLING] = ClusterConfig()
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    chat_date: ChatDate = None
    min_done_fraction: Annotated[float, Field(ge=0, le=1), HANDLING] = 0.9
    """The command ends with an error when a smaller share of the responses could be sampled; what was is kept."""
    run_dir: Annotated[str | None, HANDLING] = None
    """This run's own folder; default runs/<config>-<time>."""
    output: Annotated[str | None, HANDLING] = None
    """The file of records, .jsonl or .parquet; default pairs.jsonl in run_dir."""

    def _problems(self) -> Iterator[str]:
        yield from not_file_names("other_policies", self.other_policies)
        if self.sampling.responses_per_prompt < 2 and not self.other_policies:
            yield (
                f"sampling.responses_per_prompt must be at least 2 where there is one policy "
                f"(got {self.sampling.responses_per_prompt} and no other_policies): a pair has two responses. "
                f"Raise it, or name other_policies."
            )


class SampleJob(Config):
    """`rlaif sample`: a policy's responses, or the best of several by a judge, as records to fine-tune on."""

    policy: PolicyConfig
    data: OrderedDataConfig
    sampling: ResponseSamplingConfig = ResponseSamplingConfig()
    feedback: FeedbackConfig | None = None
    """Scores every response, and the best to each prompt is kept (best-of-n); null: all are kept, without scores."""
    rollout: EngineConfig = EngineConfig()
    cluster: Annotated[ClusterConfig, HANDLING] = ClusterConfig()
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    chat_date: ChatDate = None
    min_done_fraction: Annotated[float, Field(ge=0, le=1), HANDLING] = 0.9
    """The command ends with an error when a smaller share of the responses could be sampled, and scored where there is
    feedback; what was is kept."""
    run_dir: Annotated[str | None, HANDLING] = None
    """This run's own folder; default runs/<config>-<time>."""
    output: Annotated[str | None, HANDLING] = None
    """The file of records, .jsonl; default responses.jsonl in run_dir."""

    def _problems(self) -> Iterator[str]:
        if self.sampling.samples_per_prompt > 1 and self.sampling.temperature == 0:
            yield (
                f"sampling.samples_per_prompt > 1 needs sampling.temperature > 0 (got "
                f"{self.sampling.samples_per_prompt} samples at 0): greedy responses are all the same. Set a "
                f"temperature, or samples_per_prompt=1."
            )


class ReviseJob(Config):
    """`rlaif revise`: responses, critiques and revisions by a constitution, as records to fine-tune on."""

    policy: PolicyConfig
    data: OrderedDataConfig
    revision: RevisionConfig = RevisionConfig()
    helpful: HelpfulConfig = HelpfulConfig()
    rollout: EngineConfig = EngineConfig()
    cluster: Annotated[ClusterConfig, HANDLING] = ClusterConfig()
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of samples and of the draw of principles."""
    chat_date: ChatDate = None
    min_done_fraction: Annotated[float, Field(ge=0, le=1), HANDLING] = 0.9
    """The command ends with an error when the model answered for a smaller share of the prompts, whatever it said
    (revision.min_revised_fraction is about that); what there is is kept."""
    run_dir: Annotated[str | None, HANDLING] = None
    """This run's own folder; default runs/<config>-<time>."""
    output: Annotated[str | None, HANDLING] = None
    """The file of records, .jsonl; default revisions.jsonl in run_dir."""


class LabelJob(Config):
    """`rlaif label`: AI preference labels for pairs of responses."""

    data: PairsToLabelConfig
    judge: PreferenceJudge
    label: LabelConfig = LabelConfig()
    cluster: Annotated[ClusterConfig, HANDLING] = ClusterConfig()
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of the draw of principles and of sampled rationales."""
    chat_date: ChatDate = None
    run_dir: Annotated[str | None, HANDLING] = None
    """This run's own folder; default runs/<config>-<time>. Started again in it, a run does only what is missing."""
    output: Annotated[str | None, HANDLING] = None
    """The file of records, .jsonl or .parquet; default labels.jsonl in run_dir."""
    push_to_hub: Annotated[str | None, HANDLING] = None
    """A data set on the hub to push the records to, owner/name."""


class EvaluateJob(Config):
    """`rlaif evaluate`: AI labeler alignment where `data` is given, win rates where `arms` are."""

    data: PreferenceDataConfig | None = None
    """Pairs that people labelled: how far the judge agrees with them."""
    subset: str | None = None
    """A column of `data` that names subsets, each measured apart; a trailing /number is left out of it."""
    reward_models: dict[str, RewardModelFeedback] = Field(default_factory=dict)
    """By name: each measured against people's labels too."""
    judge: PreferenceJudge
    """The evaluator: best another model than the one that gave feedback in training."""
    label: LabelConfig = LabelConfig()
    """How two responses are compared, always in both orders."""
    arms: dict[str, ArmConfig] = Field(default_factory=dict)
    """By name: what is compared."""
    prompts: OrderedDataConfig | None = None
    """What the arms answer: nothing that one of them was trained on."""
    sampling: ResponseSamplingConfig = ResponseSamplingConfig()
    win_rate: WinRateConfig = WinRateConfig()
    harmless: HarmlessConfig | None = None
    """Harmless rate of the arms, by the same judge."""
    rollout: EngineConfig = EngineConfig()
    cluster: Annotated[ClusterConfig, HANDLING] = ClusterConfig()
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    chat_date: ChatDate = None
    min_done_fraction: Annotated[float, Field(ge=0, le=1), HANDLING] = 0.9
    """The command ends with an error when a smaller share of the arms' responses could be sampled, or judged for harm,
    or scored by a reward model; what was is kept. label.min_labeled_fraction is that of comparisons."""
    run_dir: Annotated[str | None, HANDLING] = None
    """This run's own folder; default runs/<config>-<time>. Started again in it, a run does only what is missing."""

    def _problems(self) -> Iterator[str]:
        yield from not_file_names("arms", self.arms)
        if self.data is None and (self.reward_models or self.subset):
            yield ("reward_models and subset need data (got none): it is pairs that people labelled. Set data.path.")
        if len(self.arms) == 1 and self.harmless is None:
            yield (
                f"arms must be at least two (got {', '.join(self.arms)} alone): a win rate is of one against another. "
                f"Add one, such as the model that training started from."
            )
        if self.prompts is None and len(self.arms) > 1 and any(arm.model is not None for arm in self.arms.values()):
            yield (
                f"prompts must be set where arms are models (got none for {len(self.arms)} arms): they are what the "
                f"arms answer, and nothing that one of them was trained on. Add `prompts: {{path: held_out.jsonl}}`."
            )
        if self.win_rate.reference is not None and self.win_rate.reference not in self.arms:
            yield (
                f"win_rate.reference must be one of the arms (got {self.win_rate.reference!r}): choose among "
                f"{', '.join(self.arms) or 'none'}."
            )
        if self.harmless is not None and (self.judge.type == "longer" or not self.arms):
            yield (
                f"harmless needs a judge with a model, and an arm (got judge.type={self.judge.type} and arms "
                f"{', '.join(self.arms) or 'none'}): responses are read one by one. Set judge.model and arms."
            )
        if self.data is None and not self.arms:
            yield (
                "an evaluation needs data or arms (got neither): there is nothing to measure. Give data.path for the "
                "judge's agreement with people, arms for win rates, or both."
            )


class SupervisedJob(Config):
    """What jobs have in common that go through labelled examples."""

    section: ClassVar[str]
    """Name of the section that says how it learns."""
    policy: PolicyConfig
    """The language model it starts from."""
    data: PreferenceDataConfig
    learner: LearnerConfig = LearnerConfig(lr=1e-5)
    guard: Annotated[GuardConfig, HANDLING] = GuardConfig()
    cluster: Annotated[ClusterConfig, HANDLING] = ClusterConfig()
    checkpoint: Annotated[CheckpointConfig, HANDLING] = CheckpointConfig()
    tracking: Annotated[TrackingConfig, HANDLING] = TrackingConfig()
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    chat_date: ChatDate = None
    run_dir: Annotated[str | None, HANDLING] = None
    """This run's own folder; default runs/<config>-<time>."""

    @property
    def training(self) -> SupervisedConfig:
        """The section that says how it learns."""
        found: SupervisedConfig = getattr(self, self.section)
        return found


class SftJob(SupervisedJob):
    """`rlaif sft`: supervised fine-tuning on conversations, rows of `messages`, or of prompt and response.

    The model is in run_dir's policy/.
    """

    section = "sft"
    sft: SupervisedConfig = SupervisedConfig()


class RewardModelJob(SupervisedJob):
    """`rlaif reward-model`: a reward model from preference records. The model is in run_dir's reward_model/."""

    section = "reward"
    reward: RewardConfig = RewardConfig()


class DpoJob(SupervisedJob):
    """`rlaif dpo`: direct preference optimisation on preference records. The model is in run_dir's policy/."""

    section = "dpo"
    dpo: DpoConfig = DpoConfig()
    learner: LearnerConfig = LearnerConfig(lr=1e-6)


JOBS: dict[str, type[Config]] = {
    "train": TrainJob,
    "pairs": PairsJob,
    "sample": SampleJob,
    "evaluate": EvaluateJob,
    "revise": ReviseJob,
    "label": LabelJob,
    "sft": SftJob,
    "reward-model": RewardModelJob,
    "dpo": DpoJob,
}
