"""Time from the launch of train.py to its first training step, against a plain timm script's.

    python -m benchmarks.launch [--rounds 4] [--device cuda] [name=value ...]

From the start of the process to the line that it prints after its first update: imports, options,
index of the images, model, shards, first batch from a loader with one worker, first step. Both
train the network of config/vit_tiny_patch8_64.yaml on the bundled images; launches take turns.
The import row is the floor: a process that imports torch and timm, as both do.
"""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch

from benchmarks import common
from benchmarks.clock import end_of, rounds
from images import roots
from options.command_line import Parser

RIVAL, OURS, FLOOR = "plain timm script", "train.py", "import torch, timm"
FIRST_STEP = "train step=1 "
DATA = common.ROOT / "data" / "tiny-imagenet-5"


def time_to_line(command: Sequence[str], line: str) -> float:
    """Return the milliseconds until a process has printed a line that begins so; then end it.

    Raises:
        ChildProcessError: It ended without.
    """
    environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
    start = time.perf_counter()
    with subprocess.Popen(
        command,
        cwd=common.ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    ) as process:
        assert process.stdout is not None, "it is a pipe"
        said = []
        try:
            for text in process.stdout:
                if text.startswith(line):
                    return 1000 * (time.perf_counter() - start)
                said.append(text)
        finally:
            # The loader's workers, too: they are in the process's own group.
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
    raise ChildProcessError(f"{' '.join(command)} ended before {line!r}: {''.join(said)[-2000:]}")


def commands(folder: Path, device: str, overrides: Sequence[str]) -> dict[str, list[str]]:
    """Return the command of each row."""
    python = [sys.executable, "-u"]
    options = [
        "--config-name=vit_tiny_patch8_64",
        f"device={device}",
        f"dataset.train.root={DATA}",
        f"training.checkpoint.path={folder / 'run'}",
        "training.log_interval=1",
        "training.tensorboard=false",
        *overrides,
    ]
    loaded = f"import torch, timm; torch.zeros(1, device={device!r}); print({FIRST_STEP!r})"
    script = ["-m", "benchmarks.plain_timm", "--root", str(DATA), "--device", device]
    return {
        RIVAL: [*python, *script],
        OURS: [*python, "train.py", *options],
        FLOOR: [*python, "-c", loaded],
    }


def measure(
    device: str, overrides: Sequence[str], planned: Iterable[bool]
) -> Iterator[dict[str, list[float]]]:
    """Yield after each round the milliseconds per launch of each row in the rounds so far.

    `planned` says of each round whether it is measured, or warms up the disk.
    """
    times: dict[str, list[float]] = {RIVAL: [], OURS: [], FLOOR: []}
    for number, is_measured in enumerate(planned):
        for name in list(times) if number % 2 else list(reversed(times)):
            # A folder of its own, or the second launch would resume.
            with tempfile.TemporaryDirectory() as folder:
                command = commands(Path(folder), device, overrides)[name]
                ms = time_to_line(command, FIRST_STEP)
            if is_measured:
                times[name].append(ms)
        if is_measured:
            yield times


def main(argv: list[str] | None = None) -> None:
    """Measure, write after each round what is needed to repeat it, and print a table."""
    parser = Parser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=4)
    parser.add_argument("--warm-up", type=int, default=1, help="rounds from cold disks, left out")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--limit-s", type=float, default=math.inf, help="fewer rounds after this")
    parser.add_argument("--out", type=Path, help="default: results/<date>-<device>-launch.json")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args(argv)
    roots.unpack_archive(DATA)  # the plain script does not
    planned = rounds(arguments.rounds, warm_up=arguments.warm_up, end_s=end_of(arguments.limit_s))
    for times in measure(arguments.device, arguments.overrides, planned):
        rows = common.summarise(times, rival=RIVAL)
        common.write(
            "launch",
            out=arguments.out,
            conditions={"overrides": arguments.overrides, "rounds": len(times[OURS])},
            rows=rows,
            device=torch.device(arguments.device),
        )
    common.print_rows(rows)


if __name__ == "__main__":
    main()
