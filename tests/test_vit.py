import math

import pytest
import timm
import torch
from timm.models.vision_transformer import VisionTransformer as TimmVit
from torch import nn

from options.schema import Config, ModelOptions, MoEOptions, ViTOptions
from tests.support.models import relative_error
from tests.support.networks import build_vit
from training import network

SMALL = {
    "img_size": 32,
    "patch_size": 8,
    "num_classes": 7,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
}
OURS_ONLY = ("ffn", "seed", "backend", "grad_checkpointing")
EVERYTHING = {
    "global_pool": "map",
    "reg_tokens": 4,
    "qk_norm": True,
    "scale_attn_norm": True,
    "scale_mlp_norm": True,
    "init_values": 0.1,
    "no_embed_class": True,
    "pre_norm": True,
    "fc_norm": True,
}


def image(batch_size=2, height_px=32, width_px=32, channels=3):
    rng = torch.Generator().manual_seed(1)
    return torch.randn(batch_size, channels, height_px, width_px, generator=rng)


def shake(model):
    """Move every parameter away from 0 and 1, where a forgotten bias or norm would not show."""
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.05)


def twins(**options):
    """The same network by timm and by us, with the same weights, loaded strictly."""
    options = SMALL | options
    theirs = TimmVit(**{k: v for k, v in options.items() if k not in OURS_ONLY})
    shake(theirs)
    ours = build_vit(**options)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def run(model, image_BCHW, seed=None):
    model.zero_grad()
    if seed is not None:
        torch.manual_seed(seed)
    output = model(image_BCHW)
    target = torch.linspace(-1, 1, output.numel()).view_as(output)
    (output * target).sum().backward()
    return output.detach(), {name: p.grad for name, p in model.named_parameters()}


def assert_same(ours, theirs, image_BCHW, seed=None):
    (output, grads), (expected, expected_grads) = (
        run(model, image_BCHW, seed) for model in (ours, theirs)
    )
    assert output.shape == expected.shape
    assert relative_error(output, expected) <= 1e-5
    assert grads.keys() == expected_grads.keys()
    for name, grad in grads.items():
        if name.endswith("k_norm.bias"):  # exactly 0: softmax ignores what all keys have in common
            assert grad.norm() <= 1e-5 * expected_grads[name.replace("k_norm", "q_norm")].norm()
        else:
            assert relative_error(grad, expected_grads[name]) <= 1e-5, name


@pytest.mark.parametrize(
    ("name", "width", "heads"),
    [
        ("vit_tiny_patch16_224", 192, 3),
        ("vit_small_patch16_224", 384, 6),
        pytest.param("vit_base_patch16_224", 768, 12, marks=pytest.mark.slow),
    ],
)
def test_forward_and_every_gradient_equal_timm(name, width, heads):
    theirs = timm.create_model(name)
    ours = build_vit(embed_dim=width, num_heads=heads)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert sum(p.numel() for p in ours.parameters()) == sum(p.numel() for p in theirs.parameters())
    assert_same(ours, theirs, image(2, 224, 224))


def test_variant_with_map_pool_registers_and_norms_equals_timm_at_224px():
    ours, theirs = twins(
        **EVERYTHING, img_size=224, patch_size=16, embed_dim=192, depth=4, num_classes=1000
    )
    assert_same(ours, theirs, image(2, 224, 224))


OPTION_CASES = [
    {},
    {"img_size": (16, 32)},
    {"patch_size": (8, 16)},
    {"in_chans": 1},
    {"num_classes": 0},
    *({"global_pool": pool} for pool in ("avg", "map", "max", "avgmax", "")),
    {"global_pool": "avg", "class_token": False},
    {"global_pool": "avgmax", "final_norm": False},  # a norm would hide the factor of a half
    {"global_pool": "map", "class_token": False, "reg_tokens": 2},
    {"embed_dim": 60},
    {"depth": 3},
    {"num_heads": 4},
    {"mlp_ratio": 2.5},
    {"mlp_ratio": 2.5, "global_pool": "map"},
    {"qkv_bias": False},
    {"qk_norm": True},
    {"scale_attn_norm": True},
    {"scale_mlp_norm": True},
    {"proj_bias": False},
    {"init_values": 0.1},
    {"pos_embed": "none"},
    {"pos_embed": "none", "class_token": False, "global_pool": "avg"},
    {"no_embed_class": True},
    {"reg_tokens": 3},
    {"reg_tokens": 3, "no_embed_class": True},
    {"pre_norm": True},
    {"final_norm": False},
    {"fc_norm": True},
    {"fc_norm": False, "global_pool": "avg"},
    {"fc_norm": True, "global_pool": ""},
    {"dynamic_img_size": True},
    EVERYTHING,
]


