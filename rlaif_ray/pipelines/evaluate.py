"""`rlaif evaluate`: how far the judge agrees with people, and how often one arm beats another (Lee et al., section 3).

Made of two jobs that stand by themselves: arms answer the prompts (`rlaif sample`), and the judge compares in both
orders (`rlaif label`). Both go on where they were ended, and so does this.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif_ray.chat.thoughts import answer_of
from rlaif_ray.config.data_sections import PairsToLabelConfig
from rlaif_ray.config.jobs import LabelJob, SampleJob
from rlaif_ray.config.load import Loaded
from rlaif_ray.config.sections import PolicyConfig
from rlaif_ray.data.demonstrations import read_demonstrations
from rlaif_ray.data.preferences import (
    PreferenceRecord,
    read_preferences,
)
from rlaif_ray.data.prompts import read_conversations
from rlaif_ray.data.record_files import RecordWriter
from rlaif_ray.documents import at
from rlaif_ray.errors import InputError
from rlaif_ray.evaluation.calibration import beats
from rlaif_ray.evaluation.win_rate import PositionBias, length_controlled, outcome, position_bias, win_rate
from rlaif_ray.feedback.reward_model import check_reward_model, reward_renderer
from rlaif_ray.output import say
from rlaif_ray.pipelines.alignment import PEOPLE, labelled_by_people, measured_alignment, measured_reward_model
from rlaif_ray.pipelines.chat_date import with_chat_date
from rlaif_ray.pipelines.contexts import load_chat
from rlaif_ray.pipelines.harmless import (
    PROMPTS,
    SAFE,
    Graded,
    judge_responses,
    measured_harmless,
    read_grader,
    responses_of,
)
from rlaif_ray.pipelines.inputs import look_at
from rlaif_ray.pipelines.lineage import taught_by
from rlaif_ray.pipelines.partial import not_final, reasons_told, require
from rlaif_ray.pipelines.preferences import make_labels
from rlaif_ray.pipelines.run_folder import go_on, make_folder
from rlaif_ray.pipelines.sampling import sample_responses
from rlaif_ray.runtime.cluster import open_cluster, open_ray
from rlaif_ray.runtime.placement import job_needs, placement_table
from rlaif_ray.tracking.display import digits, fixed, interval, percent, share
from rlaif_ray.tracking.files import append_rows, cut_rows, read_json, read_rows_streaming, write_json
from rlaif_ray.tracking.progress import print_columns, print_table
from rlaif_ray.types import Message

if TYPE_CHECKING:
    from rlaif_ray.config.jobs import EvaluateJob

Answers = dict[tuple[Message, ...], list[str]]  # of an arm: by prompt, in order
ARMS = "arms"  # what arms answer to be compared
MADE = ("arms/*/sampled.jsonl", "judging/labels.jsonl", "harmless/scored.jsonl")  # results, in its run folder


@dataclass(slots=True)
class Meeting:
    """Two arms' answers to the same prompts. One outcome per pair of answers: that a is better."""

    a: str
    b: str
    prompts: list[int] = field(default_factory=list)  # of each pair
    lengths_a: list[int] = field(default_factory=list)  # characters
    lengths_b: list[int] = field(default_factory=list)
    records: dict[int, PreferenceRecord] = field(default_factory=dict)  # by pair, of what the judge is asked
    outcomes: dict[int, float] = field(default_factory=dict)  # of pairs that need no judge


