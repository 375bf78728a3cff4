"""The house rules of the package, read off its source: which room may import which, one door per heavy dependency,
and the size of functions and files.
"""

from __future__ import annotations

import ast
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "rlaif_ray"

# Imports only point down, and rooms on one level do not import each other. A new room must take its place here.
LEVEL_OF_ROOM = {
    "types": 0,
    "interfaces": 0,
    "errors": 0,
    "folders": 0,
    "writing": 0,
    "reward_head": 0,
    "model_errors": 0,
    "dropout": 0,
    "output": 0,
    "paths": 0,
    "precision": 0,
    "vocabulary": 0,
    "weight_types": 0,
    "secrecy": 0,
    "storage": 0,
    "documents": 0,
    "attention": 1,
    "config": 1,
    "chat": 1,
    "algorithm": 1,
    "models": 1,
    "model_shapes": 1,
    "model_support": 1,
    "tracking": 1,
    "data": 2,
    "feedback": 2,
    "evaluation": 2,
    "rollout": 3,
    "learner": 3,
    "runtime": 4,
    "pipelines": 5,
    "cli": 6,
}
# Protocols speak of nouns; everybody raises; a stored folder is a folder.
SAME_LEVEL = {("interfaces", "types"), ("interfaces", "storage"), ("folders", "errors"), ("storage", "errors")}
SAME_LEVEL |= {
    ("storage", "folders"),
    ("storage", "secrecy"),
    ("storage", "writing"),
    ("reward_head", "errors"),
    ("model_errors", "errors"),
}
SAME_LEVEL |= {("documents", "errors"), ("storage", "documents"), ("storage", "paths"), ("model_errors", "documents")}
SAME_LEVEL |= {("output", "secrecy"), ("vocabulary", "errors"), ("secrecy", "errors"), ("secrecy", "documents")}
SAME_LEVEL |= {("weight_types", "documents")}

DOOR = {"ray": "runtime", "vllm": "rollout", "deepspeed": "learner", "wandb": "tracking"}
LIGHT = {"cli", "config", "errors"}  # no heavy library anywhere in them, not even in a function
HEAVY = {"torch", "ray", "vllm", "deepspeed", "transformers", "datasets", "wandb", "numpy", "accelerate"}
# What reads JSON or YAML without bounds, by library; only documents calls it.
PARSERS = {"json": {"load", "loads", "JSONDecoder"}, "orjson": {"loads"}, "ujson": {"load", "loads"}}
PARSERS |= {"pyarrow": {"json"}}
PARSERS["yaml"] = {"load", "load_all", "safe_load", "safe_load_all", "full_load", "unsafe_load", "compose", "parse"}
PARSERS["yaml"] |= {"scan", "SafeLoader", "CSafeLoader", "Loader", "FullLoader", "UnsafeLoader", "BaseLoader"}
PURE = {"algorithm": {"torch"}}  # all that these may import beside the standard library, themselves and level 0

UNSHOWN = ("print", "typer.echo", "typer.secho", "click.echo", "Console", "sys.stdout.write", "sys.stderr.write")

FUNCTION_LINES, FILE_LINES, PACKAGE_LINES = 80, 500, 37_000

SOURCES = {path.relative_to(PACKAGE): path.read_text() for path in sorted(PACKAGE.rglob("*.py"))}


def room_of(path: Path) -> str:
    """The room that a file is in: the first folder, or the file itself; "" for the package's own __init__."""
    room = path.parts[0].removesuffix(".py")
    return "" if room == "__init__" else room


def imported(path: Path, source: str) -> Iterator[tuple[int, str]]:
    """Line and full dotted name of everything imported, at any depth, for type checkers too, or by import_module.

    `from a import b` gives a.b: b may be a module.
    """
    package = ("rlaif_ray", *path.parts[:-1])
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else ()
            base = ".".join([*above, *filter(None, [node.module])])
            for alias in node.names:
                yield node.lineno, f"{base}.{alias.name}"
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in ("import_module", "__import__") and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value


