"""The harmless part of `rlaif evaluate`: responses judged one at a time, requests turned away, the judge's errors."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif_ray.config.sections import JudgeConfig
from rlaif_ray.data.chat import conversation_text
from rlaif_ray.data.demonstrations import read_labelled_responses
from rlaif_ray.evaluation.harmless import harmless_rate, judge_accuracy, over_refusal, rogan_gladen
from rlaif_ray.feedback.judge import Judge, check_context
from rlaif_ray.feedback.remembered import Memory
from rlaif_ray.feedback.templates import Template, load_template
from rlaif_ray.models import load_tokenizer
from rlaif_ray.pipelines.contexts import judge_context
from rlaif_ray.pipelines.preferences import CHUNK, open_asker
from rlaif_ray.pipelines.run_folder import stop_when_asked
from rlaif_ray.pipelines.streaming import chunks, in_order
from rlaif_ray.tracking.files import append_rows, read_rows_streaming, rows_done
from rlaif_ray.tracking.progress import ItemProgress
from rlaif_ray.types import Completion, Message, Prompt, Score

if TYPE_CHECKING:
    from rlaif_ray.config.jobs import EvaluateJob, LabelJob

PROMPTS, SAFE, LABELLED = "prompts", "safe", "labelled"  # what a response answers
Answers = Mapping[tuple[Message, ...], Sequence[str]]  # by prompt


@dataclass(frozen=True, slots=True)
class Grader:
    """The judge's two questions about one response, read and checked before anything starts."""

    harm: Template
    refusal: Template
    tokenizer: Any  # of a local judge
    context: int  # of a local judge, tokens

    def template(self, part: str) -> Template:
        return self.refusal if part == SAFE else self.harm


@dataclass(frozen=True, slots=True)
class Graded:
    """What the judge said of all responses."""

    scores: list[float | None]  # in [-1, 1]; None where the judge failed
    tokens_in: int
    cost: float


@dataclass(frozen=True, slots=True)
class Response:
    """One response to be judged."""

    part: str
    arm: str  # "" of labelled ones
    prompt: int  # number of the prompt within its part and arm
    messages: tuple[Message, ...]
    text: str
    label: float | None = None  # 1: people find it harmless


def read_grader(job: EvaluateJob) -> Grader:
    """Templates, and a local judge's tokenizer.

    Raises:
        InputError: any of them is wrong, or they don't fit together.
    """
    assert job.harmless is not None
    harm, refusal = load_template(job.harmless.template), load_template(job.harmless.refusal_template)
    judge = job.judge
    if not isinstance(judge, JudgeConfig):
        return Grader(harm, refusal, None, 0)
    tokenizer = load_tokenizer(judge.model, revision=judge.revision, trust_remote_code=judge.trust_remote_code)
    context = judge_context(judge, "judge.max_context")
    for template in (harm, refusal):
        check_context(tokenizer, template, context, judge.model, "judge.max_context")
    return Grader(harm, refusal, tokenizer, context)


def responses_of(job: EvaluateJob, answers: Mapping[tuple[str, str], Answers]) -> list[Response]:
    """Everything that is judged: answers by (part, arm), and the responses that people labelled."""
    assert job.harmless is not None
    found = [
        Response(part, arm, place, messages, text)
        for (part, arm), own in answers.items()
        for place, (messages, texts) in enumerate(own.items())
        for text in texts
    ]
    if job.harmless.labelled is not None:
        for place, (row, label) in enumerate(read_labelled_responses(job.harmless.labelled)):
            found.append(Response(LABELLED, "", place, row.messages[:-1], row.messages[-1].content, label))
    return found


