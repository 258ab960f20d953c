"""What turns a decoded image into a network's input: for training with chance, else without.

    training:   crop -> flip -> auto-augment -> color jitter -> uint8
    validation: resize -> centre crop -> uint8, or normalised
    on the device, a batch: normalise; in training mixing.py erases and mixes

The order and the operations are timm's. Chance comes from the global generators of torch, Python
and NumPy, as those operations have it; `drawing_from` seeds them for one image and puts them back.
"""

import contextlib
import mmap
import random
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageOps
from timm.data.auto_augment import (
    augment_and_mix_transform,
    auto_augment_transform,
    rand_augment_transform,
)
from timm.data.transforms import RandomResizedCropAndInterpolation, str_to_pil_interp
from torch import Tensor
from torch.utils.data import get_worker_info
from torchvision import transforms
from torchvision.transforms import InterpolationMode, functional

from images.cropping import RandomResizedCrop, Size, as_image, to_image
from images.decoding import Box, Encoded

Rgb = Sequence[float]  # three
Source = Encoded | Image.Image
Transform = Callable[[Source], Tensor]

NUMPY_SEEDS = 2**32
BITS = 8  # of a pixel's channel
SRC_PADDING_PX = 4
SPARE = 2  # unused buffers that are kept
AUGMIX_SHARE = 0.3  # of the image, that AugMix shifts it by at most; timm's other policies 0.45


def _seed_all(seed: int) -> None:
    # Not torch.manual_seed: it also reseeds CUDA, and with it the dropout of the model.
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % NUMPY_SEEDS)


@contextlib.contextmanager
def drawing_from(seed: int) -> Iterator[None]:
    """Let all that draws on the CPU follow `seed`; the generators' states come back at the end.

    Not in a loader's worker, where they are nobody's: keeping them takes as long as to read a file.
    """
    if get_worker_info() is not None:
        _seed_all(seed)
        yield
        return
    python, numpy = random.getstate(), np.random.get_state()
    try:
        with torch.random.fork_rng(devices=[]):
            _seed_all(seed)
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)


def train_transform(
    *,
    img_size: Size,
    crop: str = "rrc",
    scale: tuple[float, float],
    ratio: tuple[float, float],
    hflip: float,
    auto_augment: str | None = None,
    color_jitter: float,
    interpolation: str,
    mean: Rgb,
) -> Transform:
    """Return what crops to (height, width), flips and augments at random: uint8 image_CHW.

    Crop "rrc" resizes a part of random area and aspect, "src" resizes all and shifts it a bit.
    `auto_augment` is a policy of timm, or "3aug" for that of DeiT III; it fills what it uncovers
    with `mean`. `interpolation` is a filter, or "random" for bilinear or bicubic by chance (with
    crop "rrc" only). Pixels are normalised by `Normaliser.batch`.

    Source: timm's `transforms_imagenet_train`; DeiT III (arXiv:2204.07118), sections 3.2 and 3.3.
    """
    steps = _crop(crop, img_size, scale=scale, ratio=ratio, interpolation=interpolation)
    if isinstance(steps[0], RandomResizedCrop) and (auto_augment or color_jitter):
        steps.append(to_image)
    elif isinstance(steps[0], RandomResizedCrop):
        return CropAndFlip(steps[0], hflip=hflip)
    if hflip > 0:
        steps.append(transforms.RandomHorizontalFlip(hflip))
    if auto_augment is not None:
        steps.append(auto_augmentation(auto_augment, interpolation=interpolation, mean=mean))
    if color_jitter > 0:
        steps.append(transforms.ColorJitter(color_jitter, color_jitter, color_jitter))
    steps.append(to_pixels)
    return transforms.Compose(steps)


