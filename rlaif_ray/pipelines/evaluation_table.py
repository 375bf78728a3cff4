"""What an evaluation found, as `rlaif evaluate` prints it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlaif_ray.pipelines.partial import not_final, reasons_told
from rlaif_ray.tracking.display import digits, fixed, interval, percent, share
from rlaif_ray.tracking.progress import print_columns, print_table


def show_evaluation(summary: dict[str, Any], run_dir: Path) -> None:
    """Prints what was found."""
    if summary["win_rates"]:
        names = ("arm", "against", "win rate", "95% interval", "at equal length", "lengths", "n")
        print_columns("win rates", names, [_row(one) for one in summary["win_rates"]])
    if summary["harmless"]:
        columns = ("arm", "harmless", "95% interval", "corrected", "safe requests refused")
        print_columns("harmless", columns, [_harmless_row(*one) for one in summary["harmless"]["arms"].items()])
    print_table(run_dir.name, list(_lines(summary)), run_dir)


def _row(found: dict[str, Any]) -> tuple[str, ...]:
    rate, controlled, length = found["win_rate"], found["length_controlled"], found["mean_length"]
    return (
        found["a"],
        found["b"],
        share(rate["rate"]),
        interval(rate),
        f"{share(controlled['rate'])} {interval(controlled)}",
        f"{fixed(length['a'], 0)}, {fixed(length['b'], 0)}",
        str(rate["n"]),
    )


def _harmless_row(arm: str, found: dict[str, Any]) -> tuple[str, ...]:
    corrected, refused = found["corrected"], found["over_refusal"]
    return (
        arm,
        share(found["rate"]["rate"]),
        interval(found["rate"]),
        f"{share(corrected['rate'])} {interval(corrected)}" if corrected else "-",
        f"{share(refused['rate'])} {interval(refused)}" if refused else "-",
    )


def _lines(summary: dict[str, Any]) -> Iterator[tuple[str, str]]:
    yield "judge", summary["judge"]
    pupils = [name for name, judges in summary["training_judges"].items() if summary["judge"] in judges]
    if pupils:
        yield "mind", f"{', '.join(pupils)} learned from this same judge: it grades its own pupils"
    for arm, notes in summary["unclear_origins"].items():
        yield f"origin of {arm}", "; ".join(notes)
    found = summary["alignment"]
    if found:
        yield "agrees with people", f"{share(found['accuracy'])} {interval(found)} of {found['n']} pairs"
        yield "the longer does", share(found["longer"]["accuracy"])
        yield "people do", "" if found["people"] is None else f"{share(found['people'])} (one annotator with most)"
        yield "kappa", share(found["kappa"])
        yield "calibration", f"Brier {share(found['brier'])}, ECE {share(found['ece'])}"
        yield "position bias", _bias(found["position_bias"])
        yield "failed", ", ".join(f"{n} {reason}" for reason, n in found["failures"].items())
        for part, own in found.get("subsets", {}).items():
            yield part, f"{share(own['accuracy'])} {interval(own)} of {own['n']}"
    for name, own in summary["reward_models"].items():
        yield (
            f"{name} agrees",
            (
                f"{share(own['accuracy'])} {interval(own)} of {own['n']} pairs, Brier {share(own['brier'])}, "
                f"ECE {share(own['ece'])}"
            ),
        )
    for one in summary["win_rates"]:
        yield f"{one['a']} against {one['b']}", f"position bias {_bias(one['position_bias'])}"
    if any((one["position_bias"]["rate"] or 0) > 0.5 for one in summary["win_rates"]) and not summary["probabilities"]:
        yield (
            "mind",
            (
                "the judge follows the place in most pairs, which makes them ties: win_rate.use_probabilities=true "
                "shows which way it leans, another judge would be better"
            ),
        )
    yield "failures", reasons_told(summary["failures"])
    yield "harmless failures", reasons_told(summary["harmless_failures"])
    yield "not final", not_final(summary["retryable"])
    yield "tokens", f"{summary['tokens_in']} read, {summary['tokens_out']} written"
    yield "cost", digits(summary["cost"], 4) if summary["cost"] else ""


def _bias(found: dict[str, Any]) -> str:
    if found["rate"] is None:
        return "-"
    first = found["prefers_first"]
    return percent(found["rate"], 1) + ("" if first is None else f", of these {percent(first)} the first")
