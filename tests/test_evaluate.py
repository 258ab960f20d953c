"""evaluate.py: the scores of training, from every format, by class, and for single files."""

import dataclasses
import json
import math
import os
import re
import shutil

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

import evaluate
import export
import train
from images.cache import index_images
from images.reading import decode_rgb
from options import compose
from options.schema import CheckpointOptions, MoEOptions
from tests.support.processes import meeting_place
from training import loaders, network


@pytest.fixture(scope="module")
def trained(ranks, tmp_path_factory, image_folder):
    """A run folder of a small ViT with experts and averaged weights, and its last figures."""
    folder = tmp_path_factory.mktemp("trained") / "run"
    config = compose.compose(
        "vit_tiny_patch8_64",
        [
            "model.vit.img_size=32",
            "model.vit.num_classes=3",
            "model.vit.embed_dim=36",
            "model.vit.depth=2",
            "model.moe.num_experts=4",
            "training.ema_decay=0.5",
            "training.steps=3",
            "training.tensorboard=false",
            "optimizer.warmup_steps=0",
            "dataset.train.batch_size=5",
            "dataset.num_workers=0",
            f"dataset.train.root={image_folder}",
            f"training.checkpoint.path={folder}",
        ],
    )
    ranks(2, lambda world: train.train(config, world))
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return folder, next(line for line in lines if line["event"] == "val"), config


def run_alone(ranks, num_ranks, words):
    """The exit codes of a command line in processes whose group is their own to make."""
    with meeting_place(num_ranks) as places:  # of their own: the group of before left its traces

        def program(world):
            dist.destroy_process_group()
            os.environ.update(places[world.rank])
            try:
                return evaluate.main(words)
            finally:
                dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)

        return ranks(num_ranks, program)


def evaluated(ranks, *arguments, tmp_path):
    path = tmp_path / "scores.json"
    words = [*map(str, arguments), "--json", str(path)]

    assert run_alone(ranks, 1, words) == [0]
    return json.loads(path.read_text())


@pytest.mark.parametrize("prefix", ["", "ema_"])
def test_a_run_folder_scores_as_its_last_validation(ranks, trained, tmp_path, prefix):
    folder, val, _ = trained
    weights = "ema" if prefix else "model"
    scores = evaluated(ranks, folder, "--weights", weights, tmp_path=tmp_path)
    assert scores["val_images"] == 7
    for name in ("val_loss", "top1", "top5"):
        assert scores[name] == pytest.approx(val[f"{prefix}{name}"], rel=1e-5)
    assert sum(one["images"] for one in scores["classes"].values()) == 7
    mean = sum(one["images"] * one["loss"] for one in scores["classes"].values()) / 7
    assert mean == pytest.approx(scores["val_loss"])


@pytest.mark.parametrize("to", ["torch", "safetensors", "dcp"])
def test_exported_weights_score_the_same(ranks, trained, tmp_path, to):
    folder, val, _ = trained
    path = tmp_path / {"torch": "out.pt", "safetensors": "out", "dcp": "out"}[to]
    assert export.main([str(folder), "--to", to, "--output", str(path)]) == 0
    scores = evaluated(ranks, path, tmp_path=tmp_path)
    assert scores["val_loss"] == pytest.approx(val["val_loss"], rel=1e-5)


def test_two_ranks_score_as_one(ranks, trained, capfd):
    folder, val, _ = trained
    assert run_alone(ranks, 2, [str(folder), "--per-class"]) == [0, 0]
    shown = capfd.readouterr().out
    assert f"{val['top1']:.2f} % of 7 validation images" in shown
    assert shown.count("n00000002") == 1, "a line for each class, by one rank"
    is_guessing = val["top1"] < 85  # of 7 images of 3 classes
    assert shown.count("no better than guessing (33.33 %)") == is_guessing, "by one rank"


def test_image_files_get_the_models_probabilities(ranks, trained, image_folder, tmp_path):
    folder, _, config = trained
    path = min((image_folder / "val").rglob("*.JPEG"))
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\n")
    found = evaluated(ranks, folder, "--images", path, "--names", names, tmp_path=tmp_path)
    exported = tmp_path / "out.pt"
    export.main([str(folder), "--to", "torch", "--output", str(exported)])
    model = network.build_model(config, backend="torch", on_meta=False).eval()
    model.load_state_dict(torch.load(exported, weights_only=True)["model"])
    image_CHW = loaders.val_transform(config)(decode_rgb(path))
    share_Y = F.softmax(model(image_CHW[None])[0], dim=0).tolist()
    expected = sorted(zip(["ant", "bee", "cat"], share_Y, strict=True), key=lambda p: -p[1])
    assert [name for name, _ in found[str(path)]] == [name for name, _ in expected]
    values = [value for _, value in found[str(path)]]
    assert values == pytest.approx([value for _, value in expected], rel=1e-5)


