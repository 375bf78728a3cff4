"""The general guard: engine, learner and saved folder must compute the same model, or the run ends.

A short fixed text is computed under the same weights by the engine, by the learner in the layout it trains in, and by
the model alone, one sample at a time. Architectures that any of them gets wrong train on wrong numbers otherwise, with
nothing but odd curves to show for it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from rlaif_ray.attention import switch_length
from rlaif_ray.config.jobs import RewardModelJob
from rlaif_ray.errors import InputError, LearnerLostError, MismatchError, RunError
from rlaif_ray.interfaces import GenerationSettings
from rlaif_ray.learner.agreement import before_last_tokens
from rlaif_ray.learner.probe import Text
from rlaif_ray.models import load_config, load_tokenizer, load_types
from rlaif_ray.pipelines.agreement import WORST, Comparison, bound_for, compare
from rlaif_ray.pipelines.checkpoint import due
from rlaif_ray.pipelines.finite import OF_GUARD, require_numbers
from rlaif_ray.pipelines.long_text import long_sample
from rlaif_ray.types import Completion, Prompt

if TYPE_CHECKING:
    from rlaif_ray.config.jobs import SupervisedJob, TrainJob
    from rlaif_ray.learner.agreement import Readings
    from rlaif_ray.pipelines.checkpoint import Checkpoints
    from rlaif_ray.runtime.groups import EngineGroup
    from rlaif_ray.types import Experience

GENERATED = 4  # tokens that the engine adds to each text: it computes those one at a time, and the text at once
FIRST_PUSHES = 3  # before the first step, and after the first two
ENGINE, ALONE, SAVED = "the engine", "the model alone", "the saved folder"
TEXT = (
    "The river runs down from the hills to the sea, and on its way it turns eleven mills. When the rain is late, the "
    "people of the valley share what water there is: each field in turn, a day at a time. \"Nobody's wheat is worth "
    'more than a neighbour," they say. In 1897 it rained 40 days; still, the old rule held, and it holds today.'
)


def guard_text(tokenizer: Any, room: int) -> Text:
    """The fixed text as samples, none longer than `room` tokens: of several lengths, so that both packing and padding
    have something to get wrong, and two with the same prompt, which packing computes once; one is long."""
    tokens = tokenizer.encode(TEXT, add_special_tokens=False) or [tokenizer.eos_token_id]
    while len(tokens) < 58:
        tokens += tokens
    begin = [] if tokenizer.bos_token_id is None else [tokenizer.bos_token_id]
    prompts, completions = [], []
    for prompt, completion in (((0, 6), (6, 25)), ((0, 6), (30, 41)), ((12, 15), (41, 58)), ((50, 51), (52, 58))):
        prompts.append((*begin, *tokens[slice(*prompt)])[: max(1, room // 2)])
        completions.append(tuple(tokens[slice(*completion)][: max(1, room - len(prompts[-1]))]))
    long = long_sample(tokenizer, begin, room)
    if long is not None:
        prompts.append(long[0])
        completions.append(long[1])
    return Text(tuple(prompts), tuple(completions))


class Learner(Protocol):
    """What the guard asks of a learner."""

    def readings(self, text: Text) -> Readings: ...

    def readings_of_saved(self, folder: str, text: Text) -> list[float]: ...


class Guard:
    """Compares, and ends the run where what must be the same is not. One for each learner that starts."""

    def __init__(
        self,
        job: TrainJob | SupervisedJob,
        learner: Learner,
        precision: Literal["fp32", "bf16"],
        room: int,
        device: Literal["cpu", "cuda"] = "cpu",
    ) -> None:
        """`room`: tokens that engine and model can read."""
        self._cfg, self._policy, self._learner = job.guard, job.policy, learner
        self._precision: Literal["fp32", "bf16"] = precision
        self._unit = "nats" if not isinstance(job, RewardModelJob) else "of the largest reward"
        code: dict[str, Any] = {
            "revision": job.policy.revision,
            "trust_remote_code": job.policy.trust_remote_code,
        }
        config = load_config(job.policy.model, **code)
        room = min(room, switch_length(config) or room)  # all texts are computed together
        self._text = guard_text(load_tokenizer(job.policy.model, **code), room - GENERATED)
        self._model = described(job.policy.model, config)
        self._bound = bound_for(precision, job.guard.max_gap, device=device, experts=experts_of(config) > 0)
        # What is saved may be rounded: it goes back into the types that the model was given in.
        narrow = load_types(job.policy.model, **code).saved_as(job.policy.save_precision).is_narrow
        self._saved_bound = bound_for("bf16", job.guard.max_gap) if narrow else self._bound
        self._pushed = False
        self._checked = 0  # pushes of which something was read
        self._seen: dict[str, int] = {}  # incarnation of each engine that was read, by its name
        self._from_start = False  # whether the policy was the reference at the first push
        self._steps = 0

    def check_push(self, rollouts: EngineGroup, version: int) -> dict[str, float]:
        """After a push: the engines against the learner, when it is time to, or one of them is new. Returns gaps as
        metrics.

        Raises:
            MismatchError: they differ.
            NotFiniteError: the learner's own numbers are NaN or infinite.
        """
        if not self._pushed:
            self._pushed, self._from_start = True, version == 0
        if not self._cfg.enabled:
            return {}
        serving = rollouts.incarnations()
        new = serving.items() - self._seen.items()  # took the place of others since, or were not asked yet
        if not (self._checked < FIRST_PUSHES or new or due(version, self._cfg.every)):
            return {}
        samples = zip(self._text.prompts, self._text.completions, strict=True)
        prompts = [Prompt(f"guard-{i}", (), (*start, *rest)) for i, (start, rest) in enumerate(samples)]
        settings = GenerationSettings(1, GENERATED, 1.0, seed=0, ignore_eos=True, prompt_logprobs=True)
        gaps: list[tuple[float, float]] = []  # of engine and packing to the model alone
        read: dict[Text, Readings] = {}
        for name, completions in rollouts.generate_on_each(prompts, settings).items():
            # Engines on unlike devices may draw unlike tokens; most often all have drawn the same.
            text = with_drawn(self._text, completions)
            if text not in read:
                read[text] = self._learner.readings(text)
            found, together = read[text], self._layout(read[text])
            self._check_numbers(found.alone, f"weight version {version}", trained=version > 0)
            comparison = self._compared(completions, found)
            if not comparison.agrees:
                self._ask_again(rollouts, name, (prompts, settings), comparison, f"weight version {version}, {name}")
                continue
            gaps.append((comparison.gaps[ENGINE, ALONE], comparison.gaps[together, ALONE]))
            if name in serving:
                self._seen[name] = serving[name]
        if not gaps:  # no engine is left that answered: the next push is checked in the place of this one
            return {}
        self._checked += 1
        of_engines, of_packing = zip(*gaps, strict=True)
        return {"guard/engine_gap": max(of_engines), "guard/packing_gap": max(of_packing)}

    def _compared(self, completions: Sequence[Completion], found: Readings) -> Comparison:
        own = engine_readings(self._text, completions)
        return compare({ENGINE: own, self._layout(found): found.together, ALONE: found.alone}, self._bound)

    def _ask_again(
        self,
        rollouts: EngineGroup,
        name: str,
        request: tuple[list[Prompt], GenerationSettings],
        first: Comparison,
        when: str,
    ) -> None:
        """A program that computes another model does so again. An engine that doesn't has a fault of its own, such as
        broken memory: it is lost, and another takes its place.

        Raises:
            MismatchError: it differs again, or it is the learner that differs.
        """
        comparison = first
        if first.odd == ENGINE:
            completions = rollouts.generate_on_each(*request).get(name)
            if completions is None:  # it is gone meanwhile
                return
            found = self._learner.readings(with_drawn(self._text, completions))
            comparison = self._compared(completions, found)
            if comparison.agrees:
                gaps = f"off by {first.worst:.3g} {self._unit}, then by {comparison.worst:.2g}"
                rollouts.lose(name, f"computed one text in two ways under the same weights ({gaps})")
                return
        raise MismatchError(self._message(comparison, when, comparison.names[1]))

    def check_update(self, metrics: Mapping[str, float], experience: Experience) -> None:
        """After the first update: the rollouts, and the reference, against the policy that was updated.

        Until the first optimizer step sampler, policy and (from the start on) reference are one model: the ratio is 1
        and the KL is 0.

        Raises:
            MismatchError: they are not.
        """
        self._steps += 1
        if not self._cfg.enabled or self._steps > 1:
            return
        allowed = self._bound.gap
        found = {"rollout/logprob_gap": (metrics["rollout/logprob_gap"], allowed)}
        if self._bound.of == "worst":  # in bf16 the worst of so many tokens says nothing
            found["policy/first_ratio_error"] = (metrics["policy/first_ratio_error"], WORST * allowed)
        if self._from_start and experience.ref_logprobs is not None:
            gap = (experience.logprobs - experience.ref_logprobs)[experience.mask].abs().mean()
            found["the KL to the reference, per token,"] = (float(gap), allowed)
        for name, (value, most) in found.items():
            if not value <= most:
                raise MismatchError(
                    f"{self._model}: {name} must be 0 at the first step but for rounding (got {value:.3g}, allowed in "
                    f"{self._precision} {most:.2g}): engine, learner and reference still have the same weights, and "
                    f"compute this step's samples differently, though not the guard's texts. Try "
                    f"policy.attention=eager. {self._remedy(ENGINE, '')}"
                )

    def check_layout(self) -> dict[str, float]:
        """Before the first step: the learner's micro-batches against the model alone. Returns gaps as metrics.

        Raises:
            MismatchError: they differ.
        """
        if not self._cfg.enabled:
            return {}
        found = self._learner.readings(self._text)
        self._check_numbers(found.alone, "before the first step", trained=False)
        together = self._layout(found)
        comparison = compare(self._scaled({together: found.together, ALONE: found.alone}), self._bound)
        if not comparison.agrees:
            raise MismatchError(self._message(comparison, "before the first step", together))
        return {"guard/packing_gap": comparison.worst}

    def check_saved(self, folder: Path, checkpoints: Checkpoints) -> dict[str, float]:
        """After saving: what transformers loads from the folder against the learner. Returns the gap for the summary.

        Raises:
            MismatchError: they differ, or it can't be loaded; says what to go on from instead.
            NotFiniteError: the learner's own numbers are NaN or infinite.
        """
        if not (self._cfg.enabled and self._cfg.saved):
            return {}
        trained = self._learner.readings(self._text).alone
        self._check_numbers(trained, f"the weights in {folder}", trained=True)
        if self._unit != "nats":
            trained = before_last_tokens(trained, self._text)
        checkpoint = checkpoints.newest()
        instead = f"The checkpoint {checkpoint} has the trained weights" if checkpoint else "There is no checkpoint"
        try:
            saved = self._learner.readings_of_saved(str(folder), self._text)
        except LearnerLostError:
            raise  # it died over it, which says nothing of the folder
        except (InputError, RunError) as error:  # our own result is no input of the user's
            raise MismatchError(
                f"{folder} is not to be trusted: transformers can't load it ({self._model}; {error}) {instead}; report "
                f"this with the model's name."
            ) from error
        comparison = compare(self._scaled({SAVED: saved, ALONE: trained}), self._saved_bound)
        if not comparison.agrees:
            raise MismatchError(
                f"{folder} is not to be trusted: loaded by transformers it is another model than the one that was "
                f"trained ({self._model}; {self._gap(comparison)}). {instead}; report this with the model's name."
            )
        return {"guard/saved_gap": comparison.worst}

    def _check_numbers(self, found: Sequence[float], when: str, *, trained: bool) -> None:
        """Finite weights may still give NaN, as after one step at a hopeless learning rate: no program is to blame.

        Raises:
            InputError: some of what the model alone says is NaN or infinite, and it has learned nothing yet.
            NotFiniteError: the same after training.
        """
        if trained:
            require_numbers(found, f"values of {OF_GUARD} under finite weights ({self._model}; {when})")
        elif not all(map(math.isfinite, found)):
            wider = (
                " Try policy.precision=fp32, or another model." if self._precision == "bf16" else " Use another one."
            )
            raise InputError(
                f"{self._model} gives NaN or infinite values of {OF_GUARD} in {self._precision}, {when}: nothing could "
                f"be learned.{wider}"
            )

    def _layout(self, found: Readings) -> str:
        return f"the learner's {'packed' if found.packed else 'padded'} micro-batch"

    def _scaled(self, readings: dict[str, list[float]]) -> dict[str, list[float]]:
        """Rewards have no unit: the bound is a share of the largest, where that is above 1. Log-probabilities stay."""
        if self._unit == "nats":
            return readings
        scale = max(1.0, *(abs(value) for value in readings[ALONE]))
        return {name: [value / scale for value in values] for name, values in readings.items()}

    def _gap(self, comparison: Comparison) -> str:
        return f"gap {comparison.worst:.3g} {self._unit}, allowed in {self._precision} {comparison.bound}"

    def _message(self, comparison: Comparison, when: str, together: str) -> str:
        """What differs, by how much, and what to do."""
        odd, names = comparison.odd, comparison.names
        if odd is None:
            pairs = ", ".join(f"{a} / {b} {gap:.3g}" for (a, b), gap in comparison.gaps.items())
            what = f"{', '.join(names)} differ from each other ({pairs})"
        else:
            others = [name for name in names if name != odd]
            what = f"{odd} differs from {' and '.join(others)}" + (", which agree" if len(others) > 1 else "")
        return (
            f"{self._model} is not computed alike under the same weights: {what} ({self._gap(comparison)}; {when}). "
            f"Training would go on from wrong numbers. {self._remedy(odd, together)}"
        )

    def _remedy(self, odd: str | None, together: str) -> str:
        accept = "Where the difference is intended, such as with a quantised engine, raise guard.max_gap."
        if odd == ENGINE:
            return (
                f"This vLLM computes this model differently, or did not take all of its weights: use another model or "
                f"another version of vLLM, and report it. {accept}"
            )
        if odd == together and self._policy.attention != "eager":
            return "Set policy.attention=eager: it computes samples padded, with every term of the model's attention."
        return f"Use another model, and report this one. {accept}"


def with_drawn(text: Text, completions: Sequence[Completion]) -> Text:
    """The text, each sample longer by what an engine drew after it."""
    longer = [(*rest, *c.tokens) for rest, c in zip(text.completions, completions, strict=True)]
    return Text(text.prompts, tuple(longer))


def engine_readings(text: Text, completions: Sequence[Completion]) -> list[float]:
    """An engine's log-probabilities of the completions in the text, and of what it drew after them."""
    found: list[float] = []
    for rest, completion in zip(text.completions, completions, strict=True):
        found += [*completion.prompt_logprobs[-len(rest) :], *completion.logprobs]
    return found


def described(name: str, config: Any) -> str:
    """A model's name, type and kinds of layers, for messages."""
    text = config.get_text_config()
    layers = getattr(text, "layer_types", None) or getattr(text, "layers_block_type", None) or ()
    kinds = sorted(set(map(str, layers))) or ["all of one kind"]
    experts = experts_of(config)
    of_experts = f", {experts} experts" if experts else ""
    return f"model {name} ({text.model_type}; layers: {', '.join(kinds)}{of_experts})"


def experts_of(config: Any) -> int:
    """How many experts a layer of the model chooses from; 0 for a dense one."""
    text = config.get_text_config()
    fields = ("num_experts", "num_local_experts", "n_routed_experts")
    return next((count for field in fields if (count := getattr(text, field, None) or 0)), 0)
