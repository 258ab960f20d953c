"""The mixture-of-experts feed-forward: route, exchange rows with peers, experts, combine.

    x_BLD -> router -> expert ids and weights
          -> rows sorted by expert -> all-to-all -> experts here -> all-to-all -> weighted sum

With ep=1 no rows are exchanged and the host never waits. routers/router.py decides which experts a
token goes to, moe_kernels/ops.py multiplies the rows. This file calls only the collectives that it
is given.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from layers import init
from layers.modules import Mlp, through
from moe_kernels import ops
from options.schema import MoEOptions
from parallel.collectives import ExpertExchange
from routers.router import Router, Routing


class Experts(nn.Module):
    """The weights of this rank's e experts: experts rank*e to (rank+1)*e - 1 of the layer.

    w_in [e*F, D] (twice the rows for gated activations), b_in [e, F], w_out [e*D, F], b_out [e, D];
    without biases there is no b_in and b_out. Megatron-FSDP shards a tensor by whole rows, so an
    [e, F, D] would split into whole experts only, and few experts over many ranks would need
    padding. The 2-D tensors split at any row.
    """

    def __init__(
        self, dim: int, options: MoEOptions, *, bias: bool, exchange: ExpertExchange | None
    ) -> None:
        super().__init__()
        self.ep_size, self.ep_rank = (exchange.size, exchange.rank) if exchange else (1, 0)
        local, hidden_dim = options.num_experts // self.ep_size, int(dim * options.mlp_ratio)
        rows = hidden_dim * (2 if ops.ACTIVATIONS[options.activation][1] else 1)
        self.activation = options.activation
        self.num_local = local
        self.w_in = nn.Parameter(torch.empty(local * rows, dim))
        self.b_in = nn.Parameter(torch.empty(local, rows)) if bias else None
        self.w_out = nn.Parameter(torch.empty(local * dim, hidden_dim))
        self.b_out = nn.Parameter(torch.empty(local, dim)) if bias else None
        self.mark()

    def mark(self) -> None:
        """Tell Megatron-FSDP that these tensors differ between the ranks of `ep`.

        `allreduce = False` puts them on the expert mesh, so that gradients of different experts are
        not summed. "column" declares that `ep` splits the rows, so that checkpoints and norms see
        one global tensor. The library reads both from the parameter itself.
        """
        for parameter in self.parameters(recurse=False):
            parameter.allreduce = False  # type: ignore[attr-defined]
            parameter._tensor_parallel_mode = "column"  # type: ignore[attr-defined]

    def initial_value(self, name: str, *, seed: int, full_name: str) -> Tensor:
        """Return this rank's slice of the global tensor: N(0, 0.02^2) weights, zero biases."""
        # Every rank draws the global tensor, so that an expert starts equal whatever `ep` is.
        shape = self.get_parameter(name).shape
        if name.startswith("b_"):
            return torch.zeros(shape)
        whole = torch.Size((shape[0] * self.ep_size, shape[1]))
        values = init.normal(whole, 0.02, rng=init.generator(seed, full_name))
        return values.chunk(self.ep_size)[self.ep_rank].clone()


