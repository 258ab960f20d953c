"""Score a classifier over validation images: cross-entropy, top-1, top-5, overall and by class.

Batch -> logits_BY -> sums_Y4 of (images, loss, top-1 hits, top-5 hits) by true class -> figures

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

from images.batches import NOT_COUNTED, Batch

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
) -> Tensor:
    """Return sums_Y4 by true class over the images of all ranks, in fp64. Collective.

    Ranks need equally many batches, since a sharded forward is collective; the model is left in the
    mode that it was in. `after_batch` is called after each batch.
    """
    was_training = model.training
    model.eval()
    try:
        parts = []
        for batch in batches:
            image_BCHW = batch.image_BCHW.to(device, dtype, non_blocking=True)
            label_B = batch.label_B.to(device, non_blocking=True)
            parts.append(_sums(model(image_BCHW).float(), label_B))
            after_batch()
    finally:
        model.train(was_training)
    sums_Y4 = torch.stack(parts).sum(0)
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
