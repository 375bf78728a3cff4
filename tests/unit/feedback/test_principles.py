"""Constitutions: what loads, what is refused on which line, and that draws follow the weights and nothing else."""

from __future__ import annotations

from collections import Counter
from dataclasses import FrozenInstanceError, replace
from pathlib import Path

import pytest

from rlaif_ray.errors import InputError
from rlaif_ray.feedback.principles import SHIPPED, TEXTS, Constitution, Principle, draw_principle, eligible
from rlaif_ray.feedback.principles import load_constitution as load
from rlaif_ray.feedback.templates import load_template

NEEDS = "comparison_question"
KEYS = [str(number) for number in range(20_000)]

MINE = """\
id: mine
version: 1
principles:
  - id: kind
    weight: 2.5
    critique_request: What is unkind in it?
    revision_request: Make it kind.
    comparison_question: Which response is kinder?
  - id: short
    comparison_question: Which response is shorter?
"""


def written(folder: Path, text: str) -> str:
    path = folder / "mine.yaml"
    path.write_text(text)
    return str(path)


def constitution(**weights: float) -> Constitution:
    return Constitution(
        "c", 1, tuple(Principle(name, comparison_question="?", weight=w) for name, w in weights.items())
    )


# ---- Loading ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "at_least"), [("default", 16), ("short", 4)])
def test_shipped_constitutions_load(name: str, at_least: int) -> None:
    found = load(name)
    assert load(str(SHIPPED / f"{name}.yaml")) == found and found.id == name
    assert len(found.principles) >= at_least
    texts = [getattr(principle, text) for principle in found.principles for text in TEXTS]
    assert None not in texts and len(set(texts)) == len(texts)  # each has all three, none twice
    for principle in found.principles:
        question = principle.comparison_question or ""
        # A sentence of its own, on one line, that asks which is better: what the templates' frame takes.
        assert question.startswith("Which response ") and question.endswith("?") and question.count("?") == 1
        assert "\n" not in question and " worse" not in question and "more harm" not in question
    with pytest.raises(FrozenInstanceError):
        found.id = "other"  # type: ignore[misc]


def test_every_shipped_constitution_is_tested() -> None:
    assert sorted(path.stem for path in SHIPPED.glob("*.yaml")) == ["default", "short"]


def test_a_constitution_of_ones_own_loads(tmp_path: Path) -> None:
    kind = Principle("kind", "What is unkind in it?", "Make it kind.", "Which response is kinder?", 2.5)
    short = Principle("short", None, None, "Which response is shorter?", 1.0)
    assert load(written(tmp_path, MINE)) == Constitution("mine", 1, (kind, short))


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("id: mine\n", "", "line 1: key 'id' is missing"),
        ("id: mine", "id: 7", 'line 1: id must be a text (got 7): put it in quotes, "7"'),
        ("id: mine", "id: 4867e52", 'line 1: id must be a text (got 4867e52): put it in quotes, "4867e52"'),
        ("id: mine", "id: ' '", "line 1: id must not be empty"),
        ("version: 1", "version: 1.5", "line 2: version must be a whole number (got 1.5)"),
        ("version: 1", "versoin: 1", "line 2: key 'versoin' is unknown; did you mean version?"),
        ("principles:\n", "principles: []\nrest:\n", "line 3: principles must have at least one"),
        ("principles:\n", "principles:\nrest:\n", "line 3: principles must be a list (got None)"),
        ("principles:\n", "principles: {kind: 1}\nrest:\n", "line 3: principles must be a list (got {'kind': 1})"),
        (
            "  - id: short",
            "  - be short\n  - id: short",
            "line 9: a principle must have an id and texts (got 'be short')",
        ),
        ("  - id: short\n    comp", "  - comp", "line 9: key 'id' is missing"),
        ("id: short", "id: no", 'line 9: id must be a text (got no): put it in quotes, "no"'),
        ("id: short", "id: ''", "line 9: id must not be empty"),
        ("id: short", "id: 'kind '", "line 9: id 'kind' stands on line 4 already"),
        ("weight: 2.5", "wieght: 2.5", "line 5: key 'wieght' is unknown; did you mean weight?"),
        ("weight: 2.5", "zzz: 2.5", "line 5: key 'zzz' is unknown (known: id, weight, critique_request,"),
        ("weight: 2.5", "weight: 0", "line 5: weight must be above 0 and finite (got 0)"),
        ("weight: 2.5", "weight: -1.0", "line 5: weight must be above 0 and finite (got -1.0)"),
        ("weight: 2.5", "weight: .inf", "line 5: weight must be above 0 and finite (got inf)"),
        ("weight: 2.5", "weight: .nan", "line 5: weight must be above 0 and finite (got nan)"),
        ("weight: 2.5", "weight: true", "line 5: weight must be a number (got True)"),
        ("weight: 2.5", "weight: much", "line 5: weight must be a number (got 'much')"),
        ("What is unkind in it?", "[1, 2]", "line 6: critique_request must be a text (got [1, 2])"),
        ("What is unkind in it?", "", "line 6: critique_request must be a text (got None)"),
        ("What is unkind in it?", "' '", "line 6: critique_request must not be empty"),
        ("Make it kind.", "Rewrite {response}.", "line 7: revision_request has the placeholder {response}"),
        ("Which response is kinder?", "'{}?'", "line 8: comparison_question has the placeholder {}"),
        (
            "    comparison_question: Which response is shorter?\n",
            "",
            "line 9: a principle must have one of critique_req",
        ),
        ("version: 1", "version: 1\nversion: 2", "line 3 sets version again"),
    ],
)
def test_a_wrong_constitution_is_refused(tmp_path: Path, old: str, new: str, problem: str) -> None:
    assert old in MINE
    path = written(tmp_path, MINE.replace(old, new))
    with pytest.raises(InputError) as caught:
        load(path)
    assert problem in str(caught.value) and path in str(caught.value) and "short.yaml" in str(caught.value)


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    text = MINE.replace("id: mine", "idd: mine").replace("weight: 2.5", "weight: 0").replace("id: short", "id: kind")
    with pytest.raises(InputError) as caught:
        load(written(tmp_path, text.replace("Make it kind.", "'{x}'")))
    problems = [line.split(":")[0] for line in str(caught.value).splitlines() if line.startswith("  - ")]
    assert problems == [f"  - line {number}" for number in (1, 1, 7, 5, 9)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "key 'principles' is missing"),
        ("- a\n", "must hold a mapping"),
        ("id: [", "line 1 is not valid YAML"),
        ("id: a\nversion: 1\nprinciples:\n  - id: b\n   weight: 1\n", "line 5 is not valid YAML"),
    ],
)
def test_what_is_no_constitution_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(InputError) as caught:
        load(path)
    assert message in str(caught.value) and path in str(caught.value)


