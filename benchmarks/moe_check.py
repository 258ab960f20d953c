"""Is a layer right? Each is compared with a loop over experts in fp32 before anyone times it."""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable

import torch

from benchmarks.moe_rivals import Contender, Problem, UnsupportedError, python_loop

OURS = "moevit"
# Norm-wise relative error of an output or gradient against a loop in fp32 on the same numbers.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}

Build = Callable[[Problem], Contender]
Errors = tuple[type[Exception], ...]


@dataclasses.dataclass
class LayerRow:
    """A layer in a case.

    status: ok, unsupported (by the library), or error (fails, or is wrong).
    host_ms: until the host has queued a step; above step_ms, the launches are what limits it.
    """

    layer: str
    status: str = "ok"
    reason: str = ""
    error: float | None = None
    forward_ms: float | None = None
    step_ms: float | None = None
    step_iqr_ms: float | None = None
    host_ms: float | None = None
    forward_percent: float | None = None
    percent: float | None = None
    time_over_ours: float | None = None


def library_errors(backend: str) -> Errors:
    """Return what a library may raise where it does not work; the rest is a fault of this file."""
    usual = (ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, OSError)
    compiler: Errors = ()
    if backend == "triton":
        compiler = (importlib.import_module("moe_kernels.triton_seam").triton.TritonError,)
    return (*usual, RuntimeError, TypeError, ValueError, *compiler)


def worst_error(contender: Contender, expected: list[torch.Tensor]) -> float:
    """Return the largest norm-wise relative error of the output and the gradients."""
    assert contender.w_in_grad is not None, "the layer is another function"
    dx, dweight, dw_in, dw_out = contender.step()[:4]
    found = [contender.forward().detach(), dx, dweight, contender.w_in_grad(dw_in), dw_out]
    pairs = zip(found, expected, strict=True)
    errors = torch.stack([(a.float() - b).norm() / b.norm() for a, b in pairs])
    return errors.max().item()  # of a NaN: NaN


def check(
    name: str, make: Build, problem: Problem, *, expected: list[torch.Tensor], errors: Errors
) -> tuple[LayerRow, Contender | None]:
    """Return a layer if it runs and is right, and its row."""
    row, tolerance = LayerRow(name), TOLERANCES[problem.x_TD.dtype]
    try:
        contender = make(problem)
        contender.step()
        if contender.w_in_grad is not None:
            worst = worst_error(contender, expected)
            row.error = worst if math.isfinite(worst) else None
            if not worst <= tolerance:
                raise ValueError(f"relative error {worst:.1e}, allowed {tolerance:.1e}")
    except UnsupportedError as error:
        row.status, row.reason = "unsupported", str(error)
    except errors as error:
        row.status, row.reason = "error", f"{type(error).__name__}: {error}"[:500]
    else:
        return row, contender
    return row, None


def prepare(
    problem: Problem, build: dict[str, Build], *, errors: Errors
) -> tuple[dict[str, Contender], list[LayerRow]]:
    """Return the layers that are right, and a row for every layer.

    Raises:
        ValueError: Ours is not right.
    """
    reference = python_loop(problem.in_fp32())
    expected = [reference.forward().detach(), *reference.step()]
    right, rows = {}, []
    for name, make in build.items():
        row, contender = check(name, make, problem, expected=expected, errors=errors)
        if contender is not None:
            right[name] = contender
        elif name.startswith(OURS):
            raise ValueError(f"{name}, {problem.case.label}: {row.reason}")
        rows.append(row)
    return right, rows
