"""Names and shapes of weights in other projects' files, as functions from tensors to tensors.

    ours --to_timm--> timm (dense models only)  --from_timm--> ours
    ours --to_nvidia--> NVIDIA's ViT recipe (dense models only)  --from_timm--> ours
    ours --to_mtl---> M3ViT's global file       --from_mtl---> ours
    files of M3ViT, one or one per rank of FastMoE --merge_shards--> M3ViT's global file

| ours: blocks.<i>.mlp.       | M3ViT: blocks.<i>.mlp.           | M3ViT's shape        |
|-----------------------------|----------------------------------|----------------------|
| router.gate.weight [E, D]   | gate.w_gate                      | [D, E]               |
| router.gate.noise.weight    | gate.w_noise                     | [D, E]               |
| experts.w_in [E*F, D]       | experts.htoh4.weight             | [E, F, D]            |
| experts.b_in, b_out         | experts.htoh4.bias, h4toh.bias   | [E, F], [E, D], ours |
| experts.w_out [E*D, F]      | experts.h4toh.weight             | [E, D, F]            |

All other names are timm's in both. M3ViT's encoder has no final norm, pool or head. A name that the
other side lacks is an error that names it: nothing is dropped in silence. No files, no models here.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Weights = dict[str, Tensor]
Json = Mapping[str, object]

_DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)
_TO_MTL = {
    "mlp.router.gate.weight": "mlp.gate.w_gate",
    "mlp.router.gate.noise.weight": "mlp.gate.w_noise",
    "mlp.experts.w_in": "mlp.experts.htoh4.weight",
    "mlp.experts.b_in": "mlp.experts.htoh4.bias",
    "mlp.experts.w_out": "mlp.experts.h4toh.weight",
    "mlp.experts.b_out": "mlp.experts.h4toh.bias",
}
_FROM_MTL = {theirs: ours for ours, theirs in _TO_MTL.items()}
# NVIDIA's ViT recipe keeps these in a module of their own; all other names are timm's. Its loader
# is not strict: a file with other names loads, and what it lacks stays random.
_TO_NVIDIA = {name: f"pos_embed.{name}" for name in ("pos_embed", "cls_token", "reg_token")}
_FROM_NVIDIA = {theirs: ours for ours, theirs in _TO_NVIDIA.items()}
NVIDIA_EPS = "NVIDIA's recipe has LayerNorms with eps 1e-5, ours have 1e-6: logits differ slightly"
_BLOCK = re.compile(r"(blocks\.\d+\.)(.+)")
_TOP = re.compile(r"(norm|fc_norm|head|attn_pool)\..+")
_HEAD_OF_WRAPPER = re.compile(r"(norm|head|head_dist)\..+")
_PREFIXES = ("backbone.", "encoder.")
EXPERTS_OF_MTL = re.compile(r"blocks\.\d+\.mlp\.experts\.(htoh4|h4toh)\.(weight|bias)")
_ENCODER_OF_BOTH = re.compile(
    r"cls_token|pos_embed|patch_embed\.proj\.(weight|bias)|"
    r"blocks\.\d+\.(norm[12]|attn\.qkv|attn\.proj|mlp\.fc[12])\.(weight|bias)"
)
DENSE = re.compile(
    r"cls_token|reg_token|dist_token|pos_embed|"
    r"(patch_embed\.proj|norm_pre|norm|fc_norm|head|head_dist)\.(weight|bias)|"
    r"attn_pool\.(latent|(q|kv|proj|norm|mlp\.fc[12])\.(weight|bias))|"
    r"blocks\.\d+\.(ls[12]\.gamma|(norm[12]|attn\.(qkv|proj|q_norm|k_norm|norm)|"
    r"mlp\.(fc1|fc2|norm))\.(weight|bias))"
)
# Routers may have parameters of any name.
_MOE_OF_OURS = re.compile(r"blocks\.\d+\.mlp\.(router|experts|shared)\..+")
# What every block of M3ViT has, by M3ViT's names; qkv's bias is optional there too.
_ATTENTION = tuple(
    f"{layer}.{kind}" for layer in ("norm1", "attn.proj", "norm2") for kind in ("weight", "bias")
)
_MLP = tuple(f"mlp.{layer}.{kind}" for layer in ("fc1", "fc2") for kind in ("weight", "bias"))
_MOE = tuple(name for name in _FROM_MTL if name != "mlp.gate.w_noise")
# By option, the values with which M3ViT's encoder computes what ours does. Names and shapes are the
# same with other values, so no load would notice.
_OPTIONS_OF_MTL: dict[str, tuple[object, ...]] = {
    "vit.no_embed_class": (False,),
    "moe.activation": ("gelu",),
    "moe.router": ("softmax", "noisy", "noisy_topk"),
    "moe.forced_balance": (False,),
}


@dataclass(frozen=True)
class MtlFile:
    """A file of M3ViT's multi-task side: the encoder's weights, all experts, and what they are.

    Of `meta`, M3ViT reads `expert_format`, `world_size` and `moe_experts_global`. `meta["moevit"]`,
    which only `from_mtl` reads, has the options (JSON) and, under "dropped", the tensors that M3ViT
    has no place for: final norm, pool and head, by our names. `left_out` names what else the files
    held that neither of us has a place for.
    """

    weights: Weights
    meta: Json
    left_out: tuple[str, ...] = ()


def listed(names: Iterable[str]) -> str:
    """Return up to six of `names`, sorted and not endless, and how many more there are."""
    ordered = sorted(name if len(name) < 200 else f"{name[:200]}..." for name in names)
    rest = f" and {len(ordered) - 6} more" if len(ordered) > 6 else ""
    return ", ".join(ordered[:6]) + rest


def check_dtypes(weights: Weights, origin: str) -> None:
    """Refuse weights that are not real numbers: a model would take them, rounded or cut.

    Raises:
        ValueError: The first of them is named.
    """
    for name, tensor in weights.items():
        if tensor.dtype not in _DTYPES:
            allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            found = str(tensor.dtype).removeprefix("torch.")
            raise ValueError(f"{origin}: {name} is {found}, must be one of {allowed}")


def option(model: object, dotted: str) -> object:
    """Return the option `model.<dotted>` of a run."""
    value: object = model
    for key in dotted.split("."):
        if not isinstance(value, Mapping) or key not in value:
            raise ValueError(f"weights: their options are not known (model.{dotted} is missing)")
        value = value[key]
    return value


def to_timm(weights: Weights) -> Weights:
    """Return the weights of a dense model by timm's names, which are ours.

    Raises:
        ValueError: timm has no such parameters: the model has experts.
    """
    unknown = [name for name in weights if not DENSE.fullmatch(name)]
    if unknown:
        has_experts = any(".experts." in name for name in unknown)
        advice = "; it has no experts: export to torch, safetensors or mtl" if has_experts else ""
        raise ValueError(f"weights {listed(unknown)}: timm's ViT has no such parameters{advice}")
    return dict(weights)


def to_nvidia(weights: Weights) -> Weights:
    """Return the weights of a dense model by the names of NVIDIA's ViT recipe, without experts.

    Raises:
        ValueError: The recipe has no such parameters, or cannot be without some.
    """
    extra = [name for name in weights if not DENSE.fullmatch(name) or "dist" in name]
    if extra:
        raise ValueError(f"weights {listed(extra)}: NVIDIA's ViT recipe has no such parameters")
    if "pos_embed" not in weights:
        raise ValueError("weights pos_embed: NVIDIA's ViT recipe cannot be without it")
    return {_TO_NVIDIA.get(name, name): tensor for name, tensor in weights.items()}


def is_nvidia(weights: Weights) -> bool:
    """Return whether names are those of NVIDIA's ViT recipe, as it or Megatron-FSDP saves them."""
    return any(name.removeprefix("module.") in _FROM_NVIDIA for name in weights)


