"""A compressed model is copied, pickled, traced, exported, compiled and compressed again as any module is."""

from __future__ import annotations

import copy
import io
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torchvision.models import VisionTransformer

import fxlrd
from fxlrd import FxlrdError
from tests.support.cases import cases
from tests.support.models import BottleneckNet, randomise_norms

FORMS: dict[str, tuple[dict[str, Any], str]] = {
    "lrd": ({}, "svd"),
    "freeze": ({"preset": "freeze"}, "svd"),
    "branch": ({"preset": "branch"}, "branched"),
    "exact": ({"pipeline": "decompose,merge{mode=exact,norms=true}"}, "merged"),
    "merge": ({"pipeline": "calibrate{holdout=true},merge{ratio=2},refit,recalibrate"}, "merged"),
}
"""Options of compress, and a decision that at least one layer then has."""
CASES = [*(f"cnn-{form}" for form in FORMS), "vit-lrd", "vit-merge", "bert-lrd", "hf_vit-lrd"]
ANY = torch.export.Dim.DYNAMIC

Inputs = dict[str, Tensor]


def cnn() -> tuple[nn.Module, Inputs]:
    return randomise_norms(BottleneckNet(stride=2)), {"x": torch.randn(4, 3, 16, 16)}


def vit() -> tuple[nn.Module, Inputs]:
    model = VisionTransformer(
        image_size=32, patch_size=8, num_layers=1, num_heads=4, hidden_dim=64, mlp_dim=128, num_classes=10
    )
    nn.init.normal_(model.heads.head.weight, std=0.05)  # made as zeros: every output would be the same
    return model, {"x": torch.randn(4, 3, 32, 32)}


def _small() -> dict[str, int]:
    return {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}


def bert() -> tuple[nn.Module, Inputs]:
    transformers = pytest.importorskip("transformers")
    model = transformers.BertModel(transformers.BertConfig(**_small(), vocab_size=100))
    return model, {"input_ids": torch.randint(0, 99, (4, 9)), "attention_mask": torch.ones(4, 9)}


def hf_vit() -> tuple[nn.Module, Inputs]:
    transformers = pytest.importorskip("transformers")
    config = transformers.ViTConfig(**_small(), image_size=32, patch_size=8)
    return transformers.ViTForImageClassification(config), {"pixel_values": torch.randn(4, 3, 32, 32)}


@pytest.fixture(autouse=True)
def without_fast_attention():
    """No gradients, and no attention kernel that only eager mode has, so that outputs are equal bit for bit."""
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    with torch.no_grad():
        yield
    torch.backends.mha.set_fastpath_enabled(fast)


@dataclass
class Case:
    """A model that was compressed to a form, and its inputs; ``make`` makes the original."""

    make: Callable[[], tuple[nn.Module, Inputs]]
    form: str
    model: nn.Module
    x: Inputs


def compressed(make: Callable[[], tuple[nn.Module, Inputs]], form: str = "lrd") -> Case:
    torch.manual_seed(0)
    with torch.no_grad():
        model, x = make()
        result = again(model.eval(), x, form)
    assert FORMS[form][1] in {row["decision"] for row in result.report.layers}
    return Case(make, form, result.model, x)


def again(model: nn.Module, x: Inputs, form: str, **options: Any) -> fxlrd.Result:
    options = {**FORMS[form][0], **options}
    if "calibrate" in options.get("pipeline", ""):
        options["calibration"] = [{k: torch.randn_like(v) for k, v in x.items()} for _ in range(16)]
    return fxlrd.compress(model, x, measure=False, **options)


@pytest.fixture(scope="module", params=cases(CASES, slow=[c for c in CASES if c not in ("cnn-lrd", "cnn-merge")]))
def case(request) -> Case:
    kind, form = request.param.split("-")
    return compressed(globals()[kind], form)


def double(model: nn.Module, x: Inputs) -> tuple[nn.Module, Inputs]:
    return model.double(), {name: v.double() if v.is_floating_point() else v for name, v in x.items()}


def few(x: Inputs) -> Inputs:
    return {name: tensor[:3] for name, tensor in x.items()}


