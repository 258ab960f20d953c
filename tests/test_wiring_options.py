"""Every option reaches what it is for: runs with each at an odd value of its own, then examined.

RUNS has, for each option, what is typed and what is then found in the objects of the run; options
that exclude one another are in different runs. In a run no two options have the same value, so one
that arrives in the place of another is found out. A new option needs a line here.

One idea: the table of options and of where each one arrives.
"""

import contextlib
import functools
import itertools
import json
import math
import sys
import types

import pytest
import timm.layers
import torch
from torch import nn
from torchvision import transforms
from torchvision.transforms import InterpolationMode

import moe
import train
import vit
from images import augment, cache, duplicates, roots
from layers import compile as block_compile
from layers import te
from options import compose, schema
from parallel import distributed, sharding
from routers import balance, router
from tests.support.networks import build_vit
from tests.support.pictures import write_image
from tests.support.watch import Seen, Watch, run_watched
from training import distillation, loaders, network, run_folder, saver
from weights import warm_start

BILINEAR, LANCZOS = InterpolationMode.BILINEAR, InterpolationMode.LANCZOS
PATCHES, SAME = "patch_embed.proj.weight", ...  # found as it was typed


def about(value):
    return pytest.approx(value, rel=1e-5)


def cost(s: Seen, **sums):
    """The balance loss of sums over 14 experts of which all but `sums` cost nothing."""
    zero_E, one_E = torch.zeros(14), torch.ones(14)
    plain = {"tokens": one_E[:1], "importance": zero_E, "load": zero_E, "rows": one_E}
    plain |= {"share": zero_E, "sequence": zero_E[:1], "z": zero_E[:1]}
    return balance.weighted_loss(plain | sums, s.experts.router.options).item()


ONE, ONE_HOT, ALL = torch.ones(1), torch.eye(14)[2], torch.ones(14)


def blocks_with_experts(s):
    return [number for number, block in enumerate(s.vit.blocks) if hasattr(block.mlp, "experts")]


def shapes(s, *names):
    return [s.shape(f"blocks.{name}") for name in names]


def pools_the_mean(s):
    x_BLD = torch.randn(2, 12, 48)
    return torch.equal(s.vit.pool(x_BLD), x_BLD[:, 9:].mean(1))


def dropouts(s):
    return [s.vit.blocks[0].attn.proj_drop.p, s.vit.blocks[0].mlp.drop1.p, s.experts.drop.p]


def end_of(path):
    return "/".join(path.parts[-2:])


def crop(s):
    return s.transform("train").crop


def cover(s):
    return s.transform("val", functools.partial).keywords


def group(s):
    return s.run.optimizer.param_groups


def logged(s, kind):
    """The steps of log lines of a kind."""
    lines = map(json.loads, (s.run.folder / "log.jsonl").read_text().splitlines())
    return [line["step"] for line in lines if line["event"] == kind]


