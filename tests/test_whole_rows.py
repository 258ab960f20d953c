"""No recipe, size or number of ranks makes Megatron-FSDP cut a row of a parameter in two.

    PYTHONPATH=. python tests/test_whole_rows.py     every recipe x class count x number of ranks

A cut row ends training before its first step. Where the library would put each parameter is asked
of its own index function; whether a row is cut is worked out here from those places.
"""

import functools
import random
import sys
from pathlib import Path

import pytest
import torch
from megatron_fsdp.distributed_data_parallel_config import DistributedDataParallelConfig
from megatron_fsdp.param_and_grad_buffer import (
    BucketingPolicy,
    _get_parameter_groups,
    build_data_parallel_buffer_index,
)
from torch import nn

import train
from options import compose
from parallel import sharding
from tests.support.networks import build_vit
from tests.support.sharded import shard
from training import network
from vit import Block, VisionTransformer

NAMES = sorted(path.stem for path in compose.CONFIG_DIR.glob("*.yaml"))
RANKS = (2, 3, 4, 6, 8, 16, 64)


def cut_rows(model: nn.Module, ranks: int) -> list[str]:
    """The parameters of which a row would be on two ranks, by the library's own layout."""
    strategy = "optim_grads_params"
    groups, _, _ = _get_parameter_groups(model, BucketingPolicy(None, [Block], strategy), {})
    names = {parameter: name for name, parameter in model.named_parameters()}
    cut = []
    for group in groups:
        items, _, part = build_data_parallel_buffer_index(
            [parameter.shape for parameter in group.params],
            0,
            ranks,
            True,
            DistributedDataParallelConfig(data_parallel_sharding_strategy=strategy),
            chunk_size_factor=group.chunk_size_factor,
        )
        for number, parameter in enumerate(group.params):
            place, row = items[number], parameter.shape[1:].numel()
            # Between its first and its last number, a row on one rank sees no border.
            starts = torch.arange(
                place.global_data_index, place.global_data_index + place.size, row
            )
            if ((starts // part.size) != ((starts + row - 1) // part.size)).any():
                cut.append(names[parameter])
    return cut


def lay_out(model: nn.Module, ranks: int) -> None:
    sharding.keep_rows_whole(model, [Block], dense_ranks=ranks, expert_ranks=ranks)


def on_meta(name: str, *overrides: str) -> VisionTransformer:
    config = compose.compose(name, ["distributed.ep=1", *overrides])
    return network.build_model(config, backend="torch", on_meta=True)


def forget_layout(model: nn.Module) -> None:
    for parameter in model.parameters():
        vars(parameter).pop("shared_embedding", None)


def with_classes(model: VisionTransformer, num_classes: int) -> VisionTransformer:
    """`model`, laid out nowhere yet, with heads for so many classes."""
    for name in ("head", "head_dist"):
        if (head := getattr(model, name, None)) is not None:
            setattr(model, name, nn.Linear(head.in_features, num_classes, device="meta"))
    forget_layout(model)
    return model


@functools.cache
def root_of(name: str) -> VisionTransformer:
    """A recipe without its blocks, whose layout knows nothing of the number of classes."""
    model = on_meta(name)
    model.blocks = nn.ModuleList()
    return model


@pytest.mark.parametrize("name", NAMES)
def test_no_recipe_cuts_a_row(name):
    model = on_meta(name)
    model.blocks = model.blocks[-2:]  # one of each kind: the others are alike
    for ranks in RANKS:
        forget_layout(model)
        lay_out(model, ranks)
        assert cut_rows(model, ranks) == []


def test_any_number_of_classes_trains_on_any_number_of_ranks():
    """One in 200 of what the file's own command tries."""
    rng = random.Random(0)
    num_cut = 0
    for name in NAMES:
        for ranks in RANKS:
            for num_classes in rng.sample(range(1, 1001), 5):
                model = with_classes(root_of(name), num_classes)
                num_cut += bool(cut_rows(model, ranks))
                lay_out(model, ranks)
                assert cut_rows(model, ranks) == [], f"{name} {num_classes=} {ranks=}"
    assert num_cut > 100, "the library lays all of them out well: keep_rows_whole is not needed"


def test_any_size_trains_on_any_number_of_ranks():
    rng = random.Random(0)
    for _ in range(100):
        patch, heads = rng.choice([2, 7, 8, 14, 16]), rng.choice([1, 3, 5])
        width = 4 * heads * rng.randint(1, 40)
        model = build_vit(
            img_size=patch * rng.randint(1, 20),
            patch_size=patch,
            in_chans=rng.choice([1, 3, 4]),
            num_classes=rng.randint(1, 3000),
            embed_dim=width,
            depth=1,
            num_heads=heads,
            mlp_ratio=rng.choice([0.3, 2.0, 8 / 3, 4.0]),
            reg_tokens=rng.randint(0, 9),
            init_values=rng.choice([None, 0.1]),
            qk_norm=rng.random() < 0.5,
        )
        ranks = rng.randint(2, 70)
        lay_out(model, ranks)
        assert cut_rows(model, ranks) == []


def layouts(world, options, mesh):
    """What a real start gives this rank: (name, rows, shape) of each of its parameters."""
    _, shards = shard(world, build_vit(**options), **mesh)
    return [(s.name, s.full_slice()[0], tuple(s.main.shape)) for s in shards]


TINY = {"img_size": 224, "patch_size": 16, "embed_dim": 192, "depth": 1, "num_heads": 3}


@pytest.mark.parametrize(
    ("ranks_", "num_classes", "mesh"),
    [
        (2, 2, {}),
        (2, 10, {"strategy": 2}),
        (3, 100, {}),
        (3, 5, {"strategy": 1}),
        pytest.param(4, 7, {"outer": 2, "outer_strategy": "optim"}, marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_a_start_that_used_to_end_in_a_reshape_error_has_every_row_once(
    ranks, ranks_, num_classes, mesh
):
    options = {**TINY, "num_classes": num_classes}
    assert cut_rows(build_vit(**options), ranks_), "the library itself lays this out well"
    parts = ranks(ranks_, layouts, options, mesh)
    for same in zip(*parts, strict=True):
        name, _, shape = same[0]
        rows = [row for _, own, _ in same for row in range(*own.indices(shape[0]))]
        assert sorted(rows) == list(range(shape[0])), name


def run_to_the_end(world, config):
    train.train(config, world)


def test_a_run_of_three_classes_starts_on_two_ranks_and_goes_on_on_three(ranks, small_run):
    size = [f"model.vit.{name}={value}" for name, value in TINY.items()]
    ranks(2, run_to_the_end, small_run(*size, "dataset.train.batch_size=3", "training.steps=1"))
    config = small_run(*size, "dataset.train.batch_size=2", "training.steps=2")
    ranks(3, run_to_the_end, config)
    folder = Path(config.training.checkpoint.path)
    assert sorted(path.name.split("_")[1] for path in folder.glob("step_*")) == ["1", "2"]


def sweep() -> int:
    """Try every recipe, class count and number of ranks; return how many still cut a row."""
    tried = before = after = 0
    for name in NAMES:
        cut = 0
        for num_classes in range(1, 1001):
            for ranks in RANKS:
                model = with_classes(root_of(name), num_classes)
                was_cut = bool(cut_rows(model, ranks))
                cut += was_cut
                tried += 1
                if was_cut:
                    lay_out(model, ranks)
                    after += bool(cut_rows(model, ranks))
        before += cut
        print(f"{name}: {cut} of {1000 * len(RANKS)} cut without keep_rows_whole", flush=True)
    print(f"{tried} layouts: {before} with a cut row without keep_rows_whole, {after} with it")
    return after


if __name__ == "__main__":
    sys.exit(sweep() > 0)
