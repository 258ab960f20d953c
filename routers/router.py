"""Choose each token's experts and their weights, and compute the balance loss.

    x_TD -> gate (logits, noise, scores) -> top k -> capacity -> expert_id_Tk, weight_Tk
                         |__ sums over tokens -> sum_over_ranks -> balance_loss

The gates are in gates.py; all that follows the scores is the same for every router. No collective
and no expert here.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from options.checks import check_moe
from options.schema import MoEOptions
from routers.balance import Scores, balance_loss, count_rows
from routers.gates import GATES, renormalized


@dataclass(frozen=True)
class Routing:
    """Where the tokens of this rank go.

    expert_id_Tk: int64 in 0..E-1, the token's best expert first; E: dropped, over capacity.
    weight_Tk: fp32, differentiable; 0 where dropped, and the others are not renormalised.
    balance_loss: 0-d, coefficients included, the same on every rank; 0 in eval. See balance.py.
    rows_per_expert_E: int64, this rank's rows that chose each expert, dropped ones included.
    num_dropped: int64, 0-d, how many of those rows were dropped.
    """

    expert_id_Tk: Tensor
    weight_Tk: Tensor
    balance_loss: Tensor
    rows_per_expert_E: Tensor
    num_dropped: Tensor


def jittered(x_TD: Tensor, jitter: float) -> Tensor:
    """Return x times U(1 - jitter, 1 + jitter), drawn per element, in fp32 or wider."""
    x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    return x_TD * torch.empty_like(x_TD).uniform_(1 - jitter, 1 + jitter)


def some_closed(ranking_TE: Tensor, probability: float) -> Tensor:
    """Close each token's experts with `probability`: rank them behind all of its open ones.

    They keep their order there, so a token with fewer than k open experts takes the best closed.
    """
    is_closed_TE = torch.rand_like(ranking_TE.contiguous()) < probability
    span_T1 = ranking_TE.amax(1, keepdim=True) - ranking_TE.amin(1, keepdim=True) + 1
    return ranking_TE - is_closed_TE * span_T1


def keep_within_capacity(
    expert_id_Tk: Tensor, priority_T: Tensor, *, num_experts: int, capacity: int
) -> Tensor:
    """Return which rows fit, [T, k] bool, if no expert takes more than `capacity` of them.

    All tokens' first choices queue before all second choices, and so on. Within a choice, tokens of
    higher priority come first, then earlier tokens. The host does not wait.

    Source: batch prioritised routing, arXiv 2106.05974, section 4.
    """
    num_tokens, top_k = expert_id_Tk.shape
    order_T = priority_T.argsort(descending=True, stable=True)
    queue_R = expert_id_Tk[order_T].T.reshape(-1)
    # A stable sort by expert keeps the queue's order within each expert: the distance to the
    # expert's first row is the row's place in its queue.
    sorted_R, from_R = queue_R.sort(stable=True)
    count_E = count_rows(queue_R, num_experts=num_experts)
    start_E = count_E.cumsum(0) - count_E
    place_R = torch.arange(len(queue_R), device=queue_R.device) - start_E[sorted_R]
    is_kept_R = torch.empty_like(queue_R, dtype=torch.bool)
    is_kept_R[from_R] = place_R < capacity
    is_kept_Tk = torch.empty_like(expert_id_Tk, dtype=torch.bool)
    is_kept_Tk[order_T] = is_kept_R.view(top_k, num_tokens).T
    return is_kept_Tk


class Router(nn.Module):
    """Send each token to `top_k` of `num_experts` experts; the options are in options/schema.py.

    The gate computes in fp32 whatever the dtypes of its input and weight. Noise and jitter are
    drawn from the global generator, in training only; eval changes no state and computes no loss.

    The balance loss covers all ranks' tokens of this microbatch; balance.py explains the losses and
    what the caller must do for a right gradient. Capacity and random draws are each rank's own.

    Details of some options:
        jitter: keeps an fp32 copy of the gate's input for backward.
        expert_drop: see some_closed; weights do not change.
        capacity_factor: in training, an expert takes at most ceil(capacity_factor * T * k / E) of a
            rank's rows; see keep_within_capacity. A token's priority is its best score. In eval
            there is no limit, because an image's result must not depend on the rest of its batch.
        forced_balance: choice j of token t goes to expert (t * k + j) % E.
        sequence_coef: needs `tokens_per_image` in forward.

    Raises:
        ValueError: an option is out of range or has no effect given the others.
    """

    def __init__(self, dim: int, options: MoEOptions) -> None:
        super().__init__()
        check_moe(options)
        self.options = options
        self.gate = GATES[options.router](dim, options)

    def _choose(self, ranking_TE: Tensor) -> Tensor:
        num_tokens, num_experts = ranking_TE.shape
        if not self.options.forced_balance:
            # The choice has no gradient; the weights, gathered from gate_TE, carry it all.
            ranking_TE = ranking_TE.detach()
            if self.training and self.options.expert_drop:
                ranking_TE = some_closed(ranking_TE, self.options.expert_drop)
            return ranking_TE.topk(self.options.top_k).indices
        rows_R = torch.arange(num_tokens * self.options.top_k, device=ranking_TE.device)
        return (rows_R % num_experts).view(num_tokens, -1)

    def _drop(
        self, expert_id_Tk: Tensor, weight_Tk: Tensor, priority_T: Tensor, factor: float
    ) -> tuple[Tensor, Tensor]:
        capacity = math.ceil(factor * expert_id_Tk.numel() / self.options.num_experts)
        is_kept_Tk = keep_within_capacity(
            expert_id_Tk, priority_T, num_experts=self.options.num_experts, capacity=capacity
        )
        # Not `where`: on CUDA it would copy the scalar to the device, and the host would wait.
        is_dropped_Tk = ~is_kept_Tk
        return (
            expert_id_Tk.masked_fill(is_dropped_Tk, self.options.num_experts),
            weight_Tk.masked_fill(is_dropped_Tk, 0),
        )

    def forward(
        self,
        x_TD: Tensor,
        *,
        sum_over_ranks: Callable[[Tensor], Tensor],
        tokens_per_image: int | None = None,
    ) -> Routing:
        """Return where the tokens go.

        Calls `sum_over_ranks` on one vector, in training, if a balance loss is switched on.
        """
        o = self.options
        if self.training and o.jitter:
            x_TD = jittered(x_TD, o.jitter)
        scores: Scores = self.gate(x_TD)
        expert_id_Tk = self._choose(scores.ranking_TE)
        score_Tk = scores.gate_TE.gather(1, expert_id_Tk)
        weight_Tk = renormalized(score_Tk) if o.is_normalized else score_Tk
        loss = weight_Tk.new_zeros(())
        # Before any row is dropped: the loss is about what the router asks for.
        if self.training and o.has_balance_loss:
            loss = balance_loss(
                scores,
                expert_id_Tk,
                weight_Tk,
                o=o,
                tokens_per_image=tokens_per_image,
                sum_over_ranks=sum_over_ranks,
            )
        rows_E = count_rows(expert_id_Tk, num_experts=o.num_experts)
        num_dropped = rows_E.new_zeros(())
        if self.training and o.capacity_factor is not None:
            priority_T = score_Tk.detach().amax(1)
            expert_id_Tk, weight_Tk = self._drop(
                expert_id_Tk, weight_Tk, priority_T, o.capacity_factor
            )
            num_dropped = (expert_id_Tk == o.num_experts).sum()
        return Routing(expert_id_Tk, weight_Tk, loss, rows_E, num_dropped)
