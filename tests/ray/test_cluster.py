"""Jobs on a Ray cluster that was there before them: submitted to it, joining it, and asking it for too much."""

from __future__ import annotations

import json
import re
import socket
import sys
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.pace import scaled
from tests.runs import ROOT, Program, finish_train, rows, start, tiny_config

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# Ray's own default as soon as a machine has a token.
TOKEN = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": uuid.uuid4().hex * 2}
SHORT = ("steps=2", "evaluation.held_out.path=null", "checkpoint.every=0", "algorithm.kl.target=null")


@dataclass
class RayCluster:
    """A head node of our own."""

    head: Program  # `ray start --block`: its processes are the cluster
    address: str
    dashboard: str


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def answers(port: int) -> bool:
    with socket.socket() as client:
        client.settimeout(1)
        return client.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cluster")


@pytest.fixture(scope="module")
def config(folder: Path) -> Path:
    return tiny_config(folder)


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[RayCluster]:
    """Ends by killing what it started: `ray stop` would end every Ray of this machine."""
    port, dashboard = free_port(), free_port()
    with tempfile.TemporaryDirectory(prefix="ray-") as private:  # short: sockets lie in it
        command = [Path(sys.executable).with_name("ray"), "start", "--head", "--block", "--disable-usage-stats"]
        # The agent's port is a fixed one unless it is named, and another Ray of this machine may hold it.
        command += [f"--port={port}", f"--dashboard-port={dashboard}", f"--dashboard-agent-listen-port={free_port()}"]
        command += ["--include-dashboard=true", "--num-cpus=2", f"--object-store-memory={2**28}"]
        head = start([*command, f"--temp-dir={private}"], folder / "head.out", TOKEN)
        try:
            head.wait_for(lambda: answers(port) and answers(dashboard), timeout_s=90)
            yield RayCluster(head, f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}")
        finally:
            head.kill()


def submit(output: Path, *arguments: str | Path, environment: Mapping[str, str] = TOKEN) -> Program:
    waits = {"RLAIF_AGENT_WAIT_S": f"{scaled(120):.0f}"}
    program = start([sys.executable, ROOT / "launch" / "submit.py", *arguments], output, {**waits, **environment})
    try:
        return program.wait()
    finally:
        program.kill()


def assert_complete(run_dir: Path) -> None:
    assert [row["step"] for row in rows(run_dir / "metrics.jsonl")] == [1, 2]
    assert len(rows(run_dir / "samples.jsonl")) == 16
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == 2
    assert (run_dir / "policy" / "model.safetensors").exists() and (run_dir / "resolved.yaml").exists()


def actors_gone(cluster: RayCluster, timeout_s: float = 20.0) -> bool:
    """No actor of ours is left; idle workers may be."""
    deadline = time.monotonic() + scaled(timeout_s)
    while time.monotonic() < deadline:
        titles = [" ".join(process.cmdline()) for process in cluster.head.processes()]
        if not any(re.search(r"ray::(Engine|Learner)Actor", title) for title in titles):
            return True
        time.sleep(0.5)
    return False


def test_a_submitted_job_runs_and_is_followed(cluster: RayCluster, folder: Path, config: Path) -> None:
    run_dir = folder / "submitted"
    settings = (*SHORT, "cluster.address=null", "algorithm.type=rloo", f"run_dir={run_dir}")
    where = ("--address", cluster.dashboard, "--python", sys.executable)
    program = submit(folder / "submit.out", *where, "train", config, *settings)
    assert program.exit_code == 0, program.stdout + program.stderr
    assert re.search(r"^submitted raysubmit_\w+: .*rlaif_ray.cli train ", program.stdout, re.M)
    assert re.search(r"^step 2/2  reward", program.stdout, re.M)
    assert re.search(r"^raysubmit_\w+: SUCCEEDED$", program.stdout, re.M)
    assert_complete(run_dir)
    assert not any(name.startswith("value/") for name in rows(run_dir / "metrics.jsonl")[0])
    assert actors_gone(cluster) and answers(int(cluster.address.rpartition(":")[2]))


@pytest.mark.long
def test_a_submitted_job_that_fails_says_why(cluster: RayCluster, folder: Path, config: Path) -> None:
    where = ("--address", cluster.dashboard, "--python", sys.executable)
    token = {"RAY_AUTH_TOKEN": TOKEN["RAY_AUTH_TOKEN"]}  # a token is there, and nothing says to send it
    program = submit(folder / "wrong.out", *where, "train", config, "stepz=2", environment=token)
    assert program.exit_code == 2  # the job's own
    assert "Did you mean steps?" in program.stdout and "FAILED" in program.stdout


