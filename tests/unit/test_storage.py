"""Where checkpoints are kept: a file system, a full one, and a real S3 API (moto's server)."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from rlaif_ray.errors import CheckpointError, CheckpointTakenError, InputError
from rlaif_ray.pipelines.checkpoint import Checkpoints, RunState, open_checkpoints, read_state
from rlaif_ray.storage import MANIFEST, Place, StoredFolder, _digest, draft, open_folder, publish, told
from tests.disks import small_tmpfs
from tests.s3 import KEY, SECRET, S3Server, s3_server
from tests.unit.pipelines.test_checkpoint import FakeLearner, job, state_of


def stored(final: Place, **files: bytes) -> None:
    place = draft(final, "0123abcd")
    publish(StoredFolder(place, {name: (place / name).write(data) for name, data in files.items()}), final, step=1)


# ---- Folders ---------------------------------------------------------------------------------------------------------


class TestFolders:
    def test_a_folder_that_is_not_published_is_not_there(self, tmp_path: Path) -> None:
        final = Place(str(tmp_path / "step-1"))
        (draft(final, "0123abcd") / "a").write(b"1")
        assert not (tmp_path / "step-1").exists()
        with pytest.raises(CheckpointError, match=r"has no manifest\.json"):
            open_folder(final)

    def test_the_manifest_says_what_others_say(self, tmp_path: Path) -> None:
        """Values of the reference implementation (xxhsum -H2)."""
        stored(Place(str(tmp_path / "step-1")), a=b"a", none=b"")
        content = json.loads((tmp_path / "step-1" / MANIFEST).read_text())
        assert content["files"] == {
            "a": {"size": 1, "xxh128": "a96faf705af16834e6c632b61e964e1f"},
            "none": {"size": 0, "xxh128": "99aa06d3014798d86001c324468d497f"},
        }

    def test_a_manifest_of_another_format(self, tmp_path: Path) -> None:
        final = Place(str(tmp_path / "step-1"))
        stored(final, a=b"1")
        path = tmp_path / "step-1" / MANIFEST
        path.write_text(json.dumps({**json.loads(path.read_text()), "format": 1}))
        with pytest.raises(CheckpointError, match=r"is of format 1, and this rlaif_ray reads 3: go on with"):
            open_folder(final)

    @pytest.mark.parametrize("name", ["../a", "/etc/passwd", "x/../../a", "", "..", "a\0b"])
    def test_a_manifest_that_names_files_elsewhere(self, tmp_path: Path, name: str) -> None:
        (tmp_path / "a").write_bytes(b"1")
        final = Place(str(tmp_path / "step-1"))
        place = draft(final, "0123abcd")
        file = (place / "a").write(b"1")
        publish(StoredFolder(place, {"a": file}), final, step=1)
        path = tmp_path / "step-1" / MANIFEST
        content = json.loads(path.read_text())
        content["files"] = {name: content["files"]["a"]}
        del content["xxh128"]
        path.write_text(json.dumps({**content, "xxh128": _digest(content)}))
        with pytest.raises(CheckpointError, match="names files outside of its folder"):
            open_folder(final)

    def test_a_manifest_that_lacks_a_file(self, tmp_path: Path) -> None:
        """What is left is as it was written, and yet it is no whole checkpoint."""
        stored(Place(str(tmp_path / "step-1")), a=b"1", b=b"2")
        path = tmp_path / "step-1" / MANIFEST
        content = json.loads(path.read_text())
        del content["files"]["b"]
        path.write_text(json.dumps(content))
        with pytest.raises(CheckpointError, match=r"manifest.json is damaged"):
            open_folder(Place(str(tmp_path / "step-1")))

    def test_a_very_long_name_is_an_error_of_ours(self, tmp_path: Path) -> None:
        with pytest.raises(CheckpointError, match="could not be written"):
            (Place(str(tmp_path)) / ("x" * 5000)).write(b"1")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of 256 kB."""
    with small_tmpfs(tmp_path / "disk", "256k") as folder:
        yield folder


def test_a_full_disk(small_disk: Path) -> None:
    """The run ends with what to do; the checkpoint before is whole, and what was half written doesn't fill the disk."""
    learner = FakeLearner()
    learner.weights = os.urandom(100_000)
    with open_checkpoints(job(), small_disk) as checkpoints:
        checkpoints.save(learner, state_of(1))
    learner.weights = os.urandom(200_000)
    with (
        pytest.raises(CheckpointError, match=r"step-2 could not be written: .*weights.*No space left.* intact\. Free"),
        open_checkpoints(job(), small_disk) as checkpoints,
    ):
        checkpoints.save(learner, state_of(2))
    assert [path.name for path in (small_disk / "checkpoints").iterdir()] == ["step-1"]
    learner.weights = os.urandom(100_000)  # there is room again
    with open_checkpoints(job(), small_disk) as checkpoints:
        found = checkpoints.to_resume()
        assert found is not None and found.step == 1
        checkpoints.save(learner, state_of(2))


# ---- S3 --------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """Address of a server that speaks S3, with a bucket."""
    pytest.importorskip("s3fs")
    with s3_server() as one, pytest.MonkeyPatch.context() as patch:
        set_environment(patch, one)
        import s3fs

        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
        yield one.address
        s3fs.S3FileSystem.clear_instance_cache()


def set_environment(patch: pytest.MonkeyPatch, server: S3Server) -> None:
    for name, value in server.environment.items():
        patch.setenv(name, value)


def at(prefix: str) -> Checkpoints:
    return open_checkpoints(job(checkpoint={"path": f"s3://bucket/{prefix}"}), Path("/nowhere"))


