"""Check options before anything is built: each against its declaration, then against the others.

    Config -> validate -> Config        ViTOptions -> check_vit        MoEOptions -> check_moe

Every refusal is a ValueError of one line: `config field=value: what is allowed`. Checks that depend
on the machine, the images or the weights are made where those are known.
"""

from __future__ import annotations

import dataclasses
import math
import re

from options.schema import ROUTERS, Config, MoEOptions, ViTOptions, height_width
from options.values import Problems, Section, check_values

# The policies that timm reads; it silently ignores parts that it does not understand.
_RAND = r"rand(-(m|n|inc|mmax)\d+|-(mstd|p)\d+(\.\d+)?|-t(weights|3a|3aw))*"
_AUGMIX = r"augmix(-(m|w|d|b)\d+|-(mstd|a)\d+(\.\d+)?)*"
_POLICY = r"(original|originalr|v0|v0r|3a)(-mstd\d+(\.\d+)?)?"
AUTO_AUGMENT = re.compile(f"{_RAND}|{_AUGMIX}|{_POLICY}|3aug")


def check_vit(o: ViTOptions) -> None:
    """Raise ValueError if the network cannot be built, or one of its options has no effect."""
    check_values(o, "model.vit.")
    problems = Problems()
    vit = problems.section("model.vit", o)
    vit.require(o.num_classes is not None, "num_classes", "must be a number to build a network")
    _check_vit(o, problems)
    problems.stop_if_any()


def _check_vit(o: ViTOptions, problems: Problems) -> None:
    vit = problems.section("model.vit", o)
    vit.require(o.embed_dim % o.num_heads == 0, "num_heads", f"must divide embed_dim={o.embed_dim}")
    vit.require(o.hidden_dim >= 1, "mlp_ratio", "must give a hidden unit")
    for side_px, patch_px in zip(o.img_hw, o.patch_hw, strict=True):
        below_px = side_px // patch_px * patch_px
        nearest = f"{below_px} or {below_px + patch_px}" if below_px else f"{patch_px}"
        allowed = f"must be divisible by patch_size={o.patch_size} (try {nearest})"
        vit.require(below_px == side_px, "img_size", allowed)
    has_effect = o.dynamic_img_size or not o.dynamic_img_pad
    vit.require(has_effect, "dynamic_img_pad", "needs dynamic_img_size=true")
    _check_tokens(o, vit)
    has_head = o.weight_init != "jax_nlhb" or o.num_classes != 0
    vit.require(has_head, "weight_init", "needs a head")
    vit.require(o.init_values != 0, "init_values", "must not be 0 (null: no layer scale)")
    if not o.final_norm:
        vit.refuse_changed("fc_norm", why="final_norm=false")
    if o.drop_path_rate == 0:
        vit.refuse_changed("drop_path_uniform", why="drop_path_rate=0")
    if o.depth == 1 and not o.drop_path_uniform:
        vit.refuse_changed("drop_path_rate", why="depth=1, since the first block's rate is 0")


def _check_tokens(o: ViTOptions, vit: Section) -> None:
    is_token = o.global_pool == "token"
    vit.require(o.class_token or not is_token, "global_pool", "needs class_token=true")
    is_plain = is_token and o.reg_tokens == 0 and o.fc_norm is not True
    allowed = "needs global_pool=token, reg_tokens=0 and no fc_norm"
    vit.require(is_plain or not o.distilled, "distilled", allowed)
    fits = o.embed_dim % 4 == 0 and o.embed_dim >= 8
    allowed = f"needs an embed_dim of 8 or more that 4 divides, not {o.embed_dim}"
    vit.require(fits or o.pos_embed != "sincos", "pos_embed", allowed)
    if o.pos_embed == "none":
        vit.refuse_changed("pos_drop_rate", why="pos_embed=none")
    if o.pos_embed == "none" or o.num_prefix_tokens == 0:
        why = "no position embedding, or no class or register token"
        vit.refuse_changed("no_embed_class", why=why)
    if math.prod(o.grid_hw) == 1:
        vit.refuse_changed("patch_drop_rate", why="a single patch")


def check_moe(o: MoEOptions) -> None:
    """Raise ValueError if the experts cannot be built, or one of their options has no effect."""
    check_values(o, "model.moe.")
    problems = Problems()
    _check_moe(o, problems)
    problems.stop_if_any()


