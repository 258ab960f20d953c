"""Distillation: timm's two-headed ViT, DeiT's losses, teachers of timm and of ours."""

import dataclasses
import json
import math

import pytest
import timm
import torch
from timm.models.deit import VisionTransformerDistilled
from torch.nn import functional as F

import train
from options.schema import DistillationOptions
from parallel import distributed
from tests.support.models import relative_error
from tests.support.networks import build_vit
from tests.support.sharded import parts, worst_error
from training import distillation, loaders, losses, network, prepare
from training.distillation import Teacher
from weights.sources import Choice, read_source

HARD = ["distillation.kind=hard", "distillation.teacher=x", "model.vit.distilled=true"]
SMALL = {
    "img_size": 32,
    "patch_size": 8,
    "num_classes": 7,
    "embed_dim": 48,
    "depth": 2,
    "num_heads": 3,
}


def image(batch_size=3, side_px=32):
    generator = torch.Generator().manual_seed(1)
    return torch.randn(batch_size, 3, side_px, side_px, generator=generator)


def twins(**options):
    theirs = VisionTransformerDistilled(**options)
    with torch.no_grad():  # a token and biases that are not zero
        for parameter in theirs.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.02)
    ours = build_vit(**options, distilled=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    return ours, theirs


def assert_same(ours, theirs, image_BCHW):
    outputs = [ours(image_BCHW), theirs(image_BCHW)]
    outputs[1] = torch.stack(outputs[1]) if isinstance(outputs[1], tuple) else outputs[1]
    assert relative_error(*outputs) <= 1e-5
    weights = torch.randn(outputs[0].shape, generator=torch.Generator().manual_seed(2))
    gradients = []
    for model, output in zip((ours, theirs), outputs, strict=True):
        model.zero_grad()
        (output * weights).sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        assert relative_error(gradient, gradients[1][name]) <= 1e-5, name


@pytest.mark.parametrize("options", [{}, {"init_values": 0.1}], ids=str)
@pytest.mark.parametrize("mode", ["eval", "train", "apart"])
def test_logits_and_every_gradient_are_timms(options, mode):
    ours, theirs = twins(**SMALL, **options)
    ours.train(mode != "eval"), theirs.train(mode != "eval")
    ours.distilled_training = mode == "apart"
    theirs.set_distilled_training(mode == "apart")
    assert_same(ours, theirs, image())


def test_deit_tiny_distilled_is_timms():
    theirs = timm.create_model("deit_tiny_distilled_patch16_224")
    ours = build_vit(embed_dim=192, num_heads=3, distilled=True)
    ours.load_state_dict(theirs.state_dict(), strict=True)
    assert_same(ours.eval(), theirs.eval(), image(2, 224))


def test_initial_values_are_those_of_timm():
    model = build_vit(**SMALL | {"embed_dim": 192}, distilled=True)
    assert model.dist_token.std().item() == pytest.approx(0.02, rel=0.2)
    assert model.head_dist.weight.std().item() == pytest.approx(0.02, rel=0.1)
    assert not model.head_dist.bias.any()
    jax = build_vit(**SMALL, distilled=True, weight_init="jax")
    assert not jax.head_dist.weight.any()


def test_hard_and_soft_losses_in_closed_form():
    student_BY = torch.tensor([[1.0, 0.0, -2.0], [0.5, 0.5, 3.0]])
    teacher_BY = torch.tensor([[0.0, 4.0, 1.0], [2.0, -1.0, 0.0]])
    log_p = student_BY.log_softmax(1)
    hard = losses.teacher_loss(student_BY, teacher_BY, kind="hard", tau=1.0)
    torch.testing.assert_close(hard, -(log_p[0, 1] + log_p[1, 0]) / 2)
    tau = 3.0
    p = [[math.exp(z / tau) for z in row] for row in teacher_BY.tolist()]
    q = [[math.exp(z / tau) for z in row] for row in student_BY.tolist()]
    expected = 0.0
    for p_row, q_row in zip(p, q, strict=True):
        for wanted, found in zip(p_row, q_row, strict=True):
            share = wanted / sum(p_row)
            expected += share * math.log(share / (found / sum(q_row)))
    soft = losses.teacher_loss(student_BY, teacher_BY, kind="soft", tau=tau)
    assert soft.item() == pytest.approx(expected * tau**2 / 6)  # 2 images of 3 classes


def test_loss_of_both_heads_in_closed_form():
    logits_2BY = torch.randn(2, 4, 3, generator=torch.Generator().manual_seed(0))
    label_B, teacher_BY = torch.tensor([0, 1, 2, 0]), torch.eye(3)[[2, 2, 1, 0]]
    seen = []

    def teacher(image_BCHW):
        seen.append(image_BCHW)
        return teacher_BY

    criterion = distillation.distilled(
        lambda logits_BY, target, _: F.cross_entropy(logits_BY, target),
        teacher,
        DistillationOptions(kind="hard", alpha=0.3),
    )
    pictures = image(4)
    expected = 0.7 * F.cross_entropy(logits_2BY[0], label_B)
    expected += 0.3 * F.cross_entropy(logits_2BY[1], torch.tensor([2, 2, 1, 0]))
    torch.testing.assert_close(criterion(logits_2BY, label_B, pictures), expected)
    assert seen == [pictures]


def test_teacher_sees_images_normalised_as_it_was_trained_and_learns_nothing():
    model = torch.nn.Flatten()
    mean, std, own_mean, own_std = (
        (0.5, 0.4, 0.3),
        (0.2, 0.3, 0.4),
        (0.1, 0.2, 0.3),
        (0.5, 0.6, 0.7),
    )
    teacher = Teacher(model, of=(mean, std), own=(own_mean, own_std))
    pixels = torch.rand(2, 3, 4, 4)

    def normalised(mean, std):
        return (pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)

    torch.testing.assert_close(
        teacher(normalised(mean, std)), normalised(own_mean, own_std).flatten(1)
    )
    learner = Teacher(torch.nn.Conv2d(3, 2, 1), of=(mean, std), own=(mean, std))
    assert not learner.model.training
    assert not learner(pixels.requires_grad_()).requires_grad
    assert not any(p.requires_grad for p in learner.parameters())


@pytest.fixture(scope="module")
def resnet_file(tmp_path_factory):
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("teacher") / "resnet.pth"
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), path)
    return path