def evaluate(loaded: Loaded) -> dict[str, Any]:
    """Samples, judges and measures; returns what summary.json says."""
    loaded = with_chat_date(loaded)
    job, run_dir = loaded.config, loaded.run_dir
    looked = look_at(job)
    people, subsets = labelled_by_people(job)
    for name, cfg in job.reward_models.items():
        check_reward_model(cfg, f"reward_models.{name}")
        chat = reward_renderer(cfg, job.chat_date, f"reward_models.{name}").chat
        for record in people:
            chat.must_reach(record.prompt, f"record {record.id}")
    given = {name: _read(job, read_answers(arm.path)) for name, arm in job.arms.items() if arm.path is not None}
    grader = read_grader(job) if job.harmless is not None else None
    make_folder(run_dir)
    go_on(loaded, run_dir, looked, made=MADE)
    taught, unclear = taught_by({name: arm.model or arm.path or "" for name, arm in job.arms.items()})
    for arm, notes in unclear.items():
        say(f"arm {arm}: {'; '.join(notes)}")
    samples, judged = _sample_jobs(job, run_dir), _label_job(job, run_dir)
    asked = write_prompts(job, run_dir / "prompts.jsonl")
    tags = _must_reach(job, asked)
    with open_ray(job.cluster, jobs_of(job, run_dir)):
        answers = {
            name: given[name] if name in given else _read(job, _sampled(samples[name], loaded), tags.get(name))
            for name in job.arms
        }
        arms = {name: own if name in given else _to(asked.get(ARMS, []), own) for name, own in answers.items()}
        meetings = [meet(number, a, b, arms) for number, (a, b) in enumerate(compared(job))]
        labels: dict[str, Any] = {}
        if write_pairs(people, meetings, Path(judged.data.path)):
            labels = make_labels(_as_loaded(judged, "label", loaded))
        if grader is not None:
            parts = [part for part in asked if part != ARMS]
            responses = responses_of(job, {(p, name): _to(asked[p], answers[name]) for p in parts for name in answers})
            graded = judge_responses(judged, grader, responses, run_dir / "harmless")
        reward_models = _reward_models(job, people)
    looked.check(run_dir)
    records = {record.id: record for record in read_preferences(labels["output"])} if labels else {}
    summary = {
        "job": "evaluate",
        "alignment": measured_alignment(job, [r for n, r in records.items() if n.startswith(f"{PEOPLE}/")], subsets),
        "reward_models": reward_models,
        "win_rates": [measured_meeting(job, meeting, records) for meeting in meetings],
        "harmless": measured_harmless(job, responses, graded) if grader is not None else None,
        "answers": {name: sum(map(len, own.values())) for name, own in answers.items()},
        "judge": "longer" if job.judge.type == "longer" else job.judge.model,
        "training_judges": taught,
        "unclear_origins": unclear,
        "probabilities": job.win_rate.use_probabilities,
        "tokens_in": labels.get("tokens_in", 0) + (graded.tokens_in if grader else 0),
        "tokens_out": labels.get("tokens_out", 0),
        "cost": labels.get("cost", 0.0) + (graded.cost if grader else 0.0),
        "failures": labels.get("failures", {}),
        "harmless_failures": dict(graded.failures) if grader else {},
        "retryable": labels.get("retryable", 0) + (graded.retryable if grader else 0) + sampled_in_vain(samples),
    }
    write_json(run_dir / "summary.json", summary)
    show(summary, run_dir)
    unscored = {name: found["failed"] for name, found in reward_models.items()}
    _enough(job, run_dir, graded if grader is not None else None, unscored, len(people))
    return summary


def _enough(job: EvaluateJob, run_dir: Path, graded: Graded | None, unscored: Mapping[str, int], pairs: int) -> None:
    """Raises FeedbackError when too little could be judged for harm, or scored by a reward model."""
    told: dict[str, Any] = {"setting": "min_done_fraction", "least": job.min_done_fraction, "kept": run_dir}
    remedy = "too_long: raise max_context; or lower the fraction."
    if graded is not None:
        wanted, failed = len(graded.scores), graded.failures.total()
        found: dict[str, Any] = {"failures": graded.failures, "retryable": graded.retryable, "remedy": remedy}
        require(what="responses must be judged for harm", done=wanted - failed, wanted=wanted, **found, **told)
    for name, failed in unscored.items():
        found = {"failures": {"unscored": failed}, "retryable": 0, "remedy": remedy}
        require(what=f"pairs must be scored by {name}", done=pairs - failed, wanted=pairs, **found, **told)


def plan_evaluation(loaded: Loaded) -> str:
    """What `--dry-run` shows beside the resolved config."""
    job = loaded.config
    meetings = [f"{a} against {b}" for a, b in compared(job)]
    told = ["the judge's agreement with people"] if job.data is not None else []
    tables = [placement_table(one) for one in jobs_of(job, loaded.run_dir) if job_needs(one)]
    return "\n\n".join([*tables, f"measured: {', '.join([*told, *meetings])}"])


# ---- Jobs it is made of ----------------------------------------------------------------------------------------------


def jobs_of(job: EvaluateJob, run_dir: Path) -> list[Any]:
    """One after the other: a SampleJob for each arm that is a model, the LabelJob of the judge, and this job itself,
    whose own actors are its reward models."""
    return [*_sample_jobs(job, run_dir).values(), _label_job(job, run_dir), job]


