"""Time one AdamW update of a ViT's weights in each implementation against the memory's speed.

    python -m benchmarks.optimizer [--config-name vit_small_patch16_224] [--device cuda]

All get the same fp32 weights and gradients, and the first update of each is compared with that of
the plain loop over parameters. The floor is the time to read weight, gradient and both moments and
to write all but the gradient (28 bytes per weight) at the rate at which this machine multiplied a
large buffer in place in the same round; on CUDA at an H200's 4.3 TB/s. Rows:
  AdamW, loop | foreach | fused   torch.optim.AdamW
  TE FusedAdam                    transformer_engine's, where it imports
  moevit                          ours: fused, on shards, then the copy that the forward uses
"""

from __future__ import annotations

import importlib
import math
import statistics
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks import common, folders, steps
from benchmarks.clock import Run, clock_of, end_of, interleave
from benchmarks.moe_check import library_errors
from benchmarks.moe_kernels import PEAK_BYTES
from layers import te
from options import compose
from options.command_line import Parser
from options.schema import Config
from parallel import distributed, sharding
from training import prepare
from training import run as training_run

STREAM = "stream"  # of a large buffer, beside the updates, for the floor
REFERENCE, OURS, TE = "AdamW, loop", "moevit", "TE FusedAdam"
BYTES_PER_WEIGHT = 4 * (4 + 3)
STREAMED_BYTES = 2**28
TOLERANCE = 1e-5
WAYS: dict[str, dict[str, bool]] = {
    REFERENCE: {"foreach": False},
    "AdamW, foreach": {"foreach": True},
    "AdamW, fused": {"fused": True},
}


