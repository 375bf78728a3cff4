"""`rlaif train` from end to end: the real program, Ray, vLLM, DeepSpeed and wandb on a tiny model."""

from __future__ import annotations

import hashlib
import json
import math
import multiprocessing
import re
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

from rlaif_ray.config.jobs import TrainJob
from rlaif_ray.config.load import load_job
from rlaif_ray.errors import InputError
from rlaif_ray.feedback.judge import check_context
from rlaif_ray.feedback.templates import load_template
from rlaif_ray.models import load_tokenizer
from rlaif_ray.types import TokenAnswer, TokenQuery
from tests.pace import scaled
from tests.runs import Program, finish_train, rows, start_train, tiny_config
from tests.tiny import cached_tiny_model
from tests.unit.test_tracking import history, read_wandb

pytestmark = [pytest.mark.ray, pytest.mark.slow]

# DESIGN.md, section 4: every metric that PPO has.
METRICS = {
    "reward/mean",
    "reward/std",
    "kl/mean",
    "kl/coef",
    "policy/loss",
    "policy/entropy",
    "policy/clip_fraction",
    "policy/grad_norm",
    "value/loss",
    "value/explained_variance",
    "completion/length_mean",
    "completion/eos_fraction",
    "rollout/tokens_per_s",
    "rollout/logprob_gap",
    "feedback/scored_fraction",
    "feedback/per_s",
    "feedback/failed",
    "weights/version",
    "weights/sync_bytes",
    "time/rollout_s",
    "time/feedback_s",
    "time/annotate_s",
    "time/update_s",
    "time/weight_sync_s",
    "time/step_s",
}
TIMED = re.compile(r"^time/|per_s$|memory|^guard/")  # what no two runs have in common, or depends on their starts


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("train")


@pytest.fixture(scope="module")
def config(folder: Path) -> Path:
    return tiny_config(folder)


def repeatable(row: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in row.items() if not TIMED.search(name)}


