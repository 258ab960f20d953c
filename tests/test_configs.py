"""Every recipe composes, and every mistake stops before the first step with one line."""

import ast
import dataclasses
import functools
import inspect
import os
import re
import shlex
import subprocess
import sys

import pytest
import timm
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode

import moe
import train
from layers import te
from options import checks, compose, schema
from options.schema import DistillationOptions, InitOptions, MoEOptions
from parallel import collectives
from training import network, prepare, stopping

ROOT = compose.CONFIG_DIR.parent
FILES = sorted(compose.CONFIG_DIR.glob("*.yaml"))
NAMES = [path.stem for path in FILES]
IMAGENET = [name for name in NAMES if not name.endswith("_64")]
IMAGENET_IMAGES = 1_281_167
# M3ViT's presets: heads, experts, experts per token, their mlp_ratio, moe_cv_weight.
M3VIT = {
    "deit_moe_tiny": (3, 16, 2, 2.0, 0.01),
    "deit_moe_small": (12, 16, 4, 1.0, 0.005),
    "deit_moe_base": (12, 16, 2, 2.0, 0.01),
    "vmoe_style_moe_tiny": (3, 8, 2, 2.0, 0.005),
    "vmoe_style_moe_small": (6, 8, 2, 2.0, 0.005),
    "vmoe_style_moe_base": (12, 8, 2, 2.0, 0.005),
}
# DeiT's, for other pixels: the recipe before, its pixels, those after, stochastic depth, top-1.
TUNED = {
    "deit_base_ft384": ("deit_base", 224, 384, 0.0, 82.9),
    "deit3_base_ft224": ("deit3_base", 192, 224, 0.2, 83.8),
    "deit3_large_ft224": ("deit3_large", 192, 224, 0.45, 84.9),
    "deit3_huge_ft224": ("deit3_huge", 154, 224, 0.55, 85.2),
    "deit3_small_ft384": ("deit3_small", 224, 384, 0.0, 83.4),
    "deit3_base_ft384": ("deit3_base", 192, 384, 0.15, 85.0),
    "deit3_large_ft384": ("deit3_large", 192, 384, 0.4, 85.8),
}
TUNED_DEIT3 = [name for name in TUNED if name.startswith("deit3")]
DISTILLED_TOP1 = {"deit_tiny": 74.5, "deit_small": 81.2, "deit_base": 83.4}
SMALL = ["model.vit.depth=1", "model.vit.embed_dim=48", "device=cpu", "dataset.num_workers=0"]


def head(name):
    """The comment at the top of a recipe, as one string without the comment signs."""
    lines = (compose.CONFIG_DIR / f"{name}.yaml").read_text().splitlines()
    first = next((i for i, line in enumerate(lines) if not line.startswith("#")), len(lines))
    return "\n".join(line.removeprefix("#").removeprefix(" ") for line in lines[:first])


def command(text):
    """The words of the first torchrun command in `text`, with 8 GPUs."""
    start = text[text.index("torchrun") :].replace("\\\n", " ").splitlines()[0]
    return shlex.split(start.replace("${NGPU}", "8"))


def arguments(words):
    return words[words.index("train.py") + 1 :]


def built(name):
    return network.build_model(compose.compose(name, []), backend="torch", on_meta=True)


def refusal(overrides, name="vit_base_patch16_224"):
    """The message that stops these overrides, where only the options and the model are needed."""
    with pytest.raises((ValueError, FileNotFoundError)) as caught:
        network.build_model(compose.compose(name, overrides), backend="torch", on_meta=True)
    message = str(caught.value)
    assert "\n" not in message
    return message


def count(parameters):
    return sum(parameter.numel() for parameter in parameters)


def expert_layers(model):
    return [module for module in model.modules() if isinstance(module, moe.MoE)]


def count_active(model):
    """The parameters that work on one token: of each layer's E experts, k."""
    total = count(model.parameters())
    for layer in expert_layers(model):
        num_experts, top_k = layer.router.options.num_experts, layer.router.options.top_k
        total -= count(layer.experts.parameters()) // num_experts * (num_experts - top_k)
    return total


def test_there_is_a_recipe_of_every_size():
    sizes = ["tiny_patch16", "small_patch16", "base_patch16", "large_patch16"]
    wanted = [f"vit_{kind}{size}_224" for kind in ("", "moe_") for size in sizes]
    deit = [*DISTILLED_TOP1, *(f"{name}_distilled" for name in DISTILLED_TOP1)]
    deit3 = [f"deit3_{size}" for size in ("small", "base", "large", "huge")]
    wanted += ["vit_huge_patch14_224", *M3VIT, *deit, *deit3, *TUNED]
    assert [name for name in wanted if name not in NAMES] == []


@functools.cache
def flops(name):
    return network.flops_per_image(compose.compose(name, []))


