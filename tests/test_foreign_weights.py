"""Weights that people have: timm's and DeiT's training files, transformers, torchvision, DINOv2."""

import argparse
import json
import pathlib

import numpy as np
import pytest
import torch
import torchvision
from safetensors.torch import save_file
from torch.nn import functional as F

import evaluate
from options import compose
from tests.support.models import DEPTH, DIM, HEADS, assert_equal, model_of
from training import network, pretrained
from weights import families, hub, pickles
from weights.sources import Choice, read_source

CLASSES = 5
LIKE_DEIT = [f"model.vit.num_classes={CLASSES}", "model.vit.global_pool=token"]
IMAGE_BCHW = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module")
def dense():
    """A ViT whose tensors all differ, and what timm would save of it."""
    return model_of(*LIKE_DEIT, recipe="vit_tiny_patch8_64")[0]


def plus(weights, number):
    return {name: tensor + number for name, tensor in weights.items()}


def loaded(weights, *overrides):
    model, _ = model_of(*LIKE_DEIT, *overrides, recipe="vit_tiny_patch8_64")
    model.load_state_dict(weights, strict=True)
    return model


def read(path, which=None):
    return read_source(path, Choice(which))


def test_timms_training_checkpoint_is_read_with_its_arguments(dense, tmp_path, capsys):
    """What timm's train.py saves: Namespace, NumPy metric, two sets of weights, the optimizer."""
    weights = dense.state_dict()
    content = {
        "epoch": 3,
        "arch": "vit_tiny_patch8_64",
        "state_dict": weights,
        "state_dict_ema": plus(weights, 1),
        "optimizer": {"state": {0: {"step": torch.tensor(3.0)}}, "param_groups": [{"lr": 0.1}]},
        "version": 2,
        "args": argparse.Namespace(lr=0.1, opt_betas=None, out=pathlib.Path("a") / "b"),
        "metric": np.float64(76.5),
        "best": np.int64(3),
        "old": np.float32(1.5),
        "is": np.bool_(True),
    }
    torch.save(content, tmp_path / "x.pth.tar")
    found = read(tmp_path / "x.pth.tar")
    assert_equal(found.weights(), plus(weights, 1))
    found.print_notes()
    path = tmp_path / "x.pth.tar"
    assert capsys.readouterr().err == (
        f"note: {path}: took the weights in `state_dict_ema`, not `state_dict` "
        "(see --weights, init.weights)\n"
    )
    assert_equal(read(path, "model").weights(), weights)
    assert_equal(read(path, "ema").weights(), plus(weights, 1))


def test_plain_values_beside_weights_come_back_as_python_has_them(tmp_path):
    values = [np.float64(76.5), np.int64(-3), np.float32(1.5), np.bool_(True), np.uint8(200)]
    arguments = argparse.Namespace(lr=0.1, path=pathlib.Path("a/b"))
    torch.save({"values": values, "args": arguments}, tmp_path / "x.pth")
    found = pickles.read_pickle(tmp_path / "x.pth")
    assert found["values"] == [76.5, -3, 1.5, True, 200]
    assert [type(value) for value in found["values"]] == [float, int, float, bool, int]
    assert vars(found["args"]) == {"lr": 0.1, "path": "a/b"}


def test_a_run_begins_with_the_weights_that_init_weights_names(dense, tmp_path, monkeypatch):
    weights, path = dense.state_dict(), str(tmp_path / "x.pth")
    torch.save({"state_dict": weights, "state_dict_ema": plus(weights, 1)}, path)
    for which, number in ((None, 1), ("ema", 1), ("model", 0)):
        assert_equal(pretrained.read(path, which).weights, plus(weights, number))
    monkeypatch.chdir(tmp_path)
    with pytest.raises(
        ValueError, match=r"init\.weights=ema: timm's deit_tiny_patch16_224 has one"
    ):
        pretrained.read("deit_tiny_patch16_224", "ema")


@pytest.mark.parametrize("which", [None, "ema"])
def test_the_average_of_a_deit_checkpoint_is_taken_if_it_has_one(dense, tmp_path, which):
    weights = dense.state_dict()
    torch.save({"model": weights, "model_ema": plus(weights, 1)}, tmp_path / "x.pth")
    assert_equal(read(tmp_path / "x.pth", which).weights(), plus(weights, 1))
    torch.save({"model": weights, "scaler": {"scale": 1.0}}, tmp_path / "y.pth")
    assert_equal(read(tmp_path / "y.pth").weights(), weights)


