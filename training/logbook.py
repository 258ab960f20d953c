"""What a run reports: log.jsonl, TensorBoard, W&B, a progress bar and the final table.

    <run folder>/  config.yaml  versions.json  log.jsonl  tensorboard/  wandb/

Rank 0 writes; on the other ranks every method does nothing, so the loop has no `if is_main`.
"""

from __future__ import annotations

import dataclasses
import importlib
import importlib.metadata
import io
import json
import os
import platform
import sys
import time
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

from rich.console import Console
from rich.table import Table
from torch.utils.tensorboard import SummaryWriter
from tqdm import tqdm

from options.schema import Config

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


class _WandbRun(Protocol):
    def log(self, values: Mapping[str, float], *, step: int) -> None: ...

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


def start_wandb(config: Config, folder: Path) -> _WandbRun | None:
    """Return a W&B run, or None without a project; a resumed run goes on with its own.

    Raises:
        ValueError: A project was asked for and wandb does not import.
    """
    o = config.training.wandb
    if o.project is None:
        return None
    try:
        wandb = importlib.import_module("wandb")
    except ImportError as error:
        raise ValueError(
            f"config training.wandb.project={o.project}: wandb does not import ({error}); "
            "`pip install wandb`, or set it to null"
        ) from error
    id_file = folder / "wandb_id"
    if not id_file.exists():
        id_file.write_text(uuid.uuid4().hex)
    run: _WandbRun = wandb.init(
        project=o.project,
        id=id_file.read_text(),
        resume="allow",
        dir=str(folder),
        mode=o.mode,
        config=dataclasses.asdict(config),
    )
    return run


def say(text: str) -> None:
    """Print `text` without breaking the progress bar; a closed pipe does not end the run."""
    if sys.stdout is None:
        return
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except BrokenPipeError:
        # Neither what is still buffered nor the interpreter's last flush may fail either.
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, sys.stdout.fileno())
        os.close(nowhere)


class Logbook:
    """Writes a run's log; silent on every rank but 0."""

    def __init__(self, folder: Path, *, config: Config, is_main: bool, step: int) -> None:
        self._file = self._board = self._wandb = self._bar = None
        if not is_main:
            return
        o = config.training
        self._wandb = start_wandb(config, folder)
        self._file = (folder / "log.jsonl").open("a", buffering=1)
        if o.tensorboard:
            self._board = SummaryWriter(folder / "tensorboard", purge_step=step + 1)
        self._bar = tqdm(total=o.steps, initial=step, unit="step", dynamic_ncols=True, disable=None)

    def event(self, name: str, **values: object) -> None:
        """Print one `name key=value ...` line and add it to log.jsonl.

        A value whose name has a dot belongs to one of many layers and is not printed.
        """
        if self._file is None:
            return
        self._file.write(json.dumps({"time": time.time(), "event": name, **values}) + "\n")
        shown = [f"{key}={value}" for key, value in values.items() if "." not in key]
        tqdm.write(" ".join([name, *shown]))

    def metrics(self, kind: str, *, step: int, values: Mapping[str, float]) -> None:
        """Log figures of `kind` (train, val) after `step` updates to every sink."""
        self.event(kind, step=step, **{key: float(f"{value:.6g}") for key, value in values.items()})
        named = {f"{kind}/{key}": value for key, value in values.items()}
        if self._board is not None:
            for key, value in named.items():
                self._board.add_scalar(key, value, step)
        if self._wandb is not None:
            self._wandb.log(named, step=step)

    def advance(self) -> None:
        """Move the progress bar by one step."""
        if self._bar is not None:
            self._bar.update()

    def show(self, **shown: str) -> None:
        """Show `shown` beside the progress bar until replaced."""
        if self._bar is not None:
            self._bar.set_postfix(shown, refresh=False)

    def close(self) -> None:
        """Flush and close every sink."""
        for sink in (self._bar, self._board, self._file):
            if sink is not None:
                sink.close()
        if self._wandb is not None:
            self._wandb.finish()


def print_table(title: str, rows: Mapping[str, str]) -> None:
    """Print `rows` as a two-column table; values are never wrapped, so that they can be copied."""
    table = Table(title=title, show_header=False, title_justify="left")
    for name, value in rows.items():
        table.add_row(name, value)
    # Borders and padding of two columns take 7 characters.
    width = 7 + max(map(len, rows)) + max(map(len, rows.values()))
    # Not straight to stdout: rich ends the process if the pipe is closed. The encoding is stdout's
    # because rich draws its lines in ASCII where that has nothing better.
    text = io.TextIOWrapper(io.BytesIO(), encoding=getattr(sys.stdout, "encoding", None) or "utf-8")
    Console(file=text, width=width, soft_wrap=True).print(table)
    text.seek(0)
    say(text.read().rstrip("\n"))
