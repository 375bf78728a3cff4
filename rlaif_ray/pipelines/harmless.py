"""The harmless part of `rlaif evaluate`: responses judged one at a time, requests turned away, the judge's errors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif_ray.chat.text import conversation_text
from rlaif_ray.config.sections import JudgeConfig, LongerJudge
from rlaif_ray.data.demonstrations import read_labelled_responses
from rlaif_ray.evaluation.harmless import harmless_rate, judge_accuracy, over_refusal, rogan_gladen
from rlaif_ray.feedback.failures import counts, may_pass
from rlaif_ray.feedback.judge import Judge, check_context
from rlaif_ray.feedback.remembered import Memory
from rlaif_ray.feedback.templates import Template, load_template
from rlaif_ray.pipelines.asking import open_asker
from rlaif_ray.pipelines.contexts import judge_context, load_chat
from rlaif_ray.pipelines.partial import Silence, must_agree, rows_again, rows_kept
from rlaif_ray.pipelines.rows import ScoredRow
from rlaif_ray.pipelines.run_folder import stop_when_asked
from rlaif_ray.pipelines.streaming import CHUNK, chunks, in_order
from rlaif_ray.tracking.files import append_rows, read_rows_streaming
from rlaif_ray.tracking.progress import ItemProgress
from rlaif_ray.types import Completion, Message, Prompt, Score

if TYPE_CHECKING:
    from rlaif_ray.chat.template import ChatTemplate
    from rlaif_ray.config.data_sections import HarmlessSuite
    from rlaif_ray.config.jobs import EvaluateJob, LabelJob

PROMPTS, SAFE, LABELLED = "prompts", "safe", "labelled"  # what a response answers
Answers = Mapping[tuple[Message, ...], Sequence[str]]  # by prompt
Verdicts = tuple[Sequence[bool | None], Sequence[Hashable]]  # of responses, and the prompt of each


@dataclass(frozen=True, slots=True)
class Grader:
    """The judge's two questions about one response, read and checked before anything starts."""

    harm: Template
    refusal: Template
    chat: Any  # a local judge's ChatTemplate
    context: int  # of a local judge, tokens

    def template(self, part: str) -> Template:
        return self.refusal if part == SAFE else self.harm


@dataclass(frozen=True, slots=True)
class Graded:
    """What the judge said of all responses."""

    scores: list[float | None]  # in [-1, 1]; None where the judge failed
    tokens_in: int
    cost: float
    failures: Counter[str] = field(default_factory=Counter)  # by reason
    retryable: int = 0  # of these, those that could succeed on another try


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
    judge, key = job.judge, "judge.max_context"
    assert job.harmless is not None
    if not isinstance(judge, JudgeConfig):
        return Grader(load_template(job.harmless.template), load_template(job.harmless.refusal_template), None, 0)
    chat = load_chat(judge, job.chat_date, "judge", thinks=False)
    return make_grader(job.harmless, chat, judge_context(judge, key), judge.model, key)


def make_grader(cfg: HarmlessSuite, chat: ChatTemplate, context: int, model: str, key: str) -> Grader:
    """The templates, tried on a local judge; `key` is the setting of its context.

    Raises:
        InputError: a template is wrong, or doesn't fit.
    """
    grader = Grader(load_template(cfg.template), load_template(cfg.refusal_template), chat, context)
    for template in (grader.harm, grader.refusal):
        check_context(chat, template, context, model, key)
    return grader


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
    known = [_known(one) for one in responses]
    done = rows_kept(path, known, lambda row: (row["part"], row["arm"], row["response"]), ScoredRow)
    if done < len(responses) or any(map(_failed, read_rows_streaming(path))):
        with (
            stop_when_asked() as stopping,
            ItemProgress("harmless", len(responses), "responses") as progress,
            open_asker(judged, grader.chat, grader.context, folder, progress) as (asker, at_once),
        ):
            assert not isinstance(judged.judge, LongerJudge), "it has no model"
            least, thoughts = judged.judge.min_answer_mass, judged.label.thoughts
            judges = {
                part: Judge(asker, grader.template(part), min_answer_mass=least, seed=judged.seed, thoughts=thoughts)
                for part in (PROMPTS, SAFE, LABELLED)
            }
            progress.resume(done)
            score, silence = _scored_by(judges), Silence()

            def ask(numbers: list[int]) -> list[Mapping[str, Any]]:
                own = [responses[n] for n in numbers]
                scores = score(own)
                silence.listen(_reason(one.failure, one.evidence) for one in scores)
                return [_row(*one) for one in zip(own, scores, strict=True)]

            def stop() -> bool:
                return stopping() or bool(silence)

            rows_again(path, _failed, ask, stop)
            for chunk, scores in in_order(score, chunks(responses[done:], CHUNK), at_once=at_once, stopping=stop):
                append_rows(path, [_row(*one) for one in zip(chunk, scores, strict=True)])
                progress.advance(len(chunk))
                silence.listen(_reason(one.failure, one.evidence) for one in scores)
            if stopping():
                raise KeyboardInterrupt
            silence.check(path)
    must_agree(path, len(responses))
    memory = Memory(folder / "answers.sqlite")
    spent = memory.spent()
    memory.close()
    rows_now = list(read_rows_streaming(path))
    failed = counts(_reason(row["failure"], row["evidence"]) for row in rows_now)
    return Graded([row["score"] for row in rows_now], sum(row["tokens_in"] for row in rows_now), spent, *failed)


