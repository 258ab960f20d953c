"""From options to the objects of a run: images, model, shards, optimizer, loaders.

    Config -> ViT on meta -> Megatron-FSDP shards -> optimizer over them -> Run

The last place that sees options; what it calls takes values.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.utils.data import DataLoader

import checkpoint
import distributed
import image_index
import imagenet_dataset
import kernels
import layers
import moe
import optim
import sharding
from balance import Coefficients
from distributed import World
from image_index import ImageIndex
from imagenet_dataset import Batch
from routers import Router
from schema import Config
from sharding import Shard
from vit import Block, VisionTransformer
from vit_options import VitOptions

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclasses.dataclass(frozen=True)
class Run:
    """All that the loop works with; made once by `prepare`."""

    config: Config
    world: World
    model: nn.Module
    shards: list[Shard]
    optimizer: torch.optim.Optimizer
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
        return {
            "model": sharding.model_state(self.shards),
            "optimizer": sharding.optimizer_state(self.shards, self.optimizer),
        }


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the compute dtype; auto is bf16 on CUDA and fp32 on CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def moe_factory(
    config: Config, exchange: moe.Exchange | None, device: torch.device
) -> Callable[[int], nn.Module | None]:
    """Return the function from a block's number to its mixture of experts, None for a dense one."""
    o, vit = config.model.moe, config.model.vit
    blocks = moe.expert_blocks(depth=vit.depth, every_n=o.every_n, last_n=o.last_n, blocks=o.blocks)
    backend, _ = kernels.resolve_kernels(o.kernels, device)
    coefs = Coefficients(
        importance=o.importance_coef,
        load=o.load_coef,
        switch=o.switch_coef,
        sequence=o.sequence_coef,
        z=o.z_coef,
    )

    def build(block: int) -> nn.Module | None:
        if block not in blocks:
            return None
        router = Router(
            vit.embed_dim,
            o.num_experts,
            top_k=o.top_k,
            kind=o.router,
            normalize=o.normalize,
            noise_std=o.noise_std,
            jitter=o.jitter,
            capacity_factor=o.capacity_factor,
            forced_balance=o.forced_balance,
            coefs=coefs,
        )
        width = int(vit.embed_dim * o.shared_ratio)
        return moe.MoE(
            vit.embed_dim,
            int(vit.embed_dim * o.mlp_ratio),
            router=router,
            activation=o.activation,
            shared=layers.Mlp(vit.embed_dim, width) if width else None,
            kernel_backend=backend,
            exchange=exchange,
            sum_over_ranks=distributed.sum_over_ranks,
        )

    return build


def build_model(
    config: Config,
    *,
    backend: str,
    on_meta: bool,
    exchange: moe.Exchange | None = None,
    device: torch.device | None = None,
) -> VisionTransformer:
    """Build the ViT, on the meta device or the CPU; its values depend on seed and names alone.

    `exchange` is how experts are shared out among ranks, None for all of them here; `device` is
    where the model will compute, which decides the expert kernels.
    """
    options = dataclasses.asdict(config.model.vit)
    for name in ("img_size", "patch_size"):
        if isinstance(options[name], list):
            options[name] = height_width(options[name])
    ffn = None
    if config.model.moe.num_experts:
        ffn = moe_factory(config, exchange, device or torch.device("cpu"))
    with torch.device("meta") if on_meta else contextlib.nullcontext():
        return VisionTransformer(**options, backend=backend, ffn=ffn, seed=config.training.seed)


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


def pick_backend(config: Config, world: World) -> tuple[str, str]:
    """Return the backend and why it is this one; fp8 needs TransformerEngine."""
    backend, reason = layers.resolve_backend(config.model.backend, world.device)
    if config.model.te_fp8 is not None and backend != "te":
        raise ValueError(
            f"config model.te_fp8={config.model.te_fp8}: needs backend te, not {backend} ({reason})"
        )
    return backend, reason


def check_fp8(config: Config, options: VitOptions) -> None:
    """Refuse sizes that fp8, if it was asked for, cannot work with."""
    if config.model.te_fp8 is not None:
        layers.check_fp8_shapes(
            embed_dim=options.embed_dim,
            hidden_dim=options.hidden_dim,
            batch_size=config.dataset.train.batch_size,
            num_tokens=options.num_tokens_in_training,
        )


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


def prepare(config: Config, world: World) -> tuple[Run, dict[str, object]]:
    """Build everything from the options; return it and the choices made, for the log."""
    backend, reason = pick_backend(config, world)
    dtype = pick_dtype(config.model.dtype, world.device)
    strategy = sharding.strategy_name(config.fsdp.zero_dp_strategy)
    meshes = distributed.build_meshes(
        dp_outer=config.distributed.dp_outer,
        dp_shard=config.distributed.dp_shard,
        ep=config.distributed.ep,
        device=world.device,
    )
    # The library cannot shard nothing from the meta device, and there is then nothing to save.
    vit = build_model(
        config,
        backend=backend,
        on_meta=strategy != "no_shard",
        exchange=distributed.expert_exchange(meshes) if meshes.ep > 1 else None,
        device=world.device,
    )
    check_fp8(config, vit.options)
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
        train_index=train_index,
        val_index=val_index,
        dtype=dtype,
        flops_per_image=vit.train().flops_per_image(),
    )
    choices = {
        "backend": backend,
        "backend_reason": reason,
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


def height_width(size: int | list[int]) -> tuple[int, int]:
    """Return an option of one side or [height, width] as (height, width) in pixels."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def train_batches(run: Run, *, start_step: int) -> Iterator[Batch]:
    """Yield this rank's microbatches from update `start_step` to the end of the run."""
    data, train = run.config.dataset, run.config.dataset.train
    transform = imagenet_dataset.train_transform(
        img_size=height_width(run.config.model.vit.img_size),
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
            img_size=height_width(data.val.img_size or run.config.model.vit.img_size),
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
