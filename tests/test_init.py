import copy
import itertools
import math

import pytest
import torch
from timm.models.vision_transformer import VisionTransformer as TimmVit
from torch import nn

from layers import init
from tests.support.networks import build_vit

SMALL = {
    "img_size": 32,
    "patch_size": 8,
    "num_classes": 7,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
}
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


def materialise(model):
    """What Megatron-FSDP does to a model on meta."""
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
            for parameter in module.parameters(recurse=False):
                parameter.data.fill_(math.nan)
            module.reset_parameters()
    return model


@pytest.mark.parametrize("weight_init", ["", "jax", "jax_nlhb", "moco"])
@pytest.mark.parametrize("options", [{}, EVERYTHING | {"fix_init": True}], ids=str)
def test_meta_init_equals_eager_init_bit_for_bit(options, weight_init):
    options = SMALL | options | {"weight_init": weight_init, "seed": 7}
    eager = build_vit(**options).state_dict()
    with torch.device("meta"):
        model = build_vit(**options)
    assert all(parameter.is_meta for parameter in model.parameters())
    for name, value in materialise(model).state_dict().items():
        assert torch.equal(value, eager[name]), name


def test_reset_parameters_of_a_copy_refers_to_the_copy():
    with torch.device("meta"):
        original = build_vit(**SMALL)
    duplicate = materialise(copy.deepcopy(original))
    expected = build_vit(**SMALL).state_dict()
    assert all(torch.equal(v, expected[k]) for k, v in duplicate.state_dict().items())
    assert all(parameter.is_meta for parameter in original.parameters())


def test_reset_parameters_fills_only_the_module_s_own_tensors():
    model = build_vit(**SMALL)
    before = copy.deepcopy(model.state_dict())
    for parameter in model.parameters():
        parameter.data.zero_()
    model.reset_parameters()
    after = model.state_dict()
    own = {"cls_token", "pos_embed"}
    assert all(torch.equal(after[name], before[name]) for name in own)
    assert all((value == 0).all() for name, value in after.items() if name not in own)


def test_initial_values_depend_on_seed_and_name_and_not_on_the_global_generator():
    first = build_vit(**SMALL).state_dict()
    torch.manual_seed(99)
    state = torch.get_rng_state()
    second = build_vit(**SMALL | {"depth": 3}).state_dict()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, second[name]) for name, value in first.items())
    other = build_vit(**SMALL, seed=1).state_dict()
    drawn = [name for name, value in first.items() if value.std() > 0]
    assert drawn
    assert not any(torch.equal(first[name], other[name]) for name in drawn)
    for a, b in itertools.combinations(drawn, 2):
        if first[a].shape == first[b].shape:
            assert not torch.equal(first[a], first[b]), (a, b)


@pytest.mark.parametrize("prefix", [0, 3])
def test_fixed_positions_are_sines_and_cosines_of_column_and_row(prefix):
    rows, columns, dim = 2, 3, 16
    options = {"img_size": (16, 24), "patch_size": 8, "embed_dim": dim, "num_heads": 2, "depth": 1}
    options |= {"reg_tokens": 2} if prefix else {"class_token": False, "global_pool": "avg"}
    model = build_vit(**options, pos_embed="sincos", weight_init="jax", seed=5)
    assert not model.pos_embed.requires_grad
    pos_LD = model.pos_embed[0].tolist()
    assert pos_LD[:prefix] == [[0.0] * dim] * prefix
    for row, column in itertools.product(range(rows), range(columns)):
        found = pos_LD[prefix + row * columns + column]
        for number, wave in enumerate(found):
            # Frequencies 1, 10000^-1/3, 10000^-2/3 and 1/10000, in four groups.
            group, step = divmod(number, 4)
            angle = (column, row)[group // 2] / 10_000 ** (step / 3)
            assert wave == pytest.approx((math.sin, math.cos)[group % 2](angle), abs=1e-7)


@pytest.mark.parametrize("weight_init", ["", "jax", "jax_nlhb", "moco"])
@pytest.mark.parametrize("fix_init", [False, True])
def test_initial_distributions_equal_timm(weight_init, fix_init):
    options = {
        **SMALL,
        "embed_dim": 192,
        "num_classes": 100,
        "reg_tokens": 4,
        "global_pool": "map",
        "init_values": 0.1,
        "qk_norm": True,
        "weight_init": weight_init,
        "fix_init": fix_init,
    }
    torch.manual_seed(0)
    theirs = dict(TimmVit(**options).named_parameters())
    for name, ours in build_vit(**options).named_parameters():
        if theirs[name].std() == 0:
            assert torch.equal(ours, theirs[name]), name
            continue
        noise = 5 / math.sqrt(ours.numel())  # five standard errors of a mean, in units of std
        std = theirs[name].std().item()
        assert ours.std().item() == pytest.approx(std, rel=noise), name
        assert ours.mean().item() == pytest.approx(
            theirs[name].mean().item(), abs=1.5 * noise * std
        )
        tail, expected_tail = ours.abs().max().item(), theirs[name].abs().max().item()
        if ours.numel() > 1000:  # uniform, normal and cut normal differ in the largest entry
            assert tail / std == pytest.approx(expected_tail / std, rel=0.25), name


class Scaled(nn.Module):
    """A feed-forward with a tensor that the table of rules does not know."""

    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(48, 48)
        self.slope = nn.Parameter(torch.empty(2, 48))
        self.register_buffer("count", torch.empty(3))

    def forward(self, x_BLD):
        return self.inner(x_BLD) * self.slope[0]


class ScaledWithRule(Scaled):
    def initial_value(self, name, *, seed, full_name):
        if name == "count":
            return torch.zeros(3)
        whole = init.normal(torch.Size((4, 48)), 0.5, rng=init.generator(seed, full_name))
        return whole[2:]  # as a rank does that holds a part


def test_ffn_draws_its_own_initial_values_by_full_name():
    model = build_vit(**SMALL, ffn=lambda i: ScaledWithRule(), seed=3)
    ffn = model.blocks[1].mlp
    whole = init.normal(torch.Size((4, 48)), 0.5, rng=init.generator(3, "blocks.1.mlp.slope"))
    assert torch.equal(ffn.slope, whole[2:])
    assert torch.equal(ffn.count, torch.zeros(3))
    assert ffn.inner.weight.std().item() == pytest.approx(0.02, rel=0.1)


def test_ffn_tensor_without_an_init_rule_is_refused():
    with pytest.raises(TypeError, match=r"blocks\.0\.mlp\.\w+: .*initial_value"):
        build_vit(**SMALL, ffn=lambda i: Scaled())


def test_ffn_buffer_is_never_taken_for_a_parameter():
    ffn = nn.Identity()
    ffn.register_buffer("bias", torch.ones(3))
    with pytest.raises(TypeError, match=r"blocks\.0\.mlp\.bias: a buffer needs Identity"):
        build_vit(**SMALL, ffn=lambda i: ffn)