def streaming(device: torch.device, *, num_bytes: int) -> Run:
    """Return what reads a large buffer and writes it, in place as an update does.

    A copy would have the CPU read the target, too, before it writes over it.
    """
    values = torch.ones(num_bytes // 4, device=device)
    return lambda: values.mul_(1.0)


def gradients(model: nn.Module) -> dict[str, Tensor]:
    """Return noise of the size of gradients, by parameter name."""
    generator = torch.Generator().manual_seed(0)
    return {
        name: 0.01 * torch.randn(parameter.shape, generator=generator)
        for name, parameter in model.named_parameters()
    }


Way = tuple[Run, Callable[[], dict[str, Tensor]]]  # update, and the weights as they are


class Plain:
    """An optimizer over a copy of the weights, one group, without decay."""

    def __init__(self, weights: dict[str, Tensor], grads: dict[str, Tensor]) -> None:
        self.weights = {name: nn.Parameter(value.clone()) for name, value in weights.items()}
        for name, parameter in self.weights.items():
            parameter.grad = grads[name].to(parameter.device)

    def values(self) -> dict[str, Tensor]:
        """Return the weights as they are."""
        return {name: parameter.detach() for name, parameter in self.weights.items()}


class Sharded:
    """Our optimizer over the shards of a run of one rank, with the given gradients."""

    def __init__(self, run: training_run.Run, grads: dict[str, Tensor]) -> None:
        self.run = run
        for group in run.optimizer.param_groups:
            group["lr"], group["weight_decay"] = run.config.optimizer.lr, 0.0
        for shard in run.shards:
            shard.local.grad = grads[shard.name][shard.full_slice()].to(shard.local.device)

    def values(self) -> dict[str, Tensor]:
        """Return the main weights."""
        return {shard.name: shard.local.detach() for shard in self.run.shards}

    def update(self) -> None:
        """Update the main weights and what the forward uses."""
        sharding.step_optimizer(self.run.optimizer)


def te_adam(
    weights: dict[str, Tensor], grads: dict[str, Tensor], settings: dict, device: torch.device
) -> Way:
    """Return TransformerEngine's optimizer.

    Raises:
        ImportError: It does not import.
        ValueError: The device is a CPU.
    """
    if device.type != "cuda":
        raise ValueError("needs CUDA")
    te.transformer_engine()
    fused = importlib.import_module("transformer_engine.pytorch.optimizers").FusedAdam
    probe = nn.Parameter(torch.ones(8, device=device))
    probe.grad = torch.ones_like(probe)
    fused([probe], **settings, adam_w_mode=True).step()
    plain = Plain(weights, grads)
    return fused(list(plain.weights.values()), **settings, adam_w_mode=True).step, plain.values


def build(config: Config, world: distributed.World) -> tuple[dict[str, Way], dict[str, str]]:
    """Return (update, weights) of each way, and why a way cannot be had."""
    o, model = config.optimizer, steps.our_vit(config, world.device)
    grads = gradients(model)
    weights = {name: parameter.detach() for name, parameter in model.named_parameters()}
    settings = {"lr": o.lr, "betas": (o.betas[0], o.betas[1]), "eps": o.eps, "weight_decay": 0.0}
    ways: dict[str, Way] = {}
    missing = {}
    for name, implementation in WAYS.items():
        plain = Plain(weights, grads)
        made = torch.optim.AdamW(plain.weights.values(), **settings, **implementation)  # type: ignore[arg-type]
        ways[name] = (made.step, plain.values)
    try:
        ways[TE] = te_adam(weights, grads, settings, world.device)
    except library_errors("torch") as error:
        missing[TE] = f"{type(error).__name__}: {error}".splitlines()[0]
    run, _ = prepare.prepare(config, world)
    sharded = Sharded(run, grads)
    ways[OURS] = (sharded.update, sharded.values)
    return ways, missing


def check(ways: dict[str, Way]) -> None:
    """Make the first update of each.

    Raises:
        ValueError: A weight is not as the plain loop has it.
    """
    for update, _ in ways.values():
        update()
    expected = ways[REFERENCE][1]()
    for name, (_, values) in ways.items():
        for key, value in values().items():
            error = ((value - expected[key]).norm() / expected[key].norm().clamp(min=1e-8)).item()
            if not error <= TOLERANCE:
                raise ValueError(f"{name}: {key} is {error:.1e} off that of {REFERENCE}")


def floors_ms(
    stream_ms: list[float], *, num_weights: int, streamed_bytes: int, is_cuda: bool
) -> list[float]:
    """Return each round's floor: by how fast memory was, on CUDA by what an H200 does."""
    num_bytes = BYTES_PER_WEIGHT * num_weights
    if is_cuda:
        return [1000 * num_bytes / PEAK_BYTES] * len(stream_ms)
    return [ms * num_bytes / (2 * streamed_bytes) for ms in stream_ms]


def rows_of(times: dict[str, list[float]], floor_ms: list[float]) -> list[common.Row]:
    """Return a row per way, with its time over the floor of the same round."""
    rows = common.summarise(times, rival="AdamW, fused")
    for row, values in zip(rows, times.values(), strict=True):
        row["floor_ms"] = round(statistics.median(floor_ms), 3)
        row["over_floor"] = common.ratio(values, floor_ms)
    return rows


def main(argv: list[str] | None = None) -> None:
    """Measure, print a table and write it with what is needed to repeat it."""
    parser = Parser(description=__doc__)
    parser.add_argument("--config-name", default="vit_small_patch16_224")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--repeats", type=int, default=30)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--limit-s", type=float, default=math.inf, help="fewer rounds after this")
    parser.add_argument("--streamed-bytes", type=int, default=STREAMED_BYTES)
    parser.add_argument("--out", type=Path, help="default: results/<date>-<device>-optimizer.json")
    parser.add_argument("overrides", nargs="*")
    arguments = parser.parse_intermixed_args(argv)
    torch.set_num_threads(arguments.threads)
    with (
        folders.images(num_classes=folders.CLASSES) as root,
        distributed.process_group(arguments.device, timeout_s=600) as world,
    ):
        overrides = [*folders.options(root), f"model.vit.num_classes={folders.CLASSES}"]
        config = compose.compose(arguments.config_name, [*overrides, *arguments.overrides])
        ways, missing = build(config, world)
        check(ways)
        num_weights = sum(value.numel() for value in ways[REFERENCE][1]().values())
        runs = {name: update for name, (update, _) in ways.items()}
        runs[STREAM] = streaming(world.device, num_bytes=arguments.streamed_bytes)
        clock = clock_of(world.device)
        end_s = end_of(arguments.limit_s)
        times = interleave(runs, clock, repeats=arguments.repeats, end_s=end_s)
        stream_ms = times.pop(STREAM)
        floor_ms = floors_ms(
            stream_ms,
            num_weights=num_weights,
            streamed_bytes=arguments.streamed_bytes,
            is_cuda=world.device.type == "cuda",
        )
        rows = rows_of(times, floor_ms)
        rate = 2 * arguments.streamed_bytes / (statistics.median(stream_ms) / 1000)
        common.print_rows(rows)
        conditions = {
            "config": arguments.config_name,
            "overrides": arguments.overrides,
            "weights": num_weights,
            "memory_gb_per_s": round(rate / 1e9, 2),
            "rounds": len(times[OURS]),
            "unavailable": missing,
        }
        common.write(
            "optimizer", out=arguments.out, conditions=conditions, rows=rows, device=world.device
        )


if __name__ == "__main__":
    main()
