"""Turn an image into a network's input: at random for training, always alike for validation.

    training:   draw a crop -> decode it -> resize -> flip -> auto-augment -> color jitter -> uint8
    validation: decode -> resize -> centre crop -> uint8, or normalised
    on the device, a batch: normalise; in training mixing.py erases and mixes

The order and the operations are timm's, which draw from the global generators of torch, Python and
NumPy; `drawing_from` seeds these for one image and restores them.
"""

import contextlib
import math
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
from torch.nn import functional
from torch.utils.data import get_worker_info
from torchvision import transforms
from torchvision.transforms import InterpolationMode
from torchvision.transforms import functional as pictures

from images.reading import Box, Encoded, rgb, rgb_of_box

Rgb = Sequence[float]  # three
Size = tuple[int, int]  # height, width
Source = Encoded | Image.Image
Transform = Callable[[Source], Tensor]

NUMPY_SEEDS = 2**32
ATTEMPTS = 10  # to draw a crop that fits into the image
PIL_FILTERS = {
    InterpolationMode.NEAREST: Image.Resampling.NEAREST,
    InterpolationMode.LANCZOS: Image.Resampling.LANCZOS,
}
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
    """Seed every generator on the CPU, and restore their states at the end.

    A loader's worker does not restore them: nobody else draws there, and saving the states takes as
    long as reading a file.
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


def as_image(source: Source) -> Image.Image:
    """Decode the whole image, if it is not decoded yet."""
    return Image.fromarray(rgb(source)) if isinstance(source, Encoded) else source


def to_image(image_CHW: Tensor) -> Image.Image:
    """Return uint8 image_CHW as a Pillow image, which timm's operations need."""
    return Image.fromarray(image_CHW.permute(1, 2, 0).contiguous().numpy())


def resize(pixels_HWC: np.ndarray, size: Size, *, mode: InterpolationMode) -> Tensor:
    """Resize uint8 pixels with an antialiasing filter.

    Shapes: uint8 [height, width, 3] -> uint8 [3, *size], channels last in memory.
    Numerics: Bilinear and bicubic are torch's, which take a quarter of Pillow's time and differ
        from it by one level in one pixel of forty, rarely (bicubic) by up to three levels.
    """
    if mode in PIL_FILTERS:
        image = Image.fromarray(pixels_HWC).resize((size[1], size[0]), PIL_FILTERS[mode])
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    # Contiguous, so that they stay channels last: rearranging them costs a quarter of the time.
    image_1CHW = torch.from_numpy(np.ascontiguousarray(pixels_HWC))[None].permute(0, 3, 1, 2)
    return functional.interpolate(image_1CHW, size, mode=mode.value, antialias=True)[0]


class RandomResizedCrop:
    """torchvision's random resized crop, with the same draws, of a file not decoded yet.

    The header gives the size, which is all that the draws need; then only the crop is decoded.
    """

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
        # Reused for every draw: making a tensor takes longer than drawing a number.
        self._real, self._whole = torch.empty(1), torch.empty(1, dtype=torch.int64)

    def __reduce__(self) -> tuple[Callable, tuple]:
        """Pickle the options alone: torch would share the memory for draws between processes."""
        options = {"scale": self.scale, "ratio": self.ratio, "mode": self.mode}
        return partial(RandomResizedCrop, **options), (self.size,)

    def __call__(self, source: Source) -> Tensor:
        """Return a random box, resized: uint8 image_CHW; draws from torch's generator."""
        return self.cut(source, self.draw(source.height, source.width))

    def cut(self, source: Source, box: Box) -> Tensor:
        """Return the pixels of a box, resized: uint8 image_CHW."""
        if isinstance(source, Encoded):
            pixels_HWC = rgb_of_box(source, box, at_least=self.size)
        else:
            top, left, height, width = box
            pixels_HWC = np.array(source.crop((left, top, left + width, top + height)))
        return resize(pixels_HWC, self.size, mode=self.mode)

    def draw(
        self, height: int, width: int, generator: torch.Generator = torch.default_generator
    ) -> Box:
        """Return a box of random area and aspect, or the largest centred one if ten do not fit."""
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
    """Return the transform that crops to (height, width), flips and augments: uint8 image_CHW.

    Crop "rrc" resizes a box of random area and aspect, "src" resizes the whole image and shifts it
    slightly. `auto_augment` is a policy of timm, or "3aug" for DeiT III's; it fills uncovered areas
    with `mean`. `interpolation` is a filter, or "random" for bilinear or bicubic at random (only
    with crop "rrc"). `Normaliser.batch` normalises the pixels later.

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
    """RandomResizedCrop, then torchvision's RandomHorizontalFlip; draws before it decodes.

    The draws are torchvision's. Making them for several images in a row takes a third of the time
    that they take in between images, whose pixels evict everything else from the CPU's cache.
    """

    def __init__(self, crop: RandomResizedCrop, *, hflip: float) -> None:
        self.crop = crop
        self.hflip = hflip
        self._generator = torch.Generator()

    def __reduce__(self) -> tuple[Callable, tuple]:
        """Pickle without the generator: a spawned worker would find its state's memory gone."""
        return partial(CropAndFlip, hflip=self.hflip), (self.crop,)

    def __call__(self, source: Source) -> Tensor:
        """Return uint8 image_CHW; draws from torch's generator."""
        return self.draw(source, torch.default_generator)()

    def draw_from(self, seed: int, source: Source) -> Callable[[], Tensor]:
        """Draw as __call__ would with torch's generator seeded so; what is returned decodes."""
        return self.draw(source, self._generator.manual_seed(seed))

    def draw(self, source: Source, generator: torch.Generator) -> Callable[[], Tensor]:
        """Draw the box and the flip; calling what is returned decodes and makes image_CHW."""
        box = self.crop.draw(source.height, source.width, generator)
        is_flipped = self.hflip > 0 and torch.rand(1, generator=generator).item() < self.hflip
        return partial(self._cut, source, box, is_flipped)

    def _cut(self, source: Source, box: Box, is_flipped: bool) -> Tensor:
        image_CHW = self.crop.cut(source, box)
        return image_CHW.flip(-1) if is_flipped else image_CHW


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
    cover = partial(_resize_to_cover, size=img_size, mode=mode)
    shift = transforms.RandomCrop(img_size, SRC_PADDING_PX, padding_mode="reflect")
    return [as_image, cover, shift]


