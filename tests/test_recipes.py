"""The parts of DeiT's recipes: losses, curves of the learning rate, repeats, names of options."""

import itertools
import math
from pathlib import Path

import pytest
import timm
import torch
from timm.layers import resample_abs_pos_embed
from timm.loss import BinaryCrossEntropy, LabelSmoothingCrossEntropy, SoftTargetCrossEntropy
from timm.scheduler import CosineLRScheduler

import train
from imagenet_dataset import Order, TrainImages, step_positions
from images import augment
from images.cache import index_images
from images.reading import ImageReader
from options import checks, compose
from options.schema import OptimizerOptions
from tests.support.pictures import folder_dataset, train_batches
from training import loaders, losses, optim, prepare
from weights.sources import Choice, read_source

CLASSES = 5
IMAGENET_IMAGES = 1_281_167


def logits_and_targets(kind):
    generator = torch.Generator().manual_seed(0)
    logits_BY = torch.randn(6, CLASSES, generator=generator, requires_grad=True)
    label_B = torch.randint(0, CLASSES, (6,), generator=generator)
    soft_BY = torch.rand(6, CLASSES, generator=generator) * (torch.arange(CLASSES) % 2)
    return logits_BY, label_B if kind == "labels" else soft_BY / soft_BY.sum(1, keepdim=True)


def assert_same_loss(ours, theirs, kind):
    logits_BY, target = logits_and_targets(kind)
    values = []
    for loss in (ours(logits_BY, target), theirs(logits_BY, target)):
        (gradient,) = torch.autograd.grad(loss, logits_BY)
        values.append((loss.detach(), gradient))
    torch.testing.assert_close(values[0], values[1])


@pytest.mark.parametrize("kind", ["labels", "mixed"])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("threshold", [None, 0.0, 0.2])
@pytest.mark.parametrize("is_sum", [False, True])
def test_binary_loss_and_its_gradient_are_timms(kind, smoothing, threshold, is_sum):
    theirs = BinaryCrossEntropy(smoothing, target_threshold=threshold, sum_classes=is_sum)

    def ours(logits_BY, target):
        return losses.binary_loss(
            logits_BY, target, smoothing=smoothing, threshold=threshold, is_sum=is_sum
        )

    assert_same_loss(ours, theirs, kind)


@pytest.mark.parametrize(
    ("kind", "theirs"),
    [("labels", LabelSmoothingCrossEntropy(0.1)), ("mixed", SoftTargetCrossEntropy())],
)
def test_cross_entropy_and_its_gradient_are_timms(kind, theirs):
    assert_same_loss(
        lambda logits_BY, target: losses.smoothed_loss(logits_BY, target, smoothing=0.1),
        theirs,
        kind,
    )


def test_loss_of_deit_3_in_closed_form():
    logits_BY = torch.tensor([[2.0, -1.0, 0.5]])
    target_BY = torch.tensor([[0.7, 0.3, 0.0]])  # two images mixed: both classes are there
    criterion = prepare.build_criterion(
        compose.compose(
            "vit_tiny_patch8_64",
            ["training.loss=bce", "training.bce_threshold=0", "training.label_smoothing=0"],
        )
    )
    sigmoid = [1 / (1 + math.exp(-z)) for z in (2.0, -1.0, 0.5)]
    expected = -(math.log(sigmoid[0]) + math.log(sigmoid[1]) + math.log(1 - sigmoid[2])) / 3
    assert criterion(logits_BY, target_BY, torch.empty(0)).item() == pytest.approx(expected)


# Epochs, those of warm-up, peak at the batch of the recipe, last value; all from 1e-6.
SCHEDULES = {
    "deit": (300, 5, 5e-4 * 1024 / 512, 1e-5),
    "deit_ft384": (30, 5, 5e-6 * 512 / 512, 5e-6),
    "deit3_base": (800, 5, 3e-3, 1e-5),
    "deit3_small": (800, 5, 4e-3, 1e-5),
    "deit3_ft": (20, 5, 1e-5, 1e-5),
    "incubation_pt": (300, 20, 5e-4 * 2048 / 512, 1e-5),
    "incubation_mt": (100, 20, 5e-4 * 2048 / 512, 1e-5),
    "incubation_ft": (100, 0, 5e-4 * 2048 / 512, 1e-5),
}
EPOCH_STEPS = 7


