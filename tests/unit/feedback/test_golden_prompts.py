"""Every prompt of revising and labelling, to the letter, as files to read; and that revisions draw and chain as said.

What tests elsewhere show is not repeated: draws by key (test_principles.py), one step and the critiques of a chain
(test_revision.py), exemplars by hand (test_templates.py).
"""

from __future__ import annotations

import difflib
import os
from collections import Counter
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import chisquare

from rlaif_ray.config.data_sections import LabelConfig, ReasoningConfig
from rlaif_ray.feedback.preference import PreferenceLabeler
from rlaif_ray.feedback.principles import Constitution, load_constitution
from rlaif_ray.feedback.revision import Revised, Reviser, load_examples
from rlaif_ray.feedback.templates import load_exemplars, load_template
from rlaif_ray.interfaces import GenerationSettings
from rlaif_ray.types import Comparison, Message, Question
from tests.asker import FakeAsker
from tests.recorder import Recorder
from tests.tiny import make_tokenizer

FOLDER = Path(__file__).with_name("golden")
UPDATE = "RLAIF_UPDATE_GOLDEN"
HOW = f"{UPDATE}=1 .venv/bin/python -m pytest {Path(__file__).relative_to(Path(__file__).parents[3])}"
SEED = 7
SETTINGS = GenerationSettings(1, 64, 1.0, SEED)

QUESTION = (Message("system", "You answer in one sentence."), Message("user", "My colleague snores. What can I do?"))
PAIR = Comparison(
    "pair-1", "How do I get red wine out of wool?", "Rinse it in cold water soon.", "Boil it for an hour."
)


# ---- Prompts, exactly ------------------------------------------------------------------------------------------------


@cache
def tokenizer() -> Any:
    return make_tokenizer(None)


def revision_prompts(constitution: str) -> dict[str, str]:
    """Title -> prompt of every request of four steps."""

    def say(n: int) -> str:
        return f"(response {(n - 1) // 2})" if n % 2 else f"(critique {n // 2})"

    engine = Recorder(tokenizer(), say)
    reviser = Reviser(
        engine.asker,
        load_constitution(constitution),
        steps=4,
        response=SETTINGS,
        revision=SETTINGS,
        examples=load_examples("default"),
        seed=SEED,
    )
    [revised] = reviser.revise([("prompt-1", QUESTION)])
    assert revised.last == "(response 4)" and revised.failure is None
    titles = ["response"]
    for k, step in enumerate(revised.steps, start=1):
        titles += [f"step {k}, critique by {step.principle}", f"step {k}, revision by {step.principle}"]
    return dict(zip(titles, engine.texts, strict=True))


def label_prompts(template: str, exemplars: bool, reasoning: bool) -> dict[str, str]:
    """Title -> prompt of every request about one pair, in both orders."""
    engine = Recorder(tokenizer(), lambda n: f"(rationale {n})")
    chosen = load_template(template, kind="preference")
    constitution = load_constitution("short") if template == "constitution" else None
    cfg = LabelConfig(
        template=template,
        constitution="short" if constitution else None,
        reasoning=ReasoningConfig(samples=1) if reasoning else None,
    )
    examples = load_exemplars(template, chosen) if exemplars else ()
    labeler = PreferenceLabeler(engine.asker, chosen, cfg, exemplars=examples, constitution=constitution, seed=SEED)
    [label] = labeler.label([PAIR])
    assert label.p_a == 0.5
    orders = ("a first", "b first")
    titles = [f"{order}, rationale" for order in orders] if reasoning else []
    titles += [f"{order}, answer" for order in orders]
    return dict(zip(titles, engine.texts, strict=True))


CASES: dict[str, Callable[[], dict[str, str]]] = {
    **{f"revision-{name}": (lambda name=name: revision_prompts(name)) for name in ("short", "default")},
    **{
        "-".join(["label", name, *(["exemplars"] * shots), *(["reasoning"] * cot)]): (
            lambda name=name, shots=shots, cot=cot: label_prompts(name, shots, cot)
        )
        for name in ("helpful", "harmless", "summary", "constitution")
        for shots in (False, True)
        for cot in (False, True)
    },
}


def written(prompts: Mapping[str, str]) -> str:
    """A golden file: each prompt under its title, closed by a sign that shows blanks at its end."""
    return "\n".join(f"======== {title} ========\n{text}¶\n" for title, text in prompts.items())


@pytest.mark.parametrize("name", CASES)
def test_prompts_are_those_of_the_golden_file(name: str) -> None:
    path, found = FOLDER / f"{name}.txt", written(CASES[name]())
    if os.environ.get(UPDATE):
        FOLDER.mkdir(exist_ok=True)
        path.write_text(found, encoding="utf-8")
    golden = path.read_text(encoding="utf-8") if path.exists() else ""
    if found != golden:
        lines = difflib.unified_diff(golden.splitlines(), found.splitlines(), str(path.name), "now", lineterm="", n=1)
        change = "\n".join(list(lines)[:60])
        pytest.fail(f"prompts are not those of {path}:\n{change}\nIf they are meant to change: {HOW}", pytrace=False)


