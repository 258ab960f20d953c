"""Weights in files: safetensors in one file or many, Torch DCP, shards.

    path -> read_pickle | read_safetensors | read_dcp -> names and tensors on the CPU
    names and tensors -> write_pickle | write_safetensors | write_dcp -> path

One process, no process group. A file gets its name when every byte is on disk, and the permissions
that the umask gives. How a pickle is read is in pickles.py, what names mean in formats.py.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
import shutil
import uuid
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

import huggingface_hub
import safetensors
import safetensors.torch
import torch
from torch import Tensor
from torch.distributed.checkpoint import state_dict_loader, state_dict_saver
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from weights import dcp_writer
from weights.dcp_reader import SafeReader
from weights.dcp_writer import FileFacts, fsync, sha256
from weights.formats import Json, Weights, listed
from weights.pickles import BROKEN, check_regular, read_pickle

__all__ = ["read_pickle"]
# An index of 100,000 tensors has some 10 MB.
_MAX_JSON_BYTES = 64 * 2**20
INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"
# A file of one rank: `3.pth`, or `<stem>_rank3.pth`.
_SHARD = re.compile(r"(?:(?P<stem>.+)_rank)?(?P<rank>[0-9]+)\.pth")
_MOST_SHARED = 4  # names of one tensor, on average
_SHOWN = 6  # ranks of missing files
# One of several files of a model.
_PART = re.compile(r".+-\d+-of-(?P<files>\d+)\.safetensors")
# What a kill leaves of a file that was being written.
PARTIAL = re.compile(r"\..+\.partial-[0-9a-f]{32}")


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


@contextlib.contextmanager
def in_place_of(target: Path) -> Iterator[Path]:
    """Yield a path beside `target` for a file or a folder of files; it then becomes `target`.

    After an error `target` is as it was. What it replaces is deleted once it is there; of a link
    that is the link.

    Raises:
        IsADirectoryError: A file would replace a folder.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    token = uuid.uuid4().hex
    partial = target.with_name(f".{target.name}.partial-{token}")
    old = target.with_name(f".{target.name}.old-{token}")
    try:
        yield partial
        # Content first, names after: a power cut must not leave the name on an empty file.
        for path in [*(partial.iterdir() if partial.is_dir() else ()), partial]:
            fsync(path)
        if target.is_dir() and not target.is_symlink() and not partial.is_dir():
            raise IsADirectoryError(f"file {target}: is a folder")
        if target.is_dir():  # a folder cannot be replaced in one step
            target.rename(old)
        partial.replace(target)
        fsync(target.parent)
    finally:
        _delete(partial)
        if old.exists() and not target.exists():
            old.rename(target)
    _delete(old)


def write_text(path: Path, text: str) -> None:
    """Write a file of which a kill leaves the old content or the new one, whole."""
    with in_place_of(path) as partial, partial.open("x", encoding="utf-8") as file:
        file.write(text)


def write_pickle(path: Path, content: Mapping[str, object]) -> None:
    """Write `content`, of tensors and plain values, for torch.load(weights_only=True)."""
    with in_place_of(path) as partial:
        try:
            torch.save(dict(content), partial)
        except RuntimeError as error:  # what torch makes of a full disk
            raise OSError(f"file {path}: cannot be written: {error}") from error


def read_json(path: Path) -> Json:
    """Return the object in a JSON file of a model's folder.

    Raises:
        ValueError: It is none, or larger than any such file.
    """
    check_regular(path)
    if (num_bytes := path.stat().st_size) > _MAX_JSON_BYTES:
        raise ValueError(f"file {path}: has {num_bytes} bytes, at most {_MAX_JSON_BYTES}")
    try:
        value = json.loads(path.read_text("utf-8"))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"file {path}: not JSON: {error}") from error
    if not isinstance(value, dict):
        raise ValueError(f"file {path}: must hold a JSON object")
    return value


