"""Pipelines without engines: what a config may say, the order of stages, and what a stage's address follows from."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
import yaml

from rlaif_ray.config.load import load_job
from rlaif_ray.config.pipeline import Pipeline, load_pipeline
from rlaif_ray.config.resolved import resolved_yaml
from rlaif_ray.errors import FeedbackError, InputError, RunError
from rlaif_ray.pipelines.chat_date import pipeline_date
from rlaif_ray.pipelines.pipeline import (
    DONE,
    WORK,
    Placed,
    Work,
    _put_aside,
    choose,
    headline,
    place,
    plan_pipeline,
    run_stage,
)
from rlaif_ray.storage import Place, StoredFolder, publish
from tests.jobs import MODEL

CONSTITUTION = """\
id: mine
version: 1
principles:
  - id: plain
    critique_request: Say where the answer is hard to understand.
    revision_request: Rewrite the answer in plain words.
    comparison_question: Which answer is easier to understand?
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Hello?"}\n')
    (tmp_path / "mine.yaml").write_text(CONSTITUTION)
    return tmp_path


def values(folder: Path) -> dict[str, Any]:
    prompts = {"path": str(folder / "prompts.jsonl")}
    return {
        "run_dir": str(folder / "run"),
        "shared": {"rollout": {"kv_cache_gb": 0.5}, "policy": {"model": MODEL}, "judge": {"model": MODEL}},
        "stages": {
            "rm": {"job": "reward-model", "data": {"path": "stage:label"}},
            "revise": {"job": "revise", "data": prompts, "revision": {"constitution": str(folder / "mine.yaml")}},
            "sft": {"job": "sft", "data": {"path": "stage:revise"}},
            "pairs": {"job": "pairs", "data": prompts, "policy": {"model": "stage:sft"}},
            "label": {
                "job": "label",
                "data": {"path": "stage:pairs"},
                "label": {"template": "constitution", "constitution": str(folder / "mine.yaml")},
            },
            "rlaif": {
                "job": "train",
                "data": prompts,
                "policy": {"model": "stage:sft"},
                "feedback": {"type": "reward_model", "model": "stage:rm"},
            },
            "dpo": {"job": "dpo", "data": {"path": "stage:label"}},
        },
    }


def load(folder: Path, what: dict[str, Any] | None = None, *overrides: str) -> Pipeline:
    file = folder / "pipeline.yaml"
    file.write_text(yaml.safe_dump(what or values(folder), sort_keys=False))
    return load_pipeline([file], overrides)


def complaint(folder: Path, change: Callable[[dict[str, Any]], Any]) -> str:
    what = values(folder)
    change(what)
    with pytest.raises(InputError) as caught:
        load(folder, what)
    return str(caught.value)


# ---- Config ----------------------------------------------------------------------------------------------------------


def test_stages_stand_after_what_they_build_on_else_as_written(folder: Path) -> None:
    pipeline = load(folder)
    assert [stage.name for stage in pipeline.stages] == ["revise", "sft", "pairs", "label", "rm", "rlaif", "dpo"]
    assert {stage.name: set(stage.needs) for stage in pipeline.stages} == {
        "revise": set(),
        "sft": {"revise"},
        "pairs": {"sft"},
        "label": {"pairs"},
        "rm": {"label"},
        "rlaif": {"sft", "rm"},
        "dpo": {"label"},
    }
    assert pipeline.after("label") == {"label", "rm", "rlaif", "dpo"}


def test_what_stands_over_what(folder: Path) -> None:
    """Defaults < a stage's files < the pipeline's cluster < shared < the stage's own; overrides above their level."""
    (folder / "base.yaml").write_text("learner: {lr: 1.0, eps: 2.0, warmup_steps: 3}\ncluster: {call_timeout_s: 5}\n")
    what = values(folder)
    what["cluster"] = {"device": "cpu", "call_timeout_s": 6}
    what["shared"]["learner"] = {"eps": 4.0, "warmup_steps": 5}
    what["stages"]["sft"] |= {"config": str(folder / "base.yaml"), "learner": {"warmup_steps": 6}}
    pipeline = load(folder, what, "shared.learner.weight_decay=0.5", "stages.sft.learner.grad_clip=7")
    by_name = {stage.name: stage.config for stage in pipeline.stages}
    learner = by_name["sft"].learner
    found = (learner.lr, learner.eps, learner.warmup_steps, learner.weight_decay, learner.grad_clip)
    assert found == (1.0, 4.0, 6, 0.5, 7.0)
    assert (by_name["sft"].cluster.device, by_name["sft"].cluster.call_timeout_s) == ("cpu", 6.0)
    assert by_name["rm"].learner.lr == 1e-5 and by_name["rm"].learner.eps == 4.0
    assert by_name["pairs"].rollout.kv_cache_gb == 0.5


