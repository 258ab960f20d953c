"""The loop: exact resume, honest validation, refusals before the first step."""

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from torch.distributed.checkpoint.format_utils import dcp_to_torch_save
from torch.nn import functional as F

import checkpoint
import train
from images.batches import NOT_COUNTED
from options.schema import Config, walk
from parallel import distributed, sharding
from tests.support.options import small_options
from tests.support.runs import train_and_watch
from tests.support.sharded import parts, worst_error
from training import loaders, losses, network, optim, prepare, resume

# Dropout of every kind, a decaying learning rate, and steps that cross the edges of epochs:
# 12 steps of 2 ranks x 2 microbatches x 4 images are 8 epochs of 24.
RESUME = [
    "training.steps=12",
    "training.val_interval=7",
    "training.grad_accum_steps=2",
    "training.label_smoothing=0.1",
    "model.vit.drop_rate=0.1",
    "model.vit.proj_drop_rate=0.1",
    "model.vit.attn_drop_rate=0.1",
    "model.vit.pos_drop_rate=0.1",
    "model.vit.drop_path_rate=0.2",
    "optimizer.warmup_steps=3",
    "dataset.train.color_jitter=0.3",
    "dataset.train.batch_size=4",
    "dataset.train.mixup=0.8",
    "dataset.train.cutmix=1.0",
    "training.ema_decay=0.9",
    "model.moe.num_experts=4",
    "model.moe.mlp_ratio=1",
    "model.moe.router=noisy_topk",
    "model.moe.load_coef=0.01",
    "distributed.ep=2",
]


# With loader processes from two of the points: in the middle of an epoch, and at the edge of one.
@pytest.mark.slow
@pytest.mark.parametrize(("workers", "points"), [(0, range(1, 13)), (2, (5, 9))], ids=["0", "2"])
def test_a_killed_run_resumes_bit_for_bit_from_each_save_point(
    ranks, small_run, tmp_path, workers, points
):
    options = [*RESUME, f"dataset.num_workers={workers}", "training.checkpoint.interval=1"]
    options.append("training.checkpoint.keep_last=12")
    whole = small_run(*options, f"training.checkpoint.path={tmp_path / 'whole'}")
    uninterrupted = ranks(2, train_and_watch, whole, None)
    for saved in points:
        path = tmp_path / f"from_{saved}"
        path.mkdir()
        (folder,) = (tmp_path / "whole").glob(f"step_{saved}_*")
        folder.rename(path / folder.name)
        parted = small_run(*options, f"training.checkpoint.path={path}")
        resumed = ranks(2, train_and_watch, parted, None)
        for (seen, final), (seen_after, final_after) in zip(uninterrupted, resumed, strict=True):
            assert seen_after == seen[saved:], "same images, same pixels, same learning rates"
            if saved < 12:
                assert final_after == final, "same weights, average and optimizer state"


@pytest.mark.slow
def test_a_run_killed_in_a_step_resumes_bit_for_bit(ranks, small_run, tmp_path):
    whole = small_run(*RESUME, f"training.checkpoint.path={tmp_path / 'whole'}")
    parted = small_run(*RESUME, f"training.checkpoint.path={tmp_path / 'parted'}")
    uninterrupted = ranks(2, train_and_watch, whole, None)
    with pytest.raises(pytest.fail.Exception, match="died"):
        ranks(2, train_and_watch, parted, 9)
    resumed = ranks(2, train_and_watch, parted, None)
    for (seen, final), (seen_after, final_after) in zip(uninterrupted, resumed, strict=True):
        assert [step for step, *_ in seen_after] == [7, 8, 9, 10, 11]
        assert seen_after == seen[7:]
        assert final_after == final


LOOP = [
    "training.steps=3",
    "training.log_interval=1",
    "training.val_interval=3",
    "training.grad_accum_steps=2",
    "training.label_smoothing=0.1",
    "optimizer.warmup_steps=2",
    "optimizer.eps=1e-5",
    "optimizer.clip_norm=0.5",
]