class CropAndFlip:
    """RandomResizedCrop, then torchvision's RandomHorizontalFlip: same draws, before any pixel.

    Draws for a few images in a row take a third of the time that they take between two images,
    whose pixels drive all else out of a CPU's cache.
    """

    def __init__(self, crop: RandomResizedCrop, *, hflip: float) -> None:
        self.crop = crop
        self.hflip = hflip
        self._generator = torch.Generator()

    def __reduce__(self) -> tuple[Callable, tuple[RandomResizedCrop, float]]:
        """Return how another process makes one, with a generator of its own."""
        return _crop_and_flip, (self.crop, self.hflip)

    def __call__(self, source: Source) -> Tensor:
        """Return uint8 image_CHW; draws from torch's generator."""
        return self._drawn(source, torch.default_generator)()

    def drawn(self, source: Source, *, seed: int) -> Callable[[], Tensor]:
        """Return what makes the image_CHW that torch's generator with this seed leads to."""
        return self._drawn(source, self._generator.manual_seed(seed))

    def _drawn(self, source: Source, generator: torch.Generator) -> Callable[[], Tensor]:
        box = self.crop.draw(source.height, source.width, generator)
        is_flipped = self.hflip > 0 and torch.rand(1, generator=generator).item() < self.hflip
        return partial(self._made, source, box, is_flipped)

    def _made(self, source: Source, box: Box, is_flipped: bool) -> Tensor:
        image_CHW = self.crop.cut(source, box)
        return image_CHW.flip(-1) if is_flipped else image_CHW


def _crop_and_flip(crop: RandomResizedCrop, hflip: float) -> CropAndFlip:
    return CropAndFlip(crop, hflip=hflip)


def _crop(
    kind: str,
    img_size: Size,
    *,
    scale: tuple[float, float],
    ratio: tuple[float, float],
    interpolation: str,
) -> list[Callable]:
    if interpolation == "random":
        return [as_image, RandomResizedCropAndInterpolation(img_size, scale, ratio, "random")]
    mode = InterpolationMode(interpolation)
    if kind == "rrc":
        return [RandomResizedCrop(img_size, scale=scale, ratio=ratio, mode=mode)]
    resize = partial(_resize_to_cover, size=img_size, mode=mode)
    return [
        as_image,
        resize,
        transforms.RandomCrop(img_size, SRC_PADDING_PX, padding_mode="reflect"),
    ]


def auto_augmentation(
    name: str, *, interpolation: str, mean: Rgb
) -> Callable[[Image.Image], Image.Image]:
    """Return timm's policy `name`, set up as timm does for training.

    3-Augment is one of grayscale, solarisation and Gaussian blur of radius U(0.1, 2), each as
    likely. Source: RandAugment (arXiv:1909.13719); AugMix (arXiv:1912.02781); AutoAugment
    (arXiv:1805.09501); DeiT III (arXiv:2204.07118), section 3.2.
    """
    options: dict[str, object] = {
        "img_mean": tuple(min(255, round(255 * value)) for value in mean),
    }
    if interpolation != "random":
        options["interpolation"] = str_to_pil_interp(interpolation)
    if name.startswith("rand"):
        policy = rand_augment_transform(name, options)
        operations = policy.ops
    elif name.startswith("augmix"):
        policy = augment_and_mix_transform(name, options | {"translate_pct": AUGMIX_SHARE})
        operations = policy.ops
    else:
        policy = auto_augment_transform(name.replace("3aug", "3a"), options)
        operations = [operation for pair in policy.policy for operation in pair]
    for operation in operations:
        if operation.name.startswith("Posterize"):
            operation.aug_fn = posterize
    return policy


def posterize(image: Image.Image, bits_to_keep: int, **_: object) -> Image.Image:
    """Keep the highest bits of each channel.

    Policies ask for 0 bits or fewer at high magnitudes: black. Pillow 13 refuses, which timm 1.0.31
    has not noticed.
    """
    if bits_to_keep <= 0:
        return Image.new(image.mode, image.size)
    return image if bits_to_keep >= BITS else ImageOps.posterize(image, bits_to_keep)


def val_transform(
    *,
    img_size: Size,
    crop_ratio: float,
    interpolation: str,
    mean: Rgb,
    std: Rgb,
    is_raw: bool = False,
) -> Transform:
    """Resize to cover img_size / crop_ratio, cut (height, width) from the centre, normalise.

    `is_raw` leaves the pixels uint8, for `Normaliser.batch`.
    """
    mode = InterpolationMode(interpolation)
    cover = (int(img_size[0] / crop_ratio), int(img_size[1] / crop_ratio))  # as timm and DeiT
    resize = partial(_resize_to_cover, size=cover, mode=mode)
    last = to_pixels if is_raw else Normaliser(mean, std)
    return transforms.Compose([as_image, resize, transforms.CenterCrop(img_size), last])


