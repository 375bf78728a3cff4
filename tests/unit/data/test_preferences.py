"""Preference records read: every form in, every mistake told with file and line, what is good given out before it."""

from __future__ import annotations

import itertools
import json
import math
import random
import sys
import tracemalloc
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pydantic import ValidationError

from rlaif_ray.data.preferences import (
    PreferenceRecord,
    check_readable,
    comparison_text,
    human_label,
    read_preferences,
    records_of_rows,
)
from rlaif_ray.errors import InputError, RunError
from rlaif_ray.types import Message

REAL = Path(__file__).parents[4] / "shared" / "data"
JUDGE = {"model": "m", "type": "local", "template": "helpful", "template_hash": "abc"}
OURS = {"id": "x", "prompt": [{"role": "user", "content": "q"}], "response_a": "yes", "response_b": "no", "p_a": 0.75}
PAIR = {"prompt": "q", "response_a": "yes", "response_b": "no", "label": 1}
TRL = {"prompt": "q", "chosen": "yes", "rejected": "no"}


def write_jsonl(file: Path, *rows: object) -> Path:
    file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return file


def read(path: Path | str, **options: Any) -> list[PreferenceRecord]:
    return list(read_preferences(str(path), **options))


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, str]:
    return {"role": "assistant", "content": content}


def without(row: dict[str, Any], *columns: str) -> dict[str, Any]:
    return {key: value for key, value in row.items() if key not in columns}


# --- the schema -----------------------------------------------------------------------------------------------------


def record(**values: Any) -> PreferenceRecord:
    return PreferenceRecord(**{**OURS, **values})


def test_a_record_is_frozen_and_closed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        record().p_a = 0.1  # type: ignore[misc]
    with pytest.raises(ValidationError, match="Extra inputs"):
        record(p_b=0.1)


@pytest.mark.parametrize(("p_a", "prefers", "confidence"), [(0.75, "a", 0.75), (0.2, "b", 0.8), (0.5, "tie", 0.5)])
def test_what_a_label_prefers(p_a: float, prefers: str, confidence: float) -> None:
    assert (record(p_a=p_a).prefers, record(p_a=p_a).confidence) == (prefers, confidence)


def test_no_label_prefers_nothing() -> None:
    failed = record(p_a=None, failed="too_long")
    assert failed.prefers is None and failed.confidence is None


def test_a_failed_record_has_no_label() -> None:
    with pytest.raises(
        ValidationError, match=r"failed must be null where there is a p_a \(got str 'too_long' and 0\.7"
    ):
        record(failed="too_long")


def test_what_people_say() -> None:
    assert human_label(record(p_a=1.0)) == 1.0  # without a judge, p_a is people's
    assert human_label(record(p_a=0.9, judge=JUDGE)) is None
    assert human_label(record(p_a=0.9, judge=JUDGE, human=0.0)) == 0.0
    assert human_label(record(p_a=None)) is None


def test_half_a_surrogate_pair_becomes_a_replacement_character() -> None:
    mended = record(
        prompt=(Message("user", "a\ud83db"),), response_a="\udc00", response_b="\ud83d\ude00", rationales=["x\udfff"]
    )
    assert mended.prompt[0].content == "a�b" and mended.response_a == "�" and mended.rationales == ("x�",)
    assert mended.response_b == "😀"  # two halves that belong together
    mended.model_dump_json().encode()


def test_the_prompt_as_a_judge_reads_it() -> None:
    several = (Message("system", "be brief"), Message("user", "a"), Message("assistant", "b"), Message("user", "c"))
    assert comparison_text(record()) == "q"
    assert comparison_text(record(prompt=several)) == "User: a\n\nAssistant: b\n\nUser: c"


# --- forms ----------------------------------------------------------------------------------------------------------


def test_our_own_rows(tmp_path: Path) -> None:
    full = {
        **OURS,
        "p_a_forward": 1,
        "p_a_reversed": 0.5,
        "rationales": ["r1", "r2"],
        "principle": "kind",
        "judge": JUDGE,
        "hard": True,
        "answer_mass": 0.25,
        "tokens_in": 7,
        "tokens_out": 2,
        "cost": 0.5,
        "cut": 3,
        "human": 0,
        "source_a": "policy",
        "source_b": None,
        "failed": None,
    }
    assert full.keys() == PreferenceRecord.model_fields.keys()
    [one] = read(write_jsonl(tmp_path / "f.jsonl", full))
    assert one.prompt == (Message("user", "q"),)
    assert one.model_dump(mode="json") == full
    assert isinstance(one.p_a_forward, float) and isinstance(one.human, float)


