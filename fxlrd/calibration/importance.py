"""How much each layer's output matters to the model's output.

For a small change δ of a layer's output, the model's outputs z move by J·δ. With a random v of E[v·vᵀ] = M / zᵀ·M·z
(fxlrd/calibration/metric.py: signs / ‖z‖, where M = I) and one backward pass, g = Jᵀ·v has

    E_v[(gᵀ·δ)²] = ‖J·δ‖² / ‖z‖² by M,   Γ = Σ g·gᵀ over the positions of a batch,   error² ≈ tr(Γ·E[δ·δᵀ])

so that tr(Γ·ΔW·G·ΔWᵀ), with G the second moments of the layer's input, predicts the relative squared error of the
model's output that a changed weight causes, in one unit for all layers. Errors at different positions and in different
layers are taken as independent. No labels are needed. Every output tensor has the same weight. From few inputs Γ is
uncertain, and shrunk for it (fxlrd/calibration/samples.py).
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from fxlrd.calibration.batches import examples
from fxlrd.calibration.metric import drawn, logits_of
from fxlrd.calibration.padding import at_tokens, spread_out, tokens_of
from fxlrd.calibration.samples import Elsewhere, Samples
from fxlrd.calibration.watching import Watcher, run_watched
from fxlrd.errors import Reason
from fxlrd.factor.basis import magnitude
from fxlrd.factor.failures import memory_failure
from fxlrd.graph.captured import runnable
from fxlrd.graph.facts import job
from fxlrd.graph.inputs import Inputs, tensors
from fxlrd.graph.run import evaluating, isolated
from fxlrd.graph.surgery import calls, layers
from fxlrd.layers.kinds import as_layer, channel_axis, channels_per_group
from fxlrd.sharing import Job

PROBES = 2
"""Backward passes for a batch, each with new random signs, until there were `FEW` rows of outputs: then one."""
FEW = 64
"""Rows of outputs (classes of an image, of a token) from which on others say more than further signs for the same."""
MANY, FEWEST = 4096, 16
"""Positions of sequences in outputs, and inputs, that are enough for Γ. SmolLM2 at 0.6 of its layers, fitted
to 64 sequences of 256 tokens: perplexity × 1.58 with Γ from 16 of them, × 1.63 from all. Of images it is not known."""
ENOUGH = 16
"""Rows of outputs by which it is decided whether a matrix is one of logits; smaller batches wait until there are."""


def _calls(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for name in layers(gm) for node in calls(gm, name)]


class Importance:
    """Adds up Γ of every conv and linear call of a graph over batches.

    ``softmax`` says whether the outputs are logits; None where they tell.

    Attributes:
        layers: the modules of the calls.
        logits: which outputs are logits, once that is decided.
        waiting: batches to be added when it is.
        sums: Γ so far, by call.
        failed: why Γ of a call was given up.
    """

    def __init__(self, gm: fx.GraphModule, softmax: bool | None = None) -> None:
        self.gm = gm
        self.layers = {node: module for name, module in layers(gm).items() for node in calls(gm, name)}
        self.softmax = softmax
        self.logits: tuple[bool, ...] = ()
        self.waiting: list[Inputs] = []
        self._matrices: list[Tensor] = []
        self.sums: dict[fx.Node, Samples] = {}
        self.failed: dict[fx.Node, Reason] = {}
        self.probes = 0
        self.rows = self.positions = self.inputs = 0
        self.generator = torch.Generator().manual_seed(0)
        if (shared := job(gm)) is not None:
            self.sums.update({node: Elsewhere() for i, node in enumerate(_calls(gm)) if not shared.owns(i)})

    def add(self, inputs: Inputs, *others: Watcher) -> bool:
        """Run the graph forward and backward, and return whether that worked. No gradient reaches a parameter.

        Some operations have no backward in eval mode; then no Γ is available, and every output counts alike. ``others``
        watch the run too.
        """
        try:
            self._add(inputs, others)
        except (RuntimeError, NotImplementedError):
            self.sums, self.probes = {}, 0
            return False
        return True

    @property
    def enough(self) -> bool:
        """Whether Γ is known so well that further inputs are not worth a backward pass."""
        return self.positions >= MANY and self.inputs >= FEWEST

    def offer(self, inputs: Inputs, *others: Watcher) -> bool:
        """Add a batch, whose run ``others`` watch too, and those that wait, or let it wait; return whether that worked.

        Where an earlier one fails, it is not run.
        """
        if self._undecided(inputs):
            made, others = self._outputs(inputs, others), ()
            if self._says_too_little(made):
                self.waiting.append(inputs)
                return True
        return self.finish() and self.add(inputs, *others)

    def finish(self) -> bool:
        """Add the batches that wait, and return whether that worked."""
        waiting, self.waiting = self.waiting, []
        return all(map(self.add, waiting))

    def _undecided(self, inputs: Inputs) -> bool:
        """Whether it is to be decided with the next batches whether outputs are logits."""
        decided = self.logits or self.softmax is not None
        return not decided and not (not self.waiting and examples(inputs) >= ENOUGH)

    def _says_too_little(self, made: list[Tensor]) -> bool:
        """Whether the outputs are so far a matrix of few rows."""
        if len(made) != 1 or made[0].dim() != 2:
            return False
        self._matrices.append(made[0])
        return sum(map(len, self._matrices)) < ENOUGH

    def _outputs(self, inputs: Inputs, watchers: Sequence[Watcher]) -> list[Tensor]:
        model = runnable(self.gm)
        with evaluating(model), isolated(model), torch.no_grad():
            return tensors(run_watched(self.gm, model, inputs, watchers))

    def _rows(self) -> Tensor | None:
        matrices, self._matrices = self._matrices, []
        return torch.cat(matrices) if len({t.shape[1] for t in matrices}) == 1 else None

    def _add(self, inputs: Inputs, others: Sequence[Watcher]) -> None:
        model, tokens = runnable(self.gm), tokens_of(self.gm, inputs)
        zero = torch.zeros((), requires_grad=True)
        if model is not self.gm:
            self._leave_others_empty()
        with evaluating(model), isolated(model), torch.enable_grad():
            gradients = _Gradients(self, zero)
            value = run_watched(self.gm, model, inputs, [*others, gradients])
            found = tensors(value)
            if len(self.logits) != len(found):
                self.logits = logits_of(value, self.softmax, self._rows())
            pairs = zip(found, self.logits, strict=True)
            outputs = [(t, each) for t, each in pairs if t.is_floating_point() and t.requires_grad and t.numel()]
            probes = PROBES if self.rows < FEW else 1
            for i in range(probes if outputs else 0):
                starts = [spread_out(self.start(at_tokens(t, tokens), each), t, tokens) for t, each in outputs]
                lift = _lift([t for t, _ in outputs], starts)
                gradients.unit = 1 / lift
                lifted = [(v * lift).to(t.dtype) for v, (t, _) in zip(starts, outputs, strict=True)]
                graph = i + 1 < probes
                torch.autograd.grad([t for t, _ in outputs], zero, lifted, retain_graph=graph, allow_unused=True)
                self.probes += 1
            self.inputs += examples(inputs)
            sequences = [t for t, _ in outputs if t.dim() == 3]
            self.positions += sum(t[..., 0].numel() if tokens is None else int(tokens.sum()) for t in sequences)
            self.rows += sum(t.numel() // (t.shape[-1] if t.dim() else 1) for t, _ in outputs)

    def _leave_others_empty(self) -> None:
        """Leave nothing on all nodes of a layer but its first one: in a model all its calls add to that."""
        for name, module in layers(self.gm).items():
            _, c_out, groups = channels_per_group(module)
            for node in calls(self.gm, name)[1:]:
                self.sums[node] = Samples.none(as_layer(module).weight, c_out * groups)

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
        """Return the mean Γ (S×S) of a layer's call, or None where no finite gradient reached it."""
        return self.sums[node].sum().div_(self.probes) if self._measured(node) else None

    def _measured(self, node: fx.Node) -> bool:
        samples = self.sums.get(node)
        return samples is not None and self.probes > 0 and bool(samples.total.isfinite().all())

    def estimate(self, node: fx.Node) -> Tensor | None:
        """Return Γ of a layer's call, shrunk by the share of it that is noise: what a fit can go by."""
        return self.sums[node].shrunk().div_(self.probes) if self._measured(node) else None