def plain_loop(world, config):
    """The same steps in plain PyTorch, written down again from the options."""
    run, _ = prepare.prepare(config, world)
    o, accum = config.optimizer, config.training.grad_accum_steps
    model = network.build_model(config, backend="torch", on_meta=False)
    groups = optim.parameter_groups(model.named_parameters(), weight_decay=o.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=1.0, betas=tuple(o.betas), eps=o.eps)
    batches = loaders.train_batches(run, start_step=0)
    lines = []
    for step in range(config.training.steps):
        half_cosine = 0.5 * (1 + math.cos(math.pi * (step - 2)))
        lr = o.lr * (step + 1) / 2 if step < 2 else o.min_lr + (o.lr - o.min_lr) * half_cosine
        optimizer.zero_grad()
        parts_of_loss = []
        for _ in range(accum):
            batch = next(batches)
            loss = F.cross_entropy(model(batch.image_BCHW), batch.label_B, label_smoothing=0.1)
            (loss / accum).backward()
            parts_of_loss.append(loss.item())
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm).item()
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
        lines.append({"loss": sum(parts_of_loss) / accum, "grad_norm": norm, "lr": lr})
    return {name: p.detach() for name, p in model.named_parameters()}, lines


def loop_parts(world, config):
    """Train through train.train and return this rank's part of the weights, or of their average."""
    kept = []
    real_fit = train.fit

    def fit_and_keep(run, logbook, **rest):
        outcome = real_fit(run, logbook, **rest)
        with run.ema.swapped() if run.ema else contextlib.nullcontext():
            kept.extend(parts(run.shards))
        return outcome

    train.fit = fit_and_keep
    train.train(config, world)
    return kept


@pytest.mark.parametrize(("world_size", "batch_size"), [(1, 6), (2, 3)])
def test_the_loop_is_the_plain_loop(ranks, small_run, tmp_path, world_size, batch_size):
    """Weights, logged loss, gradient norm and learning rate, at any split of the global batch."""
    expected, lines = ranks(1, plain_loop, small_run(*LOOP, "dataset.train.batch_size=6"))[0]
    config = small_run(*LOOP, f"dataset.train.batch_size={batch_size}")
    found = ranks(world_size, loop_parts, config)
    assert worst_error(found, expected) <= 1e-5
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    logged = [line for line in log if line["event"] == "train"]
    assert len(logged) == 3
    assert max(line["grad_norm"] for line in lines) > 0.5, "clipping must act"
    for line, plain in zip(logged, lines, strict=True):
        for name, value in plain.items():
            assert line[name] == pytest.approx(value, rel=2e-5), name


@pytest.mark.parametrize(("world_size", "options"), [(1, []), (2, []), (2, ["distributed.ep=2"])])
def test_averaged_weights_on_any_mesh_are_the_average_over_one_process(
    ranks, small_run, tmp_path, world_size, options
):
    moe = ["model.moe.num_experts=4", "model.moe.mlp_ratio=1"]
    base = [
        *LOOP,
        *moe,
        "training.ema_decay=0.6",
        "optimizer.name=sgd",
        "optimizer.betas=[0.9,0.999]",
    ]
    base = [option for option in base if not option.startswith("optimizer.eps")]
    config = small_run(*base, f"dataset.train.batch_size={6 // world_size}", *options)

    def averaged_by_hand(world):
        seen, kept = [], []
        real_step = train.train_step

        def step_and_note(run, *args, **kwargs):
            if not seen:
                seen.append([p.local.detach().clone() for p in run.shards])
            real_step(run, *args, **kwargs)
            seen.append([p.local.detach().clone() for p in run.shards])
            kept[:] = [(s.name, s.full_slice()) for s in run.shards]

        train.train_step = step_and_note
        path = f"training.checkpoint.path={tmp_path / 'alone'}"
        train.train(small_run(*base, "dataset.train.batch_size=6", path), world)
        average = seen[0]
        for weights in seen[1:]:
            average = [0.6 * a + 0.4 * w for a, w in zip(average, weights, strict=True)]
        return {name: a for (name, _), a in zip(kept, average, strict=True)}

    (expected,) = ranks(1, averaged_by_hand)
    assert worst_error(ranks(world_size, loop_parts, config), expected) <= 1e-6
    log = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    (val,) = [line for line in log if line["event"] == "val"]
    assert val["ema_val_loss"] != val["val_loss"]


