"""A reward head for language models that transformers has no sequence classifier of: Granite, Cohere, OLMoE and others.

The model is the language model's body with one linear layer, `score`, that is read at the last token, as transformers'
own classifiers are; its folder has the same names and config. transformers' Auto class doesn't know it, so only
`rlaif_ray.models.load_sequence_classifier` loads it.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from rlaif_ray.errors import InputError


def classifier_class(config: Any, name: str) -> Any:
    """What loads a model as a sequence classifier: transformers' Auto class, or a class of ours.

    Raises:
        InputError: the model `name` can't have a reward head, with the reason.
    """
    import transformers

    auto = transformers.AutoModelForSequenceClassification
    kind: Any = type(config)
    remote = getattr(config, "auto_map", None) or {}
    if config.is_encoder_decoder:
        raise _refusal(name, config, "it is an encoder-decoder, and a reward is read at the last token of a decoder")
    if kind in transformers.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING or auto.__name__ in remote:
        return auto
    if kind in transformers.MODEL_FOR_CAUSAL_LM_MAPPING and kind in transformers.MODEL_MAPPING:
        return _own_class(kind)
    if getattr(config, "vision_config", None) is not None or getattr(config, "audio_config", None) is not None:
        raise _refusal(name, config, "it reads images or sound, and transformers has no language model of it alone")
    if remote:
        raise _refusal(name, config, f"it brings its own code, and that has no {auto.__name__}")
    raise _refusal(name, config, "transformers has no language model of this type")


def check_head(model: Any, name: str) -> None:
    """Raises InputError for classifiers that read something else than a decoder's last token, such as BERT's."""
    if not hasattr(model, "score"):
        reason = f"{type(model).__name__} is an encoder, and a reward is read at the last token of a decoder"
        raise _refusal(name, model.config, reason)


def _refusal(name: str, config: Any, reason: str) -> InputError:
    return InputError(
        f"model {name!r} can't become a reward model (got {config.model_type}): {reason}. Use a decoder-only language "
        f"model, such as Llama, Qwen or Gemma."
    )


@cache
def _own_class(kind: Any) -> Any:
    """transformers' generic classifier for a family that it has none for."""
    import transformers
    from transformers.modeling_layers import GenericForSequenceClassification

    language_model: Any = transformers.MODEL_FOR_CAUSAL_LM_MAPPING[kind]
    family = next(c for c in language_model.__mro__ if c.__name__.endswith("PreTrainedModel"))
    # Where the language model keeps its body, so that its weights are found under the same names.
    tied = next(iter((getattr(language_model, "_tied_weights_keys", None) or {}).values()), "")
    prefix = tied.split(".")[0] or language_model.base_model_prefix
    name = language_model.__name__.replace("ForCausalLM", "").replace("LMHeadModel", "")
    members = {"base_model_prefix": prefix, "config_class": kind, "__module__": __name__, "_tied_weights_keys": None}
    return type(f"{name}ForSequenceClassification", (GenericForSequenceClassification, family), members)


MODEL_CARD = """---
library_name: {library}
---
# Reward model

{kind}, trained by rlaif_ray from {base}. Its reward is the output of the linear layer `score` at the last token of
prompt and response{ends}. {center}

{load}
"""


def model_card(config: Any, base: str) -> str:
    """README.md of a reward model's folder, from its config as it is saved."""
    import transformers

    kind = config.architectures[0] if config.architectures else config.model_type
    own = not hasattr(transformers, kind)
    center = getattr(config, "reward_center", None)
    load = (
        "transformers has no such class: load it with `rlaif_ray.models.load_sequence_classifier`, or name the folder "
        "as `feedback.model`."
        if own
        else "Load it with transformers' `AutoModelForSequenceClassification`, or name the folder as `feedback.model`."
    )
    return MODEL_CARD.format(
        library="rlaif_ray" if own else "transformers",
        kind=kind,
        base=base,
        ends=", which ends with EOS" if getattr(config, "reward_ends_with_eos", True) else "",
        center=f"Rewards are centred by subtracting {center['mean']:.6g}." if center else "Rewards are not centred.",
        load=load,
    )
