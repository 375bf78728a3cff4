"""Real Ray, real vLLM, real DeepSpeed: after a push the engines sample from the learner's weights and no others.

Starting is what costs, so processes are shared: one engine group per model (two replicas of the tied one, which start
from a policy that a learner saved), and learner processes for one and for two ranks that take on one case after the
other. Every test pushes before it samples.
"""

from __future__ import annotations

import hashlib
import os
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from rlaif_ray.config.jobs import TrainJob
from rlaif_ray.config.sections import WeightSyncConfig
from rlaif_ray.errors import MismatchError, RunError, StaleWeightsError
from rlaif_ray.interfaces import GenerationSettings
from rlaif_ray.learner.engine import RankSpec
from rlaif_ray.learner.model_state import ModelState
from rlaif_ray.pipelines.experience import add_advantages, check_fresh
from rlaif_ray.pipelines.guard import Guard
from rlaif_ray.rollout.buckets import lay_out
from rlaif_ray.rollout.checksum import checksum
from rlaif_ray.rollout.receiving import update_messages
from rlaif_ray.runtime.actors import Actor, LearnerActor
from rlaif_ray.runtime.cluster import open_cluster
from rlaif_ray.runtime.groups import EngineGroup, LearnerGroup
from rlaif_ray.runtime.replicas import Replicas
from rlaif_ray.runtime.supervision import Limits, Watch, Watched
from rlaif_ray.runtime.waiting import gather
from rlaif_ray.runtime.weight_sync import Sync
from rlaif_ray.storage import Place, StoredFolder
from rlaif_ray.types import Completion, Experience, Prompt, Sample, Score
from tests import learner_ranks
from tests.jobs import embedded
from tests.pace import scaled
from tests.tiny import cached_tiny_model

pytestmark = [pytest.mark.ray, pytest.mark.engine, pytest.mark.slow]

# What these tests do inside of actors travels as code: a worker can't import a test module.
for module in (sys.modules[__name__], learner_ranks):
    ray.cloudpickle.register_pickle_by_value(module)

CONTEXT, ANSWER = 64, 12
KINDS = {"tied": 2, "untied": 1}  # engine replicas
STAGES = {0: 1, 2: 2, 3: 2}  # ZeRO stage: learner ranks
PROMPTS = [Prompt(str(i), (), tuple(range(10 + i, 20 + 2 * i))) for i in range(6)]


def tiny_job(kind: str, stage: int) -> TrainJob:
    # Without the threshold DeepSpeed keeps all of so small a model whole, and a sync would have nothing to gather.
    overrides = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    return embedded(
        TrainJob,
        {
            "policy": {"model": str(cached_tiny_model(tied=kind == "tied")), "precision": "fp32"},
            "sampling": {"prompts_per_step": len(PROMPTS), "samples_per_prompt": 2},
            "rollout": {"kv_cache_gb": 0.1, "replicas": KINDS[kind]},
            "algorithm": {"type": "ppo", "minibatches": 2, "old_logprobs": "learner"},
            "learner": {"zero_stage": stage, "ranks": STAGES[stage], "lr": 1e-2, "deepspeed_overrides": overrides},
            "cluster": {
                "address": "local",
                "threads_per_actor": 1,
                "start_timeout_s": scaled(300),
                "call_timeout_s": scaled(120),
            },
        },
    )


@dataclass
class Processes:
    """What all tests share."""

    engines: dict[str, EngineGroup]  # by kind of model
    learners: dict[int, LearnerGroup]  # by number of ranks
    saved_policy: Path  # trained a step from the tied model
    from_disk: list[Completion]  # by the tied engines, started from it, before any sync
    synced: list[Completion]  # the same, after the learner that wrote it had synced
    version: int = 0  # of the last push, in the order of the tests