def validation_losses(world, config):
    run, _ = prepare.prepare(config, world)
    with torch.no_grad():
        for shard in run.shards:
            shard.local.mul_(1.5)
    sharding.install_weights(run.model)
    figures = [train.validate(run), train.validate_all(run), train.validate(run)]
    return [{name: one.get(name) for name in ("val_loss", "ema_val_loss")} for one in figures]


@pytest.fixture(scope="module")
def fresh_loss(ranks, image_folder, tmp_path_factory):
    """The validation loss of the model as it is made."""
    options = small_options(image_folder, tmp_path_factory.mktemp("fresh"))
    config = options("model.moe.num_experts=4")
    (figures,) = ranks(1, lambda world: train.validate(prepare.prepare(config, world)[0]))
    return figures["val_loss"]


@pytest.mark.parametrize(
    ("world_size", "strategy", "options"),
    [
        (1, 0, []),
        (1, 3, []),
        *((2, strategy, []) for strategy in (0, 1, 2, 3)),
        *((2, strategy, ["distributed.ep=2"]) for strategy in (1, 3)),
    ],
)
def test_validating_the_average_uses_it_and_leaves_the_weights_alone(
    ranks, small_run, fresh_loss, world_size, strategy, options
):
    moe = ["model.moe.num_experts=4", f"fsdp.zero_dp_strategy={strategy}"]
    config = small_run("training.ema_decay=0.9", *moe, *options)
    before, both, after = ranks(world_size, validation_losses, config)[0]
    assert before == after
    assert both["val_loss"] == before["val_loss"] != pytest.approx(fresh_loss, rel=1e-4)
    assert both["ema_val_loss"] == pytest.approx(fresh_loss, rel=1e-6), (
        "the average is the first values"
    )


def test_the_loop_seeds_and_communicates_as_it_says(ranks, small_run):
    def watched(world, config):
        seeds, lasts = [], []
        real_seed, real_microbatch = distributed.seed_step, sharding.microbatch

        def seed_step(seed, *, step, microbatch, rank):
            seeds.append((seed, step, microbatch, rank))
            real_seed(seed, step=step, microbatch=microbatch, rank=rank)

        def microbatch(model, *, is_last):
            lasts.append(is_last)
            return real_microbatch(model, is_last=is_last)

        distributed.seed_step, sharding.microbatch = seed_step, microbatch
        train.train(config, world)
        return seeds, lasts

    options = ["training.steps=2", "training.grad_accum_steps=2", "training.seed=5"]
    for rank, (seeds, lasts) in enumerate(ranks(2, watched, small_run(*options))):
        assert seeds == [(5, step, part, rank) for step in (0, 1) for part in (0, 1)]
        assert lasts == [False, True, False, True]


def test_the_loop_keeps_as_many_checkpoints_as_asked(ranks, small_run, tmp_path):
    options = ["training.steps=4", "training.val_interval=1", "training.checkpoint.keep_last=1"]
    ranks(1, lambda world: train.train(small_run(*options), world))
    folders = [path for path in (tmp_path / "run").glob("step_*")]
    assert len(folders) <= 2, "the newest, and the best if it is another"
    assert any(path.name.startswith("step_4_") for path in folders)


