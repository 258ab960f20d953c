import dataclasses

import pytest
import torch
from torch import nn

from options.schema import ViTOptions
from tests.support.networks import build_vit

SMALL = {
    "img_size": 32,
    "patch_size": 8,
    "num_classes": 7,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
}


def image(batch_size=2, height_px=32, width_px=32):
    rng = torch.Generator().manual_seed(1)
    return torch.randn(batch_size, 3, height_px, width_px, generator=rng)


CHANGED = {
    "img_size": 48,
    "patch_size": 4,
    "in_chans": 4,
    "num_classes": 5,
    "global_pool": "avg",
    "embed_dim": 96,
    "depth": 3,
    "num_heads": 2,
    "mlp_ratio": 2.0,
    "qkv_bias": False,
    "qk_norm": True,
    "scale_attn_norm": True,
    "scale_mlp_norm": True,
    "proj_bias": False,
    "init_values": 0.5,
    "class_token": False,
    "distilled": True,
    "pos_embed": "none",
    "no_embed_class": True,
    "reg_tokens": 1,
    "pre_norm": True,
    "final_norm": False,
    "fc_norm": True,
    "dynamic_img_size": True,
    "dynamic_img_pad": True,
    "drop_rate": 0.5,
    "pos_drop_rate": 0.5,
    "patch_drop_rate": 0.5,
    "proj_drop_rate": 0.5,
    "attn_drop_rate": 0.5,
    "drop_path_rate": 0.5,
    "drop_path_uniform": True,
    "weight_init": "moco",
    "fix_init": True,
    "grad_checkpointing": True,
    "sdpa": "cudnn",
    "backend": "te",
    "ffn": lambda i: nn.Identity(),
    "seed": 1,
}


def behaviour(**options):
    """What an option could change: state, outputs at two image sizes, work in backward."""
    try:
        model = build_vit(**SMALL | options)
    except (ValueError, ImportError, RuntimeError) as error:
        return str(error)
    state = {name: value.sum().item() for name, value in model.state_dict().items()}
    calls = []
    model.blocks[0].register_forward_pre_hook(lambda *_: calls.append(1))
    torch.manual_seed(0)
    outputs = []
    for size_px in (32, 40):
        try:
            outputs.append(model(image(2, size_px, size_px)).sum())
            outputs[-1].backward()
        except (ValueError, RuntimeError) as error:
            outputs.append(str(error))
    shown = [o if isinstance(o, str) else o.item() for o in outputs]
    return state, shown, len(calls)


def test_drop_path_can_be_uniform_over_blocks_even_over_one():
    for depth in (1, 3):
        options = SMALL | {"depth": depth, "drop_path_rate": 0.3, "drop_path_uniform": True}
        blocks = build_vit(**options).blocks
        assert [block.drop_path.drop_prob for block in blocks] == [0.3] * depth


OPTIONS = [field.name for field in dataclasses.fields(ViTOptions)]


@pytest.mark.parametrize("option", [*OPTIONS, "sdpa", "backend", "ffn", "seed"])
def test_no_option_is_silent(option):
    assert behaviour(**{option: CHANGED[option]}) != behaviour()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"img_size": 220, "patch_size": 16}, "img_size=220.*try 208 or 224"),
        ({"img_size": (32, 30)}, r"img_size=\(32, 30\).*divisible by patch_size=8"),
        ({"img_size": 4}, "try 8"),
        ({"patch_size": 0}, "patch_size=0"),
        ({"num_heads": 5}, "num_heads=5: must divide embed_dim=48"),
        ({"global_pool": "prr"}, "global_pool=prr: must be one of"),
        ({"class_token": False}, "global_pool=token: needs class_token=true"),
        ({"pos_embed": "rope"}, "pos_embed=rope: must be one of"),
        ({"pos_embed": "sincos", "embed_dim": 42}, "pos_embed=sincos: needs an embed_dim of 8"),
        ({"pos_embed": "sincos", "embed_dim": 4, "num_heads": 1}, "that 4 divides, not 4"),
        ({"weight_init": "skip"}, "weight_init=skip"),
        ({"weight_init": "timm"}, "weight_init=timm"),
        ({"weight_init": "jax_nlhb", "num_classes": 0}, "needs a head"),
        ({"init_values": 0.0}, "init_values=0"),
        ({"depth": 0}, "depth=0"),
        ({"reg_tokens": -1}, "reg_tokens=-1"),
        ({"mlp_ratio": 0.0}, "mlp_ratio=0"),
        ({"drop_path_rate": 1.0}, "drop_path_rate=1.0: must be less than 1"),
        ({"drop_path_rate": 0.1, "depth": 1}, "no effect with depth=1"),
        ({"drop_path_uniform": True}, "drop_path_uniform=True: has no effect with drop_path_rate"),
        ({"patch_drop_rate": 0.1, "patch_size": 32}, "no effect with a single patch"),
        ({"pos_drop_rate": 0.1, "pos_embed": "none"}, "no effect with pos_embed=none"),
        ({"no_embed_class": True, "pos_embed": "none"}, "no effect with no position"),
        ({"no_embed_class": True, "class_token": False, "global_pool": "avg"}, "no effect"),
        ({"fc_norm": True, "final_norm": False}, "no effect with final_norm=false"),
        ({"dynamic_img_pad": True}, "needs dynamic_img_size=true"),
    ],
    ids=str,
)
def test_option_that_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=r"config model\.vit\..*" + message):
        build_vit(**SMALL | options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"backend": "auto"}, "config model.backend=auto: must be torch or te here"),
        ({"sdpa": "flush"}, "config model.sdpa=flush: must be one of auto, flash, cudnn"),
    ],
)
def test_backend_and_attention_kernel_are_names_that_there_are(options, message):
    with pytest.raises(ValueError, match=message):
        build_vit(**SMALL, **options)


@pytest.mark.parametrize(
    ("options", "shape", "message"),
    [
        ({}, (1, 3, 40, 32), "img_size=32: got an image of"),
        ({}, (1, 1, 32, 32), "in_chans=3: got an image of"),
        ({"dynamic_img_size": True}, (1, 3, 36, 32), "patch_size=8: does not divide"),
    ],
    ids=str,
)
def test_image_that_does_not_fit_is_refused(options, shape, message):
    with pytest.raises(ValueError, match=message):
        build_vit(**SMALL | options)(torch.zeros(shape))
