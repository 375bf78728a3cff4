"""Records on their way out and back: TRL rows, `datasets`, the hub, sheets that people check, Argilla."""

from __future__ import annotations

import csv
import json
import pickle
import re
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlaif_ray.data.exports import (
    Review,
    check_hub,
    from_argilla,
    from_dataset,
    merge_review,
    pull_from_argilla,
    push_to_argilla,
    push_to_hub,
    sample_for_review,
    to_argilla,
    to_dataset,
    trl_row,
    write_trl,
)
from rlaif_ray.data.preferences import PreferenceRecord, human_label, read_preferences
from rlaif_ray.data.record_files import write_records
from rlaif_ray.errors import InputError
from tests.unit.data.records import JUDGE, record, records

some_records = st.lists(records(), min_size=1, max_size=4, unique_by=lambda one: one.id)


def read(path: Path) -> list[PreferenceRecord]:
    return list(read_preferences(str(path)))


# --- TRL ------------------------------------------------------------------------------------------------------------


def test_trl_rows_by_hand() -> None:
    prompt = [{"role": "user", "content": "question r"}]
    first = [{"role": "assistant", "content": "first r"}]
    second = [{"role": "assistant", "content": "second r"}]
    assert trl_row(record(p_a=0.51)) == {"prompt": prompt, "chosen": first, "rejected": second}
    assert trl_row(record(p_a=0.49)) == {"prompt": prompt, "chosen": second, "rejected": first}
    assert trl_row(record(p_a=0.5)) is None
    assert trl_row(record(p_a=None)) is None
    assert trl_row(record(p_a=None, failed="too_long")) is None


@given(records())
@settings(max_examples=50, deadline=None)
def test_swapping_the_responses_swaps_nothing_for_trl(one: PreferenceRecord) -> None:
    p_a = None if one.p_a is None else 1 - one.p_a
    swapped = one.model_copy(update={"response_a": one.response_b, "response_b": one.response_a, "p_a": p_a})
    if p_a is None or 1 - p_a == one.p_a:  # not where rounding makes a tie
        assert trl_row(swapped) == trl_row(one)


def test_trl_files_count_what_is_left_out_and_are_read_back(tmp_path: Path) -> None:
    given_records = [record(f"r{n}", p_a=p_a) for n, p_a in enumerate([0.9, 0.1, 0.5, None])]
    write_records([*given_records, record("r4", p_a=None, failed="unparsed")], tmp_path / "f.jsonl")
    assert write_trl(tmp_path / "f.jsonl", tmp_path / "trl.jsonl") == (2, 3)
    back = read(tmp_path / "trl.jsonl")
    assert [(r.response_a, r.response_b, r.p_a) for r in back] == [
        ("first r0", "second r0", 1.0),
        ("second r1", "first r1", 1.0),
    ]
    assert [r.prompt for r in back] == [r.prompt for r in given_records[:2]]


def test_trl_rows_are_what_trl_reads(tmp_path: Path) -> None:
    # TRL takes a row for a conversation when these columns hold lists of role and content.
    import datasets

    write_records([record()], tmp_path / "f.jsonl")
    write_trl(tmp_path / "f.jsonl", tmp_path / "trl.jsonl")
    features = datasets.Dataset.from_list([json.loads((tmp_path / "trl.jsonl").read_text())]).features
    text = datasets.Value("string")
    assert features == dict.fromkeys(("prompt", "chosen", "rejected"), datasets.List({"content": text, "role": text}))


# --- datasets and the hub -------------------------------------------------------------------------------------------


@given(some_records)
@settings(max_examples=30, deadline=None)
def test_a_data_set_and_back(given_records: list[PreferenceRecord]) -> None:
    data = to_dataset(given_records)
    assert data.column_names == list(PreferenceRecord.model_fields)
    assert list(from_dataset(data)) == given_records


def test_a_data_set_streams_and_cleans_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    under_way = 0

    def counted() -> Iterator[PreferenceRecord]:
        nonlocal under_way
        for n in range(2_500):
            under_way = n
            yield record(f"r{n}")

    data = to_dataset(counted())
    assert len(data) == 2_500 and under_way == 2_499
    assert data[2_001]["id"] == "r2001" and len(list(tmp_path.iterdir())) == 1
    assert [r.id for r in from_dataset(data.select([7, 3]))] == ["r7", "r3"]
    assert pickle.loads(pickle.dumps(data))[5]["id"] == "r5"
    del data
    assert list(tmp_path.iterdir()) == []


