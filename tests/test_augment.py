"""Augmentation: timm's tensors for the same draws, which depend on the seed alone."""

import math
import random

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter, ImageOps
from timm.data.transforms_factory import transforms_imagenet_train
from torchvision import transforms

from images import augment
from images.augment import Normaliser, drawing_from, train_transform
from images.cache import index_images
from tests.support.pictures import folder_dataset, train_batches

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
CROP = {"scale": (0.2, 1.0), "ratio": (0.75, 1.33)}
SIZE = (24, 24)
normalise = Normaliser(MEAN, STD)
ALL_ON = {"auto_augment": "rand-m9-mstd0.5-inc1"}


def photo(width=40, height=30, seed=0):
    """A picture with gradients and an edge, so that every operation of a policy shows."""
    rng = np.random.default_rng(seed)
    row, column = np.mgrid[0:height, 0:width] / max(width, height)
    pixels = np.stack([row, column, (row > 0.3) * 0.6], axis=2) * 200
    return Image.fromarray((pixels + rng.uniform(0, 50, pixels.shape)).astype(np.uint8))


def ours(**options):
    values = {"img_size": SIZE, **CROP, "hflip": 0.5, "color_jitter": 0.0}
    values |= {"interpolation": "bicubic", "mean": MEAN}
    return train_transform(**values | options)


def normalised(image):
    pixels = torch.from_numpy(np.array(image).copy()).permute(2, 0, 1).double() / 255
    mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in (MEAN, STD))
    return ((pixels - mean) / std).float()


@pytest.fixture
def pillow_12(monkeypatch):
    """Pillow as it was when the policies were written: of 0 bits it keeps none."""
    real = ImageOps.posterize

    def posterize(image, bits):
        return image.point(lambda _: 0) if bits == 0 else real(image, bits)

    monkeypatch.setattr(ImageOps, "posterize", posterize)


def drawn(transform, image, seed):
    with drawing_from(seed):
        return transform(image)


@pytest.mark.parametrize(
    "options",
    [
        {"auto_augment": "rand-m9-mstd0.5-inc1"},
        {"auto_augment": "rand-m10-n2-p1"},
        {"auto_augment": "rand-mstd1-tweights"},
        {"auto_augment": "augmix-m5-w4"},
        {"auto_augment": "original-mstd0.5"},
        {"auto_augment": "3aug", "color_jitter": 0.3},
        {"color_jitter": 0.4},
    ],
    ids=lambda options: next(iter(options.values())),
)
@pytest.mark.usefixtures("pillow_12")
def test_whole_transform_is_timms_for_the_same_draws(options):
    policy = options.get("auto_augment")
    theirs = transforms_imagenet_train(
        SIZE,
        **CROP,
        color_jitter=options.get("color_jitter", 0.0) or None,
        auto_augment="3a" if policy == "3aug" else policy,
        interpolation="random",
        mean=MEAN,
        std=STD,
    )
    transform = ours(interpolation="random", **options)
    for seed in range(25):
        image = photo(seed=seed)
        found, expected = drawn(transform, image, seed), drawn(theirs, image, seed)
        torch.testing.assert_close(normalise(found), expected, atol=2e-6, rtol=0)


@pytest.mark.usefixtures("pillow_12")
@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_policy_has_timms_filter_fill_and_shift(interpolation):
    _, theirs, _ = transforms_imagenet_train(
        SIZE,
        auto_augment="rand-m9-mstd0.5-inc1",
        interpolation=interpolation,
        mean=MEAN,
        std=STD,
        separate=True,
    )
    policy = augment.auto_augmentation(
        "rand-m9-mstd0.5-inc1", interpolation=interpolation, mean=MEAN
    )
    for seed in range(40):
        assert drawn(policy, photo(), seed) == drawn(theirs, photo(), seed)


@pytest.mark.parametrize("name", ["rand-m30-n4-p1-mmax30-inc1", "rand-m0-n4-p1", "v0", "augmix"])
def test_no_policy_ends_in_an_error_with_this_pillow(name):
    policy = augment.auto_augmentation(name, interpolation="bicubic", mean=MEAN)
    for seed in range(60):
        assert drawn(policy, photo(), seed).size == (40, 30)


def test_3_augment_is_grayscale_solarisation_or_blur_each_a_third_of_the_time():
    policy = augment.auto_augmentation("3aug", interpolation="bicubic", mean=MEAN)
    image, counts = photo(), [0, 0, 0]
    for seed in range(300):
        found = drawn(policy, image, seed)
        with drawing_from(seed):
            kind, radius = random.choice([0, 1, 2]), random.uniform(0.1, 2.0)
        expected = [
            ImageOps.solarize(image, 128),
            transforms.Grayscale(3)(image),
            image.filter(ImageFilter.GaussianBlur(radius)),
        ][kind]
        assert found == expected
        counts[kind] += 1
    assert all(abs(count - 100) < 4 * math.sqrt(300 * 2 / 9) for count in counts)