# Each: what is typed, what is found, where.
EXPERTS = {
    "device": ("cpu", SAME, lambda s: s.watch.process_group.device),
    "model.vit.img_size": ("[40,56]", (40, 56), lambda s: crop(s).size),
    "model.vit.patch_size": ("[8,14]", (48, 3, 8, 14), lambda s: s.shape(PATCHES)),
    "model.vit.num_classes": ("3", (3, 48), lambda s: s.shape("head.weight")),
    "model.vit.global_pool": ("avg", True, pools_the_mean),
    "model.vit.embed_dim": ("48", (48, 48), lambda s: s.shape("blocks.0.attn.proj.weight")),
    "model.vit.depth": ("5", SAME, lambda s: len(s.vit.blocks)),
    "model.vit.num_heads": ("6", (6, 8), lambda s: s.vit.blocks[0].attn.head_shape),
    "model.vit.mlp_ratio": ("1.5", (72, 48), lambda s: s.shape("blocks.0.mlp.fc1.weight")),
    "model.vit.qkv_bias": ("false", (), lambda s: s.shape("blocks.0.attn.qkv.bias")),
    "model.vit.qk_norm": ("true", (8,), lambda s: s.shape("blocks.0.attn.k_norm.weight")),
    "model.vit.scale_attn_norm": ("true", (48,), lambda s: s.shape("blocks.0.attn.norm.weight")),
    "model.vit.proj_bias": (
        "false",
        [()] * 3,
        lambda s: shapes(s, "0.attn.proj.bias", "0.mlp.fc1.bias", "4.mlp.experts.b_in"),
    ),
    "model.vit.init_values": ("0.13", about([0.13] * 48), lambda s: s.first["blocks.2.ls1.gamma"]),
    "model.vit.class_token": ("false", (), lambda s: s.shape("cls_token")),
    "model.vit.pos_embed": ("sincos", False, lambda s: s.vit.pos_embed.requires_grad),
    "model.vit.no_embed_class": ("true", (1, 20, 48), lambda s: s.shape("pos_embed")),
    "model.vit.reg_tokens": ("9", (1, 9, 48), lambda s: s.shape("reg_token")),
    "model.vit.pre_norm": ("true", (48,), lambda s: s.shape("norm_pre.weight")),
    "model.vit.fc_norm": ("false", (48,), lambda s: s.shape("norm.weight")),
    "model.vit.drop_rate": ("0.011", SAME, lambda s: s.vit.head_drop.p),
    "model.vit.pos_drop_rate": ("0.012", SAME, lambda s: s.vit.pos_drop.p),
    "model.vit.patch_drop_rate": ("0.21", SAME, lambda s: s.vit.patch_drop.prob),
    "model.vit.proj_drop_rate": ("0.014", [0.014] * 3, dropouts),
    "model.vit.attn_drop_rate": ("0.015", SAME, lambda s: s.vit.blocks[1].attn.core.drop),
    "model.vit.drop_path_rate": ("0.16", SAME, lambda s: s.vit.blocks[4].drop_path.drop_prob),
    "model.vit.drop_path_uniform": ("true", 0.16, lambda s: s.vit.blocks[0].drop_path.drop_prob),
    "model.vit.grad_checkpointing": ("true", 5 * 4, lambda s: s.called("checkpoint")),
    "model.moe.num_experts": ("14", (14, 48), lambda s: s.shape("blocks.4.mlp.router.gate.weight")),
    "model.moe.top_k": ("8", SAME, lambda s: s.watch.moe_ffn.weight_Tk.shape[1]),
    "model.moe.last_n": ("2", [3, 4], blocks_with_experts),
    "model.moe.mlp_ratio": ("0.75", [(14 * 48, 36)], lambda s: shapes(s, "4.mlp.experts.w_out")),
    "model.moe.shared_ratio": ("0.5", [(24, 48)], lambda s: shapes(s, "3.mlp.shared.fc1.weight")),
    "model.moe.activation": ("swiglu", SAME, lambda s: s.watch.moe_ffn.activation),
    "model.moe.router": ("sigmoid", True, lambda s: s.experts.router.gate.is_sigmoid),
    "model.moe.normalize": ("false", 0, lambda s: s.called("renormalized")),
    "model.moe.jitter": ("0.017", SAME, lambda s: s.watch.jittered.jitter),
    "model.moe.expert_drop": ("0.018", SAME, lambda s: s.watch.some_closed.probability),
    "model.moe.capacity_factor": (  # 10 images of 9 + 15 tokens
        "1.3",
        math.ceil(1.3 * 10 * 24 * 8 / 14),
        lambda s: s.watch.keep_within_capacity.capacity,
    ),
    "model.moe.importance_coef": ("0.31", about(14 * 0.31), lambda s: cost(s, importance=ONE_HOT)),
    "model.moe.switch_coef": ("0.33", about(14 * 0.33), lambda s: cost(s, share=ALL)),
    "model.moe.sequence_coef": ("0.34", about(0.34), lambda s: cost(s, sequence=ONE)),
    "model.moe.z_coef": ("0.35", about(0.35), lambda s: cost(s, z=ONE)),
    "model.moe.kernels": ("torch", SAME, lambda s: s.watch.resolve_kernels.backend),
    "model.dtype": ("bf16", torch.bfloat16, lambda s: s.watch.shard_model.compute_dtype),
    "model.sdpa": ("math", SAME, lambda s: s.vit.blocks[0].attn.core.kernel),
    "model.compile": ("true", 5, lambda s: len(s.watch.compile_blocks.blocks)),
    "dataset.train.root": ("FOLDER/one", "one/train", lambda s: end_of(s.run.train_index.root)),
    "dataset.train.images": ("258", SAME, lambda s: len(s.run.train_index)),
    "dataset.train.batch_size": ("10", SAME, lambda s: len(s.watch.to_device.batch.label_B)),
    "dataset.train.crop_scale": ("[0.3,0.9]", SAME, lambda s: crop(s).scale),
    "dataset.train.crop_ratio": ("[0.6,1.4]", SAME, lambda s: crop(s).ratio),
    "dataset.train.scaled_decode": (
        "true",
        [True, False],
        lambda s: s.both(lambda feed: feed.loader.dataset.reader.is_scaled),
    ),
    "dataset.train.hflip": ("0.26", SAME, lambda s: s.transform("train").hflip),
    "dataset.train.interpolation": ("bilinear", BILINEAR, lambda s: crop(s).mode),
    "dataset.train.reprob": ("0.36", SAME, lambda s: s.run.eraser.erase.probability),
    "dataset.train.remode": ("rand", True, lambda s: s.run.eraser.erase.rand_color),
    "dataset.train.recount": ("31", SAME, lambda s: s.run.eraser.erase.max_count),
    "dataset.train.mixup": ("0.8", SAME, lambda s: s.run.mixer.mix.mixup_alpha),
    "dataset.train.cutmix": ("0.7", SAME, lambda s: s.run.mixer.mix.cutmix_alpha),
    "dataset.train.mixup_prob": ("0.92", SAME, lambda s: s.run.mixer.mix.mix_prob),
    "dataset.train.mixup_switch_prob": ("0.61", SAME, lambda s: s.run.mixer.mix.switch_prob),
    "dataset.train.mixup_mode": ("elem", SAME, lambda s: s.run.mixer.mix.mode),
    "dataset.val.root": ("FOLDER/two", "two/val", lambda s: end_of(s.run.val_index.root)),
    "dataset.val.images": ("24", SAME, lambda s: len(s.run.val_index)),
    "dataset.val.batch_size": (
        "50",
        SAME,
        lambda s: s.feed("val").loader.batch_sampler.batch_size,
    ),
    "dataset.val.crop_ratio": ("0.84", (47, 66), lambda s: cover(s)["size"]),
    "dataset.index_folder": ("FOLDER/kept", "kept", lambda s: s.watch.find_index.folder.name),
    "dataset.class_filter": (
        "[n01,n02,n04]",
        [("n01", "n02", "n04")] * 2,
        lambda s: [s.run.train_index.classes, s.run.val_index.classes],
    ),
    "dataset.subset": ("0.96", 3 * 86, lambda s: len(s.run.train_index)),
    "dataset.duplicates": ("stop", SAME, lambda s: s.watch.check_copies.duplicates),
    "dataset.decoder": (
        "pillow",
        ["pillow"] * 2,
        lambda s: s.both(lambda feed: feed.loader.dataset.reader.decoder),
    ),
    "dataset.on_error": ("skip", [77] * 2, lambda s: s.both(lambda feed: feed.tolerance.at_most)),
    "dataset.max_bad": ("77", [77] * 2, lambda s: s.both(lambda feed: feed.tolerance.at_most)),
    "dataset.timeout_s": ("41", [41] * 2, lambda s: s.both(lambda feed: feed.loader.timeout)),
    "dataset.num_workers": ("1", [1] * 2, lambda s: s.both(lambda feed: feed.loader.num_workers)),
    "dataset.interpolation": ("lanczos", LANCZOS, lambda s: cover(s)["mode"]),
    "dataset.mean": (
        "[0.41,0.42,0.43]",
        [about([-0.41 / 0.21, -0.42 / 0.22, -0.43 / 0.23])] * 2,
        lambda s: s.both(lambda feed: feed.normaliser.offset_C11.flatten().tolist()),
    ),
    "dataset.std": (
        "[0.21,0.22,0.23]",
        [about([1 / 0.21 / 255, 1 / 0.22 / 255, 1 / 0.23 / 255])] * 2,
        lambda s: s.both(lambda feed: feed.normaliser.gain_C11.flatten().tolist()),
    ),
    "distributed.dp_outer": ("13", SAME, lambda s: s.watch.build_meshes.dp_outer),
    "distributed.dp_shard": ("19", SAME, lambda s: s.watch.build_meshes.dp_shard),
    "distributed.ep": ("7", SAME, lambda s: s.watch.build_meshes.ep),
    "fsdp.outer_dp_sharding_strategy": (
        "optim",
        SAME,
        lambda s: s.watch.shard_model.outer_strategy,
    ),
    "optimizer.layer_decay": (
        "0.83",
        about([0.83**n for n in range(6, -1, -1)]),
        lambda s: sorted({one["lr_scale"] for one in group(s)}),
    ),
    "optimizer.weight_decay": (
        "0.07",
        {0.0, 0.07},
        lambda s: {one["weight_decay"] for one in group(s)},
    ),
    "optimizer.betas": ("[0.81,0.93]", (0.81, 0.93), lambda s: group(s)[0]["betas"]),
    "optimizer.eps": ("0.0000013", SAME, lambda s: group(s)[0]["eps"]),
    "optimizer.clip_norm": ("0.57", SAME, lambda s: s.watch.clip_gradients.max_norm),
    "training.grad_accum_steps": ("4", SAME, lambda s: s.called("seed_step")),
    "training.label_smoothing": ("0.12", SAME, lambda s: s.run.mixer.mix.label_smoothing),
    "training.ema_decay": ("0.91", SAME, lambda s: s.run.ema.decay),
    "training.seed": (
        "29",
        [29] * 5,
        lambda s: [
            s.watch.VisionTransformer.seed,
            s.watch.seed_step.seed,
            s.run.mixer.seed,
            s.run.eraser.seed,
            s.feed("train").loader.dataset.seed,
        ],
    ),
}
# Besides, per run: options that those need.
MORE = {
    "experts": [
        "model.moe.every_n=null",
        "fsdp.zero_dp_strategy=3",
        "optimizer.warmup_steps=0",
        "training.steps=1",
        "training.checkpoint.path=FOLDER/experts",
    ]
}
SMALL = [
    "model.vit.img_size=32",
    "model.vit.num_classes=4",
    "model.vit.embed_dim=48",
    "dataset.num_workers=0",
    "dataset.train.batch_size=6",
    "optimizer.warmup_steps=0",
    "training.steps=1",
]