@pytest.mark.parametrize("name", NAMES)
def test_recipe_builds_and_comment_has_its_true_size(name):
    model = built(name)
    comment = head(name)
    num_parameters, gflops = (
        re.search(rf"([\d,.]+) {unit}\b", comment) for unit in ("parameters", "GFLOPs")
    )
    assert num_parameters, "the head comment must say: <number> parameters"
    assert gflops, "the head comment must say: <number> GFLOPs"
    assert int(num_parameters[1].replace(",", "")) == count(model.parameters())
    assert float(gflops[1]) == pytest.approx(flops(name) / 1e9, abs=0.006)


@pytest.mark.parametrize("name", [name for name in IMAGENET if "moe" in name])
def test_comment_has_the_true_number_of_active_parameters(name):
    number = re.search(r"([\d,]+) active per token", head(name))
    assert number, "the head comment must say: <number> active per token"
    assert int(number[1].replace(",", "")) == count_active(built(name))


@pytest.mark.parametrize("size", ["tiny", "small", "base", "large"])
def test_experts_are_all_that_differs_from_the_dense_recipe(size):
    sparse, dense = (compose.compose(f"vit_{kind}{size}_patch16_224", []) for kind in ("moe_", ""))
    path = dense.training.checkpoint.path.replace("vit_", "vit_moe_")
    folder = dataclasses.replace(dense.training.checkpoint, path=path)
    assert sparse == dataclasses.replace(
        dense,
        model=dataclasses.replace(dense.model, moe=sparse.model.moe),
        training=dataclasses.replace(dense.training, checkpoint=folder),
    )


@pytest.mark.parametrize("name", [name for name in IMAGENET if "moe" in name])
def test_token_costs_what_it_costs_in_the_dense_model_and_the_routers(name):
    config, model = compose.compose(name, []), built(name)
    model_options = dataclasses.replace(config.model, moe=MoEOptions())
    dense = network.flops_per_image(dataclasses.replace(config, model=model_options))
    routers = sum(2 * count(layer.router.parameters()) for layer in expert_layers(model))
    num_tokens = model.options.num_tokens_in_training
    assert flops(name) == dense + num_tokens * routers


@pytest.mark.parametrize("name", [name for name in IMAGENET if "moe" in name])
def test_expert_parallelism_takes_one_option(name):
    words = arguments(command(head(name)))
    assert "distributed.ep=2" in words
    without = train.parse([word for word in words if word != "distributed.ep=2"])
    assert without.distributed.ep == 1
    spread = dataclasses.replace(without.distributed, ep=2)
    assert train.parse(words) == dataclasses.replace(without, distributed=spread)


@pytest.mark.parametrize("name", M3VIT)
def test_preset_of_m3vit_has_its_values(name):
    config = compose.compose(name, [])
    num_heads, num_experts, top_k, ratio, cv_weight = M3VIT[name]
    assert config.model.vit.num_heads == num_heads
    assert config.model.moe == MoEOptions(
        num_experts=num_experts,
        top_k=top_k,
        every_n=2,
        mlp_ratio=ratio,
        router="noisy",
        noise_std=1.0,
        importance_coef=cv_weight,
        load_coef=cv_weight,
        switch_coef=0.0,
    )
    assert all(
        hasattr(block.mlp, "experts") == (i % 2 == 1) for i, block in enumerate(built(name).blocks)
    )


@pytest.mark.parametrize("name", M3VIT)
def test_schedule_of_m3vit_is_in_steps_and_for_this_batch(name):
    config = compose.compose(name, [])
    batch = int(re.search(r"at batch (\d+)", head(name))[1])
    is_deit = name.startswith("deit")
    # Its learning rate grows with the batch, or unscale_lr keeps it.
    lr = 5e-4 * batch / 512 if is_deit else 8e-4 if name.endswith("base") else 1e-3
    assert config.optimizer.lr == pytest.approx(lr)
    warmup_epochs = 5 if is_deit else 10
    steps = warmup_epochs * IMAGENET_IMAGES / batch
    assert config.optimizer.warmup_steps == pytest.approx(steps, abs=1)
    assert config.optimizer.weight_decay == (0.05 if is_deit else 0.1)
    assert config.optimizer.clip_norm == (None if is_deit else 1.0)
    assert config.model.vit.drop_path_rate == (0.1 if is_deit else 0.0)
    assert config.training.label_smoothing == (0.1 if is_deit else 0.0)


@pytest.mark.parametrize("name", M3VIT)
def test_augmentation_of_m3vit_is_its(name):
    train = compose.compose(name, []).dataset.train
    is_deit = name.startswith("deit")
    assert train.auto_augment == f"rand-m{9 if is_deit else 10}-mstd0.5-inc1"
    assert (train.reprob, train.remode, train.recount) == (0.25 if is_deit else 0, "pixel", 1)
    assert train.repeats == (3 if is_deit else 1)
    assert (train.mixup, train.cutmix) == ((0.8, 1.0) if is_deit else (0.2, 0.0))
    assert train.color_jitter == 0


