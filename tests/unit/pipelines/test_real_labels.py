"""Labels of real pairs against what people said of them, where ../shared/data has them."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from rlaif_ray.cli import app
from rlaif_ray.data.preferences import human_label, read_preferences
from rlaif_ray.evaluation.calibration import pairwise_accuracy

DATA = Path(__file__).parents[4] / "shared" / "data"
CONFIG = Path(__file__).parents[3] / "configs" / "demo" / "label.yaml"

pytestmark = [
    pytest.mark.realdata,
    pytest.mark.skipif(not DATA.is_dir(), reason=f"no human-labelled pairs: {DATA} is absent"),
]


# The column "pick-longer" of the data's own README, and how many pairs people decided.
@pytest.mark.parametrize(
    ("name", "accuracy", "decided"),
    [
        ("instruct_llmbar", 0.272, 419),
        ("helpful_pandalm", 0.656, 807),
        ("helpful_qa_feedback", 0.507, 300),
        ("harmless_hh_pairs", 0.431, 500),
    ],
)
def test_the_longer_response_is_right_as_often_as_the_data_says(
    name: str, accuracy: float, decided: int, tmp_path: Path
) -> None:
    output = tmp_path / "labels.jsonl"
    command = ["label", str(CONFIG), f"data.path={DATA / name}.jsonl", "judge.type=longer"]
    result = CliRunner().invoke(app, [*command, f"output={output}", f"run_dir={tmp_path / 'run'}"])
    assert result.exit_code == 0, result.output
    records = list(read_preferences(str(output)))
    labels = [(r.p_a, human_label(r)) for r in records]
    assert all(p is not None and human is not None for p, human in labels)
    found = pairwise_accuracy([p for p, _ in labels if p is not None], [h for _, h in labels if h is not None])
    assert found.n == decided and found.value == pytest.approx(accuracy, abs=5e-4)
