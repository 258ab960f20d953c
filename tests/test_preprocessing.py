"""Mean, std, crop and resampling go with the weights: a change of them is never silent."""

import argparse
import io
import json
import re
import shlex
import tarfile
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_data_config
from timm.models import load_checkpoint, resolve_model_input_args
from timm.utils import ParseKwargs

import export
from options import compose
from tests.support.models import SMALL, model_of
from training import loaders, network, pretrained
from weights import files as weight_files
from weights.sources import Choice, read_source

ARCHIVE = Path(__file__).parents[1] / "data" / "tiny-imagenet-5.tar.gz"
MEAN, STD = [0.25, 0.5, 0.75], [0.5, 0.125, 0.0625]
RECIPE = "vit_tiny_patch8_64"
# No value is a default of ours or of timm's.
ODD = [
    f"dataset.mean={MEAN}",
    f"dataset.std={STD}",
    "dataset.interpolation=bilinear",
    "dataset.val.crop_ratio=0.8",
]
ABOUT = {
    "mean": MEAN,
    "std": STD,
    "interpolation": "bilinear",
    "crop_pct": 0.8,
    "input_size": [3, 32, 32],
    "num_classes": 5,
}


@pytest.fixture(scope="module")
def bundled():
    """(image, class number) of 100 training and 20 validation images of each bundled class."""
    found = {"train": [], "val": []}
    with tarfile.open(ARCHIVE) as archive:
        files = {m.name.partition("/")[2]: m for m in archive.getmembers() if m.isfile()}
        words = archive.extractfile(files["val/val_annotations.txt"]).read().decode().split()
        wnids = sorted(set(words) & {name.split("/")[1] for name in files if "/images/" in name})
        for name, wnid in zip(words[::6], words[1::6], strict=True):
            if int(re.search(r"\d+", name)[0]) % 5 == 0:
                found["val"].append((files[f"val/images/{name}"], wnids.index(wnid)))
        for label, wnid in enumerate(wnids):
            names = [f"train/{wnid}/images/{wnid}_{number}.JPEG" for number in range(100)]
            found["train"] += [(files[name], label) for name in names]
        return {
            split: [(Image.open(io.BytesIO(archive.extractfile(m).read())), y) for m, y in pairs]
            for split, pairs in found.items()
        }


def predictions(model, transform, pairs):
    image_BCHW = torch.stack([transform(image.convert("RGB")) for image, _ in pairs])
    with torch.no_grad():
        return model.eval()(image_BCHW).argmax(1)


@pytest.fixture(scope="module")
def fitted(bundled, tmp_path_factory):
    """A file of a network whose head is fitted to the bundled images, and its guesses of others."""
    overrides = [*ODD, "model.vit.num_classes=5"]
    model, options = model_of(*overrides, recipe=RECIPE)
    transform = loaders.val_transform(compose.compose(RECIPE, [*SMALL, *overrides]))
    image_BCHW = torch.stack([transform(image.convert("RGB")) for image, _ in bundled["train"]])
    label_B = torch.tensor([label for _, label in bundled["train"]])
    with torch.no_grad():
        features = []
        hook = model.head.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
        model(image_BCHW)
        hook.remove()
        (feature_BD,) = features
        feature_BD = torch.cat([feature_BD, torch.ones(len(label_B), 1)], 1)
        fit_DY = torch.linalg.lstsq(feature_BD, torch.eye(5)[label_B]).solution
        model.head.weight.copy_(fit_DY[:-1].T)
        model.head.bias.copy_(fit_DY[-1])
    path = tmp_path_factory.mktemp("fitted") / "ours.pt"
    torch.save({"model": model.state_dict(), "config": json.dumps(options)}, path)
    return path, predictions(model, transform, bundled["val"])


def exported(fitted, capsys, path, to="timm"):
    capsys.readouterr()
    arguments = [str(fitted), "--to", to, "--output", str(path), "--overwrite"]
    assert export.main(arguments) == 0
    return capsys.readouterr().out


def transform_of_timm(**about):
    return create_transform(**resolve_data_config(**about), is_training=False)


def test_top1_through_timms_own_transform_is_ours(fitted, bundled, tmp_path, capsys):
    source, ours_B = fitted
    label_B = torch.tensor([label for _, label in bundled["val"]])
    top1 = (ours_B == label_B).float().mean()
    assert top1 > 0.35, "a network that guesses shows nothing"
    shown = exported(source, capsys, tmp_path / "x.pth")
    (call,) = re.findall(r"timm\.create_model\(.*\)", shown)
    theirs = eval(call, {"timm": timm})  # noqa: S307
    theirs_B = predictions(theirs, transform_of_timm(model=theirs), bundled["val"])
    assert torch.equal(theirs_B, ours_B)
    bare = transform_of_timm(pretrained_cfg={"input_size": (3, 32, 32)})
    without_B = predictions(theirs, bare, bundled["val"])
    assert (without_B == label_B).float().mean() < top1 - 0.1, "else nothing was shown"


def flags_of_timm(command):
    """The flags of timm's validation script that are used here, by its own parser's rules."""
    parser = argparse.ArgumentParser()
    for flag, options in {
        "--data-dir": {},
        "--model": {},
        "--checkpoint": {},
        "--input-size": {"nargs": 3, "type": int},
        "--mean": {"nargs": "+", "type": float},
        "--std": {"nargs": "+", "type": float},
        "--crop-pct": {"type": float},
        "--interpolation": {},
        "--num-classes": {"type": int},
        "--gp": {},
        "--model-kwargs": {"nargs": "*", "action": ParseKwargs},
    }.items():
        parser.add_argument(flag, **options)
    return parser.parse_args(shlex.split(command))


