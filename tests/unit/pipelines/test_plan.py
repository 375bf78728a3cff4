"""`rlaif plan` as a user meets it: exit codes, what it prints, whose config it is, where a model's shape is from."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
from typer.testing import CliRunner

from rlaif_ray.cli import app
from rlaif_ray.config.sections import JudgeConfig, PolicyConfig
from rlaif_ray.errors import InputError
from rlaif_ray.pipelines.plan import ShapeFinder, job_of, sizes_of
from tests.tiny import cached_tiny_model

CONFIGS = Path(__file__).parents[3] / "configs"
PIPELINES = [[CONFIGS / "pipelines/8gpu.yaml"], [CONFIGS / "pipelines/8gpu.yaml", CONFIGS / "pipelines/nodes.yaml"]]
REFERENCE = [[file] for file in sorted((CONFIGS / "reference").glob("*.yaml"))]
CLUSTER = {  # GPUs that Ray hands out, and nodes
    "1gpu": (1, [{"rollout": 1, "judge": 1, "learner": 1}]),
    "8gpu": (8, [{"judge": 1, "rollout": 2, "learner": 4}]),
    "8gpu-colocated": (8, [{"rollout": 8, "judge": 8, "learner": 8}]),
    "nodes": (40, [{"rollout": 1}, {"judge": 1}, {"learner": 8}, {"learner": 8}, {"learner": 8}]),
}


def rlaif_plan(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def as_json(*arguments: object) -> tuple[int, dict[str, Any]]:
    result = rlaif_plan(*arguments, "--json")
    assert result.stderr == ""
    return result.exit_code, json.loads(result.stdout)


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)


@pytest.mark.parametrize("files", [*PIPELINES, *REFERENCE], ids=lambda files: files[-1].stem)
def test_shipped_pipelines_fit(files: list[Path]) -> None:
    code, told = as_json(*files)
    assert (code, told["fits"]) == (0, True)
    assert all(job["fits"] and job["phases"] for job in told["jobs"])


@pytest.mark.parametrize("name", CLUSTER)
def test_cluster_configs_fit_on_the_gpus_that_they_name(name: str) -> None:
    code, told = as_json(CONFIGS / f"cluster/{name}.yaml")
    (job,) = told["jobs"]
    (phase,) = job["phases"]
    assert code == 0 and (phase["gpus"], phase["nodes"]) == CLUSTER[name]
    assert all(actors["holds"].get("sequences", 16) >= 16 for actors in phase["actors"])  # engines batch


def test_every_cluster_config_is_planned() -> None:
    assert {file.stem for file in (CONFIGS / "cluster").glob("*.yaml")} == set(CLUSTER)


def test_the_smaller_setting_that_1gpu_names_fits_on_24_gb() -> None:
    file = CONFIGS / "cluster/1gpu.yaml"
    line = next(line for line in file.read_text().splitlines() if line.startswith("#   policy.model"))
    assert as_json(file, *line.removeprefix("#").split(), "--gpu-memory", 24)[0] == 0
    assert as_json(file, "--gpu-memory", 24)[0] == 1


def test_what_does_not_fit_ends_with_1_and_names_settings_that_do() -> None:
    file, wrong = CONFIGS / "cluster/8gpu.yaml", ["learner.zero_stage=1", "learner.ranks=4"]
    result = rlaif_plan(file, *wrong)
    assert result.exit_code == 1
    assert "DOES NOT FIT   learner needs " in result.stdout
    fixes = [line.split()[2:] for line in result.stdout.splitlines() if line.startswith("  would fit ")]
    assert fixes
    for fix in fixes:
        assert as_json(file, *wrong, *fix)[0] == 0


def test_settings_for_a_stage_can_be_typed_as_they_are_proposed() -> None:
    files = PIPELINES[1]
    code, told = as_json(*files, "stages.d-rlaif.learner.ranks=16")
    (wrong,) = [job for job in told["jobs"] if not job["fits"]]
    assert code == 1 and wrong["name"] == "d-rlaif"
    fixes = [[f"{key}={value}" for key, value in one.items()] for one in wrong["proposals"]]
    assert ["stages.d-rlaif.learner.offload.optimizer=cpu"] in fixes and ["stages.d-rlaif.learner.ranks=32"] in fixes
    assert all(as_json(*files, *fix)[0] == 0 for fix in fixes)


def test_a_stages_model_is_as_large_as_what_it_was_trained_from() -> None:
    _, told = as_json(*PIPELINES[1])
    stages = {job["name"]: job for job in told["jobs"]}
    rlaif = {actors["role"]: actors["parameters"] for actors in stages["rlaif"]["phases"][0]["actors"]}
    assert rlaif == {"rollout": 70_553_706_496, "reward_model": 8_030_261_248, "learner": 70_553_706_496}
    assert [phase["name"] for phase in stages["evaluate"]["phases"]] == [
        *(f"arm {arm}" for arm in ("sft", "rlaif", "d-rlaif", "dpo", "best-of-8-sft", "teacher-sft")),
        "judge",
    ]


@pytest.mark.parametrize(
    ("file", "options", "size", "seconds"),
    [
        ("cluster/8gpu.yaml", [], 7_615_616_512 * 2, {"nccl over NVLink": 15.231 / 200}),
        ("cluster/8gpu.yaml", ["--bandwidth", 50], 7_615_616_512 * 2, {"nccl over NVLink": 15.231 / 50}),
        ("cluster/8gpu-colocated.yaml", [], 7_615_616_512 * 2, {"ipc": 15.231 * (7 / 8 / 200 + 1 / 300)}),
        ("cluster/nodes.yaml", [], 70_553_706_496 * 2, {"nccl over RDMA": 3.5277, "nccl over TCP": 47.0358}),
        ("cluster/nodes.yaml", ["--bandwidth", 40], 70_553_706_496 * 2, {"nccl over the network": 5.8795}),
        ("demo/train.yaml", ["cluster.device=cpu"], 134_515_008 * 4, {"shm": 0.53806 / 0.6}),
    ],
)
def test_weight_sync(file: str, options: list[Any], size: int, seconds: dict[str, float]) -> None:
    _, told = as_json(CONFIGS / file, *options)
    sync = told["jobs"][0]["sync"]
    assert sync["bytes"] == size
    assert {way["by"]: way["seconds"] for way in sync["routes"]} == {
        k: pytest.approx(v, 1e-3) for k, v in seconds.items()
    }


def test_tables_show_every_role_and_part() -> None:
    result = rlaif_plan(CONFIGS / "cluster/8gpu.yaml")
    for word in ("rollout", "judge", "learner", "KV cache", "optimizer", "reference", "activations", "logits"):
        assert word in result.stdout
    assert "8 GPUs on nodes of 8: 1 x (1 judge, 2 rollout, 4 learner)" in result.stdout
    assert "weight sync    15.23 GB a step, 0.08 s by nccl over NVLink at 200 GB/s" in result.stdout


def test_help_says_what_the_exit_codes_mean() -> None:
    told = " ".join(rlaif_plan("--help").stdout.replace("│", " ").split())
    assert "Exit code 0: it fits; 1: it doesn't" in told and "2: wrong input" in told


@pytest.mark.parametrize(
    ("file", "job"),
    [
        ("demo/train.yaml", "train"),
        ("demo/pairs.yaml", "pairs"),
        ("demo/sft.yaml", "sft"),
        ("demo/reward_model.yaml", "reward-model"),
        ("demo/dpo.yaml", "dpo"),
        ("demo/label.yaml", "label"),
        ("demo/revise.yaml", "revise"),
        ("demo/evaluate.yaml", "evaluate"),
        ("demo/alignment.yaml", "evaluate"),
        ("demo/best_of_n.yaml", "sample"),
        ("demo/pipeline.yaml", "pipeline"),
        ("cluster/nodes.yaml", "train"),
    ],
)
def test_which_job_a_config_is_of(file: str, job: str) -> None:
    assert job_of([CONFIGS / file], []) == job


def test_where_it_cant_be_told_the_job_is_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text("policy: {model: Qwen/Qwen2.5-7B}\ndata: {path: prompts.jsonl}\n")
    result = rlaif_plan(file)
    assert result.exit_code == 2 and "say it with --job" in result.stderr
    assert as_json(file, "--job", "pairs")[0] == 0
    wrong = rlaif_plan(file, "--job", "trian")
    assert wrong.exit_code == 2 and "--job must be a job (got 'trian'): choose among train, pairs" in wrong.stderr


def test_an_unknown_model_is_wrong_input_with_its_remedy() -> None:
    arguments = [CONFIGS / "cluster/8gpu.yaml", "policy.model=org/new-9b"]
    result = rlaif_plan(*arguments)
    assert result.exit_code == 2
    assert "say how large it is: --model-params org/new-9b=7e9" in result.stderr
    code, told = as_json(*arguments, "--model-params", "org/new-9b=9e9")
    assert code == 0 and told["jobs"][0]["phases"][0]["actors"][0]["parameters"] == 9 * 10**9


@pytest.mark.parametrize("text", ["9e9", "x=", "x=-1", "=5", "x=many"])
def test_wrong_sizes(text: str) -> None:
    with pytest.raises(InputError, match="--model-params must be NAME=COUNT"):
        sizes_of([text])


def test_a_model_that_is_here_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = cached_tiny_model(tied=False)
    shape = ShapeFinder({})(PolicyConfig(model=str(folder)))
    assert (shape.layers, shape.hidden, shape.vocabulary) == (2, 64, 320)
    # The hub's cache: as huggingface_hub lays it out.
    snapshot = tmp_path / "models--Qwen--Qwen2.5-7B/snapshots/abc"
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text((folder / "config.json").read_text())
    (tmp_path / "models--Qwen--Qwen2.5-7B/refs").mkdir()
    (tmp_path / "models--Qwen--Qwen2.5-7B/refs/main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    cached = ShapeFinder({})(PolicyConfig(model="Qwen/Qwen2.5-7B"))
    assert shape.stored is not None and cached == replace(shape, stored=None)  # its files aren't there


def test_a_judge_of_another_family_is_planned_by_its_files(tmp_path: Path) -> None:
    """A policy of one isn't: what a learner holds of it is not known."""
    import torch
    from safetensors.torch import save_file

    sizes = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 100}
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "mixtral", "num_key_value_heads": 2, **sizes}))
    save_file({"w": torch.zeros(700, 10)}, tmp_path / "model.safetensors")
    shape = ShapeFinder({})(JudgeConfig(model=str(tmp_path)))
    assert (shape.family, shape.loaded(2)) == ("other", 14_000)
    with pytest.raises(InputError, match="--model-params"):
        ShapeFinder({})(PolicyConfig(model=str(tmp_path)))


