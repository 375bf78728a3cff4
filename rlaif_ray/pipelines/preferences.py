"""`rlaif label`: AI preference labels for pairs of responses, as a stream of any length."""

from __future__ import annotations

import itertools
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif_ray.config.sections import JudgeConfig, LongerJudge, OpenAIJudge
from rlaif_ray.data.exports import check_hub, push_to_hub
from rlaif_ray.data.preferences import (
    PreferenceRecord,
    check_readable,
    comparison_text,
    failure_reason,
    human_label,
    read_preferences,
)
from rlaif_ray.data.record_files import RecordWriter
from rlaif_ray.data.rows import count_rows
from rlaif_ray.errors import FeedbackError, InputError, RunError
from rlaif_ray.feedback.answers import LOW_MASS
from rlaif_ray.feedback.failures import may_pass
from rlaif_ray.feedback.judge import check_question
from rlaif_ray.feedback.local import LocalAsker
from rlaif_ray.feedback.preference import LongerLabeler, PreferenceLabeler
from rlaif_ray.feedback.principles import Constitution, eligible, load_constitution
from rlaif_ray.feedback.remembered import RememberingAsker
from rlaif_ray.feedback.remote import SPECIAL, OpenAIAsker
from rlaif_ray.feedback.templates import Exemplar, Template, load_exemplars, load_template, template_hash
from rlaif_ray.feedback.thoughts import AnswerLabeler, answers_alone
from rlaif_ray.paths import expand_home
from rlaif_ray.pipelines.asking import open_asker
from rlaif_ray.pipelines.chat_date import with_chat_date
from rlaif_ray.pipelines.contexts import judge_context, load_chat
from rlaif_ray.pipelines.inputs import look_at
from rlaif_ray.pipelines.partial import Silence, again, not_final, reasons_told, require
from rlaif_ray.pipelines.run_folder import open_output, output_of, stop_when_asked
from rlaif_ray.pipelines.streaming import CHUNK, chunks, in_order
from rlaif_ray.runtime.placement import placement_table
from rlaif_ray.tracking.display import digits, percent, share
from rlaif_ray.tracking.files import write_json
from rlaif_ray.tracking.progress import SILENT_S, ItemProgress, print_table
from rlaif_ray.types import Comparison, Label

if TYPE_CHECKING:
    from rlaif_ray.config.jobs import LabelJob
    from rlaif_ray.config.load import Loaded
    from rlaif_ray.interfaces import Asker, Labeler


@dataclass(frozen=True, slots=True)
class Guide:
    """How the judge is to compare, read and checked before anything starts."""

    template: Template
    exemplars: tuple[Exemplar, ...]
    constitution: Constitution | None
    chat: Any  # a local judge's ChatTemplate
    context: int  # of a local judge, tokens

    def hash(self, job: LabelJob) -> str:
        """Of everything that shapes the judge's prompts."""
        return template_hash(self.template, self.exemplars, with_rationales=job.label.reasoning is not None)


@dataclass(slots=True)
class Tally:
    """What labels came to; figures of the final table."""

    records: int = 0
    labels: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    retryable: int = 0  # of the failures, those that could succeed on another try
    both_orders: int = 0
    same_position: int = 0  # the same place wins in both orders
    first_wins: int = 0  # of these, the first
    confidence: float = 0.0  # sum of max(p, 1 - p)
    hard: int = 0
    masses: array[float] = field(
        default_factory=lambda: array("d")
    )  # on the answers, of every pair where it was measured
    low_mass: int = 0  # pairs whose judge had too little on them
    cut: int = 0
    tokens_in: int = 0
    tokens_out: int = 0

    def add(self, record: PreferenceRecord) -> None:
        self.records += 1
        self.tokens_in += record.tokens_in
        self.tokens_out += record.tokens_out
        self.cut += record.cut > 0
        if record.answer_mass is not None:
            self.masses.append(record.answer_mass)
        if record.p_a is None:
            reason = failure_reason(record)
            self.failures[reason] += 1
            self.low_mass += reason == LOW_MASS
            self.retryable += may_pass(record.failed)
            return
        self.labels += 1
        self.hard += record.hard
        self.confidence += max(record.p_a, 1.0 - record.p_a)
        forward, reverse = record.p_a_forward, record.p_a_reversed
        if forward is not None and reverse is not None:
            self.both_orders += 1
            if (forward > 0.5 and reverse < 0.5) or (forward < 0.5 and reverse > 0.5):
                self.same_position += 1
                self.first_wins += forward > 0.5


