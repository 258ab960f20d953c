"""What a user types as name=value, and configurations with many mistakes or none to be found."""

import dataclasses
import itertools
import sys

import pytest
from omegaconf import OmegaConf

import evaluate
import export
import train
from data import pack
from options import command_line, compose
from options.command_line import parse_override
from options.schema import Config, MoEOptions, ViTOptions, walk
from training import network, prepare
from vit import VisionTransformer

OPTIONS = {name: field for name, field, _ in walk(Config())}
AS_TYPED = [
    "~/d",
    "1e3",
    "007",
    "\u65e5\u672c",
    "a=b",
    "x (v2)",
    "it's",
    "a,b",
    "[x]",
    "a: b",
    "x #1",
]


@pytest.mark.parametrize("text", [*AS_TYPED, "${HOME}/x", "$HOME", "true", "a\\b", "*", "-1"])
def test_a_path_is_taken_as_typed_by_every_program(text):
    override = f"training.checkpoint.path={text}"
    config = compose.compose("vit_tiny_patch8_64", [override])
    assert config.training.checkpoint.path == text
    assert compose.given_options([override]) == {"training.checkpoint.path": text}
    again = compose.restore(dataclasses.asdict(config), [])
    assert again.training.checkpoint.path == text
    restored = compose.restore(
        dataclasses.asdict(compose.compose("vit_tiny_patch8_64", [])), [override]
    )
    assert restored.training.checkpoint.path == text


@pytest.mark.parametrize(
    ("override", "value"),
    [
        ("dataset.class_filter=[007,010]", ["007", "010"]),
        ("dataset.class_filter=[ n01 ,1e3,true]", ["n01", "1e3", "true"]),
        ("""dataset.class_filter=["a, b",'c',d e]""", ["a, b", "c", "d e"]),
        ("dataset.class_filter=[]", []),
        ("training.steps=010", 10),
        ("training.steps=1_000", 1000),
        ("optimizer.lr=1e-3", 0.001),
        ("optimizer.lr=3", 3.0),
        ("optimizer.clip_norm=null", None),
        ("optimizer.betas=[0.9, .95]", [0.9, 0.95]),
        ("model.moe.blocks=[1,3]", [1, 3]),
        ("model.vit.qk_norm=True", True),
        ("model.vit.qk_norm=off", False),
        ("training.steps= 200", 200),
        ("training.steps='200'", 200),
        ("model.moe.capacity_factor=NULL", None),
        ("dataset.val.root=NULL", None),
        ("model.vit.img_size=96", 96),
        ("model.vit.img_size=[96,64]", [96, 64]),
        ("model.vit.weight_init=", ""),
        ('model.vit.weight_init=""', ""),
        ("fsdp.zero_dp_strategy=2", 2),
        ("fsdp.zero_dp_strategy=optim", "optim"),
        ("training.checkpoint.resume_from_metric=-val_loss", "-val_loss"),
        ("init.checkpoint='null'", "null"),
    ],
)
def test_a_value_is_read_by_its_options_type(override, value):
    ((name, found),) = parse_override(override).items()
    assert (name, found, type(found)) == (override.partition("=")[0], value, type(value))


def test_every_type_of_an_option_has_a_reader():
    for name, field in OPTIONS.items():
        kinds = [kind for kind in str(field.type).split(" | ") if kind != "None"]
        assert set(kinds) <= command_line._READERS.keys(), name


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("training.steps=ten", ["training.steps=ten", "a whole number"]),
        ("training.steps=1e3", ["training.steps=1e3", "a whole number"]),
        ("model.vit.qk_norm=maybe", ["qk_norm=maybe", "true or false"]),
        ("optimizer.clip_norm=x", ["clip_norm=x", "a number or null"]),
        ("dataset.class_filter=n01", ["class_filter=n01", "'dataset.class_filter=[a,b]'"]),
        ("dataset.class_filter=['n01]", ["a list of names"]),
        ("dataset.class_filter=[a,]", ["a list of names"]),
        ("training.checkpoint.path=???", ["path=???", "text"]),
        ("model.vit=${optimizer}", ["config model.vit=${optimizer}"]),
        ("optimizer.betas=[0.9;0.99]", ["a list of numbers"]),
        ("model.vit=3", ["is a section"]),
        ("~model", ["name=value"]),
        ("training.step=3", ["no such option", "training.steps"]),
    ],
)
def test_what_cannot_be_read_is_named_with_what_is_allowed(override, parts):
    with pytest.raises(ValueError, match="config") as caught:
        parse_override(override)
    assert [part for part in parts if part not in str(caught.value)] == [], str(caught.value)


def test_a_value_may_refer_to_another_option():
    given = ["training.seed=7", "training.checkpoint.path=ckpts/s${training.seed}"]
    config = compose.compose(
        "vit_tiny_patch8_64", [*given, "optimizer.warmup_steps=${training.val_interval}"]
    )
    assert config.training.checkpoint.path == "ckpts/s7"
    assert config.optimizer.warmup_steps == config.training.val_interval
    assert list(compose.given_options(["optimizer.warmup_steps=${training.val_interval}"])) == [
        "optimizer.warmup_steps"
    ]


