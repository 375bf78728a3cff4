"""Labels of an endpoint that fails part of the time, and of pairs that are replaced meanwhile: what is final, what is
asked again, and how the command ends."""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlaif_ray.cli import app
from rlaif_ray.config.jobs import LabelJob
from rlaif_ray.data.preferences import PreferenceRecord, read_preferences
from rlaif_ray.errors import FeedbackError
from rlaif_ray.feedback.templates import load_template
from rlaif_ray.pipelines import partial
from rlaif_ray.pipelines.harmless import PROMPTS, Graded, Grader, Response, judge_responses
from rlaif_ray.pipelines.preferences import _enough
from rlaif_ray.types import Message
from tests.endpoint import FakeEndpoint, FaultProxy, Said, one
from tests.jobs import embedded

ENV = "JUDGE_TEST_KEY"


@pytest.fixture(autouse=True)
def _environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(ENV, "sk-test")
    monkeypatch.delenv("OPENAI_BASE_URL", raising=False)
    monkeypatch.setattr("rlaif_ray.feedback.endpoint.FIRST_WAIT_S", 0.01)
    monkeypatch.chdir(tmp_path)
    Path("label.yaml").write_text("{}")


@pytest.fixture
def served() -> Iterator[tuple[FakeEndpoint, FaultProxy]]:
    with FakeEndpoint() as endpoint, FaultProxy(endpoint.url) as proxy:
        yield endpoint, proxy


