"""Dropout off, in a model's config and in its modules: PPO's ratio would take its noise for a change of the policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig

# Parts of the names of config fields that put noise into the forward pass during training. attention_dropout,
# resid_pdrop, hidden_dropout_prob, ...; layerdrop skips whole layers. Not router_jitter_noise: learner/modes.py keeps
# jitter off, and PhiMoE reads it in evaluation as well, as the width of a mask.
_NOISE_FIELDS = ("dropout", "pdrop", "layerdrop")


def zero_dropout_in_config(config: PreTrainedConfig) -> None:
    """Set every dropout rate in `config`, and in the configs inside it, to 0."""
    from transformers import PreTrainedConfig

    for field, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            zero_dropout_in_config(value)
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and _is_noise(field):
            setattr(config, field, type(value)(0))  # MPT's are whole numbers, and it insists


def _is_noise(field: str) -> bool:
    return any(part in field for part in _NOISE_FIELDS)


def zero_dropout_in_modules(model: torch.nn.Module) -> None:
    """Set the rate of every dropout module to 0, also of those whose rate no config field names."""
    from torch import nn

    kinds = (nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout, nn.FeatureAlphaDropout)
    for module in model.modules():
        if isinstance(module, kinds):
            module.p = 0.0
