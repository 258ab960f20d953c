"""Make the tables of benchmarks/NOTES.md and docs/performance.md from the newest results.

    python -m benchmarks.tables

    benchmarks/results/*.json -> parts by date -> rows -> Markdown between
    <!-- table: name --> and <!-- end -->

A table says which command measured it, when, where and at which commit, or that nothing has been
measured. Text outside the marks is written by hand. Groups of step_gpu and moe_gpu may come from
several runs: the newest run of each group counts. Imports no torch.

One idea: each table is a function from results to Markdown.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

from options.command_line import Parser
from parallel.terminal import show_result

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
DOCUMENTS = (ROOT / "benchmarks" / "NOTES.md", ROOT / "docs" / "performance.md")
MARKS = re.compile(r"(<!-- table: (?P<name>[\w ]+) -->\n).*?(<!-- end -->)", flags=re.DOTALL)
NOT_MEASURED = "not measured yet"
# Packages whose versions decide the figures.
PACKAGES = ("torch", "triton", "timm", "megatron-fsdp", "transformer-engine")

Part = dict[str, Any]
Row = dict[str, Any]
# heading, and how a row's cell is made: a key, or a function of the row
Column = tuple[str, str | Callable[[Row], object]]


def parts_of(path: Path) -> list[Part]:
    """Return the results in a file: of one benchmark, or of several in one run."""
    whole = json.loads(path.read_text("utf-8"))
    if "parts" not in whole:
        return [whole]
    lists = ("parts", "faults", "unfinished")
    head = {key: value for key, value in whole.items() if key not in lists}
    return [head | {"benchmark": name} | part for name, part in whole["parts"].items()]


def read_parts(folder: Path) -> list[Part]:
    """Return all results in a folder, oldest first; dry runs measure nothing."""
    found = [
        (part["date"], path.name, part) for path in folder.glob("*.json") for part in parts_of(path)
    ]
    return [part for _, _, part in sorted(found, key=lambda item: item[:2]) if not is_dry(part)]


def is_dry(part: Part) -> bool:
    """Return whether a result is of a run that only shows that the benchmark runs."""
    return bool(part.get("is_dry"))


def is_gpu(part: Part) -> bool:
    """Return whether a result is a GPU's."""
    return not str(part["device"]).startswith("cpu")


def select(parts: Iterable[Part], name: str, *, on_gpu: bool) -> list[Part]:
    """Return the results of a benchmark on one kind of device, oldest first."""
    return [part for part in parts if part["benchmark"] == name and is_gpu(part) == on_gpu]


def source(part: Part) -> str:
    """Return the line that says where figures are from."""
    changed = ", with changes" if part.get("is_dirty") else ""
    installed = part.get("versions", {})
    versions = ", ".join(
        f"{name} {installed[name]}"
        for name in PACKAGES
        if installed.get(name) not in (None, "not installed")
    )
    where = part["device"]
    return f"{str(part['date'])[:10]}, commit {part['commit']}{changed}; {where}; {versions}."


def cell(value: object) -> str:
    """Return a value as it stands in a table."""
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int | float) else str(value)


def table(rows: Sequence[Row], columns: Sequence[Column]) -> str:
    """Return a Markdown table; columns of text stand to the left, others to the right."""
    made = [
        [row.get(key) if isinstance(key, str) else key(row) for _, key in columns] for row in rows
    ]
    texts = [any(isinstance(value, str) for value in values) for values in zip(*made, strict=True)]
    lines = ["| " + " | ".join(heading for heading, _ in columns) + " |"]
    lines.append("|" + "".join("---|" if is_text else "--:|" for is_text in texts))
    lines += ["| " + " | ".join(map(cell, values)) + " |" for values in made]
    return "\n".join(lines)


def unmeasured(columns: Sequence[Column]) -> str:
    """Return the table of a benchmark without results."""
    empty: list[Row] = [{}]
    first, *rest = [heading for heading, _ in columns]
    return table(empty, [(first, lambda _: NOT_MEASURED), *((name, "") for name in rest)])


def missing(part: Part) -> str:
    """Return what a benchmark could not do, for below its table."""
    lines = [f"{name}: {reason}" for name, reason in part.get("unavailable", {}).items()]
    lines += [f"no time for: {', '.join(part['cut'])}"] if part.get("cut") else []
    lines += [f"the run: {part['fault']}"] if part.get("fault") else []
    return "\n\n" + "; ".join(lines) + "." if lines else ""


def simple(
    name: str, columns: Sequence[Column], *, on_gpu: bool = False, note: Callable[[Part], str]
) -> Callable[[list[Part]], str]:
    """Return the maker of a table with a line per row of the newest result."""

    def make(parts: list[Part]) -> str:
        found = select(parts, name, on_gpu=on_gpu)
        if not found:
            return unmeasured(columns)
        part = found[-1]
        return f"{note(part)} {source(part)}\n\n{table(part['rows'], columns)}{missing(part)}"

    return make


