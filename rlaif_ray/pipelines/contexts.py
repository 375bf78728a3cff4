"""How many tokens of context engines get, and the prompts that fit in them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlaif_ray.attention import check_length, plan_attention, switch_length
from rlaif_ray.chat.template import WITHOUT_THOUGHTS, ChatTemplate
from rlaif_ray.data.prompts import load_prompts
from rlaif_ray.errors import InputError
from rlaif_ray.models import context_length, load_config, load_tokenizer

if TYPE_CHECKING:
    from rlaif_ray.config.sections import DataConfig, PolicyConfig
    from rlaif_ray.data.prompt_table import PromptTable

JUDGE_CONTEXT = 4096  # tokens; more only on request: the key-value cache must hold one such prompt


def load_chat(model: Any, date: str | None, key: str, *, thinks: bool = True) -> ChatTemplate:
    """A model's tokenizer with its chat template, as the config has it and as of the run's date.

    `model` is a config section with model, revision, trust_remote_code and chat_template_kwargs; `key` is its name.
    `thinks`: whether the template decides if the model thinks before it answers; else it does not, unless told to.

    Raises:
        InputError: there is no such model, or its template does not take its arguments.
    """
    tokenizer = load_tokenizer(model.model, revision=model.revision, trust_remote_code=model.trust_remote_code)
    defaults = {} if thinks else WITHOUT_THOUGHTS
    return ChatTemplate(tokenizer, model.chat_template_kwargs, date, defaults=defaults, key=key)


def readable_context(model: Any, wanted: int | None, key: str) -> int:
    """Tokens of context to use of a model: all, or what the config asks for under `key`.

    `model` is a config section with model, revision and trust_remote_code.

    Raises:
        InputError: the model can't read as many as asked for.
    """
    config = load_config(model.model, revision=model.revision, trust_remote_code=model.trust_remote_code)
    has = context_length(config)
    if wanted is not None and has is not None and wanted > has:
        raise InputError(
            f"{key} must not exceed the {has} tokens that {model.model} can read (got {wanted}). Lower it."
        )
    return wanted or has or 2048


def check_attention(policy: PolicyConfig, longest: int = 0) -> None:
    """Raises InputError when the learner would compute other numbers than the model's: before anything starts.

    `longest`: tokens of the longest sample.
    """
    config = load_config(policy.model, revision=policy.revision, trust_remote_code=policy.trust_remote_code)
    plan_attention(policy.attention, config, policy.model)
    check_length(config, policy.model, longest)


def judge_context(judge: Any, key: str) -> int:
    """Tokens of context of a judge's engines: what the config asks for, else up to JUDGE_CONTEXT."""
    wanted = judge.max_context or min(JUDGE_CONTEXT, readable_context(judge, None, key))
    return readable_context(judge, wanted, key)


def engine_context(needed: int, room: int) -> int:
    """`needed` tokens rounded up to whole blocks of 32, at most the `room` that the model has."""
    return min(room, -(-needed // 32) * 32)


def policy_prompts(
    policy: PolicyConfig,
    data: DataConfig,
    max_context: int | None,
    max_new_tokens: int,
    date: str | None,
    key: str = "policy",
) -> tuple[PromptTable, int]:
    """A policy's prompts, and the context its engines need for them and an answer each. `key` is its section.

    Raises:
        InputError: the data, the model or the context is wrong.
    """
    chat, room = policy_room(policy, max_context, max_new_tokens, date, key)
    prompts = read_prompts(data, chat, room - max_new_tokens)
    return prompts, max_context or engine_context(prompts.longest + max_new_tokens, room)


def policy_room(
    policy: PolicyConfig,
    max_context: int | None,
    max_new_tokens: int,
    date: str | None,
    key: str = "policy",
    *,
    trained: bool = False,
) -> tuple[ChatTemplate, int]:
    """A policy's chat template, and how many tokens of context it has for a prompt and an answer. `trained`: engine and
    learner must compute it alike.

    Raises:
        InputError: the model or the context is wrong.
    """
    chat = load_chat(policy, date, key)
    room = readable_context(policy, max_context, "rollout.max_context")
    if trained:
        room = _alike_context(policy, max_context, room)
    if room <= max_new_tokens:
        raise InputError(
            f"sampling.max_new_tokens must leave room for a prompt in the {room} tokens of context of "
            f"{policy.model} (got {max_new_tokens}). Lower it."
        )
    return chat, room


def _alike_context(policy: PolicyConfig, max_context: int | None, room: int) -> int:
    """Of `room` tokens of context as many as engine and learner compute alike.

    Raises:
        InputError: the config asks for more.
    """
    code: dict[str, Any] = {"revision": policy.revision, "trust_remote_code": policy.trust_remote_code}
    switch = switch_length(load_config(policy.model, **code))
    if switch is None:
        return room
    if max_context is not None and max_context > switch:
        raise InputError(
            f"rollout.max_context must not exceed {switch} for training {policy.model} (got {max_context}): beyond, "
            f"vLLM takes the model's long RoPE factors for texts of every length, and the learner for long ones alone. "
            f"Set rollout.max_context={switch} or less, or use another model."
        )
    return min(room, switch)


def read_prompts(data: DataConfig, chat: ChatTemplate, longest: int) -> PromptTable:
    """The prompts of a config's section, none with more tokens than `longest`.

    Raises:
        InputError: the data is wrong.
    """
    return load_prompts(
        data.path,
        split=data.split,
        column=data.column,
        limit=data.limit,
        system=data.system,
        tokenizer=chat,
        max_prompt_tokens=min(longest, data.max_prompt_tokens or longest),
        too_long=data.too_long,
    ).prompts
