import itertools
import os
import random
import subprocess
import sys
import time
from multiprocessing.reduction import ForkingPickler
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import create_transform
from torchvision import transforms
from torchvision.transforms import v2

from imagenet_dataset import (
    Order,
    TrainImages,
    epoch_permutation,
    step_positions,
)
from images.augment import (
    SPARE,
    Normaliser,
    RandomResizedCrop,
    ReusedMemory,
    resize,
    train_transform,
    val_transform,
)
from images.batches import NOT_COUNTED, BatchMemory, Collate
from images.cache import index_images
from images.feed import Feed, Tolerance
from images.mixing import Eraser
from images.reading import ImageReader, decode_rgb, read_header, rgb
from options.schema import TrainDataOptions
from tests.support import pictures
from tests.support.pictures import folder_dataset, write_image
from tests.support.processes import TIMEOUT_S

MEAN, STD = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)
OPTIONS = {
    "img_size": (8, 8),
    "scale": (0.2, 1.0),
    "ratio": (0.75, 1.33),
    "hflip": 0.5,
    "color_jitter": 0.4,
    "interpolation": "bicubic",
    "mean": MEAN,
}
AUGMENT = train_transform(**OPTIONS)
PLAIN = val_transform(
    img_size=(8, 8),
    crop_ratio=1.0,
    interpolation="bicubic",
    mean=MEAN,
    std=STD,
    skip_normalise=True,
)


@pytest.fixture
def root(tmp_path):
    return folder_dataset(tmp_path / "data")


def train_batches(index, **changes):
    values = {"transform": AUGMENT, "batch_size": 3, "grad_accum_steps": 2, "num_steps": 4}
    return pictures.train_batches(index, **values | changes)


def val_batches(index, **changes):
    return pictures.val_batches(index, **{"transform": PLAIN, "batch_size": 2} | changes)


def feed(loader, **changes):
    values = {"split": "val", "device": torch.device("cpu"), "normaliser": Normaliser(MEAN, STD)}
    return Feed(loader, **{**values, "tolerance": Tolerance(None), **changes})


def assert_same(batches, others):
    batches, others = list(batches), list(others)
    assert len(batches) == len(others) > 0
    for batch, other in zip(batches, others, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(batch[:3], other[:3], strict=True))


def test_step_positions_partition_each_step_for_any_world():
    for world, accum, batch in ((1, 1, 12), (2, 3, 2), (3, 2, 2), (4, 1, 3)):
        for step in (0, 5):
            seen = [
                position
                for microbatch in range(accum)
                for rank in range(world)
                for position in step_positions(
                    step, microbatch=microbatch, rank=rank, world=world, batch=batch, accum=accum
                )
            ]
            assert seen == list(range(step * 12, step * 12 + 12))


def test_epoch_visits_each_image_once_and_epochs_differ(root):
    index = index_images(root, "train")
    dataset = TrainImages(ImageReader(index), transform=PLAIN, order=Order(11), seed=3)
    keys = [dataset[position][0].numpy().tobytes() for position in range(22)]
    assert len(set(keys[:11])) == 11
    assert set(keys[:11]) == set(keys[11:])
    assert keys[:11] != keys[11:]


def test_order_depends_on_the_seed_and_not_on_the_global_rng():
    first = epoch_permutation(100, seed=1, epoch=0)
    torch.manual_seed(99)
    assert torch.equal(first, epoch_permutation(100, seed=1, epoch=0))
    assert not torch.equal(first, epoch_permutation(100, seed=2, epoch=0))


def test_order_is_the_same_in_every_version():
    # A recorded value: a change here silently changes what every resumed run sees.
    assert epoch_permutation(8, seed=0, epoch=0).tolist() == [1, 2, 4, 3, 0, 7, 5, 6]


