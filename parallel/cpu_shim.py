"""Megatron-FSDP on a CPU: streams that do nothing, and collectives that gloo does well.

    install() -> the library's modules see a `torch` of their own; `torch` itself stays as it is

The library assumes CUDA: streams, events, asynchronous and coalesced collectives. Replacing the
name `torch` in the modules that use them leaves everybody else's torch alone, so nothing has to be
undone. On CUDA it is not used; parallel/sharding.py installs it before the first model is sharded.
"""

from __future__ import annotations

import contextlib
import importlib
import logging
from collections.abc import Iterator

import torch
import torch.distributed as dist
from torch import Tensor


class _Finished:
    """A collective's handle, a stream or an event: on a CPU there is never anything to wait for."""

    def __init__(self, *_: object, **__: object) -> None: ...

    def wait(self, *_: object) -> None: ...

    wait_stream = wait_event = synchronize = record = wait

    def record_event(self, *_: object) -> _Finished:
        return _Finished()

    def query(self) -> bool:
        return True


class _Forward:
    """A module with some attributes replaced; all others are looked up in the module itself."""

    def __init__(self, target: object, **own: object) -> None:
        self.__dict__.update(own, _target=target)

    def __getattr__(self, name: str) -> object:
        return getattr(self._target, name)


def _cpu_tensor(*args: object, **kwargs: object) -> Tensor:
    """`torch.tensor` whose result stays on the CPU when the library calls `.cuda()` on it."""
    tensor = torch.tensor(*args, **kwargs)  # type: ignore[arg-type]
    tensor.cuda = lambda *_, **__: tensor  # type: ignore[method-assign]
    return tensor


def _all_gather(
    output_tensor: Tensor, input_tensor: Tensor, *, group: dist.ProcessGroup, **_: object
) -> _Finished:
    """Gather and block: coalesced asynchronous collectives on gloo sometimes crash (SIGSEGV)."""
    if group.size() == 1:
        output_tensor.copy_(input_tensor)
    else:  # into a list: gloo takes 1.3 times as long to gather into one tensor
        parts = list(output_tensor.view(group.size(), -1).unbind())
        dist.all_gather(parts, input_tensor, group=group)
    return _Finished()


def _reduce_scatter(output: Tensor, input: Tensor, *, op: object, group: dist.ProcessGroup) -> None:
    """Exchange parts and sum them in rank order: gloo's own reduce-scatter takes twice as long."""
    assert op == dist.ReduceOp.SUM, f"{op}: gradients are sums"
    if group.size() > 1:
        received = torch.empty_like(input)
        dist.all_to_all_single(received, input, group=group)
        torch.sum(received.view(group.size(), -1), dim=0, out=output)
    elif output.data_ptr() != input.data_ptr():
        output.copy_(input)


def _all_reduce(tensor: Tensor, *, op: dist.ReduceOp, group: dist.ProcessGroup) -> None:
    # A group of one rank has nothing to add, and the library asks all the same.
    if group.size() > 1:
        dist.all_reduce(tensor, op=op, group=group)


@contextlib.contextmanager
def _no_coalescing(*_: object, **__: object) -> Iterator[_Finished]:
    yield _Finished()


def install() -> None:
    """Give the library's modules a `torch` with CPU streams; `torch` itself stays as it is."""
    cuda = _Forward(
        torch.cuda,
        Stream=_Finished,
        Event=_Finished,
        current_stream=_Finished,
        stream=lambda _: contextlib.nullcontext(),
        current_device=lambda: 0,
        synchronize=lambda *_: None,
        empty_cache=lambda: None,
        is_available=lambda: False,
    )
    distributed = _Forward(
        dist,
        all_gather_into_tensor=_all_gather,
        reduce_scatter_tensor=_reduce_scatter,
        all_reduce=_all_reduce,
    )
    proxy = _Forward(torch, cuda=cuda, distributed=distributed, tensor=_cpu_tensor)
    for name in ("megatron_fsdp", "param_and_grad_buffer", "uneven_dtensor", "utils"):
        vars(importlib.import_module(f"megatron_fsdp.{name}"))["torch"] = proxy
    buffers = importlib.import_module("megatron_fsdp.param_and_grad_buffer")
    vars(buffers)["_coalescing_manager"] = _no_coalescing
    # It warns on each rank that the device is cpu and not cuda:0, which is what we want.
    logging.getLogger("megatron_fsdp.megatron_fsdp").setLevel(logging.ERROR)
