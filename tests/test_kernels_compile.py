"""Every Triton kernel is compiled for three generations of GPU at the sizes of the shipped models.

What is compiled is what the launchers launch: their calls are recorded on meta tensors. The limits
are read from the compiled artefacts; no GPU is needed.
"""

import re
import subprocess
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

import triton_kernels
from triton_seam import is_interpreted, launch_options, triton

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(is_interpreted(), reason="the interpreter compiles nothing"),
]

MODELS = [(192, 768), (384, 1536), (384, 384), (768, 3072), (1024, 4096)]  # (width, hidden)
SHARED_MEMORY_BYTES = {80: 163 * 1024, 90: 227 * 1024, 100: 227 * 1024}
PRODUCTS = {"up", "rows_matmul", "hidden_grad", "weight_grad"}
POINTERS = {torch.bfloat16: "*bf16", torch.float32: "*fp32", torch.int32: "*i32"}
NUM_EXPERTS, NUM_TOKENS, NUM_CHOICES = 8, 4096, 2
_COMPILED = {}


def meta(*shape, dtype=torch.bfloat16):
    return torch.empty(*shape, dtype=dtype, device="meta")


def launches(monkeypatch, width, hidden, *, is_gated=False, dtype=torch.bfloat16):
    """Every (kernel, arguments, constants) of a training step with these sizes."""
    calls = []
    monkeypatch.setattr(
        triton_kernels, "launch", lambda kernel, _grid, *rest: calls.append((kernel, *rest))
    )
    rows, z_width = NUM_TOKENS * NUM_CHOICES, hidden * (2 if is_gated else 1)
    x, y_RD = meta(NUM_TOKENS, width, dtype=dtype), meta(rows, width, dtype=dtype)
    weight = meta(NUM_TOKENS, NUM_CHOICES, dtype=torch.float32)
    inverse = meta(rows, dtype=torch.int32)
    options = {
        "order_R": meta(rows, dtype=torch.int32),
        "inverse_R": inverse,
        "offset_E1": meta(NUM_EXPERTS + 1, dtype=torch.int32),
        "w_in": meta(NUM_EXPERTS * z_width, width, dtype=dtype),
        "b_in": meta(NUM_EXPERTS, z_width, dtype=dtype),
        "w_out": meta(NUM_EXPERTS * width, hidden, dtype=dtype),
        "b_out": meta(NUM_EXPERTS, width, dtype=dtype),
        "function": "gelu",
        "is_gated": is_gated,
        "allow_tf32": False,
    }
    y, z = triton_kernels.forward(x, weight, **options)
    triton_kernels.backward(y, x, weight, z_RF=z, needs=[True] * 6, **options)
    triton_kernels.combine_backward(x, y_RD, weight, inverse)
    return calls


def source_of(kernel, values, constants):
    """What Triton specialises a launch to: dtypes, multiples of 16, and the constants."""
    names, signature, divisible = kernel.arg_names, {}, {}
    fixed = {name: value for name, value in constants.items() if name in names}
    for index, (name, value) in enumerate(zip(names, values, strict=False)):
        if value is None:
            fixed[name] = None
        else:
            signature[name] = "i32" if isinstance(value, int) else POINTERS[value.dtype]
            if not isinstance(value, int) or value % 16 == 0:
                divisible[(index,)] = [["tt.divisibility", 16]]
    signature |= dict.fromkeys(fixed, "constexpr")
    signature = {name: signature[name] for name in names}
    return triton.compiler.ASTSource(kernel, signature, fixed, divisible)


def compiled(kernel, values, constants, capability):
    source = source_of(kernel, values, constants)
    options = {key: v for key, v in constants.items() if key not in kernel.arg_names}
    key = (source.hash(), str(options), capability)
    if key not in _COMPILED:
        target = triton.backends.compiler.GPUTarget("cuda", capability, 32)
        options |= launch_options()
        _COMPILED[key] = triton.compile(source, target=target, options=options)
    return _COMPILED[key]


def stack_bytes(program, folder):
    """Bytes of the stack per thread, which a kernel without calls and arrays uses for spills."""
    cubin = folder / "kernel.cubin"
    cubin.write_bytes(program.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    command = [tool, "--dump-resource-usage", cubin]
    report = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return int(re.search(r"STACK:(\d+)", report)[1]) + int(re.search(r"LOCAL:(\d+)", report)[1])


def faults(program, name, capability, folder):
    shared = program.metadata.shared
    if shared > SHARED_MEMORY_BYTES[capability]:
        yield f"{name} sm_{capability}: {shared} bytes of shared memory"
    if spilled := stack_bytes(program, folder):
        yield f"{name} sm_{capability}: {spilled} bytes spilled per thread"
    if capability == 90 and name in PRODUCTS and "wgmma.mma_async" not in program.asm["ptx"]:
        yield f"{name} sm_{capability}: no wgmma"


def all_faults(calls, capability, folder):
    with ThreadPoolExecutor(max_workers=2) as pool:  # ptxas is a process of its own
        programs = pool.map(lambda call: compiled(*call, capability), calls)
        for program, (kernel, *_) in zip(programs, calls, strict=True):
            yield from faults(program, kernel.__name__, capability, folder)


@pytest.mark.parametrize("capability", list(SHARED_MEMORY_BYTES))
@pytest.mark.parametrize(("width", "hidden"), MODELS)
def test_kernels_fit_the_gpu(monkeypatch, tmp_path, width, hidden, capability):
    calls = launches(monkeypatch, width, hidden)
    assert {kernel.__name__ for kernel, *_ in calls} >= PRODUCTS
    if width != max(MODELS)[0]:  # the other kernels' blocks do not depend on the sizes
        calls = [call for call in calls if call[0].__name__ in PRODUCTS]
    assert list(all_faults(calls, capability, tmp_path)) == []


def test_gated_kernels_fit_the_gpu(monkeypatch, tmp_path):
    calls = launches(monkeypatch, 1024, 4096, is_gated=True)
    assert list(all_faults(calls, 90, tmp_path)) == []


def test_fp32_kernels_fit_the_gpu(monkeypatch, tmp_path):
    calls = launches(monkeypatch, 384, 1536, dtype=torch.float32)
    found = [f for f in all_faults(calls, 90, tmp_path) if not f.endswith("no wgmma")]
    assert found == []


def test_a_tile_too_large_is_found(monkeypatch, tmp_path):
    large = triton_kernels.Tile(128, 256, 64, 4, 6)
    tiles = triton_kernels.Tiles(large, large, large, large)
    monkeypatch.setattr(triton_kernels, "tiles_for", lambda *_, **__: tiles)
    calls = [c for c in launches(monkeypatch, 768, 3072) if c[0].__name__ == "rows_matmul"]
    (fault, *_) = all_faults(calls[:1], 80, tmp_path)
    assert "shared memory" in fault
