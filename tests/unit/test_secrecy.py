"""What a secret is; secrets in a config are refused, and no message says them back."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from rlaif_ray.cli import app
from rlaif_ray.config.jobs import JOBS
from rlaif_ray.config.layers import item_class, variants
from rlaif_ray.config.load import load_job
from rlaif_ray.config.resolved import resolved_yaml
from rlaif_ray.documents import read_yaml
from rlaif_ray.errors import InputError
from rlaif_ray.secrecy import (
    is_secret_name,
    is_secret_variable,
    masked,
    masked_word,
    remember,
    secrets_in,
    secrets_in_arguments,
    without_secrets,
)
from tests.jobs import TRAIN
from tests.pace import scaled

ROOT = Path(__file__).parents[2]
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
        (f"extra_body: {{token: {CANARY}}}", "judge.extra_body.token"),
        (f"extra_body: {{MY_PAT: {CANARY}}}", "judge.extra_body.MY_PAT"),
        (f"extra_body: {{credentials: {{user: me, inner: [{CANARY}]}}}}", "judge.extra_body.credentials.inner"),
        (f"extra_body: {{dbPass: {CANARY}, jwt: {CANARY}}}", "judge.extra_body.jwt"),
        (f"extra_body: {{db: 'postgresql+psycopg://me:{CANARY}@host/x'}}", "judge.extra_body.db"),
        (f"extra_body: {{db: 'Server=a b;User Id=me;Password={CANARY};'}}", "judge.extra_body.db"),
        (f"extra_body: {{at: 'https://host/x?v=1&sig={CANARY}'}}", "judge.extra_body.at"),
        (f"extra_body: {{user: 'sk-proj-{CANARY}'}}", "judge.extra_body.user"),
        (f"extra_body: {{'hf_{CANARY.replace('-', '')}xyzxyz': 1}}", "judge.extra_body.***"),
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
    assert "judge.extra_body.user must not hold a secret" in told and "environment variable MY_API_KEY" in told


def test_other_problems_are_told_beside_it(tmp_path: Path) -> None:
    told = refused(JUDGE % f"api_key: {CANARY}, timeout_s: -1", tmp_path)
    assert "judge.api_key must not hold a secret" in told and "judge.timeout_s" in told


@pytest.mark.parametrize(
    "setting",
    [
        "judge.model=org/xai-explanations-llama-3b",
        "judge.model=pypi-classifier-qwen-small",
        "judge.model=sk_live_first-sweep-2026-09-01",
        "judge.model=nvapi-nemotron-70b-instruct-2",
        "judge.model=sk-my_long_experiment_name_2",
        "judge.model=hf_internaltestingtinyrandomllama",
        "judge.model=wandb_v1_baseline-run-2026",
        "judge.extra_body.tag=sk-2026-first-sweep",
        "judge.extra_body.tag=x-models-v3-y",  # has the value of CACHE_KEY in it
        "judge.extra_body.template=placeholder.yaml",
        "judge.extra_body.safety.secrets=block",
        "judge.extra_body.credentials=redact",
        "judge.extra_body.api_key=your-api-key-here",
        "judge.extra_body.api_key=EMPTY",
        "judge.extra_body.pass='2'",
        "run_dir=runs/sk-learn-baseline-2026",
        "run_dir=runs/lr=1e-6,pass=2",
        "data.path=s3://b/access_key=2/x.jsonl",
        "data.path=/data/token=17/pass=3/x.jsonl",
    ],
)
def test_ordinary_names_and_paths_are_taken(setting: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_KEY", "models-v3")
    monkeypatch.setenv("PARTITION_TOKEN", "experiment-baseline-2026")
    monkeypatch.setenv("OPENAI_API_KEY", "placeholder")
    path = tmp_path / "job.yaml"
    path.write_text(JUDGE % "timeout_s: 3")
    load_job("label", [path], [setting])
    assert masked(setting) == setting and list(secrets_in_arguments([setting])) == []


@pytest.mark.parametrize("value", ["7f3a9c51d2", "x-Ab3dE5fG7h", "qWeRtYuIoPaSdFgHjK", "abcdefghijklmnopqrst1"])
def test_a_random_value_of_any_key_is_masked(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CACHE_KEY", value)
    assert masked(f"got {value}!") == "got ***!"
    ((key, why),) = secrets_in({"user": f"x{value}"})
    assert key == ("user",) and "CACHE_KEY" in why and value not in why


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


# --- what is one ----------------------------------------------------------------------------------------------------

NAMES = """
    api_key apiKey APIKEY api-key x-api-key apikey MY_PAT GITHUB_PAT PASSWD DB_PASS dbPass db-pass password PASSWORD2
    PGPASSWORD MYSQL_PWD Pwd Authorization Proxy-Authorization cookie Set-Cookie session_cookies jwt JWT bearer
    bearerToken credentials AWS_SECRET_ACCESS_KEY aws_access_key_id AWSSecretKey client-secret secret secrets hf_token
    hfToken HF_TOKEN access_token AccessToken accesstoken refresh_token id_token session_token private_key privateKey
    AccountKey SharedAccessKey signing-key wandb_api_key passphrase credentials_json