def outputs(result: Any) -> list[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    return [v for v in (result.values() if hasattr(result, "values") else result) if isinstance(v, Tensor)]


def same(a: Any, b: Any) -> bool:
    return len(outputs(a)) == len(outputs(b)) > 0 and all(map(torch.equal, outputs(a), outputs(b)))


def batches(x: Inputs) -> dict[str, dict[int, Any]]:
    return {name: {0: ANY} for name in x}


def test_copies_are_equal_and_independent(case):
    model, x = case.model, case.x
    before = model(**x)
    trains = [(n, p.requires_grad) for n, p in model.named_parameters()]
    assert all(train for _, train in trains) == (case.form != "freeze")
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert same(other(**x), before)
        assert [(n, p.requires_grad) for n, p in other.named_parameters()] == trains
        for parameter in other.parameters():
            parameter.zero_()
    assert same(model(**x), before)


class WithoutFxlrd(pickle.Unpickler):
    """Unpickles as in an environment without fxlrd."""

    def find_class(self, module: str, name: str) -> Any:
        assert not module.startswith("fxlrd")
        return super().find_class(module, name)


def test_unpickled_without_fxlrd(case):
    """Models of transformers alone need fxlrd: without its save_pretrained they would be saved without their plan."""
    needs_fxlrd = "save_pretrained" in vars(case.model)
    assert needs_fxlrd == hasattr(type(case.model), "save_pretrained")
    unpickler = pickle.Unpickler if needs_fxlrd else WithoutFxlrd
    other = unpickler(io.BytesIO(pickle.dumps(case.model))).load()
    assert same(other(**case.x), case.model(**case.x))


def test_torch_export(case):
    model, x = case.model, case.x
    program = torch.export.export(model, (), x, dynamic_shapes=batches(x))
    assert program.state_dict.keys() == model.state_dict().keys()
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    for run in (program.module(), torch.export.load(file).module()):
        assert same(run(**x), model(**x))
        assert same(run(**few(x)), model(**few(x)))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_onnx(case):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=f"no {package}: pip install -e '.[test]'")
    if case.form == "freeze":
        pytest.skip("the same graph as lrd's")
    import onnxruntime

    model, x = case.model, case.x
    program = torch.onnx.export(model, (), kwargs=x, dynamo=True, dynamic_shapes=batches(x), verbose=False)
    session = onnxruntime.InferenceSession(program.model_proto.SerializeToString())
    for batch in (x, few(x)):
        actual = session.run(None, {i.name: batch[i.name].numpy() for i in session.get_inputs()})
        expected = outputs(model(**batch))
        assert len(actual) == len(expected)
        for a, b in zip(actual, expected, strict=True):
            # Other kernels, and float32, as onnxruntime has no convs in float64 on CPUs.
            torch.testing.assert_close(torch.from_numpy(a), b, rtol=1e-5, atol=1e-6)


@pytest.mark.filterwarnings("ignore")
def test_jit_trace(case):
    model, x = case.model, case.x
    traced = torch.jit.trace(model, example_kwarg_inputs=x, strict=False)
    assert same(traced(**x), model(**x))
    assert same(traced(**few(x)), model(**few(x)))


@pytest.mark.slow
def test_torch_compile(case):
    torch.compiler.reset()
    run = torch.compile(case.model, backend="aot_eager", fullgraph=True)
    assert same(run(**case.x), case.model(**case.x))


@pytest.mark.slow
@pytest.mark.parametrize("make", [cnn, vit, bert])
def test_inductor(make):
    torch.compiler.reset()
    case = compressed(lambda: double(*make()))
    for a, b in zip(outputs(torch.compile(case.model)(**case.x)), outputs(case.model(**case.x)), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_compressing_again_changes_nothing(case, tmp_path):
    model, x = case.model, case.x
    before = model(**x)
    fxlrd.save(model, tmp_path)
    loaded = fxlrd.load(tmp_path, case.make()[0])
    for other in (model, copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        result = again(other, x, case.form)
        assert [record["sites"] for record in result.report.passes] == [[]] * len(result.report.passes)
        code = "merged" if case.form == "merge" else "factor"
        assert code in {skip.reason.code for record in result.report.ledger for skip in record.skipped}
        assert result.report.before == result.report.after
        assert same(result.model(**x), before)
        assert result.model.state_dict().keys() == model.state_dict().keys()
        trains = {n: p.requires_grad for n, p in model.named_parameters()}
        assert {n: p.requires_grad for n, p in result.model.named_parameters()} == trains


@pytest.mark.parametrize("preset", ["freeze", "branch"])
def test_decomposed_layers_can_be_frozen_and_branched_later(preset):
    case = compressed(cnn)
    result = again(case.model, case.x, preset)
    assert {row["decision"] for row in result.report.layers} == {"skipped"}
    changed = {site["name"] for record in result.report.passes for site in record["sites"]}
    assert "block.conv" in changed
    if preset == "freeze":
        trains = {n for n, p in result.model.named_parameters() if n.startswith("block.conv.") and p.requires_grad}
        assert trains == {"block.conv.core.weight"}
        assert same(result.model(**case.x), case.model(**case.x))


def test_the_ratio_of_a_later_merge_refers_to_the_original_model():
    case = compressed(cnn, "merge")
    assert case.model.get_submodule("fc").out_features == 16
    more = again(case.model, case.x, "merge", pipeline="calibrate,merge{ratio=4}").model
    assert more.get_submodule("fc").out_features == 8
    assert more.get_submodule("block.conv").in_channels < case.model.get_submodule("block.conv").in_channels


@pytest.mark.parametrize("options", ["", ",ranks=5"])
def test_channels_are_relocated_once(options):
    model = nn.Sequential(
        *(nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12), nn.ReLU()),
        *(nn.Conv2d(12, 12, 3), nn.BatchNorm2d(12), nn.ReLU()),
        nn.Conv2d(12, 8, 1),
    )
    x = torch.randn(2, 8, 9, 9)
    first = fxlrd.compress(model.eval(), x, pipeline=f"merge{{mode=relocate{options}}}", measure=False)
    second = fxlrd.compress(first.model, x, pipeline=f"merge{{mode=relocate{options}}}", measure=False)
    assert [site["name"] for site in first.report.passes[0]["sites"]] == ["3"]
    assert second.report.passes[0]["sites"] == []
    assert {skip.name: skip.reason.code for skip in second.report.ledger[0].skipped}["3"] == "merged"
    assert torch.equal(second.model(x), first.model(x))


def test_exported_programs_are_refused_in_one_line():
    case = compressed(cnn)
    program = torch.export.export(case.model, (), case.x)
    for other in (program.module(), torch.export.unflatten(program)):
        with pytest.raises(FxlrdError, match="exported"):
            fxlrd.compress(other, case.x, measure=False)
