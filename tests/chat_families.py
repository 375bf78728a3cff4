"""Chat templates as families of models have them, cut down to what makes each of them a trap."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tests.tiny import CHAT_TEMPLATE, VOCABULARY, cached_tiny_model, make_tokenizer

CHATML = CHAT_TEMPLATE

# An empty thought in the last answer; enable_thinking=false puts it into the generation prompt; thoughts of earlier
# answers are cut.
QWEN3 = r"""
{%- set last = namespace(user=-1) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set last.user = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}
{%- if m.role == 'assistant' %}
{%- set thought, content = '', m.content %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}
{{- '<|im_start|>assistant\n' }}
{%- if loop.index0 > last.user %}{{- '<think>\n' + thought + '\n</think>\n\n' }}{%- endif %}
{{- content + '<|im_end|>\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and enable_thinking is false %}{{- '<think>\n\n</think>\n\n' }}{%- endif %}
{%- endif %}"""

# The generation prompt opens the thought; answers are written without it, and thoughts of answers are cut.
DEEPSEEK_R1 = r"""
{%- for m in messages %}
{%- if m.role == 'system' %}{{- m.content }}{%- endif %}
{%- if m.role == 'user' %}{{- '<|User|>' + m.content }}{%- endif %}
{%- if m.role == 'assistant' %}{{- '<|Assistant|>' + m.content.split('</think>')[-1] + '<|im_end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|Assistant|><think>\n' }}{%- endif %}"""

# Both: the generation prompt opens the thought, and the last answer has an empty one.
QWEN3_THINKING = QWEN3[: QWEN3.rindex("{%- if enable_thinking")] + r"{{- '<think>\n' }}{%- endif %}"

# The date, which only a clock knows.
LLAMA31 = r"""
{%- if not date_string is defined %}
{%- if strftime_now is defined %}{%- set date_string = strftime_now("%d %b %Y") %}
{%- else %}{%- set date_string = "26 Jul 2024" %}{%- endif %}
{%- endif %}
{%- if messages[0].role == 'system' %}{%- set system, messages = messages[0].content.strip(), messages[1:] %}
{%- else %}{%- set system = '' %}{%- endif %}
{{- '<|im_start|>system\n\nToday Date: ' + date_string + '\n\n' + system + '<|im_end|>' }}
{%- for m in messages %}{{- '<|im_start|>' + m.role + '\n\n' + m.content | trim + '<|im_end|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n\n' }}{%- endif %}"""

# The system message is left out without a word.
PHI3 = r"""
{%- for m in messages %}
{%- if m.role == 'user' %}{{- '<|user|>\n' + m.content + '<|end|>\n<|assistant|>\n' }}
{%- elif m.role == 'assistant' %}{{- m.content + '<|end|>\n' }}{%- endif %}
{%- endfor %}"""

# The system message is refused.
GEMMA = r"""
{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}{%- endif %}
{%- for m in messages %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim + '<end_of_turn>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\n' }}{%- endif %}"""

# Answers come in a channel that the model names itself.
HARMONY = r"""
{%- for m in messages %}
{%- if m.role == 'assistant' %}{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}
{%- else %}{{- '<|start|>' + m.role + '<|message|>' + m.content + '<|end|>' }}{%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start|>assistant' }}{%- endif %}"""

# A blank before the answer, which joins the answer's first word. The marks of turns are text.
LLAMA2 = r"""
{%- if messages[0].role == 'system' %}{%- set system, messages = messages[0].content, messages[1:] %}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{%- set start = '<<SYS>>\n' + system + '\n<</SYS>>\n\n' if loop.first and system is defined else '' %}
{{- bos_token + '[INST] ' + start + m.content + ' [/INST]' }}
{%- else %}{{- ' ' + m.content + ' ' + eos_token }}{%- endif %}
{%- endfor %}"""

# The same with marks that are control tokens, and a blank that is all there is between one and the answer.
MISTRAL = r"""
{{- bos_token }}
{%- if messages[0].role == 'system' %}{%- set system, messages = messages[0].content, messages[1:] %}{%- endif %}
{%- for m in messages %}
{%- if m.role == 'user' %}
{{- '[INST] ' + (system + '\n\n' if loop.last and system is defined else '') + m.content + '[/INST]' }}
{%- else %}{{- ' ' + m.content + eos_token }}{%- endif %}
{%- endfor %}"""

OPENCHAT = r"""
{{- bos_token }}
{%- for m in messages %}{{- 'GPT4 Correct ' + m.role.title() + ': ' + m.content + '<|end_of_turn|>' }}{%- endfor %}
{%- if add_generation_prompt %}{{- 'GPT4 Correct Assistant:' }}{%- endif %}"""

# No control tokens at all.
FALCON = r"""
{%- for m in messages %}{{- m.role.title() + ': ' + m.content + '\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- 'Assistant:' }}{%- endif %}"""

FAMILIES = {
    "chatml": CHATML,
    "qwen3": QWEN3,
    "deepseek-r1": DEEPSEEK_R1,
    "qwen3-thinking": QWEN3_THINKING,
    "llama-3.1": LLAMA31,
    "phi-3": PHI3,
    "gemma": GEMMA,
    "harmony": HARMONY,
    "llama-2": LLAMA2,
    "mistral": MISTRAL,
    "openchat": OPENCHAT,
    "falcon": FALCON,
}

# Control tokens of families whose tokenizer works on whole texts with their blanks (SentencePiece).
_METASPACE = {"llama-2": [], "mistral": ["[INST]", "[/INST]"], "openchat": ["<|end_of_turn|>"]}
HARMONY_TOKENS = ["<|start|>", "<|message|>", "<|channel|>", "<|end|>", "<|return|>"]


def tokenizer_of(family: str) -> Any:
    """A tiny tokenizer of the family's kind, with its template."""
    if family in _METASPACE:
        # As Llama 2's and Mistral's: a blank before each piece between control tokens, or before the text alone.
        tokenizer = metaspace_tokenizer(_METASPACE[family], each_piece=family == "llama-2")
    else:
        tokenizer = make_tokenizer(None)
    tokenizer.chat_template = FAMILIES[family]
    if family == "harmony":
        tokenizer.add_special_tokens({"additional_special_tokens": HARMONY_TOKENS})
    return tokenizer


def metaspace_tokenizer(control: list[str], *, each_piece: bool) -> Any:
    """A BPE tokenizer that puts a blank before texts and falls back to bytes, as SentencePiece models do."""
    from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<unk>", "<s>", "</s>", *control]
    merges = [("▁", letter) for letter in "aft4"]
    merges += [("▁t", "h"), ("▁th", "e"), ("i", "s")]
    tokens = [*specials, *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdefhilmnorstuw4"]
    tokens += [left + right for left, right in merges]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    backend = Tokenizer(models.BPE(vocab=vocabulary, merges=merges, byte_fallback=True, unk_token="<unk>"))
    if each_piece:
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        additional_special_tokens=control,
        clean_up_tokenization_spaces=False,
    )


def model_of(family: str, folder: Path, **kwargs: Any) -> str:
    """A tiny model with the family's template, in `folder`."""
    made = folder / family
    shutil.copytree(cached_tiny_model(**{"tied": True, **kwargs}), made)
    tokenizer = tokenizer_of(family)
    tokenizer.save_pretrained(made)
    if len(tokenizer) > VOCABULARY:
        enlarge(made, len(tokenizer))
    return str(made)


def enlarge(model: Path, rows: int) -> None:
    """Gives the model in a folder so many embeddings."""
    from transformers import AutoModelForCausalLM

    grown = AutoModelForCausalLM.from_pretrained(model)
    grown.resize_token_embeddings(rows, mean_resizing=False)
    grown.save_pretrained(model)