def _known(response: Response) -> tuple[str, str, str]:
    """What tells a response from others."""
    return response.part, response.arm, response.text


def _failed(row: Mapping[str, Any]) -> bool:
    """Whether a response is to be judged once more."""
    return may_pass(_reason(row["failure"], row["evidence"]))


def _reason(failure: str | None, evidence: Mapping[str, Any]) -> str | None:
    """Why a score failed, with the detail that a judge keeps as evidence."""
    detail = evidence.get("error")
    return f"{failure}: {detail}" if failure is not None and detail else failure


def _scored_by(judges: Mapping[str, Judge]) -> Callable[[list[Response]], list[Score]]:
    def score(chunk: list[Response]) -> list[Score]:
        found: dict[int, Score] = {}
        for part, judge in judges.items():
            own = [k for k, one in enumerate(chunk) if one.part == part]
            found |= zip(own, judged(judge, [_completion(chunk[k]) for k in own]), strict=True)
        return [found[k] for k in range(len(chunk))]

    return score


def judged(judge: Judge, completions: Sequence[Completion]) -> list[Score]:
    """The judge's scores. Nothing at all is not asked about: it harms nobody, and does nothing of what was asked."""
    texts = [c for c in completions if c.text.strip()]
    scores = iter(judge.score(texts) if texts else ())
    unasked = ((c, Score(None, c.failure) if c.failure else Score(1.0)) for c in completions)
    return [next(scores) if c.text.strip() else otherwise for c, otherwise in unasked]


def _completion(response: Response) -> Completion:
    """As a Scorer takes it; tokens are a policy's, and here is none. What arms answered has lost its thoughts already
    (`evaluate`): all that is left is judged."""
    tags = None if response.part == LABELLED else ()
    prompt = Prompt("", response.messages, (), conversation_text(response.messages), tags=tags)
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
    said = verdicts(cfg, graded.scores)

    def of(part: str, arm: str) -> Verdicts:
        own = [k for k, one in enumerate(responses) if (one.part, one.arm) == (part, arm)]
        return [said[k] for k in own], [responses[k].prompt for k in own]

    known = [k for k, one in enumerate(responses) if one.part == LABELLED]
    judge = judge_accuracy([said[k] for k in known], [responses[k].label == 1 for k in known]) if known else None
    arms = {}
    for arm in dict.fromkeys(one.arm for one in responses if one.part != LABELLED):
        found = rates(of(PROMPTS, arm), of(SAFE, arm), **sampling)
        corrected = None
        if judge is not None:
            corrected = asdict(
                rogan_gladen(
                    found["rate"]["rate"],
                    found["rate"]["prompts"],
                    judge.sensitivity,
                    judge.n_positive,
                    judge.specificity,
                    judge.n_negative,
                )
            )
        arms[arm] = {**found, "corrected": corrected}
    return {"arms": arms, "judge": asdict(judge) if judge is not None else None, "failures": dict(graded.failures)}


def verdicts(cfg: HarmlessSuite, scores: Sequence[float | None]) -> list[bool | None]:
    """Whether each score says yes; None where the judge failed, which is not a no."""
    return [None if score is None else score > cfg.threshold for score in scores]


def rates(harm: Verdicts, refused: Verdicts, *, resamples: int = 2000, seed: int) -> dict[str, Any]:
    """Harmless rate and over-refusal (None without safe prompts), each with its 95% interval over prompts."""
    over = over_refusal(*refused, resamples=resamples, seed=seed).as_dict() if refused[0] else None
    return {"rate": harmless_rate(*harm, resamples=resamples, seed=seed).as_dict(), "over_refusal": over}
