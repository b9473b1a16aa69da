from __future__ import annotations

import copy
import functools
import json
import os
import pickle
import shutil
import stat
from collections import OrderedDict
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import fxlrd
from fxlrd import checkpoint, layout
from fxlrd.checkpoint import PLAN, load, read_plan, save
from fxlrd.cli import main
from fxlrd.errors import FxlrdError
from fxlrd.graph import annotate, fork, restore, tensors
from fxlrd.models import load_model
from fxlrd.passes import Decompose, Merge
from fxlrd.passes.result import PassResult, Site

X = torch.randn(4, 3, 12, 12, generator=torch.Generator().manual_seed(1))


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.reduce = nn.Conv2d(32, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.conv = nn.Conv2d(24, 24, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(24)
        self.expand = nn.Conv2d(24, 32, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(32)
        self.act = nn.ReLU()

    def forward(self, x):
        y = self.act(self.bn1(self.reduce(x)))
        y = self.act(self.bn2(self.conv(y)))
        return self.act(self.bn3(self.expand(y)) + x)


class Net(nn.Module):
    def __init__(self, classes=10):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.block = Block()
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(32, 32)
        self.head = nn.Linear(32, classes)

    def forward(self, x):
        x = self.block(self.stem(x)).mean((2, 3))
        return self.head(self.drop(self.fc(x)))


def trained(model):
    """Give running statistics, which a fresh model has none of."""
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            m.running_mean.normal_()
            m.running_var.uniform_(0.5, 2)
    return model.eval()


def compressed(model, x=X, **options):
    if not options.keys() & {"pipeline", "preset"}:
        options["ratio"] = 2
    return fxlrd.compress(model, x, measure=False, **options)


def empty(make):
    with torch.device("meta"):
        return make()


def equal(a, b, *inputs):
    with torch.no_grad():
        a, b = tensors(a(*inputs)), tensors(b(*inputs))
    return len(a) == len(b) > 0 and all(u.dtype == v.dtype and torch.equal(u, v) for u, v in zip(a, b, strict=True))


def state(model):
    return {
        name: (t.shape, t.stride(), t.dtype, t.requires_grad) for name, t in model.state_dict(keep_vars=True).items()
    }


def round_trip(make, path, *inputs, **options):
    """Compress, save, load into an architecture without weights, and return both models."""
    result = compressed(make(), inputs or X, **options)
    save(result, path)
    loaded = load(path, empty(make))
    assert equal(result.model, loaded, *(inputs or (X,)))
    assert not any(t.is_meta for t in [*loaded.parameters(), *loaded.buffers()])
    return result.model, loaded


class Restored(Decompose):
    """Decompose, and put one layer back, as snap does."""

    def __call__(self, gm, *rest):
        result = super().__call__(gm, *rest)
        restore(result.graph_module, "block.conv")
        result.graph_module.recompile()
        return result


# -- what is saved is what is loaded


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({}, {"block.conv.first.weight", "block.conv.core.weight", "block.conv.last.weight", "fc.first.weight"}),
        ({"preset": "freeze"}, {"block.conv.core.weight"}),
        ({"pipeline": "decompose,branch{groups=2}"}, {"block.conv.core.weight"}),
        ({"pipeline": "merge{mode=exact,norms=true}"}, {"block.reduce.bias", "head.weight"}),
        ({"pipeline": "decompose,merge{mode=exact,norms=true}"}, {"block.conv.first.weight"}),
        ({"pipeline": "merge{mode=relocate,ranks=8}"}, {"block.bn1.running_mean"}),
        ({"pipeline": "calibrate,merge{ratio=2}", "calibration": X}, {"block.conv.weight"}),
        ({"pipeline": "calibrate,decompose,refit{guard=false}", "calibration": X}, {"fc.last.bias"}),
        ({"pipeline": "recalibrate", "calibration": X}, {"block.bn1.running_mean"}),
        ({"pipeline": [Restored()]}, {"block.conv.weight", "fc.first.weight"}),
    ],
    ids=lambda value: str(value.get("pipeline", value.get("preset", "lrd"))) if isinstance(value, dict) else "",
)
def test_every_form_comes_back_as_the_users_own_class(tmp_path, options, names):
    model, loaded = round_trip(lambda: trained(Net()), tmp_path, **options)
    assert type(loaded) is Net
    assert names <= set(loaded.state_dict())
    assert state(loaded) == state(model)


def test_composed_away_is_an_identity(tmp_path):
    _, loaded = round_trip(lambda: trained(Net()), tmp_path, pipeline="merge{mode=exact,norms=true}")
    assert [type(m) for m in (loaded.block.bn1, loaded.block.bn3, loaded.fc, loaded.drop)] == [nn.Identity] * 4


def test_a_norm_without_a_bias_that_was_cut_comes_back(tmp_path):
    def net():
        model = trained(Net())
        model.block.bn1.register_parameter("bias", None)  # as bias=False, which older versions of torch do not know
        return model

    model, loaded = round_trip(net, tmp_path, pipeline="calibrate,merge{ratio=2}", calibration=X)
    assert loaded.block.bn1.num_features == model.block.bn1.num_features < 32
    assert loaded.block.bn1.bias is None


@pytest.mark.parametrize("options", [{"momentum": 1}, {"momentum": 0}, {"momentum": None}, {"eps": 1}])
def test_a_norm_that_was_cut_comes_back_with_whole_numbers_for_options(tmp_path, options):
    def net():
        model = trained(Net())
        vars(model.block.bn1).update(options)
        return model

    model, loaded = round_trip(net, tmp_path, pipeline="calibrate,merge{ratio=2}", calibration=X)
    assert loaded.block.bn1.num_features == model.block.bn1.num_features < 32


def test_a_layer_all_of_whose_factors_were_composed_comes_back(tmp_path):
    net = lambda: nn.Sequential(nn.Linear(32, 32), nn.ReLU())  # noqa: E731
    pipeline = [Decompose(ranks=30), Merge(mode="exact")]
    model, loaded = round_trip(net, tmp_path, torch.randn(3, 32), pipeline=pipeline)
    assert set(loaded.state_dict()) == set(model.state_dict()) == {"0.last.weight", "0.last.bias"}
    inplace = compressed(net(), torch.randn(3, 32), pipeline=pipeline, inplace=True).model
    assert set(inplace.state_dict()) == set(loaded.state_dict()), "in the user's own model, too"


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_dtypes_and_memory_formats(tmp_path, dtype, layout):
    x = X.to(dtype).contiguous(memory_format=layout)
    result = compressed(Net().eval().to(dtype).to(memory_format=layout), x)
    save(result, tmp_path)
    loaded = load(tmp_path, empty(Net))
    assert equal(result.model, loaded, x)
    assert state(loaded) == state(result.model)
    assert loaded.stem.weight.is_contiguous(memory_format=layout)


def test_parts_that_are_no_tensors_are_made_by_the_architecture(tmp_path):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.full((8,), 2.0), persistent=False)
            self.register_buffer("count", torch.tensor(3))
            self.shift = torch.arange(8.0)
            self.unused = torch.zeros(1)
            self.cls = nn.Parameter(torch.randn(8))
            self.embed = nn.Embedding(8, 8)
            self.decode = nn.Linear(8, 8, bias=False)
            self.decode.weight = self.embed.weight
            self.fc = nn.Linear(8, 8)
            self.again = self.fc
            self.lstm = nn.LSTM(8, 8, batch_first=True)
            self.normed = nn.utils.parametrizations.weight_norm(nn.Linear(8, 8))

        def forward(self, x):
            y = self.embed(x) * self.scale + self.shift + self.cls + torch.tensor([1.5])
            y = self.again(self.fc(y)) * self.count
            return self.normed(self.lstm(self.decode(y))[0])

    x = torch.arange(8)[None]
    result = compressed(Both().eval(), x, pipeline=[Decompose(ranks=3)])
    result.model.cls.requires_grad_(False)
    save(result, tmp_path)
    real = Both()
    real.unused = torch.full((1,), 7.0)
    loaded = load(tmp_path, real)
    assert type(loaded) is Both
    assert equal(result.model, loaded, x)
    assert loaded.decode.weight is loaded.embed.weight
    assert loaded.again is loaded.fc
    assert isinstance(loaded.fc.first, nn.Linear)
    assert "scale" not in loaded.state_dict()
    assert loaded.unused.item() == 7
    assert not loaded.cls.requires_grad
    assert loaded.lstm._flat_weights[0] is loaded.lstm.weight_ih_l0
    with pytest.raises(FxlrdError, match="unused holds a tensor on the meta device"):
        load(tmp_path, empty(Both))