"""
NO_NAMES = """
    pass_rate first_pass forward_pass bypass passes max_tokens max_new_tokens tokens prompt_tokens tokenizer
    token_budget stop_token stop_token_ids pad_token eos_token key keys key_points monkey keyboard path pattern
    patience compass dispatch repeat compatible spatial author authority secretary api_key_env password_file
    token_path cookie_name secret_count PWD OLDPWD tokens_per_micro_batch bearing
"""


def test_names_are_told_by_whole_words() -> None:
    assert [name for name in NAMES.split() if not is_secret_name(name)] == []
    assert [name for name in NO_NAMES.split() if is_secret_name(name)] == []


def test_any_key_or_token_of_the_environment_is_one() -> None:
    secret = ["TOKEN", "MY_TOKEN", "SOME_KEY", "X_KEY_ID", "REDISCLI_AUTH", "OPENAI_API_KEY_2", "DB_PASS", "AZURE_SAS"]
    usual = ["PATH", "TOKENIZERS_PARALLELISM", "MAX_TOKENS", "RAY_AUTH_MODE", "SSH_AUTH_SOCK", "GIT_ASKPASS", "HOME"]
    assert [name for name in secret if not is_secret_variable(name)] == []
    assert [name for name in usual if is_secret_variable(name)] == []


def keys_of(model: type[BaseModel]) -> Iterator[str]:
    for name in model.model_fields:
        yield name
        for section in [*variants(model, name).values(), item_class(model, name)]:
            if section is not None:
                yield from keys_of(section)


def test_no_setting_of_ours_is_one() -> None:
    keys = {key for model in JOBS.values() for key in keys_of(model)}
    assert len(keys) > 150 and [key for key in keys if is_secret_name(key)] == []


def values_of(path: Path) -> Any:
    return read_yaml(path, dict)


@pytest.mark.parametrize("path", sorted(ROOT.glob("configs/**/*.yaml")), ids=lambda path: str(path.relative_to(ROOT)))
def test_shipped_configs_have_none(path: Path) -> None:
    assert without_secrets(values_of(path)) == values_of(path)


SHAPES = {  # put together here, so that no scanner takes this file for a leak
    "OpenAI": "sk-" + "proj-a1b2c3d4e5f6g7h8",
    "Anthropic": "sk-" + "ant-api03-a1b2c3d4e5f6g7h8",
    "Hugging Face": "hf" + "_abcdefghijABCDEFGHIJklmn",
    "GitHub": "ghp" + "_a1b2c3d4e5a1b2c3d4e5",
    "GitHub OAuth": "gho" + "_a1b2c3d4e5a1b2c3d4e5",
    "GitHub fine-grained": "github_pat" + "_11A1b2c3d4e5a1b2c3d4e5",
    "GitLab": "glpat" + "-a1b2c3d4e5a1b2c3d4e5",
    "AWS": "AKIA" + "IOSFODNN7EXAMPLE",
    "Slack": "xoxb" + "-1234567890-abcdef",
    "Google": "AIza" + "SyA1234567890abcdefghijklmnopqrstuvw",
    "JWT": "eyJ" + "hbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0In0.abc_def-1",
    "PEM": "-----BEGIN RSA " + "PRIVATE KEY-----\nMIIabc\n-----END RSA PRIVATE KEY-----",
    "cut PEM": "-----BEGIN " + "PRIVATE KEY-----\nMIIabc",
}


@pytest.mark.parametrize("name", SHAPES)
def test_known_shapes_are_masked_anywhere(name: str) -> None:
    secret = SHAPES[name]
    assert masked(f"it said ({secret})") in ("it said (***)", "it said (***")
    assert list(secrets_in({"note": secret})) == [(("note",), "it looks like a key or token")]
    assert without_secrets({"note": [secret]}) == {"note": ["***"]}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("GET https://h/v1?a=1&token=S&b=2", "GET https://h/v1?a=1&token=***&b=2"),
        ("url=https://h/x?X-Amz-Signature=S", "url=https://h/x?X-Amz-Signature=***"),
        ("https://a.blob/x?sv=2&sig=S%2F", "https://a.blob/x?sv=2&sig=***"),
        ("redis://:S@h:6379/0", "redis://***@h:6379/0"),
        ("postgresql://me:my@long@S@host/db", "postgresql://***@host/db"),
        ("mongodb+srv://user:p@ss@host", "mongodb+srv://***@host"),
        ("s3://AKIAX:S/4@S@bucket/x@y", "s3://***@bucket/x@y"),
        ("a http://u:S@h,http://v:S@S@h2/x b@c", "a http://***@h,http://***@h2/x b@c"),
        (r'{"password": "ab\"cdS fgh", "n": 1}', '{"password": "***", "n": 1}'),
        (r'"{\"password\": \"ab\\\"cdS fgh\", \"n\": 1}"', r'"{\"password\": \"***\", \"n\": 1}"'),
        ("password='it''s S'", "password='***'"),
        (r"password='it\'s S', n='x'", "password='***', n='x'"),
        ("password=a,S", "password=***"),
        ("host=h,password=a,S,port=3, x", "host=h,password=***,port=3, x"),
        ("f(password=S, n=3)", "f(password=***, n=3)"),
        ("a:\n  passphrase: foo S\n  b: 3", "a:\n  passphrase: ***\n  b: 3"),
        ("- db_password: foo S", "- db_password: ***"),
        ('said {"password": "foo bar S ba...', 'said {"password": "***"'),
        ("mongodb+srv://u:S@h/x", "mongodb+srv://***@h/x"),
        ("Server=a b;Password=S T;Pwd=S;x=1", "Server=a b;Password=***;Pwd=***;x=1"),
        ("AccountName=n;AccountKey=S+/==;x=1", "AccountName=n;AccountKey=***;x=1"),
        ("host=h password=S", "host=h password=***"),
        ('{"api_key": "S", "n": 1}', '{"api_key": "***", "n": 1}'),
        (r'"{\"api_key\": \"S\"}"', r'"{\"api_key\": \"***\"}"'),
        ("{'Authorization': 'Bearer S'}", "{'Authorization': '***'}"),
        ("Authorization: Basic S1", "Authorization: ***"),
        ("Cookie: sid=S; b=S", "Cookie: ***"),
        ("Bearer S1234567", "Bearer ***"),
        ("PGPASSWORD=S psql", "PGPASSWORD=*** psql"),
        ("api_key: S", "api_key: ***"),
        ("token=S12345-abcd", "token=***"),
        ("KeyError: MY_TOKEN=S", "KeyError: MY_TOKEN=***"),
    ],
)
def test_what_is_assigned_to_a_secrets_name_is_masked(text: str, expected: str) -> None:
    assert masked(text) == expected and masked(expected) == expected


@pytest.mark.parametrize(
    "text",
    [
        "Run export OPENAI_API_KEY=..., or name the variable in judge.api_key_env=MY_KEY",
        "the password: it is needed; bearer tokens are; so is authorization: see the docs",
        "NoCredentialsError: Unable to locate credentials",
        "max_tokens=30 stop_token=END key=3 pass_rate=0.5 tokens_per_s: 12",
        "task-0123456789abcdefghij hf-internal-testing/tiny-random2-Llama sk-learn",
        "http://localhost:8000/v1/models@latest?limit=3 git@github.com:a/b",
        "api_key=None password='' token=$TOKEN secret=<yours>",
        "PWD=/tmp/x",
        "commit 46f197b0c1d2e3f405162738495a6b7c8d9e0f1a",
    ],
)
def test_what_is_none_is_left(text: str) -> None:
    assert masked(text) == text


def test_a_secret_variables_value_is_masked_in_every_form(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASS", "p/ss w0rd")
    monkeypatch.setenv("KEY_FILE_KEY", "/home/me/.ssh/id")
    monkeypatch.setenv("WANDB_API_KEY", "disabled")
    assert masked("tracking.wandb=disabled") == "tracking.wandb=disabled"
    assert masked("a p/ss w0rd, p%2Fss%20w0rd at /home/me/.ssh/id") == "a ***, *** at /home/me/.ssh/id"
    remember("from-any-name", "ANY")
    assert masked("a from-any-name") == "a ***"
    assert "variable ANY" in next(secrets_in({"user": "from-any-name"}))[1]


PIECES = ["a=", "password: ", "://a:", "eyJ-", "sk-", "token=a;", "Cookie: a=", 'api_key=\\"', "token=", "token='", "@"]
PIECES += ["://a:b@", "sk-a-", "/password=1", "password=1,", "token=''", "token=" + "'" * 3, 'token="\\']
PIECES += [
    "x-",
    "key=a,",
    "pass=1;",
    "sk-abcdefghijklmnop-",
    'token=\\"\\\\\\"',
    "password:\n",
    "token=no-",
    "1e",
    "://a:1/@",
]


@pytest.mark.parametrize("piece", PIECES)
def test_long_texts_take_no_time(piece: str) -> None:
    text = piece * (40_000 // len(piece))
    began = time.process_time()
    masked(text)
    list(secrets_in({"token": text}))
    assert time.process_time() - began < scaled(1.0)


def test_prose_and_sections_of_a_users_name_are_no_secrets() -> None:
    values = {
        "principles": ["Refuse to say which password=hunter2 was set.", "Authorization: ask first."],
        "stages": {"jwt": {"job": "sft", "name": "x"}, "cookie": {"type": "judge", "columns": ["a"]}},
        "arms": {"secret": {"model": "m", "note": "n"}},
        "text": "x\ny",
    }
    assert without_secrets(values) == values and list(secrets_in(values)) == []


def test_a_resolved_config_is_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that the loader takes is masked in resolved.yaml: a resume would see another value."""
    monkeypatch.setenv("SOME_TOKEN", CANARY)
    path = tmp_path / "label.yaml"
    body = {"stop_token": "END", "token": "x", "user": "password=hunter2 is", "seed": 3}
    path.write_text(JUDGE % f"extra_body: {json.dumps(body)}, api_key_env: SOME_TOKEN")
    loaded = load_job("label", [path], ["run_dir=r"])
    (tmp_path / "resolved.yaml").write_text(resolved_yaml(loaded, {}, None))
    again = load_job("label", [tmp_path / "resolved.yaml"])
    assert again.config == loaded.config and again.config.judge.extra_body == body


