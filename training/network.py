"""From options to the network: which blocks have experts, with which kernels and in which dtype.

Config -> VisionTransformer, dense or with experts
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable

import torch
from torch import nn

import moe
from layers import compile as block_compile
from layers import modules, te
from moe_kernels import ops
from options import compose
from options.model_options import ViTOptions
from options.schema import Config
from options.vit_options import VitOptions
from parallel import collectives
from routers.balance import Coefficients
from routers.router import Router
from vit import VisionTransformer
from weights import formats
from weights.formats import MtlFile
from weights.sources import Source

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def height_width(size: int | list[int]) -> tuple[int, int]:
    """Return an option of one side or [height, width] as (height, width) in pixels."""
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the compute dtype; auto is bf16 on CUDA and fp32 on CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def pick_backend(config: Config, device: torch.device) -> tuple[str, str]:
    """Return the backend and why it is this one; fp8 needs TransformerEngine."""
    backend, reason = te.resolve_backend(config.model.backend, device)
    if config.model.te_fp8 is not None and backend != "te":
        raise ValueError(
            f"config model.te_fp8={config.model.te_fp8}: needs backend te, not {backend} ({reason})"
        )
    return backend, reason


def check_fp8(config: Config, options: VitOptions) -> None:
    """Refuse sizes that fp8, if it was asked for, cannot work with."""
    if config.model.te_fp8 is not None:
        te.check_fp8_shapes(
            embed_dim=options.embed_dim,
            hidden_dim=options.hidden_dim,
            batch_size=config.dataset.train.batch_size,
            num_tokens=options.num_tokens_in_training,
        )


def block_choices(config: Config, options: VitOptions, device: torch.device) -> dict[str, object]:
    """Return how blocks of backend torch run in training: attention kernel, compiled or not.

    Raises:
        ValueError: The one that was asked for does not work here.
    """
    if options.backend == "te":
        return {}
    dtype = pick_dtype(config.model.dtype, device)
    head_dim, drop = options.embed_dim // options.num_heads, options.attn_drop_rate
    num_tokens = options.num_tokens_in_training
    usable = modules.usable_kernels(
        device=device, dtype=dtype, head_dim=head_dim, num_tokens=num_tokens, drop=drop
    )
    where = f"{dtype} on {device}, {num_tokens} tokens, heads of {head_dim}, dropout {drop:g}"
    modules.check_kernel(config.model.sdpa, usable, where=where)
    usable_names = " ".join(usable)
    return {"sdpa": config.model.sdpa, "sdpa_usable": usable_names, "compile": config.model.compile}


def check_compile(config: Config, *, backend: str, reason: str, device: torch.device) -> None:
    """Refuse to compile what cannot be.

    Raises:
        ValueError: The backend is te, whose layers break graphs, or a compiler is missing.
    """
    if not config.model.compile:
        return
    if backend == "te":
        raise ValueError(f"config model.compile=true: needs model.backend=torch, not te ({reason})")
    block_compile.check_compiler(device)


def compile_model(config: Config, vit: VisionTransformer) -> None:
    """Compile the blocks in place, if the options say so; after sharding."""
    if config.model.compile:
        block_compile.compile_blocks(vit.blocks)


def _check_beside_experts(config: Config, blocks: list[int]) -> None:
    """Refuse what experts have no form for, and what only dense blocks would see."""
    vit, o, default = config.model.vit, config.model.moe, ViTOptions()
    names = ["weight_init", "fix_init", "scale_mlp_norm"]
    names += ["mlp_ratio"] if len(blocks) == vit.depth else []
    for name in names:
        if getattr(vit, name) != getattr(default, name):
            why = "no block is dense" if name == "mlp_ratio" else "experts have no form for it"
            raise ValueError(f"config model.vit.{name}={getattr(vit, name)}: {why}")
    for name, ratio in (("mlp_ratio", o.mlp_ratio), ("shared_ratio", o.shared_ratio)):
        if ratio and int(vit.embed_dim * ratio) < 1:
            raise ValueError(
                f"config model.moe.{name}={ratio}: must be at least 1 / model.vit.embed_dim="
                f"{vit.embed_dim}"
            )


def moe_factory(
    config: Config, exchange: moe.Exchange | None, device: torch.device
) -> Callable[[int], nn.Module | None]:
    """Return the function from a block's number to its mixture of experts, None for a dense one."""
    o, vit = config.model.moe, config.model.vit
    blocks = moe.expert_blocks(depth=vit.depth, every_n=o.every_n, last_n=o.last_n, blocks=o.blocks)
    _check_beside_experts(config, blocks)
    backend, _ = ops.resolve_kernels(o.kernels, device)
    coefs = Coefficients(
        importance=o.importance_coef,
        load=o.load_coef,
        switch=o.switch_coef,
        sequence=o.sequence_coef,
        z=o.z_coef,
    )

    def build(block: int) -> nn.Module | None:
        if block not in blocks:
            return None
        router = Router(
            vit.embed_dim,
            o.num_experts,
            top_k=o.top_k,
            kind=o.router,
            normalize=o.normalize,
            noise_std=o.noise_std,
            jitter=o.jitter,
            expert_drop=o.expert_drop,
            capacity_factor=o.capacity_factor,
            forced_balance=o.forced_balance,
            coefs=coefs,
        )
        width = int(vit.embed_dim * o.shared_ratio)
        return moe.MoE(
            vit.embed_dim,
            int(vit.embed_dim * o.mlp_ratio),
            router=router,
            activation=o.activation,
            bias=vit.proj_bias,
            drop=vit.proj_drop_rate,
            shared=modules.Mlp(vit.embed_dim, width, bias=vit.proj_bias) if width else None,
            kernel_backend=backend,
            exchange=exchange,
            sum_over_ranks=collectives.sum_over_ranks,
        )

    return build


