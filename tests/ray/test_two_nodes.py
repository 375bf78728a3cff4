"""A submitted job on a Ray cluster of two nodes that come, go and are lost; both run on this machine."""

from __future__ import annotations

import re
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, suppress
from pathlib import Path

import psutil
import pytest

from tests.pace import scaled
from tests.ray.test_cluster import answers, free_port
from tests.runs import ROOT, Program, rows, start, tiny_config

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(900)]

RAY = Path(sys.executable).with_name("ray")
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": uuid.uuid4().hex * 2,
    # A silent node counts as lost after five seconds instead of a minute.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "1000",
    "RAY_health_check_failure_threshold": "5",
}
# Four actors of one CPU: the judge on the head, the others on a node of three, since weights go through its memory.
SETTINGS = (
    "cluster.address=null",
    "cluster.cpus_per_actor=1",
    "rollout.replicas=2",
    "evaluation.held_out.path=null",
    "checkpoint.every=5",
    f"cluster.silent_after_s={scaled(20):.0f}",
    "steps=5000",
)


class TwoNodes:
    """A head, and nodes that join it."""

    def __init__(self, folder: Path, stack: ExitStack) -> None:
        self._folder, self._stack = folder, stack
        self.folders: dict[str, Path] = {}  # Ray's own, by node
        port, dashboard = free_port(), free_port()
        self.address, self.dashboard = f"127.0.0.1:{port}", f"http://127.0.0.1:{dashboard}"
        self.head = self._start("head", "--head", f"--port={port}", f"--dashboard-port={dashboard}", "--num-cpus=1")
        self.head.wait_for(lambda: answers(port) and answers(dashboard), timeout_s=90)

    def join(self, name: str) -> Program:
        return self._start(name, f"--address={self.address}", "--num-cpus=3")

    def _start(self, name: str, *options: str) -> Program:
        private = self._stack.enter_context(tempfile.TemporaryDirectory(prefix=f"ray-{name}-"))  # short, for sockets
        self.folders[name] = Path(private)
        common = ["--block", "--disable-usage-stats", f"--object-store-memory={2**27}"]
        common += [
            "--min-worker-port=0",
            "--max-worker-port=0",
            "--dashboard-agent-listen-port=0",
            f"--temp-dir={private}",
        ]
        program = start([RAY, "start", *common, *options], self._folder / f"{name}.out", ENVIRONMENT)
        self._stack.callback(program.kill)
        return program

    def submit(self, name: str, *arguments: str | Path) -> Program:
        command = [
            sys.executable,
            ROOT / "launch" / "submit.py",
            "--address",
            self.dashboard,
            "--python",
            sys.executable,
        ]
        program = start([*command, *arguments], self._folder / f"{name}.out", ENVIRONMENT)
        self._stack.callback(program.kill)
        return program

    def stop(self, submitted: Program) -> float:
        """`ray job stop`; seconds until the submitting program ended."""
        (job,) = re.findall(r"^submitted (raysubmit_\w+):", submitted.stdout, re.M)
        began = time.monotonic()
        command = [RAY, "job", "stop", "--no-wait", "--address", self.dashboard, job]
        inherited = {"PATH": "/usr/bin:/bin", "HOME": str(self._folder), **ENVIRONMENT}
        subprocess.run(
            [str(word) for word in command], env=inherited, check=True, capture_output=True, timeout=scaled(60)
        )
        submitted.wait(300)
        return time.monotonic() - began


def actors(node: Program) -> list[str]:
    """The kinds of actors that live on a node."""
    names = []
    for process in node.processes():
        with suppress(psutil.NoSuchProcess):
            names.append(process.name())  # of 15 characters
    return sorted(found[1] for name in names if (found := re.match(r"ray::(Engine|Learner)", name)))


def raylet(node: Program) -> psutil.Process:
    (found,) = [p for p in node.processes() if p.name() == "raylet"]
    return found


