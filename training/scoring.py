"""How good a classifier is on validation images, overall and by class; how even its experts' load.

    Batch -> logits_BY -> sums_Y4 of (images, loss, top-1 hits, top-5 hits) by true class -> figures
    each layer's rows per expert -> ExpertLoad -> figures

The loss here is always the cross-entropy with the plain labels, whatever the run trains with
(training.loss, label_smoothing), so that runs can be compared.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional

import moe
from images.batches import NOT_COUNTED, Batch

# Figures of a layer: percentages of its rows; an even load is 100 / E.
LEAST, MOST, DROPPED = "least_load.", "most_load.", "dropped."
BEST = 5  # or fewer, where there are fewer classes


class NonFiniteError(RuntimeError):
    """The loss or the gradients stopped being finite numbers."""


def _sums(logits_BY: Tensor, label_B: Tensor) -> Tensor:
    """Return sums_Y4 of a batch; images that only pad it do not count."""
    num_classes = logits_BY.shape[1]
    is_real_B = label_B != NOT_COUNTED
    logits_BY, label_B = logits_BY[is_real_B], label_B[is_real_B]
    loss_B = functional.cross_entropy(logits_BY, label_B, reduction="none")
    best_Bk = logits_BY.topk(min(BEST, num_classes), dim=1).indices
    is_hit_Bk = best_Bk == label_B[:, None]
    columns = [torch.ones_like(loss_B), loss_B, is_hit_Bk[:, 0], is_hit_Bk.any(1)]
    stats_B4 = torch.stack([column.double() for column in columns], dim=1)
    # A product, since a scatter on CUDA sums in an order that changes from run to run.
    return functional.one_hot(label_B, num_classes).double().T @ stats_B4


@torch.no_grad()
def score(
    model: nn.Module,
    batches: Iterable[Batch],
    *,
    device: torch.device,
    dtype: torch.dtype,
    after_batch: Callable[[], None] = lambda: None,
    among_Y: Tensor | None = None,
) -> Tensor:
    """Return sums_Y4 by true class over the images of all ranks, in fp64. Collective.

    Ranks need equally many batches, since a sharded forward is collective; the model is left in the
    mode that it was in. `after_batch` is called after each batch. The network chooses `among_Y`, a
    bool for each class; None: among all.
    """
    was_training = model.training
    model.eval()
    try:
        sums_Y4 = torch.zeros((), dtype=torch.float64, device=device)
        for batch in batches:
            image_BCHW = batch.image_BCHW.to(device, dtype, non_blocking=True)
            label_B = batch.label_B.to(device, non_blocking=True)
            logits_BY = model(image_BCHW).float()
            if among_Y is not None:
                logits_BY = logits_BY.masked_fill(~among_Y, -math.inf)
            sums_Y4 = sums_Y4 + _sums(logits_BY, label_B)
            after_batch()
    finally:
        model.train(was_training)
    dist.all_reduce(sums_Y4)
    return sums_Y4


def figures(sums_Y4: Tensor) -> dict[str, float]:
    """Return the number of images, cross-entropy, top-1 and top-5 (in percent) of `score`'s sums.

    Raises:
        NonFiniteError: The loss is not finite.
    """
    count, loss_sum, top1, top5 = sums_Y4.sum(0).tolist()
    if not math.isfinite(loss_sum):
        raise NonFiniteError(f"non-finite validation loss={loss_sum / count}")
    return {
        "val_images": count,
        "val_loss": loss_sum / count,
        "top1": 100 * top1 / count,
        "top5": 100 * top5 / count,
    }


def is_guessing(figures: Mapping[str, float], *, num_classes: int) -> bool:
    """Return whether top-1 is no more than three standard deviations above always one class."""
    count = figures["val_images"]
    hits, by_chance = figures["top1"] * count / 100, count / num_classes
    return hits <= by_chance + 3 * math.sqrt(by_chance * (1 - 1 / num_classes))


class ExpertLoad:
    """Rows per expert, by layer, over the forward passes that were added."""

    def __init__(self) -> None:
        self.rows: dict[str, Tensor] = {}

    def add(self, model: nn.Module) -> None:
        """Add the rows of this rank's last forward; the host reads nothing."""
        for name, rows in moe.expert_load(model).items():
            self.rows[name] = self.rows[name] + rows if name in self.rows else rows

    def figures(self) -> dict[str, float]:
        """Return each layer's least and most loaded expert's percentage of the rows. Collective.

        One all-reduce and one host sync. Rows that an expert had no capacity for count in its load;
        a layer that dropped any has their percentage too.
        """
        if not self.rows:
            return {}
        rows_LE1 = torch.stack(list(self.rows.values()))
        dist.all_reduce(rows_LE1)
        total_L1 = rows_LE1[:, :-1].sum(1, keepdim=True)
        percent_LE1 = (100 * rows_LE1.double() / total_L1).tolist()
        found: dict[str, float] = {}
        for name, (*loads, dropped) in zip(self.rows, percent_LE1, strict=True):
            found[f"{LEAST}{name}"], found[f"{MOST}{name}"] = min(loads), max(loads)
            if dropped:
                found[f"{DROPPED}{name}"] = dropped
        return found


def load_summary(figures: dict[str, float], *, num_experts: int) -> dict[str, str]:
    """Return a line for each layer of `figures`: the loads of its least and most used experts."""
    lines = {}
    for key, least in figures.items():
        if key.startswith(LEAST):
            name = key.removeprefix(LEAST)
            dropped = figures.get(f"{DROPPED}{name}", 0.0)
            lines[f"experts of {name}"] = (
                f"{least:.1f} to {figures[f'{MOST}{name}']:.1f} % of rows "
                f"(even: {100 / num_experts:.1f})" + (f", {dropped:.1f} % dropped" * bool(dropped))
            )
    return lines
