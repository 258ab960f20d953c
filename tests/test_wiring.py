"""How the parts are put together, held to references that share nothing with them.

The parts are tested where they are; here are values worked out by hand, closed forms, timm, and
dense loops in fp64, of what a run is made of: its step, its batches, its weights, its checkpoints.
"""

import dataclasses
import json
import math
import os
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.models import VisionTransformer as TimmVit
from timm.models.deit import VisionTransformerDistilled
from timm.optim import param_groups_layer_decay

import checkpoint
import train
from imagenet_dataset import TrainImages
from images import cache, reading
from moe_kernels import ops, torch_ffn
from options.schema import InitOptions, ViTOptions
from parallel import sharding
from routers import router
from tests.support import reference
from tests.support.networks import build_vit
from tests.support.pictures import write_image
from tests.support.sharded import gather, worst_error
from training import loaders, network, optim, prepare, pretrained, resume, scoring
from weights import warm_start
from weights.upcycling import Job, Target

EXPERTS = [
    "model.moe.num_experts=4",
    "model.moe.last_n=2",
    "model.moe.every_n=null",
    "model.moe.mlp_ratio=1.3",
    "model.moe.shared_ratio=0.7",
    "model.moe.router=noisy",
    "model.moe.noise_std=1.5",
    "model.moe.importance_coef=0.7",
    "model.moe.load_coef=1.9",
    "model.moe.switch_coef=0.4",
    "model.moe.sequence_coef=0.3",
    "model.moe.z_coef=0.2",
    "optimizer.clip_norm=null",
    "training.label_smoothing=0.1",
    "training.seed=5",
]


def gradients_of_a_step(world, config):
    """This rank's images, losses, and parts of the weights and of their gradients."""
    run, _ = prepare.prepare(config, world)
    before = [s.local.detach().clone() for s in run.shards]
    kept = []

    def noted(batches):
        for batch in batches:
            kept.append((batch.image_BCHW.clone(), batch.label_B.clone()))
            yield batch

    meter = train.Meter.start(world.device)
    train.train_step(run, noted(loaders.train_batches(run, start_step=0)), step=0, meter=meter)
    places = [(s.name, s.full_slice()) for s in run.shards]
    weights = [(*place, w) for place, w in zip(places, before, strict=True)]
    grads = [
        (*place, torch.zeros_like(s.local) if s.local.grad is None else s.local.grad.clone())
        for place, s in zip(places, run.shards, strict=True)  # None where a rank has no rows
    ]
    losses = {"loss": meter.loss.item(), "balance": meter.balance.item()}
    return kept[0], losses | meter.load.figures(), weights, grads


@pytest.mark.parametrize(
    ("world_size", "options"),
    [
        (1, []),
        (1, ["model.moe.capacity_factor=0.7"]),
        (2, ["distributed.ep=2", "model.moe.capacity_factor=1.1"]),
    ],
    ids=["all experts here", "with a capacity", "experts on two ranks, with a capacity"],
)
def test_a_step_with_experts_is_that_of_a_loop_over_rows(ranks, small_run, world_size, options):
    """Loss, balance loss, load of the experts and every gradient; last and first block too."""
    config = small_run(*EXPERTS, *options, "dataset.train.batch_size=3")
    found = ranks(world_size, gradients_of_a_step, config)
    weights = gather([(parts, None) for _, _, parts, _ in found])
    model = reference.textbook(config, weights)
    batches = [batch for batch, *_ in found]
    loss, balance, expected = reference.step_of(model, batches, seed=5, smoothing=0.1)
    assert sum(figures.pop("loss") for _, figures, *_ in found) == pytest.approx(loss, rel=1e-5)
    shares = sum(figures.pop("balance") for _, figures, *_ in found)
    assert shares == pytest.approx(balance, rel=1e-4)
    assert balance > 0.5
    loads = {
        f"{name}.blocks.{block}.mlp": value
        for block in (0, 1)
        for name, value in model.blocks[block].mlp.load().items()
    }
    assert ("dropped.blocks.0.mlp" in loads) == ("capacity" in str(options))
    for _, figures, *_ in found:
        assert figures == pytest.approx(loads)
    assert worst_error([grads for *_, grads in found], expected) <= 1e-4


