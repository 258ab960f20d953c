"""Where the initial value of every parameter comes from: a table, for the log and for init.txt.

No formulas here: those are in upcycling.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from options.printable import printable

LOADED, RESAMPLED, COPIED, SPLIT = "loaded", "resampled", "copied", "split"
TIED, DRAWN, ZERO, SCRATCH = "tied", "drawn", "zero", "from scratch"


def _in_braces(numbers: list[str]) -> str:
    """Return {1,3}, or {0..11} for three and more in a row."""
    first, last = int(numbers[0]), int(numbers[-1])
    row = [str(number) for number in range(first, last + 1)]
    is_short = numbers != row or last - first < 2  # two are as short with a comma
    return f"{{{','.join(numbers)}}}" if is_short else f"{{{first}..{last}}}"


def in_short(names: Iterable[str]) -> list[str]:
    """Return `names`, with blocks.1.x and blocks.3.x as blocks.{1,3}.x."""
    numbers: dict[str, list[str]] = {}
    for name in names:
        match = re.fullmatch(r"blocks\.(\d+)(\..+)", name)
        key = f"blocks.{{}}{match[2]}" if match else name
        numbers.setdefault(key, []).append(match[1] if match else "")
    return [
        key.replace("{}", _in_braces(found), 1) if found[0] else key
        for key, found in numbers.items()
    ]


@dataclass(frozen=True)
class Entry:
    """Where the initial value of one parameter comes from; no `value`: it keeps the one it has."""

    name: str
    shape: torch.Size
    origin: str
    detail: str = ""
    sources: tuple[str, ...] = ()
    value: Callable[[], Tensor] | None = None


@dataclass(frozen=True)
class Initial:
    """The origin of every parameter, which tensors were not used, and what the experts compute."""

    entries: list[Entry]
    left_out: list[str]
    effect: str

    @property
    def values(self) -> dict[str, Callable[[], Tensor]]:
        """New values by name, whole, in fp32; each is made when it is called, one at a time."""
        return {entry.name: entry.value for entry in self.entries if entry.value is not None}

    def by_origin(self) -> dict[str, list[str]]:
        """Return the names of each origin, blocks that have the same in common."""
        groups: dict[str, list[str]] = {}
        for entry in self.entries:
            groups.setdefault(entry.origin, []).append(entry.name)
        return {origin: in_short(names) for origin, names in groups.items()}

    def lines(self) -> list[str]:
        """Return the table: one line per parameter, one per unused tensor, and the effect."""
        rows = [
            [
                entry.name,
                "x".join(map(str, entry.shape)),
                entry.origin,
                entry.detail,
                f"<- {', '.join(entry.sources)}" if entry.sources else "",
            ]
            for entry in self.entries
        ]
        widths = [max((len(row[column]) for row in rows), default=0) for column in range(5)]
        table = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
            for row in rows
        ]
        unused = (f"not used: {name}" for name in self.left_out)
        return [printable(line) for line in (*table, *unused, f"experts: {self.effect}")]
