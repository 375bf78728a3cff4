"""RL from AI feedback: rollouts, feedback, update, weight sync, in one loop that reads top to bottom."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif_ray.data.prompt_source import PromptSource
from rlaif_ray.errors import FeedbackError, Preempted, ReplicasLostError
from rlaif_ray.interfaces import GenerationSettings, score_answered
from rlaif_ray.pipelines.begun import in_begun_precision
from rlaif_ray.pipelines.chat_date import with_chat_date
from rlaif_ray.pipelines.checkpoint import RunState, due, new_changes, open_checkpoints, read_state
from rlaif_ray.pipelines.contexts import check_attention, engine_context, policy_room, read_prompts
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
from rlaif_ray.pipelines.feedback import (
    FeedbackInputs,
    check_reward_templates,
    feedback_lines,
    read_feedback,
    start_feedback,
)
from rlaif_ray.pipelines.finite import check_updates
from rlaif_ray.pipelines.guard import Guard
from rlaif_ray.pipelines.held_out import HeldOut, HeldOutInputs, must_be_same_prompts, read_held_out
from rlaif_ray.pipelines.restarts import with_restarts
from rlaif_ray.pipelines.run_folder import make_folder, state_of, stop_when_asked, write_resolved
from rlaif_ray.pipelines.settings import history
from rlaif_ray.runtime.cluster import open_cluster
from rlaif_ray.runtime.placement import placement_table
from rlaif_ray.tracking import open_tracker, print_summary

if TYPE_CHECKING:
    from collections.abc import Mapping

    from rlaif_ray.config.jobs import TrainJob
    from rlaif_ray.config.load import Loaded
    from rlaif_ray.data.identity import Content
    from rlaif_ray.data.prompt_table import PromptTable
    from rlaif_ray.interfaces import Scorer
    from rlaif_ray.pipelines.checkpoint import Checkpoints, Saved
    from rlaif_ray.pipelines.run_folder import Stopping
    from rlaif_ray.runtime.cluster import Cluster
    from rlaif_ray.runtime.groups import EngineGroup, LearnerGroup
    from rlaif_ray.tracking import Tracker


def train_rl(loaded: Loaded) -> dict[str, Any]:
    """Runs the job to its end, or from its newest checkpoint; returns what summary.json says.

    A learner that is lost starts again from the newest checkpoint; engines that are lost are replaced meanwhile.
    """
    loaded = with_chat_date(loaded)
    job, run_dir = in_begun_precision(loaded, state_of(loaded)), loaded.run_dir
    inputs = read_inputs(job)
    make_folder(run_dir)  # its own before a checkpoint is looked for
    checkpoints = open_checkpoints(job, run_dir)
    start = find_start(job, inputs, checkpoints.to_resume(), checkpoints.holds)
    tracking = {"config": job.model_dump(mode="json"), "tracking": job.tracking, "total_steps": job.steps}
    with (
        stop_when_asked(job.checkpoint.grace_s) as stopping,
        open_cluster(job, leave=stopping) as cluster,  # before the tracker: wrong input costs an earlier run no files
        open_tracker(run_dir, **tracking, **start.tracking(), name=run_dir.name) as track,
        checkpoints,
    ):
        write_resolved(loaded, history(start.state.changes))
        checkpoints.tell(track.note)
        checkpoints.computed_in(cluster.precisions())
        for change in new_changes(start.checkpoint, start.state):
            track.note(f"changed {change}")
        if start.checkpoint is None:
            checkpoints.start_over()
        track.note("starting engines and learner")
        track.watch_processes(cluster.pids)
        rollouts = cluster.start_rollouts(job.policy, job.rollout, context=inputs.context)
        feedback = start_feedback(inputs.feedback, cluster)
        held_out = HeldOut(job, inputs.held_out, rollouts, feedback, track)
        cluster.tell(track.note, leave=stopping.soon)
        run = Run(job, run_dir, inputs.context, cluster, rollouts, feedback, held_out, track, stopping, checkpoints)
        summary = with_restarts(
            lambda found: train_from(find_start(job, inputs, found, checkpoints.holds), run),
            start.checkpoint,
            job=job,
            cluster=cluster,
            checkpoints=checkpoints,
            track=track,
        )
    print_summary(summary, run_dir)
    return summary


@dataclass(frozen=True, slots=True)
class Run:
    """What lasts as long as the run, whatever becomes of its learner."""

    job: TrainJob
    run_dir: Path
    context: int  # tokens of a rollout engine
    cluster: Cluster
    rollouts: EngineGroup
    feedback: Scorer
    held_out: HeldOut
    track: Tracker
    stopping: Stopping
    checkpoints: Checkpoints


def train_from(start: Start, run: Run) -> dict[str, Any]:
    """Trains from there to the end, and saves the policy; returns what summary.json says.

    Raises:
        LearnerLostError: a learner rank died or went silent.
        MismatchError: engine, learner or saved folder compute the policy differently.
        NotFiniteError: loss, gradient or weights are no numbers: nothing of that step is sent or saved.
        KeyboardInterrupt: the run was asked to stop; there is a checkpoint.
    """
    job, track, state, prompts = run.job, run.track, start.state, start.prompts
    state.wandb_run_id = track.wandb_run_id
    learner = run.cluster.start_learner()
    run.cluster.wait()
    sync = run.cluster.connect(learner, run.rollouts)
    precision = run.cluster.precision(job.policy.precision)
    guard = Guard(job, learner, precision, run.context, run.cluster.device)
    if start.checkpoint is not None:
        learner.load_checkpoint(start.checkpoint.folder)
        track.note(f"resumed from {start.checkpoint}")
    try:
        sync.push(version=state.step)  # before the first rollout
        guard.check_push(run.rollouts, state.step)
        if state.held_out_before is None:
            state.held_out_before = run.held_out.measure(state.step)
            state.held_out_prompts = run.held_out.prompts
        while state.step < job.steps and not run.stopping():
            run.checkpoints.check()
            step = state.step + 1
            with track.step(step) as metrics:
                with metrics.phase("rollout"):
                    completions = run.rollouts.generate(prompts.next(), sampling_settings(job, step))
                    check_fresh(completions, version=state.step)
                with metrics.phase("feedback"):
                    scores = score_answered(run.feedback, completions)
                    track.samples(step, sample_rows(completions, scores))
                    samples = keep_scored(completions, scores, job.feedback.min_scored_fraction)
                with metrics.phase("annotate"):
                    experience = learner.annotate(samples)
                    experience = add_advantages(experience, job.algorithm, state.kl_coef)
                with metrics.phase("update"):
                    updated = check_updates(learner.update(experience), job.learner, experience)
                    guard.check_update(updated, experience)
                with metrics.phase("weight_sync"):
                    pushed = sync.push(version=step)
                    metrics.add({**updated, **guard.check_push(run.rollouts, step)})
                kl = mean_kl(experience, job.algorithm.kl)
                metrics.add(batch_metrics(completions, scores) | run.rollouts.metrics())
                metrics.add({"kl/mean": kl, "kl/coef": state.kl_coef})
                metrics.add({"weights/version": pushed.version, "weights/sync_bytes": pushed.bytes})
                metrics.add(rates(completions, metrics.seconds))
                state.kl_coef = next_kl_coef(state.kl_coef, kl, job.algorithm.kl, len(samples))
                state.step, state.prompts = step, prompts.state()
                if due(step, job.evaluation.every) and step < job.steps:
                    run.held_out.measure(step, state.held_out_before)
            if due(step, job.checkpoint.every, last=job.steps):  # after the step's row is on disk
                with track.phase("checkpoint"):
                    run.checkpoints.save(learner, state)
        if state.step == job.steps:
            run.held_out.measure(state.step, state.held_out_before)
    except (FeedbackError, Preempted, ReplicasLostError):  # all come between updates: the learner stands at a step
        save_last(run, learner, state)
        raise
    if state.step < job.steps:
        save_last(run, learner, state)
        raise KeyboardInterrupt
    run.checkpoints.wait()
    with track.phase("saving the policy"):
        folder = (run.run_dir / "policy").absolute()
        for note in learner.save_policy(str(folder)):
            track.note(note)
        saved = guard.check_saved(folder, run.checkpoints)
    return track.summary({"job": "train", **run.held_out.summary(), **saved})


def save_last(run: Run, learner: LearnerGroup, state: RunState) -> None:
    """A checkpoint of the last step whose row is written, unless there is one, or nothing was learned yet."""
    if state.step and state.step == run.track.last_step:
        run.checkpoints.save(learner, state)
    run.checkpoints.wait()


def plan_rl(loaded: Loaded) -> str:
    """What `--dry-run` shows beside the resolved config: actors, resources, and what the judge will read."""
    job = loaded.config
    told = [placement_table(job), *feedback_lines(job.feedback)]
    if job.evaluation.held_out.path is None:
        told.append("no held-out prompts (evaluation.held_out.path): the run will not say whether training helped")
    return "\n\n".join(told)


@dataclass(frozen=True, slots=True)
class Start:
    """Where a run, or a new learner in it, begins."""

    state: RunState
    prompts: PromptSource
    checkpoint: Saved | None  # to load; None: from the start

    def tracking(self) -> dict[str, Any]:
        """What the tracker goes on from."""
        return {"resume_step": self.state.step, "wandb_run_id": self.state.wandb_run_id}


def find_start(job: TrainJob, inputs: Inputs, found: Saved | None, holds: Mapping[str, Content] | None = None) -> Start:
    """Where the checkpoint that was found stands, or the beginning; `holds` is what the inputs held at the start.

    Raises:
        InputError: the checkpoint is another run's.
        CheckpointError: it can't be read.
    """
    prompts = PromptSource(
        inputs.prompts, prompts_per_step=job.sampling.prompts_per_step, seed=job.seed, shuffle=job.data.shuffle
    )
    if found is None:
        return Start(RunState(kl_coef=job.algorithm.kl.coef), prompts, None)
    state = read_state(found, job, job.steps, holds)
    prompts.restore(state.prompts)
    must_be_same_prompts(state, inputs.held_out, found)
    return Start(state, prompts, found)


@dataclass(frozen=True, slots=True)
class Inputs:
    """Everything read and checked before any process starts."""

    prompts: PromptTable
    held_out: HeldOutInputs
    context: int  # tokens of a rollout engine, prompt and answer together
    feedback: FeedbackInputs


def read_inputs(job: TrainJob) -> Inputs:
    """Prompts, what feedback needs, and context lengths.

    Raises:
        InputError: any of them is wrong, or they don't fit together.
    """
    rollout, new = job.rollout, job.sampling.max_new_tokens
    chat, room = policy_room(job.policy, rollout.max_context, new, job.chat_date, trained=True)
    longest = min(room - job.sampling.max_new_tokens, job.data.max_prompt_tokens or room)
    prompts = read_prompts(job.data, chat, longest)
    feedback = read_feedback(job.feedback, job.seed, job.chat_date)
    held_out = read_held_out(job, feedback, chat, longest)
    check_reward_templates(job.feedback, [*prompts.one_of_each_shape(), *held_out.prompts], job.chat_date)
    needed = max([prompts.longest, *(len(p.tokens) for p in held_out.prompts)]) + job.sampling.max_new_tokens
    check_attention(job.policy, needed)
    return Inputs(prompts, held_out, job.rollout.max_context or engine_context(needed, room), feedback)


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