def test_a_bare_layer(tmp_path):
    _, loaded = round_trip(lambda: nn.Linear(64, 64), tmp_path, torch.randn(2, 64))
    assert list(loaded.state_dict()) == ["0.first.weight", "0.last.weight", "0.last.bias"]


def test_weights_of_the_moment_are_saved(tmp_path):
    result = compressed(Net())
    with torch.no_grad():
        for p in result.model.parameters():
            p.add_(torch.randn_like(p))
    save(result.model, tmp_path)
    loaded = load(tmp_path, empty(Net))
    assert equal(result.model.eval(), loaded.eval(), X)


@pytest.mark.parametrize(
    "how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), functools.partial(torch.compile, backend="eager")]
)
def test_a_copy_of_the_model_is_saved_as_well(tmp_path, how):
    result = compressed(Net().eval())
    save(how(result.model), tmp_path)
    assert equal(result.model, load(tmp_path, empty(Net)), X)


def test_loaded_models_are_saved_again_and_compressed_further(tmp_path):
    model, loaded = round_trip(lambda: trained(Net()), tmp_path / "a", skip=("block", "fc"))
    save(loaded, tmp_path / "b")
    assert equal(model, load(tmp_path / "b", empty(Net)), X)
    more = compressed(
        loaded, pipeline="calibrate,merge{ratio=1.5},decompose{skip=stem},merge{mode=exact,norms=true}", calibration=X
    )
    assert not equal(more.model, loaded, X)
    save(more, tmp_path / "c")
    again = load(tmp_path / "c", empty(Net))
    assert equal(more.model, again, X)
    assert state(again) == state(more.model)


