"""The report in a real browser: Debian's chromium, driven by playwright."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from rlaif_ray.evaluation.report.page import write_report
from tests.pace import scaled
from tests.unit.evaluation.run_folders import NASTY, evaluation_run, training_run, write_rows

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

CHROMIUM = Path("/usr/bin/chromium")  # playwright's own download needs a network
pytestmark = [
    pytest.mark.slow,
    pytest.mark.long,
    pytest.mark.skipif(not CHROMIUM.exists(), reason=f"{CHROMIUM} is missing: apt-get install chromium"),
]


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    sync_api = pytest.importorskip("playwright.sync_api")
    with sync_api.sync_playwright() as playwright:
        # Chromium's own sandbox does not start as root; the page is ours.
        browser = playwright.chromium.launch(executable_path=str(CHROMIUM), args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training runs of one set of prompts, and an evaluation."""
    folder = tmp_path_factory.mktemp("report")
    one, two = (
        training_run(folder / f"{n}-run", steps=80, samples=8, seed=k) for k, n in enumerate(["first", "second"])
    )
    rows = [{"step": 1, "prompt": "A long one", "completion": "word " * 500, "score": 0.5}]
    write_rows(two / "samples.jsonl", rows)
    write_report([one, two, evaluation_run(folder / "evaluation")], folder / "report.html")
    return folder / "report.html"


class Opened:
    """The page, opened, and everything that it complained of or asked for."""

    def __init__(self, browser: Browser, report: Path, **context: Any) -> None:
        self._context = browser.new_context(**context)
        self.page: Page = self._context.new_page()
        self.complaints: list[str] = []
        self.requests: list[str] = []
        self.page.on("console", lambda message: self.complaints.append(f"{message.type}: {message.text}"))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.on("dialog", lambda dialog: self.complaints.append(f"dialog: {dialog.message}"))
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.goto(report.as_uri())
        self.page.wait_for_selector("#cards article")
        self.page.wait_for_selector("html[data-drawn=all]")

    def close(self) -> None:
        """Ends it; by then it must have complained of nothing and asked for nothing but itself."""
        requests = list(self.requests)
        self._context.close()
        assert self.complaints == []
        assert len(requests) == 1 and requests[0].startswith("file://"), requests

    def found(self, count: str) -> None:
        """Waits until the samples' count says this."""
        self.page.wait_for_selector(f"#count:has-text('{count}')", timeout=scaled(5000))

    def keep(self, name: str, folder: Path) -> None:
        """A screenshot, beside the test's files and where RLAIF_SCREENSHOTS says."""
        self.page.screenshot(path=folder / name, full_page=True)
        assert (folder / name).stat().st_size > 20_000
        if os.environ.get("RLAIF_SCREENSHOTS"):
            Path(os.environ["RLAIF_SCREENSHOTS"]).mkdir(parents=True, exist_ok=True)
            shutil.copy(folder / name, os.environ["RLAIF_SCREENSHOTS"])


def test_charts_are_drawn(browser: Browser, report: Path, tmp_path: Path) -> None:
    opened = Opened(browser, report, viewport={"width": 1280, "height": 900}, color_scheme="light")
    page = opened.page
    drawn = page.locator("#curves .drawing .scatterlayer .js-line")
    assert drawn.count() >= 10
    lines = [drawn.nth(k).get_attribute("d") or "" for k in range(drawn.count())]
    assert not any("NaN" in line for line in lines)
    assert sum(len(line) > 500 for line in lines) >= 2 * 7  # some seven metrics of two runs, 80 steps each
    assert page.locator(".drawing:not([data-drawn])").count() == page.locator("#more .drawing").count() > 0
    page.locator("#more summary").click()
    page.wait_for_selector("#more .drawing[data-drawn] .js-line")
    opened.keep("report-light.png", tmp_path)
    opened.close()


def test_a_run_is_hidden_in_all_charts(browser: Browser, report: Path) -> None:
    opened = Opened(browser, report)
    reward = opened.page.locator(".drawing").first.locator(".js-line")
    before = reward.count()
    opened.page.click("button[data-run='1']")
    assert reward.count() == before // 2
    opened.page.click("button[data-run='1']")
    assert reward.count() == before
    opened.close()


