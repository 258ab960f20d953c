"""Random erasing, mixup and CutMix: timm's tensors, drawn from the seed and the position alone."""

import math
import random

import numpy as np
import pytest
import torch
from timm.data import Mixup
from timm.data.random_erasing import RandomErasing
from torch.nn import functional as F

import train
from images.mixing import Eraser, Mixer
from options.schema import TrainDataOptions
from parallel.seeds import stable_seed
from training import loaders, prepare

OPTIONS = {"prob": 1.0, "switch_prob": 0.5, "mode": "batch", "smoothing": 0.1, "num_classes": 3}


def mixer(seed=0, **options):
    given = {**OPTIONS, "mixup": 0.8, "cutmix": 1.0, **options}
    apart = {name: given.pop(name) for name in ("smoothing", "num_classes")}
    renamed = {("" if n in ("mixup", "cutmix") else "mixup_") + n: v for n, v in given.items()}
    return Mixer(TrainDataOptions(**renamed), **apart, seed=seed)


def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, 8, 8, generator=generator), torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize("mode", ["batch", "pair", "elem"])
@pytest.mark.parametrize(("mixup", "cutmix"), [(0.8, 0.0), (0.0, 1.0), (0.8, 1.0)])
def test_same_draws_give_timms_tensors(mode, mixup, cutmix):
    timm = Mixup(
        mixup, cutmix, prob=1.0, switch_prob=0.5, mode=mode, label_smoothing=0.1, num_classes=3
    )
    for group in range(4):
        np.random.seed(stable_seed(7, "mix", group) % 2**32)
        expected = timm(*images())
        found = mixer(seed=7, mixup=mixup, cutmix=cutmix, mode=mode)(*images(), group=group)
        assert torch.equal(found[0], expected[0])
        assert torch.equal(found[1], expected[1])


def test_mixup_in_closed_form():
    image_BCHW, label_B = images()
    mixed_BCHW, target_BY = mixer(cutmix=0.0)(image_BCHW.clone(), label_B, group=0)
    np.random.seed(stable_seed(0, "mix", 0) % 2**32)
    np.random.rand()  # whether to mix at all
    lam = np.random.beta(0.8, 0.8)
    expected_BCHW = lam * image_BCHW + (1 - lam) * image_BCHW.flip(0)
    torch.testing.assert_close(mixed_BCHW, expected_BCHW)
    smooth_BY = F.one_hot(label_B, 3) * 0.9 + 0.1 / 3
    torch.testing.assert_close(target_BY, lam * smooth_BY + (1 - lam) * smooth_BY.flip(0))


def test_draws_depend_on_seed_and_group_alone():
    np.random.seed(3)
    state = np.random.get_state()[1].tolist()
    first = mixer()(*images(), group=5)[1]
    assert np.random.get_state()[1].tolist() == state, "the caller's generator is left alone"
    np.random.rand(10)
    assert torch.equal(mixer()(*images(), group=5)[1], first)
    assert not torch.equal(mixer()(*images(), group=6)[1], first)
    assert not torch.equal(mixer(seed=1)(*images(), group=5)[1], first)


