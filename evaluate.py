"""Score weights on validation images, or say what is in image files.

    python evaluate.py SOURCE [name=value ...]
    torchrun --nproc-per-node 2 evaluate.py SOURCE          the images are shared out among ranks

SOURCE is anything that export.py reads: a run folder (its newest complete checkpoint), a
checkpoint, or a file or folder of weights in the formats torch, timm, safetensors, or one of other
projects (docs/init.md). Files of ours carry the options of their run; for others --config-name says
which model it is. name=value sets options as for train.py, such as dataset.val.root.

Examples:
    python evaluate.py ckpts/vit --per-class
    python evaluate.py ckpts/vit --weights ema dataset.val.root=/data/imagenet --json scores.json
    python evaluate.py vit_small.safetensors --config-name vit_small_patch16_224
    python evaluate.py ckpts/vit --images cat.jpg dog.png --names classes.txt

Exit codes: 0 done, 2 something cannot be read or does not fit, 69 another rank is lost, 130
interrupted; one line on stderr says what.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor, nn

from images import feed, reading
from images import index as image_index
from images.index import ImageIndex
from options import compose
from options.command_line import Parser
from options.schema import Config, walk
from parallel import distributed
from parallel.distributed import World
from parallel.terminal import show_result
from training import loaders, network, scoring, stopping
from training.logbook import as_table
from training.network import name_options
from weights.files import write_text
from weights.sources import BEST, Choice, Source, other_classes, picked_metric, read_source

GUESSES = 5
# Options that only training reads,
UNUSED = (
    *("training.", "optimizer.", "fsdp.", "distillation.", "init.", "dataset.train."),
    *("distributed.", "model.sdpa", "model.compile", "dataset.duplicates", "dataset.subset"),
)
USED = ("dataset.train.root", "distributed.timeout_s")  # but for these two
# Options of a dataset that decide how an image file becomes the network's input.
FOR_FILES = ("val.img_size", "val.crop_ratio", "interpolation", "mean", "std")
# Options of the network that may differ from training: all others decide what the weights compute.
FREE = (
    "model.vit.dynamic_img_size",
    "model.vit.dynamic_img_pad",
    "model.moe.kernels",
    "model.moe.capacity_factor",
)


def load_model(source: Source, config: Config, device: torch.device) -> nn.Module:
    """Return the network with the source's weights, unsharded, on `device` in eval mode."""
    backend, _ = network.pick_backend(config, device)
    model = network.build_model(config, backend=backend, on_meta=False, device=device)
    network.load_weights(model, source)
    return model.to(device, network.pick_dtype(config.model.dtype, device)).eval()


def check_used(arguments: argparse.Namespace) -> None:
    """Refuse arguments without effect, and an output that could not be written at the end."""
    if arguments.names and not arguments.images:
        raise ValueError(f"--names {arguments.names}: has no effect without --images")
    if arguments.per_class and arguments.images:
        raise ValueError("--per-class: has no effect with --images")
    if arguments.among and arguments.images:
        raise ValueError(f"--among {arguments.among}: has no effect with --images")
    for name, value in compose.given_options(arguments.overrides).items():
        shown = f"{name}={str(value).lower() if isinstance(value, bool) else value}"
        if name.startswith(UNUSED) and name not in USED:
            raise ValueError(f"config {shown}: has no effect here, only in training")
        section, _, option = name.partition(".")
        if arguments.images and section == "dataset" and option not in FOR_FILES:
            raise ValueError(f"config {shown}: has no effect with --images")
    path = arguments.json
    if path and not path.absolute().parent.is_dir():
        raise FileNotFoundError(f"--json {path}: there is no folder {path.absolute().parent}")
    if path and path.exists() and not path.is_file():
        raise ValueError(f"--json {path}: exists and is no file")


def restore(source: Source, overrides: list[str]) -> Config:
    """Return the options of a source with `overrides`, none of which changes the network."""
    trained = {name: value for name, _, value in walk(compose.restore(source.config, []))}
    # Only training compares images: their fingerprints are not worth the reads here.
    config = compose.restore(source.config, [*overrides, "dataset.duplicates=ignore"])
    for name, _, value in walk(config):
        is_network = name.startswith(("model.vit.", "model.moe.")) and name not in FREE
        if is_network and value != trained[name]:
            raise ValueError(
                f"config {name}={value}: must be {trained[name]}, as in {source.origin}"
            )
    return config


