"""Second moments of tensors' channels over calibration inputs, recorded on the nodes that make them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxlrd.calibration.batches import NO_INPUTS, examples, failure
from fxlrd.calibration.importance import Importance
from fxlrd.calibration.metric import logits_among
from fxlrd.calibration.padding import at_tokens, tokens_of
from fxlrd.calibration.patches import patches
from fxlrd.errors import FxlrdError, Reason
from fxlrd.factor.failures import memory_failure
from fxlrd.graph.captured import feed
from fxlrd.graph.facts import job, output_moments, shape, statistics
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.operations import features_per_channel
from fxlrd.graph.reached import ReachingInterpreter, reached
from fxlrd.graph.run import evaluating
from fxlrd.graph.surgery import layers, source
from fxlrd.layers.fit import Moments, Statistics
from fxlrd.layers.kinds import CONVS, Conv, channel_axis, channels_per_group, kernel_area
from fxlrd.sharing import Job

LARGEST = 8192
"""Tensors with more channels than this have no moments: each would take half a gigabyte."""
PATCHES = 8
"""Patches sampled per batch, as a multiple of the patch length C·K."""
Axis = tuple[int, int]
"""The axis of a tensor's channels, and how many consecutive entries along it belong to one (after a flatten)."""


def moments(node: fx.Node, axis: int, block: int = 1) -> Moments | None:
    """Return the moments that `sweep` recorded on the node: of the channels along ``axis``, ``block`` entries each."""
    return (output_moments(node) or {}).get((axis, block))


def sweep(
    gm: fx.GraphModule,
    batches: Iterable[Inputs],
    outputs: bool = True,
    patches: int = 0,
    effects: int = 0,
    softmax: bool | None = None,
) -> None:
    """Run the graph on each batch in eval mode and record moments and statistics on its nodes.

    A tensor that several layers read has its moments once. One that was flattened on its way into a linear layer also
    has those of the channels that it had before. Memory does not grow with the number of batches. Processes that share
    the compression run all batches, and each adds up the moments of its share of the tensors: no sum depends on how
    many there are.

    Args:
        gm: the graph module, whose nodes are written to when all batches are read.
        batches: the inputs, each of which is run once.
        outputs: measure what layers make, besides what they read.
        patches: measure patches too where a conv's kernel reads at most so many numbers.
        effects: the number of inputs on which the importance of the layers' outputs is measured.
        softmax: whether the model's outputs are logits, for that; None where their names tell.

    Raises:
        FxlrdError: for batches that are empty, do not fit the model or are not finite.
    """
    shared = job(gm)
    measured = _Sweep(gm, outputs, patches)
    importance, remaining = Importance(gm, softmax), effects
    for i, inputs in enumerate(batches):
        try:
            with evaluating(gm), torch.no_grad():
                measured.tokens = tokens_of(gm, inputs)
                measured.run(*feed(gm, inputs))
            if remaining > 0:
                remaining = remaining - examples(inputs) if importance.offer(inputs) else 0
        except Exception as error:
            raise failure(i, inputs, error) from error
    importance.finish()
    if shared is not None:
        measured.exchange(shared)
        importance.exchange(shared)
    measured.check()
    measured.record(importance)
    logits_among.record(gm, importance.logits)


def forget_statistics(gm: fx.GraphModule) -> None:
    """Remove what `sweep` recorded."""
    for node in gm.graph.nodes:
        output_moments.drop(node)
        statistics.drop(node)


