"""LAMB on shards: Adam's update, scaled for each tensor by the ratio of two norms.

gradients -> moments -> update_P -> squares of all tensors, summed over ranks -> ratios -> weights
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

SumOverRanks = Callable[[Tensor], Tensor]


class Lamb(torch.optim.Optimizer):
    """LAMB whose norms are those of whole tensors, wherever their rows lie.

    update = m / (sqrt(v) + eps) + weight_decay * weight, with Adam's m and v;
    weight -= lr * (norm of weight / norm of update) * update. The ratio is 1 where a norm is 0, and
    in groups without weight decay. A layer's experts together form one tensor.

    Args:
        groups: parameters may be a rank's rows of a tensor, or none of its rows; every rank has
            the same parameters in the same order.
        sum_over_ranks: returns the sum of a tensor over all ranks; a call is a collective. Several
            ranks may hold the same rows if all rows of a tensor have equally many copies: their
            number cancels in the ratio.

    Numerics: moments, norms and ratios in the dtype of the parameters; deterministic. One
    collective per update, with two numbers for each parameter that is scaled; no host sync.

    Source: LAMB (arXiv:1904.00962), algorithm 2, with timm's conventions, which are apex's.
    """

    def __init__(
        self,
        groups: list[dict[str, object]],
        *,
        betas: tuple[float, float],
        eps: float,
        sum_over_ranks: SumOverRanks,
    ) -> None:
        super().__init__(groups, {"lr": 0.0, "weight_decay": 0.0})
        self.betas, self.eps = betas, eps
        self.sum_over_ranks = sum_over_ranks

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update every parameter that has a gradient. Collective."""
        assert closure is None, "gradients are there already"
        updates: dict[nn.Parameter, Tensor] = {}
        for group in self.param_groups:
            present = [p for p in group["params"] if p.grad is not None]
            if present:
                found = self._updates(present, weight_decay=group["weight_decay"])
                updates |= zip(present, found, strict=True)
        ratios = self._ratios(updates)
        for group in self.param_groups:
            present = [p for p in group["params"] if p in updates]
            scaled = [updates[p] for p in present]
            if group["weight_decay"] and present:
                torch._foreach_mul_(scaled, [ratios[p] for p in present])
            if present:
                torch._foreach_add_(present, scaled, alpha=-group["lr"])

    def _state(self, parameter: nn.Parameter) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state["exp_avg"] = torch.zeros_like(parameter)
            state["exp_avg_sq"] = torch.zeros_like(parameter)
        return state

    def _updates(self, present: list[nn.Parameter], *, weight_decay: float) -> list[Tensor]:
        """Take the gradients into the moments; return Adam's updates with the weight decay."""
        beta1, beta2 = self.betas
        states = [self._state(parameter) for parameter in present]
        gradients = [parameter.grad for parameter in present if parameter.grad is not None]
        means = [state["exp_avg"] for state in states]
        squares = [state["exp_avg_sq"] for state in states]
        torch._foreach_lerp_(means, gradients, 1 - beta1)
        torch._foreach_mul_(squares, beta2)
        torch._foreach_addcmul_(squares, gradients, gradients, 1 - beta2)
        torch._foreach_add_([state["step"] for state in states], 1)
        step = int(states[0]["step"])  # on the CPU, and the same for all of them
        scales = torch._foreach_sqrt(squares)
        torch._foreach_div_(scales, (1 - beta2**step) ** 0.5)
        torch._foreach_add_(scales, self.eps)
        updates = torch._foreach_div(means, 1 - beta1**step)
        torch._foreach_div_(updates, scales)
        if weight_decay:
            torch._foreach_add_(updates, list[Tensor](present), alpha=weight_decay)
        return list(updates)

    def _ratios(self, updates: dict[nn.Parameter, Tensor]) -> dict[nn.Parameter, Tensor]:
        """Return norm of weight / norm of update of every parameter that decays. Collective."""
        scaled = [p for g in self.param_groups if g["weight_decay"] for p in g["params"]]
        if not scaled:
            return {}
        own = [p for p in scaled if p in updates and p.numel()]
        weights = dict(zip(own, torch._foreach_norm(own), strict=True)) if own else {}
        changed = [updates[p] for p in own]
        changes = dict(zip(own, torch._foreach_norm(changed), strict=True)) if own else {}
        zero = scaled[0].new_zeros(
            ()
        )  # a rank without rows of a tensor still takes part in the sum
        norms_2P = torch.stack(
            [torch.stack([norms.get(p, zero) for p in scaled]) for norms in (weights, changes)]
        )
        weight_P, change_P = self.sum_over_ranks(norms_2P.square()).sqrt()
        is_scaled_P = (weight_P > 0) & (change_P > 0)
        ratio_P = torch.where(is_scaled_P, weight_P / change_P, 1.0)
        return dict(zip(scaled, ratio_P.unbind(), strict=True))
