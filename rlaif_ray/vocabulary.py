"""Whether a model's tokenizer can be used: its format, and an embedding for every token that a text can become."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from rlaif_ray.errors import InputError

_TOKENIZERS = ("tokenizer.json", "tokenizer.model")
# Tokens that stand for what is no text: some tokenizers of models without eyes have them too (Gemma 3 1B).
_OF_OTHER_SENSES = re.compile(r"image|img|vision|video|audio|sound|speech", re.IGNORECASE)


def check_format(source: Path | str, revision: str | None = None) -> None:
    """Raises InputError where a model, in a folder or the Hub's local cache, has no tokenizer but Mistral's own."""
    if isinstance(source, Path):
        folder = source
    else:
        from huggingface_hub import try_to_load_from_cache

        found = try_to_load_from_cache(source, "tekken.json", revision=revision)
        if not isinstance(found, str):
            return
        folder = Path(found).parent
    if (folder / "tekken.json").is_file() and not any((folder / name).is_file() for name in _TOKENIZERS):
        raise InputError(
            f"model {str(source)!r} needs its tokenizer in Hugging Face's format (got tekken.json alone, without "
            f"{' or '.join(_TOKENIZERS)}): no chat template can be read from Mistral's. Take "
            f"tokenizer.json and tokenizer_config.json from a copy of the model that has them, or use another model."
        )


def check_vocabulary(tokenizer: Any, rows: int, name: str) -> None:
    """Raises InputError where a text could get a token for which model `name`, with `rows` embeddings, has none.

    A token that only pads needs none: padding is masked by length, and no text becomes it.
    """
    last = max(len(tokenizer) - 1, *tokenizer.added_tokens_decoder, 0)  # id, where the vocabulary has no gaps
    if last < rows:
        return
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(tokenizer.all_special_tokens)
    roles = [value for name, value in tokenizer.special_tokens_map.items() if name != "pad_token"]
    pads = tokenizer.pad_token if tokenizer.pad_token not in _texts(roles) else None
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= rows}
    reached = sorted(
        (index, token)
        for token, index in beyond.items()
        if token != pads and (token not in special or not _OF_OTHER_SENSES.search(token))
    )
    if reached:
        (index, token), more = reached[0], len(reached) - 1
        raise InputError(
            f"the tokenizer of model {name!r} has more tokens than the model has embeddings (got {token!r} with id "
            f"{index}{f' and {more} more' if more else ''} for {rows} rows): such a token would end the run. Give the "
            f"tokenizer that belongs to the model, or enlarge the model, by model.resize_token_embeddings("
            f"{max(beyond.values()) + 1}), and save both."
        )


def _texts(values: Iterable[Any]) -> set[str]:
    """Of special tokens, some of which stand in lists."""
    return {str(text) for value in values for text in (value if isinstance(value, list | tuple) else (value,))}
