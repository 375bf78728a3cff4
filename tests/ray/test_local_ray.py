"""A local Ray is its user's alone, needs no home folder, and no cluster is joined that nothing names."""

from __future__ import annotations

import json
import re
import stat
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from rlaif_ray.runtime.session import _turns_away
from tests.ray.test_cluster import answers, free_port
from tests.ray.test_security import LOOPBACK, listening
from tests.runs import Program, start
from tests.tiny import cached_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]

# Opens Ray as a job does, says which it got, and holds it until a file is there.
HOLD = """
import json, sys, time
from pathlib import Path
import ray
from rlaif_ray.config.jobs import TrainJob
from rlaif_ray.runtime.session import open_session

address, until = sys.argv[1:]
cluster = {"address": address or None, "device": "cpu"}
named = {"policy": {"model": "m"}, "data": {"path": "p"}, "feedback": {"type": "judge", "judge": {"model": "m"}}}
job = TrainJob.model_validate({**named, "cluster": cluster})
with open_session(job.cluster, [job]):
    answer = ray.get(ray.remote(lambda: 17).remote())
    print(json.dumps([ray.get_runtime_context().gcs_address, answer]), flush=True)
    while not Path(until).exists():
        time.sleep(0.05)
    if Path(until).read_text() == "fail":
        raise RuntimeError("on purpose")
"""


@dataclass
class Stranger:
    """A cluster that runs on this machine and is noted where Ray looks for one; it asks for the token in its home."""

    address: str
    home: Path
    environment: dict[str, str]


@pytest.fixture(scope="module")
def stranger(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stranger]:
    port, folder = free_port(), tmp_path_factory.mktemp("stranger")
    home = folder / "home"
    (home / ".ray").mkdir(parents=True)
    (home / ".ray" / "auth_token").write_text("f" * 64)
    command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--disable-usage-stats"]
    command += [f"--port={port}", f"--dashboard-agent-listen-port={free_port()}", "--include-dashboard=false"]
    command += ["--num-cpus=1", f"--object-store-memory={2**27}"]
    with tempfile.TemporaryDirectory(prefix="ray-") as place:  # short: sockets lie in it
        environment = {"RAY_TMPDIR": place}
        head = start([*command], folder / "head.out", {**environment, "HOME": str(home)})
        try:
            noted = Path(place) / "ray" / "ray_current_cluster"
            head.wait_for(lambda: answers(port) and noted.exists(), timeout_s=90)
            yield Stranger(noted.read_text(), home, environment)
        finally:
            head.kill()


def hold(folder: Path, address: str, environment: Mapping[str, str]) -> Program:
    folder.mkdir()
    return start([sys.executable, "-c", HOLD, address, folder / "end"], folder / "hold.out", environment)


def held(program: Program) -> str:
    """The address of the Ray that it holds."""
    program.wait_for(lambda: "17]\n" in program.stdout, timeout_s=120)
    address, answer = json.loads(program.stdout.splitlines()[-1])
    assert answer == 17
    return str(address)


def ended(program: Program) -> None:
    (program.output.parent / "end").touch()
    assert program.wait(120).exit_code == 0, program.stderr
    assert program.left_over == []


def test_a_strangers_cluster_is_not_joined_and_a_local_ray_is_closed(stranger: Stranger, tmp_path: Path) -> None:
    """Without a home folder, where Ray would keep its token."""
    program = hold(tmp_path / "run", "", {**stranger.environment, "HOME": "/proc/nonexistent"})
    try:
        address = held(program)
        assert address != stranger.address
        (found,) = re.findall(
            r"^ray: started a local one for this run, on 127\.0\.0\.1; its files are in (\S+)$", program.stdout, re.M
        )
        folder = Path(found)
        assert stat.S_IMODE(folder.stat().st_mode) == 0o700
        assert folder.parent == Path(stranger.environment["RAY_TMPDIR"])
        sockets = [path for path in folder.rglob("*") if path.is_socket()]
        assert {path.name for path in sockets} >= {"raylet", "plasma_store"}
        assert {ip for _, ip in listening(program)} <= LOOPBACK
        token = (folder / "token").read_text()
        texts = [" ".join(process.cmdline()) for process in program.processes()]
        texts += [path.read_text(errors="replace") for path in folder.rglob("*.*") if path.is_file()]
        assert any("raylet" in text for text in texts) and not any(token in text for text in texts)
        for sent in ({}, {"authorization": f"Bearer {'f' * 64}"}):
            assert _turns_away(address, sent)
        assert not _turns_away(address, {"authorization": f"Bearer {token}"})
        (tmp_path / "fail").write_text("fail")
        (tmp_path / "fail").rename(tmp_path / "run" / "end")
        assert program.wait(120).exit_code == 1 and program.left_over == []
        assert program.stderr.endswith(f"RuntimeError: on purpose\nRay's logs: {folder}/ray/session_latest/logs\n")
        left = {path.name for path in folder.rglob("*")}
        assert "raylet.out" in left and not left & {"token", "sockets", "raylet", "plasma_store"}
    finally:
        program.kill()


