"""From options to the network: backend, kernels, dtype, and which blocks have experts.

Config -> VisionTransformer, dense or with experts
"""

from __future__ import annotations

import contextlib
import dataclasses

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import moe
from layers import compile as block_compile
from layers import modules, te
from moe_kernels import ops
from options import compose
from options.schema import Config
from parallel import collectives
from parallel.collectives import ExpertExchange
from routers.router import Router
from vit import VisionTransformer
from weights import formats, preprocessing
from weights.formats import MtlFile, Weights
from weights.sources import Source

CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the compute dtype; auto is bf16 on CUDA and fp32 on CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def pick_backend(config: Config, device: torch.device) -> tuple[str, str]:
    """Return the backend and the reason for the choice; fp8 needs TransformerEngine."""
    backend, reason = te.resolve_backend(config.model.backend, device)
    if config.model.te_fp8 is not None and backend != "te":
        raise ValueError(
            f"config model.te_fp8={config.model.te_fp8}: needs backend te, not {backend} ({reason})"
        )
    return backend, reason


def block_choices(config: Config, backend: str, device: torch.device) -> dict[str, object]:
    """Return how blocks of backend torch run in training, for the log: attention kernel, compiled.

    Raises:
        ValueError: The named kernel does not work here, or fp8 does not work for these sizes.
    """
    vit, name = config.model.vit, config.model.sdpa
    if config.model.te_fp8 is not None:
        te.check_fp8_shapes(
            embed_dim=vit.embed_dim,
            hidden_dim=vit.hidden_dim,
            batch_size=config.dataset.train.batch_size,
            num_tokens=vit.num_tokens_in_training,
        )
    if backend == "te":
        if name != "auto":
            raise ValueError(f"config model.sdpa={name}: has no effect with backend te")
        return {}
    dtype = pick_dtype(config.model.dtype, device)
    head_dim, drop = vit.embed_dim // vit.num_heads, vit.attn_drop_rate
    tokens = vit.num_tokens_in_training
    usable = modules.usable_kernels(
        device=device, dtype=dtype, head_dim=head_dim, num_tokens=tokens, drop=drop
    )
    where = f"{dtype} on {device}, {tokens} tokens, heads of {head_dim}, dropout {drop:g}"
    modules.check_kernel(name, usable, where=where)
    return {"sdpa": name, "sdpa_usable": " ".join(usable), "compile": config.model.compile}


def check_compile(config: Config, *, backend: str, reason: str, device: torch.device) -> None:
    """Raise ValueError if blocks cannot be compiled: TE's layers break graphs, no compiler."""
    if not config.model.compile:
        return
    if backend == "te":
        raise ValueError(f"config model.compile=true: needs model.backend=torch, not te ({reason})")
    block_compile.check_compiler(device)


def expert_choices(config: Config, device: torch.device) -> dict[str, object]:
    """Return which kernels compute the experts, and why, for the log; empty for a dense model."""
    if not config.model.moe.num_experts:
        return {}
    backend, reason = ops.resolve_kernels(config.model.moe.kernels, device)
    return {"kernels": backend, "kernels_reason": reason}


def build_model(
    config: Config,
    *,
    backend: str,
    on_meta: bool,
    exchange: ExpertExchange | None = None,
    device: torch.device = CPU,
    sdpa: str = "auto",
) -> VisionTransformer:
    """Build the ViT, on the meta device or the CPU; its values depend on seed and names alone.

    `exchange` connects the ranks that hold the experts; None: this rank holds all of them. `device`
    is where the model will compute, which decides the expert kernels. The attention kernel is
    `sdpa`, not the option `model.sdpa`, which applies to training only.
    """
    vit, o = config.model.vit, config.model.moe
    blocks = o.expert_blocks(vit.depth)
    kernel_backend, _ = ops.resolve_kernels(o.kernels, device)

    def experts(block: int) -> nn.Module | None:
        if block not in blocks:
            return None
        return moe.MoE(
            vit.embed_dim,
            o,
            router=Router(vit.embed_dim, o),
            bias=vit.proj_bias,
            drop=vit.proj_drop_rate,
            kernel_backend=kernel_backend,
            exchange=exchange,
            sum_over_ranks=collectives.sum_over_ranks,
        )

    with torch.device("meta") if on_meta else contextlib.nullcontext():
        return VisionTransformer(
            vit, ffn=experts, seed=config.training.seed, backend=backend, sdpa=sdpa
        )


