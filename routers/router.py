"""Which experts a token goes to, with what weights, and what uneven use of them costs.

    x_TD -> gate (logits, noise, scores) -> top k -> capacity -> expert_id_Tk, weight_Tk
                         |__ sums over tokens -> sum_over_ranks -> balance_loss

A new kind of router is a class like LinearGate, whose forward returns Scores, and a line in GATES;
what follows the scores is the same for all. No collective and no expert here.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from routers.balance import Coefficients, Scores, balance_loss, count_rows
from routers.gates import GATES, NORMALIZES, renormalized


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


NO_BALANCE = Coefficients()


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


def _require(is_ok: bool, option: str, value: object, allowed: str) -> None:
    if not is_ok:
        raise ValueError(f"config model.moe.{option}={value}: {allowed}")


@dataclass(frozen=True, kw_only=True)
class RouterOptions:
    """The options of a Router, checked: what has no effect is refused."""

    num_experts: int
    top_k: int
    kind: str
    normalize: bool
    noise_std: float
    jitter: float
    expert_drop: float
    capacity_factor: float | None
    forced_balance: bool
    coefs: Coefficients

    def __post_init__(self) -> None:
        """Refuse values and combinations that cannot work or would have no effect."""
        k, num_experts = self.top_k, self.num_experts
        _require(num_experts >= 1, "num_experts", num_experts, "must be at least 1")
        _require(k >= 1, "top_k", k, "must be at least 1")
        _require(k <= num_experts, "top_k", k, f"must be at most num_experts={num_experts}")
        _require(0 <= self.jitter < 1, "jitter", self.jitter, "must be in [0, 1)")
        self._check_expert_drop()
        self._check_weights()
        self._check_noise()
        self._check_capacity()
        self._check_coefs()

    @property
    def is_noisy(self) -> bool:
        """True if the gate adds noise in training."""
        return self.kind in ("noisy", "noisy_topk")

    def _check_expert_drop(self) -> None:
        drop = self.expert_drop
        _require(0 <= drop < 1, "expert_drop", drop, "must be in [0, 1)")
        if drop:
            allowed = f"every token goes to every expert (top_k={self.top_k}): must be 0"
            _require(self.top_k < self.num_experts, "expert_drop", drop, allowed)
            _require(not self.forced_balance, "expert_drop", drop, "must be 0 with forced_balance")

    def _check_weights(self) -> None:
        if self.kind == "noisy_topk":
            _require(self.normalize, "normalize", False, "kind=noisy_topk always normalizes")
        if self.normalize and self.num_experts > 1:
            allowed = "must be at least 2 with normalized weights: one weight would always be 1"
            _require(self.top_k >= 2, "top_k", self.top_k, allowed)

    def _check_noise(self) -> None:
        std = self.noise_std
        if self.kind == "noisy":
            _require(std > 0, "noise_std", std, "kind=noisy needs more than 0 (or kind=softmax)")
        else:
            _require(std == 0, "noise_std", std, f"kind={self.kind} does not use it: must be 0")

    def _check_capacity(self) -> None:
        factor = self.capacity_factor
        if factor is not None:
            limit = self.num_experts / self.top_k
            allowed = f"must be more than 0 and less than {limit:g}, where nothing is dropped"
            _require(0 < factor < limit, "capacity_factor", factor, f"{allowed} (or null)")

    def _check_coefs(self) -> None:
        for name, coef in dataclasses.asdict(self.coefs).items():
            _require(coef >= 0, f"{name}_coef", coef, "must be at least 0")
            if coef and name in ("load", "switch", "sequence"):
                allowed = f"every token goes to every expert (top_k={self.top_k}): must be 0"
                _require(self.top_k < self.num_experts, f"{name}_coef", coef, allowed)
        if self.coefs.load:
            allowed = f"kind={self.kind} has no noise, so its load has no gradient: must be 0"
            _require(self.is_noisy, "load_coef", self.coefs.load, allowed)


class Router(nn.Module):
    """Send each token to `top_k` of `num_experts` experts.

    The gate runs in fp32 whatever the dtype of its input and weight. Noise and jitter are drawn
    from the global generator, in training only; eval changes no state and computes no loss.

    The balance loss is over the tokens of all ranks in this microbatch: see balance.py for the
    losses, and for what the caller must do with it to get the right gradient. A capacity, and the
    random draws, are each rank's own.

    Args:
        dim: width of a token.
        num_experts: E, over all ranks.
        top_k: experts per token.
        kind: one of GATES; see LinearGate.
        normalize: whether a token's k weights sum to 1; None: as NORMALIZES has it for the kind.
        noise_std: kind=noisy: standard deviation of the noise on the logits, times E.
        jitter: the gate's input is multiplied by U(1 - jitter, 1 + jitter) in training; keeps an
            fp32 copy of it for backward.
        expert_drop: in training, each expert is closed to each token with this probability; closed
            ones are chosen, best first, only where fewer than k are open. Weights stay as they are.
        capacity_factor: in training, an expert takes at most ceil(capacity_factor * T * k / E) rows
            of a rank; None: all, as in eval, where a batch must not decide on an image. See
            keep_within_capacity; the priority of a token is its best score.
        forced_balance: send choice j of token t to expert (t * k + j) % E, for benchmarks.
        coefs: of the balance losses. load needs a kind with noise, sequence `tokens_per_image` in
            forward; load, switch and sequence top_k < num_experts.

    Raises:
        ValueError: an option is out of range or has no effect beside the others.
    """

    def __init__(
        self,
        dim: int,
        num_experts: int,
        *,
        top_k: int,
        kind: str = "softmax",
        normalize: bool | None = None,
        noise_std: float = 0.0,
        jitter: float = 0.0,
        expert_drop: float = 0.0,
        capacity_factor: float | None = None,
        forced_balance: bool = False,
        coefs: Coefficients = NO_BALANCE,
    ) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, top_k
        _require(kind in GATES, "kind", kind, f"must be one of {', '.join(GATES)}")
        self.options = RouterOptions(
            num_experts=num_experts,
            top_k=top_k,
            kind=kind,
            normalize=NORMALIZES[kind] if normalize is None else normalize,
            noise_std=noise_std,
            jitter=jitter,
            expert_drop=expert_drop,
            capacity_factor=capacity_factor,
            forced_balance=forced_balance,
            coefs=coefs,
        )
        self.gate = GATES[kind](dim, num_experts, kind=kind, noise_std=noise_std)

    def _choose(self, ranking_TE: Tensor) -> Tensor:
        num_tokens, num_experts = ranking_TE.shape
        if not self.options.forced_balance:
            ranking_TE = ranking_TE.detach()
            if self.training and self.options.expert_drop:
                ranking_TE = some_closed(ranking_TE, self.options.expert_drop)
            return ranking_TE.topk(self.top_k).indices
        rows_R = torch.arange(num_tokens * self.top_k, device=ranking_TE.device)
        return (rows_R % num_experts).view(num_tokens, -1)

    def _drop(
        self, expert_id_Tk: Tensor, weight_Tk: Tensor, priority_T: Tensor, factor: float
    ) -> tuple[Tensor, Tensor]:
        capacity = math.ceil(factor * expert_id_Tk.numel() / self.num_experts)
        is_kept_Tk = keep_within_capacity(
            expert_id_Tk, priority_T, num_experts=self.num_experts, capacity=capacity
        )
        # Not `where`: on CUDA that copies the scalar over and waits.
        is_dropped_Tk = ~is_kept_Tk
        return (
            expert_id_Tk.masked_fill(is_dropped_Tk, self.num_experts),
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
        weight_Tk = renormalized(score_Tk) if o.normalize else score_Tk
        loss = weight_Tk.new_zeros(())
        if self.training and o.coefs.is_any:
            loss = balance_loss(
                scores,
                expert_id_Tk,
                weight_Tk,
                coefs=o.coefs,
                tokens_per_image=tokens_per_image,
                sum_over_ranks=sum_over_ranks,
            )
        rows_E = count_rows(expert_id_Tk, num_experts=self.num_experts)
        num_dropped = rows_E.new_zeros(())
        if self.training and o.capacity_factor is not None:
            priority_T = score_Tk.detach().amax(1)
            expert_id_Tk, weight_Tk = self._drop(
                expert_id_Tk, weight_Tk, priority_T, o.capacity_factor
            )
            num_dropped = (expert_id_Tk == self.num_experts).sum()
        return Routing(expert_id_Tk, weight_Tk, loss, rows_E, num_dropped)
