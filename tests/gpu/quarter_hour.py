"""Runs the steps of steps.py one after the other: each within its time, logged whatever becomes of the others.

Needs nothing but Python: it must say what failed where nothing can be imported. Before and after every step $OUT holds
a complete account: summary.jsonl (a line for the run, then one a step), summary.txt (the same to read) and log.txt.
"""

from __future__ import annotations

import argparse
import ctypes
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from tests.gpu.record import VARIABLE as RECORDS
from tests.gpu.steps import Step, all_steps

ROOT = Path(__file__).parents[2]
BUDGET_S = 480.0  # README.md: what it leaves of the borrowed machine's 15 minutes is enough for a second try
ENDING_S = 5.0  # that a step has to end itself before it is killed
KEPT_LOG = 2**20  # bytes of a step's output: its beginning and its end
DETAILS = {"benchmark", "rounds_s", "share", "options", "model", "device", "cpus"}  # of figures: in summary.jsonl alone
# Where Ray's sessions are below a folder for temporary files: its own place, and that of our runs that start a Ray.
RAY_SESSIONS = ("ray/session_*", "rlaif-*/ray/session_*")
PR_SET_CHILD_SUBREAPER = 36  # linux/prctl.h


def main() -> int:
    args = parse()
    rehearsal = os.environ.get("RLAIF_GPU_REHEARSAL") in ("1", "bf16")
    steps = [Step(**s) for s in json.loads(args.steps.read_text())] if args.steps else all_steps(rehearsal=rehearsal)
    begun = Begun()
    try:
        chosen = choose(steps, args.start, args.only)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if args.rest:
        chosen = [s for s in chosen if s.name not in begun.names]
    if args.list:
        print(
            "\n".join(f"{s.name:18} {s.kind:7} {s.usual_s:5.0f} s, at most {s.limit_s:.0f}: {s.shows}" for s in chosen)
        )
        return 0
    folder = Path(os.environ.get("OUT") or ROOT / "runs" / "gpu")
    if steps[0] in chosen:
        begun.forget()
    with ending_everything():
        account = Account(folder, chosen, rehearsal=rehearsal)
        run_all(account, args.budget, begun)
    return 0 if all(line["state"] == "passed" for line in account.lines) else 1


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--budget", type=float, default=BUDGET_S, help="seconds for all steps (default %(default)g)")
    parser.add_argument("--from", dest="start", metavar="STEP", help="leave out the steps before this one")
    parser.add_argument("--only", nargs="+", metavar="STEP", help="these steps; checks, figures: all of a kind")
    parser.add_argument("--rest", action="store_true", help="those that no command before has begun on this machine")
    parser.add_argument("--list", action="store_true", help="say which steps there are, and run none")
    parser.add_argument("--steps", type=Path, help="a JSON file of other steps, to try this script")
    return parser.parse_args()


def choose(steps: Sequence[Step], start: str | None, only: Sequence[str] | None) -> list[Step]:
    """Those asked for, in their order.

    Raises:
        ValueError: there is no such step.
    """
    names = [s.name for s in steps]
    for name in [*([start] if start else []), *(only or [])]:
        if name not in names and not (only and name in only and name in ("checks", "figures")):
            raise ValueError(
                f"no step is called {name}. There are: {', '.join(names)}; --only also takes checks, figures"
            )
    found = steps[names.index(start) if start else 0 :]
    return [s for s in found if only is None or s.name in only or f"{s.kind}s" in only]


def time_for(step: Step, later: Sequence[Step], left_s: float) -> float | None:
    """Seconds that a step may take of those left; None: too few to begin it.

    Its usual time is its own. More, up to its limit, it may take only while the later checks still have theirs, so that
    one that hangs doesn't eat the rest. Figures are in the order of their worth: later ones have what is left.
    """
    if left_s < step.usual_s * (0.5 if step.kind == "check" else 1.0):  # a figure that is cut short is none
        return None
    spare = left_s - sum(s.usual_s for s in later if s.kind == "check")
    return min(step.limit_s, left_s, max(step.usual_s, spare))


def run_all(account: Account, budget_s: float, begun: Begun) -> None:
    """Every step, whatever became of those before; but no figures after a check that did not pass: the time is better
    spent on trying it again."""
    end = time.monotonic() + budget_s
    with tempfile.TemporaryDirectory(prefix="rlaif-gpu-", dir=roomy_folder()) as scratch:
        for k, step in enumerate(account.steps):
            left = end - time.monotonic()
            if step.kind == "figure" and (missed := account.missed_checks()):
                account.note(k, state="not begun", note=f"no figures before these pass: {', '.join(missed)}")
                continue
            limit = time_for(step, account.steps[k + 1 :], left)
            if limit is None:
                account.note(k, state="no time left", note=f"{left:.0f} s of the {budget_s:g} were left")
                continue
            begun.add(step.name)
            account.note(k, state="running", limit_s=round(limit, 1))
            account.note(k, **run_step(step, limit, account.log, Path(scratch)))
            print(account.row(k), flush=True)
    print(account.table(), flush=True)


