"""From options to the objects of a run: images, model, shards, optimizer, loaders.

    Config -> ViT on meta -> Megatron-FSDP shards -> optimizer over them -> Run

The last place that sees options; what it calls takes values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

import checkpoint
import distributed
import image_index
import imagenet_dataset
import layers
import models
import optim
import sharding
from distributed import World
from image_index import ImageIndex
from imagenet_dataset import Batch
from mixing import Mixer
from schema import Config
from sharding import Shard
from vit import Block


@dataclasses.dataclass(frozen=True)
class Run:
    """All that the loop works with; made once by `prepare`."""

    config: Config
    world: World
    model: nn.Module
    shards: list[Shard]
    optimizer: torch.optim.Optimizer
    ema: optim.Ema | None
    mixer: Mixer | None
    train_index: ImageIndex
    val_index: ImageIndex
    dtype: torch.dtype
    flops_per_image: int

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

    def tensors(self) -> checkpoint.TensorTree:
        """Return what a checkpoint holds, on the training memory."""
        tensors: dict[str, checkpoint.TensorTree] = {
            "model": sharding.model_state(self.shards),
            "optimizer": sharding.optimizer_state(self.shards, self.optimizer),
        }
        if self.ema is not None:
            tensors["ema"] = sharding.state_like_model(self.shards, self.ema.average)
        return tensors


def unpack_once(root: Path, world: World) -> None:
    """Unpack a bundled archive on first use, once per node; the other ranks wait. Collective.

    Raises:
        ValueError: On every rank, if the archive cannot be unpacked on any node.
    """
    problem: str | None = None
    if world.local_rank == 0:
        try:
            image_index.unpack_archive(root)
        except (ValueError, OSError) as error:
            problem = str(error)
    problems: list[str | None] = [None] * world.size
    dist.all_gather_object(problems, problem)
    found = next((item for item in problems if item is not None), None)
    if found is not None:
        raise ValueError(found)


def find_images(config: Config, world: World) -> tuple[ImageIndex, ImageIndex]:
    """Index the training and validation images; unpack a bundled archive on first use."""
    train_root = Path(config.dataset.train.root).expanduser()
    val_root = Path(config.dataset.val.root or train_root).expanduser()
    for root in (train_root, val_root):
        unpack_once(root, world)
    train_index = image_index.index_images(train_root, "train")
    val_index = image_index.index_images(val_root, "val")
    image_index.check_same_classes(train_index, val_index)
    if len(train_index.classes) != config.model.vit.num_classes:
        raise ValueError(
            f"config model.vit.num_classes={config.model.vit.num_classes}: must be "
            f"{len(train_index.classes)}, the classes in {train_index.root}"
        )
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
        ((shard.name, shard.local) for shard in shards), weight_decay=o.weight_decay
    )
    optimizer = optim.build_optimizer(
        o.name, groups, betas=(o.betas[0], o.betas[1]), eps=o.eps, momentum=o.momentum
    )
    sharding.shard_optimizer(optimizer)
    return optimizer


def build_ema(config: Config, shards: list[Shard]) -> optim.Ema | None:
    """Return the average of this rank's shards, or None if it is off."""
    decay = config.training.ema_decay
    return None if decay is None else optim.Ema([shard.local for shard in shards], decay=decay)


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
    backend, reason = models.pick_backend(config, world.device)
    dtype = models.pick_dtype(config.model.dtype, world.device)
    strategy = sharding.strategy_name(config.fsdp.zero_dp_strategy)
    meshes = distributed.build_meshes(
        dp_outer=config.distributed.dp_outer,
        dp_shard=config.distributed.dp_shard,
        ep=pick_ep(config, world),
        device=world.device,
    )
    # The library cannot shard nothing from the meta device, and there is then nothing to save.
    vit = models.build_model(
        config,
        backend=backend,
        on_meta=strategy != "no_shard",
        exchange=distributed.expert_exchange(meshes) if meshes.ep > 1 else None,
        device=world.device,
    )
    models.check_fp8(config, vit.options)
    train_index, val_index = find_images(config, world)
    model = sharding.shard_model(
        vit,
        meshes,
        unit_types=[Block],
        strategy=strategy,
        outer_strategy=config.fsdp.outer_dp_sharding_strategy,
        compute_dtype=dtype,
    )
    shards = sharding.list_shards(model, rename=layers.canonical_name)
    run = Run(
        config,
        world,
        model,
        shards,
        optimizer=build_optimizer(config, shards),
        ema=build_ema(config, shards),
        mixer=build_mixer(config),
        train_index=train_index,
        val_index=val_index,
        dtype=dtype,
        flops_per_image=vit.train().flops_per_image(),
    )
    choices = {
        "backend": backend,
        "backend_reason": reason,
        **models.expert_choices(config, world.device),
        "dtype": str(dtype).removeprefix("torch."),
        "device": distributed.device_name(world.device),
        "mesh": f"dp_outer={meshes.dp_outer} dp_shard={meshes.expert.size(1)} ep={meshes.ep}",
        "zero": strategy,
        "parameters": sum(shard.main.numel() for shard in shards),
        "global_batch": run.global_batch,
        "train_images": len(train_index.paths),
        "val_images": len(val_index.paths),
        "layout": train_index.layout,
    }
    return run, choices


def train_batches(run: Run, *, start_step: int) -> Iterator[Batch]:
    """Yield this rank's microbatches from update `start_step` to the end of the run."""
    data, train = run.config.dataset, run.config.dataset.train
    transform = imagenet_dataset.train_transform(
        img_size=models.height_width(run.config.model.vit.img_size),
        scale=(train.crop_scale[0], train.crop_scale[1]),
        ratio=(train.crop_ratio[0], train.crop_ratio[1]),
        hflip=train.hflip,
        color_jitter=train.color_jitter,
        interpolation=data.interpolation,
        mean=(data.mean[0], data.mean[1], data.mean[2]),
        std=(data.std[0], data.std[1], data.std[2]),
    )
    loader = imagenet_dataset.train_loader(
        run.train_index,
        transform=transform,
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
    yield from loader


def val_batches(run: Run) -> DataLoader:
    """Return the loader of this rank's share of the validation images."""
    data = run.config.dataset
    return imagenet_dataset.val_loader(
        run.val_index,
        transform=imagenet_dataset.val_transform(
            img_size=models.height_width(data.val.img_size or run.config.model.vit.img_size),
            crop_ratio=data.val.crop_ratio,
            interpolation=data.interpolation,
            mean=(data.mean[0], data.mean[1], data.mean[2]),
            std=(data.std[0], data.std[1], data.std[2]),
        ),
        batch_size=data.val.batch_size,
        rank=run.world.rank,
        world=run.world.size,
        num_workers=data.num_workers,
        pin_memory=run.world.device.type == "cuda",
    )
