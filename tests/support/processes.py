"""Ranks as processes: where they meet, and how long a test waits for one.

MOEVIT_TEST_TIMEOUT_S: the seconds that a test waits for what should take a few, 180 if not set.
Give more on a slow or busy machine: `make test MOEVIT_TEST_TIMEOUT_S=600`.
"""

import contextlib
import os
import time
from collections.abc import Callable, Iterator

from torch.distributed import TCPStore

TIMEOUT_S = float(os.environ.get("MOEVIT_TEST_TIMEOUT_S", "180"))


@contextlib.contextmanager
def meeting_place(num_ranks: int) -> Iterator[list[dict[str, str]]]:
    """Give the environment of each rank; the store where they meet is in this process.

    That is what torchrun does. A port that is looked up here, given back and taken again by rank 0
    would now and then be somebody else's by then: every connection on the machine takes one.
    """
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    shared = {
        "WORLD_SIZE": str(num_ranks),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    yield [{**shared, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(num_ranks)]


def wait_until(is_true: Callable[[], bool], describe: Callable[[], str] = str) -> None:
    """Return once `is_true()`; after TIMEOUT_S fail with what `describe` says."""
    deadline = time.monotonic() + TIMEOUT_S
    while not is_true():
        assert time.monotonic() < deadline, describe()
        time.sleep(0.05)
