"""Loading: merging, union switches, where a mistake is said to be, resolved.yaml, and DeepSpeed's dict."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from rlaif_ray.config.algorithms import GrpoConfig, PpoConfig
from rlaif_ray.config.base import Config
from rlaif_ray.config.deepspeed import deepspeed_config
from rlaif_ray.config.jobs import JOBS, TrainJob
from rlaif_ray.config.layers import item_class, variants
from rlaif_ray.config.load import Loaded, load_job
from rlaif_ray.config.pipeline import PipelineJob, load_pipeline
from rlaif_ray.config.resolved import git_revision, resolved_yaml, versions
from rlaif_ray.config.roles import names_of
from rlaif_ray.config.sections import LearnerConfig, OffloadConfig
from rlaif_ray.documents import YamlDumper, parse_yaml
from rlaif_ray.errors import InputError
from rlaif_ray.paths import expand_home
from tests.damage import odd
from tests.jobs import REQUIRED, TRAIN, embedded

ROOT = Path(__file__).parents[2]

Write = Callable[..., Path]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(text: str, name: str = "train.yaml") -> Path:
        path = tmp_path / name
        path.write_text(text)
        return path

    return write


def load(files: Sequence[Path], overrides: Sequence[str] = ()) -> Loaded:
    """A `train` config over a file of what has no default."""
    base = files[0].with_name("base.yaml")
    base.write_text(TRAIN)
    return load_job("train", [base, *files], overrides)


def problems(files: list[Path], *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load(files, overrides)
    return str(caught.value)


# --- merging --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "# nothing but a comment\n", "---\n", "{}"])
def test_an_empty_file_gives_the_defaults(write: Write, text: str) -> None:
    loaded = load([write(text)])
    assert loaded.config.model_copy(update={"run_dir": None}) == embedded(TrainJob, {})


def test_files_win_left_to_right_and_overrides_win_over_files(write: Write) -> None:
    first = write("steps: 1\nseed: 1\nlearner: {lr: 1.0, eps: 1.0}", "a.yaml")
    second = write("steps: 2\nseed: 2\nlearner: {lr: 2.0}", "b.yaml")
    config = load([first, second], ["steps=3"]).config
    assert (config.steps, config.seed, config.learner.lr, config.learner.eps) == (3, 2, 2.0, 1.0)
    assert config.learner.ranks == LearnerConfig().ranks
    assert load([second, first]).config.steps == 1


def test_a_later_override_wins(write: Write) -> None:
    assert load([write("")], ["steps=1", "steps=2"]).config.steps == 2


def test_lists_replace_and_free_mappings_merge(write: Write) -> None:
    first = write("tracking: {tags: [a, b]}\nrollout: {engine_kwargs: {x: 1, deep: {y: 2}}}", "a.yaml")
    second = write("tracking: {tags: [c]}\nrollout: {engine_kwargs: {deep: {z: 3}}}", "b.yaml")
    config = load([first, second]).config
    assert config.tracking.tags == ("c",)
    assert config.rollout.engine_kwargs == {"x": 1, "deep": {"y": 2, "z": 3}}


@pytest.mark.parametrize(
    ("override", "read", "expected"),
    [
        ("learner.lr=1e-5", lambda job: job.learner.lr, 1e-5),
        ("rollout.engine_kwargs.x=1e-5", lambda job: job.rollout.engine_kwargs, {"x": 1e-5}),  # a number, not text
        ("rollout.engine_kwargs={x: [1, yes]}", lambda job: job.rollout.engine_kwargs, {"x": [1, True]}),
        ("data.limit=null", lambda job: job.data.limit, None),
        ("data.limit=", lambda job: job.data.limit, None),
        ("data.shuffle=false", lambda job: job.data.shuffle, False),
        ("learner.betas=[0.5, 0.9]", lambda job: job.learner.betas, (0.5, 0.9)),
        ("cluster.address=10:30", lambda job: job.cluster.address, "10:30"),  # YAML 1.1: sixty times ten and thirty
        ("tracking.project=2024-01-01", lambda job: job.tracking.project, "2024-01-01"),  # YAML 1.1: a date
        ("data.path=a=b", lambda job: job.data.path, "a=b"),
        ('data.path="3"', lambda job: job.data.path, "3"),
        # What is no number, switch, null, list or mapping is the text that was typed.
        ("run_dir=runs/exp #3", lambda job: job.run_dir, "runs/exp #3"),
        ("data.system=#1 rule: be brief", lambda job: job.data.system, "#1 rule: be brief"),
        ("data.system=&a hello", lambda job: job.data.system, "&a hello"),
        ("data.system=*be* brief", lambda job: job.data.system, "*be* brief"),
        ("data.system=!important", lambda job: job.data.system, "!important"),
        ("data.system=Note: be brief", lambda job: job.data.system, "Note: be brief"),
        ("data.system=- be brief", lambda job: job.data.system, "- be brief"),
        ("data.system=one\ntwo\n", lambda job: job.data.system, "one\ntwo\n"),
        ("data.system=@you: 50% of `it`", lambda job: job.data.system, "@you: 50% of `it`"),
        ("data.system='#1'", lambda job: job.data.system, "#1"),
        ('data.system="one\\ntwo"', lambda job: job.data.system, "one\ntwo"),
        # To a field of text, what looks like something else to YAML too.
        ("run_dir=2026", lambda job: job.run_dir, "2026"),
        ("policy.revision=4867e52", lambda job: job.policy.revision, "4867e52"),
        ("policy.revision=0012", lambda job: job.policy.revision, "0012"),
        ("policy.revision=12345678", lambda job: job.policy.revision, "12345678"),
        ("tracking.project=1e5", lambda job: job.tracking.project, "1e5"),
        ("tracking.project=0x1F", lambda job: job.tracking.project, "0x1F"),
        ("tracking.project=1_000", lambda job: job.tracking.project, "1_000"),
        ("tracking.project=0o17", lambda job: job.tracking.project, "0o17"),
        ("tracking.project=017", lambda job: job.tracking.project, "017"),
        ("tracking.project=12:30", lambda job: job.tracking.project, "12:30"),
        ("tracking.project=.5", lambda job: job.tracking.project, ".5"),
        ("tracking.project=.nan", lambda job: job.tracking.project, ".nan"),
        ("data.column=yes", lambda job: job.data.column, "yes"),
        ("data.split=on", lambda job: job.data.split, "on"),
        ("data.split=No", lambda job: job.data.split, "No"),
        ("data.system=true", lambda job: job.data.system, "true"),
        ("data.system= 5 ", lambda job: job.data.system, " 5 "),
        ("data.system=~", lambda job: job.data.system, "~"),  # the word null is null, a path may begin with ~
        ("data.system=null", lambda job: job.data.system, None),
        ("cluster.address=null", lambda job: job.cluster.address, None),
        ("chat_date=2026-11-30", lambda job: job.chat_date, "2026-11-30"),
        # An empty value: of a text that may be empty, of one that may be null, of what else may be null.
        ("data.system=", lambda job: job.data.system, ""),
        ("policy.revision=", lambda job: job.policy.revision, None),
        ("evaluation.held_out.path=", lambda job: job.evaluation.held_out.path, None),
        ("learner.critic_lr=", lambda job: job.learner.critic_lr, None),
        (
            "algorithm.importance.high=3",
            lambda job: (job.algorithm.importance.low, job.algorithm.importance.high),
            (0, 3),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_override_values_are_yaml(write: Write, override: str, read: Callable[[Any], Any], expected: Any) -> None:
    value = read(load([write("data: {limit: 5}")], [override]).config)
    assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("override", "told"),
    [
        ("tracking.project=", 'tracking.project must be text that is not empty (got "", set by the override'),
        ('run_dir=""', 'run_dir must be text that is not empty (got "", set by the override'),
        ("policy.model=", 'policy.model must be text that is not empty (got "", set by the override'),
        ("policy.model=null", "policy.model must be text (got null, set by the override"),
        ("steps=", "steps must be a whole number (got nothing, set by the override steps=)"),
        ("data.shuffle=", "data.shuffle must be true or false (got nothing, set by the override"),
        ("data.too_long=", 'data.too_long must be one of error, skip (got "", set by'),
        ("data.too_long=off", 'data.too_long must be one of error, skip (got "off", set by'),
        ("policy=", "policy must be a mapping of keys (got nothing, set by"),
        ("steps=0o17", 'steps must be a whole number (got "0o17", set by'),
        ("steps=-0x1F", "steps must be a number at least 1 (got -0x1F, which is read as -31, set by"),
        (
            "tracking.tags=[a, 1e5]",
            "tracking.tags[1] must be text (got 1e5, which is read as 100000.0, set by the over",
        ),
    ],
)
def test_an_override_that_a_field_cannot_take(write: Write, override: str, told: str) -> None:
    assert told in problems([write("")], override)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("4867e52", "4.867e+55"),
        ("0x1F", "31"),
        ("1_000", "1000"),
        ("1.50", "1.5"),
        ("yes", "true"),
        ("Off", "false"),
        ("2026", None),
    ],
)
def test_the_remedy_has_what_was_typed(write: Write, written: str, read: str | None) -> None:
    """In a file, YAML has made a number of it by now: what it has made is told, and what to write instead."""
    got = f"{written}, which is read as {read}" if read else written
    text = problems([write(f"policy:\n  revision: {written} # the one\ntracking: {{tags: [{written}]}}")])
    assert f"policy.revision must be text (got {got}, set by " in text and f'in quotes: revision: "{written}".' in text
    assert f"tracking.tags[0] must be text (got {got}, " in text and f'Put it in quotes: "{written}".' in text


@pytest.mark.parametrize("written", ["0012", "0o17", "017", "12:30", "2026-11-30", "1e5x"])
def test_what_is_no_number_in_yaml_is_text(write: Write, written: str) -> None:
    assert load([write(f"policy: {{revision: {written}}}")]).config.policy.revision == written


def test_a_later_quoted_text_is_no_number(write: Write) -> None:
    first, second = write("policy: {revision: 1e5}", "a.yaml"), write('policy: {revision: "1e5"}', "b.yaml")
    assert load([first, second]).config.policy.revision == "1e5"
    assert load([first], ["policy.revision=1e5"]).config.policy.revision == "1e5"


def test_what_is_typed_reaches_a_name_of_the_users(write: Write) -> None:
    """Sections under names, and settings without a class of their own, where a number is a number."""
    settings = ["arms.a.model=2026", "arms.b.path=1e5", "arms.a.revision=0012", "prompts.path=7", "judge.model=no"]
    config = load_job("evaluate", [write("")], [*settings, "rollout.engine_kwargs.x=1e5"]).config
    assert (config.arms["a"].model, config.arms["a"].revision, config.arms["b"].path) == ("2026", "0012", "1e5")
    assert (config.prompts.path, config.judge.model, config.rollout.engine_kwargs) == ("7", "no", {"x": 1e5})


def test_what_is_typed_reaches_a_stage(write: Write) -> None:
    text = "stages: {a: {job: sft, policy: {model: m}, data: {path: x}}}"
    settings = ["stages.a.policy.revision=4867e52", "stages.a.seed=7", "run_dir=2026", "shared.policy.model=1e5"]
    pipeline = load_pipeline([write(text)], settings)
    assert pipeline.run_dir == Path("2026")
    assert (pipeline.stages[0].config.policy.revision, pipeline.stages[0].config.seed) == ("4867e52", 7)


def test_anchors_and_merge_keys_work(write: Write) -> None:
    text = "rollout: {engine_kwargs: &same {x: 1, y: 1}}\nfeedback: {judge: {engine_kwargs: {<<: *same, y: 2}}}"
    config = load([write(text)]).config
    assert config.feedback.judge.engine_kwargs == {"x": 1, "y": 2}
    assert config.rollout.engine_kwargs == {"x": 1, "y": 1}


# --- unions ---------------------------------------------------------------------------------------------------------


def test_a_union_keeps_its_type_when_only_its_keys_are_set(write: Write) -> None:
    config = load([write("algorithm: {clip: 0.3}")]).config
    assert isinstance(config.algorithm, PpoConfig) and config.algorithm.clip == 0.3


def test_changing_the_type_drops_the_other_types_keys(write: Write) -> None:
    ppo = write("algorithm: {type: ppo, lam: 0.5, clip: 0.4, epochs: 4}", "ppo.yaml")
    grpo = write("algorithm: {type: grpo}", "grpo.yaml")
    assert load([ppo, grpo]).config.algorithm == GrpoConfig(type="grpo")
    assert load([ppo], ["algorithm.type=grpo"]).config.algorithm == GrpoConfig(type="grpo")
    assert load([grpo, ppo]).config.algorithm.lam == 0.5


def test_naming_the_same_type_again_drops_nothing(write: Write) -> None:
    config = load([write("algorithm: {type: ppo, lam: 0.5}")], ["algorithm.type=ppo"]).config
    assert config.algorithm.lam == 0.5


def test_overrides_are_one_layer_whatever_their_order(write: Write) -> None:
    settings = ["algorithm.clip=0.3", "algorithm.type=grpo"]
    for overrides in (settings, settings[::-1]):
        algorithm = load([write("algorithm: {lam: 0.5}")], overrides).config.algorithm
        assert (algorithm.type, algorithm.clip) == ("grpo", 0.3)


def test_a_types_own_nested_defaults_hold_when_one_of_them_is_set(write: Write) -> None:
    """GRPO's estimator is k3 by default: setting its coefficient alone must not bring back KlConfig's k1."""
    config = load([write("algorithm: {type: grpo, kl: {coef: 0.1}}")]).config
    assert (config.algorithm.kl.coef, config.algorithm.kl.estimator) == (0.1, "k3")


# --- run_dir --------------------------------------------------------------------------------------------------------


def test_run_dir_comes_from_the_first_file_and_the_time(write: Write) -> None:
    loaded = load_job("train", [write(TRAIN, "mine.yaml"), write("", "other.yaml")])
    assert loaded.run_dir.parent == Path("runs") and not loaded.run_dir_given
    assert loaded.run_dir.name.startswith("mine-20") and len(loaded.run_dir.name) == len("mine-20240131-235959")
    assert loaded.config.run_dir == str(loaded.run_dir)
    assert not loaded.run_dir.exists()


@pytest.mark.parametrize("home", ["~", "$HOME", "${HOME}"])
def test_home_is_where_it_is_in_a_shell(write: Write, home: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setenv("HOMES", "/no")
    for text, path in ((f"{home}/runs/a", "/home/me/runs/a"), (home, "/home/me"), (f"x/{home}", f"x/{home}")):
        assert load([write("")], [f"run_dir={text}"]).run_dir == Path(path)
        assert load([write(f"run_dir: '{text}'")]).run_dir == Path(path)
    stages = write(f"run_dir: '{home}/p'\nstages: {{a: {{job: sft, policy: {{model: m}}, data: {{path: x}}}}}}")
    assert load_pipeline([stages]).run_dir == Path("/home/me/p")
    assert expand_home("$HOMES/a") == Path("$HOMES/a") and expand_home("$HF_TOKEN/a") == Path("$HF_TOKEN/a")
    assert expand_home("~nobody-has-this-name/a") == Path("~nobody-has-this-name/a")


def test_run_dir_can_be_given(write: Write) -> None:
    loaded = load([write("")], ["run_dir=/tmp/here"])
    assert loaded.run_dir == Path("/tmp/here") and loaded.run_dir_given


# --- what is said of mistakes (test_wrong_inputs.py has the table) ----------------------------------------------------


def test_all_problems_are_told_at_once(write: Write) -> None:
    first = write("learner:\n  lrr: 1\nsteps: ten\n", "a.yaml")
    second = write("algorithm: {type: grpo}\nsampling: {top_p: 0.9, top_k: 5, samples_per_prompt: 1}\n", "b.yaml")
    text = problems([first, second], "policy.precision=fp16")
    assert text.startswith("the config has 6 problems:") and text.count("\n  - ") == 6
    for words in ("learner.lrr", "steps must be a whole number", "sampling.top_p", "sampling.top_k"):
        assert words in text
    assert "algorithm.type=grpo needs sampling.samples_per_prompt >= 2 (got 1)" in text
    assert "Did you mean bf16?" in text


def test_each_problem_names_the_source_that_won(write: Write) -> None:
    first, second = write("seed: 1\nsteps: 0\n", "a.yaml"), write("\n\nsteps: -1\n", "b.yaml")
    assert f"set by {first}, line 2" in problems([first])
    assert f"set by {second}, line 3" in problems([first, second])
    assert "set by the override steps=-2" in problems([first, second], "steps=-2")


def test_a_problem_in_a_list_says_which_item(write: Write) -> None:
    assert "learner.betas[1] must be a number" in problems([write("learner: {betas: [0.9, x]}")])


def test_union_tags_do_not_show_in_names(write: Write) -> None:
    text = problems([write("algorithm: {type: grpo, clip: x, kl: {estimator: k9}, clp: 1}")])
    assert "algorithm.clip must be a number" in text
    assert "algorithm.kl.estimator must be one of k1, k2, k3" in text
    assert "algorithm.clp is not a known key" in text
    assert "algorithm.grpo" not in text


def test_of_an_unknown_type_only_the_type_is_told(write: Write) -> None:
    text = problems([write("algorithm: {type: gppo, anything: 1}\nfeedback: {type: jugde, else: 2}")])
    assert text.count("\n  - ") == 2 and "anything" not in text and "else" not in text


def test_a_cross_check_waits_until_what_it_reads_is_right(write: Write) -> None:
    """The default of 100 steps is not the user's: nothing may be concluded from it."""
    text = problems([write("steps: many\nlearner: {warmup_steps: 200}")])
    assert "steps must be a whole number" in text and "warmup" not in text
    text = problems([write("stesp: 500\nlearner: {warmup_steps: 200}")])
    assert "Did you mean steps?" in text and "warmup" not in text


