"""How much each layer's output matters to the model's output.

For a small change δ of a layer's output, the model's outputs z move by J·δ. With random signs v and one backward
pass, g = Jᵀ·v / ‖z‖ has

    E_v[(gᵀ·δ)²] = ‖J·δ‖² / ‖z‖²,   Γ = Σ g·gᵀ over the positions of a batch,   error² ≈ tr(Γ·E[δ·δᵀ])

so that tr(Γ·ΔW·G·ΔWᵀ) predicts the relative squared error of the model's output that a changed weight causes, in
one unit for all layers. Taken as independent: the errors at different positions, and those of different layers.
No labels are needed. Each output tensor counts alike.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxlrd.graph import Inputs, evaluating, layers, positional, tensors
from fxlrd.layers import channel_axis

PROBES = 2
"""Backward passes for each batch, with other random signs."""


class Effect:
    """Sums up Γ of every conv and linear call of a graph over batches."""

    def __init__(self, gm: fx.GraphModule) -> None:
        self.gm = gm
        self.sums: dict[fx.Node, Tensor] = {}
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
        with evaluating(self.gm), torch.enable_grad():
            watch = _Watch(self.gm, self.sums)
            outputs = [
                t
                for t in tensors(watch.run(*positional(self.gm, inputs)))
                if t.is_floating_point() and t.requires_grad and t.numel()
            ]
            for i in range(PROBES if outputs else 0):
                signs = [self._signs(t) for t in outputs]
                torch.autograd.grad(outputs, watch.root, signs, retain_graph=i + 1 < PROBES, allow_unused=True)
                self.rounds += 1
            watch.env.clear()  # with an output in it, the graph would hold itself alive through its hooks

    def _signs(self, output: Tensor) -> Tensor:
        v = torch.randint(0, 2, output.shape, generator=self.signs).to(output) * 2 - 1
        return v / output.detach().double().norm().clamp_min(1e-30).to(output.dtype)

    def gamma(self, node: fx.Node) -> Tensor | None:
        """Return Γ (S×S, float64) of a layer's call, or None where no finite gradient reached it."""
        found = self.sums.get(node)
        if found is None or not self.rounds or not bool(found.isfinite().all()):
            return None
        return found / self.rounds


class _Watch(fx.Interpreter):
    """Runs a graph with a hook on the output of every layer.

    Each output takes part in a sum with one zero, ``root``: the gradient for that passes through all of them,
    whether or not parameters require gradients, and reaches none of those.
    """

    def __init__(self, gm: fx.GraphModule, sums: dict[fx.Node, Tensor]) -> None:
        super().__init__(gm)
        self.sums = sums
        self.layers: Mapping[str, nn.Module] = layers(gm)
        self.root = torch.zeros((), requires_grad=True)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        module = self.layers.get(str(n.target)) if n.op == "call_module" else None
        if module is None or not isinstance(value, Tensor):
            return value
        axis = channel_axis(module, value.dim())
        value = value + self.root.to(value)
        value.register_hook(lambda g: self._take(n, g.detach().movedim(axis, -1)))
        return value

    def _take(self, node: fx.Node, gradient: Tensor) -> None:
        rows = gradient.reshape(-1, gradient.shape[-1]).double()
        self.sums[node] = self.sums.get(node, 0) + rows.mT @ rows