def options_of(resnet_file, *more):
    return [
        "model.vit.global_pool=token",
        "model.vit.distilled=true",
        "distillation.kind=hard",
        "distillation.teacher=test_resnet",
        f"distillation.teacher_checkpoint={resnet_file}",
        "training.steps=2",
        "optimizer.eps=1e-5",
        *more,
    ]


def trained(world, config):
    run, _ = prepare.prepare(config, world)
    run = distillation.with_teacher(run)
    batches = loaders.train_batches(run, start_step=0)
    meter = train.Meter.start(world.device)
    for step in range(config.training.steps):
        train.train_step(run, batches, step=step, meter=meter)
    return parts(run.shards), (meter.loss.item(), train.validate(run)["val_loss"])


def test_two_ranks_and_two_microbatches_learn_the_same_from_a_teacher(
    ranks, small_run, resnet_file
):
    accumulated = small_run(*options_of(resnet_file, "training.grad_accum_steps=2"))
    ((alone, (loss, val_loss)),) = ranks(1, trained, accumulated)
    shared = ranks(2, trained, small_run(*options_of(resnet_file)))
    full = {name: local for name, _, local in alone}
    assert worst_error([found for found, _ in shared], full) <= 1e-5
    assert sum(losses[0] for _, losses in shared) == pytest.approx(loss, rel=1e-5)
    assert shared[0][1][1] == pytest.approx(val_loss, rel=1e-5)


def first_loss(world, config):
    run, _ = prepare.prepare(config, world)
    batch = next(loaders.train_batches(run, start_step=0))
    image_BCHW, target = train.to_device(run, batch)
    plain_BY = run.model(image_BCHW)
    run = distillation.with_teacher(run)
    logits_2BY = run.model(image_BCHW)
    assert torch.allclose(logits_2BY.mean(0), plain_BY, atol=1e-6)
    loss = run.criterion(logits_2BY, target, image_BCHW)
    return logits_2BY.detach(), target, image_BCHW, loss.item()


