"""What a program prints, which may go to a pipe that nobody reads, a full disk or a dead terminal.

say, warn     a run's lines: a stream that fails is given up, and the run goes on
show_result   what a program was started for: not to show it is an error

Each argument is a line. Whatever is foreign in it, such as the name of a file, it stays one, and
commands nothing (see options/printable.py).
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TextIO

from tqdm import tqdm

from options.printable import printable


def give_up(stream: TextIO | None) -> None:
    """Let what is still in the stream's buffer, and all that follows, go nowhere."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or never was a file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # type: ignore[union-attr]
        os.close(nowhere)


def _text(lines: tuple[str, ...], stream: TextIO) -> str:
    """Return printable lines; what the stream's encoding lacks is escaped too."""
    text = "\n".join(map(printable, lines))
    encoding = getattr(stream, "encoding", None) or "utf-8"
    return text.encode(encoding, "backslashreplace").decode(encoding)


def warn(*lines: str) -> None:
    """Print `lines` on stderr, above the progress bar, if there is anybody to read them."""
    try:
        tqdm.write(_text(lines, sys.stderr), file=sys.stderr)
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        give_up(sys.stderr)


def say(*lines: str) -> None:
    """Print `lines` above the progress bar; if stdout fails, say so once and print no more."""
    if sys.stdout is None:
        return
    try:
        tqdm.write(_text(lines, sys.stdout))
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`: whoever read has seen enough
        give_up(sys.stdout)
    except (OSError, ValueError) as error:
        give_up(sys.stdout)
        warn(f"warning: stdout cannot be written: {error}; the run goes on without it")


def show_result(*lines: str) -> None:
    """Print `lines`.

    Raises:
        OSError: It cannot be written, for another reason than that its reader has left.
    """
    try:
        print(_text(lines, sys.stdout), flush=True)
    except BrokenPipeError:
        give_up(sys.stdout)
    except OSError as error:
        give_up(sys.stdout)
        raise OSError(f"stdout cannot be written: {error}") from error