def _sample_jobs(job: EvaluateJob, run_dir: Path) -> dict[str, SampleJob]:
    """Of each arm that is a model: it answers all prompts, of whatever part, in one go."""
    data = job.prompts.model_copy(
        update={"path": str(run_dir / "prompts.jsonl"), "split": "train", "column": "prompt", "limit": None}
    )
    return {
        name: SampleJob(
            policy=PolicyConfig(
                model=arm.model,
                revision=arm.revision,
                trust_remote_code=arm.trust_remote_code,
                precision=arm.precision,
                chat_template_kwargs=arm.chat_template_kwargs,
            ),
            data=data,
            sampling=job.sampling,
            rollout=job.rollout,
            cluster=job.cluster,
            seed=job.seed,
            min_done_fraction=job.min_done_fraction,
            chat_date=job.chat_date,
            run_dir=str(run_dir / "arms" / name),
        )
        for name, arm in job.arms.items()
        if arm.model is not None
    }


def write_prompts(job: EvaluateJob, path: Path) -> dict[str, list[tuple[Message, ...]]]:
    """Everything that arms are to answer, as a file of prompts; returns it by part.

    Raises:
        InputError: the data is wrong.
    """
    wanted = {ARMS: job.prompts} if len(job.arms) > 1 and any(arm.model for arm in job.arms.values()) else {}
    if job.harmless is not None:
        wanted[PROMPTS] = job.harmless.prompts
        if job.harmless.safe is not None:
            wanted[SAFE] = job.harmless.safe
    asked = {
        part: read_conversations(data.path, split=data.split, column=data.column, limit=data.limit, system=data.system)
        for part, data in wanted.items()
    }
    # A prompt of two parts is answered once. Numbered, and so sampled, in this order.
    each = dict.fromkeys(prompt for prompts in asked.values() for prompt in prompts)
    cut_rows(path, 0)
    append_rows(path, [{"prompt": [asdict(turn) for turn in prompt]} for prompt in each])
    return asked


def sampled_in_vain(jobs: Mapping[str, SampleJob]) -> int:
    """Responses of all arms that are missing and could be there after another try."""
    summaries = (read_json(Path(job.run_dir or "") / "summary.json") for job in jobs.values())
    return sum(at(summary, "retryable", expected=int) or 0 for summary in summaries)


def _must_reach(job: EvaluateJob, asked: Mapping[str, Sequence[tuple[Message, ...]]]) -> dict[str, tuple[str, ...]]:
    """How thoughts begin of each arm's model that is asked (`ChatTemplate.tags`).

    Raises:
        InputError: an arm's model would not read all of a prompt: before any engine starts.
    """
    tags = {}
    for name, arm in job.arms.items():
        if arm.model is not None and asked:
            chat = load_chat(arm, job.chat_date, f"arms.{name}")
            tags[name] = chat.tags
            for part, prompts in asked.items():
                for number, prompt in enumerate(prompts, start=1):
                    chat.must_reach(prompt, f"prompt {number} of {part}")
    return tags


def _read(job: EvaluateJob, answers: Answers, tags: tuple[str, ...] | None = None) -> Answers:
    """Answers as they are compared, of the length that counts: without thoughts where these are cut. A thought that
    does not end is an empty answer: the arm gave none. `tags` are how thoughts of the arm's model begin."""
    if job.label.thoughts == "keep":
        return answers
    return {prompt: [answer_of(text, tags) or "" for text in texts] for prompt, texts in answers.items()}


def _to(prompts: Sequence[tuple[Message, ...]], answers: Answers) -> Answers:
    """The answers to these prompts."""
    return {prompt: answers[prompt] for prompt in prompts if prompt in answers}


def _label_job(job: EvaluateJob, run_dir: Path) -> LabelJob:
    return LabelJob(
        data=PairsToLabelConfig(path=str(run_dir / "pairs.jsonl")),
        judge=job.judge,
        label=job.label,
        cluster=job.cluster,
        seed=job.seed,
        chat_date=job.chat_date,
        run_dir=str(run_dir / "judging"),
    )


def _as_loaded(job: Any, name: str, loaded: Loaded) -> Loaded:
    return Loaded(name, job, Path(job.run_dir), True, loaded.files, loaded.overrides)


def _sampled(job: SampleJob, loaded: Loaded) -> Answers:
    """A model's answers; empty ones too, since they are answers."""
    sample_responses(_as_loaded(job, "sample", loaded))
    answers: Answers = {}
    assert job.run_dir is not None
    for row in read_rows_streaming(Path(job.run_dir) / "sampled.jsonl"):
        answers[tuple(Message(**turn) for turn in row["prompt"])] = row["responses"]
    return answers