def test_an_average_that_is_not_there_is_not_replaced_by_the_model(dense, tmp_path):
    torch.save({"model": dense.state_dict(), "epoch": 3}, tmp_path / "x.pth")
    message = r"has no weights in `state_dict_ema` .* \(it has: epoch, model\)"
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "x.pth", "ema")


PREFIXES = [
    "_orig_mod.",
    "module.",
    "_orig_mod.module.",
    "module._orig_mod.",
    "teacher.backbone.",
    "backbone.",
    "model.",
    "model.module.model.",
    "visual.",
    "module.base_encoder.",
    "encoder.",
]


@pytest.mark.parametrize("prefix", PREFIXES)
def test_a_prefix_in_any_nesting_is_taken_off(dense, tmp_path, prefix):
    weights = dense.state_dict()
    renamed = {f"{prefix}{name}": tensor for name, tensor in weights.items()}
    torch.save({"state_dict": renamed}, tmp_path / "x.pth")
    assert_equal(read(tmp_path / "x.pth").weights(), weights)


def test_blocks_compiled_one_by_one_lose_their_wrapper_too(dense):
    renamed = {
        name.replace("blocks.1.", "blocks.1._orig_mod."): tensor
        for name, tensor in dense.state_dict().items()
    }
    assert_equal(families.translate(renamed).weights, dense.state_dict())


def test_the_teacher_is_taken_of_a_teacher_and_its_student(dense):
    weights = dense.state_dict()
    names = {f"teacher.backbone.{name}": tensor for name, tensor in weights.items()}
    names |= {f"student.backbone.{name}": tensor + 1 for name, tensor in weights.items()}
    names["teacher.dino_head.mlp.0.weight"] = torch.ones(3, 3)
    found = families.translate(names)
    assert_equal(found.weights, weights)
    assert found.notes[0].startswith(
        "took the network whose names begin with teacher.backbone.; left out student.backbone."
    )


def test_a_head_beside_the_backbone_is_the_networks(dense):
    weights = dense.state_dict()
    names = {
        name if name.startswith("head.") else f"backbone.{name}": tensor
        for name, tensor in weights.items()
    }
    assert_equal(families.translate(names).weights, weights)


def test_two_networks_of_equal_standing_are_refused(dense):
    names = {f"{p}.{n}": t for p in ("a", "b") for n, t in dense.state_dict().items()}
    with pytest.raises(
        ValueError, match=r"several networks, whose names begin with a\., b\.: save"
    ):
        families.translate(names)


