"""An AI judge as a Scorer: an Asker, a template, and the expected score over ten answers (d-RLAIF)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlaif_ray.chat.thoughts import OPEN_THOUGHT, answer_of
from rlaif_ray.errors import InputError
from rlaif_ray.feedback.answers import MIN_ANSWER_MASS, SCORES, expected_score, mass_failure
from rlaif_ray.feedback.local import LocalAsker
from rlaif_ray.types import Answer, Completion, Message, Question, Score

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlaif_ray.chat.template import ChatTemplate
    from rlaif_ray.config.chat import Thoughts
    from rlaif_ray.feedback.templates import Template
    from rlaif_ray.interfaces import Asker

ROOM = 64  # tokens that a conversation and a response must have at least, or the judge is of no use


class Judge:
    """Scores completions with a language model: its expected answer on a scale from 1 to 10, mapped to [-1, 1]."""

    def __init__(
        self,
        asker: Asker,
        template: Template,
        *,
        min_answer_mass: float = MIN_ANSWER_MASS,
        seed: int = 0,
        thoughts: Thoughts = "cut",
    ) -> None:
        """`min_answer_mass`: of the probability, that all ten answers must have together, or it is a failure.

        `seed` is of the codes in the frames around the texts; `thoughts`: whether the judge reads what a response
        begins with as a thought, or the answer alone.
        """
        self._asker, self._template, self._least, self._seed = asker, template, min_answer_mass, seed
        self._thoughts = thoughts
        self._origin = {"template": template.name, "template_hash": template.hash, "judge": asker.name}

    def asking(self, template: Template) -> Judge:
        """The same judge with another question."""
        return Judge(self._asker, template, min_answer_mass=self._least, seed=self._seed, thoughts=self._thoughts)

    def question(self, prompt_text: str, response_text: str) -> Question:
        """What the judge is asked about one completion."""
        return score_question(self._template, prompt_text, response_text, self._asker.special, self._seed)

    def score(self, completions: Sequence[Completion]) -> list[Score]:
        """One score per completion, in order. Questions that are the same are asked once, all in one call."""
        texts = [answer_of(c.text, c.prompt.tags) if self._thoughts == "cut" else c.text for c in completions]
        questions = [
            None if text is None else self.question(c.prompt.text, text)
            for c, text in zip(completions, texts, strict=True)
        ]
        asked = list(dict.fromkeys(question for question in questions if question is not None))
        judged = {asked[i]: self._score(answer) for i, answer in self._asker.answer(asked)} if asked else {}
        scores, seen = [], set()
        for question in questions:
            if question is None:  # a thought that does not end is no answer
                scores.append(Score(None, OPEN_THOUGHT, self._origin))
                continue
            score = judged[question]
            scores.append(replace(score, tokens_in=0) if question in seen else score)  # the judge read it once
            seen.add(question)
        return scores

    def _score(self, answer: Answer) -> Score:
        failure = answer.failure or mass_failure(answer, self._least)
        reason, _, detail = (failure or "").partition(": ")
        told = {} if answer.failure else {"outside_mass": round(answer.outside, 6)}
        verdict = expected_score(answer.probabilities) if not reason else None
        if verdict is None:
            error = {"error": detail} if detail else {}
            return Score(None, reason or "no_probability", {**error, **told, **self._origin}, answer.tokens_in)
        evidence = {
            "probabilities": [round(probability * answer.mass, 6) for probability in answer.probabilities],
            "expected": round(verdict.expected, 6),
            **told,
            **self._origin,
        }
        return Score(verdict.value, None, evidence, answer.tokens_in)


def score_question(
    template: Template, prompt_text: str, response_text: str, special: tuple[str, ...], seed: int = 0
) -> Question:
    """The question for a score from 1 to 10, both texts neutralised."""
    body = template.render(prompt_text, response_text, special, seed)
    content = f"{template.opening}\n\n{body}\n\n{template.ending}"  # constant text first: prefix caching
    return Question((Message("user", content),), template.answer_prefix, SCORES)


def check_context(
    tokenizer: PreTrainedTokenizerBase | ChatTemplate,
    template: Template,
    max_context: int,
    model_name: str,
    key: str = "feedback.judge.max_context",
) -> None:
    """Raises InputError when a local judge of these can't work: before engines start, which takes longer.

    That is when the template leaves no room for texts in the context, the tokenizer can't tell the answers apart, or
    the chat template changes what it is given. `key` is the setting of its context.
    """
    asker = LocalAsker(None, tokenizer, max_context, model_name)
    check_question(asker, score_question(template, "", "", asker.special), template, key)


def check_question(asker: LocalAsker, empty: Question, template: Any, key: str) -> None:
    """Raises InputError when `empty`, a question without users' texts, leaves no room or is not read as written.

    `key` is the setting that raises the judge's context.
    """
    ending = empty.turns[-1].content.rpartition("\n\n")[2]
    if ending not in asker.text(empty):
        raise InputError(
            f"the chat template of judge {asker.name} changes the message it is given (the ending of template "
            f"{template.name} is not in its prompt). Use another judge model, or an ending on one plain line."
        )
    needed = asker.length(empty) + ROOM
    if needed > asker.max_context:
        raise InputError(
            f"the context of judge {asker.name} is too small: template {template.name} with {ROOM} tokens of text "
            f"needs {needed} tokens (got {asker.max_context}). Raise {key}, shorten the template, "
            "or use a judge model with a longer context."
        )
