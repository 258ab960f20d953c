"""Collectives: values that all ranks agree on, sums with a gradient, rows sent between experts.

    one rank's outcome -> broadcast_or_raise -> every rank has the value, or raises the same error
    x_RD -> ExpertExchange.rows -> the rows that the peers sent to the experts here

Every rank must enter each of them, or the others wait until distributed.timeout_s.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import zip_longest
from typing import Protocol, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from parallel.distributed import Meshes

T = TypeVar("T")


def capture(function: Callable[..., T], *arguments: object) -> T | Exception:
    """Return what a function returns or raises, so that one rank can tell the others."""
    try:
        return function(*arguments)
    except (OSError, ValueError) as error:
        return error


def from_main(value: T) -> T:
    """Return rank 0's `value` on every rank, so that one rank decides. Collective."""
    box = [value]
    dist.broadcast_object_list(box, src=0, device=torch.device("cpu"))
    return box[0]


def broadcast_or_raise(outcome: T | Exception) -> T:
    """Return rank 0's value on every rank, or raise its error there. Collective."""
    answer = from_main(outcome)
    if isinstance(answer, Exception):
        raise answer
    return answer


def all_gather(value: T) -> list[T]:
    """Return every rank's value on every rank. Collective."""
    values: list = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather(value: T) -> list[T]:
    """Return every rank's value on rank 0, an empty list elsewhere. Collective."""
    values: list = [None] * dist.get_world_size() if dist.get_rank() == 0 else []
    dist.gather_object(value, values or None)
    return values


def scatter(values: list[T]) -> T:
    """Return the item of rank 0's list that is for this rank. Collective."""
    box: list = [None]
    dist.scatter_object_list(box, values or None)
    return box[0]


def require_equal(name: str, value: str) -> None:
    """Raise ValueError on every rank if `value` differs between ranks. Collective."""
    values = all_gather(value)
    for rank, item in enumerate(values):
        if item != values[0]:
            pairs = zip_longest(values[0].splitlines(), item.splitlines(), fillvalue="nothing")
            ours, theirs = next(pair for pair in pairs if pair[0] != pair[1])
            raise ValueError(
                f"{name} differs between ranks: rank 0: {ours.strip()}; "
                f"rank {rank}: {theirs.strip()}"
            )


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, value: Tensor) -> Tensor:
        del ctx
        total = value.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: torch.autograd.function.FunctionCtx, *grads: Tensor) -> Tensor:
        del ctx
        # Every rank computes the same loss from the same total, so the sum of the ranks'
        # gradients is one of them times their number: no second collective.
        return grads[0] * dist.get_world_size()


def sum_over_ranks(value: Tensor) -> Tensor:
    """Return the sum of `value` over all ranks, differentiable. Collective.

    For statistics from which every rank computes the same loss L: if each rank then takes the
    gradient of L / ranks and gradients are summed over ranks, the result is the gradient of L.
    """
    return _SumOverRanks.apply(value)


class _Context(Protocol):
    """What autograd hands to setup_context and backward."""

    saved_tensors: tuple[Tensor, Tensor]
    num_rows: int
    group: str

    def save_for_backward(self, *tensors: Tensor) -> None: ...


def _group(name: str) -> dist.ProcessGroup:
    return torch._C._distributed_c10d._resolve_process_group(name)  # type: ignore[arg-type]


# Custom ops, so that a compiled block has them in its graph and not a break around each. They take
# the group by name, since a graph holds no objects; how many rows arrive is known only at run time.
@torch.library.custom_op("moevit::exchange_counts", mutates_args=())
def _exchange_counts(send_Ee: Tensor, group: str) -> Tensor:
    received_Ee = torch.empty_like(send_Ee, memory_format=torch.contiguous_format)
    dist.all_to_all_single(received_Ee, send_Ee.contiguous(), group=_group(group))
    return received_Ee


@_exchange_counts.register_fake
def _exchange_counts_fake(send_Ee: Tensor, _: str) -> Tensor:
    return torch.empty_like(send_Ee, memory_format=torch.contiguous_format)


@torch.library.custom_op("moevit::exchange_rows", mutates_args=())
def _exchange_rows(
    x_RD: Tensor, send_P: Tensor, receive_P: Tensor, num_rows: int | None, group: str
) -> Tensor:
    send, receive = send_P.tolist(), receive_P.tolist()
    sent, received = sum(send), sum(receive)
    y_ND = x_RD.new_empty(received if num_rows is None else num_rows, x_RD.shape[1])
    rows = x_RD[:sent].contiguous()
    dist.all_to_all_single(y_ND[:received], rows, receive, send, group=_group(group))
    y_ND[received:].zero_()
    return y_ND


@_exchange_rows.register_fake
def _exchange_rows_fake(
    x_RD: Tensor, _: Tensor, __: Tensor, num_rows: int | None, ___: str
) -> Tensor:
    size = torch.library.get_ctx().new_dynamic_size() if num_rows is None else num_rows
    return x_RD.new_empty(size, x_RD.shape[1])


def _keep_for_exchange(
    ctx: _Context, inputs: tuple[Tensor, Tensor, Tensor, int | None, str], output: Tensor
) -> None:
    x_RD, send_P, receive_P, _, ctx.group = inputs
    ctx.num_rows = x_RD.shape[0]
    ctx.save_for_backward(send_P, receive_P)


def _differentiate_exchange(ctx: _Context, dy_ND: Tensor) -> tuple[Tensor | None, ...]:
    send_P, receive_P = ctx.saved_tensors
    dx_RD = _exchange_rows(dy_ND, receive_P, send_P, ctx.num_rows, ctx.group)
    return dx_RD, None, None, None, None


_exchange_rows.register_autograd(_differentiate_exchange, setup_context=_keep_for_exchange)


@dataclass(frozen=True)
class ExpertExchange:
    """This rank's expert-parallel group as moe.py sees it: its size, and how to exchange rows."""

    size: int
    rank: int
    group: str

    def counts(self, send_Ee: Tensor) -> Tensor:
        """Return how many rows arrive: [ep, experts here] sent per peer -> the same, received."""
        return _exchange_counts(send_Ee, self.group)

    def rows(
        self, x_RD: Tensor, *, send_P: Tensor, receive_P: Tensor, num_rows: int | None = None
    ) -> Tensor:
        """Send `send_P[p]` rows to each peer p, in order, and return what arrives; differentiable.

        The counts are on the host. Rows of x_RD after those that are sent stay here and get a
        gradient of zero. Rows of zeros follow what arrives, up to `num_rows` in all.
        """
        return _exchange_rows(x_RD, send_P, receive_P, num_rows, self.group)


def expert_exchange(meshes: Meshes) -> ExpertExchange:
    """Return the exchange over the mesh's `ep` axis."""
    axis = meshes.expert["ep"]
    return ExpertExchange(axis.size(), axis.get_local_rank(), axis.get_group().group_name)