def mfu(s):
    """The peak by hand: three forwards of each of an update's 6 images."""
    line = s.watch.read_meter.result
    flops = 3 * network.flops_per_image(s.run.config) * 6 / (line["step_ms"] / 1000)
    return flops / (line["mfu_percent"] / 100) / 1e12


LOOP = {
    "model.backend": ("torch", SAME, lambda s: s.watch.resolve_backend.backend),
    "distributed.timeout_s": (
        "61",
        [61, 30.5, 61],
        lambda s: [
            s.watch.process_group.timeout_s,
            s.watch.find_index.prints_s,
            s.watch.AsyncSaver.timeout_s,
        ],
    ),
    # 6 images per update: the peak is 3e-3 * 6 / 24
    "optimizer.lr": ("0.003", about(0.75e-3), lambda s: s.run.lr_at(2)),
    "optimizer.base_batch": ("24", about(0.75e-3), lambda s: s.run.lr_at(2)),
    "optimizer.min_lr": ("0.0002", about(0.0002), lambda s: s.run.lr_at(11)),
    "optimizer.warmup_steps": ("2", SAME, lambda s: max(range(11), key=s.run.lr_at)),
    "optimizer.warmup_lr": ("0.0005", SAME, lambda s: s.run.lr_at(0)),
    "training.steps": ("11", SAME, lambda s: s.called("train_step")),
    "training.val_interval": ("4", [4, 8, 11], lambda s: logged(s, "val")),
    "training.log_interval": ("5", [3, 4, 5, 6, 8, 9, 10, 11], lambda s: logged(s, "train")),
    "training.checkpoint.path": ("FOLDER/loop", "loop", lambda s: s.watch.Logbook.folder.name),
    "training.checkpoint.interval": (
        "3",
        [3, 6, 9, 11],
        lambda s: [call.step for call in s.watch.calls["save"]],
    ),
    "training.checkpoint.keep_last": ("21", SAME, lambda s: s.watch.Retention.keep_last),
    "training.checkpoint.keep_best": ("22", SAME, lambda s: s.watch.Retention.keep_best),
    "training.checkpoint.resume_from_metric": (
        "+val_top1",
        SAME,
        lambda s: s.watch.Retention.metric,
    ),
    "training.checkpoint.async_save": ("true", 1, lambda s: s.called("AsyncSaver")),
    "training.checkpoint.lock": ("false", SAME, lambda s: s.watch.locked.lock),
    "training.checkpoint.any_mode": ("true", SAME, lambda s: s.watch.check_writable.any_mode),
    "training.tensorboard": ("false", False, lambda s: (s.run.folder / "tensorboard").exists()),
    "training.wandb.project": ("birds", SAME, lambda s: s.watch.init.project),
    "training.wandb.mode": ("offline", SAME, lambda s: s.watch.init.mode),
    "training.peak_tflops": ("0.0123", about(0.0123), mfu),
}
MORE["loop"] = [*SMALL, "dataset.train.root=FOLDER/one"]


