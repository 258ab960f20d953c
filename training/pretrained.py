"""Begin a run with given weights: read once, share, install, and say where each came from.

    file, folder or model of timm -> rank 0 reads -> all ranks have it -> warm_start.initial_weights
        -> each rank's part of the main weights and of their average -> init.txt, log.jsonl

A resumed run has its weights in its own checkpoint and reads nothing here.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from pathlib import Path

import timm
import torch
import torch.distributed as dist
from timm.models.vision_transformer import VisionTransformer as TimmVisionTransformer

from options.schema import InitOptions
from parallel import sharding
from parallel.collectives import broadcast_or_raise, capture
from parallel.distributed import expand_home
from training.logbook import Logbook
from training.run import Run
from weights import formats, preprocessing, warm_start
from weights.files import write_text
from weights.formats import Json, MtlFile, Weights
from weights.provenance import LOADED, Initial
from weights.sources import Choice, Source, other_classes, read_source
from weights.upcycling import Job, Target

TABLE, HEAD = "init.txt", "head.weight"


@dataclasses.dataclass(frozen=True)
class Pretrained:
    """Weights by our names, where they are from, and what is known of their model.

    `preprocessing` is how their images were prepared, in timm's words; {} if unknown.
    """

    weights: Weights
    origin: str
    num_heads: int | None
    grid_hw: tuple[int, int] | None
    preprocessing: Json
    classes: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Beginning:
    """What a run began with; `origin` and `num_heads` are the checkpoint's, if there was one.

    `other_classes` says how the classes of its head, if that is used, differ from the dataset's,
    and `other_images` how images were prepared for it that are not now.
    """

    mode: str
    initial: Initial
    origin: str | None = None
    num_heads: int | None = None
    other_classes: str | None = None
    other_images: str | None = None


def _pair(value: object) -> tuple[int, int] | None:
    sides = value if isinstance(value, list | tuple) and len(value) == 2 else (value, value)
    height, width = sides
    return (height, width) if isinstance(height, int) and isinstance(width, int) else None


def _grid(img_size: object, patch_size: object) -> tuple[int, int] | None:
    """Return the patches down and across, if both sizes are known."""
    image, patch = _pair(img_size), _pair(patch_size)
    if image is None or patch is None or min(patch) < 1:
        return None
    return image[0] // patch[0], image[1] // patch[1]


def _options(source: Source) -> Mapping[str, object]:
    """Return what is known of the options of the network, by timm's names."""
    model = source.config.get("model")
    vit = model.get("vit") if isinstance(model, Mapping) else None
    if isinstance(vit, Mapping):
        return vit
    return source.content.meta if isinstance(source.content, MtlFile) else {}


def _read_source(path: Path, choice: Choice) -> tuple[Source, Weights]:
    """Read what is at `path`, and apart from it what a distilled model of M3ViT has in addition."""
    source = read_source(path, choice)
    if not isinstance(source.content, MtlFile):
        return source, {}
    encoder, second = warm_start.split_distillation(source.content.weights)
    return dataclasses.replace(
        source, content=dataclasses.replace(source.content, weights=encoder)
    ), second