def test_a_value_of_another_type_drops_the_former_ones_keys(folder: Path) -> None:
    what = values(folder)
    what["shared"]["feedback"] = {"type": "judge", "template": "harmless"}
    [rlaif] = [stage.config for stage in load(folder, what).stages if stage.name == "rlaif"]
    assert rlaif.feedback.type == "reward_model" and rlaif.feedback.model == "stage:rm"


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda w: w["stages"]["sft"].update(job="stf"), r"stages.sft.job must be a job .*did you mean 'sft'"),
        (lambda w: w["stages"]["sft"].pop("job"), r"stages.sft.job must be a job \(got nothing\)"),
        (lambda w: w["stages"]["sft"].update(lerner={}), r"stage sft: .*lerner.*learner"),
        (lambda w: w["stages"]["sft"].update(learner={"lr": -1}), r"stage sft: learner.lr .*pipeline.yaml, line \d+"),
        (lambda w: w["stages"]["sft"].update(data={"path": "stage:revis"}), r"names no stage: did you mean 'revise'"),
        (lambda w: w["stages"]["sft"].update(data={"path": "stage:pairs"}), r"takes demonstrations \(got stage:pairs"),
        (lambda w: w["stages"]["rm"].update(data={"path": "stage:pairs"}), r"takes labels .*Use stage:label"),
        (lambda w: w["stages"]["sft"].update(policy={"model": "stage:rm"}), r"takes policy \(got stage:rm, which make"),
        (lambda w: w["stages"]["rlaif"]["feedback"].update(model="stage:sft"), r"takes reward model"),
        (lambda w: w["stages"]["pairs"].update(data={"path": "stage:revise"}), r"can't be what a stage made"),
        (lambda w: w["stages"]["sft"].update(policy={"precision": "stage:rm"}), r"stage sft: policy.precision"),
        (lambda w: w["stages"]["revise"].update(policy={"model": "stage:sft"}), r"builds on revise itself"),
        (lambda w: w["stages"]["sft"].update(run_dir="here"), r"stage sft: run_dir is not for a stage to say"),
        (lambda w: w["stages"]["pairs"].update(output="x.jsonl"), r"stage pairs: output is not for a stage to say"),
        (lambda w: w["shared"].update(reword={}), r"shared.reword is a section of no stage's job .*did you mean 'rew"),
        (lambda w: w.update(stages={}), r"at least one stage"),
        (lambda w: w.update(stage={}), r"stage.*stages"),
        (lambda w: w["stages"].update({"a/b": {"job": "pairs"}}), r"'a/b' must be named by letters"),
        (lambda w: w["stages"].update({"..": {"job": "pairs"}}), r"'..' must be named by letters"),
        (lambda w: w["stages"]["sft"].update(config=3), r"stages.sft.config must be YAML files"),
        (lambda w: w["stages"]["sft"].update(config="no.yaml"), r"stage sft: .*no.yaml"),
    ],
)
def test_what_is_wrong_is_told(folder: Path, change: Callable[[dict[str, Any]], Any], told: str) -> None:
    import re

    message = complaint(folder, change)
    assert re.search(told, message), message


def test_all_problems_are_told_at_once(folder: Path) -> None:
    def change(what: dict[str, Any]) -> None:
        what["stages"]["sft"]["learner"] = {"lr": -1}
        what["stages"]["pairs"]["sampling"] = {"temperature": 0}
        what["stages"]["dpo"]["job"] = "pdo"

    message = complaint(folder, change)
    assert "3 problems" in message
    assert all(part in message for part in ("stage sft: learner.lr", "stage pairs: sampling.temp", "stages.dpo.job"))