def test_ranks_with_different_options_are_refused(ranks, small_run):
    def refused(world):
        config = small_run(f"optimizer.lr={1e-3 + world.rank * 1e-4}")
        with pytest.raises(ValueError, match=r"config differs between ranks: rank 0: lr: 0.001; "):
            train.train(config, world)

    ranks(2, refused)


def test_dropout_differs_between_steps_ranks_and_microbatches(ranks, small_run):
    def draws(world):
        values = []
        for step in (0, 1):
            for microbatch in (0, 1):
                distributed.seed_step(0, step=step, microbatch=microbatch, rank=world.rank)
                values.append(torch.rand(()).item())
        return values

    values = [value for rank_values in ranks(2, draws) for value in rank_values]
    assert len(set(values)) == len(values) == 8


def validate_small(world, config):
    run, _ = prepare.prepare(config, world)
    # A head with large weights, so that predictions differ between images.
    with torch.no_grad():
        for shard in run.shards:
            if shard.name == "head.weight":
                shard.local.mul_(50)
    sharding.install_weights(run.model)
    counted = [
        int((batch.label_B != NOT_COUNTED).sum())
        for batch in loaders.val_batches(run.config, run.val_index, run.world)
    ]
    return train.validate(run), sum(counted)


def test_validation_counts_each_image_once_at_any_world_size(ranks, small_run):
    config = small_run()
    figures = {}
    for world_size in (1, 2, 3):
        results = ranks(world_size, validate_small, config)
        assert sum(count for _, count in results) == 7
        assert all(result == results[0][0] for result, _ in results), "ranks agree"
        figures[world_size] = results[0][0]
    for world_size in (2, 3):
        assert figures[world_size]["val_images"] == 7
        assert figures[world_size]["top1"] == figures[1]["top1"]
        assert figures[world_size]["val_loss"] == pytest.approx(figures[1]["val_loss"], rel=1e-6)


def test_validation_figures_equal_a_plain_loop(ranks, small_run):
    config = small_run()
    figures, _ = ranks(1, validate_small, config)[0]

    def plain(world):
        run, _ = prepare.prepare(config, world)
        model = network.build_model(config, backend="torch", on_meta=False).eval()
        with torch.no_grad():
            model.head.weight.mul_(50)
            batches = list(loaders.val_batches(run.config, run.val_index, run.world))
            logits_BY = torch.cat([model(batch.image_BCHW) for batch in batches])
        label_B = torch.cat([batch.label_B for batch in batches])
        top1 = (logits_BY.argmax(1) == label_B).double().mean().item()
        return 100 * top1, F.cross_entropy(logits_BY, label_B).item()

    top1, loss = ranks(1, plain)[0]
    assert figures["top1"] == pytest.approx(top1)
    assert figures["val_loss"] == pytest.approx(loss, rel=1e-5)
    assert figures["top5"] == 100, "three classes"


def train_and_answer(world, config):
    """Train and return the logits of the sharded model on fixed images."""
    train.train(config, world)
    run, _ = prepare.prepare(config, world)
    train.resume(run)
    run.model.eval()
    image_BCHW = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return run.model(image_BCHW)


def test_dcp_to_torch_gives_the_unsharded_model(ranks, small_run, tmp_path):
    config = small_run("training.steps=2")
    sharded_logits = ranks(2, train_and_answer, config)[0]
    (folder,) = (tmp_path / "run").glob("step_2_*")
    dcp_to_torch_save(folder, tmp_path / "out.pt")  # what the README's command calls
    content = torch.load(tmp_path / "out.pt", weights_only=True)
    model = network.build_model(config, backend="torch", on_meta=False).eval()
    model.load_state_dict(content["model"], strict=True)
    other = network.build_model(config, backend="torch", on_meta=False).eval()
    checkpoint.load_torch_checkpoint(tmp_path / "out.pt", other)
    image_BCHW = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(image_BCHW), sharded_logits)
        assert torch.equal(model(image_BCHW), other(image_BCHW))