def shape_of(row: Row) -> str:
    """Return the heading of an MoE layer's column: tokens x width, hidden width of an expert."""
    return f"{row['tokens']} x {row['dim']}, {row['hidden']}"


def moe_cell(row: Row) -> str:
    """Return a layer's time over the dense one's, and a rival's over ours."""
    ratio = f"{row['ratio']:.2f}"
    if row["loop"] == "dense":
        return f"1 ({row['median_ms']:.1f} ms)"
    return ratio if row["loop"] == "moevit" else f"{ratio} / {row['of_ours']:.2f}"


def moe_table(parts: list[Part]) -> str:
    """Return the table of the MoE layer on a CPU: a line per layer, a column per shape."""
    found = select(parts, "moe", on_gpu=False)
    if not found:
        return unmeasured([("layer", ""), ("over dense / over ours", "")])
    part = found[-1]
    shapes = list(dict.fromkeys(map(shape_of, part["rows"])))
    lines: dict[str, Row] = {}
    for row in part["rows"]:
        lines.setdefault(row["loop"], {"loop": row["loop"]})[shape_of(row)] = moe_cell(row)
    columns: list[Column] = [("layer", "loop"), *((shape, shape) for shape in shapes)]
    head = f"`python -m benchmarks.moe_cpu --clock {part['clock']}`, {part['repeats']} rounds,"
    return f"{head} {source(part)}\n\n{table(list(lines.values()), columns)}"


def newest_groups(parts: list[Part], *, kind: str) -> tuple[list[Row], list[Part]]:
    """Return step_gpu's rows of one kind of group, each group's newest, and where they are from."""
    groups: dict[str, tuple[list[Row], Part]] = {}
    for part in select(parts, "step_gpu", on_gpu=True):
        labels = {row["group"] for row in part["rows"] if row["group"].split()[0] == kind}
        for label in labels:
            groups[label] = ([row for row in part["rows"] if row["group"] == label], part)
    rows = [row for label in sorted(groups) for row in groups[label][0]]
    used = [part for _, part in groups.values()]
    return rows, [part for number, part in enumerate(used) if part not in used[:number]]


def best_batches(rows: list[Row]) -> list[Row]:
    """Return of each network and loop the batch with the most images/s; faults as they are."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row["group"].split()[1], row["loop"])
        if row.get("images_per_s", 0) >= best.get(key, {}).get("images_per_s", 0):
            best[key] = row
    return [best[key] for key in sorted(best, key=lambda key: key[0])]


def steps_table(kind: str, *, is_best: bool = False) -> Callable[[list[Part]], str]:
    """Return the maker of the table of one kind of training steps on a GPU."""
    columns: list[Column] = [
        ("network", lambda row: row["group"].split()[1]),
        ("loop", lambda row: f"{row['loop']}: {row['reason']}" if "reason" in row else row["loop"]),
        ("batch", "batch"),
        ("images/s", "images_per_s"),
        ("ms", "median_ms"),
        ("% of 790 TFLOP/s", "percent"),
        ("over floor", "over_floor"),
        ("over the rival", "ratio"),
        ("rival", "rival"),
        ("host ms", "host_ms"),
        ("peak GiB", "peak_gib"),
        ("first step s", "first_step_s"),
    ]

    def make(parts: list[Part]) -> str:
        rows, sources = newest_groups(parts, kind=kind)
        if not rows:
            return unmeasured(columns)
        said = "\n".join(map(source, sources)) + "".join(map(missing, sources))
        return f"{said}\n\n{table(best_batches(rows) if is_best else rows, columns)}"

    return make


def moe_gpu_table(parts: list[Part]) -> str:
    """Return the table of the MoE layer on a GPU: a line per case, each case's newest run."""
    columns: list[Column] = [
        ("d, F, E, k, tokens", "label"),
        ("step ms", "step_ms"),
        ("over floor", "over_floor"),
        ("% of 790 TFLOP/s", "percent"),
        ("target %", "target_percent"),
        ("fastest rival", "best_rival"),
        ("its time over ours", "best_rival_time_over_ours"),
    ]
    rows: dict[str, Row] = {}
    sources: list[Part] = []
    for part in select(parts, "moe_gpu", on_gpu=True):
        for result in part["cases"]:
            rows[case_label(result["case"])] = case_row(result)
        sources.append(part)
    if not rows:
        return unmeasured(columns)
    said = "\n".join(map(source, sources)) + missing(sources[-1])
    return f"{said}\n\n{table(list(rows.values()), columns)}"