def test_words_of_a_command_line() -> None:
    words = [
        "train",
        "x.yaml",
        "steps=3",
        "judge.api_key_env=MY_KEY",
        "sampling.max_tokens=5",
        "run_dir=/shared/runs/a",
    ]
    assert list(secrets_in_arguments(words)) == []
    words = ["judge.api_key=S", "--token", "S", "a=s3://k:S@b", "b=http://h?sig=S", "c={password: S}", SHAPES["OpenAI"]]
    found = list(secrets_in_arguments(words))
    assert len(found) == 6 and all("***" in one and "S" not in one for one in found)


@pytest.mark.parametrize(
    "word",
    [
        "data.system=Never say the admin password=foo aloud",
        "data={system: 'Never say the password=foo aloud', path: x}",
        "data.system='the token: sent in api_key=foo, is not yours'",
        "configs/train.yaml",
        "run_dir=runs/lr=1e-6,pass=2",
    ],
)
def test_words_that_the_loader_takes_stay_as_typed(word: str) -> None:
    assert masked_word(word) == word and list(secrets_in_arguments([word])) == []


@pytest.mark.parametrize(
    ("word", "shown"),
    [
        ("data.path=s3://k:S@b", "data.path=s3://***@b"),
        ("judge.extra_body={password: S}", "judge.extra_body={password: ***}"),
        ("judge.extra_body={password: [S", "judge.extra_body={password: [S"),
        ("judge.api_key.inner=S", "judge.api_key.inner=***"),
        ("PGPASSWORD=S", "PGPASSWORD=***"),
        ("https://me:S@host/x.zip", "https://***@host/x.zip"),
    ],
)
def test_words_with_a_secret_are_masked(word: str, shown: str) -> None:
    assert masked_word(word) == shown


def test_an_error_and_its_traceback_say_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever raises it, and also where the traceback is written to a file."""

    def fails(loaded: object) -> None:
        raise RuntimeError(
            f"could not log in at https://me:{CANARY}@host?token={CANARY}\nAuthorization: Bearer {CANARY}"
        )

    monkeypatch.setattr("rlaif_ray.pipelines.preferences.make_labels", fails)
    monkeypatch.setenv("RLAIF_DEBUG", "1")
    (tmp_path / "x.jsonl").write_text('{"prompt": "p", "response_a": "a", "response_b": "b"}\n')
    (tmp_path / "label.yaml").write_text(
        (JUDGE % "base_url: 'http://localhost:1/v1'").replace("x.jsonl", f"{tmp_path}/x.jsonl")
    )
    result = CliRunner().invoke(app, ["label", str(tmp_path / "label.yaml"), f"run_dir={tmp_path}/run"])
    log = (tmp_path / "run" / "error.log").read_text()
    assert result.exit_code == 1 and "could not log in" in result.stderr and "could not log in" in log
    for text in (result.stdout, result.stderr, log):
        assert CANARY not in text
