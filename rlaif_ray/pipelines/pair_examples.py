"""Preference records as token examples to train on, and how well a model's preferences fit their labels."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rlaif_ray.attention import switch_length
from rlaif_ray.chat.renderer import ChatRenderer
from rlaif_ray.chat.thoughts import answer_of
from rlaif_ray.config.jobs import RewardModelJob
from rlaif_ray.data.columns import ExampleTable
from rlaif_ray.data.preferences import PreferenceRecord, human_label, read_preferences
from rlaif_ray.data.rows import count_rows
from rlaif_ray.errors import InputError
from rlaif_ray.evaluation.calibration import beats, brier, expected_calibration_error, pairwise_accuracy, preference
from rlaif_ray.learner.supervised import PairExample
from rlaif_ray.models import load_config
from rlaif_ray.pipelines.contexts import check_attention, load_chat, readable_context
from rlaif_ray.pipelines.finite import require_numbers
from rlaif_ray.pipelines.run_folder import fingerprint
from rlaif_ray.pipelines.streaming import chunks
from rlaif_ray.pipelines.supervised import READ_AT_A_TIME, drawn_by_text
from rlaif_ray.tracking.display import share
from rlaif_ray.tracking.progress import SILENT_S, ItemProgress

if TYPE_CHECKING:
    from collections.abc import Callable

    from rlaif_ray.config.jobs import DpoJob
    from rlaif_ray.config.sections import PolicyConfig


@dataclass(frozen=True, slots=True)
class PairInputs:
    """Examples, read and checked before anything starts."""

    train: ExampleTable[PairExample]
    held_out: ExampleTable[PairExample]
    left_out: dict[str, int]  # records by why they can't be trained on
    data: str  # fingerprint of the records


def read_pairs(
    job: RewardModelJob | DpoJob,
    ending: Callable[[ChatRenderer], tuple[int, ...]],
    human_path: str | None = None,
) -> tuple[PairInputs, ExampleTable[PairExample]]:
    """Records as token examples, split by prompt; and those of `human_path` with people's labels.

    `ending` says what ends a response.

    Raises:
        InputError: the data or the model is wrong, or nothing is left to train on.
    """
    policy, cfg = job.policy, job.reward if isinstance(job, RewardModelJob) else job.dpo
    render = ChatRenderer(load_chat(policy, job.chat_date, "policy"))
    cut = isinstance(job, RewardModelJob) and job.reward.thoughts == "cut"
    room = readable_context(policy, cfg.max_tokens, f"{job.section}.max_tokens")
    left_out: dict[str, int] = {}
    train, held_out, human = _table(), _table(), _table()
    end = ending(render)
    write = _ExampleWriter(render, room, cfg.labels, end, left_out, name=job.data.path, cut=cut)
    for record, example in _written(write, job.data.path, job.data.split, job.data.limit):
        (held_out if is_held_out(record, cfg.held_out_fraction, job.seed) else train).append(example)
    if len(train) < 1:
        raise InputError(
            f"{job.data.path} has no pair to train on (got {len(held_out)} held out; left out: {left_out}). "
            f"Label the pairs first (rlaif label), or lower {job.section}.held_out_fraction."
        )
    if human_path is not None:
        by_people = _ExampleWriter(render, room, cfg.labels, end, {}, name=human_path, cut=cut, human=True)
        for _, example in _written(by_people, human_path):
            human.append(example)
    used = (train, held_out, human)
    check_attention(policy, max(part.longest for part in used))
    _check_switch(policy, used, f"{job.section}.max_tokens")
    return PairInputs(train, held_out, left_out, fingerprint(job.data.path)), human


def _table() -> ExampleTable[PairExample]:
    return ExampleTable(PairExample, numbers=("p_a",))


def _written(
    write: _ExampleWriter, path: str, split: str = "train", limit: int | None = None
) -> Iterator[tuple[PreferenceRecord, PairExample]]:
    """The records that can be trained on, with their examples."""
    with ItemProgress("reading pairs", count_rows(path, limit), "pairs", after_s=SILENT_S) as progress:
        for part in chunks(progress.over(read_preferences(path, split=split, limit=limit)), READ_AT_A_TIME):
            for record, example in zip(part, write(part), strict=True):
                if example is not None:
                    yield record, example


def _check_switch(policy: PolicyConfig, parts: Sequence[Sequence[PairExample]], key: str) -> None:
    """Raises InputError when the two responses of a pair, which are computed together, need other RoPE factors."""
    code: dict[str, Any] = {"revision": policy.revision, "trust_remote_code": policy.trust_remote_code}
    switch = switch_length(load_config(policy.model, **code))
    if switch is None:
        return
    mixed = sum(min(e.lengths) <= switch < max(e.lengths) for examples in parts for e in examples)
    if mixed:
        raise InputError(
            f"{mixed} of {sum(map(len, parts))} pairs have one response of at most {switch} tokens (with the prompt) "
            f"and one of more. {policy.model} reads texts beyond {switch} tokens with other RoPE factors, which "
            f"transformers chooses for both of a pair at once: the shorter would get wrong numbers. Set {key}={switch} "
            f"to leave longer pairs out, or use another model."
        )


class _ExampleWriter:
    """Records to token examples; counts by reason what can't be one."""

    def __init__(
        self,
        render: ChatRenderer,
        room: int,
        labels: str,
        end: tuple[int, ...],
        left_out: dict[str, int],
        *,
        name: str,
        cut: bool,
        human: bool = False,
    ):
        """`name` is of the data, for messages; `cut`: responses are read without the thoughts that they begin with."""
        self._render, self._room, self._labels, self._cut = render, room, labels, cut
        self._name = name
        self._end, self._left_out, self._human = end, left_out, human

    def __call__(self, records: Sequence[PreferenceRecord]) -> list[PairExample | None]:
        """Of each record its example; None where it can't be one."""
        labels = [self._label(record) for record in records]
        places = [f"{self._name}, record {record.id}" for record in records]
        labelled = [k for k, label in enumerate(labels) if label is not None]
        prompts = self._render.tokens_of([records[k].prompt for k in labelled], [places[k] for k in labelled])
        texts = {k: self._answers(records[k]) for k in labelled}
        pairs = {k: (a, b) for k, (a, b) in texts.items() if a is not None and b is not None}
        responses = iter(self._render.responses([text for pair in pairs.values() for text in pair]))
        found: list[PairExample | None] = [None] * len(records)
        for k, prompt in zip(labelled, prompts, strict=True):
            if k not in pairs:
                self._count("open_thought")
                continue
            a, b = ((*next(responses), *self._end) for _ in range(2))
            if len(prompt) + max(len(a), len(b)) > self._room:
                self._count("too_long")
            else:
                found[k] = PairExample(prompt, a, b, labels[k] or 0.0)
        return found

    def _label(self, record: PreferenceRecord) -> float | None:
        label = human_label(record) if self._human else record.p_a
        if label is None:
            self._count("failed" if record.failed else "unlabelled")
        elif self._labels == "hard":
            label = 0.5 if label == 0.5 else float(label > 0.5)
        return label

    def _answers(self, record: PreferenceRecord) -> tuple[str | None, str | None]:
        """Both responses as they are read; None for one that is an open thought."""
        both = record.response_a, record.response_b
        return (answer_of(both[0]), answer_of(both[1])) if self._cut else both

    def _count(self, reason: str) -> None:
        self._left_out[reason] = self._left_out.get(reason, 0) + 1


