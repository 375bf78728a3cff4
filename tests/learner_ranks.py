"""Learner ranks in processes of their own, and plain-torch oracles for what they compute.

torch.distributed, DeepSpeed and transformers' ZeRO-3 switch keep state in the process that no other test must meet.
"""

from __future__ import annotations

import multiprocessing
import pickle
import socket
import time
import traceback
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection, wait
from typing import Any

import torch
from torch import Tensor

from rlaif_ray.learner.engine import RankSpec
from rlaif_ray.learner.lora import merged_state
from rlaif_ray.types import Experience
from tests.pace import scaled


class RankProcesses:
    """`count` spawned processes, one per learner rank; they stay up from call to call, so imports are paid once."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._start()

    def _start(self) -> None:
        with socket.socket() as listener:
            listener.bind(("", 0))
            port = listener.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self._ends: list[Connection] = []
        self._processes = []
        for rank in range(self.count):
            here, there = context.Pipe()
            spec = RankSpec(rank, self.count, 0, "127.0.0.1", port, "cpu", threads=1)
            process = context.Process(target=_serve, args=(there, spec), daemon=True)
            process.start()
            self._ends.append(here)
            self._processes.append(process)

    def run(self, function: Callable[..., Any], *args: Any, timeout_s: float = 180.0) -> list[Any]:
        """`function(spec, *args)` on every rank at the same time; results by rank. Functions travel by name."""
        for end in self._ends:
            end.send_bytes(pickle.dumps((function, args)))
        try:
            results = self._answers(timeout_s)
        except BaseException:  # one that failed leaves its peers in a collective: the next test gets new processes
            self.close()
            self._start()
            raise
        return [results[rank] for rank in range(self.count)]

    def _answers(self, timeout_s: float) -> dict[int, Any]:
        results: dict[int, Any] = {}
        deadline = time.monotonic() + scaled(timeout_s)
        while len(results) < self.count:
            waited_for = {k: end for k, end in enumerate(self._ends) if k not in results}
            ready = wait(list(waited_for.values()), timeout=max(0.0, deadline - time.monotonic()))
            assert ready, f"ranks {sorted(waited_for)} gave no answer in {timeout_s} s"
            for rank, end in waited_for.items():
                if end in ready:
                    ok, answer = pickle.loads(end.recv_bytes())
                    assert ok, f"rank {rank} failed:\n{answer}"
                    results[rank] = answer
        return results

    def close(self) -> None:
        for process in self._processes:
            process.kill()
            process.join()


def _serve(connection: Connection, spec: RankSpec) -> None:
    while True:
        try:
            function, args = pickle.loads(connection.recv_bytes())
        except EOFError:  # the test run is over
            return
        try:
            answer: tuple[bool, Any] = True, function(spec, *args)
        except Exception:
            answer = False, traceback.format_exc()
        connection.send_bytes(pickle.dumps(answer))


def random_samples(
    prompt_lengths: Sequence[int], completion_lengths: Sequence[Sequence[int]], *, vocabulary: int = 320, seed: int = 0
) -> tuple[list[tuple[int, ...]], list[tuple[int, ...]]]:
    """Prompts and completions of these lengths; the samples of one prompt side by side. Ids above the special ones."""
    generator = torch.Generator().manual_seed(seed)

    def draw(length: int) -> tuple[int, ...]:
        return tuple(torch.randint(3, vocabulary, (length,), generator=generator).tolist())

    prompts, completions = [], []
    for length, own in zip(prompt_lengths, completion_lengths, strict=True):
        prompt = draw(length)
        prompts += [prompt] * len(own)
        completions += [draw(n) for n in own]
    return prompts, completions


def plain_logprobs(
    model: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], temperature: float = 1.0
) -> list[Tensor]:
    """(tokens,) log-probabilities of each completion by the model alone: sample by sample, nothing padded."""
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = model(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).logits[0]
        logprobs = torch.log_softmax(logits.float() / temperature, -1)[len(prompt) - 1 : -1]
        found.append(logprobs.gather(1, torch.tensor(completion)[:, None])[:, 0])
    return found


def plain_hidden(body: Any, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> list[Tensor]:
    """(tokens, hidden) state before each completion token, sample by sample."""
    found = []
    for prompt, completion in zip(prompts, completions, strict=True):
        hidden = body(input_ids=torch.tensor([[*prompt, *completion]]), use_cache=False).last_hidden_state[0]
        found.append(hidden[len(prompt) - 1 : -1])
    return found


def rectangle(rows: Sequence[Tensor], *, fill: float = 0.0) -> Tensor:
    """(B, T) of ragged rows."""
    return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True, padding_value=fill)


def rows_of(table: Tensor, completions: Sequence[Sequence[int]]) -> list[Tensor]:
    """The ragged rows of a (B, T) table."""
    return [table[i, : len(c)] for i, c in enumerate(completions)]


def make_experience(
    prompts: Sequence[tuple[int, ...]], completions: Sequence[tuple[int, ...]], **columns: Any
) -> Experience:
    """An Experience of these samples; `columns` are its other fields, those of (B, T) given as ragged rows."""
    lengths = torch.tensor([len(c) for c in completions])
    groups: dict[tuple[int, ...], int] = {}
    tables = {name: rectangle(v) if isinstance(v, list) else v for name, v in columns.items()}
    return Experience(
        prompt_tokens=tuple(prompts),
        tokens=rectangle([torch.tensor(c) for c in completions]),
        mask=torch.arange(int(lengths.max()))[None, :] < lengths[:, None],
        groups=torch.tensor([groups.setdefault(p, len(groups)) for p in prompts]),
        **tables,
    )


def full_weights(rank: Any) -> dict[str, Tensor]:
    """The weights by name, whole, adapters merged in; of a supervised rank those in fp32. Every rank calls it."""
    if not hasattr(rank, "weights"):  # no sender of weights: a supervised rank
        return merged_state(rank._model, keep=True, masters=True)
    found = {}
    for name, _, shape in rank.weights.metadata():
        with rank.weights.gathered([name]) as (tensor,):
            assert tensor.shape == shape
            found[name] = tensor.detach().cpu().clone()
    return found
