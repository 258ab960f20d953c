"""What README and docs name exists: files, options, recipes, functions, links, the house."""

import ast
import fnmatch
import importlib
import re

import pytest

from options import compose
from options.schema import Config, walk
from tests.support.pages import ROOT

PATHS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "data" / "README.md"]
PATHS += [ROOT / "benchmarks" / "NOTES.md"]
OPTIONS = [name for name, _, _ in walk(Config())]
RECIPES = [path.stem for path in compose.CONFIG_DIR.glob("*.yaml")]
MODULES = {
    path.stem: ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in (*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py"))
    if path.parent.name not in ("tests", "data", "build")
}
SECTIONS = {option.partition(".")[0] for option in OPTIONS if "." in option}
# Paths of a data set, a run or an export, and of the router that the README adds.
ELSEWHERE = re.compile(
    r"(train|val|validation|out|ckpts|data/imagenet|\.venv)/|[/~<]|routers/cosine"
)


def without_blocks(text):
    return re.sub(r"^ *```.*?^ *```", "", text, flags=re.DOTALL | re.MULTILINE)


def is_option(name):
    return any(fnmatch.fnmatch(option, name) or option.startswith(f"{name}.") for option in OPTIONS)


def is_attribute(name):
    """True if module.attribute.attribute leads to something."""
    module, *attributes = name.split(".")
    if module not in MODULES:
        return False
    found = importlib.import_module(MODULES[module])
    for attribute in attributes:
        found = getattr(found, attribute, None)
    return found is not None


def is_named_rightly(code, folder=ROOT):
    """False if the words between two backticks name a file, option or function that is missing."""
    word = code.partition(" ")[0]
    name = word.partition("=")[0].removesuffix("()")
    first = name.partition(".")[0]
    if match := re.fullmatch(r"python -m benchmarks\.(\w+).*", code):
        return (ROOT / "benchmarks" / f"{match[1]}.py").exists()
    if ELSEWHERE.match(word):
        return True
    is_file = re.fullmatch(r"[\w./*-]+\.(py|md|ya?ml|toml)|[\w/]+/", word)
    if is_file or re.fullmatch(r"(tests|benchmarks|docs|config|data|moe_kernels)/[\w./-]+", word):
        return any(list(base.glob(word)) for base in (ROOT, folder))
    if re.fullmatch(r"[a-z_]\w*(\.[\w*]+)+", name) and first in SECTIONS | set(MODULES):
        return is_option(name) or is_attribute(name)
    if re.fullmatch(r"(vit|deit3?|vmoe)_\w*(tiny|small|base|large|huge|\*)[\w*]*", word):
        return bool(fnmatch.filter(RECIPES, word)) or word in OTHERS
    return True


# Models of timm with names like those of recipes.
OTHERS = ("deit_small_patch16_224",)
RIGHT = [
    *("options/schema.py", "routers/", "model.moe.router=cosine", "model.vit.*", "model.moe"),
    *("optim.build_optimizer", "init.HasInitialValue", "python -m benchmarks.loader --dry"),
    *("deit3_*_ft224", "x_BLD", "pytest -m gpu"),
]
WRONG = [
    *("options/schemas.py", "schema.py", "router/", "model.moe.routing=cosine", "model.vit2.*"),
    *("optim.make_optimizer", "init.HasNoValue", "python -m benchmarks.loaders --dry"),
    *("deit3_*_ft225", "benchmarks/results/nothing.json", "tests/test_nothing.py"),
]


def test_the_check_of_names_tells_right_from_wrong():
    assert [code for code in RIGHT if not is_named_rightly(code)] == []
    assert [code for code in WRONG if is_named_rightly(code)] == []


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_all_that_a_page_names_exists(path):
    codes = re.findall(r"`([^`\n]+)`", without_blocks(path.read_text()))
    assert codes
    assert [code for code in codes if not is_named_rightly(code, path.parent)] == []
    tests = re.findall(r"(?<![\w/])test_\w+\.py", path.read_text())
    assert [name for name in tests if not (ROOT / "tests" / name).exists()] == []


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", without_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path):
    for target in re.findall(r"\]\(([^):\s]+)\)", path.read_text()):
        name, _, anchor = target.partition("#")
        other = path.parent / name if name else path
        assert other.exists(), target
        assert not anchor or anchor in anchors(other.read_text()), target


def test_the_house_of_the_readme_is_the_one_that_is_tested():
    source = ast.parse((ROOT / "tests" / "test_layout.py").read_text())
    (house,) = [
        node.value.value
        for node in source.body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "HOUSE"
    ]
    page = (ROOT / "README.md").read_text()
    picture, rest = re.search(r"## The house\n\n```\n(.*?)\n\n(.*?)```", page, re.DOTALL).groups()
    named = [re.findall(r"(\w+)(?:\.py|/)(?=\s|$)", line) for line in picture.splitlines()]
    assert [" ".join(names) for names in named] == house.split("\n")[1:-1]
    assert sorted(re.findall(r"(\w+)/", rest)) == ["benchmarks", "config", "data", "docs", "tests"]


def test_every_file_that_a_docstring_names_exists():
    files = [*ROOT.glob("*.py"), *ROOT.glob("[a-z]*/*.py")]
    names = {path.name for path in files}
    wrong = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in files
        if path.parent.name != "tests"
        for name in re.findall(r"(?<![\w/.<>-])[a-z]\w*\.py\b", path.read_text())
        if name not in names
    ]
    assert wrong == []
