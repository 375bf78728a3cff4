"""The main job on one GPU: rollout engine, judge and learner share it as the plan of memory says, weights go by IPC."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest

from tests.gpu.device import CLUSTER_DEVICE, PLANNED_SHARE, PRECISION, REHEARSAL, gpu_model

pytestmark = pytest.mark.gpu

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


def test_three_steps(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    from rlaif_ray.config.load import load_job
    from rlaif_ray.pipelines.rl import train_rl

    prompts = tmp_path / "prompts.jsonl"
    rows = ["Name a colour.", "Why is the sky blue?", "Write a line about rain.", "What is 2 + 2?", "Say hello."]
    prompts.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    template = tmp_path / "template.yaml"
    template.write_text(json.dumps(TEMPLATE))  # JSON is YAML
    config = tmp_path / "train.yaml"
    config.write_text(
        json.dumps(
            {
                "policy": {"model": gpu_model(), "precision": PRECISION},
                "data": {"path": str(prompts)},
                "sampling": {"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": 16},
                "rollout": PLANNED_SHARE,
                "feedback": {
                    "type": "judge",
                    "judge": {"model": gpu_model(), "min_answer_mass": 0.0, **PLANNED_SHARE},
                    "template": str(template),
                },
                "algorithm": {"type": "ppo", "minibatches": 2},
                "learner": {"lr": 1e-3, "zero_stage": 2},
                "cluster": {"address": "local", "device": CLUSTER_DEVICE, "gpus_per_actor": 0.3},
                "checkpoint": {"every": 2},
                "evaluation": {"held_out": {"path": str(prompts), "limit": 2}},
                "tracking": {"wandb": "disabled"},
                "steps": STEPS,
                "run_dir": str(tmp_path / "run"),
            }
        )
    )
    job = load_job("train", [config])
    job.run_dir.mkdir(parents=True)
    train_rl(job)

    lines = [json.loads(line) for line in (job.run_dir / "metrics.jsonl").read_text().splitlines()]
    steps = [line for line in lines if "policy/loss" in line]
    assert len(steps) == STEPS
    for number, line in enumerate(steps, 1):
        assert line["weights/version"] == number
        assert line["feedback/scored_fraction"] == 1.0
        for name in ("policy/loss", "value/loss", "policy/grad_norm", "kl/mean", "reward/mean"):
            assert math.isfinite(line[name]), (name, line)
        # An engine with stale weights would be far off after the first step at this learning rate.
        assert line["rollout/logprob_gap"] < (1e-3 if REHEARSAL else 0.1)
    assert steps[-1]["policy/grad_norm"] > 0
    AutoModelForCausalLM.from_pretrained(job.run_dir / "policy")
    assert list((job.run_dir / "checkpoints").glob("step-*"))