@pytest.mark.parametrize("path", ["a${b", "a\\${HOME}", "${HOME}"])
def test_a_path_is_the_same_in_the_options_that_a_run_writes(path):
    config = compose.compose("vit_tiny_patch8_64", [f"training.checkpoint.path={path}"])
    assert config.training.checkpoint.path == path
    again = OmegaConf.to_container(OmegaConf.create(compose.to_yaml(config)), resolve=True)
    assert again["training"]["checkpoint"]["path"] == path


@pytest.mark.parametrize("program", [train, evaluate, export, pack], ids=lambda p: p.__name__)
@pytest.mark.parametrize("flags", [["--bogus"], ["x", "--bogus", "--output", "y"]], ids=str)
def test_an_unknown_flag_is_one_line(program, flags, capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", [program.__file__])
    try:
        code = program.main(flags)
    except SystemExit as end:  # pack.py's parser ends the program itself
        code = end.code
    (line,) = capsys.readouterr().err.splitlines()
    assert code == 2
    assert line.startswith("error: ")
    assert "--help" in line


def test_all_mistakes_are_told_at_once():
    overrides = [
        "model.vit.num_heads=5",
        "optimizer.warmup_steps=9",
        "training.steps=5",
        "dataset.train.mixup_prob=0.5",
        "distributed.ep=3",
    ]
    with pytest.raises(ValueError, match="config") as caught:
        compose.compose("vit_moe_tiny_patch8_64", overrides)
    problems = str(caught.value).split("; ")
    for name in ("num_heads=5", "warmup_steps=9", "mixup_prob=0.5", "ep=3"):
        assert len([line for line in problems if name in line]) == 1, problems
    assert "\n" not in str(caught.value)


def test_all_values_of_a_wrong_type_are_told_at_once():
    with pytest.raises(ValueError, match="depth=x") as caught:
        compose.compose("vit_tiny_patch8_64", ["model.vit.depth=x", "optimizer.lr=y", "bogus=1"])
    assert all(part in str(caught.value) for part in ("lr=y", "bogus"))
    with pytest.raises(ValueError, match="depth=0") as caught:
        compose.compose("vit_tiny_patch8_64", ["model.vit.depth=0", "optimizer.lr=-1"])
    assert "optimizer.lr=-1.0: must be at least 0" in str(caught.value)


@pytest.mark.parametrize(
    ("options", "part"),
    [
        ({"depth": "12"}, "model.vit.depth=12: must be a whole number"),
        ({"depth": None}, "model.vit.depth=null: must be a whole number"),
        ({"depth": True}, "model.vit.depth=True: must be a whole number"),
        ({"qk_norm": 1}, "model.vit.qk_norm=1: must be true or false"),
        ({"drop_rate": "0"}, "model.vit.drop_rate=0: must be a number"),
        ({"img_size": "224"}, "model.vit.img_size=224: must be a positive number of pixels"),
        ({"img_size": [1, 2, 3]}, "img_size=[1, 2, 3]: must be a positive number of pixels"),
        ({"global_pool": 3}, "model.vit.global_pool=3: must be"),
        ({"num_classes": None}, "model.vit.num_classes=null: must be a number"),
    ],
)
def test_a_network_made_in_python_refuses_values_of_another_type(options, part):
    with pytest.raises(ValueError, match=r"config model\.vit") as caught:
        VisionTransformer(ViTOptions(**{"depth": 1, **options}))
    assert part in str(caught.value)


def test_experts_made_in_python_refuse_values_of_another_type():
    from routers.router import Router

    with pytest.raises(ValueError, match=r"model.moe.top_k=2: must be a whole number"):
        Router(8, MoEOptions(num_experts=4, top_k="2"))


# recipe: 312,500 steps of which 10,000 warm up; half a percent of it fits into 500 steps as 16.
def test_a_short_run_of_a_long_recipe_has_its_warm_up_scaled(tmp_path):
    (tmp_path / "long.yaml").write_text(
        "defaults: [schema, _self_]\ntraining: {steps: 312500}\noptimizer: {warmup_steps: 10000}\n"
    )
    notes = []
    short = compose.compose("long", ["training.steps=500"], config_dir=tmp_path, note=notes.append)
    assert short.optimizer.warmup_steps == 16
    assert len(notes) == 1
    assert all(part in notes[0] for part in ("warmup_steps=16", "10000 of 312500", "steps=500"))
    notes.clear()
    longer = ["training.steps=20000"]
    assert compose.compose("long", longer, config_dir=tmp_path).optimizer.warmup_steps == 10000
    given = ["training.steps=500", "optimizer.warmup_steps=600"]
    with pytest.raises(ValueError, match="warmup_steps=600"):
        compose.compose("long", given, config_dir=tmp_path, note=notes.append)
    assert notes == []


def train_and_count(world, config):
    seen = []
    real = train.fit

    def fit(run, logbook, **rest):
        seen.append((run.config.model.vit.num_classes, run.model.module.head.out_features))
        return real(run, logbook, **rest)

    train.fit = fit
    train.train(config, world)
    return seen


def test_a_null_number_of_classes_is_the_datas(ranks, small_run, tmp_path):
    config = small_run("model.vit.num_classes=null", "training.steps=1")
    assert ranks(2, train_and_count, config) == [[(3, 3)], [(3, 3)]]
    assert "num_classes: 3" in (tmp_path / "run" / "config.yaml").read_text()


BOMB = "a: &a [x,x,x,x,x,x,x,x,x]\n" + "".join(
    f"{new}: &{new} [{', '.join(['*' + old] * 9)}]\n"
    for old, new in itertools.pairwise("abcdefghi")
)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        (b"defaults: [mine, _self_]\n", "includes itself (mine -> mine)"),
        (b"defaults: [schema, other, _self_]\n", "includes itself"),
        (BOMB.encode(), "more than 100000 values"),
        (b"a: &a [*a]\n", "a value contains itself"),
        (b"[" * 100_000, "nested too deeply"),
        ("training: {steps: 3} # \u00fc".encode("latin-1"), "not UTF-8 text"),
        ("training: {steps: 3}".encode("utf-16"), "not UTF-8 text"),
        (b"\x00\x01", "not YAML"),
        (b"", "defaults: [schema, _self_]"),
        (b"3", "defaults"),
        (b"[1, 2]", "defaults"),
        (b"defaults: 3", "defaults"),
    ],
    ids=[
        "self",
        "cycle",
        "bomb",
        "alias",
        "deep",
        "latin-1",
        "utf-16",
        "nul",
        "empty",
        "3",
        "list",
        "n",
    ],
)
def test_a_hostile_recipe_is_one_line(tmp_path, content, part):
    (tmp_path / "mine.yaml").write_bytes(content)
    (tmp_path / "other.yaml").write_text("defaults: [schema, mine]\n")
    with pytest.raises(ValueError, match="config") as caught:
        compose.compose("mine", [], config_dir=tmp_path)
    assert "mine.yaml" in str(caught.value)
    assert part in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "part"),
    [
        ("training: {steps: x}", "config training.steps: Value 'x' of"),
        ("training: {steps: null}", "must be a whole number"),
        ("dataset: {class_filter: 3}", "must be a list of names"),
        ("training: 3", "a section's options must be set one by one"),
        ("trainin: {steps: 3}", "no such option (did you mean training"),
        ("1: 2", "config 1: no such option"),
    ],
)
def test_a_mistake_in_a_recipe_names_option_and_file(tmp_path, content, part):
    (tmp_path / "mine.yaml").write_text(f"defaults: [schema, _self_]\n{content}\n")
    with pytest.raises(ValueError, match=r"^config:? .*mine\.yaml\)$") as caught:
        compose.compose("mine", [], config_dir=tmp_path)
    assert part in str(caught.value)


