"""Types of settings about chat templates and what is read of a response."""

from __future__ import annotations

from datetime import date
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field

# Parameters of transformers' apply_chat_template, which are ours to set.
_NOT_FOR_TEMPLATES = {"conversation", "messages", "chat_template", "add_generation_prompt", "continue_final_message"}
_NOT_FOR_TEMPLATES |= {"tokenize", "padding", "truncation", "max_length", "return_tensors", "return_dict"}
_NOT_FOR_TEMPLATES |= {"return_assistant_tokens_mask", "tokenizer_kwargs", "tools", "documents", "strftime_now"}


def _template_arguments(values: dict[str, Any]) -> dict[str, Any]:
    wrong = sorted(_NOT_FOR_TEMPLATES & values.keys())
    if wrong:
        raise ValueError(
            f"chat_template_kwargs can't set {', '.join(wrong)}: the run does. Name variables of the model's own "
            "template, such as enable_thinking."
        )
    return values


TemplateArguments = Annotated[dict[str, Any], AfterValidator(_template_arguments)]
Thoughts = Literal["cut", "keep"]


def _day(value: Any) -> Any:
    """YAML reads 2026-11-30 as a date where it is not quoted."""
    if value is None:
        return None
    try:
        return value.isoformat() if type(value) is date else date.fromisoformat(value).isoformat()
    except (TypeError, ValueError):
        raise ValueError(f"chat_date must be a day such as 2026-11-30 (got {value!r}). Correct it.") from None


ChatDate = Annotated[
    str | None,
    BeforeValidator(_day),
    Field(description="Today to chat templates that write a date; null: the day when the run first started."),
]
