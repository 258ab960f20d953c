"""What a run may be resumed with: the same images in every update, and what was counted before."""

import dataclasses
import functools
import itertools
import json
import re
import types
from pathlib import Path

import pytest
import torch

import train
from imagenet_dataset import epoch_permutation, step_positions
from images.cache import index_images
from images.index import digest, select
from options import compose, schema
from parallel.distributed import World
from tests.support.datasets import put
from tests.support.pictures import folder_dataset
from training import resume
from training.run import Run
from weights import verify

BASE = ["dataset.train.batch_size=4", "training.grad_accum_steps=2"]


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return index_images(folder_dataset(tmp_path_factory.mktemp("data"), train=300), "train")


def run_of(config, index, *, world=1):
    """A run as far as its data go."""
    data = config.dataset
    index = select(index, class_filter=data.class_filter, share=data.subset)
    nothing = dict.fromkeys(field.name for field in dataclasses.fields(Run))
    world = World(rank=0, size=world, local_rank=0, device=torch.device("cpu"))
    values = {"config": config, "world": world, "train_index": index, "bad_images": set()}
    return Run(**nothing | values)


@functools.cache
def permutation(count, seed, epoch):
    return epoch_permutation(count, seed=seed, epoch=epoch).tolist()


def updates(run):
    """The images of each update, with their epochs and repeats, in no order."""
    order, t, count = run.order, run.config.training, len(run.train_index)
    found = []
    for step in range(45):  # over an epoch's end
        positions = itertools.chain.from_iterable(
            step_positions(
                step,
                microbatch=microbatch,
                rank=rank,
                world=run.world.size,
                batch=run.config.dataset.train.batch_size,
                accum=t.grad_accum_steps,
            )
            for microbatch in range(t.grad_accum_steps)
            for rank in range(run.world.size)
        )
        places = [order.place(position) for position in positions]
        found.append(sorted((p[0], permutation(count, t.seed, p[0])[p[1]], p[2]) for p in places))
    return found


def saved_by(run):
    state = json.loads(json.dumps(resume.facts(run, step=3, figures={})))
    return verify.Checkpoint(Path("step_3"), state)


# The state of a checkpoint of commit b4c7a8c: vit_moe_tiny_patch8_64 after 20 updates on two ranks.
OLD = json.loads((Path(__file__).parent / "support/state_b4c7a8c.json").read_text())


def flat(options):
    return dict(resume._flatten(json.loads(json.dumps(options))))


def test_an_older_checkpoints_options_are_restored_as_they_were():
    """Whatever moves in the code, names, places and values of options are those on disk."""
    restored = flat(dataclasses.asdict(compose.restore(OLD["config"], [])))
    assert flat(OLD["config"]).items() <= restored.items()


def test_an_older_checkpoint_can_be_gone_on_from(images):
    now = run_of(compose.restore(OLD["config"], []), images, world=OLD["world_size"])
    data = {"train_images": len(images), "dataset_sha256": digest(images)}
    found = verify.Checkpoint(Path("step_20"), OLD | data)
    assert resume.check_resumable(now, found) == []


