"""Judge templates: a constant part, and the slots that users' texts may fill but never leave.

Two kinds. "score": how good is one response, 1 to 10. "preference": which of two responses it is, 1 or 2; the template
declares whether it asks for the better or the worse one (`asks_for`), and a labeler inverts the answers to the latter.
Where {principle} stands in a preference template's question, a constitution's comparison question is put, or the
template's own `default_question`. Those of a constitution ask which response is better, so a template that asks for
the worse one has no {principle}.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from rlaif_ray.feedback.answers import SCORES
from rlaif_ray.feedback.files import LIST, TEXT, TEXTS, WHOLE, Source, find, key_problems, nearest, read, refuse, shown
from rlaif_ray.feedback.frames import NOTE, with_codes
from rlaif_ray.feedback.neutral import letters, neutralise

Kind = Literal["score", "preference"]

SHIPPED = Path(__file__).with_name("templates")
EXEMPLARS = Path(__file__).with_name("exemplars")
FOLDERS: dict[str, Path] = {"score": SHIPPED, "preference": SHIPPED / "preference"}
SLOTS: dict[str, tuple[str, ...]] = {"score": ("prompt", "response"), "preference": ("prompt", "first", "second")}
ANSWERS: dict[str, tuple[str, ...]] = {"score": SCORES, "preference": ("1", "2")}
ASKS_FOR = ("better", "worse")
PRINCIPLE = "{principle}"

_SETTINGS = {"score": "feedback.template", "preference": "label.template"}
_MEANING = {"score": "a whole number from 1 to 10", "preference": "which of two responses, 1 or 2"}
_PLACEHOLDER = re.compile(r"\{([A-Za-z_][A-Za-z0-9_]*)\}")
_SLOT = re.compile(r"\{(prompt|response|first|second)\}")


@dataclass(frozen=True, slots=True)
class Exemplar:
    """A worked example of a comparison, shown to the judge before the pair that it is asked about."""

    prompt: str
    first: str
    second: str
    answer: str  # "1" or "2", to the question that the template asks
    rationale: str  # shown in a chain of thought
    question: str = ""  # stands where {principle} does; empty: the template's default question


@dataclass(frozen=True, slots=True)
class Template:
    """How a judge is asked. The judge reads preamble, body and ending, then continues `answer_prefix`."""

    name: str
    version: int
    kind: str  # "score" or "preference"
    preamble: str  # constant and first, so that an engine's prefix cache serves it to a whole batch
    body: str  # with {prompt} and {response}, or {prompt}, {first} and {second}
    ending: str  # the question; in preference templates with {principle}, if they take principles
    answer_prefix: str  # constant: how the judge's answer begins
    markers: tuple[str, ...]  # in the body, around the users' texts, which can't forge them
    # Of preference templates, empty in others:
    asks_for: str = ""  # "better" or "worse": which response the answer names
    rationale_request: str = ""  # instead of the ending in the first step of a chain of thought: asks for reasons
    default_question: str = ""  # stands where {principle} does when there is no constitution

    @property
    def hash(self) -> str:
        """Of everything that shapes the judge's prompt or its reading, so not of name and version."""
        texts = asdict(self)
        absent = [key for key in ("asks_for", "rationale_request", "default_question") if not texts[key]]
        shape = {key: value for key, value in texts.items() if key not in ("name", "version", *absent)}
        return _digest({**shape, "note": NOTE, "frame": self._fill(dict.fromkeys(SLOTS[self.kind], ""), (), 0)})

    @property
    def answers(self) -> tuple[str, ...]:
        """The answers whose probabilities are read."""
        return ANSWERS[self.kind]

    @property
    def takes_principles(self) -> bool:
        """Whether a constitution's question has a place in this template's."""
        return PRINCIPLE in self.ending

    def neutralise(self, text: str, special_tokens: Sequence[str] = ()) -> str:
        """`text` without the power to end its slot (see neutral.py)."""
        return neutralise(text, self.markers, special_tokens)

    def render(self, prompt_text: str, response_text: str, special_tokens: Sequence[str] = (), seed: int = 0) -> str:
        """The body of a score template with both texts, neutralised, in their slots. `seed` is of the frame's codes."""
        return self._fill({"prompt": prompt_text, "response": response_text}, special_tokens, seed)

    def render_pair(
        self, prompt_text: str, first: str, second: str, special_tokens: Sequence[str] = (), seed: int = 0
    ) -> str:
        """The body of a preference template with the three texts, neutralised, in their slots."""
        return self._fill({"prompt": prompt_text, "first": first, "second": second}, special_tokens, seed)

    def _fill(self, texts: dict[str, str], special_tokens: Sequence[str], seed: int) -> str:
        assert tuple(texts) == SLOTS[self.kind], "the other kind of template"
        safe = {slot: self.neutralise(text, special_tokens) for slot, text in texts.items()}
        body = with_codes(self.body, self.markers, texts, seed, shown=tuple(safe.values()))
        return _SLOT.sub(lambda match: safe[match[1]], body)  # one pass: a "{first}" in a prompt stays text

    @property
    def opening(self) -> str:
        """What the judge reads first, the same in every question: what it is to do, and what the frame means."""
        return f"{self.preamble}\n\n{NOTE}" if self.markers else self.preamble

    def with_exemplars(
        self, exemplars: Sequence[Exemplar], with_rationales: bool, special_tokens: Sequence[str] = ()
    ) -> str:
        """The constant text before the body: the opening, then each exemplar the way a pair is asked about.

        `with_rationales`: as in a chain of thought, request and rationale before the question.
        """
        if not exemplars:
            return self.opening
        parts = [self.opening]
        for number, exemplar in enumerate(exemplars, start=1):
            question = exemplar.question or self.default_question
            parts += [f"Example {number}:"]
            parts += [self.render_pair(exemplar.prompt, exemplar.first, exemplar.second, special_tokens)]
            if with_rationales:
                parts += [self.rationale_request.replace(PRINCIPLE, question)]
                parts += [self.neutralise(exemplar.rationale, special_tokens)]
            parts += [self.ending.replace(PRINCIPLE, question), f"{self.answer_prefix}{exemplar.answer}"]
        return "\n\n".join([*parts, "End of the examples. The case to judge:"])