def published(name):
    """The values of DeiT's recipes that its repository and papers give: training, model, data."""
    config = compose.compose(name, [])
    o, t, vit, data = config.optimizer, config.training, config.model.vit, config.dataset.train
    batch = 8 * data.batch_size * t.grad_accum_steps
    epoch = IMAGENET_IMAGES // 256 * 256 // batch
    assert (o.min_lr, o.warmup_lr, o.warmup_prefix, o.layer_decay) == (1e-5, 1e-6, False, None)
    assert (o.weight_decay, o.betas, o.eps) == (0.05, [0.9, 0.999], 1e-8)
    assert (o.warmup_steps / epoch, data.repeats, data.mixup, data.cutmix) == (5, 3, 0.8, 1.0)
    assert (data.crop, data.crop_scale, data.hflip) == ("rrc", [0.08, 1.0], 0.5)
    assert (data.mixup_prob, data.mixup_switch_prob, data.mixup_mode) == (1.0, 0.5, "batch")
    assert (config.dataset.interpolation, data.interpolation) == ("bicubic", None)
    return {
        "schedule": (t.steps / epoch, batch, checks.peak_lr(config, batch)),
        "optimizer": (o.name, o.clip_norm),
        "loss": (t.loss, t.bce_threshold, t.label_smoothing),
        "augmentation": (data.auto_augment, data.color_jitter, data.reprob),
        "image": (vit.img_size, vit.patch_size, config.dataset.val.crop_ratio),
        "size": (vit.embed_dim, vit.depth, vit.num_heads),
        "drop_path": (vit.drop_path_rate, vit.drop_path_uniform),
        "other": (vit.init_values, vit.no_embed_class, vit.qkv_bias),
    }


@pytest.mark.parametrize(
    ("name", "size"),
    [("deit_tiny", (192, 12, 3)), ("deit_small", (384, 12, 6)), ("deit_base", (768, 12, 12))],
)
def test_recipe_of_deit_has_its_values(name, size):
    assert published(name) == {
        "schedule": (300, 1024, 1e-3),
        "optimizer": ("adamw", None),
        "loss": ("ce", None, 0.1),
        "augmentation": ("rand-m9-mstd0.5-inc1", 0, 0.25),
        "image": (224, 16, 0.875),
        "size": size,
        "drop_path": (0.1, False),
        "other": (None, False, True),
    }


@pytest.mark.parametrize(
    ("name", "lr", "size", "image", "drop_path"),
    [
        ("deit3_small", 4e-3, (384, 12, 6), (224, 16), 0.05),
        ("deit3_base", 3e-3, (768, 12, 12), (192, 16), 0.2),
        ("deit3_large", 3e-3, (1024, 24, 16), (192, 16), 0.45),
        ("deit3_huge", 3e-3, (1280, 32, 16), (154, 14), 0.6),  # of 160 pixels 154 are seen
    ],
)
def test_recipe_of_deit_3_has_its_values(name, lr, size, image, drop_path):
    assert published(name) == {
        "schedule": (800, 2048, lr),
        "optimizer": ("lamb", 1.0),
        "loss": ("bce", 0.0, 0.0),
        "augmentation": ("3aug", 0.3, 0.0),
        "image": (*image, 1.0),
        "size": size,
        "drop_path": (drop_path, True),
        "other": (1e-4, True, True),
    }


@pytest.mark.parametrize("name", TUNED_DEIT3)
def test_fine_tuning_of_deit_3_has_its_values(name):
    source, px_before, px, drop_path, top1 = TUNED[name]
    before, tuned = compose.compose(source, []), compose.compose(name, [])
    o, t, data = tuned.optimizer, tuned.training, tuned.dataset.train
    assert before.model.vit.img_size == px_before
    vit = dataclasses.replace(
        before.model.vit,
        img_size=px,
        drop_path_rate=drop_path,
        drop_path_uniform=drop_path > 0,  # uniform or not, no depth is dropped at 0
    )
    assert tuned.model == dataclasses.replace(before.model, vit=vit)
    assert tuned.init == InitOptions(checkpoint=before.training.checkpoint.path)
    batch = 8 * data.batch_size * t.grad_accum_steps
    assert (batch, round(t.steps * batch / IMAGENET_IMAGES, 3)) == (512, 20)
    assert round(o.warmup_steps * batch / IMAGENET_IMAGES, 3) == 5
    assert (o.name, o.lr, o.base_batch, o.clip_norm) == ("adamw", 1e-5, None, None)
    assert (o.warmup_lr, o.min_lr, o.weight_decay, o.layer_decay) == (1e-6, 1e-5, 0.1, None)
    assert (t.loss, t.label_smoothing, t.ema_decay) == ("ce", 0.1, None)
    assert (data.auto_augment, data.color_jitter) == ("rand-m9-mstd0.5-inc1", 0)
    assert (data.reprob, data.repeats, data.mixup, data.cutmix) == (0, 1, 0.8, 1.0)
    assert (data.crop, data.crop_scale, tuned.dataset.val.crop_ratio) == ("rrc", [0.08, 1.0], 1.0)
    assert f"Top-1: {top1} % (README_revenge.md)" in head(name)


