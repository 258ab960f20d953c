"""The MoE layer as a module: no wait for the device, recomputed, compiled, frozen, in eval."""

import copy

import pytest
import torch
from torch import nn

import moe
from moe_kernels import ops, torch_ffn
from routers.router import Router
from tests.support.experts import WaitCounter, moe_vit, step_loss
from tests.support.networks import moe_options
from tests.support.sharded import batch

DIM, HIDDEN, EXPERTS, CHOICES = 32, 48, 4, 2
ALL_COEFS = dict(importance=0.1, load=0.1, switch=0.1, sequence=0.1, z=0.01)


def alone(value):
    return value


def layer(*, backend="torch", shared=False, bias=True, drop=0.0, **router_options):
    ratio = {"shared_ratio": (HIDDEN + 0.5) / DIM} if shared else {}
    options = moe_options(
        EXPERTS, hidden_of=(HIDDEN, DIM), top_k=CHOICES, **ratio, **router_options
    )
    model = moe.MoE(
        DIM,
        options,
        router=Router(DIM, options),
        bias=bias,
        drop=drop,
        kernel_backend=backend,
        sum_over_ranks=alone,
    )
    generator = torch.Generator().manual_seed(0)
    values = [torch.randn(p.shape, generator=generator) * 0.1 for p in model.parameters()]
    for parameter, value in zip(model.parameters(), values, strict=True):
        parameter.data.copy_(value)
    return model


def images(requires_grad=True):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(3, 7, DIM, generator=generator).requires_grad_(requires_grad)


# The meta device stands for CUDA: it takes the same path, and whoever asks it for a value fails.
def test_a_training_step_never_waits_for_the_device():
    options = {"jitter": 0.1, "expert_drop": 0.1, "capacity_factor": 0.9, "coefs": ALL_COEFS}
    model = layer(backend="triton", shared=True, router="noisy_topk", **options).to("meta")
    x_BLD = images().detach().to("meta").requires_grad_()
    with WaitCounter() as counter:
        (model(x_BLD).sum() + moe.balance_loss(model)).backward()
    assert all(t.grad is not None and t.grad.is_meta for t in (x_BLD, *model.parameters()))
    assert counter.waits == []


def test_what_launches_the_triton_kernels_never_waits_for_the_device(monkeypatch):
    triton_ffn = pytest.importorskip("moe_kernels.triton_ffn")
    launched = []
    monkeypatch.setattr(triton_ffn, "launch", lambda kernel, *_: launched.append(kernel))
    with WaitCounter() as counter, torch.device("meta"):
        x_TD, weight_Tk = torch.randn(21, DIM), torch.rand(21, CHOICES)
        plan = ops.plan_rows(torch.empty(21, CHOICES, dtype=torch.int64), EXPERTS)
        weights = ops.Weights(
            torch.randn(EXPERTS * HIDDEN, DIM),
            torch.randn(EXPERTS, HIDDEN),
            torch.randn(EXPERTS * DIM, HIDDEN),
            torch.randn(EXPERTS, DIM),
        )
        given = {"plan": plan, "weights": weights, "activation": ops.ACTIVATIONS["gelu"]}
        y_TD, z_RF = triton_ffn.forward(x_TD, weight_Tk, **given)
        triton_ffn.backward(y_TD, x_TD, weight_Tk, z_RF, needs=[True] * 6, **given)
    assert counter.waits == []
    assert len(launched) > 5


def test_the_torch_backend_does_wait_and_the_counter_sees_it():
    plan = ops.plan_rows(torch.zeros(21, CHOICES, dtype=torch.int64), EXPERTS)
    with WaitCounter() as counter:
        torch_ffn.combine_backward(
            torch.ones(21, DIM), torch.ones(42, DIM), torch.ones(21, CHOICES), plan.inverse_R
        )
    assert counter.waits == ["nonzero"]