LOGITS_2BY = [[[1.5, -0.5, 0.25], [0.0, 2.0, -1.0]], [[0.5, 0.0, -0.5], [1.0, -1.0, 0.0]]]
LABELS, TEACHER = [2, 0], [[2.1, 0.7, -1.4], [0.0, 3.5, 0.7]]


def distilled_loss(s):
    """Of two images, by the run's criterion; the teacher says seven times an image's mean."""
    image_BCHW = torch.tensor(TEACHER).div(7).view(2, 3, 1, 1).expand(2, 3, 32, 32)
    return s.run.criterion(torch.tensor(LOGITS_2BY), torch.tensor(LABELS), image_BCHW).item()


def distilled_loss_by_hand():
    """0.7 of the binary cross-entropies, summed over classes, and 0.3 of the soft loss at 2.7.

    Above 0.2 the smoothed targets 0.1 / 3 and 0.9 + 0.1 / 3 become 0 and 1.
    """
    from_labels = soft = 0.0
    for label, row in zip(LABELS, LOGITS_2BY[0], strict=True):
        for number, logit in enumerate(row):
            from_labels += math.log1p(math.exp(-logit if number == label else logit)) / 2
    for row, theirs in zip(LOGITS_2BY[1], TEACHER, strict=True):
        q_Y, p_Y = ([math.exp(z / 2.7) for z in values] for values in (row, theirs))
        for q, p in zip(q_Y, p_Y, strict=True):
            share, wanted = q / sum(q_Y), p / sum(p_Y)
            soft += wanted * math.log(wanted / share) * 2.7**2 / 6
    return 0.7 * from_labels + 0.3 * soft