def _resize_to_cover(image: Image.Image, *, size: Size, mode: InterpolationMode) -> Image.Image:
    height = max(size[0], size[1] * image.height // image.width)
    width = max(size[1], size[0] * image.width // image.height)
    return functional.resize(image, [height, width], mode)  # the same size is returned untouched


class Normaliser:
    """(x / 255 - mean) / std as one multiply and one add, of one image or a batch on any device."""

    def __init__(self, mean: Rgb, std: Rgb) -> None:
        mean_C11, std_C11 = (
            torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (mean, std)
        )
        self.gain_C11 = (1 / (255 * std_C11)).float()
        self.offset_C11 = (-mean_C11 / std_C11).float()
        self._memory = ReusedMemory()

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """Return float32 image_CHW of a Pillow image or of uint8 image_CHW, channels last."""
        image_CHW = to_pixels(image)
        normal_CHW = torch.empty_like(image_CHW, dtype=torch.float32)
        self._fill(normal_CHW[None], image_CHW[None])
        return normal_CHW

    def batch(self, image_BCHW: Tensor) -> Tensor:
        """Return float32 of uint8 images, bit for bit what they are one by one.

        On a CPU they are channels last in memory, as they come; elsewhere channels first.
        """
        if not image_BCHW.is_cpu:
            gain_C11, offset_C11 = (
                value.to(image_BCHW.device) for value in (self.gain_C11, self.offset_C11)
            )
            normal_BCHW = image_BCHW.to(torch.float32, memory_format=torch.contiguous_format)
            return normal_BCHW.mul_(gain_C11).add_(offset_C11)
        batch, channels, height, width = image_BCHW.shape
        normal_BHWC = self._memory.empty(torch.Size((batch, height, width, channels)))
        normal_BCHW = normal_BHWC.permute(0, 3, 1, 2)
        self._fill(normal_BCHW, image_BCHW)
        return normal_BCHW

    def _fill(self, normal_BCHW: Tensor, image_BCHW: Tensor) -> None:
        # A whole row of factors and one image at a time: vector instructions, in a CPU's cache.
        width = image_BCHW.shape[3]
        gain_C1W, offset_C1W = (
            value.view(3).repeat(width, 1).T[:, None] for value in (self.gain_C11, self.offset_C11)
        )
        for normal_CHW, image_CHW in zip(normal_BCHW, image_BCHW, strict=True):
            normal_CHW.copy_(image_CHW).mul_(gain_C1W).add_(offset_C1W)


class ReusedMemory:
    """Memory of float32 tensors, used again once no tensor lies in it.

    New memory is handed out page by page and zeroed, which takes longer than to normalise a batch.
    """

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    def __getstate__(self) -> dict[str, object]:
        return {"_free": []}  # another process has its own

    def empty(self, shape: torch.Size) -> Tensor:
        """Return a tensor of any content."""
        size = max(1, shape.numel()) * torch.float32.itemsize
        fitting = [memory for memory in self._free if len(memory) == size]
        memory = fitting.pop() if fitting else _pages(size)
        self._free = fitting
        array = np.frombuffer(memory, dtype=np.float32, count=shape.numel())
        # The array lives as long as the tensor's storage, whichever views of it are left.
        weakref.finalize(array, self._take_back, memory).atexit = False
        return torch.from_numpy(array).view(shape)

    def _take_back(self, memory: mmap.mmap) -> None:
        if len(self._free) < SPARE:
            self._free.append(memory)


def _pages(size: int) -> mmap.mmap:
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memory


def to_pixels(image: Image.Image | Tensor) -> Tensor:
    """Return uint8 image_CHW of a Pillow image, channels last in memory; a tensor as it is."""
    if isinstance(image, Image.Image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return image
