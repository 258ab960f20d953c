"""LAMB: timm's in one process, and the same on any mesh of ranks."""

import pytest
import torch
from timm.optim import Lamb as LambOfTimm
from torch import nn

from options.schema import OptimizerOptions
from parallel import collectives, sharding
from tests.support import experts
from tests.support.sharded import (
    BATCH,
    MAX_NORM,
    STEPS,
    batch,
    parts,
    shard,
    small_vit,
    worst_error,
)
from training import optim

LR, DECAY = 1e-2, 0.1


def groups_of(named):
    return optim.parameter_groups(named, weight_decay=DECAY)


def train_with_timm(model):
    """timm's LAMB on whole batches; it clips by itself."""
    groups = [{**group, "lr": LR} for group in groups_of(model.named_parameters())]
    optimizer = LambOfTimm(groups, betas=(0.9, 0.999), eps=1e-6, max_grad_norm=MAX_NORM)
    for step in range(STEPS):
        optimizer.zero_grad()
        experts.step_loss(model, *batch(step, 0), share=1).backward()
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def train_sharded(world, build):
    model, shards = build(world)
    optimizer = optim.build_optimizer(
        OptimizerOptions(name="lamb", eps=1e-6),
        groups_of((s.name, s.local) for s in shards),
        sum_over_ranks=collectives.sum_over_ranks,
    )
    sharding.shard_optimizer(optimizer)
    optim.set_lr(optimizer, LR)
    rows = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    for step in range(STEPS):
        optimizer.zero_grad()
        image_BCHW, label_B = batch(step, 0)
        with sharding.microbatch(model, is_last=True):
            share = 1 / world.size
            experts.step_loss(model, image_BCHW[rows], label_B[rows], share=share).backward()
        sharding.finish_gradients(model, shards)
        sharding.clip_gradients(shards, MAX_NORM)
        sharding.step_optimizer(optimizer)
    state = sharding.optimizer_state(shards, optimizer)
    steps = {int(values["step"]) for values in state.values()}
    return parts(shards), steps, {key for values in state.values() for key in values}


@pytest.fixture(scope="module")
def dense():
    return train_with_timm(small_vit())


@pytest.mark.parametrize(
    ("world_size", "mesh"),
    [
        (1, {}),
        (2, {}),
        (2, {"strategy": 0}),
        (4, {}),
        (4, {"outer": 2}),
        (4, {"outer": 2, "outer_strategy": "optim"}),
    ],
    ids=str,
)
def test_sharded_lamb_equals_timms_in_one_process(ranks, dense, world_size, mesh):
    results = ranks(world_size, train_sharded, lambda world: shard(world, small_vit(), **mesh))
    assert worst_error([result[0] for result in results], dense) <= 1e-5
    for _, steps, keys in results:
        assert steps == {STEPS}, "a resumed run needs the count of every parameter"
        assert keys == {"step", "exp_avg", "exp_avg_sq"}


@pytest.fixture(scope="module")
def with_experts(ranks):
    return ranks(1, lambda _: train_with_timm(experts.moe_vit()))[0]


@pytest.mark.parametrize(("world_size", "mesh"), [(2, (1, 1, 2)), (4, (1, 2, 2))], ids=str)
def test_norm_of_experts_is_over_all_of_them_wherever_they_are(
    ranks, with_experts, world_size, mesh
):
    results = ranks(world_size, train_sharded, lambda world: experts.build(world, mesh))
    assert worst_error([result[0] for result in results], with_experts) <= 1e-5


def lamb(parameters, sum_over_ranks=lambda value: value):
    groups = optim.parameter_groups(parameters, weight_decay=DECAY)
    o = OptimizerOptions(name="lamb", eps=1e-6)
    optimizer = optim.build_optimizer(o, groups, sum_over_ranks=sum_over_ranks)
    optim.set_lr(optimizer, LR)
    return optimizer


def test_ratio_is_one_for_zero_weights_and_without_decay():
    zero, bias = nn.Parameter(torch.zeros(2, 3)), nn.Parameter(torch.full((3,), 5.0))
    optimizer = lamb([("weight", zero), ("bias", bias)])
    for parameter in (zero, bias):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    # Adam's first step is the learning rate times the sign of the gradient.
    torch.testing.assert_close(zero.data, torch.full((2, 3), -LR))
    torch.testing.assert_close(bias.data, torch.full((3,), 5.0 - LR))


def test_a_rank_without_rows_takes_part_in_the_sum():
    calls = []

    def sum_over_ranks(squares):
        calls.append(squares.tolist())
        return squares

    empty = nn.Parameter(torch.zeros(0, 3))
    optimizer = lamb([("weight", empty)], sum_over_ranks=sum_over_ranks)
    optimizer.step()
    assert calls == [[[0.0], [0.0]]]
    assert not optimizer.state


@pytest.mark.slow
def test_a_whole_run_resumes_with_lamb(ranks, small_run, tmp_path):
    from tests.support.runs import train_and_watch

    options = ["optimizer.name=lamb", "training.steps=4", "training.val_interval=2"]
    whole = small_run(*options, f"training.checkpoint.path={tmp_path / 'whole'}")
    parted = small_run(*options, f"training.checkpoint.path={tmp_path / 'parted'}")
    expected = ranks(2, train_and_watch, whole, None)
    with pytest.raises(pytest.fail.Exception, match="died"):
        ranks(2, train_and_watch, parted, 3)
    resumed = ranks(2, train_and_watch, parted, None)
    for (seen, final), (seen_after, final_after) in zip(expected, resumed, strict=True):
        assert seen_after == seen[2:]
        assert final_after == final