def keys(prefix: str) -> list[str]:
    import s3fs

    files = s3fs.S3FileSystem(skip_instance_cache=True, use_listings_cache=False).find(f"bucket/{prefix}")
    return sorted(path.removeprefix(f"bucket/{prefix}/") for path in files)


class TestS3:
    def test_what_is_saved_comes_back(self, server: str) -> None:
        with at("one") as checkpoints:
            assert checkpoints.to_resume() is None
            for step in (1, 2, 3):
                checkpoints.save(FakeLearner(), state_of(step))
        found = at("one").to_resume()
        assert found is not None and found.step == 3
        assert found.folder.read("policy/weights") == b"w" * 1000
        assert replace(read_state(found, job(), 100), changes=[]) == state_of(3)
        left = keys("one")
        assert {key.split("/")[0] for key in left} == {"owner.json", "step-2", "step-3"}  # keep: 2
        assert len(left) == 7

    def test_an_upload_that_was_cut_off_is_no_checkpoint(self, server: str) -> None:
        with at("two") as checkpoints:
            checkpoints.save(FakeLearner(), state_of(1))
        place = draft(Place("s3://bucket/two/step-2"), "0123abcd")
        (place / "policy/weights").write(b"half")
        Place("s3://bucket/two/step-2/notes.txt").write(b"mine")
        found = at("two").to_resume()
        assert found is not None and found.step == 1
        with at("two") as checkpoints:
            assert checkpoints.to_resume() is not None
            checkpoints.save(FakeLearner(), state_of(2))
        left = [key.removeprefix("step-2/") for key in keys("two") if key.startswith("step-2/")]
        assert len(left) == 4 and {"manifest.json", "notes.txt"} < set(left)  # nothing of the half one

    def test_another_runs_are_refused_and_a_later_claim_ends_an_earlier_one(self, server: str) -> None:
        """No lock reaches as far as an object store."""
        other = job(checkpoint={"path": "s3://bucket/claims"})
        may = threading.Event()
        with at("claims") as earlier:
            earlier.save(FakeLearner(may=may), state_of(2))
            with pytest.raises(
                InputError, match=r"s3://bucket/claims has the checkpoints of another run, that of /nowhere"
            ):
                open_checkpoints(other, Path("/elsewhere"))
            with at("claims") as later:
                may.set()
                with pytest.raises(
                    CheckpointTakenError, match=r"claims is no longer this run's: process .* took it at"
                ):
                    earlier.wait()
                later.save(FakeLearner(), state_of(1))
                later.wait()
        assert {key.split("/")[0] for key in keys("claims") if key.endswith("manifest.json")} == {"step-1"}

    def test_a_first_upload_that_was_cut_off_starts_over(self, server: str) -> None:
        (draft(Place("s3://bucket/none/step-2"), "0123abcd") / "policy/weights").write(b"half")
        assert at("none").to_resume() is None

    def test_a_damaged_object_is_passed_over(self, server: str) -> None:
        with at("three") as checkpoints:
            for step in (1, 2):
                checkpoints.save(FakeLearner(), state_of(step))
        (weights,) = [key for key in keys("three") if key.startswith("step-2/") and key.endswith("weights")]
        Place(f"s3://bucket/three/{weights}").write(b"v" * 1000)
        told: list[str] = []
        checkpoints = at("three")
        checkpoints.tell(told.append)
        found = checkpoints.to_resume()
        assert found is not None and found.step == 1
        assert len(told) == 1 and "weights is damaged: its content is not what was written" in told[0]

    def test_a_file_of_several_parts(self, server: str) -> None:
        """A learner's state, larger than one part of an upload."""
        import torch

        from rlaif_ray.learner.state_files import copy_to_host, read_state, write_state

        state = {"weights": torch.arange(15 * 2**20, dtype=torch.int32)}
        file = write_state(Place("s3://bucket/parts/a"), copy_to_host(state, {}))
        found = read_state(StoredFolder(Place("s3://bucket/parts"), {"a": file}), "a", {})
        assert torch.equal(found["weights"], state["weights"])

    def test_a_bucket_that_is_not_there_is_told_before_anything_starts(self, server: str) -> None:
        checkpoint = {"path": "s3://nobucket/x"}
        with pytest.raises(InputError, match=r"checkpoint.path must be a place .*s3://nobucket/x") as error:
            open_checkpoints(job(checkpoint=checkpoint), Path("/nowhere"))
        assert KEY not in str(error.value) and SECRET not in str(error.value)


def test_s3_that_dies_while_it_is_written_to(server: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Clear, without secrets, and the checkpoint before is there when the server is back."""
    import s3fs

    monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
    monkeypatch.setattr(s3fs.S3FileSystem, "retries", 1)
    s3fs.S3FileSystem.clear_instance_cache()
    with s3_server() as other:
        set_environment(monkeypatch, other)
        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
        with at("dying") as checkpoints:
            checkpoints.save(FakeLearner(), RunState(1))
            checkpoints.wait()
            other.stop()
            checkpoints.save(FakeLearner(), RunState(2))
            with pytest.raises(
                CheckpointError, match=r"step-2 could not be written: .*The one before is intact"
            ) as error:
                checkpoints.wait()
        assert KEY not in str(error.value) and SECRET not in str(error.value)
        assert other.address.removeprefix("http://") in str(error.value)
        other.start()
        found = at("dying").to_resume()
        assert found is not None and found.step == 1
    s3fs.S3FileSystem.clear_instance_cache()


def test_errors_are_told_without_secrets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", SECRET[:10])  # of one that is a part of another nothing is left
    error = OSError(f"https://me:pa/ss@host/x failed with {SECRET} of {SECRET[:10]}\nand more")
    assert told(error) == "OSError: https://***@host/x failed with *** of ***"
