"""The judge through an engine group and Ray against plain vLLM asked the same token prompts: scores per second.

Ours writes and tokenises the judge's prompts, asks, and turns probabilities into scores; plain vLLM gets tokens.
"""

from __future__ import annotations

import statistics
import time
from typing import TYPE_CHECKING, Any

from tests.benchmarks.measure import (
    PlainVllm,
    alternate,
    arguments,
    json_output,
    machine,
    make_job,
    medians,
    project_prompts,
    ratio,
)

if TYPE_CHECKING:
    from rlaif_ray.types import Completion, Prompt


def main() -> None:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--completions", type=int, default=32)
    parser.add_argument("--answer-tokens", type=int, default=48)
    parser.add_argument("--max-prompt-tokens", type=int, default=256)
    parser.add_argument("--template", default="helpful")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--kv-cache-gb", type=float, default=1.0)
    args = parser.parse_args()
    with json_output() as emit:
        emit(measure(args))


def measure(args: Any) -> dict[str, Any]:
    from rlaif_ray.feedback.judge import Judge
    from rlaif_ray.feedback.local import LocalAsker
    from rlaif_ray.feedback.templates import load_template
    from rlaif_ray.models import load_tokenizer
    from rlaif_ray.runtime.cluster import open_cluster

    job = make_job(args, feedback={"type": "judge", "template": args.template})
    tokenizer = load_tokenizer(args.model)
    prompts = project_prompts(args.model, args.completions, max_tokens=args.max_prompt_tokens)
    completions = answers(prompts, tokenizer, args.answer_tokens)
    with open_cluster(job) as cluster:
        engines = cluster.start_judges(job.feedback.judge, context=args.context)
        spec = cluster._engine_spec(job.feedback.judge, job.feedback.judge, context=args.context, transfer=None)
        cluster.wait()
        asker = LocalAsker(engines, tokenizer, args.context, args.model)
        judge = Judge(asker, load_template(args.template), min_answer_mass=0.0)
        queries = asker.queries([judge.question(c.prompt.text, c.text) for c in completions])
        plain = PlainVllm(spec)
        plain.wait()

        def ours(k: int) -> float:
            began = time.perf_counter()
            scores = judge.score(completions)
            seconds = time.perf_counter() - began
            assert all(score.value is not None for score in scores), [s.failure for s in scores if s.failure]
            return seconds

        def vllm(k: int) -> float:
            parameters = [
                {"temperature": 1.0, "max_tokens": 1, "detokenize": False, "logprob_token_ids": list(q.candidates)}
                for q in queries
            ]
            return plain.generate([q.prompt for q in queries], parameters)[0]

        try:
            seconds = alternate({"ours": ours, "vllm": vllm}, args.rounds)
        finally:
            plain.close()
    return {
        "benchmark": "judge",
        "ratio": ratio(seconds, "vllm", "ours"),  # scores per second, ours over vLLM's
        "scores_per_s": {
            side: round(len(completions) / statistics.median(taken), 3) for side, taken in seconds.items()
        },
        **medians(seconds),
        "scores": len(completions),
        "queries": len(queries),
        "judge_tokens": sum(len(q.prompt) for q in queries),
        "template": args.template,
        "model": args.model,
        "device": args.device,
        **machine(),
    }


def answers(prompts: list[Prompt], tokenizer: Any, length: int) -> list[Completion]:
    """An answer to each prompt, of about `length` tokens: text that people wrote (the next prompts), all different."""
    from rlaif_ray.types import Completion

    completions = []
    for k, prompt in enumerate(prompts):
        words = " ".join([p.text for p in prompts[k + 1 :] + prompts[: k + 1]])
        tokens = tuple(tokenizer(words[: 20 * length], add_special_tokens=False)["input_ids"][:length])
        text = tokenizer.decode(tokens)
        completions.append(Completion(prompt, 0, tokens, (0.0,) * len(tokens), text, True, 0))
    return completions


if __name__ == "__main__":
    main()
