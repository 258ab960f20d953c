"""Folders of images for benchmarks that index images and read none, or read the same again."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from PIL import Image

CLASSES = 1000


@contextlib.contextmanager
def images(*, num_classes: int) -> Iterator[Path]:
    """Yield an ImageFolder of one small JPEG per class and split; it is deleted afterwards."""
    image = Image.new("RGB", (8, 8))
    with tempfile.TemporaryDirectory() as folder:
        for split in ("train", "val"):
            for number in range(num_classes):
                path = Path(folder) / split / f"n{number:08d}" / "0.JPEG"
                path.parent.mkdir(parents=True)
                # No two files are the same: that would be reported.
                image.save(path, comment=f"{split} {number}")
        yield Path(folder)


def options(root: Path) -> list[str]:
    """Return the options of a run on such a folder that is stepped by hand: no loader, no log."""
    return [f"dataset.train.root={root}", "dataset.num_workers=0", "training.tensorboard=false"]
