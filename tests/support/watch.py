"""Whole runs, watched: which functions were called with what, and the objects that were made."""

import contextlib
import inspect
from collections import defaultdict
from collections.abc import Callable
from typing import Any, NamedTuple

import train
from training.run import Run


class Call(NamedTuple):
    """What a function was given, by parameter, and what it returned."""

    given: dict[str, Any]
    result: Any

    def __getattr__(self, name: str) -> Any:
        return self.given[name]


class Watch:
    """Notes calls; each process of a test is its own, so nothing is ever put back."""

    def __init__(self) -> None:
        self.calls: dict[str, list[Call]] = defaultdict(list)

    def on(self, owner: Any, name: str, instead: Any = None) -> None:
        """Note the calls of owner.name; `instead` is called in its place, with `real` first."""
        real = getattr(owner, name)
        signature = inspect.signature(real)

        def noting(*args: Any, **kwargs: Any) -> Any:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            found = instead(real, *args, **kwargs) if instead else real(*args, **kwargs)
            self.calls[name].append(Call(dict(bound.arguments), found))
            return found

        setattr(owner, name, noting)

    def __getattr__(self, name: str) -> Call:
        """The last call of a function of this name."""
        assert self.calls[name], f"{name} was not called"
        return self.calls[name][-1]


class Seen:
    """A finished run: its calls, its Run, and the weights that it began with."""

    def __init__(self, watch: Watch) -> None:
        self.watch = watch
        self.run: Run
        self.first: dict[str, Any] = {}

    def begin(self, real: Any, run: Run, *args: Any, **kwargs: Any) -> Any:
        """Stand in for train.run_all."""
        self.run = run
        self.first = {shard.name: shard.local.detach().clone() for shard in run.shards}
        return real(run, *args, **kwargs)

    @property
    def vit(self) -> Any:
        """The network."""
        return self.run.model.module

    @property
    def experts(self) -> Any:
        """The last block's experts."""
        return self.vit.blocks[-1].mlp

    def called(self, name: str) -> int:
        """How often a function of this name was called."""
        return len(self.watch.calls[name])

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a parameter, () if there is none of this name."""
        return next((tuple(s.main.shape) for s in self.run.shards if s.name == name), ())

    def feed(self, split: str) -> Any:
        """What yields a split's batches."""
        return next(call.result for call in self.watch.calls["Feed"] if call.split == split)

    def both(self, find: Callable[[Any], Any]) -> list[Any]:
        """What `find` finds in both splits' feeds."""
        return [find(self.feed(split)) for split in ("train", "val")]

    def transform(self, split: str, kind: Any = None) -> Any:
        """A split's transform, or the step of this kind in it."""
        whole = self.feed(split).loader.dataset.transform
        return whole if kind is None else next(t for t in whole.transforms if type(t) is kind)


def run_watched(world: Any, argv: list[str], watch: Watch) -> Seen:
    """Run train.main(argv) in this process's group, and return what was seen."""

    @contextlib.contextmanager
    def this_group(_real, device, *, timeout_s):
        yield world

    seen = Seen(watch)
    watch.on(train.distributed, "process_group", instead=this_group)
    watch.on(train, "run_all", instead=seen.begin)
    assert train.main(["--debug", *argv]) == 0
    return seen
