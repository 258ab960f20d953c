"""Which experts a token goes to, with what weights, and what uneven use of them costs.

    x_TD -> gate (logits, noise, scores) -> top k -> capacity -> expert_id_Tk, weight_Tk
                         |__ sums over tokens -> sum_over_ranks -> balance_loss

What a gate makes of a token is in gates.py; what follows the scores is the same for all routers.
No collective and no expert here.
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

    expert_id_Tk: int64 in 0..E-1, the token's best expert first; E: dropped for want of capacity.
    weight_Tk: fp32, differentiable; 0 where dropped. What is left is not renormalised.
    balance_loss: 0-d, times its coefficients, the same on every rank; 0 in eval. See balance.py.
    rows_per_expert_E: int64, rows that chose each expert on this rank, dropped ones with them.
    num_dropped: int64, 0-d, how many of them were dropped.
    """

    expert_id_Tk: Tensor
    weight_Tk: Tensor
    balance_loss: Tensor
    rows_per_expert_E: Tensor
    num_dropped: Tensor


def jittered(x_TD: Tensor, jitter: float) -> Tensor:
    """Return x times U(1 - jitter, 1 + jitter), drawn per element, in fp32 or better."""
    x_TD = x_TD.to(torch.promote_types(x_TD.dtype, torch.float32))
    return x_TD * torch.empty_like(x_TD).uniform_(1 - jitter, 1 + jitter)


def some_closed(ranking_TE: Tensor, probability: float) -> Tensor:
    """Return the ranking with each expert behind all open ones with that probability, per token."""
    is_closed_TE = torch.rand_like(ranking_TE.contiguous()) < probability
    span_T1 = ranking_TE.amax(1, keepdim=True) - ranking_TE.amin(1, keepdim=True) + 1
    return ranking_TE - is_closed_TE * span_T1


def keep_within_capacity(
    expert_id_Tk: Tensor, priority_T: Tensor, *, num_experts: int, capacity: int
) -> Tensor:
    """Return which rows fit, [T, k] bool, if no expert takes more than `capacity` of them.

    First come the first choices of all tokens, then the second ones, and so on; within a choice
    tokens of higher priority come first, then earlier ones. No host sync.

    Source: batch prioritised routing, arXiv 2106.05974, section 4.
    """
    num_tokens, top_k = expert_id_Tk.shape
    order_T = priority_T.argsort(descending=True, stable=True)
    queue_R = expert_id_Tk[order_T].T.reshape(-1)
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

    The gate runs in fp32 whatever the dtype of its input and weight. Noise and jitter are drawn
    from the global generator, in training only; eval changes no state and computes no loss.

    The balance loss is over the tokens of all ranks in this microbatch: see balance.py for the
    losses, and for what the caller must do with it to get the right gradient. A capacity, and the
    random draws, are each rank's own.

    What the options do here, where their one line does not say it:
        jitter: keeps an fp32 copy of the gate's input for backward.
        expert_drop: closed experts are chosen, best first, only where fewer than k are open.
            Weights stay as they are.
        capacity_factor: in training, an expert takes at most ceil(capacity_factor * T * k / E) rows
            of a rank; in eval all of them, where a batch must not decide on an image. See
            keep_within_capacity; the priority of a token is its best score.
        forced_balance: choice j of token t goes to expert (t * k + j) % E.
        sequence_coef: needs `tokens_per_image` in forward.

    Raises:
        ValueError: an option is out of range or has no effect beside the others.
    """

    def __init__(self, dim: int, options: MoEOptions) -> None:
        super().__init__()
        check_moe(options)
        self.options = options
        self.gate = GATES[options.router](dim, options)

    def _choose(self, ranking_TE: Tensor) -> Tensor:
        num_tokens, num_experts = ranking_TE.shape
        if not self.options.forced_balance:
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
        # Not `where`: on CUDA that copies the scalar over and waits.
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

        `sum_over_ranks` is called once in training if there is a balance loss, on one vector, and
        not otherwise.
        """
        o = self.options
        if self.training and o.jitter:
            x_TD = jittered(x_TD, o.jitter)
        scores: Scores = self.gate(x_TD)
        expert_id_Tk = self._choose(scores.ranking_TE)
        score_Tk = scores.gate_TE.gather(1, expert_id_Tk)
        weight_Tk = renormalized(score_Tk) if o.is_normalized else score_Tk
        loss = weight_Tk.new_zeros(())
        if self.training and o.has_balance_loss:
            loss = balance_loss(
                scores,
                expert_id_Tk,
                weight_Tk,
                o=o,
                tokens_per_image=tokens_per_image,
                sum_over_ranks=sum_over_ranks,
            )
        rows_E = count_rows(expert_id_Tk, num_experts=self.options.num_experts)
        num_dropped = rows_E.new_zeros(())
        if self.training and o.capacity_factor is not None:
            priority_T = score_Tk.detach().amax(1)
            expert_id_Tk, weight_Tk = self._drop(
                expert_id_Tk, weight_Tk, priority_T, o.capacity_factor
            )
            num_dropped = (expert_id_Tk == self.options.num_experts).sum()
        return Routing(expert_id_Tk, weight_Tk, loss, rows_E, num_dropped)
