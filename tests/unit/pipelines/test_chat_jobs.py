"""Chat templates in jobs: what is trained on, what is refused before anything starts, and one date for all of a run."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlaif_ray.chat.renderer import ChatRenderer
from rlaif_ray.cli import app
from rlaif_ray.config.jobs import DpoJob, LabelJob, RewardModelJob, SampleJob, SftJob
from rlaif_ray.config.load import Loaded, load_job
from rlaif_ray.config.sections import JudgeFeedback, RewardModelFeedback
from rlaif_ray.errors import InputError
from rlaif_ray.interfaces import WrittenFiles
from rlaif_ray.models import load_tokenizer
from rlaif_ray.pipelines.chat_date import with_chat_date
from rlaif_ray.pipelines.checkpoint import RunState, open_checkpoints, read_state
from rlaif_ray.pipelines.feedback import check_reward_templates, read_feedback
from rlaif_ray.pipelines.inputs import look_at
from rlaif_ray.pipelines.pair_examples import read_pairs
from rlaif_ray.pipelines.preferences import read_guide
from rlaif_ray.pipelines.run_folder import go_on, make_folder, state_of, write_resolved
from rlaif_ray.pipelines.sampling import read_inputs as read_sampling
from rlaif_ray.pipelines.supervised import read_sft_inputs
from rlaif_ray.storage import Place
from rlaif_ray.types import Message, Prompt
from tests.chat_families import model_of
from tests.jobs import REQUIRED, TRAIN
from tests.tiny import IM_END

END = "\n</think>\n\n"


def rows(file: Path, *values: dict[str, Any]) -> dict[str, str]:
    file.write_text("".join(json.dumps(value) + "\n" for value in values))
    return {"path": str(file)}


# --- what is trained on -----------------------------------------------------------------------------------------------

PAIR = {"prompt": "2 + 2?", "response_a": "<think>\nHm.\n</think>\n\n4", "response_b": "5", "label": 1.0}
OPEN = PAIR | {"response_b": "<think>\nHm"}


def test_sft_learns_outside_of_an_open_thought(tmp_path: Path) -> None:
    model = model_of("deepseek-r1", tmp_path)
    data = rows(
        tmp_path / "d.jsonl", {"prompt": "2 + 2?", "response": "4"}, {"prompt": "2 + 2?", "response": "Hm.</think>4"}
    )
    job = {"policy": {"model": model}, "data": data, "sft": {"held_out_fraction": 0}}
    said = [load_tokenizer(model).decode(e.response) for e in read_sft_inputs(SftJob.model_validate(job)).train]
    assert said == [f"{END}4{IM_END}", f"Hm.</think>4{IM_END}"]


@pytest.mark.parametrize(
    ("job", "section", "settings", "said"),
    [
        (DpoJob, "dpo", {}, [("Hm.\n</think>\n\n4", f"{END}5"), ("Hm.\n</think>\n\n4", "Hm")]),
        (RewardModelJob, "reward", {}, [(f"{END}4", f"{END}5")]),  # of the other pair an answer is missing
        (
            RewardModelJob,
            "reward",
            {"thoughts": "keep"},
            [("Hm.\n</think>\n\n4", f"{END}5"), ("Hm.\n</think>\n\n4", "Hm")],
        ),
    ],
)
def test_pairs_outside_of_an_open_thought(
    job: Any, section: str, settings: dict[str, Any], said: Any, tmp_path: Path
) -> None:
    model = model_of("deepseek-r1", tmp_path)
    cfg = {"policy": {"model": model}, "data": rows(tmp_path / "d.jsonl", PAIR, OPEN)}
    cfg[section] = {"held_out_fraction": 0, **settings}
    inputs, _ = read_pairs(job.model_validate(cfg), ChatRenderer.turn_end)
    decode = load_tokenizer(model).decode
    found = [(decode(e.response_a), decode(e.response_b)) for e in inputs.train]
    assert found == [(f"{a}{IM_END}", f"{b}{IM_END}") for a, b in said]
    assert inputs.left_out == ({} if len(said) == 2 else {"open_thought": 1})


def test_arguments_of_the_config_reach_prompts_and_judges(tmp_path: Path) -> None:
    model = model_of("qwen3", tmp_path, context=4096)
    off = {"model": model, "chat_template_kwargs": {"enable_thinking": False}}
    data = rows(tmp_path / "p.jsonl", {"prompt": "2 + 2?"})
    ends = []
    for policy in ({"model": model}, off):
        [prompt] = read_sampling(SampleJob.model_validate({"policy": policy, "data": data})).prompts
        ends.append(load_tokenizer(model).decode(prompt.tokens).partition("assistant\n")[2])
    assert ends == ["", "<think>\n\n</think>\n\n"]
    judge = {"type": "vllm", "model": model, "chat_template_kwargs": {"enable_thinking": True}}
    guide = read_guide(LabelJob.model_validate({"data": {"path": "x"}, "judge": judge}))
    assert guide.chat.identity == '{"enable_thinking": true}'


def test_a_policys_open_thought_goes_with_its_prompts(tmp_path: Path) -> None:
    data = rows(tmp_path / "p.jsonl", {"prompt": "2 + 2?"})
    job = SampleJob.model_validate({"policy": {"model": model_of("deepseek-r1", tmp_path)}, "data": data})
    assert [prompt.opened for prompt in read_sampling(job).prompts] == ["<think>\n"]


# --- before anything starts -------------------------------------------------------------------------------------------


def refused(job: str, *settings: str) -> str:
    done = CliRunner().invoke(app, [job, "empty.yaml", *settings])
    assert done.exit_code == 2, done.output
    return str(done.stderr)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ray.init", lambda *_, **__: pytest.fail("Ray was started"))
    Path("empty.yaml").write_text("{}")
    rows(tmp_path / "p.jsonl", {"prompt": "2 + 2?", "response": "4"})
    return tmp_path


@pytest.mark.parametrize("job", ["train", "sample", "pairs"])
def test_a_system_message_that_does_not_reach_the_tokens(job: str, folder: Path) -> None:
    model = model_of("phi-3", folder, context=4096)
    judge = [f"feedback.judge.model={model}"] if job == "train" else []
    told = refused(job, f"policy.model={model}", "data.path=p.jsonl", "data.system=Be brief.", *judge)
    assert (
        "p.jsonl, line 1: the chat template of policy leaves out the system message" in told and "data.system" in told
    )


def test_a_rows_own_system_message(folder: Path) -> None:
    model = model_of("phi-3", folder)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a"}]
    rows(folder / "d.jsonl", {"messages": [*turns, {"role": "assistant", "content": "b"}]})
    assert "d.jsonl, line 1: the chat template of policy leaves out" in refused(
        "sft", f"policy.model={model}", "data.path=d.jsonl"
    )


@pytest.mark.parametrize(
    ("job", "settings", "said"),
    [
        (
            "sample",
            ["policy.chat_template_kwargs={enable_thinking: false}"],
            "policy.chat_template_kwargs has 'enable",
        ),
        ("train", ["feedback.judge.chat_template_kwargs={thinkin: false}"], "feedback.judge.chat_template_kwargs has"),
        ("label", ["judge.chat_template_kwargs={thinkin: false}"], "judge.chat_template_kwargs has 'thinkin'"),
        ("sample", ["policy.chat_template_kwargs={add_generation_prompt: false}"], "can't set add_generation_prompt"),
        ("sample", ["chat_date=tomorrow"], "chat_date must be a day such as 2026-11-30"),
        (
            "label",
            ["judge={type: openai, model: m, chat_template_kwargs: {a: 1}, extra_body: {chat_template_kwargs: {}}}"],
            "Keep the first",
        ),
    ],
)
def test_settings_without_an_effect(job: str, settings: list[str], said: str, folder: Path) -> None:
    model, judge = f"policy.model={model_of('chatml', folder, context=4096)}", str(folder / "chatml")
    models = {"sample": [model], "train": [model, f"feedback.judge.model={judge}"], "label": []}[job]
    if job == "label":
        rows(folder / "p.jsonl", PAIR)
        models = [f"judge.model={judge}"] if "openai" not in settings[0] else []
    assert said in refused(job, *models, "data.path=p.jsonl", *settings)


def test_a_reward_models_template_that_leaves_the_system_message_out(tmp_path: Path) -> None:
    model = Path(model_of("phi-3", tmp_path))
    config = json.loads((model / "config.json").read_text())
    config |= {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1, "id2label": {"0": "LABEL_0"}}
    (model / "config.json").write_text(json.dumps(config))
    prompts = [Prompt("p1", (Message("system", "s"), Message("user", "u")), (1,), "u")]
    cfg = RewardModelFeedback(model=str(model))
    assert read_feedback(cfg).judges == {}
    with pytest.raises(InputError, match="prompt p1: the chat template of feedback leaves out the system"):
        check_reward_templates(cfg, prompts)


# --- one date for all of a run ----------------------------------------------------------------------------------------


def loaded(job: str, *settings: str) -> Loaded:
    return load_job(job, [], [*REQUIRED[job], *settings])


class Nothing:
    """A learner without a state."""

    def save_checkpoint(self, place: Place) -> WrittenFiles:
        return dict


def begin(one: Loaded, *, checkpoint: bool = True) -> None:
    """What a run leaves that is ended, or what it says when it goes on."""
    make_folder(one.run_dir)
    if not hasattr(one.config, "checkpoint"):
        make_folder(state_of(one))
        go_on(one, state_of(one), look_at(one.config), made=["*.jsonl"])
        (state_of(one) / "made.jsonl").write_text("{}\n")
        return
    write_resolved(one)
    with open_checkpoints(one.config, one.run_dir) as checkpoints:
        if (saved := checkpoints.to_resume()) is not None:
            read_state(saved, one.config, steps=100)
        elif checkpoint:
            for step in (9, 10):
                checkpoints.save(Nothing(), RunState(step=step))


RUNS = {
    "train": ["run_dir=run"],
    "train elsewhere": ["run_dir=run", "checkpoint.path=there"],
    "train in an object store": ["run_dir=run", "checkpoint.path=memory://chat-dates"],
    "sft": ["run_dir=run", "data.path=x.jsonl"],
    "sample": ["run_dir=run"],
    "label": ["output=labels.jsonl", "data.path=x.jsonl"],  # its run_dir is another each time
    "evaluate": ["run_dir=run", "data.path=x.jsonl"],
}


@pytest.mark.parametrize("name", RUNS)
def test_a_run_that_is_resumed_on_another_day_keeps_its_date(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    rows(tmp_path / "x.jsonl", {"prompt": "a", "response": "b"})
    job = name.split()[0]
    settings = [*RUNS[name], *(["data.path=x.jsonl"] if job in ("train", "sample") else [])]
    first = with_chat_date(loaded(job, *settings), today="2026-11-30")
    assert first.config.chat_date == "2026-11-30"
    begin(first)
    again = with_chat_date(loaded(job, *settings), today="2026-12-01")
    assert again.config.chat_date == "2026-11-30"
    begin(again)
    assert load_job(job, [first.run_dir / "resolved.yaml"]).config.chat_date == "2026-11-30"
    other = with_chat_date(loaded(job, *settings, "chat_date=2026-12-24"), today="2026-12-01")
    with pytest.raises(InputError, match="another run: chat_date was '2026-11-30' and is '2026-12-24'"):
        begin(other)


@pytest.mark.parametrize(("settings", "checkpoint"), [(["checkpoint.resume=never"], True), ([], False)])
def test_a_run_that_starts_over_has_todays(
    settings: list[str], checkpoint: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    begin(with_chat_date(loaded("train", "run_dir=run"), today="2026-11-30"), checkpoint=checkpoint)
    again = with_chat_date(loaded("train", "run_dir=run", *settings), today="2026-12-01")
    assert again.config.chat_date == "2026-12-01"


def test_a_date_of_the_config_is_the_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("dated.yaml").write_text(f"{TRAIN}chat_date: 2020-02-29\n")  # YAML makes a date of it
    assert with_chat_date(load_job("train", [Path("dated.yaml")])).config.chat_date == "2020-02-29"


def test_all_prompts_of_a_run_have_its_date(tmp_path: Path) -> None:
    model = model_of("llama-3.1", tmp_path, context=4096)
    data = rows(tmp_path / "p.jsonl", {"prompt": "2 + 2?"})
    job = SampleJob.model_validate({"policy": {"model": model}, "data": data, "chat_date": "2020-02-29"})
    [prompt] = read_sampling(job).prompts
    assert "Today Date: 29 Feb 2020" in load_tokenizer(model).decode(prompt.tokens)
    judge = JudgeFeedback.model_validate({"judge": {"model": model}})
    text = read_feedback(judge, date=job.chat_date).judges["judge"].chat.text([Message("user", "a")], "here")
    assert "Today Date: 29 Feb 2020" in text