def _from_timm(name: str) -> Pretrained:
    """Download one of timm's models, or take it from its cache."""
    try:
        model = timm.create_model(name, pretrained=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise ValueError(
            f"config init.checkpoint={name}: no such file, and timm cannot load weights of that "
            f"name: {reason}"
        ) from error
    if not isinstance(model, TimmVisionTransformer):
        raise ValueError(f"config init.checkpoint={name}: is no ViT: {type(model).__name__}")
    bare, second = warm_start.split_distillation(model.state_dict())
    weights = {**formats.from_timm(bare), **second}
    heads, about = (
        model.blocks[0].attn.num_heads,
        preprocessing.parse(model.pretrained_cfg),
    )
    return Pretrained(weights, f"timm {name}", heads, model.patch_embed.grid_size, about)


def read(checkpoint: str, which: str | None = None, *, any_mode: bool = False) -> Pretrained:
    """Read a file or folder, or the model of timm of that name if there is neither.

    `which` is "model" or "ema" where there are several weights; None: see weights.sources.Choice.
    """
    path = expand_home(checkpoint)
    if path.exists():
        source, second = _read_source(path, Choice(which, any_mode=any_mode))
        source.print_notes()
        options = _options(source)
        heads = options.get("num_heads")
        return Pretrained(
            {**source.weights(), **second},
            source.origin,
            heads if isinstance(heads, int) else None,
            _grid(options.get("img_size"), options.get("patch_size")),
            source.preprocessing,
            source.classes,
        )
    if timm.is_model(checkpoint):
        if which is not None:
            raise ValueError(
                f"config init.weights={which}: timm's {checkpoint} has one set of them"
            )
        return _from_timm(checkpoint)
    raise FileNotFoundError(
        f"config init.checkpoint={checkpoint}: no such file or folder, and no model of timm"
    )


def read_on_main(
    checkpoint: str, which: str | None, *, is_main: bool, any_mode: bool = False
) -> Pretrained:
    """Read on rank 0 and return it on every rank, in fp32 on the CPU. Collective."""
    reading = functools.partial(read, checkpoint, which, any_mode=any_mode)
    found = capture(reading) if is_main else None
    about: Pretrained | Exception | None = found
    if isinstance(found, Pretrained):
        shapes = {name: tensor.to("meta") for name, tensor in found.weights.items()}
        about = dataclasses.replace(found, weights=shapes)
    known = broadcast_or_raise(about)
    assert known is not None, "rank 0 has read it"
    weights: Weights = {}
    for name, shape in known.weights.items():
        own = found.weights[name] if isinstance(found, Pretrained) else torch.empty(shape.shape)
        weights[name] = own.to(torch.float32).contiguous()
        dist.broadcast(weights[name], src=0)
    return dataclasses.replace(known, weights=weights)


@torch.no_grad()
def _install(run: Run, initial: Initial, *, origin: str) -> None:
    """Write the new values into this rank's main weights; the average begins with them too."""
    values = initial.values
    for shard in run.shards:
        if shard.name in values:
            try:
                value = values[shard.name]()
            except RuntimeError as error:  # parts of an MLP that do not fit together
                raise ValueError(f"{origin}: {shard.name} cannot be made: {error}") from error
            if value.shape != shard.main.shape:
                raise ValueError(
                    f"{origin}: {shard.name} would be {tuple(value.shape)}, must be "
                    f"{tuple(shard.main.shape)}"
                )
            sharding.load_full([shard], {shard.name: value})
    sharding.install_weights(run.model)
    if run.ema is not None:
        torch._foreach_copy_(run.ema.average, run.ema.tensors)


def begin(run: Run) -> Beginning:
    """Give a new run the initial weights that its options ask for. Collective.

    Raises:
        OSError: On every rank, if the checkpoint cannot be read.
        ValueError: The same, or it does not fit the model.
    """
    o, model = run.config.init, run.config.model
    target = Target(
        shapes={shard.name: shard.main.shape for shard in run.shards},
        vit=model.vit,
        seed=run.config.training.seed,
        experts=model.moe if model.moe.num_experts else None,
    )
    if o.checkpoint is None:
        job = Job({}, target, InitOptions(mode="scratch"), origin="")
        return Beginning("scratch", warm_start.initial_weights(job))
    any_mode = run.config.training.checkpoint.any_mode
    found = read_on_main(o.checkpoint, o.weights, is_main=run.world.is_main, any_mode=any_mode)
    num_heads, origin = run.config.model.vit.num_heads, f"config init.checkpoint={o.checkpoint}"
    if found.num_heads not in (None, num_heads):
        raise ValueError(
            f"config model.vit.num_heads={num_heads}: must be {found.num_heads}, as in "
            f"{found.origin} (shapes do not show it)"
        )
    has_experts = target.experts is not None
    mode = warm_start.resolve_mode(o.mode, source=found.weights, has_experts=has_experts)
    weights = found.weights
    if "dist_token" not in target.shapes:
        weights = warm_start.without_distillation(weights)
    plan = dataclasses.replace(o, mode=mode)
    initial = warm_start.initial_weights(Job(weights, target, plan, origin, found.grid_hw))
    _install(run, initial, origin=origin)
    left_out = [*initial.left_out, *(name for name in found.weights if name not in weights)]
    initial = dataclasses.replace(initial, left_out=left_out)
    has_head = any(entry.name == HEAD and entry.origin == LOADED for entry in initial.entries)
    others = other_classes(found.classes, run.train_index.classes) if has_head else None
    asked = preprocessing.of_options(dataclasses.asdict(run.config))
    images = preprocessing.differences(found.preprocessing, asked)
    return Beginning(mode, initial, found.origin, found.num_heads, others, images)


def note(run: Run, logbook: Logbook, beginning: Beginning | None) -> None:
    """Log what the run began with and write init.txt; None: it was resumed. Rank 0 writes."""
    if beginning is None:
        if run.config.init.checkpoint is not None:
            logbook.event("init", ignored=run.config.init.checkpoint, why="the run is resumed")
        return
    if run.world.is_main:
        head = [f"mode: {beginning.mode}", f"checkpoint: {beginning.origin}", ""]
        write_text(run.folder / TABLE, "\n".join([*head, *beginning.initial.lines()]) + "\n")
    if beginning.origin is None:  # the line of the run says so
        return
    width = run.config.model.vit.embed_dim // run.config.model.vit.num_heads
    logbook.event(
        "init",
        mode=beginning.mode,
        asked=run.config.init.mode,
        checkpoint=beginning.origin,
        experts=beginning.initial.effect,
        num_heads=beginning.num_heads
        or f"unknown of the checkpoint; {width} wide here, 64 in DeiT",
        table=str(run.folder / TABLE),
    )
    for origin, names in beginning.initial.by_origin().items():
        logbook.event("init_tensors", origin=origin, names=names)
    if beginning.other_classes:
        logbook.event("init_classes", note=beginning.other_classes)
    if beginning.other_images:
        logbook.event("init_images", note=beginning.other_images)
    if beginning.initial.left_out:
        logbook.event("init_not_used", names=beginning.initial.left_out)
