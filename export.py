"""Turn checkpoints into the files of other projects, and those into checkpoints.

    python export.py SOURCE --to FORMAT --output PATH

SOURCE, recognised by what it is:
    a run folder                the newest complete checkpoint in it, or --pick best
    a checkpoint                its folder, step_<n>_loss_<x>
    *.safetensors               or a folder with model.safetensors, or with many and an index
    a file of torch.save        ours, timm's, M3ViT's global file, or others: docs/init.md
    a folder of FastMoE         0.pth, 1.pth, ... or <stem>_rank0.pth, ...: joined

FORMAT:
    torch         {"model": weights, "config": options, "classes": ids, "pretrained_cfg": mean,
                  std, crop and size of the images}, for checkpoint.load_torch_checkpoint
    timm          for timm.create_model(..., checkpoint_path=PATH); prints the call, and the flags
                  of timm's validation script; dense only
    nvidia        for load_torch_checkpoint of NVIDIA's ViT recipe (BioNeMo), whose options it
                  prints; dense only
    safetensors   a file, or a folder with files of up to --max-shard-gb and an index
    mtl           mtl_latest_global.pth (--pick best: mtl_best_global.pth) in the folder PATH, for
                  M3ViT's multi-task training: all experts, no head
    dcp           a checkpoint of the weights alone, from which a training run can start

Our own files carry the options of their run, so nobody has to guess the number of heads or the
routing, and the ids of its classes. For a file without options, --config-name and overrides as for
train.py say what it is; its names and shapes must then be those of that model.

Examples:
    python export.py ckpts/vit --to timm --output vit.pth
    python export.py ckpts/vit/step_380_loss_0.211 --to safetensors --output out/vit
    python export.py ckpts/moe --pick best --weights ema --to mtl --output out
    python export.py m3vit_run/checkpoint.pth.tar --to mtl --output out
    python export.py timm.safetensors --config-name vit_small_patch16_224 --to dcp --output init

Exit codes: 0 done, 2 something cannot be converted or written, 130 interrupted; one line on stderr
says what. After SIGTERM it is 143. Whatever ends it, it leaves nothing half written.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType

from timm.utils import natural_key

from options.command_line import Parser
from parallel.terminal import show_result
from training.network import name_options
from training.stopping import exit_code, leave
from weights import commands, formats, preprocessing
from weights import files as weight_files
from weights.dcp_writer import MANIFEST, METADATA, NAME, STATE
from weights.formats import MtlFile
from weights.sources import BEST, Choice, Source, picked_metric, read_source

FORMATS = ("torch", "timm", "nvidia", "safetensors", "mtl", "dcp")
GB = 10**9
MAX_SHARD_GB = 5.0
MAX_GB = 10**6
# All files that an export to a folder can have.
_EXPORTED = (MANIFEST, METADATA, STATE, weight_files.SINGLE_NAME, weight_files.INDEX_NAME)
_EXPORTED_PARTS = re.compile(r"__\d+_\d+\.distcp|model-\d{5}-of-\d{5}\.safetensors")


def _mtl_file(source: Source) -> MtlFile:
    if isinstance(source.content, MtlFile):
        return source.content
    if not source.config:
        raise ValueError(f"--to mtl: {source.origin} has no options; name them by --config-name")
    model = source.config.get("model")
    assert isinstance(model, Mapping), "a section of the options"
    return formats.to_mtl(source.content, model=model, config_json=json.dumps(source.config))


def output_path(output: Path, to: str, *, pick: str) -> Path:
    """Return the file or folder to write."""
    is_pickle = output.suffix in (".pt", ".pth")
    if to in ("torch", "timm", "nvidia") and not is_pickle:
        raise ValueError(f"--output {output}: must end in .pt or .pth")
    if to in ("safetensors", "dcp") and is_pickle:
        raise ValueError(f"--output {output}: must be a folder for --to {to}")
    if to == "mtl" and not is_pickle:
        return output / f"mtl_{'best' if pick == 'best' else 'latest'}_global.pth"
    return output


def writes_file(path: Path, to: str) -> bool:
    """Return whether the format is one file there, rather than a folder of files."""
    return to not in ("safetensors", "dcp") or (to, path.suffix) == ("safetensors", ".safetensors")


def _check_kind(path: Path, *, is_file: bool) -> None:
    """Refuse a place where a file, or a folder, cannot come to be.

    A link would be replaced, not what it leads to; so would a device or a pipe.
    """
    above = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    if not above.is_dir():
        raise ValueError(f"--output {path}: {above} is not a folder")
    if path.is_symlink():
        raise ValueError(f"--output {path}: is a symbolic link; name what it leads to")
    if path.exists() and not (path.is_file() if is_file else path.is_dir()):
        kind = "file" if is_file else "folder"
        raise ValueError(f"--output {path}: exists and is not a {kind}, which this writes")


def check_free(path: Path, *, source: Path, is_file: bool, overwrite: bool) -> None:
    """Refuse to write over, or into, anything but an export."""
    _check_kind(path, is_file=is_file)
    whole, read = path.resolve(), source.resolve()
    if whole == read or whole in read.parents:
        raise ValueError(f"--output {path}: would replace the source")
    if NAME.fullmatch(path.name):
        raise ValueError(f"--output {path}: only a run names its checkpoints so")
    for folder in whole.parents:
        if (folder / MANIFEST).exists():
            raise ValueError(f"--output {path}: checkpoint {folder} must stay as it was saved")
    if path.exists() and not overwrite:
        raise ValueError(f"--output {path}: exists (--overwrite replaces it)")
    known = (METADATA, weight_files.SINGLE_NAME, weight_files.INDEX_NAME)
    if path.is_dir() and not any((path / name).exists() for name in known):
        raise ValueError(f"--output {path}: is a folder but no export; remove it yourself")
    for entry in sorted(path.iterdir()) if path.is_dir() else ():
        is_ours = entry.name in _EXPORTED or _EXPORTED_PARTS.fullmatch(entry.name)
        if entry.is_dir() or not is_ours:
            raise ValueError(
                f"--output {path}: holds {entry.name}, which no export writes; move it away, or "
                "name another folder"
            )


def write(source: Source, path: Path, *, to: str, max_bytes: int) -> None:
    """Write `source` to `path` in the format `to`."""
    about = {"config": json.dumps(source.config)}
    if source.classes:
        about["classes"] = json.dumps(source.classes)
    if source.preprocessing:
        about[preprocessing.KEY] = json.dumps(source.preprocessing)
    if to == "mtl":
        file = _mtl_file(source)
        weight_files.write_pickle(path, {"state_dict": file.weights, "meta": dict(file.meta)})
        return
    weights = source.weights()
    if to == "torch":
        weight_files.write_pickle(path, {"model": weights, **about})
    elif to == "timm":
        weight_files.write_pickle(path, {"state_dict": formats.to_timm(weights), **about})
    elif to == "nvidia":
        if source.config:  # it refuses what the recipe cannot be, before anything is written
            commands.nvidia_options(source.config)
        weight_files.write_pickle(path, {"model": formats.to_nvidia(weights), **about})
    elif to == "safetensors":
        weight_files.write_safetensors(path, weights, metadata=about, max_bytes=max_bytes)
    else:
        about_run = {"config": source.config, "classes": source.classes}
        weight_files.write_dcp(path, weights, about=about_run)


def notes(source: Source, path: Path, *, to: str) -> list[str]:
    """Return what a user should know about the file that was written."""
    lines = []
    if isinstance(source.content, MtlFile) and source.content.left_out:
        lines.append(f"note: left out {formats.listed(source.content.left_out)}")
    if to == "timm" and source.config:
        lines.append(commands.timm_call(source.config, path))
        if source.preprocessing:
            lines.append(commands.timm_validation(source.config, path))
        if sorted(source.classes, key=natural_key) != list(source.classes):
            lines.append(
                "note: timm orders class folders in another way: give its script a --class-map "
                "file of our order, a class a line"
            )
    if to == "nvidia":
        lines.append(f"note: {formats.NVIDIA_EPS}")
        if source.config:
            lines.append(f"options of its recipe: {commands.nvidia_options(source.config)}")
    if to != "mtl" and (absent := formats.missing_top(source.weights())):
        lines.append(f"note: {source.origin} has no {' and no '.join(absent)}")
    return lines


def _path(text: str) -> Path:
    """Return a path of the command line; a shell leaves the ~ of --output=~/x as it is."""
    if not text:
        raise argparse.ArgumentTypeError("must name a file or folder")
    try:
        return Path(text).expanduser()
    except RuntimeError:  # there is no such user, so the name begins with ~
        return Path(text)


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the arguments of the command line."""
    parser = Parser(
        prog="export.py", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("source", type=_path, metavar="SOURCE")
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="after --config-name")
    parser.add_argument("--to", required=True, choices=FORMATS)
    parser.add_argument("--output", required=True, type=_path, metavar="PATH")
    parser.add_argument("--weights", choices=("model", "ema"), help="as trained, or averaged")
    parser.add_argument(
        "--pick", choices=("newest", "best"), default="newest", help="of a run folder's checkpoints"
    )
    parser.add_argument("--metric", help=f"of the best; default: lowest, --metric={BEST}")
    parser.add_argument(
        "--any-mode",
        action="store_true",
        help="read checkpoints that every user can write to, as on file systems without modes",
    )
    parser.add_argument("--stem", help="which files of ranks: <stem>_rank<r>.pth")
    parser.add_argument("--config-name", metavar="NAME", help="recipe of a file without options")
    parser.add_argument("--max-shard-gb", type=float, help=f"default: {MAX_SHARD_GB}")
    parser.add_argument("--overwrite", action="store_true", help="replace what is at PATH")
    return parser.parse_intermixed_args(argv)


