"""What `launch/submit.py` gives away: Ray's own client packs and sends, to a dashboard that keeps what it got."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from tests.endpoint import _Server

ROOT = Path(__file__).parents[2]
CANARY = "canary-2b8e5d7f"


class Dashboard(_Server):
    """The parts of a Ray dashboard that a submission asks for."""

    def __init__(self) -> None:
        self.jobs: list[dict[str, Any]] = []
        self.packages: list[bytes] = []
        super().__init__()

    async def _handle(self, request: web.Request) -> web.StreamResponse:
        if request.path == "/api/version":
            return web.json_response({"version": "4", "ray_version": "2.60.0", "ray_commit": "x", "session_name": "s"})
        if request.path.startswith("/api/packages/"):
            if request.method == "GET":
                return web.Response(status=404)
            self.packages.append(await request.read())
            return web.Response()
        if request.path.endswith("/logs/tail"):
            log = web.WebSocketResponse()
            await log.prepare(request)
            await log.send_str(f"at work\n\x1b]0;owned\x07\x1b[2J\u202e token={CANARY}\n")
            await log.close()
            return log
        if request.method == "GET":
            told = {"type": "SUBMISSION", "entrypoint": "x", "submission_id": "raysubmit_1", "status": "SUCCEEDED"}
            return web.json_response(told)
        assert request.path == "/api/jobs/", request.path
        self.jobs.append(await request.json())
        return web.json_response({"submission_id": "raysubmit_1", "job_id": "raysubmit_1"})


@pytest.fixture
def dashboard() -> Iterator[Dashboard]:
    with Dashboard() as server:
        yield server


def submit(dashboard: Dashboard, *words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return run("--address", dashboard.url.removesuffix("/v1"), *words, **environment)


def run(*words: object, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, ROOT / "launch/submit.py"]
    variables = {"PATH": "/usr/bin:/bin", "HOME": "/nonexistent", "RAY_AUTH_MODE": "disabled", **environment}
    return subprocess.run(
        [*map(str, command), *map(str, words)], env=variables, capture_output=True, text=True, timeout=120, check=False
    )


HELD_BACK = (
    ".env .env.local prod.env .envrc key.pem tls.key id_rsa id_ed25519 .netrc .pgpass .git-credentials .git/config "
    ".ssh/config .aws/credentials deep/.env deep/er/.env.prod deep/server.pem .docker/config.json .npmrc .pypirc "
    "credentials.json secrets.yaml kubeconfig.yaml ignored.txt"
)
SENT = "job.yaml prompts.jsonl deep/environment.yaml deep/tokenizer.json keys.py monkey.txt .rayrc pem.md"


def test_files_that_hold_secrets_are_not_uploaded(dashboard: Dashboard, tmp_path: Path) -> None:
    for name in (HELD_BACK + " " + SENT).split():
        path = tmp_path / "project" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(CANARY if name in HELD_BACK.split() else "plain")
    (tmp_path / "project/.gitignore").write_text("ignored.txt\n")
    done = submit(dashboard, "--no-wait", "--working-dir", tmp_path / "project", "train", "job.yaml", "steps=3")
    assert done.returncode == 0, done.stderr
    (package,) = dashboard.packages
    with zipfile.ZipFile(io.BytesIO(package)) as packed:
        files = {name for name in packed.namelist() if not name.endswith("/")}
        assert files == {*SENT.split(), ".gitignore"}
    (job,) = dashboard.jobs
    assert job["entrypoint"] == "python -m rlaif_ray.cli train job.yaml steps=3"
    assert job["runtime_env"]["env_vars"] == {"RAY_JOB_STOP_WAIT_TIME_S": "930"}


def test_without_gitignore_too(dashboard: Dashboard, tmp_path: Path) -> None:
    (tmp_path / ".env").write_text(CANARY)
    (tmp_path / "job.yaml").write_text("steps: 1\n")
    submit(dashboard, "--no-wait", "--working-dir", tmp_path, "train", "job.yaml", RAY_RUNTIME_ENV_IGNORE_GITIGNORE="1")
    with zipfile.ZipFile(io.BytesIO(dashboard.packages[0])) as packed:
        assert packed.namelist() == ["job.yaml"]


@pytest.mark.parametrize(
    "words",
    [
        ("train", "x.yaml", f"judge.extra_body.api_key={CANARY}"),
        ("train", "x.yaml", f"judge.extra_body={{password: {CANARY}}}"),
        ("train", "x.yaml", f"checkpoint.path=s3://key:{CANARY}@bucket/run"),
        ("train", "x.yaml", f"judge.base_url=https://host/v1?sig={CANARY}"),
        ("train", "x.yaml", f"data.path=hf_{CANARY.replace('-', '')}abcdefgh"),
        ("label", "x.yaml", "--token", CANARY),
        ("--working-dir", f"https://me:{CANARY}@host/x.zip", "train", "x.yaml"),
        ("train", "x.yaml", f"run_dir=runs/{CANARY}"),  # which MY_TOKEN holds
    ],
)
def test_words_with_a_secret_are_refused(words: tuple[str, ...], dashboard: Dashboard) -> None:
    done = submit(dashboard, *words, MY_TOKEN=CANARY)
    assert done.returncode == 2 and "a job's words must hold no secret" in done.stderr and "***" in done.stderr
    assert "environment" in done.stderr and CANARY not in done.stdout + done.stderr
    assert CANARY.replace("-", "") not in done.stdout + done.stderr and dashboard.jobs == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("DB_PASS", "x"),
        ("MY_PAT", "x"),
        ("TOKEN", "x"),
        ("COOKIE", "x"),
        ("DATABASE_URL", f"postgres://me:{CANARY}@h/x"),
    ],
)
def test_variables_that_are_secrets_are_refused(name: str, value: str, dashboard: Dashboard) -> None:
    done = submit(dashboard, "--env", name, "train", "x.yaml", **{name: value})
    assert done.returncode == 2 and f"--env must not pass secrets (got {name})" in done.stderr
    assert CANARY not in done.stderr and dashboard.jobs == []


def test_other_words_and_variables_are_sent(dashboard: Dashboard) -> None:
    words = ("train", "x.yaml", "judge.api_key_env=MY_KEY", "sampling.max_new_tokens=3", "run_dir=/shared/runs/a b")
    done = submit(dashboard, "--no-wait", "--env", "TOKENIZERS_PARALLELISM", *words, TOKENIZERS_PARALLELISM="false")
    assert done.returncode == 0, done.stderr
    (job,) = dashboard.jobs
    assert json.dumps(job).count("/shared/runs/a b") == 1
    assert job["runtime_env"]["env_vars"]["TOKENIZERS_PARALLELISM"] == "false"


DEAD = "http://127.0.0.1:9"


@pytest.mark.parametrize(
    ("named", "others"),
    [
        ("--address", {"RAY_API_SERVER_ADDRESS": DEAD, "RAY_ADDRESS": DEAD}),
        ("--address", {"RAY_ADDRESS": "127.0.0.1:9"}),
        ("RAY_API_SERVER_ADDRESS", {"RAY_ADDRESS": DEAD}),
        ("RAY_ADDRESS", {}),
    ],
)
def test_the_first_that_names_a_dashboard_counts(named: str, others: dict[str, str], dashboard: Dashboard) -> None:
    """Ray's own client takes the environment's above the one that it is given."""
    url = dashboard.url.removesuffix("/v1")
    words = ("--address", url) if named == "--address" else ()
    given = others if words else others | {named: url}
    done = run(*words, "--no-wait", "train", "x.yaml", **given)
    assert done.returncode == 0, done.stderr
    assert len(dashboard.jobs) == 1


def test_a_jobs_log_is_followed_without_codes_and_secrets(dashboard: Dashboard) -> None:
    done = submit(dashboard, "train", "x.yaml")
    assert done.returncode == 0, done.stderr
    assert "at work\n\\x1b]0;owned\\x07\\x1b[2J\\u202e token=***\n" in done.stdout