def judge_responses(judged: LabelJob, grader: Grader, responses: Sequence[Response], folder: Path) -> Graded:
    """Asks about all responses; what is in the folder already isn't asked again.

    Raises:
        KeyboardInterrupt: it was asked to stop; what was judged is kept.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "scored.jsonl"
    done = rows_done(path, len(responses), CHUNK)
    if done < len(responses):
        with (
            stop_when_asked() as stopping,
            ItemProgress("harmless", len(responses), "responses") as progress,
            open_asker(judged, grader.tokenizer, grader.context, folder, progress) as (asker, at_once),
        ):
            judges = {part: Judge(asker, grader.template(part)) for part in (PROMPTS, SAFE, LABELLED)}
            progress.resume(done)
            left = chunks(responses[done:], CHUNK)
            for chunk, scores in in_order(_scored_by(judges), left, at_once=at_once, stopping=stopping):
                append_rows(path, [_row(*one) for one in zip(chunk, scores, strict=True)])
                progress.advance(len(chunk))
            if stopping():
                raise KeyboardInterrupt
    memory = Memory(folder / "answers.sqlite")
    spent = memory.spent()
    memory.close()
    rows_now = list(read_rows_streaming(path))
    return Graded([row["score"] for row in rows_now], sum(row["tokens_in"] for row in rows_now), spent)


def _scored_by(judges: Mapping[str, Judge]) -> Callable[[list[Response]], list[Score]]:
    def score(chunk: list[Response]) -> list[Score]:
        found: dict[int, Score] = {}
        for part, judge in judges.items():
            own = [k for k, one in enumerate(chunk) if one.part == part and one.text]
            found |= zip(own, judge.score([_completion(chunk[k]) for k in own]), strict=True) if own else {}
        # Nothing at all harms nobody, and does nothing of what was asked.
        return [found.get(k, Score(1.0)) for k in range(len(chunk))]

    return score


def _completion(response: Response) -> Completion:
    """As a Scorer takes it; tokens are a policy's, and here is none."""
    prompt = Prompt("", response.messages, (), conversation_text(response.messages))
    return Completion(prompt, 0, (0,), (0.0,), response.text, True, 0)


def _row(response: Response, score: Score) -> dict[str, Any]:
    return {
        "part": response.part,
        "arm": response.arm,
        "prompt": [{"role": m.role, "content": m.content} for m in response.messages],
        "response": response.text,
        "score": score.value,
        "failure": score.failure,
        "tokens_in": score.tokens_in,
        "evidence": score.evidence,
    }


def measured_harmless(job: EvaluateJob, responses: Sequence[Response], graded: Graded) -> dict[str, Any]:
    """Harmless rate and over-refusal of each arm with 95% intervals over prompts, and corrected for the judge's errors.

    The correction (Rogan and Gladen 1978) needs responses that people labelled; it counts prompts, since several
    responses to one are not independent.
    """
    cfg = job.harmless
    sampling: dict[str, Any] = {"resamples": job.win_rate.resamples, "seed": job.seed}
    assert cfg is not None
    verdicts = [None if score is None else score > cfg.threshold for score in graded.scores]

    def of(part: str, arm: str) -> tuple[list[bool | None], list[int]]:
        own = [k for k, one in enumerate(responses) if (one.part, one.arm) == (part, arm)]
        return [verdicts[k] for k in own], [responses[k].prompt for k in own]

    known = [k for k, one in enumerate(responses) if one.part == LABELLED]
    judge = judge_accuracy([verdicts[k] for k in known], [responses[k].label == 1 for k in known]) if known else None
    arms = {}
    for arm in dict.fromkeys(one.arm for one in responses if one.part != LABELLED):
        rate = harmless_rate(*of(PROMPTS, arm), **sampling)
        refused, prompts = of(SAFE, arm)
        corrected = None
        if judge is not None:
            corrected = asdict(
                rogan_gladen(
                    rate.rate,
                    rate.prompts,
                    judge.sensitivity,
                    judge.n_positive,
                    judge.specificity,
                    judge.n_negative,
                )
            )
        over = asdict(over_refusal(refused, prompts, **sampling)) if refused else None
        arms[arm] = {"rate": asdict(rate), "over_refusal": over, "corrected": corrected}
    return {"arms": arms, "judge": asdict(judge) if judge is not None else None}
