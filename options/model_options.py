"""The options of the network: its type, default, range and meaning of each; and how to declare one.

Part of schema.py, which has the options of the data and of the run.
"""

from __future__ import annotations

import dataclasses
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
    distilled: bool = option(False, "and a distillation token, with a head of its own (DeiT)")
    pos_embed: str = option(
        "learn",
        "position embedding; sincos: fixed sines and cosines of both axes, or init.checkpoint's",
        choices=("learn", "sincos", "none"),
    )
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
    drop_path_uniform: bool = option(
        False, "of all blocks (DeiT III); false: from 0, linear over the blocks"
    )
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
    sdpa: str = option(
        "auto",
        "attention kernel of the blocks with backend torch; auto: PyTorch's choice",
        choices=("auto", "flash", "cudnn", "efficient", "math"),
    )
    compile: bool = option(
        False, "run each block as one compiled graph (backend torch); docs/performance.md"
    )
