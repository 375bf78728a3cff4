"""AI preference labels: which of two responses a judge prefers, in both orders (Lee et al. 2309.00267, section 2).

    p_a = ( P(first | a b) + P(second | b a) ) / 2

With a chain of thought the judge first writes a rationale, each order its own, and answers after reading it; several
rationales are averaged (self-consistency). A template that asks for the worse response gives inverted probabilities.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rlaif_ray.feedback.answers import MIN_ANSWER_MASS, mass_failure
from rlaif_ray.feedback.principles import draw_principle
from rlaif_ray.interfaces import GenerationSettings
from rlaif_ray.types import Answer, Comparison, Explanation, Label, Message, Question

if TYPE_CHECKING:
    from rlaif_ray.config.data_sections import LabelConfig
    from rlaif_ray.feedback.principles import Constitution, Principle
    from rlaif_ray.feedback.templates import Exemplar, Template
    from rlaif_ray.interfaces import Asker

CUT = "\n[... {} characters left out ...]\n"


def averaged(forward: float, backward: float, cap: float = 1.0) -> float:
    """Probability that a is better, from P(a first | a b) and P(b first | b a); at most `cap`, at least 1 - cap.

    The two responses swapped give exactly one minus it: what is above one half is computed, the rest is its
    complement, which floating-point numbers hold exactly.
    """
    difference = forward - backward
    certain = min(0.5 + abs(difference) / 2.0, cap)
    return certain if difference >= 0 else 1.0 - certain


@dataclass(frozen=True, slots=True)
class _Order:
    """One comparison shown in one order."""

    comparison: Comparison
    first: str
    second: str
    principle: Principle | None


@dataclass(frozen=True, slots=True)
class _Opinion:
    """What the judge says of one order."""

    p_first: float | None  # probability that the response shown first is better
    rationales: tuple[str, ...] = ()
    hard: bool = False
    mass: float | None = None  # probability of all answers together; None where none was measured
    tokens_in: int = 0
    tokens_out: int = 0
    cost: float = 0.0
    cut: int = 0
    failure: str | None = None


class PreferenceLabeler:
    """A Labeler that asks a judge."""

    def __init__(
        self,
        asker: Asker,
        template: Template,
        cfg: LabelConfig,
        *,
        exemplars: Sequence[Exemplar] = (),
        constitution: Constitution | None = None,
        min_answer_mass: float = MIN_ANSWER_MASS,
        seed: int = 0,
    ) -> None:
        """`template` is of kind "preference"; `seed` is of principles, sampled rationales and the frames' codes.

        `min_answer_mass`: of the probability, that both answers must have together in each order, or it is a failure.
        """
        self._asker, self._template, self._cfg, self._seed = asker, template, cfg, seed
        self._least = min_answer_mass
        self._constitution = constitution
        self._preamble = template.with_exemplars(exemplars, cfg.reasoning is not None, asker.special)

    def label(self, comparisons: Sequence[Comparison]) -> list[Label]:
        orders = []
        for c in comparisons:
            principle = self._draw(c)
            orders.append(_Order(c, c.response_a, c.response_b, principle))
            orders.append(_Order(c, c.response_b, c.response_a, principle))
        opinions = self._opinions(orders, cuts=[0] * len(orders))
        if self._cfg.too_long == "cut_middle":
            opinions = self._again_cut(orders, opinions)
        return [self._label(opinions[i], opinions[i + 1], orders[i].principle) for i in range(0, len(orders), 2)]

    def example(self, comparison: Comparison) -> list[Question]:
        """What the judge is asked about a comparison with a shown first: one question, or the two of a chain of
        thought with a stand-in for the rationale."""
        order = _Order(comparison, comparison.response_a, comparison.response_b, self._draw(comparison))
        if self._cfg.reasoning is None:
            return [self._question(order, 0)]
        request = self._question(order, 0, ask_for_reasons=True)
        return [request, self._after(request, "(the judge's rationale)", order)]

    def _draw(self, comparison: Comparison) -> Principle | None:
        if self._constitution is None:
            return None
        return draw_principle(
            self._constitution, comparison.id, self._seed, needs="comparison_question", only=self._cfg.principles
        )

    # Questions

    def _question(self, order: _Order, cut: int, *, ask_for_reasons: bool = False) -> Question:
        template, special = self._template, self._asker.special
        prompt = cut_middle(order.comparison.prompt, cut)
        body = template.render_pair(prompt, order.first, order.second, special, self._seed)
        text = template.rationale_request if ask_for_reasons else template.ending
        content = (
            f"{self._preamble}\n\n{body}\n\n{self._with_principle(text, order)}"  # constant text first: it is cached
        )
        turns = (Message("user", content),)
        return Question(turns) if ask_for_reasons else self._asking(turns)

    def _after(self, request: Question, rationale: str, order: _Order) -> Question:
        """The question proper, once the judge has given its reasons."""
        said = self._template.neutralise(rationale, self._asker.special)
        ending = self._with_principle(self._template.ending, order)
        turns = (*request.turns, Message("assistant", said), Message("user", ending))
        return self._asking(turns)

    def _asking(self, turns: tuple[Message, ...]) -> Question:
        template = self._template
        return Question(turns, template.answer_prefix, template.answers, template.asks_for)

    def _with_principle(self, text: str, order: _Order) -> str:
        question = order.principle.comparison_question if order.principle else self._template.default_question
        return text.replace("{principle}", (question or "").strip())

    # Opinions

    def _opinions(self, orders: Sequence[_Order], cuts: Sequence[int]) -> list[_Opinion]:
        if self._cfg.reasoning is None:
            questions = [self._question(order, cut) for order, cut in zip(orders, cuts, strict=True)]
            answers = dict(self._asker.answer(questions))
            found = [self._opinion([answers[i]], None) for i in range(len(orders))]
        else:
            found = self._reasoned(orders, cuts)
        return [replace(opinion, cut=cut) for opinion, cut in zip(found, cuts, strict=True)]

    def _reasoned(self, orders: Sequence[_Order], cuts: Sequence[int]) -> list[_Opinion]:
        cfg = self._cfg.reasoning
        assert cfg is not None
        requests = [self._question(o, cut, ask_for_reasons=True) for o, cut in zip(orders, cuts, strict=True)]
        settings = GenerationSettings(
            samples_per_prompt=cfg.samples,
            max_new_tokens=cfg.max_new_tokens,
            temperature=cfg.temperature,
            seed=self._seed,
        )
        reasons = dict(self._asker.explain(requests, settings))
        questions, owners = [], []
        for i, order in enumerate(orders):
            for rationale in reasons[i].texts:
                questions.append(self._after(requests[i], rationale, order))
                owners.append(i)
        answers: list[list[Answer]] = [[] for _ in orders]
        for k, answer in sorted(self._asker.answer(questions)):
            answers[owners[k]].append(answer)
        return [self._opinion(answers[i], reasons[i]) for i in range(len(orders))]

    def _opinion(self, answers: Sequence[Answer], reasons: Explanation | None) -> _Opinion:
        """The mean over the answers that could be read; a failure when there is none."""
        answers = [replace(a, failure=a.failure or mass_failure(a, self._least)) for a in answers]
        replies: list[Answer | Explanation] = [*answers, *([reasons] if reasons else [])]
        read = [answer for answer in answers if answer.failure is None]
        measured = [a.mass for a in read or answers if a.probabilities and not a.hard]
        told = {
            "mass": min(measured, default=None),
            "rationales": reasons.texts if reasons else (),
            "tokens_in": sum(r.tokens_in for r in replies),
            "tokens_out": sum(r.tokens_out for r in replies),
            "cost": math.fsum(r.cost for r in replies),
        }
        if not read:
            failure = next((r.failure for r in reversed(replies) if r.failure is not None), "no_rationale")
            return _Opinion(None, failure=failure, **told)  # type: ignore[arg-type]
        chosen = math.fsum(answer.probabilities[0] for answer in read) / len(read)
        p_first = 1.0 - chosen if self._template.asks_for == "worse" else chosen
        return _Opinion(p_first, hard=any(answer.hard for answer in read), **told)  # type: ignore[arg-type]

    def _again_cut(self, orders: Sequence[_Order], opinions: list[_Opinion]) -> list[_Opinion]:
        """Asks again what was too long, with as little as possible of the prompt's middle left out.

        Both orders of a comparison lose the same.
        """
        long = [i for i in range(0, len(orders), 2) if "too_long" in (opinions[i].failure, opinions[i + 1].failure)]
        again = [(i + k, cut) for i in long if (cut := self._cut(orders[i], orders[i + 1])) for k in (0, 1)]
        if again:
            found = self._opinions([orders[i] for i, _ in again], [cut for _, cut in again])
            for (i, _), opinion in zip(again, found, strict=True):
                opinions[i] = opinion
        return opinions

    def _cut(self, *orders: _Order) -> int:
        """The fewest characters to leave out of the prompt so that both orders fit; 0 when none would do."""

        def fits(cut: int) -> bool:
            reasoning = self._cfg.reasoning
            if reasoning is None:
                return all(self._asker.fits(self._question(order, cut)) for order in orders)
            # Room for the rationale, in words that are about a token each.
            filler = "reason " * reasoning.max_new_tokens
            requests = [self._question(order, cut, ask_for_reasons=True) for order in orders]
            pairs = zip(requests, orders, strict=True)
            return all(self._asker.fits(self._after(request, filler, order)) for request, order in pairs)

        low, high = 0, len(orders[0].comparison.prompt)
        if not fits(high):
            return 0
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        return high

    def _label(self, forward: _Opinion, backward: _Opinion, principle: Principle | None) -> Label:
        told = Label(
            p_a=None,
            p_a_forward=forward.p_first,
            p_a_reversed=None if backward.p_first is None else 1.0 - backward.p_first,
            rationales=(*forward.rationales, *backward.rationales),
            principle=principle.id if principle else None,
            hard=forward.hard or backward.hard,
            answer_mass=min((o.mass for o in (forward, backward) if o.mass is not None), default=None),
            tokens_in=forward.tokens_in + backward.tokens_in,
            tokens_out=forward.tokens_out + backward.tokens_out,
            cost=forward.cost + backward.cost,
            cut=forward.cut,
        )
        failure = forward.failure or backward.failure
        if forward.p_first is None or backward.p_first is None:
            return replace(told, failure=failure)
        cap = 1.0 if self._cfg.clamp is None else self._cfg.clamp[1]
        return replace(told, p_a=averaged(forward.p_first, backward.p_first, cap))


class LongerLabeler:
    """The baseline without a model: the longer response, in characters, is better; equal lengths are a tie."""

    name = "longer"

    def label(self, comparisons: Sequence[Comparison]) -> list[Label]:
        return [self._label(len(c.response_a), len(c.response_b)) for c in comparisons]

    def _label(self, a: int, b: int) -> Label:
        p = 0.5 if a == b else float(a > b)
        return Label(p, p_a_forward=p, p_a_reversed=p, hard=True)


def cut_middle(text: str, count: int) -> str:
    """`text` without `count` characters of its middle, and a note of it in their place; all of it for 0."""
    if count <= 0:
        return text
    keep = len(text) - count
    head = (keep + 1) // 2
    return f"{text[:head]}{CUT.format(count)}{text[len(text) - (keep - head) :]}"