def is_held_out(record: PreferenceRecord, fraction: float, seed: int) -> bool:
    """By the prompt's text alone, so that no prompt is on both sides, whatever else the data holds."""
    text = "\x00".join(f"{m.role}\x01{m.content}" for m in record.prompt)
    return drawn_by_text(text, fraction, seed)


def measured(rewards: Sequence[tuple[float, float]], examples: Sequence[PairExample]) -> dict[str, Any] | None:
    """Accuracy, Brier score and calibration of the preference sigmoid(r_a - r_b) by rewards of a and of b of each
    example; None without examples.

    Raises:
        NotFiniteError: some are no numbers.
    """
    if not examples:
        return None
    require_numbers((reward for pair in rewards for reward in pair), "rewards of pairs that are measured")
    p = [preference(a, b) for a, b in rewards]
    labels = [example.p_a for example in examples]
    accuracy = pairwise_accuracy(p, labels)
    calibration = expected_calibration_error(p, labels)
    longer = [beats(len(e.response_a), len(e.response_b)) for e in examples]
    return {
        "n": len(examples),
        "accuracy": accuracy.value,
        "compared": accuracy.n,
        "longer_accuracy": pairwise_accuracy(longer, labels).value,  # of always choosing the longer, in tokens
        "brier": brier(p, labels),
        "ece": calibration.value,
        "curve": calibration.rows(),
    }


def measured_lines(found: dict[str, Any]) -> str:
    """What `measured` found, in a line."""
    against = f"{found['compared']} (the longer: {share(found['longer_accuracy'])})"
    return f"accuracy {share(found['accuracy'])} of {against}, Brier {share(found['brier'])}, ECE {share(found['ece'])}"
