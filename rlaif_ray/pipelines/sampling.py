"""`rlaif sample`: a policy's responses, or the best of n by a judge, as records to fine-tune on or to compare.

Two baselines of RLAIF are made of it: fine-tuning on the judge's own responses (the policy here is the judge's model),
and best-of-n against the judge, from which RL must show a gain (Sharma et al. 2402.12366).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif_ray.errors import FeedbackError
from rlaif_ray.feedback.failures import counts, kind_of, may_pass
from rlaif_ray.interfaces import GenerationSettings, score_answered
from rlaif_ray.pipelines.begun import in_begun_precision, keep_precision
from rlaif_ray.pipelines.chat_date import with_chat_date
from rlaif_ray.pipelines.contexts import policy_prompts
from rlaif_ray.pipelines.feedback import (
    FeedbackInputs,
    check_reward_templates,
    feedback_lines,
    read_feedback,
    start_feedback,
)
from rlaif_ray.pipelines.inputs import look_at
from rlaif_ray.pipelines.partial import must_agree, not_final, reasons_told, require, rows_again, rows_kept
from rlaif_ray.pipelines.rows import SampledRow
from rlaif_ray.pipelines.run_folder import open_output, output_of, state_of, stop_when_asked
from rlaif_ray.pipelines.streaming import CHUNK, chunks
from rlaif_ray.runtime.cluster import open_cluster
from rlaif_ray.runtime.placement import placement_table
from rlaif_ray.tracking.display import share
from rlaif_ray.tracking.files import append_rows, cut_rows, read_rows_streaming, write_json
from rlaif_ray.tracking.progress import ItemProgress, print_table

if TYPE_CHECKING:
    from rlaif_ray.config.jobs import SampleJob
    from rlaif_ray.config.load import Loaded
    from rlaif_ray.data.prompt_table import PromptTable
    from rlaif_ray.types import Completion, Prompt, Score


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run reads before anything starts."""

    prompts: PromptTable
    context: int  # tokens of a rollout engine
    feedback: FeedbackInputs | None


def sample_responses(loaded: Loaded) -> dict[str, Any]:
    """Samples, scores and writes what is not there yet; goes on where an earlier run in the folder was ended."""
    loaded = with_chat_date(loaded)
    job, run_dir = in_begun_precision(loaded, state_of(loaded)), loaded.run_dir
    looked = look_at(job)
    inputs = read_inputs(job)
    output = output_of(loaded, "responses.jsonl")
    rows_file = open_output(loaded, output, looked, made=["sampled.jsonl"]) / "sampled.jsonl"
    with stop_when_asked() as stopping:
        done = rows_kept(rows_file, inputs.prompts.ids, lambda row: row["prompt_id"], SampledRow)
        if done < len(inputs.prompts) or any(map(_failed, read_rows_streaming(rows_file))):
            _sample(job, inputs, done, rows_file, stopping)
    if stopping():
        raise KeyboardInterrupt
    looked.check(output)
    must_agree(rows_file, len(inputs.prompts))
    summary = _write_records(job, rows_file, output)
    write_json(run_dir / "summary.json", summary)
    print_table("responses", list(_lines(summary)), run_dir)
    _enough(summary, job.min_done_fraction, rows_file)
    if not summary["records"]:
        raise FeedbackError(
            f"no prompt got a response to keep (left out: {summary['left_out']}): there is nothing to go on with. "
            f"Look at {rows_file}."
        )
    return summary


def plan_sample(loaded: Loaded) -> str:
    """What `--dry-run` shows beside the resolved config."""
    job = loaded.config
    lines = feedback_lines(job.feedback) if job.feedback is not None else []
    return "\n\n".join([placement_table(job), *lines])


def read_inputs(job: SampleJob) -> Inputs:
    """Prompts and what feedback needs.

    Raises:
        InputError: any of them is wrong.
    """
    longest = job.sampling.max_new_tokens
    prompts, context = policy_prompts(job.policy, job.data, job.rollout.max_context, longest, job.chat_date)
    if job.feedback is None:
        return Inputs(prompts, context, None)
    feedback = read_feedback(job.feedback, job.seed, job.chat_date)
    check_reward_templates(job.feedback, prompts.one_of_each_shape(), job.chat_date)
    return Inputs(prompts, context, feedback)


def _sample(job: SampleJob, inputs: Inputs, done: int, path: Path, stopping: Any) -> None:
    """Appends a row per prompt, chunk by chunk, after those that are done."""
    sampling = job.sampling
    settings = GenerationSettings(
        samples_per_prompt=sampling.samples_per_prompt,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        seed=job.seed,
    )
    with open_cluster(job) as cluster, ItemProgress("responses", len(inputs.prompts), "prompts") as progress:
        keep_precision(path.parent, cluster.precisions())
        progress.note(f"starting engines for {job.policy.model}")
        engines = cluster.start_rollouts(job.policy, job.rollout, context=inputs.context, receives_weights=False)
        scorer = start_feedback(inputs.feedback, cluster) if inputs.feedback is not None else None
        cluster.wait()
        progress.resume(done)

        def ask(prompts: Sequence[Prompt]) -> list[Mapping[str, Any]]:
            completions = engines.generate(prompts, settings)
            scores = score_answered(scorer, completions) if scorer is not None else [None] * len(completions)
            own = (chunks(of_all, sampling.samples_per_prompt) for of_all in (completions, scores))
            return [_row(*group) for group in zip(prompts, *own, strict=True)]

        rows_again(path, _failed, lambda numbers: ask([inputs.prompts[n] for n in numbers]), stopping)
        for prompts in chunks(inputs.prompts[done:], CHUNK):
            if stopping():
                break
            append_rows(path, ask(prompts))
            progress.advance(len(prompts))


