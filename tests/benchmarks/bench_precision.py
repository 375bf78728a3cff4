"""What bf16 costs and gains in the learner, on one rank without critic and reference, all sides in one process.

step     an update of one token: what DeepSpeed does around an optimizer step. bf16 as we set it up (fp32 sums of
         gradients, stage 1) against how DeepSpeed does it by itself (stage 0, `before`)
update   an update of real size. fp32 against bf16: only on CPUs with AMX, and on GPUs; elsewhere bf16 is emulated
"""

from __future__ import annotations

import os
import socket
from typing import TYPE_CHECKING, Any

from tests.benchmarks.bench_learner import add_sample_arguments, make_experience, make_samples
from tests.benchmarks.measure import alternate, arguments, json_output, machine, make_job, medians, ratio, timed

if TYPE_CHECKING:
    from collections.abc import Callable

    from rlaif_ray.learner.ppo import RlRank

# As our config was before gradients were summed in fp32.
BEFORE = {
    "zero_optimization": {"stage": 0},
    "data_types": {"grad_accum_dtype": "bf16"},
    "communication_data_type": "bf16",
}


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    add_sample_arguments(parser)
    args = parser.parse_args()
    with json_output() as emit:
        emit(measure(args))


def measure(args: Any) -> dict[str, Any]:
    # Before torch is imported: it reads the number of threads once.
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
    import torch

    from rlaif_ray.precision import fast_in_bf16

    torch.manual_seed(0)
    device = "cuda" if args.device == "gpu" else "cpu"
    sides = {"bf16": rank_of(args, "bf16", {}), "before": rank_of(args, "bf16", BEFORE)}
    one = [(5, 6, 7)], [(8,)]
    seconds = alternate({f"step_{name}": updating(rank, *one) for name, rank in sides.items()}, args.rounds)
    result = {"ratio": ratio(seconds, "step_before", "step_bf16"), "ratio_fp32_over_bf16": None}
    del sides["before"]
    if device == "cuda" or fast_in_bf16():
        sides["fp32"] = rank_of(args, "fp32", {})
        samples = make_samples(args, sides["bf16"]._model.config.get_text_config().vocab_size)
        seconds |= alternate({f"update_{name}": updating(rank, *samples) for name, rank in sides.items()}, args.rounds)
        result["ratio_fp32_over_bf16"] = ratio(seconds, "update_fp32", "update_bf16")
    torch.distributed.destroy_process_group()
    return {"benchmark": "precision", **result, **medians(seconds), "amx": fast_in_bf16(), "model": args.model} | {
        "device": args.device,
        **machine(),
    }


def rank_of(args: Any, precision: Any, overrides: dict[str, Any]) -> RlRank:
    """A policy in this process."""
    from rlaif_ray.learner.engine import RankSpec
    from rlaif_ray.learner.ppo import RlRank

    job = make_job(
        args,
        policy={"precision": precision},
        algorithm={"type": "rloo", "kl": {"coef": 0}},
        learner={"deepspeed_overrides": overrides},
    )
    with socket.socket() as listener:
        listener.bind(("", 0))
        port = listener.getsockname()[1]
    spec = RankSpec(0, 1, 0, "127.0.0.1", port, "cuda" if args.device == "gpu" else "cpu", args.threads)
    return RlRank(job, spec, precision)


def updating(rank: RlRank, prompts: Any, completions: Any) -> Callable[[int], float]:
    """An update on these samples, timed."""
    plan = (tuple(range(len(prompts))),)
    experience = make_experience(rank, prompts, completions, plan)
    tokens = sum(map(len, completions))
    return lambda _: timed(lambda: (rank.update(experience, [(tokens, plan)]), _finish(rank)))


def _finish(rank: RlRank) -> None:
    if rank.device.type == "cuda":
        import torch

        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
