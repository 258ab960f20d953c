"""The command line between checkpoints and other projects' files, there and back."""

import json
import os
import pickle
import re
import resource
import shlex
import shutil
import signal
import time

import pytest
import timm
import torch
import yaml
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save, torch_save_to_dcp

import checkpoint
import export
from tests.support.experts import moe_vit, save_weights
from tests.support.models import (
    DIM,
    EVERYTHING,
    EXPERTS,
    HEADS,
    SMALL,
    Hostile,
    as_mtl,
    assert_equal,
    model_of,
    rank_files,
)
from training import pretrained
from weights import files as weight_files
from weights import verify
from weights.sources import Choice, read_source


def plus(weights, number):
    """Weights that differ from `weights`, and for each number in another way."""
    return {name: tensor + number / 64 for name, tensor in weights.items()}


def save_run(world, root, weights, options):
    """A run's checkpoints of steps 1, 2 and 3, of which 2 is the best."""
    for step, loss in ((1, 0.9), (2, 0.5), (3, 0.7)):
        tensors = plus(weights, step)
        tree = {
            "model": tensors,
            "ema": plus(tensors, -1),
            "optimizer": {name: {"exp_avg": tensor} for name, tensor in tensors.items()},
        }
        state = {"step": step, "metrics": {"val_loss": loss}, "config": options}
        checkpoint.save(root, tree, state=state, loss=loss)


def run_of(ranks, root, *overrides, recipe="vit_moe_tiny_patch8_64"):
    model, options = model_of(*overrides, recipe=recipe)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    root.mkdir(exist_ok=True)
    ranks(1, save_run, root, weights, options)
    return root, model, weights


@pytest.fixture(scope="module")
def moe_run(ranks, tmp_path_factory):
    return run_of(ranks, tmp_path_factory.mktemp("moe"))


@pytest.fixture(scope="module")
def dense_run(ranks, tmp_path_factory):
    return run_of(ranks, tmp_path_factory.mktemp("dense"), recipe="vit_tiny_patch8_64")


def convert(*arguments):
    """Run export.py and return its exit code."""
    return export.main([str(argument) for argument in arguments])