def unknown_names(weights: Weights) -> list[str]:
    """Return the names that no parameter of our ViT has."""
    return [n for n in weights if not any(part.fullmatch(n) for part in (DENSE, _MOE_OF_OURS))]


def from_timm(weights: Weights) -> Weights:
    """Return the weights of a ViT of timm, NVIDIA's recipe, or ours, by our names.

    DDP's and Megatron-FSDP's `module.` is taken off.

    Raises:
        ValueError: We have no such parameters; they are named.
    """
    bare = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    renamed = {_FROM_NVIDIA.get(name, name): tensor for name, tensor in bare.items()}
    if len(renamed) < len(weights):
        raise ValueError(f"weights: {len(weights) - len(renamed)} have the same names as others")
    if unknown := unknown_names(renamed):
        raise ValueError(f"weights {listed(unknown)}: our ViT has no such parameters")
    return renamed


def has_experts(weights: Weights) -> bool:
    """Return whether a block of our model has experts."""
    return any(".mlp.experts." in name for name in weights)


def is_top(name: str) -> bool:
    """Return whether a parameter of ours comes after the blocks, where M3ViT's encoder ends."""
    return _TOP.fullmatch(name) is not None


def missing_top(weights: Weights) -> list[str]:
    """Return which parts after the blocks `weights` lack, as M3ViT's files do."""
    parts = {name.partition(".")[0] for name in weights}
    norm = [] if parts & {"norm", "fc_norm"} else ["norm or fc_norm"]
    return norm if "head" in parts else [*norm, "head"]