def test_a_cross_check_waits_for_a_file_that_could_not_be_read(write: Write, tmp_path: Path) -> None:
    text = problems([write("learner: {warmup_steps: 200}"), tmp_path / "steps.yaml"])
    assert "does not exist" in text and "warmup" not in text


def test_a_key_of_another_type_says_whose_it_is(write: Write) -> None:
    text = problems([write("algorithm: {type: grpo, gamma: 0.9}")])
    assert "It belongs to algorithm.type=ppo and algorithm.type=reinforce" in text


def test_a_key_at_the_wrong_level_says_where_it_lives(write: Write) -> None:
    assert "Did you mean learner.lr?" in problems([write("lr: 1e-6")])
    assert "Did you mean algorithm.importance?" in problems([write("importance: {high: 2}")])


# --- what has no default ----------------------------------------------------------------------------------------------


def missing(job: str, file: Path, *settings: str) -> list[str]:
    """The keys that must be set, one a line."""
    with pytest.raises(InputError) as caught:
        load_job(job, [file], settings)
    lines = str(caught.value).split("\n  - ")
    return [line.partition(" must be set (got nothing from ")[0] for line in lines if "must be set" in line]


def test_what_has_a_default_is_enough_beside_what_has_none(write: Write) -> None:
    assert set(REQUIRED) == set(JOBS)
    for job, required in REQUIRED.items():
        assert load_job(job, [write("")], required).config


