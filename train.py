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
import dataclasses
import json
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
from torch.nn import functional as F  # noqa: N812  # the name that everyone uses

import assemble
import compose
import distributed
import layers
import moe
import optim
import sharding
from assemble import Run
from distributed import World
from imagenet_dataset import NOT_COUNTED, Batch
from logbook import Logbook, print_table, versions
from resume import Start, resume, save
from schema import Config

LEAST_LOAD, MOST_LOAD = "least_load.", "most_load."
EXIT_OPTIONS, EXIT_NON_FINITE, EXIT_INTERRUPTED = 2, 5, 130


class NonFiniteError(RuntimeError):
    """The loss or the gradients stopped being finite numbers."""


@dataclasses.dataclass
class Meter:
    """Sums since `started`; the tensors stay on the device until they are asked for."""

    loss: Tensor
    balance: Tensor
    grad_norm: Tensor
    started: float
    steps: int = 0
    data_s: float = 0.0

    @classmethod
    def start(cls, device: torch.device) -> Meter:
        """Return a meter at zero, its clock running."""
        zeros = torch.zeros(3, device=device)
        return cls(zeros[0], zeros[1], zeros[2], time.perf_counter())


def smoothed_loss(logits_BY: Tensor, label_B: Tensor, *, smoothing: float) -> Tensor:
    """Return the mean cross-entropy in fp32, with label smoothing (arXiv:1512.00567, sec. 7)."""
    return F.cross_entropy(logits_BY.float(), label_B, label_smoothing=smoothing)


def train_step(run: Run, batches: Iterator[Batch], *, step: int, meter: Meter) -> None:
    """Make optimizer update number `step` (from 0) and add its figures to `meter`."""
    o, t = run.config.optimizer, run.config.training
    lr = optim.lr_at(
        step, peak=o.lr, final=o.min_lr, warmup_steps=o.warmup_steps, num_steps=t.steps
    )
    optim.set_lr(run.optimizer, lr)
    run.optimizer.zero_grad()
    # Sharding sums gradients over ranks, so the mean over the global batch is taken here.
    share = 1 / (t.grad_accum_steps * run.world.size)
    for number in range(t.grad_accum_steps):
        asked = time.perf_counter()
        batch = next(batches)
        meter.data_s += time.perf_counter() - asked
        image_BCHW = batch.image_BCHW.to(run.world.device, run.dtype, non_blocking=True)
        label_B = batch.label_B.to(run.world.device, non_blocking=True)
        distributed.seed_step(t.seed, step=step, microbatch=number, rank=run.world.rank)
        with sharding.microbatch(run.model, is_last=number == t.grad_accum_steps - 1):
            with layers.fp8_context(run.config.model.te_fp8):
                logits_BY = run.model(image_BCHW)
            loss = smoothed_loss(logits_BY, label_B, smoothing=t.label_smoothing) * share
            balance = moe.balance_loss(run.model) * share
            (loss + balance).backward()
        meter.loss += loss.detach()
        meter.balance += balance.detach()
    sharding.finish_gradients(run.model, run.shards)
    meter.grad_norm += sharding.clip_gradients(run.shards, o.clip_norm)
    sharding.step_optimizer(run.optimizer)
    meter.steps += 1


@torch.no_grad()
def validate(run: Run) -> dict[str, float]:
    """Return loss, top-1 and top-5 (in percent) over the validation images, each once.

    Raises:
        NonFiniteError: On every rank, if the loss is not finite.
    """
    run.model.eval()
    sums_4 = torch.zeros(4, dtype=torch.float64, device=run.world.device)
    loads: list[dict[str, Tensor]] = []
    for batch in assemble.val_batches(run):
        # Every rank runs every batch, since the forward is collective; padding is not counted.
        image_BCHW = batch.image_BCHW.to(run.world.device, run.dtype, non_blocking=True)
        label_B = batch.label_B.to(run.world.device, non_blocking=True)
        logits_BY = run.model(image_BCHW).float()
        is_real_B = label_B != NOT_COUNTED
        logits_BY, label_B = logits_BY[is_real_B], label_B[is_real_B]
        best_Bk = logits_BY.topk(min(5, logits_BY.shape[1]), dim=1).indices
        is_hit_Bk = best_Bk == label_B[:, None]
        loss = F.cross_entropy(logits_BY, label_B, reduction="sum")
        loads.append(moe.expert_load(run.model))
        sums_4 += torch.stack(
            [is_real_B.sum(), loss.double(), is_hit_Bk[:, :1].sum(), is_hit_Bk.sum()]
        ).double()
    run.model.train()
    dist.all_reduce(sums_4)
    count, loss_sum, top1, top5 = sums_4.tolist()
    if not math.isfinite(loss_sum):
        raise NonFiniteError(f"non-finite validation loss={loss_sum / count}")
    figures = {
        "val_images": count,
        "val_loss": loss_sum / count,
        "top1": 100 * top1 / count,
        "top5": 100 * top5 / count,
    }
    return figures | load_figures(loads)


