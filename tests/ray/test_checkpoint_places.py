"""Checkpoints of the real program in other places than a healthy disk: S3's API, and a disk that fills up."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

from rlaif_ray.storage import MANIFEST, Place
from tests.disks import small_tmpfs
from tests.runs import Program, rows, start
from tests.s3 import SECRET, s3_server
from tests.tiny import cached_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("data") / "turns.jsonl"
    turns = [
        {"messages": [{"role": "user", "content": f"What is {k}?"}, {"role": "assistant", "content": f"It is {k}."}]}
        for k in range(24)
    ]
    path.write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    return path


def sft(run_dir: Path, data: Path, *settings: str, environment: Mapping[str, str] | None = None) -> Program:
    """`rlaif sft` of four steps on two ranks, to its end; nothing of it lives on."""
    config = run_dir.with_suffix(".yaml")
    config.write_text("cluster: {address: local}\n")
    model = cached_tiny_model(tied=True, context=4096)
    common = (f"policy.model={model}", "policy.precision=fp32", f"data.path={data}", f"run_dir={run_dir}")
    short = ("sft.batch_size=6", "sft.epochs=1", "sft.held_out_fraction=0", "learner.lr=1e-3", "checkpoint.every=2")
    command = [Path(sys.executable).with_name("rlaif"), "sft", config, *common, *short, *settings]
    program = start(command, run_dir.with_suffix(".out"), environment)
    try:
        return program.wait()
    finally:
        program.kill()


def weights(run_dir: Path) -> str:
    return hashlib.sha256((run_dir / "policy" / "model.safetensors").read_bytes()).hexdigest()


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, str]]:
    """The environment of a server that speaks S3, with a bucket."""
    s3fs = pytest.importorskip("s3fs")
    with s3_server() as server:
        for name, value in server.environment.items():
            monkeypatch.setenv(name, value)
        s3fs.S3FileSystem.clear_instance_cache()
        s3fs.S3FileSystem(skip_instance_cache=True).mkdir("bucket")
        yield server.environment
        s3fs.S3FileSystem.clear_instance_cache()


def test_s3_and_another_machine(tmp_path: Path, data: Path, s3: dict[str, str]) -> None:
    """What another machine finds of a run is its address alone: it goes on there, to the same end, as the same run."""
    where = ("checkpoint.path=s3://bucket/run", "learner.ranks=2", "learner.zero_stage=2", "tracking.wandb=offline")
    first = sft(tmp_path / "run", data, *where, environment=s3)
    assert first.exit_code == 0, first.stderr
    assert not (tmp_path / "run" / "checkpoints").exists()
    assert Place("s3://bucket/run").names() == ["owner.json", "step-2", "step-4"]
    (tmp_path / "run").rename(tmp_path / "first")  # the other machine has none
    other = sft(tmp_path / "other", data, *where, environment=s3)
    assert other.exit_code == 2 and "has the checkpoints of another run, that of " in other.stderr
    Place(f"s3://bucket/run/step-4/{MANIFEST}").remove()  # as if it had been ended before the last was whole
    second = sft(tmp_path / "run", data, *where, environment=s3)
    assert second.exit_code == 0, second.stderr
    assert "resumed from s3://bucket/run/step-2" in second.stdout
    assert [row["step"] for row in rows(tmp_path / "run" / "metrics.jsonl")] == [3, 4]
    assert weights(tmp_path / "first") == weights(tmp_path / "run")
    ids = [(tmp_path / name / "wandb_run_id.txt").read_text() for name in ("first", "run")]
    assert ids[0] == ids[1]
    for path in [*tmp_path.glob("*.out"), *tmp_path.glob("*.err"), *tmp_path.glob("*/*.*")]:
        assert not path.is_file() or SECRET.encode() not in path.read_bytes(), path


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk with room for one checkpoint of the tiny model, and not for two."""
    with small_tmpfs(tmp_path / "disk", "1800k") as folder:
        yield folder


def test_a_full_disk_ends_the_run_with_what_to_do(tmp_path: Path, data: Path, small_disk: Path) -> None:
    full = sft(tmp_path / "run", data, f"checkpoint.path={small_disk}", "tracking.wandb=disabled")
    assert full.exit_code == 1, full.stdout + full.stderr
    assert full.left_over == []
    assert "CheckpointError" in full.stderr and "step-4 could not be written" in full.stderr
    assert "No space left" in full.stderr and "The one before is intact. Free space" in full.stderr
    assert f"resume: rlaif sft {tmp_path / 'run.yaml'}" in full.stderr and "Traceback" not in full.stderr
    assert sorted(path.name for path in small_disk.iterdir()) == ["owner.json", "step-2"]
