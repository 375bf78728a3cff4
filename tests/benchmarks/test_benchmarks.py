"""Every benchmark runs and prints its line. How fast anything is, is no test's business: see README.md."""

from __future__ import annotations

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.benchmarks.rl_step import template_of
from tests.tiny import cached_tiny_model
from tests.zoo import zoo_model

ROOT = Path(__file__).parents[2]
CONTEXT = 4096  # room for a judge's template in the tiny tokenizer's short tokens

SMALL = {
    "bench_rollout": "--prompts 3 --max-new-tokens 4 --max-prompt-tokens 1000 --kv-cache-gb 0.1 --rounds 1",
    "bench_judge": "--completions 3 --answer-tokens 8 --max-prompt-tokens 500 --context 4096 --kv-cache-gb 0.2"
    " --rounds 1",
    "bench_label": "--pairs 3 --answer-tokens 8 --max-prompt-tokens 500 --context 8192 --kv-cache-gb 0.2 --rounds 1",
    "bench_revise": "--prompts 3 --steps 1 --max-new-tokens 8 --max-prompt-tokens 500 --context 4096"
    " --kv-cache-gb 0.2 --rounds 1",
    "bench_sync": "--rounds 1",
    "bench_sync zero-3": "--rounds 1 --zero-stage 3 --ranks 2 --threads 1",
    "bench_supervision": "--prompts 3 --max-new-tokens 8 --max-prompt-tokens 1000 --kv-cache-gb 0.1 --rounds 1",
    "bench_checkpoint": "--examples 4 --tokens 32 --rounds 1",
    "bench_prompts": "--prompts 4000 --tokenised 200 --rounds 1",
    "bench_precision": "--prompts 2 --completion-tokens 8 --rounds 1",
    "bench_learner": "--prompts 2 --completion-tokens 8 --matmul 256 --rounds 1",
}


def run(script: str, options: str) -> list[dict[str, Any]]:
    """The lines that a script prints, on the tiny model."""
    command = [sys.executable, "-m", f"tests.benchmarks.{script}", "--model", tiny(), *options.split()]
    environment = {**os.environ, "VLLM_LOGGING_LEVEL": "ERROR"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=580)
    assert done.returncode == 0, done.stderr[-3000:]
    print(done.stdout)
    return [json.loads(line) for line in done.stdout.splitlines()]


def tiny() -> str:
    return str(cached_tiny_model(tied=True, context=CONTEXT))


@pytest.mark.benchmark
@pytest.mark.parametrize("name", SMALL)
def test_prints_one_well_formed_line(name: str) -> None:
    script = name.split()[0]
    (line,) = run(script, SMALL[name])
    assert line["benchmark"] == script.removeprefix("bench_")
    numbers = [v for key, v in line.items() if key.startswith("ratio")] + list(line["medians_s"].values())
    if name == "bench_precision" and not line["amx"]:  # nothing to compare with
        numbers.remove(None)
    assert len(numbers) >= 3 and all(math.isfinite(n) and n > 0 for n in numbers), line


@pytest.mark.benchmark
def test_both_rollout_sides_sample_the_same_tokens() -> None:
    (line,) = run("bench_rollout", SMALL["bench_rollout"])
    assert line["same_tokens"]


@pytest.mark.benchmark
def test_rl_step_prints_a_line_a_step(tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    rows = ["Name a colour.", "Why is the sky blue?", "Write a line about rain."]
    prompts.write_text("".join(json.dumps({"prompt": row}) + "\n" for row in rows))
    options = f"--prompts-file {prompts} --prompts 2 --samples-per-prompt 2 --steps 2 --max-new-tokens 6"
    lines = run("rl_step", options)
    assert [line["event"] for line in lines] == ["step", "step"]
    for line in lines:
        phases = sum(line[f"{name}_s"] for name in ("rollout", "feedback", "annotate", "update", "weight_sync"))
        assert line["samples"] == 4 and line["new_tokens"] == 24
        assert 0 < phases <= line["seconds"] + 0.01


def test_template_text_with_labels_becomes_ours() -> None:
    made = template_of("Rate it. Only a number.\n\nCONTEXT: {prompt}\n\nRESPONSE: {response}")
    assert (made["preamble"], made["ending"]) == ("Rate it.", "Only a number.")
    assert made["body"] == "[CONTEXT]\n{prompt}\n[END CONTEXT]\n\n[RESPONSE]\n{response}\n[END RESPONSE]"
    assert made["markers"] == ["[CONTEXT]", "[END CONTEXT]", "[RESPONSE]", "[END RESPONSE]"]


def test_template_text_with_markers_stays_word_for_word_but_for_the_frame_codes(tmp_path: Path) -> None:
    from rlaif_ray.feedback.templates import load_template

    text = Path(__file__).with_name("judge_template.txt").read_text()
    path = tmp_path / "judge.yaml"
    path.write_text(json.dumps(template_of(text)))
    template = load_template(str(path))
    body = re.sub(r"(?m)^(\[[A-Z ]+) [a-z]{6}\]$", r"\1]", template.render("P", "R"))
    assert f"{template.preamble}\n\n{body}\n\n{template.ending}" == (
        text.replace("{prompt}", "P").replace("{response}", "R").strip()
    )
    assert template.answer_prefix == "SCORE="


@pytest.mark.benchmark
def test_the_zoo_table_has_a_line_for_each_model(tmp_path: Path) -> None:
    from tests.benchmarks.zoo_table import table

    for name in ("llama", "lfm2"):
        zoo_model(name).save_pretrained(tmp_path / name)
    title, _, *rows = table(tmp_path, ["llama", "lfm2", "gone"], ["layout", "gap", "scoring"])
    assert title == "| architecture | layout | gap | scoring |"
    assert rows[0].startswith("| llama | packed | ") and rows[0].endswith("| sdpa |")
    assert rows[1].startswith("| lfm2 | padded, sdpa (conv layers mix samples of one row) | ")
    assert rows[2].startswith("| gone | refused: ")