def load_figures(loads: list[dict[str, Tensor]]) -> dict[str, float]:
    """Return the least and most loaded expert's percentage of the rows, by layer. Collective.

    `loads` are this rank's rows per expert by layer, one dict for each batch (padding included).
    """
    figures: dict[str, float] = {}
    for name in loads[0] if loads else ():
        rows_E = torch.stack([load[name] for load in loads]).sum(0)
        dist.all_reduce(rows_E)
        percent_E = 100 * rows_E.double() / rows_E.sum()
        figures[f"{LEAST_LOAD}{name}"], figures[f"{MOST_LOAD}{name}"] = (
            percent_E.min().item(),
            percent_E.max().item(),
        )
    return figures


def read_meter(run: Run, meter: Meter, *, step: int) -> dict[str, float]:
    """Return the figures since the last log line; the one host sync of the interval. Collective.

    Raises:
        NonFiniteError: On every rank, if the loss or the gradient norm is not finite.
    """
    sums_3 = torch.stack([meter.loss, meter.balance, meter.grad_norm])
    dist.all_reduce(sums_3)
    loss, balance, grad_norm = (sums_3 / meter.steps).tolist()
    train_s = time.perf_counter() - meter.started  # after the sync: all that was queued is done
    grad_norm /= run.world.size  # every rank has the same norm; the loss shares add up to a mean
    if not (math.isfinite(loss) and math.isfinite(grad_norm)):
        raise NonFiniteError(f"non-finite loss={loss} or grad_norm={grad_norm} by step {step}")
    images_per_s = meter.steps * run.global_batch / train_s
    peak = distributed.peak_tflops(run.world.device, run.config.training.peak_tflops)
    # Forward and backward: the backward pass has two products for each of the forward's.
    flops_per_s = 3 * run.flops_per_image * images_per_s / run.world.size
    figures = {
        "loss": loss,
        "grad_norm": grad_norm,
        "lr": run.optimizer.param_groups[0]["lr"],
        "images_per_s": images_per_s,
        "step_ms": 1000 * train_s / meter.steps,
        "data_ms": 1000 * meter.data_s / meter.steps,
        "memory_gib": distributed.memory_gib(run.world.device),
    }
    if run.config.model.moe.num_experts:
        figures["balance_loss"] = balance
    if peak is not None:
        figures["mfu_percent"] = 100 * flops_per_s / (peak * 1e12)
    return figures


