"""Bad images, hostile shards, lost workers: stopped before they matter, or skipped and counted."""

import errno
import io
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from imagenet_dataset import epoch_permutation
from images import feed, reading
from images import shards as tar_shards
from images.augment import Normaliser, drawing_from, train_transform, val_transform
from images.batches import NOT_COUNTED
from images.cache import index_images
from images.feed import Feed, Tolerance
from images.reading import (
    ImageReader,
    UnreadableError,
    describe,
    pick_decoder,
    read_header,
    rgb,
    rgb_of_box,
)
from parallel.seeds import stable_seed
from tests.support.datasets import bomb, jpeg, png, put, sixteen_bit
from tests.support.pictures import folder_dataset, train_batches, val_batches, write_image
from tests.support.processes import TIMEOUT_S
from training import loaders, prepare


@pytest.fixture
def root(tmp_path):
    return folder_dataset(tmp_path / "data")


ROOT = Path(__file__).parents[1]
ZERO, ONE = (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)
PLAIN = val_transform(
    img_size=(8, 8),
    crop_ratio=1.0,
    interpolation="bicubic",
    mean=ZERO,
    std=ONE,
    skip_normalise=True,
)


def broken_exif():
    body = b"Exif\0\0" + b"II*\0" + b"\xff" * 40
    segment = b"\xff\xe1" + (len(body) + 2).to_bytes(2, "big") + body
    return jpeg()[:2] + segment + jpeg()[2:]


def odd_bytes():
    """A JPEG with bytes between its segments, which strict decoders refuse."""
    raw = jpeg()
    place = raw.index(b"\xff\xdb")
    return raw[:place] + b"\0\0\0" + raw[place:]


UNUSABLE = {
    "empty": (b"", "empty"),
    "truncated": (jpeg(size=(64, 64))[:-900], "truncated"),
    "cut in the header": (jpeg()[:100], "truncated|is not a JPEG|damaged"),
    "html": (
        b"<!DOCTYPE html><html>404</html>",
        r"is not a JPEG or PNG or .*, begins with b'<!DOC",
    ),
    "gif": (b"GIF89a" + bytes(50), "is not a JPEG or PNG"),
    "no image data": (b"\xff\xd8\xff\xd9", "is not a JPEG|damaged"),
    "bomb": (bomb(9_500), "9500x9500 pixels, at most 64,000,000"),
    "larger bomb": (bomb(20_000), "20000x20000 pixels"),
    "png cut": (png(size=(64, 64))[:-3000], "truncated|damaged"),
    "png with a wrong checksum": (png()[:60] + b"\0\0\0\0" + png()[64:], "damaged"),
}
USABLE = {
    "cmyk": jpeg(mode="CMYK"),
    "grey": jpeg(mode="L"),
    "png": png(),
    "png with a palette": png(mode="P"),
    "16-bit": sixteen_bit(),
    "broken exif": broken_exif(),
    "1x1": jpeg(size=(1, 1)),
    "1x2000": jpeg(size=(1, 2000)),
    "progressive": jpeg(progressive=True),
    "odd bytes": odd_bytes(),
}


def nvimgcodec():
    """The decoder's name, where it is installed; imported by pytest it would not be set up."""
    if pick_decoder("auto")[0] == "pillow":
        pytest.skip("nvImageCodec is not installed")
    return "nvimgcodec"


@pytest.fixture(params=["pillow", "nvimgcodec"])
def decoder(request):
    return request.param if request.param == "pillow" else nvimgcodec()


@pytest.mark.parametrize("kind", UNUSABLE)
def test_what_is_no_image_is_refused_with_the_reason(decoder, kind):
    content, reason = UNUSABLE[kind]
    with pytest.raises(UnreadableError, match=reason):
        rgb(read_header(content, decoder=decoder))


@pytest.mark.parametrize("kind", USABLE)
def test_odd_images_are_read_alike_by_every_decoder(decoder, kind):
    source = read_header(USABLE[kind], decoder=decoder)
    pixels_HWC = rgb(source)
    assert pixels_HWC.shape == (source.height, source.width, 3)
    assert (pixels_HWC == rgb(read_header(USABLE[kind]))).all()


