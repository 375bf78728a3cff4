"""`rlaif pipeline` on real engines: straight, killed in every stage, and after changes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.ray.test_preference_jobs import done, lines, model, sha256
from tests.runs import ROOT, Program, start

pytestmark = [pytest.mark.ray, pytest.mark.slow]

PIPELINE = """\
cluster: {{address: local}}
shared:
  policy: {{model: {model}, precision: fp32}}  # digits are compared: also on CPUs that are faster in bf16
  rollout: {{kv_cache_gb: 0.1}}
  judge: {{model: {model}, precision: fp32, kv_cache_gb: 0.2, min_answer_mass: 0}}
  learner: {{lr: 1.0e-3}}
  checkpoint: {{every: 2}}
  tracking: {{wandb: disabled}}
stages:
  revise:
    job: revise
    data: {{path: 'package:train', limit: 130}}
    revision: {{constitution: {constitution}, examples: null, steps: 2, max_new_tokens: 6}}
  sft:
    job: sft
    data: {{path: 'stage:revise'}}
    sft: {{batch_size: 32, lora: {{rank: 4}}}}
  pairs:
    job: pairs
    policy: {{model: 'stage:sft'}}
    data: {{path: 'package:train', limit: 130}}
    sampling: {{max_new_tokens: 6}}
  label:
    job: label
    data: {{path: 'stage:pairs'}}
    label: {{template: constitution, constitution: {constitution}}}
  rm:
    job: reward-model
    policy: {{model: 'stage:sft'}}
    data: {{path: 'stage:label'}}
    reward: {{batch_size: 32}}
  rlaif:
    job: train
    policy: {{model: 'stage:sft'}}
    data: {{path: 'package:train', limit: 12}}
    sampling: {{prompts_per_step: 4, samples_per_prompt: 2, max_new_tokens: 8}}
    feedback: {{type: reward_model, model: 'stage:rm', precision: fp32}}
    algorithm: {{type: rloo, missing_eos_penalty: null}}
    evaluation: {{held_out: {{path: 'package:heldout', limit: 6}}}}
    checkpoint: {{every: 1}}
    steps: 3
  dpo:
    job: dpo
    policy: {{model: 'stage:sft'}}
    data: {{path: 'stage:label'}}
    dpo: {{batch_size: 32}}
  best-of-2:
    job: sample
    policy: {{model: 'stage:sft'}}
    data: {{path: 'package:train', limit: 130}}
    sampling: {{samples_per_prompt: 2, max_new_tokens: 6}}
    feedback:
      type: judge
      template: helpful
      judge: {{model: {model}, precision: fp32, kv_cache_gb: 0.2, min_answer_mass: 0}}
  evaluate:
    job: evaluate
    arms:
      dpo: {{model: 'stage:dpo', precision: fp32}}
      best: {{path: 'stage:best-of-2'}}
    prompts: {{path: 'package:train', limit: 70}}
    sampling: {{max_new_tokens: 6}}
    win_rate: {{reference: dpo}}
"""
CONSTITUTION = """\
id: mine
version: 1
principles:
  - id: plain
    critique_request: Say where the answer is hard to understand.
    revision_request: Rewrite the answer in plain words.
    comparison_question: Which answer is easier to understand?
  - id: brief
    critique_request: Say what the answer could leave out.
    revision_request: Rewrite the answer without what it doesn't need.
    comparison_question: "{comparison}"