@pytest.mark.parametrize("job", JOBS)
def test_models_and_data_have_no_default(job: str, write: Write) -> None:
    """No job takes a model or data that its config does not name; all that is missing is told at once."""
    wanted = {setting.partition("=")[0] for setting in REQUIRED[job]}
    optional = {"data.path"} if job == "evaluate" else set()  # there may be arms instead
    assert set(missing(job, write(""))) == wanted - optional
    for setting in set(REQUIRED[job]):
        if setting.partition("=")[0] not in optional:
            others = [other for other in REQUIRED[job] if other != setting]
            assert missing(job, write(""), *others) == [setting.partition("=")[0]]


def test_no_model_or_data_is_named_in_the_schema() -> None:
    """Nothing that a run reads or trains comes from nowhere, in any section of any job."""
    for model in set(every_class()):
        for name, field in model.model_fields.items():
            if (found := names_of(field)) is not None and found.kind in ("data", "model"):
                assert field.is_required() or field.default is None, f"{model.__name__}.{name}"


def test_every_key_without_a_default_has_an_example() -> None:
    for model in set(every_class()):
        for name, field in model.model_fields.items():
            if field.is_required() and not variants(model, name) and name not in ("type", "stages"):
                assert field.examples and field.description, f"{model.__name__}.{name}"


