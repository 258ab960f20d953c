"""The MoE feed-forward against a loop over experts in fp64, with every backend that runs here.

The Triton kernels run in Triton's interpreter, which is chosen when triton is first imported: the
last test runs this file again in a process where it is.
"""

import importlib.util
import itertools
import os
import re
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional
from torch.utils.flop_counter import FlopCounterMode

from moe_kernels import ops, torch_ffn

if importlib.util.find_spec("triton"):
    from moe_kernels import triton_ffn, triton_seam

    HAS_INTERPRETER = triton_seam.is_interpreted()
else:
    triton_ffn, HAS_INTERPRETER = None, False

BACKENDS = [("triton", "cpu")] if HAS_INTERPRETER else [("torch", "cpu")]
if torch.cuda.is_available() and not HAS_INTERPRETER:
    BACKENDS += [
        pytest.param(pair, marks=pytest.mark.gpu)
        for pair in (("torch", "cuda"), ("triton", "cuda"))
    ]
NAMES = ("x", "weight", "w_in", "b_in", "w_out", "b_out")
ROUTINGS = ("balanced", "skewed", "one takes all", "empty expert", "dropped rows", "all dropped")
EXPERTS_AND_CHOICES = [(1, 1), (1, 8), (2, 1), (2, 2), (7, 2), (7, 8), (70, 2)]
ROUTED = list(itertools.product(ROUTINGS, EXPERTS_AND_CHOICES))
# Multiples of the tiles, less than one, and a little more than one.
CHOICES_AND_WIDTHS = [(1, 64, 128), (2, 40, 72), (2, 130, 66)]
SHAPED = list(itertools.product(ops.ACTIVATIONS, CHOICES_AND_WIDTHS))
if HAS_INTERPRETER:  # slow: each branch of a kernel once, not times each other
    # 70 experts of a row each have more row tiles than one program of `schedule` lists.
    ROUTED = [("balanced", (70, 2)), ("skewed", (1, 8)), ("skewed", (2, 1))]
    ROUTED += [(routing, (7, 2)) for routing in ROUTINGS]
    SHAPED = [
        (name, sizes) for name, sizes in SHAPED if sizes[1] == 40 or name in ("gelu", "geglu")
    ]
needs_triton = pytest.mark.skipif(triton_ffn is None, reason="triton is not installed")


@pytest.fixture(params=BACKENDS, ids="-".join)
def backend_device(request):
    return request.param


