"""The options of the ViT: which values and combinations are allowed, and what follows from them.

    VisionTransformer(img_size=..., ...) -> VitOptions (checked) -> sizes and rates of its parts

No tensors of the model here.
"""

import dataclasses
import math

import torch

POOLS = ("token", "avg", "map", "max", "avgmax", "")
POS_EMBEDS = ("learn", "sincos", "none")
WEIGHT_INITS = ("", "jax", "jax_nlhb", "moco")
KERNELS = ("flash", "cudnn", "efficient", "math")
BACKENDS = ("torch", "te")


def require(is_ok: bool, field: str, value: object, allowed: str) -> None:
    """Raise ValueError about model.vit.<field> unless `is_ok`."""
    if not is_ok:
        raise ValueError(f"config model.vit.{field}={value}: {allowed}")


def _pair(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


@dataclasses.dataclass(frozen=True, kw_only=True)
class VitOptions:
    """The options of VisionTransformer that shape it, checked, and what follows from them."""

    img_size: int | tuple[int, int]
    patch_size: int | tuple[int, int]
    in_chans: int
    num_classes: int
    global_pool: str
    embed_dim: int
    depth: int
    num_heads: int
    mlp_ratio: float
    qkv_bias: bool
    qk_norm: bool
    scale_attn_norm: bool
    scale_mlp_norm: bool
    proj_bias: bool
    init_values: float | None
    class_token: bool
    distilled: bool
    pos_embed: str
    no_embed_class: bool
    reg_tokens: int
    pre_norm: bool
    final_norm: bool
    fc_norm: bool | None
    dynamic_img_size: bool
    dynamic_img_pad: bool
    drop_rate: float
    pos_drop_rate: float
    patch_drop_rate: float
    proj_drop_rate: float
    attn_drop_rate: float
    drop_path_rate: float
    drop_path_uniform: bool
    weight_init: str
    fix_init: bool
    grad_checkpointing: bool
    sdpa: str
    backend: str

    def __post_init__(self) -> None:
        """Refuse values and combinations that cannot work or would have no effect."""
        if self.backend not in BACKENDS:
            raise ValueError(f"config model.backend={self.backend}: must be one of {BACKENDS} here")
        if self.sdpa not in ("auto", *KERNELS):
            names = ", ".join(KERNELS)
            raise ValueError(f"config model.sdpa={self.sdpa}: must be one of auto, {names}")
        if self.sdpa != "auto" and self.backend == "te":
            raise ValueError(f"config model.sdpa={self.sdpa}: has no effect with backend te")
        self._check_values()
        self._check_image()
        self._check_tokens()
        self._check_combinations()

    @property
    def img_hw(self) -> tuple[int, int]:
        """Height and width of an image, in pixels."""
        return _pair(self.img_size)

    @property
    def patch_hw(self) -> tuple[int, int]:
        """Height and width of a patch, in pixels."""
        return _pair(self.patch_size)

    @property
    def grid_hw(self) -> tuple[int, int]:
        """Number of patches down and across."""
        return self.img_hw[0] // self.patch_hw[0], self.img_hw[1] // self.patch_hw[1]

    @property
    def num_patches_in_training(self) -> int:
        """Patches of an image that patch_drop_rate keeps, rounded down, but one at least."""
        return max(1, int(math.prod(self.grid_hw) * (1 - self.patch_drop_rate)))

    @property
    def num_prefix_tokens(self) -> int:
        """Class, distillation and register tokens, which stand before the patches."""
        return int(self.class_token) + int(self.distilled) + self.reg_tokens

    @property
    def num_tokens_in_training(self) -> int:
        """Length L of what the blocks see in training."""
        return self.num_patches_in_training + self.num_prefix_tokens

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
        return (
            self.global_pool in ("avg", "max", "avgmax") if self.fc_norm is None else self.fc_norm
        )

    @property
    def drop_path_rates(self) -> list[float]:
        """One rate per block, from 0 to drop_path_rate unless all have it."""
        if self.drop_path_uniform:
            return [self.drop_path_rate] * self.depth
        return torch.linspace(0, self.drop_path_rate, self.depth, device="cpu").tolist()

    def _check_values(self) -> None:
        for field in ("in_chans", "embed_dim", "depth", "num_heads"):
            require(getattr(self, field) >= 1, field, getattr(self, field), "must be at least 1")
        for field in ("num_classes", "reg_tokens"):
            require(getattr(self, field) >= 0, field, getattr(self, field), "must be 0 or more")
        for field in ("drop", "pos_drop", "patch_drop", "proj_drop", "attn_drop", "drop_path"):
            rate = getattr(self, f"{field}_rate")
            require(0 <= rate < 1, f"{field}_rate", rate, "must be in [0, 1)")
        allowed = {"global_pool": POOLS, "pos_embed": POS_EMBEDS, "weight_init": WEIGHT_INITS}
        for field, names in allowed.items():
            name = getattr(self, field)
            require(name in names, field, repr(name), f"must be one of {names}")
        fits = self.embed_dim % self.num_heads == 0
        require(fits, "num_heads", self.num_heads, f"must divide embed_dim={self.embed_dim}")
        require(self.hidden_dim >= 1, "mlp_ratio", self.mlp_ratio, "must give a hidden unit")

    def _check_image(self) -> None:
        for side_px, patch_px in zip(self.img_hw, self.patch_hw, strict=True):
            require(patch_px >= 1, "patch_size", self.patch_size, "must be at least 1")
            below_px = side_px // patch_px * patch_px
            nearest = f"{below_px} or {below_px + patch_px}" if below_px else f"{patch_px}"
            require(
                below_px == side_px > 0,
                "img_size",
                self.img_size,
                f"must be divisible by patch_size={self.patch_size} (try {nearest})",
            )
        has_effect = self.dynamic_img_size or not self.dynamic_img_pad
        require(has_effect, "dynamic_img_pad", True, "needs dynamic_img_size=true")

    def _check_tokens(self) -> None:
        is_token = self.global_pool == "token"
        require(self.class_token or not is_token, "global_pool", "token", "needs class_token=true")
        is_plain = is_token and self.reg_tokens == 0 and self.fc_norm is not True
        allowed = "needs global_pool=token, reg_tokens=0 and no fc_norm"
        require(is_plain or not self.distilled, "distilled", True, allowed)
        fits = self.embed_dim % 4 == 0 and self.embed_dim >= 8
        allowed = f"needs an embed_dim of 8 or more that 4 divides, not {self.embed_dim}"
        require(fits or self.pos_embed != "sincos", "pos_embed", "sincos", allowed)
        has_pos = self.pos_embed != "none"
        require(
            has_pos or self.pos_drop_rate == 0,
            "pos_drop_rate",
            self.pos_drop_rate,
            "has no effect with pos_embed=none",
        )
        require(
            not self.no_embed_class or (has_pos and self.num_prefix_tokens > 0),
            "no_embed_class",
            True,
            "has no effect without a position embedding and a class or register token",
        )
        drops = self.patch_drop_rate == 0 or math.prod(self.grid_hw) > 1
        require(drops, "patch_drop_rate", self.patch_drop_rate, "has no effect on one patch")

    def _check_combinations(self) -> None:
        is_nlhb = self.weight_init == "jax_nlhb"
        require(not is_nlhb or self.num_classes > 0, "weight_init", "jax_nlhb", "needs a head")
        require(self.init_values != 0, "init_values", 0, "must not be 0 (null: no layer scale)")
        require(
            self.final_norm or self.fc_norm is None,
            "fc_norm",
            self.fc_norm,
            "has no effect with final_norm=false",
        )
        require(
            not self.drop_path_uniform or self.drop_path_rate > 0,
            "drop_path_uniform",
            True,
            "has no effect with drop_path_rate=0",
        )
        require(
            self.depth > 1 or self.drop_path_rate == 0 or self.drop_path_uniform,
            "drop_path_rate",
            self.drop_path_rate,
            "has no effect with depth=1, since the first block's rate is 0",
        )
