"""MODEL of a command, with what its source says of the inputs that it takes."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxlrd.app import texts, transforms, zoo
from fxlrd.app.images import Prepare, stacked
from fxlrd.app.inputs import DTYPES, example_for
from fxlrd.app.models import huggingface_folder, load_model, source_of
from fxlrd.app.transforms import Shape
from fxlrd.errors import FxlrdError, one_line
from fxlrd.graph.inputs import map_tensors

_SHAPE = "3x224x224"
_IMAGENET = 1000


@dataclass(frozen=True)
class Subject:
    """The model of a command.

    Attributes:
        model: on its device and in its dtype.
        folder: where it is from, if it is one of transformers.
        package: torchvision or timm, if it is from there, and ``name``, what it is called there.
        options: the command's.
    """

    model: nn.Module
    folder: Path | None
    package: str
    name: str
    options: argparse.Namespace

    @property
    def reads_text(self) -> bool:
        """Whether it takes numbers of tokens."""
        return self.folder is not None and _main_input(self.model) == "input_ids"

    def example(self) -> Any:
        """Return random inputs: those of the shape, the length and the batch size that the options ask for."""
        if not self.reads_text:
            shape = self.options.input or "x".join(map(str, self._sizes()))
            return self.inputs(
                example_for(shape, self.options.batch, self._dtype(), channels_last=self.options.channels_last)
            )
        ids = texts.random_ids(self.model, self.options.batch, self.length())
        return self.placed(texts.as_inputs(self.model, ids))

    def length(self) -> int:
        """Return how many tokens an input has."""
        return texts.length_for(self.model, self.options.length)

    def inputs(self, pixels: Tensor) -> Any:
        """Return images as the model takes them, on its device, in its dtype and memory format."""
        return self.placed(pixels if self.folder is None else {_main_input(self.model): pixels})

    def placed(self, inputs: Any) -> Any:
        """Return inputs on the model's device, in its dtype and in the memory format that the options ask for."""
        device, dtype = self.options.device, self._dtype()

        def place(t: Tensor) -> Tensor:
            t = t.to(device, dtype) if t.is_floating_point() else t.to(device)
            last = self.options.channels_last and t.dim() == 4
            return t.contiguous(memory_format=torch.channels_last) if last else t

        return map_tensors(place, inputs)

    def prepare(self) -> Prepare:
        """Return what makes inputs of images: by --mean, --std and --size, else as the model's source says."""
        shape, options = self.image_shape(), self.options
        values = transforms.normalisation(options.mean, options.std, shape.channels)
        if values is not None:
            return transforms.resized(shape, values)
        sized = options.input is not None or options.size is not None
        if self.folder is not None and not sized:
            if (prepare := transforms.of_huggingface(self.folder)) is not None:
                return prepare
        elif self.package == "timm":
            config = transforms.of_timm(self._plain())
            if len(config["mean"]) == shape.channels:
                return stacked(transforms.timm_transform(config, shape), shape.channels)
        elif self.package == "torchvision" and (own := self._of_torchvision()) is not None:
            if not sized:
                return stacked(own, shape.channels)
            if hasattr(own, "mean"):
                return transforms.resized(shape, transforms.Normalisation(tuple(own.mean), tuple(own.std)))
        raise FxlrdError(
            "--mean and --std: give the mean and the standard deviation of the channels that the model was trained "
            "with, of values 0 to 1, such as --mean 0.485,0.456,0.406 --std 0.229,0.224,0.225"
        )

    def image_shape(self) -> Shape:
        """Return the shape of an image that the model takes. Raises FxlrdError where it takes none."""
        sizes = self._sizes()
        if len(sizes) != 3:
            raise FxlrdError(f"--input {self.options.input}: for a folder of images write CxHxW, such as 3x224x224")
        return Shape(*sizes)

    def class_names(self, count: int) -> dict[str, int]:
        """Return which of its ``count`` outputs stands for the class of a name, as far as its source tells."""
        if self.folder is not None:
            config: Any = self.model.config
            return {str(name): int(number) for number, name in config.id2label.items()}
        published = self.options.weights is not None and not zoo.is_file(self.options.weights)
        names = {}
        if self.package == "torchvision" and published:
            names = transforms.categories(self._plain(), self.options.weights)
        return names | transforms.synsets() if self.package and published and count == _IMAGENET else names

    def _sizes(self) -> tuple[int, ...]:
        """Return the sizes of one input: those that the options ask for, or those of the model's source."""
        options = self.options
        if options.input is not None:
            return tuple(example_for(options.input, 1, torch.float32, channels_last=False).shape[1:])
        channels, height, width = self._usual()
        return (channels, height, width) if options.size is None else (channels, *_size(options.size))

    def _usual(self) -> tuple[int, int, int]:
        if self.folder is not None:
            if _main_input(self.model) != "pixel_values":
                raise FxlrdError(
                    f"hf:{self.folder}: a {type(self.model).__name__} takes {_main_input(self.model)}: the command "
                    "line makes texts and images only; call fxlrd.compress in Python"
                )
            shape = transforms.size_of_huggingface(self.folder, self.model)
            if shape is None:
                raise FxlrdError(f"hf:{self.folder}: it does not say what size images have: give --size")
            return shape.channels, shape.height, shape.width
        if self.package == "timm":
            channels, height, width = transforms.of_timm(self._plain())["input_size"]
            return int(self._zoo_options().get("in_chans", channels)), int(height), int(width)
        crop = transforms.crop_of(self._of_torchvision()) if self.package == "torchvision" else None
        channels, height, width = map(int, _SHAPE.split("x"))
        sources = [getattr(self.options, name, None) for name in ("calibration", "eval", "finetune")]
        reads_data = any(source not in (None, "random") for source in sources)
        return (channels, *crop) if crop and reads_data else (channels, height, width)

    def _of_torchvision(self) -> Any:
        return transforms.of_torchvision(self._plain(), self.options.weights)

    def _plain(self) -> str:
        return self.name.partition("{")[0]

    def _zoo_options(self) -> dict[str, int]:
        return zoo.parsed(self.package, self.name)[1]

    def _dtype(self) -> torch.dtype:
        floats = (p.dtype for p in self.model.parameters() if p.is_floating_point())
        return next(floats, torch.float32)


