"""`rlaif pairs`: responses of one or more policies to the same prompts, as unlabelled preference records."""

from __future__ import annotations

import itertools
import random
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif_ray.data.preferences import PreferenceRecord
from rlaif_ray.data.record_files import RecordWriter
from rlaif_ray.feedback.failures import counts, may_pass
from rlaif_ray.interfaces import GenerationSettings
from rlaif_ray.pipelines.begun import in_begun_precision, keep_precision
from rlaif_ray.pipelines.chat_date import with_chat_date
from rlaif_ray.pipelines.contexts import policy_prompts
from rlaif_ray.pipelines.inputs import look_at
from rlaif_ray.pipelines.partial import must_agree, not_final, reasons_told, require, rows_again, rows_kept
from rlaif_ray.pipelines.rows import AnsweredRow
from rlaif_ray.pipelines.run_folder import open_output, output_of, state_of, stop_when_asked
from rlaif_ray.pipelines.streaming import CHUNK, chunks
from rlaif_ray.runtime.cluster import open_cluster
from rlaif_ray.runtime.placement import placement_table
from rlaif_ray.tracking.files import append_rows, read_rows_streaming, write_json
from rlaif_ray.tracking.progress import SILENT_S, ItemProgress, print_table

if TYPE_CHECKING:
    from rlaif_ray.config.jobs import PairsJob
    from rlaif_ray.config.load import Loaded
    from rlaif_ray.config.sections import PolicyConfig
    from rlaif_ray.data.prompt_table import PromptTable
    from rlaif_ray.runtime.cluster import Cluster
    from rlaif_ray.types import Completion, Prompt


@dataclass(frozen=True, slots=True)
class Source:
    """One policy with the prompts in its own tokens."""

    name: str
    policy: PolicyConfig
    prompts: PromptTable
    context: int


@dataclass(slots=True)
class Made:
    """What came of the responses."""

    responses: int = 0
    tokens: int = 0
    duplicates: int = 0  # responses that another one to the same prompt equals
    empty: int = 0
    pairs: int = 0
    without_pair: int = 0  # prompts with fewer than two distinct responses
    by_source: Counter[str] = field(default_factory=Counter)  # responses in pairs
    failures: Counter[str] = field(default_factory=Counter)  # responses that there are not, by reason
    retryable: int = 0  # of these, those that could be there after another try


def make_pairs(loaded: Loaded) -> dict[str, Any]:
    """Samples, pairs and writes them; goes on where an earlier run in the same folder was ended."""
    loaded = with_chat_date(loaded)
    job, run_dir = in_begun_precision(loaded, state_of(loaded)), loaded.run_dir
    looked = look_at(job)
    sources = read_sources(job)
    output = output_of(loaded, "pairs.jsonl")
    state = open_output(loaded, output, looked, made=["responses/*.jsonl"])
    with stop_when_asked() as stopping, ExitStack() as stack:
        done = [_kept(state, source) for source in sources]
        missing = [(s, k) for s, k in zip(sources, done, strict=True) if k < len(s.prompts) or _to_repeat(state, s)]
        if missing:
            cluster = stack.enter_context(open_cluster(job))
            keep_precision(state, cluster.precisions())
            for source, k in missing:
                _sample(job, source, k, cluster, _responses_file(state, source), stopping)
    if stopping():
        raise KeyboardInterrupt
    looked.check(output)
    for source in sources:
        must_agree(_responses_file(state, source), len(source.prompts))
    made = _write_pairs(job, sources, state, output)
    summary = _summary(made, job, output)
    write_json(run_dir / "summary.json", summary)
    print_table("pairs", list(_lines(summary)), run_dir)
    require(
        "min_done_fraction",
        job.min_done_fraction,
        "responses must be sampled",
        done=made.responses,
        wanted=made.responses + sum(made.failures.values()),
        failures=made.failures,
        retryable=made.retryable,
        kept=state / "responses",
        remedy="quarantined: leave out those prompts, which end engines; or lower the fraction.",
    )
    return summary


def plan_pairs(loaded: Loaded) -> str:
    """What `--dry-run` shows beside the resolved config."""
    job = loaded.config
    names = ["policy", *job.other_policies]
    return f"{placement_table(job)}\n\npolicies, one after the other: {', '.join(names)}"


def read_sources(job: PairsJob) -> list[Source]:
    """Every policy's prompts.

    Raises:
        InputError: data, a model or the context is wrong.
    """
    sources = []
    for name, policy in {"policy": job.policy, **job.other_policies}.items():
        key = "policy" if policy is job.policy else f"other_policies.{name}"
        prompts, context = policy_prompts(
            policy, job.data, job.rollout.max_context, job.sampling.max_new_tokens, job.chat_date, key
        )
        sources.append(Source(name, policy, prompts, context))
    return sources


def _responses_file(state: Path, source: Source) -> Path:
    return state / "responses" / f"{source.name}.jsonl"


def _kept(state: Path, source: Source) -> int:
    """How many of a policy's prompts are answered."""
    return rows_kept(_responses_file(state, source), source.prompts.ids, lambda row: row["prompt_id"], AnsweredRow)


def _to_repeat(state: Path, source: Source) -> bool:
    return any(map(_failed, read_rows_streaming(_responses_file(state, source))))