def test_a_missing_key_says_file_meaning_and_remedy(write: Write) -> None:
    file = write("data: {path: prompts.jsonl}\nfeedback: {type: reward_model}\npolicy: {model: m}")
    with pytest.raises(InputError) as caught:
        load_job("train", [file])
    assert str(caught.value) == (
        f"feedback.model must be set (got nothing from {file}): it has no default, since no run can guess it. Add "
        f"`feedback: {{model: runs/reward/reward_model}}` there, or feedback.model=runs/reward/reward_model to the "
        f"command (a folder that `rlaif reward-model` wrote, or any sequence classifier with one label)."
    )


def test_missing_keys_do_not_hide_other_problems(write: Write) -> None:
    file = write("steps: 10\nlearner: {warmup_steps: 10}\nzzz: {}")
    with pytest.raises(InputError) as caught:
        load_job("train", [file])
    told = str(caught.value)
    assert told.startswith("the config has 5 problems:") and "learner.warmup_steps must be below" in told
    assert "zzz is not a known key" in told


def test_missing_keys_inside_named_parts(write: Write) -> None:
    parts = "{a: {weight: 1}, b: {scorer: {type: length}}, c: {scorer: {type: judge}}}"
    file = write(f"policy: {{model: m}}\ndata: {{path: x}}\nfeedback: {{type: mixture, scorers: {parts}}}")
    assert sorted(missing("train", file)) == [
        "feedback.scorers.a.scorer.judge.model",
        "feedback.scorers.b.scorer.target_tokens",
        "feedback.scorers.c.scorer.judge.model",
    ]
    file = write("policy: {model: m}\ndata: {path: x}\nother_policies: {b: {precision: fp32}}")
    assert missing("pairs", file) == ["other_policies.b.model"]