@pytest.mark.parametrize(
    ("row", "p_a"),
    [
        (PAIR, 1.0),
        ({**PAIR, "label": 0}, 0.0),
        ({**PAIR, "label": 0.3333, "source": "somewhere/1", "annotators": [1, 0, 0]}, 0.3333),
        ({**PAIR, "label": None}, None),
        (without(PAIR, "label"), None),
        (TRL, 1.0),
        ({**TRL, "chosen": [assistant("yes")], "rejected": [assistant("no")], "score_chosen": 7.5}, 1.0),
        ({**TRL, "prompt": [user("q")], "chosen": [assistant("yes")], "rejected": [assistant("no")]}, 1.0),
        ({**TRL, "chosen": [user("q"), assistant("yes")], "rejected": [user("q"), assistant("no")]}, 1.0),
        ({"chosen": [user("q"), assistant("yes")], "rejected": [user("q"), assistant("no")]}, 1.0),
        ({**TRL, "prompt": None, "chosen": [user("q"), assistant("yes")], "rejected": [user("q"), assistant("no")]}, 1),
        ({"chosen": "\n\nHuman: q\n\nAssistant: yes", "rejected": "\n\nHuman: q\n\nAssistant: no"}, 1.0),
    ],
)
@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_forms_of_others(row: dict[str, Any], p_a: float | None, ending: str, tmp_path: Path) -> None:
    file = tmp_path / f"f.{ending}"
    if ending == "jsonl":
        write_jsonl(file, row)
    else:
        pq.write_table(pa.Table.from_pylist([row]), file)
    expected = PreferenceRecord(id="f-1", prompt=(Message("user", "q"),), response_a="yes", response_b="no", p_a=p_a)
    assert read(file) == [expected] == list(records_of_rows([row], "f"))
    assert expected.judge is None and expected.human is None


def test_conversations_of_several_turns(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "s"}, user("a"), assistant("b"), user("c")]
    implicit = {"chosen": [*turns, assistant("good")], "rejected": [*turns, assistant("bad")]}
    start = "\n\nHuman: a\n\nAssistant: b\n\nwith two parts\n\nHuman: c\n\nAssistant:"
    transcript = {"chosen": f"{start} good", "rejected": f"{start} bad"}
    [one] = read(write_jsonl(tmp_path / "m.jsonl", implicit))
    [two] = read(write_jsonl(tmp_path / "t.jsonl", transcript))
    assert [(m.role, m.content) for m in one.prompt] == [(t["role"], t["content"]) for t in turns]
    assert [(m.role, m.content) for m in two.prompt] == [
        ("user", "a"),
        ("assistant", "b\n\nwith two parts"),
        ("user", "c"),
    ]
    assert {(r.response_a, r.response_b) for r in (one, two)} == {("good", "bad")}


def test_ids(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "f.jsonl", PAIR, "", PAIR, "  ", PAIR)
    assert [r.id for r in read(file)] == ["f-1", "f-2", "f-3"]  # rows, not lines
    file = write_jsonl(tmp_path / "g.jsonl", {**PAIR, "id": 7}, {**PAIR, "id": "x"})
    assert [r.id for r in read(file)] == ["7", "x"]


