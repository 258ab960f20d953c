"""The image's recipe, read without a container engine."""

import fnmatch
import json
import re
import shlex
from pathlib import Path

import pytest

import train

ROOT = Path(__file__).resolve().parent.parent
TEXT = (ROOT / "Dockerfile").read_text()
IGNORED = [
    line
    for line in (ROOT / ".dockerignore").read_text().splitlines()
    if line and not line.startswith("#")
]


def instructions(text):
    """(keyword, rest) of every instruction, continued lines joined."""
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    joined = re.sub(r"\\\n\s*", "", "\n".join(lines))
    return [tuple(line.split(None, 1)) for line in joined.splitlines()]


def faults(text):
    """What is wrong with a Dockerfile."""
    steps = instructions(text)
    images = [rest for keyword, rest in steps if keyword == "FROM"]
    for image in images:
        tag = image.split()[0].rpartition(":")[2]
        if tag in (image, "latest") or not any(c.isdigit() for c in tag):
            yield f"FROM {image} is not pinned"
    users = [rest for keyword, rest in steps if keyword == "USER"]
    if not users or users[-1] in ("root", "0"):
        yield "runs as root"
    if [keyword for keyword, _ in steps][-1] != "CMD":
        yield "does not end with CMD"
    for keyword, rest in steps:
        if keyword == "ADD":
            yield "ADD fetches and unpacks: use COPY"
        if keyword == "COPY":
            *sources, _ = [word for word in shlex.split(rest) if not word.startswith("--")]
            missing = [source for source in sources if not (ROOT / source).exists()]
            yield from (f"COPY {source}: no such file" for source in missing)


def is_ignored(path):
    return any(
        fnmatch.fnmatch(path, pattern) or fnmatch.fnmatch(path, pattern.removeprefix("**/"))
        for pattern in IGNORED
    )


GOOD = 'FROM a:1\nUSER me\nCOPY train.py /x/\nCMD ["a"]'


@pytest.mark.parametrize(
    ("right", "wrong"),
    [
        ("FROM a:1", "FROM a"),
        ("FROM a:1", "FROM a:latest"),
        ("USER me", "USER root"),
        ("USER me\n", ""),
        ('CMD ["a"]', "USER you"),
        ("COPY train.py", "COPY train_py"),
        ("COPY", "ADD"),
    ],
)
def test_lint_finds_each_fault(right, wrong):
    assert list(faults(GOOD)) == []
    assert len(list(faults(GOOD.replace(right, wrong)))) == 1


def test_dockerfile_has_no_fault():
    assert list(faults(TEXT)) == []


def test_image_is_a_pytorch_container_of_a_known_month():
    (image,) = [rest for keyword, rest in instructions(TEXT) if keyword == "FROM"]
    assert re.fullmatch(r"nvcr\.io/nvidia/pytorch:2\d\.\d\d-py3", image)


def test_the_containers_torch_is_kept():
    (install,) = [rest for _, rest in instructions(TEXT) if "pip install" in rest]
    dropped = re.search(r"grep -Ev '([^']+)'", install)[1]
    kept = re.search(r"grep -E '([^']+)'", install)[1]
    added = [
        line
        for line in (ROOT / "requirements.txt").read_text().splitlines()
        if not re.match(dropped, line) and not line.startswith("#")
    ]
    assert added
    assert not [line for line in added if re.match(kept, line)]
    for name in ("torch", "torchvision", "transformer_engine", "transformer-engine"):
        assert re.match(kept, f"{name}==1")
    assert "-c /tmp/kept.txt" in install


@pytest.mark.parametrize("words", [json.loads(instructions(TEXT)[-1][1])])
def test_default_command_composes(words):
    assert words[0] == "torchrun"
    train.parse(words[words.index("train.py") + 1 :])


def test_documented_launch_lines_are_in_the_comment():
    comment = [line.removeprefix("#").strip() for line in TEXT.splitlines() if line[:1] == "#"]
    assert "docker build -t moevit ." in comment
    assert "docker run -it --rm --gpus=all --shm-size=16G moevit" in comment


@pytest.mark.parametrize(
    "path",
    [
        ".git",
        ".venv",
        "ckpts",
        "wandb",
        "data/tiny-imagenet-5",
        "data/imagenet",
        "__pycache__",
        "tests/__pycache__",
        ".pytest_cache",
    ],
)
def test_what_is_made_here_stays_out_of_the_image(path):
    assert is_ignored(path)


FOLDERS = [path.parent.name for path in ROOT.glob("*/__init__.py")]


@pytest.mark.parametrize(
    "path", ["train.py", "config", "data/tiny-imagenet-5.tar.gz", "tests", *FOLDERS]
)
def test_what_the_image_needs_is_copied(path):
    assert (ROOT / path).exists()
    assert not is_ignored(path)
