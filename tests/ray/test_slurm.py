"""cluster/slurm.sbatch under a real Slurm of two nodes, both on this machine, that the tests start and end."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.pace import scaled
from tests.ray.test_cluster import free_port
from tests.runs import ROOT, Program, rows, start, tiny_config

PROGRAMS = ("munged", "munge", "slurmctld", "slurmd", "sbatch", "srun", "scontrol")
MISSING = [name for name in PROGRAMS if shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin") is None]

pytestmark = [
    pytest.mark.slurm,
    pytest.mark.ray,
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.timeout(900),
    pytest.mark.skipif(bool(MISSING), reason=f"needs Debian's slurm-wlm and munge: no {', '.join(MISSING)} here"),
    pytest.mark.skipif(os.geteuid() != 0, reason="slurmd needs root"),
]

# A job that queues again starts cred_expire seconds later.
CONF = """\
ClusterName=test
SlurmctldHost={host}(127.0.0.1)
SlurmUser=root
SlurmctldPort={ports[0]}
AuthType=auth/munge
AuthInfo=socket={folder}/munge/socket,cred_expire=10
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/%n.pid
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
MpiDefault=none
ReturnToService=2
NodeName=n1 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[1]} CPUs=2
NodeName=n2 NodeHostname={host} NodeAddr=127.0.0.1 Port={ports[2]} CPUs=2
PartitionName=all Nodes=n1,n2 Default=YES OverSubscribe=FORCE:4
"""

SHORT = ("evaluation.held_out.path=null", "cluster.address=null", "checkpoint.every=0")


@dataclass
class Slurm:
    """Daemons of our own, and jobs given to them."""

    conf: Path

    def ask(self, *words: str) -> str:
        environment = {**os.environ, "SLURM_CONF": str(self.conf)}
        return subprocess.run(
            words, env=environment, check=True, capture_output=True, text=True, timeout=scaled(60)
        ).stdout

    def submit(self, output: Path, *arguments: str | Path, environment: dict[str, str]) -> Job:
        options = ["--gpus-per-node=0", "--cpus-per-task=1", f"--output={output}.log"]
        inherited = {"SLURM_CONF": str(self.conf), **environment}
        program = start([ROOT / "launch" / "slurm.sh", *options, *arguments], output, inherited)
        assert program.process.wait(scaled(60)) == 0, program.stderr
        found = re.match(r"submitted (\d+); its log: (\S+)$", program.stdout, re.M)
        assert found is not None and found[2] == f"{output}.log"
        return Job(self, int(found[1]), program, Path(found[2]))


@dataclass
class Job:
    """One that was submitted; its processes have the variable of the program that submitted it."""

    slurm: Slurm
    number: int
    program: Program
    log: Path

    def told(self) -> dict[str, str]:
        """What Slurm knows of it."""
        return dict(re.findall(r"(\w+)=(\S*)", self.slurm.ask("scontrol", "show", "job", str(self.number))))

    def wait_for(self, *states: str, timeout_s: float = 500.0) -> dict[str, str]:
        deadline = time.monotonic() + scaled(timeout_s)
        while (told := self.told())["JobState"] not in states:
            assert time.monotonic() < deadline, f"{told['JobState']}:\n{self.log.read_text()[-3000:]}"
            time.sleep(0.3)
        return told

    def wait_for_rows(self, path: Path, count: int, timeout_s: float = 500.0) -> None:
        deadline = time.monotonic() + scaled(timeout_s)
        while len(rows(path)) < count:
            ended = self.told()["JobState"] not in ("PENDING", "CONFIGURING", "RUNNING")
            assert not ended and time.monotonic() < deadline, self.log.read_text()[-3000:]
            time.sleep(0.2)

    def left_over(self) -> list[str]:
        """Its processes, some seconds after its end."""
        deadline = time.monotonic() + scaled(10)
        while (alive := self.program.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        return [" ".join(process.cmdline())[:100] for process in alive]

    def end(self) -> None:
        self.slurm.ask("scancel", "--quiet", str(self.number))
        self.program.kill()


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Slurm]:
    outputs = tmp_path_factory.mktemp("slurm")
    search = {"PATH": f"{os.environ['PATH']}:/usr/sbin"}
    with tempfile.TemporaryDirectory(prefix="slurm-") as name, ExitStack() as stack:
        folder = Path(name)  # short: sockets lie in it
        for each in ("munge", "state", "n1", "n2"):
            (folder / each).mkdir()
        key = folder / "munge" / "key"
        key.write_bytes(os.urandom(1024))
        key.chmod(0o600)
        conf = folder / "slurm.conf"
        conf.write_text(CONF.format(host=socket.gethostname(), folder=folder, ports=[free_port() for _ in range(3)]))
        munge = [f"--{kind}={folder}/munge/{file}" for kind, file in MUNGE_FILES.items()]
        commands = {
            "munged": ["munged", "--foreground", "--force", *munge],
            "slurmctld": ["slurmctld", "-D", "-f", str(conf)],
            "n1": ["slurmd", "-D", "-f", str(conf), "-N", "n1"],
            "n2": ["slurmd", "-D", "-f", str(conf), "-N", "n2"],
        }
        for daemon, command in commands.items():
            program = start(command, outputs / f"{daemon}.out", search)
            stack.callback(program.kill)
            if daemon == "munged":
                program.wait_for((folder / "munge" / "socket").exists, timeout_s=30)
        found = Slurm(conf)
        deadline = time.monotonic() + scaled(60)
        while (states := found.ask("sinfo", "--noheader", "--Node", "--format=%T").split()) != ["idle", "idle"]:
            assert time.monotonic() < deadline, states
            time.sleep(0.3)
        yield found


MUNGE_FILES = {"socket": "socket", "key-file": "key", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}


def test_a_preempted_job_queues_again_and_goes_on(slurm: Slurm, tmp_path: Path) -> None:
    """Over both nodes; SIGTERM as Slurm sends it before it takes them."""
    config, run_dir, metrics = tiny_config(tmp_path), tmp_path / "run", tmp_path / "run" / "metrics.jsonl"
    config.write_text(config.read_text().replace("steps: 6", "steps: 400"))
    before = set(Path("/tmp").glob("rlaif-slurm-????????"))
    words = ("--nodes=2", "train", config, *SHORT, f"run_dir={run_dir}")
    job = slurm.submit(tmp_path / "job", *words, environment={"RLAIF_REQUEUE": "1"})
    try:
        job.wait_for_rows(metrics, 2)
        tokens = {token for process in job.program.processes() if (token := process.environ().get("RAY_AUTH_TOKEN"))}
        commands = [" ".join(process.cmdline()) for process in job.program.processes()]
        assert sum("/raylet/raylet " in command for command in commands) == 2
        slurm.ask("scancel", "--batch", "--signal=TERM", str(job.number))
        job.wait_for("PENDING", timeout_s=60)
        assert job.left_over() == []
        last = rows(metrics)[-1]["step"]
        assert [path.name for path in (run_dir / "checkpoints").iterdir()] == [f"step-{last}"]
        assert last < 390

        config.write_text(config.read_text().replace("steps: 400", f"steps: {last + 2}"))
        told = job.wait_for("COMPLETED", "FAILED", "CANCELLED")
        assert (told["JobState"], told["ExitCode"], told["Restarts"]) == ("COMPLETED", "0:0", "1"), job.log.read_text()
        assert job.left_over() == []
    finally:
        job.end()
    log = job.log.read_text()
    assert f"resumed from {run_dir}/checkpoints/step-{last}" in log and "rlaif: interrupted." in log
    assert [row["step"] for row in rows(metrics)] == list(range(1, last + 3))
    assert json.loads((run_dir / "summary.json").read_text())["steps"] == last + 2
    assert (run_dir / "policy" / "model.safetensors").exists()
    (token,) = tokens  # one for both nodes, and nowhere to be read
    assert len(token) == 64 and token not in log and not any(token in command for command in commands)
    assert set(Path("/tmp").glob("rlaif-slurm-????????")) == before


def test_the_exit_code_is_the_jobs(slurm: Slurm, tmp_path: Path) -> None:
    job = slurm.submit(tmp_path / "job", "--nodes=1", "train", tiny_config(tmp_path), "stepz=2", environment={})
    try:
        told = job.wait_for("COMPLETED", "FAILED", "CANCELLED")
        assert (told["JobState"], told["ExitCode"]) == ("FAILED", "2:0")
        assert job.left_over() == []
    finally:
        job.end()
    log = job.log.read_text()
    assert "Did you mean steps?" in log
    (folder,) = re.findall(r"^slurm: exit code 2; Ray's logs are in (\S+) on each node$", log, re.M)
    assert (Path(folder) / "ray/session_latest/logs").is_dir() and Path(folder).stat().st_mode & 0o777 == 0o700
    shutil.rmtree(folder)


def test_ray_that_can_not_start(slurm: Slurm, tmp_path: Path) -> None:
    """On the second node: the job does not wait for it until the deadline."""
    broken = tmp_path / "bin"
    broken.mkdir()
    (broken / "srun").write_text(
        f'#!/bin/bash\n[[ "$*" != *--address=* ]] || exec false\nexec {shutil.which("srun")} "$@"\n'
    )
    (broken / "srun").chmod(0o755)
    environment = {"BASH_ENV": str(tmp_path / "env")}
    (tmp_path / "env").write_text(f"PATH={broken}:$PATH\n")
    job = slurm.submit(tmp_path / "job", "--nodes=2", "train", tiny_config(tmp_path), environment=environment)
    try:
        told = job.wait_for("COMPLETED", "FAILED", "CANCELLED")
        assert (told["JobState"], told["ExitCode"]) == ("FAILED", "1:0")
        assert job.left_over() == []
    finally:
        job.end()
    log = job.log.read_text()
    assert re.search(r"^slurm: 1 of 2 nodes registered \(\S+\), and ray start has ended on one\. See ", log, re.M), log
    for folder in re.findall(r"Ray's logs are in (\S+) on each node", log):
        shutil.rmtree(folder)
