"""Images of the user's: files in a folder, whose subfolders name their classes, as in torchvision's ImageFolder."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from torch import Tensor

from fxlrd.app.examples import Examples
from fxlrd.app.output import warn
from fxlrd.errors import FxlrdError, one_line

SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
_PARTS = {"train", "training", "val", "valid", "validation", "eval", "test", "testing"}
Prepare = Callable[[list[Any]], Any]
"""From images of PIL to the inputs of a model."""


def image_files(folder: Path) -> list[Path]:
    """Return the image files in a folder, at any depth, in order of their names."""
    return list(files_with(folder, SUFFIXES))


def files_with(folder: Path, suffixes: Sequence[str]) -> Iterator[Path]:
    """Yield the files with such suffixes in a folder, at any depth, in order; hidden ones are passed over."""
    for parent, folders, names in os.walk(folder, followlinks=True):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        for name in sorted(names):
            if name.lower().endswith(tuple(suffixes)) and not name.startswith("."):
                yield Path(parent) / name


def classes_of(where: str, folder: Path, files: Sequence[Path]) -> list[str]:
    """Return the name of the subfolder that each file is in; nothing where subfolders name no classes.

    Raises FxlrdError for a folder of parts of a data set, such as train and val: those are not its classes.
    """
    parts = [file.relative_to(folder).parts for file in files]
    names = sorted({part[0] for part in parts if len(part) > 1})
    if len(names) > 1 and {name.lower() for name in names} <= _PARTS:
        raise FxlrdError(
            f"{where}: it holds {', '.join(names)}: name one of them, such as {where.rstrip('/')}/{names[0]}, and "
            "another with --eval"
        )
    if any(len(part) == 1 for part in parts):
        return []
    return [part[0] for part in parts]


def without_strays(where: str, folder: Path, files: Sequence[Path]) -> list[Path]:
    """Return the files without those beside the folders of classes, which torchvision's ImageFolder ignores too.

    There are such folders where at least two hold files, and most files are in them. A warning names what is left out.
    """
    within = [file for file in files if file.parent != folder]
    strays = [file for file in files if file.parent == folder]
    folders = {file.relative_to(folder).parts[0] for file in within}
    if not strays or len(folders) < 2 or len(within) <= len(strays):
        return list(files)
    more = f" and {len(strays) - 1} more" if len(strays) > 1 else ""
    warn(f"{where}: {strays[0].name}{more} left out: beside the folders of classes")
    return within


def images_in(where: str, prepare: Prepare) -> Examples:
    """Return the images of a folder. Raises FxlrdError for one without any."""
    files = image_files(Path(where))
    if not files:
        raise FxlrdError(f"{where}: there are no images in it ({', '.join(s[1:] for s in SUFFIXES[:5])}, …)")
    files = without_strays(where, Path(where), files)
    reader = _Reader(files, prepare)
    return Examples(where, "images", reader, tuple(range(len(files))), classes_of(where, Path(where), files))


class _Reader:
    """Reads images by number, some at a time; what cannot be read is named in a warning and left out."""

    def __init__(self, files: Sequence[Path], prepare: Prepare) -> None:
        self.files = files
        self.prepare = prepare
        self.unreadable: set[int] = set()
        self.pool = ThreadPoolExecutor(min(4, os.cpu_count() or 1))

    def __call__(self, numbers: Sequence[int]) -> tuple[Any, Sequence[int]]:
        pairs = list(self.pool.map(self._read, numbers))
        images = [image for image in pairs if not isinstance(image, Exception)]
        good = [n for n, image in zip(numbers, pairs, strict=True) if not isinstance(image, Exception)]
        for number, error in zip(numbers, pairs, strict=True):
            if isinstance(error, Exception) and number not in self.unreadable:
                self.unreadable.add(number)
                warn(f"{self.files[number]} is left out: {one_line(error)}")
        return (self.prepare(images) if images else None), good

    def _read(self, number: int) -> Any:
        try:
            from PIL import Image
        except ImportError as error:
            raise FxlrdError("images are read by Pillow: pip install pillow") from error
        try:
            with Image.open(self.files[number]) as image:
                image.load()
                return _eight_bits(image)
        except Exception as error:
            return error


def _eight_bits(image: Any) -> Any:
    """Return an image in grey or in colours. Pillow cuts off what is above 255 in greys of 16 bits; they are scaled."""
    if image.mode.startswith("I;16") or (image.mode == "I" and image.getextrema()[1] > 255):
        return image.convert("I").point(lambda value: value * (1 / 257) + 0.5).convert("L")
    return image.convert("RGB") if image.mode != "L" else image.copy()


def stacked(transform: Callable[[Any], Tensor], channels: int) -> Prepare:
    """Return what makes a batch of images: each by ``transform``, which gets it in grey if there is one channel."""
    import torch

    mode = "L" if channels == 1 else "RGB"

    def prepare(images: list[Any]) -> Tensor:
        return torch.stack(alike([transform(image.convert(mode)) for image in images]))

    return prepare


def alike(images: list[Tensor]) -> list[Tensor]:
    """Return images, once it is sure that all have the same size."""
    shapes = {tuple(image.shape) for image in images}
    if len(shapes) > 1:
        sizes = " and ".join(map(str, sorted(shapes)[:2]))
        raise FxlrdError(f"images come in several sizes, such as {sizes}: give --size, with --mean and --std")
    return images