@pytest.mark.parametrize("mode", [True, False])
def test_modes_are_those_of_the_saved_model(tmp_path, mode):
    result = compressed(Net())
    result.model.train(mode)
    result.model.get_submodule("block.bn1").train(not mode)
    save(result, tmp_path)
    loaded = load(tmp_path, Net().train(not mode))
    assert {n for n, m in loaded.named_modules() if m.training is not mode} == {"block.bn1"}


def test_the_architectures_weights_are_neither_copied_nor_changed(tmp_path):
    save(compressed(Net()), tmp_path)
    model = Net()
    before = {name: (t, t.clone()) for name, t in model.state_dict(keep_vars=True).items()}
    modules = dict(model.named_modules())
    storages = {t.untyped_storage().data_ptr() for t, _ in before.values()}
    loaded = load(tmp_path, model)
    assert dict(model.named_modules()) == modules
    assert all(
        model.state_dict(keep_vars=True)[n] is t and torch.equal(t.detach(), kept) for n, (t, kept) in before.items()
    )
    assert not storages & {t.untyped_storage().data_ptr() for t in loaded.state_dict().values()}


def test_nothing_is_decomposed_timed_or_unpickled(tmp_path, monkeypatch):
    save(compressed(Net()), tmp_path)

    def never(*args, **kwargs):
        raise AssertionError

    for place, name in [
        (torch.linalg, "svd"), (torch.linalg, "eigh"), (torch.linalg, "qr"), (torch, "load"), (pickle, "load"),
        (pickle, "loads"), (pickle, "Unpickler"), (Net, "forward"), (torch, "compile"),
    ]:  # fmt: skip
        monkeypatch.setattr(place, name, never)
    load(tmp_path, empty(Net))


def test_the_weights_are_a_plain_state_dict(tmp_path):
    result = compressed(Net().to(memory_format=torch.channels_last))
    save(result, tmp_path)
    (file,) = tmp_path.glob("*.safetensors")
    found = load_file(file)
    assert found.keys() == result.model.state_dict().keys()
    assert all(torch.equal(found[name], t) for name, t in result.model.state_dict().items())
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE((tmp_path / PLAN).stat().st_mode)


# -- models of the user's own class, and of graphs that no class of the user's computes


class Loop(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(32, 32), nn.Dropout(), nn.Linear(32, 32))
        self.fc = nn.Linear(32, 32)

    def forward(self, x, times=2):
        for _ in range(int(x.shape[0] * times)):
            x = self.body(x)
        return self.fc(x) if x.abs().max() < 100 else x


@pytest.mark.parametrize("inplace", [True, False])
def test_a_model_of_regions(tmp_path, inplace):
    x = torch.randn(3, 32)
    model, loaded = round_trip(lambda: Loop().eval(), tmp_path, x, pipeline="decompose", inplace=inplace)
    assert type(model) is type(loaded) is Loop
    assert equal(model, loaded, torch.randn(2, 32), 1)
    assert state(model) == state(loaded)


def test_a_region_of_exact_merges(tmp_path):
    _, loaded = round_trip(lambda: Loop().eval(), tmp_path, torch.randn(3, 32), pipeline="merge{mode=exact}")
    assert type(loaded.body[0]) is nn.Identity


def test_inplace_in_a_traceable_model(tmp_path):
    _, loaded = round_trip(lambda: trained(Net()), tmp_path, ratio=3, inplace=True)
    assert isinstance(loaded.block.conv.core, nn.Conv2d)