def _in_block(name: str) -> tuple[str, str]:
    """Split `blocks.3.mlp.fc1.bias` after the block; both parts are empty outside of blocks."""
    match = _BLOCK.fullmatch(name)
    return (match[1], match[2]) if match else ("", "")


def _by_block(weights: Weights) -> dict[int, set[str]]:
    blocks: dict[int, set[str]] = {}
    for name in weights:
        block, inner = _in_block(name)
        if block:
            blocks.setdefault(int(block.split(".")[1]), set()).add(inner)
    return blocks


def _check_blocks(weights: Weights) -> None:
    """Refuse an encoder that M3ViT cannot build: it has experts in the odd blocks, or nowhere."""
    blocks = _by_block(weights)
    with_experts = {number for number, names in blocks.items() if "mlp.gate.w_gate" in names}
    missing = [name for name in ("cls_token", "pos_embed") if name not in weights]
    missing += [f"patch_embed.proj.{kind}" for kind in ("weight", "bias")]
    for number, names in blocks.items():
        needed = {"attn.qkv.weight", *_ATTENTION, *(_MOE if number in with_experts else _MLP)}
        missing += [f"blocks.{number}.{name}" for name in needed - names]
    missing = [name for name in missing if name not in weights]
    if missing:
        raise ValueError(f"weights {listed(missing)}: M3ViT's encoder cannot be without them")
    odd = {number for number in blocks if number % 2 == 1}
    if with_experts and with_experts != odd:
        raise ValueError(
            f"config model.moe: experts in blocks {sorted(with_experts)}: M3ViT has them in "
            f"{sorted(odd)} (every_n=2)"
        )


def _check_options(model: Json, *, with_experts: bool) -> None:
    """Refuse options with which M3ViT's encoder would compute something else."""
    allowed = {
        name: values
        for name, values in _OPTIONS_OF_MTL.items()
        if with_experts or not name.startswith("moe.")
    }
    if with_experts:
        always = option(model, "moe.router") == "noisy_topk"
        allowed["moe.normalize"] = (None, always)
    for name, values in allowed.items():
        value = option(model, name)
        if value not in values:
            shown = " or ".join(str(value) for value in values)
            raise ValueError(f"config model.{name}={value}: M3ViT can only do {shown}")


def _mtl_tensor(tensor: Tensor, *, theirs: str, num_experts: int) -> Tensor:
    if theirs.startswith("mlp.gate."):
        return tensor.T
    return tensor.unflatten(0, (num_experts, -1)) if theirs.endswith(".weight") else tensor


def _our_tensor(tensor: Tensor, *, theirs: str) -> Tensor:
    num_dims = 3 if theirs.endswith(".weight") else 2
    if tensor.ndim != num_dims:
        raise ValueError(f"weights {theirs} {tuple(tensor.shape)}: must have {num_dims} dimensions")
    if theirs.startswith("mlp.gate."):
        return tensor.T.contiguous()
    return tensor.flatten(0, 1) if theirs.endswith(".weight") else tensor