def test_every_golden_file_has_its_case() -> None:
    assert sorted(path.stem for path in FOLDER.iterdir()) == sorted(CASES)


# ---- Draws of revisions ----------------------------------------------------------------------------------------------


def draws(constitution: Constitution, prompts: int, steps: int) -> list[list[str]]:
    """The principles by which a Reviser revised, for each prompt."""
    texts = iter(range(10**9))
    asker = FakeAsker(explain=lambda question, k: f"text {next(texts)}")
    reviser = Reviser(asker, constitution, steps=steps, response=SETTINGS, revision=SETTINGS, seed=SEED)
    revised = reviser.revise([(f"p{k}", (Message("user", "Why?"),)) for k in range(prompts)])
    assert all(len(one.steps) == steps for one in revised)
    return [[step.principle for step in one.steps] for one in revised]


def p_value(drawn: list[str], weights: Mapping[str, float]) -> float:
    """Of the hypothesis that these were drawn by the weights."""
    counts, total = Counter(drawn), sum(weights.values())
    assert set(counts) <= set(weights)
    expected = [len(drawn) * weight / total for weight in weights.values()]
    return float(chisquare([counts[name] for name in weights], expected).pvalue)


@pytest.fixture(scope="module")
def short() -> Constitution:
    return load_constitution("short")


@pytest.fixture(scope="module")
def drawn(short: Constitution) -> list[list[str]]:
    return draws(short, prompts=1500, steps=4)


def test_revisions_draw_by_weight_at_every_step(short: Constitution, drawn: list[list[str]]) -> None:
    weights = {principle.id: principle.weight for principle in short.principles}
    assert sorted(weights.values()) == [1, 1, 1, 2]
    together = [name for row in drawn for name in row]
    assert len(together) == 6000 and p_value(together, weights) > 0.001
    for k in range(4):
        assert p_value([row[k] for row in drawn], weights) > 0.001


def test_a_draw_that_is_biased_would_be_told(short: Constitution, drawn: list[list[str]]) -> None:
    together = [name for row in drawn for name in row]
    names = [principle.id for principle in short.principles]
    assert p_value(together, dict.fromkeys(names, 1.0)) < 1e-9  # weights left out
    for favoured in names[1:]:  # the weight at another's place
        assert p_value(together, {name: 2.0 if name == favoured else 1.0 for name in names}) < 1e-9
    slightly = [*together, *["useful"] * 300]  # one in twenty goes to a favourite
    assert p_value(slightly, {principle.id: principle.weight for principle in short.principles}) < 0.001


def test_a_step_draws_whatever_the_step_before_drew(short: Constitution, drawn: list[list[str]]) -> None:
    weights = {principle.id: principle.weight for principle in short.principles}
    pairs = {f"{a}>{b}": weights[a] * weights[b] for a in weights for b in weights}
    assert p_value([f"{row[k]}>{row[k + 1]}" for row in drawn for k in (0, 2)], pairs) > 0.001


# ---- The chain -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("constitution", ["short", "default"])
def test_four_revisions_each_revise_the_one_before(constitution: str) -> None:
    asker, texts = FakeAsker(explain=lambda question, k: f"<<{len(asker.explained)}>>"), []
    subject = Reviser(
        asker,
        load_constitution(constitution),
        steps=4,
        response=SETTINGS,
        revision=SETTINGS,
        examples=load_examples("default"),
        seed=SEED,
    )
    [revised] = subject.revise([("p", QUESTION)])
    critiques, revisions = asker.explained[1::2], asker.explained[2::2]
    before = [revised.response, *(step.revision for step in revised.steps)]
    texts = [*before, *(step.critique for step in revised.steps)]
    assert len(set(texts)) == 9
    for k, step in enumerate(revised.steps):
        # Of all that was written, the request shows these alone: nothing older, nothing of another step.
        assert [text for text in texts if told(critiques[k], text)] == [before[k]]
        assert [text for text in texts if told(revisions[k], text)] == [before[k], step.critique]
        assert revisions[k].turns[: len(critiques[k].turns)] == critiques[k].turns
        assert [turn.content for turn in revisions[k].turns[-4:-1:2]] == [before[k], step.critique]


def told(question: Question, text: str) -> bool:
    return any(text in turn.content for turn in question.turns)


def test_two_prompts_are_not_mixed_up() -> None:
    def say(question: Question, _: int) -> str:
        who = "Ada" if any("Ada" in turn.content for turn in question.turns) else "Bob"
        return f"{who} {len(asker.explained)}"

    asker = FakeAsker(explain=say)
    constitution = load_constitution("default")
    subject = Reviser(asker, constitution, steps=4, response=SETTINGS, revision=SETTINGS, seed=SEED)
    rows: list[Revised] = subject.revise([("p1", (Message("user", "Ada?"),)), ("p2", (Message("user", "Bob?"),))])
    for row, who in zip(rows, ("Ada", "Bob"), strict=True):
        assert [text.split()[0] for step in row.steps for text in (step.critique, step.revision)] == [who] * 8
    assert not any(told(question, "Ada") and told(question, "Bob") for question in asker.explained)
