"""Which training steps the GPU benchmark compares, and how to make each: rows of data.

    Group (one network size and batch) -> its contenders by name -> Made: a Step and its FLOPs

A contender's name is the same in all groups. What it needs and is not here is an exception at its
making, which the benchmark turns into a row that says why.
"""

from __future__ import annotations

from collections.abc import Callable, Collection
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

import moe
from benchmarks import folders, steps
from benchmarks.steps import Step
from images.batches import Batch
from moe_kernels.plan import ACTIVATIONS
from moe_kernels.torch_ffn import activate
from options import compose
from options.schema import Config
from parallel.distributed import World
from training import network, prepare

TIMM, TIMM_COMPILED = "timm, eager", "timm, compiled"
OURS, OURS_COMPILED = "moevit", "moevit, compiled"
TE, TE_FP8 = "moevit, TE bf16", "moevit, TE fp8"
SDPA, FLASH, CUDNN = "moevit, sdpa auto", "moevit, sdpa flash", "moevit, sdpa cudnn"
EXPERTS, EXPERTS_COMPILED = "experts", "experts, compiled"
TORCH_EXPERTS, LOOP_EXPERTS = "experts, torch kernels", "experts, python loop"
PLAIN, FSDP2 = "ours, plain", "ours, FSDP2"

MOE = ("model.moe.num_experts=8", "model.moe.top_k=1", "model.moe.mlp_ratio=4")
COMPILE = ("model.backend=torch", "model.compile=true")
EAGER = ("model.backend=torch",)
# What a sharded contender adds to the options of its group.
SHARDED: dict[str, tuple[str, ...]] = {
    OURS: EAGER,
    OURS_COMPILED: COMPILE,
    TE: ("model.backend=te",),
    TE_FP8: ("model.backend=te", "model.te_fp8=current"),
    SDPA: (*COMPILE, "model.sdpa=auto"),
    FLASH: (*COMPILE, "model.sdpa=flash"),
    CUDNN: (*COMPILE, "model.sdpa=cudnn"),
    EXPERTS: (*EAGER, *MOE),
    EXPERTS_COMPILED: (*COMPILE, *MOE),
    TORCH_EXPERTS: (*EAGER, *MOE, "model.moe.kernels=torch"),
}
GROUPS: dict[str, tuple[str, ...]] = {
    "dense": (TIMM, TIMM_COMPILED, OURS, OURS_COMPILED, TE, TE_FP8),
    "sdpa": (SDPA, FLASH, CUDNN),
    "experts": (
        OURS,
        OURS_COMPILED,
        EXPERTS,
        EXPERTS_COMPILED,
        TORCH_EXPERTS,
        LOOP_EXPERTS,
    ),
    "wrapper": (PLAIN, FSDP2, OURS),
}
# Whose time the ratio is of: a group's rival, but for experts the dense step of the same kind, and
# for other ways to compute them ours.
RIVALS = {"dense": TIMM_COMPILED, "sdpa": SDPA, "experts": OURS, "wrapper": PLAIN}
RIVALS_OF_EXPERTS = {
    EXPERTS_COMPILED: OURS_COMPILED,
    TORCH_EXPERTS: EXPERTS,
    LOOP_EXPERTS: EXPERTS,
}
# width, depth, heads: timm's vit_{small,base,large}_patch16_224
SIZES = {"S16": (384, 12, 6), "B16": (768, 12, 12), "L16": (1024, 24, 16)}
DRY_SIZE = (32, 2, 2)
# The most telling first: a run that ends early has those.
GRID = [
    ("dense", "B16", 256),
    ("dense", "S16", 512),
    ("dense", "L16", 256),
    ("experts", "B16", 256),
    ("experts", "S16", 256),
    ("wrapper", "B16", 256),
    ("sdpa", "B16", 256),
    ("sdpa", "S16", 512),
    ("dense", "S16", 256),
    ("dense", "B16", 512),
    ("dense", "L16", 128),
    ("dense", "S16", 128),
    ("dense", "B16", 128),
    ("dense", "L16", 512),
    ("wrapper", "S16", 256),
]
DRY_GRID = [("dense", "S16", 2), ("experts", "S16", 2), ("wrapper", "S16", 2), ("sdpa", "S16", 2)]


@dataclass(frozen=True)
class Group:
    """Rivals that are timed in turns: one kind, size and batch."""

    kind: str
    size: str
    batch: int

    @property
    def label(self) -> str:
        """Return what --match looks at and results are known by."""
        return f"{self.kind} {self.size} b{self.batch}"


@dataclass(frozen=True)
class Made:
    """A contender: its step, and the FLOPs of an image forward."""

    step: Step
    flops_per_image: int


@dataclass(frozen=True)
class Setting:
    """On what to measure."""

    world: World
    dtype: torch.dtype
    root: Path
    num_classes: int
    is_dry: bool

    @property
    def kernels(self) -> str:
        """Return the kernels of our experts here, whose compiler has errors of its own."""
        return "triton" if self.world.device.type == "cuda" else "torch"


