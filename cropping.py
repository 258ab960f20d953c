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

from decoding import Box, Encoded, rgb, rgb_of_box

Size = tuple[int, int]  # height, width
ATTEMPTS = 10
SCRATCH_BYTES = 3 << 20  # pixels of most photographs in ImageNet
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

    Shapes: uint8 [height, width, 3] -> uint8 [3, *size].
    Numerics: Bilinear and bicubic are torch's, a quarter of Pillow's time; they differ from it by
        one level in a pixel out of forty, rarely (bicubic) by up to three.
    """
    if mode in PIL_FILTERS:
        image = Image.fromarray(pixels_HWC).resize((size[1], size[0]), PIL_FILTERS[mode])
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    image_1CHW = torch.from_numpy(pixels_HWC).permute(2, 0, 1)[None]
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
        # New memory is handed out page by page, at a twentieth of the time to decode into it.
        self._scratch = bytearray(SCRATCH_BYTES)

    def __call__(self, source: Encoded | Image.Image) -> Tensor:
        """Return uint8 image_CHW of the size asked for; draws from torch's generator."""
        box = self.draw(source.height, source.width)
        return resize(self._pixels(source, box), self.size, mode=self.mode)

    def draw(self, height: int, width: int) -> Box:
        """Return a box of random area and aspect ratio, the largest centred one if ten fail."""
        for _ in range(ATTEMPTS):
            area = height * width * torch.empty(1).uniform_(*self.scale).item()
            aspect = torch.exp(torch.empty(1).uniform_(*self._log_ratio)).item()
            cut_width, cut_height = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if 0 < cut_width <= width and 0 < cut_height <= height:
                top = int(torch.randint(0, height - cut_height + 1, (1,)))
                left = int(torch.randint(0, width - cut_width + 1, (1,)))
                return top, left, cut_height, cut_width
        lowest, highest = self.ratio
        cut_width = min(width, round(height * highest))
        cut_height = min(height, round(width / lowest))
        return (height - cut_height) // 2, (width - cut_width) // 2, cut_height, cut_width

    def _pixels(self, source: Encoded | Image.Image, box: Box) -> np.ndarray:
        if isinstance(source, Encoded):
            return rgb_of_box(source, box, at_least=self.size, scratch=self._scratch)
        top, left, height, width = box
        return np.array(source.crop((left, top, left + width, top + height)))
