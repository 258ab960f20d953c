"""What to type in other projects, so that they build our network and see images as it did.

options of a run -> timm's create_model call | flags of its validation script
                 -> options of NVIDIA's ViT recipe
"""

from __future__ import annotations

import dataclasses
import json
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from options.schema import ViTOptions, height_width
from weights import formats, preprocessing
from weights.formats import Json

# What NVIDIA's recipe has under the same names; num_classes is an option of its dataset.
_NVIDIA_VIT = (
    *("img_size", "patch_size", "in_chans", "global_pool", "embed_dim", "depth", "num_heads"),
    *("mlp_ratio", "qkv_bias", "qk_norm", "scale_attn_norm", "scale_mlp_norm", "proj_bias"),
    *("init_values", "class_token", "no_embed_class", "reg_tokens", "pre_norm", "final_norm"),
    "fc_norm",
)


def _timm_model(config: Json) -> tuple[str, dict[str, object]]:
    """Return the name of timm's model of the same network, and its other arguments."""
    vit: Any = formats.option(config.get("model"), "vit")
    assert isinstance(vit, Mapping), "a section of the options"
    defaults = dataclasses.asdict(ViTOptions())
    # These do not shape the network, or the name of timm's model says them.
    skipped = (
        "weight_init",
        "fix_init",
        "grad_checkpointing",
        "drop_path_uniform",
        "distilled",
    )
    changed = {
        name: tuple(value) if isinstance(value, list) else value
        for name, value in vit.items()
        if value != defaults.get(name) and name not in skipped and not name.endswith("_rate")
    }
    # Always: else timm takes it from input_size, which is validation's.
    changed["img_size"] = height_width(vit["img_size"])
    if changed.get("pos_embed") == "sincos":  # timm loads the file's, and would train them
        del changed["pos_embed"]
    name = "deit_base_distilled_patch16_224" if vit.get("distilled") else "vit_base_patch16_224"
    return name, changed


def timm_call(config: Json, path: Path) -> str:
    """Return the Python that makes timm's model of a file written for it."""
    name, options = _timm_model(config)
    arguments: dict[str, object] = {"checkpoint_path": str(path), **options}
    if about := preprocessing.of_options(config):
        plain = {key: tuple(v) if isinstance(v, list) else v for key, v in about.items()}
        arguments["pretrained_cfg_overlay"] = plain
    given = [f"{key}={value!r}" for key, value in arguments.items()]
    return f"timm.create_model({', '.join([repr(name), *given])})"


def timm_validation(config: Json, path: Path) -> str:
    """Return the command that scores the file with timm's own validation script."""
    name, options = _timm_model(config)
    about: Any = preprocessing.of_options(config)
    # The script has flags of its own for these, and passes them beside --model-kwargs.
    pool, _, _ = (options.pop(key, None) for key in ("global_pool", "num_classes", "in_chans"))
    flags = {
        "--input-size": about["input_size"],
        "--mean": about["mean"],
        "--std": about["std"],
        "--crop-pct": [about["crop_pct"]],
        "--interpolation": [about["interpolation"]],
        "--num-classes": [about["num_classes"]],
        **({} if pool is None else {"--gp": [pool]}),
        "--model-kwargs": [f"{key}={value}" for key, value in options.items()],
    }
    words = ["--model", name, "--checkpoint", str(path)]
    for flag, values in flags.items():
        words += [flag, *map(str, values)]
    return f"python <timm>/validate.py --data-dir <dataset> {shlex.join(words)}"


def nvidia_options(config: Json) -> str:
    """Return the options with which NVIDIA's ViT recipe builds the same network.

    Raises:
        ValueError: It cannot: it has square images and patches only.
    """
    model: Any = config.get("model")
    options: dict[str, object] = {"model.transformer_engine": False}
    for name in _NVIDIA_VIT:
        value: Any = formats.option(model, f"vit.{name}")
        if name in ("img_size", "patch_size"):
            height, width = height_width(value)
            if height != width:
                raise ValueError(
                    f"config model.vit.{name}={value}: NVIDIA's ViT recipe can only do squares"
                )
            value = height
        options[f"model.vit.{name}"] = value
    about: Any = preprocessing.of_options(config)
    if about:
        transform = "dataset.val.transform_kwargs"
        options |= {f"{transform}.{key}": about[key] for key in ("mean", "std", "interpolation")}
        options |= {f"{transform}.crop_pct": about["crop_pct"]}
        options |= {f"{transform}.img_size": about["input_size"][1]}
    options["dataset.num_classes"] = formats.option(model, "vit.num_classes")
    words = [f"{name}={json.dumps(value)}".replace('"', "") for name, value in options.items()]
    return shlex.join(word.replace(" ", "") for word in words)
