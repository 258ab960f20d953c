"""Saves while training goes on: copy to shared memory now, write in another process, commit later.

    begin: tensors -> staging copy (shared memory) -> worker process of this rank: check, write
    poll:  all have written -> worker of rank 0: commit, sweep -> all know the folder

All collectives stay in the trainers, so a worker may die at any moment: its save is lost, and the
next save gets a new worker. A worker ends as soon as its trainer does. With stock DCP's worker
process, once it is killed, every later save fails.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import mmap
import os
import pickle
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint._nested_dict import flatten_state_dict
from torch.distributed.checkpoint.metadata import Metadata
from torch.distributed.checkpoint.planner import SavePlan, WriteItem

from parallel import collectives
from parallel.collectives import from_main
from parallel.launch import PR_SET_PDEATHSIG, module_environment
from weights import dcp_writer
from weights.dcp_writer import Json, Plan, Source, Target, TensorTree, Written

_ALIGNMENT_BYTES = 64
_POLL_S = 0.005
_END_S = 5.0
# Deletes what a new checkpoint replaces; returns what could not be deleted, and why.
Retention = Callable[[Path], Mapping[Path, str]]


@dataclass(frozen=True)
class Place:
    """Where a planned item's tensor lies in the shared memory."""

    offset: int
    dtype: torch.dtype
    shape: torch.Size


@dataclass(frozen=True)
class Committed:
    """A finished save, and what retention could not delete after it."""

    folder: Path
    undeleted: Mapping[Path, str]


def _map_memory(descriptor: int, num_bytes: int) -> mmap.mmap:
    # MAP_POPULATE: faulting the pages in during the first copy would make that three times as slow.
    return mmap.mmap(descriptor, num_bytes, flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)


def _view(memory: mmap.mmap, place: Place) -> Tensor:
    count = place.shape.numel()
    if count == 0:
        return torch.empty(place.shape, dtype=place.dtype)
    flat = torch.frombuffer(memory, dtype=place.dtype, count=count, offset=place.offset)
    return flat.view(place.shape)


@dataclass(frozen=True)
class _Staged:
    """Where a worker's tensors come from: the shared memory."""

    memory: mmap.mmap
    places: dict[object, Place]

    def resolve_data(self, write_item: WriteItem) -> Tensor:
        return _view(self.memory, self.places[write_item.index])


def _write(
    memory: mmap.mmap, staging: Path, plan: SavePlan, places: dict[object, Place]
) -> Written:
    return dcp_writer.write(staging, plan, _Staged(memory, places))


def _commit(
    _: mmap.mmap,
    target: Target,
    metadata: Metadata,
    written: list[Written],
    retention: Retention,
) -> Committed:
    folder = dcp_writer.commit(target, metadata, written)
    return Committed(folder, retention(folder))


def work(pipe: int, memory: int, num_bytes: int) -> None:
    """Do the jobs that come through the pipe until the trainer is gone: a worker's main."""
    # Signals to the whole process group ask the trainer to save and stop: not to end that save.
    for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT):
        signal.signal(number, signal.SIG_IGN)
    # The pipe's end alone would not show that the trainer is gone: loader processes, which can
    # outlive it, have inherited the other side. So the kernel is asked to kill this process.
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    os.nice(5)
    torch.set_num_threads(1)
    connection = Connection(pipe)
    shared = _map_memory(memory, num_bytes)
    jobs: queue.SimpleQueue = queue.SimpleQueue()

    # A thread of its own reads: during a long write too, the pipe's end must end this process.
    def listen() -> None:
        while True:
            try:
                jobs.put(connection.recv_bytes())
            except (EOFError, OSError):
                os._exit(1)

    threading.Thread(target=listen, daemon=True).start()
    connection.send(None)
    while True:
        function, arguments = pickle.loads(jobs.get())  # noqa: S301  # from the trainer
        connection.send(collectives.capture(function, shared, *arguments))


