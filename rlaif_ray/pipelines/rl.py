"""RL from AI feedback: rollouts, feedback, update, weight sync, in one loop that reads top to bottom."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlaif_ray.data.prompts import PromptSource, load_prompts
from rlaif_ray.errors import InputError
from rlaif_ray.evaluation.suites import HeldOutScores, held_out_samples, held_out_summary
from rlaif_ray.interfaces import GenerationSettings
from rlaif_ray.models import load_tokenizer
from rlaif_ray.pipelines import checkpoint
from rlaif_ray.pipelines.contexts import engine_context, readable_context
from rlaif_ray.pipelines.experience import (
    add_advantages,
    batch_metrics,
    check_fresh,
    keep_scored,
    mean_kl,
    next_kl_coef,
    rates,
    sample_rows,
)
from rlaif_ray.pipelines.feedback import FeedbackInputs, feedback_lines, read_feedback, start_feedback
from rlaif_ray.pipelines.run_folder import make_folder, stop_when_asked, write_resolved
from rlaif_ray.runtime.cluster import open_cluster
from rlaif_ray.runtime.placement import placement_table
from rlaif_ray.tracking import Tracker, open_tracker, print_summary

if TYPE_CHECKING:
    from rlaif_ray.config.jobs import TrainJob
    from rlaif_ray.config.load import Loaded
    from rlaif_ray.types import Prompt

HELD_OUT_SEED = 2**31 - 1  # not a step's number, so that no held-out sample repeats a training sample's draws


def train_rl(loaded: Loaded) -> dict[str, Any]:
    """Runs the job to its end, or from its newest checkpoint; returns what summary.json says."""
    job, run_dir = loaded.config, loaded.run_dir
    inputs = read_inputs(job)
    resumed = checkpoint.newest(run_dir, job.checkpoint)
    state = (
        checkpoint.read_state(resumed, job, job.steps)
        if resumed
        else checkpoint.RunState(kl_coef=job.algorithm.kl.coef)
    )
    prompts = PromptSource(
        inputs.prompts, prompts_per_step=job.sampling.prompts_per_step, seed=job.seed, shuffle=job.data.shuffle
    )
    if resumed:
        prompts.restore(state.prompts)
    make_folder(run_dir)
    tracking = {"config": job.model_dump(mode="json"), "tracking": job.tracking, "total_steps": job.steps}
    with (
        open_cluster(job) as cluster,  # first: wrong input must not cost an earlier run its files
        open_tracker(run_dir, **tracking, resume_step=state.step, name=run_dir.name) as track,
        stop_when_asked() as stopping,
    ):
        write_resolved(loaded)
        track.note("starting engines and learner")
        rollouts = cluster.start_rollouts(job.policy, job.rollout, context=inputs.context)
        feedback = start_feedback(inputs.feedback, cluster)
        learner = cluster.start_learner()
        cluster.wait()
        track.watch_processes(cluster.pids)
        sync = cluster.connect(learner, rollouts)
        held_out = HeldOut(job, inputs.held_out, rollouts, feedback, track)
        if resumed:
            learner.load_checkpoint(str(resumed))
            track.note(f"resumed from {resumed}")
        sync.push(version=state.step)  # before the first rollout
        if state.held_out_before is None:
            state.held_out_before = held_out.measure(state.step)
        while state.step < job.steps and not stopping():
            step = state.step + 1
            with track.step(step) as metrics:
                with metrics.phase("rollout"):
                    completions = rollouts.generate(prompts.next(), sampling_settings(job, step))
                    check_fresh(completions, version=state.step)
                with metrics.phase("feedback"):
                    scores = feedback.score(completions)
                    track.samples(step, sample_rows(completions, scores))
                    samples = keep_scored(completions, scores, job.feedback.min_scored_fraction)
                with metrics.phase("annotate"):
                    experience = learner.annotate(samples)
                    experience = add_advantages(experience, job.algorithm, state.kl_coef)
                with metrics.phase("update"):
                    metrics.add(learner.update(experience))
                with metrics.phase("weight_sync"):
                    pushed = sync.push(version=step)
                kl = mean_kl(experience, job.algorithm.kl)
                metrics.add(batch_metrics(completions, scores))
                metrics.add({"kl/mean": kl, "kl/coef": state.kl_coef})
                metrics.add({"weights/version": pushed.version, "weights/sync_bytes": pushed.bytes})
                metrics.add(rates(completions, metrics.seconds))
                state.kl_coef = next_kl_coef(state.kl_coef, kl, job.algorithm.kl, len(samples))
                state.step, state.prompts = step, prompts.state()
                if checkpoint.due(step, job.evaluation.every) and step < job.steps:
                    held_out.measure(step, state.held_out_before)
            if checkpoint.due(step, job.checkpoint.every, last=job.steps):  # after the step's row is on disk
                with track.phase("checkpoint"):
                    checkpoint.save(run_dir, job, learner, state)
        if state.step < job.steps:
            checkpoint.save(run_dir, job, learner, state)
            raise KeyboardInterrupt
        held_out.measure(state.step, state.held_out_before)
        with track.phase("saving the policy"):
            learner.save_policy(str((run_dir / "policy").absolute()))
        summary = track.summary({"job": "train", **held_out.summary()})
    print_summary(summary, run_dir)
    return summary


def plan_rl(loaded: Loaded) -> str:
    """What `--dry-run` shows beside the resolved config: actors, resources, and what the judge will read."""
    job = loaded.config
    return "\n\n".join([placement_table(job), *feedback_lines(job.feedback)])


class HeldOut:
    """The judge's scores on prompts that are never trained on, measured the same way each time."""

    def __init__(self, job: TrainJob, prompts: list[Prompt], generator: Any, scorer: Any, track: Tracker) -> None:
        self._job, self._prompts, self._generator, self._scorer = job, prompts, generator, scorer
        self._track = track
        self._summary: dict[str, Any] = {}

    def measure(self, step: int, before: HeldOutScores | None = None) -> HeldOutScores:
        """Scores by prompt, with the weights of `step`; compared with `before`, if given. [] without prompts."""
        if not self._prompts:
            return []
        with self._track.phase("evaluation"):
            samples, scores = held_out_samples(
                self._generator, self._scorer, self._prompts, held_out_settings(self._job)
            )
            completions = [s.completion for s in samples]
            check_fresh(completions, version=step)
            keep_scored(completions, [s.score for s in samples], self._job.feedback.min_scored_fraction)
            self._summary = held_out_summary(scores if before is None else before, scores)
            self._track.evaluation(step, {"held_out": self._summary})
        return scores

    def summary(self) -> dict[str, Any]:
        """The last measurement, for summary.json."""
        return {"held_out": self._summary} if self._summary else {}


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything read and checked before any process starts."""

    prompts: list[Prompt]
    held_out: list[Prompt]
    context: int  # tokens of a rollout engine, prompt and answer together
    feedback: FeedbackInputs


def read_inputs(job: TrainJob) -> Inputs:
    """Prompts, what feedback needs, and context lengths.

    Raises:
        InputError: any of them is wrong, or they don't fit together.
    """
    policy = job.policy
    tokenizer = load_tokenizer(policy.model, revision=policy.revision, trust_remote_code=policy.trust_remote_code)
    room = readable_context(policy, job.rollout.max_context, "rollout.max_context")
    longest = room - job.sampling.max_new_tokens
    if longest < 1:
        raise InputError(
            f"sampling.max_new_tokens must leave room for a prompt in the policy's {room} tokens of context "
            f"(got {job.sampling.max_new_tokens}). Lower it."
        )
    limit = min(longest, job.data.max_prompt_tokens or longest)
    common: dict[str, Any] = {"system": job.data.system, "tokenizer": tokenizer, "max_prompt_tokens": limit}
    loaded = load_prompts(
        job.data.path,
        split=job.data.split,
        column=job.data.column,
        limit=job.data.limit,
        too_long=job.data.too_long,
        **common,
    )
    held_out: list[Prompt] = []
    source = job.evaluation.held_out
    if source.path is not None:
        held_out = load_prompts(
            source.path, split=source.split, column=source.column, limit=source.limit, too_long="skip", **common
        ).prompts
    needed = max(len(p.tokens) for p in [*loaded.prompts, *held_out]) + job.sampling.max_new_tokens
    context = job.rollout.max_context or engine_context(needed, room)
    return Inputs(loaded.prompts, held_out, context, read_feedback(job.feedback))


def sampling_settings(job: TrainJob, step: int) -> GenerationSettings:
    """How step `step` samples; the seed is the run's and the step's."""
    sampling = job.sampling
    return GenerationSettings(
        samples_per_prompt=sampling.samples_per_prompt,
        max_new_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        seed=job.seed * 2**32 + step,
        ignore_eos=sampling.ignore_eos,
    )


def held_out_settings(job: TrainJob) -> GenerationSettings:
    """The same draws before and after: the gain is paired."""
    return GenerationSettings(
        samples_per_prompt=job.evaluation.held_out.samples_per_prompt,
        max_new_tokens=job.sampling.max_new_tokens,
        temperature=job.sampling.temperature,
        seed=job.seed * 2**32 + HELD_OUT_SEED,
    )
