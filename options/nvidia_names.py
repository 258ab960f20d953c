"""Options of NVIDIA's ViT recipe that have other names here, or other values, or none.

name=value of theirs -> ours -> name=value of ours, None for what always holds, or ValueError
"""

from __future__ import annotations

# Theirs -> ours, with the same values.
_RENAMED = {"dataset.num_classes": "model.vit.num_classes", "random.seed": "training.seed"}
# Their name and value -> ours.
_MAPPED = {
    "model.transformer_engine": {
        "true": ("model.backend", "te"),
        "false": ("model.backend", "torch"),
    },
    "model.vit.pos_embed": {
        "true": ("model.vit.pos_embed", "learn"),
        "false": ("model.vit.pos_embed", "none"),
    },
    "model.vit.weight_init": {"null": ("model.vit.weight_init", "")},
    "fsdp.outer_dp_sharding_strategy": {
        "0": ("fsdp.outer_dp_sharding_strategy", "no_shard"),
        "1": ("fsdp.outer_dp_sharding_strategy", "optim"),
    },
    "training.checkpoint.resume_from_metric": {
        "-": ("training.checkpoint.resume_from_metric", "-val_loss")
    },
}
# Theirs -> the one value that always holds here, and how.
_FIXED = {
    "distributed.cp": ("1", "a sequence stays on one rank"),
    "dataset.train.shuffle": ("true", "each epoch has an order of its own"),
    "fsdp.grad_reduce_in_fp32": ("true", "gradients are summed in fp32"),
    "fsdp.init_model_with_meta_device": ("true", "no rank holds a whole model that is sharded"),
    "fsdp.preserve_fp32_weights": ("true", "main weights are fp32"),
}
# Theirs, or the beginning of a section's -> where to look.
_ELSEWHERE = {
    "model.channels_last": "images always lie channels-last in memory; leave it out",
    "fsdp.fsdp_unit_modules": "a unit is a block, as training/prepare.py says; leave it out",
    "dataset.train.transform_kwargs": "use dataset.train.* for augmentation, model.vit.img_size, "
    "dataset.mean, dataset.std and dataset.interpolation",
    "dataset.val.transform_kwargs": "use dataset.val.crop_ratio for crop_pct, "
    "dataset.val.img_size, dataset.mean, dataset.std and dataset.interpolation",
    "inference": "evaluate.py scores a checkpoint, and classifies with --images",
    "profiling": "training.tensorboard, training.wandb.* and training.peak_tflops report; for a "
    "profile use torch.profiler around train_step",
}


def _elsewhere(name: str) -> str | None:
    found = (said for key, said in _ELSEWHERE.items() if f"{name}.".startswith(f"{key}."))
    return next(found, None)


def hint(name: str) -> str | None:
    """Return what to use for `name`, an option or a section of theirs; None if it is none."""
    if name in _RENAMED:
        return f"here it is {_RENAMED[name]}"
    if name in _FIXED:
        value, how = _FIXED[name]
        return f"always {value} here: {how}; leave it out"
    if name in _MAPPED:
        ours = {ours for ours, _ in _MAPPED[name].values()} - {name}
        return f"here it is {', '.join(ours)}" if ours else None
    inside = [key for key in (*_RENAMED, *_FIXED) if key.startswith(f"{name}.")]
    return _elsewhere(name) or (f"{inside[0]}: {hint(inside[0])}" if inside else None)


def ours(name: str, text: str) -> tuple[str, str] | None:
    """Return our name and value of what may be theirs; None if it always holds here.

    Raises:
        ValueError: It cannot be had here; the line says what can.
    """
    plain = text.lower()
    if name in _FIXED and plain == _FIXED[name][0]:
        return None
    if name in _FIXED or _elsewhere(name):
        raise ValueError(f"config {name}={text}: {hint(name)}")
    if plain in _MAPPED.get(name, {}):
        return _MAPPED[name][plain]
    if name == "model.transformer_engine":
        raise ValueError(f"config {name}={text}: must be true or false")
    return _RENAMED.get(name, name), text
