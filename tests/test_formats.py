"""State dicts in other projects' dialects: nothing lost, nothing renamed wrongly, nothing run."""

import json
import math
import os
import warnings

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.support.models import (
    DEPTH,
    DIM,
    EVERYTHING,
    EXPERTS,
    HEADS,
    HIDDEN,
    TOP_K,
    Hostile,
    as_mtl,
    assert_equal,
    model_of,
    rank_files,
)
from weights import files as weight_files
from weights import formats
from weights.formats import MtlFile


@pytest.fixture(scope="module")
def moe():
    return model_of()


@pytest.mark.parametrize("overrides", [[], ["model.vit.global_pool=map", *EVERYTHING]], ids=len)
def test_dense_weights_pass_through_timm_names_unchanged(overrides):
    weights = model_of(*overrides, recipe="vit_tiny_patch8_64")[0].state_dict()
    assert_equal(formats.from_timm(formats.to_timm(weights)), weights)
    ddp = {f"module.{name}": tensor for name, tensor in weights.items()}
    assert_equal(formats.from_timm(ddp), weights)


def test_timm_gets_no_experts(moe):
    message = r"blocks\.1\.mlp\.experts\.b_in, .* and 4 more: timm's ViT has no such"
    with pytest.raises(ValueError, match=message):
        formats.to_timm(moe[0].state_dict())


def test_a_parameter_that_our_vit_lacks_is_refused_by_name():
    with pytest.raises(ValueError, match=r"weights head_drop\.bias: our ViT has no such"):
        formats.from_timm({"cls_token": torch.zeros(1), "head_drop.bias": torch.zeros(1)})


@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.moe.router=noisy_topk"],
        ["model.moe.router=noisy", "model.moe.noise_std=1"],
        ["model.vit.global_pool=token", "model.vit.qkv_bias=false"],
        ["model.vit.global_pool=map"],
    ],
    ids=str,
)
def test_what_goes_to_mtl_comes_back_bit_for_bit(overrides):
    model, options = model_of(*overrides)
    assert_equal(formats.from_mtl(as_mtl(model, options)), model.state_dict())


def test_a_dense_model_goes_to_mtl_and_back():
    model, options = model_of(recipe="vit_tiny_patch8_64")
    file = as_mtl(model, options)
    assert file.meta["moe_experts_global"] == 0
    assert_equal(formats.from_mtl(file), model.state_dict())


def test_mtl_has_the_names_shapes_and_facts_of_the_contract(moe):
    file = as_mtl(*moe)
    shapes = {name: tuple(tensor.shape) for name, tensor in file.weights.items()}
    assert shapes == {name: tuple(t.shape) for name, t in m3vit(tasks=0, world=1).items()}
    own = file.meta["moevit"]
    assert set(own["dropped"]) == {"fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"}
    assert json.loads(own["config"])["model"]["vit"]["num_heads"] == HEADS
    five = {
        "expert_format": "global",
        "moe_experts_global": EXPERTS,
        "moe_experts_local": EXPERTS,
        "world_size": 1,
        "source": "pretrain",
    }
    assert {name: file.meta[name] for name in five} == five
    assert all(type(file.meta[name]) is type(value) for name, value in five.items())
    assert (file.meta["num_heads"], file.meta["moe_top_k"]) == (HEADS, TOP_K)
    assert "args" not in file.meta
    assert all(t.is_contiguous() and t.dtype == torch.float32 for t in file.weights.values())