def test_sixteen_bits_keep_the_high_byte(decoder):
    assert (rgb(read_header(sixteen_bit(), decoder=decoder)) == 40_000 >> 8).all()


@pytest.mark.parametrize("kind", ["truncated", "png cut"])
def test_a_crop_of_a_damaged_image_is_refused_too(decoder, kind):
    source = read_header(UNUSABLE[kind][0], decoder=decoder)
    with pytest.raises(UnreadableError):
        rgb_of_box(source, (0, 0, 2, 2), at_least=(1, 1))


OPTIONS = [
    {},
    {"progressive": True},
    {"restart_marker_rows": 1},
    {"subsampling": 0},
    {"subsampling": 1},
    {"quality": 20},
]


@pytest.mark.parametrize("options", OPTIONS)
def test_a_crop_has_the_pixels_of_the_whole(decoder, options):
    rng = np.random.default_rng(0)
    for width, height in ((130, 97), (63, 64), (17, 200), (1, 1)):
        source = read_header(jpeg(size=(width, height), **options), decoder=decoder)
        whole = rgb(source)
        for _ in range(20):
            bottom, right = rng.integers(1, height + 1), rng.integers(1, width + 1)
            top, left = rng.integers(0, bottom), rng.integers(0, right)
            box = tuple(int(value) for value in (top, left, bottom - top, right - left))
            found = rgb_of_box(source, box, at_least=(1, 1))
            assert (found == whole[top:bottom, left:right]).all(), (width, height, box)


@pytest.mark.parametrize("options", OPTIONS)
def test_narrow_crops_have_the_pixels_of_the_whole(decoder, options):
    source = read_header(jpeg(size=(17, 40), **options), decoder=decoder)
    whole = rgb(source)
    for left in range(17):
        for width in range(1, 18 - left):
            found = rgb_of_box(source, (3, left, 20, width), at_least=(1, 1))
            assert (found == whole[3:23, left : left + width]).all(), (left, width)


def test_auto_takes_pillow_where_nvimgcodec_does_not_load(monkeypatch):
    def fail(_process):
        raise AttributeError("module has no attribute NVIMGCODEC_DEVICE_CPU_ONLY")

    monkeypatch.setattr(reading, "_nvimgcodec", fail)
    name, why = pick_decoder("auto")
    assert name == "pillow"
    assert "NVIMGCODEC_DEVICE_CPU_ONLY" in why
    with pytest.raises(ValueError, match=r"decoder=nvimgcodec: cannot be loaded: module has no"):
        pick_decoder("nvimgcodec")


def damaged(content, rng):
    """Bytes changed, overwritten or left out after the first hundred."""
    content = bytearray(content)
    place, count = int(rng.integers(100, len(content) - 2)), int(rng.integers(1, 200))
    kind = rng.integers(3)
    if kind == 0:
        content[place] ^= int(rng.integers(1, 256))
    elif kind == 1:
        noise = rng.integers(0, 256, count, dtype=np.uint8).tobytes()
        content[place : place + count] = noise[: len(content) - place]
    else:
        del content[place : place + count]
    return bytes(content)


def pixels_or_none(content, decoder, box=None):
    try:
        source = read_header(content, decoder=decoder)
        return rgb(source) if box is None else rgb_of_box(source, box, at_least=(1, 1))
    except UnreadableError:
        return None


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_rows": 1}])
def test_decoders_judge_damage_alike(options):
    nvimgcodec()
    rng, content, box = np.random.default_rng(0), jpeg(size=(130, 97), **options), (20, 30, 40, 50)
    refused = 0
    for _ in range(100):
        bad = damaged(content, rng)
        wanted, found = (pixels_or_none(bad, name) for name in ("pillow", "nvimgcodec"))
        assert (wanted is None) == (found is None)
        refused += wanted is None
        assert wanted is None or (found == wanted).all()
        cut = pixels_or_none(bad, "nvimgcodec", box)
        if wanted is not None and wanted.shape == (97, 130, 3) and not options.get("progressive"):
            assert (cut == wanted[20:60, 30:80]).all()
    assert 0 < refused < 100


ALONE = """
import os, sys
from images.reading import read_header, rgb
before = dict(os.environ)
print(rgb(read_header(open(sys.argv[1], "rb").read(), decoder="nvimgcodec")).shape)
assert dict(os.environ) == before
"""


