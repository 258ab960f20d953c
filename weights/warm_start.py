"""What each parameter of a model begins with, given the weights of a checkpoint.

    Job: a checkpoint's weights, a model's shapes, InitOptions -> initial_weights -> Initial

Equal names are loaded. Positions are resampled if the grid of patches differs (timm's bicubic).
Final norm, pool and head start from scratch if the checkpoint lacks them or has other classes. For
experts see upcycling.py. timm, DeiT, M3ViT and we all lay qkv out as [q | k | v]. Nothing else may
be missing, left over or of another shape. Every value is a whole tensor, so it is the same on any
mesh. No files, no ranks and no models here.
"""

from __future__ import annotations

import functools
import math

import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor

from weights import formats, upcycling
from weights.formats import Weights, listed
from weights.provenance import LOADED, RESAMPLED, SCRATCH, Entry, Initial, in_short
from weights.upcycling import Job, Recipe

_HEADS = ("head.", "head_dist.")


def resolve_mode(mode: str, *, source: Weights | None, has_experts: bool) -> str:
    """Return the mode that `auto` means; `source` is None without a checkpoint."""
    if mode != "auto":
        return mode
    if source is None:
        return "scratch"
    is_dense = not any(".mlp.experts." in name for name in source)
    return "deit_upcycling" if has_experts and is_dense else "deit_warm_start"


def split_distillation(weights: Weights) -> tuple[Weights, Weights]:
    """Split off a distilled DeiT's second token and that token's head: (the rest, these two)."""
    second = {
        name: tensor
        for name, tensor in weights.items()
        if name == "dist_token" or name.startswith("head_dist.")
    }
    return {name: tensor for name, tensor in weights.items() if name not in second}, second


def without_distillation(weights: Weights) -> Weights:
    """Return a distilled DeiT without its second token: that token, its position and its head.

    The class token's head stays: the other was trained on a token that is no longer there.
    """
    kept, second = split_distillation(weights)
    if "dist_token" not in second:
        return kept
    if "pos_embed" not in kept:
        raise ValueError("weights dist_token: its position is in pos_embed, which is not there")
    pos_1LD = kept["pos_embed"]  # class token, distillation token, patches
    return {**kept, "pos_embed": torch.cat([pos_1LD[:, :1], pos_1LD[:, 2:]], dim=1)}


def _grid_of(job: Job, num_patches: int) -> tuple[int, int]:
    """Return the patches down and across that the checkpoint's positions are for."""
    side = math.isqrt(max(num_patches, 0))
    grid_hw = job.source_grid_hw or (side, side)
    if math.prod(grid_hw) != num_patches:
        raise ValueError(
            f"{job.origin}: pos_embed {tuple(job.source['pos_embed'].shape)}: must have "
            f"{job.target.vit.num_pos_prefix} positions and those of a grid of patches, "
            f"{grid_hw[0]}x{grid_hw[1]} or so"
        )
    return grid_hw


def _positions(job: Job) -> Entry:
    """Return the position embedding, resampled if the grid of patches is another one."""
    pos_1LD, new_hw = job.source["pos_embed"].float(), job.target.vit.grid_hw
    shape, prefix = job.target.shapes["pos_embed"], job.target.vit.num_pos_prefix
    old_hw = _grid_of(job, pos_1LD.shape[1] - prefix)
    if old_hw == new_hw:
        return Entry("pos_embed", shape, LOADED, "", ("pos_embed",), lambda: pos_1LD)

    def value() -> Tensor:
        return resample_abs_pos_embed(
            pos_1LD, new_size=list(new_hw), old_size=list(old_hw), num_prefix_tokens=prefix
        )

    detail = f"{old_hw[0]}x{old_hw[1]} to {new_hw[0]}x{new_hw[1]}"
    return Entry("pos_embed", shape, RESAMPLED, detail, ("pos_embed",), value)


def _is_top(name: str) -> bool:
    return formats.is_top(name) or name.startswith(_HEADS)


def _is_replaced(job: Job, name: str) -> bool:
    """Whether a parameter after the blocks starts from scratch: absent, or for other classes."""
    if not _is_top(name):
        return False
    found = job.source.get(name)
    return found is None or (name.startswith(_HEADS) and len(found) != job.target.shapes[name][0])


def _loaded(source: Weights, name: str) -> Tensor:
    return source[name].float()


def _entry(job: Job, name: str) -> Entry:
    """Return what one parameter gets; `_problems` checks that what it loads is there."""
    shape = job.target.shapes[name]
    recipe = job.recipes.get(upcycling.ffn_of(name))
    if recipe is not None and recipe.is_made:
        return upcycling.made_entry(job, name, recipe)
    if recipe == Recipe(SCRATCH) or _is_replaced(job, name):
        return Entry(name, shape, SCRATCH)
    if name == "pos_embed" and name in job.source:
        return _positions(job)
    return Entry(name, shape, LOADED, "", (name,), functools.partial(_loaded, job.source, name))


def _may_be_left_out(job: Job, name: str) -> bool:
    """Whether a tensor of the checkpoint may go unused: its part of the model is new."""
    recipe = job.recipes.get(upcycling.ffn_of(name))
    return _is_top(name) or recipe == Recipe(SCRATCH)


def _problems(job: Job, entries: list[Entry]) -> list[str]:
    """Say which parameters have no counterpart, or a counterpart of another shape."""
    absent, shapes = [], []
    for entry in entries:
        lacking = [name for name in entry.sources if name not in job.source]
        absent += lacking
        if entry.origin == LOADED and entry.name != "pos_embed" and not lacking:
            found = job.source[entry.name].shape
            if found != entry.shape:
                shapes.append(f"{entry.name} is {tuple(found)}, not {tuple(entry.shape)}")
    used = {name for entry in entries for name in entry.sources}
    surplus = [n for n in job.source if n not in used and not _may_be_left_out(job, n)]
    problems = [f"it lacks {listed(in_short(absent))}"] if absent else []
    problems += [f"the model lacks {listed(in_short(surplus))}"] if surplus else []
    return problems + ([listed(shapes)] if shapes else [])


def initial_weights(job: Job) -> Initial:
    """Return what every parameter of a model begins with.

    Raises:
        ValueError: A parameter of the model is not there, or has another shape, or the checkpoint
            has one more, or experts cannot be made of its MLPs; or a gate option has no effect.
    """
    plan, target = job.plan, job.target
    if plan.mode == "scratch":
        entries = [Entry(name, shape, SCRATCH) for name, shape in target.shapes.items()]
        return Initial(entries, [], "none made of a dense MLP")
    is_made = any(recipe.is_made for recipe in job.recipes.values())
    for option, default in (("gate", "random"), ("gate_std", None)):
        value = getattr(plan, option)
        if value != default and not is_made:
            raise ValueError(f"config init.{option}={value}: no experts are made of a dense MLP")
    entries = [_entry(job, name) for name in target.shapes]
    if problems := _problems(job, entries):
        raise ValueError(f"{job.origin}: does not fit the model: {'; '.join(problems)}")
    used = {name for entry in entries for name in entry.sources}
    left_out = [name for name in job.source if name not in used]
    return Initial(entries, left_out, upcycling.effect_of(job))
