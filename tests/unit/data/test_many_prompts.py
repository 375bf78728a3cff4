"""Many prompts: read as a stream, with progress, in little memory, and every wrong row told."""

from __future__ import annotations

import gc
import io
import json
import tracemalloc
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from rlaif_ray.data.columns import ExampleTable, Texts, TokenLists
from rlaif_ray.data.prompt_source import PromptSource
from rlaif_ray.data.prompt_table import Conversations, PromptTable, prompts_digest
from rlaif_ray.data.prompts import load_prompts
from rlaif_ray.errors import InputError
from rlaif_ray.learner.supervised import PairExample
from rlaif_ray.tracking.progress import ItemProgress
from rlaif_ray.types import Message, Prompt
from tests.tiny import make_tokenizer

TOKENIZER = make_tokenizer(None)
OVERHEAD = 120  # bytes a prompt may take beside its text, its id and 4 bytes a token


def load(path: Path, **options: Any) -> PromptTable:
    return load_prompts(str(path), **{"tokenizer": TOKENIZER, "max_prompt_tokens": 10_000, **options}).prompts


def lines(file: Path, rows: Sequence[object]) -> Path:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def many(folder: Path, count: int) -> Path:
    return lines(folder / f"p{count}.jsonl", [{"id": f"q{n:05}", "prompt": f"Say {n:05}."} for n in range(count)])


# ---- Progress --------------------------------------------------------------------------------------------------------


def test_progress_is_shown_while_prompts_are_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("rlaif_ray.data.prompts.SILENT_S", 0.0)
    load(many(tmp_path, 1500))
    shown = capsys.readouterr().out.splitlines()
    assert shown[0].startswith("reading prompts: 256/1,500 prompts  ") and shown[0].endswith(" left")
    assert [line.split("  ")[0] for line in shown[1:]] == [
        "reading prompts: 1,500/1,500 prompts",
        "tokenising prompts: 1,024/1,500 prompts",
        "tokenising prompts: 1,500/1,500 prompts",
    ]