def refused(capsys, *arguments):
    """Run export.py, which must refuse in one line; return the line."""
    capsys.readouterr()
    assert convert(*arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    return line


def model_in(folder):
    """The weights in a Torch DCP folder."""
    return weight_files.read_dcp(folder, "model")


@pytest.mark.parametrize("to", ["torch", "safetensors", "mtl"])
def test_there_and_back_is_the_checkpoint_bit_for_bit(moe_run, tmp_path, to):
    root, _, weights = moe_run
    out = tmp_path / ("out.pt" if to != "safetensors" else "out")
    assert convert(root, "--to", to, "--output", out) == 0
    assert convert(out, "--to", "dcp", "--output", tmp_path / "back") == 0
    assert_equal(model_in(tmp_path / "back"), plus(weights, 3))
    found = verify.verify(tmp_path / "back")
    assert found.state["config"]["model"]["vit"]["num_heads"] == HEADS
    assert convert(tmp_path / "back", "--to", to, "--output", tmp_path / "again" / out.name) == 0
    if to == "torch":
        again = weight_files.read_pickle(tmp_path / "again" / out.name)
        assert_equal(again["model"], plus(weights, 3))
        assert again["config"] == weight_files.read_pickle(out)["config"]


def load_model(world, folder, model):
    tensors = {"model": {name: torch.zeros_like(t) for name, t in model.state_dict().items()}}
    checkpoint.load(verify.verify(folder), tensors)
    return tensors["model"]


def test_training_can_load_the_weights_of_an_export(ranks, moe_run, tmp_path):
    root, model, weights = moe_run
    assert convert(root, "--to", "dcp", "--output", tmp_path / "init") == 0
    assert_equal(ranks(1, load_model, tmp_path / "init", model)[0], plus(weights, 3))


def test_ema_and_the_best_checkpoint_are_exported_when_asked_for(moe_run, tmp_path):
    root, _, weights = moe_run
    best = ["--pick", "best", "--to", "torch", "--output", tmp_path / "x.pt"]
    assert convert(root, *best) == 0
    assert_equal(weight_files.read_pickle(tmp_path / "x.pt")["model"], plus(weights, 2))
    assert convert(root, *best, "--overwrite", "--weights", "ema") == 0
    expected = plus(plus(weights, 2), -1)
    assert_equal(weight_files.read_pickle(tmp_path / "x.pt")["model"], expected)


def test_mtl_files_are_named_after_what_was_picked(moe_run, tmp_path):
    root, _, weights = moe_run
    for pick, name, step in (("newest", "latest", 3), ("best", "best", 2)):
        assert convert(root, "--pick", pick, "--to", "mtl", "--output", tmp_path) == 0
        content = weight_files.read_pickle(tmp_path / f"mtl_{name}_global.pth")
        assert content.keys() == {"state_dict", "meta"}
        expected = plus(weights, step)["blocks.1.mlp.experts.b_in"]
        assert torch.equal(content["state_dict"]["blocks.1.mlp.experts.htoh4.bias"], expected)


def test_a_damaged_newest_checkpoint_is_passed_over(moe_run, tmp_path, capsys):
    root, _, weights = moe_run
    run = tmp_path / "run"
    shutil.copytree(root, run)
    os.truncate(run / "step_3_loss_0.700" / "__0_0.distcp", 10)
    assert convert(run, "--to", "torch", "--output", tmp_path / "x.pt") == 0
    assert_equal(weight_files.read_pickle(tmp_path / "x.pt")["model"], plus(weights, 2))
    (note,) = capsys.readouterr().err.splitlines()
    assert note.startswith("note: passed over step_3_loss_0.700: __0_0.distcp has 10 bytes")
    pretrained.read(str(run))
    assert capsys.readouterr().err == f"{note}\n", "a run that begins with it says so too"
    line = refused(
        capsys, run / "step_3_loss_0.700", "--to", "torch", "--output", tmp_path / "y.pt"
    )
    assert "step_3_loss_0.700: __0_0.distcp" in line


def test_experts_saved_on_two_ranks_are_whole_in_the_export(ranks, tmp_path):
    (tmp_path / "run").mkdir()
    ranks(2, save_weights, (1, 1, 2), tmp_path / "run")
    assert convert(tmp_path / "run", "--to", "torch", "--output", tmp_path / "x.pt") == 0
    model = moe_vit(seed=2)
    checkpoint.load_torch_checkpoint(tmp_path / "x.pt", model)
    assert_equal(model.state_dict(), moe_vit().state_dict())


@torch.no_grad()
@pytest.mark.parametrize(
    "overrides",
    [
        [],
        ["model.vit.global_pool=map", *EVERYTHING],
        ["model.vit.img_size=[32,32]"],
        ["model.vit.pos_embed=sincos"],
        ["model.vit.drop_path_rate=0.1", "model.vit.drop_path_uniform=true"],
        ["model.vit.distilled=true", "model.vit.global_pool=token"],
    ],
    ids=lambda overrides: overrides[0] if overrides else "plain",
)
def test_timm_makes_the_same_model_of_an_export(ranks, tmp_path, capsys, overrides):
    root, model, weights = run_of(ranks, tmp_path / "run", *overrides, recipe="vit_tiny_patch8_64")
    model.load_state_dict(plus(weights, 3))
    assert convert(root, "--to", "timm", "--output", tmp_path / "x.pth") == 0
    (call,) = re.findall(r"timm\.create_model\(.*\)", capsys.readouterr().out)
    assert "[" not in call, "timm takes sizes as tuples"
    theirs = eval(call, {"timm": timm}).eval()  # noqa: S307
    image_BCHW = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(model(image_BCHW), theirs(image_BCHW), rtol=0, atol=1e-5)


def test_timm_weights_become_a_checkpoint_of_a_recipe(tmp_path, capsys):
    theirs = timm.create_model("vit_tiny_patch16_224", num_classes=10)
    torch.save(theirs.state_dict(), tmp_path / "timm.pth")
    to_dcp = [tmp_path / "timm.pth", "--to", "dcp", "--output", tmp_path / "init"]
    recipe = ["--config-name", "vit_tiny_patch16_224"]
    line = refused(capsys, *to_dcp, *recipe)
    assert "head.bias is (10,), not (1000,)" in line
    line = refused(capsys, *to_dcp, *recipe, "model.vit.num_classes=10", "model.vit.depth=11")
    assert "unexpected blocks.11.attn.proj.bias" in line
    line = refused(capsys, *to_dcp, *recipe, "model.vit.num_classes=10", "model.vit.depth=13")
    assert "missing blocks.12.attn.proj.bias" in line
    headless = {n: t for n, t in theirs.state_dict().items() if not n.startswith("head.")}
    torch.save(headless, tmp_path / "headless.pth")
    line = refused(capsys, tmp_path / "headless.pth", *to_dcp[1:], *recipe)
    assert "missing head.bias, missing head.weight" in line
    assert convert(*to_dcp, *recipe, "model.vit.num_classes=10") == 0
    assert_equal(model_in(tmp_path / "init"), theirs.state_dict())
    config = verify.verify(tmp_path / "init").state["config"]
    assert config["model"]["vit"]["num_heads"] == 3


def test_timm_gets_no_experts_and_nothing_is_written(moe_run, tmp_path, capsys):
    line = refused(capsys, moe_run[0], "--to", "timm", "--output", tmp_path / "x.pth")
    assert "blocks.1.mlp.experts.b_in" in line
    assert list(tmp_path.iterdir()) == []


# By hand from the recipe: the names of its state dict with one block, less blocks.0's own.
NVIDIA_NAMES = {
    *("pos_embed.pos_embed", "pos_embed.cls_token", "pos_embed.reg_token"),
    *("patch_embed.proj.weight", "patch_embed.proj.bias"),
    *("fc_norm.weight", "fc_norm.bias", "head.weight", "head.bias"),
}
NVIDIA_BLOCK = {
    f"{layer}.{kind}"
    for layer in ("norm1", "attn.qkv", "attn.proj", "norm2", "mlp.fc1", "mlp.fc2")
    for kind in ("weight", "bias")
}


class PosEmbedOfNvidia(torch.nn.Module):
    """Positions, class and register tokens, as NVIDIA's recipe keeps and adds them."""

    def __init__(self, timms):
        super().__init__()
        for name in ("pos_embed", "cls_token", "reg_token"):
            self.register_parameter(
                name, torch.nn.Parameter(torch.zeros(getattr(timms, name).shape))
            )

    def forward(self, x_BPD):
        prefix = [token.expand(len(x_BPD), -1, -1) for token in (self.cls_token, self.reg_token)]
        return torch.cat([*prefix, x_BPD], 1) + self.pos_embed


class VitOfNvidia(torch.nn.Module):
    """NVIDIA's network around timm's blocks: patches, positions, blocks, mean, norm, head."""

    def __init__(self, options):
        super().__init__()
        timms = timm.create_model("vit_base_patch16_224", norm_layer=LayerNormOfNvidia, **options)
        self.pos_embed = PosEmbedOfNvidia(timms)
        for name in ("patch_embed", "blocks", "fc_norm", "head"):
            setattr(self, name, getattr(timms, name))

    def forward(self, image_BCHW):
        x_BLD = self.blocks(self.pos_embed(self.patch_embed(image_BCHW)))
        return self.head(self.fc_norm(x_BLD[:, 3:].mean(1)))


class LayerNormOfNvidia(torch.nn.LayerNorm):
    def __init__(self, dim, **_):
        super().__init__(dim, eps=1e-5)


def load_as_nvidia(path, model, *, megatron_fsdp):
    """The rules of its load_torch_checkpoint; here the keys that it would drop are an error."""
    weights = torch.load(path, weights_only=True)["model"]
    bare = {key.removeprefix("module.") if megatron_fsdp else key: w for key, w in weights.items()}
    assert bare.keys() == model.state_dict().keys()
    model.load_state_dict(bare, strict=False)


def options_of_nvidia(shown):
    (line,) = re.findall(r"options of its recipe: (.*)", shown)
    return {k: yaml.safe_load(v) for k, _, v in (w.partition("=") for w in shlex.split(line))}


@torch.no_grad()
def test_nvidias_recipe_loads_every_tensor_of_an_export_and_computes_the_same(
    ranks, tmp_path, capsys
):
    overrides = ["model.vit.reg_tokens=2", "model.vit.depth=2", "dataset.mean=[0.25,0.5,0.75]"]
    root, model, weights = run_of(ranks, tmp_path / "run", *overrides, recipe="vit_tiny_patch8_64")
    model.load_state_dict(plus(weights, 3))
    assert convert(root, "--to", "nvidia", "--output", tmp_path / "x.pt") == 0
    shown = capsys.readouterr().out
    assert "LayerNorms with eps 1e-5, ours have 1e-6" in shown
    options = options_of_nvidia(shown)
    assert options["dataset.val.transform_kwargs.mean"] == [0.25, 0.5, 0.75]
    assert options["dataset.val.transform_kwargs.crop_pct"] == 1.0
    assert options["model.transformer_engine"] is False
    names = {*NVIDIA_NAMES, *(f"blocks.{i}.{name}" for i in (0, 1) for name in NVIDIA_BLOCK)}
    assert weight_files.read_pickle(tmp_path / "x.pt")["model"].keys() == names
    vit = {k[10:]: v for k, v in options.items() if k.startswith("model.vit.")}
    theirs = VitOfNvidia({**vit, "num_classes": options["dataset.num_classes"]}).eval()
    load_as_nvidia(tmp_path / "x.pt", theirs, megatron_fsdp=True)
    image_BCHW = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(theirs(image_BCHW), model(image_BCHW), rtol=0, atol=1e-4)


@pytest.mark.parametrize("prefix", ["", "module."])
@pytest.mark.parametrize("kind", ["torch", "dcp"])
def test_what_nvidias_recipe_saved_becomes_ours(ranks, tmp_path, capsys, prefix, kind):
    overrides = ["model.vit.reg_tokens=2", "model.vit.depth=1"]
    model, _ = model_of(*overrides, recipe="vit_tiny_patch8_64")
    weights = model.state_dict()
    apart = {"pos_embed", "cls_token", "reg_token"}
    theirs = {prefix + (f"pos_embed.{n}" if n in apart else n): t for n, t in weights.items()}
    torch.save({"model": theirs, "optimizer": {}}, tmp_path / "theirs.pt")
    if kind == "dcp":
        torch_save_to_dcp(tmp_path / "theirs.pt", tmp_path / "theirs")
    source = tmp_path / ("theirs.pt" if kind == "torch" else "theirs")
    recipe = ["--config-name", "vit_tiny_patch8_64", *SMALL, *overrides]
    assert convert(source, *recipe, "--to", "dcp", "--output", tmp_path / "ours") == 0
    assert "NVIDIA's recipe has LayerNorms with eps 1e-5" in capsys.readouterr().err
    assert_equal(model_in(tmp_path / "ours"), weights)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.moe.num_experts=8"], "mlp.experts.b_in"),
        (["model.vit.distilled=true", "model.vit.global_pool=token"], "dist_token"),
        (["model.vit.pos_embed=none"], "weights pos_embed: NVIDIA's ViT recipe cannot be without"),
        (["model.vit.img_size=[32,64]"], r"img_size=\[32, 64\]: .* can only do squares"),
    ],
)
def test_what_nvidias_recipe_cannot_be_is_refused(tmp_path, capsys, overrides, message):
    model, options = model_of(*overrides, recipe="vit_tiny_patch8_64")
    about = {"config": json.dumps(options)}
    torch.save({"model": model.state_dict(), **about}, tmp_path / "ours.pt")
    arguments = [tmp_path / "ours.pt", "--to", "nvidia", "--output", tmp_path / "x.pt"]
    assert re.search(message, refused(capsys, *arguments))
    assert not (tmp_path / "x.pt").exists()


