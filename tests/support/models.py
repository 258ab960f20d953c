"""Small networks whose weights all differ, and the files that other projects make of them."""

import dataclasses
import json
import os

import torch

from options import compose
from training import network
from weights import formats
from weights.formats import MtlFile

DIM, DEPTH, HEADS, EXPERTS, HIDDEN, TOP_K = 36, 4, 3, 8, 72, 2


SMALL = [
    "model.vit.img_size=32",
    f"model.vit.embed_dim={DIM}",
    f"model.vit.depth={DEPTH}",
    f"model.vit.num_heads={HEADS}",
    "distributed.ep=1",
]


def model_of(*overrides, recipe="vit_moe_tiny_patch8_64"):
    """A small model with no value like another, in eval mode, and its options."""
    config = compose.compose(recipe, [*SMALL, *overrides])
    model = network.build_model(config, backend="torch", on_meta=False).eval()
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model, dataclasses.asdict(config)


def as_mtl(model, options) -> MtlFile:
    weights = model.state_dict()
    return formats.to_mtl(weights, model=options["model"], config_json=json.dumps(options))


def assert_equal(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
        assert found[name].dtype == tensor.dtype, name


EVERYTHING = [
    "model.vit.qk_norm=true",
    "model.vit.scale_attn_norm=true",
    "model.vit.scale_mlp_norm=true",
    "model.vit.init_values=0.1",
    "model.vit.reg_tokens=2",
    "model.vit.pre_norm=true",
]


def rank_files(moe, *, world, prefix="", others=True):
    """State dicts as FastMoE's ranks save them, each with its experts."""
    file = as_mtl(*moe)
    local = EXPERTS // world
    shards = []
    for rank in range(world):
        shard = {}
        for name, tensor in file.weights.items():
            if "mlp.experts.h" in name:
                shard[prefix + name] = tensor[rank * local : (rank + 1) * local].clone()
            elif rank == 0 or others:
                shard[prefix + name] = tensor
        shards.append(shard)
    return shards, file


class Hostile:
    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def relative_error(actual, expected):
    return ((actual - expected).norm() / expected.norm()).item()
