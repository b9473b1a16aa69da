"""The benchmarks are not run by the tests, but each of them imports what it needs."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import nn

import bench
import fxlrd
from fxlrd import FxlrdError
from fxlrd.errors import BudgetError

RESULTS = Path(bench.__file__).parent / "results"
MODULES = sorted(path.stem for path in Path(bench.__file__).parent.glob("*.py") if not path.stem.startswith("__"))


@pytest.mark.parametrize("name", MODULES)
def test_a_benchmark_imports(name):
    importlib.import_module(f"bench.{name}")


@pytest.mark.parametrize("file", sorted(RESULTS.glob("*.json")), ids=lambda file: file.stem)
def test_a_published_table_is_that_of_its_cells(file):
    content = json.loads(file.read_text())
    made_by = importlib.import_module(content["command"].split()[2])
    assert content["rows"] == json.loads(json.dumps(made_by.rows(content["cells"])))


def test_every_section_is_a_module():
    from bench.__main__ import SECTIONS

    assert set(SECTIONS) <= set(MODULES)


def test_what_is_left_alone_is_a_share_of_the_layers_that_could_be_decomposed():
    from bench.left_alone import LeftAlone

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding, self.head = nn.Embedding(9, 32), nn.Linear(32, 9, bias=False)
            self.head.weight = self.embedding.weight
            self.a, self.b = nn.Linear(32, 32), nn.Linear(32, 32)
            self.experts = nn.Parameter(torch.randn(2, 32, 32))

        def forward(self, ids):
            return self.head(self.b(self.a(self.embedding(ids))) @ self.experts[0] @ self.experts[1])

    model = Model().eval()
    model.b.register_forward_hook(lambda *_: None)
    report = fxlrd.compress(model, torch.zeros(2, 3, dtype=torch.long), ratio=2, measure=False).report
    alone = LeftAlone.of(model, report)
    assert alone.reasons == {"hooks": 0.5}
    assert alone.held_by_no_layer == 2048 / (2048 + 2 * 1056)
    assert str(alone) == "50.0%: 50.0% hooks; 49.2% no layer holds"


def test_models_of_a_library_that_is_not_installed_are_left_out(monkeypatch, capsys):
    from bench import zoo

    def missing():
        raise ImportError

    monkeypatch.setattr(zoo.COLLECTIONS["timm"], "names", missing)
    assert zoo.names("resnet50") == ["resnet50"]
    assert capsys.readouterr().out == ""
    with pytest.raises(FxlrdError, match="no model of torchvision"):
        zoo.names("timm:*")
    (line,) = capsys.readouterr().out.splitlines()
    assert "timm is not installed" in line


def test_a_cell_is_measured_once_and_a_file_of_other_settings_is_refused(tmp_path):
    from bench.cells import Results

    path, about = tmp_path / "table.json", {"title": "T", "machine": "M", "command": "C"}
    for figure in (1, 2):
        results = Results(path, {"torch": "2"}, about, lambda cells: [{"figure": cells["a"]["figure"]}])
        assert results.cell("a", lambda f=figure: {"figure": f}) == {"figure": 1}
    assert json.loads(path.read_text())["rows"] == [{"figure": 1}]
    with pytest.raises(SystemExit, match="is of other settings"):
        Results(path, {"torch": "3"})


def test_a_change_that_its_spread_covers_shows_no_difference():
    from bench.speed import change

    assert change({"ratio": 0.8, "spread": 0.064}) == "+25.0 ± 10.0"
    assert change({"ratio": 0.8, "spread": 0.192}) == "+25.0 ± 30.0 (no difference shown)"
    assert change({"ratio": 1.25, "spread": 0.0}) == "-20.0 ± 0.0"


def test_activation_scaled_factors_are_the_best_for_the_scaled_weight():
    from bench.asvd import mean_magnitudes, refactor, scaled_svd

    torch.manual_seed(0)
    layer = nn.Linear(12, 8).double()
    model, x = nn.Sequential(layer), torch.randn(40, 12, dtype=torch.float64) * torch.logspace(-2, 1, 12)
    magnitudes = mean_magnitudes({"0": layer}, lambda: (model(x[:25]), model(x[25:])))
    torch.testing.assert_close(magnitudes["0"], x.abs().mean(0), rtol=1e-12, atol=0)
    assert not layer._forward_pre_hooks
    scale = magnitudes["0"].sqrt()
    first, last = scaled_svd(layer.weight, magnitudes["0"], 3)
    residual = ((layer.weight - last @ first) * scale).norm()
    optimal = torch.linalg.svdvals(layer.weight * scale)[3:].norm()
    torch.testing.assert_close(residual, optimal, rtol=1e-9, atol=0)
    made = fxlrd.passes.Decompose(ratio=2.0)(fxlrd.capture(model, x)).graph_module
    refactor(made, magnitudes)
    (rank,) = (module.out_features for name, module in made.named_modules() if name.endswith("first"))
    first, last = scaled_svd(layer.weight, magnitudes["0"], rank)
    torch.testing.assert_close(made(x), x @ (last @ first).T + layer.bias, rtol=1e-9, atol=1e-12)


def test_factors_of_a_model_that_keeps_its_own_forward_are_scaled_by_what_its_layers_read():
    from bench.asvd import scaled_svd
    from bench.transformers import _scaled

    class Untraced(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.second = nn.Linear(12, 12), nn.Linear(12, 12)

        def forward(self, x):
            y = self.first(x).relu()
            return self.second(y) if float(y.sum()) >= 0 else y

    torch.manual_seed(0)
    model, x = Untraced().double(), torch.randn(40, 12, dtype=torch.float64) * torch.logspace(-2, 1, 12)
    subject = SimpleNamespace(model=model, calibration=[{"x": x}], skip=())
    made = _scaled(subject, [0.5])[0.5]
    first, last = scaled_svd(model.first.weight, x.abs().mean(0), made.first.first.out_features)
    torch.testing.assert_close(made.first(x), x @ (last @ first).T + model.first.bias, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("table1", []),
        ("table2", []),
        ("table3", []),
        ("fig2", []),
        ("fig5", []),
        ("attained", []),
        ("tables456", ["--systems", "original;Vanilla LRD"]),
        ("drops", []),
        ("frontier", ["--methods", "auto,lrd"]),
        ("scaling", []),
        ("peers", ["--here", "--methods", "original;torch-pruning, 30 %;fxlrd lrd"]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_table_is_made_and_goes_on_where_it_stopped(name, options, monkeypatch, capsys, tmp_path):
    from bench import speed

    table = importlib.import_module(f"bench.{name}")
    path = tmp_path / f"{name}.json"
    monkeypatch.setenv("FXLRD_CACHE_DIR", str(tmp_path))
    table.main(["--quick", "--json", str(path), *options])
    content = json.loads(path.read_text())
    assert content.keys() >= {"title", "machine", "date", "command", "settings", "cells", "rows"}
    figures = [row[head] for row in content["rows"] for head in row if "(paper)" not in head]
    assert not [figure for figure in figures if figure in ("0", "0.00")]
    monkeypatch.setattr(speed, "infer", None)  # which would fail: it is not measured again
    table.main(["--quick", "--json", str(path), *options])
    assert json.loads(path.read_text())["rows"] == content["rows"]
    assert content["title"] in capsys.readouterr().out


@pytest.mark.slow
def test_the_peak_of_a_small_model_is_measured_in_fresh_processes(tmp_path):
    """Of a model so small, buffers of libraries are most of the peak: only what must be so is checked."""
    from bench.memory import main

    main(["linears_small", "--json", str(tmp_path / "rows.json")])
    (row,) = json.loads((tmp_path / "rows.json").read_text())
    assert row["in"] == 16 * (512 * 512 + 512) * 4
    assert row["out"] < 0.6 * row["in"]
    assert row["peak"] > row["in"] + 0.9 * row["out"]


def test_the_gpu_benchmark_says_why_it_is_skipped(monkeypatch, capsys, tmp_path):
    from bench.cuda import main

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    main(["--json", str(tmp_path / "rows.json")])
    assert capsys.readouterr().out.startswith("bench.cuda: skipped: torch sees no CUDA device")
    assert not [*tmp_path.iterdir()]


@pytest.mark.slow
def test_the_gpu_benchmark_runs_on_a_cpu_and_goes_on_where_it_stopped(monkeypatch, capsys, tmp_path):
    from bench import cuda, cuda_jobs

    path = tmp_path / "rows.json"
    command = ["--device", "cpu", "--quick", "--json", str(path)]
    cuda.main([*command, "--only", "staircase"])
    assert list(json.loads(path.read_text())["rows"]) == ["staircase float32"]
    cuda.main([*command, "--seconds", "0"])  # one job starts
    rows = json.loads(path.read_text())["rows"]
    assert list(rows) == ["staircase float32", "compress tiny"]
    assert list(rows["compress tiny"]) == ["lrd", "ranks", "merge", "auto"]
    monkeypatch.setattr(cuda_jobs, "_staircase", dict)  # which would fail: it is not measured again
    cuda.main(command)
    rows = json.loads(path.read_text())["rows"]
    assert list(rows["vision tiny float32 2 CUDA graphs"]) == ["original", "lrd", "ranks", "merge", "auto"]
    assert not [name for name, row in rows.items() if "failed" in row]
    assert "9 of 9 jobs are in" in capsys.readouterr().out
    path.write_text(path.read_text().replace('"quick": true', '"quick": false'))
    with pytest.raises(SystemExit, match="is of another setting"):
        cuda.main(command)


def test_a_budget_out_of_reach_is_a_row_of_the_int8_benchmark(monkeypatch):
    from bench import int8

    def compress(model, x, budget=None, **options):
        if budget is not None:
            raise BudgetError("allocate: latency=0.7 is out of reach")
        return SimpleNamespace(model=model)

    monkeypatch.setattr(int8.fxlrd, "compress", compress)
    monkeypatch.setattr(int8, "load", lambda train: None)  # the images may not be there
    subject = int8.Subject("fashion", 50, SimpleNamespace(quick=False))
    assert list(subject.made()) == ["original", "ranks", "merge"]
    timed = {"original, int8": {"seconds": 0.1, "ratio": 0.5, "spread": 0.01}}
    cell = timed | {preset: {"refused": reason} for preset, reason in subject.refused.items()}
    table = int8.rows({"fashion, batch 50, Inductor": cell})
    assert [row["ms"] for row in table] == ["100", "", "", ""]
    assert all(row["variant"].endswith(": allocate: latency=0.7 is out of reach") for row in table[1:])
    assert len({tuple(row) for row in table}) == 1, "all rows have the same columns"


@pytest.mark.slow
def test_the_int8_benchmark_runs_or_says_what_it_needs(capsys, tmp_path):
    from bench.int8 import main

    path = tmp_path / "rows.json"
    main(["--quick", "--json", str(path)])
    if not path.exists():
        assert capsys.readouterr().out == "bench.int8: skipped: it needs torchao (pip install torchao)\n"
        return
    cells = json.loads(path.read_text())["cells"]
    assert "fashion, batch 50, Inductor" in cells
    for cell in cells.values():
        assert list(cell) == ["original, fp32", "original, int8", "lrd, fp32", "lrd, int8"]
        assert cell["original, fp32"]["accuracy"] == pytest.approx(0.9495, abs=0.002)
        assert cell["original, int8"]["accuracy"] > 0.93