def _safetensors_files(path: Path) -> list[Path]:
    """Return the files that the weights at `path`, a file or a folder, are in."""
    if not path.is_dir():
        if (part := _PART.fullmatch(path.name)) and int(part["files"]) > 1:
            raise ValueError(
                f"file {path}: is one of the {int(part['files'])} files of a model; "
                f"name their folder, {path.parent}"
            )
        return [path]
    if not (path / INDEX_NAME).is_file():
        return [path / SINGLE_NAME]
    index = read_json(path / INDEX_NAME).get("weight_map")
    names = sorted(set(map(str, index.values()))) if isinstance(index, dict) else []
    if not names:
        raise ValueError(f"file {path / INDEX_NAME}: must have a `weight_map` of names to files")
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"file {path / INDEX_NAME}: {name}: must be a file in its folder")
        if not (path / name).is_file():
            raise ValueError(f"folder {path}: {name} is missing ({INDEX_NAME} names it)")
    return [path / name for name in names]


def read_safetensors(path: Path) -> tuple[Weights, dict[str, str]]:
    """Return the weights and the metadata of a file, or of a folder with all its files."""
    weights: Weights = {}
    metadata: dict[str, str] = {}
    for file in _safetensors_files(path):
        check_regular(file)
        try:
            with safetensors.safe_open(file, framework="pt") as opened:
                metadata |= opened.metadata() or {}
                weights |= {name: opened.get_tensor(name) for name in opened.keys()}
        except (safetensors.SafetensorError, *BROKEN) as error:
            raise ValueError(f"file {file}: damaged: {error}") from error
    return weights, metadata