@pytest.mark.parametrize("way", ["cluster.address", "RAY_ADDRESS", "auto"])
def test_the_one_that_is_named_is_joined_with_the_token_of_this_machine(
    stranger: Stranger, way: str, tmp_path: Path
) -> None:
    environment = {**stranger.environment, "HOME": str(stranger.home)}
    if way == "RAY_ADDRESS":
        environment["RAY_ADDRESS"] = stranger.address
    given = {"cluster.address": stranger.address, "auto": "auto"}.get(way, "")
    program = hold(tmp_path / "run", given, environment)
    try:
        assert held(program) == stranger.address
        named = "cluster.address=auto, from .*ray_current_cluster of user \\d+" if way == "auto" else way
        assert re.search(rf"^ray: joined the cluster at {stranger.address} \(named by {named}\)$", program.stdout, re.M)
        ended(program)
        assert answers(int(stranger.address.rpartition(":")[2]))
    finally:
        program.kill()


# More than fits into the object store; says where what was moved to disk lies.
SPILL = """
import os, sys
from pathlib import Path
import numpy, ray
from rlaif_ray.config.jobs import TrainJob
from rlaif_ray.runtime.session import open_session

named = {"policy": {"model": "m"}, "data": {"path": "p"}, "feedback": {"type": "judge", "judge": {"model": "m"}}}
cluster = {"address": None, "device": "cpu", "object_store_gb": 0.1}
job = TrainJob.model_validate({**named, "cluster": cluster})
with open_session(job.cluster, [job]):
    kept = [ray.put(numpy.full(20 * 2**20, k, dtype=numpy.uint8)) for k in range(12)]
    assert [int(ray.get(ref)[-1]) for ref in kept] == list(range(12))
    for folder in (os.environ["TMPDIR"], "/tmp"):
        found = [path for path in Path(folder).glob("rlaif-*/**/ray_spilled_objects_*/*") if path.is_file()]
        print(folder, len(found), flush=True)
"""


def test_what_ray_moves_to_disk_is_below_the_users_tmpdir(tmp_path: Path) -> None:
    """One that is too long for sockets, as on many clusters."""
    long = tmp_path / "scratch-of-the-job"
    long.mkdir()
    program = start([sys.executable, "-c", SPILL], tmp_path / "spill.out", {"TMPDIR": str(long), "RAY_TMPDIR": ""})
    try:
        assert program.wait(180).exit_code == 0, program.stdout + program.stderr
        assert re.search(rf"^ray: sockets and logs are below /tmp \(TMPDIR={long}: more than", program.stdout, re.M)
        (moved,) = re.findall(rf"^{long} (\d+)$", program.stdout, re.M)
        assert int(moved) > 0 and "\n/tmp 0\n" in program.stdout
        assert list(long.iterdir()) == [] and program.left_over == []
    finally:
        program.kill()


NOBODY = ("unshare", "--user", "--map-user=54321", "--map-group=54321")  # as containers run with any user id


@pytest.mark.skipif(subprocess.run([*NOBODY, "true"], check=False).returncode != 0, reason="no user namespaces here")
def test_a_job_of_a_user_without_name_and_home(tmp_path: Path) -> None:
    data, config, run_dir = tmp_path / "turns.jsonl", tmp_path / "sft.yaml", tmp_path / "run"
    turns = [
        {"messages": [{"role": "user", "content": f"What is {k}?"}, {"role": "assistant", "content": f"It is {k}."}]}
        for k in range(12)
    ]
    data.write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    config.write_text(f"policy: {{model: {cached_tiny_model(tied=True, context=4096)}}}\ndata: {{path: {data}}}\n")
    words = [*NOBODY, Path(sys.executable).with_name("rlaif"), "sft", config, f"run_dir={run_dir}"]
    settings = ("sft.batch_size=6", "sft.epochs=1", "sft.held_out_fraction=0")
    with tempfile.TemporaryDirectory(prefix="ray-") as place:
        program = start(
            [*words, *settings], run_dir.with_suffix(".out"), {"HOME": "/proc/nonexistent", "RAY_TMPDIR": place}
        )
        try:
            assert program.wait().exit_code == 0, program.stdout + program.stderr
            assert program.left_over == [] and list(Path(place).iterdir()) == []
        finally:
            program.kill()
    assert (run_dir / "policy" / "model.safetensors").is_file()
