"""Layers of the ViT for backend `torch` or `te`, with the same parameter names and numbers.

    x_BLD -> qkv (te: LayerNorm fused in) -> q, k, v BLAK -> fused attention -> proj -> x_BLD
    x_BLD -> fc1 (te: LayerNorm fused in) -> exact GELU -> fc2 -> x_BLD

The only file that imports transformer_engine, in `transformer_engine()`. What is fused is hidden
from everyone else by `canonical_name` and `use_canonical_state_dict`. No blocks, no model here.
"""

import contextlib
import importlib
import re
from types import ModuleType
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from layers import sdpa

BACKENDS = ("torch", "te")
FP8_RECIPES = ("delayed", "current")
LAYER_NORM_EPS = 1e-6  # timm's, and what pretrained weights expect; torch's default is 1e-5
FP8_MULTIPLE = 16  # cuBLAS fp8 GEMMs want every dimension in multiples of 16


def transformer_engine() -> ModuleType:
    """Return `transformer_engine.pytorch`.

    Raises:
        ImportError: it is not installed, or it is broken; the message has the reason.
    """
    try:
        return importlib.import_module("transformer_engine.pytorch")
    except (ImportError, OSError, RuntimeError, AssertionError) as error:
        raise ImportError(
            f"config model.backend=te: transformer_engine.pytorch does not import ({error}); "
            "install it or use backend=torch"
        ) from error


def resolve_backend(backend: str, device: torch.device) -> tuple[str, str]:
    """Return the backend to build for `device`, and the reason for the choice, to be logged.

    Raises:
        ValueError: unknown backend, or `te` without CUDA.
        ImportError: `te` was asked for by name and does not import.
    """
    if backend not in ("auto", *BACKENDS):
        raise ValueError(f"config model.backend={backend}: must be auto, torch or te")
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
    """Return the context in which TE layers run their matrix products in fp8; None: no change.

    Enter it around the forward pass only. Formats: e4m3 forward, e5m2 for gradients.

    Raises:
        ValueError: the recipe is not one of FP8_RECIPES.
    """
    if recipe_name is None:
        return contextlib.nullcontext()
    if recipe_name not in FP8_RECIPES:
        raise ValueError(f"config model.te_fp8={recipe_name}: must be null, delayed or current")
    te = transformer_engine()
    recipes = importlib.import_module("transformer_engine.common.recipe")
    kinds = {"delayed": recipes.DelayedScaling, "current": recipes.Float8CurrentScaling}
    return te.autocast(enabled=True, recipe=kinds[recipe_name]())


def check_fp8_shapes(*, embed_dim: int, hidden_dim: int, batch_size: int, num_tokens: int) -> None:
    """Refuse sizes whose matrix products cannot run in fp8.

    Raises:
        ValueError: a width, or batch_size * num_tokens, is not a multiple of 16.
    """
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
    """Return the name under which the torch backend, timm and checkpoints know a parameter.

    `blocks.0.attn.qkv.layer_norm_weight` -> `blocks.0.norm1.weight`, and fc1 -> norm2 likewise.
    Any other name is returned as it is.
    """
    name = re.sub(r"(?<![^.])attn\.qkv\.layer_norm_(?=weight$|bias$)", "norm1.", parameter_name)
    return re.sub(r"(?<![^.])mlp\.fc1\.layer_norm_(?=weight$|bias$)", "norm2.", name)


def _is_extra_state(name: str) -> bool:
    return name.endswith("._extra_state")  # TE's fp8 scaling history, rebuilt within steps


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
    """Make state_dict() and load_state_dict() of a TE block use the names of the torch backend."""
    block.register_state_dict_post_hook(_rename_saved)
    block.register_load_state_dict_pre_hook(_rename_loaded)
    block.register_load_state_dict_post_hook(_forget_extra_state)


def _unfilled(meta_module: nn.Module) -> nn.Module:
    """Move a module built on meta to the default device: init.attach fills it, once."""
    return meta_module.to_empty(device=torch.get_default_device())


def linear(
    in_dim: int, out_dim: int, *, bias: bool, backend: str = "torch", has_norm: bool = False
) -> nn.Module:
    """Return a linear layer with values not set yet; te: with a LayerNorm before it if `has_norm`.

    Shapes: [..., in_dim] -> [..., out_dim]
    """
    if backend == "torch":
        assert not has_norm, "only TE has a fused LayerNorm + Linear"
        return _unfilled(nn.Linear(in_dim, out_dim, bias=bias, device="meta"))
    te = transformer_engine()
    if not has_norm:
        return _unfilled(te.Linear(in_dim, out_dim, bias=bias, device="meta"))
    return _unfilled(
        te.LayerNormLinear(in_dim, out_dim, eps=LAYER_NORM_EPS, bias=bias, device="meta")
    )