def test_src_is_resize_reflected_shift_and_flip():
    bicubic = transforms.InterpolationMode.BICUBIC
    theirs = transforms.Compose(
        [
            transforms.Resize(24, bicubic),
            transforms.RandomCrop(24, padding=4, padding_mode="reflect"),
            transforms.RandomHorizontalFlip(),
        ]
    )
    for seed in range(10):
        image = photo(60, 45, seed)
        expected = normalised(drawn(theirs, image, seed))
        torch.testing.assert_close(normalise(drawn(ours(crop="src"), image, seed)), expected)


def states():
    return torch.get_rng_state().tolist(), random.getstate(), np.random.get_state()[1].tolist()


def test_draws_come_from_the_seed_and_every_generator_is_left_as_it_was():
    transform = ours(**ALL_ON)
    before = states()
    first = drawn(transform, photo(), 3)
    assert states() == before
    torch.rand(1), random.random(), np.random.rand()
    assert torch.equal(drawn(transform, photo(), 3), first)
    assert not torch.equal(drawn(transform, photo(), 4), first)


def test_generators_are_put_back_after_an_error():
    before = states()
    with pytest.raises(ZeroDivisionError), drawing_from(0):
        torch.rand(1), random.random(), np.random.rand(), 1 / 0
    assert states() == before


def test_numpys_seed_is_as_different_as_the_others():
    with drawing_from(1):
        first = np.random.rand()
    with drawing_from(2):
        assert np.random.rand() != first


def loaded(index, **changes):
    values = {"transform": ours(**ALL_ON), "batch_size": 3, "num_steps": 2} | changes
    batches = train_batches(index, **values)
    return {
        int(position): image_CHW
        for batch in batches
        for position, image_CHW in zip(batch.position_B, batch.image_BCHW, strict=True)
    }


@pytest.mark.parametrize(
    "changes",
    [
        {"num_workers": 2},
        {"batch_size": 2, "num_steps": 3},
        {"batch_size": 1, "world": 3, "rank": 2},
        {"start_step": 1},
    ],
    ids=str,
)
def test_workers_batches_ranks_and_resuming_change_no_draw(tmp_path, changes):
    index = index_images(folder_dataset(tmp_path / "data"), "train")
    expected, found = loaded(index), loaded(index, **changes)
    assert found
    assert all(torch.equal(image, expected[position]) for position, image in found.items())


@pytest.mark.parametrize(
    ("option", "message"),
    [
        (["auto_augment=rand-x9"], "auto_augment=rand-x9: must be as rand-m9"),
        (["auto_augment=ranD-m9"], "auto_augment=ranD-m9: must be as rand-m9"),
        (["auto_augment=3augment"], "auto_augment=3augment: must be as"),
        (["auto_augment=v0", "color_jitter=0.3"], "color_jitter=0.3: has no effect with auto_aug"),
        (["remode=rand"], "remode=rand: has no effect with reprob=0"),
        (["recount=2"], "recount=2: has no effect with reprob=0"),
        (["crop=src", "crop_scale=[0.5,1]"], r"crop_scale=\[0.5, 1.0\]: has no effect with crop=s"),
        (["crop=src", "interpolation=random"], "interpolation=random: needs crop=rrc"),
        (["interpolation=box"], "interpolation=box: must be one of"),
        (["auto_augment=v0", "interpolation=lanczos"], "train.interpolation=lanczos: Pillow can"),
        (
            ["scaled_decode=true", "interpolation=random"],
            "scaled_decode=True: has no effect with i",
        ),
        (["scaled_decode=true", "crop=src"], "scaled_decode=True: has no effect with crop=src"),
        (["crop_scale=[0,0]"], "crop_scale=.*: must not end at 0"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_what_timm_would_pass_over_is_refused(small_run, option, message):
    overrides = [f"dataset.train.{item}" for item in option]
    if "crop=src" in option:
        overrides = ["dataset.train.crop_scale=[0.08,1]", *overrides]
    with pytest.raises(ValueError, match=message):
        small_run(*overrides)


@pytest.mark.parametrize("policy", ["3aug", "rand-m9-mstd0.5-t3a"])
def test_color_jitter_works_beside_3_augment(small_run, policy):
    train = small_run(
        f"dataset.train.auto_augment={policy}", "dataset.train.color_jitter=0.3"
    ).dataset.train
    assert (train.auto_augment, train.color_jitter) == (policy, 0.3)