def test_a_revision_belongs_to_the_model_that_it_was_given_with(folder: Path) -> None:
    what = values(folder)
    what["shared"]["policy"] = {"model": "org/base", "revision": "abc"}
    what["stages"]["dpo"]["policy"] = {"model": "org/other"}
    what["stages"]["rm"]["policy"] = {"model": "org/other", "revision": "x"}
    revisions = {
        stage.name: stage.config.policy.revision for stage in load(folder, what).stages if stage.job != "label"
    }
    assert revisions == {"revise": "abc", "sft": "abc", "pairs": None, "rlaif": None, "dpo": None, "rm": "x"}
    what["shared"] = {"policy": {"revision": "abc"}}
    what["stages"] = {"sft": what["stages"]["sft"] | {"data": {"path": "x"}, "policy": {"model": "org/base"}}}
    (sft,) = load(folder, what).stages
    assert sft.config.policy.revision == "abc"


def test_what_was_typed_as_text_loads_again(folder: Path) -> None:
    typed = ["shared.policy.revision=4867e52", "shared.policy.model=org/base", "stages.pairs.data.column=1e5"]
    typed += ["stages.revise.data.system='tis the season", "stages.sft.learner.lr=1e-7"]
    pipeline = load(folder, None, *typed)
    assert pipeline.config.shared["policy"]["revision"] == "4867e52"
    assert pipeline.config.stages["pairs"]["data"]["column"] == "1e5"
    assert pipeline.config.stages["sft"]["learner"]["lr"] == 1e-7
    (folder / "again.yaml").write_text(resolved_yaml(pipeline, {}, None))
    again = load_pipeline([folder / "again.yaml"])
    assert again.stages == pipeline.stages and again.config == pipeline.config
    by_name = {stage.name: stage.config for stage in again.stages}
    assert by_name["revise"].data.system == "'tis the season"


def test_what_is_no_text_and_no_yaml_is_one_problem(folder: Path) -> None:
    with pytest.raises(InputError) as caught:
        load(folder, None, "stages.sft.learner.lr=[1")
    assert "valid YAML" in str(caught.value) and "problems" not in str(caught.value)


def test_what_is_missing_names_the_pipeline(folder: Path) -> None:
    told = complaint(folder, lambda what: what["stages"]["sft"].pop("data"))
    file = folder / "pipeline.yaml"
    assert f"stage sft: data.path must be set (got nothing from stages.sft or shared of {file})" in told
    assert "Add `stages: {sft: {data: {path: " in told


def test_an_overlay_alone_is_told_so(folder: Path) -> None:
    told = complaint(folder, lambda what: [stage.pop("job") for stage in what["stages"].values()])
    assert "no stage of" in told and "Name that file before it" in told
    assert "problems" not in told and "None" not in told
    told = complaint(folder, lambda what: [stage.update(job="x") for stage in what["stages"].values()])
    assert "must be a job (got 'x')" in told and "section of no stage" not in told


def test_a_pipeline_in_the_place_of_a_job_is_one_problem(folder: Path) -> None:
    load(folder)
    with pytest.raises(InputError) as caught:
        load_job("train", [folder / "pipeline.yaml"])
    assert "is a pipeline (got stages" in str(caught.value) and "rlaif pipeline " in str(caught.value)
    assert "problems" not in str(caught.value)


@pytest.mark.parametrize("read", [lambda file: load_job("train", [file]), lambda file: load_pipeline([file])])
def test_of_a_file_that_is_not_there_nothing_is_missing(folder: Path, read: Callable[[Path], Any]) -> None:
    with pytest.raises(InputError) as caught:
        read(folder / "no.yaml")
    assert "does not exist" in str(caught.value) and "must be set" not in str(caught.value)


# ---- Addresses -------------------------------------------------------------------------------------------------------


def hashes(folder: Path, what: dict[str, Any] | None = None, *overrides: str) -> dict[str, str]:
    return {name: one.hash for name, one in place(load(folder, what, *overrides)).items()}


