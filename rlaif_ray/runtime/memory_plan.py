"""What each actor of a job will hold on its GPUs: pure arithmetic, before anything starts.

Weights, gradients and optimizer states are exact (ZeRO, Rajbhandari et al. 1910.02054, section 3, as DeepSpeed 0.19
lays them out for the config that we give it; a test compares with real engines). Activations, workspaces and what the
CUDA libraries take are estimates, on the high side.

Letters: N learner ranks, T tokens of a micro-batch, h hidden, i intermediate, q and kv widths of all query and of all
key heads.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

from rlaif_ray.config.algorithms import PpoConfig, ReinforceConfig
from rlaif_ray.config.deepspeed import deepspeed_config
from rlaif_ray.config.jobs import EvaluateJob, ReviseJob, RewardModelJob, SftJob, SupervisedJob, TrainJob
from rlaif_ray.config.sections import (
    CPU_KV_CACHE_GB,
    EngineConfig,
    JudgeConfig,
    JudgeFeedback,
    MixtureFeedback,
    PolicyConfig,
    Precision,
    RewardModelFeedback,
)
from rlaif_ray.model_shapes import ModelShape
from rlaif_ray.precision import chosen_precision
from rlaif_ray.runtime.engine_size import CUDA_BYTES, GIB, cuda_graphs, engine_weights, sequence_bytes, workspace
from rlaif_ray.runtime.placement import Need, job_needs

if TYPE_CHECKING:
    from rlaif_ray.rollout.vllm_engine import EngineSpec

Device = Literal["cpu", "cuda"]
Shapes = Callable[[Any], ModelShape]  # of a section with model, revision and trust_remote_code

BYTES = {"fp32": 4, "bf16": 2}
FREE_FOR_ALLOCATOR = 0.05  # of a GPU: what torch's allocator loses between blocks
SCORING_CHUNK = 128  # rows of logits that are scored at a time, in fp32 (algorithm/logprobs.py)
STEP_ELEMENTS = 10**9  # DeepSpeed steps ZeRO-3's states in groups of so many


@dataclass(frozen=True, slots=True)
class Machine:
    """What the job is planned for."""

    gpu_bytes: int  # of one GPU
    gpus_per_node: int
    judge_context: int  # tokens of a judge's engines where the config doesn't say
    prompt_tokens: int  # longest prompt, where the config doesn't say
    host_bytes: int | None = None  # memory of a node; None where that isn't known


@dataclass(frozen=True, slots=True)
class Memory:
    """What one actor holds on each of its GPUs."""

    parts: dict[str, int]  # bytes by what they are for; they add up to what it needs
    reserved: int  # bytes it takes: an engine's whole share, whatever it needs
    resting: int  # bytes while the others of its GPU are at work
    limit: int  # bytes it may take alone on a GPU
    holds: dict[str, int]  # engines: "kv_tokens", "context", "sequences" of that many tokens
    otherwise: dict[str, int]  # learners: "activations" with the other setting of gradient_checkpointing

    @property
    def total(self) -> int:
        """Bytes it needs."""
        return sum(self.parts.values())


@dataclass(frozen=True, slots=True)
class Actors:
    """The actors of one role, all alike."""

    need: Need
    kind: Literal["engine", "scorer", "learner"]
    key: str  # the config section that says how large they are
    shape: ModelShape
    memory: Memory
    together: int = 1  # learners: ranks that compute a micro-batch together


def phases(job: Any, machine: Machine, shapes: Shapes, device: Device) -> list[tuple[str, list[Actors]]]:
    """(name, actors that run at the same time); an evaluation's parts come one after the other, other jobs have one."""
    if not isinstance(job, EvaluateJob):
        return [("", [_actors(job, need, machine, shapes, device) for need in job_needs(job)])]
    found = [
        (f"arm {name}", [_engines(job, arm, _rollout_need(job, arm), "rollout", machine, shapes, device)])
        for name, arm in job.arms.items()
        if arm.model is not None
    ]
    if isinstance(job.judge, JudgeConfig):
        need = Need("judge", job.judge.replicas, job.judge.tensor_parallel, job.judge.model)
        found.append(("judge", [_engines(job, job.judge, need, "judge", machine, shapes, device)]))
    if job.reward_models:
        found.append(("reward models", [_actors(job, need, machine, shapes, device) for need in job_needs(job)]))
    return found


