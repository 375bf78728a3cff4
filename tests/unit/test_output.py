"""What people see: no secrets, and nothing that a terminal would obey. Output that can't be written ends nothing."""

from __future__ import annotations

import io
import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlaif_ray.cli import app
from rlaif_ray.output import DroppingStream, ShownStream, SurvivingStream, on_one_line, say_as_is, shown
from rlaif_ray.tracking.progress import ItemProgress, print_columns, print_table
from tests.endpoint import FakeEndpoint, FaultProxy
from tests.pace import scaled
from tests.terminal import on_a_terminal

# Sets a title, clears the screen, hides, links, reverses the reading order, and is invisible.
POISON = (
    "\x1b]0;owned\x07\x1b[2J\x1b[8m\x1b]8;;http://evil\x1b\\\x9b31m\u202e\u2066\u200b\x08\r\x7f[bold][link=http://evil]"
)
FORBIDDEN = set("\x1b\x07\x9b\u202e\u2066\u200b\x08\r\x7f")
HARMLESS = "two\nlines\tand a tab, naïve 😀 👩\u200d👧 کتاب\u200cها, [bold]no markup[/bold] \\x1b"

ROOT = Path(__file__).parents[2]
# Prints until long after its output is lost, then does its work.
PROGRAM = """
import os, sys, time
from rlaif_ray.output import survive_lost_output
survive_lost_output()
for _ in range(200):
    print("x" * 1000, flush=True)
    print("y" * 1000, file=sys.stderr, flush=True)
os.write(1, b"from a library\\n")
open(sys.argv[1], "w").write("done")
"""


def gone() -> int:
    """A pipe whose reader has left."""
    reader, writer = os.pipe()
    os.close(reader)
    return writer


def full() -> int:
    return os.open("/dev/full", os.O_WRONLY)


@pytest.mark.parametrize("lost", [gone, full], ids=["reader left", "disk full"])
def test_a_program_goes_on_and_ends_well(lost: Callable[[], int], tmp_path: Path) -> None:
    out, err = lost(), lost()
    command = [sys.executable, "-c", PROGRAM, tmp_path / "work"]
    done = subprocess.run(command, cwd=ROOT, stdout=out, stderr=err, timeout=60, check=False)
    assert done.returncode == 0 and (tmp_path / "work").read_text() == "done"


def test_closed_descriptors(tmp_path: Path) -> None:
    command = [sys.executable, "-c", PROGRAM.replace('os.write(1, b"from a library\\n")', ""), str(tmp_path / "work")]
    done = subprocess.run(["sh", "-c", 'exec "$@" >&- 2>&-', "sh", *command], cwd=ROOT, timeout=60, check=False)
    assert done.returncode == 0 and (tmp_path / "work").read_text() == "done"


@pytest.mark.parametrize("lost", [gone, full], ids=["reader left", "disk full"])
def test_a_command_whose_reader_has_left(lost: Callable[[], int]) -> None:
    command = [sys.executable, "-m", "rlaif_ray.cli", "train", "--help"]
    done = subprocess.run(command, cwd=ROOT, stdout=lost(), stderr=subprocess.PIPE, timeout=120, check=False)
    assert (done.returncode, done.stderr) == (0, b"")


@pytest.mark.parametrize("size", [100, 300_000])
def test_a_pipe_that_is_full_for_a_moment(size: int) -> None:
    """Its other end, or a program that shares it, may have made it one that does not block."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with open(writer, "w", encoding="utf-8") as file:
        stream = SurvivingStream(file)
        filled = 0
        while True:  # not a byte more goes in
            try:
                filled += os.write(writer, b"x")
            except BlockingIOError:
                break
        seen: list[bytes] = []

        def read() -> None:
            time.sleep(0.05)
            while sum(map(len, seen)) < filled + size + 6:
                seen.append(os.read(reader, 1 << 16))

        thread = threading.Thread(target=read)
        thread.start()
        stream.write("é" * (size // 2))
        stream.write("\n")
        stream.flush()
        stream.write("after")
        stream.flush()
        thread.join(timeout=10)
    os.close(reader)
    assert b"".join(seen)[filled:].decode() == "é" * (size // 2) + "\nafter"


def test_a_pipe_that_stays_full_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlaif_ray.output._FULL_S", 0.05)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with open(writer, "w", encoding="utf-8") as file:
        stream = SurvivingStream(file)
        began = time.perf_counter()
        for _ in range(100):
            stream.write("x" * 100_000)
            stream.flush()
        assert time.perf_counter() - began < scaled(2.0)
    os.close(reader)


# As a library that was imported before, and one that is imported later.
LOGS = """
import logging, os, sys
early = logging.getLogger("early")
early.addHandler(logging.StreamHandler())
from rlaif_ray.output import show_logs_safely, survive_lost_output
DOOR()
DOOR()
logging.getLogger("late").addHandler(logging.StreamHandler(sys.stdout))
address = "https://bucket.s3.amazonaws.com/x?X-Amz-Signature=" + os.environ["SIGNED"]
for name in ("early", "late"):
    logging.getLogger(name).error("GET %s failed", address)
