"""The Run: everything that the training loop works with; training/prepare.py makes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

import checkpoint
from imagenet_dataset import Order
from images.index import ImageIndex
from images.mixing import Eraser, Mixer
from options import checks
from options.schema import Config
from parallel import sharding
from parallel.distributed import World, expand_home
from parallel.sharding import Shard
from training import optim

# logits, labels or mixed targets, images -> loss
Criterion = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that the training loop works with; `prepare` makes it once."""

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
    bad_images: set[int] = dataclasses.field(default_factory=set)  # in train_index, skipped so far

    @property
    def folder(self) -> Path:
        """Folder of the checkpoints and logs."""
        return expand_home(self.config.training.checkpoint.path)

    @property
    def global_batch(self) -> int:
        """Images per update, over all ranks and microbatches."""
        batch_size = self.config.dataset.train.batch_size
        return batch_size * self.config.training.grad_accum_steps * self.world.size

    @property
    def order(self) -> Order:
        """Order in which the run sees the training images."""
        train = self.config.dataset.train
        return Order(
            len(self.train_index.paths),
            repeats=train.repeats,
            batch=train.batch_size,
            step_images=self.global_batch,
        )

    def lr_at(self, step: int) -> float:
        """Return the learning rate of update `step` (from 0)."""
        o = self.config.optimizer
        if o.schedule_per_epoch:
            epoch_steps = max(1, self.order.epoch_images // self.global_batch)
            step = optim.step_of_epoch(step, epoch_steps=epoch_steps)
        peak = checks.peak_lr(self.config, self.global_batch)
        return optim.lr_at(step, o, peak=peak, num_steps=self.config.training.steps)

    def tensors(self) -> checkpoint.TensorTree:
        """Return the tensors of a checkpoint; they share the memory that training writes."""
        tensors: dict[str, checkpoint.TensorTree] = {
            "model": sharding.model_state(self.shards),
            "optimizer": sharding.optimizer_state(self.shards, self.optimizer),
        }
        if self.ema is not None:
            tensors["ema"] = sharding.state_like_model(self.shards, self.ema.average)
        return tensors