def _check_moe(o: MoEOptions, problems: Problems) -> None:
    moe, router = problems.section("model.moe", o), o.router
    goes_everywhere = o.top_k == o.num_experts
    everywhere = f"every token goes to every expert (top_k={o.top_k}): must be 0"
    moe.require(o.num_experts >= 1, "num_experts", "must be at least 1")
    moe.require(o.top_k <= o.num_experts, "top_k", f"must be at most num_experts={o.num_experts}")
    moe.require(not (o.expert_drop and goes_everywhere), "expert_drop", everywhere)
    is_forced = bool(o.expert_drop) and o.forced_balance
    moe.require(not is_forced, "expert_drop", "must be 0 with forced_balance")
    if router == "noisy_topk":
        moe.require(o.is_normalized, "normalize", "router=noisy_topk always normalizes")
    if o.is_normalized and o.num_experts > 1:
        allowed = "must be at least 2 with normalized weights: one weight would always be 1"
        moe.require(o.top_k >= 2, "top_k", allowed)
    if router == "noisy":
        moe.require(o.noise_std > 0, "noise_std", "router=noisy needs more than 0 (or softmax)")
    else:
        moe.refuse_changed("noise_std", why=f"router={router}")
    if o.capacity_factor is not None:
        limit = o.num_experts / o.top_k
        allowed = f"must be less than {limit:g}, from where on nothing is dropped (or null)"
        moe.require(o.capacity_factor < limit, "capacity_factor", allowed)
    for name in ("load_coef", "switch_coef", "sequence_coef"):
        moe.require(not (getattr(o, name) and goes_everywhere), name, everywhere)
    if not ROUTERS[router].is_noisy:
        allowed = f"router={router} has no noise, so its load has no gradient: must be 0"
        moe.require(o.load_coef == 0, "load_coef", allowed)
    if len(used := _placements(o)) != 1:
        problems.lines.append(
            f"config model.moe: exactly one of every_n, last_n, blocks must be set, not {used}"
        )


def _placements(o: MoEOptions) -> list[str]:
    """Return the options that say which blocks have experts; one of them must be set."""
    return [name for name in ("blocks", "last_n", "every_n") if getattr(o, name) is not None]


def _check_experts(config: Config, problems: Problems) -> None:
    """Check the experts together with the network and the mesh."""
    o, vit_o, ep = config.model.moe, config.model.vit, config.distributed.ep
    moe, vit = problems.section("model.moe", o), problems.section("model.vit", vit_o)
    mesh = problems.section("distributed", config.distributed)
    if o.num_experts == 0:
        moe.refuse_changed(*vars(o), why="num_experts=0")
        mesh.require(ep in (1, None), "ep", "must be 1 with model.moe.num_experts=0")
        return
    _check_moe(o, problems)
    divides = ep is None or o.num_experts % ep == 0
    mesh.require(divides, "ep", f"must divide model.moe.num_experts={o.num_experts}")
    blocks = []
    if len(given := _placements(o)) == 1:
        blocks = o.expert_blocks(vit_o.depth)
        is_inside = bool(blocks) and blocks[0] >= 0 and blocks[-1] < vit_o.depth
        moe.require(is_inside, given[0], f"must be some of the blocks 0 to {vit_o.depth - 1}")
    for name in ("weight_init", "fix_init", "scale_mlp_norm"):
        is_default = getattr(vit_o, name) == getattr(ViTOptions(), name)
        vit.require(is_default, name, "experts have no form for it")
    if len(blocks) == vit_o.depth:
        vit.refuse_changed("mlp_ratio", why="experts in every block")
    for name in ("mlp_ratio", "shared_ratio"):
        ratio = getattr(o, name)
        allowed = f"must be at least 1 / model.vit.embed_dim={vit_o.embed_dim}"
        moe.require(ratio == 0 or int(vit_o.embed_dim * ratio) >= 1, name, allowed)


def _check_model(config: Config, problems: Problems) -> None:
    model = problems.section("model", config.model)
    vit = problems.section("model.vit", config.model.vit)
    _check_vit(config.model.vit, problems)
    vit.require(config.model.vit.in_chans == 3, "in_chans", "must be 3, the loader makes RGB")
    vit.require(config.model.vit.num_classes != 0, "num_classes", "must be at least 1 to train")
    has_classes = config.model.vit.global_pool != ""
    vit.require(has_classes, "global_pool", "has no class per image to train on")
    if config.model.backend == "torch":
        model.refuse_changed("te_fp8", why="model.backend=torch (use te)")
    if config.model.backend == "te":
        model.refuse_changed("sdpa", why="model.backend=te")
    if config.dataset.val.img_size is None:
        names = ("dynamic_img_size", "dynamic_img_pad")
        vit.refuse_changed(*names, why="dataset.val.img_size=null")
    else:
        o, val = config.model.vit, problems.section("dataset.val", config.dataset.val)
        val.require(o.dynamic_img_size, "img_size", "needs model.vit.dynamic_img_size=true")
        sides = zip(height_width(config.dataset.val.img_size), o.patch_hw, strict=True)
        is_whole = all(side_px % patch_px == 0 for side_px, patch_px in sides)
        allowed = (
            f"must be divisible by model.vit.patch_size={o.patch_size}, or set dynamic_img_pad"
        )
        val.require(is_whole or o.dynamic_img_pad, "img_size", allowed)