class Asks(nn.Module):
    """Reads a layer's type, calls what it does not use, and has a layer that it calls in training only."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(32, 32)
        self.aside = nn.Linear(32, 4)
        self.aux = nn.Linear(32, 4)

    def forward(self, x, double=False):
        self.aside(x)
        if self.training:
            self.aux(x)
        y = self.fc(x)
        if double:
            y = y * 2
        return y if isinstance(self.fc, nn.Linear) else y * 0


def test_what_only_the_graph_computes_comes_back_as_a_graph(tmp_path):
    x = torch.randn(3, 32)
    model, loaded = round_trip(Asks, tmp_path, x, True, ratio=3)
    assert isinstance(loaded, torch.fx.GraphModule)
    assert state(loaded) == state(model)
    assert equal(model.eval(), loaded.eval(), x)
    save(loaded, tmp_path)
    assert equal(model, load(tmp_path, empty(Asks)), x)
    assert equal(pickle.loads(pickle.dumps(loaded)), model, x)
    plan = read_plan(tmp_path)
    assert plan["architecture"]["arguments"] == {"double": True}
    assert not any("aux" in name for name in load_file(tmp_path / checkpoint._weights(plan["weights"]["sha256"])))


@dataclass(frozen=True)
class Rewires:
    """A pass that does more than to replace layers."""

    def __call__(self, gm, *rest):
        gm = fork(gm)
        annotate(gm)
        node = gm.graph.find_nodes(op="call_module", target="fc")[0]
        with gm.graph.inserting_after(node):
            new = gm.graph.call_function(torch.relu, (node,))
        node.replace_all_uses_with(new, lambda user: user is not new)
        gm.recompile()
        return PassResult(gm, (Site("fc", False, "rewired"),), ())


# -- what cannot be saved


class Odd(nn.Linear):
    def get_extra_state(self):
        return {"a": 1}

    def set_extra_state(self, state):
        pass


def hidden(model):
    model.get_submodule("fc").first = nn.Bilinear(2, 2, 2)
    return model


def beside(model):
    model.get_submodule("fc").register_buffer("extra", torch.ones(2))
    return model


def other(model):
    model.set_submodule("block.act", nn.GELU())
    return model


@pytest.mark.parametrize(
    ("what", "message"),
    [
        (lambda: None, "a NoneType is no result of compress"),
        (lambda: Net(), "not known what this model was made from"),
        (lambda: compressed(Net(), pipeline=[Rewires()]), "changed the graph in more than its layers"),
        (lambda: compressed(nn.Sequential(Odd(64, 64), nn.ReLU()), torch.ones(2, 64)), "get_extra_state"),
        (lambda: hidden(compressed(Net()).model), "fc.first: a Bilinear has taken the place"),
        (lambda: beside(compressed(Net()).model), "fc: extra beside its factors"),
        (lambda: other(compressed(Net()).model), "block.act: a GELU has taken the place"),
        (lambda: compressed(Net()).model.to("meta"), "has no values"),
        (
            lambda: fxlrd.Pipeline.parse("merge{mode=exact,norms=true}")(compressed(Net()).model, X).graph_module,
            "did passes run on it after compress",
        ),
    ],
)
def test_what_cannot_be_saved_is_one_line(tmp_path, what, message):
    with pytest.raises(FxlrdError, match=message) as error:
        save(what(), tmp_path / "new")
    assert "\n" not in str(error.value)
    assert not (tmp_path / "new").exists()


def test_a_place_that_cannot_be_written(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(FxlrdError, match="is a file; name a directory"):
        save(compressed(Net()), tmp_path / "file")
    with pytest.raises(FxlrdError, match="nothing was changed there"):
        save(compressed(Net()), tmp_path / "file" / "inside")


def test_what_could_not_be_loaded_does_not_take_the_place_of_what_can(tmp_path):
    result = compressed(Net().eval())
    save(result, tmp_path)
    with pytest.raises(FxlrdError, match=r"nothing was changed there: load would refuse source$"):
        save(result, tmp_path, source=3)
    assert equal(result.model, load(tmp_path, Net()), X)


# -- wrong architectures


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Net(classes=11), "head: out_features is 11 and was '10'"),
        (lambda: Loop(), "no module 'stem'"),
        (lambda: changed("block.act", nn.ReLU()), None),
        (lambda: changed("block.act", nn.GELU()), "block.act is a GELU in the model and was a 'ReLU'"),
        (lambda: changed("drop", nn.Identity()), None),
        (lambda: changed("block.more", nn.ReLU()), "block.more is a ReLU and was not there"),
        (lambda: changed("fc", nn.Conv1d(32, 32, 1)), "fc is a Conv1d in the model and was a 'Linear'"),
        (lambda: changed("fc", nn.Linear(32, 32, bias=False)), "fc: the shape of 'bias' is None and was"),
        (lambda: changed("stem", nn.Conv2d(3, 32, 3, padding=1, stride=2)), r"stem: stride is \[2, 2\] and was"),
        (lambda: changed("stem", nn.Conv2d(3, 32, 3, padding=1, bias=False)), "stem: the shape of 'bias'"),
        (lambda: changed("block.bn1", nn.BatchNorm2d(24, eps=1e-3)), "block.bn1: eps is 0.001 and was '1e-05'"),
        (lambda: changed("stem", nn.LazyConv2d(32, 3, padding=1)), "stem is a LazyConv2d"),
        (lambda: changed("block.more", nn.Linear(2, 2)), "block.more is a Linear and was not there"),
        (lambda: compressed(Net(), inplace=True).model, "is a Sequential in the model"),
        (lambda: "net", "a str is not a torch.nn.Module"),
    ],
)
def test_another_architecture_is_one_line(tmp_path, make, message):
    save(compressed(Net()), tmp_path)
    if message is None:
        load(tmp_path, make())
        return
    with pytest.raises(FxlrdError, match=message) as error:
        load(tmp_path, make())
    assert "\n" not in str(error.value)


def changed(name, module):
    model = Net()
    model.set_submodule(name, module)
    return model


# -- damaged files, and such as were made to do damage


def tiny():
    return nn.Sequential(OrderedDict(a=nn.Linear(16, 16), b=nn.ReLU(), c=nn.Conv1d(2, 2, 3), d=nn.BatchNorm1d(2)))


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A checkpoint of a tiny model, not to be changed."""
    path = tmp_path_factory.mktemp("good")
    save(compressed(tiny().eval(), torch.ones(3, 2, 16), pipeline=[Decompose(ranks=2)]), path)
    assert isinstance(load(path, tiny()).a, nn.Sequential)
    return path


