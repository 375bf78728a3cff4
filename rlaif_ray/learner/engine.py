"""The only door to DeepSpeed: engines for policy, critic and reference, and full weights out of their shards."""

from __future__ import annotations

import copy
import json
import os
import socket
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext, redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any, Literal

import torch

from rlaif_ray.config.deepspeed import deepspeed_config
from rlaif_ray.documents import read_json
from rlaif_ray.errors import InputError, RunError
from rlaif_ray.learner.build_locks import free_build_locks, watch_waits
from rlaif_ray.learner.finite import Stepped, require_finite_state, spread
from rlaif_ray.learner.mixed_precision import count_all_gradients, keep_master, sums_in_fp32
from rlaif_ray.learner.nodes import use_host_threads
from rlaif_ray.weight_types import WeightTypes, cast, rounding
from rlaif_ray.writing import replace_text

if TYPE_CHECKING:
    from torch import Tensor

    from rlaif_ray.config.sections import LearnerConfig


@dataclass(frozen=True, slots=True)
class RankSpec:
    """One learner process among its peers."""

    rank: int
    world_size: int
    local_rank: int
    address: str
    port: int
    device: Literal["cpu", "cuda"]
    threads: int  # compute threads on the CPU


def learner_environment(spec: RankSpec) -> dict[str, str]:
    """Environment of a learner process, set before it starts."""
    environment = {
        "RANK": str(spec.rank),
        "WORLD_SIZE": str(spec.world_size),
        "LOCAL_RANK": str(spec.local_rank),
        "MASTER_ADDR": spec.address,
        "MASTER_PORT": str(spec.port),
        "TOKENIZERS_PARALLELISM": "false",
    }
    if spec.device == "cpu":
        environment |= {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": str(spec.threads), "CUDA_VISIBLE_DEVICES": ""}
    return environment


def join_ranks(spec: RankSpec, timeout_s: float) -> torch.device:
    """Starts torch.distributed for this rank; returns its device."""
    os.environ.update(learner_environment(spec))
    import datetime

    import deepspeed

    if spec.device == "cpu":
        torch.set_num_threads(spec.threads)
        device = torch.device("cpu")
    else:
        device = torch.device("cuda", spec.local_rank)
        torch.cuda.set_device(device)
    deepspeed.logger.setLevel("WARNING")
    # DeepSpeed would compile a C++ extension for this one (a minute, a compiler, and a lock that outlives a killed
    # process). It serves `inference_all_reduce` alone, which training never calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    watch_waits()
    free_build_locks()  # before all ranks meet, and so before one of them builds
    timeout = datetime.timedelta(seconds=timeout_s)
    backend = "gloo" if spec.device == "cpu" else "nccl"
    if not torch.distributed.is_initialized():  # a process may hold one rank after another
        torch.distributed.init_process_group(
            backend,
            store=_store(spec, timeout),
            rank=spec.rank,
            world_size=spec.world_size,
            timeout=timeout,
            device_id=device if spec.device == "cuda" and spec.world_size > 1 else None,  # as DeepSpeed has it
        )
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, timeout=timeout)
    return device


def _store(spec: RankSpec, timeout: Any) -> Any:
    """Where the ranks find each other. Torch's own would listen on every interface, this on the address alone."""
    options: dict[str, Any] = {}
    if spec.rank == 0:
        family = socket.AF_INET6 if ":" in spec.address else socket.AF_INET
        listener = socket.create_server((spec.address, spec.port), family=family)
        options["master_listen_fd"] = listener.detach()  # the store closes it
    return torch.distributed.TCPStore(  # type: ignore[attr-defined]
        spec.address, spec.port, spec.world_size, spec.rank == 0, timeout, wait_for_workers=False, **options
    )


