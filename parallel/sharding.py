"""Megatron-FSDP: wrap the model, drive gradients and the optimizer, name the state.

    vit on meta or CPU --shard_model--> MegatronFSDP --build_optimizer--> AdamW over local shards
    microbatch(is_last) -> loss.backward() -> finish_gradients -> clip -> optimizer step

The only file that imports megatron_fsdp (0.6.1). Each workaround is explained where it stands;
`tests/test_sharding.py` compares the whole with plain PyTorch in one process. Without CUDA,
parallel/cpu_shim.py gives the library CPU streams and blocking collectives.
"""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from parallel import cpu_shim
from parallel.distributed import Meshes

with warnings.catch_warnings():
    # "Transformer Engine and Apex are not installed": layers/te.py decides on the former itself.
    warnings.filterwarnings("ignore", message="Transformer Engine and Apex")
    from megatron_fsdp import MixedPrecisionPolicy, fully_shard_model, fully_shard_optimizer
    from megatron_fsdp.distributed_data_parallel_config import DistributedDataParallelConfig
    from megatron_fsdp.megatron_fsdp import MegatronFSDP
    from megatron_fsdp.param_and_grad_buffer import (
        BucketingPolicy,
        ParameterGroup,
        _get_parameter_groups,
        build_data_parallel_buffer_index,
    )
    from megatron_fsdp.uneven_dtensor import update_uneven_dtensor_chunk_metadata

STRATEGIES = ("no_shard", "optim", "optim_grads", "optim_grads_params")


def keep_full_precision(parameter: Tensor, value: Tensor) -> None:
    """Let Megatron-FSDP start the main weight from `value`, not from its rounding in `parameter`.

    The library asks TransformerEngine's fp8 parameters for their unrounded values through these two
    attributes, so any parameter that has them is asked.
    """
    parameter.get_high_precision_init_val = lambda: value  # type: ignore[attr-defined]
    parameter.clear_high_precision_init_val = lambda: vars(parameter).pop(  # type: ignore[attr-defined]
        "get_high_precision_init_val"
    )


def strategy_name(strategy: str | int) -> str:
    """Return the library's name of a ZeRO strategy given as 0..3 or by name."""
    if isinstance(strategy, int) and 0 <= strategy < len(STRATEGIES):
        return STRATEGIES[strategy]
    if strategy in STRATEGIES:
        return str(strategy)
    raise ValueError(
        f"config fsdp.zero_dp_strategy={strategy}: must be 0, 1, 2, 3 or one of "
        f"{', '.join(STRATEGIES)}"
    )


def _hybrid_options(meshes: Meshes) -> dict[str, object]:
    """Return what HSDP needs beyond the meshes, nothing without replicas.

    The library wants the group of both axes together ready-made, once for dense parameters and once
    for experts, which are sharded over other ranks.
    """
    if meshes.dp_outer == 1:
        return {}
    axes = ("dp_outer", "dp_shard")
    return {
        "dp_outer_dim": "dp_outer",
        "hybrid_fsdp_group": meshes.dense[axes]._flatten().get_group(),
        "hybrid_fsdp_expt_group": meshes.expert[axes]._flatten().get_group(),
    }


def cut_parameters(group: ParameterGroup, num_ranks: int) -> list[nn.Parameter]:
    """Return the parameters of a buffer that have a row on two of the `num_ranks` ranks.

    The library lays a buffer's parameters end to end and gives each rank an equal part, a multiple
    of the least common multiple of all row sizes. A parameter smaller than that multiple goes
    wherever there is room, and the end of a part may then fall inside one of its rows.
    """
    shapes = [parameter.shape for parameter in group.params]
    # Only its strategy is read, and all but no_shard are laid out alike.
    config = DistributedDataParallelConfig(data_parallel_sharding_strategy="optim_grads_params")
    items, _, part = build_data_parallel_buffer_index(
        shapes, 0, num_ranks, True, config, chunk_size_factor=group.chunk_size_factor
    )

    def is_cut(number: int, shape: torch.Size) -> bool:
        start = items[number].global_data_index
        first_end = math.ceil(start / part.size) * part.size
        ends = range(first_end, start + shape.numel(), part.size)
        return any((end - start) % shape[1:].numel() for end in ends)

    return [group.params[number] for number, shape in enumerate(shapes) if is_cut(number, shape)]


