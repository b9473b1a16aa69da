"""Folders of images as users have them, with a class that a mean tells."""

from __future__ import annotations

from pathlib import Path

import numpy as np


def write_images(folder: Path, classes: tuple[str, ...] = ("dark", "light"), count: int = 10, size: int = 12) -> Path:
    """Write ``count`` images of each class into a folder of its name; the classes differ in brightness."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for i, name in enumerate(classes):
        (folder / name).mkdir(parents=True, exist_ok=True)
        low = i * 256 // len(classes)
        for k in range(count):
            pixels = generator.integers(low, low + 256 // len(classes), (size + k % 3, size, 3), dtype="uint8")
            Image.fromarray(pixels).save(folder / name / f"{k}.png")
    return folder
