from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from fxlrd.capturing.whole import capture
from fxlrd.graph.captured import captured as graph_captured
from fxlrd.graph.captured import propagate
from fxlrd.graph.compare import difference
from fxlrd.graph.facts import Provenance, provenance
from fxlrd.graph.inputs import tensors
from fxlrd.graph.run import run
from fxlrd.graph.surgery import called, fork, replace, restore
from fxlrd.graph.surgery import calls as graph_calls
from fxlrd.layers.build import decomposed
from fxlrd.layers.forms import explicit_ranks
from tests.support.models import StemCalledTwice

X = (2, 4, 6, 6)


def captured(model=None):
    model = (model or StemCalledTwice()).double().eval()
    return capture(model, torch.randn(X, dtype=torch.float64))


def full_rank(gm, target):
    """Replace a layer by factors that compute the same, in a fork."""
    module = gm.get_submodule(target)
    ranks = explicit_ranks(module, 100)
    form, error = decomposed(module, ranks)
    new = fork(gm)
    replace(new, target, form, ranks, error=error)
    new.graph.lint()
    new.recompile()
    return new


def outputs(gm):
    return tensors(run(gm, graph_captured(gm).inputs))


def targets(gm):
    return [str(n.target) for n in gm.graph.nodes if n.op == "call_module"]


def test_fork_shares_modules_and_leaves_the_original_as_it_is():
    gm = captured()
    code, before, wanted = gm.code, targets(gm), outputs(gm)
    new = fork(gm)
    assert all(new.get_submodule(t) is m for t, m in called(gm).items())
    assert graph_captured(new) is graph_captured(gm)
    assert not {id(n) for n in new.graph.nodes} & {id(n) for n in gm.graph.nodes}
    assert [provenance(n) for n in new.graph.nodes] == [provenance(n) for n in gm.graph.nodes]
    new = full_rank(gm, "stem")
    assert "stem.core" in targets(new)
    assert (gm.code, targets(gm)) == (code, before)
    assert isinstance(gm.stem, nn.Conv2d)
    assert all(torch.equal(a, b) for a, b in zip(outputs(gm), wanted, strict=True))


@pytest.mark.parametrize("training", [True, False])
def test_fork_carries_the_mode_of_the_containers(training):
    gm = captured().train(training)
    assert {m.training for m in fork(gm).modules()} == {training}


@pytest.mark.parametrize(
    ("target", "calls", "roles"),
    [
        ("body.0", 1, ("first", "core", "last")),
        ("stem", 2, ("first", "core", "last")),
        ("head", 2, ("first", "last")),
    ],
)
def test_replace_and_restore_at_every_call(target, calls, roles):
    gm = captured()
    original, wanted = gm.get_submodule(target), outputs(gm)
    new = full_rank(gm, target)
    assert target not in targets(new)
    for role in roles:
        nodes = graph_calls(new, f"{target}.{role}")
        assert len(nodes) == calls
        assert {(p.name, p.role) for p in map(provenance, nodes)} == {(target, role)}
        assert all(provenance(n).original is original for n in nodes)
        assert all(provenance(n).error < 1e-12 for n in nodes)
    assert difference(outputs(new), wanted, "replaced").max_abs <= 1e-9

    restore(new, target, latency=0.5)
    new.graph.lint()
    new.recompile()
    assert new.get_submodule(target) is original
    assert targets(new) == targets(gm)
    assert {provenance(n) for n in graph_calls(new, target)} == {Provenance(target, latency=0.5)}
    assert difference(outputs(new), wanted, "restored").max_abs == 0


def test_every_layer_of_a_chain():
    gm = captured(nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 3)))
    new = full_rank(full_rank(full_rank(gm, "0"), "1"), "2")
    chain = ["0.first", "0.core", "0.last", "1.first", "1.last", "2.first", "2.core", "2.last"]
    assert targets(new) == chain
    assert difference(outputs(new), outputs(gm), "chain").max_abs <= 1e-9
    restore(new, "1")
    new.graph.lint()
    new.recompile()
    assert targets(new) == [*chain[:3], "1", *chain[5:]]
    assert difference(outputs(new), outputs(gm), "chain").max_abs <= 1e-9


def test_replaced_nodes_have_the_shapes_of_a_propagation_and_no_stale_flops():
    new = full_rank(captured(), "stem")
    inferred = {n.name: n.meta["tensor_meta"] for n in new.graph.nodes if n.op == "call_module"}
    assert all("flops" not in n.meta for role in ("first", "core", "last") for n in graph_calls(new, f"stem.{role}"))
    propagate(new, graph_captured(new).inputs)
    for n in new.graph.nodes:
        if n.op == "call_module":
            found = n.meta["tensor_meta"]
            assert (inferred[n.name].shape, inferred[n.name].dtype) == (found.shape, found.dtype)


def test_restored_nodes_have_no_flops_of_the_last_factor():
    gm = captured()
    new = full_rank(gm, "stem")
    propagate(new, graph_captured(new).inputs)
    restore(new, "stem")
    wanted = graph_calls(gm, "stem")[0].meta["flops"]
    assert all(n.meta.get("flops", wanted) == wanted for n in graph_calls(new, "stem"))


def test_gradient_flows_and_mode_goes_round_trip():
    new = full_rank(captured(), "stem")
    new.train()
    assert new.stem.core.training
    new(torch.randn(X, dtype=torch.float64))[0].sum().backward()
    assert all(p.grad is not None for p in new.parameters())
    new.eval()
    assert not any(m.training for m in new.modules())


def test_provenance_survives_deepcopy():
    new = full_rank(captured(), "stem")
    twin = copy.deepcopy(new)
    pairs = list(zip(new.graph.nodes, twin.graph.nodes, strict=True))
    assert all(provenance(a) is provenance(b) for a, b in pairs)
    assert sum(provenance(a) is not None for a, _ in pairs) == len(targets(new))
    assert graph_captured(twin) == graph_captured(new)
    assert twin.stem.core is not new.stem.core
    assert difference(outputs(twin), outputs(new), "copy").max_abs == 0