@pytest.mark.parametrize(("size", "ranks"), [("base", 16), ("large", 32)])
def test_microbatches_at_384_are_those_of_deit_3(size, ranks):
    """Mixup draws once per rank and microbatch."""
    config = compose.compose(f"deit3_{size}_ft384", [])
    accum = config.training.grad_accum_steps
    assert (8 * accum, 8 * accum * config.dataset.train.batch_size) == (ranks, 512)
    assert f"where it is {ranks} ranks of {512 // ranks}" in one_line(f"deit3_{size}_ft384")


def test_fine_tuning_of_deit_at_384_has_its_values():
    source, px_before, px, drop_path, top1 = TUNED["deit_base_ft384"]
    before, tuned = compose.compose(source, []), compose.compose("deit_base_ft384", [])
    o, t, data = tuned.optimizer, tuned.training, tuned.dataset.train
    assert (before.model.vit.img_size, before.model.vit.drop_path_uniform) == (px_before, False)
    vit = dataclasses.replace(before.model.vit, img_size=px, drop_path_rate=drop_path)
    assert tuned.model == dataclasses.replace(before.model, vit=vit)
    assert tuned.init == InitOptions(checkpoint=before.training.checkpoint.path)
    batch = 8 * data.batch_size * t.grad_accum_steps
    epoch = IMAGENET_IMAGES // 256 * 256 // batch
    assert (batch, t.steps / epoch, o.warmup_steps / epoch) == (512, 30, 5)
    assert (o.lr, o.base_batch, o.min_lr, o.warmup_lr) == (5e-6, None, 5e-6, 1e-6)
    assert (o.name, o.betas, o.eps, o.weight_decay) == ("adamw", [0.9, 0.999], 1e-8, 1e-8)
    assert (o.clip_norm, o.layer_decay) == (None, None)
    assert (t.loss, t.label_smoothing, t.ema_decay) == ("ce", 0.1, 0.99996)
    assert (data.auto_augment, data.color_jitter) == ("rand-m9-mstd0.5-inc1", 0)
    assert (data.reprob, data.repeats, data.mixup, data.cutmix) == (0.25, 3, 0.8, 1.0)
    assert (data.remode, data.recount) == ("pixel", 1)
    assert (data.crop, data.crop_scale, tuned.dataset.val.crop_ratio) == ("rrc", [0.08, 1.0], 0.875)
    assert f"Top-1: {top1} % in its repository" in head("deit_base_ft384")
    assert "--no-train-mode" in head("deit_base_ft384")


@pytest.mark.parametrize("name", DISTILLED_TOP1)
def test_a_teacher_is_all_that_differs_from_the_recipe_without(name):
    plain, distilled = (compose.compose(f"{name}{end}", []) for end in ("", "_distilled"))
    vit = dataclasses.replace(plain.model.vit, distilled=True)
    folder = dataclasses.replace(
        plain.training.checkpoint, path=f"{plain.training.checkpoint.path}_distilled"
    )
    assert distilled == dataclasses.replace(
        plain,
        model=dataclasses.replace(plain.model, vit=vit),
        training=dataclasses.replace(plain.training, checkpoint=folder),
        distillation=DistillationOptions(
            kind="hard", teacher="regnety_160.deit_in1k", teacher_checkpoint=None, alpha=0.5
        ),
    )
    assert f"Top-1: {DISTILLED_TOP1[name]} % in the paper" in head(f"{name}_distilled")


@pytest.mark.parametrize("name", DISTILLED_TOP1)
def test_teacher_of_deit_has_weights_for_its_images_and_classes(name):
    config = compose.compose(f"{name}_distilled", [])
    teacher = config.distillation.teacher
    assert teacher in timm.list_pretrained("regnety_160*")
    trained = timm.get_pretrained_cfg(teacher)
    assert list(trained.mean) == config.dataset.mean
    assert list(trained.std) == config.dataset.std
    assert trained.num_classes == config.model.vit.num_classes
    assert trained.input_size == (3, config.model.vit.img_size, config.model.vit.img_size)
    assert f"timm downloads the weights of the teacher, which is its {teacher}" in one_line(
        f"{name}_distilled"
    )


def one_line(name):
    return head(name).replace("\n", " ")


def images_seen(name):
    """By the network in a whole run: each augmented image once."""
    t, data = compose.compose(name, []).training, compose.compose(name, []).dataset.train
    words = command(head(name))
    num_ranks = int(words[words.index("--nproc-per-node") + 1])
    return t.steps * t.grad_accum_steps * data.batch_size * num_ranks