def test_nothing_is_shown_of_what_takes_no_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    load(many(tmp_path, 10))
    assert capsys.readouterr().out == ""


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("after_s", "shown"), [(0.0, True), (60.0, False)])
def test_a_bar_on_a_terminal(after_s: float, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    terminal = Terminal()
    monkeypatch.setattr("sys.stdout", terminal)
    monkeypatch.setenv("TERM", "xterm-256color")
    monkeypatch.setenv("COLUMNS", "200")
    with ItemProgress("reading prompts", 1000, "prompts", after_s=after_s) as progress:
        assert len(list(progress.over(range(600)))) == 600
    assert ("reading prompts" in terminal.getvalue()) == ("600/1,000 prompts" in terminal.getvalue()) == shown


# ---- Memory ----------------------------------------------------------------------------------------------------------


def test_bytes_of_a_prompt_are_bounded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlaif_ray.data.prompts._TOKENISED_AT_A_TIME", 64)
    load(many(tmp_path, 2))  # what is made once
    held, peaks = [], []
    for count in (256, 768):
        file = many(tmp_path, count)
        tracemalloc.start()
        prompts = load(file, system="Answer in one word, and give no reasons.")
        peaks.append(tracemalloc.get_traced_memory()[1])
        gc.collect()  # empties Python's lists of freed objects too, which count as held
        held.append(tracemalloc.get_traced_memory()[0])
        tracemalloc.stop()
    own = len("Say 00000.") + len("q00000") + 4 * len(prompts[0].tokens)
    assert (held[1] - held[0]) / 512 < own + OVERHEAD
    assert (peaks[1] - peaks[0]) / 512 < own + 2 * OVERHEAD  # with what is known of each only while it is read


def test_what_a_checkpoint_holds_does_not_grow() -> None:
    prompts = [Prompt(f"p{n}", (), (n,)) for n in range(5000)]
    few, all_of_them = (PromptSource(part, prompts_per_step=2, seed=0, shuffle=True) for part in (prompts[:5], prompts))
    assert len(json.dumps(all_of_them.state())) - len(json.dumps(few.state())) == len("5000") - len("5")
    assert memoryview(all_of_them.order).nbytes == 4 * 5000


def test_examples_are_made_when_asked_for() -> None:
    made = [PairExample((1, 2), (3,), (4, 5), 0.25), PairExample((1,), (2,) * 9, (70_000,), 1.0)]
    table: ExampleTable[PairExample] = ExampleTable(PairExample, numbers=("p_a",))
    for example in made:
        table.append(example)
    assert list(table) == made and table[-1] == made[1] and table[::2] == made[::2] and table.longest == 10
    with pytest.raises(IndexError):
        table[2]


# ---- The table -------------------------------------------------------------------------------------------------------

TALKS = [
    [Message("system", "Common."), Message("user", "a")],
    [Message("user", "é \ud800 😀")],
    [Message("system", "Own."), Message("user", "b"), Message("assistant", ""), Message("user", "c")],
    [Message("system", "Common."), Message("user", "")],
]


def table_of(talks: Sequence[Sequence[Message]], system: str | None) -> PromptTable:
    conversations, tokens = Conversations(system), TokenLists()
    for number, talk in enumerate(talks):
        conversations.append(f"id {number}", talk)
        tokens.append(range(number))
    return PromptTable(conversations, tokens, range(len(talks)))


@pytest.mark.parametrize("system", ["Common.", None])
def test_conversations_come_back_as_they_were(system: str | None) -> None:
    table = table_of(TALKS, system)
    assert [list(prompt.messages) for prompt in table] == TALKS
    assert [prompt.tokens for prompt in table] == [(), (0,), (0, 1), (0, 1, 2)] and table.longest == 3
    assert [prompt.text for prompt in table] == ["a", "é \ud800 😀", "User: b\n\nAssistant: \n\nUser: c", ""]
    assert list(table.ids) == ["id 0", "id 1", "id 2", "id 3"] and table.ids[-1] == "id 3"
    part = table[1:][::2]
    assert isinstance(part, PromptTable) and [p.id for p in part] == ["id 1", "id 3"] and list(part.rows) == [1, 3]


def test_a_common_system_message_is_kept_once() -> None:
    table = table_of([[Message("system", "x" * 10_000), Message("user", "hi")]] * 3, "x" * 10_000)
    contents: Texts = table._conversations._contents
    assert list(contents) == ["hi"] * 3


def test_one_prompt_of_each_shape() -> None:
    assert [p.id for p in table_of([*TALKS, *TALKS], "Common.").one_of_each_shape()] == ["id 0", "id 1", "id 2", "id 3"]


def test_a_digest_is_that_of_ids_and_tokens() -> None:
    table = table_of(TALKS, None)
    assert prompts_digest(table) == prompts_digest(list(table)) != prompts_digest(table[:3])
    assert prompts_digest(table[:2], table[2:]) != prompts_digest(table)
    joined = [Prompt("a", (), (1,)), Prompt("b", (), (2,))], [Prompt("a", (), (1, 2)), Prompt("b", (), ())]
    assert prompts_digest(joined[0]) != prompts_digest(joined[1])


# ---- Wrong rows ------------------------------------------------------------------------------------------------------


def wrong(path: Path, **options: Any) -> list[str]:
    with pytest.raises(InputError) as caught:
        load(path, **options)
    return str(caught.value).replace(f"{path}, ", "").splitlines()


def test_all_wrong_rows_are_told_at_once(tmp_path: Path) -> None:
    rows = [{"prompt": "a"}, {"prompt": 3}, {"prompt": "b"}, {"prompt": " "}, '{"prompt": "c"', {"prompt": []}]
    found = wrong(lines(tmp_path / "p.jsonl", rows))
    assert [line.partition(":")[0] for line in found] == ["line 2", "line 4", "line 5", "line 6"]
    assert "must be text" in found[0] and "is empty" in found[1] and "not a JSON object" in found[2]


@pytest.mark.parametrize("name", ["p.jsonl", "p.json"])
def test_wrong_rows_do_not_end_the_reading(name: str, tmp_path: Path) -> None:
    rows = ['{"prompt": "a"}', "xx", '{"prompt": "b", "prompt": "c"}', "[1]", '{"prompt": "d", "id": "e"}', "{"]
    found = wrong(lines(tmp_path / name, rows))
    assert [line.partition(" (")[0] for line in found] == [
        "line 2: not a JSON object",
        "line 3: the row has the key 'prompt' twice",
        "line 4: not a JSON object",
        "line 5: this row has an id and the first has none",
        "line 6: not a JSON object",
    ]
    with pytest.raises(InputError, match=r"line 2: [^\n]*$"):
        load(tmp_path / name, limit=2)  # what is wrong counts as a row


def test_wrong_rows_before_the_first_good_one(tmp_path: Path) -> None:
    rows = ["xx", {"text": "a", "id": "q"}, {"text": "b"}]
    found = wrong(lines(tmp_path / "p.jsonl", rows))
    assert [line.partition(" (")[0] for line in found[:1]] == ["line 1: not a JSON object"]
    assert "have no column 'prompt' (its columns: text, id)" in found[1]
    found = wrong(lines(tmp_path / "p.jsonl", ["xx", {"prompt": "a", "id": "q"}, {"prompt": "b"}]))
    assert [line.partition(" (")[0] for line in found] == ["line 1: not a JSON object", "line 3: id must be text"]


def test_wrong_items_of_a_list(tmp_path: Path) -> None:
    (tmp_path / "p.json").write_text('[{"prompt": "a"}, 1, {"prompt": 2}, null]')
    found = wrong(tmp_path / "p.json")
    assert [line.partition(":")[0] for line in found] == ["row 2", "row 3", "row 4"]


def test_very_many_wrong_rows_are_not_all_told(tmp_path: Path) -> None:
    found = wrong(lines(tmp_path / "p.jsonl", [{"prompt": 3}] * 1000))
    assert len(found) == 6 and found[-1] == "and 15 more rows are wrong; reading ended there."


def test_too_long_prompts_and_repeated_ids_are_told_at_once(tmp_path: Path) -> None:
    file = lines(tmp_path / "p.jsonl", [{"prompt": "b" * 50 * (n % 2) + "a"} for n in range(6)])
    found = wrong(file, max_prompt_tokens=40)
    assert [line.partition(":")[0] for line in found] == ["line 2", "line 4", "line 6"]
    file = lines(tmp_path / "p.jsonl", [{"id": n % 2, "prompt": "a"} for n in range(4)])
    assert [line.partition(":")[0] for line in wrong(file)] == ["line 3", "line 4"]
    assert "which line 1 has too" in wrong(file)[0]


def test_a_conversation_that_the_template_refuses_is_found_among_others(tmp_path: Path) -> None:
    tokenizer = make_tokenizer(None)
    refusal = "{% if 'no' in messages[0]['content'] %}{{ raise_exception('refused') }}{% endif %}"
    tokenizer.chat_template = refusal + tokenizer.chat_template
    rows = [{"prompt": text} for text in ("yes", "no", "yes", "no way")]
    found = wrong(lines(tmp_path / "p.jsonl", rows), tokenizer=tokenizer)
    assert [line.partition(":")[0] for line in found] == ["line 2", "line 4"] and "refused" in found[0]


def test_ids_for_all_rows_or_none(tmp_path: Path) -> None:
    [found] = wrong(lines(tmp_path / "p.jsonl", [{"prompt": "a"}, {"id": "x", "prompt": "b"}]))
    assert found.startswith("line 2: this row has an id and the first has none (got str 'x')")


def test_a_column_that_the_first_rows_lack_is_no_missing_column(tmp_path: Path) -> None:
    [found] = wrong(lines(tmp_path / "p.jsonl", [{"question": "a"}, {"prompt": "b"}]))
    assert found.startswith("line 1: prompt must be text or a list of messages (got nothing)")


@pytest.mark.parametrize("name", ["p.jsonl", "p.parquet"])
def test_no_more_is_read_than_the_limit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import rlaif_ray.data.prompts as prompts
    from rlaif_ray.data.messages import Row

    def rows(file: Path, what: str, stem: str, **_: object) -> Iterator[Row]:
        yield from (Row(f"{file}, row {n}", f"{stem}-{n}", {"prompt": "a"}) for n in (1, 2, 3))
        raise AssertionError("read on")

    monkeypatch.setattr(prompts, {"p.jsonl": "json_rows", "p.parquet": "parquet_rows"}[name], rows)
    (tmp_path / name).touch()
    assert len(load(tmp_path / name, limit=3)) == 3
