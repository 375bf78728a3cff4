"""Models that a job can't work with, told before Ray or an engine starts, from their configs alone."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

from rlaif_ray.attention import plan_attention, split_refusal
from rlaif_ray.config.base import Config
from rlaif_ray.config.data_sections import ArmConfig
from rlaif_ray.config.jobs import RewardModelJob, SupervisedJob, TrainJob
from rlaif_ray.config.layers import STAGE
from rlaif_ray.config.sections import JudgeConfig, PolicyConfig, Precision
from rlaif_ray.errors import InputError
from rlaif_ray.model_errors import is_wrong_config
from rlaif_ray.model_support import engine_refusal
from rlaif_ray.models import check_revision, load_config
from rlaif_ray.precision import chosen_precision
from rlaif_ray.rollout.support import unknown_to_vllm

GPU_FILES = ("nvidia[0-9]*", "dxg", "kfd")  # in /dev: NVIDIA's, WSL's, AMD's
INSTEAD = "Use a decoder-only language model, such as Llama, Qwen or Gemma"


@dataclass(frozen=True, slots=True)
class Use:
    """What a job does with a model."""

    key: str  # of its section
    section: Any  # has model, revision and trust_remote_code
    trained: bool  # as a language model, by the learner
    sampled: bool  # by a vLLM engine
    updated: bool = False  # by the learner, as whatever
    together: int = 1  # ranks of the learner that compute its sequences together


def check_models(*jobs: Any, dry_run: bool = False) -> None:
    """Reads the config of every model that the jobs name. One that isn't there is left to whoever loads it.

    Raises:
        InputError: a job can't work with one of them; names all of those.
    """
    problems: dict[str, None] = {}
    for job in jobs:
        device = _device(job, dry_run)
        for key, section in _sections(job, ""):
            try:
                _check_revision(section)
            except InputError as error:
                problems[f"{key}.revision={section.revision} can't be used: {error}"] = None
        for use in uses(job):
            try:
                config = _config(use.section)
            except InputError as error:
                problems[f"{use.key}.model={use.section.model} can't be used: {error}"] = None
                continue
            problem = None if config is None else refusal(use, config, device)
            if problem is not None:
                problems[f"{use.key}.model={use.section.model} can't be used (got {_type(config)}): {problem}"] = None
    if problems:
        raise InputError("\n".join(problems))


def _check_revision(section: Any) -> None:
    """Of any section with a model, scorers among them, that no other stage of a pipeline makes."""
    model = getattr(section, "model", None)
    if isinstance(model, str) and not model.startswith(STAGE):
        check_revision(model, getattr(section, "revision", None))


def uses(job: Any) -> Iterator[Use]:
    """Every model in a job's config that is trained, or sampled by an engine."""
    trains = isinstance(job, TrainJob | SupervisedJob)
    for key, section in _sections(job, ""):
        if isinstance(section, PolicyConfig):
            updated = trains and key == "policy"
            trained = updated and not isinstance(job, RewardModelJob)
            together = job.learner.sequence_parallel if updated else 1
            sampled = not isinstance(job, SupervisedJob)
            yield Use(key, section, trained, sampled=sampled, updated=updated, together=together)
        elif isinstance(section, JudgeConfig) or (isinstance(section, ArmConfig) and section.model is not None):
            yield Use(key, section, trained=False, sampled=True)


def _sections(value: Any, key: str) -> Iterator[tuple[str, Any]]:
    """(key, section) of everything inside a config, at any depth."""
    parts: dict[str, Any] = {}
    if isinstance(value, Config):
        if key:
            yield key, value
        parts = {name: getattr(value, name) for name in type(value).model_fields}
    elif isinstance(value, dict):
        parts = value
    for name, part in parts.items():
        yield from _sections(part, f"{key}.{name}" if key else str(name))


def refusal(use: Use, config: Any, device: Literal["cpu", "cuda"] | None) -> str | None:
    """Why a model can't be used so, and what works instead; None where nothing speaks against it.

    `device` is None where it isn't known yet.
    """
    kind = _wrong_kind(config, writes=use.trained or use.sampled)
    if kind is not None:
        return kind
    method = _quantised(config) if use.updated else None
    if method is not None:
        return (
            f"its weights are quantised ({method}), and training needs them in full precision: they can't be updated "
            f"as they are stored. Use a copy in bf16 or fp32, such as the one that it was quantised from; as a judge "
            f"it works as it is."
        )
    problem = split_refusal(getattr(use.section, "attention", "auto"), config, use.together)
    if problem is not None:
        return problem
    if use.trained:
        problem = _untrainable(config)
        if problem is not None:
            return problem
        try:
            plan_attention(use.section.attention, config, use.section.model)
        except InputError as error:
            return str(error)
    if use.sampled:
        precision: Precision = getattr(use.section, "precision", "auto")
        if device is not None:
            precision = chosen_precision(precision, device)
        return _unsampled(config, device, takes_weights=use.trained, precision=precision)
    return None


