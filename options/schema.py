"""Every option of a run: its type, default, range and meaning, declared once.

    name: type = option(default, "meaning", low=..., choices=...)

A line here is all that a new option needs: `--help`, docs/config.md, the command line and the check
of its range follow, and whoever is handed the dataclass reads `o.name`. YAML files hold differences
from these defaults. What options must satisfy together is in checks.py.

One idea: the list of options. A reader looks for a name here and nowhere else.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeVar

T = TypeVar("T")


def option(
    default: T,
    doc: str,
    *,
    low: float | None = None,
    high: float | None = None,
    below: float | None = None,
    choices: tuple[str | int | None, ...] | None = None,
    length: int | None = None,
    is_size: bool = False,
) -> T:
    """Declare an option; None, as a default or a value, passes every check but `choices`.

    `low <= value <= high`, `value < below`, or one of `choices`; each item of a list, which has
    `length` items. `is_size`: a positive number of pixels, or [height, width].
    """
    metadata = {
        "doc": doc,
        "low": low,
        "high": high,
        "below": below,
        "choices": choices,
        "length": length,
        "is_size": is_size,
    }
    if isinstance(default, list):
        kept = list(default)
        return dataclasses.field(default_factory=lambda: list(kept), metadata=metadata)  # type: ignore[return-value]
    return dataclasses.field(default=default, metadata=metadata)


def section(kind: type[T]) -> T:
    """Declare a nested group of options."""
    return dataclasses.field(default_factory=kind)


def height_width(size: int | list[int] | tuple[int, int]) -> tuple[int, int]:
    """Return an option of one side or [height, width] as (height, width) in pixels."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@dataclasses.dataclass(frozen=True)
class ViTOptions:
    """The network, with timm's names: what `vit.VisionTransformer` is made from."""

    img_size: Any = option(224, "pixels per side, or [height, width]", is_size=True)
    patch_size: Any = option(16, "pixels per patch side, or [height, width]", is_size=True)
    in_chans: int = option(3, "image channels; the loader makes RGB", low=1)
    num_classes: int | None = option(
        1000,
        "classes of the head; null: as many as the data has; 0: no head, features only",
        low=0,
        high=10_000_000,
    )
    global_pool: str = option(
        "token",
        "what the head sees: class token, mean, attention pool, maximum, both, or each token",
        choices=("token", "avg", "map", "max", "avgmax", ""),
    )
    embed_dim: int = option(768, "width D", low=1, high=2**16)
    depth: int = option(12, "blocks", low=1, high=1000)
    num_heads: int = option(12, "attention heads A", low=1)
    mlp_ratio: float = option(4.0, "hidden width of the FFN, over D", low=0.01, high=1000)
    qkv_bias: bool = option(True, "bias of the qkv projection")
    qk_norm: bool = option(False, "LayerNorm on queries and keys of each head")
    scale_attn_norm: bool = option(False, "LayerNorm before the attention output projection")
    scale_mlp_norm: bool = option(False, "LayerNorm inside the FFN, before its second matrix")
    proj_bias: bool = option(True, "biases of the attention output, the FFN and the experts")
    init_values: float | None = option(None, "initial LayerScale; null: no LayerScale", low=0)
    class_token: bool = option(True, "prepend a class token")
    distilled: bool = option(False, "add a distillation token with its own head (DeiT)")
    pos_embed: str = option(
        "learn",
        "position embedding; sincos: fixed sines and cosines, unless init.checkpoint has others",
        choices=("learn", "sincos", "none"),
    )
    no_embed_class: bool = option(False, "no position embedding for class and register tokens")
    reg_tokens: int = option(0, "register tokens (arXiv:2309.16588)", low=0, high=1000)
    pre_norm: bool = option(False, "LayerNorm before the blocks, no patch bias (CLIP)")
    final_norm: bool = option(True, "LayerNorm after the blocks")
    fc_norm: bool | None = option(
        None, "LayerNorm after pooling; null: if it averages or maximises"
    )
    dynamic_img_size: bool = option(False, "accept any image size; resize the positions")
    dynamic_img_pad: bool = option(False, "pad images to a multiple of the patch size")
    drop_rate: float = option(0.0, "dropout before the head", low=0, below=1)
    pos_drop_rate: float = option(0.0, "dropout after the position embedding", low=0, below=1)
    patch_drop_rate: float = option(0.0, "share of patches dropped in training", low=0, below=1)
    proj_drop_rate: float = option(
        0.0, "dropout after projections; after the last one in experts", low=0, below=1
    )
    attn_drop_rate: float = option(0.0, "dropout on attention weights", low=0, below=1)
    drop_path_rate: float = option(0.0, "stochastic depth of the last block", low=0, below=1)
    drop_path_uniform: bool = option(
        False, "the same drop_path_rate in every block (DeiT III); false: linear from 0"
    )
    weight_init: str = option(
        "", "initialisation scheme of timm", choices=("", "jax", "jax_nlhb", "moco")
    )
    fix_init: bool = option(False, "scale residual projections by 1 / sqrt(2 (block + 1))")
    grad_checkpointing: bool = option(False, "recompute blocks in the backward pass")

    @property
    def known_classes(self) -> int:
        """num_classes, once the data is known."""
        assert self.num_classes is not None, "training.prepare fills it in"
        return self.num_classes

    @property
    def img_hw(self) -> tuple[int, int]:
        """Height and width of an image, in pixels."""
        return height_width(self.img_size)

    @property
    def patch_hw(self) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        return height_width(self.patch_size)

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Number of patches down and across."""
        return self.img_hw[0] // self.patch_hw[0], self.img_hw[1] // self.patch_hw[1]

    @property
    def num_prefix_tokens(self) -> int:
        """Class, distillation and register tokens, which stand before the patches."""
        return int(self.class_token) + int(self.distilled) + self.reg_tokens

    @property
    def num_tokens_in_training(self) -> int:
        """Length L of what the blocks see in training: prefix and the patches that are kept."""
        num_kept = int(math.prod(self.grid_hw) * (1 - self.patch_drop_rate))
        return max(1, num_kept) + self.num_prefix_tokens

    @property
    def num_pos_prefix(self) -> int:
        """Prefix tokens that have a position embedding."""
        return 0 if self.no_embed_class else self.num_prefix_tokens

    @property
    def hidden_dim(self) -> int:
        """Width inside a block's dense MLP."""
        return int(self.embed_dim * self.mlp_ratio)

    @property
    def is_norm_after_pool(self) -> bool:
        """Whether the final norm is `fc_norm`, after the pool, rather than `norm`, before it."""
        means = self.global_pool in ("avg", "max", "avgmax")
        return means if self.fc_norm is None else self.fc_norm