def until(happened: Callable[[], bool], timeout_s: float = 20.0) -> bool:
    deadline = time.monotonic() + scaled(timeout_s)
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.2)
    return happened()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("nodes")


@pytest.fixture(scope="module")
def cluster(folder: Path) -> Iterator[TwoNodes]:
    with ExitStack() as stack:
        yield TwoNodes(folder, stack)


def test_nodes_that_are_missing_are_told(cluster: TwoNodes, folder: Path) -> None:
    """As cluster/slurm.sbatch waits for them."""
    command = [sys.executable, ROOT / "launch" / "wait_for_nodes.py", cluster.folders["head"]]
    there = start([*command, "1"], folder / "there.out", ENVIRONMENT).wait(180)
    assert (there.exit_code, there.stdout) == (0, ""), there.stderr
    missing = start([*command, "2"], folder / "missing.out", {**ENVIRONMENT, "RLAIF_NODES_TIMEOUT_S": "1"}).wait(180)
    assert missing.exit_code == 1
    assert re.match(
        r"slurm: 1 of 2 nodes registered \(\S+\), and RLAIF_NODES_TIMEOUT_S=1 s are over\. See", missing.stdout
    )


def test_nodes_come_and_go(cluster: TwoNodes, folder: Path) -> None:
    """Waits for a node, trains on both, is stopped, resumes, loses a node and gets another, loses that, is stopped."""
    config, run_dir = tiny_config(folder), folder / "run"
    metrics, command = run_dir / "metrics.jsonl", ("train", config, *SETTINGS, f"run_dir={run_dir}")
    checkpoints = run_dir / "checkpoints"

    def steps() -> int:
        return len(rows(metrics))

    first = cluster.submit("first", *command)
    first.wait_for(lambda: "1 of 4 CPUs registered" in first.stdout and "on 1 node" in first.stdout, timeout_s=120)
    assert steps() == 0
    second_node = cluster.join("n2")
    first.wait_for(lambda: steps() >= 2)
    most = ["Engine", "Engine", "Learner"]
    assert (actors(cluster.head), actors(second_node)) == (["Engine"], most)
    assert cluster.stop(first) < 60
    assert first.exit_code == 130 and "rlaif: interrupted." in first.stdout and ": STOPPED" in first.stdout
    stopped_at = steps()
    assert (checkpoints / f"step-{stopped_at}").is_dir()
    assert until(lambda: not actors(cluster.head) + actors(second_node))

    again = cluster.submit("again", *command)
    again.wait_for(lambda: steps() >= stopped_at + 2)
    assert f"resumed from {checkpoints}/step-{stopped_at}" in again.stdout
    raylet(second_node).kill()
    again.wait_for(lambda: "waiting for the places of 4 actors" in again.stdout, timeout_s=90)
    third_node = cluster.join("n3")
    again.wait_for(lambda: actors(third_node) == most, timeout_s=120)
    lost_at = steps()
    again.wait_for(lambda: steps() > lost_at and rows(metrics)[-1]["rollout/serving"] == 2)
    assert len(re.findall("starting the learner again from step", again.stdout)) == 1

    told = len(again.stdout)
    raylet(third_node).suspend()
    again.wait_for(lambda: "waiting for the places of 4 actors" in again.stdout[told:], timeout_s=90)
    assert "1 of 4 CPUs registered (0 free) on 1 node" in again.stdout[told:]
    assert cluster.stop(again) < 60
    assert again.exit_code == 130
    last = steps()
    assert sorted(int(path.name.removeprefix("step-")) for path in checkpoints.iterdir())[-1] >= last - 5
    numbers = [row["step"] for row in rows(metrics)]
    assert numbers == [row["weights/version"] for row in rows(metrics)] == list(range(1, last + 1))
    assert until(lambda: not actors(cluster.head))
    raylet(third_node).send_signal(signal.SIGCONT)
