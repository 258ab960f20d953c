"""TransformerEngine: whether it is usable, its fp8 recipes, and the names of its fused layers.

    model.backend -> resolve_backend -> torch | te
    te's parameter names -> canonical_name -> those of the torch backend, timm and checkpoints

No other file imports transformer_engine; this one does so in `transformer_engine()`.
"""

import contextlib
import importlib
import re
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor, nn

FP8_MULTIPLE = 16  # cuBLAS's fp8 GEMMs need every dimension to be a multiple of 16


def transformer_engine() -> ModuleType:
    """Return `transformer_engine.pytorch`.

    Raises:
        ImportError: it is missing or broken; the message gives the reason.
    """
    try:
        return importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        raise ImportError(
            f"config model.backend=te: transformer_engine.pytorch does not import ({error}); "
            "install it or use backend=torch"
        ) from error


def resolve_backend(backend: str, device: torch.device) -> tuple[str, str]:
    """Return the backend to build for `device`, and the reason for the choice, for the log.

    Raises:
        ValueError: `te` is named, without CUDA.
        ImportError: `te` is named and does not import.
    """
    if backend == "torch":
        return "torch", "as configured"
    if device.type != "cuda":
        if backend == "te":
            raise ValueError(
                f"config model.backend=te: TransformerEngine needs CUDA, device is {device} "
                "(use torch or auto)"
            )
        return "torch", f"auto: TransformerEngine needs CUDA, device is {device}"
    try:
        transformer_engine()
    except ImportError as error:
        if backend == "te":
            raise
        return "torch", f"auto: {error}"
    return "te", "as configured" if backend == "te" else "auto: CUDA, and TransformerEngine imports"


def fp8_context(recipe_name: str | None) -> contextlib.AbstractContextManager[None]:
    """Return a context in which TE layers run their matrix products in fp8; None: no change.

    Enter it for the forward pass only: backward follows what its forward did. Numbers are e4m3 in
    the forward pass, gradients e5m2.
    """
    if recipe_name is None:
        return contextlib.nullcontext()
    te = transformer_engine()
    recipes = importlib.import_module("transformer_engine.common.recipe")
    kinds = {"delayed": recipes.DelayedScaling, "current": recipes.Float8CurrentScaling}
    return te.autocast(enabled=True, recipe=kinds[recipe_name]())


def check_fp8_shapes(*, embed_dim: int, hidden_dim: int, batch_size: int, num_tokens: int) -> None:
    """Raise ValueError if a width, or batch_size * num_tokens, is no size for fp8 products."""
    sizes = {
        "model.vit.embed_dim": (embed_dim, embed_dim),
        "model.vit.mlp_ratio": (hidden_dim / embed_dim, hidden_dim),
        "dataset.train.batch_size": (batch_size, batch_size * num_tokens),
    }
    for field, (value, size) in sizes.items():
        if size % FP8_MULTIPLE:
            raise ValueError(
                f"config {field}={value:g}: te_fp8 needs multiples of {FP8_MULTIPLE}, this gives "
                f"{size} (tokens per image: {num_tokens})"
            )


def canonical_name(parameter_name: str) -> str:
    """Return a parameter's name in the torch backend, in timm and in checkpoints.

    `blocks.0.attn.qkv.layer_norm_weight` -> `blocks.0.norm1.weight`, and fc1 -> norm2 likewise;
    other names do not change.
    """
    # TE fuses the LayerNorm into the linear layer behind it, which then owns the norm's parameters.
    # The lookbehind matches whole path components only: not `super_attn.qkv`.
    name = re.sub(r"(?<![^.])attn\.qkv\.layer_norm_(?=weight$|bias$)", "norm1.", parameter_name)
    return re.sub(r"(?<![^.])mlp\.fc1\.layer_norm_(?=weight$|bias$)", "norm2.", name)


def _is_extra_state(name: str) -> bool:
    # TE's fp8 scaling history: a few steps rebuild it, and the torch backend could not load it.
    return name.endswith("._extra_state")


def _rename_saved(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, _: dict[str, int]
) -> None:
    for key in [key for key in state_dict if key.startswith(prefix)]:
        value = state_dict.pop(key)
        if not _is_extra_state(key):
            state_dict[prefix + canonical_name(key[len(prefix) :])] = value


def _rename_loaded(
    module: nn.Module, state_dict: dict[str, Tensor], prefix: str, *_: object
) -> None:
    for name, _parameter in module.named_parameters():
        if canonical_name(name) != name and prefix + canonical_name(name) in state_dict:
            state_dict[prefix + name] = state_dict.pop(prefix + canonical_name(name))


class _IncompatibleKeys(Protocol):
    missing_keys: list[str]


def _forget_extra_state(module: nn.Module, incompatible_keys: _IncompatibleKeys) -> None:
    kept = [key for key in incompatible_keys.missing_keys if not _is_extra_state(key)]
    incompatible_keys.missing_keys[:] = kept


def use_canonical_state_dict(block: nn.Module) -> None:
    """Make a TE block's state_dict() and load_state_dict() use the torch backend's names."""
    block.register_state_dict_post_hook(_rename_saved)
    block.register_load_state_dict_pre_hook(_rename_loaded)
    block.register_load_state_dict_post_hook(_forget_extra_state)


def attention_core(num_heads: int, head_dim: int, *, drop: float) -> nn.Module:
    """Return TE's attention without a mask or parameters: q, k, v BLAK -> BLD."""
    return transformer_engine().DotProductAttention(
        num_heads,
        head_dim,
        attention_dropout=drop,
        qkv_format="bshd",
        attn_mask_type="no_mask",
    )