def teacher_flops(name):
    """Of the teacher's forward pass over one image; 0 without."""
    config = compose.compose(name, [])
    if config.distillation.kind == "none":
        return 0
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        teacher = timm.create_model(config.distillation.teacher).eval()
        teacher(torch.empty(1, 3, config.model.vit.img_size, config.model.vit.img_size))
    return counter.get_total_flops()


@functools.cache
def exaflops(name):
    """What a whole run computes: a backward pass takes twice its forward pass."""
    per_image = 3 * flops(name) + teacher_flops(name)
    return per_image * images_seen(name) / 1e18


@pytest.mark.slow  # all of them together
@pytest.mark.parametrize("name", IMAGENET)
def test_cost_of_a_recipe_is_counted(name):
    assert f"Cost: {exaflops(name):.1f} EFLOPs, " in one_line(name)


@pytest.mark.parametrize("name", TUNED)
def test_cost_of_fine_tuning_is_compared_with_that_of_training(name):
    tuning, training = exaflops(name), exaflops(TUNED[name][0])
    wanted = f"EFLOPs, {100 * tuning / training:.1f} % of the {training:.1f} of"
    assert wanted in one_line(name)


@pytest.mark.parametrize("name", DISTILLED_TOP1)
def test_cost_of_distillation_says_what_the_teacher_takes(name):
    name = f"{name}_distilled"
    of_teacher = teacher_flops(name)
    whole, teachers = exaflops(name), of_teacher * images_seen(name) / 1e18
    wanted = (
        f"Cost: {whole:.1f} EFLOPs, of which {whole - teachers:.1f} are the student's and "
        f"{teachers:.1f} the teacher's, whose forward pass has {of_teacher / 1e9:.2f} GFLOPs"
    )
    assert wanted in one_line(name)


@pytest.mark.parametrize("name", NAMES)
def test_recipe_leaves_out_nothing_that_there_is_an_option_for(name):
    for words in ("RandAugment", "random erasing", "repeated augmentation", "no options yet"):
        left_out = head(name).replace("\n", " ").partition("Left out")[2].partition(". ")[0]
        assert words not in left_out


@pytest.mark.parametrize("name", NAMES)
def test_recipe_has_its_own_run_folder(name):
    assert compose.compose(name, []).training.checkpoint.path == f"./ckpts/{name}"