class Worker:
    """A process that shares `num_bytes` of memory with this rank and does one job at a time.

    It is a new interpreter, not a fork, which would inherit the trainer's CUDA context and whatever
    locks its threads hold. It takes seconds to start; training goes on meanwhile.
    """

    def __init__(self, num_bytes: int) -> None:
        self.num_bytes = max(num_bytes, mmap.PAGESIZE)
        self._descriptor = os.memfd_create("checkpoint")
        os.ftruncate(self._descriptor, self.num_bytes)
        self.memory = _map_memory(self._descriptor, self.num_bytes)
        self.is_busy = False
        self._start()

    def _start(self) -> None:
        self._connection, theirs = Pipe()
        arguments = [str(theirs.fileno()), str(self._descriptor), str(self.num_bytes)]
        # As a module: run by its path, it would not find the other modules of this repo.
        # -P: a module of the working folder must not be taken for one of ours.
        self.process = subprocess.Popen(  # noqa: S603  # this very module
            [sys.executable, "-P", "-m", "weights.background", *arguments],
            env=module_environment(),
            stdin=subprocess.DEVNULL,
            pass_fds=(theirs.fileno(), self._descriptor),
            start_new_session=True,
        )
        theirs.close()
        self._is_ready = False

    def wait_ready(self) -> None:
        """Return when the process has started, or has died in the attempt."""
        if not self._is_ready:
            with contextlib.suppress(EOFError, OSError):
                self._connection.recv()
            self._is_ready = True

    def send(self, function: Callable, *arguments: object) -> None:
        """Start a job; a process that has died is replaced by a new one."""
        if self.process.poll() is not None:
            self._connection.close()
            self._start()
        self.is_busy = True
        # In a thread: a pipe holds 64 KiB, and a worker that is still starting does not read yet.
        threading.Thread(target=self._send, args=((function, arguments),), daemon=True).start()

    def _send(self, job: object) -> None:
        with contextlib.suppress(OSError):  # poll() notices a process that has died
            self._connection.send(job)

    def poll(self) -> object:
        """Return what the job returned or raised, or an OSError if its process died; None: busy."""
        try:
            while self._connection.poll():
                outcome = self._connection.recv()
                if not self._is_ready:
                    self._is_ready = True
                    continue
                self.is_busy = False
                return outcome
        except (EOFError, OSError):
            self.is_busy = False
            code = self.process.wait()
            self._connection.close()
            self._start()
            end = f"was killed by signal {-code}" if code < 0 else f"exited with {code}"
            return OSError(f"the checkpoint worker {end}")
        return None

    def kill(self) -> None:
        """Kill the process, whatever it is doing; the next `poll` starts a new one."""
        self.process.kill()

    def close(self) -> None:
        """End the process and free the memory."""
        self.process.kill()
        self.process.wait(_END_S)
        self._connection.close()
        os.close(self._descriptor)


