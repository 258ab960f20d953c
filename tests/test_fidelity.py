"""The plain timm loop follows our recipe, the benchmark can be continued, its result holds."""

import json
import math
import statistics
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from timm.models import VisionTransformer

from benchmarks import fidelity
from options import compose
from training import loaders, network, optim

CONFIG = "vit_tiny_patch8_64"
RESULTS = sorted(Path(fidelity.__file__).parent.glob("results/*-cpu-fidelity.json"))
SHRUNK = [
    "model.vit.embed_dim=24",
    "model.vit.depth=1",
    "dataset.num_workers=0",
    "optimizer.warmup_steps=1",
    "training.steps=2",
]


def composed(*overrides):
    return compose.compose(CONFIG, [*fidelity.OVERRIDES, *overrides])


def plain_optimizer(config):
    model = VisionTransformer(**fidelity.network_options(config))
    return model, fidelity.plain_optimizer(config, model)


def test_both_loops_have_one_learning_rate_at_every_step():
    config = composed("model.vit.depth=1")
    o, t = config.optimizer, config.training
    _, optimizer = plain_optimizer(config)
    schedule = fidelity.Schedule(config, optimizer)
    assert o.warmup_steps, "else the warm-up is not compared"
    for step in range(t.steps):
        schedule.set(step)
        expected = optim.lr_at(step, o, peak=o.lr, num_steps=t.steps)
        rates = [group["lr"] for group in optimizer.param_groups]
        assert rates == pytest.approx([expected] * len(rates), rel=1e-12), step


def test_both_loops_decay_the_same_parameters_and_step_alike():
    config = composed()
    o = config.optimizer
    model, optimizer = plain_optimizer(config)
    groups = optim.parameter_groups(model.named_parameters(), weight_decay=o.weight_decay)
    name_of = {id(parameter): name for name, parameter in model.named_parameters()}

    def decays(param_groups):
        return {name_of[id(p)]: g["weight_decay"] for g in param_groups for p in g["params"]}

    assert decays(optimizer.param_groups) == decays(groups)
    assert set(decays(groups).values()) == {0.0, o.weight_decay}
    ours = optim.build_optimizer(o, groups)
    for name in ("betas", "eps", "amsgrad", "maximize"):
        values = [group[name] for x in (ours, optimizer) for group in x.param_groups]
        assert all(value == values[0] for value in values), name


def test_the_plain_network_is_ours_in_every_name_and_shape():
    model, _ = plain_optimizer(composed())
    ours = network.build_model(composed(), backend="torch", on_meta=True)
    shapes = {name: value.shape for name, value in ours.state_dict().items()}
    assert {name: value.shape for name, value in model.state_dict().items()} == shapes


@pytest.fixture
def bundled(tmp_path):
    """A few images in the layout of the bundled data, of two sizes."""
    generator = torch.Generator().manual_seed(0)

    def save(path, size):
        pixels_HWC = torch.randint(0, 256, (*size, 3), generator=generator, dtype=torch.uint8)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(pixels_HWC.numpy()).save(path)

    for wnid in ("n1", "n2"):
        for number in range(3):
            save(tmp_path / f"train/{wnid}/images/{wnid}_{number}.JPEG", (64, 64))
    sizes, wnids = [(64, 64), (96, 80)], ["n2", "n1"]
    for number, size in enumerate(sizes):
        save(tmp_path / f"val/images/val_{number}.JPEG", size)
    lines = [f"val_{number}.JPEG\t{wnid}\t0\t0\t9\t9\n" for number, wnid in enumerate(wnids)]
    (tmp_path / "val/val_annotations.txt").write_text("".join(lines))
    return tmp_path


def test_both_loops_validate_on_the_same_pixels_and_labels(bundled):
    config = composed("dataset.num_workers=0")
    _, val_loader = fidelity.plain_loaders(config, bundled)
    ((image_BCHW, label_B),) = list(val_loader)
    assert label_B.tolist() == [1, 0]
    transform = loaders.val_transform(config)
    for number, image_CHW in enumerate(image_BCHW):
        expected_CHW = transform(Image.open(bundled / f"val/images/val_{number}.JPEG"))
        torch.testing.assert_close(image_CHW, expected_CHW, rtol=0, atol=1e-5)