def _rollout_need(job: Any, model: Any) -> Need:
    return Need("rollout", job.rollout.replicas, job.rollout.tensor_parallel, model.model)


def _actors(job: Any, need: Need, machine: Machine, shapes: Shapes, device: Device) -> Actors:
    if need.role == "learner":
        shape = shapes(job.policy)
        memory = learner_memory(job, shape, machine, device)
        return Actors(need, "learner", "learner", shape, memory, job.learner.sequence_parallel)
    if need.role == "rollout":
        return _engines(job, job.policy, need, "rollout", machine, shapes, device)
    section, key = sections(job)[need.role]
    if isinstance(section, RewardModelFeedback):
        shape = shapes(section)
        return Actors(need, "scorer", key, shape, scorer_memory(section, shape, machine, device))
    return _engines(job, section, need, key, machine, shapes, device)


def _engines(job: Any, model: Any, need: Need, key: str, machine: Machine, shapes: Shapes, device: Device) -> Actors:
    cfg: EngineConfig = job.rollout if need.role == "rollout" else model
    shape = shapes(model)
    context = min(engine_tokens(job, cfg, machine), shape.context)
    memory = engine_memory(cfg, shape, context, machine, precision_bytes(model.precision, device), device)
    return Actors(need, "engine", key, shape, memory)


def sections(job: Any) -> dict[str, tuple[JudgeConfig | RewardModelFeedback, str]]:
    """By role: the section of every judge and reward model, and its key."""
    found: dict[str, tuple[Any, str]] = {}
    feedback = getattr(job, "feedback", None)
    parts = {"feedback": feedback}
    if isinstance(feedback, MixtureFeedback):
        parts = {f"feedback.scorers.{name}.scorer": part.scorer for name, part in feedback.scorers.items()}
    for key, part in parts.items():
        own = key.split(".")[2] if "." in key else None
        if isinstance(part, JudgeFeedback):
            found[own or "judge"] = (part.judge, f"{key}.judge")
        elif isinstance(part, RewardModelFeedback):
            found[own or "reward_model"] = (part, key)
    if isinstance(getattr(job, "judge", None), JudgeConfig):
        found["judge"] = (job.judge, "judge")
    for name, part in getattr(job, "reward_models", {}).items():
        found[name] = (part, f"reward_models.{name}")
    return found


def precision_bytes(precision: Precision, device: Device) -> int:
    """Bytes of a weight; auto is what this machine would compute in."""
    return BYTES[chosen_precision(precision, device)]


# ---- Engines ---------------------------------------------------------------------------------------------------------


def engine_tokens(job: Any, cfg: EngineConfig, machine: Machine) -> int:
    """Tokens of context of the engines, prompt and answer together; a guess where only the data would say."""
    if cfg.max_context is not None:
        return cfg.max_context
    if isinstance(cfg, JudgeConfig) or isinstance(job, ReviseJob):
        return machine.judge_context
    prompts = job.prompts if isinstance(job, EvaluateJob) else job.data
    longest = None if prompts is None else prompts.max_prompt_tokens
    return int((longest or machine.prompt_tokens) + job.sampling.max_new_tokens)