def test_the_printed_flags_make_timms_script_score_as_we_do(fitted, bundled, tmp_path, capsys):
    source, ours_B = fitted
    shown = exported(source, capsys, tmp_path / "a b.pth")
    (command,) = re.findall(r"python <timm>/validate\.py (.*)", shown)
    flags = flags_of_timm(command.replace("<dataset>", "data"))
    # What the script does with its flags.
    named = {"num_classes": flags.num_classes, "global_pool": flags.gp}
    arguments = resolve_model_input_args(
        flags.model, vars(flags), pretrained=False, **named, **flags.model_kwargs
    )
    model = timm.create_model(**arguments)
    load_checkpoint(model, flags.checkpoint)
    transform = transform_of_timm(args=vars(flags), model=model)
    assert torch.equal(predictions(model, transform, bundled["val"]), ours_B)


@pytest.mark.parametrize("to", ["timm", "torch", "safetensors", "folder"])
def test_every_export_says_how_its_images_were_prepared(fitted, tmp_path, capsys, to):
    path = tmp_path / {"safetensors": "x.safetensors", "folder": "x"}.get(to, "x.pth")
    exported(fitted[0], capsys, path, to="safetensors" if to == "folder" else to)
    if path.suffix == ".pth":
        held = weight_files.read_pickle(path)["pretrained_cfg"]
    else:
        held = weight_files.read_safetensors(path)[1]["pretrained_cfg"]
    assert json.loads(held) == ABOUT
    assert read_source(path, Choice()).preprocessing == ABOUT


def test_classes_that_timm_orders_in_another_way_need_a_class_map(fitted, tmp_path, capsys):
    content = weight_files.read_pickle(fitted[0])
    for classes, is_said in ((["10", "2", "3", "4", "5"], True), (list("abcde"), False)):
        torch.save({**content, "classes": json.dumps(classes)}, tmp_path / "ours.pt")
        shown = exported(tmp_path / "ours.pt", capsys, tmp_path / "x.pth")
        assert ("--class-map" in shown) == is_said


def foreign(fitted, folder, about, kind):
    """The weights as a file without options of ours, which says `about` of its images."""
    folder.mkdir()
    weights = weight_files.read_pickle(fitted)["model"]
    if kind == "pickle":
        torch.save({"state_dict": weights, "pretrained_cfg": about}, folder / "x.pth")
        return folder / "x.pth"
    held = {"pretrained_cfg": json.dumps(about)} if kind == "metadata" else {}
    weight_files.write_safetensors(folder / "model", weights, metadata=held, max_bytes=10**9)
    if kind == "config.json":
        config = {"architecture": "vit_tiny_patch16_224", "pretrained_cfg": about}
        (folder / "model" / "config.json").write_text(json.dumps(config))
    return folder / "model"


@pytest.mark.parametrize("kind", ["pickle", "metadata", "config.json"])
def test_a_recipe_that_prepares_images_in_another_way_is_noted(fitted, tmp_path, capsys, kind):
    path = foreign(fitted[0], tmp_path / "theirs", {"mean": [0.5, 0.5, 0.5], "std": STD}, kind)
    source = read_source(path, Choice())
    like = [*SMALL, "model.vit.num_classes=5", f"dataset.std={STD}"]
    network.name_options(source, RECIPE, like).print_notes()
    assert capsys.readouterr().err == (
        f"note: {path}: its images were prepared with dataset.mean=[0.5,0.5,0.5], "
        "not [0.485,0.456,0.406]\n"
    )
    network.name_options(source, RECIPE, [*like, "dataset.mean=[0.5,0.5,0.5]"]).print_notes()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("about", [3, "{", {"mean": "x", "std": [1], "crop_pct": True}, [1], None])
def test_what_another_project_calls_pretrained_cfg_says_nothing(fitted, tmp_path, about):
    path = foreign(fitted[0], tmp_path / "theirs", about, "pickle")
    assert read_source(path, Choice()).preprocessing == {}


def test_training_from_other_images_is_noted(fitted, small_run, ranks, tmp_path, monkeypatch):
    import train

    config = small_run("training.steps=1", f"init.checkpoint={fitted[0]}", *SMALL[:4])
    ranks(1, lambda world: train.train(config, world))
    log = Path(config.training.checkpoint.path) / "log.jsonl"
    (note,) = [e for e in map(json.loads, log.open()) if e["event"] == "init_images"]
    assert note["note"].startswith(
        "its images were prepared with dataset.mean=[0.25,0.5,0.75], not [0.485,0.456,0.406]; "
        "dataset.std=[0.5,0.125,0.0625], not [0.229,0.224,0.225]; "
        "dataset.interpolation=bilinear, not bicubic; dataset.val.crop_ratio=0.8, not "
    )


def test_a_model_of_timm_brings_its_own_mean(monkeypatch):
    network_of_timm = timm.create_model("vit_tiny_patch16_224", pretrained=False)
    monkeypatch.setattr(timm, "create_model", lambda name, pretrained: network_of_timm)
    found = pretrained.read("vit_tiny_patch16_224")
    assert found.preprocessing["mean"] == [0.5, 0.5, 0.5]  # timm's augreg weights