def violations(path: Path, source: str) -> list[str]:
    """Every import of one file that the house rules forbid."""
    room = room_of(path)
    found = []
    for line, name in imported(path, source):
        top, _, rest = name.partition(".")
        target = rest.partition(".")[0]
        if top == "rlaif_ray":
            if target in LEVEL_OF_ROOM and not may_import(room, target):
                found.append(f"{path}:{line}: {room or 'the package'} must not import {target}")
            continue
        if DOOR.get(top, room) != room:
            found.append(f"{path}:{line}: only {DOOR[top]} imports {top}")
        elif (room in LIGHT and top in HEAVY) or not pure_enough(room, top):
            found.append(f"{path}:{line}: {room} must not import {top}")
        elif room in PURE and name.startswith("torch.distributed"):
            found.append(f"{path}:{line}: {room} knows no ranks, so it must not import {name}")
    return found


def parsers_used(path: Path, source: str) -> list[str]:
    """Every use of a parser of JSON or YAML that has no bounds, or that a value's shape can crash."""
    found = []
    for node in ast.walk(ast.parse(source)):
        names: list[tuple[str, str]] = []
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            names = [(node.value.id, node.attr)]
        elif isinstance(node, ast.ImportFrom):
            names = [((node.module or "").partition(".")[0], alias.name) for alias in node.names]
        elif isinstance(node, ast.Call) and getattr(node.func, "attr", "") in ("model_validate_json", "json"):
            names = [("", node.func.attr)]  # type: ignore[attr-defined]
        found += [
            f"{path}:{node.lineno}: only documents uses {library}.{name}"  # type: ignore[attr-defined]
            for library, name in names
            if name in PARSERS.get(library, ()) or not library
        ]
    return found if room_of(path) != "documents" else []


def may_import(room: str, target: str) -> bool:
    if room == target or (room, target) in SAME_LEVEL:
        return True
    if room in PURE:
        return LEVEL_OF_ROOM[target] == 0
    return bool(room) and LEVEL_OF_ROOM[target] < LEVEL_OF_ROOM[room]


def pure_enough(room: str, library: str) -> bool:
    return room not in PURE or library in PURE[room] or library in sys.stdlib_module_names


def functions(source: str) -> Iterator[tuple[str, int]]:
    """Name and number of lines of every function."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield node.name, node.end_lineno - node.lineno + 1


# --- the package ----------------------------------------------------------------------------------------------------


def test_every_room_has_its_place() -> None:
    rooms = {room_of(path) for path in SOURCES} - {""}
    unknown = rooms - set(LEVEL_OF_ROOM)
    assert not unknown, f"give {sorted(unknown)} a level in LEVEL_OF_ROOM and in DESIGN section 2"


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_imports(path: Path) -> None:
    assert violations(path, SOURCES[path]) == []


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_one_reader_of_json_and_yaml(path: Path) -> None:
    assert parsers_used(path, SOURCES[path]) == []


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_sizes(path: Path) -> None:
    lines = SOURCES[path].count("\n")
    assert lines <= FILE_LINES, f"{lines} lines: split the file"
    long = {name: length for name, length in functions(SOURCES[path]) if length > FUNCTION_LINES}
    assert not long, f"lines of functions: {long}"


def test_the_package_stays_small() -> None:
    assert sum(source.count("\n") for source in SOURCES.values()) < PACKAGE_LINES


def test_the_loop_fits_on_a_page() -> None:
    lengths = dict(functions(SOURCES[Path("pipelines/rl.py")]))
    assert lengths["train_rl"] <= 80


@pytest.mark.parametrize("path", SOURCES, ids=str)
def test_people_are_shown_texts_by_one_door(path: Path) -> None:
    """`print`, `typer.echo` and rich's own console show what a terminal obeys, and secrets."""
    assert path == Path("output.py") or unshown(SOURCES[path]) == []


