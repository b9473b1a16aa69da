"""A compressed model is a module as any other: copied, pickled, traced, exported, compiled, compressed again."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import fxlrd
from fxlrd import FxlrdError

FORMS: dict[str, dict[str, Any]] = {
    "lrd": {},
    "freeze": {"preset": "freeze"},
    "branch": {"preset": "branch"},
    "exact": {"pipeline": "decompose,merge{mode=exact,norms=true}"},
    "merge": {"pipeline": "calibrate,merge{ratio=2},refit,recalibrate"},
}
CASES = [(kind, form) for kind in ("cnn", "vit") for form in FORMS] + [("bert", "lrd"), ("hf_vit", "lrd")]
ANY = torch.export.Dim.DYNAMIC

Inputs = dict[str, Tensor]


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.reduce = nn.Conv2d(32, 24, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(24)
        self.conv = nn.Conv2d(24, 24, 3, stride=2, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(24)
        self.mix = nn.Conv2d(24, 24, 3, padding=1, groups=4)
        self.expand = nn.Conv2d(24, 32, 1, bias=False)
        self.bn3 = nn.BatchNorm2d(32)
        self.down = nn.Conv2d(32, 32, 1, stride=2)
        self.act = nn.ReLU(inplace=True)

    def forward(self, x):
        y = self.act(self.bn1(self.reduce(x)))
        y = self.act(self.bn2(self.conv(y)))
        return self.act(self.bn3(self.expand(self.mix(y))) + self.down(x))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 32, 3, padding=1)
        self.block = Block()
        self.drop = nn.Dropout(0.1)
        self.fc = nn.Linear(32, 32)
        self.head = nn.Linear(32, 10)

    def forward(self, x):
        x = self.block(self.stem(x)).mean((2, 3))
        return self.head(self.drop(self.fc(x)))


def cnn() -> tuple[nn.Module, Inputs]:
    model = Net()
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
    return model, {"x": torch.randn(4, 3, 16, 16)}


def vit() -> tuple[nn.Module, Inputs]:
    model = VisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10
    )
    nn.init.normal_(model.heads.head.weight, std=0.05)  # made as zeros: every output would be the same
    return model, {"x": torch.randn(4, 3, 32, 32)}


def _small() -> dict[str, int]:
    return {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}


def bert() -> tuple[nn.Module, Inputs]:
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel(transformers.BertConfig(**_small(), vocab_size=100))
    return model, {"input_ids": torch.randint(0, 99, (4, 9)), "attention_mask": torch.ones(4, 9)}


def hf_vit() -> tuple[nn.Module, Inputs]:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(**_small(), image_size=32, patch_size=8)
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(4, 3, 32, 32)}


@pytest.fixture(autouse=True)
def plainly():
    """No gradients, and attention not through the kernel that eager alone takes: outputs can be equal bit for bit."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        yield
    torch.backends.mha.set_fastpath_enabled(fast)


@pytest.fixture(scope="module", params=CASES, ids="-".join)
def case(request) -> tuple[str, nn.Module, Inputs]:
    """The name of a form, a model compressed to it, and inputs."""
    kind, form = request.param
    model, x = compressed(globals()[kind], form)
    return form, model, x


def compressed(make: Callable[[], tuple[nn.Module, Inputs]], form: str) -> tuple[nn.Module, Inputs]:
    torch.manual_seed(0)
    with torch.no_grad():
        model, x = make()
        result = again(model.eval(), x, form)
    assert any(row["decision"] not in ("skipped", "original") for row in result.report.layers)
    return result.model, x


def again(model: nn.Module, x: Inputs, form: str) -> fxlrd.Result:
    options = dict(FORMS[form])
    if "calibrate" in options.get("pipeline", ""):
        options["calibration"] = [{k: torch.randn_like(v) for k, v in x.items()} for _ in range(8)]
    return fxlrd.compress(model, x, measure=False, **options)


def few(x: Inputs) -> Inputs:
    return {name: tensor[:3] for name, tensor in x.items()}


def outputs(given: Any) -> list[Tensor]:
    if isinstance(given, Tensor):
        return [given]
    return [v for v in (given.values() if hasattr(given, "values") else given) if isinstance(v, Tensor)]