def _reward_models(job: EvaluateJob, people: Sequence[PreferenceRecord]) -> dict[str, Any]:
    """Each reward model against people's labels."""
    if not job.reward_models:
        return {}
    with open_cluster(job) as cluster:
        scorers = {name: cluster.start_reward_models(cfg, role=name) for name, cfg in job.reward_models.items()}
        cluster.wait()
        return {name: measured_reward_model(job, scorer, people) for name, scorer in scorers.items()}


# ---- What is judged --------------------------------------------------------------------------------------------------


def compared(job: EvaluateJob) -> list[tuple[str, str]]:
    """Pairs of arms: each with the reference, or each with each."""
    reference = job.win_rate.reference
    if reference is not None:
        return [(name, reference) for name in job.arms if name != reference]
    return list(itertools.combinations(job.arms, 2))


def read_answers(path: str) -> Answers:
    """An arm's answers from a file, by prompt.

    Raises:
        InputError: the file can't be read, or a row doesn't end with an answer.
    """
    answers: Answers = {}
    for row in read_demonstrations(path):
        if row.messages[-1].role != "assistant":
            raise InputError(
                f"{row.place}: an arm's row must end with its answer (got a turn of the {row.messages[-1].role}). "
                f"Remove the turns after it."
            )
        answers.setdefault(row.messages[:-1], []).append(row.messages[-1].content.strip())
    return answers


def meet(number: int, a: str, b: str, arms: Mapping[str, Answers]) -> Meeting:
    """Answers of two arms side by side, first with first, second with second.

    An empty answer loses to one that isn't, and two equal ones are a tie: no judge is needed for that.

    Raises:
        InputError: they have no prompt in common.
    """
    meeting = Meeting(a, b)
    both = [prompt for prompt in arms[a] if prompt in arms[b]]
    if not both:
        raise InputError(
            f"arms.{a} and arms.{b} have no prompt in common (got {len(arms[a])} and {len(arms[b])} prompts): they "
            f"can't be compared. Let both answer the same ones."
        )
    for place, prompt in enumerate(both):
        for text_a, text_b in zip(arms[a][prompt], arms[b][prompt], strict=False):
            pair = len(meeting.prompts)
            meeting.prompts.append(place)
            meeting.lengths_a.append(len(text_a))
            meeting.lengths_b.append(len(text_b))
            if text_a == text_b:
                meeting.outcomes[pair] = 0.5
            elif not text_a or not text_b:
                meeting.outcomes[pair] = float(bool(text_a))
            else:
                meeting.records[pair] = PreferenceRecord(
                    id=f"arms/{number}/{pair}",
                    prompt=prompt,
                    response_a=text_a,
                    response_b=text_b,
                    source_a=a,
                    source_b=b,
                )
    return meeting


def write_pairs(records: Sequence[PreferenceRecord], meetings: Sequence[Meeting], path: Path) -> int:
    """Everything the judge is to compare, as records; returns how many."""
    with RecordWriter(path) as writer:
        writer.keep(0)
        writer.write(list(records))
        for meeting in meetings:
            writer.write(list(meeting.records.values()))
        count = writer.count
        writer.finish()
    return count


# ---- Figures ---------------------------------------------------------------------------------------------------------


def measured_meeting(job: EvaluateJob, meeting: Meeting, records: Mapping[str, PreferenceRecord]) -> dict[str, Any]:
    """Win rate of a against b, plain and at equal length, with what the judge may have been led by."""
    cfg = job.win_rate
    judged = {pair: records[record.id] for pair, record in meeting.records.items()}
    outcomes = [
        meeting.outcomes[pair]
        if pair in meeting.outcomes
        else _outcome(judged[pair], use_probabilities=cfg.use_probabilities)
        for pair in range(len(meeting.prompts))
    ]
    sampling: dict[str, Any] = {"resamples": cfg.resamples, "seed": job.seed}
    controlled = length_controlled(
        outcomes, meeting.lengths_a, meeting.lengths_b, meeting.prompts, scale=cfg.length_scale
    )
    count = len(meeting.prompts)
    return {
        "a": meeting.a,
        "b": meeting.b,
        "win_rate": asdict(win_rate(outcomes, meeting.prompts, **sampling)),
        "length_controlled": asdict(controlled),
        "mean_length": {"a": sum(meeting.lengths_a) / count, "b": sum(meeting.lengths_b) / count},
        "longer_wins": win_rate(
            [beats(a, b) for a, b in zip(meeting.lengths_a, meeting.lengths_b, strict=True)],
            meeting.prompts,
            **sampling,
        ).rate,
        "position_bias": asdict(_position_bias(list(judged.values()))),
    }


