"""Erase and mix a microbatch on its device as timm does, drawn as a function of (seed, position).

normalised image_BCHW, label_B -> Eraser -> Mixer -> image_BCHW, target_BY
"""

from __future__ import annotations

import random

import numpy as np
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch import Tensor

from options.schema import TrainDataOptions
from parallel.seeds import stable_seed

NUMPY_SEEDS = 2**32


class Eraser:
    """Random erasing: fills up to `recount` boxes of an image, with probability `reprob`.

    Mode "pixel" fills with noise, "rand" with one random color, "const" with zeros, after
    normalisation. Boxes are the same on every device; noise comes from the device's own generator.

    Source: arXiv:1708.04896; timm.data.random_erasing.
    """

    def __init__(self, o: TrainDataOptions, *, device: torch.device, seed: int) -> None:
        self.erase = RandomErasing(o.reprob, mode=o.remode, max_count=o.recount, device=str(device))
        self.seed = seed

    def __call__(self, image_BCHW: Tensor, position_B: Tensor) -> Tensor:
        """Erase in place, drawing by each image's position in the stream; return the images."""
        device = image_BCHW.device
        on_cpu = device.type == "cpu"
        generator = (
            torch.default_generator if on_cpu else torch.cuda.default_generators[device.index]
        )
        # timm draws from the global generators, which the model uses, too: restore them.
        kept = random.getstate(), generator.get_state()
        try:
            for image_CHW, position in zip(image_BCHW, position_B.tolist(), strict=True):
                seed = stable_seed(self.seed, "erase", position)
                random.seed(seed)
                generator.manual_seed(seed)
                self.erase(image_CHW)
        finally:
            random.setstate(kept[0])
            generator.set_state(kept[1])
        return image_BCHW


class Mixer:
    """Mix images in pairs, first with last; targets are label-smoothed probabilities.

    Draws depend only on the seed and on the number of this group of `batch_size` consecutive images
    of the run, so they are the same after a resume, and at any number of ranks as long as a rank's
    batch size stays the same.

    Source: mixup, arXiv:1710.09412; CutMix, arXiv:1905.04899; timm.data.Mixup.
    """

    def __init__(
        self, o: TrainDataOptions, *, smoothing: float, num_classes: int, seed: int
    ) -> None:
        self.mix = Mixup(
            mixup_alpha=o.mixup,
            cutmix_alpha=o.cutmix,
            prob=o.mixup_prob,
            switch_prob=o.mixup_switch_prob,
            mode=o.mixup_mode,
            label_smoothing=smoothing,
            num_classes=num_classes,
        )
        self.seed = seed

    def __call__(self, image_BCHW: Tensor, label_B: Tensor, *, group: int) -> tuple[Tensor, Tensor]:
        """Return the mixed images (written in place) and targets: image_BCHW, target_BY."""
        # timm draws from NumPy's global generator: restore it.
        state = np.random.get_state()
        np.random.seed(stable_seed(self.seed, "mix", group) % NUMPY_SEEDS)
        try:
            return self.mix(image_BCHW, label_B)
        finally:
            np.random.set_state(state)