def test_a_recipe_with_a_byte_order_mark_is_read(tmp_path):
    text = "\ufeffdefaults: [schema, _self_]\ntraining: {steps: 7}\n"
    (tmp_path / "mine.yaml").write_text(text, "utf-8")
    assert compose.compose("mine", [], config_dir=tmp_path).training.steps == 7


BAD = ["", "null", "-1", "0", "nan", "1e300", "9" * 400, "[]", "[1,2,3]", "\x1b[31m\x00", "{a: 1}"]
BAD += ["[['", "${x}", "\ud800"]


@pytest.fixture(scope="module")
def known():
    return dataclasses.asdict(compose.compose("vit_moe_tiny_patch8_64", []))


@pytest.mark.parametrize("name", OPTIONS)
def test_no_value_of_an_option_is_worse_than_one_line(known, name):
    section = name.rpartition(".")[0]
    for value in BAD:
        try:
            config = compose.restore(known, [f"{name}={value}"])
        except ValueError as error:
            assert "\n" not in str(error).strip()
            assert section in str(error), value
            continue
        if name.startswith("model.") and config.model.vit.num_classes is not None:
            network.build_model(config, backend="torch", on_meta=True)


def test_every_time_that_is_waited_has_a_limit():
    """Torch counts it in a C++ number that overflows."""
    names = [name for name in OPTIONS if name.endswith("timeout_s")]
    assert len(names) == 2
    assert [name for name in names if OPTIONS[name].metadata["high"] is None] == []


def test_options_are_checked_again_when_the_number_of_classes_is_known():
    """0.1 / 5 is above the threshold 0: every class would be a target."""
    bce = ["training.loss=bce", "training.bce_threshold=0", "training.label_smoothing=0.1"]
    config = compose.compose("vit_tiny_patch8_64", [*bce, "model.vit.num_classes=null"])
    with pytest.raises(ValueError, match="makes a target of every class"):
        prepare.with_classes(config, 5)