def template_hash(template: Template, exemplars: Sequence[Exemplar] = (), with_rationales: bool = False) -> str:
    """Of everything that shapes the judge's prompt or its reading, exemplars as they are shown included."""
    if not exemplars:
        return template.hash
    return _digest({"template": template.hash, "constant": template.with_exemplars(exemplars, with_rationales)})


def _digest(shape: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(shape, sort_keys=True).encode()).hexdigest()[:12]


# ---- Loading ---------------------------------------------------------------------------------------------------------

_KEYS = {"name": TEXT, "version": WHOLE, "kind": TEXT}
_KEYS |= {"preamble": TEXT, "body": TEXT, "ending": TEXT, "answer_prefix": TEXT, "markers": TEXTS}
_PREFERENCE_KEYS = _KEYS | {"asks_for": TEXT, "rationale_request": TEXT, "default_question": TEXT}
_CONSTANT = ("preamble", "ending", "answer_prefix", "rationale_request", "default_question")
_FILLED = ("name", "preamble", "ending", "rationale_request")  # must not be empty


def load_template(name_or_path: str, kind: Kind = "score") -> Template:
    """A shipped template of the kind by name, or a user's own YAML file (its name ends in .yaml, or has a folder).

    Raises:
        InputError: tells everything that is wrong with it, by line.
    """
    path = find(name_or_path, FOLDERS[kind], _SETTINGS[kind])
    source = read(path, _SETTINGS[kind])
    refuse(source, "template", _problems(source, kind), FOLDERS[kind] / "helpful.yaml")
    values = source.values
    long = ("preamble", "body", "ending", "rationale_request", "default_question")  # they are joined by blank lines
    texts = {key: values[key].strip() for key in long if key in values}
    return Template(**{**values, **texts, "markers": tuple(values["markers"])})


def _problems(source: Source, kind: Kind) -> Iterator[str]:
    found = source.values.get("kind")
    if found in FOLDERS and found != kind:
        yield (
            f"{source.line('kind')}: kind is {found!r} ({_MEANING[found]}), but {_SETTINGS[kind]} needs "
            f"{kind!r} ({_MEANING[kind]})"
        )
        return  # whatever else is in it follows the other kind's rules
    keys = _PREFERENCE_KEYS if kind == "preference" else _KEYS
    wrong = [*key_problems(source, source.values, keys, optional=("default_question",))]
    yield from wrong
    yield from () if wrong else _content_problems(source, kind)


