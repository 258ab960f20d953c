"""Ranks as processes: where they meet, and how long a test waits for one.

MOEVIT_TEST_TIMEOUT_S: the seconds that a test waits for what should take a few, 180 if not set.
Give more on a slow or busy machine: `make test MOEVIT_TEST_TIMEOUT_S=600`.
"""

import contextlib
import multiprocessing
import os
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection

from torch.distributed import TCPStore

TIMEOUT_S = float(os.environ.get("MOEVIT_TEST_TIMEOUT_S", "180"))


def _hold_store(parents: Connection, pipe: Connection) -> None:
    """Keep a store until the other end of `pipe`, of which this process has no use, is closed."""
    parents.close()
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    with contextlib.suppress(EOFError):
        pipe.send(store.port)
        pipe.recv()


@contextlib.contextmanager
def meeting_place(num_ranks: int) -> Iterator[list[dict[str, str]]]:
    """Give the environment of each rank; the store where they meet is held for them.

    That is what torchrun does. A port that is looked up here, given back and taken again by rank 0
    would now and then be somebody else's by then: every connection on the machine takes one. The
    store is in a process of its own because it has a thread: a lock that this holds while a test
    forks its ranks would be held in them for ever.
    """
    context = multiprocessing.get_context("fork")
    pipe, theirs = context.Pipe()
    holder = context.Process(target=_hold_store, args=(pipe, theirs), daemon=True)
    holder.start()
    theirs.close()
    try:
        assert pipe.poll(TIMEOUT_S), "the store does not start"
        shared = {
            "WORLD_SIZE": str(num_ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(pipe.recv()),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }
        yield [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]
    finally:
        holder.kill()
        holder.join()
        pipe.close()


def wait_until(is_true: Callable[[], bool], describe: Callable[[], str] = str) -> None:
    """Return once `is_true()`; after TIMEOUT_S fail with what `describe` says."""
    deadline = time.monotonic() + TIMEOUT_S
    while not is_true():
        assert time.monotonic() < deadline, describe()
        time.sleep(0.05)
