"""Initial value of every parameter: a pure function of (options, seed, full parameter name).

    attach(model, options, seed) -> each module that owns tensors gets `reset_parameters()`
    reset_parameters() -> generator(seed, full name) -> fp32 draw on the CPU -> the parameter

So the values do not depend on the order of construction, the device or the world size, nor on
whether the model was first built on the meta device. No model code here.
"""

import functools
import math
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from layers import te
from options.schema import ViTOptions
from parallel.seeds import stable_seed
from parallel.sharding import keep_full_precision

TOKEN_STD = {"cls_token": 1e-6, "reg_token": 1e-6, "pos_embed": 0.02, "dist_token": 0.02}
HEADS = ("head.", "head_dist.")
TRUNCATED_STD = 0.87962566103423978  # std of N(0, 1) cut at 2 sigma


@runtime_checkable
class HasInitialValue(Protocol):
    """A module with its own init rule, such as experts held as a local slice.

    Its rule covers the parameters and buffers that it owns directly, not those of its children: a
    child nn.Linear or norm follows the table of `initial_value` below, by its name.
    """

    def initial_value(self, name: str, *, seed: int, full_name: str) -> Tensor:
        """Return the value of this module's own tensor `name`, on the CPU.

        It must depend only on the arguments and the module's configuration: draw the global tensor
        from `generator(seed, full_name)` and return the slice that this rank holds.
        """


def generator(seed: int, full_name: str) -> torch.Generator:
    """Return the CPU generator of one parameter.

    Each parameter has its own, so that a rank can draw any parameter without drawing those before
    it, and a new layer leaves the others' values as they were.
    """
    return torch.Generator(device="cpu").manual_seed(stable_seed(seed, "init", full_name))


def normal(shape: torch.Size, std: float, *, rng: torch.Generator) -> Tensor:
    """Return N(0, std^2)."""
    return torch.empty(shape, device="cpu", dtype=torch.float32).normal_(std=std, generator=rng)


def uniform(shape: torch.Size, bound: float, *, rng: torch.Generator) -> Tensor:
    """Return U(-bound, bound)."""
    value = torch.empty(shape, device="cpu", dtype=torch.float32)
    return value.uniform_(-bound, bound, generator=rng)


def truncated_normal(shape: torch.Size, std: float, *, rng: torch.Generator) -> Tensor:
    """Return std * z, where z is N(0, 1) cut at 2 sigma (so its std is 0.8796 * std)."""
    inside = math.erf(2 / math.sqrt(2))  # probability mass within 2 sigma
    z = uniform(shape, inside, rng=rng).erfinv_().mul_(math.sqrt(2))
    return z.clamp_(-2, 2).mul_(std)


def xavier_uniform(shape: torch.Size, *, rng: torch.Generator, num_stacked: int = 1) -> Tensor:
    """Return U with variance 2 / (fan_in + fan_out) for `num_stacked` matrices stacked by rows."""
    fan_out, fan_in = shape[0] // num_stacked, shape[1]
    return uniform(shape, math.sqrt(6 / (fan_in + fan_out)), rng=rng)


def sincos_positions(grid_hw: tuple[int, int], shape: torch.Size) -> Tensor:
    """Return the position embedding [1, prefix + h * w, D] of sines and cosines; prefix tokens: 0.

    The patch in row y and column x gets [sin(w x), cos(w x), sin(w y), cos(w y)] for D/4
    frequencies w, a geometric series from 1 to 1/10000. Source: arXiv 2205.01580, after MoCo v3
    (arXiv 2104.02057), whose series stops one step earlier.
    """
    count = shape[2] // 4
    frequency_F = 10_000.0 ** -(
        torch.arange(count, device="cpu", dtype=torch.float64) / (count - 1)
    )
    row_P, column_P = torch.cartesian_prod(
        *(torch.arange(side, device="cpu", dtype=torch.float64) for side in grid_hw)
    ).unbind(1)
    angles = (torch.outer(column_P, frequency_F), torch.outer(row_P, frequency_F))
    pos_PD = torch.cat([wave for a_PF in angles for wave in (a_PF.sin(), a_PF.cos())], dim=1)
    value = _constant(shape, 0)
    value[0, shape[1] - len(pos_PD) :] = pos_PD.float()
    return value


def _constant(shape: torch.Size, value: float) -> Tensor:
    return torch.full(shape, value, device="cpu", dtype=torch.float32)


def _patch_projection(name: str, weight: Tensor, *, is_jax: bool, rng: torch.Generator) -> Tensor:
    fan_in = weight[0].numel()
    if name.endswith(".bias"):
        shape = weight.shape[:1]
        return _constant(shape, 0) if is_jax else uniform(shape, fan_in**-0.5, rng=rng)
    if is_jax:
        return truncated_normal(weight.shape, fan_in**-0.5 / TRUNCATED_STD, rng=rng)
    return uniform(weight.shape, fan_in**-0.5, rng=rng)


def _linear_weight(name: str, shape: torch.Size, *, o: ViTOptions, rng: torch.Generator) -> Tensor:
    if o.weight_init == "":
        return normal(shape, 0.02, rng=rng)
    if o.weight_init.startswith("jax") and name.startswith(HEADS):
        return _constant(shape, 0)
    is_split = o.weight_init == "moco" and name.endswith(".qkv.weight")
    return xavier_uniform(shape, rng=rng, num_stacked=3 if is_split else 1)


def _linear_bias(name: str, shape: torch.Size, *, o: ViTOptions, rng: torch.Generator) -> Tensor:
    if not o.weight_init.startswith("jax"):
        return _constant(shape, 0)
    if name.startswith(HEADS):
        is_nlhb = o.weight_init == "jax_nlhb"
        return _constant(shape, -math.log(o.known_classes) if is_nlhb else 0)
    return normal(shape, 1e-6, rng=rng) if ".mlp." in name else _constant(shape, 0)