def contents(folder):
    """The bytes of every file of a run folder but the log, which every start adds a line to."""
    paths = [path for path in folder.rglob("*") if path.is_file() and path.name != "log.jsonl"]
    return {path.relative_to(folder): path.read_bytes() for path in paths}


@pytest.fixture(scope="module")
def one_step(ranks, image_folder, tmp_path_factory):
    """The options of a run that has made one step, for tests that leave it as it is."""
    options = small_options(image_folder, tmp_path_factory.mktemp("one_step") / "run")
    ranks(1, lambda world: train.train(options("training.steps=1"), world))
    return options


def test_a_complete_run_says_so_and_trains_no_further(ranks, one_step, capfd):
    config = one_step("training.steps=1", "dataset.decoder=pillow", "training.log_interval=7")
    before = contents(Path(config.training.checkpoint.path))
    ranks(1, lambda world: train.train(config, world))
    printed = capfd.readouterr().out
    assert "is complete: 1 steps, all of them before" in printed and "train step" not in printed
    assert contents(Path(config.training.checkpoint.path)) == before


@pytest.mark.parametrize(
    ("changes", "asked", "had"),
    [
        ("optimizer.lr=5e-4", "optimizer.lr=0.0005", "optimizer.lr=0.001"),
        ("model.vit.drop_path_rate=0.3", "model.vit.drop_path_rate=0.3", "drop_path_rate=0.0"),
        ("dataset.val.crop_ratio=0.9", "dataset.val.crop_ratio=0.9", "crop_ratio=1.0"),
        ("dataset.mean=[0.5,0.5,0.5]", r"dataset.mean=\[0.5, 0.5, 0.5\]", r"dataset.mean=\[0.4"),
        (
            "training.label_smoothing=0.2 optimizer.eps=1e-6",
            "optimizer.eps=1e-06, training.label_smoothing=0.2",
            "optimizer.eps=1e-08, training.label_smoothing=0.1",
        ),
    ],
)
def test_a_complete_run_never_shows_its_figures_as_those_of_other_options(
    ranks, one_step, changes, asked, had
):
    config = one_step("training.steps=1", *changes.split())
    before = contents(Path(config.training.checkpoint.path))

    def refused(world):
        message = (
            rf"config {asked}: the run in .*/run is complete \(1 steps\) with .*{had}.*; use an"
        )
        with pytest.raises(ValueError, match=message):
            train.train(config, world)

    ranks(1, refused)
    assert contents(Path(config.training.checkpoint.path)) == before


def test_options_without_effect_on_a_complete_run_exist():
    names = [name for name, _, _ in walk(Config())]
    for prefix in resume.WITHOUT_EFFECT:
        assert any(name.startswith(prefix) for name in names), prefix


def test_a_run_that_goes_on_with_other_options_keeps_the_old_ones(ranks, small_run, tmp_path):
    for steps, lr in ((1, 0.5), (2, 0.25), (3, 0.25)):
        config = small_run(f"training.steps={steps}", f"optimizer.lr={lr}")
        ranks(1, lambda world, config=config: train.train(config, world))
    kept = {
        name: yaml.safe_load((tmp_path / "run" / name).read_text())
        for name in ("config.until_step_1.yaml", "config.until_step_2.yaml", "config.yaml")
    }
    assert [options["optimizer"]["lr"] for options in kept.values()] == [0.5, 0.25, 0.25]
    assert [options["training"]["steps"] for options in kept.values()] == [1, 2, 3]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("training.ema_decay=0.9", r"config training.ema_decay=0.9: .* saved with None"),
        ("training.seed=1", r"seed=1, the checkpoint has 0"),
        ("dataset.train.batch_size=4", r"global_batch=4, the checkpoint has 5"),
        ("model.vit.depth=3", r"missing model.blocks.2.attn"),
        ("model.vit.embed_dim=72", r"cls_token is \(1, 1, 36\) torch.float32, the model has"),
        ("model.vit.pre_norm=true", r"missing model.norm_pre.weight"),
        ("optimizer.name=sgd optimizer.betas=[0.9,0.999]", r"unexpected optimizer.*exp_avg"),
    ],
)
def test_resume_refuses_what_would_not_continue_the_run(ranks, one_step, change, message):
    config = one_step("training.steps=2", *change.split())
    folder = Path(config.training.checkpoint.path)
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}

    def refused(world):
        with pytest.raises(ValueError, match=message):
            train.train(config, world)

    ranks(1, refused)
    after = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert after == before, "a refused resume leaves the run folder alone"