# options -> what the refusal names
REFUSED = {
    "training.seed=1": "seed=1, the checkpoint has 0",
    "training.grad_accum_steps=4": "global_batch=16, the checkpoint has 8 .batch_size 4 x",
    "dataset.train.batch_size=2": "global_batch=4",
    "dataset.train.repeats=3": r"dataset\.train\.repeats=3, the checkpoint has 1; use the same",
    "dataset.subset=0.5": "train_images=150",
    "dataset.class_filter=[n01,n02] model.vit.num_classes=2": "train_images=200",
}
# All that may change together, then what excludes some of it.
ALLOWED = [
    "dataset.train.batch_size=8 training.grad_accum_steps=1 dataset.class_filter=[n02,n03,n01] "
    "dataset.decoder=pillow dataset.duplicates=ignore dataset.num_workers=2 dataset.timeout_s=9 "
    "dataset.on_error=skip dataset.max_bad=3 dataset.index_folder=x dataset.interpolation=bilinear "
    "dataset.mean=[0,0,0] dataset.std=[1,1,1] dataset.train.root=elsewhere "
    "dataset.val.root=elsewhere dataset.train.images=300 dataset.val.images=7 "
    "dataset.val.batch_size=3 dataset.val.crop_ratio=1 dataset.val.img_size=48 "
    "model.vit.dynamic_img_size=true dataset.train.crop_scale=[0.5,1] "
    "dataset.train.crop_ratio=[1,1] dataset.train.hflip=0 dataset.train.auto_augment=3aug "
    "dataset.train.color_jitter=0.2 dataset.train.reprob=0.1 dataset.train.remode=const "
    "dataset.train.recount=2 dataset.train.mixup=0.1 dataset.train.cutmix=1 "
    "dataset.train.mixup_prob=0.5 dataset.train.mixup_switch_prob=0.4 "
    "dataset.train.mixup_mode=elem dataset.train.interpolation=lanczos "
    "dataset.train.scaled_decode=true",
    "dataset.train.batch_size=2 training.grad_accum_steps=4 dataset.train.crop=src "
    "dataset.train.crop_scale=[0.08,1] dataset.path_env=x dataset.name=y",
]


def test_every_option_of_the_data_is_judged():
    judged = {word.partition("=")[0] for line in [*REFUSED, *ALLOWED] for word in line.split()}
    names = {name for name, _, _ in schema.walk(schema.Config()) if name.startswith("dataset.")}
    assert names - judged == set()


@pytest.mark.parametrize("change", REFUSED)
def test_what_changes_the_images_of_an_update_is_refused(small_run, images, change):
    before = run_of(small_run(*BASE), images)
    after = run_of(small_run(*BASE, *change.split()), images)
    assert updates(after) != updates(before), "it is for a reason"
    with pytest.raises(ValueError, match=f"^resume step_3: {REFUSED[change]}"):
        resume.check_resumable(after, saved_by(before))
    with pytest.raises(ValueError, match=r"^resume step_3: "):
        resume.check_resumable(before, saved_by(after))


@pytest.mark.parametrize("repeats", [1, 3])
@pytest.mark.parametrize("change", ALLOWED)
def test_what_is_allowed_changes_the_images_of_no_update(small_run, images, change, repeats):
    base = [*BASE, f"dataset.train.repeats={repeats}"]
    before = run_of(small_run(*base), images)
    options = dataclasses.asdict(small_run(*base))
    after = run_of(compose.restore(options, change.split()), images)
    changed = resume.check_resumable(after, saved_by(before))
    assert {line.partition(":")[0] for line in changed} <= {
        word.partition("=")[0] for word in change.split()
    }
    assert updates(after) == updates(before)


@pytest.mark.parametrize("world", [2, 4])
def test_another_number_of_ranks_needs_the_same_images_per_update(small_run, images, world):
    before = run_of(small_run(*BASE, "dataset.train.repeats=3"), images)
    same = ["dataset.train.repeats=3", f"dataset.train.batch_size={4 // world}"]
    after = run_of(small_run(*BASE, *same), images, world=world)
    assert resume.check_resumable(after, saved_by(before))
    assert updates(after) == updates(before)
    more = run_of(small_run(*BASE, "dataset.train.repeats=3"), images, world=world)
    with pytest.raises(ValueError, match=f"global_batch={8 * world}"):
        resume.check_resumable(more, saved_by(before))


def test_other_labels_and_names_of_as_many_images_are_refused(small_run, images):
    before = run_of(small_run(*BASE), images)
    labels = (*images.labels[1:], images.labels[0])
    for other in (
        dataclasses.replace(images, labels=labels),
        dataclasses.replace(images, paths=images.paths[1:] + images.paths[:1]),
    ):
        with pytest.raises(
            ValueError, match=r"dataset_sha256.*names or labels of images are other"
        ):
            resume.check_resumable(run_of(small_run(*BASE), other), saved_by(before))
    paths = [path.replace("n02", "n2x") for path in images.paths]
    renamed = dataclasses.replace(images, classes=("n01", "n2x", "n03"), paths=paths)
    says = "1 of 3 classes were others in training: class 1 was n02, is n2x"
    with pytest.raises(ValueError, match=says):
        resume.check_resumable(run_of(small_run(*BASE), renamed), saved_by(before))