@pytest.fixture
def bad(good, tmp_path):
    return copied(good, tmp_path / "bad")


def copied(good, path):
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(good, path)
    return path


def weights(path):
    (file,) = path.glob("*.safetensors")
    return file


def edit(path, change, sign=True):
    """Change a plan as someone would who knows of its checksum."""
    plan = json.loads((path / PLAN).read_text())
    change(plan)
    if sign:
        plan["checksum"] = checkpoint._checksum(plan)
    (path / PLAN).write_text(json.dumps(plan))


def refused(path, message="", make=tiny):
    model = make()
    before = {name: (id(t), t.detach().clone()) for name, t in model.state_dict(keep_vars=True).items()}
    with pytest.raises(FxlrdError, match=message) as error:
        load(path, model)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 1000
    after = model.state_dict(keep_vars=True)
    assert all(id(after[n]) == i and torch.equal(after[n].detach(), t) for n, (i, t) in before.items())


def refused_or_loaded(path):
    try:
        return load(path, tiny())
    except FxlrdError:
        refused(path)
        return None


def put(*keys, value):
    def change(plan):
        for key in keys[:-1]:
            plan = plan[key]
        plan[keys[-1]] = value

    return change


SECOND = ("layers", "a", "parts", 1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("version", value=2), "has version '2', this fxlrd reads 1"),
        (put("version", value=True), "has version"),
        (put("format", value="pickle"), "no plan of fxlrd's"),
        (put("weights", "sha256", value="../../../../etc/passwd"), "weights: sha256"),
        (put("weights", "sha256", value="0" * 64), "is missing"),
        (put("weights", "bytes", value=7), "and should have 7"),
        (put("layers", "../a", value={"kind": "Identity", "options": {}}), "not in the architecture"),
        (put("architecture", "gone", value=["../a"]), None),
        (put("layers", "x", value={"kind": "Identity", "options": {}}), "not in the architecture"),
        (put("layers", "", value={"kind": "Identity", "options": {}}), "layers"),
        (put(*SECOND, "kind", value="os.system"), "its class is none of Linear"),
        (put(*SECOND, "kind", value=["Linear"]), "its class is none of"),
        (put(*SECOND, "options", "out_features", value=17), "has shape .* the model takes"),
        (put(*SECOND, "options", "out_features", value=10**30), "out_features"),
        (put(*SECOND, "options", "out_features", value=-1), "out_features"),
        (put(*SECOND, "options", "bias", value=False), "no place for 'a.last.bias'"),
        (put(*SECOND, "options", "bias", value="no"), "bias: the plan is damaged"),
        (put(*SECOND, "options", "device", value="cuda"), "options: the plan is damaged"),
        (put("layers", "a", "parts", 0, 0, value="forward"), "layers: 'a'"),
        (put("layers", "a", "parts", 0, 0, value="last"), "layers: 'a'"),
        (put(*SECOND, value={"parts": []}), "layers: 'a'"),
        (put("layers", "a", value={"kind": "Identity", "options": {}}), "no place for 'a"),
        (put("layers", "c", "parts", 1, 1, "options", "groups", value=3), "cannot be made"),
        (put("layers", "c", "parts", 1, 1, "options", "stride", value=[1] * 4), "stride"),
        (put("layers", "c", "parts", 1, 1, "options", "padding_mode", value="eval"), "padding_mode"),
        (put("tensors", "strides", "a.last.weight", value=[0, 0]), "fit no tensor"),
        (put("tensors", "strides", "a.last.weight", value=[1]), "fit no tensor"),
        (put("tensors", "strides", "a.last.weight", value=[2**70, 1]), "strides"),
        (put("tensors", "same", "a.first.weight", value="d.weight"), "are one tensor"),
        (put("tensors", "frozen", value=None), "tensors"),
        (put("training", value={}), "training"),
        (put("architecture", "arguments", value={"self": 1}), "takes no 'self'"),
        (put("architecture", "arguments", value={"input": [1]}), "arguments"),
        (put("architecture", "modules", "a", 0, value="x\n\ud800"), "was a"),
        (put("architecture", "modules", "a", 1, "shapes", "x\n\ud800", value=[1]), "the shape of"),
        (put("architecture", value=[]), "architecture"),
        (put("layers", value=[]), "layers"),
        (put("checksum", value="x"), None),
    ],
)
def test_a_forged_plan_is_one_line(bad, change, message):
    edit(bad, change, sign=message is not None)
    refused(bad, message or "checksum: it is not of this plan")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '"' * 9, "[" * 10**5, '{"version": ' + "9" * 5000 + "}", "\0"])