def layer_norm(dim: int) -> nn.Module:
    """Return a LayerNorm over the last dimension, for where TE has nothing to fuse it with."""
    return nn.LayerNorm(dim, eps=LAYER_NORM_EPS)


def through(module: nn.Module | None, x: Tensor) -> Tensor:
    """Return module(x), or x for a module that the options turn off."""
    return x if module is None else module(x)


class LayerScale(nn.Module):
    """Multiplies each channel by a learnt factor. Source: arXiv 2103.17239, eq. 4."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(dim))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return x_BLD * gamma_D."""
        return x_BLD * self.gamma


class ScaledDotProduct(nn.Module):
    """Softmax attention without a mask, in fused kernels. Owns no parameters.

    TE's kernels are for 16-bit numbers; elsewhere it would build the L x L softmax in Python, so
    there torch's are used with either backend, and among them `kernel`, see sdpa.py.
    """

    def __init__(
        self, *, drop: float, kernel: str = "auto", te_core: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.drop = drop
        self.kernel = kernel
        self.te_core = te_core

    def forward(self, q_BLAK: Tensor, k_BLAK: Tensor, v_BLAK: Tensor) -> Tensor:
        """Return softmax(q k^T / sqrt(K)) v with heads side by side: BLAK, BLAK, BLAK -> BLD."""
        if self.te_core is not None and q_BLAK.dtype in (torch.float16, torch.bfloat16):
            return self.te_core(q_BLAK, k_BLAK, v_BLAK)
        with sdpa.only(self.kernel):
            y_BALK = functional.scaled_dot_product_attention(
                q_BLAK.transpose(1, 2),
                k_BLAK.transpose(1, 2),
                v_BLAK.transpose(1, 2),
                dropout_p=self.drop if self.training else 0.0,
            )
        return y_BALK.transpose(1, 2).flatten(2)


def _te_attention(num_heads: int, head_dim: int, *, drop: float) -> nn.Module:
    return transformer_engine().DotProductAttention(
        num_heads,
        head_dim,
        attention_dropout=drop,
        qkv_format="bshd",
        attn_mask_type="no_mask",
    )


class Attention(nn.Module):
    """Multi-head self-attention; with backend te, the LayerNorm before it is part of `qkv`."""

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        qkv_bias: bool = True,
        qk_norm: bool = False,
        scale_norm: bool = False,
        proj_bias: bool = True,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        kernel: str = "auto",
        backend: str = "torch",
    ) -> None:
        super().__init__()
        self.head_shape = (num_heads, dim // num_heads)
        self.qkv = linear(dim, 3 * dim, bias=qkv_bias, backend=backend, has_norm=backend == "te")
        self.q_norm = layer_norm(dim // num_heads) if qk_norm else None
        self.k_norm = layer_norm(dim // num_heads) if qk_norm else None
        te_core = _te_attention(*self.head_shape, drop=attn_drop) if backend == "te" else None
        self.core = ScaledDotProduct(drop=attn_drop, kernel=kernel, te_core=te_core)
        self.norm = layer_norm(dim) if scale_norm else None
        self.proj = linear(dim, dim, bias=proj_bias, backend=backend)
        self.proj_drop = nn.Dropout(proj_drop) if proj_drop > 0 else None

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the attention branch: x_BLD -> x_BLD."""
        qkv_BL3AK = self.qkv(x_BLD).unflatten(-1, (3, *self.head_shape))
        q_BLAK, k_BLAK, v_BLAK = qkv_BL3AK.unbind(2)
        q_BLAK, k_BLAK = through(self.q_norm, q_BLAK), through(self.k_norm, k_BLAK)
        x_BLD = through(self.norm, self.core(q_BLAK, k_BLAK, v_BLAK))
        return through(self.proj_drop, self.proj(x_BLD))


class Mlp(nn.Module):
    """Two linear layers with an exact-erf GELU between; te: LayerNorm part of fc1 if `has_norm`.

    TE's LayerNormMLP is not used: its GELU is the tanh approximation, 5e-4 off the erf that timm
    weights were trained with.
    """

    def __init__(
        self,
        dim: int,
        hidden_dim: int,
        *,
        bias: bool = True,
        scale_norm: bool = False,
        drop: float = 0.0,
        backend: str = "torch",
        has_norm: bool = False,
    ) -> None:
        super().__init__()
        self.fc1 = linear(dim, hidden_dim, bias=bias, backend=backend, has_norm=has_norm)
        self.drop1 = nn.Dropout(drop) if drop > 0 else None
        self.norm = layer_norm(hidden_dim) if scale_norm else None
        self.fc2 = linear(hidden_dim, dim, bias=bias, backend=backend)
        self.drop2 = nn.Dropout(drop) if drop > 0 else None
        self.flops_per_token = 4 * dim * hidden_dim

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the feed-forward branch: x_BLD -> x_BLD."""
        h_BLF = through(self.drop1, functional.gelu(self.fc1(x_BLD)))
        return through(self.drop2, self.fc2(through(self.norm, h_BLF)))


class AttentionPool(nn.Module):
    """Pools tokens by the attention of one learnt query. Source: arXiv 2106.04560, section 2.2."""

    def __init__(self, dim: int, num_heads: int, *, mlp_ratio: float) -> None:
        super().__init__()
        self.head_shape = (num_heads, dim // num_heads)
        self.latent = nn.Parameter(torch.empty(1, 1, dim))
        self.q = linear(dim, dim, bias=True)
        self.kv = linear(dim, 2 * dim, bias=True)
        self.core = ScaledDotProduct(drop=0.0)
        self.proj = linear(dim, dim, bias=True)
        self.norm = layer_norm(dim)
        self.mlp = Mlp(dim, int(dim * mlp_ratio))

    def flops(self, num_tokens: int) -> int:
        """Return the FLOPs of pooling one image's `num_tokens` tokens."""
        dim = self.latent.shape[-1]
        query_and_proj, key_and_value, attention = 4 * dim * dim, 4 * dim * dim, 4 * dim
        one = query_and_proj + self.mlp.flops_per_token
        return one + num_tokens * (key_and_value + attention)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return one vector per image: x_BLD -> x_BD."""
        q_1LAK = self.q(self.latent).unflatten(-1, self.head_shape)
        k_BLAK, v_BLAK = self.kv(x_BLD).unflatten(-1, (2, *self.head_shape)).unbind(2)
        x_BLD = self.proj(self.core(q_1LAK.expand(x_BLD.shape[0], -1, -1, -1), k_BLAK, v_BLAK))
        return (x_BLD + self.mlp(self.norm(x_BLD)))[:, 0]


class PatchProjection(nn.Conv2d):
    """The patch embedding's convolution, as one matrix product over non-overlapping patches.

    A Conv2d for its parameters' names and shapes. The product needs one copy of the image and gives
    tokens in their final layout, where a convolution's output must be transposed.
    """

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Return one token per patch, row by row: image_BCHW -> x_BLD."""
        (_, channels, height, width), (patch_h, patch_w) = image_BCHW.shape, self.kernel_size
        grid = (height // patch_h, width // patch_w)
        patch_BCHPWP = image_BCHW.view(-1, channels, grid[0], patch_h, grid[1], patch_w)
        patch_BHWCPP = patch_BCHPWP.permute(0, 2, 4, 1, 3, 5)
        patch_BLX = patch_BHWCPP.reshape(-1, grid[0] * grid[1], channels * patch_h * patch_w)
        return functional.linear(patch_BLX, self.weight.flatten(1), self.bias)


class PatchEmbed(nn.Module):
    """Cuts images into patches and projects each to a token."""

    def __init__(
        self, dim: int, in_chans: int, *, patch_hw: tuple[int, int], bias: bool, is_padded: bool
    ) -> None:
        super().__init__()
        self.patch_hw = patch_hw
        self.is_padded = is_padded
        projection = PatchProjection(
            in_chans, dim, kernel_size=patch_hw, stride=patch_hw, bias=bias, device="meta"
        )
        self.proj = _unfilled(projection)

    def grid_hw(self, height_px: int, width_px: int) -> tuple[int, int]:
        """Return the number of patches down and across of an image of this size."""
        return -(-height_px // self.patch_hw[0]), -(-width_px // self.patch_hw[1])

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Return image_BCHW -> x_BLD; zeros are added below and to the right if `is_padded`."""
        height_px, width_px = image_BCHW.shape[2:]
        grid_h, grid_w = self.grid_hw(height_px, width_px)
        add_h, add_w = grid_h * self.patch_hw[0] - height_px, grid_w * self.patch_hw[1] - width_px
        if self.is_padded and (add_h or add_w):
            image_BCHW = functional.pad(image_BCHW, (0, add_w, 0, add_h))
        return self.proj(image_BCHW)