def save_shards(folder, shards, *, name="{}.pth", **more):
    folder.mkdir()
    for rank, shard in enumerate(shards):
        content = {"state_dict": shard, "epoch": 3, **more}
        torch.save(content, folder / name.format(rank))


@pytest.fixture(scope="module")
def shards():
    return rank_files(model_of(), world=4, prefix="module.encoder.")


@pytest.mark.parametrize("name", ["{}.pth", "checkpoint_latest_rank{}.pth"])
def test_a_folder_of_fastmoe_becomes_one_file(shards, tmp_path, name):
    save_shards(tmp_path / "x.pth.tar", shards[0], name=name)
    assert convert(tmp_path / "x.pth.tar", "--to", "mtl", "--output", tmp_path / "out") == 0
    content = weight_files.read_pickle(tmp_path / "out" / "mtl_latest_global.pth")
    assert_equal(content["state_dict"], shards[1].weights)
    assert content["meta"]["source"] == "pretrain_sharded_dir"


def test_a_folder_of_fastmoe_becomes_a_checkpoint_of_a_recipe(shards, tmp_path, capsys):
    save_shards(tmp_path / "x", [shards[0][0] | {"head_dist.bias": torch.ones(5)}, *shards[0][1:]])
    to_mtl = ["--to", "mtl", "--output", tmp_path / "first.pth"]
    assert convert(tmp_path / "x", *to_mtl) == 0
    assert "note: left out head_dist.bias\n" in capsys.readouterr().out
    arguments = [tmp_path / "x", "--to", "dcp", "--output", tmp_path / "init"]
    recipe = ["--config-name", "vit_moe_tiny_patch8_64", *SMALL]
    line = refused(capsys, *arguments, *recipe, "model.moe.mlp_ratio=4")
    assert "blocks.1.mlp.experts.b_in is (8, 72), not (8, 144)" in line
    assert "head" not in line
    assert convert(*arguments, *recipe) == 0
    ours = model_of()[0].state_dict()
    expected = {n: t for n, t in ours.items() if not n.startswith(("head.", "fc_norm."))}
    assert_equal(model_in(tmp_path / "init"), expected)
    # Now the number of heads is known, and goes with it.
    assert convert(tmp_path / "init", "--to", "mtl", "--output", tmp_path / "mtl.pth") == 0
    assert weight_files.read_pickle(tmp_path / "mtl.pth")["meta"]["num_heads"] == HEADS