def _check_dataset(config: Config, problems: Problems) -> None:
    """Refuse incomplete ways to find and read images, and those without effect."""
    o = config.dataset
    data = problems.section("dataset", o)
    if o.path_env is None:
        data.refuse_changed("name", why="dataset.path_env=null")
    else:
        data.require(o.name is not None, "name", f"must be a name in {o.path_env}")
    if o.on_error == "stop":
        data.refuse_changed("max_bad", why="dataset.on_error=stop")
    if o.num_workers == 0:
        data.refuse_changed("timeout_s", why="dataset.num_workers=0")


def _check_fsdp(config: Config, problems: Problems) -> None:
    outer, strategy = config.distributed.dp_outer, config.fsdp.zero_dp_strategy
    is_possible = outer > 1 and strategy in (3, "optim_grads_params")
    is_off = config.fsdp.outer_dp_sharding_strategy == "no_shard"
    allowed = (
        f"needs distributed.dp_outer > 1 and fsdp.zero_dp_strategy=3 (are {outer} and {strategy})"
    )
    fsdp = problems.section("fsdp", config.fsdp)
    fsdp.require(is_off or is_possible, "outer_dp_sharding_strategy", allowed)


def peak_lr(config: Config, global_batch: int) -> float:
    """Return the peak learning rate of a run with `global_batch` images per update.

    Raises:
        ValueError: min_lr or warmup_lr exceeds it.
    """
    o = config.optimizer
    peak = o.lr if o.base_batch is None else o.lr * global_batch / o.base_batch
    scaled = "" if o.base_batch is None else f" x {global_batch} images / base_batch={o.base_batch}"
    problems = Problems()
    for name in ("min_lr", "warmup_lr"):
        value = getattr(o, name)
        is_low = value is None or value <= peak
        problems.section("optimizer", o).require(is_low, name, f"must be at most lr={o.lr}{scaled}")
    problems.stop_if_any()
    return peak


def _check_optimizer(config: Config, problems: Problems) -> None:
    o, steps = config.optimizer, config.training.steps
    optimizer = problems.section("optimizer", o)
    is_short = o.warmup_steps <= steps
    optimizer.require(is_short, "warmup_steps", f"must be at most training.steps={steps}")
    unused = {"adamw": ("momentum",), "sgd": ("betas", "eps"), "lamb": ("momentum",)}[o.name]
    optimizer.refuse_changed(*unused, why=f"optimizer.name={o.name}")
    if o.base_batch is None:
        try:
            peak_lr(config, 1)
        except ValueError as error:
            problems.lines.append(str(error))
    if o.warmup_steps == 0:
        optimizer.refuse_changed("warmup_lr", "warmup_prefix", why="optimizer.warmup_steps=0")
    optimizer.require(o.layer_decay != 1, "layer_decay", "has no effect (null is the same)")


def _check_augmentation(config: Config, problems: Problems) -> None:
    o, policy = config.dataset.train, config.dataset.train.auto_augment
    train = problems.section("dataset.train", o)
    allowed = (
        "must be as rand-m9-n2-mstd0.5-inc1, augmix-m3-w3, original-mstd0.5, v0 or 3aug, in "
        "timm's notation"
    )
    is_known = policy is None or AUTO_AUGMENT.fullmatch(policy) is not None
    train.require(is_known, "auto_augment", allowed)
    if policy is not None and "3a" not in policy:
        train.refuse_changed("color_jitter", why=f"auto_augment={policy}, in timm")
        allowed = f"Pillow cannot rotate with it, as auto_augment={policy} may (use bicubic)"
        train.require(o.interpolation != "lanczos", "interpolation", allowed)
        is_rotated = o.interpolation is None and config.dataset.interpolation == "lanczos"
        problems.section("dataset", config.dataset).require(
            not is_rotated, "interpolation", allowed
        )
    for name in ("crop_scale", "crop_ratio"):
        lowest, highest = getattr(o, name)
        train.require(lowest <= highest, name, "must be [lowest, highest]")
    train.require(o.crop_scale[1] > 0, "crop_scale", "must not end at 0")
    if o.crop == "src":
        train.refuse_changed("crop_scale", "crop_ratio", "scaled_decode", why="crop=src")
        train.require(o.interpolation != "random", "interpolation", "needs crop=rrc")
    if o.interpolation == "random":
        train.refuse_changed("scaled_decode", why="interpolation=random")
    if o.reprob == 0:
        train.refuse_changed("remode", "recount", why="reprob=0")


