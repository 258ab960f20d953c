"""Distillation: load a teacher and add its part to the loss of a run.

image_BCHW, as augmented and mixed -> teacher, without gradients -> teacher_BY
logits_2BY of the student's heads -> (1 - alpha) loss(class head) + alpha loss(second head, teacher)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import timm
import torch
import torch.distributed as dist
from timm.models import load_checkpoint
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from options import compose
from options.schema import Config, DistillationOptions
from parallel.distributed import World, expand_home
from parallel.terminal import warn
from training import losses, network
from training.run import Criterion, Run
from vit import VisionTransformer
from weights import preprocessing
from weights.sources import Choice, other_classes, read_source

Rgb = Sequence[float]


class Teacher(nn.Module):
    """A network in eval mode that takes images as they are normalised for its student.

    Shapes: image_BCHW -> logits_BY. `build_teacher` counts `flops_per_image`.
    """

    flops_per_image = 0

    def __init__(self, model: nn.Module, *, of: tuple[Rgb, Rgb], own: tuple[Rgb, Rgb]) -> None:
        """`of`: mean and std of the images that come in; `own`: those `model` was trained with."""
        super().__init__()
        self.model = model.eval().requires_grad_(False)
        mean_C, std_C, own_mean_C, own_std_C = (
            torch.tensor(list(values)).view(-1, 1, 1) for values in (*of, *own)
        )
        self.gain_C11 = nn.Buffer(std_C / own_std_C)
        self.offset_C11 = nn.Buffer((mean_C - own_mean_C) / own_std_C)
        self.is_plain = list(of[0]) == list(own[0]) and list(of[1]) == list(own[1])

    @torch.no_grad()
    def forward(self, image_BCHW: Tensor) -> Tensor:
        """Return the teacher's logits_BY, without a gradient."""
        if not self.is_plain:
            own_BCHW = image_BCHW.float() * self.gain_C11 + self.offset_C11
            image_BCHW = own_BCHW.to(image_BCHW.dtype)
        return self.model(image_BCHW)


def _of_ours(
    path: Path, config: Config, device: torch.device, *, classes: Sequence[str]
) -> tuple[nn.Module, Config]:
    """Return the network of a checkpoint of ours, and the options of its run."""
    hint = "is it the file of a model of timm? then name that, with teacher_checkpoint"
    try:
        choice = Choice(any_mode=config.training.checkpoint.any_mode)
        source = read_source(path, choice)
    except ValueError as error:
        raise ValueError(f"config distillation.teacher={path}: {error} ({hint})") from error
    if dist.get_rank() == 0:
        source.print_notes()
        if others := other_classes(source.classes, classes):
            warn(f"note: distillation.teacher={path}: {others}")
    if not source.config:
        raise ValueError(f"config distillation.teacher={path}: has no options of a run ({hint})")
    trained = compose.restore(source.config, [])
    backend, _ = network.pick_backend(config, device)
    model = network.build_model(trained, backend=backend, on_meta=False, device=device)
    network.load_weights(model, source)
    return model, trained


def _of_timm(name: str, config: Config) -> tuple[nn.Module, tuple[Rgb, Rgb]]:
    """Return a model of timm with its weights, and its mean and std."""
    if not timm.is_model(name):
        raise ValueError(
            f"config distillation.teacher={name}: is neither a folder or file nor a model of timm"
        )
    checkpoint, num_classes = config.distillation.teacher_checkpoint, config.model.vit.num_classes
    if checkpoint is not None and not expand_home(checkpoint).is_file():
        raise ValueError(
            f"config distillation.teacher={name} with teacher_checkpoint={checkpoint}: cannot be "
            "loaded: no such file"
        )
    try:
        if checkpoint is None:
            model = timm.create_model(name, pretrained=True)
        else:
            model = timm.create_model(name, num_classes=num_classes)
            load_checkpoint(model, str(expand_home(checkpoint)), strict=True)
    except (OSError, ValueError, RuntimeError) as error:
        reason = " ".join(str(error).split())
        where = f" with teacher_checkpoint={checkpoint}" if checkpoint else ""
        raise ValueError(
            f"config distillation.teacher={name}{where}: cannot be loaded: {reason}"
        ) from error
    about = dict(model.pretrained_cfg)
    if checkpoint is not None:  # timm reads the weights alone; an export of ours says more
        about |= preprocessing.of_file(expand_home(checkpoint))
    return model, (about["mean"], about["std"])


def build_teacher(config: Config, world: World, *, classes: Sequence[str] = ()) -> Teacher:
    """Return the teacher of a run, on its device in its compute dtype.

    `classes` are the ids of the student's classes; a teacher with other ids is noted on stderr.

    Raises:
        ValueError: It cannot be loaded, or its classes or image size are not the student's.
    """
    d, data = config.distillation, config.dataset
    assert d.teacher is not None, "the options say so"
    path, trained = expand_home(d.teacher), None
    own: tuple[Rgb, Rgb]
    if path.exists():
        if d.teacher_checkpoint is not None:
            raise ValueError(
                f"config distillation.teacher_checkpoint={d.teacher_checkpoint}: has no effect "
                f"with teacher={path}, which is a checkpoint"
            )
        model, trained = _of_ours(path, config, world.device, classes=classes)
        own = (trained.dataset.mean, trained.dataset.std)
    else:
        model, own = _of_timm(d.teacher, config)
    dtype = network.pick_dtype(config.model.dtype, world.device)
    teacher = Teacher(model.to(dtype), of=(data.mean, data.std), own=own).to(world.device)
    height, width = config.model.vit.img_hw
    image_1CHW = torch.zeros(1, 3, height, width, device=world.device, dtype=dtype)
    try:
        with FlopCounterMode(display=False) as counter:
            shape = tuple(teacher(image_1CHW).shape)
    except (AssertionError, ValueError) as error:
        raise ValueError(
            f"config distillation.teacher={d.teacher}: cannot take images of {height} x {width} "
            f"pixels, as model.vit.img_size says: {str(error).strip()}"
        ) from error
    # The counter does not see TransformerEngine's kernels, which our networks may use.
    if trained is None:
        teacher.flops_per_image = counter.get_total_flops()
    else:
        teacher.flops_per_image = network.flops_per_image(trained, training=False)
    if shape != (1, config.model.vit.num_classes):
        raise ValueError(
            f"config distillation.teacher={d.teacher}: has {shape[-1]} classes, not "
            f"model.vit.num_classes={config.model.vit.num_classes}"
        )
    return teacher


def distilled(criterion: Criterion, teacher: nn.Module, o: DistillationOptions) -> Criterion:
    """Return the loss of both heads: the labels' by `criterion`, the teacher's by the second."""

    def loss(logits_2BY: Tensor, target: Tensor, image_BCHW: Tensor) -> Tensor:
        from_labels = criterion(logits_2BY[0], target, image_BCHW)
        teacher_BY = teacher(image_BCHW)
        from_teacher = losses.teacher_loss(logits_2BY[1], teacher_BY, kind=o.kind, tau=o.tau)
        return (1 - o.alpha) * from_labels + o.alpha * from_teacher

    return loss


def with_teacher(run: Run) -> Run:
    """Return `run` with the distillation of its options in its loss."""
    d = run.config.distillation
    if d.kind == "none":
        return run
    student = run.model.get_submodule("module")
    assert isinstance(student, VisionTransformer), "what prepare.prepare shards"
    student.distilled_training = True
    teacher = build_teacher(run.config, run.world, classes=run.train_index.classes)
    criterion = distilled(run.criterion, teacher, d)
    return dataclasses.replace(run, criterion=criterion, teacher_flops=teacher.flops_per_image)
