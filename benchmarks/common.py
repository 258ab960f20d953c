"""What the benchmarks make of their times: ratios within a round, a table, results as JSON.

A result is one JSON object: what was measured (`benchmark`), when, at which commit, on what, with
which versions and conditions, and `rows`. benchmarks/run.py puts the results of a run into one
file, benchmarks/tables.py makes tables of them.
"""

from __future__ import annotations

import datetime
import json
import statistics
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from parallel.terminal import show_result
from training.logbook import versions

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
Row = dict[str, float | str]


def ratio(times: Sequence[float], rival_times: Sequence[float]) -> float:
    """Return the median over rounds of times / rival_times."""
    pairs = zip(times, rival_times, strict=True)
    return round(statistics.median(ours / theirs for ours, theirs in pairs), 3)


def spread(times: Sequence[float], *, digits: int = 2) -> Row:
    """Return median and interquartile range of times in ms; one time alone has no range."""
    if len(times) == 1:
        return {"median_ms": round(times[0], digits)}
    low, median, high = statistics.quantiles(times, n=4)
    return {"median_ms": round(median, digits), "iqr_ms": round(high - low, digits)}


def summarise(times: Mapping[str, Sequence[float]], *, rival: str) -> list[Row]:
    """Return a row per loop: median and quartiles in ms, and the median ratio to the rival's."""
    return [
        {"loop": name, **spread(values), "ratio": ratio(values, times[rival])}
        for name, values in times.items()
    ]


def print_rows(rows: Sequence[Mapping[str, object]]) -> None:
    """Print a line per row."""
    for row in rows:
        show_result("  ".join(f"{key}={value}" for key, value in row.items()))


def _git(*arguments: str) -> str | None:
    """Return what git says of this checkout; None where it is none."""
    command = ["git", *arguments]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    return done.stdout.strip() if done.returncode == 0 else None


def cpu_model() -> str:
    """Return the processor's name."""
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text("utf-8").splitlines() if facts.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else "cpu"


def device_text(device: torch.device) -> str:
    """Return the device's name; of a CPU also the threads of this process."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"cpu, {torch.get_num_threads()} threads, {cpu_model()}"


def stamp(device: torch.device) -> dict[str, object]:
    """Return when, at which commit, on what and with which versions something was measured.

    is_dirty: there were changes that are not in the commit, results and docs aside.
    """
    changed = _git("status", "--porcelain", "--", ".", ":!benchmarks/results", ":!docs")
    return {
        "date": datetime.datetime.now(tz=datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "--short", "HEAD") or "not a checkout",
        "is_dirty": None if changed is None else bool(changed),
        "device": device_text(device),
        "versions": versions(),
    }


def save(path: Path, result: Mapping[str, object]) -> None:
    """Write a result, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    staging = path.with_name(f".{path.name}.staging")
    staging.write_text(json.dumps(result, indent=1, allow_nan=False) + "\n", "utf-8")
    staging.replace(path)


def write(
    name: str,
    *,
    out: Path | None,
    conditions: Mapping[str, object],
    rows: Sequence[Row],
    device: torch.device | None = None,
) -> None:
    """Write rows and what is needed to repeat them; out=None: results/<date>-<device>-<name>.json.

    The device is the CPU if it is not given.
    """
    device = device or torch.device("cpu")
    head = stamp(device)
    kind = "gpu" if device.type == "cuda" else "cpu"
    result = {"benchmark": name, **head, **conditions, "rows": list(rows)}
    out = out or RESULTS / f"{str(head['date'])[:10]}-{kind}-{name}.json"
    save(out, result)
    show_result(f"written to {out}")