LOSS = about(distilled_loss_by_hand())


def size_in_validation(s):
    return s.watch.resample_abs_pos_embed.new_size


DISTILLED = {
    "model.vit.distilled": ("true", (3, 48), lambda s: s.shape("head_dist.weight")),
    "model.vit.scale_mlp_norm": ("true", (192,), lambda s: s.shape("blocks.0.mlp.norm.weight")),
    "model.vit.weight_init": ("jax", 0, lambda s: s.first["head.weight"].abs().max().item()),
    "model.vit.fix_init": (  # Xavier's bound, over 2 in the second block
        "true",
        pytest.approx(math.sqrt(6 / (192 + 48)) / 2, rel=0.01),
        lambda s: s.first["blocks.1.mlp.fc2.weight"].abs().max().item(),
    ),
    "model.vit.dynamic_img_size": ("true", [6, 6], size_in_validation),
    "model.vit.dynamic_img_pad": ("true", [6, 6], size_in_validation),  # 44 / 8 patches
    "dataset.val.img_size": (
        "44",
        (44, 44),
        lambda s: s.transform("val", transforms.CenterCrop).size,
    ),
    "dataset.train.crop": ("src", 4, lambda s: s.transform("train", transforms.RandomCrop).padding),
    "dataset.train.color_jitter": (
        "0.43",
        about((0.57, 1.43)),
        lambda s: s.transform("train", transforms.ColorJitter).saturation,
    ),
    "dataset.train.auto_augment": ("3aug", SAME, lambda s: s.watch.auto_augmentation.name),
    "fsdp.zero_dp_strategy": ("1", "optim", lambda s: s.watch.shard_model.strategy),
    "optimizer.name": ("lamb", "Lamb", lambda s: type(s.run.optimizer).__name__),
    # Epochs of 270 // 30 = 9 updates; the first two have the rate of update 0, half the peak, and
    # the third that of update 9 of 12.
    "optimizer.schedule_per_epoch": (
        "true",
        about([0.5e-3, 0.5e-3]),
        lambda s: [s.run.lr_at(0), s.run.lr_at(17)],
    ),
    "optimizer.warmup_prefix": (
        "false",
        about(1e-5 + 99e-5 * (0.5 + 0.5 * math.cos(0.75 * math.pi))),
        lambda s: s.run.lr_at(18),
    ),
    "training.update_freq": ("5", 6 * 5, lambda s: s.run.global_batch),
    "training.loss": ("bce", LOSS, distilled_loss),
    "training.bce_threshold": ("0.2", LOSS, distilled_loss),
    "training.bce_sum": ("true", LOSS, distilled_loss),
    "distillation.kind": ("soft", LOSS, distilled_loss),
    "distillation.alpha": ("0.3", LOSS, distilled_loss),
    "distillation.tau": ("2.7", LOSS, distilled_loss),
    "distillation.teacher": ("swift", SAME, lambda s: s.watch.create_model.model_name),
    "distillation.teacher_checkpoint": (
        "FOLDER/teacher.pth",
        SAME,
        lambda s: s.watch.load_checkpoint.checkpoint_path,
    ),
}
MORE["distilled"] = [
    *SMALL,
    "model.vit.global_pool=token",
    "model.vit.num_classes=3",
    "model.vit.depth=2",
    "dataset.class_filter=[n01,n02,n03]",
    "dataset.mean=[0.5,0.5,0.5]",
    "dataset.std=[0.5,0.5,0.5]",
    "dataset.train.root=FOLDER/one",
    "dataset.train.crop_scale=[0.08,1]",
    "optimizer.warmup_steps=2",
    "training.steps=12",
    "training.checkpoint.path=FOLDER/distilled",
]