@pytest.mark.parametrize("debug", ["", "files"])
def test_nvimgcodec_is_quiet_and_leaves_cuda_alone(tmp_path, debug):
    nvimgcodec()
    (tmp_path / "a.jpg").write_bytes(jpeg(size=(30, 20)))
    done = subprocess.run(
        [sys.executable, "-c", ALONE, tmp_path / "a.jpg"],
        cwd=ROOT,
        env=os.environ | {"LD_DEBUG": debug},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.endswith("(20, 30, 3)\n")
    if debug:  # what is loaded, or looked for: a forked worker must not touch CUDA
        assert "libjpeg_turbo_ext" in done.stderr
        assert "libcuda" not in done.stderr
        assert "libnvjpeg" not in done.stderr
    else:
        assert not done.stderr


def test_scaled_decoding_is_near_a_smaller_image(decoder):
    smooth = Image.fromarray(np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8))
    sink = io.BytesIO()
    smooth.resize((160, 120), Image.Resampling.BICUBIC).save(sink, "JPEG", quality=95)
    source = read_header(sink.getvalue(), decoder=decoder, is_scaled=True)
    found = rgb_of_box(source, (0, 0, 120, 160), at_least=(30, 40)).astype(int)
    assert found.shape == (30, 40, 3)
    wanted = np.asarray(
        Image.fromarray(rgb(source)).resize((40, 30), Image.Resampling.BOX), dtype=int
    )
    assert np.abs(found - wanted).mean() < 2
    assert rgb_of_box(source, (0, 0, 60, 80), at_least=(30, 41)).shape == (60, 80, 3)


@pytest.mark.parametrize("error", [ImportError("No module"), RuntimeError("no libjpeg")])
def test_a_decoder_that_does_not_load_is_an_error_or_not_picked(monkeypatch, error):
    def fail(_process):
        raise error

    monkeypatch.setattr("images.reading._nvimgcodec", fail)
    assert pick_decoder("auto") == ("pillow", f"auto: no nvimgcodec ({error})")
    assert pick_decoder("pillow") == ("pillow", "asked for")
    with pytest.raises(ValueError, match=rf"decoder=nvimgcodec: .* {error} \(pip install nvidia"):
        pick_decoder("nvimgcodec")


def test_a_decoder_that_is_not_installed_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    with pytest.raises(ImportError, match=r"nvidia.nvimgcodec is not installed"):
        reading.NvImageCodec()


MEASURE = """
import sys
from images.reading import UnreadableError, read_header, rgb
try:
    rgb(read_header(open(sys.argv[1], "rb").read()))
except UnreadableError as error:
    print(error)
print(open("/proc/self/status").read().partition("VmHWM:")[2].split()[0])
"""


@pytest.mark.parametrize("side", [9_000, 13_000])
def test_a_decompression_bomb_takes_less_than_200_mb(tmp_path, side):
    rows = zlib.compress(bytes((side + 7) // 8 + 1) * side, 9)
    header = side.to_bytes(4, "big") * 2 + b"\x01\0\0\0\0"

    def chunk(kind, data):
        crc = zlib.crc32(kind + data).to_bytes(4, "big")
        return len(data).to_bytes(4, "big") + kind + data + crc

    parts = [chunk(b"IHDR", header), chunk(b"IDAT", rows), chunk(b"IEND", b"")]
    (tmp_path / "bomb.png").write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(parts))
    assert (tmp_path / "bomb.png").stat().st_size < 500_000
    command = [sys.executable, "-c", MEASURE, str(tmp_path / "bomb.png")]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=env, check=True, capture_output=True, text=True)
    message, peak_kb = done.stdout.splitlines()
    assert f"{side}x{side} pixels" in message
    assert int(peak_kb) < 200_000


def feed_of(root, split, *, on_error="stop", max_bad=2, gather=None, **changes):
    index = index_images(root, split)
    if split == "train":
        values = {"transform": PLAIN, "batch_size": 4, "num_steps": 6}
        loader = train_batches(index, **values | changes)
    else:
        loader = val_batches(index, **{"transform": PLAIN, "batch_size": 2} | changes)
    return Feed(
        loader,
        split=split,
        device=torch.device("cpu"),
        normaliser=Normaliser(ZERO, ONE),
        tolerance=Tolerance(max_bad if on_error == "skip" else None, gather=gather),
    )


