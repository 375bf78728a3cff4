"""Random damage to checkpoints, configs, data files and judge replies: a clear error of ours, or the right recovery.

Never a resume from what was not written, never a score that is no probability, never a foreign exception.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rlaif_ray.config.jobs import SftJob
from rlaif_ray.config.load import load_job
from rlaif_ray.data.preferences import read_preferences
from rlaif_ray.data.prompts import read_conversations
from rlaif_ray.errors import CheckpointError, InputError
from rlaif_ray.feedback.replies import BadReplyError, read_probabilities, read_reply
from rlaif_ray.feedback.verdicts import parse_answer
from rlaif_ray.learner.engine import RankSpec
from rlaif_ray.learner.finetune import SftExample
from rlaif_ray.learner.state_files import SUFFIX, read_state
from rlaif_ray.pipelines import checkpoint
from rlaif_ray.pipelines.checkpoint import Checkpoints, RunState
from rlaif_ray.storage import Place, StoredFile, StoredFolder
from tests.damage import damaged, odd_json
from tests.learner_ranks import RankProcesses
from tests.tiny import cached_tiny_model

CHECKPOINTS, CONFIGS, DATA, REPLIES = 100, 100, 90, 150  # examples: 440 in all
QUIET = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
ROOT = Path(__file__).parents[2]

# ---- Checkpoints -----------------------------------------------------------------------------------------------------

STEPS = (2, 4, 6)
TURNS = [SftExample(tuple(range(5 + i, 12 + i)), tuple(range(100 + i, 105 + i))) for i in range(4)]
JOB = SftJob.model_validate(
    {"policy": {"model": str(cached_tiny_model(tied=True))}, "data": {"path": "x"}, "checkpoint": {"keep": 9}}
)


def train_and_save(spec: RankSpec, place: Place) -> dict[str, StoredFile]:
    """Two more steps of the rank in this process, and its state at `place`."""
    from rlaif_ray.learner.finetune import SftRank

    rank = RANK.setdefault("rank", None) or SftRank(JOB, spec, "fp32", total_steps=6)
    RANK["rank"] = rank
    for _ in range(2):
        rank.train(TURNS, ((0, 1), (2, 3)))
    rank.checkpoint.copy()
    files: dict[str, StoredFile] = rank.checkpoint.write(place)
    return files


RANK: dict[str, Any] = {}


class Learner:
    """A real one, in a process of its own."""

    def __init__(self, ranks: RankProcesses) -> None:
        self.ranks = ranks

    def save_checkpoint(self, place: Place) -> Callable[[], dict[str, StoredFile]]:
        (files,) = self.ranks.run(train_and_save, place)
        return lambda: files


@pytest.fixture(scope="module")
def original(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Three checkpoints of a real learner."""
    root = tmp_path_factory.mktemp("original")
    ranks = RankProcesses(1)
    try:
        with Checkpoints(JOB, Place(str(root))) as checkpoints:
            for step in STEPS:
                checkpoints.save(Learner(ranks), RunState(step, prompts={"data": f"at {step}"}))
    finally:
        ranks.close()
    yield root