def check_used(arguments: argparse.Namespace) -> None:
    """Refuse arguments that would do nothing."""
    if arguments.overrides and arguments.config_name is None:
        raise ValueError(f"{arguments.overrides[0]}: has no effect without --config-name")
    limit = arguments.max_shard_gb
    if limit is not None and arguments.to != "safetensors":
        raise ValueError(f"--max-shard-gb {limit}: is for safetensors, not for {arguments.to}")
    if limit is not None and not 0 < limit <= MAX_GB:
        raise ValueError(f"--max-shard-gb {limit}: must be more than 0, at most {MAX_GB}")


def export(arguments: argparse.Namespace) -> None:
    """Read, convert, write, and say what was done.

    Raises:
        ValueError, OSError: It cannot be done; the message is one line.
    """
    check_used(arguments)
    metric = picked_metric(arguments.pick, arguments.metric)
    path = output_path(arguments.output, arguments.to, pick=arguments.pick)
    check_free(
        path,
        source=arguments.source,
        is_file=writes_file(path, arguments.to),
        overwrite=arguments.overwrite,
    )
    source = read_source(
        arguments.source, Choice(arguments.weights, metric, arguments.stem, arguments.any_mode)
    )
    if arguments.config_name is not None:
        source = name_options(source, arguments.config_name, arguments.overrides)
    source.print_notes()
    limit_gb = arguments.max_shard_gb or MAX_SHARD_GB
    write(source, path, to=arguments.to, max_bytes=int(limit_gb * GB))
    show_result(f"wrote {path} ({arguments.to}) from {source.origin}")
    for line in notes(source, path, to=arguments.to):
        show_result(line)


def _exit_by_signal(number: int, frame: FrameType | None) -> None:
    del frame
    raise SystemExit(128 + number)


@contextlib.contextmanager
def _removing_partial_files() -> Iterator[None]:
    """Let SIGTERM end the program as an error does, so that half-written files are deleted."""
    before = signal.signal(signal.SIGTERM, _exit_by_signal)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def main(argv: list[str]) -> int:
    """Run the command line; return its exit code."""

    def program() -> None:
        with _removing_partial_files():
            export(parse(argv))

    return exit_code(program, has_ranks=False)


if __name__ == "__main__":
    leave(main(sys.argv[1:]))
