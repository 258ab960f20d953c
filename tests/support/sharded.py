"""Small networks on sharded ranks, and the same in one process of plain PyTorch."""

import torch
from torch import nn
from torch.nn import functional as F

from options.schema import OptimizerOptions
from parallel import distributed, sharding
from tests.support.networks import build_vit
from training import optim
from vit import Block, VisionTransformer

STEPS, BATCH, CLASSES, MAX_NORM = 5, 16, 7, 0.5


# Uneven on purpose: 5 register tokens and width 36 divide by neither 2 x 4 ranks nor 4.
SMALL = {
    "img_size": 16,
    "patch_size": 4,
    "num_classes": CLASSES,
    "embed_dim": 36,
    "depth": 2,
    "num_heads": 3,
    "reg_tokens": 5,
}


def small_vit(**options) -> VisionTransformer:
    return build_vit(**SMALL, **options)


def batch(step: int, microbatch: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + microbatch)
    image_BCHW = torch.randn(BATCH, 3, 16, 16, generator=generator)
    return image_BCHW, torch.randint(0, CLASSES, (BATCH,), generator=generator)


def make_optimizer(kind: str, named) -> torch.optim.Optimizer:
    groups = optim.parameter_groups(named, weight_decay=0.1)
    assert len(groups) == 2, "the test is about two decay groups"
    # A key's bias has a gradient of exactly zero in exact arithmetic: eps keeps Adam from turning
    # its rounding noise into full updates.
    optimizer = optim.build_optimizer(OptimizerOptions(name=kind, eps=1e-5), groups)
    optim.set_lr(optimizer, 1e-2)
    return optimizer


def train_plainly(model: nn.Module, *, kind: str, accum: int) -> tuple[dict, list[float]]:
    """The reference: whole batches, unfused optimizer, torch's own clipping."""
    groups = optim.parameter_groups(model.named_parameters(), weight_decay=0.1)
    if kind == "adamw":
        optimizer = torch.optim.AdamW(groups, lr=1e-2, eps=1e-5, foreach=False)
    else:
        optimizer = torch.optim.SGD(groups, lr=1e-2, momentum=0.9, foreach=False)
    for group in optimizer.param_groups:
        group["lr"] = 1e-2
    norms = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for microbatch in range(accum):
            image_BCHW, label_B = batch(step, microbatch)
            (F.cross_entropy(model(image_BCHW), label_B) / accum).backward()
        norms.append(nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM).item())
        optimizer.step()
    return {name: p.detach().clone() for name, p in model.named_parameters()}, norms


def shard(world, model, *, outer=1, strategy=3, outer_strategy="no_shard", **kwargs):
    meshes = distributed.build_meshes(dp_outer=outer, dp_shard=None, ep=1, device=world.device)
    sharded = sharding.shard_model(
        model,
        meshes,
        unit_types=[Block],
        strategy=strategy,
        outer_strategy=outer_strategy,
        **kwargs,
    )
    return sharded, sharding.list_shards(sharded, rename=str)


def run_step(world, model, shards, optimizer, *, step, accum, dtype=torch.float32):
    rows = slice(world.rank * BATCH // world.size, (world.rank + 1) * BATCH // world.size)
    optimizer.zero_grad()
    for microbatch in range(accum):
        image_BCHW, label_B = (tensor[rows].to(world.device) for tensor in batch(step, microbatch))
        with sharding.microbatch(model, is_last=microbatch == accum - 1):
            loss = F.cross_entropy(model(image_BCHW.to(dtype)).float(), label_B)
            (loss / accum / world.size).backward()
    sharding.finish_gradients(model, shards)
    norm = sharding.clip_gradients(shards, MAX_NORM)
    sharding.step_optimizer(optimizer)
    return norm.item()


def parts(shards):
    """This rank's part of every main weight: name, where it lies, values."""
    return [(s.name, s.full_slice(), s.local.detach().clone().cpu()) for s in shards]


def train_sharded(world, kind, accum, mesh, options):
    model, shards = shard(world, small_vit(**options), **mesh)
    optimizer = make_optimizer(kind, [(s.name, s.local) for s in shards])
    sharding.shard_optimizer(optimizer)
    norms = [
        run_step(world, model, shards, optimizer, step=step, accum=accum) for step in range(STEPS)
    ]
    model.eval()
    with torch.no_grad():
        model(batch(0, 0)[0].to(world.device))  # an evaluation between steps must change nothing
    return parts(shards), norms


def worst_error(results, expected) -> float:
    """Largest norm-wise relative error over tensors; also checks that every element was seen."""
    errors = {}
    for name, full in expected.items():
        covered, squares = torch.zeros(full.shape), torch.zeros(full.shape)
        for rank_parts in results:
            for part_name, where, local in rank_parts:
                if part_name == name:
                    covered[where] += 1
                    squares[where] = (local - full[where]).square()
        assert covered.min() >= 1, f"{name}: some elements are on no rank"
        errors[name] = (squares.sum().sqrt() / full.norm()).item()
    return max(errors.values())


def gather(results) -> dict[str, torch.Tensor]:
    """Put the ranks' parts together; no part of a tensor may be missing or contradict another."""
    ends: dict[str, torch.Size] = {}
    for found, _ in results:
        for name, where, _ in found:
            stops = [part.stop for part in where]
            ends[name] = torch.Size(max(a, b) for a, b in zip(ends.get(name, stops), stops))  # noqa: B905
    full = {name: torch.full(size, torch.nan) for name, size in ends.items()}
    for found, _ in results:
        for name, where, local in found:
            full[name][where] = local
    assert not any(tensor.isnan().any() for tensor in full.values())
    return full
