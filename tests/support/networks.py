"""Networks and routers from keyword arguments, as tests like to vary them."""

from options.schema import MoEOptions, ViTOptions
from routers.router import Router
from vit import VisionTransformer

NO_BALANCE = {"switch_coef": 0.0}  # the one loss that is on by default


def build_vit(*, ffn=None, seed=0, backend="torch", sdpa="auto", **options) -> VisionTransformer:
    """A ViT with `options` of ViTOptions; the rest goes to the constructor."""
    return VisionTransformer(ViTOptions(**options), ffn=ffn, seed=seed, backend=backend, sdpa=sdpa)


def moe_options(num_experts: int, *, hidden_of=None, coefs=None, **options) -> MoEOptions:
    """Options of experts without a balance loss but `coefs`; `hidden_of`: (hidden width, D)."""
    if hidden_of is not None:
        options["mlp_ratio"] = (hidden_of[0] + 0.5) / hidden_of[1]  # int(D * ratio) is the width
    given = {f"{name}_coef": coef for name, coef in (coefs or {}).items()}
    return MoEOptions(num_experts=num_experts, **(NO_BALANCE | given | options))


def build_router(dim: int, num_experts: int, **options) -> Router:
    return Router(dim, moe_options(num_experts, **options))
