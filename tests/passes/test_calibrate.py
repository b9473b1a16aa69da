from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.fx.passes.infra.pass_manager import PassManager
from torch.utils.data import DataLoader, TensorDataset

import fxlrd
from fxlrd import FxlrdError, Pipeline, capture
from fxlrd.moments import MOMENTS, moments
from fxlrd.passes import Calibrate, Merge


def model() -> nn.Sequential:
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 1)).eval()


def images(batch: int = 6) -> torch.Tensor:
    return torch.randn(batch, 3, 9, 9)


def with_moments(gm) -> list[str]:
    return [n.name for n in gm.graph.nodes if MOMENTS in n.meta]


def test_moments_are_left_on_a_copy():
    net, x = model(), images()
    gm = capture(net, x)
    before, code = copy.deepcopy(net.state_dict()), gm.code
    result = Calibrate(x)(gm)
    assert not result.modified
    assert result.sites == result.skipped == ()
    assert with_moments(gm) == []
    assert with_moments(result.graph_module) == ["input_1", "_0", "_2", "_3"]
    assert result.graph_module.code == gm.code == code
    assert torch.equal(result.graph_module(x), net(x))
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    seen = net[:3](x).detach().double().movedim(1, -1).flatten(0, -2)
    (node,) = (n for n in result.graph_module.graph.nodes if n.name == "_2")
    torch.testing.assert_close(moments(node, 1).second, seen.mT @ seen / len(seen), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(moments(node, 1).mean, seen.mean(0), rtol=1e-12, atol=1e-12)


def test_outputs_may_be_left_out():
    assert with_moments(Calibrate(images(), outputs=False)(capture(model(), images())).graph_module) == [
        "input_1",
        "_2",
    ]


def test_a_second_sweep_replaces_the_first():
    x = images()
    gm = Calibrate(x)(Calibrate(images(20))(capture(model(), x)).graph_module).graph_module
    (node,) = (n for n in gm.graph.nodes if n.name == "input_1")
    assert moments(node, 1).count == 6 * 81


def test_without_inputs_it_says_what_to_give():
    with pytest.raises(FxlrdError, match=r"^calibrate: no calibration inputs; give calibration=") as error:
        Calibrate()(capture(model(), images()))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("progress", [False, True])
@pytest.mark.parametrize("data", [5, "images", [images(), torch.randn(2, 4, 9, 9)], [], [images() / 0]])
def test_bad_data_is_one_line(data, progress):
    with pytest.raises(FxlrdError, match=r"^calibration: ") as error:
        fxlrd.compress(model(), images(), preset="merge", calibration=data, measure=False, progress=progress)
    assert "\n" not in str(error.value)


def test_the_bar_counts_the_batches():
    seen = []

    def progress(items, label):
        for item in items:
            seen.append(label)
            yield item

    Calibrate([images(), images(), images()])(capture(model(), images()), progress)
    Calibrate(images())(capture(model(), images()), progress)
    assert seen == ["calibrate"] * 4


def test_data_has_no_text_form():
    assert str(Pipeline([Calibrate(images())])) == "calibrate"
    assert str(Pipeline.parse("calibrate{outputs=false}")) == "calibrate{outputs=false}"
    assert Calibrate(images()) == Calibrate()
    assert "tensor" not in repr(Calibrate(images()))
    with pytest.raises(FxlrdError, match="unknown option of calibrate 'calibration'"):
        Pipeline.parse("calibrate{calibration=x}")


def test_a_loader_goes_through_compress_and_the_pass_manager():
    data = DataLoader(TensorDataset(images(20), torch.arange(20)), batch_size=8)
    result = fxlrd.compress(model(), images(), preset="merge", calibration=data, measure=False)
    assert [row["name"] for row in result.report.passes] == ["calibrate", "merge"]
    assert result.report.passes[0]["exact"]
    assert result.report.passes[0]["step_error"] == 0
    managed = PassManager(passes=[Calibrate(data), Merge(ranks={"0": 3})])(capture(model(), images()))
    assert managed.modified
    assert managed.graph_module.get_submodule("0").out_channels == 3


def test_training_mode_stays():
    net = model().train()
    gm = Calibrate(images())(capture(net, images())).graph_module
    assert all(m.training for m in net)
    assert gm.get_submodule("1").num_batches_tracked == 0
