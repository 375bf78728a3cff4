"""tests/gpu/first_quarter_hour.sh itself, with steps that pass, fail and hang in place of those that need a GPU."""

from __future__ import annotations

import ast
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterator
from importlib.metadata import distributions
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from rlaif_ray.runtime.local_ray import private_places
from tests.gpu import quarter_hour
from tests.gpu.quarter_hour import BUDGET_S, choose, ray_logs, time_for
from tests.gpu.results import markdown, read_summaries, sentence
from tests.gpu.settling import settled
from tests.gpu.steps import Step, all_steps
from tests.pace import scaled

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tests" / "gpu" / "first_quarter_hour.sh"


def step(name: str, command: str = "true", *, usual: float = 30, limit: float = 60, kind: Any = "check") -> Step:
    return Step(name, kind, f"that {name} works", command, usual, limit)


def start(folder: Path, steps: list[Step], *options: str) -> subprocess.Popen[str]:
    """The script over these steps, with its results in `folder`."""
    folder.mkdir(exist_ok=True)
    listed = folder / "steps.json"
    listed.write_text(json.dumps([{k: getattr(s, k) for k in Step.__annotations__} for s in steps]))
    return subprocess.Popen(
        ["bash", str(SCRIPT), "--steps", str(listed), *options],
        env=os.environ
        | {"OUT": str(folder / "out"), "PYTHON": sys.executable, "GPUKIT_SITE": str(folder / "none")}
        | {"TMPDIR": str(folder), "RAY_TMPDIR": ""},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def run(folder: Path, steps: list[Step], *options: str) -> tuple[int, str]:
    process = start(folder, steps, *options)
    said, _ = process.communicate(timeout=scaled(60))
    return process.returncode, said


def lines(folder: Path) -> list[dict[str, Any]]:
    """The steps' lines of the summary."""
    return [json.loads(line) for line in (folder / "out" / "summary.jsonl").read_text().splitlines()][1:]


def states(folder: Path) -> dict[str, str]:
    return {line["step"]: line["state"] for line in lines(folder)}


def running(name: str) -> list[int]:
    """Processes whose command line names it."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if name.encode() in path.read_bytes():
                found.append(int(path.parent.name))
        except OSError:
            continue
    return found


def test_later_steps_run_and_are_logged_when_earlier_ones_fail_or_hang(tmp_path: Path) -> None:
    mark = f"7{os.getpid()}.25"  # seconds of a sleep that only this test starts
    seen = tmp_path / "seen"
    steps = [
        step("good", """echo well; echo '{"figure": {"name": "speed", "value": 7}}' | tee -a "$RLAIF_GPU_RECORDS" """),
        step("bad", "echo something; echo 'FAILED test_x - boom'; echo 1 failed; exit 3"),
        # One that takes no SIGTERM, and has started a daemon in a session of its own.
        step("hangs", f"trap '' TERM; setsid sleep {mark} & echo stuck; sleep {mark}; sleep {mark}", usual=1, limit=1),
        step("after", f'for f in /proc/[0-9]*/cmdline; do tr "\\0" " " <$f 2>/dev/null; echo; done >{seen}; echo end'),
    ]
    code, said = run(tmp_path, steps)
    assert code == 1
    assert states(tmp_path) == {"good": "passed", "bad": "failed", "hangs": "timed out", "after": "passed"}
    good, bad, hangs, after = lines(tmp_path)
    assert good["note"] == "well"
    assert good["records"] == [{"figure": {"name": "speed", "value": 7}}]
    assert (bad["exit"], bad["note"]) == (3, "FAILED test_x - boom")
    assert hangs["exit"] is None and hangs["note"] == "stuck" and after["note"] == "end"
    assert f"sleep {mark}" not in seen.read_text(), "the step that hung still ran beside the next"
    log = (tmp_path / "out" / "log.txt").read_text()
    places = [log.index(f"===== {s.name}: ") for s in steps]
    assert places == sorted(places) and log.index("1 failed") < log.index("===== hangs")
    table = (tmp_path / "out" / "summary.txt").read_text()
    assert table.strip() in said
    assert "timed out" in table and "name=speed value=7" in table


def test_the_account_is_complete_while_a_step_runs(tmp_path: Path) -> None:
    """Whoever kills the script in the middle of a step finds what came before, and which step it was."""
    go = tmp_path / "go"
    steps = [step("first"), step("second", f"while [ ! -e {go} ]; do sleep 0.05; done"), step("third")]
    process = start(tmp_path, steps)
    end = time.monotonic() + scaled(30)
    try:
        while not (tmp_path / "out" / "summary.jsonl").exists() or states(tmp_path)["second"] == "waiting":
            assert time.monotonic() < end
            time.sleep(0.05)
        assert states(tmp_path) == {"first": "passed", "second": "running", "third": "waiting"}
        table = (tmp_path / "out" / "summary.txt").read_text()
        assert [row.split()[:2] for row in table.splitlines()[-3:]] == [
            ["first", "passed"],
            ["second", "running"],
            ["third", "waiting"],
        ]
    finally:
        process.terminate()
    process.communicate(timeout=scaled(30))
    assert process.returncode == 143
    assert not running(str(go)), "the step outlived the script"


def test_from_and_only(tmp_path: Path) -> None:
    steps = [step("a"), step("b"), step("c", kind="figure")]
    assert run(tmp_path, steps, "--from", "b")[0] == 0
    assert list(states(tmp_path)) == ["b", "c"]
    assert run(tmp_path, steps, "--only", "c", "a")[0] == 0
    assert list(states(tmp_path)) == ["a", "c"]  # in their own order
    code, said = run(tmp_path, steps, "--from", "d")
    assert code == 2 and "no step is called d. There are: a, b, c" in said


def test_only_takes_kinds() -> None:
    steps = [step("a"), step("b", kind="figure"), step("c")]
    assert [s.name for s in choose(steps, None, ["checks"])] == ["a", "c"]
    assert [s.name for s in choose(steps, "b", ["checks"])] == ["c"]
    assert [s.name for s in choose(steps, None, ["figures", "a"])] == ["a", "b"]
    with pytest.raises(ValueError, match="no step is called checks"):
        choose(steps, "checks", None)


def test_rest_are_those_that_no_command_before_has_begun(tmp_path: Path) -> None:
    """On the machine that is still there after a first command: what failed is not tried again unmended."""
    steps = [step("a"), step("b", "false"), step("c", usual=1000, limit=1000), step("d")]
    assert run(tmp_path, steps, "--budget", "20")[0] == 1
    assert states(tmp_path) == {"a": "passed", "b": "failed", "c": "no time left", "d": "passed"}
    assert run(tmp_path, steps, "--rest", "--budget", "990")[0] == 0
    assert states(tmp_path) == {"c": "passed"}
    assert run(tmp_path, steps, "--only", "a")[0] == 0  # the first one: a new sequence
    assert run(tmp_path, steps, "--rest")[0] == 1 and list(states(tmp_path)) == ["b", "c", "d"]


def test_no_figures_after_a_check_that_failed(tmp_path: Path) -> None:
    steps = [step("good"), step("bad", "false"), step("other"), step("speed", kind="figure")]
    assert run(tmp_path, steps)[0] == 1
    assert states(tmp_path) == {"good": "passed", "bad": "failed", "other": "passed", "speed": "not begun"}
    assert lines(tmp_path)[3]["note"] == "no figures before these pass: bad"
    assert run(tmp_path, steps, "--only", "figures")[0] == 0  # asked for by name
    assert run(tmp_path, steps, "--only", "good", "speed")[0] == 0


def test_one_that_hangs_leaves_the_others_their_time() -> None:
    """By hand: 100 s for steps of usually 20, 30 and 10, each of 90 at most."""
    first, second, third = (step(name, usual=s, limit=90) for name, s in (("1", 20), ("2", 30), ("3", 10)))
    figure = step("4", usual=40, limit=60, kind="figure")
    assert time_for(first, [second, third], 100) == 60  # 100 less 30 and 10
    assert time_for(first, [second, third], 50) == 20  # too little for all: its usual time
    assert time_for(first, [second, third, figure], 100) == 60  # figures have what is left
    assert time_for(third, [], 100) == 90  # its limit
    assert time_for(second, [third], 20) == 20  # what is left
    assert time_for(second, [third], 14) is None  # less than half of its usual time
    assert time_for(figure, [figure], 100) == 60  # a figure: its limit, whatever the later ones get
    assert time_for(figure, [], 50) == 50
    assert time_for(figure, [], 39) is None  # cut short it would be none


DEVICE_S, LONGEST_S, LEAST_S = 900, 600, 240  # of the borrowed machine: in all, for a command, to start one
MACHINE_S = 150  # until a machine is there: "a minute or more"
IDLE_S = 30  # for which one is kept after a command


def checks() -> list[Step]:
    return [s for s in all_steps(rehearsal=False) if s.kind == "check"]


def test_whatever_hangs_every_check_has_its_usual_time() -> None:
    left = BUDGET_S
    for k, s in enumerate(checks()):
        taken = time_for(s, checks()[k + 1 :], left)
        assert taken is not None and taken >= s.usual_s
        left -= taken
    assert left >= 0


def test_any_check_may_take_its_limit_when_the_others_are_as_usual() -> None:
    left = BUDGET_S
    for k, s in enumerate(checks()):
        assert time_for(s, checks()[k + 1 :], left) == s.limit_s, s.name
        left -= s.usual_s


def test_the_budget_leaves_time_for_a_second_try() -> None:
    """After a first command with all checks: on the same machine at once, or on another one after a mend."""
    usual = sum(s.usual_s for s in checks())
    assert usual <= 400 and BUDGET_S <= LONGEST_S - 60
    figures = [s for s in all_steps(rehearsal=False) if s.kind == "figure"]
    at_once = DEVICE_S - MACHINE_S - BUDGET_S - 10  # figures that fit beside the checks are behind it then
    assert at_once >= sum(s.usual_s for s in figures[:3])
    mended = DEVICE_S - MACHINE_S - usual - IDLE_S
    assert mended >= LEAST_S and DEVICE_S - MACHINE_S - BUDGET_S - IDLE_S >= LEAST_S
    unpack, *others = checks()
    assert mended - MACHINE_S - unpack.usual_s >= max(s.usual_s for s in others)


def test_steps_without_time_are_said(tmp_path: Path) -> None:
    steps = [step("short", usual=1, limit=2), step("long", usual=1000, limit=1000)]
    assert run(tmp_path, steps, "--budget", "20")[0] == 1
    assert states(tmp_path) == {"short": "passed", "long": "no time left"}


def test_an_endless_log_is_shortened(tmp_path: Path) -> None:
    assert (
        run(tmp_path, [step("talks", "echo begin; yes | head -c 2000000; echo end"), step("next", "echo after")])[0]
        == 0
    )
    log = (tmp_path / "out" / "log.txt").read_text()
    assert len(log) < 1_200_000
    assert log.index("begin") < log.index("bytes are left out") < log.index("end\n\n===== next") < log.index("after")


def test_the_order_is_the_issues() -> None:
    """Checks before figures; unpack first, then from the cheapest to the whole job. pytest keeps the order of files."""
    names = [s.name for s in all_steps(rehearsal=False)]
    assert names[:6] == ["unpack", "versions", "packed_attention", "learner_bf16", "weights", "end_to_end"]
    (weights,) = [s.command for s in all_steps(rehearsal=False) if s.name == "weights"]
    assert weights.index("test_ipc_sync.py") < weights.index("test_ipc_memory.py") < weights.index("test_sleep_wake.py")
    assert names[6:8] == ["learner_8b", "sync_8b"]  # the two with a figure to reach that a GPU alone can show
    kinds = [s.kind for s in all_steps(rehearsal=False)]
    assert kinds == sorted(kinds) and len(set(names)) == len(names)  # "check" < "figure"
    for s in all_steps(rehearsal=False):
        assert 0 < s.usual_s <= s.limit_s


@pytest.mark.parametrize("rehearsal", [False, True])
def test_every_step_names_a_file_that_is_there(rehearsal: bool) -> None:
    for s in all_steps(rehearsal=rehearsal):
        words = s.command.split()
        files = [word for word in words if word.startswith("tests/gpu/")]
        files += [
            f"{words[k + 1].replace('.', '/')}.py"
            for k, word in enumerate(words)
            if word == "-m"
            if words[k + 1] != "pytest"
        ]
        assert files and all((ROOT / file).exists() for file in files), s


def test_the_runner_needs_nothing_but_python() -> None:
    """It says what failed where nothing can be imported."""
    for name in ("quarter_hour", "steps", "record", "results"):
        for node in ast.walk(ast.parse((ROOT / "tests" / "gpu" / f"{name}.py").read_text())):
            found = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            found += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for module in found:
                top = module.partition(".")[0]
                own = module in ("tests.gpu.record", "tests.gpu.steps", "tests.gpu.quarter_hour")
                assert top in sys.stdlib_module_names or own, (name, module)


@pytest.fixture
def short_folder() -> Iterator[Path]:
    """Ray's sockets lie in it."""
    with tempfile.TemporaryDirectory(prefix="gpu", dir="/tmp") as folder:
        yield Path(folder)


def test_logs_of_a_local_ray_in_a_folder_of_its_own_are_found(
    short_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As rlaif_ray starts one (runtime/local_ray.py), and as ray.init does."""
    monkeypatch.setenv("TMPDIR", str(short_folder))
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    began = time.time() - 60
    own = short_folder / "ray" / "session_1" / "logs"
    with private_places() as places:
        logs = places.folder / "ray" / "session_2" / "logs"
        for folder, text in ((own, "of ray.init"), (logs, "of a run")):
            folder.mkdir(parents=True)
            (folder / "worker-1.err").write_text("x" * 5000 + text)
        (logs.parent.parent / "session_latest").symlink_to(logs.parent)
        old = own / "worker-2.err"
        old.write_text("of a step before")
        os.utime(old, (began - 60, began - 60))
        found = ray_logs(began, parents=[str(short_folder)]).decode()
    assert found.count("of ray.init") == found.count("of a run") == 1
    assert "of a step before" not in found and len(found) < 2 * 4096 + 500


def test_each_test_of_a_failed_step_is_in_the_account(tmp_path: Path) -> None:
    """Also those before one that takes the process with it."""
    (tmp_path / "conftest.py").write_text("from tests.gpu.conftest import pytest_runtest_logreport, took\n")
    (tmp_path / "test_it.py").write_text(
        "import os\ndef test_well(): pass\ndef test_bad(): assert 0\ndef test_end(): os.kill(os.getpid(), 9)\n"
    )
    command = f"{sys.executable} -m pytest -q -p no:cacheprovider --rootdir {tmp_path} {tmp_path}/test_it.py"
    assert run(tmp_path, [step("three", command)])[0] == 1
    (line,) = lines(tmp_path)
    assert line["state"] == "failed"
    came = {r["test"].partition("::")[2]: r["came"] for r in line["records"]}
    assert came == {"test_well": "passed", "test_bad": "failed"}
    assert "s failed   test_it.py::test_bad" in (tmp_path / "out" / "summary.txt").read_text()


def test_memory_is_read_once_it_is_at_rest() -> None:
    readings = iter([90, 60, 20, 12, 10, 10, 11, 5])
    assert settled(lambda: next(readings), within=1, pause_s=0.0) == 11
    falling = itertools.count(100, -10)
    assert settled(lambda: next(falling), within=1, pause_s=0.01, timeout_s=0.1) < 100


def test_a_git_that_hangs_is_no_reason_to_fail(monkeypatch: pytest.MonkeyPatch) -> None:
    def hang(command: list[str], **_: Any) -> Any:
        raise subprocess.TimeoutExpired(command, 10)

    monkeypatch.setattr(quarter_hour.subprocess, "run", hang)
    monkeypatch.setattr(quarter_hour, "ROOT", Path("/nowhere"))
    assert quarter_hour.commit() == "unknown"


def test_what_was_carried_is_unpacked(tmp_path: Path) -> None:
    """With a kit of one file, as the kit's own unpack.sh leaves it, and one more wheel."""
    kit, extras, site = tmp_path / ".gpukit" / "t1-1", tmp_path / ".gpuextras", tmp_path / "site"
    kit.mkdir(parents=True)
    extras.mkdir()
    site.mkdir()
    (kit / "unpack.sh").write_text('echo "export A=1" > "$GPUKIT_SITE/.env"; echo "shell text"; echo "parts: $@" >&2\n')
    with zipfile.ZipFile(extras / "more-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("more_of_it.py", "X = 1\n")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)

    def unpack() -> str:
        done = subprocess.run(
            ["bash", str(ROOT / "tests" / "gpu" / "unpack.sh")],
            cwd=tmp_path,
            env=os.environ | {"GPUKIT_SITE": str(site), "PYTHON": sys.executable},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout

    assert "1 parts of the kit and 1 more wheels" in unpack()
    assert (site / "more_of_it.py").exists()
    (here,) = distributions(path=[str(site)])
    points = {(e.group, e.name, e.value) for e in here.entry_points}
    assert ("vllm.general_plugins", "rlaif_ray", "rlaif_ray.rollout.weight_transfer:register") in points
    shutil.rmtree(kit.parent)  # a later command carries nothing
    assert "unpacked before" in unpack()
    shutil.rmtree(site)
    assert "no kit was carried" in unpack()


def test_a_check_without_a_gpu_fails_under_the_script(monkeypatch: pytest.MonkeyPatch) -> None:
    """Elsewhere it is skipped, which the script would take for passed."""
    from tests.gpu import conftest

    if conftest.why_not() is None:
        pytest.skip("there is a GPU")
    marks: list[Any] = []
    check: Any = SimpleNamespace(path=conftest.HERE / "test_x.py", add_marker=marks.append)
    conftest.pytest_collection_modifyitems([check])
    assert [m.name for m in marks] == ["gpu", "skip"]
    monkeypatch.setenv("RLAIF_GPU_REQUIRED", "1")
    with pytest.raises(pytest.UsageError, match="needs a GPU"):
        conftest.pytest_collection_modifyitems([check])


# ---- The tables in the READMEs ---------------------------------------------------------------------------------------


def summary(path: Path, *, gpu: str | None, rehearsal: bool = False, **state: str) -> Path:
    versions = {"vllm": "0.26.0", "torch": "2.11.0"} | ({"gpu": gpu} if gpu else {})
    head = {"run": {"began": "2027-01-02 03:04 UTC", "commit": "abc", "rehearsal": rehearsal, "versions": versions}}
    rows = [
        {
            "step": name,
            "shows": f"shows {name}",
            "state": told,
            "seconds": 12.0,
            "records": [{"figure": {"name": name, "v": 1}}],
        }
        for name, told in state.items()
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in [head, *rows]))
    return path


def test_a_second_try_stands_over_the_first(tmp_path: Path) -> None:
    first = summary(tmp_path / "1", gpu="NVIDIA H200", ipc="failed", judge="waiting")
    second = summary(tmp_path / "2", gpu="NVIDIA H200", ipc="passed")
    text = markdown(read_summaries([first, second]))
    assert "NVIDIA H200" in text and "vllm 0.26.0" in text and "2027-01-02" in text
    assert "| `ipc` | shows ipc | passed | 12 s |" in text and "| `judge` | shows judge | waiting |" in text
    assert "failed" not in text and text.count('"name": "ipc"') == 1


def test_the_sentence_counts_all_steps_and_names_the_versions(tmp_path: Path) -> None:
    """Of a try with three steps, of which two passed."""
    count = len(all_steps(rehearsal=False))
    said = summary(tmp_path / "1", gpu="NVIDIA H200", versions="passed", weights="passed", end_to_end="failed")
    told = sentence(read_summaries([said]))
    assert f"2 of {count} steps passed" in told
    assert "vLLM 0.26.0 (outside the supported >=0.28,<0.34) and torch 2.11.0" in told
    text = said.read_text().replace("0.26.0", "0.32.1+cu130")
    said.write_text(text)
    assert "vLLM 0.32.1+cu130 and torch 2.11.0" in sentence(read_summaries([said]))
    assert "| `judge_1b` |" in markdown(read_summaries([said])) and "| not run | |" in markdown(read_summaries([said]))


@pytest.mark.parametrize("gpu, rehearsal", [("NVIDIA H200", True), ("none", False), (None, False)])
def test_nothing_is_written_of_what_ran_on_no_gpu(tmp_path: Path, gpu: str | None, rehearsal: bool) -> None:
    with pytest.raises(ValueError, match="no GPU"):
        read_summaries([summary(tmp_path / "1", gpu=gpu, rehearsal=rehearsal, ipc="passed")])


def test_the_readmes_have_a_place_for_it() -> None:
    from tests.gpu.results import BEGIN, END, PLACES

    for path in PLACES:
        text = path.read_text()
        assert text.count(BEGIN) == text.count(END) == 1 and text.index(BEGIN) < text.index(END)
