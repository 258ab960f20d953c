"""Learning rate in closed form, and decay groups equal to timm's."""

import math

import pytest
import torch
from timm.models import VisionTransformer as VisionTransformerOfTimm
from timm.optim import param_groups_layer_decay, param_groups_weight_decay
from timm.scheduler import CosineLRScheduler
from timm.utils import ModelEmaV3

from options.schema import OptimizerOptions
from tests.support.networks import build_vit
from training import optim

SCHEDULE = {"peak": 1e-3, "num_steps": 110}
WARM = OptimizerOptions(min_lr=1e-5, warmup_steps=10)


def test_lr_warms_up_linearly_and_ends_on_a_cosine():
    lrs = [optim.lr_at(step, WARM, **SCHEDULE) for step in range(111)]
    assert lrs[0] == pytest.approx(1e-4)
    assert lrs[9] == lrs[10] == 1e-3
    assert lrs[60] == pytest.approx((1e-3 + 1e-5) / 2)
    assert lrs[110] == pytest.approx(1e-5)
    assert lrs[35] == pytest.approx(1e-5 + (1e-3 - 1e-5) * 0.5 * (1 + math.cos(math.pi / 4)))
    assert sorted(lrs[:10]) == lrs[:10]
    assert sorted(lrs[10:], reverse=True) == lrs[10:]


def test_lr_without_warmup_starts_at_the_peak():
    assert optim.lr_at(0, OptimizerOptions(min_lr=0.0), peak=1.0, num_steps=10) == 1.0


def test_lr_equals_timm_after_the_warmup():
    parameter = torch.nn.Parameter(torch.zeros(1))
    scheduler = CosineLRScheduler(
        torch.optim.SGD([parameter], lr=1e-3), t_initial=100, lr_min=1e-5, t_in_epochs=False
    )
    for step in range(100):
        ours = optim.lr_at(step, OptimizerOptions(min_lr=1e-5), peak=1e-3, num_steps=100)
        assert ours == pytest.approx(scheduler._get_lr(step)[0])


def test_decay_groups_equal_timm():
    options = {"img_size": 32, "embed_dim": 48, "depth": 2, "num_heads": 3, "reg_tokens": 2}
    options |= {"qk_norm": True, "init_values": 0.1, "global_pool": "map"}
    theirs = VisionTransformerOfTimm(**options)
    names = {id(parameter): name for name, parameter in theirs.named_parameters()}
    groups = param_groups_weight_decay(theirs, 0.1, no_weight_decay_list=theirs.no_weight_decay())
    expected = {
        names[id(parameter)]: group["weight_decay"]
        for group in groups
        for parameter in group["params"]
    }
    # timm's list leaves the register tokens and the pool's latent out; a token is a token.
    expected["reg_token"] = 0.0
    ours = build_vit(**options)
    names = {id(parameter): name for name, parameter in ours.named_parameters()}
    found = {
        names[id(parameter)]: group["weight_decay"]
        for group in optim.parameter_groups(ours.named_parameters(), weight_decay=0.1)
        for parameter in group["params"]
    }
    assert found == expected


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"reg_tokens": 2, "pre_norm": True, "init_values": 0.1, "no_embed_class": True},
        {"global_pool": "avg", "qk_norm": True},
        {"global_pool": "map"},
    ],
    ids=str,
)
def test_layer_decay_groups_equal_timm(more):
    options = {"img_size": 32, "embed_dim": 48, "depth": 3, "num_heads": 3, **more}
    theirs = VisionTransformerOfTimm(**options)
    names = {id(parameter): name for name, parameter in theirs.named_parameters()}
    groups = param_groups_layer_decay(
        theirs, 0.1, no_weight_decay_list=theirs.no_weight_decay(), layer_decay=0.65
    )
    expected = {
        names[id(parameter)]: (group["weight_decay"], pytest.approx(group["lr_scale"]))
        for group in groups
        for parameter in group["params"]
    }
    ours = build_vit(**options)
    names = {id(parameter): name for name, parameter in ours.named_parameters()}
    groups = optim.parameter_groups(
        ours.named_parameters(), weight_decay=0.1, layer_decay=0.65, depth=3
    )
    found = {
        names[id(parameter)]: (group["weight_decay"], group["lr_scale"])
        for group in groups
        for parameter in group["params"]
    }
    if "reg_tokens" in more:  # a token, which timm's list leaves out
        expected["reg_token"] = (0.0, expected["reg_token"][1])
    assert found == expected
    assert found["head.weight"][1] == 1
    assert found["blocks.0.attn.qkv.weight"][1] == pytest.approx(0.65**3)


def test_each_group_has_its_share_of_the_learning_rate():
    parameters = [(f"blocks.{i}.weight", torch.nn.Parameter(torch.zeros(2, 2))) for i in (0, 1)]
    groups = optim.parameter_groups(parameters, weight_decay=0.1, layer_decay=0.5, depth=2)
    optimizer = optim.build_optimizer(OptimizerOptions(name="sgd"), groups)
    optim.set_lr(optimizer, 8.0)
    lrs = {id(group["params"][0]): group["lr"] for group in optimizer.param_groups}
    assert [lrs[id(parameter)] for _, parameter in parameters] == [2.0, 4.0]


def test_frozen_parameters_are_in_no_group():
    model = torch.nn.Linear(2, 2)
    model.weight.requires_grad_(False)
    groups = optim.parameter_groups(model.named_parameters(), weight_decay=0.1)
    assert [group["params"] for group in groups] == [[model.bias]]


def test_biases_of_experts_do_not_decay_though_they_are_two_dimensional():
    assert optim.has_decay("blocks.1.mlp.experts.w_in", 2)
    assert not optim.has_decay("blocks.1.mlp.experts.b_in", 2)
    assert not optim.has_decay("blocks.1.mlp.experts.b_out", 2)


def test_ema_equals_its_recurrence_and_a_swap_gives_everything_back():
    weight = torch.nn.Parameter(torch.tensor([1.0, 2.0]))
    ema = optim.Ema([weight], decay=0.9)
    values, expected = [(3.0, -1.0), (0.5, 8.0)], torch.tensor([1.0, 2.0])
    for value in values:
        weight.data.copy_(torch.tensor(value))
        ema.update()
        expected = 0.9 * expected + 0.1 * torch.tensor(value)
    torch.testing.assert_close(ema.average[0], expected)
    average = ema.average[0].clone()
    with ema.swapped():
        assert torch.equal(weight.data, average)
    assert weight.tolist() == list(values[-1])
    assert torch.equal(ema.average[0], average)


def test_ema_equals_timms():
    model = torch.nn.Linear(5, 3)
    timm = ModelEmaV3(model, decay=0.7)
    ema = optim.Ema(list(model.parameters()), decay=0.7)
    for _ in range(4):
        for parameter in model.parameters():
            parameter.data.add_(torch.randn_like(parameter))
        timm.update(model)
        ema.update()
    for average, expected in zip(ema.average, timm.module.parameters(), strict=True):
        torch.testing.assert_close(average, expected)