def test_ranks_are_ordered_as_numbers(tmp_path):
    whole = as_mtl(*model_of("model.moe.num_experts=12")).weights
    experts = [name for name in whole if "mlp.experts.h" in name]
    shards = [whole | {name: whole[name][i : i + 1].clone() for name in experts} for i in range(12)]
    save_shards(tmp_path / "x", shards)
    assert convert(tmp_path / "x", "--to", "mtl", "--output", tmp_path / "out.pth") == 0
    found = weight_files.read_pickle(tmp_path / "out.pth")["state_dict"]
    assert_equal(found, whole)


@pytest.mark.parametrize("rank", [0, 1, 3])
def test_a_folder_without_a_rank_is_refused(shards, tmp_path, capsys, rank):
    save_shards(tmp_path / "x", shards[0])
    (tmp_path / "x" / f"{rank}.pth").unlink()
    line = refused(capsys, tmp_path / "x", "--to", "mtl", "--output", tmp_path / "out")
    assert f"{tmp_path / 'x'}: " in line
    assert ("6 of 8 experts" if rank == 3 else f"ranks [{rank}] are missing") in line


def test_two_sets_of_ranks_in_a_folder_need_a_stem(shards, tmp_path, capsys):
    name = "checkpoint_{}_rank{{}}.pth"
    save_shards(tmp_path / "x", shards[0], name=name.format("latest"))
    for path in list((tmp_path / "x").iterdir()):
        shutil.copy(path, path.with_name(path.name.replace("latest", "best")))
    arguments = [tmp_path / "x", "--to", "mtl", "--output", tmp_path / "out"]
    assert "'checkpoint_best', 'checkpoint_latest': choose" in refused(capsys, *arguments)
    assert convert(*arguments, "--stem", "checkpoint_best") == 0


def test_the_average_of_fastmoes_ranks_is_exported_when_asked_for(shards, tmp_path, capsys):
    save_shards(tmp_path / "x", shards[0], model_ema=None)
    arguments = [tmp_path / "x", "--to", "mtl", "--weights", "ema", "--output", tmp_path / "out"]
    message = "0.pth: has no weights in `state_dict_ema` or `model_ema` or `ema` (it has: "
    assert message in refused(capsys, *arguments)
    for rank, shard in enumerate(shards[0]):
        content = {"model": shard, "model_ema": plus(shard, 1)}
        torch.save(content, tmp_path / "x" / f"{rank}.pth")
    assert convert(*arguments) == 0
    content = weight_files.read_pickle(tmp_path / "out" / "mtl_latest_global.pth")
    assert_equal(content["state_dict"], plus(shards[1].weights, 1))


