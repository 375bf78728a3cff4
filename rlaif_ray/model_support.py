"""Which models an engine can't compute, and what works instead: known before anything starts.

Found by tests/benchmarks/zoo_push.py, which compares vLLM with transformers on tiny models of each architecture. The
comparison at the start of a run is the last word; this table only says sooner what is known.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

Device = Literal["cpu", "cuda"]

_SETTING = {"cpu": "cpu", "cuda": "gpu"}  # of cluster.device


@dataclass(frozen=True, slots=True)
class Unsupported:
    """Why a model type doesn't run, and what does."""

    devices: tuple[Device, ...]  # where it doesn't
    reason: str  # completes "vLLM 0.32 ..."
    instead: str  # a whole sentence
    only_fp32: bool = False  # in bf16 it runs
    only_updates: bool = False  # it runs with the weights of its folder (a judge), and doesn't take new ones


_NO_SELECTIVE_SCAN = Unsupported(
    ("cpu",),
    "has Mamba's selective scan for GPUs alone, and fails on the first prompt",
    "Use GPUs, or another model; Granite 4's hybrids, of Mamba 2, work here.",
)
_NO_LINEAR_ATTENTION = Unsupported(
    ("cpu",),
    "takes the gated linear attention of this model in bf16 alone there, and fails on the first prompt",
    "Use cluster.device=gpu or precision=bf16, or another model; Granite 4's hybrids, of Mamba 2, work in fp32.",
    only_fp32=True,
)
# By the config's model_type.
UNSUPPORTED: dict[str, Unsupported] = {
    "mamba": _NO_SELECTIVE_SCAN,
    "falcon_mamba": _NO_SELECTIVE_SCAN,
    "jamba": _NO_SELECTIVE_SCAN,
    "qwen3_next": _NO_LINEAR_ATTENTION,
    "qwen3_5_text": _NO_LINEAR_ATTENTION,
    "qwen3_5_moe_text": _NO_LINEAR_ATTENTION,
    "minimax_m2": Unsupported(
        ("cpu",),
        "chooses experts by softmax alone there, and this model by sigmoid: it fails on the first prompt",
        "Use cluster.device=gpu, or another mixture of experts, such as Qwen3-MoE.",
    ),
    "gpt_oss": Unsupported(
        ("cuda",),
        "loses new experts and attention sinks of an update (its loader writes them past the weight loaders), and "
        "would sample from the old ones",
        "Train a copy of it in full precision (its published weights are MXFP4) with cluster.device=cpu, or train "
        "another model; as a judge it works.",
        only_updates=True,
    ),
    "mimo_v2_flash": Unsupported(
        ("cuda",),
        "loses new attention sinks of an update (its loader writes them past the weight loaders), and would sample "
        "with the old ones",
        "Train another model; as a judge it works.",
        only_updates=True,
    ),
    "apertus": Unsupported(
        ("cpu",),
        "keeps the parameters of its activation (xIELU) in bf16, and in fp32, as CPUs compute, log-probabilities are "
        "off by 2.6e-3",
        "Use cluster.device=gpu or precision=bf16, or train another model; as a judge it works.",
        only_fp32=True,
        only_updates=True,
    ),
}

# Model types with a `kv_lora_rank` that vLLM computes by latent attention (its `is_deepseek_mla`, model_arch_config_
# convertor.py); others, such as MiniCPM3, it computes by plain attention.
LATENT_TYPES = {"axk1", "bailing_hybrid", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "deepseek_v41"}
LATENT_TYPES |= {"dots3_note", "glm4_moe_lite", "glm5_next", "glm5_next_text", "glm_moe_dsa", "hy_v4", "kimi_k2"}
LATENT_TYPES |= {"kimi_linear", "longcat_flash", "pangu_ultra_moe"}
LATENT_ATTENTION = Unsupported(
    ("cpu",),
    "takes latent attention in bf16 alone there, and with VLLM_MLA_DISABLE=1 its log-probabilities are wrong by nats",
    "Use cluster.device=gpu, or a model without latent attention.",
)


def engine_refusal(config: Any, device: Device, *, takes_weights: bool = True, precision: str = "auto") -> str | None:
    """Why vLLM must not be started with this model on this device, and the remedy; None where nothing is known.

    `config` is the model's config as transformers gives it; `takes_weights` says whether new weights will be pushed;
    `precision` is what it computes in ("auto" counts as fp32 on CPUs).
    Pure: nothing is imported or loaded.
    """
    text = config.get_text_config() if hasattr(config, "get_text_config") else config
    for model_type in dict.fromkeys((config.model_type, text.model_type)):
        known = UNSUPPORTED.get(model_type)
        if known is None and text.model_type in LATENT_TYPES and getattr(text, "kv_lora_rank", None):
            known = LATENT_ATTENTION
        if known is None or device not in known.devices or (known.only_fp32 and precision == "bf16"):
            continue
        if takes_weights or not known.only_updates:
            return (
                f"model type {model_type} can't be used on cluster.device={_SETTING[device]}: vLLM 0.32 "
                f"{known.reason}. {known.instead}"
            )
    return None