def test_an_update_has_as_many_images_as_two_ranks_of_the_config():
    config = compose.compose(CONFIG, [])
    assert composed().dataset.train.batch_size == 2 * config.dataset.train.batch_size


@pytest.mark.parametrize(
    "override", ["dataset.train.mixup=0.8", "optimizer.layer_decay=0.7", "training.ema_decay=0.9"]
)
def test_an_option_that_the_plain_loop_does_not_know_is_an_error(override):
    name, _, value = override.partition("=")
    with pytest.raises(ValueError, match=f"config {name}={value}: .*must be"):
        fidelity.check(composed(override))


def call(monkeypatch, out, *words):
    monkeypatch.setattr(sys, "argv", ["fidelity", *words, "--out", str(out)])
    fidelity.main()


def fake_run(loop, seed, **_):
    return {"loop": loop, "seed": seed, "top1": 90.0 + seed, "minutes": 0.0}


@pytest.mark.slow
def test_it_trains_both_loops_and_writes_a_row_of_each(tmp_path, monkeypatch, capsys):
    out = tmp_path / "result.json"
    call(monkeypatch, out, *SHRUNK, "--seeds", "0")
    result = json.loads(out.read_text())
    assert [(row["loop"], row["seed"]) for row in result["rows"]] == [("ours", 0), ("timm", 0)]
    assert all(0 < row["top1"] < 100 for row in result["rows"])
    assert {"date", "commit", "device", "versions", "config", "overrides"} <= set(result)
    assert "loop=timm" in capsys.readouterr().out


def test_a_second_call_does_only_what_is_missing(tmp_path, monkeypatch):
    out, called = tmp_path / "result.json", []

    def run(loop, seed, **rest):
        called.append((loop, seed))
        return fake_run(loop, seed, **rest)

    monkeypatch.setattr(fidelity, "run", run)
    call(monkeypatch, out, "--loops", "timm", "--seeds", "1", "0")
    call(monkeypatch, out, "--seeds", "0", "1")
    assert called == [("timm", 1), ("timm", 0), ("ours", 0), ("ours", 1)]
    result = json.loads(out.read_text())
    assert [(row["loop"], row["seed"]) for row in result["rows"]] == [
        *(("ours", 0), ("ours", 1)),
        *(("timm", 0), ("timm", 1)),
    ]
    assert result["summary"]["ours"] == {"mean": 90.5, "standard_error": 0.5}
    assert result["summary"]["difference"] == {"mean": 0.0, "standard_error": 0.707}


def test_runs_under_other_conditions_are_not_mixed(tmp_path, monkeypatch):
    out = tmp_path / "result.json"
    monkeypatch.setattr(fidelity, "run", fake_run)
    call(monkeypatch, out, "--seeds", "0")
    with pytest.raises(ValueError, match=r"overrides=.*give another --out"):
        call(monkeypatch, out, "training.steps=7", "--seeds", "1")


def test_the_committed_result_is_no_worse_than_timm_less_a_standard_error():
    result = json.loads(RESULTS[-1].read_text())
    assert (result["config"], result["overrides"]) == (CONFIG, fidelity.OVERRIDES)
    top1 = {
        loop: [row["top1"] for row in result["rows"] if row["loop"] == loop]
        for loop in fidelity.LOOPS
    }
    seeds = [row["seed"] for row in result["rows"]]
    assert seeds == [*range(5), *range(5)]
    means = {loop: statistics.mean(values) for loop, values in top1.items()}
    error = math.sqrt(sum(statistics.variance(values) / 5 for values in top1.values()))
    assert means["ours"] >= means["timm"] - error
    assert result["summary"]["difference"]["standard_error"] == pytest.approx(error, abs=1e-3)