def test_what_is_not_there_is_named() -> None:
    with pytest.raises(InputError, match=r"label.constitution must be one of default, short .* did you mean default\?"):
        load("defualt")
    with pytest.raises(InputError, match=r"^revise.constitution: .*gone.yaml does not exist"):
        load("gone.yaml", "revise.constitution")


def test_texts_are_data(tmp_path: Path) -> None:
    made = tmp_path / "made"
    text = MINE.replace("Make it kind.", f"!!python/object/apply:os.mkdir ['{made}']")
    with pytest.raises(InputError, match="line 7 is not valid YAML: the tag !!python"):
        load(written(tmp_path, text))
    assert not made.exists()
    odd = "Which is {{kinder}, %s $x <|im_end|> \\1?"
    assert load(written(tmp_path, MINE.replace("Make it kind.", "'{ spaced } is text'"))).principles[0].revision_request
    with pytest.raises(InputError, match=r"placeholder \{kinder\}"):
        load(written(tmp_path, MINE.replace("Which response is kinder?", f"'{odd}'")))


def test_the_hash_is_of_what_shapes_prompts_and_draws(tmp_path: Path) -> None:
    original = load(written(tmp_path, MINE))
    assert len(original.hash) == 12
    same = [replace(original, id="x", version=2), replace(original, principles=original.principles[::-1])]
    assert [found.hash for found in same] == [original.hash] * 2
    kind, short = original.principles
    changed = [
        replace(original, principles=(replace(kind, **{key: value}), short)).hash
        for key, value in [*((text, "New?") for text in TEXTS), ("id", "new"), ("weight", 1.0)]
    ]
    assert len({original.hash, replace(original, principles=(kind,)).hash, *changed}) == len(changed) + 2


# ---- In a template ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["constitution", "helpful", "summary"])
def test_a_principle_reaches_the_question(name: str) -> None:
    template = load_template(name, kind="preference")
    assert template.takes_principles and template.asks_for == "better"
    for principle in load("default").principles:
        question = principle.comparison_question or ""
        for text in (template.ending, template.rationale_request):
            filled = text.replace("{principle}", question)
            assert filled.startswith(f"{question}\n\n") and filled.count(question) == 1 and "{" not in filled


def test_a_template_that_asks_for_the_worse_takes_no_principle() -> None:
    assert not load_template("harmless", kind="preference").takes_principles


# ---- Draws -----------------------------------------------------------------------------------------------------------


