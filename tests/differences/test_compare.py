from __future__ import annotations

import copy
import cProfile
import io
import json
import operator
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import fx, nn

import fxlrd
from fxlrd import FxlrdError, Pipeline
from fxlrd.cli import main
from fxlrd.differences import match
from fxlrd.differences.changes import _Grouping
from fxlrd.differences.compare import Steps, diff
from fxlrd.differences.model import KINDS

GOLDEN = Path(__file__).parent / "golden" / "diff.txt"


class Block(nn.Module):
    def __init__(self, width: int = 32):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(width)
        self.relu = nn.ReLU()
        self.conv2 = nn.Conv2d(width, width, 1)

    def forward(self, x):
        return self.relu(self.conv2(self.relu(self.bn1(self.conv1(x)))) + x)


class Net(nn.Module):
    def __init__(self, blocks: int = 4):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3)
        self.blocks = nn.Sequential(*(Block() for _ in range(blocks)))
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        return self.head(self.blocks(self.stem(x)).mean((2, 3)))


def captured(model: nn.Module | None = None, size: int = 10) -> fx.GraphModule:
    return fxlrd.capture((model or Net()).eval(), torch.randn(2, 3, size, size))


def changes(d) -> dict[str, str]:
    return {c.name: c.kind for c in d.changes}


def test_fxlrd_diff_is_a_function():
    assert callable(fxlrd.diff)
    assert fxlrd.diff is diff


def test_nothing_differs_from_itself_or_a_copy():
    gm = captured()
    for other in (gm, copy.deepcopy(gm), fx.symbolic_trace(gm)):
        d = diff(gm, other)
        assert not d
        assert d.changes == ()
        assert d.to_text() == ""
        assert d.to_dict()["same"] is True
        assert len(d.untouched) == len(gm.graph.nodes)
    assert set(changes(diff(gm, captured())).values()) == {"values"}


def test_the_text_of_a_compression_is_that_of_the_golden_file():
    """To renew it after a change that is meant: delete the file and run the test twice."""
    gm = captured()
    done = Pipeline.parse("decompose{ratio=2,skip=head},merge{mode=exact,norms=true}")(gm)
    text = diff(gm, done).to_text(times=False) + "\n"
    text = text.replace("affine=True, bias=True", "affine=True")  # how newer versions of torch write a BatchNorm
    if not GOLDEN.exists():
        GOLDEN.parent.mkdir(exist_ok=True)
        GOLDEN.write_text(text)
        pytest.fail("there was no golden file")
    assert text == GOLDEN.read_text()


def test_a_decomposed_layer_is_one_change_with_its_figures():
    gm = captured()
    done = Pipeline.parse("decompose{ratio=2}")(gm)
    d = diff(gm, done)
    change = next(c for c in d.to_dict()["changes"] if c["name"] == "blocks.1.conv1")
    assert (change["kind"], change["form"]) == ("rewritten", "tucker2")
    assert [(e["kind"], (e["before"] or e["after"])["target"]) for e in change["edits"]] == [
        ("went", "blocks.1.conv1"),
        ("came", "blocks.1.conv1.first"),
        ("came", "blocks.1.conv1.core"),
        ("came", "blocks.1.conv1.last"),
    ]
    assert change["params_before"] == 32 * 32 * 9
    assert change["params"] == sum(p.numel() for p in done.graph_module.get_submodule("blocks.1.conv1").parameters())
    assert 0 < change["flops"] < change["flops_before"]
    assert change["ranks"] == [19, 19]
    assert 0 < change["error"] < 1
    assert change["passes"] == ["decompose"]
    assert change["notes"] == ["tucker2 at rank 19x19"]
    assert {"name": "stem", "reason": "in_channels=3: the stem reads the model's input"} in d.to_dict()["skipped"]
    assert d.to_dict()["blocks"] == [{"name": "blocks.0", "same": ["blocks.1", "blocks.2", "blocks.3"]}]
    assert "blocks.1 … blocks.3: the same as blocks.0" in d.to_text()
    json.dumps(d.to_dict())


