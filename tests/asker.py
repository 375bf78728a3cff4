"""An Asker whose answers are a function of the question: hand-set probabilities without any model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from rlaif_ray.interfaces import GenerationSettings
from rlaif_ray.types import Answer, Explanation, Question
from tests.frames import without_codes


def shown(question: Question) -> tuple[str, str]:
    """The two responses in the order a preference question shows them, of the shipped templates."""
    lines = without_codes(question.turns[0].content).rsplit("]\n")
    texts = [line.rpartition("\n[END")[0] for line in lines]
    found = [text for text in texts if text]
    return found[-2], found[-1]


class FakeAsker:
    """Answers with `probability(question)` for the first answer and the rest for the second; a text is a failure."""

    def __init__(
        self,
        probability: Callable[[Question], float | str] = lambda _: 0.5,
        *,
        explain: Callable[[Question, int], str] = lambda question, k: f"reason {k}",
        longest: int | None = None,
        special: tuple[str, ...] = ("<|im_end|>",),
        name: str = "fake",
    ) -> None:
        self.name, self.identity, self.special = name, f"fake/{name}", special
        self.asked: list[Question] = []
        self.explained: list[Question] = []
        self.settings: list[GenerationSettings] = []
        self._probability, self._explain, self._longest = probability, explain, longest

    def fits(self, question: Question) -> bool:
        return self._longest is None or sum(len(turn.content) for turn in question.turns) <= self._longest

    def answer(self, questions: Sequence[Question]) -> Iterator[tuple[int, Answer]]:
        for i in reversed(range(len(questions))):  # in another order than asked
            self.asked.append(questions[i])
            if not self.fits(questions[i]):
                yield i, Answer((), failure="too_long")
                continue
            p = self._probability(questions[i])
            if isinstance(p, str):
                yield i, Answer((), tokens_in=1, failure=p)
            else:
                yield i, Answer((p, 1.0 - p), tokens_in=10, tokens_out=1, cost=0.25)

    def explain(self, questions: Sequence[Question], settings: GenerationSettings) -> Iterator[tuple[int, Explanation]]:
        self.settings.append(settings)
        for i, question in enumerate(questions):
            self.explained.append(question)
            if self.fits(question):
                texts = tuple(self._explain(question, k) for k in range(settings.samples_per_prompt))
                yield i, Explanation(texts, tokens_in=5, tokens_out=3, cost=0.5)
            else:
                yield i, Explanation((), failure="too_long")
