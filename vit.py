"""The Vision Transformer, with timm's parameter names, shapes, numbers and options.

    image_BCHW -> patch_embed -> + cls, reg, pos -> blocks -> norm -> pool -> head -> logits_BY

The caller passes a factory for the blocks' feed-forwards, and so decides which are dense and which
have experts. Nothing here knows about devices, ranks or the options of a run beyond ViTOptions.
Source: arXiv 2010.11929; timm 1.0.31.
"""

import math
from collections.abc import Callable

import timm.layers
import torch
from torch import Tensor, nn

from layers import init, modules, recompute, te
from layers.modules import through
from options.checks import check_vit
from options.schema import ViTOptions


class DropPath(timm.layers.DropPath):
    """Drops the branch for random images in training and scales up the rest: x_BLD -> x_BLD.

    In a compiled block the rate is a tensor, so that blocks with different rates share one graph;
    the random draws then differ from timm's. Source: stochastic depth, arXiv 1603.09382.
    """

    def __init__(self, rate: float) -> None:
        super().__init__(rate)
        # Not a buffer: it stays on the host, because a kernel takes a 0-d CPU tensor as an argument
        # without a copy to the device.
        self.keep = torch.tensor(1 - rate, dtype=torch.float32, device="cpu")

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return x with the rows of the dropped images set to zero: x_BLD -> x_BLD."""
        if not torch.compiler.is_compiling():
            return super().forward(x)
        if not self.training:
            return x
        is_kept_B11 = torch.rand(len(x), 1, 1, device=x.device) < self.keep
        return x * (is_kept_B11 / self.keep).to(x.dtype)


def drop_path_rates(o: ViTOptions) -> list[float]:
    """Return each block's stochastic depth rate: linear from 0 to drop_path_rate, or uniform."""
    if o.drop_path_uniform:
        return [o.drop_path_rate] * o.depth
    return torch.linspace(0, o.drop_path_rate, o.depth, device="cpu").tolist()


def _require(is_ok: bool, option: str, value: object, problem: str) -> None:
    if not is_ok:
        raise ValueError(f"config model.vit.{option}={value}: {problem}")


