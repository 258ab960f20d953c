"""How an image becomes a network's input, in the words of timm's `pretrained_cfg`.

    options of a run -> of_options -> mean, std, interpolation, crop_pct, input_size, num_classes
    what a file says and what is asked for -> differences -> one line, or None

Names and shapes do not show any of it: with another normalisation the same weights score worse, and
nothing fails. So it travels with the weights, as JSON under `pretrained_cfg`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from options.schema import height_width
from weights import files
from weights.formats import Json

KEY = "pretrained_cfg"
_NUMBERS, _ONE_NUMBER, _WORD = ("mean", "std"), "crop_pct", "interpolation"
_NAMES = {
    "mean": "dataset.mean",
    "std": "dataset.std",
    _WORD: "dataset.interpolation",
    _ONE_NUMBER: "dataset.val.crop_ratio",
}


def of_options(config: Json) -> Json:
    """Return what validation does with an image in a run with these options; {} if they lack any.

    Images are resized to cover input_size / crop_pct and cropped in the centre, as in timm.
    """
    options: Any = config
    try:
        data, vit = options["dataset"], options["model"]["vit"]
        return {
            "mean": list(data["mean"]),
            "std": list(data["std"]),
            "interpolation": data["interpolation"],
            "crop_pct": data["val"]["crop_ratio"],
            "input_size": [
                vit["in_chans"],
                *height_width(data["val"]["img_size"] or vit["img_size"]),
            ],
            "num_classes": vit["num_classes"],
        }
    except (LookupError, TypeError):  # of an older version, or edited by hand
        return {}


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def parse(found: object) -> Json:
    """Return what a `pretrained_cfg`, or its JSON, says of images; other values are left out."""
    try:
        said = json.loads(found) if isinstance(found, str) else found
    except (ValueError, RecursionError):
        return {}
    if not isinstance(said, Mapping):
        return {}
    known: dict[str, object] = {}
    for name in _NUMBERS:
        value = said.get(name)
        if isinstance(value, list | tuple) and len(value) == 3 and all(map(_is_number, value)):
            known[name] = [float(number) for number in value]
    if _is_number(said.get(_ONE_NUMBER)):
        known[_ONE_NUMBER] = said[_ONE_NUMBER]
    if isinstance(said.get(_WORD), str):
        known[_WORD] = said[_WORD]
    return known


def of_file(path: Path) -> Json:
    """Return what a file of weights says of its images, whatever the model; {} if nothing."""
    is_safetensors = path.suffix == ".safetensors"
    try:
        found = files.read_safetensors(path)[1] if is_safetensors else files.read_pickle(path)
    except ValueError:  # it has more than weights and plain values, so it is none of ours
        return {}
    return parse(found.get(KEY)) if isinstance(found, dict) else {}


def differences(trained: Json, asked: Json) -> str | None:
    """Say how images were prepared in training and are not now; None if alike, or if unknown."""
    differing = [
        f"{option}={_shown(trained[name])}, not {_shown(asked[name])}"
        for name, option in _NAMES.items()
        if name in trained and name in asked and trained[name] != asked[name]
    ]
    return f"its images were prepared with {'; '.join(differing)}" if differing else None


def _shown(value: object) -> str:
    return f"[{','.join(map(str, value))}]" if isinstance(value, list) else str(value)