@contextmanager
def sharded_loading(cfg: LearnerConfig, precision: Literal["fp32", "bf16"]) -> Iterator[None]:
    """Within it transformers loads a model straight into ZeRO-3 shards, so that no rank ever holds all of it."""
    if cfg.zero_stage < 3:
        yield
        return
    import deepspeed
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    keep = HfDeepSpeedConfig(deepspeed_config(cfg, precision=precision))  # transformers holds it weakly
    plain = deepspeed.zero.Init
    deepspeed.zero.Init = _sharding(plain)
    try:
        yield
    finally:
        deepspeed.zero.Init = plain
        del keep


def _sharding(plain: Any) -> Any:
    """DeepSpeed's context `plain`, in which modules are sharded as they are built, but for the types of buffers.

    DeepSpeed's own casts whatever a module's __init__ makes: the frequencies of rotary embeddings, which transformers
    asks for in fp32, would be rounded to bf16. transformers' default type is the model's meanwhile, so what names no
    type has the right one anyway. Parameters are cast as before: DeepSpeed shards one type.
    """
    from deepspeed.runtime.zero import DeepSpeedTensorOverride
    from deepspeed.utils import groups

    class Sharding(plain):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            # hpZ's groups of ranks, which DeepSpeed makes for the first model and refuses to make for a second one.
            group = groups._get_zero_param_intra_parallel_group()
            ours = {"tensor_overrides": [DeepSpeedTensorOverride.device], "zero_param_parallel_group": group}
            super().__init__(*args, **ours | kwargs)

        def _post_init_method(self, module: torch.nn.Module) -> None:
            for parameter in module.parameters(recurse=False):
                if not hasattr(parameter, "ds_id") and parameter.is_floating_point():
                    parameter.data = parameter.data.to(self.dtype)
            super()._post_init_method(module)

    return Sharding


def learning_rate_factor(step: int, *, warmup: int, total: int, schedule: str) -> float:
    """Share of the learning rate at optimizer step `step` (from 0): linear warm-up, then constant, linear or cosine
    to 0 at `total`."""
    import math

    if step < warmup:
        return (step + 1) / (warmup + 1)
    done = (step - warmup) / max(1, total - warmup)
    if schedule == "linear":
        return max(0.0, 1.0 - done)
    if schedule == "cosine":
        return 0.5 * (1.0 + math.cos(math.pi * min(1.0, done)))
    return 1.0


def trainable_engine(
    module: torch.nn.Module,
    cfg: LearnerConfig,
    *,
    lr: float,
    total_steps: int,
    precision: Literal["fp32", "bf16"],
) -> Any:
    """A DeepSpeed engine with AdamW and our schedule. Call `train_step_boundary` before each backward."""
    import deepspeed

    if cfg.offload.optimizer == "cpu":
        use_host_threads()
    # Its fused kernel is vectorised and parallel on CPUs as well, so it is also what steps offloaded states: nothing is
    # compiled at the start, as for DeepSpeed's own, and a checkpoint holds the same states.
    optimizer = torch.optim.AdamW(
        [p for p in module.parameters() if p.requires_grad],
        lr=lr,
        betas=cfg.betas,
        eps=cfg.eps,
        weight_decay=cfg.weight_decay,
        fused=True,
    )
    scheduler = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: learning_rate_factor(step, warmup=cfg.warmup_steps, total=total_steps, schedule=cfg.schedule),
    )
    with redirect_stdout(StringIO()):  # its optimizer of stage 1 in bf16 prints what memory is in use
        engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=optimizer,
            lr_scheduler=scheduler,
            config=deepspeed_config(cfg, precision=precision),
            dist_init_required=False,
        )
    if torch.distributed.get_world_size() == 1 and sums_in_fp32(engine.optimizer):
        engine.enable_backward_allreduce = False  # a pass over all gradients, for nothing
    keep_master(engine)
    return engine


def frozen_engine(module: torch.nn.Module, cfg: LearnerConfig, *, precision: Literal["fp32", "bf16"]) -> Any:
    """The module ready for forward passes only: sharded like the policy under ZeRO-3, else as it is."""
    module.requires_grad_(False).eval()
    if cfg.zero_stage < 3:
        return module
    import deepspeed

    engine, *_ = deepspeed.initialize(
        model=module, config=deepspeed_config(cfg, precision=precision), dist_init_required=False
    )
    return engine


