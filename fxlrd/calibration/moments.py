"""Second moments of tensors' channels over calibration inputs, recorded on the nodes that make them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxlrd.calibration.batches import NO_INPUTS, examples, failure
from fxlrd.calibration.common_reads import Axis, CommonReads, Reader
from fxlrd.calibration.importance import Importance
from fxlrd.calibration.metric import logits_among
from fxlrd.calibration.padding import at_tokens, tokens_of
from fxlrd.calibration.patches import patches
from fxlrd.calibration.watching import run_watched, tells_calls_apart
from fxlrd.errors import FxlrdError, Reason
from fxlrd.factor.failures import memory_failure
from fxlrd.graph.captured import runnable
from fxlrd.graph.facts import job, output_moments, shape, statistics
from fxlrd.graph.inputs import Inputs
from fxlrd.graph.operations import features_per_channel
from fxlrd.graph.run import evaluating, isolated
from fxlrd.graph.surgery import layers, source
from fxlrd.layers.fit import Moments, Statistics
from fxlrd.layers.kinds import CONVS, Conv, channel_axis, channels_per_group, kernel_area
from fxlrd.sharing import Job

LARGEST = 8192
"""Tensors with more channels than this have no moments: each would take half a gigabyte."""
PATCHES = 8
"""Patches sampled per batch, as a multiple of the patch length C·K."""


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
        effects: the number of inputs on which the importance of the layers' outputs is measured; fewer will do where
            outputs are those of long sequences, as of language models.
        softmax: whether the model's outputs are logits, for that; None where their names tell.

    Raises:
        FxlrdError: for batches that are empty, do not fit the model or are not finite.
    """
    shared = job(gm)
    measured = _Sweep(gm, outputs, patches)
    importance, remaining = Importance(gm, softmax), effects
    watchers = (measured,) if tells_calls_apart(gm) else ()
    for i, inputs in enumerate(batches):
        measured.begin(inputs)
        try:
            if remaining > 0 and not importance.enough:
                remaining = remaining - examples(inputs) if importance.offer(inputs, *watchers) else 0
            if not measured.complete:
                _run(gm, inputs, measured)
        except Exception as error:
            raise failure(i, inputs, error) from error
    measured.tensors.finish_run()
    importance.finish()
    if shared is not None:
        measured.exchange(shared)
        importance.exchange(shared)
    measured.check()
    measured.record(importance)
    logits_among.record(gm, importance.logits)


def _run(gm: fx.GraphModule, inputs: Inputs, measured: _Sweep) -> None:
    """Run without gradients: the graph of regions itself where a run of the model does not tell their calls apart."""
    model = runnable(gm) if tells_calls_apart(gm) else gm
    with evaluating(model), isolated(model), torch.no_grad():
        run_watched(gm, model, inputs, [measured])


def forget_statistics(gm: fx.GraphModule) -> None:
    """Remove what `sweep` recorded."""
    for node in gm.graph.nodes:
        output_moments.drop(node)
        statistics.drop(node)


