"""Real signals to processes of a real run, in every phase: it goes on, and nothing is lost, stale or left behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from tests.pace import scaled
from tests.ray.test_train import repeatable, weights_hash
from tests.runs import Program, finish_train, rows, start, start_train, tiny_config
from tests.tiny import cached_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long, pytest.mark.timeout(2400)]

SILENT_S = round(scaled(10))
SHORT = (
    "evaluation.held_out.path=null",
    "tracking.wandb=disabled",  # seconds of every start; test_train has it, killed and resumed too
    f"cluster.silent_after_s={SILENT_S}",
    f"cluster.start_timeout_s={scaled(120):.0f}",
)

# (phase, who, signal): one after the other in one run, each with every replica there.
ENGINE_FAULTS = [
    ("rollout", "rollout engine 0", "SIGKILL"),
    ("feedback", "judge engine 0", "SIGKILL"),
    ("weight_sync", "rollout engine 1", "SIGKILL"),
    ("rollout", "rollout engine 1", "SIGSTOP"),
    ("update", "rollout engine 0", "SIGKILL"),
    ("feedback", "judge engine 0", "SIGSTOP"),
    ("weight_sync", "rollout engine 0", "SIGSTOP"),
    ("rollout", "judge engine 0", "SIGKILL"),
    ("checkpoint", "rollout engine 1", "SIGKILL"),
    ("rollout", "rollout engine", "SIGKILL"),  # both
]
LEARNER_FAULTS = [
    ("update", "learner rank 0", "SIGKILL"),
    ("annotate", "learner rank 0", "SIGSTOP"),
    ("weight_sync", "learner rank 0", "SIGKILL"),
    ("rollout", "learner rank 0", "SIGKILL"),
    ("checkpoint", "learner rank 0", "SIGKILL"),
]

# A reward model in place of the judge, two learner ranks that share their optimizer states, and vLLM's engine core in
# a process of its own, as it is where an engine has several GPUs.
MIXED_FAULTS = [
    ("rollout", "core of rollout engine 0", "SIGKILL"),
    ("feedback", "reward_model 0", "SIGKILL"),
    ("update", "learner rank 1", "SIGKILL"),
    ("rollout", "core of rollout engine 0", "SIGSTOP"),
    ("feedback", "reward_model 0", "SIGSTOP"),
    ("annotate", "learner rank 0", "SIGSTOP"),
    ("weight_sync", "core of rollout engine 0", "SIGKILL"),
    ("checkpoint", "learner rank 1", "SIGKILL"),
    ("weight_sync", "learner rank 1", "SIGSTOP"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def config(folder: Path) -> Path:
    return tiny_config(folder)


def faulty(
    run_dir: Path,
    faults: list[dict[str, Any]],
    *arguments: str | Path,
    job: str = "train",
    environment: Mapping[str, str] | None = None,
) -> Program:
    """A run with faults, ended; nothing of it lives on."""
    command = [sys.executable, "-m", "tests.faults", json.dumps(faults), job, run_dir, *arguments]
    program = start(command, run_dir.with_suffix(".out"), environment)
    try:
        return program.wait(1800)
    finally:
        program.kill()


def timed(faults: list[tuple[str, str, str]], every: int) -> list[dict[str, Any]]:
    return [
        {"step": every * (k + 1), "phase": phase, "who": who, "signal": name}
        for k, (phase, who, name) in enumerate(faults)
    ]


def struck(run_dir: Path) -> list[dict[str, Any]]:
    return rows(run_dir.with_name(f"{run_dir.name}.faults.jsonl"))


def assert_whole(run_dir: Path, steps: int) -> None:
    """Every step once, with every prompt of an epoch once, sampled from the weights of the step before, all scored."""
    metrics, samples = rows(run_dir / "metrics.jsonl"), rows(run_dir / "samples.jsonl")
    assert [row["step"] for row in metrics] == list(range(1, steps + 1))
    assert [row["weights/version"] for row in metrics] == list(range(1, steps + 1))
    assert [(row["step"], row["weight_version"], row["failure"]) for row in samples] == [
        (step, step - 1, None) for step in range(1, steps + 1) for _ in range(8)
    ]
    for first in range(1, steps - 1, 3):  # 12 prompts, 4 a step
        asked = [row["prompt_id"] for row in samples if first <= row["step"] < first + 3]
        assert sorted(set(asked)) == [f"train-{k:04}" for k in range(1, 13)] and len(asked) == 24


def differing(ours: dict[str, Any], theirs: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    """What two rows of one step tell differently, but for how long things took and who did them."""
    engines = {"rollout/lost", "rollout/serving"}  # one that was left with half an update is replaced
    ours, theirs = ({k: v for k, v in repeatable(row).items() if k not in engines} for row in (ours, theirs))
    return {k: (ours.get(k), theirs.get(k)) for k in ours.keys() | theirs.keys() if ours.get(k) != theirs.get(k)}


def assert_noticed(run_dir: Path, silent_s: float = SILENT_S) -> None:
    """A dead one within 5 s, a silent one within its deadline and 5 more."""
    for fault in rows(run_dir.with_name(f"{run_dir.name}.faults.followed.jsonl")):
        print(fault)
        assert fault["noticed_s"] < (0 if fault["signal"] == "SIGKILL" else silent_s) + scaled(5), fault


class TestEngines:
    @pytest.fixture(scope="class")
    def run(self, folder: Path, config: Path) -> tuple[Path, Program, int]:
        steps = 2 * len(ENGINE_FAULTS) + 1
        run_dir = folder / "engines"
        settings = ("rollout.replicas=2", f"steps={steps}", "checkpoint.every=2")
        return run_dir, faulty(run_dir, timed(ENGINE_FAULTS, 2), config, *SHORT, *settings), steps

    def test_it_ends_well_and_leaves_nothing_behind(self, run: tuple[Path, Program, int]) -> None:
        _, program, _ = run
        assert program.exit_code == 0, program.stderr + program.stdout
        assert program.left_over == []

    def test_every_fault_met_its_process(self, run: tuple[Path, Program, int]) -> None:
        found = struck(run[0])
        assert [(f["phase"], f["who"], f["signal"]) for f in found] == ENGINE_FAULTS
        assert [len(f["pids"]) for f in found] == [1] * (len(ENGINE_FAULTS) - 1) + [2]

    def test_nothing_is_lost_or_stale(self, run: tuple[Path, Program, int]) -> None:
        run_dir, _, steps = run
        assert_whole(run_dir, steps)

    def test_losses_are_noticed_in_time(self, run: tuple[Path, Program, int]) -> None:
        assert_noticed(run[0])
        assert (
            len(rows(run[0].with_name("engines.faults.followed.jsonl"))) >= len(ENGINE_FAULTS) - 2
        )  # the last may end

    def test_steps_go_on_while_a_replica_is_left(self, run: tuple[Path, Program, int]) -> None:
        metrics = {row["step"]: row for row in rows(run[0] / "metrics.jsonl")}
        assert metrics[2]["rollout/serving"] == metrics[3]["rollout/serving"] == 1  # of two, one is starting
        assert metrics[1]["rollout/serving"] == 2
        assert metrics[21]["rollout/lost"] == sum(who.startswith("rollout") for _, who, _ in ENGINE_FAULTS) + 1
        assert metrics[21]["rollout/quarantined"] == 0

    def test_it_says_what_happened(self, run: tuple[Path, Program, int]) -> None:
        text = run[1].stdout
        assert "rollout engine 0 died" in text and "starting another" in text
        assert "rollout engine 1 gave no sign of life for" in text
        assert "no judge engine is left: waiting for a new one" in text and "is ready again" in text


class TestLearner:
    """A lost learner goes on from the last checkpoint, to the same end as a run without the fault."""

    @pytest.fixture(scope="class")
    def runs(self, folder: Path, config: Path) -> tuple[Path, Program, Path]:
        # No engine may be taken for a silent one on a busy machine: its requests, tried alone, have other last bits.
        patient = f"cluster.silent_after_s={3 * SILENT_S}"
        settings = (*SHORT, patient, "steps=12", "checkpoint.every=2", "cluster.learner_restarts=9")
        straight, run_dir = folder / "straight", folder / "learner"
        without = finish_train(config, *settings, run_dir=straight)
        assert without.exit_code == 0, without.stderr
        return run_dir, faulty(run_dir, timed(LEARNER_FAULTS, 2), config, *settings), straight

    def test_it_ends_well_and_leaves_nothing_behind(self, runs: tuple[Path, Program, Path]) -> None:
        run_dir, program, _ = runs
        assert program.exit_code == 0, program.stderr + program.stdout
        assert program.left_over == []
        assert [(f["phase"], f["who"], f["signal"]) for f in struck(run_dir)] == LEARNER_FAULTS
        assert all(len(f["pids"]) == 1 for f in struck(run_dir))
        assert_noticed(run_dir, 3 * SILENT_S)
        assert program.stdout.count("starting the learner again from step") == len(LEARNER_FAULTS)

    def test_the_end_is_that_of_a_run_without_faults(self, runs: tuple[Path, Program, Path]) -> None:
        run_dir, _, straight = runs
        assert_whole(run_dir, 12)
        pairs = zip(rows(run_dir / "metrics.jsonl"), rows(straight / "metrics.jsonl"), strict=True)
        assert [differing(ours, theirs) for ours, theirs in pairs] == [{}] * 12
        assert rows(run_dir / "samples.jsonl") == rows(straight / "samples.jsonl")
        assert weights_hash(run_dir) == weights_hash(straight)


class TestMixed:
    """Several ranks, engines of several processes, a reward model."""

    STEPS = 2 * len(MIXED_FAULTS) + 1

    @pytest.fixture(scope="class")
    def run(self, folder: Path, config: Path) -> tuple[Path, Program]:
        feedback = f"feedback={{type: reward_model, model: {reward_model(folder / 'reward_model')}}}"
        layout = ("learner.ranks=2", "learner.zero_stage=2", feedback, "cluster.learner_restarts=9")
        settings = (*SHORT, *layout, f"steps={self.STEPS}", "checkpoint.every=2")
        run_dir = folder / "mixed"
        environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
        return run_dir, faulty(run_dir, timed(MIXED_FAULTS, 2), config, *settings, environment=environment)

    def test_it_ends_well_and_leaves_nothing_behind(self, run: tuple[Path, Program]) -> None:
        run_dir, program = run
        assert program.exit_code == 0, program.stderr + program.stdout
        assert program.left_over == []
        assert [(f["phase"], f["who"], f["signal"]) for f in struck(run_dir)] == MIXED_FAULTS
        assert all(len(f["pids"]) == 1 for f in struck(run_dir))

    def test_nothing_is_lost_or_stale(self, run: tuple[Path, Program]) -> None:
        run_dir, _ = run
        assert_whole(run_dir, self.STEPS)
        assert rows(run_dir / "metrics.jsonl")[-1]["rollout/quarantined"] == 0

    def test_losses_are_noticed_in_time(self, run: tuple[Path, Program]) -> None:
        assert_noticed(run[0])

    def test_it_says_what_happened(self, run: tuple[Path, Program]) -> None:
        text = run[1].stdout
        assert text.count("rollout engine 0 lost its process VLLM::EngineCore") >= 2  # at once, not by its silence
        assert "rollout engine 0 made no progress for" in text
        assert "learner rank 0 gave no sign of life for" in text and "learner rank 1 died" in text
        assert "reward_model 0 died" in text and "reward_model 0 gave no sign of life for" in text


def reward_model(target: Path) -> Path:
    """A random one."""
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    base = cached_tiny_model(tied=True, context=4096)
    torch.manual_seed(0)
    AutoModelForSequenceClassification.from_pretrained(base, num_labels=1, dtype=torch.float32).save_pretrained(target)
    AutoTokenizer.from_pretrained(base).save_pretrained(target)
    return target


def test_fine_tuning_goes_on_too(folder: Path) -> None:
    data = folder / "turns.jsonl"
    turns = [
        {"messages": [{"role": "user", "content": f"What is {k}?"}, {"role": "assistant", "content": f"It is {k}."}]}
        for k in range(24)
    ]
    data.write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    config = folder / "sft.yaml"
    config.write_text(
        f"policy: {{model: {cached_tiny_model(tied=True, context=4096)}}}\n"
        f"data: {{path: {data}}}\n"
        "sft: {batch_size: 6, epochs: 1, held_out_fraction: 0.2}\n"
        "learner: {lr: 1.0e-3, ranks: 2, zero_stage: 2}\n"
        "checkpoint: {every: 2, background: false}\n"
        "cluster: {address: local}\n"
    )
    faults = [
        {"step": 3, "phase": "update", "who": "learner rank 1", "signal": "SIGKILL"},
        {"step": 4, "phase": "saving the policy", "who": "learner rank 0", "signal": "SIGKILL"},
    ]
    programs = [
        faulty(folder / "sft", [], config, job="sft"),
        faulty(folder / "sft-faults", faults, config, job="sft"),
    ]
    for program in programs:
        assert program.exit_code == 0, program.stderr
        assert program.left_over == []
    assert len(struck(folder / "sft-faults")) == 2
    assert "starting the learner again from step 2" in programs[1].stdout
    assert "starting the learner again from step 4" in programs[1].stdout
    without, ours = (
        ([repeatable(row) for row in rows(folder / name / "metrics.jsonl")], rows(folder / name / "evaluations.jsonl"))
        for name in ("sft", "sft-faults")
    )
    assert ours == without and [row["step"] for row in ours[1]] == [4]
    assert weights_hash(folder / "sft-faults") == weights_hash(folder / "sft")


def test_a_learner_that_is_lost_too_often_ends_the_run(folder: Path, config: Path) -> None:
    run_dir = folder / "often"
    faults = [{"step": 2, "phase": "update", "who": "learner rank 0", "signal": "SIGKILL"}]
    program = faulty(run_dir, faults, config, *SHORT, "cluster.learner_restarts=0", "checkpoint.every=1")
    assert program.exit_code == 1
    assert "LearnerLostError" in program.stderr and "learner ranks (update)" in program.stderr
    assert program.left_over == []
    assert [row["step"] for row in rows(run_dir / "metrics.jsonl")] == [1]


def test_the_run_ends_when_no_replica_comes_back(folder: Path, config: Path) -> None:
    """With a checkpoint of the last step, from which it goes on once there is one again."""
    run_dir = folder / "gone"
    faults = [{"step": 3, "phase": "feedback", "who": "judge engine 0", "signal": "SIGKILL", "forever": True}]
    program = faulty(run_dir, faults, config, *SHORT, "checkpoint.every=0", "steps=4")
    assert program.exit_code == 1
    assert "ReplicasLostError: no judge engine is left and no new one came" in program.stderr
    assert "judge engine 0" in program.stderr and "given up after 3 starts" in program.stdout
    assert program.left_over == []
    assert [path.name for path in (run_dir / "checkpoints").iterdir()] == ["step-2"]
    again = finish_train(config, *SHORT, "checkpoint.every=0", "steps=4", run_dir=run_dir)
    assert again.exit_code == 0, again.stderr
    assert_whole(run_dir, 4)


def test_a_signal_to_end_writes_a_checkpoint_that_resumes(folder: Path, config: Path) -> None:
    """At once, without waiting for the step, and with nothing to do twice: first SIGTERM, as when a scheduler takes the
    node; then SIGHUP to the whole foreground job, Ray's processes too, as when the terminal is gone.
    """
    run_dir = folder / "ended"
    settings = (*SHORT, "steps=400", "checkpoint.every=0", "sampling.max_new_tokens=40")
    program, last = ended_by(lambda one: one.process.send_signal(signal.SIGTERM), config, *settings, run_dir=run_dir)
    assert "resumed from" not in program.stdout
    again, then = ended_by(
        lambda one: os.killpg(one.process.pid, signal.SIGHUP), config, *settings, run_dir=run_dir, after=last + 1
    )
    assert f"step-{last}" in again.stdout and then > last
    assert_whole(run_dir, then)


def ended_by(
    end: Callable[[Program], None], config: Path, *settings: str, run_dir: Path, after: int = 2
) -> tuple[Program, int]:
    """A run that is ended once so many steps are done; that, and the step whose checkpoint it left."""
    program = start_train(config, *settings, run_dir=run_dir)
    try:
        program.wait_for(lambda: len(rows(run_dir / "metrics.jsonl")) >= after)
        end(program)
        program.wait(60)
    finally:
        program.kill()
    assert program.exit_code == 130, program.stderr
    assert program.left_over == []
    last = rows(run_dir / "metrics.jsonl")[-1]["step"]
    assert f"step-{last}" in [path.name for path in (run_dir / "checkpoints").iterdir()]
    return program, last


class PretendedMemory:
    """/proc/meminfo of a program and all that it starts, with another figure of what is available."""

    def __init__(self, folder: Path) -> None:
        self._file = folder / "meminfo"
        self._file.write_text(Path("/proc/meminfo").read_text())

    def around(self, command: list[str | Path]) -> list[str | Path]:
        """The command, in a mount namespace of its own; skips the test where there can be none."""
        mounting = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" /proc/meminfo && exec "$@"', self._file]
        if shutil.which("unshare") is None or subprocess.run([*mounting, "true"], capture_output=True).returncode:
            pytest.skip("needs the right to mount in a namespace of its own")
        return [*mounting, *command]

    def set_available(self, share: float) -> None:
        """Of all memory. Written in place, since a mount is of the file and not of its name."""
        text = self._file.read_text()
        (total,) = re.findall(r"^MemTotal: +(\d+) kB", text, re.M)
        (old,) = re.findall(r"^MemAvailable:( +\d+) kB", text, re.M)
        new = f"{int(int(total) * share):>{len(old)}}"  # of one length: nothing of the file before stays behind it
        with self._file.open("r+") as file:
            file.write(text.replace(f"MemAvailable:{old}", f"MemAvailable:{new}"))


def test_a_node_whose_memory_runs_low(folder: Path, config: Path) -> None:
    """Ray's memory monitor then ends an actor, and tells of it in another way than of one that died."""
    run_dir, memory = folder / "low", PretendedMemory(folder)
    memory.set_available(0.8)
    words: list[str | Path] = [
        config,
        *SHORT,
        "rollout.replicas=2",
        "checkpoint.every=1",
        "steps=20",
        f"run_dir={run_dir}",
    ]
    program = start(
        memory.around([Path(sys.executable).with_name("rlaif"), "train", *words]), run_dir.with_suffix(".out")
    )
    try:
        program.wait_for(lambda: len(rows(run_dir / "metrics.jsonl")) >= 3)
        memory.set_available(0.02)
        program.wait_for(lambda: "memory ran low" in program.stdout, timeout_s=60)
        memory.set_available(0.8)
        program.wait()
    finally:
        program.kill()
    assert program.exit_code == 0, program.stderr + program.stdout
    assert program.left_over == []
    assert re.search(r"was ended by Ray, since memory ran low \(\S+ used / \S+ limit\)", program.stdout)
    assert_whole(run_dir, 20)
