"""A small ViT with experts, alone and over ranks."""

import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

import checkpoint
import moe
from parallel import collectives, distributed, sharding
from routers.router import Router
from tests.support.networks import build_vit, moe_options
from tests.support.sharded import (
    SMALL,
)
from vit import Block, VisionTransformer

EXPERTS = 4


COEFS = dict(switch=0.1, z=0.01)


def moe_vit(exchange=None, seed=0, grad_checkpointing=False, **options) -> VisionTransformer:
    def ffn(block):
        if block == 0:
            return None
        o = moe_options(EXPERTS, hidden_of=(52, 36), top_k=2, coefs=COEFS, **options)
        return moe.MoE(
            36,
            o,
            router=Router(36, o),
            kernel_backend="torch",
            exchange=exchange,
            sum_over_ranks=collectives.sum_over_ranks,
        )

    more = {"grad_checkpointing": grad_checkpointing}
    return build_vit(**SMALL, **more, ffn=ffn, seed=seed)


def step_loss(model, image_BCHW, label_B, *, share):
    logits_BY = model(image_BCHW)
    return (F.cross_entropy(logits_BY, label_B) + moe.balance_loss(model)) * share


def build(world, mesh, *, seed=0, on_meta=True, strategy=3):
    outer, shard, ep = mesh
    meshes = distributed.build_meshes(dp_outer=outer, dp_shard=shard, ep=ep, device=world.device)
    exchange = collectives.expert_exchange(meshes) if ep > 1 else None
    with torch.device("meta" if on_meta else "cpu"):
        model = moe_vit(exchange, seed)
    sharded = sharding.shard_model(model, meshes, unit_types=[Block], strategy=strategy)
    return sharded, sharding.list_shards(sharded, rename=str)


def save_weights(world, mesh, root):
    _, shards = build(world, mesh)
    tensors = {"model": sharding.model_state(shards)}
    checkpoint.save(root, tensors, state={"step": 1, "metrics": {}}, loss=1.0)


# What waits for the device: a value, or a shape that depends on values, is read by the host.
WAITING = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2"}


class WaitCounter(TorchDispatchMode):
    """Notes each operation that would make the host wait for the device."""

    def __init__(self):
        super().__init__()
        self.waits = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if name in WAITING:
            self.waits.append(name)
        result = func(*args, **(kwargs or {}))
        tensors = [a for a in (*args, result) if isinstance(a, torch.Tensor)]
        if name in {"_to_copy", "copy_"} and len({t.device.type for t in tensors}) > 1:
            self.waits.append(name)
        return result
