"""Where a reward is read, in both layouts; how a reward model is saved so that transformers reads it there as well."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from rlaif_ray.config.jobs import RewardModelJob
from rlaif_ray.data.batching import RankPlan, plan_ranks
from rlaif_ray.learner.engine import RankSpec
from rlaif_ray.learner.packing import PACKED, register_packed_attention
from rlaif_ray.learner.supervised import (
    PairExample,
    RewardModule,
    describe_reward_model,
    ends_with,
    init_head,
    reward_input,
    separate_pad_token,
)
from rlaif_ray.models import load_sequence_classifier
from tests.learner_ranks import RankProcesses, full_weights, random_samples
from tests.tiny import IM_END, IM_START, PAD, cached_tiny_model, make_tokenizer

EOS = 2  # of the tiny tokenizer, <|im_end|>


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    """For models this small a second thread only waits."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


# ---- Where it is read ------------------------------------------------------------------------------------------------


def test_the_last_tokens_places_by_hand() -> None:
    # One prompt of two responses stands once: 5 6 7 | 8 | 10 11 12; the other prompt's response is empty: 20 21.
    prompts, responses = [(5, 6, 7), (20, 21), (5, 6, 7)], [(8,), (), (10, 11, 12)]
    packed = reward_input(prompts, responses, packed=True, device="cpu")
    assert packed.tokens.tolist() == [[5, 6, 7, 8, 10, 11, 12, 20, 21]]
    assert packed.positions.tolist() == [[0, 1, 2, 3, 3, 4, 5, 0, 1]]
    assert packed.rows.tolist() == [0, 0, 0] and packed.columns.tolist() == [3, 8, 6]
    padded = reward_input(prompts, responses, packed=False, device="cpu")
    assert padded.tokens.tolist() == [[5, 6, 7, 8, 0, 0], [20, 21, 0, 0, 0, 0], [5, 6, 7, 10, 11, 12]]
    assert padded.attention_mask is not None and padded.attention_mask.sum(1).tolist() == [4, 2, 6]
    assert padded.rows.tolist() == [0, 1, 2] and padded.columns.tolist() == [3, 1, 5]


@pytest.mark.parametrize("attention", [PACKED, "sdpa"])
def test_rewards_and_gradients_are_transformers_own(attention: str) -> None:
    from transformers import AutoModelForSequenceClassification

    # Prompts shared by two, by three that don't stand side by side, and by none.
    prompts, responses = random_samples([4, 30, 1], [[5, 1], [2, 40, 7], [9]])
    order = [2, 0, 3, 5, 1, 4]
    prompts, responses = [prompts[i] for i in order], [responses[i] for i in order]
    folder = cached_tiny_model(tied=True)
    register_packed_attention()
    model, new_head = load_sequence_classifier(folder, dtype=torch.float32, attention=attention)
    assert new_head
    init_head(model, seed=3)
    plain = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, dtype=torch.float32)
    plain.load_state_dict(model.state_dict())

    rewards = RewardModule(model)(reward_input(prompts, responses, packed=attention == PACKED, device="cpu"))
    sequences = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
    width = max(map(len, sequences))
    ids = torch.tensor([s + [plain.config.pad_token_id] * (width - len(s)) for s in sequences])
    expected = plain(ids, attention_mask=(ids != plain.config.pad_token_id).long()).logits[:, 0]
    torch.testing.assert_close(rewards, expected, rtol=0, atol=1e-5)

    weights = torch.tensor([1.0, -2.0, 0.5, 3.0, -1.0, 0.25])  # unlike: a reward mixed up with another one shows
    (rewards * weights).sum().backward()
    (expected * weights).sum().backward()
    theirs = dict(plain.named_parameters())
    largest = max(float(p.grad.abs().max()) for p in theirs.values() if p.grad is not None)
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, theirs[name].grad, rtol=1e-4, atol=1e-6 * largest, msg=name)


