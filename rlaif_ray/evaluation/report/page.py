"""The report's page: one HTML file with everything in it, that opens without a network and asks for nothing."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any

import yaml
from jinja2 import ChainableUndefined, Environment
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from rlaif_ray import __version__
from rlaif_ray.documents import at
from rlaif_ray.errors import InputError
from rlaif_ray.evaluation.report import charts
from rlaif_ray.evaluation.report.charts import Chart, Measure
from rlaif_ray.evaluation.report.runs import Json, Pipeline, Run, find_runs
from rlaif_ray.evaluation.report.samples import Samples
from rlaif_ray.evaluation.report.table_one import TASKS, harmless_arms, met, table_one
from rlaif_ray.writing import replace_bytes

# What would end the script element that holds JSON, or a line of it; all of them mean the same inside a JSON string.
_UNSAFE = {ord(mark): f"\\u{ord(mark):04x}" for mark in "<>&\u2028\u2029"}
_JUDGE_FIELDS = ("type", "model", "revision", "base_url", "template")
_COUNTS = "pairs labels records cost human_cost labels_per_s tokens_in tokens_out"
MEASURES = {
    "AI labeler alignment": "share of pairs where the judge prefers what people prefer; dotted: chance",
    "Win rate": "of the first arm, a tie counts half; dotted: neither is better",
    "Win rate at equal length": "what a logistic regression on the length ratio predicts where it is 1",
    "Harmless rate": "share of responses that the judge finds harmless",
    "Over-refusal": "share of safe requests that are turned away",
}


def write_report(folders: Sequence[Path], out: Path, labels: Sequence[Path] = ()) -> dict[str, int]:
    """Reads the runs in `folders` and writes the page; returns how many runs and responses it shows.

    Nothing is read outside of these folders but `labels`.

    Raises:
        InputError: a folder holds no run, or `out` can't be written.
    """
    runs, pipelines = find_runs(folders)
    samples = Samples(runs, labels)
    text = make_page(runs, pipelines, samples)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        # A lone surrogate, which models do emit, becomes its JSON escape.
        data = text.encode("utf-8", "backslashreplace")
        if out.exists() and not out.is_file():  # /dev/stdout and the like
            out.write_bytes(data)
        else:
            replace_bytes(out, data)
    except OSError as error:
        raise InputError(
            f"--out must be a file that can be written (got {out}): {error.strerror or error}. The report goes there; "
            f"name another with --out FILE."
        ) from error
    return {"runs": len(runs), "samples": len(samples)}


def make_page(runs: Sequence[Run], pipelines: Sequence[Pipeline], samples: Samples) -> str:
    """The HTML. Text of runs enters it escaped, or as JSON that its script sets as text."""
    sections = _sections(runs, samples)
    name = pipelines[0].name if pipelines else runs[0].name
    data = {
        "runs": [run.name for run in runs],
        "dark": charts.DARK,
        "charts": [chart.figure for _, _, found in sections for chart in found],
    }
    # Of a summary that isn't ours anything may be missing: it is shown as a dash.
    environment = Environment(autoescape=True, undefined=ChainableUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"figure": _figure, "percent": _percent, "percents": _percents}
    return environment.from_string(_asset("page.html")).render(
        title=name if len(runs) == 1 else f"{name} · {len(runs)} runs",
        made=time.strftime("%Y-%m-%d %H:%M"),
        version=__version__,
        runs=runs,
        pipelines=pipelines,
        facts=[list(facts(run)) for run in runs],
        origins=origins(runs),
        raw=[json.dumps(run.summary, indent=2, ensure_ascii=False) if run.summary else "" for run in runs],
        differences=differences(runs),
        sections=sections,
        measures=measures(runs),
        table=table_one(runs),
        papers_tasks=TASKS,
        samples=len(samples),
        style=Markup(_asset("page.css") + _run_colours(len(runs))),
        plotly=Markup(get_plotlyjs().replace("</script", "<\\/script")),
        script=Markup(_asset("page.js")),
        data=Markup(safe_json(data)),
        sample_data=Markup(safe_json(samples.as_json())),
    )


def safe_json(value: Any) -> str:
    """JSON that may stand in a script element: no text in it can end the element or start a comment."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.translate(_UNSAFE)


# ---- What is shown ---------------------------------------------------------------------------------------------------


def _sections(runs: Sequence[Run], samples: Samples) -> list[tuple[str, str, list[Chart]]]:
    """Id, title and charts of every part of the page that is drawn."""
    first, rest = charts.metric_names(runs)
    over_steps = [*charts.curves(runs, first), *charts.held_out(runs), *charts.phase_times(runs)]
    of_judge = [
        *charts.calibration(list(calibrated(runs))),
        *charts.both_orders(runs, samples.orders),
        *charts.position_bias(list(biases(runs))),
    ]
    return [
        ("curves", "Curves", over_steps),
        ("rates", "Measures", list(_interval_charts(runs))),
        ("judge", "The judge", of_judge),
        ("more", "Everything else that was measured", list(charts.curves(runs, rest))),
    ]