@pytest.mark.parametrize("options", OPTION_CASES, ids=str)
def test_option_equals_timm(options):
    ours, theirs = twins(**options)
    assert list(ours.state_dict()) == list(theirs.state_dict())
    height_px, width_px = ours.options.img_hw
    assert_same(ours, theirs, image(2, height_px, width_px, ours.options.in_chans))


@pytest.mark.parametrize("options", [{}, {"no_embed_class": True, "reg_tokens": 2}], ids=str)
def test_dynamic_size_equals_timm(options):
    ours, theirs = twins(dynamic_img_size=True, **options)
    assert_same(ours, theirs, image(2, 48, 24))


def test_dynamic_pad_equals_timm():
    ours, theirs = twins(dynamic_img_size=True, dynamic_img_pad=True)
    assert_same(ours, theirs, image(2, 41, 30))


@pytest.mark.parametrize(
    "options",
    [
        {"drop_rate": 0.5},
        {"pos_drop_rate": 0.5},
        {"patch_drop_rate": 0.5},
        {"patch_drop_rate": 0.5, "reg_tokens": 2, "no_embed_class": True},
        {"proj_drop_rate": 0.5},
        {"attn_drop_rate": 0.5},
        {"drop_path_rate": 0.6},
        {"drop_path_rate": 0.5, "init_values": 0.1, "proj_drop_rate": 0.2, "attn_drop_rate": 0.1},
    ],
    ids=str,
)
def test_dropping_draws_the_same_numbers_as_timm_and_stops_in_eval(options):
    ours, theirs = twins(**options)
    assert_same(ours, theirs, image(8), seed=5)
    trained = run(ours, image(8), seed=5)[0]
    assert not torch.equal(trained, run(ours, image(8), seed=6)[0])
    ours.eval(), theirs.eval()
    assert_same(ours, theirs, image(8))


def test_drop_path_rate_grows_linearly_over_blocks():
    model = build_vit(**SMALL | {"depth": 4}, drop_path_rate=0.3)
    rates = [block.drop_path.drop_prob if block.drop_path else 0.0 for block in model.blocks]
    assert rates == pytest.approx([0.0, 0.1, 0.2, 0.3])


def test_patch_drop_leaves_tokens_out_of_the_blocks():
    model = build_vit(**SMALL, patch_drop_rate=0.5)
    assert model.embed(image()).shape == (2, 1 + 8, 48)
    assert model.eval().embed(image()).shape == (2, 1 + 16, 48)


def test_non_contiguous_and_channels_last_images_give_the_same_logits():
    model = build_vit(**SMALL).eval()
    wide_BCHW = torch.randn(2, 3, 32, 64)
    expected = model(wide_BCHW[..., ::2].contiguous())
    assert torch.equal(model(wide_BCHW[..., ::2]), expected)
    channels_last = wide_BCHW[..., ::2].contiguous(memory_format=torch.channels_last)
    assert torch.equal(model(channels_last), expected)


@pytest.mark.parametrize("options", [{}, EVERYTHING | {"drop_path_rate": 0.3}], ids=str)
def test_grad_checkpointing_changes_no_gradient_with_dropout_on(options):
    options = options | {"proj_drop_rate": 0.3, "attn_drop_rate": 0.2}
    plain = build_vit(**SMALL | options)
    frugal = build_vit(**SMALL | options, grad_checkpointing=True)
    (output, grads), (expected, expected_grads) = (
        run(model, image(), seed=3) for model in (frugal, plain)
    )
    assert torch.equal(output, expected)
    assert all(torch.equal(grads[name], grad) for name, grad in expected_grads.items())