@pytest.mark.parametrize("attention", [PACKED, "sdpa"])
def test_a_sequence_may_fill_the_context(attention: str, tmp_path: Path) -> None:
    """With learned positions a token too many would be an error."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(vocab_size=40, n_positions=12, n_embd=16, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=1)
    torch.manual_seed(0)
    GPT2LMHeadModel(config).save_pretrained(tmp_path)
    register_packed_attention()
    model, _ = load_sequence_classifier(tmp_path, dtype=torch.float32, attention=attention)
    prompt, response = (5, 6, 7, 8, 9), (10, 11, 12, 13, 14, 15, 16)
    assert len(prompt) + len(response) == config.n_positions
    with torch.no_grad():
        found = RewardModule(model)(reward_input([prompt], [response], packed=attention == PACKED, device="cpu"))
        model.set_attn_implementation("eager")
        expected = model(torch.tensor([[*prompt, *response]])).logits[0, 0]
    assert found.tolist() == pytest.approx([float(expected)], abs=1e-6)


# ---- The head --------------------------------------------------------------------------------------------------------


def test_a_new_head_is_seeded_and_has_the_papers_spread() -> None:
    def head(width: int, seed: int) -> torch.Tensor:
        model = SimpleNamespace(score=torch.nn.Linear(width, 1, bias=False))
        init_head(model, seed)
        return model.score.weight.detach()

    wide = head(99_999, 0)
    assert float(wide.std()) == pytest.approx(1 / 100_000**0.5, rel=0.01)  # 1 / sqrt(d + 1)
    assert abs(float(wide.mean())) < 4 / 100_000  # four standard errors
    assert torch.equal(head(64, 1), head(64, 1)) and not torch.equal(head(64, 1), head(64, 2))


# ---- What pads -------------------------------------------------------------------------------------------------------


def tokenizer_with(**special: str | None) -> Any:
    """The tiny tokenizer with these special tokens and no others."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(tokenizer_object=make_tokenizer(None).backend_tokenizer, **special)


@pytest.mark.parametrize(
    ("special", "pad"),
    [
        pytest.param({"eos_token": IM_END, "pad_token": PAD, "unk_token": IM_START}, PAD, id="its own"),
        # SmolLM2's: pad is EOS
        pytest.param(
            {"eos_token": IM_END, "pad_token": IM_END, "unk_token": PAD, "bos_token": IM_START}, PAD, id="unk"
        ),
        pytest.param({"eos_token": IM_END, "pad_token": IM_END, "bos_token": IM_START}, IM_START, id="bos"),
        pytest.param({"eos_token": IM_END, "bos_token": IM_START}, IM_START, id="bos, without pad"),
        pytest.param(
            {"eos_token": IM_END, "bos_token": IM_START, "additional_special_tokens": [PAD]}, PAD, id="another"
        ),
        # GPT-2's: one token for everything
        pytest.param(
            {"eos_token": IM_END, "pad_token": IM_END, "unk_token": IM_END, "bos_token": IM_END}, None, id="-"
        ),
    ],
)
def test_what_pads_is_never_what_ends(special: dict[str, Any], pad: str | None) -> None:
    tokenizer = tokenizer_with(**special)
    assert separate_pad_token(tokenizer) == (None if pad is None else tokenizer.convert_tokens_to_ids(pad))
    assert ends_with(tokenizer) == (() if pad is None else (EOS,))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token  # as models.load_tokenizer does
    config = SimpleNamespace(pad_token_id=77)
    config.get_text_config = lambda: config
    describe_reward_model(config, tokenizer)
    assert tokenizer.eos_token_id == EOS
    assert config.pad_token_id == tokenizer.pad_token_id == (EOS if pad is None else separate_pad_token(tokenizer))
    assert config.reward_ends_with_eos == (pad is not None)


def test_without_eos_nothing_ends() -> None:
    assert ends_with(tokenizer_with(pad_token=PAD)) == ()