def transformers_forward(w, image_BCHW):
    """ViTForImageClassification in eval mode, from its parameters' names alone."""

    def linear(x, name):
        return F.linear(x, w[f"{name}.weight"], w[f"{name}.bias"])

    def norm(x, name):
        return F.layer_norm(x, (DIM,), w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    e = "vit.embeddings."
    patches = "patch_embeddings.projection"
    x = F.conv2d(image_BCHW, w[f"{e}{patches}.weight"], w[f"{e}{patches}.bias"], stride=8)
    x = torch.cat([w[f"{e}cls_token"].expand(len(x), 1, DIM), x.flatten(2).mT], 1)
    x = x + w[f"{e}position_embeddings"]
    for i in range(DEPTH):
        b = f"vit.encoder.layer.{i}."
        y, a = norm(x, b + "layernorm_before"), b + "attention.attention."
        q, k, v = (
            linear(y, a + part).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for part in ("query", "key", "value")
        )
        scores = q @ k.mT / (DIM // HEADS) ** 0.5
        y = (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)
        x = x + linear(y, b + "attention.output.dense")
        y = F.gelu(linear(norm(x, b + "layernorm_after"), b + "intermediate.dense"))
        x = x + linear(y, b + "output.dense")
    return linear(norm(x, "vit.layernorm")[:, 0], "classifier")


def transformers_weights(seed=0):
    """A state dict with the names and shapes of ViTForImageClassification."""
    hidden = 4 * DIM
    shapes = {
        "vit.embeddings.cls_token": (1, 1, DIM),
        "vit.embeddings.position_embeddings": (1, 17, DIM),
        "vit.embeddings.patch_embeddings.projection.weight": (DIM, 3, 8, 8),
        "vit.embeddings.patch_embeddings.projection.bias": (DIM,),
        "vit.layernorm.weight": (DIM,),
        "vit.layernorm.bias": (DIM,),
        "classifier.weight": (CLASSES, DIM),
        "classifier.bias": (CLASSES,),
    }
    for i in range(DEPTH):
        linears = {
            "attention.attention.query": (DIM, DIM),
            "attention.attention.key": (DIM, DIM),
            "attention.attention.value": (DIM, DIM),
            "attention.output.dense": (DIM, DIM),
            "intermediate.dense": (hidden, DIM),
            "output.dense": (DIM, hidden),
        }
        for name, shape in linears.items():
            shapes[f"vit.encoder.layer.{i}.{name}.weight"] = shape
            shapes[f"vit.encoder.layer.{i}.{name}.bias"] = shape[:1]
        for name in ("layernorm_before", "layernorm_after"):
            shapes[f"vit.encoder.layer.{i}.{name}.weight"] = (DIM,)
            shapes[f"vit.encoder.layer.{i}.{name}.bias"] = (DIM,)
    rng = torch.Generator().manual_seed(seed)
    return {name: 0.2 * torch.randn(shape, generator=rng) for name, shape in shapes.items()}


def test_a_vit_of_transformers_has_its_logits_here():
    theirs = transformers_weights()
    found = families.translate(theirs)
    logits = loaded(found.weights)(IMAGE_BCHW)
    torch.testing.assert_close(logits, transformers_forward(theirs, IMAGE_BCHW), rtol=0, atol=1e-5)


def test_what_a_vit_of_transformers_has_besides_is_left_out_and_said():
    theirs = transformers_weights()
    theirs["vit.embeddings.mask_token"] = torch.ones(1, 1, DIM)
    theirs["vit.pooler.dense.weight"] = torch.ones(DIM, DIM)
    found = families.translate(theirs)
    assert_equal(found.weights, families.translate(transformers_weights()).weights)
    assert "left out embeddings.mask_token, pooler.dense.weight" in found.notes


def test_a_query_without_its_key_is_refused():
    theirs = transformers_weights()
    del theirs["vit.encoder.layer.1.attention.attention.key.weight"]
    with pytest.raises(ValueError, match=r"layer\.1\.attention\.attention: query, key and value"):
        families.translate(theirs)


@torch.no_grad()
def test_a_vit_of_torchvision_has_its_logits_here():
    torch.manual_seed(0)
    theirs = torchvision.models.VisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=DEPTH,
        num_heads=HEADS,
        hidden_dim=DIM,
        mlp_dim=4 * DIM,
        num_classes=CLASSES,
    ).eval()
    for parameter in theirs.parameters():
        parameter.add_(0.1 * torch.randn(parameter.shape))
    found = families.translate(theirs.state_dict())
    logits = loaded(found.weights)(IMAGE_BCHW)
    torch.testing.assert_close(logits, theirs(IMAGE_BCHW), rtol=0, atol=1e-5)
    of_2021 = {
        name.replace("mlp.0.", "mlp.linear_1.").replace("mlp.3.", "mlp.linear_2."): tensor
        for name, tensor in theirs.state_dict().items()
    }
    assert_equal(families.translate(of_2021).weights, found.weights)


def test_the_decoder_of_a_mae_is_left_out_and_said(dense):
    weights = dense.state_dict()
    extra = {
        "mask_token": torch.ones(1, 1, 8),
        "decoder_pos_embed": torch.ones(1, 17, 8),
        "decoder_embed.weight": torch.ones(8, DIM),
        "decoder_blocks.0.norm1.weight": torch.ones(8),
        "decoder_pred.bias": torch.ones(8),
    }
    found = families.translate({**weights, **extra})
    assert_equal(found.weights, weights)
    names = "decoder_blocks.0.norm1.weight, decoder_embed.weight, decoder_pos_embed, "
    assert found.notes == (f"left out {names}decoder_pred.bias, mask_token",)


@torch.no_grad()
def test_dinov2_with_registers_computes_what_it_did():
    """Its registers come after the positions are added: cls + its position, registers, patches."""
    options = ["model.vit.reg_tokens=4", "model.vit.no_embed_class=true"]
    model, _ = model_of(*LIKE_DEIT, *options, recipe="vit_tiny_patch8_64")
    theirs = dict(model.state_dict())
    theirs["register_tokens"] = theirs.pop("reg_token")
    rng = torch.Generator().manual_seed(3)
    theirs["pos_embed"] = torch.randn(1, 17, DIM, generator=rng)
    theirs["mask_token"] = torch.zeros(1, DIM)
    chunked = {name.replace("blocks.", "blocks.0."): tensor for name, tensor in theirs.items()}
    found = families.translate(chunked)
    assert "the model needs model.vit.reg_tokens=4 model.vit.no_embed_class=true" in found.notes[1]
    ours = loaded(found.weights, *options)

    x = F.conv2d(
        IMAGE_BCHW, theirs["patch_embed.proj.weight"], theirs["patch_embed.proj.bias"], stride=8
    )
    x = torch.cat([theirs["cls_token"].expand(2, 1, DIM), x.flatten(2).mT], 1)
    x = x + theirs["pos_embed"]
    x = torch.cat([x[:, :1], theirs["register_tokens"].expand(2, 4, DIM), x[:, 1:]], 1)
    torch.testing.assert_close(ours.embed(IMAGE_BCHW), x, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("layers.0.blocks.0.attn.relative_position_bias_table", "Swin"),
        ("visual.transformer.resblocks.0.ln_1.weight", "CLIP"),
        ("blocks.0.attn.q_bias", "BEiT"),
        ("blocks.0.mlp.w12.weight", "a ViT with SwiGLU"),
        ("layer1.0.conv1.weight", "ResNet"),
    ],
)
def test_a_stranger_is_one_line_with_what_it_looks_like_and_the_way_out(tmp_path, name, family):
    torch.save({"state_dict": {name: torch.ones(2, 2)}}, tmp_path / "x.pth")
    message = rf"x\.pth: weights {name}: our ViT has no such parameters; they look like {family}"
    with pytest.raises(ValueError, match=rf"{message}.*docs/init\.md lists what is read"):
        read(tmp_path / "x.pth")


