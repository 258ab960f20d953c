"""Run the benchmarks of a kind of machine within a time limit and make the tables of their results.

    python -m benchmarks.run cpu [--limit-s 570] [--parts train_step loader] [--dry]
    python -m benchmarks.run gpu [--limit-s 570] [--parts step_gpu] [--match 'dense B16'] [--dry]

Each part is a program of its own (python -m benchmarks.<part>), one after the other, so that none
disturbs another. A part gets a share of the time and what parts before it left, and measures less
where that is short. Past it, it is ended, and what it had written by then is kept; that is said and
is no failure, as a part that is wrong is. All results go to one file,
benchmarks/results/<date>-<device>.json, from which benchmarks/tables.py makes the tables of
benchmarks/NOTES.md and docs/performance.md. --dry runs the same programs with tiny sizes, always on
a CPU, and keeps nothing but what --out names. Imports no torch: it only starts others.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

from benchmarks import tables
from options.command_line import Parser
from parallel.terminal import show_result, warn

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
LIMIT_S = 570
GRACE_S = 5  # for a part that is ended to clear up
# What is the same for all parts of a run stands once, above them.
SHARED = ("date", "commit", "is_dirty", "device", "versions")
TINY = ("model.vit.embed_dim=24", "model.vit.depth=2", "model.vit.num_heads=2")


@dataclass(frozen=True)
class Part:
    """A benchmark: its program, how much of the time it gets, what it is called with.

    measuring: the share of its time, from the start of its process, after which it begins nothing
    new; the rest is for what it has begun.
    """

    name: str
    module: str
    seconds: int
    arguments: tuple[str, ...] = ()
    dry: tuple[str, ...] = ()
    threads: int = 1
    measuring: float = 0.7


PARTS = {
    "cpu": (
        Part(
            "train_step",
            "train_step",
            100,
            dry=("--batches", "2", "--repeats", "2", "--threads", "1", *TINY),
            threads=2,
        ),
        Part("scaling", "scaling", 100, dry=("--rounds", "2", *TINY)),
        Part(
            "moe",
            "moe_cpu",
            80,
            ("--clock", "cpu", "--repeats", "12"),
            dry=("--shapes", "24,16,24", "--repeats", "2"),
        ),
        Part(
            "loader",
            "loader",
            110,
            ("--images", "512", "--rounds", "3"),
            dry=("--images", "64", "--epochs", "1", "--rounds", "2"),
        ),
        Part("checkpoint_save", "checkpoint_save", 60, dry=("--repeats", "2", *TINY)),
        Part("launch", "launch", 80, dry=("--rounds", "2", "--warm-up", "0")),
        Part(
            "optimizer",
            "optimizer",
            30,
            dry=("--repeats", "2", "--streamed-bytes", "1000000", *TINY),
        ),
    ),
    "gpu": (
        Part("step_gpu", "step_gpu", 330, dry=("--dry", "--repeats", "2"), measuring=0.8),
        Part("moe_gpu", "moe_gpu", 150, dry=("--dry", "--repeats", "2"), measuring=0.8),
        Part(
            "optimizer",
            "optimizer",
            25,
            ("--device", "cuda", "--config-name", "vit_base_patch16_224"),
            dry=("--repeats", "2", "--streamed-bytes", "1000000", *TINY),
        ),
        Part(
            "checkpoint_save",
            "checkpoint_save",
            60,
            ("--device", "cuda", "--config-name", "vit_base_patch16_224", "--repeats", "5"),
            dry=("--repeats", "2", *TINY),
        ),
        Part("fed", "fed", 80, dry=("--dry",)),
        Part(
            "launch",
            "launch",
            60,
            ("--device", "cuda", "--rounds", "3"),
            dry=("--rounds", "2", "--warm-up", "0"),
        ),
    ),
}
MATCHING = ("step_gpu",)


def choose(kind: str, names: list[str] | None) -> list[Part]:
    """Return the parts asked for, all if None.

    Raises:
        ValueError: There is no such part.
    """
    parts = {part.name: part for part in PARTS[kind]}
    for name in names or ():
        if name not in parts:
            raise ValueError(f"--parts {name}: no such part (there are: {', '.join(parts)})")
    return [part for part in parts.values() if names is None or part.name in names]


def command(
    part: Part, *, out: Path, budget_s: float, is_dry: bool, match: str | None
) -> list[str]:
    """Return the command line of a part."""
    words = [sys.executable, "-m", f"benchmarks.{part.module}", "--out", str(out)]
    words += part.dry if is_dry else part.arguments
    words += ["--limit-s", str(round(part.measuring * budget_s, 1))]
    if part.name == "checkpoint_save":  # what it writes goes with this run, even if it is ended
        words += ["--folder", str(out.parent)]
    if match is not None and part.name in MATCHING:
        words += ["--match", match]
    return words


class OutOfTimeError(Exception):
    """A part was ended when its time was."""


def finish(words: list[str], *, threads: int, budget_s: float) -> str | None:
    """Run a command to its end; return what went wrong, None if nothing.

    Raises:
        OutOfTimeError: Its time came first, and it was ended.
    """
    environment = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "PYTHONUNBUFFERED": "1",
        # Rivals of different sizes take turns: without it memory falls into unusable pieces.
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True",
    }
    with subprocess.Popen(words, cwd=ROOT, env=environment, start_new_session=True) as process:
        try:
            code = process.wait(max(budget_s - GRACE_S, budget_s / 2))
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGINT)  # so that it deletes its temporary files
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(GRACE_S)
            raise OutOfTimeError(f"ended after its {budget_s:.0f} s") from None
        finally:
            with contextlib.suppress(ProcessLookupError):  # none of its processes is left
                os.killpg(process.pid, signal.SIGKILL)
    return None if code == 0 else f"exit code {code}"


def rows_of(result: dict) -> int:
    """Return how many rows or cases a part has written."""
    return len(result.get("rows") or result.get("cases") or ())


def run_parts(
    parts: list[Part], folder: Path, *, limit_s: float, is_dry: bool, match: str | None
) -> tuple[dict[str, dict], dict[str, str], dict[str, str]]:
    """Return the results by part, what went wrong by part, and what there was no time for."""
    total, saved_s = sum(part.seconds for part in parts), 0.0
    results: dict[str, dict] = {}
    faults: dict[str, str] = {}
    unfinished: dict[str, str] = {}
    for part in parts:
        budget_s = max(0.0, limit_s * part.seconds / total + saved_s)
        out = folder / f"{part.name}.json"
        words = command(part, out=out, budget_s=budget_s, is_dry=is_dry, match=match)
        show_result("", f"{part.name}, at most {budget_s:.0f} s: {' '.join(words[1:])}")
        started, fault = time.monotonic(), None
        try:
            fault = finish(words, threads=1 if is_dry else part.threads, budget_s=budget_s)
        except OutOfTimeError as error:
            unfinished[part.name] = str(error)
        took_s = time.monotonic() - started
        saved_s = budget_s - took_s
        if out.exists():
            results[part.name] = json.loads(out.read_text("utf-8")) | {"took_s": round(took_s, 1)}
        elif fault is None and part.name not in unfinished:
            fault = "wrote no result"
        if fault is not None:
            faults[part.name] = fault
        if part.name in unfinished:
            unfinished[part.name] += f", with {rows_of(results.get(part.name, {}))} rows written"
    return results, faults, unfinished


def merge(
    results: dict[str, dict], faults: dict[str, str], unfinished: dict[str, str], *, kind: str
) -> dict[str, object]:
    """Return one result of all parts: what they share once, then the parts."""
    first = next(iter(results.values()), {})
    head = {key: first[key] for key in SHARED if key in first}
    parts = {
        name: {key: value for key, value in part.items() if head.get(key) != value}
        for name, part in results.items()
    }
    lists = {"faults": faults, "unfinished": unfinished}
    return {"benchmark": kind, **head, **lists, "parts": parts}


def free_path(device: str, *, date: str) -> Path:
    """Return the path of a new file of results: <date>-<device>.json, or -2, -3 and so on."""
    slug = "cpu" if device.startswith("cpu") else re.sub(r"[^a-z0-9]+", "-", device.lower())
    paths = (
        RESULTS / f"{date}-{slug}{number}.json" for number in ("", *(f"-{n}" for n in range(2, 99)))
    )
    return next(path for path in paths if not path.exists())


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Return the command line."""
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("kind", choices=tuple(PARTS))
    parser.add_argument("--parts", nargs="+", metavar="NAME", help="only these")
    parser.add_argument("--limit-s", type=float, default=LIMIT_S, help="for all parts together")
    parser.add_argument("--match", help="regex: only these groups of step_gpu")
    parser.add_argument("--dry", action="store_true", help="tiny sizes: do all parts run?")
    parser.add_argument("--commit", help="of these files, where git cannot be asked")
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/<date>-<device>.json")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run, write, regenerate the tables; return the number of parts that went wrong."""
    options = parse(argv)
    parts = choose(options.kind, options.parts)
    # On the disk of the results: where others are temporary, they may be memory.
    with tempfile.TemporaryDirectory(dir=ROOT, prefix=".bench-") as folder:
        results, faults, unfinished = run_parts(
            parts, Path(folder), limit_s=options.limit_s, is_dry=options.dry, match=options.match
        )
    for name, result in results.items():
        result["commit"] = options.commit or result["commit"]
        if why := faults.get(name) or unfinished.get(name):
            result["fault"] = why
    merged = merge(results, faults, unfinished, kind=options.kind) | {"is_dry": options.dry}
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    out = options.out
    if out is None and results and not options.dry:
        out = free_path(str(merged["device"]), date=date)
    if out is not None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(merged, indent=1) + "\n", "utf-8")
        show_result("", f"written to {out}")
    for name, what in [*faults.items(), *unfinished.items()]:
        warn(f"{name}: {what}")
    if not options.dry:
        tables.main([])
    return len(faults)


if __name__ == "__main__":
    raise SystemExit(main())
