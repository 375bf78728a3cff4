"""Rows of the files that data-making jobs go on from: what each must hold to be one."""

from __future__ import annotations

from typing import Annotated, Any, NotRequired

from pydantic import AfterValidator, ConfigDict, StrictFloat, StrictInt, StrictStr
from typing_extensions import TypedDict

_Reason = StrictStr | None


class TurnRow(TypedDict):
    """A message."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    role: StrictStr
    content: StrictStr


class _Sampled(TypedDict):
    prompt_id: StrictStr
    prompt: list[TurnRow]
    responses: list[StrictStr]
    tokens: list[StrictInt]
    scores: list[StrictFloat | StrictInt | None]
    failures: list[_Reason]
    unanswered: NotRequired[list[_Reason]]


def _one_for_each(row: _Sampled) -> _Sampled:
    if not len(row["responses"]) == len(row["scores"]) == len(row["failures"]):
        raise ValueError("it must have as many scores and failures as responses")
    return row


SampledRow = Annotated[_Sampled, AfterValidator(_one_for_each)]  # of a policy's responses to a prompt


class AnsweredRow(TypedDict):
    """A policy's responses to a prompt, to make pairs of."""

    prompt_id: StrictStr
    texts: list[StrictStr]
    tokens: StrictInt
    failures: NotRequired[list[_Reason]]


class StepRow(TypedDict):
    """A critique and revision."""

    __pydantic_config__ = ConfigDict(extra="forbid")  # type: ignore[misc]

    principle: StrictStr
    critique: StrictStr
    revision: StrictStr


class RevisedRow(TypedDict):
    """A prompt that was answered, and revised."""

    id: StrictStr
    prompt: list[TurnRow]
    response: StrictStr
    steps: list[StepRow]
    failure: _Reason


class ScoredRow(TypedDict):
    """A response that was judged for harm."""

    part: StrictStr
    arm: StrictStr
    response: StrictStr
    score: StrictFloat | StrictInt | None
    failure: _Reason
    tokens_in: StrictInt
    evidence: dict[str, Any]