class Block(nn.Module):
    """Pre-norm transformer block: x + attention branch, then x + feed-forward branch.

    It is the unit of sharding, recomputation and compilation. Megatron-FSDP gathers a block's
    parameters in a hook before Block.forward and frees them after it, so no code outside of
    Block.forward may read them.
    """

    def __init__(
        self, o: ViTOptions, *, drop_path: float, ffn: nn.Module | None, backend: str, sdpa: str
    ) -> None:
        super().__init__()
        is_te, dim = backend == "te", o.embed_dim
        self.norm1 = None if is_te else modules.layer_norm(dim)
        self.attn = modules.Attention(o, kernel=sdpa, backend=backend)
        self.ls1 = None if o.init_values is None else modules.LayerScale(dim)
        self.norm2 = None if is_te and ffn is None else modules.layer_norm(dim)
        self.mlp = _dense_mlp(o, backend) if ffn is None else ffn
        self.ls2 = None if o.init_values is None else modules.LayerScale(dim)
        self.drop_path = DropPath(drop_path) if drop_path > 0 else None
        if is_te:
            te.use_canonical_state_dict(self)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the block's output: x_BLD -> x_BLD. If a norm is None, TE's layer contains it."""
        y_BLD = through(self.ls1, self.attn(through(self.norm1, x_BLD)))
        x_BLD = x_BLD + through(self.drop_path, y_BLD)
        y_BLD = through(self.ls2, self.mlp(through(self.norm2, x_BLD)))
        return x_BLD + through(self.drop_path, y_BLD)


def _dense_mlp(o: ViTOptions, backend: str) -> nn.Module:
    return modules.Mlp(
        o.embed_dim,
        o.hidden_dim,
        bias=o.proj_bias,
        scale_norm=o.scale_mlp_norm,
        drop=o.proj_drop_rate,
        backend=backend,
    )


class VisionTransformer(nn.Module):
    """Vision Transformer classifier; state_dict() has timm's keys and shapes with either backend.

    Args:
        options: the network; options/schema.py says what each option means.
        ffn: block index -> its feed-forward (x_BLD -> x_BLD), or None for the dense MLP. A
            feed-forward handles its own bias and dropout. If one of its modules owns tensors other
            than a plain `weight` and `bias`, that module must be an init.HasInitialValue.
        seed: with the parameter's name it fixes each initial value, on any device.
        backend: "torch" or "te", see te.resolve_backend.
        sdpa: the blocks' attention kernel, "auto" or one of modules.KERNELS; backend torch only.

    If `distilled_training` is set, the model in training returns each head's logits.

    Raises:
        ValueError: an option has an impossible value, or no effect given the others.
    """

    def __init__(
        self,
        options: ViTOptions,
        *,
        ffn: Callable[[int], nn.Module | None] | None = None,
        seed: int = 0,
        backend: str = "torch",
        sdpa: str = "auto",
    ) -> None:
        super().__init__()
        check_vit(options)
        if backend not in ("torch", "te"):
            raise ValueError(f"config model.backend={backend}: must be torch or te here")
        if sdpa not in ("auto", *modules.KERNELS):
            names = ", ".join(modules.KERNELS)
            raise ValueError(f"config model.sdpa={sdpa}: must be one of auto, {names}")
        self.options, self.backend = options, backend
        self._build_stem(options)
        self.blocks = nn.ModuleList(
            Block(options, drop_path=rate, ffn=ffn and ffn(i), backend=backend, sdpa=sdpa)
            for i, rate in enumerate(drop_path_rates(options))
        )
        self._build_top(options)
        self.distilled_training = False
        init.attach(self, options, seed=seed)

    def _build_stem(self, o: ViTOptions) -> None:
        dim = o.embed_dim
        self.patch_embed = modules.PatchEmbed(
            dim, o.in_chans, patch_hw=o.patch_hw, bias=not o.pre_norm, is_padded=o.dynamic_img_pad
        )
        self.cls_token = nn.Parameter(torch.empty(1, 1, dim)) if o.class_token else None
        self.dist_token = nn.Parameter(torch.empty(1, 1, dim)) if o.distilled else None
        self.reg_token = nn.Parameter(torch.empty(1, o.reg_tokens, dim)) if o.reg_tokens else None
        num_pos = math.prod(o.grid_hw) + o.num_pos_prefix
        # A fixed embedding is a parameter too, so that checkpoints contain it under timm's name.
        self.pos_embed = (
            None
            if o.pos_embed == "none"
            else nn.Parameter(torch.empty(1, num_pos, dim), requires_grad=o.pos_embed == "learn")
        )
        self.pos_drop = nn.Dropout(o.pos_drop_rate) if o.pos_drop_rate > 0 else None
        drops = o.patch_drop_rate > 0
        self.patch_drop = (
            timm.layers.PatchDropout(o.patch_drop_rate, o.num_prefix_tokens) if drops else None
        )
        self.norm_pre = modules.layer_norm(dim) if o.pre_norm else None

    def _build_top(self, o: ViTOptions) -> None:
        dim, is_after = o.embed_dim, o.is_norm_after_pool
        self.norm = modules.layer_norm(dim) if o.final_norm and not is_after else None
        is_map = o.global_pool == "map"
        self.attn_pool = (
            modules.AttentionPool(dim, o.num_heads, mlp_ratio=o.mlp_ratio) if is_map else None
        )
        self.fc_norm = modules.layer_norm(dim) if o.final_norm and is_after else None
        self.head_drop = nn.Dropout(o.drop_rate) if o.drop_rate > 0 else None
        self.head = modules.linear(dim, o.num_classes, bias=True) if o.num_classes else None
        has_second = o.distilled and self.head is not None
        self.head_dist = modules.linear(dim, o.known_classes, bias=True) if has_second else None

    def _check_image(self, image_BCHW: Tensor) -> None:
        o = self.options
        size_CHW = tuple(image_BCHW.shape[1:])
        _require(size_CHW[0] == o.in_chans, "in_chans", o.in_chans, f"got an image of {size_CHW}")
        if not o.dynamic_img_size:
            fits = size_CHW[1:] == o.img_hw
            hint = "(dynamic_img_size=true takes any size)"
            _require(fits, "img_size", o.img_size, f"got an image of {size_CHW} {hint}")
        elif not o.dynamic_img_pad:
            fits = size_CHW[1] % o.patch_hw[0] == 0 and size_CHW[2] % o.patch_hw[1] == 0
            hint = "(dynamic_img_pad=true takes any size)"
            _require(fits, "patch_size", o.patch_size, f"does not divide {size_CHW} {hint}")

    def _positions(self, image_BCHW: Tensor) -> Tensor | None:
        if self.pos_embed is None or not self.options.dynamic_img_size:
            return self.pos_embed
        return timm.layers.resample_abs_pos_embed(
            self.pos_embed,
            new_size=list(self.patch_embed.grid_hw(*image_BCHW.shape[2:])),
            old_size=list(self.options.grid_hw),
            num_prefix_tokens=self.options.num_pos_prefix,
        )

    def embed(self, image_BCHW: Tensor) -> Tensor:
        """Return the tokens that enter the first block: image_BCHW -> x_BLD, prefix first."""
        self._check_image(image_BCHW)
        x_BLD = self.patch_embed(image_BCHW)
        pos_1LD = self._positions(image_BCHW)
        if pos_1LD is not None and self.options.no_embed_class:
            x_BLD = x_BLD + pos_1LD
        tokens = (self.cls_token, self.dist_token, self.reg_token)
        prefix = [token for token in tokens if token is not None]
        if prefix:
            x_BLD = torch.cat([*(t.expand(len(x_BLD), -1, -1) for t in prefix), x_BLD], dim=1)
        if pos_1LD is not None and not self.options.no_embed_class:
            x_BLD = x_BLD + pos_1LD
        x_BLD = through(self.patch_drop, through(self.pos_drop, x_BLD))
        return through(self.norm_pre, x_BLD)

    def pool(self, x_BLD: Tensor) -> Tensor:
        """Return one vector per image, x_BLD -> x_BD; for pool "" return all tokens unchanged."""
        kind = self.options.global_pool
        if kind == "":
            return x_BLD
        if kind == "token":
            return x_BLD[:, 0]
        x_BLD = x_BLD[:, self.options.num_prefix_tokens :]
        if self.attn_pool is not None:
            return self.attn_pool(x_BLD)
        if kind == "avg":
            return x_BLD.mean(dim=1)
        largest_BD = x_BLD.amax(dim=1)
        return largest_BD if kind == "max" else 0.5 * (largest_BD + x_BLD.mean(dim=1))

    def forward_features(self, image_BCHW: Tensor) -> Tensor:
        """Return the last block's tokens, normalised unless the norm follows the pool."""
        x_BLD = self.embed(image_BCHW)
        is_recomputed = self.options.grad_checkpointing and torch.is_grad_enabled()
        for block in self.blocks:
            if is_recomputed:
                x_BLD = recompute.checkpoint(block, x_BLD, backend=self.backend)
            else:
                x_BLD = block(x_BLD)
        return through(self.norm, x_BLD)

    def _forward_heads(self, x_BLD: Tensor) -> Tensor:
        """Return both heads' logits_2BY if each has its own target, else their mean logits_BY."""
        x_B2D = through(self.head_drop, through(self.fc_norm, x_BLD[:, :2]))
        logits_2BY = torch.stack(
            [through(self.head, x_B2D[:, 0]), through(self.head_dist, x_B2D[:, 1])]
        )
        return logits_2BY if self.training and self.distilled_training else logits_2BY.mean(0)

    def forward_head(self, x_BLD: Tensor) -> Tensor:
        """Pool the tokens and classify them: x_BLD -> logits_BY."""
        if self.options.distilled:
            return self._forward_heads(x_BLD)
        x_BD = through(self.fc_norm, self.pool(x_BLD))
        return through(self.head, through(self.head_drop, x_BD))

    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Return logits: image_BCHW -> logits_BY (x_BD without a head, logits_BLY for pool "").

        In training with `distilled_training`, return the logits_2BY of both heads.

        Raises:
            ValueError: the image's size or number of channels is not as configured.
        """
        return self.forward_head(self.forward_features(image_BCHW))
