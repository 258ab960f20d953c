"""How evenly each layer uses its experts, summed on the device until the figures are asked for."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn

import moe

# Figures of a layer: percentages of its rows; an even load is 100 / E.
LEAST, MOST, DROPPED = "least_load.", "most_load.", "dropped."


class ExpertLoad:
    """Rows per expert, by layer, over the forward passes that were added."""

    def __init__(self) -> None:
        self.rows: dict[str, Tensor] = {}

    def add(self, model: nn.Module) -> None:
        """Add the rows of this rank's last forward; the host reads nothing."""
        for name, rows in moe.expert_load(model).items():
            self.rows[name] = self.rows[name] + rows if name in self.rows else rows

    def figures(self) -> dict[str, float]:
        """Return each layer's least and most loaded expert's percentage of the rows. Collective.

        One all-reduce and one host sync. Rows that an expert had no capacity for count in its load;
        a layer that dropped any has their percentage too.
        """
        if not self.rows:
            return {}
        rows_LE1 = torch.stack(list(self.rows.values()))
        dist.all_reduce(rows_LE1)
        total_L1 = rows_LE1[:, :-1].sum(1, keepdim=True)
        percent_LE1 = (100 * rows_LE1.double() / total_L1).tolist()
        found: dict[str, float] = {}
        for name, (*loads, dropped) in zip(self.rows, percent_LE1, strict=True):
            found[f"{LEAST}{name}"], found[f"{MOST}{name}"] = min(loads), max(loads)
            if dropped:
                found[f"{DROPPED}{name}"] = dropped
        return found


def summary(figures: dict[str, float], *, num_experts: int) -> dict[str, str]:
    """Return a line for each layer of `figures`: the loads of its least and most used experts."""
    lines = {}
    for key, least in figures.items():
        if key.startswith(LEAST):
            name = key.removeprefix(LEAST)
            dropped = figures.get(f"{DROPPED}{name}", 0.0)
            lines[f"experts of {name}"] = (
                f"{least:.1f} to {figures[f'{MOST}{name}']:.1f} % of rows "
                f"(even: {100 / num_experts:.1f})" + (f", {dropped:.1f} % dropped" * bool(dropped))
            )
    return lines
