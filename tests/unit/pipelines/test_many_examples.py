"""Many examples to train on: progress while they are read, and nothing that grows with them by more than its tokens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlaif_ray.chat.renderer import ChatRenderer
from rlaif_ray.config.data_sections import SupervisedConfig
from rlaif_ray.config.jobs import DpoJob, SftJob
from rlaif_ray.learner.dpo import DpoExample
from rlaif_ray.learner.supervised import PairExample
from rlaif_ray.pipelines import supervised
from rlaif_ray.pipelines.dpo import Referred
from rlaif_ray.pipelines.pair_examples import read_pairs
from rlaif_ray.pipelines.supervised import batch_of, read_sft_inputs
from rlaif_ray.runtime import groups
from tests.tiny import cached_tiny_model

ROW = {"prompt": "2 + 2?", "response": "4", "chosen": "4", "rejected": "5"}


@pytest.mark.parametrize(
    ("name", "columns", "title"),
    [("sft", ("prompt", "response"), "conversations"), ("dpo", ("prompt", "chosen", "rejected"), "pairs")],
)
def test_progress_is_shown_while_examples_are_read(
    name: str,
    columns: tuple[str, ...],
    title: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    for module in ("supervised", "pair_examples"):
        monkeypatch.setattr(f"rlaif_ray.pipelines.{module}.SILENT_S", 0.0)
    (tmp_path / "d.jsonl").write_text((json.dumps({key: ROW[key] for key in columns}) + "\n") * 300)
    job = {"policy": {"model": str(cached_tiny_model(tied=True))}, "data": {"path": str(tmp_path / "d.jsonl")}}
    if name == "sft":
        inputs: Any = read_sft_inputs(SftJob.model_validate({**job, "sft": {"held_out_fraction": 0}}))
    else:
        inputs, _ = read_pairs(DpoJob.model_validate({**job, "dpo": {"held_out_fraction": 0}}), ChatRenderer.turn_end)
    assert len(inputs.train) == 300 and len(set(inputs.train)) == 1
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith(f"reading {title}: 256/300 {title}  ")
    assert shown[-1].startswith(f"reading {title}: 300/300 {title}  ")


def test_an_epoch_is_shuffled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    supervised._epoch_order.cache_clear()
    cfg = SupervisedConfig(epochs=1, batch_size=2)
    for step in range(1, 6):
        batch_of(cfg, range(10), step, seed=3)
    found = supervised._epoch_order.cache_info()
    assert (found.misses, found.hits) == (1, 4) and memoryview(supervised._epoch_order(10, 3, 0)).nbytes == 40


def test_pairs_with_their_reference() -> None:
    pairs = [PairExample((1,), (2,), (3,), p) for p in (0.0, 0.5, 1.0)]
    said = [(-1.0, -2.0), (-3.0, -4.0), (-5.0, -6.0)]
    expected = [DpoExample(pair, *both) for pair, both in zip(pairs, said, strict=True)]
    table = Referred(pairs, said)
    assert list(table) == expected and table[1:] == expected[1:] and table[-1] == expected[-1] and len(table) == 3


def test_ranks_are_asked_about_some_examples_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(groups, "_ASKED_AT_A_TIME", 4)
    asked = []

    class Group(groups.SupervisedGroup[Any]):
        def __init__(self) -> None: ...

        def _planned(self, verb: str, examples: Any) -> list[Any]:
            asked.append(len(examples))
            return [{i: verb + str(one) for i, one in enumerate(examples) if i % 2 == rank} for rank in (0, 1)]

    assert Group()._of_each("x", range(10)) == [f"x{k}" for k in range(10)] and asked == [4, 4, 2]
    assert Group()._of_each("x", []) == []
