"""Does vLLM compute the weights that were pushed? `python -m tests.benchmarks.zoo_push FOLDER ...` says for each model.

For each folder an engine of ours starts with the weights in it. Then other weights go into it by the learner's own
state, sender and receiver, a layer group a message. Log-probabilities of a fixed text are compared with transformers'
(eager attention) on both sets of weights: a gap beyond 1e-3 nats at load is vLLM's or the config's fault, one that
comes with the push is ours. The last column is how far the push moved them: what a stale engine would be off by.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

BOUND = 1e-3  # nats, fp32
CONTEXT = 64


def measure(folder: Path, context: int = CONTEXT) -> dict[str, Any]:
    """Gaps in nats of one model: "load", "push", "moved"; or "error"."""
    import torch

    from rlaif_ray.models import load_causal_lm
    from rlaif_ray.rollout.vllm_engine import EngineSpec, VllmEngine

    model = load_causal_lm(folder, dtype=torch.float32, attention="eager").eval()
    vocabulary = model.config.get_text_config().vocab_size
    text = torch.randint(3, vocabulary, (48,), generator=torch.Generator().manual_seed(1)).tolist()
    engine = VllmEngine(
        EngineSpec(
            model=str(folder),
            revision=None,
            trust_remote_code=False,
            dtype="float32",
            device="cpu",
            max_context=context,
            tensor_parallel=1,
            gpu_memory_utilization=0.5,
            kv_cache_gb=0.1,
            seed=0,
            threads=1,
            transfer_backend="shm",
            engine_kwargs={"enable_prefix_caching": False},
        )
    )
    before = learner_logprobs(model, text)
    gaps = {"load": gap(engine_logprobs(engine, text), before)}
    change(model)
    after = learner_logprobs(model, text)
    push(model, engine)
    gaps["push"] = gap(engine_logprobs(engine, text), after)
    push(model, engine)  # a second one finds the engine as the first left it
    gaps["again"] = gap(engine_logprobs(engine, text), after)
    gaps["moved"] = gap(before, after)
    return gaps


def learner_logprobs(model: Any, text: list[int]) -> list[float]:
    """Of each token but the first, by the plain model."""
    import torch

    tokens = torch.tensor([text])
    with torch.no_grad():
        logits = model(input_ids=tokens, use_cache=False).logits[0, :-1].float()
    picked: list[float] = logits.log_softmax(-1).gather(1, tokens[0, 1:, None])[:, 0].tolist()
    return picked


def engine_logprobs(engine: Any, text: list[int]) -> list[float]:
    """Of each token but the first, by vLLM."""
    from vllm import SamplingParams

    engine._llm.reset_prefix_cache()
    asked = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    (output,) = engine._llm.generate([{"prompt_token_ids": text}], [asked], use_tqdm=False)
    return [step[token].logprob for step, token in zip(output.prompt_logprobs[1:], text[1:], strict=True)]


def gap(left: list[float], right: list[float]) -> float:
    return max(abs(a - b) for a, b in zip(left, right, strict=True))


def change(model: Any, seed: int = 2) -> None:
    """Other weights, and other buffers."""
    import torch

    from rlaif_ray.learner.model_state import model_entries

    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for entry in model_entries(model):
            (tensor,) = entry.needs
            if tensor.is_floating_point():
                tensor.add_(0.1 * torch.randn(tensor.shape, generator=generator).to(tensor.dtype))


def push(model: Any, engine: Any) -> None:
    """As runtime/weight_sync.py does it: two slots by turns, each overwritten while vLLM may still want it."""
    from rlaif_ray.learner.model_state import ModelState
    from rlaif_ray.rollout.weight_transfer import ShmSender, additive_checksum

    state, slots, checksum = ModelState(model), [ShmSender(), ShmSender()], 0
    if engine.weight_version < 0:
        engine.init_transfer({})
    engine.start_update()
    for k, names in enumerate(state.groups()):
        with state.gathered(names) as tensors:
            checksum += additive_checksum(tensors)
            engine.update(slots[k % 2].stage(names, tensors))
    assert engine.finish_update(engine.weight_version + 1) == [checksum % 2**63]
    engine.weight_version = 1
    for slot in slots:
        slot.close()


def main(folders: list[str]) -> int:
    """A row for each folder; 1 when one of them is wrong."""
    wrong = 0
    print("| model | at load | after a push | after another | stale would be |\n|---|---|---|---|---|", flush=True)
    for folder in folders:
        own = [sys.executable, "-m", "tests.benchmarks.zoo_push", "--one", folder]
        done = subprocess.run(own, capture_output=True, text=True, check=False)
        try:
            gaps = json.loads(done.stdout.splitlines()[-1])
        except (IndexError, ValueError):
            gaps = {"error": (done.stderr.strip().splitlines() or ["no output"])[-1][:300]}
        if "error" in gaps:
            print(f"| {Path(folder).name} | {gaps['error']} | | | |", flush=True)
            wrong += 1
            continue
        wrong += max(gaps["load"], gaps["push"], gaps["again"]) > BOUND
        cells = " | ".join(f"{gaps[key]:.2g}" for key in ("load", "push", "again", "moved"))
        print(f"| {Path(folder).name} | {cells} |", flush=True)
    return int(wrong > 0)


if __name__ == "__main__":
    if sys.argv[1] == "--one":
        print(json.dumps(measure(Path(sys.argv[2]))))
    else:
        raise SystemExit(main(sys.argv[1:]))
