"""Training step of the decomposed ResNet-50 with and without `freeze`: batch 8, fp32, channels_last, ratio 2.

Forward, backward and an SGD step, interleaved. Target: frozen at least 1.2 times the unfrozen decomposed model.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from tabulate import tabulate
from torch import Tensor, nn

from bench.models import resnet50
from fxlrd import Pipeline, capture
from fxlrd.timing.clock import compare


def step(model: nn.Module, x: Tensor) -> Callable[[], None]:
    model.train()
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(trained, lr=1e-6, momentum=0.9)
    target = torch.zeros(len(x), dtype=torch.long)

    def run() -> None:
        optimizer.zero_grad(set_to_none=True)
        nn.functional.cross_entropy(model(x), target).backward()
        optimizer.step()

    return run


def main() -> None:
    model, x = resnet50()
    gm = capture(model, x)
    models: dict[str, nn.Module] = {"lrd": Pipeline.preset("lrd")(gm).graph_module}
    models["freeze"] = Pipeline.preset("freeze")(gm).graph_module
    models["freeze, BatchNorm statistics kept"] = Pipeline.preset("freeze")(gm).graph_module
    calls = {name: step(m, x) for name, m in models.items()}
    for module in models["freeze, BatchNorm statistics kept"].modules():
        if isinstance(module, nn.BatchNorm2d):
            module.eval()
    timings = compare(calls, x.device, seconds=90.0)
    rows = []
    for name, t in timings.items():
        trained = sum(p.numel() for p in models[name].parameters() if p.requires_grad)
        rows.append(
            [
                name,
                f"{trained / 1e6:.2f} M",
                f"{t.seconds * 1e3:.0f} ms",
                f"{1 / t.ratio:.2f}×",
                f"± {t.spread / t.ratio**2:.2f}",
            ]
        )
    print(tabulate(rows, headers=["training step", "trained", "time", "speed against lrd", ""]))


if __name__ == "__main__":
    main()