def facts(run: Run) -> Iterator[tuple[str, str]]:
    """What ran, and its headline figures."""
    steps = f"{run.steps:,}" + (f" of {run.total_steps:,}" if run.total_steps else "") if run.steps else ""
    seconds, peak = run.summary.get("wall_s"), run.summary.get("peak_rss_gb")
    told: list[tuple[str, Any]] = [
        ("steps", steps),
        *_headlines(run),
        ("wall time", f"{seconds:,.0f} s" if isinstance(seconds, int | float) else ""),
        ("peak memory", f"{peak:.1f} GB" if isinstance(peak, int | float) else ""),
        ("policy", run.given("policy", "model")),
        ("feedback", _judge(run.given("feedback"))),
        ("judge", _judge(run.given("judge") or run.given("feedback", "judge")) or run.summary.get("judge")),
        ("mind", _pupils(run)),
        ("held-out prompts are judged by", run.evaluations[-1].get("evaluator") if run.evaluations else ""),
        ("label template", run.given("label", "template")),
        ("constitution", run.given("label", "constitution") or run.given("revision", "constitution")),
        ("arms", ", ".join(run.given("arms") or {})),
        ("algorithm", run.given("algorithm", "type")),
        ("seed", run.given("seed")),
        ("folder", run.folder),
    ]
    return ((name, str(value)) for name, value in told if value not in (None, ""))


def _pupils(run: Run) -> str:
    """Arms that the evaluation's own judge taught: their wins say less."""
    taught = run.summary.get("training_judges")
    judges = taught if isinstance(taught, dict) else {}
    arms = [arm for arm, own in judges.items() if isinstance(own, list) and run.summary.get("judge") in own]
    return f"{', '.join(arms)} learned from this same judge: it grades its own pupils" if arms else ""


def _judge(found: Any) -> str:
    return ", ".join(str(found[key]) for key in _JUDGE_FIELDS if found.get(key)) if isinstance(found, dict) else ""


def _headlines(run: Run) -> Iterator[tuple[str, str]]:
    reward = run.metrics.get("reward/mean")
    if reward:
        first, last = (f"{reward.values[k]:.3f} at step {reward.steps[k]:,}" for k in (0, -1))
        yield "reward", f"{first}, {last}"
    for name in ("before", "after", "gain"):
        found = at(run.summary, "held_out", name)
        if isinstance(found, dict) and found.get("mean") is not None:
            bounds = f" [{_figure(found.get('ci95_low'))}, {_figure(found.get('ci95_high'))}]"
            yield f"held-out {name}", f"{found['mean']:.3f}{bounds}"
    for part in ("sft", "dpo", "reward_model"):
        for key in ("loss", "accuracy"):
            value = at(run.summary, part, "held_out", key)
            if value is not None:
                yield f"held-out {key}", f"{value:.3f}"
    for key in _COUNTS.split():
        value = run.summary.get(key)
        if isinstance(value, int | float) and value:
            yield key.replace("_", " "), f"{value:,.6g}"


def origins(runs: Sequence[Run]) -> list[tuple[list[int], str, str]]:
    """Which runs came from which config, revision and versions: mostly all from the same."""
    found: dict[tuple[str, str], list[int]] = {}
    for number, run in enumerate(runs):
        for name, value in run.origin.items():
            found.setdefault((name, value), []).append(number)
    return [(numbers, name, value) for (name, value), numbers in sorted(found.items())]


def differences(runs: Sequence[Run]) -> list[tuple[str, list[str]]]:
    """Settings that are not the same in all runs, where all are of one job."""
    if len(runs) < 2 or len({run.job for run in runs}) > 1:
        return []
    flat = [dict(_flat(run.config)) for run in runs]
    rows = [(key, [one.get(key, "–") for one in flat]) for key in dict.fromkeys(key for one in flat for key in one)]
    return [(key, values) for key, values in rows if len(set(values)) > 1 and key != "run_dir"]


def _flat(config: Json, before: str = "") -> Iterator[tuple[str, str]]:
    for key, value in config.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{before}{key}.")
        else:
            yield f"{before}{key}", yaml.safe_dump(value, default_flow_style=True).removesuffix("...\n").strip()


