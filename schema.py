"""Every option of a run: its type, default, range and meaning.

The dataclasses are the only place for defaults; YAML files hold differences (compose.py reads
them). Below train.py nobody sees a config object: functions take values.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
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
    proj_bias: bool = option(True, "biases of the attention output, the FFN and the experts")
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
    proj_drop_rate: float = option(
        0.0, "dropout after projections; in experts after the last", low=0, high=1
    )
    attn_drop_rate: float = option(0.0, "dropout on attention weights", low=0, high=1)
    drop_path_rate: float = option(0.0, "stochastic depth of the last block", low=0, high=1)
    weight_init: str = option(
        "", "initialisation scheme of timm", choices=("", "jax", "jax_nlhb", "moco")
    )
    fix_init: bool = option(False, "scale residual projections by 1 / sqrt(2 (block + 1))")
    grad_checkpointing: bool = option(False, "recompute blocks in the backward pass")


@dataclasses.dataclass(frozen=True)
class MoEOptions:
    """Mixture-of-experts feed-forwards in place of some blocks' dense ones."""

    num_experts: int = option(0, "experts E of a layer, over all ranks; 0: a dense model", low=0)
    top_k: int = option(2, "experts per token k", low=1)
    every_n: int | None = option(2, "each n-th block has experts (the last of each n)", low=1)
    last_n: int | None = option(None, "the last n blocks have experts, instead of every_n", low=1)
    blocks: list[int] | None = option(None, "these blocks have experts, instead of every_n", low=0)
    mlp_ratio: float = option(4.0, "hidden width F of an expert over D", low=0.01)
    shared_ratio: float = option(0.0, "hidden width of a dense expert beside them, over D", low=0)
    activation: str = option(
        "gelu", "in the experts", choices=("gelu", "relu", "silu", "swiglu", "geglu")
    )
    router: str = option(
        "softmax",
        "how scores become weights",
        choices=("softmax", "sigmoid", "noisy", "noisy_topk"),
    )
    normalize: bool | None = option(
        None, "a token's k weights sum to 1; null: as the router has it"
    )
    noise_std: float = option(0.0, "router noisy: std of the noise on logits, times E", low=0)
    jitter: float = option(0.0, "router input times U(1 - jitter, 1 + jitter) in training", low=0)
    expert_drop: float = option(
        0.0, "probability that an expert is closed to a token, in training", low=0, high=1
    )
    capacity_factor: float | None = option(
        None, "limit of an expert's rows, over an even share; null: none is dropped", low=0.01
    )
    forced_balance: bool = option(False, "spread tokens evenly whatever the scores; for benchmarks")
    importance_coef: float = option(0.0, "weight of CV^2 of the experts' summed weights", low=0)
    load_coef: float = option(0.0, "weight of CV^2 of the experts' expected rows", low=0)
    switch_coef: float = option(0.01, "weight of E sum f P over the batch", low=0)
    sequence_coef: float = option(0.0, "weight of E sum f P per image", low=0)
    z_coef: float = option(0.0, "weight of the squared logsumexp of the logits", low=0)
    kernels: str = option(
        "auto", "auto: triton on CUDA, torch on CPU", choices=("auto", "torch", "triton")
    )


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The model and how it computes."""

    vit: ViTOptions = section(ViTOptions)
    moe: MoEOptions = section(MoEOptions)
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
    mixup: float = option(0.0, "alpha of mixup; 0: off", low=0)
    cutmix: float = option(0.0, "alpha of CutMix; 0: off", low=0)
    mixup_prob: float = option(1.0, "probability of mixing at all", low=0, high=1)
    mixup_switch_prob: float = option(
        0.5, "of CutMix rather than mixup where both are on", low=0, high=1
    )
    mixup_mode: str = option("batch", "drawn once per", choices=("batch", "pair", "elem"))


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
    ep: int | None = option(
        1, "ranks that share out the experts; null: all, as far as it divides both", low=1
    )
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
    keep_last: int = option(2, "newest checkpoints kept; counts complete ones only", low=1)
    keep_best: int = option(1, "best ones kept besides, by resume_from_metric or -val_loss", low=0)
    resume_from_metric: str | None = option(
        None,
        "resume from the checkpoint with the highest (+) or lowest (-) figure; null: the newest",
        choices=(None, "+val_top1", "+val_top5", "-val_loss", "-loss"),
    )
    async_save: bool = option(False, "write in another process while training goes on")


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
    ema_decay: float | None = option(
        None, "per update, of an average of the weights, validated too; null: none", low=0, high=1
    )
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
