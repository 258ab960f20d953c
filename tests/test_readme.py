"""Every command and snippet of README and docs runs as a newcomer pastes it, shrunk to seconds."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import timm
import torch

from options import compose
from tests.support import pages

ROOT = pages.ROOT
COMMANDS = [
    (block.page, line) for block in pages.blocks("bash") for line in pages.commands(block.text)
]
# Put behind what a command of train.py says, so that it takes a second.
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
STEP = re.compile(r"step_\d+_loss_[\d.]+\d")


def shell(words, folder):
    """What a program of its own prints; it must end with exit code 0."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        words, cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def make_house(folder, image_folder):
    """A clone's folder, as far as the commands see it; both datasets are the small images."""
    for name in ("train.py", "evaluate.py", "export.py", "Makefile", "requirements.txt"):
        (folder / name).symlink_to(ROOT / name)
    (folder / "data").mkdir()
    for name in ("pack.py", "contact_sheet.png"):
        (folder / "data" / name).symlink_to(ROOT / "data" / name)
    for name in ("imagenet", "tiny-imagenet-5"):
        (folder / "data" / name).symlink_to(image_folder)


@pytest.fixture(scope="module")
def house(image_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("house")
    make_house(folder, image_folder)
    # What `make train` installs is this interpreter, and up to date.
    programs = folder / ".venv" / "bin"
    programs.mkdir(parents=True)
    for name, words in (("python", ""), ("torchrun", "-m torch.distributed.run")):
        (programs / name).write_text(f'#!/bin/sh\nexec {sys.executable} {words} "$@"\n')
        (programs / name).chmod(0o755)
    (folder / ".venv" / ".train").touch()
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 48, "depth": 2, "num_heads": 3}
    network = timm.models.VisionTransformer(**sizes, num_classes=3)
    torch.save(network.state_dict(), folder / "dense.pth")
    return folder


def type_command(line, house):
    """Run a command of a page in `house`, and return what it prints."""
    line = line.replace("${NGPU}", "2").replace("/data/", f"{house}/data/")
    line = re.sub(r"(init\.checkpoint)=\S+", r"\1=dense.pth", line)
    if (shown := STEP.search(line)) and not (house / shown[0]).exists():
        run_folder = re.search(rf"(\S+)/{STEP.pattern}", line)[1]
        (found,) = (house / run_folder).glob("step_*")
        line = line.replace(shown[0], found.name)
    words = shlex.split(line)
    if line == "make train":
        return shell([*words, "NPROC=2", f"ARGS={shlex.join(SHRUNK)}"], house)
    if words[0] == "tensorboard":
        return pages.run(["-m", "tensorboard.main", *words[1:], "--inspect"], house)
    if words[0] == "torchrun":
        assert words[1] == "--nproc-per-node"
        program = words[words.index("train.py") :]
        return pages.run([*program, *SHRUNK], house, num_ranks=int(words[2]))
    assert words[0] == "python"
    is_training = words[1] == "train.py" and not {"--help", "--print-config"} & set(words)
    return pages.run([*words[1:], *(SHRUNK if is_training else [])], house)


# A router is pasted before its command: see below. The activation sets PATH for a shell.
def is_of_the_router(line):
    return "model.moe.router=" in line


@pytest.mark.slow
def test_the_commands_work_one_after_the_other_in_one_folder(house):
    printed = {}
    for page, line in COMMANDS:
        if line == "source .venv/bin/activate":
            assert (house / ".venv" / "bin" / "python").exists()
        elif not is_of_the_router(line):
            printed[line] = type_command(line, house)
            is_training = "train.py" in line and "--help" not in line and "--print" not in line
            if is_training or line == "make train":
                assert "training is complete: 1 steps" in printed[line], page
                assert "resumed" not in printed[line], f"{page}: `{line}` meets another run"
    assert "training.checkpoint.path" in printed["python train.py --help"]
    assert "train/loss" in printed["tensorboard --logdir ./ckpts"]
    following = re.search(r"next +\u2502 \S*python (.*?) +\u2502", printed["make train"])[1]
    shown = next(line for line in printed if "format_utils" in line)
    assert STEP.sub("", shown) == STEP.sub("", f"python {following}"), "as its table says"
    model = torch.load(house / "model.pt", weights_only=True)["model"]
    assert "blocks.0.attn.qkv.weight" in model
    for name in ("vit.pth", "out/mtl_best_global.pth", "out/vit", "data/imagenet-256/train"):
        assert (house / name).exists(), name
    again = type_command("make train", house)
    assert "training is complete: 1 steps" in again and "train step" not in again


