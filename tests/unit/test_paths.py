"""Names that come with data or results name no file outside of the run folder."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlaif_ray.config.jobs import EvaluateJob, PairsJob
from rlaif_ray.config.load import load_job
from rlaif_ray.config.pipeline import load_pipeline
from rlaif_ray.errors import CheckpointError, InputError
from rlaif_ray.evaluation.report.runs import _stage_folders
from rlaif_ray.pipelines.checkpoint import _steps
from rlaif_ray.storage import Place, StoredFolder
from rlaif_ray.tracking.wandb_run import keep_run_id
from tests.jobs import embedded

NAMES = [
    "../x",
    "a/../../x",
    "/etc/x",
    "..",
    ".hidden",
    "a\0b",
    "a\nb",
    "x" * 5000,
    "é" * 60,
    "",
    "a\\b",
    "\ud800" * 99,
]


@pytest.fixture(params=NAMES, ids=lambda name: ascii(name[:12]))
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    yield request.param


def test_arms_and_policies_have_names_that_can_be_files(name: str) -> None:
    for make, values in (
        (EvaluateJob, {"arms": {name: {"model": "m"}, "base": {"model": "n"}}}),
        (PairsJob, {"other_policies": {name: {"model": "m"}}}),
    ):
        with pytest.raises(ValueError, match="must have names that can be a file's"):
            embedded(make, values)  # type: ignore[attr-defined]


@pytest.mark.parametrize("good", ["base", "rlaif-2", "d_RLAIF", "Claude 3.5", "straße"])
def test_usual_names_are_fine(good: str) -> None:
    embedded(PairsJob, {"other_policies": {good: {"model": "m"}}})


def test_stages(name: str, tmp_path: Path) -> None:
    path = tmp_path / "p.yaml"
    path.write_text(json.dumps({"stages": {name: {"job": "sft", "data": {"path": "x"}}}}), "utf-8", "backslashreplace")
    with pytest.raises(InputError):
        load_pipeline([path])


def test_a_report_opens_no_stage_elsewhere(name: str, tmp_path: Path) -> None:
    """Whatever a summary says of the names of stages."""
    folder, secret = tmp_path / "run", tmp_path / "x-1"
    (folder / "stages").mkdir(parents=True)
    (folder / "latest").mkdir()
    (folder / "summary.json").write_text("{}")
    secret.mkdir()
    (secret / "resolved.yaml").write_text("steps: 1")
    (folder / "latest" / "linked").symlink_to(secret)
    for told in (name, f"../{name}", "../../x", str(tmp_path / "x")):
        assert _stage_folders(folder, [{"name": told, "hash": "1"}]) == []


def test_a_checkpoint_names_no_file_elsewhere(name: str, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="no"):
        StoredFolder(Place(str(tmp_path)), {}).file(name)
    assert _steps(Place(str(tmp_path / "nowhere"))) == []


def test_a_wandb_id_from_a_checkpoint_is_one_of_ours(name: str, tmp_path: Path) -> None:
    keep_run_id(tmp_path, name)
    assert list(tmp_path.iterdir()) == []
    keep_run_id(tmp_path, "0a1b2c3d")
    assert (tmp_path / "wandb_run_id.txt").read_text() == "0a1b2c3d\n"


def test_a_password_in_an_address_is_nowhere_in_the_message(tmp_path: Path) -> None:
    path = tmp_path / "c.yaml"
    path.write_text("checkpoint: {path: 's3://AKIAX:geheim@bucket/x'}\n")
    for files, settings in (([path], []), ([], ["checkpoint.path=s3://AKIAX:geheim@bucket/x"])):
        with pytest.raises(
            InputError, match=r"checkpoint\.path must not hold a secret .* user or password before the @"
        ) as told:
            load_job("train", files, settings)
        assert "geheim" not in str(told.value) and "AKIAX" not in str(told.value)
