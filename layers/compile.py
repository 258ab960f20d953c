"""torch.compile of the transformer blocks: a graph per kind of block, and no break in any.

    check_compiler -> blocks -> compile_blocks -> Block.forward runs a compiled graph

Module hooks, with which Megatron-FSDP gathers and releases weights, run around the graph in Python:
a step leaves compiled code once per block and pass. What does not fit in one graph, or needs a new
graph again and again, is an error. Names of parameters stay as they are. No model here.
"""

from __future__ import annotations

import importlib
from collections.abc import Iterable

import torch
from torch import nn

# Three kinds of blocks (the first without drop path, dense, experts) times three uses (training,
# validation, its shorter last batch) are 9. Far above, something would compile in every step.
MAX_GRAPHS = 32


def check_compiler(device: torch.device) -> None:
    """Refuse what could not be compiled, before the first step.

    Raises:
        ValueError: There is no Triton for the device, or no C++ compiler for a CPU.
    """
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
            f"config model.compile=true: needs a C++ compiler on a CPU, such as g++, or where the "
            f"variable CXX says: {error} (use compile=false)"
        ) from error


def compile_blocks(blocks: Iterable[nn.Module], *, backend: str = "inductor") -> None:
    """Let each block's forward run compiled, in place; its hooks stay outside of the graph.

    Not `Module.compile`, which would put the hooks inside, where each breaks the graph. Graphs are
    shared by blocks that differ in values only. Shapes are fixed in each: the training batch and
    the two sizes of validation batches have their own, and none is slower for being general.
    """
    # Beyond the limit torch would run the block uncompiled; with fullgraph it is an error.
    dynamo = importlib.import_module("torch._dynamo")
    dynamo.config.recompile_limit = MAX_GRAPHS
    for block in blocks:
        compiled = torch.compile(block.forward, fullgraph=True, dynamic=False, backend=backend)
        block.forward = compiled  # type: ignore[method-assign]