def same(a: Any, b: Any) -> bool:
    return len(outputs(a)) == len(outputs(b)) and all(map(torch.equal, outputs(a), outputs(b)))


def batches(x: Inputs) -> dict[str, dict[int, Any]]:
    return {name: {0: ANY} for name in x}


def test_copies_are_the_same_and_apart(case):
    _, model, x = case
    before = model(**x)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(other(**x), before)
        trains = [(n, p.requires_grad) for n, p in model.named_parameters()]
        assert [(n, p.requires_grad) for n, p in other.named_parameters()] == trains
        for parameter in other.parameters():
            parameter.zero_()
    assert same(model(**x), before)


def test_torch_export(case):
    _, model, x = case
    program = torch.export.export(model, (), x, dynamic_shapes=batches(x))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for run in (program.module(), torch.export.load(file).module()):
        assert same(run(**x), model(**x))
        assert same(run(**few(x)), model(**few(x)))


@pytest.mark.filterwarnings("ignore")
def test_onnx(case):
    pytest.importorskip("onnxscript", reason="no onnxscript: pip install -e '.[test]'")
    runtime = pytest.importorskip("onnxruntime", reason="no onnxruntime: pip install -e '.[test]'")
    _, model, x = case
    program = torch.onnx.export(model, (), kwargs=x, dynamo=True, dynamic_shapes=batches(x), verbose=False)
    session = runtime.InferenceSession(program.model_proto.SerializeToString())
    for given in (x, few(x)):
        found = session.run(None, {i.name: given[i.name].numpy() for i in session.get_inputs()})
        wanted = outputs(model(**given))
        assert len(found) == len(wanted)
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(torch.from_numpy(a), b, rtol=1e-5, atol=1e-6)  # float32, other kernels


@pytest.mark.filterwarnings("ignore")
def test_jit_trace(case):
    _, model, x = case
    traced = torch.jit.trace(model, example_kwarg_inputs=x, strict=False)
    assert same(traced(**x), model(**x))
    assert same(traced(**few(x)), model(**few(x)))


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_torch_compile(case, backend):
    _, model, x = case
    torch.compiler.reset()
    assert same(torch.compile(model, backend=backend, fullgraph=True)(**x), model(**x))


@pytest.mark.parametrize("make", [cnn, vit, bert])
def test_inductor(make):
    model, x = compressed(make, "lrd")
    torch.compiler.reset()
    for a, b in zip(outputs(torch.compile(model)(**x)), outputs(model(**x)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)  # float32, other kernels


def test_compressing_again_changes_nothing(case, tmp_path):
    form, model, x = case
    if form == "merge":
        pytest.skip("merged layers are layers like others: merging again cuts them again")
    before = model(**x)
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        result = again(other, x, form)
        assert all(not record["sites"] for record in result.report.passes)
        assert {row["decision"] for row in result.report.layers} == {"skipped"}
        assert any(row["reason"] == "it is a low-rank factor already" for row in result.report.layers)
        assert result.report.before == result.report.after
        assert same(result.model(**x), before)
        assert list(result.model.state_dict()) == list(model.state_dict())


@pytest.mark.parametrize("preset", ["freeze", "branch"])
def test_what_stands_decomposed_can_be_frozen_and_branched_later(preset):
    model, x = compressed(cnn, "lrd")
    result = again(model, x, preset)
    assert {row["decision"] for row in result.report.layers} == {"skipped"}
    changed = {site["name"] for record in result.report.passes for site in record["sites"]}
    if preset == "branch":
        assert "block.conv" in changed
    else:
        assert "block.conv" in changed
        trains = {n for n, p in result.model.named_parameters() if n.startswith("block.conv.") and p.requires_grad}
        assert trains == {"block.conv.core.weight"}
        assert same(result.model(**x), model(**x))


def test_exported_programs_are_refused_in_one_line():
    model, x = compressed(cnn, "lrd")
    program = torch.export.export(model, (), x)
    for other in (program.module(), torch.export.unflatten(program)):
        with pytest.raises(FxlrdError, match="exported"):
            fxlrd.compress(other, x, measure=False)
