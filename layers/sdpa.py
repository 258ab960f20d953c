"""Which fused kernel computes scaled dot product attention: a name, and whether it works here.

name -> only(name): a context; usable_kernels(device, dtype, sizes) -> names
"""

from __future__ import annotations

import contextlib
import warnings

import torch
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

KERNELS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
    "math": SDPBackend.MATH,
}


def only(name: str) -> contextlib.AbstractContextManager[None]:
    """Return the context in which attention runs in kernel `name` or fails; auto: torch's choice.

    The backward pass uses the kernel of its forward pass, wherever it runs.
    """
    return contextlib.nullcontext() if name == "auto" else sdpa_kernel(KERNELS[name])


def _works(name: str, shape_BLAK: tuple[int, ...], drop: float, like: torch.Tensor) -> bool:
    """Return whether a kernel computes attention forward and backward, by trying it."""
    x_BLAK = like.new_zeros(shape_BLAK).requires_grad_()
    q_BALK = x_BLAK.transpose(1, 2)
    try:
        # torch warns of the reason why each kernel cannot be used, and then raises.
        with warnings.catch_warnings(action="ignore"), only(name):
            y_BALK = functional.scaled_dot_product_attention(q_BALK, q_BALK, q_BALK, dropout_p=drop)
        y_BALK.sum().backward()
        y_BALK.sum().item()  # what fails on the device is reported when it is waited for
    except RuntimeError:
        return False
    return True


def usable_kernels(
    *, device: torch.device, dtype: torch.dtype, head_dim: int, num_tokens: int, drop: float = 0.0
) -> tuple[str, ...]:
    """Return the kernels that compute attention of this kind on the device, by trying each.

    `drop` is the dropout on attention weights, which some kernels do not have.
    """
    like = torch.empty(0, device=device, dtype=dtype)
    shape_BLAK = (2, num_tokens, 2, head_dim)
    return tuple(name for name in KERNELS if _works(name, shape_BLAK, drop, like))


def check_kernel(name: str, usable: tuple[str, ...], *, where: str) -> None:
    """Refuse a kernel that does not work; `where` says for what, in the message.

    Raises:
        ValueError: It is not one of `usable`.
    """
    if name != "auto" and name not in usable:
        raise ValueError(
            f"config model.sdpa={name}: does not work for {where} (use auto, {', '.join(usable)})"
        )
