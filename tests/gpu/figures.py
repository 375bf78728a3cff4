"""What one GPU gives, one JSON line a figure: learner MFU, sync time by model size, rollout and judge tokens/s.

    python3 -m tests.gpu.figures [--sizes 135m 1b 8b] [--only learner sync rollout judge]

Models have random weights and are written to a temporary folder: speed doesn't depend on what they know. Every figure
is a benchmark of tests/benchmarks in a process of its own. Of 8b, which with fp32 gradients and Adam's states takes
145 GB, a GPU holds 20 of the 32 layers beside the rest: FLOPs and bytes are counted of those.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from tests.gpu.record import record

ROOT = Path(__file__).parents[2]
H200_BF16_FLOP_PER_S = 989e12  # NVIDIA's data sheet, dense
CONTEXT = 4096
TIMEOUT_S = 540

# layers, hidden, intermediate, heads, key-value heads: SmolLM2-135M, Llama 3.2 1B and 3B, and 20 of Llama 3.1 8B's 32
# layers; heads of 64, 64, 128 and 128.
SIZES = {
    "135m": (30, 576, 1536, 9, 3),
    "1b": (16, 2048, 8192, 32, 8),
    "3b": (28, 3072, 8192, 24, 8),
    "8b": (20, 4096, 14336, 32, 8),
}
VOCABULARY = {"135m": 49152, "1b": 128256, "3b": 128256, "8b": 128256}
UNTIED = ("8b",)
POLICY_ALONE = ("3b", "8b")  # a critic and a reference beside the policy and its Adam states would not fit
WHOLE_8B_BYTES = 2 * 8_030_261_248


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=["135m", "1b", "8b"])
    parser.add_argument("--only", nargs="+", choices=["learner", "sync", "rollout", "judge"])
    parser.add_argument("--models", type=Path, help="a folder where models are looked for, and left")
    parser.add_argument("--rehearse", action="store_true", help="on a CPU, with one narrow layer: to try this script")
    args = parser.parse_args()
    failed = False
    with tempfile.TemporaryDirectory() as scratch:
        for size in args.sizes:
            folder = make_model(size, (args.models or Path(scratch)) / size, rehearse=args.rehearse)
            for name, script, options in figures(size, "cpu" if args.rehearse else "gpu"):
                if args.only is None or name in args.only:
                    line = run(script, folder, options)
                    failed |= "failed" in line
                    record({"figure": {"name": name, "size": size, **line}})
    sys.exit(failed)


def figures(size: str, device: str) -> Iterator[tuple[str, str, str]]:
    """Name, benchmark and its options; on a CPU small enough to try."""
    gpu = device == "gpu"
    common = f"--device {device} --rounds {5 if gpu else 1}"
    large = "--precision bf16 --matmul 8192 --prompts 64 --samples-per-prompt 4 --prompt-tokens 200 400"
    large += " --completion-tokens 256 --tokens-per-micro-batch 16384"
    alone = " --policy-alone --gradient-checkpointing" if size in POLICY_ALONE else ""
    learner = f"{common} {large if gpu else '--prompts 1 --completion-tokens 4 --matmul 256'}{alone}"
    yield "learner", "bench_learner", learner.replace("--rounds 5", "--rounds 2") if alone else learner
    yield "sync", "bench_sync", f"{common} {'--zero-stage 3' if gpu else ''}"
    prompts = "--prompts 256 --samples-per-prompt 2 --max-new-tokens 128" if gpu else "--prompts 2 --max-new-tokens 2"
    yield "rollout", "bench_rollout", f"{common} {prompts} --max-prompt-tokens 1024"
    judged = "--completions 256 --answer-tokens 256" if gpu else "--completions 2 --answer-tokens 4"
    yield "judge", "bench_judge", f"{common} {judged} --max-prompt-tokens 1024 --context {CONTEXT}"


def run(script: str, folder: Path, options: str) -> dict[str, Any]:
    """The benchmark's line with what a GPU is judged by, or why there is none."""
    command = [sys.executable, "-m", f"tests.benchmarks.{script}", "--model", str(folder), *options.split()]
    try:
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=TIMEOUT_S)
    except subprocess.TimeoutExpired:
        return {"failed": f"no answer in {TIMEOUT_S} s", "options": options}
    if done.returncode:
        return {"failed": done.stderr[-1500:], "options": options}
    return derived(json.loads(done.stdout)) | {"options": options}


def derived(line: dict[str, Any]) -> dict[str, Any]:
    """MFU, bandwidth and tokens/s out of what the benchmarks print."""
    if line["benchmark"] == "learner":
        achieved = {how: share * line["matmul_gflop_per_s"] * 1e9 for how, share in line["share"]["update"].items()}
        line["mfu"] = {how: round(flops / H200_BF16_FLOP_PER_S, 4) for how, flops in achieved.items()}
    elif line["benchmark"] == "sync":
        rate = line["model_bytes"] / line["medians_s"]["push"]
        line["gb_per_s"] = round(rate / 1e9, 2)
        line["whole_8b_s_at_this_rate"] = round(WHOLE_8B_BYTES / rate, 3)
    elif line["benchmark"] == "judge":
        line["judge_tokens_per_s"] = round(line["judge_tokens"] / line["medians_s"]["ours"], 1)
    return line


def make_model(size: str, folder: Path, *, rehearse: bool = False) -> Path:
    """A random bf16 Llama of that size, saved with the tests' tokenizer; as it is if it is there."""
    if (folder / "config.json").exists():
        return folder
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    from tests.tiny import make_tokenizer

    depth, hidden, intermediate, heads, kv_heads = SIZES[size] if not rehearse else (1, 64, 128, 2, 1)
    tokenizer = make_tokenizer(None)
    tokenizer.model_max_length = CONTEXT
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = LlamaConfig(
        vocab_size=VOCABULARY[size] if not rehearse else 320,
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=depth,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        max_position_embeddings=CONTEXT,
        tie_word_embeddings=size not in UNTIED,
        **ids,
    )
    config.dtype = torch.bfloat16
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device("cuda" if torch.cuda.is_available() else "cpu"):
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


if __name__ == "__main__":
    main()