class MoE(nn.Module):
    """Mixture-of-experts feed-forward of a block: x_BLD -> x_BLD.

    A token's output is the sum over its k experts of weight * expert(x), plus the shared expert's
    output if there is one. After each forward, `routing` holds the balance loss, which the caller
    adds to the training loss, and the number of rows of each expert.
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
        exchange: ExpertExchange | None = None,
        sum_over_ranks: Callable[[Tensor], Tensor],
    ) -> None:
        super().__init__()
        self.router = router
        self.experts = Experts(dim, options, bias=bias, exchange=exchange)
        shared_dim = int(dim * options.shared_ratio)
        self.shared = Mlp(dim, shared_dim, bias=bias) if shared_dim else None
        self.drop = nn.Dropout(drop) if drop > 0 else None
        self.kernel_backend = kernel_backend
        self.exchange = exchange
        self.sum_over_ranks = sum_over_ranks
        self.routing = None

    @contextlib.contextmanager
    def recomputation(self) -> Iterator[None]:
        """Keep the first forward's `routing`: a recomputed one would keep its whole graph alive."""
        kept = self.routing
        try:
            yield
        finally:
            self.routing = kept

    def __getstate__(self) -> dict[str, object]:
        """Leave out the last forward's `routing`, whose graph cannot be copied."""
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
            e.w_in,
            e.b_in,
            e.w_out,
            e.b_out,
            activation=e.activation,
            backend=self.kernel_backend,
        )

    def _among_peers(self, x_TD: Tensor, routing: Routing, exchange: ExpertExchange) -> Tensor:
        """Send each row to the rank of its expert and back; the host waits once, for counts."""
        # Experts are numbered rank by rank, so rows sorted by expert are sorted by peer too.
        size, num_experts = exchange.size, self.router.options.num_experts
        plan = ops.plan_rows(routing.expert_id_Tk, num_experts)
        send_Ee = plan.rows_per_expert_E.view(size, num_experts // size)
        receive_Ee = exchange.counts(send_Ee)
        # all_to_all takes row counts from the host, and only the host can allocate what arrives.
        # One copy brings both counts; the way back exchanges the two and so needs no other.
        send_P, receive_P = torch.stack([send_Ee.sum(1), receive_Ee.sum(1)]).cpu().unbind()
        # Dropped rows stand behind all experts' rows: what is sent is a prefix, and they stay here.
        num_choices = routing.weight_Tk.shape[1]
        x_RD = ops.gather_rows(x_TD, plan, num_choices=num_choices, backend=self.kernel_backend)
        x_ND = exchange.rows(x_RD, send_P=send_P, receive_P=receive_P)
        # What arrives is sorted by peer, then expert: the second plan sorts it by expert, and its
        # combine, with weights of one, restores the order in which the peers expect their rows.
        one_N1 = routing.weight_Tk.new_ones(x_ND.shape[0], 1)
        y_ND = self._experts(x_ND, one_N1, ops.RowPlan(*_plan_arrived(x_ND, receive_Ee)))
        # The gate weights are here, and `num_rows` adds zeros for the dropped rows.
        y_RD = exchange.rows(y_ND, send_P=receive_P, receive_P=send_P, num_rows=x_RD.shape[0])
        return ops.combine(y_RD, routing.weight_Tk, plan.inverse_R, backend=self.kernel_backend)


# A custom op, because a compiled graph cannot trace a sort over a number of rows that it learns at
# run time.
@torch.library.custom_op("moevit::plan_arrived", mutates_args=())
def _plan_arrived(x_ND: Tensor, rows_Pe: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the RowPlan's fields for rows that arrived sorted by peer, then by expert."""
    num_peers, num_experts = rows_Pe.shape
    local_e = torch.arange(num_experts, device=x_ND.device).repeat(num_peers)
    expert_id_N = local_e.repeat_interleave(rows_Pe.flatten(), output_size=x_ND.shape[0])
    plan = ops.plan_rows(expert_id_N[:, None], num_experts)
    return plan.order_R, plan.inverse_R, plan.offset_E1, plan.rows_per_expert_E


@_plan_arrived.register_fake
def _plan_arrived_fake(x_ND: Tensor, rows_Pe: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    sizes = (x_ND.shape[0], x_ND.shape[0], rows_Pe.shape[1] + 1, rows_Pe.shape[1])
    order_N, inverse_N, offset_E1, rows_E = (
        x_ND.new_empty(size, dtype=torch.int32) for size in sizes
    )
    return order_N, inverse_N, offset_E1, rows_E


def balance_loss(model: nn.Module) -> Tensor:
    """Return the sum of the last forward's balance losses, 0 for a dense model."""
    losses = [routing.balance_loss for routing in routings(model).values()]
    # A dense model's zero stays on the host: a copy to the device would make the host wait.
    return sum(losses[1:], losses[0]) if losses else torch.zeros(())


def routings(model: nn.Module) -> dict[str, Routing]:
    """Return the last forward's routings by the layer's name in the ViT."""
    return {
        name.removeprefix("module."): module.routing
        for name, module in model.named_modules()
        if isinstance(module, MoE) and module.routing is not None
    }


def expert_load(model: nn.Module) -> dict[str, Tensor]:
    """Return this rank's rows per expert in the last forward, followed by the dropped, [E+1]."""
    return {
        name: torch.cat([routing.rows_per_expert_E, routing.num_dropped[None]])
        for name, routing in routings(model).items()
    }
