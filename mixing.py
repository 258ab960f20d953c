"""Mixup and CutMix of a microbatch, timm's, drawn as a function of (seed, place in the run).

image_BCHW, label_B -> timm.data.Mixup -> image_BCHW, target_BY
"""

from __future__ import annotations

import numpy as np
from timm.data import Mixup
from torch import Tensor

from seeds import stable_seed

NUMPY_SEEDS = 2**32
MODES = ("batch", "pair", "elem")


class Mixer:
    """Mix images in pairs, first with last; targets are label-smoothed probabilities.

    All draws depend on the seed and on which group of `batch_size` consecutive images of the run
    this is, so they are the same after a resume, and for any number of ranks that keeps the batch
    size of a rank.

    Source: mixup, arXiv:1710.09412; CutMix, arXiv:1905.04899; timm.data.Mixup.
    """

    def __init__(
        self,
        *,
        mixup: float,
        cutmix: float,
        prob: float,
        switch_prob: float,
        mode: str,
        smoothing: float,
        num_classes: int,
        seed: int,
    ) -> None:
        self.mix = Mixup(
            mixup_alpha=mixup,
            cutmix_alpha=cutmix,
            prob=prob,
            switch_prob=switch_prob,
            mode=mode,
            label_smoothing=smoothing,
            num_classes=num_classes,
        )
        self.seed = seed

    def __call__(self, image_BCHW: Tensor, label_B: Tensor, *, group: int) -> tuple[Tensor, Tensor]:
        """Return the mixed images (written in place) and targets: image_BCHW, target_BY."""
        # timm draws from NumPy's global generator, which is put back as it was.
        state = np.random.get_state()
        np.random.seed(stable_seed(self.seed, "mix", group) % NUMPY_SEEDS)
        try:
            return self.mix(image_BCHW, label_B)
        finally:
            np.random.set_state(state)
