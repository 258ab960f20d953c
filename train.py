r"""Train a Vision Transformer; the same command starts a run and resumes it.

python train.py                                             # one process: a CPU, or one GPU
torchrun --nproc-per-node 2 train.py                        # two ranks, the bundled images
torchrun --nproc-per-node ${NGPU} train.py --config-name vit_base_patch16_224 \
        distributed.dp_shard=${NGPU} dataset.train.root=/data/imagenet \
        training.checkpoint.path=./ckpts/vit
python train.py --help                                      # every option

set lr -> microbatches (forward, backward) -> clip -> update -> log -> validate -> save
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import math
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

import moe
from images import feed
from images.batches import Batch
from layers import te
from options import compose
from options.command_line import Parser
from options.schema import Config
from parallel import collectives, distributed, launch, sharding
from parallel.distributed import World
from parallel.terminal import say, show_result, warn
from training import (
    distillation,
    loaders,
    optim,
    prepare,
    pretrained,
    run_folder,
    scoring,
)
from training.logbook import Logbook, as_table
from training.optim import Ema
from training.resume import Start, note_start, open_folder, resume
from training.run import Run
from training.saver import Saver
from training.scoring import ExpertLoad, NonFiniteError
from training.stopping import Stopped, StopSignals, exit_code, leave


@dataclasses.dataclass
class Meter:
    """Sums since `started`; the tensors stay on the device until they are read."""

    loss: Tensor
    balance: Tensor
    grad_norm: Tensor
    load: ExpertLoad
    started: float
    steps: int = 0
    data_s: float = 0.0

    @classmethod
    def start(cls, device: torch.device) -> Meter:
        """Return a meter at zero with its clock running."""
        zeros = torch.zeros(3, device=device)
        return cls(zeros[0], zeros[1], zeros[2], ExpertLoad(), time.perf_counter())


def to_device(run: Run, batch: Batch) -> tuple[Tensor, Tensor]:
    """Return the images in the compute dtype and the labels, or target_BY if they are mixed."""
    image_BCHW = batch.image_BCHW.to(run.world.device, non_blocking=True)
    target = batch.label_B.to(run.world.device, non_blocking=True)
    if run.eraser is not None:
        image_BCHW = run.eraser(image_BCHW, batch.position_B)
    if run.mixer is not None:
        group = int(batch.position_B[0]) // len(batch.position_B)
        image_BCHW, target = run.mixer(image_BCHW, target, group=group)
    return image_BCHW.to(run.dtype), target


def train_step(run: Run, batches: Iterator[Batch], *, step: int, meter: Meter) -> None:
    """Do optimizer update `step` (from 0) and add its figures to `meter`."""
    o, t = run.config.optimizer, run.config.training
    optim.set_lr(run.optimizer, run.lr_at(step))
    run.optimizer.zero_grad()
    # Sharding sums gradients over ranks and microbatches; this share makes the sum a mean over the
    # global batch.
    share = 1 / (t.grad_accum_steps * run.world.size)
    for number in range(t.grad_accum_steps):
        asked = time.perf_counter()
        batch = next(batches)
        meter.data_s += time.perf_counter() - asked
        image_BCHW, target = to_device(run, batch)
        # Dropout and noise are a function of the step, so a resumed run needs no generator's state.
        distributed.seed_step(t.seed, step=step, microbatch=number, rank=run.world.rank)
        # Ranks exchange gradients in the last microbatch only, once per update.
        with sharding.microbatch(run.model, is_last=number == t.grad_accum_steps - 1):
            with te.fp8_context(run.config.model.te_fp8):
                logits_BY = run.model(image_BCHW)
            loss = run.criterion(logits_BY, target, image_BCHW) * share
            balance = moe.balance_loss(run.model) * share
            (loss + balance).backward()
        meter.loss += loss.detach()
        meter.balance += balance.detach()
        meter.load.add(run.model)
    # Clip what is reduced: the norm is that of the global batch's gradient on every rank. The EMA
    # then averages the weights that the next step starts from.
    sharding.finish_gradients(run.model, run.shards)
    meter.grad_norm += sharding.clip_gradients(run.shards, o.clip_norm)
    sharding.step_optimizer(run.optimizer)
    if run.ema is not None:
        run.ema.update()
    meter.steps += 1


def validate(run: Run, stop: StopSignals | None = None) -> dict[str, float]:
    """Return loss, top-1, top-5 and expert load; each validation image counts once. Collective.

    Raises:
        NonFiniteError: On every rank, if the loss is not finite.
        Stopped: On every rank, if one is asked to stop during validation.
    """
    load = ExpertLoad()

    def after_batch() -> None:
        load.add(run.model)
        if stop is not None and stop.agreed():
            raise Stopped("in validation")

    sums_Y4 = scoring.score(
        run.model,
        loaders.val_batches(run.config, run.val_index, run.world),
        device=run.world.device,
        dtype=run.dtype,
        after_batch=after_batch,
    )
    return scoring.figures(sums_Y4) | load.figures()


@contextlib.contextmanager
def averaged_weights(run: Run, ema: Ema) -> Iterator[None]:
    """Let the model compute with the averaged weights, and restore its own at the end."""
    try:
        with ema.swapped():
            sharding.install_weights(run.model)
            yield
    finally:
        sharding.install_weights(run.model)


def validate_all(run: Run, stop: StopSignals | None = None) -> dict[str, float]:
    """Return the figures of `validate` and, if weights are averaged, theirs as ema_*."""
    figures = validate(run, stop)
    if run.ema is not None:
        with averaged_weights(run, run.ema):
            averaged = validate(run, stop)
        figures |= {f"ema_{name}": averaged[name] for name in ("val_loss", "top1", "top5")}
    return figures


def read_meter(run: Run, meter: Meter, *, step: int) -> dict[str, float]:
    """Return the figures since the last log line; the interval's one host sync. Collective.

    Raises:
        NonFiniteError: On every rank, if the loss or the gradient norm is not finite.
    """
    sums_3 = torch.stack([meter.loss, meter.balance, meter.grad_norm])
    dist.all_reduce(sums_3)
    loss, balance, grad_norm = (sums_3 / meter.steps).tolist()
    train_s = time.perf_counter() - meter.started  # after the sync, so all queued work is done
    grad_norm /= run.world.size  # the ranks' norms are equal; their loss shares sum to the mean
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise NonFiniteError(f"non-finite loss={loss} or grad_norm={grad_norm} by step {step}")
    images_per_s = meter.steps * run.global_batch / train_s
    figures = {
        "loss": loss,
        "grad_norm": grad_norm,
        "lr": max(group["lr"] for group in run.optimizer.param_groups),  # of the top layer
        "images_per_s": images_per_s,
        "step_ms": 1000 * train_s / meter.steps,
        "data_ms": 1000 * meter.data_s / meter.steps,
        "memory_gib": distributed.memory_gib(run.world.device),
    }
    if run.config.model.moe.num_experts:
        figures["balance_loss"] = balance
        figures |= meter.load.figures()
    peak = distributed.peak_tflops(run.world.device, run.config.training.peak_tflops)
    if peak is not None:
        # Backward does two products for each of the forward's; a teacher runs forward only.
        flops = 3 * run.flops_per_image + run.teacher_flops
        figures["mfu_percent"] = 100 * (flops * images_per_s / run.world.size) / (peak * 1e12)
    return figures


def fit(
    run: Run, logbook: Logbook, *, start: Start, saver: Saver, stop: StopSignals
) -> dict[str, float]:
    """Do the updates from `start` to the last, and save; return the last figures.

    Raises:
        Stopped: On every rank, once a rank is asked to stop and the checkpoint is on disk.
    """
    t = run.config.training
    batches = loaders.train_batches(run, start_step=start.step)
    meter, images, train_s = Meter.start(run.world.device), 0, 0.0
    figures: dict[str, float] = {}
    for done in range(start.step + 1, t.steps + 1):
        try:
            train_step(run, batches, step=done - 1, meter=meter)
        except RuntimeError as error:
            error.add_note(f"at step {done}")
            raise
        logbook.advance()
        saver.poll()
        is_validating = done % t.val_interval == 0 or done == t.steps
        is_saving = done % (t.checkpoint.interval or t.val_interval) == 0 or done == t.steps
        # All ranks must leave the loop in the same step, or the others hang in a collective. Where
        # they wait anyway they agree at once; else the answer comes a step later, without a wait.
        is_waiting = is_saving or is_validating or done % t.log_interval == 0
        is_stopping = stop.agreed() if is_waiting else stop.agreed_before()
        if not (is_waiting or is_stopping):
            continue
        figures = read_meter(run, meter, step=done)
        logbook.metrics("train", step=done, values=figures)
        logbook.show(loss=f"{figures['loss']:.3f}")
        images += meter.steps * run.global_batch
        train_s += meter.steps * figures["step_ms"] / 1000
        figures["images_per_s"] = images / train_s  # since `start`, for the checkpoint
        if is_validating and not is_stopping:
            with contextlib.suppress(Stopped):  # when asked to stop, save first
                val = validate_all(run, stop)
                figures |= val
                logbook.metrics("val", step=done, values=val)
        if is_saving:
            saver.save(step=done, figures=figures, is_last=done == t.steps)
        if stop.agreed():  # asked again: validating or saving may have taken minutes
            saver.ensure(step=done, figures=figures)
            name, seconds = stop.describe()
            logbook.event("stopped", step=done, signal=name, saved_after_s=round(seconds, 2))
            raise Stopped(f"{name} at step {done}, checkpoint {saver.folder}")
        meter = Meter.start(run.world.device)
    return figures


def print_outcome(run: Run, folder: Path, *, figures: Mapping[str, float], is_old: bool) -> None:
    """Print the run's last table: its accuracy, its speed, its files and a next command.

    `is_old`: the run was complete when the program started.
    """
    python = shlex.quote(os.path.relpath(sys.executable))
    rows = {
        "top-1": f"{figures['top1']:.2f} % of {figures['val_images']:.0f} validation images",
        "top-5": f"{figures['top5']:.2f} %",
    }
    if "ema_top1" in figures:
        rows["top-1, averaged weights"] = f"{figures['ema_top1']:.2f} %"
    rows["validation cross-entropy"] = f"{figures['val_loss']:.4f}"
    if not is_old:  # that was on other ranks, perhaps
        rows["speed"] = f"{figures['images_per_s']:.1f} images/s on {run.world.size} rank(s)"
    rows |= {
        "checkpoint": str(folder),
        "log": f"{run.folder}/log.jsonl",
        "next": f"{python} -m torch.distributed.checkpoint.format_utils dcp_to_torch "
        f"{shlex.quote(str(folder))} model.pt",
    }
    rows |= scoring.load_summary(dict(figures), num_experts=run.config.model.moe.num_experts)
    done = ", all of them before this start" if is_old else ""
    say(*as_table(f"training is complete: {run.config.training.steps} steps{done}", rows))


def run_all(run: Run, logbook: Logbook, *, start: Start, stop: StopSignals) -> None:
    """Train from `start` to the last step, unless that is done, and print the outcome."""
    saver = Saver(run, logbook, start=start)
    complete = start.found if start.step == run.config.training.steps else None
    try:
        if complete is not None:
            figures = complete.metrics
            if "top1" not in figures:  # saved between validations
                figures |= validate_all(run)
        else:
            figures = fit(run, logbook, start=start, saver=saver, stop=stop)
    except NonFiniteError:
        saver.drain()  # the save in progress predates the error
        raise
    finally:
        saver.close()
    if run.world.is_main:
        assert saver.folder is not None, "the last step was saved"
        print_outcome(run, saver.folder, figures=figures, is_old=complete is not None)


def train(config: Config, world: World) -> None:
    """Start or resume the run that `config` describes, and train it to its last step.

    Raises:
        Stopped: On every rank, if a rank is asked to stop; the run can be resumed.
    """
    collectives.require_equal("config", compose.to_yaml(config))
    with StopSignals() as stop:
        run, choices = prepare.prepare(config, world)
        run = distillation.with_teacher(run)
        run_folder.check_place(run.folder, {*run.train_index.watched, *run.val_index.watched})
        with run_folder.locked(run.folder, lock=config.training.checkpoint.lock):
            start = resume(run)
            beginning = pretrained.begin(run) if start.found is None else None
            open_folder(run, start)
            logbook = Logbook(run.folder, config=run.config, is_main=world.is_main, step=start.step)
            try:
                begun = "resumed" if beginning is None else beginning.mode
                logbook.event("run", **choices, init=begun)
                note_start(logbook, start)
                pretrained.note(run, logbook, beginning)
                run_all(run, logbook, start=start, stop=stop)
            finally:
                logbook.close()


def parse(argv: list[str]) -> Config:
    """Return the options of a command line; print and exit for --help and --print-config."""
    parser = Parser(
        prog="train.py",
        description=__doc__,
        epilog=f"Options, as name=value:\n\n{compose.options_table()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-name", "-cn", default="vit_moe_tiny_patch8_64", metavar="NAME")
    parser.add_argument("--config-dir", "-cd", type=Path, default=compose.CONFIG_DIR)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--print-config", action="store_true", help="print all options and exit")
    parser.add_argument("overrides", nargs="*", metavar="name=value")
    arguments = parser.parse_intermixed_args(argv)
    config = compose.compose(
        arguments.config_name,
        arguments.overrides,
        config_dir=arguments.config_dir,
        note=warn if launch.shown_rank() == "0" else lambda _: None,
    )
    if arguments.print_config:
        show_result(*compose.to_yaml(config).splitlines())
        raise SystemExit(0)
    return config


def main(argv: list[str]) -> int:
    """Run the command line; return the exit code and print one line for what a user did wrong."""

    def program() -> None:
        config = parse(argv)
        with (
            distributed.process_group(
                config.device, timeout_s=config.distributed.timeout_s
            ) as world,
            feed.worker_losses(),
        ):
            train(config, world)

    return exit_code(program, is_training=True, debug="--debug" in argv)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