def contents(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def tensors_of(folder: StoredFolder) -> dict[str, Any]:
    """Every tensor of a checkpoint and what it says."""
    found = {}
    for name in sorted(folder.files):
        if name.endswith(SUFFIX):
            flat(read_state(folder, name, {}), name, found)
    return found


def flat(value: Any, path: str, into: dict[str, Any]) -> None:
    if isinstance(value, dict | list | tuple):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            flat(inner, f"{path}/{key}", into)
    else:
        into[path] = value


@st.composite
def wreck(draw: st.DrawFn, root: Path) -> list[str]:
    """One to three accidents to the checkpoints below `root`; what they were."""
    did = []
    for _ in range(draw(st.integers(1, 3))):
        folders = sorted(p for p in root.iterdir() if p.is_dir())
        if not folders:
            break
        folder = draw(st.sampled_from(folders))
        files = sorted(p for p in folder.rglob("*") if p.is_file())
        kind = draw(st.sampled_from(["file", "file", "swap", "delete", "rename", "copy", "move", "remove"]))
        did.append(f"{kind} {folder.name}")
        number = draw(st.integers(0, 9))
        if kind == "rename" and not (root / f"step-{number}").exists():
            folder.rename(root / f"step-{number}")
        elif kind == "copy" and not (root / f"step-{number}").exists():
            shutil.copytree(folder, root / f"step-{number}")
        elif kind == "remove":
            shutil.rmtree(folder)
        elif files:
            file = draw(st.sampled_from(files))
            did[-1] += f"/{file.name}"
            if kind == "file":
                file.write_bytes(draw(damaged(file.read_bytes())))
            elif kind == "delete":
                file.unlink()
            elif kind == "move":
                file.rename(file.with_name(f"{file.name}.old"))
            elif kind == "swap":
                other = draw(st.sampled_from(folders)) / file.relative_to(folder)
                if other.is_file():
                    mine, theirs = file.read_bytes(), other.read_bytes()
                    file.write_bytes(theirs)
                    other.write_bytes(mine)
    return did


@pytest.mark.slow
@pytest.mark.long
def test_checkpoints(original: Path, tmp_path: Path) -> None:
    """The newest that is exactly as it was written, of the step that its name says; where none is, an error."""
    written = {step: contents(original / f"step-{step}") for step in STEPS}
    states = {step: tensors_of(opened(original, step)) for step in STEPS}
    assert len({str(state) for state in states.values()}) == len(STEPS)  # training moved them
    seen = {"whole": 0, "older": 0, "error": 0, "none": 0}

    @settings(max_examples=CHECKPOINTS, deadline=None, suppress_health_check=QUIET, derandomize=True)
    @given(data=st.data())
    def check(data: st.DataObject) -> None:
        root = tmp_path / "run"
        shutil.rmtree(root, ignore_errors=True)
        shutil.copytree(original, root)
        data.draw(wreck(root))
        left = {int(path.name.removeprefix("step-")): contents(path) for path in root.iterdir()}
        whole = [step for step, files in left.items() if files == written.get(step)]
        notes: list[str] = []
        checkpoints = Checkpoints(JOB, Place(str(root)))
        checkpoints.tell(notes.append)
        if left and not whole:
            with pytest.raises(CheckpointError, match=r"none can be resumed: .*resume=never"):
                checkpoints.to_resume()
            seen["error"] += 1
            return
        found = checkpoints.to_resume()
        if not left:
            assert found is None
            seen["none"] += 1
            return
        assert found is not None and found.step == max(whole)
        assert len(notes) == len([step for step in left if step > max(whole)])  # each that was passed over is told
        assert checkpoint.read_state(found, JOB, 6) == RunState(max(whole), prompts={"data": f"at {max(whole)}"})
        state, expected = tensors_of(found.folder), states[max(whole)]
        assert state.keys() == expected.keys()
        for name, value in expected.items():
            same = torch.equal(state[name], value) if isinstance(value, torch.Tensor) else state[name] == value
            assert same, name
        seen["older" if notes else "whole"] += 1

    check()
    assert seen["older"] >= 10 and seen["error"] >= 1 and sum(seen.values()) >= CHECKPOINTS, seen


def opened(root: Path, step: int) -> StoredFolder:
    found = Checkpoints(JOB, Place(str(root)))
    saved = found.newest() if step == max(STEPS) else checkpoint._open(Place(str(root)), step)
    assert saved is not None and saved.step == step
    return saved.folder


# ---- Configs ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["train", "label"])
def test_configs(name: str, tmp_path: Path) -> None:
    """A config, or an InputError; nothing else."""
    good = (ROOT / "configs" / "demo" / f"{name}.yaml").read_bytes()

    @settings(max_examples=CONFIGS // 2, deadline=None, suppress_health_check=QUIET, derandomize=True)
    @given(data=damaged(good))
    def check(data: bytes) -> None:
        path = tmp_path / "config.yaml"
        path.write_bytes(data)
        try:
            loaded = load_job(name, [path])
        except InputError as error:
            assert str(error)
            return
        assert type(loaded.config) is type(load_job(name, [ROOT / "configs" / "demo" / f"{name}.yaml"]).config)

    check()


# ---- Data ------------------------------------------------------------------------------------------------------------

PROMPTS = b"".join(
    json.dumps(row).encode() + b"\n"
    for row in [
        {"id": "a", "prompt": "What is a tide?"},
        {"id": "b", "prompt": [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Why é?"}]},
        {"id": "c", "prompt": "Name three rivers."},
    ]
)
PREFERENCES = b"".join(
    json.dumps({"prompt": f"Question {k}?", "response_a": f"Yes {k}.", "response_b": "No.", "p_a": p}).encode() + b"\n"
    for k, p in enumerate((0.0, 0.25, 0.5, 1.0))
)


def test_prompts(tmp_path: Path) -> None:
    """Conversations of a shape that can be trained on, or an InputError."""

    @settings(max_examples=DATA // 3, deadline=None, suppress_health_check=QUIET, derandomize=True)
    @given(data=damaged(PROMPTS))
    def check(data: bytes) -> None:
        path = tmp_path / "prompts.jsonl"
        path.write_bytes(data)
        try:
            found = read_conversations(str(path), split="train", column="prompt", limit=None, system=None)
        except InputError as error:
            assert "prompts.jsonl" in str(error)
            return
        for conversation in found:
            assert conversation[-1].role == "user"
            assert all(isinstance(turn.content, str) for turn in conversation)

    check()


def test_preferences(tmp_path: Path) -> None:
    """Labels are probabilities, or there is an InputError that names the file."""

    @settings(max_examples=2 * DATA // 3, deadline=None, suppress_health_check=QUIET, derandomize=True)
    @given(data=damaged(PREFERENCES))
    def check(data: bytes) -> None:
        path = tmp_path / "labels.jsonl"
        path.write_bytes(data)
        try:
            found = list(read_preferences(str(path)))
        except InputError as error:
            assert "labels.jsonl" in str(error)
            return
        for record in found:
            assert record.p_a is None or 0.0 <= record.p_a <= 1.0
            assert isinstance(record.response_a, str) and isinstance(record.response_b, str)

    check()


# ---- Judge replies ---------------------------------------------------------------------------------------------------

ANSWERS = ("1", "2")
REPLY = {
    "id": "x",
    "choices": [
        {
            "index": 0,
            "message": {"role": "assistant", "content": "1"},
            "finish_reason": "stop",
            "logprobs": {
                "content": [
                    {
                        "token": "1",
                        "logprob": -0.22,
                        "top_logprobs": [{"token": "1", "logprob": -0.22}, {"token": "2", "logprob": -1.61}],
                    }
                ]
            },
        }
    ],
    "usage": {"prompt_tokens": 9, "completion_tokens": 1},
}


@settings(max_examples=REPLIES, deadline=None, derandomize=True)
@given(data=odd_json(REPLY))
def test_replies(data: bytes) -> None:
    """Probabilities and counts that can be some, or an error that becomes a failure with its reason."""
    try:
        reply = read_reply(data)
        reading = read_probabilities(reply.positions or (), ANSWERS)
    except BadReplyError as error:
        assert str(error)
        return
    assert all(isinstance(text, str) for text in reply.texts)
    assert parse_answer(reply.texts[0], ANSWERS) in (None, *ANSWERS)
    assert all(math.isfinite(p) and 0.0 <= p <= 1.01 for p in reading.probabilities)
    assert math.fsum(reading.probabilities) <= 1.02 and 0.0 <= reading.unlisted <= 1.0
    assert type(reply.tokens_in) is int and reply.tokens_in >= 0
    assert type(reply.tokens_out) is int and reply.tokens_out >= 0
