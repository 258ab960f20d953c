"""evaluate.py: the scores of training, from every format, by class, and for single files."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch.nn import functional as F

import assemble
import compose
import evaluate
import export
import models
import train
from image_reader import decode_rgb

ROOT = Path(train.__file__).parent


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


def run_alone(_, words):
    """The command line in a process whose group is its own to make."""
    dist.destroy_process_group()
    try:
        return evaluate.main(words)
    finally:
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)


def evaluated(ranks, *arguments, tmp_path):
    path = tmp_path / "scores.json"
    words = [*map(str, arguments), "--json", str(path)]

    assert ranks(1, run_alone, words) == [0]
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


def test_two_ranks_score_as_one(trained, tmp_path):
    folder, val, _ = trained
    words = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "evaluate.py"]
    done = subprocess.run(
        [sys.executable, *words, str(folder), "--per-class"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert f"{val['top1']:.2f} % of 7 validation images" in done.stdout
    assert "n00000002" in done.stdout, "a line for each class"


def test_image_files_get_the_models_probabilities(ranks, trained, image_folder, tmp_path):
    folder, _, config = trained
    path = min((image_folder / "val").rglob("*.JPEG"))
    names = tmp_path / "names.txt"
    names.write_text("ant\nbee\ncat\n")
    found = evaluated(ranks, folder, "--images", path, "--names", names, tmp_path=tmp_path)
    exported = tmp_path / "out.pt"
    export.main([str(folder), "--to", "torch", "--output", str(exported)])
    model = models.build_model(config, backend="torch", on_meta=False).eval()
    model.load_state_dict(torch.load(exported, weights_only=True)["model"])
    image_CHW = assemble.val_transform(config)(decode_rgb(path))
    share_Y = F.softmax(model(image_CHW[None])[0], dim=0).tolist()
    expected = sorted(zip(["ant", "bee", "cat"], share_Y, strict=True), key=lambda p: -p[1])
    assert [name for name, _ in found[str(path)]] == [name for name, _ in expected]
    values = [value for _, value in found[str(path)]]
    assert values == pytest.approx([value for _, value in expected], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere"], "nowhere: no such file or folder"),
        (["{run}", "--names", "x"], "--names x: has no effect without --images"),
        (
            ["{run}", "--images", "{run}/config.yaml"],
            r"--images .*config.yaml .*cannot",
        ),
        (["{run}", "model.vit.depth=3"], "Missing key"),
        (["{run}", "model.vit.dept=3"], "no such option"),
        (["{run}", "--config-name", "vit_base_patch16_224"], "has options of its own"),
    ],
)
def test_mistakes_are_one_line(ranks, trained, capfd, arguments, message):
    folder, _, _ = trained
    words = [argument.format(run=folder) for argument in arguments]

    assert ranks(1, run_alone, words) == [2]
    last = capfd.readouterr().err.strip().splitlines()[-1]
    assert last.startswith("error (rank 0)")
    assert re.search(message, last)
