import sys

import pytest
import torch
from torch import nn
from torch.nn import functional

from layers import modules, te
from options.schema import ViTOptions

CPU, CUDA = torch.device("cpu"), torch.device("cuda")


@pytest.fixture
def te_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformer_engine", None)
    monkeypatch.setitem(sys.modules, "transformer_engine.pytorch", None)


@pytest.fixture
def te_is_there(monkeypatch):
    monkeypatch.setattr(te, "transformer_engine", object)


@pytest.mark.parametrize(
    ("backend", "device", "resolved"),
    [
        ("torch", CPU, "torch"),
        ("torch", CUDA, "torch"),
        ("auto", CPU, "torch"),
        ("auto", CUDA, "te"),
        ("te", CUDA, "te"),
    ],
)
def test_backend_resolves_by_device(te_is_there, backend, device, resolved):
    assert te.resolve_backend(backend, device)[0] == resolved


def test_auto_backend_says_why_te_was_not_taken(te_is_missing):
    assert te.resolve_backend("auto", CPU) == (
        "torch",
        "auto: TransformerEngine needs CUDA, device is cpu",
    )
    backend, reason = te.resolve_backend("auto", CUDA)
    assert backend == "torch"
    assert "transformer_engine.pytorch does not import" in reason


def test_backend_te_by_name_never_falls_back(te_is_missing):
    with pytest.raises(ImportError, match=r"backend=te: transformer_engine\.pytorch does not"):
        te.resolve_backend("te", CUDA)
    with pytest.raises(ValueError, match="backend=te: TransformerEngine needs CUDA, device is cpu"):
        te.resolve_backend("te", CPU)


def test_fp8_context_without_a_recipe_changes_nothing():
    with te.fp8_context(None):
        assert torch.ones(1).dtype == torch.float32


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"embed_dim": 72}, "model.vit.embed_dim=72"),
        ({"hidden_dim": 200}, "model.vit.mlp_ratio=3.125"),
        ({"batch_size": 8}, r"dataset.train.batch_size=8: .*gives 1576 \(tokens per image: 197\)"),
    ],
    ids=str,
)
def test_fp8_refuses_sizes_that_are_no_multiple_of_16(changed, message):
    sizes = {"embed_dim": 64, "hidden_dim": 256, "batch_size": 16, "num_tokens": 197}
    te.check_fp8_shapes(**sizes)
    with pytest.raises(ValueError, match=message):
        te.check_fp8_shapes(**sizes | changed)


@pytest.mark.parametrize(
    ("te_name", "name"),
    [
        ("blocks.0.attn.qkv.layer_norm_weight", "blocks.0.norm1.weight"),
        ("blocks.11.mlp.fc1.layer_norm_bias", "blocks.11.norm2.bias"),
        ("attn.qkv.layer_norm_bias", "norm1.bias"),
        ("module.blocks.0.attn.qkv.weight", "module.blocks.0.attn.qkv.weight"),
        ("blocks.0.norm1.weight", "blocks.0.norm1.weight"),
        ("blocks.0.super_attn.qkv.layer_norm_bias", "blocks.0.super_attn.qkv.layer_norm_bias"),
        ("cls_token", "cls_token"),
    ],
)
def test_canonical_name(te_name, name):
    assert te.canonical_name(te_name) == name
    assert te.canonical_name(name) == name


def filled(module):
    rng = torch.Generator().manual_seed(3)
    for parameter in module.parameters():
        parameter.data.normal_(generator=rng)
    return module.double()


def test_attention_equals_a_loop_over_heads_in_fp64():
    options = ViTOptions(embed_dim=12, num_heads=3, qk_norm=True, scale_attn_norm=True)
    attention = filled(modules.Attention(options))
    x_BLD = torch.randn(2, 5, 12, dtype=torch.float64)
    q, k, v = attention.qkv(x_BLD).split(12, dim=-1)
    heads = []
    for head in range(3):
        part = slice(4 * head, 4 * head + 4)
        q_BLK, k_BLK = attention.q_norm(q[..., part]), attention.k_norm(k[..., part])
        weight_BLL = (q_BLK @ k_BLK.mT / 4**0.5).softmax(dim=-1)
        heads.append(weight_BLL @ v[..., part])
    expected = attention.proj(attention.norm(torch.cat(heads, dim=-1)))
    assert torch.allclose(attention(x_BLD), expected, rtol=1e-12)


def test_mlp_gelu_is_the_exact_one():
    mlp = filled(modules.Mlp(4, 8))
    x_BLD = torch.randn(2, 5, 4, dtype=torch.float64)
    h = functional.linear(x_BLD, mlp.fc1.weight, mlp.fc1.bias)
    h = 0.5 * h * (1 + torch.erf(h / 2**0.5))
    expected = functional.linear(h, mlp.fc2.weight, mlp.fc2.bias)
    assert torch.allclose(mlp(x_BLD), expected, rtol=1e-12)


def test_patch_projection_equals_a_convolution_with_gradients():
    ours = filled(modules.PatchProjection(3, 8, kernel_size=(4, 6), stride=(4, 6)))
    theirs = nn.Conv2d(3, 8, kernel_size=(4, 6), stride=(4, 6)).double()
    theirs.load_state_dict(ours.state_dict())
    image_BCHW = torch.randn(2, 3, 12, 12, dtype=torch.float64, requires_grad=True)
    output = ours(image_BCHW)
    expected = theirs(image_BCHW).flatten(2).mT
    assert torch.allclose(output, expected, rtol=1e-12)
    inputs = (image_BCHW, *ours.parameters()), (image_BCHW, *theirs.parameters())
    target = torch.randn_like(output)
    actual_grads = torch.autograd.grad((output * target).sum(), inputs[0])
    expected_grads = torch.autograd.grad((expected * target).sum(), inputs[1])
    for actual, wanted in zip(actual_grads, expected_grads, strict=True):
        assert torch.allclose(actual, wanted, rtol=1e-10)


def test_linear_is_built_on_the_default_device_without_drawing():
    before = torch.get_rng_state()
    assert modules.linear(3, 4, bias=True).weight.device == CPU
    with torch.device("meta"):
        assert modules.linear(3, 4, bias=True).weight.is_meta
    assert torch.equal(torch.get_rng_state(), before)
