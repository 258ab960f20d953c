"""Small image folders for tests, and loaders of them."""

import numpy as np
from PIL import Image

from imagenet_dataset import LoaderOptions, TrainImages, ValImages, train_loader, val_loader
from images.reading import ImageReader


def write_image(path, *, seed=0, size=(8, 8), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert(mode)
    image.save(path, format="PNG" if path.suffix.lower() == ".png" else "JPEG")


def folder_dataset(root, *, train=11, val=7, classes=("n02", "n01", "n03")):
    for split, count in (("train", train), ("val", val)):
        for number in range(count):
            wnid = classes[number % len(classes)]
            write_image(root / split / wnid / f"{number}.JPEG", seed=number)
    return root


def tiny_dataset(root):
    for number in range(6):
        wnid = ("n02", "n01", "n03")[number % 3]
        write_image(root / "train" / wnid / "images" / f"{wnid}_{number}.JPEG", seed=number)
        (root / "train" / wnid / f"{wnid}_boxes.txt").write_text("ignored")
    lines = []
    for number in range(4):
        write_image(root / "val" / "images" / f"val_{number}.JPEG", seed=number)
        lines.append(f"val_{number}.JPEG\t{('n03', 'n01')[number % 2]}\t0\t0\t7\t7")
    (root / "val" / "val_annotations.txt").write_text("\n".join(lines) + "\n")
    return root


def train_batches(
    index,
    *,
    transform,
    num_steps,
    start_step=0,
    order=None,
    seed=5,
    grad_accum_steps=1,
    decoder="pillow",
    **options,
):
    """A loader of training batches; `options` are those of LoaderOptions."""
    reader = ImageReader(index, decoder=decoder)
    images = TrainImages(reader, transform=transform, order=order, seed=seed)
    steps, options = range(start_step, num_steps), LoaderOptions(**options)
    return train_loader(images, steps, grad_accum_steps=grad_accum_steps, options=options)


def val_batches(index, *, transform, **options):
    """A loader of validation batches; `options` are those of LoaderOptions."""
    images = ValImages(ImageReader(index), transform=transform)
    return val_loader(images, options=LoaderOptions(**options))
