"""How images become the inputs of a model: as its weights were trained, or as --mean, --std and --size say."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxlrd.app.huggingface import image_processor_of
from fxlrd.app.images import Prepare, alike, stacked
from fxlrd.app.zoo import is_file
from fxlrd.errors import FxlrdError, one_line


@dataclass(frozen=True)
class Shape:
    """The shape of an image that the model takes."""

    channels: int
    height: int
    width: int


@dataclass(frozen=True)
class Normalisation:
    """``mean`` and ``std`` of the channels of images with values 0…1."""

    mean: tuple[float, ...]
    std: tuple[float, ...]


def numbers(option: str, text: str | None) -> tuple[float, ...] | None:
    """Return the numbers of an option such as --mean 0.5,0.5,0.5."""
    if text is None:
        return None
    try:
        values = tuple(float(part) for part in text.split(","))
    except ValueError:
        values = ()
    if not values or (option == "--std" and min(values) <= 0):
        raise FxlrdError(f"{option} {text}: write a number for each channel, such as 0.5,0.5,0.5")
    return values


def normalisation(mean: str | None, std: str | None, channels: int) -> Normalisation | None:
    """Return what --mean and --std say, for each of the channels; None where they say nothing."""
    if mean is None and std is None:
        return None
    if mean is None or std is None:
        raise FxlrdError("--mean and --std: give both or neither")
    given = {option: numbers(option, text) or () for option, text in (("--mean", mean), ("--std", std))}
    for option, values in given.items():
        if len(values) not in (1, channels):
            raise FxlrdError(f"{option}: {len(values)} numbers for {channels} channels")
    return Normalisation(*(values * (channels if len(values) == 1 else 1) for values in given.values()))


def resized(shape: Shape, values: Normalisation) -> Prepare:
    """Return what resizes the shorter side, crops the centre and normalises; images of the size stay as they are."""
    from torchvision.transforms import functional as F

    size = (shape.height, shape.width)

    def transform(image: Any) -> Tensor:
        sides = (image.height, image.width)
        if sides != size:
            scale = max(new / old for new, old in zip(size, sides, strict=True))
            covering = [max(new, round(old * scale)) for new, old in zip(size, sides, strict=True)]
            image = F.center_crop(F.resize(image, covering), list(size))
        return F.normalize(F.to_tensor(image), list(values.mean), list(values.std))

    return stacked(transform, shape.channels)


def of_torchvision(name: str, weights: str | None) -> Callable[[Any], Tensor] | None:
    """Return the transforms of a model's weights, or of its best ones if it has others; None if it has none."""
    published = _published(name, weights)
    transform: Callable[[Any], Tensor] | None = None if published is None else published.transforms()
    return transform


def categories(name: str, weights: str) -> dict[str, int]:
    """Return the classes that published weights of torchvision tell apart, by name."""
    published = _published(name, weights)
    names = () if published is None else published.meta.get("categories") or ()
    return {each: number for number, each in enumerate(names)}


def _published(name: str, weights: str | None) -> Any:
    from torchvision import models

    kinds: Any = models.get_model_weights(name)
    if not list(kinds):
        return None
    return kinds.DEFAULT if weights in (None, "DEFAULT") or is_file(str(weights)) else kinds[str(weights)]


def crop_of(transform: Any) -> tuple[int, int] | None:
    """Return the height and width that transforms of torchvision cut images to, if they do."""
    sizes = getattr(transform, "crop_size", None)
    if not sizes:
        return None
    height, width = (sizes * 2)[:2] if isinstance(sizes, list) else (sizes, sizes)
    return int(height), int(width)


def of_timm(name: str) -> Mapping[str, Any]:
    """Return timm's data configuration of a model: input_size, mean, std, interpolation, crop_pct."""
    from timm.data import resolve_data_config
    from timm.models import get_pretrained_cfg

    published = get_pretrained_cfg(name)
    config: Mapping[str, Any] = resolve_data_config({}, pretrained_cfg=published.to_dict() if published else {})
    return config


def synsets() -> dict[str, int]:
    """Return the classes of ImageNet by the names that its folders have, such as n01440764; none without timm."""
    try:
        from timm.data import ImageNetInfo
    except ImportError:
        return {}
    return {name: number for number, name in enumerate(ImageNetInfo().label_names())}


def timm_transform(config: Mapping[str, Any], shape: Shape) -> Callable[[Any], Tensor]:
    """Return the transforms of evaluation of a data configuration, for images of ``shape``."""
    from timm.data import create_transform

    size = (shape.channels, shape.height, shape.width)
    transform: Callable[[Any], Tensor] = create_transform(**{**config, "input_size": size}, is_training=False)
    return transform


def of_huggingface(folder: Path) -> Prepare | None:
    """Return what the image processor in a folder makes of images; None if there is none."""
    processor = image_processor_of(folder)
    if processor is None:
        return None

    def prepare(images: list[Any]) -> Tensor:
        colours = [image.convert("RGB") for image in images]
        try:
            values = processor(images=colours, return_tensors="pt")["pixel_values"]
        except ValueError as error:
            alike([torch.as_tensor(processor(images=[each], return_tensors="pt")["pixel_values"]) for each in colours])
            raise FxlrdError(f"hf:{folder}: its image processor: {one_line(error)}") from error
        return torch.as_tensor(values)

    return prepare


def size_of_huggingface(folder: Path, model: nn.Module) -> Shape | None:
    """Return the shape of the images that a model of transformers takes, as its folder says."""
    config: Any = model.config
    config = getattr(config, "vision_config", config)
    processor: Any = image_processor_of(folder)
    size: Any = None
    if processor is not None:
        crops = getattr(processor, "do_center_crop", False) and getattr(processor, "crop_size", None)
        size = _height_width(crops or getattr(processor, "size", None))
    size = size or _height_width(getattr(config, "image_size", None))
    return None if size is None else Shape(int(getattr(config, "num_channels", 3)), *size)


def _height_width(size: Any) -> tuple[int, int] | None:
    if isinstance(size, int):
        return size, size
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return int(size[0]), int(size[1])
    if size is None:
        return None
    for names in (("height", "width"), ("shortest_edge", "shortest_edge")):
        height, width = (size.get(n) if isinstance(size, Mapping) else getattr(size, n, None) for n in names)
        if height and width:
            return int(height), int(width)
    return None