def test_a_stranger_under_a_prefix_is_told_by_its_prefix(tmp_path):
    names = {f"model.core.layer{i}.weight": torch.ones(2, 2) for i in range(8)}
    torch.save(names, tmp_path / "x.pth")
    message = (
        r"layer5\.weight and 2 more: .*; all names begin with model\.core\. \(0 of 8 are known"
    )
    with pytest.raises(ValueError, match=message):
        read(tmp_path / "x.pth")


CONFIG = {
    "architectures": ["ViTForImageClassification"],
    "model_type": "vit",
    "hidden_size": DIM,
    "num_hidden_layers": DEPTH,
    "num_attention_heads": HEADS,
    "intermediate_size": 4 * DIM,
    "hidden_act": "gelu",
    "image_size": 32,
    "patch_size": 8,
    "num_channels": 3,
    "layer_norm_eps": 1e-12,
    "qkv_bias": True,
}
PREPROCESSOR = {
    "image_mean": [0.5, 0.4, 0.3],
    "image_std": [0.2, 0.3, 0.4],
    "resample": 2,
    "do_center_crop": True,
    "size": {"shortest_edge": 40},
}


def transformers_folder(folder, **changed):
    folder.mkdir()
    save_file(transformers_weights(), folder / "model.safetensors")
    (folder / "config.json").write_text(json.dumps(CONFIG | changed))
    (folder / "preprocessor_config.json").write_text(json.dumps(PREPROCESSOR))
    return folder


def test_a_folder_of_transformers_needs_no_recipe(tmp_path, capsys):
    found = read(transformers_folder(tmp_path / "hf"))
    config = compose.restore(found.config, [])
    model = network.build_model(config, backend="torch", on_meta=False).eval()
    model.load_state_dict(found.weights(), strict=True)
    logits = transformers_forward(transformers_weights(), IMAGE_BCHW)
    torch.testing.assert_close(model(IMAGE_BCHW), logits, rtol=0, atol=1e-5)
    data = config.dataset
    assert (data.mean, data.std) == ([0.5, 0.4, 0.3], [0.2, 0.3, 0.4])
    assert (data.interpolation, data.val.crop_ratio) == ("bilinear", 0.8)
    found.print_notes()
    assert "LayerNorms have eps 1e-12, ours have 1e-06" in capsys.readouterr().err


