"""Another architecture, and files that are damaged or made to do damage: one line, and nothing half-loaded."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections import OrderedDict

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from fxlrd.errors import FxlrdError
from fxlrd.passes import Decompose
from fxlrd.saving.load import load
from fxlrd.saving.save import save
from fxlrd.saving.schema import Weights, checksum
from fxlrd.saving.storage import PLAN, hashed, read_plan, weights_file
from tests.saving.nets import Loop, Net, compressed
from tests.support.folding import CausalConv, SameConv

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
        (lambda: compressed(Net(), inplace=True).model, "is a ReadableFactors in the model"),
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
        plan["checksum"] = checksum(plan)
    (path / PLAN).write_text(json.dumps(plan))


def refused(path, message=None, make=tiny):
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


IDENTITY = {"kind": "Identity", "options": {}}
OPTIONS = {"num_features": 2, "eps": 0.5, "momentum": 0.1, "affine": True, "track_running_stats": True, "bias": True}
NORM = {"kind": "BatchNorm1d", "options": OPTIONS}
KERNEL = ("layers", "c", "parts", 1, 1, "options")
SECOND = ("layers", "a", "parts", 1, 1)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (put("version", value=2), "has version '2', this fxlrd reads 1"),
        (put("version", value=True), "has version"),
        (put("format", value="pickle"), "not a plan of fxlrd"),
        (put("weights", "sha256", value="../../../../etc/passwd"), "weights.sha256: expected 64 hexadecimal digits"),
        (put("weights", "sha256", value=int("1" * 64)), "weights.sha256: expected 64 hexadecimal digits, found 1{60}"),
        (put("weights", "sha256", value="0" * 64), "is missing"),
        (put("weights", "bytes", value=7), "and should have 7"),
        (put("weights", "bytes", value=7.0), r"weights.bytes: expected an integer, found 7\.0"),
        (put("weights", value={"bytes": 7}), "weights.sha256: expected 64 hexadecimal digits, found nothing"),
        (put("weights", "md5", value=7), r"weights\['md5'\]: expected nothing, found 7"),
        (put("layers", "../a", value=IDENTITY), r"layers\['../a'\]: not in the architecture"),
        (put("architecture", "gone", value=["../a"]), None),
        (put("architecture", "gone", value=["c", "b", "d", 7]), r"architecture.gone\[3\]: expected a string, found 7"),
        (
            put("architecture", "source", value=["x"]),
            "architecture.source: expected a string or null, found a list of 1",
        ),
        (put("layers", "x", value=IDENTITY), r"layers\['x'\]: not in the architecture"),
        (put("layers", "", value=IDENTITY), r"layers\[''\]: not in the architecture"),
        (
            put(*SECOND, "kind", value="os.system"),
            r'parts\[1\]\[1\].kind: expected one of Linear, .* found "os.system"',
        ),
        (put(*SECOND, "kind", value=["Linear"]), "kind: expected one of Linear, .* found a list of 1"),
        (put(*SECOND, "options", "out_features", value=17), "has shape .* the model takes"),
        (put(*SECOND, "options", "out_features", value=10**30), "out_features: expected an integer from 0 to"),
        (put(*SECOND, "options", "out_features", value=-1), "out_features: expected .* found -1"),
        (put(*SECOND, "options", "bias", value=False), "no place for 'a.last.bias'"),
        (put(*SECOND, "options", "bias", value="no"), 'bias: expected true or false, found "no": the plan is damaged'),
        (put(*SECOND, "options", "device", value="cuda"), r"options\['device'\]: expected nothing, found \"cuda\""),
        (put("layers", "a", "parts", 0, 0, value="forward"), r"layers\['a'\].parts\[0\]\[0\]: expected one of first, "),
        (
            put("layers", "a", "parts", 0, 0, value="last"),
            r"layers\['a'\].parts: expected .* different roles, found a list",
        ),
        (
            lambda plan: plan["layers"]["c"]["parts"].reverse(),
            r"parts: expected .* in the order first, core",
        ),
        (put("layers", "a", "parts", 0, value=["first"]), r"parts\[0\]: expected a list of 2, found a list of 1"),
        (put(*SECOND, value={"parts": []}), r"parts\[1\]\[1\].kind: expected one of .* found nothing"),
        (
            put("layers", "a", value={}),
            r"layers\['a'\]: expected .* kind, options or .* parts or .* channels, of, found an empty object",
        ),
        (put("layers", "a", value=IDENTITY), "no place for 'a"),
        (put("layers", "c", "parts", 1, 1, "options", "groups", value=3), "cannot be made"),
        (
            put("layers", "c", "parts", 1, 1, "options", "stride", value=[1] * 4),
            "stride: expected a list of one to three",
        ),
        (
            put("layers", "c", "parts", 1, 1, "options", "padding", value="all"),
            'padding: expected "same" or "valid" or ',
        ),
        (
            put("layers", "c", "parts", 1, 1, "options", "padding_mode", value="eval"),
            'padding_mode: expected "zeros" or',
        ),
        (put(*KERNEL, "stride", value=[2]), r"c: stride is \(2,\) in the plan and \(1,\) in the layer"),
        (put(*KERNEL, "padding", value=[1]), "c: padding is"),
        (put(*KERNEL, "padding", value="same"), "c: padding is 'same' in the plan"),
        (put(*KERNEL, "dilation", value=[3]), "c: dilation is"),
        (put(*KERNEL, "padding_mode", value="circular"), "c: padding_mode is 'circular' in the plan and 'zeros'"),
        (put("layers", "c", "parts", 0, 1, "options", "stride", value=[2]), "c: kernel_size is"),
        (put("layers", "b", value=IDENTITY), "b: a Identity cannot take the place of a ReLU"),
        (put("layers", "d", value=NORM), "d: eps is 0.5 in the plan and 1e-05 in the layer"),
        (put("tensors", "strides", "a.last.weight", value=[0, 0]), "fit no tensor"),
        (put("tensors", "strides", "a.last.weight", value=[1]), "fit no tensor"),
        (put("tensors", "strides", "a.last.weight", value=[2**70, 1]), r"strides\['a.last.weight'\]\[0\]: expected"),
        (put("tensors", "same", "a.first.weight", value="d.weight"), "are one tensor"),
        (put("tensors", "frozen", value=None), "tensors.frozen: expected a list, found null"),
        (put("training", value={}), "training: expected an object with the model's own mode"),
        (put("training", "a", value=1), r"training\['a'\]: expected true or false, found 1"),
        (put("architecture", "arguments", value={"self": 1}), "takes no 'self'"),
        (
            put("architecture", "arguments", value={"input": [1]}),
            r"architecture.arguments\['input'\]: expected true or fa",
        ),
        (put("architecture", "modules", "a", value=["Linear"]), r"architecture.modules\['a'\]: expected a list of 2"),
        (
            put("architecture", "modules", "a", 1, value={}),
            r"modules\['a'\]\[1\].shapes: expected an object, found null",
        ),
        (put("architecture", "modules", "a", 0, value="x\n\ud800"), "was a"),
        (put("architecture", "modules", "a", 1, "shapes", "x\n\ud800", value=[1]), "the shape of"),
        (
            put("architecture", "modules", "a", 1, "shapes", "x\n\ud800", value=1),
            r"shapes\['x\\n.ud800'\]: expected a list",
        ),
        (put("architecture", value=[]), "architecture: expected an object of modules, gone, .* found a list of 0"),
        (put("layers", value=[]), "layers: expected an object, found a list of 0"),
        (put("checksum", value="x"), None),
    ],
)
def test_a_forged_plan_is_one_line(bad, change, message):
    edit(bad, change, sign=message is not None)
    refused(bad, message or 'checksum: expected that of this plan, found "[x0-9a-f]+": the plan is damaged')


def padding():
    return nn.Sequential(OrderedDict(same=SameConv(6, 8, 3, stride=2), flat=nn.Flatten(2), causal=CausalConv(8, 8, 3)))


@pytest.mark.parametrize("make", [padding, lambda: padding().to("meta")])
@pytest.mark.parametrize(
    ("change", "name"),
    [
        (lambda padded: padded["causal"].update(pads=[0, 2]), "causal"),
        (lambda padded: padded["causal"].update(value=1.0), "causal"),
        (lambda padded: padded["causal"].update(mode="reflect"), "causal"),
        (lambda padded: padded["same"].update(strides=[1, 1]), "same"),
        (lambda padded: padded.pop("causal"), "causal"),
        (lambda padded: padded.update(same=padded["causal"]), "same"),
    ],
)
def test_a_plan_cannot_change_how_a_layer_pads(tmp_path, make, change, name):
    save(compressed(padding(), torch.ones(2, 6, 6, 6), pipeline=[Decompose(ranks=2)]), tmp_path)
    load(tmp_path, make())
    edit(tmp_path, lambda plan: change(plan["architecture"]["padded"]))
    with pytest.raises(FxlrdError, match=f"{name}: the padding before it is"):
        load(tmp_path, make())


def test_a_plan_cannot_change_the_stride_of_a_composed_layer(tmp_path):
    model = nn.Sequential(nn.Conv2d(3, 2, 3, stride=2, padding=1), nn.Conv2d(2, 8, 1, stride=3), nn.ReLU()).eval()
    x = torch.ones(1, 3, 24, 24)
    result = compressed(model, x, pipeline="merge{mode=exact}")
    save(result, tmp_path)
    plan = json.loads((tmp_path / PLAN).read_text())
    (composed,) = (name for name, spec in plan["layers"].items() if spec["kind"] == "Conv2d")
    assert plan["layers"][composed]["options"]["stride"] == [6, 6]
    assert torch.equal(load(tmp_path, model)(x), result.model(x))
    edit(tmp_path, put("layers", composed, "options", "stride", value=[4, 4]))
    with pytest.raises(FxlrdError, match=r"1: .* in the plan and .* the plan is damaged"):
        load(tmp_path, model)


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
    edit(bad, lambda plan: plan["layers"].update({f"l{i}": IDENTITY for i in range(10**4)}))
    refused(bad, "not in the architecture")
    edit(bad, lambda plan: plan["architecture"]["gone"].extend(f"l{i}" for i in range(10**4)))
    refused(bad, "no module 'l0'")


def test_files_that_are_none(bad, tmp_path):
    refused(tmp_path / "none", "holds no checkpoint")
    weights(bad).unlink()
    refused(bad, "is missing")
    os.mkfifo(weights_file(bad, read_plan(bad).weights))
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
        (lambda t: t.update({"d.weight": torch.ones(2, dtype=torch.int64)}), None),
    ],
)
def test_other_tensors_under_a_right_checksum(bad, change, message):
    tensors = load_file(weights(bad))
    change(tensors)
    resigned(bad, tensors)
    refused(bad, message)


def resigned(path, tensors):
    weights(path).unlink()
    save_file(tensors, path / "new")
    adopt(path, path / "new")


def adopt(path, file):
    """Make a file the one that the plan names."""
    new = Weights(*hashed(file))
    file.rename(weights_file(path, new))
    edit(path, put("weights", value=new.to_json()))


def test_a_header_that_lies(bad):
    file = weights(bad)
    file.write_bytes((2**40).to_bytes(8, "little") + file.read_bytes()[8:])
    adopt(bad, file)
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
        stored = load_file(weights(path))
        assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])
        assert all(torch.equal(t, stored[name]) for name, t in model.state_dict().items() if name in stored)