def _wrong_kind(config: Any, *, writes: bool) -> str | None:
    """Models that don't go from left to right; `writes`: the model is to write text, else to give rewards."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_MASKED_LM_MAPPING

    use = "prompt and response are one sequence here" if writes else "a reward is read at the last token of a decoder"
    if config.is_encoder_decoder:
        return f"it is an encoder-decoder, and {use}. {INSTEAD}."
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        what = "which fills gaps in a text and writes none" if writes else f"and {use}"
        return f"it is an encoder, {what}. {INSTEAD}."
    return None


def _reads_images(config: Any) -> bool:
    return any(getattr(config, f"{sense}_config", None) is not None for sense in ("vision", "audio"))


def _untrainable(config: Any) -> str | None:
    """Models that the learner can't load as a language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    if _reads_images(config):
        # transformers loads some of them as language models (Gemma 3, Qwen 3.5), each in its own way, and what the
        # learner saves and sends then is another checkpoint than vLLM reads: none was seen to be right.
        return (
            "it reads images or sound, and only models that read text alone can be trained here. Use a model of the "
            "same family that reads text alone, such as Qwen/Qwen2.5-7B-Instruct or google/gemma-3-1b-it; as a judge "
            "it works."
        )
    if (
        "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
        or type(config) in MODEL_FOR_CAUSAL_LM_MAPPING
    ):
        return None
    return f"transformers' AutoModelForCausalLM has no language model of this type. {INSTEAD}."


def _quantised(config: Any) -> str | None:
    """By what method the weights in the folder are quantised; None where they are not."""
    for part in (config, config.get_text_config()):
        found = getattr(part, "quantization_config", None)
        if found:
            values = found if isinstance(found, dict) else found.to_dict()
            method = values.get("quant_method")
            return str(getattr(method, "value", method) or "method not named")
    return None


def _unsampled(
    config: Any, device: Literal["cpu", "cuda"] | None, *, takes_weights: bool, precision: str
) -> str | None:
    """Models that vLLM can't run, or not with weights that are pushed."""
    if unknown_to_vllm(config):
        return (
            f"this vLLM has no {' or '.join(config.architectures)}, and can't run transformers' code in its place. "
            f"{INSTEAD}."
        )
    if _reads_images(config) and device == "cpu" and find_spec("torchvision") is None:
        return (
            "it reads images or sound, for which vLLM needs torchvision, and that is not installed here. Use a model "
            "of the same family that reads text alone, such as Qwen/Qwen2.5-7B-Instruct or google/gemma-3-1b-it, or "
            "install the torchvision that belongs to this torch."
        )
    return None if device is None else engine_refusal(config, device, takes_weights=takes_weights, precision=precision)


def _type(config: Any) -> str:
    names = config.architectures or ()
    return f"model type {config.model_type}" + (f", {names[0]}" if names else "")


def _config(section: Any) -> Any | None:
    """The model's config; None where it can't be had. Packaged models are known to work, and not unpacked for this.

    Raises:
        InputError: it is there, and a value in it is wrong.
    """
    if str(section.model).startswith("package:"):
        return None
    try:
        return load_config(section.model, revision=section.revision, trust_remote_code=section.trust_remote_code)
    except InputError as error:
        if is_wrong_config(error):
            raise
        return None


def _device(job: Any, dry_run: bool) -> Literal["cpu", "cuda"] | None:
    """Where the job's engines will be, as far as that can be told without Ray; None where it can't."""
    cluster = job.cluster
    if cluster.device != "auto":
        return "cuda" if cluster.device == "gpu" else "cpu"
    if any(True for pattern in GPU_FILES for _ in Path("/dev").glob(pattern)):
        return None
    if dry_run:  # where the job will run, there may be GPUs and a cluster
        return None
    from rlaif_ray.runtime.session import named_cluster

    return "cpu" if named_cluster(cluster.address, os.environ) is None else None