def by_class(sums_Y4: Tensor, classes: list[str]) -> dict[str, dict[str, float]]:
    """Return images, cross-entropy, top-1 and top-5 (in percent) of each class with images."""
    found = {}
    for name, (count, loss, top1, top5) in zip(classes, sums_Y4.tolist(), strict=True):
        if count:
            shares = {"top1": 100 * top1 / count, "top5": 100 * top5 / count}
            found[name] = {"images": count, "loss": loss / count, **shares}
    return found


def as_trained(index: ImageIndex, config: Config, trained: Sequence[str]) -> ImageIndex:
    """Return the images with the labels of training, by the classes' ids if they are known.

    Raises:
        ValueError: The images have classes that the weights do not know.
    """
    number_of = {name: number for number, name in enumerate(trained)}
    unknown = [name for name in index.classes if name not in number_of]
    if not unknown:
        return image_index.relabel(index, trained)
    count, num_classes = len(index.classes), config.model.vit.num_classes
    is_moved = any(number_of.get(name, n) != n for n, name in enumerate(index.classes))
    if count == num_classes and not is_moved:
        return index  # the names are others
    if not trained:
        problem = (
            f"has {count} classes and the weights {num_classes}, without the ids that tell which"
        )
    elif len(unknown) == count:
        problem = (
            f"none of its classes was in training ({unknown[0]}, ...; there: {trained[0]}, ...)"
        )
    else:
        problem = (
            f"{len(unknown)} of {count} classes were not in training, the first {unknown[0]}; name "
            "the others in dataset.class_filter"
        )
    raise ValueError(image_index.wrong_root(index.root, "val", problem))


def score(
    model: nn.Module, config: Config, world: World, *, trained: Sequence[str], among: str
) -> dict[str, object]:
    """Return the figures over all validation images, and by class. Collective.

    `trained` are the classes' ids in training, if they are known. The network chooses `among`
    "all" of them, or those that are "present" in the dataset.
    """
    found = loaders.find_val_images(config, world, trained=trained)
    index = as_trained(found, config, trained)
    present, num_classes = set(found.classes), len(index.classes)
    among_Y = None
    if among == "present" and len(present) < num_classes:
        among_Y = torch.tensor([name in present for name in index.classes], device=world.device)
        num_classes = len(present)
    if world.is_main and (others := other_classes(trained, index.classes)):
        show_result(f"note: {index.root}: {others}")
    if world.is_main and len(present) < len(index.classes):
        show_result(
            f"note: {index.root} has {len(present)} of the {len(index.classes)} classes in "
            f"training; the network chooses among {num_classes} (see --among)"
        )
    sums_Y4 = scoring.score(
        model,
        loaders.val_batches(config, index, world),
        device=world.device,
        dtype=next(model.parameters()).dtype,
        among_Y=among_Y,
    ).cpu()
    figures = scoring.figures(sums_Y4)
    if world.is_main and scoring.is_guessing(figures, num_classes=num_classes):
        show_result(
            f"note: top-1 is no better than guessing ({100 / num_classes:.2f} %): are the labels "
            f"in {index.root} those that the weights were trained with?"
        )
    return {**figures, "among": num_classes, "classes": by_class(sums_Y4, list(index.classes))}


def print_scores(scores: dict[str, object], *, origin: str, per_class: bool) -> None:
    """Print the scores as a table."""
    rows = {
        "top-1": f"{scores['top1']:.2f} % of {scores['val_images']:.0f} validation images",
        "top-5": f"{scores['top5']:.2f} %",
        "cross-entropy": f"{scores['val_loss']:.4f}",
    }
    classes = scores["classes"]
    assert isinstance(classes, dict), "by_class makes it"
    if per_class:
        for name, one in classes.items():
            others = f"top-5 {one['top5']:.2f} %, cross-entropy {one['loss']:.4f}"
            rows[name] = f"{one['top1']:.2f} % of {one['images']:.0f}, {others}"
    show_result(*as_table(origin, rows))


