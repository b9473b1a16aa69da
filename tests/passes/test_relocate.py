from __future__ import annotations

import copy

import pytest
from torch import nn
from torchvision import models

import fxlrd
from fxlrd import FxlrdError, capture
from fxlrd.graph import cost
from fxlrd.graph.facts import provenance
from fxlrd.graph.surgery import calls, layers
from fxlrd.passes import Decompose, Merge
from tests.support.merging import bottleneck, calibrated, conv, hooked_conv, randomised, sequence
from tests.support.results import reasons, site_names
from tests.support.tensors import assert_close, images


def test_relocate_at_full_rank_without_an_activation_is_exact():
    model, x = sequence(*bottleneck(nn.Identity)), images(4, 9, channels=8)
    result = Merge(mode="relocate", ranks=12)(capture(model, x))
    assert site_names(result) == ["3"]
    assert not result.sites[0].exact, "it is labelled by what it is in general"
    assert_close(result.graph_module(x), model(x))


def test_relocate_over_a_norm_of_constant_scale_and_no_shift_is_the_tucker_form():
    model, x = sequence(*bottleneck(nn.Identity)), images(4, 9, channels=8)
    for m in (model[1], model[4]):
        m.weight.data.fill_(0.7)
        m.running_var.fill_(2.0)
        m.running_mean.zero_()
        m.bias.data.zero_()
    model[3].bias.data.zero_()
    result = Merge(mode="relocate", ranks=5)(capture(model, x))
    tucker = Decompose(ranks={"3": (5, 5)})(capture(model, x)).graph_module
    assert_close(result.graph_module(x), tucker(x))
    assert provenance(calls(result.graph_module, "3")[0]).error == pytest.approx(
        provenance(calls(tucker, "3.core")[0]).error, rel=1e-9
    )


@pytest.mark.slow
def test_relocate_in_bottlenecks():
    model, x = randomised(models.resnet50()), images(2, 32)
    gm = capture(model, x)
    result = Merge(mode="relocate")(gm)
    assert site_names(result) == [n for n in layers(gm) if n.endswith(".conv2")]
    assert len(result.sites) == 16
    assert not any(site.exact for site in result.sites)
    assert all("fine-tune" in site.note for site in result.sites)
    after = result.graph_module
    assert cost.depth(after) == 50
    r = fxlrd.ranks.tucker2_rank(512, 512, 3, 2.75)
    assert after.get_submodule("layer4.2.conv2").weight.shape == (r, r, 3, 3)
    assert after.get_submodule("layer4.2.bn1").num_features == after.get_submodule("layer4.2.bn2").num_features == r
    same = Merge()(calibrated(model, x)).graph_module
    assert cost.params(after) == cost.params(same), "the shapes of the interpolative form"
    assert after(x).isfinite().all()


LEFT = {
    "basic block": ([conv(8, 8, 3), nn.ReLU(), conv(8, 8, 3)], "0", "not-between"),
    "norm after": (
        [conv(), nn.ReLU(), nn.BatchNorm2d(8), conv(k=3), conv()],
        "3",
        "not-between",
    ),
    "statistics of the batch": (
        [conv(), nn.BatchNorm2d(8, track_running_stats=False), conv(k=3), conv()],
        "2",
        "not-between",
    ),
    "groups": ([conv(), conv(k=3, groups=2), conv()], "1", "grouped"),
    "hooks": ([hooked_conv(), conv(k=3), conv()], "1", "hooks"),
    "narrow": ([conv(8, 2), conv(2, 2, 3), conv(2, 8)], "1", "no-channels"),
    "thin": ([conv(8, 8), conv(8, 64, 3), conv(64, 8)], "1", "no-saving"),
}


@pytest.mark.parametrize("name", LEFT)
def test_what_relocate_leaves_alone_says_why(name):
    parts, site, reason = LEFT[name]
    gm = capture(sequence(*copy.deepcopy(parts)), images(4, 8, channels=8))
    ratio = 1.01 if name == "thin" else 60.0 if name == "narrow" else 2.0
    result = Merge(mode="relocate", ratio=ratio)(gm)
    assert not result.modified
    assert reasons(result)[site] == reason
    with pytest.raises(FxlrdError, match=rf"^merge: {site} cannot be merged: "):
        Merge(mode="relocate", ratio=ratio, ranks={site: 3}, skip=site)(gm)


def test_relocate_takes_skip_and_ranks():
    model, x = sequence(*bottleneck(), nn.ReLU()), images(4, 9, channels=8)
    gm = capture(model, x)
    assert reasons(Merge(mode="relocate", skip=("3",))(gm))["3"] == "skip"
    assert reasons(Merge(mode="relocate", skip=("0",))(gm))["3"] == "skip"
    assert reasons(Merge(mode="relocate", ranks={"[0]": 3})(gm))["3"] == "unnamed"
    named = Merge(mode="relocate", ranks={"3": 4})(gm)
    assert named.graph_module.get_submodule("3").weight.shape == (4, 4, 3, 3)
