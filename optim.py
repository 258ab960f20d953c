"""Parameter groups, learning rate as a function of the step, the optimizers, averaged weights.

The learning rate of a step depends on the step alone, so a resumed run needs no scheduler.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from typing import TypedDict

import torch
from torch import Tensor, nn

# Parameters that are positions or tokens, not linear maps; matched by the last part of the name.
NO_DECAY_NAMES = ("cls_token", "reg_token", "pos_embed", "dist_token")
BIAS_NAMES = ("bias", "b_in", "b_out")  # experts' biases are 2-D, one row per expert
OPTIMIZERS = ("adamw", "sgd")


class ParameterGroup(TypedDict):
    """One optimizer group; `lr` is set before every step."""

    params: list[nn.Parameter]
    weight_decay: float
    lr: float


def has_decay(name: str, num_dims: int) -> bool:
    """Return whether weight decay applies: not to norms, biases, tokens and position embeddings.

    Source: the rule of timm's `param_groups_weight_decay` with ViT's `no_weight_decay` list.
    """
    last = name.rsplit(".", 1)[-1]
    return num_dims > 1 and last not in (*BIAS_NAMES, *NO_DECAY_NAMES)


def parameter_groups(
    named: Iterable[tuple[str, nn.Parameter]], *, weight_decay: float
) -> list[ParameterGroup]:
    """Split trainable parameters into a group with and one without weight decay."""
    decayed: list[nn.Parameter] = []
    others: list[nn.Parameter] = []
    for name, parameter in named:
        if parameter.requires_grad:
            (decayed if has_decay(name, parameter.ndim) else others).append(parameter)
    with_decay = ParameterGroup(params=decayed, weight_decay=weight_decay, lr=0.0)
    without = ParameterGroup(params=others, weight_decay=0.0, lr=0.0)
    return [group for group in (with_decay, without) if group["params"]]


def build_optimizer(
    name: str,
    groups: list[ParameterGroup],
    *,
    betas: tuple[float, float],
    eps: float,
    momentum: float,
) -> torch.optim.Optimizer:
    """Return the optimizer `name` over `groups`, in PyTorch's fused form.

    Raises:
        ValueError: `name` is not one of OPTIMIZERS.
    """
    settings = [dict(group) for group in groups]
    if name == "adamw":
        return torch.optim.AdamW(settings, lr=0.0, betas=betas, eps=eps, fused=True)
    if name == "sgd":
        return torch.optim.SGD(settings, lr=0.0, momentum=momentum, fused=True)
    raise ValueError(f"config optimizer.name={name}: must be one of {', '.join(OPTIMIZERS)}")


def lr_at(step: int, *, peak: float, final: float, warmup_steps: int, num_steps: int) -> float:
    """Return the learning rate of update `step` (from 0): linear warm-up, then a cosine.

    The first update already learns (peak / warmup_steps), update `warmup_steps` has the peak, and
    the last one is one cosine step above `final`, which update `num_steps` would reach.
    Source: SGDR (arXiv:1608.03983), equation 5, one period.
    """
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, num_steps - warmup_steps)
    return final + (peak - final) * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr


class Ema:
    """Exponential moving average of tensors, fp32, beginning at their values.

    average = decay * average + (1 - decay) * tensor at every `update`. Elementwise, so shards are
    averaged where they are.
    """

    def __init__(self, tensors: list[Tensor], *, decay: float) -> None:
        self.tensors = [tensor.detach() for tensor in tensors]
        self.average = [tensor.clone() for tensor in self.tensors]
        self.decay = decay

    def update(self) -> None:
        """Take the tensors' present values into the average."""
        torch._foreach_lerp_(self.average, self.tensors, 1 - self.decay)

    def _swap(self) -> None:
        kept = [tensor.clone() for tensor in self.tensors]
        torch._foreach_copy_(self.tensors, self.average)
        torch._foreach_copy_(self.average, kept)

    @contextlib.contextmanager
    def swapped(self) -> Iterator[None]:
        """Give the tensors their averages' values, and their own back at the end."""
        self._swap()
        try:
            yield
        finally:
            self._swap()
