"""A training step as a plain script has it, under FSDP2, and ours: what is put side by side.

    Config -> make_batch, timm_vit, our_vit -> plain_step | fsdp2_step | sharded_step -> Step

A Step makes one optimizer update and returns the loss, without waiting for the device. All of a
config start from the same weights: those of our network, a function of seed and names.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Callable, Mapping

import torch
from timm.models import VisionTransformer as TimmViT
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

import train
from images.batches import Batch
from layers import te
from options.schema import Config
from training import losses, network, optim
from training.run import Run
from vit import VisionTransformer

Step = Callable[[], Tensor]
# Relative difference of the first loss that is put down to rounding.
TOLERANCES = {torch.float32: 1e-4, torch.bfloat16: 2e-2}
# Of our options, those that timm's class does not have; they are off in what is measured.
NOT_OF_TIMM = ("grad_checkpointing", "distilled", "drop_path_uniform")


def make_batch(config: Config, device: torch.device, *, seed: int = 0) -> Batch:
    """Return a batch of noise on `device`: image_BCHW in fp32, label_B, position_B."""
    vit, size = config.model.vit, config.dataset.train.batch_size
    generator = torch.Generator(device).manual_seed(seed)
    shape_BCHW = (size, 3, *vit.img_hw)
    image_BCHW = torch.randn(shape_BCHW, generator=generator, device=device)
    label_B = torch.randint(0, vit.known_classes, (size,), generator=generator, device=device)
    return Batch(image_BCHW, label_B, torch.arange(size))


def our_vit(config: Config, device: torch.device) -> VisionTransformer:
    """Return our network with backend torch, not sharded."""
    model = network.build_model(config, backend="torch", on_meta=False, device=device)
    return model.to(device)


def timm_vit(config: Config, device: torch.device) -> nn.Module:
    """Return timm's network with our initial weights; dense only."""
    options = dataclasses.asdict(config.model.vit)
    names = {field.name for field in dataclasses.fields(config.model.vit)} & set(NOT_OF_TIMM)
    for name in names:
        del options[name]
    with torch.device("meta"):  # it would draw initial values that are not used
        model = TimmViT(**options)
    model.load_state_dict(our_vit(config, torch.device("cpu")).state_dict(), assign=True)
    return model.to(device)


def _adamw(model: nn.Module, config: Config, *, fused: bool | None) -> torch.optim.Optimizer:
    o = config.optimizer
    groups = optim.parameter_groups(model.named_parameters(), weight_decay=o.weight_decay)
    optimizer = torch.optim.AdamW(
        [dict(group) for group in groups], betas=(o.betas[0], o.betas[1]), eps=o.eps, fused=fused
    )
    optim.set_lr(optimizer, o.lr)
    return optimizer


def plain_step(
    model: nn.Module,
    config: Config,
    batch: Batch,
    *,
    fused: bool | None = True,
    autocast: torch.dtype | None = None,
) -> Step:
    """Return one training step the way a plain script does it, in `autocast` if that is given."""
    o, t = config.optimizer, config.training
    optimizer = _adamw(model, config, fused=fused)
    device = batch.image_BCHW.device

    def step() -> Tensor:
        optimizer.zero_grad()
        context: contextlib.AbstractContextManager = contextlib.nullcontext()
        if autocast is not None:
            context = torch.autocast(device.type, dtype=autocast)
        with context:
            logits_BY = model(batch.image_BCHW)
            loss = losses.smoothed_loss(logits_BY, batch.label_B, smoothing=t.label_smoothing)
        loss.backward()
        if o.clip_norm is not None:
            nn.utils.clip_grad_norm_(model.parameters(), o.clip_norm)
        optimizer.step()
        return loss.detach()

    return step


def fsdp2_step(
    model: VisionTransformer, config: Config, batch: Batch, *, dtype: torch.dtype
) -> Step:
    """Return the plain step of a model that is sharded, block by block, by torch's FSDP2."""
    device = batch.image_BCHW.device
    mesh = init_device_mesh(device.type, (1,))
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32)
    for block in model.blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    return plain_step(model, config, batch)


def sharded_step(run: Run, batch: Batch) -> Step:
    """Return one step of our loop; its loss is this rank's share of the mean over all ranks."""
    numbers = itertools.count()

    def step() -> Tensor:
        meter = train.Meter.start(run.world.device)
        train.train_step(run, iter([batch]), step=next(numbers), meter=meter)
        return meter.loss

    return step


def check_losses(first: Mapping[str, float], *, rival: str, dtype: torch.dtype) -> None:
    """Refuse to time loops that compute something else.

    Raises:
        ValueError: The first loss of a loop is not the rival's.
    """
    for name, loss in first.items():
        if why := loss_fault(loss, first[rival], dtype=dtype):
            raise ValueError(f"{name}: {why} of {rival}")


def loss_fault(loss: float, reference: float, *, dtype: torch.dtype) -> str | None:
    """Say that a first loss is not the reference, None if it is."""
    if abs(loss - reference) <= TOLERANCES[dtype] * abs(reference):
        return None
    return f"first loss {loss:.6g} is not the {reference:.6g}"


def te_reason() -> str | None:
    """Say why TransformerEngine does not import here, None if it does."""
    try:
        te.transformer_engine()
    except ImportError as error:
        return str(error)
    return None
