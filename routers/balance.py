"""The balance losses, which penalise uneven use of the experts, from sums over all ranks' tokens.

    Scores, expert_id_Tk, weight_Tk -> local_sums -> one vector -> sum over ranks -> weighted_loss

| <name>_coef | loss                                   | uniform | one expert has it all |
|-------------|-----------------------------------------|---------|-----------------------|
| importance  | CV^2 of the weights summed per expert   | 0       | E                     |
| load        | CV^2 of the expected rows per expert    | 0       | E                     |
| switch      | E sum_e f_e P_e over all tokens         | 1       | E (k=1)               |
| sequence    | the same per image, mean over images    | 1       | E (k=1)               |
| z           | mean over tokens of logsumexp(logits)^2 | -       | -                     |

f_e: share of the rows that go to e, before any are dropped; P_e: mean of the tokens' shares of e.

Ranks: the loss has the value that it would have with all tokens on one rank. `sum_over_ranks` must
be a differentiable all-reduce, whose backward sums the gradients of its result over ranks; they are
all equal, so that is one of them times the number of ranks. If each rank then adds loss / ranks to
its objective and gradients are summed over ranks, the result is the gradient of the global loss.

Microbatches: sequence and z are means over images and tokens, so their mean over equal microbatches
is the whole batch's loss, in value and gradient. importance, load and switch are not linear in the
sums: each microbatch is balanced by itself, and the mean over microbatches equals the whole batch's
loss only if the microbatches' sums agree.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from options.schema import MoEOptions


@dataclass(frozen=True)
class Scores:
    """A gate's scores of the tokens, in fp32.

    logits_TE: without noise.
    ranking_TE: its top k are the chosen experts.
    gate_TE: the experts' weights before any renormalisation.
    share_TE: gate_TE with rows that sum to 1.
    noise_std: standard deviation of ranking_TE around logits_TE, [T, E] or 0-d; None: no noise.
    """

    logits_TE: Tensor
    ranking_TE: Tensor
    gate_TE: Tensor
    share_TE: Tensor
    noise_std: Tensor | None


def count_rows(expert_id: Tensor, *, num_experts: int) -> Tensor:
    """Return how many entries name each expert, [E] int64, without those that are E (dropped)."""
    flat_R = expert_id.reshape(-1)
    count = torch.zeros(num_experts + 1, dtype=torch.int64, device=flat_R.device)
    return count.scatter_add_(0, flat_R, torch.ones_like(flat_R))[:num_experts]


def win_probability(scores: Scores, *, top_k: int) -> Tensor:
    """Return P(expert in the token's top k if only its own noise were drawn again), [T, E].

    The threshold is the k-th best noisy logit among the other experts. A row sums to top_k in
    expectation.

    Source: arXiv 1701.06538, appendix A, eq. 8 and 9.
    """
    assert scores.noise_std is not None, "the load of a gate without noise has no gradient"
    best = scores.ranking_TE.topk(top_k + 1).values
    last_in_T1, first_out_T1 = best[:, -2:-1], best[:, -1:]
    threshold_TE = torch.where(scores.ranking_TE > first_out_T1, first_out_T1, last_in_T1)
    return torch.special.ndtr((scores.logits_TE - threshold_TE) / scores.noise_std)


def squared_cv(total_E: Tensor) -> Tensor:
    """Return var / mean^2, the variance unbiased: 0 if uniform, E if one expert has it all."""
    mean = total_E.mean()
    variance = (total_E - mean).square().sum() / max(len(total_E) - 1, 1)
    return variance / (mean.square() + 1e-10)  # M3ViT's 1e-10


def switch_loss(rows_E: Tensor, share_sum_E: Tensor, *, num_tokens: Tensor) -> Tensor:
    """Return E * sum_e (share of rows to e) * (mean score share of e): 1 if uniform.

    It is E if one expert takes all rows and all scores (k=1). Rows are counts without a gradient:
    the loss lowers the scores of experts that have too many.

    Source: arXiv 2101.03961, eq. 4 to 6, for k rows per token.
    """
    share_E = share_sum_E / num_tokens
    return len(rows_E) * (rows_E / rows_E.sum() * share_E).sum()


def sequence_losses(expert_id_Tk: Tensor, share_TE: Tensor, *, tokens_per_image: int) -> Tensor:
    """Return the Switch loss of each image by itself, [B]; images are contiguous in T.

    Source: DeepSeek-V3, arXiv 2412.19437, eq. 17 to 20.
    """
    num_experts, top_k = share_TE.shape[1], expert_id_Tk.shape[1]
    assert len(share_TE) % tokens_per_image == 0, "whole images of tokens_per_image tokens each"
    is_chosen_TE = torch.zeros_like(share_TE).scatter(1, expert_id_Tk, 1)
    num_images = len(share_TE) // tokens_per_image  # view(-1) fails for 0 tokens
    is_chosen_BLE = is_chosen_TE.view(num_images, tokens_per_image, num_experts)
    rows_BE = is_chosen_BLE.mean(1) / top_k
    share_BE = share_TE.view(is_chosen_BLE.shape).mean(1)
    return num_experts * (rows_BE * share_BE).sum(1)


def z_losses(logits_TE: Tensor) -> Tensor:
    """Return logsumexp(logits)^2 of each token, [T]: (ln E)^2 if the logits are 0.

    Source: ST-MoE, arXiv 2202.08906, eq. 5.
    """
    return logits_TE.logsumexp(-1).square()


def local_sums(
    scores: Scores,
    expert_id_Tk: Tensor,
    weight_Tk: Tensor,
    *,
    o: MoEOptions,
    tokens_per_image: int | None,
) -> dict[str, Tensor]:
    """Return this rank's sums over tokens, as vectors, for the losses that are switched on."""
    top_k = expert_id_Tk.shape[1]
    sums = {"tokens": scores.logits_TE.new_full((1,), len(expert_id_Tk))}
    if o.importance_coef:
        weight_TE = torch.zeros_like(scores.gate_TE).scatter(1, expert_id_Tk, weight_Tk)
        sums["importance"] = weight_TE.sum(0)
    if o.load_coef:
        sums["load"] = win_probability(scores, top_k=top_k).sum(0)
    if o.switch_coef:
        rows_E = count_rows(expert_id_Tk, num_experts=scores.gate_TE.shape[1])
        sums["rows"] = rows_E.to(scores.share_TE.dtype)
        sums["share"] = scores.share_TE.sum(0)
    if o.sequence_coef:
        assert tokens_per_image is not None, "the sequence loss is per image"
        share_TE = scores.share_TE
        losses_B = sequence_losses(expert_id_Tk, share_TE, tokens_per_image=tokens_per_image)
        # Times tokens, so that the division by all tokens in weighted_loss gives the images' mean.
        sums["sequence"] = losses_B.sum()[None] * tokens_per_image
    if o.z_coef:
        sums["z"] = z_losses(scores.logits_TE).sum()[None]
    return sums


def weighted_loss(sums: dict[str, Tensor], o: MoEOptions) -> Tensor:
    """Return the sum of coefficient * loss, computed from the sums over all ranks."""
    num_tokens = sums["tokens"][0]
    loss = torch.zeros_like(num_tokens)
    if o.importance_coef:
        loss = loss + o.importance_coef * squared_cv(sums["importance"])
    if o.load_coef:
        loss = loss + o.load_coef * squared_cv(sums["load"])
    if o.switch_coef:
        switch = switch_loss(sums["rows"], sums["share"], num_tokens=num_tokens)
        loss = loss + o.switch_coef * switch
    if o.sequence_coef:
        loss = loss + o.sequence_coef * sums["sequence"][0] / num_tokens
    if o.z_coef:
        loss = loss + o.z_coef * sums["z"][0] / num_tokens
    return loss


def balance_loss(
    scores: Scores,
    expert_id_Tk: Tensor,
    weight_Tk: Tensor,
    *,
    o: MoEOptions,
    tokens_per_image: int | None,
    sum_over_ranks: Callable[[Tensor], Tensor],
) -> Tensor:
    """Return the 0-d balance loss of all ranks' tokens. Calls `sum_over_ranks` once."""
    # One vector for all losses: a layer has one small all-reduce, whatever is switched on.
    local = local_sums(scores, expert_id_Tk, weight_Tk, o=o, tokens_per_image=tokens_per_image)
    total = sum_over_ranks(torch.cat(list(local.values())))
    pieces = total.split([len(value) for value in local.values()])
    return weighted_loss(dict(zip(local, pieces, strict=True)), o)
