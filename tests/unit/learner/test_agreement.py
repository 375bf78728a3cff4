"""A real learner's readings of the guard's text: together as alone, as saved; and a wrong attention shows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlaif_ray.attention import PACKED
from rlaif_ray.config.jobs import DpoJob, RewardModelJob, SftJob, TrainJob
from rlaif_ray.learner.agreement import Readings, before_last_tokens
from rlaif_ray.learner.engine import RankSpec
from rlaif_ray.models import load_tokenizer
from rlaif_ray.pipelines.agreement import bound_for, compare
from rlaif_ray.pipelines.guard import guard_text
from tests.jobs import embedded
from tests.learner_ranks import RankProcesses, plain_logprobs
from tests.tiny import cached_tiny_model

pytestmark = pytest.mark.slow

MODEL = cached_tiny_model(tied=True)
TEXT = guard_text(load_tokenizer(MODEL), 512)
BOUND = bound_for("fp32", None)
JOBS: dict[str, type[Any]] = {"train": TrainJob, "sft": SftJob, "dpo": DpoJob, "reward-model": RewardModelJob}


def job_of(kind: str, *, attention: str = "auto", stage: int = 0, ranks: int = 1, dropout: float = 0.0) -> Any:
    values: dict[str, Any] = {
        "policy": {"model": str(MODEL), "attention": attention},
        "learner": {"zero_stage": stage, "ranks": ranks},
    }
    if stage == 3:  # without it DeepSpeed keeps all of so small a model whole
        values["learner"]["deepspeed_overrides"] = {"zero_optimization": {"stage3_param_persistence_threshold": 0}}
    if kind != "train":
        values["data"] = {"path": "x"}
    if dropout:
        values[kind] = {"lora": {"rank": 4, "dropout": dropout}}
    return embedded(JOBS[kind], values)


def rank_of(kind: str, spec: RankSpec, job: Any) -> Any:
    from rlaif_ray.learner.dpo import DpoRank
    from rlaif_ray.learner.finetune import SftRank
    from rlaif_ray.learner.ppo import RlRank
    from rlaif_ray.learner.supervised import RewardRank

    if kind == "train":
        return RlRank(job, spec, "fp32")
    ranks: dict[str, Any] = {"sft": SftRank, "dpo": DpoRank, "reward-model": RewardRank}
    return ranks[kind](job, spec, "fp32", total_steps=1)


def leaking_attention(module: Any, query: Any, key: Any, value: Any, mask: Any, **kwargs: Any) -> Any:
    """What packing must not be: every token sees all of the row before it, other samples too."""
    groups = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = kwargs.get("scaling")
    out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale)
    return out.transpose(1, 2).contiguous(), None


def read(spec: RankSpec, kind: str, job: Any, folder: str | None = None, wrong: str = "") -> Any:
    from transformers import AttentionInterface

    from rlaif_ray.learner.packing import packed_attention

    rank = rank_of(kind, spec, job)
    if wrong == "attention":
        AttentionInterface.register(PACKED, leaking_attention)
    try:
        before = rank.readings(TEXT)
        again = rank.readings(TEXT)
    finally:
        AttentionInterface.register(PACKED, packed_attention)
    saved = None
    if folder is not None:
        (rank.save_policy if kind == "train" else lambda f: rank.save_model(f, None))(folder)
        if wrong == "weights" and spec.rank == 0:
            file = Path(folder) / "model.safetensors"
            weights = load_file(file)
            name = next(name for name in weights if name.endswith("layers.1.mlp.down_proj.weight"))
            weights[name] = weights[name] + 0.01
            save_file(weights, file, metadata={"format": "pt"})
        saved = rank.readings_of_saved(folder, TEXT)
    return {"readings": before, "again": again, "saved": saved, "attention": rank._model.config._attn_implementation}


def gap(found: Readings) -> float:
    return compare({"together": found.together, "alone": found.alone}, BOUND).worst


@pytest.mark.parametrize(
    ("kind", "attention"),
    [*((kind, "auto") for kind in JOBS), ("train", "sdpa"), ("train", "eager"), ("reward-model", "sdpa")],
)
def test_texts_together_are_texts_alone_and_as_saved(
    one_rank: RankProcesses, kind: str, attention: str, tmp_path: Path
) -> None:
    [found] = one_rank.run(read, kind, job_of(kind, attention=attention), str(tmp_path / "saved"))
    readings = found["readings"]
    assert readings.packed == (attention == "auto")
    assert 0 < gap(readings) < 1e-4  # two ways of computing: close, and not a copy of one another
    assert found["again"] == readings  # reading leaves no trace
    assert found["attention"] == {"auto": PACKED}.get(attention, attention)
    alone = readings.alone if kind != "reward-model" else before_last_tokens(readings.alone, TEXT)
    assert compare({"saved": found["saved"], "alone": alone}, BOUND).worst < 1e-5
    if kind != "reward-model":
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
        with torch.no_grad():
            plain = torch.cat(plain_logprobs(model, TEXT.prompts, TEXT.completions))
        assert readings.alone == pytest.approx(plain.tolist(), abs=1e-4)


@pytest.mark.parametrize("kind", ["train", "sft", "reward-model"])
def test_an_attention_that_leaks_shows(one_rank: RankProcesses, kind: str) -> None:
    [found] = one_rank.run(read, kind, job_of(kind), None, "attention")
    comparison = compare({"together": found["readings"].together, "alone": found["readings"].alone}, BOUND)
    assert comparison.odd == "together" and comparison.worst > 0.1


@pytest.mark.parametrize("kind", ["train", "reward-model"])
def test_a_folder_with_other_weights_shows(one_rank: RankProcesses, kind: str, tmp_path: Path) -> None:
    [found] = one_rank.run(read, kind, job_of(kind), str(tmp_path / "saved"), "weights")
    alone = found["readings"].alone
    alone = alone if kind == "train" else before_last_tokens(alone, TEXT)
    assert not compare({"saved": found["saved"], "alone": alone}, BOUND).agrees


@pytest.mark.parametrize("kind", ["train", "sft", "reward-model"])
def test_shards_are_read_whole_by_all_ranks_together(
    one_rank: RankProcesses, two_ranks: RankProcesses, kind: str, tmp_path: Path
) -> None:
    [base] = one_rank.run(read, kind, job_of(kind))
    parts = two_ranks.run(read, kind, job_of(kind, stage=3, ranks=2), str(tmp_path / "saved"))
    assert parts[0]["readings"].alone == pytest.approx(base["readings"].alone, abs=1e-5)
    assert gap(parts[0]["readings"]) < 1e-4
    alone = base["readings"].alone
    alone = alone if kind != "reward-model" else before_last_tokens(alone, TEXT)
    assert parts[0]["saved"] == pytest.approx(alone, abs=1e-5)
    assert parts[1]["saved"] is None


@pytest.mark.parametrize("kind", ["train", "sft"])
def test_a_saved_folder_is_read_on_all_cores(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ray gives a rank on a GPU one thread. Two ranks share six cores."""
    from rlaif_ray.learner import finetune, ppo

    used = []

    def load(*args: Any, **kwargs: Any) -> Any:
        used.append(torch.get_num_threads())
        raise EOFError

    monkeypatch.setattr("os.sched_getaffinity", lambda process: set(range(6)))
    for module in (ppo, finetune):
        monkeypatch.setattr(module, "load_causal_lm", load)
    rank: Any = object.__new__(ppo.RlRank if kind == "train" else finetune.SftRank)
    rank._job, rank._precision, rank._code = job_of(kind), "fp32", {}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        for device in ("cuda", "cpu"):
            rank._spec = RankSpec(0, 2, 0, "", 0, device, threads=1)
            with pytest.raises(EOFError):
                rank.readings_of_saved("x", TEXT)
            assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)
    assert used == [3, 1]


def test_adapters_are_read_without_dropout(one_rank: RankProcesses) -> None:
    [found] = one_rank.run(read, "sft", job_of("sft", dropout=0.5))
    assert found["again"] == found["readings"]
    assert gap(found["readings"]) < 1e-4