def test_run_takes_kind_alpha_and_tau_from_its_options(ranks, small_run, resnet_file):
    more = ["distillation.kind=soft", "distillation.alpha=0.1", "distillation.tau=3"]
    config = small_run(*options_of(resnet_file, *more))
    ((logits_2BY, label_B, image_BCHW, loss),) = ranks(1, first_loss, config)
    teacher = timm.create_model("test_resnet", num_classes=3)
    teacher.load_state_dict(torch.load(resnet_file, weights_only=True))
    own = [torch.tensor(teacher.pretrained_cfg[name]).view(3, 1, 1) for name in ("mean", "std")]
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.dataset.mean, config.dataset.std))
    assert not torch.allclose(mean, own[0]), "the teacher's images differ from the student's"
    with torch.no_grad():
        teacher_BY = teacher.eval()((image_BCHW * std + mean - own[0]) / own[1])
    expected = 0.9 * F.cross_entropy(logits_2BY[0], label_B, label_smoothing=0.1)
    divergence = F.kl_div(
        (logits_2BY[1] / 3).log_softmax(1), (teacher_BY / 3).softmax(1), reduction="sum"
    )
    expected += 0.1 * 9 * divergence / logits_2BY[1].numel()
    assert loss == pytest.approx(expected.item(), rel=1e-5)


def test_training_uses_the_teacher(ranks, small_run, resnet_file, tmp_path):
    more = ["distillation.alpha=1", "optimizer.weight_decay=0", "training.steps=1"]
    config = small_run(*options_of(resnet_file, *more))
    ranks(1, lambda world, config: train.train(config, world), config)
    found = read_source(tmp_path / "run", Choice()).weights()
    before = network.build_model(config, backend="torch", on_meta=False).state_dict()
    assert torch.equal(found["head.weight"], before["head.weight"]), "labels have no part in it"
    assert not torch.equal(found["head_dist.weight"], before["head_dist.weight"])


def built(world, config):
    try:
        teacher = distillation.build_teacher(config, world)
        return str(next(teacher.parameters()).dtype), teacher.flops_per_image
    except (ValueError, FileNotFoundError) as error:
        return str(error)


def flops_of_convolutions(model, image_1CHW):
    """Two for each product of a convolution or a linear layer, as its output and weights say."""
    counts = []

    def count(module, _inputs, output):
        weights_per_output = module.weight[0].numel()
        counts.append(2 * output.numel() * weights_per_output)

    for module in model.modules():
        if isinstance(module, torch.nn.Conv2d | torch.nn.Linear):
            module.register_forward_hook(count)
    with torch.no_grad():
        model.eval()(image_1CHW)
    return sum(counts)


def test_mfu_counts_the_forward_pass_of_the_teacher(ranks, small_run, resnet_file, tmp_path):
    more = ["training.log_interval=2", "training.peak_tflops=0.5"]
    config = small_run(*options_of(resnet_file, *more))
    ranks(1, lambda world, config: train.train(config, world), config)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    line = next(line for line in lines if line["event"] == "train")
    student = network.flops_per_image(config)
    teacher = flops_of_convolutions(timm.create_model("test_resnet", num_classes=3), image(1, 32))
    assert teacher > 1_000_000
    expected = 100 * (3 * student + teacher) * line["images_per_s"] / 0.5e12
    assert line["mfu_percent"] == pytest.approx(expected, rel=1e-3)


def built_for(world, config, classes):
    distillation.build_teacher(config, world, classes=classes)


