"""What a run saves besides its tensors, and what a checkpoint must agree with to continue it.

Run -> facts -> <run folder>/step_<n>_loss_<x>/state.json
<run folder> -> resume -> Start
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch.distributed as dist

import checkpoint
import compose
import dcp_writer
import image_index
import run_folder
import sharding
from assemble import Run
from logbook import Logbook, versions

# Names of figures as users of the option know them, where ours differ.
_FIGURES = {"val_top1": "top1", "val_top5": "top5"}


def figure_name(metric: str | None) -> str | None:
    """Return "+name" or "-name" with the name that the figure has in state.json."""
    return metric and f"{metric[0]}{_FIGURES.get(metric[1:], metric[1:])}"


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
            made_of = ""
            if name == "global_batch":
                data, train = run.config.dataset.train, run.config.training
                made_of = (
                    f" (batch_size {data.batch_size} x grad_accum_steps {train.grad_accum_steps} "
                    f"x {run.world.size} ranks; any that multiply to the same will do)"
                )
            raise ValueError(
                f"resume {found.folder}: {name}={now[name]}, the checkpoint has "
                f"{found.state[name]}{made_of}; use the same, or another training.checkpoint.path"
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
    """Load the newest or best complete checkpoint of the run folder, if any. Collective."""
    metric = figure_name(run.config.training.checkpoint.resume_from_metric)
    found, rejected = checkpoint.find_newest(run.folder, metric=metric)
    if found is None:
        return Start(None, rejected, [])
    changed = check_resumable(run, found)
    checkpoint.load(found, run.tensors())
    sharding.install_weights(run.model)
    return Start(found, rejected, changed)


def _write_whole(path: Path, text: str) -> None:
    """Write a file so that a kill leaves the old one or the new one."""
    staged = path.with_name(f".{path.name}.staging")
    staged.write_text(text)
    staged.replace(path)


def open_folder(run: Run) -> None:
    """Check that the run can save and write what identifies it. Rank 0 writes, the others wait.

    Raises:
        OSError: On every rank, if checkpoints could not be saved.
    """
    run_folder.check_writable(run.folder, dcp_writer.num_bytes(run.tensors()))
    if run.world.is_main:
        _write_whole(run.folder / "config.yaml", compose.to_yaml(run.config))
        _write_whole(run.folder / "versions.json", json.dumps(versions(), indent=2) + "\n")
    dist.barrier()


def open_logbook(run: Run, start: Start) -> Logbook:
    """Return the run's log, which goes on where it was."""
    t = run.config.training
    return Logbook(
        run.folder,
        is_main=run.world.is_main,
        step=start.step,
        num_steps=t.steps,
        tensorboard=t.tensorboard,
        wandb_project=t.wandb.project,
        wandb_mode=t.wandb.mode,
        options=dataclasses.asdict(run.config),
    )


def note_start(logbook: Logbook, start: Start) -> None:
    """Log what was resumed from, with which changes, and what was passed over."""
    for path, reason in start.rejected.items():
        logbook.event("rejected", folder=str(path), reason=reason)
    if start.found is not None:
        where = str(start.found.folder)
        logbook.event("resumed", step=start.step, folder=where, changed=start.changed)