@pytest.fixture(scope="module")
def processes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Processes]:
    assert not ray.is_initialized()
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    options: dict[str, Any] = {"include_dashboard": False, "logging_level": "ERROR", "log_to_driver": False}
    ray.init(address="local", num_cpus=4, object_store_memory=200 * 2**20, **options)
    with ExitStack() as stack:
        stack.callback(ray.shutdown)
        jobs = {"tied": tiny_job("tied", 3), "untied": tiny_job("untied", 0)}
        tied, untied = (stack.enter_context(open_cluster(job)) for job in jobs.values())
        engines = {"untied": untied.start_rollouts(jobs["untied"].policy, jobs["untied"].rollout, context=CONTEXT)}
        learners = {2: tied.start_learner(), 1: untied.start_learner()}
        tied.wait()
        learners[2].update(experience_of(learners[2], jobs["tied"], made_up_completions()))
        folder = saved(learners[2], tmp_path_factory.mktemp("start") / "policy")
        start = jobs["tied"].policy.model_copy(update={"model": str(folder)})
        engines["tied"] = tied.start_rollouts(start, jobs["tied"].rollout, context=CONTEXT)
        tied.wait()
        untied.wait()
        # Of the engine itself: the group lets nobody sample before a push.
        from_disk = ray.get(engines["tied"].actors[0].generate.remote(PROMPTS, settings(seed=5)), timeout=scaled(60))
        sync = tied.connect(learners[2], engines["tied"])
        sync.push(0)
        synced = sample(engines["tied"], seed=5)
        sync.close()
        yield Processes(engines, learners, folder, from_disk, synced)


@dataclass
class Case:
    """A learner, the engines it feeds, and the way between."""

    processes: Processes
    kind: str
    job: TrainJob
    learner: LearnerGroup
    engines: EngineGroup
    sync: Sync

    def push(self) -> Any:
        self.processes.version += 1
        return self.sync.push(self.version)

    @property
    def version(self) -> int:
        return self.processes.version

    def update(self, seed: int) -> dict[str, float]:
        return self.learner.update(self.experience(seed))

    def experience(self, seed: int) -> Experience:
        return experience_of(self.learner, self.job, sample(self.engines, seed))


@pytest.fixture(scope="module", params=[(k, s) for k in KINDS for s in STAGES], ids=lambda p: f"{p[0]}-zero{p[1]}")
def case(request: pytest.FixtureRequest, processes: Processes) -> Iterator[Case]:
    kind, stage = request.param
    job = tiny_job(kind, stage)
    ranks = processes.learners[STAGES[stage]].ranks
    actors = [rank.actor for rank in ranks]
    # The processes met long ago, so address and port are not used again.
    specs = [RankSpec(rank, len(actors), 0, "", 0, "cpu", 1) for rank in range(len(actors))]
    ray.get(
        [actor.start.remote(job, spec, "fp32") for actor, spec in zip(actors, specs, strict=True)], timeout=scaled(120)
    )
    learner, engines = LearnerGroup(ranks, job, "fp32"), processes.engines[kind]
    case = Case(processes, kind, job, learner, engines, connect(learner, engines, job.weight_sync))
    yield case
    case.sync.close()


def connect(learner: LearnerGroup, engines: EngineGroup, cfg: WeightSyncConfig) -> Sync:
    return Sync(learner, engines, cfg, "shm", engine_workers=1, timeout_s=scaled(60))


def made_up_completions() -> list[Completion]:
    """Answers that no engine sampled."""
    generator = torch.Generator().manual_seed(0)
    found = []
    for prompt in PROMPTS:
        for k in range(2):
            tokens = tuple(torch.randint(3, 320, (ANSWER,), generator=generator).tolist())
            found.append(Completion(prompt, k, tokens, (0.0,) * ANSWER, "", finished=False, weight_version=0))
    return found


def greedy(engines: EngineGroup) -> list[list[int]]:
    """Greedy tokens per prompt; every replica is asked for all prompts, and they agree."""
    settings = GenerationSettings(1, ANSWER, temperature=0.0, seed=0, ignore_eos=True)
    answers = ray.get([engine.generate.remote(PROMPTS, settings) for engine in engines.actors], timeout=scaled(60))
    first, *others = ([list(c.tokens) for c in answer] for answer in answers)
    assert all(other == first for other in others), "the replicas differ"
    return first