@pytest.mark.parametrize("name", IMAGENET)
def test_comment_of_imagenet_recipe_is_true(name):
    comment, config = head(name), compose.compose(name, [])
    words = command(comment)
    num_ranks = int(words[words.index("--nproc-per-node") + 1])
    epochs, batch = map(int, re.search(r"(\d+) epochs at batch (\d+)", comment).groups())
    per_rank = config.dataset.train.batch_size * config.training.grad_accum_steps
    assert per_rank * num_ranks == batch
    if config.dataset.train.repeats > 1:  # its epochs are whole updates
        assert config.training.steps == epochs * (IMAGENET_IMAGES // 256 * 256 // batch)
    else:
        assert config.training.steps == pytest.approx(epochs * IMAGENET_IMAGES / batch, abs=1)
    assert config.dataset.train.root == "data/imagenet"


@pytest.mark.parametrize("name", [name for name in NAMES if "torchrun" in head(name)])
def test_command_in_comment_starts_this_recipe(name):
    words = command(head(name))
    assert train.parse(arguments(words)).training.checkpoint.path == f"./ckpts/{name}"


@pytest.mark.parametrize("number", range(train.__doc__.count("torchrun")))
def test_command_in_usage_composes(number):
    start = [match.start() for match in re.finditer("torchrun", train.__doc__)][number]
    train.parse(arguments(shlex.split(" ".join(command(train.__doc__[start:])), comments=True)))


def test_documented_launch_line_composes():
    line = (
        "torchrun --nproc-per-node ${NGPU} train.py --config-name vit_base_patch16_224 "
        "distributed.dp_shard=${NGPU} training.checkpoint.path=./ckpts/vit"
    )
    config = train.parse(arguments(command(line)))
    assert config.distributed.dp_shard == 8
    assert config.training.checkpoint.path == "./ckpts/vit"


def test_te_recipe_is_the_base_recipe_by_another_backend():
    te, base = (compose.compose(f"vit_{name}_patch16_224", []) for name in ("te_base", "base"))
    assert te.model.backend == "te"
    assert dataclasses.replace(te.model, backend="auto") == base.model
    assert (te.dataset, te.optimizer) == (base.dataset, base.optimizer)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (["model.vit.detph=3"], ["model.vit.detph", "no such option", "model.vit.depth"]),
        (["bogus=1"], ["bogus", "no such option", "optimizer"]),
        (["+model.vit.foo=1"], ["+model.vit.foo=1", "name=value"]),
        (["~optimizer"], ["optimizer", "~"]),
        (["model.vit.depth=abc"], ["model.vit.depth=abc", "a whole number"]),
        (["training.steps=1.5"], ["training.steps=1.5", "a whole number"]),
        (["optimizer.betas=0.9"], ["optimizer.betas", "list"]),
        (["optimizer.betas=[0.9,x]"], ["optimizer.betas=[0.9,x]", "a list of numbers"]),
        (["model=foo"], ["model", "foo"]),
        (["training.steps"], ["training.steps"]),
        (["model.vit.depth=0"], ["model.vit.depth=0", "at least 1"]),
        (["distributed.tp=2"], ["distributed.tp=2", "at most 1"]),
        (["optimizer.lr=-1"], ["optimizer.lr=-1", "at least 0"]),
        (["optimizer.lr=nan"], ["optimizer.lr=nan", "finite"]),
        (["optimizer.min_lr=1"], ["optimizer.min_lr=1.0", "at most lr=0.001"]),
        (["optimizer.warmup_steps=9", "training.steps=5"], ["warmup_steps=9", "training.steps=5"]),
        (["optimizer.betas=[0.9]"], ["optimizer.betas=[0.9]", "2 values"]),
        (["optimizer.name=lion"], ["optimizer.name=lion", "adamw, sgd, lamb"]),
        (["dataset.train.crop_scale=[1,0.5]"], ["crop_scale=[1.0, 0.5]", "[lowest, highest]"]),
        (["dataset.std=[0,0,0]"], ["dataset.std=0.0", "at least 1e-06"]),
        (
            ["dataset.train.crop_scale=[[1,2],[3,4]]"],
            ["crop_scale=[[1,2],[3,4]]", "a list of numbers"],
        ),
        (["model.vit.img_size=null"], ["model.vit.img_size=null", "[height, width]"]),
        (["model.vit.patch_size=null"], ["model.vit.patch_size=null", "[height, width]"]),
        (["device=tpu"], ["device=tpu", "auto, cpu, cuda"]),
        (["fsdp.zero_dp_strategy=7"], ["fsdp.zero_dp_strategy=7", "0, 1, 2, 3"]),
        (["fsdp.zero_dp_strategy=all"], ["fsdp.zero_dp_strategy=all", "optim_grads_params"]),
        (["fsdp.zero_dp_strategy=true"], ["fsdp.zero_dp_strategy=true", "0, 1, 2, 3"]),
        (["fsdp.outer_dp_sharding_strategy=optim"], ["=optim", "distributed.dp_outer > 1"]),
        (
            ["model.te_fp8=delayed", "model.backend=torch"],
            ["model.te_fp8=delayed", "backend=torch"],
        ),
        (["model.te_fp8=mx"], ["model.te_fp8=mx", "null, delayed, current"]),
        (["model.vit.img_size=220"], ["model.vit.img_size=220", "patch_size=16", "208 or 224"]),
        (["model.vit.img_size=[224,220]"], ["model.vit.img_size", "220", "patch_size=16"]),
        (["model.vit.img_size=big"], ["model.vit.img_size=big", "[height, width]"]),
        (["model.vit.num_heads=5"], ["model.vit.num_heads=5", "embed_dim=768"]),
        (["model.vit.global_pool=sum"], ["model.vit.global_pool=sum", "token", "avg"]),
        (["model.vit.pos_embed=rope"], ["model.vit.pos_embed=rope", "learn, sincos, none"]),
        (["model.vit.in_chans=1"], ["model.vit.in_chans=1", "3"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value[0], str) else None,
)
def test_mistake_is_named_with_value_and_what_is_allowed(overrides, parts):
    message = refusal(overrides)
    assert message.startswith("config")
    assert [part for part in parts if part not in message] == [], message


def test_missing_recipe_lists_those_there_are():
    message = refusal([], name="vit_giant")
    assert "vit_giant.yaml" in message
    assert all(name in message for name in NAMES)


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("defaults: [schema, _self_]\nmodel: {vit: {detph: 3}}\n", ["model.vit.detph"]),
        ("defaults: [schema, _self_]\nmodel: {vit: {depth: x}}\n", ["model.vit.depth", "Integer"]),
        ("defaults: [schema, other, _self_]\n", ["other"]),
        ("defaults: [schema, _self_]\nmodel: {vit: [\n", ["mine.yaml"]),
        ("model: {vit: {depth: 3}}\n", ["mine", "schema"]),
    ],
    ids=["unknown key", "wrong type", "unknown default", "broken YAML", "no schema"],
)
def test_mistake_in_a_file_is_one_line(tmp_path, text, parts):
    (tmp_path / "mine.yaml").write_text(text)
    with pytest.raises(ValueError, match="config") as caught:
        compose.compose("mine", [], config_dir=tmp_path)
    message = str(caught.value)
    assert "\n" not in message
    assert [part for part in parts if part not in message] == [], message


def _refused_by_prepare(world, overrides):
    """The message of `assemble.prepare`, which is all that runs before the first step."""
    config = compose.compose("vit_tiny_patch8_64", [*SMALL, *overrides])
    try:
        prepare.prepare(config, world)
    except (ValueError, FileNotFoundError) as error:
        return str(error)
    return "prepared"


