"""Labelling as in `rlaif label` against plain vLLM asked the same token prompts, with its prefix cache and without.

Ours reads pairs chunk by chunk, renders, tokenises, asks both orders and averages; plain vLLM gets tokens, all at once.
"""

from __future__ import annotations

import statistics
import time
from typing import Any

from tests.benchmarks.bench_judge import answers
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


def main() -> None:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--pairs", type=int, default=128)
    parser.add_argument("--answer-tokens", type=int, default=32)
    parser.add_argument("--max-prompt-tokens", type=int, default=128)
    parser.add_argument("--template", default="helpful")
    parser.add_argument("--exemplars", default="helpful")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--kv-cache-gb", type=float, default=1.0)
    args = parser.parse_args()
    with json_output() as emit:
        emit(measure(args))


def measure(args: Any) -> dict[str, Any]:
    from rlaif_ray.config.data_sections import LabelConfig
    from rlaif_ray.feedback.local import LocalAsker
    from rlaif_ray.feedback.preference import PreferenceLabeler
    from rlaif_ray.feedback.templates import load_exemplars, load_template
    from rlaif_ray.models import load_tokenizer
    from rlaif_ray.pipelines.preferences import CHUNK
    from rlaif_ray.pipelines.streaming import chunks, in_order
    from rlaif_ray.runtime.cluster import open_cluster
    from rlaif_ray.types import Comparison

    job = make_job(args)
    tokenizer = load_tokenizer(args.model)
    template = load_template(args.template, kind="preference")
    exemplars = load_exemplars(args.exemplars, template)
    prompts = project_prompts(args.model, args.pairs, max_tokens=args.max_prompt_tokens)
    texts = [completion.text for completion in answers(prompts, tokenizer, 2 * args.answer_tokens)]
    halves = [(text[: len(text) // 2], text[len(text) // 2 :]) for text in texts]
    pairs = [Comparison(p.id, p.text, *half) for p, half in zip(prompts, halves, strict=True)]
    with open_cluster(job) as cluster:
        judge = job.feedback.judge
        engines = cluster.start_judges(judge, context=args.context)
        spec = cluster._engine_spec(judge, judge, context=args.context, transfer=None)
        cluster.wait()
        asker = LocalAsker(engines, tokenizer, args.context, args.model)
        labeler = PreferenceLabeler(asker, template, LabelConfig(), exemplars=exemplars, min_answer_mass=0.0)
        mirrored = [Comparison(p.id, p.prompt, p.response_b, p.response_a) for p in pairs]
        both = [pair for two in zip(pairs, mirrored, strict=True) for pair in two]
        queries = asker.queries([labeler.example(pair)[0] for pair in both])
        plain = {"vllm": PlainVllm(spec), "vllm_no_cache": PlainVllm(spec, enable_prefix_caching=False)}
        for engine in plain.values():
            engine.wait()

        def ours(k: int) -> float:
            began = time.perf_counter()
            done = [one for _, labels in in_order(labeler.label, chunks(pairs, CHUNK), at_once=2) for one in labels]
            seconds = time.perf_counter() - began
            assert len(done) == len(pairs) and all(label.p_a is not None for label in done)
            return seconds

        def vllm(name: str) -> float:
            parameters = [
                {"temperature": 1.0, "max_tokens": 1, "detokenize": False, "logprob_token_ids": list(q.candidates)}
                for q in queries
            ]
            return plain[name].generate([q.prompt for q in queries], parameters)[0]

        sides = {"ours": ours, "vllm": lambda k: vllm("vllm"), "vllm_no_cache": lambda k: vllm("vllm_no_cache")}
        try:
            seconds = alternate(sides, args.rounds)
        finally:
            for engine in plain.values():
                engine.close()
    return {
        "benchmark": "label",
        "ratio": ratio(seconds, "vllm", "ours"),  # labels per second, ours over plain vLLM's
        "ratio_over_no_cache": ratio(seconds, "vllm_no_cache", "ours"),
        "labels_per_s": {side: round(len(pairs) / statistics.median(taken), 3) for side, taken in seconds.items()},
        **medians(seconds),
        "pairs": len(pairs),
        "judge_tokens": sum(len(q.prompt) for q in queries),
        "exemplars": len(exemplars),
        "model": args.model,
        "device": args.device,
        **machine(),
    }


if __name__ == "__main__":
    main()
