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
from images import index as image_index
from options import compose
from options.schema import Config
from parallel import sharding
from training import run_folder
from training.logbook import Logbook, versions
from training.run import Run
from weights import dcp_writer, verify
from weights import sources as weight_sources
from weights.files import write_text

# What decides which images an update has, and how often each: a run that resumes with another value
# would see some images twice and others not at all. The rank's batch, the workers and the decoder
# are not here: they only rearrange the same images, with the same pixels (but a file that is
# damaged below the crop can be bad for one decoder and good for another).
ORDER = (
    "global_batch",
    "seed",
    "train_images",
    "dataset_sha256",
    "config.dataset.train.repeats",
)
# What changes what the network computes though every name and shape stays, so the strict load
# would not notice.
NETWORK = ("config.model.vit.num_heads", "config.model.vit.global_pool")
DEFAULTS = {"config.dataset.train.repeats": 1}
# What a complete run may be started again with: where it is, where it runs, how fast, and what is
# compared above; fewer steps end it where it is. With any other change the command asks for figures
# that the run does not have.
WITHOUT_EFFECT = (
    "dataset.decoder",
    "dataset.duplicates",
    "dataset.index_folder",
    "dataset.max_bad",
    "dataset.name",
    "dataset.num_workers",
    "dataset.on_error",
    "dataset.path_env",
    "dataset.timeout_s",
    "dataset.train.batch_size",
    "dataset.train.images",
    "dataset.train.root",
    "dataset.val.batch_size",
    "dataset.val.images",
    "device",
    "distributed.",
    "fsdp.",
    "model.backend",
    "model.compile",
    "model.moe.kernels",
    "model.sdpa",
    "model.vit.grad_checkpointing",
    "training.checkpoint.",
    "training.grad_accum_steps",
    "training.log_interval",
    "training.peak_tflops",
    "training.steps",
    "training.tensorboard",
    "training.update_freq",
    "training.val_interval",
    "training.wandb.",
)