def trained_with(ranks, small_run, *options):
    ranks(1, lambda world: train.train(small_run(*options), world))


def train_worse_and_worse(world, config):
    real = train.validate
    losses = iter(range(1, 100))
    train.validate = lambda run, stop=None: real(run, stop) | {"val_loss": float(next(losses))}
    train.train(config, world)


@pytest.mark.slow
def test_the_best_is_resumed_and_newer_steps_are_set_aside(ranks, small_run, tmp_path, capfd):
    saved = ["training.val_interval=2", "training.checkpoint.keep_last=9"]
    ranks(1, train_worse_and_worse, small_run(*saved, "training.steps=6"))
    by_figure = small_run(
        *saved, "training.steps=8", "training.checkpoint.resume_from_metric=-val_loss"
    )
    capfd.readouterr()
    ranks(1, train_worse_and_worse, by_figure)
    assert "resumed step=2" in capfd.readouterr().out
    names = sorted(path.name for path in (tmp_path / "run").glob("superseded_step_*"))
    assert names == ["superseded_step_4_loss_2.000", "superseded_step_6_loss_3.000"]
    ranks(1, train_worse_and_worse, by_figure)
    assert "training is complete: 8 steps" in capfd.readouterr().out, "a complete run stays so"


def test_a_stopped_run_goes_on_where_it_was_whatever_the_figure(ranks, small_run, tmp_path, capfd):
    options = ["training.val_interval=2", "training.steps=8"]
    options += ["training.checkpoint.keep_last=9"]
    options += ["training.checkpoint.resume_from_metric=-val_loss"]

    def stopped_at_5(world):
        real_step = train.train_step

        def step_and_ask(run, *args, step, **kwargs):
            real_step(run, *args, step=step, **kwargs)
            if step == 4:
                os.kill(os.getpid(), signal.SIGTERM)

        train.train_step = step_and_ask
        with pytest.raises(train.Stopped):
            train.train(small_run(*options), world)

    ranks(1, stopped_at_5)
    trained_with(ranks, small_run, *options)
    assert "resumed step=5" in capfd.readouterr().out
    assert not list((tmp_path / "run").glob("superseded_*"))


def test_log_has_the_run_its_choices_and_every_figure(ranks, small_run, tmp_path):
    config = small_run("training.steps=4", "training.log_interval=2", "training.val_interval=4")
    ranks(2, lambda world: train.train(config, world))
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    assert [line["event"] for line in lines] == ["run", "train", "train", "val", "saved"]
    assert lines[0]["mesh"] == "dp_outer=1 dp_shard=2 ep=1"
    assert lines[0]["global_batch"] == 10
    names = {"loss", "grad_norm", "lr", "images_per_s", "step_ms", "data_ms", "memory_gib"}
    assert names <= set(lines[1])
    assert "mfu_percent" not in lines[1], "no peak is known for a CPU"
    assert (tmp_path / "run/config.yaml").read_text().startswith("model:")
    assert json.loads((tmp_path / "run/versions.json").read_text())["timm"]


def test_mfu_follows_from_flops_and_a_named_peak(ranks, small_run, tmp_path):
    config = small_run("training.steps=2", "training.log_interval=2", "training.peak_tflops=0.5")
    ranks(1, lambda world: train.train(config, world))
    line = json.loads((tmp_path / "run/log.jsonl").read_text().splitlines()[1])
    flops = network.flops_per_image(config)
    expected = 100 * 3 * flops * line["images_per_s"] / 0.5e12
    assert line["mfu_percent"] == pytest.approx(expected, rel=1e-3)


