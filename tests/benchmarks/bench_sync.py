"""One weight sync from learner to engine against one copy of the same bytes in memory, and the memory it takes.

The copy is torch's `copy_` into a buffer that was written before, by one thread and by all of them (on a GPU: within
the GPU). Memory is PSS: a page that two processes share counts half in each.
"""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.measure import (
    alternate,
    arguments,
    json_output,
    machine,
    make_job,
    medians,
    ratio,
    timed,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

CONTEXT = 256


def main() -> None:
    parser = arguments(__doc__, rounds=7)
    parser.add_argument("--zero-stage", type=int, choices=[0, 1, 2, 3], default=0)
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--bucket-mb", type=int, default=64)
    parser.add_argument("--kv-cache-gb", type=float, default=0.1)
    args = parser.parse_args()
    with json_output() as emit:
        emit(measure(args))


def measure(args: Any) -> dict[str, Any]:
    import torch

    from rlaif_ray.runtime.cluster import open_cluster
    from rlaif_ray.runtime.waiting import gather

    job = make_job(
        args,
        # No critic and no reference: only the policy's weights travel.
        algorithm={"type": "rloo", "kl": {"coef": 0.0}},
        learner={"zero_stage": args.zero_stage, "ranks": args.ranks},
        weight_sync={"bucket_mb": args.bucket_mb},
    )
    with open_cluster(job) as cluster:
        rollouts = cluster.start_rollouts(job.policy, job.rollout, context=CONTEXT)
        learner = cluster.start_learner()
        cluster.wait()
        sync = cluster.connect(learner, rollouts)
        asked = [actor.process.remote() for actor in [*learner.actors, *rollouts.actors]]
        processes = [pid for pid, _ in gather(asked, who="actors", timeout_s=60)]
        names = [f"learner_{k}" for k in range(args.ranks)] + ["engine"]
        pids = dict(zip(names, processes, strict=True))
        reports = []

        def push(k: int) -> float:
            return timed(lambda: reports.append(sync.push(k)))

        first = extra_memory(pids, lambda: push(0))  # allocates the staging segments
        size = reports[0].bytes
        copy = Copy(size, device="cuda" if args.device == "gpu" else "cpu")
        threads = torch.get_num_threads()
        sides = {"push": push, "copy_1_thread": lambda k: copy(1), "copy_all_threads": lambda k: copy(threads)}
        seconds = alternate(sides, args.rounds)
        later = extra_memory(pids, lambda: push(args.rounds + 2))
    return {
        "benchmark": "sync",
        "ratio": ratio(seconds, "push", "copy_1_thread"),  # times as long as a copy
        "ratio_all_threads": ratio(seconds, "push", "copy_all_threads"),
        "copy_threads": threads,
        **medians(seconds),
        "model_bytes": size,
        "buckets": len(sync._buckets),
        "extra_memory_first_push": {name: round(extra / size, 4) for name, extra in first.items()},
        "extra_memory_later_push": {name: round(extra / size, 4) for name, extra in later.items()},
        "zero_stage": args.zero_stage,
        "ranks": args.ranks,
        "model": args.model,
        "device": args.device,
        **machine(),
    }


class Copy:
    """A copy of so many bytes between two buffers that are warm: both were written before."""

    def __init__(self, size: int, *, device: str) -> None:
        import torch

        self._source = torch.ones(size, dtype=torch.uint8, device=device)
        self._target = torch.zeros(size, dtype=torch.uint8, device=device)
        self._device = device

    def __call__(self, threads: int) -> float:
        """Seconds of one copy by so many threads."""
        import torch

        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            return timed(self._run)
        finally:
            torch.set_num_threads(before)

    def _run(self) -> None:
        import torch

        self._target.copy_(self._source)
        if self._device == "cuda":
            torch.cuda.synchronize()


def extra_memory(pids: Mapping[str, int], action: Callable[[], Any]) -> dict[str, int]:
    """Bytes by which each process, and all together ("total"), grew at most while `action` ran."""
    before = _memory(pids)
    peak = dict(before)
    done = threading.Event()

    def watch() -> None:
        while not done.is_set():
            for name, now in _memory(pids).items():
                peak[name] = max(peak[name], now)
            time.sleep(0.001)

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        action()
    finally:
        done.set()
        thread.join()
    return {name: peak[name] - before[name] for name in before}


def _memory(pids: Mapping[str, int]) -> dict[str, int]:
    """Bytes of PSS by process, and their sum."""
    found = {}
    for name, pid in pids.items():
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        found[name] = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
    return {**found, "total": sum(found.values())}


if __name__ == "__main__":
    main()
