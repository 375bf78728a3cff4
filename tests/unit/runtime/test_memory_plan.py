"""What actors hold on their GPUs, by hand: ZeRO's formulas on a billion parameters, KV cache, roles."""

from __future__ import annotations

from typing import Any

import pytest

from rlaif_ray.config.jobs import DpoJob, RewardModelJob, SftJob, TrainJob
from rlaif_ray.config.sections import EngineConfig, LearnerConfig, OffloadConfig
from rlaif_ray.model_shapes import ModelShape, known_shape, known_shapes, shape_of_config
from rlaif_ray.runtime.engine_size import CUDA_BYTES, GIB, GRAPH_BYTES, sequence_bytes
from rlaif_ray.runtime.memory_plan import (
    Machine,
    Trained,
    activations,
    engine_memory,
    learner_host_memory,
    learner_memory,
    logits,
    trained_models,
    zero_of,
)
from tests.jobs import embedded

BILLION = 10**9
MACHINE = Machine(80 * GIB, 8, judge_context=4096, prompt_tokens=2048)
LLAMA_8B = known_shapes()["meta-llama/Llama-3.1-8B"]
TINY = ModelShape("llama", 2, 8, 16, 2, 1, 4, 32, 64)  # untied


# ZeRO (Rajbhandari et al. 1910.02054), section 3 and figure 1, per parameter on N = 4 ranks: 2 + 4 + 12 bytes without
# it, gradients in fp32; optimizer states, then gradients, then weights are a quarter each. Stage 0 runs as stage 1.
@pytest.mark.parametrize(
    ("stage", "weights", "gradients", "optimizer"),
    [(0, 2.0, 4.0, 3.0), (1, 2.0, 4.0, 3.0), (2, 2.0, 1.0, 3.0), (3, 0.5, 1.0, 3.0)],
)
def test_zero_on_four_ranks_in_bf16(stage: Any, weights: float, gradients: float, optimizer: float) -> None:
    zero, model = zero_of(LearnerConfig(ranks=4, zero_stage=stage), "bf16"), Trained(BILLION, 0)
    held = (zero.weights(model), zero.gradients(model), zero.optimizer(model))
    assert held == (weights * BILLION, gradients * BILLION, optimizer * BILLION)


def test_in_fp32_masters_are_copies_from_stage_1_on() -> None:
    model = Trained(BILLION, 0)
    held = [zero_of(LearnerConfig(zero_stage=stage), "fp32").optimizer(model) for stage in (0, 1, 2, 3)]
    assert held == [8 * BILLION, 12 * BILLION, 12 * BILLION, 12 * BILLION]


def test_overrides_of_deepspeed_count() -> None:
    overrides = {"zero_optimization": {"stage": 2, "offload_optimizer": {"device": "cpu"}}}
    zero = zero_of(LearnerConfig(deepspeed_overrides=overrides), "bf16")
    assert zero.stage == 2 and zero.optimizer(Trained(BILLION, 0)) == 0
    bf16 = zero_of(LearnerConfig(deepspeed_overrides={"data_types": {"grad_accum_dtype": "bf16"}}), "bf16")
    assert bf16.gradients(Trained(BILLION, 0)) == 2 * BILLION


def test_a_sum_of_gradients_in_fp32_is_no_copy_until_stage_3() -> None:
    """DeepSpeed flattens stage 3's once more for the step, at most 10^9 at a time. Buckets of 5 x 10^7 elements each:
    gathered in bf16; reduced in place, in bf16 and a copy in fp32, in fp32."""
    for stage, extra, reduced in ((1, 0, 0), (2, 0, 6), (3, 4 * BILLION, 4)):
        zero = zero_of(LearnerConfig(zero_stage=stage), "bf16")  # type: ignore[arg-type]
        assert zero.step(Trained(3 * BILLION, 0)) == extra
        assert zero.bucket_bytes == 50_000_000 * (2 + reduced)


IN_BF16 = {"data_types": {"grad_accum_dtype": "bf16"}}  # the sums of micro-batches


