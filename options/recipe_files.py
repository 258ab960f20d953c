"""Recipe files as text, before Hydra reads them: a small file must not cost much.

config/<name>.yaml and the files in its `defaults` -> check_recipe -> nothing, or ValueError
"""

from __future__ import annotations

from pathlib import Path

import yaml

MAX_NODES = 100_000  # of a file, with its aliases written out; recipes have a hundred


def _count(node: yaml.Node, counts: dict[int, int]) -> int:
    """Return how many nodes `node` has if each alias is written out.

    Raises:
        ValueError: A node contains itself.
    """
    if counts.get(id(node), 0) < 0:
        raise ValueError("a value contains itself")
    if id(node) not in counts:
        counts[id(node)] = -1
        inside = node.value if isinstance(node, yaml.CollectionNode) else []
        parts = [part for item in inside for part in (item if isinstance(item, tuple) else [item])]
        counts[id(node)] = 1 + sum(_count(part, counts) for part in parts)
    return counts[id(node)]


def _defaults(content: yaml.Node | None) -> list[str]:
    """Return the names in a file's list of defaults."""
    pairs = content.value if isinstance(content, yaml.MappingNode) else []
    lists = [value for key, value in pairs if key.value == "defaults"]
    items = lists[0].value if lists and isinstance(lists[0], yaml.SequenceNode) else []
    return [item.value for item in items if isinstance(item, yaml.ScalarNode)]


def check_recipe(path: Path, *, above: tuple[Path, ...] = ()) -> None:
    """Refuse a file that is no text, unfolds into too much, or includes itself.

    Raises:
        ValueError: One line with the file's name.
    """
    if path in above:
        chain = " -> ".join(other.stem for other in (*above[above.index(path) :], path))
        raise ValueError(f"config {path}: includes itself ({chain})")
    try:
        content = yaml.compose(path.read_text("utf-8"), Loader=yaml.SafeLoader)
        if content is not None and _count(content, {}) > MAX_NODES:
            raise ValueError(f"more than {MAX_NODES} values")
    except UnicodeDecodeError as error:
        raise ValueError(f"config {path}: not UTF-8 text: {error}") from error
    except (yaml.YAMLError, ValueError) as error:
        raise ValueError(f"config {path}: not YAML: {' '.join(str(error).split())}") from error
    except RecursionError as error:
        raise ValueError(f"config {path}: not YAML: nested too deeply") from error
    names = _defaults(content)
    if not above and not names:
        raise ValueError(f"config {path}: must begin with `defaults: [schema, _self_]`")
    for name in names:
        other = path.parent / f"{name}.yaml"
        if other.is_file():
            check_recipe(other, above=(*above, path))
