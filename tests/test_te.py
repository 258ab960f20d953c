"""TransformerEngine backend: on a stand-in (everywhere), on the real library, and on a GPU."""

import copy
import math
import types

import pytest
import torch
from torch import nn
from torch.nn import functional

from layers import modules, te
from tests.support.networks import build_vit

SMALL = {
    "img_size": 32,
    "patch_size": 8,
    "num_classes": 16,
    "embed_dim": 64,
    "depth": 2,
    "num_heads": 2,
}
VARIANTS = [
    {},
    {
        "global_pool": "map",
        "reg_tokens": 3,
        "qk_norm": True,
        "scale_attn_norm": True,
        "scale_mlp_norm": True,
        "init_values": 0.1,
        "fix_init": True,
        "weight_init": "moco",
    },
    {"qkv_bias": False, "proj_bias": False, "pre_norm": True, "weight_init": "jax"},
    {"drop_path_rate": 0.3, "proj_drop_rate": 0.2, "attn_drop_rate": 0.1},
]
gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU"),
]


class StandInLinear(nn.Module):
    """A TE layer's names, defaults and extra state, over torch's functions."""

    has_norm = False

    def __init__(self, in_dim, out_dim, *, eps=1e-5, bias=True, device="cuda"):
        super().__init__()
        self.eps = eps
        if self.has_norm:
            self.layer_norm_weight = nn.Parameter(torch.empty(in_dim, device=device))
            self.layer_norm_bias = nn.Parameter(torch.empty(in_dim, device=device))
        self.weight = nn.Parameter(torch.empty(out_dim, in_dim, device=device))
        self.bias = nn.Parameter(torch.empty(out_dim, device=device)) if bias else None

    def get_extra_state(self):
        return torch.empty(0)

    def set_extra_state(self, state):
        raise AssertionError("no extra state is ever loaded")

    def forward(self, x):
        if self.has_norm:
            norm = (self.layer_norm_weight, self.layer_norm_bias)
            x = functional.layer_norm(x, x.shape[-1:], *norm, self.eps)
        return functional.linear(x, self.weight, self.bias)


class StandInLayerNormLinear(StandInLinear):
    has_norm = True


class StandInAttention(nn.Module):
    def __init__(self, num_heads, head_dim, *, attention_dropout, qkv_format, attn_mask_type):
        super().__init__()
        assert (qkv_format, attn_mask_type) == ("bshd", "no_mask")
        self.drop = attention_dropout

    def get_extra_state(self):
        return torch.empty(0)

    def forward(self, q, k, v):
        assert q.dtype == torch.bfloat16
        p = self.drop if self.training else 0.0
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        y = functional.scaled_dot_product_attention(q, k, v, dropout_p=p)
        return y.transpose(1, 2).flatten(2)


def stand_in_checkpoint(function, x, *, use_reentrant, context_fn):
    assert not use_reentrant
    return torch.utils.checkpoint.checkpoint(
        function, x, use_reentrant=False, context_fn=context_fn
    )


@pytest.fixture
def stand_in(monkeypatch):
    library = types.SimpleNamespace(
        Linear=StandInLinear,
        LayerNormLinear=StandInLayerNormLinear,
        DotProductAttention=StandInAttention,
        checkpoint=stand_in_checkpoint,
    )
    monkeypatch.setattr(te, "transformer_engine", lambda: library)


@pytest.fixture(params=["stand-in", "real"])
def engine(request, monkeypatch):
    """Build with TE layers; the real ones ask whether CUDA exists, then build on any device."""
    if request.param == "stand-in":
        request.getfixturevalue("stand_in")
        return
    pytest.importorskip("transformer_engine.pytorch", exc_type=ImportError)
    if not torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)


def pair(**options):
    """The same network on both backends, with the same weights, away from 0 and 1."""
    ours = build_vit(**SMALL | options, backend="te")
    plain = build_vit(**SMALL | options)
    rng = torch.Generator().manual_seed(2)
    with torch.no_grad():
        for parameter in plain.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=rng), alpha=0.05)
    ours.load_state_dict(plain.state_dict(), strict=True)
    return ours, plain


def canonical_grads(model):
    return {te.canonical_name(name): p.grad for name, p in model.named_parameters()}