def options(group: Group, setting: Setting, *more: str) -> Config:
    """Return the options of a group with `more` on top."""
    dim, depth, heads = DRY_SIZE if setting.is_dry else SIZES[group.size]
    overrides = [
        *folders.options(setting.root),
        f"model.vit.embed_dim={dim}",
        f"model.vit.depth={depth}",
        f"model.vit.num_heads={heads}",
        f"model.vit.num_classes={setting.num_classes}",
        f"model.vit.img_size={32 if setting.is_dry else 224}",
        "model.vit.drop_path_rate=0",
        "model.moe.every_n=2",
        f"dataset.train.batch_size={group.batch}",
        "dataset.train.mixup=0",
        "dataset.train.auto_augment=null",
        "optimizer.warmup_steps=0",
        "optimizer.clip_norm=1.0",
        "training.label_smoothing=0.1",
        f"device={setting.world.device.type}",
    ]
    return compose.compose("vit_small_patch16_224", [*overrides, *more])


def _batch(config: Config, setting: Setting) -> Batch:
    return steps.make_batch(config, setting.world.device)


def timm_step(group: Group, setting: Setting, *, is_compiled: bool) -> Made:
    """Make timm's network in a plain loop, in autocast, as a whole compiled or not."""
    config = options(group, setting)
    model = steps.timm_vit(config, setting.world.device)
    if is_compiled:
        model = torch.compile(model, dynamic=False)  # type: ignore[assignment]
    return _plain(model, config, setting)


def _plain(model: nn.Module, config: Config, setting: Setting) -> Made:
    autocast = None if setting.dtype == torch.float32 else setting.dtype
    step = steps.plain_step(model, config, _batch(config, setting), autocast=autocast)
    return Made(step, network.flops_per_image(config))


def plain_ours(group: Group, setting: Setting) -> Made:
    """Make our network in that plain loop."""
    config = options(group, setting, *EAGER)
    return _plain(steps.our_vit(config, setting.world.device), config, setting)


def fsdp2(group: Group, setting: Setting) -> Made:
    """Make our network under torch's FSDP2."""
    config = options(group, setting, *EAGER)
    model, batch = steps.our_vit(config, setting.world.device), _batch(config, setting)
    return Made(
        steps.fsdp2_step(model, config, batch, dtype=setting.dtype), network.flops_per_image(config)
    )


def sharded(group: Group, setting: Setting, *more: str) -> Made:
    """Make the whole of ours: Megatron-FSDP, the step of train.py."""
    config = options(group, setting, *more)
    run, _ = prepare.prepare(config, setting.world)
    return Made(steps.sharded_step(run, _batch(config, setting)), run.flops_per_image)


class LoopMoE(moe.MoE):
    """Our layer with a loop over experts that pick their rows, as Mixtral's was in transformers."""

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Return the feed-forward branch: x_BLD -> x_BLD."""
        x_TD = x_BLD.flatten(0, 1)
        routing = self.router(
            x_TD, sum_over_ranks=self.sum_over_ranks, tokens_per_image=x_BLD.shape[1]
        )
        self.routing, e = routing, self.experts
        y_TD = torch.zeros_like(x_TD)
        w_in, w_out = e.w_in.chunk(e.num_local), e.w_out.chunk(e.num_local)
        assert e.b_in is not None and e.b_out is not None, "the networks compared have biases"
        for number in range(e.num_local):
            token_R, choice_R = torch.where(routing.expert_id_Tk == number)
            z_RF = nn.functional.linear(x_TD[token_R], w_in[number], e.b_in[number])
            h_RF = activate(z_RF, ACTIVATIONS[e.activation])
            y_RD = nn.functional.linear(h_RF, w_out[number], e.b_out[number])
            y_RD = y_RD * routing.weight_Tk[token_R, choice_R, None]
            y_TD = y_TD.index_add(0, token_R, y_RD.to(y_TD.dtype))
        return y_TD.view_as(x_BLD)


def python_loop(group: Group, setting: Setting) -> Made:
    """Make our network with the experts in a Python loop, in the plain loop: no balance loss."""
    config = options(group, setting, *EAGER, *MOE, "model.moe.kernels=torch")
    model = steps.our_vit(config, setting.world.device)
    for block in model.blocks:
        if isinstance(block.mlp, moe.MoE):
            block.mlp.__class__ = LoopMoE
    return _plain(model, config, setting)


def makers() -> dict[str, Callable[[Group, Setting], Made]]:
    """Return how to make each contender, by name."""

    def of(overrides: tuple[str, ...]) -> Callable[[Group, Setting], Made]:
        return lambda group, setting: sharded(group, setting, *overrides)

    made: dict[str, Callable[[Group, Setting], Made]] = {
        TIMM: lambda group, setting: timm_step(group, setting, is_compiled=False),
        TIMM_COMPILED: lambda group, setting: timm_step(group, setting, is_compiled=True),
        PLAIN: plain_ours,
        FSDP2: fsdp2,
        LOOP_EXPERTS: python_loop,
    }
    return made | {name: of(overrides) for name, overrides in SHARDED.items()}


def is_of_experts(name: str) -> bool:
    """Return whether a contender's network has experts, so that its loss is another."""
    return name in (EXPERTS, EXPERTS_COMPILED, TORCH_EXPERTS, LOOP_EXPERTS)


def rival_of(group: Group, name: str, ready: Collection[str]) -> str:
    """Return whose time a contender's is compared with; the first that works if that does not."""
    rival = RIVALS_OF_EXPERTS.get(name, RIVALS[group.kind])
    return rival if rival in ready else next(iter(ready))