def write_safetensors(
    path: Path, weights: Weights, *, metadata: Mapping[str, str], max_bytes: int
) -> None:
    """Write one file if `path` ends in .safetensors, else a folder with files of up to `max_bytes`.

    Several files come with an index of which tensor is where, as in the Hugging Face hub. A tensor
    over the limit has a file of its own.

    Raises:
        ValueError: One file was asked for and would be over the limit.
    """
    # Only its split: `save_torch_state_dict` drops one of two tensors that share storage, puts the
    # metadata into the index alone, and makes files that only their owner can read.
    split = huggingface_hub.split_state_dict_into_shards_factory(
        weights,
        get_storage_size=lambda tensor: tensor.nbytes,
        filename_pattern="model{suffix}.safetensors",
        max_shard_size=max_bytes,
    )
    about = {"format": "pt", **metadata}
    if is_file := path.suffix == ".safetensors":
        if split.is_sharded:
            raise ValueError(
                f"--output {path}: {split.metadata['total_size']} bytes are over the limit of "
                f"{max_bytes} per file; name a folder, or raise --max-shard-gb"
            )
    with in_place_of(path) as partial:
        if not is_file:
            partial.mkdir()
        for name, keys in split.filename_to_tensors.items():
            packed = {key: weights[key].contiguous() for key in keys}
            file = partial if is_file else partial / name
            # Not save_file, which sets permissions of its own, whatever the umask.
            file.write_bytes(safetensors.torch.save(packed, about))
        if split.is_sharded:
            facts = {**metadata, **split.metadata}
            index = {"metadata": facts, "weight_map": split.tensor_to_filename}
            (partial / INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Use DCP without a process group: no warning that there is none, and errors of one line."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            yield
        except CheckpointException as error:  # derives from BaseException: nobody would catch it
            cause, _ = next(iter(error.failures.values()))
            if not isinstance(cause, Exception):  # Ctrl-C, or a signal that ends the program
                raise cause from error
            raise OSError(f"checkpoint {folder}: {cause}") from error


def read_dcp(folder: Path, tree: str) -> Weights:
    """Return the tensors under `tree` of a Torch DCP folder, whole, however they were sharded."""
    reader = SafeReader(folder)
    stored = reader.read_metadata().state_dict_metadata
    tensors = {
        key: torch.empty(facts.size, dtype=facts.properties.dtype)
        for key, facts in stored.items()
        if key.startswith(f"{tree}.") and isinstance(facts, TensorStorageMetadata)
    }
    if not tensors:
        trees = sorted({key.partition(".")[0] for key in stored})
        raise ValueError(f"checkpoint {folder}: has no {tree} weights (it has: {', '.join(trees)})")
    lacking = {key.partition(".")[2] for key in stored if key.startswith("model.")}
    lacking -= {key.partition(".")[2] for key in tensors}
    if lacking:
        raise ValueError(f"checkpoint {folder}: {tree} weights lack {listed(lacking)}")
    with _alone(folder):
        state_dict_loader.load(dict(tensors), storage_reader=reader, no_dist=True)
    return {key.removeprefix(f"{tree}."): tensor for key, tensor in tensors.items()}


def write_dcp(folder: Path, weights: Weights, *, about: Json) -> None:
    """Write a checkpoint of weights alone: a state of step 0 and a manifest, no optimizer.

    `about` is added to the state.
    """
    with in_place_of(folder) as partial, _alone(folder):
        writer = FileSystemWriter(partial, thread_count=1, sync_files=True)
        state_dict_saver.save({"model": weights}, storage_writer=writer, no_dist=True)
        files = {
            path.name: FileFacts(path.stat().st_size, sha256(path)) for path in partial.iterdir()
        }
        dcp_writer.seal(partial, {"step": 0, "metrics": {}, **about}, files)


def shard_files(folder: Path, *, stem: str | None) -> list[Path]:
    """Return the files of all ranks in `folder`, in rank order: `0.pth` or `<stem>_rank0.pth`."""
    sets: dict[str, dict[int, Path]] = {}
    for path in folder.iterdir():
        if match := _SHARD.fullmatch(path.name):
            of_ranks = sets.setdefault(match["stem"] or "", {})
            other = of_ranks.setdefault(int(match["rank"]), path)
            if other is not path:
                raise ValueError(f"folder {folder}: {other.name} and {path.name} are of one rank")
    if stem is None and len(sets) > 1:
        names = ", ".join(repr(name) for name in sorted(sets))
        raise ValueError(f"folder {folder}: has files of {names}: choose one by --stem")
    chosen = sets.get(stem, {}) if stem is not None else next(iter(sets.values()), {})
    if not chosen:
        raise ValueError(
            f"folder {folder}: has no checkpoint step_<n>_loss_<x>, no {SINGLE_NAME}, and no file "
            f"{stem or '<stem>'}_rank<r>.pth or <r>.pth"
        )
    # No list of all ranks up to the last one: a file's name can make it as long as it likes.
    num_missing = max(chosen) + 1 - len(chosen)
    if num_missing:
        ranks = (rank for rank in range(max(chosen)) if rank not in chosen)
        first = list(itertools.islice(ranks, _SHOWN))
        more = f" and {num_missing - len(first)} more" if num_missing > len(first) else ""
        raise ValueError(
            f"folder {folder}: the files of ranks {first}{more} are missing, "
            f"{listed(path.name for path in chosen.values())} are there"
        )
    return [chosen[rank] for rank in sorted(chosen)]


def is_tensors(value: object) -> bool:
    """Return whether `value` is a state dict: names to tensors, and nothing else."""
    return (
        isinstance(value, dict)
        and bool(value)
        and all(isinstance(name, str) and isinstance(t, Tensor) for name, t in value.items())
    )


def check_dense(weights: Weights, path: Path) -> None:
    """Refuse tensors without values in memory, or that are far more than the file has of them.

    A tensor may repeat one value without end, and one storage may have many names: copies of such
    tensors would take any amount of memory.

    Raises:
        ValueError: The tensor is named.
    """
    for name, tensor in weights.items():
        kind = "quantised" if tensor.is_quantized else str(tensor.layout).removeprefix("torch.")
        kind = "nested" if tensor.is_nested else tensor.device.type if tensor.is_meta else kind
        if kind != "strided":
            raise ValueError(f"file {path}: {name} is a {kind} tensor, must be a plain one")
        held = tensor.untyped_storage().nbytes()
        if tensor.nbytes > held:
            raise ValueError(
                f"file {path}: {name} of shape {tuple(tensor.shape)} needs {tensor.nbytes} bytes, "
                f"the file has {held} of it"
            )
    total, held = sum(tensor.nbytes for tensor in weights.values()), path.stat().st_size
    if total > _MOST_SHARED * held:
        raise ValueError(f"file {path}: has {held} bytes, its tensors need {total}")
