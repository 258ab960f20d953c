"""From options to the objects of a run: images, model, shards, optimizer, loaders.

    Config -> ViT on meta -> Megatron-FSDP shards -> optimizer over them -> Run

The last place that sees options; what it calls takes values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import checkpoint
import imagenet_dataset
from images import augment, decoding, path_env, shared_index
from images import index as image_index
from images.augment import Normaliser, Transform
from images.feed import Feed
from images.image_order import Order
from images.image_reader import ImageReader
from images.index import ImageIndex, Split
from images.mixing import Eraser, Mixer
from layers import modules
from options import checks
from options.schema import Config
from parallel import distributed, sharding
from parallel.distributed import World
from parallel.sharding import Shard
from training import losses, network, optim
from vit import Block

# logits, labels or mixed targets, images -> loss
Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Run:
    """All that the loop works with; made once by `prepare`."""

    config: Config
    world: World
    model: nn.Module
    shards: list[Shard]
    optimizer: torch.optim.Optimizer
    ema: optim.Ema | None
    eraser: Eraser | None
    mixer: Mixer | None
    train_index: ImageIndex
    val_index: ImageIndex
    dtype: torch.dtype
    flops_per_image: int
    criterion: Criterion
    teacher_flops: int = 0  # per image
    bad_images: set[int] = dataclasses.field(default_factory=set)  # skipped so far, of train_index

    @property
    def folder(self) -> Path:
        """Where checkpoints and logs live."""
        return Path(self.config.training.checkpoint.path).expanduser()

    @property
    def global_batch(self) -> int:
        """Images per update, over all ranks and microbatches."""
        return (
            self.config.dataset.train.batch_size
            * self.config.training.grad_accum_steps
            * self.world.size
        )

    def lr_at(self, step: int) -> float:
        """Return the learning rate of update `step`, from 0."""
        o = self.config.optimizer
        if o.schedule_per_epoch:
            epoch_steps = max(1, order_of(self).epoch_images // self.global_batch)
            step = optim.step_of_epoch(step, epoch_steps=epoch_steps)
        return optim.lr_at(
            step,
            peak=checks.peak_lr(self.config, self.global_batch),
            final=o.min_lr,
            warmup_steps=o.warmup_steps,
            num_steps=self.config.training.steps,
            warmup_lr=o.warmup_lr,
            is_cosine_after_warmup=o.warmup_prefix,
        )

    def tensors(self) -> checkpoint.TensorTree:
        """Return what a checkpoint holds, on the training memory."""
        tensors: dict[str, checkpoint.TensorTree] = {
            "model": sharding.model_state(self.shards),
            "optimizer": sharding.optimizer_state(self.shards, self.optimizer),
        }
        if self.ema is not None:
            tensors["ema"] = sharding.state_like_model(self.shards, self.ema.average)
        return tensors


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
    distributed.require_equal("dataset", image_index.digest(train_index))
    return train_index, val_index


def pick_ep(config: Config, world: World) -> int:
    """Return the ranks that share out the experts; null is as many as experts and ranks allow."""
    d, num_experts = config.distributed, config.model.moe.num_experts
    if d.ep is not None:
        return d.ep
    ranks = world.size // (d.dp_outer * (d.dp_shard or 1))
    return math.gcd(ranks, num_experts) if num_experts else 1


def build_optimizer(config: Config, shards: list[Shard]) -> torch.optim.Optimizer:
    """Return the optimizer over this rank's shards, ready to drive the sharded model."""
    o = config.optimizer
    groups = optim.parameter_groups(
        ((shard.name, shard.local) for shard in shards),
        weight_decay=o.weight_decay,
        layer_decay=o.layer_decay,
        depth=config.model.vit.depth,
    )
    optimizer = optim.build_optimizer(
        o.name,
        groups,
        betas=(o.betas[0], o.betas[1]),
        eps=o.eps,
        momentum=o.momentum,
        sum_over_ranks=distributed.sum_over_ranks,
    )
    sharding.shard_optimizer(optimizer)
    return optimizer


def build_ema(config: Config, shards: list[Shard]) -> optim.Ema | None:
    """Return the average of this rank's shards, or None if it is off."""
    decay = config.training.ema_decay
    return None if decay is None else optim.Ema([shard.local for shard in shards], decay=decay)


def build_criterion(config: Config) -> Criterion:
    """Return the loss of logits_BY and labels or mixed targets; it does not look at the images."""
    t = config.training
    loss: Callable[..., Tensor] = losses.smoothed_loss
    if t.loss == "bce":
        loss = partial(losses.binary_loss, threshold=t.bce_threshold, is_sum=t.bce_sum)
    smoothed = partial(loss, smoothing=t.label_smoothing)
    return lambda logits_BY, target, _image_BCHW: smoothed(logits_BY, target)


def build_eraser(config: Config, device: torch.device) -> Eraser | None:
    """Return what erases boxes of training images, or None if it is off."""
    train, seed = config.dataset.train, config.training.seed
    if train.reprob == 0:
        return None
    return Eraser(
        prob=train.reprob, mode=train.remode, count=train.recount, device=device, seed=seed
    )