# ZeRO-Offload (Ren et al. 2101.06840), section 4: Adam's 12 bytes, the step's gradients (4 in fp32) and, from
# stage 2 on, the sums of micro-batches (2) leave the GPU; in stages 1 and 2 a copy of the new weights (2) comes too.
@pytest.mark.parametrize(
    ("stage", "parameters", "weights", "gradients", "on_host"),
    [(1, "none", 2.0, 2.0, 4.5), (2, "none", 2.0, 0, 5.0), (3, "none", 0.5, 0, 4.5), (3, "cpu", 0, 0, 5.0)],
)
def test_offload_on_four_ranks_in_bf16(
    stage: Any, parameters: Any, weights: float, gradients: float, on_host: float
) -> None:
    offload = OffloadConfig(optimizer="cpu", parameters=parameters)
    learner = LearnerConfig(ranks=4, zero_stage=stage, offload=offload, deepspeed_overrides=IN_BF16)
    zero, model = zero_of(learner, "bf16"), Trained(BILLION, 0)
    assert (zero.weights(model), zero.gradients(model)) == (weights * BILLION, gradients * BILLION)
    assert zero.optimizer(model) == zero.step(model) == 0
    assert sum(zero.on_host(model).values()) == on_host * BILLION
    frozen = Trained(0, BILLION)
    assert zero.on_host(frozen) == ({"parameters": 0.5 * BILLION} if parameters == "cpu" else {})
    assert zero_of(LearnerConfig(ranks=4, zero_stage=stage), "bf16").on_host(model) == {}


def test_sums_in_fp32_stay_on_the_gpu_up_to_stage_2() -> None:
    """DeepSpeed adds them up there, whole in stage 1 and a rank's share of what is reduced beside them, a rank's share
    in stage 2; in stage 3 on the host."""
    fp32 = {"data_types": {"grad_accum_dtype": "fp32"}}
    offload, model = OffloadConfig(optimizer="cpu"), Trained(BILLION, 0)
    learners = [
        LearnerConfig(ranks=4, zero_stage=stage, offload=offload, deepspeed_overrides=fp32)
        for stage in (1, 2, 3)  # type: ignore[arg-type]
    ]
    assert [zero_of(learner, "bf16").gradients(model) for learner in learners] == [5 * BILLION, BILLION, 0]
    assert [sum(zero_of(learner, "bf16").on_host(model).values()) / BILLION for learner in learners] == [4.5, 4.5, 5]
    # Stage 1 reduces them in a bucket of fp32 then, not in place.
    assert zero_of(learners[0], "bf16").bucket_bytes == 50_000_000 * (2 + 4)


