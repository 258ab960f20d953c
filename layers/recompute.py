"""Activation checkpointing: run a block again in backward instead of keeping what it computed."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol, runtime_checkable

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from layers import te


@runtime_checkable
class KeepsFromForward(Protocol):
    """A module that keeps something of its last forward."""

    def recomputation(self) -> contextlib.AbstractContextManager[None]:
        """Return the context in which its forward runs again; it keeps nothing of that one."""


@contextlib.contextmanager
def _recomputation(block: nn.Module) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module in block.modules():
            if isinstance(module, KeepsFromForward):
                stack.enter_context(module.recomputation())
        yield


def checkpoint(block: nn.Module, x_BLD: Tensor, *, backend: str) -> Tensor:
    """Return block(x_BLD), keeping only x_BLD for backward and running the block again there.

    TE has a checkpoint of its own: recomputation happens outside of `fp8_context`, and must neither
    lose fp8 nor record the scaling history twice.
    """
    run = torch.utils.checkpoint.checkpoint
    if backend == "te":
        run = te.transformer_engine().checkpoint
    return run(
        block,
        x_BLD,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _recomputation(block)),
    )
