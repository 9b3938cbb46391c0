"""The page in headless Chromium: it draws, asks for nothing, and runs its own script alone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from schemas.stages import PageSpec
from tasks.report.run import run

#: Those that are not folded away.
PLOTS = "document.querySelectorAll('.plot:not(#pairs .plot)')"


@pytest.fixture(scope="module")
def page(
    spec: PageSpec, entries: dict[str, Path], tmp_path_factory: pytest.TempPathFactory
) -> Path:
    out_dir = tmp_path_factory.mktemp("page")
    run(spec, entries, out_dir)
    return out_dir / "report.html"


@pytest.fixture
def opened(browser: Any, page: Path) -> Any:
    browser.errors(), browser.requests()
    browser.open(page)
    return browser


def test_every_plot_is_drawn_without_a_complaint(opened: Any) -> None:
    assert opened.run("return document.documentElement.dataset.plots") == "9"
    drawn = opened.run(
        f"return [...{PLOTS}].map(plot => plot.querySelectorAll('.main-svg').length)"
    )
    assert len(drawn) == 9
    assert all(drawn)
    points = opened.run("return document.querySelectorAll('#plot-storage .textpoint').length")
    assert points == 4
    assert opened.errors() == []


def test_the_page_asks_for_nothing_but_itself(opened: Any, page: Path) -> None:
    asked = [url for url in opened.requests() if not url.startswith(("data:", "blob:", "chrome:"))]
    assert asked == [page.as_uri()]
    # plotly.js has a button that uploads a plot's data; the page must not offer it.
    buttons = opened.run(
        "return [...document.querySelectorAll('.modebar-btn')].map(button => button.dataset.title)"
    )
    assert len(buttons) == 9 * 4
    assert not any("loud" in title or "Share" in title for title in buttons)


def test_no_text_of_a_row_runs(opened: Any) -> None:
    assert opened.run("return document.documentElement.dataset.owned ?? null") is None
    # The second wall, the page's policy: a script that got in all the same is not run.
    opened.run(
        "const script = document.createElement('script');"
        "script.textContent = 'document.documentElement.dataset.owned = 1';"
        "document.body.append(script);"
    )
    assert opened.run("return document.documentElement.dataset.owned ?? null") is None


def test_the_loss_can_be_drawn_over_tokens_and_on_a_log_scale(opened: Any) -> None:
    opened.run("document.querySelector('input[value=tokens]').click()")
    opened.run("document.querySelector('input[value=log]').click()")
    drawn = opened.run(
        "const plot = document.getElementById('plot-loss');"
        "return [plot.data[1].x.at(-1), plot.layout.xaxis.title.text, plot.layout.yaxis.type]"
    )
    assert drawn == [4096 * 240, "Tokens seen", "log"]
    assert opened.errors() == []


@pytest.mark.parametrize("width", [400, 768, 1400])
def test_only_tables_scroll_sideways(opened: Any, page: Path, width: int) -> None:
    opened.devtools(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=900,
        deviceScaleFactor=1,
        mobile=False,
    )
    opened.open(page)
    assert opened.run("return document.documentElement.scrollWidth") <= width
    opened.devtools("Emulation.clearDeviceMetricsOverride")


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(opened: Any, page: Path, scheme: str) -> None:
    """WCAG 2.2 asks for a contrast of 4.5 between text and what it stands on."""
    features = [{"name": "prefers-color-scheme", "value": scheme}]
    opened.devtools("Emulation.setEmulatedMedia", features=features)
    opened.open(page)
    paper, *inks = opened.run(
        "const colour = (find, property) => {"
        "  const found = getComputedStyle(document.querySelector(find))[property];"
        "  return found.match(/[0-9.]+/g).slice(0, 3).map(Number);"
        "};"
        "return [colour('body', 'backgroundColor'), colour('body', 'color'),"
        "  colour('.why', 'color'), colour('nav a', 'color'),"
        "  colour('#plot-storage .xtick text', 'fill'),"
        "  colour('#plot-storage .textpoint text', 'fill')]"
    )
    for ink in inks:
        light, dark = sorted([luminance(paper), luminance(ink)], reverse=True)
        assert (light + 0.05) / (dark + 0.05) >= 4.5
    assert (luminance(paper) > 0.5) == (scheme == "light")
    opened.devtools("Emulation.setEmulatedMedia", features=[])


def luminance(colour: list[float]) -> float:
    """The relative luminance of an sRGB colour, 0 to 1, as WCAG 2.2 defines it."""
    linear = [
        part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4
        for part in (value / 255 for value in colour)
    ]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
