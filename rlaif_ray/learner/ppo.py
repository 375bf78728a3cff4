"""One rank of the RL learner: policy, critic and frozen reference, forward passes and updates.

Which samples a rank computes is decided outside (data/batching.py); sums of losses and statistics go back as sums,
and every loss is divided by the token count of the whole minibatch, so that neither padding, micro-batching, the
order of samples nor the number of ranks changes a gradient.

Letters: B samples of the batch, T longest completion, M completion tokens of a micro-batch.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from rlaif_ray.algorithm import kl, losses
from rlaif_ray.attention import PACKED, plan_attention
from rlaif_ray.config.algorithms import AlgorithmConfig, GrpoConfig, ImportanceConfig, PpoConfig, ReinforceConfig
from rlaif_ray.config.jobs import TrainJob
from rlaif_ray.data.batching import RankPlan
from rlaif_ray.learner import engine as deepspeed_door
from rlaif_ray.learner.agreement import Readings, logprobs_of_saved, read, saved_threads
from rlaif_ray.learner.checkpoints import RankCheckpoint
from rlaif_ray.learner.engine import RankSpec, save_model_folder, try_saving
from rlaif_ray.learner.finite import Tally, require_finite_model, require_finite_weights
from rlaif_ray.learner.head import settle_head
from rlaif_ray.learner.model_state import ModelState, master_entries, model_entries
from rlaif_ray.learner.modes import training_mode
from rlaif_ray.learner.modules import CausalPolicy, Critic
from rlaif_ray.learner.nodes import group_notes
from rlaif_ray.learner.packing import ModelInput, build_input, register_packed_attention
from rlaif_ray.learner.probe import Text, settle_attention, settle_split
from rlaif_ray.learner.sequence_parallel import sequence_group
from rlaif_ray.models import load_backbone, load_causal_lm, load_config, load_tokenizer, load_types
from rlaif_ray.types import Experience

Sums = dict[str, float]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def needs_critic(algorithm: AlgorithmConfig) -> bool:
    """Whether the advantages come from a learned value."""
    return isinstance(algorithm, PpoConfig | ReinforceConfig)


def needs_reference(algorithm: AlgorithmConfig) -> bool:
    """Whether the KL to the frozen start enters anywhere."""
    return algorithm.kl.coef > 0 or algorithm.kl.target is not None


class RlRank:
    """Policy, critic and reference of one learner process."""

    def __init__(
        self, job: TrainJob, spec: RankSpec, precision: Literal["fp32", "bf16"], *, start_timeout_s: float = 900.0
    ) -> None:
        """Joins its peers and loads the models; all ranks do so together."""
        self.device = deepspeed_door.join_ranks(spec, start_timeout_s)
        self._spec, self._job, self._precision = spec, job, precision
        self._importance = job.algorithm.importance_in(precision)
        self._sequence = sequence_group(job.learner.sequence_parallel, start_timeout_s)
        torch.manual_seed(job.seed)
        random.seed(job.seed)
        register_packed_attention()
        policy = job.policy
        config = load_config(policy.model, revision=policy.revision, trust_remote_code=policy.trust_remote_code)
        plan = plan_attention(policy.attention, config, policy.model)

        def load(loader: Callable[..., Any], attention: str) -> Any:
            with deepspeed_door.sharded_loading(job.learner, precision):
                model = loader(
                    policy.model,
                    dtype=DTYPES[precision],
                    attention=attention,
                    revision=policy.revision,
                    trust_remote_code=policy.trust_remote_code,
                )
            return model if job.learner.zero_stage == 3 else model.to(self.device)

        train: dict[str, Any] = {"total_steps": job.optimizer_steps, "precision": precision}
        self._model = load(load_causal_lm, plan.implementation)
        policy_module = CausalPolicy(self._model, job.learner.logits_chunk)
        self._policy = self._trainable(policy_module, self._model, lr=job.learner.lr, **train)
        attention, note = settle_attention(  # of all three: they are the same model
            plan,
            self._model,
            self._probed,
            name=policy.model,
            device=self.device,
            precision=precision,
            sharded=job.learner.zero_stage == 3,
        )
        how: dict[str, Any] = {"name": policy.model, "device": self.device, "precision": precision}
        attention = settle_split(self._sequence, attention, plan, self._model, self._probed, **how)
        self._packed = attention == PACKED
        where: dict[str, Any] = {"device": self.device, "precision": precision, "sharded": job.learner.zero_stage == 3}
        self.notes = [*([note] if note else []), *group_notes(job.learner)]  # to be told once
        self.notes += settle_head(policy_module, self._policy, name=policy.model, packed=self._packed, **where)
        self._critic, self._reference = None, None
        if needs_critic(job.algorithm):
            body = load(load_backbone, attention)
            critic_lr = job.learner.critic_lr or job.learner.lr
            self._critic = self._trainable(Critic(body).to(self.device), body, lr=critic_lr, **train)
        if needs_reference(job.algorithm):
            apart = policy_module.head is not None
            frozen = CausalPolicy(load(load_causal_lm, attention), job.learner.logits_chunk if apart else None)
            self._reference = deepspeed_door.frozen_engine(frozen, job.learner, precision=precision)
        self.weights = ModelState(self._model)
        try_saving(self._model, self._tokenizer, policy.model)
        given = load_types(policy.model, revision=policy.revision, trust_remote_code=policy.trust_remote_code)
        self._types = given.saved_as(policy.save_precision)
        self.notes += given.note(policy.model, self._types, precision)
        self._steps, self._critic_steps = Tally(), Tally()
        self._trained = {"policy": self._model} | ({} if self._critic is None else {"critic": self._critic.module})
        require_finite_model(self._model, policy.model)
        engines = {"policy": self._policy} | ({} if self._critic is None else {"critic": self._critic})
        self.checkpoint = RankCheckpoint(engines, spec.rank)

    def _trainable(self, module: torch.nn.Module, model: Any, *, lr: float, **kwargs: Any) -> Any:
        if self._job.learner.gradient_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        module.eval()  # but for `update`
        return deepspeed_door.trainable_engine(module, self._job.learner, lr=lr, **kwargs)

    # Forward passes

    @torch.no_grad()
    def annotate(
        self,
        prompts: Sequence[Sequence[int]],
        completions: Sequence[Sequence[int]],
        plan: RankPlan,
        *,
        with_policy: bool,
    ) -> dict[int, dict[str, Tensor]]:
        """Per sample of the plan: "ref" and (with a critic) "values", on request "policy"; each (tokens,) fp32 on CPU.

        `policy` and `ref` are log-probabilities of the completion tokens at the sampling temperature.
        """
        found: dict[int, dict[str, Tensor]] = {}
        for micro in plan:
            chosen = micro or (0,)  # a place-holder takes part in the collectives, nothing more
            batch = self._input(prompts, completions, chosen)
            parts: dict[str, Tensor] = {}
            if with_policy:
                parts["policy"] = self._logprobs(self._policy, batch)[0]
            if self._reference is not None:
                parts["ref"] = self._logprobs(self._reference, batch)[0]
            if self._critic is not None:
                parts["values"] = self._values(batch)
            if not self._sequence.leads:  # its group's first rank says the same
                continue
            lengths = [len(completions[i]) for i in chosen]
            pieces = {name: values.float().cpu().split(lengths) for name, values in parts.items()}
            for k, i in enumerate(micro):
                found[i] = {name: split[k] for name, split in pieces.items()}
        return found

    def _input(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], chosen: Sequence[int]
    ) -> ModelInput:
        return build_input(
            [prompts[i] for i in chosen], [completions[i] for i in chosen], packed=self._packed, device=self.device
        )

    def _logprobs(self, model: Any, batch: ModelInput) -> tuple[Tensor, Tensor]:
        """(M,) log-probabilities and (M,) entropies at the sampling temperature."""
        return self._scored(model, batch, self._job.sampling.temperature)

    def _scored(self, model: Any, batch: ModelInput, temperature: float) -> tuple[Tensor, Tensor]:
        own = self._sequence.split(batch, self._model)
        logprobs, entropy = model(own, temperature)
        return own.whole(logprobs), own.whole(entropy)

    def _values(self, batch: ModelInput) -> Tensor:
        """(M,) fp32 values of the critic."""
        assert self._critic is not None
        own = self._sequence.split(batch, self._model)
        return own.whole(self._critic(own))

    def _probed(self, batch: ModelInput) -> Tensor:
        """(M,) log-probabilities by the policy, at temperature 1."""
        return self._scored(self._policy, batch, 1.0)[0]

    def readings(self, text: Text) -> Readings:
        """The text's log-probabilities by the policy as it is now; under ZeRO-3 all ranks ask."""
        return read(self._probed, self._policy, self._model, text, packed=self._packed, device=self.device)

    # Updates

    def update(self, experience: Experience, schedule: Sequence[tuple[int, RankPlan]]) -> Sums:
        """Optimizer steps, one per (minibatch token count, this rank's micro-batches); returns sums over this
        rank's tokens, "tokens" among them, and step statistics that are the same on all ranks. Ranks that compute
        together have the same micro-batches, and the first of them has the sums.

        Raises:
            NotFiniteError: the weights are no numbers any more; on all ranks.
        """
        completions = [experience.tokens[i, : int(n)].tolist() for i, n in enumerate(experience.mask.sum(1))]
        sums: Sums = {"tokens": 0.0, "first_tokens": 0.0, "gap": 0.0, "first_ratio_error": 0.0}
        steps, critic_steps = [], []
        learning = [engine.module for engine in (self._policy, self._critic) if engine is not None]
        for number, (token_count, plan) in enumerate(schedule):
            with training_mode(*learning):
                for k, micro in enumerate(plan):
                    last, first = k == len(plan) - 1, number == 0
                    self._accumulate(experience, completions, micro, token_count, last=last, first=first, sums=sums)
            sums["lr"] = float(self._policy.get_lr()[0])  # read before the step, which moves the schedule on
            steps.append(deepspeed_door.optimizer_step(self._policy))
            if self._critic is not None:
                critic_steps.append(deepspeed_door.optimizer_step(self._critic))
        sums |= self._steps.sums(steps)
        if self._critic is not None:
            sums |= {f"value_{name}": value for name, value in self._critic_steps.sums(critic_steps).items()}
        require_finite_weights(self._trained, "after the update")  # they are pushed next
        return sums

    def _accumulate(
        self,
        experience: Experience,
        completions: Sequence[Sequence[int]],
        micro: Sequence[int],
        token_count: int,
        *,
        last: bool,
        first: bool,
        sums: Sums,
    ) -> None:
        """Forward and backward of one micro-batch."""
        chosen = list(micro or (0,))
        batch = self._input(experience.prompt_tokens, completions, chosen)
        flat = _Flat(experience, chosen, self.device)
        # DeepSpeed averages over ranks; our denominators are global already. A place-holder adds nothing. The ranks
        # of a group have a part of one loss's gradient each, so that the average over all ranks is right for them too.
        counted = bool(micro) and self._sequence.leads
        scale = self._spec.world_size / token_count if micro else 0.0
        logprobs, entropy = self._logprobs(self._policy, batch)
        loss, ratio, clipped, weights_clipped = policy_loss(
            self._job.algorithm, logprobs, flat, experience.kl_coef, self._importance
        )
        deepspeed_door.backward(self._policy, loss.sum() * scale, last=last)
        if counted:
            _add(sums, tokens=len(loss), policy_loss=loss, entropy=entropy, clipped=clipped)
            if weights_clipped is not None:
                _add(sums, importance_clipped=weights_clipped)
            if first:
                gap = (logprobs.detach() - flat.sampler_logprobs).abs()
                _add(sums, first_tokens=len(loss), gap=gap)
                sums["first_ratio_error"] = max(sums["first_ratio_error"], float((ratio - 1).abs().max()))
        if self._critic is not None:
            assert flat.values is not None and flat.returns is not None
            values = self._values(batch)
            clip = getattr(self._job.algorithm, "value_clip", None)
            value_loss, value_clipped = losses.value_loss(values, flat.values, flat.returns, clip)
            deepspeed_door.backward(self._critic, value_loss.sum() * scale, last=last)
            if counted:
                _add(sums, value_loss=value_loss, value_clipped=value_clipped)

    # Files

    def save_policy(self, folder: str) -> list[str]:
        """Rank 0 writes a Hugging Face folder; under ZeRO-3 all ranks help gather. Returns what the user should know
        of it."""
        weights = self.weights
        if self._types.wider_than_bf16:
            weights = ModelState(self._model, master_entries(model_entries(self._model)))
        state = weights.full_state(keep=self._spec.rank == 0)
        if self._spec.rank != 0:
            return []
        return save_model_folder(self._model, self._tokenizer, state, Path(folder), self._types)

    def _tokenizer(self) -> Any:
        policy = self._job.policy
        return load_tokenizer(policy.model, revision=policy.revision, trust_remote_code=policy.trust_remote_code)

    def readings_of_saved(self, folder: str, text: Text) -> list[float] | None:
        """The text's log-probabilities by what was saved there, on CPU; rank 0 alone loads it."""
        if self._spec.rank != 0:
            return None
        code = self._job.policy.trust_remote_code
        with saved_threads(self._spec):
            saved = load_causal_lm(folder, dtype=DTYPES[self._precision], attention="eager", trust_remote_code=code)
            return logprobs_of_saved(saved, text)


