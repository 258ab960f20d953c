"""Cut a random part out of an image and resize it, decoding no more of the file than that takes.

Encoded or Image -> box -> pixels_HWC of the box -> antialiased resize -> uint8 image_CHW
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional
from torchvision import transforms
from torchvision.transforms import InterpolationMode

from decoding import Box, Encoded, rgb, rgb_of_box

Size = tuple[int, int]  # height, width
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
        self.mode = mode

    def __call__(self, source: Encoded | Image.Image) -> Tensor:
        """Return uint8 image_CHW of the size asked for; draws from torch's generator."""
        shape_CHW = torch.empty((3, source.height, source.width), dtype=torch.uint8, device="meta")
        box: Box = transforms.RandomResizedCrop.get_params(shape_CHW, self.scale, self.ratio)
        return resize(self._pixels(source, box), self.size, mode=self.mode)

    def _pixels(self, source: Encoded | Image.Image, box: Box) -> np.ndarray:
        if isinstance(source, Encoded):
            return rgb_of_box(source, box, at_least=self.size)
        top, left, height, width = box
        return np.array(source.crop((left, top, left + width, top + height)))