def test_an_empty_name_is_none(write: Write) -> None:
    text = problems([write('policy: {model: ""}\ndata: {path: ""}')], "feedback.judge.model=")
    for key in ("policy.model", "data.path", "feedback.judge.model"):
        assert f"{key} must be text that is not empty" in text


def test_arms_that_are_models_need_prompts(write: Write) -> None:
    file = write("judge: {model: m}\narms: {a: {model: x}, b: {path: b.jsonl}}")
    with pytest.raises(
        InputError, match=r"prompts must be set where arms are models .* Add `prompts: \{path: held_out"
    ):
        load_job("evaluate", [file])
    assert load_job("evaluate", [file], ["arms.a={path: a.jsonl, model: null}"]).config.prompts is None
    assert missing("evaluate", file, "prompts.limit=3") == ["prompts.path"]


def test_evaluations_on_the_way_need_something_to_measure(write: Write) -> None:
    assert "evaluation.every needs evaluation.held_out.path" in problems([write("evaluation: {every: 5}")])
    assert load([write("evaluation: {every: 5, held_out: {path: held_out.jsonl}}")]).config.evaluation.every == 5


def test_temperatures_that_vllm_raises_are_refused_everywhere() -> None:
    """It takes 0.001 for 0.01 and says nothing."""
    sampled = [model for model in set(every_class()) if "temperature" in model.model_fields]
    assert len(sampled) >= 5  # of rollouts, pairs, responses, rationales and revisions
    for model in sampled:
        with pytest.raises(ValueError, match=r"0\.01"):
            model.model_validate({"temperature": 0.001})
        for right in (0.01, 0.7):
            assert model.model_validate({"temperature": right}).temperature == right  # type: ignore[attr-defined]