CLASSES = ["n00000000", "n00000001", "n00000002"]


@pytest.mark.parametrize("to", [None, "torch", "timm", "safetensors", "dcp"])
def test_class_ids_go_with_the_weights(ranks, trained, image_folder, tmp_path, to):
    source, _, config = trained
    if to == "timm":  # dense only
        options = dataclasses.replace(
            config.training, checkpoint=CheckpointOptions(f"{tmp_path}/d")
        )
        model = dataclasses.replace(config.model, moe=MoEOptions())
        config = dataclasses.replace(config, model=model, training=options)
        ranks(1, lambda world: train.train(config, world))
        source = tmp_path / "d"
    if to is not None:
        path = tmp_path / f"out{'.pt' if to in ('torch', 'timm') else ''}"
        assert export.main([str(source), "--to", to, "--output", str(path)]) == 0
        source = path
    image = min((image_folder / "val").rglob("*.JPEG"))
    found = evaluated(ranks, source, "--images", image, tmp_path=tmp_path)
    assert sorted(name for name, _ in found[str(image)]) == CLASSES


def test_a_list_of_another_length_or_with_copies_is_not_taken_for_class_ids(
    ranks, trained, image_folder, tmp_path
):
    path, image = tmp_path / "out.pt", min((image_folder / "val").rglob("*.JPEG"))
    assert export.main([str(trained[0]), "--to", "torch", "--output", str(path)]) == 0
    content = torch.load(path, weights_only=True)
    for ids in (["cat", "dog"], ["a", "b", "c", "d", "e"], ["a", "b", "b"]):
        torch.save({**content, "classes": ids}, path)
        found = evaluated(ranks, path, "--images", image, tmp_path=tmp_path)
        assert sorted(name for name, _ in found[str(image)]) == ["0", "1", "2"]


def test_classes_of_other_ids_are_said(ranks, trained, tmp_path, image_folder, capfd):
    other = tmp_path / "other"
    shutil.copytree(image_folder, other, ignore=shutil.ignore_patterns(".moevit-index*"))
    for split in ("train", "val"):
        (other / split / CLASSES[1]).rename(other / split / "n00000001x")
    evaluated(ranks, trained[0], f"dataset.val.root={other}", tmp_path=tmp_path)
    says = "1 of 3 classes were others in training: class 1 was n00000001, is n00000001x"
    assert capfd.readouterr().out.count(says) == 1
    evaluated(ranks, trained[0], tmp_path=tmp_path)
    assert "others in training" not in capfd.readouterr().out


@pytest.fixture(scope="module")
def part(image_folder, tmp_path_factory):
    """Sixteen images of the first and the last of the three classes."""
    folder = tmp_path_factory.mktemp("part")
    for name in (CLASSES[0], CLASSES[2]):
        shutil.copytree(image_folder / "train" / name, folder / "val" / name)
    return folder


def scores_by_hand(model, config, folder, among):
    """Top-1 in percent and mean cross-entropy where the choice is among some class numbers."""
    hits, losses = [], []
    for path in sorted((folder / "val").rglob("*.JPEG")):
        label = among.index(CLASSES.index(path.parent.name))
        with torch.no_grad():
            logits_Y = model(loaders.val_transform(config)(decode_rgb(path))[None])[0]
        chosen = [math.exp(logits_Y[number]) for number in among]
        hits.append(chosen[label] == max(chosen))
        losses.append(-math.log(chosen[label] / sum(chosen)))
    return 100 * sum(hits) / len(hits), sum(losses) / len(losses)


