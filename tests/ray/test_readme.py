"""The README stays true: every command in it is run, or is known here with the test that runs it."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
from pathlib import Path

import pytest

from tests.pace import scaled

ROOT = Path(__file__).parents[2]
BLOCK = re.compile(r"```bash\n(.*?)```", re.DOTALL)
TINY = (
    "steps=1 learner.warmup_steps=0 evaluation.held_out.limit=2 sampling.prompts_per_step=2 "
    "sampling.max_new_tokens=4 cluster.address=local"
)

PREFERENCES = "cluster.address=local output={run_dir}/pairs.jsonl run_dir={run_dir}"

# Command in the README -> what a test adds so that it ends soon; None: run elsewhere, as said.
ADDED: dict[str, str | None] = {
    "make demo": f"ARGS='{TINY} run_dir={{run_dir}}'",
    "make test": None,  # this very run
    ".venv/bin/rlaif train configs/demo/train.yaml --dry-run": "",
    ".venv/bin/rlaif train configs/demo/train.yaml steps=2 run_dir=runs/short": f"{TINY} run_dir={{run_dir}}",
    ".venv/bin/rlaif pairs configs/demo/pairs.yaml": f"data.limit=3 sampling.max_new_tokens=4 {PREFERENCES}",
    ".venv/bin/rlaif revise configs/demo/revise.yaml": f"data.limit=2 revision.max_new_tokens=4 {PREFERENCES}",
    ".venv/bin/rlaif sft configs/demo/sft.yaml": None,  # after revise, in tests/ray/test_constitution.py
    ".venv/bin/rlaif dpo configs/demo/dpo.yaml": None,  # after label, in tests/ray/test_pipeline.py
    ".venv/bin/rlaif sample configs/demo/best_of_n.yaml": "data.limit=2 sampling.max_new_tokens=4 run_dir={run_dir}",
    "make pipeline": "ARGS='--only revise run_dir={run_dir} stages.revise.data.limit=2 "
    "stages.revise.revision.max_new_tokens=4'",  # all stages: tests/ray/test_pipeline.py
    ".venv/bin/rlaif pipeline configs/demo/pipeline.yaml --dry-run": "run_dir={run_dir}",
    ".venv/bin/rlaif pipeline configs/demo/pipeline.yaml --from label": None,  # tests/ray/test_pipeline.py
    ".venv/bin/rlaif evaluate configs/demo/alignment.yaml data.path=labelled.jsonl": (
        "data.path={labelled} label.template=summary run_dir={run_dir}"
    ),
    ".venv/bin/rlaif evaluate configs/demo/evaluate.yaml": None,  # after a pipeline, in tests/ray/test_pipeline.py
    ".venv/bin/rlaif report runs/pipeline": None,  # tests/unit/evaluation/test_report.py
    ".venv/bin/rlaif label configs/demo/label.yaml": None,  # the four in a row: tests/ray/test_preference_jobs.py
    ".venv/bin/rlaif reward-model configs/demo/reward_model.yaml": None,
    ".venv/bin/rlaif train configs/demo/train_rm.yaml": None,
    ".venv/bin/rlaif train configs/demo/train.yaml run_dir=runs/long checkpoint.every=20": None,  # test_train.py
    ".venv/bin/rlaif train configs/demo/train.yaml run_dir=runs/long checkpoint.path=s3://bucket/long": None,
    # tests/ray/test_checkpoint_places.py, against moto's S3
    ".venv/bin/rlaif plan configs/cluster/8gpu.yaml": "",
    "launch/kuberay.sh": None,  # tests/unit/test_cluster_files.py, as the next
    "launch/ray_up.sh": None,
    "launch/slurm.sh": None,  # and under a real Slurm in tests/ray/test_slurm.py
    ".venv/bin/ray job stop --address http://HEAD:8265 JOB": None,  # tests/ray/test_two_nodes.py
    ".venv/bin/python launch/submit.py --address http://HEAD:8265 train configs/demo/train.yaml "
    "run_dir=/shared/runs/first": None,  # tests/ray/test_cluster.py, against a real head
}


def readme_commands() -> list[str]:
    lines = [line for block in BLOCK.findall((ROOT / "README.md").read_text()) for line in block.splitlines()]
    return [line.split("  #")[0].strip() for line in lines if line.strip()]


def test_every_command_is_known() -> None:
    assert set(readme_commands()) == set(ADDED)


@pytest.mark.ray
@pytest.mark.slow
@pytest.mark.parametrize(
    "command",
    [
        # What starts nothing takes seconds; the others load the embedded model of 135M parameters.
        pytest.param(command, marks=[] if "--dry-run" in command or "rlaif plan" in command else pytest.mark.long)
        for command, added in ADDED.items()
        if added is not None
    ],
)
def test_command_runs(command: str, tmp_path: Path) -> None:
    assert (ROOT / ".venv/bin/rlaif").exists(), "set up with make first"
    labelled = tmp_path / "labelled.jsonl"
    rows = ({"prompt": f"{k}?", "response_a": "Yes.", "response_b": "No.", "label": k} for k in (0, 1))
    labelled.write_text("".join(json.dumps(row) + "\n" for row in rows))
    added = (ADDED[command] or "").format(run_dir=tmp_path / "run", labelled=labelled)
    done = subprocess.run(
        shlex.split(f"{command} {added}"),
        cwd=ROOT,
        env={**os.environ, "HF_HUB_OFFLINE": "1", "WANDB_MODE": "offline"},
        capture_output=True,
        text=True,
        timeout=scaled(580),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    if "--dry-run" in command:
        assert "rollout" in done.stdout
        assert "learner" in done.stdout
        assert not (tmp_path / "run").exists()
    elif "rlaif plan" in command:
        assert "8 GPUs on nodes of 8" in done.stdout
    elif "pipeline" in command:
        assert "│ revise" in done.stdout and (tmp_path / "run/latest/revise/revisions.jsonl").exists()
    elif "rlaif evaluate" in command:
        assert json.loads((tmp_path / "run/summary.json").read_text())["alignment"]["n"] == 2
    elif "rlaif sample" in command:
        assert (tmp_path / "run/responses.jsonl").exists()
    elif "rlaif pairs" in command or "rlaif revise" in command:
        assert (tmp_path / "run/pairs.jsonl").exists()
    else:
        assert "held-out gain" in done.stdout
        assert (tmp_path / "run/policy/model.safetensors").exists()