def optimizer_step(engine: Any) -> Stepped:
    """Clips, steps optimizer and schedule, clears gradients; with a gradient that is no number it only clears.

    DeepSpeed skips such a step itself, and all ranks with it, but in plain fp32.
    """
    norm = None
    if engine.zero_optimization_stage() == 0 and not engine.bfloat16_enabled():
        # Plain fp32 is the one mode in which DeepSpeed clips without keeping the norm; gradients are reduced by now.
        gradients = [p.grad for p in engine.module.parameters() if p.grad is not None]
        norm = torch.nn.utils.get_total_norm(gradients)
        engine.optimizer.overflow = not bool(norm.isfinite())  # where DeepSpeed looks whether a step was taken
    count_all_gradients(engine.optimizer)
    with _no_update(engine.optimizer) if norm is not None and engine.optimizer.overflow else nullcontext():
        engine.step()
    keep_master(engine)
    norm = engine.get_global_grad_norm() if norm is None else norm
    return Stepped(float(norm) if norm is not None else 0.0, bool(engine.was_step_applied()))


@contextmanager
def _no_update(optimizer: Any) -> Iterator[None]:
    """Within it torch's optimizer takes no step."""
    step = optimizer.step
    optimizer.step = lambda *_, **__: None
    try:
        yield
    finally:
        optimizer.step = step


def backward(engine: Any, loss: Tensor, *, last: bool) -> None:
    """Accumulates gradients; on the last micro-batch of a minibatch they are reduced over ranks as well."""
    engine.set_gradient_accumulation_boundary(last)
    engine.backward(spread(loss))


def full_weights(parameters: Sequence[Tensor], *, write: bool = True) -> Any:
    """Context in which ZeRO-3 parameters are whole; others are anyway."""
    if not any(hasattr(p, "ds_id") for p in parameters):
        return nullcontext()
    import deepspeed

    return deepspeed.zero.GatheredParameters(list(parameters), modifier_rank=0 if write else None)


WORTH_TELLING = 0.1  # share of the update's size: what rounding adds to it, at right angles, then is 0.5%
Prepare = Callable[[Any, Any, Any], None]  # changes a model's config, its settings for generation, and its tokenizer


def save_model_folder(
    model: Any,
    load_tokenizer: Callable[[], Any],
    state: dict[str, Tensor],
    folder: Path,
    types: WeightTypes | None = None,
    prepare: Prepare | None = None,
) -> list[str]:
    """Writes a Hugging Face folder: `state` is the whole state under checkpoint names (model_state.py), `model` gives
    class and config, which are saved as `prepare` leaves them. The weights are rounded, in place, to `types`, those of
    the model that the run was given; without any they stay as they are. Returns what the user should know of that.

    Raises:
        NotFiniteError: one of them is no number; nothing is written.
        RunError: the weights are written, and what belongs to them is not.
    """
    from safetensors.torch import save_file

    require_finite_state(state)
    types = types or WeightTypes()
    trained, saved = state, False
    notes: list[str] = []
    model.config.use_cache = True  # off while training, on for whoever loads it
    try:
        lost = rounding(state, types)
        if not cast(state, types):
            notes.append(f"{folder} is saved in the type it was trained in: a number in it is too large for fp16.")
            types = WeightTypes()
        elif lost is not None and lost > WORTH_TELLING:
            notes.append(
                f"{folder} is saved in {types.usual}: rounding moved the weights {lost:.0%} as far as training had. "
                f"What was measured in training is not what this model does; policy.save_precision=fp32 saves it as it "
                f"was trained."
            )
        trained = dict(state)  # transformers empties what it is given, shard by shard
        tokenizer = load_tokenizer()
        if prepare is not None:
            prepare(model.config, getattr(model, "generation_config", None), tokenizer)
        with _savable_generation(model, folder):
            model.save_pretrained(folder, state_dict=state, save_original_format=False)  # its names: the checkpoint's
            saved = True
        tokenizer.save_pretrained(folder)
        if types.usual is not None:  # transformers writes the type that the model has here
            _say_type(folder / "config.json", types.usual)
    except OSError:  # no room, no right to write: there is nothing to save either
        raise
    except Exception as error:
        if not saved:
            folder.mkdir(parents=True, exist_ok=True)
            for file in folder.glob("*.safetensors*"):  # an earlier save's, or half of this one's
                file.unlink()
            save_file(trained, folder / "model.safetensors", metadata={"format": "pt"})
        raise RunError(
            f"{folder} has the trained weights (*.safetensors), and not all of what belongs to them: transformers "
            f"can't save it ({type(error).__name__}: {error}). Copy what is missing there from the model that was "
            f"trained: config.json, generation_config.json and the files of its tokenizer."
        ) from error
    finally:
        model.config.use_cache = False
        for file in folder.glob("*.safetensors"):
            file.chmod(0o644)  # safetensors writes for the owner alone; models are there to be shared
    return notes


