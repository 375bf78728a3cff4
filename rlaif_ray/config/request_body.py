"""What a judge's request may say beside what a run puts into it."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from rlaif_ray.config.sections import OpenAIJudge


def body_problems(judge: OpenAIJudge) -> Iterator[str]:
    """Parameters without which an answer could not be read, or its cost not be bounded; a line each."""
    body = judge.extra_body
    for name in ("model", "messages", "n", "stream"):
        if name in body and not (name == "stream" and not body[name]):
            instead = {"model": "Set judge.model.", "n": "Set label.reasoning.samples."}.get(name, "Remove it.")
            yield (
                f"judge.extra_body can't set {name} (got {body[name]!r}): questions are put, and answers read, by "
                f"the run. {instead}"
            )
    for name in ("logprobs", "top_logprobs"):
        if judge.answers == "logprobs" and name in body and not body[name]:
            yield (
                f"judge.extra_body can't leave out {name} with judge.answers=logprobs (got {body[name]!r}): the "
                f"probability of an answer is read there. Use judge.answers=text, whose labels are hard, or remove "
                f"it."
            )
    for name in ("max_completion_tokens", "max_tokens"):
        most = body.get(name)
        if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
            yield (
                f"judge.extra_body.{name} must be null or a whole number of at least 1 (got {most!r}): it is the most "
                f"tokens that an answer may have, and its cost is counted by it. Set it to such as 2048, or remove it."
            )
            return
    limited = body.get(judge.token_limit, 1) is not None or body.get("max_tokens") or body.get("max_completion_tokens")
    if judge.max_cost is not None and not limited:
        yield (
            f"judge.max_cost needs a limit of tokens (got {judge.token_limit}: null in judge.extra_body): an answer "
            f"could cost any sum. Give judge.extra_body a number, or set judge.token_limit to the endpoint's name."
        )
