"""JPEGs of the size and weight of ImageNet's, made for benchmarks."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

SIZE, QUALITY, CLASSES = (500, 375), 90, 10
OCTAVES = {4: 60, 16: 40, 64: 30, 250: 14}  # cells across -> amplitude, about as in photographs
GRAIN = 13  # levels of noise: with it a file has 100 kB, about as in ImageNet (110 kB)


def picture(seed: int) -> Image.Image:
    """Return noise with the falling spectrum of a photograph."""
    rng = np.random.default_rng(seed)
    pixels_HWC = np.full((SIZE[1], SIZE[0], 3), 128.0)
    for cells, amplitude in OCTAVES.items():
        coarse = rng.integers(0, 256, (cells * 3 // 4, cells, 3), dtype=np.uint8)
        smooth = Image.fromarray(coarse).resize(SIZE, Image.Resampling.BICUBIC)
        pixels_HWC += (np.asarray(smooth, dtype=float) - 128) * (amplitude / 100)
    pixels_HWC += rng.normal(0, GRAIN, (SIZE[1], SIZE[0], 1))
    return Image.fromarray(np.clip(pixels_HWC, 0, 255).astype(np.uint8))


def make_images(root: Path, count: int, *, first: int = 0) -> None:
    """Write an ImageFolder of the JPEGs `first` to `count`."""
    for number in range(first, count):
        path = root / "train" / f"n{number % CLASSES:08d}" / f"{number}.JPEG"
        path.parent.mkdir(parents=True, exist_ok=True)
        picture(number).save(path, quality=QUALITY)