def test_the_table_of_make_train_is_one_that_it_prints():
    shown = re.search(r"ended with\n\n```\n(.*?)```", pages.PAGES["README.md"], re.DOTALL)[1]
    names = [line.split("\u2502")[1].strip() for line in shown.splitlines() if "\u2502" in line]
    source = (ROOT / "train.py").read_text()
    assert [name for name in names if f'"{name}"' not in source] == [
        f"experts of blocks.{block}.mlp" for block in (1, 3, 5)
    ]
    config = compose.compose("vit_moe_tiny_patch8_64", [])
    assert f"training is complete: {config.training.steps} steps" in shown


SNIPPETS = pages.blocks("python")


def place_of(block):
    """Where a page says that a snippet goes: (file, what it follows there), or None: run it."""
    if found := re.search(r"Save this as `([\w/.]+)`:$", block.before):
        return found[1], None
    if found := re.search(r"At the top of `([\w/.]+)`:$", block.before):
        return found[1], r'\A"""(?s:.*?)"""\n'
    if found := re.search(r"In `(\w+)` of `([\w/.]+)`", block.before):
        return found[2], rf"(?m:^){found[1]}\b.*[{{(]\n"
    return None


def paste(block, folder):
    name, before = place_of(block)
    path = folder / name
    text = "" if before is None else path.read_text()
    assert path.exists() == (before is not None)
    found = re.search(before or "", text)
    assert found, f"{name} has no place for:\n{block.text}"
    path.write_text(text[: found.end()] + block.text + text[found.end() :])


def copy_product(folder):
    for path in (*ROOT.glob("*.py"), *(path.parent for path in ROOT.glob("*/__init__.py"))):
        if path.is_dir():
            ignored = shutil.ignore_patterns("__pycache__")
            shutil.copytree(path, folder / path.name, ignore=ignored)
        else:
            shutil.copy(path, folder)
    shutil.copytree(ROOT / "config", folder / "config")
    shutil.copy(ROOT / "pyproject.toml", folder)


@pytest.mark.slow
def test_the_router_of_the_readme_trains_where_it_is_pasted(image_folder, tmp_path):
    copy_product(tmp_path)
    pasted = [block for block in SNIPPETS if place_of(block)]
    named = [place_of(block)[0] for block in pasted]
    assert named == ["routers/cosine.py", "options/schema.py", *2 * ["routers/gates.py"]]
    for block in pasted:
        paste(block, tmp_path)
    (line,) = [line for _, line in COMMANDS if is_of_the_router(line)]
    words = [sys.executable, *shlex.split(line)[1:], *SHRUNK, f"dataset.train.root={image_folder}"]
    assert "training is complete: 1 steps" in shell(words, tmp_path)
    assert "router: cosine" in (tmp_path / "ckpts/cosine/config.yaml").read_text()
    # Lint but for the order of imports, which is one `ruff check --fix` away.
    lint = ["-m", "ruff", "check", "--no-cache", "--ignore", "I001", "routers", "options"]
    shell([sys.executable, *lint], tmp_path)


@pytest.mark.parametrize("block", [b for b in SNIPPETS if not place_of(b)], ids=lambda b: b.page)
def test_a_snippet_runs_as_it_stands(block, tmp_path):
    (tmp_path / "snippet.py").write_text(block.text)
    assert pages.run(["snippet.py"], tmp_path)


def test_make_test_is_what_ci_runs():
    assert "make test" in (ROOT / ".ci/run").read_text()
    printed = shell(["make", "-n", "test"], ROOT)
    assert "pytest" in printed
    assert "ruff" in printed
    assert "mypy" in printed


def test_every_claim_of_the_readme_has_a_test_that_pytest_finds():
    rows = re.findall(
        r"^\| .* \| `pytest (\S+?)(?: -k (\w+))?` \|$", pages.PAGES["README.md"], re.M
    )
    assert len(rows) == 5
    for name, word in rows:
        names = re.findall(r"^def (test_\w+)", Path(ROOT / name).read_text(), re.M)
        assert [n for n in names if word in n], name
