"""`rlaif revise`: responses criticised and revised by a constitution, as records to fine-tune on (Bai et al.)."""

from __future__ import annotations

import itertools
import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif_ray.data.prompt_table import PromptTable
from rlaif_ray.documents import parse_json
from rlaif_ray.errors import InputError
from rlaif_ray.feedback.failures import kind_of, may_pass
from rlaif_ray.feedback.local import LocalAsker, role_heads
from rlaif_ray.feedback.principles import Constitution, eligible, load_constitution
from rlaif_ray.feedback.remembered import Memory, RememberingAsker
from rlaif_ray.feedback.revision import Example, Revised, Reviser, Step, load_examples
from rlaif_ray.interfaces import GenerationSettings
from rlaif_ray.pipelines.begun import in_begun_precision, keep_precision
from rlaif_ray.pipelines.chat_date import with_chat_date
from rlaif_ray.pipelines.contexts import JUDGE_CONTEXT, load_chat, read_prompts, readable_context
from rlaif_ray.pipelines.inputs import look_at
from rlaif_ray.pipelines.partial import must_agree, not_final, reasons_told, require, rows_again, rows_kept
from rlaif_ray.pipelines.rows import RevisedRow
from rlaif_ray.pipelines.run_folder import open_output, output_of, state_of, stop_when_asked
from rlaif_ray.pipelines.streaming import CHUNK, chunks, in_order
from rlaif_ray.runtime.cluster import open_cluster
from rlaif_ray.runtime.placement import placement_table
from rlaif_ray.tracking.files import append_rows, cut_rows, read_rows_streaming, replace_rows, write_json
from rlaif_ray.tracking.progress import SILENT_S, ItemProgress, print_table

if TYPE_CHECKING:
    from rlaif_ray.chat.template import ChatTemplate
    from rlaif_ray.config.jobs import ReviseJob
    from rlaif_ray.config.load import Loaded
    from rlaif_ray.interfaces import Asker
    from rlaif_ray.types import Prompt


@dataclass(frozen=True, slots=True)
class Inputs:
    """What a run reads before anything starts."""

    prompts: PromptTable
    helpful: PromptTable
    constitution: Constitution
    examples: tuple[Example, ...]
    chat: ChatTemplate
    context: int  # tokens of an engine


def revise(loaded: Loaded) -> dict[str, Any]:
    """Revises what is not revised yet, and writes the records."""
    loaded = with_chat_date(loaded)
    job, run_dir = in_begun_precision(loaded, state_of(loaded)), loaded.run_dir
    looked = look_at(job)
    inputs = read_inputs(job)
    output = output_of(loaded, "revisions.jsonl")
    state = open_output(loaded, output, looked, made=["steps.jsonl", "helpful.jsonl"])
    steps_file, helpful_file = state / "steps.jsonl", state / "helpful.jsonl"
    with stop_when_asked() as stopping, ExitStack() as stack:
        memory = Memory(state / "answers.sqlite")
        stack.callback(memory.close)
        progress = stack.enter_context(ItemProgress("revisions", len(inputs.prompts) + len(inputs.helpful), "prompts"))
        progress.note(f"starting engines for {job.policy.model}")
        cluster = stack.enter_context(open_cluster(job))
        keep_precision(state, cluster.precisions())
        engines = cluster.start_rollouts(job.policy, job.rollout, context=inputs.context, receives_weights=False)
        cluster.wait()
        # After the model was trained anew in place its answers are other ones, and in another precision.
        precision = cluster.precision(job.policy.precision)
        known_by = f"local/{looked.contents['policy.model'].known_by}/{precision}/{inputs.context}"
        local = LocalAsker(engines, inputs.chat, inputs.context, job.policy.model, identity=known_by)
        asker = RememberingAsker(local, memory)
        progress.resume(0)
        at_once = 1 + job.rollout.replicas  # the next prompts are ready when an engine is
        for path, prompts, steps in (
            (steps_file, inputs.prompts, job.revision.steps),
            (helpful_file, inputs.helpful, 0),
        ):
            reviser = make_reviser(job, inputs, asker, steps)
            done = rows_kept(path, prompts.ids, lambda row: row["id"], RevisedRow)
            progress.advance(done)
            rows_again(path, _failed, _rows_by(reviser, prompts), stopping)
            work = in_order(_revised_by(reviser), chunks(prompts[done:], CHUNK), at_once=at_once, stopping=stopping)
            for chunk, revised in work:
                append_rows(path, [_row(p, r) for p, r in zip(chunk, revised, strict=True)])
                progress.advance(len(chunk))
        if stopping():
            raise KeyboardInterrupt
    looked.check(output)
    must_agree(steps_file, len(inputs.prompts))
    must_agree(helpful_file, len(inputs.helpful))
    summary = write_records(job, steps_file, helpful_file, output)
    write_json(run_dir / "summary.json", summary)
    print_table("revisions", list(_lines(summary)), run_dir)
    _enough(summary, job)
    return summary


def _revised_by(reviser: Reviser) -> Callable[[list[Prompt]], list[Revised]]:
    return lambda prompts: reviser.revise([(prompt.id, prompt.messages) for prompt in prompts])


