"""What a training run measures on prompts that it never trains on, with the current policy, each time the same way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlaif_ray.config.sections import DataConfig, JudgeFeedback
from rlaif_ray.data.prompt_table import PromptTable, prompts_digest
from rlaif_ray.documents import at
from rlaif_ray.errors import InputError
from rlaif_ray.evaluation.suites import HeldOutScores, held_out_samples, held_out_summary
from rlaif_ray.interfaces import GenerationSettings
from rlaif_ray.pipelines.contexts import read_prompts
from rlaif_ray.pipelines.experience import check_fresh, keep_scored
from rlaif_ray.pipelines.feedback import judge_of, parts
from rlaif_ray.pipelines.harmless import Grader, judged, make_grader, rates, verdicts
from rlaif_ray.tracking.files import read_rows

if TYPE_CHECKING:
    from rlaif_ray.chat.template import ChatTemplate
    from rlaif_ray.config.jobs import TrainJob
    from rlaif_ray.config.sections import FeedbackConfig
    from rlaif_ray.pipelines.checkpoint import RunState, Saved
    from rlaif_ray.pipelines.feedback import FeedbackInputs
    from rlaif_ray.tracking import Tracker
    from rlaif_ray.types import Prompt

HELD_OUT_SEED = 2**31 - 1  # not a step's number, so that no held-out sample repeats a training sample's draws


@dataclass(frozen=True, slots=True)
class HeldOutInputs:
    """Read and checked before any process starts."""

    scored: Sequence[Prompt]  # by the feedback, as in training
    harmful: Sequence[Prompt]  # requests, some of which could do harm
    safe: Sequence[Prompt]
    grader: Grader | None  # None without evaluation.harmless

    @property
    def prompts(self) -> list[Prompt]:
        """All that the policy answers."""
        return [*self.scored, *self.harmful, *self.safe]

    @property
    def hash(self) -> str:
        """Of the prompts and what each is asked for: figures are compared where it is the same."""
        return prompts_digest(self.scored, self.harmful, self.safe)


def read_held_out(job: TrainJob, feedback: FeedbackInputs, chat: ChatTemplate, longest: int) -> HeldOutInputs:
    """Prompts of at most `longest` tokens, and the harmless suite's templates.

    Raises:
        InputError: any of them is wrong, or does not fit the judge.
    """

    def read(data: DataConfig) -> PromptTable:
        system = job.data.system if data.system is None else data.system
        return read_prompts(data.model_copy(update={"system": system}), chat, longest)

    own, cfg = job.evaluation.held_out, job.evaluation.harmless
    scored = PromptTable.empty()
    if own.path is not None:
        scored = read(DataConfig(path=own.path, split=own.split, column=own.column, limit=own.limit, too_long="skip"))
    if cfg is None:
        return HeldOutInputs(scored, [], [], None)
    judge = next(iter(feedback.judges.values()))
    grader = make_grader(cfg, judge.chat, judge.context, judge.cfg.judge.model, judge.context_key)
    return HeldOutInputs(scored, read(cfg.prompts), read(cfg.safe) if cfg.safe is not None else [], grader)


def must_be_same_prompts(state: RunState, inputs: HeldOutInputs, found: Saved) -> None:
    """Raises InputError where what was measured before training is of other prompts: there would be no gain to tell."""
    if state.held_out_before is not None and state.held_out_prompts != inputs.hash:
        raise InputError(
            f"the held-out prompts must be those of the checkpoint {found} (they were {state.held_out_prompts}, number "
            f"and hash, and are {inputs.hash}): a gain would compare different prompts. Restore the files of "
            f"evaluation.held_out and evaluation.harmless, use another run_dir, or checkpoint.resume=never to start "
            f"anew."
        )


class HeldOut:
    """The feedback's scores and, where asked for, the harmless rate of the current policy."""

    def __init__(self, job: TrainJob, inputs: HeldOutInputs, generator: Any, scorer: Any, track: Tracker) -> None:
        self._job, self._inputs, self._generator, self._scorer = job, inputs, generator, scorer
        self._track = track
        self._last: dict[str, Any] = {}
        self.prompts = inputs.hash

    def measure(self, step: int, before: HeldOutScores | None = None) -> HeldOutScores:
        """Measures with the weights of `step`; returns scores by prompt, compared with `before`, if given.

        [] where no held-out prompts are scored.
        """
        if not self._inputs.prompts:
            return []
        scores: HeldOutScores = []
        found: dict[str, Any] = {"evaluator": evaluator(self._job.feedback), "held_out_prompts": self.prompts}
        with self._track.phase("evaluation"):
            if self._inputs.scored:
                scores = self._scores(step)
                found["held_out"] = held_out_summary(scores if before is None else before, scores)
            if self._inputs.grader is not None:
                found["harmless"] = self._harmless(step, self._inputs.grader)
            self._track.evaluation(step, found)
        self._last = found
        return scores

    def _scores(self, step: int) -> HeldOutScores:
        samples, scores = held_out_samples(
            self._generator, self._scorer, self._inputs.scored, held_out_settings(self._job)
        )
        completions = [s.completion for s in samples]
        check_fresh(completions, version=step)
        keep_scored(completions, [s.score for s in samples], self._job.feedback.min_scored_fraction)
        return scores

    def _harmless(self, step: int, grader: Grader) -> dict[str, Any]:
        cfg, settings = self._job.evaluation.harmless, held_out_settings(self._job)
        assert cfg is not None
        completions = self._generator.generate([*self._inputs.harmful, *self._inputs.safe], settings)
        check_fresh(completions, version=step)
        safe_from = len(self._inputs.harmful) * settings.samples_per_prompt
        judge, found, tokens = judge_of(self._scorer), [], 0
        for template, own in ((grader.harm, completions[:safe_from]), (grader.refusal, completions[safe_from:])):
            scores = judged(judge.asking(template), own)
            found.append((verdicts(cfg, [s.value for s in scores]), [c.prompt.id for c in own]))
            tokens += sum(s.tokens_in for s in scores)
        return {**rates(*found, seed=self._job.seed), "tokens_in": tokens}

    def summary(self) -> dict[str, Any]:
        """The last measurement, for summary.json; of the harmless suite the run's first one too."""
        if "harmless" not in self._last:
            return self._last
        rows = read_rows(self._track.run_dir / "evaluations.jsonl")  # the first may be another process's
        measured = [{"step": row["step"], **row["harmless"]} for row in rows if self._same(row)]
        return {**self._last, "harmless": {"before": measured[0], "after": measured[-1]}}

    def _same(self, row: dict[str, Any]) -> bool:
        measured = at(row, "harmless", expected=dict) is not None and "step" in row
        return measured and row.get("held_out_prompts") == self.prompts


def evaluator(cfg: FeedbackConfig) -> str:
    """Who measures, in words."""
    names = [s.judge.model if isinstance(s, JudgeFeedback) else getattr(s, "model", s.type) for _, s in parts(cfg)]
    return f"{' and '.join(names)}, which trains this policy: it grades its own pupil (rlaif evaluate can take another)"


def held_out_settings(job: TrainJob) -> GenerationSettings:
    """The same draws before and after: the gain is paired."""
    return GenerationSettings(
        samples_per_prompt=job.evaluation.held_out.samples_per_prompt,
        max_new_tokens=job.sampling.max_new_tokens,
        temperature=job.sampling.temperature,
        seed=job.seed * 2**32 + HELD_OUT_SEED,
    )
