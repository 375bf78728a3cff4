"""A run's folder is one process's: real processes, one of them killed."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlaif_ray.cli import _JOBS, app
from rlaif_ray.errors import InputError
from rlaif_ray.pipelines.run_folder import make_folder, stop_when_asked
from tests.tiny import cached_tiny_model

HOLDER = """
import sys
from pathlib import Path
from rlaif_ray.pipelines.run_folder import make_folder
try:
    make_folder(Path(sys.argv[1]))
except ValueError as error:
    print(error, flush=True)
    raise SystemExit(2)
print("in", flush=True)
sys.stdin.readline()
"""
Hold = Callable[[Path], "subprocess.Popen[str]"]


@pytest.fixture
def hold() -> Iterator[Hold]:
    """Starts a process that makes a folder its own, and waits there until its stdin ends."""
    started: list[subprocess.Popen[str]] = []

    def start(folder: Path) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLDER, str(folder)]
        started.append(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


def said(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline().strip()


def test_a_second_process_is_told_who_is_in_it_and_a_killed_one_frees_it(tmp_path: Path, hold: Hold) -> None:
    run_dir = tmp_path / "run"
    first = hold(run_dir)
    assert said(first) == "in"
    second = hold(run_dir)
    told = said(second)
    assert second.wait() == 2
    assert told.startswith(f"{run_dir} is in use by process {first.pid} on {socket.gethostname()}:")
    assert "choose another run_dir" in told
    first.kill()
    first.wait()
    third = hold(run_dir)
    assert said(third) == "in"
    assert (run_dir / ".lock").read_text() == f"process {third.pid} on {socket.gethostname()}"
    third.communicate()
    assert third.returncode == 0 and list(run_dir.iterdir()) == []  # an end in order leaves nothing


def test_of_many_at_once_one_gets_in(tmp_path: Path, hold: Hold) -> None:
    """Over and over, as the folder changes hands: a lock file that was just removed must not count."""
    (run_dir := tmp_path / "run").mkdir()
    for _ in range(3):
        all_of_them = [hold(run_dir) for _ in range(4)]
        answers = [said(process) for process in all_of_them]
        inside = [process for process, answer in zip(all_of_them, answers, strict=True) if answer == "in"]
        assert len(inside) == 1 and sum("in use by" in answer for answer in answers) == 3
        inside[0].communicate()


def test_one_process_may_enter_again_and_a_folder_that_was_put_aside_is_no_obstacle(tmp_path: Path, hold: Hold) -> None:
    run_dir = tmp_path / "run"
    make_folder(run_dir)
    make_folder(run_dir)
    run_dir.rename(tmp_path / "aside")
    make_folder(run_dir)
    for folder in (run_dir, tmp_path / "aside"):
        assert f"in use by process {os.getpid()} on" in said(hold(folder))


MODEL, PROMPTS = "MODEL", "data.path=package:train"
SETTINGS = {
    "train": (f"policy.model={MODEL}", f"feedback.judge.model={MODEL}", "data.limit=4", PROMPTS),
    "pairs": (f"policy.model={MODEL}", PROMPTS, "data.limit=2"),
    "sample": (f"policy.model={MODEL}", PROMPTS, "data.limit=2"),
    "revise": (f"policy.model={MODEL}", PROMPTS, "data.limit=2", "revision.examples=null", "revision.max_new_tokens=8"),
    "label": ("data.path=pairs.jsonl", "judge={type: longer}"),
    "sft": (f"policy.model={MODEL}", "data.path=chats.jsonl"),
    "reward-model": (f"policy.model={MODEL}", "data.path=pairs.jsonl", "reward.held_out_fraction=0"),
    "dpo": (f"policy.model={MODEL}", "data.path=pairs.jsonl", "dpo.held_out_fraction=0"),
    "evaluate": ("data.path=pairs.jsonl", "judge={type: longer}"),
    "pipeline": ("stages.label={job: label, data: {path: pairs.jsonl}, judge: {type: longer}}",),
}


def test_every_job_is_here() -> None:
    assert set(SETTINGS) == {*_JOBS, "label", "pipeline"}


@pytest.mark.parametrize("job", SETTINGS)
def test_no_job_touches_a_folder_in_use(job: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, hold: Hold) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("Ray was started"))
    Path("pairs.jsonl").write_text('{"prompt": "a?", "response_a": "b", "response_b": "cc", "label": 1}\n')
    Path("chats.jsonl").write_text('{"prompt": "a?", "response": "b"}\n')
    Path("empty.yaml").write_text("{}")
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for name in ("metrics.jsonl", "labels.jsonl", "summary.json"):
        (run_dir / name).write_text("an earlier run's\n")
    holder = hold(run_dir)
    assert said(holder) == "in"
    before = {path.name: path.read_bytes() for path in run_dir.iterdir()}
    settings = [one.replace(MODEL, str(cached_tiny_model(tied=True, context=4096))) for one in SETTINGS[job]]
    done = CliRunner().invoke(app, [job, "empty.yaml", *settings, "run_dir=run"])
    assert done.exit_code == 2, done.output
    assert re.search(rf"^rlaif: \S*run is in use by process {holder.pid} on ", done.stderr)
    assert len(done.stderr.splitlines()) == 1
    assert {path.name: path.read_bytes() for path in run_dir.iterdir()} == before


def test_an_output_that_two_runs_share(tmp_path: Path, hold: Hold, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its state is beside it: another run_dir does not make it another output."""
    from rlaif_ray.config.load import load_job

    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text('{"prompt": "a?", "response_a": "b", "response_b": "cc"}\n')
    assert said(hold(tmp_path / "shared.jsonl.state")) == "in"
    settings = ["data.path=pairs.jsonl", "judge={type: longer}", "output=shared.jsonl", "run_dir=own"]
    with pytest.raises(InputError, match=r"shared\.jsonl\.state is in use by process"):
        import_module("rlaif_ray.pipelines.preferences").make_labels(load_job("label", [], settings))


@pytest.mark.parametrize(("number", "soon"), [(signal.SIGINT, False), (signal.SIGTERM, True), (signal.SIGHUP, True)])
def test_signals_that_ask_to_stop(number: int, soon: bool) -> None:
    def handler(number: int, frame: object) -> None: ...

    inherited = signal.signal(number, handler)  # under nohup SIGHUP would be ignored
    try:
        with stop_when_asked() as stopping:
            assert not stopping()
            signal.raise_signal(number)
            assert stopping() and stopping.soon() == soon
        assert signal.getsignal(number) is handler
    finally:
        signal.signal(number, inherited)


def test_what_nohup_ignores_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_when_asked() as stopping:
            signal.raise_signal(signal.SIGHUP)
            assert not stopping()
    finally:
        signal.signal(signal.SIGHUP, before)


def test_an_output_that_is_a_link_is_told_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing is written through links, and what was paid for would have nowhere to go."""
    from rlaif_ray.config.load import load_job

    monkeypatch.chdir(tmp_path)
    Path("pairs.jsonl").write_text('{"prompt": "a?", "response_a": "b", "response_b": "cc"}\n')
    Path("link.jsonl").symlink_to(tmp_path / "large disk.jsonl")
    settings = ["data.path=pairs.jsonl", "judge={type: longer}", "output=link.jsonl", "run_dir=own"]
    with pytest.raises(InputError, match=r"output must be a file \(got link.jsonl, a link to .*large disk.jsonl\)"):
        import_module("rlaif_ray.pipelines.preferences").make_labels(load_job("label", [], settings))
    assert not Path("own").exists()
