"""The real program in processes of its own, for end-to-end tests, and every process that it brings along.

Ray's processes are told by the session of the program that started them, wandb's (which leave it) by a variable in
their environment.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from tests.pace import scaled
from tests.tiny import cached_tiny_model

ROOT = Path(__file__).resolve().parents[1]
MARK = "RLAIF_TEST_RUN"

# Steps of a quarter of a second on the tiny model. Its weights are random, so every token is as likely as an answer.
# The adaptive KL coefficient makes every step depend on all before.
TINY = """\
sampling: {prompts_per_step: 4, samples_per_prompt: 2, max_new_tokens: 12}
rollout: {kv_cache_gb: 0.1}
feedback: {judge: {kv_cache_gb: 0.3, min_answer_mass: 0}}  # a random judge has no mind to answer
algorithm: {type: ppo, minibatches: 2, kl: {coef: 0.05, target: 0.5, horizon: 100}}
learner: {lr: 1.0e-3}
data: {path: 'package:train', limit: 12}
evaluation: {held_out: {path: 'package:heldout', limit: 6}}
checkpoint: {every: 3}
cluster: {address: local}
steps: 6
"""


def tiny_config(folder: Path) -> Path:
    """The tiny run's config, written into `folder`; in fp32, on CPUs with AMX too, since digits are compared."""
    model = cached_tiny_model(tied=True, context=4096)
    path = folder / "tiny.yaml"
    text = TINY.replace("feedback: {judge: {", f"feedback: {{judge: {{model: {model}, precision: fp32, ")
    path.write_text(f"{text}policy: {{model: {model}, precision: fp32}}\n")
    return path


@dataclass
class Program:
    """A program that was started, and what it leaves. Ends with `stop` in any case."""

    process: subprocess.Popen[bytes]
    mark: str
    output: Path  # where its stdout goes; stderr beside it
    exit_code: int | None = None
    left_over: list[str] = field(default_factory=list)  # its processes and shared memory, some seconds after its end

    @property
    def stdout(self) -> str:
        return self.output.read_text()

    @property
    def stderr(self) -> str:
        return self.output.with_suffix(".err").read_text()

    def processes(self) -> list[psutil.Process]:
        """Of the program and of all that it started, alive now."""
        found = []
        for process in psutil.process_iter():
            try:
                if process.status() == psutil.STATUS_ZOMBIE:
                    continue
                if os.getsid(process.pid) == self.process.pid or process.environ().get(MARK) == self.mark:
                    found.append(process)
            except (psutil.Error, OSError):  # gone meanwhile
                continue
        return found

    def wait(self, timeout_s: float = 900.0) -> Program:
        """Until it ends; then looks what it left behind."""
        deadline = time.monotonic() + scaled(timeout_s)
        while self.process.poll() is None:
            assert time.monotonic() < deadline, f"it did not end in {timeout_s} s:\n{self.stdout[-2000:]}"
            time.sleep(0.25)
        self.exit_code = self.process.returncode
        deadline = time.monotonic() + scaled(10)
        while (alive := self.processes()) and time.monotonic() < deadline:
            time.sleep(0.2)
        self.left_over = [" ".join(_cmdline(p))[:100] for p in alive]
        return self

    def wait_for(self, happened: Callable[[], bool], timeout_s: float = 900.0) -> None:
        """Until something happened, which must be before the program ends."""
        deadline = time.monotonic() + scaled(timeout_s)
        while not happened():
            assert self.process.poll() is None, f"it ended early:\n{self.stdout[-2000:]}\n{self.stderr[-2000:]}"
            assert time.monotonic() < deadline, f"it did not happen in {timeout_s} s:\n{self.stdout[-2000:]}"
            time.sleep(0.01)

    def interrupt(self) -> None:
        """Ctrl-C, as a terminal sends it: to the whole foreground group."""
        os.killpg(self.process.pid, signal.SIGINT)

    def kill(self) -> None:
        """SIGKILL: the program first, then what it started, each by its id."""
        if self.process.poll() is None:
            self.process.kill()
            self.process.wait()
        for _ in range(20):  # what is killed may have started something meanwhile
            alive = self.processes()
            for process in alive:
                try:
                    process.kill()
                except psutil.NoSuchProcess:
                    continue
            psutil.wait_procs(alive, timeout=5)
            if not alive:
                return
        raise AssertionError("processes that can't be killed")


def _cmdline(process: psutil.Process) -> list[str]:
    try:
        return list(process.cmdline())
    except psutil.Error:
        return ["gone"]


def start(command: Sequence[str | Path], output: Path, environment: Mapping[str, str] | None = None) -> Program:
    """Starts a program in a session of its own; `environment` is added to ours, which Ray and wandb have no say in."""
    mark = uuid.uuid4().hex
    inherited = {k: v for k, v in os.environ.items() if not k.startswith(("RAY_", "WANDB_", "RLAIF_DEBUG"))}
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("wb") as out, output.with_suffix(".err").open("wb") as err:
        process = subprocess.Popen(
            [str(word) for word in command],
            cwd=ROOT,
            env={**inherited, "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1", MARK: mark, **(environment or {})},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
    return Program(process, mark, output)


def start_train(*arguments: str | Path, run_dir: Path, environment: Mapping[str, str] | None = None) -> Program:
    """`rlaif train ... run_dir=RUN_DIR`; its output goes beside the run folder."""
    program = Path(sys.executable).with_name("rlaif")
    number = len(list(run_dir.parent.glob(f"{run_dir.name}.*.out")))
    output = run_dir.with_name(f"{run_dir.name}.{number}.out")
    return start([program, "train", *arguments, f"run_dir={run_dir}"], output, environment)


def finish_train(
    *arguments: str | Path, run_dir: Path, environment: Mapping[str, str] | None = None, timeout_s: float = 900.0
) -> Program:
    """Runs `rlaif train` to its end; nothing of it lives on."""
    program = start_train(*arguments, run_dir=run_dir, environment=environment)
    try:
        return program.wait(timeout_s)
    finally:
        program.kill()


def rows(path: Path) -> list[dict[str, Any]]:
    """Of a JSON-lines file that may be written right now: whole lines only."""
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.split("\n")[:-1]]  # texts may hold what splitlines takes for line ends