def _rows_by(reviser: Reviser, prompts: Sequence[Prompt]) -> Callable[[list[int]], list[Mapping[str, Any]]]:
    revised = _revised_by(reviser)

    def ask(numbers: list[int]) -> list[Mapping[str, Any]]:
        own = [prompts[n] for n in numbers]
        return [_row(p, r) for p, r in zip(own, revised(own), strict=True)]

    return ask


def _failed(row: Mapping[str, Any]) -> bool:
    """Whether a prompt is to be taken through its steps once more; what was answered is remembered."""
    return may_pass(row["failure"])


def plan_revise(loaded: Loaded) -> str:
    """What `--dry-run` shows: actors, and what the model reads at the first step of the first prompt."""
    job = loaded.config
    inputs = read_inputs(job)
    shown = _Shown(LocalAsker(None, inputs.chat, inputs.context, job.policy.model))
    make_reviser(job, inputs, shown, steps=1).revise([(inputs.prompts[0].id, inputs.prompts[0].messages)])
    parts = [placement_table(job)]
    for name, question in zip(("response", "critique", "revision"), shown.questions, strict=False):
        turns = "\n\n".join(f"<{turn.role}>\n{turn.content}" for turn in question.turns)
        parts.append(f"asked for a {name} to the first prompt:\n\n{turns}")
    return "\n\n".join(parts)


class _Shown:
    """An Asker that keeps what it is asked and answers with stand-ins."""

    def __init__(self, asker: LocalAsker) -> None:
        self.name, self.identity, self.special = asker.name, asker.identity, asker.special
        self.questions: list[Any] = []

    def fits(self, question: Any) -> bool:
        return True

    def answer(self, questions: Sequence[Any]) -> Iterator[tuple[int, Any]]:
        raise NotImplementedError

    def explain(self, questions: Sequence[Any], settings: GenerationSettings) -> Iterator[tuple[int, Any]]:
        from rlaif_ray.types import Explanation

        for i, question in enumerate(questions):
            self.questions.append(question)
            yield i, Explanation((f"(what the model writes as number {len(self.questions)})",))


def read_inputs(job: ReviseJob) -> Inputs:
    """Prompts, constitution and examples.

    Raises:
        InputError: any of them is wrong, or they don't fit together.
    """
    cfg, policy = job.revision, job.policy
    constitution = load_constitution(cfg.constitution, "revision.constitution")
    eligible(constitution, ("critique_request", "revision_request"), cfg.principles)
    examples = load_examples(cfg.examples) if cfg.examples else ()
    chat = load_chat(policy, job.chat_date, "policy", thinks=False)
    room = readable_context(policy, job.rollout.max_context, "rollout.max_context")
    context = job.rollout.max_context or min(JUDGE_CONTEXT, room)
    shown = sum(len(chat.tokenizer(turn.content)["input_ids"]) for example in examples for turn in example.turns)
    left = context - shown - 4 * cfg.max_new_tokens  # response, critique, revision, and the requests
    if left < 64:
        raise InputError(
            f"revision.max_new_tokens must leave room for a prompt in {context} tokens of context, of which the "
            f"examples take {shown} (got {cfg.max_new_tokens}). Lower it, raise rollout.max_context, or set "
            f"revision.examples=null."
        )
    prompts = read_prompts(job.data, chat, left)
    helpful = read_prompts(job.helpful.data, chat, left) if job.helpful.data is not None else PromptTable.empty()
    wanted = round(len(prompts) * job.helpful.share / (1 - job.helpful.share))
    return Inputs(prompts, helpful[:wanted], constitution, examples, chat, context)


def make_reviser(job: ReviseJob, inputs: Inputs, asker: Asker, steps: int) -> Reviser:
    cfg = job.revision
    settings = GenerationSettings(1, cfg.max_new_tokens, cfg.temperature, job.seed)
    return Reviser(
        asker,
        inputs.constitution,
        steps=steps,
        response=settings,
        revision=settings,
        examples=inputs.examples,
        only=cfg.principles,
        seed=job.seed,
        heads=role_heads(inputs.chat),
        tags=inputs.chat.tags,
    )


def _row(prompt: Prompt, revised: Revised) -> dict[str, Any]:
    messages = [{"role": m.role, "content": m.content} for m in prompt.messages]
    return {**asdict(revised), "prompt": messages}


# ---- Records ---------------------------------------------------------------------------------------------------------


