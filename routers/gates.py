"""What a token scores with each expert: the gates, by the names of model.moe.router.

    x_TD -> logits_TE -> noise, in training -> softmax or sigmoid -> Scores

A new router is a class like LinearGate, a line in GATES and one in ROUTERS of options/schema.py:
docs/moe.md. No choice of experts here.
"""

import torch
from torch import Tensor, nn

from options.schema import MoEOptions
from routers.balance import Scores

SMALLEST_SUM = 1e-20  # keeps weights finite where every score of a token underflowed
LEARNT_NOISE_FLOOR = 0.01  # least standard deviation of noise that a noisy_topk gate can learn


def softmax_over_experts(logits_TE: Tensor) -> Tensor:
    """Return the softmax of each token's logits, stored expert by expert.

    A CPU computes neighbours in memory at once: many tokens' numbers of one expert take a tenth of
    the time of one token's few experts.
    """
    return logits_TE.T.softmax(0).T


def renormalized(weight: Tensor) -> Tensor:
    """Return `weight` with rows that sum to 1."""
    return weight / (weight.sum(-1, keepdim=True) + SMALLEST_SUM)


class _FullPrecisionLinear(torch.autograd.Function):
    """x @ weight.T in fp32 or better; keeps its inputs for backward, not their fp32 copies.

    The result is stored expert by expert, as softmax_over_experts wants it.
    """

    @staticmethod
    def forward(
        ctx: torch.autograd.function.FunctionCtx, x_TD: Tensor, weight_ED: Tensor
    ) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        # Not weight_ED.to(): Megatron-FSDP puts a function of its own there, which breaks a graph.
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
    """The weight of noisy_topk's noise: a module of its own, for its values start at zero."""

    def __init__(self, dim: int, num_experts: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_experts, dim))

    def initial_value(self, name: str, *, seed: int, full_name: str) -> Tensor:
        """Return zeros: every token's noise starts with standard deviation ln 2 + 0.01."""
        del seed, full_name
        return torch.zeros(self.get_parameter(name).shape, device="cpu")

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return the standard deviation of the noise on each logit, [T, E]."""
        raw_TE = _FullPrecisionLinear.apply(x_TD, self.weight)
        return nn.functional.softplus(raw_TE) + LEARNT_NOISE_FLOOR


class LinearGate(nn.Module):
    """Scores of one linear map of the token.

    | router     | noise on the logits, in training            | gate of ranking r       |
    |------------|---------------------------------------------|-------------------------|
    | softmax    | none                                        | softmax over all experts|
    | sigmoid    | none                                        | sigmoid                 |
    | noisy      | noise_std / E                               | softmax over all experts|
    | noisy_topk | softplus(x noise.weight^T) + 0.01           | softmax over all experts|

    Source: noisy: V-MoE, arXiv 2106.05974, section 2; noisy_topk: arXiv 1701.06538, eq. 3 to 5, and
    a floor under the noise (a softmax over the k chosen logits is the softmax over all of them,
    renormalised over the chosen).
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
            # Drawn token by token, whatever the layout of the logits.
            ranking_TE = logits_TE + torch.randn_like(logits_TE.contiguous()) * noise_std
        if not self.is_sigmoid:
            share_TE = softmax_over_experts(ranking_TE)
            return Scores(logits_TE, ranking_TE, share_TE, share_TE, noise_std)
        gate_TE = ranking_TE.sigmoid()
        return Scores(logits_TE, ranking_TE, gate_TE, renormalized(gate_TE), noise_std)


# Whether a router normalises its weights and adds noise: ROUTERS of options/schema.py.
GATES: dict[str, type[nn.Module]] = {
    "softmax": LinearGate,
    "sigmoid": LinearGate,
    "noisy": LinearGate,
    "noisy_topk": LinearGate,
}
