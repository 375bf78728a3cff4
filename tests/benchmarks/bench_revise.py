"""Revising as in `rlaif revise` against plain vLLM given the very same requests: tokens per second.

Ours draws principles, writes conversations, tokenises, samples, reads and remembers, chunk by chunk, and is timed from
the driver. Plain vLLM gets tokens and seeds, and is timed around `LLM.generate` alone: all first responses in one call,
then all critiques of them, all revisions, and so on, as none of these can be written before the one it builds on.

The requests are recorded from a run of ours before. Every round uses the same seeds, so ours should ask the same again
(`same_requests`) and both should be given the same (`same_tokens`).
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import count, zip_longest
from pathlib import Path
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
)

if TYPE_CHECKING:
    from rlaif_ray.feedback.revision import Reviser
    from rlaif_ray.interfaces import GenerationSettings, Generator
    from rlaif_ray.types import Completion, Prompt, TokenAnswer, TokenQuery

Sample = tuple[int, ...]
Request = tuple[tuple[int, ...], int]  # tokens and seed


def main() -> None:
    parser = arguments(__doc__, rounds=2)
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--max-prompt-tokens", type=int, default=128)
    parser.add_argument("--constitution", default="default")
    parser.add_argument("--examples", default="default", help="worked critiques and revisions; empty: none")
    parser.add_argument("--context", type=int, default=2048)
    parser.add_argument("--kv-cache-gb", type=float, default=1.0)
    args = parser.parse_args()
    with json_output() as emit:
        emit(measure(args))


class Recording:
    """A Generator that passes on to another one, and keeps what it was asked and what came."""

    def __init__(self, generator: Generator) -> None:
        self.calls: list[list[Request]] = []
        self.samples: list[Sample] = []
        self._generator = generator

    def generate(self, prompts: Sequence[Prompt], settings: GenerationSettings) -> list[Completion]:
        from rlaif_ray.rollout.vllm_engine import sample_seed

        completions = self._generator.generate(prompts, settings)
        self.calls.append([(p.tokens, sample_seed(settings.seed, p.id, 0)) for p in prompts])
        self.samples += [c.tokens for c in completions]
        return completions

    def token_logprobs(self, queries: Sequence[TokenQuery]) -> list[TokenAnswer]:
        raise NotImplementedError

    @property
    def requests(self) -> list[Request]:
        return sorted(request for call in self.calls for request in call)


def measure(args: Any) -> dict[str, Any]:
    from rlaif_ray.feedback.local import LocalAsker
    from rlaif_ray.feedback.principles import load_constitution
    from rlaif_ray.feedback.remembered import Memory, RememberingAsker
    from rlaif_ray.feedback.revision import Reviser, load_examples
    from rlaif_ray.interfaces import GenerationSettings
    from rlaif_ray.models import load_tokenizer
    from rlaif_ray.pipelines.constitution import CHUNK
    from rlaif_ray.pipelines.streaming import chunks, in_order
    from rlaif_ray.runtime.cluster import open_cluster

    job = make_job(args)
    tokenizer = load_tokenizer(args.model)
    constitution = load_constitution(args.constitution)
    examples = load_examples(args.examples) if args.examples else ()
    settings = GenerationSettings(1, args.max_new_tokens, 1.0, seed=0)
    prompts = project_prompts(args.model, args.prompts, max_tokens=args.max_prompt_tokens)
    conversations = [(prompt.id, prompt.messages) for prompt in prompts]
    samples: dict[str, list[list[Sample]]] = {"ours": [], "vllm": []}  # of each round
    with tempfile.TemporaryDirectory() as folder, open_cluster(job) as cluster:
        engines = cluster.start_rollouts(job.policy, job.rollout, context=args.context, receives_weights=False)
        spec = cluster._engine_spec(job.policy, job.rollout, context=args.context, transfer=None)
        cluster.wait()
        memories = (Path(folder) / f"{number}.sqlite" for number in count())

        @contextmanager
        def reviser(generator: Generator) -> Iterator[Reviser]:
            """As `rlaif revise` has it, with nothing remembered yet."""
            memory = Memory(next(memories))
            try:
                asker = RememberingAsker(LocalAsker(generator, tokenizer, args.context, args.model), memory)
                yield Reviser(
                    asker, constitution, steps=args.steps, response=settings, revision=settings, examples=examples
                )
            finally:
                memory.close()

        recorded: list[Recording] = []  # of each chunk: its calls come in the order of the steps
        ended: Counter[str] = Counter()
        for chunk in chunks(conversations, CHUNK):
            recorded.append(Recording(engines))
            with reviser(recorded[-1]) as subject:
                ended.update(one.failure.split(":")[0] for one in subject.revise(chunk) if one.failure)
        assert not ended["too_long"] and not ended["engine_error"], f"room is wanting, or an engine: {ended}"
        calls = zip_longest(*(recording.calls for recording in recorded), fillvalue=[])
        stages = [[request for call in stage for request in call] for stage in calls]
        asked = sorted(request for stage in stages for request in stage)
        same_requests = True
        plain = PlainVllm(spec)
        plain.wait()

        def ours(k: int) -> float:
            nonlocal same_requests
            recording = Recording(engines)
            with reviser(recording) as subject:
                began = time.perf_counter()
                work = in_order(subject.revise, chunks(conversations, CHUNK), at_once=1 + job.rollout.replicas)
                done = [one for _, revised in work for one in revised]
                seconds = time.perf_counter() - began
            assert len(done) == len(prompts)
            same_requests &= recording.requests == asked
            samples["ours"].append(recording.samples)
            return seconds

        def vllm(k: int) -> float:
            common = {"temperature": settings.temperature, "max_tokens": settings.max_new_tokens}
            common |= {"logprobs": 0, "detokenize": False}
            answered = [
                plain.generate([tokens for tokens, _ in stage], [{**common, "seed": seed} for _, seed in stage])
                for stage in stages
            ]
            samples["vllm"].append([tokens for _, some in answered for tokens in some])
            return sum(seconds for seconds, _ in answered)

        try:
            seconds = alternate({"ours": ours, "vllm": vllm}, args.rounds)
        finally:
            plain.close()
    tokens = {side: [sum(map(len, some)) for some in rounds[1:]] for side, rounds in samples.items()}
    rates = {
        side: statistics.median(n / s for n, s in zip(tokens[side], taken, strict=True))
        for side, taken in seconds.items()
    }
    return {
        "benchmark": "revise",
        "ratio": round(rates["ours"] / rates["vllm"], 4),  # tokens per second, ours over plain vLLM's
        "tokens_per_s": {side: round(rate, 2) for side, rate in rates.items()},
        **medians(seconds),
        "prompts": len(prompts),
        "steps": args.steps,
        "requests": len(asked),
        "new_tokens": tokens,
        "prompt_tokens": sum(len(prompt) for prompt, _ in asked),
        "ended_early": dict(ended),
        "same_requests": same_requests,
        "same_tokens": len({tuple(sorted(some)) for rounds in samples.values() for some in rounds}) == 1,
        "model": args.model,
        "device": args.device,
        **machine(),
    }


if __name__ == "__main__":
    main()
