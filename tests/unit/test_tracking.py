"""What a run leaves and shows: files, resume, the real wandb offline, secrets, progress, summary, memory."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rlaif_ray.config.sections import TrackingConfig
from rlaif_ray.errors import InputError
from rlaif_ray.secrecy import without_secrets
from rlaif_ray.tracking import Tracker, open_tracker, print_summary
from rlaif_ray.tracking.files import keep_rows
from rlaif_ray.tracking.memory import PeakMemory
from tests.terminal import on_a_terminal

OFF = TrackingConfig(wandb="disabled")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(autouse=True)
def _no_wandb_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)


def tracker(run_dir: Path, tracking: TrackingConfig = OFF, **more: Any) -> Tracker:
    return open_tracker(run_dir, **{"config": {}, "tracking": tracking, "total_steps": 4, "name": "test", **more})


def take_steps(track: Tracker, first: int, last: int) -> None:
    for step in range(first, last + 1):
        with track.step(step) as metrics:
            metrics.add({"reward/mean": step / 10})
            track.samples(step, [{"prompt": "p", "completion": f"c{step}.{i}", "score": 0.5} for i in range(3)])


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def read_wandb(path: Path) -> list[Any]:
    """Records of a .wandb file: LevelDB's log format behind a header of 7 bytes."""
    import wandb

    wandb.teardown()  # as at the end of a process: its service writes the rest
    from wandb.proto.wandb_internal_pb2 import Record  # type: ignore[attr-defined, unused-ignore]

    data, at, part, records = path.read_bytes(), 7, b"", []
    while at + 7 <= len(data):
        left = 32768 - at % 32768
        if left < 7:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        part += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or last part
            records.append(Record.FromString(part))
            part = b""
    return records


def history(records: list[Any]) -> dict[int, dict[str, Any]]:
    result: dict[int, dict[str, Any]] = {}
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            result.setdefault(items["_step"], {}).update(items)
    return result


class TestFiles:
    def test_one_row_a_step_with_times_and_null_for_nan(self, tmp_path: Path) -> None:
        with tracker(tmp_path / "run") as track, track.step(1) as metrics:
            with metrics.phase("rollout"):
                time.sleep(0.03)
            metrics.add({"reward/mean": 1.5, "kl/mean": float("nan"), "policy/loss": np.float32(0.5)})
            metrics.add({"value/loss": float("inf")})
        (row,) = rows(tmp_path / "run" / "metrics.jsonl")
        assert row["step"] == 1
        assert (row["reward/mean"], row["kl/mean"], row["value/loss"], row["policy/loss"]) == (1.5, None, None, 0.5)
        assert row["time/rollout_s"] >= 0.03
        assert row["time/step_s"] == pytest.approx(row["time/rollout_s"] + row["time/other_s"])

    def test_each_row_is_on_disk_when_its_step_ends(self, tmp_path: Path) -> None:
        with tracker(tmp_path) as track:
            take_steps(track, 1, 2)
            assert len(rows(tmp_path / "metrics.jsonl")) == 2

    def test_a_failed_step_leaves_nothing(self, tmp_path: Path) -> None:
        with pytest.raises(KeyError), tracker(tmp_path) as track:
            take_steps(track, 1, 1)
            with track.step(2) as metrics:
                metrics.add({"reward/mean": 1.0})
                track.samples(2, [{"completion": "lost"}])
                raise KeyError
        assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1]
        assert {row["step"] for row in rows(tmp_path / "samples.jsonl")} == {1}

    def test_a_step_can_be_tried_again(self, tmp_path: Path) -> None:
        with tracker(tmp_path) as track:
            with pytest.raises(KeyError), track.step(1):
                track.samples(1, [{"completion": "lost"}])
                raise KeyError
            take_steps(track, 1, 1)
        assert "lost" not in (tmp_path / "samples.jsonl").read_text()

    def test_all_samples_are_kept_whatever_the_text(self, tmp_path: Path) -> None:
        texts = ["日本語", "lone \udc80 surrogate", 'quote " and\nnewline', "\u2028"]
        with tracker(tmp_path) as track:
            track.samples(1, [{"completion": text, "evidence": {"p": (0.1, float("nan"))}} for text in texts])
        lines = (tmp_path / "samples.jsonl").read_bytes().split(b"\n")[:-1]
        assert [json.loads(line)["completion"] for line in lines] == texts
        assert json.loads(lines[0]) == {"step": 1, "completion": texts[0], "evidence": {"p": [0.1, None]}}
        assert "日本語" in lines[0].decode()

    def test_evaluations(self, tmp_path: Path) -> None:
        with tracker(tmp_path) as track:
            track.evaluation(0, {"held_out": {"mean": 0.25}})
        assert rows(tmp_path / "evaluations.jsonl") == [{"step": 0, "held_out": {"mean": 0.25}}]

    @pytest.mark.parametrize("below", ["file/run", "file"])
    def test_unwritable_folder_is_the_users_error(self, tmp_path: Path, below: str) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(InputError, match=r"run_dir must be .*\(got .*\): .*run_dir=PATH"):
            tracker(tmp_path / below)

    def test_read_only_folder_is_the_users_error(self) -> None:
        with pytest.raises(InputError, match="run_dir must be"):
            tracker(Path("/proc/self/run"))


