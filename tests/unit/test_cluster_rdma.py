"""The RDMA variants in cluster/: each is its plain file, what NCCL needs for InfiniBand or RoCE, and nothing else."""

from __future__ import annotations

import copy
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[2]
CLUSTER = ROOT / "cluster"
OVERLAYS = ("kuberay-rdma", "kuberay-rdma-hostnetwork")
KINDS = {"kuberay-rayjob.yaml": "RayJob", "kuberay-raycluster.yaml": "RayCluster"}
DEVICE = "rdma/rdma_shared_device_a"


def kustomization(name: str) -> dict[str, Any]:
    values: dict[str, Any] = yaml.safe_load((CLUSTER / name / "kustomization.yaml").read_text())
    return values


def add(document: Any, path: str, value: Any) -> None:
    """The operation "add" of JSON Patch (RFC 6902), whose paths are JSON Pointers (RFC 6901)."""
    *above, last = [part.replace("~1", "/").replace("~0", "~") for part in path.split("/")[1:]]
    for part in above:
        document = document[int(part)] if isinstance(document, list) else document[part]
    if isinstance(document, list):
        document.insert(len(document) if last == "-" else int(last), value)
    else:
        document[last] = value


def patched(name: str, file: str) -> dict[str, Any]:
    """What an overlay makes of a file."""
    overlay = kustomization(name)
    (below,) = overlay["resources"]
    plain = yaml.safe_load((CLUSTER / file).read_text())
    document: dict[str, Any] = copy.deepcopy(plain) if below.endswith(".yaml") else patched(Path(below).name, file)
    # YAML's anchors make workers and head share objects: a patch is of one place.
    document = yaml.safe_load(yaml.dump(document, Dumper=Unshared))
    for patch in overlay["patches"]:
        if patch["target"] == {"kind": plain["kind"]}:
            for step in yaml.safe_load(patch["patch"]):
                assert step["op"] == "add"
                add(document, step["path"], step["value"])
    return document


class Unshared(yaml.SafeDumper):
    def ignore_aliases(self, data: Any) -> bool:
        return True


def cluster(document: dict[str, Any]) -> dict[str, Any]:
    spec: dict[str, Any] = document["spec"]
    return spec.get("rayClusterSpec", spec)