def every_class() -> Iterator[type[Config]]:
    """The classes of all jobs and their sections."""
    left: list[type[Any]] = [*JOBS.values(), PipelineJob]
    while left:
        model = left.pop()
        yield model
        for name in model.model_fields:
            item = item_class(model, name)
            left += [*variants(model, name).values(), *([item] if item else [])]


# --- resolved.yaml --------------------------------------------------------------------------------------------------


def resolved(loaded: Loaded, write: Write) -> Path:
    return write(resolved_yaml(loaded, {"torch": "2.0"}, "abc+dirty"), "resolved.yaml")


@pytest.mark.parametrize(
    "text",
    [
        "",
        "algorithm: {type: grpo, importance: {high: 3}, kl: {target: 6}}\nlearner: {lr: 1e-7, betas: [0.5, 0.9]}",
        'data: {path: "1e5", column: "no", system: "two\\nlines: yes", split: "2024-01-01"}\ntracking: {tags: ["3"]}',
        "rollout: {engine_kwargs: {a: 1e-9, b: [1, {c: null}], d: yes, 'e f': 'x: y', \"1\": 2}}",
        "data: {system: 'Größe 🙂 #1'}",
    ],
)
def test_resolved_yaml_loads_as_the_same_config(write: Write, text: str) -> None:
    loaded = load([write(text)], ["steps=7", "data.limit=3"])
    assert load([resolved(loaded, write)]).config == loaded.config


@pytest.mark.parametrize("text", ["'tis the season", '"Hi" he said', "[x] y", "{a"])
def test_a_text_may_begin_as_yaml_does(write: Write, text: str) -> None:
    loaded = load([write("")], [f"data.system={text}", f"run_dir={text}"])
    assert (loaded.config.data.system, loaded.config.run_dir) == (text, text)
    for key in ("learner.lr", "rollout.engine_kwargs.x"):
        with pytest.raises(InputError, match=r"valid YAML") as caught:
            load([write("")], [f"{key}={text}"])
        assert "problems" not in str(caught.value)


