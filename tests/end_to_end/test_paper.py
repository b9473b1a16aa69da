"""The paper's published figures, recomputed."""

from __future__ import annotations

import pytest
import torch
from torchvision import models

import fxlrd

pytestmark = pytest.mark.slow

# Parameters (M), depth, FLOPs (G); FLOPs with the stride of a 1x1 conv on its first factor. The paper prints depths
# of 115, 233 and 352. The convention that gives 115 (stem, seven a bottleneck, two for fc) gives 234 and 353 for the
# deeper two: 1 + 7·33 + 2 and 1 + 7·50 + 2.
TABLE_1 = {
    "resnet50": ((25.56, 50, 8.18), (12.75, 115, 4.31)),
    "resnet101": ((44.55, 101, 15.60), (22.21, 234, 8.00)),
    "resnet152": ((60.19, 152, 23.03), (30.01, 353, 11.68)),
}


def published(figures) -> tuple:
    return round(figures["params"] / 1e6, 2), figures["depth"], round(figures["flops"] / 1e9, 2)


@pytest.mark.parametrize("name", TABLE_1)
def test_table_1(name):
    result = fxlrd.compress(models.get_model(name), torch.randn(1, 3, 224, 224), ratio=2.0, measure=False)
    before, after = TABLE_1[name]
    assert published(result.report.before) == before
    assert published(result.report.after) == after


def test_table_2_on_the_network_itself():
    result = fxlrd.compress(models.resnet152(), torch.randn(1, 3, 64, 64), ratio=2.0, measure=False)
    ranks = {row["name"]: row["ranks"] for row in result.report.layers}
    assert ranks["layer1.0.conv1"] == [16]
    assert ranks["layer1.0.conv2"] == [38, 38]
    assert ranks["layer1.0.conv3"] == [25]
    assert ranks["layer4.2.conv1"] == [204]
    assert ranks["layer4.2.conv2"] == [309, 309]
    assert ranks["layer4.2.conv3"] == [204]
    assert ranks["fc"] == [335]