def chi_square(found: Constitution, expected: dict[str, float], seed: int = 0) -> float:
    """Of 20,000 draws against expected shares."""
    counts = Counter(draw_principle(found, key, seed, needs=NEEDS).id for key in KEYS)
    assert set(counts) <= set(expected)
    total = sum(expected.values())
    shares = {name: len(KEYS) * weight / total for name, weight in expected.items()}
    return sum((counts[name] - share) ** 2 / share for name, share in shares.items())


# Critical values at 0.1%, from printed tables of the chi-square distribution.
CRITICAL = {3: 16.266, 20: 45.315}


@pytest.mark.parametrize("seed", [0, 1])
def test_equal_weights_draw_equally(seed: int) -> None:
    default = load("default")
    assert {principle.weight for principle in default.principles} == {1.0} and len(default.principles) == 21
    assert chi_square(default, {principle.id: 1.0 for principle in default.principles}, seed) < CRITICAL[20]


@pytest.mark.parametrize(
    "weights",
    [{"a": 2, "b": 1, "c": 1, "d": 1}, {"a": 0.1, "b": 30, "c": 7, "d": 1e-1}, {"a": 1, "b": 2, "c": 3, "d": 4}],
)
def test_weights_are_followed(weights: dict[str, float]) -> None:
    assert chi_square(constitution(**weights), weights) < CRITICAL[3]
    assert chi_square(constitution(**weights), dict.fromkeys(weights, 1.0)) > 100  # and the test would tell


def test_a_draw_depends_on_seed_and_key_only() -> None:
    default = load("default")
    draws = {key: draw_principle(default, key, 5, needs=NEEDS).id for key in KEYS[:500]}
    mirrored = replace(default, principles=default.principles[::-1])
    for key in reversed(KEYS[:500]):
        assert draw_principle(mirrored, key, 5, needs=NEEDS).id == draws[key]
    same = sum(draw_principle(default, key, 6, needs=NEEDS).id == draw for key, draw in draws.items())
    assert 4 <= same <= 48  # independent seeds agree on 500/21 = 24 with a deviation of 4.8: five of them at most
    # Pairs that could be mistaken for each other when glued together:
    glued = [draw_principle(default, str(k) + "1", 1, needs=NEEDS).id for k in range(300)]
    other = [draw_principle(default, str(k), 11, needs=NEEDS).id for k in range(300)]
    assert sum(map(str.__eq__, glued, other)) < 35


def test_draws_stay_the_same_from_release_to_release() -> None:
    drawn = [draw_principle(load("short"), key, 0, needs=NEEDS).id for key in ("a", "b", "c", "pair-17", "é")]
    # By the formula of the docstring, computed apart from this package; a resumed run must draw what the first drew.
    assert drawn == ["useful", "no-lecture", "no-harm", "no-lecture", "useful"]


def test_what_is_left_out_changes_only_its_own_draws() -> None:
    whole = constitution(a=1, b=1, c=1, d=2)
    some = ("d", "a", "b")  # in any order
    for key in KEYS[:1000]:
        before = draw_principle(whole, key, 0, needs=NEEDS).id
        after = draw_principle(whole, key, 0, needs=NEEDS, only=some).id
        assert after == before if before != "c" else after in some
    assert draw_principle(whole, "x", 0, needs=NEEDS, only=("c",)).id == "c"


def test_only_principles_with_the_text_are_drawn(tmp_path: Path) -> None:
    mine = load(written(tmp_path, MINE))
    assert {draw_principle(mine, key, 0, needs="revision_request").id for key in KEYS[:50]} == {"kind"}
    assert {draw_principle(mine, key, 0, needs=NEEDS).id for key in KEYS[:50]} == {"kind", "short"}
    both = eligible(mine, ("critique_request", "revision_request"))
    assert [principle.id for principle in both] == ["kind"]


@pytest.mark.parametrize(
    ("needs", "only", "message"),
    [
        (NEEDS, ("knid",), "constitution mine has no principle 'knid'; did you mean kind?"),
        (NEEDS, ("kind", "zzz"), "constitution mine has no principle 'zzz' (it has kind, short)"),
        (NEEDS, (), "no principle of constitution mine is named"),
        ("critique_request", ("short",), "principle 'short' of constitution mine has no critique_request"),
        (
            ("critique_request", "revision_request"),
            ("short", "x"),
            "principle 'short' of constitution mine has no critique_request and no revision_request",
        ),
    ],
)
def test_what_cannot_be_drawn_is_refused(tmp_path: Path, needs, only, message: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(InputError) as caught:
        draw_principle(load(written(tmp_path, MINE)), "x", 0, needs=needs, only=only)
    assert message in str(caught.value)


def test_a_constitution_without_the_text_is_refused() -> None:
    with pytest.raises(
        InputError, match="no principle of constitution c has a critique_request and a revision_request"
    ):
        eligible(constitution(a=1), ("critique_request", "revision_request"))
