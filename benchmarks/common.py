"""What the benchmarks make of their times: ratios within a round, a table, results as JSON."""

from __future__ import annotations

import datetime
import json
import statistics
import subprocess
from collections.abc import Mapping
from pathlib import Path

import torch

from logbook import versions

ROOT = Path(__file__).resolve().parent.parent
Row = dict[str, float | str]


def ratio(times: list[float], rival_times: list[float]) -> float:
    """Return the median over rounds of times / rival_times."""
    pairs = zip(times, rival_times, strict=True)
    return round(statistics.median(ours / theirs for ours, theirs in pairs), 3)


def summarise(times: dict[str, list[float]], *, rival: str) -> list[Row]:
    """Return a row per loop: median and quartiles in ms, and the median ratio to the rival's."""
    rows: list[Row] = []
    for name, values in times.items():
        low, median, high = statistics.quantiles(values, n=4)
        spread: Row = {"median_ms": round(median, 2), "iqr_ms": round(high - low, 2)}
        rows.append({"loop": name, **spread, "ratio": ratio(values, times[rival])})
    return rows


def print_rows(rows: list[Row]) -> None:
    """Print a line per row."""
    for row in rows:
        print("  ".join(f"{key}={value}" for key, value in row.items()))


def _commit() -> str:
    command = ["git", "rev-parse", "--short", "HEAD"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return done.stdout.strip()


def write(
    name: str, *, out: Path | None, conditions: Mapping[str, object], rows: list[Row]
) -> None:
    """Write rows and what is needed to repeat them; out=None: results/<date>-cpu-<name>.json."""
    date = datetime.datetime.now(tz=datetime.UTC).date().isoformat()
    result = {
        "benchmark": name,
        "date": date,
        "commit": _commit(),
        "device": f"cpu, {torch.get_num_threads()} threads",
        **conditions,
        "versions": versions(),
        "rows": rows,
    }
    out = out or ROOT / "benchmarks" / "results" / f"{date}-cpu-{name}.json"
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(result, indent=2) + "\n")
    print(f"written to {out}")
