"""Every YAML file under configs/ is a valid config of its job."""

from __future__ import annotations

from fnmatch import fnmatch
from pathlib import Path

import pytest

from rlaif_ray.config.jobs import JOBS
from rlaif_ray.config.load import load_job

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
}


def job_of(file: Path) -> str:
    for pattern, job in JOB_OF_NAME.items():
        if fnmatch(file.stem, pattern):
            return job
    pytest.fail(f"configs/{file}: of which job? Name it after one ({', '.join(JOBS)}), or extend JOB_OF_NAME.")


def test_every_pattern_names_a_job() -> None:
    assert set(JOB_OF_NAME.values()) <= set(JOBS)


@pytest.mark.parametrize("file", FILES, ids=str)
def test_shipped_config_loads(file: Path) -> None:
    assert load_job(job_of(file), [CONFIGS / file]).config


def test_the_demo_is_shipped() -> None:
    assert any(file.parent == Path("demo") and job_of(file) == "train" for file in FILES)