def _place(plan: SavePlan, source: Source) -> tuple[dict[object, Place], int]:
    """Return where each planned tensor goes and how many bytes all take."""
    places: dict[object, Place] = {}
    offset = 0
    for item in plan.items:
        tensor = source.resolve_data(item)
        places[item.index] = Place(offset, tensor.dtype, tensor.shape)
        size = tensor.numel() * tensor.element_size()
        offset += -(-size // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    return places, offset


@dataclass(frozen=True)
class _Layout:
    """The plan and the places: the same for every save of tensors of one form."""

    form: list[tuple[object, ...]]
    plan: Plan
    places: dict[object, Place]


def _form(tensors: TensorTree) -> list[tuple[object, ...]]:
    flat, _ = flatten_state_dict(dict(tensors))
    return [(name, tensor.shape, tensor.dtype) for name, tensor in flat.items()]


@dataclass
class _Flight:
    """A save under way."""

    target: Target
    started: float
    is_committing: bool = False
    outcome: object = None


class AsyncSaver:
    """Saves one checkpoint at a time in the background. Every method but `close` is collective."""

    def __init__(self, *, timeout_s: float) -> None:
        self._timeout_s = timeout_s
        self._layout: _Layout | None = None
        self._flight: _Flight | None = None
        self._retention: Retention | None = None
        self.worker: Worker | None = None

    @property
    def is_busy(self) -> bool:
        """True from `begin` to the `poll` that returns how the save ended."""
        return self._flight is not None

    def prepare(self, tensors: TensorTree) -> Source:
        """Plan for tensors of this form, reserve memory and start the worker, if not yet done."""
        form = _form(tensors)
        is_known = torch.tensor(int(self._layout is not None and self._layout.form == form))
        dist.all_reduce(is_known, op=dist.ReduceOp.MIN)
        if is_known:
            return dcp_writer.source_of(tensors)
        plan, source = dcp_writer.make_plan(tensors)
        # planner_data maps flat names to nested keys; the metadata have it, and no writer needs it.
        plan = dataclasses.replace(plan, local=dataclasses.replace(plan.local, planner_data=None))
        places, num_bytes = _place(plan.local, source)
        self._layout = _Layout(form, plan, places)
        if self.worker is not None and self.worker.num_bytes < num_bytes:
            self.worker.close()
            self.worker = None
        if self.worker is None:
            self.worker = Worker(num_bytes)
        return source

    def begin(
        self, root: Path, tensors: TensorTree, *, state: Json, loss: float, retention: Retention
    ) -> None:
        """Copy `tensors` as they are now and start to save them; `retention` follows the commit.

        Raises:
            ValueError: On every rank, if `state` has a number that JSON cannot hold.
        """
        assert not self.is_busy, "one save at a time"
        target = dcp_writer.make_target(root, state=state, loss=loss)
        source = self.prepare(tensors)
        assert self._layout is not None and self.worker is not None, "prepare() has made them"
        plan, places = self._layout.plan.local, self._layout.places
        for item in plan.items:
            tensor = source.resolve_data(item).detach()
            _view(self.worker.memory, places[item.index]).copy_(tensor, non_blocking=True)
        if torch.cuda.is_available():
            torch.cuda.current_stream().synchronize()
        self._flight = _Flight(target, time.monotonic())
        self._retention = retention
        self.worker.send(_write, target.staging, plan, places)

    def poll(self) -> Committed | Exception | None:
        """Return how the save ended, None while it is under way or if there is none."""
        flight, worker = self._flight, self.worker
        if flight is None:
            return None
        assert worker is not None, "begin() has made it"
        if flight.outcome is None and worker.is_busy:
            flight.outcome = worker.poll()
            if time.monotonic() - flight.started > self._timeout_s:
                worker.kill()  # the next poll will find it dead
        is_busy = torch.tensor(int(worker.is_busy))
        dist.all_reduce(is_busy, op=dist.ReduceOp.MAX)
        if is_busy:
            return None
        return self._finish(flight) if flight.is_committing else self._commit(flight)

    def _commit(self, flight: _Flight) -> Exception | None:
        """Let rank 0 commit what all ranks have written, or give up if one has not."""
        assert self._layout is not None and self.worker is not None, "begin() has made them"
        parts = collectives.gather(flight.outcome)
        failure, metadata = None, self._layout.plan.metadata
        if metadata is not None:
            failure = dcp_writer.first_failure(flight.target, self._layout.plan, parts)  # type: ignore[arg-type]
            if failure is None:
                self.worker.send(_commit, flight.target, metadata, parts, self._retention)
        failure = from_main(failure)
        flight.is_committing, flight.outcome = True, None
        if failure is not None:
            self._flight = None
        return failure

    def _finish(self, flight: _Flight) -> Committed | Exception:
        assert self._layout is not None, "begin() has made it"
        outcome = flight.outcome
        if self._layout.plan.metadata is not None:
            parts = [outcome]
            outcome = dcp_writer.first_failure(flight.target, self._layout.plan, parts) or outcome  # type: ignore[arg-type]
        self._flight = None
        answer = from_main(outcome)
        assert isinstance(answer, Committed | Exception), "the worker's answer"
        return answer

    def drain(self) -> Committed | Exception | None:
        """Return how the save under way ended when it has, None if there is none."""
        while self.is_busy:
            if (outcome := self.poll()) is not None:
                return outcome
            time.sleep(_POLL_S)
        return None

    def close(self) -> None:
        """End the worker; a save under way is abandoned."""
        self._flight = None
        if self.worker is not None:
            self.worker.close()
            self.worker = None


if __name__ == "__main__":
    work(*map(int, sys.argv[1:]))
