"""Whole runs, watched: what each step saw, and what the run ended with."""

import hashlib
import os

from torch.distributed.checkpoint._nested_dict import flatten_state_dict

import train


def digest(tree) -> str:
    """One hash over every name, dtype, shape and byte of a nested state dict's local tensors."""
    flat, _ = flatten_state_dict(dict(tree))
    hasher = hashlib.sha256()
    for name in sorted(flat):
        tensor = flat[name]
        local = tensor._local_tensor if hasattr(tensor, "_local_tensor") else tensor
        hasher.update(f"{name} {local.dtype} {tuple(local.shape)}".encode())
        hasher.update(local.detach().cpu().contiguous().numpy().tobytes())
    return hasher.hexdigest()


def train_and_watch(world, config, stop_before):
    """Train; return what each step saw and the digest at the end, or die before a step."""
    seen = []
    real_step, real_fit = train.train_step, train.fit
    final = []

    def step_and_note(run, batches, *, step, meter):
        if step == stop_before:
            os._exit(9)
        noted = [next(batches) for _ in range(config.training.grad_accum_steps)]
        real_step(run, iter(noted), step=step, meter=meter)
        pixels = hashlib.sha256(b"".join(b.image_BCHW.numpy().tobytes() for b in noted)).hexdigest()
        positions = [p for b in noted for p in b.position_B.tolist()]
        seen.append((step, positions, pixels, run.optimizer.param_groups[0]["lr"]))

    def fit_and_keep(run, logbook, **rest):
        outcome = real_fit(run, logbook, **rest)
        final.append(digest(run.tensors()))
        return outcome

    train.train_step, train.fit = step_and_note, fit_and_keep
    train.train(config, world)
    return seen, final
