import copy
import dataclasses
import math

import pytest
import torch
import torch.distributed.nn.functional
import torch.utils.checkpoint
from torch import nn

from layers import init
from options.schema import ViTOptions
from parallel import collectives
from routers import balance
from routers.router import keep_within_capacity
from tests.support.networks import build_router

E, K, D, T, IMAGE = 6, 2, 5, 24, 8
KINDS = {
    "softmax": {"router": "softmax"},
    "softmax_normalized": {"router": "softmax", "normalize": True},
    "sigmoid": {"router": "sigmoid"},
    "sigmoid_plain": {"router": "sigmoid", "normalize": False},
    "noisy": {"router": "noisy", "noise_std": 2.0},
    "noisy_topk": {"router": "noisy_topk"},
}
NOISY = ("noisy", "noisy_topk")
each_kind = pytest.mark.parametrize("kind", KINDS)


def alone(value):
    return value


def never(value):
    raise AssertionError("no collective is expected here")


def all_coefs(kind):
    load = 0.3 if kind in NOISY else 0.0
    return dict(importance=0.2, load=load, switch=0.5, sequence=0.7, z=0.1)


def build(kind="softmax", *, scale=1.0, **options):
    torch.manual_seed(3)
    router = build_router(D, E, **({"top_k": K} | KINDS[kind] | options)).double()
    for parameter in router.parameters():
        nn.init.normal_(parameter, std=scale)
    return router


