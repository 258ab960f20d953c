"""Time a training step with compiled blocks against the same step without, on one CPU rank.

    python -m benchmarks.compiled [--repeats 20] [--threads 2] [name=value ...]
    python -m benchmarks.compiled --clock cpu --threads 1      # on a machine with other work to do

Same weights, images and labels; losses are compared first, and the steps alternate in one process.
The first step of the compiled run is timed by itself: what compiling costs, from an empty cache
with TORCHINDUCTOR_FORCE_DISABLE_CACHES=1. Validation compiles once more per size of batch.
"""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks import common, steps
from benchmarks.clock import Clock, interleave, wall_clock
from benchmarks.moe_cpu import CLOCKS
from benchmarks.train_step import OVERRIDES
from options import compose
from options.command_line import Parser
from parallel import distributed
from training import prepare

EAGER, COMPILED = "eager", "compiled"
CONFIGS = ("vit_tiny_patch8_64", "vit_moe_tiny_patch8_64")


def measure(name: str, overrides: list[str], *, repeats: int, clock: Clock) -> list[common.Row]:
    """Return a row for the eager step of a config and one for the compiled step."""
    found: dict[str, steps.Step] = {}
    first: dict[str, float] = {}
    first_s: dict[str, float] = {}
    with distributed.process_group("cpu", timeout_s=600) as world:
        for kind in (EAGER, COMPILED):
            is_compiled = str(kind == COMPILED).lower()
            options = [*OVERRIDES, *overrides, f"model.compile={is_compiled}"]
            config = compose.compose(name, options)
            run, _ = prepare.prepare(config, world)
            found[kind] = steps.sharded_step(run, steps.make_batch(config, world.device))
            losses: list[float] = []
            step = found[kind]
            first_s[kind] = wall_clock(lambda: losses.append(step().item())) / 1000  # noqa: B023
            first[kind] = losses[0]
        steps.check_losses(first, rival=EAGER, dtype=torch.float32)
        times = interleave(found, clock, repeats=repeats)
    rows = common.summarise(times, rival=EAGER)
    batch = config.dataset.train.batch_size
    facts: common.Row = {"config": name, "batch": batch}
    return [{**facts, "first_step_s": round(first_s[str(row["loop"])], 1), **row} for row in rows]


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table and write it with what is needed to repeat it."""
    parser = Parser(description=__doc__)
    parser.add_argument("--config-names", nargs="+", default=CONFIGS)
    parser.add_argument("--repeats", type=int, default=20)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--clock", choices=CLOCKS, default="wall", help="cpu: of this process")
    parser.add_argument("--out", type=Path, help="default: results/<date>-cpu-compiled.json")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.clock == "cpu" and arguments.threads > 1:
        parser.error("--clock cpu: needs --threads 1, waiting threads count as busy")
    torch.set_num_threads(arguments.threads)
    rows, clock = [], CLOCKS[arguments.clock]
    for name in arguments.config_names:
        rows += measure(name, arguments.overrides, repeats=arguments.repeats, clock=clock)
    common.print_rows(rows)
    conditions = {
        "overrides": arguments.overrides,
        "repeats": arguments.repeats,
        "clock": arguments.clock,
    }
    common.write("compiled", out=arguments.out, conditions=conditions, rows=rows)


if __name__ == "__main__":
    main()
