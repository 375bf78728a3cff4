"""Run folders as jobs leave them, for tests and the benchmark of the report."""

from __future__ import annotations

import json
import random
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

WORDS = ("policy", "reward", "judge", "answer", "kind", "short", "summary", "garden", "letter", "bread", "station")
NASTY = '</script><script>alert(1)</script><!-- <img src=x onerror="alert(2)"> & \u2028\u2029 <b>bold</b>'
RESOLVED = """\
# rlaif {job}: every value of this run. Loads again as a config.
# from: configs/demo/{job}.yaml
# git: 0123456789abcdef
# versions: rlaif_ray 0.1.0, torch 2.13.0
seed: {seed}
"""


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_resolved(folder: Path, job: str, more: str = "", seed: int = 0) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "resolved.yaml").write_text(RESOLVED.format(job=job, seed=seed) + more)


def training_run(folder: Path, *, steps: int = 6, samples: int = 4, words: int = 20, seed: int = 0) -> Path:
    """A finished `rlaif train`; the first sample's texts are NASTY, every 7th could not be judged."""
    draw = random.Random(seed)
    more = f"steps: {steps}\npolicy: {{model: tiny}}\nfeedback: {{type: judge, judge: {{type: vllm, model: big}}}}\n"
    write_resolved(folder, "train", more, seed)
    metrics, found = [], []
    for step in range(1, steps + 1):
        phases = {
            "time/rollout_s": 1.0,
            "time/feedback_s": 0.5,
            "time/update_s": 2 + draw.random(),
            "time/other_s": 0.1,
        }
        metrics.append(
            {
                "step": step,
                "reward/mean": step / steps + draw.gauss(0, 0.2),
                "kl/mean": 0.01 * step,
                "policy/entropy": 3 - step / steps,
                "completion/length_mean": 30 + draw.gauss(0, 3),
                "rollout/tokens_per_s": 250.0,
                "value/loss": draw.random(),
                **phases,
                "time/step_s": sum(phases.values()),
            }
        )
        for k in range(samples):
            if k % 4 == 0:
                question = " ".join(draw.choice(WORDS) for _ in range(words))
            failed = len(found) % 7 == 6
            text = " ".join(draw.choice(WORDS) for _ in range(words))
            found.append(
                {
                    "step": step,
                    "prompt_id": f"train-{step:04d}-{k // 4}",
                    "sample": k % 4,
                    "prompt": f"{NASTY if step == 1 and k < 4 else ''}Prompt {k // 4} of step {step}: {question}",
                    "completion": NASTY if not found else text,
                    "score": None if failed else round(draw.uniform(-1, 1), 4),
                    "failure": "refused" if failed else None,
                    "finished": k % 3 > 0,
                    "tokens": words,
                    "weight_version": step - 1,
                    "evidence": {"probabilities": [0.1] * 10, "expected": 5.5, "model": "big"},
                }
            )
    write_rows(folder / "metrics.jsonl", metrics)
    write_rows(folder / "samples.jsonl", found)
    after = {"mean": 0.75, "ci95_low": 0.5, "ci95_high": 1.0, "n": 32, "dropped": 0}
    write_rows(folder / "evaluations.jsonl", [{"step": steps, "held_out": {"before": after, "after": after}}])
    summary = {"name": folder.name, "steps": steps, "total_steps": steps, "wall_s": 1234.5, "held_out": {"gain": after}}
    (folder / "summary.json").write_text(json.dumps(summary | {"job": "train"}))
    return folder


def evaluation_run(folder: Path) -> Path:
    """A finished `rlaif evaluate`: two arms on three prompts, people's labels, harmless rates."""
    write_resolved(folder, "evaluate", "label: {template: summary}\narms: {rlaif: {model: a}, sft: {model: b}}\n")
    pairs = []
    for k, (forward, reverse) in enumerate([(0.9, 0.8), (0.7, 0.2), (0.1, 0.3)]):
        pairs.append(
            {
                "id": f"arms/0/{k}",
                "prompt": [{"role": "user", "content": f"Question {k}"}],
                "response_a": NASTY if k == 0 else f"rlaif answers {k}",
                "response_b": f"sft answers {k}",
                "source_a": "rlaif",
                "source_b": "sft",
                "p_a": (forward + reverse) / 2,
                "p_a_forward": forward,
                "p_a_reversed": reverse,
                "rationales": ["The first is shorter.", "zebra: the second is kinder."] if k == 0 else [],
                "principle": None,
                "failed": None,
                "human": 0.0 if k == 0 else None,
            }
        )
    write_rows(folder / "judging" / "labels.jsonl", pairs)
    told = {"ci95_low": 0.25, "ci95_high": 0.875, "n": 3, "prompts": 3, "dropped": 0}
    bias = {"rate": 0.25, "prefers_first": 0.75, "n": 3, "biased": 1, "dropped": 0}
    curve = [{"low": 0.0, "high": 0.5, "n": 4, "mean_p": 0.3, "mean_label": 0.25}]
    aligned = {"accuracy": 0.8125, **told, "brier": 0.125, "ece": 0.0625, "curve": curve, "position_bias": bias}
    meeting = {"a": "rlaif", "b": "sft", "win_rate": {"rate": 0.5625, **told}, "position_bias": bias}
    meeting["mean_length"] = {"a": 161.25, "b": 132.0}
    meeting["length_controlled"] = {"rate": 0.4375, **told, "reason": None}
    safe = {"rate": {"rate": 0.9375, **told}, "over_refusal": {"rate": 0.125, **told}, "corrected": None}
    summary = {"job": "evaluate", "alignment": aligned, "win_rates": [meeting], "harmless": {"arms": {"rlaif": safe}}}
    (folder / "summary.json").write_text(json.dumps(summary | {"judge": "big"}))
    return folder