def ours_at(name, step):
    epochs, warmup, peak, final = SCHEDULES[name]
    o = OptimizerOptions(
        min_lr=final, warmup_steps=warmup * EPOCH_STEPS, warmup_lr=1e-6, warmup_prefix=False
    )
    return optim.lr_at(step, o, peak=peak, num_steps=epochs * EPOCH_STEPS)


def by_epoch(name, epoch, *, step_in_epoch=3):
    """The learning rate that a schedule by epochs gives to a step of `epoch`."""
    step = epoch * EPOCH_STEPS + step_in_epoch
    return ours_at(name, optim.step_of_epoch(step, epoch_steps=EPOCH_STEPS))


# Learning rates that the published training loops have in these epochs, counted from 0: worked out
# by hand from the recipes, 1e-6 + (peak - 1e-6) t / warm-up, then last + (peak - last) (1 + cos(pi
# t / epochs)) / 2, with t = epoch - 1, since they step the schedule with the epoch just finished.
CURVES = {
    "deit": {
        0: 1e-6,
        1: 1e-6,
        2: 2.008e-4,
        5: 8.002e-4,
        6: 9.993216e-4,
        51: 9.336826e-4,
        101: 7.525e-4,
        151: 5.05e-4,
        201: 2.575e-4,
        299: 1.010856e-5,
    },
    "deit_ft384": {
        0: 1e-6,
        1: 1e-6,
        2: 1.8e-6,
        3: 2.6e-6,
        4: 3.4e-6,
        5: 4.2e-6,
        6: 5e-6,
        7: 5e-6,
        16: 5e-6,
        29: 5e-6,
    },
    "deit3_base": {
        0: 1e-6,
        1: 1e-6,
        3: 1.2006e-3,
        5: 2.4002e-3,
        6: 2.999712e-3,
        101: 2.8862e-3,
        201: 2.562125e-3,
        401: 1.505e-3,
        601: 4.478754e-4,
        799: 1.004611e-5,
    },
    "deit3_small": {
        0: 1e-6,
        1: 1e-6,
        3: 1.6006e-3,
        5: 3.2002e-3,
        6: 3.999615e-3,
        101: 3.84814e-3,
        201: 3.415678e-3,
        401: 2.005e-3,
        601: 5.94322e-4,
        799: 1.006153e-5,
    },
    "deit3_ft": {
        0: 1e-6,
        1: 1e-6,
        2: 2.8e-6,
        3: 4.6e-6,
        4: 6.4e-6,
        5: 8.2e-6,
        6: 1e-5,
        7: 1e-5,
        13: 1e-5,
        19: 1e-5,
    },
    "incubation_pt": {
        0: 1e-6,
        1: 1e-6,
        2: 1.0095e-4,
        11: 1.0005e-3,
        20: 1.90005e-3,
        21: 1.978257e-3,
        101: 1.5025e-3,
        151: 1.005e-3,
        201: 5.075e-4,
        299: 1.021822e-5,
    },
    "incubation_mt": {
        0: 1e-6,
        1: 1e-6,
        2: 1.0095e-4,
        11: 1.0005e-3,
        20: 1.90005e-3,
        21: 1.809972e-3,
        26: 1.708571e-3,
        51: 1.005e-3,
        76: 3.014288e-4,
        99: 1.196341e-5,
    },
    "incubation_ft": {
        0: 2e-3,
        1: 2e-3,
        2: 1.999509e-3,
        11: 1.951301e-3,
        21: 1.809972e-3,
        26: 1.708571e-3,
        51: 1.005e-3,
        76: 3.014288e-4,
        91: 5.869877e-5,
        99: 1.196341e-5,
    },
}


@pytest.mark.parametrize("name", CURVES)
def test_curve_by_epochs_is_the_published_one_at_ten_epochs(name):
    assert len(CURVES[name]) == 10
    for epoch, lr in CURVES[name].items():
        assert by_epoch(name, epoch) == pytest.approx(lr, rel=1e-6), epoch


