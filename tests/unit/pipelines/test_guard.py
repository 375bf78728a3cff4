"""The guard on hand-made learners and engines: when it looks, what it says, and what it lets pass."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from rlaif_ray.config.jobs import RewardModelJob, SftJob, TrainJob
from rlaif_ray.errors import InputError, LearnerLostError, MismatchError, NotFiniteError, RlaifError, RunError
from rlaif_ray.interfaces import GenerationSettings
from rlaif_ray.learner.agreement import Readings
from rlaif_ray.learner.probe import Text
from rlaif_ray.pipelines.finite import how_to_go_on
from rlaif_ray.pipelines.guard import GENERATED, Guard, described, experts_of, guard_text
from rlaif_ray.pipelines.long_text import LONGEST
from rlaif_ray.types import Completion, Experience, Prompt
from tests.jobs import embedded
from tests.tiny import cached_tiny_model, make_tokenizer

MODEL = str(cached_tiny_model(tied=True))


def true_logprobs(completions: Sequence[tuple[int, ...]]) -> list[float]:
    return [-1.0 - (token % 7) / 7 for tokens in completions for token in tokens]


@dataclass
class HandLearner:
    """Computes `true_logprobs`, each way off by so much at the last token."""

    together: float = 0.0
    alone: float = 0.0
    saved: float = 0.0
    asked: list[Text] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)

    def _off(self, text: Text, by: float) -> list[float]:
        *others, last = true_logprobs(text.completions)
        return [*others, last + by]

    def readings(self, text: Text) -> Readings:
        self.asked.append(text)
        return Readings(self._off(text, self.together), self._off(text, self.alone), packed=True)

    def readings_of_saved(self, folder: str, text: Text) -> list[float]:
        self.folders.append(folder)
        return self._off(text, self.saved)


@dataclass
class HandEngines:
    """Two replicas; the second is off by so much at the first token that follows a prompt."""

    off: float = 0.0
    once: bool = False  # only when it is asked for the first time
    asked: int = 0
    lost: list[tuple[str, str]] = field(default_factory=list)
    replaced: int = 0  # how often the second was

    def incarnations(self) -> dict[str, int]:
        return {"rollout engine 0": 0, "rollout engine 1": self.replaced}

    def lose(self, name: str, reason: str) -> None:
        self.lost.append((name, reason))

    def generate_on_each(self, prompts: Sequence[Prompt], settings: GenerationSettings) -> dict[str, list[Completion]]:
        self.asked += 1
        assert settings.prompt_logprobs and settings.ignore_eos and settings.temperature == 1.0
        found: dict[str, list[Completion]] = {}
        second = 0.0 if self.once and self.asked > 1 else self.off
        for name, off in (("rollout engine 0", 0.0), ("rollout engine 1", second)):
            drawn = tuple(range(20, 20 + settings.max_new_tokens))
            found[name] = [
                Completion(
                    prompt=p,
                    sample=0,
                    tokens=drawn,
                    logprobs=tuple(true_logprobs([drawn])),
                    text="",
                    finished=False,
                    weight_version=0,
                    prompt_logprobs=tuple(x + off for x in true_logprobs([p.tokens[1:]])),
                )
                for p in prompts
            ]
        return found


def train_job(**sections: Any) -> TrainJob:
    return embedded(TrainJob, {"policy": {"model": MODEL}, "steps": 9, **sections})


def guard_of(learner: HandLearner, **guard: Any) -> Guard:
    return Guard(train_job(guard=guard), learner, "fp32", 512)


def test_texts_are_unlike_one_is_long_and_two_share_a_prompt() -> None:
    tokenizer = make_tokenizer(None)
    text = guard_text(tokenizer, 512)
    assert text == guard_text(tokenizer, 512)
    lengths = [len(p) + len(c) for p, c in zip(text.prompts, text.completions, strict=True)]
    assert len(set(lengths)) == len(lengths) >= 4 and sum(lengths[:-1]) < 100
    assert lengths[-1] == LONGEST and len(text.completions[-1]) < 30  # few that are compared, far from the beginning
    assert len(set(text.prompts)) == len(text.prompts) - 1
    assert all(prompt[0] == tokenizer.bos_token_id for prompt in text.prompts)
    for room in (4, 5, 11, 63, 64, 100):
        short = guard_text(tokenizer, room)
        assert all(p and c and len(p) + len(c) <= room for p, c in zip(short.prompts, short.completions, strict=True))


def test_it_looks_at_the_start_after_two_steps_and_every_nth() -> None:
    learner, engines = HandLearner(), HandEngines()
    guard = guard_of(learner, every=5)
    looked = [version for version in range(12) if guard.check_push(engines, version)]  # type: ignore[arg-type]
    assert looked == [0, 1, 2, 5, 10]
    assert engines.asked == 5
    assert len(learner.asked) == 5  # both replicas drew the same: computed once
    # What the engine added is compared too.
    assert all(rest[-GENERATED:] == tuple(range(20, 20 + GENERATED)) for rest in learner.asked[0].completions)
    resumed = guard_of(learner, every=0)
    assert [v for v in range(40, 50) if resumed.check_push(engines, v)] == [40, 41, 42]  # type: ignore[arg-type]


def test_an_engine_that_differs_once_is_lost_and_the_run_goes_on() -> None:
    """Another model would differ again."""
    engines = HandEngines(off=0.002, once=True)
    found = guard_of(HandLearner()).check_push(engines, 0)  # type: ignore[arg-type]
    assert found == {"guard/engine_gap": 0.0, "guard/packing_gap": 0.0}  # of the other one
    reason = "computed one text in two ways under the same weights (off by 0.002 nats, then by 0)"
    assert engines.lost == [("rollout engine 1", reason)] and engines.asked == 2


def test_one_that_differs_again_ends_the_run() -> None:
    engines = HandEngines(off=0.002)
    with pytest.raises(MismatchError, match=r"the engine differs from .* which agree \(gap 0.002 nats"):
        guard_of(HandLearner()).check_push(engines, 0)  # type: ignore[arg-type]
    assert engines.asked == 2 and not engines.lost


def test_it_can_be_switched_off(tmp_path: Path) -> None:
    learner, engines = HandLearner(together=9.0, saved=9.0), HandEngines(off=9.0)
    off = guard_of(learner, enabled=False)
    assert off.check_push(engines, 0) == off.check_layout() == off.check_saved(tmp_path, NO_CHECKPOINTS) == {}  # type: ignore[arg-type]
    off.check_update(UPDATED | {"rollout/logprob_gap": 9.0}, experience_of(0.0))
    assert not learner.asked and not learner.folders and not engines.asked
    assert guard_of(HandLearner(saved=9.0), saved=False).check_saved(tmp_path, NO_CHECKPOINTS) == {}  # type: ignore[arg-type]
    accepted = guard_of(HandLearner(), max_gap=10.0).check_push(engines, 0)  # type: ignore[arg-type]
    assert accepted == {"guard/engine_gap": pytest.approx(9.0), "guard/packing_gap": 0.0}


@pytest.mark.parametrize(
    ("learner", "engines", "blamed", "remedy"),
    [
        (
            HandLearner(),
            HandEngines(off=2.5),
            "the engine differs from the learner's packed micro-batch",
            "another mod",
        ),
        (
            HandLearner(together=2.5),
            HandEngines(),
            "the learner's packed micro-batch differs",
            "policy.attention=eager",
        ),
        (HandLearner(alone=2.5), HandEngines(), "the model alone differs from the engine and", "report this one"),
    ],
)
def test_a_push_that_does_not_arrive_ends_the_run(
    learner: HandLearner, engines: HandEngines, blamed: str, remedy: str
) -> None:
    with pytest.raises(MismatchError) as caught:
        guard_of(learner).check_push(engines, 3 - 2)  # type: ignore[arg-type]
    text = str(caught.value)
    for part in (MODEL, "llama", blamed, "which agree", "gap 2.5 nats", "fp32 0.001", "weight version 1", remedy):
        assert part in text, text
    if engines.off:
        assert "rollout engine 1" in text


@dataclass
class NoNumbers(HandLearner):
    """Finite weights so large that everything computed from them is NaN, in every layout."""

    def _off(self, text: Text, by: float) -> list[float]:
        return [float("nan")] * sum(map(len, text.completions))


def test_nan_of_the_model_itself_is_no_mismatch(tmp_path: Path) -> None:
    guard = guard_of(NoNumbers())
    for attempt in (
        lambda: guard.check_push(HandEngines(), 1),  # type: ignore[arg-type]
        lambda: guard.check_saved(tmp_path, NO_CHECKPOINTS),  # type: ignore[arg-type]
    ):
        with pytest.raises(NotFiniteError, match="of the guard's text under finite weights") as caught:
            attempt()
        told = str(how_to_go_on(caught.value, train_job(), 1, "checkpoints/step-1"))
        assert "learner.lr=" in told and "checkpoints/step-1" in told and "report" not in told
        assert "Nothing of it was" not in told  # engines have it, or the folder
    # A model that nobody has trained yet is the user's choice.
    for start in (lambda: guard.check_push(HandEngines(), 0), guard.check_layout):  # type: ignore[arg-type]
        with pytest.raises(InputError, match="nothing could be learned"):
            start()


def test_nan_of_one_program_is_a_mismatch() -> None:
    with pytest.raises(MismatchError, match="the engine differs"):
        guard_of(HandLearner()).check_push(HandEngines(off=float("nan")), 1)  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match="packed micro-batch differs"):
        guard_of(HandLearner(together=float("nan"))).check_push(HandEngines(), 1)  # type: ignore[arg-type]


def test_an_engine_that_is_lost_meanwhile_is_not_judged() -> None:
    class Lost(HandEngines):
        def generate_on_each(self, prompts: Any, settings: Any) -> dict[str, list[Completion]]:
            return {}

    guard = guard_of(HandLearner(), every=0)
    assert guard.check_push(Lost(), 0) == {}  # type: ignore[arg-type]
    # That was no check: three follow.
    engines = HandEngines()
    assert [v for v in range(1, 7) if guard.check_push(engines, v)] == [1, 2, 3]  # type: ignore[arg-type]


@pytest.mark.parametrize("every", [0, 50])
def test_an_engine_that_took_the_place_of_another_is_checked_at_its_first_push(every: int) -> None:
    guard, engines = guard_of(HandLearner(), every=every), HandEngines()
    looked = []
    for version in range(1, 12):
        if version == 6:
            engines.replaced += 1
        if guard.check_push(engines, version):  # type: ignore[arg-type]
            looked.append(version)
    assert looked == [1, 2, 3, 6]
    engines.replaced, engines.off = 2, 2.5
    with pytest.raises(MismatchError, match="rollout engine 1"):
        guard.check_push(engines, 13)  # type: ignore[arg-type]


def test_one_that_did_not_answer_is_checked_at_the_next_push() -> None:
    class HalfLost(HandEngines):
        def generate_on_each(self, prompts: Any, settings: Any) -> dict[str, list[Completion]]:
            found = super().generate_on_each(prompts, settings)
            return {name: said for name, said in found.items() if self.asked > 3 or name.endswith("0")}

    guard, engines = guard_of(HandLearner(), every=0), HalfLost()
    assert [v for v in range(1, 8) if guard.check_push(engines, v)] == [1, 2, 3, 4]  # type: ignore[arg-type]


UPDATED = {"rollout/logprob_gap": 2e-5, "policy/first_ratio_error": 3e-4}


def experience_of(gap: float, *, reference: bool = True) -> Experience:
    ones = torch.ones(2, 3)
    mask = torch.tensor([[True, True, True], [True, False, False]])
    return Experience(
        prompt_tokens=((3,), (4,)),
        tokens=torch.ones(2, 3, dtype=torch.int64),
        mask=mask,
        finished=torch.tensor([True, True]),
        scores=ones[:, 0],
        groups=torch.tensor([0, 1]),
        sampler_logprobs=-ones,
        logprobs=-ones + torch.where(mask, gap, 100.0),
        ref_logprobs=-ones if reference else None,
        values=None,
    )


@pytest.mark.parametrize(
    ("metrics", "gap", "said"),
    [
        ({"rollout/logprob_gap": 0.004}, 0.0, "rollout/logprob_gap"),
        ({"policy/first_ratio_error": 0.3}, 0.0, "policy/first_ratio_error"),
        ({"policy/first_ratio_error": float("nan")}, 0.0, "policy/first_ratio_error"),
        ({}, 0.02, "the KL to the reference"),
        ({}, -0.02, "the KL to the reference"),  # of either sign: the estimate may cancel, or be below 0
    ],
)
def test_at_the_first_step_ratio_and_kl_say_that_nothing_has_moved(
    metrics: dict[str, float], gap: float, said: str
) -> None:
    guard = guard_of(HandLearner())
    guard.check_push(HandEngines(), 0)  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match=said):
        guard.check_update(UPDATED | metrics, experience_of(gap))
    guard.check_update(UPDATED | metrics, experience_of(gap))  # later it says nothing: the policy has moved


def test_a_resumed_run_is_away_from_its_reference() -> None:
    guard = guard_of(HandLearner())
    guard.check_push(HandEngines(), 7)  # type: ignore[arg-type]
    guard.check_update(UPDATED, experience_of(0.5))
    without = guard_of(HandLearner())
    without.check_push(HandEngines(), 0)  # type: ignore[arg-type]
    without.check_update(UPDATED, experience_of(0.5, reference=False))


def test_packing_is_checked_before_supervised_steps() -> None:
    job = SftJob.model_validate({"policy": {"model": MODEL}, "data": {"path": "x"}})
    assert Guard(job, HandLearner(together=5e-4), "fp32", 64).check_layout() == {
        "guard/packing_gap": pytest.approx(5e-4)
    }
    with pytest.raises(MismatchError, match=r"the learner's packed micro-batch differs from the model alone .*eager"):
        Guard(job, HandLearner(together=0.5), "fp32", 64).check_layout()
    eager = job.model_copy(update={"policy": job.policy.model_copy(update={"attention": "eager"})})
    with pytest.raises(MismatchError, match="Use another model"):
        Guard(eager, HandLearner(together=0.5), "fp32", 64).check_layout()


class Rewards(HandLearner):
    """Of a model whose rewards are large."""

    def _off(self, text: Text, by: float) -> list[float]:
        *others, last = [400.0 * x for x in true_logprobs(text.completions)]
        return [*others, last + by]

    def readings_of_saved(self, folder: str, text: Text) -> list[float]:
        *others, last = [400.0 * true_logprobs([tokens])[-1] for tokens in text.completions]
        return [*others, last + self.saved]


def test_rewards_are_compared_by_their_size() -> None:
    job = RewardModelJob.model_validate({"policy": {"model": MODEL}, "data": {"path": "x"}})
    gaps = Guard(job, Rewards(together=0.02), "fp32", 64).check_layout()
    assert 0.02 / 800 < gaps["guard/packing_gap"] < 0.02 / 400
    with pytest.raises(MismatchError, match=r"gap 0.0\d+ of the largest reward"):
        Guard(job, Rewards(together=9.0), "fp32", 64).check_layout()
    assert Guard(job, Rewards(), "fp32", 64).check_saved(Path("x"), NO_CHECKPOINTS) == {"guard/saved_gap": 0.0}  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match="not to be trusted"):
        Guard(job, Rewards(saved=9.0), "fp32", 64).check_saved(Path("x"), NO_CHECKPOINTS)  # type: ignore[arg-type]


class SomeCheckpoints:
    def __init__(self, newest: str | None) -> None:
        self._newest = newest

    def newest(self) -> str | None:
        return self._newest


NO_CHECKPOINTS = SomeCheckpoints(None)


def test_a_saved_folder_that_is_another_model_is_not_to_be_trusted(tmp_path: Path) -> None:
    learner = HandLearner(saved=1e-5)
    assert guard_of(learner).check_saved(tmp_path, NO_CHECKPOINTS) == {"guard/saved_gap": pytest.approx(1e-5)}  # type: ignore[arg-type]
    assert learner.folders == [str(tmp_path)]
    with pytest.raises(MismatchError, match=r"not to be trusted.*gap 1.3 nats.*checkpoints/step-8 has the trained"):
        guard_of(HandLearner(saved=-1.3)).check_saved(tmp_path, SomeCheckpoints("checkpoints/step-8"))  # type: ignore[arg-type]
    with pytest.raises(MismatchError, match="There is no checkpoint"):
        guard_of(HandLearner(saved=-1.3)).check_saved(tmp_path, NO_CHECKPOINTS)  # type: ignore[arg-type]


def test_bf16_is_compared_on_average() -> None:
    job = train_job()
    guard = Guard(job, HandLearner(together=0.4), "bf16", 512)
    assert guard.check_layout()
    guard.check_update(UPDATED | {"policy/first_ratio_error": 3.0, "rollout/logprob_gap": 0.03}, experience_of(0.0))
    with pytest.raises(MismatchError, match="rollout/logprob_gap"):
        Guard(job, HandLearner(), "bf16", 512).check_update(UPDATED | {"rollout/logprob_gap": 0.2}, experience_of(0.0))
    with pytest.raises(MismatchError, match=r"in bf16 0.15 on average"):
        Guard(job, HandLearner(together=20.0), "bf16", 512).check_layout()


def test_a_model_is_described_by_its_kinds_of_layers() -> None:
    from transformers import LlamaConfig, Qwen3NextConfig

    assert described("x", LlamaConfig()) == "model x (llama; layers: all of one kind)"
    config = Qwen3NextConfig(layer_types=["linear_attention", "full_attention"], num_hidden_layers=2, num_experts=4)
    assert described("x", config) == "model x (qwen3_next; layers: full_attention, linear_attention, 4 experts)"


@pytest.mark.parametrize(
    "error",
    [
        InputError("the weights of model 'x' are incomplete (missing 2, first a.b): give a folder with all weights."),
        RunError("learner failed: RuntimeError: size mismatch"),
    ],
)
def test_a_saved_folder_that_cannot_be_loaded_is_no_fault_of_the_user(error: RlaifError, tmp_path: Path) -> None:
    class Broken(HandLearner):
        def readings_of_saved(self, folder: str, text: Text) -> list[float]:
            raise error

    with pytest.raises(MismatchError) as caught:
        guard_of(Broken()).check_saved(tmp_path, SomeCheckpoints("checkpoints/step-8"))  # type: ignore[arg-type]
    assert not isinstance(caught.value, InputError)  # exit code 1, not 2
    for part in (str(tmp_path), "not to be trusted", str(error), "The checkpoint checkpoints/step-8 has the trained"):
        assert part in str(caught.value)


def test_a_learner_that_dies_over_it_says_nothing_of_the_folder(tmp_path: Path) -> None:
    class Dying(HandLearner):
        def readings_of_saved(self, folder: str, text: Text) -> list[float]:
            raise LearnerLostError("learner rank 0 died")

    with pytest.raises(LearnerLostError):
        guard_of(Dying()).check_saved(tmp_path, NO_CHECKPOINTS)  # type: ignore[arg-type]


def test_the_bound_follows_model_and_device() -> None:
    """One token off by 5e-3 in a dense model on CPUs is an error, on GPUs it is TF32."""
    one = HandLearner(together=5e-3)
    with pytest.raises(MismatchError, match=r"fp32 0\.001 for each token"):
        guard_of(one).check_layout()
    assert Guard(train_job(), one, "fp32", 512, "cuda").check_layout()
    with pytest.raises(MismatchError, match=r"fp32 0\.02 on average"):
        Guard(train_job(), HandLearner(together=9.0), "fp32", 512, "cuda").check_layout()


def test_experts_are_counted_by_any_name() -> None:
    from transformers import DeepseekV3Config, LlamaConfig, MixtralConfig, Qwen3MoeConfig

    counts = [experts_of(kind()) for kind in (LlamaConfig, MixtralConfig, Qwen3MoeConfig, DeepseekV3Config)]
    assert counts == [0, 8, 128, 256]
