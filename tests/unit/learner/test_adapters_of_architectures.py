"""Adapters and reward heads on tiny models of many architectures: what is trained, saved and loaded by transformers
computes what the learner computed, or the model is refused before it learns.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from rlaif_ray.config.data_sections import LoraConfig
from rlaif_ray.errors import InputError
from rlaif_ray.learner.engine import save_model_folder
from rlaif_ray.learner.lora import AdapterPlan, add_adapters, merged_entries, merged_state, plan_adapters, try_merge
from rlaif_ray.learner.model_state import model_entries
from rlaif_ray.learner.modes import training_mode
from rlaif_ray.learner.supervised import RewardModule, init_head, reward_input
from rlaif_ray.models import empty_model, load_causal_lm, load_sequence_classifier
from tests.tiny import make_tokenizer

VOCABULARY = 40
TEXT = torch.tensor([[5, 9, 33, 7, 12, 20, 31, 4, 11, 6]])
BASE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {"vocab_size": VOCABULARY, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 2}
HEAD = {"head_dim": 16}
MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
DEEPSEEK = {
    "num_key_value_heads": 2,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 16,
    "qk_rope_head_dim": 8,
    "v_head_dim": 16,
    "n_routed_experts": 4,
    "n_shared_experts": 1,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
    "n_group": 2,
    "topk_group": 1,
}
ZAMBA = {
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "n_mamba_heads": 4,
    "mamba_d_state": 8,
    "mamba_headdim": 16,
    "mamba_ngroups": 1,
    "layers_block_type": ["mamba", "hybrid", "hybrid"],
    "num_mem_blocks": 1,
    "adapter_rank": 4,
}
LLAMA4 = {
    "intermediate_size_mlp": 48,
    "num_local_experts": 4,
    "num_experts_per_tok": 1,
    "attention_chunk_size": 64,
    "no_rope_layers": [1, 0],
    "interleave_moe_layer_step": 2,
}
JAMBA = {
    "num_experts": 2,
    "num_experts_per_tok": 1,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
    "expert_layer_period": 2,
    "expert_layer_offset": 1,
    "use_mamba_kernels": False,
    "mamba_d_state": 8,
    "mamba_dt_rank": 4,
}


@dataclass(frozen=True)
class Case:
    config: str
    values: dict[str, Any]
    adapted: set[str]  # last names
    experts: int = 0  # fused weights
    left_out: tuple[str, ...] = ()  # kinds


ATTENTION = {"q_proj", "k_proj", "v_proj", "o_proj"}
LLAMA = ATTENTION | {"gate_proj", "up_proj", "down_proj"}
FUSED = {"gate_up_proj", "down_proj"}
NEOX = {"query_key_value", "dense", "dense_h_to_4h", "dense_4h_to_h"}
CASES = {
    "llama": Case("LlamaConfig", BASE | {"tie_word_embeddings": False}, LLAMA),
    "gpt2": Case("GPT2Config", GPT2, {"c_attn", "c_proj", "c_fc"}),  # Conv1D: weights transposed
    "gpt_neox": Case("GPTNeoXConfig", BASE, NEOX),
    "falcon": Case("FalconConfig", BASE | {"alibi": False}, NEOX),  # a linear layer of its own
    "bloom": Case("BloomConfig", BASE | {"n_layer": 2, "n_head": 2}, NEOX),
    "phi3": Case("Phi3Config", BASE, {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}),
    "qwen3_moe": Case("Qwen3MoeConfig", BASE | HEAD | MOE, ATTENTION | FUSED, 4, ("mlp.gate",)),
    "olmoe": Case("OlmoeConfig", BASE | {"num_experts": 4, "num_experts_per_tok": 2}, ATTENTION | FUSED, 4),
    "deepseek_v3": Case(
        "DeepseekV3Config",
        BASE | DEEPSEEK,
        {"q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj", "gate_proj", "up_proj"} | FUSED,
        2,
        ("mlp.gate",),
    ),
    "llama4": Case("Llama4TextConfig", BASE | HEAD | LLAMA4, LLAMA | FUSED, 2, ("feed_forward.router",)),
    "phimoe": Case("PhimoeConfig", BASE | {"num_local_experts": 4}, ATTENTION | FUSED, 4, ("mlp.router",)),
    "mamba": Case("MambaConfig", BASE | {"state_size": 8}, {"in_proj"}, 0, ("mixer.dt_proj", "mixer.out_proj")),
    "jamba": Case(
        "JambaConfig",
        BASE | JAMBA,
        LLAMA | FUSED | {"in_proj", "x_proj", "out_proj", "router"},
        2,
        ("mamba.dt_proj",),
    ),
    "zamba2": Case(  # two layers share a block
        "Zamba2Config",
        BASE | ZAMBA,
        ATTENTION | {"in_proj", "linear", "gate_up_proj", "down_proj", "gate_up_proj_adapter_list"},
        0,
        ("mamba.out_proj",),
    ),
    "granite": Case("GraniteConfig", BASE | {"logits_scaling": 2.0}, LLAMA),
    "glm4_moe": Case("Glm4MoeConfig", BASE | HEAD | DEEPSEEK | {"n_group": 1}, LLAMA | {"gate_up_proj"}, 2),
}


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {}


def folder_of(name: str, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random model, saved; weights are large enough that a wrong one shows."""
    import transformers

    if name not in folders:
        case = CASES[name]
        config = getattr(transformers, case.config)(**case.values)
        torch.manual_seed(0)
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.15)
            for path, buffer in model.named_buffers():
                if path.endswith("correction_bias"):
                    buffer.normal_(0, 0.3)
        folders[name] = tmp_path_factory.mktemp(name)
        model.save_pretrained(folders[name])
    return folders[name]


