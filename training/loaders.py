"""From options to batches: which images, in which order, made into what, fed to the device.

Config -> find_images -> ImageIndex -> train_batches | val_batches -> Batch on the device
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch.utils.data import DataLoader

import imagenet_dataset
from images import augment, batches, decoding, path_env, shared_index
from images import index as image_index
from images.augment import Normaliser, Transform
from images.feed import Feed
from images.image_reader import ImageReader
from images.index import ImageIndex, Split
from options.schema import Config, height_width
from parallel import collectives
from parallel.distributed import World
from training.run import Run


def data_root(config: Config) -> Path:
    """Return the dataset's folder."""
    data = config.dataset
    if data.path_env is None:
        return Path(data.train.root).expanduser()
    return path_env.read_root(Path(data.path_env).expanduser(), data.name)


def _find_index(config: Config, root: Path, split: Split, world: World) -> ImageIndex:
    data = config.dataset
    shared_index.unpack_once(root, world)
    folder = Path(data.index_folder).expanduser() if data.index_folder else None
    prints_s = 0 if data.duplicates == "ignore" else config.distributed.timeout_s / 2
    index = shared_index.find_index(root, split, world, folder=folder, prints_s=prints_s)
    share = data.subset if split == "train" else 1.0
    return image_index.select(index, class_filter=data.class_filter, share=share)


def find_val_images(config: Config, world: World) -> ImageIndex:
    """Index the validation images; unpack a bundled archive on first use. Collective.

    Raises:
        ValueError: They have not as many classes as the model, or are not as many as they must be.
    """
    val_root = config.dataset.val.root
    root = Path(val_root).expanduser() if val_root else data_root(config)
    index = _find_index(config, root, "val", world)
    image_index.check_count(index, config.dataset.val.images)
    if len(index.classes) != config.model.vit.num_classes:
        raise ValueError(
            f"config model.vit.num_classes={config.model.vit.num_classes}: must be "
            f"{len(index.classes)}, the classes in {index.root}"
        )
    return index


def find_images(config: Config, world: World) -> tuple[ImageIndex, ImageIndex]:
    """Index the training and validation images; unpack a bundled archive on first use."""
    train_index = _find_index(config, data_root(config), "train", world)
    image_index.check_count(train_index, config.dataset.train.images)
    val_index = find_val_images(config, world)
    shared_index.check_splits(train_index, val_index, world, copies=config.dataset.duplicates)
    collectives.require_equal("dataset", image_index.digest(train_index))
    return train_index, val_index


def train_transform(config: Config) -> Transform:
    """Return what turns an image into uint8 of the network's size, by chance."""
    data, train = config.dataset, config.dataset.train
    return augment.train_transform(
        img_size=config.model.vit.img_hw,
        scale=(train.crop_scale[0], train.crop_scale[1]),
        ratio=(train.crop_ratio[0], train.crop_ratio[1]),
        crop=train.crop,
        hflip=train.hflip,
        auto_augment=train.auto_augment,
        color_jitter=train.color_jitter,
        interpolation=train.interpolation or data.interpolation,
        mean=data.mean,
    )


def train_batches(run: Run, *, start_step: int) -> Iterator[batches.Batch]:
    """Yield this rank's microbatches from update `start_step` to the end of the run."""
    data, train = run.config.dataset, run.config.dataset.train
    loader = imagenet_dataset.train_loader(
        _reader(run.config, run.train_index, is_scaled=train.scaled_decode),
        transform=train_transform(run.config),
        timeout_s=data.timeout_s,
        is_reused=True,  # normalising copies
        order=run.order,
        batch_size=train.batch_size,
        grad_accum_steps=run.config.training.grad_accum_steps,
        start_step=start_step,
        num_steps=run.config.training.steps,
        rank=run.world.rank,
        world=run.world.size,
        seed=run.config.training.seed,
        num_workers=data.num_workers,
        pin_memory=run.world.device.type == "cuda",
    )
    yield from _feed(run.config, loader, "train", run.world, run.bad_images)


def _reader(config: Config, index: ImageIndex, *, is_scaled: bool = False) -> ImageReader:
    decoder, _ = decoding.pick_decoder(config.dataset.decoder)
    return ImageReader(index, decoder=decoder, is_scaled=is_scaled)


def _feed(config: Config, loader: DataLoader, split: Split, world: World, bad: set[int]) -> Feed:
    data = config.dataset
    at_most = data.max_bad if data.on_error == "skip" else None
    return Feed(
        loader,
        split=split,
        device=world.device,
        normaliser=Normaliser(data.mean, data.std),
        tolerance=shared_index.make_tolerance(at_most, world, seen=bad),
    )


def val_transform(config: Config, *, is_raw: bool = False) -> Transform:
    """Return what turns an image into the network's input, or into uint8, without chance."""
    data = config.dataset
    return augment.val_transform(
        is_raw=is_raw,
        img_size=height_width(data.val.img_size or config.model.vit.img_size),
        crop_ratio=data.val.crop_ratio,
        interpolation=data.interpolation,
        mean=data.mean,
        std=data.std,
    )


def val_batches(config: Config, index: ImageIndex, world: World) -> Feed:
    """Return this rank's share of the validation images."""
    loader = imagenet_dataset.val_loader(
        _reader(config, index),
        transform=val_transform(config, is_raw=True),
        timeout_s=config.dataset.timeout_s,
        is_reused=True,
        batch_size=config.dataset.val.batch_size,
        rank=world.rank,
        world=world.size,
        num_workers=config.dataset.num_workers,
        pin_memory=world.device.type == "cuda",
    )
    return _feed(config, loader, "val", world, set())