def test_records_that_break_off_leave_no_data_set(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))

    def broken() -> Iterator[PreferenceRecord]:
        yield record()
        raise InputError("row 2 is wrong")

    with pytest.raises(InputError, match="row 2"):
        to_dataset(broken())
    assert list(tmp_path.iterdir()) == []


def test_wrong_rows_of_a_data_set() -> None:
    with pytest.raises(InputError, match=r"dataset, row 1: there are no responses"):
        list(from_dataset([{"text": "x"}]))


def test_the_hub_is_refused_beforehand(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"push_to_hub must be owner/name \(got 'labels'\)"):
        check_hub("labels")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(InputError, match="HF_HUB_OFFLINE=1"):
        push_to_hub(tmp_path / "f.jsonl", "me/labels")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: None)
    with pytest.raises(InputError, match=r"needs a token \(got none\). Set HF_TOKEN"):
        push_to_hub(tmp_path / "f.jsonl", "me/labels")


def test_pushing_to_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pushed: list[Any] = []

    def push(data: Any, repo: str, **options: Any) -> None:
        pushed.append((list(from_dataset(data)), repo, options))
        if len(pushed) > 1:
            raise OSError("403 Forbidden:\nno write access")

    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.get_token", lambda: "token")
    monkeypatch.setattr("datasets.Dataset.push_to_hub", push)
    write_records([record("a"), record("b")], tmp_path / "f.parquet")
    push_to_hub(tmp_path / "f.parquet", "me/labels")
    assert pushed == [([record("a"), record("b")], "me/labels", {"private": True})]
    with pytest.raises(
        InputError, match=r"failed \(got: 403 Forbidden: no write access\). The records stay in .*f\.par"
    ):
        push_to_hub(tmp_path / "f.parquet", "me/labels")


# --- sheets ---------------------------------------------------------------------------------------------------------


def sheet_rows(path: Path) -> list[dict[str, str]]:
    with path.open(encoding="utf-8-sig", newline="") as file:
        return list(csv.DictReader(file))


def fill_in(path: Path, answers: dict[str, str], **form: Any) -> None:
    """What a person and a spreadsheet make of a sheet."""
    rows = sheet_rows(path)
    for row in rows:
        row["human"] = answers.get(row["id"], "")
    with path.open("w", encoding=form.pop("encoding", "utf-8"), newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), **form)
        writer.writeheader()
        writer.writerows(rows)


@pytest.fixture
def labels(tmp_path: Path) -> Path:
    """40 sure labels, 30 leaning, 20 unsure; 5 failures and 5 labels of people among them."""
    found = [record(f"sure-{n}", p_a=0.02) for n in range(40)]
    found += [record(f"leaning-{n}", p_a=0.75) for n in range(30)]
    found += [record(f"unsure-{n}", p_a=0.55) for n in range(20)]
    found += [record(f"failed-{n}", p_a=None, failed="too_long") for n in range(5)]
    found += [record(f"people-{n}", p_a=1.0, judge=None) for n in range(5)]
    write_records(found, tmp_path / "labels.jsonl")
    return tmp_path / "labels.jsonl"


@pytest.mark.parametrize(
    ("n", "shares"),
    [
        (30, (10, 10, 10)),  # unsure, leaning, sure
        (4, (2, 1, 1)),
        (1, (1, 0, 0)),
        (72, (20, 26, 26)),
        (500, (20, 30, 40)),  # all
    ],
)
def test_a_sample_has_unsure_leaning_and_sure_labels(
    n: int, shares: tuple[int, int, int], labels: Path, tmp_path: Path
) -> None:
    assert sample_for_review(labels, n, 3, tmp_path / "r.csv") == sum(shares)
    rows = sheet_rows(tmp_path / "r.csv")
    kinds = Counter(row["id"].partition("-")[0] for row in rows)
    assert tuple(kinds[kind] for kind in ("unsure", "leaning", "sure")) == shares
    assert kinds.total() == sum(shares) == len({row["id"] for row in rows})  # neither failures nor people's labels