def expert_choices(config: Config, device: torch.device) -> dict[str, object]:
    """Return which kernels compute the experts, and why; nothing for a dense model."""
    if not config.model.moe.num_experts:
        return {}
    backend, reason = ops.resolve_kernels(config.model.moe.kernels, device)
    return {"kernels": backend, "kernels_reason": reason}


def build_model(
    config: Config,
    *,
    backend: str,
    on_meta: bool,
    exchange: moe.Exchange | None = None,
    device: torch.device | None = None,
    sdpa: str = "auto",
) -> VisionTransformer:
    """Build the ViT, on the meta device or the CPU; its values depend on seed and names alone.

    `exchange` is how experts are shared out among ranks, None for all of them here; `device` is
    where the model will compute, which decides the expert kernels. `model.sdpa` is for training:
    `sdpa` is what counts here.
    """
    options = dataclasses.asdict(config.model.vit)
    for name in ("img_size", "patch_size"):
        if isinstance(options[name], list):
            options[name] = height_width(options[name])
    ffn = None
    if config.model.moe.num_experts:
        ffn = moe_factory(config, exchange, device or torch.device("cpu"))
    with torch.device("meta") if on_meta else contextlib.nullcontext():
        return VisionTransformer(
            **options, sdpa=sdpa, backend=backend, ffn=ffn, seed=config.training.seed
        )


def name_options(source: Source, config_name: str, overrides: list[str]) -> Source:
    """Return `source` with the options of a recipe, if it is a model of these names and shapes.

    Raises:
        ValueError: It has its own options, or a parameter differs.
    """
    if source.config:
        raise ValueError(f"--config-name {config_name}: {source.origin} has options of its own")
    config = compose.compose(config_name, overrides)
    model = build_model(config, backend="torch", on_meta=True)
    expected, weights = model.state_dict(), source.weights()
    problems = []
    for name in sorted(expected.keys() | weights.keys()):
        if name not in weights:
            # M3ViT's encoder ends with its blocks: a head is for whoever loads the export.
            is_theirs = isinstance(source.content, MtlFile) and formats.is_top(name)
            problems += [] if is_theirs else [f"missing {name}"]
        elif name not in expected:
            problems.append(f"unexpected {name}")
        elif expected[name].shape != weights[name].shape:
            shapes = f"{tuple(weights[name].shape)}, not {tuple(expected[name].shape)}"
            problems.append(f"{name} is {shapes}")
    if problems:
        raise ValueError(f"{source.origin} is no {config_name}: {formats.listed(problems)}")
    return dataclasses.replace(source, content=weights, config=dataclasses.asdict(config))
