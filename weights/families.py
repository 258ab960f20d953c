"""Weights of other projects' ViTs by our names.

    any file's names -> wrappers off -> one network of several -> its family's names -> ours

| read                               | told by                                | left out        |
|------------------------------------|----------------------------------------|-----------------|
| timm, DeiT, DINO, MAE, and ours    | patch_embed.proj                       | mask, decoder   |
| NVIDIA's ViT recipe                | pos_embed.pos_embed                    |                 |
| DINOv2, with registers or without  | register_tokens, blocks.<chunk>.<i>    | mask            |
| ViT, DeiT, DINOv2 of transformers  | embeddings.patch_embeddings.projection | mask, pooler    |
| vit_b_16 and others of torchvision | conv_proj                              |                 |

DDP, torch.compile, FSDP and classes around a network put words before names: all are taken off, in
any nesting. What is left out, and which of several networks was taken, is in the notes. A name
that nobody knows is an error with the family that it looks like. No files, no models here. Sources:
the state dicts of timm 1.0, torchvision 0.2x, transformers 4, facebookresearch/{mae,dinov2}.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch

from weights import formats
from weights.formats import Weights, listed

# Around any module, also in the middle of a name.
_WRAPPERS = re.compile(
    r"(?:(?<=\.)|^)(?:_orig_mod|module|_fsdp_wrapped_module|_checkpoint_wrapped_module)\."
)
# The first parameter of each family; what stands before it stands before the whole network.
_ANCHOR = re.compile(
    r"(?P<prefix>(?:[^.]+\.)*?)"
    r"(?:patch_embed\.proj|embeddings\.patch_embeddings\.projection|conv_proj)\.weight"
)
# Networks that training keeps beside the one that people use.
_SECOND_CHOICE = re.compile(r"(?:^|\.)(?:student|momentum_encoder|target_encoder)\.")
# What a class around the network calls its heads.
_HEADS_BESIDE = re.compile(
    r"(?:head|head_dist|classifier|cls_classifier|distillation_classifier)\.(?:weight|bias)"
)
_UNUSED = re.compile(r"mask_token|decoder_.+|decoder\..+|pooler\..+")
TRANSFORMERS, TORCHVISION = "transformers", "torchvision"
_RENAMES: Mapping[str, tuple[tuple[str, str], ...]] = {
    "": (
        (r"pos_embed\.(pos_embed|cls_token|reg_token)", r"\1"),  # NVIDIA's recipe
        (r"blocks\.\d+\.(\d+\..+)", r"blocks.\1"),
        (r"blocks\.(\d+)\.gamma_([12])", r"blocks.\1.ls\2.gamma"),  # DeiT III
    ),
    TRANSFORMERS: (
        (r"embeddings\.(cls_token|register_tokens|mask_token)", r"\1"),
        (r"embeddings\.distillation_token", "dist_token"),
        (r"embeddings\.position_embeddings", "pos_embed"),
        (r"embeddings\.patch_embeddings\.projection\.(\w+)", r"patch_embed.proj.\1"),
        (r"encoder\.layer\.(\d+)\.attention\.output\.dense\.(\w+)", r"blocks.\1.attn.proj.\2"),
        (r"encoder\.layer\.(\d+)\.intermediate\.dense\.(\w+)", r"blocks.\1.mlp.fc1.\2"),
        (r"encoder\.layer\.(\d+)\.output\.dense\.(\w+)", r"blocks.\1.mlp.fc2.\2"),
        (r"encoder\.layer\.(\d+)\.(?:layernorm_before|norm1)\.(\w+)", r"blocks.\1.norm1.\2"),
        (r"encoder\.layer\.(\d+)\.(?:layernorm_after|norm2)\.(\w+)", r"blocks.\1.norm2.\2"),
        (r"encoder\.layer\.(\d+)\.layer_scale([12])\.lambda1", r"blocks.\1.ls\2.gamma"),
        (r"encoder\.layer\.(\d+)\.mlp\.(fc[12]\.\w+)", r"blocks.\1.mlp.\2"),
        (r"layernorm\.(\w+)", r"norm.\1"),
        (r"(?:cls_)?classifier\.(\w+)", r"head.\1"),
        (r"distillation_classifier\.(\w+)", r"head_dist.\1"),
    ),
    TORCHVISION: (
        (r"class_token", "cls_token"),
        (r"encoder\.pos_embedding", "pos_embed"),
        (r"conv_proj\.(\w+)", r"patch_embed.proj.\1"),
        (r"encoder\.layers\.encoder_layer_(\d+)\.ln_([12])\.(\w+)", r"blocks.\1.norm\2.\3"),
        (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.in_proj_(\w+)",
         r"blocks.\1.attn.qkv.\2"),
        (r"encoder\.layers\.encoder_layer_(\d+)\.self_attention\.out_proj\.(\w+)",
         r"blocks.\1.attn.proj.\2"),
        (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:0|linear_1)\.(\w+)",
         r"blocks.\1.mlp.fc1.\2"),
        (r"encoder\.layers\.encoder_layer_(\d+)\.mlp\.(?:3|linear_2)\.(\w+)",
         r"blocks.\1.mlp.fc2.\2"),
        (r"encoder\.ln\.(\w+)", r"norm.\1"),
        (r"heads\.head\.(\w+)", r"head.\1"),
    ),
}  # fmt: skip
_QKV = re.compile(r"encoder\.layer\.(\d+)\.attention\.attention\.(query|key|value)\.(weight|bias)")
# Networks that people take for a ViT of ours, by a name that no other has.
_LOOKALIKES = {
    "Swin": r"relative_position_bias_table.*|layers\.\d+\.blocks\..+",
    "BEiT": r"blocks\.\d+\.attn\.[qv]_bias|.*relative_position_bias.*",
    "CLIP": r"(?:visual\.)?transformer\.resblocks\..+|vision_model\..+|text_model\..+",
    "Segment Anything": r".*\.rel_pos_[hw]",
    "a ViT with SwiGLU (EVA, DINOv2 giant)": r".*\.mlp\.(?:w12|w3|fc1_g|weights_in)\..+",
    "CaiT": r"blocks_token_only\..+",
    "ConvNeXt": r"stages\.\d+\.(?:blocks\.)?\d+\.(?:conv_dw|dwconv|gamma).*",
    "ResNet": r"(?:layer\d+\.\d+\.)?(?:conv1|bn1)\..+",
    "Megatron's GPT or ViT": r".*self_attention\.(?:query_key_value|linear_qkv)\..+",
    "a ViT of PyTorch Lightning or of a class around one": r"(?:net|vit|encoder|backbone)\..+",
}
ADVICE = (
    "docs/init.md lists what is read; for anything else rename the tensors to timm's names and "
    "torch.save({'model': weights}, path)"
)


class Translated(NamedTuple):
    """Weights by our names, what should be said about them, and whose names they had ("": timm)."""

    weights: Weights
    notes: tuple[str, ...]
    family: str


def unwrapped(weights: Weights) -> Weights:
    """Return the weights without what DDP, FSDP and torch.compile add to names, wherever it is.

    Raises:
        ValueError: Two names become one.
    """
    bare: Weights = {}
    for name, tensor in weights.items():
        short = _WRAPPERS.sub("", name)
        if short in bare:
            raise ValueError(f"weights {name}: another tensor is {short} too")
        bare[short] = tensor
    return bare


def _prefix(names: Iterable[str]) -> str:
    """Return what stands before the network's names, of several that before the best one's."""
    matches = [match for name in names if (match := _ANCHOR.fullmatch(name))]
    found = sorted({match["prefix"] for match in matches})
    chosen = [prefix for prefix in found if not _SECOND_CHOICE.search(prefix)] or found
    if len(chosen) > 1:
        shown = ", ".join(prefix or "nothing" for prefix in chosen)
        raise ValueError(
            f"weights of several networks, whose names begin with {shown}: save the one that you "
            "want alone"
        )
    return chosen[0] if chosen else ""


def _one_network(weights: Weights) -> tuple[Weights, tuple[str, ...]]:
    """Return the network, without what stands before its names, and a note of what is not in it."""
    prefix = _prefix(weights)
    if not prefix:
        return weights, ()
    inside = {n.removeprefix(prefix): t for n, t in weights.items() if n.startswith(prefix)}
    rest = []
    for name, tensor in weights.items():
        head = ".".join(name.split(".")[-2:])
        is_beside = prefix.startswith(name.removesuffix(head)) and head not in inside
        if is_beside and _HEADS_BESIDE.fullmatch(head):
            inside[head] = tensor
        elif not name.startswith(prefix):
            rest.append(name)
    left_out = f"; left out {listed(rest)}" if rest else ""
    return inside, (f"took the network whose names begin with {prefix}{left_out}",)


def _renamed(name: str, family: str) -> str:
    for pattern, ours in _RENAMES[family]:
        if match := re.fullmatch(pattern, name):
            return match.expand(ours)
    return name


def _joined_qkv(parts: Mapping[tuple[str, str], Weights]) -> Weights:
    """Return qkv [3D, D] and its bias [3D] of each block from its query, key and value."""
    joined: Weights = {}
    for (block, kind), found in parts.items():
        name = f"blocks.{block}.attn.qkv.{kind}"
        lacking = [part for part in ("query", "key", "value") if part not in found]
        shapes = {tuple(tensor.shape) for tensor in found.values()}
        if lacking or len(shapes) > 1 or () in shapes:
            raise ValueError(
                f"weights encoder.layer.{block}.attention.attention: query, key and value must be "
                f"there and alike to make {name}"
            )
        joined[name] = torch.cat([found["query"], found["key"], found["value"]])
    return joined


def _with_registers(weights: Weights) -> Weights:
    """Return DINOv2's weights with positions for patches alone, as our `no_embed_class` has them.

    Its registers have no position and its class token has one, which is added to it here, as timm
    does.
    """
    kept = {name: tensor for name, tensor in weights.items() if name != "register_tokens"}
    pos_1LD, cls_11D = kept.get("pos_embed"), kept.get("cls_token")
    if pos_1LD is None or cls_11D is None or pos_1LD.ndim != 3 or cls_11D.ndim != 3:
        raise ValueError("weights register_tokens: need cls_token and pos_embed, [1, tokens, D]")
    kept |= {"cls_token": cls_11D + pos_1LD[:, :1], "pos_embed": pos_1LD[:, 1:]}
    return {**kept, "reg_token": weights["register_tokens"]}


def _unknown(weights: Weights, unknown: list[str], prefix: str) -> ValueError:
    """Return the error of names that we lack: what they look like, and the way out."""
    families = [
        family
        for family, pattern in _LOOKALIKES.items()
        if any(re.fullmatch(pattern, name) for name in unknown)
    ]
    looks = f"; they look like {families[0]}" if families else ""
    common = f"; all names begin with {prefix}" if prefix else ""
    return ValueError(
        f"weights {listed(unknown)}: our ViT has no such parameters{looks}{common} "
        f"({len(weights) - len(unknown)} of {len(weights)} are known); {ADVICE}"
    )


def _common_prefix(names: Iterable[str]) -> str:
    first, *rest = (name.split(".")[:-1] for name in names)
    words = first
    for other in rest:
        same = [a == b for a, b in zip(words, other, strict=False)]
        words = words[: (same.index(False) if False in same else len(same))]
    return "".join(f"{word}." for word in words)


def _family_of(names: Iterable[str]) -> str:
    for name in names:
        if name.startswith("embeddings.patch_embeddings."):
            return TRANSFORMERS
        if name.startswith("conv_proj."):
            return TORCHVISION
    return ""


def _num_dims(name: str) -> int | None:
    """Return how many dimensions a tensor of that name has, ours or M3ViT's; None: any number."""
    if ".mlp.experts." in name:
        return 3 if formats.EXPERTS_OF_MTL.fullmatch(name) and name.endswith("weight") else 2
    if name.endswith((".mlp.router.gate.weight", ".mlp.gate.w_gate")):
        return 2
    if not formats.DENSE.fullmatch(name):
        return None
    if name.endswith(("_token", "pos_embed", "latent")):
        return 3
    if name == "patch_embed.proj.weight":
        return 4
    is_norm = re.search(r"norm(_pre|[12])?\.weight$", name)
    return 1 if is_norm or name.endswith((".bias", ".gamma")) else 2


