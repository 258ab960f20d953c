"""What a run saves besides its tensors, and what a checkpoint must agree with to continue it.

Run -> facts -> save -> <run folder>/step_<n>_loss_<x>
<run folder> -> resume -> Start
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path

import checkpoint
import image_index
import sharding
from assemble import Run
from logbook import Logbook, versions


def facts(run: Run, *, step: int, figures: Mapping[str, float]) -> dict[str, object]:
    """Return the JSON state of a checkpoint: all that resuming needs besides the tensors."""
    return {
        "step": step,
        "images_seen": step * run.global_batch,
        "global_batch": run.global_batch,
        "seed": run.config.training.seed,
        "train_images": len(run.train_index.paths),
        "dataset_sha256": image_index.digest(run.train_index),
        "world_size": run.world.size,
        "metrics": dict(figures),
        "config": dataclasses.asdict(run.config),
        "versions": versions(),
    }


def save(
    run: Run,
    logbook: Logbook,
    *,
    step: int,
    figures: Mapping[str, float],
    rejected: Collection[Path],
) -> Path:
    """Write a checkpoint, delete what retention lets go, and return the new folder. Collective."""
    started = time.perf_counter()
    folder = checkpoint.save(
        run.folder,
        run.tensors(),
        state=facts(run, step=step, figures=figures),
        loss=figures.get("val_loss", figures["loss"]),
    )
    if run.world.is_main:
        keep_last = run.config.training.checkpoint.keep_last
        checkpoint.sweep(run.folder, folder, keep_last=keep_last, rejected=rejected)
    logbook.event("saved", step=step, folder=str(folder), s=round(time.perf_counter() - started, 2))
    return folder


def _flatten(tree: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    if not isinstance(tree, dict):
        yield prefix, tree
        return
    for key, value in tree.items():
        yield from _flatten(value, f"{prefix}.{key}" if prefix else key)


def check_resumable(run: Run, found: checkpoint.Checkpoint) -> list[str]:
    """Return the options that changed since `found` was saved.

    Raises:
        ValueError: The order of images would change, so the run could not continue exactly.
    """
    now = facts(run, step=found.step, figures={})
    for name in ("global_batch", "seed", "train_images", "dataset_sha256"):
        if found.state[name] != now[name]:
            raise ValueError(
                f"resume {found.folder}: {name}={now[name]}, the checkpoint has "
                f"{found.state[name]}; use the same, or another training.checkpoint.path"
            )
    if found.step > run.config.training.steps:
        raise ValueError(
            f"config training.steps={run.config.training.steps}: must be at least {found.step}, "
            f"the steps done in {found.folder}"
        )
    old = dict(_flatten(found.state["config"]))
    new = dict(_flatten(json.loads(json.dumps(now["config"]))))
    return [f"{key}: {old.get(key)} -> {new[key]}" for key in new if old.get(key) != new[key]]


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run starts: from nothing, or from a checkpoint; and what was passed over."""

    found: checkpoint.Checkpoint | None
    rejected: Mapping[Path, str]
    changed: list[str]

    @property
    def step(self) -> int:
        """The first update to make."""
        return 0 if self.found is None else self.found.step


def resume(run: Run) -> Start:
    """Load the newest complete checkpoint of the run folder, if there is one. Collective."""
    found, rejected = checkpoint.find_newest(run.folder)
    if found is None:
        return Start(None, rejected, [])
    changed = check_resumable(run, found)
    checkpoint.load(found, run.tensors())
    sharding.install_weights(run.model)
    return Start(found, rejected, changed)
