"""The mixture-of-experts feed-forward: route, exchange rows with peers, experts, combine.

    x_BLD -> router -> expert ids and weights
          -> rows sorted by expert -> all-to-all -> experts here -> all-to-all -> weighted sum

With ep=1 nothing is exchanged and nothing syncs with the host. Which expert a token goes to is
routers.py's business, how rows are multiplied is kernels.py's; no collective is called here that
was not passed in.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Protocol

import torch
from torch import Tensor, nn

from layers import init
from layers.modules import Mlp, through
from moe_kernels import ops
from options.schema import MoEOptions
from routers.router import Router, Routing


class Exchange(Protocol):
    """Expert parallelism as this file needs it; see collectives.ExpertExchange."""

    @property
    def size(self) -> int:
        """Ranks that share out the experts."""

    @property
    def rank(self) -> int:
        """This rank among them."""

    def counts(self, send_Ee: Tensor) -> Tensor:
        """Return how many rows arrive from each peer for each expert here."""

    def rows(
        self, x_RD: Tensor, *, send_P: Tensor, receive_P: Tensor, num_rows: int | None = None
    ) -> Tensor:
        """Send rows to the peers, in order, and return what arrives; differentiable."""


class Experts(nn.Module):
    """The weights of this rank's experts, stored 2-D so that sharding them needs no padding.

    w_in [e*F, D] (twice the rows for gated activations), b_in [e, F], w_out [e*D, F], b_out [e, D]
    (no b_in, b_out without biases), where e is the number of experts on this rank: rows rank*e to
    (rank+1)*e of the global tensors.
    """

    def __init__(
        self,
        dim: int,
        options: MoEOptions,
        *,
        bias: bool,
        ep_size: int,
        ep_rank: int,
    ) -> None:
        super().__init__()
        local, hidden_dim = options.num_experts // ep_size, int(dim * options.mlp_ratio)
        rows = hidden_dim * (2 if ops.ACTIVATIONS[options.activation][1] else 1)
        self.activation = options.activation
        self.ep_size, self.ep_rank = ep_size, ep_rank
        self.num_local = local
        self.w_in = nn.Parameter(torch.empty(local * rows, dim))
        self.b_in = nn.Parameter(torch.empty(local, rows)) if bias else None
        self.w_out = nn.Parameter(torch.empty(local * dim, hidden_dim))
        self.b_out = nn.Parameter(torch.empty(local, dim)) if bias else None
        self.mark()

    def mark(self) -> None:
        """Tell Megatron-FSDP that these are experts: not reduced over `ep`, split over it."""
        for parameter in self.parameters(recurse=False):
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter._tensor_parallel_mode = "column"  # type: ignore[attr-defined]

    def initial_value(self, name: str, *, seed: int, full_name: str) -> Tensor:
        """Return this rank's slice of the global tensor: N(0, 0.02^2) weights, zero biases."""
        shape = self.get_parameter(name).shape
        if name.startswith("b_"):
            return torch.zeros(shape)
        whole = torch.Size((shape[0] * self.ep_size, shape[1]))
        values = init.normal(whole, 0.02, rng=init.generator(seed, full_name))
        return values.chunk(self.ep_size)[self.ep_rank].clone()


