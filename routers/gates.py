"""The gates, which score each token with each expert, by the names of model.moe.router.

    x_TD -> logits_TE -> noise, in training -> softmax or sigmoid -> Scores

A new router is a class like LinearGate, a line in GATES here and one in ROUTERS of
options/schema.py; see docs/moe.md. routers/router.py chooses the experts.
"""

import torch
from torch import Tensor, nn

from options.schema import MoEOptions
from routers.balance import Scores

SMALLEST_SUM = 1e-20  # keeps weights finite if all of a token's scores underflow
LEARNT_NOISE_FLOOR = 0.01  # smallest noise, as a standard deviation, that noisy_topk can learn


def softmax_over_experts(logits_TE: Tensor) -> Tensor:
    """Return the softmax of each token's logits, stored expert by expert.

    A CPU vectorises over neighbours in memory. Many tokens' logits for one expert fill its vectors,
    one token's few logits do not: this layout takes a tenth of the time.
    """
    return logits_TE.T.softmax(0).T


def renormalized(weight: Tensor) -> Tensor:
    """Return `weight` divided by the sum of each row."""
    return weight / (weight.sum(-1, keepdim=True) + SMALLEST_SUM)


class _FullPrecisionLinear(torch.autograd.Function):
    """x @ weight.T in fp32 or better; saves its inputs for backward, not their fp32 copies.

    The result is stored expert by expert, the layout of softmax_over_experts.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x_TD: Tensor, weight_ED: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        # Not weight_ED.to(): Megatron-FSDP overrides that method, which breaks a compiled graph.
        return (weight_ED.type(dtype) @ x_TD.to(dtype).T).T

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *grads: Tensor
    ) -> tuple[Tensor | None, Tensor | None]:
        x_TD, weight_ED = ctx.saved_tensors  # type: ignore[attr-defined]
        grad_TE = grads[0]
        grad_x_TD = grad_weight_ED = None
        if ctx.needs_input_grad[0]:  # type: ignore[attr-defined]
            grad_x_TD = (grad_TE @ weight_ED.type(grad_TE.dtype)).to(x_TD.dtype)
        if ctx.needs_input_grad[1]:  # type: ignore[attr-defined]
            grad_weight_ED = (grad_TE.T @ x_TD.to(grad_TE.dtype)).to(weight_ED.dtype)
        return grad_x_TD, grad_weight_ED


class LearntNoise(nn.Module):
    """The weight of noisy_topk's noise; a module of its own because its initial value is zero."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, dim))

    def initial_value(self, name: str, *, seed: int, full_name: str) -> Tensor:
        """Return zeros: all noise starts with standard deviation ln 2 + 0.01."""
        del seed, full_name
        return torch.zeros(self.get_parameter(name).shape, device="cpu")

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return the standard deviation of the noise on each logit, [T, E]."""
        raw_TE = _FullPrecisionLinear.apply(x_TD, self.weight)
        return nn.functional.softplus(raw_TE) + LEARNT_NOISE_FLOOR


class LinearGate(nn.Module):
    """Scores from one linear map of the token.

    | router     | noise on the logits, in training            | gate from the ranking   |
    |------------|---------------------------------------------|-------------------------|
    | softmax    | none                                        | softmax over all experts|
    | sigmoid    | none                                        | sigmoid                 |
    | noisy      | noise_std / E                               | softmax over all experts|
    | noisy_topk | softplus(x noise.weight^T) + 0.01           | softmax over all experts|

    Source: noisy: V-MoE, arXiv 2106.05974, section 2; noisy_topk: arXiv 1701.06538, eq. 3 to 5,
    with a floor under the noise. (Its softmax over the k chosen logits equals the softmax over all
    logits, renormalised over the chosen.)
    """

    def __init__(self, dim: int, o: MoEOptions) -> None:
        super().__init__()
        self.is_sigmoid = o.router == "sigmoid"
        self.noise_std = o.noise_std / o.num_experts
        self.weight = nn.Parameter(torch.empty(o.num_experts, dim))
        self.noise = LearntNoise(dim, o.num_experts) if o.router == "noisy_topk" else None

    def _noise_std(self, x_TD: Tensor, logits_TE: Tensor) -> Tensor | None:
        if not self.training:
            return None
        if self.noise is not None:
            return self.noise(x_TD)
        return logits_TE.new_full((), self.noise_std) if self.noise_std else None

    def forward(self, x_TD: Tensor) -> Scores:
        """Return the scores of every token for every expert."""
        logits_TE = _FullPrecisionLinear.apply(x_TD, self.weight)
        noise_std = self._noise_std(x_TD, logits_TE)
        ranking_TE = logits_TE
        if noise_std is not None:
            # randn_like follows its argument's memory layout: contiguous, tokens draw in order.
            ranking_TE = logits_TE + torch.randn_like(logits_TE.contiguous()) * noise_std
        if not self.is_sigmoid:
            share_TE = softmax_over_experts(ranking_TE)
            return Scores(logits_TE, ranking_TE, share_TE, share_TE, noise_std)
        gate_TE = ranking_TE.sigmoid()
        return Scores(logits_TE, ranking_TE, gate_TE, renormalized(gate_TE), noise_std)


# ROUTERS of options/schema.py says which of them normalise their weights and add noise.
GATES: dict[str, type[nn.Module]] = {
    "softmax": LinearGate,
    "sigmoid": LinearGate,
    "noisy": LinearGate,
    "noisy_topk": LinearGate,
}