class _Flat:
    """The (M,) completion tokens of chosen samples out of (B, T) tensors, samples one after the other."""

    def __init__(self, experience: Experience, chosen: list[int], device: torch.device) -> None:
        mask = experience.mask[chosen]

        def pick(values: Tensor | None) -> Tensor | None:
            return None if values is None else values[chosen][mask].to(device)

        def need(values: Tensor | None) -> Tensor:
            picked = pick(values)
            assert picked is not None
            return picked

        self.logprobs = need(experience.logprobs)
        self.sampler_logprobs = need(experience.sampler_logprobs)
        self.advantages = need(experience.advantages)
        self.ref_logprobs = pick(experience.ref_logprobs)
        self.values = pick(experience.values)
        self.returns = pick(experience.returns)


def policy_loss(
    algorithm: AlgorithmConfig, logprobs: Tensor, flat: Any, kl_coef: float, importance: ImportanceConfig | None
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Per token, (M,): the algorithm's loss, the ratio to the sampling policy, and where it was clipped (bool); with
    importance weights, within these bounds, also where they were (bool)."""
    if isinstance(algorithm, ReinforceConfig):
        loss = losses.reinforce_policy_loss(logprobs, flat.advantages)
        ratio = torch.exp((logprobs - flat.logprobs).detach())
        clipped = torch.zeros_like(ratio, dtype=torch.bool)
    else:
        loss, ratio, clipped = losses.ppo_policy_loss(logprobs, flat.logprobs, flat.advantages, algorithm.clip)
        ratio = ratio.detach()
    weights_clipped = None
    if importance is not None:
        weights, weights_clipped = losses.truncated_importance_weight(
            flat.logprobs, flat.sampler_logprobs, importance.low, importance.high
        )
        loss = loss * weights
    if isinstance(algorithm, GrpoConfig) and kl_coef > 0:
        loss = loss + kl_coef * kl.kl_estimate(logprobs, flat.ref_logprobs, algorithm.kl.estimator)
    return loss, ratio, clipped, weights_clipped


def _add(sums: Sums, **terms: Tensor | int) -> None:
    for name, term in terms.items():
        value = float(term.detach().double().sum()) if isinstance(term, Tensor) else float(term)
        sums[name] = sums.get(name, 0.0) + value
