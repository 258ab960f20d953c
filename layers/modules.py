"""Layers of the ViT for backend `torch` or `te`, with the same parameter names and numbers.

    x_BLD -> qkv (te: LayerNorm fused in) -> q, k, v BLAK -> fused attention -> proj -> x_BLD
    x_BLD -> fc1 (te: LayerNorm fused in) -> exact GELU -> fc2 -> x_BLD

layers/te.py hides what TransformerEngine fuses from the rest of the code. No blocks or model here.
"""

import contextlib
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from layers import te
from options.schema import ViTOptions

LAYER_NORM_EPS = 1e-6  # timm's, and what pretrained weights expect; torch's default is 1e-5


def _unfilled(meta_module: nn.Module) -> nn.Module:
    """Move a module built on meta to the default device, without torch's own initialisation.

    init.attach sets every value later: drawing torch's first would cost time for nothing.
    """
    return meta_module.to_empty(device=torch.get_default_device())


def linear(
    in_dim: int, out_dim: int, *, bias: bool, backend: str = "torch", has_norm: bool = False
) -> nn.Module:
    """Return an uninitialised linear layer; with `has_norm`, TE's with a LayerNorm fused before it.

    Shapes: [..., in_dim] -> [..., out_dim]
    """
    if backend == "torch":
        assert not has_norm, "only TE has a fused LayerNorm + Linear"
        return _unfilled(nn.Linear(in_dim, out_dim, bias=bias, device="meta"))
    engine = te.transformer_engine()
    if not has_norm:
        return _unfilled(engine.Linear(in_dim, out_dim, bias=bias, device="meta"))
    return _unfilled(
        engine.LayerNormLinear(in_dim, out_dim, eps=LAYER_NORM_EPS, bias=bias, device="meta")
    )


def layer_norm(dim: int) -> nn.Module:
    """Return a LayerNorm over the last dimension, for places where TE has none to fuse."""
    return nn.LayerNorm(dim, eps=LAYER_NORM_EPS)


def through(module: nn.Module | None, x: Tensor) -> Tensor:
    """Return module(x), or x if the options turn the module off."""
    return x if module is None else module(x)


class LayerScale(nn.Module):
    """Multiplies each channel by a learnt factor. Source: arXiv 2103.17239, eq. 4."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.empty(dim))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return x_BLD * gamma_D."""
        return x_BLD * self.gamma


KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def only(name: str) -> contextlib.AbstractContextManager[None]:
    """Return a context in which attention runs in kernel `name` or fails; auto: torch chooses.

    The backward pass uses its forward pass's kernel, even when it runs outside of the context.
    """
    return contextlib.nullcontext() if name == "auto" else sdpa_kernel(KERNELS[name])


def _works(name: str, shape_BLAK: tuple[int, ...], drop: float, like: torch.Tensor) -> bool:
    """Return whether a kernel computes attention forward and backward, by trying it."""
    x_BLAK = like.new_zeros(shape_BLAK).requires_grad_()
    q_BALK = x_BLAK.transpose(1, 2)
    try:
        # torch warns why each kernel cannot be used before it raises.
        with warnings.catch_warnings(action="ignore"), only(name):
            y_BALK = functional.scaled_dot_product_attention(q_BALK, q_BALK, q_BALK, dropout_p=drop)
        y_BALK.sum().backward()
        y_BALK.sum().item()  # wait: an error on the device surfaces only at a synchronisation
    except RuntimeError:
        return False
    return True


def usable_kernels(
    *, device: torch.device, dtype: torch.dtype, head_dim: int, num_tokens: int, drop: float = 0.0
) -> tuple[str, ...]:
    """Return the kernels that can compute such attention on the device, by trying each.

    `drop` is the dropout on attention weights, which some kernels do not support.
    """
    like = torch.empty(0, device=device, dtype=dtype)
    shape_BLAK = (2, num_tokens, 2, head_dim)
    return tuple(name for name in KERNELS if _works(name, shape_BLAK, drop, like))


def check_kernel(name: str, usable: tuple[str, ...], *, where: str) -> None:
    """Raise ValueError unless kernel `name` is usable; `where` completes the message."""
    if name != "auto" and name not in usable:
        raise ValueError(
            f"config model.sdpa={name}: does not work for {where} (use auto, {', '.join(usable)})"
        )


