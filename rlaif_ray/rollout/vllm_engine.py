"""One vLLM engine in this process: samples completions, reads next-token log-probabilities, takes new weights."""

from __future__ import annotations

import gc
import hashlib
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass, field
from typing import Any

import psutil  # type: ignore[import-untyped, unused-ignore]

from rlaif_ray.chat.thoughts import thought_tokens, written_text
from rlaif_ray.config.sections import CPU_KV_CACHE_GB
from rlaif_ray.errors import EngineError, InputError, StaleWeightsError
from rlaif_ray.interfaces import GenerationSettings
from rlaif_ray.models import load_config
from rlaif_ray.rollout.board import Source
from rlaif_ray.rollout.buckets import Bucket
from rlaif_ray.rollout.nccl import DISABLED, pass_gate
from rlaif_ray.rollout.orphans import ENGINE_PROCESS
from rlaif_ray.rollout.receiving import update_messages
from rlaif_ray.rollout.support import state_arguments
from rlaif_ray.rollout.weight_transfer import ENGINES, stale_message
from rlaif_ray.types import Completion, Prompt, TokenAnswer, TokenQuery

CPU_BLOCK_SIZE = 32  # tokens; the smallest that vLLM's CPU attention takes: the finer, the more of a prefix is shared
BATCHED_TOKENS = 4096  # prompt tokens per engine step on CPU
SLEEPING = ("weights", "kv_cache")  # vLLM's tags for what it gives back when it sleeps
WORTH_CACHING = 4 * CPU_BLOCK_SIZE  # tokens that prompts must share for one of them to be computed ahead


@dataclass(frozen=True, slots=True)
class EngineSpec:
    """Everything an engine is started with."""

    model: str  # folder or hub id
    revision: str | None
    trust_remote_code: bool
    dtype: str  # "float32" or "bfloat16"
    device: str  # "cpu" or "cuda"
    max_context: int  # tokens, prompt and completion together
    tensor_parallel: int
    gpu_memory_utilization: float
    kv_cache_gb: float | None  # of each GPU; None: CPU_KV_CACHE_GB on CPUs, on GPUs what is left
    seed: int
    threads: int  # compute threads on CPU
    transfer_backend: str | None  # weight transfer; None for an engine whose weights never change
    sleep: bool = False  # between calls it gives its GPU memory back
    shares_gpu: bool = False  # with engines and learner ranks in other processes
    kv_cache_bytes: int | None = None  # as planned for a GPU that is shared
    engine_kwargs: dict[str, Any] = field(default_factory=dict)


