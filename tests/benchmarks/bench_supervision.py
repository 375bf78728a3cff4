"""What supervision costs: rollouts with every actor asked for a sign of life each second, and with nobody asked.

`cpu_share` is the processor time of all that asking in the driver, per second of one core.
"""

from __future__ import annotations

import threading
import time
from typing import Any

from tests.benchmarks.measure import (
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
    args = rollout_arguments(__doc__, rounds=12, prompts=64).parse_args()
    with json_output() as emit:
        emit(measure(args))


def measure(args: Any) -> dict[str, Any]:
    from rlaif_ray.interfaces import GenerationSettings
    from rlaif_ray.runtime.cluster import open_cluster

    prompts = project_prompts(args.model, args.prompts, max_tokens=args.max_prompt_tokens)
    job = make_job(args)
    context = args.max_prompt_tokens + args.max_new_tokens
    with open_cluster(job) as cluster:
        rollouts = cluster.start_rollouts(job.policy, job.rollout, context=context, receives_weights=False)
        cluster.start_judges(job.feedback.judge, context=context)
        cluster.start_learner()
        cluster.wait()
        watch = cluster._watch
        watched, acts = watch._watched, watch._acts
        spent = CpuTime(watch._thread)

        def generate(k: int) -> float:
            settings = GenerationSettings(1, args.max_new_tokens, 1.0, seed=k, ignore_eos=True)
            began = time.perf_counter()
            completions = rollouts.generate(prompts, settings)
            seconds = time.perf_counter() - began
            assert sum(len(c.tokens) for c in completions) == len(prompts) * args.max_new_tokens
            return seconds

        def with_it(k: int) -> float:
            watch._watched, watch._acts = watched, acts
            with spent:
                return generate(k)

        def without(k: int) -> float:
            watch._watched, watch._acts = [], []
            return generate(k)

        seconds = alternate({"supervised": with_it, "alone": without}, args.rounds)
        watch._watched, watch._acts = watched, acts
    return {
        "benchmark": "supervision",
        "ratio": ratio(seconds, "supervised", "alone"),
        "cpu_share": round(spent.cpu_s / spent.wall_s, 5),
        **medians(seconds),
        "actors": len(watched),
        "model": args.model,
        "device": args.device,
        **machine(),
    }


class CpuTime:
    """Processor time of one thread while it is entered."""

    def __init__(self, thread: threading.Thread) -> None:
        assert thread.ident is not None
        self._clock = time.pthread_getcpuclockid(thread.ident)
        self.cpu_s = self.wall_s = 0.0

    def __enter__(self) -> None:
        self._began = time.clock_gettime(self._clock), time.perf_counter()

    def __exit__(self, *error: object) -> None:
        self.cpu_s += time.clock_gettime(self._clock) - self._began[0]
        self.wall_s += time.perf_counter() - self._began[1]


if __name__ == "__main__":
    main()