PLAIN_PIXELS = [  # the whole image, as it is
    "dataset.train.crop_scale=[1,1]",
    "dataset.train.crop_ratio=[1,1]",
    "dataset.train.hflip=0",
    "dataset.mean=[0.1,0.45,0.7]",
    "dataset.std=[0.2,0.3,0.55]",
    "dataset.duplicates=ignore",
]


def first_batches(world, config):
    run, _ = prepare.prepare(config, world)
    train_batch = next(loaders.train_batches(run, start_step=0))
    val_batch = next(iter(loaders.val_batches(config, run.val_index, world)))
    return [
        (batch.image_BCHW.clone(), batch.label_B.tolist()) for batch in (train_batch, val_batch)
    ]


def test_pixels_become_pixel_over_255_less_mean_over_std(ranks, small_run, image_folder):
    """The first batches, image by image, against the files."""
    config = small_run(*PLAIN_PIXELS, "dataset.train.batch_size=4", "dataset.val.batch_size=3")
    (batches,) = ranks(1, first_batches, config)
    for split, (image_BCHW, labels) in zip(("train", "val"), batches, strict=True):
        files = {}
        for path in sorted((image_folder / split).rglob("*.JPEG")):
            raw_HWC = np.asarray(Image.open(path)).astype(np.float64)
            normal_HWC = (raw_HWC / 255 - [0.1, 0.45, 0.7]) / [0.2, 0.3, 0.55]
            files[path] = torch.from_numpy(normal_HWC).permute(2, 0, 1).float()
        seen = []
        for image_CHW, label in zip(image_BCHW, labels, strict=True):
            (path,) = [p for p, x in files.items() if torch.allclose(image_CHW, x, atol=1e-5)]
            assert path.parent.name == f"n{label:08d}"
            seen.append(path)
        assert len(set(seen)) == len(labels) == {"train": 4, "val": 3}[split]


VIT = ["model.dtype=bf16", "model.vit.patch_size=16"]


def some_vit(config, seed):
    """timm's ViT of these options, with values that no initialisation has, and its answer."""
    vit = config.model.vit
    names = ("img_size", "patch_size", "num_classes", "embed_dim", "depth", "num_heads")
    model = TimmVit(**{name: getattr(vit, name) for name in names}, global_pool=vit.global_pool)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2)
        return model.state_dict(), model.eval()(images())


def images():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(9))


def answers(run):
    run.model.eval()
    with torch.no_grad():
        logits_BY = run.model(images().to(run.dtype)).float()
    run.model.train()
    return logits_BY


def resumed_answers(world, config, weights):
    saved, _ = prepare.prepare(config, world)
    sharding.load_full(saved.shards, weights)
    saved.folder.mkdir()
    state = resume.facts(saved, step=1, figures={})
    checkpoint.save(saved.folder, saved.tensors(), state=state, loss=1.0)
    run, _ = prepare.prepare(config, world)
    fresh = answers(run)
    assert resume.resume(run).step == 1
    return fresh, answers(run)


def begun_answers(world, config):
    run, _ = prepare.prepare(config, world)
    fresh = answers(run)
    pretrained.begin(run)
    return fresh, answers(run)


@pytest.mark.parametrize("how", ["resumed", "begun with a file"])
def test_a_bf16_forward_uses_the_weights_that_were_loaded(ranks, small_run, tmp_path, how):
    """In bf16 the forward has weights of its own, made from the main ones, which alone are read."""
    file = tmp_path / "timm.pt"
    config = small_run(*VIT, *([f"init.checkpoint={file}"] if "file" in how else []))
    weights, expected = some_vit(config, seed=3)
    torch.save(weights, file)
    if how == "resumed":
        ((fresh, found),) = ranks(1, resumed_answers, config, weights)
    else:
        ((fresh, found),) = ranks(1, begun_answers, config)
    assert (found - expected).norm() / expected.norm() < 0.05
    assert (fresh - expected).norm() / expected.norm() > 0.5


def test_experts_begin_with_a_std_of_two_hundredths(small_run):
    config = small_run("model.moe.num_experts=4", "model.vit.embed_dim=96", "distributed.ep=1")
    model = network.build_model(config, backend="torch", on_meta=False)
    experts = model.blocks[1].mlp.experts
    for weight in (experts.w_in, experts.w_out):
        noise = 5 / math.sqrt(weight.numel())  # five standard errors
        assert weight.std().item() == pytest.approx(0.02, rel=noise)
        assert abs(weight.mean().item()) < 0.02 * noise
        four = weight.unflatten(0, (4, -1))
        assert not torch.equal(four[0], four[1])
    assert not experts.b_in.any()
    assert not experts.b_out.any()


