"""What is saved is what is loaded."""

from __future__ import annotations

import copy
import functools
import json
import pickle
import stat
from dataclasses import dataclass

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import fxlrd
from fxlrd.errors import FxlrdError
from fxlrd.graph.surgery import annotate, fork, restore
from fxlrd.passes import Decompose, Merge
from fxlrd.passes.contract import PassResult, Site
from fxlrd.saving.architecture import recall
from fxlrd.saving.load import load
from fxlrd.saving.save import save
from fxlrd.saving.schema import Origin
from fxlrd.saving.storage import PLAN, read_plan, weights_file
from tests.saving.nets import Loop, Net, X, compressed, empty, equal, trained


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
    assert all(isinstance(m, nn.Identity) for m in (loaded.block.bn1, loaded.block.bn3, loaded.fc, loaded.drop))


class Gated(nn.BatchNorm2d):
    """A norm of the user's own, with a parameter more."""

    def __init__(self, channels):
        super().__init__(channels)
        self.gate = nn.Parameter(torch.linspace(0.5, 2, channels))
        self.act = nn.Softplus(beta=2)

    def forward(self, x):
        return self.act(torch.sigmoid(self.gate.view(-1, 1, 1)) * super().forward(x))


def test_a_norm_of_the_users_own_that_was_cut_comes_back(tmp_path):
    def net():
        model = Net()
        model.block.bn1 = Gated(model.block.bn1.num_features)
        return trained(model)

    model, loaded = round_trip(net, tmp_path, pipeline="calibrate,merge{ratio=2}", calibration=X)
    assert type(loaded.block.bn1) is Gated
    assert len(loaded.block.bn1.gate) == loaded.block.bn1.num_features == model.block.reduce.out_channels
    assert len(loaded.block.bn1.gate) < len(net().block.bn1.gate)
    spec = json.loads((tmp_path / PLAN).read_text())["layers"]["block.bn1"]
    assert spec == {"channels": len(loaded.block.bn1.gate), "of": len(net().block.bn1.gate)}


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
        model.state_dict(keep_vars=True)[n] is t and torch.equal(t.detach(), old) for n, (t, old) in before.items()
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
    stored = load_file(file)
    assert stored.keys() == result.model.state_dict().keys()
    assert all(torch.equal(stored[name], t) for name, t in result.model.state_dict().items())
    assert stat.S_IMODE(file.stat().st_mode) == stat.S_IMODE((tmp_path / PLAN).stat().st_mode)


# -- models of the user's own class, and of graphs that no class of the user's computes


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
    assert plan.architecture.arguments == {"double": True}
    assert not any("aux" in name for name in load_file(weights_file(tmp_path, plan.weights)))


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
            "did passes, or a fuse, run on it after compress",
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
    with pytest.raises(
        FxlrdError,
        match=r"nothing was changed there: load would refuse architecture.source: expected a string or null, found 3",
    ):
        save(result, tmp_path, source=3)
    assert equal(result.model, load(tmp_path, Net()), X)


def test_what_a_model_carries_is_plain_data():
    model = compressed(Net()).model
    data = vars(model)["_fxlrd"]
    assert json.loads(json.dumps(data)) == data == model.meta["_fxlrd"]
    assert set(data) == {"modules", "gone", "arguments", "source", "refused"}
    assert b"fxlrd.saving" not in pickle.dumps(model)
    assert Origin.from_json(data) == recall(model)
    assert Origin.from_json(data).to_json() == data