def roomy_folder() -> str | None:
    """Where models are made: in memory, which is faster than a disk, if there is room for the largest."""
    shm = Path("/dev/shm")
    return str(shm) if shm.is_dir() and shutil.disk_usage(shm).free > 40e9 else None


def run_step(step: Step, limit_s: float, log: Path, scratch: Path) -> dict[str, Any]:
    """Runs it; says what came of it. Nothing that it started is left."""
    records = scratch / f"{step.name}.records"
    began, clock = time.time(), time.monotonic()
    with log.open("ab") as out:
        out.write(f"\n===== {step.name}: {step.command} (at most {limit_s:.0f} s)\n".encode())
        out.flush()
        start = out.tell()
        process = subprocess.Popen(
            ["bash", "-c", with_environment(step.command)],
            cwd=ROOT,
            env=environment(scratch) | {RECORDS: str(records)},
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code: int | None = process.wait(max(limit_s - ENDING_S, limit_s / 2))
            state = "passed" if code == 0 else "failed"
        except subprocess.TimeoutExpired:
            code, state = None, "timed out"
            os.killpg(process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                process.wait(min(ENDING_S, limit_s / 2))
        seconds = time.monotonic() - clock
        end_descendants()
        note = last_line(log, start)
        if state != "passed":
            out.write(ray_logs(began))
    shorten(log, start)
    return {
        "state": state,
        "seconds": round(seconds, 1),
        "exit": code,
        "note": note,
        "records": read_records(records),
        "gpu_mib_after": gpu_mib(),
    }


def with_environment(command: str) -> str:
    """With the kit's environment, where it was unpacked, and this checkout before everything."""
    site = os.environ.get("GPUKIT_SITE", "/tmp/gpukit_site")
    return (
        f'if [ -f "{site}/.env" ]; then . "{site}/.env"; fi\n'
        f'export PYTHONPATH="{ROOT}${{PYTHONPATH:+:$PYTHONPATH}}"\n{command}'
    )


def environment(scratch: Path) -> dict[str, str]:
    return os.environ | {
        "PYTHONUNBUFFERED": "1",
        "PYTHONFAULTHANDLER": "1",
        "HF_HUB_OFFLINE": "1",
        "WANDB_MODE": "disabled",
        "RLAIF_GPU_REQUIRED": "1",  # a test that finds no GPU fails here, where elsewhere it is skipped
        "RLAIF_GPU_MODELS": str(scratch / "models"),
    }


# ---- What a step leaves ----------------------------------------------------------------------------------------------


@contextmanager
def ending_everything() -> Iterator[None]:
    """What a step starts is ours to end, also what outlives its parent; asked to stop, we end it too."""
    ctypes.CDLL(None, use_errno=True).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    try:
        yield
    finally:
        end_descendants()


def end_descendants(patience_s: float = 10.0) -> None:
    """Kills all that descends from this process, until nothing does: actors and daemons leave their process groups."""
    end = time.monotonic() + patience_s
    while (found := descendants(os.getpid())) and time.monotonic() < end:
        for pid in found:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)
        with suppress(ChildProcessError):
            while os.waitpid(-1, os.WNOHANG)[0]:
                pass


def descendants(root: int) -> list[int]:
    """Processes below this one that still run, from /proc."""
    children: dict[int, list[int]] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            fields = stat.read_text().rpartition(")")[2].split()  # a name may hold spaces and brackets
            children.setdefault(int(fields[1]), []).append(int(stat.parent.name))
    found, ahead = [], [root]
    while ahead:
        own = children.get(ahead.pop(), [])
        found += own
        ahead += own
    return found


def ray_logs(since: float, *, parents: Sequence[str] = (), each: int = 4096, most: int = 12) -> bytes:
    """The ends of what Ray's workers wrote during a step that failed: their output isn't in the step's own."""
    found: dict[tuple[str, str], tuple[float, Path]] = {}
    usual = filter(None, (os.environ.get("RAY_TMPDIR"), os.environ.get("TMPDIR"), "/tmp"))
    for parent in dict.fromkeys(parents or usual):
        for session in RAY_SESSIONS:
            for path in Path(parent).glob(f"{session}/logs/worker-*"):
                with suppress(OSError):
                    told = path.stat()
                    if (
                        told.st_mtime >= since and told.st_size and told.st_uid == os.getuid()
                    ):  # session_latest is a link to another one of them
                        found[path.resolve().parent.as_posix(), path.name] = told.st_mtime, path.resolve()
    files = [path for _, path in sorted(found.values())[-most:]]
    return b"".join(f"\n--- {path}\n".encode() + end_of(path, each) for path in files)


def end_of(path: Path, most: int) -> bytes:
    with suppress(OSError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - most))
        return file.read()
    return b""