def subject_of(name: str, options: argparse.Namespace) -> Subject:
    """Return the model of this name on the device, and in the dtype and memory format, that the options ask for."""
    model = load_model(name, options.weights, options.seed)
    folder = huggingface_folder(name)
    if options.dtype is not None or folder is None:  # the weights of a folder have a dtype of their own
        model = model.to(DTYPES[options.dtype or "float32"])
    if options.channels_last:
        model = model.to(memory_format=torch.channels_last)
    try:
        model = model.to(options.device)
    except (RuntimeError, AssertionError) as error:
        raise FxlrdError(f"--device {options.device}: {one_line(error)}") from error
    if folder is not None:
        subject = Subject(model, Path(folder).expanduser(), "", "", options)
    else:
        package, _, attribute = (source_of(name, options.weights) or name).partition(":")
        subject = Subject(model, None, package if package in zoo.PACKAGES else "", attribute, options)
    _check_sizes(options, subject.reads_text)
    return subject


def _check_sizes(options: argparse.Namespace, reads_text: bool) -> None:
    """Raise FxlrdError for options on inputs that the model does not take."""
    if options.input is not None and options.size is not None:
        raise FxlrdError("--input and --size: give one of the two")
    if reads_text and (options.input is not None or options.size is not None or options.channels_last):
        raise FxlrdError("--input, --size and --channels-last are for images; the model reads text: use --length")
    if not reads_text and options.length is not None:
        raise FxlrdError("--length is for texts; the model reads none")


def _main_input(model: nn.Module) -> str:
    return str(getattr(model, "main_input_name", "input_ids"))


def _size(text: str) -> tuple[int, int]:
    """Read --size: N for a square, or HxW."""
    try:
        sizes = [int(part) for part in text.split("x")]
    except ValueError:
        sizes = []
    if len(sizes) not in (1, 2) or min(sizes) < 1:
        raise FxlrdError(f"--size {text}: write the size of an image, such as 224 or 240x320")
    return sizes[0], sizes[-1]