def test_what_is_no_plan_is_one_line(bad, text):
    (bad / PLAN).write_text(text)
    refused(bad, "plan.json")
    (bad / PLAN).write_bytes(b"\xff\xfe\x00")
    refused(bad, "plan.json")


def test_what_is_no_path_is_one_line():
    refused(None, "None is no path")


def test_a_plan_of_ten_million_layers_is_refused_at_once(bad):
    with (bad / PLAN).open("w") as file:
        file.write('{"format": "fxlrd checkpoint", "version": 1, "layers": {')
        for _ in range(10):
            file.write('"a.b":{},' * 10**6)
        file.write('"x":{}}}')
    refused(bad, "no plan is as large as that")


def test_many_layers_that_fit_into_a_plan_are_refused_too(bad):
    spec = {"kind": "Identity", "options": {}}
    edit(bad, lambda plan: plan["layers"].update({f"l{i}": spec for i in range(10**4)}))
    refused(bad, "not in the architecture")
    edit(bad, lambda plan: plan["architecture"]["gone"].extend(f"l{i}" for i in range(10**4)))
    refused(bad, "no module 'l0'")


def test_files_that_are_none(bad, tmp_path):
    refused(tmp_path / "none", "holds no checkpoint")
    weights(bad).unlink()
    refused(bad, "is missing")
    os.mkfifo(bad / checkpoint._weights(read_plan(bad)["weights"]["sha256"]))
    refused(bad, "is no file")
    (bad / PLAN).unlink()
    (bad / PLAN).mkdir()
    refused(bad, "is no file")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("a.last.weight"), "there is no tensor 'a.last.weight'"),
        (lambda t: t.pop("d.running_var"), "there is no tensor 'd.running_var'"),
        (lambda t: t.update(more=torch.ones(1)), "no place for 'more'"),
        (lambda t: t.update({"a.last.weight": torch.ones(16, 3)}), "has shape \\[16, 3\\], the model takes"),
        (lambda t: t.update({"d.weight": torch.ones(2, dtype=torch.int64)}), ""),
    ],
)
def test_other_tensors_under_a_right_checksum(bad, change, message):
    found = load_file(weights(bad))
    change(found)
    resigned(bad, found)
    refused(bad, message)


def resigned(path, found):
    weights(path).unlink()
    save_file(found, path / "new")
    digest, size = checkpoint._hashed(path / "new")
    (path / "new").rename(path / checkpoint._weights(digest))
    edit(path, put("weights", value={"sha256": digest, "bytes": size}))


def test_a_header_that_lies(bad):
    file = weights(bad)
    file.write_bytes((2**40).to_bytes(8, "little") + file.read_bytes()[8:])
    digest, size = checkpoint._hashed(file)
    file.rename(bad / checkpoint._weights(digest))
    edit(bad, put("weights", value={"sha256": digest, "bytes": size}))
    refused(bad, "is no safetensors file")