def tokens(count=T, seed=4):
    return torch.randn(count, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def route(router, x_TD, *, seed=5, sum_over_ranks=alone):
    torch.manual_seed(seed)
    return router(x_TD, sum_over_ranks=sum_over_ranks, tokens_per_image=IMAGE)


def softmax(row):
    highest = max(row)
    exps = [math.exp(value - highest) for value in row]
    return [value / sum(exps) for value in exps]


def by_hand(router, kind, x_TD, *, seed=5):
    """(logits, ranking, gate, std of the noise), nested lists, by loops over tokens and experts."""
    torch.manual_seed(seed)
    noise_TE = torch.randn(len(x_TD), E, dtype=torch.float64).tolist()
    weight, x = router.gate.weight.tolist(), x_TD.tolist()
    logits = [[sum(a * b for a, b in zip(row, w, strict=True)) for w in weight] for row in x]
    std = [[0.0] * E for _ in x]
    if router.training and kind == "noisy":
        std = [[2.0 / E] * E for _ in x]
    if router.training and kind == "noisy_topk":
        learnt = router.gate.noise.weight.tolist()
        for t, row in enumerate(x):
            raw = [sum(a * b for a, b in zip(row, w, strict=True)) for w in learnt]
            std[t] = [math.log1p(math.exp(value)) + 0.01 for value in raw]
    ranking = [[logits[t][e] + std[t][e] * noise_TE[t][e] for e in range(E)] for t in range(len(x))]
    if kind.startswith("sigmoid"):
        gate = [[1 / (1 + math.exp(-value)) for value in row] for row in ranking]
    else:
        gate = [softmax(row) for row in ranking]
    return logits, ranking, gate, std


def chosen_by_hand(kind, ranking, gate):
    ids = [sorted(range(E), key=lambda e: -row[e])[:K] for row in ranking]
    weights = [[gate[t][e] for e in ids[t]] for t in range(len(ids))]
    if kind in ("softmax_normalized", "sigmoid", "noisy_topk"):
        weights = [[value / sum(row) for value in row] for row in weights]
    return ids, weights


def squared_cv_by_hand(values):
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / (len(values) - 1)
    return variance / mean**2


def switch_by_hand(ids, gate):
    total = 0.0
    for e in range(E):
        f = sum(e in row for row in ids) / (len(ids) * K)
        p = sum(row[e] / sum(row) for row in gate) / len(gate)
        total += E * f * p
    return total


def load_by_hand(logits, ranking, std):
    load = [0.0] * E
    for t, row in enumerate(ranking):
        for e in range(E):
            others = sorted(row[:e] + row[e + 1 :], reverse=True)
            z = (logits[t][e] - others[K - 1]) / std[t][e]
            load[e] += 0.5 * (1 + math.erf(z / math.sqrt(2)))
    return load


def loss_by_hand(kind, name, x_TD, router):
    logits, ranking, gate, std = by_hand(router, kind, x_TD)
    ids, weights = chosen_by_hand(kind, ranking, gate)
    if name == "importance":
        importance = [0.0] * E
        for row, values in zip(ids, weights, strict=True):
            for e, value in zip(row, values, strict=True):
                importance[e] += value
        return squared_cv_by_hand(importance)
    if name == "load":
        return squared_cv_by_hand(load_by_hand(logits, ranking, std))
    if name == "switch":
        return switch_by_hand(ids, gate)
    if name == "sequence":
        starts = range(0, T, IMAGE)
        losses = [switch_by_hand(ids[s : s + IMAGE], gate[s : s + IMAGE]) for s in starts]
        return sum(losses) / len(losses)
    return sum(math.log(sum(map(math.exp, row))) ** 2 for row in logits) / T


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@each_kind
def test_experts_and_weights_equal_loops(kind, training):
    router, x_TD = build(kind).train(training), tokens()
    routing = route(router, x_TD)
    _, ranking, gate, _ = by_hand(router, kind, x_TD)
    ids, weights = chosen_by_hand(kind, ranking, gate)
    assert routing.expert_id_Tk.tolist() == ids
    torch.testing.assert_close(routing.weight_Tk, torch.tensor(weights, dtype=torch.float64))
    rows = [sum(e in row for row in ids) for e in range(E)]
    assert routing.rows_per_expert_E.tolist() == rows


@pytest.mark.parametrize(
    ("kind", "name"),
    [(kind, name) for kind in KINDS for name, coef in all_coefs(kind).items() if coef],
)
def test_balance_loss_equals_loops(kind, name):
    router, x_TD = build(kind, coefs=dict(**{name: 0.3})), tokens()
    loss = route(router, x_TD).balance_loss.item()
    assert loss == pytest.approx(0.3 * loss_by_hand(kind, name, x_TD, router), rel=1e-9)


@each_kind
def test_balance_losses_add_up(kind):
    coefs = all_coefs(kind)
    whole = route(build(kind, coefs=coefs), tokens()).balance_loss
    parts = [
        route(build(kind, coefs=dict(**{name: value})), tokens()).balance_loss
        for name, value in coefs.items()
        if value
    ]
    torch.testing.assert_close(whole, sum(parts))


def one_per_expert(experts):
    """Tokens that a router with weight 40 * I sends to `experts`, one each."""
    return torch.eye(E, dtype=torch.float64)[experts] * 40


@pytest.mark.parametrize(
    ("name", "experts", "expected"),
    [
        ("importance", [*range(E)] * 4, 0),
        ("importance", [2] * T, E),
        ("switch", [*range(E)] * 4, 1),
        ("switch", [2] * T, E),
        ("sequence", [2] * T, E),
        ("sequence", [0] * IMAGE + [1] * IMAGE + [2] * IMAGE, E),
        ("sequence", [0, 1, 2, 3] * 6, E / 4),
        ("z", [2] * T, 1600),
    ],
)
def test_closed_forms(name, experts, expected):
    router = build_router(E, E, top_k=1, coefs=dict(**{name: 1.0})).double()
    nn.init.eye_(router.gate.weight)
    loss = route(router, one_per_expert(experts)).balance_loss
    assert loss.item() == pytest.approx(expected, abs=1e-9)


def test_closed_forms_with_equal_logits():
    router = build("noisy", scale=0.0, noise_std=1e-9, coefs=dict(switch=1.0))
    assert route(router, tokens()).balance_loss.item() == pytest.approx(1)
    router = build(scale=0.0, coefs=dict(z=1.0))
    assert route(router, tokens()).balance_loss.item() == pytest.approx(math.log(E) ** 2)


@pytest.mark.parametrize(("total", "expected"), [([3.0] * 4, 0), ([0, 7.0, 0, 0], 4), ([5.0], 0)])
def test_squared_cv_of_uniform_and_one_hot(total, expected):
    cv = balance.squared_cv(torch.tensor(total, dtype=torch.float64))
    assert cv.item() == pytest.approx(expected, abs=1e-9)


@pytest.mark.parametrize(
    "options", [{}, {"capacity_factor": 0.9}, {"jitter": 0.1}, {"expert_drop": 0.1}], ids=str
)
@each_kind
def test_gradients_of_weights_and_loss(kind, options):
    router, x_TD = build(kind, coefs=all_coefs(kind), **options), tokens().requires_grad_()
    names, values = zip(*router.named_parameters(), strict=True)

    def weights_and_loss(x_TD, *parameters):
        torch.manual_seed(5)
        arguments = {"sum_over_ranks": alone, "tokens_per_image": IMAGE}
        named = dict(zip(names, parameters, strict=True))
        routing = torch.func.functional_call(router, named, (x_TD,), arguments)
        return routing.weight_Tk, routing.balance_loss

    assert torch.autograd.gradcheck(weights_and_loss, (x_TD, *values), fast_mode=True)


@each_kind
def test_eval_draws_nothing_changes_nothing_and_has_no_loss(kind):
    router = build(kind, coefs=all_coefs(kind), jitter=0.2).eval()
    before = copy.deepcopy(router.state_dict())
    torch.manual_seed(5)
    rng_before = torch.get_rng_state()
    first = router(tokens(), sum_over_ranks=never)
    assert torch.equal(torch.get_rng_state(), rng_before)
    second = router(tokens(), sum_over_ranks=never)
    assert torch.equal(first.weight_Tk, second.weight_Tk)
    assert first.balance_loss.item() == 0
    after = router.state_dict()
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_no_loss_no_collective():
    router = build("noisy")
    routing = router(tokens(), sum_over_ranks=never)
    assert routing.balance_loss.shape == ()
    assert routing.balance_loss.item() == 0


def test_all_losses_take_one_collective():
    calls = []
    router = build("noisy", coefs=all_coefs("noisy"))
    route(router, tokens(), sum_over_ranks=lambda value: calls.append(value.ndim) or value)
    assert calls == [1]


@each_kind
def test_the_seed_fixes_the_draws(kind):
    router = build(kind, jitter=0.2)
    first, again = (route(router, tokens()) for _ in range(2))
    assert torch.equal(first.weight_Tk, again.weight_Tk)
    other = route(router, tokens(), seed=6)
    assert not torch.equal(first.weight_Tk, other.weight_Tk)


def test_noise_has_the_std_of_its_kind():
    x_TD = torch.ones(20000, D, dtype=torch.float64)
    torch.manual_seed(0)
    scores = build("noisy").gate(x_TD)
    noise_TE = scores.ranking_TE - scores.logits_TE
    assert noise_TE.std().item() == pytest.approx(2.0 / E, rel=0.02)
    assert abs(noise_TE.mean().item()) < 0.01
    scores = build("noisy_topk", scale=0.3).gate(x_TD)
    noise_TE = (scores.ranking_TE - scores.logits_TE) / scores.noise_std
    assert noise_TE.std().item() == pytest.approx(1, rel=0.02)
    assert scores.noise_std.std(0).max() < 1e-12 < scores.noise_std[0].std()


def test_learnt_noise_starts_at_softplus_of_zero():
    gate = build("noisy_topk").gate
    nn.init.zeros_(gate.noise.weight)
    std_TE = gate(tokens()).noise_std
    torch.testing.assert_close(std_TE, torch.full_like(std_TE, math.log(2) + 0.01))


def test_jitter_scales_each_element_within_its_bounds():
    router = build(jitter=0.25)
    seen = []
    router.gate.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    route(router, torch.full((4000, D), 2.0, dtype=torch.float64))
    factor_TD = seen[0] / 2
    assert 0.75 <= factor_TD.min() < 0.76
    assert 1.24 < factor_TD.max() <= 1.25
    assert factor_TD.mean().item() == pytest.approx(1, abs=0.01)
    assert factor_TD[0].std() > 0


@pytest.mark.parametrize("kind", NOISY)
def test_load_is_the_chance_to_be_chosen(kind):
    router, x_TD = build(kind, scale=0.5), tokens(3)
    torch.manual_seed(9)
    scores = router.gate(x_TD)
    chance_TE = balance.win_probability(scores, top_k=K)
    draws = 20000
    std_TE = scores.noise_std.expand(len(x_TD), E)
    for e in range(E):
        ranking = scores.ranking_TE.repeat(draws, 1, 1)
        ranking[..., e] = scores.logits_TE[:, e] + std_TE[:, e] * torch.randn(draws, len(x_TD))
        is_chosen = (ranking.topk(K).indices == e).any(-1)
        assert is_chosen.double().mean(0).tolist() == pytest.approx(
            chance_TE[:, e].tolist(), abs=0.015
        )


def test_load_of_a_token_sums_to_top_k_on_average():
    # With thresholds on the softmax, as M3ViT has them, this sum is far above k.
    router = build("noisy", noise_std=E, scale=0.5)
    torch.manual_seed(0)
    chance_TE = balance.win_probability(router.gate(tokens(20000)), top_k=K)
    assert chance_TE.sum(1).mean().item() == pytest.approx(K, rel=0.01)


def kept_by_hand(ids, priority, capacity):
    taken, kept = [0] * E, [[False] * K for _ in ids]
    for j in range(K):
        for t in sorted(range(len(ids)), key=lambda t: -priority[t]):
            kept[t][j] = taken[ids[t][j]] < capacity
            taken[ids[t][j]] += 1
    return kept


@pytest.mark.parametrize("factor", [0.01, 0.3, 0.9, 1.0, 1.7])
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_capacity_keeps_the_best_tokens_first(kind, factor):
    free = route(build(kind), tokens())
    routing = route(build(kind, capacity_factor=factor), tokens())
    _, ranking, gate, _ = by_hand(build(kind), kind, tokens())
    ids, _ = chosen_by_hand(kind, ranking, gate)
    capacity = math.ceil(factor * T * K / E)
    kept = torch.tensor(kept_by_hand(ids, [max(row) for row in gate], capacity))
    assert torch.equal(routing.expert_id_Tk, free.expert_id_Tk.masked_fill(~kept, E))
    assert torch.equal(routing.weight_Tk, free.weight_Tk * kept)
    assert torch.bincount(routing.expert_id_Tk[kept], minlength=E).max() <= capacity
    assert routing.num_dropped == (~kept).sum()
    assert torch.equal(routing.rows_per_expert_E, free.rows_per_expert_E), "what was chosen"
    in_eval = route(build(kind, capacity_factor=factor).eval(), tokens())
    assert torch.equal(in_eval.expert_id_Tk, free.expert_id_Tk), "nothing is dropped in eval"


def test_earlier_tokens_come_first_at_equal_priority():
    expert_id_Tk = torch.tensor([[0, 1], [0, 1], [1, 0]])
    kept = keep_within_capacity(expert_id_Tk, torch.ones(3), num_experts=2, capacity=2)
    assert kept.tolist() == [[True, True], [True, False], [True, False]]


def test_a_capacity_does_not_change_the_balance_loss():
    coefs = all_coefs("noisy")
    free = route(build("noisy", coefs=coefs), tokens())
    limited = route(build("noisy", coefs=coefs, capacity_factor=0.5), tokens())
    assert torch.equal(free.balance_loss, limited.balance_loss)


@each_kind
def test_forced_balance_keeps_the_weights_of_the_forced_experts(kind):
    router = build(kind, forced_balance=True).eval()
    routing = route(router, tokens())
    expected = torch.arange(T * K).remainder(E).view(T, K)
    assert torch.equal(routing.expert_id_Tk, expected)
    assert routing.rows_per_expert_E.tolist() == [T * K // E] * E
    weight_Tk = router.gate(tokens()).gate_TE.gather(1, expected)
    if router.options.is_normalized:
        weight_Tk = weight_Tk / weight_Tk.sum(1, keepdim=True)
    torch.testing.assert_close(routing.weight_Tk, weight_Tk)


def half_precision_case():
    router = build_router(D, E, top_k=K, router="sigmoid", normalize=False)
    nn.init.normal_(router.gate.weight)
    return router.bfloat16(), tokens().bfloat16().requires_grad_()


def test_the_gate_is_fp32_under_bf16():
    router, x_TD = half_precision_case()
    routing = route(router, x_TD)
    assert routing.weight_Tk.dtype == torch.float32
    gate_TE = (x_TD.double() @ router.gate.weight.double().T).sigmoid()
    expected, ids = gate_TE.topk(K)
    assert torch.equal(routing.expert_id_Tk, ids)
    torch.testing.assert_close(routing.weight_Tk.double(), expected, rtol=1e-6, atol=0)


def test_the_gradients_of_a_bf16_gate_are_rounded_once():
    router, x_TD = half_precision_case()
    route(router, x_TD).weight_Tk.sum().backward()
    exact, y_TD = copy.deepcopy(router).double(), x_TD.detach().double().requires_grad_()
    exact.zero_grad()
    route(exact, y_TD).weight_Tk.sum().backward()
    assert x_TD.grad.dtype == router.gate.weight.grad.dtype == torch.bfloat16
    half_ulp = {"rtol": 2**-8, "atol": 1e-6}
    torch.testing.assert_close(x_TD.grad.double(), y_TD.grad, **half_ulp)
    torch.testing.assert_close(router.gate.weight.grad.double(), exact.gate.weight.grad, **half_ulp)


def test_backward_keeps_no_fp32_copy_of_the_tokens():
    router, x_TD = half_precision_case()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        route(router, x_TD)
    tokens_kept = [t for t in kept if t.shape == x_TD.shape]
    assert [t.data_ptr() for t in tokens_kept] == [x_TD.data_ptr()]


def test_a_frozen_gate_still_passes_gradients_to_the_tokens():
    router, x_TD = build(), tokens().requires_grad_()
    router.requires_grad_(False)
    route(router, x_TD).weight_Tk.square().sum().backward()
    assert router.gate.weight.grad is None
    assert x_TD.grad.abs().sum() > 0


class _SumWithOthers(torch.autograd.Function):
    """What the all-reduce of `num_ranks` ranks gives this one, the others' values being known."""

    @staticmethod
    def forward(ctx, value, others, num_ranks):
        ctx.num_ranks = num_ranks
        return value + others

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.num_ranks, None, None


def split_gradients(router, x_TD, num_ranks):
    """Losses of emulated ranks, and the sum of their gradients."""
    shards, local = x_TD.chunk(num_ranks), []
    for shard in shards:
        route(router, shard, sum_over_ranks=lambda v: local.append(v.detach()) or v)
    losses = []
    router.zero_grad()
    for rank, shard in enumerate(shards):
        others = sum(v for i, v in enumerate(local) if i != rank)

        def total(value, others=others):
            return _SumWithOthers.apply(value, others, num_ranks)

        loss = route(router, shard, sum_over_ranks=total).balance_loss
        (loss / num_ranks).backward()
        losses.append(loss.item())
    return losses, {name: p.grad.clone() for name, p in router.named_parameters()}


@pytest.fixture
def noise_by_token(monkeypatch):
    """Noise that depends on the token alone, as if every split of the tokens drew the same."""
    monkeypatch.setattr(torch, "randn_like", lambda value: (value.detach() * 1000).sin())


def whole_gradients(router, x_TD):
    router.zero_grad()
    loss = route(router, x_TD).balance_loss
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in router.named_parameters()}


@each_kind
def test_loss_and_gradient_do_not_depend_on_the_split_over_ranks(kind, noise_by_token):
    router = build(kind, coefs=all_coefs(kind))
    loss, gradients = whole_gradients(router, tokens())
    losses, summed = split_gradients(router, tokens(), 3)
    assert losses == pytest.approx([loss] * 3, rel=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(summed[name], gradient, rtol=1e-9, atol=1e-12)


def all_reduce(value):
    return torch.distributed.nn.functional.all_reduce(value)


def on_a_rank(world, kind, reduce):
    router = build(kind, coefs=all_coefs(kind))
    x_TD = tokens(IMAGE * 4).chunk(world.size)[world.rank]
    loss = route(router, x_TD, sum_over_ranks=reduce).balance_loss
    (loss / world.size).backward()
    for parameter in router.parameters():
        torch.distributed.all_reduce(parameter.grad)
    return loss.item(), {name: p.grad.tolist() for name, p in router.named_parameters()}


@pytest.mark.parametrize("kind", ["sigmoid", "noisy_topk"])
@pytest.mark.parametrize("reduce", [all_reduce, collectives.sum_over_ranks])
@pytest.mark.parametrize("num_ranks", [2, 4])
def test_loss_and_gradient_are_the_same_on_gloo_ranks(
    ranks, kind, reduce, num_ranks, noise_by_token
):
    loss, gradients = whole_gradients(build(kind, coefs=all_coefs(kind)), tokens(IMAGE * 4))
    for rank_loss, summed in ranks(num_ranks, on_a_rank, kind, reduce):
        assert rank_loss == pytest.approx(loss, rel=1e-12)
        for name, gradient in gradients.items():
            value = torch.tensor(summed[name], dtype=torch.float64)
            torch.testing.assert_close(value, gradient, rtol=1e-9, atol=1e-12)


def microbatch_gradients(router, microbatches):
    router.zero_grad()
    losses = []
    for x_TD in microbatches:
        loss = route(router, x_TD).balance_loss / len(microbatches)
        loss.backward()
        losses.append(loss.item())
    return sum(losses), {name: p.grad.clone() for name, p in router.named_parameters()}


@each_kind
def test_sequence_and_z_do_not_depend_on_the_split_into_microbatches(kind, noise_by_token):
    router = build(kind, coefs=dict(sequence=0.7, z=0.1))
    loss, gradients = whole_gradients(router, tokens())
    mean, summed = microbatch_gradients(router, tokens().chunk(3))
    assert mean == pytest.approx(loss, rel=1e-12)
    for name, gradient in gradients.items():
        torch.testing.assert_close(summed[name], gradient, rtol=1e-9, atol=1e-12)


@each_kind
def test_every_loss_is_the_same_over_microbatches_with_equal_sums(kind, noise_by_token):
    router = build(kind, coefs=all_coefs(kind))
    loss, gradients = whole_gradients(router, tokens().repeat(2, 1))
    mean, summed = microbatch_gradients(router, [tokens()] * 2)
    assert mean == pytest.approx(loss, rel=1e-9)
    for name, gradient in gradients.items():
        torch.testing.assert_close(summed[name], gradient, rtol=1e-9, atol=1e-12)


class Block(nn.Module):
    def __init__(self, kind):
        super().__init__()
        self.router = build_router(D, E, **({"top_k": K} | KINDS[kind]))


@pytest.mark.parametrize("weight_init", ["", "jax", "jax_nlhb", "moco"])
@each_kind
def test_meta_init_equals_eager_init_bit_for_bit(kind, weight_init):
    options = ViTOptions(weight_init=weight_init)
    eager = Block(kind)
    init.attach(eager, options, seed=7)
    with torch.device("meta"):
        block = Block(kind)
    init.attach(block, options, seed=7)
    for module in block.modules():
        if any(True for _ in module.parameters(recurse=False)):
            module.to_empty(device="cpu", recurse=False)
            module.reset_parameters()
    values = block.state_dict()
    for name, value in eager.state_dict().items():
        assert torch.equal(values[name], value), name


def test_initial_values():
    block = Block("noisy_topk")
    init.attach(block, ViTOptions(), seed=7)
    state = block.state_dict()
    assert state.keys() == {"router.gate.weight", "router.gate.noise.weight"}
    assert 0.01 < state["router.gate.weight"].std() < 0.03
    assert state["router.gate.noise.weight"].eq(0).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"router": "hash"}, "router=hash: must be one of softmax, sigmoid, noisy, noisy_topk"),
        ({"top_k": 9}, "top_k=9: must be at most num_experts=6"),
        ({"top_k": 0}, "top_k=0: must be at least 1"),
        ({"top_k": 1, "normalize": True}, "top_k=1: must be at least 2 with normalized weights"),
        ({"top_k": 1, "router": "noisy_topk"}, "top_k=1: must be at least 2 with normalized"),
        ({"router": "noisy_topk", "normalize": False}, "normalize=False: router=noisy_topk always"),
        ({"router": "noisy"}, "noise_std=0.0: router=noisy needs more than 0"),
        ({"noise_std": 1.0}, "noise_std=1.0: has no effect with router=softmax"),
        (
            {"router": "noisy_topk", "noise_std": 1.0},
            "noise_std=1.0: has no effect with router=noisy_topk",
        ),
        ({"jitter": 1.0}, "jitter=1.0: must be less than 1"),
        ({"jitter": -0.1}, "jitter=-0.1: must be at least 0"),
        ({"expert_drop": 1.0}, "expert_drop=1.0: must be less than 1"),
        ({"expert_drop": 0.1, "top_k": E}, r"expert_drop=0.1: every token goes to every expert"),
        (
            {"expert_drop": 0.1, "forced_balance": True},
            "expert_drop=0.1: must be 0 with forced_balance",
        ),
        ({"capacity_factor": 0.0}, "capacity_factor=0.0: must be at least 0.01"),
        ({"capacity_factor": 3.0}, "capacity_factor=3.0: must be less than 3"),
        ({"coefs": dict(z=-1.0)}, "z_coef=-1.0: must be at least 0"),
        ({"coefs": dict(load=0.1)}, "load_coef=0.1: router=softmax has no noise"),
        ({"top_k": 6, "coefs": dict(switch=0.1)}, "switch_coef=0.1: every token goes to"),
    ],
)
def test_what_cannot_work_is_refused(options, message):
    with pytest.raises(ValueError, match=f"^config model.moe.{message}"):
        build_router(D, E, **({"top_k": K} | options))


