"""A checkpoint of one mesh and ZeRO strategy loads exactly into every other."""

import itertools

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


def save(shards, optimizer, root, step):
    state = {"step": step, "metrics": {}}
    checkpoint.save(root, tensors(shards, optimizer), state=state, loss=1.0)


def one_more_step(world, built, step):
    run_step(world, *built, step=step, accum=1)
    _, shards, optimizer = built
    return everything(shards, optimizer)


def go_round(world, meshes, root, step):
    """On each mesh in turn: load, take a step, save that, and take another one.

    Returns, per mesh, what was loaded, what the next mesh must find, and what it must do with it.
    """
    found = []
    for mesh in meshes:
        built = model, shards, optimizer = build(world, mesh, seed=step)
        newest, _ = checkpoint.find_newest(root)
        loaded = None
        if newest is not None:
            checkpoint.load(newest, tensors(shards, optimizer))
            sharding.install_weights(model)
            loaded = everything(shards, optimizer)
        saved = one_more_step(world, built, step)
        step += 1
        save(shards, optimizer, root, step)
        found.append((loaded, saved, one_more_step(world, built, step)))
    return found


FSDP, HSDP = {"strategy": 3}, {"strategy": 3, "outer": 2}
HFSDP = {"strategy": 3, "outer": 2, "outer_strategy": "optim"}
# One after another, and in the end the first again: each is loaded from another and into another.
RING = [
    (1, [FSDP]),
    (4, [HSDP, HFSDP]),
    (2, [{"strategy": 2}, {"strategy": 1}, {"strategy": 0}, FSDP]),
    (1, [FSDP]),
]


def test_weights_and_moments_move_between_meshes_exactly(ranks, tmp_path):
    found = []  # by mesh: (mesh, what was loaded, saved and made of it next, gathered, and counts)
    step = 0
    for size, meshes in RING:
        by_rank = ranks(size, go_round, meshes, tmp_path, step)
        for number, mesh in enumerate(meshes):
            parts = list(zip(*(found_here[number] for found_here in by_rank), strict=True))
            found.append(((size, mesh), *parts))
        step += len(meshes)
    for number, (before, after) in enumerate(itertools.pairwise(found), start=1):
        pair = f"{before[0]} -> {after[0]}"
        old, new = gather(before[2]), gather(after[1])
        assert old.keys() == new.keys(), pair
        for name, tensor in old.items():
            assert torch.equal(tensor, new[name]), f"{pair}: {name}"
        assert after[1][0][1] == {float(number)}, f"{pair}: Adam's step count"
        # The loaded weights are also what the forward uses: one more step agrees.
        old, new = gather(before[3]), gather(after[2])
        for name, tensor in old.items():
            assert (tensor - new[name]).norm() <= 1e-5 * tensor.norm(), f"{pair}: {name}"