def _facts(weights: Weights, model: Json) -> dict[str, object]:
    """Return what the shapes of M3ViT's tensors do not tell, by the names of its options."""
    vit = ("img_size", "patch_size", "embed_dim", "depth", "num_heads", "mlp_ratio", "qkv_bias")
    facts = {name: option(model, f"vit.{name}") for name in vit}
    if has_experts(weights):
        facts["moe_mlp_ratio"] = option(model, "moe.mlp_ratio")
        facts["moe_top_k"] = option(model, "moe.top_k")
        is_learnt = option(model, "moe.router") == "noisy_topk"
        facts["moe_gate_type"] = "noisy" if is_learnt else "noisy_vmoe"
    return facts


def to_mtl(weights: Weights, *, model: Json, config_json: str) -> MtlFile:
    """Return our weights as the global file of M3ViT: fp32, every expert, unprefixed.

    `model` is the section of that name of the options of the run, `config_json` all of them.

    Raises:
        ValueError: M3ViT's encoder cannot be this one: the parameter or the option is named.
    """
    theirs: Weights = {}
    dropped: Weights = {}
    unknown = []
    for name, tensor in weights.items():
        block, inner = _in_block(name)
        gate = weights.get(f"{block}mlp.router.gate.weight")
        if gate is not None and inner in _TO_MTL:
            renamed = _TO_MTL[inner]
            theirs[block + renamed] = _mtl_tensor(
                tensor.float(), theirs=renamed, num_experts=len(gate)
            )
        elif _ENCODER_OF_BOTH.fullmatch(name):
            theirs[name] = tensor.float()
        elif _TOP.fullmatch(name):
            dropped[name] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"weights {listed(unknown)}: M3ViT's encoder has no such parameters")
    _check_options(model, with_experts=has_experts(weights))
    _check_blocks(theirs)
    meta = _meta(theirs, num_shards=1, source="pretrain") | _facts(weights, model)
    meta["moevit"] = {"config": config_json, "dropped": dropped}
    return MtlFile({name: tensor.contiguous() for name, tensor in theirs.items()}, meta)


def _meta(theirs: Weights, *, num_shards: int, source: str) -> dict[str, object]:
    """Return the five entries that every global file of M3ViT has."""
    sizes = [len(tensor) for name, tensor in theirs.items() if EXPERTS_OF_MTL.fullmatch(name)]
    num_experts = max(sizes, default=0)
    return {
        "expert_format": "global",
        "moe_experts_global": num_experts,
        "moe_experts_local": num_experts // num_shards,
        "world_size": num_shards,
        "source": source,
    }


def missing_experts(theirs: Weights) -> str | None:
    """Say which experts are not in M3ViT's tensors, comparing them with the gate; None: all are."""
    for name in filter(EXPERTS_OF_MTL.fullmatch, theirs):
        found, gate = len(theirs[name]), name.partition("experts.")[0] + "gate."
        sizes = [t.shape[1] for k, t in theirs.items() if k.startswith(gate) and t.ndim == 2]
        if not sizes:
            return f"{name} has {found} experts and no gate beside it says of how many"
        if found != sizes[0]:
            return f"{name} has {found} of {sizes[0]} experts"
    return None


def is_m3vit(weights: Weights) -> bool:
    """Return whether a state dict has M3ViT's experts, or its encoder under a prefix of its own.

    Other projects use these prefixes too, but put a norm, LayerScale or a head behind them.
    """
    bare = [name.removeprefix("module.") for name in weights]
    if any(".mlp.experts.h" in name for name in bare):
        return True
    inside = [n.removeprefix(p) for p in _PREFIXES for n in bare if n.startswith(p)]
    return bool(inside) and all(
        name == "dist_token" or _ENCODER_OF_BOTH.fullmatch(name) for name in inside
    )


