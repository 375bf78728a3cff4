"""`rlaif sft`: supervised fine-tuning; and the loop that every supervised job shares."""

from __future__ import annotations

import hashlib
import math
import random
from array import array
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from rlaif_ray.chat.renderer import ChatRenderer
from rlaif_ray.data.columns import ExampleTable
from rlaif_ray.data.demonstrations import Demonstration, read_demonstrations
from rlaif_ray.data.rows import count_rows
from rlaif_ray.errors import InputError
from rlaif_ray.learner.finetune import SftExample
from rlaif_ray.learner.lora import plan_adapters
from rlaif_ray.models import empty_model
from rlaif_ray.pipelines.begun import in_begun_precision
from rlaif_ray.pipelines.chat_date import with_chat_date
from rlaif_ray.pipelines.checkpoint import RunState, due, new_changes, open_checkpoints, read_state
from rlaif_ray.pipelines.contexts import check_attention, load_chat, readable_context
from rlaif_ray.pipelines.finite import check_updates, require_numbers
from rlaif_ray.pipelines.guard import Guard
from rlaif_ray.pipelines.restarts import with_restarts
from rlaif_ray.pipelines.run_folder import fingerprint, make_folder, state_of, stop_when_asked, write_resolved
from rlaif_ray.pipelines.settings import history
from rlaif_ray.pipelines.streaming import chunks
from rlaif_ray.runtime.cluster import Cluster, open_cluster
from rlaif_ray.runtime.placement import placement_table
from rlaif_ray.tracking import open_tracker
from rlaif_ray.tracking.display import fixed
from rlaif_ray.tracking.progress import SILENT_S, ItemProgress, print_table

if TYPE_CHECKING:
    from rlaif_ray.config.data_sections import SupervisedConfig
    from rlaif_ray.config.jobs import SftJob, SupervisedJob
    from rlaif_ray.config.load import Loaded
    from rlaif_ray.data.identity import Content
    from rlaif_ray.pipelines.checkpoint import Checkpoints, Saved
    from rlaif_ray.runtime.groups import SftGroup
    from rlaif_ray.tracking import Tracker

Example = TypeVar("Example")

READ_AT_A_TIME = 512  # records that are tokenised together

# ---- The loop --------------------------------------------------------------------------------------------------------


def total_steps(cfg: SupervisedConfig, examples: int) -> int:
    """Optimizer steps of the whole run; the last batch of an epoch may be smaller."""
    return cfg.epochs * math.ceil(examples / cfg.batch_size)


def batch_of(cfg: SupervisedConfig, examples: Sequence[Example], step: int, seed: int) -> list[Example]:
    """The examples of a step (from 1): every one once an epoch, in a seeded order, another each epoch."""
    per_epoch = math.ceil(len(examples) / cfg.batch_size)
    epoch, place = divmod(step - 1, per_epoch)
    order = _epoch_order(len(examples), seed, epoch)
    return [examples[i] for i in order[place * cfg.batch_size : (place + 1) * cfg.batch_size]]


@lru_cache(maxsize=1)  # every step of an epoch asks for it
def _epoch_order(examples: int, seed: int, epoch: int) -> array[int]:
    order = array("I", range(examples))
    random.Random(f"{seed}/{epoch}").shuffle(order)
    return order


def start_state(
    job: SupervisedJob, found: Saved | None, steps: int, data: str, holds: Mapping[str, Content] | None = None
) -> RunState:
    """Where a run begins, with the checkpoint that was found.

    Args:
        data: the data's fingerprint.
        holds: what the inputs held when this process began.

    Raises:
        InputError: there is a checkpoint of another run, or of other data.
    """
    if found is None:
        return RunState(prompts={"data": data})
    state = read_state(found, job, steps, holds)
    if state.prompts["data"] != data:
        raise InputError(
            f"{job.data.path} has changed since the checkpoint {found}: its batches would be other ones. "
            f"Restore the file, use another run_dir, or checkpoint.resume=never to start over."
        )
    return state