def test_one_expert_needs_no_choice():
    router = build_router(D, 1, top_k=1, coefs=dict(importance=1.0)).double()
    nn.init.normal_(router.gate.weight)
    routing = route(router, tokens())
    assert routing.weight_Tk.eq(1).all()
    assert routing.balance_loss.item() == 0


def test_a_closed_expert_is_chosen_only_where_fewer_than_k_are_open():
    router = build(expert_drop=0.7)
    x_TD = tokens(3000)
    open_ids = route(build(), x_TD).expert_id_Tk
    torch.manual_seed(0)
    routing = route(router, x_TD)
    ids = routing.expert_id_Tk
    assert (ids[:, 0] != ids[:, 1]).all()
    # The best expert stays if it is open (0.3), or if fewer than k of E are.
    few = sum(math.comb(E, n) * 0.3**n * 0.7 ** (E - n) for n in range(K))
    stays = (ids == open_ids[:, :1]).any(1).double().mean().item()
    assert 0.3 - 0.03 < stays < 0.3 + few + 0.03
    gate_TE = router.gate(x_TD).gate_TE
    torch.testing.assert_close(routing.weight_Tk, gate_TE.gather(1, ids), msg="weights stay")
    assert torch.equal(route(router.eval(), x_TD).expert_id_Tk, open_ids)