def is_half_of_the_mlp(s):
    """Whether expert 0 of block 3 is the first half of the MLP of the file's average."""
    fc1 = torch.load(s.run.config.init.checkpoint)["ema"]["blocks.3.mlp.fc1.weight"]
    return torch.equal(s.first["blocks.3.mlp.experts.w_in"][:96], fc1[:96])


def gate(s):
    return s.first["blocks.3.mlp.router.gate.weight"]


UPCYCLED = {
    "model.moe.blocks": ("[1,3]", SAME, blocks_with_experts),
    "init.mode": ("deit_upcycling", SAME, lambda s: s.watch.initial_weights.job.plan.mode),
    "init.checkpoint": ("FOLDER/dense.pt", True, is_half_of_the_mlp),
    "init.weights": ("ema", True, is_half_of_the_mlp),
    "init.experts": ("split", True, is_half_of_the_mlp),
    "init.gate": ("virtual_group", True, lambda s: torch.equal(gate(s)[::2], gate(s)[1::2])),
    "init.gate_std": ("0.27", pytest.approx(0.27, rel=0.3), lambda s: gate(s).std().item()),
}
MORE["upcycled"] = [
    *SMALL,
    "model.vit.depth=4",
    "model.vit.num_heads=6",
    "model.vit.global_pool=token",
    "model.moe.num_experts=4",
    "model.moe.every_n=null",
    "model.moe.mlp_ratio=2",
    "dataset.train.root=FOLDER/one",
    "training.checkpoint.path=FOLDER/upcycled",
]

