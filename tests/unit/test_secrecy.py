"""Secrets in a config are refused, and no message says them back."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlaif_ray.cli import app
from rlaif_ray.config.load import load_job
from rlaif_ray.errors import InputError
from tests.jobs import TRAIN

CANARY = "canary-7f3a9c51"

JUDGE = "judge: {type: openai, model: m, %s}\ndata: {path: x.jsonl}\n"


def refused(config: str, folder: Path, *settings: str, job: str = "label") -> str:
    """What a config is refused with, by the loader and by the command; the secret is in neither."""
    path = folder / "job.yaml"
    path.write_text(config)
    with pytest.raises(InputError) as caught:
        load_job(job, [path], settings)
    result = CliRunner().invoke(app, [job, str(path), *settings, "--dry-run"])
    assert result.exit_code == 2
    for text in (str(caught.value), result.stdout, result.stderr):
        assert CANARY not in text
    assert str(caught.value) in result.stderr
    return str(caught.value)


@pytest.mark.parametrize(
    ("written", "key"),
    [
        (f"extra_body: {{api_key: {CANARY}}}", "judge.extra_body.api_key"),
        (f"extra_body: {{headers: {{Authorization: Bearer {CANARY}}}}}", "judge.extra_body.headers.Authorization"),
        (f"extra_body: {{tools: [{{hfToken: {CANARY}}}]}}", "judge.extra_body.tools.hfToken"),
        (f"base_url: 'https://me:{CANARY}@host/v1'", "judge.base_url"),
        (f"base_url: 's3://AKIAX:{CANARY}/4@bucket/x'", "judge.base_url"),
        (f"api_key: {CANARY}", "judge.api_key"),  # which is no setting at all
    ],
)
def test_a_secret_in_a_file_is_refused(written: str, key: str, tmp_path: Path) -> None:
    told = refused(JUDGE % written, tmp_path)
    assert f"{key} must not hold a secret (set by {tmp_path}/job.yaml" in told and "environment variable" in told


def test_a_secret_on_the_command_line_is_refused(tmp_path: Path) -> None:
    told = refused(TRAIN, tmp_path, f"rollout.engine_kwargs.hf_token={CANARY}", job="train")
    assert "rollout.engine_kwargs.hf_token must not hold a secret" in told


def test_the_key_instead_of_its_variable_is_refused(tmp_path: Path) -> None:
    told = refused(JUDGE % f"api_key_env: sk-{CANARY}", tmp_path)
    assert "judge.api_key_env must name an environment variable" in told


def test_what_a_secret_variable_holds_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_API_KEY", CANARY)
    told = refused(JUDGE % f"extra_body: {{user: 'x-{CANARY}'}}", tmp_path)
    assert "judge.extra_body.user must not hold a secret" in told and "*_KEY" in told


def test_other_problems_are_told_beside_it(tmp_path: Path) -> None:
    told = refused(JUDGE % f"api_key: {CANARY}, timeout_s: -1", tmp_path)
    assert "judge.api_key must not hold a secret" in told and "judge.timeout_s" in told


@pytest.mark.parametrize(
    "written",
    [
        "extra_body: {stop_token: END, max_tokens: 3, key_points: 'yes', token: x}",
        "base_url: 'http://localhost:8000/v1', api_key_env: MY_API_KEY",
        "extra_body: {user: me@example.org}",
        "base_url: 'http://localhost:8000/v1/models@latest'",
    ],
)
def test_what_only_looks_like_one_is_taken(written: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_KEY", "/home/me/.ssh/id")
    path = tmp_path / "job.yaml"
    path.write_text(JUDGE.replace("x.jsonl", "/home/me/.ssh/id") % written)
    assert load_job("label", [path]).config.judge.model == "m"
