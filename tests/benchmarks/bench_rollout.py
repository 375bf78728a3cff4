"""Rollouts through an engine actor and Ray against plain vLLM on the same requests: tokens per second.

Ours is timed from the driver, transport and all; plain vLLM inside its own process, around `LLM.generate` alone.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from tests.benchmarks.measure import (
    PlainVllm,
    alternate,
    json_output,
    machine,
    make_job,
    medians,
    project_prompts,
    ratio,
    rollout_arguments,
)


def main() -> None:
    parser = rollout_arguments(__doc__, rounds=5, prompts=32)
    parser.add_argument("--samples-per-prompt", type=int, default=2)
    args = parser.parse_args()
    with json_output() as emit:
        emit(measure(args))


def measure(args: Any) -> dict[str, Any]:
    from rlaif_ray.interfaces import GenerationSettings
    from rlaif_ray.rollout.vllm_engine import sample_seed
    from rlaif_ray.runtime.cluster import open_cluster

    prompts = project_prompts(args.model, args.prompts, max_tokens=args.max_prompt_tokens)
    job = make_job(args)
    context = args.max_prompt_tokens + args.max_new_tokens
    last: dict[str, list[tuple[int, ...]]] = {}

    def settings(k: int) -> GenerationSettings:
        return GenerationSettings(args.samples_per_prompt, args.max_new_tokens, 1.0, seed=k, ignore_eos=True)

    with open_cluster(job) as cluster:
        rollouts = cluster.start_rollouts(job.policy, job.rollout, context=context, receives_weights=False)
        spec = cluster._engine_spec(job.policy, job.rollout, context=context, transfer=None)
        cluster.wait()
        plain = PlainVllm(spec)
        plain.wait()

        def ours(k: int) -> float:
            began = time.perf_counter()
            completions = rollouts.generate(prompts, settings(k))
            seconds = time.perf_counter() - began
            last["ours"] = [c.tokens for c in completions]
            return seconds

        def vllm(k: int) -> float:
            samples = [(p, i) for p in prompts for i in range(args.samples_per_prompt)]
            parameters = [
                {
                    "temperature": 1.0,
                    "max_tokens": args.max_new_tokens,
                    "seed": sample_seed(k, p.id, i),
                    "logprobs": 0,
                    "ignore_eos": True,
                    "detokenize": False,
                }
                for p, i in samples
            ]
            seconds, last["vllm"] = plain.generate([p.tokens for p, _ in samples], parameters)
            return seconds

        try:
            seconds = alternate({"ours": ours, "vllm": vllm}, args.rounds)
        finally:
            plain.close()
    requests = args.prompts * args.samples_per_prompt
    new_tokens = requests * args.max_new_tokens
    for side, tokens in last.items():
        assert sum(map(len, tokens)) == new_tokens, f"{side} did not sample every token"
    return {
        "benchmark": "rollout",
        "ratio": ratio(seconds, "vllm", "ours"),  # tokens per second, ours over vLLM's
        "tokens_per_s": {side: round(new_tokens / statistics.median(taken), 2) for side, taken in seconds.items()},
        **medians(seconds),
        "requests": requests,
        "new_tokens": new_tokens,
        "prompt_tokens": sum(len(p.tokens) for p in prompts) * args.samples_per_prompt,
        "same_tokens": last["ours"] == last["vllm"],
        "model": args.model,
        "device": args.device,
        **machine(),
    }


if __name__ == "__main__":
    main()