def experts_of(routing, num_tokens, num_experts, num_choices):
    """k different experts per token where there are as many, in a pattern named by `routing`."""
    generator = torch.Generator().manual_seed(7)
    scores_TE = torch.rand(num_tokens, max(num_experts, num_choices), generator=generator)
    if routing == "balanced":
        shift_T1 = torch.arange(num_tokens)[:, None] * num_choices
        return (shift_T1 + torch.arange(num_choices)) % num_experts
    if routing == "skewed":
        scores_TE += torch.linspace(1, 0, scores_TE.shape[1])
    if routing == "one takes all":
        return torch.full((num_tokens, num_choices), num_experts // 2)
    id_Tk = scores_TE.topk(num_choices).indices % num_experts
    if routing == "empty expert":
        id_Tk[id_Tk == num_experts // 2] = 0
    if routing == "dropped rows":
        id_Tk[scores_TE[:, :num_choices] < 0.3] = num_experts
        id_Tk[::3, 0] = -1
    return torch.full_like(id_Tk, -1) if routing == "all dropped" else id_Tk


def draw(num_tokens, width, hidden, *, num_experts, num_choices, gated=False, biases=True):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape, scale=1.0):
        return torch.randn(*shape, generator=generator, dtype=torch.float64) * scale

    z_width = 2 * hidden if gated else hidden
    return [
        normal(num_tokens, width),
        normal(num_tokens, num_choices).sigmoid(),
        normal(num_experts * z_width, width, scale=width**-0.5),
        normal(num_experts, z_width) if biases else None,
        normal(num_experts * width, hidden, scale=hidden**-0.5),
        normal(num_experts, width) if biases else None,
    ]


def copies(values, dtype, device="cpu"):
    return [v if v is None else v.to(device, dtype, copy=True).requires_grad_() for v in values]


def reference(values, id_Tk, num_experts, activation):
    """Every expert on every token, summed with the weight of the token's choices of it."""
    x_TD, weight_Tk, w_in, b_in, w_out, b_out = values
    name, is_gated = ops.ACTIVATIONS[activation]
    function = getattr(functional, name)
    y_TD = torch.zeros_like(x_TD)
    for e in range(num_experts):
        z = x_TD @ w_in.unflatten(0, (num_experts, -1))[e].t()
        z = z if b_in is None else z + b_in[e]
        half = z.shape[1] // 2
        h = function(z[:, :half]) * z[:, half:] if is_gated else function(z)
        out = h @ w_out.unflatten(0, (num_experts, -1))[e].t()
        out = out if b_out is None else out + b_out[e]
        y_TD = y_TD + ((id_Tk == e) * weight_Tk).sum(1, keepdim=True) * out
    return y_TD


def run(values, id_Tk, num_experts, activation, backend):
    plan = ops.plan_rows(id_Tk, num_experts)
    weights = ops.Weights(*values[2:])
    return ops.moe_ffn(*values[:2], plan, weights, activation=activation, backend=backend)


def differentiate(y, values):
    generator = torch.Generator().manual_seed(1)
    dy = torch.randn(y.shape, generator=generator, dtype=torch.float64).to(y.device, y.dtype)
    wanted = [v for v in values if v is not None]
    return list(torch.autograd.grad(y, wanted, dy))


def norm(x):
    return x.double().norm().item()


def worst_error(values, id_Tk, num_experts, activation, backend_device, dtype=torch.float32):
    """The largest norm-wise relative error of the output and of every gradient."""
    backend, device = backend_device
    ours, exact = copies(values, dtype, device), copies(values, torch.float64)
    y = run(ours, id_Tk.to(device), num_experts, activation, backend)
    y_exact = reference(exact, id_Tk, num_experts, activation)
    pairs = zip(
        [y, *differentiate(y, ours)], [y_exact, *differentiate(y_exact, exact)], strict=True
    )
    return max(norm(a.cpu() - b) / max(norm(b), 1e-30) for a, b in pairs)


@pytest.mark.parametrize(("activation", "sizes"), SHAPED)
def test_output_and_every_gradient(backend_device, activation, sizes):
    num_choices, width, hidden = sizes
    values = draw(
        70, width, hidden, num_experts=3, num_choices=num_choices,
        gated=ops.ACTIVATIONS[activation][1],
    )  # fmt: skip
    id_Tk = experts_of("skewed", 70, 3, num_choices)
    assert worst_error(values, id_Tk, 3, activation, backend_device) <= 1e-5


@pytest.mark.parametrize(("routing", "experts_and_choices"), ROUTED)
def test_any_routing(backend_device, routing, experts_and_choices):
    num_experts, num_choices = experts_and_choices
    values = draw(35, 40, 24, num_experts=num_experts, num_choices=num_choices)
    id_Tk = experts_of(routing, 35, num_experts, num_choices)
    assert worst_error(values, id_Tk, num_experts, "gelu", backend_device) <= 1e-5


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_without_biases(backend_device, activation):
    gated = ops.ACTIVATIONS[activation][1]
    values = draw(50, 40, 72, num_experts=4, num_choices=2, gated=gated, biases=False)
    id_Tk = experts_of("dropped rows", 50, 4, 2)
    assert worst_error(values, id_Tk, 4, activation, backend_device) <= 1e-5


def test_half_precision(backend_device):
    values = draw(150, 40, 72, num_experts=4, num_choices=2)
    id_Tk = experts_of("skewed", 150, 4, 2)
    assert worst_error(values, id_Tk, 4, "gelu", backend_device, torch.float16) <= 3e-3


@settings(max_examples=6 if HAS_INTERPRETER else 25, deadline=None, derandomize=True)
@given(
    sizes=st.tuples(*(st.integers(1, n) for n in (80, 70, 70, 5, 3))),
    routing=st.sampled_from(ROUTINGS),
    activation=st.sampled_from(list(ops.ACTIVATIONS)),
    biases=st.booleans(),
)
@pytest.mark.parametrize("pair", BACKENDS, ids="-".join)
def test_any_shape(pair, sizes, routing, activation, biases):
    num_tokens, width, hidden, num_experts, num_choices = sizes
    gated = ops.ACTIVATIONS[activation][1]
    counts = {"num_experts": num_experts, "num_choices": num_choices}
    values = draw(num_tokens, width, hidden, **counts, gated=gated, biases=biases)
    id_Tk = experts_of(routing, num_tokens, num_experts, num_choices)
    assert worst_error(values, id_Tk, num_experts, activation, pair) <= 1e-5


def test_no_tokens_give_zero_gradients(backend_device):
    backend, device = backend_device
    values = copies(draw(0, 40, 24, num_experts=3, num_choices=2), torch.float32, device)
    y = run(values, torch.zeros(0, 2, dtype=torch.int64, device=device), 3, "gelu", backend)
    assert y.shape == (0, 40)
    assert all(not grad.any() for grad in differentiate(y, values))


def test_same_bits_every_time(backend_device):
    backend, device = backend_device
    values = copies(draw(40, 40, 24, num_experts=3, num_choices=2), torch.float32, device)
    id_Tk = experts_of("skewed", 40, 3, 2).to(device)
    first, second = (run(values, id_Tk, 3, "gelu", backend) for _ in range(2))
    assert torch.equal(first, second)
    pairs = zip(differentiate(first, values), differentiate(second, values), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


@pytest.mark.parametrize("trained", [("x",), ("weight",), ("x", "weight"), ("b_in",), ("w_out",)])
def test_frozen_inputs_change_no_other_gradient(backend_device, trained):
    backend, device = backend_device
    values = copies(draw(40, 40, 24, num_experts=3, num_choices=2), torch.float32, device)
    id_Tk = experts_of("skewed", 40, 3, 2).to(device)
    full = dict(
        zip(NAMES, differentiate(run(values, id_Tk, 3, "gelu", backend), values), strict=True)
    )
    for name, value in zip(NAMES, values, strict=True):
        value.requires_grad_(name in trained)
    asked = [value for name, value in zip(NAMES, values, strict=True) if name in trained]
    partial = differentiate(run(values, id_Tk, 3, "gelu", backend), asked)
    assert all(torch.equal(full[n], g) for n, g in zip(trained, partial, strict=True))


def test_plan_is_a_stable_sort():
    plan = ops.plan_rows(torch.tensor([[2, 0], [3, 2], [-1, 0], [0, 2]]), 3)
    assert plan.order_R.tolist() == [1, 5, 6, 0, 3, 7, 2, 4]
    assert plan.inverse_R.tolist() == [3, 0, -1, 4, -1, 1, 2, 5]
    assert plan.offset_E1.tolist() == [0, 3, 3, 6]
    assert {t.dtype for t in plan} == {torch.int32}


def test_plan_with_more_experts_than_a_byte_counts():
    id_Tk = torch.randint(0, 300, (500, 2), generator=torch.Generator().manual_seed(0))
    plan = ops.plan_rows(id_Tk, 300)
    assert plan.order_R.tolist() == id_Tk.view(-1).argsort(stable=True).tolist()
    assert plan.offset_E1.diff().tolist() == id_Tk.view(-1).bincount(minlength=300).tolist()


def combine_case(device):
    """Rows of another order, one of them used by nobody, and two choices that were dropped."""
    generator = torch.Generator().manual_seed(0)
    y_RD = torch.randn(79, 300, generator=generator, dtype=torch.float64)
    inverse_R = torch.randperm(78, generator=generator).int()
    inverse_R[[3, 50]] = -1
    weight_Tk = torch.rand(39, 2, generator=generator, dtype=torch.float64)
    return y_RD, weight_Tk, inverse_R.to(device)


def test_combine_and_its_gradients(backend_device):
    backend, device = backend_device
    y_RD, weight_Tk, inverse_R = combine_case(device)
    ours, exact = (
        copies((y_RD, weight_Tk), torch.float32, device),
        copies((y_RD, weight_Tk), torch.float64),
    )
    out = ops.combine(*ours, inverse_R, backend=backend)
    rows = exact[0][inverse_R.cpu().clamp(min=0).long()] * (inverse_R.cpu() >= 0)[:, None]
    out_exact = (rows.view(39, 2, -1) * exact[1][..., None]).sum(1)
    pairs = zip(
        [out, *differentiate(out, ours)], [out_exact, *differentiate(out_exact, exact)], strict=True
    )
    assert max(norm(a.cpu() - b) / norm(b) for a, b in pairs) <= 1e-6


def test_a_dropped_choice_adds_nothing_whatever_the_rows_hold(backend_device):
    backend, device = backend_device
    y_RD = torch.tensor([[float("nan")], [2.0]], device=device)
    inverse_R = torch.tensor([1, -1, -1, -1, 0, 1], dtype=torch.int32, device=device)
    weight_Tk = torch.full((3, 2), 0.5, device=device)
    y_TD = ops.combine(y_RD, weight_Tk, inverse_R, backend=backend).cpu()
    assert y_TD[:2, 0].tolist() == [1.0, 0.0]
    assert y_TD[2, 0].isnan()


def test_gather_rows_and_its_gradient(backend_device):
    backend, device = backend_device
    x_TD = torch.randn(30, 20, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    id_Tk = experts_of("dropped rows", 30, 4, 2)
    plan = ops.plan_rows(id_Tk.to(device), 4)
    x = x_TD.to(device, torch.float32).requires_grad_()
    rows = ops.gather_rows(x, plan, num_choices=2, backend=backend)
    assert torch.equal(rows.cpu(), x_TD.float()[plan.order_R.cpu().long() // 2])
    num_rows = int(plan.offset_E1[-1])
    grad = torch.autograd.grad(rows[:num_rows].sum(), x)[0]
    kept_T1 = ((id_Tk >= 0) & (id_Tk < 4)).sum(1, keepdim=True)
    assert torch.equal(grad.cpu(), kept_T1.float().expand(30, 20))


def test_ffn_of_one_choice_is_gather_ffn_combine(backend_device):
    backend, device = backend_device
    values = copies(draw(40, 40, 24, num_experts=3, num_choices=2), torch.float32, device)
    id_Tk = experts_of("skewed", 40, 3, 2).to(device)
    plan = ops.plan_rows(id_Tk, 3)
    rows = ops.gather_rows(values[0], plan, num_choices=2, backend=backend)
    received_id_R1 = id_Tk.view(-1)[plan.order_R.long()][:, None]
    ones = torch.ones(80, 1, device=device)
    y_RD = run([rows, ones, *values[2:]], received_id_R1, 3, "gelu", backend)
    y_TD = ops.combine(y_RD, values[1], plan.inverse_R, backend=backend)
    expected = run(values, id_Tk, 3, "gelu", backend)
    assert norm(y_TD - expected) <= 1e-6 * norm(expected)


def kept_bytes(values, id_Tk, num_experts, backend):
    """Bytes kept for backward that are not the parameters', each storage once."""
    plan, kept = ops.plan_rows(id_Tk, num_experts), {}
    parameters = {v.data_ptr() for v in values[2:]}

    def pack(tensor):
        if tensor.data_ptr() not in parameters:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        weights = ops.Weights(*values[2:])
        y = ops.moe_ffn(*values[:2], plan, weights, activation="gelu", backend=backend)
    assert y.grad_fn is not None
    return sum(kept.values())


def test_backward_keeps_x_and_the_preactivation_only(backend_device):
    backend, device = backend_device
    values = copies(draw(64, 32, 128, num_experts=4, num_choices=2), torch.float32, device)
    id_Tk = experts_of("balanced", 64, 4, 2).to(device)
    index_bytes = 4 * (64 * 2 * 2 + 4 + 1)
    minimal = 4 * (64 * 32 + 64 * 2 * 128) + index_bytes
    assert kept_bytes(values, id_Tk, 4, backend) <= 1.05 * minimal


@pytest.mark.parametrize(("needs_weights", "products"), [(True, 4), (False, 2)])
def test_frozen_experts_cost_no_weight_gradient(needs_weights, products):
    values = draw(32, 16, 24, num_experts=2, num_choices=2)
    plan = ops.plan_rows(experts_of("balanced", 32, 2, 2), 2)
    # Without b_out, whose share of the gate's gradient would be counted, too.
    weights = ops.Weights(*values[2:])._replace(b_out=None)
    given = {"plan": plan, "weights": weights, "activation": ops.ACTIVATIONS["gelu"]}
    y, z_RF = torch_ffn.forward(*values[:2], **given)
    needs = [True, True, needs_weights, needs_weights, needs_weights, False]
    with FlopCounterMode(display=False) as counter:
        torch_ffn.backward(y, *values[:2], z_RF, needs=needs, **given)
    assert counter.get_total_flops() == products * 2 * 64 * 16 * 24


def test_compiled_as_one_graph(backend_device):
    backend, device = backend_device
    values = copies(draw(24, 16, 24, num_experts=3, num_choices=2), torch.float32, device)
    id_Tk = experts_of("dropped rows", 24, 3, 2).to(device)

    def layer(*values):
        return run(values, id_Tk, 3, "gelu", backend)

    eager, compiled = (
        layer(*values),
        torch.compile(layer, fullgraph=True, backend="aot_eager")(*values),
    )
    assert torch.equal(eager, compiled)
    pairs = zip(differentiate(eager, values), differentiate(compiled, values), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)


def test_ops_keep_the_rules_of_custom_ops(backend_device):
    backend, device = backend_device
    values = copies(draw(12, 8, 16, num_experts=3, num_choices=2), torch.float32, device)
    plan = ops.plan_rows(experts_of("balanced", 12, 3, 2).to(device), 3)
    y_RD = torch.randn(24, 8, device=device, requires_grad=True)
    registered, opcheck = torch.ops.moevit, torch.library.opcheck
    opcheck(registered.moe_ffn, (*values[:2], *plan, *values[2:], "gelu", backend))
    opcheck(registered.combine, (y_RD, values[1], plan.inverse_R, 2, backend))
    opcheck(registered.gather_rows, (values[0], plan.order_R, plan.inverse_R, 2, backend))


@needs_triton
def test_triton_path_reads_nothing_on_the_host(monkeypatch):
    launched = []
    monkeypatch.setattr(triton_ffn, "launch", lambda *call: launched.append(call[0]))
    values = [v.float().to("meta") for v in draw(64, 32, 48, num_experts=4, num_choices=2)]
    plan = ops.plan_rows(torch.zeros(64, 2, dtype=torch.int64, device="meta"), 4)
    weights = ops.Weights(*values[2:])
    given = {"plan": plan, "weights": weights, "activation": ops.ACTIVATIONS["gelu"]}
    # A meta tensor has no values: reading one is an error.
    y, z_RF = triton_ffn.forward(*values[:2], **given)
    grads = triton_ffn.backward(y, *values[:2], z_RF, needs=[True] * 6, **given)
    assert [g.shape for g in grads] == [v.shape for v in values]
    assert len(launched) == 4 + 9


def test_auto_takes_torch_on_cpu_and_says_why():
    assert ops.resolve_kernels("torch", torch.device("cpu")) == ("torch", "as configured")
    name, reason = ops.resolve_kernels("auto", torch.device("cpu"))
    assert name == "torch"
    assert "CUDA" in reason


@needs_triton
@pytest.mark.skipif(HAS_INTERPRETER, reason="the interpreter runs on CPU")
def test_triton_on_cpu_is_refused():
    with pytest.raises(ValueError, match=r"config model.moe.kernels=triton: needs CUDA"):
        ops.resolve_kernels("triton", torch.device("cpu"))


def test_unknown_backend_is_refused():
    with pytest.raises(ValueError, match=r"kernels=cuda: must be auto, torch or triton"):
        ops.resolve_kernels("cuda", torch.device("cpu"))


def test_auto_takes_torch_on_cuda_without_triton(monkeypatch):
    monkeypatch.setitem(sys.modules, "moe_kernels.triton_seam", None)
    name, reason = ops.resolve_kernels("auto", torch.device("cuda"))
    assert (name, "triton_seam" in reason) == ("torch", True)
    with pytest.raises(ImportError):
        ops.resolve_kernels("triton", torch.device("cuda"))


@needs_triton
@pytest.mark.slow
@pytest.mark.skipif(HAS_INTERPRETER, reason="is the process that this test starts")
def test_triton_kernels_in_the_interpreter():
    environment = {**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", __file__]
    child = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stdout[-4000:]
    num_passed = int(re.search(r"(\d+) passed", child.stdout)[1])
    assert num_passed > 40  # that they ran, and were not skipped
