"""The set-up: which Pythons are meant, and what it shows. That it succeeds every test run shows, which it precedes."""

from __future__ import annotations

import importlib.metadata
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from tests.pace import scaled

ROOT = Path(__file__).parents[2]
PYTHONS = ["3.11", "3.12", "3.13", "3.14"]


def test_one_list_of_pythons() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["requires-python"] == ">=3.11,<3.15"
    makefile = (ROOT / "Makefile").read_text()
    (tried,) = re.findall(r"^PYTHONS := (.*)$", makefile, re.M)
    assert tried.split() == [*(f"python{version}" for version in PYTHONS), "python3"]
    assert "(3, 11) <= sys.version_info[:2] <= (3, 14)" in makefile
    assert "Python 3.11 to 3.14" in (ROOT / "README.md").read_text()


def make(target: str, folder: Path, *pythons: str) -> str:
    """What `make -n` would do where PATH holds these Pythons, each of the version that its name says."""
    folder.mkdir()
    for name in pythons:
        version = tuple(map(int, name.removeprefix("python").split(".")))
        (folder / name).write_text(
            f'#!/bin/sh\nexec {sys.executable} -c "import sys; sys.version_info = {version}; $2"\n'
        )
        (folder / name).chmod(0o755)
    for program in ("make", "bash", "sh"):
        (folder / program).symlink_to(f"/usr/bin/{program}")
    done = subprocess.run(
        ["make", "-n", target, "VENV=none"], cwd=ROOT, env={"PATH": str(folder)}, capture_output=True, text=True
    )
    return done.stdout


def test_make_takes_the_first_python_that_will_do(tmp_path: Path) -> None:
    assert "python3.13 requirements/install.py none" in make("setup", tmp_path / "two", "python3.14", "python3.13")
    assert "python3.12 requirements/install.py none" in make("setup", tmp_path / "one", "python3.10", "python3.12")
    assert '[ -n "" ]' in make("setup", tmp_path / "none", "python3.10", "python3.15")


def test_a_failed_installation_shows_pips_last_lines(tmp_path: Path) -> None:
    lock = tmp_path / "cpu.lock"
    lock.write_text("no-such-package-of-ours==1.0\n")
    code = (
        "import pathlib, sys; sys.path.insert(0, 'requirements'); import install; "
        f"install.LOCK = pathlib.Path({str(lock)!r}); sys.argv[1:] = [{str(tmp_path / 'venv')!r}]; "
        "raise SystemExit(install.main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env={**os.environ, "PIP_NO_INDEX": "1", "PIP_FIND_LINKS": ""},
        capture_output=True,
        text=True,
        timeout=scaled(120),
    )
    assert done.returncode == 1
    assert "set-up 2/3: 1 packages" in done.stdout and "WARNING" not in done.stdout
    assert "No matching distribution found for no-such-package-of-ours==1.0" in done.stderr
    assert f"{tmp_path}/venv/install.log" in done.stderr and "Traceback" not in done.stderr


@pytest.mark.long
def test_the_lock_has_wheels_for_every_python(tmp_path: Path) -> None:
    """Asks the package index, for packages whose wheel here is for this Python alone; skipped where there is none."""
    pinned = (line.partition("==") for line in (ROOT / "requirements" / "cpu.lock").read_text().splitlines())
    lock = tmp_path / "lock.txt"
    asked_for = [f"{name}=={version}" for name, _, version in pinned if version and is_for_one_python(name)]
    lock.write_text("".join(f"{line}\n" for line in asked_for))
    assert 20 < len(asked_for) < 120
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--ignore-installed", "--no-deps"]
    pip += ["--only-binary=:all:", f"--target={tmp_path}/none", f"--requirement={lock}", "--disable-pip-version-check"]
    for version in PYTHONS[1:]:
        done = subprocess.run(
            [*pip, f"--python-version={version}"], capture_output=True, text=True, timeout=scaled(600)
        )
        told = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
        if done.returncode and any("onnection" in line or "from versions: none" in line for line in told):
            pytest.skip(f"no package index answers: {told[-1]}")
        assert done.returncode == 0, (version, told[-3:])


def is_for_one_python(name: str) -> bool:
    """Whether what is installed came as a wheel of this Python's version; `torch` isn't asked of the index: its CPU
    builds come from wherever this machine has them."""
    tags = (importlib.metadata.distribution(name).read_text("WHEEL") or "").splitlines()
    python, abi = next(line.removeprefix("Tag: ").split("-")[:2] for line in tags if line.startswith("Tag: "))
    return name != "torch" and python.startswith("cp") and abi != "abi3"