def check_tensors(weights: Weights) -> None:
    """Refuse what cannot be a parameter of its name, ours or M3ViT's.

    Raises:
        ValueError: A tensor has the wrong number of dimensions.
    """
    for name, tensor in weights.items():
        num_dims = _num_dims(name)
        if num_dims not in (None, tensor.ndim):
            shape = tuple(tensor.shape)
            raise ValueError(f"weights {name} {shape}: must have {num_dims} dimensions")


def translate(weights: Weights) -> Translated:
    """Return the weights of any family by our names.

    Raises:
        ValueError: A name is known to no family, or a tensor has another number of dimensions.
    """
    bare = unwrapped(weights)
    network, notes = _one_network(bare)
    family = _family_of(network)
    ours: Weights = {}
    parts: dict[tuple[str, str], Weights] = {}
    unused = []
    for name, tensor in network.items():
        if family == TRANSFORMERS and (match := _QKV.fullmatch(name)):
            parts.setdefault((match[1], match[3]), {})[match[2]] = tensor
            continue
        renamed = _renamed(name, family)
        if _UNUSED.fullmatch(renamed):
            unused.append(name)
        elif renamed in ours:
            raise ValueError(f"weights {name}: another tensor is {renamed} too")
        else:
            ours[renamed] = tensor
    ours |= _joined_qkv(parts)
    if formats.is_nvidia(network):
        notes += (formats.NVIDIA_EPS,)
    if unused:
        notes += (f"left out {listed(unused)}",)
    if "register_tokens" in ours:
        count = ours["register_tokens"].shape[1:2]
        ours = _with_registers(ours)
        needed = f"model.vit.reg_tokens={count[0]} model.vit.no_embed_class=true"
        notes += (f"registers without positions: the model needs {needed}",)
    if unknown := formats.unknown_names(ours):
        raise _unknown(network, unknown, _common_prefix(bare))
    check_tensors(ours)
    return Translated(formats.from_timm(ours), notes, family)