# Recipe: epochs, its curve, weight decay.
PUBLISHED = {
    **{
        f"deit_{size}{end}": (300, "deit", 0.05)
        for size in ("tiny", "small", "base")
        for end in ("", "_distilled")
    },
    "deit_base_ft384": (30, "deit_ft384", 1e-8),
    "deit3_small": (800, "deit3_small", 0.05),
    **dict.fromkeys(("deit3_base", "deit3_large", "deit3_huge"), (800, "deit3_base", 0.05)),
    **{f"deit3_{size}_ft224": (20, "deit3_ft", 0.1) for size in ("base", "large", "huge")},
    **{f"deit3_{size}_ft384": (20, "deit3_ft", 0.1) for size in ("small", "base", "large")},
}


@pytest.mark.parametrize("recipe", [name for name in PUBLISHED if "_ft" in name])
def test_recipe_of_fine_tuning_has_the_published_curve(recipe):
    """At the first update of each epoch, before which DeiT steps its schedule."""
    config = compose.compose(recipe, [])
    o, steps = config.optimizer, config.training.steps
    epochs, curve, _ = PUBLISHED[recipe]
    for epoch, lr in CURVES[curve].items():
        if epoch == 0:
            continue
        found = optim.lr_at(
            round((epoch - 1) * steps / epochs),
            o,
            peak=checks.peak_lr(config, 512),
            num_steps=steps,
        )
        assert found == pytest.approx(lr, rel=1e-3), epoch


# Deep Incubation's phases as options of deit_base, whose other values they have: 625 updates of
# 2048 images in an epoch.
INCUBATION = {
    "incubation_pt": "training.steps=187500 optimizer.warmup_steps=12500 "
    "dataset.train.batch_size=256",
    "incubation_mt": "training.steps=62500 optimizer.warmup_steps=12500 "
    "training.grad_accum_steps=2",
    "incubation_ft": "training.steps=62500 optimizer.warmup_steps=0 optimizer.warmup_lr=null "
    "optimizer.warmup_prefix=true dataset.train.batch_size=64 training.grad_accum_steps=4",
}


