"""Every option of a run: its type, default, range and meaning.

The dataclasses, here and in model_options.py, are the only place for defaults; YAML files hold
differences (compose.py reads them). The programs, training/, compose.py and checks.py see a whole
Config; all other files take values, or one section of it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

from options.model_options import ModelOptions, option, section


@dataclasses.dataclass(frozen=True)
class TrainDataOptions:
    """The training images and their augmentation."""

    root: str = option("data/tiny-imagenet-5", "dataset folder, or its train folder")
    images: int | None = option(None, "how many there must be; null: any", low=1)
    batch_size: int = option(64, "images per rank and microbatch", low=1)
    crop_scale: list[float] = option([0.08, 1.0], "area range of RandomResizedCrop", low=0, high=1)
    crop_ratio: list[float] = option([0.75, 4 / 3], "aspect range of RandomResizedCrop", low=0.01)
    scaled_decode: bool = option(
        False, "decode JPEGs at 1/2, 1/4 or 1/8 where the crop has the pixels to spare"
    )
    hflip: float = option(0.5, "probability of a horizontal flip", low=0, high=1)
    crop: str = option(
        "rrc",
        "rrc: RandomResizedCrop; src: all of it resized, then shifted by 4 pixels at most",
        choices=("rrc", "src"),
    )
    interpolation: str | None = option(
        None,
        "resampling filter; random: bilinear or bicubic; null: dataset.interpolation",
        choices=(None, "random", "bilinear", "bicubic", "nearest", "lanczos"),
    )
    auto_augment: str | None = option(
        None, "policy of timm, as rand-m9-mstd0.5-inc1; 3aug: that of DeiT III; null: none"
    )
    color_jitter: float = option(0.0, "strength of brightness, contrast and saturation", low=0)
    reprob: float = option(0.0, "probability of random erasing", low=0, high=1)
    remode: str = option(
        "pixel",
        "erased with noise per pixel, one random color, or the mean",
        choices=("pixel", "rand", "const"),
    )
    recount: int = option(1, "boxes at most that are erased", low=1)
    repeats: int = option(
        1, "augmentations in a row of each image (DeiT: 3), in epochs as long", low=1
    )
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
    images: int | None = option(None, "how many there must be; null: any", low=1)
    batch_size: int = option(64, "images per rank", low=1)
    img_size: Any = option(
        None, "pixels per side; needs model.vit.dynamic_img_size; null: as trained"
    )
    crop_ratio: float = option(
        0.875, "side of the centre crop over the resized side", low=0.01, high=1
    )


@dataclasses.dataclass(frozen=True)
class DatasetOptions:
    """Images in; docs/data.md has the layouts."""

    train: TrainDataOptions = section(TrainDataOptions)
    val: ValDataOptions = section(ValDataOptions)
    path_env: str | None = option(
        None, "YAML file whose dataset_roots name folders, instead of dataset.train.root"
    )
    name: str | None = option(None, "which of them")
    index_folder: str | None = option(
        None, "where the index is kept; null: beside the images, else ~/.cache/moevit"
    )
    class_filter: list[str] = option([], "train and validate on these classes only; []: all")
    subset: float = option(1.0, "share of each class's training images", low=1e-6, high=1)
    duplicates: str = option(
        "warn",
        "what equal files of two images do; ignore: are not looked for",
        choices=("ignore", "warn", "stop"),
    )
    decoder: str = option(
        "auto",
        "of JPEGs, with equal pixels; auto: nvimgcodec where installed, and logs it",
        choices=("auto", "pillow", "nvimgcodec"),
    )
    on_error: str = option(
        "stop", "what an unreadable image does; skip: another one", choices=("stop", "skip")
    )
    max_bad: int = option(128, "most images skipped, over all ranks and each counted once", low=0)
    timeout_s: float = option(300.0, "seconds before a stuck loader process stops the run", low=1)
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

    name: str = option("adamw", "optimizer", choices=("adamw", "sgd", "lamb"))
    lr: float = option(1e-3, "peak learning rate", low=0)
    base_batch: int | None = option(
        None, "images per update that lr is for, scaled to the run's; null: any number", low=1
    )
    min_lr: float = option(1e-5, "learning rate at the end", low=0)
    warmup_steps: int = option(0, "updates of linear warm-up", low=0)
    warmup_lr: float | None = option(
        None, "learning rate of the first update; null: lr / warmup_steps", low=0
    )
    warmup_prefix: bool = option(
        True, "the cosine begins after the warm-up; false: with the run, as in DeiT"
    )
    schedule_per_epoch: bool = option(
        False, "set the learning rate after each epoch only, to that epoch's, as DeiT does"
    )
    layer_decay: float | None = option(
        None, "a layer's learning rate over that of the layer above; null: 1", low=1e-6, high=1
    )
    weight_decay: float = option(0.05, "not on norms, biases, tokens, position embeddings", low=0)
    betas: list[float] = option(
        [0.9, 0.999], "averaging factors of AdamW and LAMB", low=0, high=0.99999
    )
    eps: float = option(1e-8, "epsilon of AdamW and LAMB", low=0)
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
    update_freq: int | None = option(
        None, "another name of grad_accum_steps; null: not used", low=1
    )
    loss: str = option(
        "ce",
        "cross-entropy, or binary cross-entropy of each class; val_loss is the former with both",
        choices=("ce", "bce"),
    )
    bce_threshold: float | None = option(
        None, "targets above are 1, others 0 (DeiT III: 0); null: as they are", low=0, high=0.999
    )
    bce_sum: bool = option(False, "sum over classes (timm's option), not their mean")
    label_smoothing: float = option(0.0, "label smoothing", low=0, high=1)
    ema_decay: float | None = option(
        None,
        "per update, of an average of the weights, validated too; null: none",
        low=1e-6,
        high=1 - 1e-9,
    )
    seed: int = option(0, "seed of weights, order, augmentation and dropout", low=0)
    checkpoint: CheckpointOptions = section(CheckpointOptions)
    tensorboard: bool = option(True, "write TensorBoard events to the run folder")
    wandb: WandbOptions = section(WandbOptions)
    peak_tflops: float | None = option(
        None,
        "device peak for MFU, a teacher's forward counted; null: by device name, no MFU if unknown",
        low=1e-3,
    )


@dataclasses.dataclass(frozen=True)
class InitOptions:
    """What a run that does not resume begins with; formulas in docs/init.md."""

    mode: str = option(
        "auto",
        "where weights come from; auto: checkpoint null: scratch; a dense one for a model with "
        "experts: deit_upcycling; else deit_warm_start",
        choices=("auto", "scratch", "deit_warm_start", "deit_upcycling"),
    )
    checkpoint: str | None = option(
        None, "file (torch, safetensors), checkpoint or run folder, or a model name of timm"
    )
    experts: str | None = option(
        None,
        "in place of dense MLPs; null: random in deit_warm_start, copy or split in deit_upcycling",
        choices=(None, "random", "copy", "split"),
    )
    gate: str = option(
        "random",
        "of copied or split experts; virtual_group: equal rows for the parts of one MLP",
        choices=("random", "virtual_group"),
    )
    gate_std: float | None = option(
        None, "std of the values of that gate; null: 0.02, as from scratch", low=1e-12
    )


@dataclasses.dataclass(frozen=True)
class DistillationOptions:
    """Learning from a trained network besides the labels; formulas in distillation.py."""

    kind: str = option(
        "none",
        "from the teacher: hard, its class; soft, tau^2 KL to it over images x classes, as in DeiT",
        choices=("none", "soft", "hard"),
    )
    teacher: str | None = option(None, "model name of timm, or a run folder or checkpoint of ours")
    teacher_checkpoint: str | None = option(
        None, "file with the weights of timm's model; null: those that timm downloads"
    )
    alpha: float = option(0.5, "weight of the teacher's part of the loss", low=0, high=1)
    tau: float = option(1.0, "temperature of soft distillation", low=1e-6)


@dataclasses.dataclass(frozen=True)
class Config:
    """All options of a run."""

    model: ModelOptions = section(ModelOptions)
    dataset: DatasetOptions = section(DatasetOptions)
    distributed: DistributedOptions = section(DistributedOptions)
    fsdp: FSDPOptions = section(FSDPOptions)
    optimizer: OptimizerOptions = section(OptimizerOptions)
    training: TrainingOptions = section(TrainingOptions)
    init: InitOptions = section(InitOptions)
    distillation: DistillationOptions = section(DistillationOptions)
    device: str = option("auto", "auto is CUDA where present", choices=("auto", "cpu", "cuda"))


def walk(config: object, prefix: str = "") -> Iterator[tuple[str, dataclasses.Field[Any], Any]]:
    """Yield (dotted name, field, value) of every option of a (nested) options dataclass."""
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", field, value