class RouterFacts(NamedTuple):
    """What checks and upcycling must know of a router: `normalizes` where the user does not say."""

    normalizes: bool = False  # a token's k weights sum to 1
    is_noisy: bool = False  # noise on the logits, in training


# The classes of these names are in routers/gates.py.
ROUTERS = {
    "softmax": RouterFacts(),
    "sigmoid": RouterFacts(normalizes=True),
    "noisy": RouterFacts(is_noisy=True),
    "noisy_topk": RouterFacts(normalizes=True, is_noisy=True),
}


@dataclasses.dataclass(frozen=True)
class MoEOptions:
    """Mixture-of-experts feed-forwards in place of some blocks' dense ones."""

    num_experts: int = option(
        0, "experts E per layer, over all ranks; 0: a dense model", low=0, high=10_000
    )
    top_k: int = option(2, "experts per token k", low=1)
    every_n: int | None = option(2, "every n-th block has experts", low=1)
    last_n: int | None = option(None, "the last n blocks have experts, instead of every_n", low=1)
    blocks: list[int] | None = option(None, "these blocks have experts, instead of every_n", low=0)
    mlp_ratio: float = option(4.0, "hidden width F of an expert, over D", low=0.01, high=1000)
    shared_ratio: float = option(
        0.0, "hidden width of an expert for all tokens, over D", low=0, high=1000
    )
    activation: str = option(
        "gelu", "activation of the experts", choices=("gelu", "relu", "silu", "swiglu", "geglu")
    )
    router: str = option("softmax", "how scores become weights", choices=tuple(ROUTERS))
    normalize: bool | None = option(
        None, "a token's k weights sum to 1; null: the router's own default"
    )
    noise_std: float = option(0.0, "router noisy: std of the noise on the logits, times E", low=0)
    jitter: float = option(
        0.0, "multiply the router input by U(1 - jitter, 1 + jitter) in training", low=0, below=1
    )
    expert_drop: float = option(
        0.0, "probability that an expert is closed to a token, in training", low=0, below=1
    )
    capacity_factor: float | None = option(
        None, "most rows of an expert, as a multiple of an even share; null: no limit", low=0.01
    )
    forced_balance: bool = option(False, "spread tokens evenly whatever they score; for benchmarks")
    importance_coef: float = option(0.0, "weight of CV^2 of the experts' summed weights", low=0)
    load_coef: float = option(0.0, "weight of CV^2 of the experts' expected rows", low=0)
    switch_coef: float = option(0.01, "weight of E sum f P over the batch", low=0)
    sequence_coef: float = option(0.0, "weight of E sum f P per image", low=0)
    z_coef: float = option(0.0, "weight of the squared logsumexp of the logits", low=0)
    kernels: str = option(
        "auto", "auto: triton on CUDA, torch on CPU", choices=("auto", "torch", "triton")
    )

    @property
    def is_normalized(self) -> bool:
        """Whether a token's k weights sum to 1."""
        return ROUTERS[self.router].normalizes if self.normalize is None else self.normalize

    @property
    def has_balance_loss(self) -> bool:
        """Whether uneven use of the experts costs anything."""
        return any(value for name, value in vars(self).items() if name.endswith("_coef"))

    def expert_blocks(self, depth: int) -> list[int]:
        """Return which of `depth` blocks have experts: none in a dense model."""
        if self.num_experts == 0:
            return []
        if self.blocks is not None:
            return sorted(set(self.blocks))
        if self.last_n is not None:
            return list(range(depth - self.last_n, depth))
        assert self.every_n is not None, "checks.py has seen that one of the three is given"
        return list(range(self.every_n - 1, depth, self.every_n))