def write_records(job: ReviseJob, steps_file: Path, helpful_file: Path, output: Path) -> dict[str, Any]:
    """Writes rows of `messages` to fine-tune on, revisions and helpful answers in a drawn order; the summary."""
    tally: Counter[str] = Counter()
    failures: Counter[str] = Counter()
    principles: Counter[str] = Counter()
    helpful_failures: Counter[str] = Counter()
    cut_rows(output, 0)
    output.parent.mkdir(parents=True, exist_ok=True)
    for rows in chunks(_revisions(job, steps_file, tally, failures, principles), 1000):
        append_rows(output, rows)
        tally["records"] += len(rows)
    share = job.helpful.share
    room = round(tally["records"] * share / (1 - share))
    for rows in chunks(_helpful(helpful_file, room, tally, helpful_failures), 1000):
        append_rows(output, rows)
        tally["records"] += len(rows)
    if tally["records"]:
        replace_rows(output, _drawn_order(output, job.seed, tally["records"]))
    return {
        "job": "revise",
        "output": str(output),
        "records": tally["records"],
        **{name: tally[name] for name in ("prompts", "revised", "steps", "helpful", "unanswered")},
        **{name: tally[name] for name in ("helpful_prompts", "helpful_unanswered", "helpful_retryable")},
        "retryable": tally["retryable"] + tally["helpful_retryable"],
        "failures": dict(failures),
        "helpful_failures": dict(helpful_failures),
        "principles": dict(principles),
    }


def _revisions(
    job: ReviseJob, steps_file: Path, tally: Counter[str], failures: Counter[str], principles: Counter[str]
) -> Iterator[dict[str, Any]]:
    for row in read_rows_streaming(steps_file):
        steps = [Step(**step) for step in row["steps"]]
        tally["prompts"] += 1
        tally["revised"] += bool(steps)
        tally["steps"] += len(steps)
        principles.update(step.principle for step in steps)
        if row["failure"]:
            failures[kind_of(row["failure"])] += 1
        tally["retryable"] += may_pass(row["failure"])
        tally["unanswered"] += not steps and unanswered(row["failure"])
        chosen = list(enumerate(steps, start=1))[-1 if job.revision.keep == "last" else 0 :]
        for number, step in chosen:
            source = f"revision-{number}"
            yield _record(f"{row['id']}/{number}", row["prompt"], step.revision, source, step.principle)


def _helpful(path: Path, room: int, tally: Counter[str], failures: Counter[str]) -> Iterator[dict[str, Any]]:
    """At most `room` helpful answers."""
    for row in read_rows_streaming(path):
        tally["helpful_prompts"] += 1
        if row["failure"]:
            failures[kind_of(row["failure"])] += 1
        tally["helpful_retryable"] += may_pass(row["failure"])
        tally["helpful_unanswered"] += unanswered(row["failure"])
        if row["response"] and not row["failure"] and tally["helpful"] < room:
            tally["helpful"] += 1
            yield _record(row["id"], row["prompt"], row["response"], "helpful", None)


def _drawn_order(path: Path, seed: int, count: int) -> Iterator[dict[str, Any]]:
    """The rows of a file in a drawn order. Of the rows only where each begins is held in memory."""
    with path.open("rb") as file, ItemProgress("shuffling", count, "records", after_s=SILENT_S) as progress:
        ends = array("Q", itertools.accumulate(map(len, file)))
        starts = array("Q", [0]) + ends[:-1]
        random.Random(seed).shuffle(starts)
        for start in progress.over(starts):
            file.seek(start)
            yield parse_json(file.readline(), dict)


def _record(name: str, prompt: list[dict[str, str]], response: str, source: str, principle: str | None) -> Any:
    messages = [*prompt, {"role": "assistant", "content": response}]
    return {"id": name, "messages": messages, "source": source, "principle": principle}


def _lines(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "prompts", f"{summary['prompts']}, {summary['revised']} of them revised"
    yield "steps", f"{summary['steps']} critiques with revisions, by {len(summary['principles'])} principles"
    yield "ended early", reasons_told(summary["failures"])
    yield "not final", not_final(summary["retryable"])
    yield "helpful", f"{summary['helpful']} answers mixed in" if summary["helpful"] else ""
    yield "no helpful answer", reasons_told(summary["helpful_failures"])
    yield "records", str(summary["records"])
    yield "output", summary["output"]


def unanswered(failure: str | None) -> bool:
    """Whether a prompt ended without an answer of the model. What it did say, nothing or the same again, is one."""
    return failure is not None and not failure.startswith(("empty_", "echoed_"))


def _enough(summary: dict[str, Any], job: ReviseJob) -> None:
    kept, of_helpful = summary["output"], summary["helpful_retryable"]
    remedy = "too_long: raise rollout.max_context or lower revision.steps; "
    remedy += "open_thought: raise revision.max_new_tokens; or lower the fraction."
    for what, prefix, retryable in (
        ("prompts must be answered", "", summary["retryable"] - of_helpful),
        ("helpful prompts must be answered", "helpful_", of_helpful),
    ):
        require(
            "min_done_fraction",
            job.min_done_fraction,
            what,
            done=summary[f"{prefix}prompts"] - summary[f"{prefix}unanswered"],
            wanted=summary[f"{prefix}prompts"],
            failures={reason: n for reason, n in summary[f"{prefix}failures"].items() if unanswered(reason)},
            retryable=retryable,
            remedy=remedy,
            kept=kept,
        )
    require(
        "revision.min_revised_fraction",
        job.revision.min_revised_fraction,
        "prompts must get a revision",
        done=summary["revised"],
        failures=summary["failures"],
        remedy="Use a stronger policy.model, examples of your own, or lower the fraction.",
        wanted=summary["prompts"],
        retryable=summary["retryable"] - of_helpful,
        kept=kept,
    )