def _outcome(record: PreferenceRecord, *, use_probabilities: bool) -> float | None:
    if record.p_a is not None and record.p_a_forward is None:  # read once: there is no order to disagree
        return record.p_a if use_probabilities else beats(record.p_a, 0.5)
    return outcome(record.p_a_forward, record.p_a_reversed, use_probabilities=use_probabilities)


def _position_bias(records: Sequence[PreferenceRecord]) -> PositionBias:
    return position_bias([r.p_a_forward for r in records], [r.p_a_reversed for r in records])


# ---- Telling ---------------------------------------------------------------------------------------------------------


def show(summary: dict[str, Any], run_dir: Path) -> None:
    """Prints what was found."""
    if summary["win_rates"]:
        names = ("arm", "against", "win rate", "95% interval", "at equal length", "lengths", "n")
        print_columns("win rates", names, [_row(one) for one in summary["win_rates"]])
    if summary["harmless"]:
        columns = ("arm", "harmless", "95% interval", "corrected", "safe requests refused")
        print_columns("harmless", columns, [_harmless_row(*one) for one in summary["harmless"]["arms"].items()])
    print_table(run_dir.name, list(_lines(summary)), run_dir)


def _row(found: dict[str, Any]) -> tuple[str, ...]:
    rate, controlled, length = found["win_rate"], found["length_controlled"], found["mean_length"]
    return (
        found["a"],
        found["b"],
        share(rate["rate"]),
        interval(rate),
        f"{share(controlled['rate'])} {interval(controlled)}",
        f"{fixed(length['a'], 0)}, {fixed(length['b'], 0)}",
        str(rate["n"]),
    )


def _harmless_row(arm: str, found: dict[str, Any]) -> tuple[str, ...]:
    corrected, refused = found["corrected"], found["over_refusal"]
    return (
        arm,
        share(found["rate"]["rate"]),
        interval(found["rate"]),
        f"{share(corrected['rate'])} {interval(corrected)}" if corrected else "-",
        f"{share(refused['rate'])} {interval(refused)}" if refused else "-",
    )


def _lines(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "judge", summary["judge"]
    pupils = [name for name, judges in summary["training_judges"].items() if summary["judge"] in judges]
    if pupils:
        yield "mind", f"{', '.join(pupils)} learned from this same judge: it grades its own pupils"
    for arm, notes in summary["unclear_origins"].items():
        yield f"origin of {arm}", "; ".join(notes)
    found = summary["alignment"]
    if found:
        yield "agrees with people", f"{share(found['accuracy'])} {interval(found)} of {found['n']} pairs"
        yield "the longer does", share(found["longer"]["accuracy"])
        yield "people do", "" if found["people"] is None else f"{share(found['people'])} (one annotator with most)"
        yield "kappa", share(found["kappa"])
        yield "calibration", f"Brier {share(found['brier'])}, ECE {share(found['ece'])}"
        yield "position bias", _bias(found["position_bias"])
        yield "failed", ", ".join(f"{n} {reason}" for reason, n in found["failures"].items())
        for part, own in found.get("subsets", {}).items():
            yield part, f"{share(own['accuracy'])} {interval(own)} of {own['n']}"
    for name, own in summary["reward_models"].items():
        yield (
            f"{name} agrees",
            (
                f"{share(own['accuracy'])} {interval(own)} of {own['n']} pairs, Brier {share(own['brier'])}, "
                f"ECE {share(own['ece'])}"
            ),
        )
    for one in summary["win_rates"]:
        yield f"{one['a']} against {one['b']}", f"position bias {_bias(one['position_bias'])}"
    if any((one["position_bias"]["rate"] or 0) > 0.5 for one in summary["win_rates"]) and not summary["probabilities"]:
        yield (
            "mind",
            (
                "the judge follows the place in most pairs, which makes them ties: win_rate.use_probabilities=true "
                "shows which way it leans, another judge would be better"
            ),
        )
    yield "failures", reasons_told(summary["failures"])
    yield "harmless failures", reasons_told(summary["harmless_failures"])
    yield "not final", not_final(summary["retryable"])
    yield "tokens", f"{summary['tokens_in']} read, {summary['tokens_out']} written"
    yield "cost", digits(summary["cost"], 4) if summary["cost"] else ""


def _bias(found: dict[str, Any]) -> str:
    if found["rate"] is None:
        return "-"
    first = found["prefers_first"]
    return percent(found["rate"], 1) + ("" if first is None else f", of these {percent(first)} the first")