def case_label(case: Row) -> str:
    """Return how a case of the MoE layer is called."""
    sizes = ", ".join(
        str(case[key]) for key in ("dim", "hidden", "num_experts", "num_choices", "num_tokens")
    )
    return f"{sizes}, {case['routing']}, {case['activation']}"


def case_row(result: Row) -> Row:
    """Return the row of a case of the MoE layer."""
    ours = next(row for row in result["layers"] if row["layer"] == "moevit")
    return result | {
        "label": case_label(result["case"]),
        "step_ms": ours["step_ms"],
        "over_floor": round(ours["step_ms"] / result["floor_ms"], 2),
    }


def profile_table(parts: list[Part]) -> str:
    """Return the kernels that take most of a step, the first five of each loop."""
    columns: list[Column] = [
        ("step", lambda row: f"{row['group']}, {row['loop']}"),
        ("kernel", lambda row: f"`{row['kernel'][:60]}`"),
        ("calls", "calls"),
        ("ms", "ms"),
        ("share", "share"),
        ("all kernels, ms", "busy_ms"),
        ("the step, ms", "step_ms"),
    ]
    found = select(parts, "profile", on_gpu=True)
    if not found:
        return unmeasured(columns)
    rows: list[Row] = [row for row in found[-1]["rows"] if "kernel" in row]
    loops = list(dict.fromkeys((row["group"], row["loop"]) for row in rows))
    top = [
        row for loop in loops for row in [r for r in rows if (r["group"], r["loop"]) == loop][:5]
    ]
    return f"{source(found[-1])}\n\n{table(top, columns)}"


# Conditions of a result that are said above its table, and how.
CONDITIONS = {
    "rounds": "{} rounds",
    "weights": "{:,} weights",
    "memory_gb_per_s": "memory read and written at {} GB/s",
    "checkpoint_mib": "{} MiB",
    "images": "{} images",
    "workers": "{} workers",
    "cores": "{} cores",
}


def conditions(command: str) -> Callable[[Part], str]:
    """Return what says how a table was measured, from its result."""

    def note(part: Part) -> str:
        said = [text.format(part[key]) for key, text in CONDITIONS.items() if key in part]
        return ", ".join([f"`python -m benchmarks.{command}`", *said, ""]).rstrip()

    return note


STEP: list[Column] = [
    ("loop", lambda row: f"batch {row['batch']}: {row['loop']}"),
    ("rounds", "rounds"),
    ("ms", "median_ms"),
    ("quartiles apart, ms", "iqr_ms"),
    ("over plain timm", "ratio"),
]
SCALING: list[Column] = [
    ("network, processes", lambda row: f"{row['config']}: {row['loop']}"),
    ("rounds", "rounds"),
    ("images/s", "images_per_s"),
    ("of the ideal", "of_ideal"),
]
LOADER: list[Column] = [
    ("loader", "loader"),
    ("images/s", "images_per_s"),
    ("CPU ms per image", "cpu_ms"),
    ("over torchvision, wall", "over_torchvision"),
    ("over torchvision, CPU", "over_torchvision_cpu"),
    ("of the floor, wall", "of_floor"),
    ("of the floor, CPU", "of_floor_cpu"),
]
LOADER_RECIPES: list[Column] = [
    ("loader, recipe", "loader"),
    ("images/s", "images_per_s"),
    ("CPU ms per image", "cpu_ms"),
    ("over timm, wall", "over_timm"),
    ("over timm, CPU", "over_timm_cpu"),
]
OPTIMIZER: list[Column] = [
    ("update", "loop"),
    ("ms", "median_ms"),
    ("over fused", "ratio"),
    ("over floor", "over_floor"),
]
CHECKPOINT: list[Column] = [
    ("way", "loop"),
    ("ms", "median_ms"),
    ("over ours, at once", "ratio"),
    ("over the disk's", "over_disk"),
]
LAUNCH: list[Column] = [
    ("process", "loop"),
    ("ms", "median_ms"),
    ("over the plain script", "ratio"),
]
FED: list[Column] = [
    ("images from", "loop"),
    ("images/s", "images_per_s"),
    ("ms per step", "median_ms"),
    ("over synthetic", "ratio"),
    ("of the floor", "of_floor"),
]
# The headlines: what is measured, against which rival, the benchmark, how to find the row, and the
# figure in it.
HEADLINES: tuple[tuple[str, str, str, Row, str], ...] = (
    (
        "step, batch 32, time",
        "plain timm loop",
        "train_step",
        {"loop": "moevit", "batch": 32},
        "ratio",
    ),
    (
        "step, batch 2, time",
        "plain timm loop",
        "train_step",
        {"loop": "moevit", "batch": 2},
        "ratio",
    ),
    (
        "two sharded ranks, images/s",
        "two separate processes",
        "scaling",
        {"loop": "2 ranks", "config": "vit_tiny_patch8_64"},
        "of_ideal",
    ),
    (
        "the same with experts, images/s",
        "two separate processes",
        "scaling",
        {"loop": "2 ranks", "config": "vit_moe_tiny_patch8_64"},
        "of_ideal",
    ),
    (
        "MoE layer, 1040 tokens, time",
        "dense layer of equal FLOPs",
        "moe",
        {"loop": "moevit", "tokens": 1040},
        "ratio",
    ),
    ("AdamW update, time", "torch's fused AdamW", "optimizer", {"loop": "moevit"}, "ratio"),
    (
        "background save, stall",
        "our blocking save",
        "checkpoint_save",
        {"loop": "moevit, background"},
        "ratio",
    ),
    (
        "launch to first step, time",
        "a minimal timm script",
        "launch",
        {"loop": "train.py"},
        "ratio",
    ),
    (
        "loader, images/s",
        "torchvision's ImageFolder and DataLoader",
        "loader",
        {"loader": "moevit, nvimgcodec"},
        "over_torchvision",
    ),
    (
        "loader, DeiT recipe, images/s",
        "ImageFolder with timm's transform",
        "loader_recipes",
        {"loader": "moevit, deit_base"},
        "over_timm",
    ),
    (
        "loader, DeiT III recipe, images/s",
        "ImageFolder with timm's transform",
        "loader_recipes",
        {"loader": "moevit, deit3_base"},
        "over_timm",
    ),
)
# Programs whose name is not that of their benchmark.
PROGRAMS = {"moe": "moe_cpu --clock cpu"}