def unshown(source: str) -> list[int]:
    """Lines that write to the terminal by another door than `output.say` and `tracking.console`."""
    calls = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.Call)]
    return [call.lineno for call in calls if ast.unparse(call.func) in UNSHOWN]


# --- these checks themselves ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("config/x.py", "import rlaif_ray.learner"),
        ("config/x.py", "from rlaif_ray import learner"),
        ("config/x.py", "from ..learner import engine"),
        ("config/x.py", "from .. import models"),
        ("config/x.py", "def f():\n    from rlaif_ray.models import load"),
        ("config/x.py", "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from rlaif_ray.tracking import T"),
        ("config/x.py", "import importlib\nimportlib.import_module('rlaif_ray.runtime')"),
        ("config/x.py", "import torch"),
        ("rollout/x.py", "from rlaif_ray.learner.engine import Engine"),
        ("feedback/x.py", "from rlaif_ray.rollout import vllm_engine"),
        ("types.py", "from rlaif_ray.interfaces import Learner"),
        ("__init__.py", "from rlaif_ray.types import Message"),
        ("learner/x.py", "import ray.util"),
        ("pipelines/x.py", "def f():\n    from ray import get"),
        ("runtime/x.py", "import vllm"),
        ("rollout/x.py", "import deepspeed"),
        ("algorithm/x.py", "import numpy"),
        ("algorithm/x.py", "from torch import distributed"),
        ("algorithm/x.py", "from rlaif_ray.config.jobs import PpoConfig"),
        ("cli.py", "def f():\n    import torch"),
    ],
)
def test_a_forbidden_import_is_found(path: str, source: str) -> None:
    assert len(violations(Path(path), source)) == 1


@pytest.mark.parametrize(
    "source",
    [
        "import json\njson.loads(text)",
        "from json import load",
        "import json\nread = json.load",
        "def f():\n    import yaml\n    yaml.safe_load(text)",
        "class Mine(yaml.SafeLoader): ...",
        "Record.model_validate_json(line)",
        "response.json()",
        "from pyarrow import json",
    ],
)
def test_a_parser_without_bounds_is_found(source: str) -> None:
    assert len(parsers_used(Path("data/x.py"), source)) == 1 and not parsers_used(Path("documents.py"), source)


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("algorithm/x.py", "import math\nimport torch.nn\nfrom rlaif_ray.algorithm.kl import k\nfrom . import losses"),
        ("interfaces.py", "from rlaif_ray.types import Message"),
        ("config/x.py", "import yaml, pydantic\nfrom rlaif_ray import __version__\nfrom rlaif_ray.errors import E"),
        ("rollout/x.py", "import vllm, torch\nfrom rlaif_ray.data import prompts"),
        ("runtime/x.py", "import ray\nfrom rlaif_ray.rollout import vllm_engine\nfrom rlaif_ray.learner import ppo"),
        ("cli.py", "def f():\n    from rlaif_ray.pipelines.rl import train_rl"),
    ],
)
def test_an_allowed_import_passes(path: str, source: str) -> None:
    assert violations(Path(path), source) == []


def test_function_lengths_are_counted() -> None:
    assert dict(functions("def f():\n    x = 1\n\n    async def g():\n        pass\n")) == {"f": 5, "g": 2}


@pytest.mark.parametrize("call", ["print(x)", "typer.echo(x)", "Console(file=f)", "sys.stderr.write(x)"])
def test_other_doors_to_the_terminal_are_found(call: str) -> None:
    assert unshown(f"def f():\n    {call}\n") == [2]


def test_no_two_test_files_have_one_name() -> None:
    """Folders of tests are no packages: pytest would take one file for the other, and run neither."""
    names = Counter(path.name for path in (PACKAGE.parent / "tests").rglob("test_*.py"))
    assert {name for name, count in names.items() if count > 1} == set()