def test_ids_with_equal_hashes_are_two(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlaif_ray.data.preferences.hash", lambda name: 1, raising=False)
    file = write_jsonl(tmp_path / "f.jsonl", *({**PAIR, "id": name} for name in "abca"))
    records = read_preferences(str(file))
    assert [next(records).id for _ in range(3)] == ["a", "b", "c"]
    with pytest.raises(InputError, match=r"line 4: id must be unique \(got 'a', which .*line 1 has too"):
        next(records)


def test_an_unlabelled_record_of_ours_may_leave_columns_out(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "f.jsonl", OURS, {**without(OURS, "p_a"), "id": "y"})
    assert [r.p_a for r in read(file)] == [0.75, None]


def test_limit_and_byte_order_mark_and_windows_lines(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "f.jsonl", PAIR, {**PAIR, "label": 0}, "not JSON")
    file.write_bytes(b"\xef\xbb\xbf" + file.read_bytes().replace(b"\n", b"\r\n"))
    assert [r.p_a for r in read(file, limit=2)] == [1.0, 0.0]


def test_a_last_line_without_an_end_counts(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "f.jsonl", PAIR, PAIR)
    file.write_bytes(file.read_bytes().removesuffix(b"\n"))
    assert len(read(file)) == 2


def test_escaped_text_is_as_it_was(tmp_path: Path) -> None:
    odd = 'tab\t "quote" \u2028 \x00 \x85 \\n naïve 😀'
    file = write_jsonl(tmp_path / "f.jsonl", {**PAIR, "response_a": odd})
    assert read(file)[0].response_a == odd
    file.write_text(json.dumps({**PAIR, "response_a": odd}, ensure_ascii=False))
    assert read(file)[0].response_a == odd


# --- wrong rows -----------------------------------------------------------------------------------------------------

WRONG = {
    # a wrong third row after two of the first kind, and what the message says
    "no response": (PAIR, without(PAIR, "response_b"), "there is no column 'response_b'"),
    "misspelt response": (
        PAIR,
        {**without(PAIR, "response_b"), "respones_b": "no"},
        "no column 'response_b' .*Did you mean respones_b",
    ),
    "response null": (PAIR, {**PAIR, "response_a": None}, r"response_a must be text that is not empty \(got nothing\)"),
    "response empty": (PAIR, {**PAIR, "response_a": ""}, "response_a must be text that is not empty .got str ''"),
    "response blank": (PAIR, {**PAIR, "response_b": " \n"}, "response_b must be text that is not empty"),
    "response a number": (PAIR, {**PAIR, "response_b": 3}, r"response_b must be text .*\(got int 3\)"),
    "label too large": (PAIR, {**PAIR, "label": 1.5}, r"label must be a number from 0 to 1, or null \(got float 1.5\)"),
    "label below 0": (PAIR, {**PAIR, "label": -1}, r"label must be a number from 0 to 1, or null \(got int -1\)"),
    "label a bool": (PAIR, {**PAIR, "label": True}, r"label must be a number .*\(got bool True\)"),
    "label NaN": (PAIR, {**PAIR, "label": math.nan}, r"label must be a number .*\(got float nan\)"),
    "label text": (PAIR, {**PAIR, "label": "1"}, r"label must be a number .*\(got str '1'\)"),
    "no label": (PAIR, without(PAIR, "label"), "there is no column 'label'"),
    "no prompt": (PAIR, without(PAIR, "prompt"), "there is no column 'prompt'"),
    "prompt a number": (PAIR, {**PAIR, "prompt": 3}, "prompt must be text or a list of messages"),
    "prompt empty": (PAIR, {**PAIR, "prompt": ""}, "prompt is empty"),
    "prompt without turns": (PAIR, {**PAIR, "prompt": []}, "prompt is empty"),
    "prompt by the assistant": (PAIR, {**PAIR, "prompt": [assistant("q")]}, "prompt must be from the user"),
    "unknown role": (PAIR, {**PAIR, "prompt": [{"role": "bot", "content": "q"}]}, r"prompt\[0\].role must be one of"),
    "turn without content": (PAIR, {**PAIR, "prompt": [{"role": "user"}]}, r"prompt\[0\].content must be text"),
    "two forms, a TRL row": (PAIR, TRL, "a TRL row, and the rows before are each a labelled pair"),
    "two forms, our row": (PAIR, without(OURS, "id"), "a preference record, and the rows before are each a labelled"),
    "two forms, a pair": (OURS, {**PAIR, "id": "y"}, "a labelled pair, and the rows before are each a preference"),
    "two forms in a row": (PAIR, {**PAIR, **TRL}, "of two forms at once"),
    "label and p_a": (OURS, {**OURS, "id": "y", "label": 1}, "of two forms at once"),
    "no form": (PAIR, {"prompt": "q"}, "there are no responses to compare"),
    "no object": (PAIR, "[1]", r"not a JSON object \(got \[1\]\)"),
    "no JSON": (PAIR, '{"prompt": "q",}', "not a JSON object"),
    "too deep": (PAIR, "[" * 100_000, "the row is nested more than 100 deep"),
    "one id twice": (OURS, OURS, "id must be unique .got 'x-1', which .*line 1 has too"),
    "an id at once": (PAIR, {**PAIR, "id": "x"}, "this row has an id and the first has none"),
    "id missing": (OURS, without(OURS, "id"), "there is no column 'id'"),
    "id empty": (OURS, {**OURS, "id": ""}, "id must be text"),
    "unknown column": (
        OURS,
        {**OURS, "id": "y", "rationale": ["r"]},
        "'rationale' is not a column .*Did you mean rational",
    ),
    "p_a too large": (OURS, {**OURS, "id": "y", "p_a": 2}, r"p_a must be a number from 0 to 1, or null \(got int 2\)"),
    "p_a_forward NaN": (OURS, {**OURS, "id": "y", "p_a_forward": math.nan}, "p_a_forward must be a number"),
    "human text": (OURS, {**OURS, "id": "y", "human": "a"}, "human must be a number"),
    "rationales a text": (OURS, {**OURS, "id": "y", "rationales": "because"}, "rationales must be a list of texts"),
    "rationales of numbers": (
        OURS,
        {**OURS, "id": "y", "rationales": [1]},
        r"rationales .*\(got int 1 at rationales\[0\]",
    ),
    "half a judge": (OURS, {**OURS, "id": "y", "judge": {"model": "m"}}, r"judge must be null, .* at judge\.type\)"),
    "tokens below 0": (OURS, {**OURS, "id": "y", "tokens_in": -1}, "tokens_in must be a whole number, 0 or more"),
    "tokens a fraction": (OURS, {**OURS, "id": "y", "tokens_out": 1.5}, "tokens_out must be a whole number"),
    "cost below 0": (OURS, {**OURS, "id": "y", "cost": -0.1}, "cost must be a number, 0 or more"),
    "hard a number": (OURS, {**OURS, "id": "y", "hard": 1}, "hard must be true or false"),
    "source a number": (OURS, {**OURS, "id": "y", "source_a": 1}, "source_a must be text, or null"),
    "failed and labelled": (OURS, {**OURS, "id": "y", "failed": "x"}, "failed must be null where there is a p_a"),
    "chosen missing": (TRL, without(TRL, "chosen"), "there is no column 'chosen'"),
    "chosen empty": (TRL, {**TRL, "chosen": ""}, "chosen must be text that is not empty"),
    "rejected null": (TRL, {**TRL, "rejected": None}, r"rejected must be text that is not empty \(got nothing\)"),
    "chosen ends wrong": (
        TRL,
        {**TRL, "chosen": [user("a")]},
        "chosen must end with the assistant's message .got user",
    ),
    "chosen without turns": (TRL, {**TRL, "chosen": []}, "chosen must end with the assistant's message .got no mess"),
    "chosen of another prompt": (TRL, {**TRL, "chosen": [user("z"), assistant("a")]}, "must answer the same prompt"),
    "prompts differ": (
        without(TRL, "prompt") | {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        {"chosen": [user("q"), assistant("a")], "rejected": [user("r"), assistant("b")]},
        "two conversations that differ before the last message",
    ),
    "implicit without a prompt": (
        without(TRL, "prompt") | {"chosen": [user("q"), assistant("a")], "rejected": [user("q"), assistant("b")]},
        {"chosen": [assistant("a")], "rejected": [assistant("b")]},
        "must answer the same prompt .got no prompt",
    ),
    "no transcript": (
        {"chosen": "\n\nHuman: q\n\nAssistant: a", "rejected": "\n\nHuman: q\n\nAssistant: b"},
        {"chosen": "the sky is blue", "rejected": "the sky is green"},
        "there is no prompt, and chosen is plain text",
    ),
}


@pytest.mark.parametrize("case", WRONG, ids=str)
def test_a_wrong_row_is_told_and_the_good_ones_before_it_are_given(case: str, tmp_path: Path) -> None:
    good, bad, message = WRONG[case]
    first = {**good, "id": "x-1"} if "id" in good else good
    if case == "one id twice":
        bad = {**bad, "id": "x-1"}
    file = write_jsonl(tmp_path / "f.jsonl", first, "", {**good, "id": "x-2"} if "id" in good else good, bad, good)
    records = read_preferences(str(file))
    assert len([next(records), next(records)]) == 2
    with pytest.raises(InputError, match=message) as told:
        next(records)
    assert str(told.value).startswith(f"{file}, line 4: ")


RIGHT_AS_FIRST = ("one id twice", "an id at once", "id missing", "no label")  # and rows of another form


@pytest.mark.parametrize("case", [c for c in WRONG if c not in RIGHT_AS_FIRST and not c.startswith("two forms, ")])
def test_a_wrong_first_row_is_told_before_engines_start(case: str, tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "f.jsonl", WRONG[case][1])
    with pytest.raises(InputError, match=r"f\.jsonl, line 1: "):
        check_readable(str(file))


def test_a_misspelt_label_is_no_unlabelled_pair(tmp_path: Path) -> None:
    file = write_jsonl(tmp_path / "f.jsonl", {**without(PAIR, "label"), "lable": 1})
    with pytest.raises(InputError, match=r"line 1: there is no column 'label' .*Did you mean lable\?"):
        check_readable(str(file))


def test_a_wrong_row_of_a_parquet_file_is_told_by_its_number(tmp_path: Path) -> None:
    rows = [{**PAIR, "label": value} for value in [1.0] * 300 + [1.5]]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "f.parquet", row_group_size=70)
    records = read_preferences(str(tmp_path / "f.parquet"))
    assert len(list(itertools.islice(records, 300))) == 300
    with pytest.raises(InputError, match=r"f\.parquet, row 301: label must be a number"):
        next(records)


# --- wrong files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("f.jsonl", b"", "'.*f.jsonl' have no rows"),
        ("f.jsonl", b"\n \n", "have no rows"),
        ("f.jsonl", b'{"prompt": "q", "resp', "f.jsonl, line 1: not a JSON object .the line is cut off"),
        (
            "f.jsonl",
            b'{"prompt": "caf\xe9"}\n',
            "line 1: the row has a byte that is not UTF-8 .number 16",
        ),
        ("f.jsonl", '{"prompt": "q"}'.encode("utf-16"), "line 1: the row is UTF-16"),
        ("f.parquet", b"PAR1 nothing", "f.parquet cannot be read as .parquet"),
        ("f.parquet", b"", "f.parquet cannot be read as .parquet"),
        ("f.csv", b"prompt\n", "not read .got .csv.. Give a .jsonl or .parquet"),
        ("f", b"x", "not read .got no file ending"),
    ],
)
def test_wrong_files(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(InputError, match=message):
        read(tmp_path / name)


def test_an_empty_parquet_file(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([PAIR]).slice(0, 0), tmp_path / "f.parquet")
    with pytest.raises(InputError, match="have no rows"):
        check_readable(str(tmp_path / "f.parquet"))


def test_a_parquet_file_that_breaks_off(tmp_path: Path) -> None:
    file = tmp_path / "f.parquet"
    rows = [{**PAIR, "prompt": f"{n}" * 50} for n in range(2000)]
    pq.write_table(pa.Table.from_pylist(rows), file, row_group_size=500, compression="none", use_dictionary=False)
    whole = bytearray(file.read_bytes())
    whole[len(whole) * 3 // 4 : len(whole) * 3 // 4 + 2000] = b"\xff" * 2000
    file.write_bytes(whole)
    got = []
    with pytest.raises(InputError, match=r"f\.parquet"):
        for one in read_preferences(str(file)):
            got.append(one)
    assert len(got) >= 500  # the row groups before it


def test_what_is_wrong_with_the_path_is_told_at_once(tmp_path: Path) -> None:
    write_jsonl(tmp_path / "pairs.jsonl", PAIR)
    with pytest.raises(InputError, match=r"do not exist .*Did you mean pairs\.jsonl"):
        read_preferences(str(tmp_path / "pair.jsonl"))
    with pytest.raises(InputError, match="got a folder"):
        read_preferences(str(tmp_path))
    with pytest.raises(InputError, match="no split 'test'"):
        read_preferences(str(tmp_path / "pairs.jsonl"), split="test")


# --- the hub --------------------------------------------------------------------------------------------------------


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, Any]]:
    """`datasets` with what a test puts into it, and what it was asked for."""
    import datasets

    state: dict[str, Any] = {}

    def load_dataset(name: str, **options: Any) -> Any:
        state["asked"] = (name, options)
        return state["load"]()

    fake = ModuleType("datasets")
    fake.load_dataset = load_dataset  # type: ignore[attr-defined]
    fake.config = datasets.config  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", fake)
    yield state