def run(model, image_BCHW, seed=0):
    torch.manual_seed(seed)
    output = model(image_BCHW)
    target = torch.linspace(-1, 1, output.numel(), device=output.device).view_as(output)
    (output.float() * target).sum().backward()
    return output.detach(), canonical_grads(model)


def relative_error(actual, expected):
    return ((actual.float() - expected.float()).norm() / expected.float().norm()).item()


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_state_dict_has_the_keys_shapes_and_values_of_the_torch_backend(engine, options):
    ours = build_vit(**SMALL | options, backend="te")
    state = ours.state_dict()
    expected = build_vit(**SMALL | options).state_dict()
    assert list(state) == list(expected)
    assert all(torch.equal(state[name], value) for name, value in expected.items())
    names = {te.canonical_name(name): p for name, p in ours.named_parameters()}
    assert names.keys() == expected.keys()
    assert any(name not in expected for name, _ in ours.named_parameters())


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_load_state_dict_is_strict_and_exact(engine, options):
    ours, plain = pair(**options)
    state = plain.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())
    del state["blocks.1.norm1.weight"]
    with pytest.raises(RuntimeError, match=r"Missing key.*blocks\.1"):
        ours.load_state_dict(state, strict=True)
    with pytest.raises(RuntimeError, match="Unexpected key"):
        ours.load_state_dict(plain.state_dict() | {"blocks.1.attn.more": torch.zeros(1)})


def test_state_dict_is_canonical_inside_a_wrapper(engine):
    ours, plain = pair()
    wrapped, expected = nn.ModuleDict({"module": ours}), nn.ModuleDict({"module": plain})
    assert list(wrapped.state_dict()) == list(expected.state_dict())
    for parameter in ours.parameters():
        parameter.data.zero_()
    wrapped.load_state_dict(expected.state_dict(), strict=True)
    state = plain.state_dict()
    assert all(torch.equal(value, state[name]) for name, value in ours.state_dict().items())


@pytest.mark.parametrize("options", VARIANTS, ids=str)
def test_meta_init_of_a_copy_equals_the_torch_backend_bit_for_bit(engine, options):
    with torch.device("meta"):
        model = copy.deepcopy(build_vit(**SMALL | options, backend="te"))
    assert all(parameter.is_meta for parameter in model.parameters())
    for module in model.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
            for parameter in module.parameters(recurse=False):
                parameter.data.fill_(math.nan)
            module.reset_parameters()
    expected = build_vit(**SMALL | options).state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())


def test_building_draws_nothing_from_the_global_generator(engine):
    before = torch.get_rng_state()
    build_vit(**SMALL, backend="te")
    assert torch.equal(torch.get_rng_state(), before)


def test_block_with_a_given_ffn_keeps_its_own_norm2(engine):
    model = build_vit(**SMALL, backend="te", ffn=lambda i: modules.Mlp(64, 64))
    names = [name for name, _ in model.blocks[0].named_parameters()]
    assert "norm2.weight" in names
    assert "attn.qkv.layer_norm_weight" in names
    assert "mlp.fc1.layer_norm_weight" not in names


