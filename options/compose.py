"""From YAML and command line to validated options, and from options to documentation.

    config/<name>.yaml + overrides --Hydra--> DictConfig --compose--> Config --> train.py

Every mistake is a ValueError of one line that names the field, the value and what is allowed.
"""

from __future__ import annotations

import dataclasses
import difflib
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from options.checks import validate
from options.schema import Config, walk

CONFIG_DIR = Path(__file__).resolve().parents[1] / "config"
_NAME = re.compile(r"[A-Za-z_][\w.]*")


def _thaw(node: DictConfig) -> DictConfig:
    """Let Hydra write to a node made from frozen dataclasses (OmegaConf marks them read-only)."""
    OmegaConf.set_readonly(node, None)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            _thaw(child)
    return node


def _unknown(key: str) -> str:
    """Return a message that there is no option `key`, with names like it."""
    options = [name for name, _, _ in walk(Config())]
    sections = sorted({name.rpartition(".")[0] for name in options} - {""})
    parent = key.rpartition(".")[0]
    siblings = [name for name in options + sections if name.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(key, options + sections, n=3)
    return f"config {key}: no such option (allowed: {', '.join(near or siblings or sections)})"


def _added(name: str, overrides: list[str]) -> str:
    """Return the dotted key of the override that added `name` to its section."""
    keys = [override.lstrip("+").partition("=")[0] for override in overrides]
    return next((key for key in keys if key.rpartition(".")[2] == name), name)


def _one_line(error: Exception) -> str:
    """Return OmegaConf's or Hydra's complaint in one line: field, value, what is allowed."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    if cause is None or not cause.full_key:
        return f"config: {' '.join(str(error).split())}"
    key, first = str(cause.full_key), str(cause.msg).splitlines()[0]
    return _unknown(key) if first.startswith("Key ") else f"config {key}: {first}"


def _check_root(config: Config, overrides: list[str]) -> Config:
    """Return `config`; refuse a folder on the command line that path_env would replace.

    A recipe may have both: it names a folder for those who set no path_env.
    """
    path_env = config.dataset.path_env
    for override in overrides:
        if path_env is not None and override.partition("=")[0] == "dataset.train.root":
            raise ValueError(f"config {override}: has no effect with dataset.path_env={path_env}")
    return config


def compose(config_name: str, overrides: list[str], *, config_dir: Path = CONFIG_DIR) -> Config:
    """Return the validated options of `config_dir/config_name.yaml` with `overrides` on top.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: An option is unknown, of the wrong type or out of range.
    """
    config_name = config_name.removesuffix(".yaml")
    path = config_dir / f"{config_name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(other.stem for other in config_dir.glob("*.yaml")))
        raise FileNotFoundError(f"config {path}: not found (there are: {names})")
    for override in overrides:
        if override.startswith(("~", "hydra")):
            raise ValueError(
                f"config {override}: must be name=value of an option of options/schema.py"
            )
    ConfigStore.instance().store(name="schema", node=_thaw(OmegaConf.structured(Config)))
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(config_dir.resolve())):
            composed = hydra_compose(config_name, overrides)
        config = OmegaConf.to_object(composed)
    except dataclasses.FrozenInstanceError as error:  # `+key=value` adds a field
        raise ValueError(_unknown(_added(str(error).split("'")[1], overrides))) from error
    except YAMLError as error:
        raise ValueError(f"config {path}: not YAML: {' '.join(str(error).split())}") from error
    except (HydraException, OmegaConfBaseException) as error:
        raise ValueError(_one_line(error)) from error
    if not isinstance(config, Config):
        raise ValueError(f"config {path}: must begin with `defaults: [schema, _self_]`")
    return _check_root(validate(config), overrides)


def _parse(override: str) -> DictConfig:
    """Return the options that `name=value` sets; refuse one value for a whole section."""
    name, equals, _ = override.partition("=")
    if not equals or not _NAME.fullmatch(name):
        raise ValueError(f"config {override}: must be name=value of an option of options/schema.py")
    try:
        given = OmegaConf.from_dotlist([override])
    except YAMLError as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"config {override}: the value is not YAML: {problem}") from error
    inside = [option for option, _, _ in walk(Config()) if option.startswith(f"{name}.")]
    if inside and not isinstance(OmegaConf.select(given, name), DictConfig):
        raise ValueError(f"config {override}: is a section; set one of its options, as {inside[0]}")
    return given


def given_options(overrides: list[str]) -> dict[str, object]:
    """Return dotted name -> value of the options that name=value set, alone or as a section.

    Raises:
        ValueError: An override is not name=value, or gives a whole section one value.
    """
    given = [_parse(override) for override in overrides]
    merged = OmegaConf.merge(*given) if given else OmegaConf.create()
    marker = object()
    found = {name: OmegaConf.select(merged, name, default=marker) for name, _, _ in walk(Config())}
    return {name: value for name, value in found.items() if value is not marker}


def restore(values: Mapping[str, object], overrides: list[str]) -> Config:
    """Return the validated options of a `dataclasses.asdict(config)` that was read from JSON.

    Options missing there, from before they existed, get their defaults; `overrides` are name=value.

    Raises:
        ValueError: An option is unknown, of the wrong type or out of range.
    """
    try:
        given = [_parse(override) for override in overrides]
        merged = OmegaConf.merge(_thaw(OmegaConf.structured(Config)), dict(values), *given)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(_one_line(error)) from error
    assert isinstance(config, Config), "the structured config is merged first"
    return _check_root(validate(config), overrides)


def to_yaml(config: Config | dict[str, Any]) -> str:
    """Return options, or the `dataclasses.asdict` of some, as YAML in order of declaration."""
    if isinstance(config, dict):
        return OmegaConf.to_yaml(OmegaConf.create(config))
    return OmegaConf.to_yaml(OmegaConf.structured(config))


def options_table() -> str:
    """Return a Markdown table of every option, for docs/config.md and `--help`."""
    rows = ["| option | default | range | meaning |", "|---|---|---|---|"]
    for name, field, value in walk(Config()):
        data = field.metadata
        allowed = ", ".join(str(c) if c != "" else '""' for c in data["choices"] or ())
        signs = {"low": ">=", "high": "<=", "below": "<"}
        bounds = [f"{sign} {data[key]}" for key, sign in signs.items() if data[key] is not None]
        shown = "null" if value is None else f'"{value}"' if value == "" else value
        rows.append(f"| `{name}` | {shown} | {allowed or ', '.join(bounds)} | {data['doc']} |")
    return "\n".join(rows).replace("None", "null")