@pytest.mark.parametrize("offline", [True, False])
def test_a_hub_id_is_streamed_when_there_is_a_network(
    offline: bool, hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", offline)
    hub["load"] = lambda: [PAIR, {**PAIR, "label": 0}]
    records = read("me/pairs@v2", split="test")
    assert [(r.id, r.p_a) for r in records] == [("pairs-1", 1.0), ("pairs-2", 0.0)]
    assert hub["asked"] == ("me/pairs", {"split": "test", "revision": "v2", "streaming": not offline})


def test_a_hub_id_that_is_not_there(hub: dict[str, Any]) -> None:
    def load() -> None:
        raise ConnectionError("no\nroute")

    hub["load"] = load
    with pytest.raises(InputError, match=r"'me/pairs' are neither a file here .*\(got: no route\)"):
        check_readable("me/pairs")


def test_a_wrong_row_of_the_hub(hub: dict[str, Any]) -> None:
    hub["load"] = lambda: [PAIR, {**PAIR, "label": 3}]
    with pytest.raises(InputError, match=r"me/pairs \(train\), row 2: label must be"):
        read("me/pairs")


def test_a_hub_that_breaks_off(hub: dict[str, Any]) -> None:
    def rows() -> Iterator[dict[str, Any]]:
        yield PAIR
        raise OSError("connection reset")

    hub["load"] = rows
    records = read_preferences("me/pairs")
    next(records)
    with pytest.raises(RunError, match="broke off after row 1"):
        next(records)


# --- size -----------------------------------------------------------------------------------------------------------


def peak_of(path: Path) -> tuple[int, int]:
    """Rows, and the most memory that Python held while they were read."""
    tracemalloc.start()
    try:
        rows = sum(1 for _ in read_preferences(str(path)))
        return rows, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("ending", ["jsonl", "parquet"])
def test_memory_does_not_grow_with_the_rows(ending: str, tmp_path: Path) -> None:
    def rows(count: int) -> Iterator[dict[str, Any]]:
        for n in range(count):
            yield {
                "prompt": f"question {n} " * 20,
                "response_a": f"{n} yes " * 20,
                "response_b": "no " * 50,
                "label": 1,
            }

    peaks = []
    for count in (2_000, 12_000):  # 7 MB more
        file = tmp_path / f"{count}.{ending}"
        if ending == "jsonl":
            with file.open("w") as lines:
                lines.writelines(json.dumps(row) + "\n" for row in rows(count))
        else:
            pq.write_table(pa.Table.from_pylist(list(rows(count))), file)
        read_count, peak = peak_of(file)
        assert read_count == count
        peaks.append(peak)
    assert peaks[1] < peaks[0] + 500_000 and peaks[1] < 5_000_000


def test_a_parquet_file_is_not_held_in_arrow_memory(tmp_path: Path) -> None:
    rows = [{**PAIR, "prompt": random.Random(n).randbytes(1500).hex()} for n in range(10_000)]  # 30 MB
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "f.parquet", row_group_size=500)
    del rows
    before, most = pa.total_allocated_bytes(), 0
    for _ in read_preferences(str(tmp_path / "f.parquet")):
        most = max(most, pa.total_allocated_bytes() - before)
    assert 0 < most < 8_000_000


def test_ids_cost_their_hashes_only(tmp_path: Path) -> None:
    file = tmp_path / "f.jsonl"
    with file.open("w") as lines:
        lines.writelines(json.dumps({**PAIR, "id": f"{n}" + "-long" * 100}) + "\n" for n in range(12_000))
    assert peak_of(file)[1] < 3_000_000  # 6 MB of ids


# --- people's labels ------------------------------------------------------------------------------------------------


@pytest.mark.realdata
@pytest.mark.skipif(not REAL.is_dir(), reason=f"no {REAL}")
@pytest.mark.parametrize(
    ("name", "a", "b", "tie"),
    [
        ("instruct_llmbar", 206, 213, 0),
        ("helpful_pandalm", 381, 426, 64),
        ("helpful_qa_feedback", 151, 149, 0),
        ("harmless_hh_pairs", 251, 249, 0),
    ],
)
def test_real_pairs_count_as_their_table_says(name: str, a: int, b: int, tie: int) -> None:
    records = read(REAL / f"{name}.jsonl")
    assert Counter(r.prefers for r in records) == Counter(a=a, b=b, tie=tie)
    assert all(r.judge is None and human_label(r) == r.p_a for r in records)
    assert len({r.id for r in records}) == a + b + tie