def test_the_other_way_round_the_original_is_back():
    gm = captured()
    d = diff(Pipeline.parse("decompose{ratio=2}")(gm), gm)
    assert set(changes(d).values()) == {"rewritten"}
    assert {c.form for c in d.changes} == {"original"}


def test_what_was_composed_is_merged_and_its_neighbours_are_untouched():
    gm = captured()
    d = diff(gm, Pipeline.parse("merge{mode=exact,norms=true}")(gm))
    assert changes(d) == {f"blocks.{i}.conv1": "merged" for i in range(4)}
    assert [c.merged for c in d.changes] == [(f"blocks.{i}.bn1",) for i in range(4)]
    assert "blocks_0_relu" in d.untouched


def test_folding_that_fxlrd_did_not_do_is_merged_too():
    from torch.fx.experimental.optimization import fuse

    model = Net().eval()
    for bn in (b.bn1 for b in model.blocks):
        nn.init.uniform_(bn.running_var)
    before = fx.symbolic_trace(model)
    d = diff(before, fuse(model))
    assert changes(d) == {f"blocks.{i}.conv1": "merged" for i in range(4)}


def test_merged_channels_are_told_with_what_only_has_another_shape():
    gm = captured()
    data = [torch.randn(16, 3, 10, 10)]
    done = Pipeline.parse("calibrate,merge{ranks=16}").with_options(calibration=data)(gm)
    d = diff(gm, done)
    assert changes(d)["blocks.0.conv1"] == "changed"
    assert changes(d)["blocks.0.bn1"] == "changed"
    assert changes(d)["blocks.0.relu"] == "reshaped"
    assert "keeps 16 channels out" in d.to_text()


@pytest.mark.parametrize(
    ("spec", "kinds"),
    [
        ("recalibrate", {"values"}),
        ("decompose{ratio=2},freeze", {"trainable"}),
        ("decompose{ratio=2},branch{groups=2,steps=5}", {"changed"}),
        ("calibrate", set()),
    ],
)
def test_steps_of_a_pipeline(spec, kinds):
    steps = Steps()
    pipeline = Pipeline.parse(spec)
    if "calib" in spec:
        pipeline = pipeline.with_options(calibration=[torch.randn(16, 3, 10, 10) + 1])
    done = pipeline(captured(), callback=steps)
    assert len(steps.names) == len(pipeline.passes) + 1
    d = steps.diff(-2, -1, report=done)
    assert set(changes(d).values()) == kinds
    assert [p["text"] for p in d.passes] == [done.ledger[-1].text]
    with pytest.raises(FxlrdError, match="there are 0 input, 1"):
        steps.diff(0, 7)


def test_what_passes_did_is_in_the_order_of_application():
    gm = captured()
    done = Pipeline.parse("decompose{ratio=2},branch{groups=2,steps=5}")(gm)
    change = next(c for c in diff(gm, done).changes if c.name == "blocks.0.conv1")
    assert change.passes == ("decompose", "branch{groups=2,steps=5}")
    assert change.form == "branched"


def test_the_order_of_both_graphs_is_recoverable():
    gm = captured()
    done = Pipeline.parse("decompose{ratio=2}")(gm)
    d = diff(gm, done).to_dict()
    came = {e["after"]["index"]: e["after"]["name"] for c in d["changes"] for e in c["edits"] if e["after"]}
    names = [n.name for n in done.graph_module.graph.nodes]
    assert all(names[index] == name for index, name in came.items())
    assert [came.get(i, name) for i, name in enumerate(names)] == names
    assert sorted([*came.values(), *d["untouched"]]) == sorted(names)