def changed(folder: Path, *overrides: str) -> set[str]:
    before, after = hashes(folder), hashes(folder, None, *overrides)
    return {name for name in before if before[name] != after[name]}


EVERYTHING = {"revise", "sft", "pairs", "label", "rm", "rlaif", "dpo"}


@pytest.mark.parametrize(
    ("override", "stages"),
    [
        ("stages.rlaif.steps=7", {"rlaif"}),
        ("stages.label.label.template=helpful", {"label", "rm", "rlaif", "dpo"}),
        ("stages.sft.learner.lr=1e-3", EVERYTHING - {"revise"}),
        ("stages.revise.seed=3", EVERYTHING),
        ("shared.learner.weight_decay=0.1", EVERYTHING - {"revise"}),
        # How it is computed is no reason to do it again:
        ("shared.rollout.replicas=3", set()),
        ("shared.learner.tokens_per_micro_batch=99", set()),
        ("cluster.call_timeout_s=9", set()),
        ("stages.rlaif.checkpoint.every=1", set()),
        ("stages.label.label.human_price=2.0", set()),
        ("stages.label.label.min_labeled_fraction=0.5", set()),
        ("stages.pairs.min_done_fraction=0.5", set()),
    ],
)
def test_what_a_change_redoes(folder: Path, override: str, stages: set[str]) -> None:
    assert changed(folder, override) == stages


@pytest.mark.parametrize("name", ["tracking", "cluster", "replicas", "template", "path", "model", "output"])
def test_names_that_users_choose_are_no_settings(folder: Path, name: str) -> None:
    """Of stages, policies, arms and scorers: what stands under them counts, whatever they are called."""
    length = {"scorer": {"type": "length", "target_tokens": 9}}
    what, prompts = values(folder), {"path": str(folder / "prompts.jsonl")}
    what["stages"] = {
        name: what["stages"]["pairs"] | {"policy": {"model": "a"}, "other_policies": {name: {"model": "b"}}},
        "best": {"job": "sample", "data": prompts, "feedback": {"type": "mixture", "scorers": {name: length}}},
        "measure": {"job": "evaluate", "prompts": prompts, "arms": {name: {"model": "a"}, "base": {"model": "b"}}},
    }
    before = hashes(folder, what)

    def changes(*overrides: str) -> set[str]:
        return {one for one, hashed in hashes(folder, what, *overrides).items() if hashed != before[one]}

    assert changes(f"stages.{name}.other_policies.{name}.model=c") == {name}
    assert changes(f"stages.best.feedback.scorers.{name}.scorer.target_tokens=10") == {"best"}
    assert changes(f"stages.best.feedback.scorers.{name}.weight=2.0") == {"best"}
    assert changes(f"stages.measure.arms.{name}.model=c") == {"measure"}


def test_a_model_that_is_trained_anew_in_place_is_another(folder: Path) -> None:
    (folder / "model").mkdir()
    for name in ("config.json", "model.safetensors"):
        (folder / "model" / name).write_text("one")
    settings = f"stages.sft.policy.model={folder / 'model'}"
    before = hashes(folder, None, settings)
    (folder / "model" / "README.md").write_text("what it is")
    assert hashes(folder, None, settings) == before
    (folder / "model" / "model.safetensors").write_text("two")
    after = hashes(folder, None, settings)
    assert {name for name in before if before[name] != after[name]} == EVERYTHING - {"revise"}


def test_contents_count_and_not_names_or_comments(folder: Path) -> None:
    before = hashes(folder)
    (folder / "mine.yaml").write_text(f"# mine\n{CONSTITUTION}")
    assert hashes(folder) == before
    (folder / "mine.yaml").write_text(CONSTITUTION.replace("easier to understand", "shorter"))
    assert {n for n, h in hashes(folder).items() if h != before[n]} == EVERYTHING  # the draw may be another one
    (folder / "mine.yaml").write_text(CONSTITUTION)
    (folder / "prompts.jsonl").write_text('{"prompt": "Goodbye?"}\n')
    assert {n for n, h in hashes(folder).items() if h != before[n]} == EVERYTHING
    (folder / "prompts.jsonl").write_text('{"prompt": "Hello?"}\n')
    assert hashes(folder) == before
    for name in ("mine.yaml", "prompts.jsonl"):
        (folder / f"moved-{name}").write_text((folder / name).read_text())
    moved = json.loads(json.dumps(values(folder)).replace("mine.yaml", "moved-mine.yaml"))
    assert hashes(folder, json.loads(json.dumps(moved).replace("prompts.jsonl", "moved-prompts.jsonl"))) == before


