"""The job of configs/cluster/1gpu.yaml on one GPU: its layout, with small models, prompts and lengths.

Rollout engine, judge and learner share the GPU, weights go by IPC, and nobody says how large a KV cache is.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from tests.gpu.device import CLUSTER_DEVICE, EXACT, KIT, PRECISION, REHEARSAL, gpu_model

pytestmark = pytest.mark.gpu

LAYOUT = Path(__file__).parents[2] / "configs" / "cluster" / "1gpu.yaml"
STEPS = 3

# Short: the tiny tokenizer needs about a token per letter.
TEMPLATE = {
    "name": "short",
    "version": 1,
    "kind": "score",
    "preamble": "Rate the answer from 1 to 10.",
    "body": "[QUESTION]\n{prompt}\n[END QUESTION]\n\n[ANSWER]\n{response}\n[END ANSWER]",
    "ending": "How good is the answer? Say one number.",
    "answer_prefix": "Score: ",
    "markers": ["[QUESTION]", "[END QUESTION]", "[ANSWER]", "[END ANSWER]"],
}


def smaller(folder: Path) -> dict[str, Any]:
    """What is laid over the layout: nothing of where actors are placed or what memory they take."""
    prompts = folder / "prompts.jsonl"
    rows = ["Name a colour.", "Why is the sky blue?", "Write a line about rain.", "What is 2 + 2?", "Say hello."]
    prompts.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    template = folder / "template.yaml"
    template.write_text(json.dumps(TEMPLATE))  # JSON is YAML
    engine = {"engine_kwargs": KIT, **({"kv_cache_gb": 0.2} if REHEARSAL else {})}  # on a CPU it must be said
    return {
        "policy": {"model": gpu_model(), "precision": PRECISION},
        "data": {"path": str(prompts)},
        "sampling": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 16},
        "rollout": engine,
        "feedback": {"judge": {"model": gpu_model(), "min_answer_mass": 0.0, **engine}, "template": str(template)},
        "algorithm": {"kl": {"coef": 0.01}},
        "learner": {"lr": 1e-3},
        "cluster": {"address": "local", "device": CLUSTER_DEVICE, **({"start_timeout_s": 3000} if REHEARSAL else {})},
        "checkpoint": {"every": 2},
        "evaluation": {"held_out": {"path": str(prompts), "limit": 2}},
        "tracking": {"wandb": "disabled"},
        "steps": STEPS,
        "run_dir": str(folder / "run"),
    }


def test_three_steps(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from rlaif_ray.config.load import load_job
    from rlaif_ray.pipelines.rl import train_rl

    over = tmp_path / "smaller.yaml"
    over.write_text(json.dumps(smaller(tmp_path)))
    loaded = load_job("train", [LAYOUT, over])
    for engine in (loaded.config.rollout, loaded.config.feedback.judge):
        assert "kv_cache_memory_bytes" not in engine.engine_kwargs
    assert loaded.config.cluster.gpus_per_actor < 1 or REHEARSAL
    train_rl(loaded)

    lines = [json.loads(line) for line in (loaded.run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "policy/loss" in line]
    assert len(steps) == STEPS
    for number, line in enumerate(steps, 1):
        assert line["weights/version"] == number
        assert line["feedback/scored_fraction"] == 1.0
        for name in ("policy/loss", "policy/grad_norm", "kl/mean", "reward/mean"):
            assert math.isfinite(line[name]), (name, line)
        # An engine with stale weights would be far off after the first step at this learning rate.
        assert line["rollout/logprob_gap"] < (1e-3 if EXACT else 0.1)
    assert steps[-1]["policy/grad_norm"] > 0
    AutoModelForCausalLM.from_pretrained(loaded.run_dir / "policy")
    assert list((loaded.run_dir / "checkpoints").glob("step-*"))
