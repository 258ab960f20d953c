"""Time one training step of our loop on one CPU rank against plain loops and FSDP2.

    python -m benchmarks.train_step [--batches 32 2] [--repeats 30] [--threads 2] [name=value ...]

Same network, weights, images, labels, optimizer and clipping; the steps alternate in one process,
so that a noisy machine disturbs all alike, and the figure is a ratio. Rows:
  plain timm          timm's VisionTransformer, F.cross_entropy, clip_grad_norm_, fused AdamW
  plain timm, default the same with the optimizer's default implementation
  ours, plain         our VisionTransformer in that plain loop: what the network itself costs
  ours, FSDP2         that under torch's fully_shard, a block a unit
  moevit              train.train_step: our network, Megatron-FSDP, the whole step
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path

import torch

from benchmarks import common, steps
from benchmarks.clock import end_of, interleave, wall_clock
from benchmarks.steps import Step
from options import compose
from options.command_line import Parser
from options.schema import Config
from parallel import distributed
from training import prepare

RIVAL = "plain timm"
# Options whose effect on the two loops differs or that the plain loop does not have.
OVERRIDES = ["training.tensorboard=false", "training.label_smoothing=0.1", "dataset.num_workers=0"]


def build_steps(config: Config, world: distributed.World) -> dict[str, Step]:
    """Return the step of each row; all start from the same weights and see the same batch."""
    run, _ = prepare.prepare(config, world)
    device, batch = world.device, steps.make_batch(config, world.device)
    timm_a, timm_b = (steps.timm_vit(config, device) for _ in range(2))
    ours_a, ours_b = (steps.our_vit(config, device) for _ in range(2))
    return {
        RIVAL: steps.plain_step(timm_a, config, batch),
        "plain timm, default": steps.plain_step(timm_b, config, batch, fused=None),
        "ours, plain": steps.plain_step(ours_a, config, batch),
        "ours, FSDP2": steps.fsdp2_step(ours_b, config, batch, dtype=torch.float32),
        "moevit": steps.sharded_step(run, batch),
    }


def check(contenders: Mapping[str, Step]) -> None:
    """Make a step of each and refuse to time loops that compute something else.

    Raises:
        ValueError: The first loss of a loop is not the rival's.
    """
    first = {name: step().item() for name, step in contenders.items()}
    steps.check_losses(first, rival=RIVAL, dtype=torch.float32)


def measure(config: Config, *, repeats: int, end_s: float) -> list[common.Row]:
    """Return a row per loop for the batch of `config`."""
    batch = config.dataset.train.batch_size
    with distributed.process_group("cpu", timeout_s=600) as world:
        contenders = build_steps(config, world)
        check(contenders)
        times = interleave(contenders, wall_clock, repeats=repeats, end_s=end_s)
    rounds = len(times[RIVAL])
    rows = common.summarise(times, rival=RIVAL)
    return [{"batch": batch, "rounds": rounds, **row} for row in rows]


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table and write it, after each batch, with what is needed to repeat it."""
    parser = Parser(description=__doc__)
    parser.add_argument("--config-name", default="vit_tiny_patch8_64")
    parser.add_argument("--batches", type=int, nargs="+", default=[32, 2])
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--limit-s", type=float, default=math.inf, help="fewer rounds after this")
    parser.add_argument("--out", type=Path, help="default: results/<date>-cpu-train_step.json")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args(argv)
    torch.set_num_threads(arguments.threads)
    share_s = arguments.limit_s / len(arguments.batches)
    conditions = {"config": arguments.config_name, "overrides": arguments.overrides}
    rows = []
    for number, batch in enumerate(arguments.batches, 1):
        overrides = [*OVERRIDES, *arguments.overrides, f"dataset.train.batch_size={batch}"]
        config = compose.compose(arguments.config_name, overrides)
        rows += measure(config, repeats=arguments.repeats, end_s=end_of(number * share_s))
        common.print_rows([row for row in rows if row["batch"] == batch])
        common.write("train_step", out=arguments.out, conditions=conditions, rows=rows)


if __name__ == "__main__":
    main()
