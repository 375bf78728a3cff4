"""Models whose RoPE factors depend on the longest sample of a batch: every sample counts as it does alone."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers

from rlaif_ray.attention import PACKED, longest_exact, switch_length
from rlaif_ray.config.jobs import SftJob
from rlaif_ray.config.sections import PolicyConfig, RewardModelFeedback
from rlaif_ray.data.batching import plan_ranks
from rlaif_ray.errors import InputError
from rlaif_ray.feedback.reward_model import RewardModelScorer
from rlaif_ray.learner.finetune import SftExample
from rlaif_ray.learner.modules import CausalPolicy
from rlaif_ray.learner.packing import build_input
from rlaif_ray.learner.probe import logprobs_of
from rlaif_ray.learner.supervised import PairExample
from rlaif_ray.pipelines.contexts import policy_room
from rlaif_ray.pipelines.pair_examples import _check_switch
from rlaif_ray.runtime import groups
from tests.learner_ranks import plain_logprobs, random_samples
from tests.tiny import make_tokenizer
from tests.zoo import WIDTH, zoo_config

SWITCH = 24
FACTORS = {"short_factor": [1.0] * 8, "long_factor": [4.0 + i for i in range(8)]}
LONG = {"rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": SWITCH} | FACTORS
SPECIAL: dict[str, Any] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
# Prompts of 6 tokens; samples of 8, 24 and 25 tokens, on both sides of the switch, and of 40.
PROMPTS, COMPLETIONS = random_samples([6, 6], [[2, 18], [20, 34]], seed=3)


pytestmark = pytest.mark.usefixtures("one_thread")


def longrope_config() -> Any:
    fields = WIDTH | {"original_max_position_embeddings": SWITCH, "rope_parameters": LONG} | SPECIAL
    return transformers.Phi3Config(**fields)


def longrope_model(attention: str, auto_class: str = "AutoModelForCausalLM", **fields: Any) -> Any:
    config = longrope_config()
    for name, value in fields.items():
        setattr(config, name, value)
    torch.manual_seed(0)
    build = getattr(transformers, auto_class).from_config
    model = build(config, dtype=torch.float32, attn_implementation=attention).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.15)
    return model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("longrope")
    longrope_config().save_pretrained(target)
    make_tokenizer(target)
    return target


def test_where_factors_change() -> None:
    assert switch_length(longrope_config()) == SWITCH
    two_kinds = transformers.Gemma3TextConfig(
        **WIDTH, rope_parameters={"full_attention": LONG, "sliding_attention": {"rope_theta": 1e4}}
    )
    assert switch_length(two_kinds) == SWITCH
    older = SimpleNamespace(rope_scaling={"type": "su"} | FACTORS, original_max_position_embeddings=4096)
    older.get_text_config = lambda: older
    assert switch_length(older) == 4096  # code that comes with a model
    for name in ("llama", "gpt2", "deepseek_v3", "mamba"):
        assert switch_length(zoo_config(name)) is None and longest_exact(zoo_config(name)) is None


@pytest.mark.parametrize("attention", [PACKED, "sdpa"])
@torch.no_grad()
def test_a_long_sample_changes_no_short_one(attention: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `sft`, `dpo` and `reward-model` plan their micro-batches."""
    examples = [SftExample(p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    plans: list[Any] = []
    actor = SimpleNamespace(losses=SimpleNamespace(remote=lambda shared, plan: plans.append(plan)))
    monkeypatch.setattr(groups.ray, "put", lambda value: value)
    monkeypatch.setattr(groups.Ranks, "gather", lambda self, verb, refs: refs)
    learner = {"tokens_per_micro_batch": 1000, "ranks": 1}
    job = SftJob.model_validate({"policy": {"model": str(folder)}, "data": {"path": "x"}, "learner": learner})
    group = groups.SftGroup([], job)
    group.actors = [actor]
    group._planned("losses", examples)
    assert [sorted(micro) for micro in plans[0]] == [[2, 3], [0, 1]]

    policy, alone = CausalPolicy(longrope_model(attention)), longrope_model("eager")
    for micro in plans[0]:
        own = [PROMPTS[i] for i in micro], [COMPLETIONS[i] for i in micro]
        found = logprobs_of(policy)(build_input(*own, packed=attention == PACKED, device="cpu"))
        torch.testing.assert_close(found, torch.cat(plain_logprobs(alone, *own)), rtol=0, atol=1e-4)
    together = logprobs_of(policy)(build_input(PROMPTS, COMPLETIONS, packed=attention == PACKED, device="cpu"))
    off = (together - torch.cat(plain_logprobs(alone, PROMPTS, COMPLETIONS))).abs().max()
    assert off > 0.05  # what would be learned from otherwise


def test_samples_of_both_kinds_on_every_rank() -> None:
    lengths, apart = [30, 4, 9, 25, 3, 24], [True, False, False, True, False, False]
    plans = plan_ranks(range(6), lengths, ranks=2, budget=60, apart=apart)
    assert sorted(i for plan in plans for micro in plan for i in micro) == list(range(6))
    assert len({len(plan) for plan in plans}) == 1
    assert all(len({apart[i] for i in micro}) <= 1 for plan in plans for micro in plan)
    assert plan_ranks(range(6), lengths, ranks=2, budget=60) == plan_ranks(
        range(6), lengths, ranks=2, budget=60, apart=[False] * 6
    )


def test_a_pair_on_both_sides_is_refused(folder: Path) -> None:
    policy = PolicyConfig(model=str(folder))
    short, long = (5,) * 8, (5,) * 30
    alike = [PairExample((3,) * 6, short, short, 0.5), PairExample((3,) * 6, long, long, 0.5)]
    _check_switch(policy, [alike], "dpo.max_tokens")
    with pytest.raises(InputError, match=r"1 of 3 pairs .* 24 tokens.*dpo\.max_tokens=24"):
        _check_switch(policy, [alike, [PairExample((3,) * 6, short, long, 0.5)]], "dpo.max_tokens")


def test_rl_stays_where_engine_and_learner_agree(folder: Path) -> None:
    policy = PolicyConfig(model=str(folder))
    with pytest.raises(InputError, match=r"rollout\.max_context must not exceed 24 .*got 25"):
        policy_room(policy, 25, 8, None, trained=True)
    assert policy_room(policy, None, 8, None, trained=True)[1] == SWITCH
    assert policy_room(policy, 20, 8, None, trained=True)[1] == 20
    assert policy_room(policy, None, 8, None)[1] == 256  # sampling alone may use all of it
    with pytest.raises(InputError, match=r"sampling\.max_new_tokens .* 24 tokens"):
        policy_room(policy, None, 24, None, trained=True)


@torch.no_grad()
def test_a_reward_model_that_scores(tmp_path: Path) -> None:
    model = longrope_model("eager", "AutoModelForSequenceClassification", num_labels=1)
    model.save_pretrained(tmp_path)
    make_tokenizer(tmp_path)
    cfg = RewardModelFeedback.model_validate({"type": "reward_model", "model": str(tmp_path)})
    scorer = RewardModelScorer(cfg, device="cpu", precision="fp32")
    sequences = [(*p, *c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    alone = [float(model(input_ids=torch.tensor([s]), use_cache=False).logits[0, 0]) for s in sequences]
    assert scorer._rewards(sequences) == pytest.approx(alone, abs=1e-4)


def test_dynamic_rope_is_refused_beyond_its_length() -> None:
    """Its frequencies come from the longest sample of this batch, and of batches before."""
    dynamic = {"rope_type": "dynamic", "factor": 4.0, "rope_theta": 10000.0}
    config = transformers.LlamaConfig(**WIDTH | {"max_position_embeddings": SWITCH}, rope_parameters=dynamic)
    assert longest_exact(config) == SWITCH and switch_length(config) is None
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=PACKED)
    policy = CausalPolicy(model)
    policy(build_input([(5,) * 10] * 3, [(6,) * 14] * 3, packed=True, device="cpu"))  # more than 24 in the row
    with pytest.raises(InputError, match=r"at most 24 tokens.*dynamic RoPE"):
        policy(build_input([(5,) * 10], [(6,) * 16], packed=True, device="cpu"))