@pytest.mark.parametrize("key", ["model", "state_dict"])
@pytest.mark.parametrize("meta", [{}, {"meta": {"expert_format": "local"}}])
def test_one_ranks_file_is_refused_with_the_command_that_works(shards, tmp_path, capsys, key, meta):
    save_shards(tmp_path / "x", shards[0], name="checkpoint_best_rank{}.pth")
    path = tmp_path / "x" / "checkpoint_best.pth"
    torch.save({key: shards[0][0], **meta}, path)
    line = refused(capsys, path, "--to", "mtl", "--output", tmp_path / "out")
    assert f"{path}: blocks.1.mlp.experts.htoh4.weight has 2 of 8 experts" in line
    command = line.partition("export.py ")[2].replace("<folder>", str(tmp_path / "out"))
    assert "--stem checkpoint_best " in command
    assert convert(*command.split()) == 0


def test_a_single_global_file_of_m3vit_keeps_its_meta_and_becomes_ours(shards, tmp_path, capsys):
    meta = {"expert_format": "global", "moe_experts_global": EXPERTS, "world_size": 4}
    torch.save({"state_dict": shards[1].weights, "meta": meta}, tmp_path / "mtl.pth")
    assert convert(tmp_path / "mtl.pth", "--to", "mtl", "--output", tmp_path / "again.pth") == 0
    again = weight_files.read_pickle(tmp_path / "again.pth")
    assert_equal(again["state_dict"], shards[1].weights)
    assert meta.items() <= again["meta"].items()
    assert again["meta"]["source"] == "pretrain_single_file"
    to_dcp = [tmp_path / "mtl.pth", "--to", "dcp", "--output", tmp_path / "init"]
    assert convert(*to_dcp) == 0
    assert "has no norm or fc_norm and no head" in capsys.readouterr().out
    assert "head.weight" not in model_in(tmp_path / "init")


def test_a_meta_that_is_wrong_about_the_experts_is_put_right(shards, tmp_path):
    meta = {"expert_format": "local", "moe_experts_global": 2}
    weights = shards[1].weights
    content = {"model": weights, "model_ema": plus(weights, 1), "meta": meta}
    torch.save(content, tmp_path / "x.pth")
    to_mtl = ["--to", "mtl", "--weights", "ema", "--output", tmp_path / "mtl.pth"]
    assert convert(tmp_path / "x.pth", *to_mtl) == 0
    found = weight_files.read_pickle(tmp_path / "mtl.pth")
    assert_equal(found["state_dict"], plus(weights, 1))
    assert found["meta"]["expert_format"] == "global"
    assert found["meta"]["moe_experts_global"] == EXPERTS


def test_torchs_own_converters_and_ours_understand_each_other(moe_run, tmp_path):
    root, model, weights = moe_run
    assert convert(root, "--to", "dcp", "--output", tmp_path / "dcp") == 0
    dcp_to_torch_save(tmp_path / "dcp", tmp_path / "theirs.pt")
    checkpoint.load_torch_checkpoint(tmp_path / "theirs.pt", model)
    assert_equal(model.state_dict(), plus(weights, 3))
    assert convert(root, "--to", "torch", "--output", tmp_path / "ours.pt") == 0
    for name in ("theirs", "ours"):
        torch_save_to_dcp(tmp_path / f"{name}.pt", tmp_path / name)
        back = tmp_path / f"{name}_again.pt"
        assert convert(tmp_path / name, "--to", "torch", "--output", back) == 0
        checkpoint.load_torch_checkpoint(back, model)
        assert_equal(model.state_dict(), plus(weights, 3))


def test_a_run_s_own_checkpoint_passes_through_dcp_to_torch_and_back(moe_run, tmp_path):
    root, model, weights = moe_run
    dcp_to_torch_save(root / "step_1_loss_0.900", tmp_path / "x.pt")
    checkpoint.load_torch_checkpoint(tmp_path / "x.pt", model)
    assert_equal(model.state_dict(), plus(weights, 1))
    assert convert(tmp_path / "x.pt", "--to", "dcp", "--output", tmp_path / "dcp") == 0
    assert_equal(model_in(tmp_path / "dcp"), plus(weights, 1))
    ema = [tmp_path / "x.pt", "--weights", "ema", "--to", "dcp", "--output", tmp_path / "ema"]
    assert convert(*ema) == 0
    expected = plus(plus(weights, 1), -1)
    assert_equal(model_in(tmp_path / "ema"), expected)


def test_code_in_any_file_is_refused_by_name_and_not_run(moe_run, shards, tmp_path, capsys):
    marker = tmp_path / "ran"
    hostile = {"model": shards[1].weights, "args": Hostile(marker)}
    torch.save(hostile, tmp_path / "x.pth")
    save_shards(tmp_path / "ranks", shards[0])
    torch.save(hostile, tmp_path / "ranks" / "2.pth")
    folder = tmp_path / "dcp"
    assert convert(moe_run[0], "--to", "dcp", "--output", folder) == 0
    (folder / "manifest.json").unlink()
    (folder / ".metadata").write_bytes(pickle.dumps(Hostile(marker)))
    for path, name in ((tmp_path / "x.pth",) * 2, (tmp_path / "ranks", "2.pth"), (folder, ".meta")):
        line = refused(capsys, path, "--to", "torch", "--output", tmp_path / "out.pt")
        assert str(name) in line
        assert "posix.system" in line
    assert not marker.exists()