OTHERS = {
    "model.vit.final_norm": (
        "false",
        [(), ()],
        lambda s: [s.shape("norm.weight"), s.shape("fc_norm.weight")],
    ),
    "model.moe.every_n": ("3", [2, 5], blocks_with_experts),
    "model.moe.forced_balance": (
        "true",
        [[0, 1], [2, 3], [4, 0]],
        lambda s: s.experts.routing.expert_id_Tk[:3].tolist(),
    ),
    "model.moe.noise_std": ("1.7", about(1.7 / 5), lambda s: s.experts.router.gate.noise_std),
    "model.moe.load_coef": ("0.32", about(14 * 0.32), lambda s: cost(s, load=ONE_HOT)),
    "model.te_fp8": ("delayed", SAME, lambda s: s.watch.fp8_context.recipe_name),
    "dataset.path_env": ("FOLDER/roots.yml", "one/train", lambda s: end_of(s.run.train_index.root)),
    "dataset.name": ("nine", SAME, lambda s: s.watch.read_root.name),
    "dataset.train.repeats": ("7", SAME, lambda s: s.feed("train").loader.dataset.order.repeats),
    "optimizer.momentum": ("0.77", SAME, lambda s: group(s)[0]["momentum"]),
}
MORE["others"] = [
    *SMALL,
    "model.moe.num_experts=5",
    "model.moe.router=noisy",
    "optimizer.name=sgd",
    "optimizer.betas=[0.9,0.999]",
    "training.checkpoint.path=FOLDER/others",
]
RUNS = {
    "experts": EXPERTS,
    "loop": LOOP,
    "distilled": DISTILLED,
    "upcycled": UPCYCLED,
    "others": OTHERS,
}
# Only one value is possible where a run trains; any other is refused.
REFUSED = {"model.vit.in_chans": "1", "distributed.tp": "2"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two datasets: 90 or 1 training and 8 validation images in each of four classes; and files."""
    root, seeds = tmp_path_factory.mktemp("data"), itertools.count()
    for name, train_count in (("one", 90), ("two", 1)):
        for wnid in ("n01", "n02", "n03", "n04"):
            for split, count in (("train", train_count), ("val", 8)):
                for number in range(count):
                    path = root / name / split / wnid / f"{number}.JPEG"
                    write_image(path, seed=next(seeds), size=(48, 40))
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "num_heads": 6, "depth": 4}
    trained, average = (
        build_vit(**sizes, num_classes=4, seed=seed).state_dict() for seed in (1, 2)
    )
    torch.save({"model": trained, "ema": average}, root / "dense.pt")
    (root / "teacher.pth").touch()
    (root / "roots.yml").write_text(f"dataset_roots:\n  nine: {root / 'one'}\n")
    return root


class NoSaver:
    """As AsyncSaver, but nothing is saved."""

    is_busy = False

    def prepare(self, tensors):
        """Do nothing."""

    def begin(self, root, tensors, *, state, loss, retention):
        """Do nothing."""

    def poll(self):
        """Do nothing."""

    drain = close = poll


class NoWandb:
    """A run of W&B that goes nowhere."""

    def define_metric(self, name, *, step_metric=None):
        """Do nothing."""

    def log(self, values):
        """Do nothing."""

    def finish(self):
        """Do nothing."""


class TinyTeacher(nn.Module):
    """A network of timm, as far as distillation looks at it."""

    def __init__(self):
        super().__init__()
        self.pretrained_cfg = {"mean": (0.5, 0.5, 0.5), "std": (0.5, 0.5, 0.5)}

    def forward(self, image_BCHW):
        """Return logits_BY of three classes."""
        return image_BCHW.mean((2, 3)) * 7


def no_step(_real, run, batches, *, step, meter):
    next(batches)
    meter.steps += 1


def watched():
    """What is noted in every run, and what stands in for ranks and libraries that are not here."""
    watch = Watch()
    for owner, names in {
        augment: ["auto_augmentation"],
        cache: ["find_index"],
        distributed: ["seed_step"],
        duplicates: ["check_copies"],
        loaders: ["Feed"],
        moe.ops: ["moe_ffn", "resolve_kernels"],
        network: ["VisionTransformer"],
        roots: ["read_root"],
        router: ["jittered", "keep_within_capacity", "renormalized", "some_closed"],
        run_folder: ["check_writable", "locked"],
        saver: ["Retention"],
        saver.Saver: ["save"],
        sharding: ["clip_gradients"],
        timm.layers: ["resample_abs_pos_embed"],
        train: ["Logbook", "read_meter", "to_device"],
        vit.recompute: ["checkpoint"],
        warm_start: ["initial_weights"],
    }.items():
        for name in names:
            watch.on(owner, name)
    meshes, outer = {"dp_outer": 1, "dp_shard": None, "ep": 1}, {"outer_strategy": "no_shard"}
    watch.on(distributed, "build_meshes", lambda real, **given: real(**(given | meshes)))
    watch.on(sharding, "shard_model", lambda real, *a, **given: real(*a, **(given | outer)))
    watch.on(block_compile, "compile_blocks", lambda *_: None)
    watch.on(saver, "AsyncSaver", lambda *_, **__: NoSaver())
    wandb = types.ModuleType("wandb")
    wandb.init = lambda project, id, resume, dir, mode, config: NoWandb()
    watch.on(wandb, "init")
    wandb.Error = RuntimeError
    sys.modules["wandb"] = wandb
    return watch


def stand_ins(watch, name):
    """What only some of the runs need."""
    if name in ("loop", "distilled", "upcycled"):
        watch.on(train, "train_step", no_step)
    if name == "distilled":
        distillation.timm.is_model = lambda _: True
        watch.on(distillation.timm, "create_model", lambda *_, **__: TinyTeacher())
        watch.on(distillation, "load_checkpoint", lambda *_, **__: None)
    if name == "loop":
        watch.on(te, "resolve_backend")
    if name == "others":
        network.pick_backend = lambda *_: ("torch", "fp8 without TransformerEngine")
        watch.on(te, "check_fp8_shapes", lambda *_, **__: None)
        watch.on(te, "fp8_context", lambda *_: contextlib.nullcontext())


def differences(world, name, argv):
    """Options that did not arrive: what was found, and what should have been."""
    watch = watched()
    stand_ins(watch, name)
    seen = run_watched(world, argv, watch)
    values = {option: value for option, _, value in schema.walk(seen.run.config)}
    defaults = {option: value for option, _, value in schema.walk(schema.Config())}
    wrong = {}
    for option, (_, expected, find) in RUNS[name].items():
        found = find(seen)
        found = found.tolist() if isinstance(found, torch.Tensor) else found
        wanted = values[option] if expected is SAME else expected
        if found != wanted:
            wrong[option] = f"{found}, not {wanted}"
        elif values[option] == defaults[option] and option != "training.update_freq":
            wrong[option] = f"{found} is the default"
    return wrong


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=pytest.mark.slow if name == "experts" else ()) for name in RUNS],
)
def test_options_arrive_where_they_are_for(ranks, folder, name):
    typed = [f"{option}={value}" for option, (value, *_) in RUNS[name].items()]
    argv = [word.replace("FOLDER", str(folder)) for word in [*MORE[name], *typed]]
    (wrong,) = ranks(1, differences, name, ["--config-name", "vit_tiny_patch8_64", *argv])
    assert wrong == {}


@pytest.mark.parametrize("name", RUNS)
def test_no_two_options_of_a_run_have_the_same_value(name):
    values = [value for value, *_ in RUNS[name].values() if value not in ("true", "false")]
    assert sorted(values) == sorted(set(values))


def test_every_option_is_watched():
    """A new option of the schema needs a line in RUNS: at which value it is seen, and where."""
    options = {name for name, _, _ in schema.walk(schema.Config())}
    lines = [option for run in RUNS.values() for option in run]
    assert options - set(lines) == REFUSED.keys()
    assert len(lines) == len(set(lines))


@pytest.mark.parametrize("option", REFUSED)
def test_what_can_have_one_value_is_refused_at_others(option):
    with pytest.raises(ValueError, match=f"config {option}={REFUSED[option]}: must be"):
        compose.compose("vit_tiny_patch8_64", [f"{option}={REFUSED[option]}"])
