"""The rules of style that a machine can hold, on the syntax tree alone.

Each guard is a function from a file to its faults; it is shown to find one before it is trusted.
"""

import ast
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A file imports from lower levels only. A new file of the root gets a line here.
LEVELS = {
    "model_options": -1,
    "schema": 0,
    "seeds": 0,
    "sdpa": 0,
    "block_compile": 0,
    "balance": 0,
    "torch_kernels": 0,
    "triton_seam": 0,
    "triton_matmul": 1,
    "triton_rows": 1,
    "triton_tiles": 0,
    "triton_compile": 1,
    "triton_kernels": 2,
    "triton_tune": 3,
    "archives": 0,
    "decoding": 0,
    "devkit": 0,
    "cropping": 1,
    "image_index": 1,
    "image_folders": 2,
    "tar_shards": 2,
    "arrow_files": 2,
    "image_reader": 2,
    "layouts": 3,
    "duplicates": 3,
    "index_cache": 4,
    "path_env": 2,
    "augment": 2,
    "losses": 0,
    "lamb": 0,
    "launch": 0,
    "distributed": 1,
    "init": 1,
    "validation": 1,
    "kernels": 3,
    "routers": 1,
    "compose": 2,
    "layers": 1,
    "image_order": 1,
    "imagenet_dataset": 3,
    "feed": 4,
    "shared_index": 5,
    "optim": 1,
    "mixing": 1,
    "scoring": 4,
    "logbook": 1,
    "sharding": 2,
    "safe_dcp": 0,
    "dcp_writer": 2,
    "checkpoint": 3,
    "run_folder": 4,
    "async_checkpoint": 5,
    "vit_options": 2,
    "recompute": 2,
    "formats": 0,
    "provenance": 0,
    "upcycling": 2,
    "warm_start": 3,
    "weight_files": 4,
    "weight_sources": 6,
    "moe": 4,
    "vit": 4,
    "expert_load": 5,
    "models": 5,
    "assemble": 6,
    "evaluate": 7,
    "export": 7,
    "pretrained": 7,
    "distillation": 7,
    "stopping": 0,
    "resume": 7,
    "saver": 8,
    "train": 9,
}
# The one file that may import each of these libraries.
SEAMS = {
    "megatron_fsdp": "sharding",
    "transformer_engine": "layers",
    "triton": "triton_seam",
    "hydra": "compose",
    "omegaconf": "compose",
    "wandb": "logbook",
    "pyarrow": "arrow_files",
    "nvidia": "decoding",
}
READS_ENVIRONMENT = (
    "distributed",
    "launch",
    "train",
    "decoding",
)  # the last sets what a library reads
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_MEDIAN_LINES = 400, 60, 14

ROOT_FILES = sorted(ROOT.glob("*.py"))
# Written in pieces, so that this file does not hold what it looks for.
UNFINISHED = ("TO" + "DO", "FIX" + "ME", "XX" + "X")
ELSEWHERE = ("/wo" + "rk/", "/opt/" + "pypi", "/opt/" + "wheels", "extra-" + "index", ".h2" + "00")
SKIPPED_FOLDERS = {".git", ".venv", "ckpts", "runs", "outputs", "wandb", "build", "__pycache__"}
TEXT_SUFFIXES = {".py", ".yaml", ".yml", ".md", ".toml", ".txt", ".sh", ".cff", ".json", ""}

Function = ast.FunctionDef | ast.AsyncFunctionDef


def is_function(node):
    return isinstance(node, Function)


def functions(tree):
    return [node for node in ast.walk(tree) if is_function(node)]


def modules_imported(tree):
    """(line, full name) of every import, those by `importlib.import_module("...")` included."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.lineno, node.module or "."
        elif isinstance(node, ast.Call) and node.args:
            called = getattr(node.func, "attr", getattr(node.func, "id", ""))
            if called in ("import_module", "__import__"):
                first = node.args[0]
                first = first.values[0] if isinstance(first, ast.JoinedStr) else first
                yield node.lineno, str(getattr(first, "value", "?"))


def wrong_levels(name, text):
    for line, module in modules_imported(ast.parse(text)):
        if module in LEVELS and LEVELS[module] >= LEVELS[name]:
            yield f"{name}.py:{line} imports {module}, which is not below it"


def broken_seams(name, text):
    for line, module in modules_imported(ast.parse(text)):
        owner = SEAMS.get(module.partition(".")[0], name)
        if owner != name:
            yield f"{name}.py:{line} imports {module}: only {owner}.py may"


def long_files(name, text):
    count = len(text.splitlines())
    if count > MAX_FILE_LINES:
        yield f"{name}.py has {count} lines, at most {MAX_FILE_LINES}"


def num_lines(function):
    """Lines of a function's body: a signature of one option per line is no complexity."""
    return function.end_lineno - function.body[0].lineno + 1