def test_nothing_is_overwritten_unless_asked_for(dense_run, tmp_path, capsys):
    root = dense_run[0]
    (tmp_path / "x.pt").write_text("mine")
    arguments = [root, "--to", "torch", "--output", tmp_path / "x.pt"]
    assert "exists (--overwrite replaces it)" in refused(capsys, *arguments)
    assert (tmp_path / "x.pt").read_text() == "mine"
    assert convert(*arguments, "--overwrite") == 0
    for to in ("dcp", "safetensors"):
        into = [root, "--to", to, "--output", tmp_path / to, "--overwrite"]
        assert [convert(*into), convert(*into)] == [0, 0]
        shutil.rmtree(tmp_path / to)
        (tmp_path / to).mkdir()
        (tmp_path / to / "thesis.tex").write_text("mine")
        assert "is a folder but no export" in refused(capsys, *into)
    assert {path.name for path in tmp_path.iterdir()} == {"x.pt", "dcp", "safetensors"}


@pytest.mark.parametrize("to", ["dcp", "safetensors"])
@pytest.mark.parametrize("name", ["thesis.tex", "model-1.safetensors", "figures/"])
def test_a_users_file_in_an_export_stops_its_replacement(dense_run, tmp_path, capsys, to, name):
    out = tmp_path / "out"
    into = [dense_run[0], "--to", to, "--output", out, "--overwrite"]
    assert convert(*into) == 0
    mine = out / name
    if name.endswith("/"):
        mine.mkdir()
    else:
        mine.write_text("mine")
    assert f"holds {mine.name}, which no export writes" in refused(capsys, *into)
    assert mine.exists()


def test_a_failed_replacement_leaves_the_old_folder(tmp_path, monkeypatch):
    (tmp_path / "x").mkdir()
    (tmp_path / "x" / "old").write_text("old")

    def fail(*_):
        raise OSError

    with pytest.raises(OSError), weight_files.in_place_of(tmp_path / "x") as partial:
        partial.mkdir()
        monkeypatch.setattr(type(tmp_path), "replace", fail)
    assert (tmp_path / "x" / "old").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