class MoE(nn.Module):
    """Mixture-of-experts feed-forward of a block: x_BLD -> x_BLD.

    After each forward, `routing` holds the balance loss to add to the training loss and the rows of
    each expert. A token's output is the sum over its k experts of weight * expert(x), plus the
    shared expert's output if there is one.
    """

    routing: Routing | None

    def __init__(
        self,
        dim: int,
        options: MoEOptions,
        *,
        router: Router,
        bias: bool = True,
        drop: float = 0.0,
        kernel_backend: str,
        exchange: Exchange | None = None,
        sum_over_ranks: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = Experts(
            dim,
            options,
            bias=bias,
            ep_size=1 if exchange is None else exchange.size,
            ep_rank=0 if exchange is None else exchange.rank,
        )
        shared_dim = int(dim * options.shared_ratio)
        self.shared = Mlp(dim, shared_dim, bias=bias) if shared_dim else None
        self.drop = nn.Dropout(drop) if drop > 0 else None
        self.kernel_backend = kernel_backend
        self.exchange = exchange
        self.sum_over_ranks = sum_over_ranks
        self.routing = None

    @contextlib.contextmanager
    def recomputation(self) -> Iterator[None]:
        """Keep `routing` as the forward left it: it would hold all that was recomputed."""
        kept = self.routing
        try:
            yield
        finally:
            self.routing = kept

    def __getstate__(self) -> dict[str, object]:
        """Leave out what belongs to the last forward: a graph cannot be copied."""
        return {**self.__dict__, "routing": None}

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the feed-forward branch: x_BLD -> x_BLD."""
        x_TD = x_BLD.flatten(0, 1)
        routing = self.router(
            x_TD, sum_over_ranks=self.sum_over_ranks, tokens_per_image=x_BLD.shape[1]
        )
        self.routing = routing
        if self.exchange is None:
            plan = ops.plan_rows(routing.expert_id_Tk, self.router.options.num_experts)
            y_TD = self._experts(x_TD, routing.weight_Tk, plan)
        else:
            y_TD = self._among_peers(x_TD, routing, self.exchange)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        return through(self.drop, y_TD).view_as(x_BLD)

    def _experts(self, x_TD: Tensor, weight_Tk: Tensor, plan: ops.RowPlan) -> Tensor:
        e = self.experts
        return ops.moe_ffn(
            x_TD,
            weight_Tk,
            plan,
            ops.Weights(e.w_in, e.b_in, e.w_out, e.b_out),
            activation=e.activation,
            backend=self.kernel_backend,
        )

    def _among_peers(self, x_TD: Tensor, routing: Routing, exchange: Exchange) -> Tensor:
        """Send each row to the rank of its expert and back; waits once, for the counts."""
        size, num_experts = exchange.size, self.router.options.num_experts
        plan = ops.plan_rows(routing.expert_id_Tk, num_experts)
        send_Ee = plan.offset_E1.diff().view(size, num_experts // size)
        receive_Ee = exchange.counts(send_Ee)
        send_P, receive_P = torch.stack([send_Ee.sum(1), receive_Ee.sum(1)]).cpu().unbind()
        # Dropped rows stand last in the plan and stay here.
        num_choices = routing.weight_Tk.shape[1]
        x_RD = ops.gather_rows(x_TD, plan, num_choices=num_choices, backend=self.kernel_backend)
        x_ND = exchange.rows(x_RD, send_P=send_P, receive_P=receive_P)
        one_N1 = routing.weight_Tk.new_ones(x_ND.shape[0], 1)
        y_ND = self._experts(x_ND, one_N1, ops.RowPlan(*_plan_arrived(x_ND, receive_Ee)))
        y_RD = exchange.rows(y_ND, send_P=receive_P, receive_P=send_P, num_rows=x_RD.shape[0])
        return ops.combine(y_RD, routing.weight_Tk, plan.inverse_R, backend=self.kernel_backend)


# A custom op: a graph could not follow what sorts a number of rows that it does not know.
@torch.library.custom_op("moevit::plan_arrived", mutates_args=())
def _plan_arrived(x_ND: Tensor, rows_Pe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the fields of the RowPlan of rows that arrived by peer and, within one, by expert."""
    num_peers, num_experts = rows_Pe.shape
    local_e = torch.arange(num_experts, device=x_ND.device).repeat(num_peers)
    expert_id_N = local_e.repeat_interleave(rows_Pe.flatten(), output_size=x_ND.shape[0])
    return ops.plan_rows(expert_id_N[:, None], num_experts)


@_plan_arrived.register_fake
def _plan_arrived_fake(x_ND: Tensor, rows_Pe: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    new = functools.partial(x_ND.new_empty, dtype=torch.int32)
    return new(x_ND.shape[0]), new(x_ND.shape[0]), new(rows_Pe.shape[1] + 1)


def balance_loss(model: nn.Module) -> Tensor:
    """Return the sum of the balance losses of the last forward, 0 for a dense model."""
    losses = [routing.balance_loss for routing in routings(model).values()]
    # A zero of a dense model stays on the host: to copy it to the device would wait.
    return sum(losses[1:], losses[0]) if losses else torch.zeros(())


def routings(model: nn.Module) -> dict[str, Routing]:
    """Return the routing of the last forward, by the layer's name in the ViT."""
    return {
        name.removeprefix("module."): module.routing
        for name, module in model.named_modules()
        if isinstance(module, MoE) and module.routing is not None
    }


def expert_load(model: nn.Module) -> dict[str, Tensor]:
    """Return this rank's rows per expert in the last forward, then the dropped ones, [E+1]."""
    return {
        name: torch.cat([routing.rows_per_expert_E, routing.num_dropped[None]])
        for name, routing in routings(model).items()
    }
