"""How much each layer's output matters to the model's output.

For a small change δ of a layer's output, the model's outputs z move by J·δ. With a random v of E[v·vᵀ] = M / zᵀ·M·z
(fxlrd/calibration/metric.py: signs / ‖z‖, where M = I) and one backward pass, g = Jᵀ·v has

    E_v[(gᵀ·δ)²] = ‖J·δ‖² / ‖z‖² by M,   Γ = Σ g·gᵀ over the positions of a batch,   error² ≈ tr(Γ·E[δ·δᵀ])

so that tr(Γ·ΔW·G·ΔWᵀ), with G the second moments of the layer's input, predicts the relative squared error of the
model's output that a changed weight causes, in one unit for all layers. Errors at different positions and in different
layers are taken as independent. No labels are needed. Every output tensor has the same weight.

Few inputs cover few directions: 256 inputs give a classifier of 1,000 classes 256 gradients, which leave three quarters
of the directions without a sample, and a fit would put its errors there. So Γ is shrunk towards a multiple of I, by the
share ρ of its deviation from that which is noise (Ledoit and Wolf, A well-conditioned estimator for large-dimensional
covariance matrices, 2004). One input with one draw of signs is a sample Γᵢ of n:

    ρ = (1/n²)·Σᵢ‖Γᵢ − Γ̄‖² / ‖Γ̄ − μ·I‖²,   μ = tr Γ̄ / S
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxlrd.calibration.metric import drawn, logits_of
from fxlrd.calibration.padding import at_tokens, spread_out, tokens_of
from fxlrd.errors import Reason
from fxlrd.factor.basis import magnitude, working
from fxlrd.factor.failures import memory_failure
from fxlrd.graph.attentions import open_for
from fxlrd.graph.captured import feed, runnable
from fxlrd.graph.facts import job
from fxlrd.graph.inputs import Inputs, tensors
from fxlrd.graph.run import evaluating, unmoved
from fxlrd.graph.surgery import calls, layers
from fxlrd.layers.kinds import as_layer, channel_axis, channels_per_group
from fxlrd.sharing import Job

PROBES = 2
"""Backward passes for a batch, each with new random signs, until there were `FEW` rows of outputs: then one."""
FEW = 64
"""Rows of outputs (classes of an image, of a token) from which on others say more than further signs for the same."""
POSITIONS = 256
"""Positions of one input that are sampled, evenly strided; the next inputs begin at others."""
WIDE = 1024
"""Layers with more outputs than this are sampled at a quarter of the positions, at the cost of others."""


@dataclass
class Samples:
    """The sum of Γᵢ (S×S, float64) over samples, that of ‖Γᵢ‖², and the number of samples."""

    total: Tensor
    squares: float = 0.0
    count: int = 0

    def add(self, rows: Tensor) -> None:
        """Add samples: gradients (n, positions, S), of which at most `POSITIONS` a sample, in place of all others.

        On a CPU their products are in float32, which is exact enough for what is an estimate, and half the work.
        """
        most = POSITIONS if len(self.total) <= WIDE else POSITIONS // 4
        stride = math.ceil(rows.shape[1] / most)
        first = self.count % stride
        positions, rows = rows.shape[1], rows[:, first::stride]
        peak = magnitude(rows) if rows.numel() else 1.0  # squares of small gradients stay within range
        rows = (working(rows) if rows.device.type == "cpu" else rows.double()) / peak
        scale = peak**2 * positions / max(rows.shape[1], 1)
        flat = rows.flatten(0, 1)
        self.total += (flat.mT @ flat).double() * scale
        small = rows @ rows.mT if rows.shape[1] < rows.shape[2] else rows.mT @ rows
        self.squares += float(small.double().square().sum()) * scale**2
        self.count += len(rows)

    def shrunk(self) -> Tensor:
        """Return Σ Γᵢ shrunk by the share of noise (module docstring); its trace stays."""
        mean, identity = self.total.diagonal().mean(), torch.eye(len(self.total)).to(self.total)
        deviation = float((self.total - mean * identity).square().sum())
        noise = self.squares - float(self.total.square().sum()) / max(self.count, 1)
        rho = min(1.0, max(0.0, noise) / deviation) if deviation > 0 else 0.0
        return (1 - rho) * self.total + rho * mean * identity


class _Elsewhere(Samples):
    """Those of a call that another process adds up."""

    def __init__(self) -> None:
        super().__init__(torch.zeros(()))

    def add(self, rows: Tensor) -> None:
        """Do nothing."""


def _calls(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for name in layers(gm) for node in calls(gm, name)]


class Importance:
    """Adds up Γ of every conv and linear call of a graph over batches.

    ``softmax`` says whether the outputs are logits; None where they tell.

    Attributes:
        logits: which outputs are logits, once there was a batch.
        sums: Γ so far, by call.
        failed: why Γ of a call was given up.
    """

    def __init__(self, gm: fx.GraphModule, softmax: bool | None = None) -> None:
        self.gm = gm
        self.softmax = softmax
        self.logits: tuple[bool, ...] = ()
        self.sums: dict[fx.Node, Samples] = {}
        self.failed: dict[fx.Node, Reason] = {}
        self.probes = 0
        self.rows = 0
        self.generator = torch.Generator().manual_seed(0)
        if (shared := job(gm)) is not None:
            self.sums.update({node: _Elsewhere() for i, node in enumerate(_calls(gm)) if not shared.owns(i)})

    def add(self, inputs: Inputs) -> bool:
        """Run the graph forward and backward, and return whether that worked. No gradient reaches a parameter.

        Some operations have no backward in eval mode; then no Γ is available, and every output counts alike.
        """
        try:
            self._add(inputs)
        except (RuntimeError, NotImplementedError):
            self.sums, self.probes = {}, 0
            return False
        return True

    def _add(self, inputs: Inputs) -> None:
        model, tokens = runnable(self.gm), tokens_of(self.gm, inputs)
        with evaluating(model), unmoved(model), torch.enable_grad():
            if model is self.gm:
                watch: _GraphWatch | _ModelWatch = _GraphWatch(self.gm, self)
                value = watch.run(*feed(self.gm, inputs))
            else:
                watch = _ModelWatch(self.gm, model, self)
                value = watch.run(inputs)
            found = tensors(value)
            if len(self.logits) != len(found):  # by the first batch
                self.logits = logits_of(value, self.softmax)
            pairs = zip(found, self.logits, strict=True)
            outputs = [(t, each) for t, each in pairs if t.is_floating_point() and t.requires_grad and t.numel()]
            probes = PROBES if self.rows < FEW else 1
            for i in range(probes if outputs else 0):
                starts = [spread_out(self.start(at_tokens(t, tokens), each), t, tokens) for t, each in outputs]
                graph = i + 1 < probes
                torch.autograd.grad([t for t, _ in outputs], watch.zero, starts, retain_graph=graph, allow_unused=True)
                self.probes += 1
            self.rows += sum(t.numel() // (t.shape[-1] if t.dim() else 1) for t, _ in outputs)
            watch.clear()

    def start(self, output: Tensor, logits: bool) -> Tensor:
        """Return v to start a backward pass with."""
        return drawn(output, logits, self.generator)

    def exchange(self, shared: Job) -> None:
        """Give all processes that share a compression the samples of all calls."""
        for i, node in enumerate(_calls(self.gm)):
            samples, reason = shared.owners((self.sums.pop(node, None), self.failed.get(node)), i)
            if samples is not None:
                self.sums[node] = samples
            if reason is not None:
                self.failed[node] = reason
        self.probes = min(shared.gathered(self.probes))  # none where one of them has no memory for a backward pass

    def gamma(self, node: fx.Node) -> Tensor | None:
        """Return the mean Γ (S×S, float64) of a layer's call, or None where no finite gradient reached it."""
        samples = self.sums.get(node)
        if samples is None or not self.probes or not bool(samples.total.isfinite().all()):
            return None
        return samples.total / self.probes

    def estimate(self, node: fx.Node) -> Tensor | None:
        """Return Γ of a layer's call, shrunk by the share of it that is noise: what a fit can go by."""
        return None if self.gamma(node) is None else self.sums[node].shrunk() / self.probes


