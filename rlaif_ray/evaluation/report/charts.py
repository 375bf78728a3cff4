"""The report's figures, drawn by plotly. Runs keep one colour through all of them.

Colours are those of the light page; the page's script swaps them for DARK's on the dark one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import plotly.graph_objects as go

from rlaif_ray.documents import at
from rlaif_ray.evaluation.report.runs import Json, Run, Series

# After Okabe and Ito (2008): told apart with any colour vision, here with 3:1 contrast on both grounds.
COLOURS = ("#0068ad", "#c25400", "#007a58", "#a8457f", "#7a6a00", "#3a86b8", "#5d4fb3", "#6b6f76")
NIGHT = ("#5fb4f0", "#f5944e", "#38c79b", "#e893c3", "#d9c643", "#9bd0f2", "#a79cf0", "#a9afb8")
DARK = dict(zip(COLOURS, NIGHT, strict=True))
DASHES = ("solid", "dash", "dot", "dashdot")  # once the colours are used up
PHASES = ("rollout", "feedback", "annotate", "update", "weight_sync", "evaluation", "checkpoint", "other")
DRAWN = 2000  # points of a curve; more than a screen has
AREAS = 500  # points of a filled area: of thousands of spikes nothing is seen
SMOOTHED_FROM = 60  # points
SHARES: Json = {"range": [-0.03, 1.03]}  # an axis

# What a reader asks for first; everything else that was measured follows below these.
HEADLINES = {
    "reward/mean": ("Reward", "mean of a step's samples"),
    "kl/mean": ("KL to the reference", "mean over sampled tokens, nats"),
    "completion/length_mean": ("Length", "tokens of a completion, mean"),
    "policy/entropy": ("Entropy", "of the policy, nats per token"),
    "time/step_s": ("Step time", "seconds"),
    "rollout/tokens_per_s": ("Throughput", "sampled tokens per second"),
    "feedback/per_s": ("Feedback", "responses scored per second"),
    "sft/loss": ("SFT loss", "nats per token"),
    "reward_model/loss": ("Reward model loss", "nats per pair"),
    "reward_model/accuracy": ("Reward model accuracy", "share of a step's pairs ordered as labelled"),
    "dpo/loss": ("DPO loss", "nats per pair"),
    "dpo/accuracy": ("DPO accuracy", "share of a step's pairs ordered as labelled"),
}

# Of evaluations during training: title, and where the value with its interval is.
HELD_OUT = (
    ("Held-out reward", "held_out", "after", "mean"),
    ("Held-out harmless rate", "harmless", "rate", "rate"),
    ("Held-out over-refusal", "harmless", "over_refusal", "rate"),
)


@dataclass(frozen=True, slots=True)
class Chart:
    """A figure and what it says beside its drawing."""

    title: str
    note: str
    figure: Json  # data and layout as plotly.js takes them
    wide: bool = False


@dataclass(frozen=True, slots=True)
class Measure:
    """A share with its 95% interval."""

    label: str
    run: int
    rate: float
    low: float | None
    high: float | None
    n: int | None
    note: str = ""


# ---- Over steps ------------------------------------------------------------------------------------------------------


def metric_names(runs: Sequence[Run]) -> tuple[list[str], list[str]]:
    """Headlines that were measured, and everything else but times."""
    measured = sorted({name for run in runs for name in run.metrics})
    first = [name for name in HEADLINES if name in measured]
    return first, [name for name in measured if name not in HEADLINES and not name.startswith("time/")]


def curves(runs: Sequence[Run], names: Sequence[str]) -> Iterator[Chart]:
    """One chart for each metric, all runs over each other."""
    for name in names:
        own = [(number, run.metrics[name]) for number, run in enumerate(runs) if name in run.metrics]
        traces = [trace for number, series in own for trace in _curve(runs[number].name, number, series)]
        title, note = HEADLINES.get(name, (name, ""))
        yield Chart(title, f"{name} · {note}" if note else "", _figure(traces, {}, "step"))


def held_out(runs: Sequence[Run]) -> Iterator[Chart]:
    """What each evaluation during training measured, with its interval."""
    for title, *path, value in HELD_OUT:
        traces = []
        for number, run in enumerate(runs):
            points = [(row.get("step"), at(row, *path) or {}) for row in run.evaluations]
            kept = [(step, found) for step, found in points if found.get(value) is not None]
            if kept:
                bounds = [(found[value], found.get("ci95_low"), found.get("ci95_high")) for _, found in kept]
                line = {**_line(run.name, number), "mode": "lines+markers", "error_y": _error_bars(bounds)}
                traces.append({**line, "x": [step for step, _ in kept], "y": [mean for mean, _, _ in bounds]})
        if traces:
            note = "by what trains the policy; same prompts at every evaluation; bars: 95% interval over prompts"
            yield Chart(title, note, _figure(traces, {}, "step"))


def phase_times(runs: Sequence[Run]) -> Iterator[Chart]:
    """Where a step's time goes: the mean of each run, and over the steps of those with several phases."""
    spent = {run.name: _by_phase(run) for run in runs if "time/step_s" in run.metrics}
    if not spent:
        return
    bars = []
    for colour, phase in zip(COLOURS, PHASES, strict=True):
        means = [sum(phases.get(phase, [])) / len(phases["step"]) for phases in spent.values()]
        if any(means):
            bars.append(_bar(phase, list(spent), means, colour, "%{x:.3g} s"))
    figure = _figure(bars, _stacked(len(spent)), "seconds")
    yield Chart("Time by phase", "mean of a step", figure, wide=True)
    for name, phases in spent.items():
        every = -(-len(phases["step"]) // AREAS)
        areas = [
            {
                **{"type": "scatter", "mode": "lines", "stackgroup": "phases", "hovertemplate": "%{y:.3g} s"},
                **{"name": phase, "line": {"width": 0.5, "color": colour}, "fillcolor": colour},
                "x": [min(start + every, len(phases["step"])) for start in range(0, len(phases["step"]), every)],
                "y": [_mean(phases[phase][k : k + every]) for k in range(0, len(phases["step"]), every)],
            }
            for colour, phase in zip(COLOURS, PHASES, strict=True)
            if any(phases.get(phase, []))
        ]
        if len(areas) > 2 and len(phases["step"]) > 1:
            figure = _figure(areas, {"showlegend": True, "height": 300}, "step")
            yield Chart(f"Time by phase: {name}", "seconds of each step", figure)


def _by_phase(run: Run) -> dict[str, list[float]]:
    """Seconds of each phase and of the whole, at each of the run's steps."""
    steps = run.metrics["time/step_s"].steps
    found = {}
    for phase in (*PHASES, "step"):
        series = run.metrics.get(f"time/{phase}_s", Series())
        seconds = dict(zip(series.steps, series.values, strict=True))
        found[phase] = [seconds.get(step, 0.0) for step in steps]
    return found


def _curve(name: str, number: int, series: Series) -> list[Json]:
    """A line; of many points the mean of the last few, the points themselves faint below it."""
    line = _line(name, number)
    steps, values = thinned(series.steps, series.values)
    drawn = {**line, "x": steps, "y": values, "hovertemplate": "%{y:.5g}"}
    if len(series.values) < SMOOTHED_FROM:
        return [{**drawn, "mode": "lines+markers", "marker": {"size": 5}} if len(values) < 30 else drawn]
    window = max(5, len(series.values) // 40)
    steps, values = thinned(series.steps, running_mean(series.values, window))
    smooth = {**line, "x": steps, "y": values, "hovertemplate": f"%{{y:.5g}} (mean of {window})"}
    return [{**drawn, "opacity": 0.3}, smooth]


def running_mean(values: Sequence[float], window: int) -> list[float]:
    """Mean of the last `window` values at each place, of fewer at the start."""
    means, total = [], 0.0
    for k, value in enumerate(values):
        total += value - (values[k - window] if k >= window else 0.0)
        means.append(total / min(k + 1, window))
    return means


def thinned(steps: Sequence[int], values: Sequence[float]) -> tuple[list[int], list[float]]:
    """At most DRAWN points: of each block the lowest and the highest, so that no spike is lost."""
    if len(values) <= DRAWN:
        return list(steps), list(values)
    size = -(-len(values) // (DRAWN // 2))
    kept: list[int] = []
    for start in range(0, len(values), size):
        block = range(start, min(start + size, len(values)))
        kept += sorted({min(block, key=values.__getitem__), max(block, key=values.__getitem__)})
    return [steps[k] for k in kept], [values[k] for k in kept]


# ---- Shares and the judge --------------------------------------------------------------------------------------------


def intervals(title: str, note: str, measures: Sequence[Measure], reference: float | None) -> Chart:
    """A dot with its interval for each measure, one below the other."""
    traces = []
    for number in dict.fromkeys(measure.run for measure in measures):
        own = [measure for measure in measures if measure.run == number]
        traces.append(
            {
                **{"type": "scatter", "mode": "markers", "meta": {"run": number}},
                **{"x": [one.rate for one in own], "y": [one.label for one in own]},
                "marker": {"size": 11, "color": COLOURS[number % len(COLOURS)]},
                "error_x": _error_bars([(one.rate, one.low, one.high) for one in own]),
                "text": ["" if one.n is None else f"n = {one.n}" for one in own],
                "hovertemplate": "%{x:.3f} %{text}<extra></extra>",
            }
        )
    labels = list(dict.fromkeys(one.label for one in measures))
    layout: Json = {
        "height": 80 + 40 * len(labels),
        "hovermode": "closest",
        "shapes": [] if reference is None else [{**_straight((reference, reference), (0, 1)), "yref": "paper"}],
        "xaxis": {**SHARES, "tickformat": ".0%"},
        "yaxis": {"categoryorder": "array", "categoryarray": labels[::-1], "range": [-0.6, len(labels) - 0.4]},
    }
    return Chart(title, note, _figure(traces, layout))


def calibration(found: Sequence[tuple[str, Json]]) -> Iterator[Chart]:
    """Reliability diagrams: what was predicted against what labels say, in bins (label, summary with `curve`)."""
    traces, told = [], []
    for place, (label, summary) in enumerate(found):
        bins = [one for one in summary["curve"] if (one.get("n") or 0) > 0 and {"mean_p", "mean_label"} <= one.keys()]
        colour, most = COLOURS[place % len(COLOURS)], max((one["n"] for one in bins), default=1)
        traces.append(
            {
                **{"type": "scatter", "mode": "lines+markers", "name": label, "line": {"color": colour, "width": 1.5}},
                **{"x": [one["mean_p"] for one in bins], "y": [one["mean_label"] for one in bins]},
                "marker": {"size": [7 + 15 * (one["n"] / most) ** 0.5 for one in bins], "color": colour},
                "text": [f"n = {one['n']}" for one in bins],
                "hovertemplate": "predicted %{x:.3f}, labels %{y:.3f}, %{text}",
            }
        )
        known = [(name, summary[name.lower()]) for name in ("Brier", "ECE") if summary.get(name.lower()) is not None]
        told.append(f"{label}: {', '.join(f'{name} {value:.3f}' for name, value in known)}")
    if traces:
        diagonal = {"shapes": [_straight((0, 1), (0, 1))], "xaxis": SHARES, "yaxis": SHARES}
        layout = {**diagonal, "showlegend": True, "hovermode": "closest", "height": 380}
        note = "on the diagonal P means what it says; larger dots, more pairs · " + "; ".join(told)
        yield Chart("Calibration", note, _figure(traces, layout, "predicted P(a is better)", "share of labels"))


def position_bias(found: Sequence[tuple[str, Json]]) -> Iterator[Chart]:
    """How often both orders agree, and which place wins where they don't (label, fields of PositionBias)."""
    kept = [
        (label, one["rate"], one.get("prefers_first") or 0.0) for label, one in found if one.get("rate") is not None
    ]
    if kept:
        labels = [label for label, _, _ in kept]
        shares = (
            ("the same response wins", [1 - rate for _, rate, _ in kept], COLOURS[2]),
            ("the first place wins", [rate * first for _, rate, first in kept], COLOURS[1]),
            ("the second place wins", [rate * (1 - first) for _, rate, first in kept], COLOURS[3]),
        )
        bars = [_bar(name, labels, share, colour, "%{x:.1%}") for name, share, colour in shares]
        layout = _stacked(len(kept)) | {"xaxis": {"tickformat": ".0%", "range": [0, 1]}}
        note = "of pairs judged in both orders; the place won for Lee et al. in 18% (PaLM 2 L), 21% (S), 56% (XS)"
        yield Chart("Position bias", note, _figure(bars, layout))


def both_orders(runs: Sequence[Run], orders: Mapping[int, Sequence[tuple[float, float]]]) -> Iterator[Chart]:
    """P(a) of one order against the other's: off the diagonal the judge follows the place."""
    traces = []
    for number, pairs in orders.items():
        shown = pairs[:: -(-len(pairs) // DRAWN)]
        traces.append(
            {
                **{"type": "scatter", "mode": "markers", "name": runs[number].name, "meta": {"run": number}},
                **{"x": [forward for forward, _ in shown], "y": [reverse for _, reverse in shown]},
                "marker": {"size": 6, "opacity": 0.55, "color": COLOURS[number % len(COLOURS)]},
                "hovertemplate": "first %{x:.3f}, second %{y:.3f}",
            }
        )
    if traces:
        corner = {"type": "rect", "fillcolor": COLOURS[1], "opacity": 0.1, "line": {"width": 0}, "layer": "below"}
        first, second = {"x0": 0.5, "x1": 1, "y0": 0, "y1": 0.5}, {"x0": 0, "x1": 0.5, "y0": 0.5, "y1": 1}
        shapes = [_straight((0, 1), (0, 1)), {**corner, **first}, {**corner, **second}]
        layout = {"shapes": shapes, "hovermode": "closest", "height": 380, "xaxis": SHARES, "yaxis": SHARES}
        note = "one dot a pair; shaded: the place wins, below right the first, above left the second"
        figure = _figure(traces, layout, "P(a is better), a shown first", "P(a is better), a shown second")
        yield Chart("Both orders", note, figure)


# ---- Parts -----------------------------------------------------------------------------------------------------------


def _line(name: str, number: int) -> Json:
    colour, dash = COLOURS[number % len(COLOURS)], DASHES[number // len(COLOURS) % len(DASHES)]
    line = {"color": colour, "width": 2, "dash": dash}
    return {"type": "scatter", "mode": "lines", "name": name, "line": line, "meta": {"run": number}}


def _bar(name: str, labels: Sequence[str], lengths: Sequence[float], colour: str, hover: str) -> Json:
    bar = {"type": "bar", "orientation": "h", "name": name, "marker": {"color": colour}, "hovertemplate": hover}
    return {**bar, "x": list(lengths), "y": list(labels)}


def _stacked(bars: int) -> Json:
    return {"barmode": "stack", "height": 120 + 36 * bars, "showlegend": True, "yaxis": {"autorange": "reversed"}}


def _error_bars(found: Sequence[tuple[float, float | None, float | None]]) -> Json:
    up = [0.0 if high is None else high - mean for mean, _, high in found]
    down = [0.0 if low is None else mean - low for mean, low, _ in found]
    return {"type": "data", "symmetric": False, "array": up, "arrayminus": down, "thickness": 2, "width": 5}


def _straight(x: tuple[float, float], y: tuple[float, float]) -> Json:
    line = {"color": COLOURS[-1], "width": 1, "dash": "dot"}
    return {"type": "line", "x0": x[0], "x1": x[1], "y0": y[0], "y1": y[1], "line": line, "layer": "below"}


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _figure(traces: Sequence[Json], layout: Json, x: str = "", y: str = "") -> Json:
    base: Json = {
        "margin": {"l": 8, "r": 20, "t": 8, "b": 8},
        "height": 260,
        "showlegend": False,
        "hovermode": "x unified",
        "legend": {"orientation": "h", "y": 1.02, "yanchor": "bottom", "x": 0, "traceorder": "normal"},
        "xaxis": {"automargin": True, "zeroline": False, "title": {"text": x, "standoff": 6}},
        "yaxis": {"automargin": True, "zeroline": False, "title": {"text": y, "standoff": 6}},
    }
    for key, value in layout.items():
        base[key] = base[key] | value if isinstance(base.get(key), dict) else value
    drawn: Json = go.Figure(list(traces), base).to_plotly_json()
    drawn["layout"].pop("template", None)  # plotly's own colours: the page has its own, light and dark
    return drawn