@dataclasses.dataclass(frozen=True)
class ModelOptions:
    """The model and how it computes."""

    vit: ViTOptions = section(ViTOptions)
    moe: MoEOptions = section(MoEOptions)
    backend: str = option(
        "auto",
        "auto: te on CUDA if it imports, which is logged",
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
    sdpa: str = option(
        "auto",
        "attention kernel of the blocks with backend torch; auto: PyTorch's choice",
        choices=("auto", "flash", "cudnn", "efficient", "math"),
    )
    compile: bool = option(
        False, "run each block as one compiled graph (backend torch); docs/performance.md"
    )


@dataclasses.dataclass(frozen=True)
class TrainDataOptions:
    """The training images and their augmentation."""

    root: str = option("data/tiny-imagenet-5", "dataset folder, or its train folder")
    images: int | None = option(None, "required number of images; null: any", low=1)
    batch_size: int = option(64, "images per rank and microbatch", low=1, high=2**20)
    crop_scale: list[float] = option(
        [0.08, 1.0], "area range of RandomResizedCrop", low=0, high=1, length=2
    )
    crop_ratio: list[float] = option(
        [0.75, 4 / 3], "aspect range of RandomResizedCrop", low=0.01, length=2
    )
    scaled_decode: bool = option(
        False, "decode JPEGs at 1/2, 1/4 or 1/8 scale if the crop has pixels to spare"
    )
    hflip: float = option(0.5, "probability of a horizontal flip", low=0, high=1)
    crop: str = option(
        "rrc",
        "rrc: RandomResizedCrop; src: resize the whole image, shift it by up to 4 pixels",
        choices=("rrc", "src"),
    )
    interpolation: str | None = option(
        None,
        "resampling filter; random: bilinear or bicubic; null: dataset.interpolation",
        choices=(None, "random", "bilinear", "bicubic", "nearest", "lanczos"),
    )
    auto_augment: str | None = option(
        None, "timm's policy, such as rand-m9-mstd0.5-inc1; 3aug: DeiT III's; null: none"
    )
    color_jitter: float = option(
        0.0, "strength of brightness, contrast and saturation", low=0, high=100
    )
    reprob: float = option(0.0, "probability of random erasing", low=0, high=1)
    remode: str = option(
        "pixel",
        "fill of erased boxes: noise per pixel, one random color, or the mean",
        choices=("pixel", "rand", "const"),
    )
    recount: int = option(1, "most boxes erased per image", low=1, high=100)
    repeats: int = option(
        1, "augmented copies of each image per epoch (DeiT: 3); epochs stay as long", low=1
    )
    mixup: float = option(0.0, "alpha of mixup; 0: off", low=0, high=1000)
    cutmix: float = option(0.0, "alpha of CutMix; 0: off", low=0, high=1000)
    mixup_prob: float = option(1.0, "probability of mixing a batch at all", low=0, high=1)
    mixup_switch_prob: float = option(
        0.5, "probability of CutMix rather than mixup if both are on", low=0, high=1
    )
    mixup_mode: str = option("batch", "draw once per", choices=("batch", "pair", "elem"))


@dataclasses.dataclass(frozen=True)
class ValDataOptions:
    """The validation images."""

    root: str | None = option(None, "dataset folder, or its val folder; null: the training root")
    images: int | None = option(None, "required number of images; null: any", low=1)
    batch_size: int = option(64, "images per rank", low=1, high=2**20)
    img_size: Any = option(
        None, "pixels per side; needs model.vit.dynamic_img_size; null: as trained", is_size=True
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
        None, "YAML file whose dataset_roots name folders; replaces dataset.train.root"
    )
    name: str | None = option(None, "which of the dataset_roots")
    index_folder: str | None = option(
        None, "where to keep the index; null: beside the images, else ~/.cache/moevit"
    )
    class_filter: list[str] = option([], "train and validate on these classes only; []: all")
    subset: float = option(1.0, "share of each class's training images", low=1e-6, high=1)
    duplicates: str = option(
        "warn",
        "what to do about images whose files are equal; ignore: do not look",
        choices=("ignore", "warn", "stop"),
    )
    decoder: str = option(
        "auto",
        "JPEG decoder, with equal pixels; auto: nvimgcodec if installed, which is logged",
        choices=("auto", "pillow", "nvimgcodec"),
    )
    on_error: str = option(
        "stop", "on an unreadable image; skip: take another one", choices=("stop", "skip")
    )
    max_bad: int = option(128, "most images to skip, each counted once over all ranks", low=0)
    timeout_s: float = option(
        300.0, "seconds before a stuck loader process stops the run", low=1, high=1e6
    )
    num_workers: int = option(
        2, "loader processes per rank; 0 decodes in the main process", low=0, high=1000
    )
    interpolation: str = option(
        "bicubic", "resampling filter", choices=("bilinear", "bicubic", "nearest", "lanczos")
    )
    mean: list[float] = option(
        [0.485, 0.456, 0.406], "per-channel mean, of pixels in 0..1", length=3
    )
    std: list[float] = option(
        [0.229, 0.224, 0.225], "per-channel std, of pixels in 0..1", low=1e-6, length=3
    )


@dataclasses.dataclass(frozen=True)
class DistributedOptions:
    """The mesh: dp_outer * dp_shard * ep ranks, each with its own images."""

    dp_outer: int = option(1, "replicas of the sharded model (HSDP)", low=1)
    dp_shard: int | None = option(None, "ranks to shard over; null: what is left", low=1)
    ep: int | None = option(
        1, "ranks that share out the experts; null: the most that divides experts and ranks", low=1
    )
    tp: int = option(1, "tensor parallel ranks; only 1 is supported", low=1, high=1)
    timeout_s: float = option(600.0, "seconds before a stuck collective fails", low=1, high=1e6)


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
        None, "images per update that lr is for; lr scales with the run's; null: not", low=1
    )
    min_lr: float = option(1e-5, "learning rate at the end", low=0)
    warmup_steps: int = option(0, "updates of linear warm-up", low=0)
    warmup_lr: float | None = option(
        None, "learning rate of the first update; null: lr / warmup_steps", low=0
    )
    warmup_prefix: bool = option(
        True, "start the cosine after the warm-up; false: with the run, as in DeiT"
    )
    schedule_per_epoch: bool = option(
        False, "change the learning rate once per epoch only, as DeiT does"
    )
    layer_decay: float | None = option(
        None, "a layer's learning rate over that of the layer above it; null: 1", low=1e-6, high=1
    )
    weight_decay: float = option(0.05, "not on norms, biases, tokens, position embeddings", low=0)
    betas: list[float] = option(
        [0.9, 0.999], "averaging factors of AdamW and LAMB", low=0, high=0.99999, length=2
    )
    eps: float = option(1e-8, "epsilon of AdamW and LAMB", low=0)
    momentum: float = option(0.9, "SGD's momentum", low=0, high=1)
    clip_norm: float | None = option(1.0, "gradient norm limit; null: no clipping", low=1e-12)