def test_run_of_ours_can_teach(ranks, small_run, resnet_file, tmp_path, capfd):
    folder = tmp_path / "teacher"
    lesson = small_run("training.steps=1", f"training.checkpoint.path={folder}")
    ranks(1, lambda world, config: train.train(config, world), lesson)
    config = small_run(*options_of(resnet_file))
    ours = dataclasses.replace(
        config,
        distillation=dataclasses.replace(
            config.distillation, teacher=str(folder), teacher_checkpoint=None
        ),
    )
    flops = network.flops_per_image(lesson, training=False)
    assert ranks(1, built, ours) == [("torch.float32", flops)]
    capfd.readouterr()
    ranks(1, built_for, ours, ["n00000000", "n00000001", "n00000002"])
    assert "note" not in capfd.readouterr().err
    ranks(1, built_for, ours, ["n00000000", "x", "n00000002"])
    says = "1 of 3 classes were others in training: class 1 was n00000001, is x"
    assert f"note: distillation.teacher={folder}: {says}" in capfd.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["distillation.teacher=resnet_9000"], "teacher=resnet_9000: is neither a folder or file"),
        (["distillation.teacher={file}"], "teacher_checkpoint={file}: has no effect"),
        (
            ["distillation.teacher={file}", "distillation.teacher_checkpoint=null"],
            "is it the file of a model of timm? then name that, with teacher_checkpoint",
        ),
        (["distillation.teacher=test_vit"], "teacher=test_vit with teacher_checkpoint={file}: can"),
        (["distillation.teacher_checkpoint=x.pth"], "teacher_checkpoint=x.pth: cannot be loaded"),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_teacher_that_cannot_teach_is_refused(resnet_file, small_run, options, message):
    options = [option.format(file=resnet_file) for option in options]
    config = small_run(*options_of(resnet_file, *options))
    world = distributed.World(0, 1, 0, torch.device("cpu"))
    assert message.format(file=resnet_file) in built(world, config)


TINY = "vit_tiny_patch16_224"


def test_teacher_of_other_pixels_is_refused(tmp_path, small_run):
    file = tmp_path / "vit.pth"
    torch.save(timm.create_model(TINY, num_classes=3).state_dict(), file)
    config = small_run(*options_of(file, f"distillation.teacher={TINY}"))
    world = distributed.World(0, 1, 0, torch.device("cpu"))
    says = f"teacher={TINY}: cannot take images of 32 x 32 pixels, as model.vit.img_size says: "
    assert says in built(world, config)


def test_teacher_of_other_classes_is_refused(resnet_file, small_run):
    config = small_run(*options_of(resnet_file, "model.vit.num_classes=5"))
    world = distributed.World(0, 1, 0, torch.device("cpu"))
    assert "cannot be loaded" in built(world, config)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["distillation.alpha=0.9"], "alpha=0.9: has no effect with distillation.kind=none"),
        (["distillation.teacher=x"], "teacher=x: has no effect with distillation.kind=none"),
        (["distillation.kind=soft"], "kind=soft: needs distillation.teacher"),
        (
            ["distillation.kind=soft", "distillation.teacher=x"],
            "kind=soft: needs model.vit.distilled=true",
        ),
        (["distillation.kind=firm"], "kind=firm: must be one of none, soft, hard"),
        (
            [*HARD, "model.vit.global_pool=token", "distillation.tau=3"],
            "tau=3.0: has no effect with distillation.kind=hard",
        ),
        (
            [*HARD, "model.vit.global_pool=token", "distillation.alpha=0"],
            r"alpha=0.0: has no effect \(use distillation.kind=none\)",
        ),
    ],
    ids=lambda value: value[-1] if isinstance(value, list) else None,
)
def test_options_without_effect_are_refused(small_run, options, message):
    with pytest.raises(ValueError, match=message):
        small_run(*options)


@pytest.mark.parametrize(
    "options", [{"global_pool": "avg"}, {"reg_tokens": 1}, {"fc_norm": True}], ids=str
)
def test_second_head_needs_a_token_to_read(options):
    with pytest.raises(ValueError, match="distilled=True: needs global_pool=token"):
        build_vit(**SMALL, **options, distilled=True)


def test_a_teacher_from_a_file_that_says_so_sees_its_own_normalisation(
    ranks, small_run, resnet_file, tmp_path
):
    weights = torch.load(resnet_file, weights_only=True)
    about = json.dumps({"mean": [0.25, 0.5, 0.75], "std": [0.5, 0.25, 0.125]})
    torch.save({"state_dict": weights, "pretrained_cfg": about}, tmp_path / "said.pth")
    student = ["dataset.mean=[0.5,0.5,0.5]", "dataset.std=[0.25,0.25,0.25]"]
    config = small_run(*options_of(tmp_path / "said.pth", *student))
    (teacher,) = ranks(1, lambda world: distillation.build_teacher(config, world))
    # By hand: x std + mean = pixel, and (pixel - own mean) / own std.
    assert teacher.gain_C11.flatten().tolist() == [0.5, 1, 2]
    assert teacher.offset_C11.flatten().tolist() == [0.5, 0, -2]