def _say_type(file: Path, kind: str) -> None:
    config = read_json(file, dict)
    replace_text(file, json.dumps(config | {"dtype": kind}, indent=2, sort_keys=True) + "\n")


def try_saving(model: Any, load_tokenizer: Callable[[], Any], name: str, prepare: Prepare | None = None) -> None:
    """Saves everything but the weights to a folder that is deleted: what can fail at the end fails at the start.
    What `prepare` changes of the model, it changes in copies.

    A tokenizer that can't be loaded is no matter here: a job reads its own before a learner starts.

    Raises:
        InputError: transformers can't save the config or the tokenizer of model `name`, or `prepare` can't change them.
    """
    parts = {"config": copy.deepcopy(model.config)}
    with suppress(InputError):
        parts["tokenizer"] = load_tokenizer()
    if prepare is not None and "tokenizer" in parts:
        try:
            prepare(parts["config"], copy.deepcopy(getattr(model, "generation_config", None)), parts["tokenizer"])
        except InputError:
            raise
        except Exception as error:
            raise InputError(
                f"the config and tokenizer of model {name} can't be made ready to be saved ({type(error).__name__}: "
                f"{error}), so what is trained could not be saved whole. Mend them in the model's folder, or use "
                f"another model."
            ) from error
    with TemporaryDirectory(prefix="rlaif-model-") as folder:
        for part, what in parts.items():
            try:
                what.save_pretrained(folder)
            except Exception as error:
                raise InputError(
                    f"the {part} of model {name} can't be saved ({type(error).__name__}: {error}), so what is trained "
                    f"could not be saved whole. Mend it in the model's folder, or use another model."
                ) from error
        with _savable_generation(model, Path(folder)):
            if model.can_generate():
                model.generation_config.save_pretrained(folder)


@contextmanager
def _savable_generation(model: Any, folder: Path) -> Iterator[None]:
    """Within it transformers can save the model's settings for generation; afterwards they are in the folder.

    transformers loads settings that it refuses to save: in many a generation_config.json stand a temperature or top_p
    without `do_sample`. That is put in, so that they count. What can't be mended so is written as it was loaded.
    """
    own = getattr(model, "generation_config", None)
    if own is None or _is_valid(own):
        yield
        return
    sampled = copy.deepcopy(own)
    sampled.do_sample = True
    model.generation_config = sampled if _is_valid(sampled) else type(own)()
    try:
        yield
    finally:
        mended, model.generation_config = model.generation_config is sampled, own
    if not mended:
        own.to_json_file(folder / "generation_config.json", use_diff=True)


def _is_valid(settings: Any) -> bool:
    """Whether transformers would save them."""
    try:
        settings.validate(strict=True)
    except ValueError:
        return False
    return True