@dataclasses.dataclass(frozen=True)
class CheckpointOptions:
    """Where a run lives; the same command resumes from the newest complete checkpoint there."""

    path: str = option("./ckpts/run", "run folder: checkpoints, log, TensorBoard, config")
    interval: int | None = option(None, "updates between saves; null: val_interval", low=1)
    keep_last: int = option(2, "newest complete checkpoints to keep", low=1)
    keep_best: int = option(1, "best ones to keep too, by resume_from_metric or -val_loss", low=0)
    resume_from_metric: str | None = option(
        None,
        "resume from the checkpoint with the highest (+) or lowest (-) figure; null: the newest",
        choices=(None, "+val_top1", "+val_top5", "-val_loss", "-loss"),
    )
    async_save: bool = option(False, "save in another process while training goes on")
    lock: bool = option(
        True, "false: for a file system without locks; then nothing keeps two runs apart there"
    )
    any_mode: bool = option(
        False,
        "true: resume from files that every user can write to, as all are on a file system "
        "without modes (WSL's /mnt/c)",
    )


@dataclasses.dataclass(frozen=True)
class WandbOptions:
    """Weights & Biases, rank 0 only."""

    project: str | None = option(None, "project to log to; null: off")
    mode: str = option("online", "offline: write to the run folder", choices=("online", "offline"))


