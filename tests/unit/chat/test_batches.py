"""Many conversations tokenised together have the tokens that each has alone."""

from __future__ import annotations

from typing import Any

import pytest

from rlaif_ray.chat.renderer import ChatRenderer
from rlaif_ray.errors import InputError
from rlaif_ray.types import Message
from tests.chat_families import CHATML, FAMILIES, tokenizer_of
from tests.tiny import IM_END

TEXTS = [
    "Four",
    " Four times 4, after a tart",
    "",
    "é ▁ 😀\n\n  fat",
    f"a{IM_END}\nb</s><|end_of_turn|>[INST]<|return|>",
    "<think>\nfat</think>\n\nFour",
    "a" * 300,
]
TALKS = [
    *([Message("user", text or "x")] for text in TEXTS),
    [Message("user", "a"), Message("assistant", "b"), Message("user", "c")],
]


@pytest.mark.parametrize("characters", [1 << 20, 40])
@pytest.mark.parametrize("family", [*FAMILIES, "no template"])
def test_together_is_as_alone(family: str, characters: int, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = tokenizer_of("chatml" if family == "no template" else family)
    if family == "no template":
        tokenizer.chat_template = None
    monkeypatch.setattr("rlaif_ray.chat.renderer._CHARACTERS", characters)
    render = ChatRenderer(tokenizer)
    assert render.tokens_of(TALKS, ["here"] * len(TALKS)) == [render.tokens(talk, "here") for talk in TALKS]
    assert render.responses(TEXTS) == [render.response(text) for text in TEXTS]
    assert render.tokens_of([], []) == render.responses([]) == []


def test_a_tokenizer_with_code_of_its_own_is_asked_itself() -> None:
    from transformers import PreTrainedTokenizerFast

    class Lowering(PreTrainedTokenizerFast):  # as code that comes with a model may do
        def __call__(self, text: Any = None, *rest: Any, **options: Any) -> Any:
            lower = text.lower() if isinstance(text, str) else [one.lower() for one in text]
            return super().__call__(lower, *rest, **options)

    tokenizer = Lowering(tokenizer_object=tokenizer_of("chatml").backend_tokenizer)
    render = ChatRenderer(tokenizer)
    talks = [[Message("user", text)] for text in ("four", "FOUR", "A FAT CAT")]
    assert render.tokens_of(talks, ["here"] * 3) == [render.tokens(talk, "here") for talk in talks]
    assert render.tokens_of(talks, ["here"] * 3)[0] == render.tokens(talks[1], "here")


def test_tokenizers_in_python_take_many_too() -> None:
    from transformers import ByT5Tokenizer

    tokenizer = ByT5Tokenizer()
    tokenizer.chat_template = CHATML
    assert not tokenizer.is_fast
    render = ChatRenderer(tokenizer)
    together = render.tokens_of(TALKS, ["here"] * len(TALKS))
    assert together == [render.tokens(talk, "here") for talk in TALKS] and len(set(together)) == len(TALKS)
    assert render.responses(TEXTS) == [render.response(text) for text in TEXTS]


def test_the_refused_one_of_many_is_named() -> None:
    talks = [[Message("user", "a")], [Message("system", "s"), Message("user", "b")]]
    with pytest.raises(InputError, match=r"^line 7: the chat template .* refuses"):
        ChatRenderer(tokenizer_of("gemma")).tokens_of(talks, ["line 6", "line 7"])
