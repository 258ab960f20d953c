"""A ViT with experts as a textbook has it: timm's network in fp64, each row by itself.

Nothing of ours computes here, so a training step can be held to it. Ranks are passes: capacity and
noise are each rank's own, the balance losses are taken of the sums over all ranks' tokens.
"""

import math

import torch
from timm.layers import Mlp
from timm.models import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from options.schema import Config, MoEOptions
from parallel.seeds import stable_seed


class LoopExperts(nn.Module):
    """Router, experts and shared expert; `sums` has what each pass adds to the balance losses."""

    def __init__(self, dim: int, o: MoEOptions) -> None:
        super().__init__()
        self.o = o
        hidden = int(dim * o.mlp_ratio)
        self.router = nn.Module()
        self.router.gate = nn.Linear(dim, o.num_experts, bias=False)
        self.experts = nn.Module()
        self.experts.w_in = nn.Parameter(torch.empty(o.num_experts * hidden, dim))
        self.experts.b_in = nn.Parameter(torch.empty(o.num_experts, hidden))
        self.experts.w_out = nn.Parameter(torch.empty(o.num_experts * dim, hidden))
        self.experts.b_out = nn.Parameter(torch.empty(o.num_experts, dim))
        self.shared = Mlp(dim, int(dim * o.shared_ratio)) if o.shared_ratio else None
        self.sums: list[dict[str, Tensor]] = []
        self.dropped = 0

    def expert(self, number: int, x_D: Tensor) -> Tensor:
        """One expert's output for one token."""
        e, count = self.experts, self.o.num_experts
        h_F = F.gelu(e.w_in.chunk(count)[number] @ x_D + e.b_in[number])
        return e.w_out.chunk(count)[number] @ h_F + e.b_out[number]

    def kept(self, chosen: list[list[int]], best_T: Tensor) -> set[tuple[int, int]]:
        """The (token, choice) that fit: first choices first, then the best tokens."""
        if self.o.capacity_factor is None:
            return {(t, j) for t, row in enumerate(chosen) for j in range(len(row))}
        count = len(chosen) * self.o.top_k
        room = [math.ceil(self.o.capacity_factor * count / self.o.num_experts)]
        room *= self.o.num_experts
        found = set()
        for j in range(self.o.top_k):
            for t in best_T.argsort(descending=True, stable=True).tolist():
                if room[chosen[t][j]]:
                    room[chosen[t][j]] -= 1
                    found.add((t, j))
        return found

    def forward(self, x_BLD: Tensor) -> Tensor:
        """x_BLD -> x_BLD, in training."""
        o, x_TD = self.o, x_BLD.flatten(0, 1)
        logits_TE = x_TD @ self.router.gate.weight.T
        noise_TE = torch.randn(logits_TE.shape).double()  # fp32 draws, as in the run
        std = o.noise_std / o.num_experts
        noisy_TE = logits_TE + std * noise_TE
        score_TE = noisy_TE.softmax(1)
        weight_Tk, chosen_Tk = score_TE.topk(o.top_k)
        self.sums.append(self._sums(logits_TE, noisy_TE, chosen_Tk, weight_Tk, x_BLD.shape[1]))
        chosen = chosen_Tk.tolist()
        kept = self.kept(chosen, weight_Tk[:, 0].detach())
        rows = []
        for t, row in enumerate(chosen):
            parts = [
                weight_Tk[t, j] * self.expert(e, x_TD[t])
                for j, e in enumerate(row)
                if (t, j) in kept
            ]
            rows.append(sum(parts) if parts else torch.zeros_like(x_TD[t]))
        y_TD = torch.stack(rows)
        if self.shared is not None:
            y_TD = y_TD + self.shared(x_TD)
        self.dropped += len(chosen) * o.top_k - len(kept)
        return y_TD.view_as(x_BLD)

    def _sums(self, logits_TE, noisy_TE, chosen_Tk, weight_Tk, length) -> dict[str, Tensor]:
        """Sums over tokens, and the losses of each image, with their gradients."""
        o, score_TE = self.o, noisy_TE.softmax(1)
        is_in_TE = F.one_hot(chosen_Tk, o.num_experts).sum(1).double()
        weight_TE = score_TE * is_in_TE
        load_E = []
        for e in range(o.num_experts):
            others = [i for i in range(o.num_experts) if i != e]
            bar_T = noisy_TE[:, others].topk(o.top_k).values[:, -1]
            std = o.noise_std / o.num_experts
            load_E.append(torch.special.ndtr((logits_TE[:, e] - bar_T) / std).sum())
        images = [
            o.num_experts * (is_in_TE[i].mean(0) / o.top_k * score_TE[i].mean(0)).sum()
            for i in torch.arange(len(score_TE)).split(length)
        ]
        return {
            "tokens": torch.tensor(float(len(score_TE)), dtype=torch.float64),
            "importance": weight_TE.sum(0),
            "load": torch.stack(load_E),
            "rows": is_in_TE.sum(0),
            "scores": score_TE.sum(0),
            "images": torch.stack([torch.stack(images).sum(), torch.tensor(float(len(images)))]),
            "z": logits_TE.logsumexp(1).square().sum(),
        }

    def load(self) -> dict[str, float]:
        """Percentages of the rows of all passes: least and most loaded expert, dropped."""
        rows_E = sum(one["rows"] for one in self.sums)
        loads = (100 * rows_E / rows_E.sum()).tolist()
        found = {"least_load": min(loads), "most_load": max(loads)}
        return found | (
            {"dropped": 100 * self.dropped / rows_E.sum().item()} if self.dropped else {}
        )

    def balance(self) -> Tensor:
        """The balance loss of all passes: the papers' formulas."""
        o = self.o
        total = {name: sum(one[name] for one in self.sums) for name in self.sums[0]}

        def squared_cv(v_E: Tensor) -> Tensor:
            return v_E.var() / v_E.mean() ** 2

        share_E = total["rows"] / total["rows"].sum()
        return (
            o.importance_coef * squared_cv(total["importance"])
            + o.load_coef * squared_cv(total["load"])
            + o.switch_coef * o.num_experts * (share_E * total["scores"] / total["tokens"]).sum()
            + o.sequence_coef * total["images"][0] / total["images"][1]
            + o.z_coef * total["z"] / total["tokens"]
        )