def keep_rows_whole(
    model: nn.Module, unit_types: list[type[nn.Module]], *, dense_ranks: int, expert_ranks: int
) -> None:
    """Have the library lay out `model` so that every row of every parameter is on one rank.

    A row on two ranks ends in the library's reshape error, and whether there is one depends on the
    number of classes, the image size, the width and the number of ranks. A parameter with such a
    row gets a buffer of its own, where the parts are whole rows. The ranks are those over which a
    dense and an expert parameter are sharded.
    """
    policy = BucketingPolicy(None, unit_types, "optim_grads_params")
    while True:
        groups, _, _ = _get_parameter_groups(model, policy, {})
        cut = [
            parameter
            for group in groups
            for parameter in cut_parameters(
                group, expert_ranks if group.is_expert_param else dense_ranks
            )
        ]
        if not cut:
            return
        for parameter in cut:
            # The library's name for a parameter with a buffer of its own, whatever the reason.
            parameter.shared_embedding = True  # type: ignore[attr-defined]


def _check_experts(model: nn.Module) -> None:
    for name, parameter in model.named_parameters():
        # The library looks for experts by name in one place and by this attribute in another.
        is_expert = getattr(parameter, "allreduce", True) is False
        assert is_expert == (".experts." in name), f"{name} is half an expert"


def shard_model(
    model: nn.Module,
    meshes: Meshes,
    *,
    unit_types: list[type[nn.Module]],
    strategy: str | int = 3,
    outer_strategy: str = "no_shard",
    compute_dtype: torch.dtype = torch.float32,
) -> MegatronFSDP:
    """Shard `model` over the meshes; parameters on the meta device are made by reset_parameters.

    Main weights, gradients and their communication are fp32; the forward and backward run in
    `compute_dtype`. Gradients are summed over all ranks, not averaged, so each rank must divide its
    loss by the number of ranks: gloo cannot scale inside a sum, and an average over the ranks that
    hold an expert would divide by too few, since its gradient has the tokens of all its `ep` peers.
    """
    _check_experts(model)
    device = torch.device(meshes.dense.device_type)
    if device.type == "cpu":
        cpu_shim.install()
    else:
        device = torch.device("cuda", torch.cuda.current_device())
    replicas = 1 if outer_strategy == "no_shard" else meshes.dp_outer
    if strategy_name(strategy) != "no_shard":
        keep_rows_whole(
            model,
            unit_types,
            dense_ranks=replicas * meshes.dense.size(1),
            expert_ranks=replicas * meshes.expert.size(1),
        )
    is_meta = any(parameter.is_meta for parameter in model.parameters())
    if is_meta and strategy_name(strategy) == "no_shard":
        raise ValueError(
            "config fsdp.zero_dp_strategy=no_shard: cannot start from the meta device (build the "
            "model on the CPU, or use strategy 1, 2 or 3)"
        )
    if not is_meta and compute_dtype != torch.float32:
        # Before `model.to` below rounds them.
        for parameter in model.parameters():
            keep_full_precision(parameter, parameter.detach().clone())
    # None: the weights that the forward uses are the main weights, without a copy.
    main_dtype = None if compute_dtype == torch.float32 else torch.float32
    return fully_shard_model(
        model.to(compute_dtype),
        device_mesh=meshes.dense,
        expt_device_mesh=meshes.expert,
        dp_shard_dim="dp_shard",
        # To the library `ep` is tensor parallelism: an axis along which ranks hold different rows
        # of a parameter and over which it neither gathers nor reduces.
        tp_dim="ep",
        # What is gathered and freed as one: a block at a time.
        fsdp_unit_modules=unit_types,
        zero_dp_strategy=strategy_name(strategy),
        outer_dp_sharding_strategy=outer_strategy,
        device=device,
        # Modules are then made and sharded in turn: the whole model never exists at once.
        init_model_with_meta_device=is_meta,
        # Main weights, main gradients, communication. If the last two dtypes differ, the library
        # doubles gradients in groups of one rank.
        mixed_precision_policy=MixedPrecisionPolicy(main_dtype, torch.float32, torch.float32),
        # `microbatch` and `finish_gradients` say when gradients are communicated.
        sync_model_each_microbatch=False,
        # Sum gradients over ranks instead of averaging them.
        calculate_per_token_loss=True,
        # The hook gathers chunk metadata with hundreds of small collectives at each state_dict();
        # `model_state` reuses the metadata made when the model was sharded.
        preproc_state_dict_for_dcp_ckpt=False,
        **_hybrid_options(meshes),
    )


