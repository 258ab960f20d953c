"""From options to batches: find the images, order them, transform them, feed them to the device.

Config -> find_images -> ImageIndex -> train_batches | val_batches -> Batch on the device
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

from torch.utils.data import DataLoader

import imagenet_dataset
from imagenet_dataset import LoaderOptions, TrainImages, ValImages
from images import augment, cache, duplicates, reading, roots
from images import index as image_index
from images.augment import Normaliser, Transform
from images.batches import Batch
from images.feed import Feed, Tolerance
from images.index import ImageIndex, Split
from images.reading import ImageReader
from options.schema import Config, height_width
from parallel import collectives
from parallel.distributed import World, expand_home
from training.run import Run


def data_root(config: Config) -> Path:
    """Return the dataset's folder."""
    data = config.dataset
    if data.path_env is None:
        return expand_home(data.train.root)
    return roots.read_root(expand_home(data.path_env), data.name)


def _find_index(
    config: Config, root: Path, split: Split, world: World, trained: Sequence[str] = ()
) -> ImageIndex:
    data = config.dataset
    roots.unpack_once(root, world)
    folder = expand_home(data.index_folder) if data.index_folder else None
    # The other ranks wait in a collective while rank 0 takes fingerprints: stop well before it
    # times out.
    prints_s = 0 if data.duplicates == "ignore" else config.distributed.timeout_s / 2
    index = cache.find_index(root, split, world, folder=folder, prints_s=prints_s)
    share = data.subset if split == "train" else 1.0
    wanted = data.class_filter
    if {*wanted} == {*trained}:
        # The filter of training: a part of the classes that were trained may be scored. Not one of
        # them is an error, and so is what a user's own filter names in vain.
        wanted = [name for name in wanted if name in index.classes] or wanted
    return image_index.select(index, class_filter=wanted, share=share)


def find_val_images(config: Config, world: World, *, trained: Sequence[str] = ()) -> ImageIndex:
    """Index the validation images; unpack a bundled archive on first use. Collective.

    `trained` are the ids of the classes that weights know, of which the images may be a part.

    Raises:
        ValueError: They are not as many as the options say.
    """
    val_root = config.dataset.val.root
    root = expand_home(val_root) if val_root else data_root(config)
    index = _find_index(config, root, "val", world, trained)
    image_index.check_count(index, config.dataset.val.images)
    return index


def _check_num_classes(config: Config, index: ImageIndex) -> None:
    """Raise ValueError unless the dataset has as many classes as the model."""
    if config.model.vit.num_classes not in (None, len(index.classes)):
        raise ValueError(
            f"config model.vit.num_classes={config.model.vit.num_classes}: must be "
            f"{len(index.classes)}, the classes in {index.root} (or null: as many as there are)"
        )


def find_images(config: Config, world: World) -> tuple[ImageIndex, ImageIndex]:
    """Index the training and validation images; unpack a bundled archive on first use."""
    train_index = _find_index(config, data_root(config), "train", world)
    image_index.check_count(train_index, config.dataset.train.images)
    val_index = find_val_images(config, world)
    image_index.check_splits(train_index, val_index)
    _check_num_classes(config, train_index)
    if config.dataset.duplicates != "ignore":
        duplicates.check_copies(train_index, val_index, world, duplicates=config.dataset.duplicates)
    collectives.require_equal("dataset", image_index.digest(train_index))
    return train_index, val_index


def train_transform(config: Config) -> Transform:
    """Return what turns an image into uint8 of the network's size, at random."""
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


def train_batches(run: Run, *, start_step: int) -> Iterator[Batch]:
    """Yield this rank's microbatches from update `start_step` to the end of the run."""
    config, train = run.config, run.config.dataset.train
    images = TrainImages(
        _reader(config, run.train_index, is_scaled=train.scaled_decode),
        transform=train_transform(config),
        order=run.order,
        seed=config.training.seed,
    )
    loader = imagenet_dataset.train_loader(
        images,
        range(start_step, config.training.steps),
        grad_accum_steps=config.training.grad_accum_steps,
        options=_loader_options(config, run.world, train.batch_size),
    )
    yield from _feed(config, loader, "train", run.world, run.bad_images)


def val_transform(config: Config, *, skip_normalise: bool = False) -> Transform:
    """Return what turns an image into the network's input, or into uint8, without randomness."""
    data = config.dataset
    return augment.val_transform(
        skip_normalise=skip_normalise,
        img_size=height_width(data.val.img_size or config.model.vit.img_size),
        crop_ratio=data.val.crop_ratio,
        interpolation=data.interpolation,
        mean=data.mean,
        std=data.std,
    )


def val_batches(config: Config, index: ImageIndex, world: World) -> Feed:
    """Return this rank's share of the validation images."""
    transform = val_transform(config, skip_normalise=True)
    images = ValImages(_reader(config, index), transform=transform)
    options = _loader_options(config, world, config.dataset.val.batch_size)
    loader = imagenet_dataset.val_loader(images, options=options)
    return _feed(config, loader, "val", world, set())


def _loader_options(config: Config, world: World, batch_size: int) -> LoaderOptions:
    return LoaderOptions(
        batch_size=batch_size,
        rank=world.rank,
        world=world.size,
        num_workers=config.dataset.num_workers,
        pin_memory=world.device.type == "cuda",
        timeout_s=config.dataset.timeout_s,
        reuses_memory=True,  # Feed normalises each batch into memory of its own
    )


def _reader(config: Config, index: ImageIndex, *, is_scaled: bool = False) -> ImageReader:
    decoder, _ = reading.pick_decoder(config.dataset.decoder)
    return ImageReader(index, decoder=decoder, is_scaled=is_scaled)


def _feed(config: Config, loader: DataLoader, split: Split, world: World, bad: set[int]) -> Feed:
    data = config.dataset
    gather = collectives.all_gather if world.size > 1 else None
    return Feed(
        loader,
        split=split,
        device=world.device,
        normaliser=Normaliser(data.mean, data.std),
        tolerance=Tolerance(
            data.max_bad if data.on_error == "skip" else None, gather=gather, seen=bad
        ),
    )
