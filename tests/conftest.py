"""Shared test tools: a runner of gloo ranks, and small datasets."""

import os

# Ranks are forked from this process, so it must have no thread pool. Not torch.set_num_threads:
# that makes a pool, which a child's threads then race to throw away ("Invalid thread pool").
os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"

import contextlib
import gc
import multiprocessing
import pickle
import traceback
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from parallel import distributed
from tests.support.options import small_options
from tests.support.processes import TIMEOUT_S, meeting_place


def _child(variables, pipe, fn, args):
    os.environ.update(variables)
    # Megatron-FSDP calls gc.collect() for each model. In a forked child that walks all of pytest's
    # heap and copies its pages, which took longer than the whole test: leave the heap out of it.
    gc.freeze()
    status = 1
    try:
        with distributed.process_group("cpu", timeout_s=TIMEOUT_S) as world:
            result = fn(world, *args)
        pipe.send_bytes(pickle.dumps((True, result)))  # not send(): it shares tensors by descriptor
        status = 0
    except BaseException:
        pipe.send_bytes(pickle.dumps((False, traceback.format_exc())))
    finally:
        pipe.close()
        os._exit(status)


def _end(process: multiprocessing.Process) -> None:
    process.join(5)
    if process.is_alive():
        process.kill()


def run_ranks(world_size: int, fn: Callable, *args, timeout_s: float = TIMEOUT_S) -> list:
    """Run `fn(world, *args)` on gloo ranks in forked processes; return their results by rank."""
    context = multiprocessing.get_context("fork")
    pipes, results = [], []
    with meeting_place(world_size) as places, contextlib.ExitStack() as stack:
        for variables in places:
            receiver, sender = context.Pipe(duplex=False)
            process = context.Process(target=_child, args=(variables, sender, fn, args))
            process.start()
            stack.callback(_end, process)
            sender.close()
            pipes.append(receiver)
        for rank, pipe in enumerate(pipes):
            if not pipe.poll(timeout_s):
                pytest.fail(
                    f"rank {rank} of {world_size} gave no result in {timeout_s:g} s "
                    "(MOEVIT_TEST_TIMEOUT_S gives it more)"
                )
            try:
                is_ok, value = pickle.loads(pipe.recv_bytes())
            except EOFError:
                pytest.fail(f"rank {rank} of {world_size} died")
            if not is_ok:
                pytest.fail(f"rank {rank} of {world_size}:\n{value}")
            results.append(value)
    return results


# Nearly every test of these takes seconds: it kills processes, runs programs or compiles kernels.
SLOW_MODULES = {
    "test_bad_data",
    "test_bench",
    "test_faults_async",
    "test_faults_elastic",
    "test_faults_kills",
    "test_faults_run",
    "test_faults_torchrun",
    "test_kernels_compile",
    "test_readme",
    "test_resharding",
}


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark what `make quick` leaves out."""
    for item in items:
        if item.path.stem in SLOW_MODULES:
            item.add_marker(pytest.mark.slow)


@pytest.fixture(scope="session")
def ranks() -> Callable:
    """The function `ranks(n, fn, *args)`: results of `fn(world, *args)` on n gloo ranks."""
    return run_ranks


@pytest.fixture(scope="session")
def image_folder(tmp_path_factory) -> Path:
    """An ImageFolder of 3 classes, 24 training and 7 validation images, 32 x 32 pixels of noise."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for split, per_class in (("train", [8, 8, 8]), ("val", [3, 2, 2])):
        for number, count in enumerate(per_class):
            folder = root / split / f"n{number:08d}"
            folder.mkdir(parents=True)
            for image in range(count):
                pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / f"{image}.JPEG")
    return root


@pytest.fixture
def small_run(image_folder, tmp_path) -> Callable:
    """`small_run(*overrides)`: options of a two-block ViT on `image_folder`, run in tmp_path."""
    return small_options(image_folder, tmp_path / "run")
