"""Mixup and CutMix: timm's tensors, drawn from the seed and the place in the run alone."""

import numpy as np
import pytest
import torch
from timm.data import Mixup
from torch.nn import functional as F

import assemble
import train
from mixing import MODES, Mixer
from seeds import stable_seed

OPTIONS = {"prob": 1.0, "switch_prob": 0.5, "mode": "batch", "smoothing": 0.1, "num_classes": 3}


def mixer(seed=0, **options):
    return Mixer(**{**OPTIONS, "mixup": 0.8, "cutmix": 1.0, "seed": seed, **options})


def images():
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 3, 8, 8, generator=generator), torch.tensor([0, 1, 2, 0, 1, 2])


@pytest.mark.parametrize("mode", MODES)
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


def seen_targets(world, config):
    run, _ = assemble.prepare(config, world)
    pairs = [
        (batch.position_B.tolist(), *train.to_device(run, batch))
        for batch in assemble.train_batches(run, start_step=0)
    ]
    return [(positions, image.numpy(), target.numpy()) for positions, image, target in pairs]


def test_the_same_images_are_mixed_alike_on_one_and_two_ranks(ranks, small_run):
    options = ["dataset.train.mixup=0.8", "dataset.train.batch_size=4", "training.steps=2"]
    accumulated = small_run(*options, "training.grad_accum_steps=2")
    (alone,) = ranks(1, seen_targets, accumulated)
    shared = [item for items in ranks(2, seen_targets, small_run(*options)) for item in items]
    assert sorted(p for p, *_ in alone) == sorted(p for p, *_ in shared)
    for positions, image, target in alone:
        (twin,) = [item for item in shared if item[0] == positions]
        assert (image == twin[1]).all()
        assert (target == twin[2]).all()


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
            r"mixup_prob=0: nothing is mixed",
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
