"""Options of a run that is small enough for a test."""

from collections.abc import Callable
from pathlib import Path

from options import compose


def small_options(image_folder: Path, run_folder: Path) -> Callable:
    """Return `options(*overrides)`: those of a two-block ViT on `image_folder` in `run_folder`."""
    base = [
        "model.vit.img_size=32",
        "model.vit.num_classes=3",
        "model.vit.embed_dim=36",
        "model.vit.depth=2",
        f"dataset.train.root={image_folder}",
        "optimizer.warmup_steps=0",
        "dataset.train.batch_size=5",
        "dataset.val.batch_size=2",
        "dataset.num_workers=0",
        f"training.checkpoint.path={run_folder}",
        "training.tensorboard=false",
    ]
    return lambda *overrides: compose.compose("vit_tiny_patch8_64", [*base, *overrides])
