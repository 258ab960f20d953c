"""The one file that imports triton: what its kernels are written with, and how one is launched.

triton_seam -> triton_rows, triton_matmul (kernels) -> triton_ffn (what is launched when)
"""

from collections.abc import Callable

import torch
import triton
import triton.language as tl
from triton.runtime.errors import OutOfResources
from triton.runtime.jit import KernelInterface

__all__ = [
    "Constant",
    "KernelInterface",
    "Launcher",
    "OutOfResources",
    "Values",
    "is_interpreted",
    "launch",
    "launch_options",
    "num_programs",
    "tl",
    "triton",
]

Constant = int | str | bool
Values = tuple[torch.Tensor | int | None, ...]
Launcher = Callable[[KernelInterface, tuple[int, ...], Values, dict[str, Constant]], None]
INTERPRETED_PROGRAMS = 3  # few, so that in tests a program walks several tiles


def is_interpreted() -> bool:
    """Return whether kernels run in Triton's interpreter (TRITON_INTERPRET=1 at its import)."""
    return bool(triton.knobs.runtime.interpret)


def num_programs(device: torch.device, *, per_sm: int) -> int:
    """Return the number of programs of a persistent grid, `per_sm` on each multiprocessor."""
    if device.type != "cuda":
        return INTERPRETED_PROGRAMS
    return per_sm * torch.cuda.get_device_properties(device).multi_processor_count


def launch_options() -> dict[str, Constant]:
    """Return the compiler options that every kernel is launched with."""
    # Set here because Triton 3.10 rounds after every multiplication by default.
    return {"enable_fp_fusion": True}


def launch(
    kernel: KernelInterface,
    grid: tuple[int, ...],
    values: Values,
    constants: dict[str, Constant],
) -> None:
    """Run `kernel` on the current device with the arguments `values` and its constexprs."""
    kernel[grid](*values, **constants, **launch_options())
