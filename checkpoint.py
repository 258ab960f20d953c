"""Checkpoints in Torch DCP: saved whole or not at all, found again, loaded strictly.

    <run folder>/step_<n>_loss_<x>/   __<rank>_0.distcp, .metadata   tensors, by global name
                                      state.json                    step, config, versions
                                      manifest.json                 size and sha256 of each file

A folder counts only if it belongs to this user and every byte matches its manifest. Sees state
dicts of tensors, never models or options.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import state_dict_loader
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from parallel import collectives
from weights import dcp_writer, verify
from weights.dcp_reader import SafeReader
from weights.dcp_writer import Json
from weights.verify import Checkpoint

TensorTree = dcp_writer.TensorTree
NonFiniteTensorError = dcp_writer.NonFiniteTensorError


def save(root: Path, tensors: TensorTree, *, state: Json, loss: float) -> Path:
    """Write a checkpoint of `state["step"]` under `root` and return its folder. Collective.

    Raises:
        OSError: On every rank, if a rank cannot write.
        NonFiniteTensorError: On every rank, if a tensor has NaN or infinities.
        ValueError: On every rank, if `loss` or a number in `state` is not finite.
    """
    target = dcp_writer.make_target(root, state=state, loss=loss)
    plan, source = dcp_writer.make_plan(tensors)
    part = collectives.capture(dcp_writer.write, target.staging, plan.local, source)
    parts = collectives.gather(part)
    result: Path | Exception = target.folder
    if plan.metadata is not None:
        failure = dcp_writer.first_failure(target, plan, parts)
        if failure is None:
            result = collectives.capture(dcp_writer.commit, target, plan.metadata, parts)
            failure = dcp_writer.first_failure(target, plan, [result])
        result = failure or result
    return collectives.broadcast_or_raise(result)


def find_newest(
    root: Path, *, metric: str | None = None, any_mode: bool = False
) -> tuple[Checkpoint | None, dict[Path, str]]:
    """Return the newest complete checkpoint under `root`, and why newer ones are not. Collective.

    With `metric`, "+name" or "-name", it is the one with the highest or lowest figure; the newest
    if none has the figure. `any_mode`: see `verify.verify`. Rank 0 alone looks: ranks that looked
    at a shared folder by themselves could see different ones and resume from different steps.

    Raises:
        ValueError: There are checkpoints, but none is complete: starting over would hide that.
        OSError: On every rank, if rank 0 cannot read the folder.
    """
    answer: tuple[Checkpoint | None, dict[Path, str]] | Exception = (None, {})
    if dist.get_rank() == 0:
        answer = collectives.capture(
            lambda: verify.first_whole(verify.candidates(root, metric=metric), any_mode=any_mode)
        )
    found, rejected = collectives.broadcast_or_raise(answer)
    if found is None and rejected:
        raise ValueError(
            f"checkpoint {root}: none of {len(rejected)} can be used: "
            f"{'; '.join(rejected.values())}"
        )
    return found, rejected


def _differences(folder: Path, tensors: TensorTree, *, wanted: set[str]) -> list[str]:
    """Return how names, shapes and dtypes on disk differ from this rank's `tensors`."""
    metadata = SafeReader(folder).read_metadata().state_dict_metadata
    flat, _ = flatten_state_dict(dict(tensors))
    problems = [f"missing {key}" for key in sorted(wanted - set(metadata))]
    problems += [f"unexpected {key}" for key in sorted(set(metadata) - wanted)]
    for key in sorted(set(flat) & set(metadata)):
        stored = metadata[key]
        if not isinstance(stored, TensorStorageMetadata):
            problems.append(f"{key} is not a tensor")
        elif stored.size != flat[key].shape or stored.properties.dtype != flat[key].dtype:
            problems.append(
                f"{key} is {tuple(stored.size)} {stored.properties.dtype}, "
                f"the model has {tuple(flat[key].shape)} {flat[key].dtype}"
            )
    return problems


def _check_keys(folder: Path, tensors: TensorTree) -> None:
    """Compare names, shapes and dtypes with what is on disk, before any tensor is read.

    DCP itself would load what it finds: it ignores names that only the folder has, and reads a
    tensor of another dtype into ours without a word.
    """
    flat, _ = flatten_state_dict(dict(tensors))
    # A rank without rows of a parameter has no optimizer state for it: the union counts.
    wanted = {key for keys in collectives.all_gather(list(flat)) for key in keys}
    try:
        found = _differences(folder, tensors, wanted=wanted)
    except (OSError, ValueError) as error:
        found = [str(error)]
    # Only a rank that has a tensor can compare its shape, but if one refuses, all must: the load
    # is collective, and the others would wait in it.
    problems = dict.fromkeys(item for items in collectives.all_gather(found) for item in items)
    if problems:
        raise ValueError(f"checkpoint {folder}: {len(problems)} differences: {'; '.join(problems)}")


def load(checkpoint: Checkpoint, tensors: TensorTree) -> None:
    """Fill `tensors` in place from `checkpoint`, resharding as needed. Collective.

    Raises:
        ValueError: A name, shape or dtype differs; all are listed and no tensor was touched.
        OSError: On every rank, if a rank cannot read its part.
    """
    _check_keys(checkpoint.folder, tensors)
    try:
        state_dict_loader.load(dict(tensors), storage_reader=SafeReader(checkpoint.folder))
    except CheckpointException as error:  # derives from BaseException: callers would not catch it
        rank, (cause, _) = next(iter(error.failures.items()))
        raise OSError(f"checkpoint {checkpoint.folder}: rank {rank}: {cause}") from error


def load_torch_checkpoint(path: Path, model: nn.Module) -> None:
    """Load a file written by `format_utils dcp_to_torch` into an unsharded model, strictly.

    Raises:
        ValueError: The file holds no model weights.
        RuntimeError: Names or shapes differ (from `load_state_dict`).
    """
    content = torch.load(path, map_location="cpu", weights_only=True)
    weights = content.get("model") if isinstance(content, dict) else None
    if not isinstance(weights, dict):
        raise ValueError(f"file {path}: has no `model` weights (found {type(content).__name__})")
    model.load_state_dict(weights, strict=True)