def test_non_finite_loss_stops_the_run_and_saves_nothing(ranks, small_run, tmp_path):
    config = small_run("training.steps=4", "training.log_interval=1", "optimizer.lr=1e30")

    def stopped(world):
        with pytest.raises(train.NonFiniteError, match=r"non-finite loss=.* by step \d"):
            train.train(config, world)

    ranks(2, stopped)
    assert not list((tmp_path / "run").glob("step_*"))


def test_non_finite_validation_stops_every_rank_and_saves_nothing(ranks, small_run, tmp_path):
    options = ["training.steps=1", "optimizer.lr=1e30", "optimizer.clip_norm=null"]

    def stopped(world):
        with pytest.raises(train.NonFiniteError, match=r"non-finite validation loss="):
            train.train(small_run(*options), world)

    ranks(2, stopped)
    assert [path.name for path in (tmp_path / "run").glob("*step*")] == []


def test_a_checkpoint_between_validations_can_end_a_run(ranks, small_run, tmp_path, capfd):
    options = ["training.val_interval=10", "training.checkpoint.interval=2"]
    config = small_run(*options, "training.steps=4")
    ranks(1, lambda world: train.train(config, world))
    for folder in (tmp_path / "run").glob("step_4_*"):
        shutil.rmtree(folder)
    capfd.readouterr()
    config = small_run(*options, "training.steps=2")
    ranks(1, lambda world: train.train(config, world))
    assert "% of 7 validation images" in capfd.readouterr().out


def test_resume_refuses_other_images_of_the_same_number(ranks, small_run, image_folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(image_folder, copy)
    config = small_run("training.steps=1", f"dataset.train.root={copy}")
    ranks(1, lambda world: train.train(config, world))
    first = min((copy / "train").rglob("*.JPEG"))
    first.rename(first.with_name("renamed.JPEG"))

    def refused(world):
        with pytest.raises(ValueError, match="dataset_sha256="):
            train.train(config, world)

    ranks(1, refused)


def test_validation_at_another_size(ranks, small_run):
    options = ["model.vit.dynamic_img_size=true", "dataset.val.img_size=48"]
    figures, _ = ranks(1, validate_small, small_run(*options))[0]
    assert figures["val_images"] == 7
    assert figures != ranks(1, validate_small, small_run())[0][0]


def test_loss_equals_its_closed_form():
    logits_BY = torch.tensor([[2.0, 0.0, -1.0]])
    log_p = (logits_BY - logits_BY.logsumexp(1, keepdim=True))[0]
    expected = -(0.9 * log_p[1] + 0.1 * log_p.mean())
    loss = losses.smoothed_loss(logits_BY, torch.tensor([1]), smoothing=0.1)
    torch.testing.assert_close(loss, expected)


@pytest.mark.slow
def test_the_command_line_resumes_a_run(ranks, image_folder, tmp_path):
    command = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", "train.py"]
    options = [
        "model.vit.num_classes=3",
        "model.vit.depth=2",
        "optimizer.warmup_steps=0",
        "device=cpu",
        f"dataset.train.root={image_folder}",
        "dataset.train.batch_size=4",
        f"training.checkpoint.path={tmp_path}/run",
        "training.val_interval=1",
    ]
    first = train.parse([*options, "training.steps=2"])
    ranks(2, lambda world: train.train(first, world))
    words = [sys.executable, *command, *options, "training.steps=3"]
    root = Path(train.__file__).parent
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "resumed step=2" in done.stdout
    assert "training.steps: 2 -> 3" in done.stdout
    assert "training is complete: 3 steps" in done.stdout
    assert (tmp_path / "run/tensorboard").is_dir()
