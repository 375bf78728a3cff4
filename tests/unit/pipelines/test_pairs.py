"""Responses of several policies to the same prompts, brought together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rlaif_ray.data.columns import TokenLists
from rlaif_ray.data.prompt_table import Conversations, PromptTable
from rlaif_ray.pipelines.pairs import Source, _joined
from rlaif_ray.tracking.files import append_rows
from rlaif_ray.types import Message


def source(name: str, rows: list[int], state: Path) -> Source:
    """A policy that has answered these rows of a data set of six; the others were too long for it."""
    conversations, tokens = Conversations(None), TokenLists()
    for number in range(6):
        conversations.append(f"p{number}", [Message("user", str(number))])
        tokens.append([number])
    path = state / "responses" / f"{name}.jsonl"
    path.parent.mkdir(exist_ok=True)
    append_rows(path, [{"prompt_id": f"p{number}", "texts": [f"{name} {number}"]} for number in rows])
    policy: Any = None
    return Source(name, policy, PromptTable(conversations, tokens, rows), 64)


def test_responses_of_policies_that_leave_out_other_prompts_meet(tmp_path: Path) -> None:
    sources = [source("a", [0, 2, 3, 5], tmp_path), source("b", [1, 2, 5], tmp_path), source("c", [0], tmp_path)]
    found = {prompt.id: [row and row["texts"] for row in rows] for prompt, rows in _joined(sources, tmp_path)}
    assert found == {
        "p0": [["a 0"], None, ["c 0"]],
        "p2": [["a 2"], ["b 2"], None],
        "p3": [["a 3"], None, None],
        "p5": [["a 5"], ["b 5"], None],
    }