FUZZ = settings(max_examples=60, deadline=None, suppress_health_check=list(HealthCheck))


@FUZZ
@given(st.data())
def test_every_flipped_bit_is_found(good, tmp_path, data):
    path = copied(good, tmp_path / "bad")
    file = data.draw(st.sampled_from([path / PLAN, weights(path)]))
    content = bytearray(file.read_bytes())
    place = data.draw(st.integers(0, len(content) - 1))
    content[place] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content)
    try:
        same = json.loads(bytes(content)) == json.loads((good / PLAN).read_text()) if file.name == PLAN else False
    except ValueError:
        same = False
    if not same:  # a blank between two names may become another one
        refused(path)


@FUZZ
@given(st.data())
def test_every_truncation_is_found(good, tmp_path, data):
    path = copied(good, tmp_path / "bad")
    file = data.draw(st.sampled_from([path / PLAN, weights(path)]))
    os.truncate(file, data.draw(st.integers(0, file.stat().st_size - 2)))
    refused(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.just("a") | st.integers(0, 3),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


@settings(FUZZ, max_examples=150)
@given(st.data())
def test_an_edited_plan_loads_whole_or_not_at_all(good, tmp_path, data):
    path = copied(good, tmp_path / "bad")

    def change(plan):
        places = []

        def walk(value, depth=0):
            items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
            for key, inner in items:
                places.append((value, key))
                walk(inner, depth + 1)

        walk(plan)
        for _ in range(data.draw(st.integers(1, 2))):
            holder, key = data.draw(st.sampled_from(places))
            how = data.draw(st.sampled_from(["other", "gone", "near"]))
            if how == "gone" and isinstance(holder, dict):
                holder.pop(key, None)
            elif how == "near":
                other, at = data.draw(st.sampled_from(places))
                holder[key] = copy.deepcopy(other[at]) if isinstance(other, list) else copy.deepcopy(other.get(at))
            else:
                holder[key] = data.draw(JSON)

    try:
        edit(path, change)
    except IndexError:
        return
    model = refused_or_loaded(path)
    if model is not None:
        found = load_file(weights(path))
        assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
        assert all(torch.equal(t, found[name]) for name, t in model.state_dict().items() if name in found)


# -- saving is atomic


STEPS = ["_hashed", "_synced", "write_whole", "save_file"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a child process")
@pytest.mark.parametrize("when", ["before", "after"])
@pytest.mark.parametrize(("step", "nth"), [*((s, 0) for s in STEPS), ("_synced", 1), ("_synced", 2), ("unlink", 0)])
def test_whoever_is_killed_leaves_the_old_or_the_new_checkpoint(tmp_path, monkeypatch, step, nth, when):
    net = lambda: nn.Sequential(nn.Linear(16, 16), nn.ReLU())  # noqa: E731
    old, new = (compressed(net(), torch.ones(2, 16), pipeline=[Decompose(ranks=r)]) for r in (2, 3))
    save(old, tmp_path)
    place = checkpoint.Path if step == "unlink" else checkpoint
    function, calls = getattr(place, step), iter(range(99))

    def killed(*args, **kwargs):
        if next(calls) != nth:
            return function(*args, **kwargs)
        if when == "after":
            function(*args, **kwargs)
        os._exit(7)

    child = os.fork()
    if child == 0:
        try:
            setattr(place, step, killed)
            save(new, tmp_path)
        finally:
            os._exit(8)
    _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == 7
    loaded = load(tmp_path, empty(net))
    rank = loaded[0].first.out_features
    assert rank in (2, 3)
    assert equal((old if rank == 2 else new).model, loaded, torch.ones(2, 16))
    save(new, tmp_path)
    assert equal(new.model, load(tmp_path, empty(net)), torch.ones(2, 16))
    assert len(list(tmp_path.iterdir())) == 2, "what the killed one left is gone"


@pytest.mark.skipif(not hasattr(os, "fork"), reason="kills a child process")
def test_what_a_killed_write_of_tensors_leaves_is_gone_after_the_next_save(tmp_path, monkeypatch):
    def killed(tensors, file):
        file.with_name(".tmp0a1b2c").write_bytes(b"half")  # where safetensors writes before it puts its file in place
        os._exit(7)

    child = os.fork()
    if child == 0:
        try:
            monkeypatch.setattr(checkpoint, "save_file", killed)
            save(compressed(Net()), tmp_path)
        finally:
            os._exit(8)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
    assert any(tmp_path.rglob(".tmp0a1b2c"))
    save(compressed(Net()), tmp_path)
    assert len(list(tmp_path.iterdir())) == 2


def test_old_weights_that_may_not_be_removed_are_no_error(tmp_path, monkeypatch):
    save(compressed(Net()), tmp_path)
    new = compressed(Net().eval(), ratio=4)

    def forbidden(*args, **kwargs):  # as in a folder with the sticky bit, of the file of another user
        raise PermissionError(1, "Operation not permitted")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint.Path, "unlink", forbidden)
        save(new, tmp_path)
    assert equal(new.model, load(tmp_path, Net()), X)


def test_a_failed_write_leaves_the_old_checkpoint(tmp_path, monkeypatch):
    old, new = compressed(Net()), compressed(Net(), ratio=4)
    save(old, tmp_path)
    kept = sorted(p.name for p in tmp_path.iterdir())

    def full(*args):
        raise OSError(28, "No space left on device")

    for name in ["save_file", "write_whole"]:
        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, name, full)
            with pytest.raises(FxlrdError, match=r"nothing was changed there: OSError: .*No space left"):
                save(new, tmp_path)
        assert equal(old.model.eval(), load(tmp_path, Net()).eval(), X)
    assert set(kept) <= {p.name for p in tmp_path.iterdir()}
    assert not [p for p in tmp_path.iterdir() if p.name.startswith(".")]


