"""docs/config.md is what the schema says.

To write it again: PYTHONPATH=. python tests/test_docs_config.py > docs/config.md
"""

from pathlib import Path

from options import compose

PATH = Path(__file__).resolve().parent.parent / "docs" / "config.md"
INTRO = """# Options

Every option of a run, generated from `options/schema.py`. Set one on the command line as
`name=value`, or in a file under `config/`, which holds only what differs from these defaults. An
unknown name, a wrong type or a value out of range stops the run before its first step with one line
that says so.
"""


def page():
    return f"{INTRO}\n{compose.options_table()}\n"


def test_page_is_what_the_schema_says():
    command = "PYTHONPATH=. python tests/test_docs_config.py > docs/config.md"
    assert PATH.read_text() == page(), f"docs/config.md is out of date: run `{command}`"


def test_page_has_a_row_of_four_cells_for_every_option():
    rows = [line for line in page().splitlines() if line.startswith("| `")]
    assert len(rows) == compose.options_table().count("\n") - 1
    assert [row for row in rows if row.count("|") != 5] == []


if __name__ == "__main__":
    print(page(), end="")