def gradients_with(_, kind, is_recomputed):
    model = moe_vit(router=kind, jitter=0.1, expert_drop=0.2, grad_checkpointing=is_recomputed)
    torch.manual_seed(3)
    step_loss(model, *batch(0, 0), share=1).backward()
    return {name: p.grad for name, p in model.named_parameters()}


@pytest.mark.parametrize("kind", ["softmax", "noisy_topk"])
def test_recomputed_blocks_give_the_same_gradients_bit_for_bit(ranks, kind):
    (kept,), (recomputed,) = (ranks(1, gradients_with, kind, flag) for flag in (False, True))
    assert all(torch.equal(grad, recomputed[name]) for name, grad in kept.items())


def test_recomputing_leaves_the_routing_of_the_forward(ranks):
    def routings_around_backward(_):
        model = moe_vit(grad_checkpointing=True)
        loss = step_loss(model, *batch(0, 0), share=1)
        layers_with_experts = [block.mlp for block in model.blocks if hasattr(block.mlp, "routing")]
        before = [layer.routing for layer in layers_with_experts]
        loss.backward()
        # Another would hold all that its block recomputed until the next forward.
        return [
            layer.routing is kept for layer, kept in zip(layers_with_experts, before, strict=True)
        ]

    assert set(ranks(1, routings_around_backward)[0]) == {True}


def test_a_copy_of_a_layer_that_was_used_is_a_layer():
    model = layer()
    expected = model(images())
    assert torch.equal(copy.deepcopy(model)(images()), expected)


def test_no_biases_and_dropout_after_the_experts():
    model = layer(bias=False, drop=0.5)
    assert [name for name, _ in model.experts.named_parameters()] == ["w_in", "w_out"]
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.1)
    dropped, kept = model(images()), model.eval()(images())
    is_kept = dropped != 0
    assert 0.4 < is_kept.float().mean() < 0.6
    torch.testing.assert_close(dropped[is_kept], 2 * kept[is_kept])


def test_no_tokens_give_no_tokens():
    model = layer(coefs=dict(switch=0.1, sequence=0.1), capacity_factor=0.5)
    assert model(torch.zeros(0, 7, DIM)).shape == (0, 7, DIM)


def gradients_of(run, model):
    torch.manual_seed(5)
    x_BLD = images()
    y_BLD = run(x_BLD)
    (y_BLD.square().sum() + model.routing.balance_loss).backward()
    found = [y_BLD.detach(), x_BLD.grad, *(p.grad for p in model.parameters())]
    model.zero_grad()
    return found


def eager_and_compiled(_):
    model = layer(shared=True, router="noisy_topk", coefs=ALL_COEFS, capacity_factor=0.9)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    return gradients_of(model, model), gradients_of(compiled, model)


def test_compiled_as_one_graph_it_gives_the_same(ranks):
    ((eager, compiled),) = ranks(1, eager_and_compiled)
    for one, other in zip(eager, compiled, strict=True):
        torch.testing.assert_close(one, other)


def test_frozen_experts_get_no_gradient_and_change_nobody_elses():
    model = layer(coefs=ALL_COEFS, router="noisy", noise_std=1.0)
    _, expected_x, expected_gate, *_ = gradients_of(model, model)
    for parameter in model.experts.parameters():
        parameter.requires_grad_(False)
    _, x_grad, gate_grad, *of_experts = gradients_of(model, model)
    assert torch.equal(x_grad, expected_x)
    assert torch.equal(gate_grad, expected_gate)
    assert of_experts == [None] * 4


def test_eval_draws_nothing_and_costs_nothing():
    options = {"jitter": 0.2, "expert_drop": 0.3, "coefs": ALL_COEFS}
    model = layer(router="noisy_topk", **options)
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        torch.manual_seed(0)
        state = torch.get_rng_state()
        first = model(images(requires_grad=False))
        assert torch.equal(torch.get_rng_state(), state)
        assert torch.equal(model(images(requires_grad=False)), first)
    assert model.routing.balance_loss.item() == 0
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