@pytest.mark.parametrize(
    ("options", "steps"),
    [(["keep_last=2", "keep_best=0"], [4, 5]), (["keep_last=1", "keep_best=2"], [1, 3, 5])],
)
def test_of_five_saves_these_are_left(ranks, small_run, tmp_path, options, steps):
    """The newest, and the best by their validation loss, which is 0.3, 0.9, 0.1, 0.8, 0.7."""
    config = small_run(
        "training.steps=5",
        "training.val_interval=1",
        *(f"training.checkpoint.{option}" for option in options),
    )

    def five_saves(world):
        losses = iter([0.3, 0.9, 0.1, 0.8, 0.7])
        rest = {"val_images": 7.0, "top1": 50.0, "top5": 100.0}
        train.validate_all = lambda run, stop: {"val_loss": next(losses), **rest}
        train.train(config, world)

    ranks(1, five_saves)
    names = {1: "0.300", 3: "0.100", 4: "0.800", 5: "0.700"}
    expected = [f"step_{step}_loss_{names[step]}" for step in steps]
    assert sorted(path.name for path in (tmp_path / "run").glob("step_*")) == expected
    assert not list((tmp_path / "run").glob(".[ts]*")), "no litter"


def mixed_targets(world, config):
    run, _ = prepare.prepare(config, world)
    batch = next(loaders.train_batches(run, start_step=0))
    _, target_BY = train.to_device(run, batch)
    logits_BY = torch.randn(target_BY.shape, generator=torch.Generator().manual_seed(1))
    return batch.label_B, target_BY, logits_BY, run.criterion(logits_BY, target_BY, None)