def _content_problems(source: Source, kind: Kind) -> Iterator[str]:
    """What keys and types of a template can't show."""
    values = source.values
    if values["kind"] != kind:
        yield f"{source.line('kind')}: kind must be {kind!r}, {_MEANING[kind]} (got {shown(values['kind'])})"
    for key in _FILLED:
        if key in values and not values[key].strip():
            yield f"{source.line(key)}: {key} must not be empty"
    takes = ("ending", "rationale_request") if kind == "preference" else ()
    for key in _CONSTANT:
        for name in dict.fromkeys(_PLACEHOLDER.findall(values.get(key, ""))):
            where = f"{source.line(key)}: {key} has the"
            if name in SLOTS[kind]:
                yield f"{where} placeholder {{{name}}}: only body can"
            elif takes and name == "principle" and key not in takes:
                yield f"{where} placeholder {PRINCIPLE}: only {' and '.join(takes)} can"
            elif name != "principle" or not takes:
                only = f"; there is only {PRINCIPLE}" if key in takes else ""
                yield f"{where} unknown placeholder {{{name}}}{only}"
    yield from _body_problems(source, SLOTS[kind])
    if kind == "preference":
        yield from _question_problems(source)


def _question_problems(source: Source) -> Iterator[str]:
    """What a preference template asks, and where a principle may stand in it."""
    values = source.values
    ending, request, default = (values.get(key, "") for key in ("ending", "rationale_request", "default_question"))
    asks_for = values["asks_for"]
    if asks_for not in ASKS_FOR:
        hint = nearest(asks_for, ASKS_FOR)
        yield f"{source.line('asks_for')}: asks_for must be 'better' or 'worse' (got {shown(asks_for)}){hint}"
    for answer in ANSWERS["preference"]:
        if not re.search(rf"\b{answer}\b", ending):
            yield f"{source.line('ending')}: ending must ask for the answer 1 or 2 (it does not say {answer})"
    for key, text in (("ending", ending), ("rationale_request", request)):
        if text.count(PRINCIPLE) > 1:
            yield f"{source.line(key)}: {key} must have {PRINCIPLE} once at most (got {text.count(PRINCIPLE)})"
    asked = PRINCIPLE in ending
    if asked and asks_for == "worse":
        yield (
            f"{source.line('ending')}: ending has {PRINCIPLE} and asks_for is worse: a constitution's questions ask "
            "which response is better, so write the question itself in its place"
        )
    if PRINCIPLE in request and not asked:
        yield f"{source.line('rationale_request')}: rationale_request has {PRINCIPLE}, so ending must have it too"
    if asked and not default.strip():
        yield (
            f"{source.line('default_question')}: default_question must say what stands for {PRINCIPLE} without a "
            "constitution"
        )
    if default.strip() and not asked:
        yield f"{source.line('default_question')}: default_question needs {PRINCIPLE} in ending, to stand there"


def _body_problems(source: Source, slots: tuple[str, ...]) -> Iterator[str]:
    """Slots and markers of the body."""
    body, markers = source.values["body"], source.values["markers"]
    found = _PLACEHOLDER.findall(body)
    at, at_markers = source.line("body"), source.line("markers")
    for slot in slots:
        if found.count(slot) != 1:
            yield f"{at}: body must have the placeholder {{{slot}}} once (got {found.count(slot)})"
    for unknown in dict.fromkeys(found):
        if unknown not in slots:
            known = ", ".join(f"{{{slot}}}" for slot in slots)
            yield f"{at}: body has the unknown placeholder {{{unknown}}}: there are only {known}"
    for marker in markers:
        if not (marker.startswith("[") and marker.endswith("]") and letters(marker)):
            yield f"{at_markers}: marker {marker!r} must be words in square brackets, such as [END RESPONSE]"
        elif body.count(marker) != 1:
            yield f"{at_markers}: marker {marker!r} must be in body once (got {body.count(marker)})"
    if all(found.count(slot) == 1 for slot in slots):
        yield from (f"{at}: {problem}" for problem in _slot_problems(body, markers, slots))


