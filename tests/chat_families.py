"""Chat templates as families of models have them, cut down to what makes each of them a trap."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from tests.tiny import CHAT_TEMPLATE, cached_tiny_model, make_tokenizer

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

FAMILIES = {
    "chatml": CHATML,
    "qwen3": QWEN3,
    "deepseek-r1": DEEPSEEK_R1,
    "qwen3-thinking": QWEN3_THINKING,
    "llama-3.1": LLAMA31,
    "phi-3": PHI3,
    "gemma": GEMMA,
    "harmony": HARMONY,
}


def tokenizer_of(family: str) -> Any:
    """The tiny tokenizer with the family's template."""
    tokenizer = make_tokenizer(None)
    tokenizer.chat_template = FAMILIES[family]
    return tokenizer


def model_of(family: str, folder: Path, **kwargs: Any) -> str:
    """A tiny model with the family's template, in `folder`."""
    made = folder / family
    shutil.copytree(cached_tiny_model(**{"tied": True, **kwargs}), made)
    tokenizer_of(family).save_pretrained(made)
    return str(made)
