"""Compare two ranks that train together with two processes that train apart, on as many cores.

    python -m benchmarks.scaling [--configs vit_tiny_patch8_64 ...] [--rounds 12] [name=value ...]

One thread a process, the same images per process. What two cores allow is two processes of one rank
at the same time, which share nothing but the machine; the ways take turns. Rows:
  2 processes apart   the ideal: images/s of both together
  2 ranks             one job over gloo, weights and optimizer sharded; experts shared out (ep=2)
  1 process           alone on the machine: what one core does undisturbed
"""

from __future__ import annotations

import math
import os
import statistics
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing

from benchmarks import clock, common, steps
from benchmarks.train_step import OVERRIDES
from options import compose
from options.command_line import Parser
from parallel import distributed, launch
from training import prepare

IDEAL, OURS, ALONE = "2 processes apart", "2 ranks", "1 process"
CONFIGS = ["vit_tiny_patch8_64", "vit_moe_tiny_patch8_64"]
STEPS, WARM_UP, RANKS = 2, 1, 2
START_S = 300


@dataclass(frozen=True)
class Place:
    """A process: which rank of how many, and which images it sees."""

    rank: int
    size: int
    seed: int


def serve(
    place: Place, store: str, config_name: str, overrides: list[str], pipe: Connection
) -> None:
    """Send the first loss, then make as many steps as is asked for and send their seconds."""
    torch.set_num_threads(1)
    launch.keep_freed_memory()  # as a run does
    config = compose.compose(config_name, overrides)
    shared = dist.FileStore(store, place.size)  # type: ignore[attr-defined]
    dist.init_process_group("gloo", store=shared, rank=place.rank, world_size=place.size)
    world = distributed.World(place.rank, place.size, place.rank, torch.device("cpu"))
    run, _ = prepare.prepare(config, world)
    step = steps.sharded_step(run, steps.make_batch(config, world.device, seed=place.seed))
    pipe.send(step().item() * place.size)
    while count := pipe.recv():
        start = time.perf_counter()
        for _ in range(count):
            step()
        pipe.send(time.perf_counter() - start)
    dist.destroy_process_group()


def receive(pipe: Connection) -> float:
    """Return a process's next number.

    Raises:
        TimeoutError: It sends none.
        EOFError: It has ended.
    """
    if not pipe.poll(START_S):
        raise TimeoutError(f"a process of the benchmark is silent for {START_S} s")
    return pipe.recv()


@contextmanager
def processes(places: list[Place], config: str, overrides: list[str]) -> Iterator[list[Connection]]:
    """Start a process per place and yield how to talk to each; they end with the block."""
    context, pipes, started = multiprocessing.get_context("spawn"), [], []
    with tempfile.TemporaryDirectory() as folder:
        for number, place in enumerate(places):
            # Ranks of one job meet in one file, each process alone in its own.
            store = Path(folder) / ("job" if place.size > 1 else f"alone{number}")
            ours, theirs = context.Pipe()
            work = (place, str(store), config, overrides, theirs)
            process = context.Process(target=serve, args=work, daemon=True)
            process.start()
            theirs.close()
            pipes.append(ours)
            started.append(process)
        try:
            yield pipes
            for pipe in pipes:
                pipe.send(0)
        except BaseException:
            for process in started:
                process.kill()
            raise
        finally:
            for process in started:
                process.join()


def images_per_s(pipes: list[Connection], *, batch: int) -> float:
    """Return the rate of processes that work at the same time."""
    for pipe in pipes:
        pipe.send(STEPS)
    return sum(batch * STEPS / receive(pipe) for pipe in pipes)


def check(first: list[float]) -> None:
    """Compare each rank's first loss with that of the process that sees the same images.

    Raises:
        ValueError: They are not the same.
    """
    for rank in range(RANKS):
        if why := steps.loss_fault(first[rank], first[RANKS + rank], dtype=torch.float32):
            raise ValueError(f"{OURS}, rank {rank}: {why} of the process apart")


def measure(
    config_name: str, overrides: list[str], *, rounds: int, end_s: float
) -> list[common.Row]:
    """Return a row per way to use two cores."""
    batch = compose.compose(config_name, overrides).dataset.train.batch_size
    together = [Place(rank, RANKS, seed=rank) for rank in range(RANKS)]
    apart = [Place(0, 1, seed=rank) for rank in range(RANKS)]
    rates: dict[str, list[float]] = {IDEAL: [], OURS: [], ALONE: []}
    with processes([*together, *apart], config_name, overrides) as pipes:
        check([receive(pipe) for pipe in pipes])
        ways = {IDEAL: pipes[RANKS:], OURS: pipes[:RANKS], ALONE: pipes[RANKS : RANKS + 1]}
        planned = clock.rounds(rounds, warm_up=WARM_UP, end_s=end_s)
        for number, is_measured in enumerate(planned):
            for name in list(ways) if number % 2 else list(reversed(ways)):
                rate = images_per_s(ways[name], batch=batch)
                if is_measured:
                    rates[name].append(rate)
    return [
        {
            "config": config_name,
            "loop": name,
            "images_per_s": round(statistics.median(values), 2),
            "rounds": len(values),
            "of_ideal": common.ratio(values, rates[IDEAL]),
        }
        for name, values in rates.items()
    ]


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table and write it, after each config, with what is needed to repeat it."""
    parser = Parser(description=__doc__)
    parser.add_argument("--configs", nargs="+", default=CONFIGS)
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--limit-s", type=float, default=math.inf, help="fewer rounds after this")
    parser.add_argument("--out", type=Path, help="default: results/<date>-cpu-scaling.json")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args(argv)
    # For the processes, which read it when they import torch.
    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    launch.keep_freed_memory()  # as a run does
    share_s, rows = arguments.limit_s / len(arguments.configs), []
    conditions = {"overrides": arguments.overrides, "steps_per_round": STEPS}
    for number, config in enumerate(arguments.configs, 1):
        overrides = [*OVERRIDES, *arguments.overrides]
        end_s = clock.end_of(number * share_s)
        rows += measure(config, overrides, rounds=arguments.rounds, end_s=end_s)
        common.print_rows([row for row in rows if row["config"] == config])
        common.write("scaling", out=arguments.out, conditions=conditions, rows=rows)


if __name__ == "__main__":
    main()