def drain(batches):
    """All batches; workers end here, since garbage collection waits for them for five seconds."""
    try:
        return list(batches)
    finally:
        batches.loader._iterator and batches.loader._iterator._shutdown_workers()


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize("kind", UNUSABLE)
def test_a_bad_image_stops_the_run_with_its_split_class_number_and_file(
    root, kind, split, num_workers
):
    content, reason = UNUSABLE[kind]
    index = put(root, split, 5, content)
    wnid, name = index.paths[5].split("/")
    says = rf"^data {split}/{wnid} index 5: {name} .*({reason}).* \({len(content):,} bytes\)$"
    with pytest.raises(ValueError, match=says) as caught:
        drain(feed_of(root, split, num_workers=num_workers))
    assert "\n" not in str(caught.value)


def test_a_file_that_changed_after_it_was_indexed_is_named_with_both_sizes(root):
    index = index_images(root, "val")
    path = index.root / index.paths[3]
    size = path.stat().st_size
    for content, what in ((path.read_bytes()[:-9], "truncated"), (bytes(size + 50), "has changed")):
        path.write_bytes(content)
        with pytest.raises(UnreadableError, match=rf"{what} \({min(len(content), size + 1)} of"):
            ImageReader(index)(3)


def test_a_missing_file_is_named(root):
    index = index_images(root, "val")
    (index.root / index.paths[3]).unlink()
    with pytest.raises(UnreadableError, match="cannot be read: No such file") as caught:
        ImageReader(index)(3)
    assert describe(index, 3, str(caught.value)).startswith("data val/n02 index 3: ")


def same(batches, others):
    fields = [(a.image_BCHW, a.label_B, a.position_B) for a in batches]
    other_fields = [(b.image_BCHW, b.label_B, b.position_B) for b in others]
    assert len(fields) == len(other_fields) > 0
    for one, other in zip(fields, other_fields, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one, other, strict=True))


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_a_skipped_image_is_replaced_alike_by_any_workers(root, num_workers, capfd):
    put(root, "train", 5, b"")
    first = list(feed_of(root, "train", on_error="skip"))
    capfd.readouterr()
    same(first, feed_of(root, "train", on_error="skip", num_workers=num_workers))
    assert capfd.readouterr().err == (
        "data train/n02 index 5: 3.JPEG empty (0 bytes); skipped 1 of at most 2\n"
    ), "named once, though met twice"


AUGMENTED = train_transform(
    img_size=(8, 8),
    scale=(0.2, 1.0),
    ratio=(0.75, 1.33),
    hflip=0.5,
    color_jitter=0.4,
    interpolation="bicubic",
    mean=ZERO,
)


def expected_at(index, position, *, bad, seed=5):
    """Pixels, label and replaced images at a position, by the rule: of nothing but the position."""
    epoch, place = divmod(position, len(index))
    image = int(epoch_permutation(len(index), seed=seed, epoch=epoch)[place])
    replaced = []
    while image in bad:
        attempt = len(replaced)
        replaced.append(image)
        image = stable_seed(seed, "replace", position, attempt) % len(index)
    with drawing_from(stable_seed(seed, "augment", epoch, image)):
        image_CHW = Normaliser(ZERO, ONE)(AUGMENTED(ImageReader(index)(image)))
    return image_CHW.numpy().tobytes(), index.labels[image], replaced