def make_labels(loaded: Loaded) -> dict[str, Any]:
    """Labels what is not labelled yet in the run's folder, and says what all of it came to."""
    loaded = with_chat_date(loaded)
    job, run_dir = loaded.config, loaded.run_dir
    looked = look_at(job)
    check_readable(job.data.path, split=job.data.split)
    guide = read_guide(job)
    if job.push_to_hub is not None:
        check_hub(job.push_to_hub)
    output = output_of(loaded, "labels.jsonl")
    if output.absolute() == expand_home(job.data.path).absolute():
        raise InputError(
            f"output must be another file than data.path (got {output} for both): the pairs would be taken for "
            f"finished labels. Name another output."
        )
    state = open_output(loaded, output, looked)
    with stop_when_asked() as stopping, ExitStack() as stack:
        writer = stack.enter_context(RecordWriter(output))
        progress = stack.enter_context(ItemProgress("labels", _total(job), "pairs"))
        labeler, at_once, asker = stack.enter_context(open_labeler(job, guide, state, progress))

        def label(records: list[PreferenceRecord]) -> list[PreferenceRecord]:
            labels = labeler.label([to_comparison(record) for record in records])
            return [labelled(record, one, job, guide) for record, one in zip(records, labels, strict=True)]

        work = _Labelling(job, writer, label, at_once, progress, stopping)
        try:
            work.run()
        except InputError:
            looked.check(output)  # a row is wrong, perhaps, for its file was replaced
            raise
        if stopping():
            raise KeyboardInterrupt
        rate = progress.per_s
        spent = asker.memory.spent() if asker else 0.0  # what was asked once is paid once
        looked.check(output)
        writer.finish()
    summary = _summary(job, output, rate, asker, spent)
    write_json(run_dir / "summary.json", summary)
    print_table("labels", list(_lines(summary)), run_dir)
    _enough(summary, job.label.min_labeled_fraction)
    if job.push_to_hub is not None:
        push_to_hub(output, job.push_to_hub)
    return summary


