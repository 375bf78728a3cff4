"""What an error about a model that can't be loaded says: its cause in a line, and what to do."""

from __future__ import annotations

import os
from pathlib import Path

from rlaif_ray.documents import read_json
from rlaif_ray.errors import DocumentError, InputError

# What transformers raises over a value in a config that it doesn't check.
WRONG_VALUES = (TypeError, AttributeError, ZeroDivisionError)
_SMALL_FILES = (
    *("config.json", "generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
    *("added_tokens.json", "chat_template.json", "*.safetensors.index.json"),
)
# What it says of a config.json that is there and is none.
_UNREADABLE = ("not a valid JSON", "Should have a `model_type` key")


def is_wrong_config(error: InputError) -> bool:
    """Whether a config could be found, and not be read for what stands in it."""
    from huggingface_hub.errors import StrictDataclassError

    cause = error.__cause__
    wrong = isinstance(cause, (StrictDataclassError, DocumentError, RecursionError, *WRONG_VALUES))
    return wrong or any(told in str(cause) for told in _UNREADABLE)


def check_json(folder: Path) -> None:
    """Reads the JSON files of a model's folder that transformers parses without bounds.

    Raises:
        InputError: one of them can't be read.
    """
    for name in _SMALL_FILES:
        for file in folder.glob(name):
            try:
                read_json(file, dict, lenient=True)
            except (DocumentError, OSError) as error:
                told = f"it {error}" if isinstance(error, DocumentError) else error.strerror
                raise InputError(
                    f"the model {folder} cannot be loaded: {file.name} can't be read ({told}). Correct the file, or "
                    f"give another model."
                ) from error


def remedy(source: Path | str, cause: str) -> str:
    if "trust_remote_code" in cause:
        return "Set trust_remote_code=true if you trust the code that comes with this model."
    if "attn" in cause or "attention" in cause.lower():
        return "Choose another attention; eager works with every model."
    if isinstance(source, Path):
        return (
            f"Check that {source} is a whole model: config.json, *.safetensors, tokenizer.json, tokenizer_config.json."
        )
    switches = (os.environ.get(switch, "").lower() for switch in ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"))
    if any(switch in {"1", "on", "yes", "true"} for switch in switches):
        return (
            f"The Hub is switched off (HF_HUB_OFFLINE); if {source} is not in the local cache, run "
            f"`hf download {source}` with network first, or give a local folder."
        )
    return (
        f"Check the spelling of {source} and the network; a gated or private model needs HF_TOKEN; "
        "a local folder works without either."
    )


def one_line(error: BaseException, limit: int = 300) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if len(text) > limit:
        text = text[:limit].rstrip() + "..."
    return text if text.endswith((".", "!", "?")) else text + "."