def _lift(outputs: Sequence[Tensor], starts: Sequence[Tensor]) -> float:
    """Return the power of two to multiply the starts of a backward pass by, and with them all gradients.

    It makes the largest 1 where outputs are in float16: that holds nothing below 6e-8 (loss scaling, Micikevicius et
    al., Mixed precision training, 2018).
    """
    if all(t.dtype != torch.float16 for t in outputs):
        return 1.0
    return 1 / max(map(magnitude, starts))


class _Gradients:
    """Watches a run such that a backward pass adds g·gᵀ of the channels that each layer makes to its Γ.

    The scalar ``zero`` is added to each output: the gradient with respect to it passes through all of them, whether or
    not parameters require gradients, and reaches none of those. Without memory for it, the Γ of a layer is given up.
    """

    def __init__(self, importance: Importance, zero: Tensor) -> None:
        self.importance, self.zero = importance, zero
        self.unit = 1.0  # of the gradients

    def reads(self, call: fx.Node, value: Tensor, changes: int) -> None:
        """Do nothing."""

    def makes(self, call: fx.Node, value: Any) -> Any:
        """Return a layer's output plus ``zero``."""
        if not isinstance(value, Tensor):
            return value
        value = value + self.zero.to(value)
        value.register_hook(partial(self._add, call, channel_axis(self.importance.layers[call], value.dim())))
        return value

    def ran(self) -> None:
        """Do nothing."""

    def _add(self, call: fx.Node, axis: int, gradient: Tensor) -> None:
        failed, sums = self.importance.failed, self.importance.sums
        if call in failed or not gradient.numel():  # of an expert without any tokens
            return
        rows = gradient.detach().movedim(axis, -1)
        count = rows.shape[-1]
        try:
            if call not in sums:
                sums[call] = Samples.none(rows, count)
            sums[call].add(rows.reshape(len(rows) if rows.dim() > 1 else 1, -1, count), self.unit)
        except Exception as error:
            if (reason := memory_failure(error, "calibration")) is None:
                raise
            failed[call] = reason
            sums.pop(call, None)