@dataclass(frozen=True)
class Shard:
    """One parameter as this rank holds it.

    `main` is the library's DTensor of the fp32 main weight, `local` this rank's rows of it as a
    plain tensor on the same memory (possibly no rows), which the optimizer updates: on DTensors
    the same update costs a dispatch of some 50 us for every operation and parameter.
    `num_copies` is how many ranks of the world hold each element.
    """

    name: str
    local: nn.Parameter
    main: DTensor
    num_copies: int

    def full_slice(self) -> tuple[slice, ...]:
        """Return where `local` lies in the full tensor."""
        chunks = getattr(self.main._local_tensor, "__create_chunk_list__", None)
        if chunks is None:  # not sharded at all
            return tuple(slice(0, size) for size in self.main.shape)
        offsets = chunks()[0].offsets
        return tuple(
            slice(offset, offset + size)
            for offset, size in zip(offsets, self.local.shape, strict=True)
        )


def _num_sharded_ranks(tensor: DTensor) -> int:
    """Return over how many ranks the elements of `tensor` are spread."""
    axes = enumerate(tensor.placements)
    return math.prod(tensor.device_mesh.size(n) for n, p in axes if not p.is_replicate())


def list_shards(model: MegatronFSDP, *, rename: Callable[[str], str]) -> list[Shard]:
    """Return this rank's shard of every parameter, in model order. Collective.

    `rename` maps a module's parameter name to the one that checkpoints and groups use.
    """
    model._replace_param_with_distributed_if_needed()
    shards = []
    for name, main in model.module.named_parameters():
        if _num_sharded_ranks(main) > 1 and not hasattr(
            main._local_tensor, "__create_chunk_list__"
        ):
            update_uneven_dtensor_chunk_metadata(main)
        local = nn.Parameter(main._local_tensor.detach(), requires_grad=main.requires_grad)
        local._megatron_fsdp_model = model  # type: ignore[attr-defined]  # fully_shard_optimizer
        num_copies = dist.get_world_size() // _num_sharded_ranks(main)
        shards.append(Shard(rename(name), local, main, num_copies))
    return shards


