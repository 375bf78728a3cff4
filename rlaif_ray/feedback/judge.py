"""An AI judge as a Scorer: a Generator, a template, and the expected score over ten answers (d-RLAIF)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from rlaif_ray.errors import EngineError, InputError
from rlaif_ray.feedback.answers import AnswerTrie, Tokens, expected_score
from rlaif_ray.feedback.templates import Template
from rlaif_ray.types import Completion, Score

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rlaif_ray.interfaces import Generator

ROOM = 64  # tokens that a conversation and a response must have at least, or the judge is of no use

# Role markers that a chat template writes but its tokenizer may not list as special: <think>, [INST], <<SYS>>.
_TEMPLATE_WORD = re.compile(r"<<?/?[^\s<>'\"{}]{1,40}>>?|\[/?[A-Z_]{2,}\]")


class JudgePrompts:
    """Writes a judge's prompts, in text and in tokens. Needs no engine, so a driver can check its input with it."""

    def __init__(
        self, tokenizer: PreTrainedTokenizerBase, template: Template, max_context: int, model_name: str
    ) -> None:
        """Raises InputError when this judge can't score with this template and context."""
        self.template = template
        self._tokenizer = tokenizer
        self._special = _special_texts(tokenizer)
        self._leading = _leading_tokens(tokenizer) if tokenizer.chat_template is None else []
        self._max_context = max_context
        empty = self.text("", "")
        if template.ending not in empty:
            raise InputError(
                f"the chat template of judge {model_name} changes the message it is given (the ending of template "
                f"{template.name} is not in its prompt). Use another judge model, or an ending on one plain line."
            )
        self.trie = AnswerTrie(self._encode, empty[empty.rindex(template.ending) :])
        needed = self.trie.length(self.tokens([empty])[0]) + ROOM
        if needed > max_context:
            raise InputError(
                f"the context of judge {model_name} is too small: template {template.name} with {ROOM} tokens of text "
                f"needs {needed} tokens (got {max_context}). Raise feedback.judge.max_context, shorten the template, "
                "or use a judge model with a longer context."
            )

    def text(self, prompt_text: str, response_text: str) -> str:
        """What the judge reads, up to where its answer begins."""
        template = self.template
        body = template.render(prompt_text, response_text, self._special)
        content = f"{template.preamble}\n\n{body}\n\n{template.ending}"  # constant text first: prefix caching
        if self._tokenizer.chat_template is None:
            return f"{content}\n\n{template.answer_prefix}"
        chat = self._tokenizer.apply_chat_template(
            [{"role": "user", "content": content}],
            tokenize=False,
            add_generation_prompt=True,
            enable_thinking=False,  # to the templates that know it: the answer comes first
        )
        return f"{chat}{template.answer_prefix}"

    def tokens(self, texts: Sequence[str]) -> list[Tokens]:
        """Tokens of the prompts. Special ones come from the chat template only: user texts have none left."""
        if not texts:
            return []
        rows = self._tokenizer(list(texts), add_special_tokens=False, verbose=False)["input_ids"]
        return [(*self._leading, *row) for row in rows]

    def fits(self, prompt_tokens: Tokens) -> bool:
        return self.trie.length(prompt_tokens) <= self._max_context

    def _encode(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])


class Judge:
    """Scores completions with a language model: its expected answer on a scale from 1 to 10, mapped to [-1, 1]."""

    def __init__(
        self,
        generator: Generator,
        tokenizer: PreTrainedTokenizerBase,
        template: Template,
        max_context: int,
        model_name: str,
    ) -> None:
        """`tokenizer` is the judge model's; `max_context` what its engine takes, prompt and answer together.

        Raises InputError as `check_context` does.
        """
        self._generator = generator
        self._prompts = JudgePrompts(tokenizer, template, max_context, model_name)
        self._origin = {"template": template.name, "template_hash": template.hash, "judge": model_name}

    def example_prompt(self, prompt_text: str, response_text: str) -> str:
        """The whole text that the judge reads about one completion, to show it to users."""
        return self._prompts.text(prompt_text, response_text)

    def score(self, completions: Sequence[Completion]) -> list[Score]:
        """One score per completion, in order. Prompts that are the same are asked once, in one engine call for all."""
        prompts = self._prompts.tokens([self._prompts.text(c.prompt.text, c.text) for c in completions])
        judged = self._judge([prompt for prompt in dict.fromkeys(prompts) if self._prompts.fits(prompt)])
        scores, seen = [], set()
        for prompt in prompts:
            score = judged.get(prompt) or Score(None, "too_long", dict(self._origin))
            scores.append(replace(score, tokens_in=0) if prompt in seen else score)  # the judge read it once
            seen.add(prompt)
        return scores

    def _judge(self, prompts: Sequence[Tokens]) -> dict[Tokens, Score]:
        """The score of each of these different prompts."""
        trie = self._prompts.trie
        queries = [query for prompt in prompts for query in trie.queries(prompt)]
        try:
            answers = self._generator.token_logprobs(queries) if queries else []
        except EngineError as error:
            return {p: Score(None, "engine_error", {"error": str(error), **self._origin}) for p in prompts}
        assert len(answers) == len(queries), "a Generator answers every query"
        scores = {}
        for index, prompt in enumerate(prompts):
            own = answers[index * len(trie.nodes) : (index + 1) * len(trie.nodes)]
            failure = next((answer.failure for answer in own if answer.failure is not None), None)
            if failure is not None:
                scores[prompt] = Score(None, failure, dict(self._origin))
            else:
                scores[prompt] = self._verdict([answer.logprobs for answer in own], tokens_in=len(prompt))
        return scores

    def _verdict(self, logprobs: Sequence[Sequence[float]], tokens_in: int) -> Score:
        probabilities = self._prompts.trie.probabilities(logprobs)
        verdict = expected_score(probabilities)
        if verdict is None:
            return Score(None, "no_probability", dict(self._origin), tokens_in)
        evidence = {
            "probabilities": [round(probability, 6) for probability in probabilities],
            "expected": round(verdict.expected, 6),
            "outside_mass": round(verdict.outside, 6),
            **self._origin,
        }
        return Score(verdict.value, None, evidence, tokens_in)


def check_context(tokenizer: PreTrainedTokenizerBase, template: Template, max_context: int, model_name: str) -> None:
    """Raises InputError when a Judge of these can't work: before engines start, which takes longer.

    That is when the template leaves no room for texts in the context, or the tokenizer can't tell the answers apart.
    """
    JudgePrompts(tokenizer, template, max_context, model_name)


def _special_texts(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Texts that would not be plain text to the judge: special tokens and the role markers of its chat template."""
    template: Any = tokenizer.chat_template or ""
    source = template if isinstance(template, str) else "\n".join(template.values())
    added = [str(token.content) for token in tokenizer.added_tokens_decoder.values() if token.special]
    return tuple(sorted({*added, *_TEMPLATE_WORD.findall(source)}))


def _leading_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a plain text, such as a beginning-of-sequence token."""
    bare = tokenizer("1", add_special_tokens=False)["input_ids"]
    full = tokenizer("1", add_special_tokens=True)["input_ids"]
    return list(full[: next((i for i in range(len(full)) if full[i : i + len(bare)] == bare), 0)])
