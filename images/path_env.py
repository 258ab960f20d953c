"""Where datasets are on this machine: a file of names and folders, outside the recipes.

    dataset_roots:
      imagenet: ${DATA}/imagenet     # variables of the environment and ~ are filled in

Other keys, which may be secrets of other programs, are not read; no value is ever printed.
"""

from __future__ import annotations

from pathlib import Path

import yaml

from parallel import distributed

KEY = "dataset_roots"


def read_root(path: Path, name: str | None) -> Path:
    """Return the folder of dataset `name`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: It has no such name, or a variable in the folder is not set.
    """
    where = f"config dataset.path_env={path}"
    if not path.is_file():
        raise FileNotFoundError(f"{where}: not found")
    try:
        content = yaml.safe_load(path.read_text("utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f" (line {mark.line + 1})" if mark else ""
        # Not `from error`: its text quotes the file.
        raise ValueError(f"{where}: is not YAML{line}") from None
    roots = content.get(KEY) if isinstance(content, dict) else None
    if not isinstance(roots, dict) or not all(isinstance(root, str) for root in roots.values()):
        raise ValueError(f"{where}: must have {KEY}: with lines of name: folder")
    if name not in roots:
        raise ValueError(f"config dataset.name={name}: must be one of {', '.join(roots)} in {path}")
    try:
        return distributed.expand_path(roots[name])
    except ValueError as error:
        raise ValueError(f"{where}: {KEY}.{name}: {error}") from error