def engine_memory(
    cfg: EngineConfig | EngineSpec,
    shape: ModelShape,
    context: int,
    machine: Machine,
    weight_bytes: int,
    device: Device,
) -> Memory:
    """Of each GPU of a vLLM engine: what is left of its share after weights and workspace is KV cache, unless the
    config says how much that is.

    It fits when that holds one sequence of `context` tokens, which is vLLM's own condition.
    """
    parallel, kwargs, total = cfg.tensor_parallel, cfg.engine_kwargs, machine.gpu_bytes
    parts = {"weights": engine_weights(shape, kwargs, parallel, weight_bytes)}
    if device == "cuda":
        parts["workspace"] = workspace(shape, kwargs, parallel, weight_bytes, total)
        parts["CUDA graphs"] = cuda_graphs(shape, kwargs)
    sequence = sequence_bytes(shape, kwargs, parallel, weight_bytes, total, context)
    used = sum(parts.values())
    stays = used - parts["weights"]
    share = int(machine.gpu_bytes * float(kwargs.get("gpu_memory_utilization", cfg.gpu_memory_utilization)))
    said = said_cache(cfg, device)
    cache = share - used if said is None else said
    reserved = share if said is None else used + cache
    limit = machine.gpu_bytes if device == "cuda" and said is not None else reserved
    tokens = max(0, cache * context // sequence)
    parts["KV cache"] = max(cache, sequence)
    holds = {"kv_tokens": tokens, "context": context, "sequences": tokens // context}
    # Asleep it has neither weights nor KV cache there, but what runs of it stays.
    return Memory(parts, reserved, stays if cfg.sleep else reserved, limit, holds, {})


def said_cache(cfg: EngineConfig | EngineSpec, device: Device) -> int | None:
    """Bytes of KV cache on each GPU that the config asks for; None where they follow from its share of a GPU."""
    said = cfg.engine_kwargs.get("kv_cache_memory_bytes")
    if said is not None:
        return int(said)
    if cfg.kv_cache_gb is None and device == "cuda":
        return None
    return int((cfg.kv_cache_gb or CPU_KV_CACHE_GB) * GIB)


def scorer_memory(cfg: RewardModelFeedback, shape: ModelShape, machine: Machine, device: Device) -> Memory:
    """Of a reward model's GPU: it computes a batch of completions forward only."""
    size = precision_bytes(cfg.precision, device)
    parts = {
        "weights": (shape.body + shape.hidden) * size,
        "workspace": cfg.tokens_per_batch * (6 * shape.hidden + 4 * shape.intermediate + 2 * shape.queries) * size,
    }
    return _alone(parts, machine, device)


def _alone(parts: dict[str, int], machine: Machine, device: Device, resting: int | None = None) -> Memory:
    if device == "cuda":
        parts["CUDA"] = CUDA_BYTES
    total = sum(parts.values())
    limit = int(machine.gpu_bytes * (1 - FREE_FOR_ALLOCATOR)) if device == "cuda" else total
    return Memory(parts, total, total if resting is None else resting + parts.get("CUDA", 0), limit, {}, {})


# ---- Learner ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Trained:
    """Parameters of a model that a learner rank holds."""

    trainable: int
    frozen: int

    @property
    def all(self) -> int:
        return self.trainable + self.frozen


@dataclass(frozen=True, slots=True)
class Zero:
    """How DeepSpeed lays a model's states out over N ranks."""

    stage: int
    ranks: int
    weight_bytes: int
    gradient_bytes: int
    master_bytes: int  # fp32 copies of the weights that the optimizer steps
    bucket_bytes: int
    live_elements: int  # ZeRO-3: weights that are whole at a time
    offloaded: bool  # optimizer states and gradients are in the host's memory
    sum_is_stepped: bool  # the optimizer reads the gradients' sum where it is
    weights_offloaded: bool  # weights are in the host's memory
    secondary_ranks: int  # ZeRO++ hpZ: ranks that hold a second copy of the weights among them; 1: there is none

    def weights(self, model: Trained) -> int:
        return 0 if self.weights_offloaded else self._share(model.all, 3) * self.weight_bytes

    def secondary(self, model: Trained) -> int:
        """hpZ's second copy of the weights."""
        return -(-model.all // self.secondary_ranks) * self.weight_bytes if self.secondary_ranks > 1 else 0

    def gradients(self, model: Trained) -> int:
        """Those that micro-batches add up; in stage 1 they are whole until the step. An offloaded stage 1 that adds up
        in another type than the weights' keeps this rank's share of what is reduced beside them, in the last backward
        pass."""
        if self.offloaded and self.stage > 1:  # in stage 2 those that add up in another type stay until the step
            kept = self.stage == 2 and self.gradient_bytes != self.weight_bytes
            return self._share(model.trainable, 2) * self.gradient_bytes if kept else 0
        beside = self.offloaded and self.stage == 1 and self.gradient_bytes != self.weight_bytes
        share = self._share(model.trainable, 1) if beside else 0
        return (self._share(model.trainable, 2) + share) * self.gradient_bytes

    def optimizer(self, model: Trained) -> int:
        """Adam's two moments in fp32, and the master weights."""
        return 0 if self.offloaded else self._share(model.trainable, 1) * (8 + self.master_bytes)

    def step(self, model: Trained) -> int:
        """Gradients in fp32 during the optimizer's step, beside all else."""
        if self.offloaded or self.master_bytes == 0 or self.sum_is_stepped:
            return 0
        return min(self._share(model.trainable, 1), STEP_ELEMENTS if self.stage == 3 else 2**62) * 4

    def on_host(self, model: Trained) -> dict[str, int]:
        """Bytes of a rank in its node's memory, by what is offloaded.

        With the optimizer: master weights, two moments and the gradients of its step in fp32; in stages 1 and 2 a copy
        of the new weights, on their way back; and from stage 2 on the gradients that micro-batches add up, in stage 2
        only where they do so in the weights' type.
        """
        found = {}
        share = self._share(model.trainable, 1)
        if self.offloaded and share:
            twice = 2 if self.gradient_bytes == self.weight_bytes else 1
            copies = {1: self.weight_bytes, 2: twice * self.weight_bytes, 3: self.gradient_bytes}[self.stage]
            found["optimizer"] = share * (4 + 8 + 4 + copies)
        if self.weights_offloaded:
            found["parameters"] = self._share(model.all, 3) * self.weight_bytes
        return found

    def gathered(self, model: Trained, largest: int) -> int:
        """ZeRO-3: whole weights of the layers at work; never less than the largest, of so many elements."""
        live = max(min(model.all, self.live_elements), largest)
        return live * self.weight_bytes if self.stage == 3 else 0

    def _share(self, count: int, stage: int) -> int:
        return -(-count // self.ranks) if self.stage >= stage else count


def zero_of(learner: Any, precision: Literal["fp32", "bf16"]) -> Zero:
    """From DeepSpeed's own config, so that `learner.deepspeed_overrides` count.

    Gradients add up in the model's type unless data_types.grad_accum_dtype says otherwise (engine.get_data_types), as
    ours does in bf16. In fp32 its optimizer keeps copies from stage 1 on all the same.
    """
    config = deepspeed_config(learner, precision=precision)
    zero = config["zero_optimization"]
    stage = int(zero["stage"])
    size = BYTES[precision]
    accumulated = (config.get("data_types") or {}).get("grad_accum_dtype")
    in_fp32 = precision == "bf16" and accumulated == "fp32"
    offloaded = _is_offloaded(zero, "offload_optimizer")
    # Bytes of an element that is reduced. Sums in fp32: stage 1 reduces them in place, offloaded in a bucket of fp32;
    # stage 2 fills a bucket in bf16 and reduces a copy in fp32, stage 3 fills one in fp32.
    reduced = {1: 4 if offloaded else 0, 2: size + 4, 3: 4}.get(stage, 0) if in_fp32 else size
    buckets = int(zero.get("reduce_bucket_size", 0)) * reduced + int(zero.get("allgather_bucket_size", 0)) * size
    return Zero(
        stage=stage,
        ranks=learner.ranks,
        weight_bytes=size,
        gradient_bytes=4 if accumulated == "fp32" else size,
        master_bytes=0 if stage == 0 and precision == "fp32" else 4,
        bucket_bytes=buckets,
        live_elements=int(zero.get("stage3_max_live_parameters", 10**9)),
        offloaded=offloaded,
        sum_is_stepped=in_fp32 and stage < 3,
        weights_offloaded=_is_offloaded(zero, "offload_param"),
        secondary_ranks=int(zero.get("zero_hpz_partition_size", 1)),
    )


def _is_offloaded(zero: dict[str, Any], key: str) -> bool:
    return bool((zero.get(key) or {}).get("device", "none") != "none")


def learner_zero(job: Any, device: Device) -> Zero:
    """Of a job's learner, in the precision that it computes in on this device."""
    return zero_of(job.learner, "fp32" if precision_bytes(job.policy.precision, device) == 4 else "bf16")


def trained_models(job: Any, shape: ModelShape) -> dict[str, Trained]:
    """Policy, critic and reference of a learner rank, as learner/ loads them."""
    if isinstance(job, TrainJob):
        found = {"policy": Trained(shape.parameters, 0)}
        if isinstance(job.algorithm, PpoConfig | ReinforceConfig):
            found["critic"] = Trained(shape.body + shape.hidden + 1, 0)
        if job.algorithm.kl.coef > 0 or job.algorithm.kl.target is not None:
            found["reference"] = Trained(0, shape.parameters)
        return found
    is_reward_model = isinstance(job, RewardModelJob)
    head = shape.hidden if is_reward_model else shape.head
    lora = job.training.lora
    if lora is None:
        return {"policy": Trained(shape.body + head, 0)}
    adapters = shape.adapters(lora.rank, lora.targets)
    if is_reward_model:  # its head is new, and trained beside the adapters
        return {"policy": Trained(adapters + head, shape.body)}
    return {"policy": Trained(adapters, shape.body + head)}


def learner_memory(job: Any, shape: ModelShape, machine: Machine, device: Device) -> Memory:
    """Of each GPU of a learner rank."""
    policy: PolicyConfig = job.policy
    size = precision_bytes(policy.precision, device)
    zero = learner_zero(job, device)
    models = trained_models(job, shape)
    main = models["policy"]
    parts = {"weights": zero.weights(main), "gradients": zero.gradients(main), "optimizer": zero.optimizer(main)}
    critic, reference = models.get("critic"), models.get("reference")
    if critic is not None:
        parts["critic"] = zero.weights(critic) + zero.gradients(critic) + zero.optimizer(critic)
    if reference is not None:
        parts["reference"] = zero.weights(reference)
    secondary = sum(zero.secondary(one) for one in models.values())
    if secondary:
        parts["hpZ copy"] = secondary
    held = sum(parts.values())

    together = job.learner.sequence_parallel
    longest = _longest(job, shape, machine)
    whole = max(job.learner.tokens_per_micro_batch, longest)
    tokens = rank_tokens(whole, together)
    checkpointing = job.learner.gradient_checkpointing

    def kept(checkpointing: bool) -> int:
        how: dict[str, Any] = {"attention": policy.attention, "repeats": _repeats(job, shape, machine)}
        return activations(shape, tokens, size, checkpointing=checkpointing, **how)

    working = {
        "activations": kept(checkpointing),
        "logits": 0 if isinstance(job, RewardModelJob) else logits(shape, tokens, size, job.learner.logits_chunk),
        "gathered": max(zero.gathered(one, shape.vocabulary * shape.hidden) for one in models.values()),
        "buckets": zero.bucket_bytes,
    }
    if tokens > (job.learner.logits_chunk or tokens) and getattr(getattr(job, "training", None), "lora", None) is None:
        working["logits"] += shape.vocabulary * shape.hidden * (4 + size)  # the head's gradient, summed over chunks
    if together > 1:
        working["exchange"] = exchange(shape, tokens, size)
    if together > 1 and policy.attention == "sdpa":  # padded rows: which token sees which, of whole rows, on every rank
        working["mask"] = whole * longest * (1 + size)
    if zero.offloaded and zero.stage < 3:  # a gradient on its way to the host, the largest
        working["buckets"] += shape.vocabulary * shape.hidden * zero.weight_bytes
    # The step comes when activations are gone: only what it takes beyond them adds to the peak.
    working["optimizer step"] = max(0, max(zero.step(one) for one in models.values()) - sum(working.values()))
    memory = _alone(parts | working, machine, device, resting=held)
    return replace(memory, otherwise={"activations": kept(not checkpointing)})


def rank_tokens(tokens: int, together: int) -> int:
    """Of a micro-batch's tokens those of each of the ranks that compute it together: all of them take the same number,
    and one that fills up (learner/sequence_parallel.py). Activations and logits are of those alone; in attention a rank
    has all tokens of its share of the heads instead, which is as much."""
    return tokens if together == 1 else -(-tokens // together) + 1


def exchange(shape: ModelShape, tokens: int, size: int) -> int:
    """What ranks that compute together send and receive at a time: queries, keys and values of their own T tokens."""
    return 2 * tokens * (shape.queries + 2 * shape.keys) * size


def _repeats(job: Any, shape: ModelShape, machine: Machine) -> float:
    """Keys per token of a packed row: a prompt's stand for itself and for each of its samples (learner/packing.py)."""
    if isinstance(job, SupervisedJob):  # responses as long as the prompt
        prompt, answer, samples = 1, 1, 1 if isinstance(job, SftJob) else 2
    else:
        answer, samples = job.sampling.max_new_tokens, job.sampling.samples_per_prompt
        prompt = max(0, _longest(job, shape, machine) - answer)
    return float((prompt + samples * (prompt + answer)) / (prompt + samples * answer))


def _longest(job: Any, shape: ModelShape, machine: Machine) -> int:
    """Tokens of the longest sample: it makes a micro-batch of its own where it exceeds the budget."""
    if isinstance(job, SupervisedJob):
        return min(job.training.max_tokens or 0, shape.context)
    return min(engine_tokens(job, job.rollout, machine), shape.context)


def activations(
    shape: ModelShape, tokens: int, size: int, *, checkpointing: bool, attention: str = "auto", repeats: float = 1.0
) -> int:
    """What the forward pass of T tokens keeps for the backward pass, and one layer's gradients.

    A layer keeps, per token: for each norm its input in fp32, what it scales, and its output; queries and attention's
    output, and keys and values as often as there are heads (learner/packing.py) and as samples share a prompt
    (`repeats`, at least 1); gate, its activation, up and their product. A test compares with what torch keeps.
    Checkpointing keeps a layer's input alone, and computes one layer's again.
    """
    h, i, q, b = shape.hidden, shape.intermediate, shape.queries, size
    scaled = 4 if shape.family == "gemma3" else b  # bytes: Gemma multiplies in fp32
    norm = h * (4 + scaled + b)
    layer = norm * (4 if shape.family == "gemma3" else 2) + 2 * q * b + 2 * int(q * repeats) * b + 4 * i * b
    if shape.family in ("qwen3", "gemma3"):  # norms of queries and keys
        layer += (q + shape.keys) * (4 + scaled)
    if attention == "eager":
        layer += shape.heads * tokens * (b + 4)  # every head's scores
    gradients = (2 * h + 3 * i) * b
    kept = shape.layers * h * b + layer if checkpointing else shape.layers * layer
    return tokens * (kept + norm + gradients)


def logits(shape: ModelShape, tokens: int, size: int, chunk: int | None = None) -> int:
    """At most one row a token, and at most `chunk` at a time; probabilities and gradients take the same memory
    (algorithm/logprobs.py)."""
    rows = tokens if chunk is None else min(tokens, chunk)
    scratch = SCORING_CHUNK * shape.vocabulary * 4 * (1 if size == 4 and rows == tokens else 2)
    return rows * shape.vocabulary * size + scratch


def learner_host_memory(job: Any, shape: ModelShape, device: Device) -> dict[str, int]:
    """Bytes of a learner rank in its node's memory by what is offloaded there: "optimizer", "parameters"; {} for
    nothing. Its process and its checkpoints are not in it."""
    zero = learner_zero(job, device)
    found: dict[str, int] = {}
    for model in trained_models(job, shape).values():
        for part, count in zero.on_host(model).items():
            found[part] = found.get(part, 0) + count
    return found
