"""What peers make of a model with convs and linears at 2×, in their own words as far as they have some.

Of each layer but the stem: half its parameters. The peers need their packages (bench/peers.py makes an environment).
"""

from __future__ import annotations

import copy
import os
import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from bench.pruning import pruned
from fxlrd import Budget, compress
from fxlrd.errors import Reason
from fxlrd.layers.forms import ranks_by_ratio

RATIO, REMOVED = 2.0, 0.3
Method = Callable[[nn.Module, Tensor, list[Tensor]], nn.Module]
"""Takes a model in eval mode, an example batch and calibration batches; returns a compressed copy."""


def _layers(model: nn.Module) -> Iterator[tuple[str, nn.Module, tuple[int, ...]]]:
    """Yield the name, the module and the ranks of each layer to decompose, but the first conv."""
    layers = [(n, m) for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))]
    for name, module in layers[1:]:
        ranks = ranks_by_ratio(module, RATIO)
        if not isinstance(ranks, Reason):
            yield name, module, tuple(rank for rank in ranks if rank is not None)


@torch.no_grad()
def tensorly(model: nn.Module, x: Tensor, calibration: list[Tensor]) -> nn.Module:
    """Put tensorly's partial Tucker of every k×k conv in its place, and its truncated SVD of every other layer."""
    import tensorly as tl
    from tensorly.decomposition import partial_tucker
    from tensorly.tenalg.svd import svd_interface

    model = copy.deepcopy(model)
    with tl.backend_context("pytorch", local_threadsafe=True):
        for name, module, ranks in list(_layers(model)):
            if len(ranks) == 2:
                (core, (last, first)), _ = partial_tucker(module.weight, rank=list(ranks)[::-1], modes=[0, 1])
                factors = _tucker(module, first, core, last)
            else:
                u, sigma, v = svd_interface(module.weight.flatten(1), n_eigenvecs=ranks[0])
                factors = _pair(module, sigma.sqrt()[:, None] * v, u * sigma.sqrt())
            model.set_submodule(name, factors)
    return model


def _tucker(conv: Any, first: Tensor, core: Tensor, last: Tensor) -> nn.Sequential:
    narrow = nn.Conv2d(len(first), first.shape[1], 1, bias=False)
    middle = nn.Conv2d(*core.shape[1::-1], conv.kernel_size, conv.stride, conv.padding, conv.dilation, bias=False)
    widen = nn.Conv2d(last.shape[1], len(last), 1, bias=conv.bias is not None)
    return _filled((narrow, first.T[..., None, None]), (middle, core), (widen, last[..., None, None]), bias=conv.bias)


def _pair(layer: Any, first: Tensor, last: Tensor) -> nn.Sequential:
    """Return the two layers of a linear or of a 1×1 conv, whose stride the first one has."""
    has_bias = layer.bias is not None
    if isinstance(layer, nn.Linear):
        narrow, widen = nn.Linear(first.shape[1], len(first), bias=False), nn.Linear(last.shape[1], len(last), has_bias)
        return _filled((narrow, first), (widen, last), bias=layer.bias)
    conv = nn.Conv2d(first.shape[1], len(first), 1, layer.stride, bias=False)
    widen = nn.Conv2d(last.shape[1], len(last), 1, bias=has_bias)
    return _filled((conv, first[..., None, None]), (widen, last[..., None, None]), bias=layer.bias)


def _filled(*layers: tuple[Any, Tensor], bias: Tensor | None) -> nn.Sequential:
    for module, weight in layers:
        module.weight.copy_(weight)
    if bias is not None:
        layers[-1][0].bias.copy_(bias)
    return nn.Sequential(*(module for module, _ in layers)).eval()


@torch.no_grad()
def tensorly_torch(model: nn.Module, x: Tensor, calibration: list[Tensor]) -> nn.Module:
    """Put FactorizedConv, Tucker at half the parameters, in the place of every conv; linears stay as they are."""
    import tltorch

    model = copy.deepcopy(model)
    for name, module, _ in list(_layers(model)):
        if isinstance(module, nn.Conv2d):
            factorized = tltorch.FactorizedConv.from_conv(
                module, rank=1 / RATIO, factorization="tucker", implementation="factorized", fixed_rank_modes="spatial"
            )
            model.set_submodule(name, factorized.eval())
    return model


def aimet(model: nn.Module, x: Tensor, calibration: list[Tensor]) -> nn.Module:
    """Compress by AIMET's weight SVD in manual mode, every layer at half its memory."""
    from aimet_torch.common.defs import CompressionScheme, CostMetric
    from aimet_torch.compress import ModelCompressor
    from aimet_torch.defs import ModuleCompRatioPair, WeightSvdParameters

    model = copy.deepcopy(model)
    pairs = [ModuleCompRatioPair(module, 1 / RATIO) for _, module, _ in _layers(model)]
    manual = WeightSvdParameters.ManualModeParams(pairs)
    before = os.getcwd()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)  # it leaves files in data/ of the current folder
        try:
            compressed, _ = ModelCompressor.compress_model(
                model,
                eval_callback=lambda *args, **kwargs: 0.0,
                eval_iterations=1,
                input_shape=(1, *x.shape[1:]),
                compress_scheme=CompressionScheme.weight_svd,
                cost_metric=CostMetric.memory,
                parameters=WeightSvdParameters(WeightSvdParameters.Mode.manual, manual),
            )
        finally:
            os.chdir(before)
    return compressed.eval()


def torch_pruning(model: nn.Module, x: Tensor, calibration: list[Tensor]) -> nn.Module:
    """Remove 30 % of the channels, those of least magnitude."""
    return pruned(model, x, REMOVED, [m for m in model.modules() if isinstance(m, nn.Linear)][-1:])


def _fxlrd(**options: Any) -> Method:
    def run(model: nn.Module, x: Tensor, calibration: list[Tensor]) -> nn.Module:
        data = calibration if options.get("preset") == "merge" or "budget" in options else None
        return compress(model, x, calibration=data, measure=False, **options).model

    return run


METHODS: dict[str, Method] = {
    "tensorly, partial_tucker": tensorly,
    "tensorly-torch, FactorizedConv": tensorly_torch,
    "aimet-torch, weight SVD": aimet,
    "torch-pruning, 30 %": torch_pruning,
    "fxlrd lrd": _fxlrd(preset="lrd"),
    "fxlrd ranks": _fxlrd(preset="ranks"),
    "fxlrd merge": _fxlrd(preset="merge"),
    "fxlrd branch": _fxlrd(preset="branch"),
    "fxlrd auto, params=1/2": _fxlrd(budget=Budget(params=0.5)),
    "fxlrd auto, latency=0.6": _fxlrd(budget=Budget(latency=0.6)),
}
TIMED = ("fxlrd ranks", "fxlrd merge", "fxlrd auto, latency=0.6")
"""Those whose forms depend on timings. They are chosen by eager times at the batch that they are compressed with."""
