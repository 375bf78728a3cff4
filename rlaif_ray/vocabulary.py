"""Whether a model has an embedding for every token that a text can become."""

from __future__ import annotations

import re
from typing import Any

from rlaif_ray.errors import InputError

# Tokens that stand for what is no text: some tokenizers of models without eyes have them too (Gemma 3 1B).
_OF_OTHER_SENSES = re.compile(r"image|img|vision|video|audio|sound|speech", re.IGNORECASE)


def check_vocabulary(tokenizer: Any, rows: int, name: str) -> None:
    """Raises InputError where a text could get a token for which model `name`, with `rows` embeddings, has none."""
    last = max(len(tokenizer) - 1, *tokenizer.added_tokens_decoder, 0)  # id, where the vocabulary has no gaps
    if last < rows:
        return
    special = {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
    special |= set(tokenizer.all_special_tokens)
    beyond = {token: index for token, index in tokenizer.get_vocab().items() if index >= rows}
    reached = sorted(
        (index, token) for token, index in beyond.items() if token not in special or not _OF_OTHER_SENSES.search(token)
    )
    if reached:
        (index, token), more = reached[0], len(reached) - 1
        raise InputError(
            f"the tokenizer of model {name!r} has more tokens than the model has embeddings (got {token!r} with id "
            f"{index}{f' and {more} more' if more else ''} for {rows} rows): such a token would end the run. Give the "
            f"tokenizer that belongs to the model, or enlarge the model, by model.resize_token_embeddings("
            f"{max(beyond.values()) + 1}), and save both."
        )