def test_cutmix_in_closed_form():
    image_BCHW, label_B = images()
    mixed_BCHW, target_BY = mixer(mixup=0.0)(image_BCHW.clone(), label_B, group=0)
    np.random.seed(stable_seed(0, "mix", 0) % 2**32)
    np.random.rand()  # whether to mix at all
    lam = np.random.beta(1.0, 1.0)
    side = int(8 * np.sqrt(1 - lam))
    row, column = np.random.randint(8), np.random.randint(8)
    top, left = max(row - side // 2, 0), max(column - side // 2, 0)
    bottom, right = min(row + (side + 1) // 2, 8), min(column + (side + 1) // 2, 8)
    assert top < bottom
    assert left < right
    expected_BCHW = image_BCHW.clone()
    expected_BCHW[..., top:bottom, left:right] = image_BCHW.flip(0)[..., top:bottom, left:right]
    assert torch.equal(mixed_BCHW, expected_BCHW)
    kept = 1 - (bottom - top) * (right - left) / 64  # what is left of the image itself
    smooth_BY = F.one_hot(label_B, 3) * 0.9 + 0.1 / 3
    torch.testing.assert_close(target_BY, kept * smooth_BY + (1 - kept) * smooth_BY.flip(0))


def eraser(seed=0, **options):
    values = {"prob": 0.5, "mode": "pixel", "count": 1} | options
    o = TrainDataOptions(**{f"re{name}": value for name, value in values.items()})
    return Eraser(o, device=torch.device("cpu"), seed=seed)


@pytest.mark.parametrize("mode", ["pixel", "rand", "const"])
@pytest.mark.parametrize("count", [1, 3])
def test_same_draws_erase_what_timm_erases(mode, count):
    timm = RandomErasing(0.5, mode=mode, max_count=count, device="cpu")
    image_BCHW, position_B = torch.ones(40, 3, 16, 24), torch.arange(100, 140)
    expected_BCHW = image_BCHW.clone()
    state = random.getstate()
    with torch.random.fork_rng(devices=[]):
        for image_CHW, position in zip(expected_BCHW, position_B, strict=True):
            seed = stable_seed(7, "erase", int(position))
            random.seed(seed)
            torch.manual_seed(seed)
            timm(image_CHW)
    random.setstate(state)
    found_BCHW = eraser(seed=7, mode=mode, count=count)(image_BCHW.clone(), position_B)
    assert torch.equal(found_BCHW, expected_BCHW)
    assert 5 < (found_BCHW != image_BCHW).flatten(1).any(1).sum() < 35


def test_what_is_erased_depends_on_seed_and_position_alone():
    def states():
        return torch.get_rng_state().tolist(), random.getstate()

    before = states()
    position_B = torch.arange(30)
    whole = eraser()(torch.ones(30, 3, 9, 9), position_B)
    assert states() == before, "the caller's generators are left alone"
    torch.rand(1), random.random()
    turned = eraser()(torch.ones(30, 3, 9, 9), position_B.flip(0))
    assert torch.equal(turned.flip(0), whole), "in any order and company"
    assert torch.equal(eraser()(torch.ones(4, 3, 9, 9), position_B[7:11]), whole[7:11])
    assert not torch.equal(eraser(seed=1)(torch.ones(30, 3, 9, 9), position_B), whole)
    layout = torch.ones(30, 3, 9, 9).contiguous(memory_format=torch.channels_last)
    assert torch.equal(eraser()(layout, position_B), whole), "in any memory format"


def test_random_erasing_has_the_statistics_of_its_paper():
    image_BCHW = eraser(prob=0.25)(torch.full((1600, 3, 64, 64), 9.0), torch.arange(1600))
    erased_BHW = (image_BCHW != 9).any(1)
    is_hit_B = erased_BHW.flatten(1).any(1)
    shares = erased_BHW[is_hit_B].float().mean((1, 2))
    aspects = (erased_BHW.any(2).sum(1) / erased_BHW.any(1).sum(1))[is_hit_B].log()
    frequency = is_hit_B.float().mean().item()
    assert frequency == pytest.approx(0.25, abs=4 * math.sqrt(0.25 * 0.75 / 1600))
    # Area U(0.02, 1/3), aspect log-uniform in (0.3, 1 / 0.3); sides are rounded and must fit.
    assert 0.015 < shares.min() < 0.04
    assert 0.3 < shares.max() < 0.345
    assert shares.mean().item() == pytest.approx((0.02 + 1 / 3) / 2, abs=0.02)
    assert aspects.mean().item() == pytest.approx(0, abs=0.15)
    assert aspects.std().item() == pytest.approx(-math.log(0.3) / math.sqrt(3), abs=0.08)
    noise = image_BCHW.permute(0, 2, 3, 1)[erased_BHW]
    assert noise.mean().item() == pytest.approx(0, abs=0.01)
    assert noise.std().item() == pytest.approx(1, abs=0.01)


def seen_targets(world, config, start_step=0):
    run, _ = prepare.prepare(config, world)
    pairs = [
        (batch.position_B.tolist(), *train.to_device(run, batch))
        for batch in loaders.train_batches(run, start_step=start_step)
    ]
    return [(positions, image.numpy(), target.numpy()) for positions, image, target in pairs]


def test_the_same_images_are_erased_and_mixed_alike_on_one_and_two_ranks(ranks, small_run):
    options = ["dataset.train.mixup=0.8", "dataset.train.batch_size=4", "training.steps=2"]
    options += ["dataset.train.reprob=0.5"]
    accumulated = small_run(*options, "training.grad_accum_steps=2")
    (alone,) = ranks(1, seen_targets, accumulated)
    shared = [item for items in ranks(2, seen_targets, small_run(*options)) for item in items]
    assert sorted(p for p, *_ in alone) == sorted(p for p, *_ in shared)
    for positions, image, target in alone:
        (twin,) = [item for item in shared if item[0] == positions]
        assert (image == twin[1]).all()
        assert (target == twin[2]).all()


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("start_step", [0, 2])
def test_workers_and_resuming_change_nothing_of_what_a_step_gets(
    ranks, small_run, num_workers, start_step
):
    options = ["dataset.train.mixup=0.8", "dataset.train.cutmix=1", "dataset.train.reprob=0.5"]
    options += ["dataset.train.batch_size=4", "dataset.train.auto_augment=rand-m9-mstd0.5-inc1"]
    options += ["dataset.train.recount=3", "training.steps=4"]
    (whole,) = ranks(1, seen_targets, small_run(*options))
    config = small_run(*options, f"dataset.num_workers={num_workers}")
    (found,) = ranks(1, seen_targets, config, start_step)
    assert len(found) == 4 - start_step
    for (place, image, target), (same_place, *same) in zip(found, whole[start_step:], strict=True):
        assert place == same_place
        assert (image == same[0]).all()
        assert (target == same[1]).all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["dataset.train.mixup_prob=0.5"], r"mixup_prob=0.5: has no effect with mixup=0.0 and cut"),
        (
            ["dataset.train.mixup=1", "dataset.train.mixup_switch_prob=0.9"],
            r"mixup_switch_prob=0.9: has no effect with mixup=1.0 and cutmix=0.0",
        ),
        (
            ["dataset.train.mixup=1", "dataset.train.mixup_prob=0"],
            r"mixup_prob=0.0: nothing is mixed",
        ),
        (
            [
                "dataset.train.mixup=1",
                "dataset.train.cutmix=1",
                "dataset.train.mixup_switch_prob=0",
            ],
            r"mixup_switch_prob=0.0: cutmix is never drawn",
        ),
        (["training.ema_decay=1"], r"training.ema_decay=1.0"),
        (["training.ema_decay=0"], r"training.ema_decay=0.0"),
        (["dataset.train.cutmix=1"], r"batch_size=5: must be even, mixup and cutmix mix pairs"),
    ],
)
def test_what_has_no_effect_or_cannot_work_is_refused(small_run, options, message):
    with pytest.raises(ValueError, match=message):
        small_run(*options)