# ---- Saved folders, on real DeepSpeed --------------------------------------------------------------------------------

STEP, BIG = 0.02, 1e3  # AdamW that is all but SGD, as in test_update.py


def base_folder(folder: Path, **special: str) -> Path:
    """The tiny model with another tokenizer; its config says the same of padding and end."""
    import shutil

    shutil.copytree(cached_tiny_model(tied=True), folder)
    tokenizer = tokenizer_with(**special)
    tokenizer.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    pad = tokenizer.pad_token_id
    (folder / "config.json").write_text(json.dumps(config | {"pad_token_id": pad, "eos_token_id": EOS}))
    return folder


def job_of(folder: Path, **learner: Any) -> RewardModelJob:
    sgd = {"lr": STEP * BIG, "eps": BIG, "betas": (0.0, 0.0), "grad_clip": 1e9, "tokens_per_micro_batch": 40}
    return RewardModelJob.model_validate(
        {"policy": {"model": str(folder)}, "data": {"path": "x"}, "learner": sgd | learner}
    )


def pairs_of(lengths: Sequence[tuple[int, int, int]], end: tuple[int, ...]) -> list[PairExample]:
    prompts, responses = random_samples([p for p, _, _ in lengths], [[a, b] for _, a, b in lengths], seed=8)
    return [
        PairExample(prompts[2 * k], (*responses[2 * k], *end), (*responses[2 * k + 1], *end), 0.1 + 0.15 * k)
        for k in range(len(lengths))
    ]


def plans(job: RewardModelJob, examples: Sequence[PairExample], ranks: int) -> list[RankPlan]:
    budget = job.learner.tokens_per_micro_batch
    return plan_ranks(range(len(examples)), [len(e) for e in examples], ranks=ranks, budget=budget)


def two_steps(
    spec: RankSpec, job: RewardModelJob, parts: Sequence[Sequence[PairExample]], folder: str | None = None
) -> dict[str, Any]:
    """Weights before and after a step on each part, with an evaluation before each; saved to `folder`."""
    from rlaif_ray.learner.supervised import RewardRank

    rank = RewardRank(job, spec, "fp32", total_steps=2)
    before = full_weights(rank)

    def rewards() -> dict[int, tuple[float, float]]:
        return rank.rewards(parts[0], plans(job, parts[0], spec.world_size)[spec.rank])

    sums, evaluated = [], []
    for part in parts:
        evaluated.append(rewards())
        sums.append(rank.train(part, plans(job, part, spec.world_size)[spec.rank]))
    elements = [p.data.numel() for p in rank._model.parameters()]
    if folder is not None:
        rank.save_model(folder, None)
    evaluated.append(rewards())
    return {"before": before, "after": full_weights(rank), "sums": sums, "rewards": evaluated, "elements": elements}


