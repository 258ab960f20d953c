"""What a run begins with: functions kept, tables, files, meshes, refusals."""

import dataclasses
import json
import shutil

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import VisionTransformer as TimmVit

import moe
import train
from options import compose
from options.schema import InitOptions, ViTOptions
from routers.router import Router
from tests.support.networks import build_vit, moe_options
from tests.support.sharded import parts, worst_error
from training import loaders, network, prepare, pretrained
from weights import upcycling, warm_start
from weights.provenance import in_short
from weights.upcycling import Job, Target

DIM, HIDDEN, CLASSES = 24, 96, 7
SIZES = {"patch_size": 4, "embed_dim": DIM, "depth": 2, "num_heads": 3}
SMALL = {"img_size": 16, "num_classes": CLASSES, **SIZES}
KINDS = ("weight", "bias")
UPCYCLING, WARM_START = "deit_upcycling", "deit_warm_start"


def shaken(model):
    """Give every parameter a value that matters: biases are zero from scratch, norms one."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
    return model.eval()


@pytest.fixture(scope="module")
def dense():
    torch.manual_seed(0)
    return shaken(TimmVit(**SMALL))


@pytest.fixture
def image_BCHW():  # noqa: N802  # a shape suffix
    return torch.randn(5, 3, 16, 16, generator=torch.Generator().manual_seed(1))


def facts(num_experts, top_k, kind, normalize):
    std = {"noise_std": 1.0} if kind == "noisy" else {}
    return moe_options(num_experts, top_k=top_k, router=kind, normalize=normalize, **std)


def moe_vit(hidden, num_experts, top_k, kind="softmax", normalize=True, shared=None, **options):
    def ffn(block):
        if block == 0:
            return None
        std = 1.0 if kind == "noisy" else 0.0
        o = moe_options(
            num_experts,
            hidden_of=(hidden, DIM),
            top_k=top_k,
            router=kind,
            normalize=normalize,
            noise_std=std,
            shared_ratio=(shared + 0.5) / DIM if shared else 0.0,
        )
        return moe.MoE(
            DIM,
            o,
            router=Router(DIM, o),
            kernel_backend="torch",
            sum_over_ranks=lambda value: value,
        )

    return build_vit(**{**SMALL, **options}, ffn=ffn, seed=5).eval()


def begin(model, source, plan, experts=None, **more):
    """Give `model` its initial weights and return where they come from."""
    target = Target(
        shapes={name: p.shape for name, p in model.named_parameters()},
        vit=model.options,
        seed=5,
        experts=experts,
    )
    initial = warm_start.initial_weights(Job(source, target, plan, "it", **more))
    with torch.no_grad():
        for name, value in initial.values.items():
            assert value().shape == model.get_parameter(name).shape, name
            model.get_parameter(name).copy_(value())
    return initial


def upcycled(dense, hidden, num_experts, top_k, kind, normalize, **plan):
    model = moe_vit(hidden, num_experts, top_k, kind, normalize)
    experts = facts(num_experts, top_k, kind, normalize)
    initial = begin(model, dense.state_dict(), InitOptions(mode=UPCYCLING, **plan), experts)
    return model, initial


def error_of(model, dense, image_BCHW):
    with torch.no_grad():
        found, expected = model(image_BCHW), dense(image_BCHW)
    return ((found - expected).norm() / expected.norm()).item()


# --- the function ---


def test_a_dense_warm_start_has_timms_logits(dense, image_BCHW):
    model = build_vit(**SMALL, seed=5).eval()
    begin(model, dense.state_dict(), InitOptions(mode=WARM_START))
    assert error_of(model, dense, image_BCHW) <= 1e-5


@pytest.mark.parametrize(
    ("kind", "normalize", "top_k"),
    [("softmax", True, 2), ("sigmoid", None, 3), ("noisy", True, 2), ("noisy_topk", None, 2)],
)
@pytest.mark.parametrize("gate_std", [None, 1.0])
def test_copies_keep_the_function_at_any_gate_if_weights_sum_to_1(
    dense, image_BCHW, kind, normalize, top_k, gate_std
):
    model, initial = upcycled(dense, HIDDEN, 4, top_k, kind, normalize, gate_std=gate_std)
    assert error_of(model, dense, image_BCHW) <= 1e-5
    assert initial.effect == "the dense function exactly"


@pytest.mark.parametrize(
    ("num_shards", "num_experts", "top_k"),
    [(2, 4, 2), (2, 8, 4), (3, 6, 3), (4, 8, 4), (4, 16, 8), (6, 6, 6)],
)
@pytest.mark.parametrize("kind", ["softmax", "sigmoid"])
def test_parts_keep_the_function_in_virtual_groups(
    dense, image_BCHW, num_shards, num_experts, top_k, kind
):
    sizes = (HIDDEN // num_shards, num_experts, top_k)
    options = {"gate": "virtual_group", "gate_std": 0.5}
    model, initial = upcycled(dense, *sizes, kind, True, **options)
    assert error_of(model, dense, image_BCHW) <= 1e-5
    assert initial.effect == "the dense function exactly"


def test_parts_under_a_random_gate_are_said_to_be_approximate(dense, image_BCHW):
    model, initial = upcycled(dense, HIDDEN // 4, 8, 4, "softmax", True)
    assert error_of(model, dense, image_BCHW) > 1e-3
    assert initial.effect.startswith("the dense function approximately: a token's experts")


@pytest.mark.parametrize(
    ("kind", "num_shards", "gate"),
    [
        ("softmax", 1, "random"),
        ("softmax", 4, "virtual_group"),
        ("noisy", 2, "virtual_group"),
        ("sigmoid", 2, "virtual_group"),
    ],
)
def test_weights_that_do_not_sum_to_1_are_made_up_for_near_logits_of_zero(
    dense, image_BCHW, kind, num_shards, gate
):
    sizes = (HIDDEN // num_shards, 8, 4)
    errors = {}
    for gate_std in (0.5, 1e-6):
        plan = {"gate": gate, "gate_std": gate_std}
        model, initial = upcycled(dense, *sizes, kind, False, **plan)
        errors[gate_std] = error_of(model, dense, image_BCHW)
    assert errors[1e-6] <= 1e-5
    assert errors[0.5] > 1e-2
    assert "only at logits of zero" in initial.effect


@pytest.mark.parametrize(("num_shards", "gate"), [(1, "random"), (2, "virtual_group")])
def test_a_softmax_over_all_chosen_experts_keeps_the_function(dense, image_BCHW, num_shards, gate):
    plan = {"gate": gate, "gate_std": 0.5}
    model, initial = upcycled(dense, HIDDEN // num_shards, 4, 4, "softmax", False, **plan)
    assert error_of(model, dense, image_BCHW) <= 1e-5
    assert initial.effect == "the dense function exactly"


def test_a_shared_expert_adds_nothing_at_first(dense, image_BCHW):

    model = moe_vit(HIDDEN, 4, 2, shared=48)
    begin(model, dense.state_dict(), InitOptions(mode=UPCYCLING), facts(4, 2, "softmax", True))
    assert error_of(model, dense, image_BCHW) <= 1e-5


def test_noise_among_parts_is_a_caveat(dense):
    _, initial = upcycled(dense, HIDDEN // 2, 4, 2, "noisy", True, gate="virtual_group")
    assert initial.effect.endswith("except for routing noise and dropped rows in training")


@pytest.mark.parametrize("changed", [{"capacity_factor": 1.0}, {"expert_drop": 0.1}])
def test_for_copies_only_a_capacity_is_a_caveat(dense, changed):
    experts = dataclasses.replace(facts(4, 2, "softmax", True), **changed)
    initial = begin(moe_vit(HIDDEN, 4, 2), dense.state_dict(), InitOptions(mode=UPCYCLING), experts)
    assert ("except for routing noise" in initial.effect) == ("capacity_factor" in changed)


def test_gates_of_virtual_groups_differ_between_blocks_and_seeds(dense):
    recipe = upcycling.Recipe("split", 2)
    plan = InitOptions(mode=UPCYCLING, gate="virtual_group")
    gates = []
    for block, seed in ((0, 0), (1, 0), (0, 1), (0, 0)):
        name = f"blocks.{block}.mlp.router.gate.weight"
        target = Target(
            shapes={name: torch.Size((4, DIM))},
            vit=ViTOptions(img_size=4, patch_size=4),
            seed=seed,
            experts=facts(4, 2, "softmax", True),
        )
        job = Job(dense.state_dict(), target, plan, "it")
        gates.append(upcycling.made_entry(job, name, recipe).value())
    assert torch.equal(gates[0], gates[3])
    assert not torch.equal(gates[0], gates[1])
    assert not torch.equal(gates[0], gates[2])
    assert torch.equal(gates[0][0], gates[0][1])
    assert not torch.equal(gates[0][1], gates[0][2])


def test_every_part_is_used_equally_often():
    dense_DH = torch.arange(12.0).repeat(3, 1)
    w_out = upcycling.expert_tensor(
        "w_out", dense_DH, num_shards=4, num_experts=8, weight_sum=0.5
    ).unflatten(0, (8, 3))
    expected_84F = (dense_DH[0].view(4, 3) * 8).repeat(2, 1)
    assert torch.equal(w_out, expected_84F[:, None, :].expand(8, 3, 3))


# --- other images, other classes, other tokens ---


def test_another_image_size_resamples_the_positions_as_timm_does(dense):
    model = build_vit(**{**SMALL, "img_size": (24, 16)}, seed=5)
    initial = begin(model, dense.state_dict(), InitOptions(mode=WARM_START))
    expected = resample_abs_pos_embed(dense.pos_embed, new_size=[6, 4], num_prefix_tokens=1)
    assert torch.equal(model.pos_embed, expected)
    assert torch.equal(model.pos_embed[:, 0], dense.pos_embed[:, 0])
    assert initial.by_origin()["resampled"] == ["pos_embed"]


def test_fixed_positions_of_a_checkpoint_are_kept_and_stay_fixed(dense):
    model = build_vit(**SMALL, pos_embed="sincos", seed=5)
    assert not torch.equal(model.pos_embed, dense.pos_embed)
    begin(model, dense.state_dict(), InitOptions(mode=WARM_START))
    assert torch.equal(model.pos_embed, dense.pos_embed)
    assert not model.pos_embed.requires_grad


def test_positions_of_a_known_grid_are_resampled_even_if_their_number_agrees(dense):
    model = build_vit(**{**SMALL, "img_size": (8, 32)}, seed=5)
    begin(model, dense.state_dict(), InitOptions(mode=WARM_START))
    assert not torch.equal(model.pos_embed, dense.pos_embed)
    begin(model, dense.state_dict(), InitOptions(mode=WARM_START), source_grid_hw=(2, 8))
    assert torch.equal(model.pos_embed, dense.pos_embed)


def test_other_classes_get_a_head_from_scratch(dense, image_BCHW):
    model = build_vit(**{**SMALL, "num_classes": 3}, seed=5).eval()
    before = model.head.weight.clone()
    initial = begin(model, dense.state_dict(), InitOptions(mode=WARM_START))
    assert initial.by_origin()["from scratch"] == ["head.weight", "head.bias"]
    assert initial.left_out == ["head.weight", "head.bias"]
    assert torch.equal(model.head.weight, before)
    with torch.no_grad():
        found = model.pool(model.forward_features(image_BCHW))
        expected = dense.forward_head(dense.forward_features(image_BCHW), pre_logits=True)
    assert (found - expected).norm() <= 1e-5 * expected.norm()


SECOND = {"dist_token", "head_dist.weight", "head_dist.bias"}


@pytest.fixture
def distilled():
    torch.manual_seed(0)
    return shaken(VisionTransformerDistilled(**SMALL))


def test_a_distilled_checkpoint_loses_its_second_token_in_a_model_without(tmp_path, distilled):
    source = distilled.state_dict()
    path = tmp_path / "distilled.pth"
    torch.save({"model": source}, path)
    found = warm_start.without_distillation(pretrained.read(str(path)).weights)
    assert found.keys() == source.keys() - SECOND
    assert torch.equal(found["head.weight"], source["head.weight"])
    assert torch.equal(found["pos_embed"][:, 0], source["pos_embed"][:, 0])
    assert torch.equal(found["pos_embed"][:, 1:], source["pos_embed"][:, 2:])
    begin(build_vit(**SMALL, seed=5), found, InitOptions(mode=WARM_START))


def test_a_distilled_model_has_timms_logits(tmp_path, distilled, image_BCHW):
    path = tmp_path / "distilled.pth"
    torch.save({"model": distilled.state_dict()}, path)
    model = build_vit(**SMALL, distilled=True, seed=5).eval()
    initial = begin(model, pretrained.read(str(path)).weights, InitOptions(mode=WARM_START))
    assert list(initial.by_origin()) == ["loaded"]
    assert error_of(model, distilled, image_BCHW) <= 1e-5
    fewer = build_vit(**{**SMALL, "num_classes": 3}, distilled=True, seed=5)
    initial = begin(fewer, distilled.state_dict(), InitOptions(mode=WARM_START))
    heads = [f"{head}.{kind}" for head in ("head", "head_dist") for kind in KINDS]
    assert initial.by_origin()["from scratch"] == heads


def test_an_encoder_of_m3vit_loses_it_too_and_lacks_a_top(tmp_path, distilled):
    source = distilled.state_dict()
    inner = {name: t for name, t in source.items() if not name.startswith(("head", "norm."))}
    path = tmp_path / "checkpoint.pth"
    torch.save({"model": {f"encoder.{name}": t for name, t in inner.items()}, "epoch": 3}, path)
    found = warm_start.without_distillation(pretrained.read(str(path)).weights)
    assert torch.equal(found["pos_embed"][:, 1:], source["pos_embed"][:, 2:])
    initial = begin(build_vit(**SMALL, seed=5), found, InitOptions(mode=WARM_START))
    assert initial.by_origin()["from scratch"] == TOP


# --- the table ---

ALWAYS = ["cls_token", "pos_embed", "patch_embed.proj.weight", "patch_embed.proj.bias"]
ATTENTION = [
    f"blocks.{{0,1}}.{layer}.{kind}"
    for layer in ("norm1", "attn.qkv", "attn.proj", "norm2")
    for kind in KINDS
]
MLP = [f"blocks.{{0}}.mlp.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in KINDS]
TOP = ["norm.weight", "norm.bias", "head.weight", "head.bias"]
EXPERTS = [f"blocks.{{1}}.mlp.experts.{part}" for part in ("w_in", "b_in", "w_out", "b_out")]
GATE = ["blocks.{1}.mlp.router.gate.weight"]


@pytest.mark.parametrize(
    ("plan", "hidden", "expected"),
    [
        (InitOptions(mode="scratch"), HIDDEN, {"from scratch": ["*", *EXPERTS, *GATE]}),
        (InitOptions(mode=WARM_START), 30, {"loaded": ["*"], "from scratch": [*EXPERTS, *GATE]}),
        (
            InitOptions(mode=WARM_START, experts="copy"),
            HIDDEN,
            {"loaded": ["*"], "copied": EXPERTS, "from scratch": GATE},
        ),
        (
            InitOptions(mode=WARM_START, experts="split", gate_std=0.1),
            HIDDEN // 2,
            {"loaded": ["*"], "split": EXPERTS, "drawn": GATE},
        ),
        (
            InitOptions(mode=UPCYCLING),
            HIDDEN,
            {"loaded": ["*"], "copied": EXPERTS, "from scratch": GATE},
        ),
        (
            InitOptions(mode=UPCYCLING, gate="virtual_group"),
            HIDDEN // 2,
            {"loaded": ["*"], "split": EXPERTS, "tied": GATE},
        ),
    ],
    ids=str,
)
def test_the_table_has_the_origin_of_every_parameter(dense, plan, hidden, expected):
    model = moe_vit(hidden, 4, 2)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    source = {} if plan.mode == "scratch" else dense.state_dict()
    initial = begin(model, source, plan, facts(4, 2, "softmax", True))
    found = {origin: set(names) for origin, names in initial.by_origin().items()}
    everything = [*ALWAYS, *ATTENTION, *MLP, *TOP]
    stars = {origin: everything if "*" in names else [] for origin, names in expected.items()}
    assert found == {o: {*names, *stars[o]} - {"*"} for o, names in expected.items()}
    # and the table says what happened:
    for entry in initial.entries:
        value = model.get_parameter(entry.name)
        assert torch.equal(value, before[entry.name]) == (entry.origin == "from scratch")
        if entry.origin == "loaded":
            assert torch.equal(value, source[entry.name])
    lines = "\n".join(initial.lines())
    assert all(name in lines for name in before)
    replaced = {f"blocks.1.mlp.{x}.{y}" for x in ("fc1", "fc2") for y in KINDS}
    is_unused = plan.mode == WARM_START and plan.experts is None
    assert set(initial.left_out) == (replaced if is_unused else set())


def test_experts_of_the_checkpoint_are_loaded_as_they_are(dense):
    model, _ = upcycled(dense, HIDDEN, 4, 2, "softmax", True)
    twin = moe_vit(HIDDEN, 4, 2)
    experts = facts(4, 2, "softmax", True)
    initial = begin(twin, model.state_dict(), InitOptions(mode=WARM_START), experts)
    assert list(initial.by_origin()) == ["loaded"]
    with pytest.raises(ValueError, match=r"blocks\.1\.mlp\.experts are there already"):
        begin(twin, model.state_dict(), InitOptions(mode=UPCYCLING), experts)
    with pytest.raises(ValueError, match="there already"):
        begin(twin, model.state_dict(), InitOptions(mode=WARM_START, experts="copy"), experts)


def test_names_in_short():
    names = ["a", "blocks.1.mlp.x", "blocks.1.y", "blocks.3.mlp.x"]
    assert in_short(names) == ["a", "blocks.{1,3}.mlp.x", "blocks.{1}.y"]
    assert in_short([f"blocks.{number}.x" for number in range(9, 12)]) == ["blocks.{9..11}.x"]


@pytest.mark.parametrize(
    ("mode", "source", "has_experts", "expected"),
    [
        ("auto", None, True, "scratch"),
        ("auto", {"blocks.1.mlp.fc1.weight": 0}, True, UPCYCLING),
        ("auto", {"blocks.1.mlp.fc1.weight": 0}, False, WARM_START),
        ("auto", {"blocks.1.mlp.experts.w_in": 0}, True, WARM_START),
        (WARM_START, {"blocks.1.mlp.fc1.weight": 0}, True, WARM_START),
    ],
)
def test_what_auto_means(mode, source, has_experts, expected):
    assert warm_start.resolve_mode(mode, source=source, has_experts=has_experts) == expected


# --- refusals ---


@pytest.mark.parametrize(
    ("hidden", "num_experts", "plan", "message"),
    [
        (48, 4, {"experts": "copy"}, "init.experts=copy: an expert is 48 wide, the dense MLP 96"),
        (36, 4, {}, "an expert is 36 wide, the dense MLP 96: must divide it"),
        (192, 4, {"experts": "split"}, "an expert is 192 wide, the dense MLP 96"),
        (24, 6, {}, "num_experts=6: must be a multiple of 4"),
        (96, 4, {"gate": "virtual_group"}, "has no effect on copies"),
        (24, 4, {"gate": "virtual_group"}, "needs model.moe.top_k=2 to be a multiple of 4"),
    ],
)
def test_experts_that_cannot_be_made_are_refused(dense, hidden, num_experts, plan, message):
    with pytest.raises(ValueError, match=message):
        upcycled(dense, hidden, num_experts, 2, "softmax", True, **plan)


def test_experts_of_another_activation_are_refused(dense):
    experts = dataclasses.replace(facts(4, 2, "softmax", True), activation="relu")
    with pytest.raises(ValueError, match=r"moe\.activation=relu: must be gelu"):
        begin(moe_vit(HIDDEN, 4, 2), dense.state_dict(), InitOptions(mode=UPCYCLING), experts)


def test_what_does_not_fit_is_named(dense):
    source = dense.state_dict()
    model = build_vit(**SMALL, seed=5)
    lacking = {name: tensor for name, tensor in source.items() if name != "cls_token"}
    with pytest.raises(ValueError, match=r"^it: does not fit the model: it lacks cls_token$"):
        begin(model, lacking, InitOptions(mode=WARM_START))
    more = {**source, "blocks.2.norm1.weight": torch.zeros(DIM)}
    with pytest.raises(ValueError, match=r"the model lacks blocks\.\{2\}\.norm1\.weight$"):
        begin(model, more, InitOptions(mode=WARM_START))
    other = {**source, "norm.weight": torch.zeros(DIM + 1)}
    with pytest.raises(ValueError, match=r"norm\.weight is \(25,\), not \(24,\)"):
        begin(model, other, InitOptions(mode=WARM_START))
    odd = {**source, "pos_embed": torch.zeros(1, 12, DIM)}
    with pytest.raises(ValueError, match=r"pos_embed \(1, 12, 24\): must have 1 positions"):
        begin(model, odd, InitOptions(mode=WARM_START))


def test_a_gate_option_without_made_experts_is_refused(dense):
    model, experts = moe_vit(HIDDEN, 4, 2), facts(4, 2, "softmax", True)
    with pytest.raises(ValueError, match=r"init\.gate_std=0\.1: no experts are made"):
        begin(model, dense.state_dict(), InitOptions(mode=WARM_START, gate_std=0.1), experts)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["init.mode=scratch", "init.checkpoint=x"], "init.checkpoint=x: has no effect"),
        (["init.mode=deit_warm_start"], "init.mode=deit_warm_start: needs init.checkpoint"),
        (["init.weights=ema"], "init.weights=ema: has no effect with init.mode=auto and no"),
        (["init.experts=copy"], "init.experts=copy: has no effect with init.mode=auto"),
        (["init.checkpoint=x", "init.gate_std=1"], "has no effect with model.moe.num_experts=0"),
        (["init.checkpoint=x", "init.mode=deit_upcycling"], "needs model.moe.num_experts > 0"),
        (["init.mode=deit"], "must be one of auto, scratch"),
    ],
)
def test_options_without_effect_are_refused(overrides, message):
    with pytest.raises(ValueError, match=message):
        compose.compose("vit_tiny_patch8_64", overrides)


# --- files and timm ---


def test_what_is_no_file_and_no_model_is_refused_in_one_line():
    with pytest.raises(FileNotFoundError, match="no such file or folder, and no model of timm"):
        pretrained.read("nowhere/x.pth")


def test_a_model_of_timm_is_loaded_by_name(monkeypatch, dense):
    asked = []

    def create_model(name, *, pretrained):
        asked.append((name, pretrained))
        return dense

    monkeypatch.setattr(timm, "create_model", create_model)
    monkeypatch.setattr(dense, "pretrained_cfg", {"crop_pct": 0.9}, raising=False)
    found = pretrained.read("deit_tiny_patch16_224")
    assert found.preprocessing == {"crop_pct": 0.9}
    assert asked == [("deit_tiny_patch16_224", True)]
    assert (found.num_heads, found.grid_hw) == (3, (4, 4))
    assert found.weights.keys() == dense.state_dict().keys()


def test_a_model_of_timm_without_a_network_is_one_line(monkeypatch):
    def create_model(name, *, pretrained):
        raise OSError("no route\nto the hub")

    monkeypatch.setattr(timm, "create_model", create_model)
    with pytest.raises(ValueError, match=r"cannot load weights of that name: no route$"):
        pretrained.read("deit_tiny_patch16_224")


# --- runs ---

IMAGES = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(2))
RUN = [
    "model.moe.num_experts=4",
    "model.moe.normalize=true",
    "model.moe.mlp_ratio=2",
    "init.gate=virtual_group",
    "training.ema_decay=0.5",
    "training.steps=2",
    "training.val_interval=2",
    "optimizer.eps=1e-5",
]


@pytest.fixture
def dense_file(tmp_path):
    path = tmp_path / "dense.pth"
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 36, "depth": 2, "num_heads": 3}
    torch.save(shaken(TimmVit(**sizes, num_classes=5)).state_dict(), path)
    return path


def begin_and_train(world, config):
    run, _ = prepare.prepare(config, world)
    pretrained.begin(run)
    begun = parts(run.shards)
    begun_average = list(zip(run.shards, run.ema.average, strict=True))
    begun_average = [(s.name, s.full_slice(), value.clone()) for s, value in begun_average]
    run.model.eval()
    with torch.no_grad():
        logits_BY = run.model(IMAGES).clone()
    run.model.train()
    batches = loaders.train_batches(run, start_step=0)
    meter = train.Meter.start(world.device)
    for step in range(2):
        train.train_step(run, batches, step=step, meter=meter)
    return begun, begun_average, parts(run.shards), logits_BY


@pytest.mark.parametrize("strategy", [0, 3])
def test_a_run_from_a_file_on_two_ranks_of_experts_is_the_one_on_one_rank(
    ranks, small_run, dense_file, strategy
):
    options = [*RUN, f"init.checkpoint={dense_file}", f"fsdp.zero_dp_strategy={strategy}"]
    alone = small_run(*options, "dataset.train.batch_size=8")
    ((*one, logits_BY),) = ranks(1, begin_and_train, alone)
    expected = [{name: value for name, _, value in tensors} for tensors in one]
    assert torch.equal(expected[0]["cls_token"], torch.load(dense_file)["cls_token"])
    shared = small_run(*options, "dataset.train.batch_size=4", "distributed.ep=2")
    both = ranks(2, begin_and_train, shared)
    assert worst_error([result[0] for result in both], expected[0]) == 0, "weights"
    assert worst_error([result[1] for result in both], expected[0]) == 0, "their average"
    assert worst_error([result[2] for result in both], expected[2]) <= 1e-5, "two steps later"
    whole = network.build_model(alone, backend="torch", on_meta=False).eval()
    whole.load_state_dict(expected[0])
    with torch.no_grad():
        expected_BY = whole(IMAGES)
    for found_BY in (logits_BY, *(result[3] for result in both)):
        assert (found_BY - expected_BY).norm() <= 1e-5 * expected_BY.norm(), "the forward"


def events(folder, name):
    lines = (folder / "log.jsonl").read_text().splitlines()
    return [line for line in map(json.loads, lines) if line["event"] == name]


def train_it(world, config):
    train.train(config, world)


def test_a_run_from_scratch_says_so(ranks, small_run, tmp_path):
    ranks(1, train_it, small_run("training.steps=1"))
    (event,) = events(tmp_path / "run", "run")
    assert event["init"] == "scratch"
    assert events(tmp_path / "run", "init") == []
    lines = (tmp_path / "run" / "init.txt").read_text().splitlines()
    assert lines[0] == "mode: scratch"
    assert all("from scratch" in line for line in lines[3:-1])


def test_a_run_logs_what_it_began_with_and_a_resumed_one_that_it_does_not(
    ranks, small_run, tmp_path, dense_file
):
    options = [*RUN, f"init.checkpoint={dense_file}"]
    folder = tmp_path / "run"
    ranks(1, train_it, small_run(*options))
    (event,) = events(folder, "init")
    assert (event["mode"], event["asked"]) == (UPCYCLING, "auto")
    assert event["experts"] == "the dense function exactly"
    listed = {e["origin"]: e["names"] for e in events(folder, "init_tensors")}
    assert listed["split"] == EXPERTS
    # This recipe pools before its last norm, and the images have three classes.
    assert listed["from scratch"] == [f"{x}.{y}" for x in ("fc_norm", "head") for y in KINDS]
    (unused,) = events(folder, "init_not_used")
    assert unused["names"] == [f"{x}.{y}" for x in ("norm", "head") for y in KINDS]
    table = (folder / "init.txt").read_text()
    assert f"checkpoint: {dense_file}\n" in table
    assert "blocks.1.mlp.experts.w_out" in table
    dense_file.unlink()
    ranks(1, train_it, small_run(*options, "training.steps=3"))
    assert [e["init"] for e in events(folder, "run")] == [UPCYCLING, "resumed"]
    assert events(folder, "init")[1:] == [
        {**events(folder, "init")[1], "ignored": str(dense_file), "why": "the run is resumed"}
    ]


def test_a_run_begins_from_another_runs_folder_and_compares_heads(ranks, small_run, tmp_path):
    first = [*RUN[1:3], "model.moe.num_experts=4", "training.steps=1"]
    ranks(1, train_it, small_run(*first))
    second = [*first, f"init.checkpoint={tmp_path / 'run'}"]
    other = f"training.checkpoint.path={tmp_path / 'other'}"
    ranks(1, train_it, small_run(*second, other))
    (event,) = events(tmp_path / "other", "init")
    assert (event["mode"], event["num_heads"]) == (WARM_START, 3)
    assert [e["origin"] for e in events(tmp_path / "other", "init_tensors")] == ["loaded"]
    with pytest.raises(pytest.fail.Exception, match="num_heads=4: must be 3, as in"):
        ranks(1, train_it, small_run(*second, f"{other}2", "model.vit.num_heads=4"))


def test_a_run_says_that_the_head_it_begins_with_has_classes_of_other_ids(
    ranks, small_run, tmp_path, image_folder
):
    ranks(1, train_it, small_run("training.steps=1"))
    other = tmp_path / "renamed"
    shutil.copytree(image_folder, other, ignore=shutil.ignore_patterns(".moevit-index*"))
    for split in ("train", "val"):
        (other / split / "n00000002").rename(other / split / "n00000009")
    again = ["training.steps=1", f"init.checkpoint={tmp_path / 'run'}"]
    for root, notes in ((image_folder, 0), (other, 1)):
        folder = tmp_path / f"second{notes}"
        path = f"training.checkpoint.path={folder}"
        ranks(1, train_it, small_run(*again, path, f"dataset.train.root={root}"))
        said = [event["note"] for event in events(folder, "init_classes")]
        says = "1 of 3 classes were others in training: class 2 was n00000002, is n00000009"
        assert said == [says] * notes


def begin_and_tell(world, config):
    run, _ = prepare.prepare(config, world)
    return pretrained.begin(run).initial.left_out


def test_a_run_tells_what_it_left_out_of_a_distilled_checkpoint(ranks, small_run, tmp_path):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 36, "depth": 2, "num_heads": 3}
    model = VisionTransformerDistilled(**sizes, num_classes=3)
    torch.save(model.state_dict(), tmp_path / "distilled.pth")
    config = small_run(f"init.checkpoint={tmp_path / 'distilled.pth'}")
    (left_out,) = ranks(1, begin_and_tell, config)
    assert SECOND <= set(left_out)


def begin_and_fail(world, config):
    run, _ = prepare.prepare(config, world)
    try:
        pretrained.begin(run)
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    return ""


def test_a_missing_file_is_the_same_line_on_every_rank(ranks, small_run):
    lines = ranks(2, begin_and_fail, small_run("init.checkpoint=nowhere.pth"))
    assert lines == [lines[0]] * 2
    assert lines[0].startswith("config init.checkpoint=nowhere.pth: no such file or folder")


def test_a_damaged_mlp_is_refused_by_the_shape_of_what_is_made_of_it(ranks, small_run, dense_file):
    weights = torch.load(dense_file)
    weights["blocks.1.mlp.fc2.bias"] = torch.zeros(37)
    torch.save(weights, dense_file)
    (line,) = ranks(1, begin_and_fail, small_run(*RUN, f"init.checkpoint={dense_file}"))
    assert line.endswith("blocks.1.mlp.experts.b_out would be (4, 37), must be (4, 36)")