def last_line(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(start)
        lines = file.read().decode(errors="replace").strip().splitlines()
    failed = [line for line in lines if line.startswith(("FAILED ", "ERROR "))]
    said = [line for line in lines if not line.startswith("{")]  # records have a place of their own
    return (failed or said or [""])[-1].strip()[:300]


def shorten(log: Path, start: int) -> None:
    """A step that wrote without end keeps the beginning and the end of it."""
    size = log.stat().st_size - start
    if size <= KEPT_LOG:
        return
    with log.open("r+b") as file:
        file.seek(start + size - KEPT_LOG // 2)
        tail = file.read()
        file.seek(start + KEPT_LOG // 2)
        file.write(f"\n... {size - KEPT_LOG} bytes are left out ...\n".encode() + tail)
        file.truncate()


def read_records(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    found = []
    for line in path.read_text().splitlines():
        with suppress(json.JSONDecodeError):  # half a line of a step that was killed
            found.append(json.loads(line))
    return found


def gpu_mib() -> int | None:
    """MiB in use on the first GPU; None where there is none."""
    query = ["nvidia-smi", "--query-gpu=memory.used", "--format=csv,noheader,nounits"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, timeout=10)
        return int(said.stdout.split()[0])
    except (OSError, ValueError, IndexError, subprocess.TimeoutExpired):
        return None


class Begun:
    """Names of the steps that were begun on this machine since the first of them, for --rest."""

    def __init__(self) -> None:
        checkout = hashlib.sha256(str(ROOT).encode()).hexdigest()[:8]
        self._path = Path(tempfile.gettempdir()) / f"rlaif-gpu-begun-{os.getuid()}-{checkout}"

    @property
    def names(self) -> set[str]:
        return set(self._path.read_text().split()) if self._path.exists() else set()

    def add(self, name: str) -> None:
        with self._path.open("a") as file:
            file.write(name + "\n")

    def forget(self) -> None:
        self._path.unlink(missing_ok=True)


# ---- The account -----------------------------------------------------------------------------------------------------


class Account:
    """What came of each step, on disk whenever something changed."""

    def __init__(self, folder: Path, steps: Sequence[Step], *, rehearsal: bool) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self.steps, self.folder, self.log = list(steps), folder, folder / "log.txt"
        self.log.write_bytes(b"")
        self.run = {
            "began": datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            "commit": commit(),
            "rehearsal": rehearsal,
        }
        self.lines: list[dict[str, Any]] = [
            {"step": s.name, "kind": s.kind, "shows": s.shows, "state": "waiting"} for s in steps
        ]
        self._write()

    def note(self, k: int, **values: Any) -> None:
        """Adds to the k-th step's line."""
        self.lines[k] |= values
        self._write()

    def missed_checks(self) -> list[str]:
        """Those of this command that did not pass."""
        return [line["step"] for line in self.lines if line["kind"] == "check" and line["state"] != "passed"]

    @property
    def versions(self) -> dict[str, Any]:
        """As the step of that name found them."""
        return {k: v for line in self.lines for r in line.get("records", ()) for k, v in r.get("versions", {}).items()}

    def row(self, k: int) -> str:
        line = self.lines[k]
        seconds = f"{line['seconds']:.0f} s" if "seconds" in line else ""
        limit = f"of {line['limit_s']:.0f}" if "limit_s" in line else ""
        return f"{line['step']:18} {line['state']:13} {seconds:>6} {limit:7} {line.get('note', '')}".rstrip()

    def tests(self, k: int) -> list[str]:
        """Of a check that did not pass, what came of each of its tests."""
        line = self.lines[k]
        if line["state"] in ("passed", "waiting"):
            return []
        return [f"    {r['seconds']:5.0f} s {r['came']:8} {r['test']}" for r in line.get("records", ()) if "test" in r]

    def table(self) -> str:
        head = [f"{self.run['began']}, commit {self.run['commit']}"]
        if self.run["rehearsal"]:
            head.append("A rehearsal on a CPU: it proves nothing about GPUs.")
        head += [f"{name} {version}" for name, version in self.versions.items()]
        figures = [r["figure"] for line in self.lines for r in line.get("records", ()) if "figure" in r]
        rows = [row for k in range(len(self.lines)) for row in (self.row(k), *self.tests(k))]
        shown = [" ".join(f"{k}={v}" for k, v in figure.items() if k not in DETAILS) for figure in figures]
        return "\n".join([*head, "", *rows, *(["", *shown] if shown else [])])

    def _write(self) -> None:
        lines = [{"run": self.run | {"versions": self.versions}}, *self.lines]
        replace(self.folder / "summary.jsonl", "".join(json.dumps(line) + "\n" for line in lines))
        replace(self.folder / "summary.txt", self.table() + "\n")


def replace(path: Path, text: str) -> None:
    """Whole or not at all, however this process ends."""
    beside = path.with_name(f".{path.name}")
    beside.write_text(text)
    beside.replace(path)


def commit() -> str:
    """Of this checkout; where git or its folder did not travel, as pack_extras.py noted it."""
    noted = ROOT / ".gpuextras" / "commit"
    if noted.exists():
        return noted.read_text().strip()
    try:
        said = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True, timeout=10
        )
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return said.stdout.strip() or "unknown"


if __name__ == "__main__":
    sys.exit(main())