def make_dataset(root, *, num_classes):
    """A dataset of one image per class and split."""
    for split in ("train", "val"):
        for label in range(num_classes):
            path = root / split / f"n{label:08}" / "image.JPEG"
            path.parent.mkdir(parents=True)
            Image.new("RGB", (64, 64), (label, 0, 0)).save(path)


@pytest.mark.parametrize(
    ("overrides", "parts"),
    [
        (
            ["distributed.dp_shard=3"],
            ["dp_outer=1 * dp_shard=3 * ep=1 = 3", "world size 2"],
        ),
        (["distributed.dp_outer=3"], ["dp_outer=3", "world size 2"]),
        (["dataset.train.root=./missing"], ["dataset", "missing", "allowed"]),
        (["model.backend=te"], ["model.backend=te", "device is cpu", "auto"]),
        (["model.te_fp8=delayed"], ["model.te_fp8=delayed", "needs backend te"]),
    ],
    ids=lambda value: value[0] if len(value) == 1 else None,
)
def test_mistake_that_only_a_run_shows_is_one_line_on_every_rank(ranks, overrides, parts):
    messages = ranks(2, _refused_by_prepare, overrides)
    for message in messages:
        assert message.startswith("config")
        assert "\n" not in message
        assert [part for part in parts if part not in message] == [], message


def test_number_of_classes_must_be_that_of_the_dataset(ranks, tmp_path):
    make_dataset(tmp_path, num_classes=2)
    (message,) = ranks(1, _refused_by_prepare, [f"dataset.train.root={tmp_path}"])
    assert "config model.vit.num_classes=5: must be 2" in message
    assert str(tmp_path) in message


def test_dataset_with_the_right_classes_is_prepared(ranks, tmp_path):
    make_dataset(tmp_path, num_classes=5)
    assert ranks(1, _refused_by_prepare, [f"dataset.train.root={tmp_path}"]) == ["prepared"]


def _require_equal_message(world):
    text = compose.to_yaml(compose.compose("vit_tiny_patch8_64", [f"training.seed={world.rank}"]))
    try:
        collectives.require_equal("config", text)
    except ValueError as error:
        return str(error)
    return "equal"


def test_options_that_differ_between_ranks_are_one_line(ranks):
    for message in ranks(2, _require_equal_message):
        assert "\n" not in message
        assert "seed: 1" in message