class _GraphWatch(fx.Interpreter):
    """Runs a graph with a hook on the output of every layer.

    The scalar ``zero`` is added to each output: the gradient with respect to it passes through all of them, whether or
    not parameters require gradients, and reaches none of those.
    """

    def __init__(self, gm: fx.GraphModule, importance: Importance) -> None:
        super().__init__(gm)
        self.importance = importance
        self.layers: Mapping[str, nn.Module] = layers(gm)
        self.zero = torch.zeros((), requires_grad=True)

    def run_node(self, n: fx.Node) -> Any:
        value = super().run_node(n)
        module = self.layers.get(str(n.target)) if n.op == "call_module" else None
        if module is None or not isinstance(value, Tensor):
            return value
        return _watched(n, module, value, self.zero, self.importance)

    def clear(self) -> None:
        """Let go of the values: with an output among them, the graph would hold itself alive through its hooks."""
        self.env.clear()


class _ModelWatch:
    """Runs the model whose regions are the graph, as `_GraphWatch` runs a graph.

    All calls of a layer add to the Γ of its first node.
    """

    def __init__(self, gm: fx.GraphModule, model: nn.Module, importance: Importance) -> None:
        self.gm, self.model, self.importance = gm, model, importance
        self.zero = torch.zeros((), requires_grad=True)

    def run(self, inputs: Inputs) -> Any:
        handles = []
        open_for(self.model, layers(self.gm))
        for name, module in layers(self.gm).items():
            first, *others = calls(self.gm, name)
            hook = self._hook(first, module)
            handles.append(self.model.get_submodule(name).register_forward_hook(hook))
            _, c_out, groups = channels_per_group(module)
            weight = as_layer(module).weight
            for node in others:
                self.importance.sums[node] = Samples(
                    weight.new_zeros(c_out * groups, c_out * groups, dtype=torch.float64)
                )
        try:
            own = inputs.fresh()
            return self.model(*own.args, **own.kwargs)
        finally:
            for handle in handles:
                handle.remove()

    def _hook(self, node: fx.Node, module: nn.Module) -> Any:
        def hook(_: nn.Module, args: Any, value: Tensor) -> Tensor:
            return _watched(node, module, value, self.zero, self.importance)

        return hook

    def clear(self) -> None:
        """Do nothing: this run holds no values."""


def _watched(node: fx.Node, module: nn.Module, value: Tensor, zero: Tensor, importance: Importance) -> Tensor:
    """Return a layer's output plus ``zero``; a backward pass adds g·gᵀ of its channels to the importance.

    Without memory for that of one layer, its Γ is given up.
    """
    axis, sums = channel_axis(module, value.dim()), importance.sums

    def add(gradient: Tensor) -> None:
        if node in importance.failed:
            return
        rows = gradient.detach().movedim(axis, -1)
        count = rows.shape[-1]
        try:
            if node not in sums:
                sums[node] = Samples(rows.new_zeros(count, count, dtype=torch.float64))
            sums[node].add(rows.reshape(len(rows) if rows.dim() > 1 else 1, -1, count))
        except Exception as error:
            if (reason := memory_failure(error, "calibration")) is None:
                raise
            importance.failed[node] = reason
            sums.pop(node, None)

    value = value + zero.to(value)
    value.register_hook(add)
    return value