def write_pairs(count: int, word: str = "answer") -> None:
    rows = [{"id": str(n), "prompt": f"q{n}", "response_a": f"{word} {n}", "response_b": "no"} for n in range(count)]
    Path("pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def label(url: str, *settings: str) -> Any:
    judge = {"type": "openai", "model": "m", "base_url": url, "api_key_env": ENV, "timeout_s": 5, "concurrency": 1}
    words = [f"judge={json.dumps(judge | {'max_retries': 0})}", "data.path=pairs.jsonl", "run_dir=run"]
    return CliRunner().invoke(app, ["label", "label.yaml", *words, "output=labels.jsonl", *settings])


def labels(path: str = "labels.jsonl") -> list[PreferenceRecord]:
    return list(read_preferences(path))


def summary() -> dict[str, Any]:
    found: dict[str, Any] = json.loads(Path("run/summary.json").read_text())
    return found


def test_an_endpoint_that_is_down_half_way_ends_the_command_and_is_asked_again(
    served: tuple[FakeEndpoint, FaultProxy],
) -> None:
    endpoint, proxy = served
    write_pairs(20)
    seen = 0

    def down_after_eight(body: dict[str, Any]) -> float:
        nonlocal seen
        seen += 1
        if seen == 8:
            proxy.inject("503", times=32)
        return 0.0

    endpoint._delay_s = down_after_eight
    result = label(proxy.url)
    assert result.exit_code == 1, result.output
    assert "label.min_labeled_fraction=0.9 of the pairs must be labelled (got 4 of 20; failed: 16 endpoint_error)" in (
        result.stderr
    )
    assert "16 could succeed on another try: start the same command again" in result.stderr
    assert "resume: rlaif label label.yaml" in result.stderr and "would fail in the same way" not in result.stderr
    assert [record.p_a is not None for record in labels()] == [True] * 4 + [False] * 16
    assert summary()["failures"] == {"endpoint_error": 16} and summary()["retryable"] == 16

    asked = len(endpoint.bodies)
    again = next(line for line in result.stderr.splitlines() if "resume:" in line).partition("rlaif ")[2]
    result = CliRunner().invoke(app, shlex.split(again))
    assert result.exit_code == 0, result.output
    assert len(endpoint.bodies) - asked == 32  # nothing that was answered is asked twice
    assert all(record.p_a is not None and record.failed is None for record in labels())
    assert [record.id for record in labels()] == [str(n) for n in range(20)]
    assert summary()["labels"] == 20 and summary()["retryable"] == 0


def test_a_few_that_failed_are_asked_once_more_at_the_end(served: tuple[FakeEndpoint, FaultProxy]) -> None:
    endpoint, proxy = served
    write_pairs(20)
    proxy.inject("503", times=1)
    result = label(proxy.url)
    assert result.exit_code == 0 and "asking again about 1 pairs" in result.output
    assert summary()["labels"] == 20 and len(endpoint.bodies) == 40


def test_what_fails_in_the_same_way_every_time_is_final(served: tuple[FakeEndpoint, FaultProxy]) -> None:
    endpoint, proxy = served
    write_pairs(20)
    proxy.inject("400", times=2, message="the content policy does not allow this")
    assert label(proxy.url).exit_code == 0
    assert summary()["failures"] == {"endpoint_error": 1} and summary()["retryable"] == 0
    asked = len(endpoint.bodies)
    assert label(proxy.url).exit_code == 0 and len(endpoint.bodies) == asked
    result = label(proxy.url, "label.min_labeled_fraction=1")
    assert result.exit_code == 1 and "1 would fail in the same way. too_long: raise" in result.stderr
    assert "could succeed" not in result.stderr


@pytest.mark.parametrize("reason", ["open_thought", "unparsed", "too_long", "low_answer_mass"])
def test_every_failure_that_comes_back_has_a_remedy(reason: str) -> None:
    summary = {"labels": 0, "records": 2, "failures": {reason: 2}, "retryable": 0, "output": "x"}
    with pytest.raises(FeedbackError, match=rf"2 would fail in the same way\. .*{reason}: "):
        _enough(summary, 0.9)


def test_failures_that_may_pass_are_told_where_enough_is_labelled(served: tuple[FakeEndpoint, FaultProxy]) -> None:
    endpoint, _ = served
    write_pairs(20)

    def down_for_one(body: dict[str, Any]) -> Said:
        assert "q3\\n" not in json.dumps(body)  # the endpoint answers 500
        return one(_1=0.7, _2=0.3)

    endpoint._say = down_for_one
    result = label(endpoint.url)
    assert result.exit_code == 0, result.output
    assert "not final" in result.output
    assert summary()["retryable"] == 1 and summary()["labels"] == 19


def test_an_endpoint_that_stays_away_is_not_asked_for_ever(
    served: tuple[FakeEndpoint, FaultProxy], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(partial, "GIVE_UP", 40)
    _, proxy = served
    write_pairs(400)
    proxy.inject("503", times=10_000)
    result = label(proxy.url, "judge.concurrency=16")
    assert result.exit_code == 1 and "answered none of the last" in result.stderr
    assert "the last: endpoint_error: 503" in result.stderr and proxy.requests < 700


# ---- Input that changes ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [lambda: write_pairs(142), lambda: write_pairs(130, "another answer")])
def test_pairs_that_are_replaced_while_they_are_labelled(
    served: tuple[FakeEndpoint, FaultProxy], change: Callable[[], None]
) -> None:
    endpoint, _ = served
    write_pairs(130)
    seen = 0

    def replaced(body: dict[str, Any]) -> float:
        nonlocal seen
        seen += 1
        if seen == 100:
            change()
        return 0.0

    endpoint._delay_s = replaced
    result = label(endpoint.url, "judge.concurrency=16")
    assert result.exit_code == 1, result.output
    assert "an input was replaced while the job ran" in result.stderr
    assert "data.path: pairs.jsonl has changed (written 20" in result.stderr
    assert not Path("run/summary.json").exists()
    result = label(endpoint.url)
    assert result.exit_code == 2 and "holds results of another run" in result.stderr
    assert "data.path: pairs.jsonl has changed (written 20" in result.stderr
    assert "use another run_dir or output, or remove that folder and labels.jsonl" in result.stderr
    write_pairs(130)  # as it was: labels of other pairs go, and nothing is asked twice
    bodies = {json.dumps(body) for body in endpoint.bodies}
    asked = len(endpoint.bodies)
    result = label(endpoint.url)
    assert result.exit_code == 0, result.output
    assert [(r.id, r.response_a) for r in labels()] == [(str(n), f"answer {n}") for n in range(130)]
    assert not bodies.intersection(map(json.dumps, endpoint.bodies[asked:]))


def test_other_pairs_of_the_same_name_and_the_same_pairs_of_another(served: tuple[FakeEndpoint, FaultProxy]) -> None:
    endpoint, _ = served
    write_pairs(3)
    assert label(endpoint.url).exit_code == 0
    Path("pairs.jsonl").rename("moved.jsonl")
    assert label(endpoint.url, "data.path=moved.jsonl").exit_code == 0
    asked = len(endpoint.bodies)
    write_pairs(3, "other")
    result = label(endpoint.url)
    assert result.exit_code == 2 and len(endpoint.bodies) == asked
    assert "data.path was 'moved.jsonl' and is 'pairs.jsonl'" in result.stderr


def test_an_own_template_that_says_something_else(served: tuple[FakeEndpoint, FaultProxy]) -> None:
    from rlaif_ray.feedback.templates import FOLDERS

    endpoint, _ = served
    text = (FOLDERS["preference"] / "helpful.yaml").read_text()
    write_pairs(3)
    Path("own.yaml").write_text(text)
    assert label(endpoint.url, "label.template=own.yaml").exit_code == 0
    Path("own.yaml").write_text(f"# a comment\n{text.replace('name: helpful', 'name: own')}")
    assert label(endpoint.url, "label.template=own.yaml").exit_code == 0
    Path("own.yaml").write_text(text.replace("You compare two", "You weigh two"))
    result = label(endpoint.url, "label.template=own.yaml")
    assert result.exit_code == 2 and "label.template: own.yaml has changed (written 20" in result.stderr


def test_settings_may_change_before_there_are_results_and_others_never(served: tuple[FakeEndpoint, FaultProxy]) -> None:
    endpoint, _ = served
    write_pairs(3)
    endpoint._say = lambda _: Said(positions=(), texts=[""], logprobs=False, finish="length")
    text = ("judge.answers=text",)
    assert label(endpoint.url, *text).exit_code == 2  # it thinks, and needs room
    endpoint._say = lambda _: Said(texts=["1"], logprobs=False)
    room = "judge.extra_body={max_completion_tokens: 2048}"
    assert label(endpoint.url, *text, room).exit_code == 0
    assert label(endpoint.url, *text, room, "judge.concurrency=3", "label.human_price=1").exit_code == 0
    result = label(endpoint.url, *text)
    assert result.exit_code == 2 and "judge.extra_body was {'max_completion_tokens': 2048} and is {}" in result.stderr


def test_more_pairs_of_the_same_file_may_be_asked_and_not_fewer(served: tuple[FakeEndpoint, FaultProxy]) -> None:
    endpoint, _ = served
    write_pairs(130)
    assert label(endpoint.url, "data.limit=70").exit_code == 0
    assert label(endpoint.url, "data.limit=130").exit_code == 0 and len(labels()) == 130
    result = label(endpoint.url, "data.limit=60")
    assert result.exit_code == 2 and "data.limit must be at least the 130 labels" in result.stderr


# ---- One response at a time ------------------------------------------------------------------------------------------


def judging(url: str, count: int, folder: Path) -> Callable[[], Graded]:
    """Judges so many responses for harm, one at a time, by the endpoint at `url`."""
    judge = {"type": "openai", "model": "m", "base_url": url, "api_key_env": ENV, "max_retries": 0}
    job = embedded(LabelJob, {"data": {"path": "x"}, "judge": judge | {"concurrency": 1}})
    grader = Grader(load_template("no_harm"), load_template("refusal"), None, 0)
    responses = [Response(PROMPTS, "arm", n, (Message("user", f"q{n}"),), f"answer {n}") for n in range(count)]
    return lambda: judge_responses(job, grader, responses, folder)


def test_responses_that_could_not_be_judged_for_harm_are_asked_again(
    served: tuple[FakeEndpoint, FaultProxy], tmp_path: Path
) -> None:
    endpoint, proxy = served
    endpoint._say = lambda _: one(_7=0.9, _8=0.1)
    judged = judging(proxy.url, 10, tmp_path / "harmless")
    proxy.inject("503", times=4)
    proxy.inject("400", message="refused by policy")
    first = judged()
    assert first.failures == {"endpoint_error": 5} and first.retryable == 4
    second = judged()
    assert second.failures == {"endpoint_error": 1} and second.retryable == 0 and len(endpoint.bodies) == 9
    assert [score is None for score in second.scores] == [n == 4 for n in range(10)]


def test_an_endpoint_that_stays_away_is_not_asked_about_all_responses_again(
    served: tuple[FakeEndpoint, FaultProxy], tmp_path: Path
) -> None:

    endpoint, proxy = served
    endpoint._say = lambda _: one(_7=0.9, _8=0.1)
    judged = judging(proxy.url, 400, tmp_path / "harmless")
    judged()
    path = tmp_path / "harmless" / "scored.jsonl"
    failed = [json.loads(line) | {"score": None, "failure": "endpoint_error"} for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(row) + "\n" for row in failed))
    (tmp_path / "harmless" / "answers.sqlite").unlink()
    proxy.inject("503", times=10_000)
    before = len(endpoint.bodies), proxy.requests
    with pytest.raises(FeedbackError, match=f"none of the last {partial.GIVE_UP} questions"):
        judged()
    assert proxy.requests - before[1] == partial.GIVE_UP and len(endpoint.bodies) == before[0]