def worker(document: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The workers' pod and its container."""
    (group,) = cluster(document)["workerGroupSpecs"]
    (container,) = group["template"]["spec"]["containers"]
    return group["template"]["spec"], container


@pytest.mark.parametrize("file", KINDS)
@pytest.mark.parametrize("name", OVERLAYS)
def test_an_overlay_changes_the_workers_alone(name: str, file: str) -> None:
    plain, rdma = yaml.safe_load((CLUSTER / file).read_text()), patched(name, file)
    assert cluster(rdma)["headGroupSpec"] == cluster(plain)["headGroupSpec"]  # no GPU, no NCCL
    pod, container = worker(rdma)
    resources = container["resources"]
    assert resources["requests"] == resources["limits"] and resources["limits"].pop(DEVICE) == "1"
    assert container["securityContext"]["capabilities"] == {"drop": ["ALL"], "add": ["IPC_LOCK"]}
    assert container["securityContext"]["allowPrivilegeEscalation"] is False
    _, before = worker(plain)
    environment = {each["name"]: each.get("value") for each in container["env"]}
    assert container["env"][: len(before["env"])] == before["env"]
    assert environment.items() >= {"NCCL_NET": "IB", "NCCL_DEBUG": "INFO", "NCCL_DEBUG_SUBSYS": "INIT,NET"}.items()
    on_host = name == "kuberay-rdma-hostnetwork"
    assert pod.pop("hostNetwork", False) is on_host
    assert pod.pop("dnsPolicy", None) == ("ClusterFirstWithHostNet" if on_host else None)  # else no name of a service
    assert ({"NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"} <= set(environment)) is on_host
    assert len(container["env"]) == len(before["env"]) + (5 if on_host else 3)
    # With these taken back it is the plain file.
    container["env"] = before["env"]
    del container["securityContext"]["capabilities"]["add"]
    resources["requests"].pop(DEVICE)
    assert rdma == plain


@pytest.mark.parametrize("name", OVERLAYS)
def test_both_kinds_get_the_same_patch(name: str) -> None:
    (job, stays) = kustomization(name)["patches"]
    assert [job["target"], stays["target"]] == [{"kind": "RayJob"}, {"kind": "RayCluster"}]
    assert job["patch"].replace("/spec/rayClusterSpec/workerGroupSpecs", "/spec/workerGroupSpecs") == stays["patch"]
    assert f"launch/kuberay.sh cluster/{name}\n" in (CLUSTER / name / "kustomization.yaml").read_text()


@pytest.mark.parametrize("file", KINDS)
@pytest.mark.parametrize("name", OVERLAYS)
def test_kustomize_builds_what_is_meant(name: str, file: str, tmp_path: Path) -> None:
    kubectl = shutil.which("kubectl")
    if kubectl is None:
        pytest.skip("needs kubectl, whose kustomize builds without a cluster")
    folder = tmp_path / "cluster"
    shutil.copytree(CLUSTER, folder)
    first = folder / "kuberay-rdma" / "kustomization.yaml"
    first.write_text(first.read_text().replace("resources: [../kuberay-rayjob.yaml]", f"resources: [../{file}]"))
    command = [kubectl, "kustomize", "--load-restrictor=LoadRestrictionsNone", str(folder / name)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert yaml.safe_load(done.stdout) == patched(name, file)


def test_a_network_of_multus_is_a_line_to_uncomment() -> None:
    for kind, patch in ((p["target"]["kind"], p["patch"]) for p in kustomization("kuberay-rdma")["patches"]):
        document = yaml.safe_load((CLUSTER / {v: k for k, v in KINDS.items()}[kind]).read_text())
        (step,) = yaml.safe_load("\n".join(line[2:] for line in patch.splitlines() if line.startswith("# - ")))
        add(document, step["path"], step["value"])
        (group,) = cluster(document)["workerGroupSpecs"]
        assert group["template"]["metadata"] == {
            "labels": {"app": "rlaif"},
            "annotations": {"k8s.v1.cni.cncf.io/networks": "rdma"},
        }


def uncommented(file: str, pattern: str) -> dict[str, Any]:
    """A YAML file with the commented lines that a pattern matches."""
    text = re.sub(rf"^( +)# ({pattern}.*)$", r"\1\2", (CLUSTER / file).read_text(), flags=re.MULTILINE)
    values: dict[str, Any] = yaml.safe_load(text)
    return values


def test_workers_on_the_host_network_reach_the_head_by_two_rules_to_uncomment() -> None:
    """Their pods have no label to a network policy: they are their nodes' addresses."""
    plain = yaml.safe_load((CLUSTER / "kuberay-network.yaml").read_text())["spec"]
    spec = uncommented("kuberay-network.yaml", r"- (?:from|to): \[{ipBlock: {cidr: 192\.0\.2\.0/24}}\]")["spec"]
    nodes = [{"ipBlock": {"cidr": "192.0.2.0/24"}}]
    assert [rule for rule in spec["ingress"] if rule not in plain["ingress"]] == [{"from": nodes}]
    assert [rule for rule in spec["egress"] if rule not in plain["egress"]] == [{"to": nodes}]
    assert (len(spec["ingress"]), len(spec["egress"])) == (len(plain["ingress"]) + 1, len(plain["egress"]) + 1)


def test_ray_up_has_its_lines_to_uncomment() -> None:
    from ray.autoscaler._private.docker import docker_start_cmds
    from ray.autoscaler._private.util import prepare_config, validate_config

    plain = yaml.safe_load((CLUSTER / "ray-up.yaml").read_text())
    rdma = uncommented("ray-up.yaml", "- --")
    prepared = prepare_config(rdma)
    validate_config(prepared)
    options = rdma["docker"].pop("run_options")
    added = [option for option in options if option not in plain["docker"]["run_options"]]
    assert added == [
        "--device=/dev/infiniband",
        "--cap-add=IPC_LOCK",
        "--ulimit=memlock=-1:-1",
        "--env=NCCL_NET=IB",
        "--env=NCCL_DEBUG=INFO",
        "--env=NCCL_DEBUG_SUBSYS=INIT,NET",
    ]
    assert options[: -len(added)] == plain["docker"].pop("run_options")
    assert rdma == plain
    command = docker_start_cmds("rlaif", "image", {}, "rlaif", options, "rlaif", "/home/rlaif", "docker")
    assert "--net=host" in command and "--ulimit=memlock=-1:-1" in command


def test_slurm_takes_the_limits_of_its_nodes() -> None:
    text = (CLUSTER / "slurm.sbatch").read_text()
    assert "\n#SBATCH --propagate=NONE\n" in text
    assert "--export" not in text  # NCCL's variables reach the nodes from the shell that submits


def test_the_image_has_the_verbs_library() -> None:
    text = (CLUSTER / "Containerfile").read_text()
    install = r"apt-get install -y --no-install-recommends ([\w -]+) && \\\n +rm -rf /var/lib/apt/lists"
    (installed,) = re.findall(install, text)
    assert {"libibverbs1", "ibverbs-providers"} <= set(installed.split())
    assert text.index("apt-get") < text.index("USER 1000")


def test_the_guide_names_what_is_set_and_how_to_tell() -> None:
    told = (CLUSTER / "README.md").read_text()
    _, _, rdma = told.partition("\n## RDMA\n")
    rdma, _, _ = rdma.partition("\n## ")
    used = {name for path in CLUSTER.rglob("*.yaml") for name in re.findall(r"\b(?:NCCL|GLOO)_\w+", path.read_text())}
    assert len(used) >= 5 and all(f"`{name}" in rdma for name in used)
    assert all(f"`{name}`" in told for name in OVERLAYS) and DEVICE in rdma and "ulimit -l" in rdma
    assert "via NET/IB/0" in rdma and "via NET/Socket/0" in rdma
    # Seconds at the rate of the line: gigabytes over gigabits a second.
    for size, seconds in ((16, (5.1, 1.3, 0.3)), (140, (45, 11, 2.8))):
        for rate, said in zip((25, 100, 400), seconds, strict=True):
            assert size * 8 / rate == pytest.approx(said, rel=0.07)