@dataclass(slots=True)
class _Labelling:
    """A pass over all pairs that has every one of them in the writer at its end."""

    job: LabelJob
    writer: RecordWriter
    label: Callable[[list[PreferenceRecord]], list[PreferenceRecord]]
    at_once: int
    progress: ItemProgress
    stopping: Callable[[], bool]
    silence: Silence = field(default_factory=Silence)
    pairs: int = 0  # of the input, as far as it was read

    def run(self) -> None:
        """First what an earlier run asked in vain, then what is left, then once more the few that failed.

        Raises:
            InputError: the data is wrong.
            FeedbackError: the judge answers nobody.
        """
        job, writer = self.job, self.writer
        if job.data.limit is not None and job.data.limit < writer.count:
            raise InputError(
                f"data.limit must be at least the {writer.count} labels that {writer.path} has (got {job.data.limit}): "
                f"it would have more of them than pairs were asked for. Raise it, or name another output."
            )
        self._keep_what_fits()
        self.progress.resume(writer.count)
        before = self._tally().retryable
        if before:
            self._ask_again(before)
            self.silence = Silence()  # these may have had reasons of their own
        for _, records in in_order(self.label, chunks(self._left(), CHUNK), at_once=self.at_once, stopping=self._stop):
            writer.write(records)
            self.progress.advance(len(records))
            self.silence.listen(record.failed for record in records)
        if self.stopping():
            return
        self.silence.check(writer.path)
        if self.pairs != writer.count:
            raise RunError(
                f"{writer.path} has {writer.count} labels for the {self.pairs} pairs of {job.data.path}: the file was "
                f"replaced or cut. Restore it, or name another output."
            )
        tally = self._tally()
        if not before and tally.retryable and tally.labels >= job.label.min_labeled_fraction * tally.records:
            self._ask_again(tally.retryable)

    def _keep_what_fits(self) -> None:
        """Of a pass that is not whole, drops what is not of whole chunks: the same calls follow as without an
        interruption. And labels from the first on that is of another pair than the input has in its place: an earlier
        run read a file that was replaced meanwhile, and is back."""
        job, writer = self.job, self.writer
        pairs = read_preferences(job.data.path, split=job.data.split, limit=job.data.limit)
        # When the records end, no pair is taken.
        fitting = sum(1 for _ in itertools.takewhile(same_pair, zip(writer.records(), pairs, strict=False)))
        if fitting < writer.count:
            self.progress.note(f"{writer.count - fitting} labels are of other pairs than {job.data.path} has: left out")
        elif next(pairs, None) is None:
            return
        writer.keep(fitting // CHUNK * CHUNK)

    def _stop(self) -> bool:
        return self.stopping() or bool(self.silence)

    def _left(self) -> Iterator[PreferenceRecord]:
        """The pairs that are not in the writer."""
        job, done = self.job, self.writer.count
        for record in read_preferences(job.data.path, split=job.data.split, limit=job.data.limit):
            self.pairs += 1
            if self.pairs > done:
                yield record

    def _ask_again(self, count: int) -> None:
        """Once more about every pair that failed in a way that may pass."""
        self.progress.note(f"asking again about {count} pairs that failed in a way that may pass")

        def ask(records: list[PreferenceRecord]) -> list[PreferenceRecord]:
            found = self.label(records)
            self.silence.listen(record.failed for record in found)
            return found

        def failed(record: PreferenceRecord) -> bool:
            return may_pass(record.failed)

        try:
            self.writer.replace(again(self.writer.records(), failed, ask, self._stop))
        except (
            FeedbackError
        ) as error:  # the account or the cap: what is left to ask meets it too; these stay as they are
            self.progress.note(str(error))

    def _tally(self) -> Tally:
        tally = Tally()
        for record in self.writer.records():
            tally.add(record)
        return tally


def plan_labels(loaded: Loaded) -> str:
    """What `--dry-run` shows: actors, and what the judge will read about the first pair."""
    job = loaded.config
    parts = [placement_table(job)] if isinstance(job.judge, JudgeConfig) else []
    guide = read_guide(job)
    first = next(iter(read_preferences(job.data.path, split=job.data.split, limit=1)))
    if isinstance(job.judge, LongerJudge):
        return "\n\n".join([*parts, "judge: the longer response, no model"])
    parts.append(f"template: {guide.template.name} ({guide.hash(job)})")
    labeler = make_labeler(job, guide, _writer_of_prompts(job, guide))
    shown = to_comparison(first)
    shown = (answers_alone(shown) if job.label.thoughts == "cut" else None) or shown
    for number, question in enumerate(labeler.example(shown), start=1):
        turns = "\n\n".join(f"<{turn.role}>\n{turn.content}" for turn in question.turns)
        ending = f"\n\n<judge>\n{question.answer_prefix}" if question.answer_prefix else ""
        parts.append(f"question {number} about the first pair:\n\n{turns}{ending}")
    return "\n\n".join(parts)


def read_guide(job: LabelJob) -> Guide:
    """Template, exemplars, constitution; for a local judge its tokenizer and context.

    Raises:
        InputError: any of them is wrong, or they don't fit together.
    """
    cfg, judge = job.label, job.judge
    template = load_template(cfg.template, kind="preference")
    exemplars = load_exemplars(cfg.exemplars, template) if cfg.exemplars else ()
    constitution = load_constitution(cfg.constitution) if cfg.constitution else None
    if constitution is not None:
        check_principles(constitution, template, cfg.principles)
    if isinstance(judge, OpenAIJudge):
        OpenAIAsker(judge).close()  # a key that is not set shows now
    if not isinstance(judge, JudgeConfig):
        return Guide(template, exemplars, constitution, None, 0)
    chat = load_chat(judge, job.chat_date, "judge", thinks=False)
    guide = Guide(template, exemplars, constitution, chat, judge_context(judge, "judge.max_context"))
    asker = _writer_of_prompts(job, guide)
    empty = make_labeler(job, guide, asker).example(Comparison("", "", "", ""))
    check_question(asker, empty[-1], template, "judge.max_context")
    return guide


def check_principles(constitution: Constitution, template: Template, only: tuple[str, ...] | None) -> None:
    """Raises InputError when comparisons can't be asked by this constitution."""
    if template.asks_for == "worse" or not template.takes_principles:
        raise InputError(
            f"label.template={template.name} can't take a principle of label.constitution={constitution.id} (it asks "
            f"for the {template.asks_for} response{'' if template.takes_principles else ', without a slot'}): "
            f"principles say which response is better. Use label.template=constitution, or leave the constitution out."
        )
    eligible(constitution, "comparison_question", only)


def _writer_of_prompts(job: LabelJob, guide: Guide) -> Any:
    """A judge without an engine: it shows what it would be asked."""
    if isinstance(job.judge, JudgeConfig):
        return LocalAsker(None, guide.chat, guide.context, job.judge.model)

    class Shown:
        name, identity, special = "", "", SPECIAL

    return Shown()


def make_labeler(job: LabelJob, guide: Guide, asker: Asker) -> PreferenceLabeler:
    assert not isinstance(job.judge, LongerJudge), "it has no model"
    return PreferenceLabeler(
        asker,
        guide.template,
        job.label,
        exemplars=guide.exemplars,
        constitution=guide.constitution,
        min_answer_mass=job.judge.min_answer_mass,
        seed=job.seed,
    )


@contextmanager
def open_labeler(
    job: LabelJob, guide: Guide, state: Path, progress: ItemProgress
) -> Iterator[tuple[Labeler, int, RememberingAsker | None]]:
    """The judge at work: its labeler, how many chunks keep it busy, and what remembers its answers."""
    if isinstance(job.judge, LongerJudge):
        yield _reader(job, LongerLabeler()), 2, None
        return
    with open_asker(job, guide.chat, guide.context, state, progress) as (asker, at_once):
        yield _reader(job, make_labeler(job, guide, asker)), at_once, asker


def _reader(job: LabelJob, labeler: Labeler) -> Labeler:
    """The labeler as it is, or one that reads answers without thoughts."""
    return AnswerLabeler(labeler) if job.label.thoughts == "cut" else labeler


def _total(job: LabelJob) -> int | None:
    """How many pairs there are, where that is quickly known."""
    return count_rows(job.data.path, job.data.limit)


def same_pair(both: tuple[PreferenceRecord, PreferenceRecord]) -> bool:
    one, other = both
    return (one.id, one.prompt, one.response_a, one.response_b) == (
        other.id,
        other.prompt,
        other.response_a,
        other.response_b,
    )


def to_comparison(record: PreferenceRecord) -> Comparison:
    return Comparison(record.id, comparison_text(record), record.response_a, record.response_b)


def labelled(record: PreferenceRecord, label: Label, job: LabelJob, guide: Guide) -> PreferenceRecord:
    """The record with its AI label; a label that people gave stays beside it as `human`."""
    model = "" if isinstance(job.judge, LongerJudge) else job.judge.model
    return record.model_copy(
        update={
            "p_a": label.p_a,
            "p_a_forward": label.p_a_forward,
            "p_a_reversed": label.p_a_reversed,
            "rationales": label.rationales,
            "principle": label.principle,
            "judge": {
                "type": job.judge.type,
                "model": model,
                "template": guide.template.name if model else "",
                "template_hash": guide.hash(job) if model else "",
            },
            "hard": label.hard,
            "answer_mass": label.answer_mass,
            "tokens_in": label.tokens_in,
            "tokens_out": label.tokens_out,
            "cost": label.cost,
            "cut": label.cut,
            "failed": label.failure,
            "human": human_label(record),
        }
    )


def _summary(job: LabelJob, output: Path, rate: float, asker: RememberingAsker | None, spent: float) -> dict[str, Any]:
    """Over all of the output, whichever process labelled it."""
    tally = Tally()
    with ItemProgress("summing up", count_rows(output), "labels", after_s=SILENT_S) as progress:
        for record in progress.over(read_preferences(str(output))):
            tally.add(record)
    share = 1.0 / max(1, tally.both_orders)
    return {
        "job": "label",
        "output": str(output),
        "judge": job.judge.model_dump(mode="json").get("model", job.judge.type),
        "records": tally.records,
        "labels": tally.labels,
        "failures": dict(tally.failures),
        "retryable": tally.retryable,
        "position_bias": tally.same_position * share,
        "first_position_wins": tally.first_wins * share,
        "mean_confidence": tally.confidence / max(1, tally.labels),
        "mean_answer_mass": math.fsum(tally.masses) / len(tally.masses) if tally.masses else None,
        "low_answer_mass_fraction": tally.low_mass / max(1, tally.records),
        "hard": tally.hard,
        "cut": tally.cut,
        "tokens_in": tally.tokens_in,
        "tokens_out": tally.tokens_out,
        "labels_per_s": rate,
        "questions_asked": asker.asked if asker else 0,
        "questions_recalled": asker.recalled if asker else 0,
        "cost": spent,
        "human_cost": None if job.label.human_price is None else tally.labels * job.label.human_price,
    }


def _lines(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "labels", f"{summary['labels']} of {summary['records']}"
    yield "failures", reasons_told(summary["failures"])
    yield "not final", not_final(summary["retryable"])
    yield "position bias", f"{percent(summary['position_bias'], 1)} (the same place wins in both orders)"
    yield "mean confidence", share(summary["mean_confidence"])
    if summary["mean_answer_mass"] is not None:
        low = summary["low_answer_mass_fraction"]
        yield "on the answers", f"{summary['mean_answer_mass']:.3f} of the probability ({low:.1%} of pairs too little)"
    yield "hard", f"{summary['hard']} (read off the judge's text)" if summary["hard"] else ""
    yield "cut", f"{summary['cut']} prompts lost their middle" if summary["cut"] else ""
    yield "tokens", f"{summary['tokens_in']} read, {summary['tokens_out']} written"
    recalled = summary["questions_recalled"]
    yield "questions", f"{summary['questions_asked']} asked" + (f", {recalled} remembered" if recalled else "")
    yield "rate", f"{digits(summary['labels_per_s'], 3)} labels/s"
    human = summary["human_cost"]
    yield "cost", digits(summary["cost"], 4) + ("" if human is None else f", by people {digits(human, 4)}")
    yield "output", summary["output"]


def _enough(summary: dict[str, Any], least: float) -> None:
    require(
        "label.min_labeled_fraction",
        least,
        "pairs must be labelled",
        done=summary["labels"],
        wanted=summary["records"],
        failures=summary["failures"],
        retryable=summary["retryable"],
        kept=summary["output"],
        remedy="too_long: raise judge.max_context or set label.too_long=cut_middle; "
        f"{LOW_MASS}: the judge would rather say something else than 1 or 2, so use another judge or template; "
        "open_thought: let the policy write more tokens, or set label.thoughts=keep; "
        "unparsed: give the judge more tokens (judge.extra_body.max_completion_tokens), use a stronger one, or "
        "judge.answers=logprobs; or lower the fraction.",
    )
