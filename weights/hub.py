"""Options of a run from what transformers writes beside a ViT's weights.

    config.json, preprocessor_config.json, weights by our names -> options_of -> options, notes

Shapes do not show the number of heads, nor how images were prepared. Source: ViTConfig, DeiTConfig,
Dinov2Config and their image processors in transformers 4.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from options.schema import Config
from weights.formats import Json, Weights

CONFIG, PREPROCESSOR = "config.json", "preprocessor_config.json"
_EPS = 1e-6  # of our LayerNorms
_FILTERS = {0: "nearest", 1: "lanczos", 2: "bilinear", 3: "bicubic"}  # by Pillow's numbers


def _whole(config: Json, name: str, default: int | None = None) -> int:
    value = config.get(name, default)
    if type(value) is not int or value < 1:
        raise ValueError(f"{CONFIG} {name}={value!r:.80}: must be a whole number from 1")
    return value


def _ratio(config: Json, width: int) -> float:
    """Return the MLP's hidden width over `width`."""
    ratio = config.get("mlp_ratio")  # of DINOv2; the others say the width itself
    if isinstance(ratio, int | float) and ratio > 0:
        return float(ratio)
    return _whole(config, "intermediate_size") / width


def _images(said: Json, img_size: int) -> dict[str, Any]:
    """Return the options of the dataset that say how an image is prepared."""
    data: dict[str, Any] = {"val": {"crop_ratio": 1.0}}
    for option, name in (("mean", "image_mean"), ("std", "image_std")):
        value = said.get(name)
        if isinstance(value, list) and len(value) == 3:
            data[option] = value
    resample = said.get("resample")
    if isinstance(resample, int) and resample in _FILTERS:
        data["interpolation"] = _FILTERS[resample]
    if said.get("do_normalize") is False:
        data |= {"mean": [0.0, 0.0, 0.0], "std": [1.0, 1.0, 1.0]}
    resized, cropped = (_side(said.get(name)) for name in ("size", "crop_size"))
    if said.get("do_center_crop") and resized is not None:
        side = img_size if cropped is None else cropped
        if side <= resized:
            data["val"] = {"crop_ratio": side / resized}
    return data


def _side(size: object) -> int | None:
    """Return the pixels of a size: a number, or one with a shortest edge or height and width."""
    if isinstance(size, dict):
        size = size.get("shortest_edge", size.get("height"))
    return size if isinstance(size, int) and size > 0 else None


def options_of(config: Json, preprocessor: Json, weights: Weights) -> tuple[Json, tuple[str, ...]]:
    """Return the options of a run with this network, and what should be said of it.

    Raises:
        ValueError: The network computes something else than ours, or a value cannot be.
    """
    width, img_size = _whole(config, "hidden_size"), _whole(config, "image_size", 224)
    if (activation := config.get("hidden_act", "gelu")) != "gelu":
        raise ValueError(f"{CONFIG} hidden_act={activation!r:.80}: must be gelu, as in our ViT")
    head, registers = weights.get("head.weight"), weights.get("reg_token")
    vit = {
        "img_size": img_size,
        "patch_size": _whole(config, "patch_size", 16),
        "in_chans": _whole(config, "num_channels", 3),
        "embed_dim": width,
        "depth": _whole(config, "num_hidden_layers"),
        "num_heads": _whole(config, "num_attention_heads"),
        "mlp_ratio": _ratio(config, width),
        "qkv_bias": "blocks.0.attn.qkv.bias" in weights,
        "init_values": 1e-5 if "blocks.0.ls1.gamma" in weights else None,
        "distilled": "dist_token" in weights,
        "reg_tokens": 0 if registers is None else registers.shape[1],
        "no_embed_class": registers is not None,
        "num_classes": 0 if head is None else len(head),
    }
    options: dict[str, Any] = dataclasses.asdict(Config())
    options["model"]["vit"] |= vit
    images = _images(preprocessor, img_size)
    options["dataset"]["val"] |= images.pop("val")
    options["dataset"] |= images
    notes = []
    if (eps := config.get("layer_norm_eps", _EPS)) != _EPS:
        notes.append(f"LayerNorms have eps {eps!r:.80}, ours have {_EPS}: logits differ slightly")
    if not preprocessor:
        notes.append(
            f"no {PREPROCESSOR} beside it: set dataset.mean, dataset.std, dataset.interpolation "
            "and dataset.val.crop_ratio yourself"
        )
    side = _side(preprocessor.get("crop_size"))
    if preprocessor.get("do_center_crop") and side not in (None, img_size):
        notes.append(
            f"{PREPROCESSOR} makes images of {side} pixels, and the positions are those of "
            f"{img_size}, at which it runs here"
        )
    return options, tuple(notes)