@pytest.mark.parametrize("options", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_forward_and_every_gradient_equal_the_torch_backend(stand_in, options, dtype):
    ours, plain = (model.to(dtype) for model in pair(**options))
    image_BCHW = torch.randn(4, 3, 32, 32, dtype=dtype)
    (output, grads), (expected, expected_grads) = (run(m, image_BCHW) for m in (ours, plain))
    assert torch.equal(output, expected)
    assert grads.keys() == expected_grads.keys()
    assert all(torch.equal(grads[name], value) for name, value in expected_grads.items())


def test_grad_checkpointing_uses_the_one_of_te(stand_in, monkeypatch):
    calls = []

    def counting_checkpoint(function, x, **options):
        calls.append(function)
        return stand_in_checkpoint(function, x, **options)

    monkeypatch.setattr(te.transformer_engine(), "checkpoint", counting_checkpoint)
    model = build_vit(**SMALL, backend="te", grad_checkpointing=True)
    plain = build_vit(**SMALL)
    image_BCHW = torch.randn(2, 3, 32, 32)
    (output, grads), (expected, expected_grads) = (run(m, image_BCHW) for m in (model, plain))
    assert calls == list(model.blocks)
    assert torch.equal(output, expected)
    assert all(torch.equal(grads[name], value) for name, value in expected_grads.items())


def test_gelu_of_te_is_the_tanh_approximation():
    """Why LayerNormMLP is not used. If this fails, TE got an exact GELU: use it."""
    jit = pytest.importorskip("transformer_engine.pytorch.jit", exc_type=ImportError)
    x = torch.linspace(-4, 4, 101, dtype=torch.float64)
    fused = jit.gelu_fused_(x)
    approximate = functional.gelu(x, approximate="tanh")
    assert torch.allclose(fused, approximate, atol=1e-7)
    assert (fused - functional.gelu(x)).abs().max() > 1e-4


def on_gpu(**options):
    ours, plain = pair(**options)
    image_BCHW = torch.randn(16, 3, 32, 32, device="cuda", dtype=torch.bfloat16)
    return ours.to("cuda", torch.bfloat16), plain.to("cuda", torch.bfloat16), image_BCHW


@pytest.mark.parametrize("options", VARIANTS[:3], ids=str)
class TestGpu:
    pytestmark = gpu

    @pytest.fixture(autouse=True)
    def _te_is_installed(self):
        pytest.importorskip("transformer_engine.pytorch", exc_type=ImportError)

    def test_bf16_forward_and_every_gradient_near_the_torch_backend(self, options):
        """Both are compared to fp32: TE may be no more than half as far again as torch is."""
        ours, plain, image_BCHW = on_gpu(**options)
        exact = copy.deepcopy(plain).float()
        truth, true_grads = run(exact, image_BCHW.float())
        (output, grads), (expected, expected_grads) = (run(m, image_BCHW) for m in (ours, plain))
        assert relative_error(output, truth) <= 1.5 * relative_error(expected, truth) + 2e-3
        for name, grad in grads.items():
            if not name.endswith("k_norm.bias"):  # exactly 0, so nothing but rounding
                allowed = 1.5 * relative_error(expected_grads[name], true_grads[name]) + 1e-2
                assert relative_error(grad, true_grads[name]) <= allowed, name

    def test_fp32_forward_equals_the_torch_backend(self, options):
        ours, plain, image_BCHW = on_gpu(**options)
        output, expected = (m.float()(image_BCHW.float()) for m in (ours, plain))
        assert relative_error(output, expected) <= 5e-3  # in tf32 at worst

    @pytest.mark.parametrize("recipe", ["delayed", "current"])
    def test_fp8_step_is_finite_and_near_bf16(self, options, recipe):
        ours, plain, image_BCHW = on_gpu(**options)
        label_B = torch.arange(16, device="cuda")
        for _ in range(3):  # delayed scaling learns its scales from the steps before
            with te.fp8_context(recipe):
                logits_BY = ours(image_BCHW)
            loss = functional.cross_entropy(logits_BY.float(), label_B)
            loss.backward()
        expected = functional.cross_entropy(plain(image_BCHW).float(), label_B)
        assert loss.item() == pytest.approx(expected.item(), rel=0.1)
        assert not torch.equal(logits_BY, ours(image_BCHW))  # fp8 did happen
        assert all(grad.isfinite().all() for grad in canonical_grads(ours).values())

    def test_fp8_grad_checkpointing_runs(self, options):
        model = build_vit(**SMALL | options, backend="te", grad_checkpointing=True).to(
            "cuda", torch.bfloat16
        )
        image_BCHW = torch.randn(16, 3, 32, 32, device="cuda", dtype=torch.bfloat16)
        with te.fp8_context("delayed"):
            loss = model(image_BCHW).float().square().mean()
        loss.backward()
        assert all(grad.isfinite().all() for grad in canonical_grads(model).values())

    def test_meta_init_on_cuda_equals_the_torch_backend(self, options):
        with torch.device("meta"):
            model = build_vit(**SMALL | options, backend="te")
        for module in model.modules():
            if any(True for _ in module.parameters(recurse=False)):
                module.to_empty(device="cuda", recurse=False)
                module.reset_parameters()
        expected = build_vit(**SMALL | options).state_dict()
        for name, value in model.state_dict().items():
            assert torch.equal(value.cpu(), expected[name]), name

    def test_built_under_a_device_context_lives_there(self, options):
        with torch.device("cuda"):
            model = build_vit(**SMALL | options, backend="te")
        assert {parameter.device.type for parameter in model.parameters()} == {"cuda"}