@pytest.mark.parametrize("recipe", [*PUBLISHED, *INCUBATION])
def test_recipe_has_the_published_lr_decay_and_momentum_at_ten_epochs(recipe):
    """By the schedule per epoch of the originals; decay and momentum are the same in all."""
    words = INCUBATION.get(recipe, "").split()
    name = "deit_base" if recipe in INCUBATION else recipe
    config = compose.compose(name, [*words, "optimizer.schedule_per_epoch=true"])
    o, t = config.optimizer, config.training
    epochs, curve, decay = PUBLISHED.get(recipe) or (SCHEDULES[recipe][0], recipe, 0.05)
    weight, bias = torch.nn.Parameter(torch.ones(2, 3)), torch.nn.Parameter(torch.ones(2))
    named = [("head.weight", weight), ("head.bias", bias)]
    optimizer = optim.build_optimizer(
        o,
        optim.parameter_groups(named, weight_decay=o.weight_decay, layer_decay=o.layer_decay),
        sum_over_ranks=lambda value: value,
    )
    for count, (epoch, published) in enumerate(CURVES[curve].items(), start=1):
        first = round(epoch * t.steps / epochs)  # 50046 updates are 20 epochs of 2502.3
        lr = optim.lr_at(
            optim.step_of_epoch(first, epoch_steps=t.steps // epochs),
            o,
            peak=checks.peak_lr(config, 8 * config.dataset.train.batch_size * t.grad_accum_steps),
            num_steps=t.steps,
        )
        assert lr == pytest.approx(published, rel=1e-3), epoch
        optim.set_lr(optimizer, lr)
        for parameter in (weight, bias):
            parameter.data.fill_(1.0)
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        assert {group["weight_decay"] for group in optimizer.param_groups} == {0.0, decay}
        moments = optimizer.state[weight]
        for name, beta in (("exp_avg", 0.9), ("exp_avg_sq", 0.999)):
            assert moments[name].numpy() == pytest.approx(1 - beta**count, rel=1e-5)
        if o.name == "adamw":  # the scale of LAMB's updates is another test's
            assert weight.detach().numpy() == pytest.approx(1 - published * (1 + decay), abs=1e-5)
            assert bias.detach().numpy() == pytest.approx(1 - published, abs=1e-5)


def shrunk(recipe, image_folder, folder, *more):
    """The options of `recipe` with a network of 32 pixels and two updates of four images."""
    options = [
        "model.vit.num_classes=3",
        "model.vit.img_size=32",
        "model.vit.patch_size=8",
        "model.vit.embed_dim=48",
        "model.vit.depth=2",
        "model.vit.num_heads=3",
        f"dataset.train.root={image_folder}",
        "dataset.train.batch_size=4",
        "dataset.train.repeats=1",
        "dataset.num_workers=0",
        "optimizer.base_batch=4",  # lr as it is in the recipe
        "optimizer.warmup_steps=1",
        "training.steps=2",
        "training.val_interval=2",
        "training.grad_accum_steps=1",
        "training.tensorboard=false",
        f"training.checkpoint.path={folder}",
        "device=cpu",
    ]
    return compose.compose(recipe, [*options, *more])


def train_here(ranks, config):
    ranks(1, lambda world, config: train.train(config, world), config)
    return read_source(Path(config.training.checkpoint.path), Choice()).weights()


@pytest.mark.parametrize(
    ("before", "recipe"),
    [("deit_base", "deit_base_ft384"), ("deit3_small", "deit3_small_ft384")],
)
def test_fine_tuning_starts_with_the_run_before_and_positions_of_more_pixels(
    ranks, image_folder, tmp_path, before, recipe
):
    first, second = tmp_path / "before", tmp_path / "tuned"
    weights = train_here(ranks, shrunk(before, image_folder, first))
    more = ["model.vit.img_size=56", f"init.checkpoint={first}"]  # 4 x 4 patches become 7 x 7
    tuned = train_here(ranks, shrunk(recipe, image_folder, second, *more))
    positions = weights.pop("pos_embed")
    num_prefix = positions.shape[1] - 4 * 4  # the class token has one in DeiT, none in DeiT III
    expected = resample_abs_pos_embed(positions, [7, 7], [4, 4], num_prefix_tokens=num_prefix)
    assert expected.shape[1] == num_prefix + 7 * 7
    # Two updates of AdamW move no value by more than 1e-6 and 1e-5.
    limit = 2.5e-5
    assert (tuned.pop("pos_embed") - expected).abs().max() <= limit
    assert tuned.keys() == weights.keys()
    moves = {name: (tuned[name] - weights[name]).abs().max().item() for name in weights}
    assert 0 < max(moves.values()) <= limit, moves
    assert "resampled" in (second / "init.txt").read_text()


def test_distillation_starts_with_a_teacher_of_timm(ranks, image_folder, tmp_path):
    torch.manual_seed(0)
    file = tmp_path / "resnet.pth"
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), file)
    teacher = ["distillation.teacher=test_resnet", f"distillation.teacher_checkpoint={file}"]
    weights = [
        train_here(
            ranks,
            shrunk("deit_tiny_distilled", image_folder, tmp_path / str(len(more)), *teacher, *more),
        )
        for more in ([], ["distillation.alpha=0.9"])
    ]
    assert {"dist_token", "head_dist.weight"} <= weights[0].keys()
    assert not torch.equal(*(found["head_dist.weight"] for found in weights)), "alpha is used"


