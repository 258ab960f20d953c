"""A run that goes on with other ranks, shards and expert shares: same weights, moments, images."""

import shutil

import pytest
import torch

import train
from tests.support.sharded import gather

MOE = [
    "model.moe.num_experts=4",
    "model.moe.every_n=1",
    "training.val_interval=100",
    "training.checkpoint.interval=1",
]
# (ranks, dp_shard, ep), one after another; the global batch is 12 each time.
LAYOUTS = [(4, 2, 2), (2, 1, 2), (1, 1, 1), (4, 1, 4), (3, 3, 1)]
# Of these, what shards nothing, experts, weights, and both.
EACH_KIND = [(1, 1, 1), (2, 1, 2), (3, 3, 1), (4, 2, 2)]


def parts(run):
    """This rank's part of weights and moments."""
    found = []
    for s in run.shards:
        found.append((s.name, s.full_slice(), s.local.detach().clone()))
        state = run.optimizer.state.get(s.local, {})
        for key in ("exp_avg", "exp_avg_sq"):
            if key in state:
                found.append((f"{s.name}.{key}", s.full_slice(), state[key].clone()))
    return found


def go_on(world, config):
    """Train to the end of `config`; return what was there at the start, at the end, and seen."""
    start_parts, end_parts, images = [], [], []
    real_fit, real_step = train.fit, train.train_step

    def fit(run, logbook, **rest):
        start_parts.extend(parts(run))
        outcome = real_fit(run, logbook, **rest)
        end_parts.extend(parts(run))
        return outcome

    def step_and_note(run, batches, *, step, meter):
        batch = next(batches)
        images.append((step, batch.position_B.tolist()))
        real_step(run, iter([batch]), step=step, meter=meter)

    train.fit, train.train_step = fit, step_and_note
    train.train(config, world)
    return start_parts, end_parts, images


def assert_equal(old: dict, new: dict) -> None:
    assert old.keys() == new.keys()
    for name, tensor in old.items():
        assert torch.equal(tensor, new[name]), name


def test_weights_moments_and_images_go_on_across_layouts(ranks, small_run):
    end = None
    for number, (size, dp_shard, ep) in enumerate(LAYOUTS, start=1):
        layout = [f"distributed.dp_shard={dp_shard}", f"distributed.ep={ep}"]
        batch = f"dataset.train.batch_size={12 // size}"
        config = small_run(*MOE, *layout, batch, f"training.steps={number}")
        results = ranks(size, go_on, config)
        start = gather([(found, None) for found, _, _ in results])
        assert any(".experts." in name for name in start)
        assert any(name.endswith(".exp_avg_sq") for name in start)
        if end is not None:
            assert_equal(end, start)
        end = gather([(found, None) for _, found, _ in results])
        step = number - 1
        seen = [one for _, _, images in results for one in images]
        assert [n for n, _ in seen] == [step] * size
        positions = sorted(p for _, here in seen for p in here)
        assert positions == list(range(12 * step, 12 * (step + 1)))


def losses_of(world, config):
    """Train to the end of `config`; return each step's losses before they are rounded."""
    found = []
    real = train.read_meter

    def read_and_note(run, meter, *, step):
        figures = real(run, meter, step=step)
        found.append((step, figures["loss"], figures["balance_loss"]))
        return figures

    train.read_meter = read_and_note
    train.train(config, world)
    return found


def test_the_loss_of_a_checkpoint_is_the_same_on_every_kind_of_layout(ranks, small_run, tmp_path):
    every_step = [*MOE, "training.log_interval=1"]
    first = small_run(*every_step, "dataset.train.batch_size=12", "training.steps=2")
    ranks(1, losses_of, first)
    found = []
    for size, dp_shard, ep in EACH_KIND:
        folder = tmp_path / f"{size}_{dp_shard}_{ep}"
        shutil.copytree(tmp_path / "run", folder)
        layout = [f"distributed.dp_shard={dp_shard}", f"distributed.ep={ep}"]
        layout += [f"training.checkpoint.path={folder}", "training.steps=3"]
        config = small_run(*every_step, *layout, f"dataset.train.batch_size={12 // size}")
        ((step, *losses),) = ranks(size, losses_of, config)[0]
        assert step == 3
        found.append(losses)
    for losses in found[1:]:
        assert losses == pytest.approx(found[0], rel=1e-6), "as on one rank"


@pytest.mark.parametrize(("size", "batch_size"), [(2, 5), (3, 5)])
def test_another_global_batch_is_refused_with_its_factors(ranks, small_run, size, batch_size):
    ranks(1, lambda world: train.train(small_run("training.steps=1"), world))
    config = small_run("training.steps=2", f"dataset.train.batch_size={batch_size}")
    message = (
        rf"global_batch={size * batch_size}, the checkpoint has 5 "
        rf"\(batch_size {batch_size} x grad_accum_steps 1 x {size} ranks; any that multiply"
    )

    def refused(world):
        with pytest.raises(ValueError, match=message):
            train.train(config, world)

    ranks(size, refused)