class _Sweep:
    """Adds up the moments of the tensors that layers read and make, while runs are watched.

    What a layer reads is measured when it reads it: an operation in place may have changed it since it was made.

    Attributes:
        layers: by call of a layer, its module and the node that it reads.
        outputs: whether what layers make is measured too.
        blocks: by call of a linear layer behind a flatten, the entries of one channel.
        patch_readers: the calls of convs whose patches are measured.
        read_as: by call of a layer, the node that it reads and the number of changes in place before it does.
        tensors: the moments of what is read and made so far.
        patches: the moments of patches so far, by conv.
        reached: the calls of layers that were run.
        failed: why moments were given up, by key of the moments of tensors, or by conv for patches.
        tokens: which positions of the inputs hold tokens, where not all do.
        complete: whether the run of the present inputs is over.
        job: the processes that share the sums.
    """

    def __init__(self, gm: fx.GraphModule, outputs: bool, patches: int) -> None:
        self.gm = gm
        self.outputs = outputs
        self.layers: dict[fx.Node, tuple[nn.Module, fx.Node]] = {}
        self.blocks: dict[fx.Node, int] = {}
        self.patch_readers: set[fx.Node] = set()
        self.tensors = CommonReads(self._rows)
        self.patches: dict[fx.Node, Moments] = {}
        self.read_as: dict[fx.Node, tuple[fx.Node, int]] = {}
        self.reached: set[fx.Node] = set()
        self.failed: dict[Reader | fx.Node, Reason] = {}
        self.tokens: Tensor | None = None
        self.complete = False
        self.job = job(gm)
        self._numbers: dict[Reader | fx.Node, int] = {}
        self._added: set[Reader | fx.Node] = set()  # of the present inputs
        for node, module, read in _layer_calls(gm):
            self.layers[node] = module, read
            if isinstance(module, nn.Linear) and (block := features_per_channel(gm, read)) > 1:
                self.blocks[node] = block
            c_in, _, groups = channels_per_group(module)
            if isinstance(module, CONVS) and groups == 1 and 1 < kernel_area(module) <= patches // c_in:
                self.patch_readers.add(node)

    def begin(self, inputs: Inputs) -> None:
        """Begin with other inputs. A run of these that fails may be made again: nothing is added twice."""
        self.tensors.finish_run()
        self.tokens, self.complete = tokens_of(self.gm, inputs), False
        self._added.clear()

    def reads(self, call: fx.Node, value: Tensor, changes: int) -> None:
        """Add what a layer reads, unless it was added in this run."""
        module, read = self.layers.get(call, (None, None))
        if module is None or read is None or not value.is_floating_point():
            return
        self.read_as[call] = read, changes
        for block in {1, self.blocks.get(call, 1)}:
            self._add(read, changes, value, module, block)
        if call in self.patch_readers:
            self._unless_no_memory(call, lambda: self._add_patches(call, module, value))

    def makes(self, call: fx.Node, value: Any) -> Any:
        """Add what a layer makes, and return it."""
        module, _ = self.layers.get(call, (None, None))
        if module is not None:
            self.reached.add(call)
            if self.outputs and isinstance(value, Tensor) and value.is_floating_point():
                self._add(call, 0, value, module, 1)
        return value

    def ran(self) -> None:
        """Note that all layers were run that these inputs reach."""
        self.complete = True

    def _add(self, node: fx.Node, changes: int, value: Tensor, module: nn.Module, block: int) -> None:
        axis = channel_axis(module, value.dim())
        count = value.shape[axis] // block
        if count <= LARGEST:
            reader = node, changes, (axis, block)
            self._unless_no_memory(reader, lambda: self.tensors.add(reader, value, count))

    def _rows(self, reader: Reader, value: Tensor) -> Tensor:
        """Return a tensor as rows of channels (N×C)."""
        axis, block = reader[2]
        rows = at_tokens(value.detach().movedim(axis, -1), self.tokens)
        count = rows.shape[-1] // block
        return rows.unflatten(-1, (count, block)).mT.reshape(-1, count)

    def _add_patches(self, node: fx.Node, conv: nn.Module, value: Tensor) -> None:
        assert isinstance(conv, Conv)
        if node not in self.patches:
            self.patches[node] = Moments.empty(conv.weight[0].numel(), value.device)
        sums = self.patches[node]
        sums.add(patches(conv, value, PATCHES * len(sums.total)))

    def _unless_no_memory(self, what: Reader | fx.Node, add: Callable[[], None]) -> None:
        """Add to moments, once for the present inputs. Without memory for it they are given up, and what they hold.

        Those that another process adds up have none here.
        """
        number = self._numbers.setdefault(what, len(self._numbers))
        if what in self._added or what in self.failed:
            return
        self._added.add(what)
        if self.job is not None and not self.job.owns(number):
            self._sums(what).setdefault(what, Moments.empty(1, torch.device("cpu")))
            return
        try:
            add()
        except Exception as error:
            if (reason := memory_failure(error, "calibration")) is None:
                raise
            self.failed[what] = reason
            self._sums(what).pop(what, None)

    def _sums(self, what: Reader | fx.Node) -> dict[Any, Moments]:
        return self.tensors.moments if isinstance(what, tuple) else self.patches

    def exchange(self, shared: Job) -> None:
        """Give all processes the moments of all tensors, or why they were given up."""
        for what, number in self._numbers.items():
            sums = self._sums(what)
            moments, reason = shared.owners((sums.pop(what, None), self.failed.get(what)), number)
            if moments is not None:
                sums[what] = moments
            if reason is not None:
                self.failed[what] = reason

    def check(self) -> None:
        """Raise FxlrdError for moments that are not finite, or of no inputs."""
        tensors = [(node, each) for (node, _, _), each in self.tensors.moments.items()]
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
        by_read: dict[tuple[fx.Node, int], dict[Axis, Moments]] = {}
        for (node, changes, axis), each in sorted(self.tensors.moments.items(), key=lambda item: item[0][1]):
            made.setdefault(node, {})[axis] = by_read.setdefault((node, changes), {})[axis] = each
        for node, by_axis in made.items():
            output_moments.record(node, by_axis)
        for node, (module, read) in self.layers.items():
            sizes, by_axis = shape(read), by_read.get(self.read_as.get(node, (read, 0)), {})
            along = None if sizes is None else channel_axis(module, len(sizes))
            reads = [each for (a, block), each in by_axis.items() if block == 1 and along in (None, a)]
            one = reads[0] if len(reads) == 1 else None
            estimate = importance.estimate(node)
            importance.sums.pop(node, None)  # as large as all moments together
            failure = self._failure(node, read, along) or importance.failed.get(node)
            called = node in self.reached
            statistics.record(node, Statistics(one, self.patches.get(node), estimate, called, failure))

    def _failure(self, node: fx.Node, read: fx.Node, axis: int | None) -> Reason | None:
        """Return why what a layer reads, or its patches, could not be measured."""
        if node in self.failed:
            return self.failed[node]
        tensor = self.read_as.get(node, (read, 0))
        keys = [key for key in self.failed if isinstance(key, tuple) and key[:2] == tensor]
        return next((self.failed[key] for key in keys if key[2][1] == 1 and axis in (None, key[2][0])), None)


def _layer_calls(gm: fx.GraphModule) -> Iterator[tuple[fx.Node, nn.Module, fx.Node]]:
    """Yield each call of a layer with one input: the call, the module and the node that it reads."""
    modules = layers(gm)
    for node in gm.graph.nodes:
        module = modules.get(str(node.target)) if node.op == "call_module" else None
        read = source(node) if module is not None else None
        if module is not None and read is not None:
            yield node, module, read
