"""Real runs keep to this machine and to themselves: what they listen on, and where secrets that they get end up."""

from __future__ import annotations

import json
import pickle
import sys
import tempfile
import traceback
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from rlaif_ray.config.sections import OpenAIJudge
from rlaif_ray.errors import InputError
from rlaif_ray.feedback.remote import OpenAIAsker
from rlaif_ray.types import Message, Question
from tests.endpoint import FakeEndpoint, FaultProxy
from tests.ray.test_cluster import submit
from tests.runs import Program, rows, start, start_train, tiny_config

pytestmark = [pytest.mark.ray, pytest.mark.slow, pytest.mark.long]

JUDGE_KEY = "JUDGE_ENDPOINT_KEY"
CANARIES = {
    name: f"canary-{name.lower().replace('_', '-')}-7f3a9c"
    for name in (JUDGE_KEY, "OPENAI_API_KEY", "WANDB_API_KEY", "HF_TOKEN", "AWS_SECRET_ACCESS_KEY")
}
LOOPBACK = {"127.0.0.1", "::1", "::ffff:127.0.0.1"}


def found_in(folder: Path, words: set[str]) -> set[tuple[str, str]]:
    """(file, word) of every word in any file below a folder, whatever its kind."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return {
        (str(path.relative_to(folder)), word)
        for path in files
        for content in [path.read_bytes()]
        for word in words
        if word.encode() in content
    }


def listening(program: Program) -> set[tuple[str, str]]:
    """(process, address) of everything that listens."""
    found = set()
    for process in program.processes():
        try:
            sockets = process.net_connections("inet")
            found |= {(process.name(), s.laddr.ip) for s in sockets if s.status == psutil.CONN_LISTEN}
        except psutil.NoSuchProcess:
            continue
    return found


def test_a_local_run_listens_on_loopback_and_keeps_secrets(tmp_path: Path) -> None:
    """Two learner ranks, so that there is a store and gloo between them; Ray's own folder is searched as well."""
    run_dir = tmp_path / "run"
    settings = ("steps=300", "learner.ranks=2", "evaluation.held_out.path=null", "tracking.wandb=offline")
    with tempfile.TemporaryDirectory(prefix="ray-") as private:
        environment = {**CANARIES, "RAY_TMPDIR": private}
        program = start_train(tiny_config(tmp_path), *settings, run_dir=run_dir, environment=environment)
        try:
            program.wait_for(lambda: len(rows(run_dir / "metrics.jsonl")) >= 2)
            sockets = listening(program)
            assert found_in(Path(private), {"LearnerActor"})  # so it would have been found
            assert found_in(Path(private), set(CANARIES.values())) == set()
            program.interrupt()
            program.wait(180)
            assert program.exit_code == 130, program.stderr
            assert list(Path(private).iterdir()) == []
        finally:
            program.kill()
    report = start([Path(sys.executable).with_name("rlaif"), "report", run_dir], tmp_path / "report.out", CANARIES)
    assert report.wait(180).exit_code == 0 and (run_dir / "report.html").is_file(), report.stderr
    assert {address for _, address in sockets} <= LOOPBACK, sockets
    names = {name for name, _ in sockets}
    assert {"gcs_server", "raylet"} < names and any(name.startswith("ray::LearnerActor") for name in names)
    assert found_in(tmp_path, {"learner"}) and list(run_dir.glob("wandb/**/*.wandb"))
    assert found_in(tmp_path, set(CANARIES.values())) == set()


@pytest.fixture
def endpoint() -> Iterator[FaultProxy]:
    """Wants the key, and says it back in what it refuses."""
    with (
        FakeEndpoint(key=CANARIES[JUDGE_KEY]) as served,
        FaultProxy(served.url) as proxy,
    ):
        yield proxy


def label(folder: Path, name: str, url: str, environment: dict[str, str]) -> Program:
    folder.mkdir(exist_ok=True)
    pairs = folder / "pairs.jsonl"
    texts = ({"prompt": f"{k}?", "response_a": f"Yes {k}.", "response_b": f"No {k}."} for k in range(6))
    pairs.write_text("".join(json.dumps(row) + "\n" for row in texts))
    (folder / "label.yaml").write_text(
        f"data: {{path: {pairs}}}\n"
        f"judge: {{type: openai, model: judge-1, base_url: {url}, api_key_env: {JUDGE_KEY}, max_retries: 1}}\n"
        f"label: {{template: helpful, min_labeled_fraction: 0.1}}\n"
    )
    words = [Path(sys.executable).with_name("rlaif"), "label", folder / "label.yaml", f"run_dir={folder / name}"]
    program = start(words, folder / f"{name}.out", {**CANARIES, **environment})
    try:
        return program.wait(300)
    finally:
        program.kill()


