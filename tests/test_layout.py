"""The rules of style that a machine can hold, on the syntax tree alone.

Each guard is a function from a file to its faults; it is shown to find one before it is trusted.
"""

import ast
import re
import statistics
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
# A file imports from its own group or from one further down. A new folder, or file of the root,
# has its place here; docs and README show the same line.
HOUSE = """
train evaluate export
training
checkpoint imagenet_dataset moe vit
weights
images
layers
routers
moe_kernels
parallel
options
"""
LEVELS = {name: level for level, line in enumerate(HOUSE.split("\n")) for name in line.split()}
MAX_ROOT_FILES, MAX_FOLDERS = 8, 9
# The one file that may import each of these libraries.
SEAMS = {
    "megatron_fsdp": ("parallel/sharding.py", "parallel/cpu_shim.py"),
    "transformer_engine": ("layers/te.py",),
    "triton": ("moe_kernels/triton_seam.py",),
    "hydra": ("options/compose.py",),
    "omegaconf": ("options/compose.py", "options/command_line.py"),
    "wandb": ("training/logbook.py",),
    "pyarrow": ("images/arrow.py",),
    "nvidia": ("images/reading.py",),
    "scipy": ("images/folders.py",),
}
# The last sets what a library reads.
READS_ENVIRONMENT = ("parallel/distributed.py", "parallel/launch.py", "images/reading.py")
# Their threads read files or pipes, or wait: before one joins them, look at what it runs in them.
# Nothing that parses Python may, as Triton's compiler does: before CPython 3.11.8 two threads in
# ast.parse make each other fail now and then (python/cpython #106905). Processes may.
STARTS_THREADS = (
    "data/pack.py",
    "images/cache.py",
    "images/duplicates.py",
    "images/folders.py",
    "weights/background.py",
    "weights/verify.py",
)
MAX_FILE_LINES, MAX_FUNCTION_LINES, MAX_MEDIAN_LINES = 450, 60, 14

ROOT_FILES = sorted(ROOT.glob("*.py"))
FOLDERS = sorted({path.parent for path in ROOT.glob("*/__init__.py")} - {ROOT / "benchmarks"})
PRODUCT = [*ROOT_FILES, *(path for folder in FOLDERS for path in sorted(folder.glob("*.py")))]
TESTS = sorted((ROOT / "tests").rglob("*.py"))
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


def room(path):
    """The folder of a file, or its own name if it lies in the root."""
    return path.partition("/")[0].removesuffix(".py")


def wrong_levels(name, text):
    for line, module in modules_imported(ast.parse(text)):
        other, own = module.partition(".")[0], room(name)
        if other in LEVELS and other != own and LEVELS[other] <= LEVELS[own]:
            yield f"{name}:{line} imports {module}, which is not further down"


def imports_of_tests(name, text):
    for line, module in modules_imported(ast.parse(text)):
        if re.fullmatch(r"(tests\.)?(test_\w+|conftest)", module):
            yield f"{name}:{line} imports {module}: what tests share lies in tests/support"


def broken_seams(name, text):
    for line, module in modules_imported(ast.parse(text)):
        owners = SEAMS.get(module.partition(".")[0], (name,))
        if name not in owners:
            yield f"{name}:{line} imports {module}: only {owners[0]} may"


def threads(name, text):
    if name in STARTS_THREADS:
        return
    for node in ast.walk(ast.parse(text)):
        called = getattr(node, "attr", getattr(node, "id", getattr(node, "name", "")))
        if called in ("Thread", "ThreadPool", "ThreadPoolExecutor"):
            yield f"{name}:{node.lineno} starts threads: see STARTS_THREADS"


def long_files(name, text):
    count = len(text.splitlines())
    if count > MAX_FILE_LINES and "One idea:" not in (ast.get_docstring(ast.parse(text)) or ""):
        yield f"{name} has {count} lines and does not say `One idea: ...` in its docstring"


def num_lines(function):
    """Lines of a function's body: a signature of one option per line is no complexity."""
    return function.end_lineno - function.body[0].lineno + 1


def long_functions(name, text):
    for function in functions(ast.parse(text)):
        if num_lines(function) > MAX_FUNCTION_LINES:
            yield f"{name}:{function.lineno} {function.name} has {num_lines(function)} lines"


def missing_annotations(name, text):
    for function in functions(ast.parse(text)):
        a = function.args
        arguments = [*a.posonlyargs, *a.args, *a.kwonlyargs, a.vararg, a.kwarg]
        bare = [x.arg for x in arguments if x and not x.annotation and x.arg not in ("self", "cls")]
        if not function.returns:
            bare.append("return")
        yield from (f"{name}:{function.lineno} {function.name}: {x} has no type" for x in bare)


def missing_docstrings(name, text):
    tree = ast.parse(text)
    if not ast.get_docstring(tree):
        yield f"{name} has no docstring"
    scopes = [tree, *(node for node in tree.body if isinstance(node, ast.ClassDef))]
    for scope in scopes:
        if isinstance(scope, ast.ClassDef) and scope.name.startswith("_"):
            continue
        for node in scope.body:
            is_documented = is_function(node) or isinstance(node, ast.ClassDef)
            if is_documented and not node.name.startswith("_") and not ast.get_docstring(node):
                yield f"{name}:{node.lineno} {node.name} has no docstring"


