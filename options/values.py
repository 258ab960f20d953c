"""Each value against its option's declaration, and problems collected to be told all at once.

options dataclass -> check_values -> ValueError "config a=1: must be ...; config b=2: ..."
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

from options.schema import walk

# How a value of each declared type is called.
WORDS = {
    "Any": "a positive number of pixels or [height, width]",
    "bool": "true or false",
    "int": "a whole number",
    "float": "a number",
    "str": "text",
    "list[str]": "a list of names",
    "list[int]": "a list of whole numbers",
    "list[float]": "a list of numbers",
    "None": "null",
}
_TYPES: dict[str, Any] = {"bool": bool, "int": int, "float": (int, float), "str": str}
MAX_SIDE_PX = 2**16
LARGEST = 2**53  # whole numbers beyond it are not exact in JSON, nor as fp64


def expected(field: dataclasses.Field[Any]) -> str:
    """Return in words what an option's value must be, by its declaration."""
    if (choices := field.metadata["choices"]) is not None:
        names = ("null" if c is None else '""' if c == "" else str(c) for c in choices)
        return f"one of {', '.join(names)}"
    kinds = str(field.type).split(" | ")
    if field.default is None and "None" not in kinds:
        kinds.append("None")
    return " or ".join(WORDS[kind] for kind in kinds)


def _has_type(value: object, kind: str) -> bool:
    if kind in ("Any", "None"):
        return kind == "Any" or value is None
    if kind.startswith("list"):
        inner = kind.removeprefix("list[").removesuffix("]")
        return isinstance(value, list | tuple) and all(_has_type(item, inner) for item in value)
    is_bool = isinstance(value, bool)
    return isinstance(value, _TYPES[kind]) and is_bool == (kind == "bool")


def _problem(value: object, field: dataclasses.Field[Any]) -> str | None:
    """Return how one value, or one of a list's, violates its declaration; None if it does not."""
    metadata, choices = field.metadata, field.metadata["choices"]
    if choices is not None and (value not in choices or isinstance(value, bool)):
        return f"must be {expected(field)}"
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    low, high, below = (metadata[name] for name in ("low", "high", "below"))
    bounds = {
        "must be a finite number": isinstance(value, int) or math.isfinite(value),
        f"must be at least {low}": low is None or value >= low,
        f"must be at most {high}": high is None or value <= high,
        f"must be less than {below}": below is None or value < below,
        "must be less than 2^53": isinstance(value, float) or abs(value) < LARGEST,
    }
    return next((allowed for allowed, is_met in bounds.items() if not is_met), None)


def _is_size(value: object) -> bool:
    sides: Any = value if isinstance(value, list | tuple) and len(value) == 2 else [value]
    return all(_has_type(side, "int") and 0 < side <= MAX_SIDE_PX for side in sides)


class Problems:
    """What is wrong with the options, collected so that a user hears of all of it at once."""

    def __init__(self) -> None:
        self.lines: list[str] = []

    def section(self, name: str, values: object) -> Section:
        """Return a section of the options, to check."""
        return Section(name, values, self)

    def stop_if_any(self) -> None:
        """Raise ValueError with every problem, in one line."""
        if self.lines:
            raise ValueError("; ".join(dict.fromkeys(self.lines)))


class Section:
    """One section of the options, with its name for messages."""

    def __init__(self, name: str, values: object, problems: Problems) -> None:
        self.name, self.values, self._problems = name, values, problems

    def require(self, is_ok: bool, field: str, allowed: str) -> None:
        """Note a problem with one of the section's fields unless `is_ok`."""
        if not is_ok:
            value = getattr(self.values, field)
            shown = '""' if value == "" else "null" if value is None else value
            self._problems.lines.append(f"config {self.name}.{field}={shown}: {allowed}")

    def refuse_changed(self, *fields: str, why: str) -> None:
        """Note each of the fields, which have no effect, that was set."""
        default = type(self.values)()
        for field in fields:
            is_default = getattr(self.values, field) == getattr(default, field)
            self.require(is_default, field, f"has no effect with {why}")


def _value_problem(value: object, field: dataclasses.Field[Any]) -> tuple[object, str] | None:
    """Return (what, how it violates the declaration) of an option's value, None if it does not."""
    kinds = str(field.type).split(" | ")
    can_be_null = value is None and field.default is None
    if not (can_be_null or any(_has_type(value, kind) for kind in kinds)):
        return value, f"must be {expected(field)}"
    if field.metadata["is_size"]:
        return None if can_be_null or _is_size(value) else (value, f"must be {WORDS['Any']}")
    for item in value if isinstance(value, list | tuple) else [value]:
        if problem := _problem(item, field):
            return item, problem
    length = field.metadata["length"]
    if length is not None and len(value) != length:  # type: ignore[arg-type]
        return value, f"must have {length} values"
    return None


def check_values(options: object, prefix: str = "") -> None:
    """Raise ValueError unless every value of a (nested) options dataclass fits its declaration."""
    problems = Problems()
    for name, field, value in walk(options, prefix):
        if found := _value_problem(value, field):
            what, problem = found
            problems.lines.append(f"config {name}={'null' if what is None else what}: {problem}")
    problems.stop_if_any()
