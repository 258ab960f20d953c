"""The command line: name=value of an option, read by the option's type, the same in every program.

    name=value --parse_override--> {name: value}        --flag --Parser--> argparse's namespace

An option of type str takes the characters as typed, so that any path can be given; a list of them
takes what stands between commas. Numbers are decimal: 010 is ten.
"""

from __future__ import annotations

import argparse
import dataclasses
import difflib
import re
from collections.abc import Callable, Collection, Mapping
from typing import Any, NoReturn

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from options import nvidia_names
from options.printable import printable
from options.schema import Config, walk
from options.values import expected

EXIT_USAGE = 2
_NAME = re.compile(r"[A-Za-z_][\w.]*")
_INT = re.compile(r"[+-]?\d+(_\d+)*")
_OTHER = re.compile(r"\$\{([\w.]+)\}")
_INTERPOLATION = re.compile(r"(\\*)\$\{")
_TRUTH = {"true": True, "yes": True, "y": True, "on": True, "1": True} | {
    "false": False,
    "no": False,
    "n": False,
    "off": False,
    "0": False,
}
# One item of a list: in quotes, or up to the next comma.
_ITEM = re.compile(r"""\s*(?:"([^"]*)"|'([^']*)'|([^,"']*?))\s*(,|$)""")


class Parser(argparse.ArgumentParser):
    """Says what is wrong with the flags in one line."""

    def error(self, message: str) -> NoReturn:
        """Print `message` and exit with code 2."""
        flag = re.search(r"unrecognized arguments: --(\S+)", message)
        if flag and _NAME.fullmatch(flag[1].partition("=")[0]):
            message += "; an option is name=value, without --"
        self.exit(EXIT_USAGE, f"{printable(f'error: {message} (see {self.prog} --help)')}\n")


def unknown_option(key: str) -> str:
    """Return a message that there is no option `key`, with its name here or names like it."""
    if said := nvidia_names.hint(key):
        return f"config {key}: {said}"
    options = [name for name, _, _ in walk(Config())]
    sections = sorted({name.rpartition(".")[0] for name in options} - {""})
    parent = key.rpartition(".")[0]
    siblings = [name for name in options + sections if name.rpartition(".")[0] == parent]
    near = difflib.get_close_matches(key, options + sections, n=3)
    known = f"did you mean {', '.join(near)}?" if near else ", ".join(siblings or sections)
    return f"config {key}: no such option ({known if near else f'allowed: {known}'})"


def literal(value: object) -> object:
    """Return `value` so that OmegaConf takes a ${...} in its text for these characters."""
    if isinstance(value, str):
        return _INTERPOLATION.sub(r"\1\1\\${", value)
    if isinstance(value, Mapping):
        return {key: literal(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [literal(inner) for inner in value]
    return value


def _text(text: str) -> str:
    if text == "???":  # OmegaConf's own mark for a value that is missing
        raise ValueError
    is_quoted = len(text) >= 2 and text[0] == text[-1] and text[0] in "\"'"
    return text[1:-1] if is_quoted else text


def _int(text: str) -> int:
    text = _text(text.strip())
    if not _INT.fullmatch(text):
        raise ValueError
    return int(text)


def _bool(text: str) -> bool:
    truth = _TRUTH.get(_text(text.strip()).lower())
    if truth is None:
        raise ValueError
    return truth


def _items(text: str) -> list[str]:
    """Return the items of `[a, "b, c"]`."""
    if not (text.startswith("[") and text.endswith("]")):
        raise ValueError
    inside, items, at = text[1:-1], [], 0
    while inside.strip() and at <= len(inside):
        found = _ITEM.match(inside, at)
        if found is None:
            raise ValueError
        item = next(group for group in found.groups()[:3] if group is not None)
        if not item and found[3] is not None:  # nothing between two commas, not even quotes
            raise ValueError
        items.append(item)
        at = found.end()
        if not found[4]:
            break
    return items


def _size(text: str) -> int | list[int]:
    return [_int(item) for item in _items(text)] if text.startswith("[") else _int(text)


def _refers_to(text: str, names: Collection[str]) -> bool:
    """Return whether `text` has another option's value in it, as ${training.seed}."""
    return any(other in names for other in _OTHER.findall(text))


_READERS: dict[str, Callable[[str], object]] = {
    "Any": _size,
    "bool": _bool,
    "int": _int,
    "float": lambda text: float(_text(text.strip())),
    "list[str]": _items,
    "list[int]": lambda text: [_int(item) for item in _items(text)],
    "list[float]": lambda text: [float(item) for item in _items(text)],
    "str": _text,
}


def _value(
    name: str, field: dataclasses.Field[Any], text: str, *, names: Collection[str]
) -> object:
    """Return what `text` means for an option of the declared type; `names` are all options'."""
    kinds = str(field.type).split(" | ")
    can_be_null = "None" in kinds or field.default is None
    if can_be_null and text in ("null", "Null", "NULL"):
        return None
    if _refers_to(text, names):
        return text  # OmegaConf looks it up
    for kind in (kind for kind in kinds if kind != "None"):
        try:
            return literal(_READERS[kind](text))
        except ValueError:
            continue
    allowed = f"must be {expected(field)}"
    if kinds[0].startswith("list"):
        allowed += f"; in a shell: '{name}=[a,b]'"
    raise ValueError(f"config {name}={text}: {allowed}")


def _section(override: str, name: str, text: str) -> dict[str, object]:
    """Return what a {...} gives for some options of a section, in YAML."""
    options = [option for option, _, _ in walk(Config()) if option.startswith(f"{name}.")]
    if not options:
        raise ValueError(unknown_option(name))
    try:
        values = OmegaConf.from_dotlist([f"value={text}"])["value"]
    except (YAMLError, OmegaConfBaseException) as error:
        problem = " ".join(str(error).split())
        raise ValueError(f"config {override}: the value is not YAML: {problem}") from error
    if not isinstance(values, DictConfig):
        raise ValueError(
            f"config {override}: is a section; set one of its options, as {options[0]}"
        )
    return {name: values}


def parse_override(override: str) -> dict[str, object]:
    """Return {dotted name: value} of `name=value`, an option's or {...} of a section's options.

    It is empty for what NVIDIA's recipe has as an option and always holds here.

    Raises:
        ValueError: It has no such form, the option does not exist, or the value is of another type.
    """
    name, equals, text = override.partition("=")
    if not equals or not _NAME.fullmatch(name):
        raise ValueError(f"config {override}: must be name=value of an option of options/schema.py")
    translated = nvidia_names.ours(name, text)
    if translated is None:
        return {}
    name, text = translated
    fields = {option: field for option, field, _ in walk(Config())}
    if name not in fields:
        return _section(override, name, text)
    return {name: _value(name, fields[name], text, names=fields)}


def is_given(tree: DictConfig, name: str) -> bool:
    """Return whether `tree` has a value for the option, be it one that refers to another."""
    node: Any = tree
    for part in name.split("."):
        node = node._get_node(part) if isinstance(node, DictConfig) else None
    return node is not None


def given_tree(overrides: list[str]) -> DictConfig:
    """Return the options that name=value set, as a tree; a later one wins.

    Raises:
        ValueError: All that is wrong with them, in one line.
    """
    tree, problems = OmegaConf.create(), []
    for override in overrides:
        try:
            for name, value in parse_override(override).items():
                OmegaConf.update(tree, name, value, merge=True)
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("; ".join(problems))
    return tree