def test_resolved_yaml_says_every_value_and_its_origin(write: Write) -> None:
    loaded = load([write("")], ["data.system=a\nb"])
    text = resolved(loaded, write).read_text()
    comments = [line for line in text.splitlines() if line.startswith("#")]
    assert any("abc+dirty" in line for line in comments) and any("torch 2.0" in line for line in comments)
    values = yaml.safe_load(text)
    assert set(values) == set(TrainJob.model_fields)
    assert set(values["algorithm"]) == set(PpoConfig.model_fields)


def test_versions_names_what_is_installed() -> None:
    found = versions()
    assert next(iter(found)) == "rlaif_ray"
    assert {"torch", "vllm", "ray", "deepspeed", "transformers", "wandb"} >= set(found) - {"rlaif_ray"}


def test_git_revision(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        identity = ["-c", "user.name=t", "-c", "user.email=t@example.invalid", "-c", "commit.gpgsign=false"]
        command = ["git", "-C", str(tmp_path), *identity, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    assert git_revision(tmp_path) is None
    assert git_revision(tmp_path / "nowhere") is None
    git("init", "-q")
    assert git_revision(tmp_path) is None  # no commit yet
    tracked, untracked = tmp_path / "tracked", tmp_path / "site-packages"
    for folder in (tracked, untracked):
        folder.mkdir()
        (folder / "file").write_text("1")
    git("add", "tracked")
    git("commit", "-q", "-m", "x")
    assert git_revision(tracked) == git("rev-parse", "HEAD")
    assert git_revision(untracked) is None
    (tracked / "file").write_text("2")
    assert git_revision(tracked) == git("rev-parse", "HEAD") + "+dirty"


# --- DeepSpeed ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_deepspeed_config(stage: Any, precision: Any) -> None:
    config = deepspeed_config(LearnerConfig(zero_stage=stage, grad_clip=0.5), precision=precision, micro_batch_size=4)
    if precision == "bf16":
        assert config["zero_optimization"]["stage"] == max(stage, 1)  # stage 0 has no fp32 sum of gradients
        assert config["bf16"] == {"enabled": True, "check_grad_overflow": True, "immediate_grad_update": True}
        assert config["data_types"] == {"grad_accum_dtype": "fp32"}
        assert config["communication_data_type"] == "fp32"
    else:
        assert config["zero_optimization"]["stage"] == stage
        assert not {"bf16", "data_types", "communication_data_type"} & set(config)
    assert config["gradient_clipping"] == 0.5
    assert config["train_micro_batch_size_per_gpu"] == 4
    assert config["gradient_accumulation_steps"] == 1
    assert config["zero_allow_untested_optimizer"] is True
    assert config["wall_clock_breakdown"] is False
    assert config["steps_per_print"] > 10**9
    assert not {"optimizer", "scheduler", "fp16"} & set(config)
    gathers = config["zero_optimization"].get("stage3_gather_16bit_weights_on_model_save")
    assert gathers is (False if stage == 3 else None)


def test_deepspeed_overrides_are_merged_in_last() -> None:
    overrides = {
        "zero_optimization": {"reduce_bucket_size": 7, "offload_optimizer": {"device": "cpu"}},
        "dump_state": 1,
    }
    learner = LearnerConfig(zero_stage=2, deepspeed_overrides=overrides)
    config = deepspeed_config(learner, precision="fp32")
    assert config["zero_optimization"]["stage"] == 2
    assert config["zero_optimization"]["reduce_bucket_size"] == 7
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert config["dump_state"] == 1


def test_deepspeed_config_is_pure() -> None:
    """DeepSpeed writes into the dict it is given; that must reach neither our config nor the next dict."""
    learner = LearnerConfig(deepspeed_overrides={"a": {"b": [1]}})
    first = deepspeed_config(learner, precision="fp32")
    first["a"]["b"].append(2)
    first["zero_optimization"]["stage"] = 9
    assert learner.deepspeed_overrides == {"a": {"b": [1]}}
    assert deepspeed_config(learner, precision="fp32")["zero_optimization"]["stage"] == 0


@pytest.mark.parametrize("pin", [True, False])
def test_deepspeed_itself_reads_offload_and_hpz(pin: bool) -> None:
    schema = pytest.importorskip("deepspeed.runtime.zero.config").DeepSpeedZeroConfig
    offload = OffloadConfig(optimizer="cpu", parameters="cpu", pin_memory=pin)
    read = schema(
        **deepspeed_config(LearnerConfig(zero_stage=3, offload=offload), precision="bf16")["zero_optimization"]
    )
    for part in (read.offload_optimizer, read.offload_param):
        assert (part.device, part.pin_memory) == ("cpu", pin)
    halves = LearnerConfig(ranks=16, zero_stage=3, hpz_partition_size=8)
    read = schema(**deepspeed_config(halves, precision="bf16")["zero_optimization"])
    assert read.zero_hpz_partition_size == 8
    assert read.offload_optimizer is None and read.offload_param is None
    assert (
        schema(**deepspeed_config(LearnerConfig(), precision="bf16")["zero_optimization"]).zero_hpz_partition_size == 1
    )


def test_deepspeed_takes_torchs_adamw_for_what_is_offloaded() -> None:
    """Unless told not to, it insists on its own, which it compiles at the start."""
    learner = LearnerConfig(zero_stage=2, offload=OffloadConfig(optimizer="cpu"))
    assert deepspeed_config(learner, precision="bf16")["zero_force_ds_cpu_optimizer"] is False


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"offload": {"optimizer": "cpu"}}, "offload.optimizer=cpu needs learner.zero_stage of at least 1 (got 0)"),
        (
            {"zero_stage": 2, "offload": {"parameters": "cpu"}},
            "offload.parameters=cpu needs learner.zero_stage=3 (got 2)",
        ),
        (
            {"zero_stage": 2, "ranks": 2, "hpz_partition_size": 2},
            "above 1 needs learner.zero_stage=3 (got 2 with stage 2)",
        ),
        ({"zero_stage": 3, "ranks": 6, "hpz_partition_size": 4}, "must divide learner.ranks (got 4 and 6)"),
        (
            {"zero_stage": 3, "ranks": 4, "hpz_partition_size": 2, "offload": {"parameters": "cpu"}},
            "contradict each other",
        ),
    ],
)
def test_what_offload_and_hpz_need(values: dict[str, Any], says: str) -> None:
    with pytest.raises(ValidationError, match=re.escape(says)):
        LearnerConfig.model_validate(values)