def test_pytorch_model_bin_is_read_as_model_safetensors_is(tmp_path):
    first = read(transformers_folder(tmp_path / "hf"))
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(transformers_weights(), tmp_path / "hf" / "pytorch_model.bin")
    second = read(tmp_path / "hf")
    assert_equal(second.weights(), first.weights())
    assert second.config == first.config


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"hidden_act": "gelu_new"}, "config.json hidden_act='gelu_new': must be gelu"),
        ({"num_attention_heads": "3"}, "config.json num_attention_heads='3': must be a whole"),
        ({"patch_size": 0}, "config.json patch_size=0: must be a whole number from 1"),
    ],
)
def test_a_network_of_transformers_that_ours_is_not_is_refused(tmp_path, changed, message):
    with pytest.raises(ValueError, match=message):
        read(transformers_folder(tmp_path / "hf", **changed))


WITHOUT = "vit_tiny_patch8_64"
SIZES = ["model.vit.img_size=32", f"model.vit.embed_dim={DIM}", f"model.vit.depth={DEPTH}"]
SIZES += [f"model.vit.num_heads={HEADS}"]


@pytest.mark.parametrize(
    ("made", "given", "needed"),
    [
        (["model.vit.distilled=true"], [], "model.vit.distilled=true"),
        (["model.vit.reg_tokens=2"], [], "model.vit.reg_tokens=2"),
        ([], ["model.vit.num_classes=7"], "model.vit.num_classes=5"),
        (["model.vit.global_pool=avg"], [], "model.vit.global_pool=avg"),
        (["model.vit.init_values=0.1"], [], "model.vit.init_values=1e-5"),
        ([], ["model.vit.qk_norm=true"], "model.vit.qk_norm=false"),
    ],
)
def test_evaluate_names_the_option_that_a_file_needs(tmp_path, capsys, made, given, needed):
    """A distilled DeiT under a recipe without `distilled`, and its like."""
    model, _ = model_of(*LIKE_DEIT, *made, recipe=WITHOUT)
    torch.save(model.state_dict(), tmp_path / "x.pth")
    words = [str(tmp_path / "x.pth"), "--config-name", WITHOUT, *SIZES, *LIKE_DEIT, *given]
    assert evaluate.main(words) == 2
    assert capsys.readouterr().err.rstrip().endswith(f"; it may be one with {needed}")


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_names_of_classes_are_read_with_or_without_a_mark_and_errors_name_the_file(
    tmp_path, encoding
):
    (tmp_path / "names.txt").write_text("ant\nb\u00e9e\n", encoding)
    if encoding == "utf-16":
        with pytest.raises(ValueError, match=r"--names .*names\.txt: must be UTF-8 text"):
            evaluate.read_names(tmp_path / "names.txt", 2, ())
    else:
        assert evaluate.read_names(tmp_path / "names.txt", 2, ()) == ["ant", "b\u00e9e"]


def test_a_name_without_end_is_shown_in_part(tmp_path):
    torch.save({"a" * 10**5: torch.ones(2, 2)}, tmp_path / "x.pth")
    with pytest.raises(ValueError, match=r"weights a{200}\.\.\.: our ViT has no such") as caught:
        read(tmp_path / "x.pth")
    assert len(str(caught.value)) < 1000


@pytest.mark.parametrize(
    ("said", "crop_ratio"),
    [
        ({"size": 256, "crop_size": 224, "do_center_crop": True}, 0.875),
        ({"size": {"height": 256, "width": 256}, "crop_size": 224, "do_center_crop": True}, 0.875),
        ({"size": {"shortest_edge": 248}, "do_center_crop": True}, 224 / 248),
        ({"size": {"height": 224, "width": 224}}, 1.0),
    ],
)
def test_a_preprocessors_crop_is_ours(said, crop_ratio):
    assert hub._images(said, 224)["val"] == {"crop_ratio": crop_ratio}


def test_a_preprocessor_that_normalises_nothing_is_followed():
    found = hub._images({"do_normalize": False, "image_mean": [0.5] * 3, "image_std": [0.5] * 3}, 8)
    assert (found["mean"], found["std"]) == ([0.0] * 3, [1.0] * 3)


def test_layer_scales_of_deit_iii_have_our_names():
    weights = {"patch_embed.proj.weight": torch.ones(2, 3, 4, 4), "blocks.0.gamma_2": torch.ones(2)}
    assert "blocks.0.ls2.gamma" in families.translate(weights).weights