def write_whole(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    staged = path.with_name(f".{path.name}.staging")
    staged.write_text(text)
    staged.replace(path)


def open_folder(run: Run) -> None:
    """Make the run folder and write what identifies the run. Rank 0 writes, the others wait."""
    if run.world.is_main:
        run.folder.mkdir(parents=True, exist_ok=True)
        write_whole(run.folder / "config.yaml", compose.to_yaml(run.config))
        write_whole(run.folder / "versions.json", json.dumps(versions(), indent=2) + "\n")
    dist.barrier()


def fit(run: Run, logbook: Logbook, *, start: Start) -> tuple[Path, dict[str, float]]:
    """Run the updates from `start` to the last; return the last checkpoint and its figures."""
    t = run.config.training
    batches = assemble.train_batches(run, start_step=start.step)
    meter, images, train_s = Meter.start(run.world.device), 0, 0.0
    folder = run.folder
    figures: dict[str, float] = {}
    for done in range(start.step + 1, t.steps + 1):
        train_step(run, batches, step=done - 1, meter=meter)
        logbook.advance()
        is_validating = done % t.val_interval == 0 or done == t.steps
        is_saving = done % (t.checkpoint.interval or t.val_interval) == 0 or done == t.steps
        if not (is_saving or is_validating or done % t.log_interval == 0):
            continue
        figures = read_meter(run, meter, step=done)
        logbook.metrics("train", step=done, values=figures)
        logbook.show(loss=f"{figures['loss']:.3f}")
        images += meter.steps * run.global_batch
        train_s += meter.steps * figures["step_ms"] / 1000
        figures["images_per_s"] = images / train_s  # of the whole run, in the checkpoint
        if is_validating:
            val = validate(run)
            figures |= val
            logbook.metrics("val", step=done, values=val)
        if is_saving:
            folder = save(run, logbook, step=done, figures=figures, rejected=start.rejected)
        meter = Meter.start(run.world.device)
    return folder, figures


def print_outcome(run: Run, folder: Path, *, figures: Mapping[str, float]) -> None:
    """Print the run's last table: how good, how fast, where it is, what to type next."""
    python = shlex.quote(os.path.relpath(sys.executable))
    rows = {
        "top-1": f"{figures['top1']:.2f} % of {figures['val_images']:.0f} validation images",
        "top-5": f"{figures['top5']:.2f} %",
        "validation loss": f"{figures['val_loss']:.4f}",
        "speed": f"{figures['images_per_s']:.1f} images/s on {run.world.size} rank(s)",
        "checkpoint": str(folder),
        "log": f"{run.folder}/log.jsonl",
        "next": f"{python} -m torch.distributed.checkpoint.format_utils dcp_to_torch "
        f"{shlex.quote(str(folder))} model.pt",
    }
    for name, least in figures.items():
        if name.startswith(LEAST_LOAD):
            layer = name.removeprefix(LEAST_LOAD)
            most = figures[f"{MOST_LOAD}{layer}"]
            even = 100 / run.config.model.moe.num_experts
            rows[f"experts of {layer}"] = f"{least:.1f} to {most:.1f} % of rows (even: {even:.1f})"
    print_table(f"training is complete: {run.config.training.steps} steps", rows)


def train(config: Config, world: World) -> None:
    """Start or resume the run that `config` describes and train it to its last step."""
    distributed.require_equal("config", compose.to_yaml(config))
    run, choices = assemble.prepare(config, world)
    start = resume(run)
    open_folder(run)
    t = config.training
    logbook = Logbook(
        run.folder,
        is_main=world.is_main,
        step=start.step,
        num_steps=t.steps,
        tensorboard=t.tensorboard,
        wandb_project=t.wandb.project,
        wandb_mode=t.wandb.mode,
        options=dataclasses.asdict(config),
    )
    try:
        logbook.event("run", **choices)
        for path, reason in start.rejected.items():
            logbook.event("rejected", folder=str(path), reason=reason)
        if start.found is not None:
            where = str(start.found.folder)
            logbook.event("resumed", step=start.step, folder=where, changed=start.changed)
        if start.found is not None and start.step == t.steps:
            folder, figures = start.found.folder, start.found.metrics
            if "top1" not in figures:  # saved between validations, and training.steps lowered to it
                figures |= validate(run)
        else:
            folder, figures = fit(run, logbook, start=start)
    finally:
        logbook.close()
    if world.is_main:
        print_outcome(run, folder, figures=figures)


def parse(argv: list[str]) -> Config:
    """Return the options of a command line; print and exit for --help and --print-config."""
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"Options, as name=value:\n\n{compose.options_table()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--config-name", "-cn", default="vit_tiny_patch8_64", metavar="NAME")
    parser.add_argument("--config-dir", "-cd", type=Path, default=compose.CONFIG_DIR)
    parser.add_argument("--debug", action="store_true", help="show the traceback of an error")
    parser.add_argument("--print-config", action="store_true", help="print all options and exit")
    parser.add_argument("overrides", nargs="*", metavar="name=value")
    arguments = parser.parse_intermixed_args(argv)
    config = compose.compose(
        arguments.config_name, arguments.overrides, config_dir=arguments.config_dir
    )
    if arguments.print_config:
        print(compose.to_yaml(config), end="")
        raise SystemExit(0)
    return config


def last_line(error: BaseException) -> str:
    """Return what went wrong in one line; a loader worker's error has its traceback before it."""
    lines = str(error).strip().splitlines()
    return lines[-1] if lines else type(error).__name__


def main(argv: list[str]) -> int:
    """Run the command line; return the exit code and print one line for what a user did wrong."""
    try:
        config = parse(argv)
        with distributed.process_group(
            config.device, timeout_s=config.distributed.timeout_s
        ) as world:
            train(config, world)
    except (ValueError, OSError, ImportError, NonFiniteError) as error:
        if "--debug" in argv:
            raise
        rank, _, _ = distributed.launch_facts()
        print(f"error (rank {rank}): {last_line(error)}", file=sys.stderr, flush=True)
        return EXIT_NON_FINITE if isinstance(error, NonFiniteError) else EXIT_OPTIONS
    except KeyboardInterrupt:
        print("stopped; the same command resumes from the last checkpoint", file=sys.stderr)
        return EXIT_INTERRUPTED
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    if code:
        # Not sys.exit: on CUDA the interpreter's end would wait for ranks that wait for this one.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