def textbook(config: Config, weights: dict[str, Tensor]) -> VisionTransformer:
    """timm's ViT in fp64 with these weights, and LoopExperts where the options ask for experts."""
    vit, o = config.model.vit, config.model.moe
    model = VisionTransformer(
        img_size=vit.img_size,
        patch_size=vit.patch_size,
        num_classes=vit.num_classes,
        global_pool=vit.global_pool,
        embed_dim=vit.embed_dim,
        depth=vit.depth,
        num_heads=vit.num_heads,
        mlp_ratio=vit.mlp_ratio,
    )
    for block in o.expert_blocks(vit.depth):
        model.blocks[block].mlp = LoopExperts(vit.embed_dim, o)
    model.load_state_dict(weights)
    return model.double()


def step_of(model, batches, *, seed, smoothing=0.0) -> tuple[float, float, dict[str, Tensor]]:
    """Loss, balance loss and gradients of update 0; `batches` has images and labels by rank."""
    layers = [m for m in model.modules() if isinstance(m, LoopExperts)]
    loss = torch.zeros((), dtype=torch.float64)
    for rank, (image_BCHW, label_B) in enumerate(batches):
        torch.manual_seed(stable_seed(seed, "step", 0, 0, rank))
        logits_BY = model(image_BCHW.double())
        loss = loss + F.cross_entropy(logits_BY, label_B, label_smoothing=smoothing) / len(batches)
    balance = sum(layer.balance() for layer in layers)
    (loss + balance).backward()
    grads = {name: p.grad.float() for name, p in model.named_parameters()}
    return loss.item(), balance.item(), grads