@pytest.mark.long
def test_ray_address_joins_a_cluster_and_leaves_it_running(cluster: RayCluster, folder: Path, config: Path) -> None:
    run_dir = folder / "joined"
    settings = (*SHORT, "cluster.address=null", "algorithm.type=reinforce")
    program = finish_train(config, *settings, run_dir=run_dir, environment={"RAY_ADDRESS": cluster.address, **TOKEN})
    assert program.exit_code == 0, program.stderr
    assert program.left_over == []
    assert_complete(run_dir)
    assert "value/loss" in rows(run_dir / "metrics.jsonl")[0]
    assert actors_gone(cluster) and answers(int(cluster.address.rpartition(":")[2]))


@pytest.mark.long
def test_a_place_that_can_not_be_had(cluster: RayCluster, folder: Path, config: Path) -> None:
    settings = ("learner.ranks=2", "cluster.cpus_per_actor=64", "cluster.start_timeout_s=5")
    address = f"cluster.address={cluster.address}"
    program = finish_train(config, *settings, address, run_dir=folder / "no-place", environment=TOKEN)
    assert program.exit_code == 1
    assert program.left_over == []
    assert "PlacementError: the cluster did not give 4 actors their place within" in program.stderr
    assert "2 of 256 CPUs registered (2 free) on 1 node" in program.stderr and "add nodes" in program.stderr
    assert f"resume: rlaif train {config}" in program.stderr
    assert answers(int(cluster.address.rpartition(":")[2]))


@pytest.mark.long
@pytest.mark.parametrize(
    ("setting", "says"),
    [
        ("cluster.device=gpu", ("cluster.device=gpu needs GPUs", "registered none", "use cluster.device=cpu")),
        ("weight_sync.backend=nccl", ("weight_sync.backend=nccl does not work on cluster.device=cpu", "backend=auto")),
    ],
)
def test_what_the_cluster_can_not_do(
    cluster: RayCluster, folder: Path, config: Path, setting: str, says: tuple[str, ...]
) -> None:
    run_dir = folder / setting.partition("=")[2]
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    program = finish_train(config, setting, f"cluster.address={cluster.address}", run_dir=run_dir, environment=TOKEN)
    assert program.exit_code == 2
    assert program.left_over == []
    assert program.stderr.startswith("rlaif: ") and len(program.stderr.splitlines()) == 1
    assert [words for words in says if words not in program.stderr] == []
    assert {path.name: path.read_text() for path in run_dir.iterdir()} == {"metrics.jsonl": '{"step": 1}\n'}


@pytest.mark.long
def test_no_cluster_answers(folder: Path, config: Path) -> None:
    run_dir, address = folder / "nobody", f"127.0.0.1:{free_port()}"
    run_dir.mkdir()
    (run_dir / "metrics.jsonl").write_text('{"step": 1}\n')
    program = finish_train(config, f"cluster.address={address}", run_dir=run_dir)
    assert program.exit_code == 2
    assert program.left_over == []
    assert program.stderr.startswith(f"rlaif: no Ray cluster answers at {address} (named by cluster.address)")
    assert "cluster.address=local" in program.stderr and len(program.stderr.splitlines()) == 1
    assert {path.name: path.read_text() for path in run_dir.iterdir()} == {"metrics.jsonl": '{"step": 1}\n'}


@pytest.mark.long
def test_submitting_without_the_token(cluster: RayCluster, folder: Path, config: Path) -> None:
    where = ("--address", cluster.dashboard)
    program = submit(folder / "no-token.out", *where, "train", config, environment={"RAY_AUTH_MODE": "disabled"})
    assert program.exit_code == 2
    assert program.stderr.startswith(f"submit: the cluster at {cluster.dashboard} asks for a token")
    assert "Set RAY_AUTH_TOKEN to it" in program.stderr and len(program.stderr.splitlines()) == 1


@pytest.mark.long
def test_submitting_to_no_cluster(folder: Path, config: Path) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    program = submit(folder / "nobody.out", "--address", address, "train", config)
    assert program.exit_code == 2
    assert program.stderr.startswith(f"submit: no Ray dashboard answers at {address}")
    assert "ray start --head" in program.stderr and len(program.stderr.splitlines()) == 1