def test_sizes_beside_rates_can_be_divided() -> None:
    """Bytes by 10^9 as the rates are; everything else by 2^30, and named so."""
    told = rlaif_plan(CONFIGS / "cluster/nodes.yaml").stdout
    size, seconds, rate = re.search(r"checkpoint +(\S+) GB, (\S+) s at (\S+) GB/s", told).groups()  # type: ignore[union-attr]
    assert float(size) / float(rate) == pytest.approx(float(seconds), rel=2e-3)
    size, seconds, rate = re.search(r"sync +(\S+) GB a step, (\S+) s by nccl over RDMA at (\S+) GB/s", told).groups()  # type: ignore[union-attr]
    assert float(size) / float(rate) == pytest.approx(float(seconds), rel=2e-3)
    assert not re.search(r"[0-9] GB(?! a step|,|/s)", told) and "GPUs of 79.12 GiB, which is 98.9% of" in told
    assert "The object store is a local Ray's" in " ".join(told.split())


def test_a_job_without_actors_fits(tmp_path: Path) -> None:
    file = tmp_path / "label.yaml"
    file.write_text("data: {path: x.jsonl}\njudge: {type: longer}\n")
    result = rlaif_plan(file)
    assert result.exit_code == 0 and "label: nothing on GPUs" in result.stdout