def _sample(job: PairsJob, source: Source, done: int, cluster: Cluster, path: Path, stopping: Any) -> None:
    """Appends the responses of one policy, a row per prompt, chunk by chunk, after those that are done."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with ItemProgress(f"responses of {source.name}", len(source.prompts), "prompts") as progress:
        progress.note(f"starting engines for {source.policy.model}")
        engines = cluster.start_rollouts(source.policy, job.rollout, context=source.context, receives_weights=False)
        cluster.wait()
        progress.resume(done)
        settings = GenerationSettings(
            samples_per_prompt=job.sampling.responses_per_prompt,
            max_new_tokens=job.sampling.max_new_tokens,
            temperature=job.sampling.temperature,
            seed=job.seed,
        )

        def ask(prompts: Sequence[Prompt]) -> list[Mapping[str, Any]]:
            completions = engines.generate(prompts, settings)
            own = chunks(completions, settings.samples_per_prompt)
            return [_row(*group) for group in zip(prompts, own, strict=True)]

        rows_again(path, _failed, lambda numbers: ask([source.prompts[n] for n in numbers]), stopping)
        for prompts in chunks(source.prompts[done:], CHUNK):
            if stopping():
                break
            append_rows(path, ask(prompts))
            progress.advance(len(prompts))
        cluster.stop_engines(engines)


def _row(prompt: Prompt, completions: Sequence[Completion]) -> dict[str, Any]:
    return {
        "prompt_id": prompt.id,
        "texts": [c.text.strip() for c in completions if c.failure is None],
        "tokens": sum(len(c.tokens) for c in completions),
        "failures": [c.failure for c in completions if c.failure is not None],
    }


def _failed(row: Mapping[str, Any]) -> bool:
    """Whether a prompt is to be answered once more."""
    return any(map(may_pass, row.get("failures", ())))


def _write_pairs(job: PairsJob, sources: Sequence[Source], state: Path, output: Path) -> Made:
    """Joins the policies' responses prompt by prompt, and writes the pairs."""
    made = Made()
    wanted = job.sampling.pairs_per_prompt
    prompts = len(sources[0].prompts)
    with RecordWriter(output) as writer, ItemProgress("pairing", prompts, "prompts", after_s=SILENT_S) as progress:
        writer.keep(0)
        for part in chunks(progress.over(_joined(sources, state)), 1000):
            records = []
            for prompt, rows in part:
                responses = _distinct(sources, rows, made)
                pairs = list(itertools.combinations(responses, 2))
                made.without_pair += not pairs
                draw = random.Random(f"{job.seed}/{prompt.id}")
                draw.shuffle(pairs)
                for number, pair in enumerate(pairs[:wanted]):
                    records.append(_record(prompt, number, pair, draw))
                    made.by_source.update(source for _, source in pair)
            made.pairs += len(records)
            writer.write(records)
        writer.finish()
    return made


def _joined(sources: Sequence[Source], state: Path) -> Iterator[tuple[Prompt, list[dict[str, Any] | None]]]:
    """Every prompt of the first policy with each policy's row about it; None where it was too long and left out.

    All policies have the prompts in the order of the data, so their files are read side by side.
    """
    streams = [zip(s.prompts.rows, read_rows_streaming(_responses_file(state, s)), strict=True) for s in sources]
    heads = [next(stream, None) for stream in streams]
    for number, prompt in zip(sources[0].prompts.rows, sources[0].prompts, strict=True):
        for k, stream in enumerate(streams):
            while (head := heads[k]) is not None and head[0] < number:
                heads[k] = next(stream, None)
        yield prompt, [head[1] if head is not None and head[0] == number else None for head in heads]


def _distinct(sources: Sequence[Source], rows: Sequence[dict[str, Any] | None], made: Made) -> list[tuple[str, str]]:
    """(text, source) of every response to a prompt that no earlier one equals; empty ones can't be compared."""
    found: dict[str, str] = {}
    for source, row in zip(sources, rows, strict=True):
        for text in row["texts"] if row else ():
            made.responses += 1
            if not text:
                made.empty += 1
            elif text in found:
                made.duplicates += 1
            else:
                found[text] = source.name
        failed, retryable = counts(row.get("failures", ()) if row else ())
        made.failures += failed
        made.retryable += retryable
        made.tokens += row["tokens"] if row else 0
    return list(found.items())


def _record(
    prompt: Prompt, number: int, pair: tuple[tuple[str, str], tuple[str, str]], draw: random.Random
) -> PreferenceRecord:
    """One pair, in a drawn order: which policy a response is from must not show in its place."""
    (first, first_source), (second, second_source) = pair if draw.random() < 0.5 else pair[::-1]
    return PreferenceRecord(
        id=f"{prompt.id}/{number}",
        prompt=prompt.messages,
        response_a=first,
        response_b=second,
        source_a=first_source,
        source_b=second_source,
    )


def _summary(made: Made, job: PairsJob, output: Path) -> dict[str, Any]:
    return {
        "job": "pairs",
        "output": str(output),
        "policies": {name: p.model for name, p in {"policy": job.policy, **job.other_policies}.items()},
        "responses": made.responses,
        "tokens": made.tokens,
        "failures": dict(made.failures),
        "retryable": made.retryable,
        "duplicates": made.duplicates,
        "empty": made.empty,
        "pairs": made.pairs,
        "prompts_without_pair": made.without_pair,
        "responses_in_pairs": dict(made.by_source),
    }


def _lines(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "responses", f"{summary['responses']} ({summary['tokens']} tokens)"
    yield "failures", reasons_told(summary["failures"])
    yield "not final", not_final(summary["retryable"])
    yield "left out", f"{summary['duplicates']} duplicates, {summary['empty']} empty"
    yield "pairs", str(summary["pairs"])
    if summary["prompts_without_pair"]:
        yield "without a pair", f"{summary['prompts_without_pair']} prompts (fewer than two distinct responses)"
    yield "output", summary["output"]
