"""The page in a real browser: pip install -e '.[browser]', and chromium (Debian: apt-get install chromium)."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from fxlrd.report.html import page as written

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright: pip install -e '.[browser]'")

pytestmark = pytest.mark.slow
EVIL = "<script>hacked = 1</script>"
WIDTHS = [390, 1440]
SCHEMES = ["light", "dark"]


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    names = ("chromium", "chromium-browser", "google-chrome")
    path = os.environ.get("FXLRD_BROWSER") or next(filter(None, map(shutil.which, names)), None)
    if path is None:
        pytest.skip("no browser: install chromium, or set FXLRD_BROWSER to one")
    with playwright.sync_playwright() as p:
        chromium = p.chromium.launch(executable_path=path)
        yield chromium
        chromium.close()


@pytest.fixture
def show(browser, tmp_path) -> Iterator[Callable[..., Any]]:
    """Open a page; at the end nothing may have been requested, and the console has to be empty."""
    events: list[str] = []

    @contextmanager
    def opened() -> Iterator[Callable[..., Any]]:
        contexts = []

        def open_(text: str, width: int = 1440, scheme: str = "light") -> Any:
            path = tmp_path / "page.html"
            path.write_text(text, encoding="utf-8")
            context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
            contexts.append(context)
            tab = context.new_page()
            tab.set_default_timeout(10_000)
            tab.on("console", lambda m: events.append(f"console: {m.text}"))
            tab.on("pageerror", lambda e: events.append(f"error: {e}"))
            tab.on("dialog", lambda d: events.append(f"dialog: {d.message}"))
            tab.on("request", lambda r: events.append(r.url) if r.url != path.as_uri() and r.url != "data:," else None)
            tab.goto(path.as_uri())
            return tab

        yield open_
        for context in contexts:
            context.close()

    with opened() as open_:
        yield open_
    assert events == []


@pytest.fixture
def full(plain, report, variants) -> str:
    """A page with every section."""
    return written(plain | {"warnings": ["a warning"]}, report.diff, variants, "About it.")


def names(tab) -> list[str]:
    return tab.locator("#layer-table tbody tr:visible th").all_inner_texts()


def header(tab, name: str):
    return tab.locator("#layer-table").get_by_role("button", name=name, exact=True)


def test_nothing_is_loaded_and_nothing_fails(show, full):
    tab = show(full)
    assert tab.locator("h1").inner_text() == "Sequential"
    assert tab.locator("[data-chart] svg[role=img]").count() == 3


def test_the_policy_stops_what_would_be_loaded(browser, full, tmp_path):
    path = tmp_path / "page.html"
    path.write_text(full, encoding="utf-8")
    tab = browser.new_page()
    tab.goto(path.as_uri())
    stopped = tab.evaluate(
        """async () => {
            const stopped = [];
            addEventListener("securitypolicyviolation", (e) => stopped.push(e.effectiveDirective));
            await fetch("http://127.0.0.1:9/").catch(() => {});
            const image = new Image(); image.src = "http://127.0.0.1:9/x.png"; document.body.append(image);
            const script = document.createElement("script"); script.textContent = "hacked = 2";
            document.body.append(script);
            await new Promise((done) => setTimeout(done, 200));
            return [...stopped, typeof hacked];
        }"""
    )
    tab.close()
    assert sorted(stopped) == ["connect-src", "img-src", "script-src-elem", "undefined"]


def test_markup_in_names_is_text(show, full):
    tab = show(full)
    assert EVIL in names(tab)
    assert tab.evaluate("typeof hacked") == "undefined"
    assert tab.locator("script").count() == 2
    tab.locator("[data-chart=profile] summary").click()
    assert EVIL in tab.locator("[data-chart=profile] table th").all_inner_texts()


def test_sorting(show, full, plain):
    tab = show(full)
    order = [row["name"] for row in plain["layers"]]
    assert names(tab) == order
    header(tab, "parameters before").click()
    head = tab.locator("#layer-table th[aria-sort=descending]")
    assert head.count() == 1
    assert "before" in head.inner_text()
    sizes = {row["name"]: row["params_before"] for row in plain["layers"]}
    assert [sizes[n] for n in names(tab)] == sorted(sizes.values(), reverse=True)
    header(tab, "parameters before").click()
    assert [sizes[n] for n in names(tab)] == sorted(sizes.values())
    header(tab, "layer").click()
    assert tab.locator("#layer-table th[aria-sort=ascending]").inner_text().startswith("layer")
    assert sorted(names(tab), key=str.lower) != order
    assert names(tab)[-1] == "stem"
    # Empty cells come last in either direction.
    for _ in range(2):
        header(tab, "latency after").click()
        assert set(names(tab)[:2]) == {"stage.0.0", "stage.1.0"}
    header(tab, "#").click()
    assert names(tab) == order


def test_filtering(show, full, plain):
    tab = show(full)
    status = tab.locator("#layers [role=status]")
    count = len(plain["layers"])
    assert status.inner_text() == f"{count} layers"
    search = tab.get_by_role("searchbox", name="Filter")
    search.fill("STAGE conv2d")
    assert names(tab) == ["stage.0.0", "stage.1.0"]
    assert status.inner_text() == f"2 of {count} layers"
    search.fill("nowhere")
    assert names(tab) == []
    assert tab.get_by_text("No layer matches the filter.").is_visible()
    search.fill("")
    tab.get_by_role("checkbox", name="skipped").uncheck()
    assert names(tab) == [row["name"] for row in plain["layers"] if row["decision"] != "skipped"]
    header(tab, "layer").click()
    assert "stem" not in names(tab)


def test_blocks_of_the_graph_open_and_close(show, full):
    tab = show(full)
    blocks = tab.locator(".blocks > details")
    stage = blocks.filter(has=tab.locator("summary", has_text=re.compile(r"^stage\.0")))
    assert stage.get_attribute("open") is not None
    assert stage.locator(".node").first.is_visible()
    stage.locator("> summary").click()
    assert not stage.locator(".node").first.is_visible()
    tab.get_by_role("button", name="Open all").click()
    assert tab.locator(".blocks > details:not([open])").count() == 0
    tab.get_by_role("button", name="Close all").click()
    assert tab.locator(".blocks > details[open]").count() == 0
    stage.locator("> summary").focus()
    tab.keyboard.press("Enter")
    assert stage.locator(".node").first.is_visible()


def test_pointing_at_a_node_marks_its_counterparts(show, full):
    tab = show(full)
    change = tab.locator("tbody.change").filter(has_text="stage.0.0").first
    change.locator("td").nth(0).locator(".node").hover()
    marked = tab.locator(".node.paired")
    assert marked.count() == 4
    assert change.locator("td").nth(1).locator(".node.paired").count() == 3
    assert marked.first.evaluate("n => getComputedStyle(n).outlineStyle") == "solid"
    change.locator("td").nth(1).locator(".node").nth(2).hover()
    assert change.locator("td").nth(0).locator(".node.paired").count() == 1
    tab.locator("h1").hover()
    assert marked.count() == 0


def test_the_keyboard_is_enough(show, full, plain):
    tab = show(full)
    tab.keyboard.press("Tab")
    assert tab.evaluate("document.activeElement.className") == "jump"
    stops = set()
    for _ in range(80):
        tab.keyboard.press("Tab")
        at = tab.evaluate(
            """() => {
                const e = document.activeElement, s = getComputedStyle(e);
                return [e.tagName + "." + (e.getAttribute("class") ?? ""), s.outlineStyle, parseFloat(s.outlineWidth)];
            }"""
        )
        if at[0] == "BODY.":
            break
        stops.add(at[0])
        assert at[1] != "none", f"{at[0]} shows no focus"
        assert at[2] >= 1
    assert {"A.", "BUTTON.", "SELECT.", "INPUT.", "svg.", "SUMMARY.", "DIV.box tall", "LI.node went paired"} <= stops
    header(tab, "error").focus()
    tab.keyboard.press("Enter")
    assert names(tab)[0] == max((row for row in plain["layers"] if row["ranks"]), key=lambda row: row["error"])["name"]
    # The chart by layer: arrows move, Enter shows the layer's ranks.
    tab.locator("[data-chart=profile] svg[role=img]").focus()
    readout = tab.locator("[data-chart=profile] .readout")
    tab.keyboard.press("ArrowRight")
    assert readout.inner_text().startswith("stem")
    tab.keyboard.press("End")
    assert readout.inner_text().startswith("head")
    tab.keyboard.press("Home")
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("ArrowRight")
    tab.keyboard.press("Enter")
    assert tab.locator("[data-chart=curve] select").input_value() == "stage.1.0"
    # The graph: one stop a block, arrows within it.
    first = tab.locator(".blocks .node.went").first
    first.focus()
    tab.keyboard.press("ArrowRight")
    assert tab.evaluate("document.activeElement.className") == "node came paired"
    tab.keyboard.press("ArrowDown")
    assert tab.evaluate("document.activeElement.querySelector('b').textContent") == ".core"
    tab.keyboard.press("ArrowLeft")
    assert first.evaluate("n => n === document.activeElement")


def test_charts_have_words_and_tables(show, full, plain, variants):
    tab = show(full)
    for chart in ("frontier", "profile", "curve"):
        svg = tab.locator(f"[data-chart={chart}] svg[role=img]")
        assert svg.locator("> title").text_content()
        assert svg.locator("> desc").text_content()
    tab.locator("[data-chart=profile] summary").click()
    assert tab.locator("[data-chart=profile] tbody tr").count() == len(plain["layers"])
    assert "original" in tab.locator("#variants table").inner_text()
    curve = tab.locator("[data-chart=curve]")
    assert curve.locator(".ring").count() == 1
    assert "taken: 16×16" in curve.locator("svg").inner_html()
    curve.locator("summary").click()
    rows = curve.locator("tbody tr")
    assert rows.count() == 3
    assert "taken" in rows.nth(2).inner_text()
    assert curve.locator("option").all_inner_texts() == ["stage.0.0", "stage.1.0"]
    before = curve.locator("select").input_value()
    curve.get_by_role("button", name="Next layer").click()
    assert curve.locator("select").input_value() != before
    frontier = tab.locator("[data-chart=frontier]")
    assert frontier.locator("text.title").all_text_contents() == [v["name"] for v in variants]
    assert "0.0 times" not in frontier.locator("desc").text_content()
    tab.get_by_role("radio", name="parameters").check()
    assert "426,076" in frontier.locator("desc").text_content()


def test_pointing_at_the_chart_tells_the_layer(show, full):
    tab = show(full)
    svg = tab.locator("[data-chart=profile] svg[role=img]")
    box = svg.bounding_box()
    svg.hover(position={"x": box["width"] - 10, "y": 60})
    assert tab.locator("[data-chart=profile] .readout").inner_text().startswith("head")


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("scheme", SCHEMES)
def test_readable_at_every_width_and_in_both_schemes(width, scheme, show, full):
    tab = show(full, width, scheme)
    tab.get_by_role("button", name="Open all").click()
    for summary in tab.locator("details.data > summary").all():
        summary.click()
    assert tab.evaluate("document.documentElement.scrollWidth") == width
    if width == 390:
        assert tab.locator("#layers .box").evaluate("b => b.scrollWidth > b.clientWidth")
    dark = tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (max(map(int, dark[4:-1].split(","))) < 64) == (scheme == "dark")
    low = tab.evaluate(CONTRAST)
    assert low == []


CONTRAST = """() => {
    // WCAG 2: contrast of every text with what is behind it, 4.5 or more.
    const rgb = (c) => c.match(/[\\d.]+/g).map(Number);
    const light = (c) => {
        const linear = (v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        const [r, g, b] = c.slice(0, 3).map((v) => linear(v / 255));
        return 0.2126 * r + 0.7152 * g + 0.0722 * b;
    };
    const behind = (e) => {
        for (; e; e = e.parentElement) {
            const c = rgb(getComputedStyle(e).backgroundColor);
            if (c.length === 3 || c[3] === 1) return c;
        }
        return [255, 255, 255];
    };
    const low = new Set();
    const walk = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    while (walk.nextNode()) {
        const e = walk.currentNode.parentElement;
        if (!walk.currentNode.data.trim() || !e.getClientRects().length) continue;
        if (["SCRIPT", "STYLE", "OPTION"].includes(e.tagName)) continue;
        const style = getComputedStyle(e);
        const color = rgb(e.namespaceURI.endsWith("svg") ? style.fill : style.color);
        const [a, b] = [light(color), light(behind(e))].sort((x, y) => y - x);
        const ratio = (a + 0.05) / (b + 0.05);
        if (ratio < 4.5) low.add(`${e.tagName}.${e.getAttribute("class")} ${ratio.toFixed(2)}`);
    }
    return [...low];
}"""


def test_in_print_tables_are_whole_and_controls_gone(show, full):
    tab = show(full)
    tab.emulate_media(media="print")
    assert not tab.locator("nav").is_visible()
    assert not tab.get_by_role("searchbox").is_visible()
    assert tab.locator("#layers .box").evaluate("b => getComputedStyle(b).overflow") == "visible"
    assert tab.locator("#layer-table tbody tr:visible").count() == tab.locator("#layer-table tbody tr").count()


def test_a_thousand_layers_can_be_used(show, large):
    tab = show(written(large))
    header(tab, "error").click()
    assert names(tab)[0] == "encoder.blocks.249.conv3"
    tab.get_by_role("searchbox").fill("blocks.24.")
    assert len(names(tab)) == 4
    assert tab.locator("[data-chart=profile] svg[role=img] *").count() < 600
    assert tab.evaluate("document.documentElement.scrollWidth") == 1440


def test_without_scripts_the_tables_are_there(browser, full, tmp_path, plain):
    path = tmp_path / "page.html"
    path.write_text(full, encoding="utf-8")
    context = browser.new_context(java_script_enabled=False)
    tab = context.new_page()
    tab.goto(path.as_uri())
    assert names(tab) == [row["name"] for row in plain["layers"]]
    context.close()
