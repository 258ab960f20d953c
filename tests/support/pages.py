"""README and docs as text: their code blocks, and how a program is run as if it were typed."""

import contextlib
import multiprocessing
import os
import re
import runpy
import shlex
import sys
import textwrap
import traceback
from dataclasses import dataclass
from pathlib import Path

from tests.support.processes import TIMEOUT_S, meeting_place

ROOT = Path(__file__).resolve().parents[2]
# In the order in which a newcomer reads them; a page's commands may need those before.
NAMES = ("README.md", "using.md", "checkpoints.md", "data.md", "moe.md", "init.md")
PAGES = {
    name: (ROOT / ("" if name == "README.md" else "docs") / name).read_text() for name in NAMES
}
BLOCK = re.compile(r"^( *)```(\w+)\n(.*?)^ *```$", flags=re.DOTALL | re.MULTILINE)


@dataclass(frozen=True)
class Block:
    """A code block, and the paragraph before it, which says where it goes."""

    page: str
    language: str
    text: str
    before: str


def blocks(language):
    """All code blocks of a language, page by page."""
    found = []
    for name, page in PAGES.items():
        for match in BLOCK.finditer(page):
            before = page[: match.start()].rstrip().rpartition("\n\n")[2]
            found.append(Block(name, match[2], textwrap.dedent(match[3]), before))
    return [block for block in found if block.language == language]


def commands(text):
    """The lines of a bash block, continued ones joined, comments left out."""
    lines = re.sub(r"\\\n *", "", text).splitlines()
    return [command for line in lines if (command := line.split("  #")[0].strip())]


def _program(words, folder, variables, log):
    """Become `python words...` in `folder`; what this process has imported is not read again."""
    status = 1
    with log.open("w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.stdout = open(1, "w", closefd=False)
    sys.stderr = open(2, "w", closefd=False)
    os.chdir(folder)
    os.environ.update(variables)
    try:
        if words[0] == "-m":
            sys.argv = words[1:]
            runpy.run_module(words[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = list(words)
            sys.path.insert(0, str((folder / words[0]).resolve().parent))
            runpy.run_path(words[0], run_name="__main__")
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(words, folder, *, num_ranks=None):
    """What `python words...`, or so many ranks of it, print; they must end with exit code 0.

    Forked from this process, which saves the seconds that a new interpreter needs for its imports.
    """
    context = multiprocessing.get_context("fork")
    processes = []
    with meeting_place(num_ranks or 1) as places, contextlib.ExitStack() as stack:
        for rank, place in enumerate(places):
            log = folder / f"output_{rank}.txt"
            arguments = (words, folder, place if num_ranks else {}, log)
            process = context.Process(target=_program, args=arguments)
            process.start()
            stack.callback(process.kill)
            processes.append((process, log))
        for process, _ in processes:
            process.join(TIMEOUT_S)
    codes = [process.exitcode for process, _ in processes]
    said = "".join(log.read_text() for _, log in processes)
    assert codes == [0] * len(codes), f"{shlex.join(words)}: exit codes {codes}\n{said}"
    return said