def logits(model: Any) -> torch.Tensor:
    found: torch.Tensor = model(input_ids=TEXT, use_cache=False).logits[0]
    return found


def learn(model: Any, loss: Any, steps: int = 2) -> None:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(steps):
        with training_mode(model):
            loss().backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def merged_weights(model: Any) -> dict[str, torch.Tensor]:
    return {entry.name: entry.value() for entry in merged_entries(model)}


def last_names(plan: AdapterPlan) -> set[str]:
    return {next(n for n in reversed(p.split(".")) if not n.isdigit()) for p in (*plan.layers, *plan.experts)}


@pytest.mark.parametrize("name", CASES)
def test_what_is_trained_is_what_is_saved(
    name: str, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    case, folder = CASES[name], folder_of(name, folders, tmp_path_factory)
    cfg = LoraConfig(rank=2)
    planned = plan_adapters(
        empty_model(folder, classifier=False), cfg, name, sharded=False
    )  # what is told before the start
    assert last_names(planned) == case.adapted
    assert len(planned.experts) == case.experts
    assert set(case.left_out) <= set(planned.left_out)
    assert all(word in str(planned) for word in case.left_out)

    model: Any = load_causal_lm(folder, dtype=torch.float32, attention="eager").eval()
    before = {entry.name: entry.value().clone() for entry in model_entries(model)}
    plan = add_adapters(model, cfg, 0, name)
    assert (plan.layers, plan.experts) == (planned.layers, planned.experts)
    trainable = {key: p for key, p in model.named_parameters() if p.requires_grad}
    assert all(".lora_" in key for key in trainable)
    assert plan.trained == planned.trained == sum(p.numel() for p in trainable.values())
    try_merge(model, lambda: logits(model), name, seed=0)
    put_back = merged_weights(model)
    assert put_back.keys() == before.keys() and all(torch.equal(put_back[key], before[key]) for key in before)

    learn(model, lambda: torch.nn.functional.cross_entropy(logits(model)[:-1], TEXT[0, 1:]))
    with torch.no_grad():
        trained = logits(model).log_softmax(-1)
    adapted = {f"{path}.weight" for path in plan.layers} | set(plan.experts)
    changed = {key for key, weight in merged_weights(model).items() if not torch.equal(weight, before[key])}
    assert changed and changed <= adapted
    save_model_folder(model, lambda: make_tokenizer(None), merged_state(model, keep=True), tmp_path)
    saved, report = AutoModelForCausalLM.from_pretrained(
        tmp_path, dtype=torch.float32, attn_implementation="eager", output_loading_info=True
    )
    assert not report["missing_keys"] and not report["unexpected_keys"]
    with torch.no_grad():
        torch.testing.assert_close(logits(saved.eval()).log_softmax(-1), trained, atol=1e-5, rtol=1e-5)
        start = load_causal_lm(folder, dtype=torch.float32, attention="eager").eval()
        assert (logits(start).log_softmax(-1) - trained).abs().max() > 1e-2  # it has learned something


@pytest.mark.parametrize("name", ["llama", "gpt2", "granite", "olmoe", "llama4", "mamba", "glm4_moe"])
def test_a_reward_model_of_any_decoder(
    name: str, folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """With a head of transformers', or of ours where it has none; both load again as they were."""
    folder = folder_of(name, folders, tmp_path_factory)
    model, new = load_sequence_classifier(folder, dtype=torch.float32, attention="eager")
    model.eval()
    assert new
    language_model = load_causal_lm(folder, dtype=torch.float32, attention="eager").state_dict()
    for key, tensor in model.state_dict().items():
        assert key == "score.weight" or torch.equal(tensor, language_model[key])
    init_head(model, 0)
    plan = add_adapters(model, LoraConfig(rank=2), 0, name)
    assert (
        plan.trained
        == plan_adapters(empty_model(folder, classifier=True), LoraConfig(rank=2), name, sharded=False).trained
    )
    assert {key for key, p in model.named_parameters() if p.requires_grad and ".lora_" not in key} == {"score.weight"}
    module = RewardModule(model)
    prompts, responses = [(5, 9, 33), (7, 12)], [(20, 31), (4, 11, 6)]
    batch = reward_input(prompts, responses, packed=False, device="cpu")
    try_merge(model, lambda: module(batch), name, seed=0)
    learn(model, lambda: module(batch) @ torch.tensor([1.0, -1.0]))
    rewards = module(batch).detach()
    save_model_folder(model, lambda: make_tokenizer(None), merged_state(model, keep=True), tmp_path)
    saved, new = load_sequence_classifier(tmp_path, dtype=torch.float32, attention="eager")
    assert not new
    for i in (0, 1):
        alone = reward_input(prompts[i : i + 1], responses[i : i + 1], packed=False, device="cpu")
        torch.testing.assert_close(RewardModule(saved.eval())(alone)[0].detach(), rewards[i], atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("config", "values", "reason"),
    [
        ("T5Config", {"d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}, "an encoder-decoder"),
        ("BertConfig", {k: v for k, v in BASE.items() if k != "num_key_value_heads"}, "an encoder"),
        ("Qwen2VLConfig", {}, "images"),
    ],
)
def test_who_can_have_no_reward_head_is_told_why(
    config: str, values: dict[str, Any], reason: str, tmp_path: Path
) -> None:
    import transformers

    getattr(transformers, config)(**values).save_pretrained(tmp_path)
    with pytest.raises(InputError, match=f"can't become a reward model.*{reason}") as raised:
        empty_model(tmp_path, classifier=True)
    assert "whole model" not in str(raised.value)


# ---- Targets ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def outlines(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Models without weights."""
    return {
        name: empty_model(folder_of(name, folders, tmp_path_factory), classifier=False)
        for name in ("deepseek_v3", "olmoe")
    }


def planned(model: Any, *, sharded: bool = False, **lora: Any) -> AdapterPlan:
    return plan_adapters(model, LoraConfig(rank=2, **lora), "m", sharded=sharded)


def test_targets_are_ends_of_paths(outlines: dict[str, Any]) -> None:
    def found(*targets: str) -> list[str]:
        plan = planned(outlines["deepseek_v3"], targets=targets)
        return [*plan.layers, *plan.experts]

    assert found("q_a_proj") == [f"model.layers.{i}.self_attn.q_a_proj" for i in (0, 1)]
    assert found("1.self_attn.q_a_proj", "experts.down_proj") == [
        "model.layers.1.self_attn.q_a_proj",
        "model.layers.1.mlp.experts.down_proj",
    ]
    assert found("mlp.experts") == [f"model.layers.1.mlp.experts.{k}" for k in ("gate_up_proj", "down_proj")]
    for wrong, words in (
        ("self_attn.q_b_prj", r"got self_attn.q_b_prj.*nearest: .*self_attn.q_b_proj"),
        ("_proj", r"got _proj"),  # whole names only
        ("mlp", r"got mlp\)"),  # and whole paths: not all that is in a block
        ("lm_head", r"got lm_head"),
        ("mlp.gate", r"got mlp.gate.*DeepseekV3TopkRouter is no linear layer"),
    ):
        with pytest.raises(InputError, match=r"lora.targets must name .*" + words):
            found(wrong)


def test_experts_take_no_dropout_and_no_shards(outlines: dict[str, Any]) -> None:
    plan = planned(outlines["olmoe"], dropout=0.1)
    assert not plan.experts and last_names(plan) == ATTENTION
    assert "experts.gate_up_proj (fused experts take adapters with lora.dropout=0 only)" in str(plan)
    with pytest.raises(InputError, match="got experts of model m: fused experts take"):
        planned(outlines["olmoe"], dropout=0.1, targets=("experts",))
    plan = planned(outlines["olmoe"], sharded=True)
    assert not plan.experts and "experts.down_proj (fused experts take adapters with learner.zero_stage=2" in str(plan)


class Gated(torch.nn.Linear):
    """A layer that isn't linear."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x).tanh()


def test_a_merge_that_would_be_wrong_is_refused_before_training(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = folder_of("llama", folders, tmp_path_factory)

    def gated(classes: str) -> Any:
        model: Any = load_causal_lm(folder, dtype=torch.float32, attention="eager").eval()
        for layer in model.model.layers:
            layer.mlp.up_proj.__class__ = Gated
            Gated.__name__ = classes
        return model

    plan = plan_adapters(gated("Gated"), LoraConfig(rank=2), "m", sharded=False)  # by its class
    assert last_names(plan) == LLAMA - {"up_proj"} and "Gated computes more than a linear layer" in str(plan)
    model = gated("FalconLinear")  # a class that is taken for one of another name: the trial sees it
    add_adapters(model, LoraConfig(rank=2), 0, "m")
    with pytest.raises(InputError, match=r"model m can't be trained with adapters.*on up_proj\)") as raised:
        try_merge(model, lambda: logits(model), "m", seed=0)
    assert "lora.targets" in str(raised.value)


def test_no_layer_for_adapters_is_an_error(folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> None:
    model: Any = load_causal_lm(folder_of("llama", folders, tmp_path_factory), dtype=torch.float32, attention="eager")
    Gated.__name__ = "Gated"
    for module in model.model.modules():
        if isinstance(module, torch.nn.Linear):
            module.__class__ = Gated
    with pytest.raises(InputError, match=r"model m can't be trained with adapters.*Leave lora out"):
        plan_adapters(model, LoraConfig(), "m", sharded=False)


# ---- Modes -----------------------------------------------------------------------------------------------------------


def test_only_adapters_and_checkpointing_are_in_training_mode(
    folders: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    """PhiMoE samples experts in training mode, and its routing reads the jitter in evaluation mode too."""
    model: Any = load_causal_lm(folder_of("phimoe", folders, tmp_path_factory), dtype=torch.float32, attention="eager")
    assert model.config.router_jitter_noise == 0.01  # part of what the model computes
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    add_adapters(model, LoraConfig(rank=2, dropout=0.5), 0, "m")
    model.eval()  # peft's new layers too
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if ".lora_B." in key:
                parameter.normal_(0, 0.2)
    with torch.no_grad():
        assert torch.equal(logits(model), logits(model))
    with training_mode(model):
        assert model.model.layers[0].training and not model.model.layers[0].mlp.router.training
        assert not torch.equal(logits(model), logits(model))  # the adapters' dropout
        logits(model).sum().backward()
    assert not any(module.training for module in model.modules())
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())