def facts(
    run: Run, *, step: int, figures: Mapping[str, float], is_stop: bool = False
) -> dict[str, object]:
    """Return the JSON state of a checkpoint: all that resuming needs besides the tensors.

    `is_stop`: the run was asked to stop there and is to go on from there.
    """
    return {
        "step": step,
        "stopped": is_stop,
        "images_seen": step * run.global_batch,
        "global_batch": run.global_batch,
        "seed": run.config.training.seed,
        "train_images": len(run.train_index.paths),
        "dataset_sha256": image_index.digest(run.train_index),
        "classes": list(run.train_index.classes),
        "bad_images": sorted(run.bad_images),
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


def _check_same(run: Run, found: verify.Checkpoint, *, old: object, new: object) -> None:
    """Refuse to resume with other images in an update, or weights that compute something else."""
    data, train = run.config.dataset.train, run.config.training
    made_of = {
        "global_batch": f" (batch_size {data.batch_size} x grad_accum_steps "
        f"{train.grad_accum_steps} x {run.world.size} ranks; any that multiply to the same will do)"
    }
    had, has = dict(_flatten(old)), dict(_flatten(new))
    classes = found.state.get("classes")
    known = classes if isinstance(classes, list) else []
    others = weight_sources.other_classes(known, run.train_index.classes)
    made_of["dataset_sha256"] = f" ({others or 'names or labels of images are others'})"
    for name in (*ORDER, *NETWORK):
        # An option missing from an older checkpoint had its default value.
        before = had.get(name, DEFAULTS.get(name))
        if before != has[name]:
            raise ValueError(
                f"resume {found.folder}: {name.removeprefix('config.')}={has[name]}, the "
                f"checkpoint has {before}{made_of.get(name, '')}; use the same, or another "
                "training.checkpoint.path"
            )


def _changes(found: verify.Checkpoint, new: object) -> dict[str, tuple[object, object]]:
    """Return the options that changed since `found` was saved: name -> (value then, value now)."""
    then = dict(_flatten(found.state["config"]))
    # JSON, as `then` has been through it. An option that came later did what its default does.
    now, default = (
        dict(_flatten(json.loads(json.dumps(tree)))) for tree in (new, dataclasses.asdict(Config()))
    )
    before = {name: then.get(name, default[name]) for name in now}
    return {name: (before[name], now[name]) for name in now if before[name] != now[name]}


def _check_complete(found: verify.Checkpoint, changes: Mapping[str, tuple[object, object]]) -> None:
    """Refuse to show the figures of a complete run as those of other options."""
    names = [name for name in changes if not name.startswith(WITHOUT_EFFECT)]
    if "training.steps" in changes:  # a shorter warm-up may come with fewer steps
        names = [name for name in names if name != "optimizer.warmup_steps"]
    if names:
        asked, had = (
            ", ".join(f"{name}={changes[name][when]}" for name in names) for when in (1, 0)
        )
        raise ValueError(
            f"config {asked}: the run in {found.folder.parent} is complete ({found.step} steps) "
            f"with {had}; use another training.checkpoint.path, or more training.steps to go on "
            "with the new values"
        )


def check_resumable(run: Run, found: verify.Checkpoint) -> list[str]:
    """Return the options that changed since `found` was saved."""
    now = facts(run, step=found.step, figures={})
    _check_same(run, found, old=found.state, new=now)
    decay = run.config.training.ema_decay
    had_decay = dict(_flatten(found.state["config"])).get("training.ema_decay")
    if (decay is None) != (had_decay is None):
        raise ValueError(
            f"config training.ema_decay={decay}: {found.folder} was saved with {had_decay}; an "
            "average of the weights begins with the run (use another training.checkpoint.path)"
        )
    if found.step > run.config.training.steps:
        raise ValueError(
            f"config training.steps={run.config.training.steps}: must be at least {found.step}, "
            f"the steps done in {found.folder}"
        )
    changes = _changes(found, now["config"])
    if found.step == run.config.training.steps:
        _check_complete(found, changes)
    return [f"{name}: {then} -> {new}" for name, (then, new) in changes.items()]


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a run starts: from nothing, or from a checkpoint; and what was passed over."""

    found: verify.Checkpoint | None
    rejected: Mapping[Path, str]
    changed: list[str]
    superseded: list[str] = dataclasses.field(default_factory=list)

    @property
    def step(self) -> int:
        """The first update to make."""
        return 0 if self.found is None else self.found.step


def _pick(run: Run) -> tuple[verify.Checkpoint | None, Mapping[Path, str]]:
    """Return the checkpoint to go on from, and why others cannot be. Collective.

    That is the newest, or with `resume_from_metric` the best. Even then a run that was asked to
    stop goes on from its newest, since nothing was wrong with it, and so does one that is complete:
    going back would train its last steps again at every start.
    """
    options = run.config.training.checkpoint
    newest, rejected = checkpoint.find_newest(run.folder, any_mode=options.any_mode)
    metric = options.resume_from_metric
    is_over = newest is None or newest.step >= run.config.training.steps
    if metric is None or newest is None or is_over or newest.state.get("stopped"):
        return newest, rejected
    return checkpoint.find_newest(run.folder, metric=metric, any_mode=options.any_mode)


def resume(run: Run) -> Start:
    """Load the newest or best complete checkpoint of the run folder, if any. Collective.

    Raises:
        ValueError: On every rank, if all are damaged, or the run could not go on from the one.
        OSError: On every rank, if it cannot be read.
    """
    found, rejected = _pick(run)
    if found is None:
        return Start(None, rejected, [])
    changed = check_resumable(run, found)
    run.bad_images.update(_bad_images(found))
    data = run.config.dataset
    if data.on_error == "skip" and len(run.bad_images) > data.max_bad:
        raise ValueError(
            f"config dataset.max_bad={data.max_bad}: the run has met {len(run.bad_images)} images "
            f"that cannot be used by {found.folder} (it must be at least that)"
        )
    superseded = run_folder.supersede(run.folder, found.folder, apart_from=rejected)
    checkpoint.load(found, run.tensors())
    sharding.install_weights(run.model)
    return Start(found, rejected, changed, superseded)


def _bad_images(found: verify.Checkpoint) -> list[int]:
    """Return the unreadable images that the run had met, none in checkpoints that lack them."""
    images = found.state.get("bad_images", [])
    if not (isinstance(images, list) and all(isinstance(image, int) for image in images)):
        raise ValueError(f"resume {found.folder}: bad_images={images}: must be a list of numbers")
    return images


def open_folder(run: Run, start: Start) -> None:
    """Check that the run can save and write what identifies it. Rank 0 writes, the others wait.

    The options of the steps up to `start`, if others follow, stay as config.until_step_<n>.yaml. A
    complete run leaves the folder as it is.

    Raises:
        OSError: On every rank, if checkpoints could not be saved.
    """
    if start.step == run.config.training.steps:
        return
    any_mode = run.config.training.checkpoint.any_mode
    num_bytes = dcp_writer.num_bytes(run.tensors())
    run_folder.check_writable(run.folder, num_bytes, any_mode=any_mode)
    if run.world.is_main:
        if start.found is not None and start.changed:
            options = start.found.state["config"]
            assert isinstance(options, dict), "what its options are compared with"
            path = run.folder / f"config.until_step_{start.step}.yaml"
            write_text(path, compose.to_yaml(options))
        write_text(run.folder / "config.yaml", compose.to_yaml(run.config))
        write_text(run.folder / "versions.json", json.dumps(versions(), indent=2) + "\n")
    dist.barrier()


def note_start(logbook: Logbook, start: Start) -> None:
    """Log what was resumed from, with which changes, and what was passed over."""
    for path, reason in start.rejected.items():
        logbook.event("rejected", folder=str(path), reason=reason)
    for name in start.superseded:
        logbook.event("superseded", now=name)
    if start.found is not None:
        where = str(start.found.folder)
        logbook.event("resumed", step=start.step, folder=where, changed=start.changed)
