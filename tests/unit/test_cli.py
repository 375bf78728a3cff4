"""The `rlaif` program: exit codes, what it prints, and that it is light until a job starts."""

from __future__ import annotations

import shlex
import subprocess
import sys
import time
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from typer.testing import CliRunner

from rlaif_ray import cli
from rlaif_ray.cli import app
from rlaif_ray.config.jobs import JOBS
from rlaif_ray.config.load import Loaded, load_job
from rlaif_ray.errors import InputError, StaleWeightsError
from tests.jobs import TRAIN
from tests.pace import scaled

HEAVY = ("torch", "ray", "vllm", "deepspeed", "transformers", "datasets", "wandb")


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A config file in the working folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RLAIF_DEBUG", raising=False)
    Path("my train.yaml").write_text(f"{TRAIN}steps: 3\n")
    return Path("my train.yaml")


Pipeline = Callable[[Callable[[Loaded], Any]], None]


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Pipeline:
    """Puts a function in the place of `train_rl`; `plan_rl` says "the plan"."""

    def replace(train_rl: Callable[[Loaded], Any]) -> None:
        module = ModuleType("rlaif_ray.pipelines.rl")
        module.train_rl = train_rl  # type: ignore[attr-defined]
        module.plan_rl = lambda loaded: f"the plan of {loaded.config.steps} steps"  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, "rlaif_ray.pipelines.rl", module)

    return replace


def rlaif(*arguments: object) -> Any:
    return CliRunner().invoke(app, [str(argument) for argument in arguments])


class FakeTaskError(Exception):
    """Looks like Ray's RayTaskError: the actor's exception is its `cause`, its text a remote traceback."""

    def __init__(self, cause: Exception) -> None:
        super().__init__(f"\x1b[36mray::Actor.verb()\x1b[39m\nTraceback (most recent call last):\n{cause}")
        self.cause = cause


def raising(error: BaseException) -> Callable[[Loaded], Any]:
    def train_rl(loaded: Loaded) -> None:
        raise error

    return train_rl


def test_a_run_gets_the_loaded_config_and_ends_with_0(config: Path, pipeline: Pipeline) -> None:
    seen: list[Loaded] = []
    pipeline(seen.append)
    result = rlaif("train", config, "learner.lr=1e-3", "run_dir=here")
    assert (result.exit_code, result.stderr) == (0, "")
    assert seen[0].config.steps == 3 and seen[0].config.learner.lr == 1e-3
    assert seen[0].run_dir == Path("here")


def test_a_dry_run_prints_config_and_plan_and_starts_nothing(config: Path, pipeline: Pipeline) -> None:
    pipeline(raising(AssertionError("started")))
    result = rlaif("train", config, "--dry-run", "seed=5", "run_dir=here")
    assert result.exit_code == 0
    assert result.stdout.rstrip().endswith("the plan of 3 steps")
    printed = Path("printed.yaml")
    printed.write_text(result.stdout.rpartition("\nthe plan")[0])
    assert load_job("train", [printed]).config == load_job("train", [config], ["seed=5", "run_dir=here"]).config
    assert not Path("here").exists()


def test_files_and_overrides_are_told_apart(config: Path, pipeline: Pipeline) -> None:
    odd = Path("a=b")
    odd.mkdir()
    (odd / "more.yaml").write_text("seed: 9\n")
    seen: list[Loaded] = []
    pipeline(seen.append)
    assert rlaif("train", "./a=b/more.yaml", "data.path=x=y", config).exit_code == 0
    assert seen[0].files == (Path("a=b/more.yaml"), config)
    assert seen[0].overrides == ("data.path=x=y",)


@pytest.mark.parametrize(
    "wrap", [lambda error: error, FakeTaskError, lambda error: FakeTaskError(FakeTaskError(error))]
)
def test_wrong_input_ends_with_2_also_from_an_actor(config: Path, pipeline: Pipeline, wrap: Any) -> None:
    pipeline(raising(wrap(InputError("data.path is wrong."))))
    result = rlaif("train", config, "run_dir=here")
    assert (result.exit_code, result.stdout, result.stderr) == (2, "", "rlaif: data.path is wrong.\n")
    assert not Path("here").exists()


@pytest.mark.parametrize("wrap", [lambda error: error, FakeTaskError])
def test_a_failed_run_ends_with_1_and_says_how_to_resume(config: Path, pipeline: Pipeline, wrap: Any) -> None:
    error = wrap(StaleWeightsError("engine 1 has version 3, not 4."))
    error.add_note("Ray's logs: /tmp/rlaif-abcdefgh/ray/session_latest/logs")
    pipeline(raising(error))
    result = rlaif("train", config, "data.system=be nice")
    assert result.exit_code == 1
    first, logs, note, resume = result.stderr.splitlines()
    assert note == "  Ray's logs: /tmp/rlaif-abcdefgh/ray/session_latest/logs"
    assert first == "rlaif: train failed: StaleWeightsError: engine 1 has version 3, not 4."
    run_dir = next(Path("runs").iterdir())
    assert str(run_dir) in logs
    words = shlex.split(resume.partition("resume: ")[2])
    assert words == ["rlaif", "train", "my train.yaml", "data.system=be nice", f"run_dir={run_dir}"]


