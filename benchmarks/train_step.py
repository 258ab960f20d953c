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
import datetime
import itertools
import json
import statistics
import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import torch
from timm.models import VisionTransformer as TimmViT
from torch import Tensor, nn

import assemble
import compose
import distributed
import optim
import train
from imagenet_dataset import Batch
from logbook import versions
from schema import Config

ROOT = Path(__file__).resolve().parent.parent
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
        loss = train.smoothed_loss(
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
        torch.randn(size, 3, *assemble.height_width(vit.img_size), generator=generator),
        torch.randint(0, vit.num_classes, (size,), generator=generator),
        torch.arange(size),
    )
    options = dataclasses.asdict(vit)
    del options["grad_checkpointing"]  # a method of timm's model, off here
    plain = [TimmViT(**options) for _ in range(2)]
    ours = assemble.build_model(config, backend="torch", on_meta=False)
    for model in plain:
        model.load_state_dict(ours.state_dict())
    return {
        RIVAL: plain_step(plain[0], config, batch, fused=True),
        "plain timm, loop": plain_step(plain[1], config, batch, fused=None),
        "plain ours": plain_step(ours, config, batch, fused=True),
        "moevit": sharded_step(run, batch),
    }


def measure(steps: dict[str, Callable[[], Tensor]], *, repeats: int) -> dict[str, list[float]]:
    """Return milliseconds per step of each row; rounds alternate forwards and backwards."""
    losses = {name: step().item() for name, step in steps.items()}
    reference = losses[RIVAL]
    for name, loss in losses.items():  # never time what computes something else
        if abs(loss - reference) > 1e-4 * abs(reference):
            raise ValueError(f"{name}: first loss {loss}, {RIVAL} has {reference}")
    times: dict[str, list[float]] = {name: [] for name in steps}
    for number in range(repeats + 2):
        order = list(steps) if number % 2 else list(reversed(steps))
        for name in order:
            start = time.perf_counter()
            steps[name]()
            if number >= 2:  # two rounds to warm up
                times[name].append(1000 * (time.perf_counter() - start))
    return times


def summarise(times: dict[str, list[float]]) -> list[dict[str, float | str]]:
    """Return a row per loop: median and quartiles in ms, and the median ratio to the rival's."""
    rows: list[dict[str, float | str]] = []
    for name, values in times.items():
        ratios = [ours / theirs for ours, theirs in zip(values, times[RIVAL], strict=True)]
        low, median, high = statistics.quantiles(values, n=4)
        rows.append(
            {
                "loop": name,
                "median_ms": round(median, 2),
                "iqr_ms": round(high - low, 2),
                "ratio": round(statistics.median(ratios), 3),
            }
        )
    return rows


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
        times = measure(build_steps(config, world), repeats=arguments.repeats)
    rows = summarise(times)
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    result = {
        "benchmark": "train_step",
        "date": date,
        "commit": commit,
        "device": f"cpu, {arguments.threads} threads",
        "config": arguments.config_name,
        "overrides": arguments.overrides,
        "batch": config.dataset.train.batch_size,
        "repeats": arguments.repeats,
        "versions": versions(),
        "rows": rows,
    }
    out = arguments.out or ROOT / "benchmarks" / "results" / f"{date}-cpu-train_step.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {out}")


if __name__ == "__main__":
    main()