REFUSED = {
    "blocks.1.mlp.shared.fc1.bias": ["model.moe.shared_ratio=1"],
    r"model.moe.activation=swiglu: M3ViT can only do gelu": ["model.moe.activation=swiglu"],
    "model.moe.activation=relu": ["model.moe.activation=relu"],
    "model.moe.router=sigmoid": ["model.moe.router=sigmoid"],
    "model.moe.normalize=True": ["model.moe.normalize=true"],
    r"experts in blocks \[3\]: M3ViT has them in \[1, 3\]": [
        "model.moe.every_n=null",
        "model.moe.blocks=[3]",
    ],
    "blocks.0.ls1.gamma": ["model.vit.init_values=0.1"],
    "blocks.0.attn.q_norm.weight": ["model.vit.qk_norm=true"],
    "reg_token": ["model.vit.reg_tokens=1"],
    "model.vit.no_embed_class=True": ["model.vit.no_embed_class=true"],
    "pos_embed: M3ViT's encoder cannot be without": ["model.vit.pos_embed=none"],
    "cls_token: M3ViT's encoder cannot be without": ["model.vit.class_token=false"],
    "blocks.0.attn.proj.bias": ["model.vit.proj_bias=false"],
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_m3vit_cannot_be_is_refused_by_name(message):
    with pytest.raises(ValueError, match=message):
        as_mtl(*model_of(*REFUSED[message]))


def m3vit(*, tasks, world, task_dim=0):
    """Names and shapes of M3ViT's encoder on one of `world` ranks.

    It has a gate for each of `tasks`, or one for all with 0, which then may see which task it is
    by `task_dim` more values per token.
    """
    local = EXPERTS // world
    shapes = {
        "cls_token": (1, 1, DIM),
        "pos_embed": (1, 17, DIM),
        "patch_embed.proj.weight": (DIM, 3, 8, 8),
        "patch_embed.proj.bias": (DIM,),
    }
    for i in range(DEPTH):
        block = {
            "norm1.weight": (DIM,),
            "norm1.bias": (DIM,),
            "attn.qkv.weight": (3 * DIM, DIM),
            "attn.qkv.bias": (3 * DIM,),
            "attn.proj.weight": (DIM, DIM),
            "attn.proj.bias": (DIM,),
            "norm2.weight": (DIM,),
            "norm2.bias": (DIM,),
        }
        if i % 2 == 0:
            block |= {
                "mlp.fc1.weight": (4 * DIM, DIM),
                "mlp.fc1.bias": (4 * DIM,),
                "mlp.fc2.weight": (DIM, 4 * DIM),
                "mlp.fc2.bias": (DIM,),
            }
        else:
            block |= {
                "mlp.experts.htoh4.weight": (local, HIDDEN, DIM),
                "mlp.experts.htoh4.bias": (local, HIDDEN),
                "mlp.experts.h4toh.weight": (local, DIM, HIDDEN),
                "mlp.experts.h4toh.bias": (local, DIM),
            }
            names = [f"gate.{task}.w_gate" for task in range(tasks)] or ["gate.w_gate"]
            block |= {f"mlp.{name}": (DIM + task_dim, EXPERTS) for name in names}
        shapes |= {f"blocks.{i}.{name}": shape for name, shape in block.items()}
    return {name: torch.full(shape, math.nan) for name, shape in shapes.items()}


def m3vit_load(content, *, rank, world, tasks, task_dim, side):
    """What M3ViT's multi-task training does with its --pretrained file, written from its rules.

    Returns the parameters of one rank, NaN where nothing was loaded, and the keys of no use to it.
    """
    state = content["state_dict"] if "state_dict" in content else content["model"]
    state = {name.removeprefix("encoder."): tensor for name, tensor in state.items()}
    target = m3vit(tasks=tasks, world=world, task_dim=task_dim)
    sizes = {len(tensor) for name, tensor in state.items() if "mlp.experts.h" in name}
    if world > 1 and sizes:
        assert content["meta"]["expert_format"] == "global"
        assert sizes == {EXPERTS // world * world} == {content["meta"]["moe_experts_global"]}
    for name in [name for name in state if name.endswith("w_gate") and task_dim]:
        state[name] = torch.cat([state[name], torch.zeros(task_dim, EXPERTS)])
    if tasks:
        copies = {4: (0, 1, 2, 3), 5: (0, 1, 2, 3, 4)}.get(tasks, (0, 1))
        for name in [name for name in state if name.endswith("mlp.gate.w_gate")]:
            for copy in copies:
                state[name.replace("gate.w_gate", f"gate.{copy}.w_gate")] = state[name]
            del state[name]
    pos_1LD = state["pos_embed"]
    old = math.isqrt(pos_1LD.shape[1])
    grid_1DHW = pos_1LD[:, -old * old :].unflatten(1, (old, old)).permute(0, 3, 1, 2)
    grid_1DHW = F.interpolate(grid_1DHW, size=(side, side), mode="bilinear", align_corners=False)
    patches_1LD = grid_1DHW.flatten(2).transpose(1, 2)
    state["pos_embed"] = torch.cat([pos_1LD[:, :1], patches_1LD], 1)
    local = EXPERTS // world
    for name in [name for name in state if "mlp.experts.h" in name]:
        state[name] = state[name][rank * local : (rank + 1) * local]
    useless = sorted(state.keys() - target.keys())
    for name in target.keys() & state.keys():
        assert target[name].shape == state[name].shape, name
        target[name] = state[name]
    return target, useless


@pytest.mark.parametrize(("tasks", "task_dim"), [(0, 0), (0, 2), (2, 0), (3, 0), (4, 0), (5, 0)])
@pytest.mark.parametrize("world", [1, 4])
def test_m3vits_loader_takes_every_tensor_of_the_file(moe, tmp_path, tasks, task_dim, world):
    file = as_mtl(*moe)
    content = {"state_dict": file.weights, "meta": file.meta}
    weight_files.write_pickle(tmp_path / "x.pth", content)
    ours = moe[0].state_dict()
    for rank in range(world):
        content = weight_files.read_pickle(tmp_path / "x.pth")
        loaded, useless = m3vit_load(
            content, rank=rank, world=world, tasks=tasks, task_dim=task_dim, side=4
        )
        assert useless == []
        # With three tasks its rule forgets the third gate, whatever is in the file.
        empty = {name for name, tensor in loaded.items() if tensor.isnan().any()}
        assert empty == ({f"blocks.{i}.mlp.gate.2.w_gate" for i in (1, 3)} if tasks == 3 else set())
        for expert in range(EXPERTS // world):
            whole = rank * (EXPERTS // world) + expert
            rows = ours["blocks.3.mlp.experts.w_in"][whole * HIDDEN : (whole + 1) * HIDDEN]
            assert torch.equal(loaded["blocks.3.mlp.experts.htoh4.weight"][expert], rows)
        gate = "blocks.3.mlp.gate.0.w_gate" if tasks else "blocks.3.mlp.gate.w_gate"
        assert torch.equal(loaded[gate][:DIM].T, ours["blocks.3.mlp.router.gate.weight"])
        assert torch.equal(loaded["pos_embed"], ours["pos_embed"])


def m3vit_forward(w, image_BCHW, *, heads, top_k):
    """M3ViT's encoder in eval mode, from its names and rules alone: tokens after the last block."""

    def norm(x, name):
        return F.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    x = F.conv2d(image_BCHW, w["patch_embed.proj.weight"], w["patch_embed.proj.bias"], stride=8)
    x = x.flatten(2).transpose(1, 2)
    x = torch.cat([w["cls_token"].expand(len(x), -1, -1), x], 1) + w["pos_embed"]
    for i in range(DEPTH):
        b = f"blocks.{i}."
        qkv = F.linear(norm(x, b + "norm1"), w[b + "attn.qkv.weight"], w[b + "attn.qkv.bias"])
        q, k, v = (part.unflatten(-1, (heads, -1)).transpose(1, 2) for part in qkv.chunk(3, -1))
        y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        x = x + F.linear(y, w[b + "attn.proj.weight"], w[b + "attn.proj.bias"])
        y = norm(x, b + "norm2")
        m = b + "mlp."
        if i % 2 == 0:
            h = F.gelu(F.linear(y, w[m + "fc1.weight"], w[m + "fc1.bias"]))
            x = x + F.linear(h, w[m + "fc2.weight"], w[m + "fc2.bias"])
            continue
        share, chosen = (y @ w[m + "gate.w_gate"]).softmax(-1).topk(top_k)
        h = torch.einsum("bld,ehd->bleh", y, w[m + "experts.htoh4.weight"])
        h = F.gelu(h + w[m + "experts.htoh4.bias"])
        out = torch.einsum("bleh,edh->bled", h, w[m + "experts.h4toh.weight"])
        out = out + w[m + "experts.h4toh.bias"]
        picked = out.gather(2, chosen[..., None].expand(-1, -1, -1, DIM))
        x = x + (share[..., None] * picked).sum(2)
    return x


@torch.no_grad()
def test_m3vits_encoder_computes_what_ours_does(moe):
    image_BCHW = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    file = as_mtl(*moe)
    found = m3vit_forward(file.weights, image_BCHW, heads=HEADS, top_k=TOP_K)
    x_BLD = moe[0].embed(image_BCHW)
    for block in moe[0].blocks:
        x_BLD = block(x_BLD)
    torch.testing.assert_close(found, x_BLD, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "prefix", ["", "module.", "encoder.", "module.encoder.", "module.backbone."]
)
@pytest.mark.parametrize("others", [True, False])
def test_files_of_fastmoes_ranks_are_joined_in_rank_order(moe, prefix, others):
    shards, file = rank_files(moe, world=4, prefix=prefix, others=others)
    top = prefix.removesuffix("encoder.").removesuffix("backbone.")
    shards[0] |= {f"{top}head.weight": torch.ones(5, DIM), f"{top}head_dist.bias": torch.ones(5)}
    merged = formats.merge_shards(shards, source="pretrain_sharded_dir")
    assert_equal(merged.weights, file.weights)
    assert (merged.meta["world_size"], merged.meta["moe_experts_local"]) == (4, 2)
    assert merged.meta["moe_experts_global"] == EXPERTS
    assert merged.left_out == ("head_dist.bias",)
    assert list(formats.dropped_weights(merged.meta)) == ["head.weight"]


def test_ranks_that_all_have_all_experts_are_not_joined(moe):
    shards, file = rank_files(moe, world=1)
    merged = formats.merge_shards(shards * 2, source="pretrain_sharded_dir")
    assert_equal(merged.weights, file.weights)
    assert merged.meta["world_size"] == 1


def test_a_missing_last_rank_is_seen_by_the_gate(moe):
    shards, _ = rank_files(moe, world=4)
    with pytest.raises(ValueError, match=r"3 ranks, blocks\.1\..* has 6 of 8 experts"):
        formats.merge_shards(shards[:3], source="pretrain_sharded_dir")


def test_experts_without_a_gate_are_not_taken_for_all(moe):
    shards, _ = rank_files(moe, world=2)
    alone = {name: tensor for name, tensor in shards[1].items() if ".gate." not in name}
    assert "no gate beside it says of how many" in formats.missing_experts(alone)


def test_a_rank_without_an_expert_tensor_is_named(moe):
    shards, _ = rank_files(moe, world=2)
    del shards[1]["blocks.3.mlp.experts.h4toh.bias"]
    with pytest.raises(ValueError, match=r"shards \[1\] have no blocks\.3\.mlp\.experts\.h4toh"):
        formats.merge_shards(shards, source="pretrain_sharded_dir")


@pytest.mark.parametrize(
    "name",
    ["blocks.1.mlp.gate.0.w_gate", "dist_token", "blocks.1.mlp.gate.w_gate_aux", "x.weight"],
)
def test_what_only_m3vit_has_is_refused_by_name(moe, name):
    file = as_mtl(*moe)
    weights = file.weights | {name: torch.zeros(DIM, EXPERTS)}
    with pytest.raises(ValueError, match=rf"weights {name}: our ViT has no such"):
        formats.from_mtl(MtlFile(weights, file.meta))


def test_only_what_follows_the_encoder_is_taken_from_what_was_put_aside(moe):
    file = as_mtl(*moe)
    dropped = {"cls_token": torch.zeros(1, 1, DIM), "head.bias": torch.zeros(5)}
    ours = formats.from_mtl(MtlFile(file.weights, {"moevit": {"dropped": dropped}}))
    assert torch.equal(ours["cls_token"], file.weights["cls_token"])
    assert torch.equal(ours["head.bias"], torch.zeros(5))


def test_an_expert_tensor_of_another_rank_is_refused(moe):
    file = as_mtl(*moe)
    flat = {"blocks.1.mlp.experts.htoh4.weight": torch.zeros(EXPERTS, HIDDEN * DIM)}
    with pytest.raises(ValueError, match=r"\(8, 2592\): must have 3 dimensions"):
        formats.from_mtl(MtlFile(file.weights | flat, file.meta))


def test_a_gate_that_sees_the_task_is_refused(moe):
    file = as_mtl(*moe)
    gate = {"blocks.1.mlp.gate.w_gate": torch.zeros(DIM + 4, EXPERTS)}
    with pytest.raises(ValueError, match=r"sees 40 values per token, not 36"):
        formats.from_mtl(MtlFile(file.weights | gate, file.meta))


def test_a_pickle_with_code_is_refused_and_the_code_named(tmp_path):
    marker, path = tmp_path / "ran", tmp_path / "x.pth"
    torch.save({"model": {"a": torch.zeros(1)}, "args": Hostile(marker)}, path)
    with pytest.raises(ValueError, match=r"x\.pth: wants posix\.system: refused"):
        weight_files.read_pickle(path)
    assert not marker.exists()


@pytest.mark.parametrize("size", [0, 1, 200, -1])
def test_a_damaged_file_of_torch_is_an_error_with_its_name(tmp_path, size):
    path = tmp_path / "x.pth"
    torch.save({"a": torch.zeros(100)}, path)
    os.truncate(path, size if size >= 0 else path.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"x\.pth: damaged, or not of tensors"):
        weight_files.read_pickle(path)


def test_a_text_is_no_file_of_torch(tmp_path):
    (tmp_path / "x.pth").write_text("hello\n" * 100)
    with pytest.raises(ValueError, match=r"x\.pth: "):
        weight_files.read_pickle(tmp_path / "x.pth")


WEIGHTS = {f"w{i}": torch.full((10, 10), float(i)) for i in range(5)}
WEIGHTS |= {"half": torch.ones(3).bfloat16(), "turned": torch.arange(6.0).view(2, 3).T}


@pytest.mark.parametrize(
    ("name", "max_bytes"), [("x.safetensors", 10**9), ("x", 10**9), ("x", 900)]
)
def test_safetensors_come_back_bit_for_bit_with_their_metadata(tmp_path, name, max_bytes):
    path = tmp_path / name
    weight_files.write_safetensors(path, WEIGHTS, metadata={"config": "{}"}, max_bytes=max_bytes)
    weights, metadata = weight_files.read_safetensors(path)
    assert_equal(weights, WEIGHTS)
    assert metadata == {"config": "{}", "format": "pt"}
    if max_bytes == 900:
        names = sorted(file.name for file in path.iterdir())
        assert names[0] == "model-00001-of-00003.safetensors"
        assert names[-1] == "model.safetensors.index.json"
        index = json.loads((path / names[-1]).read_text())
        assert index["metadata"]["total_size"] == 5 * 400 + 6 + 24
        assert index["weight_map"].keys() == WEIGHTS.keys()


def test_safetensors_with_a_missing_file_or_a_file_elsewhere_are_refused(tmp_path):
    folder = tmp_path / "x"
    weight_files.write_safetensors(folder, WEIGHTS, metadata={}, max_bytes=900)
    second = folder / "model-00002-of-00003.safetensors"
    second.unlink()
    with pytest.raises(ValueError, match=r"model-00002-of-00003.safetensors is missing"):
        weight_files.read_safetensors(folder)
    index = {"weight_map": {"w0": "../y.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"\.\./y\.safetensors: must be a file in its folder"):
        weight_files.read_safetensors(folder)


def test_files_have_the_permissions_of_the_umask(tmp_path):
    old = os.umask(0o027)
    try:
        weight_files.write_safetensors(tmp_path / "s", WEIGHTS, metadata={}, max_bytes=900)
        weight_files.write_pickle(tmp_path / "x.pth", WEIGHTS)
        weight_files.write_dcp(tmp_path / "d", WEIGHTS, about={})
    finally:
        os.umask(old)
    modes = {path.stat().st_mode & 0o777 for path in tmp_path.rglob("*") if path.is_file()}
    assert modes == {0o640}


def test_a_file_is_renamed_into_place_not_copied(tmp_path):
    path = tmp_path / "x.pth"
    path.write_text("old")
    with weight_files.in_place_of(path) as partial:
        partial.write_text("new")
        written = partial.stat().st_ino
        assert path.read_text() == "old"
    assert path.stat().st_ino == written


def test_a_checkpoint_is_written_and_read_without_a_warning(tmp_path):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        weight_files.write_dcp(tmp_path / "d", WEIGHTS, about={})
        weight_files.read_dcp(tmp_path / "d", "model")
    assert not [str(w.message) for w in caught if "distributed is disabled" in str(w.message)]


def test_a_failed_write_leaves_what_was_there_and_nothing_else(tmp_path):
    path = tmp_path / "x.pth"
    weight_files.write_pickle(path, {"a": torch.zeros(1)})
    before = path.read_bytes()
    with pytest.raises(RuntimeError, match="stop"), weight_files.in_place_of(path) as partial:
        partial.write_text("half")
        raise RuntimeError("stop")
    assert path.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["x.pth"]


def test_a_model_of_another_kind_is_no_state_dict():
    assert weight_files.is_tensors(nn.Linear(1, 1).state_dict())
    assert not weight_files.is_tensors({"a": torch.zeros(1), "epoch": 3})
    assert not weight_files.is_tensors({})