def test_dataset_keeps_two_permutations(root):
    dataset = TrainImages(
        ImageReader(index_images(root, "train")), transform=PLAIN, order=Order(11), seed=3
    )
    for position in (0, 11, 22, 33):
        dataset[position]
    assert list(dataset._permutations) == [2, 3]


@pytest.mark.parametrize("world", [2, 3])
def test_steps_see_the_same_images_at_any_world(root, world):
    index = index_images(root, "train")
    changes = {"grad_accum_steps": 2, "num_steps": 3}
    single = list(train_batches(index, batch_size=6, **changes))
    ranks = [
        list(train_batches(index, batch_size=6 // world, rank=rank, world=world, **changes))
        for rank in range(world)
    ]
    for number, batch in enumerate(single):
        parts = [rank[number] for rank in ranks]
        for field in range(3):
            assert torch.equal(batch[field], torch.cat([part[field] for part in parts]))


def erased(loader):
    """What a run's feed yields, with what is done on the device."""
    eraser = Eraser(TrainDataOptions(reprob=0.5, recount=2), device=torch.device("cpu"), seed=5)
    for batch in feed(loader):
        eraser(batch.image_BCHW, batch.position_B)
        yield batch


@pytest.mark.parametrize("num_workers", [0, 1, 2, 4])
@pytest.mark.parametrize("world", [1, 2, 3])
def test_workers_world_and_resuming_change_no_bit(root, world, num_workers):
    index = index_images(root, "train")
    single = list(erased(train_batches(index, batch_size=6)))
    for start_step in range(4):
        parts = []
        for rank in range(world):
            loader = train_batches(
                index,
                batch_size=6 // world,
                world=world,
                rank=rank,
                start_step=start_step,
                num_workers=num_workers if rank == 0 else 0,
                reuses_memory=True,
            )
            parts.append(list(erased(loader)))
        for number, batch in enumerate(single[2 * start_step :]):
            for field in range(3):
                joined = torch.cat([part[number][field] for part in parts])
                assert torch.equal(batch[field], joined)


@pytest.mark.parametrize("num_workers", [0, 1, 2, 4])
def test_an_epoch_has_each_image_once_over_three_kills(root, num_workers):
    index = index_images(root, "train")
    whole = 22  # two epochs in steps of two images
    stops, seen, step = [3, 4, 9, 11], [], 0
    for stop in stops:
        changes = {"batch_size": 1, "num_steps": 11, "start_step": step}
        batches = iter(train_batches(index, num_workers=num_workers, **changes))
        while step < stop:
            for _ in range(2):  # microbatches; those made ahead are lost with the process
                seen += next(batches).position_B.tolist()
            step += 1
        del batches
    assert seen == list(range(whole))
    dataset = TrainImages(ImageReader(index), transform=PLAIN, order=Order(11), seed=5)
    for epoch in (seen[:11], seen[11:]):
        pixels = [dataset[position].image_CHW.numpy().tobytes() for position in epoch]
        assert len(set(pixels)) == 11


def test_reused_memory_is_not_written_before_it_is_copied(root):
    index = index_images(root, "train")
    changes = {"num_steps": 20, "num_workers": 2}
    fresh = list(feed(train_batches(index, **changes)))
    slow = []
    for batch in feed(train_batches(index, **changes, reuses_memory=True)):
        time.sleep(0.01)  # the workers fill all that they may
        slow.append(batch)
    assert_same(fresh, slow)


@pytest.mark.parametrize("num_workers", [0, 2])
def test_batches_lie_in_the_memory_made_for_them(root, num_workers):
    changes = {"num_steps": 20, "num_workers": num_workers, "reuses_memory": True}
    loader = train_batches(index_images(root, "train"), **changes)
    memory = loader.collate_fn.memory
    found = {batch.image_BCHW.data_ptr() for batch in loader}
    assert found == {buffer.data_ptr() for buffer in memory.buffers}
    assert len(found) == max(1, num_workers) * BatchMemory.EACH
    assert all(buffer.is_shared() == bool(num_workers) for buffer in memory.buffers)


def test_images_larger_than_the_memory_made_for_them_take_other(root):
    """A transform may make them as large as it likes."""
    index = index_images(root, "train")
    larger = train_transform(**OPTIONS | {"img_size": (9, 9)})
    wanted = list(train_batches(index, transform=larger))
    for num_workers in (0, 1):
        loader = train_batches(index, transform=larger, num_workers=num_workers, reuses_memory=True)
        memory = BatchMemory(10, workers=num_workers)
        object.__setattr__(loader, "collate_fn", Collate(memory))
        assert_same(wanted, loader)


def test_too_little_shared_memory_is_an_error_with_its_option(root, monkeypatch):
    def fail(_size):
        raise RuntimeError("unable to allocate shared memory(shm)")

    monkeypatch.setattr(torch.UntypedStorage, "_new_shared", fail)
    index = index_images(root, "train")
    train_batches(index, num_workers=0, reuses_memory=True)
    with pytest.raises(
        OSError, match=r"dataset.num_workers=3: 0.00 GiB .* \(docker run --shm-size"
    ):
        train_batches(index, num_workers=3, reuses_memory=True)


def test_train_loader_counts_microbatches_and_types(root):
    loader = train_batches(index_images(root, "train"), start_step=1)
    batches = list(loader)
    assert len(loader) == len(batches) == 6
    assert batches[0].image_BCHW.shape == (3, 3, 8, 8)
    assert batches[0].image_BCHW.dtype == torch.uint8
    assert batches[0].image_BCHW.is_contiguous(memory_format=torch.channels_last)
    assert batches[0].label_B.dtype == batches[0].position_B.dtype == torch.int64
    assert torch.cat([b.position_B for b in batches]).tolist() == list(range(6, 24))


def test_augmentation_differs_between_epochs_seeds_and_images(root):
    index = index_images(root, "train")
    for path in index.paths[1:]:
        (index.root / path).write_bytes((index.root / index.paths[0]).read_bytes())
    reader = ImageReader(index_images(root, "train"))
    changes = {"transform": AUGMENT, "order": Order(11)}
    images = [TrainImages(reader, **changes, seed=5)[p][0] for p in range(22)]
    images.append(TrainImages(reader, **changes, seed=6)[0][0])
    assert len({image.numpy().tobytes() for image in images}) == 23


@pytest.mark.parametrize("num_workers", [0, 1])
def test_loading_leaves_the_rng_of_the_main_process_alone(root, num_workers):
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    list(train_batches(index_images(root, "train"), num_workers=num_workers))
    list(val_batches(index_images(root, "val"), num_workers=num_workers))
    after = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tobytes()
    assert torch.equal(before[0], after[0])
    assert before[1:] == after[1:]


def test_augmentation_never_touches_the_cuda_rng(root, monkeypatch):
    def refuse(*_args):
        raise AssertionError("the seed of the CUDA generators was changed")

    monkeypatch.setattr(torch.cuda, "manual_seed_all", refuse)
    monkeypatch.setattr(torch, "manual_seed", refuse)
    list(train_batches(index_images(root, "train")))


@pytest.mark.parametrize("world", [1, 2, 3, 7, 9])
def test_validation_counts_each_image_once_with_equal_batches(root, world):
    index = index_images(root, "val")
    ranks = [list(val_batches(index, rank=rank, world=world)) for rank in range(world)]
    sizes = {tuple(len(batch.label_B) for batch in batches) for batches in ranks}
    assert len(sizes) == 1
    counted = [
        (position, label)
        for batch in itertools.chain(*ranks)
        for position, label in zip(batch.position_B.tolist(), batch.label_B.tolist(), strict=True)
        if label != NOT_COUNTED
    ]
    assert sorted(counted) == list(enumerate(index.labels))


def test_validation_workers_change_no_bit_and_survive_a_second_pass(root):
    index = index_images(root, "val")
    loader = val_batches(index, num_workers=2)
    assert_same(val_batches(index), loader)
    assert_same(val_batches(index), loader)


def report_process(_image):
    return torch.tensor([torch.get_num_threads(), os.getpgid(0), os.getpid()])


def test_workers_use_one_thread_and_leave_the_process_group(root):
    batches = val_batches(index_images(root, "val"), transform=report_process, num_workers=1)
    threads, group, process = next(iter(batches)).image_BCHW[0].tolist()
    assert threads == 1
    assert group == process != os.getpgid(0)


SPAWNED = """
import multiprocessing, sys
from itertools import chain
class Both:
    def __init__(self, parts):
        self.parts, self.transform = parts, parts[0].transform
    def __getitems__(self, positions):
        made = [part.__getitems__(positions) for part in self.parts]
        return sum(count for count, _ in made), chain(*(samples for _, samples in made))
if __name__ == "__main__":
    multiprocessing.set_start_method("spawn")
    import test_imagenet_dataset as t
    from imagenet_dataset import LoaderOptions, train_loader
    raw = t.train_transform(**t.OPTIONS | {"color_jitter": 0})
    reader = t.ImageReader(t.index_images(t.Path(sys.argv[1]), "train"))
    both = Both([t.TrainImages(reader, transform=how, seed=5) for how in (raw, t.AUGMENT)])
    options = [LoaderOptions(batch_size=3, num_workers=count) for count in (0, 2)]
    loaders = [train_loader(both, range(24), options=one) for one in options]
    t.assert_same(*loaders)
"""


@pytest.mark.slow
def test_spawned_workers_change_no_bit(root, tmp_path):
    """Plain pickling does not test it: a process's pickler shares tensors, drawn into or not.

    One pair of workers makes batches with two transforms, since starting them is what takes time.
    """
    (tmp_path / "spawned.py").write_text(SPAWNED)
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": f"{here}:{here.parent}"}
    command = [sys.executable, str(tmp_path / "spawned.py"), str(root)]
    subprocess.run(command, env=env, check=True, timeout=TIMEOUT_S)


def test_exit_in_mid_epoch_does_not_hang(root):
    script = (
        "import sys, test_imagenet_dataset as t\n"
        "index = t.index_images(t.Path(sys.argv[1]), 'train')\n"
        "loader = t.train_batches(index, num_workers=1, num_steps=100)\n"
        "batches = iter(loader)\n"
        "next(batches)\n"
    )
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": f"{here}:{here.parent}"}
    subprocess.run(
        [sys.executable, "-c", script, str(root)], env=env, check=True, timeout=TIMEOUT_S
    )


def normalised(image):
    pixels = torch.from_numpy(np.array(image).copy()).permute(2, 0, 1).double() / 255
    mean, std = (torch.tensor(v).double().view(3, 1, 1) for v in (MEAN, STD))
    return ((pixels - mean) / std).float()


@pytest.mark.parametrize("size", [(8, 8), (12, 8)])
def test_validation_does_not_resample_images_of_the_right_size(tmp_path, size):
    write_image(tmp_path / "a.png", size=size)
    image = decode_rgb(tmp_path / "a.png")
    transform = val_transform(
        img_size=size[::-1], crop_ratio=1.0, interpolation="bicubic", mean=MEAN, std=STD
    )
    torch.testing.assert_close(transform(image), normalised(image), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(40, 30), (30, 41), (33, 33), (9, 50)])
def test_validation_equals_torchvision_resize_and_centre_crop(tmp_path, size):
    write_image(tmp_path / "a.png", size=size)
    image = decode_rgb(tmp_path / "a.png")
    ours = val_transform(
        img_size=(16, 16), crop_ratio=0.875, interpolation="bicubic", mean=MEAN, std=STD
    )
    bicubic = transforms.InterpolationMode.BICUBIC
    theirs = transforms.Compose([transforms.Resize(18, bicubic), transforms.CenterCrop(16)])
    torch.testing.assert_close(ours(image), normalised(theirs(image)), atol=1e-6, rtol=0)


@pytest.mark.parametrize("size", [(90, 70), (70, 90), (64, 64)])
@pytest.mark.parametrize("img_size", [56, 96])
@pytest.mark.parametrize("crop_ratio", [0.875, 0.9, 0.95, 1.0])
def test_validation_is_timms(tmp_path, size, img_size, crop_ratio):
    """Sizes at which rounding, instead of timm's floor, gives other pixels are among them."""
    write_image(tmp_path / "a.png", size=size)
    image = decode_rgb(tmp_path / "a.png")
    options = {"interpolation": "bicubic", "mean": MEAN, "std": STD}
    ours = val_transform(img_size=(img_size, img_size), crop_ratio=crop_ratio, **options)
    theirs = create_transform(img_size, crop_pct=crop_ratio, **options)
    torch.testing.assert_close(ours(image), theirs(image), atol=1e-6, rtol=0)


def test_validation_of_a_rectangle_never_pads(tmp_path):
    white = Image.new("RGB", (50, 13), "white")
    transform = val_transform(
        img_size=(8, 20), crop_ratio=0.9, interpolation="bilinear", mean=MEAN, std=STD
    )
    image_CHW = transform(white)
    assert image_CHW.shape == (3, 8, 20)
    assert (image_CHW > 0).all(), "a padded border would be black"


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_train_transform_equals_torchvision_with_the_same_draws(tmp_path, mode):
    write_image(tmp_path / "a.JPEG", size=(70, 90))
    source = read_header((tmp_path / "a.JPEG").read_bytes())
    transform = train_transform(**{**OPTIONS, "interpolation": mode})
    pixels_CHW = torch.from_numpy(rgb(source)).permute(2, 0, 1)
    mode = transforms.InterpolationMode(mode)
    jitter = transforms.ColorJitter(0.4, 0.4, 0.4)
    with torch.random.fork_rng(devices=[]):
        for seed in range(5):
            torch.manual_seed(seed)
            ours = transform(source)
            torch.manual_seed(seed)
            box = transforms.RandomResizedCrop.get_params(pixels_CHW, [0.2, 1.0], [0.75, 1.33])
            cropped = v2.functional.resized_crop(pixels_CHW, *box, [8, 8], mode, antialias=True)
            image = v2.functional.to_pil_image(cropped)
            theirs = jitter(transforms.RandomHorizontalFlip(0.5)(image))
            expected = normalised(theirs)
            torch.testing.assert_close(Normaliser(MEAN, STD)(ours), expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize("ratio", [(0.75, 4 / 3), (5.0, 6.0), (0.1, 0.2), (1.0, 1.0)])
def test_crops_are_drawn_as_torchvision_draws_them(ratio):
    crop = RandomResizedCrop((8, 8), scale=(0.08, 1.0), ratio=ratio, mode=None)
    with torch.random.fork_rng(devices=[]):
        for seed, (height, width) in itertools.product(range(60), ((90, 70), (31, 200), (1, 1))):
            torch.manual_seed(seed)
            ours = crop.draw(height, width)
            torch.manual_seed(seed)
            image_CHW = torch.empty(3, height, width)
            theirs = transforms.RandomResizedCrop.get_params(image_CHW, [0.08, 1.0], list(ratio))
            assert ours == tuple(theirs)


def test_raw_crops_and_flips_are_torchvisions(tmp_path):
    write_image(tmp_path / "a.JPEG", size=(90, 70))
    source = read_header((tmp_path / "a.JPEG").read_bytes())
    options = {**OPTIONS, "interpolation": "bilinear", "color_jitter": 0.0}
    ours = train_transform(**options)
    box = {"scale": OPTIONS["scale"], "ratio": OPTIONS["ratio"]}
    crop = transforms.RandomResizedCrop(OPTIONS["img_size"], **box)
    theirs = transforms.Compose([crop, transforms.RandomHorizontalFlip(0.5)])
    with torch.random.fork_rng(devices=[]):
        for seed in range(20):
            torch.manual_seed(seed)
            wanted_HWC = np.asarray(theirs(Image.fromarray(rgb(source))), dtype=int)
            torch.manual_seed(seed)
            found_CHW = ours(source)
            before = torch.get_rng_state()
            assert torch.equal(ours.draw_from(seed, source)(), found_CHW)
            assert torch.equal(torch.get_rng_state(), before)
            assert np.abs(found_CHW.permute(1, 2, 0).numpy() - wanted_HWC).max() <= 1


def test_memory_of_normalised_batches_is_reused_once_nothing_lies_in_it():
    memory = ReusedMemory()
    first = memory.empty(torch.Size((4, 5)))
    place, row = first.data_ptr(), first[1]
    del first
    assert memory.empty(torch.Size((4, 5))).data_ptr() != place  # a view is left
    del row
    assert place in {memory.empty(torch.Size((4, 5))).data_ptr() for _ in range(2)}
    kept = [memory.empty(torch.Size((4, 5))) for _ in range(5)]
    assert len({tensor.data_ptr() for tensor in kept}) == 5
    del kept
    assert len(memory._free) == SPARE


@pytest.mark.parametrize("mode", ["bilinear", "bicubic"])
def test_our_resize_is_near_pillows(mode):
    pixels_HWC = np.random.default_rng(0).integers(0, 256, (90, 70, 3), dtype=np.uint8)
    filters = {"bilinear": Image.Resampling.BILINEAR, "bicubic": Image.Resampling.BICUBIC}
    theirs = np.asarray(Image.fromarray(pixels_HWC).resize((32, 40), filters[mode])).astype(int)
    ours = resize(pixels_HWC, (40, 32), mode=transforms.InterpolationMode(mode))
    difference = np.abs(ours.permute(1, 2, 0).numpy().astype(int) - theirs)
    assert difference.max() <= 3
    assert difference.mean() < 0.05


def test_normalising_a_batch_on_the_device_changes_no_bit(root):
    index = index_images(root, "train")
    normalise = Normaliser(MEAN, STD)
    raw = list(train_batches(index))
    for batch, other in zip(raw, feed(train_batches(index)), strict=True):
        assert batch.image_BCHW.dtype == torch.uint8
        one_by_one = torch.stack([normalise(image_CHW) for image_CHW in batch.image_BCHW])
        assert torch.equal(other.image_BCHW, one_by_one)


@pytest.mark.parametrize("mode", ["RGB", "L", "P", "RGBA", "1", "LA"])
def test_every_png_mode_becomes_rgb(tmp_path, mode):
    write_image(tmp_path / "a.png", mode=mode)
    assert decode_rgb(tmp_path / "a.png").mode == "RGB"


def test_cmyk_jpeg_becomes_rgb(tmp_path):
    write_image(tmp_path / "a.JPEG", mode="CMYK")
    assert decode_rgb(tmp_path / "a.JPEG").mode == "RGB"


def test_sixteen_bit_grey_keeps_the_high_byte(tmp_path):
    values = np.array([[0, 255, 256, 32768, 65535]], dtype=np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    pixels = np.array(decode_rgb(tmp_path / "a.png"))
    assert pixels[0, :, 0].tolist() == pixels[0, :, 2].tolist() == [0, 0, 1, 128, 255]


def test_a_pickled_crop_shares_no_memory_with_this_process():
    """What a spawned worker gets: with shared memory, two processes would draw into one place."""
    crop = train_transform(**OPTIONS | {"color_jitter": 0}).crop
    ForkingPickler.dumps(crop)
    assert not crop._real.is_shared() and not crop._whole.is_shared()
