"""The report's reading and its page, without a browser."""

from __future__ import annotations

import json
import os
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from rlaif_ray.cli import app
from rlaif_ray.errors import InputError
from rlaif_ray.evaluation.report.charts import DRAWN, running_mean, thinned
from rlaif_ray.evaluation.report.page import facts, measures, safe_json, write_report
from rlaif_ray.evaluation.report.runs import find_runs, read_run
from rlaif_ray.evaluation.report.samples import Samples
from rlaif_ray.evaluation.report.table_one import PAPER, table_one
from rlaif_ray.pipelines.report import make_report
from tests.unit.evaluation.run_folders import NASTY, evaluation_run, training_run, write_resolved, write_rows


class Page(HTMLParser):
    """What a browser makes of the page: its elements, the text between them, and what scripts hold."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: dict[str | None, str] = {}
        self.text = ""
        self._script: str | None = None
        self._inside = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside, self._script = tag, dict(attrs).get("id")

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts[self._script] = self.scripts.get(self._script, "") + data
        elif self._inside != "style":
            self.text += data

    def json(self, name: str) -> Any:
        return json.loads(self.scripts[name])


def page_of(*folders: Path) -> Page:
    out = folders[0].parent / "page.html"
    write_report(folders, out)
    return Page(out)


# ---- The page --------------------------------------------------------------------------------------------------------


def test_secrets_of_older_runs_are_not_on_the_page(tmp_path: Path) -> None:
    """They were written before configs were refused for them, or by another program."""
    run, canary = training_run(tmp_path / "demo"), "canary-91ac7e"
    (run / "summary.json").unlink()
    with (run / "resolved.yaml").open("a") as file:
        file.write(
            f"# from: train.yaml judge.api_key={canary}\nextra: {{api_key: {canary}, at: 'https://u:{canary}@h'}}\n"
        )
    (run / "error.log").write_text(f"openai.AuthenticationError: Authorization: Bearer {canary}\n")
    page = page_of(run)
    assert "AuthenticationError: Authorization: ***" in page.text and "api_key: ***" in page.text
    assert canary not in (tmp_path / "page.html").read_text()


def test_a_finished_run_shows_its_own_numbers(tmp_path: Path) -> None:
    run = training_run(tmp_path / "demo")
    page = page_of(run)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    drawn = [c for c in page.json("data")["charts"] if c["data"][0].get("y") == [row["reward/mean"] for row in rows]]
    assert len(drawn) == 1 and drawn[0]["data"][0]["x"] == [1, 2, 3, 4, 5, 6]
    for text in (
        "finished",
        "6 of 6",
        "1,234 s",
        "vllm, big",
        "0123456789abcdef",
        "torch 2.13.0",
        "0.750 [0.500, 1.000]",
    ):
        assert text in page.text, text
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text().splitlines()]
    held = page.json("sample-data")
    assert [row["text"] for row in held["rows"]] == [row["completion"] for row in samples]
    assert [row.get("score") for row in held["rows"]] == [row["score"] for row in samples]
    assert [held["prompts"][group["p"]] for group in held["groups"]] == [row["prompt"] for row in samples[::4]]
    assert len(held["groups"]) == 6  # the four samples of a prompt stand side by side


def test_nothing_of_a_run_becomes_html(tmp_path: Path) -> None:
    run = training_run(tmp_path / "demo")
    write_resolved(run, "train", f"policy: {{model: {json.dumps(NASTY)}}}\n")
    page = page_of(run, evaluation_run(tmp_path / "evaluation"))
    tags = [tag for tag, _ in page.tags]
    assert tags.count("script") == 4 and "img" not in tags
    assert NASTY in page.text  # escaped, so that it reads as it was written
    assert any(row["text"] == NASTY for row in page.json("sample-data")["rows"])
    assert not [attrs for _, attrs in page.tags for name in attrs if name.startswith("on")]


def test_nothing_is_fetched(tmp_path: Path) -> None:
    page = page_of(training_run(tmp_path / "demo"))
    assert not [a for _, a in page.tags if a.get("src")]
    assert all((a.get("href") or "#").startswith(("#", "data:")) for _, a in page.tags)
    policy = next(a["content"] or "" for tag, a in page.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert "default-src 'none'" in policy and "http" not in policy and "connect-src" not in policy


@pytest.mark.parametrize("text", ["</script>", "<!--", "\u2028\u2029", "&lt;", "]]>", "\ud800", "\0"])
def test_json_can_stand_in_a_script(text: str) -> None:
    encoded = safe_json({"text": text})
    assert json.loads(encoded) == {"text": text}
    assert not set("<>&\u2028\u2029") & set(encoded)


def test_a_lone_surrogate_is_written(tmp_path: Path) -> None:
    write_rows(tmp_path / "run" / "samples.jsonl", [{"step": 1, "prompt": "p", "completion": "\ud800 x"}])
    assert page_of(tmp_path / "run").json("sample-data")["rows"][0]["text"] == "\ud800 x"


def test_an_evaluation_shows_the_three_metrics_and_the_paper(tmp_path: Path) -> None:
    run = evaluation_run(tmp_path / "evaluation")
    page = page_of(run)
    rows = [" ".join(row.split()) for row in re.findall(r"(?s)<tr><td>.*?</tr>", (tmp_path / "page.html").read_text())]
    for metric, rate in (("AI labeler alignment", 0.8125), ("Win rate", 0.5625), ("Harmless rate", 0.9375)):
        assert any(metric in row and f"{rate:.3f}" in row and "0.250 – 0.875" in row for row in rows), metric
    assert any("Win rate" in row and "mean lengths 161 and 132 characters" in row for row in rows)
    assert "Beside Table 1 of Lee et al." in page.text and "judged by people, PaLM 2" in page.text
    table = table_one([read_run(run, "evaluation")])
    row = table.comparisons[0]
    assert row.name == "RLAIF vs SFT" and row.paper == PAPER["rlaif", "sft"]
    assert [found["win_rate"]["rate"] for _, found in row.ours["summary"]] == [0.5625]
    assert next(row for row in table.policies if row.name == "RLAIF").ours["harmless"][0][1]["rate"]["rate"] == 0.9375
    held = page.json("sample-data")
    assert [held["verdicts"][0][key] for key in ("p", "fwd", "rev", "human")] == pytest.approx([0.85, 0.9, 0.8, 0.0])
    assert [held["rows"][v["a"]]["label"] for v in held["verdicts"]] == ["rlaif"] * 3
    titles = re.findall(r"<figcaption><b>(.*?)</b>", (tmp_path / "page.html").read_text())
    assert {"Calibration", "Position bias", "Both orders", "Win rate at equal length"} <= set(titles)


def test_several_runs_overlay(tmp_path: Path) -> None:
    one, two = training_run(tmp_path / "one"), training_run(tmp_path / "two", seed=1)
    page = page_of(one, two)
    assert page.json("data")["runs"] == ["one", "two"]
    reward = page.json("data")["charts"][0]["data"]
    assert [trace["meta"]["run"] for trace in reward] == [0, 1]
    assert reward[0]["line"]["color"] != reward[1]["line"]["color"]
    assert "Settings that differ" in page.text  # the seed


def test_names_that_are_the_same_are_told_apart(tmp_path: Path) -> None:
    runs, _ = find_runs([training_run(tmp_path / "a" / "demo"), training_run(tmp_path / "b" / "demo")])
    assert [run.name for run in runs] == ["a/demo", "b/demo"]


# ---- Runs that are not whole -----------------------------------------------------------------------------------------


def test_a_run_that_is_going(tmp_path: Path) -> None:
    run = training_run(tmp_path / "demo")
    (run / "summary.json").unlink()
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "reward/m')
    found = read_run(run, "demo")
    assert found.state == "running" and found.steps == 6 and not found.problems
    assert "no summary yet" in page_of(run).text


def test_a_run_that_goes_on_after_its_summary(tmp_path: Path) -> None:
    run = training_run(tmp_path / "demo")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 7, "reward/mean": 1.0}\n')
    assert read_run(run, "demo").state == "running"


def test_a_run_that_crashed(tmp_path: Path) -> None:
    run = training_run(tmp_path / "demo")
    (run / "summary.json").unlink()
    (run / "error.log").write_text("2026-11-24\nTraceback\nRunError: the judge <died>\n")
    found = read_run(run, "demo")
    assert (found.state, found.state_note) == ("failed", "RunError: the judge <died>")
    assert "RunError: the judge <died>" in page_of(run).text


def test_a_run_that_was_killed_long_ago(tmp_path: Path) -> None:
    run = training_run(tmp_path / "demo")
    (run / "summary.json").unlink()
    for path in run.iterdir():
        os.utime(path, (1e9, 1e9))
    assert read_run(run, "demo").state == "unfinished"


def test_values_that_are_no_numbers_are_gaps(tmp_path: Path) -> None:
    text = '{"step": 1, "a": NaN, "b": 1e999, "c": null, "d": true, "e": "x", "f": 2}\n'
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").write_text(text)
    (tmp_path / "run" / "samples.jsonl").write_text('{"step": 1, "prompt": "p", "completion": "c", "score": NaN}\n')
    assert read_run(tmp_path / "run", "run").metrics.keys() == {"f"}
    assert "score" not in page_of(tmp_path / "run").json("sample-data")["rows"][0]


def test_what_cannot_be_read_is_said(tmp_path: Path) -> None:
    run = training_run(tmp_path / "demo", steps=2)
    lines = (run / "metrics.jsonl").read_text().splitlines()
    (run / "metrics.jsonl").write_text("\n".join([lines[0], "no json", "[1]", lines[1], ""]))
    (run / "resolved.yaml").write_text("a: [")
    (run / "summary.json").write_text("{")
    with (run / "samples.jsonl").open("a") as file:
        file.write('{"step": [1], "prompt": {"a": 1}, "completion": 5}\n')
    write_rows(run / "sampled.jsonl", [{"prompt": None, "responses": 5}])
    page = page_of(run)
    for text in (
        "metrics.jsonl has 2 line(s)",
        "resolved.yaml, line 1, is not valid YAML",
        "summary.json is not JSON",
        "unknown form",
    ):
        assert text in page.text
    assert len(read_run(run, "demo").metrics["kl/mean"].steps) == 2


@pytest.mark.parametrize("summary", [{"job": "knitting", "rows": 3}, {}, {"win_rates": [{"a": "x"}], "alignment": 3}])
def test_an_unknown_job_and_an_odd_summary(tmp_path: Path, summary: dict[str, Any]) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "summary.json").write_text(json.dumps(summary))
    assert summary.get("job", "unknown") in page_of(tmp_path / "run").text


def test_many_rows_are_thinned_in_blocks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rlaif_ray.evaluation.report.samples.MAX_ROWS", 1000)
    run = training_run(tmp_path / "demo", steps=50, samples=64)
    found = read_run(run, "demo")
    assert len(Samples([found])) == 800 and "one of 4 is shown" in found.problems[0]


# ---- What is asked for -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("given", ["nothing", "empty", "file"])
def test_a_path_that_is_no_run(tmp_path: Path, given: str) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match="must be a run's folder"):
        make_report([tmp_path / given], None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["empty", "file"]


def test_the_page_goes_beside_the_run_or_where_it_is_asked(tmp_path: Path) -> None:
    run = training_run(tmp_path / "demo", steps=2)
    assert "demo/report.html: 1 run, 8 responses" in make_report([run], None)
    make_report([run], tmp_path / "new" / "page.html")
    assert (run / "report.html").is_file() and (tmp_path / "new" / "page.html").is_file()
    with pytest.raises(InputError, match="--out must be a file that can be written"):
        make_report([run], run)


def test_the_command(tmp_path: Path) -> None:
    run = training_run(tmp_path / "demo", steps=2)
    done = CliRunner().invoke(app, ["report", str(run), "--out", str(tmp_path / "page.html")])
    assert done.exit_code == 0 and "1 run, 8 responses" in done.stdout
    refused = CliRunner().invoke(app, ["report", str(tmp_path / "nowhere")])
    assert refused.exit_code == 2 and "must be a run's folder (got nothing)" in refused.output


def test_a_pipeline_opens_into_its_stages(tmp_path: Path) -> None:
    folder = tmp_path / "pipeline"
    training_run(folder / "stages" / "rlaif-abc")
    training_run(folder / "stages" / "rlaif-old")  # of settings that are no more
    evaluation_run(folder / "stages" / "evaluate-def")
    stages = [("rlaif", "abc"), ("dpo", "xyz"), ("evaluate", "def")]
    told = [
        {"name": name, "hash": own, "job": "x", "state": "ran", "seconds": 3, "result": "r"} for name, own in stages
    ]
    (folder / "summary.json").write_text(json.dumps({"job": "pipeline", "stages": told}))
    runs, pipelines = find_runs([folder])
    assert [run.name for run in runs] == ["rlaif", "evaluate"] and len(pipelines[0].stages) == 3
    assert "Stages of pipeline" in page_of(folder).text
    os.utime(folder / "summary.json", (1e9, 1e9))
    os.utime(folder / "stages" / "rlaif-old", (1e8, 1e8))
    write_resolved(folder / "stages" / "dpo-new", "dpo")  # begun since the summary
    assert [run.name for run in find_runs([folder])[0]] == ["rlaif", "evaluate", "dpo"]


def test_a_pipeline_that_is_going_shows_what_has_begun(tmp_path: Path) -> None:
    training_run(tmp_path / "pipeline" / "stages" / "rlaif-abc")
    runs, _ = find_runs([tmp_path / "pipeline"])
    assert [run.name for run in runs] == ["rlaif"]
    (tmp_path / "none" / "stages").mkdir(parents=True)
    with pytest.raises(InputError, match="without a stage"):
        find_runs([tmp_path / "none"])


def test_labels_are_found_where_the_job_wrote_them(tmp_path: Path) -> None:
    evaluation_run(tmp_path / "other")
    run = tmp_path / "runs" / "label"
    write_resolved(run, "label")
    (run / "summary.json").write_text(json.dumps({"job": "label", "output": "other/judging/labels.jsonl"}))
    found, labels = read_run(run, "label"), tmp_path / "other" / "judging" / "labels.jsonl"
    assert len(Samples([found], [labels]).orders[0]) == 3
    # What the run's own files name is no reason to read it.
    assert not Samples([found]).orders and not Samples([found], [tmp_path / "another.jsonl"]).orders
    assert "--labels other/judging/labels.jsonl shows them" in found.problems[0]
    (run / "judging").mkdir()
    labels.rename(run / "judging" / "labels.jsonl")
    (run / "summary.json").write_text(json.dumps({"job": "label", "output": "runs/label/judging/labels.jsonl"}))
    assert len(Samples([read_run(run, "label")]).orders[0]) == 3


SECRET = "what only the reader of the report may read"


@pytest.mark.parametrize(
    "name",
    [
        "resolved.yaml",
        "summary.json",
        "metrics.jsonl",
        "samples.jsonl",
        "evaluations.jsonl",
        "labels.jsonl",
        "sampled.jsonl",
        "steps.jsonl",
        "error.log",
        "judging/labels.jsonl",
        "arms/one/sampled.jsonl",
        "harmless/scored.jsonl",
        "arms",
        "stages/sft-0123",
    ],
)
def test_links_out_of_a_run_are_not_followed(tmp_path: Path, name: str) -> None:
    """A folder that somebody sent must not make the page show a file of whoever makes the page."""
    outside = tmp_path / "outside"
    for path in ("one/sampled.jsonl", "samples.jsonl", "resolved.yaml", "any.jsonl"):
        row = {"step": 1, "prompt": SECRET, "completion": SECRET, "responses": [SECRET], "response": SECRET}
        row |= {"response_a": SECRET, "response_b": SECRET, "name": SECRET, "job": SECRET}
        (outside / path).parent.mkdir(parents=True, exist_ok=True)
        (outside / path).write_text(json.dumps(row) + "\n")
    run = tmp_path / "run"
    write_resolved(run, "train")
    target = outside if name in ("arms", "stages/sft-0123") else outside / "any.jsonl"
    (run / name).unlink(missing_ok=True)
    (run / name).parent.mkdir(parents=True, exist_ok=True)
    (run / name).symlink_to(target)
    if name.startswith("stages"):
        (run / "stages" / "dpo-1").mkdir()
        (run / "stages" / "dpo-1" / "resolved.yaml").write_text("# rlaif dpo: dpo\n")
    write_report([run], tmp_path / "page.html")
    assert SECRET not in (tmp_path / "page.html").read_text()


def test_facts_of_a_run(tmp_path: Path) -> None:
    told = dict(facts(read_run(training_run(tmp_path / "demo"), "demo")))
    assert told["judge"] == "vllm, big" and told["policy"] == "tiny" and told["steps"] == "6 of 6"
    assert measures([read_run(tmp_path / "demo", "demo")]) == {}


def test_an_evaluation_names_the_judges_own_pupils_and_reward_models(tmp_path: Path) -> None:
    folder = evaluation_run(tmp_path / "evaluation")
    summary = json.loads((folder / "summary.json").read_text())
    aligned = summary["alignment"]
    summary["training_judges"] = {"rlaif": ["big"], "sft": [], "dpo": ["small"]}
    summary["reward_models"] = {"mine": {**aligned, "accuracy": 0.6875}}
    summary["alignment"] = {**aligned, "subsets": {"llmbar/Natural": {**aligned, "accuracy": 0.3125}}}
    (folder / "summary.json").write_text(json.dumps(summary))
    run = read_run(folder, "evaluation")
    assert dict(facts(run))["mind"] == "rlaif learned from this same judge: it grades its own pupils"
    shown = {one.label: one.rate for one in measures([run])["AI labeler alignment"]}
    assert shown == {"big": 0.8125, "big, llmbar/Natural": 0.3125, "mine, a reward model": 0.6875}
    page = page_of(folder).text
    assert "it grades its own pupils" in page and "evaluation · mine" in page  # and its calibration is drawn


# ---- Drawing ---------------------------------------------------------------------------------------------------------


def test_thinning_keeps_every_spike() -> None:
    values = [0.0] * 100_000
    values[54_321], values[77_777] = 9.0, -9.0
    steps, kept = thinned(range(100_000), values)
    assert len(kept) <= DRAWN and {(54_321, 9.0), (77_777, -9.0)} <= set(zip(steps, kept, strict=True))
    assert steps == sorted(steps)
    assert thinned([1, 2], [5.0, 6.0]) == ([1, 2], [5.0, 6.0])


def test_running_mean() -> None:
    assert running_mean([1.0, 3.0, 5.0, 7.0], 2) == [1.0, 2.0, 4.0, 6.0]
