"""What the options must satisfy, alone and together, before anything is built.

Every refusal is a ValueError of one line: `config field=value: what is allowed`. What only the
model can know (image size and patch size, widths and heads) the model checks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from schema import Config, MoEOptions, TrainDataOptions, walk


def _check_value(name: str, value: object, *, metadata: Mapping[str, Any]) -> None:
    """Raise ValueError unless one value is inside the range or the choices of its option."""
    low, high, choices = metadata["low"], metadata["high"], metadata["choices"]
    if choices is not None and (value not in choices or isinstance(value, bool)):
        allowed = ", ".join(
            "null" if c is None else repr(c) if c == "" else str(c) for c in choices
        )
        raise ValueError(f"config {name}={value}: must be one of {allowed}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"config {name}={value}: must be a finite number")
    if isinstance(value, int | float) and not isinstance(value, bool):
        if low is not None and value < low:
            raise ValueError(f"config {name}={value}: must be at least {low}")
        if high is not None and value > high:
            raise ValueError(f"config {name}={value}: must be at most {high}")


def _check_side(name: str, value: object) -> None:
    sides = value if isinstance(value, list) and len(value) == 2 else [value]
    if not all(isinstance(side, int) and not isinstance(side, bool) and side > 0 for side in sides):
        raise ValueError(
            f"config {name}={value}: must be a positive number of pixels or [height, width]"
        )


def _check_lengths(config: Config) -> None:
    lengths = {
        "dataset.train.crop_scale": (config.dataset.train.crop_scale, 2),
        "dataset.train.crop_ratio": (config.dataset.train.crop_ratio, 2),
        "dataset.mean": (config.dataset.mean, config.model.vit.in_chans),
        "dataset.std": (config.dataset.std, config.model.vit.in_chans),
        "optimizer.betas": (config.optimizer.betas, 2),
    }
    for name, (values, length) in lengths.items():
        if len(values) != length:
            raise ValueError(f"config {name}={values}: must have {length} values")
    for name in ("dataset.train.crop_scale", "dataset.train.crop_ratio"):
        if lengths[name][0][0] > lengths[name][0][1]:
            raise ValueError(f"config {name}={lengths[name][0]}: must be [lowest, highest]")


def _refuse_changed(values: object, names: tuple[str, ...], *, prefix: str, why: str) -> None:
    """Raise ValueError if one of the options differs from its default, since it does nothing."""
    default = type(values)()
    for name in names:
        value = getattr(values, name)
        if value != getattr(default, name):
            raise ValueError(f"config {prefix}.{name}={value}: has no effect with {why}")


def _check_unused(config: Config) -> None:
    """Refuse options of things that are not in use."""
    optimizer, wandb = config.optimizer, config.training.wandb
    unused = {"adamw": ("momentum",), "sgd": ("betas", "eps")}[optimizer.name]
    why = f"optimizer.name={optimizer.name}"
    _refuse_changed(optimizer, unused, prefix="optimizer", why=why)
    if wandb.project is None:
        why = "training.wandb.project=null"
        _refuse_changed(wandb, ("mode",), prefix="training.wandb", why=why)


def _check_val_size(config: Config) -> None:
    """A validation size of its own and a model that takes any size need each other."""
    vit, size = config.model.vit, config.dataset.val.img_size
    if size is None:
        names = ("dynamic_img_size", "dynamic_img_pad")
        _refuse_changed(vit, names, prefix="model.vit", why="dataset.val.img_size=null")
        return
    _check_side("dataset.val.img_size", size)
    if not vit.dynamic_img_size:
        raise ValueError(
            f"config dataset.val.img_size={size}: needs model.vit.dynamic_img_size=true"
        )


def _check_no_effect(config: Config) -> None:
    """Refuse settings that would do nothing in this combination."""
    model, optimizer, fsdp = config.model, config.optimizer, config.fsdp
    if model.vit.global_pool == "":
        raise ValueError('config model.vit.global_pool="": has no class per image to train on')
    if model.te_fp8 is not None and model.backend == "torch":
        raise ValueError(
            f"config model.te_fp8={model.te_fp8}: has no effect with model.backend=torch (use te)"
        )
    if fsdp.outer_dp_sharding_strategy == "optim" and (
        config.distributed.dp_outer == 1 or fsdp.zero_dp_strategy not in (3, "optim_grads_params")
    ):
        raise ValueError(
            "config fsdp.outer_dp_sharding_strategy=optim: needs distributed.dp_outer > 1 and "
            f"fsdp.zero_dp_strategy=3 (are {config.distributed.dp_outer} and "
            f"{fsdp.zero_dp_strategy})"
        )
    if optimizer.min_lr > optimizer.lr:
        raise ValueError(
            f"config optimizer.min_lr={optimizer.min_lr}: must be at most lr={optimizer.lr}"
        )
    if optimizer.warmup_steps > config.training.steps:
        raise ValueError(
            f"config optimizer.warmup_steps={optimizer.warmup_steps}: must be at most "
            f"training.steps={config.training.steps}"
        )


def _check_mixing(config: Config) -> None:
    train = config.dataset.train
    given = {
        name: getattr(train, name) for name in ("mixup_prob", "mixup_switch_prob", "mixup_mode")
    }
    without_effect = []
    if not (train.mixup or train.cutmix):
        without_effect = [*given]
    elif not (train.mixup and train.cutmix):
        without_effect = ["mixup_switch_prob"]
    for name in without_effect:
        if given[name] != getattr(TrainDataOptions(), name):
            raise ValueError(
                f"config dataset.train.{name}={given[name]}: has no effect with "
                f"mixup={train.mixup} and cutmix={train.cutmix}"
            )
    if (train.mixup or train.cutmix) and train.batch_size % 2:
        raise ValueError(
            f"config dataset.train.batch_size={train.batch_size}: must be even, mixup and cutmix "
            "mix pairs"
        )


def _check_moe(config: Config) -> None:
    moe, ep = config.model.moe, config.distributed.ep
    if moe.num_experts == 0:
        for name, _, value in walk(moe):
            if value != getattr(MoEOptions(), name):
                raise ValueError(
                    f"config model.moe.{name}={value}: has no effect with num_experts=0"
                )
        if ep not in (1, None):
            raise ValueError(f"config distributed.ep={ep}: must be 1 with model.moe.num_experts=0")
        return
    if ep is not None and moe.num_experts % ep:
        raise ValueError(
            f"config distributed.ep={ep}: must divide model.moe.num_experts={moe.num_experts}"
        )
    given = {name: getattr(moe, name) for name in ("every_n", "last_n", "blocks")}
    used = [name for name, value in given.items() if value is not None]
    if len(used) != 1:
        raise ValueError(
            f"config model.moe: exactly one of every_n, last_n, blocks must be set, not {used}"
        )


def validate(config: Config) -> Config:
    """Return `config` if every option is in range and has an effect, else raise ValueError.

    What only the model can know (image size and patch size, widths and heads) the model checks.
    """
    for name, field, value in walk(config):
        for item in value if isinstance(value, list) else [value]:
            _check_value(name, item, metadata=field.metadata)
    _check_side("model.vit.img_size", config.model.vit.img_size)
    _check_side("model.vit.patch_size", config.model.vit.patch_size)
    _check_lengths(config)
    _check_no_effect(config)
    _check_unused(config)
    _check_val_size(config)
    _check_mixing(config)
    _check_moe(config)
    return config