print("token=" + os.environ["SIGNED"])
raise ValueError(address)
"""


@pytest.mark.parametrize("door", ["survive_lost_output", "show_logs_safely"])
def test_what_libraries_log_has_no_secrets(door: str) -> None:
    """Also through handlers that began before, and in a traceback that nothing catches."""
    signature = "canary5d1b7c9e0f2a4b6c"
    environment = os.environ | {"SIGNED": signature}
    command = [sys.executable, "-c", LOGS.replace("DOOR", door)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 1 and signature not in done.stdout + done.stderr
    address = "https://bucket.s3.amazonaws.com/x?X-Amz-Signature=***"
    assert done.stdout == f"GET {address} failed\ntoken=***\n"
    assert done.stderr.count(address) == 2 and "Traceback" in done.stderr


def test_a_log_goes_on_after_a_write_that_failed() -> None:
    """A pipe that is full for now, a disk that has room later."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with os.fdopen(reader, "rb") as read, os.fdopen(writer, "w", buffering=1) as write:
        stream = ShownStream(DroppingStream(write))
        for _ in range(3):
            assert stream.write("x" * 100_000 + "\n") == 100_001
        while len(os.read(read.fileno(), 1 << 20)) == 1 << 20:
            pass
        stream.write("again token=abcdefgh1234\n")
        os.set_blocking(reader, False)
        assert b"again token=***\n" in os.read(read.fileno(), 1 << 20)


def test_what_a_terminal_has_no_letters_for(tmp_path: Path) -> None:
    with (tmp_path / "out").open("w", encoding="ascii") as file:
        stream = SurvivingStream(file)
        assert stream.write("café │ 1\n") == 9 and stream.writable() and stream.encoding == "ascii"
        stream.writelines(["a\n", "b\n"])
    assert (tmp_path / "out").read_text() == "caf? ? 1\na\nb\n"
    stream.write("closed")  # raises nothing
    stream.flush()


# --- what is shown --------------------------------------------------------------------------------------------------


WORDS_OF_SCRIPTS = (
    "ภาษา\u200bไทย\u200bPython",
    "ភាសា\u200bខ្មែរ",
    "မြန်မာ\u200bဘာသာ",
    "🏴\U000e0067\U000e0062\U000e0065\U000e006e\U000e0067\U000e007f wins",
)


