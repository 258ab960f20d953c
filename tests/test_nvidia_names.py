"""A command line of NVIDIA's ViT recipe works here, or is told in one line what to use."""

import dataclasses

import pytest
from omegaconf import OmegaConf

from options import compose
from options.nvidia_names import hint

RECIPE = "vit_tiny_patch8_64"


def plain(*overrides: str) -> dict:
    return dataclasses.asdict(compose.compose(RECIPE, list(overrides)))


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [
        ("model.vit.pos_embed=true", "model.vit.pos_embed=learn"),
        ("model.vit.pos_embed=False", "model.vit.pos_embed=none"),
        ("model.vit.weight_init=null", "model.vit.weight_init="),
        ("model.transformer_engine=true", "model.backend=te"),
        ("model.transformer_engine=false", "model.backend=torch"),
        ("dataset.num_classes=5", "model.vit.num_classes=5"),
        ("random.seed=9", "training.seed=9"),
        ("fsdp.outer_dp_sharding_strategy=0", "fsdp.outer_dp_sharding_strategy=no_shard"),
        (
            "training.checkpoint.resume_from_metric=-",
            "training.checkpoint.resume_from_metric=-val_loss",
        ),
    ],
)
def test_an_option_of_nvidias_recipe_is_taken_as_ours(theirs, ours):
    assert plain(theirs) == plain(ours)
    given = {name: str(value) for name, value in compose.given_options([theirs]).items()}
    assert given == {ours.partition("=")[0]: ours.partition("=")[2]}


def test_an_outer_strategy_of_1_shards_the_optimizer_as_theirs_does():
    theirs = ["fsdp.outer_dp_sharding_strategy=1", "distributed.dp_outer=2"]
    config = plain(*theirs, "fsdp.zero_dp_strategy=optim_grads_params")
    assert config["fsdp"]["outer_dp_sharding_strategy"] == "optim"


@pytest.mark.parametrize(
    "always",
    [
        "distributed.cp=1",
        "dataset.train.shuffle=true",
        "fsdp.grad_reduce_in_fp32=True",
        "fsdp.init_model_with_meta_device=true",
        "fsdp.preserve_fp32_weights=true",
    ],
)
def test_what_always_holds_here_may_be_asked_for(always):
    assert plain(always) == plain()
    assert compose.given_options([always]) == {}


@pytest.mark.parametrize(
    ("theirs", "line"),
    [
        ("distributed.cp=2", "always 1 here: a sequence stays on one rank; leave it out"),
        ("dataset.train.shuffle=false", "always true here: each epoch has an order of its own"),
        ("fsdp.preserve_fp32_weights=false", "always true here: main weights are fp32"),
        ("fsdp.fsdp_unit_modules=[a.B]", "a unit is a block"),
        ("model.channels_last=true", "images always lie channels-last in memory"),
        ("model.transformer_engine=maybe", "must be true or false"),
        ("inference.checkpoint.path=x", "evaluate.py scores a checkpoint"),
        ("profiling.torch_memory_profile=true", "training.tensorboard, training.wandb"),
        ("dataset.val.transform_kwargs.mean=[1,2,3]", "use dataset.val.crop_ratio for crop_pct"),
        ("training.checkpoint.resume_from_metric=+", "must be one of null, +val_top1"),
    ],
)
def test_what_cannot_be_had_here_is_refused_with_a_way_out(theirs, line):
    with pytest.raises(ValueError, match=r"^config ") as caught:
        plain(theirs)
    message = str(caught.value)
    assert message.startswith(f"config {theirs}: ")
    assert line in message
    assert "\n" not in message


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"random": {"seed": 1}}, "config random: random.seed: here it is training.seed"),
        ({"model": {"transformer_engine": True}}, "here it is model.backend"),
        ({"distributed": {"cp": 2}}, "config distributed.cp: always 1 here"),
        ({"profiling": {"x": 1}}, "config profiling: training.tensorboard"),
    ],
)
def test_their_names_in_a_recipe_file_are_told_ours(tmp_path, content, line):
    recipe = {"defaults": ["schema", "_self_"], **content}
    OmegaConf.save(OmegaConf.create(recipe), tmp_path / "theirs.yaml")
    with pytest.raises(ValueError, match=r"^config ") as caught:
        compose.compose("theirs", [], config_dir=tmp_path)
    assert line in str(caught.value)
    assert "theirs.yaml" in str(caught.value)


def test_options_of_ours_have_no_hint():
    assert hint("model.vit.pos_embed") is None
    assert hint("training.stepz") is None
