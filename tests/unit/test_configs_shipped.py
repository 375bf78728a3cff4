"""Every YAML file under configs/ is a valid config of its job."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest

from rlaif_ray.config.jobs import JOBS
from rlaif_ray.config.load import load_job
from rlaif_ray.config.pipeline import load_pipeline
from rlaif_ray.pipelines.pipeline import jobs_of, place, plan_pipeline
from rlaif_ray.runtime.placement import actor_slots, job_needs, totals

CONFIGS = Path(__file__).parents[2] / "configs"
FILES = sorted(path.relative_to(CONFIGS) for path in CONFIGS.rglob("*.y*ml"))

# The first pattern that fits a file's name tells its job. A file that none fits fails: add its pattern.
JOB_OF_NAME = {
    "train*": "train",
    "pairs*": "pairs",
    "label*": "label",
    "revise*": "revise",
    "sft*": "sft",
    "reward_model*": "reward-model",
    "dpo*": "dpo",
    "best_of_n*": "sample",
    "alignment*": "evaluate",
    "evaluate*": "evaluate",
}
OF_STAGES = sorted(
    path for path in FILES if path.parts[0] in ("pipelines", "reference") or path.stem.startswith("pipeline")
)  # several jobs a file
OVER = {Path("pipelines/nodes.yaml"): [Path("pipelines/8gpu.yaml")]}  # what a file is merged over


def job_of(file: Path) -> str:
    if file.parts[0] == "cluster":  # named after what they run on
        return "train"
    for pattern, job in JOB_OF_NAME.items():
        if fnmatch(file.stem, pattern):
            return job
    pytest.fail(f"configs/{file}: of which job? Name it after one ({', '.join(JOBS)}), or extend JOB_OF_NAME.")


def test_every_pattern_names_a_job() -> None:
    assert set(JOB_OF_NAME.values()) <= set(JOBS)


@pytest.mark.parametrize("file", [file for file in FILES if file not in OF_STAGES], ids=str)
def test_shipped_config_loads(file: Path) -> None:
    missing = ["data.path=labelled.jsonl"] if file.stem == "alignment" else []  # the user's own
    assert load_job(job_of(file), [CONFIGS / file], missing).config


@pytest.mark.parametrize("file", OF_STAGES, ids=str)
def test_shipped_pipeline_loads_and_is_planned(file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(CONFIGS.parent)  # stages name shipped files
    files = [CONFIGS / one for one in (*OVER.get(file, []), file)]
    pipeline = load_pipeline(files)
    plan = plan_pipeline(pipeline)
    assert all(f"{stage.name}: {stage.job}" in plan for stage in pipeline.stages)
    # All that a stage asks for at a time, of one node with 8 GPUs and of five.
    gpus = {"8gpu": 8, "nodes": 40}.get(file.stem, 8 if file.parts[0] == "reference" else 0)
    device = "cuda" if gpus else "cpu"
    jobs = [job for one in place(pipeline).values() for job in jobs_of(one) if job_needs(job)]
    asked = [totals(actor_slots(job, device))["GPU"] for job in jobs]  # type: ignore[arg-type]
    assert max(asked) == gpus and (not gpus or min(asked) > gpus / 2)


@pytest.mark.parametrize("file", [file for file in OF_STAGES if file.parts[0] != "reference"], ids=str)
def test_shipped_pipelines_have_the_arms_of_an_honest_comparison(file: Path) -> None:
    """DPO on the same labels, best-of-n against the judge; on clusters also the judge's own answers (Sharma et al.)."""
    pipeline = load_pipeline([CONFIGS / one for one in (*OVER.get(file, []), file)])
    jobs = {stage.name: stage for stage in pipeline.stages}
    labels = {jobs[name].config.data.path for name in ("dpo", "reward-model")}
    assert labels == {"stage:label"}
    best = next(stage for name, stage in jobs.items() if name.startswith("best-of") and stage.job == "sample")
    assert best.config.sampling.samples_per_prompt > 1 and best.config.feedback.type == "judge"
    if file.parts[0] == "pipelines":
        teacher = jobs["teacher"].config
        assert teacher.policy.model == jobs["label"].config.judge.model
        assert teacher.data.path == jobs["revise"].config.data.path
        assert jobs["teacher-sft"].config.data.path == "stage:teacher"


@pytest.mark.parametrize("task", ["summarize", "helpful", "harmless"])
def test_reference_tasks_are_set_up_as_the_paper_did(task: str) -> None:
    """RLAIF and RLHF differ in their labels alone (Lee et al. 2309.00267, appendices F and G; METHOD section 2)."""
    stages = {stage.name: stage.config for stage in load_pipeline([CONFIGS / "reference" / f"{task}.yaml"]).stages}
    ai, human = stages["reward-model-ai"], stages["reward-model-human"]
    assert ai.data.path == "stage:label" and human.data.path == stages["label"].data.path
    assert (ai.reward.labels, human.reward.labels) == ("soft", "hard")
    assert ai.reward.batch_size == human.reward.batch_size == (128 if task == "summarize" else 32)
    for arm in ("rlaif", "rlhf"):
        rl = stages[arm]
        assert (rl.algorithm.type, rl.sampling.batch_size, rl.sampling.temperature) == ("reinforce", 128, 0.9)
        assert rl.algorithm.kl.coef == pytest.approx(0.05 / 0.95, abs=1e-4) and rl.learner.lr == 1e-5
    assert stages["rlaif"].model_dump(exclude={"feedback"}) == stages["rlhf"].model_dump(exclude={"feedback"})
    evaluation = stages["evaluate"]
    assert evaluation.judge.model != stages["label"].judge.model and {"sft", "rlaif", "rlhf"} <= set(evaluation.arms)
    assert (evaluation.harmless is not None) == (task == "harmless")


def test_the_demo_is_shipped() -> None:
    assert any(file.parent == Path("demo") and job_of(file) == "train" for file in FILES if file not in OF_STAGES)
