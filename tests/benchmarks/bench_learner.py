"""How much of the machine's arithmetic the learner uses: FLOP/s of annotate and update against a large matmul's.

A parameter costs 2 FLOPs per token forward and 6 with the backward pass; attention scores are not counted. Tokens are
counted three ways:
    computed    every parameter x tokens of the packed row, where a shared prompt stands once (the headline)
    logical     every parameter x samples x (prompt + completion), as a padded or repeated layout would compute
    strict      embeddings never, the output head at completion tokens only: what matmuls really do
"""

from __future__ import annotations

import os
import random
import socket
import statistics
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tests.benchmarks.measure import arguments, json_output, machine, make_job, medians, timed

if TYPE_CHECKING:
    from argparse import ArgumentParser
    from collections.abc import Callable

    from rlaif_ray.data.batching import RankPlan
    from rlaif_ray.learner.ppo import RlRank
    from rlaif_ray.types import Experience

Samples = tuple[list[tuple[int, ...]], list[tuple[int, ...]]]


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    add_sample_arguments(parser)
    parser.add_argument("--precision", choices=["fp32", "bf16"], default="fp32")
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--zero-stage", type=int, choices=[0, 1, 2, 3], default=0)
    parser.add_argument("--tokens-per-micro-batch", type=int, default=4096)
    parser.add_argument("--gradient-checkpointing", action="store_true")
    parser.add_argument("--policy-alone", action="store_true", help="no critic and no reference")
    parser.add_argument("--matmul", type=int, default=2048, help="side of the square matrices of the yardstick")
    args = parser.parse_args()
    with json_output() as emit:
        emit(measure(args))


def add_sample_arguments(parser: ArgumentParser) -> None:
    """What `make_samples` reads."""
    parser.add_argument("--prompts", type=int, default=8)
    parser.add_argument("--samples-per-prompt", type=int, default=2)
    parser.add_argument("--completion-tokens", type=int, default=48)
    parser.add_argument("--prompt-tokens", type=int, nargs=2, default=(50, 90), metavar=("LEAST", "MOST"))


def measure(args: Any) -> dict[str, Any]:
    # Before torch is imported: it reads the number of threads once.
    os.environ |= {"OMP_NUM_THREADS": str(args.threads), "TOKENIZERS_PARALLELISM": "false"}
    import torch

    from rlaif_ray.data.batching import plan_ranks

    rank = start_rank(args)
    prompts, completions = make_samples(args, rank._model.config.get_text_config().vocab_size)
    lengths = [len(p) + len(c) for p, c in zip(prompts, completions, strict=True)]
    plan = plan_ranks(range(len(prompts)), lengths, ranks=1, budget=args.tokens_per_micro_batch)[0]
    experience = make_experience(rank, prompts, completions, plan)
    new_tokens = sum(map(len, completions))
    sides: dict[str, Callable[[], Any]] = {
        "annotate": lambda: rank.annotate(prompts, completions, plan, with_policy=args.policy_alone),
        "update": lambda: rank.update(experience, [(new_tokens, plan)]),
    }
    yardstick = Matmul(args.matmul, rank.device, torch.float32 if args.precision == "fp32" else torch.bfloat16)
    seconds: dict[str, list[float]] = {"annotate": [], "update": [], "matmul": []}
    shares: dict[str, list[float]] = {"annotate": [], "update": []}  # FLOP/s over the matmul's just before and after
    work = flops(rank, prompts, completions, plan)
    for k in range(args.rounds + 1):
        before = yardstick()
        for name, run in sides.items():
            taken = timed(lambda run=run: _finished(run, rank.device))  # type: ignore[misc]
            after = yardstick()
            if k:
                seconds[name].append(taken)
                seconds["matmul"].append(after)
                shares[name].append(work[name]["computed"] / taken / (yardstick.flops * 2 / (before + after)))
            before = after
    peak = yardstick.flops / statistics.median(seconds["matmul"])
    strict = {name: counts["strict"] / counts["computed"] for name, counts in work.items()}
    result = {
        "benchmark": "learner",
        "ratio": round(statistics.median(shares["update"]), 4),  # of the matmul's FLOP/s
        "ratio_annotate": round(statistics.median(shares["annotate"]), 4),
        "ratio_strict": round(statistics.median(shares["update"]) * strict["update"], 4),
        "ratio_strict_annotate": round(statistics.median(shares["annotate"]) * strict["annotate"], 4),
        "share": {
            name: {how: round(count / statistics.median(seconds[name]) / peak, 4) for how, count in counts.items()}
            for name, counts in work.items()
        },
        "matmul_gflop_per_s": round(peak / 1e9, 2),
        "tokens_per_s": round(sum(lengths) / statistics.median(seconds["update"]), 1),  # logical, updates only
        **medians(seconds),
        **token_counts(rank, prompts, completions, plan),
        "samples": len(prompts),
        "micro_batches": len(plan),
        "precision": args.precision,
        "model": args.model,
        "device": args.device,
        **machine(),
    }
    torch.distributed.destroy_process_group()
    return result


