"""Compile launches of the Triton kernels for GPUs that are not here, and say what would not fit.

    (kernel, values, constants) -> source_of -> Triton, ptxas -> faults: shared memory, spills

No GPU is needed: the limits are read from the compiled artefacts.
"""

import re
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from moe_kernels.triton_seam import Constant, KernelInterface, Values, launch_options, triton

# Bytes that a program may have, by compute capability: A100, H100 and H200, B200.
SHARED_MEMORY_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
PRODUCTS = ("up", "rows_matmul", "hidden_grad", "weight_grad")
TYPES = {
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.float32: "*fp32",
    torch.int32: "*i32",
}

Launch = tuple[KernelInterface, Values, dict[str, Constant]]


def source_of(
    kernel: KernelInterface, values: Values, constants: dict[str, Constant]
) -> "triton.compiler.ASTSource":
    """Return what Triton specialises a launch to: dtypes, multiples of 16, and the constants."""
    names, signature, divisible = kernel.arg_names, {}, {}
    fixed: dict[str, Constant | None] = {n: v for n, v in constants.items() if n in names}
    for index, (name, value) in enumerate(zip(names, values, strict=False)):
        if value is None:
            fixed[name] = None
        else:
            signature[name] = "i32" if isinstance(value, int) else TYPES[value.dtype]
            if not isinstance(value, int) or value % 16 == 0:
                divisible[(index,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(fixed, "constexpr")
    signature = {name: signature[name] for name in names}
    return triton.compiler.ASTSource(kernel, signature, fixed, divisible)


def stack_bytes(program: "triton.compiler.CompiledKernel") -> int:
    """Return bytes of stack per thread, which a kernel without calls and arrays uses for spills."""
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(program.asm["cubin"])
        command = [str(tool), "--dump-resource-usage", str(cubin)]
        report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    found = [re.search(rf"{name}:(\d+)", report) for name in ("STACK", "LOCAL")]
    assert all(found), report
    return sum(int(match[1]) for match in found if match)


def faults(
    kernel: KernelInterface, values: Values, constants: dict[str, Constant], *, capability: int
) -> Iterator[str]:
    """Yield why a launch would fail or crawl on a GPU of that compute capability."""
    source = source_of(kernel, values, constants)
    options = {n: v for n, v in constants.items() if n not in kernel.arg_names} | launch_options()
    target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
    program = triton.compile(source, target=target, options=options)
    where = f"{kernel.__name__} {constants} sm_{capability}"
    if program.metadata.shared > SHARED_MEMORY_BYTES[capability]:
        yield f"{where}: {program.metadata.shared} bytes of shared memory"
    if spilled := stack_bytes(program):
        yield f"{where}: {spilled} bytes spilled per thread"
    is_16_bit = isinstance(values[0], Tensor) and values[0].dtype.itemsize == 2
    is_product = kernel.__name__ in PRODUCTS and is_16_bit
    if capability == 90 and is_product and "wgmma.mma_async" not in program.asm["ptx"]:
        yield f"{where}: no wgmma"