def test_ffn_factory_is_called_per_block_and_none_means_dense():
    model = build_vit(**SMALL, ffn=lambda i: nn.Linear(48, 48, bias=False) if i == 1 else None)
    shapes = {name: value.shape for name, value in model.state_dict().items()}
    assert shapes["blocks.0.mlp.fc1.weight"] == (192, 48)
    assert shapes["blocks.1.mlp.weight"] == (48, 48)
    assert "blocks.1.norm2.weight" in shapes
    grads = run(model, image())[1]
    assert grads["blocks.1.mlp.weight"].norm() > 0


def flops_by_hand(*, vit=None, moe=None, tokens, patches, heads=1, pool=0):
    """Multiply-adds of each matrix product, twice: patches, attention, MLPs or experts, head."""
    o, moe = ViTOptions(**SMALL | (vit or {})), MoEOptions(**(moe or {}))
    dim, gated = o.embed_dim, 2 if moe.activation in ("swiglu", "geglu") else 1
    attention = 4 * tokens * dim * dim + 2 * tokens * tokens * dim  # qkv, proj; q k^T and p v
    dense = 2 * tokens * dim * int(dim * o.mlp_ratio)
    width, shared = int(dim * moe.mlp_ratio), int(dim * moe.shared_ratio)
    experts = tokens * (dim * moe.num_experts + moe.top_k * (gated + 1) * dim * width)
    experts += 2 * tokens * dim * shared
    num_sparse = o.depth // 2 if moe.num_experts else 0
    stem = patches * dim * 3 * o.patch_hw[0] * o.patch_hw[1]
    ffn = (o.depth - num_sparse) * dense + num_sparse * experts
    return 2 * (stem + o.depth * attention + ffn + pool + heads * dim * o.num_classes)


GATED = {"num_experts": 4, "top_k": 2, "mlp_ratio": 1.5, "activation": "swiglu"}
# 16 patches of 8 x 8 pixels, 48 channels; the pool of 18 keys: k, v, q and proj, q k^T and p v, MLP
MAP_POOL = 2 * 16 * 48 * 48 + 2 * 48 * 48 + 2 * 16 * 48 + 2 * 48 * 192


@pytest.mark.parametrize(
    ("case", "training"),
    [
        ({"tokens": 17, "patches": 16}, True),
        ({"vit": {"global_pool": "map", "reg_tokens": 2}, "tokens": 19, "pool": MAP_POOL}, True),
        ({"vit": {"global_pool": ""}, "tokens": 17, "heads": 17}, True),
        ({"vit": {"num_classes": 0, "mlp_ratio": 2.0}, "tokens": 17}, True),
        ({"vit": {"patch_drop_rate": 0.4}, "tokens": 10}, True),
        ({"vit": {"patch_drop_rate": 0.4}, "tokens": 17}, False),
        ({"vit": {"distilled": True}, "tokens": 18, "heads": 2}, True),
        ({"moe": GATED, "tokens": 17}, True),
        ({"moe": GATED | {"kernels": "triton"}, "tokens": 17}, True),
        ({"moe": GATED | {"shared_ratio": 0.5, "z_coef": 0.1, "jitter": 0.1}, "tokens": 17}, True),
        ({"moe": {"num_experts": 4, "router": "sigmoid", "mlp_ratio": 2.0}, "tokens": 17}, True),
    ],
    ids=str,
)
def test_flops_per_image_are_those_of_the_products(case, training):
    case = {"patches": 16} | case
    model = ModelOptions(
        vit=ViTOptions(**SMALL | case.get("vit", {})), moe=MoEOptions(**case.get("moe", {}))
    )
    found = network.flops_per_image(Config(model=model), training=training)
    assert found == flops_by_hand(**case)


def test_block_touches_its_parameters_only_in_its_own_forward():
    """So that a sharding library may free a block's parameters outside of it."""
    model = build_vit(**SMALL | EVERYTHING | {"global_pool": "avg"})

    def fill(block, value):
        for parameter in block.parameters():
            parameter.data.copy_(value[parameter])

    for block in model.blocks:
        values = {p: p.detach().clone() for p in block.parameters()}
        nothing = {p: torch.full_like(p, math.nan) for p in block.parameters()}
        fill(block, nothing)
        block.register_forward_pre_hook(lambda m, _, values=values: fill(m, values))
        block.register_forward_hook(lambda m, _, y, nothing=nothing: fill(m, nothing))
    with torch.no_grad():
        assert model(image()).isfinite().all()