def test_hpz_costs_a_copy_of_the_weights_divided_by_its_ranks() -> None:
    """8B in bf16 on 16 ranks: 1 GB each, and 2 GB more each where the 8 ranks of a node hold a second copy."""
    zero = zero_of(LearnerConfig(ranks=16, zero_stage=3, hpz_partition_size=8), "bf16")
    model = Trained(8 * BILLION, 0)
    assert (zero.weights(model), zero.secondary(model)) == (1 * BILLION, 2 * BILLION)
    assert zero_of(LearnerConfig(ranks=16, zero_stage=3), "bf16").secondary(model) == 0
    plain, twice = (
        train(learner={"ranks": 16, "zero_stage": 3, "hpz_partition_size": size}, policy={"precision": "bf16"})
        for size in (1, 8)
    )
    parts = [learner_memory(job, LLAMA_8B, MACHINE, "cuda").parts for job in (plain, twice)]
    more = parts[1].pop("hpZ copy")
    assert parts[0] == parts[1]
    assert more == sum(-(-one.all // 8) * 2 for one in trained_models(twice, LLAMA_8B).values())


def test_logits_are_planned_by_the_chunk() -> None:
    """Llama 3 in bf16, 32,768 tokens: 128,256 x 2 bytes a row, for 32,768 rows or for 4,096."""
    scratch = 2 * 128 * 128_256 * 4
    assert logits(LLAMA_8B, 32_768, 2) == 32_768 * 128_256 * 2 + scratch
    assert logits(LLAMA_8B, 32_768, 2, 4096) == 4096 * 128_256 * 2 + scratch
    assert logits(LLAMA_8B, 1000, 2, 4096) == 1000 * 128_256 * 2 + scratch


def test_the_host_memory_of_an_offloaded_8b() -> None:
    """Policy and critic on 8 ranks in stage 3: 18 bytes a trained parameter, and 2 of each of the three models."""
    learner = {"ranks": 8, "zero_stage": 3, "offload": {"optimizer": "cpu", "parameters": "cpu"}}
    learner["deepspeed_overrides"] = IN_BF16
    job = train(learner=learner, policy={"precision": "bf16"})
    policy, critic = 8_030_261_248, 8_030_261_248 - 128_256 * 4096 + 4097
    found = learner_host_memory(job, LLAMA_8B, "cuda")
    assert found["optimizer"] == sum(-(-count // 8) * 18 for count in (policy, critic))
    assert found["parameters"] == sum(-(-count // 8) * 2 for count in (policy, critic, policy))
    assert learner_host_memory(train(), LLAMA_8B, "cuda") == {}


def train(**sections: Any) -> TrainJob:
    return embedded(TrainJob, {"cluster": {"device": "gpu"}, **sections})


@pytest.mark.parametrize(
    ("algorithm", "roles"),
    [
        ({"type": "ppo"}, {"policy", "critic", "reference"}),
        ({"type": "reinforce"}, {"policy", "critic", "reference"}),
        ({"type": "rloo"}, {"policy", "reference"}),
        ({"type": "grpo", "kl": {"coef": 0}}, {"policy"}),
        ({"type": "ppo", "kl": {"coef": 0, "target": 6}}, {"policy", "critic", "reference"}),
    ],
)
def test_models_of_an_rl_rank(algorithm: dict[str, Any], roles: set[str]) -> None:
    assert set(trained_models(train(algorithm=algorithm), LLAMA_8B)) == roles


def test_a_critic_is_the_body_with_a_head_of_one() -> None:
    """Llama 3.1 8B without its 128256 x 4096 head, and 4096 weights and a bias."""
    found = trained_models(train(), LLAMA_8B)
    assert found["critic"].trainable == 8_030_261_248 - 128_256 * 4096 + 4097
    assert found["reference"] == Trained(0, 8_030_261_248)


def test_parts_of_a_ppo_rank_by_hand() -> None:
    """ZeRO-3 on 8 ranks: 18 bytes a parameter, an eighth of it, of policy and critic; 2 of the reference."""
    job = train(learner={"ranks": 8, "zero_stage": 3, "gradient_checkpointing": True}, rollout={"max_context": 2048})
    parts = learner_memory(job, LLAMA_8B, MACHINE, "cuda").parts
    eighth, critic = 8_030_261_248 // 8, -(-(8_030_261_248 - 128_256 * 4096 + 4097) // 8)
    assert (parts["weights"], parts["gradients"], parts["optimizer"]) == (2 * eighth, 4 * eighth, 12 * eighth)
    assert (parts["critic"], parts["reference"]) == (18 * critic, 2 * eighth)
    assert parts["gathered"] == 2 * BILLION  # stage3_max_live_parameters
    assert parts["logits"] == 4096 * 128_256 * 2 + 128 * 128_256 * 8
    assert parts["CUDA"] == CUDA_BYTES


def test_supervised_ranks_hold_one_model() -> None:
    data = {"data": {"path": "x"}}
    assert trained_models(embedded(SftJob, data), LLAMA_8B) == {"policy": Trained(8_030_261_248, 0)}
    assert trained_models(embedded(DpoJob, data), LLAMA_8B) == {"policy": Trained(8_030_261_248, 0)}
    reward = trained_models(embedded(RewardModelJob, data), LLAMA_8B)
    assert reward == {"policy": Trained(8_030_261_248 - 128_256 * 4096 + 4096, 0)}
    assert learner_memory(embedded(RewardModelJob, data), LLAMA_8B, MACHINE, "cuda").parts["logits"] == 0


def test_activations_by_hand() -> None:
    """Tiny in bf16, per token of a layer: two norms of (4 + 2 + 2) x 8 = 64; q 8, so queries and output 2 x 8 x 2 = 32,
    keys and values of both heads as much again; 4 x 16 x 2 = 128: 320 in all. The last norm is 64 more, gradients of
    one layer (16 + 48) x 2 = 128."""
    assert activations(TINY, 10, 2, checkpointing=False) == 10 * (2 * 320 + 64 + 128)
    assert activations(TINY, 10, 2, checkpointing=True) == 10 * (2 * 8 * 2 + 320 + 64 + 128)
    assert activations(TINY, 10, 2, checkpointing=False, repeats=1.5) == 10 * (2 * 336 + 64 + 128)
    assert logits(TINY, 10, 2) == 10 * 32 * 2 + 128 * 32 * 8


def kept_by_torch(kind: str, tokens: int) -> tuple[Any, int]:
    """A small model's shape, and the bytes that autograd saves in a forward pass of its body in bf16."""
    import torch
    import transformers

    sizes: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 896, "num_hidden_layers": 4, "vocab_size": 1000}
    sizes |= {"num_attention_heads": 8, "num_key_value_heads": 8, "head_dim": 32}
    config = getattr(transformers, f"{kind}Config")(**sizes, attn_implementation="sdpa", use_cache=False)
    model = getattr(transformers, f"{kind.removesuffix('Text')}ForCausalLM")(config).to(torch.bfloat16).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved: dict[int, torch.Tensor] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.untyped_storage().data_ptr() not in own:
            saved[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        result = model.base_model(input_ids=torch.zeros(1, tokens, dtype=torch.int64))
    assert result is not None
    return shape_of_config(config.to_dict(), kind), sum(t.untyped_storage().nbytes() for t in saved.values())


@pytest.mark.parametrize("kind", ["Llama", "Mistral", "Qwen2", "Qwen3", "Gemma3Text"])
def test_activations_are_what_torch_keeps(kind: str) -> None:
    shape, kept = kept_by_torch(kind, 512)
    gradients = 512 * 2 * (2 * shape.hidden + 3 * shape.intermediate)
    planned = activations(shape, 512, 2, checkpointing=False) - gradients
    assert 0.98 < planned / kept < 1.05


def test_keys_of_a_shared_prompt_stand_for_each_sample() -> None:
    """Prompts and answers of 1024, four samples: 1024 + 4 x 2048 keys for 1024 + 4 x 1024 tokens, 1.8 times."""
    learner = {"tokens_per_micro_batch": 8192}
    shared, single = (
        learner_memory(
            train(
                learner=learner,
                rollout={"max_context": 2048},
                sampling={"samples_per_prompt": samples, "max_new_tokens": 1024},
            ),
            LLAMA_8B,
            MACHINE,
            "cuda",
        ).parts["activations"]
        for samples in (4, 1)
    )
    layer = 2 * (int(4096 * 1.8) - int(4096 * 1.5)) * 2  # one sample: 3072 keys for 2048 tokens
    assert shared - single == 8192 * 32 * layer


def test_a_sample_above_the_budget_sets_the_micro_batch() -> None:
    small = {"tokens_per_micro_batch": 64}
    long, short = (
        learner_memory(train(learner=small, rollout={"max_context": context}), LLAMA_8B, MACHINE, "cuda")
        for context in (4096, 128)
    )
    assert long.parts["logits"] - short.parts["logits"] == (4096 - 128) * 128_256 * 2


def test_ranks_that_share_sequences_share_activations_and_logits() -> None:
    """Four ranks, 32768 tokens: 8192 each and one that fills up. Weights are divided over all ranks anyway."""
    learner: dict[str, Any] = {"ranks": 8, "zero_stage": 3, "gradient_checkpointing": True, "logits_chunk": None}
    learner["tokens_per_micro_batch"] = 32768
    rollout = {"max_context": 32768}
    whole = learner_memory(train(learner=learner, rollout=rollout), LLAMA_8B, MACHINE, "cuda").parts
    job = train(learner=learner | {"sequence_parallel": 4}, rollout=rollout)
    split = learner_memory(job, LLAMA_8B, MACHINE, "cuda").parts
    assert split["activations"] * 32768 == whole["activations"] * 8193
    scratch = 128 * 128_256 * 4 * 2
    assert (split["logits"] - scratch) == 8193 * 128_256 * 2 and whole["logits"] - scratch == 32768 * 128_256 * 2
    assert split["exchange"] == 2 * 8193 * (4096 + 2 * 1024) * 2 and "exchange" not in whole
    same = ("weights", "gradients", "optimizer", "critic", "reference", "gathered", "buckets")
    assert [split[part] for part in same] == [whole[part] for part in same]


@pytest.mark.parametrize(("parallel", "heads"), [(1, 8), (4, 2), (8, 1), (16, 1)])
def test_kv_cache_of_llama_by_hand(parallel: int, heads: int) -> None:
    """A token takes 2 x 32 layers x (8 / parallel, at least 1) heads x 128 x 2 bytes."""
    cfg = EngineConfig(tensor_parallel=parallel, gpu_memory_utilization=0.5)
    memory = engine_memory(cfg, LLAMA_8B, 2048, MACHINE, 2, "cuda")
    left = 40 * GIB - memory.parts["weights"] - memory.parts["workspace"] - 32 * GRAPH_BYTES
    assert memory.parts["weights"] == 8_030_261_248 * 2 // parallel
    assert memory.holds["kv_tokens"] == left // (2 * 32 * heads * 128 * 2)
    assert memory.holds["sequences"] == memory.holds["kv_tokens"] // 2048
    assert memory.total == memory.limit == memory.reserved == 40 * GIB


def test_an_engine_must_hold_one_sequence() -> None:
    """8B weights in fp32 are 30 GiB: 38.4 GB leave room, but not for 131072 tokens (32 GiB)."""
    cfg = EngineConfig(gpu_memory_utilization=0.48)
    assert engine_memory(cfg, LLAMA_8B, 2048, MACHINE, 4, "cuda").total == int(80 * GIB * 0.48)
    long = engine_memory(cfg, LLAMA_8B, 131_072, MACHINE, 4, "cuda")
    assert long.total > long.limit and long.parts["KV cache"] == 131_072 * 2 * 32 * 8 * 128 * 4


def test_an_engine_that_sleeps_leaves_its_memory_to_the_learner() -> None:
    cfg = EngineConfig(gpu_memory_utilization=0.5)
    awake = engine_memory(cfg, LLAMA_8B, 2048, MACHINE, 2, "cuda")
    asleep = engine_memory(cfg.model_copy(update={"sleep": True}), LLAMA_8B, 2048, MACHINE, 2, "cuda")
    assert (awake.resting, asleep.reserved) == (40 * GIB, 40 * GIB)
    assert asleep.resting == asleep.parts["workspace"] + asleep.parts["CUDA graphs"]


def test_cuda_graphs_count_unless_none_are_captured() -> None:
    """With a KV cache of a fixed size vLLM leaves no room for them: 30 MiB a layer here, 1 GiB of 8B."""
    for kwargs, layers in (
        ({}, 32),
        ({"enforce_eager": True}, 0),
        ({"compilation_config": {"cudagraph_mode": "NONE"}}, 0),
        ({"compilation_config": {"cudagraph_mode": "PIECEWISE"}}, 32),
        ({"compilation_config": 3}, 32),
    ):
        cfg = EngineConfig(gpu_memory_utilization=0.5, engine_kwargs=kwargs)
        assert engine_memory(cfg, LLAMA_8B, 2048, MACHINE, 2, "cuda").parts["CUDA graphs"] == layers * GRAPH_BYTES
    assert 0.9 * GIB < 32 * GRAPH_BYTES < GIB
    assert "CUDA graphs" not in engine_memory(cfg, LLAMA_8B, 2048, MACHINE, 2, "cpu").parts


def test_layers_with_a_window_keep_no_more_than_vllm_admits() -> None:
    """Gemma 3 27B: 10 layers of 62 keep all 32,768 tokens, the others the window of 1,024 and a step's 16,384: as
    vLLM's own SlidingWindowSpec has it, in blocks of 16."""
    interface = pytest.importorskip("vllm.v1.kv_cache_interface")
    import torch

    shape = known_shapes()["google/gemma-3-27b"]
    cfg = EngineConfig(gpu_memory_utilization=0.9)
    memory = engine_memory(cfg, shape, 32_768, MACHINE, 2, "cuda")
    own = {"block_size": 16, "num_kv_heads": 16, "head_size": 128, "dtype": torch.bfloat16}
    spec = interface.SlidingWindowSpec(**own, sliding_window=1024)
    blocks = spec.max_admission_blocks_per_request(16_384, 32_768)
    sequence = 52 * blocks * spec.page_size_bytes + 10 * (32_768 // 16) * spec.page_size_bytes
    cache = memory.parts["KV cache"]
    assert memory.holds["kv_tokens"] == pytest.approx(cache * 32_768 / sequence, rel=1e-3)
    assert sequence_bytes(shape, {}, 1, 2, 80 * GIB, 32_768) == pytest.approx(sequence, rel=1e-3)
    assert sequence_bytes(shape, {}, 1, 2, 80 * GIB, 4096) == 62 * 2 * 16 * 128 * 2 * 4096  # all within a step


def test_a_quantised_judge_is_as_large_as_its_checkpoint() -> None:
    """Qwen2.5 32B in 4 bits has 18 GiB, not 61: 19.3 GB by the hub's index. A share of 0.4 holds it."""
    shape = known_shape("Qwen/Qwen2.5-32B-Instruct-AWQ")
    assert shape is not None
    cfg = EngineConfig(gpu_memory_utilization=0.4)
    memory = engine_memory(cfg, shape, 4096, MACHINE, 2, "cuda")
    assert memory.parts["weights"] == pytest.approx(19.33e9, rel=0.01) and memory.total <= memory.limit
    plain = known_shapes()["Qwen/Qwen2.5-32B"]
    assert engine_memory(cfg, plain, 4096, MACHINE, 2, "cuda").total > 66 * GIB
    for kwargs in ({"quantization": "fp8"}, {"quantization": "bitsandbytes"}):
        less = engine_memory(EngineConfig(engine_kwargs=kwargs), plain, 4096, MACHINE, 2, "cuda").parts["weights"]
        assert less < 36e9
