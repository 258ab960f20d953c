"""Experts made of a dense MLP: which of them gets which part of it, and with which factor.

    Job -> its recipe for each block with experts -> made_entry, one per parameter

A dense MLP  y = V gelu(U x + a) + b  of width H becomes E experts of width F; a token uses k of
them. With G = H / F shards (G = 1: copies) and S, the sum of a token's weights at zero logits:

    expert j has shard s = j mod G:  rows s of U, a as they are; columns s of V times G / S; b / S
    S = 1 if weights are normalised, else k / E (a softmax over all experts) or k / 2 (sigmoid)

The sum of weight * expert is then y for every token whose weights sum to S, and to S / G over the
experts of each shard: `effect_of` says when they do. Sources: sparse upcycling (arXiv 2212.05055)
and virtual groups (arXiv 2410.07524), which scale U and V by a square root each: that is not exact
through a GELU. Everything else that a model begins with is in warm_start.py.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from layers import init
from options.schema import ROUTERS, InitOptions, MoEOptions, ViTOptions
from weights.formats import Weights
from weights.provenance import COPIED, DRAWN, LOADED, SCRATCH, SPLIT, TIED, ZERO, Entry

GATE_STD = 0.02  # of a gate from scratch

_IN_FFN = re.compile(r"(blocks\.\d+\.mlp\.)(.+)")
_DENSE_OF = {
    "experts.w_in": "fc1.weight",
    "experts.b_in": "fc1.bias",
    "experts.w_out": "fc2.weight",
    "experts.b_out": "fc2.bias",
}


def sum_is_constant(o: MoEOptions) -> bool:
    """Return whether a token's k weights have the same sum for every token and any gate."""
    return o.is_normalized or (o.router != "sigmoid" and o.top_k == o.num_experts)


def weight_sum(o: MoEOptions) -> float:
    """Return the sum S of a token's k weights where all logits are zero."""
    if o.is_normalized:
        return 1.0
    return o.top_k / (2 if o.router == "sigmoid" else o.num_experts)


@dataclass(frozen=True)
class Recipe:
    """What happens to one block's experts: LOADED, COPIED, SPLIT in shards, or from SCRATCH."""

    origin: str
    num_shards: int = 1

    @property
    def is_made(self) -> bool:
        """Whether the experts are made of a dense MLP."""
        return self.origin in (COPIED, SPLIT)


@dataclass(frozen=True, kw_only=True)
class Target:
    """The model to begin: full shapes by name, and what they do not tell; dense: no `experts`."""

    shapes: Mapping[str, torch.Size]
    vit: ViTOptions
    seed: int
    experts: MoEOptions | None


@dataclass(frozen=True)
class Job:
    """A checkpoint's weights by our names, {} from scratch, and the model that begins with them.

    `origin` names the checkpoint in errors; `source_grid_hw` is its patch grid, None if square.
    """

    source: Weights
    target: Target
    plan: InitOptions
    origin: str
    source_grid_hw: tuple[int, int] | None = None

    @property
    def moe(self) -> MoEOptions:
        """The options of the model's experts."""
        assert self.target.experts is not None, "a model with experts has their options"
        return self.target.experts

    @functools.cached_property
    def recipes(self) -> dict[str, Recipe]:
        """What happens to the experts of each feed-forward that has some, by its prefix."""
        names = [name for name in self.target.shapes if name.endswith(".mlp.experts.w_in")]
        prefixes = [name.removesuffix("experts.w_in") for name in names]
        return {prefix: _find_recipe(self, prefix) for prefix in prefixes}


def expert_tensor(
    part: str, dense: Tensor, *, num_shards: int, num_experts: int, weight_sum: float
) -> Tensor:
    """Return all experts' `experts.<part>` from the dense MLP's tensor, by the formula above.

    Shapes: w_in: [H, D] -> [E*F, D]; b_in: [H] -> [E, F]; w_out: [D, H] -> [E*D, F];
    b_out: [D] -> [E, D]
    """
    dense, repeats = dense.float(), num_experts // num_shards
    if part == "w_in":
        return dense.repeat(repeats, 1)
    if part == "b_in":
        return dense.view(num_shards, -1).repeat(repeats, 1)
    if part == "b_out":
        return (dense / weight_sum).repeat(num_experts, 1)
    shard_GDF = dense.unflatten(1, (num_shards, -1)).transpose(0, 1) * (num_shards / weight_sum)
    return shard_GDF.repeat(repeats, 1, 1).flatten(0, 1)


def gate_rows(shape: torch.Size, *, num_shards: int, std: float, rng: torch.Generator) -> Tensor:
    """Return a gate [E, D] ~ N(0, std^2) whose rows are the same within each group of G experts."""
    num_groups = shape[0] // num_shards
    row_XD = init.normal(torch.Size((num_groups, shape[1])), std, rng=rng)
    return row_XD.repeat_interleave(num_shards, dim=0)


def _in_ffn(name: str) -> tuple[str, str]:
    match = _IN_FFN.fullmatch(name)
    return (match[1], match[2]) if match else ("", "")


def ffn_of(name: str) -> str:
    """Return `blocks.3.mlp.` of a parameter in it, "" for any other."""
    return _in_ffn(name)[0]