class TestPhases:
    def test_nested_phases_count_once(self, tmp_path: Path) -> None:
        with tracker(tmp_path) as track, track.step(1) as metrics, metrics.phase("update"):
            time.sleep(0.02)
            with track.phase("weight_sync"):
                time.sleep(0.04)
        (row,) = rows(tmp_path / "metrics.jsonl")
        assert row["time/weight_sync_s"] >= 0.04
        assert 0.02 <= row["time/update_s"] < row["time/weight_sync_s"]
        assert row["time/update_s"] + row["time/weight_sync_s"] <= row["time/step_s"]

    def test_unknown_name_is_our_error(self, tmp_path: Path) -> None:
        with pytest.raises(AssertionError), tracker(tmp_path) as track, track.step(1) as m, m.phase("generation"):
            pass

    def test_steps_go_up(self, tmp_path: Path) -> None:
        with tracker(tmp_path) as track:
            take_steps(track, 1, 2)
            with pytest.raises(AssertionError), track.step(2):
                pass


class TestResume:
    def test_one_row_per_step_after_a_resume(self, tmp_path: Path) -> None:
        with tracker(tmp_path) as track:
            track.evaluation(0, {"score": 1})
            take_steps(track, 1, 3)
            track.evaluation(3, {"score": 2})
        with tracker(tmp_path, resume_step=2) as track:
            assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2]
            take_steps(track, 3, 4)
        assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
        assert [row["step"] for row in rows(tmp_path / "samples.jsonl")] == [1] * 3 + [2] * 3 + [3] * 3 + [4] * 3
        assert [row["step"] for row in rows(tmp_path / "evaluations.jsonl")] == [0]

    def test_a_line_cut_by_a_kill_is_dropped(self, tmp_path: Path) -> None:
        with tracker(tmp_path) as track:
            take_steps(track, 1, 2)
        path = tmp_path / "metrics.jsonl"
        whole = path.read_bytes()
        for cut in (b'{"step": 2, "rew', b'{"step": 1, "text": "\xe6\x97', b"\0\0\0"):
            path.write_bytes(whole + cut)
            with tracker(tmp_path, resume_step=2):
                pass
            assert path.read_bytes() == whole

    def test_a_last_line_without_its_end_is_kept(self, tmp_path: Path) -> None:
        with tracker(tmp_path) as track:
            take_steps(track, 1, 2)
        path = tmp_path / "metrics.jsonl"
        whole = path.read_bytes()
        path.write_bytes(whole[:-1])
        with tracker(tmp_path, resume_step=2):
            assert path.read_bytes() == whole

    def test_a_broken_line_elsewhere_is_told(self, tmp_path: Path) -> None:
        (tmp_path / "metrics.jsonl").write_text('{"step": 1}\nnot json\n{"step": 2}\n')
        with pytest.raises(InputError, match=r"metrics\.jsonl .*line 2"):
            tracker(tmp_path, resume_step=2)

    def test_rows_that_nobody_reads_again_may_be_broken(self, tmp_path: Path) -> None:
        """Samples are read by the report alone, which leaves out what it can't read."""
        text = '{"step": 1}\nnot json\n{"step": 2}\n'
        with tracker(tmp_path) as track:
            take_steps(track, 1, 2)
        (tmp_path / "samples.jsonl").write_text(text + '{"step": 3}\n')
        with tracker(tmp_path, resume_step=2):
            assert (tmp_path / "samples.jsonl").read_text() == text

    def test_metrics_that_somebody_edited(self, tmp_path: Path) -> None:
        with tracker(tmp_path) as track:
            take_steps(track, 1, 2)
        (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time/step_s": "long"}\n{"step": 2, "reward/mean": 0.5}\n')
        with tracker(tmp_path, resume_step=2) as track:
            take_steps(track, 3, 3)
            summary = track.summary({})
        assert summary["steps"] == 3 and summary["reward"]["last"] == 0.3

    @pytest.mark.parametrize("text_length", [1, 100, 70_000, 200_000])
    def test_rows_of_any_length(self, tmp_path: Path, text_length: int) -> None:
        """The file is read from its end, in blocks."""
        path = tmp_path / "samples.jsonl"
        lines = [json.dumps({"step": k // 2, "text": "x" * (text_length + k)}) + "\n" for k in range(20)]
        for last in (-1, 0, 4, 9, 12):
            path.write_text("".join(lines))
            keep_rows(path, last)
            assert path.read_text() == "".join(lines[: 2 * (last + 1)])

    def test_a_resume_costs_no_memory_and_no_time(self, tmp_path: Path) -> None:
        path = tmp_path / "samples.jsonl"
        with path.open("wb") as file:
            for step in range(1, 2001):
                file.write(json.dumps({"step": step, "text": "x" * 20_000}).encode() + b"\n")
        tracemalloc.start()
        keep_rows(path, 1990)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 1_000_000 and path.stat().st_size > 39_000_000  # the file has 40 MB

    def test_killed_while_running(self, tmp_path: Path) -> None:
        program = f"""if 1:
            import time
            from pathlib import Path
            from rlaif_ray.config.sections import TrackingConfig
            from rlaif_ray.tracking import open_tracker
            with open_tracker(Path({str(tmp_path)!r}), config={{}}, tracking=TrackingConfig(wandb="offline"),
                              total_steps=10**6, name="killed") as track:
                for step in range(1, 10**6):
                    with track.step(step) as metrics:
                        metrics.add({{"reward/mean": 0.5}})
                        time.sleep(0.5)
                        track.samples(step, [{{"completion": "x" * 100_000}}])
        """
        process = subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        for line in process.stdout:
            if line.startswith("step 5/"):
                process.send_signal(signal.SIGKILL)
                break
        process.communicate()
        with tracker(tmp_path, resume_step=3) as track:
            take_steps(track, 4, 4)
            summary = track.summary({})
        assert [row["step"] for row in rows(tmp_path / "metrics.jsonl")] == [1, 2, 3, 4]
        assert [row["step"] for row in rows(tmp_path / "samples.jsonl")] == [1, 2, 3, 4, 4, 4]
        assert summary["steps"] == 4
        (path,) = tmp_path.glob("wandb/offline-run-*/*.wandb")
        assert 1 in history(read_wandb(path))  # written within a second
        assert not [path for path in tmp_path.iterdir() if path.name.endswith(".new")]

    def test_without_a_resume_files_start_anew(self, tmp_path: Path) -> None:
        with tracker(tmp_path) as track:
            take_steps(track, 1, 2)
            track.evaluation(2, {"score": 1})
            track.summary({})
        with tracker(tmp_path) as track:
            take_steps(track, 1, 1)
        assert len(rows(tmp_path / "metrics.jsonl")) == 1
        assert len(rows(tmp_path / "samples.jsonl")) == 3
        assert not rows(tmp_path / "evaluations.jsonl")
        assert not (tmp_path / "summary.json").exists()


class TestSummary:
    def test_shares_reward_and_extra(self, tmp_path: Path) -> None:
        with tracker(tmp_path) as track:
            with track.phase("loading"):
                time.sleep(0.05)
            for step in (1, 2, 3):
                with track.step(step) as metrics:
                    for name, seconds in (("rollout", 0.06), ("update", 0.02)):
                        with metrics.phase(name):
                            time.sleep(seconds)
                    time.sleep(0.02)
                    metrics.add({"reward/mean": step / 10, "time/made_up_s": 99.0})
            summary = track.summary({"held_out": {"gain": 0.1}})
        assert json.loads((tmp_path / "summary.json").read_text()) == summary
        assert summary["steps"] == 3
        assert summary["total_steps"] == 4
        assert 0.05 <= summary["setup_s"] < summary["wall_s"]
        assert summary["outside_steps_s"]["loading"] >= 0.05
        shares = summary["phase_share"]
        assert set(shares) == {"rollout", "update", "other"}
        assert sum(shares.values()) == pytest.approx(1)
        assert shares["rollout"] == pytest.approx(0.6, abs=0.1)
        assert summary["reward"] == {"first": 0.1, "last": 0.3, "window": 1}
        assert summary["held_out"] == {"gain": 0.1}
        assert summary["peak_rss_gb"] > 0.01

    def test_time_and_peak_add_up_over_a_resume(self, tmp_path: Path) -> None:
        with tracker(tmp_path) as track:
            time.sleep(0.3)
            take_steps(track, 1, 2)  # no summary: as if killed here
        state = tmp_path / "tracking_state.json"
        first = json.loads(state.read_text())
        state.write_text(json.dumps({**first, "peak_rss_gb": 1234.5}))
        with tracker(tmp_path, resume_step=2) as track:
            take_steps(track, 3, 4)
            summary = track.summary({})
        assert first["wall_s"] >= 0.3
        assert first["wall_s"] < summary["wall_s"] < first["wall_s"] + 30
        assert summary["setup_s"] < summary["wall_s"] - 0.3
        assert summary["peak_rss_gb"] == 1234.5
        with tracker(tmp_path) as track:
            assert track.summary({})["wall_s"] < 0.3

    def test_before_any_step(self, tmp_path: Path) -> None:
        with tracker(tmp_path) as track:
            summary = track.summary({})
        assert (summary["steps"], summary["phase_share"]) == (0, {})
        print_summary(summary, tmp_path)

    @pytest.mark.parametrize(
        ("interval", "words"),
        [((0.1, 0.3), "is above zero"), ((-0.3, -0.1), "is below zero"), ((-0.1, 0.3), "includes zero")],
    )
    def test_printed(
        self, tmp_path: Path, capsys: pytest.CaptureFixture[str], interval: tuple[float, float], words: str
    ) -> None:
        with tracker(tmp_path) as track:
            take_steps(track, 1, 4)
            low, high = interval or (None, None)
            gain = {"mean": 0.2, "ci95_low": low, "ci95_high": high, "n": 9}
            held_out = {"before": {"mean": 0.1}, "after": {"mean": 0.3}, "gain": gain}
            summary = track.summary({"held_out": held_out})
        capsys.readouterr()
        print_summary(summary, tmp_path)
        text = " ".join(capsys.readouterr().out.replace("│", " ").split())
        for expected in ("4 of 4", "0.1 -> 0.4", "0.1 -> 0.3", "+0.2, 95% interval", words, "metrics.jsonl", "GB"):
            assert expected in text


class TestMemory:
    def test_counts_watched_processes_and_their_children(self) -> None:
        hold = "import sys; x = b'x' * 150_000_000; print(1, flush=True); sys.stdin.read()"
        nested = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {hold!r}])"
        memory = PeakMemory()
        before = memory.sample()
        process = subprocess.Popen(
            [sys.executable, "-c", nested], stdin=subprocess.PIPE, stdout=subprocess.PIPE, start_new_session=True
        )
        assert process.stdout is not None
        process.stdout.readline()
        memory.watch(lambda: [process.pid, 2**22 - 1])  # already a descendant: counted once; and one long gone
        during = memory.sample()
        process.communicate()
        assert 0.14 < during - before < 0.25
        assert memory.peak_gb == during
        assert memory.sample() < during - 0.1

    def test_a_failing_callable_leaves_a_gap_only(self) -> None:
        memory = PeakMemory()
        memory.watch(lambda: [][0])
        assert memory.sample() > 0.01

    def test_thread_ends_with_the_tracker(self, tmp_path: Path) -> None:
        with tracker(tmp_path):
            assert "peak-memory" in {thread.name for thread in threading.enumerate()}
        assert "peak-memory" not in {thread.name for thread in threading.enumerate()}


class TestProgress:
    def test_plain_lines(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with tracker(tmp_path) as track:
            track.note("placement: [2 engines]")
            with track.phase("starting engines"):
                pass
            for step in (1, 2):
                with track.step(step) as metrics:
                    metrics.add({"reward/mean": 0.12345, "kl/mean": float("nan"), "completion/length_mean": 145.2})
        lines = capsys.readouterr().out.splitlines()
        assert lines[0] == "test: 4 steps"
        assert lines[1] == "[0:00] placement: [2 engines]"
        assert lines[2:4] == ["[0:00] starting engines ...", "[0:00] starting engines done in 0.0 s"]
        assert lines[4:] == [
            "step 1/4  reward 0.123  kl nan  length 145  0.0 s/step  eta 0:00",
            "step 2/4  reward 0.123  kl nan  length 145  0.0 s/step  eta 0:00",
        ]

    def test_other_jobs_show_what_they_have(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        with tracker(tmp_path, resume_step=2) as track, track.step(3) as metrics:
            metrics.add({"supervised/loss": 2.5})
        out = capsys.readouterr().out
        assert "resumed after step 2" in out
        assert "step 3/4  supervised/loss 2.5  0.0 s/step" in out

    def test_live_on_a_terminal(self, tmp_path: Path) -> None:
        program = f"""if 1:
            import time
            from pathlib import Path
            from rlaif_ray.config.sections import TrackingConfig
            from rlaif_ray.tracking import open_tracker
            with open_tracker(Path({str(tmp_path)!r}), config={{}}, tracking=TrackingConfig(wandb="disabled"),
                              total_steps=2, name="live [1]") as track:
                track.note("a [note]")
                print("a library's line")
                for step in (1, 2):
                    with track.step(step) as metrics, metrics.phase("rollout"):
                        metrics.add({{"reward/mean": 0.25}})
                        time.sleep(0.6)
        """
        seen = on_a_terminal(sys.executable, "-c", program, TERM="xterm")
        text = re.sub(r"\x1b\[[?\d;]*[A-Za-z]", "", seen.decode())
        assert re.search(r"\[0:0\d\] a \[note\]", text)
        assert "a library's line" in text
        assert "live [1]" in text
        assert re.search(r"step 1/2  .*elapsed  .*s/step  .*left", text)
        assert "reward 0.25" in text
        assert "rollout 0:0" in text
        assert "step 2/2" in text
        assert seen.rstrip().endswith(b"\x1b[?25h")  # the cursor is back


class TestSecrets:
    def test_by_key(self) -> None:
        config = {
            "sampling": {"max_new_tokens": 64, "prompt_tokens": 3, "monkey": "m"},
            "learner": {"tokens_per_micro_batch": 4096},
            "judge": {"api_key": "x1", "hfToken": "b", "headers": {"Authorization": "Bearer c"}, "api_keys": ["d"]},
            "password": "e",
            "client-secret": {"inner": ["f", 7]},
            "token": None,
        }
        assert without_secrets(config) == {
            "sampling": {"max_new_tokens": 64, "prompt_tokens": 3, "monkey": "m"},
            "learner": {"tokens_per_micro_batch": 4096},
            "judge": {"api_key": "***", "hfToken": "***", "headers": {"Authorization": "***"}, "api_keys": ["***"]},
            "password": "***",
            "client-secret": {"inner": ["***", "***"]},
            "token": None,
        }
        assert config["password"] == "e"

    def test_by_value(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("JUDGE_API_KEY", "planted-secret")
        monkeypatch.setenv("EMPTY_TOKEN", "")
        masked = without_secrets(
            {"a": "planted-secret", "b": ["x", "--key=planted-secret"], "c": "", "d": "https://me:pw@host/v1", "e": 1}
        )
        assert masked == {"a": "***", "b": ["x", "--key=***"], "c": "", "d": "https://***@host/v1", "e": 1}


class TestWandb:
    def test_offline_file_holds_all_but_secrets(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.setenv("JUDGE_API_KEY", "planted-in-environment")
        monkeypatch.setattr(sys, "argv", ["rlaif", "judge.api_key=planted-in-argv"])
        config = {
            "learner": {"lr": 1e-3},
            "judge": {"api_key": "planted-in-config", "extra": ["planted-in-environment"]},
        }
        tracking = TrackingConfig(wandb="offline", samples_per_step=2, tags=("a-tag",), project="a-project")
        with tracker(tmp_path, tracking, config=config, name="a-name") as track:
            track.evaluation(0, {"held_out": {"mean": 0.25}})
            take_steps(track, 1, 3)
            track.evaluation(3, {"held_out": {"mean": 0.5}})
            summary = track.summary({"held_out": {"gain": 0.125}})
        assert summary["wandb_failures"] == 0

        (path,) = tmp_path.glob("wandb/offline-run-*/run-*.wandb")
        records = read_wandb(path)
        (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
        assert run.run_id == (tmp_path / "wandb_run_id.txt").read_text().strip()
        assert (run.project, run.display_name, list(run.tags)) == ("a-project", "a-name", ["a-tag"])
        config_seen = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert config_seen["learner"] == {"lr": 1e-3}
        assert config_seen["judge"] == {"api_key": "***", "extra": ["***"]}

        logged = history(records)
        assert sorted(logged) == [0, 1, 2, 3]
        assert [logged[step]["reward/mean"] for step in (1, 2, 3)] == [0.1, 0.2, 0.3]
        assert all("time/step_s" in logged[step] for step in (1, 2, 3))
        assert (logged[0]["evaluation/held_out/mean"], logged[3]["evaluation/held_out/mean"]) == (0.25, 0.5)
        final = {}
        for record in records:
            final.update({item.key or "/".join(item.nested_key): item.value_json for item in record.summary.update})
        assert json.loads(final["held_out/gain"]) == 0.125

        for step in (1, 2, 3):
            media = next(value for key, value in logged[step].items() if key.startswith("samples"))
            media = media if isinstance(media, dict) else {"path": logged[step]["samples/path"]}
            table = json.loads((path.parent / "files" / media["path"]).read_text())
            assert table["columns"] == ["step", "prompt", "completion", "score"]
            assert table["data"] == [[step, "p", f"c{step}.{i}", 0.5] for i in range(2)]

        everything = b"".join(each.read_bytes() for each in tmp_path.rglob("*") if each.is_file())
        assert b"planted" not in everything
        captured = capfd.readouterr()
        assert "wandb" not in captured.out + captured.err

    def test_one_run_id_over_a_resume_and_a_new_one_anew(self, tmp_path: Path) -> None:
        offline = TrackingConfig(wandb="offline")
        ids = []
        for resume_step in (0, 2, 0):
            with tracker(tmp_path, offline, resume_step=resume_step) as track:
                take_steps(track, resume_step + 1, resume_step + 2)
            ids.append((tmp_path / "wandb_run_id.txt").read_text())
        assert ids[0] == ids[1] != ids[2]
        assert len(list(tmp_path.glob(f"wandb/offline-run-*-{ids[0].strip()}*"))) >= 1

    def test_disabled_never_imports_it(self, tmp_path: Path) -> None:
        program = f"""if 1:
            import sys
            from pathlib import Path
            from rlaif_ray.config.sections import TrackingConfig
            from rlaif_ray.tracking import open_tracker
            assert not {{"rich", "wandb", "psutil", "torch", "ray"}} & set(sys.modules)
            with open_tracker(Path({str(tmp_path)!r}), config={{}}, tracking=TrackingConfig(wandb="disabled"),
                              total_steps=1, name="x") as track:
                with track.step(1):
                    track.samples(1, [{{"completion": "c"}}])
                track.summary({{}})
            assert "wandb" not in sys.modules
        """
        subprocess.run([sys.executable, "-c", program], cwd=ROOT, check=True)
        assert not (tmp_path / "wandb").exists()

    @pytest.mark.parametrize("reason", ["no network", "no key"])
    def test_unreachable_falls_back_to_offline(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], reason: str
    ) -> None:
        import wandb

        wandb.teardown()  # it reads its variables once
        mode = "online"
        monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
        monkeypatch.setattr("rlaif_ray.tracking.wandb_run._INIT_TIMEOUT_S", 2)
        monkeypatch.setenv("HOME", str(tmp_path))  # no ~/.netrc
        if reason == "no network":
            monkeypatch.setenv("WANDB_API_KEY", "a" * 40)
            mode = "auto"
        with tracker(tmp_path / "run", TrackingConfig.model_validate({"wandb": mode})) as track:
            take_steps(track, 1, 2)
            assert track.summary({})["wandb_failures"] == 0
        lines = [line for line in capsys.readouterr().out.splitlines() if "wandb" in line]
        assert len(lines) == 1
        assert "going on offline" in lines[0]
        paths = list((tmp_path / "run").glob("wandb/offline-run-*/*.wandb"))
        assert sorted(step for path in paths for step in history(read_wandb(path))) == [1, 2]

    def test_its_errors_are_told_once_and_counted(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        import wandb

        def fail(*_: Any, **__: Any) -> None:
            raise OSError("no space")

        monkeypatch.setattr(wandb.sdk.wandb_run.Run, "log", fail)
        with tracker(tmp_path, TrackingConfig(wandb="offline")) as track:
            take_steps(track, 1, 2)
            summary = track.summary({})
        assert summary["wandb_failures"] == 4  # metrics and samples of two steps
        assert capsys.readouterr().out.count("wandb could not") == 1
        assert len(rows(tmp_path / "metrics.jsonl")) == 2
