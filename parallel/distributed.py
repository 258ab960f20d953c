"""Process group, device meshes, random seeds, and what the devices are. Nothing knows of models.

Only this file and launch.py read the environment; images/reading.py sets variables while it loads a
library.

    torchrun's variables -> World (rank, size, device) -> Meshes (dense, expert) -> sharding.py
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from parallel import launch
from parallel.seeds import stable_seed

AXES = ("dp_outer", "dp_shard", "ep")

# Dense bf16 peak of one device in TFLOP/s, from the vendor's data sheets (no sparsity).
PEAK_TFLOPS = {
    "A100": 312.0,
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200": 989.0,
    "B200": 2250.0,
    "L40S": 362.0,
}


@dataclass(frozen=True)
class World:
    """This process's rank, the number of processes, and the device that this one computes on."""

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """True on the one rank that writes logs and prints."""
        return self.rank == 0


@dataclass(frozen=True)
class Meshes:
    """The two device meshes with axes (dp_outer, dp_shard, ep).

    Dense parameters shard over all ranks of a replica, so their mesh is (O, S * EP, 1); an
    expert's parameters live on one `ep` coordinate and shard over `dp_shard`: (O, S, EP).
    """

    dense: DeviceMesh
    expert: DeviceMesh

    @property
    def dp_outer(self) -> int:
        """Number of replicas of the sharded model (HSDP)."""
        return self.dense.size(0)

    @property
    def ep(self) -> int:
        """Number of ranks over which the experts of a layer are spread."""
        return self.expert.size(2)


def expand_home(text: str | Path) -> Path:
    """Return `text` as a path, with ~ and ~user expanded.

    Raises:
        ValueError: There is no such home. In a container the user often has no entry in passwd.
    """
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        name = Path(text).parts[0]
        problem = "no such user" if name != "~" else "HOME is not set and the user is not in passwd"
        raise ValueError(f"path {text}: {name} is no folder: {problem}") from error


def expand_path(text: str) -> Path:
    """Return `text` as a path, with ~ and environment variables expanded.

    Raises:
        ValueError: A variable is not set, or there is no such home; the message names it.
    """
    for found in re.finditer(r"\$(\w+)|\$\{(\w+)\}", text):
        name = found[1] or found[2]
        if name not in os.environ:
            raise ValueError(f"environment variable {name} is not set")
    return expand_home(os.path.expandvars(text))


def pick_device(name: str, local_rank: int) -> torch.device:
    """Return the device of this rank for `device=auto|cpu|cuda`.

    Raises:
        ValueError: CUDA was asked for and is missing, or has fewer devices than local ranks.
    """
    if name == "cpu" or (name == "auto" and not torch.cuda.is_available()):
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(
            f"config device={name}: local rank {local_rank} has no CUDA device, {count} visible "
            "(use device=cpu, or at most that many ranks per node)"
        )
    return torch.device("cuda", local_rank)


@contextlib.contextmanager
def process_group(device: str, *, timeout_s: float) -> Iterator[World]:
    """Join the process group, NCCL on CUDA and gloo on CPU, and leave it at the end.

    Without torchrun it is a group of one rank that needs no network port.

    Raises:
        ValueError: The environment is not one that torchrun makes.
        OSError: MASTER_ADDR does not resolve, or its port is taken or cannot be reached.
    """
    rank, world_size, local_rank = launch.launch_facts()
    world = World(rank, world_size, local_rank, pick_device(device, local_rank))
    timeout = timedelta(seconds=timeout_s)
    if world.device.type == "cuda":
        # Gloo rides along for decisions about CPU objects (which checkpoint, which config).
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(world.device)
    else:
        backend = "gloo"
        launch.keep_freed_memory()
    if "RANK" in os.environ:
        place = launch.check_meeting_place()
        launch.stop_with_launcher()
        try:
            dist.init_process_group(backend, timeout=timeout)
        except dist.DistNetworkError as err:
            raise OSError(
                f"MASTER_ADDR:MASTER_PORT={place}: rank {rank} of {world_size} cannot meet the "
                f"others there: {str(err).strip().splitlines()[0]}"
            ) from err
    else:
        store = torch._C._distributed_c10d.HashStore()
        dist.init_process_group(backend, timeout=timeout, store=store, rank=0, world_size=1)
    is_clean = False
    try:
        yield world
        is_clean = True
    finally:
        # After an error NCCL would wait here for peers that are waiting for this rank, and the
        # error would never be shown. The process is about to end anyway.
        if is_clean or world.device.type == "cpu":
            dist.destroy_process_group()


def lost_rank(error: RuntimeError) -> str | None:
    """Return a message if `error` means that another rank is gone, None for any other error."""
    if not isinstance(error, dist.DistError) and "gloo/transport" not in str(error):
        return None
    frames = traceback.extract_tb(error.__traceback__)
    names = [frame.name for frame in frames if frame.filename == dist.distributed_c10d.__file__]
    reason = str(error).strip().splitlines()[0].rpartition("] ")[2].partition(". ")[0]
    return (
        f"{names[-1] if names else 'a collective'} failed: {reason}; another rank is gone, or was "
        "stuck for longer than distributed.timeout_s"
    )


def build_meshes(*, dp_outer: int, dp_shard: int | None, ep: int, device: torch.device) -> Meshes:
    """Return the meshes for `dp_outer x dp_shard x ep` ranks; dp_shard=None fills the world.

    Raises:
        ValueError: The product is not the world size.
    """
    world_size = dist.get_world_size()
    if dp_shard is None and world_size % (dp_outer * ep):
        raise ValueError(
            f"config distributed: dp_outer={dp_outer} * ep={ep} = {dp_outer * ep}, must divide the "
            f"world size {world_size}"
        )
    shard = world_size // (dp_outer * ep) if dp_shard is None else dp_shard
    if dp_outer * shard * ep != world_size:
        raise ValueError(
            f"config distributed: dp_outer={dp_outer} * dp_shard={shard} * ep={ep} = "
            f"{dp_outer * shard * ep}, must equal the world size {world_size}"
        )
    return Meshes(
        init_device_mesh(device.type, (dp_outer, shard * ep, 1), mesh_dim_names=AXES),
        init_device_mesh(device.type, (dp_outer, shard, ep), mesh_dim_names=AXES),
    )


def seed_step(seed: int, *, step: int, microbatch: int, rank: int) -> None:
    """Seed the global generators (CPU and CUDA), which dropout and drop path draw from.

    The draws are a function of (seed, step, microbatch, rank), so resuming needs no RNG state.
    """
    torch.manual_seed(stable_seed(seed, "step", step, microbatch, rank))


def device_name(device: torch.device) -> str:
    """Return the marketing name of a CUDA device, or "cpu"."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def peak_tflops(device: torch.device, override: float | None) -> float | None:
    """Return the dense bf16 peak of `device` in TFLOP/s, None where no figure is known."""
    if override is not None:
        return override
    name = device_name(device)
    # The longest key wins: "H100 PCIe" before "H100".
    keys = sorted((key for key in PEAK_TFLOPS if key in name), key=len, reverse=True)
    return PEAK_TFLOPS[keys[0]] if keys else None


def memory_gib(device: torch.device) -> float:
    """Return the peak memory of this process in GiB: allocated on CUDA, resident on CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