def long_functions(name, text):
    for function in functions(ast.parse(text)):
        if num_lines(function) > MAX_FUNCTION_LINES:
            yield f"{name}.py:{function.lineno} {function.name} has {num_lines(function)} lines"


def missing_annotations(name, text):
    for function in functions(ast.parse(text)):
        a = function.args
        arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
        bare = [x.arg for x in arguments if x and not x.annotation and x.arg not in ("self", "cls")]
        if not function.returns:
            bare.append("return")
        yield from (f"{name}.py:{function.lineno} {function.name}: {x} has no type" for x in bare)


def missing_docstrings(name, text):
    tree = ast.parse(text)
    if not ast.get_docstring(tree):
        yield f"{name}.py has no docstring"
    scopes = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
    for scope in scopes:
        if isinstance(scope, ast.ClassDef) and scope.name.startswith("_"):
            continue
        for node in scope.body:
            is_documented = is_function(node) or isinstance(node, ast.ClassDef)
            if is_documented and not node.name.startswith("_") and not ast.get_docstring(node):
                yield f"{name}.py:{node.lineno} {node.name} has no docstring"


def string_statements(name, text):
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", [])
        can_document = isinstance(node, ast.Module | ast.ClassDef) or is_function(node)
        for statement in body[1:] if can_document else body if isinstance(body, list) else []:
            value = getattr(statement, "value", None)
            if isinstance(statement, ast.Expr) and isinstance(value, ast.Constant):
                if value.value is not ...:
                    yield f"{name}.py:{statement.lineno} is a constant used as a comment"