def test_templates_of_a_run_that_measures_harmlessness_count(folder: Path) -> None:
    template = files("rlaif_ray.feedback") / "templates" / "refusal.yaml"
    (folder / "own.yaml").write_text(template.read_text())
    what = values(folder)
    suite = {"prompts": {"path": "package:heldout"}, "refusal_template": str(folder / "own.yaml")}
    what["stages"]["rlaif"] |= {
        "feedback": {"type": "judge", "judge": {"model": MODEL}},
        "evaluation": {"harmless": suite},
    }
    before = hashes(folder, what)
    (folder / "own.yaml").write_text(template.read_text().replace("turned a request away", "refused"))
    assert {name for name, hashed in hashes(folder, what).items() if hashed != before[name]} == {"rlaif"}


def test_a_broken_constitution_is_told_before_the_first_stage(folder: Path) -> None:
    (folder / "mine.yaml").write_text(CONSTITUTION.replace("version: 1", "version: one"))
    with pytest.raises(InputError, match=r"stage revise: .*mine.yaml.*\n.*line 2"):
        place(load(folder))


# ---- What runs -------------------------------------------------------------------------------------------------------


def finish(one: Placed) -> None:
    """As if the stage had run."""
    one.artefact.parent.mkdir(parents=True, exist_ok=True)
    one.artefact.touch()
    (one.folder / DONE).write_text(json.dumps({"hash": one.hash, "seconds": 1.0, "result": "fine"}))


def chosen(pipeline: Pipeline, **options: str | None) -> list[str]:
    return choose(pipeline, place(pipeline), options.get("start"), options.get("only"))


def test_what_is_done_is_not_done_again(folder: Path) -> None:
    pipeline = load(folder)
    placed = place(pipeline)
    assert chosen(pipeline) == list(placed)
    for name in ("revise", "sft", "pairs", "label"):
        finish(placed[name])
    assert chosen(pipeline) == ["rm", "rlaif", "dpo"]
    assert chosen(pipeline, only="dpo") == ["dpo"]
    assert chosen(pipeline, only="label") == []
    assert chosen(pipeline, start="pairs") == ["pairs", "label", "rm", "rlaif", "dpo"]
    plan = plan_pipeline(pipeline)
    assert plan.count("[done]") == 4 and plan.count("[to do]") == 3
    placed["sft"].artefact.unlink()  # somebody tidied up: what is not there is not done
    assert chosen(pipeline)[0] == "sft"


def test_options_that_do_not_fit(folder: Path) -> None:
    pipeline = load(folder)
    with pytest.raises(InputError, match=r"--only must name a stage .*did you mean 'label'"):
        chosen(pipeline, only="lable")
    with pytest.raises(InputError, match="exclude each other"):
        chosen(pipeline, only="label", start="pairs")
    with pytest.raises(InputError, match="the stage rm builds on label, which isn't done"):
        chosen(pipeline, only="rm")
    with pytest.raises(InputError, match="the stage pairs builds on sft, which isn't done"):
        chosen(pipeline, start="pairs")


@pytest.mark.parametrize(
    ("summary", "told"),
    [
        ({"job": "pairs", "pairs": 3}, "3 pairs"),
        ({"job": "sample", "records": 4, "score": {"best": 0.5}}, "4 records, score 0.500"),
        ({"job": "sft", "turns": 9, "sft": {"held_out": None}}, "9 turns"),
        ({"job": "dpo", "pairs": 9, "dpo": {"held_out": {"accuracy": None}}}, "9 pairs"),
        ({"job": "train", "steps": 5}, "5 steps"),
        (
            {
                "job": "evaluate",
                "win_rates": [],
                "alignment": None,
                "harmless": {"arms": {"sft": {"rate": {"rate": 0.75}}}},
            },
            "sft harmless 0.750",
        ),
        (
            {"job": "train", "held_out": {"gain": {"mean": 0.5, "ci95_low": -0.25, "ci95_high": 1.0}}},
            "gain +0.5000 [-0.2500, +1.0000]",
        ),
    ],
)
def test_the_figure_that_is_asked_for_first(summary: dict[str, Any], told: str) -> None:
    assert headline(summary) == told


