"""How long a checkpoint holds training up, over the time of writing the same bytes plainly (write and fsync).

Sides, all of one rank's whole state (weights, AdamW's moments) in one process:
    plain       the same number of bytes from memory into one file, and fsync
    blocked     what training waits for with checkpoint.background: the copy to host memory
    foreground  what it waits for without: copy, write, hash and fsync
    update, beside    an optimizer step alone, and one while the state is written: what the thread takes from it
The headline counts the copy and what the step beside it loses.
"""

from __future__ import annotations

import os
import random
import shutil
import socket
import statistics
import tempfile
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tests.benchmarks.measure import arguments, json_output, machine, medians, ratio, timed

if TYPE_CHECKING:
    from rlaif_ray.learner.finetune import SftRank


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--examples", type=int, default=16)
    parser.add_argument("--tokens", type=int, default=96, help="of an example")
    parser.add_argument("--zero-stage", type=int, choices=[0, 1, 2, 3], default=0)
    parser.add_argument("--folder", type=Path, help="on the disk to measure; default: where temporary files go")
    args = parser.parse_args()
    with json_output() as emit:
        emit(measure(args))


def measure(args: Any) -> dict[str, Any]:
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
    import torch

    from rlaif_ray.data.batching import plan_ranks
    from rlaif_ray.learner.finetune import SftExample
    from rlaif_ray.storage import Place

    rank = start_rank(args)
    draw = random.Random(0)
    tokens = [tuple(draw.randrange(3, 300) for _ in range(args.tokens)) for _ in range(args.examples)]
    examples = [SftExample(each[:16], each[16:]) for each in tokens]
    plan = plan_ranks(range(len(examples)), [len(e) for e in examples], ranks=1, budget=4096)[0]
    rank.train(examples, plan)  # from here on AdamW has its moments
    folder = Path(tempfile.mkdtemp(dir=args.folder))
    seconds: dict[str, list[float]] = {name: [] for name in ("plain", "blocked", "foreground", "update", "beside")}
    size = 0
    try:
        for k in range(args.rounds + 1):
            taken = {"update": timed(lambda: rank.train(examples, plan)), "blocked": timed(rank.checkpoint.copy)}
            writing = threading.Thread(target=rank.checkpoint.write, args=(Place(str(folder / "background")),))
            writing.start()
            taken["beside"] = timed(lambda: rank.train(examples, plan))
            writing.join()
            size = sum(path.stat().st_size for path in (folder / "background").rglob("*") if path.is_file())
            shutil.rmtree(folder / "background")
            taken["plain"] = timed(lambda size=size: write_plainly(folder / "plain", size))  # type: ignore[misc]
            taken["foreground"] = timed(lambda: save(rank, Place(str(folder / "foreground"))))
            shutil.rmtree(folder / "foreground")
            if k:
                for name, value in taken.items():
                    seconds[name].append(value)
    finally:
        shutil.rmtree(folder)
    torch.distributed.destroy_process_group()
    sides = zip(seconds["blocked"], seconds["beside"], seconds["update"], strict=True)
    held_up = [copied + max(0.0, beside - alone) for copied, beside, alone in sides]
    return {
        "benchmark": "checkpoint",
        "ratio": round(statistics.median(held_up) / statistics.median(seconds["plain"]), 4),
        "ratio_copy_alone": ratio(seconds, "blocked", "plain"),
        "ratio_foreground": ratio(seconds, "foreground", "plain"),
        **medians(seconds),
        "bytes": size,
        "zero_stage": args.zero_stage,
        "model": args.model,
        "device": args.device,
        **machine(),
    }


def start_rank(args: Any) -> SftRank:
    """A language model in fine-tuning, in this process."""
    from rlaif_ray.config.jobs import SftJob
    from rlaif_ray.learner.engine import RankSpec
    from rlaif_ray.learner.finetune import SftRank

    learner = {"zero_stage": args.zero_stage, "tokens_per_micro_batch": 4096}
    job = SftJob.model_validate({"policy": {"model": args.model}, "data": {"path": "x"}, "learner": learner})
    with socket.socket() as listener:
        listener.bind(("", 0))
        port = listener.getsockname()[1]
    spec = RankSpec(0, 1, 0, "127.0.0.1", port, "cuda" if args.device == "gpu" else "cpu", args.threads)
    return SftRank(job, spec, "bf16" if args.device == "gpu" else "fp32", total_steps=1000)


def save(rank: SftRank, place: Any) -> None:
    rank.checkpoint.copy()
    rank.checkpoint.write(place)


def write_plainly(path: Path, size: int) -> None:
    """So many bytes from memory, and fsync."""
    block = os.urandom(8 << 20)
    with path.open("wb") as file:
        for start in range(0, size, len(block)):
            file.write(block[: size - start])
        file.flush()
        os.fsync(file.fileno())


if __name__ == "__main__":
    main()