class ScaledDotProduct(nn.Module):
    """Softmax attention without a mask, in fused kernels. Owns no parameters.

    TE has fused kernels for 16-bit dtypes only and would build the L x L softmax in Python for
    others. Those go to torch's kernels with either backend; `kernel` picks one, see `only`.
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
        with only(self.kernel):
            y_BALK = functional.scaled_dot_product_attention(
                q_BLAK.transpose(1, 2),
                k_BLAK.transpose(1, 2),
                v_BLAK.transpose(1, 2),
                dropout_p=self.drop if self.training else 0.0,
            )
        return y_BALK.transpose(1, 2).flatten(2)


class Attention(nn.Module):
    """Multi-head self-attention; with backend te, `qkv` contains the LayerNorm before it."""

    def __init__(self, o: ViTOptions, *, kernel: str = "auto", backend: str = "torch") -> None:
        super().__init__()
        dim, is_te = o.embed_dim, backend == "te"
        self.head_shape = (o.num_heads, dim // o.num_heads)
        self.qkv = linear(dim, 3 * dim, bias=o.qkv_bias, backend=backend, has_norm=is_te)
        self.q_norm = layer_norm(self.head_shape[1]) if o.qk_norm else None
        self.k_norm = layer_norm(self.head_shape[1]) if o.qk_norm else None
        te_core = te.attention_core(*self.head_shape, drop=o.attn_drop_rate) if is_te else None
        self.core = ScaledDotProduct(drop=o.attn_drop_rate, kernel=kernel, te_core=te_core)
        self.norm = layer_norm(dim) if o.scale_attn_norm else None
        self.proj = linear(dim, dim, bias=o.proj_bias, backend=backend)
        self.proj_drop = nn.Dropout(o.proj_drop_rate) if o.proj_drop_rate > 0 else None

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the attention branch: x_BLD -> x_BLD."""
        qkv_BL3AK = self.qkv(x_BLD).unflatten(-1, (3, *self.head_shape))
        q_BLAK, k_BLAK, v_BLAK = qkv_BL3AK.unbind(2)
        q_BLAK, k_BLAK = through(self.q_norm, q_BLAK), through(self.k_norm, k_BLAK)
        x_BLD = through(self.norm, self.core(q_BLAK, k_BLAK, v_BLAK))
        return through(self.proj_drop, self.proj(x_BLD))


class Mlp(nn.Module):
    """Two linear layers with an exact-erf GELU between; with te, fc1 contains the LayerNorm before.

    TE's LayerNormMLP would not do: its GELU is the tanh approximation, 5e-4 off the erf that timm's
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
    ) -> None:
        super().__init__()
        self.fc1 = linear(dim, hidden_dim, bias=bias, backend=backend, has_norm=backend == "te")
        self.drop1 = nn.Dropout(drop) if drop > 0 else None
        self.norm = layer_norm(hidden_dim) if scale_norm else None
        self.fc2 = linear(hidden_dim, dim, bias=bias, backend=backend)
        self.drop2 = nn.Dropout(drop) if drop > 0 else None

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the feed-forward branch: x_BLD -> x_BLD."""
        h_BLF = through(self.drop1, functional.gelu(self.fc1(x_BLD)))
        return through(self.drop2, self.fc2(through(self.norm, h_BLF)))


class AttentionPool(nn.Module):
    """Pools tokens by attention from one learnt query. Source: arXiv 2106.04560, section 2.2."""

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

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return one vector per image: x_BLD -> x_BD."""
        q_1LAK = self.q(self.latent).unflatten(-1, self.head_shape)
        k_BLAK, v_BLAK = self.kv(x_BLD).unflatten(-1, (2, *self.head_shape)).unbind(2)
        x_BLD = self.proj(self.core(q_1LAK.expand(x_BLD.shape[0], -1, -1, -1), k_BLAK, v_BLAK))
        return (x_BLD + self.mlp(self.norm(x_BLD)))[:, 0]


class PatchProjection(nn.Conv2d):
    """The patch embedding's convolution, computed as one matrix product over the patches.

    It derives from Conv2d for the names and shapes of the parameters. The product copies the image
    once and yields tokens in their final layout; a convolution's output would need a transpose.
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
        """Return image_BCHW -> x_BLD; `is_padded` adds zeros below and to the right."""
        height_px, width_px = image_BCHW.shape[2:]
        grid_h, grid_w = self.grid_hw(height_px, width_px)
        add_h, add_w = grid_h * self.patch_hw[0] - height_px, grid_w * self.patch_hw[1] - width_px
        if self.is_padded and (add_h or add_w):
            image_BCHW = functional.pad(image_BCHW, (0, add_w, 0, add_h))
        return self.proj(image_BCHW)