class _Sweep(ReachingInterpreter):
    """Runs a graph and adds up the moments of the tensors that layers read and make.

    What a layer reads is measured when it reads it: an operation in place may have changed it since it was made.

    Attributes:
        layers: by call of a layer, its module and the node that it reads.
        outputs: whether what layers make is measured too.
        blocks: by call of a linear layer behind a flatten, the entries of one channel.
        patch_readers: the calls of convs whose patches are measured.
        read_as: by call of a layer, the node that it reads and the number of changes in place before it does.
        sums: the moments so far, by node, number of changes in place since its value was made, and axis.
        patches: the moments of patches so far, by conv.
        reached: the calls of layers that were run.
        failed: why moments were given up, by key of `sums` and axis, or by conv for patches.
        tokens: which positions of the inputs hold tokens, where not all do.
        job: the processes that share the sums.
    """

    def __init__(self, gm: fx.GraphModule, outputs: bool, patches: int) -> None:
        super().__init__(gm)
        self.gm = gm
        self.outputs = outputs
        self.layers: dict[fx.Node, tuple[nn.Module, fx.Node]] = {}
        self.blocks: dict[fx.Node, int] = {}
        self.patch_readers: set[fx.Node] = set()
        self.sums: dict[tuple[fx.Node, int], dict[Axis, Moments]] = {}
        self.patches: dict[fx.Node, Moments] = {}
        self.read_as: dict[fx.Node, tuple[fx.Node, int]] = {}
        self.reached: set[fx.Node] = set()
        self.failed: dict[Any, Reason] = {}
        self.tokens: Tensor | None = None
        self.job = job(gm)
        self._numbers: dict[Any, int] = {}
        self._added: set[tuple[fx.Node, int, Axis]] = set()  # in this run
        self._versions: dict[fx.Node, int] = {}
        for node, module, read in _layer_calls(gm):
            self.layers[node] = module, read
            if isinstance(module, nn.Linear) and (block := features_per_channel(gm, read)) > 1:
                self.blocks[node] = block
            c_in, _, groups = channels_per_group(module)
            if isinstance(module, CONVS) and groups == 1 and 1 < kernel_area(module) <= patches // c_in:
                self.patch_readers.add(node)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        self._added.clear()
        return super().run(*args, **kwargs)

    def run_node(self, n: fx.Node) -> Any:
        module, read = self.layers.get(n, (None, None))
        if module is not None and read is not None and _is_real(value := self.env[read]):
            changes = value._version - self._versions[read]
            self.read_as[n] = read, changes
            for block in {1, self.blocks.get(n, 1)}:
                self._add(read, changes, value, module, block)
            if n in self.patch_readers:
                self._add_patches(n, module, value)
        value = super().run_node(n)
        if module is not None and reached(value):
            self.reached.add(n)
        if _is_real(value):
            self._versions[n] = value._version
            if module is not None and self.outputs:
                self._add(n, 0, value, module, 1)
        return value

    def _add(self, node: fx.Node, changes: int, value: Tensor, module: nn.Module, block: int) -> None:
        """Add a tensor that the layer reads or makes, once in a run whatever the number of its readers."""
        axis = channel_axis(module, value.dim())
        count = value.shape[axis] // block
        if count > LARGEST or (node, changes, (axis, block)) in self._added:
            return
        self._added.add((node, changes, (axis, block)))
        by_axis = self.sums.setdefault((node, changes), {})

        def add() -> None:
            if (axis, block) not in by_axis:
                by_axis[axis, block] = Moments.empty(count, value.device)
            rows = at_tokens(value.movedim(axis, -1), self.tokens)
            by_axis[axis, block].add(rows.unflatten(-1, (count, block)).mT.reshape(-1, count))

        self._unless_no_memory((node, changes, (axis, block)), by_axis, (axis, block), add)

    def _add_patches(self, node: fx.Node, conv: nn.Module, value: Tensor) -> None:
        assert isinstance(conv, Conv)

        def add() -> None:
            if node not in self.patches:
                self.patches[node] = Moments.empty(conv.weight[0].numel(), value.device)
            sums = self.patches[node]
            sums.add(patches(conv, value, PATCHES * len(sums.total)))

        self._unless_no_memory(node, self.patches, node, add)

    def _unless_no_memory(self, what: Any, sums: dict[Any, Moments], key: Any, add: Callable[[], None]) -> None:
        """Add to moments that were not given up yet. Without memory for it they are given up, and what they hold.

        Those that another process adds up have none here.
        """
        number = self._numbers.setdefault(what, len(self._numbers))
        if self.job is not None and not self.job.owns(number):
            sums.setdefault(key, Moments.empty(1, torch.device("cpu")))
            return
        if what in self.failed:
            return
        try:
            add()
        except Exception as error:
            if (reason := memory_failure(error, "calibration")) is None:
                raise
            self.failed[what] = reason
            sums.pop(key, None)

    def exchange(self, shared: Job) -> None:
        """Give all processes the moments of all tensors, or why they were given up."""
        for what, number in self._numbers.items():
            sums: dict[Any, Moments] = self.patches
            key: Any = what
            if isinstance(what, tuple):
                node, changes, key = what
                sums = self.sums[node, changes]
            moments, reason = shared.owners((sums.pop(key, None), self.failed.get(what)), number)
            if moments is not None:
                sums[key] = moments
            if reason is not None:
                self.failed[what] = reason

    def check(self) -> None:
        """Raise FxlrdError for moments that are not finite, or of no inputs."""
        tensors = [(node, each) for (node, _), by_axis in self.sums.items() for each in by_axis.values()]
        for node, each in [*tensors, *self.patches.items()]:
            if not bool(each.products.isfinite().all()):
                dtype = next((p.dtype for p in self.gm.parameters()), torch.get_default_dtype())
                raise FxlrdError(
                    f"calibration: {node.target} gives NaN or Inf for these inputs; "
                    f"is their scale right, and does {str(dtype)[6:]} hold the activations?"
                )
        if self.layers and not self.failed and not any(each.count for _, each in tensors):
            raise FxlrdError(NO_INPUTS)

    def record(self, importance: Importance) -> None:
        """Record the moments and the layers' statistics on the nodes."""
        made: dict[fx.Node, dict[Axis, Moments]] = {}
        for (node, _), by_axis in sorted(self.sums.items(), key=lambda item: item[0][1]):
            made.setdefault(node, {}).update(by_axis)
        for node, by_axis in made.items():
            output_moments.record(node, by_axis)
        for node, (module, read) in self.layers.items():
            sizes, by_axis = shape(read), self.sums.get(self.read_as.get(node, (read, 0)), {})
            axis = None if sizes is None else channel_axis(module, len(sizes))
            reads = [each for (a, block), each in by_axis.items() if block == 1 and axis in (None, a)]
            one = reads[0] if len(reads) == 1 else None
            estimate = importance.estimate(node)
            importance.sums.pop(node, None)  # as large as all moments together
            failure = self._failure(node, read, axis) or importance.failed.get(node)
            called = node in self.reached
            statistics.record(node, Statistics(one, self.patches.get(node), estimate, called, failure))

    def _failure(self, node: fx.Node, read: fx.Node, axis: int | None) -> Reason | None:
        """Return why what a layer reads, or its patches, could not be measured."""
        if node in self.failed:
            return self.failed[node]
        tensor = self.read_as.get(node, (read, 0))
        keys = [key for key in self.failed if isinstance(key, tuple) and key[:2] == tensor]
        return next((self.failed[key] for key in keys if key[2][1] == 1 and axis in (None, key[2][0])), None)


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _layer_calls(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, nn.Module, fx.Node]]:
    """Yield each call of a layer with one input: the call, the module and the node that it reads."""
    modules = layers(gm)
    for node in gm.graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        read = source(node) if module is not None else None
        if module is not None and read is not None:
            yield node, module, read
