"""Files are written whole or stay as they were, and never through a symbolic link."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from rlaif_ray import writing
from rlaif_ray.cli import _write_log
from rlaif_ray.errors import InputError, RunError
from rlaif_ray.pipelines.run_folder import make_folder
from rlaif_ray.storage import Place
from rlaif_ray.tracking.files import append_rows, cut_rows, keep_rows, replace_rows, write_json

PACKAGE = Path(writing.__file__).parent


@pytest.fixture
def victim(tmp_path: Path) -> Path:
    path = tmp_path / "victim"
    path.write_text('{"step": 1}\n{"step": 2}\n')
    return path


def link(tmp_path: Path, victim: Path, name: str) -> Path:
    path = tmp_path / "run" / name
    path.parent.mkdir(exist_ok=True)
    path.symlink_to(victim)
    return path


@pytest.mark.parametrize(
    "write",
    [
        lambda path: writing.replace_text(path, "mine"),
        lambda path: write_json(path, {"mine": 1}),
        lambda path: replace_rows(path, [{"mine": 1}]),
    ],
)
def test_a_link_is_replaced(tmp_path: Path, victim: Path, write: Callable[[Path], None]) -> None:
    before, path = victim.read_bytes(), link(tmp_path, victim, "summary.json")
    write(path)
    assert victim.read_bytes() == before
    assert not path.is_symlink() and "mine" in path.read_text()


@pytest.mark.parametrize(
    "write",
    [
        lambda path: append_rows(path, [{"mine": 1}]),
        lambda path: cut_rows(path, 1),
        lambda path: keep_rows(path, 1),
        lambda path: Place(str(path)).write(b"mine"),
        lambda path: writing.open_anew(path),
        lambda path: os.close(writing.open_lock(path)),
    ],
)
@pytest.mark.parametrize("there", [True, False])
def test_a_link_is_not_written_through(
    tmp_path: Path, victim: Path, write: Callable[[Path], None], there: bool
) -> None:
    before, path = victim.read_bytes(), link(tmp_path, victim, "samples.jsonl")
    if not there:
        victim.unlink()
    try:
        write(path)
    except (OSError, RunError) as error:
        assert "is a symbolic link" in str(error)
    else:
        assert not there
    assert not victim.exists() if not there else victim.read_bytes() == before


def test_the_lock_of_a_run_folder(tmp_path: Path, victim: Path) -> None:
    """It names its holder in the file: through a link it would overwrite another one."""
    before = victim.read_bytes()
    link(tmp_path, victim, ".lock")
    with pytest.raises(InputError, match=r"run_dir must be a folder this process can write .* symbolic link"):
        make_folder(tmp_path / "run")
    assert victim.read_bytes() == before


def test_the_log_of_errors(tmp_path: Path, victim: Path) -> None:
    before = victim.read_bytes()
    link(tmp_path, victim, "error.log")
    assert _write_log(tmp_path / "run", "a trace") is None
    assert victim.read_bytes() == before


def test_a_linked_folder_is_a_users_choice(tmp_path: Path) -> None:
    (tmp_path / "large disk").mkdir()
    (tmp_path / "runs").symlink_to(tmp_path / "large disk")
    append_rows(tmp_path / "runs" / "metrics.jsonl", [{"step": 1}])
    assert (tmp_path / "large disk" / "metrics.jsonl").read_text() == '{"step": 1}\n'


def test_a_body_that_fails_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_text("before")
    with pytest.raises(ZeroDivisionError), writing.replacing(path) as file:
        file.write(b"half")
        raise ZeroDivisionError
    assert path.read_text() == "before" and list(tmp_path.iterdir()) == [path]


def test_a_planted_name_beside_the_file(tmp_path: Path, victim: Path) -> None:
    """The name of the new file can be guessed."""
    before = victim.read_bytes()
    path = tmp_path / "file"
    (tmp_path / f".file.{os.getpid()}.new").symlink_to(victim)
    writing.replace_text(path, "mine")
    assert victim.read_bytes() == before and path.read_text() == "mine"


def test_a_lone_surrogate(tmp_path: Path) -> None:
    writing.replace_text(tmp_path / "file", "a\ud800")
    assert (tmp_path / "file").read_bytes() == b"a\\ud800"


# Files that somebody else's library writes, into a folder in the making, or no files at all.
ELSEWHERE = {
    "output.py": "the null device",
    "writing.py": "the door",
    "runtime/local_ray.py": "a new file in a folder of its own",
    "learner/supervised.py": "a card in a folder in the making",
    "learner/deepspeed_states.py": "a scratch folder",
    "evaluation/report/page.py": "a device such as /dev/stdout",
}


def test_nothing_else_opens_files_to_write() -> None:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and _writes(node):
                found[str(path.relative_to(PACKAGE))] = node.lineno
    assert found.keys() <= ELSEWHERE.keys(), found


def _writes(call: ast.Call) -> bool:
    name = call.func.attr if isinstance(call.func, ast.Attribute) else getattr(call.func, "id", "")
    if name in ("write_text", "write_bytes", "touch"):
        return True
    modes = [*call.args[:2], *(k.value for k in call.keywords if k.arg == "mode")]
    texts = [m.value for m in modes if isinstance(m, ast.Constant) and isinstance(m.value, str)]
    remote = isinstance(call.func, ast.Attribute) and getattr(call.func.value, "id", "") == "filesystem"
    return name == "open" and not remote and any(len(t) <= 3 and set(t) & set("wax+") for t in texts)
