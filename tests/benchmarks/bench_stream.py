"""Memory of `rlaif label` over a long stream of pairs, judged by a simulated endpoint: does it grow with their number?

Resident memory of the command is sampled by labels written; the ratio is the largest of the second half over the
largest between a tenth and a half, when everything is under way.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from tests.benchmarks.bench_endpoint import _serve
from tests.benchmarks.measure import arguments, json_output, machine


def main() -> None:
    parser = arguments(__doc__, rounds=1)
    parser.add_argument("--pairs", type=int, default=200_000)
    parser.add_argument("--latency-s", type=float, default=0.2)
    parser.add_argument("--concurrency", type=int, default=256)
    args = parser.parse_args()
    with json_output() as emit:
        emit(measure(args))


def measure(args: Any) -> dict[str, Any]:
    context = multiprocessing.get_context("spawn")
    end, there = context.Pipe()
    endpoint = context.Process(target=_serve, args=(there, args.latency_s), daemon=True)
    endpoint.start()
    try:
        url = f"http://127.0.0.1:{end.recv()}/v1"
        with tempfile.TemporaryDirectory() as folder:
            return _label(args, url, Path(folder))
    finally:
        endpoint.kill()
        endpoint.join()


def _label(args: Any, url: str, folder: Path) -> dict[str, Any]:
    with (folder / "pairs.jsonl").open("w") as file:
        for k in range(args.pairs):
            row = {"prompt": f"Question {k}?", "response_a": f"Answer {k}, at some length.", "response_b": f"No {k}."}
            file.write(json.dumps(row) + "\n")
    (folder / "label.yaml").write_text("label: {template: helpful}\n")
    command = [sys.executable, "-m", "rlaif_ray.cli", "label", "label.yaml", "data.path=pairs.jsonl", "run_dir=run"]
    judge = {"type": "openai", "model": "simulated", "base_url": url, "concurrency": args.concurrency}
    command += [f"judge={json.dumps(judge)}"]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    began = time.perf_counter()
    seen: list[tuple[int, float]] = []  # labels, MB
    with (folder / "out").open("w") as out:
        process = subprocess.Popen(command, cwd=folder, env=environment, stdout=out, stderr=subprocess.STDOUT)
        watched = psutil.Process(process.pid)
        size = 0
        while process.poll() is None:
            time.sleep(0.5)
            labels = folder / "run" / "labels.jsonl"
            size = labels.stat().st_size if labels.exists() else 0
            try:
                seen.append((size, watched.memory_info().rss / 2**20))
            except psutil.NoSuchProcess:
                break
    seconds = time.perf_counter() - began
    assert process.returncode == 0, (folder / "out").read_text()[-2000:]
    summary = json.loads((folder / "run" / "summary.json").read_text())
    assert summary["labels"] == args.pairs, summary
    early = max(mb for at, mb in seen if 0.1 * size <= at <= 0.5 * size)
    late = max(mb for at, mb in seen if 0.5 * size <= at < size)
    return {
        "benchmark": "stream",
        "ratio": round(late / early, 4),
        "medians_s": {"label": round(seconds, 3)},
        "rss_mb": {"first_half": round(early, 1), "second_half": round(late, 1)},
        "pairs": args.pairs,
        "labels_per_s": round(summary["labels_per_s"], 1),
        "of_ideal": round(2 * summary["labels_per_s"] * args.latency_s / args.concurrency, 4),
        **machine(),
    }


if __name__ == "__main__":
    main()