class TestStraight:
    """One run of six steps; what it leaves and shows."""

    @pytest.fixture(scope="class")
    def run_dir(self, straight: tuple[Path, Program]) -> Path:
        return straight[0]

    def test_it_ends_well_and_leaves_no_process(self, straight: tuple[Path, Program]) -> None:
        _, program = straight
        assert program.exit_code == 0, program.stderr
        assert program.left_over == []

    def test_the_run_folder_is_complete(self, run_dir: Path) -> None:
        expected = {"resolved.yaml", "metrics.jsonl", "samples.jsonl", "checkpoints", "policy", "summary.json", "wandb"}
        assert expected <= {path.name for path in run_dir.iterdir()}
        assert sorted(path.name for path in (run_dir / "checkpoints").iterdir()) == ["step-3", "step-6"]

    def test_resolved_config_loads_again(self, run_dir: Path, config: Path) -> None:
        again = load_job("train", [run_dir / "resolved.yaml"])
        day = str(again.config.chat_date)
        assert re.fullmatch(r"\d{4}-\d\d-\d\d", day)
        assert again.config == load_job("train", [config], [f"run_dir={run_dir}", f"chat_date={day}"]).config
        text = (run_dir / "resolved.yaml").read_text()
        assert yaml.safe_load(text).keys() == TrainJob.model_fields.keys()
        assert re.search(r"^# git: [0-9a-f]{40}", text, re.M) and re.search(r"^# versions: .*vllm.*ray", text, re.M)

    def test_metrics(self, run_dir: Path) -> None:
        metrics = rows(run_dir / "metrics.jsonl")
        assert [row["step"] for row in metrics] == [1, 2, 3, 4, 5, 6]
        for row in metrics:
            missing = [name for name in METRICS if not isinstance(row.get(name), int | float)]
            assert missing == []
            assert row["weights/version"] == row["step"]
            assert row["weights/sync_bytes"] > 100_000
            assert row["feedback/scored_fraction"] == 1 and row["feedback/failed"] == 0
            assert row["rollout/logprob_gap"] < 1e-3
            assert row["completion/length_mean"] <= 12
            assert row["policy/grad_norm"] > 0 and row["value/grad_norm"] > 0
            names = ("rollout", "feedback", "annotate", "update", "weight_sync")
            phases = sum(row[f"time/{name}_s"] for name in names)
            assert 0.9 * row["time/step_s"] < phases <= row["time/step_s"]

    def test_the_first_step_starts_from_the_policy_itself(self, run_dir: Path) -> None:
        first = rows(run_dir / "metrics.jsonl")[0]
        assert first["policy/first_ratio_error"] < 1e-4
        assert abs(first["kl/mean"]) < 1e-4
        assert first["value/explained_variance"] == pytest.approx(0, abs=1e-6)  # the critic's head starts at zero

    def test_every_step_starts_from_its_own_samples(self, run_dir: Path) -> None:
        for row in rows(run_dir / "metrics.jsonl"):
            assert row["policy/first_ratio_error"] < 1e-3

    def test_the_adaptive_coefficient_moves(self, run_dir: Path) -> None:
        metrics = rows(run_dir / "metrics.jsonl")
        coefs = [row["kl/coef"] for row in metrics]
        assert coefs[0] == 0.05
        assert coefs[1] == pytest.approx(0.05 * (1 - 0.2 * 8 / 100))  # KL 0 at first: the error is clipped at -0.2
        for before, after, row in zip(coefs, coefs[1:], metrics, strict=False):
            assert (after > before) == (row["kl/mean"] > 0.5)

    def test_samples(self, run_dir: Path) -> None:
        samples = rows(run_dir / "samples.jsonl")
        assert len(samples) == 6 * 4 * 2
        for number, row in enumerate(samples):
            assert row["step"] == number // 8 + 1
            assert row["weight_version"] == row["step"] - 1
            assert -1 <= row["score"] <= 1 and row["failure"] is None
            assert len(row["evidence"]["probabilities"]) == 10 and row["evidence"]["template_hash"]
            assert row["prompt"] and 1 <= row["tokens"] <= 12
        assert len({(row["step"], row["prompt_id"], row["sample"]) for row in samples}) == len(samples)
        assert {row["prompt_id"] for row in samples if row["step"] <= 3} == {f"train-{k:04}" for k in range(1, 13)}

    def test_rewards_are_the_samples_scores(self, run_dir: Path) -> None:
        samples = rows(run_dir / "samples.jsonl")
        for row in rows(run_dir / "metrics.jsonl"):
            scores = [sample["score"] for sample in samples if sample["step"] == row["step"]]
            assert row["reward/mean"] == pytest.approx(sum(scores) / 8)

    def test_engine_and_learner_were_compared_at_the_start(self, run_dir: Path) -> None:
        found = rows(run_dir / "metrics.jsonl")
        compared = [row["step"] for row in found if "guard/engine_gap" in row]
        assert compared == [1, 2]
        assert all(row[name] < 1e-4 for row in found[:2] for name in ("guard/engine_gap", "guard/packing_gap"))

    def test_summary(self, run_dir: Path) -> None:
        summary = json.loads((run_dir / "summary.json").read_text())
        assert (summary["steps"], summary["total_steps"], summary["wandb_failures"]) == (6, 6, 0)
        assert 0 < summary["setup_s"] < summary["wall_s"]
        assert 1 < summary["peak_rss_gb"] < 10  # two engines and a learner, not only the driver
        assert sum(summary["phase_share"].values()) == pytest.approx(1)
        assert {"rollout", "feedback", "annotate", "update", "weight_sync", "other"} <= summary["phase_share"].keys()
        assert 0 <= summary["guard/saved_gap"] < 1e-4
        held_out = summary["held_out"]
        for interval in (held_out["before"], held_out["after"], held_out["gain"]):
            assert interval["n"] == 6
            assert interval["ci95_low"] < interval["mean"] < interval["ci95_high"]
        assert held_out["gain"]["mean"] == pytest.approx(held_out["after"]["mean"] - held_out["before"]["mean"])
        assert held_out["before"]["mean"] != held_out["after"]["mean"]

    def test_progress_is_plain_lines_off_a_terminal(self, straight: tuple[Path, Program]) -> None:
        _, program = straight
        assert (
            len(re.findall(r"^step \d/6  reward \S+  kl \S+  length \S+  \S+ s/step  eta \S+$", program.stdout, re.M))
            == 6
        )
        assert "\x1b" not in program.stdout
        assert "held-out gain" in program.stdout
        assert len(program.stdout.splitlines()) < 60
        assert "Traceback" not in program.stderr

    def test_wandb_has_all_of_it(self, run_dir: Path) -> None:
        (path,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
        records = read_wandb(path)
        (run,) = [record.run for record in records if record.WhichOneof("record_type") == "run"]
        seen = {item.key: json.loads(item.value_json) for item in run.config.update}
        assert (seen["steps"], seen["algorithm"]["minibatches"], seen["learner"]["lr"]) == (6, 2, 1e-3)
        logged = history(records)
        for row in rows(run_dir / "metrics.jsonl"):
            assert logged[row["step"]]["reward/mean"] == pytest.approx(row["reward/mean"])
            assert logged[row["step"]].keys() >= METRICS
            assert any(key.startswith("samples") for key in logged[row["step"]])
        assert "evaluation/held_out/after/mean" in logged[6]
        tables = [json.loads(file.read_text()) for file in path.parent.glob("files/media/table/*.json")]
        assert len(tables) == 6 and all(len(table["data"]) == 4 for table in tables)
        assert {"prompt", "completion", "score", "evidence", "weight_version"} <= set(tables[0]["columns"])

    def test_the_policy_loads_in_transformers_and_was_trained(self, run_dir: Path) -> None:
        from transformers import AutoModelForCausalLM, AutoTokenizer

        model, told = AutoModelForCausalLM.from_pretrained(run_dir / "policy", output_loading_info=True)
        assert not told["missing_keys"] and not told["unexpected_keys"]
        start = AutoModelForCausalLM.from_pretrained(cached_tiny_model(tied=True, context=4096)).state_dict()
        assert any(not torch.equal(start[name], tensor) for name, tensor in model.state_dict().items())
        assert model.config.use_cache
        tokenizer = AutoTokenizer.from_pretrained(run_dir / "policy")
        assert tokenizer.chat_template and tokenizer.pad_token != tokenizer.eos_token

    @pytest.mark.long
    def test_the_policy_loads_in_vllm_and_agrees_with_transformers(self, run_dir: Path) -> None:
        from transformers import AutoModelForCausalLM

        policy = run_dir / "policy"
        query = TokenQuery(tuple(range(40, 60)), tuple(range(100)))
        # In a process of its own: vLLM's groups are the process's, and would end with this engine for others in it.
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
            answer = pool.submit(ask_vllm, str(policy), query).result(timeout=scaled(300))
        assert answer.failure is None and all(math.isfinite(value) for value in answer.logprobs)
        model = AutoModelForCausalLM.from_pretrained(policy, dtype=torch.float32)
        with torch.inference_mode():
            expected = model(torch.tensor([query.prompt])).logits[0, -1].log_softmax(-1)[:100]
        torch.testing.assert_close(torch.tensor(answer.logprobs), expected, atol=1e-4, rtol=1e-4)


def ask_vllm(model: str, query: TokenQuery) -> TokenAnswer:
    """A vLLM engine's answer about `model`."""
    from rlaif_ray.rollout.vllm_engine import EngineSpec, VllmEngine

    spec = EngineSpec(model, None, False, "float32", "cpu", 256, 1, 0.5, 0.1, seed=0, threads=2, transfer_backend=None)
    return VllmEngine(spec).token_logprobs([query])[0]


@pytest.fixture(scope="module")
def straight(folder: Path, config: Path) -> tuple[Path, Program]:
    run_dir = folder / "straight"
    return run_dir, finish_train(config, run_dir=run_dir)


def weights_hash(run_dir: Path) -> dict[str, str]:
    tensors = load_file(run_dir / "policy" / "model.safetensors")
    return {name: hashlib.sha256(tensor.numpy().tobytes()).hexdigest() for name, tensor in tensors.items()}


class TestResume:
    """The same six steps, killed in step 5 and finished: bit for bit the same."""

    @pytest.fixture(scope="class")
    def parts(self, folder: Path, config: Path) -> tuple[Path, Program, list[int], list[int], Program]:
        run_dir = folder / "resumed"
        killed = start_train(config, run_dir=run_dir)
        try:
            killed.wait_for(lambda: len(rows(run_dir / "metrics.jsonl")) >= 4)
        finally:
            killed.kill()
        steps, folders = [row["step"] for row in rows(run_dir / "metrics.jsonl")], checkpoints(run_dir)
        return run_dir, killed, steps, folders, finish_train(config, run_dir=run_dir)

    def test_it_was_killed_between_two_checkpoints(self, parts: tuple[Any, ...]) -> None:
        _, killed, steps, folders, _ = parts
        assert killed.process.returncode == -9
        assert steps[-1] in (4, 5) and folders == [3]

    def test_the_end_is_that_of_a_straight_run(self, parts: tuple[Any, ...], straight: tuple[Path, Program]) -> None:
        run_dir, _, _, _, finished = parts
        assert "resumed from" in finished.stdout and "step-3" in finished.stdout
        assert_same_end(run_dir, finished, straight[0])

    def test_wandb_knows_one_run(self, parts: tuple[Any, ...]) -> None:
        run_dir = parts[0]
        ids = {path.name.rsplit("-", 1)[1] for path in run_dir.glob("wandb/offline-run-*")}
        assert ids == {(run_dir / "wandb_run_id.txt").read_text().strip()}

    @pytest.mark.long
    def test_ctrl_c_writes_a_checkpoint_of_the_step(
        self, folder: Path, config: Path, straight: tuple[Path, Program]
    ) -> None:
        run_dir = folder / "interrupted"
        interrupted = start_train(config, run_dir=run_dir)
        try:
            interrupted.wait_for(lambda: "step 4/6" in interrupted.stdout)
            interrupted.interrupt()
            interrupted.wait()
        finally:
            interrupted.kill()
        assert interrupted.exit_code == 130, interrupted.stderr
        steps = [row["step"] for row in rows(run_dir / "metrics.jsonl")]
        assert steps in ([1, 2, 3, 4], [1, 2, 3, 4, 5])
        assert checkpoints(run_dir) == [3, steps[-1]]
        assert interrupted.left_over == []
        assert interrupted.stderr.startswith("rlaif: interrupted.\n")
        assert f"resume: rlaif train {folder / 'tiny.yaml'} run_dir={run_dir}" in interrupted.stderr
        assert "Traceback" not in interrupted.stdout + interrupted.stderr
        assert_same_end(run_dir, finish_train(config, run_dir=run_dir), straight[0])

    @pytest.mark.long
    def test_another_run_may_not_go_on_from_it(self, straight: tuple[Path, Program], config: Path) -> None:
        run_dir, _ = straight
        before = contents(run_dir)
        again = finish_train(config, "seed=1", run_dir=run_dir)
        assert again.exit_code == 2
        for words in ("seed was 0 and is 1", "another run_dir", "checkpoint.resume=never"):
            assert words in again.stderr
        assert contents(run_dir) == before


def assert_same_end(run_dir: Path, finished: Program, other: Path) -> None:
    """The bits of a run that went straight through."""
    assert finished.exit_code == 0, finished.stderr
    assert finished.left_over == []
    for ours, theirs in zip(rows(run_dir / "metrics.jsonl"), rows(other / "metrics.jsonl"), strict=True):
        assert repeatable(ours) == repeatable(theirs)
    assert rows(run_dir / "samples.jsonl") == rows(other / "samples.jsonl")
    assert rows(run_dir / "evaluations.jsonl")[-1] == rows(other / "evaluations.jsonl")[-1]
    assert weights_hash(run_dir) == weights_hash(other)
    ours, theirs = (json.loads((each / "summary.json").read_text()) for each in (run_dir, other))
    assert (ours["steps"], ours["held_out"], ours["reward"]) == (6, theirs["held_out"], theirs["reward"])


def checkpoints(run_dir: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (run_dir / "checkpoints").glob("step-*"))


def contents(run_dir: Path) -> dict[str, str]:
    files = (path for path in run_dir.rglob("*") if path.is_file())
    return {str(path): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.mark.long
class TestVariants:
    @pytest.mark.parametrize("together", [1, 2])
    def test_ranks_shards_and_replicas_change_nothing(
        self, folder: Path, config: Path, straight: tuple[Path, Program], together: int
    ) -> None:
        run_dir = folder / f"spread-{together}"
        layout = ("learner.ranks=2", "learner.zero_stage=3", "rollout.replicas=2", "evaluation.held_out.path=null")
        layout += (f"learner.sequence_parallel={together}",)
        program = finish_train(config, "steps=2", *layout, run_dir=run_dir)
        assert program.exit_code == 0, program.stderr
        assert program.left_over == []
        for ours, theirs in zip(rows(run_dir / "metrics.jsonl"), rows(straight[0] / "metrics.jsonl")[:2], strict=True):
            close = {name: pytest.approx(value, rel=1e-2, abs=2e-4) for name, value in repeatable(theirs).items()}
            assert repeatable(ours) == close | {"rollout/serving": 2}
        ours, theirs = rows(run_dir / "samples.jsonl"), rows(straight[0] / "samples.jsonl")[: 2 * 8]
        assert [row["completion"] for row in ours] == [row["completion"] for row in theirs]
        from transformers import AutoModelForCausalLM

        AutoModelForCausalLM.from_pretrained(run_dir / "policy")
        assert "held_out" not in json.loads((run_dir / "summary.json").read_text())

    def test_grpo_without_critic(self, folder: Path, config: Path) -> None:
        run_dir = folder / "grpo"
        grpo = ("algorithm.type=grpo", "algorithm.kl.target=null", "algorithm.kl.coef=0.1", "checkpoint.every=0")
        suite = "{prompts: {path: 'package:train', limit: 5}, safe: {path: 'package:heldout', limit: 4}}"
        evaluated = ("evaluation.every=1", f"evaluation.harmless={suite}")
        program = finish_train(config, *grpo, *evaluated, "steps=2", run_dir=run_dir)
        assert program.exit_code == 0, program.stderr
        first, second = rows(run_dir / "metrics.jsonl")
        assert not any(name.startswith("value/") for name in first)
        assert first["kl/coef"] == second["kl/coef"] == 0.1
        assert second["kl/mean"] > 0  # k3
        evaluations = rows(run_dir / "evaluations.jsonl")
        assert [row["step"] for row in evaluations] == [0, 1, 2]
        for row in evaluations:
            assert "which trains this policy: it grades its own pupil" in row["evaluator"]
            assert row["held_out"]["after"]["n"] == 6
            harmless, refused = row["harmless"]["rate"], row["harmless"]["over_refusal"]
            assert (harmless["n"], harmless["dropped"], refused["n"], refused["dropped"]) == (5, 0, 4, 0)
            assert 0 <= harmless["ci95_low"] <= harmless["rate"] <= harmless["ci95_high"] <= 1
        summary = json.loads((run_dir / "summary.json").read_text())
        assert summary["evaluator"] == evaluations[-1]["evaluator"]
        assert "evaluated by" in program.stdout and "safe, refused" in program.stdout
        assert [summary["harmless"][when]["step"] for when in ("before", "after")] == [0, 2]
        assert summary["harmless"]["after"]["rate"] == evaluations[-1]["harmless"]["rate"]
        (path,) = run_dir.glob("wandb/offline-run-*/run-*.wandb")
        logged = history(read_wandb(path))[2]
        assert logged["evaluation/harmless/rate/rate"] == evaluations[-1]["harmless"]["rate"]["rate"]
        assert "evaluation/harmless/over_refusal/ci95_low" in logged and "evaluation/evaluator" not in logged
        assert "time/evaluation_s" in first
        assert not (run_dir / "checkpoints").exists()

    def test_a_judge_that_fails_too_often_ends_the_run(self, folder: Path, config: Path) -> None:
        run_dir = folder / "unjudged"
        least = needed_context()
        settings = (f"feedback.judge.max_context={least}", "feedback.min_scored_fraction=0.99")
        program = finish_train(config, *settings, "evaluation.held_out.path=null", run_dir=run_dir)
        assert program.exit_code == 1
        assert program.left_over == []
        assert program.stderr.startswith("rlaif: train failed: FeedbackError: feedback.min_scored_fraction=0.99")
        assert re.search(r"got \d of 8; failures: \{'too_long': \d\}", program.stderr)
        assert "raise feedback.judge.max_context" in program.stderr
        assert f"resume: rlaif train {config} {settings[0]}" in program.stderr and str(run_dir) in program.stderr
        assert "Traceback" not in program.stderr
        assert "FeedbackError" in (run_dir / "error.log").read_text()
        assert rows(run_dir / "metrics.jsonl") == []


def needed_context() -> int:
    """The smallest context in which the tiny judge can score anything."""
    model = str(cached_tiny_model(tied=True, context=4096))
    with pytest.raises(InputError) as told:
        check_context(load_tokenizer(model), load_template("helpful"), 8, model)
    (number,) = re.findall(r"needs (\d+) tokens", str(told.value))
    return int(number)