def _residual_scale(name: str) -> float:
    path = name.split(".")
    if path[0] == "blocks" and path[2:] in (["attn", "proj", "weight"], ["mlp", "fc2", "weight"]):
        return math.sqrt(2 * (int(path[1]) + 1))
    return 1.0


def initial_value(
    name: str, module: nn.Module, *, local_name: str, o: ViTOptions, seed: int
) -> Tensor:
    """Return the initial value of one tensor of the ViT, fp32, on the CPU.

    | parameter                  | weight_init ""       | jax, jax_nlhb            | moco         |
    |----------------------------|----------------------|--------------------------|--------------|
    | cls_token, reg_token       | N(0, 1e-6^2)         | same                     | same         |
    | pos_embed, dist_token      | N(0, 0.02^2)         | same                     | same         |
    | pos_embed that is fixed    | sincos_positions     | same                     | same         |
    | patch_embed.proj.weight    | U(+-fan_in^-1/2)     | LeCun normal, cut 2 sigma| as ""        |
    | patch_embed.proj.bias      | U(+-fan_in^-1/2)     | 0                        | as ""        |
    | *norm*.weight, .bias       | 1, 0                 | same                     | same         |
    | *.gamma (layer scale)      | init_values          | same                     | same         |
    | attn_pool.latent           | D^-1/2, cut 2 sigma  | same                     | same         |
    | head.weight, head_dist     | N(0, 0.02^2)         | 0                        | Xavier       |
    | head.bias, head_dist       | 0                    | 0; nlhb: -log(classes)   | 0            |
    | other linear weights       | N(0, 0.02^2)         | Xavier uniform           | Xavier; q, k |
    |                            |                      |                          | and v apart  |
    | other linear biases        | 0                    | N(0, 1e-6^2) in an mlp,  | 0            |
    |                            |                      | else 0                   |              |

    `fix_init` divides attn.proj.weight and mlp.fc2.weight of block i by sqrt(2 (i + 1)). A module
    with an `initial_value` method (HasInitialValue) decides alone about its own tensors.

    Source: timm 1.0.31, whose trunc_normal_(std=0.02) cuts at +-2, which is 100 sigma: a normal.

    Raises:
        TypeError: no rule covers the tensor.
    """
    if isinstance(module, HasInitialValue):
        return module.initial_value(local_name, seed=seed, full_name=name)
    tensor = getattr(module, local_name)
    if not isinstance(tensor, nn.Parameter):
        raise TypeError(f"{name}: a buffer needs {type(module).__name__}.initial_value")
    if name == "pos_embed" and o.pos_embed == "sincos":
        return sincos_positions(o.grid_hw, tensor.shape)
    rng = generator(seed, name)
    if name.startswith("patch_embed.proj."):
        weight = module.get_parameter("weight")  # its fan-in bounds the bias too
        return _patch_projection(name, weight, is_jax=o.weight_init.startswith("jax"), rng=rng)
    return _by_name(name, tensor.shape, o=o, rng=rng)


def _by_name(name: str, shape: torch.Size, *, o: ViTOptions, rng: torch.Generator) -> Tensor:
    owner, _, last = name.rpartition(".")
    if "norm" in owner.rpartition(".")[2]:
        return _constant(shape, 1 if last == "weight" else 0)
    if last in TOKEN_STD:
        return normal(shape, TOKEN_STD[last], rng=rng)
    if last == "latent":
        return truncated_normal(shape, shape[-1] ** -0.5, rng=rng)
    if last == "gamma" and o.init_values is not None:
        return _constant(shape, o.init_values)
    if last == "weight" and len(shape) == 2:
        value = _linear_weight(name, shape, o=o, rng=rng)
        return value.div_(_residual_scale(name)) if o.fix_init else value
    if last == "bias" and len(shape) == 1:
        return _linear_bias(name, shape, o=o, rng=rng)
    raise TypeError(f"{name}: no init rule; the module that owns it needs `initial_value`")


@torch.no_grad()
def fill(module: nn.Module, full_names: dict[str, str], o: ViTOptions, seed: int) -> None:
    """Set the tensors that `module` owns directly to their initial values, on any device but meta.

    `full_names` maps each tensor's local name to its name in the whole model.
    """
    for local_name, full_name in full_names.items():
        value = initial_value(full_name, module, local_name=local_name, o=o, seed=seed)
        target = getattr(module, local_name)
        assert value.shape == target.shape, f"{full_name}: {value.shape} for {target.shape}"
        target.copy_(value)
        # Megatron-FSDP takes its fp32 main weights from here rather than from the rounded tensor.
        if target.dtype != value.dtype and isinstance(target, nn.Parameter):
            keep_full_precision(target, value)


def attach(root: nn.Module, options: ViTOptions, *, seed: int) -> None:
    """Give each module of `root` that owns tensors a `reset_parameters`; run it unless on meta.

    It replaces the method of that name that the module's class may have: Megatron-FSDP calls it
    after it has moved a module off the meta device. It is a `functools.partial` of its module, not
    a closure, because `copy.deepcopy` copies a partial's arguments: a copy resets itself.
    """
    for prefix, module in root.named_modules():
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        if not own:
            continue
        dot = f"{prefix}." if prefix else ""
        # By the torch backend's names, so that both backends start from the same values.
        full_names = {name: te.canonical_name(dot + name) for name, _ in own}
        reset = functools.partial(fill, module, full_names, options, seed)
        module.reset_parameters = reset  # type: ignore[assignment]
        if not any(tensor.is_meta for _, tensor in own):
            reset()