"""
ORDER = ["revise", "sft", "pairs", "label", "rm", "rlaif", "dpo", "best-of-2", "evaluate"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline")
    write_constitution(folder, "Which answer wastes fewer words?")
    path = folder / "constitution.yaml"
    (folder / "pipeline.yaml").write_text(PIPELINE.format(model=model(), constitution=path))
    return folder


def write_constitution(folder: Path, comparison: str) -> None:
    (folder / "constitution.yaml").write_text(CONSTITUTION.format(comparison=comparison))


def pipeline(folder: Path, name: str, *settings: object) -> Program:
    words = [ROOT / ".venv/bin/rlaif", "pipeline", folder / "pipeline.yaml", f"run_dir={folder / name}"]
    number = len(list(folder.glob(f"{name}.*.out")))
    return start([*words, *map(str, settings)], folder / f"{name}.{number}.out")


def stages(run: Path) -> dict[str, dict[str, Any]]:
    return {stage["name"]: stage for stage in json.loads((run / "summary.json").read_text())["stages"]}


def artefacts(run: Path) -> dict[str, str]:
    """A hash of what each stage made; weights alone of models."""
    found = {}
    for name, stage in stages(run).items():
        path = Path(stage["artefact"])
        found[name] = sha256(path / "model.safetensors" if path.is_dir() else path)
    return found


@pytest.fixture(scope="module")
def straight(folder: Path) -> Path:
    program = done(pipeline(folder, "straight"))
    table = [line for line in program.stdout.splitlines() if "│" in line]
    assert all(any(line.startswith(f"│ {name} ") for line in table) for name in ORDER), program.stdout[-3000:]
    return folder / "straight"


def test_every_stage_ran_and_left_what_it_makes(folder: Path, straight: Path) -> None:
    found = stages(straight)
    assert list(found) == ORDER and {stage["state"] for stage in found.values()} == {"ran"}
    for stage in found.values():
        assert Path(stage["artefact"]).exists() and stage["seconds"] > 0 and stage["result"]
        assert (straight / "latest" / stage["name"]).resolve() == Path(stage["artefact"]).parent.resolve()
    best = [json.loads(line) for line in Path(found["best-of-2"]["artefact"]).read_text().splitlines()]
    sampled = Path(found["best-of-2"]["artefact"]).with_name("sampled.jsonl")
    for row, of in zip(best, map(json.loads, sampled.read_text().splitlines()), strict=True):
        usable = [(s, r) for s, r in zip(of["scores"], of["responses"], strict=True) if s is not None and r]
        assert row["score"] == max(s for s, _ in usable) and (row["score"], row["response"]) in usable
    evaluation = json.loads(Path(found["evaluate"]["artefact"]).read_text())
    assert [(one["a"], one["b"]) for one in evaluation["win_rates"]] == [("best", "dpo")]
    assert 60 <= evaluation["win_rates"][0]["win_rate"]["n"] <= 70
    judges = evaluation["training_judges"]  # by DPO's labels, by best-of-n's scores
    assert judges == {"dpo": [evaluation["judge"]], "best": [evaluation["judge"]]}
    resolved = Path(found["rm"]["artefact"]).with_name("resolved.yaml")
    assert f"model: {found['sft']['artefact']}" in resolved.read_text()


def test_a_second_run_does_nothing(folder: Path, straight: Path) -> None:
    before = artefacts(straight)
    program = done(pipeline(folder, "straight"))
    assert {stage["state"] for stage in stages(straight).values()} == {"done before"}
    assert "stage 1 of" not in program.stdout and artefacts(straight) == before


# When a stage is under way, by what it has written.
UNDER_WAY: dict[str, Callable[[Path], bool]] = {
    "revise": lambda folder: lines(folder / "steps.jsonl") > 0,
    "sft": lambda folder: (folder / "checkpoints" / "step-2").exists(),
    "pairs": lambda folder: lines(folder / "responses" / "policy.jsonl") > 0,
    "label": lambda folder: lines(folder / "labels.jsonl") > 0,
    "rm": lambda folder: (folder / "checkpoints" / "step-2").exists(),
    "rlaif": lambda folder: (folder / "checkpoints" / "step-1").exists(),
    "dpo": lambda folder: (folder / "checkpoints" / "step-2").exists(),
    "best-of-2": lambda folder: lines(folder / "sampled.jsonl") > 0,
    "evaluate": lambda folder: lines(folder / "judging" / "labels.jsonl") > 0,
}


@pytest.mark.long
def test_killed_in_every_stage_it_ends_with_the_same(folder: Path, straight: Path) -> None:
    run = folder / "killed"
    for name in ORDER:
        stage = run / "stages" / f"{name}-{stages(straight)[name]['hash']}"
        program = pipeline(folder, "killed")
        program.wait_for(lambda name=name, stage=stage: UNDER_WAY[name](stage))  # type: ignore[misc]
        if name == "revise":  # Ctrl-C for once
            program.interrupt()
            assert program.wait().exit_code == 130 and "resume: rlaif pipeline" in program.stderr
        else:
            program.kill()
        assert not (stage / "stage.json").exists(), name
    done(pipeline(folder, "killed"))
    assert artefacts(run) == artefacts(straight)


@pytest.mark.long
def test_a_changed_constitution_redoes_what_depends_on_it(folder: Path, straight: Path) -> None:
    """Only the comparison question changes, and revisions know nothing of it, but their draw may: so all but nothing
    that hangs on the constitution stays."""
    before = stages(straight)
    write_constitution(folder, "Which answer is the shorter one?")
    try:
        shown = done(pipeline(folder, "straight", "--dry-run", "stages.revise.revision.constitution=short")).stdout
        assert "[done]" not in shown  # everything builds on the revisions
        mine = folder / "first.yaml"
        write_first = CONSTITUTION.format(comparison="Which answer wastes fewer words?")
        mine.write_text(f"# a comment is no change\n{write_first}")
        program = done(pipeline(folder, "straight", "--only", "label", f"stages.revise.revision.constitution={mine}"))
    finally:
        write_constitution(folder, "Which answer wastes fewer words?")
    assert "stage 1 of 1: label" in program.stdout
    after = stages(straight)
    same = {name for name in ORDER if after[name]["hash"] == before[name]["hash"]}
    assert same == {"revise", "sft", "pairs", "best-of-2"}
    states = {name: stage["state"] for name, stage in after.items()}
    assert states == dict.fromkeys(same, "done before") | {"label": "ran"} | dict.fromkeys(
        ("rm", "rlaif", "dpo", "evaluate"), "to do"
    )


@pytest.mark.long
def test_from_does_a_stage_and_what_builds_on_it_again(folder: Path, straight: Path) -> None:
    done(pipeline(folder, "straight"))  # whatever a test before looked at
    before = artefacts(straight)
    old = hashlib.sha256((straight / "latest" / "dpo" / "stage.json").read_bytes()).hexdigest()
    done(pipeline(folder, "straight", "--from", "dpo"))
    states = {name: stage["state"] for name, stage in stages(straight).items()}
    assert states == dict.fromkeys(ORDER, "done before") | dict.fromkeys(("dpo", "evaluate"), "ran")
    assert artefacts(straight) == before
    aside = next((straight / "stages").glob("dpo-*.1"))  # what was there is kept
    assert hashlib.sha256((aside / "stage.json").read_bytes()).hexdigest() == old


@pytest.mark.long
def test_only_needs_what_it_builds_on(folder: Path) -> None:
    program = pipeline(folder, "empty", "--only", "label").wait()
    assert program.exit_code == 2 and "builds on pairs, which isn't done" in program.stderr
    assert not (folder / "empty").exists()


@pytest.mark.long
def test_a_stage_with_wrong_input_keeps_those_before_it(folder: Path, straight: Path) -> None:
    done(pipeline(folder, "straight"))
    before = stages(straight)
    program = pipeline(folder, "straight", "stages.sft.data.limit=0").wait()
    assert program.exit_code == 2 and "stage sft: data.limit" in program.stderr
    late = pipeline(folder, "straight", "stages.dpo.dpo.held_out_fraction=0.999").wait()
    assert late.exit_code == 2 and "stage dpo" in late.stderr and "has no pair to train on" in late.stderr
    assert "Traceback" not in late.stderr
    assert all(Path(stage["artefact"]).exists() for stage in before.values())
