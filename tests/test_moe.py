"""Mixture-of-experts blocks: expert parallelism against one process with all experts."""

import pytest
import torch
from torch import nn
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save

import checkpoint
import moe
from options import compose
from parallel import distributed, sharding
from tests.support.experts import EXPERTS, build, moe_vit, save_weights, step_loss
from tests.support.sharded import (
    BATCH,
    MAX_NORM,
    STEPS,
    batch,
    make_optimizer,
    parts,
    worst_error,
)
from training import prepare


def train_plainly(world, kind, accum):
    """One process with all experts, unsharded, plain PyTorch."""
    model = moe_vit()
    optimizer = make_optimizer(kind, model.named_parameters())
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for microbatch in range(accum):
            step_loss(model, *batch(step, microbatch), share=1 / accum).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}, norms


def train_parallel(world, mesh, kind, accum, strategy=3):
    model, shards = build(world, mesh, strategy=strategy, on_meta=strategy != 0)
    optimizer = make_optimizer(kind, [(s.name, s.local) for s in shards])
    sharding.shard_optimizer(optimizer)
    rows = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    norms, moved = [], []
    experts = [s for s in shards if ".experts." in s.name and s.local.numel()]
    for step in range(STEPS):
        before = [s.local.detach().clone() for s in experts]
        optimizer.zero_grad()
        for microbatch in range(accum):
            image_BCHW, label_B = batch(step, microbatch)
            with sharding.microbatch(model, is_last=microbatch == accum - 1):
                share = 1 / accum / world.size
                step_loss(model, image_BCHW[rows], label_B[rows], share=share).backward()
        sharding.finish_gradients(model, shards)
        norms.append(sharding.clip_gradients(shards, MAX_NORM).item())
        sharding.step_optimizer(optimizer)
        pairs = zip(before, experts, strict=True)
        moved.append(any(not torch.equal(old, s.local) for old, s in pairs))
    return parts(shards), norms, moved


MESHES = {
    1: [(1, 1, 1)],
    2: [(1, 1, 2), (1, 2, 1)],
    4: [(1, 2, 2), (1, 1, 4), (2, 1, 2)],
}
CASES = [(size, mesh) for size, meshes in MESHES.items() for mesh in meshes]


@pytest.fixture(scope="module")
def plain(ranks):
    cache = {}

    def get(kind, accum):
        if (kind, accum) not in cache:
            cache[kind, accum] = ranks(1, train_plainly, kind, accum)[0]
        return cache[kind, accum]

    return get


TOLERANCE = {"adamw": 1e-5, "sgd": 1e-6}


# Every mesh with both optimizers and both accumulations, in turns: not with all four pairs.
@pytest.mark.parametrize(
    ("world_size", "mesh", "kind", "accum"),
    [
        pytest.param(
            *(*case, kind, 1 + (number + (kind == "sgd")) % 2),
            marks=pytest.mark.slow if (case[0], kind) == (4, "adamw") else (),
        )
        for number, case in enumerate(CASES)
        for kind in TOLERANCE
    ],
    ids=str,
)
def test_expert_parallel_training_equals_one_process(ranks, plain, world_size, mesh, kind, accum):
    expected, norms = plain(kind, accum)
    results = ranks(world_size, train_parallel, mesh, kind, accum)
    assert worst_error([result[0] for result in results], expected) <= TOLERANCE[kind]
    for _, parallel_norms, moved in results:
        assert parallel_norms == pytest.approx(norms, rel=2e-6)
        assert moved == [True] * STEPS, "each rank's expert storage changes in every step"


@pytest.mark.slow
def test_meta_init_with_expert_parallelism_is_eager_init_bit_for_bit(ranks):
    eager = {name: p.detach() for name, p in moe_vit().named_parameters()}
    cases = [
        (1, (1, 1, 1), True),
        (2, (1, 1, 2), True),
        (4, (1, 2, 2), True),
        (4, (1, 2, 2), False),
    ]
    for world_size, mesh, on_meta in cases:
        found = ranks(world_size, lambda w, m=mesh, o=on_meta: parts(build(w, m, on_meta=o)[1]))
        assert worst_error(found, eager) == 0


def load_weights(world, mesh, root):
    _, shards = build(world, mesh, seed=1)
    found, _ = checkpoint.find_newest(root)
    checkpoint.load(found, {"model": sharding.model_state(shards)})
    return parts(shards)


@pytest.mark.slow
def test_checkpoint_has_the_global_expert_layout_and_loads_at_any_ep(ranks, tmp_path):
    ranks(4, save_weights, (1, 2, 2), tmp_path)
    expected = {name: p.detach() for name, p in moe_vit().named_parameters()}
    for world_size, mesh in ((1, (1, 1, 1)), (2, (1, 1, 2)), (4, (1, 1, 4)), (4, (2, 1, 2))):
        assert worst_error(ranks(world_size, load_weights, mesh, tmp_path), expected) == 0
    folder = max(tmp_path.glob("step_*"))
    dcp_to_torch_save(folder, tmp_path / "out.pt")
    content = torch.load(tmp_path / "out.pt", weights_only=True)["model"]
    assert content["blocks.1.mlp.experts.w_in"].shape == (EXPERTS * 52, 36)
    model = moe_vit(seed=2)
    checkpoint.load_torch_checkpoint(tmp_path / "out.pt", model)
    assert all(torch.equal(p, expected[name]) for name, p in model.named_parameters())


@pytest.mark.parametrize("strategy", [1, 2])
def test_other_zero_strategies_with_experts(ranks, plain, strategy):
    expected, _ = plain("sgd", 1)
    results = ranks(4, train_parallel, (1, 2, 2), "sgd", 1, strategy)
    assert worst_error([result[0] for result in results], expected) <= 1e-6


def balance_of(world, mesh):
    model, _ = build(world, mesh)
    rows = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    model(batch(0, 0)[0][rows])
    value = moe.balance_loss(model).item()
    model.eval()
    with torch.no_grad():
        model(batch(0, 0)[0][rows])
    return value, moe.balance_loss(model).item()


def test_balance_loss_is_the_same_on_every_mesh_and_zero_in_eval(ranks):
    ((expected, _),) = ranks(1, balance_of, (1, 1, 1))
    assert expected > 0
    for world_size, mesh in ((2, (1, 1, 2)), (4, (1, 2, 2))):
        for value, in_eval in ranks(world_size, balance_of, mesh):
            assert value == pytest.approx(expected, rel=1e-5)
            assert in_eval == 0


@pytest.mark.parametrize(
    ("overrides", "world_size", "ep"),
    [
        ([], 1, 1),
        ([], 2, 2),
        ([], 6, 2),
        ([], 16, 8),
        (["distributed.dp_outer=2"], 8, 4),
        (["distributed.dp_shard=2", "distributed.dp_outer=2"], 4, 1),
        (["distributed.ep=1"], 2, 1),
        (["model.moe.num_experts=0", "model.moe.mlp_ratio=4"], 2, 1),
    ],
)
def test_null_ep_is_as_many_ranks_as_divide_the_experts_and_the_ranks(overrides, world_size, ep):
    config = compose.compose("vit_moe_tiny_patch8_64", overrides)  # 8 experts, ep: null
    world = distributed.World(0, world_size, 0, torch.device("cpu"))
    assert prepare.pick_ep(config, world) == ep
