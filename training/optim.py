"""Parameter groups, learning rate as a function of the step, the optimizers, averaged weights.

The learning rate depends on the step alone, so a resumed run restores no scheduler.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import TypedDict

import torch
from torch import Tensor, nn

from options.schema import OptimizerOptions
from training.lamb import Lamb, SumOverRanks

# Parameters that are positions or tokens, not linear maps; matched by the last part of the name.
NO_DECAY_NAMES = ("cls_token", "reg_token", "pos_embed", "dist_token")
BIAS_NAMES = ("bias", "b_in", "b_out")  # experts' biases are 2-D, one row per expert
STEM_NAMES = ("cls_token", "reg_token", "dist_token", "pos_embed", "patch_embed", "norm_pre")


class ParameterGroup(TypedDict):
    """One optimizer group; `lr` is set before every step, to `lr_scale` of the run's."""

    params: list[nn.Parameter]
    weight_decay: float
    lr: float
    lr_scale: float


def has_decay(name: str, num_dims: int) -> bool:
    """Return whether weight decay applies: not to norms, biases, tokens and position embeddings.

    Source: the rule of timm's `param_groups_weight_decay` with ViT's `no_weight_decay` list.
    """
    last = name.rsplit(".", 1)[-1]
    return num_dims > 1 and last not in (*BIAS_NAMES, *NO_DECAY_NAMES)


def layer_of(name: str, depth: int) -> int:
    """Return the layer of a parameter: 0 the stem, 1..depth the blocks, depth + 1 the head.

    The final norm belongs to the last block, unless it comes after the pool.
    Source: `VisionTransformer.group_matcher` of timm.
    """
    first, _, rest = name.partition(".")
    if first in STEM_NAMES:
        return 0
    if first == "blocks":
        return 1 + int(rest.partition(".")[0])
    return depth if first == "norm" else depth + 1


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]],
    *,
    weight_decay: float,
    layer_decay: float | None = None,
    depth: int = 0,
) -> list[ParameterGroup]:
    """Group trainable parameters by weight decay and by their scale of the learning rate.

    With `layer_decay` each layer of a network of `depth` blocks gets that fraction of the learning
    rate of the layer above it; see `layer_of`. Source: BEiT (arXiv:2106.08254), appendix H.
    """
    groups: dict[tuple[bool, float], ParameterGroup] = {}
    for name, parameter in named:
        if parameter.requires_grad:
            is_decayed = has_decay(name, parameter.ndim)
            below = 0 if layer_decay is None else depth + 1 - layer_of(name, depth)
            scale = 1.0 if layer_decay is None else layer_decay**below
            group = ParameterGroup(
                params=[], weight_decay=weight_decay if is_decayed else 0.0, lr=0.0, lr_scale=scale
            )
            groups.setdefault((not is_decayed, scale), group)["params"].append(parameter)
    return [groups[key] for key in sorted(groups)]


def build_optimizer(
    o: OptimizerOptions, groups: list[ParameterGroup], *, sum_over_ranks: SumOverRanks | None = None
) -> torch.optim.Optimizer:
    """Return the optimizer `o.name` over `groups`, AdamW and SGD in PyTorch's fused form.

    LAMB needs `sum_over_ranks`, since its norms are those of whole tensors.
    """
    settings, betas = [dict(group) for group in groups], (o.betas[0], o.betas[1])
    if o.name == "adamw":
        return torch.optim.AdamW(settings, lr=0.0, betas=betas, eps=o.eps, fused=True)
    if o.name == "sgd":
        return torch.optim.SGD(settings, lr=0.0, momentum=o.momentum, fused=True)
    assert o.name == "lamb", f"{o.name}: options/schema.py has the names"
    assert sum_over_ranks is not None, "norms of a rank's rows would be silently wrong"
    return Lamb(settings, betas=betas, eps=o.eps, sum_over_ranks=sum_over_ranks)


def lr_at(step: int, o: OptimizerOptions, *, peak: float, num_steps: int) -> float:
    """Return the learning rate of update `step` (from 0): linear warm-up, then a cosine.

    Update `warmup_steps` has the `peak`. Update `num_steps` would reach `min_lr`, so the last one
    is one cosine step above it. The warm-up begins at `warmup_lr`; without one the first update
    already has peak / warmup_steps. Unless `warmup_prefix`, the cosine begins at update 0 as if
    there were no warm-up, and is already below the peak when the warm-up ends.
    Source: SGDR (arXiv:1608.03983), equation 5, one period; timm's `CosineLRScheduler`.
    """
    if step < o.warmup_steps:
        if o.warmup_lr is None:
            return peak * (step + 1) / o.warmup_steps
        return o.warmup_lr + (peak - o.warmup_lr) * step / o.warmup_steps
    start = o.warmup_steps if o.warmup_prefix else 0
    progress = (step - start) / max(1, num_steps - start)
    return o.min_lr + (peak - o.min_lr) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def step_of_epoch(step: int, *, epoch_steps: int) -> int:
    """Return the update whose learning rate `step` uses under a schedule by epochs.

    After each epoch the rate is set to that epoch's, counted from 0: epochs 0 and 1 share one.
    Source: the training loop of DeiT, and of Deep Incubation.
    """
    return max(0, step // epoch_steps - 1) * epoch_steps


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group its share of the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group["lr_scale"]


class Ema:
    """Exponential moving average of tensors, in fp32, starting from their values.

    average = decay * average + (1 - decay) * tensor at every `update`. This is elementwise, so each
    rank averages its own shards.
    """

    def __init__(self, tensors: list[Tensor], *, decay: float) -> None:
        self.tensors = [tensor.detach() for tensor in tensors]
        self.average = [tensor.clone() for tensor in self.tensors]
        self.decay = decay

    def update(self) -> None:
        """Add the tensors' present values to the average."""
        torch._foreach_lerp_(self.average, self.tensors, 1 - self.decay)

    def _swap(self) -> None:
        kept = [tensor.clone() for tensor in self.tensors]
        torch._foreach_copy_(self.tensors, self.average)
        torch._foreach_copy_(self.average, kept)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Give the tensors the values of their averages, and their own back at the end."""
        self._swap()
        try:
            yield
        finally:
            self._swap()