def build_mixer(config: Config) -> Mixer | None:
    """Return what mixes training images, or None if it is off."""
    train = config.dataset.train
    if not (train.mixup or train.cutmix):
        return None
    return Mixer(
        mixup=train.mixup,
        cutmix=train.cutmix,
        prob=train.mixup_prob,
        switch_prob=train.mixup_switch_prob,
        mode=train.mixup_mode,
        smoothing=config.training.label_smoothing,
        num_classes=config.model.vit.num_classes,
        seed=config.training.seed,
    )


def prepare(config: Config, world: World) -> tuple[Run, dict[str, object]]:
    """Build everything from the options; return it and the choices made, for the log."""
    backend, reason = network.pick_backend(config, world.device)
    network.check_compile(config, backend=backend, reason=reason, device=world.device)
    dtype = network.pick_dtype(config.model.dtype, world.device)
    strategy = sharding.strategy_name(config.fsdp.zero_dp_strategy)
    d, ep = config.distributed, pick_ep(config, world)
    meshes = distributed.build_meshes(
        dp_outer=d.dp_outer, dp_shard=d.dp_shard, ep=ep, device=world.device
    )
    # The library cannot shard nothing from the meta device, and there is then nothing to save.
    vit = network.build_model(
        config,
        backend=backend,
        on_meta=strategy != "no_shard",
        exchange=distributed.expert_exchange(meshes) if meshes.ep > 1 else None,
        device=world.device,
        sdpa=config.model.sdpa,
    )
    network.check_fp8(config, vit.options)
    block_choices = network.block_choices(config, vit.options, world.device)
    train_index, val_index = find_images(config, world)
    model = sharding.shard_model(
        vit,
        meshes,
        unit_types=[Block],
        strategy=strategy,
        outer_strategy=config.fsdp.outer_dp_sharding_strategy,
        compute_dtype=dtype,
    )
    network.compile_model(config, vit)
    shards = sharding.list_shards(model, rename=modules.canonical_name)
    run = Run(
        config,
        world,
        model,
        shards,
        optimizer=build_optimizer(config, shards),
        ema=build_ema(config, shards),
        eraser=build_eraser(config, world.device),
        mixer=build_mixer(config),
        train_index=train_index,
        val_index=val_index,
        dtype=dtype,
        flops_per_image=vit.train().flops_per_image(),
        criterion=build_criterion(config),
    )
    choices = {
        "backend": backend,
        "backend_reason": reason,
        **block_choices,
        **network.expert_choices(config, world.device),
        "dtype": str(dtype).removeprefix("torch."),
        "device": distributed.device_name(world.device),
        "mesh": f"dp_outer={meshes.dp_outer} dp_shard={meshes.expert.size(1)} ep={meshes.ep}",
        "zero": strategy,
        "parameters": sum(shard.main.numel() for shard in shards),
        **data_choices(run),
    }
    return run, choices


def data_choices(run: Run) -> dict[str, object]:
    """Return what an update and an epoch are made of, for the log.

    Raises:
        ValueError: The options do not fit the images, or the images of an update.
    """
    return {
        "global_batch": run.global_batch,
        "peak_lr": checks.peak_lr(run.config, run.global_batch),
        "epoch_images": order_of(run).epoch_images,
        "train_images": len(run.train_index.paths),
        "val_images": len(run.val_index.paths),
        "layout": run.train_index.layout,
        "decoder": " ".join(decoding.pick_decoder(run.config.dataset.decoder)),
    }


def order_of(run: Run) -> Order:
    """Return in which order the run sees the training images."""
    train = run.config.dataset.train
    return Order(
        len(run.train_index.paths),
        repeats=train.repeats,
        batch=train.batch_size,
        step_images=run.global_batch,
    )


def train_transform(config: Config) -> Transform:
    """Return what turns an image into uint8 of the network's size, by chance."""
    data, train = config.dataset, config.dataset.train
    return augment.train_transform(
        img_size=network.height_width(config.model.vit.img_size),
        scale=(train.crop_scale[0], train.crop_scale[1]),
        ratio=(train.crop_ratio[0], train.crop_ratio[1]),
        crop=train.crop,
        hflip=train.hflip,
        auto_augment=train.auto_augment,
        color_jitter=train.color_jitter,
        interpolation=train.interpolation or data.interpolation,
        mean=data.mean,
    )


def train_batches(run: Run, *, start_step: int) -> Iterator[imagenet_dataset.Batch]:
    """Yield this rank's microbatches from update `start_step` to the end of the run."""
    data, train = run.config.dataset, run.config.dataset.train
    loader = imagenet_dataset.train_loader(
        _reader(run.config, run.train_index, is_scaled=train.scaled_decode),
        transform=train_transform(run.config),
        timeout_s=data.timeout_s,
        is_reused=True,  # normalising copies
        order=order_of(run),
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
        img_size=network.height_width(data.val.img_size or config.model.vit.img_size),
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
