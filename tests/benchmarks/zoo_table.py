"""A table of architectures: what the learner does with each, how far its numbers are from the plain model's, and what
LoRA adapts of it.

    .venv/bin/python -m tests.benchmarks.zoo_table MODELS.py FOLDER [NAME ...]

`MODELS.py FOLDER NAME ...` makes tiny random models FOLDER/NAME; without it, a dash, the models in FOLDER are taken as
they are. A line of Markdown a model; a column is a function in COLUMNS from a model's folder to a cell. One that
raises InputError is a refusal, and so is told; anything else is an error.
"""

from __future__ import annotations

import argparse
import logging
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from rlaif_ray.attention import PACKED, padded_kernel, plan_attention
from rlaif_ray.config.data_sections import LoraConfig
from rlaif_ray.errors import InputError
from rlaif_ray.learner.engine import save_model_folder
from rlaif_ray.learner.lora import add_adapters, count_parameters, merged_state
from rlaif_ray.learner.modules import CausalPolicy
from rlaif_ray.learner.packing import register_packed_attention
from rlaif_ray.learner.probe import Text, alone_outputs, compare, laid_out_outputs, logprobs_of, settle_attention
from rlaif_ray.models import load_causal_lm, load_config
from tests.learner_ranks import random_samples
from tests.tiny import make_tokenizer

ROOT = Path(__file__).parents[2]
CPU = torch.device("cpu")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", help="the script that makes models, or - for none")
    parser.add_argument("folder", type=Path)
    parser.add_argument("names", nargs="*", help="default: all that are in the folder")
    parser.add_argument("--columns", nargs="*", choices=COLUMNS, default=list(COLUMNS))
    args = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    torch.set_num_threads(1)
    if args.models != "-":
        make(args.models, args.folder, args.names)
    names = args.names or sorted(path.parent.name for path in args.folder.glob("*/config.json"))
    for line in table(args.folder, names, args.columns):
        print(line, flush=True)


def make(script: str, folder: Path, names: list[str]) -> None:
    """Runs the script that makes models."""
    command = [sys.executable, script, str(folder), *names]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")


def table(folder: Path, names: list[str], columns: list[str]) -> Iterator[str]:
    """The lines of the table, as they come."""
    yield f"| architecture | {' | '.join(columns)} |"
    yield "|" + " --- |" * (len(columns) + 1)
    for name in names:
        cells = [cell(COLUMNS[column], folder / name) for column in columns]
        yield f"| {name} | {' | '.join(cells)} |"
        layouts.cache_clear()
        adapted.cache_clear()


def cell(column: Callable[[Path], str], folder: Path) -> str:
    """What a column says of a model, on one line."""
    try:
        said = column(folder)
    except InputError as error:
        said = f"refused: {error}"
    except Exception as error:
        said = f"ERROR {type(error).__name__}: {error}"
    text = " ".join(said.replace(f"{folder}", folder.name).split()).replace("|", "/")
    return text if len(text) < 160 else text[:157] + "..."


# ---- Columns ---------------------------------------------------------------------------------------------------------


@cache
def layouts(folder: Path) -> tuple[str, str, float]:
    """(attention chosen, why not packed, largest gap in nats between it and eager on each sample alone), in fp32."""
    register_packed_attention()
    name = str(folder)
    plan = plan_attention("auto", load_config(name), name)
    model = load_causal_lm(name, dtype=torch.float32, attention=plan.implementation).eval()
    run = logprobs_of(CausalPolicy(model))
    attention, note = settle_attention(plan, model, run, name=name, device=CPU, precision="fp32")
    # Not the probe's own text: what it lets pass must be right for others.
    prompts, completions = random_samples([9, 30, 2], [[4, 1, 14, 6], [12], [3]], vocabulary=320, seed=1)
    text = Text(tuple(prompts), tuple(completions))
    found = laid_out_outputs(run, text, packed=attention == PACKED, device=CPU)
    plain = load_causal_lm(name, dtype=torch.float32, attention="eager").eval()
    expected = alone_outputs(logprobs_of(CausalPolicy(plain)), text, CPU)
    return attention, note.partition(": ")[2], compare(found, expected).worst


def layout(folder: Path) -> str:
    """Packed, or padded with which kernel and why."""
    attention, reason, _ = layouts(folder)
    return "packed" if attention == PACKED else f"padded, {attention} ({reason})"


def gap(folder: Path) -> str:
    """Largest difference of a token's log-probability, nats."""
    return f"{layouts(folder)[2]:.0e}"


def reward_model(folder: Path) -> str:
    """The kernel of a reward model that scores."""
    return padded_kernel(load_config(folder))


@cache
def adapted(folder: Path) -> tuple[str, float, float]:
    """(last names of what LoRA adapts at rank 4, its share of all parameters, largest difference in log-probability
    between the merged and saved folder, loaded by transformers, and what was trained)."""
    model = load_causal_lm(folder, dtype=torch.float32, attention="eager").eval()
    total = count_parameters(model)
    plan = add_adapters(model, LoraConfig(rank=4), 0, folder.name)
    names = {next(n for n in reversed(p.split(".")) if not n.isdigit()) for p in (*plan.layers, *plan.experts)}
    tokens = torch.randint(3, 320, (1, 24), generator=torch.Generator().manual_seed(1))

    def read(model: Any) -> torch.Tensor:
        found: torch.Tensor = model(input_ids=tokens, use_cache=False).logits[0].log_softmax(-1)
        return found

    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    for _ in range(2):
        torch.nn.functional.nll_loss(read(model)[:-1], tokens[0, 1:]).backward()
        optimizer.step()
        optimizer.zero_grad()
    with torch.no_grad(), TemporaryDirectory() as scratch:
        save_model_folder(model, lambda: make_tokenizer(None), merged_state(model, keep=True), Path(scratch))
        saved = load_causal_lm(scratch, dtype=torch.float32, attention="eager").eval()
        return ", ".join(sorted(names)), plan.trained / total, float((read(saved) - read(model)).abs().max())


def adapters(folder: Path) -> str:
    """What LoRA adapts, by last name."""
    return adapted(folder)[0]


def share(folder: Path) -> str:
    """Trained parameters of all, at rank 4."""
    return f"{adapted(folder)[1]:.2g}"


def merged(folder: Path) -> str:
    """Largest difference between what was saved and what was trained, nats."""
    return f"{adapted(folder)[2]:.0e}"


COLUMNS: dict[str, Callable[[Path], str]] = {"layout": layout, "gap": gap, "scoring": reward_model}
COLUMNS |= {"adapters": adapters, "share": share, "merged": merged}


if __name__ == "__main__":
    main()