def flops_per_image(config: Config, *, training: bool = True) -> int:
    """Return the FLOPs of one image's forward pass at img_size, for MFU.

    Counts matrix products only, a multiply and an add as 2; a backward pass costs twice the
    forward. In training, patches that `patch_drop_rate` drops do not count. Whatever the backend
    and the mesh, the count is that of an unsharded torch model on the meta device.
    """
    o = config.model
    # A balance loss has no matrix product, and its sum over ranks does not work on meta tensors;
    # nor do the Triton kernels.
    silent = {name: 0.0 for name in vars(o.moe) if name.endswith("_coef")}
    counted_moe = dataclasses.replace(o.moe, kernels="torch", **silent)  # type: ignore[arg-type]
    counted = dataclasses.replace(config, model=dataclasses.replace(o, moe=counted_moe))
    model = build_model(counted, backend="torch", on_meta=True).train(training)
    image_1CHW = torch.empty(1, o.vit.in_chans, *o.vit.img_hw, device="meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(image_1CHW)
    return counter.get_total_flops()


def load_weights(model: nn.Module, source: Source) -> None:
    """Give a whole model the weights of a source.

    Raises:
        ValueError: They are not those of the model.
    """
    try:
        model.load_state_dict(source.weights(), strict=True)
    except RuntimeError as error:
        raise ValueError(f"{source.origin}: {' '.join(str(error).split())}") from error


# By a parameter, the option that makes it: its value with the parameter, and without.
_TELLTALES = {
    "cls_token": ("class_token", "true", "false"),
    "dist_token": ("distilled", "true", "false"),
    "fc_norm.weight": ("global_pool", "avg", "token"),
    "attn_pool.latent": ("global_pool", "map", "token"),
    "norm_pre.weight": ("pre_norm", "true", "false"),
    "blocks.0.ls1.gamma": ("init_values", "1e-5", "null"),
    "blocks.0.attn.q_norm.weight": ("qk_norm", "true", "false"),
    "blocks.0.attn.qkv.bias": ("qkv_bias", "true", "false"),
    "blocks.0.attn.proj.bias": ("proj_bias", "true", "false"),
}


def _advice(weights: Weights, expected: Weights) -> str:
    """Return which options would make a model of these weights, as far as names and shapes tell."""
    given = {
        option: present if name in weights else absent
        for name, (option, present, absent) in _TELLTALES.items()
        if (name in weights) != (name in expected)
    }
    for name, option, dim in (("reg_token", "reg_tokens", 1), ("head.weight", "num_classes", 0)):
        ours, theirs = (tensors.get(name) for tensors in (expected, weights))
        sizes = [0 if tensor is None else tensor.shape[dim] for tensor in (ours, theirs)]
        if sizes[0] != sizes[1]:
            given[option] = str(sizes[1])
    return "".join(f" model.vit.{option}={value}" for option, value in given.items())


def name_options(source: Source, config_name: str, overrides: list[str]) -> Source:
    """Return `source` with the options of a recipe, if its names and shapes are that model's.

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
            # M3ViT's encoder ends with its blocks; whoever loads the export adds a head.
            if not (isinstance(source.content, MtlFile) and formats.is_top(name)):
                problems.append(f"missing {name}")
        elif name not in expected:
            problems.append(f"unexpected {name}")
        elif expected[name].shape != weights[name].shape:
            shapes = f"{tuple(weights[name].shape)}, not {tuple(expected[name].shape)}"
            problems.append(f"{name} is {shapes}")
    if problems:
        advice = _advice(weights, expected)
        fix = f"; it may be one with{advice}" if advice else ""
        raise ValueError(f"{source.origin} is no {config_name}: {formats.listed(problems)}{fix}")
    options, notes = dataclasses.asdict(config), source.notes
    asked = preprocessing.of_options(options)
    if differs := preprocessing.differences(source.preprocessing, asked):
        notes = (*notes, f"{source.origin}: {differs}")
    return dataclasses.replace(source, content=weights, config=options, notes=notes)