def test_a_result_of_compress_is_compared_with_the_model_by_names():
    model = Net().eval()
    result = fxlrd.compress(model, torch.randn(2, 3, 10, 10), measure=False)
    d = diff(model, result)
    assert changes(d)["blocks.0.conv1"] == "rewritten"
    assert d.skipped
    assert d.changes[0].figures["ranks"] == [19, 19]
    assert "compared by the names" in d.to_text()
    assert not diff(model, copy.deepcopy(model))


class Turning(nn.Module):
    """No graph: what it does depends on values."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(32, 32)

    def forward(self, x):
        return self.one(x) if bool(x.sum() > -1e9) else x


def test_a_model_around_regions_is_compared_by_names():
    model = Turning().eval()
    result = fxlrd.compress(model, torch.randn(2, 32), measure=False)
    assert isinstance(result.model, Turning)
    assert changes(diff(model, result)) == {"one": "rewritten"}
    assert "modules" in diff(model, result).to_text()


class Other(Turning):
    """The same modules, in other code."""

    def forward(self, x):
        return -super().forward(x)


def test_other_code_around_the_same_modules_is_a_change():
    one, two = Turning(), Other()
    two.load_state_dict(one.state_dict())
    d = diff(one, two)
    assert changes(d) == {"Turning": "changed"}
    assert "+ Other" in d.to_text()
    inside = diff(nn.Sequential(one), nn.Sequential(two))
    assert changes(inside) == {"0": "changed"}
    assert inside.untouched == ("0.one",)
    assert not diff(nn.Sequential(two), nn.Sequential(two))
    graphs = [nn.Sequential(nn.Sequential(nn.Linear(4, 4))), fx.symbolic_trace(nn.Sequential(nn.Sequential()))]
    graphs[1].add_module("0", nn.Module())
    graphs[1].get_submodule("0").add_module("0", graphs[0][0][0])
    assert not diff(*graphs), "what a graph has around modules runs no code"


class Holds(nn.Module):
    """A parameter, and nothing that a graph could call."""

    def __init__(self):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(32))

    def forward(self, x):
        return x * self.scale


class Owns(nn.Module):
    """Tensors beside its parts: a graph has a module of no class in its place."""

    def __init__(self):
        super().__init__()
        self.one = nn.Linear(32, 32)
        self.holds = Holds()
        self.register_buffer("shift", torch.ones(32))

    def forward(self, x):
        return self.holds(self.one(x)) + self.shift


def test_a_loaded_model_is_that_which_was_saved(tmp_path):
    result = fxlrd.compress(Owns().eval(), torch.randn(2, 32), measure=False)
    fxlrd.save(result, tmp_path)
    loaded = fxlrd.load(tmp_path, Owns())
    assert not diff(result, loaded)
    assert not diff(loaded, result)
    with torch.no_grad():
        loaded.shift.add_(1)
        loaded.holds.scale.add_(1)
    assert list(changes(diff(result, loaded)).values()) == ["values", "values"]


def test_retraced_factors_are_still_those_of_their_layer():
    model = Net().eval()
    result = fxlrd.compress(model, torch.randn(2, 3, 10, 10), measure=False)
    plain = fx.symbolic_trace(copy.deepcopy(result.model))
    for node in plain.graph.nodes:
        node.meta.clear()
    d = diff(fx.symbolic_trace(model), plain)
    assert changes(d)["blocks.2.conv1"] == "rewritten"
    assert changes(diff(plain, fx.symbolic_trace(model)))["blocks.2.conv1"] == "rewritten"


# -- graphs of a user's own


def net(f, **modules) -> fx.GraphModule:
    root = nn.Module()
    for name, module in modules.items():
        setattr(root, name, module)
    graph = fx.Graph()
    x = graph.placeholder("x")
    graph.output(f(graph, x))
    return fx.GraphModule(root, graph)


def chain(*names: str):
    def build(graph, value):
        for name in names:
            function = getattr(F, name[1:], None) if name[0] == "!" else None
            value = graph.call_function(function, (value,)) if function else graph.call_module(name, (value,))
        return value

    return build


@pytest.fixture
def parts() -> dict[str, nn.Module]:
    return {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "bn": nn.BatchNorm1d(4), "act": nn.ReLU()}


@pytest.mark.parametrize(
    ("before", "after", "expected"),
    [
        ("a !relu b", "a !gelu b", {"relu": "rewritten"}),
        ("a !relu b", "a b", {"relu": "removed"}),
        ("a b", "a act b", {"act": "added"}),
        ("a !relu b", "a act b", {"relu": "rewritten"}),
        ("a act b bn", "a b act bn", {"act": "moved", "b": "moved", "bn": "moved"}),
        ("a !relu !relu b", "a !relu b", {"relu_1": "removed"}),
        ("a !relu !gelu !relu b", "a !relu !relu b", {"gelu": "removed"}),
        ("act a act", "act a", {"act": "removed"}),
        (
            "!relu !sigmoid !relu b",
            "!tanh !relu b",
            {"relu": "rewritten"},
        ),  # by what reads it: not the relu of that name
    ],
)
def test_small_edits(before, after, expected, parts):
    one, two = (net(chain(*text.split()), **parts) for text in (before, after))
    assert changes(diff(one, two)) == expected


def test_arguments_and_operands():
    def build(args):
        return net(lambda g, x: g.call_function(torch.flatten, (g.call_function(operator.sub, args(g, x)), 1)))

    one = build(lambda g, x: (x, 1))
    assert changes(diff(one, build(lambda g, x: (x, 2)))) == {"sub": "changed"}
    assert "sub(x, 2)" in diff(one, build(lambda g, x: (x, 2))).to_text()
    two = net(lambda g, x: g.call_function(operator.sub, (x, g.call_method("neg", (x,)))))
    three = net(lambda g, x: g.call_function(operator.sub, (g.call_method("neg", (x,)), x)))
    assert "moved" in changes(diff(two, three)).values()


def test_arguments_in_another_order_are_moved():
    def build(*names):
        graph = fx.Graph()
        args = {name: graph.placeholder(name) for name in names}
        graph.output(graph.call_function(operator.sub, (args["x"], args["y"])))
        return fx.GraphModule(nn.Module(), graph)

    d = diff(build("x", "y"), build("y", "x"))
    assert changes(d) == {"y": "moved", "x": "moved"}
    assert "y: moved, argument 1 instead of 2" in d.to_text()
    assert changes(diff(build("x", "y"), build("z", "x", "y"))) == {"z": "added"}


def test_a_change_that_the_text_of_a_node_does_not_show_is_told():
    def build(result, default=1):
        graph = fx.Graph()
        x = graph.placeholder("x", default_value=default)
        graph.output(result(graph.call_module("act", (x,))))
        root = nn.Module()
        root.act = nn.ReLU()
        return fx.GraphModule(root, graph)

    one = build(lambda y: y)
    assert "output: changed, (%) → ({'y': %})\n" in diff(one, build(lambda y: {"y": y})).to_text() + "\n"
    assert "x: changed, (1) → (2)\n" in diff(one, build(lambda y: y, default=2)).to_text() + "\n"


def test_a_model_under_another_name_is_renamed(parts):
    inside = fx.symbolic_trace(nn.Sequential(parts["a"], parts["bn"], parts["b"]))
    around = fx.symbolic_trace(nn.Sequential(nn.Sequential(parts["a"], parts["bn"], parts["b"])))
    assert changes(diff(inside, around)) == {"0": "renamed", "1": "renamed", "2": "renamed"}
    named = fx.symbolic_trace(nn.ModuleDict({"model": nn.Sequential(*parts.values())})["model"])
    apart = net(
        chain("p", "q", "r", "s"), **dict(zip("pqrs", copy.deepcopy(nn.ModuleList(parts.values())), strict=True))
    )
    assert changes(diff(named, apart)) == dict.fromkeys(["input_1", *"0123"], "renamed")


def test_a_layer_replaced_under_unrelated_names_is_one_rewrite(parts):
    one = net(chain("a", "act", "b"), **parts)
    two = net(chain("p", "q", "act", "b"), p=nn.Linear(4, 1), q=nn.Linear(1, 4), **parts)
    d = diff(one, two)
    assert changes(d) == {"a": "rewritten"}
    assert [e.kind for e in d.changes[0].edits] == ["went", "came", "came"]


def test_shapes_are_not_compared_between_different_inputs():
    model = Net().eval()
    d = diff(captured(model, 10), captured(model, 12))
    assert not d
    assert d.notes


def test_dtype_and_weights(parts):
    one = net(chain("a", "act"), **parts)
    parts["a"] = copy.deepcopy(parts["a"]).double()
    two = net(chain("a", "act"), **parts)
    assert changes(diff(one, two)) == {"a": "values"}
    assert "float32[4, 4] → float64[4, 4]" in diff(one, two).to_text()
    parts["a"] = copy.deepcopy(one.a)
    with torch.no_grad():
        parts["a"].weight *= 1.5
    assert "weight moved by 0.5" in diff(one, net(chain("a", "act"), **parts)).to_text()


def test_nan_in_both_is_the_same(parts):
    with torch.no_grad():
        parts["a"].bias[0] = float("nan")
    one = net(chain("a"), **parts)
    assert not diff(one, copy.deepcopy(one))


def test_sparse_weights_are_compared():
    def masked(mask):
        root = nn.Sequential(nn.ReLU())
        root.register_buffer("mask", mask)
        return root

    one = masked(torch.eye(3).to_sparse())
    assert not diff(one, copy.deepcopy(one))
    assert "mask moved by 1" in diff(one, masked(2 * torch.eye(3).to_sparse())).to_text()
    assert "mask sparse_coo → strided" in diff(one, masked(torch.eye(3))).to_text()


def test_shared_modules_are_one_change_of_all_calls():
    layer = nn.Linear(16, 16)
    gm = fxlrd.capture(nn.Sequential(layer, nn.ReLU(), layer).eval(), torch.randn(2, 16))
    d = diff(gm, Pipeline.parse("decompose{ratio=2}")(gm))
    assert changes(d) == {"0": "rewritten"}
    assert (len(d.changes[0].went), len(d.changes[0].came)) == (2, 4)
    assert "(2 calls)" in d.to_text()
    assert d.changes[0].figures["params_before"] == 16 * 16 + 16


def test_the_work_on_a_layer_of_many_calls_grows_with_their_number_only(monkeypatch):
    one = net(chain(*["a", "!relu"] * 100), a=nn.Linear(2, 2))
    two = net(chain(*["a.0", "a.1"] * 100), a=nn.Sequential(nn.Linear(2, 2), nn.ReLU()))
    seen = []
    counterparts, takes = match._counterparts, _Grouping._takes
    monkeypatch.setattr(match, "_counterparts", lambda *args: seen.append(counterparts(*args)) or seen[-1])
    sites = []
    monkeypatch.setattr(_Grouping, "_takes", lambda self, site: sites.append(site) or takes(self, site))
    assert changes(diff(one, two))["a"] == "rewritten"
    assert max(map(len, seen)) <= match._CANDIDATES
    assert sites == ["a"]


def test_the_work_on_what_reads_a_long_chain_that_went_grows_with_its_length_only():
    def readers(count, before):
        def build(graph, value):
            outputs = []
            for i in range(count):
                value = graph.call_function(F.silu, (value,)) if before else value
                outputs.append(graph.call_module(f"l{i}", (value,)))
            return tuple(outputs)

        return net(build, **{f"l{i}": nn.Identity() for i in range(count)})

    def work(count):
        one, two = readers(count, True), readers(count, False)
        profile = cProfile.Profile()
        assert len(profile.runcall(diff, one, two).changes) == count
        return sum(entry.callcount for entry in profile.getstats())

    assert work(400) < 5 * work(100)


def test_colour_only_where_it_is_asked_for():
    d = diff(captured(), captured())
    assert "\x1b[" not in d.to_text()
    assert "\x1b[" in d.to_text(color=True)


def test_what_is_no_model():
    with pytest.raises(FxlrdError, match="before is a str"):
        diff("a", captured())
    with pytest.raises(FxlrdError, match="after has weights that are not initialised yet"):
        diff(nn.Sequential(nn.ReLU()), nn.Sequential(nn.LazyLinear(2)))


# -- the command line

SMALL = ["--input", "3x32x32"]
MODEL = ["diff", "torchvision:resnet18", *SMALL]


def test_the_exit_status_is_that_of_diff(capsys):
    assert main([*MODEL, "torchvision:resnet18"]) == 0
    assert capsys.readouterr().out == ""
    assert main([*MODEL, "torchvision:resnet18", "--seed", "0", "--passes", "decompose"]) == 2
    assert "give another model, or --passes, or --preset" in capsys.readouterr().err
    assert main([*MODEL, "torchvision:resnet34", "--no-values"]) == 1
    assert "48 added" in capsys.readouterr().out


def test_a_defect_is_trouble_and_not_a_difference(capsys, monkeypatch):
    def broken(*args, **options):
        raise KeyError("defect")

    monkeypatch.setattr("fxlrd.app.commands.diff", broken)
    assert main([*MODEL, "torchvision:resnet18"]) == 2
    assert "KeyError: 'defect'" in capsys.readouterr().err


@pytest.mark.slow
def test_passes_and_steps_on_the_command_line(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("FORCE_COLOR", raising=False)
    path = tmp_path / "d.json"
    spec = "decompose{ratio=4},merge{mode=exact,norms=true}"
    assert main([*MODEL, "--passes", spec, "--steps", "--json", str(path), "--html", str(tmp_path / "d.html")]) == 1
    out, err = capsys.readouterr()
    assert err == ""
    assert "\x1b[" not in out
    assert out.startswith("decompose{ratio=4}\n\nparameters")
    assert "\nall\n\nparameters" in out
    data = json.loads(path.read_text())
    assert [step["pass"] for step in data["steps"]] == ["decompose{ratio=4}", "merge{mode=exact,norms=true}"]
    assert data["counts"]["merged"] == 20
    assert "layer4" in (tmp_path / "d.html").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("out", "status", "message"),
    [
        (">&-", 1, ""),
        (f"| {sys.executable} -c ''", 1, ""),
        (">/dev/full", 2, "fxlrd: standard output: OSError: [Errno 28] No space left on device\n"),
    ],
)
@pytest.mark.skipif(not Path("/dev/full").is_char_device(), reason="needs /dev/full")
def test_the_exit_status_does_not_depend_on_who_reads_unless_none_can(tmp_path, out, status, message):
    (tmp_path / "nets.py").write_text(
        "from torch import nn\ndef a():\n    return nn.ReLU()\ndef b():\n    return nn.GELU()\n"
    )
    command = f"{sys.executable} -m fxlrd diff nets:a nets:b --input 4 {out}; exit ${{PIPESTATUS[0]}}"
    paths = {"PYTHONPATH": os.pathsep.join([str(Path(fxlrd.__file__).parents[1]), str(tmp_path)])}
    done = subprocess.run(
        ["bash", "-c", command], cwd=tmp_path, env=os.environ | paths, stderr=subprocess.PIPE, text=True
    )
    assert (done.returncode, done.stderr) == (status, message)


def test_a_terminal_that_has_no_arrows(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), "ascii"))
    assert main([*MODEL, "--passes", "decompose{ranks=4}"]) == 1
    assert rb"rewritten 1 \u2192 3" in sys.stdout.buffer.getvalue()


@pytest.mark.slow
def test_the_environment_may_ask_for_colour_or_against_it(capsys, monkeypatch):
    command = [*MODEL, "--passes", "decompose{ranks=4}"]
    monkeypatch.setenv("FORCE_COLOR", "1")
    assert main(command) == 1
    assert "\x1b[32m+ layer1.0.conv1.core" in capsys.readouterr().out
    monkeypatch.setenv("NO_COLOR", "1")
    assert main(command) == 1
    assert "\x1b[" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "give another model, or --passes, or --preset"),
        (["torchvision:resnet81"], "did you mean resnet18"),
        (["torchvision:resnet18", "--steps"], "two models have no steps"),
        (["--passes", "decmopose"], "unknown pass"),
        (["--preset", "lrd", "--html", "no/such/folder/d.html"], "does not exist"),
    ],
)
def test_trouble_is_one_line_and_status_2(arguments, message, capsys):
    assert main([*MODEL, *arguments]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert message in err
    assert err.count("\n") == 1


# -- any graph


@st.composite
def graphs(draw) -> fx.GraphModule:
    root, graph = nn.Module(), fx.Graph()
    root.shared = nn.Tanh()
    nodes = [graph.placeholder("x"), graph.placeholder("y")]
    for i in range(draw(st.integers(1, 12))):
        kind = draw(st.sampled_from(["module", "shared", "relu", "neg", "add"]))
        value = draw(st.sampled_from(nodes))
        if kind == "module":
            setattr(root, f"m{i}", nn.Linear(2, 2))
            nodes.append(graph.call_module(f"m{i}", (value,)))
        elif kind == "shared":
            nodes.append(graph.call_module("shared", (value,)))
        elif kind == "relu":
            nodes.append(graph.call_function(F.relu, (value,)))
        elif kind == "neg":
            nodes.append(graph.call_method("neg", (value,)))
        else:
            nodes.append(graph.call_function(operator.add, (value, draw(st.sampled_from(nodes)))))
    graph.output(tuple(nodes[-2:]))
    return fx.GraphModule(root, graph)


def check_every_node_once(one: fx.GraphModule, two: fx.GraphModule) -> None:
    d = diff(one, two)
    edits = [e for c in d.changes for e in c.edits]
    gone = [e.before.name for e in edits if e.before is not None]
    come = [e.after.name for e in edits if e.after is not None]
    assert len(set(gone)) == len(gone)
    assert len(set(come)) == len(come)
    assert sorted(come + list(d.untouched)) == sorted(n.name for n in two.graph.nodes)
    went = sum(e.after is None for e in edits)
    paired = sum(e.before is not None and e.after is not None for e in edits)
    assert went + paired + len(d.untouched) == len(one.graph.nodes)
    assert {c.kind for c in d.changes} <= set(KINDS)
    names = [name for block in d.to_dict()["blocks"] for name in block["same"]]
    assert len(set(names)) == len(names)
    d.to_text(color=True)
    json.dumps(d.to_dict())


@settings(max_examples=40, deadline=None)
@given(graphs(), graphs())
def test_every_node_is_in_one_change_at_most_and_none_is_lost(one, two):
    check_every_node_once(one, two)


@settings(max_examples=40, deadline=None)
@given(graphs(), st.data())
def test_a_graph_is_itself_and_one_other_argument_is_seen(gm, data):
    assert not diff(gm, gm)
    assert not diff(gm, copy.deepcopy(gm))
    other = copy.deepcopy(gm)
    nodes = [n for n in other.graph.nodes if n.op not in ("placeholder", "output")]
    node = data.draw(st.sampled_from(nodes))
    with other.graph.inserting_after(node):
        new = other.graph.call_method("exp", (node,))
    node.replace_all_uses_with(new, delete_user_cb=lambda user: user is not new)
    other.recompile()
    d = diff(gm, other)
    assert changes(d) == {"exp": "added"}
    assert changes(diff(other, gm)) == {"exp": "removed"}
    check_every_node_once(gm, other)
