"""What the options must satisfy, alone and together, before anything is built.

Every refusal is a ValueError of one line: `config field=value: what is allowed`. What only the
model can know (image size and patch size, widths and heads) the model checks.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

from options.model_options import MoEOptions
from options.schema import Config, TrainDataOptions, walk

# The policies that timm reads; it leaves out what it does not understand without a word.
_RAND = r"rand(-(m|n|inc|mmax)\d+|-(mstd|p)\d+(\.\d+)?|-t(weights|3a|3aw))*"
_AUGMIX = r"augmix(-(m|w|d|b)\d+|-(mstd|a)\d+(\.\d+)?)*"
_POLICY = r"(original|originalr|v0|v0r|3a)(-mstd\d+(\.\d+)?)?"
AUTO_AUGMENT = re.compile(f"{_RAND}|{_AUGMIX}|{_POLICY}|3aug")


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
    unused = {"adamw": ("momentum",), "sgd": ("betas", "eps"), "lamb": ("momentum",)}[
        optimizer.name
    ]
    why = f"optimizer.name={optimizer.name}"
    _refuse_changed(optimizer, unused, prefix="optimizer", why=why)
    if wandb.project is None:
        why = "training.wandb.project=null"
        _refuse_changed(wandb, ("mode",), prefix="training.wandb", why=why)


def _check_dataset(config: Config) -> None:
    """Refuse ways to find and read images that lack something or do nothing."""
    data = config.dataset
    if data.path_env is None:
        _refuse_changed(data, ("name",), prefix="dataset", why="dataset.path_env=null")
    elif data.name is None:
        raise ValueError(f"config dataset.name=null: must be a name in {data.path_env}")
    if data.on_error == "stop":
        _refuse_changed(data, ("max_bad",), prefix="dataset", why="dataset.on_error=stop")
    if data.num_workers == 0:
        _refuse_changed(data, ("timeout_s",), prefix="dataset", why="dataset.num_workers=0")


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
    if optimizer.warmup_steps > config.training.steps:
        raise ValueError(
            f"config optimizer.warmup_steps={optimizer.warmup_steps}: must be at most "
            f"training.steps={config.training.steps}"
        )


def peak_lr(config: Config, global_batch: int) -> float:
    """Return the peak learning rate of a run with `global_batch` images per update.

    Raises:
        ValueError: Another learning rate is above it.
    """
    o = config.optimizer
    peak = o.lr if o.base_batch is None else o.lr * global_batch / o.base_batch
    scaled = "" if o.base_batch is None else f" x {global_batch} images / base_batch={o.base_batch}"
    for name in ("min_lr", "warmup_lr"):
        value = getattr(o, name)
        if value is not None and value > peak:
            raise ValueError(f"config optimizer.{name}={value}: must be at most lr={o.lr}{scaled}")
    return peak


def _check_schedule(config: Config) -> None:
    o = config.optimizer
    if o.base_batch is None:
        peak_lr(config, 1)
    if o.warmup_steps == 0:
        names = ("warmup_lr", "warmup_prefix")
        _refuse_changed(o, names, prefix="optimizer", why="optimizer.warmup_steps=0")
    if o.layer_decay == 1:
        raise ValueError("config optimizer.layer_decay=1.0: has no effect (null is the same)")


def _check_augmentation(config: Config) -> None:
    train = config.dataset.train
    policy = train.auto_augment
    if policy is not None and not AUTO_AUGMENT.fullmatch(policy):
        raise ValueError(
            f"config dataset.train.auto_augment={policy}: must be as rand-m9-n2-mstd0.5-inc1, "
            "augmix-m3-w3, original-mstd0.5, v0 or 3aug, in timm's notation"
        )
    if policy is not None and "3a" not in policy and train.color_jitter:
        raise ValueError(
            f"config dataset.train.color_jitter={train.color_jitter}: has no effect with "
            f"auto_augment={policy}, in timm"
        )
    turns = policy is not None and "3a" not in policy
    if turns and (train.interpolation or config.dataset.interpolation) == "lanczos":
        name = "dataset.train.interpolation" if train.interpolation else "dataset.interpolation"
        raise ValueError(
            f"config {name}=lanczos: Pillow cannot rotate with it, as "
            f"dataset.train.auto_augment={policy} may (use bicubic)"
        )
    if train.crop_scale[1] == 0:
        raise ValueError(f"config dataset.train.crop_scale={train.crop_scale}: must not end at 0")
    if train.scaled_decode and (train.crop == "src" or train.interpolation == "random"):
        why = "crop=src" if train.crop == "src" else "interpolation=random"
        raise ValueError(f"config dataset.train.scaled_decode=True: has no effect with {why}")
    if train.reprob == 0:
        why = "reprob=0"
        _refuse_changed(train, ("remode", "recount"), prefix="dataset.train", why=why)
    if train.crop == "src":
        names = ("crop_scale", "crop_ratio")
        _refuse_changed(train, names, prefix="dataset.train", why="crop=src")
        if train.interpolation == "random":
            raise ValueError("config dataset.train.interpolation=random: needs crop=rrc")


def _check_loss(config: Config) -> None:
    t, num_classes = config.training, config.model.vit.num_classes
    if t.loss == "ce":
        names = ("bce_threshold", "bce_sum")
        _refuse_changed(t, names, prefix="training", why="training.loss=ce")
    if t.bce_threshold is not None and t.label_smoothing / num_classes > t.bce_threshold:
        raise ValueError(
            f"config training.label_smoothing={t.label_smoothing}: makes a target of every class, "
            f"{t.label_smoothing} / {num_classes} being above bce_threshold={t.bce_threshold}"
        )


def _check_distillation(config: Config) -> None:
    """A teacher and a student with a second head need each other."""
    d = config.distillation
    if d.kind == "none":
        names = ("teacher", "teacher_checkpoint", "alpha", "tau")
        _refuse_changed(d, names, prefix="distillation", why="distillation.kind=none")
        return
    if d.teacher is None:
        raise ValueError(f"config distillation.kind={d.kind}: needs distillation.teacher")
    if not config.model.vit.distilled:
        raise ValueError(f"config distillation.kind={d.kind}: needs model.vit.distilled=true")
    if d.alpha == 0:
        raise ValueError(
            "config distillation.alpha=0.0: has no effect (use distillation.kind=none)"
        )
    if d.kind == "hard":
        _refuse_changed(d, ("tau",), prefix="distillation", why="distillation.kind=hard")


def _resolve_update_freq(config: Config) -> Config:
    """Return the options with training.update_freq said as grad_accum_steps."""
    t = config.training
    if t.update_freq is None:
        return config
    if t.grad_accum_steps not in (1, t.update_freq):
        raise ValueError(
            f"config training.update_freq={t.update_freq}: is another name of grad_accum_steps="
            f"{t.grad_accum_steps} and must not differ"
        )
    training = dataclasses.replace(t, grad_accum_steps=t.update_freq, update_freq=None)
    return dataclasses.replace(config, training=training)


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
    if (train.mixup or train.cutmix) and not train.mixup_prob:
        raise ValueError("config dataset.train.mixup_prob=0: nothing is mixed (or set both to 0)")
    if train.mixup and train.cutmix and train.mixup_switch_prob in (0, 1):
        never = "cutmix" if train.mixup_switch_prob == 0 else "mixup"
        raise ValueError(
            f"config dataset.train.mixup_switch_prob={train.mixup_switch_prob}: {never} is never "
            f"drawn (set {never}=0 instead)"
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


def _check_init(config: Config) -> None:
    """Refuse ways to begin that lack something, and settings of others."""
    init, num_experts = config.init, config.model.moe.num_experts
    is_scratch = init.mode == "scratch" or (init.mode == "auto" and init.checkpoint is None)
    about_experts = ("experts", "gate", "gate_std")
    if is_scratch:
        names = ("checkpoint", *about_experts)
        why = f"init.mode={init.mode}" + (" and no init.checkpoint" if init.mode == "auto" else "")
        _refuse_changed(init, names, prefix="init", why=why)
    elif init.checkpoint is None:
        raise ValueError(f"config init.mode={init.mode}: needs init.checkpoint")
    if num_experts == 0:
        _refuse_changed(init, about_experts, prefix="init", why="model.moe.num_experts=0")
    if init.mode == "deit_upcycling" and (num_experts == 0 or init.experts == "random"):
        raise ValueError(
            "config init.mode=deit_upcycling: needs model.moe.num_experts > 0 and init.experts to "
            f"be copy, split or null (are {num_experts} and {init.experts})"
        )


def validate(config: Config) -> Config:
    """Return `config` if every option is in range and has an effect, else raise ValueError.

    Options that are another name of one are taken over into that.

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
    _check_dataset(config)
    _check_schedule(config)
    _check_augmentation(config)
    _check_loss(config)
    _check_distillation(config)
    _check_mixing(config)
    _check_moe(config)
    _check_init(config)
    return _resolve_update_freq(config)