def test_deepspeed_itself_accepts_the_config() -> None:
    deepspeed_schema = pytest.importorskip("deepspeed.runtime.zero.config")
    for stage in (0, 1, 2, 3):
        config = deepspeed_config(LearnerConfig(zero_stage=stage), precision="fp32")
        read = deepspeed_schema.DeepSpeedZeroConfig(**config["zero_optimization"])
        assert read.stage == stage


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_values_of_any_kind(tmp_path: Path, data: st.DataObject) -> None:
    """A config, or an InputError, for whatever stands where something else is expected."""
    for name in ("train", "pipeline"):
        values = parse_yaml((ROOT / "configs" / "demo" / f"{name}.yaml").read_bytes()).value
        odd_values = yaml.dump(data.draw(odd(values)), Dumper=YamlDumper)
        (tmp_path / "odd.yaml").write_text(odd_values, errors="surrogatepass")
        with suppress(InputError):
            load_pipeline([tmp_path / "odd.yaml"]) if name == "pipeline" else load_job(name, [tmp_path / "odd.yaml"])


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("steps: " + "[" * 20_000, "c.yaml, line 1 is nested more than 100 deep. Correct or remove it there."),
        ("seed: 1\nsteps: " + "9" * 5000, "c.yaml, line 2 has a number of more than 300 digits"),
        ("a: &a0 [x]\n" + "".join(f"b{k}: &a{k} [{f'*a{k - 1}, ' * 9}]\n" for k in range(1, 9)), "50,000 values"),
        ("steps: !!bool maybe", "c.yaml, line 1 is not valid YAML: 'maybe' is not a valid !!bool"),
        ('run_dir: "\\uD800"', "c.yaml, line 1 has half of a surrogate pair"),
        ("#" * (3 << 20), "c.yaml can't be read (it is longer than 2,097,152 bytes)"),
    ],
)
def test_a_file_beyond_the_bounds(tmp_path: Path, text: str, says: str) -> None:
    (tmp_path / "c.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        load_job("train", [tmp_path / "c.yaml"])
    assert says in str(caught.value)


def test_a_stage_whose_job_is_a_list(tmp_path: Path) -> None:
    (tmp_path / "p.yaml").write_text("stages: {a: {job: [sft]}, b: {job: {}}}")
    with pytest.raises(InputError, match=r"stages\.a\.job must be a job \(got \['sft'\]\)"):
        load_pipeline([tmp_path / "p.yaml"])