def encoder_of(weights: Weights) -> tuple[Weights, Weights]:
    """Split a state dict of M3ViT into its encoder, without prefixes, and everything else.

    The encoder is under `backbone.` in multi-task training, `encoder.` in pretraining and bare in
    a global file; DDP puts `module.` before any of them.
    """
    bare = {name.removeprefix("module."): tensor for name, tensor in weights.items()}
    for prefix in _PREFIXES:
        if any(name.startswith(prefix) for name in bare):
            inside = {n.removeprefix(prefix): t for n, t in bare.items() if n.startswith(prefix)}
            return inside, {n: t for n, t in bare.items() if not n.startswith(prefix)}
    inside = {name: t for name, t in bare.items() if not _HEAD_OF_WRAPPER.fullmatch(name)}
    return inside, {name: t for name, t in bare.items() if name not in inside}


def _joined(split: Sequence[Weights]) -> Weights:
    """Return the first rank's tensors, with the experts of all ranks in rank order."""
    theirs = dict(split[0])
    for name in [name for name in theirs if EXPERTS_OF_MTL.fullmatch(name)]:
        lacking = [rank for rank, shard in enumerate(split) if name not in shard]
        if lacking:
            raise ValueError(f"shards {lacking} have no {name}")
        shapes = {tuple(shard[name].shape[1:]) for shard in split}
        if len(shapes) > 1:
            shown = " and ".join(map(str, sorted(shapes)))
            raise ValueError(f"{name}: the ranks' experts have shapes {shown}, must have one")
        theirs[name] = torch.cat([shard[name] for shard in split])
    return theirs


def merge_shards(shards: Sequence[Weights], *, source: str) -> MtlFile:
    """Return the global file from the state dicts of all ranks, in rank order.

    Expert tensors are joined in that order, which is that of the gate's columns, unless each rank
    has all experts already. All else is the first rank's; final norm and head are kept aside.
    """
    for shard in shards:
        check_dtypes(shard, "weights")
    split = [encoder_of(shard) for shard in shards]
    (theirs, top), num_shards = split[0], 1
    if missing_experts(theirs):
        theirs, num_shards = _joined([encoder for encoder, _ in split]), len(split)
    if problem := missing_experts(theirs):
        raise ValueError(f"with the experts of {len(shards)} ranks, {problem}")
    meta = _meta(theirs, num_shards=num_shards, source=source)
    kept = {name: tensor.float() for name, tensor in top.items() if _TOP.fullmatch(name)}
    meta["moevit"] = {"config": "{}", "dropped": kept}
    theirs = {name: tensor.float().contiguous() for name, tensor in theirs.items()}
    return MtlFile(theirs, meta, tuple(sorted(top.keys() - kept.keys())))


def dropped_weights(meta: Json) -> Weights:
    """Return the tensors that `to_mtl` set aside; none for a file that is not ours."""
    own = meta.get("moevit")
    dropped = own.get("dropped") if isinstance(own, Mapping) else None
    found = dropped.items() if isinstance(dropped, Mapping) else ()
    return {n: t for n, t in found if _TOP.fullmatch(str(n)) and isinstance(t, Tensor)}


def from_mtl(file: MtlFile) -> Weights:
    """Return the weights of a global file by our names, with those that `to_mtl` set aside.

    Raises:
        ValueError: Our model has no such parameters: gates per task, a distillation token, ...; or
            not all experts are there.
    """
    if problem := missing_experts(file.weights):
        raise ValueError(f"weights: {problem}")
    ours: Weights = {}
    unknown = []
    for name, tensor in file.weights.items():
        block, inner = _in_block(name)
        if inner in _FROM_MTL:
            ours[block + _FROM_MTL[inner]] = _our_tensor(tensor, theirs=inner)
        elif _ENCODER_OF_BOTH.fullmatch(name):
            ours[name] = tensor
        else:
            unknown.append(name)
    if unknown:
        raise ValueError(f"weights {listed(unknown)}: our ViT has no such parameters")
    dim = ours["cls_token"].shape[-1] if "cls_token" in ours else None
    for name, tensor in ours.items():
        if name.endswith("router.gate.weight") and tensor.shape[1] != dim:
            raise ValueError(
                f"weights {name}: the gate sees {tensor.shape[1]} values per token, not {dim}: "
                "gates that see the task are M3ViT's alone"
            )
    return ours | dropped_weights(file.meta)
