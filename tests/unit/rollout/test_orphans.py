"""A process of an engine goes with the one that started it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest

from rlaif_ray.rollout.orphans import end_with_parent
from rlaif_ray.rollout.weight_transfer import register
from tests.pace import scaled

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


def test_every_process_of_vllm_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """By the entry point that vLLM loads in each."""
    called: list[bool] = []
    monkeypatch.setattr("rlaif_ray.rollout.weight_transfer.end_with_parent", lambda: called.append(True))
    register()
    assert called == [True]