def test_mixed_labels_are_smoothed_once(ranks, small_run):
    """A class that neither image of a pair has gets 0.3 / 3; the pair shares what is left."""
    options = ["dataset.train.mixup=0.8", "training.label_smoothing=0.3"]
    config = small_run(*options, "dataset.train.batch_size=6")
    ((label_B, target_BY, logits_BY, loss),) = ranks(1, mixed_targets, config)
    for target_Y, first, second in zip(target_BY, label_B, label_B.flip(0), strict=True):
        assert target_Y.sum().item() == pytest.approx(1)
        for number, share in enumerate(target_Y.tolist()):
            if number not in (first, second):
                assert share == pytest.approx(0.1)
    assert len({round(value, 4) for value in target_BY.flatten().tolist()}) > 3, "mixed indeed"
    by_hand = -(target_BY * logits_BY.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(loss, by_hand)


@pytest.mark.parametrize(("place", "is_hit"), [(1, 1), (4, 1), (5, 1), (6, 0), (8, 0)])
def test_top_5_of_eight_classes_has_the_fifth_and_not_the_sixth(place, is_hit):
    logits_BY = torch.tensor([[0.3, -1.0, 2.0, 0.9, -0.2, 1.4, -3.0, 0.0]])
    label_B = logits_BY[0].argsort(descending=True)[place - 1][None]
    sums_4 = scoring._sums(logits_BY, label_B).sum(0)
    assert sums_4[[0, 2, 3]].tolist() == [1, place == 1, is_hit]
    assert scoring.figures(sums_4[None])["top5"] == 100 * is_hit


def test_bce_without_a_threshold_takes_targets_as_they_are(small_run):
    """-[t log p + (1 - t) log(1 - p)] of smoothed targets 0.8 and 0.1, and of mixed ones."""
    config = small_run("training.loss=bce", "training.label_smoothing=0.3")
    criterion = prepare.build_criterion(config)
    logits = [[1.5, -0.5, 0.25], [0.0, 2.0, -1.0]]

    def by_hand(targets):
        terms = []
        for logit, t in zip(chain(*logits), chain(*targets), strict=True):
            p = 1 / (1 + math.exp(-logit))
            terms.append(-(t * math.log(p) + (1 - t) * math.log(1 - p)))
        return sum(terms) / len(terms)

    labelled = criterion(torch.tensor(logits), torch.tensor([2, 0]), None)
    assert labelled.item() == pytest.approx(by_hand([[0.1, 0.1, 0.8], [0.8, 0.1, 0.1]]))
    mixed = [[0.6, 0.4, 0.0], [0.0, 0.25, 0.75]]
    loss = criterion(torch.tensor(logits), torch.tensor(mixed), None)
    assert loss.item() == pytest.approx(by_hand(mixed))


def test_a_distilled_vits_groups_are_timms():
    """Decay and layer of every parameter, the distillation token among the stem's."""
    options = {"img_size": 32, "embed_dim": 48, "depth": 3, "num_heads": 3}
    theirs = VisionTransformerDistilled(**options)
    names = {id(parameter): name for name, parameter in theirs.named_parameters()}
    skipped = theirs.no_weight_decay()
    groups = param_groups_layer_decay(theirs, 0.1, no_weight_decay_list=skipped, layer_decay=0.6)
    expected = {
        names[id(parameter)]: (group["weight_decay"], pytest.approx(group["lr_scale"]))
        for group in groups
        for parameter in group["params"]
    }
    ours = build_vit(**options, distilled=True)
    names = {id(parameter): name for name, parameter in ours.named_parameters()}
    named = ours.named_parameters()
    found = {
        names[id(parameter)]: (group["weight_decay"], group["lr_scale"])
        for group in optim.parameter_groups(named, weight_decay=0.1, layer_decay=0.6, depth=3)
        for parameter in group["params"]
    }
    assert found == expected
    assert found["dist_token"] == (0, pytest.approx(0.6**4))


HALF_ULP = 2.0**-8  # of bf16, relative


def test_eight_bf16_experts_are_summed_in_fp32():
    """The sum is rounded once, the gradient of a weight not at all."""
    tokens, choices, dim = 33, 8, 24
    generator = torch.Generator().manual_seed(0)
    y_RD = torch.randn(tokens * choices, dim, generator=generator).bfloat16()
    weight_Tk = torch.rand(tokens, choices, generator=generator)
    inverse_R = torch.randperm(tokens * choices, generator=generator, dtype=torch.int32)
    rows_TkD = y_RD.double()[inverse_R.long()].view(tokens, choices, dim)
    exact_TD = (rows_TkD * weight_Tk.double()[..., None]).sum(1)
    found_TD = torch_ffn.combine(y_RD, weight_Tk, inverse_R, num_choices=choices)
    assert found_TD.dtype == torch.bfloat16
    assert ((found_TD - exact_TD).abs() <= exact_TD.abs() * HALF_ULP * 1.001 + 1e-6).all()
    dy_TD = torch.randn(tokens, dim, generator=generator).bfloat16()
    dy_RD, dweight_Tk = torch_ffn.combine_backward(dy_TD, y_RD, weight_Tk, inverse_R)
    assert dy_RD.dtype == torch.bfloat16
    exact_Tk = (rows_TkD * dy_TD.double()[:, None]).sum(2)
    torch.testing.assert_close(dweight_Tk.double(), exact_Tk, rtol=1e-5, atol=1e-5)


def index_of_node(world, folder):
    """What a rank finds where each node of two ranks has disks of its own, mounted alike."""
    node, local_rank = divmod(world.rank, 2)
    os.chdir(folder / f"node{node}")
    here = dataclasses.replace(world, local_rank=local_rank)
    index = cache.find_index(Path("data"), "train", here, folder=Path("kept"))
    return [Path(path).name for path in index.paths]


def test_nodes_with_disks_of_their_own_read_their_own_index(ranks, tmp_path):
    for node in range(3):
        for number in range(2):
            write_image(tmp_path / f"node{node}/data/train/n01/{node}{number}.JPEG", seed=number)
            write_image(tmp_path / f"node{node}/data/val/n01/{node}{number}.JPEG", seed=number)
    found = ranks(6, index_of_node, tmp_path)
    assert found == [[f"{rank // 2}{number}.JPEG" for number in range(2)] for rank in range(6)]


@pytest.mark.parametrize("scale", [2, 4, 8])
def test_a_scaled_crop_has_every_pixel_that_its_box_touches(tmp_path, scale):
    """A box from 1 to 1 mod scale: one more row and column than its size over the scale."""
    path = tmp_path / "image.JPEG"
    write_image(path, size=(64, 48))
    side = 2 * scale
    with Image.open(path) as image:
        image.draft("RGB", (64 // scale, 48 // scale))
        scaled_HWC = np.asarray(image)
    assert scaled_HWC.shape == (48 // scale, 64 // scale, 3)
    source = reading.read_header(path.read_bytes(), is_scaled=True)
    box = (1, scale + 1, side, side)
    found_HWC = reading.rgb_of_box(source, box, at_least=(2, 2))
    assert found_HWC.shape == (3, 3, 3)
    assert (found_HWC == scaled_HWC[:3, 1:4]).all()


def test_the_log_and_the_checkpoint_count_images_as_they_are(ranks, small_run, tmp_path):
    """Two updates of 2 ranks x 2 microbatches x 3 images, of 24; 7 to validate on."""
    options = ["training.steps=2", "training.grad_accum_steps=2", "dataset.train.batch_size=3"]
    config = small_run(*options)
    ranks(2, lambda world: train.train(config, world))
    run_line = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[0])
    counts = {"global_batch": 12, "epoch_images": 24, "train_images": 24, "val_images": 7}
    assert {name: run_line[name] for name in counts} == counts
    (folder,) = (tmp_path / "run").glob("step_2_*")
    state = json.loads((folder / "state.json").read_text())
    counts = {"step": 2, "images_seen": 24, "global_batch": 12, "train_images": 24, "world_size": 2}
    assert {name: state[name] for name in counts} == counts


@pytest.mark.parametrize("at_least", [(2, 8), (8, 2), (8, 8)])
def test_a_scaled_crop_has_pixels_enough_both_ways(tmp_path, at_least):
    """Of 16 x 16 pixels an eighth would do for 2, but only a half does for 8."""
    path = tmp_path / "image.JPEG"
    write_image(path, size=(64, 48))
    source = reading.read_header(path.read_bytes(), is_scaled=True)
    assert reading.rgb_of_box(source, (0, 0, 16, 16), at_least=at_least).shape == (8, 8, 3)


def test_an_image_in_place_of_a_bad_one_may_be_bad_too(image_folder):
    """Eight others are tried, not one of them eight times."""
    images = TrainImages(
        reading.ImageReader(cache.index_images(image_folder, "train")), transform=None, seed=5
    )
    for position in range(24):
        first, *others = images._candidates(position)
        assert len(others) == 8
        assert len({first, *others}) >= 4


@pytest.mark.parametrize("num_experts", [254, 255, 256, 257])
def test_dropped_rows_are_last_whatever_the_number_of_experts(num_experts):
    """Around the number that fits a byte: what is dropped must not become expert 0's."""
    expert_id_Tk = torch.tensor([[num_experts, 0], [num_experts - 1, num_experts]])
    plan = ops.plan_rows(expert_id_Tk, num_experts)
    assert plan.order_R.tolist() == [1, 2, 0, 3]
    assert plan.inverse_R.tolist() == [-1, 0, 1, -1]
    assert plan.offset_E1.tolist() == [0] + [1] * (num_experts - 1) + [2]


def test_an_expert_is_closed_with_the_given_probability():
    torch.manual_seed(0)
    ranking_TE = router.some_closed(torch.zeros(4000, 5), 0.2)
    assert (ranking_TE == -1).float().mean().item() == pytest.approx(0.2, abs=0.015)  # 5 sigma


@pytest.mark.parametrize(
    ("tokens", "num_prefix"),
    [({"class_token": False, "global_pool": "avg"}, 0), ({"reg_tokens": 2}, 3)],
    ids=["none", "three"],
)
def test_positions_of_prefix_tokens_are_not_resampled(tokens, num_prefix):
    """From 2 x 2 patches to 4 x 4, where all patches had one position and keep it."""
    options = ViTOptions(img_size=32, patch_size=8, embed_dim=8, num_heads=2, **tokens)
    prefix_LD = torch.arange(num_prefix * 8.0).view(num_prefix, 8)
    source = torch.cat([prefix_LD, torch.full((4, 8), 0.5)])[None]
    shapes = {"pos_embed": torch.Size((1, num_prefix + 16, 8))}
    target = Target(shapes=shapes, vit=options, seed=0, experts=None)
    job = Job({"pos_embed": source}, target, InitOptions(mode="deit_warm_start"), origin="x")
    (entry,) = warm_start.initial_weights(job).entries
    expected = torch.cat([prefix_LD, torch.full((16, 8), 0.5)])[None]
    torch.testing.assert_close(entry.value(), expected)
