"""From options to the objects of a run: images, model, shards, optimizer, loss.

    Config -> ViT on meta -> Megatron-FSDP shards -> optimizer over them -> Run

The files of training/ take a Config or a Run. Those below take values, or the options of their own
subject: vit.py ViTOptions, moe.py and routers/ MoEOptions.
"""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import torch

from images import reading
from images.mixing import Eraser, Mixer
from layers import compile as block_compile
from layers import te
from options import checks
from options.schema import Config
from parallel import collectives, distributed, sharding
from parallel.distributed import World
from parallel.sharding import Shard
from training import losses, network, optim
from training.loaders import find_images
from training.run import Criterion, Run
from vit import Block


def pick_ep(config: Config, world: World) -> int:
    """Return how many ranks share a layer's experts; null: the gcd of the experts and the ranks."""
    d, num_experts = config.distributed, config.model.moe.num_experts
    if d.ep is not None:
        return d.ep
    ranks = world.size // (d.dp_outer * (d.dp_shard or 1))
    return math.gcd(ranks, num_experts) if num_experts else 1


def build_optimizer(config: Config, shards: list[Shard]) -> torch.optim.Optimizer:
    """Return the optimizer over this rank's shards, wired to the sharded model."""
    o = config.optimizer
    groups = optim.parameter_groups(
        ((shard.name, shard.local) for shard in shards),
        weight_decay=o.weight_decay,
        layer_decay=o.layer_decay,
        depth=config.model.vit.depth,
    )
    optimizer = optim.build_optimizer(o, groups, sum_over_ranks=collectives.sum_over_ranks)
    sharding.shard_optimizer(optimizer)
    return optimizer


def build_criterion(config: Config) -> Criterion:
    """Return the loss of logits_BY and labels or mixed targets; it ignores the images."""
    t, smooth = config.training, config.training.label_smoothing
    loss = partial(losses.smoothed_loss, smoothing=smooth)
    if t.loss == "bce":
        loss = partial(
            losses.binary_loss, smoothing=smooth, threshold=t.bce_threshold, is_sum=t.bce_sum
        )
    return lambda logits_BY, target, _image_BCHW: loss(logits_BY, target)


def build_eraser(config: Config, device: torch.device) -> Eraser | None:
    """Return the random erasing of training images, or None if it is off."""
    train, seed = config.dataset.train, config.training.seed
    return Eraser(train, device=device, seed=seed) if train.reprob else None


def build_ema(config: Config, shards: list[Shard]) -> optim.Ema | None:
    """Return the average of the weights, or None if it is off."""
    decay = config.training.ema_decay
    return None if decay is None else optim.Ema([s.local for s in shards], decay=decay)


def build_mixer(config: Config) -> Mixer | None:
    """Return mixup and CutMix of training images, or None if both are off."""
    train, t, num_classes = config.dataset.train, config.training, config.model.vit.known_classes
    if not (train.mixup or train.cutmix):
        return None
    return Mixer(train, smoothing=t.label_smoothing, num_classes=num_classes, seed=t.seed)


def with_classes(config: Config, num_classes: int) -> Config:
    """Return `config` with model.vit.num_classes=null filled in.

    Raises:
        ValueError: Other options do not go with that number.
    """
    if config.model.vit.num_classes is not None:
        return config
    vit = dataclasses.replace(config.model.vit, num_classes=num_classes)
    model = dataclasses.replace(config.model, vit=vit)
    return checks.validate(dataclasses.replace(config, model=model))


def prepare(config: Config, world: World) -> tuple[Run, dict[str, object]]:
    """Build the run from the options; return it and the choices made, for the log."""
    backend, reason = network.pick_backend(config, world.device)
    network.check_compile(config, backend=backend, reason=reason, device=world.device)
    dtype = network.pick_dtype(config.model.dtype, world.device)
    strategy = sharding.strategy_name(config.fsdp.zero_dp_strategy)
    d, ep = config.distributed, pick_ep(config, world)
    meshes = distributed.build_meshes(
        dp_outer=d.dp_outer, dp_shard=d.dp_shard, ep=ep, device=world.device
    )
    block_choices = network.block_choices(config, backend, world.device)
    train_index, val_index = find_images(config, world)
    config = with_classes(config, len(train_index.classes))
    # On meta no rank holds an unsharded model; with "no_shard" the library cannot leave meta.
    vit = network.build_model(
        config,
        backend=backend,
        on_meta=strategy != "no_shard",
        exchange=collectives.expert_exchange(meshes) if meshes.ep > 1 else None,
        device=world.device,
        sdpa=config.model.sdpa,
    )
    model = sharding.shard_model(
        vit,
        meshes,
        unit_types=[Block],
        strategy=strategy,
        outer_strategy=config.fsdp.outer_dp_sharding_strategy,
        compute_dtype=dtype,
    )
    if config.model.compile:  # after sharding, whose hooks must stay outside of the graphs
        block_compile.compile_blocks(vit.blocks)
    shards = sharding.list_shards(model, rename=te.canonical_name)
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
        flops_per_image=network.flops_per_image(config),
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
    """Return the sizes of an update and an epoch, and how images are read, for the log."""
    return {
        "global_batch": run.global_batch,
        "peak_lr": checks.peak_lr(run.config, run.global_batch),
        "epoch_images": run.order.epoch_images,
        "train_images": len(run.train_index.paths),
        "val_images": len(run.val_index.paths),
        "layout": run.train_index.layout,
        "decoder": " ".join(reading.pick_decoder(run.config.dataset.decoder)),
    }