def _num_shards(kind: str | None, *, dense_dim: int, hidden_dim: int, moe: MoEOptions) -> int:
    """Return in how many parts the dense MLP is cut, 1 for copies."""
    widths = f"an expert is {hidden_dim} wide, the dense MLP {dense_dim}"
    if moe.activation != "gelu":
        raise ValueError(
            f"config model.moe.activation={moe.activation}: must be gelu, as in the dense MLP "
            "that the experts are made of"
        )
    if kind == "copy" and dense_dim != hidden_dim:
        raise ValueError(f"config init.experts=copy: {widths}: set model.moe.mlp_ratio, or split")
    if dense_dim % hidden_dim:
        raise ValueError(f"config model.moe.mlp_ratio: {widths}: must divide it")
    num_shards = dense_dim // hidden_dim
    if moe.num_experts % num_shards:
        raise ValueError(
            f"config model.moe.num_experts={moe.num_experts}: must be a multiple of {num_shards}:"
            f" {widths}, and each part of it is needed equally often"
        )
    return num_shards


def _check_gate(plan: InitOptions, num_shards: int, moe: MoEOptions) -> None:
    if plan.gate == "virtual_group" and num_shards == 1:
        raise ValueError("config init.gate=virtual_group: has no effect on copies (use random)")
    if plan.gate == "virtual_group" and moe.top_k % num_shards:
        raise ValueError(
            f"config init.gate=virtual_group: needs model.moe.top_k={moe.top_k} to be a multiple "
            f"of {num_shards}, the parts of a dense MLP"
        )


def _find_recipe(job: Job, prefix: str) -> Recipe:
    """Return what happens to the experts of the feed-forward `prefix`."""
    source, plan, origin = job.source, job.plan, job.origin
    default = "random" if plan.mode == "deit_warm_start" else None
    kind = default if plan.experts is None else plan.experts
    if f"{prefix}experts.w_in" in source:
        if plan.mode == "deit_warm_start" and plan.experts is None:
            return Recipe(LOADED)
        if kind != "random":
            raise ValueError(
                f"{origin}: {prefix}experts are there already: they are loaded by "
                "init.mode=deit_warm_start with init.experts=null"
            )
    if kind == "random":
        return Recipe(SCRATCH)
    if f"{prefix}fc1.weight" not in source:
        raise ValueError(f"{origin}: has no {prefix}fc1.weight to make experts of")
    num_shards = _num_shards(
        kind,
        dense_dim=len(source[f"{prefix}fc1.weight"]),
        hidden_dim=job.target.shapes[f"{prefix}experts.w_out"][1],
        moe=job.moe,
    )
    _check_gate(plan, num_shards, job.moe)
    return Recipe(SPLIT if num_shards > 1 else COPIED, num_shards)


def made_entry(job: Job, name: str, recipe: Recipe) -> Entry:
    """Return a parameter of a feed-forward whose experts are made of a dense MLP."""
    plan, moe, shape = job.plan, job.moe, job.target.shapes[name]
    prefix, inner = _in_ffn(name)
    num_shards, total = recipe.num_shards, weight_sum(moe)
    if inner in _DENSE_OF:
        dense_name, part = prefix + _DENSE_OF[inner], inner.removeprefix("experts.")
        factor = {"w_out": num_shards / total, "b_out": 1 / total}.get(part, 1.0)
        cut = f"in {num_shards}, each {moe.num_experts // num_shards} times"
        detail = cut if recipe.origin == SPLIT else f"{moe.num_experts} times"
        detail += f", values times {factor:g}" if factor != 1 else ""

        def value() -> Tensor:
            return expert_tensor(
                part,
                job.source[dense_name],
                num_shards=num_shards,
                num_experts=moe.num_experts,
                weight_sum=total,
            )

        return Entry(name, shape, recipe.origin, detail, (dense_name,), value)
    if inner == "router.gate.weight" and (plan.gate, plan.gate_std) != ("random", None):
        std = GATE_STD if plan.gate_std is None else plan.gate_std
        size = num_shards if plan.gate == "virtual_group" else 1

        def rows() -> Tensor:
            rng = init.generator(job.target.seed, name)
            return gate_rows(shape, num_shards=size, std=std, rng=rng)

        detail = f"std {std:g}" + (f", groups of {size}" if size > 1 else "")
        return Entry(name, shape, TIED if size > 1 else DRAWN, detail, (), rows)
    if inner.startswith("shared.fc2."):
        return Entry(
            name, shape, ZERO, "the experts are all of the MLP", (), lambda: torch.zeros(shape)
        )
    return Entry(name, shape, SCRATCH)


def effect_of(job: Job) -> str:
    """Say whether the blocks with experts compute what the dense ones did.

    Exact needs weights of constant sum and, for parts of an MLP, each part equally weighted, which
    virtual groups give: a token takes all G of a group, whose scores are equal.
    """
    plan, moe = job.plan, job.target.experts
    made = [recipe for recipe in job.recipes.values() if recipe.is_made]
    if moe is None or not made:
        return "none made of a dense MLP"
    reasons = []
    has_parts = any(recipe.num_shards > 1 for recipe in made)
    if has_parts and plan.gate != "virtual_group":
        reasons.append("a token's experts need not be all parts (init.gate=virtual_group)")
    if not sum_is_constant(moe):
        reasons.append(
            f"weights sum to {weight_sum(moe):g} only at logits of zero (model.moe.normalize=true,"
            " or a small init.gate_std)"
        )
    if reasons:
        return f"the dense function approximately: {'; '.join(reasons)}"
    is_disturbed = has_parts and (ROUTERS[moe.router].is_noisy or moe.expert_drop > 0)
    is_disturbed = is_disturbed or moe.capacity_factor is not None
    caveat = ", except for routing noise and dropped rows in training" if is_disturbed else ""
    return f"the dense function exactly{caveat}"