def measures(runs: Sequence[Run]) -> dict[str, list[Measure]]:
    """The metrics of Lee et al., section 3, with intervals, of all evaluations."""
    found: dict[str, list[Measure]] = {name: [] for name in MEASURES}
    several = sum(run.job == "evaluate" for run in runs) > 1
    for number, run in enumerate(runs):
        for name, label, given in _measured(run):
            rate = given.get("rate", given.get("accuracy")) if isinstance(given, dict) else None
            if rate is not None:
                bounds = given.get("ci95_low"), given.get("ci95_high"), given.get("n")
                shown = f"{label} · {run.name}" if several else label
                found[name].append(Measure(shown, number, rate, *bounds, str(given.get("reason") or "")))
    return {name: own for name, own in found.items() if own}


def _measured(run: Run) -> Iterator[tuple[str, str, Any]]:
    aligned = at(run.summary, "alignment")
    yield "AI labeler alignment", str(run.summary.get("judge") or "judge"), aligned
    yield "AI labeler alignment", "the longer response", at(aligned, "longer")
    for name, found in _parts(run, "alignment", "subsets"):
        yield "AI labeler alignment", f"{run.summary.get('judge') or 'judge'}, {name}", found
    for name, found in _parts(run, "reward_models"):
        yield "AI labeler alignment", f"{name}, a reward model", found
    for one in met(run):
        lengths = [value for arm in "ab" if isinstance(value := at(one, "mean_length", arm), int | float)]
        told = f"mean lengths {' and '.join(f'{value:.0f}' for value in lengths)} characters" if lengths else ""
        yield "Win rate", f"{one['a']} vs {one['b']}", {**one["win_rate"], "reason": told}
        yield "Win rate at equal length", f"{one['a']} vs {one['b']}", one.get("length_controlled")
    for arm, rates in harmless_arms(run).items():
        yield "Harmless rate", arm, rates["rate"]
        yield "Harmless rate", f"{arm}, corrected", rates.get("corrected")
        yield "Over-refusal", arm, rates.get("over_refusal")
    for when in ("before", "after"):  # in training
        for name, key in (("Harmless rate", "rate"), ("Over-refusal", "over_refusal")):
            yield name, f"{run.name}, {when} training, by its own judge", at(run.summary, "harmless", when, key)


def _parts(run: Run, *path: str) -> list[tuple[str, Any]]:
    found = at(run.summary, *path)
    return list(found.items()) if isinstance(found, dict) else []


def _interval_charts(runs: Sequence[Run]) -> Iterator[Chart]:
    for name, found in measures(runs).items():
        half = 0.5 if name.startswith(("AI", "Win")) else None
        yield charts.intervals(name, f"{MEASURES[name]}; bars: 95% interval over prompts", found, half)


def calibrated(runs: Sequence[Run]) -> Iterator[tuple[str, Json]]:
    """Everything that came with a calibration curve: the judge against people, models on held-out pairs."""
    models = [(model, on) for model in ("reward_model", "dpo") for on in ("held_out", "human")]
    for run in runs:
        named = [("reward_models", name) for name, _ in _parts(run, "reward_models")]
        for path in (("alignment",), ("human",), *models, *named):
            found = at(run.summary, *path)
            if isinstance(found, dict) and isinstance(found.get("curve"), list):
                yield f"{run.name} · {path[-1].replace('_', '-')}", found


def biases(runs: Sequence[Run]) -> Iterator[tuple[str, Json]]:
    """Position bias wherever a judge was asked in both orders."""
    for run in runs:
        if isinstance(run.summary.get("position_bias"), int | float):
            first = run.summary.get("first_position_wins")
            yield run.name, {"rate": run.summary["position_bias"], "prefers_first": first}
        aligned = at(run.summary, "alignment", "position_bias")
        if isinstance(aligned, dict):
            yield f"{run.name} · people's pairs", aligned
        for one in met(run):
            if isinstance(one.get("position_bias"), dict):
                yield f"{one['a']} vs {one['b']}", one["position_bias"]


# ---- Parts -----------------------------------------------------------------------------------------------------------


def _asset(name: str) -> str:
    return files("rlaif_ray.evaluation.report").joinpath(name).read_text(encoding="utf-8")


def _run_colours(count: int) -> str:
    both = list(zip(charts.COLOURS, charts.NIGHT, strict=True))
    return "".join(f".run-{n}{{--run:light-dark({','.join(both[n % len(both)])})}}" for n in range(count))


def _figure(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, int | float) else "–"


def _percent(value: Any) -> str:
    return f"{100 * value:.0f}" if isinstance(value, int | float) else "–"


def _percents(found: Json) -> str:
    """A rate and its interval, in percent."""
    low, high = _percent(found.get("ci95_low")), _percent(found.get("ci95_high"))
    return _percent(found.get("rate")) + (f" [{low}, {high}]" if "–" not in (low, high) else "")