@torch.no_grad()
def predict(
    model: nn.Module, config: Config, paths: list[Path], names: list[str]
) -> dict[str, list[tuple[str, float]]]:
    """Return the most probable classes of each image file, with their probabilities."""
    transform = loaders.val_transform(config)
    parameter = next(model.parameters())
    found = {}
    for path in paths:
        image_CHW = transform(reading.read_image(path, where="--images"))
        logits_1Y = model(image_CHW[None].to(parameter.device, parameter.dtype))
        best = logits_1Y.float().softmax(1)[0].topk(min(GUESSES, len(names)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        found[str(path)] = [(names[index], value) for index, value in pairs]
    return found


def read_names(path: Path | None, num_classes: int, ids: Sequence[str]) -> list[str]:
    """Return the classes' names, one per line of `path`; without it their ids, else numbers."""
    if path is None:
        return list(ids) or [str(number) for number in range(num_classes)]
    try:
        names = path.read_text("utf-8-sig").splitlines()
    except UnicodeDecodeError as error:
        raise ValueError(f"--names {path}: must be UTF-8 text: {error}") from error
    if len(names) != num_classes:
        raise ValueError(f"--names {path}: must have {num_classes} lines, not {len(names)}")
    return names


def parse(argv: list[str]) -> argparse.Namespace:
    """Return the arguments of a command line."""
    parser = Parser(
        prog="evaluate.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("source", type=Path, metavar="SOURCE")
    parser.add_argument("overrides", nargs="*", metavar="name=value", help="options of train.py")
    parser.add_argument("--config-name", "-cn", metavar="NAME", help="recipe of the model")
    parser.add_argument("--weights", choices=("model", "ema"), help="as trained, or averaged")
    parser.add_argument(
        "--pick", choices=("newest", "best"), default="newest", help="of a run's checkpoints"
    )
    parser.add_argument("--metric", help=f"of the best; default: lowest, --metric={BEST}")
    parser.add_argument(
        "--any-mode",
        action="store_true",
        help="read checkpoints that every user can write to, as on file systems without modes",
    )
    parser.add_argument("--per-class", action="store_true", help="a line for each class")
    parser.add_argument(
        "--among",
        choices=("present", "all"),
        help="which classes are chosen from, where the dataset has a part of them; "
        "default: present, as ImageNet-A and -R are scored",
    )
    parser.add_argument("--json", type=Path, metavar="PATH", help="write all figures to a file")
    parser.add_argument("--images", type=Path, nargs="+", metavar="FILE", help="classify these")
    parser.add_argument(
        "--names", type=Path, metavar="FILE", help="names of the classes, a line each"
    )
    return parser.parse_intermixed_args(argv)


def run(arguments: argparse.Namespace) -> None:
    """Do what the command line asks for.

    Raises:
        ValueError, OSError: It cannot be done.
    """
    check_used(arguments)
    metric = picked_metric(arguments.pick, arguments.metric)
    source = read_source(
        arguments.source, Choice(arguments.weights, metric, any_mode=arguments.any_mode)
    )
    overrides = arguments.overrides
    if arguments.config_name:
        source, overrides = name_options(source, arguments.config_name, overrides), []
    if not source.config:
        raise ValueError(f"{source.origin} has no options of a run: say --config-name NAME")
    config = restore(source, overrides)
    timeout_s = config.distributed.timeout_s
    with (
        distributed.process_group(config.device, timeout_s=timeout_s) as world,
        feed.worker_losses(),
    ):
        if world.is_main:
            source.print_notes()
        model = load_model(source, config, world.device)
        result: dict[str, object]
        if arguments.images:
            names = read_names(arguments.names, config.model.vit.known_classes, source.classes)
            guesses = predict(model, config, arguments.images, names)
            result = dict(guesses)
            if world.is_main:
                for path, pairs in guesses.items():
                    shown = ", ".join(f"{name} {100 * value:.1f} %" for name, value in pairs)
                    show_result(f"{path}: {shown}")
        else:
            among = arguments.among or "present"
            result = score(model, config, world, trained=source.classes, among=among)
            if world.is_main:
                print_scores(result, origin=source.origin, per_class=arguments.per_class)
        if arguments.json and world.is_main:
            write_text(arguments.json, json.dumps(result, indent=2) + "\n")


def main(argv: list[str]) -> int:
    """Run the command line; return the exit code and print one line for what a user did wrong."""
    return stopping.exit_code(lambda: run(parse(argv)))


if __name__ == "__main__":
    stopping.leave(main(sys.argv[1:]))
