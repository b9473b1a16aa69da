"""What a compression costs the trained network in accuracy, without training and after an epoch of it.

``python -m bench.drops [--steps 469] [--quick] [--json FILE]`` prints preset `auto` under budgets of parameters beside
uniform ranks of as many parameters, and merging beside the published relocation, on the 10,000 test images of
Fashion-MNIST (bench/fashion.py says where from). Fitted to 1,024 training images without labels. "Re-estimated" is with
BatchNorm statistics from those, of the original too. In the training the original teaches; its settings are the same
for all. Stored in a JSON file (default build/bench/drops.json); a cell that is there is not measured again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from bench import settings
from bench.cells import Cells, Rows
from bench.network import BATCH, EPOCH, LR, Network
from bench.settings import parser, read
from bench.systems import ORIGINAL
from fxlrd import Budget, compress
from fxlrd.passes import Decompose

TARGETS = {1 / 2: (0.3, 0.0), 1 / 3: (0.5, None), 1 / 4: (1.0, 0.3)}
"""By share of the parameters, the largest drop in points without training, and after it; None is not trained."""
MERGES = {
    "merge, α = 2.75": ("calibrate{outputs=false,effects=256,holdout=true},merge,recalibrate", 1.5),
    "merge as published (relocate), α = 2.75": ("merge{mode=relocate}", None),
}


def main(argv: Sequence[str] | None = None) -> None:
    options = parser("drops")
    options.add_argument("--steps", type=int, default=EPOCH, help=f"of training, {BATCH} images each; 0 is none")
    arguments = read(options, argv)
    title = "What a compression costs in accuracy: the trained network on Fashion-MNIST"
    results = settings.results(arguments, title, rows, steps=arguments.steps, lr=LR, batch=BATCH)
    network = Network(arguments.steps, arguments.quick)
    results.cell(ORIGINAL, lambda: figures(network, network.model))
    for share, (_, after) in TARGETS.items():
        training = after is not None and arguments.steps > 0
        own = results.cell(auto(share), lambda s=share, t=training: figures(network, fitted(network, s), t))
        results.cell(uniform(share), lambda s=own["params"]: figures(network, of_share(network, s)))
    for name, (text, _) in MERGES.items():
        results.cell(name, lambda t=text: figures(network, made(network, t)))
    results.write()
    print(results.text())


def auto(share: float) -> str:
    return f"auto, params=1/{1 / share:.0f}"


def uniform(share: float) -> str:
    return f"uniform ranks, weights alone, 1/{1 / share:.0f}"


def figures(network: Network, model: nn.Module, training: bool = False) -> dict[str, float]:
    """Return the share of the parameters and, in per cent of right answers, the model as made and re-estimated."""
    again = network.estimated(model)
    result = {"params": network.share(model), "made": network.top1(model), "again": network.top1(again)}
    return result | ({"trained": network.trained(again, teacher=network.model)} if training else {})


def fitted(network: Network, share: float) -> nn.Module:
    budget = Budget(params=share)
    return compress(network.model, network.x, budget=budget, calibration=network.calibration, measure=False).model


def made(network: Network, text: str) -> nn.Module:
    data = network.calibration if "calibrate" in text else None
    return compress(network.model, network.x, pipeline=text, calibration=data, measure=False).model


def of_share(network: Network, share: float) -> nn.Module:
    """Return the network at the uniform ratio that leaves this share of the parameters, or just more."""
    original = network.estimated(network.model)
    low, high = 1.0, 64.0
    for _ in range(10):
        middle = (low * high) ** 0.5
        if network.share(Decompose(ratio=middle)(original).graph_module) >= share:
            low = middle
        else:
            high = middle
    return Decompose(ratio=low)(original).graph_module


def rows(cells: Cells) -> Rows:
    first = cells[ORIGINAL]
    targets: dict[str, tuple[float | None, float | None]] = {auto(share): each for share, each in TARGETS.items()}
    targets |= {name: (most, None) for name, (_, most) in MERGES.items()}
    return [_row(name, own, first, *targets.get(name, (None, None))) for name, own in cells.items()]


def _row(name: str, own: Any, first: Any, most: float | None, after: float | None) -> dict[str, str]:
    row = {"model": name, "parameters": f"{own['params']:.3f}", "as made %": f"{own['made']:.2f}"}
    row |= {"re-estimated %": f"{own['again']:.2f}", "drop, both re-estimated": f"{first['again'] - own['again']:+.2f}"}
    row["wanted"] = "" if most is None else f"≤ {most:.1f}"
    row |= {"trained %": "", "drop, trained": "", "wanted, trained": ""}
    if "trained" in own:
        row |= {"trained %": f"{own['trained']:.2f}", "drop, trained": f"{first['made'] - own['trained']:+.2f}"}
        row["wanted, trained"] = "" if after is None else f"≤ {after:.1f}"
    return row


if __name__ == "__main__":
    main()