def test_a_judges_key_is_nowhere(endpoint: FaultProxy, tmp_path: Path) -> None:
    """Of runs whose endpoint says the key back: in errors, in replies that are none, and as it refuses another."""
    key, folder = CANARIES[JUDGE_KEY], tmp_path / "label"
    for status in ("400", "500", "429"):
        endpoint.inject(status, message=f"you sent Authorization: Bearer {key}")
    endpoint.inject("body", text=f"<html>Bearer {key}</html>")
    well = label(folder, "well", endpoint.url, {})
    assert well.exit_code == 0, well.stdout + well.stderr
    assert not endpoint.faults
    wrong = {JUDGE_KEY: "canary-another-7f3a9c"}
    refused = label(folder, "refused", endpoint.url, {**wrong, "RLAIF_DEBUG": "1"})
    assert refused.exit_code == 2 and "Incorrect API key provided: Bearer ***" in refused.stderr
    assert found_in(folder, {"judge-1"})
    assert found_in(folder, {*CANARIES.values(), *wrong.values()}) == set()


def test_an_exception_holds_no_key(endpoint: FaultProxy, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does what it was raised from, or what crosses to another process."""
    secret = "canary-refused-7f3a9c"
    monkeypatch.setenv(JUDGE_KEY, secret)
    asker = OpenAIAsker(OpenAIJudge(type="openai", model="m", base_url=endpoint.url, api_key_env=JUDGE_KEY))
    try:
        with pytest.raises(InputError, match="refused the key") as caught:
            list(asker.answer([Question((Message("user", "hi"),), "", ("1", "2"))]))
    finally:
        asker.close()
    seen: list[BaseException] = [caught.value]
    while (inner := seen[-1].__cause__ or seen[-1].__context__) is not None:
        seen.append(inner)
    text = "".join(traceback.format_exception(caught.value)) + "".join(map(repr, seen))
    assert "***" in text and secret not in text
    assert secret.encode() not in pickle.dumps(caught.value)


# A job's actors, as the cluster starts them; what they print and raise is in Ray's logs.
ACTORS = """
import logging, sys, time
from rlaif_ray.config.jobs import TrainJob
from rlaif_ray.runtime import actors
from rlaif_ray.runtime.session import open_session
import ray

def talk(self, text):
    print("printed " + text)
    logging.getLogger("hub").error("logged " + text)
    print("from a library " + text, file=sys.stderr, flush=True)
    raise OSError("raised " + text)

named = {"policy": {"model": "m"}, "data": {"path": "p"}, "feedback": {"type": "judge", "judge": {"model": "m"}}}
job = TrainJob.model_validate({**named, "cluster": {"address": None, "device": "cpu"}})
with open_session(job.cluster, [job]):
    for each in (actors.EngineActor, actors.LearnerActor, actors.RewardModelActor):
        kind = type(each.__name__, (each,), {"talk": talk})
        actor = ray.remote(num_cpus=0)(kind).remote()
        try:
            ray.get(actor.talk.remote(sys.argv[1]))
        except OSError as error:
            assert sys.argv[1] in str(error)
    time.sleep(1)
    print("talked", flush=True)
    time.sleep(600)
"""


def test_what_actors_print_is_masked_in_rays_logs(tmp_path: Path) -> None:
    """Signed addresses, as errors of model hubs and object stores have them."""
    signature = "canary5d1b7c9e0f2a4b6c"
    text = f"GET https://bucket.s3.amazonaws.com/x?X-Amz-Signature={signature} failed"
    with tempfile.TemporaryDirectory(prefix="ray-") as private:
        command = [sys.executable, "-c", ACTORS, text]
        program = start(command, tmp_path / "actors.out", {"RAY_TMPDIR": private})
        try:
            program.wait_for(lambda: "talked" in program.stdout, timeout_s=120)
            for said in ("printed", "logged", "library"):
                shown = f"{said} GET https://bucket.s3.amazonaws.com/x?X-Amz-Signature=*** failed"
                assert len({file for file, _ in found_in(Path(private), {shown})}) >= 3
            assert found_in(Path(private), {signature}) == set()
        finally:
            program.kill()


def test_secrets_are_not_submitted(tmp_path: Path) -> None:
    """Ray writes the variables that go with a job into logs and into its list of jobs."""
    words = ("--address", "http://127.0.0.1:1", "--env", "HF_TOKEN", "train", "x.yaml")
    program = submit(tmp_path / "submit.out", *words, environment=CANARIES)
    assert program.exit_code == 2
    assert program.stderr.startswith("submit: --env must not pass secrets (got HF_TOKEN)")
    assert found_in(tmp_path, set(CANARIES.values())) == set()
