"""Folders of images as inputs of a model."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from fxlrd import FxlrdError
from fxlrd.app.images import classes_of, image_files, images_in, stacked
from fxlrd.app.transforms import Normalisation, Shape, normalisation, resized
from tests.support.pictures import write_images


def plain(channels=3):
    return resized(Shape(channels, 8, 8), Normalisation((0.0,) * channels, (1.0,) * channels))


def test_images_have_the_classes_of_their_folders_and_the_size_of_the_model(tmp_path):
    images = images_in(str(write_images(tmp_path)), plain())
    assert [*images.classes] == ["dark"] * 10 + ["light"] * 10
    batches = [inputs for inputs, _ in images.batches(8)]
    assert [b.shape for b in batches] == [(8, 3, 8, 8), (8, 3, 8, 8), (4, 3, 8, 8)]
    assert torch.cat(batches)[:10].max() <= 0.5 <= torch.cat(batches)[10:].min()


def test_an_image_of_the_size_is_only_normalised(tmp_path):
    from PIL import Image

    Image.new("RGB", (8, 8), (255, 0, 51)).save(tmp_path / "a.png")
    prepare = resized(Shape(3, 8, 8), Normalisation((0.5, 0.5, 0.5), (0.5, 0.25, 1.0)))
    (x, _), *_ = images_in(str(tmp_path), prepare).batches(1)
    assert torch.allclose(x[0, :, 0, 0], torch.tensor([1.0, -2.0, -0.3]))
    (x, _), *_ = images_in(str(tmp_path), plain(1)).batches(1)
    assert x.shape == (1, 1, 8, 8)


def test_an_unreadable_image_is_named_once_and_left_out_with_its_label(tmp_path, capsys):
    images = images_in(str(write_images(tmp_path)), plain())
    labelled = replace(images, labels=[0] * 10 + [1] * 10)
    (tmp_path / "dark" / "3.png").write_bytes(b"no image")
    for batches in (list(labelled.batches(20)), list(labelled.batches(20))):
        assert batches[0][0].shape[0] == 19
        assert batches[0][1].tolist() == [0] * 9 + [1] * 10
    err = capsys.readouterr().err
    assert "dark/3.png is left out: UnidentifiedImageError" in err
    assert err.count("\n") == 1
    for path in image_files(tmp_path):
        path.write_bytes(b"")
    with pytest.raises(FxlrdError, match="none of the 20 images can be read"):
        list(labelled.batches(20))


def test_folders_that_name_no_classes(tmp_path):
    with pytest.raises(FxlrdError, match=r"there are no images in it \(jpg"):
        images_in(str(tmp_path), plain())
    write_images(tmp_path / "train", count=1)
    write_images(tmp_path / "val", count=1)
    with pytest.raises(FxlrdError, match=r"holds train, val: name one of them, such as .*/train"):
        images_in(str(tmp_path), plain())
    (tmp_path / "train" / "light" / "0.png").rename(tmp_path / "train" / "0.png")
    folder = tmp_path / "train"
    assert classes_of("it", folder, image_files(folder)) == []
    assert len(images_in(str(folder), plain())) == 2, "one folder names no classes"


def test_images_beside_the_folders_of_classes_are_left_out(tmp_path, capsys):
    write_images(tmp_path, count=2)
    (tmp_path / "cover.png").write_bytes((tmp_path / "light" / "0.png").read_bytes())
    images = images_in(str(tmp_path), plain())
    assert [*images.classes] == ["dark", "dark", "light", "light"]
    assert "cover.png left out: beside the folders of classes" in capsys.readouterr().err


def test_greys_of_sixteen_bits_are_scaled(tmp_path):
    import numpy as np
    from PIL import Image

    eight, near = np.linspace(1, 254, 64).astype(np.uint16).reshape(8, 8), np.array([-128, 128] * 4)
    Image.fromarray((eight * 257 + near).astype(np.uint16)).save(tmp_path / "a.png")
    (x, _), *_ = images_in(str(tmp_path), plain(1)).batches(1)
    assert torch.equal(x[0, 0], torch.from_numpy(eight.astype(np.uint8)).float() / 255)


def test_images_of_several_sizes_do_not_become_a_batch(tmp_path):
    from torchvision.transforms.functional import to_tensor

    images = images_in(str(write_images(tmp_path)), stacked(to_tensor, 3))
    with pytest.raises(FxlrdError, match=r"images come in several sizes, such as .*: give --size"):
        list(images.batches(4))


def test_the_mean_and_the_deviation_of_the_channels():
    assert normalisation(None, None, 3) is None
    assert normalisation("0.5", "0.25", 3) == Normalisation((0.5,) * 3, (0.25,) * 3)
    for mean, std, message in [
        ("0.5", None, "give both or neither"),
        ("0.5,0.5", "1", "--mean: 2 numbers for 3 channels"),
        ("grey", "1", "--mean grey: write a number for each channel"),
        ("0", "0", "--std 0: write a number"),
    ]:
        with pytest.raises(FxlrdError, match=message):
            normalisation(mean, std, 3)
