from __future__ import annotations

import pytest
import torch

from fxlrd.training.examples import share


def test_shares_of_a_batch_add_up():
    x, y = torch.arange(5.0)[:, None], torch.arange(5)
    for world in (1, 2, 3, 7):
        parts = [share((x, y), rank, world, torch.device("cpu")) for rank in range(world)]
        mean = sum((part.inputs[0].mean() * part.weight for part in parts), torch.zeros(())) / world
        assert mean.item() == pytest.approx(2.0)


def pictures(count: int) -> tuple[list[torch.Tensor], list[dict[str, torch.Tensor]]]:
    """Images of any size with any number of boxes, as torchvision's detectors want them."""
    images = [torch.full((3, 8, 8 + i), float(i)) for i in range(count)]
    return images, [{"boxes": torch.full((i + 4, 4), float(i)), "scale": torch.tensor(float(i))} for i in range(count)]


@pytest.mark.parametrize("count", [2, 5])
def test_images_of_a_batch_have_all_their_boxes(count):
    images, targets = pictures(count)
    for world in (1, 2):
        seen = []
        for rank in range(world):
            part = share(((images, targets), targets), rank, world, torch.device("cpu"))
            assert [t["boxes"].shape for t in part.inputs[1]] == [t["boxes"].shape for t in part.target]
            assert len(part.inputs[0]) == len(part.target)
            seen += [(int(i.mean()), int(t["scale"]), *t["boxes"].shape) for i, t in zip(*part.inputs, strict=True)]
        assert seen == [(i, i, i + 4, 4) for i in range(count)]


def test_targets_that_are_dicts_are_shared_by_example():
    batch = torch.arange(6.0)[:, None], {"label": torch.arange(6), "width": torch.tensor(3.0)}
    parts = [share(batch, rank, 2, torch.device("cpu")) for rank in range(2)]
    assert [part.target["label"].tolist() for part in parts] == [[0, 1, 2], [3, 4, 5]]
    assert [part.inputs[0].flatten().tolist() for part in parts] == [[0, 1, 2], [3, 4, 5]]
    assert share(batch, 0, 1, torch.device("cpu")).target["label"].tolist() == [*range(6)]
    assert parts[0].size == 6
