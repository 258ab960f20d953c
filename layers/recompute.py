"""Activation checkpointing: run a block again in backward instead of keeping its activations."""

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
    """A module that keeps something from its last forward pass."""

    def recomputation(self) -> contextlib.AbstractContextManager[None]:
        """Return a context for running forward again without keeping anything from that run."""


@contextlib.contextmanager
def _recomputation(block: nn.Module) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for module in block.modules():
            if isinstance(module, KeepsFromForward):
                stack.enter_context(module.recomputation())
        yield


def checkpoint(block: nn.Module, x_BLD: Tensor, *, backend: str) -> Tensor:
    """Return block(x_BLD), keeping only x_BLD for backward and running the block again there.

    TE needs its own checkpoint: recomputation runs outside of `fp8_context`, and must neither lose
    fp8 nor record the scaling history twice.
    """
    is_te = backend == "te"
    run = te.transformer_engine().checkpoint if is_te else torch.utils.checkpoint.checkpoint
    return run(
        block,
        x_BLD,
        use_reentrant=False,
        context_fn=lambda: (contextlib.nullcontext(), _recomputation(block)),
    )