@pytest.mark.parametrize(
    "setting", ["data.system=Never say the admin password=foo aloud", 'data.system="it\'s 2\nlines"']
)
def test_the_resume_command_is_what_was_typed_with_prose(setting: str, config: Path, pipeline: Pipeline) -> None:
    pipeline(raising(StaleWeightsError("x")))
    result = rlaif("train", config, "run_dir=here", setting)
    words = shlex.split(result.stderr.partition("resume: ")[2])
    assert words == ["rlaif", "train", "my train.yaml", "run_dir=here", setting]


def test_the_resume_command_is_what_was_typed_when_run_dir_was_given(config: Path, pipeline: Pipeline) -> None:
    pipeline(raising(StaleWeightsError("x")))
    result = rlaif("train", config, "run_dir=here")
    assert "resume: rlaif train 'my train.yaml' run_dir=here\n" in result.stderr


def test_the_resume_command_resumes_even_a_run_that_was_told_not_to(config: Path, pipeline: Pipeline) -> None:
    pipeline(raising(StaleWeightsError("x")))
    result = rlaif("train", config, "run_dir=here", "checkpoint.resume=never")
    assert "checkpoint.resume=never checkpoint.resume=auto" in result.stderr


def test_an_unexpected_exception_leaves_its_traceback_in_the_run_folder(config: Path, pipeline: Pipeline) -> None:
    pipeline(raising(ZeroDivisionError("one line\nanother")))
    result = rlaif("train", config, "run_dir=here")
    assert result.exit_code == 1
    assert "rlaif: train failed: ZeroDivisionError: one line\n" in result.stderr
    assert "here/error.log" in result.stderr and "Traceback" not in result.stderr
    log = Path("here/error.log").read_text()
    assert "Traceback" in log and "another" in log


def test_a_traceback_that_cannot_be_written_is_shown(config: Path, pipeline: Pipeline) -> None:
    Path("here").write_text("a file where the run's folder should be")
    pipeline(raising(ZeroDivisionError("oops")))
    result = rlaif("train", config, "run_dir=here")
    assert result.exit_code == 1
    assert "Traceback" in result.stderr and "oops" in result.stderr


def test_debug_shows_the_traceback(config: Path, pipeline: Pipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RLAIF_DEBUG", "1")
    pipeline(raising(ZeroDivisionError("oops")))
    assert "Traceback" in rlaif("train", config, "run_dir=here").stderr


def test_an_interrupted_run_ends_with_130(config: Path, pipeline: Pipeline) -> None:
    pipeline(raising(KeyboardInterrupt()))
    result = rlaif("train", config, "run_dir=here")
    assert result.exit_code == 130
    assert result.stderr == "rlaif: interrupted.\n  resume: rlaif train 'my train.yaml' run_dir=here\n"


def test_usage_mistakes_end_with_2(config: Path) -> None:
    for arguments in (["train"], ["trian", config], ["train", config, "--no-such-option"]):
        assert rlaif(*arguments).exit_code == 2


def test_version() -> None:
    result = rlaif("--version")
    assert (result.exit_code, result.stdout) == (0, "rlaif 0.1.0\n")


def test_importing_the_program_imports_nothing_heavy() -> None:
    """Nor does reading a config: a mistake in it must show at once."""
    code = (
        "import sys, rlaif_ray.cli, rlaif_ray.config.load, rlaif_ray.config.resolved, rlaif_ray.config.deepspeed;"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=scaled(60))
    assert (done.stdout, done.stderr) == ("[]\n", "")


def test_help_comes_at_once() -> None:
    fastest = 60.0
    for _ in range(3):  # a busy machine may disturb one of them
        begin = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-m", "rlaif_ray.cli", "--help"], capture_output=True, text=True, timeout=scaled(60)
        )
        fastest = min(fastest, time.perf_counter() - begin)
        assert done.returncode == 0 and "train" in done.stdout
    assert fastest < scaled(1.0)


@pytest.mark.parametrize("job", cli._JOBS.values(), ids=list(cli._JOBS))
def test_a_job_names_functions_that_are_there(job: cli._Job) -> None:
    for function in (job.start, job.plan):
        module, _, name = function.partition(".")
        assert callable(getattr(import_module(f"rlaif_ray.pipelines.{module}"), name))


def test_every_job_has_a_command() -> None:
    assert {*cli._JOBS, "label"} == set(JOBS)