def test_missing_transformer_engine_ends_the_command_with_one_line(monkeypatch, capsys):
    def no_engine():
        raise ImportError("config model.backend=te: no such library")

    monkeypatch.setattr(te, "transformer_engine", no_engine)
    cuda = torch.device("cuda")
    monkeypatch.setattr(train, "parse", lambda _: te.resolve_backend("te", cuda))
    assert train.main([]) == stopping.EXIT_USER_ERROR
    (line,) = capsys.readouterr().err.splitlines()
    assert "config model.backend=te" in line


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["model.vit.detph=3"], "config model.vit.detph: no such option"),
        (["--config-name", "vit_giant"], "vit_giant.yaml: not found"),
    ],
    ids=["unknown option", "unknown recipe"],
)
def test_a_mistake_on_the_command_line_is_one_line_and_code_2(words, part, tmp_path, capsys):
    assert train.main([*words, f"training.checkpoint.path={tmp_path}/run"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error")
    assert part in line


@pytest.mark.slow
def test_the_program_ends_with_code_2_and_one_line(tmp_path):
    words = ["device=cpu", "dataset.train.root=./missing"]
    words.append(f"training.checkpoint.path={tmp_path}/run")
    done = subprocess.run(
        [sys.executable, str(ROOT / "train.py"), *words],
        capture_output=True,
        text=True,
        check=False,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("error")
    assert "missing" in line


READERS = ("training", "images", "layers")


def options():
    return [(name, field.metadata) for name, field, _ in schema.walk(schema.Config())]


def test_every_option_has_a_meaning():
    assert [name for name, metadata in options() if not metadata["doc"].strip()] == []


def test_every_default_is_in_range():
    assert checks.validate(schema.Config()) == schema.Config()


def dotted(node, aliases):
    """`run.config.optimizer.lr` of an attribute chain, its first name replaced by its alias."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value, aliases)}.{node.attr}"
    return aliases.get(node.id, node.id) if isinstance(node, ast.Name) else "?"


def options_read(source):
    """Every option below `config` that the functions of `source` read, seen through aliases."""
    found = set()
    for function in ast.walk(ast.parse(source)):
        if not isinstance(function, ast.FunctionDef):
            continue
        aliases = {}
        for node in ast.walk(function):
            if not isinstance(node, ast.Assign):
                continue
            names, values = (
                item.elts if isinstance(item, ast.Tuple) else [item]
                for item in (node.targets[0], node.value)
            )
            for name, value in zip(names, values, strict=False):
                if isinstance(name, ast.Name) and isinstance(value, ast.Attribute):
                    aliases[name.id] = dotted(value, aliases)
        chains = {dotted(node, aliases) for node in ast.walk(function)}
        found |= {chain.partition("config.")[2] for chain in chains if "config." in chain}
    return found


def test_reading_through_an_alias_is_seen():
    source = (
        "def f(run):\n    o, t = run.config.optimizer, run.config.training\n    g(o.lr, t.x.y)\n"
    )
    assert {"optimizer.lr", "training.x.y"} <= options_read(source)
    assert "optimizer.eps" not in options_read(source)


def attributes_read(path):
    """Names read as attributes of whatever holds the options of one subject: `o.top_k`."""
    tree = ast.parse(path.read_text("utf-8"))
    loads = (node for node in ast.walk(tree) if isinstance(node, ast.Attribute))
    return {node.attr for node in loads if isinstance(node.ctx, ast.Load)}


def test_no_option_is_dead():
    """An option that only its check reads does nothing; one with one allowed value says nothing."""
    sources = [p for p in ROOT.glob("**/*.py") if p.parent.name in READERS or p.parent == ROOT]
    read = {name for path in sources for name in options_read(path.read_text("utf-8"))}
    # What these two return is what a run uses.
    for function in (checks.peak_lr, checks._resolve_update_freq):
        read |= options_read(inspect.getsource(function))
    # Those who are handed one section read `o.name`; schema.py what follows from others.
    routers = [str(p.relative_to(ROOT)) for p in (ROOT / "routers").glob("*.py")]
    built = ["vit.py", "moe.py", "options/schema.py", "training/network.py", *routers]
    readers = {
        "model.": [*built, "layers/modules.py", "layers/init.py"],
        "optimizer.": ["training/optim.py"],
        "dataset.train.": ["images/mixing.py"],
        "training.": ["training/logbook.py"],
        "init.": ["weights/upcycling.py"],
        "distillation.": ["training/distillation.py"],
    }
    for section, files in readers.items():
        attributes = set().union(*(attributes_read(ROOT / name) for name in files))
        names = [name for name, _ in options() if name.startswith(section)]
        read |= {name for name in names if name.rpartition(".")[2] in attributes}
    dead = [
        name
        for name, metadata in options()
        if name not in read and (metadata["low"] is None or metadata["low"] != metadata["high"])
    ]
    assert dead == []


MOE = ["model.moe.num_experts=8"]


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["model.moe.top_k=1"], r"model.moe.top_k=1: has no effect with num_experts=0"),
        (["distributed.ep=2"], r"distributed.ep=2: must be 1 with model.moe.num_experts=0"),
        ([*MOE, "distributed.ep=3"], r"distributed.ep=3: must divide model.moe.num_experts=8"),
        ([*MOE, "model.moe.last_n=2"], r"exactly one of every_n, last_n, blocks must be set"),
        ([*MOE, "model.moe.top_k=9"], r"model.moe.top_k=9: must be at most num_experts=8"),
        ([*MOE, "model.moe.every_n=13"], r"every_n=13: must be some of the blocks 0 to 11"),
        ([*MOE, "model.moe.every_n=null", "model.moe.blocks=[12]"], r"blocks=\[12\]: must be some"),
        ([*MOE, "model.moe.every_n=null", "model.moe.last_n=13"], r"last_n=13: must be some of"),
        ([*MOE, "model.moe.shared_ratio=0.001"], r"shared_ratio=0.001: must be at least 1 / "),
        ([*MOE, "model.vit.weight_init=moco"], r"weight_init=moco: experts have no form for it"),
        ([*MOE, "model.vit.fix_init=true"], r"fix_init=True: experts have no form for it"),
        ([*MOE, "model.vit.scale_mlp_norm=true"], r"scale_mlp_norm=True: experts have no form"),
        (
            [*MOE, "model.moe.every_n=1", "model.vit.mlp_ratio=2"],
            r"mlp_ratio=2.0: has no effect with experts in every",
        ),
        ([*MOE, "model.moe.noise_std=1"], r"noise_std=1.0: has no effect with router=softmax"),
        ([*MOE, "model.moe.kernels=cuda"], r"model.moe.kernels=cuda: must be one of auto, torch"),
    ],
)
def test_mixture_of_experts_mistakes_are_named(overrides, message):
    assert re.search(message, refusal(overrides))


@pytest.mark.parametrize(
    ("overrides", "blocks"),
    [
        ([], [1, 3, 5, 7, 9, 11]),
        (["model.moe.every_n=null", "model.moe.last_n=2"], [10, 11]),
        (["model.moe.every_n=null", "model.moe.blocks=[5,0]"], [0, 5]),
    ],
)
def test_which_blocks_have_experts(overrides, blocks):
    config = compose.compose("vit_base_patch16_224", [*MOE, *overrides])
    model = network.build_model(config, backend="torch", on_meta=True)
    found = [i for i, block in enumerate(model.blocks) if hasattr(block.mlp, "experts")]
    assert found == blocks
