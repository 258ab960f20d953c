"""Files of weights with 200 seeded faults each: a line that names the file, or weights, in no time.

Each fault is one of: some bits flipped, a piece cut out, a piece doubled, a piece of noise, an end
cut off.
"""

import json
import pickle
import random
import resource
import time
import warnings

import pytest
import torch
from safetensors.torch import save_file
from torch.distributed.checkpoint import state_dict_saver
from torch.distributed.checkpoint.filesystem import FileSystemWriter

from tests.support.models import model_of, rank_files
from weights.sources import Choice, read_source

MUTATIONS = 200


def damaged(content, rng):
    """Return `content` with one fault; the first and the last 2,000 bytes have half of them."""
    changed = bytearray(content)
    place = rng.randrange(len(changed))
    if rng.random() < 0.5:
        near = rng.randrange(min(2000, len(changed)))
        place = near if rng.random() < 0.5 else len(changed) - 1 - near
    length = rng.choice((1, 2, 4, 8, 64))
    match rng.randrange(5):
        case 0:
            for at in range(place, min(place + length, len(changed))):
                changed[at] ^= 1 << rng.randrange(8)
        case 1:
            del changed[place : place + length]
        case 2:
            changed[place:place] = changed[place : place + length]
        case 3:
            changed[place : place + length] = rng.randbytes(length)
        case 4:
            del changed[place:]
    return bytes(changed)


def weights():
    return model_of("model.vit.depth=1", recipe="vit_tiny_patch8_64")[0].state_dict()


def content():
    """The weights, and what stands beside them in a checkpoint of training."""
    options = {"model": {"vit": {}, "moe": {}}}
    return {"model": weights(), "config": json.dumps(options), "epoch": 3, "classes": ["a"] * 5}


def as_zip(folder, *, protocol):
    torch.save(content(), folder / "x.pth", pickle_protocol=protocol)
    return folder / "x.pth", folder / "x.pth"


def as_old(folder, *, protocol):
    torch.save(
        content(),
        folder / "x.pth",
        pickle_protocol=protocol,
        _use_new_zipfile_serialization=False,
    )
    return folder / "x.pth", folder / "x.pth"


def as_safetensors(folder, *, protocol):
    del protocol
    save_file(weights(), folder / "x.safetensors", {"config": content()["config"]})
    return folder / "x.safetensors", folder / "x.safetensors"


def as_index(folder, *, protocol):
    del protocol
    save_file(weights(), folder / "model-1.safetensors")
    names = dict.fromkeys(weights(), "model-1.safetensors")
    path = folder / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": names}))
    return folder, path


def as_dcp(folder, name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        writer = FileSystemWriter(folder, thread_count=1)
        state_dict_saver.save({"model": weights()}, storage_writer=writer, no_dist=True)
    return folder, folder / name


def as_metadata(folder, *, protocol):
    path, target = as_dcp(folder, ".metadata")
    target.write_bytes(pickle.dumps(pickle.loads(target.read_bytes()), protocol))
    return path, target


def as_dcp_data(folder, *, protocol):
    del protocol
    return as_dcp(folder, "__0_0.distcp")


def as_rank_files(folder, *, protocol):
    shards, _ = rank_files(model_of(), world=2)
    for rank, shard in enumerate(shards):
        torch.save({"model": shard}, folder / f"{rank}.pth", pickle_protocol=protocol)
    return folder, folder / "1.pth"


FORMATS = [
    (as_zip, 2),
    (as_zip, 3),
    (as_zip, 4),
    (as_old, 2),
    (as_old, 3),
    (as_old, 4),
    (as_safetensors, 0),
    (as_index, 0),
    (as_metadata, 2),
    (as_metadata, 4),
    (as_dcp_data, 0),
    (as_rank_files, 2),
]


@pytest.mark.parametrize(
    ("write", "protocol"), FORMATS, ids=lambda value: getattr(value, "__name__", value)
)
def test_a_damaged_file_is_weights_or_a_line_that_names_it(tmp_path, write, protocol):
    path, target = write(tmp_path, protocol=protocol)
    whole, rng = target.read_bytes(), random.Random(f"{write.__name__} {protocol}")
    before, num_refused, slowest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, 0, 0.0
    for _ in range(MUTATIONS):
        target.write_bytes(damaged(whole, rng))
        begun = time.monotonic()
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            try:
                read_source(path, Choice()).weights()
            except (ValueError, OSError) as error:
                num_refused += 1
                assert str(tmp_path) in str(error)
        slowest = max(slowest, time.monotonic() - begun)
    assert num_refused > MUTATIONS / 20
    assert slowest < 10
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) < 2**20  # KiB
