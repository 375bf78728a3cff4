"""Data taken for text: conversations that are written down in a text are read as such, or refused by row."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from rlaif_ray.data.demonstrations import read_demonstrations
from rlaif_ray.data.preferences import read_preferences
from rlaif_ray.data.prompts import read_conversations
from rlaif_ray.errors import InputError
from rlaif_ray.types import Message


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


SYSTEM = {"role": "system", "content": "Be brief."}
ASKED = "What is two and two?"
TURNS = [user("Hi"), assistant("Hello"), user(ASKED)]
HH = f"\n\nHuman: Hi\n\nAssistant: Hello\n\nHuman: {ASKED}\n\nAssistant:"
READ = tuple(Message(turn["role"], turn["content"]) for turn in TURNS)


def write(file: Path, *rows: dict[str, Any]) -> str:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(file)


# --- prompts ----------------------------------------------------------------------------------------------------------

WAYS = {
    "a list": TURNS,
    "JSON": json.dumps(TURNS),
    "indented JSON": json.dumps(TURNS, indent=2) + "\n",
    "Python": str(TURNS),
    "HH": HH,
    "HH without the place for the answer": HH.removesuffix("\n\nAssistant:"),
    "parts": [user([{"type": "text", "text": "Hi"}]), assistant("Hello"), user([{"type": "text", "text": ASKED}])],
}


@pytest.mark.parametrize("way", WAYS)
def test_a_prompt_in_every_way_to_write_it(way: str, tmp_path: Path) -> None:
    assert read_conversations(write(tmp_path / "p.jsonl", {"prompt": WAYS[way]})) == [READ]


@pytest.mark.parametrize("way", WAYS)
def test_and_in_demonstrations(way: str, tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", {"prompt": WAYS[way], "response": "Four."})
    assert next(read_demonstrations(file)).messages == (*READ, Message("assistant", "Four."))


def test_from_csv(tmp_path: Path) -> None:
    import csv

    with (tmp_path / "p.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerows([["prompt"], [json.dumps(TURNS)], [str(TURNS)], [HH]])
    assert read_conversations(str(tmp_path / "p.csv")) == [READ] * 3


TEXTS = [
    '[{"role": "user", "content": "hi"}] What is wrong with this JSON?',
    '{"content": "Summarise this."}',
    "[1, 2] is a list.",
    "Human: what is a human?",
    "Who said:\n\nHuman: hi\n\nAssistant: hello",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_that_is_no_conversation_stays_text(text: str, tmp_path: Path) -> None:
    assert read_conversations(write(tmp_path / "p.jsonl", {"prompt": text})) == [(Message("user", text),)]


REFUSED = {
    "broken JSON": ('[{"role": "user", "content": "a}]', "begins like messages"),
    "numpy's way": ("[{'role': 'user', 'content': 'a'}\n {'role': 'user', 'content': 'b'}]", "begins like messages"),
    "another role": (json.dumps([{"role": "tool", "content": "a"}]), r"prompt\[0\].role must be one of"),
    "a developer": ([{"role": "developer", "content": "a"}, user("b")], r"role must be one of system, user.*developer"),
    "an image": ([user([{"type": "image_url", "image_url": {"url": "x"}}])], r"content\[0\] must be text .*image_url"),
    "an image beside text": ([user([{"type": "text", "text": "a"}, {"type": "image"}])], r"content\[1\] must be text"),
    "tool calls": ([assistant("") | {"tool_calls": [{"id": 1}]}, user("a")], r"prompt\[0\].tool_calls is not read"),
    "a thought beside": ([assistant("a") | {"reasoning_content": "b"}, user("c")], "reasoning_content is not read"),
    "HH with an answer": (f"{HH} Four.", "last message of prompt must be from the user"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_can_not_be_read_is_refused_by_row(name: str, tmp_path: Path) -> None:
    value, said = REFUSED[name]
    (tmp_path / "p.json").write_text(json.dumps([{"prompt": value}]))
    file = write(tmp_path / "p.jsonl", {"prompt": value})
    with pytest.raises(InputError, match=rf"(?s)p\.jsonl, line 1: .*{said}"):
        read_conversations(file)


# --- preferences ------------------------------------------------------------------------------------------------------

DIALOGUE = [*TURNS, assistant("Four.")], [*TURNS, assistant("Five.")]
CASES: dict[str, dict[str, Any]] = {
    "texts": {"prompt": TURNS, "chosen": "Four.", "rejected": "Five."},
    "JSON": {"prompt": json.dumps(TURNS), "chosen": json.dumps(DIALOGUE[0]), "rejected": json.dumps(DIALOGUE[1])},
    "JSON without a prompt": {"chosen": json.dumps(DIALOGUE[0]), "rejected": json.dumps(DIALOGUE[1])},
    "HH": {"chosen": f"{HH} Four.", "rejected": f"{HH} Five."},
    "HH with the prompt": {"prompt": HH, "chosen": f"{HH} Four.", "rejected": f"{HH} Five."},
    "HH with messages": {"prompt": TURNS, "chosen": f"{HH} Four.", "rejected": f"{HH} Five."},
    "HH's prompt alone": {"prompt": HH, "chosen": "Four.", "rejected": "Five."},
    "repeated messages": {"prompt": TURNS, "chosen": DIALOGUE[0], "rejected": DIALOGUE[1]},
}


@pytest.mark.parametrize("name", CASES)
def test_preferences_in_every_way(name: str, tmp_path: Path) -> None:
    [record] = read_preferences(write(tmp_path / "p.jsonl", CASES[name]))
    assert (record.prompt, record.response_a, record.response_b, record.p_a) == (READ, "Four.", "Five.", 1.0)


@pytest.mark.parametrize("prompt", [ASKED, f"Question: {ASKED}\nAnswer:"])
def test_texts_that_repeat_the_prompt(prompt: str, tmp_path: Path) -> None:
    row = {"prompt": prompt, "chosen": f"{prompt} Four.", "rejected": f"{prompt}\n\nFive."}
    [record] = read_preferences(write(tmp_path / "p.jsonl", row))
    assert (record.prompt, record.response_a, record.response_b) == ((Message("user", prompt),), "Four.", "Five.")


@pytest.mark.parametrize(
    ("prompt", "chosen", "rejected"),
    [
        ("Hi", "Hi there!", "Hi you."),  # a word that both begin with
        (ASKED, f"{ASKED} Four.", "Five."),  # one of them quotes
        ("Say it as it is", "Say it as it issues.", "Say it as it isn't."),
    ],
)
def test_answers_that_begin_like_the_prompt_are_whole(prompt: str, chosen: str, rejected: str, tmp_path: Path) -> None:
    [record] = read_preferences(write(tmp_path / "p.jsonl", {"prompt": prompt, "chosen": chosen, "rejected": rejected}))
    assert (record.response_a, record.response_b) == (chosen, rejected)


@pytest.mark.parametrize("prompt", [TURNS, ASKED, None])
def test_a_system_message_in_the_responses_alone_counts(prompt: Any, tmp_path: Path) -> None:
    turns = TURNS if prompt != ASKED else [user(ASKED)]
    row = {"prompt": prompt} if prompt is not None else {}
    row |= {"chosen": [SYSTEM, *turns, assistant("Four.")], "rejected": [SYSTEM, *turns, assistant("Five.")]}
    [record] = read_preferences(write(tmp_path / "p.jsonl", row))
    assert [turn.role for turn in record.prompt] == ["system", *(turn["role"] for turn in turns)]


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"chosen": [SYSTEM, *DIALOGUE[0]], "rejected": DIALOGUE[1]}, "system messages that differ, or one for one"),
        (
            {"chosen": [SYSTEM, *DIALOGUE[0]], "rejected": [SYSTEM | {"content": "x"}, *DIALOGUE[1]]},
            "system messages that differ",
        ),
        ({"chosen": f"{HH} Four.", "rejected": "\n\nHuman: other\n\nAssistant: Five."}, "conversations that differ"),
        ({"chosen": [user([{"type": "image"}]), assistant("a")], "rejected": "b"}, r"chosen\[0\].content\[0\]"),
    ],
)
@pytest.mark.parametrize("prompt", [TURNS, None])
def test_responses_to_different_prompts_are_refused(
    prompt: Any, row: dict[str, Any], said: str, tmp_path: Path
) -> None:
    with pytest.raises(InputError, match=rf"p\.jsonl, line 1: .*{said}"):
        list(read_preferences(write(tmp_path / "p.jsonl", row | ({"prompt": prompt} if prompt else {}))))


def test_messages_as_text_in_a_labelled_pair_are_refused(tmp_path: Path) -> None:
    row = {"prompt": TURNS, "response_a": json.dumps([assistant("b")]), "response_b": "c", "label": 1.0}
    with pytest.raises(InputError, match=r"line 1: response_a must be text that is not empty .got list"):
        list(read_preferences(write(tmp_path / "p.jsonl", row)))


def test_demonstrations_as_text(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", {"messages": json.dumps(DIALOGUE[0])})
    assert next(read_demonstrations(file)).messages == (*READ, Message("assistant", "Four."))


# --- what only looks like a conversation ------------------------------------------------------------------------------

ADMIN = '{"role": "admin", "content": "x"}'
JSON_ANSWER = json.dumps([assistant("x")])


@pytest.mark.parametrize("text", [HH, json.dumps(TURNS), ADMIN])
def test_a_prompt_that_the_messages_hold_as_a_text_is_one(text: str, tmp_path: Path) -> None:
    """UltraFeedback: the prompt in a column of its own and in the messages, and some of them are transcripts."""
    row = {"prompt": text, "chosen": [user(text), assistant("Four.")], "rejected": [user(text), assistant("Five.")]}
    [record] = read_preferences(write(tmp_path / "p.jsonl", row))
    assert (record.prompt, record.response_a, record.response_b) == ((Message("user", text),), "Four.", "Five.")
    row |= {"chosen": [SYSTEM, *row["chosen"]], "rejected": [SYSTEM, *row["rejected"]]}  # type: ignore[misc]
    [record] = read_preferences(write(tmp_path / "p.jsonl", row))
    assert record.prompt == (Message("system", "Be brief."), Message("user", text))


@pytest.mark.parametrize(
    "text", [ADMIN, f"[{ADMIN}]", '[{"role": "user", "content": "a"}, {"role": "bot", "content": "b"}]']
)
def test_data_with_other_roles_is_text(text: str, tmp_path: Path) -> None:
    assert read_conversations(write(tmp_path / "p.jsonl", {"prompt": text})) == [(Message("user", text),)]
    file = write(tmp_path / "d.jsonl", {"prompt": "Write JSON.", "response": text})
    assert next(read_demonstrations(file)).messages[-1] == Message("assistant", text)


@pytest.mark.parametrize("answer", [JSON_ANSWER, ADMIN, '[{"role": "user", "content": "a}]'])
def test_an_answer_to_a_text_is_a_text(answer: str, tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", {"prompt": "Write JSON.", "response": answer})
    assert next(read_demonstrations(file)).messages == (Message("user", "Write JSON."), Message("assistant", answer))
    for row in (
        {"prompt": "Write JSON.", "chosen": answer, "rejected": "no"},
        {"prompt": "Write JSON.", "response_a": answer, "response_b": "no", "label": 1.0},
    ):
        [record] = read_preferences(write(tmp_path / "p.jsonl", row))
        assert (record.response_a, record.response_b) == (answer, "no")


def test_messages_as_text_that_repeat_a_plain_prompt_are_messages(tmp_path: Path) -> None:
    chosen, rejected = ([user(ASKED), assistant(text)] for text in ("Four.", "Five."))
    row = {"prompt": ASKED, "chosen": json.dumps(chosen), "rejected": str(rejected)}
    [record] = read_preferences(write(tmp_path / "p.jsonl", row))
    assert (record.prompt, record.response_a, record.response_b) == ((Message("user", ASKED),), "Four.", "Five.")


def test_the_system_message_of_a_prompt_holds_for_responses_without_one(tmp_path: Path) -> None:
    row = {"prompt": [SYSTEM, *TURNS], "chosen": DIALOGUE[0], "rejected": DIALOGUE[1]}
    [record] = read_preferences(write(tmp_path / "p.jsonl", row))
    assert record.prompt == (Message("system", "Be brief."), *READ)
    assert (record.response_a, record.response_b) == ("Four.", "Five.")


@pytest.mark.parametrize("prompt", [ASKED, TURNS])
def test_a_transcript_that_does_not_begin_with_the_prompt_is_what_a_model_wrote(prompt: Any, tmp_path: Path) -> None:
    written = "Human: no\n\nAssistant: yes"
    row = {"prompt": prompt, "chosen": "Four.", "rejected": written}
    [record] = read_preferences(write(tmp_path / "p.jsonl", row))
    assert (record.prompt[-1].content, record.response_a, record.response_b) == (ASKED, "Four.", written)


# --- ShareGPT ---------------------------------------------------------------------------------------------------------


def said(who: str, text: str) -> dict[str, str]:
    return {"from": who, "value": text}


def test_conversations_of_sharegpt(tmp_path: Path) -> None:
    turns = [said("system", "Be brief."), said("human", "Hi"), said("gpt", "Hello"), said("user", ASKED)]
    file = write(tmp_path / "p.jsonl", {"conversations": turns})
    assert read_conversations(file, column="conversations") == [(Message("system", "Be brief."), *READ)]
    file = write(tmp_path / "d.jsonl", {"conversations": [*turns, said("chatgpt", "Four.")]})
    assert next(read_demonstrations(file)).messages[-2:] == (Message("user", ASKED), Message("assistant", "Four."))


def test_a_speaker_that_is_not_known_is_refused(tmp_path: Path) -> None:
    file = write(tmp_path / "d.jsonl", {"conversations": [said("human", "Hi"), said("tool", "x")]})
    with pytest.raises(InputError, match=r"line 1: conversations\[1\].from must be one of human, .*got str 'tool'"):
        list(read_demonstrations(file))
