"""When a checkpoint is due: write it now or in the background, and what a failure means.

    due -> save -> checkpoint.save, or weights.background -> saved | save_failed (retried when due)

A failed save costs its interval and no more; three in a row, or the run's last, end the run.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path

import checkpoint
from parallel import collectives
from training.logbook import Logbook
from training.resume import Start, facts
from training.run import Run
from training.run_folder import Retention
from weights.background import AsyncSaver, Committed
from weights.sources import BEST

MAX_FAILURES = 3


class Saver:
    """Saves a run's checkpoints. Every method but `close` is collective."""

    def __init__(self, run: Run, logbook: Logbook, *, start: Start) -> None:
        self._run = run
        self._logbook = logbook
        found = {start.found.folder} if start.found is not None else set()
        # Complete ones that need no second look: this process has loaded or written them.
        self._known = frozenset(found)
        self._protected = frozenset(found | set(start.rejected))
        self._failures = 0
        self._step = self._saved_step = start.step
        self._began = 0.0
        self._stalled_s = 0.0
        self._background: AsyncSaver | None = None
        self.folder: Path | None = start.found.folder if start.found is not None else None
        if run.config.training.checkpoint.async_save:
            self._background = AsyncSaver(timeout_s=run.config.distributed.timeout_s)
            self._background.prepare(run.tensors())

    def save(
        self, *, step: int, figures: Mapping[str, float], is_last: bool, is_stop: bool = False
    ) -> None:
        """Save what the run holds after `step` updates; `is_last` returns when it is on disk.

        Raises:
            OSError: On every rank: the last save of the run, or the third in a row, has failed.
            NonFiniteTensorError: On every rank, if a tensor has NaN or infinities.
        """
        self.drain()
        self._step, self._began, self._stalled_s = step, time.perf_counter(), 0.0
        self._run.bad_images.update(*collectives.all_gather(self._run.bad_images))
        state = facts(self._run, step=step, figures=figures, is_stop=is_stop)
        loss = figures.get("val_loss", figures["loss"])
        if self._background is not None and not is_last:
            self._background.begin(
                self._run.folder,
                self._run.tensors(),
                state=state,
                loss=loss,
                retention=self._retention().sweep_after,
            )
            self._stalled_s = time.perf_counter() - self._began
            return
        try:
            folder = checkpoint.save(self._run.folder, self._run.tensors(), state=state, loss=loss)
        except OSError as error:
            self._fail(error, is_last=is_last)
            return
        self._stalled_s = time.perf_counter() - self._began
        undeleted = self._retention().sweep_after(folder) if self._run.world.is_main else {}
        self._succeed(Committed(folder, undeleted))

    def ensure(self, *, step: int, figures: Mapping[str, float]) -> None:
        """Return when what the run holds is on disk and will be resumed from; raises as `save`."""
        self.drain()
        # Where resume_from_metric picks what to resume from, only a checkpoint that says it is a
        # stop's own goes before the best: so it is saved again even if this step was saved.
        by_figure = self._run.config.training.checkpoint.resume_from_metric is not None
        if self._saved_step != step or by_figure:
            self.save(step=step, figures=figures, is_last=True, is_stop=True)

    def poll(self) -> None:
        """Notice a background save that has ended; call after every step.

        Raises:
            OSError: On every rank: the third save in a row has failed.
            NonFiniteTensorError: On every rank, if a tensor has NaN or infinities.
        """
        if self._background is None or not self._background.is_busy:
            return
        started = time.perf_counter()
        outcome = self._background.poll()
        self._stalled_s += time.perf_counter() - started
        self._take(outcome)

    def drain(self) -> None:
        """Wait for the save under way, if there is one; raises as `poll`."""
        if self._background is not None:
            self._take(self._background.drain())

    def close(self) -> None:
        """End the worker; a save under way is given up."""
        if self._background is not None:
            self._background.close()

    def _retention(self) -> Retention:
        options = self._run.config.training.checkpoint
        return Retention(
            known=self._known,
            protected=self._protected,
            keep_last=options.keep_last,
            keep_best=options.keep_best,
            metric=options.resume_from_metric or BEST,
        )

    def _take(self, outcome: Committed | Exception | None) -> None:
        if isinstance(outcome, Committed):
            self._succeed(outcome)
        elif isinstance(outcome, OSError):
            self._fail(outcome, is_last=False)
        elif outcome is not None:
            raise outcome

    def _succeed(self, done: Committed) -> None:
        self._failures, self.folder, self._saved_step = 0, done.folder, self._step
        self._known |= {done.folder}
        for path, reason in done.undeleted.items():
            self._logbook.event("purge_failed", folder=str(path), error=reason)
        self._logbook.event(
            "saved",
            step=self._step,
            folder=str(done.folder),
            s=round(time.perf_counter() - self._began, 2),
            stall_s=round(self._stalled_s, 3),
        )

    def _fail(self, error: OSError, *, is_last: bool) -> None:
        self._failures += 1
        good = self.folder.name if self.folder is not None else "none"
        line = (
            f"checkpoint save failed at step {self._step}: {error}; last good {good}; "
            f"failure {self._failures} of {MAX_FAILURES}"
        )
        if is_last or self._failures >= MAX_FAILURES:
            raise OSError(line) from error
        self._logbook.event("save_failed", step=self._step, error=line)