@pytest.mark.slow
def test_a_model_that_pads_with_eos_is_saved_so_that_transformers_reads_the_end(
    one_rank: RankProcesses, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    special = {"eos_token": IM_END, "pad_token": IM_END, "unk_token": PAD, "bos_token": IM_START}  # as SmolLM2
    pairs = pairs_of([(4, 3, 9), (7, 12, 1)], (EOS,))
    job = job_of(base_folder(tmp_path / "base", **special))
    [found] = one_rank.run(two_steps, job, [pairs], str(tmp_path / "saved"))
    rewards = [r for i in range(len(pairs)) for r in found["rewards"][-1][i]]

    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    sequences = [[*e.prompt, *response] for e in pairs for response in (e.response_a, e.response_b)]

    def read() -> list[float]:
        batch = tokenizer.pad({"input_ids": sequences}, padding_side="right", return_tensors="pt")
        with torch.no_grad():
            return [float(x) for x in model(**batch).logits[:, 0]]

    assert (tokenizer.pad_token, tokenizer.eos_token) == (PAD, IM_END)
    assert read() == pytest.approx(rewards, abs=1e-5)
    # The trap that this avoids: with the policy's own padding every one is read a token too early.
    model.config.pad_token_id, tokenizer.pad_token = EOS, IM_END
    assert all(abs(wrong - right) > 1e-3 for wrong, right in zip(read(), rewards, strict=True))


@pytest.mark.slow
def test_a_model_with_nothing_to_pad_with_is_read_at_its_last_text_token(
    one_rank: RankProcesses, tmp_path: Path
) -> None:
    from transformers import AutoModelForSequenceClassification, AutoTokenizer

    folder = base_folder(tmp_path / "base", eos_token=IM_END)
    config = json.loads((folder / "config.json").read_text())
    assert config["pad_token_id"] is None  # with which transformers refuses batches
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs = pairs_of([(4, 3, 9), (7, 12, 1)], ends_with(tokenizer))
    assert EOS not in pairs[0].response_a
    [found] = one_rank.run(two_steps, job_of(folder), [pairs], str(tmp_path / "saved"))
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "saved")
    saved = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert model.config.reward_ends_with_eos is False
    sequences = [[*e.prompt, *response] for e in pairs for response in (e.response_a, e.response_b)]
    batch = saved.pad({"input_ids": sequences}, padding_side="right", return_tensors="pt")
    with torch.no_grad():
        logits = model(**batch).logits[:, 0]
    rewards = [r for i in range(len(pairs)) for r in found["rewards"][-1][i]]
    assert logits.tolist() == pytest.approx(rewards, abs=1e-5)


# Five pairs of which one rank has more micro-batches than the other has pairs, then all on one rank but one.
UNEVEN = [pairs_of([(30, 8, 9), (20, 5, 14), (6, 2, 3), (5, 4, 1)], (EOS,)), pairs_of([(35, 12, 9)], (EOS,))]


@pytest.mark.slow
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_two_ranks_one_of_them_short_of_work_equal_one(
    stage: int, one_rank: RankProcesses, two_ranks: RankProcesses
) -> None:
    folder = cached_tiny_model(tied=True)
    [want] = one_rank.run(two_steps, job_of(folder), UNEVEN)
    # Without the threshold DeepSpeed keeps all of so small a model whole, and ZeRO-3 would not be tested.
    overrides = {"zero_optimization": {"stage3_param_persistence_threshold": 0}} if stage == 3 else {}
    job = job_of(folder, ranks=2, zero_stage=stage, deepspeed_overrides=overrides)
    assert () in [micro for part in UNEVEN for plan in plans(job, part, 2) for micro in plan], "no place-holder"
    results = two_ranks.run(two_steps, job, UNEVEN)
    for name, weight in want["after"].items():
        start = want["before"][name]
        assert torch.equal(results[0]["before"][name], start), f"{name} starts elsewhere"
        moved = (weight - start).abs().max()
        assert moved > 1e-4, f"{name} hardly moved ({moved:.1e}): nothing is compared"
        assert torch.equal(results[0]["after"][name], results[1]["after"][name]), f"the ranks disagree on {name}"
        off = (results[0]["after"][name] - weight).abs().max()
        assert off < 1e-5 and off < 1e-3 * moved, f"{name}: off by {off:.1e}, moved by {moved:.1e}"
    for k, sums in enumerate(want["sums"]):
        for name in ("examples", "loss", "correct", "decided", "margin"):
            total = sum(result["sums"][k][name] for result in results)
            assert total == pytest.approx(sums[name], rel=1e-4, abs=1e-5), name
        for result in results:
            assert result["sums"][k]["grad_norm"] == pytest.approx(sums["grad_norm"], rel=1e-4)
    for k, evaluated in enumerate(want["rewards"]):
        rewards = results[0]["rewards"][k] | results[1]["rewards"][k]
        assert all(rewards[i] == pytest.approx(pair, abs=1e-4) for i, pair in evaluated.items())
    if stage == 3:
        assert not any(results[0]["elements"]), "ZeRO-3 kept parameters whole between steps"
