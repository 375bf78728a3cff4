"""Answers are asked for once: over batches, threads and processes."""

from __future__ import annotations

import multiprocessing
import os
import signal
import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlaif_ray.errors import InputError
from rlaif_ray.feedback.remembered import Memory, RememberingAsker
from rlaif_ray.interfaces import GenerationSettings
from rlaif_ray.types import Explanation, Message, Question
from tests.asker import FakeAsker
from tests.pace import scaled

GREEDY = GenerationSettings(samples_per_prompt=2, max_new_tokens=8, temperature=0.0, seed=0)


def question(text: str, prefix: str = "") -> Question:
    return Question((Message("user", text),), prefix, ("1", "2"))


def test_the_same_question_is_asked_once(tmp_path: Path) -> None:
    fake = FakeAsker(lambda q: len(q.turns[0].content) / 10)
    asker = RememberingAsker(fake, Memory(tmp_path / "m.sqlite"))
    texts = ["a", "bb", "a", "ccc", "a"]
    first = dict(asker.answer([question(t) for t in texts]))
    assert [first[i].probabilities[0] for i in range(5)] == [0.1, 0.2, 0.1, 0.3, 0.1]
    again = dict(asker.answer([question(t) for t in [*texts, "dddd"]]))
    assert [again[i] for i in range(5)] == [first[i] for i in range(5)]
    assert Counter(q.turns[0].content for q in fake.asked) == Counter(["a", "bb", "ccc", "dddd"])
    assert (asker.asked, asker.recalled) == (4, 7)


def test_what_differs_is_another_question(tmp_path: Path) -> None:
    fake = FakeAsker()
    asker = RememberingAsker(fake, Memory(tmp_path / "m.sqlite"))
    list(asker.answer([question("a"), question("a", prefix="Answer: "), Question(question("a").turns, "", ("A", "B"))]))
    list(asker.explain([question("a")], GREEDY))
    list(asker.explain([question("a")], GenerationSettings(2, 8, 0.5, 0)))
    assert len(fake.asked) == 3 and len(fake.explained) == 2
    other = FakeAsker(name="other")
    list(RememberingAsker(other, Memory(tmp_path / "m.sqlite")).answer([question("a")]))
    assert len(other.asked) == 1  # another judge's answer is not this one's


def test_rationales_are_remembered_too(tmp_path: Path) -> None:
    fake = FakeAsker(explain=lambda q, k: f"ünïcode {k}")
    first = dict(RememberingAsker(fake, Memory(tmp_path / "m.sqlite")).explain([question("a")], GREEDY))
    second = dict(RememberingAsker(fake, Memory(tmp_path / "m.sqlite")).explain([question("a")], GREEDY))
    assert first == second and first[0].texts == ("ünïcode 0", "ünïcode 1") and len(fake.explained) == 1


def test_failures_are_asked_again(tmp_path: Path) -> None:
    broken = FakeAsker(lambda q: "engine_error: gone")
    memory = Memory(tmp_path / "m.sqlite")
    assert dict(RememberingAsker(broken, memory).answer([question("a")]))[0].failure == "engine_error: gone"
    mended = dict(RememberingAsker(FakeAsker(lambda q: 0.7), memory).answer([question("a")]))
    assert mended[0].probabilities[0] == 0.7 and memory.spent() == 0.25


def test_threads_that_ask_the_same_wait_for_one_answer(tmp_path: Path) -> None:
    slow = threading.Event()

    def answer(q: Question) -> float:
        slow.wait(0.05)
        return 0.5

    fake = FakeAsker(answer)
    asker = RememberingAsker(fake, Memory(tmp_path / "m.sqlite"))
    batches = [[question(str((k + i) % 12)) for i in range(8)] for k in range(16)]
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda batch: dict(asker.answer(batch)), batches))
    assert all(len(answers) == 8 for answers in found)
    assert max(Counter(q.turns[0].content for q in fake.asked).values()) == 1


def test_a_failure_elsewhere_is_asked_here(tmp_path: Path) -> None:
    calls = Counter[str]()

    def answer(q: Question) -> float | str:
        text = q.turns[0].content
        calls[text] += 1
        time.sleep(0.05)
        return "engine_error" if calls[text] == 1 else 0.5

    asker = RememberingAsker(FakeAsker(answer), Memory(tmp_path / "m.sqlite"))
    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(lambda _: dict(asker.answer([question("a")]))[0].failure, range(2)))
    assert sorted(map(str, found)) == ["None", "engine_error"] and calls["a"] == 2


def _ask_until_killed(path: Path, told: Path) -> None:
    def answer(q: Question) -> float:
        time.sleep(0.01)
        return 0.5

    asker = RememberingAsker(FakeAsker(answer), Memory(path))
    with told.open("w") as file:
        for i, _ in asker.answer([question(str(k)) for k in range(1000)]):
            file.write(f"{i}\n")
            file.flush()


def test_what_was_answered_before_a_kill_is_not_asked_again(tmp_path: Path) -> None:
    told = tmp_path / "told"
    process = multiprocessing.get_context("spawn").Process(target=_ask_until_killed, args=(tmp_path / "m.sqlite", told))
    process.start()
    deadline = time.monotonic() + scaled(60)
    while time.monotonic() < deadline and (not told.exists() or told.read_text().count("\n") < 20):
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    answered = {int(line) for line in told.read_text().splitlines()}
    assert len(answered) >= 20
    fake = FakeAsker()
    found = dict(RememberingAsker(fake, Memory(tmp_path / "m.sqlite")).answer([question(str(k)) for k in range(1000)]))
    assert len(found) == 1000
    assert not answered & {int(q.turns[0].content) for q in fake.asked}


def test_a_broken_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "m.sqlite"
    path.write_text("this is no database, it is a text that is long enough to be taken for one " * 20)
    with pytest.raises(InputError, match=r"m\.sqlite can't be opened"):
        Memory(path)


def test_half_a_character_is_kept(tmp_path: Path) -> None:
    """Models emit lone surrogates, which no UTF-8 database takes as they are."""
    memory = Memory(tmp_path / "answers.sqlite")
    memory.put(b"1" * 16, Explanation(("smile \ud83d",)))
    assert memory.get(b"1" * 16, Explanation) == Explanation(("smile \ud83d",))
    memory.close()
