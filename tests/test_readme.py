"""Every command of README and docs runs, shrunk to seconds; every file that they name exists."""

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
DOCS = {path.name: path.read_text() for path in sorted((ROOT / "docs").glob("*.md"))}


def commands(page):
    """The lines of a page's bash blocks, continued ones joined, comments left out."""
    text = "".join(re.findall(r"```bash\n(.*?)```", page, flags=re.DOTALL))
    return [line.split("  #")[0].strip() for line in re.sub(r"\\\n *", "", text).splitlines()]


COMMANDS = commands(README)
LAUNCHER = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
SHRUNK = [
    "model.vit.num_classes=3",
    "model.vit.img_size=32",
    "model.vit.patch_size=8",
    "model.vit.embed_dim=48",
    "model.vit.depth=2",
    "model.vit.num_heads=3",
    "model.vit.drop_path_rate=0",
    "dataset.train.repeats=1",
    "dataset.train.batch_size=2",
    "dataset.num_workers=0",
    "optimizer.warmup_steps=0",
    "training.steps=1",
    "training.val_interval=1",
    "training.log_interval=1",
    "device=cpu",
]


def run(words, *, check=True):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words, cwd=ROOT, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 or not check, done.stdout + done.stderr
    return done


def train(words, image_folder, folder):
    """Run a training command of the README on small images into `folder`."""
    shrunk = [*SHRUNK, f"dataset.train.root={image_folder}", f"training.checkpoint.path={folder}"]
    launcher = LAUNCHER if words[0] == "torchrun" else [sys.executable]
    return run([*launcher, *words[1:], *shrunk])


def test_readme_has_commands():
    assert {"make train", "make test"} <= set(COMMANDS)


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if "train.py" in c and not c.startswith("make")]
)
def test_training_command(command, image_folder, tmp_path):
    words = shlex.split(command.replace("${NGPU}", "2"))
    if "--help" in words or "--print-config" in words:
        done = run([sys.executable, *words[1:]])
        assert "training.checkpoint.path" in done.stdout or "checkpoint:" in done.stdout
        return
    assert "training is complete: 1 steps" in train(words, image_folder, tmp_path / "x").stdout


@pytest.mark.slow
@pytest.mark.parametrize("command", [c for page in DOCS.values() for c in commands(page)])
def test_a_command_of_the_docs_that_starts_from_a_checkpoint(command, image_folder, tmp_path):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    network = timm.models.VisionTransformer(**sizes, num_classes=3)
    torch.save(network.state_dict(), tmp_path / "dense.pth")
    here, count = re.subn(r"(init\.checkpoint)=\S+", rf"\1={tmp_path}/dense.pth", command)
    assert count == 1, "another kind of command needs another test"
    done = train(shlex.split(here), image_folder, tmp_path / "x")
    assert "training is complete: 1 steps" in done.stdout


@pytest.mark.slow
def test_make_train_and_what_its_table_says_to_type_next(image_folder, tmp_path):
    # `make train` itself, with the interpreter of this test instead of an installation.
    run(["make", "-n", "train"])
    options = [*SHRUNK, f"dataset.train.root={image_folder}"]
    options += [f"training.checkpoint.path={tmp_path}/run", "training.steps=2"]
    table = run([*LAUNCHER, "--nproc-per-node", "2", "train.py", *options]).stdout
    following = re.search(r"next +\u2502 (\S*python .*?) +\u2502", table)[1]
    words = [sys.executable, *shlex.split(following)[1:]]
    words[-1] = str(tmp_path / "model.pt")
    run(words)
    assert (tmp_path / "model.pt").is_file()
    shown = shlex.split(next(c for c in COMMANDS if "format_utils" in c))
    assert shown[1:4] == shlex.split(following)[1:4], "the README shows what the table says"
    board = shlex.split(next(c for c in COMMANDS if c.startswith("tensorboard")))
    words = [sys.executable, "-m", "tensorboard.main", *board[1:-1], str(tmp_path), "--inspect"]
    assert "train/loss" in run(words).stdout


@pytest.fixture(scope="module")
def runs(image_folder, tmp_path_factory):
    """Run folders of a dense model and of one with experts, by the README's names of them."""
    root = tmp_path_factory.mktemp("runs")
    for name, config in (("vit", "vit_tiny_patch8_64"), ("moe", "vit_moe_tiny_patch8_64")):
        train(["python", "train.py", "--config-name", config], image_folder, root / name)
    return {"ckpts/vit": root / "vit", "ckpts/moe": root / "moe"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "command", [c for c in COMMANDS if c.startswith(("python evaluate.py", "python export.py"))]
)
def test_command_on_a_run_folder(command, runs, tmp_path):
    words = [str(runs.get(word, word)) for word in shlex.split(command)[1:]]
    if "--output" in words:
        place = words.index("--output") + 1
        words[place] = str(tmp_path / words[place])
    done = run([sys.executable, *words])
    assert done.stdout
    if "--output" in words:
        assert Path(words[place]).exists()


def test_every_command_is_run_by_a_test():
    others = [c for c in COMMANDS if "train.py" not in c]
    known = (
        "python evaluate.py",
        "python export.py",
        "make train",
        "make test",
        "python -m torch.distributed.checkpoint",
        "tensorboard",
    )
    assert not [c for c in others if not c.startswith(known)]


def test_make_test_is_what_ci_runs():
    assert "make test" in (ROOT / ".ci/run").read_text()
    done = run(["make", "-n", "test"])
    assert "pytest" in done.stdout
    assert "ruff" in done.stdout
    assert "mypy" in done.stdout


def test_the_tree_names_every_file_once():
    tree = re.search(r"## The house\n\n```\n(.*?)```", README, flags=re.DOTALL)[1]
    named = [line.split()[0] for line in tree.splitlines()]
    assert all((ROOT / name).exists() for name in named)
    assert {p.name for p in ROOT.glob("*.py")} == {name for name in named if "/" not in name}


def test_every_link_and_test_that_the_readme_names_exists():
    paths = re.findall(r"\]\(([^)#:]+)\)", README)
    paths += re.findall(r"`((?:tests|benchmarks|docs|config)/[\w./-]+\.\w+)`", README)
    assert paths
    assert not [path for path in paths if not (ROOT / path).exists()]
