"""Tiny random models for tests: real ones to transformers, vLLM and DeepSpeed, and made in under a second.

They speak no language. What tests need is that greedy outputs follow from the weights, so that an engine with stale
weights shows, and that the tokenizer has the real ones' traps: pad is not EOS, "10" is one token or two.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from rlaif_ray.models import build_folder_once

PAD, IM_START, IM_END = "<|pad|>", "<|im_start|>", "<|im_end|>"
VOCABULARY = 320

CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)

# Words that get tokens of their own (Ġ is the byte-level space), besides every byte; as many as the vocabulary holds.
_SPACED = ["Ġthe", "Ġis", "Ġand", "Ġyou", "Ġto", "Ġin", "Ġgood", "Ġa", "ĠA", "ĠB"]
_WORDS = ["er", "on", "re", "at", "user", "assistant", "system", "help", "answer", "response", "better", "which"]
_WORDS += ["harm", "prefer", "question", "because"]


def make_tokenizer(folder: Path | None, *, ten_is_one_token: bool = False) -> Any:
    """A byte-level BPE tokenizer of 320 tokens, saved into `folder` if there is one.

    Adds no BOS by itself. Digits are single tokens, but for "10" when `ten_is_one_token`.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = [PAD, IM_START, IM_END]
    tokens = specials + sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("1", "0")] if ten_is_one_token else []
    for word in _SPACED + _WORDS:
        merges += [merge for merge in _merges(word) if merge not in merges]
    for left, right in merges:
        if left + right not in tokens:
            tokens.append(left + right)
    tokens = tokens[:VOCABULARY]
    assert len(tokens) == VOCABULARY
    known = set(tokens)

    backend = Tokenizer(
        models.BPE(
            vocab={token: index for index, token in enumerate(tokens)},
            merges=[merge for merge in merges if merge[0] + merge[1] in known],
        )
    )
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=PAD,
        bos_token=IM_START,
        eos_token=IM_END,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )
    if folder is not None:
        tokenizer.save_pretrained(folder)
    return tokenizer


def _merges(word: str) -> list[tuple[str, str]]:
    """The merges that build a word up: letter by letter, then the space before it."""
    start = 1 if word.startswith("Ġ") else 0
    steps = [(word[start:end], word[end]) for end in range(start + 1, len(word))]
    return steps + ([("Ġ", word[1:])] if start else [])


def make_tiny_model(
    folder: Path,
    *,
    tied: bool,
    ten_is_one_token: bool = False,
    seed: int = 0,
    layers: int = 2,
    hidden: int = 64,
    heads: int = 2,
    kv_heads: int = 1,
    context: int = 512,
    spread: float = 0.2,
) -> Path:
    """A random fp32 Llama with its tokenizer, saved into `folder`; the same seed gives the same bytes."""
    import torch
    from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

    folder = Path(folder)
    tokenizer = make_tokenizer(None, ten_is_one_token=ten_is_one_token)
    tokenizer.model_max_length = context
    ids = {
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=32,  # the smallest that vLLM's CPU attention takes
        max_position_embeddings=context,
        tie_word_embeddings=tied,
        initializer_range=spread,  # at the usual 0.02 a random model repeats one token whatever its weights
        **ids,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).to(torch.float32)
    model.generation_config = GenerationConfig(**ids)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def cached_tiny_model(**kwargs: Any) -> Path:
    """`make_tiny_model(**kwargs)`, made once on this machine and shared by all tests and their processes: read only.

    Lives under `$RLAIF_TEST_CACHE`, else under the temporary folder; a change of this file makes new ones.
    """
    import transformers

    kwargs.setdefault("tied", True)
    recipe = json.dumps([kwargs, transformers.__version__], sort_keys=True) + Path(__file__).read_text()
    key = hashlib.sha256(recipe.encode()).hexdigest()[:16]
    root = Path(os.environ.get("RLAIF_TEST_CACHE") or Path(tempfile.gettempdir()) / f"rlaif-ray-tiny-{os.getuid()}")
    return build_folder_once(root / f"tiny-{key}", lambda folder: make_tiny_model(folder, **kwargs))