@dataclass(slots=True)
class SupervisedRun:
    """Epochs of a supervised job, from where it begins to its last step."""

    job: SupervisedJob
    run_dir: Path
    track: Tracker
    learner: Any  # a SupervisedGroup
    state: RunState
    resumed: Saved | None
    steps: int
    stopping: Callable[[], bool]
    checkpoints: Checkpoints
    guard: Guard
    gaps: dict[str, float]  # that the guard found before the first step

    def save(self, name: str, center: dict[str, float] | None = None) -> dict[str, float]:
        """Saves the model into this folder of the run, and checks what is in it; returns the gap for the summary.

        Raises:
            MismatchError: it is not the model that was trained.
        """
        folder = (self.run_dir / name).absolute()
        for note in self.learner.save_model(str(folder), center):
            self.track.note(note)
        return self.guard.check_saved(folder, self.checkpoints)

    def train(self, examples: Sequence[Any], evaluate: Callable[[], dict[str, Any]]) -> None:
        """Takes all steps that are left; evaluates and writes checkpoints when they are due.

        Raises:
            NotFiniteError: loss, gradient or weights are no numbers.
            KeyboardInterrupt: it was asked to stop; a checkpoint is written.
        """
        job, state = self.job, self.state
        if self.resumed is not None:
            self.learner.load_checkpoint(self.resumed.folder)
            self.track.note(f"resumed from {self.resumed}")
        while state.step < self.steps and not self.stopping():
            self.checkpoints.check()
            step = state.step + 1
            with self.track.step(step) as metrics:
                with metrics.phase("update"):
                    learned = self.learner.train(batch_of(job.training, examples, step, job.seed))
                    metrics.add(check_updates(learned, job.learner))
                metrics.add(self.gaps if step == 1 else {})
                state.step = step
                if due(step, job.training.evaluate_every) and step < self.steps:
                    with metrics.phase("evaluation"):
                        self.track.evaluation(step, evaluate())
            if due(step, job.checkpoint.every, last=self.steps):
                with self.track.phase("checkpoint"):
                    self.checkpoints.save(self.learner, state)
        if state.step < self.steps:
            self.checkpoints.save(self.learner, state)
        self.checkpoints.wait()  # whatever is lost from here on, nothing is learned again
        if state.step < self.steps:
            raise KeyboardInterrupt


def run_supervised(
    loaded: Loaded,
    examples: int,
    data: str,
    note: str,
    start: Callable[[Cluster, int], Any],
    story: Callable[[SupervisedRun], dict[str, Any]],
) -> dict[str, Any]:
    """What `story` makes of a run that is ready to train: cluster, tracker and learner are up.

    A learner that is lost starts again from the newest checkpoint, and so does the story.

    Args:
        examples: how many there are to learn from.
        data: their fingerprint.
        note: what is told first.
        start: the method of Cluster that starts the learner, given the run's steps.
    """
    job, run_dir = in_begun_precision(loaded, state_of(loaded)), loaded.run_dir
    trained = trained_part(job)
    steps = total_steps(job.training, examples)
    room = readable_context(job.policy, job.training.max_tokens, f"{job.section}.max_tokens")
    make_folder(run_dir)  # its own before a checkpoint is looked for
    checkpoints = open_checkpoints(job, run_dir)
    resumed = checkpoints.to_resume()
    state = start_state(job, resumed, steps, data, checkpoints.holds)
    tracking = {"config": job.model_dump(mode="json"), "tracking": job.tracking, "total_steps": steps}
    with (
        stop_when_asked(job.checkpoint.grace_s) as stopping,
        open_cluster(job, leave=stopping) as cluster,
        open_tracker(
            run_dir, **tracking, resume_step=state.step, wandb_run_id=state.wandb_run_id, name=run_dir.name
        ) as track,
        checkpoints,
    ):
        write_resolved(loaded, history(state.changes))
        checkpoints.tell(track.note)
        checkpoints.computed_in(cluster.precisions())
        for change in new_changes(resumed, state):
            track.note(f"changed {change}")
        if resumed is None:
            checkpoints.start_over()
        if trained is not None:
            track.note(trained)
        track.note(f"{note}; starting the learner")
        track.watch_processes(cluster.pids)
        cluster.tell(track.note, leave=stopping.soon)

        def attempt(found: Saved | None) -> dict[str, Any]:
            state = start_state(job, found, steps, data, checkpoints.holds)
            state.wandb_run_id = track.wandb_run_id
            learner = start(cluster, steps)
            cluster.wait()
            guard = Guard(job, learner, cluster.precision(job.policy.precision), room, cluster.device)
            gaps = guard.check_layout()
            run = SupervisedRun(job, run_dir, track, learner, state, found, steps, stopping, checkpoints, guard, gaps)
            return story(run)

        return with_restarts(
            attempt,
            resumed,
            job=job,
            cluster=cluster,
            checkpoints=checkpoints,
            track=track,
        )


def plan_supervised(loaded: Loaded) -> str:
    """What `--dry-run` shows beside the resolved config."""
    trained = trained_part(loaded.config)
    return placement_table(loaded.config) + (f"\n{trained}" if trained is not None else "")


def trained_part(job: SupervisedJob) -> str | None:
    """What of the model is trained, for people; None: all of it. Before anything starts, and without weights.

    Raises:
        InputError: the model can't have adapters, or can't become a reward model.
    """
    policy, lora = job.policy, job.training.lora
    is_reward_model = job.section == "reward"
    if lora is None and not is_reward_model:
        return None
    code: dict[str, Any] = {"revision": policy.revision, "trust_remote_code": policy.trust_remote_code}
    model = empty_model(policy.model, classifier=is_reward_model, **code)
    if lora is None:
        return None
    return str(plan_adapters(model, lora, policy.model, sharded=job.learner.zero_stage == 3))