def _check_mixing(config: Config, problems: Problems) -> None:
    o = config.dataset.train
    train, why = problems.section("dataset.train", o), f"mixup={o.mixup} and cutmix={o.cutmix}"
    if not (o.mixup and o.cutmix):
        train.refuse_changed("mixup_switch_prob", why=why)
    if not (o.mixup or o.cutmix):
        train.refuse_changed("mixup_prob", "mixup_mode", why=why)
        return
    train.require(o.mixup_prob > 0, "mixup_prob", "nothing is mixed (or set both to 0)")
    if o.mixup and o.cutmix:
        never = "cutmix" if o.mixup_switch_prob == 0 else "mixup"
        allowed = f"{never} is never drawn (set {never}=0 instead)"
        train.require(o.mixup_switch_prob not in (0, 1), "mixup_switch_prob", allowed)
    train.require(o.batch_size % 2 == 0, "batch_size", "must be even, mixup and cutmix mix pairs")


def _check_training(config: Config, problems: Problems) -> None:
    o, num_classes = config.training, config.model.vit.num_classes
    training = problems.section("training", o)
    if o.loss == "ce":
        training.refuse_changed("bce_threshold", "bce_sum", why="training.loss=ce")
    floor = o.label_smoothing / num_classes if num_classes else 0.0
    allowed = (
        f"makes a target of every class, {o.label_smoothing} / {num_classes} being above "
        f"bce_threshold={o.bce_threshold}"
    )
    is_sparse = o.bce_threshold is None or floor <= o.bce_threshold
    training.require(is_sparse, "label_smoothing", allowed)
    saving = problems.section("training.checkpoint", o.checkpoint)
    saving.require(o.checkpoint.path.strip() != "", "path", "must be a folder")
    if o.wandb.project is None:
        wandb = problems.section("training.wandb", o.wandb)
        wandb.refuse_changed("mode", why="training.wandb.project=null")


def _check_distillation(config: Config, problems: Problems) -> None:
    """Check that a teacher and a student with a second head come together."""
    o = config.distillation
    distillation = problems.section("distillation", o)
    if o.kind == "none":
        names = ("teacher", "teacher_checkpoint", "alpha", "tau")
        distillation.refuse_changed(*names, why="distillation.kind=none")
        return
    distillation.require(o.teacher is not None, "kind", "needs distillation.teacher")
    distillation.require(config.model.vit.distilled, "kind", "needs model.vit.distilled=true")
    distillation.require(o.alpha > 0, "alpha", "has no effect (use distillation.kind=none)")
    if o.kind == "hard":
        distillation.refuse_changed("tau", why="distillation.kind=hard")


def _check_init(config: Config, problems: Problems) -> None:
    """Refuse incomplete ways to initialise, and settings that belong to other ways."""
    o, num_experts = config.init, config.model.moe.num_experts
    init, about_experts = problems.section("init", o), ("experts", "gate", "gate_std")
    is_auto = o.mode == "auto" and o.checkpoint is None
    if o.mode == "scratch" or is_auto:
        why = f"init.mode={o.mode}" + (" and no init.checkpoint" if is_auto else "")
        init.refuse_changed("checkpoint", "weights", *about_experts, why=why)
    init.require(
        o.mode in ("auto", "scratch") or o.checkpoint is not None, "mode", "needs init.checkpoint"
    )
    if num_experts == 0:
        init.refuse_changed(*about_experts, why="model.moe.num_experts=0")
    allowed = (
        "needs model.moe.num_experts > 0 and init.experts to be copy, split or null "
        f"(are {num_experts} and {o.experts})"
    )
    can_upcycle = num_experts > 0 and o.experts != "random"
    init.require(o.mode != "deit_upcycling" or can_upcycle, "mode", allowed)


def _resolve_update_freq(config: Config, problems: Problems) -> Config:
    """Return the options with training.update_freq moved to grad_accum_steps, its other name."""
    t = config.training
    if t.update_freq is None:
        return config
    is_same = t.grad_accum_steps in (1, t.update_freq)
    allowed = f"is another name of grad_accum_steps={t.grad_accum_steps} and must not differ"
    problems.section("training", t).require(is_same, "update_freq", allowed)
    training = dataclasses.replace(t, grad_accum_steps=t.update_freq, update_freq=None)
    return dataclasses.replace(config, training=training)


def validate(config: Config) -> Config:
    """Return `config` with aliases resolved, or raise ValueError about an option.

    Every option must be in range and have an effect.
    """
    check_values(config)
    problems = Problems()
    for check in (
        _check_model,
        _check_experts,
        _check_fsdp,
        _check_dataset,
        _check_optimizer,
        _check_augmentation,
        _check_mixing,
        _check_training,
        _check_distillation,
        _check_init,
    ):
        check(config, problems)
    resolved = _resolve_update_freq(config, problems)
    problems.stop_if_any()
    return resolved
