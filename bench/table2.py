"""The paper's Table 2: ranks of early and late layers of ResNet-152 at 2×, and where `snap` moves them.

``python -m bench.table2 [--all] [--search algorithm1] [--quick]`` prints the published ranks beside those of this
machine and stores them in a JSON file (``--json``, default build/bench/table2.json); a setting that is there is not
measured again. ORG says that the factors are not faster than the original layer by more than the noise: it comes
back. A rank that stays gains less than the noise at every step below it. The paper's network has 1001 classes,
torchvision's 1000.
"""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence

from bench import settings
from bench.cells import Cells, Rows
from bench.models import image_model
from bench.settings import Setting, measured, parser, read
from fxlrd import capture
from fxlrd.graph.layer import layers_of
from fxlrd.layers.forms import Ranks, ranks_text
from fxlrd.passes import Decompose, Snap
from fxlrd.passes.contract import PassResult
from fxlrd.passes.snap import SEARCHES
from fxlrd.progress import bar

PUBLISHED = {
    "layer1.0.conv1": ("64 → 64, 1×1", "16", "ORG"),
    "layer1.0.conv2": ("64 → 64, 3×3", "38", "32"),
    "layer1.0.conv3": ("64 → 256, 1×1", "25", "24"),
    "layer4.2.conv1": ("2048 → 512, 1×1", "204", "202"),
    "layer4.2.conv2": ("512 → 512, 3×3", "309", "308"),
    "layer4.2.conv3": ("512 → 2048, 1×1", "204", "200"),
    "fc": ("2048 → 1000 (paper: 1001)", "335", "253"),
}
"""By layer: channels and kernel, ranks at 2×, and optimised."""


def main(argv: Sequence[str] | None = None) -> None:
    options = parser("table2")
    options.add_argument("--search", default=SEARCHES[0], choices=SEARCHES)
    arguments = read(options, argv)
    model = "tiny" if arguments.quick else "resnet152"
    title = "Table 2: ranks of ResNet-152 at 2× and optimised"
    results = settings.results(arguments, title, rows, search=arguments.search, model=model)
    results.cell("ranks at 2×", lambda: _ranks(model, Setting("eager", "NCHW", "fp32", 1), arguments))
    for setting in arguments.settings:
        results.cell(f"optimised, {setting}", lambda s=setting: _optimised(model, s, arguments))
    results.write()
    print(results.text())


def _decomposed(model: str, setting: Setting, arguments: Namespace) -> PassResult:
    gm = capture(*image_model(model, setting, arguments.image, arguments.device))
    others = [layer.origin for layer in layers_of(gm) if layer.origin not in PUBLISHED]
    return Decompose(ratio=2.0, skip=others)(gm)


def _ranks(model: str, setting: Setting, arguments: Namespace) -> dict[str, str]:
    return {site.name: _one(site.ranks) for site in _decomposed(model, setting, arguments).sites}


def _optimised(model: str, setting: Setting, arguments: Namespace) -> dict[str, str]:
    decomposed = _decomposed(model, setting, arguments)
    snap = Snap(compile=setting.compiled, search=arguments.search, cache=False)
    chosen = {site.name: _one(site.ranks) for site in decomposed.sites}
    for site in snap(decomposed.graph_module, bar).sites:
        chosen[site.name] = "ORG" if site.ranks is None else _one(site.ranks)
    return chosen


def _one(ranks: Ranks) -> str:
    """Return ranks as text; one number where both are the same, as in the paper."""
    return str(ranks[0]) if len(set(ranks)) == 1 else ranks_text(ranks)


def rows(cells: Cells) -> Rows:
    table: Rows = []
    for name, (shape, ratio, optimised) in PUBLISHED.items():
        if name not in cells.get("ranks at 2×", {}):
            continue
        row = {"layer": name, "channels, kernel": shape, "2× (paper)": ratio, "2×": cells["ranks at 2×"][name]}
        row |= {"optimised (paper)": optimised}
        for setting in measured(cells, "optimised"):
            row[f"optimised, {setting}"] = cells[f"optimised, {setting}"][name]
        table.append(row)
    return table


if __name__ == "__main__":
    main()