def test_a_checkpoint_of_before_an_option_had_its_default(small_run, images):
    run = run_of(small_run(*BASE), images)
    found = saved_by(run)
    del found.state["config"]["dataset"]["train"]["repeats"]
    resume.check_resumable(run, found)
    with pytest.raises(ValueError, match=r"repeats=3, the checkpoint has 1"):
        resume.check_resumable(run_of(small_run(*BASE, "dataset.train.repeats=3"), images), found)


@pytest.mark.parametrize("change", ["num_heads=6", "global_pool=token"])
def test_another_network_of_the_same_shapes_is_refused(small_run, images, change):
    found = saved_by(run_of(small_run(*BASE), images))
    assert found.state["config"]["model"]["vit"][change.partition("=")[0]] in (3, "avg")
    token = ["model.vit.fc_norm=false", "model.vit.class_token=true"]
    run = run_of(small_run(*BASE, *token, f"model.vit.{change}"), images)
    with pytest.raises(ValueError, match=f"^resume step_3: model.vit.{change}, the checkpoint has"):
        resume.check_resumable(run, found)


def states(folder):
    """The step and the bad images of every checkpoint."""
    found = [json.loads(path.read_text()) for path in folder.glob("step_*/state.json")]
    return {state["step"]: state["bad_images"] for state in found}


def outcome(world, config):
    try:
        train.train(config, world)
    except ValueError as error:
        return str(error)
    return "finished"


def test_bad_images_of_before_count_after_a_resume(ranks, small_run, tmp_path, capfd):
    """Two ranks meet one each in update 1, and a third in update 3."""
    root = folder_dataset(tmp_path / "data")
    order = epoch_permutation(11, seed=0, epoch=0).tolist()
    for image in (order[0], order[2], order[8]):
        put(root, "train", image, b"")
    options = [
        f"dataset.train.root={root}",
        "dataset.train.batch_size=2",
        "dataset.on_error=skip",
        "dataset.max_bad=2",
        "dataset.duplicates=ignore",
        "training.checkpoint.interval=1",
        "training.checkpoint.keep_last=9",
    ]
    assert ranks(2, outcome, small_run(*options, "training.steps=2")) == ["finished"] * 2
    first = sorted([order[0], order[2]])
    assert states(tmp_path / "run") == {1: first, 2: first}, "those of both ranks, at each save"
    fewer = small_run(*options, "training.steps=3", "dataset.max_bad=1")
    says = r"config dataset.max_bad=1: the run has met 2 images that cannot be used by .*step_2"
    assert all(re.match(says, line) for line in ranks(2, outcome, fewer))
    capfd.readouterr()
    alone = small_run(*options, "training.steps=3", "training.grad_accum_steps=2")
    says = "config dataset.max_bad=2: 3 images cannot be used, the last are named above"
    assert ranks(1, outcome, alone) == [says]
    named = [line for line in capfd.readouterr().err.splitlines() if "empty" in line]
    assert [line.partition("; ")[2] for line in named] == ["skipped 3 of at most 2"]


@pytest.mark.parametrize("value", ["7", [1, "2"], {"a": 1}])
def test_a_count_that_is_none_is_refused(value):
    found = verify.Checkpoint(Path("step_3"), {"bad_images": value})
    with pytest.raises(ValueError, match=r"resume step_3: bad_images=.* must be a list of numbers"):
        resume._bad_images(found)
    assert resume._bad_images(verify.Checkpoint(Path("step_3"), {})) == []


def test_a_shorter_warm_up_comes_with_fewer_steps():
    found = types.SimpleNamespace(step=30, folder=Path("run/step_30"))
    changes = {"training.steps": (380, 30), "optimizer.warmup_steps": (38, 3)}
    resume._check_complete(found, changes)
    with pytest.raises(ValueError, match=r"optimizer.warmup_steps=3: the run in run is complete"):
        resume._check_complete(found, {"optimizer.warmup_steps": (38, 3)})