def test_a_sample_follows_from_its_seed(labels: Path, tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        sample_for_review(labels, 15, seed, tmp_path / f"{name}.csv")
    first, again, other = ((tmp_path / f"{name}.csv").read_bytes() for name in "abc")
    assert first == again != other


def test_every_label_of_a_stratum_is_as_likely(labels: Path, tmp_path: Path) -> None:
    # 200 draws of 3: one of the 20 unsure ones each time, so each is drawn 10 times on average, variance 9.5.
    drawn: Counter[str] = Counter()
    for seed in range(200):
        sample_for_review(labels, 3, seed, tmp_path / "r.csv")
        drawn.update(row["id"] for row in sheet_rows(tmp_path / "r.csv"))
    counts = [drawn[f"unsure-{n}"] for n in range(20)]
    assert sum(counts) == 200
    assert sum((count - 10) ** 2 / 10 for count in counts) < 43.8  # chi-squared, 19 degrees, 99.9%


def test_a_sheet_shows_the_judges_label_last(labels: Path, tmp_path: Path) -> None:
    sample_for_review(labels, 90, 0, tmp_path / "r.csv")
    rows = sheet_rows(tmp_path / "r.csv")
    assert list(rows[0]) == ["id", "prompt", "response_a", "response_b", "human", "note", "judge_prefers"]
    by_id = {row["id"]: row for row in rows}
    assert by_id["sure-3"] == {
        "id": "sure-3",
        "prompt": "question sure-3",
        "response_a": "first sure-3",
        "response_b": "second sure-3",
        "human": "",
        "note": "",
        "judge_prefers": "b (0.98)",
    }
    assert [row["id"].partition("-")[0] for row in rows[:9]] != ["unsure", "leaning", "sure"] * 3  # in no order


ODD_IDS = ["=1+1", "'=x", "''", "@a", "-1", "+2", "\tx", "plain", "a,b;c", 'say "x"', "two\nlines", "＝1", "naïve 😀"]


@pytest.mark.parametrize(
    "form", [{}, {"delimiter": ";"}, {"delimiter": "\t"}, {"encoding": "utf-8-sig"}, {"quoting": 1}]
)
def test_nothing_in_a_sheet_is_a_formula_and_every_row_is_found_again(form: dict[str, Any], tmp_path: Path) -> None:
    formula = '=HYPERLINK("http://x";"y")'
    found = [record(name, response_a=formula, response_b="x" * 200_000) for name in ODD_IDS]
    write_records(found, tmp_path / "f.jsonl")
    limit = csv.field_size_limit()
    assert sample_for_review(tmp_path / "f.jsonl", 99, 0, tmp_path / "r.csv") == len(ODD_IDS)
    try:
        csv.field_size_limit(2**30)
        rows = sheet_rows(tmp_path / "r.csv")
        assert all(not cell.startswith(tuple("=+-@\t＝")) for row in rows for cell in row.values())
        assert {row["response_a"] for row in rows} == {f"'{formula}"}
        fill_in(tmp_path / "r.csv", {row["id"]: "a" for row in rows}, **form)
    finally:
        csv.field_size_limit(limit)
    review = merge_review(tmp_path / "f.jsonl", tmp_path / "r.csv", tmp_path / "out.jsonl")
    assert review == Review(rows=13, checked=13, decided=13, agreed=13, agreement=1.0)
    assert csv.field_size_limit() == limit
    assert [one.response_a for one in read(tmp_path / "out.jsonl")] == [formula] * 13


@pytest.mark.parametrize(
    "cell",
    [
        "a;=1+1",
        "a\t=1+1",
        "a; \t@SUM(1)",
        "a;+cmd|' /C calc'!A0",
        'a;-HYPERLINK("http://x")',
        "a\n=1+1",
        "a\r\n- 2+cmd|'/C calc'!A0",
        " =1+1",
        "＝1;＋1",
    ],
)
def test_no_separator_begins_a_formula(cell: str, tmp_path: Path) -> None:
    """Not even where a spreadsheet takes ; or tabs for what separates, or knows nothing of quotes."""
    write_records([record(cell, response_a=cell, response_b=f"{cell}!")], tmp_path / "f.jsonl")
    sample_for_review(tmp_path / "f.jsonl", 9, 0, tmp_path / "r.csv")
    text = (tmp_path / "r.csv").read_bytes().decode("utf-8-sig")
    pieces = [piece.strip('" ') for separator in ";\t," for piece in re.split(rf"[{separator}\r\n]", text)]
    assert [piece for piece in pieces if piece.startswith(tuple("=+-@＝＋"))] == []
    fill_in(tmp_path / "r.csv", {sheet_rows(tmp_path / "r.csv")[0]["id"]: "a"}, delimiter=";")
    assert merge_review(tmp_path / "f.jsonl", tmp_path / "r.csv", tmp_path / "out.jsonl").checked == 1
    (merged,) = read(tmp_path / "out.jsonl")
    assert (merged.id, merged.response_a) == (cell, cell)


def test_lists_and_quotes_in_a_cell_stay_as_they_are(tmp_path: Path) -> None:
    text = "First;\n- one\n- two, and 'three'\n* 2 = 2; it's 5 - 3"
    write_records([record("r", response_a=text)], tmp_path / "f.jsonl")
    sample_for_review(tmp_path / "f.jsonl", 9, 0, tmp_path / "r.csv")
    assert sheet_rows(tmp_path / "r.csv")[0]["response_a"] == text


def test_a_checked_row_becomes_peoples_label(tmp_path: Path) -> None:
    evidence = {"p_a_forward": 0.7, "p_a_reversed": 0.8, "rationales": ("r",), "principle": "p", "tokens_in": 9}
    found = [record(f"r{n}", p_a=p_a, **evidence) for n, p_a in enumerate([0.75, 0.75, 0.25, 0.5, 0.75])]
    write_records(found, tmp_path / "f.jsonl")
    sample_for_review(tmp_path / "f.jsonl", 9, 0, tmp_path / "r.csv")
    fill_in(tmp_path / "r.csv", {"r0": "a", "r1": " B ", "r2": "tie", "r3": "a"})
    review = merge_review(tmp_path / "f.jsonl", tmp_path / "r.csv", tmp_path / "out.parquet")
    # r2 is a tie of people and not counted; r3 one of the judge: it does not prefer a
    assert review == Review(
        rows=5, checked=4, decided=3, agreed=1, agreement=pytest.approx(4 / 5 * 1 / 2 + 1 / 5 * 0 / 1)
    )
    out = read(tmp_path / "out.parquet")
    assert [(one.p_a, one.human, one.judge) for one in out] == [
        (1.0, 1.0, None),
        (0.0, 0.0, None),
        (0.5, 0.5, None),
        (1.0, 1.0, None),
        (0.75, None, JUDGE),
    ]
    assert [human_label(one) for one in out] == [1.0, 0.0, 0.5, 1.0, None]
    assert all(getattr(one, name) == value for one in out for name, value in evidence.items())
    assert out[4] == found[4] and read(tmp_path / "f.jsonl") == found


def test_agreement_is_weighted_back_to_the_data(labels: Path, tmp_path: Path) -> None:
    # Of 2 unsure ones people share 1, of 2 leaning ones 1, of 2 sure ones 2: (20/2 + 30/2 + 40) / 90.
    sample_for_review(labels, 6, 0, tmp_path / "r.csv")
    answers: dict[str, str] = {}
    for row in sheet_rows(tmp_path / "r.csv"):
        kind = row["id"].partition("-")[0]
        again = any(name.startswith(kind) for name in answers)
        answers[row["id"]] = "b" if kind == "sure" or again else "a"
    fill_in(tmp_path / "r.csv", answers)
    review = merge_review(labels, tmp_path / "r.csv", tmp_path / "out.jsonl")
    assert (review.decided, review.agreed) == (6, 4)
    assert review.agreement == pytest.approx((10 + 15 + 40) / 90)


def test_a_sheet_without_answers_changes_nothing(labels: Path, tmp_path: Path) -> None:
    sample_for_review(labels, 6, 0, tmp_path / "r.csv")
    assert merge_review(labels, tmp_path / "r.csv", tmp_path / "out.jsonl") == Review(6, 0, 0, 0, None)
    assert (tmp_path / "out.jsonl").read_bytes() == labels.read_bytes()


def test_a_failed_record_can_be_answered(labels: Path, tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_text("id,human\nfailed-1,b\n\npeople-2,tie\n")
    assert merge_review(labels, tmp_path / "r.csv", tmp_path / "out.jsonl") == Review(2, 2, 0, 0, None)
    out = {one.id: one for one in read(tmp_path / "out.jsonl")}
    assert (out["failed-1"].p_a, out["failed-1"].failed) == (0.0, None) and out["people-2"].p_a == 0.5


@pytest.mark.parametrize(
    ("sheet", "message"),
    [
        (b"id,human\nsure-1,a\nsure-2,c\n", r"r\.csv, line 3 \(row 3\): human must be a, b or tie.*got 'c'"),
        (b'id,note,human\nsure-1,"two\nlines",a\nsure-2,,0.5\n', r"line 4 \(row 3\): human must be .*got '0\.5'"),
        (b"id,human\nsure-1,a\nsure-99,a\n", r"line 3 \(row 3\): no record of .*labels\.jsonl has this id .*'sure-99'"),
        (b"id,human\n,a\n", r"line 2 \(row 2\): no record .*\(got ''\)"),
        (b"id,human\nsure-1,a\nsure-1,b\n", r"line 3 \(row 3\): id must be unique .*as in .*line 2"),
        (b"id,humn\nsure-1,a\n", r"line 1: there is no column 'human' .*Did you mean humn\?"),
        (b"prompt,human\nq,a\n", r"line 1: there is no column 'id'"),
        (b"", r"line 1: there is no column 'id' .*none"),
        (b"id,human\ncaf\xe9,a\n", "is not UTF-8 .got byte 0xe9"),
        (b'id,human\n"sure-1,a\n', "can't be read as CSV"),
    ],
)
def test_wrong_sheets(sheet: bytes, message: str, labels: Path, tmp_path: Path) -> None:
    (tmp_path / "r.csv").write_bytes(sheet)
    with pytest.raises(InputError, match=message):
        merge_review(labels, tmp_path / "r.csv", tmp_path / "out.jsonl")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["labels.jsonl", "r.csv"]


def test_a_missing_sheet(labels: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"none\.csv can't be read"):
        merge_review(labels, tmp_path / "none.csv", tmp_path / "out.jsonl")


def test_answers_are_not_overwritten(labels: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "r.csv"
    sample_for_review(labels, 6, 0, sheet)
    sample_for_review(labels, 9, 1, sheet)  # nobody has written in it
    fill_in(sheet, {sheet_rows(sheet)[0]["id"]: "a"})
    before = sheet.read_bytes()
    with pytest.raises(InputError, match=r"r\.csv has answers in it \(got 1\)"):
        sample_for_review(labels, 6, 0, sheet)
    assert sheet.read_bytes() == before
    with pytest.raises(InputError, match="is not a sheet written by this command"):
        sample_for_review(labels, 6, 0, labels)


def test_nothing_to_review(tmp_path: Path) -> None:
    write_records([record("a", p_a=None), record("b", judge=None)], tmp_path / "f.jsonl")
    with pytest.raises(InputError, match="has no AI labels to review"):
        sample_for_review(tmp_path / "f.jsonl", 5, 0, tmp_path / "r.csv")
    with pytest.raises(InputError, match="can't be written"):
        write_records([record()], tmp_path / "g.jsonl")
        sample_for_review(tmp_path / "g.jsonl", 5, 0, tmp_path / "none" / "r.csv")


# --- Argilla --------------------------------------------------------------------------------------------------------


@given(some_records)
@settings(max_examples=50, deadline=None)
def test_argilla_rows_and_back(given_records: list[PreferenceRecord]) -> None:
    rows = json.loads(json.dumps(list(to_argilla(given_records))))  # as they come over the wire
    assert list(from_argilla(rows)) == given_records


def test_an_argilla_row_by_hand() -> None:
    [row] = to_argilla([record(p_a=0.25, judge={**JUDGE, "model": "C:\\judge (new)"})])
    assert row["fields"] == {
        "prompt": "question r",
        "response_a": "first r",
        "response_b": "second r",
    }
    assert row["suggestions"] == {"preference": {"value": "b", "score": 0.75, "agent": "C:_judge _new_"}}
    assert row["id"] == "r" and row["metadata"]["confidence"] == 0.75 and row["responses"] == {}
    [unlabelled] = to_argilla([record(p_a=None)])
    assert unlabelled["suggestions"] == {} and "confidence" not in unlabelled["metadata"]


@pytest.mark.parametrize(("said", "p_a"), [(["a"], 1.0), (["b"], 0.0), (["tie"], 0.5), (["a", "a", "b", "tie"], 0.625)])
def test_answers_in_argilla_are_peoples_labels(said: list[str], p_a: float) -> None:
    [row] = to_argilla([record(p_a=0.9, p_a_forward=0.95)])
    row["responses"] = {"preference": [{"value": value, "user_id": str(n)} for n, value in enumerate(said)]}
    [back] = from_argilla([row])
    assert (back.p_a, back.human, back.judge, back.p_a_forward) == (p_a, p_a, None, 0.95)


@pytest.mark.parametrize(
    "change",
    [{"metadata": {}}, {"fields": {"text": "x"}}, {"responses": {"preference": [{"value": "c"}]}}, {"id": None}],
)
def test_foreign_argilla_rows(change: dict[str, Any]) -> None:
    [row] = to_argilla([record()])
    with pytest.raises(InputError, match="was not pushed from here"):
        list(from_argilla([{**row, **change}]))


@dataclass
class FakeResponse:
    question_name: str
    value: str
    status: str


@dataclass
class FakeRecord:
    row: dict[str, Any]
    responses: list[FakeResponse] = field(default_factory=list)

    @classmethod
    def from_dict(cls, row: dict[str, Any]) -> FakeRecord:
        return cls(json.loads(json.dumps(row)))

    def to_dict(self) -> dict[str, Any]:
        # Argilla lists drafts too, and does not say that they are.
        said = [{"value": response.value, "user_id": "u"} for response in self.responses]
        return {**self.row, "responses": {"preference": said} if said else {}, "status": "pending", "vectors": {}}


class FakeRecords(dict[str, FakeRecord]):
    def log(self, found: list[FakeRecord]) -> None:
        assert len(found) <= 1000  # the server's limit
        self.update({one.row["id"]: one for one in found})

    def __call__(self, *, with_responses: bool) -> Iterator[FakeRecord]:
        assert with_responses
        return iter(self.values())


@dataclass
class FakeArgilla:
    """A server, as far as it is used here."""

    kept: dict[str, Any] = field(default_factory=dict)

    def datasets(self, name: str, workspace: str | None = None) -> Any:
        return self.kept.get(name)


@dataclass
class FakeDataset:
    name: str
    workspace: str | None
    settings: Any
    client: FakeArgilla
    records: FakeRecords = field(default_factory=FakeRecords)

    def create(self) -> FakeDataset:
        assert self.name not in self.client.kept
        self.client.kept[self.name] = self
        return self


@pytest.fixture
def argilla(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    fake = ModuleType("argilla")
    for name in ("TextField", "LabelQuestion", "FloatMetadataProperty", "Settings"):
        setattr(fake, name, lambda **options: options)
    fake.Record, fake.Dataset = FakeRecord, FakeDataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "argilla", fake)
    return fake


def test_a_round_through_argilla(argilla: ModuleType, tmp_path: Path) -> None:
    server, found = FakeArgilla(), [record(f"r{n}", p_a=0.75) for n in range(600)]
    write_records(found, tmp_path / "f.jsonl")
    for _ in range(2):  # the second time they are there already
        assert push_to_argilla(tmp_path / "f.jsonl", "labels", client=server) == 600
    kept = server.kept["labels"]
    assert len(kept.records) == 600
    assert [question["labels"] for question in kept.settings["questions"]] == [["a", "b", "tie"]]
    assert {one["name"] for one in kept.settings["fields"]} == kept.records["r0"].row["fields"].keys()
    kept.records["r3"].responses = [
        FakeResponse("preference", "b", "submitted"),
        FakeResponse("preference", "a", "discarded"),
        FakeResponse("other", "a", "submitted"),
    ]
    kept.records["r4"].responses = [FakeResponse("preference", "b", "draft")]
    assert pull_from_argilla("labels", tmp_path / "out.parquet", client=server) == 600
    out = read(tmp_path / "out.parquet")
    assert (out[3].p_a, out[3].human, out[3].judge) == (0.0, 0.0, None)
    assert [*out[:3], *out[4:]] == [*found[:3], *found[4:]]


def test_argilla_that_can_not_be_used(argilla: ModuleType, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"has no data set 'labels' \(workspace default\)"):
        pull_from_argilla("labels", tmp_path / "out.jsonl", client=FakeArgilla())

    def refused() -> None:
        raise ConnectionError("refused")

    argilla.Argilla = refused  # type: ignore[attr-defined]
    for call in (push_to_argilla, pull_from_argilla):
        with pytest.raises(InputError, match=r"\(got: refused\). Set ARGILLA_API_URL and ARGILLA_API_KEY"):
            call(*((tmp_path / "f", "labels") if call is push_to_argilla else ("labels", tmp_path / "f")))  # type: ignore[arg-type]
    monkeypatch.setitem(sys.modules, "argilla", None)
    with pytest.raises(InputError, match="pip install argilla"):
        push_to_argilla(tmp_path / "f.jsonl", "labels")
    assert list(tmp_path.iterdir()) == []