def test_a_stage_that_fails_is_named_and_keeps_its_kind_of_error(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class OfAnActor(Exception):  # as Ray wraps it
        def __init__(self, cause: Exception) -> None:
            self.cause = cause

    pipeline = load(folder)
    placed = place(pipeline)
    for raised, kind, says in (
        (InputError("data.path is empty"), InputError, "stage revise: data.path is empty"),
        (OfAnActor(InputError("no such model")), InputError, "stage revise: no such model"),
        (OfAnActor(KeyError("x")), RunError, "stage revise: KeyError: 'x'"),
        (FeedbackError("too few"), FeedbackError, "stage revise: too few"),
    ):

        def fail(loaded: Any, raised: Exception = raised) -> Any:
            raise raised

        monkeypatch.setitem(WORK, "revise", Work(fail, "revisions.jsonl"))
        with pytest.raises(kind) as caught:
            run_stage(pipeline, placed, "revise")
        assert type(caught.value) is kind and str(caught.value) == says
    assert not (placed["revise"].folder / DONE).exists()


def test_stages_that_share_a_checkpoint_address_have_a_folder_each(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else one would find another's; doing a stage once more must not go on from what it left there."""
    pipeline = load(folder, None, f"shared.checkpoint={{path: {folder / 'kept'}, every: 1}}")
    placed = place(pipeline)
    given: dict[str, str | None] = {}

    def note(loaded: Any) -> dict[str, Any]:
        given[loaded.job] = loaded.config.checkpoint.path
        raise RunError("far enough")

    for name in ("sft", "rm"):
        job = placed[name].stage.job
        monkeypatch.setitem(WORK, job, Work(note, "policy"))
        with pytest.raises(RunError):
            run_stage(pipeline, placed, name)
        assert given[job] == str(folder / "kept" / placed[name].folder.name)
    own = folder / "kept" / placed["sft"].folder.name
    for name, owner in (("step-1", placed["sft"].folder), ("step-2", folder / "another run")):
        written = Place(str(own / f".partial-{name}-0123abcd"))
        publish(StoredFolder(written, {"weights": (written / "weights").write(b"w")}), Place(str(own / name)))
        values = {"run": "0" * 32, "run_dir": str(owner), "process": "one", "session": "1", "since": "now"}
        (own / "owner.json").write_text(json.dumps(values))
        _put_aside(placed["sft"])
    assert [path.name for path in own.iterdir() if path.is_dir()] == ["step-2"]  # another run's stays


# ---- What is done ----------------------------------------------------------------------------------------------------


def test_what_a_stage_made_must_be_what_it_is(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = load(folder)
    placed = place(pipeline)

    def make(loaded: Any) -> dict[str, Any]:
        loaded.run_dir.mkdir(parents=True)
        (loaded.run_dir / "revisions.jsonl").write_text("made\n")
        return {"job": "revise", "records": 1}

    monkeypatch.setitem(WORK, "revise", Work(make, "revisions.jsonl"))
    run_stage(pipeline, placed, "revise")
    assert chosen(pipeline)[0] == "sft"
    placed["revise"].artefact.write_text("by hand\n")
    with pytest.raises(InputError, match=r"the stage revise made was changed since: .*revisions.jsonl.*--from revise"):
        chosen(pipeline)
    assert chosen(pipeline, start="revise")[0] == "revise"


def test_an_input_that_is_replaced_before_its_stage_begins(folder: Path) -> None:
    """The stage's folder is named after what was there when the pipeline began."""
    pipeline = load(folder)
    placed = place(pipeline)
    (folder / "prompts.jsonl").write_text('{"prompt": "Goodbye?"}\n')
    with pytest.raises(RunError, match=r"stage revise: an input was replaced .*data.path: .*prompts.jsonl has changed"):
        run_stage(pipeline, placed, "revise")
    assert not placed["revise"].folder.exists()


def test_what_moved_on_the_hub_is_done_again_with_all_that_builds_on_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(folder / "hub"))
    pipeline = load(folder, None, "stages.sft.policy.model=owner/name")
    placed = place(pipeline)
    for one in placed.values():
        finish(one)
    note = placed["sft"].folder / DONE
    note.write_text(json.dumps(json.loads(note.read_text()) | {"commits": {"policy.model": "a" * 40}}))
    assert chosen(pipeline) == []  # the cache knows of none
    refs = folder / "hub" / "models--owner--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("a" * 40)
    assert chosen(pipeline) == []
    (refs / "main").write_text("b" * 40)
    assert chosen(pipeline) == ["sft", "pairs", "label", "rm", "rlaif", "dpo"]
    told = plan_pipeline(pipeline)
    assert f"[to do again: policy.model: owner/name was at commit {'a' * 40} and is at {'b' * 40}]" in told
    assert re.search(r"^rm: reward-model, after .* \[to do again: what it builds on is done again\]$", told, re.M)


def test_all_stages_have_the_date_of_the_pipelines_first_day(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline = load(folder)
    assert pipeline_date(pipeline.run_dir, today="2026-11-30") == "2026-11-30"
    dates: list[str] = []

    def make(loaded: Any) -> dict[str, Any]:
        dates.append(loaded.config.chat_date)
        raise RunError("far enough")

    monkeypatch.setitem(WORK, "revise", Work(make, "revisions.jsonl"))
    for own in (pipeline, load(folder, None, "stages.revise.chat_date=2020-02-29")):
        with pytest.raises(RunError, match="far enough"):
            run_stage(own, place(own), "revise")
    assert dates == ["2026-11-30", "2020-02-29"]
    assert pipeline_date(pipeline.run_dir) == "2026-11-30"  # today is another day


def test_a_stage_whose_endpoint_fails_is_not_done_and_asks_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rlaif_ray.pipelines.pipeline import run_pipeline
    from tests.endpoint import FakeEndpoint, FaultProxy, Said, one

    def down_for_one(body: dict[str, Any]) -> Said:
        assert "q3\\n" not in json.dumps(body)  # the endpoint answers 500
        return one(_1=0.7, _2=0.3)

    monkeypatch.setenv("JUDGE_TEST_KEY", "k")
    rows = [{"id": str(n), "prompt": f"q{n}", "response_a": f"a{n}", "response_b": "b"} for n in range(20)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with FakeEndpoint() as endpoint, FaultProxy(endpoint.url) as proxy:
        judge = {"type": "openai", "model": "m", "base_url": proxy.url, "api_key_env": "JUDGE_TEST_KEY"}
        judge |= {"max_retries": 0, "concurrency": 1}
        stages = {"label": {"job": "label", "data": {"path": str(folder / "pairs.jsonl")}, "judge": judge}}
        what = {"run_dir": str(folder / "run"), "stages": stages}

        def told() -> tuple[str, dict[str, Any]]:
            found = json.loads((folder / "run" / "summary.json").read_text())
            return found["state"], found["stages"][0]

        proxy.inject("503", times=40)
        with pytest.raises(FeedbackError, match=r"stage label: label.min_labeled_fraction=0.9 .*got 0 of 20"):
            run_pipeline(load(folder, what))
        state, stage = told()
        assert (state, stage["state"], stage["artefact"]) == ("failed", "failed", None) and "got 0 of" in stage["error"]
        # Enough, but one pair fails whenever it is asked.
        endpoint._say = down_for_one
        with pytest.raises(RunError, match=r"stage label: it is not done, for 1 of its questions failed in a way"):
            run_pipeline(load(folder, what))
        assert told()[0] == "failed" and told()[1]["state"] == "failed"
        asked = len(endpoint.bodies)
        run_pipeline(load(folder, what, "accept_failures=true"))
        assert told()[0] == "done" and told()[1]["state"] == "ran" and told()[1]["error"] is None
        assert len(endpoint.bodies) - asked <= 4
        run_pipeline(load(folder, what))
        assert told()[1]["state"] == "done before"