def _slot_problems(body: str, markers: list[str], slots: tuple[str, ...]) -> Iterator[str]:
    """Slots that a text could leave: without a marker on either side, or beside other text on their line."""
    braced = [f"{{{slot}}}" for slot in slots]
    parts = [part for part in [*markers, *braced] if part in body]
    parts.sort(key=body.index)
    for slot in braced:
        at = parts.index(slot)
        around = (parts[at - 1] if at else None, parts[at + 1] if at + 1 < len(parts) else None)
        alone = re.search(rf"^[ \t]*{re.escape(slot)}[ \t]*$", body, re.MULTILINE)
        if not alone or not all(part in markers for part in around):
            yield f"{slot} must stand on a line of its own in body, with one of the markers before it and one after it"
    if "first" in slots and body.index("{second}") < body.index("{first}"):
        yield "{first} must stand before {second} in body: it is the response that is shown first"


# ---- Exemplars -------------------------------------------------------------------------------------------------------

_FILE_KEYS = {"name": TEXT, "version": WHOLE, "asks_for": TEXT, "exemplars": LIST}
_EXEMPLAR_KEYS = {"prompt": TEXT, "first": TEXT, "second": TEXT, "rationale": TEXT, "question": TEXT}
_EXEMPLAR_FILLED = ("prompt", "rationale", "question")  # must not be empty; an empty response can be an example


def load_exemplars(name_or_path: str, template: Template) -> tuple[Exemplar, ...]:
    """Shipped exemplars by name, or a user's own YAML file (its name ends in .yaml, or has a folder).

    `template` is the preference template that they will be shown in: they must answer what it asks.

    Raises:
        InputError: tells everything that is wrong with them, by line.
    """
    path = find(name_or_path, EXEMPLARS, "label.exemplars")
    source = read(path, "label.exemplars")
    refuse(source, "exemplars", _exemplar_file_problems(source, template), EXEMPLARS / "helpful.yaml")
    return tuple(
        Exemplar(answer=str(entry["answer"]), **{key: entry[key].strip() for key in _EXEMPLAR_KEYS if key in entry})
        for entry in source.values["exemplars"]
    )


def _exemplar_file_problems(source: Source, template: Template) -> Iterator[str]:
    values = source.values
    yield from key_problems(source, values, _FILE_KEYS)
    asks_for = values.get("asks_for")
    if isinstance(asks_for, str) and asks_for not in ASKS_FOR:
        yield f"{source.line('asks_for')}: asks_for must be 'better' or 'worse' (got {shown(asks_for)})"
    elif isinstance(asks_for, str) and asks_for != template.asks_for:
        yield (
            f"{source.line('asks_for')}: these exemplars answer which response is {asks_for}, and template "
            f"{template.name} asks which is {template.asks_for}: their answers would teach the judge the opposite"
        )
    entries = values.get("exemplars")
    if entries == []:
        yield f"{source.line('exemplars')}: exemplars must have at least one"
    for index, entry in enumerate(entries if isinstance(entries, list) else ()):
        yield from _exemplar_problems(source, index, entry, template)


def _exemplar_problems(source: Source, index: int, entry: Any, template: Template) -> Iterator[str]:
    at = ("exemplars", str(index))
    if not isinstance(entry, dict):
        needed = "prompt, first, second, answer and rationale"
        yield f"{source.line(*at)}: an exemplar must have {needed} (got {shown(entry)})"
        return
    texts = {key: value for key, value in entry.items() if key != "answer"}
    yield from key_problems(source, texts, _EXEMPLAR_KEYS, optional=("question",), at=at)
    for key in _EXEMPLAR_FILLED:
        if isinstance(entry.get(key), str) and not entry[key].strip():
            yield f"{source.line(*at, key)}: {key} must not be empty"
    if "answer" not in entry:
        yield f"{source.line(*at)}: key 'answer' is missing"
    elif str(entry["answer"]) not in ANSWERS["preference"]:  # 1 without quotes is a number to YAML, and clear enough
        yield f'{source.line(*at, "answer")}: answer must be "1" or "2" (got {shown(entry["answer"])})'
    if "question" in entry and not template.takes_principles:
        yield (
            f"{source.line(*at, 'question')}: question stands where {{principle}} does, and template {template.name} "
            "has no {principle}"
        )
