"""What a run reports: log.jsonl, TensorBoard, W&B, a progress bar and the final table.

    <run folder>/  config.yaml  versions.json  log.jsonl  tensorboard/  wandb/

Rank 0 writes; on the other ranks every method does nothing, so the loop has no `if is_main`.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import importlib.metadata
import io
import json
import platform
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from types import ModuleType
from typing import Protocol, TypeVar

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from options.printable import printable
from options.schema import Config
from parallel.terminal import give_up, say, warn
from training.log_file import LogFile
from weights.files import write_text

PACKAGES = (
    "torch",
    "torchvision",
    "timm",
    "megatron-fsdp",
    "transformer-engine",
    "triton",
    "hydra-core",
    "pillow",
)


T = TypeVar("T")
_SINK_ERRORS = (Exception,)  # W&B has its own, and its network's


class _WandbRun(Protocol):
    def define_metric(self, name: str, *, step_metric: str | None = None) -> object: ...

    def log(self, values: Mapping[str, float]) -> None: ...

    def finish(self) -> None: ...


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that affect a run's numbers."""
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def import_wandb(config: Config) -> ModuleType:
    """Return the module, which is optional.

    Raises:
        ValueError: It does not import.
    """
    try:
        return importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(
            f"config training.wandb.project={config.training.wandb.project}: wandb does not "
            f"import ({error}); `pip install wandb`, or set it to null"
        ) from error


def start_wandb(wandb: ModuleType, config: Config, folder: Path) -> _WandbRun:
    """Return a W&B run; a resumed run goes on with its own."""
    o = config.training.wandb
    id_file = folder / "wandb_id"
    if not id_file.exists():
        write_text(id_file, uuid.uuid4().hex)
    run: _WandbRun = wandb.init(
        project=o.project,
        id=id_file.read_text(),
        resume="allow",
        dir=str(folder),
        mode=o.mode,
        config=dataclasses.asdict(config),
    )
    run.define_metric("step")
    run.define_metric("*", step_metric="step")
    return run


@functools.cache
def _hide_board_tracebacks() -> None:
    """Hide the traceback of TensorBoard's thread: the next `add_scalar` raises its error."""
    report = threading.excepthook

    def report_others(failure: threading.ExceptHookArgs) -> None:
        if not type(failure.thread).__module__.startswith("tensorboard."):
            report(failure)

    threading.excepthook = report_others


def open_board(folder: Path, *, step: int) -> SummaryWriter:
    """Return a writer of TensorBoard events that forgets what an earlier start logged after `step`.

    Raises:
        OSError: The folder is a link, whose target is not ours, or cannot be made.
    """
    if folder.is_symlink():
        raise OSError(f"folder {folder}: a symbolic link, which is not followed; remove it")
    _hide_board_tracebacks()
    return SummaryWriter(folder, purge_step=step + 1)


class Logbook:
    """Writes a run's log; silent on every rank but 0.

    A sink that fails while the run goes on costs its lines alone: it is reported once, and at the
    end with what was lost.
    """

    def __init__(self, folder: Path, *, config: Config, is_main: bool, step: int) -> None:
        self._file: LogFile | None = None
        self._board = self._wandb = self._bar = None
        self._lost: Counter[str] = Counter()
        if not is_main:
            return
        o = config.training
        if o.wandb.project is not None:
            wandb = import_wandb(config)
            self._wandb = self._try("W&B", lambda: start_wandb(wandb, config, folder))
        self._file = LogFile(folder / "log.jsonl")
        if o.tensorboard:
            self._board = open_board(folder / "tensorboard", step=step)
        # None: where it is a terminal.
        is_off = True if sys.stderr is None else None
        self._bar = tqdm(
            total=o.steps, initial=step, unit="step", dynamic_ncols=True, disable=is_off
        )

    def _try(self, sink: str, write: Callable[[], T]) -> T | None:
        """Let `sink` write; what it raises is not worth the run."""
        try:
            return write()
        except _SINK_ERRORS as error:
            self._lost[sink] += 1
            if self._lost[sink] == 1:
                warn(f"warning: {sink} cannot be written: {error}; the run goes on without")
            return None

    def event(self, name: str, **values: object) -> None:
        """Print one `name key=value ...` line and add it to log.jsonl.

        A value whose name has a dot belongs to one of many layers and is not printed.
        """
        if self._file is None:
            return
        line = json.dumps({"time": time.time(), "event": name, **values})
        self._try("log.jsonl", functools.partial(self._file.append, line))
        shown = [f"{key}={value}" for key, value in values.items() if "." not in key]
        say(" ".join([name, *shown]))

    def metrics(self, kind: str, *, step: int, values: Mapping[str, float]) -> None:
        """Log figures of `kind` (train, val) after `step` updates to every sink."""
        self.event(kind, step=step, **{key: float(f"{value:.6g}") for key, value in values.items()})
        named = {f"{kind}/{key}": value for key, value in values.items()}
        if self._board is not None:
            for key, value in named.items():
                self._try(
                    "TensorBoard", functools.partial(self._board.add_scalar, key, value, step)
                )
        if self._wandb is not None:
            # A step of its own: W&B drops what a resumed run logs at a step that it has seen.
            self._try("W&B", functools.partial(self._wandb.log, named | {"step": step}))

    def _move_bar(self, move: Callable[[], object]) -> None:
        try:
            move()
        except OSError:
            give_up(sys.stderr)

    def advance(self) -> None:
        """Move the progress bar by one step."""
        if self._bar is not None:
            self._move_bar(self._bar.update)

    def show(self, **shown: str) -> None:
        """Show `shown` beside the progress bar until replaced."""
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        """Flush and close every sink, and say what was lost."""
        if self._bar is not None:
            self._move_bar(self._bar.close)
        if self._board is not None:
            self._try("TensorBoard", self._board.close)
        if self._file is not None:
            self._try("log.jsonl", self._file.close)
        if self._wandb is not None:
            self._try("W&B", self._wandb.finish)
        for sink, count in self._lost.items():
            warn(f"warning: {count} writes to {sink} failed")


def as_table(title: str, rows: Mapping[str, str]) -> list[str]:
    """Return the lines of a two-column table; values are not wrapped, so that they can be copied.

    The title and the rows may hold foreign text.
    """
    rows = {printable(name): printable(value) for name, value in rows.items()}
    table = Table(title=printable(title), show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    # Borders and padding of two columns take 7 characters.
    width = 7 + max(map(cell_len, rows)) + max(map(cell_len, rows.values()))
    # Not straight to stdout: rich ends the process if the pipe is closed. The encoding is stdout's
    # because rich draws its lines in ASCII where that has nothing better. Without markup, since a
    # path may have square brackets, and without color, whatever FORCE_COLOR says.
    text = io.TextIOWrapper(io.BytesIO(), encoding=getattr(sys.stdout, "encoding", None) or "utf-8")
    console = Console(
        file=text, width=width, soft_wrap=True, markup=False, emoji=False, force_terminal=False
    )
    console.print(table)
    text.seek(0)
    return text.read().rstrip("\n").split("\n")
