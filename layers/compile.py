"""torch.compile of the transformer blocks: one graph per kind of block, without graph breaks.

    check_compiler -> blocks -> compile_blocks -> Block.forward runs a compiled graph

Megatron-FSDP gathers and frees weights in module hooks, which run in Python around the graph, so a
step leaves compiled code once per block and pass. A block that does not fit in one graph, or needs
new graphs again and again, is an error. Parameters keep their names. No model here.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable

import torch
from torch import nn

# Three kinds of blocks (the first without drop path, dense, experts) times three uses (training,
# validation, its shorter last batch) make 9 graphs. Far more would mean that every step compiles.
MAX_GRAPHS = 32


def check_compiler(device: torch.device) -> None:
    """Raise ValueError, before the first step, without Triton for a GPU or C++ for a CPU."""
    if device.type == "cuda":
        if not importlib.import_module("torch.utils._triton").has_triton():
            raise ValueError(
                f"config model.compile=true: needs Triton, which does not work on {device} here "
                "(use compile=false)"
            )
        return
    errors = importlib.import_module("torch._inductor.exc")
    try:
        importlib.import_module("torch._inductor.cpp_builder").get_cpp_compiler()
    except errors.InvalidCxxCompiler as error:
        raise ValueError(
            f"config model.compile=true: needs a C++ compiler on a CPU, g++ or the one that the "
            f"variable CXX names: {error} (use compile=false)"
        ) from error


def compile_blocks(blocks: Iterable[nn.Module], *, backend: str = "inductor") -> None:
    """Compile each block's forward in place, with its hooks outside of the graph.

    `Module.compile` would put the hooks inside, where each breaks the graph. Blocks that differ in
    values only share a graph. Each graph has fixed shapes: the training batch and the two sizes of
    validation batches get their own, so that none is slower for being general.
    """
    # Beyond the limit torch would run the block uncompiled; fullgraph makes that an error.
    dynamo = importlib.import_module("torch._dynamo")
    dynamo.config.recompile_limit = MAX_GRAPHS
    for block in blocks:
        compiled = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=backend)
        block.forward = compiled  # type: ignore[method-assign]