def auto_augmentation(
    name: str, *, interpolation: str, mean: Rgb
) -> Callable[[Image.Image], Image.Image]:
    """Return timm's policy `name`, set up as timm does for training.

    3-Augment picks grayscale, solarisation or Gaussian blur of radius U(0.1, 2) with equal odds.

    Source: RandAugment (arXiv:1909.13719); AugMix (arXiv:1912.02781); AutoAugment
    (arXiv:1805.09501); DeiT III (arXiv:2204.07118), section 3.2.
    """
    color = tuple(min(255, round(255 * value)) for value in mean)
    options: dict[str, object] = {"img_mean": color}
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

    At high magnitudes policies ask for 0 bits or fewer, which is black. Pillow 13 refuses that, and
    timm 1.0.31 does not allow for it.
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
    skip_normalise: bool = False,
) -> Transform:
    """Resize to cover img_size / crop_ratio, cut (height, width) from the centre, normalise.

    `skip_normalise` leaves the pixels uint8, for `Normaliser.batch`.
    """
    size = (int(img_size[0] / crop_ratio), int(img_size[1] / crop_ratio))  # as timm and DeiT
    cover = partial(_resize_to_cover, size=size, mode=InterpolationMode(interpolation))
    last = to_pixels if skip_normalise else Normaliser(mean, std)
    return transforms.Compose([as_image, cover, transforms.CenterCrop(img_size), last])


def _resize_to_cover(image: Image.Image, *, size: Size, mode: InterpolationMode) -> Image.Image:
    height = max(size[0], size[1] * image.height // image.width)
    width = max(size[1], size[0] * image.width // image.height)
    return pictures.resize(image, [height, width], mode)  # the same size is returned untouched


class Normaliser:
    """(x / 255 - mean) / std as one multiply and one add, for an image or a batch on any device."""

    def __init__(self, mean: Rgb, std: Rgb) -> None:
        mean_C11, std_C11 = (
            torch.tensor(v, dtype=torch.float64).view(3, 1, 1) for v in (mean, std)
        )
        self.gain_C11 = (1 / (255 * std_C11)).float()
        self.offset_C11 = (-mean_C11 / std_C11).float()
        self._memory = ReusedMemory()

    def __call__(self, image: Image.Image | Tensor) -> Tensor:
        """Return a Pillow image or uint8 image_CHW as float32 image_CHW, channels last."""
        image_CHW = to_pixels(image)
        normal_CHW = torch.empty_like(image_CHW, dtype=torch.float32)
        self._fill(normal_CHW[None], image_CHW[None])
        return normal_CHW

    def batch(self, image_BCHW: Tensor) -> Tensor:
        """Return uint8 images as float32, bit for bit what __call__ gives for each.

        On a CPU they stay channels last in memory; elsewhere they become channels first.
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
        # Factors as long as a row let the CPU use vector instructions, which it does not with three
        # numbers broadcast over channels-last memory; one image at a time stays in its cache.
        width = image_BCHW.shape[3]
        gain_C1W, offset_C1W = (
            value.view(3).repeat(width, 1).T[:, None] for value in (self.gain_C11, self.offset_C11)
        )
        for normal_CHW, image_CHW in zip(normal_BCHW, image_BCHW, strict=True):
            normal_CHW.copy_(image_CHW).mul_(gain_C1W).add_(offset_C1W)


class ReusedMemory:
    """Memory for float32 tensors, reused once no tensor lies in it.

    The kernel hands out new memory page by page and zeroed, which takes longer than normalising a
    batch.
    """

    def __init__(self) -> None:
        self._free: list[mmap.mmap] = []

    def __getstate__(self) -> dict[str, object]:
        return {"_free": []}  # private pages, of no use to another process

    def empty(self, shape: torch.Size) -> Tensor:
        """Return an uninitialised tensor."""
        size = max(1, shape.numel()) * torch.float32.itemsize
        fitting = [memory for memory in self._free if len(memory) == size]
        memory = fitting.pop() if fitting else _pages(size)
        self._free = fitting
        array = np.frombuffer(memory, dtype=np.float32, count=shape.numel())
        # The array lives as long as the tensor's storage, so the memory comes back only when the
        # last view of it is gone.
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
    """Return a Pillow image as uint8 image_CHW, channels last in memory; a tensor untouched."""
    if isinstance(image, Image.Image):
        return torch.from_numpy(np.array(image)).permute(2, 0, 1)
    return image
