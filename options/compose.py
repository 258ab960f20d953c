"""From YAML and command line to validated options, and from options to documentation.

    config/<name>.yaml + overrides --Hydra--> DictConfig --compose--> Config --> train.py

Every mistake is a ValueError of one line that names the field, the value and what is allowed.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from options.checks import validate
from options.command_line import given_tree, is_given, literal, unknown_option
from options.recipe_files import check_recipe
from options.schema import Config, walk
from options.values import expected

CONFIG_DIR = Path(__file__).resolve().parents[1] / "config"


def _thaw(node: DictConfig) -> DictConfig:
    """Let Hydra write to a node made from frozen dataclasses (OmegaConf marks them read-only)."""
    OmegaConf.set_readonly(node, None)
    for key in node:
        child = node._get_node(key)
        if isinstance(child, DictConfig):
            _thaw(child)
    return node


def _one_line(error: Exception) -> str:
    """Return OmegaConf's or Hydra's complaint in one line: field, value, what is allowed."""
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__  # Hydra's is of no help, and hides it
    if cause is None:
        return f"config: {' '.join(str(error).split())}"
    key, first = str(cause.full_key or ""), str(cause.msg).splitlines()[0]
    if first.startswith("Key "):
        return unknown_option(key)
    if not key:
        return f"config: a section's options must be set one by one, not all to a value: {first}"
    fields = {name: field for name, field, _ in walk(Config())}
    allowed = f"; must be {expected(fields[key])}" if key in fields else ""
    return f"config {key}: {first}{allowed}"


def _check_root(config: Config, overrides: list[str]) -> Config:
    """Return `config`; refuse a folder on the command line that path_env would replace.

    A recipe may have both: it names a folder for those who set no path_env.
    """
    path_env = config.dataset.path_env
    for override in overrides:
        if path_env is not None and override.partition("=")[0] == "dataset.train.root":
            raise ValueError(f"config {override}: has no effect with dataset.path_env={path_env}")
    return config


def _fit_warmup(
    recipe: DictConfig, merged: DictConfig, given: DictConfig, note: Callable[[str], None]
) -> None:
    """Shorten the recipe's warm-up with its run, if `given` makes that shorter than the warm-up."""
    key = "optimizer.warmup_steps"
    if is_given(given, key):
        return
    steps, planned, warmup = (
        OmegaConf.select(tree, name, throw_on_resolution_failure=False)
        for tree, name in ((merged, "training.steps"), (recipe, "training.steps"), (recipe, key))
    )
    are_known = all(isinstance(number, int) for number in (steps, planned, warmup))
    if are_known and 0 < steps < warmup <= planned:
        fitting = max(1, round(warmup * steps / planned))
        OmegaConf.update(merged, key, fitting)
        note(
            f"note: {key}={fitting}: the recipe's {warmup} of {planned} steps, scaled to "
            f"training.steps={steps}"
        )


def compose(
    config_name: str,
    overrides: list[str],
    *,
    config_dir: Path = CONFIG_DIR,
    note: Callable[[str], None] = lambda line: None,
) -> Config:
    """Return the validated options of `config_dir/config_name.yaml` with `overrides` on top.

    `note` is told what was fitted to the overrides.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: An option is unknown, of the wrong type or out of range.
    """
    config_name = config_name.removesuffix(".yaml")
    path = config_dir / f"{config_name}.yaml"
    if not path.is_file():
        names = ", ".join(sorted(other.stem for other in config_dir.glob("*.yaml")))
        raise FileNotFoundError(f"config {path}: not found (there are: {names})")
    check_recipe(path)
    given = given_tree(overrides)
    ConfigStore.instance().store(name="schema", node=_thaw(OmegaConf.structured(Config)))
    try:
        with initialize_config_dir(version_base="1.3", config_dir=str(config_dir.resolve())):
            composed = hydra_compose(config_name)
        merged = OmegaConf.merge(composed, given)
        assert isinstance(merged, DictConfig), "as both are"
        _fit_warmup(composed, merged, given, note)
        config = OmegaConf.to_object(merged)
    except HydraException as error:
        raise ValueError(f"{_one_line(error)} (recipe {path})") from error
    except OmegaConfBaseException as error:
        raise ValueError(_one_line(error)) from error
    if not isinstance(config, Config):
        raise ValueError(f"config {path}: must begin with `defaults: [schema, _self_]`")
    return _check_root(validate(config), overrides)


def given_options(overrides: list[str]) -> dict[str, object]:
    """Return dotted name -> value of the options that name=value set, alone or as a section.

    Raises:
        ValueError: An override is not name=value, or gives a whole section one value.
    """
    given = given_tree(overrides)
    return {
        name: OmegaConf.select(given, name, throw_on_resolution_failure=False)
        for name, _, _ in walk(Config())
        if is_given(given, name)
    }


def restore(values: Mapping[str, object], overrides: list[str]) -> Config:
    """Return the validated options of a `dataclasses.asdict(config)` that was read from JSON.

    Options missing there, from before they existed, get their defaults; `overrides` are name=value.

    Raises:
        ValueError: An option is unknown, of the wrong type or out of range.
    """
    given = given_tree(overrides)
    try:
        known = {name: literal(value) for name, value in values.items()}
        merged = OmegaConf.merge(_thaw(OmegaConf.structured(Config)), known, given)
        config = OmegaConf.to_object(merged)
    except OmegaConfBaseException as error:
        raise ValueError(_one_line(error)) from error
    assert isinstance(config, Config), "the structured config is merged first"
    return _check_root(validate(config), overrides)


def to_yaml(config: Config | dict[str, Any]) -> str:
    """Return options, or the `dataclasses.asdict` of some, as YAML in order of declaration."""
    values = config if isinstance(config, dict) else dataclasses.asdict(config)
    return OmegaConf.to_yaml({name: literal(value) for name, value in values.items()})


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
