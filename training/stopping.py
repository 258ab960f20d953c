"""How a program ends: a signal noticed by all ranks in the same step, an error in one line.

    StopSignals: SIGTERM, SIGUSR1 or SIGHUP -> Stopped
    exit_code: what a program raises -> one line on stderr and the exit code -> leave

Schedulers send SIGTERM or SIGUSR1 before they take a machine away, a closed terminal sends SIGHUP.
torchrun passes on to its ranks what it handles, SIGUSR1 only with --signals-to-handle, and kills
them 30 s later. One rank may get it earlier than the others, or alone.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from types import FrameType

import torch
import torch.distributed as dist
from torch import Tensor

from options.printable import printable
from parallel import distributed, launch
from parallel.terminal import give_up, warn
from training.scoring import NonFiniteError
from weights.dcp_writer import NonFiniteTensorError

EXIT_USER_ERROR, EXIT_NON_FINITE, EXIT_LOST_RANK, EXIT_INTERRUPTED = 2, 5, 69, 130
EXIT_STOPPED = 75  # EX_TEMPFAIL of sysexits.h: try again later
RESUMES = "; the same command resumes"
SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
# A signal to a whole process group arrives twice, the second time through torchrun: one request.
_SAME_REQUEST_S = 2.0
# In a step this long, waiting for the other ranks costs nothing worth saving.
_LONG_STEP_S = 1.0


class Stopped(Exception):  # noqa: N818  # nothing went wrong
    """The run ended early because it was asked to, with a checkpoint of where it was."""


class StopSignals:
    """While entered, catches the signals; the first is a request, a later one ends the process."""

    def __init__(self) -> None:
        self._name: str | None = None
        self._at = 0.0
        self._pid = os.getpid()
        self._before: dict = {}
        self._poll: tuple[Tensor, dist.Work | None] | None = None
        self._polled_at = time.monotonic()
        self._is_slow = False  # the same on all ranks

    def __enter__(self) -> StopSignals:
        # What is ignored stays so: `nohup` is there to let a run survive its terminal.
        taken = [number for number in SIGNALS if signal.getsignal(number) != signal.SIG_IGN]
        self._before = {number: signal.signal(number, self._take) for number in taken}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, _: FrameType | None) -> None:
        if os.getpid() != self._pid:  # a loader process, which ends when the trainer does
            return
        now = time.monotonic()
        if self._name is None:
            self._name, self._at = signal.Signals(number).name, now
        elif now - self._at > _SAME_REQUEST_S:
            os._exit(EXIT_STOPPED)

    def _ask(self) -> None:
        """Begin to ask all ranks; on the CPU, so that nobody waits for a GPU."""
        now, work = time.monotonic(), None
        facts = torch.tensor([self._name is not None, now - self._polled_at > _LONG_STEP_S]).int()
        self._polled_at = now
        if dist.get_world_size() > 1:
            work = dist.all_reduce(facts, op=dist.ReduceOp.MAX, async_op=True)
        self._poll = (facts, work)

    def _answer(self) -> bool:
        if self._poll is None:
            return False
        (facts, work), self._poll = self._poll, None
        if work is not None:
            work.wait()
        is_asked, self._is_slow = (bool(fact) for fact in facts)
        return is_asked

    def agreed(self) -> bool:
        """Return, on every rank, whether any rank was asked to stop. Collective; waits for all."""
        self._answer()
        self._ask()
        return self._answer()

    def agreed_before(self) -> bool:
        """Return, on every rank, whether any rank had been asked to stop by its previous call.

        Collective, but nobody waits: a question asked in one step is answered in the next, when all
        ranks have long passed it. A single rank is answered at once, and so is every rank when
        steps are long, since a scheduler may not wait for the end of the next one.
        """
        if dist.get_world_size() == 1 or self._is_slow:
            return self.agreed()
        is_asked = self._answer()
        self._ask()
        return is_asked

    def describe(self) -> tuple[str, float]:
        """Return the signal's name and the seconds since the first rank got it. Collective."""
        mine = (time.monotonic() - self._at, self._name) if self._name else (0.0, "none")
        everyone: list[tuple[float, str]] = [mine] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        seconds, name = max(everyone)
        return name, seconds


def _one_line(error: BaseException) -> str:
    """Return a message without line breaks; of a loader worker's traceback, the last line."""
    lines = [line.strip() for line in str(error).split("\n") if line.strip()]
    has_traceback = any("Traceback (most recent" in line for line in lines)
    return lines[-1] if has_traceback else " ".join(lines) or type(error).__name__


def _run(program: Callable[[], None], *, is_training: bool, debug: bool) -> tuple[str | None, int]:
    """Run `program`; return what to say of its end, if anything, and the exit code."""
    try:
        program()
    except (ValueError, OSError, ImportError, NonFiniteError) as error:
        if debug:
            raise
        is_non_finite = isinstance(error, NonFiniteError | NonFiniteTensorError)
        code = EXIT_NON_FINITE if is_training and is_non_finite else EXIT_USER_ERROR
        return _one_line(error), code
    except RuntimeError as error:
        lost = distributed.lost_rank(error)
        if lost is None or debug:
            raise
        at = "".join(f"{note}: " for note in getattr(error, "__notes__", ()))
        return f"{at}{lost}{RESUMES if is_training else ''}", EXIT_LOST_RANK
    except Stopped as reason:
        return f"{reason}{RESUMES}", EXIT_STOPPED
    except KeyboardInterrupt:
        hint = "the same command goes on from the last checkpoint, if any" if is_training else ""
        return hint, EXIT_INTERRUPTED
    except SystemExit as end:  # argparse's, after --help or a usage error
        return None, int(end.code or 0)
    return None, 0


def exit_code(
    program: Callable[[], None],
    *,
    has_ranks: bool = True,
    is_training: bool = False,
    debug: bool = False,
) -> int:
    """Run a program; print one line for an error that a user can mend and return the exit code.

    Any other error is a fault of ours and keeps its traceback, as all do with `debug`. torchrun is
    told too, so that its own report shows the line.
    """
    try:
        line, code = _run(program, is_training=is_training, debug=debug)
    except BaseException:
        launch.tell_torchrun("\n".join(map(printable, traceback.format_exc().splitlines())))
        raise
    if line is None:
        return code
    if code in (EXIT_STOPPED, EXIT_INTERRUPTED):
        text = f"stopped: {line}" if line else "stopped"
    else:
        text = f"error (rank {launch.shown_rank()}): {line}" if has_ranks else f"error: {line}"
    warn(text)
    launch.tell_torchrun(printable(text))
    return code


def leave(code: int) -> None:
    """End this process with an exit code.

    After an error sys.exit would not do: on CUDA the interpreter's shutdown would wait for ranks
    that are waiting for this one.
    """
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError, AttributeError):  # the interpreter would fail at it once more
            give_up(stream)
    if code:
        os._exit(code)
