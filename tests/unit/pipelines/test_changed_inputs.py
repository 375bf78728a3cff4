"""Data-making jobs on a scripted engine: a model that is trained anew in place, an engine that is lost half way."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from rlaif_ray.config.load import load_job
from rlaif_ray.errors import FeedbackError, InputError, RunError
from rlaif_ray.pipelines import constitution, pairs, sampling
from rlaif_ray.rollout.fake import ScriptedGenerator
from rlaif_ray.types import Completion, Prompt
from tests.tiny import cached_tiny_model

JOBS: dict[str, tuple[Any, Callable[[Any], dict[str, Any]]]] = {
    "sample": (sampling, sampling.sample_responses),
    "pairs": (pairs, pairs.make_pairs),
    "revise": (constitution, constitution.revise),
}
PROMPTS = "data.path=package:train"
OWN: dict[str, tuple[str, ...]] = {
    "sample": (),
    "pairs": (),
    "revise": ("revision.examples=null", "revision.steps=1", "revision.max_new_tokens=8"),
}


class Engines:
    """A cluster with one scripted engine; counts what it was asked."""

    def __init__(self, model: Path) -> None:
        self.asked = 0
        self.auto = "fp32"
        self.used: list[str] = []  # precisions that engines were started in
        self.meanwhile: Callable[[], object] = lambda: None
        self.failure: Callable[[Any], str | None] = lambda _: None
        self.lost: Callable[[Prompt], str | None] = lambda _: None
        self._tokenizer = AutoTokenizer.from_pretrained(model)

    def _say(self, prompt: Prompt, sample: int) -> str | Completion:
        self.asked += 1
        self.meanwhile()
        if (reason := self.lost(prompt)) is not None:
            return Completion(prompt, sample, (), (), "", False, 0, reason)
        return f"answer {self.asked}"

    @contextmanager
    def open(self, job: Any, **_: Any) -> Iterator[Any]:
        self._job = job
        yield self

    def precision(self, choice: str) -> str:
        return self.auto if choice == "auto" else choice

    def precisions(self) -> dict[str, str]:
        return {"policy.precision": self.precision(self._job.policy.precision)}

    def start_rollouts(self, policy: Any, *_: Any, **__: Any) -> ScriptedGenerator:
        self.used.append(self.precision(policy.precision))
        return ScriptedGenerator(self._tokenizer, respond=self._say, failure=lambda one: self.failure(one))

    def wait(self) -> None: ...

    def stop_engines(self, _: Any) -> None: ...


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return Path(shutil.copytree(cached_tiny_model(tied=True, context=4096), tmp_path / "model"))


@pytest.fixture
def run(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., dict[str, Any]]]:
    """run(job, engines, *settings): the job's summary."""
    rows = [{"id": str(n), "prompt": f"q{n}"} for n in range(20)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))

    def start(job: str, engines: Engines, *settings: str) -> dict[str, Any]:
        module, make = JOBS[job]
        monkeypatch.setattr(module, "open_cluster", engines.open)
        words = [f"policy.model={model}", f"data.path={tmp_path / 'prompts.jsonl'}", f"run_dir={tmp_path / 'run'}"]
        return make(load_job(job, [], [*words, *OWN[job], *settings]))

    yield start


@pytest.mark.parametrize("job", JOBS)
def test_after_training_in_place_old_answers_are_not_returned(
    job: str, run: Callable[..., dict[str, Any]], model: Path, tmp_path: Path
) -> None:
    engines = Engines(model)
    run(job, engines)
    asked = engines.asked
    run(job, engines)
    assert engines.asked == asked  # nothing is asked twice
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-1] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    with pytest.raises(InputError) as refused:
        run(job, engines)
    told = str(refused.value)
    assert f"policy.model: {model} has changed (model.safetensors, written 20" in told
    assert "another run_dir or output, or remove that folder" in told and engines.asked == asked
    run(job, engines, f"run_dir={tmp_path / 'other'}")
    assert engines.asked == 2 * asked