def transformers_greedy(folder: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(folder)
    found = []
    for prompt in PROMPTS:
        output = model.generate(
            torch.tensor([prompt.tokens]),
            attention_mask=torch.ones(1, len(prompt.tokens), dtype=torch.int64),
            max_new_tokens=ANSWER,
            min_new_tokens=ANSWER,
            do_sample=False,
            eos_token_id=-1,
        )
        found.append(output[0, len(prompt.tokens) :].tolist())
    return found


def settings(seed: int) -> GenerationSettings:
    return GenerationSettings(2, ANSWER, temperature=1.0, seed=seed)


def sample(engines: EngineGroup, seed: int) -> list[Completion]:
    return engines.generate(PROMPTS, settings(seed))


def experience_of(learner: LearnerGroup, job: TrainJob, completions: Sequence[Completion]) -> Experience:
    scored = [Sample(c, Score(float(c.tokens[0] % 5) / 2 - 1)) for c in completions]
    return add_advantages(learner.annotate(scored), job.algorithm, 0.05)


def learner_weights(learner: LearnerGroup) -> dict[str, Tensor]:
    """The policy's weights as the learner holds them, gathered by all ranks."""
    refs = [actor.__ray_call__.remote(lambda a: learner_ranks.full_weights(a._learner)) for actor in learner.actors]
    weights: dict[str, Tensor] = ray.get(refs, timeout=scaled(60))[0]
    return weights


def sha256(weights: dict[str, Tensor]) -> dict[str, str]:
    return {name: hashlib.sha256(w.contiguous().numpy().tobytes()).hexdigest() for name, w in weights.items()}


def saved(learner: LearnerGroup, folder: Path) -> Path:
    learner.save_policy(str(folder))
    return folder


def test_engines_follow_the_learner(case: Case, tmp_path: Path) -> None:
    assert len(case.engines.actors) == KINDS[case.kind]
    case.push()
    before = transformers_greedy(saved(case.learner, tmp_path / "before"))
    assert greedy(case.engines) == before

    completions = sample(case.engines, seed=1)
    assert {c.weight_version for c in completions} == {case.version}
    check_fresh(completions, case.version)
    with pytest.raises(StaleWeightsError, match=f"version {case.version + 1}"):
        check_fresh(completions, case.version + 1)
    experience = experience_of(case.learner, case.job, completions)
    gap = (experience.logprobs - experience.sampler_logprobs)[experience.mask].abs().max()
    assert 0 < gap < 1e-3  # two programs' arithmetic: close, and not a copy of one another
    metrics = case.learner.update(experience)
    assert metrics["rollout/logprob_gap"] < 1e-3
    assert metrics["policy/first_ratio_error"] < 1e-3

    policy = saved(case.learner, tmp_path / "after")
    after = transformers_greedy(policy)
    assert after != before, "the update changed no greedy token: a sync that does nothing would pass"
    assert greedy(case.engines) == before  # nothing reaches an engine outside of a push
    report = case.push()
    assert greedy(case.engines) == after
    assert {c.weight_version for c in sample(case.engines, seed=0)} == {case.version}

    # What was sent is what was saved: every parameter, and a tied one once.
    weights = dict(AutoModelForCausalLM.from_pretrained(policy).named_parameters())
    assert report.version == case.version
    assert report.bytes == sum(4 * w.numel() for w in weights.values())
    assert report.checksum == f"{checksum(list(weights), list(weights.values())):016x}"
    for engine in case.engines.actors:
        call = engine.__ray_call__.remote(lambda a: a._engine._llm.collective_rpc("received_checksum"))
        assert [f"{c:016x}" for c in ray.get(call, timeout=scaled(60))] == [report.checksum]


def test_the_guard_sees_engines_that_did_not_follow(case: Case) -> None:
    case.push()
    guard = Guard(case.job, case.learner, "fp32", CONTEXT)
    gaps = guard.check_push(case.engines, case.version)
    assert gaps.keys() == {"guard/engine_gap", "guard/packing_gap"}
    assert all(0 < gap < 1e-4 for gap in gaps.values())  # arithmetic of other programs, and the same model
    case.update(seed=4)  # the learner has moved on, and the engines have not
    replica = "rollout engine 0"
    with pytest.raises(
        MismatchError, match=rf"the engine differs from .*, which agree .*version {case.version}, {replica}"
    ):
        guard.check_push(case.engines, case.version)
    case.push()
    assert guard.check_push(case.engines, case.version)["guard/engine_gap"] < 1e-4


def test_many_small_buckets_give_the_same(case: Case, tmp_path: Path) -> None:
    case.push()
    before = greedy(case.engines)
    case.update(seed=2)
    expected = transformers_greedy(saved(case.learner, tmp_path))
    assert expected != before
    # A limit below every tensor: each layer group travels alone. (As a user's choice bucket_mb is 1 or more.)
    case.sync.close()
    case.sync = connect(case.learner, case.engines, WeightSyncConfig.model_construct(backend="auto", bucket_mb=0))
    assert len(case.sync._buckets) == 4  # embedding, two layers, what is in no layer after them
    in_pieces = case.push()
    assert greedy(case.engines) == expected
    case.sync.close()
    case.sync = connect(case.learner, case.engines, case.job.weight_sync)
    assert len(case.sync._buckets) == 1
    in_one = case.push()
    assert (in_pieces.checksum, in_pieces.bytes) == (in_one.checksum, in_one.bytes)
    assert greedy(case.engines) == expected


class Flipping:
    """A slot whose memory is not what it was told to send: one bit of the last tensor's last byte."""

    def __init__(self, slot: Any) -> None:
        self.slot = slot

    def stage(self, tensors: Any) -> None:
        self.slot.stage(tensors)
        sizes = [tensor.numel() * tensor.element_size() for tensor in tensors]
        self.slot._segment[lay_out(sizes)[0][-1] + sizes[-1] - 1] ^= 1

    def __getattr__(self, name: str) -> Any:
        return getattr(self.slot, name)


def break_senders(actor: Any) -> None:
    actor._sender.slots = [Flipping(slot) for slot in actor._sender.slots]


def mend_senders(actor: Any) -> None:
    actor._sender.slots = [slot.slot for slot in actor._sender.slots]


def test_a_corrupted_segment_is_noticed(case: Case) -> None:
    case.push()
    expected = greedy(case.engines)
    ray.get(case.learner.actors[0].__ray_call__.remote(break_senders), timeout=scaled(60))
    with pytest.raises(StaleWeightsError, match="rollout engine 0 has other weights than the learner"):
        case.push()
    ray.get(case.learner.actors[0].__ray_call__.remote(mend_senders), timeout=scaled(60))
    case.push()
    assert greedy(case.engines) == expected


def test_a_push_that_breaks_off_leaves_no_valid_version(case: Case) -> None:
    case.push()
    ray.get([engine.start_update.remote() for engine in case.engines.actors], timeout=scaled(60))
    calls = [engine.__ray_call__.remote(lambda a: a._engine.weight_version) for engine in case.engines.actors]
    assert ray.get(calls, timeout=scaled(60)) == [-1] * len(calls)
    ray.get([engine.finish_update.remote(-1) for engine in case.engines.actors], timeout=scaled(60))
    case.push()
    check_fresh(sample(case.engines, seed=0), case.version)


def test_saved_policies_hold_the_learners_weights(case: Case, tmp_path: Path) -> None:
    case.push()
    start = sha256(learner_weights(case.learner))
    case.update(seed=3)
    policy = saved(case.learner, tmp_path / "policy")
    held = sha256(learner_weights(case.learner))
    assert not set(held.values()) & set(start.values())  # every tensor has moved
    loaded = AutoModelForCausalLM.from_pretrained(policy)
    assert sha256({name: p.detach() for name, p in loaded.named_parameters()}) == held
    on_disk: dict[str, Tensor] = {}
    for file in policy.glob("*.safetensors"):
        on_disk |= load_file(file)
    assert sha256(on_disk) == held  # a tied head is not written twice
    assert loaded.config.use_cache


def test_saved_policies_load_in_vllm(processes: Processes) -> None:
    """Engines that read a saved policy from disk answer as they do once its learner has synced."""
    from_disk, synced = processes.from_disk, processes.synced
    assert [c.tokens for c in from_disk] == [c.tokens for c in synced]
    for a, b in zip(from_disk, synced, strict=True):
        assert a.logprobs == pytest.approx(b.logprobs, abs=1e-5)
    # Weights from disk belong to no step of the run, so nothing may train on what they sampled.
    assert {c.weight_version for c in from_disk} == {-1} and {c.weight_version for c in synced} == {0}
    trained = AutoModelForCausalLM.from_pretrained(processes.saved_policy)
    with torch.no_grad():
        expected = learner_ranks.plain_logprobs(
            trained, [c.prompt.tokens for c in from_disk], [c.tokens for c in from_disk]
        )
    for completion, logprobs in zip(from_disk, expected, strict=True):
        assert completion.logprobs == pytest.approx(logprobs.tolist(), abs=1e-3)


def test_checkpoints_continue_to_the_bit(case: Case, tmp_path: Path) -> None:
    learner = case.learner
    case.push()
    first, second, probe = (case.experience(seed) for seed in (6, 7, 8))
    probed = [Sample(c, Score(0.0)) for c in sample(case.engines, seed=8)]

    def state() -> tuple[dict[str, str], str]:
        """Digests of the policy's weights, and of the critic by what it says."""
        values = learner.annotate(probed).values
        assert values is not None
        return sha256(learner_weights(learner)), sha256({"values": values})["values"]

    learner.update(first)  # so that the optimizers have a memory to lose
    written = learner.save_checkpoint(Place.of(tmp_path))
    at_save = state()
    metrics = learner.update(second)
    further = state()
    learner.update(probe)  # and a step more to forget
    assert at_save != further != state()

    learner.load_checkpoint(StoredFolder(Place.of(tmp_path), written()))
    assert state() == at_save
    assert learner.update(second) == metrics
    assert state() == further


class SummingEngine(Actor):
    """Takes any fp32 weights, and says no more of them than their checksum."""

    def init_transfer(self, info: dict[str, Any]) -> None: ...
    def start_update(self) -> None: ...

    def update_all(self, buckets: Any, sources: Any) -> None:
        self.total = 0
        for message in update_messages(buckets, sources):
            assert message["names"] == ["weight", "bias"]
            path = message["path"]
            slot = torch.from_file(path, shared=True, size=os.stat(path).st_size // 4, dtype=torch.float32)
            parts = zip(message["offsets"], message["shapes"], strict=True)
            tensors = [slot[start // 4 :][: torch.Size(shape).numel()].view(*shape) for start, shape in parts]
            self.total += checksum(message["names"], tensors)

    def finish_update(self, version: int) -> list[int]:
        return [self.total]


def hold_a_small_model(actor: Any) -> None:
    actor._learner = SimpleNamespace(weights=ModelState(torch.nn.Linear(3, 3)))
    actor._rank = 0


def test_closing_says_that_the_learner_died(processes: Processes, watch: Watch) -> None:
    environment = {"env_vars": {"DS_ACCELERATOR": "cpu"}}
    rank = ray.remote(num_cpus=0, runtime_env=environment)(LearnerActor).remote()
    engine = ray.remote(num_cpus=0, runtime_env=environment)(SummingEngine).remote()
    ray.get(rank.__ray_call__.remote(hold_a_small_model), timeout=scaled(120))
    job = tiny_job("tied", 0)
    launched = (engine, ray.put(None))
    replicas = Replicas(
        "rollout engine", 1, lambda k: launched, watch=watch, limits=Limits(60, 60, 600), takes_weights=True
    )
    replicas.wait_started()
    learner = LearnerGroup([Watched("learner rank 0", rank, 600)], job, "fp32")
    sync = connect(learner, EngineGroup(replicas), job.weight_sync)
    assert sync.push(1).bytes == 4 * 12
    ray.kill(rank)
    with pytest.raises(RunError, match="learner"):  # killing takes a moment
        for _ in range(600):
            gather([rank.process.remote()], who="learner", timeout_s=scaled(60))
            time.sleep(0.1)
    with pytest.raises(RunError, match="close weight sync"):
        sync.close()
    ray.kill(engine)
