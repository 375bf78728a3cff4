"""When an engine sleeps and wakes, on a stand-in with vLLM's rules; tests/gpu/test_sleep_wake.py has the memory."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest

from rlaif_ray.interfaces import GenerationSettings
from rlaif_ray.rollout.vllm_engine import EngineSpec, VllmEngine, engine_arguments
from rlaif_ray.types import Prompt, TokenQuery

pytest.importorskip("vllm")


class Sleeper:
    """Of vLLM's `LLM`: what is asleep can't be used, and only what is asleep can wake (executor/abstract.py)."""

    def __init__(self) -> None:
        self.asleep: set[str] = set()
        self.told: list[str] = []

    def sleep(self, level: int) -> None:
        assert level == 1 and "weights" not in self.asleep
        self.asleep = {"weights", "kv_cache"}
        self.told.append("sleep")

    def wake_up(self, tags: list[str]) -> None:
        assert tags and set(tags) <= self.asleep
        self.asleep -= set(tags)
        self.told.append("wake " + " ".join(tags))

    def generate(self, requests: list[Any], parameters: list[Any], use_tqdm: bool) -> list[Any]:
        assert not self.asleep
        self.told.append("generate")
        step = {7: SimpleNamespace(logprob=-0.5)}
        answer = SimpleNamespace(token_ids=[7], logprobs=[step], finish_reason="stop")
        return [SimpleNamespace(outputs=[answer], prompt_logprobs=None) for _ in requests]

    def start_weight_update(self) -> None:
        assert "weights" not in self.asleep
        self.told.append("update")

    def finish_weight_update(self) -> None:
        assert "weights" not in self.asleep

    def reset_prefix_cache(self) -> None: ...

    def collective_rpc(self, name: str, args: tuple[Any, ...] = ()) -> list[Any]:
        assert "weights" not in self.asleep
        return [[]] if name == "not_loaded" else [1]


def engine(sleep: bool) -> tuple[VllmEngine, Sleeper]:
    """An engine that has just started."""
    spec = EngineSpec("m", None, False, "bfloat16", "cuda", 64, 1, 0.4, 1.0, 0, 1, "ipc", sleep=sleep)
    made, llm = VllmEngine.__new__(VllmEngine), Sleeper()
    made._llm, made._spec, made._broken, made.weight_version = llm, spec, None, -1
    made._thought_tokens = {}
    made._tokenizer = SimpleNamespace(decode=lambda tokens, skip_special_tokens: "seven")
    made._asleep, made.busy_since = set(), None
    made._sleep()
    return made, llm


def sample(made: VllmEngine) -> None:
    prompt = Prompt(id="p", messages=(), text="", tokens=(1, 2))
    settings = GenerationSettings(temperature=1.0, max_new_tokens=1, samples_per_prompt=1, seed=0)
    (completion,) = made.generate([prompt], settings)
    assert completion.text == "seven"


def test_it_is_awake_only_while_it_works() -> None:
    made, llm = engine(sleep=True)
    for version in range(2):
        made.start_update()
        assert made.finish_update(version) == [1]
        sample(made)
        assert made.token_logprobs([TokenQuery(prompt=(1, 2), candidates=(7,))])[0].logprobs == (-0.5,)
    step = ["wake weights", "update", "wake kv_cache", "generate", "sleep"]
    assert llm.told == ["sleep", *([*step, "wake weights kv_cache", "generate", "sleep"]) * 2]


def test_one_that_is_not_to_sleep_never_does() -> None:
    made, llm = engine(sleep=False)
    made.start_update()
    made.finish_update(0)
    sample(made)
    assert llm.told == ["update", "generate"]


@pytest.mark.parametrize("sleep", [False, True])
def test_vllm_is_told(sleep: bool) -> None:
    made, _ = engine(sleep)
    assert engine_arguments(made._spec).get("enable_sleep_mode", False) is sleep