@pytest.mark.parametrize("job", JOBS)
def test_a_job_goes_on_in_the_precision_that_it_began_in(
    job: str, run: Callable[..., dict[str, Any]], model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engines = Engines(model)
    engines.auto = "bf16"
    engines.lost = lambda prompt: "engine_error: it died" if prompt.messages[0].content >= "q5" else None
    run(job, engines, "min_done_fraction=0.01")
    assert engines.used == ["bf16"] and "stays" not in capsys.readouterr().out
    engines.auto, engines.lost = "fp32", lambda _: None  # another machine
    with pytest.raises(InputError, match=r"policy\.precision was 'bf16' and is 'fp32'"):
        run(job, engines, "policy.precision=fp32")
    run(job, engines, "min_done_fraction=0.01")
    assert engines.used == ["bf16", "bf16"]
    assert "precision=auto stays bf16, which it was when this run began (policy.precision)" in capsys.readouterr().out


@pytest.mark.parametrize("job", JOBS)
@pytest.mark.parametrize("replaced", ["model", "prompts"])
def test_what_is_replaced_while_the_job_runs(
    job: str, replaced: str, run: Callable[..., dict[str, Any]], model: Path, tmp_path: Path
) -> None:
    engines = Engines(model)
    path, key = {
        "model": (model / "config.json", "policy.model"),
        "prompts": (tmp_path / "prompts.jsonl", "data.path"),
    }[replaced]
    engines.meanwhile = lambda: path.write_text(path.read_text() + "\n")
    with pytest.raises(RunError, match=f"an input was replaced while the job ran.*{key}: .* has changed"):
        run(job, engines)
    assert not (tmp_path / "run" / "summary.json").exists()


@pytest.mark.parametrize(("job", "kept"), [("sample", "sampled.jsonl"), ("pairs", "responses")])
def test_responses_that_are_missing(
    job: str, kept: str, run: Callable[..., dict[str, Any]], model: Path, tmp_path: Path
) -> None:
    engines = Engines(model)
    engines.lost = lambda prompt: "engine_error: it died" if int(prompt.id) >= 15 else None
    with pytest.raises(FeedbackError) as ended:
        run(job, engines)
    told = str(ended.value)
    per_prompt = 2 if job == "pairs" else 1
    assert "min_done_fraction=0.9 of the responses must be sampled" in told
    assert f"(got {15 * per_prompt} of {20 * per_prompt}; failed: {5 * per_prompt} engine_error)" in told
    assert f"{5 * per_prompt} could succeed on another try: start the same command again" in told and kept in told
    engines.lost, engines.asked = lambda _: None, 0
    summary = run(job, engines)
    assert engines.asked == 5 * per_prompt and summary["retryable"] == 0 and summary["failures"] == {}
    rows = [json.loads(line) for line in Path(summary["output"]).read_text().splitlines()]
    assert [row["id"] for row in rows] == [f"{n}/0" for n in range(20)]  # in their places


def test_a_prompt_in_quarantine_is_final(run: Callable[..., dict[str, Any]], model: Path) -> None:
    engines = Engines(model)
    engines.lost = lambda prompt: "quarantined" if prompt.id == "3" else None
    summary = run("sample", engines)
    assert summary["failures"] == {"quarantined": 1} and summary["retryable"] == 0 and summary["records"] == 19
    asked = engines.asked
    run("sample", engines)
    assert engines.asked == asked
    with pytest.raises(FeedbackError, match=r"got 19 of 20; failed: 1 quarantined.* 1 would fail in the same way"):
        run("sample", engines, "min_done_fraction=1")


def test_an_engine_that_is_lost_while_it_revises(run: Callable[..., dict[str, Any]], model: Path) -> None:
    engines = Engines(model)
    engines.failure = lambda _: "it died" if engines.asked >= 20 else None  # after the first responses
    with pytest.raises(FeedbackError, match=r"got 0 of 20; failed: 20 engine_error.*20 could succeed on another try"):
        run("revise", engines)
    engines.failure, before = lambda _: None, engines.asked
    summary = run("revise", engines)
    assert (
        engines.asked == before + 40 and summary["revised"] == 20 and summary["retryable"] == 0
    )  # responses are remembered


def test_what_the_model_says_is_an_answer(run: Callable[..., dict[str, Any]], model: Path) -> None:
    """Empty and echoed texts are no failures to answer: revision.min_revised_fraction is about them."""
    engines = Engines(model)
    engines._say = lambda prompt, sample: "the same"  # type: ignore[method-assign]
    summary = run("revise", engines)
    assert summary["revised"] == 0 and sum(summary["failures"].values()) == 20 and summary["unanswered"] == 0
    with pytest.raises(FeedbackError, match=r"revision.min_revised_fraction=0.5 of the prompts must get a revision"):
        run("revise", engines, "revision.min_revised_fraction=0.5")


@pytest.mark.parametrize("job", JOBS)
def test_prompts_that_are_no_longer_too_long_do_not_shift_the_others(
    job: str, run: Callable[..., dict[str, Any]], model: Path, tmp_path: Path
) -> None:
    """rollout.max_context may change on the way, and decides which prompts there are."""
    engines = Engines(model)
    rows = [{"id": str(n), "prompt": f"q{n} " * (300 if n % 2 else 1)} for n in range(200)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    skip = ("data.too_long=skip", "rollout.max_context=512")
    first = run(job, engines, *skip)
    made = "steps.jsonl" if job == "revise" else "sampled.jsonl" if job == "sample" else "responses/policy.jsonl"
    lines = (tmp_path / "run" / made).read_text().splitlines(keepends=True)
    assert len(lines) == 100, first
    (tmp_path / "run" / made).write_text("".join(lines[:64]))  # as if it had ended there
    with pytest.raises(InputError, match=r"row 2, is about '2', where the inputs now have '1': others are left out"):
        run(job, engines, "data.too_long=skip", "rollout.max_context=4096")
    run(job, engines, *skip)
    assert len((tmp_path / "run" / made).read_text().splitlines()) == 100


@pytest.mark.parametrize("job", JOBS)
def test_results_without_the_settings_they_were_made_from(
    job: str, run: Callable[..., dict[str, Any]], model: Path, tmp_path: Path
) -> None:
    engines = Engines(model)
    run(job, engines)
    asked = engines.asked
    settings = tmp_path / "run" / "settings.json"
    for damage in (lambda: settings.write_text("{"), settings.unlink):
        damage()
        with pytest.raises(InputError, match="nothing that says what it was made from") as refused:
            run(job, engines, "seed=1")
        assert str(settings) in str(refused.value) and engines.asked == asked


def test_inputs_in_the_run_folder_are_no_results(
    run: Callable[..., dict[str, Any]], model: Path, tmp_path: Path
) -> None:
    engines = Engines(model)
    engines.lost = lambda _: "engine_error: it died"
    here = (f"run_dir={tmp_path}",)  # beside prompts.jsonl
    (tmp_path / "settings.json").write_text("{}")  # as a command leaves it that ends before its first result
    assert run("sample", Engines(model), *here)["records"] == 20


def test_a_commit_that_comes_while_the_inputs_are_read_is_no_replacement(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from rlaif_ray.pipelines.inputs import look_at
    from rlaif_ray.pipelines.run_folder import go_on, make_folder

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    refs = tmp_path / "hub" / "models--owner--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("a" * 40)
    loaded = load_job("sample", [], ["policy.model=owner/name", PROMPTS, f"run_dir={tmp_path / 'run'}"])
    looked = look_at(loaded.config)
    (refs / "main").write_text("b" * 40)  # the model was loaded, and its newest commit came
    make_folder(loaded.run_dir)
    go_on(loaded, loaded.run_dir, looked, made=["sampled.jsonl"])
    looked.check(tmp_path)
    (tmp_path / "run" / "sampled.jsonl").write_text("{}\n")
    go_on(loaded, loaded.run_dir, look_at(loaded.config), made=["sampled.jsonl"])
    (refs / "main").write_text("c" * 40)  # and this one came later
    with pytest.raises(RunError, match=f"owner/name was at commit {'b' * 40} and is at {'c' * 40}"):
        looked.check(tmp_path)
    with pytest.raises(InputError, match=rf"\(the old value is policy.revision={'b' * 40}\)"):
        go_on(loaded, loaded.run_dir, look_at(loaded.config), made=["sampled.jsonl"])
    pinned = load_job(
        "sample", [], ["policy.model=owner/name", PROMPTS, f"policy.revision={'b' * 40}", f"run_dir={tmp_path / 'run'}"]
    )
    go_on(pinned, loaded.run_dir, look_at(pinned.config), made=["sampled.jsonl"])