def test_on_cpus_of_this_machine_its_memory_counts() -> None:
    """24 ranks of 70 billion weights take terabytes there, on one node; of others the flag says what they have."""
    arguments = [CONFIGS / "cluster/nodes.yaml", "cluster.device=cpu"]
    code, told = as_json(*arguments)
    (job,) = told["jobs"]
    learner = job["phases"][0]["actors"][-1]
    assert code == 1 and learner["bytes_per_gpu"]["weights"] == -(-70_553_706_496 // 24) * 4
    assert "CUDA" not in learner["bytes_per_gpu"]
    assert job["host_bytes"] == psutil.virtual_memory().total
    (problem,) = job["phases"][0]["problems"]
    assert problem.startswith("a node with 1 rollout, 24 learner, 1 judge needs ") and "host memory" in problem
    assert as_json(*arguments, "--host-memory", 100_000)[0] == 0
    elsewhere = as_json(*arguments, "cluster.address=head:6379")
    assert (elsewhere[0], elsewhere[1]["jobs"][0]["host_bytes"]) == (0, None)


def test_host_memory_of_gpu_nodes_is_what_the_flag_says() -> None:
    file = CONFIGS / "cluster/nodes.yaml"
    code, told = as_json(file)
    assert code == 0 and told["jobs"][0]["host_bytes"] is None
    assert "Host memory is checked with --host-memory alone." in told["assumed"][0]
    short = rlaif_plan(file, "--host-memory", 256)
    assert short.exit_code == 1
    assert (
        "DOES NOT FIT   a node with 8 learner needs 279.1 GiB of host memory, most of it for checkpoint" in short.stdout
    )
    assert (
        "host memory    279.13 GiB of 256.00 GiB a node: processes 16.00 GiB, checkpoint copies 262.83 GiB"
        in short.stdout
    )
    assert as_json(file, "--host-memory", 280)[0] == 0


def test_a_checkpoint_that_takes_longer_than_its_grace_is_told() -> None:
    """12 bytes of 70.6 billion parameters at 2 GB/s: 423 s, and one that is under way ends first."""
    file = CONFIGS / "cluster/nodes.yaml"
    result = rlaif_plan(file, "checkpoint.grace_s=90")
    assert result.exit_code == 0
    assert (
        "checkpoint     846.64 GB, 423 s at 2 GB/s; after a SIGTERM checkpoint.grace_s=90 may be too short: use 900, "
        "910 for launch/end_jobs.py (the pods' preStop), and 930 for launch/submit.py --stop-wait, "
        "RAY_JOB_STOP_WAIT_TIME_S, Slurm's --signal, terminationGracePeriodSeconds and docker's --stop-timeout"
        in result.stdout
    )
    enough = rlaif_plan(file).stdout
    assert "423 s at 2 GB/s, within checkpoint.grace_s=900 after a SIGTERM" in enough
    _, told = as_json(file, "--disk-bandwidth", 20)
    cost = told["jobs"][0]["checkpoint"]
    assert cost["bytes"] == 24 * 12 * -(-70_553_706_496 // 24) and cost["seconds"] == pytest.approx(42.3, abs=0.1)
    assert (cost["gb_per_s"], cost["grace_s"], cost["needed_grace_s"], cost["cluster_grace_s"]) == (20, 900, 120, 930)


def test_no_network_is_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    import socket

    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a connection was opened")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert as_json(CONFIGS / "pipelines/8gpu.yaml")[0] == 0
    assert rlaif_plan(CONFIGS / "cluster/8gpu.yaml", "policy.model=org/new").exit_code == 2


def test_neither_vllm_nor_deepspeed_is_loaded() -> None:
    import subprocess

    code = "import sys; from rlaif_ray.cli import app; app(sys.argv[1:], standalone_mode=False)"
    code += "; print([m for m in ('vllm', 'deepspeed') if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code, "plan", str(CONFIGS / "cluster/8gpu.yaml")], capture_output=True, text=True
    )
    assert "[]" in done.stdout.splitlines()[-1], done.stdout + done.stderr