def headlines(parts: list[Part]) -> str:
    """Return the summary: one ratio per line, each from its benchmark's newest result on a CPU."""
    columns: list[Column] = [
        ("what", "what"),
        ("against", "rival"),
        ("ratio", "figure"),
        ("measured", "when"),
        ("`python -m`", "program"),
    ]
    rows: list[Row] = []
    for what, rival, benchmark, wanted, key in HEADLINES:
        found = select(parts, benchmark, on_gpu=False)
        if not found:
            return unmeasured(columns)
        row = next(row for row in found[-1]["rows"] if wanted.items() <= row.items())
        when = f"{str(found[-1]['date'])[:10]}, {found[-1]['commit']}"
        program = f"`benchmarks.{PROGRAMS.get(benchmark, benchmark)}`"
        rows.append(
            {"what": what, "rival": rival, "figure": row[key], "when": when, "program": program}
        )
    return table(rows, columns)


TABLES: dict[str, Callable[[list[Part]], str]] = {
    "headlines": headlines,
    "train_step": simple("train_step", STEP, note=conditions("train_step")),
    "scaling": simple("scaling", SCALING, note=conditions("scaling")),
    "loader": simple("loader", LOADER, note=conditions("loader")),
    "loader recipes": simple("loader_recipes", LOADER_RECIPES, note=conditions("loader_recipes")),
    "moe": moe_table,
    "optimizer": simple("optimizer", OPTIMIZER, note=conditions("optimizer")),
    "checkpoint": simple("checkpoint_save", CHECKPOINT, note=conditions("checkpoint_save")),
    "launch": simple("launch", LAUNCH, note=conditions("launch")),
    "dense steps": steps_table("dense", is_best=True),
    "expert steps": steps_table("experts"),
    "wrappers": steps_table("wrapper"),
    "attention kernels": steps_table("sdpa"),
    "optimizer gpu": simple("optimizer", OPTIMIZER, on_gpu=True, note=conditions("optimizer")),
    "checkpoint gpu": simple(
        "checkpoint_save", CHECKPOINT, on_gpu=True, note=conditions("checkpoint_save")
    ),
    "launch gpu": simple("launch", LAUNCH, on_gpu=True, note=conditions("launch")),
    "fed": simple("fed", FED, on_gpu=True, note=conditions("fed")),
    "moe layer gpu": moe_gpu_table,
    "profile": profile_table,
}


def render(text: str, parts: list[Part]) -> str:
    """Return a document with its tables made from results.

    Raises:
        ValueError: It names a table that there is not.
    """

    def fill(found: re.Match) -> str:
        name = found["name"]
        if name not in TABLES:
            raise ValueError(f"table {name}: no such table (there are: {', '.join(TABLES)})")
        return f"{found[1]}{TABLES[name](parts)}\n{found[3]}"

    return MARKS.sub(fill, text)


def main(argv: list[str] | None = None) -> None:
    """Write the tables into the documents."""
    parser = Parser(description=__doc__)
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--documents", type=Path, nargs="+", default=DOCUMENTS)
    options = parser.parse_args(argv)
    parts = read_parts(options.results)
    for document in options.documents:
        document.write_text(render(document.read_text("utf-8"), parts), "utf-8")
        show_result(f"tables of {document}")


if __name__ == "__main__":
    main()
