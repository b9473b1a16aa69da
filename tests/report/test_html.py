from __future__ import annotations

import base64
import configparser
import hashlib
import json
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from torch import nn

import fxlrd
from fxlrd.app.demo import Comparison, Row
from fxlrd.cli import main
from fxlrd.compression import Result
from fxlrd.differences.compare import diff
from fxlrd.pipeline import Pipeline
from fxlrd.report import html
from fxlrd.report.html import diff_page, page
from fxlrd.report.numbers import error
from fxlrd.report.sides import arranged, part_of_model

ROOT = Path(html.__file__).parents[2]
EVIL = "<script>hacked = 1</script>"
EVILS = [
    EVIL,
    "</script><script>alert(1)</script>",
    "<!--<script>",
    "\"' onload=x",
    "a\u2028b</SCRIPT",
    "&lt;b&gt;",
    "{{ 7*7 }}",
]
EVIL_NAMES = ["script", "closing", "comment", "quotes", "separator", "entity", "template"]
VOID = {"meta", "link", "input", "wbr", "rect"}


class Reader(HTMLParser):
    """Checks that tags are balanced, and collects what is asked of them."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.inside: dict[str, list[str]] = {"script": [], "style": [], "title": [], "h1": [], "caption": []}
        self.text: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"left open: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in self.inside:
            self.inside[tag].append("")
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        for tag in self.open:
            if tag in self.inside:
                self.inside[tag][-1] += data
        if not {"script", "style"} & set(self.open):
            self.text.append(data)

    @property
    def words(self) -> str:
        return " ".join("".join(self.text).split())

    @property
    def data(self):
        def constant(name):
            raise AssertionError(f"{name} is not JSON")

        return json.loads(self.inside["script"][0], parse_constant=constant)

    def attribute(self, tag: str, name: str) -> list[str | None]:
        return [attributes[name] for t, attributes in self.tags if t == tag and name in attributes]


def test_a_page_is_whole_and_loads_nothing(report):
    text = page(report.to_dict(), report.diff)
    read = Reader(text)
    assert text.startswith("<!doctype html>")
    assert len(read.inside["script"]) == 2
    assert read.attribute("link", "href") == ["data:,"]
    assert all(href.startswith("#") for href in read.attribute("a", "href"))
    assert not {"src", "srcset", "action", "onclick", "style"} & {name for _, a in read.tags for name in a}
    assert "url(" not in read.inside["style"][0]
    assert "@import" not in read.inside["style"][0]
    ids = [a["id"] for _, a in read.tags if "id" in a]
    assert len(ids) == len(set(ids))
    targets = {href[1:] for href in read.attribute("a", "href")}
    assert targets <= set(ids)


def test_the_policy_allows_the_pages_own_style_and_script_only(plain):
    read = Reader(page(plain))
    (policy,) = (a["content"] for t, a in read.tags if t == "meta" and a.get("http-equiv") == "Content-Security-Policy")

    def hashed(text):
        return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"

    assert policy.startswith("default-src 'none';")
    assert f"script-src {hashed(read.inside['script'][1])};" in policy
    assert f"style-src {hashed(read.inside['style'][0])};" in policy
    assert "unsafe" not in policy
    assert "http" not in policy


@pytest.mark.parametrize("evil", EVILS, ids=EVIL_NAMES)
def test_text_stays_text_wherever_it_comes_from(evil, plain, report, variants):
    rows = [dict(row, name=f"{evil}.{i}", op=evil, reason=evil) for i, row in enumerate(plain["layers"])]
    passes = [dict(row, text=evil, name=evil, note=evil) for row in plain["passes"]]
    settings = dict(plain["settings"], pipeline=evil, inputs=evil, mode=evil, torch=evil)
    data = plain | {"model": evil, "device": evil, "layers": rows, "passes": passes, "warnings": [evil]}
    drawn = json.loads(json.dumps(report.diff).replace("stage", json.dumps(evil)[1:-1]))
    text = page(data | {"settings": settings}, drawn, [dict(v, name=evil) for v in variants], evil)
    read = Reader(text)
    assert len(re.findall("<script", text, re.IGNORECASE)) == 2
    assert len(re.findall("</script", text, re.IGNORECASE)) == 2
    assert "<!--" not in text
    assert not {"onload", "onmouseover"} & {name for _, a in read.tags for name in a}
    assert read.data["layers"][0]["name"] == f"{evil}.0"
    assert read.data["variants"][0]["name"] == evil
    assert read.inside["h1"] == [evil]
    assert read.words.count(" ".join(evil.split())) > 20


def test_the_headline(plain):
    words = Reader(page(plain)).words
    assert "1.50× as fast as the original" in words
    assert "Latency 20.00 ms from 30.00 ms 1.50× ± 0.10" in words
    before, after = plain["before"], plain["after"]
    assert f"Depth, layers {after['depth']} from {before['depth']}" in words
    assert f"−{100 * (1 - after['params'] / before['params']):.1f} %" in words
    assert "Accuracy" not in words
    moved = error(plain["passes"][-1]["relative_error"])
    assert f"Output error {moved} relative" in words


def test_what_is_not_known_is_not_shown(plain):
    settings = {k: v for k, v in plain["settings"].items() if not k.startswith("speedup")}
    before = dict(plain["before"], depth=None, latency_ms=None)
    after = dict(plain["after"], depth=None, latency_ms=None)
    rows = [dict(row, timings={}, latency_ms=None, latency_ms_before=None) for row in plain["layers"]]
    passes = [dict(row, relative_error=None, step_error=None, max_abs_error=None) for row in plain["passes"]]
    data = plain | {"settings": settings, "before": before, "after": after, "layers": rows, "passes": passes}
    read = Reader(page(data))
    for word in ("Depth", "Latency", "latency", "Output error", "as fast", "Rank against time", "None", "nan"):
        assert word not in read.words, word
    known = Reader(page(data | {"settings": settings | {"output_error": 0.0391}})).words
    assert "Output error 0.0391" in known


@pytest.mark.parametrize(
    ("speed", "spread", "words"),
    [
        (1.5, 0.1, "1.50× as fast as the original"),
        (1.05, 0.1, "As fast as the original, within the noise"),
        (0.5, 0.1, "Slower than the original: 0.50× its speed"),
    ],
)
def test_the_outcome_in_words(speed, spread, words, plain):
    settings = dict(plain["settings"], speedup=speed, speedup_spread=spread)
    assert words in Reader(page(plain | {"settings": settings})).words


def test_numbers_that_json_cannot_hold(plain):
    rows = [dict(row, error=float("nan") if i % 2 else float("inf")) for i, row in enumerate(plain["layers"])]
    data = Reader(page(plain | {"layers": rows})).data
    assert all(layer["error"] is None for layer in data["layers"])


def test_every_layer_has_a_row_and_the_charts_their_data(plain):
    read = Reader(page(plain))
    assert read.attribute("tr", "data-decision") == [row["decision"] for row in plain["layers"]]
    layer = read.data["layers"][1]
    assert layer["chosen"] == "16x16"
    assert layer["latency"] == [2.0, 1.0]
    assert layer["timings"] == [
        ["original", None, 2.0, 1.0, 0.0],
        ["24x24", 24, 1.5, 0.75, 0.02],
        ["16x16", 16, 1.0, 0.5, 0.01],
    ]


def test_reports_know_what_was_timed_also_of_layers_that_stayed():
    model = nn.Sequential(nn.Conv2d(3, 48, 3), nn.Conv2d(48, 48, 3), nn.Conv2d(48, 48, 3), nn.Conv2d(48, 48, 1))
    steps = "decompose{skip=3},snap{seconds=0.05}"
    report = fxlrd.compress(model, torch.randn(1, 3, 12, 12), pipeline=steps, measure=False).report
    rows = {row["name"]: row for row in report.layers}
    for name in ("1", "2"):
        row = rows[name]
        assert row["timings"]["original"]["ratio"] == 1.0
        assert len(row["timings"]) > 1
        assert row["latency_ms_before"] == row["timings"]["original"]["ms"]
        form = "x".join(map(str, row["ranks"])) if row["ranks"] else "original"
        assert row["latency_ms"] == row["timings"][form]["ms"]
    assert rows["3"]["timings"] == {}
    assert rows["3"]["latency_ms"] is None
    json.dumps(report.to_dict())


def test_tables_name_their_rows_and_columns(report, variants):
    read = Reader(page(report.to_dict(), report.diff, variants, "x"))
    scopes = [a.get("scope") for t, a in read.tags if t == "th"]
    assert set(scopes) <= {"col", "row", "colgroup", "rowgroup"}
    boxes = [a for t, a in read.tags if t == "div" and "box" in (a.get("class") or "")]
    assert all(a["tabindex"] == "0" and a["role"] == "region" and a["aria-labelledby"] for a in boxes)
    sortable = [a for t, a in read.tags if t == "th" and "aria-sort" in a]
    assert len(sortable) == 8 + 12  # without latency before and after: nothing was timed


@pytest.mark.parametrize("evil", EVILS, ids=EVIL_NAMES)
def test_a_notebook_shows_headline_and_layers(evil, report):
    rows = [dict(row, name=f"{evil}.{i}", reason=evil) for i, row in enumerate(report.layers)]
    shown = replace(report, model=evil, device=evil, layers=rows, warnings=[evil])
    for result in (shown, Result(nn.Linear(2, 2), shown)):
        text = result._repr_html_()
        read = Reader(text)
        assert {tag for tag, _ in read.tags} <= {"div", "p", "strong", "table", "thead", "tbody", "tr", "th", "td"}
        assert {name for _, a in read.tags for name in a} <= {"scope", "style"}
        assert read.words.count(" ".join(evil.split())) == 3 + 2 * len(rows)
        assert "% fewer parameters" in read.words
        assert "Parameters" in read.words


def test_a_thousand_layers_stay_small(large):
    text = page(large)
    assert len(text.encode()) < 1_500_000
    assert text.count("<tr data-decision") == 1000


# -- the graph


def test_each_node_is_shown_once_and_in_order(report):
    shown = arranged(report.diff)
    rows = [row for block in shown["sections"] for row in block["rows"]]
    untouched = [name for row in rows if isinstance(row, list) for name in row]
    changes = [row for row in rows if isinstance(row, dict)]
    assert untouched == report.diff["untouched"]
    assert [row["name"] for row in changes] == [c["name"] for c in report.diff["changes"]]
    assert len(untouched) + sum(len(row["after"]) for row in changes) == report.diff["after"]["nodes"]
    assert len(untouched) + sum(len(row["before"]) for row in changes) == report.diff["before"]["nodes"]
    for row in changes:
        assert {n["pair"] for n in row["before"]} == {n["pair"] for n in row["after"]}


def test_blocks_that_changed_alike_are_closed_and_say_so():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(32, 32, 3, padding=1)

        def forward(self, x):
            return self.conv(x).relu()

    gm = fxlrd.capture(nn.Sequential(*(Block() for _ in range(4))), torch.randn(1, 32, 8, 8))
    after = Pipeline.parse("decompose")(gm).graph_module
    blocks = [b for b in arranged(diff(gm, after).to_dict())["sections"] if b["changes"]]
    alike = [("0", True, None), ("1", False, "0"), ("2", False, "0"), ("3", False, "0")]
    assert [(b["name"], b["open"], b["alike"]) for b in blocks] == alike


def test_layers_of_one_part_that_changed_alike_say_so():
    layers = [nn.Linear(32, 16), nn.ReLU(), nn.Linear(16, 16), nn.Linear(16, 16)]
    model = nn.Sequential()
    model.add_module("features", nn.Sequential(*layers))
    gm = fxlrd.capture(model, torch.randn(1, 32))
    shown = arranged(diff(gm, Pipeline.parse("decompose")(gm).graph_module).to_dict())
    (section,) = (s for s in shown["sections"] if s["changes"])
    assert (section["name"], section["open"]) == ("features", True)
    changes = [(row["name"], row["alike"]) for row in section["rows"] if isinstance(row, dict)]
    assert changes == [("features.0", None), ("features.2", None), ("features.3", "features.2")]


def test_a_note_is_shown_unless_form_and_ranks_say_the_same():
    gm = fxlrd.capture(nn.Sequential(nn.Linear(32, 32)), torch.randn(1, 32))

    def notes(spec):
        pipeline = Pipeline.parse(spec)
        if pipeline.reads("calibration"):
            pipeline = pipeline.with_options(calibration=[torch.randn(64, 32)])
        data = diff(gm, pipeline(gm)).to_dict()
        (change,) = data["changes"]
        (row,) = (row for section in arranged(data)["sections"] for row in section["rows"] if isinstance(row, dict))
        return change["notes"], row["notes"]

    all_notes, shown = notes("decompose,freeze")
    assert len(all_notes) == 2
    assert shown == all_notes[1:]
    all_notes, shown = notes("calibrate,decompose")
    assert len(all_notes) == 1
    assert shown == all_notes, "that the layer was fitted is in the note only"


@pytest.mark.parametrize(
    ("path", "name"),
    [
        ("layer2.0.downsample.0", "layer2.0"),
        ("bert.encoder.layer.3.attention.self.query", "bert.encoder.layer.3"),
        ("bert.pooler.dense", "bert.pooler"),
        ("features.3", "features"),
        ("fc", "fc"),
    ],
)
def test_a_part_of_the_model_ends_at_its_first_number(path, name):
    assert part_of_model(path) == name


def test_a_page_of_a_diff_alone(report, tmp_path):
    gm = fxlrd.capture(nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32)), torch.randn(1, 32))
    found = diff(gm, Pipeline.parse("decompose")(gm).graph_module)
    found.to_html(tmp_path / "diff.html")
    text = (tmp_path / "diff.html").read_text(encoding="utf-8")
    assert text == diff_page(found.to_dict())
    read = Reader(text)
    assert "2 rewritten" in read.words
    same = Reader(diff_page(diff(gm, gm).to_dict()))
    assert "no changes" in same.words
    assert len(same.attribute("li", "data-pair")) == 0
    assert len(read.attribute("li", "data-pair")) == 2 + 4


# -- files and commands


def test_the_page_is_written_whole_or_not_at_all(report, tmp_path, monkeypatch):
    path = tmp_path / "report.html"
    report.to_html(str(path))
    first = path.read_text(encoding="utf-8")
    assert first == page(report.to_dict(), report.diff)
    with pytest.raises(KeyError):
        replace(report, before={}).to_html(path)
    assert path.read_text(encoding="utf-8") == first
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_the_command_line_writes_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "net_for_html.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    path = tmp_path / "out.html"
    assert main(["compress", "net_for_html:net", "--input", "64", "--html", str(path)]) == 0
    read = Reader(path.read_text(encoding="utf-8"))
    assert read.inside["h1"] == ["net_for_html:net"]
    assert "Graph, before and after" in read.words
    assert main(["ranks", "net_for_html:net", "--input", "64", "--html", str(path)]) == 0
    assert "Rank against time" in Reader(path.read_text(encoding="utf-8")).words
    capsys.readouterr()
    for command in (["compress", "net_for_html:net", "--input", "64"], ["demo"]):
        for where, message in [(tmp_path, "that is a folder"), (tmp_path / "no" / "x.html", "does not exist")]:
            assert main([*command, "--html", str(where)]) == 2
            err = capsys.readouterr().err
            assert err.startswith(f"fxlrd: --html {where}: ")
            assert message in err
            assert err.count("\n") == 1


def test_a_comparison_has_a_page(report, variants, tmp_path):
    rows = tuple(Row(**v) for v in variants)
    comparison = Comparison(rows, "a processor", report)
    comparison.to_html(tmp_path / "demo.html")
    read = Reader((tmp_path / "demo.html").read_text(encoding="utf-8"))
    assert read.data["variants"] == variants
    assert "1.33× ± 0.02" in read.words
    assert "preset auto" in read.words
    assert "1.33× ± 0.02" in comparison.to_table()
    assert "a processor" in comparison.to_table()


@pytest.mark.slow
def test_importing_fxlrd_does_not_import_jinja():
    script = (
        "import sys, torch; before = set(sys.modules); import fxlrd; "
        "print([m for m in sys.modules if m.split('.')[0] in ('jinja2', 'markupsafe') and m not in before])"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_the_templates_are_installed_with_the_package():
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    globs = config["options.package_data"]["fxlrd"].split()
    shipped = {path for glob in globs for path in (ROOT / "fxlrd").glob(glob)}
    files = {path for path in (ROOT / "fxlrd" / "report" / "page").rglob("*") if path.is_file()}
    assert files
    assert files <= shipped
    assert "jinja2" in config["options"]["install_requires"].split()
