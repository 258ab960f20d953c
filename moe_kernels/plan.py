"""What every backend is given: the rows' order by expert, the experts' weights, the activation."""

from typing import NamedTuple

import torch
from torch import Tensor

DROPPED = -1


class Activation(NamedTuple):
    """A function of all of z or, where z has a gate and a value half, of the gate half only."""

    function: str
    is_gated: bool


ACTIVATIONS = {
    "gelu": Activation("gelu", is_gated=False),
    "relu": Activation("relu", is_gated=False),
    "silu": Activation("silu", is_gated=False),
    "swiglu": Activation("silu", is_gated=True),
    "geglu": Activation("gelu", is_gated=True),
}


class Weights(NamedTuple):
    """The weights of E experts, stored with the expert in the first dimension's blocks.

    w_in [E*F, D] (gated: [E*2F, D], an expert's gate rows first), b_in [E, F], w_out [E*D, F],
    b_out [E, D].
    """

    w_in: Tensor
    b_in: Tensor | None
    w_out: Tensor
    b_out: Tensor | None


class RowPlan(NamedTuple):
    """Where each of the R = T*k routed rows stands when rows are sorted by expert.

    Row t*k+j ("flat index") is choice j of token t. Dropped rows stand behind all experts' rows.

    Attributes:
        order_R: int32, the flat index of each sorted row.
        inverse_R: int32, the sorted position of each flat index; -1 for a dropped row.
        offset_E1: int32 [E+1], expert e owns the sorted rows offset[e] .. offset[e+1]-1.
    """

    order_R: Tensor
    inverse_R: Tensor
    offset_E1: Tensor


def plan_rows(expert_id_Tk: Tensor, num_experts: int) -> RowPlan:
    """Return the rows' stable order by expert, computed on their device without a host sync.

    An id outside 0 .. num_experts-1 drops the row: no expert computes it and it adds nothing.
    """
    flat_R = expert_id_Tk.reshape(-1)
    # A radix sort works through the key's bits, so the key is as narrow as the experts allow.
    key_dtype = torch.uint8 if num_experts <= torch.iinfo(torch.uint8).max else torch.int32
    # -1 modulo num_experts + 1 is num_experts: what is dropped sorts last.
    key_R = flat_R.clamp(-1, num_experts).remainder(num_experts + 1).to(key_dtype)
    # Stable, so that the order of the sums in backward, and with it every bit, repeats.
    sorted_key_R, order_R = torch.sort(key_R, stable=True)
    bound_E1 = torch.arange(num_experts + 1, device=flat_R.device, dtype=torch.int32)
    offset_E1 = torch.searchsorted(sorted_key_R.int(), bound_E1, out_int32=True)
    position_R = torch.arange(flat_R.numel(), device=flat_R.device, dtype=torch.int32)
    inverse_R = torch.empty_like(position_R).scatter_(0, order_R, position_R)
    inverse_R.masked_fill_(inverse_R >= offset_E1[-1], DROPPED)
    return RowPlan(order_R.int(), inverse_R, offset_E1)
