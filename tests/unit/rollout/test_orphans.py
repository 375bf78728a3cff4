"""A process of an engine goes with the one that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest

from rlaif_ray.rollout.orphans import ENGINE_PROCESS, end_with_parent
from rlaif_ray.rollout.vllm_engine import engine_environment
from tests.pace import scaled
from tests.unit.rollout.test_support import SPEC

ROOT = Path(__file__).parents[3]

PROGRAM = """
import multiprocessing, time
from rlaif_ray.rollout.orphans import end_with_parent

def worker(pids):
    end_with_parent()
    pids.put(multiprocessing.current_process().pid)
    while True:
        time.sleep(60)

def core(pids, own):
    end_with_parent()
    context = multiprocessing.get_context("{method}")
    context.Process(target=worker, args=(pids,)).start()
    own.put(multiprocessing.current_process().pid)
    while True:
        time.sleep(60)

if __name__ == "__main__":
    context = multiprocessing.get_context("{method}")
    pids, own = context.SimpleQueue(), context.SimpleQueue()
    context.Process(target=core, args=(pids, own)).start()
    print(own.get(), pids.get(), flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("method", ["spawn", "fork"])
def test_all_go_when_the_first_is_killed(tmp_path: Path, method: str) -> None:
    """As an actor, its engine core and a worker."""
    script = tmp_path / "engine.py"
    script.write_text(PROGRAM.format(method=method))
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as actor:
        assert actor.stdout is not None
        others = [psutil.Process(int(pid)) for pid in actor.stdout.readline().split()]
        assert len(others) == 2
        try:
            actor.send_signal(signal.SIGKILL)
            _, alive = psutil.wait_procs(others, timeout=scaled(5))
            assert alive == []
        finally:
            for other in others:
                if other.is_running():
                    other.kill()


def test_a_process_that_nobody_started_so_stays() -> None:
    """An actor is started by Ray."""
    end_with_parent()
    assert os.getpid()


PLUGIN = """
import multiprocessing, sys, threading
from rlaif_ray.rollout.weight_transfer import register

def core(told):
    register()
    watched = any(thread.name == "end with parent" for thread in threading.enumerate())
    told.put((watched, type(sys.stdout).__name__))

if __name__ == "__main__":
    register()
    context = multiprocessing.get_context("spawn")
    told = context.SimpleQueue()
    process = context.Process(target=core, args=(told,))
    process.start()
    print(*told.get(), type(sys.stdout).__name__, any(t.name == "end with parent" for t in threading.enumerate()))
    process.join()
"""


@pytest.mark.parametrize("whose", ["our engine's", "a user's server's"])
def test_what_vllm_starts_for_an_engine_ends_with_it_and_nothing_else_does(tmp_path: Path, whose: str) -> None:
    """By the entry point that every vLLM of this Python environment loads, whoever runs it."""
    script = tmp_path / "server.py"
    script.write_text(PLUGIN)
    (tmp_path / "vllm/distributed/weight_transfer").mkdir(parents=True)  # the real one takes seconds to import
    (tmp_path / "vllm/distributed/weight_transfer/factory.py").write_text(
        "class WeightTransferEngineFactory:\n    _registry = dict.fromkeys(['shm', 'rlaif_ipc', 'rlaif_nccl'])\n"
    )
    ours = engine_environment(replace(SPEC, tensor_parallel=2)) if whose == "our engine's" else {}
    environment = {name: value for name, value in os.environ.items() if name != ENGINE_PROCESS} | ours
    environment["PYTHONPATH"] = str(ROOT)
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True, check=False)
    expected = "True ShownStream" if ours else "False TextIOWrapper"
    assert done.stdout == f"{expected} TextIOWrapper False\n", done.stderr