def test_a_part_of_the_classes_is_scored_by_their_ids(ranks, trained, part, tmp_path, capfd):
    folder, _, config = trained
    exported = tmp_path / "out.pt"
    export.main([str(folder), "--to", "torch", "--output", str(exported)])
    model = network.build_model(config, backend="torch", on_meta=False).eval()
    model.load_state_dict(torch.load(exported, weights_only=True)["model"])
    found = {}
    for flags, among in (([], [0, 2]), (["--among", "all"], [0, 1, 2])):
        words = [folder, f"dataset.val.root={part}", *flags]
        found[len(among)] = scores = evaluated(ranks, *words, tmp_path=tmp_path)
        top1, loss = scores_by_hand(model, config, part, among)
        assert (scores["top1"], scores["val_loss"]) == pytest.approx((top1, loss), rel=1e-5)
        assert scores["among"] == len(among)
        images = {name: one["images"] for name, one in scores["classes"].items()}
        assert images == {CLASSES[0]: 8, CLASSES[2]: 8}
        note = f"has 2 of the 3 classes in training; the network chooses among {len(among)} "
        shown = capfd.readouterr().out
        assert shown.count(note) == 1
        assert "others in training" not in shown
    assert found[2]["val_loss"] < found[3]["val_loss"]
    filtered = f"dataset.class_filter=[{CLASSES[0]},{CLASSES[2]}]"
    whole = evaluated(ranks, folder, filtered, tmp_path=tmp_path)
    assert (whole["among"], whole["val_images"]) == (2, 5)


def test_labels_are_those_of_training_whatever_their_order(part, small_run):
    index, ids = index_images(part, "val"), tuple(CLASSES)
    relabelled = evaluate.as_trained(index, small_run(), ids)
    assert (relabelled.labels, relabelled.classes) == ((0,) * 8 + (2,) * 8, ids)
    backwards = evaluate.as_trained(index, small_run(), ids[::-1])
    assert backwards.labels == (2,) * 8 + (0,) * 8


def limited(world, part):
    overrides = [f"dataset.val.root={part}", f"dataset.class_filter=[{','.join(CLASSES)}]"]
    config = compose.compose("vit_tiny_patch8_64", overrides)
    return loaders.find_val_images(config, world, trained=CLASSES).classes


def test_a_run_that_was_limited_to_some_classes_is_scored_on_a_part_of_these(ranks, part):
    assert ranks(1, limited, part) == [(CLASSES[0], CLASSES[2])]


@pytest.mark.parametrize(
    ("names", "ids", "says"),
    [
        ([0, 3], CLASSES, "1 of 2 classes were not in training, the first n00000003; name the"),
        ([1, 2, 3], CLASSES, "1 of 3 classes were not in training, the first n00000003"),
        ([0, 1, 2, 3], CLASSES, "1 of 4 classes were not in training, the first n00000003"),
        ([0, 2], [], "has 2 classes and the weights 3, without the ids that tell which"),
    ],
    ids=["a part, but one", "as many, but shifted", "more", "no ids"],
)
def test_classes_that_weights_do_not_know_are_refused(part, small_run, names, ids, says):
    classes = tuple(f"n{number:08d}" for number in names)
    index = dataclasses.replace(index_images(part, "val"), classes=classes)
    with pytest.raises(ValueError, match=rf"^config dataset\.val\.root={part}/val: {says}"):
        evaluate.as_trained(index, small_run(), ids)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such file or folder"),
        (["{run}", "--images", "x", "--among", "all"], "--among all: has no effect with --images"),
        (["{run}", "--names", "x"], "--names x: has no effect without --images"),
        (
            ["{run}", "--images", "{run}/config.yaml"],
            r"--images .*config.yaml .*cannot",
        ),
        (["{run}", "model.vit.depth=3"], "model.vit.depth=3: must be 2, as in .*step_3"),
        (["{run}", "model.vit.num_heads=2"], "model.vit.num_heads=2: must be 3"),
        (["{run}", "model.moe.top_k=1"], "model.moe.top_k=1: must be 2"),
        (["{run}", "model.moe={{router: sigmoid}}"], "model.moe.router=sigmoid: must be softmax"),
        (["{run}", "training.steps=3"], "training.steps=3: has no effect here"),
        (["{run}", "optimizer={{lr: 1}}"], "optimizer.lr=1: has no effect here"),
        (["{run}", "dataset={{train: {{mixup: 1}}}}"], "dataset.train.mixup=1: has no effect"),
        (["{run}", "dataset.duplicates=stop"], "dataset.duplicates=stop: has no effect here"),
        (["{run}", "distributed.ep=2"], "distributed.ep=2: has no effect here"),
        (["{run}", "dataset.val.root=x", "--images", "x"], "val.root=x: has no effect with"),
        (["{run}", "fsdp.zero_dp_strategy=0"], "fsdp.* has no effect here"),
        (["{run}", "distillation.tau=2"], "distillation.* has no effect here"),
        (["{run}", "init.mode=scratch"], "init.* has no effect here"),
        (["{run}", "dataset.val.root"], "dataset.val.root: must be name=value"),
        (["{run}", "dataset.mean=[0.5"], r"dataset.mean=\[0.5: must be a list of numbers"),
        (["{run}", "dataset=3"], "dataset=3: is a section; set one of its options, as dataset."),
        (["{run}", "--per-class", "--images", "x"], "--per-class: has no effect with --images"),
        (["{run}", "--metric", "+top1"], r"--metric \+top1: has no effect without --pick best"),
        (["{run}/step_3_loss_{loss}", "--pick", "best"], "--pick best: has no effect on"),
        (
            ["{run}", "--pick", "best", "--metric", "+a"],
            r"has this figure \(there are: .*top1.*val_loss",
        ),
        (["nowhere", "--json", "{run}/none/x.json"], "--json .*: there is no folder .*none"),
        (["nowhere", "--json", "{run}"], "--json .*: exists and is no file"),
        (["{run}", "model.vit.dept=3"], "no such option"),
        (["{run}", "--config-name", "vit_base_patch16_224"], "has options of its own"),
    ],
)
def test_mistakes_are_one_line(ranks, trained, capfd, arguments, message):
    folder, _, _ = trained
    (newest,) = folder.glob("step_3_loss_*")
    loss = newest.name.rpartition("_")[2]
    words = [argument.format(run=folder, loss=loss) for argument in arguments]

    assert run_alone(ranks, 1, words) == [2]
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error (rank 0)")
    assert re.search(message, last)