def _row(prompt: Prompt, completions: Sequence[Completion], scores: Sequence[Score | None]) -> dict[str, Any]:
    unanswered = [c.failure for c in completions if c.failure is not None]
    answered = [k for k, c in enumerate(completions) if c.failure is None]
    completions, scores = [completions[k] for k in answered], [scores[k] for k in answered]
    return {
        "prompt_id": prompt.id,
        "prompt": [{"role": m.role, "content": m.content} for m in prompt.messages],
        "responses": [c.text.strip() for c in completions],
        "tokens": [len(c.tokens) for c in completions],
        "scores": [None if s is None else s.value for s in scores],
        "failures": [None if s is None else s.failure for s in scores],
        "unanswered": unanswered,
    }


def _failed(row: Mapping[str, Any]) -> bool:
    """Whether a prompt's responses are to be sampled and scored once more: they come out the same, by their seeds."""
    return any(map(may_pass, _reasons(row)))


def _reasons(row: Mapping[str, Any]) -> list[str | None]:
    """Why there is no response, or no score of one; None for each that is there."""
    return [*row["failures"], *row.get("unanswered", ())]


def _write_records(job: SampleJob, rows_file: Path, output: Path) -> dict[str, Any]:
    """The records of all rows, and what they came to."""
    left_out: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    found = {"prompts": 0, "records": 0, "tokens": 0, "retryable": 0}
    best: list[float] = []
    mean: list[float] = []
    output.parent.mkdir(parents=True, exist_ok=True)
    cut_rows(output, 0)
    for rows in chunks(read_rows_streaming(rows_file), 1000):
        records = []
        for row in rows:
            found["prompts"] += 1
            found["tokens"] += sum(row["tokens"])
            failed, retryable = counts(_reasons(row))
            failures += failed
            found["retryable"] += retryable
            kept = list(_kept(row, left_out, scored=job.feedback is not None))
            records += kept
            values = [s for s in row["scores"] if s is not None]
            if kept and values:
                best.append(kept[0]["score"])
                mean.append(sum(values) / len(values))
        append_rows(output, records)
        found["records"] += len(records)
    scores = {"best": sum(best) / len(best), "mean": sum(mean) / len(mean)} if best else None
    return {
        "job": "sample",
        "output": str(output),
        "policy": job.policy.model,
        "samples_per_prompt": job.sampling.samples_per_prompt,
        **found,
        "failures": dict(failures),
        "left_out": dict(left_out),
        "score": scores,
    }


def _kept(row: dict[str, Any], left_out: Counter[str], *, scored: bool) -> Iterator[dict[str, Any]]:
    """All responses to a prompt, or the first of those with the highest score: failure to judge is not a judgement."""
    usable = []
    for response, score, failure in zip(row["responses"], row["scores"], row["failures"], strict=True):
        if not response:
            left_out["empty"] += 1
        elif scored and score is None:
            left_out[kind_of(failure or "unscored")] += 1
        else:
            usable.append((response, score))
    if scored and usable:
        usable = [max(usable, key=lambda pair: pair[1])]
    for number, (response, score) in enumerate(usable):
        yield {"id": f"{row['prompt_id']}/{number}", "prompt": row["prompt"], "response": response, "score": score}


def _lines(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    sampled = summary["prompts"] * summary["samples_per_prompt"]
    yield "responses", f"{sampled} to {summary['prompts']} prompts ({summary['tokens']} tokens)"
    yield "left out", reasons_told(summary["left_out"])
    yield "failures", reasons_told(summary["failures"])
    yield "not final", not_final(summary["retryable"])
    if summary["score"]:
        yield "score", f"{share(summary['score']['best'])} the best, {share(summary['score']['mean'])} on average"
    yield "records", str(summary["records"])
    yield "output", summary["output"]


def _enough(summary: dict[str, Any], least: float, kept: Path) -> None:
    wanted = summary["prompts"] * summary["samples_per_prompt"]
    require(
        "min_done_fraction",
        least,
        "responses must be sampled, and scored where there is feedback",
        done=wanted - sum(summary["failures"].values()),
        wanted=wanted,
        failures=summary["failures"],
        retryable=summary["retryable"],
        kept=kept,
        remedy="too_long: raise the judge's max_context; quarantined: leave out those prompts; or lower the fraction.",
    )
