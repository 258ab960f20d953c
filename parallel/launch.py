"""How this process was started: as one of torchrun's ranks, or alone.

torchrun's variables -> launch_facts -> check_meeting_place -> stop_with_launcher; and glibc's
settings for training
"""

from __future__ import annotations

import contextlib
import ctypes
import json
import os
import signal
import socket
import time
from pathlib import Path

from parallel.terminal import warn

FACTS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
PORTS = range(1, 2**16)
# How many processes Slurm's srun, Open MPI's mpirun, or MPICH's and Intel MPI's has started.
LAUNCHED = ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE")
FIND_HOST_S = 20  # DNS may not know a machine that has just started
PR_SET_PDEATHSIG = 1  # of Linux's prctl


def _number(name: str) -> int:
    text = os.environ.get(name, "")
    if not text.isdecimal():
        raise ValueError(f"environment {name}={text}: must be a whole number")
    return int(text)


def _is_several(name: str) -> bool:
    text = os.environ.get(name, "")
    return text.isdecimal() and int(text) > 1


def _check_alone() -> None:
    """Refuse to be one of several processes of a launcher that is not torchrun.

    Tasks that a job may start, but has not, are only noted: a batch script asks for as many.
    """
    for name in filter(_is_several, LAUNCHED):
        raise ValueError(
            f"environment {name}={os.environ[name]}: so many processes were started, and each "
            "would work alone; start one torchrun per node instead: `torchrun train.py ...`"
        )
    if _is_several("SLURM_NTASKS"):
        warn(
            f"note: one process works alone, though the job has SLURM_NTASKS="
            f"{os.environ['SLURM_NTASKS']} tasks; `torchrun` would use more"
        )


def launch_facts() -> tuple[int, int, int]:
    """Return (rank, world size, local rank) as torchrun set them, or (0, 1, 0) without it.

    Raises:
        ValueError: A variable is missing, is not a number, or RANK >= WORLD_SIZE; or srun or mpirun
            started several processes without torchrun, which know nothing of each other.
    """
    missing = [name for name in FACTS if name not in os.environ]
    if len(missing) == len(FACTS):
        _check_alone()
        return 0, 1, 0
    if missing:
        raise ValueError(
            f"environment {', '.join(missing)}: not set though others of {', '.join(FACTS)} are; "
            "start with `torchrun train.py ...` or with none of them"
        )
    rank, world_size, local_rank = map(_number, FACTS)
    if rank >= world_size:
        raise ValueError(f"environment RANK={rank}: must be less than WORLD_SIZE={world_size}")
    return rank, world_size, local_rank


def module_environment() -> dict[str, str]:
    """Return the environment in which `python -m` finds this repo's modules from any folder."""
    root = str(Path(__file__).resolve().parents[1])
    paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def shown_rank() -> str:
    """Return the rank for a message, whatever the environment says."""
    return os.environ.get("RANK", "0")


def tell_torchrun(text: str) -> None:
    """Leave `text` where torchrun looks for the reason of a rank's end, if it started this one.

    Its report then ends with that, not with "To enable traceback see". The form is that of
    torch.distributed.elastic.multiprocessing.errors.
    """
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        extra = {"py_callstack": text, "timestamp": str(int(time.time()))}
        with contextlib.suppress(OSError):  # the line is on stderr as well
            Path(path).write_text(json.dumps({"message": {"message": text, "extraInfo": extra}}))


def check_meeting_place() -> str:
    """Return MASTER_ADDR:MASTER_PORT, where torchrun's ranks meet.

    Raises:
        ValueError: One of them is not set, or the port is not a port number.
        OSError: The host does not resolve. torch would not say so, and would wait for the ranks.
    """
    address = os.environ.get("MASTER_ADDR")
    if not address:
        raise ValueError("environment MASTER_ADDR: not set; start with `torchrun train.py ...`")
    port = _number("MASTER_PORT")
    if port not in PORTS:
        raise ValueError(f"environment MASTER_PORT={port}: must be {PORTS[0]} to {PORTS[-1]}")
    given_up = time.monotonic() + FIND_HOST_S
    while True:
        try:
            socket.getaddrinfo(address, port)
        except OSError as error:
            if time.monotonic() >= given_up:
                raise OSError(
                    f"environment MASTER_ADDR={address}: no such host: {error}"
                ) from error
            time.sleep(1)
        else:
            return f"{address}:{port}"


def stop_with_launcher() -> None:
    """Ask for SIGTERM when torchrun dies, so that this rank saves and stops as on any SIGTERM.

    A signal that torchrun does not handle ends torchrun alone. Its ranks would go on unseen, keep
    their GPUs, and fail later, since the store where they meet is torchrun's. Linux only.
    """
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None and "TORCHELASTIC_RUN_ID" in os.environ:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def keep_freed_memory() -> None:
    """Let this process keep the memory that it frees, instead of returning it to the system.

    Each training step frees memory that the next one takes again. By default glibc returns whatever
    is free at the end of the heap, so a step on a CPU faults in thousands of pages anew. Blocks of
    32 MiB and more still get a mapping of their own: glibc never raises that threshold higher.
    C libraries without `mallopt` (macOS, musl) are left as they are.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        trim_threshold, mmap_threshold = -1, -3  # their numbers in glibc's malloc.h
        mallopt(trim_threshold, 2**31 - 1)
        mallopt(mmap_threshold, 2**25)