def test_options_that_leave_the_network_as_it_is_are_taken(ranks, trained, tmp_path):
    folder, val, _ = trained
    overrides = ["model.backend=torch", "model.dtype=fp32", "model.moe.kernels=torch"]
    resized = ["model.vit.dynamic_img_size=true", "dataset.val.img_size=32"]
    same = ["model.vit.num_heads=3"]
    scores = evaluated(ranks, folder, *overrides, *resized, *same, tmp_path=tmp_path)
    assert scores["val_loss"] == pytest.approx(val["val_loss"], rel=1e-5)


def test_a_damaged_checkpoint_that_is_passed_over_is_named(ranks, trained, tmp_path, capfd):
    folder, val, _ = trained
    run = tmp_path / "run"
    shutil.copytree(folder, run)
    (newest,) = run.glob("step_3_loss_*")
    damaged = run / "step_6_loss_0.100"
    shutil.copytree(newest, damaged)
    os.truncate(damaged / "__0_0.distcp", 10)
    scores = evaluated(ranks, run, tmp_path=tmp_path)
    assert scores["val_loss"] == pytest.approx(val["val_loss"], rel=1e-5)
    note = "note: passed over step_6_loss_0.100: __0_0.distcp has 10 bytes"
    assert note in capfd.readouterr().err


def test_scores_replace_a_file_whole_or_leave_it(ranks, trained, image_folder, tmp_path):
    folder, _, _ = trained
    path = tmp_path / "scores.json"
    path.write_text("before")
    image = min((image_folder / "val").rglob("*.JPEG"))
    other = tmp_path / "link"
    os.link(path, other)
    assert "val_loss" not in evaluated(ranks, folder, "--images", image, tmp_path=tmp_path)
    assert other.read_text() == "before", "a new file took the name"
    assert {entry.name for entry in tmp_path.iterdir()} == {"scores.json", "link"}


def test_ctrl_c_is_one_line(monkeypatch, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(evaluate, "read_source", interrupt)
    assert evaluate.main(["x"]) == 130
    assert capsys.readouterr().err == "stopped\n"


def found_classes(world, config, trained):
    return loaders.find_val_images(config, world, trained=trained).classes


def test_a_filter_that_names_an_absent_class_is_not_dropped(ranks, small_run):
    trained = ["n00000000", "n00000001", "n00000002", "n00000009"]
    every = small_run(f"dataset.class_filter=[{','.join(trained)}]")
    assert ranks(1, found_classes, every, trained) == [tuple(trained[:3])]
    for wanted in ("n00000009", "n00000000,n00000009"):
        config = small_run(f"dataset.class_filter=[{wanted}]")
        with pytest.raises(pytest.fail.Exception, match=r"n00000009.*not among the 3"):
            ranks(1, found_classes, config, trained)
