"""How much each layer's output matters to the model's output.

For a small change δ of a layer's output, the model's outputs z move by J·δ. With random signs v and one backward
pass, g = Jᵀ·v / ‖z‖ has

    E_v[(gᵀ·δ)²] = ‖J·δ‖² / ‖z‖²,   Γ = Σ g·gᵀ over the positions of a batch,   error² ≈ tr(Γ·E[δ·δᵀ])

so that tr(Γ·ΔW·G·ΔWᵀ) predicts the relative squared error of the model's output that a changed weight causes, in
one unit for all layers. Taken as independent: the errors at different positions, and those of different layers.
No labels are needed. Each output tensor counts alike.

Few inputs see few directions: the 256 gradients that as many inputs give a classifier of 1,000 classes leave three
quarters of them unseen, and a fit would hide its errors there. So Γ is shrunk towards the same for every direction, by
the share ρ of its deviation from that which is noise (Ledoit and Wolf, A well-conditioned estimator for
large-dimensional covariance matrices, 2004), one input and one draw of signs being a sample Γᵢ of n:

    ρ = (1/n²)·Σᵢ‖Γᵢ − Γ̄‖² / ‖Γ̄ − μ·I‖²,   μ = tr Γ̄ / S
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxlrd.graph.captured import feed, runnable
from fxlrd.graph.inputs import Inputs, tensors
from fxlrd.graph.run import evaluating, unmoved
from fxlrd.graph.surgery import calls, layers
from fxlrd.layers.kinds import as_layer, channel_axis, channels_per_group

PROBES = 2
"""Backward passes for each batch, with other random signs."""


@dataclass
class Samples:
    """Σ Γᵢ (S×S, float64) over samples, Σ ‖Γᵢ‖², and how many they are."""

    total: Tensor
    squares: float = 0.0
    count: int = 0

    def add(self, rows: Tensor) -> None:
        """Add samples: gradients (n, positions, S)."""
        rows = rows.double()
        self.total += torch.einsum("nps,npt->st", rows, rows)
        small = rows @ rows.mT if rows.shape[1] < rows.shape[2] else rows.mT @ rows
        self.squares += float(small.square().sum())
        self.count += len(rows)

    def shrunk(self) -> Tensor:
        """Return Σ Γᵢ, shrunk as far as it is noise; its trace stays."""
        level = self.total.diagonal().mean()
        apart = float((self.total - level * torch.eye(len(self.total)).to(self.total)).square().sum())
        noise = self.squares - float(self.total.square().sum()) / max(self.count, 1)
        rho = min(1.0, max(0.0, noise) / apart) if apart > 0 else 0.0
        return (1 - rho) * self.total + rho * level * torch.eye(len(self.total)).to(self.total)


class Effect:
    """Sums up Γ of every conv and linear call of a graph over batches."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.sums: dict[fx.Node, Samples] = {}
        self.rounds = 0
        self.signs = torch.Generator().manual_seed(0)

    def add(self, inputs: Inputs) -> bool:
        """Run the graph forward and backward, and return whether that worked. No gradient reaches a parameter.

        Some operations have no backward in eval mode; then nothing is known, and every layer counts alike.
        """
        try:
            self._add(inputs)
        except (RuntimeError, NotImplementedError):
            self.sums, self.rounds = {}, 0
            return False
        return True

    def _add(self, inputs: Inputs) -> None:
        model = runnable(self.gm)
        with evaluating(model), unmoved(model), torch.enable_grad():
            if model is self.gm:
                watch: _Watch | _WatchModel = _Watch(self.gm, self.sums)
                given = tensors(watch.run(*feed(self.gm, inputs)))
            else:
                watch = _WatchModel(self.gm, model, self.sums)
                given = tensors(watch.run(inputs))
            outputs = [t for t in given if t.is_floating_point() and t.requires_grad and t.numel()]
            for i in range(PROBES if outputs else 0):
                signs = [self._signs(t) for t in outputs]
                torch.autograd.grad(outputs, watch.root, signs, retain_graph=i + 1 < PROBES, allow_unused=True)
                self.rounds += 1
            watch.clear()

    def _signs(self, output: Tensor) -> Tensor:
        v = torch.randint(0, 2, output.shape, generator=self.signs).to(output) * 2 - 1
        return v / output.detach().double().norm().clamp_min(1e-30).to(output.dtype)

    def gamma(self, node: fx.Node) -> Tensor | None:
        """Return Γ (S×S, float64) of a layer's call as it was seen, or None where no finite gradient reached it."""
        found = self.sums.get(node)
        if found is None or not self.rounds or not bool(found.total.isfinite().all()):
            return None
        return found.total / self.rounds

    def estimate(self, node: fx.Node) -> Tensor | None:
        """Return Γ shrunk as far as what was seen is noise: what a fit can go by."""
        return None if self.gamma(node) is None else self.sums[node].shrunk() / self.rounds


class _Watch(fx.Interpreter):
    """Runs a graph with a hook on the output of every layer.

    Each output takes part in a sum with one zero, ``root``: the gradient for that passes through all of them,
    whether or not parameters require gradients, and reaches none of those.
    """

    def __init__(self, gm: fx.GraphModule, sums: dict[fx.Node, Samples]) -> None:
        super().__init__(gm)
        self.sums = sums
        self.layers: Mapping[str, nn.Module] = layers(gm)
        self.root = torch.zeros((), requires_grad=True)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        module = self.layers.get(str(n.target)) if n.op == "call_module" else None
        if module is None or not isinstance(value, Tensor):
            return value
        return watched(n, module, value, self.root, self.sums)

    def clear(self) -> None:
        """Let go of the values: with an output among them, the graph would hold itself alive through its hooks."""
        self.env.clear()


class _WatchModel:
    """Runs the model around a graph's regions, as `_Watch` runs a graph. A layer's calls all go to its first node."""

    def __init__(self, gm: fx.GraphModule, model: nn.Module, sums: dict[fx.Node, Samples]) -> None:
        self.gm, self.model, self.sums = gm, model, sums
        self.root = torch.zeros((), requires_grad=True)

    def run(self, inputs: Inputs) -> Any:
        handles = []
        for name, module in layers(self.gm).items():
            first, *others = calls(self.gm, name)
            hook = self._hook(first, module)
            handles.append(self.model.get_submodule(name).register_forward_hook(hook))
            _, c_out, groups = channels_per_group(module)
            weight = as_layer(module).weight
            for node in others:
                self.sums[node] = Samples(weight.new_zeros(c_out * groups, c_out * groups, dtype=torch.float64))
        try:
            own = inputs.fresh()
            return self.model(*own.args, **own.kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, node: fx.Node, module: nn.Module) -> Any:
        def hook(_: nn.Module, args: Any, value: Tensor) -> Tensor:
            return watched(node, module, value, self.root, self.sums)

        return hook

    def clear(self) -> None:
        """Nothing is kept."""


def watched(node: fx.Node, module: nn.Module, value: Tensor, root: Tensor, sums: dict[fx.Node, Samples]) -> Tensor:
    """Return a layer's output with ``root`` added; g·gᵀ of its channels goes to ``sums`` in a backward pass."""
    axis = channel_axis(module, value.dim())

    def take(gradient: Tensor) -> None:
        moved = gradient.detach().movedim(axis, -1)
        count = moved.shape[-1]
        if node not in sums:
            sums[node] = Samples(moved.new_zeros(count, count, dtype=torch.float64))
        sums[node].add(moved.reshape(len(moved) if moved.dim() > 1 else 1, -1, count))

    value = value + root.to(value)
    value.register_hook(take)
    return value