def timm_scheduler(name):
    epochs, warmup, peak, final = SCHEDULES[name]
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([parameter], lr=peak)
    return CosineLRScheduler(
        optimizer, t_initial=epochs, lr_min=final, warmup_t=warmup, warmup_lr_init=1e-6
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_curve_by_steps_is_timms_at_the_start_of_every_epoch(name):
    scheduler = timm_scheduler(name)
    for epoch in range(SCHEDULES[name][0]):
        assert ours_at(name, epoch * EPOCH_STEPS) == pytest.approx(scheduler._get_lr(epoch)[0])


@pytest.mark.parametrize("name", SCHEDULES)
def test_curve_by_epochs_is_that_of_a_loop_that_steps_after_each_epoch(name):
    scheduler = timm_scheduler(name)
    for epoch in range(SCHEDULES[name][0]):
        lr = scheduler.optimizer.param_groups[0]["lr"]
        for step_in_epoch in (0, EPOCH_STEPS - 1):
            assert by_epoch(name, epoch, step_in_epoch=step_in_epoch) == pytest.approx(lr)
        scheduler.step(epoch)


def test_curve_by_steps_does_not_stand_still_within_an_epoch():
    assert ours_at("deit", 51 * EPOCH_STEPS) > ours_at("deit", 51 * EPOCH_STEPS + 1)


def prepared(world, config):
    run, choices = prepare.prepare(config, world)
    lrs = [run.lr_at(step) for step in range(config.training.steps)]
    groups = {(group["weight_decay"], group["lr_scale"]) for group in run.optimizer.param_groups}
    return lrs, choices["peak_lr"], choices["global_batch"], groups


@pytest.mark.parametrize("world_size", [1, 2])
def test_learning_rate_is_scaled_to_the_images_of_an_update(ranks, small_run, world_size):
    config = small_run(
        "optimizer.lr=1e-3",
        "optimizer.base_batch=20",
        "optimizer.layer_decay=0.5",
        f"training.update_freq={4 // world_size}",
        "training.steps=4",
    )
    (lrs, peak, batch, groups), *_ = ranks(world_size, prepared, config)
    assert batch == 5 * 4
    assert peak == lrs[0] == 1e-3
    assert groups == {(decay, 0.5**n) for decay in (0.05, 0.0) for n in range(4)}
    doubled = small_run("optimizer.lr=1e-3", "optimizer.base_batch=10", "training.update_freq=4")
    lrs, peak, *_ = ranks(1, prepared, doubled)[0]
    assert peak == lrs[0] == 2e-3


def test_run_by_epochs_counts_them_in_updates_of_the_data_set(ranks, small_run):
    options = [
        "dataset.train.batch_size=6",
        "training.steps=12",
        "optimizer.schedule_per_epoch=true",
    ]
    lrs = ranks(1, prepared, small_run(*options))[0][0]
    assert lrs[:8] == [1e-3] * 8  # 24 images: epochs 0 and 1 of 4 updates
    assert len(set(lrs)) == 2
    assert lrs[8:] == [pytest.approx(1e-5 + 99e-5 * 0.5 * (1 + math.cos(math.pi / 3)))] * 4


def dealt_by_deit(num_images, *, ranks, rank, epoch):
    """The images of one rank in one epoch of DeiT, three repeats each.

    All images shuffled by the epoch's number, each written three times, the list filled up from its
    start to a multiple of the ranks, dealt out in turn; a rank stops after its share of the number
    of images, rounded down to a multiple of 256.
    """
    shuffled = torch.randperm(num_images, generator=torch.Generator().manual_seed(epoch))
    repeated = shuffled.repeat_interleave(3)
    missing = -len(repeated) % ranks
    repeated = torch.cat([repeated, repeated[:missing]])
    return repeated[rank::ranks][: num_images // 256 * 256 // ranks]


def dealt_by_us(num_images, *, ranks, rank, epoch, batch):
    order = Order(num_images, repeats=3, batch=batch, step_images=batch * ranks)
    shuffled = torch.randperm(num_images, generator=torch.Generator().manual_seed(epoch))
    steps = order.epoch_images // (batch * ranks)
    places = [
        order.place(position)
        for step in range(epoch * steps, (epoch + 1) * steps)
        for position in step_positions(
            step, microbatch=0, rank=rank, world=ranks, batch=batch, accum=1
        )
    ]
    assert {place.epoch for place in places} == {epoch}
    return shuffled[[place.place for place in places]]


@pytest.mark.parametrize(
    ("num_images", "ranks", "epoch", "batch"),
    [
        (256, 1, 0, 16),
        (1000, 1, 1, 24),
        (1000, 2, 3, 16),
        (1281, 4, 1, 32),
        (2560, 8, 2, 20),
        (777, 3, 0, 10),
        (777, 5, 2, 7),
        (4096, 16, 1, 64),
    ],
)
def test_repeats_are_dealt_as_deit_deals_them(num_images, ranks, epoch, batch):
    for rank in range(ranks):
        theirs = dealt_by_deit(num_images, ranks=ranks, rank=rank, epoch=epoch)
        theirs = theirs[: len(theirs) // batch * batch]  # its loader drops the last, short batch
        ours = dealt_by_us(num_images, ranks=ranks, rank=rank, epoch=epoch, batch=batch)
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("rank", [0, 7])
def test_repeats_of_imagenet_are_dealt_as_deit_deals_them(rank):
    theirs = dealt_by_deit(IMAGENET_IMAGES, ranks=8, rank=rank, epoch=2).split(128)
    shuffled = torch.randperm(IMAGENET_IMAGES, generator=torch.Generator().manual_seed(2))
    order = Order(IMAGENET_IMAGES, repeats=3, batch=128, step_images=1024)
    for step in (0, 1, 625, 1250):
        positions = step_positions(
            2 * 1251 + step, microbatch=0, rank=rank, world=8, batch=128, accum=1
        )
        places = [order.place(position).place for position in positions]
        assert torch.equal(shuffled[places], theirs[step])


def test_epoch_of_imagenet_has_1251_updates_and_a_third_of_its_images():
    order = Order(IMAGENET_IMAGES, repeats=3, batch=128, step_images=1024)
    assert order.epoch_images == 1251 * 1024
    assert order.place(order.epoch_images - 1).place + 1 == 427_008
    assert order.place(order.epoch_images) == (1, 0, 0)


def microbatches(*, world, accum, batch, step):
    order = Order(1000, repeats=3, batch=batch, step_images=world * accum * batch)
    return [
        [
            order.place(position)
            for position in step_positions(
                step, microbatch=microbatch, rank=rank, world=world, batch=batch, accum=accum
            )
        ]
        for microbatch in range(accum)
        for rank in range(world)
    ]


@pytest.mark.parametrize("step", [0, 5, 20])
def test_number_of_ranks_changes_no_microbatch_and_no_update(step):
    expected = microbatches(world=4, accum=1, batch=8, step=step)
    assert microbatches(world=2, accum=2, batch=8, step=step) == expected
    assert microbatches(world=1, accum=4, batch=8, step=step) == expected
    others = microbatches(world=4, accum=2, batch=4, step=step)
    assert sorted(itertools.chain(*others)) == sorted(itertools.chain(*expected))


def test_repeats_of_an_image_are_in_different_microbatches():
    for step in range(5):
        for group in microbatches(world=4, accum=1, batch=16, step=step):
            assert len({place.place for place in group}) == len(group)


def test_one_repeat_is_one_permutation_after_the_other():
    order = Order(11)
    assert [order.place(position) for position in (0, 10, 11, 35)] == [
        (0, 0, 0),
        (0, 10, 0),
        (1, 0, 0),
        (3, 2, 0),
    ]


def test_too_few_images_for_repeats_are_refused():
    with pytest.raises(ValueError, match=r"repeats=3: an update of 10 images needs as many.*24"):
        Order(24, repeats=3, batch=5, step_images=10)
    with pytest.raises(ValueError, match=r"an update of 512 images"):
        Order(300, repeats=3, batch=512, step_images=512)


def test_a_run_refuses_them_before_its_first_step(ranks, small_run):
    def message(world, config):
        with pytest.raises(ValueError, match="repeats=3: an update of 5 images") as caught:
            prepare.prepare(config, world)
        return str(caught.value)

    assert "24" in ranks(1, message, small_run("dataset.train.repeats=3"))[0]


@pytest.fixture(scope="module")
def many(tmp_path_factory):
    return index_images(folder_dataset(tmp_path_factory.mktemp("many"), train=260), "train")


TRANSFORM = augment.train_transform(
    img_size=(8, 8),
    scale=(0.2, 1.0),
    ratio=(0.75, 1.33),
    hflip=0.5,
    color_jitter=0.4,
    interpolation="bicubic",
    mean=(0.5, 0.4, 0.3),
)


def test_repeats_of_an_image_are_augmented_differently(many):
    order = Order(260, repeats=3, batch=1, step_images=3)
    dataset = TrainImages(ImageReader(many), transform=TRANSFORM, order=order, seed=0)
    for first in (0, 3):
        samples = [dataset[position] for position in range(first, first + 3)]
        assert len({sample.label for sample in samples}) == 1
        assert len({sample.image_CHW.numpy().tobytes() for sample in samples}) == 3


def test_repeats_resume_from_a_step_alone(many):
    def batches(start_step, *, world=1, rank=0):
        order = Order(260, repeats=3, batch=16, step_images=64)
        accum = 4 // world
        loader = train_batches(
            many,
            transform=TRANSFORM,
            order=order,
            batch_size=16,
            grad_accum_steps=accum,
            start_step=start_step,
            num_steps=5,  # an epoch has 4
            rank=rank,
            world=world,
            seed=1,
        )
        return list(loader)

    whole = batches(0)
    for found, expected in zip(batches(3), whole[12:], strict=True):
        assert torch.equal(found.image_BCHW, expected.image_BCHW)
    for found, expected in zip(batches(4, world=2, rank=1), whole[17::2], strict=True):
        assert torch.equal(found.image_BCHW, expected.image_BCHW)


AUGMENTED = [
    [],
    ["crop=src", "crop_scale=[0.08,1]"],
    ["interpolation=random"],
    ["interpolation=nearest"],
    ["auto_augment=rand-m9-n4-p1"],
    ["auto_augment=3aug"],
    ["auto_augment=3aug", "color_jitter=0.4"],
    ["reprob=1"],
    ["reprob=1", "remode=const"],
    ["reprob=1", "recount=9"],
]


def first_images(world, configs):
    found = []
    for config in configs:
        run, _ = prepare.prepare(config, world)
        batch = next(loaders.train_batches(run, start_step=0))
        found.append(train.to_device(run, batch)[0].numpy().tobytes())
    return found


def test_every_option_of_augmentation_reaches_the_images_of_a_run(ranks, small_run):
    configs = [
        small_run(*(f"dataset.train.{option}" for option in options))
        for options in [*AUGMENTED, AUGMENTED[-1]]
    ]
    (found,) = ranks(1, first_images, configs)
    assert len(set(found)) == len(AUGMENTED), "each differs from all others"
    assert found[-1] == found[-2], "and the same options give the same"


def test_repeats_reach_the_images_of_a_run(ranks, small_run, many):
    config = small_run(
        f"dataset.train.root={many.root.parent}",
        "dataset.train.repeats=3",
        "dataset.train.hflip=0",
        "dataset.train.crop_scale=[1,1]",
        "dataset.train.crop_ratio=[1,1]",
        "training.steps=1",
    )
    (found,) = ranks(1, first_pictures, config)
    assert [found[0]] * 3 == found[:3]
    assert found[0] != found[3]


def first_pictures(world, config):
    """The images of the first microbatch, by their pixels."""
    run, _ = prepare.prepare(config, world)
    batch = next(loaders.train_batches(run, start_step=0))
    return [image_CHW.numpy().tobytes() for image_CHW in batch.image_BCHW]


def test_update_freq_is_another_name_of_grad_accum_steps(small_run):
    assert small_run("training.update_freq=4") == small_run("training.grad_accum_steps=4")
    same = small_run("training.update_freq=4", "training.grad_accum_steps=4")
    assert same.training.grad_accum_steps == 4
    with pytest.raises(ValueError, match=r"update_freq=4: is another name of grad_accum_steps=2"):
        small_run("training.update_freq=4", "training.grad_accum_steps=2")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["training.bce_threshold=0"], "bce_threshold=0.0: has no effect with training.loss=ce"),
        (["training.bce_sum=true"], "bce_sum=True: has no effect with training.loss=ce"),
        (
            ["training.loss=bce", "training.bce_threshold=0"],
            r"label_smoothing=0.1: makes a target of every class, 0.1 / 3",
        ),
        (["training.loss=mse"], "training.loss=mse: must be one of ce, bce"),
        (["optimizer.warmup_lr=1e-6"], "warmup_lr=1e-06: has no effect with optimizer.warmup_ste"),
        (["optimizer.warmup_prefix=false"], "warmup_prefix=False: has no effect with optimizer.w"),
        (
            ["optimizer.warmup_steps=2", "optimizer.warmup_lr=1"],
            r"warmup_lr=1.0: must be at most lr=0.001",
        ),
        (["optimizer.layer_decay=1"], "layer_decay=1.0: has no effect"),
        (["optimizer.name=lamb", "optimizer.momentum=0.5"], "momentum=0.5: has no effect with opt"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_options_without_effect_are_refused(small_run, options, message):
    with pytest.raises(ValueError, match=message):
        small_run(*options)


def test_scaled_learning_rate_below_the_last_is_refused(ranks, small_run):
    def message(world, config):
        with pytest.raises(
            ValueError, match=r"min_lr=1e-05: must be at most lr=0.001 x 5"
        ) as error:
            prepare.prepare(config, world)
        return str(error.value)

    config = small_run("optimizer.base_batch=1000000")
    assert "base_batch=1000000" in ranks(1, message, config)[0]