def shard_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Let `optimizer`, built over `Shard.local` tensors, drive the sharded model's weights.

    To make the state tensors, the library first takes a step with zero gradients. That would decay
    the weights once and leave Adam's step count at 1, making the first update 1.34 times too small.
    So lr and weight decay are 0 during that step, and the counts are set back to 0 after it.
    """
    kept = [(group["lr"], group["weight_decay"]) for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = group["weight_decay"] = 0.0
    fully_shard_optimizer(optimizer, preproc_state_dict_for_dcp_ckpt=False)
    for group, (lr, weight_decay) in zip(optimizer.param_groups, kept, strict=True):
        group["lr"], group["weight_decay"] = lr, weight_decay
    for state in optimizer.state.values():
        if "step" in state:
            state["step"].zero_()


@contextlib.contextmanager
def microbatch(model: MegatronFSDP, *, is_last: bool) -> Iterator[None]:
    """Run the forward and backward of one microbatch; only the last communicates gradients.

    Until then each rank accumulates in `.grad`, in fp32 and unsharded (4 bytes per parameter). Left
    alone, the library would reduce in every microbatch with ZeRO 2 and 3, so that is held back.
    """
    model.is_last_microbatch = is_last
    if is_last:
        yield
        return
    model._replace_param_with_raw_if_needed()
    parameters = [p for p in model.module.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.skip_backward_post_hook = True  # type: ignore[attr-defined]
        parameter.grad_dtype = torch.float32

    def hold_back(_: nn.Module, __: object, output: Tensor) -> None:
        # At the end of backward the library reduces every parameter that its hooks have not. It
        # lists them all when the gradient of the model's output arrives; we empty the list then.
        output.register_hook(lambda _: model._params_require_handle_grad.clear())

    hook = model.register_forward_hook(hold_back)
    try:
        yield
    finally:
        hook.remove()
        for parameter in parameters:
            parameter.skip_backward_post_hook = False  # type: ignore[attr-defined]


def finish_gradients(model: MegatronFSDP, shards: list[Shard]) -> None:
    """Wait for the reduced gradients and give each shard its part. Call after the last backward."""
    model.finish_grad_sync()
    for shard in shards:
        gradient = shard.main.grad
        assert gradient is None or isinstance(gradient, DTensor), "Megatron-FSDP attaches DTensors"
        shard.local.grad = None if gradient is None else gradient._local_tensor


@torch.no_grad()
def clip_gradients(shards: list[Shard], max_norm: float | None) -> Tensor:
    """Scale the gradients to a global L2 norm of at most `max_norm`; return the norm before.

    Equal to `torch.nn.utils.clip_grad_norm_` on the unsharded model, whatever the meshes: every
    element counts once. Norms are taken in fp32; one all-reduce of a scalar, no host sync.
    """
    device = shards[0].local.device
    total = torch.zeros((), dtype=torch.float32, device=device)
    gradients = []
    for num_copies in sorted({shard.num_copies for shard in shards}):
        group = [s.local.grad for s in shards if s.num_copies == num_copies]
        present = [gradient for gradient in group if gradient is not None]
        if present:
            total += torch.nn.utils.get_total_norm(present).float().square() / num_copies
        gradients += present
    dist.all_reduce(total)
    norm = total.sqrt()
    if max_norm is not None and gradients:
        # 1e-6 as in torch, so that the scaled gradients are the same.
        torch._foreach_mul_(gradients, (max_norm / (norm + 1e-6)).clamp(max=1.0))
    return norm


def step_optimizer(optimizer: torch.optim.Optimizer) -> None:
    """Update the main weights and what the forward uses. Call after `finish_gradients`."""
    optimizer.step(sync_grad_before_optimizer_step=False)  # type: ignore[call-overload]


def _like_main(local: Tensor, main: DTensor) -> DTensor:
    """Return `local` as a DTensor with the layout and the checkpoint chunks of `main`."""
    tensor = DTensor.from_local(
        local, main.device_mesh, main.placements, shape=main.shape, stride=main.stride()
    )
    for name in ("__create_chunk_list__", "__create_write_items__"):
        if hasattr(main._local_tensor, name):
            setattr(tensor._local_tensor, name, getattr(main._local_tensor, name))
    return tensor


def model_state(shards: list[Shard]) -> dict[str, Tensor]:
    """Return the main weights by name, as DTensors on the training memory."""
    return state_like_model(shards, [shard.local.detach() for shard in shards])


def state_like_model(shards: list[Shard], values: list[Tensor]) -> dict[str, Tensor]:
    """Return `values`, one per shard and shaped like it, by name as DTensors on their memory."""
    pairs = zip(shards, values, strict=True)
    return {shard.name: _like_main(value, shard.main) for shard, value in pairs}


def optimizer_state(
    shards: list[Shard], optimizer: torch.optim.Optimizer
) -> dict[str, dict[str, Tensor]]:
    """Return the optimizer's state by parameter name, as DTensors on the training memory."""
    return {
        shard.name: {
            key: _like_main(value, shard.main) if value.ndim else value
            for key, value in optimizer.state[shard.local].items()
        }
        for shard in shards
        if shard.local in optimizer.state
    }


@torch.no_grad()
def load_full(shards: list[Shard], tensors: Mapping[str, Tensor]) -> None:
    """Copy each rank's part of full tensors, by name, into the main weights."""
    for shard in shards:
        shard.local.copy_(tensors[shard.name][shard.full_slice()])


def install_weights(model: MegatronFSDP) -> None:
    """Make the forward use the main weights after something other than the optimizer wrote them."""
    # Else parameters outside the blocks that an evaluation has gathered would be used again, stale.
    model.synchronize_param_gather()
    model.install_optimized_model_weights()
