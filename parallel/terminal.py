"""What a program prints, which may go to a pipe that nobody reads, a full disk or a dead terminal.

say, warn     a run's lines: a stream that fails is given up, and the run goes on
show_result   what a program was started for: not to show it is an error
"""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TextIO

from tqdm import tqdm


def give_up(stream: TextIO | None) -> None:
    """Let what is still in the stream's buffer, and all that follows, go nowhere."""
    with contextlib.suppress(OSError, ValueError, AttributeError):  # closed, or never was a file
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, stream.fileno())  # type: ignore[union-attr]
        os.close(nowhere)


def warn(line: str) -> None:
    """Print `line` on stderr, above the progress bar, if there is anybody to read it."""
    try:
        tqdm.write(line, file=sys.stderr)
        sys.stderr.flush()
    except (OSError, ValueError, AttributeError):
        give_up(sys.stderr)


def say(text: str) -> None:
    """Print `text` above the progress bar; if stdout fails, say so once and print no more."""
    if sys.stdout is None:
        return
    try:
        tqdm.write(text)
        sys.stdout.flush()
    except BrokenPipeError:  # `| head`: whoever read has seen enough
        give_up(sys.stdout)
    except (OSError, ValueError) as error:
        give_up(sys.stdout)
        warn(f"warning: stdout cannot be written: {error}; the run goes on without it")


def show_result(text: str) -> None:
    """Print `text`.

    Raises:
        OSError: It cannot be written, for another reason than that its reader has left.
    """
    try:
        print(text, flush=True)
    except BrokenPipeError:
        give_up(sys.stdout)
    except OSError as error:
        give_up(sys.stdout)
        raise OSError(f"stdout cannot be written: {error}") from error