def test_other_files_are_not_touched(tmp_path):
    for name in ["notes.txt", "weights-mine.safetensors", "model.safetensors"]:
        (tmp_path / name).write_text("mine")
    save(compressed(Net()), tmp_path)
    save(compressed(Net(), ratio=4), tmp_path)
    assert len(list(tmp_path.iterdir())) == 5


def test_a_checkpoint_that_is_replaced_while_it_is_read(tmp_path, monkeypatch):
    old, new = compressed(Net()), compressed(Net(), ratio=4)
    save(old, tmp_path)
    first, check = iter([True]), checkpoint._check_file

    def replaced(*args):
        if next(first, False):
            save(new, tmp_path)
        return check(*args)

    monkeypatch.setattr(checkpoint, "_check_file", replaced)
    assert equal(new.model.eval(), load(tmp_path, Net()).eval(), X)


# -- command line


def test_the_command_line_opens_what_it_saved(tmp_path, capsys, monkeypatch):
    (tmp_path / "net_for_save.py").write_text(
        "from torch import nn\ndef net():\n    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64))\n"
    )
    monkeypatch.chdir(tmp_path)
    assert main(["compress", "net_for_save:net", "--input", "64", "--save", "saved"]) == 0
    assert main(["compress", "net_for_save:net@saved", "--input", "64", "--save", "saved"]) == 0
    assert capsys.readouterr().out.count("it is a low-rank factor already") == 4
    assert main(["compress", "saved", "--input", "64"]) == 2
    assert "if you trust it, write net_for_save:net@saved" in capsys.readouterr().err
    plan = read_plan(tmp_path / "saved")
    assert plan["architecture"]["source"] == "net_for_save:net"
    from net_for_save import net

    assert load("saved", empty(net))[0].first.out_features == 16


def test_the_command_line_opens_a_model_that_cannot_be_made_without_weights(tmp_path):
    command = ["compress", "torchvision:regnet_y_400mf", "--input", "3x32x32", "--skip", "trunk_output.*"]
    assert main([*command, "--save", str(tmp_path)]) == 0
    assert load_model(str(tmp_path), None, seed=0).fc.first.out_features < 440


def test_the_command_line_on_a_directory_that_it_cannot_open(tmp_path, capsys):
    save(compressed(Net()), tmp_path / "a")
    assert main(["compress", str(tmp_path / "a")]) == 2
    assert "does not tell its architecture: open it with fxlrd.load" in capsys.readouterr().err
    assert main(["compress", str(tmp_path)]) == 2
    assert "holds no checkpoint" in capsys.readouterr().err
    assert main(["compress", str(tmp_path / "a"), "--weights", "DEFAULT"]) == 2
    assert "--weights is for torchvision" in capsys.readouterr().err
    (tmp_path / "file").touch()
    assert main(["compress", "torchvision:resnet18", "--save", str(tmp_path / "file")]) == 2
    assert "name a directory" in capsys.readouterr().err
    save(compressed(Net()), tmp_path / "a", source=str(tmp_path / "a"))
    assert main(["compress", str(tmp_path / "a")]) == 2
    assert "the plan is damaged" in capsys.readouterr().err


def test_the_layout_on_a_model_is_plain_data():
    model = compressed(Net()).model
    assert json.loads(json.dumps(layout.recall(model))) == layout.recall(model)
    assert b"fxlrd.layout" not in pickle.dumps(model)