def test_no_tokens_route_nowhere():
    routing = route(build(capacity_factor=1.0), tokens(0))
    assert routing.expert_id_Tk.shape == routing.weight_Tk.shape == (0, K)
    assert routing.rows_per_expert_E.tolist() == [0] * E


def test_checkpointed_recomputation_routes_the_same():
    router = build("noisy_topk", coefs=all_coefs("noisy_topk"), jitter=0.1)

    def weights(x_TD):
        routing = router(x_TD, sum_over_ranks=alone, tokens_per_image=IMAGE)
        return routing.weight_Tk.square().sum() + routing.balance_loss

    gradients = []
    for run in (
        weights,
        lambda x: torch.utils.checkpoint.checkpoint(weights, x, use_reentrant=False),
    ):
        torch.manual_seed(5)
        x_TD = tokens().requires_grad_()
        run(x_TD).backward()
        gradients.append(x_TD.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("kind", ["sigmoid", "noisy_topk"])
def test_nothing_needs_a_value_on_the_host(kind):
    # On the meta device there are no values: reading one, or a shape that depends on one, raises.
    router = build(kind, coefs=all_coefs(kind), jitter=0.1, capacity_factor=0.9).to("meta")
    routing = route(router, tokens().to("meta").requires_grad_())
    (routing.weight_Tk.sum() + routing.balance_loss).backward()
    values = [getattr(routing, field.name) for field in dataclasses.fields(routing)]
    assert all(value.is_meta for value in values)


def test_compiled_as_one_graph_it_gives_the_same():
    router = build("noisy_topk", coefs=all_coefs("noisy_topk"), jitter=0.1, capacity_factor=0.9)
    gradients, x_TD = [], tokens().requires_grad_()
    for run in (router, torch.compile(router, backend="aot_eager", fullgraph=True)):
        routing = route(run, x_TD)
        (routing.weight_Tk.square().sum() + routing.balance_loss).backward()
        gradients.append(x_TD.grad)
        x_TD.grad = None
    assert torch.equal(*gradients)
