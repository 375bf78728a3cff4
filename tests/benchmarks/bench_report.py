"""The report of a long run: seconds to build the page, and to open it in Chromium until samples are shown."""

from __future__ import annotations

import argparse
import tempfile
from functools import partial
from pathlib import Path
from typing import Any

from tests.benchmarks.measure import Seconds, json_output, machine, medians, timed
from tests.unit.evaluation.run_folders import training_run

CHROMIUM = "/usr/bin/chromium"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--samples", type=int, default=20_000, help="in all steps together")
    parser.add_argument("--words", type=int, default=80, help="of a prompt and of a completion")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    with json_output() as emit:
        emit(measure(args))


def measure(args: Any) -> dict[str, Any]:
    from rlaif_ray.evaluation.report.page import write_report

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run = training_run(folder / "run", steps=args.steps, samples=args.samples // args.steps, words=args.words)
        page = folder / "report.html"
        seconds: Seconds = {"build": [timed(lambda: write_report([run], page)) for _ in range(args.rounds)]}
        seconds |= open_page(page, args.rounds)
        return {
            "benchmark": "report",
            **medians(seconds),
            "page_mb": round(page.stat().st_size / 1e6, 2),
            "steps": args.steps,
            "samples": args.samples // args.steps * args.steps,
            **machine(),
        }


def open_page(page: Path, rounds: int) -> Seconds:
    """From asking for the page: until the browser first paints, samples are shown, and every chart is drawn.

    The browser runs already. Also how long a search through all samples takes until its result is shown.
    """
    from playwright.sync_api import sync_playwright

    found: Seconds = {"first_paint": [], "samples_shown": [], "charts_drawn": [], "search": []}
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox"])
        for _ in range(rounds):
            tab = browser.new_page(viewport={"width": 1280, "height": 900})
            tab.goto(page.as_uri())
            tab.wait_for_selector("html[data-drawn=all]", timeout=60_000)
            found["charts_drawn"].append(tab.evaluate("() => performance.now()") / 1000)
            for key, entry in (("first_paint", "first-contentful-paint"), ("samples_shown", "samples")):
                found[key].append(tab.evaluate(f"() => performance.getEntriesByName('{entry}')[0].startTime") / 1000)
            tab.fill("[name=search]", "of step 7:")
            found["search"].append(timed(partial(tab.wait_for_selector, "#cards mark")))
            tab.close()
        browser.close()
    return found


if __name__ == "__main__":
    main()
