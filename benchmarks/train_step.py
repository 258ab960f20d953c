"""Time one training step of our loop on one rank against a plain timm + PyTorch loop.

    python -m benchmarks.train_step [--repeats 30] [--threads 2] [name=value ...]

Same network, weights, images, labels, optimizer and clipping; the steps alternate in one process,
so that a noisy machine disturbs both alike, and the figure is a ratio. Rows:
  plain timm        timm's VisionTransformer, F.cross_entropy, clip_grad_norm_, fused AdamW
  plain timm, loop  the same with the optimizer's default implementation
  plain ours        our VisionTransformer in that plain loop: what the network itself costs
  moevit            train.train_step: our network, Megatron-FSDP (ZeRO 3), the whole step
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
from collections.abc import Callable
from pathlib import Path

import torch
from timm.models import VisionTransformer as TimmViT
from torch import Tensor, nn

import assemble
import compose
import distributed
import losses
import models
import optim
import train
from benchmarks import common
from benchmarks.clock import Run, interleave, wall_clock
from imagenet_dataset import Batch
from schema import Config

RIVAL = "plain timm"
# Options whose effect on the two loops differs or that the plain loop does not have.
OVERRIDES = ["training.tensorboard=false", "training.label_smoothing=0.1", "dataset.num_workers=0"]


def plain_step(
    model: nn.Module, config: Config, batch: Batch, *, fused: bool | None
) -> Callable[[], Tensor]:
    """Return a function that makes one training step the way a plain script does."""
    o, t = config.optimizer, config.training
    groups = optim.parameter_groups(model.named_parameters(), weight_decay=o.weight_decay)
    optimizer = torch.optim.AdamW(
        [dict(group) for group in groups], betas=(o.betas[0], o.betas[1]), eps=o.eps, fused=fused
    )
    optim.set_lr(optimizer, o.lr)

    def step() -> Tensor:
        optimizer.zero_grad()
        loss = losses.smoothed_loss(
            model(batch.image_BCHW), batch.label_B, smoothing=t.label_smoothing
        )
        loss.backward()
        if o.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm)
        optimizer.step()
        return loss.detach()

    return step


def sharded_step(run: assemble.Run, batch: Batch) -> Callable[[], Tensor]:
    """Return a function that makes one step of our loop."""
    numbers = itertools.count()

    def step() -> Tensor:
        meter = train.Meter.start(run.world.device)
        train.train_step(run, iter([batch]), step=next(numbers), meter=meter)
        return meter.loss

    return step


def build_steps(config: Config, world: distributed.World) -> dict[str, Callable[[], Tensor]]:
    """Return the step of each row; all start from the same weights and see the same batch."""
    run, _ = assemble.prepare(config, world)
    vit = config.model.vit
    generator = torch.Generator().manual_seed(0)
    size = config.dataset.train.batch_size
    batch = Batch(
        torch.randn(size, 3, *models.height_width(vit.img_size), generator=generator),
        torch.randint(0, vit.num_classes, (size,), generator=generator),
        torch.arange(size),
    )
    options = dataclasses.asdict(vit)
    del options["grad_checkpointing"]  # a method of timm's model, off here
    plain = [TimmViT(**options) for _ in range(2)]
    ours = models.build_model(config, backend="torch", on_meta=False)
    for model in plain:
        model.load_state_dict(ours.state_dict())
    return {
        RIVAL: plain_step(plain[0], config, batch, fused=True),
        "plain timm, loop": plain_step(plain[1], config, batch, fused=None),
        "plain ours": plain_step(ours, config, batch, fused=True),
        "moevit": sharded_step(run, batch),
    }


def check(steps: dict[str, Callable[[], Tensor]]) -> None:
    """Make a step of each and refuse to time loops that compute something else.

    Raises:
        ValueError: The first loss of a loop is not the rival's.
    """
    losses = {name: step().item() for name, step in steps.items()}
    reference = losses[RIVAL]
    for name, loss in losses.items():
        if abs(loss - reference) > 1e-4 * abs(reference):
            raise ValueError(f"{name}: first loss {loss}, {RIVAL} has {reference}")


def main() -> None:
    """Measure, print a table and write it with what is needed to repeat it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--config-name", default="vit_tiny_patch8_64")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", type=Path, help="default: results/<date>-cpu-train_step.json")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args()
    torch.set_num_threads(arguments.threads)
    config = compose.compose(arguments.config_name, [*OVERRIDES, *arguments.overrides])
    with distributed.process_group("cpu", timeout_s=600) as world:
        steps = build_steps(config, world)
        check(steps)
        runs: dict[str, Run] = {**steps}
        times = interleave(runs, wall_clock, repeats=arguments.repeats)
    rows = common.summarise(times, rival=RIVAL)
    common.print_rows(rows)
    conditions = {
        "config": arguments.config_name,
        "overrides": arguments.overrides,
        "batch": config.dataset.train.batch_size,
        "repeats": arguments.repeats,
    }
    common.write("train_step", out=arguments.out, conditions=conditions, rows=rows)


if __name__ == "__main__":
    main()