def engine_environment(spec: EngineSpec) -> dict[str, str]:
    """Environment of the process that will hold the engine, set before it starts."""
    environment = {
        "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
        "VLLM_NO_USAGE_STATS": "1",
        "TOKENIZERS_PARALLELISM": "false",
        ENGINE_PROCESS: "1",
    }
    if spec.tensor_parallel == 1:
        # The engine core lives in this process: it starts in half the time, and schedules deterministically.
        environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = os.environ.get("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    if spec.device == "cpu":
        environment |= {
            "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # phases take turns on the same cores, pinned threads would not
            "OMP_NUM_THREADS": str(spec.threads),
            "CUDA_VISIBLE_DEVICES": "",
        }
    return environment


MISTRAL = ("mistral", "mistral3", "ministral", "ministral3", "mixtral", "pixtral", "voxtral")


def engine_arguments(spec: EngineSpec, config: Any | None = None) -> dict[str, Any]:
    """Arguments of vLLM's `LLM`; pure. `config` is the model's, as transformers gives it, where it knows the model."""
    arguments: dict[str, Any] = {
        "model": spec.model,
        "revision": spec.revision,
        "trust_remote_code": spec.trust_remote_code,
        "dtype": spec.dtype,
        "max_model_len": spec.max_context,
        "tensor_parallel_size": spec.tensor_parallel,
        "seed": spec.seed,
        "enable_prefix_caching": True,
        "logprobs_mode": "processed_logprobs",  # after the temperature: what PPO's ratio compares with
        "max_logprobs": 128,
        "disable_log_stats": True,
        "worker_extension_cls": "rlaif_ray.rollout.worker_extension.WorkerExtension",
    }
    if spec.tensor_parallel > 1:
        # Its own choice in a placement group is Ray, which wants a bundle per GPU where ours has all of an engine's.
        arguments["distributed_executor_backend"] = "mp"
    if spec.device == "cpu":
        arguments |= {
            "enforce_eager": True,
            "block_size": CPU_BLOCK_SIZE,
            "kv_cache_memory_bytes": int((spec.kv_cache_gb or CPU_KV_CACHE_GB) * 2**30),
            # vLLM can't rewind a seeded CPU generator after a partial prefill ("CPU Generator does not use offset").
            "enable_chunked_prefill": False,
            "max_num_batched_tokens": max(BATCHED_TOKENS, spec.max_context),
        }
    else:
        # What it takes of the GPU at most, and what vLLM wants to find free there at its start.
        arguments["gpu_memory_utilization"] = spec.gpu_memory_utilization
        if spec.kv_cache_gb is not None:
            arguments["kv_cache_memory_bytes"] = int(spec.kv_cache_gb * 2**30)
        elif spec.kv_cache_bytes is not None:
            arguments["kv_cache_memory_bytes"] = spec.kv_cache_bytes
    if getattr(config, "model_type", None) in MISTRAL:
        arguments["tokenizer_mode"] = "hf"  # of two formats the one that learner and judges read, see load_tokenizer
    if spec.sleep:
        arguments["enable_sleep_mode"] = True
    if spec.transfer_backend is not None:
        arguments["weight_transfer_config"] = {"backend": ENGINES[spec.transfer_backend][0]}
    return arguments | state_arguments(config) | spec.engine_kwargs


def gpu_bytes() -> int:
    """Memory of this process's GPU, in all. Asks the driver, so that it takes none of it."""
    with _collector_paused():
        from vllm.platforms import current_platform

    return int(current_platform.get_device_total_memory())


def _config(spec: EngineSpec) -> Any | None:
    """The model's config; None for one that vLLM knows and transformers doesn't."""
    try:
        return load_config(spec.model, revision=spec.revision, trust_remote_code=spec.trust_remote_code)
    except InputError:
        return None


def sample_seed(seed: int, prompt_id: str, sample: int) -> int:
    """Seed of one completion: the same for the same run, prompt and sample, wherever and beside whatever it runs."""
    digest = hashlib.blake2b(f"{seed}/{prompt_id}/{sample}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 2


def own_processes() -> dict[str, psutil.Process]:
    """vLLM's processes under this one, by the titles that it gives them; none where the engine is in this one."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):  # gone meanwhile
            title = " ".join(process.cmdline()[:1])
            if title.startswith("VLLM"):
                found[title] = process
    return found


@contextmanager
def _collector_paused() -> Iterator[None]:
    """For large imports: they make a million objects that stay, which the garbage collector would walk again and again,
    and vLLM has it do so five times more while it starts. A fifth of an engine's start."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        if enabled:
            gc.enable()


def common_prefix(prompts: Sequence[tuple[int, ...]]) -> int:
    """Tokens that all prompts begin with."""
    least, most = min(prompts), max(prompts)  # in between all share what these two do
    return next((i for i, (a, b) in enumerate(zip(least, most, strict=False)) if a != b), min(len(least), len(most)))


class VllmEngine:
    """A Generator on vLLM's offline engine. Not thread-safe: one caller at a time."""

    def __init__(self, spec: EngineSpec) -> None:
        """Loads the model. The process must have `engine_environment(spec)`.

        Raises:
            EngineError: vLLM could not start; names its reason.
        """
        os.environ.update(engine_environment(spec))
        with _collector_paused():
            from vllm import LLM

            from rlaif_ray.rollout.weight_transfer import register

        register()
        try:
            self._llm = LLM(**engine_arguments(spec, _config(spec)))
        except Exception as error:
            raise EngineError(f"vLLM could not start with {spec.model}: {type(error).__name__}: {error}") from error
        self._tokenizer = self._llm.get_tokenizer()
        self._thought_tokens = thought_tokens(self._tokenizer)
        self._spec = spec
        self._broken: str | None = None
        self.busy_since: float | None = None  # when the call under way last took a step (monotonic); None when idle
        self._count_steps()
        self._parts = own_processes()
        self.weight_version = -1  # -1: the weights on disk, which no training step may sample from
        self._asleep: set[str] = set()  # parts of its GPU memory that it has given back
        self._sleep()

    @contextmanager
    def _working(self, what: str) -> Iterator[None]:
        """One call. Whoever watches can tell when it last moved: vLLM may wait for ever on a part of it that died."""
        if self._broken is not None:
            raise EngineError(f"this engine failed before and must be started anew ({self._broken})")
        self.busy_since = time.monotonic()
        try:
            yield
        except Exception as error:
            # Its scheduler still holds the requests that failed: another call could wait on them for ever.
            self._broken = f"{type(error).__name__}: {error}"
            if isinstance(error, StaleWeightsError):
                raise  # the model's fault, not this engine's: another one would do the same
            raise EngineError(f"vLLM failed {what}: {self._broken}") from error
        finally:
            self.busy_since = None

    def generate(self, prompts: Sequence[Prompt], settings: GenerationSettings) -> list[Completion]:
        with self._working(f"on {len(prompts)} prompts"):
            self._wake(*SLEEPING)
            completions = self._generate(prompts, settings)
            self._sleep()
        return completions

    def _generate(self, prompts: Sequence[Prompt], settings: GenerationSettings) -> list[Completion]:
        from vllm import SamplingParams

        # The cache would carry keys and values from earlier batches over; starting clean, the same call gives the
        # same bits in a resumed run. Within the call prefixes are shared.
        self._llm.reset_prefix_cache()
        requests, parameters = [], []
        for prompt in prompts:
            for sample in range(settings.samples_per_prompt):
                requests.append({"prompt_token_ids": list(prompt.tokens)})
                parameters.append(
                    SamplingParams(
                        temperature=settings.temperature,
                        max_tokens=settings.max_new_tokens,
                        seed=sample_seed(settings.seed, prompt.id, sample),
                        logprobs=0,
                        ignore_eos=settings.ignore_eos,
                        detokenize=False,
                        prompt_logprobs=0 if settings.prompt_logprobs else None,
                    )
                )
        outputs = self._run(requests, parameters)
        return [
            self._completion(prompts[i // settings.samples_per_prompt], i % settings.samples_per_prompt, output)
            for i, output in enumerate(outputs)
        ]

    def _completion(self, prompt: Prompt, sample: int, output: Any) -> Completion:
        result = output.outputs[0]
        tokens = tuple(result.token_ids)
        return Completion(
            prompt=prompt,
            sample=sample,
            tokens=tokens,
            logprobs=tuple(step[token].logprob for step, token in zip(result.logprobs, tokens, strict=True)),
            text=prompt.opened + written_text(self._tokenizer, tokens, self._thought_tokens),
            finished=result.finish_reason == "stop",
            weight_version=self.weight_version,
            prompt_logprobs=tuple(
                step[token].logprob
                for step, token in zip((output.prompt_logprobs or ())[1:], prompt.tokens[1:], strict=False)
            ),
        )

    def token_logprobs(self, queries: Sequence[TokenQuery]) -> list[TokenAnswer]:
        with self._working(f"on {len(queries)} requests"):
            self._wake(*SLEEPING)
            answers = self._token_logprobs(queries)
            self._sleep()
        return answers

    def _token_logprobs(self, queries: Sequence[TokenQuery]) -> list[TokenAnswer]:
        from vllm import SamplingParams

        self._llm.reset_prefix_cache()
        answers: list[TokenAnswer | None] = [
            TokenAnswer((), "too_long") if len(query.prompt) >= self._spec.max_context else None for query in queries
        ]
        asked = [i for i, answer in enumerate(answers) if answer is None]
        requests = [{"prompt_token_ids": list(queries[i].prompt)} for i in asked]
        parameters = [
            SamplingParams(
                temperature=1.0, max_tokens=1, detokenize=False, logprob_token_ids=list(queries[i].candidates)
            )
            for i in asked
        ]
        # Requests that start together would each compute what they all begin with; one ahead leaves it in the cache.
        ahead = 1 if len(asked) > 2 and common_prefix([queries[i].prompt for i in asked]) >= WORTH_CACHING else 0
        outputs = self._run(requests[:ahead], parameters[:ahead]) + self._run(requests[ahead:], parameters[ahead:])
        for i, output in zip(asked, outputs, strict=True):
            step = output.outputs[0].logprobs[0]
            answers[i] = TokenAnswer(tuple(step[token].logprob for token in queries[i].candidates))
        return [answer for answer in answers if answer is not None]

    def dead_part(self) -> str | None:
        """Which of vLLM's processes is gone, in words: of several, the one beside it may wait for it for ever."""
        for name, process in self._parts.items():
            try:
                alive = process.status() != psutil.STATUS_ZOMBIE
            except psutil.NoSuchProcess:
                alive = False
            if not alive:
                return f"lost its process {name} (pid {process.pid})"
        return None

    def _count_steps(self) -> None:
        """Every step that vLLM takes moves `busy_since`: an engine that is stuck in one shows."""
        engine: Any = self._llm.llm_engine
        take_step = engine.step

        def step() -> Any:
            outputs = take_step()
            self.busy_since = time.monotonic()
            return outputs

        engine.step = step

    def _run(self, requests: list[Any], parameters: list[Any]) -> list[Any]:
        return list(self._llm.generate(requests, parameters, use_tqdm=False)) if requests else []

    def _wake(self, *parts: str) -> None:
        """Takes memory back for these parts, unless it has it. vLLM schedules again once it has all."""
        tags = [part for part in parts if part in self._asleep]
        if tags:
            self._llm.wake_up(tags=tags)
            self._asleep -= set(tags)

    def _sleep(self) -> None:
        """Gives its memory back if it is to: weights move to the host, the KV cache is dropped."""
        if self._spec.sleep:
            self._llm.sleep(level=1)
            self._asleep = set(SLEEPING)

    # Weight updates, in vLLM's order: init once; then start, update any number of times, finish.

    def init_transfer(self, init_info: dict[str, Any], gate: tuple[str, int] | None = None) -> None:
        """Joins the weight transfer. An NCCL group makes its members meet at the `gate` (address, port) first.

        Raises:
            GivenUpError: the group was given up before it was made; this engine is as it was.
            EngineError: it could not join.
        """
        if gate is not None:
            self.leave_transfer()
            pass_gate(*gate)
        with self._working("to join the weight transfer"):
            self._llm.init_weight_transfer_engine({"init_info": init_info})
            if gate is not None and any(self._llm.collective_rpc("transfer_is_disabled")):
                raise RuntimeError(DISABLED)

    def leave_transfer(self) -> None:
        """Destroys the communicators of an NCCL group; one that was aborted by others can't be left in order."""
        with self._working("to leave the weight transfer"):
            self._llm.collective_rpc("leave_transfer")

    def start_update(self) -> None:
        self.weight_version = -1  # an update that breaks half way leaves an engine that must not sample
        with self._working("to begin an update"):
            self._wake("weights")  # the KV cache is not needed before the next call, which comes soon
            self._llm.start_weight_update()

    def update(self, update_info: dict[str, Any]) -> None:
        """Loads one bucket, as vLLM's update message describes it."""
        with self._working("to load weights"):
            self._llm.update_weights({"update_info": update_info})

    def update_all(self, buckets: Sequence[Bucket], sources: tuple[Source, ...]) -> None:
        """Loads a whole push, bucket by bucket (receiving.py). While it waits for one it is idle: whether the learner
        still moves, others watch."""
        with closing(update_messages(buckets, sources)) as messages:
            for message in messages:
                self.update(message)

    def finish_update(self, version: int) -> list[int]:
        """Makes the new weights current; returns each worker's checksum of what it received.

        Raises:
            StaleWeightsError: vLLM's loader left parameters as they were.
        """
        with self._working("to end an update"):
            stale = sorted({name for names in self._llm.collective_rpc("not_loaded") for name in names})
            self._llm.finish_weight_update()
            if stale:
                raise StaleWeightsError(stale_message(self._spec.model, stale))
            self._llm.reset_prefix_cache()
            checksums = self._llm.collective_rpc("received_checksum")
        self.weight_version = version
        return list(checksums)