def string_statements(name, text):
    for node in ast.walk(ast.parse(text)):
        body = getattr(node, "body", [])
        can_document = isinstance(node, ast.Module | ast.ClassDef) or is_function(node)
        for statement in body[1:] if can_document else body if isinstance(body, list) else []:
            value = getattr(statement, "value", None)
            if isinstance(statement, ast.Expr) and isinstance(value, ast.Constant):
                if value.value is not ...:
                    yield f"{name}:{statement.lineno} is a constant used as a comment"


def swallowed_errors(name, text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ExceptHandler):
            caught = node.type.elts if isinstance(node.type, ast.Tuple) else [node.type]
            names = {getattr(item, "id", "") for item in caught}
            last = node.body[-1]
            is_raised_again = isinstance(last, ast.Raise) and last.exc is None
            if (
                node.type is None or names & {"Exception", "BaseException"}
            ) and not is_raised_again:
                yield f"{name}:{node.lineno} catches everything"


def unsafe_calls(name, text):
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.keyword) and node.arg == "weights_only":
            if getattr(node.value, "value", None) is not True:
                yield f"{name}:{node.value.lineno} loads more than weights"
        if getattr(node, "attr", getattr(node, "id", "")) in ("chmod", "fchmod", "lchmod"):
            yield f"{name}:{node.lineno} changes permissions"


def environment_reads(name, text):
    if name in READS_ENVIRONMENT:
        return
    for node in ast.walk(ast.parse(text)):
        words = [getattr(node, "attr", "")]
        if isinstance(node, ast.ImportFrom) and node.module == "os":
            words += [alias.name for alias in node.names]
        if {"environ", "environb", "getenv", "putenv"} & set(words):
            yield f"{name}:{node.lineno} reads the environment"


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
            is_unpacked = path.parent == ROOT / "data"
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
    (wrong_levels, "import train", "from options import schema"),
    (wrong_levels, "def f():\n    from images.index import x", "from parallel.seeds import x"),
    (wrong_levels, "import vit", "from layers import vit"),
    (imports_of_tests, "from tests.test_x import f", "from tests.support import f"),
    (imports_of_tests, "import test_x", "import text_x"),
    (imports_of_tests, "from tests.conftest import f", "from tests.support.x import f"),
    (broken_seams, "import megatron_fsdp.utils", "import torch"),
    (broken_seams, "from triton import jit", "from torch import jit"),
    (broken_seams, "importlib.import_module('wandb.x')", "f('wandb')"),
    (broken_seams, "importlib.import_module(f'megatron_fsdp.{x}')", "import_module(f'torch.{x}')"),
    (threads, "with ThreadPoolExecutor(2): f()", "with ProcessPoolExecutor(2): f()"),
    (threads, "from concurrent.futures import ThreadPoolExecutor as E", "import threading"),
    (threads, "threading.Thread(target=f)", "threading.Event()"),
    (long_files, "x = 1\n" * 451, "x = 1\n" * 450),
    (long_files, "'Docs.'\n" + "x = 1\n" * 450, "'One idea: x.'\n" + "x = 1\n" * 450),
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
    assert list(guard("layers/x.py", fault))
    assert list(guard("layers/x.py", right)) == []


def test_every_guard_has_an_example():
    shown = {guard for guard, _, _ in EXAMPLES}
    assert set(PYTHON_GUARDS) <= shown


def test_every_file_of_the_root_and_every_folder_has_its_place():
    names = [path.stem for path in ROOT_FILES] + [folder.name for folder in FOLDERS]
    assert sorted(names) == sorted(LEVELS)
    assert len(ROOT_FILES) <= MAX_ROOT_FILES and len(FOLDERS) <= MAX_FOLDERS


def relative(path):
    return str(path.relative_to(ROOT))


@pytest.mark.parametrize("guard", PYTHON_GUARDS)
def test_product(guard):
    faults = [fault for path in PRODUCT for fault in guard(relative(path), path.read_text("utf-8"))]
    assert faults == []


def test_no_test_imports_another():
    texts = [(relative(path), path.read_text("utf-8")) for path in TESTS]
    assert [fault for name, text in texts for fault in imports_of_tests(name, text)] == []


def test_threads_are_started_only_where_what_they_run_is_known():
    code = [(name, text) for name, text in texts() if name.endswith(".py")]
    assert {name for name, _ in code} >= set(STARTS_THREADS)
    assert [fault for name, text in code for fault in threads(name, text)] == []


def test_median_function_is_short():
    trees = [ast.parse(path.read_text("utf-8")) for path in PRODUCT]
    lines = [num_lines(function) for tree in trees for function in functions(tree)]
    assert statistics.median(lines) <= MAX_MEDIAN_LINES


def test_no_module_is_named_as_one_of_the_standard_library():
    assert set(LEVELS) & set(sys.stdlib_module_names) == set()


@pytest.mark.parametrize("guard", [unfinished, mentions_of_elsewhere])
def test_every_text(guard):
    assert [fault for name, text in texts() for fault in guard(name, text)] == []


def test_code_and_recipes_are_ascii():
    code = [(name, text) for name, text in texts() if name.endswith((".py", ".yaml"))]
    assert len(code) > len(PRODUCT)
    assert [fault for name, text in code for fault in not_ascii(name, text)] == []


def test_recipes_hold_values():
    recipes = [(name, text) for name, text in texts() if name.startswith("config/")]
    assert recipes
    assert [fault for name, text in recipes for fault in hydra_targets(name, text)] == []
