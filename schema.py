"""Every option of a run: its type, default, range and meaning.

The dataclasses are the only place for defaults; YAML files hold differences (compose.py reads
them). Below train.py nobody sees a config object: functions take values.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def option(
    default: T,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    choices: tuple[str | int | None, ...] | None = None,
) -> T:
    """Declare an option: `low <= value <= high`, or one of `choices`; None passes the range."""
    metadata = {"doc": doc, "low": low, "high": high, "choices": choices}
    if isinstance(default, list):
        kept = list(default)
        return dataclasses.field(default_factory=lambda: list(kept), metadata=metadata)  # type: ignore[return-value]
    return dataclasses.field(default=default, metadata=metadata)


def section(kind: type[T]) -> T:
    """Declare a nested group of options."""
    return dataclasses.field(default_factory=kind)


@dataclasses.dataclass(frozen=True)
class ViTOptions:
    """The network, with timm's names: the keyword arguments of `vit.VisionTransformer`."""

    img_size: Any = option(224, "pixels per side, or [height, width]")
    patch_size: Any = option(16, "pixels per patch side, or [height, width]")
    in_chans: int = option(3, "image channels; the loader makes RGB", low=3, high=3)
    num_classes: int = option(1000, "classes of the head", low=1)
    global_pool: str = option("token", "what the head sees: class token, mean, attention pool")
    embed_dim: int = option(768, "width D", low=1)
    depth: int = option(12, "blocks", low=1)
    num_heads: int = option(12, "attention heads A", low=1)
    mlp_ratio: float = option(4.0, "hidden width of the FFN over D", low=0.01)
    qkv_bias: bool = option(True, "bias of the qkv projection")
    qk_norm: bool = option(False, "LayerNorm on queries and keys of each head")
    scale_attn_norm: bool = option(False, "LayerNorm before the attention output projection")
    scale_mlp_norm: bool = option(False, "LayerNorm inside the FFN, before its second matrix")
    proj_bias: bool = option(True, "biases of the attention output and the FFN")
    init_values: float | None = option(None, "initial LayerScale; null: no LayerScale", low=0)
    class_token: bool = option(True, "prepend a class token")
    pos_embed: str = option("learn", "position embedding", choices=("learn", "none"))
    no_embed_class: bool = option(False, "no position embedding for class and register tokens")
    reg_tokens: int = option(0, "register tokens (arXiv:2309.16588)", low=0)
    pre_norm: bool = option(False, "LayerNorm before the blocks (CLIP)")
    final_norm: bool = option(True, "LayerNorm after the blocks")
    fc_norm: bool | None = option(None, "LayerNorm after pooling; null: exactly when pooling means")
    dynamic_img_size: bool = option(False, "accept any image size, position embedding resized")
    dynamic_img_pad: bool = option(False, "pad images to a multiple of the patch size")
    drop_rate: float = option(0.0, "dropout before the head", low=0, high=1)
    pos_drop_rate: float = option(0.0, "dropout after the position embedding", low=0, high=1)
    patch_drop_rate: float = option(0.0, "share of patches dropped in training", low=0, high=1)
    proj_drop_rate: float = option(0.0, "dropout after projections", low=0, high=1)
    attn_drop_rate: float = option(0.0, "dropout on attention weights", low=0, high=1)
    drop_path_rate: float = option(0.0, "stochastic depth of the last block", low=0, high=1)
    weight_init: str = option(
        "", "initialisation scheme of timm", choices=("", "jax", "jax_nlhb", "moco")
    )
    fix_init: bool = option(False, "scale residual projections by 1 / sqrt(2 (block + 1))")
    grad_checkpointing: bool = option(False, "recompute blocks in the backward pass")


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The model and how it computes."""

    vit: ViTOptions = section(ViTOptions)
    backend: str = option(
        "auto",
        "auto takes te on CUDA where it imports, and logs it",
        choices=("auto", "torch", "te"),
    )
    te_fp8: str | None = option(
        None, "fp8 scaling of backend te", choices=(None, "delayed", "current")
    )
    dtype: str = option(
        "auto",
        "compute dtype, auto: bf16 on CUDA, fp32 on CPU; main weights are fp32",
        choices=("auto", "fp32", "bf16"),
    )


@dataclasses.dataclass(frozen=True)
class TrainDataOptions:
    """The training images and their augmentation."""

    root: str = option("data/tiny-imagenet-5", "dataset folder, or its train folder")
    batch_size: int = option(64, "images per rank and microbatch", low=1)
    crop_scale: list[float] = option([0.08, 1.0], "area range of RandomResizedCrop", low=0, high=1)
    crop_ratio: list[float] = option([0.75, 4 / 3], "aspect range of RandomResizedCrop", low=0.01)
    hflip: float = option(0.5, "probability of a horizontal flip", low=0, high=1)
    color_jitter: float = option(0.0, "strength of brightness, contrast and saturation", low=0)


@dataclasses.dataclass(frozen=True)
class ValDataOptions:
    """The validation images."""

    root: str | None = option(None, "dataset folder, or its val folder; null: the training root")
    batch_size: int = option(64, "images per rank", low=1)
    img_size: Any = option(
        None, "pixels per side; needs model.vit.dynamic_img_size; null: as trained"
    )
    crop_ratio: float = option(
        0.875, "side of the centre crop over the resized side", low=0.01, high=1
    )


@dataclasses.dataclass(frozen=True)
class DatasetOptions:
    """Images in; see imagenet_dataset.py for the folder layouts."""

    train: TrainDataOptions = section(TrainDataOptions)
    val: ValDataOptions = section(ValDataOptions)
    num_workers: int = option(2, "loader processes per rank; 0 decodes in the main process", low=0)
    interpolation: str = option(
        "bicubic", "resampling filter", choices=("bilinear", "bicubic", "nearest", "lanczos")
    )
    mean: list[float] = option([0.485, 0.456, 0.406], "per-channel mean, of pixels in 0..1")
    std: list[float] = option([0.229, 0.224, 0.225], "per-channel std, of pixels in 0..1", low=1e-6)


@dataclasses.dataclass(frozen=True)
class DistributedOptions:
    """The mesh: dp_outer * dp_shard * ep ranks, each with its own images."""

    dp_outer: int = option(1, "replicas of the sharded model (HSDP)", low=1)
    dp_shard: int | None = option(None, "ranks to shard over; null: what is left", low=1)
    ep: int = option(1, "ranks that share out the experts; 1 for a dense model", low=1, high=1)
    tp: int = option(1, "tensor parallel ranks; only 1 is supported", low=1, high=1)
    timeout_s: float = option(600.0, "seconds before a stuck collective fails", low=1)


@dataclasses.dataclass(frozen=True)
class FSDPOptions:
    """Megatron-FSDP."""

    zero_dp_strategy: int | str = option(
        3,
        "what is sharded: 0 nothing, 1 optimizer, 2 and gradients, 3 and parameters",
        choices=(0, 1, 2, 3, "no_shard", "optim", "optim_grads", "optim_grads_params"),
    )
    outer_dp_sharding_strategy: str = option(
        "no_shard",
        "optim: shard the optimizer over dp_outer too (needs strategy 3 and dp_outer > 1)",
        choices=("no_shard", "optim"),
    )


@dataclasses.dataclass(frozen=True)
class OptimizerOptions:
    """Optimizer and learning rate: linear warm-up, then a cosine to min_lr."""

    name: str = option("adamw", "optimizer", choices=("adamw", "sgd"))
    lr: float = option(1e-3, "peak learning rate", low=0)
    min_lr: float = option(1e-5, "learning rate at the end", low=0)
    warmup_steps: int = option(0, "updates of linear warm-up", low=0)
    weight_decay: float = option(0.05, "not on norms, biases, tokens, position embeddings", low=0)
    betas: list[float] = option([0.9, 0.999], "AdamW's averaging factors", low=0, high=0.99999)
    eps: float = option(1e-8, "AdamW's epsilon", low=0)
    momentum: float = option(0.9, "SGD's momentum", low=0, high=1)
    clip_norm: float | None = option(1.0, "gradient norm limit; null: no clipping", low=1e-12)


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
    """Where a run lives; the same command resumes from the newest complete checkpoint there."""

    path: str = option("./ckpts/run", "run folder: checkpoints, log, TensorBoard, config")
    interval: int | None = option(None, "updates between saves; null: val_interval", low=1)
    keep_last: int = option(2, "checkpoints kept, beside the one of the lowest loss", low=1)


@dataclasses.dataclass(frozen=True)
class WandbOptions:
    """Weights & Biases, rank 0 only."""

    project: str | None = option(None, "project to log to; null: off")
    mode: str = option("online", "offline writes to the run folder", choices=("online", "offline"))


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """The loop."""

    steps: int = option(100, "optimizer updates", low=1)
    val_interval: int = option(50, "updates between validations; the last is always one", low=1)
    log_interval: int = option(10, "updates between log lines", low=1)
    grad_accum_steps: int = option(1, "microbatches per update, communicated once", low=1)
    label_smoothing: float = option(0.0, "label smoothing", low=0, high=1)
    seed: int = option(0, "seed of weights, order, augmentation and dropout", low=0)
    checkpoint: CheckpointOptions = section(CheckpointOptions)
    tensorboard: bool = option(True, "write TensorBoard events to the run folder")
    wandb: WandbOptions = section(WandbOptions)
    peak_tflops: float | None = option(
        None, "device peak for MFU; null: by device name, no MFU if unknown", low=1e-3
    )


@dataclasses.dataclass(frozen=True)
class Config:
    """All options of a run."""

    model: ModelOptions = section(ModelOptions)
    dataset: DatasetOptions = section(DatasetOptions)
    distributed: DistributedOptions = section(DistributedOptions)
    fsdp: FSDPOptions = section(FSDPOptions)
    optimizer: OptimizerOptions = section(OptimizerOptions)
    training: TrainingOptions = section(TrainingOptions)
    device: str = option("auto", "auto is CUDA where present", choices=("auto", "cpu", "cuda"))


def walk(config: object, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Yield (dotted name, field, value) of every option of a (nested) options dataclass."""
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field, value


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
    return config
