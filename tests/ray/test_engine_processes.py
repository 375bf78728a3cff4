"""A tensor-parallel engine of vLLM's, real, on CPU: an actor, its engine core and two workers, each a process. Every
worker receives what was pushed, and when the actor is killed all of them go.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
import ray

from rlaif_ray.learner.model_state import ModelState
from rlaif_ray.rollout.buckets import largest, make_buckets
from rlaif_ray.rollout.sending import Staging, send_all
from rlaif_ray.rollout.vllm_engine import EngineSpec, engine_environment
from rlaif_ray.rollout.weight_transfer import ShmSlot
from rlaif_ray.runtime.actors import EngineActor
from tests.benchmarks import zoo_push
from tests.pace import scaled

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]
for module in (sys.modules[__name__], zoo_push):  # a worker can't import a test module
    ray.cloudpickle.register_pickle_by_value(module)

WORKERS = 2


@pytest.fixture
def local_ray() -> Iterator[None]:
    assert not ray.is_initialized()
    options: dict[str, Any] = {"include_dashboard": False, "logging_level": "ERROR", "log_to_driver": False}
    options["_system_config"] = {"worker_niceness": 0}  # four processes start: on a busy machine Ray's 15 starves them
    ray.init(address="local", num_cpus=2, object_store_memory=2**27, **options)
    yield
    ray.shutdown()


@pytest.mark.engine
@pytest.mark.usefixtures("local_ray")
def test_a_tensor_parallel_engine_receives_whole_tensors_and_ends_with_its_actor(tmp_path: Path) -> None:
    """The vocabulary is no multiple of 64: vLLM keeps the embedding's rows to the end of an update, when the memory
    that they came in has the next bucket but one."""
    import torch

    from rlaif_ray.models import load_causal_lm

    folder = zoo_push.make_model("qwen3_tied", tmp_path)
    model = load_causal_lm(folder, dtype=torch.float32, attention="eager").eval()
    text = torch.randint(3, zoo_push.PADDED, (48,), generator=torch.Generator().manual_seed(1)).tolist()
    spec = EngineSpec(str(folder), None, False, "float32", "cpu", 64, WORKERS, 0.5, 0.1, 0, 1, "shm")
    options: dict[str, Any] = {"num_cpus": 1, "runtime_env": {"env_vars": engine_environment(spec)}}
    actor = ray.remote(**options)(EngineActor).remote()
    ray.get(actor.start.remote(spec), timeout=scaled(300))

    ray.get(actor.init_transfer.remote({}), timeout=scaled(60))
    sender = Staging([ShmSlot(), ShmSlot()])
    for version in (1, 2):  # the second finds segments that are large enough, and used again
        zoo_push.change(model, seed=version)
        found, sent = pushed(actor, ModelState(model), sender, version)
        assert found == [sent] * WORKERS
    said = ray.get(actor.__ray_call__.remote(lambda a: zoo_push.engine_logprobs(a._engine, text)), timeout=scaled(60))
    assert zoo_push.gap(said, zoo_push.learner_logprobs(model, text)) < zoo_push.BOUND

    pid = ray.get(actor.__ray_call__.remote(lambda a: os.getpid()), timeout=scaled(60))
    processes = psutil.Process(pid).children(recursive=True)
    titles = [" ".join(process.cmdline()) for process in processes]
    assert sum("EngineCore" in title for title in titles) == 1, titles
    assert sum("Worker" in title for title in titles) == WORKERS, titles
    os.kill(pid, signal.SIGKILL)
    assert_gone(processes)


def pushed(actor: Any, state: ModelState, sender: Staging, version: int) -> tuple[list[int], int]:
    """The engine's checksums, and the learner's, after a push of a layer group a message, in two slots by turns."""
    buckets = make_buckets(state.groups(), state.metadata(), 0)
    ray.get(actor.start_update.remote(), timeout=scaled(60))
    loading = actor.update_all.remote(buckets, tuple(sender.offer(largest(buckets), 1)))
    sent = send_all(state, buckets, sender, counted=True).checksum
    ray.get(loading, timeout=scaled(60))
    return ray.get(actor.finish_update.remote(version), timeout=scaled(60)), sent


def assert_gone(processes: list[psutil.Process]) -> None:
    """All end by themselves; those that don't are ended here."""
    _, left = psutil.wait_procs(processes, timeout=scaled(15))
    for process in left:
        process.kill()
    assert left == []


# An actor with processes such as vLLM's, as its plugin treats them; in a Ray of its own.
PROGRAM = """
import multiprocessing, os, sys, time
import psutil, ray

def core(pids):
    from rlaif_ray.rollout.orphans import end_with_parent
    end_with_parent()
    pids.put(os.getpid())
    while True:
        time.sleep(60)

class Engine:
    def start(self):
        context = multiprocessing.get_context("fork")
        pids = context.SimpleQueue()
        context.Process(target=core, args=(pids,)).start()
        return os.getpid(), pids.get()

if __name__ == "__main__":
    ray.init(address="local", num_cpus=1, include_dashboard=False, log_to_driver=False, object_store_memory=2**27)
    engine = ray.remote(Engine).remote()
    pids = ray.get(engine.start.remote())
    raylet = next(p.pid for p in psutil.Process().children(recursive=True) if p.name() == "raylet")
    print("pids", os.getpid(), raylet, *pids, flush=True)
    time.sleep(600)
"""


@pytest.mark.parametrize("killed", ["driver", "raylet and driver"])
def test_no_process_of_an_engine_outlives_rays(tmp_path: Path, killed: str) -> None:
    """The actor goes with the node's Ray, and its processes with the actor. (Where a raylet dies that its driver
    started, Ray 2.60's actors stay for as long as the driver does: it does not wait for its child, a zombie then.)
    """
    script = tmp_path / "driver.py"
    script.write_text(PROGRAM)
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_ADDRESS")}
    environment["PYTHONPATH"] = str(Path(__file__).parents[2])
    command = [sys.executable, str(script)]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
    ) as run:
        assert run.stdout is not None
        line = next((line for line in run.stdout if line.startswith("pids ")), "")
        driver, raylet, *others = map(int, line.split()[1:])
        processes = [psutil.Process(pid) for pid in others]
        started_by_ray = psutil.Process(driver).children(recursive=True)
        try:
            for name, pid in (("raylet", raylet), ("driver", driver)):
                if name in killed:
                    os.kill(pid, signal.SIGKILL)
            assert_gone(processes)
        finally:
            run.kill()
            _, left = psutil.wait_procs(started_by_ray, timeout=scaled(15))
            for process in left:
                process.kill()