@dataclasses.dataclass(frozen=True)
class TrainingOptions:
    """The loop."""

    steps: int = option(100, "optimizer updates", low=1)
    val_interval: int = option(50, "updates between validations; the last always validates", low=1)
    log_interval: int = option(10, "updates between log lines", low=1)
    grad_accum_steps: int = option(1, "microbatches per update, communicated once", low=1)
    update_freq: int | None = option(
        None, "another name for grad_accum_steps; null: not used", low=1
    )
    loss: str = option(
        "ce",
        "cross-entropy, or binary cross-entropy per class; val_loss is always the former",
        choices=("ce", "bce"),
    )
    bce_threshold: float | None = option(
        None, "targets above it become 1, others 0 (DeiT III: 0); null: as is", low=0, high=0.999
    )
    bce_sum: bool = option(False, "sum over classes, as timm can, instead of their mean")
    label_smoothing: float = option(0.0, "label smoothing", low=0, high=1)
    ema_decay: float | None = option(
        None,
        "decay per update of averaged weights, also validated; null: no average",
        low=1e-6,
        high=1 - 1e-9,
    )
    seed: int = option(0, "seed of weights, order, augmentation and dropout", low=0)
    checkpoint: CheckpointOptions = section(CheckpointOptions)
    tensorboard: bool = option(True, "write TensorBoard events to the run folder")
    wandb: WandbOptions = section(WandbOptions)
    peak_tflops: float | None = option(
        None,
        "device peak for MFU; null: by device name, no MFU if unknown",
        low=1e-3,
    )


@dataclasses.dataclass(frozen=True)
class InitOptions:
    """What a run that does not resume begins with; formulas in docs/init.md."""

    mode: str = option(
        "auto",
        "where weights come from; auto: scratch without a checkpoint; for experts from dense "
        "weights deit_upcycling; otherwise deit_warm_start",
        choices=("auto", "scratch", "deit_warm_start", "deit_upcycling"),
    )
    checkpoint: str | None = option(
        None, "file (torch, safetensors), checkpoint or run folder, or a name of timm's models"
    )
    weights: str | None = option(
        None,
        "weights of that file or run as trained, or their average; null: the average in a file of "
        "timm, DeiT or M3ViT, if it has one, else as trained",
        choices=(None, "model", "ema"),
    )
    experts: str | None = option(
        None,
        "what replaces dense MLPs; null: random in deit_warm_start, copy or split in upcycling",
        choices=(None, "random", "copy", "split"),
    )
    gate: str = option(
        "random",
        "gate of copied or split experts; virtual_group: equal rows for the parts of one MLP",
        choices=("random", "virtual_group"),
    )
    gate_std: float | None = option(
        None, "std of that gate's values; null: 0.02, as from scratch", low=1e-12
    )


@dataclasses.dataclass(frozen=True)
class DistillationOptions:
    """Learning from a trained network besides the labels; formulas in distillation.py."""

    kind: str = option(
        "none",
        "hard: the teacher's class; soft: tau^2 KL to it over images x classes, as in DeiT",
        choices=("none", "soft", "hard"),
    )
    teacher: str | None = option(
        None, "name of a timm model, or run folder or checkpoint of moevit"
    )
    teacher_checkpoint: str | None = option(
        None, "file with the weights of timm's model; null: timm downloads them"
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
