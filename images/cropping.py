"""Cut a random part out of an image and resize it, decoding no more of the file than that takes.

Encoded or Image -> box -> pixels_HWC of the box -> antialiased resize -> uint8 image_CHW
"""

from __future__ import annotations

import math

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision.transforms import InterpolationMode

from images.decoding import Box, Encoded, rgb, rgb_of_box

Size = tuple[int, int]  # height, width
ATTEMPTS = 10
PIL_FILTERS = {
    InterpolationMode.NEAREST: Image.Resampling.NEAREST,
    InterpolationMode.LANCZOS: Image.Resampling.LANCZOS,
}


def as_image(source: Encoded | Image.Image) -> Image.Image:
    """Return all pixels as a Pillow image."""
    return Image.fromarray(rgb(source)) if isinstance(source, Encoded) else source


def to_image(image_CHW: Tensor) -> Image.Image:
    """Return uint8 image_CHW as a Pillow image, for operations that need one."""
    return Image.fromarray(image_CHW.permute(1, 2, 0).contiguous().numpy())


def resize(pixels_HWC: np.ndarray, size: Size, *, mode: InterpolationMode) -> Tensor:
    """Resize uint8 pixels with an antialiasing filter.

    Shapes: uint8 [height, width, 3] -> uint8 [3, *size], channels last in memory.
    Numerics: Bilinear and bicubic are torch's, a quarter of Pillow's time; they differ from it by
        one level in a pixel out of forty, rarely (bicubic) by up to three.
    """
    if mode in PIL_FILTERS:
        image = Image.fromarray(pixels_HWC).resize((size[1], size[0]), PIL_FILTERS[mode])
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    # Contiguous, so that they stay channels last: to part the channels takes a quarter of the time.
    image_1CHW = torch.from_numpy(np.ascontiguousarray(pixels_HWC))[None].permute(0, 3, 1, 2)
    return functional.interpolate(image_1CHW, size, mode=mode.value, antialias=True)[0]


class RandomResizedCrop:
    """torchvision's random resized crop, with the same draws, from a file not decoded yet."""

    def __init__(
        self,
        size: Size,
        *,
        scale: tuple[float, float],
        ratio: tuple[float, float],
        mode: InterpolationMode,
    ) -> None:
        self.size = size
        self.scale = list(scale)
        self.ratio = list(ratio)
        self._log_ratio = torch.log(torch.tensor(self.ratio)).tolist()
        self.mode = mode
        self._take_memory()

    def _take_memory(self) -> None:
        # Drawn into again and again: to make a tensor takes longer than to draw a number.
        self._real, self._whole = torch.empty(1), torch.empty(1, dtype=torch.int64)

    def __getstate__(self) -> dict[str, object]:
        """Return the options: processes that draw must not share the memory they draw into."""
        own = ("_real", "_whole")
        return {name: value for name, value in vars(self).items() if name not in own}

    def __setstate__(self, state: dict[str, object]) -> None:
        """Take the options and memory of this process's own."""
        vars(self).update(state)
        self._take_memory()

    def __call__(self, source: Encoded | Image.Image) -> Tensor:
        """Return uint8 image_CHW of the size asked for; draws from torch's generator."""
        return self.cut(source, self.draw(source.height, source.width))

    def cut(self, source: Encoded | Image.Image, box: Box) -> Tensor:
        """Return uint8 image_CHW, the pixels of a box in the size asked for."""
        return resize(self._pixels(source, box), self.size, mode=self.mode)

    def draw(
        self, height: int, width: int, generator: torch.Generator = torch.default_generator
    ) -> Box:
        """Return a box of random area and aspect ratio, the largest centred one if ten fail."""
        real, whole = self._real, self._whole
        for _ in range(ATTEMPTS):
            area = height * width * real.uniform_(*self.scale, generator=generator).item()
            aspect = real.uniform_(*self._log_ratio, generator=generator).exp_().item()
            cut_width, cut_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < cut_width <= width and 0 < cut_height <= height:
                top = int(whole.random_(0, height - cut_height + 1, generator=generator))
                left = int(whole.random_(0, width - cut_width + 1, generator=generator))
                return top, left, cut_height, cut_width
        lowest, highest = self.ratio
        cut_width = min(width, round(height * highest))
        cut_height = min(height, round(width / lowest))
        return (height - cut_height) // 2, (width - cut_width) // 2, cut_height, cut_width

    def _pixels(self, source: Encoded | Image.Image, box: Box) -> np.ndarray:
        if isinstance(source, Encoded):
            return rgb_of_box(source, box, at_least=self.size)
        top, left, height, width = box
        return np.array(source.crop((left, top, left + width, top + height)))