# ---- Fine-tuning -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class SftInputs:
    """Examples, read and checked before anything starts."""

    train: ExampleTable[SftExample]
    held_out: ExampleTable[SftExample]
    too_long: int  # turns left out
    data: str  # fingerprint


def fine_tune(loaded: Loaded) -> dict[str, Any]:
    """Runs the job to its end, or from its newest checkpoint; returns what summary.json says."""
    loaded = with_chat_date(loaded)
    run_dir = loaded.run_dir
    inputs = read_sft_inputs(loaded.config)
    note = f"{len(inputs.train)} turns to learn, {len(inputs.held_out)} held out"

    def story(run: SupervisedRun) -> dict[str, Any]:
        run.train(inputs.train, lambda: {"held_out": held_out_loss(run.learner, inputs.held_out)})
        with run.track.phase("evaluation"):
            results = held_out_loss(run.learner, inputs.held_out)
            run.track.evaluation(run.steps, {"held_out": results})
        with run.track.phase("saving the policy"):
            saved = run.save("policy")
        found = {"job": "sft", "turns": len(inputs.train), "too_long": inputs.too_long, "sft": {"held_out": results}}
        return run.track.summary(found | saved)

    summary = run_supervised(loaded, len(inputs.train), inputs.data, note, Cluster.start_sft_learner, story)
    print_table(run_dir.name, list(_lines(summary)), run_dir)
    return summary


def read_sft_inputs(job: SftJob) -> SftInputs:
    """Every turn of the assistant as an example, split by conversation.

    Raises:
        InputError: the data or the model is wrong, or nothing is left to learn.
    """
    policy, cfg = job.policy, job.sft
    render = ChatRenderer(load_chat(policy, job.chat_date, "policy"))
    end = render.turn_end()
    room = readable_context(policy, cfg.max_tokens, "sft.max_tokens")
    train, held_out = ExampleTable(SftExample), ExampleTable(SftExample)
    too_long = 0
    total = count_rows(job.data.path, job.data.limit)
    with ItemProgress("reading conversations", total, "conversations", after_s=SILENT_S) as progress:
        rows = progress.over(read_demonstrations(job.data.path, split=job.data.split, limit=job.data.limit))
        for part in chunks(rows, READ_AT_A_TIME):
            for row, turn in _examples(part, render, end):
                if len(turn) > room:
                    too_long += 1
                else:
                    (held_out if is_held_out(row, cfg.held_out_fraction, job.seed) else train).append(turn)
    if not train:
        raise InputError(
            f"{job.data.path} has no turn to learn (got {len(held_out)} held out, {too_long} too long for {room} "
            f"tokens). Raise sft.max_tokens, or lower sft.held_out_fraction."
        )
    check_attention(policy, max(train.longest, held_out.longest))
    return SftInputs(train, held_out, too_long, fingerprint(job.data.path))


def _examples(
    rows: Sequence[Demonstration], render: ChatRenderer, end: tuple[int, ...]
) -> Iterator[tuple[Demonstration, SftExample]]:
    """What stands before a turn is rendered as it is when the model is asked, so that it learns what it will see."""
    turns = [(row, i) for row in rows for i, turn in enumerate(row.messages) if turn.role == "assistant"]
    prompts = render.tokens_of([row.messages[:i] for row, i in turns], [row.place for row, _ in turns])
    responses = render.responses([row.messages[i].content for row, i in turns])
    for (row, _), prompt, response in zip(turns, prompts, responses, strict=True):
        yield row, SftExample(prompt, (*response, *end))


def is_held_out(row: Demonstration, fraction: float, seed: int) -> bool:
    """By the first request's text alone: no conversation about it is on both sides."""
    return drawn_by_text(next(turn.content for turn in row.messages if turn.role == "user"), fraction, seed)


def drawn_by_text(text: str, fraction: float, seed: int) -> bool:
    """Whether a text is among the drawn fraction: the same for the same text and seed, whatever else there is."""
    digest = hashlib.blake2b(f"{seed}/{text}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") / 2**64 < fraction


def held_out_loss(learner: SftGroup, examples: Sequence[SftExample]) -> dict[str, Any] | None:
    """Mean -log p of a token, in nats, over held-out turns; None without any.

    Raises:
        NotFiniteError: some are no numbers.
    """
    if not examples:
        return None
    tokens = sum(len(example.response) for example in examples)
    losses = learner.losses(examples)
    require_numbers(losses, "held-out losses")
    return {"loss": math.fsum(losses) / tokens, "tokens": tokens, "turns": len(examples)}


def _lines(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "steps", f"{summary['steps']} of {summary['total_steps']}, {summary['turns']} turns"
    yield "left out", f"{summary['too_long']} turns, too long" if summary["too_long"] else ""
    found = summary["sft"].get("held_out")
    yield "held-out loss", f"{fixed(found['loss'], 4)} nats a token, {found['turns']} turns" if found else ""
    yield "peak memory", f"{fixed(summary['peak_rss_gb'], 1)} GB"
    yield "model", str(Path("policy"))