def start_rank(args: Any) -> RlRank:
    """Policy, critic and reference in this process."""
    from rlaif_ray.learner.engine import RankSpec
    from rlaif_ray.learner.ppo import RlRank

    job = make_job(
        args,
        policy={"precision": args.precision, "attention": args.attention},
        algorithm={"type": "rloo", "kl": {"coef": 0.0}} if args.policy_alone else {"type": "ppo"},
        learner={"zero_stage": args.zero_stage, "gradient_checkpointing": args.gradient_checkpointing},
    )
    with socket.socket() as listener:
        listener.bind(("", 0))
        port = listener.getsockname()[1]
    spec = RankSpec(0, 1, 0, "127.0.0.1", port, "cuda" if args.device == "gpu" else "cpu", args.threads)
    return RlRank(job, spec, args.precision)


def make_samples(args: Any, vocabulary: int) -> Samples:
    """Random tokens of realistic lengths; the samples of a prompt side by side."""
    draw = random.Random(0)
    least, most = args.prompt_tokens
    prompts, completions = [], []
    for _ in range(args.prompts):
        prompt = tuple(draw.randrange(3, vocabulary) for _ in range(draw.randint(least, most)))
        for _ in range(args.samples_per_prompt):
            prompts.append(prompt)
            completions.append(tuple(draw.randrange(3, vocabulary) for _ in range(args.completion_tokens)))
    return prompts, completions


def make_experience(rank: RlRank, prompts: Any, completions: Any, plan: RankPlan) -> Experience:
    """What an update needs, with random advantages and returns; also for a rank without critic or reference."""
    import torch

    from rlaif_ray.types import Experience

    found = rank.annotate(prompts, completions, plan, with_policy=True)

    def table(name: str) -> torch.Tensor:
        return torch.stack([found[i].get(name, found[i]["policy"]) for i in range(len(prompts))])

    shape = len(prompts), len(completions[0])
    generator = torch.Generator().manual_seed(0)
    return Experience(
        prompt_tokens=tuple(prompts),
        tokens=torch.tensor(completions),
        mask=torch.ones(shape, dtype=torch.bool),
        finished=torch.ones(len(prompts), dtype=torch.bool),
        scores=torch.zeros(len(prompts)),
        groups=torch.arange(len(prompts)),
        sampler_logprobs=table("policy"),
        logprobs=table("policy"),
        ref_logprobs=table("ref"),
        values=table("values"),
        advantages=torch.randn(shape, generator=generator),
        returns=torch.randn(shape, generator=generator),
    )


def token_counts(rank: RlRank, prompts: Any, completions: Any, plan: RankPlan) -> dict[str, int]:
    """Tokens of one pass: in the layout that is computed, as samples count them, and those that are predicted."""
    from rlaif_ray.learner.packing import build_input

    inputs = [
        build_input([prompts[i] for i in m], [completions[i] for i in m], packed=rank._packed, device="cpu")
        for m in plan
    ]
    return {
        "tokens_computed": sum(batch.tokens.numel() for batch in inputs),
        "tokens_logical": sum(len(p) + len(c) for p, c in zip(prompts, completions, strict=True)),
        "tokens_predicted": sum(len(c) for c in completions),
    }


@dataclass(frozen=True, slots=True)
class Size:
    """Parameters of a model; a tied output head counts once."""

    all: int
    body: int  # without embedding and output head
    head: int  # the output head, tied or not


def flops(rank: RlRank, prompts: Any, completions: Any, plan: RankPlan) -> dict[str, dict[str, float]]:
    """FLOPs of one annotate (reference and critic forward; of a policy alone, that) and one update (policy and critic,
    both ways). What gradient checkpointing computes again is not counted."""
    tokens = token_counts(rank, prompts, completions, plan)
    policy = _size(rank._policy.module)
    critic = _size(rank._critic.module) if rank._critic is not None else Size(0, 0, 0)

    def count(language_model: Size, per_parameter: int) -> dict[str, float]:
        strict = (language_model.body + critic.body) * tokens["tokens_computed"]
        strict += (language_model.head + critic.head) * tokens["tokens_predicted"]
        both = language_model.all + critic.all
        return {
            "computed": float(per_parameter * both * tokens["tokens_computed"]),
            "logical": float(per_parameter * both * tokens["tokens_logical"]),
            "strict": float(per_parameter * strict),
        }

    return {"annotate": count(policy, 2), "update": count(policy, 6)}  # the reference is as large as the policy


def _size(module: Any) -> Size:
    sizes = {name: int(getattr(p, "ds_numel", p.numel())) for name, p in module.named_parameters()}  # tied ones once
    embedding = sum(size for name, size in sizes.items() if "embed_tokens" in name)
    head = sum(size for name, size in sizes.items() if name.endswith(("lm_head.weight", "head.weight", "head.bias")))
    total = sum(sizes.values())
    tied = head == 0
    return Size(all=total, body=total - embedding - head, head=embedding if tied else head)


class Matmul:
    """The yardstick: a product of two large square matrices, a few times over."""

    REPEATS = 5

    def __init__(self, side: int, device: Any, dtype: Any) -> None:
        import torch

        self._left, self._right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        self._out = torch.empty_like(self._left)
        self._device = device
        self.flops = 2.0 * side**3

    def __call__(self) -> float:
        """Seconds of one product."""
        import torch

        def run() -> None:
            for _ in range(self.REPEATS):
                torch.matmul(self._left, self._right, out=self._out)

        _finished(run, self._device)
        return timed(lambda: _finished(run, self._device)) / self.REPEATS


def _finished(function: Callable[[], Any], device: Any) -> None:
    """Runs to the end of what it started on a GPU."""
    import torch

    function()
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    main()