@pytest.mark.parametrize("num_workers", [0, 1, 2])
@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("start_step", [0, 1, 4])
def test_what_replaces_a_bad_image_follows_from_the_position_alone(
    root, num_workers, world, start_step
):
    bad = (1, 4, 5, 9)
    for image in bad:
        index = put(root, "train", image, b"")
    wanted = [expected_at(index, position, bad=bad) for position in range(24)]  # of 11 images
    assert max(len(replaced) for _, _, replaced in wanted) >= 2, "a replacement is bad, too"
    options = {"transform": AUGMENTED, "on_error": "skip", "max_bad": 4, "start_step": start_step}
    options |= {"num_workers": num_workers, "batch_size": 4 // world, "world": world}
    met = set()
    for rank in range(world):
        for batch in feed_of(root, "train", rank=rank, **options):
            positions = batch.position_B.tolist()
            found = zip(batch.image_BCHW, batch.label_B.tolist(), strict=True)
            rows = [(image_CHW.numpy().tobytes(), label) for image_CHW, label in found]
            assert rows == [wanted[position][:2] for position in positions]
            replaced = [image for position in positions for image in wanted[position][2]]
            assert [one.image for one in batch.bad] == replaced
            met |= {*positions}
    assert met == set(range(4 * start_step, 24))


def test_a_skipped_image_is_never_seen_and_the_others_are_as_without_it(root):
    whole = list(feed_of(root, "train"))
    index = put(root, "train", 5, b"")
    skipped = list(feed_of(root, "train", on_error="skip"))
    changed = sum(
        not torch.equal(a, b)
        for one, other in zip(whole, skipped, strict=True)
        for a, b in zip(one.image_BCHW, other.image_BCHW, strict=True)
    )
    met = sum(len(batch.bad) for batch in skipped)
    assert changed == met == 24 // len(index) + (1 if 24 % len(index) and met == 3 else 0)


def test_a_skipped_validation_image_is_not_counted(root, capfd):
    index = put(root, "val", 5, b"")
    batches = list(feed_of(root, "val", on_error="skip"))
    labels = torch.cat([batch.label_B for batch in batches])[:7].tolist()
    assert labels[5] == NOT_COUNTED
    assert [label for place, label in enumerate(labels) if place != 5] == [
        label for place, label in enumerate(index.labels) if place != 5
    ]
    assert "data val/n03 index 5: " in capfd.readouterr().err


def test_more_bad_images_than_allowed_stop_the_run(root):
    for image in (1, 4, 9):
        put(root, "train", image, b"")
    with pytest.raises(ValueError, match=r"config dataset\.max_bad=2: 3 images cannot be used"):
        list(feed_of(root, "train", on_error="skip", max_bad=2))
    list(feed_of(root, "train", on_error="skip", max_bad=3))


def test_a_dataset_of_bad_images_only_ends(root):
    for image in range(11):
        put(root, "train", image, b"")
    with pytest.raises(ValueError, match=r"data train/n0\d index \d+: .*empty"):
        list(feed_of(root, "train", on_error="skip", max_bad=100))


def count_bad(world, config):
    run, _ = prepare.prepare(config, world)
    try:
        for _ in loaders.train_batches(run, start_step=0):
            pass
    except ValueError as error:
        return str(error)
    return "finished"


@pytest.mark.parametrize(("max_bad", "says"), [(2, "max_bad=2: 3 images"), (3, "finished")])
def test_bad_images_of_all_ranks_are_counted_together(ranks, root, small_run, max_bad, says):
    for image in (1, 4, 9):
        put(root, "train", image, b"")
    config = small_run(
        f"dataset.train.root={root}",
        "dataset.on_error=skip",
        f"dataset.max_bad={max_bad}",
        "training.steps=9",  # over three epochs: each rank meets them all
        "dataset.train.batch_size=2",
    )
    found = ranks(2, count_bad, config)
    assert all(says in result for result in found)


def sleep_forever(_image):
    time.sleep(1000)


def kill_oneself(_image):
    os.kill(os.getpid(), signal.SIGKILL)


def raise_an_error(_image):
    raise MemoryError("no memory for an image")


def test_a_killed_worker_stops_the_run_and_is_named(root):
    started = time.monotonic()
    says = r"^data val: DataLoader worker \(pid(\(s\))? \d+.*\) (is killed|exited).* 0 to 1\)$"
    with pytest.raises(ChildProcessError, match=says):
        list(feed_of(root, "val", transform=kill_oneself, num_workers=2, timeout_s=TIMEOUT_S))
    assert time.monotonic() - started < TIMEOUT_S / 2


def test_a_stuck_worker_stops_the_run_within_the_timeout_and_is_named(root):
    started = time.monotonic()
    says = r"data val: no batch within dataset\.timeout_s=1 from worker 0 of 1, .* 0 to 1"
    with pytest.raises(TimeoutError, match=says):
        list(feed_of(root, "val", transform=sleep_forever, num_workers=1, timeout_s=1.0))
    assert time.monotonic() - started < TIMEOUT_S / 2


def test_a_worker_that_dies_while_no_batch_is_waited_for_is_one_line(root):
    batches = iter(feed_of(root, "val", num_workers=1, transform=sleep_forever).loader)
    with pytest.raises(ChildProcessError, match=r"^data: DataLoader worker \(pid \d+\) is killed"):
        with feed.worker_losses():
            os.kill(batches._workers[0].pid, signal.SIGKILL)
            time.sleep(20)
    with pytest.raises(RuntimeError, match="another"), feed.worker_losses():
        raise RuntimeError("another")


def test_an_error_in_a_worker_reaches_the_main_process(root):
    with pytest.raises(MemoryError, match="no memory for an image"):
        drain(feed_of(root, "val", transform=raise_an_error, num_workers=1))


def fail_reads(monkeypatch, number, times):
    """Let os.open fail `times` times with an error; return the list of waits."""
    waits, left, real = [], [times], os.open

    def faulty(path, *args):
        if str(path).endswith(".JPEG") and left[0]:
            left[0] -= 1
            raise OSError(number, os.strerror(number))
        return real(path, *args)

    monkeypatch.setattr(os, "open", faulty)
    monkeypatch.setattr(time, "sleep", waits.append)
    return waits


@pytest.mark.parametrize("number", [errno.ESTALE, errno.EIO])
def test_a_file_system_that_recovers_is_waited_for(root, monkeypatch, number):
    index = index_images(root, "val")
    waits = fail_reads(monkeypatch, number, times=2)
    assert ImageReader(index)(0).width == 8
    assert waits == list(reading.RETRY_AFTER_S)


@pytest.mark.parametrize(
    ("number", "retries", "says"),
    [(errno.ESTALE, 2, "Stale file handle"), (errno.EACCES, 0, "Permission denied")],
)
def test_a_file_system_that_does_not_is_an_error_after_few_retries(
    root, monkeypatch, number, retries, says
):
    index = index_images(root, "val")
    waits = fail_reads(monkeypatch, number, times=100)
    with pytest.raises(UnreadableError, match=f"cannot be read: {says}"):
        ImageReader(index)(0)
    assert len(waits) == retries


def shard_of(path, members):
    """Write (name, content, changes to the header) as a tar."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for name, data, changes in members:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            for field, value in changes.items():
                setattr(info, field, value)
            tar.addfile(info, io.BytesIO(data))
    return path


GOOD = ("n01/a.jpg", jpeg(), {})
HOSTILE = {
    "absolute": ("/n01/evil.jpg", b"x", {}),
    "parent": ("n01/../../evil.jpg", b"x", {}),
    "symlink": ("n01/evil.jpg", b"", {"type": tarfile.SYMTYPE, "linkname": "/etc/passwd"}),
    "hardlink": ("n01/evil.jpg", b"", {"type": tarfile.LNKTYPE, "linkname": "n01/a.jpg"}),
    "device": ("n01/evil.jpg", b"", {"type": tarfile.CHRTYPE}),
    "block device": ("n01/evil.jpg", b"", {"type": tarfile.BLKTYPE}),
    "pipe": ("n01/evil.jpg", b"", {"type": tarfile.FIFOTYPE}),
    "setuid": ("n01/evil.jpg", b"x", {"mode": 0o4755}),
    "newline": ("n01/evil\n.jpg", b"x", {}),
    "backslash": ("n01\\evil.jpg", b"x", {}),
    "long name": ("n01/" + "../" * 50 + "evil.jpg", b"x", {}),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_a_hostile_shard_is_refused_and_its_member_named(tmp_path, kind):
    shard_of(tmp_path / "data" / "train" / "0.tar", [GOOD, HOSTILE[kind], GOOD])
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(ValueError, match=r"shard .*0\.tar: member .*evil.*plain") as caught:
        index_images(tmp_path / "data", "train")
    assert repr(HOSTILE[kind][0]) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.rglob("*")) == before, "nothing is written"


def test_a_shard_of_too_many_members_is_refused(tmp_path, monkeypatch):
    assert tar_shards.MAX_MEMBERS < 10**6
    monkeypatch.setattr(tar_shards, "MAX_MEMBERS", 2)
    members = [(f"n01/{number}.jpg", jpeg(), {}) for number in range(3)]
    shard_of(tmp_path / "train" / "0.tar", members)
    with pytest.raises(ValueError, match=r"member 'n01/2\.jpg' exceeds 2 members"):
        index_images(tmp_path, "train")


def cut(raw):
    return raw[: raw.index(b"\xff\xd8") + 100]


def flip_header(raw):
    return bytes([raw[0] ^ 1]) + raw[1:]


@pytest.mark.parametrize("damage", [cut, flip_header, lambda _raw: b"", lambda _raw: b"hello"])
def test_a_damaged_shard_is_refused(tmp_path, damage):
    path = shard_of(tmp_path / "train" / "0.tar", [GOOD])
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"shard .*0\.tar"):
        index_images(tmp_path, "train")


WRONG_SHARDS = {
    "no images": ([("n01/a.txt", b"x", {})], "holds no images"),
    "no class": ([("a.jpg", jpeg(), {})], r"'a\.jpg': has no class"),
    "label out of range": (
        [("a.jpg", jpeg(), {}), ("a.cls", b"1000", {})],
        r"class 1000 must be one of the 2 lines",
    ),
    "label that is no text": ([("a.jpg", jpeg(), {}), ("a.cls", b"\xff", {})], "is not a label"),
    "label that is a list": ([("a.jpg", jpeg(), {}), ("a.json", b"[1]", {})], "must be a number"),
    "huge label": ([("a.jpg", jpeg(), {}), ("a.cls", bytes(1 << 17), {})], "exceeds 64 KiB"),
}


@pytest.mark.parametrize("kind", WRONG_SHARDS)
def test_a_shard_without_usable_labels_is_refused(tmp_path, kind):
    members, says = WRONG_SHARDS[kind]
    shard_of(tmp_path / "train" / "0.tar", members)
    (tmp_path / "classes.txt").write_text("n01\nn02\n")
    with pytest.raises(ValueError, match=says):
        index_images(tmp_path, "train")


def test_a_truncated_shard_is_noticed_while_it_is_read(tmp_path):
    path = shard_of(tmp_path / "train" / "0.tar", [GOOD])
    index = index_images(tmp_path, "train")
    path.write_bytes(path.read_bytes()[:700])
    with pytest.raises(UnreadableError, match=r"truncated \(188 of [\d,]+ bytes\)"):
        ImageReader(index)(0)


def prepared(world, config):
    started = time.monotonic()
    try:
        prepare.prepare(config, world)
    except ValueError as error:
        return str(error), time.monotonic() - started
    return "prepared", time.monotonic() - started


def miss_a_class(root):
    for path in (root / "val" / "n03").iterdir():
        path.unlink()
    (root / "val" / "n03").rmdir()


def rename_a_class(root):
    (root / "val" / "n03").rename(root / "val" / "n04")


def empty_a_class(root):
    for path in (root / "train" / "n03").iterdir():
        path.unlink()


def add_a_class(root):
    for split in ("train", "val"):
        write_image(root / split / "n09" / "x.JPEG")


WRONG_DATASETS = {
    miss_a_class: ([], r"val: lacks class n03; its classes must be those of \S+/train$"),
    rename_a_class: ([], "val: lacks class n03 and has class n04, which training lacks; its"),
    empty_a_class: ([], "class folder n03/ holds no images"),
    add_a_class: ([], "num_classes=3: must be 4, the classes in"),
    len: (["dataset.train.images=1281167"], r"train\.images=1281167: .* has 11 images in 3"),
    repr: (["dataset.val.images=50000"], r"val\.images=50000: .* has 7 images in 3 classes"),
}


@pytest.mark.parametrize("damage", WRONG_DATASETS)
def test_a_wrong_dataset_stops_every_rank_before_the_first_step(ranks, root, small_run, damage):
    options, says = WRONG_DATASETS[damage]
    damage(str(root) if damage is len else root)
    config = small_run(f"dataset.train.root={root}", *options)
    for message, seconds in ranks(2, prepared, config):
        assert re.search(says, message), message
        assert seconds < 20