def swallowed_errors(name, text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {getattr(item, "id", "") for item in caught}
            if node.type is None or names & {"Exception", "BaseException"}:
                yield f"{name}.py:{node.lineno} catches everything"


def unsafe_calls(name, text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.keyword) and node.arg == "weights_only":
            if getattr(node.value, "value", None) is not True:
                yield f"{name}.py:{node.value.lineno} loads more than weights"
        if getattr(node, "attr", getattr(node, "id", "")) in ("chmod", "fchmod", "lchmod"):
            yield f"{name}.py:{node.lineno} changes permissions"


def environment_reads(name, text):
    if name in READS_ENVIRONMENT:
        return
    for node in ast.walk(ast.parse(text)):
        words = [getattr(node, "attr", "")]
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            words += [alias.name for alias in node.names]
        if {"environ", "environb", "getenv", "putenv"} & set(words):
            yield f"{name}.py:{node.lineno} reads the environment"


def unfinished(name, text):
    for number, line in enumerate(text.splitlines(), 1):
        yield from (f"{name}:{number} has {word}" for word in UNFINISHED if word in line)


def not_ascii(name, text):
    for number, line in enumerate(text.splitlines(), 1):
        if not line.isascii():
            yield f"{name}:{number} has {[c for c in line if not c.isascii()]}"


def hydra_targets(name, text):
    if "_target" + "_" in text:
        yield f"{name} names a class to build: options are values"


def mentions_of_elsewhere(name, text):
    for number, line in enumerate(text.splitlines(), 1):
        yield from (f"{name}:{number} mentions {word}" for word in ELSEWHERE if word in line)


def texts(folder=ROOT):
    """Every text file of the repo, (path from the root, content)."""
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            is_cache = path.name.startswith(".") and path.name != ".ci"
            is_unpacked = path.parent.name == "data"
            if path.name not in SKIPPED_FOLDERS and not is_cache and not is_unpacked:
                yield from texts(path)
        elif path.suffix in TEXT_SUFFIXES:
            yield str(path.relative_to(ROOT)), path.read_text("utf-8")


PYTHON_GUARDS = [
    wrong_levels,
    broken_seams,
    long_files,
    long_functions,
    missing_annotations,
    missing_docstrings,
    string_statements,
    swallowed_errors,
    unsafe_calls,
    environment_reads,
]
# guard, the fault, and next to it what is right
EXAMPLES = [
    (wrong_levels, "import train", "import schema"),
    (wrong_levels, "def f():\n    from layers import x", "from seeds import x"),
    (wrong_levels, "import optim", "import seeds as optim"),
    (broken_seams, "import megatron_fsdp.utils", "import torch"),
    (broken_seams, "from triton import jit", "from torch import jit"),
    (broken_seams, "importlib.import_module('wandb.x')", "f('wandb')"),
    (broken_seams, "importlib.import_module(f'megatron_fsdp.{x}')", "import_module(f'torch.{x}')"),
    (long_files, "x = 1\n" * 401, "x = 1\n" * 400),
    (long_functions, "def f():\n" + "    g()\n" * 61, "def f():\n" + "    g()\n" * 60),
    (missing_annotations, "def f(x) -> int: ...", "def f(x: int) -> int: ..."),
    (missing_annotations, "def f(x: int): ...", "class A:\n    def f(self) -> None: ..."),
    (missing_annotations, "def f(*, x=1) -> int: ...", "def f(*, x: int = 1) -> int: ..."),
    (missing_annotations, "def f(**x) -> int: ...", "def f(**x: int) -> int: ..."),
    (missing_docstrings, "x = 1", "'''D.'''\nx = 1"),
    (missing_docstrings, "'''D.'''\ndef f(): ...", "'''D.'''\ndef _f(): ..."),
    (
        missing_docstrings,
        "'D'\nclass A:\n 'D'\n def f(): ...",
        "'D'\nclass A:\n 'D'\n def _f(): ...",
    ),
    (string_statements, "x = 1\n'''Section'''", "'''Docstring.'''\nx = 1"),
    (string_statements, "def f():\n    x = 1\n    'why'", "def f():\n    'Docstring.'"),
    (string_statements, "if x:\n    'why'", "def f(): ..."),
    (swallowed_errors, "try: f()\nexcept: g()", "try: f()\nexcept ValueError: g()"),
    (swallowed_errors, "try: f()\nexcept Exception: g()", "try: f()\nexcept a.Error: g()"),
    (swallowed_errors, "try: f()\nexcept (A, Exception): g()", "try: f()\nexcept (A, b.C): g()"),
    (unsafe_calls, "load(p, weights_only=False)", "load(p, weights_only=True)"),
    (unsafe_calls, "load(p, weights_only=x)", "load(p)"),
    (unsafe_calls, "p.chmod(0o777)", "p.touch()"),
    (environment_reads, "os.environ['A']", "os.path"),
    (environment_reads, "os.getenv('A')", "os.fsync(1)"),
    (environment_reads, "from os import environ", "from os import path"),
    (unfinished, "x = 1  # TO" + "DO later", "x = 1  # why"),
    (not_ascii, "x = '\u00e9'", "x = 'e'"),
    (hydra_targets, "a: {_target" + "_: b.C}", "a: {target: 1}"),
    (mentions_of_elsewhere, "cd /wo" + "rk/x", "cd ./x"),
]


@pytest.mark.parametrize(("guard", "fault", "right"), EXAMPLES)
def test_guard_finds_the_fault_and_nothing_else(guard, fault, right):
    assert list(guard("layers", fault))
    assert list(guard("layers", right)) == []


def test_every_guard_has_an_example():
    shown = {guard for guard, _, _ in EXAMPLES}
    assert set(PYTHON_GUARDS) <= shown


def test_every_file_of_the_root_has_a_level():
    assert {path.stem for path in ROOT_FILES} == set(LEVELS)


@pytest.mark.parametrize("guard", PYTHON_GUARDS)
@pytest.mark.parametrize("path", ROOT_FILES, ids=lambda path: path.stem)
def test_root_file(path, guard):
    assert list(guard(path.stem, path.read_text("utf-8"))) == []


def test_median_function_is_short():
    trees = [ast.parse(path.read_text("utf-8")) for path in ROOT_FILES]
    lines = [num_lines(function) for tree in trees for function in functions(tree)]
    assert statistics.median(lines) <= MAX_MEDIAN_LINES


def test_no_module_is_named_as_one_of_the_standard_library():
    assert {path.stem for path in ROOT_FILES} & set(sys.stdlib_module_names) == set()


@pytest.mark.parametrize("guard", [unfinished, mentions_of_elsewhere])
def test_every_text(guard):
    assert [fault for name, text in texts() for fault in guard(name, text)] == []


def test_code_and_recipes_are_ascii():
    code = [(name, text) for name, text in texts() if name.endswith((".py", ".yaml"))]
    assert len(code) > len(ROOT_FILES)
    assert [fault for name, text in code for fault in not_ascii(name, text)] == []


def test_recipes_hold_values():
    recipes = [(name, text) for name, text in texts() if name.startswith("config/")]
    assert recipes
    assert [fault for name, text in recipes for fault in hydra_targets(name, text)] == []