@pytest.mark.parametrize("text", WORDS_OF_SCRIPTS)
def test_letters_of_other_scripts_stay(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert shown(text) == text
    print_table("x", [("a", text)])
    assert text in capsys.readouterr().out


def test_the_same_characters_elsewhere_are_shown_as_codes() -> None:
    assert shown("pass\u200bword \u200bก ก\u200b") == "pass\\u200bword \\u200bก ก\\u200b"
    assert shown("a\U000e0067\U000e007f 🏴\U000e0067 x") == "a\\U000e0067\\U000e007f 🏴\\U000e0067 x"


def test_codes_are_shown_as_codes() -> None:
    assert shown("a\x1b[31mb\u202ec\x9bd\r\ne\ud800") == "a\\x1b[31mb\\u202ec\\x9bd\ne\\ud800"
    assert not FORBIDDEN & set(shown(POISON)) and shown(shown(POISON)) == shown(POISON)
    assert shown(HARMLESS) == HARMLESS and on_one_line("a\nb") == "a\\nb"


def test_what_libraries_write_has_colours_and_progress_bars_alone() -> None:
    below = io.StringIO()
    stream = ShownStream(SurvivingStream(below))
    drawn = "\r 3%|#  |", "\x1b[36m(pid)\x1b[0m text", "\x1b[1;38;5;8mgrey\x1b[39m", "\n\n", "\x1b[A\x1b[A", "\r"
    drawn += "\r\x1b[2K4%|## |\r5%", "\r\x1b[K6%\x1b[2K\r7%", "\n", "8%\n"
    for text in drawn:
        assert stream.write(text) == len(text)
    assert below.getvalue() == "".join(drawn)
    stream.writelines([POISON, "\x1b[2K\x1b[31;8mhidden\x1b[K", f"{'1;' * 40}\x1b[{'38;1;' * 5000}"])
    stream.flush()
    rest = below.getvalue()[len("".join(drawn)) :]
    assert not FORBIDDEN - {"\r"} & set(rest.replace("\x1b[31m", "")) and "owned" in rest


def test_a_secret_that_is_written_in_parts_or_colours_is_masked() -> None:
    below = io.StringIO()
    stream = ShownStream(SurvivingStream(below))
    print("the api_key:", "S1", file=stream)
    print("api_key\x1b[0m=\x1b[32m'S\x1b[1m2'\x1b[0m, n=\x1b[31m3\x1b[0m", file=stream)
    stream.write("password=")
    assert "password" not in below.getvalue()
    stream.write("S3 is it")
    stream.flush()
    expected = "the api_key: ***\napi_key\x1b[0m=\x1b[32m'***\x1b[1m'\x1b[0m, n=\x1b[31m3\x1b[0m\npassword=*** is it"
    assert below.getvalue() == expected


def test_what_programs_read_is_not_masked(monkeypatch: pytest.MonkeyPatch) -> None:
    below = io.StringIO()
    monkeypatch.setattr(sys, "stdout", ShownStream(SurvivingStream(below)))
    print("before", end=" ")
    say_as_is('{"password": 3, "n": "\x1b[2J"}')
    assert below.getvalue() == 'before {"password": 3, "n": "\\x1b[2J"}\n'


def test_what_threads_write_is_not_mixed() -> None:
    below = io.StringIO()
    stream = ShownStream(SurvivingStream(below))
    stream.write("a ")
    thread = threading.Thread(target=lambda: print("b", "c", file=stream))
    thread.start()
    thread.join()
    stream.write("d\n")
    assert below.getvalue() == "b c\na d\n"


@pytest.mark.parametrize("text", [POISON, HARMLESS])
def test_tables_and_notes_show_letters(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    print_table(text, [(text, text)], Path(text.replace("/", "")))
    print_columns(text, [text, "b"], [(text, text)])
    with ItemProgress(text, 3, "rows") as progress:
        progress.note(text)
        progress.advance(3)
    out = capsys.readouterr().out
    assert not FORBIDDEN & set(out)
    assert out.count("[bold]") >= 5


PROGRAM_ON_A_TERMINAL = """
import os, sys
from pathlib import Path
from rlaif_ray.output import survive_lost_output
survive_lost_output()
from rlaif_ray.config.sections import TrackingConfig
from rlaif_ray.tracking import open_tracker, print_summary
from rlaif_ray.tracking.progress import ItemProgress, print_table
poison, folder = sys.argv[1], Path(sys.argv[2])
SECRETS = ["see https://b.s3.amazonaws.com/x?X-Amz-Expires=60&X-Amz-Signature=" + "0123456789abcdef" * 12]
SECRETS += ["a word or two before api_key=" + "Canary0x" * 30]
SECRETS += ["it said: " + "of the run " * 8 + os.environ["DB_PASSWORD"]]
with open_tracker(folder, config={}, tracking=TrackingConfig(wandb="disabled"), total_steps=1, name=poison) as track:
    track.note(poison)
    print("of a library: " + poison)
    for secret in SECRETS:
        print(secret)
        print("\x1b[32mgreen\x1b[0m " + secret, file=sys.stderr)
        track.note(secret)
    with track.step(1) as metrics, metrics.phase("rollout"):
        metrics.add({"scorer/" + poison: 0.25})
    print_summary(track.summary({"evaluator": poison}), folder)
with ItemProgress(poison, 2, "rows") as progress:
    progress.note(poison)
    for secret in SECRETS:
        print(secret)
        progress.note(secret)
    progress.advance(2)
print_table(poison, [(poison, poison), *((secret, secret) for secret in SECRETS)])
"""


def test_a_terminal_draws_and_texts_do_not(tmp_path: Path) -> None:
    poison = POISON.replace("\r", "")  # the terminal itself adds some
    seen = on_a_terminal(sys.executable, "-c", PROGRAM_ON_A_TERMINAL, poison, str(tmp_path), DB_PASSWORD="a")
    text = seen.decode()
    assert "\x1b[2K" in text and "\x1b[?25h" in text  # drawn, and the cursor is back
    assert text.count("owned") >= 8 and text.count("[bold]") >= 8
    for planted in ("\x1b]", "\x1b[2J", "\x1b[8m", "\x07", "\x9b", "\u202e", "\u2066", "\u200b", "\x08", "\x7f"):
        assert planted not in text


@pytest.mark.parametrize("columns", ["60", "110"])
def test_no_line_of_a_secret_is_drawn(columns: str, tmp_path: Path) -> None:
    """Longer than the terminal is wide, or with blanks at which a line is broken."""
    password = "canary one canary two canary three"
    command = [sys.executable, "-c", PROGRAM_ON_A_TERMINAL, "plain", str(tmp_path)]
    seen = on_a_terminal(*command, COLUMNS=columns, DB_PASSWORD=password).decode()
    letters = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|[\s│]", "", seen)
    for part in ("89abcdef", "Canary", "canary"):
        assert part not in letters
    assert letters.count("Signature=***") >= 5 and letters.count("api_key=***") >= 6 and "\x1b[32mgreen" in seen


def test_help_has_its_colours() -> None:
    seen = on_a_terminal(str(Path(sys.executable).with_name("rlaif")), "report", "--help")
    assert b"\x1b[1" in seen and b"\\x1b" not in seen


def rlaif(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    return result.exit_code, result.stdout + result.stderr


def test_the_program_shows_no_codes_of_others(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A row, a file's name and an endpoint's words, in every way out that the command has."""
    monkeypatch.setenv("JUDGE_TEST_KEY", "canary-6d1f0a7c3e")
    monkeypatch.setenv("RLAIF_DEBUG", "1")
    pairs = tmp_path / f"p{POISON.replace('/', '')}.jsonl"
    row = {"prompt": f"1? {POISON}", "response_a": f"Yes {POISON}", "response_b": "No"}
    pairs.write_text(json.dumps(row) + "\n")
    config = tmp_path / "label.yaml"
    with FakeEndpoint() as endpoint, FaultProxy(endpoint.url) as proxy:
        judge = {
            "type": "openai",
            "model": "m",
            "base_url": proxy.url,
            "api_key_env": "JUDGE_TEST_KEY",
            "max_retries": 0,
        }
        config.write_text(json.dumps({"data": {"path": str(pairs)}, "judge": judge}))
        code, planned = rlaif("label", config, f"run_dir={tmp_path / 'a'}", "--dry-run")
        assert code == 0 and "p\\e]0;owned" in planned  # as YAML writes it
        proxy.inject("401", message=f"said {POISON} to canary-6d1f0a7c3e", times=9)
        code, refused = rlaif("label", config, f"run_dir={tmp_path / 'b'}")
        assert code == 2 and r"said \x1b]0;owned\x07\x1b[2J" in refused and "to ***)" in refused
        proxy.faults.clear()
        proxy.inject("400", message=POISON, times=2)
        code, failed = rlaif("label", config, f"run_dir={tmp_path / 'c'}")
        assert code == 1 and "endpoint_error" in failed
        config.write_text(config.read_text().replace('"judge"', json.dumps(f"judge{POISON}")))
        code, wrong = rlaif("label", config, f"run_dir={tmp_path / 'd'}")
        assert code == 2 and "line 1 has a key with the character #x001b in it" in wrong
        config = config.rename(tmp_path / f"{pairs.stem}.yaml")
        code, unreadable = rlaif("label", config, f"run_dir={tmp_path / 'd'}")
        assert code == 2 and r"p\x1b]0;owned" in unreadable and "in its name" in unreadable
    logs = [path.read_text() for path in tmp_path.glob("*/error.log")]
    for text in (planned, refused, failed, wrong, unreadable, *logs):
        assert not FORBIDDEN & set(text) and "canary" not in text


def test_a_key_adds_no_line(tmp_path: Path) -> None:
    config = tmp_path / "label.yaml"
    config.write_text('{"judge\\nrlaif: all is well": 1, "st\\u202eeps": 2}')
    code, told = rlaif("label", config)
    assert code == 2 and "\nrlaif: all" not in told and "#x000a" in told and "#x202e" in told