def test_search_and_filters(browser: Browser, report: Path) -> None:
    opened = Opened(browser, report)
    page = opened.page
    groups = 80 * 2 + 1 + 3
    opened.found(f"{groups} of {groups} prompts")
    assert page.locator("#cards article").count() == 20
    page.fill("[name=search]", "Prompt 1 of step 42:")
    opened.found(f"1 of {groups}")
    assert page.locator("#cards mark").first.inner_text() == "Prompt 1 of step 42:"
    assert page.locator("#cards .response").count() == 4
    page.fill("[name=search]", "ZEBRA")  # in a rationale, which opens
    page.wait_for_selector("#cards details[open] mark:has-text('zebra')", timeout=scaled(5000))
    page.fill("[name=search]", "")
    page.fill("[name=step_low]", "79")
    opened.found(f"4 of {groups}")
    page.fill("[name=step_low]", "")
    page.select_option("[name=run]", label="second-run")
    opened.found(f"1 of {groups}")
    page.select_option("[name=run]", "")
    page.select_option("[name=show]", "place")
    page.wait_for_selector("#cards .verdicts:has-text('the place decides')", timeout=scaled(5000))
    page.select_option("[name=show]", "people")
    page.wait_for_selector("#cards .verdicts:has-text('against the judge')", timeout=scaled(5000))
    page.select_option("[name=show]", "failed")
    opened.found(f"91 of {groups}")  # every 7th of 640, in groups of 4
    assert "failed: refused" in page.locator("#cards").inner_text()
    page.select_option("[name=show]", "")
    page.fill("[name=score_low]", "0.99")
    page.select_option("[name=order]", "high")
    page.wait_for_selector("#cards article:first-child .score:has-text('0.99')", timeout=scaled(5000))
    scores = page.locator("#cards article").first.locator(".score").all_inner_texts()
    assert max(float(score) for score in scores if not score.startswith("failed")) >= 0.99
    opened.close()


def test_pages_of_samples(browser: Browser, report: Path) -> None:
    opened = Opened(browser, report)
    first = opened.page.locator("#cards article").first.inner_text()
    opened.page.click("#later")
    assert opened.page.locator("#page").inner_text() == "2 of 9"
    assert opened.page.locator("#cards article").first.inner_text() != first
    opened.page.click("#earlier")
    assert opened.page.locator("#cards article").first.inner_text() == first
    assert opened.page.locator("#earlier").is_disabled()
    opened.close()


def test_what_a_model_wrote_stays_text(browser: Browser, report: Path) -> None:
    opened = Opened(browser, report)
    page = opened.page
    first = page.locator("#cards .response .text").first
    assert first.text_content() == NASTY
    assert page.locator("#cards img, #cards script, #cards .text b").count() == 0
    page.fill("[name=search]", "<script>alert(1)")
    opened.found("2 of 164")
    assert page.locator("#cards mark").first.text_content() == "<script>alert(1)"
    opened.close()


def test_long_texts_unfold(browser: Browser, report: Path) -> None:
    opened = Opened(browser, report)
    page = opened.page
    page.fill("[name=search]", "a long one")
    opened.found("1 of 164")
    text = page.locator("#cards .text.folded")
    folded = text.bounding_box()
    page.click("#cards .unfold")
    unfolded = page.locator("#cards .response .text").bounding_box()
    assert folded and unfolded and unfolded["height"] > 1.5 * folded["height"]
    opened.close()


def test_readable_on_a_phone(browser: Browser, report: Path, tmp_path: Path) -> None:
    opened = Opened(browser, report, viewport={"width": 390, "height": 844}, is_mobile=True, has_touch=True)
    opened.page.locator("#more summary").click()
    opened.page.wait_for_selector("#more .drawing[data-drawn]")
    assert opened.page.evaluate("() => document.documentElement.scrollWidth") <= 390
    assert (
        opened.page.evaluate("() => parseFloat(getComputedStyle(document.querySelector('#cards .text')).fontSize)")
        >= 14
    )
    opened.keep("report-phone.png", tmp_path)
    opened.close()


def test_dark_as_the_system_is_and_by_hand(browser: Browser, report: Path, tmp_path: Path) -> None:
    opened = Opened(browser, report, viewport={"width": 1280, "height": 900}, color_scheme="dark")
    page = opened.page

    def seen() -> tuple[str, str, str]:
        """Colours of the ground, of the first curve, and of its axis' figures."""
        script = "(s) => getComputedStyle(document.querySelector(s))"
        ground = page.evaluate(f"() => ({script})('body').backgroundColor")
        line = page.evaluate(f"() => ({script})('.drawing .js-line').stroke")
        return ground, line, page.evaluate(f"() => ({script})('.drawing .xtick text').fill")

    dark = seen()
    opened.keep("report-dark.png", tmp_path)
    page.click("#theme")
    light = seen()
    assert all(one != other for one, other in zip(dark, light, strict=True))
    page.click("#theme")
    assert seen() == dark and page.locator("#theme").inner_text() == "Theme: dark"
    opened.close()
