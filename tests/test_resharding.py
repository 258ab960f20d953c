"""A checkpoint of one mesh and ZeRO strategy loads exactly into every other."""

import pytest
import torch

import checkpoint
from parallel import sharding
from tests.support.sharded import gather, make_optimizer, run_step, shard, small_vit


def build(world, mesh, seed):
    model, shards = shard(world, small_vit(seed=seed), **mesh)
    optimizer = make_optimizer("adamw", [(s.name, s.local) for s in shards])
    sharding.shard_optimizer(optimizer)
    return model, shards, optimizer


def everything(shards, optimizer):
    """This rank's part of weights and moments, and the step counts."""
    found = []
    for s in shards:
        found.append((s.name, s.full_slice(), s.local.detach().clone()))
        state = optimizer.state.get(s.local, {})
        for key in ("exp_avg", "exp_avg_sq"):
            if key in state:
                found.append((f"{s.name}.{key}", s.full_slice(), state[key].clone()))
    return found, {float(state["step"]) for state in optimizer.state.values()}


def tensors(shards, optimizer):
    return {
        "model": sharding.model_state(shards),
        "optimizer": sharding.optimizer_state(shards, optimizer),
    }


def train_and_save(world, mesh, root):
    model, shards, optimizer = build(world, mesh, seed=0)
    for step in range(2):
        run_step(world, model, shards, optimizer, step=step, accum=1)
    checkpoint.save(root, tensors(shards, optimizer), state={"step": 2, "metrics": {}}, loss=1.0)
    saved = everything(shards, optimizer)
    run_step(world, model, shards, optimizer, step=2, accum=1)
    return saved, everything(shards, optimizer)


def load_and_go_on(world, mesh, root):
    model, shards, optimizer = build(world, mesh, seed=1)
    found, _ = checkpoint.find_newest(root)
    checkpoint.load(found, tensors(shards, optimizer))
    sharding.install_weights(model)
    loaded = everything(shards, optimizer)
    run_step(world, model, shards, optimizer, step=2, accum=1)
    return loaded, everything(shards, optimizer)


FSDP, HSDP = {"strategy": 3}, {"strategy": 3, "outer": 2}
HFSDP = {"strategy": 3, "outer": 2, "outer_strategy": "optim"}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ((2, FSDP), (1, FSDP)),
        ((1, FSDP), (4, HSDP)),
        ((4, HSDP), (2, {"strategy": 2})),
        ((4, HFSDP), (2, FSDP)),
        ((2, FSDP), (4, HFSDP)),
        ((2, {"strategy": 1}), (2, FSDP)),
        ((2, {"strategy": 0}), (2, FSDP)),
        ((2, FSDP), (2, {"strategy": 0})),
    ],
    ids=str,
)
def test_weights_and_moments_move_between_meshes_exactly(ranks, tmp_path, before, after):
    saved = ranks(before[0], train_and_save, before[1], tmp_path)
    loaded = ranks(after[0], load_and_go_on, after[1], tmp_path)
    old, new = gather([r[0] for r in saved]), gather([r[0] for r in loaded])
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        assert torch.equal(tensor, new[name]), name
    assert loaded[0][0][1] == {2.0}, "Adam's step count"
    # The loaded weights are also what the forward uses: one more step agrees.
    old, new = gather([r[1] for r in saved]), gather([r[1] for r in loaded])
    for name, tensor in old.items():
        assert (tensor - new[name]).norm() <= 1e-5 * tensor.norm(), name
