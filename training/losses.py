"""What the training loss is, as a function of logits_BY and labels or mixed targets.

label_B, or target_BY if images are mixed -> cross-entropy, or one binary problem per class
"""

from __future__ import annotations

from torch import Tensor
from torch.nn import functional


def smoothed_loss(logits_BY: Tensor, target: Tensor, *, smoothing: float) -> Tensor:
    """Return the mean cross-entropy in fp32 against labels or against target_BY.

    Labels are smoothed here (arXiv:1512.00567, sec. 7); mixed targets already are.
    """
    label_smoothing = 0 if target.ndim > 1 else smoothing
    return functional.cross_entropy(logits_BY.float(), target, label_smoothing=label_smoothing)


def binary_loss(
    logits_BY: Tensor, target: Tensor, *, smoothing: float, threshold: float | None, is_sum: bool
) -> Tensor:
    """Return the binary cross-entropy of every class in fp32, against labels or target_BY.

    Targets above `threshold` become 1 and the others 0; None leaves them as they are. The mean is
    over images, and over classes unless `is_sum`, which adds those up. Labels are smoothed.

    Source: DeiT III (arXiv:2204.07118), section 3.3, has the mean and threshold 0; timm's
    `BinaryCrossEntropy`.
    """
    logits_BY = logits_BY.float()
    if target.ndim == 1:
        num_classes = logits_BY.shape[1]
        target = functional.one_hot(target, num_classes).to(logits_BY.dtype)
        target = target * (1 - smoothing) + smoothing / num_classes
    if threshold is not None:
        target = (target > threshold).to(target.dtype)
    loss = functional.binary_cross_entropy_with_logits(logits_BY, target)
    return loss * logits_BY.shape[1] if is_sum else loss


def teacher_loss(logits_BY: Tensor, teacher_BY: Tensor, *, kind: str, tau: float) -> Tensor:
    """Return the loss of logits_BY against a teacher's, in fp32.

    "hard": cross-entropy against the class that the teacher finds most probable.
    "soft": tau^2 KL(softmax(teacher / tau) || softmax(logits / tau)), over images and classes: the
    sum over classes is divided by their number, as in DeiT's code, not in the usual formula.

    Source: DeiT (arXiv:2012.12877), section 4, and its losses.py.
    """
    logits_BY, teacher_BY = logits_BY.float(), teacher_BY.float()
    if kind == "hard":
        return functional.cross_entropy(logits_BY, teacher_BY.argmax(1))
    found_BY = functional.log_softmax(logits_BY / tau, 1)
    wanted_BY = functional.log_softmax(teacher_BY / tau, 1)
    divergence = functional.kl_div(found_BY, wanted_BY, reduction="sum", log_target=True)
    return divergence * tau**2 / logits_BY.numel()