def test_ctrl_c_is_one_line(dense_run, tmp_path, monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(torch, "save", interrupt)
    assert convert(dense_run[0], "--to", "torch", "--output", tmp_path / "x.pt") == 130
    assert capsys.readouterr().err == "stopped\n"
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def ctrl_c():
    """Python's own handler: a process started in a shell's background ignores Ctrl-C."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("ctrl_c")
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_while_dcp_writes_ends_the_export_and_leaves_nothing(
    dense_run, tmp_path, monkeypatch, number
):
    def kill(*_):
        os.kill(os.getpid(), number)
        time.sleep(5)

    monkeypatch.setattr(FileSystemWriter, "write_data", kill)
    before = signal.getsignal(signal.SIGTERM)
    arguments = [dense_run[0], "--to", "dcp", "--output", tmp_path / "x"]
    assert convert(*arguments) == 128 + number
    assert list(tmp_path.iterdir()) == []
    assert signal.getsignal(signal.SIGTERM) is before


def test_sigterm_leaves_no_half_written_file(dense_run, tmp_path, monkeypatch):
    def kill(content, path):
        path.write_bytes(b"half")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)

    monkeypatch.setattr(torch, "save", kill)
    assert convert(dense_run[0], "--to", "torch", "--output", tmp_path / "x.pt") == 143
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["torch", "timm", "safetensors", "dcp"])
def test_a_distilled_model_is_there_and_back(ranks, tmp_path, to):
    distilled = ["model.vit.distilled=true", "model.vit.global_pool=token"]
    root, _, weights = run_of(ranks, tmp_path / "run", *distilled, recipe="vit_tiny_patch8_64")
    assert {"dist_token", "head_dist.weight", "head_dist.bias"} < weights.keys()
    out = tmp_path / ("out.pth" if to in ("torch", "timm") else "out")
    assert convert(root, "--to", to, "--output", out) == 0
    found = read_source(out, Choice())
    assert_equal(found.weights(), plus(weights, 3))
    assert found.config["model"]["vit"]["distilled"]


def test_the_figures_names_are_those_of_the_option_of_training(ranks, tmp_path, capsys):
    def save(world):
        for step, top1 in ((1, 70.0), (2, 20.0)):
            tree = {"model": {"norm.bias": torch.full((1,), float(step))}}
            state = {"step": step, "metrics": {"top1": top1, "val_loss": 1.0}}
            checkpoint.save(tmp_path / "run", tree, state=state, loss=1.0)

    (tmp_path / "run").mkdir()
    ranks(1, save)
    best = [tmp_path / "run", "--pick", "best", "--to", "torch", "--output", tmp_path / "x.pt"]
    for metric, step in (("+val_top1", 1), ("+top1", 1), ("-val_top1", 2)):
        assert convert(*best, f"--metric={metric}", "--overwrite") == 0
        assert weight_files.read_pickle(tmp_path / "x.pt")["model"]["norm.bias"] == step
    line = refused(capsys, *best, "--metric", "+top", "--overwrite")
    assert line.endswith("has this figure (there are: top1, val_loss)")


def test_one_file_of_several_is_not_taken_for_a_model(moe_run, tmp_path, capsys):
    out, limit = tmp_path / "x", ["--max-shard-gb", 1e-4]
    assert convert(moe_run[0], "--to", "safetensors", "--output", out, *limit) == 0
    path = min(out.glob("model-*.safetensors"))
    line = refused(capsys, path, "--to", "torch", "--output", tmp_path / "x.pt")
    assert re.search(rf"is one of the \d+ files of a model; name their folder, {out}$", line)
    shutil.copy(path, tmp_path / "model-00001-of-00001.safetensors")
    whole = tmp_path / "model-00001-of-00001.safetensors"
    assert convert(whole, "--to", "torch", "--output", tmp_path / "y.pt") == 0


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("step_3_loss_0.700", "would replace the source"),
        ("", "would replace the source"),
        ("step_2_loss_0.500/x", "must stay as it was saved"),
        ("step_9_loss_1.000", "only a run names its checkpoints so"),
    ],
)
def test_a_runs_checkpoints_are_safe_from_exports(dense_run, capsys, output, message):
    root = dense_run[0]
    source = root / "step_3_loss_0.700"
    arguments = [source, "--to", "dcp", "--output", root / output, "--overwrite"]
    assert message in refused(capsys, *arguments)
    assert verify.verify(source).step == 3


ERRORS = {
    "no such file": "{root}/none --to torch --output x.pt",
    "must end in .pt or .pth": "{root} --to timm --output x",
    "must be a folder": "{root} --to dcp --output x.pt",
    "raise --max-shard-gb": "{root} --to safetensors --output x.safetensors --max-shard-gb=1e-5",
    "is for safetensors, not for dcp": "{root} --to dcp --output x --max-shard-gb=2",
    **{
        f"--max-shard-gb {shown}: must be more than 0, at most 1000000": (
            f"{{root}} --to safetensors --output x --max-shard-gb={typed}"
        )
        for typed, shown in {
            "inf": "inf",
            "nan": "nan",
            "0": "0.0",
            "-1": "-1.0",
            "1e300": r"1e\+300",
        }.items()
    },
    "invalid float value: 'a'": "{root} --to safetensors --output x --max-shard-gb=a",
    "--output: must name a file or folder": "{root} --to mtl --output=",
    "model.vit.depth=3: has no effect": "{root} model.vit.depth=3 --to dcp --output x",
    "has options of its own": "{root} --to dcp --output x --config-name vit_tiny_patch8_64",
    "--metric .1: has no effect without --pick best": "{root} --to dcp --output x --metric +1",
    "--pick best: has no effect on": "{root}/step_3_loss_0.700 --pick best --to dcp --output x",
    "--stem a: has no effect on": "{root} --stem a --to dcp --output x",
    "no checkpoint .* figure": "{root} --to dcp --output x --pick best --metric=+a",
    "metric a: must be": "{root} --to dcp --output x --pick best --metric a",
    "arguments are required: --output": "{root} --to torch",
    "invalid choice: 'onnx'": "{root} --to onnx --output x",
    "and no file": "{empty} --to mtl --output x",
}


@pytest.mark.parametrize("message", ERRORS)
def test_a_mistake_is_one_line_and_exit_code_2(dense_run, tmp_path, monkeypatch, capsys, message):
    monkeypatch.chdir(tmp_path)
    arguments = ERRORS[message].format(root=dense_run[0], empty=tmp_path).split()
    code = export.main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2
    assert re.search(message, line)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("overwrite", [[], ["--overwrite"]])
@pytest.mark.parametrize(
    ("to", "name", "message"),
    [
        ("torch", "file/x.pt", "file is not a folder"),
        ("dcp", "file/x", "file is not a folder"),
        ("dcp", "file", "is not a folder, which this writes"),
        ("safetensors", "file", "is not a folder, which this writes"),
        ("torch", "folder.pt", "is not a file, which this writes"),
        ("safetensors", "folder.safetensors", "is not a file, which this writes"),
        ("torch", "fifo.pt", "is not a file, which this writes"),
        ("torch", "link.pt", "is a symbolic link"),
        ("torch", "dangling.pt", "is a symbolic link"),
        ("torch", "loop.pt", "is a symbolic link"),
        ("dcp", "export-link", "is a symbolic link"),
    ],
)
def test_an_output_that_cannot_be_written_there_is_refused_and_left(
    dense_run, tmp_path, capsys, to, name, message, overwrite
):
    (tmp_path / "file").write_text("mine")
    for folder in ("folder.pt", "folder.safetensors", "export"):
        (tmp_path / folder).mkdir()
    (tmp_path / "export" / ".metadata").write_text("")
    os.mkfifo(tmp_path / "fifo.pt")
    links = {"link.pt": "file", "dangling.pt": "no", "loop.pt": "loop.pt", "export-link": "export"}
    for link, target in links.items():
        (tmp_path / link).symlink_to(tmp_path / target)
    before = {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")}
    arguments = [dense_run[0], "--to", to, "--output", tmp_path / name, *overwrite]
    line = refused(capsys, *arguments)
    assert line.startswith(f"error: --output {tmp_path / name}: ")
    assert message in line
    assert {path: path.lstat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_a_home_folder_in_an_option_is_the_home_folder(dense_run, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert convert(dense_run[0], "--to", "torch", "--output=~/out.pt") == 0
    assert (tmp_path / "out.pt").is_file()
    assert convert("~/out.pt", "--to", "safetensors", "--output=~/out") == 0


@pytest.mark.parametrize("dtype", ["int8", "bool", "complex64", "float8_e4m3fn"])
@pytest.mark.parametrize("suffix", ["pt", "safetensors", "mtl"])
def test_weights_that_are_no_real_numbers_are_refused_by_name(tmp_path, capsys, dtype, suffix):
    model, options = model_of(recipe="vit_tiny_patch8_64")
    weights = {
        **model.state_dict(),
        "blocks.1.norm1.bias": torch.ones(DIM).to(getattr(torch, dtype)),
    }
    path = tmp_path / f"x.{suffix}"
    if suffix == "safetensors":
        weight_files.write_safetensors(path, weights, metadata={}, max_bytes=10**9)
    else:
        meta = {"meta": {"expert_format": "global"}} if suffix == "mtl" else {}
        torch.save({"state_dict": weights, "config": json.dumps(options), **meta}, path)
    line = refused(capsys, path, "--to", "torch", "--output", tmp_path / "out.pt")
    assert line == (
        f"error: {'weights' if suffix == 'mtl' else path}: blocks.1.norm1.bias is {dtype}, "
        "must be one of float16, bfloat16, float32, float64"
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_real_numbers_keep_their_dtype(tmp_path, dtype):
    model, options = model_of(recipe="vit_tiny_patch8_64")
    weights = {name: tensor.to(dtype) for name, tensor in model.state_dict().items()}
    torch.save({"model": weights, "config": json.dumps(options)}, tmp_path / "x.pt")
    assert convert(tmp_path / "x.pt", "--to", "safetensors", "--output", tmp_path / "x") == 0
    assert_equal(read_source(tmp_path / "x", Choice()).weights(), weights)


def test_weights_that_are_not_there_are_an_error(ranks, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    ranks(1, save_weights, (1, 1, 1), tmp_path / "run")
    to_torch = ["--to", "torch", "--output", tmp_path / "x.pt", "--weights", "ema"]
    assert "has no ema weights (it has: model)" in refused(capsys, tmp_path / "run", *to_torch)
    to_mtl = ["--to", "mtl", "--output", tmp_path / "x"]
    assert "name them by --config-name" in refused(capsys, tmp_path / "run", *to_mtl)


def test_a_file_of_one_set_of_weights_has_no_average(dense_run, tmp_path, capsys):
    path = tmp_path / "x.safetensors"
    assert convert(dense_run[0], "--to", "safetensors", "--output", path) == 0
    to_torch = ["--to", "torch", "--output", tmp_path / "x.pt", "--weights", "ema"]
    assert "has one set of weights" in refused(capsys, path, *to_torch)


def test_an_average_of_some_parameters_only_is_an_error(ranks, tmp_path, capsys):
    def save(world):
        tree = {"model": {"norm.bias": torch.ones(1), "norm.weight": torch.ones(1)}}
        tree["ema"] = {"norm.bias": torch.ones(1)}
        checkpoint.save(tmp_path / "run", tree, state={"step": 1, "metrics": {}}, loss=1.0)

    (tmp_path / "run").mkdir()
    ranks(1, save)
    to_torch = ["--to", "torch", "--output", tmp_path / "x.pt", "--weights", "ema"]
    assert "ema weights lack norm.weight" in refused(capsys, tmp_path / "run", *to_torch)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"model": 3}', "3", "null", "not JSON"])
def test_what_another_project_calls_config_is_not_taken_for_options(tmp_path, text):
    weights = {"norm.bias": torch.ones(1)}
    metadata = {"config": text}
    path = tmp_path / "x.safetensors"
    weight_files.write_safetensors(path, weights, metadata=metadata, max_bytes=10**6)
    torch.save({"model": weights, "config": text}, tmp_path / "x.pt")
    for source in (path, tmp_path / "x.pt"):
        out = tmp_path / f"{source.suffix}_out.pth"
        assert convert(source, "--to", "timm", "--output", out) == 0
        assert weight_files.read_pickle(out)["config"] == "{}"


def export_to_a_full_disk(world, root, folder):
    """Run three exports in a process whose files cannot have more than 4000 bytes."""
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, hard))
    found = []
    for to, name in (("torch", "x.pt"), ("safetensors", "s"), ("dcp", "d")):
        arguments = export.parse([str(root), "--to", to, "--output", str(folder / name)])
        with pytest.raises(OSError) as caught:
            export.export(arguments)
        found.append(str(caught.value))
    return found


def test_a_full_disk_is_an_error_that_leaves_nothing(ranks, dense_run, tmp_path):
    messages = ranks(1, export_to_a_full_disk, dense_run[0], tmp_path)[0]
    assert f"file {tmp_path / 'x.pt'}: cannot be written" in messages[0]
    assert "File too large" in messages[1]
    assert f"checkpoint {tmp_path / 'd'}: " in messages[2]
    assert list(tmp_path.iterdir()) == []


def test_a_large_model_is_split_into_files_that_are_read_as_one(moe_run, tmp_path):
    root, _, weights = moe_run
    limit = ["--max-shard-gb", 1e-4]
    assert convert(root, "--to", "safetensors", "--output", tmp_path / "x", *limit) == 0
    assert len(list((tmp_path / "x").glob("model-*-of-*.safetensors"))) > 2
    found, metadata = weight_files.read_safetensors(tmp_path / "x")
    assert_equal(found, plus(weights, 3))
    assert json.loads(metadata["config"])["model"]["moe"]["num_experts"] == EXPERTS


def test_help_shows_every_format_and_its_examples_parse(capsys):
    with pytest.raises(SystemExit):
        export.parse(["--help"])
    shown = capsys.readouterr().out
    examples = re.findall(r"python export\.py (\S+ --to .*|\S+ --\S+ .* --to .*)", shown)
    assert len(examples) == 6
    used = {export.parse(line.split()).to for line in examples[1:]}
    assert used <= set(export.FORMATS)
    assert all(f"\n    {name} " in shown for name in export.FORMATS)
